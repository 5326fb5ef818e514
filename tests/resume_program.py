"""A long meta-gradient whose states wait in a folder: ``python -m tests.resume_program FOLDER
RESULT STEPS``. It prints a line after every few steps, so that a test can kill it at any of them.

The inner loop has all that a state consists of: parameters, the averages of Adam, running
statistics, random numbers (dropout); besides, aux, states at other times, and a schedule.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from innerloop import Checkpointed
from innerloop.strategy import Disk

EVERY = 10


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.norm(self.body(x)).tanh(), 0.1, training=self.training))


def inner(model: nn.Module, hyper: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    prediction = model(batch[:, :5])
    error = (prediction - batch[:, 5:]).square().mean()
    decay = torch.stack([p.square().sum() for p in model.parameters()]).sum()
    return error + hyper["decay"] * decay, prediction.mean()


def batches(params: Any, hyper: Any, t: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(t))


def rate(hyper: Any, t: int) -> dict[str, Any]:
    return {"lr": hyper["log_lr"].exp() / (1 + 0.001 * t)}


def outer(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
    ends = torch.stack([p.square().sum() for p in traj.params.values()]).sum()
    middle = traj.at(traj.steps // 3).params["body.weight"].sum()
    return ends + traj.losses.mean() + traj.aux.square().mean() + middle


def gradient(
    strategy: Checkpointed, steps: int, progress: Callable[[str, int, int | None], object] | bool
) -> list[Tensor]:
    """The value, the gradients, and the next random numbers of the user."""
    torch.manual_seed(3)
    model = Net()
    problem = innerloop.Problem.from_module(
        model, inner, innerloop.optim.adam(eps=1e-3), optimizer_hyper=rate
    )
    value, grads = innerloop.metagradient(
        outer,
        problem,
        None,
        batches,
        steps=steps,
        hyper={"log_lr": torch.tensor(-4.0), "decay": torch.tensor(0.01)},
        strategy=strategy,
        save_at=[steps // 3],
        progress=progress,
    )
    return [value, *grads["params"].values(), *grads["hyper"].values(), torch.rand(3)]


def main(folder: str, result: str, steps: str) -> None:
    def progress(phase: str, done: int, total: int | None) -> None:
        if done % EVERY == 0 or done == total:
            print(phase, done, flush=True)

    torch.set_num_threads(1)
    found = gradient(Checkpointed(offload=Disk(folder)), int(steps), progress)
    torch.save(found, Path(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
