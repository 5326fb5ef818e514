"""The Jacobian from every step to the end, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree
from innerloop._utils import tree
from innerloop.errors import InvalidInputError
from innerloop.inspect._adjoints import Sink, sweep_back
from innerloop.inspect._plot import axes_of, figure_with

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENTRIES = 16
"""Models of up to so many numbers are shown number by number."""
GROUPS = 12
"""More tensors than that are put together by the first parts of their names."""
LARGEST = 20_000_000


class Reach(NamedTuple):
    r"""How strongly each parameter at a step acts on each parameter at the end.

    Attributes:
        names: what rows and columns stand for: tensors, groups of them, or single numbers.
        values: ``[T + 1, rows, columns]``, of :math:`\partial\theta_T^i/\partial\theta_t^j` the
            Frobenius norm (an estimate), or the number itself where ``exact``.
        exact: True if rows and columns are single numbers.
    """

    names: tuple[str, ...]
    values: Tensor
    exact: bool

    def plot(self, time: int = 0, ax: Axes | None = None) -> Figure:
        """Draw the matrix from one step to the end; needs matplotlib."""
        from matplotlib.colors import LogNorm, SymLogNorm

        size = len(self.names)
        ax = axes_of(ax, "Reach.plot", (2.6 + 0.3 * size, 1.7 + 0.26 * size))
        matrix = self.values[time]
        finite = self.values[self.values.isfinite()].abs()
        top = max(float(finite.max()) if len(finite) else 1.0, 1e-30)
        positive = finite[finite > 0]
        # One scale for all steps, so that growth and decay are seen.
        low = max(float(positive.min()) if len(positive) else top / 10, top * 1e-6)
        norm = (
            SymLogNorm(linthresh=max(low, top * 1e-3), vmin=-top, vmax=top)
            if self.exact
            else LogNorm(min(low, top * 0.99), top)
        )
        shown = matrix if self.exact else matrix.clamp_min(low)
        image = ax.imshow(
            shown.numpy(),
            norm=norm,
            cmap="RdBu_r" if self.exact else "viridis",
            aspect="auto",
            interpolation="none",
        )
        ax.set_xticks(range(size), self.names, rotation=40, ha="right", fontsize=8)
        ax.set_yticks(range(size), self.names, fontsize=8)
        ax.set_xlabel(f"at step {time % len(self.values)}")
        ax.set_ylabel("at the end")
        if size <= 6:
            for i in range(size):
                for j in range(size):
                    value = float(matrix[i, j])
                    ax.text(
                        j, i, f"{value:.2g}", ha="center", va="center", fontsize=8,
                        color=_on(image.cmap(norm(float(shown[i, j])))),
                    )  # fmt: skip
        bar = figure_with(ax).colorbar(image, ax=ax)
        bar.ax.tick_params(labelsize=7)
        return figure_with(ax)


def _on(colour: Sequence[float]) -> str:
    """Return the ink that is read on a colour; not the ink of the page, which changes at night."""
    red, green, blue = colour[:3]
    return "#111111" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "#fefefe"


def reach(
    traj: Trajectory, value: Tensor, hyper: HyperTree, probes: int = 4, seed: int = 0
) -> Reach:
    r"""Compute the Jacobian from every step to the end, in blocks, by one sweep.

    With random signs u for the rows of block i,
    :math:`\mathrm{E} \| u^T J_{ij} \|^2 = \| J_{ij} \|_F^2` (Hutchinson 1990).

    Args:
        traj: the trajectory.
        value: a scalar that depends on it.
        hyper: the outer variables.
        probes: random vectors for each block of rows.
        seed: of the vectors.
    """
    params = {n: p.detach() for n, p in traj.at(-1).params.items() if tree.differentiable(p)}
    size = sum(p.numel() for p in params.values())
    if size <= ENTRIES:
        rows = _unit_rows(params)
        names = [
            n if not p.ndim else f"{n}[{i}]" for n, p in params.items() for i in range(p.numel())
        ]
        group = {n: i for i, n in enumerate(names)}
    else:
        groups = _groups(list(params))
        names = list(dict.fromkeys(groups.values()))
        group = {n: names.index(g) for n, g in groups.items()}
        if len(names) * probes * size > LARGEST:
            raise InvalidInputError(
                f"a map of {len(names)} x {len(names)} blocks would take "
                f"{len(names) * probes} adjoints of {size:,} numbers at once"
            )
        generator = torch.Generator().manual_seed(seed)
        rows = [
            {
                n: (torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p)
                * float(groups[n] == name)
                for n, p in params.items()
            }
            for name in names
            for _ in range(probes)
        ]
    sink = _Blocks(traj.steps, params, group, len(names), size <= ENTRIES, probes)
    sweep_back(traj, value, hyper, sink, rows)
    values = sink.values if size <= ENTRIES else (sink.values / probes).sqrt()
    return Reach(tuple(names), values, size <= ENTRIES)


def _unit_rows(params: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    rows = []
    for name, p in params.items():
        for i in range(p.numel()):
            row = {n: torch.zeros_like(x) for n, x in params.items()}
            row[name].view(-1)[i] = 1
            rows.append(row)
    return rows


def _groups(names: list[str]) -> dict[str, str]:
    """Return the group of each name: itself, or as much of its beginning as leaves few."""
    depth = max((n.count(".") for n in names), default=0) + 1
    for parts in range(depth, 0, -1):
        found = {n: ".".join(n.split(".")[:parts]) for n in names}
        if len(set(found.values())) <= GROUPS:
            return found
    kept = list(dict.fromkeys(found.values()))[: GROUPS - 1]
    return {n: g if g in kept else "the rest" for n, g in found.items()}


class _Blocks(Sink):
    """Adds up squares by block, or keeps the numbers of a small model."""

    def __init__(
        self,
        steps: int,
        params: dict[str, Tensor],
        group: dict[str, int],
        count: int,
        exact: bool,
        probes: int,
    ) -> None:
        self.values = torch.zeros(steps + 1, count, count, dtype=torch.float64)
        self._group, self._exact, self._probes = group, exact, probes
        self._first: dict[str, int] = {}
        begin = 0
        for name, p in params.items():
            self._first[name] = begin
            begin += p.numel()

    def param(self, name: str, t: int, g: Tensor | None) -> None:
        pass

    def of_hyper(self, path: str, t: int, g: Tensor) -> None:
        pass

    def probe(self, k: int, name: str, t: int, g: Tensor) -> None:
        if self._exact:
            begin = self._first[name]
            self.values[t, k, begin : begin + g.numel()] = g.detach().double().cpu().flatten()
        else:
            square = torch.linalg.vector_norm(g.detach()).double().cpu() ** 2
            self.values[t, k // self._probes, self._group[name]] += square
