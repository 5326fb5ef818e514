"""Compiled steps are right, or refused with the true reason: the traps of ``compiled_traps.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import innerloop
from innerloop.strategy import Strategy
from tests.backends import trace_only
from tests.compiled_traps import (
    COMPILES,
    FOREIGN,
    TRAPS,
    Trap,
    _Clipped,
    data,
    outer,
    predict,
    weights,
)

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

STORE = innerloop.StoreAll(compile=True)
REPLAY = innerloop.Checkpointed(slots="all", compile=True)


def check(trap: Trap, strategy: Strategy) -> None:
    if trap.says == COMPILES:
        expected = trap.run(innerloop.StoreAll())
        found = trap.run(strategy)
        same = {
            torch.float64: (1e-9, 1e-11),
            torch.float32: (1e-4, 1e-6),
            torch.bfloat16: (2e-2, 2e-3),
        }
        for ours, theirs in zip(leaves(found), leaves(expected), strict=True):
            rtol, atol = same.get(theirs.dtype, (0.0, 0.0))
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    else:
        with pytest.raises(innerloop.InnerLoopError, match=trap.says):
            trap.run(strategy)


def leaves(found: Any) -> list[torch.Tensor]:
    from innerloop._utils import tree

    return list(tree.tensors(found))


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_only(monkeypatch)


def each(traps: list[Trap]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("trap", traps, ids=lambda trap: trap.name)


@pytest.mark.traced
@pytest.mark.usefixtures("aot_eager")
@each([trap for trap in TRAPS if not trap.inductor])
def test_a_trap(trap: Trap) -> None:
    check(trap, STORE)


@pytest.mark.slow  # by default, they run with inductor alone
@pytest.mark.traced
@pytest.mark.usefixtures("aot_eager")
@each([trap for trap in TRAPS if trap.inductor])
def test_a_trap_that_inductor_compiles(trap: Trap) -> None:
    check(trap, STORE)


@pytest.mark.slow
@pytest.mark.traced
@pytest.mark.usefixtures("aot_eager")
@each(TRAPS)
def test_a_trap_replayed(trap: Trap) -> None:
    check(trap, REPLAY)


@pytest.mark.parametrize(
    ("trap", "strategy"),
    [
        pytest.param(
            trap,
            strategy,
            id=f"{trap.name}-{strategy!r}",
            marks=[] if trap.inductor and strategy is STORE else pytest.mark.slow,
        )
        for trap in TRAPS
        for strategy in (STORE, REPLAY)
    ],
)
def test_a_trap_with_inductor(trap: Trap, strategy: Strategy) -> None:
    check(trap, strategy)


def test_there_are_forty_traps() -> None:
    assert len(TRAPS) >= 40
    assert sum(trap.kind != "" for trap in TRAPS) >= 12
    assert sum(trap.inductor for trap in TRAPS) >= 10
    assert len({trap.name for trap in TRAPS}) == len(TRAPS)


@pytest.mark.traced
@pytest.mark.usefixtures("aot_eager")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("route", [STORE, REPLAY, None], ids=str)
def test_what_was_refused_once_is_refused_again(route: Strategy | None) -> None:
    scope = {"clip": False}

    def loss(p: Any, h: Any, x: torch.Tensor) -> torch.Tensor:
        y = predict(p, x)
        return (_Clipped.apply(y) if scope["clip"] else y).square().mean()

    problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))

    def run() -> Any:
        return innerloop.metagradient(
            outer, problem, weights(), data(), wrt="params", strategy=route, compile=route is None
        )

    expected = run()
    for _ in range(3):
        scope["clip"] = True
        with pytest.raises(innerloop.NotDifferentiableError, match=FOREIGN):
            run()
        scope["clip"] = False
        torch.testing.assert_close(run(), expected)
