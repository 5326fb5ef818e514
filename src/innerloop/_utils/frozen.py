"""A closure as it is now: the values that it reads stay what they are when it runs again later."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from innerloop._utils.caches import cache

_PLAIN = (bool, int, float, str, type(None), types.ModuleType, type, types.BuiltinFunctionType)
_FOREIGN = ("torch", "innerloop", "functools", "builtins")
SMALL = 64
"""Lists and dicts with more entries (a whole data set, say) are not copied."""

_names: MutableMapping[types.CodeType, tuple[str, ...]] = cache("globals that a function reads")
_EMPTY = object()


def names_of_globals(code: types.CodeType) -> tuple[str, ...]:
    """Return the names that a function, and those defined inside it, look up as globals."""
    known = _names.get(code)
    if known is None:
        found = dict.fromkeys(
            i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        )
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                found.update(dict.fromkeys(names_of_globals(constant)))
        known = _names[code] = tuple(found)
    return known


def is_numpy(value: object) -> bool:
    """True for an array or a number of NumPy, which need not be installed."""
    return type(value).__module__ == "numpy" and hasattr(type(value), "__array__")


def numpy_read_by(function: object, seen: set[int] | None = None) -> str | None:
    """Return the name of a variable, of a function or one that it calls, which holds NumPy data.

    Args:
        function: the function; anything else reads nothing.
        seen: functions that were looked at.
    """
    seen = set() if seen is None else seen
    if isinstance(function, (types.MethodType, functools.partial)):
        function = getattr(function, "__func__", None) or getattr(function, "func", None)
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return None
    seen.add(id(function))
    if (function.__module__ or "").partition(".")[0] in _FOREIGN:
        return None
    scope, code = function.__globals__, function.__code__
    found = {name: scope.get(name) for name in names_of_globals(code)}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        found[name] = Freezer.content(cell)
    for name, value in found.items():
        parts = value if isinstance(value, (list, tuple)) else [value]
        parts = list(value.values()) if isinstance(value, dict) else parts
        if any(is_numpy(part) for part in parts[:SMALL]):
            return name
    return next(filter(None, (numpy_read_by(value, seen) for value in found.values())), None)


class _Slot:
    """The place of a captured tensor that has a history: it is an input of the step's node."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class _Function:
    """A function without its cells and globals, and the values that they had."""

    __slots__ = ("builtins", "cells", "code", "defaults", "keywords", "module", "name", "values")

    def __init__(self, function: types.FunctionType) -> None:
        # Not the function itself, whose cells hold the loop, whose graph holds this.
        self.code, self.name, self.module = (
            function.__code__,
            function.__name__,
            function.__module__,
        )
        self.builtins = function.__globals__.get("__builtins__")
        self.cells: tuple[Any, ...] = ()
        self.values: dict[str, Any] = {}
        self.defaults: Any = None
        self.keywords: Any = None


class _Call:
    """A bound method or a partial function whose parts were frozen."""

    __slots__ = ("make", "parts")

    def __init__(self, make: Callable[..., Any], parts: tuple[Any, ...]) -> None:
        self.make = make
        self.parts = parts


class _Container:
    """A container that holds frozen values in place of some of its own."""

    __slots__ = ("make", "parts")

    def __init__(self, make: Callable[[list[Any]], Any], parts: list[Any]) -> None:
        self.make = make
        self.parts = parts


def _with_cells(function: types.FunctionType, *contents: Any) -> types.FunctionType:
    cells = tuple(types.CellType() for _ in contents)
    for cell, content in zip(cells, contents, strict=True):
        if content is not _EMPTY:
            cell.cell_contents = content
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _without_cells(function: types.FunctionType) -> types.FunctionType:
    """Return a function with the same code, whose cells are empty: it holds nothing."""
    return _with_cells(function, *(_EMPTY for _ in function.__closure__ or ()))


