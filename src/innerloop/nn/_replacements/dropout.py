"""Dropout under transforms, with the random numbers that it draws in eager code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from innerloop._utils import torch_private
from innerloop._utils.execution import Mode, mode
from innerloop.nn._derivative_order import Args, Kwargs

ALPHA = 1.7580993408473766
"""The negative saturation of SELU: scale times alpha."""


def by_layout(args: Args, kwargs: Kwargs) -> bool:
    """True if PyTorch would draw other numbers than in eager code.

    There they follow the order in memory, under a transform the order of the entries.
    """
    x = args[0] if args else kwargs.get("input")
    return (
        mode() is Mode.TRANSFORMED
        and isinstance(x, Tensor)
        and not torch_private.inside_vmap()
        and not x.is_contiguous()
    )


def _kept(input: Tensor, p: float) -> Tensor:
    """Draw which entries are kept, in the order of the memory of ``input``."""
    like = torch.empty_strided(input.shape, input.stride(), dtype=input.dtype, device=input.device)
    return like.bernoulli_(1 - p)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Compute ``F.dropout``, whose mask is that of a plain tensor with the strides of ``input``."""
    if not training or not 0 < p < 1 or inplace:
        return F.dropout(input, p, training, inplace)
    return input * _kept(input, p).div_(1 - p)


def torch_dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """Compute ``torch.dropout``, as `dropout` does."""
    return dropout(input, p, train)


def alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    """Compute ``F.alpha_dropout``, as `dropout` does."""
    if not training or not 0 < p < 1 or inplace:
        return F.alpha_dropout(input, p, training, inplace)
    scale: float = ((ALPHA**2 * p + 1) * (1 - p)) ** -0.5
    kept = _kept(input, p)
    shift = (kept - 1).mul_(ALPHA * scale).add_(ALPHA * scale * p)
    return input * kept.mul_(scale) + shift
