"""How a step's second derivative is best taken: time of a pullback by each product, over that of
one inner gradient.

`Checkpointed(product="auto")` takes the faster exact one of the device's kind
(`innerloop.strategy._engine.step_pullback.PREFERRED`); this is the measurement behind it. On CUDA
where there is one.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any, NamedTuple

import torch

from benchmarks.contenders.innerloop_unroll import problem_of
from benchmarks.spread import Spread
from benchmarks.workloads import WORKLOADS

PRODUCTS = ("reverse", "mixed", "finite")


class Product(NamedTuple):
    """The pullback of one step of a workload."""

    workload: str
    device: str
    gradient: float
    """Seconds of one inner gradient."""
    pullbacks: dict[str, Spread]
    """Time of each product over that of the gradient, round by round."""


def measure(repeats: int = 15) -> list[Product]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [_measure(name, device, repeats) for name in ("M2", "M3", "M4")]


def _measure(name: str, device: str, repeats: int) -> Product:
    from innerloop._utils import tree
    from innerloop.strategy._engine.step_pullback import OutputCotangents, Step, pull, state_of

    problem, _, model = problem_of(WORKLOADS[name])
    params = {n: p.detach().to(device) for n, p in model.named_parameters()}
    batch = tree.map_tensors(lambda x: x.to(device), WORKLOADS[name].batches()[0].inner[0])
    carry = problem.init(params)
    carry, _, _ = problem.step(carry, None, batch, 0)  # a state with moments
    step = Step(problem, carry, None, batch, 1, [False], set(), None)
    cotangents: list[Any] = [
        torch.ones_like(x) if tree.differentiable(x) else None for x in tree.leaves(state_of(carry))
    ]
    given = OutputCotangents(cotangents, None, [None])
    clock = time.perf_counter if device == "cuda" else time.process_time

    def timed(run: Any) -> float:
        _finish()
        begin = clock()
        run()
        _finish()
        return clock() - begin

    gradient = functools.partial(problem.gradient, carry.params, carry.buffers, None, batch)
    runs = {product: functools.partial(pull, product, step, given) for product in PRODUCTS}
    gradient()
    for run in runs.values():
        run()
    base: list[float] = []
    times: dict[str, list[float]] = {product: [] for product in PRODUCTS}
    for _ in range(repeats):
        base.append(timed(gradient))
        for product, run in runs.items():
            times[product].append(timed(run) / base[-1])
    return Product(
        name, device, statistics.median(base), {p: Spread.of(ts) for p, ts in times.items()}
    )


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
