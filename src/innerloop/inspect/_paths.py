"""The outer gradient split by the parameters, the states and the steps it flows through."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree
from innerloop._utils import tree
from innerloop._utils.text_table import table
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.inspect._adjoints import UNRELATED, Sink, sweep_back
from innerloop.inspect._influence import Outer
from innerloop.inspect._plot import COLOURS, axes_of, figure_with, tidy
from innerloop.inspect._window import (
    GraphWindow,
    Inspected,
    LoopWindow,
    Named,
    apart,
    hyper_of,
    inputs_of,
    is_connected,
    ordered,
    outer_value,
    pulled,
    state_at,
    time_of,
    trajectory_of,
    window_of,
)
from innerloop.strategy._engine.step_pullback import Cotangents, state_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Paths(NamedTuple):
    r"""An outer gradient, split by the parameters at a time t through which it flows.

    The gradient is that with respect to the parameters :math:`\theta_s` at an earlier time s.

    .. math::
        \frac{dL}{d\theta_s}
        = \underbrace{\sum_i \frac{\partial L}{\partial\theta_t^i}
          \frac{\partial\theta_t^i}{\partial\theta_s}}_{\text{through}}
        + \underbrace{\text{the rest}}_{\text{direct: around time } t
          \text{, for example by earlier losses}}

    Attributes:
        outer: :math:`\partial L/\partial\theta_t^i` by name.
        through: ``through[name at t][name at s]``, the contribution of each parameter at t; with
            ``state=True`` also of each tensor of the optimizer's state, whose name starts with
            ``optimizer_state``, and of each buffer that the loss computes.
        direct: the part that reaches time s in other ways, by name at s. Without ``state=True``
            that includes what the optimizer's state at t carries.
        total: the sum, which is the whole outer gradient.
        time: t.
        wrt: s; None where ``wrt`` was a mapping of tensors.
        steps: name at s -> ``[t - s + 1, *shape]``, with ``steps=True`` the same total split by
            the steps from s to the end: row i is what step s + i adds, the last row is what reaches
            the end without passing an update. The rows sum to ``total``. None without it.
    """

    outer: dict[str, Tensor]
    through: dict[str, dict[str, Tensor]]
    direct: dict[str, Tensor]
    total: dict[str, Tensor]
    time: int
    wrt: int | None
    steps: dict[str, Tensor] | None = None

    def __str__(self) -> str:
        names = list(self.total)
        at = "" if self.wrt is None else f"[{self.wrt}]"
        rows = [(f"{name}[{self.time}]", row) for name, row in self.through.items()]
        rows += [("direct", self.direct), ("total", self.total)]
        return table(
            [[label, *(_shown(row[name]) for name in names)] for label, row in rows],
            header=["through", *(f"d/d {name}{at}" for name in names)],
            align="<" + ">" * len(names),
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the size of each path; needs matplotlib (``pip install 'innerloop[plot]'``)."""
        ax = axes_of(ax, "Paths.plot")
        rows = {**self.through, "direct": self.direct, "total": self.total}
        names = list(self.total)
        width = 0.8 / max(1, len(names))
        for j, name in enumerate(names):
            places = [i + j * width for i in range(len(rows))]
            heights = [float(row[name].detach().double().norm()) for row in rows.values()]
            ax.bar(places, heights, width, color=COLOURS[j % len(COLOURS)], label=f"d/d {name}")
        ax.set_xticks([i + 0.4 - width / 2 for i in range(len(rows))])
        labels = [n.removeprefix("optimizer_state.").removesuffix("<0>") for n in rows]
        ax.set_xticklabels(labels, rotation=30, ha="right", fontsize=8)
        tidy(ax, x="", y="norm", title=f"the outer gradient by what it passes at step {self.time}")
        ax.legend(frameon=False, fontsize=8)
        return figure_with(ax)


def _shown(x: Tensor) -> str:
    return f"{x.item():+.6g}" if x.numel() == 1 else f"|.|={x.norm().item():.4g}"


