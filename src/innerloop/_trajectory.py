"""What an inner loop leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from innerloop._carry import Carry
from innerloop.errors import InvalidInputError


class Trajectory:
    """The states, losses and auxiliary outputs of an inner loop of T steps.

    Attributes:
        losses: tensor ``[T]``, the inner loss before each step.
        aux: what the loss returned besides, stacked over steps; None if nothing.
        steps: T.
    """

    def __init__(
        self,
        states: dict[int, Carry],
        losses: Float[Tensor, " steps"] | Callable[[], Tensor],
        aux: Any,
        steps: int,
        missing: str = "",
    ) -> None:
        begin = states[0].time if 0 in states else 0
        self._states = {t: carry._replace(time=begin + t) for t, carry in states.items()}
        self._losses = losses
        self.aux = aux
        self.steps = steps
        self._missing = missing

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters after the last step."""
        return self.at(-1).params

    @property
    def losses(self) -> Float[Tensor, " steps"]:
        """Tensor ``[T]``: the inner loss before each step."""
        if not isinstance(self._losses, Tensor):
            self._losses = self._losses()
        return self._losses

    def at(self, t: int) -> Carry:
        """The carry after ``t`` steps: 0 is the start, -1 (or T) the end.

        Raises:
            InvalidInputError: ``t`` is outside of 0..T, or was not kept.
        """
        time = t + self.steps + 1 if t < 0 else t
        if not 0 <= time <= self.steps:
            raise InvalidInputError(
                f"time {t} is outside of this trajectory, which has times 0 to {self.steps} (or "
                "-1 back)"
            )
        if time not in self._states:
            raise InvalidInputError(
                f"the state at time {time} was not kept: "
                f"{self._missing or f'write save_at=[{time}]'}"
            )
        return self._states[time]

    @property
    def times(self) -> Sequence[int]:
        """The times that `at` knows."""
        return sorted(self._states)

    def __repr__(self) -> str:
        return f"Trajectory(steps={self.steps}, parameters={list(self._states[self.steps].params)})"
