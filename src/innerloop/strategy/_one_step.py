"""Three approximations of the hyper-gradient that look at one step alone."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._trajectory import Trajectory
from innerloop._types import Params
from innerloop._utils import tree
from innerloop._utils.execution import Mode, mode
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.strategy._base import Loop, Strategy
from innerloop.strategy._engine.constant_run import ConstantRun
from innerloop.strategy._engine.guards import refuse_inputs, refuse_outputs
from innerloop.strategy._engine.step_pullback import Cotangents, Step, state_of, through_update


class _OneStep(Strategy):
    """A loop that runs on constants, and whose end is a function of hyper by one step alone."""

    exact = False
    differentiates: ClassVar[frozenset[str]] = frozenset({"hyper"})
    _reads_optimizer: ClassVar[bool] = False
    """True if hyper-parameters of the optimizer get the gradient of the last update."""

    @abc.abstractmethod
    def _pull(self, step: Step, end: Params, given: dict[str, Tensor]) -> Cotangents:
        """Pull cotangents of the last parameters back to the leaves of hyper.

        Args:
            step: the last step.
            end: the parameters after it.
            given: their cotangents.
        """

    def run(self, loop: Loop) -> Trajectory:
        if mode() is not Mode.EAGER:
            raise NotDifferentiableError(
                f"{self!r} works in eager code only, not inside of torch.func transforms and "
                "compiled code: leave these away, or write strategy=innerloop.Truncated(1)"
            )
        self._check(loop)
        before, batch, end, states, rows = ConstantRun.of(loop)
        steps = len(rows)
        if not steps:
            raise InvalidInputError(
                f"{self!r} differentiates the last step of a loop, and this one has no steps: "
                "write steps=1 or more"
            )
        inputs = [*tree.tensors(state_of(loop.start)), *tree.tensors(loop.hyper)]

        def constant(value: Any, what: str) -> Any:
            return refuse_outputs(value, inputs, _PATH.format(self, what=what))

        for t, state in states.items():
            states[t] = constant(state, f"the state at time {t}")
        params = self._end(loop, before, batch, end.params, steps - 1)
        states[steps] = constant(end, "the optimizer's state, or a buffer,")._replace(params=params)
        losses, aux = constant(rows.stacked(), "traj.losses or aux")
        return Trajectory({**states, 0: loop.start}, losses, aux, steps)

    def _check(self, loop: Loop) -> None:
        """Raise if the strategy does not suit the problem."""

    def _end(
        self, loop: Loop, before: Carry, batch: object, end: Params, t: int
    ) -> dict[str, Tensor]:
        """Return the last parameters as a function of hyper."""
        leaves = tree.leaves(loop.hyper)
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        tensors = [leaves[i] for i in places]
        found = dict(end)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            hyper = tree.map_tensors(Tensor.detach, loop.hyper)
            problem, time = loop.problem, loop.time(t)

            def pull(cotangents: Sequence[Tensor | None], needed: Sequence[bool]) -> Cotangents:
                wanted = [False] * len(leaves)
                for i, x, need in zip(places, tensors, needed, strict=True):
                    wanted[i] = need and tree.differentiable(x)
                step = Step(problem, before, hyper, batch, time, wanted, set(), before.random_state)
                pairs = zip(end.items(), cotangents, strict=True)
                given = {n: torch.zeros_like(p) if c is None else c for (n, p), c in pairs}
                with torch.no_grad(), at_random_state(RandomState.now()):
                    row = self._pull(step, end, given)
                return [row[i] for i in places]

            values = _End.apply(self, pull, len(end), *end.values(), *tensors)
            found = dict(zip(end, values, strict=True))
        found = refuse_inputs(found, tree.tensors(state_of(loop.start)), _START.format(self))
        if self._reads_optimizer:
            return found
        read = loop.problem.overrides(loop.hyper, loop.time(t))
        return refuse_inputs(found, tree.tensors(read), _OPTIMIZER.format(self))


class _End(torch.autograd.Function):
    """The last parameters as a function of hyper."""

    @staticmethod
    def forward(strategy: object, pull: object, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.strategy, ctx.pull, ctx.count, *_ = inputs
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotDifferentiableError(
                f"{ctx.strategy!r} has no second derivative: leave create_graph=True away, or "
                "write strategy=innerloop.Truncated(1)"
            )
        first = 3 + ctx.count
        row = ctx.pull(cotangents, ctx.needs_input_grad[first:])
        return (*[None] * first, *row)


def _by_difference(step: Step, at: Params, along: Params, radius: float) -> Cotangents:
    r"""Return :math:`\nabla_\lambda \nabla_\theta \ell \cdot` ``along``, by a central difference.

    The parameters move by ``radius`` to either side of ``at``; leaves of hyper that the loss does
    not use get None.
    """
    length = torch.stack([v.norm() for v in along.values()]).norm()
    unit = {n: v / length.clamp_min(torch.finfo(v.dtype).tiny) for n, v in along.items()}
    ahead, behind = (
        _gradient_by_hyper(step, {n: p + sign * radius * unit[n] for n, p in at.items()})
        for sign in (1, -1)
    )
    return [
        None if a is None or b is None else (a - b) * (length / (2 * radius))
        for a, b in zip(ahead, behind, strict=True)
    ]


def _gradient_by_hyper(step: Step, params: Params) -> Cotangents:
    """Return the gradient of the inner loss at ``params`` by the leaves of hyper."""
    leaves = tree.leaves(step.hyper)
    places = [i for i, wanted in enumerate(step.wanted) if wanted]
    values = [leaves[i].detach().requires_grad_() for i in places]
    step.rewind()
    with torch.enable_grad():
        hyper = tree.with_leaves(step.hyper, tree.put(leaves, places, values))
        loss, _ = step.problem.evaluate(
            params, step.carry.buffers, hyper, step.batch, second_order=False
        )
    found: Sequence[Tensor | None] = [None] * len(values)
    if loss.requires_grad and values:
        found = torch.autograd.grad(loss, values, allow_unused=True)
    return tree.put([None] * len(leaves), places, found)


def _through_last_update(step: Step, given: Params) -> tuple[Params, Cotangents]:
    """Pull cotangents of the last parameters through the update: to the gradient, and to hyper."""
    step.rewind()
    carry = step.carry
    gradient = step.problem.gradient(carry.params, carry.buffers, step.hyper, step.batch)[0]
    state = [None] * len(tree.leaves(carry.optimizer_state))
    (of_gradient, _, _, of_hyper), _ = through_update(step, gradient, [*given.values(), *state])
    along = {
        n: torch.zeros_like(g) if c is None else c
        for (n, g), c in zip(gradient.items(), of_gradient, strict=True)
    }
    return along, of_hyper


def _is_positive(given: object) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool) and 0 < given < math.inf


class _ByDifference(_OneStep):
    """A strategy that differences the gradient of the inner loss by hyper."""

    radius: float

    def _check(self, loop: Loop) -> None:
        what = ""
        if loop.problem.targets is not None:
            what = "Problem(targets=...) computes"
        elif loop.problem.parameter_hooks(loop.start.params):
            what = "a gradient hook on a parameter (register_hook) makes"
        elif loop.problem.optimizer.needs_closure:
            what = f"{loop.problem.optimizer!r}, which evaluates the loss several times, makes"
        if what:
            raise NotDifferentiableError(
                f"{self!r} takes the step along the gradient of the inner loss, and {what} another "
                "one: write strategy=innerloop.Truncated(1), which differentiates the step as it is"
            )

    def _check_radius(self) -> None:
        given = self.radius
        if (
            isinstance(given, bool)
            or not isinstance(given, (int, float))
            or not 0 < given < math.inf
        ):
            raise InvalidInputError(
                f"radius={given!r}: write how far the parameters move, a positive number, 0.01 for "
                "example"
            )


@dataclasses.dataclass(frozen=True)
class DARTS(_ByDifference):
    r"""Differentiate the last step, its second derivative by a central difference. Approximate.

    With :math:`v = \nabla_\theta \mathcal L` at the end of the loop, and :math:`\bar g` what the
    last update makes of it, :math:`-\eta v` for SGD,

    .. math::
        \frac{d\mathcal L}{d\lambda} \approx \frac{\partial \mathcal L}{\partial \lambda}
        + \frac{\nabla_\lambda \ell(\theta_{T-1} + \epsilon \bar g)
        - \nabla_\lambda \ell(\theta_{T-1} - \epsilon \bar g)}{2 \epsilon},
        \qquad \epsilon = \frac{r}{\lVert \bar g \rVert}

    (Liu et al., "DARTS: differentiable architecture search", 2019, with r = 0.01). Any optimizer
    will do, and what the last update reads from hyper, a learning rate for example, has its exact
    gradient.

    **Bias**: all steps but the last count as constants, so it is short-sighted, as `Truncated` is;
    the difference adds an error of order r². The limit r → 0 is ``Truncated(1)``, which is exact
    for a loop of one step; if the inner loss is quadratic in θ, every r is that limit. A value that
    the loss detaches moves with θ here.

    **Cost**: T G and 3 more in time, whatever T is; memory A. No second derivative is taken.

    **When**: architecture search and other settings in which one inner step is taken for each outer
    step, and the loss has no second derivative, or no memory is left for it. **Not** for the
    gradient with respect to the initial parameters, which raises, nor for hyper-parameters that act
    over many steps.

    Args:
        radius: r, how far the parameters move, in their units (Euclidean length over all).

    Example:
        One step of rate 1/10 on λ w²/2 from 8: w₁ = 8 (1 - λ/10), with derivative -0.8.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: hyper * params["w"] ** 2 / 2,
        ...     innerloop.optim.sgd(lr=0.1),
        ... )
        >>> value, grad = innerloop.metagradient(
        ...     lambda traj, hyper: traj.params["w"],
        ...     problem,
        ...     {"w": torch.tensor(8.0, dtype=torch.float64)},
        ...     None,
        ...     steps=1,
        ...     hyper=torch.tensor(1.0, dtype=torch.float64),
        ...     wrt="hyper",
        ...     strategy=innerloop.strategy.DARTS(),
        ... )
        >>> print(f"{grad:.6f}")
        -0.800000
    """

    radius: float = 0.01

    _reads_optimizer = True

    def __post_init__(self) -> None:
        self._check_radius()

    def _pull(self, step: Step, end: Params, given: dict[str, Tensor]) -> Cotangents:
        along, of_hyper = _through_last_update(step, given)
        mixed = _by_difference(step, step.carry.params, along, self.radius)
        return [
            b if a is None else a if b is None else a + b
            for a, b in zip(of_hyper, mixed, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class SAMA(_ByDifference):
    r"""Differentiate the end of the loop, with the identity for the inner Hessian. Approximate.

    The last update :math:`\theta_T = u(g)` says how the optimizer scales a gradient. With
    :math:`v = \nabla_\theta \mathcal L` and :math:`\bar g = (\partial u / \partial g)^\top v`,
    taken analytically,

    .. math::
        \frac{d\mathcal L}{d\lambda} \approx \frac{\partial \mathcal L}{\partial \lambda}
        + \frac{\nabla_\lambda \ell(\theta_T + \epsilon \bar g)
        - \nabla_\lambda \ell(\theta_T - \epsilon \bar g)}{2 \epsilon},
        \qquad \epsilon = \frac{r}{\lVert \bar g \rVert}

    (Choe et al., "Making scalable meta learning practical", 2023).

    **Bias**: `Implicit` has the inverse Hessian where :math:`D = -\partial u / \partial g` stands
    here, the learning rate for SGD, :math:`\eta / \sqrt{\hat v}` and less for Adam. The limit of a
    solved inner problem with :math:`D H = I` (SGD with Hessian I / η) and r → 0 is exact; else a
    direction of curvature h counts with the weight D h, flat ones too little. At other points the
    Hessian and the distance from the solution are neglected as well. A value that the loss
    detaches moves with θ here.

    **Cost**: T G and 3 more in time, whatever T is; memory A. No second derivative is taken.

    **When**: many hyper-parameters inside the inner loss (weights of examples) and a large model
    that is trained with Adam. **Not** for the gradient with respect to the initial parameters, nor
    for hyper-parameters of the optimizer: these raise.

    Args:
        radius: r, how far the parameters move, in their units (Euclidean length over all).

    Example:
        The solution of (w - λ)²/2 is λ, with derivative 1; the Hessian is 1, and so is the rate.

        >>> import torch, innerloop
        >>> def gradient(rate):
        ...     return innerloop.metagradient(
        ...         lambda traj, hyper: traj.params["w"],
        ...         innerloop.Problem(
        ...             lambda params, hyper, batch: (params["w"] - hyper) ** 2 / 2,
        ...             innerloop.optim.sgd(lr=rate),
        ...         ),
        ...         {"w": torch.tensor(8.0, dtype=torch.float64)},
        ...         None,
        ...         steps=100,
        ...         hyper=torch.tensor(3.0, dtype=torch.float64),
        ...         wrt="hyper",
        ...         strategy=innerloop.strategy.SAMA(),
        ...     )[1]
        >>> print(f"{gradient(1.0):.6f} {gradient(0.25):.6f}")
        1.000000 0.250000
    """

    radius: float = 0.01

    def __post_init__(self) -> None:
        self._check_radius()

    def _pull(self, step: Step, end: Params, given: dict[str, Tensor]) -> Cotangents:
        along, _ = _through_last_update(step, given)
        return _by_difference(step, end, along, self.radius)


@dataclasses.dataclass(frozen=True)
class T1T2(_OneStep):
    r"""Differentiate the end of the loop, with a multiple of the identity for the inverse Hessian.

    .. math::
        \frac{d\mathcal L}{d\lambda} \approx \frac{\partial \mathcal L}{\partial \lambda}
        - \alpha\, (\nabla_\lambda \nabla_\theta \ell)^{\!\top}\, \nabla_\theta \mathcal L
        \quad\text{at } \theta_T

    With α the learning rate this is one more step of gradient descent, differentiated (Luketina et
    al., "Scalable gradient-based tuning of continuous regularization hyperparameters", 2016); the
    second derivative is exact. It is the first term of `solvers.Neumann`.

    **Bias**: `Implicit` has :math:`H^{-1}` where α stands here. The limit of a solved inner problem
    with :math:`H = I / \alpha` is exact; else a direction of curvature h counts with the weight
    α h, flat ones too little. Where the loop has not converged, the distance from the solution is
    neglected as well.

    **Cost**: T G and 3 more in time, whatever T is; memory 2.23 A.

    **When**: regularisation strengths that are tuned while the model trains. **Not** for the
    gradient with respect to the initial parameters, nor for hyper-parameters of the optimizer:
    these raise.

    Args:
        scale: α.

    Example:
        The solution of (w - λ)²/2 is λ, with derivative 1; the Hessian is 1.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: (params["w"] - hyper) ** 2 / 2,
        ...     innerloop.optim.sgd(lr=0.5),
        ... )
        >>> for scale in (1.0, 0.25):
        ...     value, grad = innerloop.metagradient(
        ...         lambda traj, hyper: traj.params["w"],
        ...         problem,
        ...         {"w": torch.tensor(8.0)},
        ...         None,
        ...         steps=50,
        ...         hyper=torch.tensor(3.0),
        ...         wrt="hyper",
        ...         strategy=innerloop.strategy.T1T2(scale),
        ...     )
        ...     print(grad)
        tensor(1.)
        tensor(0.2500)
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        given = self.scale
        if (
            isinstance(given, bool)
            or not isinstance(given, (int, float))
            or not 0 < given < math.inf
        ):
            raise InvalidInputError(
                f"scale={given!r}: write a positive number, the learning rate for example"
            )

    def _pull(self, step: Step, end: Params, given: dict[str, Tensor]) -> Cotangents:
        leaves = tree.leaves(step.hyper)
        places = [i for i, wanted in enumerate(step.wanted) if wanted]
        values = [leaves[i].detach().requires_grad_() for i in places]
        step.rewind()
        with torch.enable_grad():
            hyper = tree.with_leaves(step.hyper, tree.put(leaves, places, values))
            params = {n: p.detach().requires_grad_() for n, p in end.items()}
            gradient = step.problem.gradient(params, step.carry.buffers, hyper, step.batch)[0]
        ends = [(g, -self.scale * given[n]) for n, g in gradient.items() if g.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(values)
        if ends and values:
            found = torch.autograd.grad(
                [g for g, _ in ends], values, [v for _, v in ends], allow_unused=True
            )
        return tree.put([None] * len(leaves), places, found)


_START = (
    "{0} does not differentiate with respect to params: it holds everything before the last step "
    "constant. Write strategy=innerloop.Checkpointed(), which is exact at any length, or detach "
    "params"
)
_OPTIMIZER = (
    "{0} differentiates the inner loss by hyper, not what the optimizer reads from it. Give the "
    "hyper-parameters of the optimizer as numbers, innerloop.optim.sgd(lr=0.1), or write "
    "strategy=innerloop.strategy.DARTS() or innerloop.Truncated(1), which differentiate the last "
    "update, or innerloop.Checkpointed()"
)
_PATH = (
    "{0} differentiates the parameters at the end of the loop; {what} is a part of the path and "
    "counts as a constant. Compute what you need from traj.params, or write "
    "strategy=innerloop.Checkpointed()"
)
