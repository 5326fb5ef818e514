"""Several models at once: each gets its own gradients, learners look ahead at each other, and one
model produces the start, the loss or the hyper-parameters of another.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop.rl import envs
from tests.oracles import smooth_noise


class Power(nn.Module):
    """One weight w; the loss is a power of it."""

    def __init__(self, weight: float, exponent: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.exponent = exponent

    def forward(self) -> Tensor:
        return self.weight**self.exponent


# -- each model its own gradients ------------------------------------------------------------------
# w² at 2 has the slope 4, w³ at 3 the slope 27. Ray's differentiable learner moves both modules by
# the gradient of one of them, {4, 4}.


def modules() -> dict[str, Power]:
    return {"square": Power(2.0, 2), "cube": Power(3.0, 3)}


SLOPES = {"square": 4.0, "cube": 27.0}
DERIVATIVES = {"square": 1 - 0.5 * 2, "cube": 1 - 0.5 * 6 * 3.0}
"""Of the new weight by the old one, at the rate 1/2: 1 - f''(w)/2."""


def assert_own(models: dict[str, Power], new: dict[str, Tensor]) -> None:
    for name, model in models.items():
        moved = (model.weight - new[name]) / 0.5
        assert moved.item() == SLOPES[name], name
        ends = [m.weight for m in models.values()]
        found = torch.autograd.grad(new[name], ends, retain_graph=True, materialize_grads=True)
        for other, slope in zip(models, found, strict=True):
            expected = DERIVATIVES[name] if other == name else 0.0
            assert slope.item() == expected, (name, other)


def test_models_in_one_loop_with_one_optimizer() -> None:
    models = modules()
    optimizer = torch.optim.SGD([m.weight for m in models.values()], lr=0.5)
    with innerloop.track(models, optimizer) as loop:
        loop.step(loop.model["square"]() + loop.model["cube"]())
        assert_own(models, {name: loop.model[name].weight for name in models})


def test_models_in_one_loop_with_an_optimizer_each() -> None:
    models = modules()
    optimizers = [torch.optim.SGD([m.weight], lr=0.5) for m in models.values()]
    with innerloop.track(models, optimizers) as loop:
        loop.step(loop.model["square"]() + loop.model["cube"]())
        assert_own(models, {name: loop.model[name].weight for name in models})


def test_models_in_loops_of_their_own() -> None:
    models = modules()
    square, cube = (
        innerloop.track(m, torch.optim.SGD([m.weight], lr=0.5)) for m in models.values()
    )
    with square, cube:
        square.step(square.model())
        cube.step(cube.model())
        assert_own(models, {"square": square.model.weight, "cube": cube.model.weight})


@pytest.mark.parametrize(
    "strategy", [innerloop.StoreAll(), innerloop.Checkpointed()], ids=["StoreAll", "Checkpointed"]
)
def test_models_in_one_problem(strategy: Any) -> None:
    models = nn.ModuleDict(modules())
    problem = innerloop.Problem.from_module(
        models,
        lambda model, hyper, batch: model["square"]() + model["cube"](),
        innerloop.optim.sgd(lr=0.5),
    )
    traj = innerloop.unroll(problem, None, None, steps=1, strategy=strategy)
    new = {name: traj.params[f"{name}.weight"] for name in SLOPES}
    assert_own(dict(models.items()), new)  # type: ignore[arg-type]


# -- learners that look ahead at each other --------------------------------------------------------

GAME = envs.MatrixGame()
RATE = 0.3


def rewards(first: Tensor, second: Tensor) -> list[Tensor]:
    """The exact discounted rewards of both players of the repeated game."""
    return [x.sum() / (1 - 0.9) for x in GAME.returns(first, second, gamma=0.9)]


class Player(nn.Module):
    """The logits of cooperating, after each outcome of the last round and in the first one."""

    def __init__(self, phase: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(smooth_noise(5, phase=phase) / 2)


def look_ahead(me: int, players: list[Player]) -> Tensor:
    """My gradient of my reward after the other's step on its own reward, by two tracked models."""
    other = players[1 - me]
    ours = players[me].logits
    with innerloop.track(other, torch.optim.SGD([other.logits], lr=RATE)) as loop:
        theirs = loop.model.logits
        pair = (ours, theirs) if me == 0 else (theirs, ours)
        loop.step(-rewards(*pair)[1 - me])
        pair = (ours, loop.model.logits) if me == 0 else (loop.model.logits, ours)
        return torch.autograd.grad(rewards(*pair)[me], ours)[0]


