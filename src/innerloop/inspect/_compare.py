"""One strategy against another: how far apart are their meta-gradients?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from innerloop._metagradient.metagradient import metagradient
from innerloop._trajectory import Trajectory
from innerloop._unroll import check_strategy
from innerloop._utils import tree
from innerloop._utils.arguments import check_outer
from innerloop._utils.text_table import table
from innerloop.errors import InvalidInputError
from innerloop.inspect._plot import COLOURS, axes_of, figure_with, tidy
from innerloop.inspect._window import Inspected, trajectory_of
from innerloop.strategy._base import Strategy
from innerloop.strategy._store_all import StoreAll

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class StrategyComparison(NamedTuple):
    """The meta-gradients of two strategies, tensor by tensor.

    Attributes:
        cosine: path -> cosine of the angle between them; NaN where one is zero.
        ratio: path -> norm of the strategy's over norm of the reference's.
        difference: path -> norm of the difference, over the norm of the reference's.
        strategy: the strategy, as it is written.
        reference: what it is compared with.
    """

    cosine: dict[str, float]
    ratio: dict[str, float]
    difference: dict[str, float]
    strategy: str
    reference: str

    def __repr__(self) -> str:
        rows = [
            [n, f"{self.cosine[n]:.6f}", f"{self.ratio[n]:.4g}", f"{self.difference[n]:.1e}"]
            for n in self.cosine
        ]
        shown = table(rows, header=["gradient of", "cosine", "norm ratio", "off by"], align="<>>>")
        return f"{self.strategy} against {self.reference}\n{shown}"

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the cosines; needs matplotlib (``pip install 'innerloop[plot]'``)."""
        ax = axes_of(ax, "StrategyComparison.plot")
        names = list(self.cosine)[::-1]
        ax.barh(names, [self.cosine[n] for n in names], color=COLOURS[0])
        ax.axvline(1, color="#767676", linewidth=0.8)
        tidy(ax, x="cosine", y="", title=f"{self.strategy} against {self.reference}")
        return figure_with(ax)


def compare(
    traj: Inspected,
    outer: Callable[[Trajectory, Any], Any],
    strategy: Strategy,
    reference: Strategy | None = None,
) -> StrategyComparison:
    r"""Compare the meta-gradient of a strategy with that of another, tensor by tensor.

    The loop of ``traj`` is run with both. What counts is mostly the direction: the cosine of the
    angle, then the ratio of the norms.

    Args:
        traj: a trajectory of `innerloop.unroll`; says problem, start, data and hyper.
        outer: ``outer(traj, hyper)``, the outer loss.
        strategy: what is compared, ``innerloop.Truncated(last=10)`` for example.
        reference: with what; default `StoreAll`.

    Returns:
        A `StrategyComparison`; ``whole`` stands for all tensors together. What the strategy does
        not differentiate is left out.

    Raises:
        InvalidInputError: ``traj`` belongs to a tracked loop, which cannot be run again.

    Cost:
        One meta-gradient with each.

    Example:
        `FirstOrder` forgets that the gradient depends on the parameters: on w²/2 it gives the
        gradient 1 in place of (1 - lr)³.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5)
        ... )
        >>> traj = innerloop.unroll(problem, {"w": torch.tensor(2.0)}, None, steps=3)
        >>> innerloop.inspect.compare(
        ...     traj, lambda traj, hyper: traj.params["w"], innerloop.FirstOrder()
        ... )
        FirstOrder() against StoreAll()
        gradient of     cosine  norm ratio  off by
        params['w']   1.000000           8  7.0e+00
        whole         1.000000           8  7.0e+00
    """
    traj = trajectory_of(traj)
    reference = StoreAll() if reference is None else reference
    check_outer(outer)
    for each in (strategy, reference):
        check_strategy(each)
    record = traj.record
    if record is None:
        raise InvalidInputError(
            "a tracked loop cannot be run again with another strategy: write the loop with "
            "innerloop.unroll, and pass its trajectory"
        )
    loop = record.loop
    learned = any(tree.differentiable(x) for x in tree.leaves(loop.hyper))
    wrt = tuple(
        name
        for name in ("params", "hyper")
        if name in strategy.differentiates & reference.differentiates
        and (name == "params" or learned)
    )
    grads = []
    for each in (strategy, reference):
        with record.context.restored(loop.problem):
            _, found = metagradient(
                outer,
                loop.problem.original or loop.problem,
                loop.start.detach(),
                loop.batches.part(0, traj.steps),
                hyper=tree.map_tensors(Tensor.detach, loop.hyper),
                wrt=wrt,
                strategy=each,
                steps=traj.steps,
                save_at=loop.save_at,
            )
        grads.append({n: dict(tree.named_tensors(found[n], n)) for n in wrt})
    ours, theirs = ({p: g for part in each.values() for p, g in part.items()} for each in grads)
    names = [n for n in theirs if n in ours]
    flat = {
        n: (ours[n].detach().double().flatten().cpu(), theirs[n].detach().double().flatten().cpu())
        for n in names
    }
    flat["whole"] = (
        torch.cat([a for a, _ in flat.values()]),
        torch.cat([b for _, b in flat.values()]),
    )
    return StrategyComparison(
        {n: _over(float(a @ b), float(a.norm() * b.norm())) for n, (a, b) in flat.items()},
        {n: _over(float(a.norm()), float(b.norm())) for n, (a, b) in flat.items()},
        {n: _over(float((a - b).norm()), float(b.norm())) for n, (a, b) in flat.items()},
        repr(strategy),
        repr(reference),
    )


def _over(a: float, b: float) -> float:
    return a / b if b else math.nan
