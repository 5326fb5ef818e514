"""What a contender is: a name, the packages it needs, and a function that prepares one workload."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workloads import Workload

Gradients = Mapping[str, Any]
"""The meta-gradient by parameter name: torch tensors, or arrays that numpy can read."""

MetaGradient = Callable[[], Gradients]
"""One whole meta-gradient, everything from the initial parameters to their gradient; returns when
it is computed."""

Prepare = Callable[[Workload], MetaGradient]


@dataclass(frozen=True)
class Contender:
    """One way to compute a meta-gradient.

    `prepare(workload)` builds the network and the data, which is not timed, and returns the
    function that is. `packages` are looked for before `prepare` is called, so that `prepare` may
    import them. `workloads=None` means all of them. `ours` marks innerloop: every one of ours is
    compared with every peer.
    """

    name: str
    prepare: Prepare
    packages: tuple[str, ...] = ()
    workloads: tuple[str, ...] | None = None
    ours: bool = False

    def takes(self, workload: Workload) -> bool:
        return self.workloads is None or workload.name in self.workloads

    def missing(self) -> tuple[str, ...]:
        return tuple(
            package for package in self.packages if importlib.util.find_spec(package) is None
        )

    def label(self) -> str:
        """The name with the version of the first package: `higher 0.2.1`."""
        if self.ours or not self.packages or self.missing():
            return self.name
        return f"{self.name} {importlib.metadata.version(self.packages[0])}"


def named_grads(model: nn.Module) -> dict[str, Tensor]:
    """The accumulated `.grad` of every parameter, taken away from the model so that the next run
    starts clean."""
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise RuntimeError(f"no meta-gradient reached the initial value of {name}")
        grads[name] = parameter.grad
        parameter.grad = None
    return grads


def as_tensors(gradients: Gradients) -> dict[str, Tensor]:
    return {
        name: g if isinstance(g, Tensor) else torch.tensor(g.tolist())
        for name, g in gradients.items()
    }
