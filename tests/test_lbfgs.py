"""LBFGS: the steps of ``torch.optim.LBFGS``, and derivatives equal to finite differences of it; closures under ``track``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from tests.oracles import Params, assert_derivative, assert_params, directional, directions, inner, smooth_noise

pytestmark = pytest.mark.usefixtures("float64")
STEPS = 3
SETTINGS: list[dict[str, Any]] = [
    {"lr": 0.3, "max_iter": 3},
    {"lr": 0.3, "max_iter": 4, "history_size": 2},
    {"lr": 0.5, "max_iter": 5, "max_eval": 4, "tolerance_grad": 1e-3, "tolerance_change": 1e-4},
    {"lr": 1.0, "max_iter": 3, "line_search_fn": "strong_wolfe"},
    {"lr": 0.7, "max_iter": 4, "history_size": 2, "line_search_fn": "strong_wolfe"},
]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def start() -> Params:
    return {"w": 0.6 * smooth_noise(3, 2), "b": 0.6 * smooth_noise(4, phase=1.0)}


def loss(params: Any, t: int) -> Tensor:
    flat = torch.cat([p.reshape(-1) for p in params.values()])
    curvatures = torch.linspace(0.5, 2.0, len(flat))
    return (curvatures * (flat - flat.mean().sin() / 2 - 0.05 * t) ** 2).sum() + (flat**4).sum() / 8


def outer(params: Any) -> Tensor:
    return torch.stack([((i + 1.0) * p).cos().sum() for i, p in enumerate(params.values())]).sum()


def torch_run(settings: dict[str, Any], params: Params, steps: int = STEPS) -> tuple[Params, Any, list[Tensor]]:
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.LBFGS(list(leaves.values()), **settings)
    for t in range(steps):
        torch_step(optimizer, leaves, t)
    return {name: p.detach() for name, p in leaves.items()}, optimizer, list(leaves.values())


def torch_step(optimizer: torch.optim.Optimizer, leaves: Params, t: int) -> None:
    def closure() -> Any:
        optimizer.zero_grad()
        value = loss(leaves, t)
        value.backward()
        return value

    optimizer.step(closure)


def ours(
    optimizer: innerloop.optim.Optimizer, params: Params, hyper: Any = None, strategy: Any = None, steps: int = STEPS
) -> Params:
    problem = innerloop.Problem(
        lambda params, hyper, t: loss(params, int(t)), optimizer, optimizer_hyper=lambda hyper, t: hyper
    )
    strategy = strategy or innerloop.StoreAll()
    return innerloop.unroll(problem, params, list(torch.arange(steps)), hyper=hyper, strategy=strategy).params


def tracked(params: Params) -> Params:
    return {name: p.detach().clone().requires_grad_() for name, p in params.items()}


@each_setting
def test_the_steps_are_those_of_torch(settings: dict[str, Any]):
    assert_params(ours(innerloop.optim.lbfgs(**settings), start(), steps=5), torch_run(settings, start(), 5)[0], 1e-12)


@each_setting
def test_meta_gradients_equal_finite_differences_of_torch(settings: dict[str, Any]):
    given, lr = tracked(start()), torch.tensor(settings["lr"], requires_grad=True)
    final = ours(innerloop.optim.lbfgs(**settings), given, {"lr": lr})
    found = torch.autograd.grad(outer(final), [*given.values(), lr], allow_unused=True, materialize_grads=True)
    mine = (dict(zip(given, found, strict=False)), {"lr": found[-1]})
    for along in directions(start(), 2):
        way = (along, {"lr": 0.1})
        truth = directional(
            lambda at: float(outer(torch_run({**settings, "lr": float(at[1]["lr"])}, at[0])[0])),
            (start(), {"lr": settings["lr"]}),
            way,
            largest=1e-4,
        )
        assert abs(truth) > 1e-3
        assert_derivative(inner(mine, way), truth, f"d outer / d (init, lr), {settings}")


@each_setting
def test_a_warm_torch_optimizer_is_continued_and_written_back(settings: dict[str, Any]):
    truth = torch_run(settings, start(), 6)[0]
    _, optimizer, tensors = torch_run(settings, start(), 2)
    leaves = dict(zip(start(), tensors, strict=True))
    rule = innerloop.optim.from_torch(optimizer, leaves)
    params = {name: p.detach().clone() for name, p in leaves.items()}
    state = rule.init(params)
    for t in (2, 3):

        def value_and_grad(at: Any, t: int = t) -> tuple[Tensor, Params]:
            at = tracked(at)
            value = loss(at, t)
            return value.detach(), dict(zip(at, torch.autograd.grad(value, list(at.values())), strict=True))

        more: Any = {"value_and_grad": value_and_grad}
        params, state = rule.update(value_and_grad(params)[1], state, params, None, **more)
    rule.write_back(state)
    with torch.no_grad():
        for name, p in leaves.items():
            p.copy_(params[name])
    for t in (4, 5):
        torch_step(optimizer, leaves, t)
    assert_params({name: p.detach() for name, p in leaves.items()}, truth, 1e-12)


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3]], ids=str)
@pytest.mark.parametrize("slots", [1, 2, "all"])
def test_an_exact_strategy_gives_the_gradients_of_store_all(settings: dict[str, Any], slots: Any):
    found = []
    for strategy in (innerloop.StoreAll(), innerloop.Checkpointed(slots=slots)):
        given, lr = tracked(start()), torch.tensor(settings["lr"], requires_grad=True)
        final = ours(innerloop.optim.lbfgs(**settings), given, {"lr": lr}, strategy)
        gradients = torch.autograd.grad(outer(final), [*given.values(), lr], allow_unused=True, materialize_grads=True)
        found.append({str(i): g for i, g in enumerate(gradients)})
    assert_params(found[1], found[0], 1e-10)


def test_strategies_that_take_a_step_apart_say_so():
    for strategy in (innerloop.FirstOrder(), innerloop.Checkpointed(save="gradients")):
        with pytest.raises(innerloop.InnerLoopError, match="evaluates the loss within its update"):
            ours(innerloop.optim.lbfgs(), tracked(start()), strategy=strategy)
    problem = innerloop.Problem(lambda params, hyper, t: loss(params, 0), innerloop.optim.lbfgs())
    with pytest.raises(innerloop.InnerLoopError, match="cannot be compiled"):
        innerloop.metagradient(lambda traj, hyper: outer(traj.params), problem, start(), None, steps=1, compile=True)


def test_gradients_that_are_zero_stay_finite():
    for settings in SETTINGS:
        given = {"at the minimum": torch.zeros(3, requires_grad=True)}
        problem = innerloop.Problem(
            lambda params, hyper, t: (params["at the minimum"] ** 2).sum(), innerloop.optim.lbfgs(**settings)
        )
        final = innerloop.unroll(problem, given, None, steps=2).params["at the minimum"]
        assert torch.autograd.grad((final + 1).square().sum(), given["at the minimum"])[0].isfinite().all()


# -- closures under track -----------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = (nn.Parameter(p) for p in start().values())

    def forward(self, t: int) -> Tensor:
        return loss({"w": self.w, "b": self.b}, t)


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3]], ids=str)
def test_track_takes_a_closure(settings: dict[str, Any]):
    model = Model()
    optimizer = torch.optim.LBFGS(model.parameters(), **settings)
    with innerloop.track(model, optimizer) as loop:
        for t in range(STEPS):
            loop.step(functools.partial(loop.model, t))
        value = outer(loop.parameters())
    assert_params(loop.parameters(), torch_run(settings, start())[0], 1e-12)
    value.backward()
    given = tracked(start())
    truth = torch.autograd.grad(outer(ours(innerloop.optim.lbfgs(**settings), given)), list(given.values()))
    for p, g in zip((model.w, model.b), truth, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)
    assert_params({"w": model.w, "b": model.b}, start(), 0)


def test_a_rule_that_needs_no_closure_takes_one():
    found = []
    for as_closure in (False, True):
        model = Model()
        with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
            for t in range(STEPS):
                given: Any = functools.partial(loop.model, t) if as_closure else loop.model(t)
                loop.step(given)
            outer(loop.parameters()).backward()
        found.append([model.w.grad, model.b.grad])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def refusals() -> list[Any]:
    def calls_backward(loop: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            value = loop.model(0)
            value.backward()
            return value

        return closure

    return [
        pytest.param(lambda loop: loop.model(0), r"evaluates the loss itself.*loop\.step\(lambda", id="a loss"),
        pytest.param(calls_backward, r"calls backward\(\).*only return the loss", id="backward"),
        pytest.param(lambda loop: lambda: None, "loss", id="nothing returned"),
        pytest.param(lambda loop: lambda: torch.ones(()), "does not depend", id="a constant"),
    ]


@pytest.mark.parametrize(("make", "said"), refusals())
def test_what_a_closure_must_not_do(make: Callable[[Any], Any], said: str):
    model = Model()
    with innerloop.track(model, torch.optim.LBFGS(model.parameters())) as loop:
        with pytest.raises(innerloop.InnerLoopError, match=said):
            loop.step(make(loop))
        loop.step(lambda: loop.model(0))  # nothing was left behind
    assert_params({"w": model.w, "b": model.b}, start(), 0)
