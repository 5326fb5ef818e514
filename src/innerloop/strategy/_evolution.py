"""Estimate the outer gradient from values of the outer loss alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._trajectory import Trajectory
from innerloop._types import Result
from innerloop._utils import tree
from innerloop._utils.execution import Mode, mode
from innerloop._utils.finite import is_finite
from innerloop._utils.random_state import RandomState
from innerloop.errors import InvalidInputError, NonFiniteError
from innerloop.strategy._base import Loop, Measure, StepOutputs, Strategy
from innerloop.strategy._engine.guards import Unusable, on_constants, refuse_use
from innerloop.strategy._engine.step_pullback import state_of
from innerloop.strategy._forecast import Forecast
from innerloop.strategy._outer_gradient import Inputs, Objective, check_kinds


class Estimate(NamedTuple):
    """What ``report`` of `Evolution` is told.

    Attributes:
        gradient: the estimate, by the name of each input.
        standard_error: that of each of its entries, a pytree like it, from the spread of the pairs;
            infinite for a single pair.
        pairs: the number of pairs.
    """

    gradient: dict[str, Any]
    standard_error: dict[str, Any]
    pairs: int


@dataclasses.dataclass(frozen=True)
class Evolution(Strategy):
    r"""Estimate the outer gradient by antithetic evolution strategies: no derivative of anything.

    .. math::
        g = \frac{1}{2 \sigma n} \sum_{i=1}^{n}
        \bigl[L(x + \sigma\epsilon_i) - L(x - \sigma\epsilon_i)\bigr]\, \epsilon_i,
        \qquad \epsilon_i \sim N(0, I)

    It is an unbiased estimate of the gradient of the outer loss smoothed by a Gaussian of width σ
    (Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning",
    2017). The limits n → ∞ and σ → 0 together are exact; for a quadratic outer loss there is no
    bias at any σ. The standard error falls as :math:`1 / \sqrt n` and grows with the square root of
    the number of inputs. All evaluations draw the same random numbers (dropout, noise), which
    cancel within a pair.

    **Cost**: 2 n + 1 forward passes in time; memory of one forward pass, times ``chunk``.

    **When**: outer losses that are not differentiable (an accuracy, a reward), or loops so chaotic
    that their exact gradient explodes; few inputs. **Not** where the exact gradient is of use: one
    backward pass gives it. Only `metagradient` can estimate: behind `unroll` the outer loss is not
    known, and asking for a gradient raises.

    Args:
        sigma: σ, the width of the perturbations, in the units of the inputs.
        pairs: n.
        chunk: how many perturbed loops run at once, by ``torch.func.vmap``; 1 runs them one after
            the other, which every loss allows.
        seed: of the perturbations; None draws one from torch's random numbers, a new one at each
            call.
        report: called with an `Estimate`: the gradient and its standard error.

    Example:
        Three steps of rate h on w²/2 from 8: w₃² = 64 (1 - h)⁶, whose slope at h = 1/2 is -12.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2,
        ...     innerloop.optim.sgd(),
        ...     optimizer_hyper=("lr",),
        ... )
        >>> reports = []
        >>> value, grads = innerloop.metagradient(
        ...     lambda traj, hyper: traj.params["w"] ** 2,
        ...     problem,
        ...     {"w": torch.tensor(8.0)},
        ...     None,
        ...     steps=3,
        ...     hyper={"lr": torch.tensor(0.5)},
        ...     wrt="hyper",
        ...     strategy=innerloop.Evolution(0.01, pairs=100, chunk=200, report=reports.append),
        ... )
        >>> error = reports[0].standard_error["hyper"]["lr"]
        >>> (abs(grads["lr"] + 12) < 4 * error).item(), (error < 3).item()
        (True, True)
    """

    sigma: float = 0.01
    pairs: int = 32
    chunk: int = 1
    seed: int | None = None
    report: Callable[[Estimate], object] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    exact = False
    differentiates: ClassVar[frozenset[str]] = frozenset({"params", "hyper"})

    def __post_init__(self) -> None:
        if not 0 < self.sigma < float("inf"):
            raise InvalidInputError(
                f"sigma={self.sigma!r}: write a positive width, 0.01 for example"
            )
        for name in ("pairs", "chunk"):
            given = getattr(self, name)
            if not isinstance(given, int) or isinstance(given, bool) or given < 1:
                raise InvalidInputError(f"{name}={given!r}: write a number, 1 or more")

    def run(self, loop: Loop) -> Trajectory:
        """Run the loop on constants; a gradient of what it leaves raises."""
        constants = loop._replace(
            hyper=tree.map_tensors(Tensor.detach, loop.hyper), start=loop.start.detach()
        )
        inputs = [*tree.tensors(state_of(loop.start)), *tree.tensors(loop.hyper)]
        carry, rows = constants.start, StepOutputs(loop.start.params)
        states: dict[int, Carry] = {}
        for t in loop.batches.times():
            run = partial(constants.step, carry, constants.batch(carry, t), t)
            carry, loss, aux = on_constants(t, run)
            carry = carry.detach()
            rows.add(*tree.map_tensors(Tensor.detach, (loss, aux)))
            if t + 1 in loop.save_at:
                states[t + 1] = refuse_use(carry, inputs, _UNROLLED)
            loop.report("forward", t + 1, loop.batches.steps)
        steps = len(rows)
        states[steps] = refuse_use(carry, inputs, _UNROLLED)
        losses, aux = refuse_use(rows.stacked(), inputs, _UNROLLED)
        told = losses.refuse if isinstance(losses, Unusable) else losses
        return Trajectory({0: loop.start, **states}, told, aux, steps)

    def value_and_grad(
        self, objective: Objective[Result], inputs: Inputs, wrt: tuple[str, ...]
    ) -> tuple[Result, dict[str, Any]]:
        """Evaluate ``objective`` at perturbed inputs, and weight the perturbations by it."""
        if mode() is not Mode.EAGER:
            raise InvalidInputError(
                "Evolution() samples, so metagradient cannot stand inside torch.func or compiled "
                "code with it: call it outside, task by task (chunk= runs the samples at once)"
            )
        chosen = {name: getattr(inputs, name) for name in wrt}
        check_kinds(chosen)
        leaves = tree.leaves(chosen)
        wanted = [i for i, leaf in enumerate(leaves) if tree.differentiable(leaf)]
        if not wanted or any(leaves[i].is_complex() for i in wanted):
            raise InvalidInputError(
                f"{' and '.join(wrt)} must hold real floating-point tensors, and nothing complex, "
                "for Evolution() to perturb"
            )
        centre = [leaves[i].detach() for i in wanted]
        # Drawn first: the loops themselves leave the random numbers where one plain run does.
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        before = RandomState.now()

        def filled(values: list[Tensor]) -> Inputs:
            tensors = tree.with_leaves(chosen, tree.put(leaves, wanted, values))
            return inputs._replace(**tensors)

        def loss_at(*values: Tensor) -> Tensor:
            return objective(filled(list(values)))[0].detach()

        with torch.no_grad():
            result = objective(filled(centre))[1]
            after = RandomState.now()
            generator = torch.Generator().manual_seed(seed)
            noise = [
                torch.randn((self.pairs, *x.shape), generator=generator, dtype=x.dtype).to(x.device)
                for x in centre
            ]
            moved = [
                torch.cat([x + self.sigma * e, x - self.sigma * e])
                for x, e in zip(centre, noise, strict=True)
            ]
            found: list[Tensor] = []
            for begin in range(0, 2 * self.pairs, self.chunk):
                part = [m[begin : begin + self.chunk] for m in moved]
                if before is not None:
                    before.restore()
                if self.chunk == 1:
                    found.append(loss_at(*[m[0] for m in part]).reshape(1))
                else:
                    found.append(torch.func.vmap(loss_at, randomness="same")(*part))
            if after is not None:
                after.restore()
            losses = torch.cat(found)
            if not is_finite(losses):
                raise NonFiniteError(
                    f"the outer loss is NaN or infinite at one of {2 * self.pairs} perturbed "
                    f"inputs: take a smaller sigma (now {self.sigma})"
                )
            slopes = (losses[: self.pairs] - losses[self.pairs :]) / (2 * self.sigma)
            samples = [
                slopes.to(e.device, e.dtype).reshape(-1, *[1] * (e.ndim - 1)) * e for e in noise
            ]

        def gathered(values: list[Tensor]) -> dict[str, Any]:
            row = tree.put([None] * len(leaves), wanted, values)
            found: dict[str, Any] = tree.with_leaves(chosen, row)
            return found

        gradient = gathered([s.mean(0) for s in samples])
        if self.report is not None:
            errors = [
                s.std(0) / self.pairs**0.5 if self.pairs > 1 else torch.full_like(s[0], torch.inf)
                for s in samples
            ]
            self.report(Estimate(gradient, gathered(errors), self.pairs))
        return tree.map_tensors(Tensor.detach, result), gradient

    def forecast(self, measure: Measure) -> Forecast:
        """Predict the cost: two forward passes for each pair, and one."""
        plain = measure.plain()
        seconds = (2 * self.pairs + 1) * plain.seconds.at(measure.steps)
        return Forecast(seconds, self.chunk * plain.bytes.at(1))


_UNROLLED = (
    "Evolution() estimates the gradient of an outer loss from its values, and unroll does not see "
    "the outer loss: write innerloop.metagradient(outer, problem, ..., strategy=Evolution()), or "
    "strategy=innerloop.Checkpointed()"
)
