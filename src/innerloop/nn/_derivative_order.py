"""How many derivatives may be taken of the code that is running."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from innerloop._utils import torch_private


class _Thread(threading.local):
    """What is going on in a thread.

    Attributes:
        kept: inside of `keep_kernels`.
        any_order: inside of `any_order`.
        loops: how many loops are running around each other.
        levels: transforms that ran when the innermost of them began.
    """

    kept = False
    any_order = False
    loops = 0
    levels = 0


_thread = _Thread()


@contextmanager
def any_order() -> Iterator[None]:
    """Take forms that can be differentiated any number of times, as in a loop inside a loop.

    PyTorch's third derivative of batch, instance and layer norm is wrong without an error.
    innerloop notices loops inside of loops and ``torch.func`` transforms by itself. Put the inner
    loop into this block where ``create_graph=True`` is written: for the outer loss, to
    differentiate a meta-gradient once more, or in the inner loss (a gradient penalty).
    """
    before, _thread.any_order = _thread.any_order, True
    try:
        yield
    finally:
        _thread.any_order = before


@contextmanager
def _one_more() -> Iterator[None]:
    before = _thread.levels
    _thread.loops, _thread.levels = _thread.loops + 1, torch_private.derivative_levels()
    try:
        yield
    finally:
        _thread.loops, _thread.levels = _thread.loops - 1, before


def _is_recorded(args: Any, kwargs: Any) -> bool:
    """Whether autograd runs around all transforms."""
    return any(
        isinstance(x, Tensor) and torch_private.innermost(x).requires_grad
        for x in (*args, *kwargs.values())
    )


def beyond_norms(args: Any, kwargs: Any) -> bool:
    """Whether a derivative may be taken that PyTorch has wrong of its norms: a third one, or a reverse one of a forward one.

    A loop takes two, and a transform one: in the loop's loss, or one of three around each other.
    """
    if torch.compiler.is_compiling():
        return False
    if _thread.any_order or _thread.loops > 1:
        return True
    levels = torch_private.derivative_levels()
    if levels > 2 or (_thread.loops and levels > _thread.levels):
        return True
    return (levels == 2 and _is_recorded(args, kwargs)) or reverse_over_forward(args, kwargs)


def reverse_over_forward(args: Any, kwargs: Any) -> bool:
    """Whether reverse mode, of ``torch.func`` or of autograd, differentiates what forward mode computes."""
    if torch.compiler.is_compiling() or not torch_private.forward_mode():
        return False
    return torch_private.reverse_over_forward() or _is_recorded(args, kwargs)
