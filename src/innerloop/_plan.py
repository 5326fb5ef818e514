"""``plan``: the predicted cost of each strategy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from innerloop._batches import batches_of
from innerloop._carry import Carry
from innerloop._problem import Problem, check_problem
from innerloop._types import HyperTree, Params
from innerloop._unroll import check_strategy
from innerloop._utils import tree
from innerloop._utils.random_state import restored_on_error
from innerloop._utils.text_table import table
from innerloop.errors import InnerLoopError, InvalidInputError
from innerloop.strategy._base import BOTH, Loop, Measure, Strategy
from innerloop.strategy._checkpointed import Checkpointed, in_bytes
from innerloop.strategy._first_order import FirstOrder
from innerloop.strategy._forward_mode import ForwardMode
from innerloop.strategy._measure import MeasuredLoop, bytes_of
from innerloop.strategy._store_all import StoreAll
from innerloop.strategy._truncated import Truncated

FEW = 16
"""Up to so many elements of hyper forward mode is worth a line."""


class PlanRow(NamedTuple):
    """One strategy's forecast for T steps.

    Attributes:
        strategy: the strategy.
        seconds: time of the loop and its backward pass.
        bytes: most memory at once, above what is there before.
        problem: why it cannot be used, or nothing.
    """

    strategy: Strategy
    seconds: float
    bytes: float
    problem: str = ""


class Plan(NamedTuple):
    """Forecasts for a loop of T steps; prints as a table.

    Attributes:
        steps: T.
        rows: one per strategy.
        memory: the budget in bytes, or None.
        state: bytes of one state (P + S).
        batch: bytes of one batch.
        iterator: True if the batches come from an iterator, so that a replay needs them kept.
    """

    steps: int
    rows: tuple[PlanRow, ...]
    memory: int | None
    state: int
    batch: int
    iterator: bool

    @property
    def best(self) -> Strategy:
        """Return the fastest exact strategy that fits and differentiates params and hyper.

        Raises:
            InvalidInputError: none fits.
        """
        exact = [
            r
            for r in self.rows
            if r.strategy.exact and r.strategy.differentiates == BOTH and not r.problem
        ]
        able = [r for r in exact if self.fits(r)]
        if not able:
            least = min(exact, key=lambda r: r.bytes, default=None)
            if least is None:
                raise InvalidInputError(
                    "no exact strategy among those planned can differentiate this loop: print the "
                    "plan"
                )
            raise InvalidInputError(
                f"no exact strategy fits into {shown_bytes(self.memory or 0)}: {least.strategy} "
                f"needs {shown_bytes(least.bytes)}"
            )
        return min(able, key=lambda r: r.seconds).strategy

    def fits(self, row: PlanRow) -> bool:
        """True if a row is within the budget."""
        return not row.problem and (self.memory is None or row.bytes <= self.memory)

    def __str__(self) -> str:
        budget = "" if self.memory is None else f", budget {shown_bytes(self.memory)}"
        lines = [
            f"{self.steps} steps, one state {shown_bytes(self.state)}, "
            f"one batch {shown_bytes(self.batch)}{budget}",
            table(
                [self._cells(row) for row in self.rows],
                header=["strategy", "exact", "differentiates", "time", "memory", "fits"],
            ),
        ]
        if self.iterator:
            lines.append(
                "An iterator's batches are kept for the replay: "
                f"{shown_bytes(self.batch * self.steps)}, contained in the above"
            )
        return "\n".join(lines)

    def _cells(self, row: PlanRow) -> list[str]:
        exact = "yes" if row.strategy.exact else "no"
        names = ", ".join(sorted(row.strategy.differentiates, reverse=True))
        cells = [repr(row.strategy), exact, names]
        if row.problem:
            return [*cells, "", "", f"not possible: {row.problem}"]
        fits = "yes" if self.fits(row) else "no"
        return [*cells, shown_seconds(row.seconds), shown_bytes(row.bytes), fits]


def plan(
    problem: Problem,
    params: Params | Carry | None,
    batches: object,
    *,
    hyper: HyperTree = None,
    steps: int | None = None,
    memory: float | str | None = None,
    strategies: Sequence[Strategy] | None = None,
) -> Plan:
    """Measure a few steps, and predict the cost of the whole loop under each strategy.

    Args:
        problem, params, batches, hyper: as in `innerloop.unroll`. Of an iterator the first batch is
            drawn (and lost to it).
        steps: T; needed where ``batches`` does not say it.
        memory: a budget, ``"4GB"`` or a number of bytes, above what is there before the loop runs.
        strategies: which ones; default: all kinds, with several numbers of slots.

    Returns:
        A `Plan`: ``print`` it; ``plan.best`` is the fastest exact strategy that fits.

    Cost: about a hundred steps.

    Example:
        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"].square().sum(), innerloop.optim.adam()
        ... )
        >>> forecast = innerloop.plan(
        ...     problem, {"w": torch.zeros(250_000)}, None, steps=1000, memory="500MB"
        ... )
        >>> forecast.state  # parameters and two moments, in float32
        3000000
        >>> [
        ...     (row.strategy, forecast.fits(row))
        ...     for row in forecast.rows
        ...     if row.strategy == innerloop.StoreAll()
        ... ]
        [(StoreAll(), False)]
    """
    check_problem(problem)
    data = batches_of(batches, steps)
    if data.steps is None:
        raise InvalidInputError("the length of an iterator is not known: write steps=T")
    if data.steps == 0:
        raise InvalidInputError("a loop of no steps costs nothing: there is nothing to plan")
    for strategy in strategies or ():
        check_strategy(strategy, "strategies has")
    total, budget = data.steps, None if memory is None else in_bytes(memory)
    with restored_on_error():
        loop = Loop(problem, problem.init(params), hyper, data)
        size = bytes_of(data.first(loop.start.params, hyper, loop.start.time))
        kept = size * total if data.single_pass else 0
        measure = MeasuredLoop(loop, total, kept)
        chosen = default_strategies(loop, total, budget) if strategies is None else strategies
        row = _row_or_reason if strategies is None else _row
        rows = tuple(row(strategy, measure) for strategy in chosen)
    return Plan(total, rows, budget, measure.state_bytes, size, data.single_pass)


def default_strategies(loop: Loop, steps: int, budget: int | None) -> list[Strategy]:
    """Return all kinds of strategies, with several numbers of slots."""
    slots: list[int | str | None] = ["all", None, math.ceil(2 * math.sqrt(steps))]
    budgeted: list[Strategy] = []
    if budget is not None:
        try:
            Checkpointed(memory=budget).slots_for(loop, steps)
            budgeted = [Checkpointed(memory=budget)]
        except InvalidInputError:  # not one state fits; the table shows what the others need
            pass
    elements = sum(x.numel() for x in tree.tensors(loop.hyper) if tree.differentiable(x))
    forward = [ForwardMode()] if 0 < elements <= FEW else []
    replayed = [Checkpointed(slots=count) for count in slots]
    return [
        StoreAll(),
        *replayed,
        *budgeted,
        Truncated(max(steps // 10, 1)),
        FirstOrder(),
        *forward,
    ]


def _row(strategy: Strategy, measure: Measure) -> PlanRow:
    return PlanRow(strategy, *strategy.forecast(measure))


def _row_or_reason(strategy: Strategy, measure: Measure) -> PlanRow:
    """Return `_row`, or why the strategy cannot be used for this loop."""
    try:
        return _row(strategy, measure)
    except (InnerLoopError, RuntimeError) as error:
        return PlanRow(strategy, math.inf, math.inf, str(error).partition(":")[0][:100])


def shown_bytes(count: float) -> str:
    """Return a number of bytes as text: ``"1.2 GB"``."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def shown_seconds(seconds: float) -> str:
    """Return a time as text: ``"1.2 s"``."""
    return (
        f"{seconds * 1000:.3g} ms"
        if seconds < 1
        else f"{seconds:.3g} s"
        if seconds < 100
        else f"{seconds / 60:.3g} min"
    )
