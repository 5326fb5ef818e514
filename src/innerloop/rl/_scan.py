"""Linear recurrences along time, and numbers that may differ from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

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


def where_not(flags: Tensor | None, x: Tensor) -> Tensor:
    """Return ``x`` with 0 in place of it where ``flags`` hold."""
    return x if flags is None else torch.where(flags, torch.zeros_like(x), x)


def number_where_not(flags: Tensor | None, x: Number, like: Tensor) -> Number:
    """Return a number or a tensor, with 0 in place of it where ``flags`` hold."""
    if flags is None:
        return x
    return where_not(flags, x if isinstance(x, Tensor) else like.new_full((), x))
