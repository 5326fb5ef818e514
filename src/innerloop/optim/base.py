"""What an optimizer is: a pure pair of functions on named tensors."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError

Scalar = int | float | Tensor
Hyper = Scalar | Mapping[str, Scalar]
"""A hyper-parameter: a number, a 0-dim tensor, or a mapping from parameter names to scalars or tensors of the parameter's shape."""

Params = Mapping[str, Tensor]
Grads = Mapping[str, Tensor | None]
ValueAndGrad = Callable[[Params], tuple[Tensor, Grads]]
"""The inner loss and its gradient at other parameters, for rules that evaluate it themselves."""


class Optimizer(abc.ABC):
    """A pure pair ``init(params) -> state``, ``update(grads, state, params, hyper) -> (params, state)``.

    Both are functions of their arguments alone, made of differentiable operations, and change none of them: they can be
    differentiated, vmapped and compiled like any other function.
    """

    compiles: bool = True
    """Whether ``torch.compile`` can follow ``update``: not where it decides by values, runs foreign code, or works on sparse tensors."""

    needs_closure: bool = False
    """Whether ``update`` evaluates the loss itself, and takes ``value_and_grad``, params -> (loss, gradients), as fifth argument."""

    @abc.abstractmethod
    def init(self, params: Params) -> Any:
        """The state before the first step.

        Args:
            params: named parameter tensors.

        Returns:
            A pytree of tensors and numbers.
        """

    @abc.abstractmethod
    def update(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], Any]:
        """One step.

        Args:
            grads: a gradient for each parameter; None (or no entry) leaves that parameter and its state as they are, as
                ``torch.optim`` does for ``p.grad is None``.
            state: what `init` or the last `update` returned.
            params: named parameter tensors.
            hyper: overrides of hyper-parameters, ``{"lr": tensor}``.

        Returns:
            ``(new_params, new_state)``.

        Raises:
            InvalidInputError: a gradient for an unknown parameter, an unknown or unusable hyper-parameter.
        """


class Rule(Optimizer):
    """An update rule of ``torch.optim``: a frozen dataclass whose fields are the constructor arguments there, in their order.

    It says which fields are real-valued (``hyper_names``) and gives the NamedTuple of its state (first field ``count``). Derive
    from `Elementwise` (one file per rule, one method to write), or from `PerTensor` if the rule looks at a tensor as a whole.
    """

    hyper_names: ClassVar[tuple[str, ...]]
    """The real-valued hyper-parameters, each replaceable by a tensor."""

    state_type: ClassVar[Any]
    """NamedTuple of the state: ``count`` first, then one field per tensor that the rule keeps for each parameter."""

    torch_class: ClassVar[type[torch.optim.Optimizer]]
    """The optimizer of ``torch.optim`` that it is equal to."""

    torch_state: ClassVar[Mapping[str, str]] = {}
    """State field -> key in ``torch.optim``'s ``state[p]``."""

    called: ClassVar[str] = ""
    """The name of the function, where that is not the class's in lower case."""

    torch_counts: ClassVar[bool] = True
    """Whether torch keeps the step count in ``state[p]``."""

    torch_count: ClassVar[str] = "step"
    """Under which key."""

    torch_shares_state: ClassVar[bool] = False
    """Whether torch keeps one state for all parameters, with the first of them."""

    torch_step: ClassVar[type] = Tensor
    """As what: a 0-dim tensor, or an int."""

    torch_from_constructor: ClassVar[tuple[str, ...]] = ()
    """Settings that torch takes from its constructor for all parameters, whatever their param group says."""

    by_torch_class: ClassVar[dict[type[torch.optim.Optimizer], type[Rule]]] = {}
    """Every rule that says its ``torch_class``."""

    def __init_subclass__(cls) -> None:
        if "torch_class" in vars(cls):
            Rule.by_torch_class[cls.torch_class] = cls

    @abc.abstractmethod
    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        """The state fields that the rule uses with these hyper-parameters; the others are None."""

    def validate(self, hyper: Mapping[str, Any]) -> None:
        """Raise if a hyper-parameter given as a number is out of its range; tensors are not inspected."""

    @abc.abstractmethod
    def restored(self, slot: str, named: Mapping[str, Any], params: Params) -> Any:
        """A state field from what torch keeps for each parameter (None where it keeps nothing yet); from one entry, if it is shared."""

    @classmethod
    def slots(cls) -> tuple[str, ...]:
        """The state fields that hold tensors."""
        return cls.state_type._fields[1:]

    def resolve(self, hyper: Mapping[str, Any] | None) -> dict[str, Any]:
        """Each of ``hyper_names`` -> its value here: the constructor's, or the override."""
        values = {name: getattr(self, name) for name in self.hyper_names}
        if not any_given(hyper):
            return values  # the constructor has looked at them
        assert hyper is not None
        for name, value in hyper.items():
            if name not in values:
                raise InvalidInputError(
                    f"{self!r} has no hyper-parameter {name!r}; it has {', '.join(self.hyper_names)}. "
                    "Flags such as nesterov or amsgrad cannot be tensors: set them in the constructor."
                )
            if isinstance(values[name], tuple) and not (isinstance(value, tuple) and len(value) == len(values[name])):
                raise InvalidInputError(
                    f"{name!r} is a {('pair', 'triple')[len(values[name]) - 2]}, but got {type(value).__name__}: write "
                    f"hyper={{{name!r}: ({', '.join(('first', 'second', 'third')[: len(values[name])])})}}, each a number or a tensor"
                )
        values |= hyper
        if not torch.compiler.is_compiling():  # a message with a symbolic number in it is not compiled
            self.validate(values)
        return values

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.repr and (field.name == "lr" or isinstance(value, (Tensor, Mapping)) or value != field.default):
                shown.append(f"{field.name}={_shown(value)}")
        return f"{self.called or type(self).__name__.lower()}({', '.join(shown)})"


