"""A small network, and plain PyTorch that trains it: what the tests of `innerloop.track` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import innerloop
from tests.oracles import smooth_noise
from tests.situations import SEED, STEPS, TwoLayers, regression

Step = Callable[[nn.Module, int], Tensor]


def network(shift: float = 0.0) -> TwoLayers:
    """The same network at every call; its parameters moved by ``shift`` along `direction`."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = TwoLayers()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(shift * direction(model)[name])
    return model


def direction(model: nn.Module) -> dict[str, Tensor]:
    """A fixed direction over all parameters, in which no entry is zero."""
    return {
        name: smooth_noise(*p.shape, phase=100.0 + i)
        for i, (name, p) in enumerate(model.named_parameters())
    }


def sgd(model: nn.Module, lr: float = 0.1, momentum: float = 0.9) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def adam(model: nn.Module, lr: float = 0.05) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=lr, eps=0.1)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Step = regression,
    steps: range = range(STEPS),
) -> nn.Module:
    """Plain PyTorch."""
    for t in steps:
        optimizer.zero_grad()
        loss(model, t).backward()
        optimizer.step()
    return model


def outer_value(model: nn.Module) -> float:
    with torch.no_grad():
        return regression(model, STEPS).item()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def leaf(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def adapted(model: TwoLayers, optimizer: Any, **arguments: Any) -> Tensor:
    """The outer loss behind the loop."""
    with innerloop.track(model, optimizer, **arguments) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
        return regression(loop.model, STEPS)


def looked_up(weight: Tensor, t: int) -> Tensor:
    """A loss through an embedding with sparse gradients; one of five rows is never looked up."""
    rows = torch.tensor([[0, 1], [1, 3], [2, 2]])[t % 3]
    found = torch.nn.functional.embedding(rows, weight, sparse=True)
    return (found + 0.1 * t).sin().sum() + 0.3 * found.square().sum()


def after_sparse_steps(make: Callable[[Any], torch.optim.Optimizer], start: Tensor) -> float:
    """The outer loss after three steps of a torch optimizer that is given sparse gradients."""
    weight = nn.Parameter(start.clone())
    optimizer = make([weight])
    for t in range(3):
        optimizer.zero_grad()
        looked_up(weight, t).backward()
        optimizer.step()
    return looked_up(weight, 1).item()
