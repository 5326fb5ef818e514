r"""Pure functions on gradients, chained in front of an update rule.

.. math:: (g', s') = \tau(g, s, \theta, \lambda), \qquad (\theta', r') = u(\tau_n \circ \dots \circ \tau_1 (g), r, \theta)
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError
from innerloop.optim.base import Grads, Optimizer, Params, Scalar, any_given, check_state, numbers, require


class Transform(abc.ABC):
    """A pure pair on gradients, ``init(params) -> state`` and ``apply(grads, state, params, hyper) -> (grads, state)``.

    A subclass is a frozen dataclass, in lower case the function to write. A gradient that is None stays None: such a parameter is
    skipped by whatever comes after.
    """

    name: ClassVar[str]
    """What its hyper-parameters are addressed by: ``{"clip_by_global_norm.max_norm": tensor}``."""

    hyper_names: ClassVar[tuple[str, ...]] = ()
    """The real-valued arguments, each replaceable by a tensor."""

    def init(self, params: Params) -> Any:
        """The state before the first step: a pytree of tensors and numbers."""
        return ()

    @abc.abstractmethod
    def apply(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], Any]:
        """One step: ``(new_grads, new_state)``.

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
                raise InvalidInputError(f"{self.name}: {key}={value!r}: write a number or a 0-dim tensor")
            for number in numbers(value):
                require(number >= 0, f"{self.name}: {key}={number} is negative (or NaN); it must be >= 0")

    def resolve(self, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
        """The hyper-parameters, those of the constructor replaced by ``overrides``."""
        values = {key: getattr(self, key) for key in self.hyper_names} | dict(overrides or {})
        if overrides and not torch.compiler.is_compiling():
            self.validate(values)
        return values

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                shown.append(_shown(value))
            elif value is not field.default and (isinstance(value, (Tensor, Mapping)) or value != field.default):
                shown.append(f"{field.name}={_shown(value)}")
        return f"{self.name}({', '.join(shown)})"


class ChainState(NamedTuple):
    """The states of the transforms, in order, and that of the rule."""

    transforms: tuple[Any, ...]
    rule: Any


class Chain(Optimizer):
    r"""Transforms of the gradient, then an update rule: ``chain(clip_by_global_norm(1.0), adam())``.

    .. math:: g \leftarrow \tau_n(\dots \tau_1(g)), \qquad \theta' = u(g, \theta)

    Args:
        links: transforms in the order in which they see the gradient, and last an optimizer.

    Hyper-parameters in ``update`` (and in ``optimizer_hyper``): those of the rule by their names, those of a transform behind its own,
    ``{"lr": t0, "clip_by_global_norm.max_norm": t1}``. A second transform of the same kind is ``scale_2``, and so on.

    Raises:
        InvalidInputError: no optimizer at the end, or anything but transforms before it.

    Example:
        Weight decay, by a transform and by the rule's own.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.chain(innerloop.optim.add_decayed_weights(0.5), innerloop.optim.sgd(lr=0.1))
        >>> opt
        chain(add_decayed_weights(0.5), sgd(lr=0.1))
        >>> opt.hyper_names
        ('add_decayed_weights.weight_decay', 'lr', 'momentum', 'dampening', 'weight_decay')
        >>> params = {"w": torch.tensor(2.0)}
        >>> opt.update(params, opt.init(params), params)[0]  # 2 - .1 (2 + .5 * 2)
        {'w': tensor(1.7000)}
    """

    def __init__(self, *links: Transform | Optimizer) -> None:
        transforms = [link for link in links[:-1] if isinstance(link, Transform)]
        rule = links[-1] if links else None
        if not isinstance(rule, Optimizer) or len(transforms) < len(links) - 1:
            shown = ", ".join(repr(link) for link in links)
            raise InvalidInputError(
                f"chain({shown}): write transforms first and one optimizer last, "
                "chain(innerloop.optim.clip_by_global_norm(1.0), innerloop.optim.adam())"
            )
        inner: tuple[Any, ...] = ()
        if isinstance(rule, Chain):
            inner, rule = tuple(rule.transforms.values()), rule.rule
        if rule.needs_closure:
            raise InvalidInputError(
                f"chain(..., {rule!r}): this optimizer evaluates the loss and its gradients itself, past the transforms: put what they do "
                "into the loss, or use a rule that is handed one gradient"
            )
        self.rule: Optimizer = rule
        self.compiles = rule.compiles
        self.transforms: dict[str, Transform] = dict(_numbered((*transforms, *inner)))
        if (of_rule := getattr(rule, "hyper_names", None)) is not None:  # groups have those of their members
            self.hyper_names = (*self._own_names(), *of_rule)

    def init(self, params: Params) -> ChainState:
        return ChainState(tuple(t.init(params) for t in self.transforms.values()), self.rule.init(params))

    def update(
        self, grads: Grads, state: ChainState, params: Params, hyper: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], ChainState]:
        check_state(self, state, ChainState)
        of_transforms, of_rule = self._split(hyper)
        grads, states = _checked(grads, params), []
        for (name, transform), before in zip(self.transforms.items(), state.transforms, strict=True):
            grads, after = transform.apply(grads, before, params, transform.resolve(of_transforms.get(name)))
            states.append(after)
        new_params, rule = self.rule.update(grads, state.rule, params, of_rule)
        return new_params, ChainState(tuple(states), rule)

    def _own_names(self) -> tuple[str, ...]:
        return tuple(f"{name}.{key}" for name, transform in self.transforms.items() for key in transform.hyper_names)

    def _split(self, hyper: Mapping[str, Any] | None) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
        """The overrides of each transform, and those of the rule."""
        if not any_given(hyper):
            return {}, None
        assert hyper is not None
        own, of_transforms, of_rule = set(self._own_names()), {}, {}  # type: ignore[var-annotated]
        known = getattr(self, "hyper_names", None)
        for key, value in hyper.items():
            name, _, inner = key.rpartition(".")
            if key in own:
                of_transforms.setdefault(name, {})[inner] = value
            elif name in self.transforms or (known is not None and key not in known):
                raise InvalidInputError(
                    f"{self!r} has no hyper-parameter {key!r}; it has {', '.join(known or own)}. What is not real-valued cannot be a "
                    "tensor: set it in the constructor"
                )
            else:
                of_rule[key] = value
        return of_transforms, of_rule or None

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, (*self.transforms.values(), self.rule)))})"


