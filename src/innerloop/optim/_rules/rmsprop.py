"""RMSprop (Tieleman & Hinton, lecture 6.5, 2012), centered as in Graves (2013)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Hyper
from innerloop.optim._engine.elementwise import Elementwise
from innerloop.optim._engine.numerics import add_scaled, average, average_of_squares, root_of
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_nonnegative, is_active, kept


class RMSpropState(NamedTuple):
    """Steps taken, averages of squares and (``centered``) of gradients, the momentum buffer."""

    count: Any
    square_avg: Any
    grad_avg: Any
    momentum_buffer: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RMSprop(Elementwise):
    r"""Divide by the root of a running average of squares.

    .. math::
        v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \quad
        d_t = \sqrt{v_t - \bar g_t^2 \text{ if centered}} + \epsilon, \quad
        b_t = \mu b_{t-1} + g_t / d_t, \quad
        \theta_t = \theta_{t-1} - \eta\, b_t.

    The derivative of the root is taken as 0 where its argument is 0.

    Args:
        lr: step size :math:`\eta`.
        alpha: smoothing :math:`\alpha`.
        eps: :math:`\epsilon`.
        weight_decay: times the parameter, added to the gradient.
        momentum: :math:`\mu`; the number 0 switches the buffer off.
        centered: subtract the square of the average gradient :math:`\bar g_t = \alpha \bar g_{t-1}
            + (1 - \alpha) g_t`.
        maximize: ascend instead of descend.
        capturable: accepted as in ``torch.optim``; chooses no other result, so it is ignored.
            Likewise ``foreach`` and ``differentiable``.
        eps_root: added inside the root, not in ``torch.optim``: with a positive one the update is
            smooth where the gradient is zero, and so are its hyper- and second-order gradients.

    Example:
        At the first step, v₁ = (1-α) g²: a move of lr/√(1-α) wherever it starts, so d p₁/d lr =
        -1/√(1-α) = -2.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.rmsprop(alpha=0.75, eps=0.0)
        >>> def one_step(lr):
        ...     params = {"p": torch.tensor(2.0)}
        ...     return opt.update({"p": params["p"] ** 3}, opt.init(params), params, {"lr": lr})[0][
        ...         "p"
        ...     ]
        >>> torch.func.grad(one_step)(torch.tensor(0.1))
        tensor(-2.)
    """

    lr: Hyper = 1e-2
    alpha: Hyper = 0.99
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    momentum: Hyper = 0.0
    centered: bool = False
    capturable: bool = dataclasses.field(default=False, repr=False)
    foreach: bool | None = dataclasses.field(default=None, repr=False)
    maximize: bool = False
    differentiable: bool = dataclasses.field(default=False, repr=False)
    _: dataclasses.KW_ONLY
    eps_root: Hyper = 0.0

    hyper_names: ClassVar = ("lr", "alpha", "eps", "weight_decay", "momentum", "eps_root")
    state_type: ClassVar = RMSpropState
    torch_layout: ClassVar = TorchLayout(
        torch.optim.RMSprop,
        {
            "square_avg": "square_avg",
            "grad_avg": "grad_avg",
            "momentum_buffer": "momentum_buffer",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        check_nonnegative(hyper, *self.hyper_names)

    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        momentum = ("momentum_buffer",) if is_active(hyper["momentum"]) else ()
        return ("square_avg", *(("grad_avg",) if self.centered else ()), *momentum)

    def step(
        self, grad: Tensor, param: Tensor, state: RMSpropState, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, RMSpropState]:
        lr, alpha, eps, momentum = hyper["lr"], hyper["alpha"], hyper["eps"], hyper["momentum"]
        grad = -grad if self.maximize else grad
        if is_active(hyper["weight_decay"]):
            grad = add_scaled(grad, param, hyper["weight_decay"])
        square_avg = average_of_squares(state.square_avg, grad, alpha)
        grad_avg, variance = state.grad_avg, square_avg
        if self.centered:
            before = kept(grad_avg, "centered", grad, state.count)
            grad_avg = average(before, grad, alpha)
            variance = torch.addcmul(square_avg, grad_avg, grad_avg, value=-1)
        denominator = root_of(variance, eps, hyper["eps_root"]) + eps
        buffer = state.momentum_buffer
        if is_active(momentum):
            buffer = (
                grad / denominator
                if buffer is None
                else torch.addcdiv(buffer * momentum, grad, denominator)
            )
            param = add_scaled(param, buffer, -lr)
        elif isinstance(lr, Tensor):
            param = param - lr * (grad / denominator)
        else:
            param = torch.addcdiv(param, grad, denominator, value=-lr)
        return param, RMSpropState(state.count, square_avg, grad_avg, buffer)


rmsprop = RMSprop
