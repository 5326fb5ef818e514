"""Compare the result of compiled code with that of eager code."""

from __future__ import annotations

from typing import Any

import torch

from innerloop._utils import tree
from innerloop.errors import MetaGradientError
from innerloop.strategy._engine.compiled_step import difference_beyond_rounding


def _compare(result: Any, grads: Any, eager_result: Any, eager_grads: Any) -> None:
    """Refuse a compiled result that is not the eager one (torch 2.13 has silent cases)."""
    for (name, ours), (_, eager) in zip(
        tree.named_tensors([result, grads]),
        tree.named_tensors([eager_result, eager_grads]),
        strict=True,
    ):
        difference = (
            difference_beyond_rounding(ours, eager, torch.finfo(eager.dtype).tiny)
            if eager.numel()
            else None
        )
        if difference is not None:
            error, scale = difference
            raise MetaGradientError(
                f"the compiled meta-gradient differs from the eager one at {name}: by "
                f"{error:.3e}, where values are up to "
                f"{scale:.3e}. This is a compiler error (or the loop draws random numbers): use "
                "compile=False"
            )
