"""Refuse an argument of the wrong kind, and say what to write instead.

Python would go on until some operation fails on it, in words that do not name the argument.
"""

from __future__ import annotations

import dataclasses
import inspect
import numbers
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from innerloop._utils import caches
from innerloop._utils.execution import compiling
from innerloop.errors import InvalidInputError


def shown(value: object) -> str:
    """Describe a value in an error: short ones as they are written, others by their type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str) and len(value) < 40:
        return repr(value)
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"


def given(name: str, value: object) -> str:
    """Say what was given for an argument, as the beginning of an error."""
    found = shown(value)
    return f"{name}={found}" if " " not in found or found[0] == "'" else f"{name} is {found}"


def check_has_values(name: str, value: object) -> None:
    """Raise if a tensor lies on the meta device."""
    if isinstance(value, Tensor) and value.is_meta:
        raise InvalidInputError(
            f"{name} lies on the meta device, where a tensor has a shape and no numbers: a loop "
            "takes steps, and looks whether its losses are finite. Make it on a device with memory "
            '(for a model that was built there: model.to_empty(device="cpu"), and initialise it); '
            "for the shapes alone call the model itself"
        )


def check_instance(name: str, value: object, kind: type | tuple[type, ...], instead: str) -> None:
    """Raise unless ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        raise InvalidInputError(f"{given(name, value)}: write {instead}")


def check_function(name: str, value: object, instead: str) -> None:
    """Raise unless ``value`` can be called."""
    if not callable(value):
        raise InvalidInputError(f"{given(name, value)}, which cannot be called: {instead}")


def check_takes(name: str, function: Callable[..., object], *arguments: str) -> None:
    """Raise if the signature of ``function`` does not take these positional arguments."""
    if compiling():  # inspect.signature is not traced
        return
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C, which need not tell
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise InvalidInputError(
            f"{name} is called as {name}({', '.join(arguments)}), and {name}{signature} does not "
            f"fit ({error}): give it these arguments, used or not"
        ) from None


def check_outer(outer: object) -> None:
    """Raise unless an outer loss can be called."""
    check_function("outer", outer, "write a function outer(traj, hyper) that returns a scalar")


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise InvalidInputError(f"{given(name, value)}: write True or False")


def is_integer(value: object) -> bool:
    """True for an integer that is not True or False."""
    if type(value) is int:  # at once: the abstract class asks a table
        return True
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """True for a real number that is not True or False."""
    if type(value) is float or type(value) is int:
        return True
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_integer(name: str, value: object) -> None:
    """Raise unless ``value`` is an integer."""
    if not is_integer(value):
        raise InvalidInputError(f"{given(name, value)}: write an integer")


def check_seed(name: str, value: object) -> None:
    """Raise unless ``value`` can seed a generator."""
    check_integer(name, value)


def names_in(wrt: object) -> tuple[str, ...]:
    """Return the names in ``wrt``; raise unless it is ``"params"``, ``"hyper"`` or some of both."""
    several = (wrt,) if isinstance(wrt, str) else wrt
    if isinstance(several, (tuple, list, set, frozenset)) and several:
        found = tuple(several)
        if all(isinstance(name, str) and name in ("params", "hyper") for name in found):
            return found
    if isinstance(wrt, (tuple, list)):
        wrong = f"wrt={wrt!r}"
    else:
        wrong = given("wrt", wrt)
    raise InvalidInputError(f'{wrong}: write "params", "hyper" or ("params", "hyper")')


def _is_hyper(value: object) -> bool:
    if is_number(value) or isinstance(value, Tensor):
        return True
    return isinstance(value, Mapping) and all(
        isinstance(v, Tensor) or is_number(v) for v in value.values()
    )


def _is_flag(value: object) -> bool:
    # torch.optim takes 0 and 1 as well.
    return value is True or value is False or (is_integer(value) and value in (0, 1))


_FIELDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "bool": (_is_flag, "True or False"),
    "bool | None": (lambda v: v is None or _is_flag(v), "True, False or None"),
    "int": (is_integer, "an integer"),
    "int | None": (lambda v: v is None or is_integer(v), "an integer, or None"),
    "float": (is_number, "a number"),
    "float | None": (lambda v: v is None or is_number(v), "a number, or None"),
    "Hyper": (_is_hyper, "a number, a tensor, or a dict of them by parameter"),
    "torch.dtype | None": (
        lambda v: v is None or (isinstance(v, torch.dtype) and v.is_floating_point),
        "a floating-point dtype such as torch.float64, or None",
    ),
}
"""By the annotation of a field: what fits, and what to write."""


def check_fields(owner: object) -> None:
    """Raise if a field of a dataclass is not of the kind that its annotation says.

    Fields of other kinds are checked by their class.
    """
    if compiling():  # dataclasses.fields is not traced
        return
    for name, fits, instead in _checks_of(type(owner)):
        value = getattr(owner, name)
        if not fits(value):
            raise InvalidInputError(
                f"{type(owner).__name__}: {given(name, value)}, write {instead}"
            )
        parts = value.values() if isinstance(value, Mapping) else (value,)
        for part in value if isinstance(value, tuple) else parts:
            check_has_values(f"{type(owner).__name__}: {name} (or a tensor in it)", part)


_known: MutableMapping[type, list[tuple[str, Callable[[object], bool], str]]] = caches.cache(
    "what the fields of classes may hold", weak=True
)


def _checks_of(cls: type) -> list[tuple[str, Callable[[object], bool], str]]:
    if cls not in _known:
        assert dataclasses.is_dataclass(cls)
        fields = [(field.name, _FIELDS.get(str(field.type))) for field in dataclasses.fields(cls)]
        _known[cls] = [(name, *check) for name, check in fields if check is not None]
    return _known[cls]


def check_mapping(name: str, value: object, what: str, instead: str) -> None:
    """Raise unless ``value`` is a mapping from strings to tensors."""
    if not isinstance(value, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()
    ):
        raise InvalidInputError(f"{given(name, value)}, not {what}: write {instead}")


def check_device(device: object) -> None:
    """Raise unless ``device`` is None, or says what ``torch.device`` understands."""
    if device is None or isinstance(device, torch.device):
        return
    try:
        if isinstance(device, str) or is_integer(device):
            torch.device(device)  # type: ignore[call-overload]
            return
    except RuntimeError:
        pass
    raise InvalidInputError(
        f'{given("device", device)}: write None, "cpu", "cuda:0" or a torch.device'
    )


def check_times(name: str, value: object) -> Sequence[int]:
    """Return a sequence of times; raise if it is not one."""
    if isinstance(value, (list, tuple, range)) and all(map(is_integer, value)):
        return value
    raise InvalidInputError(f"{given(name, value)}: write a list of times, {name}=[0, 10]")
