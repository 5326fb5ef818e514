"""A sample of measurements as its median and how far it spreads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    low: float
    quarter: float
    median: float
    three_quarters: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The five numbers of a non-empty sample."""
        if len(values) == 1:
            return cls(*(values[0],) * 5)
        quarter, median, three_quarters = statistics.quantiles(values, n=4, method="inclusive")
        return cls(min(values), quarter, median, three_quarters, max(values))

    @classmethod
    def of_ratios(cls, ours: Sequence[float], theirs: Sequence[float]) -> Spread:
        """The ratio of each round, not of the medians: what slows the machine down for a round
        slows both."""
        return cls.of([a / b for a, b in zip(ours, theirs, strict=True)])
