"""Checks of an optimizer's settings and state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from innerloop._types import Hyper, Scalar
from innerloop.errors import InvalidInputError


def is_active(value: Hyper) -> bool:
    """True if a term weighted by ``value`` is computed.

    The number 0 switches it off; a tensor of value 0 does not, because its gradient counts.
    """
    return not isinstance(value, (int, float)) or value != 0


def kept(value: Tensor | None, name: str, like: Tensor, count: Scalar) -> Tensor:
    """Return what a rule keeps under a setting that may be switched on after the loop began.

    At the first step it is zero. Later PyTorch, too, has nothing to go on from.
    """
    if value is not None:
        return value
    require(
        isinstance(count, int) and count == 1,
        f"{name} was switched on after the first steps, which kept nothing for it: switch it on "
        "before the loop begins",
    )
    return torch.zeros_like(like)


def check_betas(betas: Any) -> tuple[Any, Any]:
    """Return a pair of numbers in [0, 1), or of tensors; raise if it is not one."""
    require(
        isinstance(betas, (tuple, list)) and len(betas) == 2,
        f"betas={betas!r}: write a pair, betas=(0.9, 0.999)",
    )
    for i, beta in enumerate(betas):
        for value in numbers(beta):
            require(0 <= value < 1, f"betas[{i}]={value} must be in [0, 1)")
    first, second = betas
    return first, second


def require(condition: bool, message: str) -> None:
    """Raise `InvalidInputError` unless ``condition``."""
    if not condition:
        raise InvalidInputError(message)


def numbers(value: object) -> Iterator[float]:
    """Yield the plain numbers in a hyper-parameter.

    Tensors are not looked at: that would wait for the device.
    """
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, Mapping):
        yield from (v for v in value.values() if isinstance(v, (int, float)))


def check_nonnegative(hyper: Mapping[str, Any], *names: str) -> None:
    """Raise if a hyper-parameter among ``names`` is a negative number."""
    for name in names:
        for value in numbers(hyper[name]):
            require(value >= 0, f"{name}={value} is negative (or NaN); {name} must be >= 0")


def has_overrides(hyper: object) -> bool:
    """True if there are overrides of hyper-parameters; raise if they are not a mapping."""
    if hyper is None:
        return False
    if not isinstance(hyper, Mapping):
        raise InvalidInputError(
            f'hyper is {type(hyper).__name__}: write a dict, hyper={{"lr": tensor}}'
        )
    return bool(hyper)


def check_state(owner: object, state: object, kind: type) -> None:
    """Raise if ``state`` is that of another kind of optimizer."""
    if not isinstance(state, kind):
        raise InvalidInputError(
            f"{owner!r} was given a state of type {type(state).__name__}, not {kind.__name__}: "
            "pass what init(params) or the last "
            "update returned"
        )


def text_of(value: object) -> str:
    """Write a setting as it is shown in the repr of a rule."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    return f"({', '.join(map(text_of, value))})" if isinstance(value, tuple) else repr(value)
