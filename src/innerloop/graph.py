"""What can be read off an autograd graph: whether compiled code is in it, and which leaves it reaches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop import _private
from innerloop.errors import NotDifferentiableError

COMPILED = (
    "the loss was computed by a function compiled with torch.compile, whose gradient has no further derivative (PyTorch drops the "
    "second-order term, in part without an error): call the uncompiled function inside the loop. A compiled model needs no change: "
    "loop.model runs its uncompiled form. For compiled meta-gradients use innerloop.metagradient(..., compile=True)"
)


ATTENTION = "F.scaled_dot_product_attention"
KERNELS = {
    "WeightNormInterfaceBackward0": "torch._weight_norm",
    "CrossMapLRN2dBackward": "nn.CrossMapLRN2d",
    "CdistBackward0": "torch.cdist",
    "PdistBackward0": "F.pdist",
    "CtcLossBackward0": "F.ctc_loss",
    "CudnnCtcLossBackward0": "F.ctc_loss",
    "EmbeddingBagBackward0": "F.embedding_bag",
    "MultiMarginLossBackward0": "F.multi_margin_loss",
    "MultilabelMarginLossBackward0": "F.multilabel_margin_loss",
    "HardsigmoidBackward0": "F.hardsigmoid",
    "SegmentReduceBackward0": "torch.segment_reduce",
    "StandardGammaBackward0": "torch.distributions.Gamma.rsample",
    "CholeskyInverseBackward0": "torch.cholesky_inverse",
    "EmbeddingBackward0": "F.embedding(scale_grad_by_freq=True)",
    "CudnnRnnBackward0": "a recurrent layer in cuDNN",
    "MiopenRnnBackward0": "a recurrent layer in MIOpen",
    "ScaledDotProductFlashAttentionForCpuBackward0": ATTENTION,
    "ScaledDotProductFlashAttentionBackward0": ATTENTION,
    "ScaledDotProductEfficientAttentionBackward0": ATTENTION,
    "ScaledDotProductCudnnAttentionBackward0": ATTENTION,
    "ScaledDotProductFusedAttentionOverrideableBackward0": ATTENTION,
}
"""Nodes of the autograd graph whose second derivative is missing, or wrong without an error: what a user called to get them."""
WRONG = frozenset({"WeightNormInterfaceBackward0", "CholeskyInverseBackward0", "EmbeddingBackward0"})
"""Those of them where it is wrong without an error (the second: for a full matrix)."""
CURES = {
    "F.embedding(scale_grad_by_freq=True)": "Leave it away inside the loop, and divide the gradient: loop.step(loss, grad_callback=...)",
    "nn.CrossMapLRN2d": "Its gradient is not that of its forward either. Write nn.LocalResponseNorm",
    "torch.segment_reduce": "Write torch.scatter_reduce, or index_add",
    "torch.distributions.Gamma.rsample": "Draw by another reparametrisation, or hold the sample constant",
}
"""What to write instead of an operation that innerloop does not replace."""


WRONG_THIRD = {
    "NativeLayerNormBackward0": "layer_norm",
    "NativeBatchNormBackward0": "batch_norm (or instance_norm)",
    "CudnnBatchNormBackward0": "batch_norm (or instance_norm)",
    "MiopenBatchNormBackward0": "batch_norm (or instance_norm)",
}
"""Nodes whose second derivative is right, and whose third is wrong without an error."""
DIFFERENTIATED = frozenset(kind.removesuffix("0") + "Backward0" for kind in WRONG_THIRD)
"""What differentiating those leaves in the graph: a loss that contains one is a function of a gradient."""


class _Raise(torch.autograd.Function):
    """The identity, whose backward raises: an inner gradient stops before it, an outer one runs into it."""

    @staticmethod
    def forward(value: Tensor, anchor: Tensor) -> Tensor:
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_dirty(inputs[0])  # the output is the input itself, not a view of it: it may be edited in place

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
                'the outer loss reaches no leaf: with learn="outer" (or after loop.detach()) the gradient ends at the start of the '
                'loop, and no tensor outside of the model that requires grad took part in a step. Write learn="init" for the '
                "gradient of model.parameters(), or give hyper-parameters as tensors that require grad. (With first_order=True the inner "
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
        return _Raise.apply(value, anchor) if self._nothing else _RaiseIfNothingReached.apply(value, anchor, self)

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


def inspect(ends: Iterable[Tensor], current: Iterable[Tensor], second_order: bool) -> list[Tensor]:
    """Walk from what a step evaluates (the loss, aux) to the current parameters: raise at code that has no second derivative.

    Returns:
        The leaves outside of the loop.
    """
    ends, current = list(ends), list(current)
    kernels = []
    leaves = [x for x in ends if x.requires_grad and x.grad_fn is None]
    stack: list[Any] = [x.grad_fn for x in ends]
    seen = {p.grad_fn for p in current}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            leaves.append(node.variable)
        elif second_order and kind.startswith("CompiledFunction"):
            raise NotDifferentiableError(COMPILED)
        elif second_order and (kind in KERNELS or kind in DIFFERENTIATED) and not _is_plain_embedding(node, kind):
            kernels.append(node)
        elif second_order and kind in WRONG_THIRD:
            node.register_hook(_watch_second)
        elif second_order and _once_differentiable(node):
            raise NotDifferentiableError(
                f"{kind.removesuffix('Backward')} is marked once_differentiable: PyTorch would drop its second derivative without a word. "
                "Write its backward out of differentiable operations, or use strategy=innerloop.FirstOrder() (track: first_order=True)"
            )
        stack.extend([child for child, _ in node.next_functions])
    for node in kernels:
        if _reaches(node, current):
            raise NotDifferentiableError(_without_second(type(node).__name__))
    return leaves


def _watch_second(gradients: Sequence[Tensor | None], _: Any) -> None:
    """A hook on a node that has just computed ``gradients``: let the nodes that differentiate them look out for a third derivative."""
    for node in {g.grad_fn for g in gradients if g is not None and g.grad_fn is not None}:
        node.register_prehook(_refuse_third)


def _refuse_third(_: Any) -> None:
    if torch.is_grad_enabled():  # in a backward pass: create_graph
        raise NotDifferentiableError(
            "a meta-gradient through layer, batch or instance norm is about to be differentiated once more (create_graph=True), and the "
            "third derivative that PyTorch has of these is wrong without an error. Run the inner loop in `with innerloop.nn.any_order():`, "
            "or write create_graph=False"
        )


def _reaches(start: Any, current: list[Tensor]) -> bool:
    """Whether the inner gradient passes through a node; what leads to outer tensors alone is differentiated only once."""
    ends = {p.grad_fn for p in current if p.grad_fn is not None}
    leaves = {id(p) for p in current if p.grad_fn is None}
    seen, stack = set(), [start]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node in ends or id(getattr(node, "variable", None)) in leaves:
            return True
        seen.add(node)
        stack.extend([child for child, _ in node.next_functions])
    return False


def _is_plain_embedding(node: Any, kind: str) -> bool:
    return kind == "EmbeddingBackward0" and not _private.divides_by_frequency(node)


def _without_second(kind: str) -> str:
    if kind in DIFFERENTIATED:
        return (
            f"the inner loss contains a gradient through layer, batch or instance norm ({kind}; a gradient penalty, say), and the third "
            "derivative that PyTorch has of these is wrong without an error. Run the loop in `with innerloop.nn.any_order():`, or use "
            "GroupNorm, or take no second derivative: first_order=True, strategy=innerloop.FirstOrder()"
        )
    has = "a wrong second derivative, without an error" if kind in WRONG else "no second derivative"
    name = KERNELS[kind]
    if name in CURES:
        return f"{name} has {has} in PyTorch ({kind}). {CURES[name]}. Or take no second derivative: first_order=True, FirstOrder()"
    return (
        f"{name} ran with PyTorch's own kernel ({kind}), which has {has}. innerloop replaces it inside the loop, under that name: "
        "compute the loss there, from the first step on, and not under innerloop.nn.keep_kernels(). Around a loop whose first step does "
        "not use it, write `with innerloop.nn.replacing():`. Or take no second derivative: first_order=True, "
        "strategy=innerloop.FirstOrder()"
    )


def _once_differentiable(node: Any) -> bool:
    """Whether a node is a custom Function whose backward says that it must not be differentiated again."""
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    wrapped = getattr(backward, "__wrapped__", None)
    return wrapped is not None and getattr(backward, "__globals__", {}).get("__name__") == "torch.autograd.function"
