r"""The pullback of one step: from cotangents of what a step gives to cotangents of what it is given.

With :math:`g = \nabla_\theta \ell(\theta, \lambda)` and the update :math:`(\theta', s') = u(g, s,
\theta, \lambda)`, the cotangents
:math:`(\bar\theta', \bar s')` are first pulled through the update, which gives :math:`\bar g` (and direct parts), and then through
the gradient:

.. math::
    \bar\theta \mathrel{+}= \nabla^2_{\theta\theta} \ell\, \bar g, \qquad
    \bar\lambda \mathrel{+}= \nabla^2_{\lambda\theta} \ell\, \bar g.

The Hessian is symmetric, so both products are the derivative of :math:`(\nabla_\theta \ell,
\nabla_\lambda \ell)` with respect to
:math:`\theta` along :math:`\bar g`: one forward-mode pass over the gradient (Kemaev et al., "Scalable meta-learning via mixed-mode
differentiation", 2025), or one central difference of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._inner_gradient import graph
from innerloop._inner_gradient.torch_errors import explain
from innerloop._problem import Problem
from innerloop._types import Loss
from innerloop._utils import tree
from innerloop._utils.caches import cache
from innerloop._utils.execution import Mode, may_call_autograd, mode
from innerloop._utils.random_state import RandomState
from innerloop.errors import InnerLoopError, NotDifferentiableError

Cotangents = list[Tensor | None]
_vjp: Any = (
    torch.func.vjp
)  # with has_aux they return three values, which their annotations do not say
_jvp: Any = torch.func.jvp


def carry_of(state: Sequence[Any], random_state: RandomState | None) -> Carry:
    """The inverse of `state_of`."""
    params, optimizer_state, buffers = state
    return Carry(params, optimizer_state, buffers, random_state)


class Step(NamedTuple):
    """One step to be pulled back: its inputs, all of them constants.

    Attributes:
        problem: the problem.
        carry: the state before the step.
        hyper: the hyper-parameters.
        batch: the data.
        t: the time.
        wanted: for each leaf of ``hyper``, whether its cotangent is wanted.
        reached: the leaves of ``hyper`` that any step so far depends on; added to by a pullback.
        random_state: the one in which the loss is evaluated; None: it draws nothing.
        finite_step: the relative step of the central difference; None: the cube root of the
            precision.
    """

    problem: Problem
    carry: Carry
    hyper: Any
    batch: Any
    t: int
    wanted: Sequence[bool]
    reached: set[int]
    random_state: RandomState | None
    finite_step: float | None = None

    def rewind(self) -> None:
        """Before every evaluation of the loss: each must see the same random numbers."""
        if self.random_state is not None:
            self.random_state.restore()


class OutputCotangents(NamedTuple):
    """Cotangents of what a step gives; each list is aligned with `tree.leaves`.

    Attributes:
        state: of the new (params, optimizer_state, buffers).
        loss: of the loss.
        aux: of what the loss returned besides.
    """

    state: Cotangents
    loss: Tensor | None
    aux: Cotangents


class InputCotangents(NamedTuple):
    """Cotangents of what a step was given, and the loss, evaluated once more.

    Attributes:
        state: of the old (params, optimizer_state, buffers).
        hyper: of the hyper-parameters.
        loss: the value of the loss.
    """

    state: Cotangents
    hyper: Cotangents
    loss: Tensor


def state_of(carry: Carry) -> tuple[Any, Any, Any]:
    """The part of a carry that is differentiated."""
    return carry.params, carry.optimizer_state, carry.buffers


def _takes_part(step: Step, parts: tuple[Any, ...], buffers_at: int | None) -> list[bool]:
    """For each leaf of ``parts``, of which the last is hyper, whether the step is differentiated with respect to it.

    Running statistics are not: the kernels of normalisations write them, and refuse ones that
    require grad.
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


