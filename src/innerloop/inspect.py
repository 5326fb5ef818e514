"""Look at what an unrolled loop did: derivatives between times, and the paths of an outer gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.trajectory import Trajectory

_MAX_ELEMENTS = 50_000_000
Named = Mapping[str, Tensor]


def jacobian(traj: Trajectory, time: int = 1, wrt: int | Named = 0) -> dict[str, dict[str, Tensor]]:
    r"""The derivative :math:`\partial\theta_t / \partial\theta_s` of the parameters at one time with respect to an earlier one.

    Args:
        traj: of `innerloop.track` (``loop.trajectory``) or of `innerloop.unroll` with `StoreAll`, whose graph is still there.
        time: t, the later time.
        wrt: s, the earlier time; or a mapping from names to tensors that require grad (hyper-parameters, say).

    Returns:
        ``J[name at t][name at s]`` of shape ``output.shape + input.shape``.

    Raises:
        InvalidInputError: t is before s, or the result would be too large.
        NotDifferentiableError: nothing connects the two times.

    Cost:
        One backward pass from t to s for each element of the parameters at t: for small models.

    Example:
        >>> import torch, innerloop
        >>> problem = innerloop.Problem(lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5))
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> traj = innerloop.unroll(problem, {"w": w}, None, steps=3)
        >>> innerloop.inspect.jacobian(traj, time=3, wrt=1)
        {'w': {'w': tensor(0.2500)}}
    """
    outputs, inputs = traj.at(time).params, _inputs(traj, wrt, time)
    size = sum(p.numel() for p in outputs.values()) * sum(p.numel() for p in inputs.values())
    if size > _MAX_ELEMENTS:
        raise InvalidInputError(
            f"the Jacobian has {size:,} elements: for large models differentiate a scalar, torch.autograd.grad(f, "
            "traj.at(s).params.values()), or look at some directions only"
        )
    if not any(output.requires_grad and _connected(output.sum(), inputs) for output in outputs.values()):
        raise NotDifferentiableError(
            f"nothing connects the parameters at time {time} with wrt={wrt if isinstance(wrt, int) else list(wrt)}: the graph was cut "
            'between them (learn="nothing", loop.detach()), or the tensors take no part in the loop'
        )
    return {name: _rows(output, inputs) for name, output in outputs.items()}


class Paths(NamedTuple):
    r"""The outer gradient with respect to :math:`\theta_s`, split by the parameters at a later time t that it flows through.

    .. math::
        \frac{dL}{d\theta_s}
        = \underbrace{\sum_i \frac{\partial L}{\partial\theta_t^i} \frac{\partial\theta_t^i}{\partial\theta_s}}_{\text{through}}
        + \underbrace{\text{the rest}}_{\text{direct: around time } t \text{, for example by earlier losses}}

    Attributes:
        outer: :math:`\partial L/\partial\theta_t^i` by name.
        through: ``through[name at t][name at s]``, the contribution of each parameter at t.
        direct: what reaches time s on other ways, by name at s.
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
        width = max(len(n) for n in [*names, *self.through, "through"]) + 2
        show = lambda x: f"{x.item():+.6g}" if x.numel() == 1 else f"|.|={x.norm().item():.4g}"  # noqa: E731
        rows = [("through", *(f"d/d {n}" + ("" if self.wrt is None else f"[{self.wrt}]") for n in names))]
        rows += [(f"{i}[{self.time}]", *(show(row[n]) for n in names)) for i, row in self.through.items()]
        rows += [("direct", *(show(self.direct[n]) for n in names)), ("total", *(show(self.total[n]) for n in names))]
        column = max(len(cell) for row in rows for cell in row[1:]) + 2
        return "\n".join(row[0].ljust(width + 4) + "".join(cell.rjust(column) for cell in row[1:]) for row in rows)


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
        >>> start = {"a": torch.tensor(2.0, requires_grad=True), "b": torch.tensor(3.0, requires_grad=True)}
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
            "outer_loss must be a scalar that depends on the trajectory (not detached, not under no_grad)"
        )
    later, earlier = traj.at(time).params, _inputs(traj, wrt, time)
    direction = dict(zip(later, _pull([outer_loss], None, later), strict=True))
    through = {
        name: dict(zip(earlier, _pull([later[name]], [g], earlier), strict=True)) for name, g in direction.items()
    }
    total = dict(zip(earlier, _pull([outer_loss], None, earlier), strict=True))
    if not any(g.count_nonzero() for g in (*total.values(), *direction.values())) and not _connected(
        outer_loss, earlier
    ):
        raise NotDifferentiableError(
            "outer_loss does not depend on this trajectory: compute it from the same loop's parameters"
        )
    direct = {n: total[n] - sum(row[n] for row in through.values()) for n in earlier}
    steps = traj.steps
    return Paths(
        direction, through, direct, total, time % (steps + 1), wrt % (steps + 1) if isinstance(wrt, int) else None
    )


def _inputs(traj: Trajectory, wrt: int | Named, time: int) -> dict[str, Tensor]:
    if not isinstance(wrt, int):
        inputs = dict(wrt)
        if not all(t.requires_grad for t in inputs.values()):
            raise InvalidInputError(
                f"wrt has tensors that do not require grad: {[n for n, t in inputs.items() if not t.requires_grad]}"
            )
        return inputs
    traj.at(time), traj.at(wrt)  # raise if out of range
    later, earlier = (t % (traj.steps + 1) for t in (time, wrt))
    if later < earlier:
        raise InvalidInputError(
            f"parameters at time {later} do not depend on those at the later time {earlier}: swap time and wrt"
        )
    inputs = {name: p for name, p in traj.at(wrt).params.items() if p.requires_grad}
    if not inputs:
        raise NotDifferentiableError(
            f"the parameters at time {earlier} have no graph: pass params that require grad to unroll, use a strategy that keeps the "
            'graph (StoreAll), or track with learn="init" or "outer"'
        )
    return inputs


def _connected(output: Tensor, inputs: Named) -> bool:
    return any(g is not None for g in _vjp([output], None, inputs))


def _pull(outputs: list[Tensor], cotangents: list[Tensor] | None, inputs: Named) -> list[Tensor]:
    """Vector-Jacobian product; zero where nothing connects."""
    if not outputs[0].requires_grad:
        return [torch.zeros_like(p) for p in inputs.values()]
    grads = _vjp(outputs, cotangents, inputs)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, inputs.values(), strict=True)]


def _vjp(outputs: list[Tensor], cotangents: list[Tensor] | None, inputs: Named) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(outputs, list(inputs.values()), cotangents, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise NotDifferentiableError(
            "the graph of this trajectory was freed by a backward pass: inspect before outer.backward(), or call "
            "outer.backward(retain_graph=True)"
        ) from error


def _rows(output: Tensor, inputs: Named) -> dict[str, Tensor]:
    """The Jacobian of one tensor, a row per element."""
    basis = torch.eye(max(1, math.prod(output.shape)), dtype=output.dtype, device=output.device)
    rows = [_pull([output], [basis[i].reshape(output.shape)], inputs) for i in range(output.numel())]
    columns = {}
    for k, (name, p) in enumerate(inputs.items()):
        shape = (*output.shape, *p.shape)
        columns[name] = torch.stack([row[k] for row in rows]).reshape(shape) if rows else p.new_zeros(shape)
    return columns


__all__ = ["Paths", "jacobian", "paths"]
