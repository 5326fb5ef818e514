"""The walk-through as one picture: where the parameters go, how far each step's influence goes."""

from __future__ import annotations

import io
import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from innerloop.errors import MissingExtraError
from innerloop.walkthrough._quantities import Matrix, Pair, System, along, subscript
from innerloop.walkthrough._table import STEPS, LongRun, Walkthrough

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Blue and vermilion of the Okabe-Ito palette: told apart under every kind of colour blindness.
SETTLES, OVERSHOOTS, INK, SOFT = "#0072B2", "#D55E00", "#222222", "#767676"
DISC = 0.42
"""Radius of the disc of starts whose image is drawn."""
LOW, HIGH = 1.0, 5.4
"""The window on the surface: the same range of a and of b."""


def write_picture(
    walkthrough: Walkthrough, file: str | Path | io.BytesIO, *, dpi: int = 150
) -> None:
    """Draw and save.

    Args:
        walkthrough: What `innerloop.walkthrough.run` returned.
        file: A path, whose ending chooses the format (png, svg, pdf), or a binary file, which
            receives a png.
        dpi: Pixels per inch.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    draw(walkthrough).savefig(file, dpi=dpi)


def draw(walkthrough: Walkthrough) -> Figure:
    """Draw the figure, without pyplot: no window opens and no global setting changes."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise MissingExtraError.of(
            "matplotlib", "plot", "the picture of the walk-through"
        ) from error
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03)
    figure = Figure(figsize=(13, 6.7), facecolor="white", layout=layout)
    surface, influence = figure.subplots(1, 2, subplot_kw={"box_aspect": 1})
    _surface(surface, walkthrough)
    _influence(influence, walkthrough)
    return figure


def _surface(axes: Axes, walkthrough: Walkthrough) -> None:
    _loss(axes, walkthrough.system)
    _leaps(axes, walkthrough.overshoots)
    _rolling(axes, walkthrough.settles)
    axes.set(xlim=(LOW, HIGH), ylim=(LOW, HIGH), xlabel="parameter a", ylabel="parameter b")
    axes.set(xticks=range(1, 6), yticks=range(1, 6))
    axes.set_title(
        "SGD on L = ½ ((a² + b²) x − y)²: where the parameters go",
        loc="left",
        fontweight="bold",
        pad=10,
    )


def _loss(axes: Axes, system: System) -> None:
    """Draw the loss; darker is higher.

    Shading follows the square root of the loss, or the steep wall would hide the valley.
    """
    import numpy as np

    a, b = np.meshgrid(np.linspace(LOW, HIGH, 300), np.linspace(LOW, HIGH, 300))
    loss = 0.5 * ((a**2 + b**2) * system.x - system.y) ** 2
    extent = (LOW, HIGH, LOW, HIGH)
    axes.imshow(
        np.sqrt(loss),
        extent=extent,
        origin="lower",
        aspect="auto",
        cmap="Greys",
        vmin=0,
        vmax=6.0,
        zorder=0,
    )
    lines = axes.contour(
        a, b, loss, levels=(0.1, 0.5, 1.0, 2.0, 4.0), colors="white", linewidths=1, zorder=1
    )
    axes.clabel(
        lines,
        fmt="loss %g",
        fontsize=8,
        colors=SOFT,
        manual=[_at(r, 57) for r in (5.43, 5.92, 6.26)],
    )
    radius = math.sqrt(system.y / system.x)
    ring = [_at(radius, degrees) for degrees in range(91)]
    axes.plot(*zip(*ring, strict=True), color=INK, linewidth=1.4, linestyle=(0, (4, 3)), zorder=2)
    axes.text(1.07, 4.97, "the valley: loss 0", color=INK, rotation=-13, rotation_mode="anchor")
    axes.plot(*system.true, marker="*", markersize=14, color=INK, zorder=6)
    axes.annotate("true a and b", system.true, (10, 3), textcoords="offset points", color=INK)


