"""Derivatives of the parameters at one time by those at another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from innerloop._trajectory import Trajectory
from innerloop.errors import InvalidInputError, NotDifferentiableError

_MAX_ELEMENTS = 50_000_000
Named = Mapping[str, Tensor]


def jacobian(traj: Trajectory, time: int = 1, wrt: int | Named = 0) -> dict[str, dict[str, Tensor]]:
    r"""Return the derivative of the parameters at one time by those at an earlier one.

    It is :math:`\partial\theta_t / \partial\theta_s`, computed from the graph of the loop.

    Args:
        traj: of `innerloop.track` (``loop.trajectory``) or of `innerloop.unroll` with `StoreAll`,
            whose graph is still there.
        time: t, the later time.
        wrt: s, the earlier time; or a mapping from names to tensors that require grad
            (hyper-parameters, say).

    Returns:
        ``J[name at t][name at s]`` of shape ``output.shape + input.shape``.

    Raises:
        InvalidInputError: t is before s, or the result would be too large.
        NotDifferentiableError: nothing connects the two times.

    Cost:
        One backward pass from t to s for each element of the parameters at t: for small models.

    Example:
        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5)
        ... )
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> traj = innerloop.unroll(problem, {"w": w}, None, steps=3)
        >>> innerloop.inspect.jacobian(traj, time=3, wrt=1)
        {'w': {'w': tensor(0.2500)}}
    """
    outputs, inputs = traj.at(time).params, _inputs(traj, wrt, time)
    size = sum(p.numel() for p in outputs.values()) * sum(p.numel() for p in inputs.values())
    if size > _MAX_ELEMENTS:
        raise InvalidInputError(
            f"the Jacobian has {size:,} elements: for large models differentiate a scalar, "
            "torch.autograd.grad(f, "
            "traj.at(s).params.values()), or look at some directions only"
        )
    if not any(
        output.requires_grad and _connected(output.sum(), inputs) for output in outputs.values()
    ):
        raise NotDifferentiableError(
            f"nothing connects the parameters at time {time} with "
            f"wrt={wrt if isinstance(wrt, int) else list(wrt)}: the graph was cut "
            'between them (learn="nothing", loop.detach()), or the tensors take no part in the loop'
        )
    return {name: _rows(output, inputs) for name, output in outputs.items()}


def _inputs(traj: Trajectory, wrt: int | Named, time: int) -> dict[str, Tensor]:
    if not isinstance(wrt, int):
        inputs = dict(wrt)
        if not all(t.requires_grad for t in inputs.values()):
            raise InvalidInputError(
                "wrt has tensors that do not require grad: "
                f"{[n for n, t in inputs.items() if not t.requires_grad]}"
            )
        return inputs
    traj.at(time), traj.at(wrt)  # raise if out of range
    later, earlier = (t % (traj.steps + 1) for t in (time, wrt))
    if later < earlier:
        raise InvalidInputError(
            f"parameters at time {later} do not depend on those at the later time {earlier}: swap "
            "time and wrt"
        )
    inputs = {name: p for name, p in traj.at(wrt).params.items() if p.requires_grad}
    if not inputs:
        raise NotDifferentiableError(
            f"the parameters at time {earlier} have no graph: pass params that require grad to "
            "unroll, use a strategy that keeps the "
            'graph (StoreAll), or track with learn="init" or "outer"'
        )
    return inputs


def _connected(output: Tensor, inputs: Named) -> bool:
    return any(g is not None for g in _vjp([output], None, inputs))


def _pull(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None, inputs: Named
) -> list[Tensor]:
    """Return the vector-Jacobian product; zero where nothing connects."""
    if not outputs[0].requires_grad:
        return [torch.zeros_like(p) for p in inputs.values()]
    grads = _vjp(outputs, cotangents, inputs)
    return [
        torch.zeros_like(p) if g is None else g for g, p in zip(grads, inputs.values(), strict=True)
    ]


def _vjp(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None, inputs: Named
) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(
            outputs, list(inputs.values()), cotangents, retain_graph=True, allow_unused=True
        )
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise NotDifferentiableError(
            "the graph of this trajectory was freed by a backward pass: inspect before "
            "outer.backward(), or call "
            "outer.backward(retain_graph=True)"
        ) from error


def _rows(output: Tensor, inputs: Named) -> dict[str, Tensor]:
    """Return the Jacobian of one tensor, a row per element."""
    basis = torch.eye(max(1, math.prod(output.shape)), dtype=output.dtype, device=output.device)
    rows = [
        _pull([output], [basis[i].reshape(output.shape)], inputs) for i in range(output.numel())
    ]
    columns = {}
    for k, (name, p) in enumerate(inputs.items()):
        shape = (*output.shape, *p.shape)
        columns[name] = (
            torch.stack([row[k] for row in rows]).reshape(shape) if rows else p.new_zeros(shape)
        )
    return columns
