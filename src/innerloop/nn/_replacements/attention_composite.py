"""Attention by plain operations, whose derivatives of any order are right."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def composite(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    drop: Callable[[Tensor], Tensor],
) -> Tensor:
    """Compute attention by plain operations, which have derivatives of any order.

    A row that sees nothing gives 0, with a derivative of 0.
    """
    scores = (query * scale) @ key.mT
    dead = None
    if is_causal:
        hidden = above_diagonal(scores.shape[-2], scores.shape[-1], query.device)
        scores = scores + torch.zeros_like(hidden, dtype=scores.dtype).masked_fill_(
            hidden, -math.inf
        )
    if mask is not None:
        # A row that sees nothing keeps its scores, or finite ones, and its result is replaced.
        dead = dead_rows(mask)
        if mask.dtype == torch.bool:
            # The mask is added, because the derivative of a sum moves no memory.
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~(mask | dead), -math.inf)
        else:
            mask = mask.masked_fill(dead, 0.0)
        scores = scores + mask
    out = drop(scores.softmax(-1)) @ value
    return out if dead is None else out.masked_fill(dead, 0.0)


def above_diagonal(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return what a causal mask hides: keys later than the query."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).triu_(1)


def dead_rows(mask: Tensor) -> Tensor:
    """Find the rows that see nothing."""
    return (~mask if mask.dtype == torch.bool else mask == -math.inf).all(-1, keepdim=True)
