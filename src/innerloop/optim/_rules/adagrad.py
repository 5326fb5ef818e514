"""Adagrad (Duchi, Hazan & Singer, "Adaptive subgradient methods for online learning", 2011)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Hyper
from innerloop.optim._engine.elementwise import Elementwise
from innerloop.optim._engine.numerics import add_scaled, at_first_step, root_of
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_nonnegative, is_active


class AdagradState(NamedTuple):
    """Steps taken, and the sum of squared gradients."""

    count: Any
    sum: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adagrad(Elementwise):
    r"""Divide by the root of the sum of all squares so far.

    .. math::
        s_t = s_{t-1} + g_t^2, \qquad
        \theta_t = \theta_{t-1}
        - \frac{\eta}{1 + (t - 1)\, \gamma}\, \frac{g_t}{\sqrt{s_t} + \epsilon}.

    The derivative of the root is taken as 0 where its argument is 0.

    Args:
        lr: step size :math:`\eta`.
        lr_decay: :math:`\gamma`.
        weight_decay: times the parameter, added to the gradient.
        initial_accumulator_value: :math:`s_0`; as an override it counts at the first step.
        eps: :math:`\epsilon`.
        foreach: accepted as in ``torch.optim``; chooses no other result, so it is ignored. Likewise
            ``differentiable`` and ``fused``.
        maximize: ascend instead of descend.
        eps_root: added inside the root, not in ``torch.optim``: with a positive one the update is
            smooth where the gradient is zero, and so are its hyper- and second-order gradients.

    Example:
        With s₀ = 0 the first step has length lr wherever it starts: d p₁/d lr = -1.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.adagrad(eps=0.0)
        >>> def one_step(lr):
        ...     params = {"p": torch.tensor(2.0)}
        ...     return opt.update({"p": params["p"] ** 3}, opt.init(params), params, {"lr": lr})[0][
        ...         "p"
        ...     ]
        >>> torch.func.grad(one_step)(torch.tensor(0.1))
        tensor(-1.)
    """

    lr: Hyper = 1e-2
    lr_decay: Hyper = 0.0
    weight_decay: Hyper = 0.0
    initial_accumulator_value: Hyper = 0.0
    eps: Hyper = 1e-10
    foreach: bool | None = dataclasses.field(default=None, repr=False)
    _: dataclasses.KW_ONLY
    maximize: bool = False
    differentiable: bool = dataclasses.field(default=False, repr=False)
    fused: bool | None = dataclasses.field(default=None, repr=False)
    eps_root: Hyper = 0.0

    hyper_names: ClassVar = (
        "lr",
        "lr_decay",
        "weight_decay",
        "initial_accumulator_value",
        "eps",
        "eps_root",
    )
    state_type: ClassVar = AdagradState
    torch_layout: ClassVar = TorchLayout(
        torch.optim.Adagrad, {"sum": "sum"}, from_constructor=("initial_accumulator_value",)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        check_nonnegative(hyper, *self.hyper_names)

    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    def step(
        self, grad: Tensor, param: Tensor, state: AdagradState, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, AdagradState]:
        lr, eps, decay = hyper["lr"], hyper["eps"], hyper["lr_decay"]
        grad = -grad if self.maximize else grad
        if is_active(hyper["weight_decay"]):
            grad = add_scaled(grad, param, hyper["weight_decay"])
        before = at_first_step(state.count, hyper["initial_accumulator_value"], state.sum)
        total = torch.addcmul(before, grad, grad, value=1)
        denominator = root_of(total, eps, hyper["eps_root"]) + eps
        size = lr / (1 + (state.count - 1) * decay)
        if isinstance(size, Tensor):
            param = param - size * (grad / denominator)
        else:
            param = torch.addcdiv(param, grad, denominator, value=-size)
        return param, AdagradState(state.count, total)


adagrad = Adagrad
