"""Whether autocast is on, noted where something runs first and restored where it runs again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class AutocastModes(NamedTuple):
    """Whether autocast is on, and its dtype, for each kind of device.

    Attributes:
        modes: the kind of device, whether autocast is on there, and its dtype.
    """

    modes: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, tensors: Iterable[Tensor]) -> AutocastModes:
        """Return the modes that are active for the CPU and the devices of some tensors."""
        kinds = {"cpu", *(x.device.type for x in tensors)}
        return cls(
            tuple(
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in sorted(kinds)
            )
        )

    def restored(self) -> AbstractContextManager[None]:
        """Re-enter the modes."""
        if any(enabled or torch.is_autocast_enabled(kind) for kind, enabled, _ in self.modes):
            return self._entered()
        return nullcontext()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, enabled, dtype in self.modes:
                if enabled or torch.is_autocast_enabled(kind):
                    # The cache would keep a cast copy of the parameters of every step.
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                    )
            yield
