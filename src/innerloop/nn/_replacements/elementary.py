"""Small operations of which PyTorch lacks a derivative, or gets one wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from innerloop._utils import torch_private
from innerloop._utils.execution import Mode, mode
from innerloop.errors import NotDifferentiableError
from innerloop.nn._derivative_order import Args, Kwargs


def hardsigmoid(input: Float[Tensor, "..."], inplace: bool = False) -> Float[Tensor, "..."]:
    r"""Compute ``F.hardsigmoid``, which in PyTorch has no second derivative.

    .. math:: \min(\max(x + 3, 0), 6) / 6
    """
    # Outside, and on the kinks themselves, PyTorch's gradient is 0; a clamp's would be 1 there.
    inside, shifted = (input > -3) & (input < 3), input + 3
    result = torch.where(inside, shifted, shifted.detach().clamp(0, 6)) / 6
    return input.copy_(result) if inplace else result


def cholesky_inverse(
    input: Float[Tensor, "*batch n n"], upper: bool = False, *, out: Tensor | None = None
) -> Float[Tensor, "*batch n n"]:
    r"""Compute ``torch.cholesky_inverse``, whose forward-mode derivative PyTorch gets wrong.

    .. math:: (L L^T)^{-1} = L^{-T} L^{-1}
    """
    # PyTorch takes no derivative of a result in ``out``, and says so.
    if out is not None:
        return torch.cholesky_inverse(input, upper, out=out)
    one = torch.eye(input.shape[-1], dtype=input.dtype, device=input.device).expand_as(input)
    factor = input.mH if upper else input
    inverse = torch.linalg.solve_triangular(factor.tril(), one, upper=False)
    return inverse.mH @ inverse


def normalize(
    input: Float[Tensor, "..."],
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    out: Tensor | None = None,
) -> Float[Tensor, "..."]:
    """Compute ``F.normalize`` with ``out``, as the power iteration of spectral norm calls it.

    The results are constants, which PyTorch refuses to write while forward mode runs.
    """
    values = F.normalize(input.detach(), p, dim, eps)
    return values if out is None else out.copy_(values)


def is_differentiated(args: Args, kwargs: Kwargs) -> bool:
    """True if an argument is differentiated."""
    return mode() is not Mode.COMPILING and any(
        isinstance(x, Tensor) and torch_private.has_derivative(x) for x in (*args, *kwargs.values())
    )


def may_be_differentiated(args: Args, kwargs: Kwargs) -> bool:
    """True if an argument is differentiated, or code is compiled, which may do so later."""
    return mode() is Mode.COMPILING or is_differentiated(args, kwargs)


def is_into_out(args: Args, kwargs: Kwargs) -> bool:
    """True if the result is written into a given tensor while forward mode runs."""
    return kwargs.get("out") is not None and torch_private.forward_mode()


def is_product_in_forward_mode(args: Args, kwargs: Kwargs) -> bool:
    """True if ``scatter_reduce`` multiplies while forward mode runs."""
    reduce = kwargs.get("reduce", args[4] if len(args) > 4 else None)
    return reduce == "prod" and torch_private.forward_mode()


def refused(name: str, why: str) -> Callable[..., object]:
    """Make a replacement that raises: PyTorch's derivative is silently wrong, and we have none."""

    def call(*args: object, **kwargs: object) -> object:
        raise NotDifferentiableError(f"{name} {why}")

    return call
