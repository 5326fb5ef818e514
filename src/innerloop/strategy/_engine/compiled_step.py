"""One step and its pullback, compiled.

The core of a step is compiled: the loss, its gradient and the update. The user's functions make
the data and the optimizer's hyper-parameters before it, so that the number of the step is not part
of the compiled code, and one compilation serves all steps.

Compiled code is compared with eager code at the first call of each code path and at random later
calls; the graph of the eager code is searched for backward rules that compiled code would drop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._inner_gradient.graph import refuse_own_functions, refusing_own_functions
from innerloop._problem import Problem
from innerloop._types import HyperTree, Params
from innerloop._utils import torch_private, tree
from innerloop._utils.caches import cache
from innerloop._utils.compiled_check import (
    LaterChecks,
    Trust,
    check_compiled,
    fields_of,
    moved_by_rounding,
)
from innerloop._utils.compiling import CodePath, Compiled, compiler_at_work, step_options
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop._utils.traceable import refuse_numpy
from innerloop.errors import InnerLoopError
from innerloop.nn._catalogue import HIDDEN
from innerloop.nn._mode import unwatched
from innerloop.optim._engine.packing import Packed
from innerloop.strategy._engine import step_pullback
from innerloop.strategy._engine.compiled_pullback import CompiledPullback
from innerloop.strategy._engine.guards import check_constants
from innerloop.strategy._engine.step_pullback import (
    Cotangents,
    InputCotangents,
    OutputCotangents,
    State,
    Step,
    carry_of,
    state_of,
)

StepResult = tuple[State, Tensor, Any]
Groups = dict[str, object]
"""Results by groups of one scale, as `check_compiled` takes them."""


class Again(NamedTuple):
    """How to run compiled code that has run before, on inputs of the same kind.

    Attributes:
        path: what ran. Nothing is asked: the caller knows that it is the right one.
        around: makes the context in which the eager code runs, should it be compared once more.
    """

    path: CodePath
    around: Callable[[], AbstractContextManager[object]]


class Core:
    """A compiled step.

    Args:
        core: a problem whose hyper is a pair, that of the loss and that of the optimizer, and whose
            steps do not depend on their number: both are inputs.
        product: how the pullback is taken.
        keeps_graph: True if the pullback is compiled from the graph of the step where that is
            possible. It takes less time to compile, and more to call where the step is small.
    """

    def __init__(self, core: Problem, product: str, *, keeps_graph: bool = False) -> None:
        def advance(state: Any, hyper: Any, batch: object) -> Any:
            new, loss, aux = core.step(carry_of(state, None), hyper, batch, 0)
            return state_of(new), loss, aux

        def pull(
            state: Any, hyper: Any, batch: object, wanted: tuple[bool, ...], given: OutputCotangents
        ) -> InputCotangents:
            step = Step(core, carry_of(state, None), hyper, batch, 0, wanted, set(), None)
            return step_pullback.PRODUCTS[product](step, given, None)

        def pull_many(
            state: Any, hyper: Any, batch: object, wanted: tuple[bool, ...], rows: Cotangents
        ) -> InputCotangents:
            step = Step(core, carry_of(state, None), hyper, batch, 0, wanted, set(), None)
            return step_pullback.reverse_many(step, rows)

        def chosen(state: Any, hyper: Any, batch: object, wanted: Sequence[bool]) -> list[bool]:
            step = Step(core, carry_of(state, None), hyper, batch, 0, wanted, set(), None)
            return step_pullback.takes_part(step, (*state, hyper), 2)

        # Compiled code reads the copy of a module, in whose places eager code puts tensors.
        lock = threading.RLock() if core.view is None else core.view.lock
        users = [getattr(f, "function", None) for f in (core.loss, core.targets)]

        def checked(
            eager: Callable[..., Any], what: str, compiled: Compiled | None = None
        ) -> _Checked:
            if compiled is None:
                compiled = Compiled(eager, what, *compiling)
            return _Checked(eager, compiled, lock, users)

        compiling = (HIDDEN, unwatched, step_options)
        step = Compiled(advance, "the step", *compiling, keeps_graph=keeps_graph, pulled_back=True)
        what = "the pullback of a step"
        pullback = CompiledPullback(pull, step, chosen, what, *compiling) if keeps_graph else None
        self._advance = checked(advance, "the step", step)
        self._pull = checked(pull, what, pullback)
        self._pull_many = checked(pull_many, "the pullback of many cotangents")

    @property
    def compiled(self) -> tuple[Compiled, Compiled]:
        """Return the step and its pullback as PyTorch compiled them."""
        return self._advance.compiled, self._pull.compiled

    def advance(
        self, state: State, hyper: tuple[Any, Any], batch: object, again: Again | None = None
    ) -> StepResult:
        """Run the step on constants, and return ``(new_state, loss, aux)``."""
        arguments = (state, hyper, batch)

        def verify(found: StepResult, random_state: RandomState | None) -> None:
            with at_random_state(random_state):
                expected = self._advance.eager(*arguments)
            _check_step(found, expected, self._advance, arguments, random_state)
            # The graph of the loss is looked at where its gradient is taken, that of the update is
            # there only if something requires grad.
            learned = _requiring_grad(arguments)
            with torch.enable_grad(), at_random_state(random_state):
                refuse_own_functions(tree.tensors(self._advance.eager(*learned)))

        found: StepResult = self._advance(arguments, verify, again)
        return found

    def record(self, state: State, hyper: tuple[Any, Any], batch: object) -> StepResult:
        """Run the step such that autograd can differentiate what it returns."""
        arguments = (state, hyper, batch)

        def verify(found: StepResult, random_state: RandomState | None) -> None:
            # Compiled code gives tensors that the loss captures no gradient.
            constants = tree.map_tensors(Tensor.detach, arguments)
            with torch.enable_grad(), at_random_state(random_state):
                check_constants(0, self._advance.eager(*constants))
            weights = _Weights()
            with at_random_state(random_state):
                expected, pulled = _recorded(self._advance.eager, arguments, weights)
                refuse_own_functions(tree.tensors(expected))
            _check_step(found, expected, self._advance, arguments, random_state)
            try:
                with at_random_state(random_state):
                    _, ours = _recorded(self._advance.compiled, arguments, weights)
            except (InnerLoopError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise self._advance.compiled.refusal(error) from error

            def perturbed() -> Groups:
                with at_random_state(random_state):
                    moved = _moved(arguments, self._advance.precision)
                    return _recorded(self._advance.eager, moved, weights)[1]

            check_compiled(ours, pulled, "the pullback of a step", perturbed=perturbed)

        found: StepResult = self._advance(arguments, verify)
        return found

    def pull(
        self,
        state: State,
        hyper: tuple[Any, Any],
        batch: object,
        wanted: tuple[bool, ...],
        given: OutputCotangents,
        again: Again | None = None,
    ) -> InputCotangents:
        """Pull ``given`` back to the state and to hyper."""
        return self._pulled(self._pull, state, hyper, batch, wanted, given, again)

    def pull_many(
        self,
        state: State,
        hyper: tuple[Any, Any],
        batch: object,
        wanted: tuple[bool, ...],
        rows: Cotangents,
    ) -> InputCotangents:
        """Pull many cotangents of the new state back to the state and to hyper."""
        return self._pulled(self._pull_many, state, hyper, batch, wanted, rows)

    def _pulled(
        self,
        pull: _Checked,
        state: State,
        hyper: tuple[Any, Any],
        batch: object,
        wanted: tuple[bool, ...],
        given: OutputCotangents | Cotangents,
        again: Again | None = None,
    ) -> InputCotangents:
        arguments = (state, hyper, batch, wanted, given)

        def groups(found: InputCotangents) -> Groups:
            return {**_gradients(state, hyper, found.state, found.hyper), "loss": found.loss}

        def verify(found: InputCotangents, random_state: RandomState | None) -> None:
            def eager(*arguments: Any) -> Groups:
                with at_random_state(random_state):
                    return groups(pull.eager(*arguments))

            def perturbed() -> Groups:
                return eager(*_moved(arguments[:3], pull.precision), wanted, given)

            check_compiled(
                groups(found), eager(*arguments), "the pullback of a step", perturbed=perturbed
            )

        found: InputCotangents = pull(arguments, verify, again)
        return found


class _Checked:
    """A compiled function that is compared with its eager form.

    Args:
        eager: the function.
        compiled: the same, compiled.
        lock: what a thread holds while it calls the function.
        users: the user's functions in it.
    """

    def __init__(
        self,
        eager: Callable[..., Any],
        compiled: Compiled,
        lock: AbstractContextManager[Any],
        users: Sequence[object],
    ) -> None:
        self._eager, self._lock, self._users = eager, lock, users
        self._eager_seconds = 0.0
        self.compiled = compiled
        self._trust = Trust()
        self._later = LaterChecks()

    @property
    def precision(self) -> float:
        """Return the relative precision of the coarsest numbers in compiled code."""
        return self.compiled.precision

    def eager(self, *arguments: Any) -> Any:
        """Call the function itself."""
        begin = time.perf_counter()
        try:
            return self._eager(*arguments)
        finally:
            self._eager_seconds += time.perf_counter() - begin

    def __call__(
        self,
        arguments: tuple[Any, ...],
        verify: Callable[[Any, RandomState | None], None],
        again: Again | None = None,
    ) -> Any:
        """Call the compiled function; ``verify(found, random_state)`` compares what it found.

        A path of its code is new where PyTorch compiled it in this call: it compiles whenever
        anything changes that the code was specialised for.
        """
        # One thread at a time: what was compiled is counted, and compared with eager code.
        with self._lock:
            return self._call(arguments, verify, again)

    def _call(
        self,
        arguments: tuple[Any, ...],
        verify: Callable[[Any, RandomState | None], None],
        again: Again | None,
    ) -> Any:
        begin = time.perf_counter()
        with self._trust.at_stake(self.compiled):
            if again is None:
                found = self.compiled(*arguments, explain=partial(self._explain, arguments))
            else:
                found = self.compiled.again(again.path, arguments)
        random_state = self.compiled.random_state
        end = time.perf_counter()
        known = self._trust.covers(self.compiled.compilations)
        if known:
            self._later.called(end - begin)
            if not self._later.due():
                return found
        self._eager_seconds = 0.0
        around = nullcontext() if again is None else again.around()
        with around, self._trust.at_stake(), refusing_own_functions(), compiler_at_work():
            verify(found, random_state)
        self._trust.gained(self.compiled.compilations)
        seconds = time.perf_counter() - end
        if not known:
            # The pullback may have been compiled meanwhile, or waited for: that is not what a later
            # check takes.
            seconds = min(seconds, 4 * self._eager_seconds)
        self._later.checked(seconds)
        return found

    def _explain(self, arguments: tuple[Any, ...]) -> None:
        """Raise the true reason if eager code has an error of its own, which may be the user's."""
        with refusing_own_functions(), at_random_state(self.compiled.random_state):
            self.eager(*arguments)
        refuse_numpy("the loss", self._users)


