"""The walk-through as data: rows of (closed form, autograd, finite differences), in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

from innerloop.walkthrough import _by_autograd as by_autograd
from innerloop.walkthrough import _by_differences as by_differences
from innerloop.walkthrough import _closed_form as closed_form
from innerloop.walkthrough._quantities import (
    ManySteps,
    OneStep,
    System,
    TwoModels,
    along,
    subscript,
)

AUTOGRAD_TOLERANCE = 1e-12
"""Both columns are float64 arithmetic on the same formulas: they may differ by rounding alone."""
FINITE_TOLERANCE = 1e-6
"""Wide enough for the rounding of a difference quotient; a missing term is far larger."""
_MODULES = (closed_form, by_autograd, by_differences)
STEPS = 10
SHOWN = (1, 2, 3, 5, 7, 10)
"""The steps k of a long run that get a row."""
SETTLES, OVERSHOOTS = 0.5, 2.8
"""Learning rates of the long runs: one rolls into the valley, one leaps over it to and fro."""


class Row(NamedTuple):
    """One quantity, computed three times."""

    name: str
    closed: float
    autograd: float
    finite: float

    @property
    def autograd_error(self) -> float:
        """Return the distance to the closed form, relative where that is larger than one."""
        return abs(self.autograd - self.closed) / max(1.0, abs(self.closed))

    @property
    def finite_error(self) -> float:
        """Return the distance to the closed form, relative where that is larger than one."""
        return abs(self.finite - self.closed) / max(1.0, abs(self.closed))

    @property
    def agrees(self) -> bool:
        """True if all three columns are the same number; a nan never agrees."""
        return self.autograd_error <= AUTOGRAD_TOLERANCE and self.finite_error <= FINITE_TOLERANCE


class Block(NamedTuple):
    """A table with one sentence that says what it shows."""

    title: str
    sentence: str
    rows: tuple[Row, ...]
    note: str = ""
    bars: bool = False


class LongRun(NamedTuple):
    """A loop of many steps, as autograd sees it: what the picture draws."""

    system: System
    steps: ManySteps


@dataclass(frozen=True)
class Walkthrough:
    """Everything that was computed; nothing is formatted yet."""

    system: System
    blocks: tuple[Block, ...]
    settles: LongRun
    overshoots: LongRun

    @property
    def rows(self) -> tuple[Row, ...]:
        """Return the rows of all blocks."""
        return tuple(row for block in self.blocks for row in block.rows)

    @property
    def agrees(self) -> bool:
        """True if every row agrees."""
        return all(row.agrees for row in self.rows)


def run(system: System | None = None) -> Walkthrough:
    """Compute the whole walk-through.

    Args:
        system: The numbers of the problem; the default is the one the project started from.
    """
    system = system or System()
    a, b = system.start
    # The second long run begins at the mirrored point for the picture's sake: two paths that do not
    # cover each other.
    settles, overshoots = (
        replace(system, rate=SETTLES),
        replace(system, rate=OVERSHOOTS, start=(b, a)),
    )
    short, long, longer = _columns(system), _long_columns(settles), _long_columns(overshoots)
    blocks = (
        _inner_step(short),
        _outer_gradient(short),
        _two_models(system),
        _many_steps(
            f"4  {STEPS} steps with learning rate {SETTLES:g}: d θₖ / d θ₀ across and along the "
            "valley",
            "The minima form a ring, the valley of the loss: a nudge of θ₀ across it fades, one "
            "along it stays.",
            settles,
            long,
        ),
        _many_steps(
            f"5  {STEPS} steps with learning rate {OVERSHOOTS:g}, from the mirrored start ({b:g}, "
            f"{a:g})",
            "The steps leap over the valley to and fro: a nudge of θ₀ across it flips its sign "
            "and grows.",
            overshoots,
            longer,
        ),
    )
    return Walkthrough(
        system, blocks, LongRun(settles, long.autograd), LongRun(overshoots, longer.autograd)
    )


Q = TypeVar("Q", OneStep, TwoModels, ManySteps)


@dataclass(frozen=True)
class _Columns(Generic[Q]):
    """One record, filled in three times."""

    closed: Q
    autograd: Q
    finite: Q

    def read(self, quantity: Callable[[Q], float]) -> tuple[float, float, float]:
        return quantity(self.closed), quantity(self.autograd), quantity(self.finite)


_ONE_STEP: tuple[tuple[str, Callable[[OneStep], float]], ...] = (
    ("loss L", lambda q: q.loss),
    ("d L / d ŷ", lambda q: q.loss_by_prediction),
    ("d L / d a₀", lambda q: q.gradient[0]),
    ("d L / d b₀", lambda q: q.gradient[1]),
    ("a₁", lambda q: q.updated[0]),
    ("b₁", lambda q: q.updated[1]),
    ("d a₁ / d a₀", lambda q: q.jacobian[0][0]),
    ("d a₁ / d b₀", lambda q: q.jacobian[0][1]),
    ("d b₁ / d a₀", lambda q: q.jacobian[1][0]),
    ("d b₁ / d b₀", lambda q: q.jacobian[1][1]),
)
_OUTER: tuple[tuple[str, Callable[[OneStep], float]], ...] = (
    ("test loss TL", lambda q: q.outer_loss),
    ("d TL / d a₁", lambda q: q.outer_by_updated[0]),
    ("d TL / d b₁", lambda q: q.outer_by_updated[1]),
    ("  d TL/d a₁ · d a₁/d a₀", lambda q: q.paths[0][0]),
    ("+ d TL/d b₁ · d b₁/d a₀", lambda q: q.paths[1][0]),
    ("= d TL / d a₀", lambda q: q.outer_gradient[0]),
    ("  d TL/d a₁ · d a₁/d b₀", lambda q: q.paths[0][1]),
    ("+ d TL/d b₁ · d b₁/d b₀", lambda q: q.paths[1][1]),
    ("= d TL / d b₀", lambda q: q.outer_gradient[1]),
    ("a after the outer step", lambda q: q.final[0]),
    ("b after the outer step", lambda q: q.final[1]),
)
_TWO_MODELS: tuple[tuple[str, Callable[[TwoModels], float]], ...] = (
    ("d TL / d a of M", lambda q: q.outer_gradient[0]),
    ("d TL / d b of M", lambda q: q.outer_gradient[1]),
    ("a of M, after its step", lambda q: q.final[0]),
    ("b of M, after its step", lambda q: q.final[1]),
    ("a of m, not moved", lambda q: q.task_model[0]),
    ("b of m, not moved", lambda q: q.task_model[1]),
)


def _columns(system: System) -> _Columns[OneStep]:
    return _Columns(*(module.one_step(system) for module in _MODULES))


def _long_columns(system: System) -> _Columns[ManySteps]:
    return _Columns(*(module.many_steps(system, STEPS) for module in _MODULES))


def _inner_step(columns: _Columns[OneStep]) -> Block:
    return Block(
        "1  One inner step",
        "The gradient depends on the place where it is taken: a nudge of a₀ alone moves both a₁ "
        "and b₁.",
        _rows(_ONE_STEP, columns),
    )


def _outer_gradient(columns: _Columns[OneStep]) -> Block:
    closed = columns.closed
    (g_a, g_b), (by_a, by_b) = closed.outer_by_updated, (row[0] for row in closed.jacobian)
    return Block(
        "2  The outer gradient, split into its paths",
        "The test loss TL of (a₁, b₁) reaches a₀ through a₁ and through b₁; the two paths add up.",
        _rows(_OUTER, columns),
        f"d TL / d a₀  =  ({g_a:.8f}) · ({by_a:.2f}) + ({g_b:.8f}) · ({by_b:.2f})  =  "
        f"{closed.outer_gradient[0]:.10f}",
    )


def _two_models(system: System) -> Block:
    return Block(
        "3  Two models",
        "Task model m takes its inner step from the parameters of meta-model M: the gradient "
        "arrives at M.",
        _rows(_TWO_MODELS, _Columns(*(module.two_models(system) for module in _MODULES))),
    )


def _many_steps(title: str, sentence: str, system: System, columns: _Columns[ManySteps]) -> Block:
    across, valley = system.directions
    reach = [
        (
            f"{name} d θ{subscript(k)} / d θ₀",
            lambda q, k=k, to=direction: along(q.from_start[k], to),
        )
        for name, direction in (("across", across), ("along ", valley))
        for k in SHOWN
    ]
    last = subscript(STEPS)
    entries = [
        (f"d {p}{last} / d {q}₀", lambda q, i=i, j=j: q.from_start[STEPS][i][j])
        for i, p in enumerate("ab")
        for j, q in enumerate("ab")
    ]
    return Block(title, sentence, _rows([*reach, *entries], columns), bars=True)


def _rows(
    names: Iterable[tuple[str, Callable[[Q], float]]], columns: _Columns[Q]
) -> tuple[Row, ...]:
    return tuple(Row(name, *columns.read(quantity)) for name, quantity in names)
