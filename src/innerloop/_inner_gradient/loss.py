"""What an inner loss must return."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from innerloop.errors import InvalidInputError

INDEPENDENT = (
    "the loss does not depend on params: compute it from the `params` (or `model`) that it is given"
)


def check_loss(loss: object, what: str) -> Float[Tensor, ""]:
    """Return ``loss`` as a scalar; raise unless it is one."""
    if not isinstance(loss, Tensor):
        raise InvalidInputError(
            f"{what} must return a scalar tensor (or a pair (scalar, aux)), got "
            f"{type(loss).__name__}"
        )
    if loss.numel() != 1:
        raise InvalidInputError(
            f"{what} has shape {tuple(loss.shape)}, it must be a scalar: reduce it, for example "
            "by .mean()"
        )
    if not loss.is_floating_point():
        raise InvalidInputError(
            f"{what} has dtype {loss.dtype}, it must be real and floating point"
        )
    return loss.reshape(()) if loss.ndim else loss
