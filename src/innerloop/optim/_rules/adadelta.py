"""Adadelta (Zeiler, "ADADELTA: an adaptive learning rate method", 2012)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Hyper
from innerloop.optim._engine.elementwise import Elementwise
from innerloop.optim._engine.numerics import add_scaled, average_of_squares, safe_sqrt
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_nonnegative, is_active, numbers, require


class AdadeltaState(NamedTuple):
    """Steps taken, and the averages of squared gradients and of squared updates."""

    count: Any
    square_avg: Any
    acc_delta: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adadelta(Elementwise):
    r"""Scale each step by the ratio of the sizes of earlier steps and gradients.

    .. math::
        v_t = \rho v_{t-1} + (1 - \rho) g_t^2, \quad
        d_t = \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}}\, g_t, \quad
        u_t = \rho u_{t-1} + (1 - \rho) d_t^2, \quad
        \theta_t = \theta_{t-1} - \eta\, d_t.

    Args:
        lr: :math:`\eta`.
        rho: :math:`\rho`.
        eps: :math:`\epsilon`.
        weight_decay: times the parameter, added to the gradient.
        foreach: accepted as in ``torch.optim``; chooses no other result, so it is ignored. Likewise
            ``capturable`` and ``differentiable``.
        maximize: ascend instead of descend.

    Example:
        A gradient of zero moves nothing: d p₁/d p₀ = 1 where the gradient does not depend on p.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.adadelta()
        >>> def one_step(p):
        ...     return opt.update({"p": 0 * p}, opt.init({"p": p}), {"p": p})[0]["p"]
        >>> torch.func.grad(one_step)(torch.tensor(3.0))
        tensor(1.)
    """

    lr: Hyper = 1.0
    rho: Hyper = 0.9
    eps: Hyper = 1e-6
    weight_decay: Hyper = 0.0
    foreach: bool | None = dataclasses.field(default=None, repr=False)
    _: dataclasses.KW_ONLY
    capturable: bool = dataclasses.field(default=False, repr=False)
    maximize: bool = False
    differentiable: bool = dataclasses.field(default=False, repr=False)

    hyper_names: ClassVar = ("lr", "rho", "eps", "weight_decay")
    state_type: ClassVar = AdadeltaState
    torch_layout: ClassVar = TorchLayout(
        torch.optim.Adadelta, {"square_avg": "square_avg", "acc_delta": "acc_delta"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        check_nonnegative(hyper, *self.hyper_names)
        for value in numbers(hyper["rho"]):
            require(value <= 1, f"rho={value} must be in [0, 1]")

    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("square_avg", "acc_delta")

    def step(
        self, grad: Tensor, param: Tensor, state: AdadeltaState, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, AdadeltaState]:
        lr, rho, eps = hyper["lr"], hyper["rho"], hyper["eps"]
        grad = -grad if self.maximize else grad
        if is_active(hyper["weight_decay"]):
            grad = add_scaled(grad, param, hyper["weight_decay"])
        square_avg = average_of_squares(state.square_avg, grad, rho)
        exact = isinstance(eps, (int, float)) and eps == 0
        delta = safe_sqrt(state.acc_delta + eps, exact) / safe_sqrt(square_avg + eps, exact) * grad
        return add_scaled(param, delta, -lr), AdadeltaState(
            state.count, square_avg, average_of_squares(state.acc_delta, delta, rho)
        )


adadelta = Adadelta
