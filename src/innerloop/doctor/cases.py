"""The operations under audit, each as a small module with smooth inputs in float64.

**To enrol an operation, add one line.** A line buys the probe of every derivative, and the contract of ``tests/test_audit_contract.py``:
training through it with SGD and Adam, by `track` and by `unroll`, against ``torch.optim`` and finite differences.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn

Operation = Callable[..., Any]


def noise(*shape: int, phase: float = 0.0, scale: float = 1.0) -> Tensor:
    """Fixed numbers in (-scale, scale) that look random, none of them zero, and leave the random state alone."""
    count = math.prod(shape)
    angles = torch.arange(1.0, count + 1.0, dtype=torch.float64) * 12.9898 + phase * 78.233
    return scale * angles.sin().reshape(shape)


def positive(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers in (.3, 1.7)."""
    return 1 + noise(*shape, phase=phase, scale=0.7)


def probabilities(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers in (.1, .9)."""
    return 0.5 + noise(*shape, phase=phase, scale=0.4)


def matrix(n: int, phase: float = 0.0) -> Tensor:
    """A well-conditioned matrix with distinct singular values and eigenvalues."""
    return torch.diag(torch.arange(1.0, n + 1.0, dtype=torch.float64)) + noise(n, n, phase=phase, scale=0.3)


class Applied(nn.Module):
    """A function of parameters."""

    def __init__(self, operation: Operation, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.operation = operation
        self.inputs = nn.ParameterList([nn.Parameter(x.clone()) for x in inputs])

    def forward(self) -> Any:
        """What the operation gives."""
        return self.operation(*self.inputs)


class OnInput(nn.Module):
    """A module at an input that is a parameter too."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], call: Operation | None = None) -> None:
        super().__init__()
        self.module = module
        self.inputs = nn.ParameterList([nn.Parameter(x.clone()) for x in inputs])
        self.call = call

    def forward(self) -> Any:
        """What the module gives."""
        return self.module(*self.inputs) if self.call is None else self.call(self.module, *self.inputs)


@dataclass(frozen=True)
class Case:
    """One operation at one input.

    Attributes:
        name: as a user writes it.
        family: the heading under which it is reported.
        build: makes the module; its ``forward`` takes nothing and returns a tensor, or several.
        smooth: False at a kink or an exact zero, where only finiteness is asked for.
        constants: True if a part of the forward is a constant of the derivative for PyTorch (running statistics, singular vectors
            of the power iteration), so that finite differences of the forward are not its derivative.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    smooth: bool = True
    constants: bool = False

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
    """A smooth scalar of what an operation gives, whose own derivatives depend on it."""
    parts = list(_tensors(output))
    total = torch.zeros((), dtype=torch.float64, device=parts[0].device)
    for i, part in enumerate(parts):
        real = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
        weights = (1.2 + noise(*real.shape, phase=3.0 + i)).to(real)
        total = total + (weights * (real + 0.3).sin()).sum() / max(1, real.numel())
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


def function(name: str, family: str, operation: Operation, *inputs: Tensor, **flags: bool) -> Case:
    """The case of a function of tensors."""
    return Case(name, family, lambda: Applied(operation, inputs), **flags)


def layer(name: str, family: str, make: Callable[[], nn.Module], *inputs: Tensor, call: Operation | None = None, evaluation: bool = False, **flags: bool) -> Case:
    """The case of a module."""
    return Case(name, family, lambda: OnInput(make(), inputs, call).train(not evaluation), **flags)


# -- activations ---------------------------------------------------------------------------------------------------------

X = noise(3, 4, scale=1.5)
ACTIVATIONS: dict[str, Operation] = {
    "relu": F.relu, "relu6": F.relu6, "elu": F.elu, "selu": F.selu, "celu": functools.partial(F.celu, alpha=0.7), "leaky_relu": F.leaky_relu,
    "gelu": F.gelu, "gelu(tanh)": functools.partial(F.gelu, approximate="tanh"), "silu": F.silu, "mish": F.mish,
    "softplus": functools.partial(F.softplus, beta=1.5), "softsign": F.softsign, "tanhshrink": F.tanhshrink,
    "hardtanh": F.hardtanh, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "hardshrink": F.hardshrink, "softshrink": F.softshrink, "logsigmoid": F.logsigmoid,
    "threshold": lambda x: F.threshold(x, 0.1, 0.2), "glu": F.glu, "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1), "softmin": lambda x: F.softmin(x, -1),
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "normalize": F.normalize,
}


def _activations() -> Iterator[Case]:
    for name, operation in ACTIVATIONS.items():
        yield function(f"F.{name}", "activations", operation, X)
    yield function("F.prelu", "activations", F.prelu, X, positive(4))
    yield function("F.rrelu (eval)", "activations", F.rrelu, X)
    yield function("F.gumbel_softmax", "activations", _seeded(F.gumbel_softmax), X)
    yield function("F.dropout", "activations", _seeded(F.dropout), X)
    yield function("F.alpha_dropout", "activations", _seeded(functools.partial(F.alpha_dropout, training=True)), X)
    yield function("F.feature_alpha_dropout", "activations", _seeded(functools.partial(F.feature_alpha_dropout, training=True)), noise(2, 3, 4))
    yield function("F.dropout1d", "activations", _seeded(F.dropout1d), noise(2, 3, 4))
    yield function("F.dropout2d", "activations", _seeded(F.dropout2d), noise(2, 3, 2, 2))
    yield function("F.dropout3d", "activations", _seeded(F.dropout3d), noise(2, 3, 2, 2, 1))
    yield function("F.rrelu (train)", "activations", _seeded(functools.partial(F.rrelu, training=True)), X)


def _seeded(operation: Operation) -> Operation:
    """The operation with the same random numbers at every call."""

    def call(*inputs: Tensor) -> Any:
        torch.manual_seed(3)
        return operation(*inputs)

    return call
