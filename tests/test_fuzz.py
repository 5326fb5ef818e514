"""The fuzzer: a short run, that it repeats itself, and that it finds faults planted by hand.

It runs in a process of its own: the run-time type checker of the tests makes it ten times slower.
"""

from __future__ import annotations

import contextlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import innerloop
from innerloop.optim import _rules
from tests.fuzz import answers, case, extras, faults, losses, models, rules, verdict

SEED = 20
IMPLEMENTATION = ("foreach", "capturable", "differentiable", "fused")
"""Flags of torch that choose how a rule is computed, not what."""


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
    code, output = fuzz("--seed", str(SEED), "--cases", "80")
    assert code == 0, output
    assert counts(output)["right"] >= 0.6 * 80


@pytest.mark.slow
def test_a_longer_run_finds_nothing_and_decides_most() -> None:
    code, output = fuzz("--seed", str(SEED + 1), "--cases", "1000")
    assert code == 0, output
    assert counts(output)["undecided"] <= 0.05 * 1000
    assert "never right: []" in output


def test_a_seed_repeats_a_case() -> None:
    assert [case.draw(3, k) for k in range(20)] == [case.draw(3, k) for k in range(20)]
    assert case.draw(3, 0) != case.draw(4, 0)
    first, second = verdict.judge(3, 5), verdict.judge(3, 5)
    assert (first.kind, first.reason) == (second.kind, second.reason)


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=() if f == "dropped term" else pytest.mark.slow) for f in faults.FAULTS],
)
def test_a_planted_fault_is_found_within_200_cases(fault: str) -> None:
    more = ["--newest"] if fault in faults.NEWEST else []
    code, output = fuzz("--seed", str(SEED), "--cases", "200", "--fault", fault, *more)
    assert code == 1, output
    assert f"{fault} is found by case" in output


def test_the_lists_are_as_long_as_promised() -> None:
    assert len(models.FAMILIES) >= 12
    assert len(losses.LOSSES) >= 16
    assert sum(loss.hooks for loss in losses.LOSSES.values()) >= 2
    assert {"ignored labels", "masked rows"} <= losses.LOSSES.keys()  # these have padding
    source = inspect.getsource(losses)
    assert not re.search(r"detach|no_grad|\.data\b", source)  # none stops a gradient


def test_every_rule_is_drawn_with_all_its_flags() -> None:
    of_library = {module.name for module in pkgutil.iter_modules(_rules.__path__)}
    assert of_library <= {name.replace(" ", "_") for name in rules.RULES}
    for name, rule in rules.RULES.items():
        flags = {
            key
            for key, parameter in inspect.signature(rule.torch).parameters.items()
            if isinstance(parameter.default, bool) and key not in IMPLEMENTATION
        }
        for flag in flags:
            assert set(rule.choices[flag]) == {False, True}, (name, flag)


def test_every_strategy_and_front_end_is_drawn() -> None:
    exported = [getattr(innerloop.strategy, name) for name in innerloop.strategy.__all__]
    concrete = {
        cls
        for cls in exported
        if isinstance(cls, type)
        and issubclass(cls, innerloop.strategy.Strategy)
        and not inspect.isabstract(cls)
    }
    # Implicit differentiates the limit of training, Evolution samples, and three look at one step
    # alone: the differences of a training of a few steps are not their truth.
    others = {innerloop.Implicit, innerloop.Evolution}
    others |= {innerloop.strategy.DARTS, innerloop.strategy.SAMA, innerloop.strategy.T1T2}
    assert concrete - others <= {type(s) for s in case.STRATEGIES}
    assert set(case.FRONT_ENDS) == set(answers.ASK)


def test_every_strategy_of_track_is_drawn() -> None:
    taken = set()
    for strategy in (*case.STRATEGIES, *extras.STRATEGIES):
        with contextlib.suppress(innerloop.InnerLoopError):
            model = torch.nn.Linear(1, 1)
            innerloop.track(model, innerloop.optim.sgd(lr=0.1), "outer", strategy=strategy)
            taken.add(type(strategy))
    assert taken == {type(s) for s in extras.STRATEGIES}


def test_every_setting_of_a_layer_with_fast_weights_is_drawn() -> None:
    made: list[Any] = [models.make("fast weights", seed) for seed in range(60)]
    layers = [model.fast for model in made]
    assert {layer.read for layer in layers} == {"before", "after"}
    assert {layer.chunk for layer in layers} == {1, 2, 3}
    assert len({type(layer.strategy) for layer in layers}) == 2
    for setting in ("hyper", "output"):
        assert len({getattr(layer, setting) is None for layer in layers}) == 2
    assert len({isinstance(layer.loss, torch.nn.Module) for layer in layers}) == 2
    assert len({repr(layer.optimizer) for layer in layers}) == 4


def test_extras_leave_the_other_cases_as_they_were() -> None:
    """What a seed drew before they were enrolled is still drawn, but for one case in five."""
    plain = [case._drawn(7, number) for number in range(200)]
    drawn = [case.draw(7, number) for number in range(200)]
    same = sum(a == b for a, b in zip(plain, drawn, strict=True))
    assert same == sum(not c.extras for c in drawn)
    assert 140 <= same <= 180
    assert all(case.draw(7, number, newest=True).extras for number in range(200))
