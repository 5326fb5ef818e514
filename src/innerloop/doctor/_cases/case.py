"""What an audited case is, and the inputs and builders that cases share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import rnn

Call = Callable[..., Any]
F: Any = functional  # the stubs of torch lag behind its arguments


def noise(*shape: int, phase: float = 0.0, scale: float = 1.0) -> Tensor:
    """Fixed numbers in (-scale, scale) that look random, none of them zero, and leave the random state alone."""
    count = math.prod(shape)
    angles = torch.arange(1.0, count + 1.0, dtype=torch.float64) * 12.9898 + phase * 78.233
    return scale * angles.sin().reshape(shape)


def spread(*shape: int) -> Tensor:
    """Numbers in (-1, 1) in an order that looks random, evenly apart: no small step changes which is the largest."""
    order = noise(*shape).flatten().argsort().argsort().to(torch.float64)
    return ((order + 0.5) * (2 / order.numel()) - 1).reshape(shape)


def positive(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers in (.3, 1.7)."""
    return 1 + noise(*shape, phase=phase, scale=0.7)


def probabilities(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers in (.1, .9)."""
    return 0.5 + noise(*shape, phase=phase, scale=0.4)


def matrix(n: int, phase: float = 0.0) -> Tensor:
    """A well-conditioned matrix with distinct singular values and eigenvalues."""
    return torch.diag(torch.arange(1.0, n + 1.0, dtype=torch.float64)) + noise(
        n, n, phase=phase, scale=0.3
    )


class Applied(nn.Module):
    """A function of parameters."""

    def __init__(self, operation: Call, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.operation = operation
        self.inputs = nn.ParameterList([nn.Parameter(x.clone()) for x in inputs])

    def forward(self) -> Any:
        """What the operation gives."""
        return self.operation(*self.inputs)


class OnInput(nn.Module):
    """A module at an input that is a parameter too."""

    def __init__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], call: Call | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self.inputs = nn.ParameterList([nn.Parameter(x.clone()) for x in inputs])
        self.call = call

    def forward(self) -> Any:
        """What the module gives."""
        return (
            self.module(*self.inputs) if self.call is None else self.call(self.module, *self.inputs)
        )


@dataclass(frozen=True)
class Case:
    """One operation at one input.

    Attributes:
        name: as a user writes it.
        family: the heading under which it is reported.
        build: makes the module; its ``forward`` takes nothing and returns a tensor, or several.
        smooth: False at a kink or an exact zero, where only finiteness is asked for.
        constants: True if a part of the forward is a constant of the derivative for PyTorch
            (running statistics, singular vectors of the power iteration), so that finite
            differences of forward and gradient are not their derivatives.
        first: False if the gradient is by design not the derivative of the forward.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    smooth: bool = True
    constants: bool = False
    first: bool = True

    def module(self) -> nn.Module:
        """The same module at every call, in float64."""
        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(5)
            torch.set_default_dtype(torch.float64)
            try:
                return self.build().to(torch.float64)
            finally:
                torch.set_default_dtype(before)


def value(output: Any) -> Tensor:
    """A smooth scalar of what an operation gives, whose own derivatives depend on it, and which couples all entries."""
    parts = list(_tensors(output))
    total = torch.zeros((), dtype=torch.float64, device=parts[0].device)
    for i, part in enumerate(parts):
        real = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
        weights, count = (1.2 + noise(*real.shape, phase=3.0 + i)).to(real), max(1, real.numel())
        waves = (real + 0.3).sin()
        total = (
            total
            + (weights * waves).sum() / count
            + (weights.flip(0) * waves if real.dim() else waves).mean().square()
        )
    return total


def linear(output: Any) -> Tensor:
    """A linear scalar of what an operation gives: the gradient that comes in is a constant."""
    parts = list(_tensors(output))
    if len(parts) == 1 and parts[0].dim() == 0 and not parts[0].is_complex():
        return parts[0]
    total = torch.zeros((), dtype=torch.float64, device=parts[0].device)
    for i, part in enumerate(parts):
        real = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
        total = total + ((1.2 + noise(*real.shape, phase=3.0 + i)).to(real) * real).sum()
    return total


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() or output.is_complex():
            yield output
    elif isinstance(output, rnn.PackedSequence):
        yield output.data
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


def function(name: str, family: str, operation: Call, *inputs: Tensor, **flags: bool) -> Case:
    """The case of a function of tensors."""
    return Case(name, family, lambda: Applied(operation, inputs), **flags)


def layer(
    name: str,
    family: str,
    make: Callable[..., nn.Module],
    *inputs: Tensor,
    call: Call | None = None,
    evaluation: bool = False,
    **flags: bool,
) -> Case:
    """The case of a module."""
    return Case(name, family, lambda: OnInput(make(), inputs, call).train(not evaluation), **flags)


X = noise(3, 4, scale=1.5)


def _seeded(operation: Call) -> Call:
    """The operation with the same random numbers at every call."""

    def call(*inputs: Tensor) -> Any:
        torch.manual_seed(3)
        return operation(*inputs)

    return call


A, B = noise(4, 3, scale=1.5), noise(4, 3, phase=1.0)
CLASSES = torch.tensor([0, 2, 1, 2])
SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)


def _moved(module: nn.Module) -> nn.Module:
    """With weights and statistics that are not those of initialisation, where errors hide behind ones and zeros."""
    with torch.no_grad():
        for i, x in enumerate([*module.parameters(), *module.buffers()]):
            if x.is_floating_point():
                x.add_(noise(*x.shape, phase=20.0 + i, scale=0.3))
    return module


def _of_dimension(d: int, name: str, *args: Any, **options: Any) -> Call:
    return lambda x: getattr(F, f"{name}{d}d")(x, *args, **options)


def _zeroed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    return module
