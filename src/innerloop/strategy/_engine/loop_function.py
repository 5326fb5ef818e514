"""A whole loop as one node of the autograd graph, with a backward pass of its own.

The node's inputs are the tensors of the start, of the hyper-parameters and of the data (constants
too: ``vmap`` must see them); its outputs are the states asked for, the losses and aux. Its backward
is a second node, whose forward is the lean pullback of a `LoopFunction`. The backward of that one,
for second derivatives, differentiates a plain run of the loop that keeps everything.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._batches import check_constant
from innerloop._carry import Carry
from innerloop._problem import Problem
from innerloop._trajectory import Trajectory
from innerloop._types import Params
from innerloop._utils import torch_private, tree
from innerloop._utils.execution import Mode, mode
from innerloop._utils.fingerprint import Fingerprint, agree
from innerloop._utils.progress import closing, silent
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.strategy._base import Loop
from innerloop.strategy._engine.plain_run import plain_run
from innerloop.strategy._engine.replay_context import Repeatable, ReplayContext
from innerloop.strategy._engine.step_pullback import Cotangents, Step, carry_of, state_of

_vjp: Any = torch.func.vjp
_jvp: Any = torch.func.jvp
EVERY = slice(None)


class LoopOutputs(NamedTuple):
    """The results of a loop.

    Attributes:
        states: time -> (params, optimizer_state, buffers), for T and the times of ``save_at``, 0
            excepted.
        losses: tensor ``[T]``.
        aux: stacked over steps.
        steps: T.
        random_states: the random state of each time in ``states``.
    """

    states: dict[int, Any]
    losses: Tensor
    aux: Any
    steps: int
    random_states: dict[int, RandomState | None]


class Watcher:
    """Looks on while a loop is pulled back step by step, from the last to the first.

    Attributes:
        many: cotangents of the last state that are pulled back in the same replay, each
            ``[Q, *shape]`` and aligned with the leaves of a state; None: none.
    """

    many: Cotangents | None = None

    def prepare(self, t: int, step: Step) -> Step:
        """Return step t as it is to be pulled back."""
        return step

    def on_step(
        self, t: int, adjoint: Cotangents, of_hyper: Cotangents, many: PulledMany | None
    ) -> None:
        """Be told that step t has been pulled back.

        Args:
            t: the step, counted from the start of the loop.
            adjoint: the cotangents of the state before the step.
            of_hyper: what this step alone adds to the cotangents of hyper.
            many: the same two for the cotangents ``many``.
        """


class PulledMany(NamedTuple):
    """Many cotangents behind one step: of the state before it, and of hyper by this step alone."""

    state: Cotangents
    hyper: Cotangents


class LoopFunction(abc.ABC):
    """The forward run and the pullback of one loop.

    There is one object per loop, which may keep what the pullback needs.

    Args:
        loop: the loop as the user gave it.

    Attributes:
        kept: a pytree of tensors for the pullback, besides the inputs.
        watcher: looks on at the next pullbacks; None: nobody.
        watched: True if `pull` tells the watcher about each step.
    """

    watcher: Watcher | None = None
    watched: ClassVar[bool] = False

    def __init__(self, loop: Loop) -> None:
        if torch.is_grad_enabled() or mode() is Mode.TRANSFORMED:
            # Inside vmap a tensor does not show that it requires grad outside.
            check_constant(loop.batches.data, outside=True)
        self.tensors, self.inputs = tree.split(
            (state_of(loop.start), loop.hyper, loop.batches.data)
        )
        self.count = sum(1 for _ in tree.tensors(state_of(loop.start)))
        random_state = loop.start.random_state or RandomState.now()
        empty = Carry({}, None, {}, random_state, loop.start.time)
        self.transformed = mode() is Mode.TRANSFORMED
        self.recorded = self.transformed or (
            torch.is_grad_enabled() and any(x.requires_grad for x in self.tensors)
        )
        problem = copy.copy(loop.problem)
        if self.recorded and problem.optimizer_hyper is not None:
            problem.optimizer_hyper = Repeatable(problem.optimizer_hyper)
        self.loop = loop._replace(
            problem=problem, start=empty, hyper=None, batches=loop.batches.holding(None)
        )
        self.loop.batches.keeping = self.recorded
        self.context = ReplayContext(loop)
        self.losses: Tensor | None = None
        self.besides: Fingerprint | None = None
        self.steps = 0
        self.outputs: Any = None
        self.constants: set[int] = set()
        self.random_states: dict[int, RandomState | None] = {}
        self.kept: Any = None

    @abc.abstractmethod
    def forward(self, loop: Loop) -> LoopOutputs:
        """Run the loop on constants."""

    @abc.abstractmethod
    def pull(
        self, loop: Loop, kept: Any, cotangents: LoopOutputs, wanted: list[bool]
    ) -> tuple[Cotangents, Cotangents]:
        """Pull ``cotangents`` back to the leaves of the start's state, and to those of hyper.

        Args:
            loop: the loop, on constants.
            kept: what `forward` left in ``self.kept``, or None: it has been used up by an earlier
                pullback.
            cotangents: of what `forward` returned; None for each that is zero, and for everything
                that is not a tensor.
            wanted: for each leaf of hyper, True if its cotangent is wanted.
        """

    def filled(self, tensors: Sequence[Tensor]) -> Loop:
        """Return the loop with these tensors in it."""
        state, hyper, data = tree.join(self.inputs, tensors)
        begin = self.loop.start
        start = carry_of(state, begin.random_state)._replace(time=begin.time)
        return self.loop._replace(start=start, hyper=hyper, batches=self.loop.batches.holding(data))

    def plain(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs of a run that keeps everything."""
        loop = self.filled(tensors)
        loop = loop._replace(batches=loop.batches.ending(self.steps), report=silent)
        with at_random_state(loop.start.random_state), self.context.restored(loop.problem):
            traj = plain_run(loop)
        self.compare(traj.losses)
        end = traj.at(-1)
        if self.besides is not None and not _besides(end.buffers, traj.aux).agrees(self.besides):
            raise differs("aux (or a buffer), when the loop was run again, is")
        found = ({t: state_of(traj.at(t)) for t in self.random_states}, traj.losses, traj.aux)
        return list(tree.tensors(found))

    def compare(self, losses: Tensor, steps: slice = EVERY) -> None:
        """Raise unless the losses of a replay (of some steps) are those of the forward pass."""
        if self.losses is None:
            return
        before = self.losses if steps == EVERY else self.losses[steps]
        if not agree(losses, before):
            raise differs("the loss of a replayed step is")