def paths(
    traj: Inspected,
    outer_loss: Outer,
    time: int = -1,
    wrt: int | Named = 0,
    *,
    state: bool = False,
    steps: bool = False,
) -> Paths:
    r"""Split the outer gradient by the parameters through which it flows.

    Args:
        traj: as in `jacobian`.
        outer_loss: ``outer(traj, hyper)``, or a scalar computed from the trajectory, whose graph is
            kept.
        time: the time t at which the paths are told apart; -1 is the last.
        wrt: the time s of the gradient, or a mapping from names to tensors, as in `jacobian`.
        state: tell the optimizer's state at t apart as well: what is left as direct then went
            around time t.
        steps: split the gradient by the steps too. With the adjoint :math:`a_t = dL/d\theta_t`,
            step t adds :math:`a_t - a_{t+1}`, what its update makes of the adjoint.

    Returns:
        A `Paths`; ``print`` shows it as a table.

    Cost:
        One backward pass for each parameter tensor, and two more. ``steps=True`` keeps an adjoint
        for every step.

    Example:
        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["a"] * params["b"], innerloop.optim.sgd(lr=0.5)
        ... )
        >>> start = {
        ...     "a": torch.tensor(2.0, requires_grad=True),
        ...     "b": torch.tensor(3.0, requires_grad=True),
        ... }
        >>> traj = innerloop.unroll(problem, start, None, steps=1)  # a1 = a0 - b0/2, b1 = b0 - a0/2
        >>> print(innerloop.inspect.paths(traj, traj.params["a"] * traj.params["b"]))
        through      d/d a[0]  d/d b[0]
        a[1]               +2        -1
        b[1]            -0.25      +0.5
        direct             +0        +0
        total           +1.75      -0.5
    """
    given, traj = traj, trajectory_of(traj)
    hyper = hyper_of(given)
    value = outer_value(traj, outer_loss, hyper)
    later = time_of(traj, time)
    earlier = ordered(traj, time, wrt) if isinstance(wrt, int) else None
    split = _by_replay if traj.function is not None else _by_graph
    found = split(traj, value, later, wrt, state)
    if steps:
        found = found._replace(steps=_by_step(traj, value, hyper, wrt, earlier, found.total))
    return found


def _by_graph(traj: Trajectory, value: Tensor, time: int, wrt: int | Named, state: bool) -> Paths:
    later: dict[str, Tensor] = dict(traj.at(time).params)
    earlier = inputs_of(traj, wrt, time)
    if state:
        carry = traj.at(time)
        later |= dict(_named_state(carry.optimizer_state))
        later |= {f"buffers[{n!r}]": b for n, b in carry.buffers.items()}
    later = {n: x for n, x in later.items() if x.requires_grad or n in traj.at(time).params}
    direction = dict(zip(later, pulled([value], None, later), strict=True))
    if state:
        # Of one time, the parameters were computed from the momentum: tell them apart.
        learned = {n: x for n, x in later.items() if x.requires_grad}
        itself = GraphWindow(learned, learned)
        flat = itself.inputs.flat({n: g[None] for n, g in direction.items()}, 1)
        alone = apart(itself, flat, forward=False)
        direction |= {n: x[0] for n, x in itself.inputs.split(alone).items()}
    through = {
        name: dict(zip(earlier, pulled([later[name]], [g], earlier), strict=True))
        for name, g in direction.items()
    }
    total = dict(zip(earlier, pulled([value], None, earlier), strict=True))
    if not any(
        g.count_nonzero() for g in (*total.values(), *direction.values())
    ) and not is_connected(value, earlier):
        raise NotDifferentiableError(UNRELATED)
    return _summed(traj, direction, through, total, time, wrt)


def _named_state(optimizer_state: object) -> list[tuple[str, Tensor]]:
    """Return the tensors of an optimizer's state that may have a derivative, by path."""
    return [
        (path, x)
        for path, x in tree.named_tensors(optimizer_state, "optimizer_state")
        if tree.differentiable(x)
    ]


def _summed(
    traj: Trajectory,
    direction: dict[str, Tensor],
    through: dict[str, dict[str, Tensor]],
    total: dict[str, Tensor],
    time: int,
    wrt: int | Named,
) -> Paths:
    direct = {n: total[n] - sum(row[n] for row in through.values()) for n in total}
    count = traj.steps + 1
    at = wrt % count if isinstance(wrt, int) else None
    return Paths(direction, through, direct, total, time, at)


class _Vectors(Sink):
    """Keeps the adjoints of some times, or of all."""

    def __init__(self, times: range | tuple[int, ...]) -> None:
        self._times = times
        self.params: dict[int, dict[str, Tensor | None]] = {}
        self.hyper: dict[tuple[str, int], Tensor] = {}
        self.states: dict[int, Cotangents] = {}

    def param(self, name: str, t: int, g: Tensor | None) -> None:
        if t in self._times:
            self.params.setdefault(t, {})[name] = None if g is None else g.detach().clone()

    def of_hyper(self, path: str, t: int, g: Tensor) -> None:
        self.hyper[path, t] = g.detach().clone()

    def state(self, t: int, adjoint: Cotangents) -> None:
        if t in self._times:
            self.states[t] = [None if a is None else a.detach().clone() for a in adjoint]


