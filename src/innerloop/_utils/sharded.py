"""Tensors of ``torch.distributed`` that are spread over processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def is_sharded(x: object) -> bool:
    """True if ``x`` is a ``DTensor``, of which a process holds a part."""
    # Whoever has one has imported the module, which takes its time.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def sharded_names(named: Mapping[str, object]) -> frozenset[str]:
    """Return the names of those that are spread over processes."""
    if "torch.distributed.tensor" not in sys.modules:
        return frozenset()
    return frozenset(name for name, x in named.items() if is_sharded(x))


def local(x: Tensor) -> Tensor:
    """Return the part of ``x`` that this process holds: all of it, if ``x`` is not sharded."""
    if not is_sharded(x):
        return x
    part: Tensor = x.to_local()  # type: ignore[attr-defined]
    return part
