"""What can be read off an autograd graph: whether compiled code is in it, and which leaves it reaches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from innerloop.errors import NotDifferentiableError

COMPILED = (
    "the loss was computed by a function compiled with torch.compile, whose gradient has no further derivative (PyTorch drops the "
    "second-order term, in part without an error): call the uncompiled function inside the loop. A compiled model needs no change: "
    "loop.model runs its uncompiled form. For compiled meta-gradients use innerloop.metagradient(..., compile=True)"
)


def nodes(root: Any, boundary: Iterable[Any] = ()) -> Iterator[Any]:
    """All nodes of the graph from ``root`` down to (and without) those of ``boundary``."""
    seen, stack = set(boundary), [root]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(child for child, _ in node.next_functions)


def is_compiled(node: Any) -> bool:
    """Whether ``node`` is the backward of compiled code."""
    return node is not None and node.name().startswith("CompiledFunction")


class _RaiseInBackward(torch.autograd.Function):
    """The identity, whose backward raises: an inner gradient stops before it, an outer one runs into it."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotDifferentiableError(
            'the outer loss reaches nothing: with learn="nothing" no gradient is kept from step to step. Write '
            'track(..., learn="init") for the gradient of model.parameters(), or learn="outer" for tensors outside of the model; '
            "for tensors that only the outer loss uses, torch.autograd.grad(outer, tensors)"
        )


class _RaiseIfNothingReached(torch.autograd.Function):
    """The identity at the start of a loop that is not connected to the model: its backward raises if nothing else was reached."""

    @staticmethod
    def forward(value: Tensor, guard: CutGuard) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.guard = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if not ctx.guard.reached:
            raise NotDifferentiableError(
                'the outer loss reaches no leaf: with learn="outer" (or after loop.detach()) the gradient ends at the start of the '
                'loop, and no tensor outside of the model that requires grad took part in a step. Write learn="init" for the gradient of '
                "model.parameters(), or give hyper-parameters as tensors that require grad"
            )
        return grads[0], None


class CutGuard:
    """The parameters at which the outer gradient ends, and whether it reaches anything besides.

    Args:
        learn: as in `innerloop.track`.
    """

    def __init__(self, learn: str) -> None:
        self._nothing = learn == "nothing"
        self.reached = self._nothing

    def leaf(self, value: Tensor) -> Tensor:
        """``value`` as a tensor that requires grad and ends the graph."""
        value = value.requires_grad_()
        if self._nothing:
            return _RaiseInBackward.apply(value)
        return _RaiseIfNothingReached.apply(value, self)

    def saw(self, tensors: Iterable[Tensor]) -> None:
        """Hyper-parameters of a step."""
        self.reached = self.reached or any(t.requires_grad for t in tensors)

    def inspect(self, loss: Tensor, current: Iterable[Tensor]) -> None:
        """Walk from an inner loss to the current parameters: raise at compiled code; look for leaves outside of the loop."""
        for node in nodes(loss.grad_fn, (p.grad_fn for p in current)):
            if is_compiled(node):
                raise NotDifferentiableError(COMPILED)
            self.reached = self.reached or hasattr(node, "variable")
