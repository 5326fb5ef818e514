"""Steps of a hand-written loop that are compiled: one step and its pullback, called T times.

A closure becomes the loss of a problem by being taken apart: the tensors that it captures, the
parameters and the buffers of the model are arguments of the compiled step, as those of `unroll`
are.
"""

from __future__ import annotations

import math
import operator
import threading
import types
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain, compress, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from innerloop._carry import Carry
from innerloop._inner_gradient.loss import check_loss
from innerloop._module.view import ModuleView
from innerloop._problem import Problem, rules_of
from innerloop._track.constant_buffers import constant_buffer
from innerloop._track.replay import Recorder, State, StepRecord, Taken
from innerloop._types import Grads, HyperTree, Named, Params
from innerloop._utils import torch_private, tree
from innerloop._utils.caches import cache
from innerloop._utils.compiling import CodePath
from innerloop._utils.execution import Mode, mode
from innerloop._utils.fingerprint import agree
from innerloop._utils.random_state import RandomState
from innerloop._utils.traceable import Traceable, build, wrote_containers
from innerloop.errors import InvalidInputError
from innerloop.nn._mode import replacing
from innerloop.optim._base import Optimizer
from innerloop.strategy._engine.compiled_step import Again, Core, StepResult
from innerloop.strategy._engine.step_pullback import InputCotangents, OutputCotangents

COMPILE_FALSE = "Write compile=False"


def _no_loss(params: object, hyper: object, batch: object) -> Any:
    """Stand in the place of a loss: the batch holds the closure."""
    raise AssertionError


class _ClosureStep(Problem[Any, None]):
    """A step of a hand-written loop as a problem.

    Its hyper is ``((untrained, captured), overrides)``: parameters that the optimizer does not
    step, captured tensors that require grad, and hyper-parameters of the optimizer. Its batch is
    ``(form, frozen)``: the closure, and the frozen parameters.

    Attributes:
        names: of the parameters that the optimizer steps.
        unused: of those that the loss does not depend on: they are skipped, as after ``backward``.
        second_order: False treats inner gradients as constants.
    """

    names: Sequence[str] = ()
    unused: tuple[str, ...] = ()
    second_order = True

    def evaluate(
        self, params: Named, buffers: Named, hyper: HyperTree, batch: Any, **_: object
    ) -> Any:
        pair: Any = hyper
        untrained, captured = pair[0]
        form, frozen = batch
        view = self.view
        assert view is not None
        own, own_buffers = view.read(), view.read_buffers()
        compiling = mode() is Mode.COMPILING
        made: list[Any] | None = None if compiling else []
        try:
            view.write({**frozen, **untrained, **params})
            view.write_buffers({name: buffer.clone() for name, buffer in buffers.items()})
            with replacing() if self.second_order else nullcontext():
                loss = build(form, captured, made)()
            if made is not None and wrote_containers(made):
                raise InvalidInputError(
                    "the closure given to loop.step writes to a list or dict that it has captured, "
                    "which compiled code does not do: return the loss only, and note other things "
                    f"after loop.step. {COMPILE_FALSE} otherwise"
                )
            now = view.read_buffers()
            if made is not None:
                for name, b in now.items():
                    if b.requires_grad:
                        raise constant_buffer(name)
            return check_loss(loss, "the loss given to loop.step"), (None, now)
        finally:
            view.write(own)
            view.write_buffers(own_buffers)

    def for_the_rule(self, found: Grads, params: Params) -> Any:
        unused = self.unused
        if mode() is not Mode.COMPILING and {n for n, g in found.items() if g is None} != {*unused}:
            raise InvalidInputError(
                "the loss of a step depends on other parameters than that of the first step did, "
                "and those that it does not depend on are skipped, as after backward(): compiled "
                f"steps skip the same ones at every step. {COMPILE_FALSE}"
            )
        return {n: None if n in unused else g for n, g in found.items()}

    def step(self, carry: Carry, hyper: HyperTree, batch: Any, t: int) -> Any:
        grads, loss, _, buffers = self.gradient(carry.params, carry.buffers, hyper, batch)
        if not self.second_order:
            loss = loss.detach()
            grads = {n: g if g is None else g.detach() for n, g in grads.items()}
        pair: Any = hyper
        overrides, (_, frozen) = pair[1], batch
        params = {n: carry.params[n] if n in carry.params else frozen[n] for n in self.names}
        updated, state = self.optimizer.update(
            {n: grads.get(n) for n in self.names}, carry.optimizer_state, params, overrides
        )
        new = {n: updated[n] for n in carry.params}
        return Carry(new, state, buffers, None, t + 1), loss, None


