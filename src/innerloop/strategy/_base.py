"""How a loop is differentiated."""

from __future__ import annotations

import abc
import copy
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._batches import Batches
from innerloop._carry import Carry
from innerloop._inner_gradient.stored import Outside
from innerloop._problem import Problem
from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree, Params, Result
from innerloop._utils import tree
from innerloop._utils.arguments import check_fields
from innerloop._utils.execution import Mode, mode
from innerloop._utils.progress import Report, silent
from innerloop.errors import InvalidInputError
from innerloop.strategy._engine.kept_states import KeptStates
from innerloop.strategy._forecast import Cost, Forecast
from innerloop.strategy._outer_gradient import Inputs, Objective, outer_gradient

BOTH = frozenset({"params", "hyper"})
"""Everything that a loop can be differentiated with respect to."""


class Loop(NamedTuple):
    """A loop as a strategy is handed it: the factors of the problem, where to start, and the data.

    Attributes:
        problem: gives ``step``, ``gradient`` (the residual) and the optimizer.
        start: the carry before the first step.
        hyper: what the loss and the optimizer are also differentiated with respect to.
        batches: the data of each step, constant for the derivative; knows the number of steps,
            unless it is an iterator.
        save_at: the times whose states are wanted besides 0 and T.
        report: told after each step, for a progress bar.
    """

    problem: Problem
    start: Carry
    hyper: HyperTree
    batches: Batches
    save_at: tuple[int, ...] = ()
    report: Report = silent

    def time(self, t: int) -> int:
        """Return the number of all steps before step t, those of earlier loops among them."""
        return self.start.time + t

    def batch(self, carry: Carry, t: int) -> object:
        """Return the data of step t."""
        outside = self.problem.outside
        if outside is None or not self.batches.calls_back:
            return self.batches.at(carry.params, self.hyper, t, self.time(t))
        return outside.call(
            lambda params, hyper: self.batches.at(params, hyper, t, self.time(t)), carry.params
        )

    def as_constants(self) -> Loop:
        """Return the loop on constants; what its functions store elsewhere knows what it was."""
        problem = self.problem
        if (outside := self.outside()) is not None:
            problem = copy.copy(problem)
            problem.outside = outside
        hyper = tree.map_tensors(Tensor.detach, self.hyper)
        return self._replace(problem=problem, hyper=hyper, start=self.start.detach())

    def outside(self) -> Outside | None:
        """Return what is outside of a loop that runs on constants; None: nobody asks for it."""
        start = self.start
        inputs = (start.params, start.optimizer_state, start.buffers, self.hyper)
        wanted = [x for x in tree.tensors(inputs) if x.requires_grad]
        if not wanted or not torch.is_grad_enabled() or mode() is not Mode.EAGER:
            return None
        return Outside(wanted, self.hyper)

    def step(self, carry: Carry, batch: object, t: int) -> tuple[Carry, Tensor, Any]:
        """Run step t and return ``(new_carry, loss, aux)``."""
        return self.problem.step(carry, self.hyper, batch, self.time(t))


class StepOutputs:
    """What the steps give one by one: the losses and aux.

    Args:
        params: tells the dtype and the device of no losses at all.
    """

    def __init__(self, params: Params) -> None:
        self._like = next(iter(params.values()))
        self._losses: list[Tensor] = []
        self._aux: list[object] = []

    def add(self, loss: Tensor, aux: object) -> None:
        """Append the loss and aux of one step."""
        self._losses.append(loss)
        self._aux.append(aux)

    def __len__(self) -> int:
        return len(self._losses)

    def stacked(self) -> tuple[Tensor, Any]:
        """Return ``(losses, aux)``, stacked along time."""
        losses = torch.stack(self._losses) if self._losses else self._like.new_zeros(0)
        return losses, tree.stack(self._aux)


def concatenate(before: Any, after: object) -> Any:
    """Return two results of `StepOutputs.stacked`, one after the other."""
    if before is None or after is None:
        return after if before is None else before
    pairs = zip(tree.leaves(before), tree.leaves(after), strict=True)
    return tree.with_leaves(after, [b if a is None else torch.cat([a, b]) for a, b in pairs])


