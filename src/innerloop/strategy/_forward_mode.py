"""Derivatives are pushed along the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop._batches import batches_of
from innerloop._carry import Carry
from innerloop._inner_gradient.loss import check_loss
from innerloop._inner_gradient.torch_errors import explain
from innerloop._linear.products import lacks_forward_mode
from innerloop._problem import Problem
from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree
from innerloop._utils import torch_private, tree
from innerloop._utils.execution import Mode, mode
from innerloop._utils.finite import is_finite
from innerloop._utils.random_state import RandomState, at_random_state, restored_on_error
from innerloop.errors import (
    InnerLoopError,
    InvalidInputError,
    NonFiniteError,
    NotDifferentiableError,
)
from innerloop.strategy._base import Loop, Measure, StepOutputs, Strategy
from innerloop.strategy._engine import loop_function, step_pullback
from innerloop.strategy._engine.guards import check_constants, refuse_inputs
from innerloop.strategy._engine.loop_function import LoopFunction, LoopOutputs
from innerloop.strategy._engine.step_pullback import (
    Cotangents,
    carry_of,
    state_of,
)
from innerloop.strategy._forecast import Forecast

_jvp: Any = torch.func.jvp


class OnlineGradient(NamedTuple):
    """One result of `ForwardMode.online`.

    Attributes:
        t: the number of steps taken.
        carry: the state after them.
        value: the outer loss there.
        grads: its derivative with respect to hyper, a pytree like hyper (None for a leaf that is
            not a floating-point tensor).
    """

    t: int
    carry: Carry
    value: Tensor
    grads: Any


@dataclasses.dataclass(frozen=True)
class ForwardMode(Strategy):
    r"""Push the derivative of the state with respect to hyper along the loop.

    The derivative is exact, and nothing is stored:

    .. math::
        \frac{d(\theta_{t+1}, s_{t+1})}{d\lambda} =
        \frac{\partial u}{\partial(\theta_t, s_t)} \frac{d(\theta_t, s_t)}{d\lambda}
        + \frac{\partial u}{\partial \lambda}

    This is real-time recurrent learning (Williams & Zipser 1989), for hyper-parameters by
    Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", 2017.

    **Cost** for H hyper-parameters (their elements count): (1 + 2H) T G in time, (1 + H)(P + S) +
    2A in memory, for any T.

    **When**: a few numbers (a learning rate, a decay) and very long loops; hyper-gradients while
    the loop is running (`online`). **Not** for many hyper-parameters, and not for initial
    parameters: asking for their gradient raises. Operations that lack a forward-mode derivative
    raise.

    Example:
        On the loss w²/2 every step multiplies w by 1 - lr, so d w₃/d lr = -3 (1 - lr)² w₀.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2,
        ...     innerloop.optim.sgd(),
        ...     optimizer_hyper=lambda hyper, t: hyper,
        ... )
        >>> lr = torch.tensor(0.5, requires_grad=True)
        >>> traj = innerloop.unroll(
        ...     problem,
        ...     {"w": torch.tensor(8.0)},
        ...     None,
        ...     steps=3,
        ...     hyper={"lr": lr},
        ...     strategy=innerloop.ForwardMode(),
        ... )
        >>> torch.autograd.grad(traj.params["w"], lr)
        (tensor(-6.),)
    """

    exact = True
    differentiates: ClassVar[frozenset[str]] = frozenset({"hyper"})

    def run(self, loop: Loop) -> Trajectory:
        """Run the loop, with the derivative of the state carried along."""
        if mode() is Mode.COMPILING:
            raise NotDifferentiableError(loop_function.COMPILING.format(self))
        constant = loop._replace(start=loop.start.detach())
        traj = loop_function.run(_ForwardModeLoop(constant))
        start = list(tree.tensors(state_of(loop.start)))
        states = {t: traj.at(t) for t in traj.times}
        states = {
            t: refuse_inputs(c, start, _START) if t else loop.start for t, c in states.items()
        }
        return Trajectory(
            states, *refuse_inputs((traj.losses, traj.aux), start, _START), traj.steps
        )

    def forecast(self, measure: Measure) -> Forecast:
        """Predict the cost: the memory is that of one step, at any length."""
        cost = measure(self)
        # What is kept per step are the numbers of the losses.
        return Forecast(cost.seconds.at(measure.steps), cost.bytes.at(1))

    def online(
        self,
        outer: Callable[[dict[str, Tensor], Any], Tensor],
        problem: Problem,
        params: Mapping[str, Tensor] | Carry,
        batches: Any,
        *,
        hyper: HyperTree,
        steps: int | None = None,
    ) -> Generator[OnlineGradient, Any, None]:
        """Yield the hyper-gradient of ``outer(params, hyper)`` after every step of a loop.

        Args:
            outer: the outer loss at the parameters of the moment.
            problem, params, batches, steps: as in `innerloop.unroll`.
            hyper: where to start; ``generator.send(new_hyper)`` goes on with other values of the
                same structure (the derivative of the state so far is kept, as in online
                hyper-parameter optimisation).

        Yields:
            `OnlineGradient`, after each step.

        Raises:
            NonFiniteError: the outer loss or a derivative is NaN or infinite, looked at after each
                step. Populations under ``torch.func.vmap`` are not looked at.

        Example:
            >>> import torch, innerloop
            >>> problem = innerloop.Problem(
            ...     lambda params, hyper, batch: params["w"] ** 2 / 2,
            ...     innerloop.optim.sgd(),
            ...     optimizer_hyper=lambda hyper, t: hyper,
            ... )
            >>> run = innerloop.ForwardMode().online(
            ...     lambda params, hyper: params["w"],
            ...     problem,
            ...     {"w": torch.tensor(8.0)},
            ...     None,
            ...     steps=3,
            ...     hyper={"lr": torch.tensor(0.5)},
            ... )
            >>> [
            ...     (now.value.item(), now.grads["lr"].item()) for now in run
            ... ]  # (1 - lr)^t w0 and -t (1 - lr)^(t - 1) w0
            [(4.0, -8.0), (2.0, -8.0), (1.0, -6.0)]
        """
        data = batches_of(batches, steps)
        owned = isinstance(params, Carry) and params.random_state is not None
        start = problem.init(params).detach()
        loop = Loop(problem.for_one_run(start), start, tree.map_tensors(Tensor.detach, hyper), data)
        wanted = [tree.differentiable(x) for x in tree.leaves(hyper)]
        if not any(wanted):
            raise InvalidInputError(
                "nothing to differentiate: hyper holds no floating-point tensor"
            )
        push = _ForwardStep(loop, wanted)
        carry, tangents, times = loop.start, push.zeros(loop.start), iter(data.times())
        while True:
            # From a carry the loop has random numbers of its own, and leaves the user's alone.
            with at_random_state(carry.random_state) if owned else restored_on_error():
                t = next(times, None)
                if t is None:
                    return
                carry, tangents, ends, _ = push(
                    carry, tangents, loop.hyper, loop.batch(carry, t), loop.time(t)
                )
            carry = carry._replace(time=loop.time(t + 1))
            check_constants(t, state_of(carry), *ends)
            value, grads = _hyper_gradient(outer, push, carry, tangents, loop.hyper, first=t == 0)
            if mode() is Mode.EAGER:
                _check_finite(t, ends[0], carry, value, grads)
            sent = yield OnlineGradient(t + 1, carry, value, grads)
            if sent is not None:
                _check_alike(sent, loop.hyper)
                loop = loop._replace(hyper=tree.map_tensors(Tensor.detach, sent))


def _hyper_gradient(
    outer: Callable[[dict[str, Tensor], Any], Tensor],
    push: _ForwardStep,
    carry: Carry,
    tangents: Cotangents,
    hyper: HyperTree,
    first: bool,
) -> tuple[Tensor, Any]:
    """Return ``(value, grads)`` of the outer loss at this state.

    Its gradient has two parts: by the state, whose derivative was pushed here, and by hyper itself.
    """
    leaves = tree.leaves(hyper)
    with torch.enable_grad():
        values = [x.detach().requires_grad_() for x in carry.params.values()]
        learned = [leaves[i].detach().requires_grad_() for i in push.places]
        filled = tree.with_leaves(hyper, tree.put(leaves, push.places, learned))
        named = dict(zip(carry.params, values, strict=True))
        value = check_loss(outer(named, filled), "what outer(params, hyper) returns")
        inputs = [*values, *learned]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if value.requires_grad:
            found = torch.autograd.grad(value, inputs, allow_unused=True)
    through = push.contract(list(found[: len(values)]), tangents[: len(values)])
    direct = found[len(values) :]
    if first and not any(bool(g.any()) for g in (*through, *direct) if g is not None):
        raise NotDifferentiableError(
            "no gradient arrives at hyper after the first step: neither a step nor outer(params, "
            "hyper) depends on it. "
            "Hyper-parameters of the optimizer reach it by Problem(loss, optimizer, "
            "optimizer_hyper=lambda hyper, t: {...}); outer "
            "must not detach params"
        )
    total = [
        torch.zeros_like(leaves[i]) + sum(g for g in (through[i], d) if g is not None)
        for i, d in zip(push.places, direct, strict=True)
    ]
    grads = tree.put([None] * len(leaves), push.places, total)
    return value.detach(), tree.map_tensors(Tensor.detach, tree.with_leaves(hyper, grads))


def _check_finite(t: int, loss: Tensor, carry: Carry, value: Tensor, grads: Any) -> None:
    """Raise unless what step ``t`` of `ForwardMode.online` gave is finite.

    The results alone are looked at; where one is not finite, what they come from is named first.
    """
    named = [("the outer loss", value), *tree.named_tensors(grads, "grads")]
    found = [what for what, x in named if not is_finite(x)]
    if not found:
        return
    inner = [("the inner loss", loss)]
    inner += [(f"parameter {name!r} after it", p) for name, p in carry.params.items()]
    cause = next((what for what, x in inner if not is_finite(x)), None)
    where = (
        f"{cause} is not finite: the inner loop diverged, or the loss is not defined there. "
        "Lower the learning rate"
        if cause
        else "the loss and the parameters are, so look at derivatives (sqrt or norm at 0) in the "
        "loss, in the optimizer or in outer(params, hyper)"
    )
    raise NonFiniteError(f"{found[0]} is not finite after step {t}: {where}")


def _check_alike(sent: HyperTree, before: HyperTree) -> None:
    """Raise unless both have the same leaves at the same places."""
    described = [
        [(path, tuple(x.shape), x.dtype) for path, x in tree.named_tensors(h, "hyper")]
        for h in (sent, before)
    ]
    if described[0] != described[1] or len(tree.leaves(sent)) != len(tree.leaves(before)):
        raise InvalidInputError(
            f"send(hyper) has {described[0]}, the loop started with {described[1]}: the same "
            "tensors in the same order are needed"
        )


class _ForwardStep:
    """A step that carries the derivative of the state along.

    The first dimension of a derivative counts the elements of the hyper-parameters.

    Args:
        loop: the loop.
        wanted: for each leaf of hyper, True if it is differentiated.
    """

    def __init__(self, loop: Loop, wanted: list[bool]) -> None:
        self.problem = loop.problem
        self.leaves = tree.leaves(loop.hyper)
        self.places = [i for i, w in enumerate(wanted) if w]
        for i in self.places:
            if self.leaves[i].is_complex():
                raise InvalidInputError(
                    "a complex tensor in hyper has no forward mode here: write "
                    "strategy=innerloop.Checkpointed()"
                )
        self.sizes = [self.leaves[i].numel() for i in self.places]
        self.count = sum(self.sizes)
        self.basis: list[Tensor] = []
        done = 0
        for i, size in zip(self.places, self.sizes, strict=True):
            x = self.leaves[i]
            rows = torch.zeros(self.count, size, dtype=x.dtype, device=x.device)
            rows[done : done + size] = torch.eye(size, dtype=x.dtype, device=x.device)
            self.basis.append(rows.reshape(self.count, *x.shape))
            done += size

    def zeros(self, carry: Carry) -> Cotangents:
        """Return the derivative of a state that does not depend on hyper."""
        leaves = tree.leaves(state_of(carry))
        return [
            x.new_zeros(self.count, *x.shape) if tree.differentiable(x) else None for x in leaves
        ]

    def __call__(
        self, carry: Carry, tangents: Cotangents, hyper: HyperTree, batch: object, t: int
    ) -> tuple[Carry, Cotangents, tuple[Tensor, Any], tuple[Any, Any]]:
        """Run one step: ``(carry, its derivative, (loss, aux), their derivatives)``."""
        states, leaves = tree.leaves(state_of(carry)), tree.leaves(hyper)
        # Kernels write running statistics in place; they are not differentiated.
        skipped = {
            id(b) for n, b in carry.buffers.items() if n not in self.problem.computed_buffers
        }
        places = [
            i for i, x in enumerate(states) if tree.differentiable(x) and id(x) not in skipped
        ]
        values = [*[states[i] for i in places], *[leaves[i] for i in self.places]]
        box: list[Any] = []

        def step(*values: Tensor) -> list[Tensor]:
            filled = tree.put(states, places, values[: len(places)])
            hypers = tree.put(leaves, self.places, values[len(places) :])
            start = carry_of(tree.with_leaves(state_of(carry), filled), carry.random_state)
            new, loss, aux = self.problem.step(start, tree.with_leaves(hyper, hypers), batch, t)
            found, template = tree.split((state_of(new), loss, aux))
            box.append((template, new.random_state, [tree.differentiable(x) for x in found]))
            return found

        def along(*tangents: Tensor) -> tuple[Any, Any]:
            with torch_private.only_forward_mode():
                return _jvp(step, tuple(values), tangents)

        # A differentiable leaf of the state always has a tangent.
        given: list[Any] = [*[tangents[i] for i in places], *self.basis]
        try:
            if self.count == 1:
                found, pushed = along(*[v[0] for v in given])
                pushed = [v.unsqueeze(0) for v in pushed]
            else:
                found, pushed = torch.func.vmap(along, randomness="same")(*given)
                found = [x[0] for x in found]
        except InnerLoopError:
            raise
        except RuntimeError as error:
            if not lacks_forward_mode(error):
                raise explain(error) from error
            raise NotDifferentiableError(
                "ForwardMode() needs forward-mode derivatives, and an operation of the loss lacks "
                "one: write "
                f"strategy=innerloop.Checkpointed(). PyTorch says: {error}"
            ) from error
        template, random_state, floats = box.pop()
        state, loss, aux = tree.join(template, found)
        pushed = [v if f else None for v, f in zip(pushed, floats, strict=True)]
        of_state, of_loss, of_aux = tree.join(template, pushed, rest_too=False)
        return carry_of(state, random_state), tree.leaves(of_state), (loss, aux), (of_loss, of_aux)

    def contract(self, cotangents: Cotangents, tangents: Cotangents) -> Cotangents:
        """Return the cotangent of each leaf of hyper; None where nothing depends on it."""
        total: Tensor | None = None
        for c, v in zip(cotangents, tangents, strict=True):
            if c is not None and v is not None:
                product = (c.conj() * v).real if v.is_complex() else c * v
                part = product.reshape(self.count, -1).sum(1)
                total = part if total is None else total + part
        row: Cotangents = [None] * len(self.leaves)
        if total is not None:
            for i, piece in zip(self.places, total.split(self.sizes), strict=True):
                row[i] = piece.reshape(self.leaves[i].shape).to(self.leaves[i].dtype)
        return row

    def influence(self, of_states: Iterable[Tensor], of_steps: Iterable[Tensor]) -> list[bool]:
        """Return for each leaf of hyper True if it has any influence.

        A derivative of zero for a leaf without influence would hide a mistake.
        """
        slopes = [*of_states, *[v.transpose(0, 1) for v in of_steps]]
        found = [False] * len(self.leaves)
        for v in slopes:
            for i, rows in zip(self.places, v.split(self.sizes), strict=True):
                found[i] = found[i] or bool(torch_private.innermost(rows).any())
        return found


def _name_what_is_stored(loop: Loop, carry: Carry, batch: object, t: int) -> None:
    """Call the user's functions once more, so that what they store elsewhere has an error.

    Dual numbers leave no trace in it. The first and the last call are enough for what gathers all
    steps, and for what keeps the newest.
    """
    problem, outside = loop.problem, loop.problem.outside
    if outside is not None:
        # Copies: a loss that writes its parameters would write the user's.
        params = outside.params({n: p.clone() for n, p in carry.params.items()})
        with torch.enable_grad():
            problem.evaluate(params, carry.buffers, outside.hyper, batch)
            problem.overrides(outside.hyper, loop.time(t))


class _ForwardModeLoop(LoopFunction):
    """A loop under `ForwardMode`."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        # What needs a derivative must be known before the loop runs.
        self.wanted = [
            tree.differentiable(x) and torch_private.has_derivative(x)
            for x in tree.leaves(loop.hyper)
        ]
        self.recorded = self.recorded and any(self.wanted)
        self.reached: list[bool] = []

    def forward(self, loop: Loop) -> LoopOutputs:
        push = _ForwardStep(loop, self.wanted) if self.recorded else None
        carry, tangents = loop.start, [] if push is None else push.zeros(loop.start)
        states: dict[int, Any] = {}
        randoms: dict[int, RandomState | None] = {}
        kept: dict[int, Any] = {}
        rows, slopes = StepOutputs(carry.params), StepOutputs(carry.params)
        for t in loop.batches.times():
            batch = loop.batch(carry, t)
            before, random_state = carry, RandomState.now()
            if push is None:
                carry, *rest = loop.step(carry, batch, t)
                ends: Any = rest
            else:
                carry, tangents, ends, derivatives = push(
                    carry, tangents, loop.hyper, batch, loop.time(t)
                )
                slopes.add(*derivatives)
                if t == 0 or t + 1 == loop.batches.steps:
                    with at_random_state(random_state):
                        _name_what_is_stored(loop, before, batch, t)
            if torch.is_grad_enabled():
                check_constants(t, state_of(carry), *ends)
            rows.add(*ends)
            if t + 1 in loop.save_at:
                states[t + 1], randoms[t + 1], kept[t + 1] = (
                    state_of(carry),
                    carry.random_state,
                    tangents,
                )
            loop.report("forward", t + 1, loop.batches.steps)
        end = len(rows)
        states[end], randoms[end], kept[end] = state_of(carry), carry.random_state, tangents
        if push is not None:
            self.kept = kept, *slopes.stacked()
            self.reached = push.influence(
                tree.tensors(tuple(kept.values())), tree.tensors(self.kept[1:])
            )
            if not all(self.reached[i] for i in push.places):
                used = step_pullback.used_hyper(loop, self.wanted, end)
                self.reached = [a or i in used for i, a in enumerate(self.reached)]
        return LoopOutputs(states, *rows.stacked(), end, randoms)

    def pull(
        self, loop: Loop, kept: Any, cotangents: LoopOutputs, wanted: list[bool]
    ) -> tuple[Cotangents, Cotangents]:
        states, losses, aux = kept
        self.kept = kept
        given: list[Any] = []
        slopes: list[Any] = []
        for t, cotangent in cotangents.states.items():
            given += tree.leaves(cotangent)
            slopes += states[t]
        given += [cotangents.losses, *tree.leaves(cotangents.aux)]
        # What is stacked over steps has the elements of hyper in its second dimension.
        slopes += [None if v is None else v.transpose(0, 1) for v in (losses, *tree.leaves(aux))]
        of_hyper = _ForwardStep(loop, self.wanted).contract(given, slopes)
        chosen = [a and b for a, b in zip(wanted, self.reached, strict=True)]
        nothing: Cotangents = [None] * len(tree.leaves(state_of(loop.start)))
        return nothing, [c if yes else None for c, yes in zip(of_hyper, chosen, strict=True)]


_START = (
    "ForwardMode() does not differentiate with respect to params (or the optimizer's state): that "
    "would take one pass per element. Write "
    "strategy=innerloop.Checkpointed(), which is exact at any length, or detach params"
)
