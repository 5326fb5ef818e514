"""The meta-gradient compiled as a whole, and compared with the eager one."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from innerloop._inner_gradient.graph import refusing_own_functions
from innerloop._metagradient.unreached import Unreached
from innerloop._problem import Problem
from innerloop._types import Result
from innerloop._utils import tree
from innerloop._utils.caches import cache
from innerloop._utils.compiled_check import check_compiled
from innerloop.strategy._base import Strategy
from innerloop.strategy._outer_gradient import Inputs, Objective

_verified: MutableMapping[Problem, set[object]] = cache("verified meta-gradients", weak=True)


def compiled_value_and_grad(
    strategy: Strategy,
    objective: Objective[Result],
    inputs: Inputs,
    wrt: tuple[str, ...],
    unreached: Unreached,
    variant: object,
) -> tuple[Result, dict[str, Any]]:
    """Return `Strategy.value_and_grad`, compiled as a whole.

    A transform over a compiled function would run eagerly, so the compiler goes outermost.
    """
    compiled = torch.compile(strategy.value_and_grad, fullgraph=True)
    result, grads = compiled(objective, inputs, wrt)
    shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in tree.tensors(inputs))
    key = (shapes, wrt, strategy, variant)
    known = _verified.setdefault(unreached.problem, set())
    if key not in known:
        with refusing_own_functions():
            eager_result, eager_grads = strategy.value_and_grad(objective, inputs, wrt)
        eager_grads = unreached.filled(inputs, eager_grads)
        check_compiled(
            _groups(result, grads), _groups(eager_result, eager_grads), "the meta-gradient"
        )
        known.add(key)
    return tree.map_tensors(Tensor.detach, (result, grads))


def _groups(result: object, grads: Mapping[str, object]) -> dict[str, object]:
    """Return what `metagradient` gives, by groups of one scale."""
    loss, *aux = result if isinstance(result, tuple) else (result,)
    gradients = {f"gradient of {name}": group for name, group in grads.items()}
    return {"loss": loss, "aux": aux, **gradients}
