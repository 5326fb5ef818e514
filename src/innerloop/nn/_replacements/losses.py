"""Losses that lack a derivative in PyTorch, written out."""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from innerloop._utils.execution import Mode, may_read_values, mode
from innerloop.errors import InvalidInputError
from innerloop.nn._derivative_order import Args, Kwargs

Reduction = Literal["none", "mean", "sum"]


def reduced(loss: Float[Tensor, "..."], reduction: str) -> Float[Tensor, "..."]:
    """Return the mean of ``loss``, its sum, or ``loss`` itself."""
    if reduction not in ("none", "mean", "sum"):
        raise InvalidInputError(f'reduction={reduction!r}: write "mean", "sum" or "none"')
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def check_labels(labels: Tensor, classes: int, name: str = "target", least: int = 0) -> None:
    """Raise if one of ``labels`` is not a class, where they can be looked at.

    Args:
        labels: whole numbers.
        classes: the number of classes.
        name: the argument of the user that holds the labels.
        least: the least number that is allowed; below 0 for padding.
    """
    if not may_read_values(labels):
        return
    outside = (labels < least) | (labels >= classes)
    if outside.any():
        raise InvalidInputError(
            f"{name} has the label {int(labels[outside][0])}, but there are only {classes} classes "
            f"(0 to {classes - 1})"
        )


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Translate the old pair of flags into the new word."""
    if size_average is None and reduce is None:
        return reduction
    return "none" if reduce is False else "sum" if size_average is False else "mean"


def _weighted(error: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Reduce weighted entries; their mean is divided by the sum of the weights."""
    if weight is None:
        return reduced(error, reduction)
    error = error * weight
    return error.sum() / weight.sum() if reduction == "mean" else reduced(error, reduction)


def weight_of_l1_loss(input: object, target: object) -> Tensor | None:
    """Find the ``weight`` of the call of ``F.l1_loss`` that is running, in its frame.

    ``F.l1_loss`` does not hand its weight over to a mode (torch 2.13).

    Under several modes the function calls itself, and the innermost call has lost it already.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals
        if (
            frame.f_code is F.l1_loss.__code__
            and found["input"] is input
            and found["target"] is target
        ):
            weight: Tensor | None = found["weight"]
            if weight is not None:
                return weight
        frame = frame.f_back
    return None


def l1_loss(
    input: Float[Tensor, "..."],
    target: Float[Tensor, "..."],
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """Compute ``F.l1_loss`` with the weight that got lost on the way here.

    PyTorch's own would lose the weight again under a further mode.
    """
    error, weight = (input - target).abs(), weight_of_l1_loss(input, target)
    reduction = _reduction(size_average, reduce, reduction)
    if weight is not None and weight.shape != input.shape:
        raise InvalidInputError(
            f"weight {tuple(weight.shape)}, input {tuple(input.shape)}: their shapes must be equal"
        )
    return _weighted(error, weight, reduction)


def loses_its_weight(args: Args, kwargs: Kwargs) -> bool:
    """True if ``F.l1_loss`` was called with a weight."""
    if mode() is Mode.COMPILING or "weight" in kwargs:
        return False
    given = {**dict(zip(("input", "target"), args, strict=False)), **kwargs}
    return weight_of_l1_loss(given["input"], given["target"]) is not None


def in_chunks(args: Args, kwargs: Kwargs) -> bool:
    """True if ``F.linear_cross_entropy`` is to take the logits some rows at a time."""
    return kwargs.get("options") is not None


def linear_cross_entropy(*args: object, **kwargs: object) -> Float[Tensor, "..."]:
    """Compute ``F.linear_cross_entropy`` without ``options``: all logits at once, the same loss.

    With options PyTorch computes the gradient in the forward pass and keeps it, so that the second
    derivative is that of a constant.
    """
    call: Any = F.linear_cross_entropy
    loss: Tensor = call(*args, **{**kwargs, "options": None})
    return loss


def mse_loss(
    input: Float[Tensor, "..."],
    target: Float[Tensor, "..."],
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """Compute ``F.mse_loss``, whose gradient PyTorch cannot differentiate in forward mode."""
    return _weighted((input - target).square(), weight, _reduction(size_average, reduce, reduction))


def huber_loss(
    input: Float[Tensor, "..."],
    target: Float[Tensor, "..."],
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    r"""Compute ``F.huber_loss``, whose gradient PyTorch cannot differentiate in forward mode.

    .. math::
        \tfrac12 e^2 \text{ for } |e| \le \delta, \qquad
        \delta(|e| - \tfrac12 \delta) \text{ beyond}
    """
    error = input - target
    size = error.abs()
    loss = torch.where(size <= delta, 0.5 * error.square(), delta * (size - 0.5 * delta))
    return reduced(loss if weight is None else loss * weight, reduction)


def soft_margin_loss(
    input: Float[Tensor, "..."],
    target: Float[Tensor, "..."],
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Compute ``F.soft_margin_loss``, which PyTorch cannot differentiate in forward mode.

    .. math:: \log(1 + e^{-yx})
    """
    return reduced(F.softplus(-target * input), _reduction(size_average, reduce, reduction))


