"""Evaluating the user's closure within a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from innerloop._carry import _alias
from innerloop._module.view import ModuleView
from innerloop._types import Params
from innerloop._utils import torch_private
from innerloop.errors import InvalidInputError

Closure = Callable[[], object]
"""A user's function without arguments that computes the loss."""
Gradients = dict[str, Tensor | None]


def evaluate_at(
    at: Params,
    closure: Closure,
    view: ModuleView,
    trained: Iterable[str],
    check: Callable[[object], Tensor],
    gradient_of: Callable[[Tensor, Params], Gradients],
) -> tuple[Tensor, Gradients]:
    """Return loss and gradients of a closure, with these parameters in ``loop.model`` meanwhile.

    Args:
        at: the parameters, by name.
        closure: computes the loss with ``view.module``.
        view: of the model; afterwards it has the parameters that it had before.
        trained: the names of those to differentiate by.
        check: takes what the closure returned, raises unless it is a loss.
        gradient_of: (loss, parameters that it was computed with) -> gradients.
    """
    own = view.read()
    with torch.enable_grad():
        trial = {
            n: at[n] if at[n].requires_grad else at[n].detach().requires_grad_() for n in trained
        }
        # An alias: the gradient is taken where a line search looks, not where the step started.
        alias = {n: _alias(p) for n, p in trial.items()}
        view.write(alias)
        # A step evaluates several times, and the graph of each may hold the buffers it wrote.
        view.renew_written_buffers()
        try:
            with refusing_backward(trial.values(), view.source.values()):
                loss = check(closure())
            return loss, gradient_of(loss, {**at, **alias})
        finally:
            view.write({n: own[n] for n in alias})


@contextmanager
def refusing_backward(trial: Iterable[Tensor], own: Iterable[Tensor]) -> Iterator[None]:
    """Raise where a closure calls ``backward()``.

    A ``zero_grad()`` before it must not cost the outer gradients gathered so far.

    Args:
        trial: the parameters that the closure computes with.
        own: the user's own parameters.
    """

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
