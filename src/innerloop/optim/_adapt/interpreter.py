"""A mode that runs in-place code on tracked tensors, so that autograd can follow it.

An optimizer's ``step`` is in-place code, and autograd differentiates in-place code. What loses the
gradient is what stands around it: ``@torch.no_grad()``, ``.data``, ``detach()``, ``.item()``, leaf
parameters whose memory is written. Inside `ValueInterpreter` these few mean what they mean for the
values and nothing else; what would leave the graph is an error that names the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from innerloop._utils import torch_private
from innerloop.errors import NotDifferentiableError
from innerloop.optim._adapt.number import TracedNumber, leaves_the_graph, optimizer_line
from innerloop.optim._adapt.pure_calls import (
    DATA,
    GRAD,
    IDENTITIES,
    IS_LEAF,
    REPLACED,
    REQUIRES_GRAD,
    TO_NUMBER,
    for_each,
    single_call,
    with_tensors,
    write_into,
)


class ValueInterpreter(TorchFunctionMode):
    """The mode in which an optimizer's ``step`` runs.

    Attributes:
        grads: what ``.grad`` reads and writes, by the identity of the tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grads: dict[int, Tensor | None] = {}
        self._leaves: list[Tensor] = []
        self._leaf_ids: set[int] = set()
        self._paused = False

    def own(self, tensors: Iterable[Tensor]) -> None:
        """Let these pose as the leaves that the optimizer steps."""
        self._leaves = list(tensors)
        self._leaf_ids = {id(t) for t in self._leaves}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Give functions of torch their usual meaning inside the block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            return self._attribute(func, name, *args)
        if torch_private.switches_gradients(func):
            return None
        if name in IDENTITIES:
            return args[0]
        if name == "__deepcopy__":
            return args[0].clone()
        if name in TO_NUMBER and torch_private.has_derivative(args[0]):
            if name == "item":
                return TracedNumber(args[0].reshape(()).double())
            raise NotDifferentiableError(leaves_the_graph(name))
        if kwargs.get("out") is not None:
            results = self.__torch_function__(
                func, types, args, {k: v for k, v in kwargs.items() if k != "out"}
            )
            return write_into(kwargs["out"], results)
        if (
            name.startswith("_foreach_")
            and (one := single_call(name.removeprefix("_foreach_"))) is not None
        ):
            return [
                self.__torch_function__(one, types, *each)
                for each in for_each(one.__name__, args, kwargs)
            ]
        for own, names in REPLACED:
            if name in names:
                return own(func, name, args, kwargs)
        args, kwargs = with_tensors((args, kwargs))
        return func(*args, **kwargs)

    def _attribute(self, func: Any, kind: str, tensor: Tensor, value: Any = None, *_: Any) -> Any:
        descriptor = func.__self__
        if descriptor is DATA:
            if kind == "__get__":
                return tensor
            if value.shape != tensor.shape:
                raise NotDifferentiableError(
                    f"{optimizer_line()}.data of a tensor of shape {tuple(tensor.shape)} "
                    f"is set to one of shape {tuple(value.shape)}"
                )
            if value is not tensor:
                tensor.copy_(value)
            return None
        if descriptor is GRAD:
            if kind == "__get__":
                return self.grads.get(id(tensor))
            self.grads[id(tensor)] = value if kind == "__set__" else None
            return None
        if descriptor is REQUIRES_GRAD and kind == "__set__":
            return None
        if (
            kind == "__get__"
            and descriptor in (IS_LEAF, REQUIRES_GRAD)
            and id(tensor) in self._leaf_ids
        ):
            return True
        return func(*(tensor,) if kind == "__delete__" else (tensor, value, *_))
