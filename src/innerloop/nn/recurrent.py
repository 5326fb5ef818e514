"""Recurrent layers: PyTorch's own, by kernels whose gradient can be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from innerloop import _private


def on_cuda(args: Any, kwargs: Any) -> bool:
    """Whether a recurrent operation would run in cuDNN, whose backward cannot be differentiated."""
    return isinstance(args[0], Tensor) and args[0].is_cuda


def without_cudnn(operation: Callable[..., Any]) -> Callable[..., Any]:
    """``operation`` (``torch.lstm`` and its kind) with cuDNN off during the call, and only then."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return operation(*args, **kwargs)

    return call


def pack_padded_sequence(
    input: Float[Tensor, "..."], lengths: Int[Tensor, " batch"], batch_first: bool = False
) -> tuple[Float[Tensor, "..."], Int[Tensor, " time"]]:
    """What ``nn.utils.rnn.pack_padded_sequence`` calls, by slices: PyTorch's own has no forward mode and fails inside ``torch.func``.

    Args:
        input: the padded sequences, time first unless ``batch_first``, the longest sequence first.
        lengths: their lengths, descending.
        batch_first: whether the batch comes before the time.

    Returns:
        The rows of all sequences at time 0, then at time 1, ..., and how many there are at each time.
    """
    steps = input.transpose(0, 1) if batch_first else input
    many = lengths.tolist()
    sizes = [sum(length > t for length in many) for t in range(many[0])]
    # The layers read the sizes by address, which a wrapper of torch.func does not have.
    return torch.cat([steps[t, :size] for t, size in enumerate(sizes)]), _private.innermost(torch.tensor(sizes))