@pytest.mark.parametrize("me", [0, 1])
def test_looking_ahead_equals_the_formula_and_differences(me: int) -> None:
    """∇₁ V₁(θ₁, θ₂ + η ∇₂V₂(θ₁, θ₂)), which goes through the other one's gradient."""
    players = [Player(1.0), Player(2.0)]
    found = look_ahead(me, players)

    def value(ours: Tensor, create_graph: bool = False) -> Tensor:
        theirs = players[1 - me].logits.detach().requires_grad_()
        pair = (ours, theirs) if me == 0 else (theirs, ours)
        step = torch.autograd.grad(rewards(*pair)[1 - me], theirs, create_graph=create_graph)[0]
        moved = theirs + RATE * step
        pair = (ours, moved) if me == 0 else (moved, ours)
        return rewards(*pair)[me]

    ours = players[me].logits.detach().requires_grad_()
    by_hand = torch.autograd.grad(value(ours, create_graph=True), ours)[0]
    torch.testing.assert_close(found, by_hand, rtol=1e-10, atol=1e-12)
    size = 1e-5
    for i in range(5):
        ends = [value(ours + sign * size * torch.eye(5).double()[i]).item() for sign in (1, -1)]
        assert found[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * size), rel=1e-6), i
    # It differs from a gradient that takes the other one as it is.
    pair = [p.logits.detach() for p in players]
    pair[me] = ours
    naive = torch.autograd.grad(rewards(*pair)[me], ours)[0]
    assert (found - naive).norm() > 0.1 * naive.norm()


# -- one model produces what another one learns from -----------------------------------------------


class Producer(nn.Module):
    """M: from an embedding of the task to the start of m, the weights of its loss, and its rate."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2 + 1 + 2 + 1, dtype=torch.float64)
        with torch.no_grad():
            for i, p in enumerate(self.net.parameters()):
                p.copy_(smooth_noise(*p.shape, phase=3.0 + i))

    def forward(self, task: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        output = self.net(task)
        start = {"weight": output[None, :2], "bias": output[2:3]}
        return start, output[3:5].softmax(0), output[5].sigmoid()


def adapted_loss(producer: Producer, by: str) -> Tensor:
    model = nn.Linear(2, 1, dtype=torch.float64)
    x, y = smooth_noise(6, 2, phase=7.0), smooth_noise(6, 1, phase=8.0)
    start, weights, rate = producer(smooth_noise(3, phase=9.0))

    def loss(model: Any, hyper: Any, batch: Any) -> Tensor:
        error = model(batch[0]) - batch[1]
        parts = torch.stack([error.square().mean(), (1 + error.square()).log().mean()])
        return (hyper["weights"] * parts).sum()

    if by == "track":
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with innerloop.track(model, optimizer, params=start, hyper={"lr": rate}) as loop:
            for _ in range(3):
                loop.step(loss(loop.model, {"weights": weights}, (x, y)))
            return (loop.model(x) - y).square().mean()
    problem = innerloop.Problem.from_module(
        model, loss, innerloop.optim.sgd(), optimizer_hyper=("lr",)
    )
    call, _, _ = innerloop.functional(model)
    hyper = {"weights": weights, "lr": rate}
    traj = innerloop.unroll(problem, start, [(x, y)] * 3, hyper=hyper)
    return (call(traj.params, x) - y).square().mean()


@pytest.mark.parametrize("by", ["track", "unroll"])
def test_a_model_of_the_start_the_loss_and_the_rate(by: str) -> None:
    """The outputs of M get the gradients that differences say: of start, loss weights and rate."""
    producer = Producer()
    adapted_loss(producer, by).backward()
    bias, size = producer.net.bias, 1e-5
    assert bias.grad is not None
    for i in range(len(bias)):
        ends = []
        for sign in (size, -size):
            with torch.no_grad():
                bias[i] += sign
            ends.append(adapted_loss(producer, by).item())
            with torch.no_grad():
                bias[i] -= sign
        slope = (ends[0] - ends[1]) / (2 * size)
        assert abs(slope) > 1e-4, i
        assert bias.grad[i].item() == pytest.approx(slope, rel=1e-6), i
    assert producer.net.weight.grad is not None
    outer = bias.grad.outer(smooth_noise(3, phase=9.0))
    torch.testing.assert_close(producer.net.weight.grad, outer)
