"""Evaluating the user's closure within a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from innerloop._utils import torch_private
from innerloop.errors import InvalidInputError


@contextmanager
def _refusing_backward(trial: Iterable[Tensor], own: Iterable[Tensor]) -> Iterator[None]:
    """Raise where a closure calls ``backward()``; a ``zero_grad()`` before it must not cost the outer gradients gathered so far."""

    def refuse(_: Tensor) -> None:
        raise InvalidInputError(
            "the closure given to loop.step calls backward(): the loop takes the gradient itself, "
            "and differentiates it. Leave zero_grad() "
            "and backward() away and only return the loss: loop.step(lambda: "
            "loss_fn(loop.model(x), y))"
        )

    gathered = [
        (p, p.grad, torch_private.version(p.grad)) for p in own if p.is_leaf and p.grad is not None
    ]
    handles = [p.register_hook(refuse) for p in trial]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, grad, _ in gathered:
            p.grad = grad
    if any(torch_private.version(grad) != version for _, grad, version in gathered):
        raise InvalidInputError(
            "the closure given to loop.step changes .grad of the user's own parameters, where the "
            "outer gradients are gathered: leave "
            "zero_grad(set_to_none=False) away and only return the loss"
        )
