"""Differentiate the last steps only."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

from torch import Tensor

from innerloop._carry import Carry
from innerloop._trajectory import Trajectory
from innerloop._utils import tree
from innerloop._utils.arguments import given, is_integer
from innerloop.errors import InvalidInputError
from innerloop.strategy._base import BOTH, Loop, Measure, StepOutputs, Strategy, concatenate
from innerloop.strategy._engine.guards import (
    on_constants,
    refuse_inputs,
    refuse_outputs,
    refuse_use,
    under_jvp,
)
from innerloop.strategy._engine.kept_states import KeptStates, LastStates
from innerloop.strategy._engine.plain_run import plain_run
from innerloop.strategy._engine.step_pullback import state_of
from innerloop.strategy._forecast import Forecast
from innerloop.strategy._store_all import StoreAll


@dataclasses.dataclass(frozen=True)
class Truncated(Strategy):
    r"""Run all T steps, and differentiate through the last K of them. Approximate.

    The state before those counts as a constant:

    .. math::
        \frac{d\theta_T}{d\lambda} \approx \sum_{t = T-K}^{T-1}
        \frac{d\theta_T}{d\theta_{t+1}} \frac{\partial \theta_{t+1}}{\partial \lambda}

    For K ≥ T it is `StoreAll`, exact for ``params`` too. Where the inner loss is strongly convex
    near the end of the loop, the error falls geometrically in K, as :math:`(1 - \eta\mu)^K` for
    gradient descent with step size η and curvature μ (Shaban et al., "Truncated back-propagation
    for bilevel optimization", 2019). On short horizons it is biased towards greedy
    hyper-parameters, too small a step size for example (Wu et al., "Understanding short-horizon
    bias in stochastic meta-optimization", 2018).

    **Cost**: (T + 2K) G in time, K (2.23 A + P + S) in memory.

    **When**: hyper-parameters that act all along a loop which forgets its start. **Not** for the
    gradient with respect to the initial parameters, which raises where a step is cut off (K < T):
    `Checkpointed` is exact.

    Args:
        last: K, the number of steps that are differentiated.

    Example:
        On the loss w²/2 every step multiplies w by 1 - lr: w₃ = (1 - lr)³ w₀, and with w₂ held
        constant d w₃/d lr = -w₂.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2,
        ...     innerloop.optim.sgd(),
        ...     optimizer_hyper=lambda hyper, t: hyper,
        ... )
        >>> lr = torch.tensor(0.5, requires_grad=True)
        >>> start = {"w": torch.tensor(8.0)}
        >>> for strategy in (innerloop.Truncated(1), innerloop.Truncated(3), innerloop.StoreAll()):
        ...     traj = innerloop.unroll(
        ...         problem, start, None, steps=3, hyper={"lr": lr}, strategy=strategy
        ...     )
        ...     print(strategy, torch.autograd.grad(traj.params["w"], lr))
        Truncated(last=1) (tensor(-2.),)
        Truncated(last=3) (tensor(-6.),)
        StoreAll() (tensor(-6.),)
    """

    last: int

    exact = False
    differentiates: ClassVar[frozenset[str]] = frozenset({"hyper"})

    def __post_init__(self) -> None:
        if not is_integer(self.last) or self.last < 1:
            raise InvalidInputError(
                f"{given('last', self.last)}: write the number of steps to differentiate, 1 or more"
            )

    def differentiates_in(self, steps: int | None) -> frozenset[str]:
        """Return what receives a gradient: everything where no step is cut off."""
        return self.differentiates if steps is None or steps > self.last else BOTH

    def kept_states(self, size: int) -> KeptStates:
        """Return an empty storage for the states of a hand-written loop: the last ones."""
        return LastStates(self.last)

    def run(self, loop: Loop) -> Trajectory:
        """Run the loop: its early steps on constants, the last ones recorded by autograd."""
        steps = loop.batches.steps
        if steps is None:
            raise InvalidInputError(
                "Truncated has to know where the last steps begin, and the length of an iterator "
                "is not known: write steps=T"
            )
        if steps <= self.last:
            return plain_run(loop)
        cut = steps - self.last
        constants = loop.as_constants()
        carry = constants.start
        states: dict[int, Carry] = {}
        early, late = StepOutputs(loop.start.params), StepOutputs(loop.start.params)
        for t in range(steps):
            now, rows = (constants, early) if t < cut else (loop, late)
            run = partial(now.step, carry, now.batch(carry, t), t)
            if t < cut:
                carry, loss, aux = on_constants(t, run, outside=now.problem.outside)
                carry, (loss, aux) = carry.detach(), tree.map_tensors(Tensor.detach, (loss, aux))
            else:
                carry, loss, aux = run()
            rows.add(loss, aux)
            if t + 1 == steps or t + 1 in loop.save_at:
                states[t + 1] = carry
            loop.report("forward", t + 1, steps)
        start = list(tree.tensors(state_of(loop.start)))
        inputs = [*start, *tree.tensors(loop.hyper)]
        for t, kept in states.items():
            if t <= cut:
                states[t] = refuse_use(
                    kept, inputs, _EARLY.format(self, what=f"the state at time {t}", cut=cut)
                )
            else:
                states[t] = refuse_inputs(kept, start, _START.format(self))
        rest = refuse_inputs(late.stacked(), start, _START.format(self))
        message = _EARLY.format(self, what=f"losses and aux before step {cut}", cut=cut)
        if under_jvp(inputs):
            # A tangent comes with its value: nobody can tell which rows will be used.
            what = f"losses or aux under torch.func.jvp, in one tensor with those before step {cut}"
            losses, aux = refuse_use(rest, inputs, _EARLY.format(self, what=what, cut=cut))
        else:
            before = refuse_outputs(early.stacked(), inputs, message)
            losses, aux = (concatenate(x, y) for x, y in zip(before, rest, strict=True))
        return Trajectory({**states, 0: loop.start}, losses, aux, steps)

    def forecast(self, measure: Measure) -> Forecast:
        """Predict the cost: a plain forward pass, then `StoreAll` for the last steps."""
        late = measure(StoreAll())
        last = min(self.last, measure.steps)
        early = measure.plain().seconds.each * (measure.steps - last)
        return Forecast(early + late.seconds.at(last), late.bytes.at(last))


_START = (
    "{0} does not differentiate with respect to params (or the optimizer's state): what the loop "
    "starts from counts as a constant. "
    "Write strategy=innerloop.Checkpointed(), which is exact at any length, or detach params"
)
_EARLY = (
    "the outer loss uses {what}, which {0} holds constant: it differentiates from time {cut} on. "
    "Use later ones, a larger `last`, or "
    "strategy=innerloop.Checkpointed()"
)
