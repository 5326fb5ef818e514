"""The predicted cost of a loop."""

from __future__ import annotations

from typing import NamedTuple


class LinearCost(NamedTuple):
    """A quantity that grows with the number of steps: ``fixed + each * T``.

    Attributes:
        fixed: the part that is there at any length.
        each: the part per step.
    """

    fixed: float
    each: float

    def at(self, steps: float) -> float:
        """Return the value after ``steps`` steps."""
        return self.fixed + self.each * steps


class Cost(NamedTuple):
    """The cost of a strategy on a problem, as a function of the number of steps.

    Attributes:
        seconds: time of the loop and its backward pass.
        bytes: most memory at once, above what was there before.
    """

    seconds: LinearCost
    bytes: LinearCost


class Forecast(NamedTuple):
    """The predicted cost of one loop.

    Attributes:
        seconds: time of the loop and its backward pass.
        bytes: most memory at once, above what was there before.
    """

    seconds: float
    bytes: float