def reverse(step: Step, given: OutputCotangents, gradient: Any = None) -> InputCotangents:
    """Reverse over reverse: record the step, and run it backwards."""
    step.rewind()
    if not may_call_autograd():
        return _reverse_by_transform(step, given)
    parts = (*state_of(step.carry), step.hyper)
    chosen = _takes_part(step, parts, 2)
    leaves = [
        x.detach().requires_grad_() if c else x
        for x, c in zip(tree.leaves(parts), chosen, strict=True)
    ]
    with torch.enable_grad():
        *state, hyper = tree.with_leaves(parts, leaves)
        new, loss, aux = step.problem.step(
            carry_of(state, step.carry.random_state), hyper, step.batch, step.t
        )
        ends = [*tree.leaves(state_of(new)), loss, *tree.leaves(aux)]
    pairs = [
        (y, c)
        for y, c in zip(ends, [*given.state, given.loss, *given.aux], strict=True)
        if c is not None and y.requires_grad
    ]
    row: Cotangents = [None] * len(leaves)
    if pairs:
        inputs = [x for x, c in zip(leaves, chosen, strict=True) if c]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], inputs, [c for _, c in pairs], allow_unused=True
            )
        )
        row = [next(found) if c else None for c in chosen]
    count = len(leaves) - len(step.wanted)
    step.reached.update(i for i, c in enumerate(row[count:]) if c is not None)
    return InputCotangents(row[:count], row[count:], loss.detach())


