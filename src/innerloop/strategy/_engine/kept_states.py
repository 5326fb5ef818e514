"""The states of a hand-written loop that are kept, while its length is not known yet."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Callable
from typing import Any

from innerloop.errors import NotDifferentiableError
from innerloop.strategy._engine import schedule
from innerloop.strategy._engine.snapshots import Snapshots


class KeptStates:
    """States by time: some from the forward pass, some from the replay that is under way.

    The state at time 0 is always kept.

    Args:
        slots: how many states may be kept at once after so many steps, the start among them.
        place: where they wait, as in `Snapshots`.
        stride: see there.

    Attributes:
        stride: only states at multiples of this time are kept; 0 waits to be set before the first
            one is.
        compiled: True if the steps and their pullbacks are to be compiled.
    """

    compiled = False

    def __init__(self, slots: Callable[[int], int], place: str | None, *, stride: int = 0) -> None:
        self._slots = slots
        self._snapshots = Snapshots(place)
        self._schedule = schedule.OnlineSchedule(slots(0))
        self._times: list[int] = []
        self._temporary: set[int] = set()
        self._steps = 0
        self.stride = stride

    def make_room(self, room: int) -> None:
        """Be told how many bytes do not count beside what a step takes anyway."""

    def offer(self, t: int, state: object) -> None:
        """Keep the state at time ``t`` of the forward pass if the schedule says so."""
        if t % self.stride:
            return
        place = self._steps = t // self.stride
        keep = t == 0
        if not keep:
            self._schedule.slots = self._slots(place)
            keep, dropped = self._schedule.keep(place)
            if dropped is not None:
                self._drop(dropped * self.stride)
        if keep:
            self._put(t, state)

    def newest(self, t: int) -> tuple[int, Any]:
        """Return ``(time, state)`` of the last state that is kept at or before time ``t``."""
        time = self._times[bisect_right(self._times, t) - 1]
        return time, self._snapshots[time]

    def planned(self, begin: int, t: int) -> set[int]:
        """Return the times to keep on a replay from the kept state at ``begin`` to time ``t``."""
        held = bisect_right(self._times, t) - 1
        free = max(self._slots(self._steps) - held, 1)
        times = schedule.kept(begin // self.stride, t // self.stride + 1, free)
        return {time * self.stride for time in times if time * self.stride < t}

    def keep_for_sweep(self, t: int, state: object) -> None:
        """Keep a state of a replay until the backward pass has gone past it."""
        if t not in self._snapshots:
            self._temporary.add(t)
            self._put(t, state)

    def pass_by(self, t: int, *, again: bool) -> None:
        """Let go of the states from time ``t`` on, which the backward pass has done with.

        Args:
            t: the time.
            again: True if another pass over the graph may come: the states of the forward pass
                then stay.
        """
        while self._times[-1] >= max(t, 1) and not (
            again and self._times[-1] not in self._temporary
        ):
            self._drop(self._times[-1])
        if again and self._temporary:
            for time in [x for x in self._temporary if x >= t]:
                self._drop(time)

    def cut(self, steps: int) -> int:
        """Return the first of so many steps that is differentiated."""
        return 0

    def refuse_early(self) -> None:
        """Raise because the outer loss uses something from before `cut`."""

    def refuse_start(self) -> None:
        """Raise because the gradient with respect to what the loop starts from is wanted."""

    def _put(self, t: int, state: object) -> None:
        self._snapshots[t] = state
        insort(self._times, t)

    def _drop(self, t: int) -> None:
        self._temporary.discard(t)
        if t in self._snapshots:
            del self._snapshots[t]
            self._times.remove(t)


class ManyStates(KeptStates):
    r"""As many as are worth their memory: :math:`2\sqrt t` after t steps, and those that fit.

    Args:
        size: bytes of a state.
        room: bytes that are free for them in any case.
        place, stride: as in `KeptStates`.
    """

    def __init__(self, size: int, room: int, place: str | None, *, stride: int) -> None:
        self._size = size
        self._many = _Many(max(room // size, 32))
        super().__init__(self._many, place, stride=stride)

    def make_room(self, room: int) -> None:
        self._many.least = max(self._many.least, room // self._size)


class _Many:
    """The number of slots of `ManyStates`: a method of theirs would be a cycle of objects."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, steps: int) -> int:
        return max(self.least, math.isqrt(4 * steps))


class LastStates(KeptStates):
    """The states before the last steps.

    Args:
        last: how many steps are differentiated.
    """

    def __init__(self, last: int) -> None:
        super().__init__(lambda _: last, None, stride=1)
        self._last = last

    def offer(self, t: int, state: object) -> None:
        """Keep the state at time ``t`` of the forward pass, and let go of the oldest one."""
        self._put(t, state)
        while self._times[0] <= t - self._last:
            self._drop(self._times[0])

    def pass_by(self, t: int, *, again: bool) -> None:
        """Keep them all: the loop may go on, and they are among the last ones then too."""

    def cut(self, steps: int) -> int:
        """Return the first of so many steps that is differentiated."""
        return max(steps - self._last, 0)

    def refuse_early(self) -> None:
        """Raise because the outer loss uses something from before `cut`."""
        raise NotDifferentiableError(
            "the outer loss uses the parameters, or the loss, of a time that "
            f"Truncated(last={self._last}) holds constant by now: it differentiates the steps that "
            "were taken last when the backward pass begins. Take the outer gradient earlier, or "
            "write a larger `last`, or strategy=innerloop.Checkpointed()"
        )

    def refuse_start(self) -> None:
        """Raise because the gradient with respect to what the loop starts from is wanted."""
        raise NotDifferentiableError(
            f"Truncated(last={self._last}) does not differentiate with respect to what the loop "
            "starts from, which is further away than that by now: write "
            'track(..., learn="outer") for the gradients of tensors outside of the model, or '
            "strategy=innerloop.Checkpointed(), which is exact at any length"
        )
