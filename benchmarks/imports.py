"""What `import innerloop` adds to `import torch`, in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

_PROGRAM = """
import json, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import innerloop
print(json.dumps([middle - start, time.perf_counter() - middle]))
"""


class ImportTimes(NamedTuple):
    """Seconds, one entry per process."""

    torch: list[float]
    innerloop: list[float]


def measure(repeats: int = 7) -> ImportTimes:
    """One more process runs first: it writes the byte code and fills the disk cache."""
    pairs = [_one() for _ in range(repeats + 1)][1:]
    return ImportTimes([torch for torch, _ in pairs], [innerloop for _, innerloop in pairs])


def _one() -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(f"innerloop was not imported: {reason[0]}")
    torch, innerloop = json.loads(done.stdout.splitlines()[-1])
    return torch, innerloop
