"""Helpers on nested structures and on the parameters of a module, as ``higher.utils`` has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from innerloop.errors import InvalidInputError
from innerloop.higher import _nested as nested
from innerloop.higher._nested import flatten

__all__ = ["flatten", "get_func_params"]

# The names that code written against higher uses.
_copy_tensor = nested.copy_tensor
_find_param_in_list = nested.find
_is_container = nested.is_container
_recursive_copy_and_cast = nested.copy_and_cast
_recursive_detach = nested.detach
_recursive_map = nested.recursive_map


def get_func_params(
    module: nn.Module, device: torch.device | str | None = None, safe_copy: bool = True
) -> list[Tensor]:
    """Return tensors with the values of ``module.parameters()``, cut off from them.

    Args:
        module: any module.
        device: where they go; default: where the parameters are.
        safe_copy: False shares the memory of the parameters.

    Returns:
        One leaf tensor for each parameter, which requires grad if the parameter does.
    """
    if not isinstance(module, nn.Module):
        raise InvalidInputError(f"get_func_params got a {type(module).__name__}: pass a module")
    return [nested.copy_tensor(p, safe_copy, device) for p in module.parameters()]
