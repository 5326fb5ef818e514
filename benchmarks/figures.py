"""The figures that innerloop has to reach, P1 to P12, each a ratio of two rows (or one number of its own).

A new figure is one entry of `FIGURES`. The wording and the limits are those of the project's performance goals.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.imports import ImportTimes
from benchmarks.results import Result, Row, ratio

EAGER_PEERS = ("higher", "TorchOpt", "hand-written loop")
NOISE = 1.03


@dataclass(frozen=True)
class Figure:
    """`ours` over the best of `peers` on `workload`, in time or in peak memory, at most `limit`."""

    name: str
    workload: str
    ours: str
    peers: tuple[str, ...]
    limit: float
    quantity: Literal["time", "memory"] = "time"

    def title(self) -> str:
        peers = self.peers[0] if len(self.peers) == 1 else "the best of the eager peers"
        return f"{self.workload}: {self.quantity} of {self.ours} / {peers}"


FIGURES: tuple[Figure, ...] = (
    Figure("P2", "M1", "metagradient, vmap", ("higher",), 0.25),
    Figure("foundation", "M2", "track", ("higher",), 0.65),
    Figure("P3", "M2", "track", ("higher",), 0.55),
    Figure("P3", "M2", "track", ("TorchOpt",), 0.60),
    *(
        Figure("P4", workload, ours, EAGER_PEERS, NOISE, quantity)
        for workload in ("M3", "M4")
        for ours in ("track", "unroll, StoreAll")
        for quantity in ("time", "memory")
    ),
)

IMPORT_LIMIT = 0.3
"""P12: seconds that `import innerloop` may add to `import torch`."""


@dataclass(frozen=True)
class Reading:
    """A figure as measured; `value=None` where a contender is missing."""

    name: str
    title: str
    limit: float
    value: float | None

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "reached" if self.value <= self.limit else "missed"


def read(result: Result) -> list[Reading]:
    """The figures that this workload says something about."""
    return [_read(figure, result) for figure in FIGURES if figure.workload == result.workload]


def read_import(times: ImportTimes) -> list[Reading]:
    added = statistics.median(times.innerloop)
    return [Reading("P12", "seconds that `import innerloop` adds to `import torch`", IMPORT_LIMIT, added)]


def _read(figure: Figure, result: Result) -> Reading:
    ours = result.row(figure.ours)
    peers = [row for name in figure.peers if (row := result.row(name)) is not None]
    read_one = _time if figure.quantity == "time" else _memory
    return Reading(figure.name, figure.title(), figure.limit, read_one(ours, peers))


def _time(ours: Row | None, peers: Sequence[Row]) -> float | None:
    """Against the peer with the smallest median, round by round."""
    timed = [row for row in peers if row.seconds]
    if ours is None or not ours.seconds or not timed:
        return None
    return ratio(ours, min(timed, key=lambda row: statistics.median(row.seconds))).median


def _memory(ours: Row | None, peers: Sequence[Row]) -> float | None:
    """Peaks of the whole processes; all of them have made the same imports from torch."""
    smallest = min((row.peak.process for row in peers if row.peak is not None), default=None)
    return ours.peak.process / smallest if ours is not None and ours.peak is not None and smallest else None