def _recorded(
    function: Callable[..., Any], arguments: tuple[Any, ...], weights: _Weights
) -> tuple[StepResult, Groups]:
    """Run a step on copies of its arguments, and pull a random cotangent back to them."""
    state, hyper, batch = arguments
    leaves = tree.leaves((state, hyper))
    copies = [
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x
        for x in leaves
    ]
    state, hyper = tree.with_leaves((state, hyper), list(copies))
    with torch.enable_grad():
        found: StepResult = function(state, hyper, batch)
        places = [i for i, x in enumerate(copies) if isinstance(x, Tensor) and x.requires_grad]
        ends = [
            (x, weights.of(i, x))
            for i, x in enumerate(tree.leaves(found))
            if isinstance(x, Tensor) and x.requires_grad
        ]
        row: Cotangents = [None] * len(copies)
        if ends and places:
            inputs = [copies[i] for i in places]
            # Where a backward pass is compiled when it first runs, that decides for good whether it
            # may overwrite what the forward pass saved: it must not, so that users can keep the
            # graph.
            with torch_private.keeping_buffers():
                pulled = torch.autograd.grad(
                    [x for x, _ in ends],
                    inputs,
                    [w for _, w in ends],
                    retain_graph=True,
                    allow_unused=True,
                )
            row = tree.put(row, places, pulled)
    count = len(tree.leaves(state))
    return found, _gradients(state, hyper, row[:count], row[count:])


