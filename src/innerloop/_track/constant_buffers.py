"""Buffers under a strategy of `track`: a step that runs again takes them for constants."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import Node

from innerloop._inner_gradient.graph import check_graph
from innerloop._module.view import ModuleView
from innerloop.errors import InvalidInputError


class _Held(torch.autograd.Function):
    """The value of a buffer; its backward raises.

    The anchors lead to all for which somebody may want its derivative: a backward pass that looks
    for one of them comes by here.
    """

    @staticmethod
    def forward(value: Tensor, name: str, *anchors: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor | str, ...], output: Tensor) -> None:
        ctx.buffer = inputs[1]  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> None:
        raise constant_buffer(ctx.buffer)  # type: ignore[attr-defined]


_NAME = f"{_Held.__name__}Backward"


def held_buffer(node: Node) -> str | None:
    """Return the name of the buffer that a node of the graph is the value of, if it is one."""
    found: str | None = getattr(node, "buffer", None) if type(node).__name__ == _NAME else None
    return found


def hold_constant(view: ModuleView, inputs: Iterable[Tensor] = ()) -> None:
    """Let buffers with a derivative keep their values, and raise where that is asked for.

    A step computed them from weights, or the user put them there; no node of the loop carries a
    cotangent of theirs from step to step.

    Args:
        view: whose buffers.
        inputs: what went into the step that has written them.
    """
    for name, b in view.read_buffers().items():
        if b.requires_grad and not (b.grad_fn is not None and held_buffer(b.grad_fn)):
            # Not the buffer itself, whose history holds the activations of the step.
            anchors = [x for x in inputs if x.requires_grad]
            anchors += check_graph([b], (), second_order=False)
            with torch.enable_grad():
                view.write_buffers({name: _Held.apply(b.detach(), name, *anchors)})


def constant_buffer(name: str) -> InvalidInputError:
    """Return the error for a buffer that is used where its derivative would be lost."""
    return InvalidInputError(
        f"the buffer {name!r} of loop.model requires grad (a step computed it from weights, or it "
        "was put there), and with a strategy a step runs again with constant buffers: its "
        "derivative would be lost. Detach it where it is written, self.buffer = x.detach(); or "
        "hand the tensor over, loop.step(fn, args=(tensor,)); or leave strategy= away"
    )
