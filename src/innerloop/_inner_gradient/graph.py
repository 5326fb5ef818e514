"""Read off an autograd graph: operations without a second derivative, leaves outside the loop."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from innerloop._utils import caches, torch_private
from innerloop.errors import NotDifferentiableError
from innerloop.nn._catalogue import NODES, Operation

COMPILED = (
    "the loss was computed by a function compiled with torch.compile, whose gradient has no "
    "further derivative (PyTorch drops the "
    "second-order term, in part without an error): call the uncompiled function inside the loop. "
    "A compiled model needs no change: "
    "loop.model runs its uncompiled form. For compiled meta-gradients use "
    "innerloop.metagradient(..., compile=True)"
)

_LOOK_UPS = ("EmbeddingBackward0", "EmbeddingBagBackward0")
K = TypeVar("K", str, int)

_REENTRANT = (
    "the loss was computed under reentrant activation checkpointing (torch.utils.checkpoint with "
    "use_reentrant=True before the loop began or in the bridge, or a package of its own), which "
    "hides the parameters inside of it: they would not be trained, without an error. Compute the "
    "loss inside the block of track, or switch checkpointing off"
)

_harmless: MutableMapping[type, bool] = caches.cache("classes of nodes that need no second look")


def check_graph(
    ends: Iterable[Tensor],
    params: Iterable[Tensor],
    *,
    second_order: bool,
    sparse: list[Node] | None = None,
    stops: Iterable[Tensor] = (),
) -> list[Tensor]:
    """Raise if an operation between ``ends`` and ``params`` lacks a second derivative.

    The walk starts at what a step evaluates (the loss, aux) and ends at the current parameters, and
    at ``stops``, behind which the inner gradient does not go.
    Nodes that send a sparse gradient back are appended to ``sparse``, if given: see `sent_sparse`.

    Returns:
        The leaves at which the walk ended, parameters that are leaves among them.
    """
    ends, current = list(ends), list(params)
    if _refusing:
        refuse_own_functions(ends)
    suspects: list[tuple[Any, Operation]] = []
    leaves = [x for x in ends if x.requires_grad and x.grad_fn is None]
    stack: list[Any] = [x.grad_fn for x in ends]
    seen = {p.grad_fn for p in (*current, *stops)}
    harmless = _harmless
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node) in harmless:
            stack += [child for child, _ in node.next_functions if child not in seen]
            continue
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            leaves.append(node.variable)
        elif kind.startswith("CheckpointFunction"):
            raise NotDifferentiableError(_REENTRANT)
        elif second_order and kind.startswith("CompiledFunction"):
            raise NotDifferentiableError(COMPILED)
        elif (
            second_order
            and (operation := NODES.get(kind)) is not None
            and (operation.node_when is None or operation.node_when(node))
        ):
            if operation.order == 3 and kind in operation.nodes:
                node.register_hook(partial(_watch_second, operation))
            else:
                suspects.append((node, operation))
        # PyTorch's own nodes end in a digit, those of custom Functions do not.
        elif (
            second_order
            and kind.endswith("Backward")
            and torch_private.is_once_differentiable(node)
        ):
            raise NotDifferentiableError(
                f"{kind.removesuffix('Backward')} is marked once_differentiable: it has no second "
                "derivative. Write its backward out of "
                "differentiable operations, or take no second derivative: "
                "strategy=innerloop.FirstOrder() (track: first_order=True; "
                "innerloop.higher: track_higher_grads=False)"
            )
        elif kind in _LOOK_UPS:
            if sparse is not None and torch_private.sends_sparse(node):
                sparse.append(node)
        elif kind[-1:].isdigit() and kind not in NODES:
            # One of PyTorch's own, about which there is nothing else to ask.
            harmless[type(node)] = True
        stack.extend([child for child, _ in node.next_functions])
    for node, operation in suspects:
        if _reaches(node, current):
            raise NotDifferentiableError(_lacks_derivative(operation, type(node).__name__))
    return leaves


def sent_sparse(nodes: Iterable[Node], params: Mapping[K, Tensor]) -> set[K]:
    """Return which of ``params`` the nodes send their sparse gradients to.

    The gradient of a loss need not tell: in a sum with a dense one (of a penalty) it is dense, and
    another loss of the same parameter sends a sparse one back alone.
    """
    return {key for key, p in params.items() if any(_reaches(node, [p]) for node in nodes)}


_refusing: list[int] = []


@contextmanager
def refusing_own_functions() -> Iterator[None]:
    """Let `check_graph` refuse what compiled code would drop, while the block runs eagerly."""
    thread = threading.get_ident()
    _refusing.append(thread)
    try:
        yield
    finally:
        _refusing.remove(thread)


def refuse_own_functions(ends: Iterable[Tensor]) -> None:
    """Raise if the graph behind ``ends`` holds a backward rule that is not innerloop's own.

    Outside `refusing_own_functions` nothing is done.
    """
    if not _refusing or threading.get_ident() not in _refusing:
        return
    stack: list[Node | None] = [x.grad_fn for x in ends]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = torch_private.function_of(node)
        if function is not None and function.__module__.partition(".")[0] != "innerloop":
            raise NotDifferentiableError(
                f"the loop uses {function.__name__}, a torch.autograd.Function with a backward "
                "rule of its own, and compiled code silently drops that rule under torch.func "
                "(PyTorch, up to 2.13): it would differentiate the forward function instead. Write "
                "compile=False, or write the function out of PyTorch's operations"
            )
        stack.extend([child for child, _ in node.next_functions])


def _watch_second(operation: Operation, gradients: Sequence[Tensor | None], _: object) -> None:
    """Let the nodes that differentiate ``gradients``, just computed, refuse a third derivative."""
    for node in {g.grad_fn for g in gradients if g is not None and g.grad_fn is not None}:
        node.register_prehook(partial(_refuse_third, operation))


def _refuse_third(operation: Operation, _: object) -> None:
    # In a backward pass gradients are enabled under create_graph=True only.
    if torch.is_grad_enabled():
        raise NotDifferentiableError(
            f"a meta-gradient through {operation.name} is about to be differentiated once more "
            "(create_graph=True), but the third derivative that PyTorch has of it is wrong without "
            "an error. Run the inner loop in `with innerloop.nn.any_order():`, or write "
            "create_graph=False"
        )


def _reaches(start: object, current: list[Tensor]) -> bool:
    """True if the inner gradient passes through ``start``.

    What leads to outer tensors alone is differentiated only once.
    """
    ends = {p.grad_fn for p in current if p.grad_fn is not None}
    leaves = {id(p) for p in current if p.grad_fn is None}
    seen: set[Any] = set()
    stack: list[Any] = [start]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node in ends or id(getattr(node, "variable", None)) in leaves:
            return True
        seen.add(node)
        stack.extend([child for child, _ in node.next_functions])
    return False


def _lacks_derivative(operation: Operation, kind: str) -> str:
    """Say what an operation between the inner loss and the parameters lacks, and what to write."""
    if operation.order == 3:
        return (
            f"the inner loss contains a gradient through {operation.name} ({kind}; a gradient "
            "penalty, say), and the third derivative that PyTorch has of it is wrong without an "
            "error. Run the loop in `with innerloop.nn.any_order():`, or use GroupNorm, or take no "
            "second derivative: first_order=True, strategy=innerloop.FirstOrder()"
        )
    has = (
        "a wrong second derivative, without an error"
        if operation.silent
        else "no second derivative"
    )
    if operation.instead:
        return (
            f"{operation.name} has {has} in PyTorch ({kind}). {operation.instead}. Or take no "
            "second derivative: first_order=True, FirstOrder()"
        )
    return (
        f"{operation.name} ran as PyTorch's own operation ({kind}), which has {has}. innerloop "
        "replaces it inside the loop, under that name: compute the loss there, from the first step "
        "on, and not under innerloop.nn.keep_kernels(). Around a loop whose first step does not "
        "use it, write `with innerloop.nn.replacing():`. Or take no second derivative: "
        "first_order=True, strategy=innerloop.FirstOrder()"
    )
