"""Linear recurrences along time, and the checks of shapes that go with them."""

from __future__ import annotations

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError

Number = float | Tensor
"""A number, or a tensor with one value for all, or with one value per step."""


def scan(inputs: Tensor, decay: Number, start: Tensor, *, reverse: bool = False) -> Tensor:
    r"""Compute :math:`y_t = x_t + d_t\, y_{t-1}` along the first dimension.

    A loop, because its derivatives are right in every argument to any order; a closed form divides
    by products of ``decay``, which may be 0.

    Args:
        inputs: x, ``[T, ...]``.
        decay: d, a number or a tensor that broadcasts to ``inputs``.
        start: the y that comes before the first step, ``[...]``.
        reverse: True to run from the last step to the first, with ``y_{t+1}`` in place of
            ``y_{t-1}``.

    Returns:
        y, ``[T, ...]``.
    """
    rows = list(inputs.unbind())
    varies = isinstance(decay, Tensor) and decay.ndim > 0
    decays = list(decay.expand(inputs.shape).unbind()) if varies else [decay] * len(rows)  # type: ignore[union-attr]
    times = range(len(rows))
    y = start
    for t in reversed(times) if reverse else times:
        y = rows[t] + decays[t] * y
        rows[t] = y
    return torch.stack(rows)


def check_time_first(name: str, x: Tensor) -> None:
    """Raise unless ``x`` holds floating-point numbers for at least one step."""
    if not x.is_floating_point():
        raise InvalidInputError(
            f"{name} has dtype {x.dtype}, not a floating-point one: write {name}.float()"
        )
    if x.ndim == 0 or x.numel() == 0:
        raise InvalidInputError(
            f"{name} has shape {list(x.shape)} and holds no step: its first dimension is time, "
            "with at least one step, [T, ...]"
        )


def check_shape(name: str, x: Tensor | None, like: Tensor, of: str, *, flag: bool = False) -> None:
    """Raise unless ``x`` has the shape of ``like``; a flag must be boolean too."""
    if x is None:
        return
    if x.shape != like.shape:
        raise InvalidInputError(
            f"{name} has shape {list(x.shape)}, but {of} has {list(like.shape)}: both must be the "
            "same, because broadcasting one against the other would mix steps or environments. A "
            "value network's last dimension of size 1 is removed by squeeze(-1)"
        )
    if flag and x.dtype is not torch.bool:
        raise InvalidInputError(f"{name} has dtype {x.dtype}: write {name}.bool()")


def per_step(name: str, value: Number, like: Tensor) -> Number:
    """Return ``value`` in a form that broadcasts to ``like`` with time first.

    Raises:
        InvalidInputError: a number outside of [0, 1], or a tensor that fits neither all steps nor
            one value per step.
    """
    if not isinstance(value, Tensor):
        if not 0 <= value <= 1:
            raise InvalidInputError(f"{name}={value!r} must lie between 0 and 1")
        return value
    if value.ndim == 0:
        return value
    fits = value.ndim <= like.ndim and all(
        n in (1, m) for n, m in zip(value.shape, like.shape, strict=False)
    )
    if not fits:
        raise InvalidInputError(
            f"{name} has shape {list(value.shape)}, which does not fit {list(like.shape)} with "
            f"time first: pass a number, a 0-dim tensor, one value per step, [{like.shape[0]}], or "
            "one per step and environment; one value per environment is written with a time "
            "dimension of size 1, [1, N]"
        )
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def where_not(flags: Tensor | None, x: Tensor) -> Tensor:
    """Return ``x`` with 0 in place of it where ``flags`` hold."""
    return x if flags is None else torch.where(flags, torch.zeros_like(x), x)


def number_where_not(flags: Tensor | None, x: Number, like: Tensor) -> Number:
    """Return a number or a tensor, with 0 in place of it where ``flags`` hold."""
    if flags is None:
        return x
    return where_not(flags, x if isinstance(x, Tensor) else like.new_full((), x))
