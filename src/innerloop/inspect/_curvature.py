"""The extreme curvatures of the inner loss along a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from innerloop._linear.hessian import Hessian
from innerloop._trajectory import Trajectory
from innerloop._utils import tree
from innerloop._utils.arguments import check_times
from innerloop._utils.text_table import table
from innerloop.errors import InvalidInputError, MissingExtraError, NotDifferentiableError
from innerloop.inspect._plot import COLOURS, axes_of, figure_with, tidy
from innerloop.inspect._window import (
    Inspected,
    Layout,
    state_at,
    time_of,
    trajectory_of,
    vjp,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE = 40
"""Up to so many parameters the Hessian is formed, and all eigenvalues are computed."""


class Curvature(NamedTuple):
    """Extreme eigenvalues of the Hessian of the inner loss at some steps.

    All tensors are float64, on the CPU, without a graph.

    Attributes:
        times: the steps at which they were computed.
        largest: ``[times, k]``, the largest eigenvalues, the largest first.
        smallest: ``[times, k]``, the smallest, the smallest first.
    """

    times: tuple[int, ...]
    largest: Tensor
    smallest: Tensor

    def __repr__(self) -> str:
        rows = [
            [str(t), f"{float(low[0]):.6g}", f"{float(high[0]):.6g}"]
            for t, low, high in zip(self.times, self.smallest, self.largest, strict=True)
        ]
        shown = table(rows, header=["step", "smallest", "largest"], align=">>>")
        return f"Curvature of the inner loss (eigenvalues of its Hessian)\n{shown}"

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw both ends over the steps; needs matplotlib (``pip install 'innerloop[plot]'``)."""
        ax = axes_of(ax, "Curvature.plot")
        ends = zip(("largest", "smallest"), (self.largest, self.smallest), strict=True)
        for i, (label, values) in enumerate(ends):
            for j, column in enumerate(values.T):
                ax.plot(
                    self.times,
                    column.tolist(),
                    "o-",
                    markersize=3,
                    color=COLOURS[i],
                    alpha=1 / (1 + 0.5 * j),
                    label=label if not j else None,
                )
        ax.axhline(0, color="#767676", linewidth=0.8)
        tidy(ax, x="step t", y="eigenvalue", title="curvature of the inner loss")
        ax.legend(frameon=False, fontsize=8)
        return figure_with(ax)


def curvature(
    traj: Inspected, times: Sequence[int] | None = None, k: int = 1, *, tol: float = 1e-6
) -> Curvature:
    r"""Compute the extreme eigenvalues of the Hessian of the inner loss along a loop.

    At step t it is :math:`\nabla^2_{\theta\theta} \ell(\theta_t, \lambda, b_t)`, with the batch of
    that step. Plain gradient descent with rate lr is unstable where an eigenvalue exceeds 2/lr.

    Args:
        traj: a trajectory of `innerloop.unroll`, or a loop of `innerloop.track` (while its graph
            is there).
        times: at which steps, 0 to T - 1; None: about eight of them, evenly spread.
        k: how many at each end.
        tol: relative accuracy of the eigenvalues.

    Returns:
        A `Curvature`.

    Raises:
        InvalidInputError: a time is outside of the loop, or ``k`` does not fit.
        MissingExtraError: the model has more than 40 parameters, and SciPy is not installed.

    Cost:
        Some 20 to 60 products with the Hessian (3 gradients each) at every time, by the Lanczos
        iteration of SciPy (``eigsh``); package ``scipy``, ``pip install 'innerloop[inspect]'``.

    Example:
        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: (params["w"] ** 4).sum(), innerloop.optim.sgd(lr=0.01)
        ... )
        >>> traj = innerloop.unroll(problem, {"w": torch.tensor([1.0, 2.0])}, None, steps=1)
        >>> innerloop.inspect.curvature(traj)  # 12 w²
        Curvature of the inner loss (eigenvalues of its Hessian)
        step  smallest  largest
           0        12       48
    """
    traj = trajectory_of(traj)
    if not traj.steps:
        raise InvalidInputError("the loop has no step, so there is no inner loss to look at")
    if times is None:
        times = sorted({round(i * (traj.steps - 1) / 7) for i in range(8)})
    chosen = [time_of(traj, t) for t in check_times("times", times)]
    if any(t >= traj.steps for t in chosen):
        raise InvalidInputError(
            f"times={list(times)}: the loss of step t belongs to time t, 0 to {traj.steps - 1}"
        )
    ends = [_extremes(*_product(traj, t), k, tol) for t in chosen]
    return Curvature(
        tuple(chosen),
        torch.stack([high for _, high in ends]),
        torch.stack([low for low, _ in ends]),
    )


