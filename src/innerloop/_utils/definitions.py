"""What classes define, and hooks for all modules: compiled code does not look at them again.

PyTorch's compiler takes for granted that classes keep their methods. `Definitions` tells if they
did.
"""

from __future__ import annotations

import inspect
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any

from torch import Tensor, nn

from innerloop._utils import torch_private
from innerloop._utils.frozen import SMALL, names_of_globals

_MADE_AT_RUN_TIME = 1 << 9
"""The flag of classes that can be changed (Py_TPFLAGS_HEAPTYPE)."""
_FIXED = sys.stdlib_module_names | {"innerloop"}
_LIBRARIES = _FIXED | {"torch"}
_NOTES = frozenset(
    {
        *("__annotate__", "__annotate_func__", "__annotations__", "__annotations_cache__"),
        *("__abstractmethods__", "_abc_impl", "__dict__", "__doc__", "__firstlineno__"),
        *("__module__", "__parameters__", "__qualname__", "__static_attributes__", "__weakref__"),
    }
)
"""What stands in a class and does nothing; Python adds some of it when it is asked for."""

_OF_EACH_MODULE = {"__getattr__", "_call_impl", "_wrapped_call_impl"}
"""Methods of all modules; the compiler has its own in their place."""

_values: Callable[[Any], Iterable[object]] = methodcaller("values")
_order: Callable[[Any], object] = attrgetter("__mro__")
_code: Callable[[Any], object] = attrgetter("__code__")
_call: Callable[[Callable[[], object]], object] = getattr(operator, "call", lambda read: read())
_CALLED = ("__call__", "forward")
_called: Callable[[Any], object] = attrgetter(*_CALLED)


class Definitions:
    """The classes that compiled code uses, as they were when it was compiled.

    Of a class of the user or of a package all attributes count, of one of torch those methods that
    were compiled.
    """

    def __init__(self) -> None:
        self._classes: dict[type, None] = {}
        self._of_torch: dict[type, None] = {}
        self._traced: set[types.CodeType] = set()
        self._places: list[Callable[[], object]] = []
        self._walked: set[types.FunctionType] = set()
        self._look()

    def note(self, values: Iterable[object], traced: Iterable[types.CodeType]) -> None:
        """Remember more classes as they are now.

        Args:
            values: classes, and objects whose classes are meant.
            traced: the code that was compiled.
        """
        self._traced.update(traced)
        for value in (*values, nn.Module, Tensor):
            self._add_used_by(value)
        self._look()

    def _add_used_by(self, value: object) -> None:
        """Remember a class, that of an object, and those which it holds or finds in variables."""
        if isinstance(value, type):
            self._add(value)
        elif isinstance(value, types.FunctionType):
            self._add_found_by(value)
        elif isinstance(value, tuple):
            for held in value[:SMALL]:
                if isinstance(held, type):
                    self._add(held)
        elif type(value) in (dict, list):
            holder: Any = value
            keys = [*holder] if type(value) is dict else range(len(holder))
            for key in keys if len(keys) <= SMALL else ():
                self._add_held(holder[key], partial(holder.__getitem__, key))
        else:
            self._add(type(value))
            if type(value) in self._classes:
                for name, held in tuple(getattr(value, "__dict__", {}).items()):
                    if isinstance(held, type):
                        self._add_held(held, _attribute(value, name, held))

    def _add_found_by(self, function: types.FunctionType) -> None:
        if function in self._walked or _room(function) in _LIBRARIES:
            return
        self._walked.add(function)
        scope = function.__globals__
        for name in names_of_globals(function.__code__):
            if isinstance(scope.get(name), (type, types.FunctionType)):
                self._add_used_by(scope[name])
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # an empty one
                if isinstance(cell.cell_contents, types.FunctionType):
                    self._add_found_by(cell.cell_contents)
                self._add_held(cell.cell_contents, partial(getattr, cell, "cell_contents"))
        for place, value in enumerate(function.__defaults__ or ()):
            self._add_held(value, partial(_default, function, place))
        for key, value in (function.__kwdefaults__ or {}).items():
            self._add_held(value, partial((function.__kwdefaults__ or {}).get, key))

    def _add_held(self, value: object, read: Callable[[], object]) -> None:
        """Remember a class in the place that ``read`` reads: the compiler may take it for fixed."""
        if isinstance(value, type):
            self._add(value)
            self._places.append(read)

    def _add(self, cls: type) -> None:
        for base in cls.__mro__:
            if not base.__flags__ & _MADE_AT_RUN_TIME or base in self._classes:
                continue
            room = _room(base)
            if room == "torch":
                if issubclass(base, (nn.Module, Tensor)):
                    self._of_torch[base] = None
            elif room not in _FIXED:
                self._classes[base] = None
                self._add(type(base))
                for value in tuple(vars(base).values()):
                    if hasattr(type(value), "__get__"):
                        self._add(type(value))
                    for function in _functions_of(value):
                        if function.__code__ in self._traced:
                            self._add_found_by(function)

    def _look(self) -> None:
        """Remember what the classes define now."""
        self._tables = [vars(cls) for cls in self._classes]
        every = chain.from_iterable(map(_values, self._tables))
        self._functions = [f for value in every for f in _functions_of(value)]
        self._modules: list[type] = []
        self._reads = [*self._places]
        for cls in self._of_torch:
            if issubclass(cls, nn.Module):
                if _is_readable(cls, _CALLED):
                    self._modules.append(cls)
                else:
                    self._reads.append(_reader(cls, _CALLED))
        for cls in self._of_torch:
            names = {
                name
                for base in cls.__mro__
                if base is not nn.Module or cls is nn.Module
                for name, value in vars(base).items()
                if any(f.__code__ in self._traced for f in _functions_of(value))
            }
            names |= _OF_EACH_MODULE if cls is nn.Module else set()
            names -= {"__call__", "forward"}
            if names:
                self._reads.append(_reader(cls, sorted(names)))
        self._facts = self._facts_now()
        self._quick = self._quick_facts()

    def _quick_facts(self) -> list[object]:
        """Return what tells at little cost that nothing has changed; it differs for less, too."""
        return [
            *chain(
                chain.from_iterable(torch_private.GLOBAL_MODULE_HOOKS),
                chain.from_iterable(map(_values, self._tables)),
                map(_code, self._functions),
                map(_order, self._classes),
                map(_called, self._modules),
                map(_call, self._reads),
            )
        ]

    def _facts_now(self) -> list[object]:
        return [
            *(
                {name: _fact(value) for name, value in table.items() if name not in _NOTES}
                for table in self._tables
            ),
            *map(_order, self._classes),
            *map(_called, self._modules),
            *map(_call, self._reads),
            *[hook for table in torch_private.GLOBAL_MODULE_HOOKS for hook in table.values()],
        ]

    def are_unchanged(self) -> bool:
        """True if the classes define what they did, and the hooks for all modules are the same."""
        try:
            if self._quick_facts() == self._quick:
                return True
            if self._facts_now() != self._facts:
                return False
        except Exception:  # two values that cannot be compared, or an attribute that is gone
            return False
        self._look()
        return True


