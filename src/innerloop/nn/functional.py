r"""Functions of ``torch.nn.functional`` with the derivatives that differentiating through training needs: same names and arguments.

``torch``'s fused attention has no second derivative and no forward mode; its cross-entropy keeps about eleven tensors of the size of the
logits until the outer backward pass. These have both derivatives and keep little.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from innerloop import _private
from innerloop.errors import InvalidInputError
from innerloop.nn import attention
from innerloop.nn import cross_entropy as softmax_loss

__all__ = ["cross_entropy", "scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Float[Tensor, "... l e"],
    key: Float[Tensor, "... s e"],
    value: Float[Tensor, "... s f"],
    attn_mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "... l f"]:
    r"""Attention as `torch.nn.functional.scaled_dot_product_attention` computes it, with derivatives of any order and forward mode.

    .. math::
        O = \mathrm{dropout}\bigl(\mathrm{softmax}(s\, Q K^\top + M)\bigr)\, V, \qquad s = 1/\sqrt{e} \text{ unless given}

    Args:
        query: queries, any number of leading dimensions.
        key: keys.
        value: values.
        attn_mask: broadcastable to (..., l, s). Boolean: True takes part; else it is added to the scores, and may be differentiated.
        dropout_p: the chance of a weight to be dropped.
        is_causal: position i sees the positions up to i; not together with a mask.
        scale: s.
        enable_gqa: each head of ``key`` and ``value`` serves a number of heads of ``query`` (dimension -3).

    Returns:
        The attention. A row whose mask lets it see nothing is 0, and so is its derivative.

    Raises:
        InvalidInputError: shapes, dtypes, devices or settings do not go together.

    Where nothing is differentiated this is torch's own function. Otherwise short sequences take plain operations, and long ones blocks
    of rows (`innerloop.nn.attention`), whose memory grows with the length and not with its square; `innerloop.nn.attention.TAKES_BLOCKS`
    says from where on. Third derivatives of the latter are taken of plain operations again.
    With dropout, plain operations draw the same random numbers as torch's math kernel, and blocks draw one number, from which all
    others follow; both only depend on torch's random state.

    Example:
        With one key, attention is the identity of the value: no derivative with respect to the query.

        >>> q, k, v = (
        ...     torch.ones(1, 1, 4, requires_grad=True),
        ...     torch.ones(1, 1, 4),
        ...     torch.tensor([[[3.0, 5.0]]], requires_grad=True),
        ... )
        >>> out = scaled_dot_product_attention(q, k, v)
        >>> out.tolist()
        [[[3.0, 5.0]]]
        >>> (g,) = torch.autograd.grad((out**2).sum(), v, create_graph=True)
        >>> torch.autograd.grad(g.sum(), v)[0].tolist()
        [[[2.0, 2.0]]]
    """
    _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if query.is_nested or not (dropout_p or _differentiated(query, key, value, attn_mask)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    device = query.device.type
    lower = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if lower is not None:  # what autocast does to torch's own
        query, key, value = query.to(lower), key.to(lower), value.to(lower)
    if enable_gqa:
        key, value = (_one_per_head(x, query.shape[-3]) for x in (key, value))
    with torch.autocast(device, enabled=False):
        return attention.attend(
            query,
            key,
            value,
            attn_mask,
            scale=scale,
            is_causal=is_causal,
            dropout_p=dropout_p,
            blocks=_by_blocks(query, key, dropout_p),
        )


def _differentiated(*tensors: Tensor | None) -> bool:
    """Whether a derivative with respect to one of them may be asked for, of whatever order: that cannot be seen here."""
    if torch.compiler.is_compiling():
        return True
    if not torch.is_grad_enabled() and not _private.inside_transform():
        return False
    return any(x is not None and _private.has_derivative(x) for x in tensors)


def _by_blocks(query: Tensor, key: Tensor, dropout_p: float) -> bool:
    """Blocks know no tangent of a tangent, and draw their own random numbers where ``vmap`` has rules for them."""
    if torch.compiler.is_compiling() or not attention.takes_blocks(query, key):
        return False
    return _private.jvp_levels() < 2 and not (dropout_p and _private.inside_vmap())


def _one_per_head(x: Tensor, heads: int) -> Tensor:
    """Each head as often as there are query heads for it."""
    return x.unsqueeze(-3).expand(*x.shape[:-2], heads // x.shape[-3], *x.shape[-2:]).flatten(-4, -3)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    """Refuse what torch refuses, and what it would fail on later."""
    if query.is_nested:
        return
    q, k, v = (tuple(x.shape) for x in (query, key, value))
    shapes = f"query {q}, key {k}, value {v}"
    if min(map(len, (q, k, v))) < 2:
        raise InvalidInputError(
            f"{shapes}: each needs two dimensions at least, (length, features); write x[None] for one position"
        )
    if q[-1] != k[-1]:
        raise InvalidInputError(
            f"{shapes}: query and key have {q[-1]} and {k[-1]} features; their last dimensions must be equal"
        )
    if k[-2] != v[-2]:
        raise InvalidInputError(f"{shapes}: {k[-2]} keys and {v[-2]} values; there must be one value for each key")
    dtypes = {query.dtype, key.dtype, value.dtype}
    if not query.is_floating_point() or (len(dtypes) > 1 and not torch.is_autocast_enabled(query.device.type)):
        raise InvalidInputError(
            f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype}; pass one floating-point dtype, as in key.to(query.dtype)"
        )
    if not 0 <= dropout_p <= 1:
        raise InvalidInputError(f"dropout_p={dropout_p} is not a probability; pass a number from 0 to 1")
    if enable_gqa:
        if min(map(len, (q, k, v))) < 3 or q[-3] % k[-3] or q[-3] % v[-3]:
            raise InvalidInputError(
                f"{shapes}: with enable_gqa the number of heads of key and value (dimension -3) must divide that of the query"
            )
        k, v = (*k[:-3], q[-3], *k[-2:]), (*v[:-3], q[-3], *v[-2:])
    batch = _broadcast(shapes, q[:-2], k[:-2], v[:-2])
    if mask is None:
        return
    if is_causal:
        raise InvalidInputError(
            "attn_mask and is_causal=True were both given; pass one mask: attn_mask & torch.ones(l, s, dtype=torch.bool).tril()"
        )
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise InvalidInputError(
            f"attn_mask is {mask.dtype}; pass a boolean mask (True takes part) or one to add, as in attn_mask.to(query.dtype)"
        )
    scores = (*batch, q[-2], k[-2])
    if _broadcast(f"attn_mask {tuple(mask.shape)}, scores {scores}", tuple(mask.shape), scores) != scores:
        raise InvalidInputError(
            f"attn_mask {tuple(mask.shape)} has more dimensions than the scores {scores}; it must broadcast to them"
        )


def _broadcast(what: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError as error:
        raise InvalidInputError(f"{what}: these do not broadcast; make the sizes equal, or 1") from error


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
    r"""Cross-entropy as `torch.nn.functional.cross_entropy` computes it, with a second derivative that keeps little.

    .. math::
        L_n = -\sum_c t_{nc} \log \mathrm{softmax}(z_n)_c, \qquad
        t_{nc} = w_c \bigl[(1-\varepsilon)\, q_{nc} + \varepsilon / C\bigr]

    Args:
        input: logits z, (C,), (N, C) or (N, C, d1, ...).
        target: class indices, without the dimension of the classes, or probabilities q in the shape of ``input``; the latter may be
            differentiated.
        weight: w, one per class.
        size_average: deprecated, as in torch.
        ignore_index: a target that counts for nothing (class indices only).
        reduce: deprecated, as in torch.
        reduction: ``"mean"`` (with class indices: divided by the sum of the weights of the targets), ``"sum"`` or ``"none"``.
        label_smoothing: ε.

    Returns:
        The loss: a number, or one per target.

    Raises:
        InvalidInputError: shapes, dtypes, devices or settings do not go together.

    Memory: between an inner gradient and the outer backward pass the graph keeps the logits and their gradient, and for
    probabilities the targets; the probabilities are computed again, some rows at a time. From `innerloop.nn.cross_entropy.TAKES_CHUNKS`
    logits on; fewer are left to torch's own function, which is the same to rounding.

    Example:
        For two equal logits the loss is log 2, the gradient p - 1 and the second derivative p (1 - p).

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
    if input.numel() < softmax_loss.TAKES_CHUNKS or not _by_chunks(input, target, weight):
        return F.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    autocast = torch.is_autocast_enabled(input.device.type)
    with torch.autocast(input.device.type, enabled=False):
        loss = softmax_loss.total(input, target, weight, ignore_index, reduction, label_smoothing)
    dtype = torch.promote_types(input.dtype, target.dtype) if probabilities else input.dtype
    return loss if autocast else loss.to(dtype)


