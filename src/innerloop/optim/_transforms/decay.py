"""Weight decay with a mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor

from innerloop._types import Grads, Hyper, Params
from innerloop.errors import InvalidInputError
from innerloop.optim._engine.numerics import add_scaled
from innerloop.optim._settings import is_active
from innerloop.optim._transforms.base import Transform, each, value_of

Mask = str | Sequence[str] | Callable[[str, Tensor], bool]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AddDecayedWeights(Transform):
    r"""Add :math:`\lambda \theta` to the gradients of chosen parameters: weight decay with a mask.

    .. math:: g_i' = g_i + \lambda\, \theta_i \quad \text{for } i \text{ in the mask}

    In front of a rule it is its ``weight_decay``, with the parameters chosen by name; after
    `clip_by_global_norm` it is not clipped. (AdamW's decoupled decay is none of the gradient: write
    ``groups`` of two ``adamw``.)

    Args:
        weight_decay: :math:`\lambda`; may be a tensor, or a mapping from parameter names.
        mask: which parameters decay: a pattern (``"*.weight"``) or several, or a function
            ``mask(name, param) -> bool``; default all.

    Raises:
        InvalidInputError: a negative ``weight_decay``, or a pattern that matches no parameter (in
            `init`).

    Example:
        >>> import torch, innerloop
        >>> decay = innerloop.optim.add_decayed_weights(0.5, mask=lambda name, p: p.ndim > 0)
        >>> opt = innerloop.optim.chain(decay, innerloop.optim.sgd(lr=1.0))
        >>> params = {"weight": torch.tensor([8.0]), "bias": torch.tensor(8.0)}
        >>> opt.update(
        ...     {name: torch.zeros_like(p) for name, p in params.items()}, opt.init(params), params
        ... )[0]
        {'weight': tensor([4.]), 'bias': tensor(8.)}
    """

    weight_decay: Hyper
    mask: Mask | None = None

    name: ClassVar = "add_decayed_weights"
    hyper_names: ClassVar = ("weight_decay",)

    def __post_init__(self) -> None:
        super().__post_init__()
        mask = self.mask
        listed = isinstance(mask, Sequence) and all(isinstance(pattern, str) for pattern in mask)
        if mask is not None and not listed and not callable(mask):
            raise InvalidInputError(
                f'add_decayed_weights: mask={mask!r}: write a pattern, "*.weight", a list of '
                "patterns, or a function "
                "mask(name, param) -> bool"
            )
        self.validate(self.resolve(None))

    def init(self, params: Params) -> Any:
        for pattern in self._patterns():
            if not any(fnmatchcase(name, pattern) for name in params):
                raise InvalidInputError(
                    f"add_decayed_weights: the pattern {pattern!r} matches no parameter; they are "
                    f"{list(params)}"
                )
        return ()

    def apply(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], Any]:
        def decayed(name: str, g: Tensor) -> Tensor:
            decay = value_of(hyper["weight_decay"], f"{self.name}.weight_decay", name, g)
            return add_scaled(g, params[name], decay) if is_active(decay) else g

        return each(
            grads, lambda name, g: decayed(name, g) if self._chosen(name, params[name]) else g
        ), state

    def _patterns(self) -> tuple[str, ...]:
        if self.mask is None or callable(self.mask):
            return ()
        return (self.mask,) if isinstance(self.mask, str) else tuple(self.mask)

    def _chosen(self, name: str, param: Tensor) -> bool:
        if callable(self.mask):
            return bool(self.mask(name, param))
        return self.mask is None or any(fnmatchcase(name, pattern) for pattern in self._patterns())


add_decayed_weights = AddDecayedWeights
