"""The figures that innerloop has to reach, P1 to P12, each a ratio of two rows (or one number of
its own).

A new figure is one entry of `FIGURES`. The wording and the limits are those of the project's
performance goals.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.attention import PEER, Measured
from benchmarks.forecast import LIMIT as FORECAST_LIMIT
from benchmarks.forecast import Forecast
from benchmarks.imports import ImportTimes
from benchmarks.long import GB, PEAK, TIMES_HIGHER, LongTimes
from benchmarks.results import Result, Row, ratio
from benchmarks.updates import LIMIT as UPDATE_LIMIT
from benchmarks.updates import Update

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
    Figure("P1", "M1", "map_tasks(compile=True)", ("JAX jit",), 1.05),
    Figure("P1", "M1", "map_tasks(compile=True)", ("higher",), 1 / 9.5),
    Figure("P2", "M1", "metagradient, vmap", ("higher",), 0.25),
    Figure("foundation", "M2", "track", ("higher",), 0.65),
    Figure("P3", "M2", "track", ("higher",), 0.55),
    Figure("P3", "M2", "track", ("TorchOpt",), 0.60),
    Figure("P3", "M2", "StoreAll(compile=True)", ("hand-written loop",), 0.45),
    Figure("P5", "M4", "StoreAll(compile=True)", ("hand-written loop",), 0.85),
    Figure("P6", "M4", "Checkpointed(slots='all', compile=True)", ("hand-written loop",), 1.05),
    *(
        Figure("P4", workload, ours, EAGER_PEERS, NOISE, quantity)
        for workload in ("M3", "M4")
        for ours in ("track", "unroll, StoreAll")
        for quantity in ("time", "memory")
    ),
)

IMPORT_LIMIT = 0.3
"""P12: seconds that `import innerloop` may add to `import torch`."""

LONG_LIMITS = {"memory": 1.3, "time": 2.0, "difference": 1e-10, "endless": 1 * GB, "growth": 0.15}
"""P7 (memory over the model, time over `StoreAll`, difference from it) and P9 (MB above import,
drift of the time per step)."""


ATTENTION_LIMITS = {"time": 1.02, "memory": 0.5}
"""P11 on a CPU: time over PyTorch's form; memory over it, where the sequence or the vocabulary is
long. No limits are set for a GPU yet."""


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
    return [
        Reading(
            "P12", "seconds that `import innerloop` adds to `import torch`", IMPORT_LIMIT, added
        )
    ]


def read_long(times: LongTimes) -> list[Reading]:
    """P7, P8, P9 and M3's network at T=1000."""
    limits = LONG_LIMITS
    drift = max(abs(spread.median - 1) for spread in times.growth().values())
    more = f"at {TIMES_HIGHER} x the steps of higher"
    return [
        *(
            Reading(
                "P7",
                f"T={peak.steps}: peak above import / [slots (P + S) + 3 A]",
                limits["memory"],
                peak.above_import / peak.model,
            )
            for peak in (times.short, times.long)
        ),
        Reading("P7", "T=100: time of Checkpointed / StoreAll", limits["time"], times.ratio.median),
        Reading(
            "P7",
            "T=100: difference from StoreAll in float64",
            limits["difference"],
            times.difference,
        ),
        Reading("P8", f"M4: MB of Checkpointed's process {more}", PEAK, times.gpt_peak),
        Reading("P9", "T=10,000: MB above import", limits["endless"], times.endless.above_import),
        Reading("P9", "time per step to T=10,000: change from T=100", limits["growth"], drift),
        Reading("long", "conv4, T=1000: MB of the process", PEAK, times.conv4.process),
    ]


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
    return (
        ours.peak.process / smallest
        if ours is not None and ours.peak is not None and smallest
        else None
    )


def read_forecasts(forecasts: Sequence[Forecast]) -> list[Reading]:
    """The worst error of `innerloop.plan`, of time and of memory."""
    return [
        Reading(
            "plan",
            f"worst relative error of a forecast of {what}",
            FORECAST_LIMIT,
            max(abs(f.off[i]) for f in forecasts),
        )
        for i, what in enumerate(("time", "memory"))
    ]


def read_attention(steps: Sequence[Measured]) -> list[Reading]:
    """Of attention: time of every case, memory of the long ones. (Cross-entropy has a goal in
    tensors, not in time: a test counts.)"""
    steps = [m for m in steps if m.case.title.startswith("attention")]
    return [
        *(
            Reading(
                "P11",
                f"{m.case.title}: time / {PEER}'s",
                ATTENTION_LIMITS["time"],
                m.ratios["innerloop"].median,
            )
            for m in steps
        ),
        *(
            Reading(
                "P11",
                f"{m.case.title}: memory / {PEER}'s",
                ATTENTION_LIMITS["memory"],
                m.peaks["innerloop"] / m.peaks[PEER],
            )
            for m in steps
            if m.case.long
        ),
    ]


def read_updates(updates: Sequence[Update]) -> list[Reading]:
    """Each rule's worst shape, backward pass included."""
    return [
        Reading(
            "updates",
            f"{rule}, 100 tensors: time per step / higher",
            UPDATE_LIMIT,
            max(u.with_backward.median for u in updates if u.rule == rule),
        )
        for rule in dict.fromkeys(u.rule for u in updates)
    ]
