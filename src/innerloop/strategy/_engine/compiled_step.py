"""One step and its pullback, compiled.

The core of a step is compiled: the loss, its gradient and the update. The user's functions make
the data and the optimizer's hyper-parameters before it, so that the number of the step is not part
of the compiled code, and one compilation serves all steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._inner_gradient.graph import refuse_own_functions, refusing_own_functions
from innerloop._problem import Problem
from innerloop._types import HyperTree, Params
from innerloop._utils import tree
from innerloop._utils.caches import cache
from innerloop._utils.compiled_check import check_compiled, fields_of
from innerloop.errors import InnerLoopError, NotDifferentiableError
from innerloop.strategy._engine import step_pullback
from innerloop.strategy._engine.step_pullback import (
    Cotangents,
    InputCotangents,
    OutputCotangents,
    State,
    Step,
    carry_of,
    state_of,
)

_numbers = itertools.count()


class Core:
    """The compiled step of a problem.

    Args:
        problem: the problem.
        product: how the pullback is taken.
    """

    def __init__(self, problem: Problem, product: str) -> None:
        # hyper is (the user's, the optimizer's): both are inputs, whatever the step.
        targets = None if problem.targets is None else _OfUsersHyper(problem.targets)
        core = Problem(
            _OfUsersHyper(problem.loss),
            problem.optimizer,
            optimizer_hyper=_second,
            targets=targets,
        )
        core.view = problem.view
        if core.view is not None:
            core.computed_buffers = set(core.view.no_statistics)

        def advance(state: Any, hyper: Any, batch: object) -> Any:
            new, loss, aux = core.step(carry_of(state, None), hyper, batch, 0)
            return state_of(new), loss, aux

        def pull(
            state: Any, hyper: Any, batch: object, wanted: tuple[bool, ...], given: OutputCotangents
        ) -> InputCotangents:
            step = Step(core, carry_of(state, None), hyper, batch, 0, wanted, set(), None)
            return step_pullback.PRODUCTS[product](step, given, None)

        self._advance, self._pull = advance, pull
        for function in (advance, pull):
            # torch.compile counts recompilations per code object, and refuses a ninth: each problem
            # gets code of its own.
            function.__code__ = function.__code__.replace(
                co_name=f"{function.__name__}_{next(_numbers)}"
            )
        self._compiled = torch.compile(advance, fullgraph=True), torch.compile(pull, fullgraph=True)
        self._verified: set[object] = set()

    def advance(
        self, state: State, hyper: tuple[Any, Any], batch: object
    ) -> tuple[State, Tensor, Any]:
        """Run the step, and return ``(new_state, loss, aux)``."""
        found: tuple[State, Tensor, Any] = self._call(
            0, self._advance, (state, hyper, batch), "the step", _groups
        )
        return found

    def pull(
        self,
        state: State,
        hyper: tuple[Any, Any],
        batch: object,
        wanted: tuple[bool, ...],
        given: OutputCotangents,
    ) -> InputCotangents:
        """Pull ``given`` back to the state and to hyper."""

        def groups(found: InputCotangents) -> dict[str, object]:
            params, optimizer_state, buffers = tree.with_leaves(state, found.state)
            user, optimizer = tree.with_leaves(hyper, found.hyper)
            return {
                "gradient of params": params,
                **fields_of(optimizer_state, "gradient of optimizer_state"),
                "gradient of buffers": buffers,
                "gradient of hyper": {"hyper": user, "optimizer_hyper": optimizer},
                "loss": found.loss,
            }

        found: InputCotangents = self._call(
            1, self._pull, (state, hyper, batch, wanted, given), "the pullback of a step", groups
        )
        return found

    def _call(
        self,
        which: int,
        eager: Callable[..., Any],
        arguments: tuple[Any, ...],
        what: str,
        groups: Callable[[Any], dict[str, object]],
    ) -> Any:
        try:
            found = self._compiled[which](*arguments)
        except InnerLoopError:
            raise
        except Exception as error:
            raise NotDifferentiableError(
                f"{what} cannot be compiled: write compile=False. PyTorch says: {error}"
            ) from error
        shapes = which, _variant(arguments)
        if shapes not in self._verified:
            with refusing_own_functions():
                params, _, buffers = arguments[0]
                before = {"params": params, "buffers": buffers}
                check_compiled(groups(found), groups(eager(*arguments)), what, before)
                if which == 0:
                    self._refuse_own_functions(*arguments)
            self._verified.add(shapes)
        return found

    def _refuse_own_functions(self, state: State, hyper: tuple[Any, Any], batch: object) -> None:
        """Raise if the update has a backward rule that compiled code would drop.

        The graph of the loss is looked at where its gradient is taken.
        """
        params, optimizer_state, buffers = state
        learned = tree.map_tensors(
            lambda x: x.detach().requires_grad_() if tree.differentiable(x) else x,
            (params, optimizer_state, hyper),
        )
        with torch.enable_grad():
            found = self._advance((*learned[:2], buffers), learned[2], batch)
        refuse_own_functions(tree.tensors(found))


def _variant(arguments: tuple[Any, ...]) -> object:
    """Return what the compiler specialises its code for, as far as it is in the arguments."""
    found: list[object] = []
    for x in tree.leaves(arguments):
        if isinstance(x, Tensor):
            found.append((x.shape, x.dtype, x.device))
        else:
            # A branch may depend on a name or a flag; numbers vary from step to step.
            found.append(x if isinstance(x, (bool, str)) else type(x))
    return tuple(found)


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
            cores[product] = Core(problem, product)
        self.core = cores[product]

    def step(
        self, carry: Carry, hyper: HyperTree, batch: object, t: int
    ) -> tuple[Carry, Tensor, Any]:
        """Run a step on constants, as `Problem.step` does."""
        # The grad mode is compiled in, so it is always the same one. It is on, so that a captured
        # tensor that requires grad shows in the results.
        both = (hyper, self.problem.overrides(hyper, t))
        with torch.enable_grad():
            state, loss, aux = self.core.advance(_counted(state_of(carry)), both, batch)
        return carry_of(state, carry.random_state), loss, aux

    def pull(self, step: Step, given: OutputCotangents) -> InputCotangents:
        """Pull a step back, as `step_pullback.pull` does."""
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
        # Zeros stand in the places without a cotangent, so that one compiled pullback serves all
        # steps.
        full = given.state
        old = tree.leaves(state_of(step.carry))
        if len(old) == len(full):
            pairs = zip(full, old, strict=True)
            full = [
                torch.zeros_like(x) if c is None and tree.differentiable(x) else c for c, x in pairs
            ]
        with torch.no_grad():
            found = self.core.pull(
                _counted(state_of(step.carry)),
                (step.hyper, constants),
                step.batch,
                wanted,
                given._replace(state=full),
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
            )
            for i, value in zip(chosen, more, strict=True):
                rest[i] = value
        step.reached.update(range(len(leaves)))
        hyper = [step_pullback.add(a, b) for a, b in zip(direct, rest, strict=True)]
        return InputCotangents(found.state, hyper, found.loss)


def _counted(state: State) -> State:
    """Return the state with step counts as tensors: a number would be compiled in."""
    params, optimizer_state, buffers = state
    like = next(iter(params.values()))
    count = lambda leaf: torch.tensor(leaf, device=like.device) if type(leaf) is int else leaf  # noqa: E731
    return params, tree.map_leaves(count, optimizer_state), buffers


def uncounted(state: State, like: State) -> State:
    """Return the state with step counts as numbers again, where ``like`` has numbers."""
    pairs = zip(tree.leaves(state), tree.leaves(like), strict=False)
    if len(tree.leaves(state)) != len(tree.leaves(like)):
        return state
    return tree.with_leaves(state, [int(x) if type(y) is int else x for x, y in pairs])
