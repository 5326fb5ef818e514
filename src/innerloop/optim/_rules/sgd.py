"""Stochastic gradient descent with momentum (Polyak 1964; Nesterov's as in Sutskever 2013)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Hyper, Scalar
from innerloop._utils import torch_private
from innerloop.errors import InvalidInputError
from innerloop.optim._engine.elementwise import Elementwise
from innerloop.optim._engine.numerics import add_scaled
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_nonnegative, is_active


class SGDState(NamedTuple):
    """Steps taken and, with momentum, the running sum of gradients."""

    count: Any
    momentum_buffer: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SGD(Elementwise):
    r"""Gradient descent with weight decay :math:`\lambda`, momentum :math:`\mu` and dampening.

    .. math::
        g_t = \nabla L(\theta_{t-1}) + \lambda \theta_{t-1}, \qquad
        b_t = \mu b_{t-1} + (1 - \tau) g_t \quad (b_1 = g_1), \qquad
        \theta_t = \theta_{t-1} - \eta\, b_t,

    with :math:`g_t + \mu b_t` in place of :math:`b_t` if ``nesterov``, and :math:`-\nabla L` if
    ``maximize``.

    Args:
        lr: step size :math:`\eta`.
        momentum: :math:`\mu`; the number 0 switches the buffer off, a tensor of value 0 does not
            (so it gets a gradient).
        dampening: :math:`\tau`.
        weight_decay: :math:`\lambda`.
        nesterov: use Nesterov's form.
        maximize: ascend instead of descend.
        foreach: accepted as in ``torch.optim``; chooses no other result, so it is ignored. Likewise
            ``differentiable`` and ``fused``.

    Example:
        On the loss p²/2, two steps with momentum μ give d p₂/d p₀ = (1-η)² - ημ; with η=.1, μ=.9
        that is .72 (``torch.optim.SGD(differentiable=True)`` says .90).

        >>> import torch, innerloop
        >>> opt = innerloop.optim.sgd(lr=0.1, momentum=0.9)
        >>> def two_steps(p):
        ...     params, state = {"p": p}, opt.init({"p": p})
        ...     for _ in range(2):
        ...         params, state = opt.update({"p": params["p"]}, state, params)
        ...     return params["p"]
        >>> print(f"{torch.func.grad(two_steps)(torch.tensor(1.0, dtype=torch.float64)):.4f}")
        0.7200
    """

    lr: Hyper = 1e-3
    momentum: Hyper = 0.0
    dampening: Hyper = 0.0
    weight_decay: Hyper = 0.0
    nesterov: bool = False
    _: dataclasses.KW_ONLY
    maximize: bool = False
    foreach: bool | None = dataclasses.field(default=None, repr=False)
    differentiable: bool = dataclasses.field(default=False, repr=False)
    fused: bool | None = dataclasses.field(default=None, repr=False)

    hyper_names: ClassVar = ("lr", "momentum", "dampening", "weight_decay")
    state_type: ClassVar = SGDState
    torch_layout: ClassVar = TorchLayout(
        torch.optim.SGD, {"momentum_buffer": "momentum_buffer"}, count=None
    )
    flat_limit: ClassVar = (
        1_024  # with three operations a tensor, copying larger ones costs more than it saves
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        check_nonnegative(hyper, "lr", "momentum", "weight_decay")
        if self.nesterov and (not is_active(hyper["momentum"]) or is_active(hyper["dampening"])):
            raise InvalidInputError(
                f"nesterov=True with momentum={hyper['momentum']}, "
                f"dampening={hyper['dampening']}: Nesterov's form needs momentum > 0 and "
                "the number 0 for dampening, for example sgd(lr=0.1, momentum=0.9, nesterov=True)"
            )

    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if is_active(hyper["momentum"]) else ()

    def packs_small_params(self, hyper: Mapping[str, Any]) -> bool:
        return is_active(hyper["momentum"])

    def step(
        self, grad: Tensor, param: Tensor, state: SGDState, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, SGDState]:
        lr, momentum = hyper["lr"], hyper["momentum"]
        if self.maximize:
            grad = -grad
        if is_active(hyper["weight_decay"]):
            grad = add_scaled(grad, param, hyper["weight_decay"])
        if is_active(momentum):
            buffer = self._buffer(grad, state, momentum, 1 - hyper["dampening"])
            grad = add_scaled(grad, buffer, momentum) if self.nesterov else buffer
            state = state._replace(momentum_buffer=buffer)
        return add_scaled(param, grad, -lr), state

    def step_lists(
        self, grads: list[Tensor], params: list[Tensor], state: SGDState, hyper: Mapping[str, float]
    ) -> tuple[list[Tensor], SGDState]:
        momentum = hyper["momentum"]
        if self.maximize:
            grads = [-g for g in grads]
        if is_active(hyper["weight_decay"]):
            grads = torch_private.add_lists(grads, params, hyper["weight_decay"])
        if is_active(momentum):
            buffers = grads
            if state.momentum_buffer is not None and state.count > 1:
                old = torch_private.multiply_list(state.momentum_buffer, momentum)
                buffers = torch_private.add_lists(old, grads, 1 - hyper["dampening"])
            grads = torch_private.add_lists(grads, buffers, momentum) if self.nesterov else buffers
            state = state._replace(momentum_buffer=buffers)
        return torch_private.add_lists(params, grads, -hyper["lr"]), state

    def _buffer(self, grad: Tensor, state: SGDState, momentum: Scalar, weight: Scalar) -> Tensor:
        """Compute b_t; the first one is the gradient itself, undampened."""
        old = state.momentum_buffer
        if old is None or (isinstance(state.count, int) and state.count == 1):
            return grad
        buffer = add_scaled(old * momentum, grad, weight)
        return (
            buffer if isinstance(state.count, int) else torch.where(state.count == 1, grad, buffer)
        )


sgd = SGD
