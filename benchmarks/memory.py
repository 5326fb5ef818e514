"""Peak resident memory of one contender on one workload, each in a process of its own.

`VmHWM` of a process started from a shell is read, not `ru_maxrss`, which a child inherits from a
large parent.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.contenders import CONTENDERS
from benchmarks.workloads import WARM_UP, WORKLOADS

ROOT = Path(__file__).resolve().parent.parent


class Peak(NamedTuple):
    """In MB (1e6 bytes): the process's peak, and its peak after the imports and a warm-up on a tiny
    network."""

    process: float
    imported: float

    @property
    def above_import(self) -> float:
        return self.process - self.imported


def measure(workload: str, contender: str) -> Peak:
    """Start a fresh interpreter for this contender and read its peaks."""
    return Peak(**fresh("benchmarks.memory", workload, contender))


def fresh(module: str, *arguments: str, mapped: bool = True) -> dict[str, Any]:
    """Run `python -m module arguments...` in a fresh process started from a shell; its last line is
    what it measured, as JSON.

    Args:
        mapped: With glibc's adaptive threshold large blocks land in the heap, whose fragmentation
            moves the peak of identical processes by up to 20 % (M3: 390 to 479 MB); mapped one by
            one they are counted as they are (M3: 295 to 297). It takes time, so that a process
            whose time is measured is better off without.
    """
    command = f'{"MALLOC_MMAP_THRESHOLD_=131072 " if mapped else ""}"$0" -m "$@"; exit $?'
    shell = ["sh", "-c", command, sys.executable, module, *arguments]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{module} {' '.join(arguments)} was not measured: {reason[0]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def high_water() -> float:
    """`VmHWM` of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(
        "/proc/self/status has no VmHWM: peak memory is read on Linux only; use --no-memory"
    )


def _child(workload_name: str, contender_name: str) -> None:
    torch.set_num_threads(1)
    workload = WORKLOADS[workload_name]
    contender = next(c for c in CONTENDERS if c.name == contender_name)
    # Building a torch optimizer imports 75 MB of torch's compiler. Every process pays it, whether
    # its contender needs a torch optimizer or not, so that the peaks of the processes are
    # comparable.
    workload.torch_optimizer(workload.model())
    contender.prepare(dataclasses.replace(WARM_UP, optimizer=workload.optimizer))()
    imported = high_water()
    run = contender.prepare(workload)
    for _ in range(2):  # a second one, so that what the first leaves behind shows
        run()
    print(json.dumps({"process": high_water(), "imported": imported}))


if __name__ == "__main__":
    _child(*sys.argv[1:])
