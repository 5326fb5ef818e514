"""The exponents of the dynamics of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._trajectory import Trajectory
from innerloop._utils import tree
from innerloop._utils.arguments import check_seed
from innerloop._utils.text_table import table
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.inspect._plot import COLOURS, axes_of, figure_with, tidy
from innerloop.inspect._window import (
    GraphWindow,
    Inspected,
    Layout,
    apart,
    part_of,
    push_through,
    state_at,
    time_of,
    trajectory_of,
)
from innerloop.optim._engine.packing import padding_masks
from innerloop.strategy._engine.step_pullback import state_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Vector = list[Tensor | None]


class Lyapunov(NamedTuple):
    """The Lyapunov exponents of a stretch of training, per step, in natural logarithms.

    All tensors are float64, on the CPU, without a graph.

    Attributes:
        exponents: ``[k]``, the largest first.
        history: ``[steps, k]``, the logarithm by which each step stretched each direction.
        start: the first step that counts.
    """

    exponents: Tensor
    history: Tensor
    start: int

    def __repr__(self) -> str:
        steps = len(self.history)
        half = self.history[steps // 2 :].mean(0) if steps else self.exponents
        shown = table(
            [
                [str(i + 1), f"{float(x):+.6g}", f"{float(y):+.6g}", _time(float(x))]
                for i, (x, y) in enumerate(zip(self.exponents, half, strict=True))
            ],
            header=["", "exponent", "second half", ""],
            align=">>>",
        )
        return f"Lyapunov exponents per step, over {steps} steps from step {self.start}\n{shown}"

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw how the averages settle; needs matplotlib (``pip install 'innerloop[plot]'``)."""
        ax = axes_of(ax, "Lyapunov.plot")
        count = torch.arange(1, len(self.history) + 1, dtype=torch.float64)
        for i, column in enumerate((self.history.cumsum(0) / count[:, None]).T):
            ax.plot(
                range(self.start, self.start + len(column)),
                column.tolist(),
                color=COLOURS[i % len(COLOURS)],
                label=f"{i + 1}",
            )
        ax.axhline(0, color="#767676", linewidth=0.8)
        tidy(ax, x="step t", y="average exponent", title="Lyapunov exponents of training")
        ax.legend(frameon=False, fontsize=8)
        return figure_with(ax)


def _time(exponent: float) -> str:
    """Say over how many steps a nudge grows or shrinks by a factor of e."""
    if not abs(exponent) > 1e-12:
        return "kept"
    return f"{'grows' if exponent > 0 else 'shrinks'} e-fold in {1 / abs(exponent):.3g} steps"


def lyapunov(
    traj: Inspected, k: int = 1, *, start: int = 0, end: int = -1, skip: int = 0, seed: int = 0
) -> Lyapunov:
    r"""Compute the largest Lyapunov exponents of the training dynamics.

    A step maps the state (parameters and the optimizer's state) to the next,
    :math:`s_{t+1} = F_t(s_t)`. k random tangents are pushed through the steps and made orthonormal
    after each by :math:`Y = QR` (Benettin et al. 1980); an exponent is the average of
    :math:`\ln R_{ii}`. If the largest is positive, two trainings that start a rounding error apart
    end elsewhere, and a meta-gradient through many such steps means little.

    Args:
        traj: a trajectory of `innerloop.unroll`, or a loop of `innerloop.track`.
        k: how many exponents.
        start, end: the steps from ``start`` to ``end``; -1 is the end of the loop.
        skip: steps at the beginning that turn the tangents into place and do not count.
        seed: of the tangents.

    Returns:
        A `Lyapunov`.

    Raises:
        InvalidInputError: ``k`` is more than the size of the state, or no step is left.
        NotDifferentiableError: the states have no graph, or an operation has no forward mode.

    Cost:
        k products in forward mode a step.

    Example:
        On w²/2 every step multiplies w by 1 - lr, so the exponent is ln(1/2).

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5)
        ... )
        >>> start = {"w": torch.tensor(2.0, requires_grad=True)}
        >>> traj = innerloop.unroll(problem, start, None, steps=3)
        >>> innerloop.inspect.lyapunov(traj).exponents
        tensor([-0.6931], dtype=torch.float64)
    """
    traj = trajectory_of(traj)
    begin, last = time_of(traj, start), time_of(traj, end)
    if not 0 <= skip < last - begin:
        raise InvalidInputError(
            f"no step is left: steps {begin} to {last} with skip={skip}; write a later end"
        )
    again = traj.record is not None and traj.record.exact
    carry = state_at(traj, begin) if again else traj.at(begin)
    frame = _Frame(carry, traj.record.loop.problem.computed_buffers if again else set())
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= frame.size:
        raise InvalidInputError(f"k={k!r}: write a number from 1 to {frame.size}, the state's size")
    tangents = frame.random(k, seed)
    logs: list[Tensor] = []

    def after_step(t: int, carry: Carry, tangents: list[Vector]) -> list[Vector]:
        tangents, stretched = frame.orthonormal(tangents)
        logs.append(stretched)
        return tangents

    if again:
        record = traj.record
        loop = part_of(record, carry, begin, last)
        with torch.no_grad():
            push_through(loop, record.context, tangents, None, after_step)
    else:
        _push_by_graph(traj, begin, last, tangents, after_step)
    history = torch.stack(logs)[skip:]
    exponents = history.mean(0)
    order = exponents.argsort(descending=True)
    return Lyapunov(exponents[order], history[:, order], begin + skip)


