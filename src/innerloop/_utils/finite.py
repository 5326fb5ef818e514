"""Tell whether tensors are finite, by a look at each of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from innerloop._utils import tree


def is_finite(x: Tensor) -> bool:
    """True if no entry of ``x`` is NaN or infinite; on a GPU this waits for it."""
    x = x.detach()
    if not tree.differentiable(x):
        return True
    if x.is_sparse:
        x = x.coalesce().values()
    # The sum is one pass without a temporary tensor; it may overflow where no entry does.
    total = x.sum().item()
    known = math.isfinite(total.real) and math.isfinite(total.imag)
    return known or bool(x.isfinite().all())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """True if no entry of any of ``tensors`` is NaN or infinite, as far as they have values."""
    try:
        return all(map(is_finite, tensors))
    except RuntimeError:
        # Gradients that autograd batches (is_grads_batched=True) cannot be looked at.
        return True
