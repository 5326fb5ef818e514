"""Peak memory and time of one meta-gradient of the GPT of M4 with eight blocks, with and without
activation checkpointing around each block.

``python -m benchmarks.blocks`` prints the table of docs/strategies.md.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import innerloop
from benchmarks.memory import fresh, high_water
from benchmarks.models import GPT
from innerloop._utils.text_table import table

WAYS = ("track", "track(strategy=Checkpointed())", "StoreAll()", "Checkpointed()")
STEPS = (1, 8)


class CheckpointedGPT(GPT):
    """The GPT whose blocks keep their inputs only."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        out: Tensor = self.head(self.norm(x))
        return out


def loss_of(model: GPT, text: Tensor) -> Tensor:
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def once(way: str, model: GPT, data: list[Tensor]) -> Tensor:
    """Take one meta-gradient; return the outer loss."""
    *inner, last = data
    if not way.startswith("track"):
        problem = innerloop.Problem.from_module(
            model, lambda m, hyper, text: loss_of(m, text), innerloop.optim.sgd(lr=0.05)
        )
        call, _, _ = innerloop.functional(model)

        def outer(traj: innerloop.Trajectory, hyper: object) -> Tensor:
            logits = call(traj.params, last[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1), last[:, 1:].flatten())

        strategy = {"StoreAll()": innerloop.StoreAll(), "Checkpointed()": innerloop.Checkpointed()}
        found = innerloop.metagradient(
            outer, problem, None, inner, wrt="params", strategy=strategy[way]
        )
        return found[0]
    replays = innerloop.Checkpointed() if "strategy" in way else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with innerloop.track(model, optimizer, strategy=replays) as loop:
        for text in inner:
            if replays is None:
                loop.step(loss_of(loop.model, text))
            else:
                loop.step(loss_of, args=(loop.model, text))
        value = loss_of(loop.model, last)
    value.backward()
    return value.detach()


def _child(way: str, kind: str, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = torch.randint(256, (1, 9))
    once(way, CheckpointedGPT(width=8, depth=1), [small, small])
    base = high_water()
    model = (CheckpointedGPT if kind == "blocks" else GPT)(depth=8)
    data = [torch.randint(256, (4, 129)) for _ in range(steps + 1)]
    once(way, model, data)
    begin = time.process_time()
    value = once(way, model, data)
    seconds = time.process_time() - begin
    print(json.dumps({"peak": high_water() - base, "seconds": seconds, "loss": value.item()}))


def main() -> None:
    rows = []
    for steps in STEPS:
        for way in WAYS:
            plain, blocks = (
                fresh("benchmarks.blocks", way, kind, str(steps)) for kind in ("plain", "blocks")
            )
            row = (
                str(steps),
                f"`{way}`",
                f"{plain['peak']:.0f}",
                f"{blocks['peak']:.0f}",
                f"{plain['peak'] / blocks['peak']:.1f}",
                f"{blocks['seconds'] / plain['seconds']:.2f}",
            )
            print(*row, file=sys.stderr, flush=True)
            rows.append(row)
    header = ("steps", "way", "plain, MB", "blocks, MB", "plain / blocks", "time, blocks / plain")
    print(table(rows, header=header, markdown=True))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _child(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main()