def _default(function: types.FunctionType, place: int) -> object:
    """Return the value that a parameter has where none is given."""
    return (function.__defaults__ or ())[place]


def _attribute(holder: object, name: str, value: object) -> Callable[[], object]:
    """Return what reads an attribute of an object, without holding the object.

    Args:
        holder: the object.
        name: of the attribute.
        value: what is read when the object is gone.
    """
    try:
        known = weakref.ref(holder)
    except TypeError:
        return lambda: getattr(holder, name)
    return lambda: value if known() is None else getattr(known(), name)


def _is_readable(cls: type, names: Sequence[str]) -> bool:
    try:
        attrgetter(*names)(cls)
    except Exception:  # a descriptor that is not made for the class itself (of torch.jit)
        return False
    return True


def _reader(cls: type, names: Sequence[str]) -> Callable[[], object]:
    """Return what reads attributes of a class."""
    if _is_readable(cls, names):
        return partial(attrgetter(*names), cls)
    return partial(_as_defined, cls, names)


def _as_defined(cls: type, names: Sequence[str]) -> list[object]:
    return [inspect.getattr_static(cls, name, None) for name in names]


def _room(value: type | types.FunctionType) -> str:
    """Return the name of the package that a class or a function is of."""
    return str(getattr(value, "__module__", "")).partition(".")[0]


def _functions_of(value: object) -> list[types.FunctionType]:
    """Return the functions of which a method, a property or another attribute consists."""
    parts: tuple[object, ...] = (value,)
    if isinstance(value, (staticmethod, classmethod)):
        parts = (value.__func__,)
    elif isinstance(value, property):
        parts = (value.fget, value.fset, value.fdel)
    return [part for part in parts if isinstance(part, types.FunctionType)]


def _fact(value: object) -> object:
    """Return what compiled code takes for granted of an attribute: it looks at the rest."""
    functions = _functions_of(value)
    if functions:
        return type(value), [f.__code__ for f in functions]
    return value if isinstance(value, type) or hasattr(type(value), "__get__") else type(value)
