"""Inputs of a meta-gradient at which no gradient arrives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from innerloop._problem import Problem
from innerloop._types import HyperTree
from innerloop._utils import tree
from innerloop.errors import NotDifferentiableError
from innerloop.strategy._outer_gradient import Inputs


class Unreached:
    """What to say about the inputs that the outer loss does not depend on.

    Args:
        problem: the problem.
        hyper: the outer variables, as far as they are differentiated.
    """

    def __init__(self, problem: Problem, hyper: HyperTree) -> None:
        self.problem = problem
        self.suspects = problem.unread_names(hyper)

    def filled(self, inputs: Inputs, grads: Mapping[str, Any]) -> dict[str, Any]:
        """Return gradients with zeros in place of None.

        Raises:
            NotDifferentiableError: no gradient arrives at an entry that the optimizer would read
                if ``optimizer_hyper`` said so, or at all of ``params`` or ``hyper``.
        """
        for name in self.suspects:
            found = grads["hyper"][name]
            if all(g is None for g in tree.leaves(found)):
                raise NotDifferentiableError(self.problem.unread(name))
        return {
            name: _zeros_for_none(name, getattr(inputs, name), found)
            for name, found in grads.items()
        }


def _zeros_for_none(name: str, given: object, grads: object) -> Any:
    leaves, found = tree.leaves(given), tree.leaves(grads)
    if any(isinstance(x, Tensor) for x in leaves) and all(g is None for g in found):
        raise NotDifferentiableError(f"no gradient arrives at {name}: {UNREACHED}")
    # One tensor among several that the outer loss does not depend on has the gradient zero, as
    # torch.func.grad says too.
    filled = [
        torch.zeros_like(x) if g is None and tree.differentiable(x) else g
        for x, g in zip(leaves, found, strict=True)
    ]
    return tree.with_leaves(given, filled)


UNREACHED = (
    "the outer loss does not depend on it through anything differentiable: compute it from "
    "traj.params, traj.losses, traj.aux or traj.at(t), not under torch.no_grad or from detached "
    "values; hyper-parameters of the optimizer reach it by "
    "Problem(loss, optimizer, optimizer_hyper=('lr',))"
)