class _Weights:
    """Random cotangents, the same ones for compiled and for eager code."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(15)
        self._held: dict[int, Tensor] = {}

    def of(self, place: int, like: Tensor) -> Tensor:
        """Return the cotangent of the result in this place."""
        if place not in self._held:
            drawn = torch.randn(like.shape, generator=self._generator, dtype=torch.float64)
            self._held[place] = drawn.to(like)
        return self._held[place]


def _requiring_grad(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a step with copies of params, optimizer state and hyper to record."""
    (params, optimizer_state, buffers), hyper, batch = arguments
    learned = tree.map_tensors(
        lambda x: x.detach().requires_grad_() if tree.differentiable(x) else x,
        (params, optimizer_state, hyper),
    )
    return (*learned[:2], buffers), learned[2], batch


def _moved(arguments: tuple[Any, ...], precision: float) -> tuple[Any, ...]:
    """Return the arguments of a step, its params and hyper moved by about one unit of rounding."""
    (params, optimizer_state, buffers), hyper, batch = arguments
    params, hyper = moved_by_rounding((params, hyper), precision)
    return (params, optimizer_state, buffers), hyper, batch


def _check_step(
    found: StepResult,
    expected: StepResult,
    advance: _Checked,
    arguments: tuple[Any, ...],
    random_state: RandomState | None,
) -> None:
    """Raise unless the results of a compiled step are those of eager code."""
    (params, _, buffers), *_ = arguments
    finest = max((torch.finfo(p.dtype).eps for p in params.values()), default=0.0)
    groups = _groups(expected)
    before: Groups = {"params": params, "buffers": buffers}
    if finest <= torch.finfo(torch.float32).eps and not expected[1].count_nonzero():
        # Where the terms of a loss cancel exactly, in one order of evaluation, they may leave
        # rounding in another one, and so do those of its gradient. They come from the parameters.
        before |= {name: params for name in groups if _follows_from_loss(name)}

    def perturbed() -> Groups:
        with at_random_state(random_state):
            return _groups(advance.eager(*_moved(arguments, advance.precision)))

    # In the precision of the parameters a step is the same in any order of evaluation; in that of
    # autocast Adam moves a parameter of a tiny gradient by the learning rate, either way.
    check_compiled(
        _groups(found),
        groups,
        "the step",
        before,
        perturbed if advance.precision > finest else None,
    )


