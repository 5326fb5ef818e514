"""NAdam (Dozat, "Incorporating Nesterov momentum into Adam", 2016)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Hyper, Scalar
from innerloop.optim._engine.elementwise import Elementwise
from innerloop.optim._engine.numerics import (
    add_scaled,
    average,
    average_of_squares,
    one_minus_power,
    precise,
    root_of,
)
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_betas, check_nonnegative, is_active


class NAdamState(NamedTuple):
    """Steps taken, both moments, and the product of all momenta so far (one per parameter)."""

    count: Any
    mu: Any
    nu: Any
    mu_product: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NAdam(Elementwise):
    r"""Adam with Nesterov's momentum, growing by a schedule.

    .. math::
        \mu_t = \beta_1 \bigl(1 - \tfrac12 \cdot 0.96^{t \psi}\bigr), \quad
        \hat m_t = \frac{\mu_{t+1}\, m_t}{1 - \prod_{i \le t+1} \mu_i}
        + \frac{(1 - \mu_t)\, g_t}{1 - \prod_{i \le t} \mu_i}, \quad
        \theta_t = \theta_{t-1} - \eta\, \frac{\hat m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon},

    with :math:`m_t` and :math:`v_t` as in `Adam`. The derivative of the root is taken as 0 where
    its argument is 0.

    Args:
        lr: step size :math:`\eta`.
        betas: :math:`(\beta_1, \beta_2)`; each may be a tensor.
        eps: :math:`\epsilon`.
        weight_decay: times the parameter, added to the gradient, or (``decoupled_weight_decay``)
            the parameter is first multiplied by 1 - lr · weight_decay.
        momentum_decay: :math:`\psi`.
        decoupled_weight_decay: AdamW's form.
        foreach: accepted as in ``torch.optim``; chooses no other result, so it is ignored. Likewise
            ``capturable`` and ``differentiable``.
        maximize: ascend instead of descend.
        eps_root: added inside the root, not in ``torch.optim``: with a positive one the update is
            smooth where the gradient is zero, and so are its hyper- and second-order gradients.

    Example:
        With β₁ = 0 the update is that of Adam without momentum, of length lr at the first step: d
        p₁/d lr = -1.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.nadam(betas=(0.0, 0.999), eps=0.0)
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
    momentum_decay: Hyper = 4e-3
    decoupled_weight_decay: bool = False
    _: dataclasses.KW_ONLY
    foreach: bool | None = dataclasses.field(default=None, repr=False)
    maximize: bool = False
    capturable: bool = dataclasses.field(default=False, repr=False)
    differentiable: bool = dataclasses.field(default=False, repr=False)
    eps_root: Hyper = 0.0

    hyper_names: ClassVar = ("lr", "betas", "eps", "weight_decay", "momentum_decay", "eps_root")
    state_type: ClassVar = NAdamState
    scalars: ClassVar = ("mu_product",)
    torch_layout: ClassVar = TorchLayout(
        torch.optim.NAdam, {"mu": "exp_avg", "nu": "exp_avg_sq", "mu_product": "mu_product"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", check_betas(self.betas))
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        check_nonnegative(hyper, "lr", "eps", "eps_root", "weight_decay", "momentum_decay")
        check_betas(hyper["betas"])

    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("mu", "nu", "mu_product")

    def step(
        self, grad: Tensor, param: Tensor, state: NAdamState, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, NAdamState]:
        lr, (beta1, beta2), eps, decay = (
            hyper["lr"],
            hyper["betas"],
            hyper["eps"],
            hyper["weight_decay"],
        )
        grad = -grad if self.maximize else grad
        if is_active(decay):
            if self.decoupled_weight_decay:
                param = param * (1 - lr * decay)
            else:
                grad = add_scaled(grad, param, decay)
        momentum, next_momentum = (
            _momentum(beta1, hyper["momentum_decay"], state.count + i, param) for i in (0, 1)
        )
        product = state.mu_product * momentum
        mu = average(state.mu, grad, beta1)
        nu = average_of_squares(state.nu, grad, beta2)
        denominator = (
            root_of(nu / one_minus_power(beta2, state.count, param), eps, hyper["eps_root"]) + eps
        )
        for direction, weight in (
            (grad, (-lr * (1.0 - momentum)) / (1.0 - product)),
            (mu, (-lr * next_momentum) / (1.0 - product * next_momentum)),
        ):
            if isinstance(weight, Tensor):
                param = param + weight * (direction / denominator)
            else:
                param = torch.addcdiv(param, direction, denominator, value=weight)
        return param, NAdamState(state.count, mu, nu, product)


def _momentum(beta1: Scalar, decay: Scalar, count: Scalar, like: Tensor) -> Scalar:
    """Compute μ of the step ``count``."""
    beta1, decay, count = (precise(value, like) for value in (beta1, decay, count))
    return beta1 * (1.0 - 0.5 * (0.96 ** (count * decay)))


nadam = NAdam
