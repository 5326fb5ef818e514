"""Memory and time by the number of steps: ``python -m benchmarks.lengths`` prints the table of
docs/benchmarks.md.

Every number is that of a process of its own, after a warm-up on a small network: the peak above
what the process held with the data of all steps drawn, and the processor time of one meta-gradient.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.contenders import handwritten, higher_loop, innerloop_track, innerloop_unroll
from benchmarks.contenders.base import MetaGradient, named_grads
from benchmarks.machine import describe
from benchmarks.results import say
from benchmarks.workloads import WARM_UP, WORKLOADS, Workload, loss

MOST = 16_000
"""MB: a method is not asked for more steps once it would need more than this."""

LENGTHS = {"M2": (8, 100, 1_000, 10_000), "M3": (8, 100)}


def replayed(workload: Workload) -> MetaGradient:
    """Innerloop's `track` with closures that run again."""
    import innerloop

    model = workload.model()
    tasks = workload.batches()
    optimizer = workload.torch_optimizer(model)

    def batch_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return loss(model(x), y)

    def run() -> dict[str, Tensor]:
        for task in tasks:
            with innerloop.track(model, optimizer, strategy=innerloop.Checkpointed()) as loop:
                for x, y in task.inner:
                    loop.step(batch_loss, args=(loop.model, x, y))
                (loss(loop.model(task.outer.x), task.outer.y) / len(tasks)).backward()
        return named_grads(model)

    return run


METHODS: dict[str, Callable[[Workload], MetaGradient]] = {
    "hand-written": handwritten.prepare,
    "higher": higher_loop.prepare,
    "track": innerloop_track.prepare,
    "unroll": lambda workload: innerloop_unroll.prepare(workload, strategy="StoreAll"),
    "track, Checkpointed()": replayed,
    "unroll, Checkpointed()": lambda workload: innerloop_unroll.prepare(
        workload, strategy="Checkpointed"
    ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one method takes for one length.

    Attributes:
        peak: MB above what the process held before.
        seconds: processor time of one meta-gradient.
    """

    peak: float
    seconds: float


def child(name: str, steps: int, method: str) -> None:
    """Measure one cell in this process, and print it."""
    torch.set_num_threads(1)
    warm_up = dataclasses.replace(WARM_UP, optimizer=WORKLOADS[name].optimizer)
    warm_up.torch_optimizer(warm_up.model())
    METHODS[method](warm_up)()
    run = METHODS[method](dataclasses.replace(WORKLOADS[name], steps=steps))
    before = memory.high_water()
    start = time.process_time()
    run()
    seconds = time.process_time() - start
    print(json.dumps(dataclasses.asdict(Cell(memory.high_water() - before, seconds))))


def measure(name: str, steps: int, method: str) -> Cell:
    """Measure one cell: the memory in one process, the time in another."""
    say(f"lengths: {name}, T={steps}, {method}")
    arguments = ("benchmarks.lengths", "--child", name, str(steps), method)
    peak = memory.fresh(*arguments)["peak"]
    return Cell(peak, memory.fresh(*arguments, mapped=False)["seconds"])


def table(name: str) -> list[str]:
    """Return the rows of one workload."""
    rows: list[str] = []
    cells: dict[str, dict[int, Cell]] = {method: {} for method in METHODS}
    for steps in LENGTHS[name]:
        for method, known in cells.items():
            expected = max((c.peak / t for t, c in known.items()), default=0.0) * steps
            if expected <= MOST or "Checkpointed" in method:
                known[steps] = measure(name, steps, method)
    for method, known in cells.items():
        shown = [
            f"{known[t].peak:,.0f} MB, {known[t].seconds:.3g} s" if t in known else "not tried"
            for t in LENGTHS[name]
        ]
        rows.append(f"| {name} | {method} | " + " | ".join(shown) + " |")
    return rows


def main() -> None:
    """Print the table, or one cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=3, metavar=("WORKLOAD", "STEPS", "METHOD"))
    parser.add_argument("--only", choices=sorted(LENGTHS), help="one workload")
    options = parser.parse_args()
    if options.child:
        name, steps, method = options.child
        child(name, int(steps), method)
        return
    for name in [options.only] if options.only else LENGTHS:
        lengths = [f"T={t:,}" for t in LENGTHS[name]]
        print("| loop | method | " + " | ".join(lengths) + " |")
        print("|---|---|" + "---|" * len(lengths))
        print("\n".join(table(name)), flush=True)
    print(describe(), flush=True)


if __name__ == "__main__":
    main()