def _besides(buffers: Params, aux: object) -> Fingerprint:
    """Compute the fingerprint of what a loop gives besides parameters and losses."""
    return Fingerprint.of(tree.map_tensors(torch_private.plain_form, (buffers, aux)))


def differs(what: str) -> InvalidInputError:
    """Return the error for a replayed step with other results than in the forward pass."""
    return InvalidInputError(
        f"{what} not what it was in the forward pass, so the "
        "gradient would be wrong: the loss must be a "
        "function of its arguments. Random numbers must be torch's own (which are "
        "rewound), not NumPy's or a generator's; data "
        "must not be written in place between the forward and the backward pass; state of "
        "a module must be in its buffers"
    )


def run(function: LoopFunction) -> Trajectory:
    """Run the loop of ``function`` as one node."""
    if torch_private.inside_dual_level():
        raise NotDifferentiableError(
            "dual numbers of torch.autograd.forward_ad do not reach through this strategy: write "
            "torch.func.jvp, or use "
            "innerloop.StoreAll()"
        )
    if torch_private.jvp_levels() > 1:
        # torch calls the jvp of an autograd.Function with forward derivatives switched off: the
        # outer level would be lost (up to 2.13).
        raise NotDifferentiableError(
            "torch.func.jvp of torch.func.jvp does not reach through this strategy (PyTorch drops "
            "the outer derivative): write "
            "torch.func.hessian, or jacrev of jacrev, or use innerloop.StoreAll()"
        )
    tensors, function.tensors = function.tensors, []
    given, problem = function.filled(tensors), function.loop.problem
    start = given.start
    problem.outside = given.outside() if function.recorded else None
    try:
        with function.context.restored(problem):
            ran = function.forward(function.filled([x.detach() for x in tensors]))
    finally:
        problem.outside = None
    function.losses = ran.losses.detach().clone()
    if function.transformed:
        function.besides = _besides(ran.states[ran.steps][2], ran.aux)
    function.steps, function.random_states = ran.steps, ran.random_states
    outputs, function.outputs = tree.split((ran.states, ran.losses, ran.aux))
    function.constants = _statistics(function.loop.problem, ran.states, outputs)
    if function.recorded:
        outputs = _distinct(outputs, function.transformed)
        outputs = list(_LoopNode.apply(function, len(outputs), *outputs, *tensors))
    states, losses, aux = tree.join(function.outputs, outputs)
    carries = {t: carry_of(state, ran.random_states[t]) for t, state in states.items()}
    traj = Trajectory({**carries, 0: start}, losses, aux, function.steps)
    traj.function = function
    return traj


