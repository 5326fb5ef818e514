"""What half precision cannot do, said once."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from innerloop._utils import torch_private
from innerloop.errors import PrecisionWarning

_warned: list[str] = []


def warn_of_half(param: Tensor) -> None:
    """Warn, once per process, if ``param`` is in half precision and the update that made it is being differentiated.

    Args:
        param: a parameter as an update hands it back.
    """
    if (
        _warned
        or param.dtype not in (torch.float16, torch.bfloat16)
        or torch.compiler.is_compiling()
    ):
        return
    if torch_private.has_derivative(param):
        _warned.append(str(param.dtype))
        warnings.warn(
            f"an update of {param.dtype} parameters is being differentiated: second-order "
            "gradients need float32. With 8 or 11 bits the "
            "meta-gradient of a long loop may point anywhere. Run the inner loop in float32, "
            "parameters and loss; "
            "innerloop.optim.in_float32(optimizer, master=True) spares the rounding of the "
            "update, but not that of the gradient",
            PrecisionWarning,
            stacklevel=2,
        )


def forget_warning() -> None:
    """Warn again at the next occasion."""
    _warned.clear()
