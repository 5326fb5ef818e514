"""What an optimizer is: a pure pair of functions on named tensors."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from innerloop._types import Grads, Params
from innerloop._utils.arguments import check_fields
from innerloop._utils.execution import Mode, mode
from innerloop.errors import InvalidInputError
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import has_overrides, text_of


class Optimizer(abc.ABC):
    """A pair ``init(params) -> state``, ``update(grads, state, params, hyper) -> (params, state)``.

    Both are functions of their arguments alone, made of differentiable operations, and change none
    of them: they can be differentiated, vmapped and compiled like any other function.
    """

    compiles: bool = True
    """True if ``torch.compile`` can follow ``update``.

    It cannot where ``update`` decides by values, runs foreign code, or works on sparse tensors.
    """

    takes_sparse: bool = False
    """True if ``update`` works on sparse gradients; for other rules they are made dense first."""

    needs_closure: bool = False
    """True if ``update`` evaluates the loss itself.

    It then takes ``value_and_grad``, params -> (loss, gradients), as fifth argument.
    """

    @abc.abstractmethod
    def init(self, params: Params) -> Any:
        """Return the state before the first step.

        Args:
            params: named parameter tensors.

        Returns:
            A pytree of tensors and numbers.
        """

    @abc.abstractmethod
    def update(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], Any]:
        """Take one step.

        Args:
            grads: a gradient for each parameter; None (or no entry) leaves that parameter and its
                state as they are, as ``torch.optim`` does for ``p.grad is None``.
            state: what `init` or the last `update` returned.
            params: named parameter tensors.
            hyper: overrides of hyper-parameters, ``{"lr": tensor}``.

        Returns:
            ``(new_params, new_state)``.

        Raises:
            InvalidInputError: a gradient for an unknown parameter, an unknown or unusable
                hyper-parameter.
        """


class Rule(Optimizer):
    """An update rule of ``torch.optim``: a frozen dataclass with its constructor's arguments.

    The fields stand in the order of the arguments there.

    It says which fields are real-valued (``hyper_names``) and gives the NamedTuple of its state
    (first field ``count``). Derive from `Elementwise` (one file per rule, one method to write), or
    from `PerTensor` if the rule looks at a tensor as a whole.
    """

    hyper_names: ClassVar[tuple[str, ...]]
    """The real-valued hyper-parameters, each replaceable by a tensor."""

    state_type: ClassVar[Any]
    """NamedTuple of the state: ``count`` first, then the tensors kept for each parameter."""

    torch_layout: ClassVar[TorchLayout]
    """The optimizer of ``torch.optim`` that it is equal to, and how that one keeps its state.

    A rule that has no counterpart there does without.
    """

    called: ClassVar[str] = ""
    """The name of the function, where that is not the class's in lower case."""

    by_torch_class: ClassVar[dict[type[torch.optim.Optimizer], type[Rule]]] = {}
    """Every rule that has a ``torch_layout`` of its own, by the class named there."""

    def __init_subclass__(cls) -> None:
        if "torch_layout" in vars(cls):
            Rule.by_torch_class[cls.torch_layout.torch_class] = cls
        if "state_type" in vars(cls):
            # torch.load, with its default weights_only=True, makes instances of such classes only.
            torch.serialization.add_safe_globals([cls.state_type])

    def __post_init__(self) -> None:
        """Check what the fields hold; a class with checks of its own calls this first."""
        check_fields(self)

    @abc.abstractmethod
    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the state fields in use with these hyper-parameters; the others are None."""

    def validate(self, hyper: Mapping[str, Any]) -> None:
        """Raise if a hyper-parameter given as a number is out of its range.

        Tensors are not inspected.
        """

    @abc.abstractmethod
    def restored(self, slot: str, named: Mapping[str, Any], params: Params) -> Any:
        """Build a state field from what torch keeps for each parameter.

        That is None where torch keeps nothing yet, and one entry if the state is shared.
        """

    @classmethod
    def slots(cls) -> tuple[str, ...]:
        """Return the state fields that hold tensors."""
        return cls.state_type._fields[1:]

    def resolve(self, hyper: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the value of each of ``hyper_names``: the constructor's, or the override."""
        values = {name: getattr(self, name) for name in self.hyper_names}
        if not has_overrides(hyper):
            return values  # the constructor has looked at them
        assert hyper is not None
        for name, value in hyper.items():
            if name not in values:
                raise InvalidInputError(
                    f"{self!r} has no hyper-parameter {name!r}; it has "
                    f"{', '.join(self.hyper_names)}. "
                    "Flags such as nesterov or amsgrad cannot be tensors: set them in the "
                    "constructor."
                )
            if isinstance(values[name], tuple) and not (
                isinstance(value, tuple) and len(value) == len(values[name])
            ):
                raise InvalidInputError(
                    f"{name!r} is a {('pair', 'triple')[len(values[name]) - 2]}, but got "
                    f"{type(value).__name__}: write "
                    f"hyper={{{name!r}: "
                    f"({', '.join(('first', 'second', 'third')[: len(values[name])])})}}, each a "
                    "number or a tensor"
                )
        values |= hyper
        # A message with a symbolic number in it cannot be compiled.
        if mode() is not Mode.COMPILING:
            self.validate(values)
        return values

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.repr and (
                field.name == "lr" or isinstance(value, (Tensor, Mapping)) or value != field.default
            ):
                shown.append(f"{field.name}={text_of(value)}")
        return f"{self.called or type(self).__name__.lower()}({', '.join(shown)})"


def refuse_uncompiled(optimizer: Optimizer) -> None:
    """Raise if an optimizer cannot be compiled."""
    if not optimizer.compiles:
        raise InvalidInputError(
            f"{optimizer!r} cannot be compiled: it runs foreign in-place code, decides "
            "by values, or works on sparse tensors. "
            "Write compile=False, or use another rule of innerloop.optim"
        )


def refuse_class(optimizer: object) -> None:
    """Raise if ``optimizer`` is a class, where one of its instances is needed."""
    if not isinstance(optimizer, type):
        return
    write = "innerloop.optim.sgd(lr=0.1)"
    if issubclass(optimizer, Rule):
        write = f"innerloop.optim.{optimizer.called or optimizer.__name__.lower()}(lr=0.1)"
    elif issubclass(optimizer, torch.optim.Optimizer):
        write = f"{optimizer.__name__}(model.parameters(), lr=0.1)"
    raise InvalidInputError(
        f"optimizer is the class {optimizer.__name__}, not an optimizer: call it, {write}"
    )
