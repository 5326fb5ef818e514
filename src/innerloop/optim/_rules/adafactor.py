"""Adafactor (Shazeer & Stern, "Adaptive learning rates with sublinear memory cost", 2018)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Hyper, Scalar
from innerloop.errors import InvalidInputError
from innerloop.optim._engine.numerics import precise, safe_sqrt
from innerloop.optim._engine.per_tensor import PerTensor, at_least, with_derivative_of
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_nonnegative, is_active, numbers, require


class AdafactorState(NamedTuple):
    """Steps taken; mean squares by row and column (of the last two axes), or by element."""

    count: Any
    row_var: Any
    col_var: Any
    variance: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adafactor(PerTensor):
    r"""Adam's second moment from its row and column means; steps relative to the parameter's size.

    .. math::
        R_t = R_{t-1} + t^\tau (\overline{g_t^2}^{\,\text{row}} - R_{t-1}), \quad
        C_t = C_{t-1} + t^\tau (\overline{g_t^2}^{\,\text{column}} - C_{t-1}), \quad
        \hat V_t = \frac{R_t C_t}{\max(\overline{R_t}, \epsilon_1)}, \quad
        U_t = \frac{g_t}{\sqrt{\max(\hat V_t, \epsilon_1^2)}},

    .. math::
        \theta_t = (1 - \eta\lambda)\, \theta_{t-1}
        - \max(\epsilon_2, \mathrm{rms}(\theta_{t-1}))\, \min(\eta, 1/\sqrt t)\,
        \frac{U_t}{\max(1, \mathrm{rms}(U_t) / d)}.

    Each max and min is a kink, at which the derivative is that of one side: rms(U) = d (the
    clipping), rms(θ) = ε₂, η = 1/√t (from there on lr has no effect but through weight decay).

    Args:
        lr: :math:`\eta`.
        beta2_decay: :math:`\tau`; at the first step it has no effect.
        eps: :math:`(\epsilon_1, \epsilon_2)`; None stands for the rounding unit of the parameter's
            dtype.
        d: :math:`d`.
        weight_decay: :math:`\lambda`.
        foreach: accepted as in ``torch.optim``; chooses no other result, so it is ignored.
        maximize: ascend instead of descend.

    Example:
        The first step is relative: -lr · ``|p|`` against the sign of the gradient, so that d p₁/d
            p₀ = 1 - lr.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.adafactor(lr=0.25)
        >>> def one_step(p):
        ...     return opt.update({"p": p**3}, opt.init({"p": p}), {"p": p})[0]["p"]
        >>> torch.func.grad(one_step)(torch.tensor(2.0))
        tensor(0.7500)
    """

    lr: Hyper = 1e-2
    beta2_decay: Hyper = -0.8
    eps: tuple[Hyper | None, Hyper] = (None, 1e-3)
    d: Hyper = 1.0
    weight_decay: Hyper = 0.0
    _: dataclasses.KW_ONLY
    foreach: bool | None = dataclasses.field(default=None, repr=False)
    maximize: bool = False

    hyper_names: ClassVar = ("lr", "beta2_decay", "eps", "d", "weight_decay")
    state_type: ClassVar = AdafactorState
    torch_layout: ClassVar = TorchLayout(
        torch.optim.Adafactor, {"row_var": "row_var", "col_var": "col_var", "variance": "variance"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        right = isinstance(self.eps, (tuple, list)) and len(self.eps) == 2
        require(right, f"eps={self.eps!r}: write a pair, eps=(None, 1e-3)")
        object.__setattr__(self, "eps", tuple(self.eps))
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        check_nonnegative(hyper, "lr", "weight_decay")
        for value in numbers(hyper["beta2_decay"]):
            require(value <= 0, f"beta2_decay={value} must be <= 0")
        for value in numbers(hyper["d"]):
            require(value >= 1, f"d={value} must be >= 1")
        for i, eps in enumerate(hyper["eps"]):
            for value in numbers(eps):
                require(value >= 0, f"eps[{i}]={value} is negative; it must be >= 0")

    def accept(self, name: str, param: Tensor) -> None:
        if param.is_complex():
            raise InvalidInputError(
                f"Adafactor takes no complex parameters, but {name!r} is {param.dtype}: use adam "
                "for it"
            )

    def start(self, param: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if param.ndim < 2:
            return None, None, torch.zeros_like(param)
        rows, columns = list(param.shape), list(param.shape)
        rows[-1] = columns[-2] = 1
        return param.new_zeros(rows), param.new_zeros(columns), None

    def step(
        self, grad: Tensor, param: Tensor, state: AdafactorState, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, AdafactorState]:
        lr, (small, least), decay = hyper["lr"], hyper["eps"], hyper["weight_decay"]
        small = torch.finfo(param.dtype).eps if small is None else small
        grad = -grad if self.maximize else grad
        weight = _power(precise(state.count, param), precise(hyper["beta2_decay"], param))
        size = at_least(_rms(param), least) * _smaller(lr, precise(state.count, param) ** -0.5)
        if is_active(decay):
            param = param * (1 - lr * decay)
        row, column, variance = state.row_var, state.col_var, state.variance
        if variance is None:
            row, column = (
                _moved(mean, _mean_square(grad, axis), weight)
                for mean, axis in ((row, -1), (column, -2))
            )
            estimate = (row @ column) / at_least(row.mean(dim=-2, keepdim=True), small)
        else:
            estimate = variance = _moved(variance, grad * grad, weight)
        update = at_least(estimate, small * small).rsqrt() * grad
        clipped = at_least(_rms(update) / precise(hyper["d"], param), 1.0)
        new = param - (size / clipped).to(param.dtype) * update
        return new, AdafactorState(state.count, row, column, variance)


def _power(count: Scalar, decay: Scalar) -> Any:
    return (
        count**decay
        if isinstance(count, Tensor) or isinstance(decay, Tensor)
        else float(count) ** decay
    )


def _smaller(lr: Any, bound: Any) -> Any:
    if isinstance(lr, Tensor):
        return (
            lr.clamp_max(bound)
            if not isinstance(bound, Tensor)
            else torch.minimum(lr, bound.to(lr.dtype))
        )
    return bound.clamp_max(lr) if isinstance(bound, Tensor) else min(lr, bound)


def _moved(mean: Tensor, new: Tensor, weight: Scalar) -> Tensor:
    """Return the mean, moved towards ``new``."""
    if isinstance(weight, Tensor):
        return mean + weight * (new - mean)
    return torch.lerp(mean, new, weight)


def _mean_square(x: Tensor, axis: int) -> Tensor:
    """Compute it from the norm, as torch does, with the derivatives of a plain mean.

    Those of the norm are not finite at 0 to every order.
    """
    value = torch.linalg.vector_norm(x, dim=axis, keepdim=True).square() / x.shape[axis]
    return with_derivative_of(value, (x * x).mean(dim=axis, keepdim=True))


def _rms(x: Tensor) -> Tensor:
    """Compute the root mean square, as a scalar of double precision."""
    if x.numel() == 0:  # torch divides zero by zero; there is no element that could see it
        return precise(x.new_zeros(()), x)
    wide = x.float() if x.dtype.itemsize < 4 else x  # the square of 300 does not fit into float16
    return safe_sqrt(precise((wide * wide).sum(), x)) / x.numel() ** 0.5


adafactor = Adafactor
