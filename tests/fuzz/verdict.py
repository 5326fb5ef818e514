"""Compare what the library says with the truth, and count."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

import innerloop
from innerloop.strategy import Strategy
from tests.fuzz import extras, losses, models, rules
from tests.fuzz.answers import Answer, answer
from tests.fuzz.case import FINITE, FRONT_ENDS, STRATEGIES, Case, draw
from tests.fuzz.truth import Truth, World, truth, world

RIGHT, REFUSED, UNDECIDED, SILENT, BARE = "right", "refused", "undecided", "SILENT", "BARE"
PLAIN = "PLAIN"
"""The plain run raises, which no drawn case should."""
KINDS = (RIGHT, REFUSED, UNDECIDED, SILENT, BARE, PLAIN)
FINDINGS = (SILENT, BARE, PLAIN)
OFF = 1e-4
OFF_FORWARD = 1e-7


class Verdict(NamedTuple):
    """What came out of one case."""

    number: int
    case: Case
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"case {self.number}: {self.kind}: {self.reason}\n{described(self.case)}"


def described(case: Case) -> str:
    """Describe a case in a few lines, leaving out what was not drawn."""
    shown = {
        f.name: getattr(case, f.name)
        for f in dataclasses.fields(case)
        if getattr(case, f.name) != f.default
    }
    return "\n".join(f"    {name} = {value!r}" for name, value in shown.items())


def judge(seed: int, number: int, *, newest: bool = False) -> Verdict:
    """Draw one case and judge what the library says of it."""
    case = draw(seed, number, newest=newest)
    return Verdict(number, case, *judge_case(case))


def judge_case(case: Case) -> tuple[str, str]:
    """Return the kind of the verdict and the reason."""
    with quietly():
        w = world(case)
        try:
            said = answer(w)
        except innerloop.InnerLoopError as error:
            return REFUSED, f"{type(error).__name__}: {first_line(error)}"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            inside = [f for f in where if "innerloop" in f.filename and "/fuzz/" not in f.filename]
            at = f" at {inside[-1].filename.rpartition('src/')[2]}" if inside else " outside of it"
            return BARE, f"{type(error).__name__}{at}: {first_line(error)}"
        try:
            true = truth(w)
        except Exception as error:
            return PLAIN, f"{type(error).__name__} by plain torch: {first_line(error)}"
        return compared(w, said, true)


@contextmanager
def quietly() -> Iterator[None]:
    """Run one case without warnings, and in double precision: torch keeps some states in the
    default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def compared(w: World, said: Answer, true: Truth) -> tuple[str, str]:
    """Compare an answer with the truth."""
    if said.changed:
        return SILENT, f"changes the user's model: {said.changed}"
    if not math.isfinite(true.value) or not math.isfinite(true.derivative):
        return UNDECIDED, "the truth is not finite"
    if not abs(said.value - true.value) <= OFF_FORWARD * max(1.0, abs(true.value)):
        # A rule that looks at signs follows the rounding of a gradient that is zero.
        return (
            SILENT if true.decided else UNDECIDED,
            f"the outer loss is {said.value:.9g}, by torch {true.value:.9g}",
        )
    off = abs(said.derivative - true.derivative)
    if off <= OFF * max(1.0, abs(true.derivative)):
        return (RIGHT, "") if true.decided else (UNDECIDED, "")
    if not true.decided:
        return UNDECIDED, f"{said.derivative:.9g}, by differences {true.derivative:.9g}"
    return SILENT, (
        f"the derivative is {said.derivative:.9g}, by differences {true.derivative:.9g}"
    )


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:300] + " ..."


def blamed(w: World) -> dict[str, tuple[float, float]]:
    """Split a wrong derivative: input -> (what the library says, finite differences)."""
    with quietly():
        said = answer(w).parts
        return {
            name: (said[name], truth(dataclasses.replace(w, along={name: v})).derivative)
            for name, v in w.along.items()
        }


@dataclass
class Tally:
    """The verdicts of a run, counted."""

    seconds: float = 0.0
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    refusals: collections.Counter[str] = field(default_factory=collections.Counter)
    right: dict[str, collections.Counter[str]] = field(default_factory=dict)
    findings: list[Verdict] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        self.kinds[verdict.kind] += 1
        if verdict.kind == REFUSED:
            self.refusals[shortened(verdict.reason)] += 1
        if verdict.kind in FINDINGS:
            self.findings.append(verdict)
        if verdict.kind == RIGHT:
            c = verdict.case
            for what in (c.family, c.loss, c.rule, by(c.front, c.strategy), *extras.named(c)):
                self.right.setdefault(what, collections.Counter())[RIGHT] += 1

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.kinds[k]} {k}" for k in KINDS)
        rate = self.total / max(self.seconds, 1e-9)
        return f"{self.total} cases: {kinds}; {self.seconds:.0f} s, {rate:.1f} cases/s"


def by(front: str, strategy: Strategy) -> str:
    """Name a front end, with its strategy if it takes one."""
    return f"{front} {strategy!r}" if front in ("unroll", "metagradient") else front


def enrolled() -> set[str]:
    """List all that can be drawn, under the names by which `Tally.right` counts."""
    fronts = {by(front, strategy) for front in FRONT_ENDS for strategy in (*STRATEGIES, FINITE)}
    return {*models.FAMILIES, *losses.LOSSES, *rules.RULES, *fronts, *extras.enrolled()}


def shortened(reason: str) -> str:
    """Cut numbers and names out of a message, so that those of one kind count together."""
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", reason)[:110]


def cases(seed: int, numbers: Iterator[int] | range, *, newest: bool = False) -> Iterator[Verdict]:
    """Judge one case after the other, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in numbers:
            yield judge(seed, number, newest=newest)
    finally:
        torch.set_num_threads(threads)


def run(
    seed: int,
    numbers: range,
    each: Callable[[Verdict, Tally], None] = lambda verdict, tally: None,
    *,
    newest: bool = False,
) -> Tally:
    """Judge cases and count the verdicts."""
    tally, start = Tally(), time.perf_counter()
    for verdict in cases(seed, numbers, newest=newest):
        tally.seconds = time.perf_counter() - start
        tally.add(verdict)
        each(verdict, tally)
    return tally
