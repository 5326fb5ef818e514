"""A part of a forward pass that runs again in each backward pass through it.

Activation checkpointing keeps the inputs of a block instead of its activations. PyTorch's own runs
the block again with the weights that the module has by then, which in a loop are those of a later
step, and a gradient that is to be differentiated again keeps all that was recomputed. Here a block
is one node of the graph. Its inputs are all tensors that the block reads and that require grad; its
backward is a node of the same kind, the block's pullback. So it can be differentiated any number of
times, each time with the weights, buffers, modes and random numbers of its own step.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from innerloop._inner_gradient.graph import check_graph
from innerloop._module.copier import is_view
from innerloop._module.view import ModuleView, replaced
from innerloop._types import Params
from innerloop._utils import inner_pass, torch_private, tree
from innerloop._utils.autocast import AutocastModes
from innerloop._utils.execution import Mode, mode
from innerloop._utils.frozen import SMALL, Freezer, thaw
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop.errors import InnerLoopError, InvalidInputError, NotDifferentiableError
from innerloop.nn import _mode as replace
from innerloop.nn._derivative_order import Situation

Result = TypeVar("Result")


class ReadModule:
    """The module of a loop, whose parameters and buffers the blocks of a forward pass read.

    Args:
        view: the module.
        make_copy: makes another view of the same module, in which blocks run again. It holds no
            graph: the nodes hold it. None: ``view`` holds none itself.

    Attributes:
        view: the module.
        written: the names of buffers that blocks write.
        now: parameters and buffers when a block began.
        is_outermost: True if no loop was running when this one began.
    """

    def __init__(self, view: ModuleView, make_copy: Callable[[], ModuleView] | None = None) -> None:
        self.view = view
        self._make_copy = make_copy
        self._copy: ModuleView | None = view if make_copy is None else None
        self._others: dict[int, Callable[[ModuleView], object]] = {}
        self._swap: dict[int, object] | None = None
        self._last: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        self.written = set(view.statistics)
        self.is_outermost = False
        self.now: dict[str, Tensor] = {}
        self._buffers: tuple[Params, list[int]] = {}, []
        self._settings: list[dict[str, Any]] = []

    @property
    def copy(self) -> ModuleView:
        """Return the view in which blocks run again."""
        if self._copy is None:
            assert self._make_copy is not None
            self._copy = self._make_copy()
        return self._copy

    @property
    def swap(self) -> dict[int, object]:
        """Return what stands for each module, by identity, when a block runs again."""
        if self._swap is None:
            pairs = zip(self.view.modules, self.copy.modules, strict=True)
            self._swap = {id(ours): theirs for ours, theirs in pairs}
            if isinstance(self.view.module, dict):
                self._swap[id(self.view.module)] = self.copy.module
            self._swap.update((key, make(self.copy)) for key, make in self._others.items())
        return self._swap

    def stand_in(self, for_one: object, make: Callable[[ModuleView], object]) -> None:
        """Let ``make(copy)`` stand for an object that holds the module, when a block runs again."""
        self._others[id(for_one)] = make

    def state(self) -> _ModuleState:
        """Return the module as it is now, to run a block again in it; note it in `now`."""
        params = self.view.read()
        last = self._last
        if last is None or any(params[n] is not p for n, p in last[0].items()):
            last = self._last = params, {n: Tensor.detach(p) for n, p in params.items()}
        buffers = self.view.read_buffers()
        self.now = {**params, **buffers}
        self._buffers = buffers, torch_private.versions(buffers.values())
        kept = {n: b.detach() for n, b in buffers.items()}
        kept.update((n, b.clone()) for n, b in kept.items() if n in self.written)
        training = [module.training for module in self.view.modules]
        settings = [_settings(module) for module in self.view.modules]
        if settings == self._settings:
            # One object for all blocks between which nothing is set.
            settings = self._settings
        self._settings = settings
        live = weakref.ref(self.view)
        return _ModuleState(self.copy, last[1], {}, kept, training, settings, live)

    def wrote_known_buffers(self) -> bool:
        """True if no buffer was written since `state` besides those of which it kept a copy."""
        before, versions = self._buffers
        now = self.view.read_buffers()
        changed = {
            n
            for (n, b), version in zip(before.items(), versions, strict=True)
            if now[n] is not b or torch_private.version(b) != version
        }
        known = changed <= self.written
        self.written |= changed
        return known

    def forget(self) -> None:
        """Let go of the parameters that were read last."""
        self._last, self.now = None, {}
        self._buffers = {}, []


class _Thread(threading.local):
    """What blocks read in a thread."""

    def __init__(self) -> None:
        # In a list, so that what the garbage collector counts does not change from loop to loop.
        self._modules: list[tuple[ReadModule, ...] | None] = [None]

    @property
    def modules(self) -> tuple[ReadModule, ...] | None:
        """Return those of the loops that are running; None: no loop is."""
        return self._modules[0]

    @modules.setter
    def modules(self, modules: tuple[ReadModule, ...] | None) -> None:
        self._modules[0] = modules


_thread = _Thread()


def readable() -> tuple[ReadModule, ...] | None:
    """Return what blocks of this thread may read now, for `reading`; None: no loop is running."""
    return _thread.modules


def enter(module: ReadModule) -> None:
    """Run checkpointed parts of a forward pass as blocks that may read it, until `leave`."""
    torch_private.redirect_checkpoint(_in_place_of_checkpoint)
    module.is_outermost = _thread.modules is None
    _thread.modules = (*(_thread.modules or ()), module)


def leave(module: ReadModule) -> None:
    """Undo `enter`."""
    rest = tuple(m for m in _thread.modules or () if m is not module)
    if module.is_outermost and rest:
        # Loops may end in another order than that of their beginnings.
        rest[0].is_outermost = True
    _thread.modules = None if module.is_outermost and not rest else rest


class reading:  # noqa: N801 (used like a function, at every step)
    """Run checkpointed parts of a forward pass inside this one as blocks.

    Args:
        module: a module that they may read.
        besides: what else they may read; None: what they may read already.
    """

    def __init__(
        self, module: ReadModule | None, besides: tuple[ReadModule, ...] | None = None
    ) -> None:
        self._module = module
        self._besides = besides

    def __enter__(self) -> None:
        torch_private.redirect_checkpoint(_in_place_of_checkpoint)
        self._before = _thread.modules
        besides = (self._before or ()) if self._besides is None else self._besides
        own = () if self._module is None else (self._module,)
        _thread.modules = (*besides, *own)

    def __exit__(self, *_: object) -> None:
        _thread.modules = self._before
        if self._module is not None:
            self._module.forget()


class _Freezer(Freezer):
    """Takes a block's function apart; every tensor that requires grad may become an input."""

    def _tensor(self, x: Tensor) -> Any:
        return self._slot(x) if x.requires_grad else super()._tensor(x)


