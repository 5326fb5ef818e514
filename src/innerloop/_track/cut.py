"""The end of the outer gradient at the start of a tracked loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from innerloop.errors import NotDifferentiableError


class _Raise(torch.autograd.Function):
    """The identity, whose backward raises: an inner gradient stops before it, an outer one runs into it."""

    @staticmethod
    def forward(value: Tensor, anchor: Tensor) -> Tensor:
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_dirty(
            inputs[0]
        )  # the output is the input itself, not a view of it: it may be edited in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotDifferentiableError(
            'the outer loss reaches nothing: with learn="nothing" no gradient is kept from step '
            "to step. Write "
            'track(..., learn="init") for the gradient of model.parameters(), or learn="outer" '
            "for tensors outside of the model; "
            "for tensors that only the outer loss uses, torch.autograd.grad(outer, tensors)"
        )


class _RaiseIfNothingReached(torch.autograd.Function):
    """The identity at the start of a loop that is not connected to the model: its backward raises if nothing else was reached."""

    @staticmethod
    def forward(value: Tensor, anchor: Tensor, guard: CutGuard) -> Tensor:
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_dirty(inputs[0])
        ctx.guard = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if not ctx.guard.reached:
            raise NotDifferentiableError(
                'the outer loss reaches no leaf: with learn="outer" (or after loop.detach()) the '
                "gradient ends at the start of the "
                "loop, and no tensor outside of the model that requires grad took part in a step. "
                'Write learn="init" for the '
                "gradient of model.parameters(), or give hyper-parameters as tensors that require "
                "grad. (With first_order=True the inner "
                "gradients are constants: what only the inner loss uses gets no gradient.)"
            )
        return None, None, None


class CutGuard:
    """The parameters at which the outer gradient ends, and whether it reaches anything besides.

    Args:
        learn: as in `innerloop.track`.
    """

    def __init__(self, learn: str) -> None:
        self._nothing = learn == "nothing"
        self.reached = self._nothing

    def leaf(self, value: Tensor) -> Tensor:
        """``value`` (a detached tensor of our own) as a tensor that requires grad and ends the graph."""
        if not value.is_floating_point() and not value.is_complex():
            return value
        anchor = torch.empty(0, requires_grad=True)
        return (
            _Raise.apply(value, anchor)
            if self._nothing
            else _RaiseIfNothingReached.apply(value, anchor, self)
        )

    def follow(self, updated: Iterable[Tensor], current: Iterable[Tensor]) -> None:
        """Look for leaves outside of the loop that a step depends on, in the graph between two times."""
        own = f"{_RaiseIfNothingReached.__name__}Backward"
        seen: set[Any] = {p.grad_fn for p in current}
        stack = [p.grad_fn for p in updated]
        while stack:
            node = stack.pop()
            if node is None or node in seen or type(node).__name__ == own:
                continue
            seen.add(node)
            if type(node).__name__ == "AccumulateGrad":
                self.reached = True
                return
            stack.extend([child for child, _ in node.next_functions])
