"""Everyday losses compile and are right, with every kind of rule, by every route."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo import lookup_backend

import innerloop
from innerloop._utils import compiling
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
ONE_RULE = [(name, list(RULES)[i % len(RULES)]) for i, name in enumerate(LOSSES)]
ALL_RULES = [(name, rule) for name in LOSSES for rule in RULES]


def check(name: str, rule: str, route: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "inductor":
        monkeypatch.setattr(compiling, "BACKEND", lookup_backend(backend))
    torch.compiler.reset()
    expected = found_by(LOSSES[name](), rule, innerloop.StoreAll())
    strategy, whole = ROUTES[route]
    found = found_by(LOSSES[name](), rule, strategy, whole=whole)
    assert_equal(found, expected)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal to 3e-6 of the largest entry of each tensor; a gradient that cancels keeps the rounding
    of its terms, so the largest of all gradients counts a hundredth."""
    largest = max(float(x.abs().max()) for x in expected[1:])
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(float(theirs.abs().max()), 0.01 * largest)
        assert float((ours - theirs).abs().max()) <= 3e-6 * scale


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("name", "rule"), ONE_RULE)
def test_one_rule(name: str, rule: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, rule, route, "aot_eager", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("name", "rule"), ALL_RULES)
def test_every_rule_with_inductor(
    name: str, rule: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(name, rule, route, "inductor", monkeypatch)
