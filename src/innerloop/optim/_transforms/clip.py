"""Clipping: gradients that are too long are shortened."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from innerloop._types import Grads, Hyper, Params
from innerloop.errors import InvalidInputError
from innerloop.optim._engine.numerics import safe_sqrt
from innerloop.optim._engine.packing import FLAT_LIMIT
from innerloop.optim._transforms.base import Transform, each, one_value, value_of


class _ByNorm(Transform):
    """What clipping by a norm has in common."""

    max_norm: Hyper
    norm_type: float

    def __post_init__(self) -> None:
        super().__post_init__()
        p = self.norm_type
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not p > 0:
            raise InvalidInputError(
                f"{self.name}: norm_type={p!r} is no norm: write a positive number, 2.0, or "
                "float('inf')"
            )
        self.validate(self.resolve(None))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ClipByGlobalNorm(_ByNorm):
    r"""Scale all gradients together so that their joint norm is at most ``max_norm``.

    .. math:: g' = \min\left(1, \frac{c}{\lVert g \rVert_p + 10^{-6}}\right) g

    as ``torch.nn.utils.clip_grad_norm_`` does (Pascanu et al., "On the difficulty of training
    recurrent neural networks", 2013). The derivative of the norm is taken as 0 where all gradients
    are exactly 0.

    Args:
        max_norm: :math:`c`; may be a tensor.
        norm_type: :math:`p`, up to ``float("inf")``.

    Raises:
        InvalidInputError: a negative ``max_norm``, or a ``norm_type`` that is not positive.

    Example:
        (3, 4) has the norm 5.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.chain(
        ...     innerloop.optim.clip_by_global_norm(1.0), innerloop.optim.sgd(lr=1.0)
        ... )
        >>> params = {"a": torch.tensor(0.0), "b": torch.tensor(0.0)}
        >>> opt.update({"a": torch.tensor(3.0), "b": torch.tensor(4.0)}, opt.init(params), params)[
        ...     0
        ... ]
        {'a': tensor(-0.6000), 'b': tensor(-0.8000)}
    """

    max_norm: Hyper
    norm_type: float = 2.0

    name: ClassVar = "clip_by_global_norm"
    hyper_names: ClassVar = ("max_norm",)

    def apply(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], Any]:
        present = [g for g in grads.values() if g is not None]
        if not present:
            return dict(grads), state
        max_norm = one_value(hyper["max_norm"], f"{self.name}.max_norm")
        factor = torch.clamp(max_norm / (norm(present, self.norm_type) + 1e-6), max=1.0)
        return each(grads, lambda _, g: g * factor.to(device=g.device)), state


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ClipPerParameter(_ByNorm):
    r"""Scale each parameter's gradient by itself so that its norm is at most ``max_norm``.

    .. math:: g_i' = \min\left(1, \frac{c}{\lVert g_i \rVert_p + 10^{-6}}\right) g_i

    ``torch.nn.utils.clip_grad_norm_``, called for one parameter after the other.

    Args:
        max_norm: :math:`c`; may be a tensor, or a mapping from parameter names.
        norm_type: :math:`p`, up to ``float("inf")``.

    Raises:
        InvalidInputError: a negative ``max_norm``, or a ``norm_type`` that is not positive.

    Example:
        >>> import torch, innerloop
        >>> opt = innerloop.optim.chain(
        ...     innerloop.optim.clip_per_parameter(1.0), innerloop.optim.sgd(lr=1.0)
        ... )
        >>> params = {"a": torch.tensor(0.0), "b": torch.tensor(0.0)}
        >>> opt.update({"a": torch.tensor(0.5), "b": torch.tensor(4.0)}, opt.init(params), params)[
        ...     0
        ... ]
        {'a': tensor(-0.5000), 'b': tensor(-1.0000)}
    """

    max_norm: Hyper
    norm_type: float = 2.0

    name: ClassVar = "clip_per_parameter"
    hyper_names: ClassVar = ("max_norm",)

    def apply(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], Any]:
        def clipped(name: str, g: Tensor) -> Tensor:
            max_norm = value_of(hyper["max_norm"], f"{self.name}.max_norm", name)
            return g * torch.clamp(max_norm / (norm([g], self.norm_type) + 1e-6), max=1.0)

        return each(grads, clipped), state


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ClipByValue(Transform):
    r"""Clamp every entry of the gradients.

    .. math:: g' = \min(\max(g, -c), c)

    as ``torch.nn.utils.clip_grad_value_`` does. Where an entry is clamped its derivative is 0, and
    that of the limit is its sign.

    Args:
        limit: :math:`c`; may be a tensor, or a mapping from parameter names.

    Raises:
        InvalidInputError: a negative ``limit``, or a complex gradient, which has no order.

    Example:
        >>> import torch, innerloop
        >>> opt = innerloop.optim.chain(
        ...     innerloop.optim.clip_by_value(1.0), innerloop.optim.sgd(lr=1.0)
        ... )
        >>> params = {"w": torch.zeros(3)}
        >>> opt.update({"w": torch.tensor([-7.0, 0.5, 2.0])}, opt.init(params), params)[0]
        {'w': tensor([ 1.0000, -0.5000, -1.0000])}
    """

    limit: Hyper

    name: ClassVar = "clip_by_value"
    hyper_names: ClassVar = ("limit",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate(self.resolve(None))

    def apply(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], Any]:
        def clipped(name: str, g: Tensor) -> Tensor:
            if g.is_complex():
                raise InvalidInputError(
                    f"{self.name}: the gradient of {name!r} is complex, and complex numbers have "
                    "no order: write "
                    "clip_by_global_norm or clip_per_parameter"
                )
            limit = value_of(hyper["limit"], f"{self.name}.limit", name)
            if not isinstance(limit, Tensor):
                return torch.clamp(g, -limit, limit)
            return torch.minimum(torch.maximum(g, -limit.to(g)), limit.to(g))

        return each(grads, clipped), state


clip_by_global_norm = ClipByGlobalNorm
clip_per_parameter = ClipPerParameter
clip_by_value = ClipByValue


def norm(tensors: Sequence[Tensor], p: float = 2.0) -> Tensor:
    r"""Compute the joint norm :math:`(\sum_i |x_i|^p)^{1/p}` of all entries.

    Its derivative is 0, not NaN, where all of them are 0.

    Not from the norms of the single tensors, as torch computes it: the derivative of *those* is
    lost for a tensor that is exactly zero beside others (behind a layer that starts at zero, say),
    and with it the second derivative of the whole.
    """
    parts = [torch.view_as_real(x) if x.is_complex() else x for x in tensors]
    first = parts[0]
    dtype = torch.promote_types(
        first.dtype, torch.float32
    )  # the square of 300 does not fit into float16
    for x in parts[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    parts = [x.to(device=first.device, dtype=dtype) for x in parts]
    if p == float("inf"):
        largest = [x.abs().amax() for x in parts if x.numel()]
        return torch.stack(largest).amax() if largest else first.new_zeros((), dtype=dtype)
    small = [x.reshape(-1) for x in parts if x.numel() <= FLAT_LIMIT]
    pieces = [x for x in parts if x.numel() > FLAT_LIMIT] + ([torch.cat(small)] if small else [])
    total = torch.stack([_powers(x, p).sum() for x in pieces]).sum()
    if p == 1:
        return total
    return safe_sqrt(total) if p == 2 else total.clamp_min(torch.finfo(dtype).tiny) ** (1 / p)


def _powers(x: Tensor, p: float) -> Tensor:
    if p == 2:
        return x * x
    if p == 1:
        return x.abs()
    zero = x == 0  # for p < 2 the power has no second derivative there, for p < 1 no first
    return (x.abs().masked_fill(zero, 1) ** p).masked_fill(zero, 0)