def _reverse_by_transform(step: Step, given: OutputCotangents) -> InputCotangents:
    inputs = _Inputs(step, (*state_of(step.carry), step.hyper), buffers_at=2)

    def ends(values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        *state, hyper = inputs.filled(values)
        carry = carry_of(state, step.carry.random_state)
        new, loss, aux = step.problem.step(carry, hyper, step.batch, step.t)
        found = _selected([*tree.leaves(state_of(new)), loss, *tree.leaves(aux)], cotangents)
        inputs.note(found, values)
        return found, loss

    cotangents = [*given.state, given.loss, *given.aux]
    _, pull, loss = _vjp(ends, inputs.values, has_aux=True)
    (values,) = pull([c for c in cotangents if c is not None])
    found = inputs.aligned(values)
    count = len(found) - len(step.wanted)
    return InputCotangents(found[:count], found[count:], loss)


def mixed(step: Step, given: OutputCotangents, gradient: Any = None) -> InputCotangents:
    """Forward over reverse: one ``jvp`` of the inner gradient along the cotangent that the update hands it."""

    def product(
        gradients: Callable[..., Any], values: list[Tensor], along: list[Tensor]
    ) -> tuple[Any, Any, Tensor]:
        step.rewind()
        return _jvp(gradients, (values,), (along,), has_aux=True)

    return _through_factors(step, given, gradient, product)


def finite(step: Step, given: OutputCotangents, gradient: Any = None) -> InputCotangents:
    r"""A central difference of the inner gradient.

    .. math:: (\nabla\ell(\theta + \epsilon \bar g) - \nabla\ell(\theta - \epsilon \bar g)) / 2\epsilon
    """

    def product(
        gradients: Callable[..., Any], values: list[Tensor], along: list[Tensor]
    ) -> tuple[Any, Any, Tensor]:
        count = len(step.carry.params)
        h = (
            torch.finfo(values[0].dtype).eps ** (1 / 3)
            if step.finite_step is None
            else step.finite_step
        )
        scale = torch.stack([v.abs().max() for v in along[:count] if v.numel()]).max()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        size = h * (1 + torch.stack([v.abs().max() for v in values[:count] if v.numel()]).max())
        sides = []
        for sign in (1, -1):
            step.rewind()
            moved = [
                v + sign * size * (a / scale)
                for v, a in zip(values[:count], along[:count], strict=True)
            ]
            sides.append(gradients([*moved, *values[count:]]))
        (above, loss), (below, _) = sides
        mean = [(a + b) / 2 for a, b in zip(above, below, strict=True)]
        slope = [(a - b) * (scale / (2 * size)) for a, b in zip(above, below, strict=True)]
        step.rewind()
        loss = step.problem.evaluate(step.carry.params, step.carry.buffers, step.hyper, step.batch)[
            0
        ]
        return mean, slope, loss

    return _through_factors(step, given, gradient, product)


def _no_product(
    gradients: Callable[..., Any], values: list[Tensor], along: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """No second derivative at all: what is left of a pullback is the direct part."""
    zeros = [torch.zeros_like(v) for v in values]
    return zeros, zeros, values[0].new_zeros(())


def check_finite(step: Step, given: OutputCotangents, ours: InputCotangents) -> None:
    """Compare the pullback of one step with reverse over reverse, where that exists.

    A part of the loss that stops gradients (``detach``, ``no_grad``: spectral norm's power
    iteration) moves with the displaced parameters, and no smaller step cures that.
    """
    try:
        exact = reverse(step, given)
    except (InnerLoopError, RuntimeError):
        return
    direct = _through_factors(step, given, None, _no_product)
    error = scale = 0.0
    rows = zip(*([*found.state, *found.hyper] for found in (ours, exact, direct)), strict=True)
    for a, b, c in rows:
        if a is not None and b is not None:
            error += float((a - b).norm()) ** 2
            scale += float((b if c is None else b - c).norm()) ** 2
    error, scale = math.sqrt(error), math.sqrt(scale)
    if (
        scale and error > 0.05 * scale
    ):  # where reverse over reverse sees nothing, there is nothing to compare with
        raise NotDifferentiableError(
            f'product="finite" is off by {error / scale:.0%} at step {step.t}: the loss stops a '
            "gradient (detach, no_grad), "
            'which a finite difference does not see, or has kinks. Write product="reverse", or '
            "set finite_step to skip this check"
        )


def _through_factors(
    step: Step, given: OutputCotangents, gradient: Any, product: Callable[..., Any]
) -> InputCotangents:
    """Pull through the update, then through the gradient by ``product``, then through what else the loss gives."""
    sizes = [len(tree.leaves(part)) for part in state_of(step.carry)]
    buffers_at = len(given.state) - sizes[2]
    if gradient is None:
        step.rewind()
        gradient = step.problem.gradient(
            step.carry.params, step.carry.buffers, step.hyper, step.batch
        )[0]
    of_gradient, of_params, of_optimizer, of_hyper = _through_update(
        step, gradient, given.state[:buffers_at]
    )

    inputs = _Inputs(step, (step.carry.params, step.carry.buffers, step.hyper), buffers_at=1)
    total, loss = _through_gradient(step, inputs, of_gradient, given.loss, product)
    more = _through_besides(step, inputs, [*given.state[buffers_at:], *given.aux])
    total = [add(a, b) for a, b in zip(total, more, strict=True)]
    params, buffers, hyper = (
        total[: sizes[0]],
        total[sizes[0] : sizes[0] + sizes[2]],
        total[sizes[0] + sizes[2] :],
    )
    of_params = [add(a, b) for a, b in zip(of_params, params, strict=True)]
    of_hyper = [add(a, b) for a, b in zip(of_hyper, hyper, strict=True)]
    return InputCotangents([*of_params, *of_optimizer, *buffers], of_hyper, loss.detach())


def _through_update(step: Step, gradient: Any, given: Cotangents) -> list[Cotangents]:
    """The cotangents of gradient, params, optimizer state and hyper, from those of the new params and optimizer state."""
    problem = step.problem
    parts = (gradient, step.carry.params, step.carry.optimizer_state, step.hyper)
    inputs = _Inputs(step, parts)

    def update(values: list[Tensor]) -> list[Tensor]:
        grads, params, state, hyper = inputs.filled(values)
        updated = problem.new_params(grads, state, params, problem.overrides(hyper, step.t))
        ends = _selected(tree.leaves(updated), given)
        inputs.note(ends, values)
        return ends

    row = inputs.pulled(update, given)
    split: list[Cotangents] = []
    for part in parts:
        count = len(tree.leaves(part))
        split.append(row[:count])
        row = row[count:]
    return split


def _through_gradient(
    step: Step,
    inputs: _Inputs,
    along: Cotangents,
    given: Tensor | None,
    product: Callable[..., Any],
) -> tuple[Cotangents, Tensor]:
    """``(cotangents, loss)``: the second derivative of the loss along that of the gradient, and the first times that of the loss."""

    def value(values: list[Tensor]) -> tuple[Tensor, Tensor]:
        params, buffers, hyper = inputs.filled(values)
        loss, _ = step.problem.evaluate(params, buffers, hyper, step.batch)
        inputs.note([loss], values)
        return loss, loss

    if given is None and all(a is None for a in along):
        step.rewind()
        return [None] * len(inputs.leaves), value(inputs.values)[0]
    tangents = [torch.zeros_like(v) for v in inputs.values]
    for i, a in enumerate(along):
        if a is not None:
            tangents[i] = a
    first, slope, loss = product(tree.grad_with_aux(value), inputs.values, tangents)
    if given is not None:
        slope = [a + given * b for a, b in zip(slope, first, strict=True)]
    return inputs.aligned(slope), loss


def _through_besides(step: Step, inputs: _Inputs, given: Cotangents) -> Cotangents:
    """The cotangents that come from those of the new buffers and of aux."""
    if all(c is None for c in given):
        return [None] * len(inputs.leaves)
    step.rewind()

    def besides(values: list[Tensor]) -> list[Tensor]:
        params, buffers, hyper = inputs.filled(values)
        _, (aux, new_buffers) = step.problem.evaluate(params, buffers, hyper, step.batch)
        ends = _selected([*tree.leaves(new_buffers), *tree.leaves(aux)], given)
        inputs.note(ends, values)
        return ends

    return inputs.pulled(besides, given)


PRODUCTS: dict[str, Callable[..., InputCotangents]] = {
    "reverse": reverse,
    "mixed": mixed,
    "finite": finite,
}
PREFERRED = {"cpu": "reverse"}
"""What ``product="auto"`` takes on which kind of device, by measurement (docs/devnotes/decisions.md); elsewhere reverse."""
_no_forward_mode: MutableMapping[Loss, bool] = cache("losses without a forward mode", weak=True)
"""Losses of which ``product="auto"`` has found that an operation lacks a forward-mode derivative."""


def pull(
    product: str, step: Step, given: OutputCotangents, gradient: Any = None
) -> InputCotangents:
    """Pull one step back.

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
        if chosen != "mixed" or not lacks_forward_mode(error):
            raise explain(error) from error
        if product == "auto":
            _no_forward_mode[step.problem.loss] = True
            warnings.warn(
                f"{step.problem!r}: an operation of the loss lacks a forward-mode derivative, so "
                'product="auto" takes reverse over '
                f"reverse for this problem. PyTorch says: {error}",
                stacklevel=2,
            )
            return reverse(step, given)
        raise NotDifferentiableError(
            'product="mixed" needs forward-mode derivatives, and an operation of the loss lacks '
            'one: write product="reverse". '
            f"PyTorch says: {error}"
        ) from error


def lacks_forward_mode(error: Exception) -> bool:
    """Whether torch complains about a missing forward-mode derivative."""
    signs = (
        "forward AD",
        "forward mode",
        "forward-mode",
        "jvp",
        "functorch",
        "ZeroTensors",
        "tangent",
        "dual",
    )
    return isinstance(error, NotImplementedError) or any(sign in str(error) for sign in signs)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum, where None is zero."""
    return b if a is None else a if b is None else a + b


def _selected(ends: list[Any], cotangents: Cotangents) -> list[Tensor]:
    return [y for y, c in zip(ends, cotangents, strict=True) if c is not None]


class _Inputs:
    """The differentiable leaves of a tree whose last entry is ``hyper``, of which only the wanted leaves count."""

    def __init__(self, step: Step, inputs: tuple[Any, ...], buffers_at: int | None = None) -> None:
        self.step = step
        self.inputs = inputs
        self.leaves = tree.leaves(inputs)
        self.chosen = [i for i, takes in enumerate(_takes_part(step, inputs, buffers_at)) if takes]
        self.values = [self.leaves[i] for i in self.chosen]
        self.reached: set[int] = set()

    def filled(self, values: list[Tensor]) -> Any:
        return tree.with_leaves(self.inputs, tree.put(self.leaves, self.chosen, values))

    def note(self, ends: Sequence[Tensor], values: list[Tensor]) -> None:
        """Note which leaves ``ends`` depend on: a transform gives zeros for those that they do not depend on."""
        if mode() is Mode.COMPILING:
            return
        found = {id(x) for x in graph.check_graph(ends, (), second_order=False)}
        self.reached.update(i for i, v in zip(self.chosen, values, strict=True) if id(v) in found)
        before = len(self.leaves) - len(self.step.wanted)
        self.step.reached.update(i - before for i in self.reached if i >= before)

    def pulled(self, fn: Callable[[list[Tensor]], list[Tensor]], given: Cotangents) -> Cotangents:
        """The cotangents of all leaves, from those of what ``fn`` gives."""
        cotangents = [c for c in given if c is not None]
        if not cotangents:
            return [None] * len(self.leaves)
        self.reached = set()
        _, pull = _vjp(fn, self.values)
        return self.aligned(pull(cotangents)[0])

    def aligned(self, values: Sequence[Tensor]) -> Cotangents:
        """``values`` in their places among the leaves; None for those that were not reached, as autograd has it."""
        row: Cotangents = [None] * len(self.leaves)
        for i, value in zip(self.chosen, values, strict=True):
            if i in self.reached or mode() is Mode.COMPILING:
                row[i] = value
        return row
