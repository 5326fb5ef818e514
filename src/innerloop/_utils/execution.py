"""How the current code is being run: eagerly, under a ``torch.func`` transform, or by the compiler.

Questions about *which* transform is running stay in `torch_private`.
"""

from __future__ import annotations

import enum

from torch import Tensor

from innerloop._utils import torch_private

compiling = torch_private.is_compiling
"""True while the compiler traces: `mode` for code that runs at every operation."""


class Mode(enum.Enum):
    """One of the three ways in which code is run."""

    EAGER = "eager"
    TRANSFORMED = "transformed"
    COMPILING = "compiling"


def mode() -> Mode:
    """Return how the current code is run; ``COMPILING`` takes precedence over ``TRANSFORMED``."""
    if compiling():
        return Mode.COMPILING
    return Mode.TRANSFORMED if torch_private.inside_transform() else Mode.EAGER


def may_call_autograd() -> bool:
    """True in eager code only: torch.autograd.grad raises under torch.func and in compiled code."""
    return not compiling() and not torch_private.inside_transform()


def below_vmap() -> bool:
    """True inside ``vmap``, except in compiled code, which cannot ask."""
    return mode() is Mode.TRANSFORMED and torch_private.inside_vmap()


def may_read_values(x: Tensor) -> bool:
    """True if looking at the numbers in ``x`` costs no device wait and is possible.

    Under ``vmap`` a tensor has no single value, and while the compiler traces it has none at all.
    """
    return x.is_cpu and not compiling() and not torch_private.inside_vmap()
