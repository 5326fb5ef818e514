"""``Trajectory``: the states, losses and auxiliary outputs that a loop leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic

from jaxtyping import Float
from torch import Tensor

from innerloop._carry import Carry
from innerloop._types import Aux
from innerloop._utils.arguments import check_integer
from innerloop.errors import InvalidInputError


class Trajectory(Generic[Aux]):
    """The states, losses and auxiliary outputs of an inner loop of T steps.

    Attributes:
        losses: tensor ``[T]``, the inner loss before each step.
        aux: what the loss returned besides the scalar, stacked over steps; None if nothing.
        steps: T.
        hypers: the outer variables as each step saw them, where the graph of the loop is kept.
        record: what is needed to run the loop again, for `innerloop.inspect`; None where that is
            not known (`track`, code under ``torch.func``).
        function: what pulls the whole loop back, where it is one node of the graph; else None.

    Args:
        states: time -> carry, times counted from the start of this loop. Each carry gets its
            `Carry.time` here, counted on from that of the carry at time 0.
        losses: the losses, or a function that stacks them when they are asked for.
        aux: as above.
        steps: T.
        missing: how to keep a state that was not kept, for the error of `at`.
    """

    def __init__(
        self,
        states: Mapping[int, Carry],
        losses: Float[Tensor, " steps"] | Callable[[], Tensor],
        aux: Aux,
        steps: int,
        missing: str = "",
    ) -> None:
        begin = states[0].time if 0 in states else 0
        self._states = {t: carry._replace(time=begin + t) for t, carry in states.items()}
        self._losses = losses
        self.aux: Aux = aux
        self.steps = steps
        self._missing = missing
        self.hypers: Sequence[object] = ()
        self.record: Any = None
        self.function: Any = None

    @property
    def params(self) -> dict[str, Tensor]:
        """Parameters after the last step."""
        return self.at(-1).params

    @property
    def losses(self) -> Float[Tensor, " steps"]:
        """Inner losses before each step, a tensor ``[T]``."""
        if not isinstance(self._losses, Tensor):
            self._losses = self._losses()
        return self._losses

    def at(self, t: int) -> Carry:
        """Return the carry after ``t`` steps: 0 is the start, -1 (or T) the end.

        Raises:
            InvalidInputError: ``t`` is outside of 0..T, or was not kept.
        """
        check_integer("a time", t)
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
        """Times that `at` knows."""
        return sorted(self._states)

    def __repr__(self) -> str:
        names = list(self._states[self.steps].params)
        return f"Trajectory(steps={self.steps}, parameters={names})"
