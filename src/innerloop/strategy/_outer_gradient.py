"""The gradient of an outer loss by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop._inner_gradient.torch_errors import explain
from innerloop._utils import torch_private, tree
from innerloop.errors import InvalidInputError, NotDifferentiableError

Inputs = dict[str, Any]
ValueOf = Callable[[Inputs], tuple[Tensor, Any]]


def _gradient(
    value_of: ValueOf, inputs: Inputs, names: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    """``(result, {name: gradient})``."""
    chosen = {name: inputs[name] for name in names}
    leaves = tree.leaves(chosen)
    wanted = [i for i, leaf in enumerate(leaves) if tree.differentiable(leaf)]
    if not wanted:
        raise InvalidInputError(
            f"nothing to differentiate: {' and '.join(names)} hold no floating-point tensor"
        )

    transformed = not torch.compiler.is_compiling() and torch_private.inside_transform()

    def of_leaves(values: list[Tensor]) -> tuple[Tensor, Any]:
        loss, result = value_of(
            {**inputs, **tree.with_leaves(chosen, tree.put(leaves, wanted, values))}
        )
        if transformed and not torch_private.is_tracked(loss):
            raise NotDifferentiableError(UNREACHED)
        return loss, result

    values = [leaves[i] for i in wanted]
    if torch.compiler.is_compiling() or transformed:
        found, result = tree.grad_with_aux(of_leaves)(values)
    else:
        # The same mathematics with one graph less: torch.func.grad would record the backward pass
        # as well.
        result, found = _autograd(of_leaves, values)
    grads = tree.put([None] * len(leaves), wanted, found)
    for name, group in tree.with_leaves(chosen, grads).items():
        if any(isinstance(t, Tensor) for t in tree.leaves(chosen[name])) and all(
            g is None for g in tree.leaves(group)
        ):
            raise NotDifferentiableError(f"no gradient arrives at {name}: {UNREACHED}")
    # One tensor among several that the outer loss does not depend on has the gradient zero, as
    # torch.func.grad says too.
    for i in wanted:
        grads[i] = torch.zeros_like(leaves[i]) if grads[i] is None else grads[i]
    return result, tree.with_leaves(chosen, grads)


UNREACHED = (
    "the outer loss does not depend on it through anything differentiable: compute it from "
    "traj.params, traj.losses, traj.aux or "
    "traj.at(t), not under torch.no_grad or from detached values; hyper-parameters of the "
    "optimizer reach it by "
    "Problem(loss, optimizer, optimizer_hyper=lambda hyper, t: {...})"
)


def _autograd(
    of_leaves: Callable[[list[Tensor]], tuple[Tensor, Any]], values: list[Tensor]
) -> tuple[Any, Sequence[Tensor | None]]:
    with torch.enable_grad():
        values = [value.detach().requires_grad_() for value in values]
        loss, result = of_leaves(values)
        if not loss.requires_grad:
            raise NotDifferentiableError(UNREACHED)
        try:
            grads = torch.autograd.grad(loss, values, allow_unused=True)
        except RuntimeError as error:
            raise explain(error) from error
    return tree.map_tensors(Tensor.detach, result), grads
