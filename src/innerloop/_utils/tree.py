"""Small helpers on pytrees of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from innerloop._utils import torch_private
from innerloop.errors import InvalidInputError

T = TypeVar("T")
_LEAVES = (Tensor, int, float, str, type(None))
_nodes: dict[type, tuple[Callable[[Any], list[Any]], Callable[[Any, list[Any]], Any]]] = {}


def register(
    cls: type, children: Callable[[Any], list[Any]], rebuild: Callable[[Any, list[Any]], Any]
) -> None:
    """Let all tree functions, here and in PyTorch, look into instances of ``cls``.

    Args:
        cls: the class.
        children: what an instance holds.
        rebuild: ``rebuild(old, new_children)``, an instance like ``old`` that holds these.
    """
    _nodes[cls] = (children, rebuild)
    torch_private.register_tree_node(cls, children, rebuild)


def children(value: object) -> list[Any]:
    """Return what an instance of a registered class holds; nothing for any other."""
    return _nodes[type(value)][0](value) if type(value) in _nodes else []


def rebuilt(value: object, held: list[Any]) -> Any:
    """Return an instance of a registered class like ``value`` that holds these."""
    return _nodes[type(value)][1](value, held)


def map_leaves(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Apply ``fn`` to each leaf of ``tree``.

    As ``torch.utils._pytree.tree_map``, which leaves a reference cycle behind at every call (a
    recursive closure): a loop that maps its state at each step would grow until the garbage
    collector runs. Kinds of containers that are rare here are left to it.
    """
    if isinstance(tree, _LEAVES):
        return fn(tree)
    kind = type(tree)
    # Leaves are told apart here, not in a call for each: states are mapped at every step.
    if kind is dict:
        return {
            key: fn(value) if isinstance(value, _LEAVES) else map_leaves(fn, value)
            for key, value in tree.items()
        }
    if kind is list or isinstance(tree, tuple):
        values = [fn(v) if isinstance(v, _LEAVES) else map_leaves(fn, v) for v in tree]
        if kind is list:
            return values
        return kind(*values) if hasattr(tree, "_fields") else tuple(values)
    if kind in _nodes:
        children, rebuild = _nodes[kind]
        return rebuild(tree, [map_leaves(fn, child) for child in children(tree)])
    return torch_private.tree_map(fn, tree)


def leaves(tree: object) -> list[Any]:
    """Return the leaves of ``tree``, in order."""
    found: list[Any] = []
    _gather(tree, found)
    return found


def _gather(tree: object, found: list[Any]) -> None:
    """Append the leaves of ``tree``, which is not built anew as `map_leaves` does."""
    kind = type(tree)
    inside: Iterable[Any]
    if isinstance(tree, _LEAVES):
        inside = (tree,)
    elif kind is dict:
        inside = tree.values()  # type: ignore[attr-defined]
    elif isinstance(tree, tuple) or kind is list:
        inside = tree  # type: ignore[assignment]
    elif kind in _nodes:
        inside = _nodes[kind][0](tree)
    else:
        map_leaves(found.append, tree)
        return
    for value in inside:
        if isinstance(value, _LEAVES):
            found.append(value)
        else:
            _gather(value, found)


def with_leaves(tree: object, values: list[Any]) -> Any:
    """Build a tree like ``tree`` with these leaves."""
    remaining = iter(values)
    return map_leaves(lambda _: next(remaining), tree)


