"""Small helpers on pytrees of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from innerloop import _private
from innerloop.errors import InvalidInputError

T = TypeVar("T")


def map_tensors(fn: Callable[[Tensor], Any], tree: T) -> T:
    """``tree`` with ``fn`` applied to each tensor; every other leaf (numbers, None) is kept."""
    return _private.tree_map(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of ``tree``, in order."""
    return (leaf for leaf in _private.tree_leaves(tree) if isinstance(leaf, Tensor))


def named_tensors(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """``(path, tensor)`` for each tensor of ``tree``; the path is written as Python would index it: ``['lr']``, ``[0]``."""
    if isinstance(tree, Tensor):
        yield prefix or "input", tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from named_tensors(value, f"{prefix}[{key!r}]")
    elif isinstance(tree, (list, tuple)):
        fields = getattr(tree, "_fields", None)
        for i, value in enumerate(tree):
            yield from named_tensors(value, f"{prefix}.{fields[i]}" if fields else f"{prefix}[{i}]")
    else:
        for i, leaf in enumerate(tensors(tree)):
            yield f"{prefix}<{i}>", leaf


def stack(trees: list[Any]) -> Any:
    """One pytree whose leaves are the leaves of ``trees``, stacked along a new first dimension."""
    if not trees:
        return None
    flat = [_private.tree_flatten(tree) for tree in trees]
    spec = flat[0][1]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return _private.tree_unflatten([_stacked(column) for column in columns], spec)


def _stacked(column: tuple[Any, ...]) -> Tensor | None:
    if all(leaf is None for leaf in column):
        return None
    for leaf in column:
        if not isinstance(leaf, (Tensor, int, float)):
            raise InvalidInputError(
                f"aux has a leaf {leaf!r}: aux must be made of tensors and numbers, the same at every step"
            )
    return torch.stack([torch.as_tensor(leaf) for leaf in column])


def grad_with_aux(fn: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Any, Any]]:
    """``torch.func.grad(fn, has_aux=True)`` for an aux that may hold None, numbers and strings as well as tensors."""

    def call(*args: Any) -> tuple[Any, Any]:
        box: list[Any] = []

        def tensors_only(*args: Any) -> tuple[Tensor, list[Tensor]]:
            value, aux = fn(*args)
            leaves, spec = _private.tree_flatten(aux)
            box.append((leaves, spec))
            return value, [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        grads, unwrapped = torch.func.grad(tensors_only, has_aux=True)(*args)
        leaves, spec = box.pop()
        outside = iter(unwrapped)
        return grads, _private.tree_unflatten([next(outside) if isinstance(x, Tensor) else x for x in leaves], spec)

    return call
