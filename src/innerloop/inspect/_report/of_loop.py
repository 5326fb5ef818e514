"""What a report says about a loop: it looks, and then shows what it has found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from innerloop._plan import Plan, plan
from innerloop._track.loop import TrackedLoop
from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree
from innerloop._utils import tree
from innerloop._utils.progress import Report as Progress
from innerloop._utils.random_state import at_random_state
from innerloop.errors import CostWarning, InnerLoopError
from innerloop.inspect._curvature import curvature
from innerloop.inspect._diagnose import diagnose
from innerloop.inspect._gains import gains
from innerloop.inspect._influence import influence
from innerloop.inspect._lyapunov import lyapunov
from innerloop.inspect._paths import paths
from innerloop.inspect._plot import COLOURS, axes_of, curves, figure_with, tidy
from innerloop.inspect._report import of_diagnosis
from innerloop.inspect._report.drawing import svg_of
from innerloop.inspect._report.page import (
    Section,
    Slide,
    grid,
    listing,
    picture,
    side_by_side,
    slides,
    verdict,
    words,
)
from innerloop.inspect._report.reach import Reach, reach
from innerloop.inspect._window import hyper_of, outer_value, part_of, trajectory_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SLIDES = 25
FEW = 8
"""Up to so many numbers the parameters are drawn as they are."""
PRODUCTS = 20
SIZE = (4.8, 3.2)
"""Inches: letters stay readable on a phone."""


class Course(NamedTuple):
    """What training did: losses and parameters over the steps.

    Attributes:
        losses: ``[T]``, the inner loss before each step.
        params: name -> ``[T + 1]``: the number itself of a small model, else the distance of that
            tensor from its start, relative to the norm that it had.
        moved: True if ``params`` holds distances.
    """

    losses: Tensor
    params: dict[str, Tensor]
    moved: bool

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the inner loss; needs matplotlib (``pip install 'innerloop[plot]'``)."""
        ax = axes_of(ax, "Course.plot", SIZE)
        curves(ax, {"inner loss": self.losses})
        tidy(ax, x="step t", y="inner loss", title="inner loss before each step")
        return figure_with(ax)

    def plot_params(self, ax: Axes | None = None) -> Figure:
        """Draw the parameters; needs matplotlib (``pip install 'innerloop[plot]'``)."""
        ax = axes_of(ax, "Course.plot_params", SIZE)
        if self.moved:
            curves(ax, self.params)
            tidy(ax, x="step t", y="distance / norm", title="how far parameters have moved")
        else:
            for i, (name, y) in enumerate(self.params.items()):
                colour = COLOURS[i % len(COLOURS)]
                ax.plot(range(len(y)), y.tolist(), ".-", label=name, color=colour)
            tidy(ax, x="step t", y="value", title="parameters")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=7)
        return figure_with(ax)


class Found(NamedTuple):
    """What was looked at, by name, and what could not be."""

    results: dict[str, Any]
    left_out: dict[str, str]
    settings: list[tuple[str, str]]


def look(
    given: Trajectory | TrackedLoop,
    outer: Callable[[Trajectory, Any], Any] | None,
    *,
    directions: int,
    probes: int,
    judge: bool,
    told: Progress,
) -> Found:
    """Look at a loop from all sides.

    Args:
        given: the loop.
        outer: the outer loss, or None.
        directions: how many of the strongest.
        probes: for each block of the Jacobian.
        judge: diagnose it as well.
        told: hears what is being looked at.
    """
    traj, hyper = trajectory_of(given), hyper_of(given)
    middle = traj.steps // 2
    looks: dict[str, Callable[[], object]] = {"course": lambda: _course(traj)}
    if outer is not None:
        judged: Callable[[Trajectory, Any], Any] = outer
        if judge and traj.record is not None:
            looks["diagnosis"] = lambda: _diagnosis(traj, judged)
        looks["influence"] = lambda: influence(given, judged)
        looks["paths"] = lambda: paths(given, judged, middle, state=True)
    looks["reach"] = lambda: reach(traj, _scalar(traj, outer, hyper), hyper, probes)
    if directions:
        looks["gains"] = lambda: gains(given, k=directions, max_products=PRODUCTS)
    looks["curvature"] = lambda: curvature(given, tol=1e-3)
    looks["lyapunov"] = lambda: lyapunov(given)
    if traj.record is not None:
        looks["plan"] = lambda: _plan(traj)
    results: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    if outer is None:
        left_out["verdict, influence and paths"] = "pass outer=, the outer loss"
    elif traj.record is None:
        left_out["verdict and cost"] = (
            "a tracked loop cannot be run again: use innerloop.diagnose and innerloop.plan"
        )
    if not traj.steps:
        looks = {}
    for i, (name, find) in enumerate(looks.items()):
        told("report", i, len(looks))
        result, reason = _found(find)
        if reason:
            left_out[name] = reason
        else:
            results[name] = result
    told("report", len(looks), len(looks))
    return Found(results, left_out, _settings(traj, outer))


