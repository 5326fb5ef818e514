"""Which parameters have a gradient, of which layout, and how many steps each has taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from innerloop._types import Grads, Params
from innerloop.errors import InvalidInputError

K = TypeVar("K")


def is_sparse(gradient: Tensor) -> bool:
    """Return True if ``gradient`` is stored in any layout but the dense one."""
    return gradient.layout != torch.strided


def dense(grads: Mapping[K, Tensor | None]) -> dict[K, Tensor | None]:
    """Return ``grads`` with a dense tensor in place of each sparse one; it keeps its graph."""
    found = dict(grads)
    for key in sparse_ones(grads):
        found[key] = grads[key].to_dense()  # type: ignore[union-attr]
    return found


def sparse_ones(grads: Mapping[K, Tensor | None]) -> set[K]:
    """Return the keys of the gradients that are sparse."""
    # `is_sparse`, written out: this runs for each parameter at each step.
    strided = torch.strided
    return {key for key, g in grads.items() if g is not None and g.layout != strided}


def which_have_gradient(grads: Grads, params: Params) -> dict[str, bool] | None:
    """Return for each parameter whether it has a gradient; None if all have."""
    everything = True
    for name, p in params.items():
        g = grads.get(name)
        if g is None:
            everything = False
        elif g.shape != p.shape:
            raise InvalidInputError(
                f"the gradient of {name!r} has shape {tuple(g.shape)}, the parameter has "
                f"{tuple(p.shape)}"
            )
    if len(grads) > len(params) or not everything:
        unknown = [name for name in grads if name not in params]
        if unknown:
            raise InvalidInputError(
                f"gradients for {unknown} but the parameters are {list(params)}"
            )
    return None if everything else {name: grads.get(name) is not None for name in params}


def by_step_count(count: Any, params: Params) -> tuple[dict[str, int] | None, list[Any]]:
    """Split parameters by step count: an index for each, and the count of each index."""
    if not isinstance(count, Mapping):
        return None, [count]
    if any(isinstance(c, Tensor) for c in count.values()):
        # In compiled code, where nobody knows which are equal.
        return {name: i for i, name in enumerate(count)}, list(count.values())
    distinct = sorted(set(count.values()))
    missing = [name for name in params if name not in count]
    if missing:
        raise InvalidInputError(
            f"the state knows no parameter {missing}: it belongs to other parameters"
        )
    return {name: distinct.index(count[name]) for name in params}, distinct