def _statistics(problem: Problem, states: dict[int, Any], outputs: list[Tensor]) -> set[int]:
    """Return the places, among ``outputs``, of running statistics: they have no derivative."""
    if problem.view is None:
        return set()
    names = problem.view.statistics - problem.computed_buffers
    found = {id(b) for *_, buffers in states.values() for n, b in buffers.items() if n in names}
    return {i for i, x in enumerate(outputs) if id(x) in found}


def _distinct(outputs: list[Tensor], transformed: bool) -> list[Tensor]:
    """Return an alias for each tensor: one may stand among the inputs, or at several times."""
    # Not a view where possible: the node hands its inputs on as they are, which torch allows for
    # views one at a time only.
    return [x.view_as(x) if transformed else x.data for x in outputs]


class _LoopNode(torch.autograd.Function):
    """The loop as a node.

    It hands on outputs that have been computed from constants, and remembers how they depend on the
    inputs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(function: LoopFunction, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:count]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors[ctx.count :])
        ctx.save_for_forward(*tensors[ctx.count :])
        if not ctx.function.transformed:
            # The output is the input itself, not a view: it may be edited in place.
            ctx.mark_dirty(*tensors[: ctx.count])
        constants = ctx.function.constants
        ctx.mark_non_differentiable(
            *[x for i, x in enumerate(output) if i in constants or not tree.differentiable(x)]
        )
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        function, tensors = ctx.function, ctx.saved_tensors
        wanted = [
            n and tree.differentiable(x)
            for n, x in zip(ctx.needs_input_grad[2 + ctx.count :], tensors, strict=True)
        ]
        # An outer loss sends a sparse one through nn.Embedding(sparse=True), and few operations of
        # an update rule have a derivative for that.
        dense = [c if c is None or c.layout == torch.strided else c.to_dense() for c in cotangents]
        given = [c is not None for c in dense]
        row: list[Tensor | None] = [None] * (2 + ctx.count + len(tensors))
        if any(given):
            # Where transforms run, all that the pullback uses has to pass through its node.
            kept, template = (
                tree.split((function.kept, function.loop.batches.kept))
                if function.transformed
                else ([], None)
            )
            request = _BackwardRequest(function, wanted, given, template)
            pulled = _LoopBackward.apply(
                request, *tensors, *[c for c in dense if c is not None], *kept
            )
            for i, value in zip(request.reached, pulled, strict=True):
                row[2 + ctx.count + i] = value
        return tuple(row)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        tensors, tangents = ctx.saved_tensors, tangents[2 + ctx.count :]
        chosen = [
            i for i, v in enumerate(tangents) if v is not None and tree.differentiable(tensors[i])
        ]

        def outputs(values: list[Tensor]) -> list[Tensor]:
            return ctx.function.plain(tree.put(tensors, chosen, values))

        found = _pushed(outputs, tensors, tangents, chosen)
        constants = ctx.function.constants
        return tuple(
            v if tree.differentiable(v) and i not in constants else None
            for i, v in enumerate(found)
        )


class _BackwardRequest:
    """One pullback of a node.

    Attributes:
        function: the function of the node.
        wanted: for each input, True if its cotangent is wanted.
        given: for each output, True if its cotangent is not zero.
        kept: what the function kept, without its tensors; None: the function holds it itself.
        reached: the inputs whose cotangent is not zero; filled in by the pullback.
    """

    def __init__(
        self, function: LoopFunction, wanted: list[bool], given: list[bool], kept: Any
    ) -> None:
        self.function = function
        self.wanted = wanted
        self.given = given
        self.kept = kept
        self.reached: list[int] = []

    def gradient(
        self, tensors: Sequence[Tensor], chosen: list[int]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Return the pullback as a function of some of its tensors, by a run that keeps everything.

        Args:
            tensors: the inputs of the node, then the cotangents.
            chosen: the places of those that it is a function of.
        """

        def gradient(values: list[Tensor]) -> list[Tensor]:
            filled = tree.put(tensors, chosen, values)
            inputs, cotangents = filled[: len(self.wanted)], filled[len(self.wanted) :]

            def outputs(values: list[Tensor]) -> list[Tensor]:
                ends = self.function.plain(tree.put(inputs, self.reached, values))
                return [y for y, given in zip(ends, self.given, strict=True) if given]

            _, pull = _vjp(outputs, [inputs[i] for i in self.reached])
            return list(pull(cotangents)[0])

        return gradient


