"""Tell whether tensors have values, and finite ones, by a look at each of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def is_finite(x: Tensor) -> bool:
    """True if no entry of ``x`` is NaN or infinite; on a GPU this waits for it."""
    if x.requires_grad:
        x = x.detach()
    if x.is_sparse:
        x = x.coalesce().values()
    # The sum is one pass without a temporary tensor; it may overflow where no entry does.
    total = x.sum().item()
    # NaN for an infinite total.
    return bool(total - total == 0) or bool(x.isfinite().all())


def have_values(tensors: Iterable[Tensor]) -> bool:
    """True if the numbers in ``tensors`` can be read.

    Those that autograd batches (is_grads_batched=True) cannot, and no running transform tells.
    """
    try:
        for x in tensors:
            x.detach().sum().item()
    except RuntimeError:
        return False
    return True


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """True if no entry of any of ``tensors`` is NaN or infinite, as far as they have values."""
    try:
        return all(map(is_finite, tensors))
    except RuntimeError:
        # They have no values to look at: see `have_values`.
        return True