_NOT_SETTINGS = frozenset(vars(nn.Module()))
_PLAIN = frozenset({bool, int, float, complex, str, type(None), torch.dtype, torch.device})
_CONTAINERS = frozenset({list, tuple, dict})
_MISSING = object()


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that are numbers, names and the like, as they are now.

    One of them may act in the backward pass alone (the factor of a gradient reversal), where no
    comparison of outputs shows that it has changed.
    """
    return {
        name: _copied(x)
        for name, x in vars(module).items()
        if name not in _NOT_SETTINGS and _is_plain(x)
    }


def _is_plain(x: object) -> bool:
    kind = type(x)
    if kind in _PLAIN:
        return True
    if kind not in _CONTAINERS:
        return False
    parts: Any = x
    return len(parts) <= SMALL and all(map(_is_plain, parts.values() if kind is dict else parts))


def _copied(x: Any) -> Any:
    """Return a copy of what `_is_plain`."""
    kind = type(x)
    if kind not in _CONTAINERS:
        return x
    return {k: _copied(v) for k, v in x.items()} if kind is dict else kind(map(_copied, x))


def _put_settings(module: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Set attributes of a module; return what they were."""
    own = vars(module)
    before = {name: own.get(name, _MISSING) for name in settings}
    for name in own.keys() - settings.keys() - _NOT_SETTINGS:
        if hasattr(type(module), name) and _is_plain(own[name]):
            # Set since then over the attribute of the class.
            before[name] = own.pop(name)
    own.update((name, _copied(x)) for name, x in settings.items())
    return before


def _put_back_settings(module: nn.Module, before: Mapping[str, Any]) -> None:
    """Undo `_put_settings`."""
    own = vars(module)
    for name, x in before.items():
        if x is _MISSING:
            own.pop(name, None)
        else:
            own[name] = x