def _product(traj: Trajectory, t: int) -> tuple[Callable[[Tensor], Tensor], Layout]:
    """Return the product with the Hessian at step t, on flat vectors."""
    if traj.record is not None:
        carry, record = state_at(traj, t), traj.record
        batches = record.loop.batches.part(t, t + 1)
        hyper = tree.map_tensors(Tensor.detach, record.loop.hyper)
        with record.context.restored(record.loop.problem):
            batch = batches.at(carry.params, hyper, 0, record.loop.time(t))
        hessian = Hessian(record.loop.problem, carry, hyper, batch)
        layout = Layout(carry.params)

        def by_operator(v: Tensor) -> Tensor:
            with record.context.restored(record.loop.problem):
                found = hessian([x[0] for x in layout.split(v[None]).values()])
            return layout.flat(
                {
                    n: None if x is None else x[None]
                    for n, x in zip(layout.names, found, strict=True)
                },
                1,
            )[0]

        return by_operator, layout
    params = {n: p for n, p in traj.at(t).params.items() if p.requires_grad}
    loss = traj.losses[t]
    if not params or not loss.requires_grad:
        raise NotDifferentiableError(
            f"the loss of step {t} has no graph that can be differentiated twice: track with "
            'learn="init" or "outer", without first_order'
        )
    layout = Layout(params)
    grads = vjp([loss], None, params, create_graph=True)

    def by_graph(v: Tensor) -> Tensor:
        along = layout.split(v[None])
        pairs = [
            (g, along[n][0])
            for n, g in zip(params, grads, strict=True)
            if g is not None and g.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(v)
        found = vjp([g for g, _ in pairs], [x for _, x in pairs], params)
        named = {n: None if x is None else x[None] for n, x in zip(params, found, strict=True)}
        return layout.flat(named, 1)[0]

    return by_graph, layout


def _extremes(
    product: Callable[[Tensor], Tensor], layout: Layout, k: int, tol: float
) -> tuple[Tensor, Tensor]:
    """Return the k smallest and the k largest eigenvalues."""
    n = layout.size
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n:
        raise InvalidInputError(f"k={k!r}: write a number from 1 to {n}, the parameters' size")
    if n <= max(DENSE, 2 * k + 1):
        rows = [product(e) for e in torch.eye(n, dtype=layout.dtype, device=layout.device)]
        matrix = torch.stack(rows).double().cpu()
        values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
        return values[:k], values.flip(0)[:k]
    eigsh, operator = _scipy()

    def multiply(v: Any) -> Any:
        x = torch.from_numpy(np.ascontiguousarray(v).reshape(-1)).to(layout.dtype)
        return product(x.to(layout.device)).detach().double().cpu().numpy()

    linear = operator((n, n), matvec=multiply, dtype=np.float64)
    start = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    found = eigsh(linear, k=2 * k, which="BE", tol=tol, v0=start, return_eigenvectors=False)
    values = torch.from_numpy(np.sort(found))
    return values[:k], values.flip(0)[:k]


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError as error:
        raise MissingExtraError.of("scipy", "inspect", "innerloop.inspect.curvature") from error
    return eigsh, LinearOperator
