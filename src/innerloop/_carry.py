"""Everything that one step of training hands to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Named
from innerloop._utils import tree
from innerloop._utils.random_state import RandomState
from innerloop.errors import InvalidInputError

_alias = (
    torch.ops.aten.alias.default
)  # the identity; unlike the derivative of a view, its own takes a sparse gradient too


class Carry(NamedTuple):
    """Everything that one step hands to the next; a loop can be continued from it.

    Attributes:
        params: named parameters.
        optimizer_state: the optimizer's state.
        buffers: named buffers of the module (running statistics, say).
        random_state: the random generators' state before the next step, or None: whatever it is
            then. A loop continued from this carry draws from here, and leaves the user's own random
            numbers alone.
        time: the number of steps taken since the loop began; a loop that is continued from this
            carry hands ``time + t`` to ``optimizer_hyper`` and to a data function.
            ``carry._replace(time=0)`` starts the schedule again.
    """

    params: dict[str, Tensor]
    optimizer_state: Any
    buffers: dict[str, Tensor]
    random_state: RandomState | None
    time: int = 0

    def detach(self) -> Carry:
        """Return the same values, cut from their history."""
        params, state, buffers = tree.map_tensors(
            torch.Tensor.detach, (self.params, self.optimizer_state, self.buffers)
        )
        return Carry(params, state, buffers, self.random_state, self.time)

    def state_dict(self) -> dict[str, Any]:
        """Return the values as dicts, lists, tensors and numbers, which name no class.

        ``torch.load`` reads it with ``weights_only=True``, where innerloop is not installed too.
        (``torch.save(carry, path)`` writes the carry itself, which only innerloop can load.)

        Raises:
            InvalidInputError: the optimizer's state holds foreign objects (that of `optim.adapt`).

        Example:
            Four steps at once, and two and two by way of a state dict.

            >>> import torch, innerloop
            >>> problem = innerloop.Problem(
            ...     lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.adam()
            ... )
            >>> def steps(start, count):
            ...     return innerloop.unroll(problem, start, None, steps=count).at(-1)
            >>> start = problem.init({"w": torch.tensor(2.0)})
            >>> saved = steps(start, 2).state_dict()
            >>> again = start.load_state_dict(saved)
            >>> again.time, torch.equal(steps(again, 2).params["w"], steps(start, 4).params["w"])
            (2, True)
        """
        random = self.random_state
        return {
            "params": _plain(self.params, "params"),
            "optimizer_state": _plain(self.optimizer_state, "optimizer_state"),
            "buffers": _plain(self.buffers, "buffers"),
            "random_state": None if random is None else [random.cpu, *random.cuda],
            "time": self.time,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Carry:
        """Return a carry with these values; this one, which stays as it is, says what they must be.

        Args:
            state_dict: what `state_dict` of a carry of the same problem returned.

        Returns:
            The carry, on the devices of this one. ``problem.init(params).load_state_dict(found)``
            continues a loop of ``problem``.

        Raises:
            InvalidInputError: a name, a shape or a dtype differs from that of this carry.
        """
        names = ("params", "optimizer_state", "buffers", "random_state", "time")
        if not isinstance(state_dict, Mapping) or set(state_dict) != set(names):
            held = f"a {type(state_dict).__name__}"
            if isinstance(state_dict, Mapping):
                held = f"a dict of {', '.join(map(str, state_dict))}"
            raise InvalidInputError(
                f"the state dict of a carry has the entries {', '.join(names)}, and this is "
                f"{held}: pass what carry.state_dict() returned"
            )
        found = {name: _filled(getattr(self, name), state_dict[name], name) for name in names[:3]}
        random, time = state_dict["random_state"], state_dict["time"]
        if random is not None and not (
            isinstance(random, list) and random and all(isinstance(x, Tensor) for x in random)
        ):
            raise _other_structure("random_state", [], random)
        if not isinstance(time, int):
            raise _other_structure("time", 0, time)
        return Carry(
            **found,
            random_state=None if random is None else RandomState(random[0], tuple(random[1:])),
            time=time,
        )


# A carry can be loaded by torch.load with its default, weights_only=True.
torch.serialization.add_safe_globals([Carry])


def _plain(value: Any, path: str) -> Any:
    """Return ``value`` in dicts, lists, tensors and numbers."""
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _map_children(lambda child, _, where: _plain(child, where), value, None, path)


def _filled(like: Any, given: Any, path: str) -> Any:
    """Return ``given``, which `_plain` made, in the structure of ``like``."""
    if isinstance(like, Tensor) and isinstance(given, Tensor):
        for name in ("shape", "dtype"):
            ours, theirs = (getattr(x, name) for x in (like, given))
            if ours != theirs:
                ours, theirs = (tuple(v) if name == "shape" else v for v in (ours, theirs))
                raise InvalidInputError(
                    f"{path} has {name} {ours}, and in the state dict {theirs}: it is that of "
                    "another model or optimizer"
                )
        return given.to(like.device)
    if isinstance(like, _LEAF) or isinstance(given, _LEAF):
        # Some entries of an optimizer's state are None, or a number, until the first step.
        changes = path.startswith("optimizer_state")
        if not (isinstance(given, _LEAF) and isinstance(like, _LEAF) and changes):
            raise _other_structure(path, like, given)
        return given
    return _map_children(_filled, like, given, path)


_LEAF = (Tensor, bool, int, float, str, type(None))


def _map_children(fn: Callable[[Any, Any, str], Any], value: Any, beside: Any, path: str) -> Any:
    """Apply ``fn(child, child of beside, path)`` to what a container holds.

    Without ``beside`` the result is plain: dicts and lists.
    """
    fields = getattr(value, "_fields", None) if isinstance(value, tuple) else None
    if isinstance(value, dict) or fields is not None:
        keys = list(value) if fields is None else list(fields)
        values = list(value.values()) if fields is None else list(value)
        if beside is None:
            return {k: fn(v, None, f"{path}[{k!r}]") for k, v in zip(keys, values, strict=True)}
        if not isinstance(beside, Mapping) or list(beside) != keys:
            raise _other_structure(path, value, beside)
        found = [fn(v, beside[k], f"{path}[{k!r}]") for k, v in zip(keys, values, strict=True)]
        return dict(zip(keys, found, strict=True)) if fields is None else type(value)(*found)
    children = list(value) if isinstance(value, (list, tuple)) else tree.children(value)
    if not isinstance(value, (list, tuple)) and not children:
        raise InvalidInputError(
            f"{path} is {type(value).__name__}, which cannot be written as dicts and lists: keep "
            "the carry itself, torch.save(carry), and load it with weights_only=False"
        )
    if beside is None:
        return [fn(child, None, f"{path}[{i}]") for i, child in enumerate(children)]
    if not isinstance(beside, list):
        raise _other_structure(path, value, beside)
    if len(beside) != len(children) and isinstance(value, (list, tuple)):
        # A history that grows.
        return type(value)(beside)
    if len(beside) != len(children):
        raise _other_structure(path, value, beside)
    pairs = enumerate(zip(children, beside, strict=True))
    found = [fn(child, given, f"{path}[{i}]") for i, (child, given) in pairs]
    return type(value)(found) if isinstance(value, (list, tuple)) else tree.rebuilt(value, found)


def _other_structure(path: str, like: object, given: object) -> InvalidInputError:
    held, ours = (
        list(getattr(x, "_fields", x)) if isinstance(x, (Mapping, tuple)) else type(x).__name__
        for x in (given, like)
    )
    return InvalidInputError(
        f"{path} has {ours}, and in the state dict {held}: it is that of another model or optimizer"
    )


def aliased(params: Named, before: Named) -> dict[str, Tensor]:
    """Return ``params`` with an alias for each that a step left as it was.

    Times are told apart by the identity of their tensors.
    """
    return {
        n: _alias(p) if p is before.get(n) and p.requires_grad else p for n, p in params.items()
    }
