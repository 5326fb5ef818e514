"""The first column: formulas derived by hand, evaluated in plain floats (no torch).

The derivation is written down in ``docs/devnotes/walkthrough.md``.
"""

from __future__ import annotations

from innerloop.walkthrough._quantities import (
    IDENTITY,
    ManySteps,
    Matrix,
    OneStep,
    Pair,
    System,
    TwoModels,
)


def residual(system: System, at: Pair) -> float:
    r"""Compute :math:`r = \hat y - y = (a^2 + b^2)\,x - y`, which is also dL/dŷ."""
    a, b = at
    return (a**2 + b**2) * system.x - system.y


def loss(system: System, at: Pair) -> float:
    r"""Compute :math:`L = \tfrac12 r^2`."""
    return 0.5 * residual(system, at) ** 2


def gradient(system: System, at: Pair) -> Pair:
    r"""Compute :math:`\nabla L = 2xr\,(a, b)`: always on the line through the origin."""
    a, b = at
    factor = 2 * system.x * residual(system, at)
    return factor * a, factor * b


def step(system: System, at: Pair) -> Pair:
    r"""Compute :math:`\theta' = \theta - \eta \nabla L(\theta)`."""
    a, b = at
    by_a, by_b = gradient(system, at)
    return a - system.rate * by_a, b - system.rate * by_b


def step_jacobian(system: System, at: Pair) -> Matrix:
    r"""Compute :math:`d\theta'/d\theta = (1 - 2\eta x r)\, I - 4 \eta x^2\, \theta\theta^\top`."""
    a, b = at
    keep = 1 - 2 * system.rate * system.x * residual(system, at)
    bend = 4 * system.rate * system.x**2
    return (keep - bend * a * a, -bend * a * b), (-bend * b * a, keep - bend * b * b)


def one_step(system: System) -> OneStep:
    """Compute one inner step and one outer step."""
    start = system.start
    updated, jacobian = step(system, start), step_jacobian(system, start)
    by_updated = gradient(system, updated)
    paths = tuple((g * row[0], g * row[1]) for g, row in zip(by_updated, jacobian, strict=True))
    outer = (paths[0][0] + paths[1][0], paths[0][1] + paths[1][1])
    return OneStep(
        loss=loss(system, start),
        loss_by_prediction=residual(system, start),
        gradient=gradient(system, start),
        updated=updated,
        jacobian=jacobian,
        outer_loss=loss(system, updated),
        outer_by_updated=by_updated,
        paths=(paths[0], paths[1]),
        outer_gradient=outer,
        final=(start[0] - system.rate * outer[0], start[1] - system.rate * outer[1]),
    )


def two_models(system: System) -> TwoModels:
    """Compute the same with two models: M moves as the one model did, m stays.

    The formulas do not know which object holds the parameters.
    """
    one = one_step(system)
    return TwoModels(one.outer_gradient, one.final, task_model=system.start)


def many_steps(system: System, steps: int) -> ManySteps:
    """Multiply the steps' 2x2 Jacobians, the newest on the left: the chain rule over a loop."""
    points = [system.start]
    for _ in range(steps):
        points.append(step(system, points[-1]))
    jacobians = [step_jacobian(system, point) for point in points[:-1]]
    from_start, to_end = [IDENTITY], [IDENTITY]
    for jacobian in jacobians:
        from_start.append(_product(jacobian, from_start[-1]))
    for jacobian in reversed(jacobians):
        to_end.append(_product(to_end[-1], jacobian))
    return ManySteps(tuple(points), tuple(from_start), tuple(reversed(to_end)))


def _product(left: Matrix, right: Matrix) -> Matrix:
    def entry(i: int, j: int) -> float:
        return left[i][0] * right[0][j] + left[i][1] * right[1][j]

    return (entry(0, 0), entry(0, 1)), (entry(1, 0), entry(1, 1))
