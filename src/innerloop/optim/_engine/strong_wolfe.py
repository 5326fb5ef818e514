"""A line search for the strong Wolfe conditions, by cubic interpolation.

It follows algorithms 3.5 and 3.6 of Nocedal & Wright (2006).

It decides by values and computes with tensors: the step length that comes out is a differentiable
function of the values and slopes that were met on the way, as long as the decisions stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from innerloop._types import Scalar
from innerloop._utils import torch_private
from innerloop.errors import InvalidInputError
from innerloop.optim._engine.numerics import safe_sqrt

_DECREASE = 1e-4  # c₁: f(t) ≤ f(0) + c₁ t f'(0)
_CURVATURE = 0.9  # c₂: |f'(t)| ≤ c₂ |f'(0)|
_NARROW = (
    1e-9  # an interval in which no entry of the parameters changes by more is not divided further
)


class Trial(NamedTuple):
    """A step length, and there: the loss, its gradient, its slope along the direction."""

    t: Scalar
    f: Tensor
    g: Tensor
    slope: Tensor


Bracket = tuple[Trial, Trial]
At = Callable[[Scalar], Trial]


def strong_wolfe(at: At, start: Trial, t: Scalar, budget: int, longest: float) -> tuple[Trial, int]:
    """Find the step length that satisfies both conditions, or the best one met.

    Args:
        at: the trial at a step length.
        start: the trial at 0.
        t: the step length to try first.
        budget: how many evaluations there may be after the first one.
        longest: the largest entry of the direction.

    Returns:
        ``(trial, number of evaluations)``.
    """
    found, used = _bracket(at, start, t, budget)
    if isinstance(found, Trial):
        return found, used + 1
    low, used = _zoom(at, start, found, used, budget, longest)
    return low, used + 1


def _bracket(at: At, start: Trial, t: Scalar, budget: int) -> tuple[Trial | Bracket, int]:
    """Go farther until an interval holds a solution; return that interval, or the solution."""
    previous, trial = start, at(t)
    for used in range(budget):
        if _too_high(trial, start) or (used > 1 and number(trial.f) >= number(previous.f)):
            return (previous, trial), used
        if _level(trial, start):
            _check(trial)
            return trial, used
        if number(trial.slope) >= 0:
            return (previous, trial), used
        bounds = (trial.t + 0.01 * (trial.t - previous.t), trial.t * 10)
        farther = _minimum_of_cubic(previous, trial, bounds)
        previous, trial = trial, at(farther)
    return (start, trial), max(budget, 0)


def _zoom(
    at: At, start: Trial, bracket: Bracket, used: int, budget: int, longest: float
) -> tuple[Trial, int]:
    """Divide the interval until its lower end satisfies the conditions."""
    ends, stalled = list(bracket), False
    low = _lower(ends)
    while used < budget and not abs(number(ends[1].t) - number(ends[0].t)) * longest < _NARROW:
        t, stalled = _inside(_minimum_of_cubic(ends[0], ends[1]), ends[0].t, ends[1].t, stalled)
        trial, used, high = at(t), used + 1, 1 - low
        if _too_high(trial, start) or number(trial.f) >= number(ends[low].f):
            ends[high] = trial
            low = _lower(ends)
            continue
        if _level(trial, start):
            return trial, used
        if number(trial.slope) * (number(ends[high].t) - number(ends[low].t)) >= 0:
            ends[high] = ends[low]
        ends[low] = trial
    return ends[low], used


def _check(trial: Trial) -> None:
    """Raise if the loss is NaN: every comparison with NaN is false, so none would refuse it.

    ``torch.optim.LBFGS`` fails with an IndexError here.
    """
    if math.isnan(number(trial.f)):
        raise InvalidInputError(
            f"LBFGS: the loss is NaN at the step length {number(trial.t):.3g}, while its slope "
            "there is finite: the line search cannot "
            "tell that it went too far. Lower lr, or let the loss be inf outside of its domain"
        )


def _lower(ends: list[Trial]) -> int:
    return 0 if number(ends[0].f) <= number(ends[1].f) else 1


def _too_high(trial: Trial, start: Trial) -> bool:
    """True if the first condition, sufficient decrease, is violated."""
    return number(trial.f) > number(start.f + _DECREASE * trial.t * start.slope)


def _level(trial: Trial, start: Trial) -> bool:
    """True if the second condition, on the slope, holds."""
    return abs(number(trial.slope)) <= -_CURVATURE * number(start.slope)


def _inside(t: Scalar, one: Scalar, other: Scalar, stalled: bool) -> tuple[Scalar, bool]:
    """Return ``(t, close)``, where ``close`` says that t came close to an end.

    At an end, or twice close to one, a tenth of the interval is kept from it.
    """
    lower, upper = smaller(one, other), larger(one, other)
    margin = 0.1 * (upper - lower)
    to_upper, to_lower = number(upper) - number(t), number(t) - number(lower)
    if not min(to_upper, to_lower) < number(margin):
        return t, False
    if stalled or to_upper <= 0 or to_lower <= 0:
        return (upper - margin if abs(to_upper) < abs(to_lower) else lower + margin), False
    return t, True


def _minimum_of_cubic(
    one: Trial, other: Trial, bounds: tuple[Scalar, Scalar] | None = None
) -> Scalar:
    """Find the least value, within bounds, of the cubic through two values and slopes.

    If that polynomial has no minimum, it is the middle of the bounds.

    With the inner slope s = f'₁ + f'₂ - 3 (f₁ - f₂) / (t₁ - t₂) and r = √(s² - f'₁ f'₂), for t₁ ≤
    t₂: t₂ - (t₂ - t₁) (f'₂ + r - s) / (f'₂ - f'₁ + 2 r).
    """
    left, right = (one, other) if number(one.t) <= number(other.t) else (other, one)
    lower, upper = bounds or (left.t, right.t)
    rise, run = 3 * (one.f - other.f), one.t - other.t
    # As torch divides a number by a tensor: one rounding more, which has to be the same one.
    inner = (
        one.slope
        + other.slope
        - (rise * run.reciprocal() if isinstance(run, Tensor) else rise / run)
    )
    square = inner**2 - one.slope * other.slope
    if not number(square) >= 0:
        return (lower + upper) / 2.0
    root = safe_sqrt(square)
    part = (right.slope + root - inner) / (right.slope - left.slope + 2 * root)
    return smaller(larger(right.t - (right.t - left.t) * part, lower), upper)


def number(x: Scalar) -> float:
    """Return the value by which something is decided."""
    if not isinstance(x, Tensor):
        return float(x)
    plain = torch_private.innermost(x.detach())
    if plain.numel() != 1:
        raise InvalidInputError(
            "LBFGS inside torch.func.vmap over tasks: it decides by values how many iterations it "
            "takes, and each task decides otherwise. "
            "Write a Python loop over the tasks, or another rule of innerloop.optim"
        )
    return float(plain.item())


def smaller(a: Scalar, b: Scalar) -> Scalar:
    """Return the smaller one of two scalars, with its derivative."""
    return b if number(b) < number(a) else a


def larger(a: Scalar, b: Scalar) -> Scalar:
    """Return the larger one of two scalars, with its derivative."""
    return b if number(b) > number(a) else a
