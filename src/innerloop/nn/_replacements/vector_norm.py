"""Norms of vectors, and what is made of them, with second derivatives at vectors of zeros.

PyTorch's gradient of a norm is zero there, and its second derivative is NaN. A row of zeros that
pads a batch is a constant, so finite differences exist: the derivatives here are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from innerloop.nn._derivative_order import Args, Kwargs
from innerloop.nn._replacements.elementary import is_into_out, may_be_differentiated
from innerloop.nn._replacements.elementary import normalize as normalize_into_out

Dims = int | tuple[int, ...] | list[int] | None


def _at(nonzero: Tensor, x: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute ``value(x)``, a norm, which is a constant zero where ``x`` is a vector of zeros."""
    result = value(torch.where(nonzero, x, torch.ones_like(x)))
    return result.masked_fill(~nonzero.reshape(result.shape), 0)


def _nonzero(x: Tensor, dim: Dims) -> Tensor:
    """Return True for each vector along ``dim`` that has an entry besides zeros."""
    found = x.detach() != 0
    if dim is None or dim == () or dim == []:
        return found.any().reshape((1,) * x.dim())
    return found.any(dim=tuple(dim) if isinstance(dim, (tuple, list)) else dim, keepdim=True)


def vector_norm(
    x: Tensor,
    ord: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute ``torch.linalg.vector_norm``; a vector of zeros has all derivatives zero."""
    return _at(
        _nonzero(x, dim),
        x,
        lambda safe: torch.linalg.vector_norm(safe, ord, dim, keepdim, dtype=dtype),
    )


def norm(
    input: Tensor,
    p: float | str | None = "fro",
    dim: Dims = None,
    keepdim: bool = False,
    out: None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute ``torch.norm``, as `vector_norm` does."""
    return _at(
        _nonzero(input, dim), input, lambda safe: torch.norm(safe, p, dim, keepdim, dtype=dtype)
    )


def linalg_norm(
    A: Tensor,  # noqa: N803
    ord: float | str | None = None,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute ``torch.linalg.norm`` of vectors, as `vector_norm` does."""
    return _at(
        _nonzero(A, dim),
        A,
        lambda safe: torch.linalg.norm(safe, ord, dim, keepdim, dtype=dtype),
    )


def normalize(
    input: Tensor,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    out: Tensor | None = None,
) -> Tensor:
    """Compute ``F.normalize``, whose second derivative at a row of zeros is NaN in PyTorch.

    With ``out`` it is as the power iteration of spectral norm calls it.
    """
    if out is not None:
        return normalize_into_out(input, p, dim, eps, out)
    length = vector_norm if 1 < p < math.inf else torch.linalg.vector_norm
    return input / length(input, p, dim, True).clamp_min(eps).expand_as(input)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Compute ``F.cosine_similarity``, with a second derivative at a row of zeros."""
    x1, x2 = torch.broadcast_tensors(x1, x2)
    scaled = []
    for x in (x1, x2):
        length = vector_norm(x, 2, dim, True)
        # PyTorch's gradient flows through a length below eps as if it were eps.
        scaled.append(x / (length + (length.clamp_min(eps) - length).detach()))
    return (scaled[0] * scaled[1]).sum(dim)


def is_smooth(args: Args, kwargs: Kwargs) -> bool:
    """True if a norm is differentiated whose second derivative is NaN for a vector of zeros."""
    x = args[0] if args else None
    p = kwargs.get("ord", kwargs.get("p", args[1] if len(args) > 1 else None))
    if not isinstance(x, Tensor) or x.numel() == 0 or kwargs.get("out") is not None:
        return False
    if p is not None and p != "fro" and not (isinstance(p, (int, float)) and 1 < p < math.inf):
        return False
    return may_be_differentiated(args, kwargs)


def is_smooth_vector_norm(args: Args, kwargs: Kwargs) -> bool:
    """True if `is_smooth`, and ``torch.linalg.norm`` is not asked for the norm of a matrix."""
    if not is_smooth(args, kwargs):
        return False
    order = kwargs.get("ord", args[1] if len(args) > 1 else None)
    dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
    return order is None or order == "fro" or isinstance(dim, int) or args[0].dim() == 1  # type: ignore[attr-defined]


def is_normalized(args: Args, kwargs: Kwargs) -> bool:
    """True if ``F.normalize`` is differentiated, or writes into a tensor in forward mode."""
    if kwargs.get("out") is not None or len(args) > 4:
        return is_into_out(args, kwargs)
    return may_be_differentiated(args, kwargs)


def is_similarity(args: Args, kwargs: Kwargs) -> bool:
    """True if ``F.cosine_similarity`` of tensors of one dtype is differentiated."""
    pair = [*args, *(kwargs[k] for k in ("x1", "x2") if k in kwargs)][:2]
    return (
        all(isinstance(x, Tensor) and x.is_floating_point() for x in pair)
        and len({x.dtype for x in pair}) == 1  # type: ignore[attr-defined]
        and may_be_differentiated(args, kwargs)
    )
