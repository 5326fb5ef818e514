"""The state of torch's random generators, so that a step can be replayed with the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from innerloop._utils import torch_private


class RandomState(NamedTuple):
    """The state of torch's random generators, per device."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> RandomState | None:
        """Return the current state; None while compiling, where it cannot be read."""
        if torch_private.is_compiling():
            return None
        return cls(
            torch.get_rng_state(),
            tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else (),
        )

    def equals(self, other: RandomState) -> bool:
        """True if the same numbers would be drawn from both."""
        if self is other:
            return True
        return len(self.cuda) == len(other.cuda) and all(
            torch.equal(a, b)
            for a, b in zip((self.cpu, *self.cuda), (other.cpu, *other.cuda), strict=True)
        )

    def restore(self) -> None:
        """Make it the current one."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))


# A carry can be loaded by torch.load with its default, weights_only=True.
torch.serialization.add_safe_globals([RandomState])


@contextmanager
def restored_on_error() -> Iterator[None]:
    """Leave the user's random state as it was if the block raises."""
    before = RandomState.now()
    try:
        yield
    except BaseException:
        if before is not None:
            before.restore()
        raise


@contextmanager
def at_random_state(state: RandomState | None) -> Iterator[None]:
    """Draw from ``state`` inside the block, and leave the user's own random numbers alone."""
    before = RandomState.now()
    if state is not None:
        state.restore()
    try:
        yield
    finally:
        if before is not None:
            before.restore()
