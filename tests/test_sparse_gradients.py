"""Every rule under every front end where an embedding sends sparse gradients (``sparse=True``).

The truth is finite differences of a plain torch run with the same embedding in its dense form (of
``SparseAdam``, in its sparse form). What
cannot be right is a named error. A rule that is added to the fuzzer's list is tried here as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from tests.fuzz.rules import RULES, draw
from tests.oracles import assert_derivative, derivative, smooth_noise

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # of torch.optim itself
]
ROWS = torch.tensor([[0, 1], [1, 3], [2, 2]])
STEPS = 3


class LookUp(nn.Module):
    """A table of five rows, looked up in one of several ways; one row never is."""

    def __init__(self, how: str, sparse: bool, start: Tensor) -> None:
        super().__init__()
        self.how, self.dense = how, not sparse
        if how == "module":
            self.table: nn.Module = nn.Embedding(5, 3, sparse=sparse)
        elif how == "bag":
            self.table = nn.EmbeddingBag(5, 3, mode="mean", sparse=sparse)
        else:
            self.table = nn.ParameterDict({"weight": nn.Parameter(torch.empty(5, 3))})
        self.table.weight.data.copy_(start)  # type: ignore[operator]

    def forward(self, t: int) -> Tensor:
        if self.how == "function":
            found = nn.functional.embedding(ROWS[t], self.table.weight, sparse=not self.dense)  # type: ignore[arg-type]
        else:
            found = self.table(ROWS[t : t + 1] if self.how == "bag" else ROWS[t])
        return (found + 0.1 * t).sin().sum() + 0.3 * found.square().sum()


def inner_loss(model: Any, t: int, kind: str) -> Tensor:
    """A sum with a penalty has a dense gradient, though a part of it is sparse."""
    weight: Tensor = model.table.weight
    if kind == "sparse":
        return model(t)
    penalty = (weight + 0.3).sin().mul(smooth_noise(5, 3, phase=0.3)).sum()
    if kind == "dense first":  # in the backward pass
        return model(t) + (weight + 0.3).sin().mul(smooth_noise(5, 3, phase=0.3)).sum()
    return penalty + model(t) if kind == "sum" else penalty


def by_track(model: nn.Module, rule: Any, kind: str) -> Tensor:
    with innerloop.track(model, rule) as loop:
        for t in range(STEPS):
            loop.step(lambda t=t: inner_loss(loop.model, t, kind))
        return loop.model(1)


def by_bridge(model: nn.Module, rule: Any, kind: str) -> Tensor:
    with innerloop.higher.innerloop_ctx(model, rule, copy_initial_weights=False) as (
        fmodel,
        diffopt,
    ):
        for t in range(STEPS):
            diffopt.step(lambda t=t: inner_loss(fmodel, t, kind))  # type: ignore[misc]
        return fmodel(1)


def by_unroll(model: nn.Module, rule: Any, kind: str, strategy: Any) -> Tensor:
    problem = innerloop.Problem.from_module(
        model, lambda model, hyper, t: inner_loss(model, int(t), kind), rule
    )
    traj = innerloop.unroll(problem, None, list(range(STEPS)), strategy=strategy)
    return innerloop.functional(model)[0](traj.params, 1)


FRONTS: dict[str, Callable[[nn.Module, Any, str], Tensor]] = {
    "track": by_track,
    "bridge": by_bridge,
    **{
        repr(strategy): partial(by_unroll, strategy=strategy)
        for strategy in (
            innerloop.StoreAll(),
            innerloop.Checkpointed(product="reverse"),
            innerloop.Checkpointed(product="mixed"),
            innerloop.Checkpointed(product="finite"),
        )
    },
}
START = 0.5 * smooth_noise(5, 3)
ALONG = smooth_noise(5, 3, phase=1.0)


def truth(name: str, settings: dict[str, Any], how: str, kind: str) -> float:
    def value(h: float) -> float:
        sparse = name == "sparse adam"
        model = LookUp(how, sparse, START + h * ALONG)
        optimizer = RULES[name].torch(model.parameters(), **settings)
        for t in range(STEPS):

            def closure(t: int = t) -> Any:
                optimizer.zero_grad()
                loss = inner_loss(model, t, kind)
                loss.backward()
                return loss

            if name == "lbfgs":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        return model(1).item()

    return derivative(value)


@pytest.mark.covering
@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("module", "sparse"),
        ("module", "sum"),
        ("module", "dense"),
        ("bag", "sum"),
        ("function", "sparse"),
        ("function", "dense first"),
        ("function", "sum"),
    ],
)
@pytest.mark.parametrize("name", RULES)
def test_a_sparse_gradient_is_right_or_refused_by_name(name: str, how: str, kind: str) -> None:
    settings = draw(random.Random(5), name)
    expected = None
    for front, answer in FRONTS.items():
        model = LookUp(how, True, START)
        by_torch = front == "bridge" or (front.startswith("track") and RULES[name].by_torch)
        rule: Any = (
            RULES[name].torch(model.parameters(), **settings)
            if by_torch
            else RULES[name].ours(**settings)
        )
        if message := refusal(name, how, kind, front):
            with pytest.raises(innerloop.InnerLoopError, match=message):
                torch.autograd.grad(answer(model, rule, kind), [*model.parameters()])
            continue
        (found,) = torch.autograd.grad(answer(model, rule, kind), [*model.parameters()])
        if expected is None:
            expected = truth(name, settings, how, kind)
        assert_derivative(float((found.to_dense() * ALONG).sum()), expected, front)


def refusal(name: str, how: str, kind: str, front: str) -> str:
    """What the error says where there has to be one, "" elsewhere."""
    if name == "sparse adam" and kind != "sparse":
        return "given a dense gradient|in neither order"
    if "mixed" in front or "finite" in front:
        if name == "lbfgs":
            return "evaluates the loss within its update"
        if name == "adapted":
            return "inside torch.func"
    if "mixed" in front and (how == "function" or name == "sparse adam"):
        return "mixed.* needs forward-mode|in neither order"
    return "in neither order" if (how, kind) == ("function", "sum") else ""
