"""The predicted cost of a loop."""

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """A quantity that grows with the number of steps: ``fixed + each * T``.

    Attributes:
        fixed: what is there at any length.
        each: per step.
    """

    fixed: float
    each: float

    def at(self, steps: float) -> float:
        """The value after ``steps`` steps."""
        return self.fixed + self.each * steps


class Cost(NamedTuple):
    """What a strategy costs on a problem.

    Attributes:
        seconds: time of the loop and its backward pass.
        bytes: most memory at once, above what was there before.
    """

    seconds: Line
    bytes: Line