def _found(find: Callable[[], object]) -> tuple[object, str]:
    """Return a result, or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CostWarning)
            return find(), ""
    except InnerLoopError as error:
        return None, str(error)


def _scalar(traj: Trajectory, outer: Any, hyper: HyperTree) -> Tensor:
    """Return a scalar that depends on the end of the loop."""
    if outer is not None:
        return outer_value(traj, outer, hyper)
    with torch.enable_grad():
        ends = [p.sum() for p in traj.params.values() if p.requires_grad]
        return torch.stack(ends).sum() if ends else torch.zeros(())


def _diagnosis(traj: Trajectory, outer: Callable[[Trajectory, Any], Any]) -> object:
    record = traj.record
    loop = record.loop
    learned = any(tree.differentiable(x) for x in tree.leaves(loop.hyper))
    with record.context.restored(loop.problem):
        return diagnose(
            outer,
            loop.problem.original or loop.problem,
            loop.start.detach(),
            loop.batches.part(0, traj.steps),
            hyper=tree.map_tensors(Tensor.detach, loop.hyper),
            steps=traj.steps,
            wrt=("params", "hyper") if learned else "params",
            quiet=True,
        )


def _plan(traj: Trajectory) -> Plan:
    loop = traj.record.loop
    with traj.record.context.restored(loop.problem):
        return plan(
            loop.problem.original or loop.problem,
            loop.start.detach(),
            loop.batches.part(0, traj.steps),
            hyper=tree.map_tensors(Tensor.detach, loop.hyper),
            steps=traj.steps,
        )


def _course(traj: Trajectory) -> Course:
    """Return losses and parameters; states that were not kept are computed again."""
    rows: dict[str, list[float]] = {}
    first: dict[str, Tensor] = {}
    size = sum(p.numel() for p in traj.at(-1).params.values() if tree.differentiable(p))

    def note(params: dict[str, Tensor]) -> None:
        for name, p in params.items():
            if not tree.differentiable(p):
                continue
            x = p.detach().double()
            if size <= FEW:
                for i, value in enumerate(x.flatten().tolist()):
                    rows.setdefault(f"{name}[{i}]" if x.ndim else name, []).append(value)
                continue
            start = first.setdefault(name, x)
            norm = float(start.norm())
            rows.setdefault(name, []).append(float((x - start).norm()) / (norm or 1.0))

    if traj.record is None:
        for t in range(traj.steps + 1):
            note(traj.at(t).params)
    else:
        carry = traj.record.loop.start.detach()
        loop = part_of(traj.record, carry, 0, traj.steps)
        note(carry.params)
        with (
            torch.no_grad(),
            at_random_state(carry.random_state),
            traj.record.context.restored(loop.problem),
        ):
            for t in loop.batches.times():
                carry = loop.step(carry, loop.batch(carry, t), t)[0].detach()
                note(carry.params)
    named = {name: torch.tensor(row, dtype=torch.float64) for name, row in rows.items()}
    return Course(traj.losses.detach().double().cpu(), named, size > FEW)


def _settings(traj: Trajectory, outer: object) -> list[tuple[str, str]]:
    params = traj.at(-1).params
    rows = [
        ("steps", str(traj.steps)),
        ("parameters", f"{sum(p.numel() for p in params.values()):,} in {len(params)} tensors"),
        ("numbers", ", ".join(sorted({str(p.dtype) for p in params.values()}))),
        ("device", ", ".join(sorted({str(p.device) for p in params.values()}))),
    ]
    if traj.record is not None:
        problem = traj.record.loop.problem
        rows.insert(0, ("optimizer", repr((problem.original or problem).optimizer)))
        named = list(tree.named_tensors(traj.record.loop.hyper, "hyper"))
        rows += [
            (path, f"{float(x.detach()):.6g}" if x.numel() == 1 else f"shape {tuple(x.shape)}")
            for path, x in named
        ]
    if outer is not None:
        rows.append(("outer loss", getattr(outer, "__qualname__", type(outer).__name__)))
    return rows


# -- what is shown ---------------------------------------------------------------------------------


def sections(found: Found) -> list[Section]:
    """Return the sections of a loop, verdicts first."""
    r = found.results
    shown: list[Section] = []
    if "diagnosis" in r:
        shown += of_diagnosis.sections(r["diagnosis"])
    if facts := _in_words(r):
        shown.append(Section("In words", facts))
    if "course" in r:
        figures = [
            picture(svg_of(r["course"].plot()), "The inner loss, on the batch of each step."),
            picture(svg_of(r["course"].plot_params()), "The parameters on their way."),
        ]
        shown.append(Section("Loss and parameters", side_by_side(figures)))
    if "influence" in r:
        caption = (
            "How steeply the outer loss depends on the parameters at each step (solid), and what "
            "each step adds to the gradient of an outer variable (dotted)."
        )
        shown.append(
            Section("Influence over the steps", side_by_side([_drawn(r["influence"], caption)]))
        )
    if "reach" in r:
        shown.append(Section("Every step's hold on the end", _reach(r["reach"])))
    if spectrum := _spectrum(r):
        shown.append(Section("Spectrum", spectrum))
    if "paths" in r:
        caption = (
            "The gradient of the outer loss by the first parameters, split by what it passes in "
            "the middle of the loop: parameters, and what the optimizer keeps."
        )
        table = "" if len(r["paths"].through) > 16 else listing(str(r["paths"]))
        shown.append(Section("Paths", side_by_side([_drawn(r["paths"], caption)]) + table))
    if "plan" in r:
        shown.append(Section("Time and memory", _cost(r["plan"])))
    shown.append(Section("Settings", grid(["", ""], found.settings)))
    return shown


def _drawn(result: Any, caption: str) -> str:
    return picture(svg_of(result.plot(axes_of(None, "a report", SIZE))), caption)


def _in_words(r: dict[str, Any]) -> str:
    parts = []
    if "course" in r:
        losses = r["course"].losses
        parts.append(
            words(
                f"The inner loss went from {float(losses[0]):.4g} to {float(losses[-1]):.4g} in "
                f"{len(losses)} steps."
            )
        )
    if "influence" in r:
        found = r["influence"]
        whole = found.whole
        ratio = float(whole[0]) / float(whole[-1]) if float(whole[-1]) else float("nan")
        tail = (
            "the start matters more than the last step: training amplifies it"
            if ratio > 3
            else "the start hardly matters: training has forgotten it"
            if ratio < 1e-3
            else "the start still matters"
        )
        parts.append(
            words(
                f"The outer loss is {found.value:.6g}. Its derivative by the first parameters is "
                f"{ratio:.3g} times as large as that by the last ones: {tail}."
            )
        )
    if "gains" in r and len(r["gains"].values):
        top = float(r["gains"].values[0])
        parts.append(
            words(
                f"A small nudge of the start arrives at the end {top:.3g} times as large in the "
                "direction that grows most."
            )
        )
    if "lyapunov" in r:
        exponent, steps = float(r["lyapunov"].exponents[0]), len(r["lyapunov"].history)
        if exponent * steps > 1:
            text = (
                f"Nearby trainings drift apart by a factor of e in {1 / exponent:.3g} steps: "
                "training is sensitive to its start."
            )
            parts.append(verdict("Sensitive", text, good=False if exponent * steps > 5 else None))
        else:
            parts.append(words("Nearby trainings hardly drift apart."))
    return "".join(parts)


def _reach(found: Reach) -> str:
    steps = len(found.values) - 1
    times = sorted({round(i * steps / (SLIDES - 1)) for i in range(SLIDES)})
    caption = (
        "The derivative of each parameter at the end (rows) by each at the chosen step (columns)"
        + ("." if found.exact else ", as the norm of that block.")
    )
    shown = [Slide(f"step {t}", svg_of(found.plot(t))) for t in times]
    return side_by_side([slides(shown, caption)])


def _spectrum(r: dict[str, Any]) -> str:
    figures = []
    if "gains" in r and len(r["gains"].values):
        found = r["gains"]
        worst = float(found.residuals.max())
        caption = (
            "The strongest directions from the start to the end, and by how much they are "
            f"amplified (relative residual {worst:.1e})."
        )
        figures.append(_drawn(found, caption))
    if "curvature" in r:
        caption = "The largest and the smallest eigenvalue of the Hessian of the inner loss."
        figures.append(_drawn(r["curvature"], caption))
    if "lyapunov" in r:
        caption = "The Lyapunov exponent as it settles: above zero nearby trainings drift apart."
        figures.append(_drawn(r["lyapunov"], caption))
    return side_by_side(figures) if figures else ""


def _cost(found: Plan) -> str:
    text = "What each strategy would cost for this loop, measured on a few of its steps."
    per_step = [
        [repr(row.strategy), f"{1000 * row.seconds / found.steps:.3g}", f"{row.bytes / 1e6:.3g}"]
        for row in found.rows
        if not row.problem
    ]
    header = ["strategy", "ms per step, there and back", "memory, MB"]
    return words(text) + words(str(found).splitlines()[0], soft=True) + grid(header, per_step)
