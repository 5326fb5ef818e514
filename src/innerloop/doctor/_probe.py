r"""The probe of every derivative of an operation.

Each derivative is taken along fixed directions v and w in which no entry is zero, so that one
number tells of all entries:

.. math::
    \text{first, forward: } \partial_v s, \qquad
    \text{second, mixed, func: } \partial_w \partial_v s,

where s is a smooth scalar of the operation's output. Truth is a difference of fourth order: of s
for the first derivative, of the gradient for the second, of the second derivative for the third
(which a loop inside a loop needs).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from innerloop._inner_gradient import graph
from innerloop.doctor._cases.all_cases import all_cases
from innerloop.doctor._cases.case import Case, linear, noise, value
from innerloop.errors import NotDifferentiableError
from innerloop.nn._derivative_order import any_order
from innerloop.nn._mode import replacing

Verdict = Literal["right", "missing", "wrong", "not finite", "refused"]
DERIVATIVES = ("first", "second", "forward", "mixed", "func", "back", "third")
"""Reverse mode; reverse over reverse; forward mode; forward over reverse; ``func.grad`` of
``func.grad``; reverse over forward; reverse mode three times."""
TOLERANCE = 1e-6
_grad: Any = torch.func.grad
_jvp: Any = torch.func.jvp
Scalar = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Finding:
    """The result of the probe of one case.

    Attributes:
        case: the case.
        torch: the verdict on each derivative as PyTorch gives it; those that were not examined are
            absent.
        ours: the verdicts inside innerloop's loops.
        notes: for each derivative that is not right, PyTorch's error or the numbers.
    """

    case: Case
    torch: Mapping[str, Verdict]
    ours: Mapping[str, Verdict]
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def supported(self) -> bool:
        """Return True if training through the operation can be differentiated in reverse mode."""
        return self.case.smooth and self.ours["first"] == "right" and self.ours["second"] == "right"

    @property
    def silent(self) -> bool:
        """Return True if innerloop would let a wrong derivative pass."""
        return "wrong" in self.ours.values()

    @property
    def action(self) -> str:
        """Say what innerloop does about what PyTorch lacks."""
        lacking = _lacking(self.torch)
        left = [d for d in lacking if self.ours.get(d, "right") != "right"]
        if self.silent:
            return "SILENT"
        if not lacking:
            return ""
        if not left:
            return "replaced"
        if left == ["back"]:
            return "raises for back, else right"
        if all(self.ours[d] == "not finite" for d in left):
            return "not finite there"
        if not set(left) & {"first", "second", "third"} and set(lacking) & {"first", "second"}:
            return "replaced in reverse mode"
        if any(self.ours[d] == "refused" for d in left):
            return "raises"
        if not set(left) & {"first", "second", "third"}:
            return 'raises, product="reverse" is right'
        return "PyTorch raises"


def examine_case(case: Case, device: str = "cpu") -> Finding:
    """Probe one case, first plainly and, if anything is lacking, then as innerloop runs it."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        plain, notes = _Probe(case, device, ours=False).run()
        if not _lacking(plain):
            return Finding(case, plain, plain)
        ours, _ = _Probe(case, device, ours=True).run()
    return Finding(case, plain, ours, notes)


def examine_all(device: str = "cpu") -> Iterator[Finding]:
    """Probe every case."""
    for case in all_cases():
        yield examine_case(case, device)


def _lacking(verdicts: Mapping[str, Verdict]) -> list[str]:
    """List the derivatives that are not right.

    Reverse over forward mode, which no strategy takes, counts only where it is wrong.
    """
    fine = {"back": ("right", "missing", "not finite")}
    return [d for d in DERIVATIVES if verdicts.get(d, "right") not in fine.get(d, ("right",))]


