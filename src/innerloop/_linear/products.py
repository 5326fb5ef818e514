r"""A second derivative times a vector, in three ways.

A function of a list of tensors is given by its gradients, :math:`g(x) = \nabla f(x)`, and the
product with a vector :math:`v` is :math:`\nabla^2 f(x)\, v`. The Hessian is symmetric, so it may be
taken from either side: :math:`v` is pushed through :math:`g` (forward over reverse), or pulled back
through it (reverse over reverse). Without a second derivative, a difference of two gradients is
left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._utils import torch_private
from innerloop._utils.execution import Mode, may_call_autograd, mode
from innerloop._utils.finite import have_values
from innerloop.errors import NotDifferentiableError

Gradients = Callable[[list[Tensor]], tuple[list[Tensor], Tensor]]
"""``gradients(values) -> (gradients, loss)``."""

# With has_aux they return three values, which their annotations do not say.
_jvp: Any = torch.func.jvp
_vjp: Any = torch.func.vjp


class SecondProduct(NamedTuple):
    """A gradient, and the second derivative times a vector.

    Attributes:
        gradient: the gradients where they were evaluated.
        product: their derivative along the vector.
        loss: the value of the function.
    """

    gradient: list[Tensor]
    product: list[Tensor]
    loss: Tensor


def forward_over_reverse(
    gradients: Gradients,
    at: list[Tensor],
    along: list[Tensor],
    *,
    before_each: Callable[[], None],
) -> SecondProduct:
    """Push ``along`` through the gradient: one forward-mode pass over it.

    Args:
        gradients: the gradients with respect to all of ``at``.
        at: where to evaluate them.
        along: the vector, aligned with ``at``.
        before_each: called before each evaluation, to rewind random numbers.
    """
    before_each()
    with torch_private.only_forward_mode():
        return SecondProduct(*_jvp(gradients, (at,), (along,), has_aux=True))


def reverse_over_reverse(
    gradients: Gradients,
    at: list[Tensor],
    along: list[Tensor],
    *,
    before_each: Callable[[], None],
) -> SecondProduct:
    """Pull ``along`` back through the gradient.

    Args:
        gradients: the gradients, with respect to some of ``at`` or all of them. In eager code they
            are differentiated by ``torch.autograd``, elsewhere by ``torch.func``.
        at: where to evaluate them.
        along: the vector, aligned with the gradients.
        before_each: called before each evaluation, to rewind random numbers.

    Returns:
        The product is aligned with ``at``.
    """
    before_each()
    if not may_call_autograd():
        found, pull, loss = _vjp(gradients, at, has_aux=True)
        return SecondProduct(found, list(pull(along)[0]), loss)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in at]
        found, loss = gradients(leaves)
    ends = [(g, v) for g, v in zip(found, along, strict=True) if g.requires_grad]
    product: list[Tensor] = [torch.zeros_like(x) for x in at]
    if ends:
        pulled = torch.autograd.grad(
            [g for g, _ in ends], leaves, [v for _, v in ends], allow_unused=True
        )
        product = [z if p is None else p for p, z in zip(pulled, product, strict=True)]
    return SecondProduct([g.detach() for g in found], product, loss.detach())


def central_difference(
    gradients: Gradients,
    at: list[Tensor],
    along: list[Tensor],
    *,
    before_each: Callable[[], None],
    value: Callable[[], Tensor],
    moved: int,
    relative_step: float | None,
) -> SecondProduct:
    r"""Difference two gradients: no second derivative is needed.

    .. math:: \frac{g(x + \epsilon v) - g(x - \epsilon v)}{2 \epsilon}

    Args:
        gradients: the gradients with respect to all of ``at``.
        at: where to evaluate them.
        along: the vector, aligned with ``at``.
        before_each: called before each evaluation, to rewind random numbers.
        value: the function at ``at`` itself, which neither side evaluates.
        moved: how many of ``at``, the first ones, are displaced. The entries of ``along`` for the
            rest must be zero.
        relative_step: the largest displacement, relative to 1 + the largest of ``at``; None: the
            cube root of the precision. The error falls with the square of it, until rounding takes
            over.

    Where a gradient is 0, the update of Adam and its like is nearly a jump, and ``along`` is larger
    there by up to lr / eps: displaced together, the other entries would hardly move. So two
    products are then taken, one for these entries and one for the rest, and added. Under ``vmap``,
    where no value can be looked at, this is always done.
    """
    along = [_dense(v) for v in along]
    found = _one_difference(gradients, at, along, before_each, value, moved, relative_step)
    apart = _at_zero_gradients(along, found.gradient, moved)
    if apart is None:
        return found
    first, second = (
        _one_difference(gradients, at, part, before_each, lambda: found.loss, moved, relative_step)
        for part in apart
    )
    product = [a + b for a, b in zip(first.product, second.product, strict=True)]
    before_each()
    return SecondProduct(first.gradient, product, value())


def _at_zero_gradients(
    along: list[Tensor], found: list[Tensor], moved: int
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Split ``along`` into the entries whose gradient is not 0 and those where it is.

    None if there is no need to, because the latter do not outweigh the others.
    """
    pairs = [(v, _dense(g)) for v, g in zip(along[:moved], found[:moved], strict=True)]
    largest = torch.stack([g.abs().max() for _, g in pairs if g.numel()]).max()
    zero = [g.abs() <= torch.finfo(g.dtype).eps * largest for _, g in pairs]
    rest = [v.masked_fill(z, 0) for (v, _), z in zip(pairs, zero, strict=True)]
    there = [v.masked_fill(~z, 0) for (v, _), z in zip(pairs, zero, strict=True)]
    if mode() is not Mode.COMPILING and have_values(along[:moved]):
        sizes = [
            float(torch.stack([v.detach().abs().max() for v in part if v.numel()]).max())
            for part in (rest, there)
        ]
        if not sizes[1] > 10 * sizes[0] > 0:
            return None
    return [*rest, *along[moved:]], [*there, *along[moved:]]