chain = Chain


def _numbered(transforms: Sequence[Transform]) -> Iterator[tuple[str, Transform]]:
    seen: dict[str, int] = {}
    for transform in transforms:
        count = seen[transform.name] = seen.get(transform.name, 0) + 1
        yield transform.name if count == 1 else f"{transform.name}_{count}", transform


def _checked(grads: Grads, params: Params) -> dict[str, Tensor | None]:
    """A gradient or None for each parameter; a transform that adds could hide a wrong shape from the rule."""
    unknown = [name for name in grads if name not in params]
    if unknown:
        raise InvalidInputError(f"gradients for {unknown} but the parameters are {list(params)}")
    for name, g in grads.items():
        if g is not None and g.shape != params[name].shape:
            raise InvalidInputError(
                f"the gradient of {name!r} has shape {tuple(g.shape)}, the parameter has {tuple(params[name].shape)}"
            )
    return {name: grads.get(name) for name in params}


def each(grads: Grads, fn: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor | None]:
    """``fn(name, gradient)`` for each gradient that there is, in the dtype of the gradient."""
    return {name: None if g is None else cast_like(fn(name, g), g) for name, g in grads.items()}


def cast_like(result: Tensor, g: Tensor) -> Tensor:
    """A 0-dim tensor of another dtype does not change that of a product, but does inside vmap."""
    return result if result.dtype == g.dtype else result.to(g.dtype)


def one_value(value: Any, what: str) -> Scalar:
    """A hyper-parameter that all parameters share."""
    if isinstance(value, Mapping):
        raise InvalidInputError(f"{what} is given per parameter, but all share it: write one number or a 0-dim tensor")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise InvalidInputError(f"{what} is a tensor of shape {tuple(value.shape)}: write a number or a 0-dim tensor")
    return value.reshape(()) if isinstance(value, Tensor) else value


def value_of(value: Any, what: str, name: str, like: Tensor | None = None) -> Scalar:
    """The hyper-parameter of one parameter; of its shape, if ``like`` says which that is."""
    if not isinstance(value, Mapping):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise InvalidInputError(
                f"{what} is a tensor of shape {tuple(value.shape)}: write a 0-dim tensor for all parameters, or one per parameter by "
                f"name, {{{name!r}: tensor, ...}}"
            )
        return one_value(value, what)
    if name not in value:
        raise InvalidInputError(f"{what} is given per parameter, but has no entry for {name!r}; it has {list(value)}")
    entry = value[name]
    if like is not None and isinstance(entry, Tensor) and entry.shape == like.shape:
        return entry
    return one_value(entry, f"{what}[{name!r}]")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    return getattr(value, "__name__", repr(value)) if callable(value) else repr(value)
