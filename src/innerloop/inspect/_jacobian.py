"""Derivatives of the parameters at one time by those at another."""

from __future__ import annotations

import time as clock
import warnings

import torch
from torch import Tensor

from innerloop._utils.progress import Report, closing, reporter
from innerloop.errors import CostWarning, InvalidInputError
from innerloop.inspect._window import (
    Inspected,
    Named,
    Window,
    trajectory_of,
    window_of,
)

_MAX_ELEMENTS = 50_000_000
LONG = 20.0
"""Seconds from which on a warning comes beforehand."""


def jacobian(
    traj: Inspected,
    time: int = 1,
    wrt: int | Named = 0,
    *,
    progress: bool | Report = False,
) -> dict[str, dict[str, Tensor]]:
    r"""Return the derivative of the parameters at one time by those at an earlier one.

    It is :math:`\partial\theta_t / \partial\theta_s`, row by row (reverse mode), or column by
    column (forward mode) where there are fewer inputs than outputs.

    Args:
        traj: a trajectory of `innerloop.unroll` (under `StoreAll` while its graph is there, or
            under `Checkpointed`, which runs the loop again), or a loop of `innerloop.track`.
        time: t, the later time.
        wrt: s, the earlier time; or a mapping from names to tensors that require grad
            (hyper-parameters, say).
        progress: True shows a bar (package ``tqdm``); or a function
            ``progress(phase, done, total)``.

    Returns:
        ``J[name at t][name at s]`` of shape ``output.shape + input.shape``.

    Raises:
        InvalidInputError: t is before s, or the result would be too large.
        NotDifferentiableError: nothing connects the two times.

    Warns:
        CostWarning: it will take longer than 20 seconds, by the time of the first row.

    Cost:
        One backward pass from t to s for each element of the parameters at t, or one pass in
        forward mode for each element of ``wrt``, whichever are fewer. `gains` finds the directions
        that matter without the matrix.

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
    traj = trajectory_of(traj)
    window = window_of(traj, time, wrt)
    rows, columns = window.outputs.size, window.inputs.size
    if rows * columns > _MAX_ELEMENTS:
        raise InvalidInputError(
            f"the Jacobian has {rows * columns:,} elements: for large models look at some "
            "directions only, innerloop.inspect.jvp and vjp, at the strongest ones, "
            "innerloop.inspect.gains, or differentiate a scalar, innerloop.inspect.influence"
        )
    report = reporter(progress)
    with closing(report):
        if columns < rows:
            forward = window_of(traj, time, wrt, forward=True)
            matrix = _by_products(forward, columns, report, forward=True).T
        else:
            matrix = _by_products(window, rows, report, forward=False)
    blocks: dict[str, dict[str, Tensor]] = {}
    inputs = list(zip(window.inputs.names, window.inputs.shapes, strict=True))
    shapes = zip(window.outputs.names, window.outputs.shapes, strict=True)
    parts = matrix.split(window.outputs.sizes) if window.outputs.names else ()
    for (name, shape), part in zip(shapes, parts, strict=True):
        cells = part.split(window.inputs.sizes, 1)
        blocks[name] = {
            other: cell.reshape((*shape, *given))
            for (other, given), cell in zip(inputs, cells, strict=True)
        }
    return blocks


def _by_products(window: Window, count: int, report: Report, *, forward: bool) -> Tensor:
    """Return the products with all unit vectors, as rows."""
    side = window.inputs if forward else window.outputs
    product = window.push if forward else window.pull
    found = []
    begin = clock.perf_counter()
    for i in range(count):
        unit = torch.zeros(1, side.size, dtype=side.dtype, device=side.device)
        unit[0, i] = 1
        found.append(product(unit))
        report("columns" if forward else "rows", i + 1, count)
        # The second is timed: the first may run the loop once more, and load kernels.
        if i == 0 and count > 2:
            begin = clock.perf_counter()
        if i == 1 and (clock.perf_counter() - begin) * (count - 2) > LONG:
            seconds = (clock.perf_counter() - begin) * (count - 2)
            warnings.warn(
                f"this Jacobian takes {count} passes through the loop, about {seconds:.0f} "
                "seconds. innerloop.inspect.jvp and vjp take one pass, "
                "innerloop.inspect.gains finds the strongest directions",
                CostWarning,
                stacklevel=3,
            )
    other = window.outputs if forward else window.inputs
    empty = torch.zeros(0, other.size, dtype=other.dtype, device=other.device)
    return torch.cat(found) if found else empty


def jvp(
    traj: Inspected, time: int = -1, wrt: int | Named = 0, direction: Named | None = None
) -> dict[str, Tensor]:
    r"""Return how the parameters at one time move if something earlier moves along a direction.

    It is :math:`\frac{\partial\theta_t}{\partial\theta_s}\, v`, to first order the change of
    :math:`\theta_t` if :math:`v` is added to :math:`\theta_s` (the state of the optimizer at s
    stays as it is).

    Args:
        traj, time, wrt: as in `jacobian`.
        direction: v, by the names of ``wrt``; one that is missing is zero.

    Returns:
        The tangent of each parameter at t.

    Raises:
        InvalidInputError: a name or a shape in ``direction`` does not fit.
        NotDifferentiableError: as in `jacobian`.

    Cost:
        One run of the loop from s to t in forward mode, about 3 gradients a step, with the memory
        of one step. Of a tracked loop: two backward passes.

    Example:
        On the loss w²/2 every step multiplies w by 1 - lr.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5)
        ... )
        >>> start = {"w": torch.tensor(2.0, requires_grad=True)}
        >>> traj = innerloop.unroll(problem, start, None, steps=3)
        >>> innerloop.inspect.jvp(traj, 3, 1, {"w": torch.tensor(8.0)})
        {'w': tensor(2.)}
    """
    window = window_of(trajectory_of(traj), time, wrt, forward=True)
    row = window.inputs.row({} if direction is None else direction, "direction")
    found = window.outputs.split(window.push(row))
    return {name: x[0] for name, x in found.items()}


def vjp(
    traj: Inspected, time: int = -1, wrt: int | Named = 0, cotangent: Named | None = None
) -> dict[str, Tensor]:
    r"""Return the gradient by something earlier of a linear function of the parameters at t.

    It is :math:`u^T \frac{\partial\theta_t}{\partial\theta_s}`.

    Args:
        traj, time, wrt: as in `jacobian`.
        cotangent: u, by the names of the parameters; one that is missing is zero.

    Returns:
        A tensor for each name of ``wrt``.

    Raises:
        InvalidInputError: a name or a shape in ``cotangent`` does not fit.
        NotDifferentiableError: as in `jacobian`.

    Cost:
        One backward pass from t to s; under `Checkpointed` the loop is run again for it.

    Example:
        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5)
        ... )
        >>> start = {"w": torch.tensor(2.0, requires_grad=True)}
        >>> traj = innerloop.unroll(problem, start, None, steps=3)
        >>> innerloop.inspect.vjp(traj, 3, 0, {"w": torch.tensor(8.0)})
        {'w': tensor(1.)}
    """
    window = window_of(trajectory_of(traj), time, wrt)
    row = window.outputs.row({} if cotangent is None else cotangent, "cotangent")
    found = window.inputs.split(window.pull(row))
    return {name: x[0] for name, x in found.items()}
