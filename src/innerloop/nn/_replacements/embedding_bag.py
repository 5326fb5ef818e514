"""Embeddings, and sums, means and maxima of bags of them, with all derivatives."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from innerloop._utils import inner_pass, torch_private
from innerloop._utils.execution import Mode, may_read_values, mode
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.nn._derivative_order import Args, Kwargs

BY_FREQUENCY = (
    "divides the gradient by counts, so that it is not the derivative of what is computed, and the "
    "derivative of training does not follow from it. Leave it out inside the loop, and divide the "
    "gradient: loop.step(loss, grad_callback=...)"
)
RENORMALISED = (
    "rescales rows of the weight in place, which autograd does not see, so that a derivative of "
    "training would leave it out. Rescale them in the loss, where it is differentiated: "
    "weight * (max_norm / weight.norm(dim=1, keepdim=True).clamp_min(max_norm))"
)


def check_max_norm(name: str, weight: object, max_norm: object) -> None:
    """Raise if ``max_norm`` is given for a weight that is learned.

    A weight that is not learned gives rescaled rows, and is left as it is.
    """
    if max_norm is not None and (
        mode() is Mode.COMPILING
        or (isinstance(weight, Tensor) and torch_private.has_derivative(weight))
    ):
        raise NotDifferentiableError(f"{name}(max_norm={max_norm}) {RENORMALISED}")


def embedding(
    input: Int[Tensor, "*shape"],
    weight: Float[Tensor, "rows features"],
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Float[Tensor, "*shape features"]:
    """Compute ``F.embedding`` without what PyTorch hides from its own derivatives.

    That is refused, or for a constant weight computed without writing into it.
    """
    if scale_grad_by_freq:
        raise NotDifferentiableError(f"F.embedding(scale_grad_by_freq=True) {BY_FREQUENCY}")
    check_max_norm("F.embedding", weight, max_norm)
    return _rescaled(F.embedding(input, weight, padding_idx, sparse=sparse), max_norm, norm_type)


def _rescaled(rows: Tensor, max_norm: float | None, norm_type: float) -> Tensor:
    """Limit the norm of rows, with the bits of ``torch.embedding_renorm_``, which would write."""
    if max_norm is None:
        return rows
    norm = torch.linalg.vector_norm(rows, norm_type, -1, keepdim=True)
    return torch.where(norm > max_norm, rows * (max_norm / (norm + 1e-7)), rows)


def embedding_bag(
    input: Shaped[Tensor, "..."],
    weight: Shaped[Tensor, "..."],
    offsets: Int[Tensor, " starts"] | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: Literal["sum", "mean", "max"] = "mean",
    sparse: bool = False,
    per_sample_weights: Float[Tensor, "..."] | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Float[Tensor, "bags features"]:
    r"""Compute ``F.embedding_bag``, which in PyTorch has no second derivative and no forward mode.

    .. math::
        y_b = \sum_{i \in b} s_i\, w_{x_i}, \quad \frac{1}{|b|} \sum_{i \in b} w_{x_i}
        \quad\text{or}\quad \max_{i \in b} w_{x_i}

    Args, Returns: as for ``torch.nn.functional.embedding_bag``. Memory grows with the number of
    indices, not of bags.

    Example:
        >>> import torch
        >>> from innerloop.nn.functional import embedding_bag
        >>> embedding_bag(
        ...     torch.tensor([0, 1, 2]), torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 2])
        ... )
        tensor([[2.],
                [5.]])
    """
    # Until PyTorch 0.4 these two came in the other order.
    swapped = input.is_floating_point() and weight.dtype == torch.long
    indices, weight = (weight, input) if swapped else (input, weight)
    _check(indices, weight, offsets, mode, per_sample_weights, include_last_offset, padding_idx)
    if scale_grad_by_freq:
        raise NotDifferentiableError(f"F.embedding_bag(scale_grad_by_freq=True) {BY_FREQUENCY}")
    check_max_norm("F.embedding_bag", weight, max_norm)
    flat, bag, bags = _membership(indices, offsets, include_last_offset)
    rows = _rescaled(F.embedding(flat, weight, sparse=sparse), max_norm, norm_type)
    counted = torch.ones_like(flat, dtype=torch.bool)
    if padding_idx is not None:
        counted = flat != (padding_idx if padding_idx >= 0 else weight.shape[0] + padding_idx)
    if mode == "max":
        return _maxima(rows, bag, bags, counted)
    rows = torch.where(counted[:, None], rows, torch.zeros_like(rows))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    total = rows.new_zeros(bags, rows.shape[1]).index_add(0, bag, rows)
    if mode == "sum":
        return total
    count = rows.new_zeros(bags).index_add(0, bag, counted.to(rows.dtype))
    return total / count.clamp_min(1)[:, None]


def by_frequency_or_norm(args: Args, kwargs: Kwargs) -> bool:
    """True if ``F.embedding`` divides gradients by counts, or rescales its weight."""
    by_norm = kwargs.get("max_norm", args[3] if len(args) > 3 else None) is not None
    return by_norm or bool(kwargs.get("scale_grad_by_freq", args[5] if len(args) > 5 else False))


def pads(args: Args, kwargs: Kwargs) -> bool:
    """True if ``F.embedding`` gives one row no gradient, and does nothing else besides."""
    padding = kwargs.get("padding_idx", args[2] if len(args) > 2 else None)
    return padding is not None and not by_frequency_or_norm(args, kwargs)


def padded_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Compute ``F.embedding`` with a row that a step of training gives no gradient.

    The loss depends on that row all the same, so the outer derivative has to pass through it:
    PyTorch's own drops that part without an error.
    """
    out = F.embedding(input, weight, sparse=sparse)
    if not out.requires_grad or (mode() is Mode.TRANSFORMED and not torch_private.is_tracked(out)):
        return F.embedding(input, weight, padding_idx, sparse=sparse)
    inner_pass.check_symmetric(f"F.embedding with padding_idx={padding_idx}")
    padded = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    out.register_hook(inner_pass.InnerHook(lambda g: g.masked_fill(padded, 0)))
    return out


