"""Gradients times a number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from innerloop._types import Grads, Hyper, Params
from innerloop.errors import InvalidInputError
from innerloop.optim._settings import numbers, require
from innerloop.optim._transforms.base import Transform, each, value_of


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Scale(Transform):
    r"""Multiply the gradients.

    .. math:: g' = c\, g

    Args:
        factor: :math:`c`, of any sign; may be a tensor, or a mapping from parameter names.

    Example:
        >>> import torch, innerloop
        >>> opt = innerloop.optim.chain(innerloop.optim.scale(2.0), innerloop.optim.sgd(lr=1.0))
        >>> params = {"w": torch.tensor(5.0)}
        >>> opt.update({"w": torch.tensor(1.0)}, opt.init(params), params)[0]
        {'w': tensor(3.)}
    """

    factor: Hyper

    name: ClassVar = "scale"
    hyper_names: ClassVar = ("factor",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        factor = hyper["factor"]
        if not isinstance(factor, (int, float, Tensor, Mapping)):
            raise InvalidInputError(f"scale: factor={factor!r}: write a number or a 0-dim tensor")
        for value in numbers(factor):
            require(value == value, f"scale: factor={value} is not a number")

    def apply(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], Any]:
        return each(
            grads, lambda name, g: g * value_of(hyper["factor"], "scale.factor", name, g)
        ), state


scale = Scale
