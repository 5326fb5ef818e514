"""Modules whose parameters are replaced step by step, with the interface of ``higher``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from innerloop._module.checks import refuse_clipping
from innerloop._module.copier import GONE, Gate, plain
from innerloop._module.view import ModuleView, keep_running_statistics
from innerloop._utils import torch_private
from innerloop._utils.arguments import check_device, check_flag
from innerloop.errors import InvalidInputError
from innerloop.higher._fast_weights import FastWeights, fast_weights
from innerloop.higher._nested import copy_tensor

__all__ = ["PatchedModule", "buffer_sync", "make_functional", "monkeypatch"]

Encapsulator = Callable[["PatchedModule", nn.Module], None]


class PatchedModule(nn.Module):
    """What patching adds to the class of a module, and to the classes of its submodules.

    The module's own code runs on the newest parameters: hooks fire, submodules can be called alone,
    tied weights stay tied (in ``higher`` hooks are lost). ``copy.deepcopy`` and ``pickle`` give a
    patched module of its own, which starts at detached copies of the newest parameters (in
    ``higher`` both fail); of a submodule they give a plain module.

    A submodule that has one of these names itself (a method ``update_params``, an attribute
    ``root``) keeps its own.
    """

    _innerloop_fast: FastWeights
    _innerloop_takes_params = False

    @property
    def is_root(self) -> bool:
        """Return True if this is the module that was patched, not a part of it."""
        return fast_weights(self).is_root(self)

    @property
    def root(self) -> Any:
        """Return the module that was patched."""
        return fast_weights(self).root

    @property
    def direct_submodule_call(self) -> bool:
        """Return True: each part can be called alone (``higher`` keeps books about it)."""
        return True

    @property
    def track_higher_grads(self) -> bool:
        """Return True if parameters of earlier times are kept.

        Switched off, only the newest are kept (``higher`` then goes on with outdated ones).
        """
        return fast_weights(self).track

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise InvalidInputError(f"track_higher_grads={value!r}: write True or False")
        fast = fast_weights(self)
        fast.track = value
        fast.place()
        if not value:
            fast.gate.closed = False
            del fast.history[:-1]

    @property
    def fast_params(self) -> list[Tensor] | None:
        """Return the newest parameters of the whole module, None before there are any.

        Assigning a list is `update_params`.
        """
        return fast_weights(self).newest_or_none()

    @fast_params.setter
    def fast_params(self, value: Iterable[Tensor]) -> None:
        fast_weights(self).take(value)

    @property
    def _fast_params(self) -> list[list[Tensor]]:
        """Return the parameters of each time; programs count them, ``len(fmodel._fast_params)``."""
        return fast_weights(self).history

    @property
    def init_fast_params(self) -> list[Tensor]:
        """Return the parameters at time 0.

        Raises:
            InvalidInputError: they are not kept (``track_higher_grads=False``).
        """
        fast = fast_weights(self)
        if not fast.track:
            raise InvalidInputError(
                "init_fast_params: with track_higher_grads=False only the newest parameters are "
                "kept"
            )
        return fast.of_time(0)

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Take these as the newest parameters; time goes on by one.

        There must be one tensor for each of ``model.parameters()``, in this order.
        """
        fast_weights(self).take(params)

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Any]:
        """Return the parameters after ``time`` updates, in the order of ``nn.Module.parameters``.

        A submodule returns those that belong to it.

        Args:
            recurse: False: without those of submodules (in ``higher`` it has no effect).
            time: 0 is the start, -1 or None the newest. Each `update_params` counts, and so does
                each call with ``params=``.

        Raises:
            InvalidInputError: there are no parameters yet, or not of this time.
        """
        fast = fast_weights(self)
        fast.ready(None)
        whole = recurse and fast.is_root(self)
        newest = fast.read_in_hooks() if whole else fast.newest
        params = newest if time is None or time == -1 else fast.of_time(time)
        if whole:
            fast.reach.asked |= params is newest
            return _unless_clipped(params)
        index = {id(p): i for i, p in enumerate(newest)}
        return _unless_clipped(
            [params[index[id(p)]] for _, p in nn.Module.named_parameters(self, recurse=recurse)]
        )

    def boxed_forward(
        self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Run the module's own ``forward`` at the newest parameters, as `forward` does."""
        fast = fast_weights(self)
        fast.ready(params)
        with fast.kernels():
            return self.forward(*args, **kwargs)

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """Run the module's own ``forward``; with ``params``, after `update_params`."""
        fast = fast_weights(self)
        fast.ready(params)
        with fast.kernels():
            return super().forward(*args, **kwargs)

    def __call__(self, *args: Any, params: Any = None, **kwargs: Any) -> Any:
        fast = fast_weights(self)
        if self._innerloop_takes_params and params is not None:  # the word is the module's own
            kwargs["params"], params = params, None
        fast.ready(
            params
        )  # here and not in forward: hooks that run before it compute with the parameters
        if fast.is_root(self):
            fast.reach.look_at_inputs(args, kwargs)
            if torch.is_grad_enabled():  # weights may be swapped for an evaluation
                fast.check_edits()
        with fast.kernels():
            return super().__call__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        table = torch_private.parameter_table(self)
        if table.get(name) is None or "_innerloop_fast" not in vars(self):
            ours = vars(PatchedModule).get(name)
            if isinstance(ours, property) and ours.fset is None and not isinstance(self, _Part):
                raise InvalidInputError(
                    f"{name} of a patched module is read only: give the attribute another name"
                )
            super().__setattr__(name, value)
            return
        if not isinstance(value, Tensor):
            raise InvalidInputError(
                f"the parameter {name!r} must be a tensor, got {type(value).__name__}"
            )
        fast = fast_weights(self)
        fast.ready(None)
        fast.take([value if p is table[name] else p for p in fast.newest])

    def register_parameter(self, name: str, param: Any) -> None:
        """Register a parameter, as a module does; pruning, which takes one out, is refused.

        Raises:
            InvalidInputError: ``param`` is a tensor of the loop under another name.
        """
        plain = isinstance(param, Tensor) and not isinstance(param, nn.Parameter)
        if plain and "_innerloop_fast" in vars(self):
            own = torch_private.parameter_table(self)
            taken = next((key for key, p in own.items() if p is param), name)
            raise InvalidInputError(GONE.format(taken))
        super().register_parameter(name, param)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load buffers, and parameters where nothing is differentiated.

        Raises:
            NotDifferentiableError: the parameters come of a step: the derivative would pass as if
                nothing had been loaded.
        """
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError as error:  # made out of every error
            edits = fast_weights(self).edits
            if edits.refused is not None and "in loading state_dict" in str(error):
                raise edits.refused from error
            raise

    def __delattr__(self, name: str) -> None:
        if torch_private.parameter_table(self).get(name) is not None and "_innerloop_fast" in vars(
            self
        ):
            raise InvalidInputError(
                f"the parameter {name!r} of a patched module cannot be deleted: delete it in the "
                "model, before it is patched"
            )
        super().__delattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        rebuild, arguments = self.__reduce_ex__(2)
        new = rebuild(*arguments)
        if fast_weights(self).is_root(self):
            # a part that is in what is copied too, by itself, stays a part
            memo.update(
                (id(a), b)
                for a, b in zip(nn.Module.modules(self), nn.Module.modules(new), strict=True)
            )
        return new

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        fast = fast_weights(self)
        return _rebuild, (_plain_copy(self), fast.is_root(self), bool(fast.history), fast.track)


class _Offered:
    """A name of `PatchedModule` on a part; an attribute of the user's own takes precedence."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._ours = vars(PatchedModule)[name]
        self.__doc__ = self._ours.__doc__

    def __get__(self, part: object, cls: object = None) -> Any:
        if part is None:
            return self
        for table in (vars(part), *(vars(part).get(key, {}) for key in _TABLES)):
            if self._name in table:
                return table[self._name]
        return self._ours.__get__(part, cls)

    def __set__(self, part: object, value: object) -> None:
        if self._name in vars(part) or getattr(self._ours, "fset", None) is None:
            vars(part)[self._name] = value
        else:
            self._ours.__set__(part, value)

    def __delete__(self, part: object) -> None:
        if self._name not in vars(part):
            raise AttributeError(self._name)
        del vars(part)[self._name]


_TABLES = torch_private.REGISTRIES
_NAMES = tuple(
    name
    for name in vars(PatchedModule)
    if not name.startswith("_") and name not in ("forward", "register_parameter", "load_state_dict")
)


class _Part(PatchedModule):
    """A base of the classes of submodules; the user's class and its names come first."""


for _name in _NAMES:
    setattr(_Part, _name, _Offered(_name))


class _Unregistered:
    """A base that hides a new subclass from the user's class.

    Its ``__init_subclass__`` may ask for keywords, or keep a list.
    """

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def _unless_clipped(params: Iterable[Any]) -> Iterator[Any]:
    refuse_clipping()
    yield from params


def _plain_copy(patched: PatchedModule) -> nn.Module:
    """Return a copy that is no part of a patched module."""
    view = ModuleView(patched)
    module, parts = view.module, view.modules
    view.write(
        {n: nn.Parameter(p.detach(), requires_grad=p.requires_grad) for n, p in view.read().items()}
    )
    for part in parts:
        del vars(part)["_innerloop_fast"]
        object.__setattr__(part, "__class__", _original(type(part)))
    return copy.deepcopy(module)


_internal_attrs = list(vars(nn.Module()))
"""The attributes that every module has. Programs written against ``higher`` read this name."""

_MonkeyPatchBase = PatchedModule
"""The name that code written against ``higher`` has in its annotations."""


def _rebuild(plain: nn.Module, is_root: bool, has_parameters: bool, track: bool) -> nn.Module:
    """Return what deepcopy and pickle make of the plain copy of a patched module."""
    if not is_root:
        return plain
    return (
        monkeypatch(plain, track_higher_grads=track) if has_parameters else make_functional(plain)
    )


def buffer_sync(
    module: nn.Module, fmodule: nn.Module, device: torch.device | str | None = None
) -> None:
    """Give ``fmodule`` copies of the buffers of ``module``.

    Args:
        module: the module to copy from.
        fmodule: a patched form of it.
        device: where the copies go; default: where the buffers are.

    Raises:
        InvalidInputError: ``fmodule`` lacks one of the submodules.
    """
    check_device(device)
    for which, given in (("module", module), ("fmodule", fmodule)):
        if not isinstance(given, nn.Module):
            raise InvalidInputError(
                f"buffer_sync got {type(given).__name__} as {which}: pass a model and its patched "
                "form"
            )
    module = plain(module)
    for name, buffer in torch_private.buffer_table(module).items():
        copied = buffer.detach().clone() if isinstance(buffer, Tensor) else buffer
        torch_private.buffer_table(fmodule)[name] = (
            copied.to(device) if device is not None and copied is not None else copied
        )
    theirs = torch_private.module_table(fmodule)
    for name, child in torch_private.module_table(module).items():
        if name not in theirs:
            raise InvalidInputError(
                f"{type(fmodule).__name__} has no submodule {name!r}: pass the module that it is "
                "a patched form of"
            )
        part = theirs[name]
        if child is not None and part is not None:
            buffer_sync(child, part, device)


def make_functional(module: nn.Module, encapsulator: Encapsulator | None = None) -> Any:
    """Copy ``module``; each call gives the parameters, ``fmodel(x, params=params)``.

    Args:
        module: any module; it is not changed. (One that is patched already will do, for a loop
            inside a loop.)
        encapsulator: called once with the patched module and ``module``, to give it parameters.

    Returns:
        An instance of a subclass of the module's own class and of `PatchedModule`. Buffers are
        copied.

    Example:
        >>> import torch, innerloop.higher as higher
        >>> fmodel = higher.patch.make_functional(torch.nn.Linear(2, 1, bias=False))
        >>> fmodel(torch.tensor([1.0, 10.0]), params=[torch.tensor([[3.0, 4.0]])])
        tensor([43.])
    """
    if encapsulator is not None and not callable(encapsulator):
        raise InvalidInputError(
            f"encapsulator is a {type(encapsulator).__name__}: pass a function of the patched "
            "module and the module"
        )
    gate = Gate()
    view = ModuleView(module, gate)
    _check_names(plain(module), view.source.values())
    keep_running_statistics(view)
    parts = view.modules
    view.write(
        {
            name: torch.empty_like(p, device="meta", requires_grad=False)
            for name, p in view.source.items()
        }
    )
    view.write_buffers(view.copies_of_buffers())
    new = view.hand_over()
    fast = FastWeights(view, gate, new)
    for part in parts:
        if any("_innerloop_fast" in vars(part)[table] for table in _TABLES):
            raise InvalidInputError(
                f"{type(part).__name__} has an attribute '_innerloop_fast', which is ours: rename "
                "it"
            )
        object.__setattr__(part, "__class__", _patched_class(type(part), part is new))
        vars(part)["_innerloop_fast"] = fast
    if encapsulator is not None:
        encapsulator(new, module)
    return new


def monkeypatch(
    module: nn.Module,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> Any:
    """Copy ``module``, with plain tensors as parameters, which can be replaced.

    Args:
        module: any module; it is not changed.
        device: where the copy lives; default: where the module is.
        copy_initial_weights: start from detached copies; False connects them to
            ``module.parameters()``.
        track_higher_grads: keep the parameters of each time.

    Returns:
        An instance of a subclass of the module's own class and of `PatchedModule`.

    Raises:
        InvalidInputError: not a module, or one that cannot run at other parameters
            (DistributedDataParallel, a ScriptModule).

    Warns:
        UnreachedGradientWarning: once, when ``backward()`` leaves its gradient in copies that
            nobody asked for.

    Example:
        >>> import torch, innerloop.higher as higher
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> fmodel = higher.monkeypatch(model, copy_initial_weights=False)
        >>> fmodel.update_params([3 * p for p in fmodel.parameters()])
        >>> torch.autograd.grad(sum(fmodel.parameters()), model.weight)
        (tensor([[3.]]),)
    """

    def begin(fmodel: PatchedModule, module: nn.Module) -> None:
        fast = fast_weights(fmodel)
        sources = [p for _, p in nn.Module.named_parameters(module)]
        with torch.enable_grad():
            if copy_initial_weights:
                start = [copy_tensor(p, True, device) for p in sources]
                fast.reach.watch_copies(start)
            else:
                start = [p.clone() if device is None else p.clone().to(device) for p in sources]
                fast.reach.outside = True
        if device is not None:
            fast.move_buffers(device)
        fmodel.update_params(start)

    check_device(device)
    check_flag("copy_initial_weights", copy_initial_weights)
    check_flag("track_higher_grads", track_higher_grads)
    fmodel = make_functional(module, begin)
    fmodel.track_higher_grads = track_higher_grads
    return fmodel


def _patched_class(cls: type[nn.Module], is_root: bool) -> type[nn.Module]:
    """Return the class of a patched module whose own class is ``cls``.

    It is found again among the subclasses of ``cls``, which keep nothing alive.
    """
    cls = _original(cls)
    for known in type.__subclasses__(cls):
        if vars(known).get("_innerloop_original") == (cls, is_root):
            return known
    body: dict[str, Any] = {"__module__": cls.__module__, "_innerloop_original": (cls, is_root)}
    if hasattr(
        cls, "flatten_parameters"
    ):  # it would move the weights of RNNs into one block, in place
        body["flatten_parameters"] = _keep_as_they_are
    if not is_root:
        body["_innerloop_takes_params"] = "params" in _arguments(cls.forward)
    bases = (_Unregistered, PatchedModule, cls) if is_root else (_Unregistered, cls, _Part)
    return type(f"Functional{cls.__name__}", bases, body)


def _arguments(function: Callable[..., Any]) -> Iterable[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # not a function of Python
        return ()


def _original(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the user's own class."""
    found: type[nn.Module] = vars(cls).get("_innerloop_original", (cls,))[0]
    return found


def _check_names(module: nn.Module, held: Iterable[Tensor]) -> None:
    """Raise if a root cannot be patched because of the names in its class.

    It has a name that stands for something else on a patched module, or it lists other parameters
    than its modules hold.
    """
    cls = _original(type(module))
    by_class = {name for c in cls.__mro__ if c not in nn.Module.__mro__ for name in vars(c)}
    by_instance = {
        name for table in (vars(module), *(vars(module)[key] for key in _TABLES)) for name in table
    }
    taken = [
        name
        for name in _NAMES
        if name in by_instance or (name in by_class and name != "parameters")
    ]
    if taken:
        raise InvalidInputError(
            f"{cls.__name__} has an attribute {taken[0]!r}, which on a patched module is that of "
            "innerloop.higher.PatchedModule: rename "
            "it, or patch a module that holds this one (submodules keep their own)"
        )
    if by_class & {"parameters", "named_parameters"} and not isinstance(module, PatchedModule):
        listed, own = list(module.parameters()), list(held)
        if len(listed) != len(own) or any(a is not b for a, b in zip(listed, own, strict=True)):
            raise InvalidInputError(
                f"{cls.__name__} overrides parameters() or named_parameters(), which lists "
                f"{len(listed)} tensors, while its modules hold "
                f"{len(own)}: all of them have to be replaced together. Rename the method, and "
                "give the optimizer what it returns"
            )


def _keep_as_they_are(self: nn.Module) -> None:
    """Do nothing: the weights are not this module's to move."""
