"""Differentiate the solution, not the path to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._linear.root import Equation, Residual, Values, node, solved
from innerloop._linear.solvers import CG, GMRES, Flat, Solver, changed_fields, norm
from innerloop._problem import Problem
from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree, Params
from innerloop._utils import torch_private, tree
from innerloop._utils.execution import Mode, mode
from innerloop._utils.random_state import at_random_state
from innerloop._utils.warn import warn_user
from innerloop.errors import (
    CapturedTensorError,
    InvalidInputError,
    NonFiniteError,
    NotConvergedWarning,
    NotDifferentiableError,
    SolverError,
)
from innerloop.nn._mode import replacing
from innerloop.strategy._base import Loop, Measure, Strategy
from innerloop.strategy._engine.constant_run import ConstantRun
from innerloop.strategy._engine.guards import Unusable, on_constants, refuse_inputs, refuse_use
from innerloop.strategy._engine.step_pullback import state_of
from innerloop.strategy._forecast import Forecast
from innerloop.strategy._outer_gradient import check_kinds

T = TypeVar("T")
Condition = Callable[[Any, Any, Any], Mapping[str, Tensor]]
"""``condition(params, hyper, batch)``, a dict like params."""
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, repr=False)
class Implicit(Strategy):
    r"""Differentiate the solution of the inner problem by the implicit function theorem.

    The loop runs without a graph. Where it ends, :math:`F(\theta, \lambda) = 0`, with the inner
    gradient for F or a condition of your own, and

    .. math::
        \frac{d\mathcal L}{d\lambda} = \frac{\partial \mathcal L}{\partial \lambda}
        - \Bigl(\frac{\partial F}{\partial \lambda}\Bigr)^{\!\top} u, \qquad
        \Bigl(\frac{\partial F}{\partial \theta}\Bigr)^{\!\top} u
        = \frac{\partial \mathcal L}{\partial \theta}

    Neither the optimizer nor the number of steps matters. The limit of a converged loop is exact:
    the hyper-gradient is off by at most L d, where d is the distance from the solution, itself at
    most :math:`\lVert F \rVert` over the smallest singular value of
    :math:`\partial F / \partial \theta`, and L is the largest slope of the hyper-gradient as a
    function of θ (Pedregosa, "Hyperparameter optimization with approximate gradient", 2016).
    `NotConvergedWarning` states :math:`\lVert F \rVert` and d, the length of a Newton step.

    **Cost**: TG in time for the loop, and memory A, whatever T is; then a solve in the forward
    pass, for d, and one in each backward pass, with about 2 G for each of their products.

    **When**: an inner problem that is solved: ridge and logistic regression, a proximal term
    (iMAML), a fixed point. **Not** for the gradient with respect to the initial parameters, which a
    solution has forgotten, nor for hyper-parameters of the optimizer, nor for early stopping: these
    raise.

    Args:
        solver: one of `innerloop.strategy.solvers`. Default: ``CG()`` for the inner gradient, whose
            derivative is symmetric; ``GMRES()`` for a condition of your own.
        residual: ``residual(params, hyper, batch)``, the optimality condition, a dict like
            ``params`` that is zero at the solution. Default: the inner gradient on the batch of the
            last step. With mini-batches that is not what the loop solves: write the gradient on all
            of the data here.
        fixed_point: ``fixed_point(params, hyper, batch)``, a map whose fixed point is the solution
            (a projected or proximal step), in place of ``residual``.
        tolerance: how far the solution may be away, relative to its length (or to that of the
            path), before `NotConvergedWarning` is given. Infinity: the check, and its solve, are
            left out.

    Example:
        Ridge regression in one dimension, (w - 3)²/2 + λ w²/2, has w = 3 / (1 + λ) and dw/dλ =
        -3 / (1 + λ)².

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: (
        ...         (params["w"] - 3) ** 2 / 2 + hyper["l2"] * params["w"] ** 2 / 2
        ...     ),
        ...     innerloop.optim.sgd(lr=0.5),
        ... )
        >>> value, grads = innerloop.metagradient(
        ...     lambda traj, hyper: traj.params["w"],
        ...     problem,
        ...     {"w": torch.tensor(0.0)},
        ...     None,
        ...     steps=50,
        ...     hyper={"l2": torch.tensor(1.0)},
        ...     wrt="hyper",
        ...     strategy=innerloop.Implicit(),
        ... )
        >>> value, grads
        (tensor(1.5000), {'l2': tensor(-0.7500)})
    """

    solver: Solver | None = None
    residual: Condition | None = None
    fixed_point: Condition | None = None
    tolerance: float = TOLERANCE

    exact = False
    differentiates: ClassVar[frozenset[str]] = frozenset({"hyper"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_solver(self.solver)
        if self.residual is not None and self.fixed_point is not None:
            raise InvalidInputError(
                "residual and fixed_point are two ways of saying the same: give one of them"
            )
        for name in ("residual", "fixed_point"):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise InvalidInputError(
                    f"{name} is {type(given).__name__}: write a function {name}(params, hyper, "
                    "batch) that returns a dict like params"
                )
        if not self.tolerance > 0:
            raise InvalidInputError(
                f"tolerance={self.tolerance!r}: write a relative distance, 1e-3 for example"
            )

    def __repr__(self) -> str:
        """Return the call that makes this strategy."""
        return f"Implicit({changed_fields(self)})"

    def run(self, loop: Loop) -> Trajectory:
        """Run the loop on constants, and make its end a function of hyper."""
        before, batch, carry, states, rows = ConstantRun.of(loop)
        steps = len(rows)
        if not steps:
            raise InvalidInputError(
                "Implicit() differentiates where a loop ends, and this one has no steps: its start "
                "is no solution. For parameters that are solved already write "
                "innerloop.implicit_root(residual, solution, hyper)"
            )
        inputs = [*tree.tensors(state_of(loop.start)), *tree.tensors(loop.hyper)]
        for t, state in states.items():
            states[t] = refuse_use(state, inputs, _PATH.format(what=f"the state at time {t}"))
        states[steps] = refuse_use(
            carry, inputs, _PATH.format(what="the optimizer's state, or a buffer,")
        )._replace(params=self._solution(loop, before, carry.params, batch, steps))
        losses, aux = refuse_use(rows.stacked(), inputs, _PATH.format(what="traj.losses or aux"))
        told = losses.refuse if isinstance(losses, Unusable) else losses
        return Trajectory({**states, 0: loop.start}, told, aux, steps)

    def _solution(
        self, loop: Loop, before: Carry, params: dict[str, Tensor], batch: object, steps: int
    ) -> dict[str, Tensor]:
        """Return the last parameters as a function of hyper.

        The equation is that of the last step: its batch, its buffers and its random numbers, so
        that dropout draws the same masks at every evaluation.
        """
        own = self.residual is not None or self.fixed_point is not None
        condition = self._own if own else partial(_inner_gradient, loop.problem)

        def residual(
            params: Params, hyper: HyperTree, batch: object, buffers: Params
        ) -> Mapping[str, Tensor]:
            with at_random_state(before.random_state):
                return condition(params, hyper, batch, buffers)

        found = _root(
            residual,
            params,
            (loop.hyper, batch, before.buffers),
            self._solver(),
            self.tolerance,
            start=loop.start.detach().params,
            symmetric=not own and _is_gradient(loop.problem, params),
        )
        found = refuse_inputs(found, tree.tensors(state_of(loop.start)), _START)
        read = [loop.problem.overrides(loop.hyper, loop.time(t)) for t in sorted({0, steps - 1})]
        return refuse_inputs(found, tree.tensors(read), _OPTIMIZER)

    def _solver(self) -> Solver:
        if self.solver is not None:
            return self.solver
        return CG() if self.residual is None and self.fixed_point is None else GMRES()

    def _own(
        self, params: Params, hyper: HyperTree, batch: object, buffers: Params
    ) -> Mapping[str, Tensor]:
        """Evaluate the user's condition as a residual."""
        with replacing():
            if self.residual is not None:
                return self.residual(params, hyper, batch)
            assert self.fixed_point is not None
            moved = self.fixed_point(params, hyper, batch)
        _check_like(moved, params, "fixed_point(params, hyper, batch)")
        return {name: p - moved[name] for name, p in params.items()}

    def forecast(self, measure: Measure) -> Forecast:
        """Predict the most that the loop may cost: every iteration that the solver may take."""
        plain = measure.plain()
        size = sum(p.numel() for p in measure.loop.start.params.values())
        products = 2 * self._solver().limit(size) + 4
        memory = measure(self, frozenset()).bytes.at(1)
        return Forecast(plain.seconds.at(measure.steps) + 2 * products * plain.seconds.each, memory)