def map_tensors(fn: Callable[[Tensor], Any], tree: T) -> T:
    """Apply ``fn`` to each tensor of ``tree``; keep every other leaf (numbers, None)."""
    return map_leaves(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def tensors(tree: object) -> Iterator[Tensor]:
    """Return the tensors of ``tree``, in order."""
    return (leaf for leaf in leaves(tree) if isinstance(leaf, Tensor))


def put(leaves: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """Return ``leaves`` with ``values`` in these places."""
    filled = list(leaves)
    for i, value in zip(places, values, strict=True):
        filled[i] = value
    return filled


class _Slot(int):
    """A leaf that stands for the tensor of this index."""


def split(tree: object) -> tuple[list[Tensor], Any]:
    """Return ``(tensors, template)``: the tensors of ``tree``, and the rest of it, for `join`."""
    found: list[Tensor] = []

    def take(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        found.append(leaf)
        return _Slot(len(found) - 1)

    template = map_leaves(take, tree)
    return found, template


def join(template: object, values: Sequence[Any], rest_too: bool = True) -> Any:
    """Undo `split`, with other values in the places of the tensors.

    With ``rest_too=False`` every other leaf is None.
    """
    return map_leaves(
        lambda leaf: values[leaf] if type(leaf) is _Slot else leaf if rest_too else None, template
    )


def differentiable(leaf: object) -> bool:
    """True if a leaf is a tensor that may have a derivative."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def named_tensors(tree: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Return ``(path, tensor)`` for each tensor of ``tree``.

    A path is written as Python would index it: ``['lr']``, ``[0]``.
    """
    if isinstance(tree, Tensor):
        yield prefix or "input", tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from named_tensors(value, f"{prefix}[{key!r}]")
    elif isinstance(tree, (list, tuple)):
        fields = getattr(tree, "_fields", None)
        for i, value in enumerate(tree):
            yield from named_tensors(value, f"{prefix}.{fields[i]}" if fields else f"{prefix}[{i}]")
    else:
        for i, leaf in enumerate(tensors(tree)):
            yield f"{prefix}<{i}>", leaf


def stack(trees: list[Any]) -> Any:
    """Stack the leaves of ``trees`` along a new first dimension, into one pytree."""
    if not trees:
        return None
    flat = [leaves(tree) for tree in trees]
    if len({len(row) for row in flat}) > 1:
        raise InvalidInputError("aux must have the same structure at every step")
    columns = zip(*flat, strict=True)
    return with_leaves(trees[0], [_stacked(column) for column in columns])


def _stacked(column: tuple[Any, ...]) -> Tensor | None:
    if all(leaf is None for leaf in column):
        return None
    for leaf in column:
        if not isinstance(leaf, (Tensor, int, float)):
            raise InvalidInputError(
                f"aux has a leaf {leaf!r}: aux must be made of tensors and numbers, the same at "
                "every step"
            )
    return torch.stack([torch.as_tensor(leaf) for leaf in column])


def assign(tree: object, grads: object) -> None:
    """Add gradients to the ``.grad`` of tensors, as ``backward()`` does.

    So an optimizer and a scheduler of ``torch.optim`` take the outer step, and several tasks
    accumulate. Nothing is written if anything does not fit.

    Args:
        tree: a pytree of leaf tensors that require grad, such as ``dict(model.named_parameters())``
            or ``hyper``. Leaves that are not tensors are passed by.
        grads: their gradients, a pytree of the same structure: a part of what `metagradient`
            returns. None is no gradient, and leaves ``.grad`` as it is.

    Raises:
        InvalidInputError: the structures differ; a gradient has another shape, dtype or device than
            its tensor; a tensor is no leaf or does not require grad.

    Example:
        The outer loss w₁² behind one step w₁ = (1 - lr) w₀ on w²/2: its derivative by lr is
        -2 (1 - lr) w₀², here -4.

        >>> import torch, innerloop
        >>> hyper = {"lr": torch.tensor(0.5, requires_grad=True)}
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2,
        ...     innerloop.optim.sgd(),
        ...     optimizer_hyper=("lr",),
        ... )
        >>> outer = torch.optim.SGD(hyper.values(), lr=0.01)
        >>> value, grads = innerloop.metagradient(
        ...     lambda traj, hyper: traj.params["w"] ** 2,
        ...     problem,
        ...     {"w": torch.tensor(2.0)},
        ...     None,
        ...     steps=1,
        ...     hyper=hyper,
        ...     wrt="hyper",
        ... )
        >>> innerloop.assign(hyper, grads)
        >>> outer.step()
        >>> hyper["lr"]
        tensor(0.5400, requires_grad=True)
    """
    pairs = list(_paired(tree, grads, "tree"))
    for path, x, g in pairs:
        _check_gradient(path, x, g)
    with torch.no_grad():
        for _, x, g in pairs:
            if g is None:
                continue
            if x.grad is None:
                # A copy: the next gradient is added in place.
                x.grad = g.detach().clone()
            elif x.grad.layout is torch.strided:
                x.grad.add_(g.detach())
            else:
                # A dense tensor takes a sparse one, not the other way round.
                x.grad = g.detach() + x.grad


def _paired(tree: object, grads: object, path: str) -> Iterator[tuple[str, Tensor, Any]]:
    """Yield ``(path, tensor, gradient)`` for each tensor of ``tree``."""
    if isinstance(tree, torch.nn.Module):
        raise InvalidInputError(
            f"{path} is a module, {type(tree).__name__}: write "
            "assign(dict(module.named_parameters()), grads)"
        )
    if isinstance(tree, Tensor):
        yield path, tree, grads
        return
    if isinstance(tree, dict):
        here, there = list(tree), list(grads) if isinstance(grads, dict) else None
        if there is None or set(here) != set(there):
            held = type(grads).__name__ if there is None else f"the entries {there}"
            raise InvalidInputError(
                f"{path} has the entries {here}, and grads has {held} there: write "
                'assign(hyper, grads["hyper"]), a gradient for each entry, or None'
            )
        for key, value in tree.items():
            yield from _paired(value, grads[key], f"{path}[{key!r}]")  # type: ignore[index]
        return
    ours, theirs = _children(tree), _children(grads)
    if ours is None:
        if isinstance(grads, Tensor):
            raise InvalidInputError(
                f"{path} is {type(tree).__name__}, which has no .grad, and grads has a tensor "
                "there: the structures differ"
            )
        return
    if theirs is None or len(ours) != len(theirs):
        held = type(grads).__name__ if theirs is None else f"{len(theirs)} entries"
        raise InvalidInputError(
            f"{path} has {len(ours)} entries, and grads has {held} there: grads must have the "
            "structure of the tree, with None where there is no gradient"
        )
    for i, (value, gradient) in enumerate(zip(ours, theirs, strict=True)):
        yield from _paired(value, gradient, f"{path}[{i}]")


def _children(tree: object) -> list[Any] | None:
    """Return what a container other than a dict holds; None for a leaf."""
    if isinstance(tree, _LEAVES):
        return None
    if isinstance(tree, (list, tuple)):
        return list(tree)
    found = leaves(tree)
    return None if len(found) == 1 and found[0] is tree else found


def _check_gradient(path: str, x: Tensor, g: object) -> None:
    """Raise unless ``g`` may be added to ``x.grad``."""
    if g is None:
        return
    if not isinstance(g, Tensor):
        raise InvalidInputError(
            f"the gradient of {path} is {type(g).__name__}: write a tensor, or None"
        )
    if not x.is_leaf or not x.requires_grad:
        why = "requires no grad" if x.is_leaf else "is computed from other tensors"
        raise InvalidInputError(
            f"{path} {why}, so no optimizer reads its .grad: write x.requires_grad_() where the "
            "tensor is made, give the tensors that it is computed from, or leave it out of both"
        )
    for name in ("shape", "dtype", "device"):
        ours, theirs = getattr(x, name), getattr(g, name)
        if ours != theirs:
            ours, theirs = (tuple(v) if name == "shape" else v for v in (ours, theirs))
            raise InvalidInputError(
                f"the gradient of {path} has {name} {theirs}, and the tensor has {ours}: they "
                "belong to different tensors"
            )


def grad_with_aux(fn: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Return ``torch.func.grad(fn, has_aux=True)`` for an aux of any leaves.

    Beside tensors it may hold None, numbers and strings.
    """

    def call(*args: Any) -> tuple[Any, Any]:
        box: list[Any] = []

        def tensors_only(*args: Any) -> tuple[Tensor, list[Tensor]]:
            value, aux = fn(*args)
            box.append(aux)
            return value, list(tensors(aux))

        grads, unwrapped = torch.func.grad(tensors_only, has_aux=True)(*args)
        outside = iter(unwrapped)
        return grads, map_tensors(lambda _: next(outside), box.pop())

    return call
