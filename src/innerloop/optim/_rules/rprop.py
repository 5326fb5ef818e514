"""Resilient backpropagation (Riedmiller & Braun 1993)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Hyper
from innerloop.optim._engine.elementwise import Elementwise
from innerloop.optim._engine.numerics import at_first_step
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_nonnegative, numbers, require


class RpropState(NamedTuple):
    """Steps taken, the last gradient (0 where its sign changed), each element's step size."""

    count: Any
    prev: Any
    step_size: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Rprop(Elementwise):
    r"""Steps of adapted size along the sign of the gradient.

    .. math::
        s_t = \mathrm{clip}\bigl(s_{t-1} \cdot \{\eta^+ \text{ if } g_t g_{t-1} > 0,\
        \eta^- \text{ if } < 0,\ 1 \text{ else}\}\bigr),
        \qquad \theta_t = \theta_{t-1} - s_t\, \mathrm{sign}(g_t),

    where :math:`g_t` is set to 0 if the sign has changed. The parameters depend on the gradients
    through their signs only, so the derivative with respect to the initial parameters is the
    identity path; that with respect to lr, the factors and the bounds is that of the step sizes.

    Args:
        lr: the first step size; as an override it counts at the first step.
        etas: :math:`(\eta^-, \eta^+)`.
        step_sizes: smallest and largest step size.
        capturable: accepted as in ``torch.optim``; chooses no other result, so it is ignored.
            Likewise ``foreach`` and ``differentiable``.
        maximize: ascend instead of descend.

    Example:
        >>> import torch, innerloop
        >>> opt = innerloop.optim.rprop()
        >>> def one_step(lr):
        ...     params = {"p": torch.tensor(2.0)}
        ...     return opt.update({"p": params["p"] ** 3}, opt.init(params), params, {"lr": lr})[0][
        ...         "p"
        ...     ]
        >>> torch.func.grad(one_step)(torch.tensor(0.1))
        tensor(-1.)
    """

    lr: Hyper = 1e-2
    etas: tuple[Hyper, Hyper] = (0.5, 1.2)
    step_sizes: tuple[Hyper, Hyper] = (1e-6, 50.0)
    _: dataclasses.KW_ONLY
    capturable: bool = dataclasses.field(default=False, repr=False)
    foreach: bool | None = dataclasses.field(default=None, repr=False)
    maximize: bool = False
    differentiable: bool = dataclasses.field(default=False, repr=False)

    hyper_names: ClassVar = ("lr", "etas", "step_sizes")
    state_type: ClassVar = RpropState
    torch_layout: ClassVar = TorchLayout(
        torch.optim.Rprop, {"prev": "prev", "step_size": "step_size"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("etas", "step_sizes"):
            value = getattr(self, name)
            require(
                isinstance(value, (tuple, list)) and len(value) == 2,
                f"{name}={value!r}: write a pair",
            )
            object.__setattr__(self, name, tuple(value))
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        check_nonnegative(hyper, "lr")
        low, high = hyper["etas"]
        for value in numbers(low):
            require(0 < value < 1, f"etas[0]={value} must be between 0 and 1")
        for value in numbers(high):
            require(value > 1, f"etas[1]={value} must be larger than 1")

    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("prev", "step_size")

    def step(
        self, grad: Tensor, param: Tensor, state: RpropState, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, RpropState]:
        (shrink, grow), (least, most) = hyper["etas"], hyper["step_sizes"]
        grad = -grad if self.maximize else grad
        product = grad * state.prev
        ones = torch.ones_like(param)
        factor = torch.where(
            product > 0, ones * grow, torch.where(product < 0, ones * shrink, ones)
        )
        size = at_first_step(state.count, hyper["lr"], state.step_size) * factor
        size = torch.minimum(torch.maximum(size, ones * least), ones * most)
        grad = torch.where(product < 0, torch.zeros_like(grad), grad)
        return param - grad.sign() * size, RpropState(state.count, grad, size)


rprop = Rprop
