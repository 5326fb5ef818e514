"""Adamax (Kingma & Ba 2015, section 7.1): the largest gradient in place of the mean square."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Hyper
from innerloop.optim._engine.elementwise import Elementwise
from innerloop.optim._engine.numerics import add_scaled, average, one_minus_power
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_betas, check_nonnegative, is_active


class AdamaxState(NamedTuple):
    """Steps taken, first moment, and the decaying largest size of a gradient."""

    count: Any
    mu: Any
    nu: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adamax(Elementwise):
    r"""Adam by the infinity norm.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        u_t = \max(\beta_2 u_{t-1}, |g_t| + \epsilon), \quad
        \theta_t = \theta_{t-1} - \frac{\eta}{1 - \beta_1^t}\, \frac{m_t}{u_t}.

    Args:
        lr: step size :math:`\eta`.
        betas: :math:`(\beta_1, \beta_2)`; each may be a tensor.
        eps: :math:`\epsilon`.
        weight_decay: times the parameter, added to the gradient.
        foreach: accepted as in ``torch.optim``; chooses no other result, so it is ignored. Likewise
            ``capturable`` and ``differentiable``.
        maximize: ascend instead of descend.

    Example:
        The first step has length lr wherever it starts: d p₁/d lr = -1.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.adamax(eps=0.0)
        >>> def one_step(lr):
        ...     params = {"p": torch.tensor(2.0)}
        ...     return opt.update({"p": params["p"] ** 3}, opt.init(params), params, {"lr": lr})[0][
        ...         "p"
        ...     ]
        >>> print(f"{torch.func.grad(one_step)(torch.tensor(0.1)):.4f}")
        -1.0000
    """

    lr: Hyper = 2e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    foreach: bool | None = dataclasses.field(default=None, repr=False)
    _: dataclasses.KW_ONLY
    maximize: bool = False
    differentiable: bool = dataclasses.field(default=False, repr=False)
    capturable: bool = dataclasses.field(default=False, repr=False)

    hyper_names: ClassVar = ("lr", "betas", "eps", "weight_decay")
    state_type: ClassVar = AdamaxState
    torch_layout: ClassVar = TorchLayout(torch.optim.Adamax, {"mu": "exp_avg", "nu": "exp_inf"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", check_betas(self.betas))
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        check_nonnegative(hyper, "lr", "eps", "weight_decay")
        check_betas(hyper["betas"])

    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("mu", "nu")

    def step(
        self, grad: Tensor, param: Tensor, state: AdamaxState, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, AdamaxState]:
        lr, (beta1, beta2), eps = hyper["lr"], hyper["betas"], hyper["eps"]
        grad = -grad if self.maximize else grad
        if is_active(hyper["weight_decay"]):
            grad = add_scaled(grad, param, hyper["weight_decay"])
        mu = average(state.mu, grad, beta1)
        nu = torch.maximum(state.nu * beta2, grad.abs() + eps)
        size = lr / one_minus_power(beta1, state.count, param)
        if isinstance(size, Tensor):
            param = param - size * (mu / nu)
        else:
            param = torch.addcdiv(param, mu, nu, value=-size)
        return param, AdamaxState(state.count, mu, nu)


adamax = Adamax
