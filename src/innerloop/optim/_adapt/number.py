"""Numbers that remember their derivative."""

from __future__ import annotations

import linecache
import math
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jaxtyping
import torch
import torch.utils.dlpack
from torch import Tensor

from innerloop._utils import torch_private
from innerloop.errors import NotDifferentiableError


def weak_number(number: Tensor, others: list[Tensor]) -> Tensor:
    """Cast ``number`` so that, like a Python number, it does not raise the dtype of ``others``."""
    if any(t.ndim for t in others):
        return number
    dtypes = [t.dtype for t in others if t.is_floating_point()]
    return number.to(dtypes[0]) if dtypes else number


def leaves_the_graph(name: str) -> str:
    """Return the error text for a call that turns a tracked tensor into a plain number."""
    what = {
        "__float__": "turns a tracked tensor into a float (float(x), a function of the math "
        "module)",
        "__int__": "makes an integer from a tracked tensor",
        "__index__": "indexes by a tracked tensor",
        "tolist": "turns a tracked tensor into a list of numbers",
        "untyped_storage": "takes the memory of a tracked tensor (untyped_storage)",
        "storage": "takes the memory of a tracked tensor (storage)",
        "_typed_storage": "takes the memory of a tracked tensor (storage)",
        "__dlpack__": "hands the memory of a tracked tensor over (dlpack)",
        "to_dlpack": "hands the memory of a tracked tensor over (dlpack)",
        "__reduce_ex__": "writes a tracked tensor out (pickle, torch.save)",
        "set_": "gives a tracked tensor other memory (set_)",
    }.get(name, "turns a tracked tensor into a numpy array")
    return (
        f"{optimizer_line()}it {what}: the derivative ends there. Write it with functions of torch"
    )


def optimizer_line() -> str:
    """Return the line of the optimizer's code that is running."""
    rules, *others = (
        str(Path(f).parent)
        for f in (torch.optim.__file__, torch.__file__, jaxtyping.__file__, __file__)
    )
    frame = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(rules) or not path.startswith(tuple(others)):
            line = linecache.getline(path, frame.f_lineno).strip()
            return f"{Path(path).name}:{frame.f_lineno}: `{line}`: "
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class TracedNumber(torch.SymFloat):
    """A Python number that was computed from tensors and has not left the graph.

    It comes from ``.item()``, or is a hyper-parameter.

    ``torch.SymFloat`` is the one kind of object that torch takes wherever it takes a number
    (``add_(x, alpha=number)``) and shows to `ValueInterpreter` unopened. Arithmetic is that of the
    0-dim float64 tensor inside; what needs a float (``math.sqrt``) is refused.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __float__(self) -> float:
        raise NotDifferentiableError(leaves_the_graph("__float__"))

    def __int__(self) -> int:
        raise NotDifferentiableError(leaves_the_graph("__int__"))

    def __round__(self, digits: int | None = None) -> Any:
        raise NotDifferentiableError(leaves_the_graph("__int__"))

    def __bool__(self) -> bool:
        return bool(self.tensor)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"TracedNumber({self.tensor.detach()})"

    def __format__(self, spec: str) -> str:
        return format(self.tensor.detach().item(), spec)

    def item(self) -> TracedNumber:
        """Return the number itself, as for a tensor."""
        return self

    def is_integer(self) -> bool:
        """True if the value is whole."""
        return bool(self.tensor == self.tensor.round())


_OTHER_MATH = {"ceil", "floor", "trunc", "remainder", "isclose"}
"""Functions of ``math`` that make an integer, or that mean something else in torch."""


class _Math:
    """The module ``math`` that also takes a `TracedNumber`."""

    def __getattr__(self, name: str) -> Any:
        own = getattr(math, name)
        with_tensors = getattr(torch, name, None)

        def function(*arguments: Any) -> Any:
            if not any(isinstance(x, (TracedNumber, Tensor)) for x in arguments):
                return own(*arguments)
            if (
                with_tensors is None or name in _OTHER_MATH
            ):  # the others are those of torch under the same name
                raise NotDifferentiableError(leaves_the_graph("__float__"))
            wrapped = [
                TracedNumber(x.reshape(()).double()) if isinstance(x, Tensor) else x
                for x in arguments
            ]
            result = with_tensors(
                *[x.tensor if isinstance(x, TracedNumber) else x for x in wrapped]
            )
            return TracedNumber(result) if result.is_floating_point() else bool(result)

        return function if callable(own) else own


_lock = threading.RLock()


@contextmanager
def math_on_numbers(cls: type) -> Iterator[None]:
    """Keep ``math.sqrt(tensor.item())`` in the graph inside the block.

    It does so in the modules of ``cls`` and its bases; plain numbers are as ever.
    """
    with _lock, _refusing_exports(cls):
        modules = _modules_of(cls)
        using = [names for names in modules if names.get("math") is math]
        try:
            for names in using:
                names["math"] = _Math()
            yield
        finally:
            for names in using:
                names["math"] = math


def _modules_of(cls: type) -> list[dict[str, Any]]:
    """Return the names in the modules of ``cls`` and its bases."""
    modules = {sys.modules.get(base.__module__) for base in cls.__mro__} - {None}
    return [vars(module) for module in modules]


@contextmanager
def _refusing_exports(cls: type) -> Iterator[None]:
    """Refuse ``torch.utils.dlpack.to_dlpack`` of a tracked tensor, in this thread.

    It is a function of C++, which no mode sees.
    """
    export: Any = vars(torch.utils.dlpack)["to_dlpack"]
    thread = threading.get_ident()

    def checked(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread and torch_private.has_derivative(tensor):
            raise NotDifferentiableError(leaves_the_graph("to_dlpack"))
        return export(tensor, *args, **kwargs)

    own = [(names, name) for names in _modules_of(cls) for name in names if names[name] is export]
    using = [
        *own,
        (vars(torch.utils.dlpack), "to_dlpack"),
        *([(vars(torch), "to_dlpack")] if vars(torch).get("to_dlpack") is export else []),
    ]
    try:
        for names, name in using:
            names[name] = checked
        yield
    finally:
        for names, name in using:
            names[name] = export


def _arithmetic(operation: Callable[..., Any], swapped: bool = False) -> Callable[..., Any]:
    def method(self: TracedNumber, other: object) -> Any:
        if isinstance(other, Tensor):
            own = weak_number(self.tensor, [other])
            return operation(other, own) if swapped else operation(own, other)
        other = other.tensor if isinstance(other, TracedNumber) else other
        return TracedNumber(
            operation(other, self.tensor) if swapped else operation(self.tensor, other)
        )

    return method


def _unary(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self: TracedNumber(operation(self.tensor))


def _comparison(operation: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: TracedNumber, other: object) -> Any:
        if isinstance(other, Tensor):
            return operation(self.tensor, other)
        return bool(
            operation(self.tensor, other.tensor if isinstance(other, TracedNumber) else other)
        )

    return method


for _name in ("add", "sub", "mul", "truediv", "pow"):
    _operation = getattr(operator, _name)
    setattr(TracedNumber, f"__{_name}__", _arithmetic(_operation))
    setattr(TracedNumber, f"__r{_name}__", _arithmetic(_operation, swapped=True))


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(TracedNumber, f"__{_name}__", _comparison(getattr(operator, _name)))


for _name in ("neg", "pos", "abs"):
    setattr(TracedNumber, f"__{_name}__", _unary(getattr(operator, _name)))
