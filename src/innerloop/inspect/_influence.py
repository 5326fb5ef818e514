"""How much the state at each step of a loop matters for the outer loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree
from innerloop._utils import tree
from innerloop._utils.arguments import check_seed
from innerloop._utils.text_table import table
from innerloop.errors import InvalidInputError
from innerloop.inspect._adjoints import Sink, sweep_back
from innerloop.inspect._plot import COLOURS, axes_of, curves, figure_with, tidy
from innerloop.inspect._window import (
    Inspected,
    hyper_of,
    outer_value,
    trajectory_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Outer = Callable[[Trajectory, Any], Any] | Tensor
"""``outer(traj, hyper)``, or the scalar itself."""


class Influence(NamedTuple):
    r"""The size of the derivative of an outer loss by the state at each step.

    All tensors are float64, on the CPU, without a graph.

    Attributes:
        params: name -> ``[T + 1]``, the norm of :math:`dL/d\theta_t` for each parameter; NaN at a
            time whose parameters have no graph.
        whole: ``[T + 1]``, the norm over all parameters.
        hyper: path -> ``[T]``, the norm of what step t alone adds to the gradient of that outer
            variable; empty where there is none. Of a tracked loop those of
            ``track(..., hyper=...)``.
        value: the outer loss.
        jacobian: ``[T + 1]``, the Frobenius norm of :math:`\partial\theta_T/\partial\theta_t` as
            the root of the unbiased estimate of its square; None without probes.
        jacobian_error: ``[T + 1]``, its standard error; NaN for a single probe.
    """

    params: dict[str, Tensor]
    whole: Tensor
    hyper: dict[str, Tensor]
    value: float
    jacobian: Tensor | None = None
    jacobian_error: Tensor | None = None

    @property
    def growth(self) -> float:
        """Return max over t of the norm of dL/dθ_t, relative to that of dL/dθ_T."""
        end = float(self.whole[-1])
        largest = float(self.whole[~self.whole.isnan()].max())
        return largest / end if end else float("inf") if largest else 1.0

    def __repr__(self) -> str:
        steps = len(self.whole) - 1
        times = sorted({0, steps // 4, steps // 2, 3 * steps // 4, steps})
        rows = [(f"d/d {n}", x[times].tolist()) for n, x in self.params.items()]
        rows += [("d/d all parameters", self.whole[times].tolist())]
        inner = [min(t, steps - 1) for t in times] if steps else []
        rows += [(f"d/d hyper{n} in the step", x[inner].tolist()) for n, x in self.hyper.items()]
        if self.jacobian is not None:
            rows += [("|d params(T)/d params(t)|", self.jacobian[times].tolist())]
        shown = table(
            [[label, *(f"{v:.3g}" for v in values)] for label, values in rows if values],
            header=["norm at step", *map(str, times)],
            align="<" + ">" * len(times),
        )
        return f"Influence on an outer loss of {self.value:.6g} over {steps} steps\n{shown}"

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the curves over the steps; needs matplotlib (``pip install 'innerloop[plot]'``)."""
        ax = axes_of(ax, "Influence.plot")
        curves(ax, self.params)
        steps = range(len(self.whole))
        ax.plot(steps, self.whole.tolist(), color="#222222", linewidth=2, label="all parameters")
        for i, (path, x) in enumerate(self.hyper.items(), start=len(self.params)):
            colour = COLOURS[i % len(COLOURS)]
            label = f"hyper{path}, in the step"
            ax.plot(range(len(x)), x.tolist(), linestyle=":", color=colour, label=label)
        if self.jacobian is not None:
            y = self.jacobian.tolist()
            ax.plot(steps, y, color="#222222", linestyle="--", label="Jacobian to the end")
            if self.jacobian_error is not None and not self.jacobian_error.isnan().any():
                low = (self.jacobian - self.jacobian_error).clamp_min(1e-300).tolist()
                high = (self.jacobian + self.jacobian_error).tolist()
                ax.fill_between(steps, low, high, color="#222222", alpha=0.15)
        tidy(ax, x="step t", y="norm", title="influence of each step on the outer loss")
        ax.legend(frameon=False, fontsize=8)
        return figure_with(ax)


