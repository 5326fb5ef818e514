"""The gradient of an outer loss by autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from innerloop._inner_gradient.torch_errors import explain
from innerloop._types import HyperTree, Params, Result
from innerloop._utils import torch_private, tree
from innerloop._utils.arguments import check_has_values
from innerloop._utils.execution import Mode, mode
from innerloop.errors import InvalidInputError


class Inputs(NamedTuple):
    """What an outer loss can be differentiated with respect to.

    Attributes:
        params: the parameters before the loop.
        hyper: the outer variables.
    """

    params: Params
    hyper: HyperTree


Objective = Callable[[Inputs], tuple[Tensor, Result]]
"""Runs the loop and the outer loss: ``(loss, what the outer loss returned)``."""


def outer_gradient(
    objective: Objective[Result], inputs: Inputs, wrt: tuple[str, ...]
) -> tuple[Result, dict[str, Any]]:
    """Evaluate ``objective`` and differentiate it: `Strategy.value_and_grad`."""
    chosen = {name: getattr(inputs, name) for name in wrt}
    leaves = tree.leaves(chosen)
    wanted = [i for i, leaf in enumerate(leaves) if tree.differentiable(leaf)]
    check_kinds(chosen)
    if not wanted:
        raise InvalidInputError(
            f"nothing to differentiate: {' and '.join(wrt)} hold no floating-point tensor"
            f"{_what_to_write(chosen)}"
        )
    values = [leaves[i] for i in wanted]
    running = mode()
    arrived: set[int] = set()

    def of_leaves(values: list[Tensor]) -> tuple[Tensor, Result]:
        if running is Mode.TRANSFORMED:
            if torch_private.forward_mode():
                # One by one: some may have a tangent, and others none.
                values = [_Noted.apply(arrived, i, x)[0] for i, x in enumerate(values)]
            else:
                values = list(_Noted.apply(arrived, 0, *values))
        filled = tree.with_leaves(chosen, tree.put(leaves, wanted, values))
        return objective(inputs._replace(**filled))

    found: Sequence[Tensor | None]
    if running is Mode.EAGER:
        # The same mathematics with one graph less: torch.func.grad would record the backward pass
        # as well.
        result, found = _by_autograd(of_leaves, values)
    else:
        try:
            found, result = tree.grad_with_aux(of_leaves)(values)
        except NotImplementedError as error:
            # In eager code the graph of each step tells it beforehand.
            if "derivative for '" in str(error):
                raise explain(error) from error
            raise
        if running is Mode.TRANSFORMED:
            # torch.func.grad silently returns zeros for what nothing arrives at.
            found = [x if i in arrived else None for i, x in enumerate(found)]
    return result, tree.with_leaves(chosen, tree.put([None] * len(leaves), wanted, found))


class _Noted(torch.autograd.Function):
    """The identity; its backward notes in a set that a gradient arrived.

    A transform gives zeros where nothing arrives.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(arrived: set[int], first: int, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.arrived, ctx.first = inputs[:2]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.arrived.update(ctx.first + i for i, grad in enumerate(grads) if grad is not None)
        return None, None, *grads

    @staticmethod
    def jvp(ctx: Any, _: object, first: object, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(tangent.view_as(tangent) for tangent in tangents)


def check_kinds(chosen: Mapping[str, object]) -> None:
    """Raise if a module or an iterator stands where tensors are differentiated.

    Args:
        chosen: the inputs by name, ``"hyper"`` for example.
    """
    for name, value in chosen.items():
        for leaf in tree.leaves(value):
            check_has_values(f"{name} (or a tensor in it)", leaf)
            if isinstance(leaf, nn.Module):
                raise InvalidInputError(
                    f"{name} holds a module, {type(leaf).__name__}, whose parameters would get no "
                    f"gradient: pass the tensors, {name}=dict(module.named_parameters()), and call "
                    "the module in the loss by torch.func.functional_call(module, hyper, (x,))"
                )
            if isinstance(leaf, Iterator):
                raise InvalidInputError(
                    f"{name} holds a {type(leaf).__name__}, which can be read only once: pass a "
                    f"dict, {name}=dict(module.named_parameters()), or a list"
                )


def _what_to_write(chosen: Mapping[str, object]) -> str:
    """Say how the first leaf that is no floating-point tensor becomes one."""
    for name, value in chosen.items():
        leaves = tree.leaves(value)
        for place, leaf in enumerate(leaves):
            if leaf is None:
                continue
            filled: list[Tensor | None] = [None] * len(leaves)
            filled[place] = torch.empty(0)
            here = tree.named_tensors(tree.with_leaves(value, filled), name)
            path = next((path for path, _ in here), name)
            if isinstance(leaf, Tensor):
                return f": {path} has dtype {leaf.dtype}; write {path}.float()"
            if isinstance(leaf, (bool, int, float)):
                return f": {path} is the number {leaf!r}; write torch.tensor({float(leaf)!r})"
            return f": {path} is {type(leaf).__name__}; pass it as a tensor, torch.as_tensor(...)"
    return ""


def _by_autograd(
    of_leaves: Callable[[list[Tensor]], tuple[Tensor, Result]], values: list[Tensor]
) -> tuple[Result, Sequence[Tensor | None]]:
    with torch.enable_grad():
        values = [value.detach().requires_grad_() for value in values]
        loss, result = of_leaves(values)
        found: Sequence[Tensor | None] = [None] * len(values)
        if loss.requires_grad:
            try:
                found = torch.autograd.grad(loss, values, allow_unused=True)
            except RuntimeError as error:
                raise explain(error) from error
    return tree.map_tensors(Tensor.detach, result), found
