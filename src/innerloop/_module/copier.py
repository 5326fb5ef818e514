"""Copy a module's containers: its parameters can then be replaced, and the user's stay."""

from __future__ import annotations

import copy
import functools
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import ItemsView, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from innerloop._module.checks import check_module, refuse_clipping
from innerloop._utils import caches, torch_private, tree
from innerloop._utils.inner_pass import InnerHook, is_inner_pass
from innerloop.errors import InvalidInputError, NotDifferentiableError


def plain(module: nn.Module) -> nn.Module:
    """Return the module inside the one that ``torch.compile`` made, or the module itself.

    A compiled forward pass has no second derivative.
    """
    return torch_private.uncompiled(module)


_PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
_CONTAINERS = (
    *(list, tuple, set, frozenset, dict),
    *(OrderedDict, defaultdict, Counter, deque),
)
_ARRAYS = {("numpy", "ndarray"), ("builtins", "bytearray")}
_TABLES = {key for key, value in vars(nn.Module()).items() if isinstance(value, (dict, set))} - set(
    torch_private.TENSOR_TABLES
)
Place = tuple[Any, Any]  # a container and the key under which a tensor stands in it


GONE = (
    "the parameter {0!r} is taken out of the module inside the loop, as weight_norm, "
    "spectral_norm, other parametrizations and pruning do: apply them to the model before the loop "
    "begins"
)


class _FixedParametrizations(type):
    """The class of a copy of a module with parametrizations.

    torch makes a class for each such module and keeps its parametrizations there: to remove one
    from the copy would take it out of the user's own module as well.
    """

    def __delattr__(cls, name: str) -> None:
        raise _parametrized_otherwise(name)

    def __setattr__(cls, name: str, value: object) -> None:
        if isinstance(value, property):
            raise _parametrized_otherwise(name)
        super().__setattr__(name, value)


def _parametrized_otherwise(name: str) -> InvalidInputError:
    return InvalidInputError(
        f"a parametrization of {name!r} is added or removed inside the loop (or in a copy of its "
        "module): do it in the model, before the loop begins"
    )


_fixed: MutableMapping[type, type] = caches.cache("classes of parametrized copies", weak=True)


def _class_of_copy(cls: type) -> type:
    """Return the class that a copy has: the module's own, unless torch made that for it alone."""
    if cls.__module__ != parametrize.__name__ or type(cls) is not type:
        return cls
    body = _body(cls)
    known = _fixed.get(cls)
    if known is not None and body.items() == _body(known).items():
        return known
    made: type = _FixedParametrizations(cls.__name__, cls.__bases__, body)
    _fixed[cls] = made
    return made