def bag_of_constant_norm(args: Args, kwargs: Kwargs) -> bool:
    """Return True, or raise if a learned weight is to be rescaled, even under `keep_kernels`."""
    names = ("input", "weight", "offsets", "max_norm")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    check_max_norm("F.embedding_bag", given["weight"], given.get("max_norm"))
    return True


def _check(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    mode: str,
    weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> None:
    """Raise for what torch refuses, and for offsets that decrease, which torch accepts."""
    if mode not in ("sum", "mean", "max"):
        raise InvalidInputError(f'mode={mode!r}: write "sum", "mean" or "max"')
    if weight.dim() != 2:
        raise InvalidInputError(
            f"weight {tuple(weight.shape)} must have two dimensions, one row for each embedding"
        )
    if (offsets is None) != (input.dim() == 2):
        raise InvalidInputError(
            "a two-dimensional input has one bag per row and no offsets; a one-dimensional input "
            "needs offsets"
        )
    if weights is not None and (mode != "sum" or weights.shape != input.shape):
        raise InvalidInputError('per_sample_weights needs the shape of input, and mode="sum"')
    if weights is not None and weights.dtype != weight.dtype:
        raise InvalidInputError(
            f"per_sample_weights are {weights.dtype}, weight is {weight.dtype}; write "
            "per_sample_weights.to(weight.dtype)"
        )
    count = weight.shape[0]
    if padding_idx is not None and not -count <= padding_idx < count:
        raise InvalidInputError(
            f"padding_idx={padding_idx} is not one of the {count} rows; pass a number from "
            f"{-count} to {count - 1}"
        )
    if offsets is not None and may_read_values(offsets):
        _check_offsets(offsets.tolist(), input.shape[0], include_last_offset)


def _check_offsets(starts: list[int], length: int, include_last_offset: bool) -> None:
    if include_last_offset and not starts:
        raise InvalidInputError(
            "offsets is empty; with include_last_offset it ends with the length of input"
        )
    if starts and (starts[0] != 0 or starts != sorted(starts) or starts[-1] > length):
        raise InvalidInputError(
            f"offsets={starts} must say where the bags begin among {length} indices: start with "
            f"0, never decrease, and end at {length} at the latest"
        )


def _membership(
    input: Tensor, offsets: Tensor | None, include_last_offset: bool
) -> tuple[Tensor, Tensor, int]:
    """Return the indices in one row, the bag of each, and the number of bags."""
    flat = input.reshape(-1)
    places = torch.arange(flat.shape[0], device=flat.device)
    if offsets is None:
        return flat, places // max(1, input.shape[1]), input.shape[0]
    starts = offsets[:-1] if include_last_offset else offsets
    return flat, torch.bucketize(places, starts.to(places.dtype), right=True) - 1, starts.shape[0]


def _maxima(rows: Tensor, bag: Tensor, bags: int, counted: Tensor) -> Tensor:
    """Take the largest entry of each bag from the first row that has it; 0 for an empty bag."""
    count, features = rows.shape
    where = bag[:, None].expand(count, features)
    low = torch.where(counted[:, None], rows.detach(), torch.full_like(rows, -torch.inf))
    largest = low.new_full((bags, features), -torch.inf).scatter_reduce(0, where, low, "amax")
    numbers = torch.arange(count, device=rows.device)[:, None].expand(count, features)
    candidates = torch.where((low == largest[bag]) & counted[:, None], numbers, count)
    first = numbers.new_full((bags, features), count).scatter_reduce(0, where, candidates, "amin")
    return torch.cat([rows, rows.new_zeros(1, features)]).gather(0, first)