def _dense(x: Tensor) -> Tensor:
    return x if x.layout is torch.strided else x.to_dense()


def _one_difference(
    gradients: Gradients,
    at: list[Tensor],
    along: list[Tensor],
    before_each: Callable[[], None],
    value: Callable[[], Tensor],
    moved: int,
    relative_step: float | None,
) -> SecondProduct:
    h = torch.finfo(at[0].dtype).eps ** (1 / 3) if relative_step is None else relative_step
    scale = torch.stack([v.abs().max() for v in along[:moved] if v.numel()]).max()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    size = h * (1 + torch.stack([v.abs().max() for v in at[:moved] if v.numel()]).max())
    sides = []
    for sign in (1, -1):
        before_each()
        displaced = [
            v + sign * size * (a / scale) for v, a in zip(at[:moved], along[:moved], strict=True)
        ]
        sides.append(gradients([*displaced, *at[moved:]]))
    (above, _), (below, _) = sides
    mean = [(a + b) / 2 for a, b in zip(above, below, strict=True)]
    slope = [(a - b) * (scale / (2 * size)) for a, b in zip(above, below, strict=True)]
    before_each()
    return SecondProduct(mean, slope, value())


def lacks_forward_mode(error: Exception) -> bool:
    """True if torch complains about a missing forward-mode derivative."""
    signs = (
        "forward AD",
        "forward mode",
        "forward-mode",
        "jvp",
        "functorch",
        "ZeroTensors",
        "tangent",
        "dual",
    )
    return isinstance(error, NotImplementedError) or any(sign in str(error) for sign in signs)


def without_forward_mode(error: Exception) -> NotDifferentiableError:
    """Return the error for ``product="mixed"`` where an operation lacks a forward mode."""
    return NotDifferentiableError(
        'product="mixed" needs forward-mode derivatives, and an operation of the loss lacks '
        f'one: write product="reverse". PyTorch says: {error}'
    )