def _follows_from_loss(group: str) -> bool:
    return group == "loss" or group.startswith("optimizer_state")


def _gradients(
    state: State, hyper: tuple[Any, Any], of_state: Cotangents, of_hyper: Cotangents
) -> Groups:
    params, optimizer_state, buffers = tree.with_leaves(state, list(of_state))
    user, optimizer = tree.with_leaves(hyper, list(of_hyper))
    return {
        "gradient of params": params,
        **fields_of(optimizer_state, "gradient of optimizer_state"),
        "gradient of buffers": buffers,
        "gradient of hyper": {"hyper": user, "optimizer_hyper": optimizer},
    }


def _groups(found: tuple[State, Tensor, Any]) -> dict[str, object]:
    """Return what a step gives, by groups of one scale."""
    (params, optimizer_state, buffers), loss, aux = found
    return {
        "params": params,
        **fields_of(optimizer_state, "optimizer_state"),
        "buffers": buffers,
        "loss": loss,
        "aux": aux,
    }


def _core_of(problem: Problem) -> Problem:
    """Return a problem as `Core` takes it, whose steps are those of ``problem``."""
    targets = None if problem.targets is None else _OfUsersHyper(problem.targets)
    core = Problem(
        _OfUsersHyper(problem.loss), problem.optimizer, optimizer_hyper=_second, targets=targets
    )
    core.view = problem.view
    if core.view is not None:
        core.computed_buffers = set(core.view.no_statistics)
    return core


