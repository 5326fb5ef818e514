"""What the tests of the bridge share: the peer itself, small models, and plain PyTorch that trains
them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SEEDS = (0, 1, 2, 4)


def peer() -> Any:
    """The library ``higher`` itself, whose source makes recent Pythons warn when it is compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "higher", reason="higher is not installed: `make setup` brings it"
        )


class Tied(nn.Module):
    """One layer under two names, inside wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 2))
        self.second = nn.Sequential(self.first[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x).tanh()


class HalfUsed(nn.Module):
    """A parameter that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Parameter(torch.randn(4, 3))
        self.unused = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.used).tanh()


def plain() -> Any:
    return nn.Sequential(
        nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 2)
    )


def tied_in_sequence() -> Any:
    projection = nn.Linear(4, 3)
    return nn.Sequential(
        projection, nn.Tanh(), nn.Linear(3, 4), nn.Sigmoid(), projection, nn.Tanh(), nn.Linear(3, 2)
    )


def with_batch_norm() -> Any:
    return nn.Sequential(
        nn.Linear(4, 3), nn.Tanh(), nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4)
    )


MODELS: dict[str, Callable[[], Any]] = {
    "plain": plain,
    "tied": Tied,
    "tied-in-sequence": tied_in_sequence,
    "half-used": HalfUsed,
    "batch-norm": with_batch_norm,
}


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    torch.manual_seed(seed)
    return build()


def batches(seed: int, count: int, *shape: int) -> list[Tensor]:
    """Inputs that leave the random state alone."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def loss_of(output: Any) -> Tensor:
    """A smooth loss of whatever a model returns."""
    if isinstance(output, tuple):
        output = output[0]
    return (output - 0.3).square().mean() + output.sin().mean()


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def call_at(model: nn.Module, params: Iterable[Tensor], *args: Any) -> Any:
    """The output of a copy of the model in which other tensors stand in the places of the
    parameters.

    Not ``torch.func.functional_call``, which (torch 2.13) leaves its tensors behind in a module
    that is registered twice.
    """
    copied = copy.deepcopy(model)
    given = {id(p): tensor for p, tensor in zip(copied.parameters(), params, strict=True)}
    for module in copied.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, given[id(p)])
    return copied(*args)


def unrolled_by_hand(
    model: nn.Module, inputs: Sequence[Tensor], lr: float
) -> tuple[list[Tensor], Tensor]:
    """``(start, outer loss)`` of gradient descent on all inputs but the last, written out."""
    start = [p.detach().clone().requires_grad_() for p in model.parameters()]
    params = start
    for x in inputs[:-1]:
        grads = torch.autograd.grad(
            loss_of(call_at(model, params, x)), params, create_graph=True, allow_unused=True
        )
        params = [p if g is None else p - lr * g for p, g in zip(params, grads, strict=True)]
    return start, loss_of(call_at(model, params, inputs[-1]))


def zeros_for_none(grads: Iterable[Tensor | None], like: Iterable[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, like, strict=True)]


def assert_close(found: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
