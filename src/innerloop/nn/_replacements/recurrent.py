"""Recurrent layers: PyTorch's own, without cuDNN, whose gradient has no derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from innerloop.nn._derivative_order import Args, Kwargs

R = TypeVar("R")


def on_cuda(args: Args, kwargs: Kwargs) -> bool:
    """True if a recurrent operation would run in cuDNN, whose gradient has no derivative."""
    return isinstance(args[0], Tensor) and args[0].is_cuda


def without_cudnn(operation: Callable[..., R]) -> Callable[..., R]:
    """Wrap ``operation`` (``torch.lstm`` and its kind) so that cuDNN is off during the call."""

    def call(*args: object, **kwargs: object) -> R:
        with torch.backends.cudnn.flags(enabled=False):
            return operation(*args, **kwargs)

    return call