def multi_margin_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*targets"],
    p: int = 1,
    margin: float = 1.0,
    weight: Float[Tensor, " classes"] | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Compute ``F.multi_margin_loss``, which in PyTorch has no second derivative.

    It has no forward mode there, either.

    .. math:: \frac1C \sum_{j \ne y} w_y \max(0, \text{margin} - x_y + x_j)^p

    Example:
        >>> import torch
        >>> from innerloop.nn.functional import multi_margin_loss
        >>> multi_margin_loss(torch.tensor([[0.0, 0.5]]), torch.tensor([0]))
        tensor(0.7500)
    """
    if p not in (1, 2):
        raise InvalidInputError(f"multi_margin_loss: p={p}; write 1 or 2")
    if (
        input.dim() not in (1, 2)
        or target.dim() > 1
        or target.numel() != math.prod(input.shape[:-1])
    ):
        raise InvalidInputError(
            f"input {tuple(input.shape)}, target {tuple(target.shape)}: these must be (N, C) and "
            "(N,), or (C,) and one label"
        )
    rows, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    check_labels(labels, input.shape[-1])
    classes = labels.unsqueeze(-1)
    # relu, not clamp_min: at the kink PyTorch's gradient is 0.
    excess = (margin - rows.gather(-1, classes) + rows).relu() ** p
    if weight is not None:
        excess = excess * weight[labels].unsqueeze(-1)
    others = torch.ones_like(rows, dtype=torch.bool).scatter(
        -1, classes, torch.zeros_like(classes, dtype=torch.bool)
    )
    loss = torch.where(others, excess, torch.zeros_like(excess)).sum(-1) / rows.shape[-1]
    return reduced(loss.reshape(target.shape), _reduction(size_average, reduce, reduction))


def multilabel_margin_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch classes"],
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Compute ``F.multilabel_margin_loss``, which in PyTorch has no second derivative.

    It has no forward mode there, either.

    .. math:: \frac1C \sum_{y \in Y} \sum_{j \notin Y} \max(0, 1 - x_y + x_j)

    The labels Y of a row are those before the first -1.
    """
    if input.shape != target.shape:
        raise InvalidInputError(
            f"input {tuple(input.shape)}, target {tuple(target.shape)}: their shapes must be equal"
        )
    check_labels(target, input.shape[-1], least=-1)
    valid = (target >= 0).long().cumprod(-1).bool()
    labels = target.clamp_min(0)
    chosen = torch.zeros_like(input, dtype=torch.long).scatter_add(-1, labels, valid.long()) > 0
    excess = (1 - input.gather(-1, labels).unsqueeze(-1) + input.unsqueeze(-2)).relu()
    counted = valid.unsqueeze(-1) & ~chosen.unsqueeze(-2)
    loss = torch.where(counted, excess, torch.zeros_like(excess)).sum((-2, -1)) / input.shape[-1]
    return reduced(loss, _reduction(size_average, reduce, reduction))
