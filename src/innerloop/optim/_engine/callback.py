"""Running what a user does to gradients, and refusing what autograd does not record of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from innerloop._types import Params
from innerloop._utils import torch_private, tree
from innerloop._utils.execution import Mode, mode
from innerloop.errors import InvalidInputError, NotDifferentiableError

Given = TypeVar("Given")
Returned = TypeVar("Returned")

_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_CONSTANT = ("zeros_like", "ones_like", "full_like", "empty_like", "detach", "detach_", "new_zeros")
_INSTEAD = (
    "The derivative would be that of another callback. Write it in differentiable operations, and "
    "return new tensors: "
    "lambda grads: {n: g * factor(g) for n, g in grads.items()}, or use "
    "innerloop.optim.clip_by_global_norm, clip_by_norm or clip_by_value. (What is to be constant "
    "in the derivative is detached by g.detach().)"
)


def call_back(
    function: Callable[[Given], Returned], given: Given, what: str = "grad_callback"
) -> Returned:
    """Call a user's function of gradients; raise if autograd does not see what it does to them.

    Args:
        function: the user's.
        given: its argument: gradients, None among them.
        what: the function, as an error should call it.
    """
    if mode() is Mode.COMPILING or not torch.is_grad_enabled():
        return function(given)
    recorded = [g for g in tree.tensors(given) if g.requires_grad]
    if not recorded:
        return function(given)
    watch = _Watch(recorded)
    before = [(g, torch_private.version(g), torch_private.recorded_by(g)) for g in recorded]
    with watch:
        returned = function(given)
    if watch.in_place:
        raise NotDifferentiableError(
            f"{what} changes a gradient in place after it was used ({watch.in_place}), which "
            f"overwrites what its derivative needs. {_INSTEAD}"
        )
    if watch.wrote_data:
        raise NotDifferentiableError(f"{what} changes a gradient through .data. {_INSTEAD}")
    if any(
        torch_private.version(g) != v and torch_private.recorded_by(g) is node
        for g, v, node in before
    ):
        raise NotDifferentiableError(
            f"{what} changes a gradient in place under torch.no_grad. {_INSTEAD}"
        )
    if watch.made_without_graph(tree.tensors(returned)):
        raise NotDifferentiableError(
            f"{what} computes what it returns under torch.no_grad. {_INSTEAD}"
        )
    return returned


def refuse_post_accumulate_hooks(own: Params, names: Collection[str], instead: str) -> None:
    """Raise if a parameter has a hook that runs once its ``.grad`` was accumulated.

    Args:
        own: the user's own parameters, by name.
        names: of those that are trained.
        instead: what to write in place of the hook.
    """
    for name in names:
        if torch_private.post_accumulate_hooks(own[name]):
            raise InvalidInputError(
                f"the parameter {name!r} has a hook of register_post_accumulate_grad_hook, which "
                "runs once .grad is there; an inner loop has no .grad and does not run it. "
                f"{instead}"
            )


class _Watch(TorchFunctionMode):
    """Looks at the operations of a callback.

    Args:
        gradients: what the callback was given.
    """

    def __init__(self, gradients: Iterable[Tensor]) -> None:
        super().__init__()
        self._gradients = {id(g): g for g in gradients}
        self._used: set[int] = set()
        self._data: dict[int, Tensor] = {}
        self._without_graph: dict[int, Tensor] = {}
        self.in_place = ""
        self.wrote_data = False

    def made_without_graph(self, returned: Iterable[Tensor]) -> bool:
        """True if one of these tensors came out of an operation under ``torch.no_grad``."""
        return any(id(x) in self._without_graph for x in returned)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        is_write = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
        if (func == _SET_DATA and id(first) in self._gradients) or (
            is_write and id(first) in self._data
        ):
            self.wrote_data = True
        elif is_write and id(first) in self._used and torch.is_grad_enabled():
            self.in_place = f"{name.strip('_')}_"
        result = func(*args, **(kwargs or {}))
        if func == _GET_DATA:
            if id(first) in self._gradients and isinstance(result, Tensor):
                self._data[id(result)] = result
        elif not (torch.is_grad_enabled() or name in _CONSTANT) and any(
            id(x) in self._gradients or x.requires_grad for x in tree.tensors(args)
        ):
            self._without_graph |= {id(x): x for x in tree.tensors(result)}
            for g in self._gradients:  # the user may return the gradients themselves
                self._without_graph.pop(g, None)
        if not is_write and torch.is_grad_enabled() and name not in _LOOKS:
            self._used |= {id(x) for x in tree.tensors(args) if id(x) in self._gradients}
        return result


_IN_PLACE = ("__imul__", "__iadd__", "__isub__", "__itruediv__", "__idiv__", "__setitem__")
_LOOKS = ("__get__", "detach", "size", "dim", "numel", "item", "__bool__", "__repr__", "__len__")
