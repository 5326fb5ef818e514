"""The meta-gradient compiled as a whole, and compared with the eager one."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop._problem import Problem
from innerloop._utils import tree
from innerloop._utils.caches import cache
from innerloop._utils.compiled_check import check_compiled
from innerloop.strategy._outer_gradient import Inputs, ValueOf, _gradient

_verified: MutableMapping[Problem, set[object]] = cache("verified meta-gradients", weak=True)


def _compiled_gradient(
    problem: Problem, value_of: ValueOf, inputs: Inputs, names: Sequence[str], variant: Any
) -> tuple[Any, dict[str, Any]]:
    """Return `_gradient`, compiled as a whole.

    A transform over a compiled function would run eagerly, so the compiler goes outermost.
    """
    compiled = torch.compile(_gradient, fullgraph=True)
    result, grads = compiled(value_of, inputs, names)
    shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in tree.tensors(inputs))
    key = (shapes, tuple(names), variant)
    if key not in _verified.setdefault(problem, set()):
        eager = _gradient(value_of, inputs, names)
        check_compiled(_groups(result, grads), _groups(*eager), "the meta-gradient")
        _verified[problem].add(key)
    return tree.map_tensors(Tensor.detach, (result, grads))


def _groups(result: object, grads: Mapping[str, object]) -> dict[str, object]:
    """Return what `metagradient` gives, by groups of one scale."""
    loss, *aux = result if isinstance(result, tuple) else (result,)
    gradients = {f"gradient of {name}": group for name, group in grads.items()}
    return {"loss": loss, "aux": aux, **gradients}
