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
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import compress, islice
from typing import Any

import torch
from torch import Tensor, nn

from innerloop._carry import Carry
from innerloop._inner_gradient.loss import check_loss
from innerloop._problem import Problem, rules_of
from innerloop._track.constant_buffers import constant_buffer
from innerloop._track.replay import Recorder, State, StepRecord, Taken
from innerloop._types import Grads, HyperTree, Named, Params
from innerloop._utils import torch_private, tree
from innerloop._utils.caches import cache
from innerloop._utils.execution import Mode, mode
from innerloop._utils.fingerprint import agree
from innerloop._utils.traceable import Traceable, build, wrote_containers
from innerloop.errors import InvalidInputError
from innerloop.nn._mode import replacing
from innerloop.optim._base import Optimizer
from innerloop.strategy._engine.compiled_step import Core, counted
from innerloop.strategy._engine.step_pullback import OutputCotangents

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
        self.problem.shows_params = True
        self.core = Core(self.problem, "reverse")
        self.traceable = Traceable()
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


def _contents(modules: Sequence[nn.Module]) -> tuple[list[object], list[int]]:
    """Return what modules hold besides numbers and code, and how often tensors were written."""
    held: list[object] = []
    versions: list[int] = []
    for module in modules:
        held += module.children()
        for name, value in vars(module).items():
            if name in _TABLES or isinstance(value, (_SIMPLE, _CODE)):
                continue
            held.append(value)
            if isinstance(value, Tensor):
                versions.append(torch_private.version(value))
            elif isinstance(value, dict):
                held += [*value, *value.values()]
            elif isinstance(value, (list, tuple)):
                held += value
    return held, versions


