"""A checksum of values and functions, the same for the same bits in another process."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LIBRARIES = ("torch", "innerloop", "numpy", "builtins", "beartype", "jaxtyping")
"""Packages whose code is not looked into: their versions say what it is."""


def digest(value: object) -> str:
    """Return a checksum of what ``value`` holds: 32 hexadecimal digits.

    Tensors, arrays, numbers and strings count by their bits; functions by their code, and by the
    constants and functions of the same package that it names. Where an object holds what cannot be
    looked into, its class counts.

    Args:
        value: a pytree, an object or a function.

    Example:
        >>> import torch
        >>> digest({"a": torch.ones(2)}) == digest({"a": torch.ones(2)})
        True
        >>> digest(lambda x: x + 1) == digest(lambda x: x + 2)
        False
    """
    walk = _Walk()
    walk.add(value)
    return walk.found.hexdigest()


def digest_bytes(data: bytes) -> str:
    """Return a checksum of bytes: 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class _Walk:
    """One walk through what hangs together with a value.

    Attributes:
        found: the checksum so far.
    """

    def __init__(self) -> None:
        self.found = hashlib.blake2b(digest_size=16)
        # Held, so that no other object takes the place of one that was seen.
        self._seen: dict[int, object] = {}

    def _say(self, *words: object) -> None:
        for word in words:
            data = repr(word).encode()
            self.found.update(b"%d:" % len(data))
            self.found.update(data)

    def add(self, value: object) -> None:
        """Add a value to the checksum."""
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
            self._say(type(value).__name__, value)
        elif isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, np.ndarray):
            self._say("array", value.dtype.str, value.shape)
            if not value.dtype.hasobject:
                self.found.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, (torch.dtype, torch.device, torch.layout, range, slice)):
            self._say(value)
        elif id(value) in self._seen:
            self._say("again")
        else:
            self._seen[id(value)] = value
            self._add_object(value)

    def _add_tensor(self, x: Tensor) -> None:
        x = x.detach()
        self._say("tensor", str(x.dtype), tuple(x.shape), x.device.type, str(x.layout))
        if x.layout is not torch.strided:
            x = x.to_dense()
        flat = x.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        self.found.update(flat.view(torch.uint8).numpy().data)

    def _add_object(self, value: Any) -> None:
        self._say(type(value).__module__, type(value).__qualname__)
        if isinstance(value, Mapping):
            self._add_all([item for pair in value.items() for item in pair])
        elif isinstance(value, (set, frozenset)):
            self._say(sorted(map(digest, value)))
        elif isinstance(value, (list, tuple)):
            self._add_all(value)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.MethodType):
            self._add_all([value.__func__, value.__self__])
        elif isinstance(value, functools.partial):
            self._add_all([value.func, value.args, value.keywords])
        elif isinstance(value, nn.Module):
            self._add_module(value)
        elif isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
            self._say(getattr(value, "__module__", ""), getattr(value, "__qualname__", ""))
        elif dataclasses.is_dataclass(value):
            self._add_all([getattr(value, field.name) for field in dataclasses.fields(value)])
        else:
            self.add(own_code(value, "__call__"))
            self.add(getattr(value, "__dict__", None))

    def _add_all(self, values: Sequence[object]) -> None:
        self._say(len(values))
        for value in values:
            self.add(value)

    def _add_module(self, module: nn.Module) -> None:
        for name, part in module.named_modules():
            self._say(name, type(part).__qualname__, part.training, part.extra_repr())
            self.add(own_code(part, "forward"))
        self._add_all([*module.named_parameters(), *module.named_buffers()])

    def _add_function(self, function: types.FunctionType) -> None:
        names = self._add_code(function.__code__)
        self._add_all([function.__defaults__, function.__kwdefaults__])
        package = (function.__module__ or "").partition(".")[0]
        captured = [value for cell in function.__closure__ or () for value in _contents(cell)]
        captured += [function.__globals__[n] for n in names if n in function.__globals__]
        for value in captured:
            self._add_captured(value, package)

    def _add_captured(self, value: object, package: str) -> None:
        """Add what a function reads from around it."""
        if isinstance(value, (types.FunctionType, types.MethodType, type)):
            theirs = (getattr(value, "__module__", None) or "").partition(".")[0]
            if theirs == package and not isinstance(value, type):
                self.add(value)
            else:
                self._say(theirs, value.__qualname__)
        elif isinstance(value, (list, dict, set)):
            # Of what may be a log of earlier calls, only data count.
            found = [x for x in _data(value) if isinstance(x, (Tensor, np.ndarray))]
            self._add_all(found)
        elif value is None or isinstance(
            value,
            (bool, int, float, complex, str, bytes, tuple, Tensor, np.ndarray, np.generic)
            + (nn.Module, functools.partial),
        ):
            self.add(value)
        else:
            self._say(type(value).__module__, type(value).__qualname__)

    def _add_code(self, code: types.CodeType) -> list[str]:
        """Add code and the code inside it; return the names that it looks up."""
        names = list(code.co_names)
        self._say(code.co_code, code.co_names, code.co_varnames, code.co_freevars)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                names += self._add_code(constant)
            else:
                self.add(constant)
        return names


def _contents(cell: types.CellType) -> list[object]:
    """Return what a variable around a function holds; nothing where it has no value yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _data(value: object) -> list[object]:
    """Return what lists and dicts hold, one level deep or more."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return [value]
    return [found for item in value for found in _data(item)]


def own_code(value: object, name: str) -> Callable[..., object] | None:
    """Return a method of the class of ``value``; None if it has none, or a library wrote it."""
    method = getattr(type(value), name, None)
    if not isinstance(method, types.FunctionType):
        return None
    return None if (method.__module__ or "").partition(".")[0] in _LIBRARIES else method
