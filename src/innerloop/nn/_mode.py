"""Choosing, while an inner loop is tracked, a form of an operation whose second derivative is right.

Some operations of PyTorch have a fast kernel whose gradient cannot be differentiated again (fused
attention), lack a derivative for want of a formula (``embedding_bag``), or have a second derivative
that is wrong without an error (``torch._weight_norm``). Where the user's forward and loss run under
a tracked loop, a ``TorchFunctionMode`` sees each call and hands these to forms that have the
derivative.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from innerloop._utils import torch_private, tree
from innerloop.nn._derivative_order import _one_more, _thread

_log = logging.getLogger("innerloop")


class Replacement(NamedTuple):
    """What is called in place of an operation of PyTorch.

    Attributes:
        name: the operation, as users write it.
        form: takes the arguments of the operation.
        reason: what PyTorch's own lacks.
        silent: whether PyTorch's own gives a wrong derivative without an error; such a one cannot
            be kept.
        when: whether it is to be replaced, by its arguments; None: always.
        opened: whether it is PyTorch's own code, run so that the operations in it are seen.
        autocast: what the form does under ``torch.autocast``: ``"input"`` computes in the dtype of
            its input, ``"float32"`` widens half precision first, as PyTorch's policy for the
            operation says, ``"own"`` follows the policy by itself.
    """

    name: str
    form: Callable[..., Any]
    reason: str
    silent: bool = False
    when: Callable[[Any, Any], bool] | None = None
    opened: bool = False
    autocast: str = "input"


TABLE: dict[Any, Replacement] = {}
"""PyTorch's function -> what is called instead."""
_met: dict[str, str] = {}


def register(
    form: Callable[..., Any],
    *originals: Any,
    name: str,
    reason: str,
    silent: bool = False,
    when: Callable[[Any, Any], bool] | None = None,
    autocast: str = "input",
) -> None:
    """Enter a form into the table, under every function of PyTorch by which users and modules reach the operation."""
    for original in originals:
        TABLE[original] = Replacement(name, form, reason, silent, when, autocast=autocast)


def open_up(function: Any) -> None:
    """Let the mode see what ``function`` of ``torch.nn.functional`` calls.

    Such a function hands itself over to the mode as a whole, and what it calls while the mode looks
    at it is not seen. A copy of it whose ``has_torch_function`` says no runs to its end, with the
    mode on.
    """
    scope = {
        **function.__globals__,
        "has_torch_function": _no,
        "has_torch_function_variadic": _no,
        "has_torch_function_unary": _no,
    }
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    TABLE[function] = Replacement(function.__name__, copy, "", opened=True)


def _no(*tensors: Any) -> bool:
    return False


def replaced() -> dict[str, str]:
    """The operations that were replaced so far in this process, and why.

    Each is also logged once, at the level INFO of the logger ``"innerloop"``: the numbers are those
    of PyTorch, so nothing asks for the user's attention, and a warning would break programs that
    turn warnings into errors.
    """
    return dict(_met)


@contextmanager
def keep_kernels() -> Iterator[None]:
    """Leave PyTorch's own kernels in place inside this block, for a loop whose second derivative through them is not needed.

    Where it is needed after all, an error names the kernel. Operations whose second derivative is
    wrong without an error are replaced all the same. Not for compiled code: enter the block before
    the compiled function is called.

    Example:
        >>> import torch, innerloop
        >>> with innerloop.nn.keep_kernels():
        ...     out = torch.nn.functional.embedding_bag(torch.tensor([[0, 1]]), torch.eye(2))
    """
    before, _thread.kept = _thread.kept, True
    try:
        yield
    finally:
        _thread.kept = before