def implicit_root(
    residual: Callable[..., Any],
    solution: T,
    *args: Any,
    solver: Solver | None = None,
    tolerance: float = TOLERANCE,
) -> T:
    r"""Return ``solution`` as the function of ``args`` that ``residual(solution, *args)`` defines.

    Found by whatever means, a solution is differentiated by the implicit function theorem: with
    :math:`A = \partial F / \partial x`,

    .. math:: \frac{dx}{da} = -A^{-1} \frac{\partial F}{\partial a}

    Derivatives of every order are right, in reverse mode, under ``torch.func.vmap`` and ``jvp``.

    Args:
        residual: ``residual(solution, *args)``, a pytree like ``solution``; as many equations as
            unknowns. A function of its arguments: a tensor that requires grad and that it captures
            raises.
        solution: a pytree of tensors, of which those of floating point are the unknowns. They are
            constants: the solution has forgotten where its search began, so asking for a gradient
            with respect to what it was computed from raises.
        args: pytrees of tensors that the residual depends on.
        solver: one of `innerloop.strategy.solvers`; default ``GMRES()``, which takes every
            invertible matrix. ``CG()`` is for the gradient of a convex function.
        tolerance: how far the solution may be away, relative to its length, before
            `NotConvergedWarning` states the residual and the distance (see `Implicit`). Infinity:
            the check, and its solve, are left out.

    Returns:
        A pytree like ``solution``, with the same values.

    Raises:
        InvalidInputError: ``residual`` does not return a pytree like ``solution``.
        CapturedTensorError: see ``residual``.
        NonFiniteError: the residual is NaN or infinite.
        SolverError: the linear system is singular, of a kind that the solver does not take, or was
            not solved.

    Cost:
        A residual and a solve, then a solve in each backward pass; each product of a solve is a
        backward pass through the residual.

    Example:
        a x³ - x - 2 = 0 has a root near 1.165 for a = 2; its slope there is -x³ / (3 a x² - 1).

        >>> import torch, innerloop
        >>> a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        >>> x = torch.tensor(1.1653730430624147, dtype=torch.float64)
        >>> x = innerloop.implicit_root(lambda x, a: a * x**3 - x - 2, x, a)
        >>> (slope,) = torch.autograd.grad(x, a, create_graph=True)
        >>> slope.item(), (-(x**3) / (3 * a * x**2 - 1)).item()
        (-0.2213991..., -0.2213991...)
        >>> round(torch.autograd.grad(slope, a)[0].item(), 6)
        0.156479
    """
    if not callable(residual):
        raise InvalidInputError(
            f"residual is {type(residual).__name__}: write a function residual(solution, *args)"
        )
    _check_solver(solver)
    check_kinds({"solution": solution, **{f"args[{i}]": a for i, a in enumerate(args)}})

    def replaced(solution: Any, *args: Any) -> Any:
        with replacing():
            return residual(solution, *args)

    constants = tree.map_tensors(Tensor.detach, solution)
    found = _root(replaced, constants, args, solver or GMRES(), tolerance, symmetric=False)
    return refuse_inputs(found, tree.tensors(solution), _SEARCH)