def _pushed(
    fn: Callable[[list[Tensor]], list[Tensor]],
    tensors: Sequence[Tensor],
    tangents: Sequence[Any],
    chosen: list[int],
) -> list[Any]:
    """Push the tangents of the ``chosen`` tensors through ``fn``."""
    # Both are copied: vmap hands in expanded tensors, of which no dual numbers can be made.
    given: list[Sequence[Any]] = [tensors, tangents]
    values, along = (
        [x[i].clone(memory_format=torch.contiguous_format) for i in chosen] for x in given
    )
    with torch_private.only_forward_mode():
        found: list[Any] = _jvp(fn, (values,), (along,))[1]
    return found


class _LoopBackward(torch.autograd.Function):
    """The pullback of `_LoopNode`: a function of its inputs and the cotangents of its outputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(request: _BackwardRequest, *tensors: Tensor) -> tuple[Tensor, ...]:
        function, count = request.function, len(request.wanted)
        inputs, cotangents, kept = (
            tensors[:count],
            iter(tensors[count:]),
            tensors[count + sum(request.given) :],
        )
        row = [next(cotangents) if given else None for given in request.given]
        states, losses, aux = tree.join(function.outputs, row, rest_too=False)
        ran = LoopOutputs(states, losses, aux, function.steps, function.random_states)
        if request.kept is None:
            held, function.kept = function.kept, None
        loop = function.filled([x.detach() for x in inputs])
        if request.kept is not None:
            held, loop.batches.kept = tree.join(request.kept, kept)
        places = iter(request.wanted[function.count :])
        wanted = [
            next(places) if isinstance(leaf, Tensor) else False for leaf in tree.leaves(loop.hyper)
        ]
        with (
            at_random_state(RandomState.now()),
            function.context.restored(loop.problem),
            closing(loop.report),
        ):
            of_start, of_hyper = function.pull(loop, held, ran, wanted)
        leaves = [*tree.leaves(state_of(loop.start)), *tree.leaves(loop.hyper)]
        found = [
            c
            for c, leaf in zip([*of_start, *of_hyper], leaves, strict=True)
            if isinstance(leaf, Tensor)
        ]
        request.reached = [i for i, c in enumerate(found) if c is not None and request.wanted[i]]
        seen = {id(x) for x in tensors}
        distinct: list[Tensor] = []
        for i in request.reached:
            c = found[i]
            assert c is not None
            distinct.append(c.clone() if id(c) in seen else c)
            seen.add(id(c))
        return tuple(distinct)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.request, *tensors = inputs
        request = ctx.request
        used = tensors[: len(request.wanted) + sum(request.given)]
        ctx.save_for_backward(*used)
        ctx.save_for_forward(*used)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        request, tensors = ctx.request, ctx.saved_tensors
        chosen = [
            i
            for i, x in enumerate(tensors)
            if tree.differentiable(x) and ctx.needs_input_grad[i + 1]
        ]
        _, pull = _vjp(request.gradient(tensors, chosen), [tensors[i] for i in chosen])
        (found,) = pull(list(cotangents))
        row: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, value in zip(chosen, found, strict=True):
            row[i + 1] = value
        return tuple(row)

    @staticmethod
    def jvp(ctx: Any, _: object, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        request, tensors = ctx.request, ctx.saved_tensors
        chosen = [
            i for i, x in enumerate(tensors) if tangents[i] is not None and tree.differentiable(x)
        ]
        return tuple(_pushed(request.gradient(tensors, chosen), tensors, tangents, chosen))


COMPILING = (
    "{0} cannot stand inside of compiled code: leave metagradient(compile=True) or torch.compile "
    "away. Checkpointed(compile=True) compiles its steps"
)
