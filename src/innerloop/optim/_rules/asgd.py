"""Averaged stochastic gradient descent (Polyak & Juditsky 1992)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Hyper, Scalar
from innerloop.optim._engine.elementwise import Elementwise
from innerloop.optim._engine.numerics import add_scaled, precise
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_nonnegative, is_active


class ASGDState(NamedTuple):
    """Steps taken, the average of the parameters, and the next step's size and weight.

    Size and weight are one number per parameter.
    """

    count: Any
    ax: Any
    eta: Any
    mu: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ASGD(Elementwise):
    r"""Gradient descent with a decaying step size; the state keeps the average of the parameters.

    .. math::
        \theta_t = (1 - \lambda \eta_{t-1})\, \theta_{t-1} - \eta_{t-1} g_t, \quad
        \bar\theta_t = \bar\theta_{t-1} + \mu_{t-1} (\theta_t - \bar\theta_{t-1}), \quad
        \eta_t = \frac{\eta}{(1 + \lambda \eta t)^\alpha}, \quad
        \mu_t = \frac{1}{\max(1, t - t_0)},

    starting with :math:`\eta_0 = \eta` and :math:`\mu_0 = 1`. An override of lr, lambd, alpha or t0
    is felt by the step after, as in ``torch.optim``, and by the first one. The average is
    ``state.ax[name]``; t0 matters to it alone, and :math:`\mu` has a kink at :math:`t = t_0 + 1`.

    Args:
        lr: :math:`\eta`.
        lambd: :math:`\lambda`.
        alpha: :math:`\alpha`.
        t0: when averaging starts, :math:`t_0`.
        weight_decay: times the parameter, added to the gradient.
        foreach: accepted as in ``torch.optim``; chooses no other result, so it is ignored. Likewise
            ``differentiable`` and ``capturable``.
        maximize: ascend instead of descend.

    Example:
        A first step from 2 along the gradient 8, with decay λ = 1: d p₁/d lr = -(8 + 1 · 2).

        >>> import torch, innerloop
        >>> opt = innerloop.optim.asgd(lambd=1.0)
        >>> def one_step(lr):
        ...     params = {"p": torch.tensor(2.0)}
        ...     return opt.update({"p": params["p"] ** 3}, opt.init(params), params, {"lr": lr})[0][
        ...         "p"
        ...     ]
        >>> torch.func.grad(one_step)(torch.tensor(0.1))
        tensor(-10.)
    """

    lr: Hyper = 1e-2
    lambd: Hyper = 1e-4
    alpha: Hyper = 0.75
    t0: Hyper = 1e6
    weight_decay: Hyper = 0.0
    foreach: bool | None = dataclasses.field(default=None, repr=False)
    maximize: bool = False
    differentiable: bool = dataclasses.field(default=False, repr=False)
    capturable: bool = dataclasses.field(default=False, repr=False)

    hyper_names: ClassVar = ("lr", "lambd", "alpha", "t0", "weight_decay")
    state_type: ClassVar = ASGDState
    scalars: ClassVar = ("eta", "mu")
    torch_layout: ClassVar = TorchLayout(torch.optim.ASGD, {"ax": "ax", "eta": "eta", "mu": "mu"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        check_nonnegative(
            hyper, "lr", "lambd", "alpha", "weight_decay"
        )  # torch refuses all four from 2.15 on

    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("ax", "eta", "mu")

    def step(
        self, grad: Tensor, param: Tensor, state: ASGDState, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, ASGDState]:
        lr, lambd, alpha, t0, count = (
            precise(value, param)
            for value in (hyper["lr"], hyper["lambd"], hyper["alpha"], hyper["t0"], state.count)
        )
        grad = -grad if self.maximize else grad
        if is_active(hyper["weight_decay"]):
            grad = add_scaled(grad, param, hyper["weight_decay"])
        eta = _first(state.count, lr, state.eta)
        param = add_scaled(param * (1 - lambd * eta), grad, -eta)
        ax = _averaged(state.ax, param, state.mu)
        later = lr / ((1 + lambd * lr * count) ** alpha)
        return param, ASGDState(state.count, ax, later, _weight(count - t0))


def _first(count: Scalar, first: Scalar, later: Scalar) -> Scalar:
    """Return lr itself as the step size of the first step."""
    if isinstance(count, Tensor):
        return torch.where(count == 1, first, later)
    return first if count == 1 else later


def _averaged(mean: Tensor, new: Tensor, weight: Scalar) -> Tensor:
    """Average; at weight 1 the result is the new one itself, to the last bit."""
    moved = mean + (new - mean) * weight
    if isinstance(weight, Tensor):
        return torch.where(weight == 1, new, moved)
    return new if weight == 1 else moved


def _weight(age: Scalar) -> Scalar:
    """Compute 1 / max(1, age)."""
    return 1 / age.clamp_min(1) if isinstance(age, Tensor) else 1 / max(1.0, age)


asgd = ASGD
