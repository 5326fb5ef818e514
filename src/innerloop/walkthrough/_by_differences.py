r"""The third column: a plain torch.optim loop, run again from nudged starts, no innerloop.

Derivatives are four-point central differences,

.. math:: f'(p) \approx \frac{8\,[f(p+h) - f(p-h)] - [f(p+2h) - f(p-2h)]}{12\,h},

whose error is :math:`h^4 f^{(5)}/30` from the formula and about :math:`10^{-16} |f| / h` from
rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from innerloop.walkthrough._quantities import ManySteps, Matrix, OneStep, Pair, System, TwoModels

NUDGE = 1e-4
"""h. Ten chaotic steps have fifth derivatives of order 1e6: at 1e-4 errors stay below 1e-9."""


def train(system: System, start: Pair, steps: int) -> list[Pair]:
    """Return (a, b) before the first step and after each, by an ordinary training loop."""
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in start)
    optimizer = torch.optim.SGD([a, b], lr=system.rate)
    points = [(a.item(), b.item())]
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * ((a**2 + b**2) * system.x - system.y) ** 2).backward()
        optimizer.step()
        points.append((a.item(), b.item()))
    return points


def predict(system: System, at: Pair) -> float:
    """Compute the prediction ŷ."""
    return (at[0] ** 2 + at[1] ** 2) * system.x


def loss_of(system: System, prediction: float) -> float:
    """Compute the loss of a prediction."""
    return 0.5 * (prediction - system.y) ** 2


def one_step(system: System) -> OneStep:
    """Take values from one run, derivatives from eight nudged ones."""

    def loss(at: Pair) -> float:
        return loss_of(system, predict(system, at))

    def train_once(at: Pair) -> Pair:
        return train(system, at, steps=1)[1]

    start = system.start
    updated = train_once(start)
    jacobian = _jacobian(train_once, start)
    by_updated = _gradient(loss, updated)
    outer_gradient = _gradient(lambda at: loss(train_once(at)), start)
    return OneStep(
        loss=loss(start),
        loss_by_prediction=_derivative(lambda y: (loss_of(system, y),), predict(system, start))[0],
        gradient=_gradient(loss, start),
        updated=updated,
        jacobian=jacobian,
        outer_loss=loss(updated),
        outer_by_updated=by_updated,
        paths=(_scaled(jacobian[0], by_updated[0]), _scaled(jacobian[1], by_updated[1])),
        outer_gradient=outer_gradient,
        final=_outer_step(system, outer_gradient),
    )


def two_models(system: System) -> TwoModels:
    """Start the task model at M's parameters, nudge M, see what the outer loss does."""

    def outer_loss(at: Pair) -> float:
        return loss_of(system, predict(system, train(system, at, steps=1)[1]))

    outer_gradient = _gradient(outer_loss, system.start)
    return TwoModels(outer_gradient, _outer_step(system, outer_gradient), task_model=system.start)


def many_steps(system: System, steps: int) -> ManySteps:
    """Differentiate every later point by the first one, and the last one by each."""

    def influence(at: Pair, count: int) -> Matrix:
        return _jacobian(lambda start: train(system, start, count)[-1], at)

    points = train(system, system.start, steps)
    return ManySteps(
        points=tuple(points),
        from_start=tuple(influence(points[0], k) for k in range(steps + 1)),
        to_end=tuple(influence(point, steps - t) for t, point in enumerate(points)),
    )


def _outer_step(system: System, gradient: Pair) -> Pair:
    parameters = [
        torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in system.start
    ]
    for parameter, value in zip(parameters, gradient, strict=True):
        parameter.grad = torch.tensor(value, dtype=torch.float64)
    torch.optim.SGD(parameters, lr=system.rate).step()
    return parameters[0].item(), parameters[1].item()


def _derivative(function: Callable[[float], tuple[float, ...]], at: float) -> tuple[float, ...]:
    outer_low, low, high, outer_high = (function(at + k * NUDGE) for k in (-2, -1, 1, 2))
    return tuple(
        (8 * (p1 - m1) - (p2 - m2)) / (12 * NUDGE)
        for m2, m1, p1, p2 in zip(outer_low, low, high, outer_high, strict=True)
    )


def _jacobian(function: Callable[[Pair], Pair], at: Pair) -> Matrix:
    by_a = _derivative(lambda a: function((a, at[1])), at[0])
    by_b = _derivative(lambda b: function((at[0], b)), at[1])
    return (by_a[0], by_b[0]), (by_a[1], by_b[1])


def _gradient(function: Callable[[Pair], float], at: Pair) -> Pair:
    (by_a,) = _derivative(lambda a: (function((a, at[1])),), at[0])
    (by_b,) = _derivative(lambda b: (function((at[0], b)),), at[1])
    return by_a, by_b


def _scaled(pair: Pair, factor: float) -> Pair:
    return factor * pair[0], factor * pair[1]
