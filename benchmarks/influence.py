"""What a look inside costs: `innerloop.inspect.influence` beside one meta-gradient.

`python -m benchmarks.influence [--rounds N]` prints a Markdown table. The contenders run
interleaved in one process; the figures are ratios of processor time, round by round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

import innerloop
from benchmarks import machine, timing
from benchmarks.spread import Spread

STEPS, BATCH = 500, 32
SHAPES = {
    "w1": (64, 256),
    "b1": (256,),
    "w2": (256, 256),
    "b2": (256,),
    "w3": (256, 65),
    "b3": (65,),
}
"""99,137 parameters."""


def contenders() -> dict[str, Callable[[], object]]:
    """One meta-gradient, and influence curves without and with probes."""
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(shape, generator=generator) / (shape[0] ** 0.5 if len(shape) > 1 else 10)
        for name, shape in SHAPES.items()
    }
    x = torch.randn(STEPS + 1, BATCH, 64, generator=generator)
    y = torch.randint(65, (STEPS + 1, BATCH), generator=generator)

    def loss(params: Mapping[str, Tensor], hyper: object, batch: tuple[Tensor, Tensor]) -> Tensor:
        h = F.linear(batch[0], params["w1"].T, params["b1"]).tanh()
        h = F.linear(h, params["w2"].T, params["b2"]).tanh()
        return F.cross_entropy(F.linear(h, params["w3"].T, params["b3"]), batch[1])

    problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.05))
    batches = (x[:-1], y[:-1])

    def outer(traj: innerloop.Trajectory, hyper: object) -> Tensor:
        return loss(traj.params, hyper, (x[-1], y[-1]))

    def gradient() -> object:
        return innerloop.metagradient(
            outer, problem, params, batches, wrt="params", strategy=innerloop.Checkpointed()
        )

    def curve(probes: int) -> Callable[[], object]:
        def run() -> object:
            start = {name: p.clone().requires_grad_() for name, p in params.items()}
            traj = innerloop.unroll(problem, start, batches, strategy=innerloop.Checkpointed())
            return innerloop.inspect.influence(traj, outer, probes=probes)

        return run

    return {"meta-gradient": gradient, "influence": curve(0), "8 probes": curve(8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    runs = contenders()
    seconds = timing.interleave(runs, rounds, warm_up=1, clock="cpu")
    facts = machine.describe()
    blas = "MKL" if torch.backends.mkl.is_available() else "OpenBLAS or other"
    print(
        f"{facts['date']}, {facts['machine']}, torch {facts['torch']}, {blas}; "
        f"{rounds} interleaved rounds, load {machine.load():.1f}"
    )
    base = seconds["meta-gradient"]
    print(f"| 99,137 parameters, {STEPS} steps of SGD | s | over one meta-gradient |")
    print("|---|---|---|")
    for name, found in seconds.items():
        r, median = Spread.of_ratios(found, base), Spread.of(found).median
        shown = f"{r.median:.2f} ({r.quarter:.2f}, {r.three_quarters:.2f})"
        print(f"| {name} | {median:.2f} | {shown} |")


if __name__ == "__main__":
    main()
