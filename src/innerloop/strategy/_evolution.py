"""Estimate the outer gradient from values of the outer loss alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._batches import batches_of
from innerloop._carry import Carry
from innerloop._inner_gradient.loss import check_loss
from innerloop._problem import Problem
from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree, Params, Result
from innerloop._utils import tree
from innerloop._utils.arguments import check_function
from innerloop._utils.execution import Mode, mode
from innerloop._utils.finite import is_finite
from innerloop._utils.random_state import RandomState, restored_on_error
from innerloop.errors import InvalidInputError, NonFiniteError
from innerloop.strategy._base import Loop, Measure, StepOutputs, Strategy
from innerloop.strategy._engine.guards import Unusable, on_constants, refuse_use
from innerloop.strategy._engine.step_pullback import carry_of, state_of
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


class OnlineEstimate(NamedTuple):
    """One result of `Evolution.online`.

    Attributes:
        t: the number of steps taken.
        carry: the state after them, without perturbation.
        value: the outer losses of the window's steps, added up, without perturbation.
        grads: the estimate of their gradient with respect to hyper, a pytree like hyper (None for
            a leaf that is not a floating-point tensor).
        standard_error: that of each entry of ``grads``, from the spread of the pairs.
    """

    t: int
    carry: Carry
    value: Tensor
    grads: Any
    standard_error: Any


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
        super().__post_init__()
        if not 0 < self.sigma < float("inf"):
            raise InvalidInputError(
                f"sigma={self.sigma!r}: write a positive width, 0.01 for example"
            )
        if self.report is not None:
            check_function("report", self.report, "write a function report(estimate), or None")
        for name in ("pairs", "chunk"):
            given = getattr(self, name)
            if not isinstance(given, int) or isinstance(given, bool) or given < 1:
                raise InvalidInputError(f"{name}={given!r}: write a number, 1 or more")

    def run(self, loop: Loop) -> Trajectory:
        """Run the loop on constants; a gradient of what it leaves raises."""
        constants = loop.as_constants()
        inputs = [*tree.tensors(state_of(loop.start)), *tree.tensors(loop.hyper)]
        carry, rows = constants.start, StepOutputs(loop.start.params)
        states: dict[int, Carry] = {}
        for t in loop.batches.times():
            run = partial(constants.step, carry, constants.batch(carry, t), t)
            carry, loss, aux = on_constants(t, run, outside=constants.problem.outside)
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

        def loss_at(_: list[Tensor], values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            return [], objective(filled(values))[0].detach()

        with torch.no_grad():
            result = objective(filled(centre))[1]
            after = RandomState.now()
            noise = self._noise(centre, torch.Generator().manual_seed(seed))
            moved = self._moved(centre, noise)
            _, losses = self._advanced(loss_at, [], moved, before)
            if after is not None:
                after.restore()
            samples = self._samples(losses, noise)

        def gathered(values: list[Tensor]) -> dict[str, Any]:
            row = tree.put([None] * len(leaves), wanted, values)
            found: dict[str, Any] = tree.with_leaves(chosen, row)
            return found

        gradient = gathered([s.mean(0) for s in samples])
        if self.report is not None:
            self.report(Estimate(gradient, gathered(self._errors(samples)), self.pairs))
        return tree.map_tensors(Tensor.detach, result), gradient

    def online(
        self,
        outer: Callable[[dict[str, Tensor], Any], Tensor],
        problem: Problem,
        params: Params | Carry,
        batches: object,
        *,
        hyper: HyperTree,
        window: int,
        noise: str = "persistent",
        steps: int | None = None,
    ) -> Generator[OnlineEstimate, Any, None]:
        r"""Yield an estimate for each window of a loop, while the loop runs.

        The objective is the sum of ``outer(params, hyper)`` after every step. Each of the 2 n
        perturbed loops goes on from its own state, and the estimate of a window is

        .. math::
            \frac{1}{2 \sigma n} \sum_i \bigl[L_i^+ - L_i^-\bigr]\, \xi_i

        with L the losses of the window, and, by ``noise``:

        - ``"persistent"``: new perturbations in each window, and :math:`\xi_i` the sum of all so
          far (persistent evolution strategies, Vicol et al. 2021). The estimates of all windows
          together are unbiased, and hyper may change between windows; the variance grows with their
          number.
        - ``"reuse"``: the perturbations of the first window in all of them (Li et al., "Noise-reuse
          in online evolution strategies", 2023). Unbiased, too, as long as hyper does not change;
          less variance.
        - ``"truncated"``: new perturbations, and all loops begin the window at the unperturbed
          state. Biased: what hyper did before the window is not seen.

        Args:
            outer: the outer loss at the parameters of the moment.
            problem, params, batches, steps: as in `innerloop.unroll`.
            hyper: where to start; ``generator.send(new_hyper)`` goes on with other values of the
                same structure.
            window: the number of steps between two estimates.
            noise: see above.

        Yields:
            `OnlineEstimate`, after each window.

        Example:
            w stays where h puts it, so the loss w² / 2 of each step has the slope h = 3.

            >>> import torch, innerloop
            >>> problem = innerloop.Problem(
            ...     lambda params, hyper, batch: (params["w"] - hyper) ** 2 / 2,
            ...     innerloop.optim.sgd(lr=1.0),
            ... )
            >>> run = innerloop.Evolution(0.1, pairs=500, chunk=1000, seed=0).online(
            ...     lambda params, hyper: params["w"] ** 2 / 2,
            ...     problem,
            ...     {"w": torch.tensor(0.0)},
            ...     None,
            ...     steps=4,
            ...     hyper=torch.tensor(3.0),
            ...     window=2,
            ...     noise="reuse",
            ... )
            >>> [(now.t, now.value.item(), abs(now.grads.item() - 6) < 2) for now in run]
            [(2, 9.0, True), (4, 9.0, True)]
        """
        if noise not in NOISE:
            raise InvalidInputError(f"noise={noise!r}: write one of {', '.join(map(repr, NOISE))}")
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise InvalidInputError(f"window={window!r}: write a number of steps, 1 or more")
        check_kinds({"hyper": hyper})
        data = batches_of(batches, steps)
        centre = problem.init(params).detach()
        loop = Loop(
            problem.for_one_run(centre), centre, tree.map_tensors(Tensor.detach, hyper), data
        )
        leaves = tree.leaves(loop.hyper)
        wanted = [i for i, x in enumerate(leaves) if tree.differentiable(x)]
        if not wanted or any(leaves[i].is_complex() for i in wanted):
            raise InvalidInputError(
                "hyper must hold real floating-point tensors, and nothing complex, for Evolution() "
                "to perturb"
            )
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        generator = torch.Generator().manual_seed(seed)
        states, template = _stacked([centre] * (2 * self.pairs))
        total = fresh = self._noise([leaves[i] for i in wanted], generator)
        times, done = list(data.times()), 0
        while done < len(times):
            span = times[done : done + window]
            if noise == "truncated":
                states, template = _stacked([centre] * (2 * self.pairs))
            if done and noise != "reuse":
                fresh = self._noise([leaves[i] for i in wanted], generator)
                persists = noise == "persistent"
                total = [a + b for a, b in zip(total, fresh, strict=True)] if persists else fresh
            run = _Window(loop, outer, span, wanted, template)
            before = RandomState.now()
            with restored_on_error(), torch.no_grad():
                tensors, value = run(tree.split(state_of(centre))[0], [leaves[i] for i in wanted])
                centre = carry_of(tree.join(run.template, tensors), RandomState.now())
                centre = centre._replace(time=loop.time(span[-1] + 1))
                after = RandomState.now()
                moved = self._moved([leaves[i] for i in wanted], fresh)
                states, losses = self._advanced(run, states, moved, before)
                if after is not None:
                    after.restore()
            template, done = run.template, done + len(span)
            samples = self._samples(losses, total)
            grads, errors = (
                tree.with_leaves(hyper, tree.put([None] * len(leaves), wanted, values))
                for values in ([s.mean(0) for s in samples], self._errors(samples))
            )
            sent = yield OnlineEstimate(done, centre, value, grads, errors)
            if sent is not None:
                _check_alike(sent, loop.hyper)
                loop = loop._replace(hyper=tree.map_tensors(Tensor.detach, sent))
                leaves = tree.leaves(loop.hyper)

    def _noise(self, centre: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        return [
            torch.randn((self.pairs, *x.shape), generator=generator, dtype=x.dtype).to(x.device)
            for x in centre
        ]

    def _moved(self, centre: list[Tensor], noise: list[Tensor]) -> list[Tensor]:
        """Return the perturbed inputs: those of one sign, then those of the other."""
        return [
            torch.cat([x + self.sigma * e, x - self.sigma * e])
            for x, e in zip(centre, noise, strict=True)
        ]

    def _advanced(
        self,
        run: Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], Tensor]],
        states: list[Tensor],
        moved: list[Tensor],
        random_state: RandomState | None,
    ) -> tuple[list[Tensor], Tensor]:
        """Run the perturbed loops in chunks, each from the same random numbers."""
        parts: list[list[Tensor]] = []
        found: list[Tensor] = []
        for begin in range(0, 2 * self.pairs, self.chunk):
            chosen = slice(begin, begin + self.chunk)
            given = [s[chosen] for s in states], [m[chosen] for m in moved]
            if random_state is not None:
                random_state.restore()
            if self.chunk == 1:
                tensors, loss = run([s[0] for s in given[0]], [m[0] for m in given[1]])
                tensors, loss = [t.unsqueeze(0) for t in tensors], loss.reshape(1)
            else:
                tensors, loss = torch.func.vmap(run, randomness="same")(*given)
            parts.append(tensors)
            found.append(loss)
        return [torch.cat(column) for column in zip(*parts, strict=True)], torch.cat(found)

    def _samples(self, losses: Tensor, noise: list[Tensor]) -> list[Tensor]:
        """Return what each pair says about the gradient."""
        if not is_finite(losses):
            raise NonFiniteError(
                f"the outer loss is NaN or infinite at one of {2 * self.pairs} perturbed inputs: "
                f"take a smaller sigma (now {self.sigma})"
            )
        slopes = (losses[: self.pairs] - losses[self.pairs :]) / (2 * self.sigma)
        return [slopes.to(e.device, e.dtype).reshape(-1, *[1] * (e.ndim - 1)) * e for e in noise]

    def _errors(self, samples: list[Tensor]) -> list[Tensor]:
        return [
            s.std(0) / self.pairs**0.5 if self.pairs > 1 else torch.full_like(s[0], torch.inf)
            for s in samples
        ]

    def forecast(self, measure: Measure) -> Forecast:
        """Predict the cost: two forward passes for each pair, and one."""
        plain = measure.plain()
        seconds = (2 * self.pairs + 1) * plain.seconds.at(measure.steps)
        return Forecast(seconds, self.chunk * plain.bytes.at(1))


class _Window:
    """Some steps of a loop, and the outer losses after them.

    Attributes:
        template: the state without its tensors, before and then after the steps.
    """

    def __init__(
        self,
        loop: Loop,
        outer: Callable[[dict[str, Tensor], Any], Tensor],
        span: list[int],
        wanted: list[int],
        template: object,
    ) -> None:
        self.loop = loop
        self.outer = outer
        self.span = span
        self.wanted = wanted
        self.begin = self.template = template

    def __call__(self, tensors: list[Tensor], values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Run the steps from this state at these values of hyper."""
        leaves = tree.put(tree.leaves(self.loop.hyper), self.wanted, values)
        loop = self.loop._replace(hyper=tree.with_leaves(self.loop.hyper, leaves))
        carry = carry_of(tree.join(self.begin, tensors), None)
        losses: list[Tensor] = []
        for t in self.span:
            carry, _, _ = loop.step(carry, loop.batch(carry, t), t)
            losses.append(
                check_loss(
                    self.outer(carry.params, loop.hyper), "what outer(params, hyper) returns"
                )
            )
        found, self.template = tree.split(state_of(carry.detach()))
        return found, torch.stack(losses).sum()


def _stacked(carries: list[Carry]) -> tuple[list[Tensor], Any]:
    """Return the tensors of equal states, with a first dimension for them, and the rest."""
    tensors, template = tree.split(state_of(carries[0]))
    return [x.expand(len(carries), *x.shape) for x in tensors], template


def _check_alike(sent: object, hyper: HyperTree) -> None:
    """Raise if other values for ``hyper`` have another structure."""
    here, there = (
        [(path, x.shape, x.dtype) for path, x in tree.named_tensors(h)] for h in (hyper, sent)
    )
    if here != there:
        raise InvalidInputError(
            "the hyper that was sent has another structure than the one before: send a pytree of "
            f"the same tensors, {[path for path, _, _ in here]}"
        )


NOISE = ("persistent", "reuse", "truncated")
_UNROLLED = (
    "Evolution() estimates the gradient of an outer loss from its values, and unroll does not see "
    "the outer loss: write innerloop.metagradient(outer, problem, ..., strategy=Evolution()), or "
    "strategy=innerloop.Checkpointed()"
)
