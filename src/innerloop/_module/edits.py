"""Edits of weights between steps, of which autograd sees nothing."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, SupportsIndex, TypeVar

import torch
from torch import Tensor

from innerloop._module.checks import refuse_clipping
from innerloop._module.copier import GONE
from innerloop._types import Params
from innerloop._utils import torch_private
from innerloop.errors import InnerLoopError, InvalidInputError, NotDifferentiableError

Result = TypeVar("Result")

_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_GET_GRAD = torch.Tensor.grad.__get__  # type: ignore[union-attr]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_DETACH = (torch.Tensor.detach, torch.detach)
_ADD_IN_PLACE = {"add_", "sub_", "__iadd__", "__isub__", "_foreach_add_", "_foreach_sub_"}
_ADD = {"add", "__add__", "__radd__", "sub", "__sub__", "clone", "contiguous", "to"}
_VIEW = {
    "__getitem__", "view", "view_as", "reshape", "flatten", "ravel", "t", "transpose", "permute",
    "squeeze", "unsqueeze", "narrow", "select", "detach",
}  # fmt: skip
_WRITE = {"__imul__", "__itruediv__", "__idiv__", "__ipow__", "__setitem__"}
_HARMLESS = {"requires_grad_", "detach_", "share_memory_"}
_INDEPENDENT = ("_like", "new_")
_WATCH = "_innerloop_watch"
"""Where a parameter outside of a block keeps who looks at it."""

_LOOKED_AT = frozenset({_GET_DATA, _SET_DATA, _GET_GRAD, *_DETACH})
_WHOLE, _PIECE = "the memory of a weight", "a part of that memory, or in another order"
_SHIFTED, _OTHER = "weight plus constant", "any other function of weights"


class _Kind(NamedTuple):
    """What a tensor is to a weight, the first one if it comes of several."""

    what: str
    weight: str


class EditWatch:
    """Looks at the operations of the user's code for edits that have another derivative than 1.

    Adding a constant to a weight is right unrecorded. Everything else is refused: clamping,
    scaling, loading. Of a leaf no derivative leads anywhere, and it may be edited at will.

    Args:
        refusal: makes the error, of the weight's name and of how it was edited.

    Attributes:
        seen: True if a weight was ever edited.
        is_on: True while the user's code runs in the block.
        placed: the newest parameters, as they were placed.
        handed_out: copies of those parameters whose memory was handed out since they were placed,
            by identity.
        refused: the error that was raised, if any.
    """

    def __init__(self, refusal: Callable[[str, str], NotDifferentiableError]) -> None:
        self.refusal = refusal
        self.seen = False
        self.refused: InnerLoopError | None = None
        self.is_on = False
        self.placed: Placed | None = None
        self.handed_out: dict[int, Tensor] = {}
        self._params: dict[int, str] = {}
        # A strong reference would keep what is computed from weights, an evaluation say, in memory.
        self._kinds: dict[int, tuple[weakref.ref[Tensor], _Kind]] = {}

    def hand_out(self, p: Tensor) -> None:
        """Keep a copy of a parameter whose memory can be written from now on."""
        if id(p) not in self.handed_out:
            self.is_on = False
            with torch.no_grad():
                self.handed_out[id(p)] = p.clone()
            self.is_on = True

    def enter(self) -> None:
        """Look at the user's code from now on."""
        self.is_on = True
        _watching.append(weakref.ref(self, _watching.remove))

    def stop(self) -> dict[int, Tensor]:
        """Look at nothing any more, and keep nothing; return what was handed out."""
        self.is_on = False
        self.placed = None
        _watching[:] = [other for other in _watching if other() not in (None, self)]
        handed_out, self.handed_out = self.handed_out, {}
        self.forget()
        return handed_out

    def forget(self) -> None:
        """Let go of the tensors that were seen."""
        self._kinds.clear()

    def start(self, params: Params) -> None:
        """Look at these parameters from now on."""
        self._params = {id(p): name for name, p in params.items()}
        self._kinds.clear()

    def wants(self, func: Callable[..., object]) -> bool:
        """True unless autograd records the operation, and it works on weights themselves."""
        return self.is_on and (
            not torch.is_grad_enabled() or bool(self._kinds) or func in _LOOKED_AT
        )

    def __call__(
        self, func: Callable[..., object], args: tuple[object, ...], result: Callable[[], object]
    ) -> object:
        """Run an operation by ``result()``; raise if it edits a weight in another way."""
        if not args:
            return result()
        first = args[0]
        if torch.is_grad_enabled():
            # Recorded, unless it works on what was detached.
            if id(first) in self._params:
                if func == _GET_GRAD:
                    refuse_clipping()
                if func == _SET_DATA:
                    return self._write("data", _Kind(_WHOLE, self._params[id(first)]), args, result)
                if func != _GET_DATA and func not in _DETACH:
                    return result()
            elif not self._kinds:
                return result()
        kind = self._kind(first)
        name = "data" if func == _SET_DATA else getattr(func, "__name__", "")
        is_alias = kind is not None and kind.what in (_WHOLE, _PIECE)
        if is_alias and (
            name == "data" or name in _WRITE or (name[-1:] == "_" and name[-2:] != "__")
            or name in _ADD_IN_PLACE
        ):  # fmt: skip
            assert kind is not None
            found = result() if name in _HARMLESS else self._write(name, kind, args, result)
            self._note(found, kind)
            return found
        if func == _GET_GRAD:
            refuse_clipping()
        others = [self._kind(x) for x in args[1:]]
        found = result()
        known = kind or next(filter(None, others), None)
        if known is None or any(word in name for word in _INDEPENDENT):
            return found
        what = _OTHER
        if is_alias and (func == _GET_DATA or func in _DETACH):
            what = known.what
        elif is_alias and name in _VIEW:
            what = _PIECE
        elif name in _ADD and [kind, *others].count(None) == len(others):
            what = _SHIFTED if known.what in (_WHOLE, _SHIFTED) else _OTHER
        self._note(found, _Kind(what, known.weight))
        return found

    def _write(
        self, name: str, target: _Kind, args: tuple[object, ...], result: Callable[[], object]
    ) -> object:
        """Run an edit by ``result()``; raise unless its derivative is 1, or is none at all."""
        placed = self.placed
        own = {} if placed is None else placed.params
        if name == "data" and _is_same_memory(args[-1], own.get(target.weight)):
            return result()  # the end of p.data += 1
        self.seen = True
        kinds = [self._kind(x) for x in args[1:]]
        if name in _ADD_IN_PLACE:
            allowed = not any(kinds)
        elif name in ("copy_", "data", "__setitem__"):
            value = kinds[-1] if kinds else None
            allowed = _is_itself(args) or (
                name != "__setitem__"
                and value is not None
                and value.weight == target.weight
                and (target.what, value.what) in ((_WHOLE, _WHOLE), (_WHOLE, _SHIFTED))
            )
        else:
            allowed = False
        weight = own.get(target.weight)
        if not allowed and not (weight is not None and weight.is_leaf):
            how = "by load_state_dict or copy_" if name == "copy_" else f"by {name.strip('_')}_"
            how = "by .data = ..." if name == "data" else how
            self.refused = refused(self.refusal, target.weight, how)
            raise self.refused
        if placed is None:
            return result()
        # An earlier edit that was not seen is not to be taken for a part of this one.
        placed.check(lambda: own, self.handed_out)
        found = result()
        self.is_on = False
        placed.accept(self._weights(args[0]), self.handed_out)
        self.is_on = True
        return found

    def _weights(self, x: object) -> set[str]:
        """Return the names of the weights that ``x`` is, or that are among its elements."""
        parts = x if isinstance(x, (list, tuple)) else [x]
        return {kind.weight for part in parts if (kind := self._kind(part)) is not None}

    def _kind(self, x: object) -> _Kind | None:
        if isinstance(x, (list, tuple)):
            kinds = [self._kind(part) for part in x]
            return next(filter(None, kinds), None)
        if id(x) in self._params:
            return _Kind(_WHOLE, self._params[id(x)])
        reference, kind = self._kinds.get(id(x), (_nothing, None))
        return kind if reference() is x else None

    def _note(self, found: object, kind: _Kind) -> None:
        for x in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(x, Tensor) and id(x) not in self._params:
                self._kinds[id(x)] = (weakref.ref(x), kind)


