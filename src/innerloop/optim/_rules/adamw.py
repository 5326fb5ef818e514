"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from innerloop._types import Hyper
from innerloop.optim._rules.adam import Adam


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AdamW(Adam):
    r"""`Adam` whose weight decay multiplies :math:`\theta` by :math:`1 - \eta\lambda` first.

    Args, state and derivatives as for `Adam`; only the defaults differ, as in ``torch.optim``.

    Example:
        With a gradient of zero only the decay is left: d p₁/d p₀ = 1 - lr·weight_decay.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.adamw(lr=0.5, weight_decay=0.2)
        >>> def one_step(p):
        ...     return opt.update({"p": 0 * p}, opt.init({"p": p}), {"p": p})[0]["p"]
        >>> torch.func.grad(one_step)(torch.tensor(3.0))
        tensor(0.9000)
    """

    weight_decay: Hyper = 1e-2
    decoupled_weight_decay: bool = dataclasses.field(default=True, repr=False)

    torch_layout: ClassVar = dataclasses.replace(Adam.torch_layout, torch_class=torch.optim.AdamW)


adamw = AdamW
