"""Operations that have torch's forward value and a finite derivative everywhere."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from innerloop._types import Scalar
from innerloop._utils.execution import Mode, mode


def add_scaled(x: Tensor, y: Tensor, alpha: Scalar) -> Tensor:
    """Compute ``x + alpha * y``; with a number, by the kernel of ``torch.optim``: same bits."""
    # Inductor silently drops ``alpha`` where ``y`` is a matrix product: compiled code avoids it.
    if isinstance(alpha, Tensor) or mode() is Mode.COMPILING:
        return x + alpha * y
    return torch.add(x, y, alpha=alpha)


def average(mean: Tensor, new: Tensor, beta: Scalar) -> Tensor:
    """Compute β·mean + (1-β)·new."""
    if isinstance(beta, Tensor):
        return beta * mean + (1 - beta) * new
    return torch.lerp(mean, new, 1 - beta)


def average_of_squares(mean: Tensor, new: Tensor, beta: Scalar) -> Tensor:
    """Compute β·mean + (1-β)·new²."""
    if isinstance(beta, Tensor):
        return beta * mean + (1 - beta) * (new * new)
    return torch.addcmul(mean * beta, new, new, value=1 - beta)


def at_first_step(count: Scalar, first: Scalar, later: Tensor) -> Tensor:
    """Return ``first`` (from a hyper-parameter) at the first step, and ``later`` after that."""
    if isinstance(count, Tensor):
        return torch.where(count == 1, torch.ones_like(later) * first, later)
    return torch.ones_like(later) * first if count == 1 else later


def safe_sqrt(v: Float[Tensor, "*shape"], exact: bool = False) -> Float[Tensor, "*shape"]:
    """Compute √v for v ≥ 0, with derivative 0 instead of infinity at v = 0.

    Clamped at the smallest normal number: one kernel, and ``sqrt(v) + eps`` keeps its bits for
    every usual eps. ``exact`` leaves v alone (for eps = 0, where the forward value itself is 0/0,
    as in ``torch.optim``).
    """
    if exact:
        return v.sqrt()
    if (
        v.dtype.itemsize < 4
    ):  # the smallest normal number of float16 is 6e-5, no smaller than what it would be added to
        zero = v == 0
        return v.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    return v.clamp_min(torch.finfo(v.dtype).tiny).sqrt()


def root_of(v: Float[Tensor, "*shape"], eps: Scalar, eps_root: Scalar) -> Float[Tensor, "*shape"]:
    """Compute √(v + eps_root), to which eps is about to be added.

    The number 0 for ``eps_root`` changes no bit.
    """
    if isinstance(eps_root, Tensor) or eps_root != 0:
        return safe_sqrt(v + eps_root)
    return safe_sqrt(v, exact=isinstance(eps, (int, float)) and eps == 0)


def times(value: Scalar, factor: Scalar) -> Scalar:
    """Multiply; the number 0 stays a number, which switches a term off."""
    return value if not isinstance(value, Tensor) and value == 0 else value * factor


def one_minus_power(beta: Scalar, count: Scalar, like: Tensor) -> Scalar:
    """Compute the bias correction 1 - βᵗ.

    It is a Python float if both are numbers, as in torch, else a tensor that loses no precision.
    """
    if not isinstance(beta, Tensor) and not isinstance(count, Tensor):
        return 1 - beta ** float(count)
    return 1 - precise(beta, like) ** precise(count, like)


def precise(value: Scalar, like: Tensor) -> Any:
    """Cast a scalar tensor to float64 wherever the device has it, which costs nothing.

    Numbers stay as they are; a larger tensor gets at least float32.
    """
    if not isinstance(value, Tensor):
        return value
    if value.ndim:
        return value.to(torch.promote_types(like.dtype, torch.float32))
    return value.to(torch.float32 if like.device.type == "mps" else torch.float64)
