"""Does the verdict of `innerloop.diagnose` hold? Sixty trainings, registered here before the run.

`python -m benchmarks.trust` prints a Markdown table. Truth for a training is the correlation of
the promised with the real change of the outer loss in 24 random directions of relative size 1e-2
that the verdict has not seen; above .8 the meta-gradient counts as good.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import innerloop
from benchmarks import machine
from innerloop.optim import Optimizer

UNSEEN, GOOD, SIZE, SEED = 24, 0.8, 1e-2, 5000
Batch = tuple[Tensor, Tensor]


class Training(NamedTuple):
    """One registered training."""

    network: str
    rule: str
    rate: float
    steps: int
    seed: int


NETWORKS = ("tanh", "relu", "max-pool")
RULES: Mapping[str, Callable[[float], Optimizer]] = {
    "sgd": lambda rate: innerloop.optim.sgd(lr=rate),
    "momentum": lambda rate: innerloop.optim.sgd(lr=rate, momentum=0.9),
    "adam": lambda rate: innerloop.optim.adam(lr=rate, eps=1e-6),
}
RATES = {"sgd": (0.05, 0.4, 1.5), "momentum": (0.01, 0.1, 0.4), "adam": (0.003, 0.03, 0.2)}
GRID = list(
    itertools.chain(
        itertools.product(NETWORKS, RULES, (0, 1, 2), (20, 80)),
        [("tanh", rule, 2, 150) for rule in RULES],
        [("relu", rule, 0, 150) for rule in RULES],
    )
)
TRAININGS = [
    Training(network, rule, RATES[rule][k], steps, SEED + i)
    for i, (network, rule, k, steps) in enumerate(GRID)
]


def loss_of(network: str) -> Callable[[Mapping[str, Tensor], object, Batch], Tensor]:
    """The loss of a small network."""

    def loss(params: Mapping[str, Tensor], hyper: object, batch: Batch) -> Tensor:
        x, y = batch
        h = x @ params["a"] + params["c"]
        if network == "tanh":
            h = h.tanh()
        elif network == "relu":
            h = h.relu()
        else:
            h = F.max_pool1d(h[:, None].relu(), 2)[:, 0]
            h = torch.cat([h, h], 1)
        return F.cross_entropy((h @ params["b"]).tanh() @ params["d"], y)

    return loss


def data(training: Training) -> tuple[dict[str, Tensor], list[Batch]]:
    """First parameters, and the batches."""
    g = torch.Generator().manual_seed(training.seed)
    x = torch.randn(training.steps + 1, 24, 8, generator=g)
    teacher = torch.randn(8, 4, generator=g)
    y = ((x @ teacher) + torch.randn(training.steps + 1, 24, 4, generator=g)).argmax(-1)
    params = {
        "a": torch.randn(8, 16, generator=g) / 8**0.5,
        "c": torch.randn(16, generator=g) / 10,
        "b": torch.randn(16, 16, generator=g) / 4,
        "d": torch.randn(16, 4, generator=g) / 4,
    }
    return params, list(zip(x, y, strict=True))


def judge(training: Training) -> dict[str, float]:
    """The verdict, its cost, and the truth."""
    params, batches = data(training)
    loss = loss_of(training.network)
    problem = innerloop.Problem(loss, RULES[training.rule](training.rate))

    def outer(traj: innerloop.Trajectory, hyper: object) -> Tensor:
        return loss(traj.params, hyper, batches[-1])

    def asked(probes: int, seed: int) -> innerloop.Diagnosis:
        return innerloop.diagnose(
            outer,
            problem,
            params,
            batches[:-1],
            size=SIZE,
            probes=probes,
            seed=seed,
            quiet=True,
        )

    found, unseen = asked(8, training.seed), asked(UNSEEN, training.seed + 10_000)
    truth = 0.0
    if unseen.kept:
        pairs = torch.tensor([unseen.promised, unseen.kept], dtype=torch.float64)
        truth = float(torch.corrcoef(pairs)[0, 1].nan_to_num(0.0))
    return {
        "trusted": float(found.trusted),
        "error": found.error if found.error == found.error else 1e9,
        "growth": max(found.growth.values(), default=1e9),
        "cost": found.cost,
        "truth": truth,
    }


def auc(scores: list[float], good: list[bool]) -> float:
    """The chance that a good one has a lower score than a bad one."""
    pairs = [
        (a, b)
        for a, x in zip(scores, good, strict=True)
        if x
        for b, y in zip(scores, good, strict=True)
        if not y
    ]
    return sum((a < b) + 0.5 * (a == b) for a, b in pairs) / len(pairs) if pairs else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=len(TRAININGS))
    count = parser.parse_args().count
    torch.set_num_threads(1)
    rows = [judge(t) for t in TRAININGS[:count]]
    good = [row["truth"] > GOOD for row in rows]
    trusted = [bool(row["trusted"]) for row in rows]
    wrong = sum(t and not g for t, g in zip(trusted, good, strict=True))
    missed = sum(g and not t for t, g in zip(trusted, good, strict=True))
    facts = machine.describe()
    print(f"{facts['date']}, {facts['machine']}, torch {facts['torch']}")
    print("\n| figure | value |\n|---|---|")
    print(f"| trainings, of them good | {len(rows)}, {sum(good)} |")
    print(f"| AUC of the error of the promise | {auc([r['error'] for r in rows], good):.3f} |")
    print(f"| AUC of the growth of the adjoint | {auc([r['growth'] for r in rows], good):.3f} |")
    print(f"| wrong among the trusted | {wrong} of {sum(trusted)} |")
    print(f"| good ones not trusted | {missed} of {sum(good)} |")
    costs = sorted(r["cost"] for r in rows)
    middle, most = costs[len(costs) // 2], costs[-1]
    print(f"| cost in meta-gradients, median and largest | {middle:.1f}, {most:.1f} |")


if __name__ == "__main__":
    main()
