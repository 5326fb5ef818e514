"""How a loop is differentiated."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._batches import Batches
from innerloop._carry import Carry
from innerloop._problem import Problem
from innerloop._trajectory import Trajectory
from innerloop._utils import tree
from innerloop._utils.progress import Report, silent


class Loop(NamedTuple):
    """What a strategy is handed: the factors of the problem, where to start, and the data.

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
    hyper: Any
    batches: Batches
    save_at: tuple[int, ...] = ()
    report: Report = silent

    def batch(self, carry: Carry, t: int) -> Any:
        """The data of step t."""
        return self.batches.at(carry.params, self.hyper, t)


class StepOutputs:
    """What the steps give one by one: the losses and aux.

    Args:
        params: tells the dtype and the device of no losses at all.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self._like = next(iter(params.values()))
        self._losses: list[Tensor] = []
        self._aux: list[Any] = []

    def add(self, loss: Tensor, aux: Any) -> None:
        """One step's."""
        self._losses.append(loss)
        self._aux.append(aux)

    def __len__(self) -> int:
        return len(self._losses)

    def stacked(self) -> tuple[Tensor, Any]:
        """``(losses, aux)``, along time."""
        losses = torch.stack(self._losses) if self._losses else self._like.new_zeros(0)
        return losses, tree.stack(self._aux)


def concatenate(before: Any, after: Any) -> Any:
    """Two results of `StepOutputs.stacked`, one after the other."""
    if before is None or after is None:
        return after if before is None else before
    pairs = zip(tree.leaves(before), tree.leaves(after), strict=True)
    return tree.with_leaves(after, [b if a is None else torch.cat([a, b]) for a, b in pairs])


class Strategy(abc.ABC):
    """How a loop is differentiated: exactly or not, with which memory."""

    exact: bool
    """Whether the derivative is that of the loop as it ran, up to rounding."""

    differentiates: ClassVar[frozenset[str]]
    """Which of ``params`` and ``hyper`` receive a gradient."""

    compiles: ClassVar[bool] = False
    """Whether a whole meta-gradient with this strategy can be compiled."""

    @abc.abstractmethod
    def run(self, loop: Loop) -> Trajectory:
        """Run the loop so that gradients flow from the trajectory as this strategy promises."""
