"""Is this meta-gradient worth anything, and if not, why?"""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from innerloop._batches import batches_of
from innerloop._carry import Carry
from innerloop._check import PromoteToFloat64
from innerloop._problem import Problem, check_problem, rules_of
from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree, Params
from innerloop._unroll import unroll
from innerloop._utils import tree
from innerloop._utils.arguments import (
    check_flag,
    check_outer,
    check_seed,
    is_number,
    names_in,
    shown,
)
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop._utils.text_table import table
from innerloop.errors import (
    CapturedTensorError,
    InnerLoopError,
    InvalidInputError,
    NonFiniteError,
)
from innerloop.inspect._adjoints import UNRELATED, Sink, sweep_back
from innerloop.inspect._cuts import Cut, FindCuts
from innerloop.inspect._plot import COLOURS, axes_of, figure_with, tidy
from innerloop.inspect._window import outer_value
from innerloop.strategy._base import Strategy
from innerloop.strategy._checkpointed import Checkpointed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ERROR = 0.5
"""Above this error of the promised change a meta-gradient is not trusted."""
SMALLEST = 1e-3
VANISHED = 1e-6
TOGETHER = 4_000_000
"""Up to so many numbers are trained at once: then calls cost more than arithmetic."""


class Finding(NamedTuple):
    """Something that is wrong, or that one should know.

    Attributes:
        kind: a word for it, ``"cut"`` for example.
        where: the place: a file and line, a step, a name; may be empty.
        text: one readable paragraph.
        fatal: True if the meta-gradient is worthless because of it.
    """

    kind: str
    where: str
    text: str
    fatal: bool = True


