"""An optimizer object as a pytree: the tensors that it keeps, and everything else, frozen.

State lives in three places (``state[p]``, the param groups, the object itself), may be nested,
shared, and made during a step. Pickle knows how to walk all that; its persistent ids take out what
must not be copied: tensors, parameters, functions.
"""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop._utils import tree
from innerloop.errors import InvalidInputError
from innerloop.optim._adapt.number import TracedNumber

_BY_REFERENCE = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    type,
    torch.Generator,
)


class FrozenState:
    """What an optimizer keeps besides tensors: step counts, flags, settings.

    Marks stand in the places of the tensors.

    Attributes:
        names: of the parameters, in the optimizer's order.
        tracked: for each tensor, whether it was computed from the parameters or their gradients.
    """

    def __init__(
        self,
        pickled: bytes,
        references: tuple[Any, ...],
        names: tuple[str, ...],
        tracked: tuple[bool, ...],
    ) -> None:
        self.pickled = pickled
        self.references = references
        self.names = names
        self.tracked = tracked

    def __repr__(self) -> str:
        return f"FrozenState({self.references[0].__name__}, {len(self.pickled)} bytes)"


tree.register(FrozenState, lambda rest: [], lambda rest, children: rest)


def freeze(
    optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], FrozenState]:
    """Return ``(tensors, rest)`` of an optimizer that steps ``params``."""
    file = io.BytesIO()
    freezer = _Freezer(file, optimizer, list(params.values()))
    try:
        freezer.dump(vars(optimizer))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"{type(optimizer).__name__} keeps something that cannot be copied between steps: "
            f"{error}. Write its rule as an "
            "innerloop.optim.Rule"
        ) from error
    tensors = tuple(freezer.tensors)
    references = (type(optimizer), *freezer.references)
    return tensors, FrozenState(
        file.getvalue(), references, tuple(params), tuple(t.requires_grad for t in tensors)
    )


def thaw(
    rest: FrozenState,
    tensors: Sequence[Tensor],
    params: Sequence[Tensor],
    number: Callable[[Tensor], Any] = TracedNumber,
) -> torch.optim.Optimizer:
    """Build the optimizer again, with these tensors, stepping ``params``.

    ``number`` makes its numbers from tensors.
    """
    cls, *references = rest.references
    optimizer = object.__new__(cls)
    known = {"param": params, "tensor": tensors, "optimizer": [optimizer], "reference": references}
    vars(optimizer).update(_Thawer(io.BytesIO(rest.pickled), known, number).load())
    return optimizer


class _Freezer(pickle.Pickler):
    def __init__(
        self, file: io.BytesIO, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
    ) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._root = optimizer
        self._known = {id(p): ("param", i) for i, p in enumerate(params)}
        self.tensors: list[Tensor] = []
        self.references: list[Any] = []

    def persistent_id(self, obj: object) -> object:
        if obj is self._root:
            return ("optimizer", 0)
        if isinstance(obj, Tensor):
            return self._place(obj, "tensor", obj, self.tensors)
        if isinstance(obj, TracedNumber):
            return self._place(obj, "number", obj.tensor, self.tensors)
        if isinstance(obj, _BY_REFERENCE):
            return self._place(obj, "reference", obj, self.references)
        return None

    def reducer_override(self, obj: object) -> Any:
        if isinstance(
            obj, torch.optim.Optimizer
        ):  # its own __getstate__ leaves out what a subclass adds
            return object.__new__, (type(obj),), vars(obj)
        return NotImplemented

    def _place(self, obj: object, kind: str, kept: object, where: list[Any]) -> tuple[str, int]:
        if id(obj) not in self._known:
            where.append(kept)
            self._known[id(obj)] = (kind, len(where) - 1)
        return self._known[id(obj)]


class _Thawer(pickle.Unpickler):
    def __init__(
        self, file: io.BytesIO, known: Mapping[str, Sequence[Any]], number: Callable[[Tensor], Any]
    ) -> None:
        super().__init__(file)
        self._known = known
        self._number = number
        self._numbers: dict[int, Any] = {}

    def persistent_load(self, pid: tuple[str, int]) -> object:
        kind, index = pid
        if kind == "number":
            return self._numbers.setdefault(index, self._number(self._known["tensor"][index]))
        return self._known[kind][index]
