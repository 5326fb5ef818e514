"""The outer gradient split by the parameters it flows through."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from innerloop._trajectory import Trajectory
from innerloop._utils.text_table import table
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.inspect._jacobian import Named, _connected, _inputs, _pull


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
        through: ``through[name at t][name at s]``, the contribution of each parameter at t.
        direct: the part that reaches time s in other ways, by name at s.
        total: the sum, which is the whole outer gradient.
        time: t.
        wrt: s; None where ``wrt`` was a mapping of tensors.
    """

    outer: dict[str, Tensor]
    through: dict[str, dict[str, Tensor]]
    direct: dict[str, Tensor]
    total: dict[str, Tensor]
    time: int
    wrt: int | None

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


def _shown(x: Tensor) -> str:
    return f"{x.item():+.6g}" if x.numel() == 1 else f"|.|={x.norm().item():.4g}"


def paths(traj: Trajectory, outer_loss: Tensor, time: int = -1, wrt: int | Named = 0) -> Paths:
    r"""Split the outer gradient by the parameters through which it flows.

    Args:
        traj: as in `jacobian`.
        outer_loss: a scalar computed from the trajectory; its graph is kept.
        time: the time t at which the paths are told apart; -1 is the last.
        wrt: the time s of the gradient, or a mapping from names to tensors, as in `jacobian`.

    Returns:
        A `Paths`; ``print`` shows it as a table.

    Cost:
        One backward pass for each parameter tensor, and two more.

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
    if outer_loss.numel() != 1 or not outer_loss.requires_grad:
        raise InvalidInputError(
            "outer_loss must be a scalar that depends on the trajectory (not detached, not under "
            "no_grad)"
        )
    later, earlier = traj.at(time).params, _inputs(traj, wrt, time)
    direction = dict(zip(later, _pull([outer_loss], None, later), strict=True))
    through = {
        name: dict(zip(earlier, _pull([later[name]], [g], earlier), strict=True))
        for name, g in direction.items()
    }
    total = dict(zip(earlier, _pull([outer_loss], None, earlier), strict=True))
    if not any(
        g.count_nonzero() for g in (*total.values(), *direction.values())
    ) and not _connected(outer_loss, earlier):
        raise NotDifferentiableError(
            "outer_loss does not depend on this trajectory: compute it from the same loop's "
            "parameters"
        )
    direct = {n: total[n] - sum(row[n] for row in through.values()) for n in earlier}
    steps = traj.steps
    return Paths(
        direction,
        through,
        direct,
        total,
        time % (steps + 1),
        wrt % (steps + 1) if isinstance(wrt, int) else None,
    )