def _by_chunks(*tensors: Tensor | None) -> bool:
    """Chunks know no tangent of a tangent."""
    if torch.compiler.is_compiling() or not _differentiated(*tensors):
        return False
    return _private.jvp_levels() < 2


def _check_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    probabilities: bool,
) -> None:
    """Refuse what torch refuses, and labels that are none of the classes."""
    shapes = f"input {tuple(logits.shape)}, target {tuple(target.shape)}"
    if not logits.is_floating_point() or logits.ndim == 0:
        raise InvalidInputError(
            f"input is {logits.dtype} {tuple(logits.shape)}; pass floating-point logits, (C,) or (N, C, ...)"
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
        raise InvalidInputError(f"weight {tuple(weight.shape)} is not one number for each of {classes} classes")
    if probabilities:
        if ignore_index >= 0:
            raise InvalidInputError(
                f"ignore_index={ignore_index} goes with class indices only, and target holds probabilities; leave it out"
            )
        return
    without = tuple(logits.shape[:1] + logits.shape[2:] if logits.ndim > 1 else ())
    if tuple(target.shape) != without:
        raise InvalidInputError(
            f"{shapes}: class indices have the shape {without}, the input's without its classes; probabilities have the input's shape"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise InvalidInputError(f"target is {target.dtype}; class indices must be torch.int64: write target.long()")
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and not _private.inside_vmap():
        outside = (target != ignore_index) & ((target < 0) | (target >= classes))
        if outside.any():
            raise InvalidInputError(f"target has the label {int(target[outside][0])}, and input has {classes} classes")
