"""``F.scaled_dot_product_attention`` with derivatives of any order.

Short sequences take plain operations, long ones blocks of rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from innerloop._utils import torch_private
from innerloop._utils.execution import Mode, mode
from innerloop.errors import InvalidInputError
from innerloop.nn import _twice_differentiable as twice
from innerloop.nn._replacements.attention_blockwise import Blockwise
from innerloop.nn._replacements.attention_composite import composite

TAKES_BLOCKS = {"cpu": 2**20, "cuda": 2**28}
"""The number of scores from which blocks are taken, for each kind of device.

Scores are counted over the whole batch: heads x queries x keys.

On the CPU that is where a second-order step becomes faster by blocks than by plain operations
(docs/benchmarks.md), and it takes less memory from there on. On a GPU nothing has been measured:
there blocks are for what would hardly fit otherwise, a gigabyte for each of the about twelve
matrices of scores in float32.
"""


def takes_blocks(query: Tensor, key: Tensor) -> bool:
    """True if attention goes by blocks (`Blockwise`), False if by plain operations."""
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    return 0 < scores >= TAKES_BLOCKS.get(query.device.type, TAKES_BLOCKS["cuda"])


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
    r"""Compute ``F.scaled_dot_product_attention`` with derivatives of any order and forward mode.

    .. math::
        O = \mathrm{dropout}\bigl(\mathrm{softmax}(s\, Q K^\top + M)\bigr)\, V,
        \qquad s = 1/\sqrt{e} \text{ unless given}

    Args:
        query: queries, any number of leading dimensions.
        key: keys.
        value: values.
        attn_mask: broadcastable to (..., l, s). Boolean: True takes part; else it is added to the
            scores, and may be differentiated. Or a ``torch.nn.attention.bias.CausalBias``.
        dropout_p: the chance of a weight to be dropped.
        is_causal: position i sees the positions up to i; not together with a mask.
        scale: s.
        enable_gqa: each head of ``key`` and ``value`` serves a number of heads of ``query``
            (dimension -3).

    Returns:
        The attention. A row whose mask lets it see nothing is 0, and so is its derivative.

    Raises:
        InvalidInputError: if shapes, dtypes, devices or settings do not go together.

    Where nothing is differentiated this is torch's own function. Otherwise short sequences take
    plain operations, and long ones (2²⁰ scores on a CPU, 2²⁸ on a GPU) blocks of rows, whose
    memory grows with the length and not with its square. Third derivatives of the latter are taken
    of plain operations again. With dropout, plain
    operations draw the same random numbers as torch's math kernel, and blocks draw one number, from
    which all others follow; both only depend on torch's random state.

    Example:
        With one key, attention is the identity of the value: no derivative with respect to the
        query.

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
    if attn_mask is not None and type(attn_mask) not in (Tensor, torch.nn.Parameter):
        attn_mask, is_causal = _written_out(attn_mask, is_causal, query.device)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (_lowered(x, device) for x in (query, key, value))
        attn_mask = None if attn_mask is None else _lowered(attn_mask, device)
    _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if query.is_nested or not (
        dropout_p or twice.may_be_differentiated(query, key, value, attn_mask)
    ):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = (_one_per_head(x, query.shape[-3]) for x in (key, value))
    with torch.autocast(device, enabled=False):
        return attend(
            query,
            key,
            value,
            attn_mask,
            scale=scale,
            is_causal=is_causal,
            dropout_p=dropout_p,
            blocks=_by_blocks(query, key, dropout_p),
        )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    blocks: bool,
) -> Tensor:
    """Compute attention by blocks or by plain operations; leading dimensions broadcast.

    Half precision is computed in float32. Neither the value nor the random numbers depend on what
    is differentiated.
    """
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    scale = (query.shape[-1] or 1) ** -0.5 if scale is None else scale
    if not blocks:
        drop = (lambda w: torch.dropout(w, dropout_p, True)) if dropout_p else (lambda w: w)
        return composite(query, key, value, mask, scale, is_causal, drop).to(dtype)
    batch = torch.broadcast_shapes(
        query.shape[:-2],
        key.shape[:-2],
        value.shape[:-2],
        mask.shape[:-2] if mask is not None else (),
    )
    query, key, value = (x.expand(*batch, *x.shape[-2:]) for x in (query, key, value))
    if mask is not None:
        mask = mask[(None,) * (len(batch) + 2 - mask.ndim)]
    seed = int(torch.randint(2**62, (), device="cpu")) if dropout_p else 0
    function = Blockwise(float(scale), is_causal, float(dropout_p), seed)
    if mask is not None and torch_private.has_derivative(mask):
        (out,) = twice.evaluate(function, (query, key, value, mask))
    else:
        (out,) = twice.evaluate(function, (query, key, value), (mask,))
    # A copy, because the function keeps its output, and users may edit theirs in place.
    return out.to(dtype, copy=True)