class _CompiledClosure:
    """The compiled steps of the closures of one code, which every loop may use.

    Args:
        optimizer: one of the kind that takes the steps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.problem = _ClosureStep(_no_loss, optimizer)
        self.core = Core(self.problem, "reverse")
        self.traceable = Traceable()
        for compiled in self.core.compiled:
            compiled.outside = self.traceable.outside
        self.lock = threading.RLock()

    @contextmanager
    def at(self, recorder: CompiledRecorder, record: StepRecord) -> Iterator[Any]:
        """Run a step of ``recorder``; yield its batch."""
        problem = self.problem
        with self.lock:
            try:
                problem.view = recorder.model.view
                problem.optimizer = record.optimizer
                problem.names = recorder.names
                problem.unused = recorder.unused
                problem.second_order = recorder.second_order
                yield self.traceable.form(record.closure), record.frozen.params
            finally:
                # Nothing of a loop stays behind.
                problem.view = None
                self.traceable.forget()


_PLAIN = (bool, int, float, str, type(None))
_SIMPLE = (*_PLAIN, torch.dtype, torch.device)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)


def facts_of(modules: Sequence[nn.Module]) -> tuple[Any, ...]:
    """Return what compiled code takes for granted of modules: it looks at some of it only.

    These are the classes, the attributes that are no tensors and no modules, and the hooks.
    """
    return tuple((type(m), tuple(_attributes(m)), torch_private.module_hooks(m)) for m in modules)


def _attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    for name, value in vars(module).items():
        if isinstance(value, _SIMPLE):
            if name != "training":
                yield name, value
        elif isinstance(value, _CODE):
            yield name, value
        elif isinstance(value, (list, tuple)) and all(isinstance(v, _SIMPLE) for v in value):
            yield name, tuple(value)


_TABLES = frozenset(vars(nn.Module()))
"""Attributes of every module: modes, hooks, and tables of what is looked at elsewhere."""


class ModuleFacts:
    """The facts of the modules of a loop as they were, to tell if they are others now.

    Args:
        view: of the modules. The parameters and buffers that it places are no facts.
    """

    def __init__(self, view: ModuleView) -> None:
        self._modules = view.modules
        self._placed: dict[int, set[Any]] = {}
        for container, key in chain(*view.parameters.values(), *view.buffers.values()):
            self._placed.setdefault(id(container), set()).add(key)
        self._facts = facts_of(self._modules)
        self._note()

    def _note(self) -> None:
        self._values = self._values_now()
        self._contents = self._contents_now()
        self._hooks = torch_private.hooks_so_far()
        # What may change while all values stay the same objects.
        held = [x for m in self._modules for n, x in self._items(vars(m)) if n not in _TABLES]
        self._boxes: list[Any] = [torch_private.module_table(m) for m in self._modules]
        self._boxes += [x for x in held if isinstance(x, (dict, list))]
        self._tensors = [x for x in held if isinstance(x, Tensor)]
        self._seen = self._objects()

    def _items(self, box: Any) -> Iterable[tuple[Any, Any]]:
        """Return the keys and values of a dict or a list, without those that the loop places."""
        items = box.items() if isinstance(box, dict) else enumerate(box)
        placed = self._placed.get(id(box))
        return items if placed is None else [(k, x) for k, x in items if k not in placed]

    def _inside(self, box: Any) -> Sequence[object]:
        """Return what a dict or a list holds, without what the loop places."""
        if id(box) in self._placed:
            return (
                [*chain(*self._items(box))]
                if isinstance(box, dict)
                else [x for _, x in self._items(box)]
            )
        return (*box, *box.values()) if isinstance(box, dict) else box

    def _values_now(self) -> list[list[object]]:
        return [[x for _, x in self._items(vars(m))] for m in self._modules]

    def _contents_now(self) -> tuple[list[object], list[int]]:
        """Return what modules hold besides numbers and code, and how often it was written."""
        held: list[object] = []
        versions: list[int] = []
        for module in self._modules:
            held += module.children()
            for name, value in self._items(vars(module)):
                if name in _TABLES or isinstance(value, (_SIMPLE, _CODE)):
                    continue
                held.append(value)
                if isinstance(value, Tensor):
                    versions.append(torch_private.version(value))
                elif isinstance(value, (dict, list)):
                    held += self._inside(value)
        return held, versions

    def _objects(self) -> tuple[list[object], list[int]]:
        """Return all that is held, and how often tensors were written."""
        tables = [
            [x for _, x in self._items(table)] if id(table) in self._placed else table.values()
            for table in map(vars, self._modules)
        ]
        inside = map(self._inside, self._boxes)
        return [*chain(*tables, *inside)], torch_private.versions(self._tensors)

    def are_unchanged(self) -> bool:
        """True if they are what they were; modes are no facts."""
        objects, times = self._objects()
        if (
            times == self._seen[1]
            and len(objects) == len(self._seen[0])
            and all(map(operator.is_, objects, self._seen[0]))
            and self._hooks == torch_private.hooks_so_far()
        ):
            return True
        held, versions = self._contents_now()
        was, were = self._contents
        if versions != were or len(held) != len(was) or not all(map(operator.is_, held, was)):
            return False
        values = self._values_now()
        if self._hooks == torch_private.hooks_so_far() and all(
            len(a) == len(b) and all(map(operator.is_, a, b))
            for a, b in zip(values, self._values, strict=True)
        ):
            return True
        if facts_of(self._modules) != self._facts:
            return False
        self._note()
        return True


_compiled: MutableMapping[Any, _CompiledClosure] = cache("compiled closures")


class _Arguments(NamedTuple):
    """What a compiled step is a function of, besides its batch.

    Attributes:
        state: parameters that are trained, optimizer state and buffers.
        hyper: parameters that are not trained, what the closure captured, and overrides.
    """

    state: Any
    hyper: Any

    @property
    def leaves(self) -> list[Any]:
        """Return the leaves of the state."""
        params, optimizer_state, buffers = self.state
        return [*params.values(), *tree.leaves(optimizer_state), *buffers.values()]

    @property
    def kinds(self) -> list[Any]:
        """Return the kinds of what a step may have changed, or the user between two steps."""
        return _kinds([*self.leaves, *self.hyper[0][0].values()])


class _Before(NamedTuple):
    """The state before a step that runs again.

    Attributes:
        state: the state.
        is_result: True if all of it is what the step before, when it ran again, gave.
    """

    state: State
    is_result: bool


class _Pulling:
    """How the pullback of steps of one kind is called.

    Args:
        record: of one of these steps.
        arguments: of one of them.
        wanted: for each input of the node, True if its cotangent is wanted.
        learned: for each leaf of the overrides, True if it is an input of the node.
        second_order: False if the loss has no cotangent.
        unused: the names of parameters that the loss does not depend on.

    Attributes:
        given: for each leaf of the new state the place of its cotangent among those of the node;
            the last place stands for none.
        filled: places of ``given`` that must have no gaps, and the leaves that a zero is like.
        loss: the place of the cotangent of the loss.
        chosen: for each leaf of hyper, True if its cotangent is wanted.
        row: for each input of the node, its place among what the pullback returns; the last place
            stands for none.
        path: of compiled code that pulled such a step back; None: PyTorch is asked which does.
        kinds: of the cotangents that it was given.
    """

    def __init__(
        self,
        record: StepRecord,
        arguments: _Arguments,
        wanted: Sequence[bool],
        learned: Sequence[bool],
        second_order: bool,
        unused: Sequence[str],
    ) -> None:
        layout = record.layout
        names, buffers = list(arguments.state[0]), len(arguments.state[2])
        untrained = list(arguments.hyper[0][0])
        count = len(names)
        leaves = arguments.leaves
        middle = len(leaves) - count - buffers
        # Of the results.
        end = len(layout.updated) + len(layout.new_state) + second_order
        rest = iter(range(end))
        of_params = {n: next(rest) for n in layout.updated}
        of_state = {place: next(rest) for place in layout.new_state}
        self.loss = next(rest, end)
        self.given = [of_params.get(n, end) for n in names]
        self.given += [of_state.get(i, end) for i in range(layout.new_leaves)]
        self.given += [end] * buffers
        places = list(enumerate(range(len(leaves))))
        if layout.new_leaves != middle:
            # The first step makes its state out of nothing.
            first = len(self.given) - buffers
            places = [*places[:count], *enumerate(range(len(leaves) - buffers, len(leaves)), first)]
        self.filled = [(place, i) for place, i in places if tree.differentiable(leaves[i])]
        # Of the inputs.
        flags = iter(wanted)
        by_name = {n: next(flags) for n in layout.params}
        flags = islice(flags, len(layout.state), None)
        of_overrides = [requires and next(flags) for requires in learned]
        of_captured = [next(flags) for _ in record.captured]
        self.chosen = (*(by_name.get(n, False) for n in untrained), *of_captured, *of_overrides)
        # Of what is pulled back: the state, then hyper.
        through = len(leaves)
        captured = range(through + len(untrained), through + len(untrained) + len(of_captured))
        overrides = range(captured.stop, captured.stop + len(learned))
        end = overrides.stop
        of = {n: i for i, n in enumerate(names)}
        # Where a step does not depend on a parameter there is no gradient, not a zero.
        of |= dict.fromkeys(unused, end)
        of = {n: through + i for i, n in enumerate(untrained)} | of
        row = [
            *(of[n] for n in layout.params),
            *(count + place for place in layout.state),
            *compress(overrides, learned),
            *captured,
        ]
        self.row = [place if w else end for place, w in zip(row, wanted, strict=True)]
        self.path: CodePath | None = None
        self.kinds: list[Any] = []

    def note(
        self,
        path: CodePath | None,
        arguments: _Arguments,
        given: OutputCotangents,
        kinds: list[Any],
    ) -> None:
        """Note that compiled code took this path; other steps of the kind may take it unasked."""
        leaves = (*arguments.leaves, *tree.leaves(arguments.hyper), *given.state, given.loss)
        tensors = [id(x) for x in leaves if isinstance(x, Tensor)]
        # The path of one tensor in two places takes for granted that it is one.
        if path is not None and path.is_static and len({*tensors}) == len(tensors):
            self.path, self.kinds = path, kinds


def _kinds(tensors: Sequence[Any]) -> list[Any]:
    """Return what compiled code takes for granted of tensors, besides their shapes."""
    return [
        (x.dtype, x.stride(), x.is_neg(), x.is_conj(), type(x)) if isinstance(x, Tensor) else None
        for x in tensors
    ]


class CompiledRecorder(Recorder):
    """A recorder whose steps, in the forward pass too, are compiled.

    A step runs again by the code that ran in the forward pass, and is pulled back by that which
    pulled a step of its kind back before: PyTorch is not asked again which code is right.

    Attributes:
        unused: the names of trained parameters that the loss does not depend on.
    """

    unused: tuple[str, ...] = ()
    _facts: Any = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._waiting: dict[int, _Before] = {}
        self._pullings: dict[Any, _Pulling] = {}
        self._kinds: dict[CodePath, list[Any]] = {}
        self._known: tuple[Any, Any, _CompiledClosure] | None = None
        self._trained = frozenset(self.trained)

    def add(self, record: StepRecord, before: State) -> None:
        """Add a step that was taken from the state ``before``."""
        super().add(record, before)
        self._waiting.clear()

    def step(self, record: StepRecord, state: State) -> tuple[Taken, Params]:
        """Take a step on constants; return it, and the new buffers.

        Counts in the optimizer's state are tensors: a number would be compiled in.
        """
        closure, arguments = self._closure_of(record), self._arguments(record, state)
        record.random_state = record.form = None
        with self.model.lock, self.model.running(record), closure.at(self, record) as batch:
            new, loss = self._new(state, closure.core.advance(*arguments, batch))
            taken = closure.core.compiled[0]
            before, now = taken.random_state, RandomState.now() if taken.random_state else None
            if before is not None and now is not None and not before.equals(now):
                record.random_state = before
            record.path = path = taken.path
            if path is not None and path not in self._kinds:
                self._kinds[path] = arguments.kinds
            if path is not None and path.is_closed:
                record.form = batch[0]
        if any(
            isinstance(x, Tensor) and x.requires_grad
            for part in (new.params.values(), tree.leaves(new.optimizer_state), [loss])
            for x in (*part, *new.buffers.values())
        ):
            raise InvalidInputError(
                "the closure given to loop.step depends on a tensor that requires grad and that "
                "was not found among its variables, so its gradient would be lost: hand it over, "
                f"loop.step(fn, args=(tensor,)). {COMPILE_FALSE} otherwise"
            )
        return Taken(new.params, new.optimizer_state, loss, {}), new.buffers

    def _new(self, before: State, found: StepResult) -> tuple[State, Tensor]:
        """Return the new state (of the parameters, those that are trained), and the loss."""
        (given, optimizer_state, buffers), loss, _ = found
        params = dict(given)
        if self.unused:
            params = {n: before.params[n] if n in self.unused else p for n, p in params.items()}
        return State(params, optimizer_state, buffers), loss

    def _closure_of(self, record: StepRecord) -> _CompiledClosure:
        known = self._known
        if known is not None and known[0] is record.code and known[1] is record.optimizer:
            return known[2]
        if self._facts is None:
            shapes = tuple((n, p.shape, p.dtype) for n, p in self.model.view.source.items())
            self._facts = shapes, facts_of(self.model.view.originals), self.second_order
        rules = tuple(map(type, rules_of(record.optimizer)))
        key = record.code, rules, self._facts
        found = _compiled.get(key)
        if found is None:
            found = _compiled[key] = _CompiledClosure(record.optimizer)
        self._known = record.code, record.optimizer, found
        return found

    def _arguments(self, record: StepRecord, state: State) -> _Arguments:
        """Return the state and hyper of a step."""
        trained = self._trained
        params = {n: state.params[n] for n in self.trained}
        untrained = {n: p for n, p in state.params.items() if n not in trained}
        overrides = tree.map_tensors(Tensor.detach, record.hyper) if record.hyper else None
        hyper = (untrained, list(record.captured)), overrides
        return _Arguments((params, state.optimizer_state, state.buffers), hyper)

    def _path_of(
        self, record: StepRecord, arguments: _Arguments, is_result: bool
    ) -> CodePath | None:
        """Return the path of a step that runs again; None if PyTorch has to be asked for it.

        Args:
            record: of the step.
            arguments: of the step.
            is_result: True if its state is all that the step before it gave.
        """
        path = record.path
        # The tensors of a state that was kept, or edited, may lie in memory in another way.
        if path is None or not path.fits_here:
            return None
        return path if is_result or self._kinds[path] == arguments.kinds else None

    @contextmanager
    def _around(self, record: StepRecord, closure: _CompiledClosure) -> Iterator[Any]:
        """Run as the step did."""
        with self.model.running(record), closure.at(self, record) as batch:
            yield batch

    def _taken_again(self, t: int, before: _Before) -> State:
        """Take step ``t`` again; return the state after it."""
        record, (state, is_result) = self.steps[t], before
        self._check_written(t, record)
        closure, arguments = self._closure_of(record), self._arguments(record, state)
        path = self._path_of(record, arguments, is_result)
        around = partial(self._around, record, closure)
        if path is None or record.form is None or record.random_state is not None:
            with around() as batch:
                again = None if path is None else Again(path, nullcontext)
                found = closure.core.advance(*arguments, batch, again)
        else:
            # Compiled code has its modes in itself.
            batch = record.form, record.frozen.params
            found = closure.core.advance(*arguments, batch, Again(path, around))
        new, loss = self._new(state, found)
        self._check_loss(t, loss)
        return new._replace(params={**state.params, **new.params})

    def _has_same_loss(self, t: int, loss: Tensor) -> bool:
        """True if the loss is what it was, up to rounding: other code may compute it now."""
        was = self.steps[t].loss
        if isinstance(was, Tensor):
            return agree(loss, was)
        now = loss.item()
        if now == was:
            return True
        tolerance = 10 * torch.finfo(loss.dtype).eps ** 0.75
        return math.isclose(now, was, rel_tol=tolerance, abs_tol=tolerance * 1e-3)

    def _state_before(self, t: int) -> _Before:
        """Return the state before step ``t``, from the last one that is kept.

        Those of the steps just before it wait for the nodes that come next: each step then runs
        again once.
        """
        known = self._waiting.pop(t, None)
        if known is not None:
            return known
        self._waiting.clear()
        begin, state, planned = self._where_to_begin(t)
        before = _Before(state, is_result=False)
        passes_on = bool(self.unused) or len(state.params) > len(self._trained)
        for time in range(begin, t):
            if time > begin and t - time < self.kept.stride:
                self._waiting[time] = before
            state = self._edited(time + 1, self._taken_again(time, before))
            edited = self.steps[time + 1].params or self.steps[time + 1].buffers
            before = _Before(state, is_result=not edited and not passes_on)
            if time + 1 in planned:
                self.kept.keep_for_sweep(time + 1, state)
        path = self.steps[t].path
        if path is not None and path.is_static:
            # Each state of the chain comes out of the one before: if the last is what the forward
            # pass had, they all are. (That a pullback returns it takes a fifth of its time.)
            params = self._taken_again(t, before).params
            self._check_later(t, state, params)
            self._check_newest(t, state, params)
        return before

    def _pull_back(
        self, t: int, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> tuple[State, list[Tensor | None]]:
        record, before = self.steps[t], self._state_before(t)
        state = before.state
        self._check_written(t, record)
        arguments = self._arguments(record, state)
        pulling = self._pulling_of(record, arguments, wanted)
        rows = (*cotangents, None)
        given = [rows[place] for place in pulling.given]
        # Without gaps: one compiled pullback then serves all steps.
        for place, i in pulling.filled:
            if given[place] is None:
                given[place] = torch.zeros_like(arguments.leaves[i])
        output = OutputCotangents(given, rows[pulling.loss], [])
        own = self._path_of(record, arguments, before.is_result)
        found = self._pulled(record, arguments, pulling, output, own)
        self._check_loss(t, found.loss)
        if found.after is not None:
            self._check_later(t, state, found.after.params)
            self._check_newest(t, state, found.after.params)
        row = (*found.state, *found.hyper, None)
        return state, [row[place] for place in pulling.row]

    def _pulling_of(
        self, record: StepRecord, arguments: _Arguments, wanted: Sequence[bool]
    ) -> _Pulling:
        """Return how the pullback of a step is called."""
        overrides = tree.leaves(record.hyper) if record.hyper else [None]
        learned = [isinstance(x, Tensor) and x.requires_grad for x in overrides]
        key = record.path, record.layout, *wanted, *learned, *arguments.hyper[0][0]
        found = self._pullings.get(key)
        if found is None or record.path is None:
            found = self._pullings[key] = _Pulling(
                record, arguments, wanted, learned, self.second_order, self.unused
            )
        return found

    def _pulled(
        self,
        record: StepRecord,
        arguments: _Arguments,
        pulling: _Pulling,
        given: OutputCotangents,
        own: CodePath | None,
    ) -> InputCotangents:
        """Pull a step back by compiled code.

        Args:
            record: of the step.
            arguments: of the step.
            pulling: how it is called.
            given: the cotangents of its results.
            own: the path of compiled code that takes the step.
        """
        closure, chosen = self._closure_of(record), pulling.chosen
        kinds = _kinds([*given.state, given.loss])
        around = partial(self._around, record, closure)
        path = pulling.path if own is not None and kinds == pulling.kinds else None
        if path is not None and not path.fits_here:
            path = None
        plain = path is not None and path.is_closed and record.random_state is None
        if path is not None and plain and record.form is not None:
            batch = record.form, record.frozen.params
            return closure.core.pull(*arguments, batch, chosen, given, Again(path, around))
        with around() as batch:
            # What the step reads is as it was when compiled code took it.
            known = (
                own is not None
                and own.is_static
                and closure.core.compiled[0].would_take(own, (*arguments, batch))
            )
            closure.problem.shows_params = not known
            with torch.no_grad():
                again = None if path is None or not known else Again(path, nullcontext)
                found = closure.core.pull(*arguments, batch, chosen, given, again)
            if known and again is None:
                pulling.note(closure.core.compiled[1].path, arguments, given, kinds)
        return found