def _by_replay(traj: Trajectory, value: Tensor, time: int, wrt: int | Named, state: bool) -> Paths:
    window = window_of(traj, time, wrt)
    earlier = wrt % (traj.steps + 1) if isinstance(wrt, int) else 0
    sink = _Vectors((earlier, time))
    hyper = traj.record.loop.hyper
    whole = sweep_back(traj, value, hyper, sink)
    if not isinstance(window, LoopWindow):
        raise InvalidInputError(
            "wrt holds tensors that are neither the parameters nor in hyper: this trajectory "
            "knows only those; pass them in hyper, or use StoreAll()"
        )
    carry = state_at(traj, time)
    leaves = tree.leaves(state_of(carry))
    at_time: Cotangents = [None] * len(leaves)
    for i, name in enumerate(carry.params):
        at_time[i] = sink.params.get(time, {}).get(name)
    labels = list(carry.params)
    if state and time < traj.steps:
        # At the last step the outer loss reads parameters alone.
        places = {id(x): i for i, x in enumerate(leaves)}
        named = [
            *_named_state(carry.optimizer_state),
            *((f"buffers[{n!r}]", b) for n, b in carry.buffers.items()),
        ]
        for path, x in named:
            i = places[id(x)]
            if sink.states[time][i] is not None:
                at_time[i] = sink.states[time][i]
                labels.append(path)
        chosen = [
            *range(len(carry.params)),
            *(places[id(dict(named)[p])] for p in labels[len(carry.params) :]),
        ]
    else:
        chosen = list(range(len(carry.params)))
    direction = {
        label: torch.zeros_like(leaves[i]) if (g := at_time[i]) is None else g
        for label, i in zip(labels, chosen, strict=True)
    }
    rows: Cotangents = [None] * len(leaves)
    for q, (i, g) in enumerate(zip(chosen, direction.values(), strict=True)):
        batch = g.new_zeros((len(chosen), *g.shape))
        batch[q] = g
        rows[i] = batch
    flat = window.pull_state(rows)
    parts = window.inputs.split(flat)
    through = {label: {n: x[q] for n, x in parts.items()} for q, label in enumerate(direction)}
    total: dict[str, Tensor] = {}
    if isinstance(wrt, int):
        for n in window.inputs.names:
            g = sink.params.get(earlier, {}).get(n)
            total[n] = torch.zeros_like(parts[n][0]) if g is None else g
    else:
        by_id = {id(x): whole.get(path) for path, x in tree.named_tensors(hyper)}
        starts = {id(p): sink.params[0].get(n) for n, p in traj.record.loop.start.params.items()}
        for n, x in wrt.items():
            g = by_id[id(x)] if id(x) in by_id else starts.get(id(x))
            total[n] = torch.zeros_like(x) if g is None else g
    return _summed(traj, direction, through, total, time, wrt)


def _by_step(
    traj: Trajectory,
    value: Tensor,
    hyper: HyperTree,
    wrt: int | Named,
    earlier: int | None,
    total: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Split the total by the steps from time s to the end."""
    begin = earlier or 0
    sink = _Vectors(range(begin, traj.steps + 1) if earlier is not None else ())
    sweep_back(traj, value, hyper, sink)
    if earlier is not None:
        found = {}
        for name, whole in total.items():
            adjoints = [
                torch.zeros_like(whole) if (g := sink.params.get(t, {}).get(name)) is None else g
                for t in range(begin, traj.steps + 1)
            ]
            rows = [a - b for a, b in pairwise(adjoints)]
            found[name] = torch.stack([*rows, adjoints[-1]])
        return found
    assert not isinstance(wrt, int)
    paths_of = {id(x): path for path, x in tree.named_tensors(hyper)}
    if not all(id(x) in paths_of for x in wrt.values()) or not (
        traj.function is not None or traj.hypers
    ):
        raise InvalidInputError(
            "steps=True needs wrt to be a time, or tensors of the hyper that was given to unroll"
        )
    found = {}
    for name, x in wrt.items():
        rows = [
            torch.zeros_like(x) if (g := sink.hyper.get((paths_of[id(x)], t))) is None else g
            for t in range(traj.steps)
        ]
        rest = total[name].clone()
        for row in rows:
            rest -= row
        found[name] = torch.stack([*rows, rest]).detach()
    return found
