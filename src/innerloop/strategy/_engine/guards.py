"""Tensors whose gradient raises: a gradient that a strategy lacks is an error, never a zero."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from innerloop._inner_gradient import graph
from innerloop._inner_gradient.stored import Outside
from innerloop._utils import torch_private, tree
from innerloop._utils.execution import Mode, mode
from innerloop.errors import CapturedTensorError, NotDifferentiableError

T = TypeVar("T")


def on_constants(
    step: int,
    run: Callable[[], T],
    error: Callable[[], CapturedTensorError] | None = None,
    outside: Outside | None = None,
) -> T:
    """Run a step whose inputs are constants, and return its results without a graph.

    Args:
        step: its number, for the error.
        run: runs it.
        error: makes the error for what is no step of training.
        outside: what the user's functions see of that which is outside; no captured tensor.

    Raises:
        CapturedTensorError: the step uses a tensor that was not passed in and requires grad, so
            that its gradient would be lost. A leaf that the step makes itself (for a gradient
            penalty, say) is gone with the graph: nobody can ask for its gradient.
    """
    if outside is not None:
        outside.begin()
    found = run()
    if not torch.is_grad_enabled():
        return found
    with_graph = [x for x in tree.tensors(found) if torch_private.has_derivative(x)]
    if not with_graph:
        return found
    if mode() is not Mode.EAGER:
        raise error() if error else _captured(step)
    stops = () if outside is None else outside.now
    walked = graph.check_graph(with_graph, (), second_order=False, stops=stops)
    leaves = [TensorWeakRef(x) for x in walked]
    del walked
    with_graph.clear()
    found = tree.map_tensors(Tensor.detach, found)
    if any(_is_alive(leaf) for leaf in leaves):
        # A cycle of Python objects may hold the graph for a while.
        gc.collect()
        if any(_is_alive(leaf) for leaf in leaves):
            raise error() if error else _captured(step)
    return found


def _is_alive(leaf: TensorWeakRef) -> bool:
    return leaf() is not None


def check_constants(step: int, *results: object) -> None:
    """Raise if a step uses a tensor that was not passed in and requires grad.

    Its gradient would be lost. The step was computed from constants, so no result of it may have a
    derivative.
    """
    for result in results:
        for x in tree.tensors(result):
            if torch_private.has_derivative(x):
                raise _captured(step)


def _captured(step: int) -> CapturedTensorError:
    return CapturedTensorError(
        f"step {step} uses a tensor that requires grad and is captured by the loss, "
        "by optimizer_hyper or by the optimizer, "
        "not one of their arguments: under this strategy it would silently get no "
        "gradient. Hand it in through hyper "
        "(a module: its parameters by name) or params; or detach it "
        "(module.requires_grad_(False)) if it is a constant"
    )


def refuse_inputs(values: T, inputs: Iterable[Tensor], message: str) -> T:
    """Return ``values`` whose gradient with respect to one of ``inputs`` raises.

    All other gradients of them are as before.
    """
    return connected(values, [_Token.apply(x, message) for x in _differentiated(inputs)])


def connected(values: T, tokens: Sequence[Tensor]) -> T:
    """Return ``values`` whose backward pass reaches each of ``tokens``, with the gradient zero."""
    return (
        tree.map_tensors(lambda x: _With.apply(x, *tokens) if tree.differentiable(x) else x, values)
        if tokens
        else values
    )


def refusing_unused(x: Tensor, message: str) -> tuple[Tensor, Tensor]:
    """Return ``x`` for a loop, and a token for its results.

    A backward pass that reaches the token raises if the loop has no gradient for ``x``. Forward
    mode goes through unchanged: it does not tell zero from nothing.
    """
    alias, token = _Unused.apply(x, message)
    return alias, token


def refuse_outputs(values: T, inputs: Iterable[Tensor], message: str) -> T:
    """Return ``values``, constants, whose gradient with respect to any of ``inputs`` raises.

    It does not raise where an outer loss gives them the weight zero.
    """
    anchors = _differentiated(inputs)
    if not anchors:
        return values
    return tree.map_tensors(
        lambda x: _Constant.apply(message, x, *anchors) if tree.differentiable(x) else x, values
    )


def refuse_use(values: T, inputs: Iterable[Tensor], message: str) -> T:
    """Return `refuse_outputs`; under ``torch.func.jvp``, values that raise when they are used.

    A tangent comes with its value, so that nobody knows whether it will be asked for.
    """
    inputs = list(inputs)
    if not under_jvp(inputs):
        return refuse_outputs(values, inputs, message)
    return tree.map_tensors(lambda x: Unusable.of(message) if tree.differentiable(x) else x, values)


def under_jvp(inputs: Iterable[Tensor]) -> bool:
    """True if ``torch.func.jvp`` runs and any of ``inputs`` has a derivative."""
    return bool(torch_private.jvp_levels()) and any(map(torch_private.has_derivative, inputs))


class Unusable(Tensor):
    """A tensor that raises when anything is computed from it."""

    message: str

    @classmethod
    def of(cls, message: str) -> Unusable:
        """Return one with this message."""
        found = torch.zeros(0).as_subclass(cls)
        vars(found)["message"] = message
        return found

    def refuse(self) -> NoReturn:
        """Raise."""
        raise NotDifferentiableError(self.message)

    @classmethod
    def __torch_function__(
        cls, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> NoReturn:
        next(x for x in tree.leaves(args) if isinstance(x, cls)).refuse()
        raise AssertionError


def _differentiated(inputs: Iterable[Tensor]) -> list[Tensor]:
    """Return those of ``inputs`` that something asks a derivative of."""
    if not torch.is_grad_enabled():
        return []
    return [x for x in inputs if tree.differentiable(x) and torch_private.has_derivative(x)]


class _Token(torch.autograd.Function):
    """Zero, with a backward that raises.

    Autograd runs it only where the gradient of its input is asked for.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(anchor: Tensor, message: str) -> Tensor:
        return anchor.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.message = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: object) -> NoReturn:
        raise NotDifferentiableError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: object) -> NoReturn:
        raise NotDifferentiableError(ctx.message)


class _Unused(torch.autograd.Function):
    """The identity and a token, whose backward raises where only the token is reached."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, message: str) -> tuple[Tensor, Tensor]:
        return value.view_as(value), value.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.message = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, token: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is None and token is not None:
            raise NotDifferentiableError(ctx.message)
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return tangent.view_as(tangent), tangent.new_zeros(())


class _With(torch.autograd.Function):
    """The identity in its first argument, connected to the tokens."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, *tokens: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *[torch.zeros_like(token) for token in ctx.saved_tensors])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: object) -> Tensor:
        return tangent.view_as(tangent)


class _Constant(torch.autograd.Function):
    """The identity, whose backward raises if it is reached by anything but zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, value: Tensor, *anchors: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.message, _, *anchors = inputs
        ctx.save_for_backward(*anchors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch_private.innermost(grad).any():
            raise NotDifferentiableError(ctx.message)
        return (None, None, *[torch.zeros_like(anchor) for anchor in ctx.saved_tensors])

    @staticmethod
    def jvp(ctx: Any, *tangents: object) -> NoReturn:
        raise NotDifferentiableError(ctx.message)
