"""Update rules that look at a parameter as a whole: its rows and columns, its norm."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from innerloop._types import Grads, Params, Scalar
from innerloop.errors import InvalidInputError
from innerloop.optim._base import Rule
from innerloop.optim._engine.grads import which_have_gradient
from innerloop.optim._engine.precision import warn_of_half
from innerloop.optim._settings import check_state


class PerTensor(Rule):
    """A rule that treats every parameter on its own: the state maps names to tensors of any shape.

    To write: `start`, `step` and, if some parameters cannot be treated, `accept`.
    """

    shaped: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    """Hyper-parameters that may have the parameter's shape; the others are one number each."""

    @abc.abstractmethod
    def start(self, param: Tensor) -> tuple[Tensor | None, ...]:
        """Return the state's fields for one parameter before the first step."""

    @abc.abstractmethod
    def step(
        self, grad: Tensor, param: Tensor, state: Any, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """Compute ``(new_param, new_state)`` of one parameter.

        Args:
            grad: the gradient.
            param: the parameter.
            state: ``state_type`` with what `start` made or the last step returned, and ``count``,
                the number of the step being taken (1 at the first one).
            hyper: each of ``hyper_names``: a number, a 0-dim tensor, or a tensor of the shape of
                ``param``.
        """

    def accept(self, name: str, param: Tensor) -> None:
        """Raise if the rule cannot treat this parameter."""

    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return self.slots()

    def init(self, params: Params) -> Any:
        for name, param in params.items():
            self.accept(name, param)
        started = {name: self.start(param) for name, param in params.items()}
        return self.state_type(
            0, *({n: s[i] for n, s in started.items()} for i in range(len(self.slots())))
        )

    def restored(
        self, slot: str, named: Mapping[str, Any], params: Params
    ) -> dict[str, Tensor | None]:
        i = self.slots().index(slot)
        return {
            n: self.start(params[n])[i] if v is None else v.detach().clone()
            for n, v in named.items()
        }

    def update(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], Any]:
        check_state(self, state, self.state_type)
        resolved = self.resolve(hyper)
        active = which_have_gradient(grads, params)
        counts = (
            state.count if isinstance(state.count, Mapping) else dict.fromkeys(params, state.count)
        )
        missing = [
            name for name in params if any(name not in held for held in (counts, *state[1:]))
        ]
        if missing:
            raise InvalidInputError(
                f"the state knows no parameter {missing}: it belongs to other parameters"
            )
        new, slots = dict(params), [dict(held) for held in state[1:]]
        for name, param in params.items():
            grad = grads.get(name)
            self.accept(name, param)
            if grad is not None:
                before = self.state_type(counts[name] + 1, *(held[name] for held in slots))
                values = {
                    key: self._value(key, value, name, param) for key, value in resolved.items()
                }
                stepped, after = self.step(grad, param, before, values)
                new[name] = stepped.to(param.dtype)
                warn_of_half(new[name])
                for held, tensor in zip(slots, after[1:], strict=True):
                    held[name] = tensor
        if active is None and not isinstance(state.count, Mapping):
            count = state.count + 1
        elif active is not None and not any(active.values()):
            count = state.count
        else:
            count = {name: n + (active is None or active[name]) for name, n in counts.items()}
        return new, self.state_type(count, *slots)

    def _value(self, key: str, value: object, name: str, param: Tensor) -> Any:
        """Return a hyper-parameter for one parameter."""
        if isinstance(value, tuple):
            return tuple(self._value(key, part, name, param) for part in value)
        if isinstance(value, Mapping):
            if name not in value:
                raise InvalidInputError(
                    f"hyper-parameter {key!r} is given per parameter, but has no entry for "
                    f"{[name]}; it has {list(value)}"
                )
            value = value[name]
            if isinstance(value, Tensor) and value.shape == param.shape and key in self.shaped:
                return value
            one = (
                "one number or a tensor of the parameter's shape"
                if key in self.shaped
                else "one number"
            )
            if isinstance(value, Tensor) and value.numel() != 1:
                raise InvalidInputError(
                    f"{key}[{name!r}] has shape {tuple(value.shape)}, the parameter has "
                    f"{tuple(param.shape)}: write {one}"
                )
        if isinstance(value, Tensor) and value.numel() != 1:
            raise InvalidInputError(
                f"hyper-parameter {key!r} is a tensor of shape {tuple(value.shape)}: write a "
                "0-dim tensor for all parameters, "
                f"or one tensor per parameter by name, {{{key!r}: {{{name!r}: tensor, ...}}}}"
            )
        if value is not None and not isinstance(value, (int, float, Tensor)):
            raise InvalidInputError(
                f"hyper-parameter {key!r} is {value!r}: write a number, a 0-dim tensor, or a "
                "mapping from parameter names to tensors"
            )
        return value.reshape(()) if isinstance(value, Tensor) else value


def with_derivative_of(value: Tensor, smooth: Tensor) -> Tensor:
    """Return the bits of ``value`` with the derivatives of ``smooth``."""
    return value.detach() + (smooth - smooth.detach())


def at_least(x: Tensor, bound: Scalar) -> Tensor:
    """Compute max(x, bound)."""
    return torch.maximum(x, bound.to(x.dtype)) if isinstance(bound, Tensor) else x.clamp_min(bound)