class _OfUsersHyper:
    """The user's loss, or targets, as a function of the first part of hyper."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(
        self, params: Params, hyper: tuple[Any, Any], batch: object, *targets: object
    ) -> Any:
        return self.function(params, hyper[0], batch, *targets)


def _second(hyper: tuple[Any, Any], t: int) -> Any:
    """Return the hyper-parameters of the optimizer, the second part of hyper."""
    return hyper[1]


_cores: MutableMapping[Problem, dict[str, Core]] = cache("compiled steps", weak=True)


class CompiledProblem:
    """A problem whose steps run through its compiled core, with counts as tensors.

    Args:
        problem: the problem.
        product: as in `Checkpointed`; ``"auto"`` is reverse over reverse.
    """

    def __init__(self, problem: Problem, product: str) -> None:
        problem.check_compiles()
        self.problem = problem
        cores = _cores.setdefault(problem.original or problem, {})
        product = "reverse" if product == "auto" else product
        if product not in cores:
            cores[product] = Core(_core_of(problem), product, keeps_graph=product == "reverse")
        self.core = cores[product]

    def step(
        self, carry: Carry, hyper: HyperTree, batch: object, t: int
    ) -> tuple[Carry, Tensor, Any]:
        """Run a step on constants, as `Problem.step` does."""
        # The grad mode is compiled in, so it is always the same one. It is on, so that a captured
        # tensor that requires grad shows in the results.
        both = (hyper, self.problem.overrides(hyper, t))
        with torch.enable_grad():
            state, loss, aux = self.core.advance(counted(state_of(carry)), both, batch)
        return _after(carry, state), loss, aux

    def record(
        self, carry: Carry, hyper: HyperTree, batch: object, t: int
    ) -> tuple[Carry, Tensor, Any]:
        """Run a step as `Problem.step` does, so that its results can be differentiated."""
        both = (hyper, self.problem.overrides(hyper, t))
        recording = torch.is_grad_enabled() and (
            any(p.requires_grad for p in carry.params.values())
            or any(x.requires_grad for x in tree.tensors((both, carry.optimizer_state)))
        )
        if not recording:
            carry, both = (
                carry.detach()._replace(time=carry.time),
                tree.map_tensors(Tensor.detach, both),
            )
            with torch.enable_grad():
                state, loss, aux = self.core.advance(counted(state_of(carry)), both, batch)
            if torch.is_grad_enabled():
                check_constants(t, state, loss, aux)
            state = tree.map_tensors(Tensor.detach, state)
            return _after(carry, state), *tree.map_tensors(Tensor.detach, (loss, aux))
        # Everything requires grad, so that one compilation serves the first step, whose optimizer
        # state is constant, and the later ones.
        params = carry.params
        if not all(p.requires_grad for p in params.values()):
            params = tree.map_tensors(_requires_grad, params)
        device = next(iter(params.values())).device
        optimizer_state = _recordable(carry.optimizer_state, device)
        state, loss, aux = self.core.record((params, optimizer_state, carry.buffers), both, batch)
        return _after(carry, state), loss, aux

    def pull(self, step: Step, given: OutputCotangents) -> InputCotangents:
        """Pull a step back, as `step_pullback.pull` does."""
        full = _without_gaps(step, given.state)
        return self._pulled(self.core.pull, step, given._replace(state=full), batched=False)

    def pull_many(self, step: Step, rows: Cotangents) -> InputCotangents:
        """Pull many cotangents of the new state back, as `step_pullback.reverse_many` does."""
        count = next(len(c) for c in rows if c is not None)
        full = _without_gaps(step, rows, count)
        return self._pulled(self.core.pull_many, step, full, batched=True)

    def _pulled(
        self,
        pull: Callable[..., InputCotangents],
        step: Step,
        given: OutputCotangents | Cotangents,
        *,
        batched: bool,
    ) -> InputCotangents:
        leaves = tree.leaves(step.hyper)
        with torch.enable_grad():
            inputs = [
                x.detach().requires_grad_() if w else x
                for x, w in zip(leaves, step.wanted, strict=True)
            ]
            overrides = self.problem.overrides(tree.with_leaves(step.hyper, inputs), step.t)
        ends = tree.leaves(overrides)
        wanted = (*step.wanted, *[isinstance(x, Tensor) and x.requires_grad for x in ends])
        constants = tree.map_tensors(Tensor.detach, overrides)
        step.rewind()
        with torch.no_grad():
            found = pull(
                counted(state_of(step.carry)), (step.hyper, constants), step.batch, wanted, given
            )
        direct, through = found.hyper[: len(leaves)], found.hyper[len(leaves) :]
        reached = [
            (y, c)
            for y, c in zip(ends, through, strict=True)
            if c is not None and isinstance(y, Tensor) and y.requires_grad
        ]
        rest: Cotangents = [None] * len(leaves)
        if reached:
            chosen = [i for i, w in enumerate(step.wanted) if w]
            more = torch.autograd.grad(
                [y for y, _ in reached],
                [inputs[i] for i in chosen],
                [c for _, c in reached],
                allow_unused=True,
                is_grads_batched=batched,
            )
            for i, value in zip(chosen, more, strict=True):
                rest[i] = value
        step.reached.update(range(len(leaves)))
        hyper = [step_pullback.add(a, b) for a, b in zip(direct, rest, strict=True)]
        return InputCotangents(found.state, hyper, found.loss)


def _without_gaps(step: Step, given: Cotangents, *rows: int) -> Cotangents:
    """Return cotangents with zeros where there are none.

    One compiled pullback then serves all steps.

    Args:
        step: the step.
        given: for the leaves of its new state.
        rows: the sizes of their leading dimensions.
    """
    old = tree.leaves(state_of(step.carry))
    if len(old) != len(given):
        return given
    return [
        x.new_zeros((*rows, *x.shape)) if c is None and tree.differentiable(x) else c
        for c, x in zip(given, old, strict=True)
    ]


def _after(carry: Carry, state: State) -> Carry:
    return carry_of(state, RandomState.now())._replace(time=carry.time + 1)


def counted(state: State) -> State:
    """Return the state with step counts as tensors: a number would be compiled in."""
    params, optimizer_state, buffers = state
    like = next(iter(params.values()))
    count = lambda leaf: torch.tensor(leaf, device=like.device) if type(leaf) is int else leaf  # noqa: E731
    return params, tree.map_leaves(count, optimizer_state), buffers


def uncounted(state: State, like: State) -> State:
    """Return the state with step counts as numbers again, where ``like`` has numbers."""
    params, optimizer_state, buffers = state
    return params, _as_numbers(optimizer_state, like[1]), buffers


def _requires_grad(x: Tensor) -> Tensor:
    if x.requires_grad or not tree.differentiable(x):
        return x
    return x.detach().requires_grad_()


def _recordable(value: Any, device: torch.device) -> Any:
    """Return an optimizer state whose tensors require grad, with step counts as tensors.

    What is so already stays as it is: this runs at every step.
    """
    kind = type(value)
    if kind is int:
        return torch.tensor(value, device=device)
    if kind is Packed and all(isinstance(x, Tensor) and x.requires_grad for x in value.flats):
        return value
    if isinstance(value, tuple):
        parts = [_recordable(x, device) for x in value]
        return kind(*parts) if hasattr(value, "_fields") else kind(parts)

    def prepare(x: Any) -> Any:
        if type(x) is int:
            return torch.tensor(x, device=device)
        return _requires_grad(x) if isinstance(x, Tensor) else x

    return value if value is None else tree.map_leaves(prepare, value)


def _as_numbers(value: Any, like: Any) -> Any:
    """Return ``value`` with numbers where ``like`` has them; what holds none stays as it is.

    This runs at every step, and most of a state holds none.
    """
    kind = type(like)
    if kind is int:
        # One that is counted for each parameter from now on stays as it is.
        return int(value) if isinstance(value, (Tensor, int)) else value
    if isinstance(like, (Tensor, Packed)) or like is None:
        return value
    if isinstance(like, tuple) and type(value) is kind and len(value) == len(like):
        parts = [_as_numbers(x, y) for x, y in zip(value, like, strict=True)]
        return kind(*parts) if hasattr(like, "_fields") else kind(parts)
    leaves, before = tree.leaves(value), tree.leaves(like)
    if len(leaves) != len(before) or not any(type(y) is int for y in before):
        return value
    numbers = [int(x) if type(y) is int else x for x, y in zip(leaves, before, strict=True)]
    return tree.with_leaves(value, numbers)


def with_counts(carry: Carry, like: Carry) -> Carry:
    """Return the carry with step counts as numbers again, where ``like`` has numbers."""
    state = uncounted(state_of(carry), state_of(like))
    return carry_of(state, carry.random_state)._replace(time=carry.time)
