"""Everyday losses compile and are right, with every kind of rule, by every route."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import innerloop
from tests.backends import trace_only
from tests.compiled_everyday import LOSSES, RULES, found_by

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
]

ROUTES = {
    "StoreAll": (innerloop.StoreAll(compile=True), False),
    "Checkpointed": (innerloop.Checkpointed(slots="all", compile=True), False),
    "whole": (innerloop.StoreAll(), True),
}
# The rule for each loss begins with the second one: GPT-2 with SGD, and tied embeddings with Adam,
# lie at the edge of what float32 resolves on some processors (`make compiled` runs them).
ONE_RULE = [(name, list(RULES)[(i + 1) % len(RULES)]) for i, name in enumerate(LOSSES)]


def check(name: str, rule: str, route: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "inductor":
        trace_only(monkeypatch)
    torch.compiler.reset()
    expected = found_by(LOSSES[name](), rule, innerloop.StoreAll())
    strategy, whole = ROUTES[route]
    found = found_by(LOSSES[name](), rule, strategy, whole=whole)
    precise = found_by(LOSSES[name](), rule, innerloop.StoreAll(), dtype=torch.float64)
    # Where rounding alone moves the eager result by more than a third of 3e-6, three times that.
    assert error(found, expected) <= max(3e-6, 3 * error(expected, precise))


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of all tensors; a gradient that cancels keeps the rounding of its
    terms, so a hundredth of the largest of all gradients counts."""
    largest = max(float(x.abs().max()) for x in expected[1:])
    return max(
        float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), 0.01 * largest)
        for ours, theirs in zip(found, expected, strict=True)
    )


@pytest.mark.slow
@pytest.mark.traced
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("name", "rule"), ONE_RULE)
def test_one_rule_traced(name: str, rule: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, rule, route, "aot_eager", monkeypatch)


@pytest.mark.parametrize(
    ("name", "rule", "route"),
    [
        pytest.param(
            name,
            rule,
            route,
            # The test command runs one rule for each loss.
            marks=[] if (name, rule) in ONE_RULE and route == "StoreAll" else pytest.mark.slow,
        )
        for name in LOSSES
        for rule in RULES
        for route in ROUTES
    ],
)
def test_every_rule_with_inductor(
    name: str, rule: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(name, rule, route, "inductor", monkeypatch)
