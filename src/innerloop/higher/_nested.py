"""Nested lists, tuples, dicts and sets of tensors and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def flatten(x: Any) -> list[Any]:
    """List the leaves of nested dicts, lists, tuples and sets, in order.

    Example:
        >>> from innerloop.higher.utils import flatten
        >>> flatten({"lr": [0.1, 0.2], "betas": [(0.9, 0.999)]})
        [0.1, 0.2, 0.9, 0.999]
    """
    if not is_container(x):
        return [x]
    return [leaf for child in (x.values() if isinstance(x, dict) else x) for leaf in flatten(child)]


def is_container(target: object) -> bool:
    """Return True if `flatten` and `recursive_map` look inside."""
    return isinstance(target, (list, tuple, dict, set))


def recursive_map(target: Any, map_fn: Callable[[Any], Any]) -> Any:
    """Return ``target`` with each leaf replaced by ``map_fn(leaf)``.

    Containers keep their type (named tuples too, unlike in ``higher``).
    """
    if isinstance(target, dict):
        return _like(target, {key: recursive_map(value, map_fn) for key, value in target.items()})
    if is_container(target):
        return _like(target, [recursive_map(value, map_fn) for value in target])
    return map_fn(target)


def _like(container: object, content: Iterable[object]) -> Any:
    """Return ``content`` in a container of the same type."""
    kind: Any = type(container)
    if hasattr(container, "_fields"):
        return kind(*content)
    return (
        kind(container.default_factory, content)
        if hasattr(container, "default_factory")
        else kind(content)
    )


def copy_tensor(t: Tensor, safe_copy: bool, device: torch.device | str | None = None) -> Tensor:
    """Return a leaf with the value of ``t``; without ``safe_copy`` it may share the memory."""
    value = t.detach().clone() if safe_copy else t.detach()
    return (value if device is None else value.to(device)).requires_grad_(t.requires_grad)


def copy_and_cast(target: T, device: torch.device | str | None) -> T:
    """Return ``target`` with a leaf of the same value in place of each tensor."""
    return recursive_map(
        target, lambda x: copy_tensor(x, True, device) if isinstance(x, Tensor) else x
    )


def detach(target: T) -> T:
    """Return ``target`` with each tensor detached."""
    return recursive_map(target, lambda x: x.detach() if isinstance(x, Tensor) else x)


def find(tensor: Tensor, candidates: Iterable[object]) -> int | None:
    """Return the position of this very tensor, None if it is not there."""
    return next((i for i, candidate in enumerate(candidates) if candidate is tensor), None)
