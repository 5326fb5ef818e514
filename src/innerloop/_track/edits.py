"""Edits of weights between steps, of which autograd sees nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from innerloop._module.checks import refuse_clipping
from innerloop._types import Params
from innerloop._utils import torch_private
from innerloop.errors import NotDifferentiableError

_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_GET_GRAD = torch.Tensor.grad.__get__  # type: ignore[attr-defined]
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
_ALIAS, _SHIFTED, _OTHER = "shares the memory of a weight", "weight plus constant", "any function"


class EditWatch:
    """Looks at the operations of the user's code for edits that have another derivative than 1.

    Adding a constant to a weight is right unrecorded. Everything else is refused: clamping,
    scaling, loading.
    """

    def __init__(self) -> None:
        self.seen = False
        self.refused: NotDifferentiableError | None = None
        self._params: dict[int, str] = {}
        self._kinds: dict[int, tuple[Tensor, str]] = {}

    def start(self, params: Params) -> None:
        """Look at these parameters from now on."""
        self._params = {id(p): name for name, p in params.items() if p.requires_grad}
        self._kinds.clear()

    def wants(self, func: Callable[..., object]) -> bool:
        """True unless autograd records the operation, and it works on weights themselves."""
        return not torch.is_grad_enabled() or bool(self._kinds) or func in _LOOKED_AT

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
                    self._write("data", first, args[1:])
                    return result()
                if func != _GET_DATA and func not in _DETACH:
                    return result()
            elif not self._kinds:
                return result()
        kind = self._kind(first)
        name = "data" if func == _SET_DATA else getattr(func, "__name__", "")
        if kind == _ALIAS and (
            name == "data" or name in _WRITE or (name[-1:] == "_" and name[-2:] != "__")
            or name in _ADD_IN_PLACE
        ):  # fmt: skip
            if name not in _HARMLESS:
                self._write(name, first, args[1:])
            found = result()
            self._note(found, _ALIAS)
            return found
        if func == _GET_GRAD:
            refuse_clipping()
        others = [self._kind(x) for x in args[1:]]
        found = result()
        if kind is None and not any(others):
            return found
        if any(word in name for word in _INDEPENDENT):
            return found
        if kind == _ALIAS and (func == _GET_DATA or name in _VIEW):
            self._note(found, _ALIAS)
        elif name in _ADD and [kind, *others].count(None) == len(others):
            known = kind or next(filter(None, others))
            self._note(found, _OTHER if known == _OTHER else _SHIFTED)
        else:
            self._note(found, _OTHER)
        return found

    def _write(self, name: str, target: object, values: Iterable[object]) -> None:
        self.seen = True
        kinds = [self._kind(x) for x in values]
        if name in _ADD_IN_PLACE:
            allowed = not any(kinds)
        elif name in ("copy_", "data", "__setitem__"):
            allowed = kinds[-1:] in ([_ALIAS], [_SHIFTED])
        else:
            allowed = False
        if not allowed:
            how = "by load_state_dict or copy_" if name == "copy_" else f"by {name.strip('_')}_"
            how = "by .data = ..." if name == "data" else how
            self.refused = unseen_edit(self._name_of(target), how)
            raise self.refused

    def _kind(self, x: object) -> str | None:
        if isinstance(x, (list, tuple)):
            kinds = [self._kind(part) for part in x]
            return next(filter(None, kinds), None)
        if id(x) in self._params:
            return _ALIAS
        return self._kinds[id(x)][1] if id(x) in self._kinds else None

    def _note(self, found: object, kind: str) -> None:
        for x in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(x, Tensor) and id(x) not in self._params:
                self._kinds[id(x)] = (x, kind)

    def _name_of(self, target: object) -> str:
        return self._params.get(id(target), next(iter(self._params.values()), "weight"))


class Versions:
    """The parameters as a step placed them, to tell later whether one was edited unrecorded."""

    def __init__(self, params: Params) -> None:
        self._placed = params
        self._versions = [torch_private.version(p) for p in params.values()]
        self._nodes = [None if torch_private.is_view(p) else p.grad_fn for p in params.values()]

    def check(self, now: Mapping[str, Tensor]) -> None:
        """Raise if one of the parameters was edited in place, and autograd did not see it."""
        for (name, p), version, node in zip(
            self._placed.items(), self._versions, self._nodes, strict=True
        ):
            if (
                torch_private.version(p) != version
                and now[name] is p
                and not _is_recorded(p, node)
                and p.requires_grad
            ):
                raise unseen_edit(name, "in place")


def _is_recorded(p: Tensor, node: object) -> bool:
    """True if autograd saw the edit of ``p``; ``node`` is what its ``grad_fn`` was before."""
    if torch_private.is_view(p):
        return type(torch_private.recorded_by(p)).__name__ == "CopySlices"
    return p.grad_fn is not node


def versions_of(params: Params) -> list[int]:
    """Return how often each parameter has been written in place."""
    return [torch_private.version(p) for p in params.values()]


def check_past(params: Params, versions: Iterable[int], time: int) -> None:
    """Raise if a parameter of the past was overwritten by an edit that came later."""
    for (name, p), version in zip(params.items(), versions, strict=True):
        if torch_private.version(p) != version:
            raise NotDifferentiableError(
                f"the parameter {name!r} of time {time} is gone: no step had moved it when it was "
                "edited in place, so that the past was edited with it. Write "
                f'loop.assign({{"{name}": loop.parameters()["{name}"] + change}}) in place of '
                "the edit"
            )


def unseen_edit(name: str, how: str) -> NotDifferentiableError:
    """Return the error for an edit of a weight of which the derivative would know nothing."""
    return NotDifferentiableError(
        f"the weight {name!r} of loop.model was edited {how} under torch.no_grad or through .data "
        "(clamp_, mul_, load_state_dict, an average of weights): the derivative would pass as if "
        "the edit had not happened. Write "
        f'loop.assign({{"{name}": 0.5 * loop.parameters()["{name}"]}}), with gradients on, which '
        "is differentiated (a detached tensor is a constant, and cuts there). Adding a constant in "
        "place is right as it stands if the loop does it from its first step on; "
        'with learn="nothing" everything is'
    )
