"""Hooks on gradients: they act in the backward pass of an inner step, and not in the outer one.

A hook changes what a step of training does. The outer backward pass runs through the same nodes of
the graph once more; it differentiates that step, so the hook must not act again there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from innerloop.errors import NotDifferentiableError


class _Running:
    """How many backward passes of inner steps are running, in whatever thread.

    On a GPU, hooks run in a thread of the device, not in that of the caller.
    """

    passes = 0


class _Thread(threading.local):
    """What the current thread takes for granted.

    Attributes:
        symmetric: the product that assumes a symmetric Jacobian of the inner gradient, or None.
    """

    symmetric: str | None = None


_thread = _Thread()


class inner_pass:  # noqa: N801 (used like a function)
    """Mark the backward pass of an inner step, which runs inside this block."""

    def __enter__(self) -> None:
        _Running.passes += 1

    def __exit__(self, *_: object) -> None:
        _Running.passes -= 1


def is_inner_pass() -> bool:
    """True if the backward pass of an inner step is running."""
    return _Running.passes > 0


class InnerHook:
    """A user's hook that acts until the inner backward pass has run through it, then no more.

    Passes before it are part of the loss (a gradient penalty), and the hook acts there too.

    Args:
        hook: the user's hook, of a tensor or of a module.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook
        self._done = False

    def __call__(self, *args: Any) -> Any:
        if self._done:
            return None
        if _Running.passes:
            self._done = True
        return self._hook(*args)


@contextmanager
def assuming_symmetry(product: str) -> Iterator[None]:
    """Refuse, inside this block, what makes the Jacobian of the inner gradient unsymmetric."""
    before, _thread.symmetric = _thread.symmetric, product
    try:
        yield
    finally:
        _thread.symmetric = before


def check_symmetric(what: str) -> None:
    """Raise if a product that assumes a symmetric Jacobian is being taken; ``what`` breaks it."""
    if _thread.symmetric is not None:
        raise NotDifferentiableError(
            f'product="{_thread.symmetric}" needs a symmetric Jacobian of the inner gradient, and '
            f"{what} makes it unsymmetric: the gradient of a step is then not that of the loss. "
            'Write product="reverse"'
        )
