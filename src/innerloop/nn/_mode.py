"""The function mode that replaces operations without a right second derivative in inner loops.

Some operations of PyTorch have a fast kernel whose gradient cannot be differentiated again (fused
attention), lack a derivative for want of a formula (``embedding_bag``), or have a second derivative
that is wrong without an error (``torch._weight_norm``). While the user's forward pass and loss run
in a loop, a ``TorchFunctionMode`` sees each call of PyTorch and hands the operations of the
catalogue to their replacements. docs/devnotes/replacing.md shows when the mode is on.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from innerloop._utils import caches, inner_pass, torch_private, tree
from innerloop._utils.execution import Mode, compiling, mode
from innerloop._utils.warn import warn_user
from innerloop.nn._catalogue import CALLS, LOOK_INSIDE, Operation
from innerloop.nn._derivative_order import Args, Kwargs, Situation, _thread, entering_loop
from innerloop.nn._replacements.embedding_bag import padded_embedding, pads

_log = logging.getLogger("innerloop")
_announced: MutableMapping[str, str] = caches.cache("announced replacements")
"""The name of each operation that was replaced in this process -> the reason."""


def look_inside(function: Callable[..., object]) -> Callable[..., object]:
    """Make a copy of a function of ``torch.nn.functional`` that does not hand itself to a mode.

    The function itself hands its whole call to the mode, which then does not see the operations
    inside it. The copy, whose ``has_torch_function`` says no, runs to its end with the mode on.
    """
    assert isinstance(function, types.FunctionType)
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
    return copy


def _no(*tensors: object) -> bool:
    return False


def replaced() -> dict[str, str]:
    """Return the operations that were replaced so far in this process, and why.

    Each is also logged once, at the level INFO of the logger ``"innerloop"``: the numbers are those
    of PyTorch, so nothing asks for the user's attention, and a warning would break programs that
    turn warnings into errors.
    """
    return dict(_announced)


@contextmanager
def keep_kernels() -> Iterator[None]:
    """Keep PyTorch's own kernels inside this block, where no second derivative is needed.

    Where one is needed after all, an error names the operation. Operations whose second derivative
    is wrong without an error are replaced all the same. Not for compiled code: enter the block
    before the compiled function is called.

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


@runtime_checkable
class Watch(Protocol):
    """Looks at operations of the user's code."""

    def wants(self, func: Callable[..., object]) -> bool:
        """Return True if it has to look at this one."""

    def __call__(
        self, func: Callable[..., object], args: Args, result: Callable[[], object]
    ) -> object:
        """Return what ``result()`` returns, which runs the operation."""


class ReplacementMode(TorchFunctionMode):
    """A mode that hands the operations of the catalogue to their replacements.

    Attributes:
        met: True if it has replaced an operation.
        on: False if it replaces nothing (it may still lie below another mode).
    """

    def __init__(self, only_silent: bool = False) -> None:
        super().__init__()
        self.met = False
        self.on = True
        self.only_silent = only_silent
        self.replaces = True
        self.watch: Watch | None = None

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> object:
        """Run ``func`` or its replacement; PyTorch calls this with the mode off."""
        if compiling():
            # The compiler does not find a method in a table, and guards that it is not there.
            func = _METHODS.get(getattr(func, "__name__", ""), func)
        watch = self.watch
        if watch is not None and self.on and watch.wants(func):
            return watch(func, args, lambda: self._replaced(func, args, kwargs))
        if not self.replaces or (func not in _intercepted and func not in _SIZED):
            return func(*args, **kwargs) if kwargs else func(*args)
        return self._replaced(func, args, kwargs)

    def _replaced(self, func: Callable[..., object], args: Args, kwargs: Kwargs | None) -> object:
        found = _intercepted.get(func) if self.replaces else None
        if found is None and func in _SIZED:
            args, kwargs = _of_one_size(func, args, kwargs or {})
        if found is None or not self.on:
            return func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(found, Operation):
            return self._run(found, func, args, kwargs or {})
        if func is Tensor.register_hook:
            self.met = True
            return found(*args, **(kwargs or {}))
        with self:
            return found(*args, **(kwargs or {}))

    def _run(
        self, operation: Operation, func: Callable[..., object], args: Args, kwargs: Kwargs
    ) -> object:
        if func is F.embedding and mode() is not Mode.COMPILING and pads(args, kwargs):
            self.met = True
            padded: Callable[..., object] = padded_embedding
            return padded(*args, **kwargs)
        if (operation.when is not None and not operation.when(args, kwargs)) or (
            not operation.silent and (self.only_silent or _thread.kept)
        ):
            if func in _SIZED:
                args, kwargs = _of_one_size(func, args, kwargs)
            return func(*args, **kwargs)
        self.met = True
        replacement = operation.replacements[func]
        if mode() is Mode.COMPILING:
            return replacement(*args, **kwargs)
        _announce(operation)
        return _under_autocast(operation, replacement, args, kwargs)