class Replacing(TorchFunctionMode):
    """Hands the operations of the table to their forms.

    Attributes:
        met: whether there was one.
        on: whether the operations are replaced at all.
    """

    def __init__(self, only_silent: bool = False) -> None:
        super().__init__()
        self.met = False
        self.on = True
        self.only_silent = only_silent

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch for each of its functions, with this mode off."""
        found = TABLE.get(func)
        if found is None or not self.on:
            return func(*args, **kwargs) if kwargs else func(*args)
        return self._instead(found, func, args, kwargs or {})

    def _instead(self, found: Replacement, func: Any, args: Any, kwargs: Any) -> Any:
        if found.opened:
            with self:
                return found.form(*args, **kwargs)
        if (found.when is not None and not found.when(args, kwargs)) or (
            not found.silent and (self.only_silent or _thread.kept)
        ):
            return func(*args, **kwargs)
        self.met = True
        if torch.compiler.is_compiling():
            return found.form(*args, **kwargs)
        _announce(found)
        return _run(found, args, kwargs)


def _run(found: Replacement, args: Any, kwargs: Any) -> Any:
    """By the dtypes that PyTorch's own operation has under autocast; the operations that a form is made of have other policies."""
    if found.autocast == "own" or not torch.is_autocast_enabled(
        device := _device_type((args, kwargs))
    ):
        return found.form(*args, **kwargs)
    if found.autocast == "float32":
        args, kwargs = tree.map_tensors(_widened, (args, kwargs))
    with torch.autocast(device, enabled=False):
        return found.form(*args, **kwargs)


def _device_type(values: Any) -> str:
    return next((x.device.type for x in tree.tensors(values)), "cpu")


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def _announce(found: Replacement) -> None:
    if found.name not in _met:
        _met[found.name] = found.reason
        _log.info(
            "%s is replaced by a form of innerloop's while gradients of gradients are tracked: %s",
            found.name,
            found.reason,
        )


def replacing(only_silent: bool = False) -> AbstractContextManager[Any]:
    """Replace operations inside this block: around a loop whose first step uses none of them, and whose later steps do."""
    return Replacing(only_silent) if only_silent or torch.compiler.is_compiling() else _counted()


@contextmanager
def _counted() -> Iterator[None]:
    with _one_more(), Replacing():
        yield


class Block:
    """The replacing mode of one hand-written loop: on from the loop's start, off while the loop's own code runs.

    Looking at every operation costs 1.5 to 3 % of a small network's step, so a loop whose first
    step met no operation of the table switches it off then. A later step that does meet one is
    noticed in its graph (`check_graph`) and refused.
    """

    def __init__(self) -> None:
        self._mode = Replacing()
        self._inside = False  # the mode is on
        self._counted = False  # the loop runs
        self._levels = 0  # what `_thread.levels` was around it

    def enter(self) -> None:
        """Switch on; a second time does nothing."""
        if not self._counted:
            self._mode.on = self._inside = self._counted = True
            self._levels = _thread.levels
            _thread.loops, _thread.levels = _thread.loops + 1, torch_private.derivative_levels()
            self._mode.__enter__()

    def leave(self) -> None:
        """The end of the loop."""
        if self._counted:
            self._counted = False
            _thread.loops, _thread.levels = _thread.loops - 1, self._levels
            self._switch_off()

    def _switch_off(self) -> None:
        self._mode.on = self._inside = False
        # What lies under another mode (the user's own, or that of a block which ends in another
        # order) is taken off later.
        while isinstance(mode := torch_private.function_mode(), Replacing) and not mode.on:
            mode.__exit__(None, None, None)

    def settle(self) -> None:
        """After the first step: stay on only if that met something."""
        if self._inside and not self._mode.met:
            self._switch_off()

    def off(self) -> AbstractContextManager[Any]:
        """Switch off for a while."""
        return (
            self._off()
            if self._inside and torch_private.function_mode() is self._mode
            else nullcontext()
        )

    def back(self) -> AbstractContextManager[Any]:
        """Inside `off`: the user's own code again, on as before."""
        return (
            self._mode
            if self._inside and torch_private.function_mode() is not self._mode
            else nullcontext()
        )

    @contextmanager
    def _off(self) -> Iterator[None]:
        self._mode.__exit__(None, None, None)
        try:
            yield
        finally:
            self._mode.__enter__()