def _nothing() -> None:
    """Return None, as a reference to a tensor does that is gone."""


def _is_itself(args: tuple[object, ...]) -> bool:
    """True if ``w[index] = value`` writes what stands there already, as after ``w[index] += 1``."""
    if len(args) != 3 or not isinstance(args[0], Tensor) or not isinstance(args[2], Tensor):
        return False
    place = args[0][args[1]]  # type: ignore[index]
    value = args[2]
    return (place.data_ptr(), place.shape, place.stride()) == (
        value.data_ptr(), value.shape, value.stride()
    )  # fmt: skip


def _is_same_memory(value: object, weight: Tensor | None) -> bool:
    return (
        isinstance(value, Tensor)
        and weight is not None
        and (value.data_ptr(), value.shape, value.stride(), value.dtype)
        == (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)
    )


class Placed:
    """The parameters as a step placed them, to tell later whether one was edited unrecorded.

    PyTorch counts edits under ``torch.no_grad``. Those through ``.data``, and through an array that
    shares memory, leave no trace but other numbers: a parameter whose memory was handed out is
    compared with a copy.

    Args:
        params: the parameters, by name.
        watch: is told when the memory of one is handed out.
        marks: False if it is not told (compiled code takes plain tensors only).
        in_mode: False if no mode looks at operations: the parameters then hand them to ``watch``.

    Attributes:
        params: the parameters, by name.
    """

    def __init__(
        self, params: Params, watch: EditWatch, *, marks: bool, in_mode: bool = True
    ) -> None:
        self.params = params
        self._versions = torch_private.versions(params.values())
        self._nodes_so_far = torch_private.nodes_so_far()
        self._class = (Weight if in_mode else WatchedWeight) if marks else None
        if not in_mode:
            for p in params.values():
                vars(p)[_WATCH] = weakref.ref(watch)
        self._refusal = watch.refusal
        watch.placed = self
        self.mark()

    def mark(self) -> None:
        """Let the parameters tell when their memory is handed out."""
        if self._class is not None:
            for p in self.params.values():
                if type(p) is Tensor:
                    p.__class__ = self._class

    def check(
        self, now: Callable[[], Mapping[str, Tensor]], handed_out: Mapping[int, Tensor]
    ) -> list[str]:
        """Raise if one of the parameters was edited, and autograd did not see it.

        Args:
            now: returns the parameters as they are now.
            handed_out: copies of those whose memory was handed out, by identity.

        Returns:
            The names of those that were edited in place, and autograd saw it.
        """
        versions = torch_private.versions(self.params.values())
        if versions == self._versions and not handed_out:
            return []
        newest = now()
        recorded: list[str] = []
        for (name, p), was, is_now in zip(
            self.params.items(), self._versions, versions, strict=True
        ):
            if newest[name] is p and not p.is_leaf and self._is_recorded(p):
                recorded.append(name)
            elif newest[name] is p and not p.is_leaf:
                if was != is_now:
                    raise refused(self._refusal, name, "in place")
                copied = handed_out.get(id(p))
                if copied is not None and not _equal(copied, p):
                    raise refused(self._refusal, name, "in place")
        return recorded

    def accept(self, names: Collection[str], handed_out: dict[int, Tensor]) -> None:
        """Take weights as they are now for what was placed."""
        for i, (name, p) in enumerate(self.params.items()):
            if name in names:
                (self._versions[i],) = torch_private.versions([p])
                if id(p) in handed_out:
                    with torch.no_grad():
                        handed_out[id(p)] = p.clone()

    def _is_recorded(self, p: Tensor) -> bool:
        """True if autograd has recorded an edit of ``p`` since it was placed."""
        if torch_private.is_view(p):
            return type(torch_private.recorded_by(p)).__name__ == "CopySlices"
        return torch_private.is_newer(p.grad_fn, self._nodes_so_far)


