"""The workloads M1 to M4: a network, an inner optimizer, and the data of one whole meta-gradient.

A workload is T inner steps per task, a fresh batch a step, then the same loss on one more batch.
What is timed is the gradient of the mean outer loss over the tasks with respect to the initial
parameters:

    d/dθ₀ 1/N Σₙ L(θ_T⁽ⁿ⁾; outer batch n), θ_{t+1}⁽ⁿ⁾ = step(θ_t⁽ⁿ⁾, ∇L(θ_t⁽ⁿ⁾; inner batch n, t)).

A new workload is one entry of `WORKLOADS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models import GPT, MLP, Conv4, mlp

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]


class Batch(NamedTuple):
    x: Tensor
    y: Tensor


class Task(NamedTuple):
    """One inner loop: a batch per step, and the batch of the outer loss."""

    inner: list[Batch]
    outer: Batch


@dataclass(frozen=True)
class Workload:
    """One line of the benchmark.

    `data(n)` draws n batches; `forward` is the functional form of the network where there is one;
    `tolerance` is what float32 can be asked for, as the relative error of the worst parameter's
    meta-gradient.
    """

    name: str
    title: str
    network: Callable[[], nn.Module]
    data: Callable[[int], list[Batch]]
    optimizer: Literal["sgd", "adam"]
    lr: float
    steps: int
    repeats: int
    tasks: int = 1
    forward: Forward | None = None
    tolerance: float = 1e-5
    seed: int = 100

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network with the same initial parameters at every call."""
        torch.manual_seed(0)
        return self.network().to(dtype)

    def batches(self, dtype: torch.dtype = torch.float32) -> list[Task]:
        """The same data at every call, drawn in float32 so that other dtypes see the same numbers.

        The seed is not arbitrary. Adam's update is g/(|g| + eps) at its first step, so a gradient
        entry near eps = 1e-8 multiplies rounding errors by 1e5; with this seed M2 has none so
        small, and float32 resolves its meta-gradient to 3e-5. M3 chooses in ReLUs and max-pools:
        if its start moves by 3e-7, its meta-gradient in float64 jumps by up to 9e-1. With its seed
        the rounding of every contender leaves all choices as they are in float64; with 100 that of
        compiled code changes one.
        """
        torch.manual_seed(self.seed)
        return [self._task(dtype) for _ in range(self.tasks)]

    def _task(self, dtype: torch.dtype) -> Task:
        drawn = self.data(self.steps + 1)
        cast = [Batch(x.to(dtype) if x.is_floating_point() else x, y) for x, y in drawn]
        return Task(cast[:-1], cast[-1])

    def torch_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        rule = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[self.optimizer]
        return rule(model.parameters(), lr=self.lr)


def loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy over the last dimension; the reshape is left out where it would do nothing."""
    if logits.dim() > 2:
        logits, y = logits.flatten(0, -2), y.flatten()
    return F.cross_entropy(logits, y)


def _vectors(count: int) -> list[Batch]:
    return [Batch(torch.randn(32, 32), torch.randint(10, (32,))) for _ in range(count)]


def _images(count: int) -> list[Batch]:
    return [Batch(torch.randn(25, 1, 28, 28), torch.randint(5, (25,))) for _ in range(count)]


def _tokens(count: int) -> list[Batch]:
    text = [torch.randint(256, (4, 129)) for _ in range(count)]
    return [Batch(tokens[:, :-1], tokens[:, 1:]) for tokens in text]


_TABLE = (
    Workload(
        "M1",
        "MLP 32-64-64-10, 32 tasks x 5 SGD steps, batch 32",
        network=lambda: MLP((32, 64, 64, 10)),
        data=_vectors,
        optimizer="sgd",
        lr=0.1,
        steps=5,
        tasks=32,
        repeats=20,
        forward=mlp,
    ),
    Workload(
        "M2",
        "MLP of 6 layers, width 64, 8 Adam steps, batch 32",
        network=lambda: MLP((32, 64, 64, 64, 64, 64, 10)),
        data=_vectors,
        optimizer="adam",
        lr=1e-3,
        steps=8,
        repeats=40,
        forward=mlp,
        tolerance=1e-3,
    ),
    Workload(
        "M3",
        "conv4, 64 channels, GroupNorm, 28x28, 8 SGD steps, batch 25",
        network=Conv4,
        data=_images,
        optimizer="sgd",
        lr=0.05,
        steps=8,
        repeats=10,
        seed=102,
    ),
    Workload(
        "M4",
        "GPT, 4 blocks, width 128, 8 SGD steps, batch 4 x 128 tokens",
        network=GPT,
        data=_tokens,
        optimizer="sgd",
        lr=0.05,
        steps=8,
        repeats=10,
    ),
)

WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _TABLE}

WARM_UP = Workload(
    "warm-up",
    "so small that it only pays for lazy imports; taken before the base of a memory measurement",
    network=lambda: MLP((32, 8, 10)),
    data=_vectors,
    optimizer="adam",
    lr=1e-3,
    steps=2,
    repeats=1,
    forward=mlp,
)
