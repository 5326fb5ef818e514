"""The end of the outer gradient at the start of a tracked loop."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import Node

from innerloop.errors import NotDifferentiableError


class _Raise(torch.autograd.Function):
    """The identity, whose backward raises.

    An inner gradient stops before it, an outer one runs into it.
    """

    @staticmethod
    def forward(value: Tensor, anchor: Tensor) -> Tensor:
        return value

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        # The output is the input itself, not a view of it: it may be edited in place.
        ctx.mark_dirty(inputs[0])

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> None:
        raise NotDifferentiableError(
            'the outer loss reaches nothing: with learn="nothing" no gradient is kept from step '
            "to step. Write "
            'track(..., learn="init") for the gradient of model.parameters(), or learn="outer" '
            "for tensors outside of the model; "
            "for tensors that only the outer loss uses, torch.autograd.grad(outer, tensors). (A "
            "step is loop.step(loss), without loss.backward().)"
        )


class _RaiseIfNothingReached(torch.autograd.Function):
    """The identity at the start of a loop that is not connected to the model.

    Its backward raises if the outer gradient reaches nothing else.
    """

    @staticmethod
    def forward(value: Tensor, anchor: Tensor, cut: GraphCut) -> Tensor:
        return value

    @staticmethod
    def setup_context(
        ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, GraphCut], output: Tensor
    ) -> None:
        ctx.mark_dirty(inputs[0])
        ctx.cut = inputs[2]  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[None, None, None]:
        if not ctx.cut.reached:  # type: ignore[attr-defined]
            raise NotDifferentiableError(
                'the outer loss reaches no leaf: with learn="outer" (or after loop.detach()) the '
                "gradient ends at the start of the "
                "loop, and no tensor outside of the model that requires grad took part in a step. "
                'Write learn="init" for the '
                "gradient of model.parameters(), or give hyper-parameters as tensors that require "
                "grad. (With first_order=True the inner "
                "gradients are constants: what only the inner loss uses gets no gradient. A step "
                "is loop.step(loss), without loss.backward().)"
            )
        return None, None, None


class GraphCut:
    """The parameters at which the outer gradient ends, and a note if it reaches anything besides.

    Args:
        learn: as in `innerloop.track`.

    Attributes:
        reached: True once the outer gradient has a goal.
    """

    def __init__(self, learn: str) -> None:
        self._nothing = learn == "nothing"
        self.reached = self._nothing

    def cut(self, value: Tensor) -> Tensor:
        """Return ``value`` as a tensor that requires grad and ends the graph.

        Args:
            value: a detached tensor that nobody else holds.
        """
        if not value.is_floating_point() and not value.is_complex():
            return value
        anchor = torch.empty(0, requires_grad=True)
        cut: Tensor = (
            _Raise.apply(value, anchor)
            if self._nothing
            else _RaiseIfNothingReached.apply(value, anchor, self)
        )
        return cut

    def note_outside_leaves(self, updated: Iterable[Tensor], current: Iterable[Tensor]) -> None:
        """Note if a step depends on leaves outside of the loop.

        Args:
            updated: the parameters after the step.
            current: those before it, at which the search ends.
        """
        own = f"{_RaiseIfNothingReached.__name__}Backward"
        seen: set[Node | None] = {p.grad_fn for p in current}
        stack: list[Node | None] = [p.grad_fn for p in updated]
        while stack:
            node = stack.pop()
            if node is None or node in seen or type(node).__name__ == own:
                continue
            seen.add(node)
            if type(node).__name__ == "AccumulateGrad":
                self.reached = True
                return
            stack.extend([child for child, _ in node.next_functions])
