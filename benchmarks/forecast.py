"""How far the forecasts of `innerloop.plan` are from what is then measured, in time and in memory,
on M2, M3 and M4.

Memory is the peak of a fresh process above its peak after a warm-up. Time is processor time;
forecast and loop take turns in one process, and the least of each counts, because what else the
machine does only adds.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.contenders.innerloop_unroll import problem_of
from benchmarks.memory import ROOT, high_water
from benchmarks.workloads import WARM_UP, WORKLOADS, Workload, loss
from innerloop.strategy import _measure as cost

STEPS = {"M2": 1000, "M3": 16, "M4": 16}
"""Longer than the workload itself, so that what grows with the steps shows."""

STRATEGIES = ("StoreAll", "Checkpointed", "Checkpointed, a quarter")
LIMIT = 0.25


def strategy_of(name: str, steps: int) -> Any:
    """The strategy of this line."""
    import innerloop

    if name == "StoreAll":
        return innerloop.StoreAll()
    return innerloop.Checkpointed(slots="all" if name == "Checkpointed" else steps // 4)


def _loop(workload: Workload, steps: int) -> tuple[Any, ...]:
    problem, forward, model = problem_of(workload)
    torch.manual_seed(100)
    drawn = workload.data(steps + 1)
    return problem, forward, dict(model.named_parameters()), drawn[:-1], drawn[-1]


def forecast(workload: Workload, steps: int, name: str) -> tuple[float, float]:
    """``(seconds, MB)`` as `innerloop.plan` sees them coming."""
    import innerloop

    problem, _, params, inner, _ = _loop(workload, steps)
    found = innerloop.plan(problem, params, inner, strategies=[strategy_of(name, steps)])
    (row,) = found.rows
    return row.seconds, row.bytes / 1e6


def measured(workload: Workload, steps: int, name: str) -> tuple[float, float]:
    """``(seconds, MB)`` of unroll and backward."""
    import innerloop

    problem, forward, params, inner, outer = _loop(workload, steps)
    imported = high_water()
    begin = time.process_time()
    traj = innerloop.unroll(problem, params, inner, strategy=strategy_of(name, steps))
    loss(forward(traj.params, outer.x), outer.y).backward()
    return time.process_time() - begin, high_water() - imported


def _child(workload_name: str, name: str, what: str) -> None:
    torch.set_num_threads(1)
    cost.clock = time.process_time
    workload, steps = WORKLOADS[workload_name], STEPS[workload_name]
    tiny = dataclasses.replace(WARM_UP, optimizer=workload.optimizer)
    for each in STRATEGIES:
        forecast(tiny, 4, each)
        measured(tiny, 4, each)
    if what == "memory":
        print(json.dumps(measured(workload, steps, name)[1]))
        return
    rounds = [(forecast(workload, steps, name), measured(workload, steps, name)) for _ in range(3)]
    foreseen, seen = (min(pair[i][0] for pair in rounds) for i in range(2))
    print(json.dumps([foreseen, rounds[0][0][1], seen]))


def _run(workload: str, name: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """What was forecast, and what was measured."""
    results = []
    # Large blocks mapped one by one are counted as they are, but slow: memory and time come from
    # two runs.
    for malloc, what in (("", "time"), ("MALLOC_MMAP_THRESHOLD_=131072 ", "memory")):
        command = f'{malloc}"$0" -m benchmarks.forecast "$1" "$2" "$3"; exit $?'
        shell = ["sh", "-c", command, sys.executable, workload, name, what]
        done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(
                f"{what} of {name!r} on {workload}: {done.stderr.strip().splitlines()[-1:]}"
            )
        results.append(json.loads(done.stdout.splitlines()[-1]))
    (seconds, megabytes, taken), peak = results
    return (seconds, megabytes), (taken, peak)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """One line: what was forecast, what was measured; seconds and MB."""

    workload: str
    strategy: str
    foreseen: tuple[float, float]
    measured: tuple[float, float]

    @property
    def off(self) -> tuple[float, float]:
        """Relative errors of time and memory."""
        time_off, memory_off = (
            a / b - 1 for a, b in zip(self.foreseen, self.measured, strict=True)
        )
        return time_off, memory_off


def measure() -> list[Forecast]:
    """Every strategy on every workload, each in fresh processes."""
    found = []
    for workload in STEPS:
        for name in STRATEGIES:
            foreseen, seen = _run(workload, name)
            found.append(
                Forecast(workload, repr(strategy_of(name, STEPS[workload])), foreseen, seen)
            )
    return found


def table(forecasts: list[Forecast]) -> str:
    """In Markdown."""
    lines = [
        "| workload | strategy | time: forecast | measured | off by | memory: forecast | measured "
        "| off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {f.workload}, T = {STEPS[f.workload]} | {f.strategy} | {f.foreseen[0]:.2f} s | "
        f"{f.measured[0]:.2f} s | {f.off[0]:+.0%} "
        f"| {f.foreseen[1]:.0f} MB | {f.measured[1]:.0f} MB | {f.off[1]:+.0%} |"
        for f in forecasts
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(table(measure()))
    else:
        _child(*sys.argv[1:])
