"""The fuzzer: a short run, that it repeats itself, and that it finds faults planted by hand.

It runs in a process of its own: the run-time type checker of the tests makes it ten times slower.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import case, faults, losses, models, rules, verdict

SEED = 20


def fuzz(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def counts(output: str) -> dict[str, int]:
    """Read the last line that counts the verdicts."""
    line = [line for line in output.splitlines() if " cases: " in line][-1]
    return {kind: int(n) for n, kind in re.findall(r"(\d+) (\w+)", line)}


def test_a_short_run_finds_nothing() -> None:
    code, output = fuzz("--seed", str(SEED), "--cases", "120")
    assert code == 0, output
    assert counts(output)["right"] >= 0.6 * 120


@pytest.mark.slow
def test_a_longer_run_finds_nothing_and_decides_most() -> None:
    code, output = fuzz("--seed", str(SEED + 1), "--cases", "1000")
    assert code == 0, output
    assert counts(output)["undecided"] <= 0.05 * 1000
    never = output.partition("never right: ")[2].splitlines()[0]
    hooked = {name for name, loss in losses.LOSSES.items() if loss.hooks}
    assert set(re.findall(r"'([^']+)'", never)) <= hooked


def test_a_seed_repeats_a_case() -> None:
    assert [case.draw(3, k) for k in range(20)] == [case.draw(3, k) for k in range(20)]
    assert case.draw(3, 0) != case.draw(4, 0)
    first, second = verdict.judge(3, 5), verdict.judge(3, 5)
    assert (first.kind, first.reason) == (second.kind, second.reason)


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_planted_fault_is_found_within_200_cases(fault: str) -> None:
    code, output = fuzz("--seed", str(SEED), "--cases", "200", "--fault", fault)
    assert code == 1, output
    assert f"{fault} is found by case" in output


def test_the_lists_are_as_long_as_promised() -> None:
    assert len(models.FAMILIES) >= 12
    assert len(losses.LOSSES) >= 16
    assert sum(loss.hooks for loss in losses.LOSSES.values()) >= 2
    assert len(rules.RULES) >= 16
