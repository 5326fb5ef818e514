"""What is filled with random numbers in place, for ``vmap``: each row draws numbers of its own.

PyTorch refuses to fill a tensor that has no rows, as ``torch.normal`` and the samples of
``torch.distributions`` do (``torch.empty(shape).normal_()``, ``x.new(shape).exponential_()``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from innerloop._utils import torch_private
from innerloop._utils.execution import below_vmap
from innerloop.nn._derivative_order import Args, Kwargs


def draws_by_rows(args: Args, kwargs: Kwargs) -> bool:
    """True for a call without a generator or a place of its own, of which each row draws alone."""
    return kwargs.keys() <= {"mean", "std", "size"} and below_vmap()


def normal(
    mean: Tensor | float, std: Tensor | float = 1.0, size: Sequence[int] | None = None
) -> Tensor:
    """Draw normal numbers; like ``torch.normal`` it has no derivative by ``mean`` and ``std``."""
    mean, std = (x.detach() if isinstance(x, Tensor) else x for x in (mean, std))
    given = [x for x in (mean, std) if isinstance(x, Tensor)]
    shape = torch.broadcast_shapes(*(x.shape for x in given)) if size is None else size
    like = given[0] if given else torch.empty(())
    drawn = torch.randn(shape, dtype=like.dtype, device=like.device)
    # In this order, with these roundings.
    return drawn * std + mean


def is_new(args: Args, kwargs: Kwargs) -> bool:
    """True where a new tensor can be given rows."""
    plain = not kwargs.get("requires_grad") and kwargs.get("out") is None
    return plain and below_vmap()


def with_rows(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap ``make`` (``torch.empty`` and its kind) so that each row has a tensor of its own."""

    def call(*args: object, **kwargs: object) -> Tensor:
        return torch_private.with_rows(make(*args, **kwargs))

    return call
