"""Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018), AdamW (Loshchilov & Hutter 2019)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

from innerloop._types import Hyper, Scalar
from innerloop.optim._engine.elementwise import Elementwise
from innerloop.optim._engine.fused import zero
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

    def kernel(self, count: Scalar, hyper: Mapping[str, Any]) -> AdamKernel | None:
        lr, (beta1, beta2), eps, decay = (
            hyper["lr"],
            hyper["betas"],
            hyper["eps"],
            hyper["weight_decay"],
        )
        # With eps = 0 the derivative of the root at 0 is that of `step`.
        special = self.amsgrad or self.maximize or eps == 0 or hyper["eps_root"] != 0
        if special or (decay != 0 and not self.decoupled_weight_decay):
            return None
        return AdamKernel(
            beta1,
            beta2,
            eps,
            lr / (1 - beta1 ** float(count)),
            (1 - beta2 ** float(count)) ** 0.5,
            1 - lr * decay if decay != 0 else 1.0,
        )


class AdamKernel(NamedTuple):
    r"""A step of Adam with s = η/(1-β₁ᵗ) and c = √(1-β₂ᵗ), and its pullback.

    .. math::
        m = \beta_1 m' + (1 - \beta_1) g, \quad v = \beta_2 v' + (1 - \beta_2) g^2, \quad
        u = -s\, m / d, \quad d = \sqrt v / c + \epsilon; \\
        \bar m = \bar m_+ - s\, \bar u / d, \quad
        \bar v = \bar v_+ + \frac{s\, m\, \bar u}{2 c\, d^2 \sqrt v}, \quad
        \bar g = (1 - \beta_1) \bar m + 2 (1 - \beta_2)\, g\, \bar v.

    As in `Adam.step`, the derivative of the root is 0 below the smallest normal number.
    """

    beta1: float
    beta2: float
    eps: float
    step_size: float
    root_correction: float
    scale: float

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the names of the moments."""
        return ("mu", "nu")

    def forward(
        self, grad: Tensor, fields: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return u, the new moments, and d."""
        mu, nu = fields
        mu = torch.lerp(mu, grad, 1 - self.beta1)
        nu = torch.mul(nu, self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        denominator = nu.sqrt().div_(self.root_correction).add_(self.eps)
        update = torch.addcdiv(zero(mu), mu, denominator, value=-self.step_size)
        return update, [mu, nu], [denominator]

    def pullback(
        self,
        grad: Tensor,
        fields: Sequence[Tensor],
        saved: Sequence[Tensor],
        update: Tensor,
        bars: Sequence[Tensor | None],
    ) -> tuple[Tensor, list[Tensor]]:
        """Pull back in 12 operations, most of them in place."""
        (mu, nu), (denominator,), (of_mu, of_nu) = fields, saved, bars
        limits = torch.finfo(nu.dtype)
        # Infinite, and its inverse 0, below the smallest normal number; a mask takes ten times the
        # time.
        root = threshold(nu, limits.tiny * (1 - limits.eps), math.inf).sqrt_()
        scaled = update / denominator
        if of_mu is None:
            of_mu = scaled * -self.step_size
        else:
            of_mu = torch.add(of_mu, scaled, alpha=-self.step_size)
        scaled.mul_(mu).div_(denominator)
        factor = self.step_size / (2 * self.root_correction)
        if of_nu is None:
            of_nu = scaled.div_(root).mul_(factor)
        else:
            of_nu = torch.addcdiv(of_nu, scaled, root, value=factor, out=scaled)
        # In memory that is at hand, and not needed any more.
        of_grad = torch.mul(of_mu, 1 - self.beta1, out=root)
        of_grad.addcmul_(grad, of_nu, value=2 * (1 - self.beta2))
        return of_grad, [of_mu.mul_(self.beta1), of_nu.mul_(self.beta2)]

    def differentiable_pullback(
        self, grad: Tensor, fields: Sequence[Tensor], update: Tensor, bars: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor]]:
        """Pull back by operations that have derivatives."""
        (mu, nu), (of_mu, of_nu) = fields, bars
        at_zero = nu < torch.finfo(nu.dtype).tiny
        # Divided by 1 there, so that no derivative of what is masked is infinite.
        root = nu.masked_fill(at_zero, 1).sqrt()
        denominator = torch.where(at_zero, nu.detach().sqrt(), root) / self.root_correction
        denominator = denominator + self.eps
        scaled = update / denominator
        direct = scaled * -self.step_size
        if of_mu is not None:
            direct = direct + of_mu
        of_root = scaled * mu / denominator / root * (self.step_size / (2 * self.root_correction))
        of_root = of_root.masked_fill(at_zero, 0)
        if of_nu is not None:
            of_root = of_root + of_nu
        of_grad = 2 * (1 - self.beta2) * grad * of_root + (1 - self.beta1) * direct
        return of_grad, [direct * self.beta1, of_root * self.beta2]


adam = Adam
