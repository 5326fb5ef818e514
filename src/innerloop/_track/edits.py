"""Edits of weights between steps, of which autograd sees nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple, SupportsIndex, TypeVar

import torch
from torch import Tensor

from innerloop._module.checks import refuse_clipping
from innerloop._types import Params
from innerloop._utils import torch_private
from innerloop.errors import NotDifferentiableError

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
    scaling, loading.

    Attributes:
        seen: True if a weight was ever edited.
        written: True if one was edited since the newest ones were placed.
        is_on: True while the user's code runs in the block.
        placed: the newest parameters.
        handed_out: copies of those parameters whose memory was handed out since they were placed,
            by identity.
        refused: the error that was raised, if any.
    """

    def __init__(self) -> None:
        self.seen = self.written = False
        self.refused: NotDifferentiableError | None = None
        self.is_on = False
        self.placed: Params = {}
        self.handed_out: dict[int, Tensor] = {}
        self._params: dict[int, str] = {}
        self._kinds: dict[int, tuple[Tensor, _Kind]] = {}

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
        _watching.append(weakref.ref(self))

    def stop(self) -> dict[int, Tensor]:
        """Look at nothing any more, and keep nothing; return what was handed out."""
        self.is_on = False
        self.placed = {}
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
        self.written = False

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
                    self._write("data", _Kind(_WHOLE, self._params[id(first)]), args)
                    return result()
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
            if name not in _HARMLESS:
                self._write(name, kind, args)
            found = result()
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

    def _write(self, name: str, target: _Kind, args: tuple[object, ...]) -> None:
        self.seen = self.written = True
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
        if not allowed:
            how = "by load_state_dict or copy_" if name == "copy_" else f"by {name.strip('_')}_"
            how = "by .data = ..." if name == "data" else how
            self.refused = unseen_edit(target.weight, how)
            raise self.refused

    def _kind(self, x: object) -> _Kind | None:
        if isinstance(x, (list, tuple)):
            kinds = [self._kind(part) for part in x]
            return next(filter(None, kinds), None)
        if id(x) in self._params:
            return _Kind(_WHOLE, self._params[id(x)])
        return self._kinds[id(x)][1] if id(x) in self._kinds else None

    def _note(self, found: object, kind: _Kind) -> None:
        for x in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(x, Tensor) and id(x) not in self._params:
                self._kinds[id(x)] = (x, kind)


def _is_itself(args: tuple[object, ...]) -> bool:
    """True if ``w[index] = value`` writes what stands there already, as after ``w[index] += 1``."""
    if len(args) != 3 or not isinstance(args[0], Tensor) or not isinstance(args[2], Tensor):
        return False
    place = args[0][args[1]]  # type: ignore[index]
    value = args[2]
    return (place.data_ptr(), place.shape, place.stride()) == (
        value.data_ptr(), value.shape, value.stride()
    )  # fmt: skip


class Placed:
    """The parameters as a step placed them, to tell later whether one was edited unrecorded.

    PyTorch counts edits under ``torch.no_grad``. Those through ``.data``, and through an array that
    shares memory, leave no trace but other numbers: a parameter whose memory was handed out is
    compared with a copy.

    Args:
        params: the parameters, by name.
        watch: is told when the memory of one is handed out.
        marks: False if it is not told (compiled code takes plain tensors only).

    Attributes:
        params: the parameters, by name.
    """

    def __init__(self, params: Params, watch: EditWatch, *, marks: bool) -> None:
        self.params = params
        self._versions = torch_private.versions(params.values())
        self._nodes_so_far = torch_private.nodes_so_far()
        self._marks = marks
        watch.placed = params
        self.mark()

    def mark(self) -> None:
        """Let the parameters tell when their memory is handed out."""
        if self._marks:
            for p in self.params.values():
                if type(p) is Tensor:
                    p.__class__ = Weight

    def check(self, now: Mapping[str, Tensor], handed_out: Mapping[int, Tensor]) -> None:
        """Raise if one of the parameters was edited, and autograd did not see it.

        Args:
            now: the parameters as they are now.
            placed: the newest parameters.
        handed_out: copies of those whose memory was handed out, by identity.
        """
        versions = torch_private.versions(self.params.values())
        if versions == self._versions and not handed_out:
            return
        for (name, p), was, is_now in zip(
            self.params.items(), self._versions, versions, strict=True
        ):
            if now[name] is p and not self._is_recorded(p):
                if was != is_now:
                    raise unseen_edit(name, "in place")
                copied = handed_out.get(id(p))
                if copied is not None and not _equal(copied, p):
                    raise unseen_edit(name, "in place")

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
    """A parameter of ``loop.model``, which tells when its memory is handed out.

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
        self.__class__ = Tensor  # type: ignore[assignment]
        try:
            return function(self)
        finally:
            self.__class__ = Weight


def as_plain(params: Params) -> None:
    """Let parameters be plain tensors again, in place."""
    for p in params.values():
        if type(p) is Weight:
            p.__class__ = Tensor  # type: ignore[assignment]


_watching: list[weakref.ref[EditWatch]] = []


def _hand_out(p: Tensor) -> None:
    """Tell the loop whose newest parameter ``p`` is that its memory can be written from now on."""
    for reference in tuple(_watching):
        watch = reference()
        if watch is not None and watch.is_on and any(q is p for q in watch.placed.values()):
            watch.hand_out(p)


def _equal(a: Tensor, b: Tensor) -> bool:
    b = b.detach()
    same = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return same and bool(((a == b) | (a.isnan() & b.isnan())).all())


def unseen_edit(weight: str, how: str) -> NotDifferentiableError:
    """Return the error for an edit of a weight of which the derivative would know nothing."""
    return NotDifferentiableError(
        f"the weight {weight!r} of loop.model was edited {how} under torch.no_grad or through "
        ".data (clamp_, mul_, load_state_dict, an average of weights): the derivative would pass "
        "as if the edit had not happened. Write "
        f'loop.assign({{"{weight}": 0.5 * loop.parameters()["{weight}"]}}), with gradients on, '
        "which is differentiated (a detached tensor is a constant, and cuts there). Adding a "
        "constant in place is right as it stands if the loop does it from its first step on; "
        'with learn="nothing" everything is'
    )
