"""How long compiling takes: the first call less a later one, in fresh processes, with an empty
cache of compiled code and with that of the process before.

    python -m benchmarks.compile_times
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

FORMS = (
    ("M1", "StoreAll", 5),
    ("M2", "StoreAll", 8),
    ("M2", "StoreAll", 200),
    ("M4", "StoreAll", 8),
    ("M4", "Checkpointed", 8),
)


class CompileTime(NamedTuple):
    """Seconds that compiling one step takes, its verification included.

    Attributes:
        workload, strategy, steps: what is compiled.
        first: with an empty cache.
        second: in a process after that, which finds the cache of the first.
    """

    workload: str
    strategy: str
    steps: int
    first: float
    second: float


def measure() -> list[CompileTime]:
    found = []
    for workload, strategy, steps in FORMS:
        with tempfile.TemporaryDirectory() as cache:
            first, second = (_in_a_process(cache, workload, strategy, steps) for _ in range(2))
        found.append(CompileTime(workload, strategy, steps, first, second))
        print(found[-1], flush=True)
    return found


def _in_a_process(cache: str, workload: str, strategy: str, steps: int) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_times", workload, strategy, str(steps)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds: float = json.loads(done.stdout.splitlines()[-1])
    return seconds


def _seconds(name: str, strategy: str, steps: int) -> float:
    import torch

    from benchmarks.contenders import innerloop_unroll
    from benchmarks.workloads import WORKLOADS

    torch.set_num_threads(1)
    workload = dataclasses.replace(WORKLOADS[name], steps=steps, tasks=1)
    options = {"slots": "all"} if strategy == "Checkpointed" else {}
    run = innerloop_unroll.prepare(workload, strategy, compile=True, **options)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds[0] - min(seconds[1:])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        measure()
    else:
        print(json.dumps(_seconds(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
