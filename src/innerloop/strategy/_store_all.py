"""Keep the whole graph."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from innerloop._trajectory import Trajectory
from innerloop.strategy._base import Loop, Strategy
from innerloop.strategy._engine.plain_run import plain_run


@dataclasses.dataclass(frozen=True)
class StoreAll(Strategy):
    """Run the loop and let autograd keep everything: exact, fast, and memory grows with every step.

    **Cost** for T steps, with G one inner gradient, A what a first-order step saves, P parameters,
    S optimizer state: time about 3 T G (the floor of exact reverse mode), memory T (2.23 A + P +
    S).

    **When**: short loops; when states at every time are wanted (`Trajectory.at`,
    `innerloop.inspect`); as the oracle of every other strategy. **Not** when memory runs out.

    Example:
        >>> import innerloop
        >>> innerloop.StoreAll(), innerloop.StoreAll().exact
        (StoreAll(), True)
    """

    exact = True
    compiles: ClassVar[bool] = True
    differentiates: ClassVar[frozenset[str]] = frozenset({"params", "hyper"})

    def run(self, loop: Loop) -> Trajectory:
        return plain_run(loop)