def _by_blocks(query: Tensor, key: Tensor, dropout_p: float) -> bool:
    """True if attention goes by blocks here.

    Blocks know no tangent of a tangent, and draw random numbers by rules that ``vmap`` forbids.
    """
    if mode() is Mode.COMPILING or not takes_blocks(query, key):
        return False
    return torch_private.jvp_levels() < 2 and not (dropout_p and torch_private.inside_vmap())


def _written_out(mask: Tensor, is_causal: bool, device: torch.device) -> tuple[Tensor | None, bool]:
    """Return ``(attn_mask, is_causal)`` for a mask that may be a ``CausalBias``.

    As a tensor a ``CausalBias`` is unwritten memory; only its variant and its sizes count.
    """
    # Imported here, because it brings in half of torch.compile. Who has such a mask has it already.
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(mask, CausalBias):
        return mask, is_causal
    if is_causal:
        raise InvalidInputError(
            "attn_mask is a CausalBias, and is_causal=True was given too: leave is_causal out"
        )
    if mask.variant == CausalVariant.UPPER_LEFT or mask.seq_len_q == mask.seq_len_kv:
        return None, True
    ones = torch.ones(mask.seq_len_q, mask.seq_len_kv, dtype=torch.bool, device=device)
    return ones.tril(mask.seq_len_kv - mask.seq_len_q), False


def _lowered(x: Tensor, device: str) -> Tensor:
    """Cast as autocast does for torch's own: double precision and booleans stay."""
    lowered = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if lowered else x


def _one_per_head(x: Tensor, heads: int) -> Tensor:
    """Repeat each head for all query heads that it serves."""
    return (
        x.unsqueeze(-3).expand(*x.shape[:-2], heads // x.shape[-3], *x.shape[-2:]).flatten(-4, -3)
    )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    """Raise for what torch refuses, and for what it would fail on later."""
    if query.is_nested:
        return
    q, k, v = (tuple(x.shape) for x in (query, key, value))
    shapes = f"query {q}, key {k}, value {v}"
    if min(map(len, (q, k, v))) < 2:
        raise InvalidInputError(
            f"{shapes}: each needs two dimensions at least, (length, features); write x[None] for "
            "one position"
        )
    if q[-1] != k[-1]:
        raise InvalidInputError(
            f"{shapes}: query and key have {q[-1]} and {k[-1]} features; their last dimensions "
            "must be equal"
        )
    if k[-2] != v[-2]:
        raise InvalidInputError(
            f"{shapes}: {k[-2]} keys and {v[-2]} values; there must be one value for each key"
        )
    dtypes = {query.dtype, key.dtype, value.dtype}
    if not query.is_floating_point() or len(dtypes) > 1:
        raise InvalidInputError(
            f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype}; pass one "
            "floating-point dtype, as in key.to(query.dtype)"
        )
    if not 0 <= dropout_p <= 1:
        raise InvalidInputError(
            f"dropout_p={dropout_p} is not a probability; pass a number from 0 to 1"
        )
    if enable_gqa:
        if min(map(len, (q, k, v))) < 3 or q[-3] % k[-3] or q[-3] % v[-3]:
            raise InvalidInputError(
                f"{shapes}: with enable_gqa the number of heads of key and value (dimension -3) "
                "must divide that of the query"
            )
        k, v = (*k[:-3], q[-3], *k[-2:]), (*v[:-3], q[-3], *v[-2:])
    batch = _broadcast(shapes, q[:-2], k[:-2], v[:-2])
    if mask is None:
        return
    if is_causal:
        raise InvalidInputError(
            "attn_mask and is_causal=True were both given; pass one mask: attn_mask & "
            "torch.ones(l, s, dtype=torch.bool).tril()"
        )
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise InvalidInputError(
            f"attn_mask is {mask.dtype}; pass a boolean mask (True takes part) or one to add, as "
            "in attn_mask.to(query.dtype)"
        )
    scores = (*batch, q[-2], k[-2])
    if (
        _broadcast(f"attn_mask {tuple(mask.shape)}, scores {scores}", tuple(mask.shape), scores)
        != scores
    ):
        raise InvalidInputError(
            f"attn_mask {tuple(mask.shape)} has more dimensions than the scores {scores}; it must "
            "broadcast to them"
        )


def _broadcast(what: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError as error:
        raise InvalidInputError(
            f"{what}: these do not broadcast; make the sizes equal, or 1"
        ) from error
