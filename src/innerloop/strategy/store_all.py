"""Keep the whole graph."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from innerloop import tree
from innerloop.batches import Exhausted
from innerloop.strategy.base import Loop, Strategy
from innerloop.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class StoreAll(Strategy):
    """Run the loop and let autograd keep everything: exact, fast, and memory grows with every step.

    **Cost** for T steps, with G one inner gradient, A what a first-order step saves, P parameters, S optimizer state: time about
    3 T G (the floor of exact reverse mode), memory T (2.23 A + P + S).

    **When**: short loops; when states at every time are wanted (`Trajectory.at`, `innerloop.inspect`); as the oracle of every
    other strategy. **Not** when memory runs out.

    Example:
        >>> import innerloop
        >>> innerloop.StoreAll(), innerloop.StoreAll().exact
        (StoreAll(), True)
    """

    exact = True
    differentiates: ClassVar[frozenset[str]] = frozenset({"params", "hyper"})

    def run(self, loop: Loop) -> Trajectory:
        carry, t = loop.start, 0
        states, losses, aux = {0: carry}, [], []
        while True:
            try:
                batch = loop.batch(carry, t)
            except Exhausted:
                break
            carry, loss, extra = loop.problem.step(carry, loop.hyper, batch, t)
            t += 1
            states[t] = carry
            losses.append(loss)
            aux.append(extra)
            loop.report("forward", t, loop.batches.steps)
        like = next(tree.tensors(loop.start.params))
        stacked: Any = torch.stack(losses) if losses else like.new_zeros(0)
        return Trajectory(states, stacked, tree.stack(aux), t)
