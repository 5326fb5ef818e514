"""Distances between rows, with all derivatives."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from innerloop.errors import InvalidInputError

MODES = (
    "use_mm_for_euclid_dist_if_necessary",
    "use_mm_for_euclid_dist",
    "donot_use_mm_for_euclid_dist",
)
DIRECT = 25
"""PyTorch takes Euclidean distances of up to so many rows from differences.

For more rows it takes them from a product of matrices.
"""


def cdist(
    x1: Float[Tensor, "*left rows features"],
    x2: Float[Tensor, "*right columns features"],
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Float[Tensor, "*broadcast rows columns"]:
    r"""Compute ``torch.cdist``, which in PyTorch has no second derivative.

    For p = 2 and more than 25 rows PyTorch has no forward mode either.

    .. math:: d_{ij} = \lVert x_i - y_j \rVert_p

    At a distance of zero the derivatives are zero, as PyTorch's gradient is. Differences cost
    memory rows x columns x features.

    Args, Returns: as for ``torch.cdist``.

    Example:
        The second derivative of √(a² + b²) with respect to a is b²/(a² + b²)^(3/2) = 16/125 at (3,
        4).

        >>> import torch
        >>> from innerloop.nn.functional import cdist
        >>> zero = torch.zeros(1, 2)
        >>> hessian = torch.func.hessian(lambda x: cdist(x[None], zero)[0, 0])(
        ...     torch.tensor([3.0, 4.0])
        ... )
        >>> round(hessian[0, 0].item() * 125, 3)
        16.0
    """
    if compute_mode not in MODES:
        raise InvalidInputError(f"compute_mode={compute_mode!r}; choose from {', '.join(MODES)}")
    _check_norm(p)
    many = x1.shape[-2] > DIRECT or x2.shape[-2] > DIRECT
    product = compute_mode == "use_mm_for_euclid_dist" or (
        compute_mode == "use_mm_for_euclid_dist_if_necessary" and many
    )
    if p == 2 and product:
        return _by_product(x1, x2)
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def pdist(input: Float[Tensor, "rows features"], p: float = 2.0) -> Float[Tensor, " pairs"]:
    """Compute ``torch.nn.functional.pdist``, the distances of all pairs of rows."""
    _check_norm(p)
    i, j = torch.triu_indices(input.shape[0], input.shape[0], offset=1, device=input.device)
    return _norm(input[i] - input[j], p)


def _check_norm(p: float) -> None:
    if not p >= 0:
        raise InvalidInputError(f"p={p} gives no norm; pass a number from 0 to infinity")


def _norm(x: Tensor, p: float) -> Tensor:
    """Compute the p-norm along the last dimension, with zero derivatives at 0 and by entries of 0."""
    if p == 0:
        return (x != 0).to(x.dtype).sum(-1) + 0 * x.sum(-1)
    if p == 1:
        return x.abs().sum(-1)
    if math.isinf(p):
        return _largest(x.abs())
    zero = x == 0
    safe = torch.where(zero, torch.ones_like(x), x)
    powers = safe.square() if p == 2 else safe.abs() ** p
    return _root(torch.where(zero, torch.zeros_like(x), powers).sum(-1), p)


def _largest(size: Tensor) -> Tensor:
    """Compute the maximum along the last dimension.

    The derivative is PyTorch's: 1 for each entry that is the largest, not a share of it.
    """
    if size.shape[-1] == 0:
        return size.sum(-1)
    largest = size.detach().amax(-1)
    slope = torch.where(size == largest.unsqueeze(-1), size, torch.zeros_like(size)).sum(-1)
    return torch.where(largest.isinf(), largest, largest + (slope - slope.detach()))


def _root(x: Tensor, p: float) -> Tensor:
    zero = x <= 0
    safe = torch.where(zero, torch.ones_like(x), x)
    return torch.where(zero, torch.zeros_like(x), safe.sqrt() if p == 2 else safe ** (1 / p))


def _by_product(x: Tensor, y: Tensor) -> Tensor:
    """Compute |x|² - 2 x·y + |y|² as one product of matrices, as PyTorch does."""
    norms = [z.square().sum(-1, keepdim=True) for z in (x, y)]
    ones = [torch.ones_like(norm) for norm in norms]
    left = torch.cat([-2 * x, norms[0], ones[0]], dim=-1)
    right = torch.cat([y, ones[1], norms[1]], dim=-1)
    return _root(left @ right.mT, 2)
