"""Helpers for rules that were written against ``higher``: sums, and masks on gradients."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Factor = float | int | Tensor


def _add(tensor: Tensor, a1: Factor, a2: Tensor | None = None) -> Tensor:
    """Compute ``tensor + a1``, or ``tensor + a1 * a2``."""
    return tensor + (a1 if a2 is None else a1 * a2)


def _addcdiv(tensor: Tensor, a1: Factor, a2: Tensor, a3: Tensor | None = None) -> Tensor:
    """Compute ``tensor + a1 / a2``, or ``tensor + a1 * (a2 / a3)``."""
    return tensor + (a1 / a2 if a3 is None else a1 * (a2 / a3))


def _addcmul(tensor: Tensor, a1: Factor, a2: Tensor, a3: Tensor | None = None) -> Tensor:
    """Compute ``tensor + a1 * a2``, or ``tensor + a1 * a2 * a3``."""
    return tensor + (a1 * a2 if a3 is None else a1 * a2 * a3)


def _get_mask_closure(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a hook that replaces a gradient by 0 where ``mask`` is True.

    It does the same with the gradients of that gradient.
    """

    def closure(grad: Tensor) -> Tensor:
        masked = grad.masked_fill(mask, 0)
        _maybe_mask(masked, mask)
        return masked

    return closure


def _maybe_mask(tensor: Tensor, mask: Tensor) -> None:
    """Mask the gradient that arrives at ``tensor``, if one can."""
    if tensor.requires_grad:
        tensor.register_hook(_get_mask_closure(mask))
