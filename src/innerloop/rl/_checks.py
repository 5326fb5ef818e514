"""What the arguments of this package have in common: shapes, and what is constant."""

from __future__ import annotations

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError
from innerloop.rl._scan import Number


def check_time_first(name: str, x: Tensor) -> None:
    """Raise unless ``x`` holds floating-point numbers for at least one step."""
    if not x.is_floating_point():
        raise InvalidInputError(
            f"{name} has dtype {x.dtype}, not a floating-point one: write {name}.float()"
        )
    if x.ndim == 0 or x.numel() == 0:
        raise InvalidInputError(
            f"{name} has shape {list(x.shape)} and holds no step: its first dimension is time, "
            "with at least one step, [T, ...]"
        )


def check_shape(name: str, x: Tensor | None, like: Tensor, of: str, *, flag: bool = False) -> None:
    """Raise unless ``x`` has the shape of ``like``; a flag must be boolean too."""
    if x is None:
        return
    if x.shape != like.shape:
        raise InvalidInputError(
            f"{name} has shape {list(x.shape)}, but {of} has {list(like.shape)}: both must be the "
            "same, because broadcasting one against the other would mix steps or environments. A "
            "value network's last dimension of size 1 is removed by squeeze(-1)"
        )
    if flag and x.dtype is not torch.bool:
        raise InvalidInputError(f"{name} has dtype {x.dtype}: write {name}.bool()")


def per_step(name: str, value: Number, like: Tensor) -> Number:
    """Return ``value`` in a form that broadcasts to ``like`` with time first.

    Raises:
        InvalidInputError: a number outside of [0, 1], or a tensor that fits neither all steps nor
            one value per step.
    """
    if not isinstance(value, Tensor):
        if not 0 <= value <= 1:
            raise InvalidInputError(f"{name}={value!r} must lie between 0 and 1")
        return value
    if value.ndim == 0:
        return value
    fits = value.ndim <= like.ndim and all(
        n in (1, m) for n, m in zip(value.shape, like.shape, strict=False)
    )
    if not fits:
        raise InvalidInputError(
            f"{name} has shape {list(value.shape)}, which does not fit {list(like.shape)} with "
            f"time first: pass a number, a 0-dim tensor, one value per step, [{like.shape[0]}], or "
            "one per step and environment; one value per environment is written with a time "
            "dimension of size 1, [1, N]"
        )
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def check_constant(name: str, x: Tensor | None) -> None:
    """Raise if what belongs to the time of the rollout has a gradient."""
    if x is not None and x.requires_grad:
        raise InvalidInputError(
            f"{name} requires grad: it belongs to the policy that took the actions and is constant "
            "in the update, or the ratio of probabilities is 1 for every parameter. Store "
            f"{name}.detach() in the rollout, once, before the first epoch"
        )


def check_log_probs(log_probs: Tensor, like: Tensor, of: str) -> None:
    """Raise unless the log-probabilities have one entry for each entry of ``like``."""
    check_time_first("log_probs", log_probs)
    if log_probs.ndim == like.ndim + 1 and log_probs.shape[:-1] == like.shape:
        raise InvalidInputError(
            f"log_probs has shape {list(log_probs.shape)} and {of} {list(like.shape)}: the last "
            "dimension is that of the actions, over which log-probabilities are summed (not "
            "averaged: the density of a vector is the product of those of its entries). Write "
            "log_probs.sum(-1)"
        )
    check_shape("log_probs", log_probs, like, of)