class _TensorClass(type(Tensor)):  # type: ignore[misc]
    """The class of `Weight`, of which every tensor is said to be an instance.

    `torch.testing.assert_close` compares tensors of related classes only.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tensor)


class Weight(Tensor, metaclass=_TensorClass):
    """The newest value of a parameter in a loop, which tells when its memory is handed out.

    Operations see a plain tensor, as they do for `torch.nn.Parameter`.
    """

    __torch_function__ = torch_private.NO_TORCH_FUNCTION  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """Return the tensor without its history; edits of it are found later."""
        _hand_out(self)
        found: Tensor = _GET_DATA(self)
        return found

    @data.setter
    def data(self, value: Tensor) -> None:
        _hand_out(self)
        _SET_DATA(self, value)

    def detach(self) -> Tensor:
        """Return the tensor without its history; edits of it are found later."""
        _hand_out(self)
        return super().detach()

    def __repr__(self, *, tensor_contents: str | None = None) -> str:  # type: ignore[override]
        return self._as_plain(repr)

    def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
        """Copy the tensor, where PyTorch can."""
        return self._as_plain(lambda plain: plain.__deepcopy__(memo))

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        """Be pickled as a plain tensor."""
        return self._as_plain(lambda plain: plain.__reduce_ex__(protocol))

    def _as_plain(self, function: Callable[[Tensor], Result]) -> Result:
        own, watch = type(self), vars(self).pop(_WATCH, None)
        self.__class__ = Tensor  # type: ignore[assignment]
        try:
            return function(self)
        finally:
            self.__class__ = own
            if watch is not None:
                vars(self)[_WATCH] = watch


_PARAMETRIZING = (
    "torch.nn.utils.parametriz",
    "torch.nn.utils.prune",
    "torch.nn.utils.spectral_norm",
    "torch.nn.utils.weight_norm",
)


def refused(refusal: Callable[[str, str], InnerLoopError], weight: str, how: str) -> InnerLoopError:
    """Return the error for an edit of a weight: that of a parametrization, where one is at work."""
    frame = sys._getframe(1)  # noqa: SLF001
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").startswith(_PARAMETRIZING):
            return InvalidInputError(GONE.format(weight))
        frame = frame.f_back
    return refusal(weight, how)


class WatchedWeight(Weight):  # type: ignore[metaclass]
    """A parameter of a loop without a mode, which lets its watch look at operations on it."""

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run ``func``, and raise if it edits a weight in a way that has a derivative."""
        with torch_private.plain_tensors():
            watch = _watch_of(args)
            if watch is None or not watch.wants(func):
                return func(*args, **(kwargs or {}))
            return watch(func, args, lambda: func(*args, **(kwargs or {})))


