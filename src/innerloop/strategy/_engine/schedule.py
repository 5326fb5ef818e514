r"""Where to keep states so that a loop is run backwards with the fewest replayed steps.

With s slots (the start of the loop is in one of them) and at most r visits of a step,
:math:`\beta(s, r) = \binom{s + r}{s}` steps can be run backwards, and T of them take :math:`r T -
\beta(s + 1, r - 1)` advances, r being the smallest with
:math:`T \le \beta(s, r)` (Griewank & Walther, "Algorithm 799: revolve", 2000). The first T - 1 of these advances are the forward pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

from innerloop.errors import InvalidInputError


@functools.lru_cache(maxsize=4096)
def advances(steps: int, slots: int) -> int:
    """The fewest advances with which ``steps`` steps are run backwards: the forward pass (all but the last step) and the replays.

    Example:
        >>> advances(10, 10), advances(10, 3), advances(10, 1)
        (9, 15, 45)
    """
    if steps <= 1:
        return 0
    r = _visits(steps, slots)
    return r * steps - math.comb(slots + r, slots + 1)


def replays(steps: int, slots: int) -> int:
    """How many steps are run a second time or more: `advances` less the forward pass.

    Example:
        >>> replays(1000, 31) / 1000
        1.44
    """
    return advances(steps, slots) - max(steps - 1, 0)


def _visits(steps: int, slots: int) -> int:
    if slots < 1:
        raise InvalidInputError(
            f"slots={slots}: at least the start of the loop must be kept, write slots=1 or more"
        )
    r = 1
    while math.comb(slots + r, slots) < steps:
        r += 1
    return r


@functools.lru_cache(maxsize=65536)
def stride(steps: int, slots: int) -> int:
    r"""How far to run from a kept state before keeping the next one.

    Args:
        steps: the steps to be run backwards from the kept state on.
        slots: the free slots and the one of the kept state.

    Returns:
        The distance m; ``steps - 1`` or less. It is the optimum: ``advances(steps, slots) == m +
        advances(steps - m, slots - 1) + advances(m, slots)``, which holds for every m with
        :math:`\beta(s, r-2) \le m \le \beta(s, r-1)` and
        :math:`\beta(s-1, r-1) \le T - m \le \beta(s-1, r)`.
    """
    r = _visits(steps, slots)
    most, least = math.comb(slots + r - 1, slots), math.comb(slots + r - 2, slots) if r > 1 else 0
    low = max(least, steps - math.comb(slots - 1 + r, slots - 1), 1)
    high = min(most, steps - math.comb(slots + r - 2, slots - 1), steps - 1)
    return max(low, high, 1)


def kept(start: int, end: int, slots: int) -> Iterator[int]:
    """The times to keep while running from ``start`` (kept already, in one of the slots) towards ``end``.

    Example:
        >>> list(kept(0, 10, 3))
        [4, 7]
    """
    while slots > 1 and end - start > 1:
        start += stride(end - start, slots)
        slots -= 1
        yield start


class OnlineSchedule:
    """Which states to keep while the number of steps is not known yet.

    The rule of Wang, Moin & Iaccarino ("Minimal repetition dynamic checkpointing", 2009): a state
    of a lower level than a later one may go; where there is none, the newest one goes, and the
    state that replaces it is one level higher. No step is visited more often than binomial
    checkpointing of that length with that many slots would. (Forward, replays and pullbacks
    together are at most 1.3 times as many as with a known length, as measured up to T = 1000.)

    Args:
        slots: the start of the loop is in one of them.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.times: list[int] = []
        self._levels: list[int] = []

    def keep(self, t: int) -> tuple[bool, int | None]:
        """Whether to keep the state at time t, and which one to give up for it."""
        if self.slots < 2:
            return False, None
        level, dropped = 0, None
        if len(self.times) == self.slots - 1:
            place, level = self._dispensable()
            if self.slots == 2 and not advances(t, 2) < advances(
                t + 1 - self.times[0], 1
            ) + advances(self.times[0], 2):
                return False, None
            dropped = self.times.pop(place)
            del self._levels[place]
        self.times.append(t)
        self._levels.append(level)
        return True, dropped

    def _dispensable(self) -> tuple[int, int]:
        """``(place, level)``: which kept state may go, and the level of the one that comes."""
        highest = -1
        for place in range(len(self.times) - 1, -1, -1):
            if self._levels[place] < highest:
                return place, 0
            highest = max(highest, self._levels[place])
        return len(self.times) - 1, self._levels[-1] + 1
