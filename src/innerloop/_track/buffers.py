"""The buffers of a module as they were at each step."""

from __future__ import annotations

from torch import Tensor

from innerloop._module.view import ModuleView
from innerloop._utils import torch_private

_LARGE = 65_536
"""Buffers with more elements are copied only if they were written."""


class BufferSnapshots:
    """Copies of the buffers over time; large ones only of those that were written in between.

    Args:
        view: whose buffers are copied.
        renew: put another tensor in the place of a buffer that was written in place, whose old
            tensor the graph of a step may hold.
    """

    def __init__(self, view: ModuleView, renew: bool) -> None:
        self._view = view
        self._renew = renew
        self._seen: dict[str, tuple[Tensor, int, Tensor]] = {}

    def take(self) -> dict[str, Tensor]:
        """Return copies of the buffers as they are now."""
        taken = {}
        written = self._view.renew_written_buffers() if self._renew else {}
        for name, buffer in self._view.read_buffers().items():
            seen = self._seen.get(name)
            # F.batch_norm writes running statistics without counting it in the version, so small
            # buffers are always copied.
            unchanged = (
                seen is not None
                and seen[0] is buffer
                and seen[1] == torch_private.version(buffer)
                and buffer.numel() > _LARGE
            )
            if name in written:
                seen = self._seen[name] = (buffer, 0, written[name])
            elif seen is None or not unchanged:
                seen = self._seen[name] = (buffer, torch_private.version(buffer), buffer.clone())
            taken[name] = seen[2]
        return taken