class Freezer:
    """Takes functions apart into the values that they read, for one step.

    Args:
        swap: what to put in the places of objects, by identity: a stand-in for the loop, and the
            modules of the copy that is replayed for those of ``loop.model``.
        leaves_too: True counts leaves that require grad among ``captured``.

    Attributes:
        captured: the tensors with a history that were found.
        constants: the other tensors that were found.
        modules: the modules that were found, besides those that have a stand-in.
    """

    def __init__(self, swap: Mapping[int, object], *, leaves_too: bool = False) -> None:
        self._swap = swap
        self._leaves_too = leaves_too
        self._done: dict[int, _Function] = {}
        self._foreign_ones: set[int] = set()
        self.captured: list[Tensor] = []
        self.constants: list[Tensor] = []
        self.modules: list[nn.Module] = []

    def value(self, x: Any, small_only: bool = True) -> Any:
        """Return the frozen form of a value."""
        kind = type(x)
        if kind in _PLAIN:
            return x
        if isinstance(x, Tensor):
            return self._tensor(x)
        found = self._swap.get(id(x), _EMPTY)
        if found is not _EMPTY:
            return found
        if isinstance(x, nn.Module):
            self.modules.append(x)
            return x
        if kind is types.FunctionType:
            return self.function(x)
        if kind is types.MethodType:
            owner = self._swap.get(id(x.__self__), x.__self__)
            if isinstance(owner, nn.Module) and owner is x.__self__:
                self.modules.append(owner)
            function = x.__func__
            if type(function) is types.FunctionType:
                function = self.function(function)
            if owner is x.__self__ and function is x.__func__:
                return x
            return _Call(types.MethodType, (function, owner))
        if kind is functools.partial:
            parts = [self.value(p, False) for p in (x.func, x.args, x.keywords)]
            return _Call(_partial, tuple(parts))
        if isinstance(x, (list, tuple, dict)) and (len(x) <= SMALL or not small_only):
            return self._container(x, small_only)
        return x

    def call(self, function: Callable[..., Any], args: Sequence[object]) -> Any:
        """Return the frozen form of ``function(*args)``, a function without arguments."""
        if not args:
            return self.value(function)
        return _Call(_partial, (self.value(function), self.value(tuple(args), False), {}))

    def function(self, function: types.FunctionType) -> Any:
        """Return the frozen form of a function."""
        if (function.__module__ or "").partition(".")[0] in _FOREIGN:
            return self._foreign(function)
        if id(function) in self._done:
            return self._done[id(function)]
        found = self._done[id(function)] = _Function(function)
        scope = function.__globals__
        for name in names_of_globals(function.__code__):
            if name in scope:
                value = scope[name]
                kind = type(value)
                if kind is types.FunctionType and value.__globals__ is not scope:
                    # A library's function keeps its own globals.
                    found.values[name] = value
                elif kind in _PLAIN:
                    found.values[name] = value
                else:
                    found.values[name] = self.value(value)
        if function.__closure__:
            found.cells = tuple(self._cell(cell) for cell in function.__closure__)
        if function.__defaults__:
            found.defaults = self.value(function.__defaults__)
        if function.__kwdefaults__:
            found.keywords = self.value(function.__kwdefaults__)
        return found

    def _foreign(self, function: types.FunctionType) -> Any:
        """Return the frozen form of a function of a package whose globals are left alone."""
        if not function.__closure__ or id(function) in self._foreign_ones:
            return function
        # A function in its own closure ends here.
        self._foreign_ones.add(id(function))
        contents = [self.content(cell) for cell in function.__closure__]
        parts = [c if c is _EMPTY else self.value(c) for c in contents]
        self._foreign_ones.discard(id(function))
        if all(a is b for a, b in zip(parts, contents, strict=True)):
            return function
        return _Call(functools.partial(_with_cells, _without_cells(function)), tuple(parts))

    @staticmethod
    def content(cell: types.CellType) -> Any:
        """Return what a cell holds, or what stands for nothing."""
        try:
            return cell.cell_contents
        except ValueError:
            return _EMPTY

    def _cell(self, cell: types.CellType) -> Any:
        content = self.content(cell)
        return content if content is _EMPTY else self.value(content)

    def _tensor(self, x: Tensor) -> Any:
        if x.requires_grad and (self._leaves_too or x.grad_fn is not None):
            return self._slot(x)
        self.constants.append(x)
        return x

    def _slot(self, x: Tensor) -> _Slot:
        for i, known in enumerate(self.captured):
            if known is x:
                return _Slot(i)
        self.captured.append(x)
        return _Slot(len(self.captured) - 1)

    def _container(self, x: Any, small_only: bool) -> Any:
        kind = type(x)
        values = list(x.values()) if isinstance(x, dict) else list(x)
        parts = [self.value(v, small_only) for v in values]
        same = all(a is b for a, b in zip(parts, values, strict=True))
        if isinstance(x, tuple):
            if same:
                return x
            return _Container(kind._make if hasattr(kind, "_make") else tuple, parts)
        # Even where all values are constants: the user may put others in their places.
        if kind is dict:
            return _Container(functools.partial(_as_dict, list(x)), parts)
        return _Container(list, parts) if kind is list else x


def _partial(func: Any, args: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    return functools.partial(func, *args, **keywords)


def _as_dict(keys: list[Any], values: list[Any]) -> dict[Any, Any]:
    return dict(zip(keys, values, strict=True))


def thaw(frozen: Any, slots: Sequence[Tensor], done: dict[int, Any] | None = None) -> Any:
    """Return what was frozen, with ``slots`` in the places of the captured tensors."""
    kind = type(frozen)
    if kind is _Function:
        return _thaw_function(frozen, slots, {} if done is None else done)
    if kind is _Slot:
        return slots[frozen.index]
    if kind is _Call:
        done = {} if done is None else done
        return frozen.make(*[thaw(p, slots, done) for p in frozen.parts])
    if kind is _Container:
        done = {} if done is None else done
        return frozen.make([thaw(p, slots, done) for p in frozen.parts])
    return frozen


def _thaw_function(frozen: _Function, slots: Sequence[Tensor], done: dict[int, Any]) -> Any:
    known = done.get(id(frozen))
    if known is not None:
        return known
    scope: dict[str, Any] = {"__builtins__": frozen.builtins, "__name__": frozen.module}
    cells = tuple(types.CellType() for _ in frozen.cells)
    defaults = thaw(frozen.defaults, slots, done)
    made = types.FunctionType(frozen.code, scope, frozen.name, defaults, cells or None)
    done[id(frozen)] = made
    made.__kwdefaults__ = thaw(frozen.keywords, slots, done)
    for name, value in frozen.values.items():
        scope[name] = thaw(value, slots, done)
    for cell, value in zip(cells, frozen.cells, strict=True):
        if value is not _EMPTY:
            cell.cell_contents = thaw(value, slots, done)
    return made
