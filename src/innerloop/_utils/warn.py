"""Warnings that point at the user's line."""

from __future__ import annotations

import inspect
import warnings

_NOT_THE_USER = ("torch", "innerloop", "beartype", "jaxtyping")


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line that is neither this library's nor PyTorch's."""
    level, frame = 1, inspect.currentframe()
    while (
        frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USER
    ):
        level, frame = level + 1, frame.f_back
    # Without a frame of the user's (a thread of the autograd engine) it is the outermost one.
    warnings.warn(message, category, stacklevel=max(level, 1))
