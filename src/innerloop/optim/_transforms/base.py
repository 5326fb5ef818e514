r"""Pure functions on gradients, chained in front of an update rule.

.. math::
    (g', s') = \tau(g, s, \theta, \lambda), \qquad
    (\theta', r') = u(\tau_n \circ \dots \circ \tau_1 (g), r, \theta)
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from innerloop._types import Grads, Params, Scalar
from innerloop._utils.arguments import check_fields
from innerloop._utils.execution import Mode, mode
from innerloop.errors import InvalidInputError
from innerloop.optim._settings import numbers, require


class Transform(abc.ABC):
    """A pair ``init(params) -> state``, ``apply(grads, state, params, hyper) -> (grads, state)``.

    A subclass is a frozen dataclass, in lower case the function to write. A gradient that is None
    stays None: such a parameter is skipped by whatever comes after.
    """

    name: ClassVar[str]
    """What its hyper-parameters are addressed by: ``{"clip_by_global_norm.max_norm": tensor}``."""

    hyper_names: ClassVar[tuple[str, ...]] = ()
    """The real-valued arguments, each replaceable by a tensor."""

    def __post_init__(self) -> None:
        """Check what the fields hold; a class with checks of its own calls this first."""
        check_fields(self)

    def init(self, params: Params) -> Any:
        """Return the state before the first step: a pytree of tensors and numbers."""
        return ()

    @abc.abstractmethod
    def apply(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], Any]:
        """Take one step: return ``(new_grads, new_state)``.

        Args:
            grads: a gradient, or None, for each of ``params``.
            state: what `init` or the last `apply` returned.
            params: named parameter tensors.
            hyper: a value for each of ``hyper_names``.
        """

    def validate(self, hyper: Mapping[str, Any]) -> None:
        """Raise if a value given as a number is out of its range; tensors are not inspected."""
        for key in self.hyper_names:
            value = hyper[key]
            if not isinstance(value, (int, float, Tensor, Mapping)):
                raise InvalidInputError(
                    f"{self.name}: {key}={value!r}: write a number or a 0-dim tensor"
                )
            for number in numbers(value):
                require(
                    number >= 0,
                    f"{self.name}: {key}={number} is negative (or NaN); it must be >= 0",
                )

    def resolve(self, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the hyper-parameters, those of the constructor replaced by ``overrides``."""
        values = {key: getattr(self, key) for key in self.hyper_names} | dict(overrides or {})
        if overrides and mode() is not Mode.COMPILING:
            self.validate(values)
        return values

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                shown.append(_shown(value))
            elif value is not field.default and (
                isinstance(value, (Tensor, Mapping)) or value != field.default
            ):
                shown.append(f"{field.name}={_shown(value)}")
        return f"{self.name}({', '.join(shown)})"


def each(grads: Grads, fn: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor | None]:
    """Apply ``fn(name, gradient)`` to each gradient that there is, and keep its dtype."""
    return {name: None if g is None else cast_like(fn(name, g), g) for name, g in grads.items()}


def cast_like(result: Tensor, g: Tensor) -> Tensor:
    """Cast a 0-dim tensor: inside vmap, unlike outside, it would change the dtype of a product."""
    return result if result.dtype == g.dtype else result.to(g.dtype)


def one_value(value: Any, what: str) -> Scalar:
    """Return a hyper-parameter that all parameters share."""
    if isinstance(value, Mapping):
        raise InvalidInputError(
            f"{what} is given per parameter, but all share it: write one number or a 0-dim tensor"
        )
    if isinstance(value, Tensor) and value.numel() != 1:
        raise InvalidInputError(
            f"{what} is a tensor of shape {tuple(value.shape)}: write a number or a 0-dim tensor"
        )
    return value.reshape(()) if isinstance(value, Tensor) else value


def value_of(value: Any, what: str, name: str, like: Tensor | None = None) -> Scalar:
    """Return the hyper-parameter of one parameter; of its shape, if ``like`` says which that is."""
    if not isinstance(value, Mapping):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise InvalidInputError(
                f"{what} is a tensor of shape {tuple(value.shape)}: write a 0-dim tensor for all "
                "parameters, or one per parameter by "
                f"name, {{{name!r}: tensor, ...}}"
            )
        return one_value(value, what)
    if name not in value:
        raise InvalidInputError(
            f"{what} is given per parameter, but has no entry for {name!r}; it has {list(value)}"
        )
    entry = value[name]
    if like is not None and isinstance(entry, Tensor) and entry.shape == like.shape:
        return entry
    return one_value(entry, f"{what}[{name!r}]")


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    return getattr(value, "__name__", repr(value)) if callable(value) else repr(value)
