"""What a tracked loop is made of before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop._utils import torch_private
from innerloop.errors import InvalidInputError
from innerloop.optim._base import Optimizer
from innerloop.optim._from_torch.from_torch import from_torch


def _pure(optimizer: Any, own: Mapping[str, Tensor]) -> Optimizer:
    if isinstance(optimizer, Optimizer):
        return optimizer
    optimizers = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    for opt in optimizers:
        if not isinstance(opt, torch.optim.Optimizer):
            raise InvalidInputError(
                f"optimizer is {type(opt).__name__}: pass a torch.optim optimizer, a list of "
                "them, or one of innerloop.optim"
            )
        if torch_private.step_hooks(opt):
            raise InvalidInputError(
                "the optimizer has step hooks (register_step_pre_hook or _post_hook), which "
                "loop.step does not run: change gradients "
                "with loop.step(loss, grad_callback=...)"
            )
    return from_torch(optimizers, own)
