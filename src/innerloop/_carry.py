"""Everything that one step of training hands to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Named
from innerloop._utils import tree
from innerloop._utils.random_state import RandomState

_alias = (
    torch.ops.aten.alias.default
)  # the identity; unlike the derivative of a view, its own takes a sparse gradient too


class Carry(NamedTuple):
    """Everything that one step hands to the next; a loop can be continued from it.

    Attributes:
        params: named parameters.
        optimizer_state: the optimizer's state.
        buffers: named buffers of the module (running statistics, say).
        random_state: the random generators' state before the next step, or None: whatever it is
            then. A loop continued from this carry draws from here, and leaves the user's own random
            numbers alone.
        time: the number of steps taken since the loop began; a loop that is continued from this
            carry hands ``time + t`` to ``optimizer_hyper`` and to a data function.
            ``carry._replace(time=0)`` starts the schedule again.
    """

    params: dict[str, Tensor]
    optimizer_state: Any
    buffers: dict[str, Tensor]
    random_state: RandomState | None
    time: int = 0

    def detach(self) -> Carry:
        """Return the same values, cut from their history."""
        params, state, buffers = tree.map_tensors(
            torch.Tensor.detach, (self.params, self.optimizer_state, self.buffers)
        )
        return Carry(params, state, buffers, self.random_state, self.time)


# A carry can be loaded by torch.load with its default, weights_only=True.
torch.serialization.add_safe_globals([Carry])


def aliased(params: Named, before: Named) -> dict[str, Tensor]:
    """Return ``params`` with an alias for each that a step left as it was.

    Times are told apart by the identity of their tensors.
    """
    return {
        n: _alias(p) if p is before.get(n) and p.requires_grad else p for n, p in params.items()
    }
