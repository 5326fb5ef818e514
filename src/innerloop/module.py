"""Modules as functions of their parameters, and modules whose parameters can be replaced step by step."""

from __future__ import annotations

import functools
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from innerloop import _private
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.nn.replace import replacing


def functional(model: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor], dict[str, Tensor]]:
    """``model`` as a pure function of its parameters and buffers.

    Args:
        model: any module; it is not changed, neither now nor by the calls.

    Returns:
        ``(call, params, buffers)``. ``call(params, *args, **kwargs)`` returns the output with these parameters, and the buffers
        as they are in the model; ``call(params, *args, buffers=buffers, **kwargs)`` returns ``(output, new_buffers)``. ``params``
        are detached copies, ``buffers`` copies.

    Example:
        >>> import torch, innerloop
        >>> call, params, buffers = innerloop.functional(torch.nn.Linear(2, 1, bias=False))
        >>> call({"weight": torch.tensor([[3.0, 4.0]])}, torch.tensor([1.0, 10.0]))
        tensor([43.])
    """
    view = ModuleView(model)

    def call(
        params: Mapping[str, Tensor], *args: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        check_names(params, view.source)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with refusing_recomputation():
                return evaluate(params, args, buffers, kwargs)
        return evaluate(params, args, buffers, kwargs)

    def evaluate(params: Mapping[str, Tensor], args: Any, buffers: Mapping[str, Tensor] | None, kwargs: Any) -> Any:
        kept = view.source_buffers if buffers is None else buffers
        with replacing(only_silent=True) if torch.is_grad_enabled() else nullcontext():
            output, new_buffers = view.run(params, kept, view.module, *args, **kwargs)
        return output if buffers is None else (output, new_buffers)

    params = {name: p.detach().clone() for name, p in view.source.items()}
    return call, params, {name: b.detach().clone() for name, b in view.source_buffers.items()}


@contextmanager
def refusing_recomputation() -> Iterator[None]:
    """Refuse saved-tensor hooks: a checkpointed forward would be recomputed later, when a module has other weights."""
    message = "innerloop refuses saved tensor hooks here"
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(message):
            yield
    except RuntimeError as error:
        if message not in str(error):
            raise
        raise NotDifferentiableError(
            "activation checkpointing (torch.utils.checkpoint) inside a function of parameters: it would be recomputed with other "
            "weights, switch it off. (Other saved-tensor hooks, save_on_cpu for example, are refused with it.)"
        ) from error


def check_module(model: Any) -> None:
    """Raise unless ``model`` is a module that can be viewed at other parameters."""
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidInputError(
            "a torch.jit.ScriptModule has no second derivative here: pass the Python module it was made from"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise InvalidInputError(
            "a DistributedDataParallel module synchronises gradients by hooks that an inner loop does not run: pass model.module, "
            "and average the outer gradients yourself"
        )


def check_names(params: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise unless each name is a parameter among ``own`` and has its shape."""
    for name, tensor in params.items():
        if name not in own:
            raise InvalidInputError(
                f"params has {name!r}, which is not a parameter of the model; it has {list(own)[:8]}"
            )
        if tensor.shape != own[name].shape:
            raise InvalidInputError(
                f"params[{name!r}] has shape {tuple(tensor.shape)}, the model's parameter {tuple(own[name].shape)}"
            )


def named_parameters(model: nn.Module | Mapping[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """``named_parameters`` of a module, or of several with their key in front; a shared tensor is listed once."""
    return _named(model, nn.Module.named_parameters)


def named_buffers(model: nn.Module | Mapping[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """``named_buffers``, likewise."""
    return _named(model, nn.Module.named_buffers)


def _named(model: nn.Module | Mapping[str, nn.Module], listing: Callable[[nn.Module], Any]) -> list[tuple[str, Any]]:
    if isinstance(model, nn.Module):
        return [
            (name.replace("_orig_mod.", ""), tensor) for name, tensor in listing(model)
        ]  # what torch.compile puts in between
    seen: dict[int, tuple[str, Any]] = {}
    for key, module in model.items():
        for name, tensor in _named(module, listing):
            seen.setdefault(id(tensor), (f"{key}.{name}", tensor))
    return list(seen.values())


class ModuleView:
    """A module with the structure of the user's own, whose parameters and buffers are tensors that can be replaced.

    The tree of modules is copied (same classes, same attributes, same hooks), not the tensors, not anything else. It is the user's
    code that runs, without any wrapper in between; ``isinstance`` holds, hooks fire, submodules can be called alone, a tensor that
    stands in several places is replaced in all of them. The user's own module is never touched.

    Args:
        model: a module, or a dict of modules.
        gate: tells when a backward pass must not read the parameters.

    Attributes:
        module: the copy.
        source, source_buffers: the user's own parameters and buffers by name.
    """

    def __init__(self, model: nn.Module | Mapping[str, nn.Module], gate: Gate | None = None) -> None:
        if not isinstance(model, (nn.Module, Mapping)):
            raise InvalidInputError(f"expected an nn.Module, or a dict of modules, got {type(model).__name__}")
        modules = {"": model} if isinstance(model, nn.Module) else dict(model)
        copier = _Copier(gate)
        for module in modules.values():
            check_module(module)
        copies = {key: copier.copy(plain(module)) for key, module in modules.items()}
        self.module: Any = copies[""] if isinstance(model, nn.Module) else copies
        self._modes = copier.modes
        self._training: list[bool] | None = None
        self._lock = threading.RLock()
        self.source = dict(named_parameters(model))
        self.source_buffers = dict(named_buffers(model))
        for name, p in self.source.items():
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise InvalidInputError(
                    f"parameter {name!r} is not initialised yet: call the (lazy) model once on an example batch"
                )
        self.parameters = {name: copier.places_of(name, p) for name, p in self.source.items()}
        self.buffers = {name: copier.places_of(name, b) for name, b in self.source_buffers.items()}

    def hand_over(self) -> Any:
        """The copy, which the view lets go: it can then be kept inside the copy without a cycle, to `read` and to `write`."""
        module, self.module, self._modes = self.module, None, []
        return module

    @property
    def modules(self) -> list[nn.Module]:
        """All modules of the copy."""
        return [copied for copied, _ in self._modes]

    @property
    def training(self) -> list[bool]:
        """The mode of each module: the user's own at the moment, unless inside `in_modes`."""
        return [original.training for _, original in self._modes] if self._training is None else self._training

    @contextmanager
    def in_modes(self, training: list[bool]) -> Iterator[None]:
        """Run in these modes: those of an earlier run, which is being replayed."""
        before, self._training = self._training, training
        try:
            yield
        finally:
            self._training = before

    def read(self) -> dict[str, Tensor]:
        """The parameters as they are now (the user may have edited or replaced one)."""
        return {name: places[0][0][places[0][1]] for name, places in self.parameters.items()}

    def read_buffers(self) -> dict[str, Tensor]:
        """The buffers as they are now."""
        return {name: places[0][0][places[0][1]] for name, places in self.buffers.items()}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in the places of parameters."""
        for name, tensor in tensors.items():
            for container, key in self.parameters[name]:
                container[key] = tensor

    def write_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in the places of buffers."""
        for name, tensor in tensors.items():
            for container, key in self.buffers[name]:
                container[key] = tensor

    def run(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        function: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """``(function(*args, **kwargs), new_buffers)`` while these parameters and copies of these buffers are in place.

        Not ``torch.func.functional_call``: up to torch 2.13 that does not see a parameter which also stands in a list, and leaves
        its tensors behind in a module that is registered twice.
        """
        # One copy for all threads: they take turns. (Compiled code runs where it was compiled, and knows no locks.)
        with nullcontext() if torch.compiler.is_compiling() else self._lock:
            return self._run(params, buffers, function, *args, **kwargs)

    def _run(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        function: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        for (copied, _), training in zip(self._modes, self.training, strict=True):
            copied.training = training
        own, own_buffers = self.read(), self.read_buffers()
        try:
            self.write(params)
            self.write_buffers({name: buffer.clone() for name, buffer in buffers.items()})
            return function(*args, **kwargs), self.read_buffers()
        finally:
            self.write({name: own[name] for name in params})
            self.write_buffers(own_buffers)


def keep_running_statistics(view: ModuleView) -> None:
    """Let batch and instance norms write copies of their running statistics.

    They write in place without saying so, and the graph of an earlier forward in evaluation mode reads them in its backward pass.
    """
    for module in view.modules:
        if getattr(module, "track_running_stats", False) and vars(module)["_buffers"].get("running_mean") is not None:
            module.register_forward_pre_hook(_copy_running_statistics)


def _copy_running_statistics(module: nn.Module, _: Any) -> None:
    if module.training:
        table = vars(module)["_buffers"]
        table.update({name: table[name].clone() for name in ("running_mean", "running_var")})


def plain(module: nn.Module) -> nn.Module:
    """The module inside the one that ``torch.compile`` returns: a compiled forward has no second derivative."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


_PLAIN = (bool, int, float, str, type(None), torch.Tensor, torch.dtype, torch.device)
_TABLES = {key for key, value in vars(nn.Module()).items() if isinstance(value, (dict, set))} - {
    "_parameters",
    "_buffers",
}
Place = tuple[Any, Any]  # a container and the key under which a tensor stands in it


class Gate:
    """Whether a backward pass may read the newest parameters."""

    def __init__(self) -> None:
        self.closed = False
        self.home = _private.backward_pass()  # a loop may run inside a backward pass, and is at home in that one


class _Parameters(dict[str, Any]):
    """A module's parameters, which notices when a backward pass reads them: it would get the newest ones, not those of its time.

    ``torch.utils.checkpoint`` does that when it recomputes a forward pass; the gradient would be wrong without an error.
    """

    def __init__(self, table: dict[str, Any], gate: Gate) -> None:
        super().__init__(table)
        self.gate = gate

    def __getitem__(self, name: str) -> Any:
        if self.gate.closed and _private.backward_pass() not in (-1, self.gate.home):
            raise NotDifferentiableError(
                f"the parameter {name!r} was read during the outer backward pass, where it has its newest value and not that of the step "
                "being differentiated. Activation checkpointing does that (torch.utils.checkpoint, gradient_checkpointing_enable): "
                "switch it off inside the loop. A hook that runs in the backward pass does it too: let it read the parameters beforehand"
            )
        return super().__getitem__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """A snapshot of the values, as parameters: what a copy of a module has."""
        for p in self.values():
            if isinstance(p, Tensor) and id(p) not in memo:
                memo[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
        return {name: None if p is None else memo[id(p)] for name, p in self.items()}


class _Copier:
    """Copies module trees, sharing all tensors, and remembers where each parameter and buffer stands in the copies."""

    def __init__(self, gate: Gate | None) -> None:
        self.gate = gate
        self.done: dict[int, Any] = {}
        self.keep: list[Any] = []  # ids in `done` stay valid while their objects live
        self.places: dict[int, list[Place]] = {}
        self.modes: list[tuple[nn.Module, nn.Module]] = []

    def copy(self, obj: Any) -> Any:
        """A copy of modules and of the containers that hold modules or parameters; anything else as it is."""
        if id(obj) in self.done:
            return self.done[id(obj)]
        if isinstance(obj, nn.Module):
            inner = plain(obj)
            return self._module(obj) if inner is obj else self.copy(inner)
        if isinstance(obj, types.MethodType) and isinstance(obj.__self__, nn.Module):
            return types.MethodType(obj.__func__, self.copy(obj.__self__))
        if isinstance(obj, functools.partial):
            parts = (obj.func, obj.args, obj.keywords)
            func, args, keywords = (self.copy(part) for part in parts)
            changed = any(a is not b for a, b in zip((func, args, keywords), parts, strict=True))
            return functools.partial(func, *args, **keywords) if changed else obj
        if type(obj) in (list, tuple, set, frozenset, dict, OrderedDict, deque):
            return self._container(obj)
        return obj

    def places_of(self, name: str, tensor: Tensor) -> list[Place]:
        """Where ``tensor`` stands in the copies."""
        for container, _ in self.places[id(tensor)]:
            if not isinstance(container, (dict, list, deque)):
                raise InvalidInputError(
                    f"a module keeps {name!r} in a {type(container).__name__} besides registering it; there it cannot be replaced "
                    "step by step: keep it in a list"
                )
        return self.places[id(tensor)]

    def _module(self, module: nn.Module) -> nn.Module:
        check_module(module)  # a part may be what the whole must not be
        new = object.__new__(type(module))
        self.done[id(module)] = new
        self.keep.append(module)
        self.modes.append((new, module))
        own = new.__dict__
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                own[key] = table = self._table(key, value)
                for name, tensor in table.items():
                    if tensor is not None:
                        self.places.setdefault(id(tensor), []).insert(0, (table, name))
            elif type(value) in _PLAIN:
                own[key] = value
            elif key in _TABLES:
                own[key] = self._own(value) if value else type(value)()
            else:
                own[key] = self.copy(value)
        own["_compiled_call_impl"] = None
        return new

    def _table(self, key: str, table: dict[str, Any]) -> dict[str, Any]:
        return _Parameters(table, self.gate) if key == "_parameters" and self.gate is not None else dict(table)

    def _own(self, table: Any) -> Any:
        """A table of the module itself (submodules, hooks): always a new one, so that additions to the copy stay there."""
        copied = self.copy(table)
        return type(table)(table) if copied is table else copied

    def _container(self, obj: Any) -> Any:
        """A container with copied elements, or the container itself if none of them needed copying."""
        if id(obj) in self.done:
            return self.done[id(obj)]
        self.done[id(obj)] = obj  # a container that holds itself ends here
        self.keep.append(obj)
        items = list(obj.items()) if isinstance(obj, dict) else list(enumerate(obj))
        copied = [(key, self.copy(value)) for key, value in items]
        # Inside loop.model, which may be copied for a loop inside a loop, parameters are plain tensors.
        kept = [(key, value) for key, value in items if isinstance(value, nn.Parameter) or id(value) in self.places]
        has_parameter = bool(kept)
        if not has_parameter and all(a[1] is b[1] for a, b in zip(items, copied, strict=True)):
            return obj
        new = type(obj)(copied) if isinstance(obj, dict) else type(obj)(value for _, value in copied)
        self.done[id(obj)] = new
        for key, value in kept:
            self.places.setdefault(id(value), []).append((new, key))
        return new