class ModuleFacts:
    """The facts of modules as they were, to tell if they are others now.

    Args:
        modules: the modules.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._facts = facts_of(modules)
        self._note()

    def _note(self) -> None:
        self._values = [list(vars(m).values()) for m in self._modules]
        self._contents = _contents(self._modules)
        self._hooks = torch_private.hooks_so_far()

    def are_unchanged(self) -> bool:
        """True if they are what they were; modes are no facts."""
        held, versions = _contents(self._modules)
        was, were = self._contents
        if versions != were or len(held) != len(was) or not all(map(operator.is_, held, was)):
            return False
        values = [list(vars(m).values()) for m in self._modules]
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


class CompiledRecorder(Recorder):
    """A recorder whose steps, in the forward pass too, are compiled.

    Attributes:
        unused: the names of trained parameters that the loss does not depend on.
    """

    unused: tuple[str, ...] = ()
    _facts: Any = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._waiting: dict[int, State] = {}

    def add(self, record: StepRecord, before: State) -> None:
        """Add a step that was taken from the state ``before``."""
        super().add(record, before)
        self._waiting.clear()

    def step(self, record: StepRecord, state: State) -> tuple[Taken, Params]:
        """Take a step on constants; return it, and the new buffers."""
        inputs, hyper, _ = self._arguments(record, state)
        closure = self._closure_of(record)
        with (
            self.model.lock,
            self.model.running(record),
            closure.at(self, record) as batch,
        ):
            (params, optimizer_state, buffers), loss, _ = closure.core.advance(inputs, hyper, batch)
        new = tree.leaves(optimizer_state)
        if any(
            isinstance(x, Tensor) and x.requires_grad
            for x in (*params.values(), *new, *buffers.values(), loss)
        ):
            raise InvalidInputError(
                "the closure given to loop.step depends on a tensor that requires grad and that "
                "was not found among its variables, so its gradient would be lost: hand it over, "
                f"loop.step(fn, args=(tensor,)). {COMPILE_FALSE} otherwise"
            )
        if self.unused:
            params = {n: state.params[n] if n in self.unused else p for n, p in params.items()}
        old = tree.leaves(state.optimizer_state)
        if any(type(x) is int for x in old) and len(old) == len(new):
            new = [int(x) if type(y) is int else x for x, y in zip(new, old, strict=True)]
            optimizer_state = tree.with_leaves(optimizer_state, new)
        return Taken(params, optimizer_state, loss, {}), buffers

    def _closure_of(self, record: StepRecord) -> _CompiledClosure:
        if self._facts is None:
            shapes = tuple((n, p.shape, p.dtype) for n, p in self.model.view.source.items())
            self._facts = shapes, facts_of(self.model.view.originals), self.second_order
        rules = tuple(map(type, rules_of(record.optimizer)))
        key = record.code, rules, self._facts
        found = _compiled.get(key)
        if found is None:
            found = _compiled[key] = _CompiledClosure(record.optimizer)
        return found

    def _arguments(self, record: StepRecord, state: State) -> tuple[Any, Any, list[str]]:
        """Return the state and hyper of a step, and the names of parameters not trained."""
        trained = set(self.trained)
        untrained = {n: p for n, p in state.params.items() if n not in trained}
        overrides = tree.map_tensors(Tensor.detach, record.hyper) if record.hyper else None
        params = {n: state.params[n] for n in self.trained}
        inputs = counted((params, state.optimizer_state, state.buffers))
        return inputs, ((untrained, list(record.captured)), overrides), list(untrained)

    def _advance(self, t: int, state: State) -> State:
        record = self.steps[t]
        self._check_written(t, record)
        taken, buffers = self.step(record, state)
        self._check_loss(t, taken.loss)
        new = State({**state.params, **taken.updated}, taken.optimizer_state, buffers)
        return self._edited(t + 1, new)

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

    def _state_before(self, t: int) -> State:
        """Return the state before step ``t``, from the last one that is kept.

        Those of the steps just before it wait for the nodes that come next: each step then runs
        again once.
        """
        known = self._waiting.pop(t, None)
        if known is not None:
            return known
        self._waiting.clear()
        if self._last is not None and self._last[0] == t:
            return self._last[1]
        begin, state = self.kept.newest(t)
        planned = self.kept.planned(begin, t) if begin < t else set()
        for time in range(begin, t):
            if time > begin and t - time < self.kept.stride:
                self._waiting[time] = state
            state = self._advance(time, state)
            if time + 1 in planned:
                self.kept.keep_for_sweep(time + 1, state)
        return state

    def _pull_back(
        self, t: int, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> tuple[State, list[Tensor | None]]:
        record, state = self.steps[t], self._state_before(t)
        self._check_written(t, record)
        layout = record.layout
        inputs, hyper, untrained = self._arguments(record, state)
        params, optimizer_state, buffers = inputs
        leaves = tree.leaves(optimizer_state)
        # Of the results.
        rest = iter(cotangents)
        of_params = {n: next(rest) for n in layout.updated}
        of_state = {place: next(rest) for place in layout.new_state}
        of_loss = next(rest) if self.second_order else None

        def filled(like: Any, c: Tensor | None) -> Tensor | None:
            # Without gaps: one compiled pullback then serves all steps.
            return torch.zeros_like(like) if c is None and tree.differentiable(like) else c

        given = [filled(p, of_params.get(n)) for n, p in params.items()]
        if layout.new_leaves == len(leaves):
            given += [filled(x, of_state.get(i)) for i, x in enumerate(leaves)]
        else:
            # The first step makes its state out of nothing.
            given += [of_state.get(i) for i in range(layout.new_leaves)]
        given += [filled(b, None) for b in buffers.values()]
        # Of the inputs.
        flags = iter(wanted)
        by_name = {n: next(flags) for n in layout.params}
        flags = islice(flags, len(layout.state), None)
        overrides = tree.leaves(record.hyper) if record.hyper else [None]
        learned = [isinstance(x, Tensor) and x.requires_grad for x in overrides]
        of_overrides = [requires and next(flags) for requires in learned]
        of_captured = [next(flags) for _ in record.captured]
        chosen = [*(by_name.get(n, False) for n in untrained), *of_captured, *of_overrides]
        closure = self._closure_of(record)
        with self.model.running(record), closure.at(self, record) as batch, torch.no_grad():
            found = closure.core.pull(
                inputs, hyper, batch, tuple(chosen), OutputCotangents(given, of_loss, [])
            )
        self._check_loss(t, found.loss)
        if found.after is not None:
            self._check_later(t, state, found.after.params)
            self._check_newest(t, state, found.after.params)
        trained = dict(zip(params, found.state, strict=False))
        # Where a step does not depend on a parameter there is no gradient, not a zero.
        trained |= dict.fromkeys(self.unused)
        through = dict(zip(untrained, found.hyper, strict=False))
        state_row = found.state[len(params) :]
        more = found.hyper[len(untrained) :]
        count = len(record.captured)
        row = [
            *(trained[n] if n in trained else through[n] for n in layout.params),
            *(state_row[place] for place in layout.state),
            *compress(more[count:], learned),
            *more[:count],
        ]
        return state, [c if w else None for c, w in zip(row, wanted, strict=True)]
