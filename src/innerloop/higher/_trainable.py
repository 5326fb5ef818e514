"""Hyper-parameters of a torch optimizer as tensors to be learned, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from innerloop._utils.arguments import check_device
from innerloop.errors import InvalidInputError
from innerloop.higher._base import Override, check_optimizer, entries
from innerloop.higher._nested import flatten, is_container, recursive_map
from innerloop.optim._base import Rule


def get_trainable_opt_params(
    opt: torch.optim.Optimizer, device: torch.device | str | None = None
) -> dict[str, list[Any]]:
    """Return the real-valued hyper-parameters of ``opt`` as leaf tensors, for ``override``.

    Args:
        opt: any torch optimizer; it is not changed.
        device: where the tensors go.

    Returns:
        Name -> one entry per param group. Flags are left out (``higher`` makes tensors of them),
        tensors are copied.

    Example:
        >>> import torch, innerloop.higher as higher
        >>> opt = torch.optim.SGD([torch.zeros(1)], lr=0.5, momentum=0.25)
        >>> higher.optim.get_trainable_opt_params(opt)["momentum"]
        [tensor(0.2500, requires_grad=True)]
    """
    check_optimizer(opt)
    check_device(device)
    override: dict[str, list[Any]] = defaultdict(list)
    known = _real_valued(opt)
    for group in opt.param_groups:
        for name, value in group.items():
            leaves = flatten(value)
            if (
                name != "params"
                and (known is None or name in known)
                and leaves
                and all(map(_is_real, leaves))
            ):
                override[name].append(recursive_map(value, lambda leaf: _learnable(leaf, device)))
    return {
        name: values for name, values in override.items() if len(values) == len(opt.param_groups)
    }


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: Override) -> None:
    """Write learned hyper-parameters into the param groups of ``opt``.

    A number stays a number: an int only while the learned value is one (``higher`` rounds .37 to 0
    where the default is the integer 0). A tensor keeps its identity.

    Args:
        opt: the optimizer to change.
        override: as for `get_diff_optim`: name -> one entry for all param groups, or one per group.

    Raises:
        InvalidInputError: an unknown name, a wrong number of entries, another structure; nothing
            has been written then.

    Example:
        >>> import torch, innerloop.higher as higher
        >>> opt = torch.optim.SGD([torch.zeros(1)], lr=0.5, weight_decay=0)
        >>> higher.optim.apply_trainable_opt_params(opt, {"weight_decay": [torch.tensor(0.25)]})
        >>> opt.param_groups[0]["weight_decay"]
        0.25
    """
    check_optimizer(opt)
    if not isinstance(override, Mapping):
        raise InvalidInputError(
            f"override is a {type(override).__name__}: write a dict, {{'lr': [tensor]}}"
        )
    new: list[tuple[dict[str, Any], str, Any]] = []  # all is looked at before anything is written
    for name, given in override.items():
        values = entries(given)
        if values is None or len(values) not in (1, len(opt.param_groups)):
            got = f"a {type(given).__name__}" if values is None else f"{len(values)} entries"
            raise InvalidInputError(
                f"override[{name!r}] has {got}, write a list with one for all or one for each of "
                f"the {len(opt.param_groups)} groups"
            )
        for i, group in enumerate(opt.param_groups):
            if name not in group or name == "params":
                raise InvalidInputError(
                    f"{type(opt).__name__} has no hyper-parameter {name!r}; it has "
                    f"{list(group)[1:]}"
                )
            new.append((group, name, _applied(values[i % len(values)], group[name], name)))
    for group, name, value in new:
        group[name] = _kept_identity(value, group[name])


def _real_valued(opt: torch.optim.Optimizer) -> tuple[str, ...] | None:
    """Return the hyper-parameters of a known rule that have a derivative; else None."""
    for cls in type(opt).__mro__:
        if cls in Rule.by_torch_class:
            return Rule.by_torch_class[cls].hyper_names
    return None


def _is_real(leaf: object) -> bool:
    return isinstance(leaf, (int, float, Tensor)) and not isinstance(leaf, bool)


def _learnable(leaf: float | Tensor, device: torch.device | str | None) -> Tensor:
    if isinstance(leaf, Tensor):
        copied = leaf.detach().clone()
        return (copied if device is None else copied.to(device)).requires_grad_()
    return torch.tensor(float(leaf), device=device, requires_grad=True)


def _applied(new: Any, old: Any, name: str) -> object:
    """Return ``new`` in the form that ``old`` has."""
    if isinstance(old, Tensor):
        if not isinstance(new, (int, float, Tensor)) or (
            isinstance(new, Tensor) and new.numel() not in (1, old.numel())
        ):
            raise InvalidInputError(
                f"{name!r} is a tensor of shape {tuple(old.shape)}, got {new!r}"
            )
        learned = torch.as_tensor(new, dtype=old.dtype, device=old.device).detach()
        return learned.reshape(() if learned.numel() == 1 else old.shape).expand(old.shape).clone()
    if isinstance(old, dict):
        if not isinstance(new, Mapping) or set(new) != set(old):
            raise InvalidInputError(f"{name!r} is a dict with the keys {list(old)}, got {new!r}")
        return type(old)({key: _applied(new[key], value, name) for key, value in old.items()})
    if isinstance(old, (list, tuple)):
        if not isinstance(new, (list, tuple)) or len(new) != len(old):
            raise InvalidInputError(
                f"{name!r} is a {type(old).__name__} of {len(old)}, got {new!r}"
            )
        return type(old)([_applied(n, o, name) for n, o in zip(new, old, strict=True)])
    if is_container(new) or (isinstance(new, Tensor) and new.numel() != 1):
        raise InvalidInputError(f"{name!r} is one number, got {new!r}")
    value = new.item() if isinstance(new, Tensor) else new
    if isinstance(old, (int, float)) and not isinstance(value, (int, float)):
        raise InvalidInputError(f"{name!r} is a number, got {value!r}")
    if isinstance(old, bool):
        return bool(value)
    return int(value) if isinstance(old, int) and float(value).is_integer() else value


def _kept_identity(new: Any, old: Any) -> object:
    """Return ``new``, where tensors are those that were there before."""
    if isinstance(old, Tensor):
        with torch.no_grad():
            return old.copy_(new)
    if isinstance(old, dict):
        return type(old)({key: _kept_identity(new[key], value) for key, value in old.items()})
    if isinstance(old, (list, tuple)):
        return type(old)([_kept_identity(n, o) for n, o in zip(new, old, strict=True)])
    return new
