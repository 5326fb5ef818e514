"""RAdam (Liu et al., "On the variance of the adaptive learning rate and beyond", 2020)."""

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
    root_of,
    times,
)
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_betas, check_nonnegative, is_active


class RAdamState(NamedTuple):
    """Steps taken, first and second moments."""

    count: Any
    mu: Any
    nu: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RAdam(Elementwise):
    r"""Adam that does not divide by the second moment while that is uncertain.

    .. math::
        \rho_\infty = \frac{2}{1 - \beta_2} - 1, \quad
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \quad
        r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}
        {(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}},

    .. math::
        \theta_t = \theta_{t-1} - \eta\, \hat m_t \cdot
        \begin{cases} r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\
        1 & \text{else} \end{cases}

    The derivative of :math:`\sqrt{v}` is taken as 0 at :math:`v = 0`.

    Args:
        lr: step size :math:`\eta`.
        betas: :math:`(\beta_1, \beta_2)`; each may be a tensor.
        eps: :math:`\epsilon`.
        weight_decay: times the parameter, added to the gradient, or (``decoupled_weight_decay``)
            the parameter is first multiplied by 1 - lr · weight_decay.
        decoupled_weight_decay: AdamW's form.
        foreach: accepted as in ``torch.optim``; chooses no other result, so it is ignored. Likewise
            ``capturable`` and ``differentiable``.
        maximize: ascend instead of descend.
        eps_root: added inside the root, not in ``torch.optim``: with a positive one the update is
            smooth where the gradient is zero, and so are its hyper- and second-order gradients.

    Example:
        The first steps are gradient descent with momentum: d p₁/d lr = -g = -8.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.radam()
        >>> def one_step(lr):
        ...     params = {"p": torch.tensor(2.0)}
        ...     return opt.update({"p": params["p"] ** 3}, opt.init(params), params, {"lr": lr})[0][
        ...         "p"
        ...     ]
        >>> print(f"{torch.func.grad(one_step)(torch.tensor(0.1)):.4f}")
        -8.0000
    """

    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    decoupled_weight_decay: bool = False
    _: dataclasses.KW_ONLY
    foreach: bool | None = dataclasses.field(default=None, repr=False)
    maximize: bool = False
    capturable: bool = dataclasses.field(default=False, repr=False)
    differentiable: bool = dataclasses.field(default=False, repr=False)
    eps_root: Hyper = 0.0

    hyper_names: ClassVar = ("lr", "betas", "eps", "weight_decay", "eps_root")
    state_type: ClassVar = RAdamState
    torch_layout: ClassVar = TorchLayout(torch.optim.RAdam, {"mu": "exp_avg", "nu": "exp_avg_sq"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", check_betas(self.betas))
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        check_nonnegative(hyper, "lr", "eps", "eps_root", "weight_decay")
        check_betas(hyper["betas"])

    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("mu", "nu")

    def step(
        self, grad: Tensor, param: Tensor, state: RAdamState, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, RAdamState]:
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
        mu = average(state.mu, grad, beta1)
        nu = average_of_squares(state.nu, grad, beta2)
        corrected = mu / one_minus_power(beta1, state.count, param)
        correction = one_minus_power(beta2, state.count, param)
        root = root_of(nu, eps, times(hyper["eps_root"], correction)) + eps
        rectified = _rectified(beta2, correction, state.count)
        if isinstance(rectified, Tensor):
            open_, factor = (
                rectified > 0,
                rectified.clamp_min(torch.finfo(rectified.dtype).tiny) ** 0.5,
            )
            scale = torch.where(open_, factor * correction**0.5 / root, torch.ones_like(root))
            return param - lr * (corrected * scale), RAdamState(state.count, mu, nu)
        update = corrected * lr
        if rectified > 0:
            update = update * (correction**0.5 / root) * rectified**0.5
        return param - update, RAdamState(state.count, mu, nu)


def _rectified(beta2: Scalar, correction: Scalar, count: Scalar) -> Scalar:
    """Compute r², or 0 where the second moment is not used yet.

    The result is a number if both arguments are.
    """
    infinity = 2 / (1 - beta2) - 1
    numbers_only = isinstance(beta2, (int, float)) and isinstance(count, int)
    power = beta2 ** float(count) if numbers_only else 1 - correction
    rho = infinity - 2 * count * power / correction
    if isinstance(rho, Tensor):
        used = rho > 5
        rho = torch.where(used, rho, torch.full_like(rho, 6.0))
        square = (rho - 4) * (rho - 2) * infinity / ((infinity - 4) * (infinity - 2) * rho)
        return torch.where(used, square, torch.zeros_like(square))
    return (
        (rho - 4) * (rho - 2) * infinity / ((infinity - 4) * (infinity - 2) * rho)
        if rho > 5
        else 0.0
    )


radam = RAdam
