"""``F.cross_entropy`` with a second derivative that keeps little, for many logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from innerloop._utils import torch_private
from innerloop._utils.execution import Mode, may_read_values, mode
from innerloop.errors import InvalidInputError
from innerloop.nn import _twice_differentiable as twice
from innerloop.nn._derivative_order import Args, Kwargs
from innerloop.nn._replacements.softmax_loss import SoftmaxLoss, precise

TAKES_CHUNKS = 2**20
"""The number of logits from which our own computation is taken: there it is not slower."""


def cross_entropy(
    input: Float[Tensor, "..."],
    target: Shaped[Tensor, "..."],
    weight: Float[Tensor, "classes"] | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Float[Tensor, "..."]:
    r"""Compute ``F.cross_entropy`` with a second derivative that keeps little in memory.

    .. math::
        L_n = -\sum_c t_{nc} \log \mathrm{softmax}(z_n)_c, \qquad
        t_{nc} = w_c \bigl[(1-\varepsilon)\, q_{nc} + \varepsilon / C\bigr]

    Args:
        input: logits z, (C,), (N, C) or (N, C, d1, ...).
        target: class indices, without the dimension of the classes, or probabilities q in the shape
            of ``input``; the latter may be differentiated.
        weight: w, one per class.
        size_average: deprecated, as in torch.
        ignore_index: a target that counts for nothing (class indices only).
        reduce: deprecated, as in torch.
        reduction: ``"mean"`` (with class indices: divided by the sum of the weights of the
            targets), ``"sum"`` or ``"none"``.
        label_smoothing: ε.

    Returns:
        The loss: a number, or one per target.

    Raises:
        InvalidInputError: if shapes, dtypes, devices or settings do not go together.

    Memory: between an inner gradient and the outer backward pass the graph keeps the logits and
    their gradient, and for probabilities the targets; the probabilities are computed again, some
    rows at a time. That holds from 2²⁰ logits on; fewer are left to torch's own function, which is
    the same to rounding.

    Example:
        For two equal logits the loss is log 2, the gradient p - 1 and the second derivative p (1 -
        p).

        >>> z = torch.zeros(1, 2, requires_grad=True)
        >>> loss = cross_entropy(z, torch.tensor([0]))
        >>> round(loss.item(), 4)
        0.6931
        >>> (g,) = torch.autograd.grad(loss, z, create_graph=True)
        >>> g.tolist()
        [[-0.5, 0.5]]
        >>> torch.autograd.grad(g[0, 0], z)[0].tolist()
        [[0.25, -0.25]]
    """
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    probabilities = input.shape == target.shape and target.is_floating_point()
    _check_loss(input, target, weight, ignore_index, reduction, label_smoothing, probabilities)
    if input.numel() < TAKES_CHUNKS or not _by_chunks(input, target, weight):
        return F.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    autocast = torch.is_autocast_enabled(input.device.type)
    with torch.autocast(input.device.type, enabled=False):
        loss = total(input, target, weight, ignore_index, reduction, label_smoothing)
    dtype = torch.promote_types(input.dtype, target.dtype) if probabilities else input.dtype
    return loss if autocast else loss.to(dtype)


def has_many_logits(args: Args, kwargs: Kwargs) -> bool:
    """True if there are so many logits that our own computation is taken."""
    logits = args[0] if args else kwargs["input"]
    return isinstance(logits, Tensor) and logits.numel() >= TAKES_CHUNKS


def _by_chunks(*tensors: Tensor | None) -> bool:
    """True if a derivative may be asked for that chunks know: no tangent of a tangent."""
    if mode() is Mode.COMPILING or not twice.may_be_differentiated(*tensors):
        return False
    return torch_private.jvp_levels() < 2


def _check_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    probabilities: bool,
) -> None:
    """Raise for what torch refuses, and for labels that are not among the classes."""
    shapes = f"input {tuple(logits.shape)}, target {tuple(target.shape)}"
    if not logits.is_floating_point() or logits.ndim == 0:
        raise InvalidInputError(
            f"input is {logits.dtype} {tuple(logits.shape)}; pass floating-point logits, (C,) or "
            "(N, C, ...)"
        )
    if reduction not in ("mean", "sum", "none"):
        raise InvalidInputError(f"reduction={reduction!r}; choose from 'mean', 'sum', 'none'")
    if not 0 <= label_smoothing <= 1:
        raise InvalidInputError(f"label_smoothing={label_smoothing}; pass a number from 0 to 1")
    if target.device != logits.device:
        raise InvalidInputError(
            f"input is on {logits.device}, target on {target.device}; write target.to(input.device)"
        )
    classes = logits.shape[min(1, logits.ndim - 1)]
    if weight is not None and tuple(weight.shape) != (classes,):
        raise InvalidInputError(
            f"weight has the shape {tuple(weight.shape)}; it needs one number for each of "
            f"{classes} classes, ({classes},)"
        )
    if probabilities:
        if ignore_index >= 0:
            raise InvalidInputError(
                f"ignore_index={ignore_index} goes with class indices only, and target holds "
                "probabilities; leave it out"
            )
        return
    without = tuple(logits.shape[:1] + logits.shape[2:] if logits.ndim > 1 else ())
    if tuple(target.shape) != without:
        raise InvalidInputError(
            f"{shapes}: class indices have the shape {without}, the input's without its classes; "
            "probabilities have the input's shape"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise InvalidInputError(
            f"target is {target.dtype}; class indices must be torch.int64: write target.long()"
        )
    if may_read_values(target):
        outside = (target != ignore_index) & ((target < 0) | (target >= classes))
        if outside.any():
            raise InvalidInputError(
                f"target has the label {int(target[outside][0])}, but there are only {classes} "
                f"classes (0 to {classes - 1})"
            )


def total(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """Compute `cross_entropy` of valid arguments, in at least float32."""
    single = logits.ndim == 1
    if single:
        logits, target = logits.unsqueeze(0), target.unsqueeze(0)
    shape, classes = logits.shape, logits.shape[1]
    z = logits.reshape(*shape[:2], -1)
    smooth = label_smoothing / classes
    weights = None if weight is None else precise(weight).view(1, -1, 1)
    if target.is_floating_point():
        t = precise(target).reshape(z.shape).to(precise(z[:0]).dtype)
        t = t * (1 - label_smoothing) + smooth if label_smoothing else t
        (losses,) = _losses(z, None, t if weights is None else t * weights)
        count: Tensor | int = losses.numel()
    else:
        ignored = (target == ignore_index).reshape(shape[0], -1)
        y = target.reshape(ignored.shape).long().masked_fill(ignored, 0)
        t = None
        if label_smoothing:
            t = precise(z[:0]).new_full((1, classes, 1), smooth)
            t = t if weights is None else t * weights
        losses, *smoothed = _losses(z, y, t)
        of_target = torch.ones_like(losses) if weight is None else precise(weight)[y]
        losses = losses * of_target * (1 - label_smoothing) + (smoothed[0] if smoothed else 0)
        losses = losses.masked_fill(ignored, 0.0)
        count = of_target.masked_fill(ignored, 0.0).sum()
    if reduction == "none":
        # A clone, because the function keeps its output, and users may edit theirs in place.
        return losses.clone().view(() if single else (shape[0], *shape[2:]))
    return losses.sum() / count if reduction == "mean" else losses.sum()


def _losses(z: Tensor, y: Tensor | None, t: Tensor | None) -> twice.Tensors:
    if t is not None and torch_private.has_derivative(t):
        return twice.evaluate(SoftmaxLoss(), (z, t), (y,))
    return twice.evaluate(SoftmaxLoss(), (z,), (y, t))
