"""Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018), AdamW (Loshchilov & Hutter 2019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Hyper
from innerloop.optim._engine.elementwise import Elementwise
from innerloop.optim._engine.numerics import (
    add_scaled,
    average,
    average_of_squares,
    one_minus_power,
    root_of,
    times,
)
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_betas, check_nonnegative, is_active, kept


class AdamState(NamedTuple):
    """Steps taken, first and second moments, and (AMSGrad) the largest second moment so far."""

    count: Any
    mu: Any
    nu: Any
    nu_max: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adam(Elementwise):
    r"""Adam with weight decay :math:`\lambda`.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
        \theta_t = \theta_{t-1}
        - \eta\, \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}.

    The derivative of :math:`\sqrt{v}` is taken as 0 at :math:`v = 0`, so that a parameter whose
    gradient was always exactly 0 (a dead ReLU, an unused input) has a finite meta-gradient; the
    forward pass is that of ``torch.optim`` bit for bit.

    Args:
        lr: step size :math:`\eta`.
        betas: :math:`(\beta_1, \beta_2)`; each may be a tensor.
        eps: :math:`\epsilon`.
        weight_decay: :math:`\lambda`, added to the gradient, or (``decoupled_weight_decay``)
            :math:`\theta` is first multiplied by :math:`1 - \eta\lambda`.
        amsgrad: divide by the largest :math:`v` so far.
        maximize: ascend instead of descend.
        decoupled_weight_decay: AdamW's form.
        foreach: accepted as in ``torch.optim``; chooses no other result, so it is ignored. Likewise
            ``capturable``, ``differentiable`` and ``fused``.
        eps_root: added to the corrected second moment inside the root, not in ``torch.optim``: with
            a positive one the update is smooth where the gradient is zero, and so are its hyper-
            and second-order gradients.

    Example:
        At the first step Adam moves by lr in the direction of the sign, wherever it starts: d p₁/d
        p₀ = 1, d p₁/d lr = -1.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.adam(eps=0.0)
        >>> def one_step(p, lr):
        ...     params = {"p": p}
        ...     return opt.update({"p": p**3}, opt.init(params), params, {"lr": lr})[0]["p"]
        >>> torch.func.grad(one_step, argnums=(0, 1))(torch.tensor(2.0), torch.tensor(0.1))
        (tensor(1.), tensor(-1.0000))
    """

    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    amsgrad: bool = False
    _: dataclasses.KW_ONLY
    foreach: bool | None = dataclasses.field(default=None, repr=False)
    maximize: bool = False
    capturable: bool = dataclasses.field(default=False, repr=False)
    differentiable: bool = dataclasses.field(default=False, repr=False)
    fused: bool | None = dataclasses.field(default=None, repr=False)
    decoupled_weight_decay: bool = False
    eps_root: Hyper = 0.0

    hyper_names: ClassVar = ("lr", "betas", "eps", "weight_decay", "eps_root")
    state_type: ClassVar = AdamState
    torch_layout: ClassVar = TorchLayout(
        torch.optim.Adam, {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", check_betas(self.betas))
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        check_nonnegative(hyper, "lr", "eps", "eps_root", "weight_decay")
        check_betas(hyper["betas"])

    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("mu", "nu", "nu_max") if self.amsgrad else ("mu", "nu")

    def update_ignores_param(self, hyper: Mapping[str, Any]) -> bool:
        return not is_active(hyper["weight_decay"])

    def step(
        self, grad: Tensor, param: Tensor, state: AdamState, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, AdamState]:
        lr, (beta1, beta2), eps, decay = (
            hyper["lr"],
            hyper["betas"],
            hyper["eps"],
            hyper["weight_decay"],
        )
        if self.maximize:
            grad = -grad
        if is_active(decay):
            if self.decoupled_weight_decay:
                param = param * (1 - lr * decay)
            else:
                grad = add_scaled(grad, param, decay)
        mu = average(state.mu, grad, beta1)
        nu = average_of_squares(state.nu, grad, beta2)
        nu_max = state.nu_max
        if self.amsgrad:
            nu_max = torch.maximum(kept(nu_max, "amsgrad", nu, state.count), nu)
        correction = one_minus_power(beta2, state.count, param)
        root = root_of(nu_max if self.amsgrad else nu, eps, times(hyper["eps_root"], correction))
        denominator = root / correction**0.5 + eps
        step_size = lr / one_minus_power(beta1, state.count, param)
        if isinstance(step_size, Tensor):
            param = param - step_size * (mu / denominator)
        else:
            param = torch.addcdiv(param, mu, denominator, value=-step_size)
        return param, AdamState(state.count, mu, nu, nu_max)


adam = Adam
