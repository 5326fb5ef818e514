"""Indexing by an array of NumPy, whose memory autograd keeps and NumPy may write."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from innerloop._utils import torch_private
from innerloop.nn._derivative_order import Args, Kwargs
from innerloop.nn._replacements.elementary import is_differentiated


def _is_foreign(index: object) -> bool:
    """True if NumPy may write ``index`` without autograd seeing it."""
    if isinstance(index, tuple | list):
        return any(map(_is_foreign, index))
    if isinstance(index, Tensor):
        index = torch_private.innermost(index)
        return (
            index.dtype in (torch.int64, torch.int32, torch.bool, torch.uint8)
            and index.layout is torch.strided
            and index.device.type == "cpu"
            and not index.untyped_storage().resizable()
        )
    return isinstance(index, np.ndarray)


def by_foreign_memory(args: Args, kwargs: Kwargs) -> bool:
    """True if what is indexed is differentiated, and the index lies in NumPy's memory."""
    return is_differentiated(args, kwargs) and _is_foreign((*args[1:], *kwargs.values()))


def _copied(index: object) -> object:
    if isinstance(index, tuple):
        return tuple(map(_copied, index))
    if isinstance(index, list):
        return list(map(_copied, index))
    if not _is_foreign(index):
        return index
    return index.clone() if isinstance(index, Tensor) else index.copy()  # type: ignore[attr-defined]


def with_own_index(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an indexing function that copies the index."""

    def call(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return function(x, *map(_copied, args), **{k: _copied(v) for k, v in kwargs.items()})

    return call
