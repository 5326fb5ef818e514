"""The fastest exact strategy that fits."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from innerloop._trajectory import Trajectory
from innerloop._utils.execution import Mode, mode
from innerloop.strategy._base import Loop, Measure, Strategy
from innerloop.strategy._checkpointed import Checkpointed, in_bytes
from innerloop.strategy._forecast import Forecast
from innerloop.strategy._measure import measure
from innerloop.strategy._store_all import StoreAll


@dataclasses.dataclass(frozen=True)
class Auto(Strategy):
    """Measure a few steps, and take the fastest exact strategy whose memory stays within a budget.

    The candidates are `StoreAll` and `Checkpointed` with as many slots as fit: `innerloop.plan`
    prints the same measurement.

    **Cost**: about twenty steps at each call, before the loop runs.

    **When**: a script that must not run out of memory, whatever T is. **Not** in an outer loop of
    short inner loops: call `innerloop.plan` once, and write down what it says. With an iterator,
    and under ``torch.func``, nothing is measured: it is ``Checkpointed(memory=memory)``.

    Args:
        memory: ``"4GB"``, ``"500MB"`` or a number of bytes, for the loop and its backward pass,
            above what is there before.

    Example:
        >>> import innerloop
        >>> innerloop.Auto(memory="2GB").exact
        True
    """

    memory: float | str

    exact = True
    differentiates: ClassVar[frozenset[str]] = frozenset({"params", "hyper"})

    def __post_init__(self) -> None:
        super().__post_init__()
        in_bytes(self.memory)

    def run(self, loop: Loop) -> Trajectory:
        return self.choose(loop).run(loop)

    def forecast(self, measure: Measure) -> Forecast:
        """Predict the cost of the strategy that is chosen."""
        return self.choose(measure.loop).forecast(measure)

    def choose(self, loop: Loop) -> Strategy:
        """Return the strategy that `run` takes for this loop."""
        steps = loop.batches.steps
        if steps == 0:
            return StoreAll()
        if steps is None or loop.batches.single_pass or mode() is Mode.TRANSFORMED:
            return Checkpointed(memory=self.memory)
        candidates = [StoreAll(), Checkpointed(slots="all")]
        costs = [measure(loop, candidate, rounds=3) for candidate in candidates]
        fitting = [
            (cost.seconds.at(steps), i)
            for i, cost in enumerate(costs)
            if cost.bytes.at(steps) <= in_bytes(self.memory)
        ]
        return candidates[min(fitting)[1]] if fitting else Checkpointed(memory=self.memory)
