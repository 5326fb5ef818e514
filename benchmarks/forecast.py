"""How far the forecasts of `innerloop.plan` are from what is then measured, in time and in memory, on M2, M3 and M4.

Memory is the peak of a fresh process above its peak after a warm-up; time is processor time, the least of a few runs, which is what a plan
measures as well.
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
from innerloop.strategy import cost

STEPS = {"M2": 200, "M3": 16, "M4": 16}
"""Longer than the workload itself, so that what grows with the steps shows."""

STRATEGIES: dict[str, dict[str, Any]] = {
    "StoreAll": {},
    "Checkpointed": {"slots": "all"},
    "Checkpointed, few": {"slots": 50},
}
LIMIT = 0.25


def strategy_of(name: str) -> Any:
    """The strategy of this line."""
    import innerloop

    return getattr(innerloop, name.split(",")[0])(**STRATEGIES[name])


def _loop(workload: Workload, steps: int) -> tuple[Any, ...]:
    problem, forward, model = problem_of(workload)
    torch.manual_seed(100)
    drawn = workload.data(steps + 1)
    return problem, forward, dict(model.named_parameters()), drawn[:-1], drawn[-1]


def forecast(workload: Workload, steps: int, name: str) -> tuple[float, float]:
    """``(seconds, MB)`` as `innerloop.plan` sees them coming."""
    import innerloop

    problem, _, params, inner, _ = _loop(workload, steps)
    found = innerloop.plan(problem, params, inner, strategies=[strategy_of(name)])
    (row,) = found.rows
    return row.seconds, row.bytes / 1e6


def measured(workload: Workload, steps: int, name: str, rounds: int = 3) -> tuple[float, float]:
    """``(seconds, MB)`` of unroll and backward."""
    import innerloop

    problem, forward, params, inner, outer = _loop(workload, steps)
    imported = high_water()
    times, peaks = [], []
    for _ in range(rounds):
        begin = time.process_time()
        traj = innerloop.unroll(problem, params, inner, strategy=strategy_of(name))
        loss(forward(traj.params, outer.x), outer.y).backward()
        times.append(time.process_time() - begin)
        peaks.append(high_water() - imported)
        del traj
    return min(times), peaks[0]


def _warm_up(workload: Workload) -> None:
    tiny = dataclasses.replace(WARM_UP, optimizer=workload.optimizer)
    for name in STRATEGIES:
        forecast(tiny, 2, name)
        measured(tiny, 2, name, 1)


def _child(workload_name: str, name: str, what: str) -> None:
    torch.set_num_threads(1)
    cost.clock = time.process_time
    workload, steps = WORKLOADS[workload_name], STEPS[workload_name]
    _warm_up(workload)
    print(json.dumps((forecast if what == "forecast" else measured)(workload, steps, name)))


def _run(workload: str, name: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """What was forecast, and what was measured."""
    results = []
    for malloc, what in (("", "forecast"), ("", "measured"), ("MALLOC_MMAP_THRESHOLD_=131072 ", "measured")):
        command = f'{malloc}"$0" -m benchmarks.forecast "$1" "$2" "$3"; exit $?'
        shell = ["sh", "-c", command, sys.executable, workload, name, what]
        done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{what} of {name!r} on {workload}: {done.stderr.strip().splitlines()[-1:]}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    # Large blocks mapped one by one are counted as they are, but slow: memory and time come from two runs.
    return results[0], (results[1][0], results[2][1])


def section() -> str:
    """The table, in Markdown."""
    lines = [
        "| workload | strategy | time: forecast | measured | off by | memory: forecast | measured | off by | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for workload in STEPS:
        for name in STRATEGIES:
            (s, mb), (seconds, megabytes) = _run(workload, name)
            off = s / seconds - 1, mb / megabytes - 1
            verdict = "reached" if max(map(abs, off)) <= LIMIT else "missed"
            shown = name.split(",")[0] + "(" + ", ".join(f"{k}={v!r}" for k, v in STRATEGIES[name].items()) + ")"
            lines.append(
                f"| {workload}, T = {STEPS[workload]} | {shown} | {s:.2f} s | {seconds:.2f} s | {off[0]:+.0%} "
                f"| {mb:.0f} MB | {megabytes:.0f} MB | {off[1]:+.0%} | {verdict} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        section()
    else:
        _child(*sys.argv[1:])
