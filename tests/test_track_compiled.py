"""``track(strategy=Checkpointed(compile=True))``: the gradients of plain `track`, from steps that are
compiled once, or a named error."""

# ruff: noqa: B023 (closures that bind late are what is tested here)

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.nn import functional as F

import innerloop
from innerloop import Checkpointed, InvalidInputError
from innerloop._track.compiled import _compiled
from innerloop._utils import compiling
from innerloop.strategy import Strategy
from tests.networks import adam, leaf, network, sgd
from tests.oracles import smooth_noise
from tests.situations import SEED, SITUATIONS, Situation, all_groups, named
from tests.test_track_replayed import assert_same

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

COMPILED = Checkpointed(slots=2, compile=True)
INDUCTOR = {"test_a_fresh_lambda_at_each_step_is_compiled_once"}
"""Tests that are run with inductor by `make compiled`."""


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace without generating code; `make compiled` generates it for some."""
    chosen = request.config.getoption("markexpr") == "compiled"
    if not chosen or request.node.originalname not in INDUCTOR:
        monkeypatch.setattr(compiling, "BACKEND", lookup_backend("aot_eager"))


def compilations() -> list[tuple[int, int]]:
    """How often each closure's step and pullback were compiled."""
    return [
        (c.core._advance.compiled.compilations, c.core._pull.compiled.compilations)
        for c in _compiled.values()
    ]


def batch(t: int) -> tuple[Tensor, Tensor]:
    return smooth_noise(6, 3, phase=float(t)), smooth_noise(6, 2, phase=9.0 + t)


def learned(strategy: Strategy | None, make: Callable[..., Any], steps: int = 5) -> dict[str, Any]:
    """Gradients by the start, a learned rate, a captured leaf and a captured non-leaf."""
    model, lr, w = network(), leaf(0.1), leaf(0.7)
    scale = w.sin() * 2
    with innerloop.track(model, make(model), hyper={"lr": lr}, strategy=strategy) as loop:
        for t in range(steps):
            x, y = batch(t)
            loop.step(
                lambda: (
                    F.mse_loss(loop.model(x)[:, :1], y[:, :1]) * scale
                    + w * loop.model.body.weight.square().sum()
                )
            )
        outer = loop.model(batch(9)[0]).sin().sum() + loop.trajectory.losses.sum()
    outer.backward()
    return {"outer": outer, "lr": lr.grad, "w": w.grad} | {
        n: p.grad for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("make", [sgd, adam])
def test_a_fresh_lambda_at_each_step_is_compiled_once(make: Callable[..., Any]):
    plain = learned(None, make)
    assert_same(learned(COMPILED, make), plain, 1e-10)
    once = compilations()
    # Another loop, with other modules and another optimizer, and more steps.
    assert_same(learned(Checkpointed(slots="all", compile=True), make), plain, 1e-10)
    assert_same(learned(COMPILED, make, 8), learned(None, make, 8), 1e-10)
    assert len(once) == 1
    assert compilations() == once


def episode(situation: Situation, strategy: Strategy | None, learn: Any) -> dict[str, Any]:
    """As in ``test_track_replayed.py``; every step sees the same batch, so that one path is
    compiled."""
    model = situation.model()
    optimizers = situation.optimizer(model)
    lrs = [torch.tensor(group["lr"], requires_grad=True) for group in all_groups(optimizers)]
    torch.manual_seed(SEED)
    with innerloop.track(
        model, optimizers, learn=learn, hyper={"lr": lrs}, strategy=strategy
    ) as loop:
        for _ in range(3):
            loop.step(lambda: situation.loss(loop.model, 1))
        outer = situation.outer_loss(loop.model) + loop.trajectory.losses.sum()
        found: dict[str, Any] = {"losses": loop.trajectory.losses.detach(), "outer": outer}
        found |= {f"buffer {n}": b for n, b in loop.buffers().items()}
    outer.backward()
    found |= {f"d {n}": p.grad for n, p in named(model).items()}
    return found | {f"d lr {i}": lr.grad for i, lr in enumerate(lrs)}


FEW = ("batch-norm", "dropout-then-evaluated", "frozen-layer-in-optimizer")
"""Situations that the test command runs."""
REFUSED = {
    "lstm": "RNN, GRU, or LSTM",
    "gru": "RNN, GRU, or LSTM",
    "attention": "cannot be compiled",
    "weight-norm-legacy": "cannot be compiled",
}


@pytest.mark.parametrize(
    "situation",
    [
        pytest.param(s, id=s.name, marks=[] if s.name in FEW else [pytest.mark.slow])
        for s in SITUATIONS
    ],
)
@pytest.mark.parametrize("learn", ["init", pytest.param("outer", marks=pytest.mark.slow)])
def test_every_situation_has_the_gradients_of_plain_track(situation: Situation, learn: Any):
    if situation.name in REFUSED:
        with pytest.raises(innerloop.InnerLoopError, match=REFUSED[situation.name]):
            episode(situation, COMPILED, learn)
        return
    assert_same(episode(situation, COMPILED, learn), episode(situation, None, learn), 1e-9)