def _body(cls: type) -> dict[str, object]:
    return {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__", "__doc__")}


class Gate:
    """Whether a backward pass may read the newest parameters.

    Args:
        snapshots: True if copies of the module hold parameters of their own.
    """

    def __init__(self, snapshots: bool = True) -> None:
        self.closed = False
        self.snapshots = snapshots
        self.home = (
            torch_private.backward_pass()
        )  # a loop may run inside a backward pass, and is at home in that one

    def refuses(self) -> bool:
        """True if the gate is closed and a backward pass is running."""
        return self.closed and torch_private.backward_pass() not in (-1, self.home)


def refusal(name: str) -> NotDifferentiableError:
    """Return the error for a parameter that a backward pass computes with."""
    return NotDifferentiableError(
        f"the parameter {name!r} was read during the outer backward pass, where it has "
        "its newest value and not that of the step "
        "being differentiated. Activation checkpointing does that "
        "(torch.utils.checkpoint, gradient_checkpointing_enable): "
        "switch it off inside the loop. A hook that runs in the backward pass does it "
        "too: let it read the parameters beforehand"
    )


_DESCRIPTIONS = ("shape", "dtype", "device", "ndim", "requires_grad", "size", "dim", "numel")


class _Unreadable(Tensor):
    """A parameter in a hook of the outer backward pass: it can be described, not computed with.

    Attributes that are not a tensor's (a note that a hook makes) are those of the parameter itself.
    """

    @staticmethod
    def of(p: Tensor, name: str) -> _Unreadable:
        """Stand in for ``p``; the values are on no device, so nothing can come of them."""
        found = p.detach().to("meta").as_subclass(_Unreadable)
        vars(found).update(_innerloop_parameter=p, _innerloop_name=name)
        return found

    def __getattribute__(self, name: str) -> Any:
        if name in _DESCRIPTIONS:
            return getattr(vars(self)["_innerloop_parameter"], name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_innerloop_parameter"], name)

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(Tensor, name):
            raise refusal(vars(self)["_innerloop_name"])
        setattr(vars(self)["_innerloop_parameter"], name, value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree.leaves((args, kwargs or {})) if isinstance(x, cls)]
        raise refusal(vars(given[0])["_innerloop_name"] if given else "?")


class _CopiedParameter(Tensor):
    """A parameter in a copy of ``loop.model``; ``requires_grad_(False)`` cuts it off."""

    _is_param = True
    # As for nn.Parameter: operations give plain tensors.
    __torch_function__ = torch_private.NO_TORCH_FUNCTION  # type: ignore[assignment]

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Detach from the loop, or leave the tensor as it is."""
        return self if requires_grad else self.detach_()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return another copy, connected as well."""
        if id(self) not in memo:
            memo[id(self)] = (
                _Connect.apply(self)
                if self.requires_grad
                else nn.Parameter(self.detach().clone(), requires_grad=False)
            )
        copied: Tensor = memo[id(self)]
        return copied


class _Connect(torch.autograd.Function):
    """A copy that is a constant of the inner gradient, as in PyTorch, and not of the outer one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        copied = torch_private.of_class(_CopiedParameter, value.detach().clone())
        # It shares the count of changes, and is no cycle.
        ctx.copied = copied.detach()
        ctx.version = torch_private.version(ctx.copied)
        return copied

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor | None:
        if is_inner_pass():
            return None
        if torch_private.version(ctx.copied) != ctx.version:
            raise NotDifferentiableError(
                "the outer loss uses a copy of loop.model (copy.deepcopy, AveragedModel) whose "
                "parameters were changed in place after it was made, which no gradient follows: "
                "use loop.model, or compute the averages from loop.parameters(time=t) and call "
                "torch.func.functional_call(model, averages, x)"
            )
        return grads[0]


class _Parameters(dict[str, Any]):
    """A module's parameters; it notices when a backward pass reads them.

    Such a read would get the newest parameters, not those of the step being differentiated.

    ``torch.utils.checkpoint`` does that when it recomputes a forward pass; the gradient would be
    wrong without an error.
    """

    def __init__(self, table: dict[str, Any], gate: Gate) -> None:
        super().__init__(table)
        self.gate = gate
        self.checkpointed: dict[str, tuple[object, int]] = {}
        """What was read in checkpointed forward passes: the tensor and its version, None if two."""

    def __getitem__(self, name: str) -> Any:
        found = dict.__getitem__(self, name)
        # Checkpointed reads are noted from the first step on, when the gate is still open.
        if torch_private.inside_saved_tensors_hooks() and isinstance(found, Tensor):
            now = (found, torch_private.version(found))
            seen = self.checkpointed.get(name)
            same = seen is not None and seen[0] is found and seen[1] == now[1]
            if torch_private.backward_pass() in (-1, self.gate.home):
                self.checkpointed[name] = now if seen is None or same else (None, 0)
            elif same:
                # A repetition reads what the checkpointed forward pass has read.
                return found
        gate = self.gate
        # `refuses`, written out: this runs at each reading of a parameter.
        if (
            gate.closed
            and torch_private.backward_pass() not in (-1, gate.home)
            and isinstance(found, Tensor)
        ):
            return _Unreadable.of(found, name)
        return found

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """Return the items, which every listing of a module's parameters goes through."""
        refuse_clipping()
        return super().items()

    def __delitem__(self, name: str) -> None:
        """Delete a frozen parameter, which adapters register anew; refuse a trained one."""
        value = super().__getitem__(name)
        if isinstance(value, Tensor) and value.requires_grad:
            raise InvalidInputError(GONE.format(name))
        super().__delitem__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """Return a snapshot of the values, for a copy of the module.

        What is trained stays connected to the loop for an outer loss; the rest are parameters.
        """
        for p in self.values():
            if isinstance(p, Tensor) and id(p) not in memo:
                memo[id(p)] = (
                    nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
                    if self.gate.snapshots or not p.requires_grad
                    else _Connect.apply(p)
                )
        return {name: None if p is None else memo[id(p)] for name, p in self.items()}


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


class _Copier:
    """A copier of module trees that shares parameters, buffers and tensors that require grad.

    Other tensors, NumPy arrays and the usual containers are copied: a forward pass may write them.
    It remembers where each parameter and buffer stands in the copies.

    Args:
        gate: tells when a backward pass must not read the parameters.
        registered: the parameters and buffers.
    """

    def __init__(self, gate: Gate | None, registered: Iterable[Tensor]) -> None:
        self.gate = gate
        self.registered = {id(x) for x in registered}
        self.done: dict[int, Any] = {}
        self.keep: list[Any] = []  # ids in `done` stay valid while their objects live
        self.places: dict[int, list[Place]] = {}
        self.modes: list[tuple[nn.Module, nn.Module]] = []
        self.inside: set[int] = set()  # the modules of the model, for functions that capture them

    def copy(self, obj: object) -> Any:
        """Copy modules, containers, arrays and constant tensors; return all else as it is."""
        if type(obj) in _PLAIN:
            return obj
        if id(obj) in self.done:
            return self.done[id(obj)]
        if isinstance(obj, nn.Module):
            inner = plain(obj)
            return self._module(obj) if inner is obj else self.copy(inner)
        if type(obj) is Tensor or (type(obj).__module__, type(obj).__name__) in _ARRAYS:
            return self._constant(obj)
        if isinstance(obj, types.MethodType) and isinstance(obj.__self__, nn.Module):
            return types.MethodType(obj.__func__, self.copy(obj.__self__))
        if isinstance(obj, functools.partial):
            parts = (obj.func, obj.args, obj.keywords)
            func, args, keywords = (self.copy(part) for part in parts)
            changed = any(a is not b for a, b in zip((func, args, keywords), parts, strict=True))
            return functools.partial(func, *args, **keywords) if changed else obj
        if isinstance(obj, types.FunctionType):
            return self._function(obj)
        if type(obj) in _CONTAINERS:
            return self._container(obj)
        return obj

    def _constant(self, obj: Any) -> Any:
        """Return a copy of a tensor or array, unless it is registered or has a derivative."""
        if id(obj) in self.registered or (isinstance(obj, Tensor) and obj.requires_grad):
            return obj
        self.keep.append(obj)
        new = self.done[id(obj)] = obj.clone() if isinstance(obj, Tensor) else obj.copy()
        return new

    def places_of(self, name: str, tensor: Tensor) -> list[Place]:
        """Return the places at which ``tensor`` stands in the copies."""
        for container, _ in self.places[id(tensor)]:
            if not isinstance(container, (dict, list, deque)):
                raise InvalidInputError(
                    f"a module keeps {name!r} in a {type(container).__name__} besides registering "
                    "it; there it cannot be replaced "
                    "step by step: keep it in a list"
                )
        return self.places[id(tensor)]

    def _module(self, module: nn.Module) -> nn.Module:
        check_module(module)  # a part may be what the whole must not be
        new: Any = object.__new__(_class_of_copy(type(module)))
        self.done[id(module)] = new
        self.keep.append(module)
        self.modes.append((new, module))
        own, parameters = vars(new), torch_private.parameter_table(module)
        plain_types, own_tables, tensor_tables = _PLAIN, _TABLES, torch_private.TENSOR_TABLES
        for key, value in vars(module).items():
            if type(value) in plain_types:
                own[key] = value
            elif key in own_tables:
                own[key] = self._own(value) if value else type(value)()
            elif key in tensor_tables:
                own[key] = table = self._table(value, value is parameters)
                for name, tensor in dict.items(table):
                    if tensor is not None:
                        self.places.setdefault(id(tensor), []).insert(0, (table, name))
            else:
                own[key] = self.copy(value)
                if id(value) in self.registered:
                    self.places.setdefault(id(value), []).append((own, key))
        if torch_private.backward_hooks(new):
            torch_private.wrap_backward_hooks(new, InnerHook)
        torch_private.forget_compiled_call(new)
        return new

    def _table(self, table: dict[str, Any], of_parameters: bool) -> dict[str, Any]:
        """Return a copy of a table; that of parameters notices reads at the wrong time."""
        if of_parameters and self.gate is not None:
            return _Parameters(table, self.gate)
        return dict(table)

    def _own(self, table: Any) -> Any:
        """Copy a table of the module itself (submodules, hooks).

        It is always a new one, so that additions to the copy stay there.
        """
        copied = self.copy(table)
        return type(table)(table) if copied is table else copied

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Return a function whose closure and defaults hold the copies, if they hold modules.

        A module may keep ``lambda z: self.layer(z)``: in the copy that is to use the copy's layer.
        """
        cells = function.__closure__ or ()
        if not (cells or function.__defaults__ or function.__kwdefaults__):
            return function
        self.done[id(function)] = function  # one that refers to itself ends here
        self.keep.append(function)
        filled = [cell for cell in cells if not _is_empty(cell)]
        contents = {id(cell): self._captured(cell.cell_contents) for cell in filled}
        defaults = self._captured(function.__defaults__)
        keywords = self._captured(function.__kwdefaults__)
        changed = {id(c) for c in filled if contents[id(c)] is not c.cell_contents}
        if (
            not changed
            and defaults is function.__defaults__
            and keywords is function.__kwdefaults__
        ):
            return function
        # Cells whose content stays are shared: a function may count its calls there.
        closure = tuple(types.CellType(contents[id(c)]) if id(c) in changed else c for c in cells)
        new = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, defaults, closure
        )
        new.__kwdefaults__ = keywords
        functools.update_wrapper(new, function, updated=())
        del new.__wrapped__  # type: ignore[attr-defined]
        vars(new).update(vars(function))
        self.done[id(function)] = new
        return new

    def _captured(self, content: Any) -> Any:
        """Copy what a function has captured if it holds modules of the model; else it is shared."""
        return self.copy(content) if self._holds_modules(content, set()) else content

    def _holds_modules(self, content: object, seen: set[int]) -> bool:
        """True if ``content`` is a part of the model, or a container or function that holds one."""
        if isinstance(content, nn.Module):
            return id(content) in self.inside
        if type(content) in _PLAIN or id(content) in seen:
            return False
        seen.add(id(content))
        parts: list[object] = []
        if type(content) in _CONTAINERS:
            parts = list(content.values() if isinstance(content, dict) else content)  # type: ignore[call-overload]
        elif isinstance(content, types.FunctionType):
            cells = content.__closure__ or ()
            parts = [cell.cell_contents for cell in cells if not _is_empty(cell)]
            parts += [content.__defaults__, content.__kwdefaults__]
        elif isinstance(content, types.MethodType):
            parts = [content.__self__]
        elif isinstance(content, functools.partial):
            parts = [content.func, content.args, content.keywords]
        return any(self._holds_modules(part, seen) for part in parts)

    def _container(self, obj: Any) -> Any:
        """Return a container with copied elements, or the container itself if none was copied."""
        if id(obj) in self.done:
            return self.done[id(obj)]
        self.keep.append(obj)
        changeable = type(obj) not in (tuple, frozenset)
        # A container that holds itself ends here.
        self.done[id(obj)] = new = copy.copy(obj) if changeable else obj
        items = list(obj.items()) if isinstance(obj, dict) else list(enumerate(obj))
        copied = [(key, self.copy(value)) for key, value in items]
        # Inside loop.model, which may be copied for a loop inside a loop, parameters are plain
        # tensors.
        kept = [
            (key, value)
            for key, value in items
            if isinstance(value, nn.Parameter) or id(value) in self.registered
        ]
        same = all(a[1] is b[1] for a, b in zip(items, copied, strict=True))
        if not changeable:
            if same and not kept:
                return obj
            self.done[id(obj)] = new = type(obj)(value for _, value in copied)
        elif not same and isinstance(obj, set):
            new.clear()
            new.update(value for _, value in copied)
        elif not same:
            for key, value in copied:
                new[key] = value
        for key, value in kept:
            self.places.setdefault(id(value), []).append((new, key))
        return new
