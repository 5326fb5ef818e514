"""How a loop is differentiated."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from innerloop.problem import Carry, Problem
from innerloop.trajectory import Trajectory


class Loop(NamedTuple):
    """What a strategy is handed: the factors of the problem, where to start, and the data.

    Attributes:
        problem: gives ``step``, ``gradient`` (the residual) and the optimizer.
        start: the carry before the first step.
        hyper: what the loss and the optimizer are also differentiated with respect to.
        batch: ``batch(params, t)``, the data of step t, constant for the derivative.
        steps: T.
        save_at: the times whose states are wanted besides 0 and T.
    """

    problem: Problem
    start: Carry
    hyper: Any
    batch: Callable[[dict[str, Any], int], Any]
    steps: int
    save_at: tuple[int, ...]


class Strategy(abc.ABC):
    """How a loop is differentiated: exactly or not, with which memory."""

    exact: ClassVar[bool]
    """Whether the derivative is that of the loop as it ran, up to rounding."""

    differentiates: ClassVar[frozenset[str]]
    """Which of ``params`` and ``hyper`` receive a gradient."""

    @abc.abstractmethod
    def run(self, loop: Loop) -> Trajectory:
        """Run the loop so that gradients flow from the trajectory as this strategy promises."""