class _ModuleState(NamedTuple):
    """A loop's module as it is before a block.

    Attributes:
        view: where the block runs again.
        params: the parameters, as constants.
        inputs: the names of those that are inputs of the node, and which.
        buffers: the buffers.
        training: the mode of each module.
        settings: what `_settings` returns for each module.
        live: the module itself, in the hands of the user.
    """

    view: ModuleView
    params: dict[str, Tensor]
    inputs: dict[str, int]
    buffers: Params
    training: list[bool]
    settings: list[dict[str, Any]]
    live: weakref.ref[ModuleView]

    def replaced_submodule(self) -> str | None:
        """Return the name of a submodule that was replaced inside the loop, if any was."""
        live = self.live()
        return None if live is None or live is self.view else live.replaced_submodule(self.view)

    def run(self, values: Sequence[Tensor], function: Callable[[], Any]) -> Any:
        """Call ``function`` with the module in this state, and with inputs of the node in it."""
        view = self.view
        before = [module.training for module in view.modules]
        params = {**self.params, **{n: values[i] for n, i in self.inputs.items()}}
        names = view.buffers.keys()
        buffers = {
            n: values[self.inputs[n]] if n in self.inputs else self.buffers[n] for n in names
        }
        params = {n: p for n, p in params.items() if n not in names}
        pairs = list(zip(view.modules, self.settings, strict=True))
        settings = [_put_settings(module, own) for module, own in pairs]
        try:
            with view.in_modes(self.training):
                return view.run(params, buffers, function)[0]
        finally:
            for module, training in zip(view.modules, before, strict=True):
                module.training = training
            for module, own in zip(view.modules, settings, strict=True):
                _put_back_settings(module, own)


