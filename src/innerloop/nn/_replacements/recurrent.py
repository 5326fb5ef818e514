"""Recurrent layers: PyTorch's own, by kernels whose gradient can be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from innerloop.nn._derivative_order import Args, Kwargs


def on_cuda(args: Args, kwargs: Kwargs) -> bool:
    """True if a recurrent operation would run in cuDNN, whose gradient has no derivative."""
    return isinstance(args[0], Tensor) and args[0].is_cuda


def without_cudnn(operation: Callable[..., Any]) -> Callable[..., Any]:
    """``operation`` (``torch.lstm`` and its kind) with cuDNN off during the call, and only then."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return operation(*args, **kwargs)

    return call