def _root(
    residual: Callable[..., Any],
    solution: T,
    args: tuple[Any, ...],
    solver: Solver,
    tolerance: float,
    *,
    symmetric: bool,
    start: object = None,
) -> T:
    """Return a solution, given as constants, as a node of the graph."""
    leaves = tree.leaves(solution)
    places = [i for i, leaf in enumerate(leaves) if tree.differentiable(leaf)]
    if not places:
        raise InvalidInputError(
            "solution holds no floating-point tensor, so nothing in it can be differentiated: "
            "write torch.tensor(1.0), or a pytree of such tensors"
        )
    tensors, rest = tree.split(args)
    if mode() is Mode.COMPILING:
        raise InvalidInputError(
            "implicit differentiation cannot stand inside of compiled code (a solver looks at its "
            "numbers): compile the residual, or leave torch.compile away"
        )
    if not _is_differentiated(tensors):
        return solution

    def of_leaves(x: Values, a: Values) -> Values:
        filled = tree.with_leaves(solution, tree.put(leaves, places, x))
        found = residual(filled, *tree.join(rest, a))
        _check_like(found, solution, "the residual")
        ordered = tree.leaves(_in_order(found, solution))
        return [_dense(ordered[i]) for i in places]

    x, constants = [leaves[i] for i in places], [t.detach() for t in tensors]
    equation = Residual(of_leaves, solver, len(places), symmetric=symmetric)
    rest_of_it = on_constants(0, lambda: of_leaves(x, constants), _captured)
    _check_converged(equation, x, constants, rest_of_it, tolerance, start)
    return tree.with_leaves(solution, tree.put(leaves, places, node(equation, [*x, *tensors])))


