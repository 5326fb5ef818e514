"""The plain run of a loop, of which autograd keeps everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from innerloop._carry import Carry, _alias
from innerloop._inner_gradient.gradient import tables, with_dense_gradients
from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree
from innerloop._utils import tree
from innerloop._utils.deep_graphs import Chain
from innerloop._utils.execution import Mode, mode
from innerloop.strategy._base import Loop, StepOutputs
from innerloop.strategy._engine.step_pullback import state_of

StepFunction = Callable[[Carry, HyperTree, Any, int], tuple[Carry, Tensor, Any]]
"""``step(carry, hyper, batch, t) -> (new_carry, loss, aux)``."""


def plain_run(
    loop: Loop,
    step: StepFunction | None = None,
    finish: Callable[[Carry], Carry] | None = None,
) -> Trajectory:
    """Run the loop step by step; where gradients are recorded, the graph of every step is kept.

    Args:
        loop: the loop.
        step: takes one step; default: that of the problem.
        finish: what is done at last to each state after a step.
    """
    step = loop.problem.step if step is None else step
    carry = loop.start
    states, outputs = {0: carry}, StepOutputs(carry.params)
    learned = mode() is Mode.EAGER and torch.is_grad_enabled() and _learns(loop.hyper)
    hypers: list[HyperTree] = []
    chain = Chain() if mode() is Mode.EAGER and torch.is_grad_enabled() else None
    for t in loop.batches.times():
        here = loop
        if learned:
            # An alias per step, so that what one step does to hyper can be told apart.
            here = loop._replace(hyper=tree.map_tensors(_aliased, loop.hyper))
            hypers.append(here.hyper)
        carry, loss, aux = step(carry, here.hyper, loop.batch(carry, t), loop.time(t))
        states[t + 1] = carry
        outputs.add(loss, aux)
        if chain is not None:
            chain.step(lambda now=carry: tree.tensors(state_of(now)))  # type: ignore[misc]
        loop.report("forward", t + 1, loop.batches.steps)
    if finish is not None:
        states = {t: finish(carry) if t else carry for t, carry in states.items()}
    if mode() is Mode.EAGER and torch.is_grad_enabled():
        # An outer loss may look them up sparsely, through a module of its own.
        last = states[max(states)]
        dense = with_dense_gradients(last.params, tables(last.params))
        states[max(states)] = last._replace(params=dense)
    traj = Trajectory(states, *outputs.stacked(), len(outputs))
    traj.hypers = hypers
    return traj


def _learns(hyper: HyperTree) -> bool:
    return any(x.requires_grad for x in tree.tensors(hyper))


def _aliased(x: Tensor) -> Tensor:
    return _alias(x) if x.requires_grad else x