def is_used(value: Hyper) -> bool:
    """Whether a term weighted by ``value`` is computed: a number 0 switches it off, a tensor never does (its gradient counts)."""
    return not isinstance(value, (int, float)) or value != 0


def add_scaled(x: Tensor, y: Tensor, alpha: Scalar) -> Tensor:
    """``x + alpha * y``; with a number, by the kernel that ``torch.optim`` uses, so that the bits agree."""
    return x + alpha * y if isinstance(alpha, Tensor) else torch.add(x, y, alpha=alpha)


def average(mean: Any, new: Tensor, beta: Any) -> Tensor:
    """β·mean + (1-β)·new."""
    if isinstance(beta, Tensor):
        return beta * mean + (1 - beta) * new
    return torch.lerp(mean, new, 1 - beta)


def average_of_squares(mean: Any, new: Tensor, beta: Any) -> Tensor:
    """β·mean + (1-β)·new²."""
    if isinstance(beta, Tensor):
        return beta * mean + (1 - beta) * (new * new)
    return torch.addcmul(mean * beta, new, new, value=1 - beta)


def at_first_step(count: Any, first: Scalar, later: Tensor) -> Tensor:
    """What a state holds before its first step: ``first``, which a hyper-parameter says; after that, ``later``."""
    if isinstance(count, Tensor):
        return torch.where(count == 1, torch.ones_like(later) * first, later)
    return torch.ones_like(later) * first if count == 1 else later


def check_betas(betas: Any) -> tuple[Any, Any]:
    """A pair of numbers in [0, 1), or of tensors."""
    require(isinstance(betas, (tuple, list)) and len(betas) == 2, f"betas={betas!r}: write a pair, betas=(0.9, 0.999)")
    for i, beta in enumerate(betas):
        for value in numbers(beta):
            require(0 <= value < 1, f"betas[{i}]={value} must be in [0, 1)")
    first, second = betas
    return first, second


def require(condition: bool, message: str) -> None:
    """Raise `InvalidInputError` unless ``condition``."""
    if not condition:
        raise InvalidInputError(message)


def numbers(value: Any) -> Iterator[float]:
    """The plain numbers in a hyper-parameter; tensors are not looked at, that would wait for the device."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, Mapping):
        yield from (v for v in value.values() if isinstance(v, (int, float)))


def check_nonnegative(hyper: Mapping[str, Any], *names: str) -> None:
    """Raise if a hyper-parameter among ``names`` is a negative number."""
    for name in names:
        for value in numbers(hyper[name]):
            require(value >= 0, f"{name}={value} is negative (or NaN); {name} must be >= 0")


def any_given(hyper: Any) -> bool:
    """Whether there are overrides of hyper-parameters; raise if they are not a mapping."""
    if hyper is None:
        return False
    if not isinstance(hyper, Mapping):
        raise InvalidInputError(f'hyper is {type(hyper).__name__}: write a dict, hyper={{"lr": tensor}}')
    return bool(hyper)


def check_state(owner: Any, state: Any, kind: type) -> None:
    """Raise if ``state`` is that of another kind of optimizer."""
    if not isinstance(state, kind):
        raise InvalidInputError(
            f"{owner!r} was given a state of type {type(state).__name__}, not {kind.__name__}: pass what init(params) or the last "
            "update returned"
        )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    return f"({', '.join(map(_shown, value))})" if isinstance(value, tuple) else repr(value)


def active_ones(grads: Grads, params: Params) -> dict[str, bool] | None:
    """Which parameters have a gradient; None if all have."""
    everything = True
    for name, p in params.items():
        g = grads.get(name)
        if g is None:
            everything = False
        elif g.shape != p.shape:
            raise InvalidInputError(
                f"the gradient of {name!r} has shape {tuple(g.shape)}, the parameter has {tuple(p.shape)}"
            )
    if len(grads) > len(params) or not everything:
        unknown = [name for name in grads if name not in params]
        if unknown:
            raise InvalidInputError(f"gradients for {unknown} but the parameters are {list(params)}")
    return None if everything else {name: grads.get(name) is not None for name in params}


def ages_of(count: Any, params: Params) -> tuple[dict[str, int] | None, list[Any]]:
    """Split parameters by step count: an index for each parameter, and the counts that the indices stand for."""
    if not isinstance(count, Mapping):
        return None, [count]
    distinct = sorted(set(count.values()))
    missing = [name for name in params if name not in count]
    if missing:
        raise InvalidInputError(f"the state knows no parameter {missing}: it belongs to other parameters")
    return {name: distinct.index(count[name]) for name in params}, distinct