class _WhileCompiling(ReplacementMode):
    """A mode of compiled code alone, which the compiler follows at every operation."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> object:
        """Run ``func`` or its replacement."""
        # The compiler does not find a method in a table, and guards that it is not there.
        func = _METHODS.get(getattr(func, "__name__", ""), func)
        if func not in _intercepted and func not in _SIZED:
            return func(*args, **kwargs) if kwargs else func(*args)
        return self._replaced(func, args, kwargs)


class _InForwardMode(ReplacementMode):
    """A mode in which tangents end at ``torch.no_grad`` and ``.data``, as they do at ``detach``.

    PyTorch lets them pass there in forward mode, while in reverse mode gradients end.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> object:
        """Run ``func`` or its replacement, and drop tangents where gradients are off."""
        result = super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if func == _data or (not torch.is_grad_enabled() and not in_place and name != "__set__"):
            return tree.map_tensors(lambda x: x.detach() if tree.differentiable(x) else x, result)
        return result


_data = torch_private.data_getter()


def _register_inner_hook(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> object:
    """Register a hook that acts in the inner backward pass, and not again in the outer one."""
    inner_pass.check_symmetric("a tensor hook (register_hook)")
    return tensor.register_hook(inner_pass.InnerHook(hook))


def _under_autocast(
    operation: Operation, replacement: Callable[..., object], args: Args, kwargs: Kwargs
) -> object:
    """Run a replacement in the dtype that PyTorch's own operation has under autocast.

    The operations that the replacement is made of have other policies.
    """
    if operation.autocast == "own" or not torch.is_autocast_enabled(
        device := _device_type((args, kwargs))
    ):
        return replacement(*args, **kwargs)
    if operation.autocast == "float32":
        args, kwargs = tree.map_tensors(_widened, (args, kwargs))
    with torch.autocast(device, enabled=False):
        return replacement(*args, **kwargs)


def _device_type(values: object) -> str:
    return next((x.device.type for x in tree.tensors(values)), "cpu")


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def _announce(operation: Operation) -> None:
    if operation.name not in _announced:
        _announced[operation.name] = operation.reason
        _log.info(
            "%s is replaced by innerloop's own while gradients of gradients are tracked: %s",
            operation.name,
            operation.reason,
        )


def replacing(only_silent: bool = False) -> AbstractContextManager[object]:
    """Replace operations inside this block, at every step of a loop and outside loops too.

    Write it around a loop whose first step uses none of the operations, and whose later steps do.
    """
    if mode() is Mode.COMPILING:
        return _WhileCompiling(only_silent)
    if only_silent:
        return ReplacementMode(only_silent)
    return _ReplacingInLoop()


class _ReplacingInLoop(entering_loop):
    """Replace operations inside this block, in forward mode too."""

    def __enter__(self) -> None:
        # Where gradients are off all around, nothing tells what the user holds constant.
        pushing = torch_private.forward_mode() and torch.is_grad_enabled()
        super().__enter__()
        self._mode = _InForwardMode() if pushing else ReplacementMode()
        self._mode.__enter__()

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)
        super().__exit__(*error)


@contextmanager
def replacing_as(situation: Situation) -> Iterator[None]:
    """Replace operations inside this block as they were replaced in an earlier run of this code."""
    with situation.again(), ReplacementMode():
        yield


def situation_of_replacing() -> Situation | None:
    """Return what decides here which operations are replaced; None: none is."""
    modes = torch_private.function_modes()
    is_on = any(isinstance(m, ReplacementMode) and m.on and m.replaces for m in modes)
    return Situation.now() if is_on else None


class unwatched:  # noqa: N801 (used like a function, at every compiled step)
    """Look at no operations inside this block: the compiler does not trace what a `Watch` does.

    The modes of other loops that are open are on in a step of one.
    """

    def __enter__(self) -> None:
        self._watched = [
            (m, m.watch)
            for m in torch_private.function_modes()
            if isinstance(m, ReplacementMode) and m.watch is not None
        ]
        for found, _ in self._watched:
            found.watch = None

    def __exit__(self, *_: object) -> None:
        for found, watch in self._watched:
            found.watch = watch


