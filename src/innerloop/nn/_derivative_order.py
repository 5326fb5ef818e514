"""How many derivatives may be taken of the code that is running."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from innerloop._utils import torch_private
from innerloop._utils.execution import Mode, mode

Args = tuple[object, ...]
Kwargs = Mapping[str, object]


class _Thread(threading.local):
    """What is going on in one thread.

    Attributes:
        kept: True inside `keep_kernels`.
        any_order: True inside `any_order`.
        loops: the number of loops that are running around each other.
        transform_levels: the number of transforms that ran when the innermost loop began.
    """

    kept = False
    any_order = False
    loops = 0
    transform_levels = 0


_thread = _Thread()


@contextmanager
def any_order() -> Iterator[None]:
    """Use replacements that can be differentiated any number of times, as a loop in a loop does.

    PyTorch's third derivative of batch, instance and layer norm is wrong without an error.
    innerloop notices loops inside loops and ``torch.func`` transforms by itself. Put the inner
    loop into this block where ``create_graph=True`` is written: for the outer loss, to
    differentiate a meta-gradient once more, or in the inner loss (a gradient penalty).
    """
    before, _thread.any_order = _thread.any_order, True
    try:
        yield
    finally:
        _thread.any_order = before


class entering_loop:  # noqa: N801 (used like a function, at every step)
    """Count one more loop, and note how many transforms run around it, inside this block."""

    def __enter__(self) -> None:
        self._before = _thread.transform_levels
        _thread.loops += 1
        _thread.transform_levels = torch_private.derivative_levels()

    def __exit__(self, *_: object) -> None:
        _thread.loops, _thread.transform_levels = _thread.loops - 1, self._before


class Situation(NamedTuple):
    """What decides, besides the operation itself, whether it is replaced."""

    any_order: bool
    kept: bool
    loops: int
    transform_levels: int

    @classmethod
    def now(cls) -> Situation:
        """Return that of the current thread."""
        return cls(*(getattr(_thread, name) for name in cls._fields))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Make it that of the current thread inside this block, for code that runs again."""
        before = Situation.now()
        self.put()
        try:
            yield
        finally:
            before.put()

    def put(self) -> None:
        """Make it that of the current thread, for good."""
        for name, value in self._asdict().items():
            setattr(_thread, name, value)


def _is_recorded(args: Args, kwargs: Kwargs) -> bool:
    """True if autograd runs around all transforms."""
    return any(
        isinstance(x, Tensor) and torch_private.innermost(x).requires_grad
        for x in (*args, *kwargs.values())
    )


def in_forward_mode(args: Args, kwargs: Kwargs) -> bool:
    """True if a forward-mode derivative is being taken."""
    return torch_private.forward_mode()


def in_reverse_over_forward(args: Args, kwargs: Kwargs) -> bool:
    """True if reverse mode differentiates what forward mode computes.

    The reverse mode may be that of ``torch.func`` or that of autograd.
    """
    if mode() is Mode.COMPILING or not torch_private.forward_mode():
        return False
    return torch_private.reverse_over_forward() or _is_recorded(args, kwargs)


def needs_third_derivative(args: Args, kwargs: Kwargs) -> bool:
    """True if a derivative may be taken that PyTorch gets wrong for its norms.

    These are the third one, and the reverse-mode derivative of a forward-mode one. A loop takes
    two derivatives, and a transform one: inside the loop's loss, or as one of three transforms
    around each other.
    """
    if mode() is Mode.COMPILING:
        return False
    if _thread.any_order or _thread.loops > 1:
        return True
    if _thread.loops and torch_private.inside_vmap():
        # A gradient around vmap of the gradient of layer_norm is wrong in the second derivative
        # already (torch 2.13), and whether one is taken around is not known inside.
        return True
    levels = torch_private.derivative_levels()
    if levels > 2 or (_thread.loops and levels > _thread.transform_levels):
        return True
    return (levels == 2 and _is_recorded(args, kwargs)) or in_reverse_over_forward(args, kwargs)
