"""Interleaved timing in one process: A B C, B C A, C A B, ..."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` counts the time of all threads of this process: for a machine that others use as well. Not
for a GPU."""


def interleave(
    runs: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 2, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds per run and round. A round is one run of each, so that `zip` of two lists pairs what
    ran side by side.

    Each round begins with another contender: who runs after whom matters by up to 4 % where memory
    is large, because the heap that the predecessor freed is cheaper than fresh pages.

    Garbage is collected before each run and not during it, so that nobody pays for the cycles of
    the one before. What a contender's own cycles cost shows in its memory.
    """
    for run in runs.values():
        for _ in range(warm_up):
            run()
    now = CLOCKS[clock]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for round_number in range(repeats):
        first = round_number % max(1, len(names))
        for name in names[first:] + names[:first]:
            gc.collect()
            start = now()
            runs[name]()
            seconds[name].append(now() - start)
    return seconds
