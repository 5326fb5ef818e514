"""A frozen closure in a form from which compiled code makes the function.

The compiler follows a function that is made in the code which it traces, but cannot be told what
the cells of one are that was made elsewhere. So each function gets a factory: a function of the
values of its cells and defaults that returns it. All values, tensors too, are then arguments of
compiled code, and a fresh ``lambda`` at each step is the same code with other arguments.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from innerloop._utils import tree
from innerloop._utils.frozen import (
    _EMPTY,
    _Call,
    _Container,
    _Function,
    _Slot,
    is_numpy,
    numpy_read_by,
)
from innerloop.errors import InvalidInputError

_WRITES = ("STORE_GLOBAL", "DELETE_GLOBAL")
_CELLS = ("STORE_DEREF", "DELETE_DEREF")


class _Made(NamedTuple):
    """A function: what its factory makes of these values."""

    factory: Callable[..., Any]
    values: tuple[Any, ...]


class _Partial(NamedTuple):
    """A function with some of its arguments; a bound method is one too."""

    function: Any
    args: Any
    keywords: Any


class _List(NamedTuple):
    """A container that holds forms.

    Attributes:
        kind: "list", "tuple", "dict", or "named": a named tuple.
        keys: those of a dict; what makes a named tuple.
        parts: the forms.
    """

    kind: str
    keys: tuple[Any, ...]
    parts: tuple[Any, ...]


class _Place(NamedTuple):
    """The place of a captured tensor that may have a derivative."""

    place: int


def build(form: Any, slots: Sequence[Tensor], made: list[Any] | None = None) -> Any:
    """Return what a form stands for, with ``slots`` in the places of the captured tensors.

    Args:
        form: of a frozen closure.
        slots: the captured tensors that may have a derivative.
        made: is told of the lists and dicts that were made.
    """
    kind = type(form)
    if kind is _Place:
        return slots[form.place]
    if kind is _Made:
        return form.factory(*[build(value, slots, made) for value in form.values])
    if kind is _Partial:
        function, args = build(form.function, slots, made), build(form.args, slots, made)
        keywords = build(form.keywords, slots, made)
        return functools.partial(function, *args, **({} if keywords is None else keywords))
    if kind is _List:
        parts = [build(part, slots, made) for part in form.parts]
        if form.kind == "tuple":
            return tuple(parts)
        if form.kind == "named":
            return form.keys[0](parts)
        found: Any = parts
        if form.kind == "dict":
            found = dict(zip(form.keys, parts, strict=True))
        if made is not None:
            made.append((found, found.copy()))
        return found
    return form


def wrote_containers(made: list[Any]) -> bool:
    """True if a list or dict of a closure holds other things than when `build` made it."""

    def values(x: Any) -> list[Any]:
        return [*x, *x.values()] if isinstance(x, dict) else x

    return any(
        len(now) != len(before)
        or any(a is not b for a, b in zip(values(now), values(before), strict=True))
        for now, before in made
    )


class Traceable:
    """Makes the forms of frozen closures; the functions of one code are made by one factory.

    The globals of a function lie in one dict, whose values are those of the form made last: that is
    the one to call.
    """

    def __init__(self) -> None:
        self._factories: dict[types.CodeType, tuple[Callable[..., Any], dict[str, Any]]] = {}
        self._done: dict[int, Any] = {}
        self._seen: dict[types.CodeType, _Function] = {}

    def form(self, frozen: Any) -> Any:
        """Return the form of what `Freezer` made."""
        self._done.clear()
        self._seen.clear()
        return self._form(frozen)

    def forget(self) -> None:
        """Let go of the values of globals."""
        self._done.clear()
        self._seen.clear()
        for _, scope in self._factories.values():
            for name in scope:
                if name != "__builtins__":
                    scope[name] = None

    def outside(self) -> list[Tensor]:
        """Return the tensors among the globals of the form made last."""
        return [
            x
            for _, scope in self._factories.values()
            for name, value in scope.items()
            if name != "__builtins__"
            for x in tree.tensors(value)
        ]

    def _form(self, frozen: Any) -> Any:
        kind = type(frozen)
        if kind is _Function:
            return self._function(frozen)
        if kind is _Slot:
            return _Place(frozen.index)
        if kind is _Call:
            return self._call(frozen)
        if kind is _Container:
            return self._container(frozen)
        if is_numpy(frozen):
            if hasattr(frozen, "__setitem__"):  # an array, not a number
                raise _numpy("the function given to loop.step")
            return frozen.item()
        return frozen

    def _function(self, frozen: _Function) -> Any:
        known = self._done.get(id(frozen), _EMPTY)
        if known is None:
            raise _refused(
                frozen.name,
                "reads a variable that holds the function itself: it calls itself (write a loop), "
                "or keeps something in an attribute of its own (f.count: keep it elsewhere)",
            )
        if known is not _EMPTY:
            return known
        self._done[id(frozen)] = None
        factory, scope = self._factory(frozen)
        for name, value in frozen.values.items():
            scope[name] = self._outside(frozen.name, name, value)
        if any(cell is _EMPTY for cell in frozen.cells):
            raise _refused(frozen.name, "reads a variable that has no value yet")
        defaults = frozen.defaults
        values = [self._form(cell) for cell in frozen.cells]
        if defaults is not None:
            values += self._each(defaults)
        if frozen.keywords is not None:
            values += self._each(frozen.keywords)
        found = self._done[id(frozen)] = _Made(factory, tuple(values))
        return found

    def _each(self, frozen: Any) -> list[Any]:
        """Return the forms of the values of a frozen tuple or dict."""
        if type(frozen) is _Container:
            return [self._form(part) for part in frozen.parts]
        return list(frozen.values() if isinstance(frozen, dict) else frozen)

    def _outside(self, function: str, name: str, value: Any) -> Any:
        """Return the value of a global, which compiled code finds for itself."""
        if not isinstance(value, (_Function, _Slot, _Call, _Container)):
            return value
        form = self._form(value)
        if _has_place(form):
            raise _refused(
                function,
                f"reads the global {name!r}, which is or holds a tensor that requires grad (hand "
                "it over, loop.step(fn, args=(tensor,)))",
            )
        return build(form, ())

    def _factory(self, frozen: _Function) -> tuple[Callable[..., Any], dict[str, Any]]:
        code = frozen.code
        known = self._factories.get(code)
        if known is None:
            _check_writes(code, frozen.name, set(code.co_freevars))
            scope = {"__builtins__": frozen.builtins}
            known = self._factories[code] = _factory_of(frozen, scope), scope
        seen = self._seen.setdefault(code, frozen)
        if seen is not frozen and not _same_globals(seen, frozen):
            raise _refused(frozen.name, "stands in it twice, with other globals")
        return known

    def _call(self, frozen: _Call) -> Any:
        parts = [self._form(part) for part in frozen.parts]
        if frozen.make is types.MethodType:
            function, owner = parts
            return _Partial(function, (owner,), None)
        if len(parts) == 3 and getattr(frozen.make, "__name__", "") == "_partial":
            return _Partial(*parts)
        raise _refused(
            "of a package",
            "wraps a function that holds the loop, a module of it or a tensor that requires grad",
        )

    def _container(self, frozen: _Container) -> Any:
        parts = tuple(self._form(part) for part in frozen.parts)
        make = frozen.make
        if make is list:
            return _List("list", (), parts)
        if make is tuple:
            return _List("tuple", (), parts)
        if isinstance(make, functools.partial):
            return _List("dict", tuple(make.args[0]), parts)
        return _List("named", (make,), parts)


def _count(frozen: Any) -> int:
    if frozen is None:
        return 0
    return len(frozen.parts if type(frozen) is _Container else frozen)


def _has_place(form: Any) -> bool:
    if isinstance(form, _Place):
        return True
    return isinstance(form, tuple) and any(map(_has_place, form))


def _same_globals(a: _Function, b: _Function) -> bool:
    return a.values.keys() == b.values.keys() and all(
        b.values[name] is value for name, value in a.values.items()
    )


def _numpy(what: str, name: str = "") -> InvalidInputError:
    return InvalidInputError(
        f"{what} reads {f'{name!r}, ' if name else ''}NumPy data, which PyTorch's compiler does "
        "not follow: make a tensor of an array, torch.as_tensor(array), and a number of Python of "
        "a number, float(number), outside of it, or write compile=False"
    )


def refuse_numpy(what: str, functions: Sequence[object]) -> None:
    """Raise if functions that cannot be compiled read NumPy data, which may be the reason.

    Args:
        what: names them.
        functions: the functions.
    """
    for function in functions:
        name = numpy_read_by(function)
        if name is not None:
            raise _numpy(what, name)


def _refused(name: str, why: str) -> InvalidInputError:
    return InvalidInputError(
        f"the function {name!r} given to loop.step cannot be compiled: it {why}. Write "
        "compile=False"
    )


def _check_writes(code: types.CodeType, name: str, outside: set[str]) -> None:
    """Raise if a function writes a variable outside of itself, which would be lost.

    Args:
        code: its code, or that of a function inside it.
        name: its name.
        outside: those variables of ``code`` that are not the function's own.
    """
    for i in dis.get_instructions(code):
        if i.opname in _WRITES or (i.opname in _CELLS and i.argval in outside):
            raise _refused(
                name,
                f"writes the variable {i.argval!r} outside of itself (nonlocal, global), which "
                "compiled code does not do",
            )
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            own = set(code.co_cellvars)
            _check_writes(constant, name, outside & set(constant.co_freevars) - own)


def _inside(code: types.CodeType) -> types.CodeType:
    """Return the code of the function that is defined in ``code``."""
    return next(c for c in code.co_consts if isinstance(c, types.CodeType))


def _factory_of(frozen: _Function, scope: dict[str, Any]) -> Callable[..., Any]:
    """Return a function of the cells, defaults and keyword defaults of another that makes it.

    It is compiled for a function of the same signature, whose code is then replaced.
    """
    code, cells = frozen.code, frozen.code.co_freevars
    defaults, keywords = _count(frozen.defaults), _count(frozen.keywords)
    names = [f"default_{i}_" for i in range(defaults)]
    keys = list(frozen.keywords) if isinstance(frozen.keywords, dict) else []
    if type(frozen.keywords) is _Container:
        made_of: Any = frozen.keywords.make
        keys = list(made_of.args[0])
    inner = [f"p{i}_={name}" for i, name in enumerate(names)]
    if keys:
        inner += ["*", *(f"{key}=keyword_{i}_" for i, key in enumerate(keys))]
    outer = [*cells, *names, *(f"keyword_{i}_" for i in range(keywords))]
    text = (
        f"def factory({', '.join(outer)}):\n"
        f"    def inner({', '.join(inner)}):\n"
        f"        return ({' '.join(f'{cell},' for cell in cells)})\n"
        "    return inner\n"
    )
    outside = _inside(compile(text, "<factory>", "exec"))
    stand_in = _inside(outside)
    if stand_in.co_freevars != cells:
        raise _refused(frozen.name, "has variables that Python orders in another way")
    constants = tuple(code if c is stand_in else c for c in outside.co_consts)
    return types.FunctionType(outside.replace(co_consts=constants), scope)
