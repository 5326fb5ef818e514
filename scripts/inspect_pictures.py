"""Draw the pictures of docs/inspect.md: `python scripts/inspect_pictures.py`.

A small network on a synthetic task, trained by SGD with momentum, by Adam, and at a rate that is
too large. Everything is seeded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import innerloop
from innerloop import inspect
from innerloop.inspect._plot import figure_of

OUT = Path(__file__).parent.parent / "docs" / "_static"
STEPS = 60


def task() -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Return the first parameters, and a batch for every step and one more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS + 1, 32, 6, generator=generator)
    y = (2 * x[..., :2].prod(-1, keepdim=True)).tanh() + x[..., 2:3] / 2
    params = {
        "first.weight": torch.randn(6, 16, generator=generator) / 6**0.5,
        "first.bias": torch.zeros(16),
        "second.weight": torch.randn(16, 16, generator=generator) / 4,
        "last.weight": torch.randn(16, 1, generator=generator) / 4,
    }
    return params, list(zip(x, y, strict=True))


def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
    """Return the squared error of a tanh network."""
    x, y = batch
    h = (x @ params["first.weight"] + params["first.bias"]).tanh()
    h = (h @ params["second.weight"]).tanh()
    return (h @ params["last.weight"] - y).square().mean()


def run(optimizer: innerloop.optim.Optimizer) -> innerloop.Trajectory:
    """Train, with learned rates where the optimizer takes them."""
    params, batches = task()
    start = {n: p.clone().requires_grad_() for n, p in params.items()}
    problem = innerloop.Problem(loss, optimizer, optimizer_hyper=("lr",))
    hyper = {"lr": torch.tensor(RATES[repr(optimizer).partition("(")[0]], requires_grad=True)}
    return innerloop.unroll(
        problem, start, batches[:STEPS], hyper=hyper, strategy=innerloop.Checkpointed()
    )


RATES = {"sgd": 0.1, "adam": 0.01}


def outer(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
    """Return the loss on the batch that no step has seen."""
    return loss(traj.params, None, task()[1][-1])


def main() -> None:
    """Write the PNG files."""
    sgd = run(innerloop.optim.sgd(momentum=0.9))
    figure = figure_of("the pictures", (11, 3.8))
    left, right = figure.subplots(1, 2)
    inspect.influence(sgd, outer, probes=16).plot(left)
    inspect.gains(sgd, wrt=STEPS // 2, k=8, max_products=60).plot(right)
    figure.savefig(OUT / "inspect-influence.png", dpi=110)

    figure = figure_of("the pictures", (11, 3.8))
    left, right = figure.subplots(1, 2)
    inspect.curvature(sgd, range(0, STEPS, 6), k=2).plot(left)
    inspect.paths(sgd, outer, STEPS // 2, state=True).plot(right)
    figure.savefig(OUT / "inspect-curvature.png", dpi=110)

    figure = figure_of("the pictures", (8.4, 3.9))
    left, right = figure.subplots(1, 2)
    params, batches = task()
    for ax, rate in ((left, 0.1), (right, 0.65)):
        problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=rate))
        innerloop.diagnose(outer, problem, params, batches[:STEPS]).plot(ax)
    figure.savefig(OUT / "inspect-diagnosis.png", dpi=110)


if __name__ == "__main__":
    main()
