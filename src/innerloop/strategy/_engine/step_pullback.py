r"""The pullback of one step: from cotangents of its results to cotangents of its inputs.

With :math:`g = \nabla_\theta \ell(\theta, \lambda)` and the update :math:`(\theta', s') = u(g, s,
\theta, \lambda)`, the cotangents :math:`(\bar\theta', \bar s')` are first pulled through the
update, which gives :math:`\bar g` (and direct parts), and then through the gradient:

.. math::
    \bar\theta \mathrel{+}= \nabla^2_{\theta\theta} \ell\, \bar g, \qquad
    \bar\lambda \mathrel{+}= \nabla^2_{\lambda\theta} \ell\, \bar g.

The Hessian is symmetric, so both products are the derivative of :math:`(\nabla_\theta \ell,
\nabla_\lambda \ell)` with respect to :math:`\theta` along :math:`\bar g`: one forward-mode pass
over the gradient (Kemaev et al., "Scalable meta-learning via mixed-mode differentiation", 2025), or
one central difference of it (`innerloop._linear.products`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._inner_gradient import graph
from innerloop._inner_gradient.torch_errors import explain
from innerloop._linear.products import (
    Gradients,
    SecondProduct,
    central_difference,
    forward_over_reverse,
    lacks_forward_mode,
    without_forward_mode,
)
from innerloop._problem import Problem
from innerloop._types import HyperTree, Loss, Params
from innerloop._utils import torch_private, tree
from innerloop._utils.caches import cache
from innerloop._utils.execution import Mode, may_call_autograd, mode
from innerloop._utils.finite import have_values
from innerloop._utils.inner_pass import assuming_symmetry, check_symmetric
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop._utils.warn import warn_user
from innerloop.errors import InnerLoopError, NotDifferentiableError
from innerloop.strategy._base import Loop

Cotangents = list[Tensor | None]
State = tuple[Params, Any, Params]
"""The part of a carry that is differentiated: parameters, optimizer state, buffers."""

# With has_aux it returns three values, which its annotation does not say.
_vjp: Any = torch.func.vjp


def carry_of(state: Sequence[Any], random_state: RandomState | None) -> Carry:
    """Return the carry of which `state_of` gives ``state``."""
    params, optimizer_state, buffers = state
    return Carry(params, optimizer_state, buffers, random_state)


class Step(NamedTuple):
    """The inputs of one step that is to be pulled back, all of them constants.

    Attributes:
        problem: the problem.
        carry: the state before the step.
        hyper: the hyper-parameters.
        batch: the data.
        t: the time.
        wanted: for each leaf of ``hyper``, True if its cotangent is wanted.
        reached: the leaves of ``hyper`` that any step so far depends on; added to by a pullback.
        random_state: the random state in which the loss is evaluated; None: it draws nothing.
        finite_step: the relative step of the central difference; None: the cube root of the
            precision.
    """

    problem: Problem
    carry: Carry
    hyper: HyperTree
    batch: Any
    t: int
    wanted: Sequence[bool]
    reached: set[int]
    random_state: RandomState | None
    finite_step: float | None = None

    def rewind(self) -> None:
        """Restore the random state, so that each evaluation of the loss sees the same numbers."""
        if self.random_state is not None:
            self.random_state.restore()


class OutputCotangents(NamedTuple):
    """Cotangents of the results of a step; each list is aligned with `tree.leaves`.

    Attributes:
        state: of the new (params, optimizer_state, buffers).
        loss: of the loss.
        aux: of what the loss returned besides; an empty list: all zero.
    """

    state: Cotangents
    loss: Tensor | None
    aux: Cotangents

    @property
    def is_zero(self) -> bool:
        """True if there is none."""
        return self.loss is None and all(c is None for c in (*self.state, *self.aux))

    def of_aux(self, aux: object) -> Cotangents:
        """Return the cotangents of the leaves of ``aux``, written out."""
        return self.aux or [None] * len(tree.leaves(aux))


class After(NamedTuple):
    """The results of a step that was evaluated once more, as constants in their plain form.

    Attributes:
        params: the new parameters; empty where they show nothing, because the gradient was kept.
        buffers: the new buffers.
        aux: what the loss returned besides.
        gradient: the inner gradient, if one was kept to compare it with.
    """

    params: Params
    buffers: Params
    aux: Any
    gradient: Params | None = None


def _plain(values: Any) -> Any:
    """Return the tensors of ``values`` as constants that outlive a transform."""
    return tree.map_tensors(torch_private.plain_form, values)


class InputCotangents(NamedTuple):
    """Cotangents of the inputs of a step, and the loss, evaluated once more.

    Attributes:
        state: of the old (params, optimizer_state, buffers).
        hyper: of the hyper-parameters.
        loss: the value of the loss.
        after: what came out of the step this time; None: not known.
    """

    state: Cotangents
    hyper: Cotangents
    loss: Tensor
    after: After | None = None


def state_of(carry: Carry) -> State:
    """Return the part of a carry that is differentiated."""
    return carry.params, carry.optimizer_state, carry.buffers


def takes_part(step: Step, parts: tuple[Any, ...], buffers_at: int | None) -> list[bool]:
    """Return for each leaf of ``parts`` True if the step is differentiated with respect to it.

    The last of ``parts`` is hyper. Running statistics take no part: the kernels of normalisations
    write them, and refuse tensors that require grad.
    """
    found: list[bool] = []
    for i, part in enumerate(parts[:-1]):
        if i == buffers_at:
            found += [
                tree.differentiable(b) and name in step.problem.computed_buffers
                for name, b in part.items()
            ]
        else:
            found += [tree.differentiable(x) for x in tree.leaves(part)]
    return [*found, *step.wanted]


def reverse(step: Step, given: OutputCotangents, gradient: Params | None = None) -> InputCotangents:
    """Pull back by reverse over reverse: record the step, and run it backwards."""
    if not may_call_autograd():
        step.rewind()
        return _reverse_by_transform(step, given)
    return RecordedStep(step).pull(given)


class RecordedStep:
    """A step whose graph is at hand: it can be pulled back any number of times. Eager code only.

    Args:
        step: the step.

    Attributes:
        loss: the value of the loss.
        after: the new state, with its graph.
    """

    def __init__(self, step: Step) -> None:
        step.rewind()
        self._step = step
        parts = (*state_of(step.carry), step.hyper)
        self._chosen = takes_part(step, parts, 2)
        self._leaves = [
            x.detach().requires_grad_() if c else x
            for x, c in zip(tree.leaves(parts), self._chosen, strict=True)
        ]
        with torch.enable_grad():
            *state, hyper = tree.with_leaves(parts, self._leaves)
            new, loss, aux = step.problem.step(
                carry_of(state, step.carry.random_state), hyper, step.batch, step.t
            )
        self._state, self._loss, self._aux = tree.leaves(state_of(new)), loss, tree.leaves(aux)
        self._after = After(*tree.map_tensors(Tensor.detach, (new.params, new.buffers, aux)))
        self.loss = loss.detach()
        self.after = new

    def pull(self, given: OutputCotangents, *, keep: bool = False) -> InputCotangents:
        """Pull ``given`` back; with ``keep`` the graph is kept for another pullback."""
        ends = [*self._state, self._loss, *self._aux]
        cotangents = [*given.state, given.loss, *(given.aux or [None] * len(self._aux))]
        of_state, of_hyper = self._pulled(ends, cotangents, keep=keep)
        return InputCotangents(of_state, of_hyper, self.loss, self._after)

    def pull_many(self, given: Cotangents) -> tuple[Cotangents, Cotangents]:
        """Pull back many cotangents of the new state at once; the graph is kept.

        Args:
            given: for each leaf of the new state a tensor ``[Q, *shape]``, or None for zeros.

        Returns:
            Those of the old state and of hyper, each ``[Q, *shape]`` or None.
        """
        try:
            # Only the pull is batched: what was recorded outside may have drawn random numbers.
            return self._pulled(self._state, given, batched=True, keep=True)
        except RuntimeError as error:
            # Among those is the error of a block under activation checkpointing.
            if not _lacks_batching(error):
                raise
        count = next(len(c) for c in given if c is not None)
        rows = [
            self._pulled(self._state, [None if c is None else c[q] for c in given], keep=True)
            for q in range(count)
        ]
        return _stacked([row[0] for row in rows]), _stacked([row[1] for row in rows])

    def push(self, tangents: Sequence[Cotangents]) -> list[Cotangents]:
        r"""Push tangents of the old state and of hyper forward, by two pullbacks.

        The derivative of :math:`u \mapsto u^T J` along :math:`v` is :math:`J v`: no operation
        needs a forward mode.
        """
        ends = [(i, y) for i, y in enumerate(self._state) if tree.differentiable(y)]
        ends = [(i, y) for i, y in ends if y.requires_grad]
        starts = [(i, x) for i, x in enumerate(self._leaves) if self._chosen[i]]
        with torch.enable_grad():
            weights = [torch.zeros_like(y).requires_grad_() for _, y in ends]
            linear = torch.autograd.grad(
                [y for _, y in ends],
                [x for _, x in starts],
                weights,
                create_graph=True,
                allow_unused=True,
            )
        kept = [
            (i, g)
            for (i, _), g in zip(starts, linear, strict=True)
            if g is not None and g.requires_grad
        ]
        found: list[Cotangents] = []
        for row in tangents:
            pairs = [(g, v) for i, g in kept if (v := row[i]) is not None]
            pushed: Sequence[Tensor | None] = [None] * len(weights)
            if pairs:
                pushed = torch.autograd.grad(
                    [g for g, _ in pairs],
                    weights,
                    [v for _, v in pairs],
                    retain_graph=True,
                    allow_unused=True,
                )
            found.append(tree.put([None] * len(self._state), [i for i, _ in ends], list(pushed)))
        return found

    def _pulled(
        self,
        ends: Sequence[Any],
        cotangents: Cotangents,
        *,
        batched: bool = False,
        keep: bool = False,
    ) -> tuple[Cotangents, Cotangents]:
        pairs = [
            (y, c)
            for y, c in zip(ends, cotangents, strict=True)
            if c is not None and y.requires_grad
        ]
        row: Cotangents = [None] * len(self._leaves)
        if pairs:
            inputs = [x for x, c in zip(self._leaves, self._chosen, strict=True) if c]
            found = iter(
                torch.autograd.grad(
                    [y for y, _ in pairs],
                    inputs,
                    [c for _, c in pairs],
                    allow_unused=True,
                    is_grads_batched=batched,
                    retain_graph=keep,
                )
            )
            row = [next(found) if c else None for c in self._chosen]
        count = len(self._leaves) - len(self._step.wanted)
        self._step.reached.update(i for i, c in enumerate(row[count:]) if c is not None)
        return row[:count], row[count:]


def reverse_many(step: Step, rows: Cotangents) -> InputCotangents:
    """Pull many cotangents of the new state back, as `RecordedStep.pull_many`; compiled too.

    Args:
        step: the step.
        rows: for each leaf of the new state a tensor ``[Q, *shape]``, or None for zeros.

    Returns:
        Cotangents ``[Q, *shape]`` or None, and the loss.
    """
    if may_call_autograd():
        recorded = RecordedStep(step)
        return InputCotangents(*recorded.pull_many(rows), recorded.loss)
    inputs = _Inputs(step, (*state_of(step.carry), step.hyper), buffers_at=2)

    def ends(values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        *state, hyper = inputs.filled(values)
        carry = carry_of(state, step.carry.random_state)
        new, loss, _ = step.problem.step(carry, hyper, step.batch, step.t)
        return _selected(tree.leaves(state_of(new)), rows), loss

    # The step is outside of vmap: only the pull is batched.
    _, pull, loss = _vjp(ends, inputs.values, has_aux=True)
    (values,) = torch.func.vmap(pull)([c for c in rows if c is not None])
    found = inputs.aligned(values)
    count = len(found) - len(step.wanted)
    return InputCotangents(found[:count], found[count:], loss)


def _lacks_batching(error: RuntimeError) -> bool:
    """True if torch complains that an operation cannot be run on a batch of cotangents."""
    return any(word in str(error) for word in ("vmap", "batching rule", "functorch", "Batched"))


def _stacked(rows: list[Cotangents]) -> Cotangents:
    """Stack the cotangents of many pullbacks; None where all are."""
    return [
        None
        if all(c is None for c in column)
        else torch.stack([c for c in column if c is not None])
        for column in zip(*rows, strict=True)
    ]


def _reverse_by_transform(step: Step, given: OutputCotangents) -> InputCotangents:
    inputs = _Inputs(step, (*state_of(step.carry), step.hyper), buffers_at=2)
    after: list[After] = []

    def ends(values: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, Params]]:
        *state, hyper = inputs.filled(values)
        carry = carry_of(state, step.carry.random_state)
        new, loss, aux = step.problem.step(carry, hyper, step.batch, step.t)
        found = _selected(
            [*tree.leaves(state_of(new)), loss, *tree.leaves(aux)],
            [*given.state, given.loss, *given.of_aux(aux)],
        )
        inputs.note(found, values)
        if mode() is not Mode.COMPILING:
            after.append(After(*_plain((new.params, new.buffers, aux))))
        return found, (loss, dict(new.params) if step.problem.shows_params else {})

    _, pull, (loss, shown) = _vjp(ends, inputs.values, has_aux=True)
    if shown and mode() is Mode.COMPILING:
        after.append(After(shown, {}, None))
    cotangents = [*given.state, given.loss, *given.aux]
    (values,) = pull([c for c in cotangents if c is not None])
    found = inputs.aligned(values)
    count = len(found) - len(step.wanted)
    return InputCotangents(found[:count], found[count:], loss, after[0] if after else None)


def mixed(step: Step, given: OutputCotangents, gradient: Params | None = None) -> InputCotangents:
    """Pull back by forward over reverse: one ``jvp`` of the inner gradient.

    It is taken along the cotangent that the update hands to the gradient.
    """

    def product(gradients: Gradients, values: list[Tensor], along: list[Tensor]) -> SecondProduct:
        return forward_over_reverse(gradients, values, along, before_each=step.rewind)

    _check_factors(step, "mixed")
    with assuming_symmetry("mixed"):
        return _through_factors(step, given, gradient, product)


def finite(step: Step, given: OutputCotangents, gradient: Params | None = None) -> InputCotangents:
    """Pull back by a central difference of the inner gradient."""
    besides = _Besides()

    def value() -> Tensor:
        carry = step.carry
        loss, found = step.problem.evaluate(carry.params, carry.buffers, step.hyper, step.batch)
        besides.note(*found)
        return loss

    def product(gradients: Gradients, values: list[Tensor], along: list[Tensor]) -> SecondProduct:
        return central_difference(
            gradients,
            values,
            along,
            before_each=step.rewind,
            value=value,
            moved=len(step.carry.params),
            relative_step=step.finite_step,
        )

    _check_factors(step, "finite")
    with assuming_symmetry("finite"):
        return _through_factors(step, given, gradient, product, besides)


def _check_factors(step: Step, product: str) -> None:
    """Raise if hooks or targets make the gradient of a step another one than that of the loss."""
    if step.problem.targets is not None:
        with assuming_symmetry(product):
            check_symmetric("Problem(targets=...), which is differentiated in the outer pass only,")
    if step.problem.parameter_hooks(step.carry.params):
        with assuming_symmetry(product):
            check_symmetric("a gradient hook on a parameter (register_hook)")


Product = Callable[[Gradients, list[Tensor], list[Tensor]], SecondProduct]
"""``product(gradients, at, along)``."""


def _no_product(gradients: Gradients, values: list[Tensor], along: list[Tensor]) -> SecondProduct:
    """Return zeros for the second derivative: the direct part of a pullback is left."""
    zeros = [torch.zeros_like(v) for v in values]
    return SecondProduct(zeros, zeros, values[0].new_zeros(()))


def check_product(product: str, step: Step, given: OutputCotangents, ours: InputCotangents) -> None:
    """Raise if the pullback of one step is not that of reverse over reverse, where that exists.

    Both products take the Jacobian of the inner gradient for symmetric. It is not where the
    gradient is not that of the loss: custom autograd Functions, values that are held constant in a
    way that a derivative does not see. A part of the loss that stops gradients (``detach``,
    ``no_grad``: spectral norm's power iteration) moves with the parameters that a finite difference
    displaces, and no smaller step cures that. Rows of a Jacobian that are taken at once have no
    numbers to compare.
    """
    if not have_values(x for x in (*ours.state, *ours.hyper) if x is not None):
        return
    try:
        exact = reverse(step, given)
    except (InnerLoopError, RuntimeError):
        return
    direct = _through_factors(step, given, None, _no_product)
    error = scale = total = 0.0
    rows = zip(*([*found.state, *found.hyper] for found in (ours, exact, direct)), strict=True)
    for a, b, c in rows:
        if a is not None and b is not None:
            error = math.hypot(error, float((a - b).norm()))
            total = math.hypot(total, float(b.norm()))
            scale = math.hypot(scale, float((b if c is None else b - c).norm()))
    precision = max(
        (torch.finfo(p.dtype).eps for p in step.carry.params.values()), default=2.0**-52
    )
    if product == "mixed":
        if error > max(1e-4, 10 * math.sqrt(precision)) * scale + 100 * precision * total:
            raise NotDifferentiableError(
                f'product="mixed" is off by {error / max(scale, error):.0%} at step {step.t}: it '
                "needs a symmetric Jacobian of the inner gradient, and the gradient of this step "
                "is not that of the loss (a custom autograd Function, a hook, a value changed "
                'without a graph). Write product="reverse"'
            )
    # Where reverse over reverse sees nothing, there is nothing to compare with.
    elif scale and error > 0.05 * scale:
        raise NotDifferentiableError(
            f'product="finite" is off by {error / scale:.0%} at step {step.t}: the loss stops a '
            "gradient (detach, no_grad), "
            'which a finite difference does not see, or has kinks. Write product="reverse", or '
            "set finite_step to skip this check"
        )


def used_hyper(loop: Loop, wanted: Sequence[bool], steps: int) -> set[int]:
    """Return which of the ``wanted`` leaves of hyper some step depends on, whatever the value.

    The steps run once more, on constants, until all are found.
    """
    leaves = tree.leaves(loop.hyper)
    missing = {i for i, w in enumerate(wanted) if w}
    used: set[int] = set()
    carry = loop.start
    loop = loop._replace(batches=loop.batches.ending(steps))
    with at_random_state(carry.random_state):
        for t in range(steps):
            places = sorted(missing - used)
            if not places:
                break
            batch = loop.batch(carry, t)
            box: list[Any] = []

            def ends(
                values: list[Tensor],
                carry: Carry = carry,
                batch: object = batch,
                t: int = t,
                places: list[int] = places,
                box: list[Any] = box,
            ) -> tuple[list[Tensor], list[Tensor]]:
                hyper = tree.with_leaves(loop.hyper, tree.put(leaves, places, values))
                new, loss, aux = loop.problem.step(carry, hyper, batch, loop.time(t))
                ends = [x for x in tree.tensors((state_of(new), loss, aux)) if x.requires_grad]
                found = {id(x) for x in graph.check_graph(ends, (), second_order=False)}
                used.update(i for i, v in zip(places, values, strict=True) if id(v) in found)
                tensors, template = tree.split(state_of(new))
                box[:] = template, new.random_state
                return [values[0] * 0], tensors

            tensors = _vjp(ends, [leaves[i] for i in places], has_aux=True)[2]
            carry = carry_of(tree.join(box[0], tensors), box[1])
    return used


class _Besides:
    """What the last evaluation of a loss gave besides its value.

    Attributes:
        buffers, aux: constants in their plain form; None before the first evaluation.
    """

    def __init__(self) -> None:
        self.buffers: Params | None = None
        self.aux: Any = None

    def note(self, aux: object, buffers: Params) -> None:
        """Note ``aux`` and ``buffers``."""
        if mode() is not Mode.COMPILING:
            self.buffers, self.aux = _plain((dict(buffers), aux))


def _through_factors(
    step: Step,
    given: OutputCotangents,
    gradient: Params | None,
    product: Product,
    besides: _Besides | None = None,
) -> InputCotangents:
    """Pull through the update, through the gradient by ``product``, and through buffers and aux."""
    sizes = [len(tree.leaves(part)) for part in state_of(step.carry)]
    kept = gradient is not None
    seen = noted = _Besides() if besides is None else besides
    buffers_at = len(given.state) - sizes[2]
    if gradient is None:
        step.rewind()
        gradient, _, aux, buffers = step.problem.gradient(
            step.carry.params, step.carry.buffers, step.hyper, step.batch
        )
        seen = _Besides()
        seen.note(aux, buffers)
    (of_gradient, of_params, of_optimizer, of_hyper), new_params = through_update(
        step, gradient, given.state[:buffers_at]
    )

    inputs = _Inputs(step, (step.carry.params, step.carry.buffers, step.hyper), buffers_at=1)
    total, loss, again = _through_gradient(step, inputs, of_gradient, given.loss, product, noted)
    after: After | None = None
    if seen.buffers is not None and product is not _no_product:
        after = After(new_params, seen.buffers, seen.aux)
        if kept:
            # The parameters follow from the gradient that was kept, so that is compared.
            after = after._replace(params={}, gradient=again)
    more = _through_besides(step, inputs, given._replace(state=given.state[buffers_at:]))
    total = [add(a, b) for a, b in zip(total, more, strict=True)]
    params, of_buffers, hyper = (
        total[: sizes[0]],
        total[sizes[0] : sizes[0] + sizes[2]],
        total[sizes[0] + sizes[2] :],
    )
    of_params = [add(a, b) for a, b in zip(of_params, params, strict=True)]
    of_hyper = [add(a, b) for a, b in zip(of_hyper, hyper, strict=True)]
    return InputCotangents([*of_params, *of_optimizer, *of_buffers], of_hyper, loss.detach(), after)


def through_update(
    step: Step, gradient: Params, given: Cotangents
) -> tuple[list[Cotangents], Params]:
    """Pull the cotangents of the new params and optimizer state through the update.

    Returns:
        The cotangents of gradient, params, optimizer state and hyper; and the new params, in their
        plain form (empty if nothing had a cotangent).
    """
    problem = step.problem
    parts = (gradient, step.carry.params, step.carry.optimizer_state, step.hyper)
    inputs = _Inputs(step, parts)
    new_params: dict[str, Tensor] = {}

    def update(values: list[Tensor]) -> list[Tensor]:
        grads, params, state, hyper = inputs.filled(values)
        updated = problem.new_params(grads, state, params, problem.overrides(hyper, step.t))
        if mode() is not Mode.COMPILING:
            new_params.update(_plain(dict(updated[0])))
        ends = _selected(tree.leaves(updated), given)
        inputs.note(ends, values)
        return ends

    row = inputs.pulled(update, given)
    split: list[Cotangents] = []
    for part in parts:
        count = len(tree.leaves(part))
        split.append(row[:count])
        row = row[count:]
    return split, new_params


def _through_gradient(
    step: Step,
    inputs: _Inputs,
    along: Cotangents,
    given: Tensor | None,
    product: Product,
    noted: _Besides,
) -> tuple[Cotangents, Tensor, Params | None]:
    """Pull the cotangents of the gradient and of the loss through the evaluation of both.

    Args:
        step: the step.
        inputs: what the loss is a function of.
        along: the cotangents of the gradient, along which the second derivative is taken.
        given: the cotangent of the loss, which multiplies the first derivative.
        product: takes the second derivative.
        noted: is told what the evaluation gives besides the loss.

    Returns:
        ``(cotangents, loss, gradient)``, the gradient in its plain form, or None: not taken.
    """

    def value(values: list[Tensor]) -> tuple[Tensor, Tensor]:
        params, buffers, hyper = inputs.filled(values)
        loss, besides = step.problem.evaluate(params, buffers, hyper, step.batch)
        noted.note(*besides)
        inputs.note([loss], values)
        return loss, loss

    if given is None and all(a is None for a in along):
        step.rewind()
        return [None] * len(inputs.leaves), value(inputs.values)[0], None
    tangents = [torch.zeros_like(v) for v in inputs.values]
    for i, a in enumerate(along):
        if a is not None:
            tangents[i] = a
    first, slope, loss = product(tree.grad_with_aux(value), inputs.values, tangents)
    if given is not None:
        slope = [a + given * b for a, b in zip(slope, first, strict=True)]
    gradient: Params | None = None
    if mode() is not Mode.COMPILING:
        gradient = _plain(dict(zip(step.carry.params, first, strict=False)))
    return inputs.aligned(slope), loss, gradient


def _through_besides(step: Step, inputs: _Inputs, given: OutputCotangents) -> Cotangents:
    """Pull the cotangents of the new buffers (``given.state``) and of aux through the loss."""
    cotangents = [*given.state, *given.aux]
    if all(c is None for c in cotangents):
        return [None] * len(inputs.leaves)
    step.rewind()

    def besides(values: list[Tensor]) -> list[Tensor]:
        params, buffers, hyper = inputs.filled(values)
        _, (aux, new_buffers) = step.problem.evaluate(params, buffers, hyper, step.batch)
        ends = _selected(
            [*tree.leaves(new_buffers), *tree.leaves(aux)], [*given.state, *given.of_aux(aux)]
        )
        inputs.note(ends, values)
        return ends

    return inputs.pulled(besides, cotangents)


Pullback = Callable[[Step, OutputCotangents, Params | None], InputCotangents]
PRODUCTS: dict[str, Pullback] = {
    "reverse": reverse,
    "mixed": mixed,
    "finite": finite,
}
PREFERRED = {"cpu": "reverse"}
"""The product that ``"auto"`` takes on each kind of device; reverse on others.

By measurement: docs/devnotes/decisions.md.
"""
_no_forward_mode: MutableMapping[Loss, bool] = cache("losses without a forward mode", weak=True)
"""The losses in which ``product="auto"`` has met an operation without a forward mode."""


def pull(
    product: str, step: Step, given: OutputCotangents, gradient: Params | None = None
) -> InputCotangents:
    """Pull one step back.

    Args:
        product: ``"auto"`` or a key of `PRODUCTS`.
        step: the step.
        given: the cotangents of its results.
        gradient: the inner gradient of the step, if it is known already.

    Raises:
        NotDifferentiableError: an operation lacks the derivative that ``product`` needs.
    """
    device = next(iter(step.carry.params.values())).device.type
    chosen = PREFERRED.get(device, "reverse") if product == "auto" else product
    if product == "auto" and step.problem.loss in _no_forward_mode:
        chosen = "reverse"
    try:
        return PRODUCTS[chosen](step, given, gradient)
    except InnerLoopError:
        raise
    except RuntimeError as error:
        if chosen == "finite" and "functorch" in str(error):
            raise NotDifferentiableError(
                'product="finite" takes the inner gradient by torch.func, inside which the loss '
                "cannot call autograd (requires_grad_ for a gradient penalty, say): write "
                f'product="reverse". PyTorch says: {error}'
            ) from error
        if chosen != "mixed" or not lacks_forward_mode(error):
            raise explain(error) from error
        if product == "auto":
            _no_forward_mode[step.problem.loss] = True
            warn_user(
                f"{step.problem!r}: an operation of the loss lacks a forward-mode derivative, so "
                'product="auto" takes reverse over '
                f"reverse for this problem. PyTorch says: {error}",
            )
            return reverse(step, given)
        raise without_forward_mode(error) from error


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Add two cotangents, where None is zero."""
    return b if a is None else a if b is None else a + b


def _selected(ends: list[Any], cotangents: Cotangents) -> list[Tensor]:
    """Return the results that have a cotangent."""
    return [y for y, c in zip(ends, cotangents, strict=True) if c is not None]


class _Inputs:
    """The leaves of a tree that are differentiated.

    Args:
        step: the step; of ``hyper`` the leaves that it wants are differentiated.
        inputs: the tree; its last entry is ``hyper``.
        buffers_at: which entry is the buffers.
    """

    def __init__(self, step: Step, inputs: tuple[Any, ...], buffers_at: int | None = None) -> None:
        self.step = step
        self.inputs = inputs
        self.leaves = tree.leaves(inputs)
        self.chosen = [i for i, takes in enumerate(takes_part(step, inputs, buffers_at)) if takes]
        self.values = [self.leaves[i] for i in self.chosen]
        self.reached: set[int] = set()

    def filled(self, values: list[Tensor]) -> Any:
        """Return the tree with ``values`` in the places of the leaves that are differentiated."""
        return tree.with_leaves(self.inputs, tree.put(self.leaves, self.chosen, values))

    def note(self, ends: Sequence[Tensor], values: list[Tensor]) -> None:
        """Note which leaves ``ends`` depend on: for all others a transform would give zeros."""
        if mode() is Mode.COMPILING:
            return
        found = {id(x) for x in graph.check_graph(ends, (), second_order=False)}
        self.reached.update(i for i, v in zip(self.chosen, values, strict=True) if id(v) in found)
        before = len(self.leaves) - len(self.step.wanted)
        self.step.reached.update(i - before for i in self.reached if i >= before)

    def pulled(self, fn: Callable[[list[Tensor]], list[Tensor]], given: Cotangents) -> Cotangents:
        """Pull ``given``, the cotangents of the results of ``fn``, back to all leaves."""
        cotangents = [c for c in given if c is not None]
        if not cotangents:
            return [None] * len(self.leaves)
        self.reached = set()
        _, pull = _vjp(fn, self.values)
        return self.aligned(pull(cotangents)[0])

    def aligned(self, values: Sequence[Tensor]) -> Cotangents:
        """Return ``values`` in their places among the leaves, None where nothing was reached."""
        row: Cotangents = [None] * len(self.leaves)
        for i, value in zip(self.chosen, values, strict=True):
            if i in self.reached or mode() is Mode.COMPILING:
                row[i] = value
        return row
