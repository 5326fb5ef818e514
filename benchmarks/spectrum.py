"""The strongest directions of a whole training of 866,560 parameters, and its influence curve.

`python -m benchmarks.spectrum` trains an MLP 64-640-640-640-10 for 1,000 steps of SGD on the digits
in float32, and prints a Markdown table: the five largest singular values of d params(T) / d
params(0) with their relative residuals, taken again by products of their own, time, and peak
memory. No matrix of the size of the model squared is formed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

import innerloop
from benchmarks import machine
from benchmarks.memory import high_water
from innerloop import inspect

SIZES, BATCH = (64, 640, 640, 640, 10), 32


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 images of 8 x 8 pixels, scaled, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def loss(params: Mapping[str, Tensor], hyper: object, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the network."""
    h, y = batch
    *inner, last = params.values()
    for w in inner:
        h = (h @ w).tanh()
    return F.cross_entropy(h @ last, y)


def norm(named: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all tensors together."""
    return sum(float(x.double().square().sum()) for x in named.values()) ** 0.5


def less(a: Mapping[str, Tensor], s: float, b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """a - s b."""
    return {n: a[n] - s * b[n] for n in a}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--tol", type=float, default=1e-2)
    parser.add_argument("--products", type=int, default=24)
    parser.add_argument("--verify", type=int, default=5, help="directions to multiply again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, y = digits()
    index = torch.randint(len(x), (options.steps + 1, BATCH), generator=generator)
    batches = [(x[i], y[i]) for i in index]
    params = {
        f"w{i}": (torch.randn(n, m, generator=generator) / n**0.5).requires_grad_()
        for i, (n, m) in enumerate(itertools.pairwise(SIZES))
    }
    problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=options.rate))

    def outer(traj: innerloop.Trajectory, hyper: object) -> Tensor:
        return loss(traj.params, hyper, batches[-1])

    begin, used = time.perf_counter(), time.process_time()
    traj = innerloop.unroll(problem, params, batches[:-1], strategy=innerloop.Checkpointed())
    trained = time.perf_counter()
    curve = inspect.influence(traj, outer)
    swept = time.perf_counter()
    print(curve, flush=True)

    def told(phase: str, done: int, total: int | None) -> None:
        print(
            f"{done} {phase} of {total}, {time.process_time() - used:.0f} s of processor",
            flush=True,
        )

    found = inspect.gains(
        traj, k=options.count, tol=options.tol, max_products=options.products, progress=told
    )
    done = time.perf_counter()
    facts = machine.describe()
    print(
        f"{facts['date']}, {facts['machine']}, torch {facts['torch']}, load {machine.load():.1f}, "
        f"{'MKL' if torch.backends.mkl.is_available() else 'other BLAS'}\n"
        f"{sum(p.numel() for p in params.values()):,} parameters, {options.steps} steps: training "
        f"{trained - begin:.0f} s, influence curve {swept - trained:.0f} s, {found.products} pairs "
        f"of products {done - swept:.0f} s, together {done - begin:.0f} s, "
        f"{time.process_time() - used:.0f} s of processor; "
        f"peak memory {high_water():.0f} MB",
        flush=True,
    )
    print(
        "\n| direction | singular value | ‖J v - s u‖ / s | ‖Jᵀ u - s v‖ / s |\n|---|---|---|---|"
    )
    print("residuals:", [f"{r:.1e}" for r in found.residuals.tolist()], flush=True)
    for i, s in enumerate(found.values.tolist()[: options.verify]):
        v, u = ({n: x[i] for n, x in side.items()} for side in (found.inputs, found.outputs))
        right = norm(less(inspect.jvp(traj, -1, 0, v), s, u)) / s
        left = norm(less(inspect.vjp(traj, -1, 0, u), s, v)) / s
        print(f"| {i + 1} | {s:.5g} | {right:.1e} | {left:.1e} |", flush=True)


if __name__ == "__main__":
    main()
