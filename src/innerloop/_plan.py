"""What each strategy would cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from innerloop._batches import Drawn, batches_of
from innerloop._carry import Carry
from innerloop._problem import Problem
from innerloop._utils import tree
from innerloop._utils.random_state import restored_on_error
from innerloop.errors import InnerLoopError, InvalidInputError
from innerloop.strategy._base import Loop, Strategy
from innerloop.strategy._checkpointed import Checkpointed, in_bytes
from innerloop.strategy._engine import schedule
from innerloop.strategy._first_order import FirstOrder
from innerloop.strategy._forecast import Cost
from innerloop.strategy._forward_mode import ForwardMode
from innerloop.strategy._measure import BOTH, measure, state_bytes
from innerloop.strategy._store_all import StoreAll
from innerloop.strategy._truncated import Truncated

NOTHING: frozenset[str] = frozenset()
FEW = 16
"""Up to so many elements of hyper forward mode is worth a line."""


class Row(NamedTuple):
    """One strategy's forecast for T steps.

    Attributes:
        strategy: the strategy.
        seconds: of the loop and its backward pass.
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
        iterator: whether the batches come from an iterator, so that a replay needs them kept.
    """

    steps: int
    rows: tuple[Row, ...]
    memory: int | None
    state: int
    batch: int
    iterator: bool

    @property
    def best(self) -> Strategy:
        """The fastest exact strategy that fits and differentiates params and hyper.

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

    def fits(self, row: Row) -> bool:
        """Whether a row is within the budget."""
        return not row.problem and (self.memory is None or row.bytes <= self.memory)

    def __str__(self) -> str:
        budget = "" if self.memory is None else f", budget {shown_bytes(self.memory)}"
        head = f"{self.steps} steps, one state {shown_bytes(self.state)}, one batch {shown_bytes(self.batch)}{budget}"
        table = [("strategy", "exact", "differentiates", "time", "memory", "fits")]
        for row in self.rows:
            names = ", ".join(sorted(row.strategy.differentiates, reverse=True))
            measured = (
                shown_seconds(row.seconds),
                shown_bytes(row.bytes),
                "yes" if self.fits(row) else "no",
            )
            numbers = measured if not row.problem else ("", "", f"not possible: {row.problem}")
            table.append(
                (repr(row.strategy), "yes" if row.strategy.exact else "no", names, *numbers)
            )
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        if self.iterator:
            lines.append(
                "An iterator's batches are kept for the replay: "
                f"{shown_bytes(self.batch * self.steps)}, contained in the above"
            )
        return "\n".join([head, *lines])


def plan(
    problem: Problem,
    params: Mapping[str, Tensor] | Carry,
    batches: Any,
    *,
    hyper: Any = None,
    steps: int | None = None,
    memory: float | str | None = None,
    strategies: Sequence[Strategy] | None = None,
) -> Plan:
    """Measure a few steps, and say what each strategy would cost for the whole loop.

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
    data = batches_of(batches, steps)
    if data.steps is None:
        raise InvalidInputError("the length of an iterator is not known: write steps=T")
    if data.steps == 0:
        raise InvalidInputError("a loop of no steps costs nothing: there is nothing to plan")
    for strategy in strategies or ():
        if not isinstance(strategy, Strategy):
            raise InvalidInputError(
                f"strategies has {strategy!r}: write instances, for example [innerloop.StoreAll()]"
            )
    total, budget = data.steps, None if memory is None else in_bytes(memory)
    with restored_on_error():
        loop = Loop(problem, problem.init(params), hyper, data)
        state = state_bytes(loop)
        batch = data.peek() if isinstance(data, Drawn) else data.at(loop.start.params, hyper, 0)
        size = sum(x.numel() * x.element_size() for x in tree.tensors(batch))
        chosen = _usual(loop, total, budget) if strategies is None else strategies
        forecast = _Forecast(loop, total, size * total if isinstance(data, Drawn) else 0)
        rows = tuple(
            forecast.row_or_reason(strategy) if strategies is None else forecast.row(strategy)
            for strategy in chosen
        )
    return Plan(total, rows, budget, state, size, isinstance(data, Drawn))


def _usual(loop: Loop, steps: int, budget: int | None) -> list[Strategy]:
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


class _Forecast:
    """Draws lines through a few steps, each kind of strategy measured once.

    Args:
        loop: the loop.
        steps: T.
        spilled: bytes of batches that have to be kept for a replay.
    """

    def __init__(self, loop: Loop, steps: int, spilled: int) -> None:
        self.loop = loop
        self.steps = steps
        self.spilled = spilled
        self.state = state_bytes(loop)
        self._known: dict[tuple[Strategy, frozenset[str]], Cost] = {}

    def row_or_reason(self, strategy: Strategy) -> Row:
        """`row`, or why the strategy cannot be used for this loop."""
        try:
            return self.row(strategy)
        except (InnerLoopError, RuntimeError) as error:
            return Row(strategy, math.inf, math.inf, str(error).partition(":")[0][:100])

    def row(self, strategy: Strategy) -> Row:
        """The forecast for one strategy."""
        steps = self.steps
        if isinstance(strategy, Checkpointed):
            return self._replayed(strategy)
        if isinstance(strategy, Truncated):
            late = self._cost(StoreAll())
            last = min(strategy.last, steps)
            seconds = self._cost(StoreAll(), NOTHING).seconds.each * (steps - last)
            return Row(strategy, seconds + late.seconds.at(last), late.bytes.at(last))
        # Hyper-parameters inside the loss are not for FirstOrder, which raises.
        cost = self._cost(
            strategy, frozenset({"params"}) if isinstance(strategy, FirstOrder) else BOTH
        )
        # What these keep per step are the numbers of the losses.
        constant = isinstance(strategy, ForwardMode)
        return Row(strategy, cost.seconds.at(steps), cost.bytes.at(1 if constant else steps))

    def _replayed(self, strategy: Checkpointed) -> Row:
        every = dataclasses.replace(strategy, slots="all", memory=None)
        cost, advance = self._cost(every), self._cost(StoreAll(), NOTHING).seconds.each
        slots = strategy.slots_for(self.loop, self.steps)
        again = schedule.replays(self.steps, slots) if slots < self.steps else 0
        # The line starts from one step, with its state; it grows by what is kept of each.
        kept = self.state * slots + max(cost.bytes.each - self.state, 0) * (
            self.steps if strategy.save == "gradients" else 0
        )
        working = max(cost.bytes.at(1) - self.state, 0)
        return Row(
            strategy, cost.seconds.at(self.steps) + again * advance, kept + working + self.spilled
        )

    def _cost(self, strategy: Strategy, wrt: frozenset[str] = BOTH) -> Cost:
        key = strategy, wrt
        if key not in self._known:
            self._known[key] = measure(self.loop, strategy, wrt=wrt)
        return self._known[key]


def shown_bytes(count: float) -> str:
    """``"1.2 GB"``."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def shown_seconds(seconds: float) -> str:
    """``"1.2 s"``."""
    return (
        f"{seconds * 1000:.3g} ms"
        if seconds < 1
        else f"{seconds:.3g} s"
        if seconds < 100
        else f"{seconds / 60:.3g} min"
    )