def as_plain(params: Params) -> None:
    """Let parameters be plain tensors again, in place."""
    for p in params.values():
        cls = type(p)
        if cls is Weight:
            p.__class__ = Tensor
        elif cls is WatchedWeight:
            p.__class__ = Tensor
            vars(p).pop(_WATCH, None)


_watching: list[weakref.ref[EditWatch]] = []


def _watch_of(args: tuple[object, ...]) -> EditWatch | None:
    """Return the watch of the first parameter among the arguments that has one."""
    for x in args:
        if isinstance(x, (list, tuple)):
            if (found := _watch_of(tuple(x))) is not None:
                return found
        elif type(x) is WatchedWeight:
            reference: weakref.ref[EditWatch] = vars(x)[_WATCH]
            return reference()
    return None


def _hand_out(p: Tensor) -> None:
    """Tell the loop whose newest parameter ``p`` is that its memory can be written from now on."""
    for reference in tuple(_watching):
        watch = reference()
        if watch is None or not watch.is_on or watch.placed is None:
            continue
        if any(q is p for q in watch.placed.params.values()):
            watch.hand_out(p)


def _equal(a: Tensor, b: Tensor) -> bool:
    b = b.detach()
    same = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return same and bool(((a == b) | (a.isnan() & b.isnan())).all())