def _is_differentiated(tensors: list[Tensor]) -> bool:
    """True if something asks for a derivative by one of ``tensors``; raise if it cannot be had."""
    running = mode() is Mode.TRANSFORMED
    if not running and not torch.is_grad_enabled():
        return False
    if not any(tree.differentiable(t) and torch_private.has_derivative(t) for t in tensors):
        return False
    if torch_private.inside_dual_level():
        raise NotDifferentiableError(
            "dual numbers of torch.autograd.forward_ad do not reach through an implicit solution: "
            "write torch.func.jvp"
        )
    if torch_private.jvp_levels() > 1:
        raise NotDifferentiableError(
            "torch.func.jvp of torch.func.jvp does not reach through an implicit solution (PyTorch "
            "drops the outer derivative): write torch.func.hessian, or jacrev of jacrev"
        )
    return True


def _check_converged(
    equation: Equation,
    x: Values,
    a: Values,
    residual: Values,
    tolerance: float,
    start: object,
) -> None:
    """Warn if the solution is not one."""
    flat = Flat(x)
    # A task that is further away than the rest counts for all of them.
    size = torch_private.innermost(norm(flat.vector(residual))).max().item()
    if not size < float("inf"):
        raise NonFiniteError(
            f"the residual at the solution is {size}: look at what it computes there"
        )
    if size == 0 or tolerance == float("inf"):
        return
    away, why = float("nan"), ""
    scale = norm(flat.vector(x))
    if start is not None:
        before = [p for p in tree.leaves(start) if tree.differentiable(p)]
        moved = norm(flat.vector([p - q for p, q in zip(x, before, strict=True)]))
        scale = torch.maximum(scale, moved)
    allowed = tolerance * scale + torch.finfo(scale.dtype).eps ** 0.5
    try:
        distance = norm(flat.vector(solved(equation, x, a, residual, transposed=False)))
    except SolverError as error:
        why = f" (it is not known, because the Newton step failed: {error})"
    else:
        if torch_private.innermost(distance <= allowed).all():
            return
        away = torch_private.innermost(distance).max().item()
    warn_user(
        f"differentiated implicitly, but not solved: the residual has norm {size:.1e}, and the "
        f"solution is d = {away:.1e} away, the length of a Newton step{why}. The hyper-gradient is "
        "off by at most L d, with L its largest slope as a function of the solution. Take more "
        "steps; put weight decay into the loss, not the optimizer; with mini-batches give "
        "residual= on all of the data; or differentiate the loop as it ran, "
        "strategy=innerloop.Checkpointed()",
        NotConvergedWarning,
    )


