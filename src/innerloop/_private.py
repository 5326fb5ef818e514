"""Every private name of PyTorch that innerloop uses, each with its reason.

``tests/test_private.py`` exercises each one, so that a PyTorch which moves one of them is noticed by a test and mended here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

# Pytrees: torch.func and torch.compile walk containers with this module, and there is no public one up to torch 2.13.
tree_flatten = _pytree.tree_flatten
tree_unflatten = _pytree.tree_unflatten
tree_map = _pytree.tree_map
tree_leaves = _pytree.tree_leaves


def register_tree_node(
    cls: type, flatten: Callable[[Any], tuple[list[Any], Any]], unflatten: Callable[[Any, Any], Any]
) -> None:
    """Let torch.func and torch.compile look into instances of ``cls``."""
    _pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=f"{cls.__module__}.{cls.__name__}")


def inside_transform() -> bool:
    """Whether a ``torch.func`` transform (grad, vmap, jvp, ...) is running.

    ``torch.autograd.grad`` must not be called there, and some operations lack a batching rule. No public query exists.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def version(tensor: Tensor) -> int:
    """How often ``tensor`` has been written in place: tells whether a buffer changed without comparing its values."""
    return tensor._version
