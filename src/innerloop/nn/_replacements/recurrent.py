"""Recurrent layers: PyTorch's own, where cuDNN or ``vmap`` stand in the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from innerloop._utils import torch_private, tree
from innerloop._utils.execution import below_vmap
from innerloop.nn._derivative_order import Args, Kwargs

R = TypeVar("R")


FUNCTIONS: tuple[Callable[..., object], ...] = (
    torch.lstm,
    torch.gru,
    torch.rnn_tanh,
    torch.rnn_relu,
    torch.lstm_cell,
    torch.gru_cell,
    torch.rnn_tanh_cell,
    torch.rnn_relu_cell,
)
"""What the layers and their cells call."""


def on_cuda(args: Args, kwargs: Kwargs) -> bool:
    """True if a recurrent operation would run in cuDNN, whose gradient has no derivative."""
    return isinstance(args[0], Tensor) and args[0].is_cuda


def needs_help(args: Args, kwargs: Kwargs) -> bool:
    """True in cuDNN, and under ``vmap``."""
    return on_cuda(args, kwargs) or below_vmap()


def in_plain_code(operation: Callable[..., R]) -> Callable[..., R]:
    """Wrap ``operation`` (``torch.lstm`` and its kind) so that cuDNN is off during the call.

    Under ``vmap`` the input and the state get a number for each row: PyTorch adds products of the
    two in place, and fails where only one of them has rows.
    """

    def call(*args: object, **kwargs: object) -> R:
        if below_vmap():
            args = (*tree.map_tensors(_with_rows, args[:2]), *args[2:])
        with torch.backends.cudnn.flags(enabled=False):
            return operation(*args, **kwargs)

    return call


def _with_rows(x: Tensor) -> Tensor:
    return torch_private.with_rows(x) if x.is_floating_point() else x
