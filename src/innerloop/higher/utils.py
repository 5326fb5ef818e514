"""Helpers on nested structures and on the parameters of a module, as ``higher.utils`` has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["flatten", "get_func_params"]


def flatten(x: Any) -> list[Any]:
    """The leaves of nested dicts, lists, tuples and sets, in order.

    Example:
        >>> from innerloop.higher.utils import flatten
        >>> flatten({"lr": [0.1, 0.2], "betas": [(0.9, 0.999)]})
        [0.1, 0.2, 0.9, 0.999]
    """
    if not _is_container(x):
        return [x]
    return [leaf for child in (x.values() if isinstance(x, dict) else x) for leaf in flatten(child)]


def get_func_params(
    module: nn.Module, device: torch.device | str | None = None, safe_copy: bool = True
) -> list[Tensor]:
    """Tensors with the values of ``module.parameters()``, cut off from them.

    Args:
        module: any module.
        device: where they go; default: where the parameters are.
        safe_copy: False shares the memory of the parameters.

    Returns:
        One leaf tensor for each parameter, which requires grad if the parameter does.
    """
    return [_copy_tensor(p, safe_copy, device) for p in module.parameters()]


def _copy_tensor(t: Tensor, safe_copy: bool, device: torch.device | str | None = None) -> Tensor:
    """A leaf with the value of ``t``; without ``safe_copy`` it may share the memory."""
    value = t.detach().clone() if safe_copy else t.detach()
    return (value if device is None else value.to(device)).requires_grad_(t.requires_grad)


def _is_container(target: Any) -> bool:
    """Whether `flatten` and `_recursive_map` look inside."""
    return isinstance(target, (list, tuple, dict, set))


def _recursive_map(target: Any, map_fn: Callable[[Any], Any]) -> Any:
    """``target`` with each leaf replaced by ``map_fn(leaf)``; containers keep their type (named tuples too, unlike in ``higher``)."""
    if isinstance(target, dict):
        return _like(target, {key: _recursive_map(value, map_fn) for key, value in target.items()})
    if _is_container(target):
        return _like(target, [_recursive_map(value, map_fn) for value in target])
    return map_fn(target)


def _like(container: Any, content: Any) -> Any:
    """``content`` in a container of the same type."""
    if hasattr(container, "_fields"):
        return type(container)(*content)
    if isinstance(container, dict) and hasattr(container, "default_factory"):
        return type(container)(container.default_factory, content)
    return type(container)(content)


def _recursive_copy_and_cast(target: Any, device: torch.device | str | None) -> Any:
    """``target`` with a detached copy in place of each tensor."""
    return _recursive_map(target, lambda x: _copy_tensor(x, True, device) if isinstance(x, Tensor) else x)


def _recursive_detach(target: Any) -> Any:
    """``target`` with each tensor detached."""
    return _recursive_map(target, lambda x: x.detach() if isinstance(x, Tensor) else x)


def _find_param_in_list(param: Tensor, candidates: Iterable[Any]) -> int | None:
    """The position of this very tensor, None if it is not there."""
    return next((i for i, candidate in enumerate(candidates) if candidate is param), None)
