"""One step of the rule for several gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Grads, Params
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.optim._transforms.base import Transform


class AccumulateState(NamedTuple):
    """Gradients since the rule's last step: how many, their sum, and who has had any."""

    count: Any
    total: dict[str, Tensor]
    seen: dict[str, bool]


# A carry can be loaded by torch.load with its default, weights_only=True.
torch.serialization.add_safe_globals([AccumulateState])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Accumulate(Transform):
    r"""Hand on the mean of every ``every`` gradients, and nothing in between.

    .. math::
        g_t' = \frac{1}{k} \sum_{i=0}^{k-1} g_{t-i} \quad
        \text{if } k \text{ divides } t, \text{ else None}

    Between, the rule is handed None for every parameter, so parameters and its state stay as they
    are. What stands before it in the chain sees every gradient, what stands after it the means. A
    parameter without gradient counts as 0, unless it never had one; a call without any gradient is
    not counted.

    Args:
        every: :math:`k`.

    Raises:
        InvalidInputError: ``every`` is not a positive integer.
        NotDifferentiableError: in steps that are compiled one by one, where the count is a tensor.

    Example:
        >>> import torch, innerloop
        >>> opt = innerloop.optim.chain(innerloop.optim.accumulate(2), innerloop.optim.sgd(lr=1.0))
        >>> params, state = {"w": torch.tensor(0.0)}, opt.init({"w": torch.tensor(0.0)})
        >>> for g in (1.0, 3.0, 5.0, 7.0):
        ...     params, state = opt.update({"w": torch.tensor(g)}, state, params)
        ...     print(params["w"].item())
        0.0
        -2.0
        -2.0
        -8.0
    """

    every: int

    name: ClassVar = "accumulate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.every) is not int or self.every < 1:
            raise InvalidInputError(
                f"accumulate: every={self.every!r}: write a positive integer, accumulate(4)"
            )

    def init(self, params: Params) -> AccumulateState:
        return AccumulateState(0, _zeros(params), dict.fromkeys(params, False))

    def apply(
        self, grads: Grads, state: AccumulateState, params: Params, hyper: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], AccumulateState]:
        if isinstance(state.count, Tensor):
            raise NotDifferentiableError(
                "accumulate in steps that are compiled one by one: whether the rule runs depends "
                "on a count, which is a tensor there. "
                "Write Checkpointed(compile=False), or metagradient(..., compile=True), which "
                "compiles the whole loop"
            )
        if missing := [name for name in params if name not in state.total]:
            raise InvalidInputError(
                f"the state knows no parameter {missing}: it belongs to other parameters"
            )
        if all(g is None for g in grads.values()):
            return dict(grads), state
        total = {n: _plus(s, grads[n]) for n, s in state.total.items()}
        seen = {n: had or grads[n] is not None for n, had in state.seen.items()}
        if state.count + 1 < self.every:
            return dict.fromkeys(grads), AccumulateState(state.count + 1, total, seen)
        mean = {n: total[n] / self.every if seen[n] else None for n in grads}
        return mean, AccumulateState(0, _zeros(params), dict.fromkeys(seen, False))


accumulate = Accumulate


def _zeros(params: Params) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in params.items()}


def _plus(total: Tensor, g: Tensor | None) -> Tensor:
    return total if g is None else total + g
