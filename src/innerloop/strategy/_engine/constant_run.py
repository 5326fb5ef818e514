"""A loop that runs on constants, of which the last step is kept."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from innerloop._carry import Carry
from innerloop._utils import tree
from innerloop._utils.random_state import RandomState
from innerloop.strategy._base import Loop, StepOutputs
from innerloop.strategy._engine.guards import on_constants


class ConstantRun(NamedTuple):
    """What a run on constants leaves behind.

    Attributes:
        before: the state before the last step, with the random state in which the step ran.
        batch: the data of the last step.
        end: the state after it.
        states: those at the times of ``save_at``.
        rows: losses and aux.
    """

    before: Carry
    batch: object
    end: Carry
    states: dict[int, Carry]
    rows: StepOutputs

    @classmethod
    def of(cls, loop: Loop) -> ConstantRun:
        """Run ``loop`` without a graph."""
        constants = loop.as_constants()
        carry = before = constants.start
        states: dict[int, Carry] = {}
        rows = StepOutputs(loop.start.params)
        batch: object = None
        for t in loop.batches.times():
            before = carry._replace(random_state=carry.random_state or RandomState.now())
            batch = constants.batch(carry, t)
            carry, loss, aux = on_constants(
                t, partial(constants.step, carry, batch, t), outside=constants.problem.outside
            )
            carry = carry.detach()
            rows.add(*tree.map_tensors(Tensor.detach, (loss, aux)))
            if t + 1 in loop.save_at:
                states[t + 1] = carry
            loop.report("forward", t + 1, loop.batches.steps)
        return cls(before, batch, carry, states, rows)