class LoopMode:
    """The replacement mode of one hand-written loop, on while the user's code runs.

    Looking at every operation costs 1.5 to 3 % of a small network's step. So nothing is replaced
    after a first step that met no operation of the catalogue, and the mode is switched off when
    nothing is watched any more. A later step that does meet one is noticed in its graph
    (`_inner_gradient.graph`) and refused.

    Args:
        watch: looks at every operation of the user's code, until `stop_watching`.
        replaces: False if the mode is there for the watch only.
    """

    def __init__(self, watch: Watch | None = None, *, replaces: bool = True) -> None:
        self._mode = ReplacementMode()
        self._mode.watch = watch
        self._mode.replaces = self._counts = replaces
        self._is_on = False
        self._is_entered = False
        self._levels_around = 0  # `_thread.transform_levels` outside the loop

    def enter(self) -> None:
        """Switch the mode on and count this loop; a second call does nothing."""
        if not self._is_entered:
            self._mode.on = self._is_on = self._is_entered = True
            if self._counts:
                self._levels_around = _thread.transform_levels
                _thread.loops += 1
                _thread.transform_levels = torch_private.derivative_levels()
            self._mode.__enter__()

    def leave(self) -> None:
        """Switch the mode off and stop counting this loop."""
        if self._is_entered:
            self._is_entered = False
            if self._counts:
                _thread.loops, _thread.transform_levels = _thread.loops - 1, self._levels_around
            self._switch_off()

    def _switch_off(self) -> None:
        self._mode.on = self._is_on = False
        # A mode that lies under another one (the user's own, or that of a block which ends in
        # another order) cannot be taken off now: this is done when it comes to lie on top.
        while isinstance(top := torch_private.function_mode(), ReplacementMode) and not top.on:
            top.__exit__(None, None, None)

    def after_first_step(self) -> None:
        """Stop replacing if the first step met no operation of the catalogue; go on watching."""
        if self._is_on and not self._mode.met:
            self._mode.replaces = False

    def stop_watching(self) -> None:
        """Look at the user's operations no longer, only at those to be replaced, if any."""
        self._mode.watch = None
        if self._is_on and not self._mode.replaces:
            self._switch_off()

    @property
    def watches(self) -> bool:
        """True if the user's operations have been looked at until now."""
        return self._is_on and self._mode.watch is not None

    @property
    def replaces(self) -> bool:
        """True if operations of the user's code are replaced now."""
        return self._is_on and self._mode.replaces

    def paused(self) -> AbstractContextManager[object]:
        """Switch the mode off inside a block, for the loop's own code."""
        if self._is_on and torch_private.function_mode() is self._mode:
            return _Paused(self._mode)
        return nullcontext()

    def resumed(self) -> AbstractContextManager[object]:
        """Switch the mode on again inside a `paused` block, for the user's code in it."""
        if self._is_on and torch_private.function_mode() is not self._mode:
            return self._mode
        return nullcontext()


class _Paused:
    """A block in which a mode that lies on top is off."""

    def __init__(self, on_top: TorchFunctionMode) -> None:
        self._mode = on_top

    def __enter__(self) -> None:
        self._mode.__exit__(None, None, None)

    def __exit__(self, *_: object) -> None:
        self._mode.__enter__()


_SIZED = frozenset({F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss})


def _of_one_size(func: Callable[..., object], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Broadcast the two arguments of a loss, and say what PyTorch says then.

    PyTorch would say it at a line of ours, the caller of its function while the mode is on.
    """
    given = {**dict(zip(("input", "target"), args, strict=False)), **kwargs}
    a, b = given.get("input"), given.get("target")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape == b.shape:
        return args, kwargs
    if mode() is Mode.COMPILING:
        return args, kwargs
    sizes = a.shape, b.shape
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:  # PyTorch says that in words of its own
        return args, kwargs
    warn_user(
        f"Using a target size ({sizes[1]}) that is different to the input size "
        f"({sizes[0]}). This will likely lead to incorrect results due to "
        "broadcasting. Please ensure they have the same size."
    )
    rest = {k: v for k, v in kwargs.items() if k not in ("input", "target")}
    return (a, b, *args[2:]), rest


_METHODS: Mapping[str, Callable[..., object]] = {"norm": torch.norm}
"""Functions that are the same as the method of this name."""

# One table for all, because the mode looks every call of PyTorch up in it.
_intercepted: Mapping[Callable[..., object], Operation | Callable[..., object]] = {
    **CALLS,
    **{function: look_inside(function) for function in LOOK_INSIDE},
    Tensor.register_hook: _register_inner_hook,
}