def _push_by_graph(
    traj: Trajectory, begin: int, last: int, tangents: list[Vector], after_step: object
) -> None:
    assert callable(after_step)
    for t in range(begin, last):
        before, after = (tree.leaves(state_of(traj.at(time))) for time in (t, t + 1))
        inputs = {
            str(i): x for i, x in enumerate(before) if tree.differentiable(x) and x.requires_grad
        }
        outputs = {str(i): x for i, x in enumerate(after) if tree.differentiable(x)}
        if not inputs:
            raise NotDifferentiableError(
                f"the state at time {t} has no graph: pass params that require grad to unroll, or "
                'track with learn="init", and start where the graph starts'
            )
        window = GraphWindow(outputs, inputs)
        given = {
            n: torch.stack(
                [torch.zeros_like(x) if (v := row[int(n)]) is None else v.to(x) for row in tangents]
            )
            for n, x in inputs.items()
        }
        # Of one time, the parameters were computed from the momentum: the next step sees both.
        along = apart(
            GraphWindow(inputs, inputs), window.inputs.flat(given, len(tangents)), forward=True
        )
        found = window.outputs.split(window.push(along))
        rows: list[Vector] = [
            [found[str(i)][k] if str(i) in found else None for i in range(len(after))]
            for k in range(len(tangents))
        ]
        tangents = after_step(t, traj.at(t + 1), rows)


class _Frame:
    """The part of a state that has a tangent, as one vector."""

    def __init__(self, carry: Carry, computed: set[str]) -> None:
        params, state, buffers = state_of(carry)
        leaves = [*params.values(), *tree.leaves(state)]
        masks = [*[None] * len(params), *padding_masks(state)]
        self._rest = len(buffers)
        places = {i: x for i, x in enumerate(leaves) if tree.differentiable(x)}
        for i, (name, x) in enumerate(buffers.items()):
            if name in computed and tree.differentiable(x):
                places[len(leaves) + i] = x
        self._count = len(leaves) + len(buffers)
        self._places = list(places)
        self._layout = Layout({str(i): x for i, x in places.items()})
        mask = [
            torch.ones(x.numel(), dtype=torch.bool)
            if (m := (masks + [None] * self._rest)[i]) is None
            else m.flatten().cpu()
            for i, x in places.items()
        ]
        # Padding between packed tensors is no part of the dynamics.
        self._mask = torch.cat(mask)
        self.size = int(self._mask.sum())

    def random(self, k: int, seed: int) -> list[Vector]:
        """Return k random orthonormal tangents."""
        check_seed("seed", seed)
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(self.size, k, generator=generator, dtype=torch.float64)
        return self._tangents(torch.linalg.qr(draw)[0])

    def orthonormal(self, tangents: list[Vector]) -> tuple[list[Vector], Tensor]:
        """Return tangents made orthonormal, and the logarithms of what they were stretched by."""
        named = {
            str(i): torch.stack(
                [torch.zeros(shape) if (v := row[i]) is None else v for row in tangents]
            )
            for i, shape in zip(self._places, self._layout.shapes, strict=True)
        }
        matrix = self._layout.flat(named, len(tangents)).double().cpu()[:, self._mask].T
        q, r = torch.linalg.qr(matrix)
        stretched = r.diagonal().abs()
        return self._tangents(q), stretched.clamp_min(1e-300).log()

    def _tangents(self, matrix: Tensor) -> list[Vector]:
        full = torch.zeros(matrix.shape[1], len(self._mask), dtype=torch.float64)
        full[:, self._mask] = matrix.T
        named = self._layout.split(full.to(self._layout.device))
        return [
            [named[str(i)][k] if str(i) in named else None for i in range(self._count)]
            for k in range(matrix.shape[1])
        ]
