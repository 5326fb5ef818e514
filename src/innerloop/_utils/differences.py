"""Derivatives of plain functions by finite differences: the truth for gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable


def four_point(f: Callable[[float], float], h: float) -> float:
    """Return f'(0) by the central formula of fourth order."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


def derivative(
    f: Callable[[float], float], h: float, rungs: int = 3, factor: float = 2.0
) -> tuple[float, float]:
    """Return f'(0) and its uncertainty.

    The uncertainty is how far the two neighbouring steps of ``h, h / factor, ...`` that agree best
    are apart.
    """
    estimates = [four_point(f, h / factor**k) for k in range(rungs)]
    gaps = [abs(a - b) for a, b in itertools.pairwise(estimates)]
    best = min(range(len(gaps)), key=lambda k: gaps[k] if gaps[k] == gaps[k] else float("inf"))
    return estimates[best + 1], gaps[best]
