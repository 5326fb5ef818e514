"""The meta-gradient compiled as a whole, and compared with the eager one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop._problem import Problem
from innerloop._utils import tree
from innerloop._utils.compiled_check import _compare
from innerloop.strategy._outer_gradient import Inputs, ValueOf, _gradient

_verified: weakref.WeakKeyDictionary[Problem, set[Any]] = weakref.WeakKeyDictionary()


def _compiled_gradient(
    problem: Problem, value_of: ValueOf, inputs: Inputs, names: Sequence[str], variant: Any
) -> tuple[Any, dict[str, Any]]:
    """`_gradient`, compiled as a whole: a transform over a compiled function would run eagerly, so compile goes outermost."""
    compiled = torch.compile(_gradient, fullgraph=True)
    result, grads = compiled(value_of, inputs, names)
    shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in tree.tensors(inputs))
    key = (shapes, tuple(names), variant)
    if key not in _verified.setdefault(problem, set()):
        _compare(result, grads, *_gradient(value_of, inputs, names))
        _verified[problem].add(key)
    return tree.map_tensors(Tensor.detach, (result, grads))
