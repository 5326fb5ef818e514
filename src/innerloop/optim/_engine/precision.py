"""What half precision cannot do, said once."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

from innerloop._utils import caches, torch_private
from innerloop._utils.execution import Mode, mode
from innerloop._utils.warn import warn_user
from innerloop.errors import PrecisionWarning

_warned: MutableMapping[torch.dtype, bool] = caches.cache("warnings of half precision")


def warn_of_half(param: Tensor) -> None:
    """Warn once if ``param``, in half precision, was made by an update that is differentiated.

    Args:
        param: a parameter as an update hands it back.
    """
    if param.dtype not in (torch.float16, torch.bfloat16) or mode() is Mode.COMPILING or _warned:
        return
    if torch_private.has_derivative(param):
        _warned[param.dtype] = True
        warn_user(
            f"an update of {param.dtype} parameters is being differentiated: second-order "
            "gradients need float32. With 8 or 11 bits the "
            "meta-gradient of a long loop may point anywhere. Run the inner loop in float32, "
            "parameters and loss; "
            "innerloop.optim.in_float32(optimizer, master=True) spares the rounding of the "
            "update, but not that of the gradient",
            PrecisionWarning,
        )
