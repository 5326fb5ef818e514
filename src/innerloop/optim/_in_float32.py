"""An optimizer that computes in float32 for parameters in half precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Grads, Params
from innerloop.errors import InvalidInputError
from innerloop.optim._base import Optimizer
from innerloop.optim._engine.precision import warn_of_half
from innerloop.optim._settings import check_state

_HALF = (torch.float16, torch.bfloat16)


class InFloat32State(NamedTuple):
    """The float32 copies of the parameters (None without ``master``), and the rule's state."""

    master: dict[str, Tensor] | None
    rule: Any


# A carry can be loaded by torch.load with its default, weights_only=True.
torch.serialization.add_safe_globals([InFloat32State])


class InFloat32(Optimizer):
    r"""The same optimizer with state and arithmetic in float32, for float16 and bfloat16.

    .. math::
        (\bar\theta', s') = u(\bar g, s, \bar\theta), \qquad
        \theta' = \operatorname{round}(\bar\theta'),

    where a bar means float32 and :math:`\bar\theta` is the parameter itself or, with ``master``,
    the copy that the last step left (Micikevicius et al., "Mixed precision training", 2018). Other
    parameters are handed through.

    Without ``master`` an update smaller than half a unit in the last place of a weight is lost, and
    derivatives along the identity path are rounded at every step. With it neither is. What comes
    from a loss in half precision is rounded either way, and so is its Hessian: for second-order
    gradients run the loss in float32 too. Measured, the cosine of the meta-gradient to that in
    float64, for a tanh network of 1,312 weights (Adam 60 steps, Adam 200, SGD with momentum 200):
    all in float32 1.000, 1.000, 1.000; all in bfloat16 .961, .965, .415; with a master copy .972,
    .992, -.739. The copy helps the forward pass; it does not make a long loop differentiable.

    Args:
        optimizer: from `innerloop.optim`.
        master: keep a float32 copy of the parameters in the state. It is what is trained: the
            derivative with respect to the parameters of a *carry* is at a fixed copy, as it is at
            fixed momentum; a change written into a parameter between steps is added to its copy, as
            a constant.

    Raises:
        InvalidInputError: ``optimizer`` is none.

    Example:
        A bfloat16 number has 8 bits, so 1 - 1/1024 is rounded back to 1, however often.

        >>> import torch, innerloop
        >>> def hundred_steps(opt):
        ...     params = {"w": torch.ones((), dtype=torch.bfloat16)}
        ...     state = opt.init(params)
        ...     for _ in range(100):
        ...         params, state = opt.update({"w": torch.ones_like(params["w"])}, state, params)
        ...     return params["w"]
        >>> sgd = innerloop.optim.sgd(lr=1 / 1024)
        >>> (
        ...     hundred_steps(sgd),
        ...     hundred_steps(innerloop.optim.in_float32(sgd, master=True)),
        ... )  # 1 - 100/1024 = .9023
        (tensor(1., dtype=torch.bfloat16), tensor(0.9023, dtype=torch.bfloat16))
    """

    def __init__(self, optimizer: Optimizer, *, master: bool = False) -> None:
        if not isinstance(optimizer, Optimizer):
            raise InvalidInputError(
                f"in_float32({optimizer!r}): write an optimizer of innerloop.optim, "
                "in_float32(innerloop.optim.adam())"
            )
        if optimizer.needs_closure:
            raise InvalidInputError(
                f"in_float32({optimizer!r}): this optimizer evaluates the loss and its gradients "
                "itself, at parameters in their own dtype: "
                "run the inner loop in float32"
            )
        self.optimizer = optimizer
        self.compiles = optimizer.compiles
        self.takes_sparse = optimizer.takes_sparse
        self.master = master
        if (
            names := getattr(optimizer, "hyper_names", None)
        ) is not None:  # groups have those of their members
            self.hyper_names = names

    def init(self, params: Params) -> InFloat32State:
        wide = {name: _wide(p) for name, p in params.items()}
        copies = {name: wide[name] for name, p in params.items() if p.dtype in _HALF}
        return InFloat32State(copies if self.master else None, self.optimizer.init(wide))

    def update(
        self,
        grads: Grads,
        state: InFloat32State,
        params: Params,
        hyper: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Tensor], InFloat32State]:
        check_state(self, state, InFloat32State)
        copies = state.master or {}
        given = {n: _followed(copies[n], p) if n in copies else _wide(p) for n, p in params.items()}
        wide_grads = {name: None if g is None else _wide(g) for name, g in grads.items()}
        updated, rule = self.optimizer.update(wide_grads, state.rule, given, hyper)
        new_params = {
            n: p if grads.get(n) is None else updated[n].to(p.dtype) for n, p in params.items()
        }
        for p in new_params.values():
            warn_of_half(p)
        return new_params, InFloat32State(
            {n: updated[n] for n in copies} if self.master else None, rule
        )

    def __repr__(self) -> str:
        return f"in_float32({self.optimizer!r}{', master=True' if self.master else ''})"


in_float32 = InFloat32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def _followed(copy: Tensor, param: Tensor) -> Tensor:
    """Return the copy plus what has been written into the parameter since.

    Where nothing was written that is 0, and it always is a constant.
    """
    return copy + (param.float() - copy.to(param.dtype).float()).detach()
