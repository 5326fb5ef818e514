"""Run one workload: check every contender, time them interleaved, measure their memory."""

from __future__ import annotations

import dataclasses
import sys
import time

from torch import Tensor

from benchmarks import check, machine, memory, timing
from benchmarks.contenders import CONTENDERS, Contender, handwritten
from benchmarks.contenders.base import MetaGradient
from benchmarks.spread import Spread
from benchmarks.workloads import Workload


@dataclasses.dataclass
class Row:
    """One contender on one workload; `problem` says why it has no times."""

    name: str
    label: str
    ours: bool
    problem: str | None = None
    error: float | None = None
    first: float | None = None
    """Seconds of the first call, what is compiled then included."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak: memory.Peak | None = None


@dataclasses.dataclass
class Result:
    """One workload. `first_order_error` is what the check would see if the second derivatives were
    missing."""

    workload: str
    title: str
    repeats: int
    clock: str
    tolerance: float
    first_order_error: float
    facts: dict[str, str]
    load: float
    rows: list[Row]

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def timed(self, ours: bool) -> list[Row]:
        return [row for row in self.rows if row.seconds and row.ours is ours]

    @property
    def failed(self) -> list[Row]:
        """Contenders that are installed and could not be measured."""
        return [
            row for row in self.rows if row.problem and not row.problem.startswith("not installed")
        ]


def ratio(ours: Row, theirs: Row) -> Spread:
    return Spread.of_ratios(ours.seconds, theirs.seconds)


def measure(
    workload: Workload, repeats: int | None = None, with_memory: bool = True, clock: str = "wall"
) -> Result:
    repeats = repeats or workload.repeats
    say(f"{workload.name}: checking every contender against float64")
    reference = handwritten.reference(workload)
    missing_term = check.error(handwritten.first_order(workload), reference)
    rows, runs = [], {}
    for contender in CONTENDERS:
        if contender.takes(workload):
            row, run = _checked(contender, workload, reference)
            rows.append(row)
            if run is not None:
                runs[row.name] = run
    say(f"{workload.name}: timing {len(runs)} contenders, {repeats} rounds")
    seconds = timing.interleave(runs, repeats, clock=clock)
    load = machine.load()
    del runs
    for row in rows:
        row.seconds = seconds.get(row.name, [])
        if with_memory and row.seconds:
            say(f"{workload.name}: memory of {row.name}")
            row.peak = memory.measure(workload.name, row.name)
    return Result(
        workload.name,
        workload.title,
        repeats,
        clock,
        workload.tolerance,
        missing_term,
        machine.describe(),
        load,
        rows,
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _checked(
    contender: Contender, workload: Workload, reference: dict[str, Tensor]
) -> tuple[Row, MetaGradient | None]:
    """The contender's row, and what is to be timed if its meta-gradient is right."""
    row = Row(contender.name, contender.label(), contender.ours)
    missing = contender.missing()
    if missing:
        row.problem = f"not installed: {', '.join(missing)}"
        return row, None
    try:
        run = contender.prepare(workload)
        begin = time.perf_counter()
        found = run()
        row.first = time.perf_counter() - begin
        row.error = check.error(found, reference)
    except Exception as failure:  # whatever one contender does, the others are measured
        first = str(failure).splitlines()[0] if str(failure) else ""
        row.problem = f"failed: {type(failure).__name__}: {first}"
        return row, None
    if not row.error <= workload.tolerance:
        row.problem = (
            f"wrong meta-gradient: relative error {row.error:.1e}, allowed {workload.tolerance:.0e}"
        )
        return row, None
    return row, run