class _OtherModule:
    """A module that is not the loop's, without its children, as it is before a block.

    ``torch.func.functional_call`` puts tensors with a history in the places of its parameters.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._training = module.training
        self._settings = _settings(module)
        tables = torch_private.parameter_table(module), torch_private.buffer_table(module)
        # Buffers are written: running statistics must not be written twice.
        self._tables = [
            {
                n: (x if not i or x.requires_grad else x.clone())
                for n, x in table.items()
                if x is not None
            }
            for i, table in enumerate(tables)
        ]
        self._inputs: list[dict[str, int]] = [{}, {}]

    def tensors(self) -> list[Tensor]:
        """Return the parameters and buffers."""
        return [x for table in self._tables for x in table.values()]

    def connect(self, numbers: Mapping[Any, int]) -> None:
        """Note which tensors are inputs of the node, and let go of their histories.

        Args:
            numbers: those of the inputs, by `_key`.
        """
        for i, table in enumerate(self._tables):
            keys = {n: _key(x) for n, x in table.items() if x.requires_grad}
            self._inputs[i] = {n: numbers[k] for n, k in keys.items() if k in numbers}
            self._tables[i] = {n: x.detach() for n, x in table.items()}

    def put(self, values: Sequence[Tensor]) -> tuple[list[dict[str, Any]], bool, dict[str, Any]]:
        """Put the module in this state, with inputs of the node in it; return the one before."""
        module = self._module
        tables = torch_private.parameter_table(module), torch_private.buffer_table(module)
        held, training = [dict(table) for table in tables], module.training
        before = held, training, _put_settings(module, self._settings)
        module.training = self._training
        for i, table in enumerate(tables):
            own = {n: x.clone() if i else x for n, x in self._tables[i].items()}
            table.update(own)
            table.update((n, values[k]) for n, k in self._inputs[i].items())
        return before

    def put_back(
        self, tables: list[dict[str, Any]], training: bool, settings: Mapping[str, Any]
    ) -> None:
        """Undo `put`."""
        module = self._module
        _put_back_settings(module, settings)
        torch_private.parameter_table(module).update(tables[0])
        torch_private.buffer_table(module).update(tables[1])
        module.training = training


class _Block:
    """A part of a forward pass, to run again: a function of the tensors that require grad.

    Attributes:
        function: the frozen function, with its arguments.
        captured: what stands in the function's slots: the number of an input, or a constant.
        states: the modules of loops.
        others: other modules that the function reads.
        itself: the inputs that the function reads where nothing can stand in for them.
        random_state: that before it; None: it draws nothing.
        autocast: the modes of autocast.
        replaced: what decided which operations were replaced; None: none was.
        context: makes the block that the caller wants around it.
        places: the leaves of the result that are outputs of the node.
        numbers: of the outputs, to compare; None: they are not compared.
    """

    function: Any
    captured: list[int | Tensor]
    states: list[_ModuleState]
    others: list[_OtherModule]
    itself: frozenset[int]
    random_state: RandomState | None
    autocast: AutocastModes
    replaced: Situation | None
    context: Callable[[], AbstractContextManager[Any]] | None
    places: list[int]
    numbers: _Numbers | None

    @property
    def compares(self) -> bool:
        """True if what it gives is compared when it runs again."""
        return self.numbers is not None

    def __call__(self, values: Sequence[Tensor], create_graph: bool) -> list[Tensor]:
        """Run the block with a graph, at other inputs; return the outputs of the node."""
        captured = [values[c] if isinstance(c, int) else c for c in self.captured]
        call = thaw(self.function, captured, {})
        for state in self.states:
            call = functools.partial(state.run, values, call)
        modules = tuple(ReadModule(state.view) for state in self.states)
        before = [other.put(values) for other in self.others]
        try:
            with ExitStack() as stack:
                stack.enter_context(at_random_state(self.random_state))
                stack.enter_context(self.autocast.restored())
                stack.enter_context(reading(None, modules))
                if self.replaced is not None:
                    stack.enter_context(replace.replacing_as(self.replaced))
                if self.context is not None:
                    stack.enter_context(self.context())
                result = call()
        except Exception as error:
            if (other_model := self._replaced()) is not None:
                raise other_model from error
            raise
        finally:
            for other, held in zip(self.others, before, strict=True):
                other.put_back(*held)
        return self._checked(result, values)

    def _checked(self, result: object, values: Sequence[Tensor]) -> list[Tensor]:
        leaves = tree.leaves(result)
        ends = [leaves[i] for i in self.places if i < len(leaves)]
        found = [y for y in ends if isinstance(y, Tensor) and y.requires_grad]
        if len(found) < len(self.places):
            raise self.differs("returned other outputs")
        if self.numbers is not None and not _Numbers.of(found).agree(self.numbers):
            raise self.differs("gave other numbers")
        reached = {id(x) for x in check_graph(found, values, second_order=True)}
        if reached != {id(x) for x in values}:
            raise self.differs("read other tensors that require grad")
        return found

    def differs(self, what: str) -> InvalidInputError:
        """Return the error for a block that does something else when it runs again."""
        return self._replaced() or _differs(what)

    def _replaced(self) -> InvalidInputError | None:
        """Return the error for a submodule that was replaced inside the loop, if any was."""
        names = [name for state in self.states if (name := state.replaced_submodule()) is not None]
        if not names:
            return None
        return replaced(names[0], "a block under activation checkpointing (torch.utils.checkpoint)")


def _differs(what: str) -> InvalidInputError:
    return InvalidInputError(
        "a block under activation checkpointing (torch.utils.checkpoint) ran again in a backward "
        f"pass and {what} than in the forward pass: the derivative would be another one. What it "
        "reads has changed in between (a tensor written in place, an attribute, data drawn inside "
        "it), or it reaches loop.model through an object that is not a module: hand that over as "
        "an argument, checkpoint(function, x, other), or switch checkpointing off for this block"
    )


class _Pullback:
    """The pullback of a block, or of a pullback: a function of its inputs and of cotangents.

    Args:
        function: what is pulled back.
        count: the number of its inputs.
        given: the outputs that have a cotangent.
        is_inner: True if hooks of the inner pass act in it.
    """

    def __init__(
        self, function: _Block | _Pullback, count: int, given: list[int], is_inner: bool
    ) -> None:
        self.function = function
        self.itself: frozenset[int] = function.itself
        self._count = count
        self._given = given
        self._is_inner = is_inner
        self.compares: bool = function.compares
        self._numbers: _Numbers | None = None

    def __call__(self, values: Sequence[Tensor], create_graph: bool) -> list[Tensor | None]:
        """Return a cotangent for each input of the function, None where there is none.

        Raises:
            InvalidInputError: they are other numbers than at the first call.
        """
        found = self._pulled(values, create_graph)
        ends = [x for x in found if x is not None]
        if self.compares and ends:
            numbers = _Numbers.of(ends)
            if self._numbers is None:
                self._numbers = numbers
            elif not numbers.agree(self._numbers):
                raise self.differs("has another derivative")
        return found

    def differs(self, what: str) -> InvalidInputError:
        """Return the error for a block that does something else when it runs again."""
        return self.function.differs(what)

    def _pulled(self, values: Sequence[Tensor], create_graph: bool) -> list[Tensor | None]:
        inputs, cotangents = values[: self._count], values[self._count :]
        ends = self.function(inputs, True)
        given = zip([ends[i] for i in self._given], cotangents, strict=True)
        pairs = [(y, c) for y, c in given if y is not None and y.requires_grad]
        if not pairs:
            return [None] * len(inputs)
        with inner_pass.inner_pass() if self._is_inner else ExitStack():
            found = torch.autograd.grad(
                [y for y, _ in pairs],
                [x for x in inputs if x.requires_grad],
                [c for _, c in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        row = iter(found)
        return [_dense(next(row)) if x.requires_grad else None for x in inputs]


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.layout == torch.strided else x.to_dense()


class _Node(torch.autograd.Function):
    """A block, or a pullback, as a node that saves nothing but its inputs."""

    @staticmethod
    def forward(
        ctx: Any, function: _Block | _Pullback, outputs: list[Tensor] | None, *values: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.function = function
        ctx.save_for_backward(*values)
        ctx.set_materialize_grads(False)
        if outputs is not None:
            return tuple(outputs)
        with torch.enable_grad():
            with torch_private.unseen():
                leaves = [
                    x if i in function.itself else x.detach().requires_grad_()
                    for i, x in enumerate(values)
                ]
            found = function(leaves, False)
        return tuple(y if y is None else y.detach() for y in found)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(c is not None and torch_private.is_batched(c) for c in cotangents):
            raise NotDifferentiableError(
                "many cotangents at once (is_grads_batched=True, vmap) do not pass through a block "
                "under activation checkpointing (torch.utils.checkpoint): take one gradient after "
                "the other, or switch checkpointing off"
            )
        values = _saved(ctx)
        given = [i for i, c in enumerate(cotangents) if c is not None]
        if not given:
            return (None,) * (2 + len(values))
        pullback = _Pullback(ctx.function, len(values), given, inner_pass.is_inner_pass())
        dense = [_dense(cotangents[i]) for i in given]
        return (None, None, *_Node.apply(pullback, None, *values, *dense))


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """Return the inputs that a node has saved."""
    try:
        found: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise NotDifferentiableError(
            "a block under activation checkpointing (torch.utils.checkpoint) runs again in a "
            "backward pass, and a tensor that it reads was written in place after the forward "
            f"pass: write it out of place, or take the gradient before. PyTorch says: {error}"
        ) from error
    return found


def _key(x: Tensor) -> Any:
    """Return what tells where the gradient of a tensor goes."""
    return id(x) if x.grad_fn is None else (x.grad_fn, x.output_nr)


def run_block(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    context: Callable[[], AbstractContextManager[Any]] | None = None,
    compares: bool = True,
) -> Any:
    """Return ``function(*args, **kwargs)``, with a graph that keeps the inputs only.

    Where the block cannot be told from what is around it (it writes its inputs in place, it reads
    a tensor with a history that is not found) the graph is that of the function: right, and not
    smaller.

    Args:
        function: the block.
        args, kwargs: its arguments.
        context: makes a block of code around it.
        compares: False leaves it unchecked that it gives the same numbers when it runs again.
    """

    def plainly() -> Any:
        with ExitStack() if context is None else context():
            return function(*args, **kwargs)

    if not torch.is_grad_enabled() or mode() is not Mode.EAGER:
        return plainly()
    # In an outer backward pass the newest weights are none that a block may read.
    modules = [m for m in _thread.modules or () if m.view.is_readable()]
    block = _Block()
    with torch_private.unseen():
        freezer = _Freezer({key: new for m in modules for key, new in m.swap.items()})
        block.function = freezer.value(functools.partial(function, *args, **kwargs))
        block.states = [module.state() for module in modules]
        outside = list({id(part): part for m in freezer.modules for part in m.modules()}.values())
        block.others = [_OtherModule(part) for part in outside]
        held = [*(m.now.values() for m in modules), *(o.tensors() for o in block.others)]
        known = [x for tensors in held for x in tensors if x.requires_grad]
        if any(x.is_meta for x in (*freezer.captured, *freezer.constants, *known)):
            # Nothing is kept, and there are no numbers to compare.
            return plainly()
        block.autocast = AutocastModes.now((*freezer.captured, *freezer.constants))
        block.replaced = replace.situation_of_replacing()
        block.context = context
        found = [x for x in (*freezer.captured, *freezer.constants) if not x.is_inference()]
        versions = torch_private.versions(found)
        random_state = RandomState.now()
        hooks = torch_private.hooks_so_far()
        so_far = torch_private.nodes_so_far()
    result = plainly()
    with torch_private.unseen():
        if any(is_view(part) for part in outside):
            # The model of a loop that has ended, whose weights are not to be read again.
            return result
        wrote = torch_private.versions(found) != versions
        # Each module has to note what it wrote.
        known_ones = [module.wrote_known_buffers() for module in modules]
        if wrote or not all(known_ones):
            return result
        if torch_private.hooks_so_far() != hooks:
            # A hook acts in the inner backward pass, and not again when it is differentiated.
            return result
        leaves = tree.leaves(result)
        places = _outputs(leaves, [*found, *known], so_far)
        ends = [leaves[i] for i in places]
        inputs = _inputs(ends, [*freezer.captured, *known], so_far)
        if not places or inputs is None:
            return result
        numbers = {_key(x): i for i, x in enumerate(inputs)}
        stand_in = {_key(x) for x in (*freezer.captured, *known)}
        block.captured = [numbers.get(_key(x), x.detach()) for x in freezer.captured]
        block.itself = frozenset(i for i, x in enumerate(inputs) if _key(x) not in stand_in)
        for module, state in zip(modules, block.states, strict=True):
            keys = {n: _key(x) for n, x in module.now.items() if x.requires_grad}
            state.inputs.update({n: numbers[k] for n, k in keys.items() if k in numbers})
        for other in block.others:
            other.connect(numbers)
        now = RandomState.now()
        same = random_state is None or (now is not None and random_state.equals(now))
        block.random_state = None if same else random_state
        block.places = places
        block.numbers = _Numbers.of(ends) if compares else None
        outputs = _Node.apply(block, [y.detach() for y in ends], *inputs)
        return tree.with_leaves(result, tree.put(leaves, places, outputs))


def _outputs(leaves: list[Any], read: list[Tensor], so_far: int) -> list[int]:
    """Return which leaves of a result become outputs of a node.

    Those that share memory with what the block reads, or with each other, do not: an edit of the
    one is an edit of the other.
    """
    places = [
        i
        for i, y in enumerate(leaves)
        if isinstance(y, Tensor)
        and y.requires_grad
        and y.layout == torch.strided
        and torch_private.is_newer(y.grad_fn, so_far)
    ]
    others = [x for x in (*read, *leaves) if isinstance(x, Tensor) and x.layout == torch.strided]
    memory = Counter(x.untyped_storage().data_ptr() for x in {id(x): x for x in others}.values())
    return [i for i in places if memory[leaves[i].untyped_storage().data_ptr()] == 1]


@functools.cache
def _references() -> int:
    """Return the count of references to a leaf that nobody but a graph holds."""
    with torch.enable_grad():
        node: Any = torch.ones((), requires_grad=True).clone().grad_fn
    leaf = node.next_functions[0][0].variable
    return sys.getrefcount(leaf)


def _inputs(ends: list[Tensor], stand_in: Iterable[Tensor], so_far: int) -> list[Tensor] | None:
    """Return the tensors outside of a block that its outputs depend on; None: not all are found.

    Args:
        ends: the outputs.
        stand_in: the tensors in whose places others can be put.
        so_far: how many nodes there were before the block.
    """
    known = {_key(x): x for x in stand_in}
    inputs: dict[Any, Tensor] = {}
    seen: set[Node] = set()
    edges: list[Any] = [(y.grad_fn, y.output_nr) for y in ends]
    while edges:
        node, place = edges.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "AccumulateGrad":
            leaf = node.variable
            if id(leaf) not in known and (
                torch_private.gradient_hooks(leaf) or sys.getrefcount(leaf) <= _references()
            ):
                # Nobody but the graph holds it: made inside the block, anew each time.
                return None
            inputs[id(leaf)] = known.get(id(leaf), leaf)
        elif torch_private.is_newer(node, so_far):
            seen.add(node)
            edges.extend(node.next_functions)
        elif (node, place) in known:
            inputs[node, place] = known[node, place]
        else:
            return None
    found = list(inputs.values())
    sparse: list[Node] = []
    try:
        check_graph(ends, found, second_order=True, sparse=sparse)
    except InnerLoopError:
        # The loop tells whether it matters.
        return None
    return None if sparse else found


class _Numbers(NamedTuple):
    """Some numbers that change when the outputs of a block change.

    Attributes:
        values: sums over each output, and some of its entries.
        precision: the coarsest one among the outputs.
    """

    values: Tensor
    precision: float

    @classmethod
    def of(cls, ends: Sequence[Tensor]) -> _Numbers:
        """Compute them."""
        found: list[Tensor] = []
        for y in ends:
            flat = y.detach().reshape(-1)
            flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
            sums = [flat.sum(dtype=torch.float64), flat.abs().sum(dtype=torch.float64)]
            found += [torch.stack(sums), flat[:: max(flat.numel() // 16, 1)].double()]
        values = torch.cat([x.to(found[0].device) for x in found])
        return cls(values, max(torch.finfo(y.dtype).eps for y in ends))

    def agree(self, before: _Numbers) -> bool:
        """True if they are the same as before, up to rounding."""
        if self.values.shape != before.values.shape:
            return False
        if torch.equal(self.values, before.values):
            return True
        tolerance = 10 * before.precision**0.75
        largest = before.values.abs().nan_to_num(posinf=0).max()
        return torch.allclose(
            self.values,
            before.values,
            rtol=tolerance,
            atol=tolerance * float(largest),
            equal_nan=True,
        )


def checkpoint_block(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    r"""Return ``function(*args, **kwargs)``; its activations are computed again when needed.

    The graph of :math:`y = f(x, w)` keeps the inputs alone, :math:`x` and all tensors that require
    grad which the function reads (parameters of modules, captured tensors). The pullback
    :math:`(x, w, \bar y) \mapsto \bar y^T \partial f` is such a block too, so that derivatives of
    every order hold the activations of one block at a time. (Chen et al., "Training deep nets with
    sublinear memory cost", 2016, for the first derivative.)

    Inside a loop of this library ``torch.utils.checkpoint.checkpoint``, and what is built on it, do
    this by themselves. Write this one for hand-written second derivatives, where PyTorch's keeps
    all activations of the gradient that is differentiated.

    Args:
        function: the block, best a layer or a method of one. It runs again with the same modules,
            weights, modes, random numbers and captured variables; it must compute the same then.
        args: its arguments, in which tensors are found in lists, tuples and dicts too.
        kwargs: its keyword arguments.

    Returns:
        What the function returns. Under a transform of ``torch.func``, in compiled code and where
        no gradient is taken, the function itself runs. So it does where a block cannot stand for
        it: it writes its inputs in place, it registers hooks, it returns views of its inputs.

    Raises:
        InvalidInputError: in a backward pass, if the block computes other numbers than before.

    Cost: for a meta-gradient each block runs forward three times more and backward once more.

    Example:
        The third derivative of sin at 0 is -1:

        >>> import torch, innerloop
        >>> x = torch.tensor(0.0, requires_grad=True)
        >>> y = innerloop.checkpoint_block(torch.sin, x)
        >>> for _ in range(3):
        ...     (y,) = torch.autograd.grad(y, x, create_graph=True)
        >>> y.item()
        -1.0
    """
    found: Result = run_block(function, args, kwargs)
    return found


_SETTINGS = (
    *("use_reentrant", "context_fn", "determinism_check", "debug", "early_stop"),
    "preserve_rng_state",
)
"""The settings of ``torch.utils.checkpoint.checkpoint``; all other keywords are the function's."""


def _in_place_of_checkpoint(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a call of ``torch.utils.checkpoint.checkpoint``: inside a loop as a block of ours.

    Both kinds give the gradient of the function. Random numbers are always drawn again.
    """
    settings = {name: kwargs[name] for name in _SETTINGS if name in kwargs}
    rest = {name: value for name, value in kwargs.items() if name not in settings}
    reentrant = settings.get("use_reentrant") is not False
    make = settings.get("context_fn")
    if (
        _thread.modules is None
        or not args
        or (reentrant and (rest or make is not None or settings.get("debug")))
    ):
        # The last are errors, and PyTorch says which.
        return original(*args, **kwargs)
    return run_block(
        args[0],
        args[1:],
        rest,
        # Selective checkpointing fills a store in the first context and empties it in the second.
        context=None if make is None else lambda: make()[0],
        compares=settings.get("determinism_check") != "none",
    )
