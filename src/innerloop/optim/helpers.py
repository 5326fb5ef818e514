"""What authors of update rules need: arithmetic with PyTorch's bits, and checks of settings."""

from innerloop.optim._engine.numerics import (
    add_scaled,
    average,
    average_of_squares,
    safe_sqrt,
)
from innerloop.optim._settings import check_betas, check_nonnegative, require

__all__ = [
    "add_scaled",
    "average",
    "average_of_squares",
    "check_betas",
    "check_nonnegative",
    "require",
    "safe_sqrt",
]
