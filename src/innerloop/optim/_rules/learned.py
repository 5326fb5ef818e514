"""An update rule that is a function of its own weights: learned optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Grads, Params
from innerloop.errors import InvalidInputError
from innerloop.optim._base import Optimizer
from innerloop.optim._engine.precision import warn_of_half
from innerloop.optim._settings import check_state, has_overrides


class LearnedState(NamedTuple):
    """What the rule keeps, per parameter."""

    kept: dict[str, Any]


# A carry can be loaded by torch.load with its default, weights_only=True.
torch.serialization.add_safe_globals([LearnedState])


class Learned(Optimizer):
    r"""An optimizer that you write, or train: a function with weights :math:`\phi`, per parameter.

    .. math::
        (\Delta_t, s_t) = f_\phi(g_t, \theta_{t-1}, s_{t-1}), \qquad
        \theta_t = \theta_{t-1} + \Delta_t

    (Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", 2016). ``fn``
    is free to build features (momenta at several time scales, say) and to hand them to a network
    entry by entry; what it keeps from step to step is its state. The weights are a hyper-parameter,
    ``hyper={"weights": ...}``, and get their meta-gradient like every other one: ``Problem(loss,
    learned(fn), optimizer_hyper=lambda hyper, t: {"weights": hyper})``.

    Args:
        fn: ``fn(grad, param, state, weights) -> (change, new_state)`` for one parameter;
            differentiable operations that change none of their arguments.
        weights: a mapping of tensors (a network's, ``dict(net.named_parameters())``), handed to
            ``fn``; None: they come through ``hyper``.
        init: ``init(param) -> state``, a pytree of tensors and numbers; default: no state.

    Raises:
        InvalidInputError: ``fn`` is no function, there are no weights, or the change has another
            shape than the parameter.

    Example:
        Gradient descent with a learned rate. On the loss p²/2 two steps give p₂ = (1 - η)² p₀, so d
        p₂/d η = -2 (1 - η) p₀.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.learned(
        ...     lambda grad, param, state, weights: (-weights["rate"] * grad, state)
        ... )
        >>> def two_steps(rate):
        ...     params, state = {"p": torch.tensor(8.0)}, opt.init({"p": torch.tensor(8.0)})
        ...     for _ in range(2):
        ...         params, state = opt.update(
        ...             {"p": params["p"]}, state, params, {"weights": {"rate": rate}}
        ...         )
        ...     return params["p"]
        >>> torch.func.grad(two_steps)(torch.tensor(0.5))
        tensor(-8.)
    """

    hyper_names = ("weights",)

    def __init__(
        self,
        fn: Callable[[Tensor, Tensor, Any, Any], tuple[Tensor, Any]],
        weights: Mapping[str, Any] | None = None,
        *,
        init: Callable[[Tensor], Any] | None = None,
    ) -> None:
        for what, value in (("fn", fn), ("init", init)):
            if not callable(value) and not (what == "init" and value is None):
                raise InvalidInputError(
                    f"learned: {what}={value!r} is no function: write fn(grad, param, state, "
                    "weights) -> (change, new_state) and "
                    "init(param) -> state"
                )
        _check_weights(weights, or_none=True)
        self.fn = fn
        self.weights = weights
        self._init = init

    def init(self, params: Params) -> LearnedState:
        return LearnedState(
            {name: None if self._init is None else self._init(p) for name, p in params.items()}
        )

    def update(
        self,
        grads: Grads,
        state: LearnedState,
        params: Params,
        hyper: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Tensor], LearnedState]:
        check_state(self, state, LearnedState)
        has_overrides(hyper)
        unknown = [f"gradient {name!r}" for name in grads if name not in params]
        unknown += [
            f"hyper-parameter {key!r}" for key in hyper or {} if key not in self.hyper_names
        ]
        if unknown:
            raise InvalidInputError(
                f"{self!r} does not know the {', the '.join(unknown)}: its parameters are "
                f"{list(params)}, its hyper-parameter is 'weights'"
            )
        weights = (hyper or {}).get("weights", self.weights)
        _check_weights(weights)
        if missing := [name for name in params if name not in state.kept]:
            raise InvalidInputError(
                f"the state knows no parameter {missing}: it belongs to other parameters"
            )
        new_params, kept = dict(params), dict(state.kept)
        for name, param in params.items():
            g = grads.get(name)
            if g is None:
                continue
            if g.shape != param.shape:
                raise InvalidInputError(
                    f"the gradient of {name!r} has shape {tuple(g.shape)}, the parameter has "
                    f"{tuple(param.shape)}"
                )
            new_params[name], kept[name] = self._step(name, g, param, kept[name], weights)
        return new_params, LearnedState(kept)

    def _step(
        self, name: str, grad: Tensor, param: Tensor, state: Any, weights: Any
    ) -> tuple[Tensor, Any]:
        result = self.fn(grad, param, state, weights)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor):
            raise InvalidInputError(
                f"learned: fn returned {type(result).__name__} for {name!r}: write a pair "
                "(change, new_state)"
            )
        change, after = result
        if change.shape != param.shape:
            raise InvalidInputError(
                f"learned: fn returned a change of shape {tuple(change.shape)} for {name!r}, "
                f"which has {tuple(param.shape)}"
            )
        new = param + change.to(param.dtype)
        warn_of_half(new)
        return new, after

    def __repr__(self) -> str:
        return f"learned({getattr(self.fn, '__name__', repr(self.fn))})"


learned = Learned


def _check_weights(weights: object, or_none: bool = False) -> None:
    if isinstance(weights, Mapping) or (or_none and weights is None):
        return
    raise InvalidInputError(
        f"learned: weights is {type(weights).__name__}: write a mapping of tensors, learned(fn, "
        "dict(net.named_parameters())), or "
        'hand them in at each update, hyper={"weights": {...}} (from a Problem: '
        'optimizer_hyper=lambda hyper, t: {"weights": hyper})'
    )