def _at(radius: float, degrees: float) -> Pair:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def _leaps(axes: Axes, run: LongRun) -> None:
    """Draw the first leaps over the valley, as arcs beside the line they all lie on."""
    from matplotlib.patches import FancyArrowPatch

    points = run.steps.points[:4]
    for begin, end in pairwise(points):
        arrow = FancyArrowPatch(
            begin, end, connectionstyle="arc3,rad=-0.3", arrowstyle="-|>", mutation_scale=13,
            color=OVERSHOOTS, linewidth=1.6, shrinkA=3, shrinkB=3, zorder=4,
        )  # fmt: skip
        axes.add_patch(arrow)
    axes.plot(
        *zip(*points, strict=True),
        linestyle="",
        marker="o",
        markersize=5,
        color=OVERSHOOTS,
        zorder=4,
    )
    for name, point, offset in zip(
        ("θ₀", "θ₁", "θ₂", "θ₃"), points, ((5, -12), (7, -4), (-18, -6), (7, -4)), strict=True
    ):
        axes.annotate(name, point, offset, textcoords="offset points", color=OVERSHOOTS)
    label = f"learning rate {run.system.rate:g}:\nleaps over the valley, to and fro"
    axes.text(HIGH - 0.07, 3.55, label, color=OVERSHOOTS, ha="right")


def _rolling(axes: Axes, run: LongRun) -> None:
    """Draw the path into the valley, and what becomes of a disc of starts on the way."""
    points, images = run.steps.points, run.steps.from_start
    for k in (0, 2, STEPS):
        axes.fill(*_image_of_disc(points[k], images[k]), facecolor=SETTLES, alpha=0.25, zorder=3)
        axes.plot(*_image_of_disc(points[k], images[k]), color=SETTLES, linewidth=1.3, zorder=3)
    axes.plot(
        *zip(*points, strict=True),
        marker="o",
        markersize=4.5,
        linewidth=1.6,
        color=SETTLES,
        zorder=5,
    )
    axes.annotate("θ₀", points[0], (6, -12), textcoords="offset points", color=SETTLES)
    axes.text(1.07, 2.27, f"learning rate {run.system.rate:g}:\na disc of starts", color=SETTLES)
    axes.text(1.07, 3.83, "after 2 steps", color=SETTLES)
    axes.text(1.07, 4.2, f"after {STEPS}: a sliver", color=SETTLES)


def _image_of_disc(center: Pair, matrix: Matrix) -> tuple[list[float], list[float]]:
    offsets = [_at(DISC, degrees) for degrees in range(0, 361, 3)]
    return (
        [center[0] + matrix[0][0] * u + matrix[0][1] * v for u, v in offsets],
        [center[1] + matrix[1][0] * u + matrix[1][1] * v for u, v in offsets],
    )


def _influence(axes: Axes, walkthrough: Walkthrough) -> None:
    settles, overshoots = walkthrough.settles, walkthrough.overshoots
    times, last = range(STEPS + 1), f"θ{subscript(STEPS)}"
    for run, which, style in (
        (overshoots, 0, {"color": OVERSHOOTS}),
        (settles, 1, {"color": SETTLES, "linestyle": (0, (2, 1.5))}),
        (settles, 0, {"color": SETTLES}),
    ):
        size = [abs(along(matrix, run.system.directions[which])) for matrix in run.steps.to_end]
        axes.plot(times, size, marker="o", markersize=5, linewidth=2, **style)
    axes.axhline(1, color=SOFT, linewidth=0.8, zorder=0)
    large, small = (
        f"learning rate {overshoots.system.rate:g}",
        f"learning rate {settles.system.rate:g}",
    )
    axes.text(1.9, 33, f"{large}, across the valley:\nan early nudge is blown up", color=OVERSHOOTS)
    axes.text(0.1, 0.7, f"{small}, along the valley: a nudge is kept", color=SETTLES)
    axes.text(
        4.4, 0.011, f"{small}, across the valley:\nan early nudge is forgotten", color=SETTLES
    )
    axes.set(yscale="log", xlabel="step t at which θ is nudged", xticks=times)
    axes.set_ylabel(f"how far it moves {last}, per unit:  | ∂{last} / ∂θₜ |")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(
        f"What a nudge at step t does to the end, {last}", loc="left", fontweight="bold", pad=10
    )
    axes.spines[["top", "right"]].set_visible(False)