def _inner_gradient(
    problem: Problem, params: Params, hyper: HyperTree, batch: object, buffers: Params
) -> Mapping[str, Tensor]:
    return problem.gradient(params, buffers, hyper, batch)[0]


def _is_gradient(problem: Problem, params: Params) -> bool:
    """True if `Problem.gradient` is the gradient of a function of params, and nothing else."""
    return problem.targets is None and not problem.parameter_hooks(params)


def _dense(x: Tensor) -> Tensor:
    return x.to_dense() if x.layout is not torch.strided else x


def _check_solver(solver: object) -> None:
    if solver is not None and not isinstance(solver, Solver):
        kind = solver.__name__ if isinstance(solver, type) else repr(solver)
        raise InvalidInputError(
            f"solver is {kind}, not a solver: write an instance, innerloop.strategy.solvers.CG()"
        )


def _check_like(found: object, like: object, what: str) -> None:
    """Raise unless ``found`` is a pytree with the shapes of ``like``."""
    theirs = {path: tuple(x.shape) for path, x in tree.named_tensors(found, "result")}
    ours = {path: tuple(x.shape) for path, x in tree.named_tensors(like, "result")}
    if theirs != ours:
        raise InvalidInputError(
            f"{what} must return a pytree like the solution, as many equations as unknowns: the "
            f"solution has {_shapes(ours)}, it returned {_shapes(theirs)}"
        )


def _shapes(named: Mapping[str, tuple[int, ...]]) -> str:
    parts = [f"{path.removeprefix('result') or 'a tensor'} {s}" for path, s in named.items()]
    return ", ".join(parts) or "no tensor"


def _in_order(found: Any, like: object) -> Any:
    """Return ``found`` with the entries of its dicts in the order of ``like``."""
    if isinstance(like, dict):
        return {key: _in_order(found[key], value) for key, value in like.items()}
    if isinstance(like, (list, tuple)):
        return [_in_order(x, y) for x, y in zip(found, like, strict=True)]
    return found


def _captured() -> CapturedTensorError:
    return CapturedTensorError(
        "the residual uses a tensor that requires grad and is captured by it, not one of its "
        "arguments: it would silently get no gradient. Hand it in, "
        "implicit_root(residual, solution, tensor), or through hyper; or detach it if it is a "
        "constant"
    )


_START = (
    "Implicit() does not differentiate with respect to params: a solution does not depend on where "
    "the search for it began, and where several solutions exist, that dependence has no "
    "derivative. Write strategy=innerloop.Checkpointed(), which differentiates the loop itself, "
    "or detach params"
)
_SEARCH = (
    "the solution that was given to implicit_root is a constant: the root depends on args alone, "
    "not on where its search began. Compute it under torch.no_grad(), or write solution.detach(); "
    "to differentiate the search itself use innerloop.unroll"
)
_OPTIMIZER = (
    "Implicit() does not differentiate hyper-parameters of the optimizer: they change the path, "
    "and the solution depends on them only as far as it was not reached (weight decay belongs in "
    "the inner loss). Give them as numbers, innerloop.optim.sgd(lr=0.1), or write "
    "strategy=innerloop.Checkpointed()"
)
_PATH = (
    "Implicit() differentiates the parameters at the end of the loop; {what} is a part of the "
    "path and counts as a constant. Compute what you need from traj.params, or write "
    "strategy=innerloop.Checkpointed()"
)
