"""SparseAdam: Adam on those entries only for which there is a gradient.

``nn.Embedding(sparse=True)`` gives such gradients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Hyper, Scalar
from innerloop.errors import InvalidInputError
from innerloop.optim._engine.numerics import one_minus_power, safe_sqrt
from innerloop.optim._engine.per_tensor import PerTensor
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_betas, check_nonnegative, numbers, require


class SparseAdamState(NamedTuple):
    """Steps taken, first and second moments."""

    count: Any
    mu: Any
    nu: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SparseAdam(PerTensor):
    r"""Adam on the entries that a sparse gradient holds; the moments of the others do not decay.

    .. math::
        m_t = m_{t-1} + (1 - \beta_1) (g_t - m_{t-1}), \quad
        v_t = v_{t-1} + (1 - \beta_2) (g_t^2 - v_{t-1}), \quad
        \theta_t = \theta_{t-1}
        - \eta\, \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m_t}{\sqrt{v_t} + \epsilon}.

    Gradients must be sparse COO tensors; they keep their graph, so that meta-gradients pass
    through. The derivative of the root is taken as 0 where its argument is 0.

    Args:
        lr: step size :math:`\eta`.
        betas: :math:`(\beta_1, \beta_2)`; each may be a tensor.
        eps: :math:`\epsilon`.
        maximize: ascend instead of descend.

    Example:
        Row 1 was not looked up: it stays, and its derivative in lr is 0. Row 0 moves by lr: the
            derivative is of size 1.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.sparse_adam()
        >>> def one_step(lr):
        ...     params = {"w": torch.zeros(2, 1)}
        ...     loss = lambda w: torch.nn.functional.embedding(
        ...         torch.tensor([0]), w, sparse=True
        ...     ).sum()
        ...     grads = {"w": torch.func.grad(loss)(params["w"])}
        ...     return opt.update(grads, opt.init(params), params, {"lr": lr})[0]["w"].flatten()
        >>> abs(torch.func.jacrev(one_step)(torch.tensor(0.1))).round(decimals=4)
        tensor([1., 0.])
    """

    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    maximize: bool = False

    takes_sparse = True
    called: ClassVar = "sparse_adam"
    shaped: ClassVar = ()
    hyper_names: ClassVar = ("lr", "betas", "eps")
    state_type: ClassVar = SparseAdamState
    torch_layout: ClassVar = TorchLayout(
        torch.optim.SparseAdam, {"mu": "exp_avg", "nu": "exp_avg_sq"}, count_type=int
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "compiles", False)  # torch.compile takes no sparse tensors
        object.__setattr__(self, "betas", check_betas(self.betas))
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        check_nonnegative(hyper, "lr", "eps")
        check_betas(hyper["betas"])
        for name in ("lr", "eps"):
            for value in numbers(hyper[name]):
                require(
                    value > 0,
                    f"{name}={value}: SparseAdam needs {name} > 0, as in torch.optim (a tensor "
                    "may be 0)",
                )

    def accept(self, name: str, param: Tensor) -> None:
        if param.is_complex() or param.is_sparse:
            raise InvalidInputError(
                f"SparseAdam needs real, dense parameters, but {name!r} is {param.dtype}, "
                f"{param.layout}: use adam for it"
            )

    def start(self, param: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(param), torch.zeros_like(param)

    def step(
        self, grad: Tensor, param: Tensor, state: SparseAdamState, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, SparseAdamState]:
        if not grad.is_sparse:
            raise InvalidInputError(
                f"SparseAdam was given a dense gradient (shape {tuple(grad.shape)}): write adam, "
                "or make the gradient sparse, "
                "nn.Embedding(..., sparse=True)"
            )
        lr, (beta1, beta2), eps = hyper["lr"], hyper["betas"], hyper["eps"]
        grad = (-grad if self.maximize else grad).coalesce()
        where, values = tuple(grad.indices().unbind()), grad.values()
        old_mu, old_nu = state.mu[where], state.nu[where]
        moved_mu = (values - old_mu) * (1 - beta1)
        moved_nu = (values * values - old_nu) * (1 - beta2)
        numerator, square = moved_mu + old_mu, moved_nu + old_nu
        size = (
            lr
            * _sqrt(one_minus_power(beta2, state.count, param))
            / one_minus_power(beta1, state.count, param)
        )
        change = -size * (numerator / (safe_sqrt(square) + eps))
        new_mu = state.mu.index_put(where, moved_mu, accumulate=True)
        new_nu = state.nu.index_put(where, moved_nu, accumulate=True)
        new = param.index_put(where, change.to(param.dtype), accumulate=True)
        return new, SparseAdamState(state.count, new_mu, new_nu)


def _sqrt(value: Scalar) -> Scalar:
    return value**0.5 if isinstance(value, Tensor) else math.sqrt(value)


sparse_adam = SparseAdam
