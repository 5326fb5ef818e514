"""What is computed three times: the problem, and the records that every column fills in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

Pair: TypeAlias = tuple[float, float]
"""One number for a, one for b."""
Matrix: TypeAlias = tuple[Pair, Pair]
"""A derivative of a later (a, b) with respect to an earlier one: ``matrix[later][earlier]``."""
IDENTITY: Matrix = ((1.0, 0.0), (0.0, 1.0))


@dataclass(frozen=True)
class System:
    r"""The smallest model with a product in it: :math:`\hat y = (a^2 + b^2)\, x`.

    The loss is :math:`\tfrac12 (\hat y - y)^2`. The inner loop is plain SGD. The same example
    serves as the test example of the outer loss, and the outer step is one SGD step too.

    Args:
        start: The parameters (a₀, b₀).
        true: The parameters that made the target y.
        x: The one input.
        rate: The learning rate of the inner and of the outer step.
    """

    start: Pair = (2.0, 3.0)
    true: Pair = (3.0, 4.0)
    x: float = 0.1
    rate: float = 1.0

    @property
    def y(self) -> float:
        """Return the target."""
        return (self.true[0] ** 2 + self.true[1] ** 2) * self.x

    @property
    def directions(self) -> tuple[Pair, Pair]:
        """Return two unit vectors: across the valley of the loss, and along it.

        Across the valley is the direction from the origin through the start.
        """
        a, b = self.start
        length = math.hypot(a, b)
        return (a / length, b / length), (-b / length, a / length)


class OneStep(NamedTuple):
    """One inner step, an outer loss at the updated parameters, one outer step."""

    loss: float
    loss_by_prediction: float
    gradient: Pair
    updated: Pair
    jacobian: Matrix  # d (a1, b1) / d (a0, b0)
    outer_loss: float
    outer_by_updated: Pair
    paths: Matrix  # d TL / d later * d later / d earlier
    outer_gradient: Pair
    final: Pair


class TwoModels(NamedTuple):
    """The outer gradient of task model m, received by meta-model M."""

    outer_gradient: Pair
    final: Pair  # of M
    task_model: Pair  # m's own parameters afterwards: they have not moved


class ManySteps(NamedTuple):
    """A longer inner loop of K steps."""

    points: tuple[Pair, ...]  # K + 1 of them
    from_start: tuple[Matrix, ...]  # d theta_k / d theta_0 for k = 0 ... K
    to_end: tuple[Matrix, ...]  # d theta_K / d theta_t for t = 0 ... K


def along(matrix: Matrix, direction: Pair) -> float:
    r"""Return how far a nudge along a unit vector still reaches along it: :math:`u^\top J u`."""
    (aa, ab), (ba, bb) = matrix
    u, v = direction
    return u * (aa * u + ab * v) + v * (ba * u + bb * v)


def subscript(number: int) -> str:
    """Write the digits as small letters below the line."""
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
