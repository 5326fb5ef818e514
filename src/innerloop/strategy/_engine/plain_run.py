"""The plain run of a loop, of which autograd keeps everything."""

from __future__ import annotations

import torch
from torch import Tensor

from innerloop._carry import _alias
from innerloop._inner_gradient.gradient import with_dense_gradients
from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree
from innerloop._utils import tree
from innerloop._utils.execution import Mode, mode
from innerloop.strategy._base import Loop, StepOutputs


def plain_run(loop: Loop) -> Trajectory:
    """Run the loop step by step; where gradients are recorded, the graph of every step is kept."""
    carry = loop.start
    states, outputs = {0: carry}, StepOutputs(carry.params)
    learned = mode() is Mode.EAGER and torch.is_grad_enabled() and _learns(loop.hyper)
    hypers: list[HyperTree] = []
    for t in loop.batches.times():
        here = loop
        if learned:
            # An alias per step, so that what one step does to hyper can be told apart.
            here = loop._replace(hyper=tree.map_tensors(_aliased, loop.hyper))
            hypers.append(here.hyper)
        carry, loss, aux = here.step(carry, loop.batch(carry, t), t)
        states[t + 1] = carry
        outputs.add(loss, aux)
        loop.report("forward", t + 1, loop.batches.steps)
    if mode() is Mode.EAGER and torch.is_grad_enabled():
        # An outer loss may look them up sparsely, through a module of its own.
        dense = with_dense_gradients(carry.params, carry.params)
        states[max(states)] = carry._replace(params=dense)
    traj = Trajectory(states, *outputs.stacked(), len(outputs))
    traj.hypers = hypers
    return traj


def _learns(hyper: HyperTree) -> bool:
    return any(x.requires_grad for x in tree.tensors(hyper))


def _aliased(x: Tensor) -> Tensor:
    return _alias(x) if x.requires_grad else x
