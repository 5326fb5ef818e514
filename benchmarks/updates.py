"""What one differentiable update of 100 parameter tensors costs, beside higher: `python -m
benchmarks --only updates`.

An update with its share of the backward pass: ten updates from given gradients, recorded, and one
backward pass through them. higher 0.2.1 has no AdamW; its Adam with weight decay takes the place
(the same number of operations but one).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.spread import Spread
from benchmarks.timing import interleave

TENSORS, STEPS, LIMIT = 100, 10, 0.6
SHAPES = ((16,), (64, 64))
RULES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "SGD": ("sgd", {"lr": 0.1}, "SGD", {"lr": 0.1}),
    "SGD, momentum": ("sgd", {"lr": 0.1, "momentum": 0.9}, "SGD", {"lr": 0.1, "momentum": 0.9}),
    "AdamW": ("adamw", {"lr": 1e-3}, "Adam", {"lr": 1e-3, "weight_decay": 1e-2}),
}


class Update(NamedTuple):
    """One rule on tensors of one shape: milliseconds per update of ours, and the ratio to higher's,
    round by round."""

    rule: str
    shape: tuple[int, ...]
    milliseconds: float
    update: Spread
    with_backward: Spread


def measure(repeats: int | None = None, clock: str = "wall") -> list[Update]:
    return [_measure(rule, shape, repeats or 15, clock) for rule in RULES for shape in SHAPES]


def _measure(rule: str, shape: tuple[int, ...], repeats: int, clock: str) -> Update:
    generator = torch.Generator().manual_seed(0)
    params, grads = (
        [0.1 * torch.randn(shape, generator=generator) for _ in range(TENSORS)] for _ in range(2)
    )
    ours, theirs = _ours(rule, params, grads), _theirs(rule, params, grads)
    runs: dict[str, Callable[[], object]] = {
        "ours": ours,
        "theirs": theirs,
        "ours, backward": lambda: _backward(ours()),
        "theirs, backward": lambda: _backward(theirs()),
    }
    times = interleave(runs, repeats, clock=clock)
    return Update(
        rule,
        shape,
        1e3 * Spread.of(times["ours"]).median / STEPS,
        Spread.of_ratios(times["ours"], times["theirs"]),
        Spread.of_ratios(times["ours, backward"], times["theirs, backward"]),
    )


def _backward(final: list[Tensor]) -> None:
    torch.stack([p.sum() for p in final]).sum().backward()


def _ours(rule: str, params: list[Tensor], grads: list[Tensor]) -> Callable[[], list[Tensor]]:
    import innerloop

    name, settings, _, _ = RULES[rule]
    optimizer = getattr(innerloop.optim, name)(**settings)

    def run() -> list[Tensor]:
        now = {f"p{i}": p.clone().requires_grad_() for i, p in enumerate(params)}
        given = {f"p{i}": g.clone().requires_grad_() for i, g in enumerate(grads)}
        state = optimizer.init(now)
        for _ in range(STEPS):
            now, state = optimizer.update(given, state, now)
        return list(now.values())

    return run


def _theirs(rule: str, params: list[Tensor], grads: list[Tensor]) -> Callable[[], list[Tensor]]:
    import higher

    _, _, name, settings = RULES[rule]

    def run() -> list[Tensor]:
        leaves = [p.clone().requires_grad_() for p in params]
        given = [g.clone().requires_grad_() for g in grads]
        optimizer = higher.get_diff_optim(getattr(torch.optim, name)(leaves, **settings), leaves)
        now = leaves
        for _ in range(STEPS):  # what its step() does once it has the gradients
            optimizer.param_groups[0]["params"] = now
            optimizer._update([given])
            now = list(optimizer.param_groups[0]["params"])
        return now

    return run
