"""Sums, means and maxima of bags of embeddings, with all derivatives."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from innerloop.errors import InvalidInputError, NotDifferentiableError

BY_FREQUENCY = (
    "divides the gradient by counts, so that it is not the derivative of what is computed, and a derivative of training cannot be told "
    "from it. Leave it away inside the loop, and divide the gradient: loop.step(loss, grad_callback=...)"
)


def embedding_bag(
    input: Int[Tensor, "..."],
    weight: Float[Tensor, "rows features"],
    offsets: Int[Tensor, " starts"] | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: Literal["sum", "mean", "max"] = "mean",
    sparse: bool = False,
    per_sample_weights: Float[Tensor, "..."] | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Float[Tensor, "bags features"]:
    r"""``F.embedding_bag``, which in PyTorch has no second derivative and no forward mode.

    .. math:: y_b = \sum_{i \in b} s_i\, w_{x_i}, \quad \frac{1}{|b|} \sum_{i \in b} w_{x_i} \quad\text{or}\quad \max_{i \in b} w_{x_i}

    Args, Returns: as for ``torch.nn.functional.embedding_bag``. Memory grows with the number of indices, not of bags.

    Example:
        >>> import torch
        >>> from innerloop.nn.functional import embedding_bag
        >>> embedding_bag(torch.tensor([0, 1, 2]), torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 2]))
        tensor([[2.],
                [5.]])
    """
    _check(input, offsets, mode, per_sample_weights)
    if scale_grad_by_freq:
        raise NotDifferentiableError(f"F.embedding_bag(scale_grad_by_freq=True) {BY_FREQUENCY}")
    flat, bag, bags = _membership(input, offsets, include_last_offset)
    rows = F.embedding(flat, weight, None, max_norm, norm_type, False, sparse)
    counted = torch.ones_like(flat, dtype=torch.bool)
    if padding_idx is not None:
        counted = flat != (padding_idx if padding_idx >= 0 else weight.shape[0] + padding_idx)
    if mode == "max":
        return _maxima(rows, bag, bags, counted)
    rows = torch.where(counted[:, None], rows, torch.zeros_like(rows))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    total = rows.new_zeros(bags, rows.shape[1]).index_add(0, bag, rows)
    if mode == "sum":
        return total
    count = rows.new_zeros(bags).index_add(0, bag, counted.to(rows.dtype))
    return total / count.clamp_min(1)[:, None]


def _check(input: Tensor, offsets: Tensor | None, mode: str, weights: Tensor | None) -> None:
    if mode not in ("sum", "mean", "max"):
        raise InvalidInputError(f'mode={mode!r}: write "sum", "mean" or "max"')
    if (offsets is None) != (input.dim() == 2):
        raise InvalidInputError(
            "a two-dimensional input has one bag a row and no offsets; a one-dimensional one needs offsets"
        )
    if weights is not None and (mode != "sum" or weights.shape != input.shape):
        raise InvalidInputError('per_sample_weights has the shape of input, and mode="sum"')


def _membership(input: Tensor, offsets: Tensor | None, include_last_offset: bool) -> tuple[Tensor, Tensor, int]:
    """The indices in a row, the bag of each, and the number of bags."""
    flat = input.reshape(-1)
    places = torch.arange(flat.shape[0], device=flat.device)
    if offsets is None:
        return flat, places // max(1, input.shape[1]), input.shape[0]
    starts = offsets[:-1] if include_last_offset else offsets
    return flat, torch.bucketize(places, starts.to(places.dtype), right=True) - 1, starts.shape[0]


def _maxima(rows: Tensor, bag: Tensor, bags: int, counted: Tensor) -> Tensor:
    """The largest entry of each bag, taken from the first row that has it; zero for an empty bag."""
    count, features = rows.shape
    where = bag[:, None].expand(count, features)
    low = torch.where(counted[:, None], rows.detach(), torch.full_like(rows, -torch.inf))
    largest = low.new_full((bags, features), -torch.inf).scatter_reduce(0, where, low, "amax")
    numbers = torch.arange(count, device=rows.device)[:, None].expand(count, features)
    candidates = torch.where((low == largest[bag]) & counted[:, None], numbers, count)
    first = numbers.new_full((bags, features), count).scatter_reduce(0, where, candidates, "amin")
    return torch.cat([rows, rows.new_zeros(1, features)]).gather(0, first)
