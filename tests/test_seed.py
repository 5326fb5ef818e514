"""The notebook that the project started from runs on the bridge, and prints what it printed with
higher."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "seed_notebook.py"

BODY = "ec35723132538f1adacdcae45db32dbe13e0d86a47d51f9505eb1a1b50425884"
"""SHA-256 of the seed's own cells after the imports, blank lines left out: nobody has adapted them
to the bridge."""

PRINTED = """\
Inner optimization
Loss:\t\t0.720
d Loss / d y_: -1.200
Current params: \ta_[0]:2.000 \t b_[0]:3.000
d Loss / d params(t=0): a_[0]:-0.480 \t b_[0]-0.720
Updated params: \ta_[1]:2.480 \t b_[1]:3.720
d a_[1] / d param(t=0): a_[0]:1.080 \t b_[0]:-0.240

Outer optimization using test loss
TL:\t\t0.126
d TL / d a_[0] = [\td TL / d a_[1] * d a_[1] / d a_[0] +
\t\t\td TL / d b_[1] * d b_[1] / d a_[0] ]
-0.179 = -0.249 * 1.080  +  -0.373 * -0.240
Final parameters:
Parameter containing:
tensor([[2.1790]], requires_grad=True) Parameter containing:
tensor([[3.2684]], requires_grad=True)
d Loss / d params(t=0): a_[0]:-0.480 \t b_[0]-0.720
Final parameters:
Parameter containing:
tensor([[2.1790]], requires_grad=True) Parameter containing:
tensor([[3.2684]], requires_grad=True)
"""
"""Written down from a run of the seed's cells with higher 0.2.1."""

FINAL = (2.1789599744, 3.2684399616)
"""Where M ends, exactly; the seed computes in float32."""


def run(script: Path) -> tuple[str, list[float]]:
    """What a fresh process prints (the script registers its optimizer globally), and where M
    ends."""
    code = (
        "import runpy, sys; M = runpy.run_path(sys.argv[1])['M']; "
        "print('M', *(p.item() for p in M.parameters()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed, _, final = done.stdout.rpartition("M ")
    return printed, [float(number) for number in final.split()]


def test_the_seed_runs_on_the_bridge() -> None:
    printed, final = run(SCRIPT)
    assert printed == PRINTED
    assert final == pytest.approx(FINAL, abs=1e-6)
    assert [round(value, 5) for value in final] == [2.17896, 3.26844]


def test_the_seed_prints_the_same_with_higher(tmp_path: Path) -> None:
    pytest.importorskip("higher")
    lines = [
        line.replace("innerloop.higher as higher", "higher").replace(
            "from innerloop.higher", "from higher"
        )
        for line in SCRIPT.read_text().splitlines()
    ]
    assert not [line for line in lines if line.startswith(("import innerloop", "from innerloop"))]
    (tmp_path / "seed.py").write_text("\n".join(lines))
    printed, final = run(tmp_path / "seed.py")
    assert printed == PRINTED
    assert final == pytest.approx(FINAL, abs=1e-6)


def test_the_cells_are_the_seeds_own() -> None:
    lines = SCRIPT.read_text().splitlines()
    body = [
        line.rstrip() for line in lines[lines.index("class Model(nn.Module):") :] if line.strip()
    ]
    assert hashlib.sha256("\n".join(body).encode()).hexdigest() == BODY