class Diagnosis(NamedTuple):
    """What `diagnose` has found; prints as text.

    Attributes:
        trusted: the verdict for ``size``: True if a step of that size does what the meta-gradient
            promises.
        size: the relative size that the verdict holds for.
        error: norm of (promised - kept) over norm of kept, over the random perturbations; NaN where
            the loop could not be run.
        promised: the change of the outer loss that the gradient predicts, for each perturbation.
        kept: the change that training again gave.
        growth: parameter -> max over t of the norm of dL/dθ_t, relative to its norm at the end
            over all parameters.
        worst: the parameter and the step where it is largest.
        findings: what is wrong, and what one should know.
        value: the outer loss.
        sizes: size -> error, for every size that was tried.
        precision: relative difference of the gradient to that in float64; None: not looked at.
        cost: the time it took, in meta-gradients.
    """

    trusted: bool
    size: float
    error: float
    promised: tuple[float, ...]
    kept: tuple[float, ...]
    growth: dict[str, float]
    worst: tuple[str, int] | None
    findings: tuple[Finding, ...]
    value: float
    sizes: dict[float, float]
    precision: float | None
    cost: float

    def __str__(self) -> str:
        verdict = "trusted" if self.trusted else "NOT trusted"
        lines = [f"This meta-gradient is {verdict} for steps of relative size {self.size:g}."]
        if self.kept:
            lines.append(
                f"Training again {len(self.kept)} times from perturbed inputs, the outer loss "
                f"({self.value:.6g}) changed as promised up to an error of {self.error:.0%} "
                f"(limit {ERROR:.0%})."
            )
        lines += [f"- {f.text}" for f in self.findings]
        if len(self.sizes) > 1:
            lines.append(
                table(
                    [[f"{s:.2g}", f"{e:.0%}"] for s, e in sorted(self.sizes.items())],
                    header=["size", "error"],
                    align=">>",
                )
            )
        if self.growth:
            assert self.worst is not None
            lines.append(
                "Largest adjoint along the loop over its size at the end: "
                f"{max(self.growth.values()):.3g} ({self.worst[0]}, step {self.worst[1]})."
            )
        if self.precision is not None:
            lines.append(f"Off from the gradient in float64 by {self.precision:.1e}.")
        lines.append(f"Cost: {self.cost:.1f} meta-gradients.")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw kept over promised change; needs matplotlib (``pip install 'innerloop[plot]'``)."""
        ax = axes_of(ax, "Diagnosis.plot", (4.2, 4.0))
        ends = [*self.promised, *self.kept, 0.0]
        line = [min(ends), max(ends)]
        ax.plot(line, line, color="#767676", linewidth=0.8)
        ax.plot(self.promised, self.kept, "o", color=COLOURS[0 if self.trusted else 1])
        ax.locator_params(axis="x", nbins=4)
        verdict = "trusted" if self.trusted else "not trusted"
        tidy(ax, x="promised change", y="kept change", title=f"size {self.size:g}: {verdict}")
        return figure_with(ax)


def diagnose(
    outer: Callable[[Trajectory, Any], Any],
    problem: Problem,
    params: Params | Carry | None,
    batches: object,
    *,
    hyper: HyperTree = None,
    size: float = 1e-2,
    probes: int = 8,
    thorough: bool = False,
    steps: int | None = None,
    wrt: str | Sequence[str] = ("params", "hyper"),
    strategy: Strategy | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Diagnosis:
    r"""Judge a meta-gradient by what it promises for a step of the size that you mean.

    A meta-gradient that is exact to the last digit can be worthless: behind a chaotic loop the
    outer loss does something else at the size of a real step. So training is repeated from inputs
    that are moved by random :math:`\delta_i` of relative size h, and the change that was kept is
    compared with the promised one:

    .. math::
        e = \sqrt{\frac{\sum_i (\langle g, \delta_i\rangle - [L(x + \delta_i) - L(x)])^2}
                 {\sum_i [L(x + \delta_i) - L(x)]^2}}, \qquad \text{trusted if } e < 1/2.

    The growth of the adjoint along the loop comes with the gradient. It can veto (where it
    multiplies rounding errors beyond a hundredth), never certify. What goes wrong more often than
    chaos is named with its place: a graph that is cut (``detach``, ``.item()``, ``no_grad``, an
    integer), data that differ at every call, a loss that is not finite, a dead unit under Adam.

    Args:
        outer, problem, params, batches, hyper, steps, wrt: as in `metagradient`.
        size: h, the norm of a perturbation relative to that of its tensor.
        probes: how many perturbations.
        thorough: also look at a third of ``size``, at the gradient in float64, and, where ``size``
            is not trusted, at halves of it down to 1e-3.
        strategy: default `Checkpointed`.
        seed: of the perturbations.
        quiet: do not print the diagnosis.

    Returns:
        A `Diagnosis`, which is printed unless ``quiet``. What is wrong with the loop is a finding,
        not an exception.

    Raises:
        InvalidInputError: ``size`` or ``probes`` is not positive.

    Cost:
        One meta-gradient and ``probes`` trainings, those of a small model at once: at most 3
        meta-gradients. ``thorough=True`` takes up to six times that, and tells how much it was.

    Example:
        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5)
        ... )
        >>> found = innerloop.diagnose(
        ...     lambda traj, hyper: traj.params["w"] ** 2 / 2,
        ...     problem,
        ...     {"w": torch.tensor(2.0)},
        ...     None,
        ...     steps=3,
        ...     quiet=True,
        ... )
        >>> found.trusted
        True
    """
    if not isinstance(probes, int) or isinstance(probes, bool) or probes < 1:
        raise InvalidInputError(f"probes={probes!r}: write a number of perturbations, 1 or more")
    check_problem(problem)
    check_outer(outer)
    check_seed("seed", seed)
    check_flag("quiet", quiet)
    check_flag("thorough", thorough)
    if not is_number(size) or not 0 < size < 1:
        raise InvalidInputError(f"size is {shown(size)}: write a relative size between 0 and 1")
    if hasattr(batches, "__next__"):
        batches = list(batches)  # type: ignore[call-overload]
    names = names_in(wrt)
    case = _Case(outer, problem, params, batches, hyper, steps, names, strategy, seed)
    found = case.judge(size, probes, thorough)
    if not quiet:
        print(found)
    return found


class _Failed(Exception):
    """The loop cannot be differentiated; the findings say why."""


class _Case:
    """One diagnosis."""

    def __init__(
        self,
        outer: Callable[[Trajectory, Any], Any],
        problem: Problem,
        params: Params | Carry | None,
        batches: object,
        hyper: HyperTree,
        steps: int | None,
        wrt: tuple[str, ...],
        strategy: Strategy | None,
        seed: int,
    ) -> None:
        self.outer, self.problem, self.batches = outer, problem, batches
        self.hyper, self.steps, self.wrt, self.seed = hyper, steps, wrt, seed
        self.strategy = Checkpointed() if strategy is None else strategy
        self.random = RandomState.now()
        self.given = params
        self.findings: list[Finding] = []
        self.growth: dict[str, float] = {}
        self.worst: tuple[str, int] | None = None
        self.value = math.nan
        self.seconds = 0.0
        self.inputs: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}

    def judge(self, size: float, probes: int, thorough: bool) -> Diagnosis:
        """Return the diagnosis."""
        sizes: dict[float, float] = {}
        changes: tuple[list[float], list[float]] = ([], [])
        precision = None
        begin = time.process_time()
        try:
            with torch.enable_grad():
                self._prepare()
                self._differentiate()
            self.seconds = time.process_time() - begin
            changes, sizes[size] = self._changes(size, probes)
            if thorough:
                precision = self._precision()
                smaller = size / 3
                sizes[smaller] = self._changes(smaller, probes)[1]
                smaller = size / 2
                while sizes[size] >= ERROR and smaller >= SMALLEST:
                    sizes[smaller] = self._changes(smaller, probes)[1]
                    if sizes[smaller] < ERROR:
                        break
                    smaller /= 2
        except _Failed:
            pass
        error = sizes.get(size, math.nan)
        if error >= ERROR:
            self._add_unkept(size, changes, error)
        fatal = any(f.fatal for f in self.findings)
        spent = time.process_time() - begin
        return Diagnosis(
            bool(error < ERROR) and not fatal,
            size,
            error,
            tuple(changes[0]),
            tuple(changes[1]),
            self.growth,
            self.worst,
            tuple(self.findings),
            self.value,
            sizes,
            precision,
            spent / self.seconds if self.seconds else 1.0,
        )

    # -- the gradient ------------------------------------------------------------------------------

    def _fail(self, kind: str, where: str, text: str) -> _Failed:
        self.findings.append(Finding(kind, where, text))
        return _Failed(text)

    def _prepare(self) -> None:
        """Make leaves of the inputs, and look for what is wrong with them."""
        try:
            self.start = self.problem.init(self.given)
            batches_of(self.batches, self.steps)
        except InnerLoopError as error:
            raise self._fail("input", "", str(error)) from error
        self.params = {
            n: p.detach().clone().requires_grad_(tree.differentiable(p))
            for n, p in self.start.params.items()
        }
        self.leafed = tree.map_tensors(
            lambda x: x.detach().clone().requires_grad_(tree.differentiable(x)), self.hyper
        )
        if "params" in self.wrt:
            self.inputs |= {f"params[{n!r}]": p for n, p in self.params.items() if p.requires_grad}
        named = list(tree.named_tensors(self.leafed, "hyper"))
        if "hyper" in self.wrt:
            self.inputs |= {path: x for path, x in named if x.requires_grad}
            for path, x in named:
                if not x.requires_grad:
                    self.findings.append(
                        Finding(
                            "integer",
                            path,
                            f"{path} holds integers ({x.dtype}): they have no derivative, so the "
                            f"meta-gradient does not see them. If they are meant to be learned, "
                            f"pass {path}.float().",
                        )
                    )
        for path, leaf in _numbers(self.hyper):
            if "hyper" in self.wrt:
                self.findings.append(
                    Finding(
                        "number",
                        path,
                        f"{path} is the number {leaf!r}, not a tensor: it is a constant of the "
                        f"meta-gradient. Write torch.tensor({float(leaf)!r}) to learn it.",
                    )
                )
        if not self.inputs:
            raise self._fail("nothing", "", "There is no floating-point tensor to differentiate.")

    def _start(self, params: Params) -> Carry:
        random = self.start.random_state or self.random
        return self.start._replace(params=dict(params), random_state=random)

    def _differentiate(self) -> None:
        sink = _Growth()
        try:
            traj = unroll(
                self.problem,
                self._start(self.params),
                self.batches,
                hyper=self.leafed,
                strategy=self.strategy,
                steps=self.steps,
            )
            value = outer_value(traj, self.outer, self.leafed)
            self.value = float(value.detach())
            if not math.isfinite(self.value):
                raise NonFiniteError(f"the outer loss is {self.value}")
            whole = sweep_back(traj, value, self.leafed, sink)
        except (InnerLoopError, RuntimeError) as error:
            self._explain(error)
            raise _Failed from error
        self.traj = traj
        grads = {f"params[{n!r}]": g for n, g in sink.first.items()}
        grads |= {f"hyper{path}": g for path, g in whole.items()}
        if isinstance(self.leafed, Tensor):
            grads["hyper"] = next(iter(whole.values()), None)
        self._look_at_growth(sink)
        self._look_at_cuts(grads)
        self.grads = {
            n: torch.zeros_like(x) if (g := grads.get(n)) is None else g.detach()
            for n, x in self.inputs.items()
        }
        if not any(bool(g.count_nonzero()) for g in self.grads.values()):
            raise _Failed

    def _look_at_growth(self, sink: _Growth) -> None:
        norms = sink.norms
        steps = self.traj.steps
        end = math.hypot(*(row.get(steps, 0.0) for row in norms.values()))
        peaks = {n: max(row.items(), key=lambda item: item[1]) for n, row in norms.items() if row}
        if not peaks:
            return
        whole = [math.hypot(*(row.get(t, 0.0) for row in norms.values())) for t in range(steps + 1)]
        if not end:
            if any(whole):
                self.findings.append(
                    Finding(
                        "stale",
                        "outer",
                        "The outer loss does not depend on the parameters after the last step "
                        f"({_place_of(self.outer)}), only on earlier ones or on the inner losses. "
                        "If it was meant to judge the result of training, compute it from "
                        "traj.params.",
                        fatal=False,
                    )
                )
            return
        self.growth = {n: norm / end for n, (_, norm) in peaks.items()}
        name = max(self.growth, key=lambda n: self.growth[n])
        self.worst = name, peaks[name][0]
        largest = self.growth[name]
        dtype = next(iter(self.params.values())).dtype
        eps = torch.finfo(dtype).eps if dtype.is_floating_point else 1e-16
        if largest * eps > 1e-2:
            begin = next((t for t in range(steps, -1, -1) if whole[t] > 100 * end), self.worst[1])
            if not self._look_at_dead_units(name, largest):
                self.findings.append(
                    Finding(
                        "exploding",
                        f"step {self.worst[1]}",
                        f"The adjoint explodes: at step {self.worst[1]} dL/d{name} is "
                        f"{largest:.1e} times as large as at the end of the loop; seen from the "
                        f"end it starts to grow at step {begin}. Rounding errors grow with it, so "
                        "the gradient has no correct digit. Practitioners lower the inner learning "
                        "rate, clip inner gradients, shorten the loop, or cut it "
                        "(innerloop.Truncated).",
                    )
                )
        elif whole[0] < VANISHED * end and steps:
            begin = next(t for t in range(steps, -1, -1) if whole[t] < VANISHED * end)
            self.findings.append(
                Finding(
                    "vanishing",
                    f"step {begin}",
                    f"The influence of the start vanishes: dL/dθ at step {begin} is less than "
                    f"{VANISHED:g} of that at the end, so what comes before hardly matters. "
                    "Truncated(last="
                    f"{steps - begin}) gives the same gradient of hyper for less.",
                    fatal=False,
                )
            )

    def _look_at_dead_units(self, name: str, largest: float) -> bool:
        """Add a finding if Adam multiplies the adjoint of entries whose gradient is zero."""
        adaptive = [r for r in rules_of(self.problem.optimizer) if "eps" in _names_of(r)]
        if not adaptive:
            return False
        start = self.problem.init(self._start({n: p.detach() for n, p in self.params.items()}))
        batch = batches_of(self.batches, self.steps).first(start.params, self.hyper)
        with torch.no_grad():
            grads, *_ = self.problem.gradient(start.params, start.buffers, self.hyper, batch)
        g = grads[name]
        dead = int((g == 0).sum())
        if not dead:
            return False
        units = [i for i, row in enumerate(g.flatten(1) if g.ndim > 1 else g) if not row.any()]
        shown = f"; rows {units[:5]} wholly" if units else ""
        self.findings.append(
            Finding(
                "dead unit",
                name,
                f"Dead units under {adaptive[0]!r}: {dead} of {g.numel()} entries of {name} have "
                f"an inner gradient of exactly zero{shown}. There the rule divides by eps alone, "
                "so every step multiplies the adjoint by up to lr/eps times the curvature that is "
                f"left: it reaches {largest:.1e} times its size at the end, while training itself "
                "does not move there. Raise eps, use a leaky activation or another "
                "initialisation, or leave these entries out of training.",
            )
        )
        return True

    # -- words -------------------------------------------------------------------------------------

    def _cuts(self) -> list[Cut]:
        """Run the user's functions once, and return where they cut the graph."""
        start = self.problem.init(self._start(self.params))
        with torch.enable_grad(), at_random_state(self.random), FindCuts() as finder:
            try:
                batch = batches_of(self.batches, self.steps).first(self.params, self.leafed)
                self.problem.overrides(self.leafed, 0)
                # As it is written: a replaced operation would be seen in our own code.
                self.problem.evaluate(
                    self.params, start.buffers, self.leafed, batch, second_order=False
                )
                leafed = start._replace(params=dict(self.params))
                losses = torch.zeros(1, requires_grad=True)
                self.outer(Trajectory({0: leafed}, losses, None, 0), self.leafed)
            except Exception:
                # What is wrong besides is told elsewhere.
                pass
        return list(finder.found.values())

    def _look_at_cuts(self, grads: Mapping[str, Tensor | None]) -> None:
        missing = [
            n for n in self.inputs if (g := grads.get(n)) is None or not bool(g.count_nonzero())
        ]
        if not missing:
            return
        cuts = self._cuts()
        for name in missing:
            x = self.inputs[name]
            here = [c for c in cuts if id(x) in c.leaves]
            if here:
                self._add_cut(name, here)
            elif name.startswith("hyper"):
                captured = self._captured(name)
                self.findings.append(
                    Finding(
                        "captured" if captured else "unused",
                        captured or name,
                        f"No gradient arrives at {name}"
                        + (
                            f": {captured} uses the tensor itself, captured from outside, in place "
                            "of its argument hyper. Read it from hyper there."
                            if captured
                            else ": neither the loss nor optimizer_hyper reads it where it makes "
                            "a difference. To let the optimizer read it, write "
                            "Problem(loss, optimizer, optimizer_hyper=(name,))."
                        ),
                    )
                )
            else:
                self.findings.append(
                    Finding(
                        "zero",
                        name,
                        f"The gradient of {name} is exactly zero: the inner and outer losses do "
                        "not depend on it, or only where they are flat (a dead unit).",
                        fatal=False,
                    )
                )

    def _add_cut(self, name: str, cuts: list[Cut]) -> None:
        cut = cuts[0]
        more = "" if len(cuts) == 1 else f" (and {len(cuts) - 1} more such calls)"
        self.findings.append(
            Finding(
                "cut",
                cut.place,
                f"No gradient arrives at {name}: {cut.call} at {cut.place}, `{cut.source}`, hands "
                f"on its numbers without their derivative{more}. Keep the tensor itself there.",
            )
        )

    def _captured(self, name: str) -> str:
        """Return the function of the user whose closure holds the tensor of this name."""
        originals = dict(tree.named_tensors(self.hyper, "hyper"))
        tensor = originals.get(name)
        for function in (self.problem.loss, self.problem.optimizer_hyper, self.outer):
            for value in _closure_of(function):
                if any(x is tensor for x in tree.tensors(value)):
                    return f"{getattr(function, '__name__', function)} ({_place_of(function)})"
        return ""

    def _explain(self, error: Exception) -> None:
        """Turn an error of the loop into a finding."""
        text = str(error)
        if isinstance(error, NonFiniteError):
            self.findings.append(Finding("not finite", _step_in(text), _sentence(text)))
        elif isinstance(error, CapturedTensorError):
            self.findings.append(Finding("captured", _place_of(self.problem.loss), _sentence(text)))
        elif text.startswith("no gradient arrives at "):
            place = text.split(".")[0].removeprefix("no gradient arrives at ")
            self.findings.append(Finding("unused", place, _sentence(text)))
        elif ("dtype" in text and "same dtype" in text) or "expected scalar type" in text:
            self.findings.append(Finding("dtype", "", self._dtypes(text)))
        elif "gave other data" in text or "not what it was" in text or "gave other values" in text:
            self.findings.append(
                Finding("not deterministic", _place_of(self.batches), _sentence(text))
            )
        elif text == UNRELATED or "depends on the trajectory" in text:
            cuts = [c for c in self._cuts() if c.leaves & {id(p) for p in self.params.values()}]
            place = _place_of(self.outer)
            if cuts and any(c.leaves for c in cuts):
                cut = cuts[-1]
                self.findings.append(
                    Finding(
                        "cut",
                        cut.place,
                        f"The outer loss has no derivative: {cut.call} at {cut.place}, "
                        f"`{cut.source}`, cuts it. Keep the tensor itself there.",
                    )
                )
            else:
                self.findings.append(
                    Finding(
                        "stale",
                        place,
                        f"The outer loss ({place}) does not depend on what training has made: it "
                        "is computed from other tensors, the parameters before the loop or a "
                        "module's own, for example. Compute it from traj.params.",
                    )
                )
        else:
            cuts = [c for c in self._cuts() if c.leaves & {id(x) for x in self.inputs.values()}]
            if cuts and ("does not depend" in text or "depends on none" in text):
                cut = cuts[0]
                self.findings.append(
                    Finding(
                        "cut",
                        cut.place,
                        f"The inner loss has no derivative by its parameters: {cut.call} at "
                        f"{cut.place}, `{cut.source}`, cuts it. Keep the tensor itself there, and "
                        "take no step under torch.no_grad().",
                    )
                )
            else:
                self.findings.append(Finding("error", "", _sentence(text)))

    def _dtypes(self, text: str) -> str:
        batch = batches_of(self.batches, self.steps).first(self.params, self.leafed)
        kinds = {
            "the parameters": {p.dtype for p in self.params.values()},
            "the data": {x.dtype for x in tree.tensors(batch) if tree.differentiable(x)},
            "hyper": {x.dtype for x in tree.tensors(self.leafed) if tree.differentiable(x)},
        }
        shown = ", ".join(
            f"{name} {'/'.join(sorted(str(d).removeprefix('torch.') for d in found))}"
            for name, found in kinds.items()
            if found
        )
        return (
            f"The types of numbers do not fit: {shown}. Convert one side, x.to(w.dtype). PyTorch "
            f"says: {text}"
        )

    def _add_unkept(self, size: float, changes: tuple[list[float], list[float]], e: float) -> None:
        promised, kept = (math.sqrt(sum(c * c for c in row) / len(row)) for row in changes)
        self.findings.append(
            Finding(
                "promise",
                f"size {size:g}",
                f"The promise is not kept at size {size:g}: the gradient predicts changes of the "
                f"outer loss of about {promised:.2g}, training again gives {kept:.2g}, off by "
                f"{e:.0%}. At this size the outer loss is not linear: take smaller outer "
                "steps, smooth it (average over seeds, shorter loops), or estimate the gradient of "
                "the smoothed loss by sampling.",
            )
        )

    # -- promised and kept -------------------------------------------------------------------------

    def _filled(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], HyperTree]:
        params = {n: inputs.get(f"params[{n!r}]", p.detach()) for n, p in self.params.items()}
        places = [path for path, _ in tree.named_tensors(self.leafed, "hyper")]
        values = iter(
            [
                inputs.get(path, x.detach())
                for path, x in zip(places, tree.tensors(self.leafed), strict=True)
            ]
        )
        return params, tree.map_tensors(lambda _: next(values), self.leafed)

    def _outer_at(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Train from ``inputs``, and return the outer loss."""
        params, hyper = self._filled(inputs)
        traj = unroll(
            self.problem,
            self._start(params),
            self.batches,
            hyper=hyper,
            strategy=self.strategy,
            steps=self.steps,
        )
        found = self.outer(traj, hyper)
        return found[0] if isinstance(found, tuple) else found

    def _outer_values(self, moved: Sequence[dict[str, Tensor]]) -> list[float]:
        """Train from each of ``moved``, small models all at once."""
        if sum(x.numel() for row in moved for x in row.values()) <= TOGETHER:
            stacked = {n: torch.stack([row[n] for row in moved]) for n in moved[0]}
            try:
                # A batching rule that PyTorch lacks only takes time.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return list(map(float, torch.func.vmap(self._outer_at)(stacked)))
            except Exception:
                # What vmap cannot do (random numbers, .item()) is run one after the other.
                pass
        return [self._outer_or_infinity(row) for row in moved]

    def _outer_or_infinity(self, inputs: Mapping[str, Tensor]) -> float:
        try:
            return float(self._outer_at(inputs))
        except InnerLoopError:
            return math.inf

    def _changes(self, size: float, probes: int) -> tuple[tuple[list[float], list[float]], float]:
        generator = torch.Generator().manual_seed(self.seed)
        promised, moved = [], []
        with torch.no_grad():
            for _ in range(probes):
                row, promise = {}, 0.0
                for name, x in self.inputs.items():
                    scale = max(float(x.detach().double().square().mean().sqrt()), 0.01)
                    draw = torch.randn(x.shape, generator=generator, dtype=torch.float64)
                    delta = (size * scale * draw).to(x)
                    row[name] = x.detach() + delta
                    promise += float((self.grads[name].double() * delta.double()).sum())
                promised.append(promise)
                moved.append(row)
            kept = [
                value - self.value if math.isfinite(value) else math.inf
                for value in self._outer_values(moved)
            ]
        missed = sum((a - b) * (a - b) for a, b in zip(promised, kept, strict=True))
        real = sum(b * b for b in kept)
        error = math.sqrt(missed / real) if 0 < real < math.inf else math.inf if missed else 0.0
        return (promised, kept), error if not math.isnan(error) else math.inf

    def _precision(self) -> float | None:
        """Return how far the gradient is from that in float64."""
        low = [x for x in self.inputs.values() if x.dtype != torch.float64]
        if not low:
            return 0.0
        inputs = {n: x.detach().double().requires_grad_() for n, x in self.inputs.items()}
        params, hyper = self._filled(inputs)
        params = {n: p.double() if tree.differentiable(p) else p for n, p in params.items()}
        again = self.problem
        carry = again.init(params)
        carry = carry._replace(
            buffers=tree.map_tensors(_to_double, self.start.buffers),
            random_state=self.start.random_state or self.random,
        )
        try:
            with torch.enable_grad(), PromoteToFloat64():
                traj = unroll(
                    again,
                    carry,
                    tree.map_tensors(_to_double, self.batches)
                    if not callable(self.batches)
                    else self.batches,
                    hyper=hyper,
                    strategy=self.strategy,
                    steps=self.steps,
                )
                found = self.outer(traj, hyper)
                value = found[0] if isinstance(found, tuple) else found
                grads = torch.autograd.grad(value, list(inputs.values()), allow_unused=True)
        except (InnerLoopError, RuntimeError) as error:
            self.findings.append(
                Finding(
                    "precision",
                    "",
                    f"The loop could not be run in float64 to compare: {error}",
                    fatal=False,
                )
            )
            return None
        missed = total = 0.0
        for name, g in zip(inputs, grads, strict=True):
            exact = torch.zeros_like(inputs[name]) if g is None else g
            missed += float((self.grads[name].double() - exact).square().sum())
            total += float(exact.square().sum())
        off = math.sqrt(missed / total) if total else 0.0 if not missed else math.inf
        if off > 0.1:
            self.findings.append(
                Finding(
                    "precision",
                    "float32",
                    f"In {str(low[0].dtype).removeprefix('torch.')} the gradient is {off:.0%} off "
                    "from that in float64: rounding is amplified along the loop, or flips a branch "
                    "(max-pooling, ReLU). Compute the inner loop in float64, or do not rely on it.",
                )
            )
        return off


class _Growth(Sink):
    """Keeps the norms, and the derivatives by the first parameters."""

    def __init__(self) -> None:
        self.norms: dict[str, dict[int, float]] = {}
        self.first: dict[str, Tensor | None] = {}

    def param(self, name: str, t: int, g: Tensor | None) -> None:
        norm = 0.0 if g is None else float(torch.linalg.vector_norm(g.detach().double()))
        self.norms.setdefault(name, {})[t] = norm
        if t == 0:
            self.first[name] = None if g is None else g.detach()

    def of_hyper(self, path: str, t: int, g: Tensor) -> None:
        pass


def _to_double(x: Tensor) -> Tensor:
    return x.double() if tree.differentiable(x) else x


def _numbers(hyper: HyperTree) -> list[tuple[str, float]]:
    """Return the plain numbers of the outer variables, by path."""
    if not isinstance(hyper, Mapping):
        return []
    return [
        (f"hyper[{key!r}]", x)
        for key, x in hyper.items()
        if isinstance(x, (int, float)) and not isinstance(x, bool)
    ]


def _names_of(rule: object) -> Sequence[str]:
    return getattr(rule, "hyper_names", None) or ()


def _closure_of(function: object) -> list[object]:
    """Return what a function sees besides its arguments."""
    if not inspect.isfunction(function):
        return []
    found = inspect.getclosurevars(function)
    return [*found.nonlocals.values(), *found.globals.values()]


def _place_of(function: object) -> str:
    """Return file and line of a function, or what it is."""
    try:
        code = function.__code__  # type: ignore[attr-defined]
    except AttributeError:
        return type(function).__name__
    return f"{code.co_filename.rpartition('/')[2]}, line {code.co_firstlineno}"


def _step_in(text: str) -> str:
    """Return the first "step N" of a message."""
    words = text.replace(":", " ").replace(",", " ").split()
    return next(
        (f"step {b}" for a, b in pairwise(words) if a == "step" and b.isdigit()),
        "",
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"
