"""Figures of what `innerloop.inspect` has found, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from innerloop.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The Okabe-Ito palette: told apart under every kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#767676")
INK = "#222222"
DASHED = (0, (5, 1.5))
"""The stroke of every other curve."""
MANY = 7
"""More curves than that are drawn in one colour, without a legend for each."""


def axes_of(ax: Axes | None, what: str, size: tuple[float, float] = (6.4, 3.6)) -> Axes:
    """Return ``ax``, or the axes of a new figure, without pyplot: no global setting changes."""
    if ax is not None:
        return ax
    return figure_of(what, size).subplots()


def figure_of(what: str, size: tuple[float, float]) -> Figure:
    """Return a new figure; raise if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "plot", what) from error
    return Figure(figsize=size, facecolor="white", layout="constrained")


def figure_with(ax: Axes) -> Figure:
    """Return the figure that ``ax`` stands in."""
    return cast("Figure", ax.figure)


def tidy(ax: Axes, *, x: str, y: str, title: str = "") -> None:
    """Label the axes, and take away what is not needed."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, loc="left", fontsize=10, color=INK)
    ax.spines[["top", "right"]].set_visible(False)


def curves(ax: Axes, named: Mapping[str, Tensor], begin: int = 0) -> None:
    """Draw curves over steps on a logarithmic scale; a value of zero is left out."""
    for i, (name, y) in enumerate(named.items()):
        many = len(named) > MANY
        y = y.detach().double().cpu()
        y = torch.where(y > 0, y, torch.full_like(y, float("nan")))
        marker = "." if len(y) < 25 else ""
        ax.plot(
            range(begin, begin + len(y)),
            y.tolist(),
            color=COLOURS[-1] if many else COLOURS[i % len(COLOURS)],
            alpha=0.5 if many else 1.0,
            linewidth=0.8 if many else 1.5,
            # Thin lines of two colours may look alike: neighbours have another stroke too.
            linestyle=DASHED if i % 2 and not many else "-",
            marker=marker,
            label=None if many else name,
        )
    if any(bool((y > 0).any()) for y in named.values()):
        ax.set_yscale("log")