class _Probe:
    def __init__(self, case: Case, device: str, ours: bool) -> None:
        self.case, self.ours = case, ours
        self.module = case.module().to(device)
        self.names = [name for name, _ in self.module.named_parameters()]
        self.at = [p.detach().clone() for p in self.module.parameters()]
        self.buffers = {name: b.detach().clone() for name, b in self.module.named_buffers()}
        self.v, self.w, self.u = (
            [noise(*p.shape, phase=s + i).to(p) for i, p in enumerate(self.at)]
            for s in (50.0, 90.0, 120.0)
        )
        self.verdicts: dict[str, Verdict] = {}
        self.notes: dict[str, str] = {}

    def run(self) -> tuple[dict[str, Verdict], dict[str, str]]:
        everything = list(range(len(self.at)))
        self._look(value, everything)
        if self.case.smooth:
            # With one input alone, formulas of a derivative take other branches, and so they do
            # where the operation is itself the loss.
            for i, name in enumerate(self.names):
                if name.startswith("inputs.") or len(everything) == 1:
                    self._look(linear, [i], ("second", "mixed"))
        return self.verdicts, self.notes

    def _scalar(self, measure: Callable[[object], Tensor], chosen: list[int]) -> Scalar:
        def scalar(values: Sequence[Tensor]) -> Tensor:
            filled = dict(zip(self.names, self.at, strict=True))
            filled.update({self.names[i]: x for i, x in zip(chosen, values, strict=True)})
            buffers = {name: b.clone() for name, b in self.buffers.items()}
            with replacing() if self.ours else nullcontext():
                return measure(torch.func.functional_call(self.module, {**filled, **buffers}, ()))

        return scalar

    def _look(
        self,
        measure: Callable[[object], Tensor],
        chosen: list[int],
        which: Sequence[str] = DERIVATIVES,
    ) -> None:
        s = self._scalar(measure, chosen)
        at, v, w, u = ([rows[i] for i in chosen] for rows in (self.at, self.v, self.w, self.u))
        case = self.case

        def reverse(
            values: Sequence[Tensor], keep: bool = False
        ) -> tuple[list[Tensor], Tensor | None]:
            leaves = [x.detach().requires_grad_() for x in values]
            result = s(leaves)
            if self.ours:
                graph.check_graph([result], leaves, second_order=True)
            found = torch.autograd.grad(result, leaves, create_graph=keep, allow_unused=True)
            return leaves, _along(found, v)

        def second(
            values: Sequence[Tensor], keep: bool = False
        ) -> tuple[list[Tensor], Tensor | None]:
            leaves, slope = reverse(values, keep=True)
            if slope is None or not slope.requires_grad:
                return leaves, None
            return leaves, _along(
                torch.autograd.grad(slope, leaves, create_graph=keep, allow_unused=True), w
            )

        def third() -> Tensor | None:
            with any_order() if self.ours else nullcontext():
                leaves, bend = second(at, keep=True)
            if bend is None or not bend.requires_grad:
                return None
            return _along(torch.autograd.grad(bend, leaves, allow_unused=True), u)

        methods: dict[str, Callable[[], Tensor | None]] = {
            "first": lambda: reverse(at)[1],
            "second": lambda: second(at)[1],
            "third": third,
            "forward": lambda: _jvp(lambda *x: s(x), tuple(at), tuple(v))[1],
            "mixed": lambda: _along(_jvp(lambda *x: _grad(s)(list(x)), tuple(at), tuple(w))[1], v),
            "func": lambda: _along(_grad(lambda x: _along(_grad(s)(x), v))(at), w),
            "back": lambda: _along(
                _grad(lambda x: _jvp(lambda *y: s(y), tuple(x), tuple(w))[1])(at), v
            ),
        }
        slopes = self._true(
            lambda h: s(_moved(at, v, h)), case.first and "first" in which, no_grad=True
        )
        bends = self._true(lambda h: reverse(_moved(at, w, h))[1], True)
        turns = self._true(lambda h: second(_moved(at, u, h))[1], True)
        truths = {"first": slopes, "forward": slopes, "third": turns}
        for name in which:
            below = {"third": "second", "back": "forward"}.get(name)
            if below is None or self.verdicts.get(below) == "right":
                self._judge(name, methods[name], truths.get(name, bends))

    def _true(
        self, f: Callable[[float], Tensor | None], wanted: bool, no_grad: bool = False
    ) -> _Difference | None:
        """Make the differences of ``f``, or return None where there is no truth."""
        if not wanted or not self.case.smooth or self.case.constants:
            return None

        def number(h: float) -> float:
            with torch.no_grad() if no_grad else nullcontext():
                found = f(h)
            return 0.0 if found is None else float(found)

        return _Difference(number)

    def _judge(
        self, name: str, method: Callable[[], Tensor | None], truth: _Difference | None
    ) -> None:
        if self.verdicts.get(name, "right") != "right":
            return
        verdict, note = self._verdict(method, truth)
        self.verdicts[name] = verdict
        if note:
            self.notes[name] = note

    @staticmethod
    def _verdict(
        method: Callable[[], Tensor | None], truth: _Difference | None
    ) -> tuple[Verdict, str]:
        try:
            found = method()
        except NotDifferentiableError as error:
            return "refused", str(error)
        except (RuntimeError, NotImplementedError) as error:
            if (
                "does not require grad" in str(error)
                and truth is not None
                and not truth.agrees(0.0)
            ):
                return "wrong", f"constant, should be {truth.last:.6g}"
            return "missing", str(error).partition("\n")[0]
        number = 0.0 if found is None else float(found)
        if not math.isfinite(number):
            return "not finite", str(number)
        if truth is not None and not truth.agrees(number):
            return "wrong", f"{number:.6g}, should be {truth.last:.6g}"
        return "right", ""


class _Difference:
    """The derivative of a function at 0 by differences.

    A second, smaller step is tried if the first does not agree.
    """

    def __init__(self, f: Callable[[float], float]) -> None:
        self.f = f
        self.last = math.nan
        self.known: dict[float, float] = {}

    def agrees(self, number: float) -> bool:
        """True if ``number`` is the derivative, or if ``f`` itself cannot be evaluated."""
        for h in (1e-3, 2e-4):
            try:
                if h not in self.known:
                    self.known[h] = (
                        8 * (self.f(h) - self.f(-h)) - (self.f(2 * h) - self.f(-2 * h))
                    ) / (12 * h)
            except (RuntimeError, NotImplementedError):
                return True
            self.last = self.known[h]
            if abs(number - self.last) <= TOLERANCE * (abs(self.last) + 1e-2):
                return True
        return False


def _along(gradients: Sequence[Tensor | None], direction: Sequence[Tensor]) -> Tensor | None:
    parts = [(g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None]
    return torch.stack(parts).sum() if parts else None


def _moved(at: Sequence[Tensor], direction: Sequence[Tensor], h: float) -> list[Tensor]:
    return [x + h * d for x, d in zip(at, direction, strict=True)]
