"""Tell whether data have changed without keeping a copy of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from innerloop._utils import torch_private, tree
from innerloop._utils.sharded import local


class Fingerprint(NamedTuple):
    """A few numbers that change when the data change.

    They show that a function gives other data when it is called again.

    Attributes:
        numbers: sums over each tensor.
        precision: the coarsest one among the data.
    """

    numbers: Tensor
    precision: float

    @classmethod
    def of(cls, batch: object) -> Fingerprint:
        """Compute the fingerprint of a batch, a pytree of tensors and numbers."""
        numbers: list[Tensor] = []
        precision = torch.finfo(torch.float64).eps
        for x in map(local, tree.tensors(batch)):
            if x.is_floating_point() or x.is_complex():
                precision = max(precision, torch.finfo(x.dtype).eps)
            flat = (torch.view_as_real(x) if x.is_complex() else x).detach().reshape(-1).double()
            places = torch.arange(flat.numel(), device=flat.device, dtype=flat.dtype)
            numbers += [
                flat.new_tensor(float(x.numel())),
                flat.abs().sum(),
                flat.sum(),
                (flat * (places * 0.618).cos()).sum(),
            ]
        others = [
            float(leaf) for leaf in tree.leaves(batch) if isinstance(leaf, (bool, int, float))
        ]
        like = numbers[0] if numbers else torch.zeros((), dtype=torch.float64)
        return cls(
            torch.stack(
                [*(n.to(like.device) for n in numbers), like.new_tensor(float(sum(others)))]
            ),
            precision,
        )

    def agrees(self, before: Fingerprint) -> bool:
        """True if both are of the same data, up to rounding."""
        ours, theirs = (torch_private.innermost(f.numbers).detach() for f in (self, before))
        if ours.shape != theirs.shape:
            # Under vmap one of them may not depend on the task.
            return torch_private.inside_vmap()
        tolerance = 10 * self.precision**0.75
        scale = float(theirs.abs().nan_to_num().max())
        return torch.allclose(
            ours, theirs, rtol=tolerance, atol=tolerance * 1e-3 * scale, equal_nan=True
        )


def agree(again: Tensor, before: Tensor) -> bool:
    """True if the losses of a replay are the same numbers as before.

    Kernels with and without a graph may differ by rounding.
    """
    again, before = (
        torch_private.innermost(again).detach(),
        torch_private.innermost(before).detach(),
    )
    if again.shape != before.shape:
        return torch_private.inside_vmap()
    tolerance = 10 * torch.finfo(before.dtype).eps ** 0.75
    return torch.allclose(again, before, rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True)
