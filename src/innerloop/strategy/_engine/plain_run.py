"""The plain run of a loop, of which autograd keeps everything."""

from __future__ import annotations

from innerloop._trajectory import Trajectory
from innerloop.strategy._base import Loop, StepOutputs


def plain_run(loop: Loop) -> Trajectory:
    """Run the loop step by step; where gradients are recorded, the graph of every step is kept."""
    carry = loop.start
    states, outputs = {0: carry}, StepOutputs(carry.params)
    for t in loop.batches.times():
        carry, loss, aux = loop.step(carry, loop.batch(carry, t), t)
        states[t + 1] = carry
        outputs.add(loss, aux)
        loop.report("forward", t + 1, loop.batches.steps)
    return Trajectory(states, *outputs.stacked(), len(outputs))
