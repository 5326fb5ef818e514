"""Muon: momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024; Liu et al. 2025)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Hyper, Scalar
from innerloop.errors import InvalidInputError
from innerloop.optim._engine.numerics import add_scaled, average, safe_sqrt
from innerloop.optim._engine.per_tensor import PerTensor, at_least, with_derivative_of
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_nonnegative, require


class MuonState(NamedTuple):
    """Steps taken, and the running average of gradients."""

    count: Any
    momentum_buffer: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Muon(PerTensor):
    r"""Steps along the orthogonal factor of the momentum, for matrices.

    .. math::
        B_t = \mu B_{t-1} + (1 - \mu) g_t, \quad
        \theta_t = (1 - \eta\lambda)\, \theta_{t-1} - \eta\, r\, \mathrm{NS}(\tilde B_t), \quad
        \tilde B_t = \mu B_t + (1 - \mu) g_t \text{ if nesterov, else } B_t,

    where NS divides by the Frobenius norm and applies :math:`X \mapsto a X + (b\, X X^\top + c\, (X
    X^\top)^2) X` ns_steps times.

    ``torch.optim.Muon`` computes NS in bfloat16, where a difference quotient is noise. Here the
    value is that one, and the derivative is that of the same iteration in the parameter's dtype; it
    costs a second iteration. ``ns_dtype`` computes value and derivative in that dtype instead. One
    difference is meant: for bfloat16 parameters with ``nesterov=False``, torch 2.13 normalises the
    running average itself (its ``bfloat16()`` is no copy there); here the average stays what the
    equation says.

    Args:
        lr: :math:`\eta`.
        weight_decay: :math:`\lambda`.
        momentum: :math:`\mu`.
        nesterov: use Nesterov's form.
        ns_coefficients: :math:`(a, b, c)`; each may be a tensor (then the value is that of torch to
            the rounding of bfloat16).
        eps: the norm counts as no less than this.
        ns_steps: how often the polynomial is applied.
        adjust_lr_fn: :math:`r`: None or "original" for :math:`\sqrt{\max(1, \text{rows} /
            \text{columns})}`, "match_rms_adamw" for :math:`0.2 \sqrt{\max(\text{rows},
            \text{columns})}`.
        ns_dtype: the dtype of the whole iteration, value and derivative.

    Example:
        The orthogonal factor of a multiple of the identity does not depend on the multiple: neither
        does the step, d p₁/d p₀ = 1.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.muon(lr=0.1, weight_decay=0.0, ns_dtype=torch.float64)
        >>> def one_step(x):
        ...     params = {"p": x * torch.eye(2, dtype=torch.float64)}
        ...     return opt.update(params, opt.init(params), params)[0]["p"][0, 0]
        >>> print(f"{torch.func.grad(one_step)(torch.tensor(3.0)):.4f}")
        1.0000
    """

    lr: Hyper = 1e-3
    weight_decay: Hyper = 0.1
    momentum: Hyper = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[Hyper, Hyper, Hyper] = (3.4445, -4.7750, 2.0315)
    eps: Hyper = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: str | None = None
    _: dataclasses.KW_ONLY
    ns_dtype: torch.dtype | None = None

    hyper_names: ClassVar = ("lr", "weight_decay", "momentum", "ns_coefficients", "eps")
    state_type: ClassVar = MuonState
    torch_layout: ClassVar = TorchLayout(
        torch.optim.Muon, {"momentum_buffer": "momentum_buffer"}, count=None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.ns_coefficients
        right = isinstance(given, (tuple, list)) and len(given) == 3
        require(
            right,
            f"ns_coefficients={given!r}: write three numbers, ns_coefficients=(3.4445, -4.775, "
            "2.0315)",
        )
        object.__setattr__(self, "ns_coefficients", tuple(given))
        right = type(self.ns_steps) is int and 0 <= self.ns_steps < 100
        require(right, f"ns_steps={self.ns_steps!r} must be an integer between 0 and 99")
        require(
            self.adjust_lr_fn in (None, "original", "match_rms_adamw"),
            f"adjust_lr_fn={self.adjust_lr_fn!r}: write None, 'original' or 'match_rms_adamw'",
        )
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        check_nonnegative(hyper, "lr", "weight_decay", "momentum")

    def accept(self, name: str, param: Tensor) -> None:
        if param.ndim != 2 or param.is_complex():
            raise InvalidInputError(
                f"Muon orthogonalises real matrices, but parameter {name!r} has shape "
                f"{tuple(param.shape)} and dtype "
                f"{param.dtype}: give it another rule, groups({{{name!r}: adamw(), '*': muon()}})"
            )

    def start(self, param: Tensor) -> tuple[Tensor]:
        return (torch.zeros_like(param),)

    def step(
        self, grad: Tensor, param: Tensor, state: MuonState, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, MuonState]:
        lr, momentum = hyper["lr"], hyper["momentum"]
        buffer = average(state.momentum_buffer, grad, momentum)
        update = _between(grad, buffer, momentum) if self.nesterov else buffer
        direction = self._direction(update, hyper["ns_coefficients"], hyper["eps"]).to(param.dtype)
        param = param * (1 - lr * hyper["weight_decay"])
        if param.dtype == torch.float16:
            direction = (
                direction.float()
            )  # torch adds a bfloat16 direction, and the two meet in float32
        return add_scaled(param, direction, -lr * self._ratio(param)), MuonState(
            state.count, buffer
        )

    def _direction(self, update: Tensor, coefficients: tuple[Any, Any, Any], eps: Scalar) -> Tensor:
        if self.ns_dtype is not None:
            return newton_schulz(update.to(self.ns_dtype), coefficients, eps, self.ns_steps)
        value = newton_schulz(update.bfloat16(), coefficients, eps, self.ns_steps).to(update.dtype)
        wide = torch.promote_types(
            update.dtype, torch.float32
        )  # half precision has no derivative worth the name
        return with_derivative_of(
            value, newton_schulz(update.to(wide), coefficients, eps, self.ns_steps).to(update.dtype)
        )

    def _ratio(self, param: Tensor) -> float:
        rows, columns = param.shape
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1, rows / columns))


def newton_schulz(x: Tensor, coefficients: tuple[Any, Any, Any], eps: Scalar, steps: int) -> Tensor:
    """Compute nearly the orthogonal factor of a matrix: bring its singular values close to 1."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    norm = x.norm() if x.dtype.itemsize < 4 else safe_sqrt((x * x).sum())
    x = x / at_least(norm, eps)
    for _ in range(steps):
        gram = x @ x.T
        x = _polynomial(x, _polynomial(gram, gram, gram, b, c), x, a, 1)
    return x.T if tall else x


def _polynomial(
    constant: Tensor, left: Tensor, right: Tensor, beta: Scalar, alpha: Scalar
) -> Tensor:
    """Compute the polynomial β · constant + α · left @ right."""
    if isinstance(beta, Tensor) or isinstance(alpha, Tensor):
        return beta * constant + alpha * (left @ right)
    return torch.addmm(constant, left, right, beta=beta, alpha=alpha)


def _between(x: Tensor, y: Tensor, weight: Scalar) -> Tensor:
    return x + weight * (y - x) if isinstance(weight, Tensor) else torch.lerp(x, y, weight)


muon = Muon
