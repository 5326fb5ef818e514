"""Parameters of which two processes hold a part each: the gradients of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("sharded_program.py")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(PROGRAM), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=PROGRAM.parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for out, error in outputs:
        found = dict(line.split(": ", 1) for line in out.splitlines())
        numbers = {n: float(x) for n, x in found.items() if n.startswith(("metagradient", "track "))
                   and "fully" not in n}  # fmt: skip
        assert len(numbers) == 15, (out, error)
        assert max(numbers.values()) < 1e-10, numbers
        for name in ("track fully_shard", "functional fully_shard", "module of fully_shard"):
            assert "full_tensor()" in found[name], found
        assert "innerloop.unroll" in found["replayed"]