class KeptGraphs(NamedTuple):
    """How a hand-written loop keeps the graph of every step.

    Attributes:
        first_order: True if inner gradients are constants in it.
    """

    first_order: bool


class Strategy(abc.ABC):
    """A way of differentiating a loop: exactly or not, with which memory.

    A strategy of your own needs ``exact``, ``differentiates`` and `run`. The methods
    `value_and_grad` and `forecast` have defaults that fit every strategy whose trajectories are
    differentiated by autograd, and whose cost grows linearly with the number of steps.
    """

    exact: bool
    """True if the derivative is that of the loop as it ran, up to rounding."""

    differentiates: ClassVar[frozenset[str]]
    """Which of ``params`` and ``hyper`` receive a gradient."""

    compiles: ClassVar[bool] = False
    """True if a whole meta-gradient with this strategy can be compiled."""

    @property
    def keeps_graph(self) -> bool:
        """True if it runs the steps one by one, with autograd recording them, and nothing else."""
        return False

    def __post_init__(self) -> None:
        """Check what the fields hold; a class with checks of its own calls this first."""
        check_fields(self)

    @abc.abstractmethod
    def run(self, loop: Loop) -> Trajectory:
        """Run the loop so that gradients flow from the trajectory as this strategy promises."""

    def value_and_grad(
        self, objective: Objective[Result], inputs: Inputs, wrt: tuple[str, ...]
    ) -> tuple[Result, dict[str, Any]]:
        """Evaluate ``objective`` and differentiate it by autograd.

        A strategy that estimates the gradient in another way, by sampling ``objective`` for
        example, overrides this method.

        Args:
            objective: runs the loop with this strategy, then the outer loss:
                ``objective(inputs) -> (loss, result)``.
            inputs: where to evaluate it.
            wrt: the fields of ``inputs`` that are differentiated.

        Returns:
            ``(result, grads)``: what the outer loss returned, and for each name in ``wrt`` a
            pytree like that field. None stands where nothing connects an entry with the loss.
        """
        return outer_gradient(objective, inputs, wrt)

    def differentiates_in(self, steps: int | None) -> frozenset[str]:
        """Return what receives a gradient in a loop of ``steps`` steps; None: not known yet."""
        return self.differentiates

    def kept_graphs(self) -> KeptGraphs | None:
        """Return how `track` keeps the graph of every step; None: its steps run again.

        Raises:
            InvalidInputError: the strategy does not differentiate such loops.
        """
        return None

    def kept_states(self, size: int) -> KeptStates:
        """Return an empty storage for the states of a hand-written loop, whose steps run again.

        Args:
            size: the bytes of one state.

        Raises:
            InvalidInputError: the strategy does not differentiate such loops.
        """
        raise InvalidInputError(
            f"track(..., strategy={self!r}): a hand-written loop runs under Checkpointed(), "
            "Truncated(last=...), FirstOrder() or StoreAll(). Write the loop as "
            "innerloop.unroll or innerloop.metagradient for the other strategies"
        )

    def forecast(self, measure: Measure) -> Forecast:
        """Predict the cost of the loop from a few measured steps.

        Args:
            measure: the loop, and the means to time a few steps of it.

        Raises:
            InnerLoopError: the strategy cannot run this loop.
        """
        cost = measure(self)
        return Forecast(cost.seconds.at(measure.steps), cost.bytes.at(measure.steps))


class Measure(abc.ABC):
    """A loop whose cost is wanted, with measurements of a few of its steps.

    Each pair of a strategy and what it differentiates is measured once.

    Attributes:
        loop: the loop.
        steps: T.
        state_bytes: the size of one state (P + S).
        kept_batch_bytes: the size of the batches that have to be kept for a replay.
    """

    loop: Loop
    steps: int
    state_bytes: int
    kept_batch_bytes: int

    @abc.abstractmethod
    def __call__(self, strategy: Strategy, wrt: frozenset[str] = BOTH) -> Cost:
        """Time one and a few steps, and fit a line."""

    @abc.abstractmethod
    def plain(self) -> Cost:
        """Time the forward pass alone."""
