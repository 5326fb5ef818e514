"""Operations that have torch's forward value and a finite derivative everywhere."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def safe_sqrt(v: Float[Tensor, "*shape"], exact: bool = False) -> Float[Tensor, "*shape"]:
    """√v for v ≥ 0, with derivative 0 instead of infinity at v = 0.

    Clamped at the smallest normal number: one kernel, and ``sqrt(v) + eps`` keeps its bits for every usual eps. ``exact`` leaves
    v alone (for eps = 0, where the forward value itself is 0/0, as in ``torch.optim``).
    """
    if exact:
        return v.sqrt()
    if v.dtype.itemsize < 4:  # the smallest normal number of float16 is 6e-5, no smaller than what it would be added to
        zero = v == 0
        return v.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    return v.clamp_min(torch.finfo(v.dtype).tiny).sqrt()


def one_minus_power(beta: Any, count: Any, like: Tensor) -> Any:
    """The bias correction 1 - βᵗ: a Python float if both are numbers, as torch does, else a tensor that loses no precision."""
    if not isinstance(beta, Tensor) and not isinstance(count, Tensor):
        return 1 - beta ** float(count)
    if isinstance(beta, Tensor) and beta.ndim:
        dtype = torch.promote_types(like.dtype, torch.float32)
    else:  # a scalar costs nothing: float64 wherever the device has it
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
    beta = torch.as_tensor(beta, device=like.device).to(dtype)
    return 1 - beta ** (count.to(dtype) if isinstance(count, Tensor) else count)