def influence(traj: Inspected, outer: Outer, probes: int = 0, *, seed: int = 0) -> Influence:
    r"""Measure how much the outer loss depends on the parameters at every step.

    With the adjoint :math:`a_t = dL/d\theta_t`, one backward sweep passes

    .. math:: a_t = \Big(\frac{\partial\theta_{t+1}}{\partial\theta_t}\Big)^T a_{t+1} +
        \frac{\partial L}{\partial\theta_t}

    at every step anyway (with the optimizer's state beside the parameters); its norms are kept,
    not the vectors. An adjoint that grows backwards in time says that the outer loss is a steep
    function of where training started; one that vanishes, that training forgets.

    Args:
        traj: a trajectory of `innerloop.unroll` under `StoreAll` (while its graph is there) or
            `Checkpointed`, with params that require grad; or a loop of `innerloop.track`.
        outer: ``outer(traj, hyper)``, the outer loss; or the scalar computed from ``traj``.
        probes: k random vectors u of signs, whose :math:`\| u^T
            \partial\theta_T/\partial\theta_t \|^2` estimates the square of the Frobenius norm
            without bias (Hutchinson 1990); 0: none.
        seed: of the probes.

    Returns:
        An `Influence`.

    Raises:
        InvalidInputError: ``outer`` gives no scalar that depends on the trajectory; ``probes`` is
            negative.
        NotDifferentiableError: the parameters have no graph, or the strategy keeps no exact
            derivative of every step.

    Cost:
        One backward pass. Under `Checkpointed` the probes are pulled back in the same replay, all
        at once, with k more adjoints in memory; otherwise each takes a backward pass.

    Example:
        On w²/2 every step multiplies w by 1 - lr = 1/2, so d(w₃²/2)/dw_t = w₃ / 2^(3-t).

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5)
        ... )
        >>> start = {"w": torch.tensor(8.0, requires_grad=True)}
        >>> traj = innerloop.unroll(problem, start, None, steps=3)
        >>> found = innerloop.inspect.influence(traj, lambda traj, hyper: traj.params["w"] ** 2 / 2)
        >>> found.params["w"]
        tensor([0.1250, 0.2500, 0.5000, 1.0000], dtype=torch.float64)
    """
    if not isinstance(probes, int) or isinstance(probes, bool) or probes < 0:
        raise InvalidInputError(f"probes={probes!r}: write a number of random vectors, 0 or more")
    given, traj = traj, trajectory_of(traj)
    hyper = hyper_of(given)
    value = outer_value(traj, outer, hyper)
    sink = _Squares(traj, hyper, probes)
    sweep_back(traj, value, hyper, sink, _signs(traj, probes, seed))
    return sink.result(float(value.detach()))


class _Squares(Sink):
    """Squared norms by time, as they come in."""

    def __init__(self, traj: Trajectory, hyper: HyperTree, probes: int) -> None:
        steps = traj.steps
        self.params = {
            n: torch.full((steps + 1,), float("nan"), dtype=torch.float64)
            for n, p in traj.at(-1).params.items()
            if tree.differentiable(p)
        }
        apart = traj.function is not None or len(traj.hypers) == steps
        self.hyper = {
            path: torch.zeros(steps, dtype=torch.float64)
            for path, x in tree.named_tensors(hyper)
            if apart and tree.differentiable(x) and x.requires_grad
        }
        self.probes = torch.zeros(probes, steps + 1, dtype=torch.float64) if probes else None

    def param(self, name: str, t: int, g: Tensor | None) -> None:
        self.params[name][t] = 0 if g is None else _square(g)

    def of_hyper(self, path: str, t: int, g: Tensor) -> None:
        if path in self.hyper:
            self.hyper[path][t] = _square(g)

    def probe(self, k: int, name: str, t: int, g: Tensor) -> None:
        assert self.probes is not None
        self.probes[k, t] += _square(g)

    def result(self, value: float) -> Influence:
        """Return what has come in."""
        squares = torch.stack(list(self.params.values()))
        whole = torch.where(squares.isnan().all(0), float("nan"), squares.nan_to_num().sum(0))
        jacobian = error = None
        if self.probes is not None:
            count = len(self.probes)
            mean = self.probes.mean(0)
            jacobian = mean.sqrt()
            spread = self.probes.std(0) / count**0.5 if count > 1 else mean * float("nan")
            # The error of the root, to first order.
            error = torch.where(mean > 0, spread / (2 * jacobian), spread)
        return Influence(
            {n: x.sqrt() for n, x in self.params.items()},
            whole.sqrt(),
            {n: x.sqrt() for n, x in self.hyper.items()},
            value,
            jacobian,
            error,
        )


def _square(x: Tensor) -> Tensor:
    """Return the squared norm in float64: the squares of float32 gradients may underflow."""
    x = x.detach().to_dense() if x.layout is not torch.strided else x.detach()
    return torch.linalg.vector_norm(x).double() ** 2


def _signs(traj: Trajectory, probes: int, seed: int) -> list[dict[str, Tensor]]:
    """Return random signs in the shape of the last parameters."""
    check_seed("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    params = {n: p for n, p in traj.at(-1).params.items() if tree.differentiable(p)}
    return [
        {
            n: (torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p.detach())
            for n, p in params.items()
        }
        for _ in range(probes)
    ]
