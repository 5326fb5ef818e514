"""L-BFGS: quasi-Newton steps from the last few gradient differences (Liu & Nocedal 1989)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from innerloop._types import Grads, Hyper, Params, Scalar, ValueAndGrad
from innerloop._utils import torch_private, tree
from innerloop.errors import InvalidInputError
from innerloop.optim._base import Rule
from innerloop.optim._engine.grads import which_have_gradient
from innerloop.optim._engine.precision import warn_of_half
from innerloop.optim._engine.strong_wolfe import Trial, number, smaller, strong_wolfe
from innerloop.optim._from_torch.layout import TorchLayout
from innerloop.optim._settings import check_nonnegative, require

Flat = Float[Tensor, " n"]
# A pair (s, y) is kept if yᵀs is larger: then the inverse Hessian stays positive definite.
_CURVED = 1e-10


class LBFGSState(NamedTuple):
    """Iterations taken, evaluations of the loss, and what the last iteration left.

    The fields are named as in ``torch.optim``.

    All vectors are flat: the parameters in their order, one behind the other.
    """

    count: Any
    func_evals: int
    d: Any
    t: Any
    old_dirs: tuple[Any, ...]
    old_stps: tuple[Any, ...]
    ro: tuple[Any, ...]
    H_diag: Any
    prev_flat_grad: Any
    prev_loss: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LBFGS(Rule):
    r"""Limited-memory BFGS: several quasi-Newton iterations a step, each evaluating the loss.

    .. math::
        d_k = -H_k g_k, \qquad \theta_{k+1} = \theta_k + t_k d_k, \qquad
        s_k = t_k d_k, \qquad y_k = g_{k+1} - g_k,

    where :math:`H_k` is :math:`\frac{y^\top s}{y^\top y} I` (the newest pair), updated by the last
    ``history_size`` pairs
    :math:`(s_i, y_i)` with :math:`y_i^\top s_i > 10^{-10}` as in BFGS; :math:`H_k g_k` takes two
    loops over the pairs (Liu & Nocedal,
    "On the limited memory BFGS method for large scale optimization", 1989). :math:`t_k` is the
    learning rate (at the very first iteration :math:`\eta \min(1, 1 / \lVert g \rVert_1)`), or with
    ``"strong_wolfe"`` what a line search from there finds.

    **Derivative**: that of the iterations that were taken. Directions, pairs, and the step lengths
    of the line search (minima of cubic polynomials through values and slopes) are differentiated;
    how many iterations and evaluations there are, which pairs are kept, and which branch the line
    search takes are constants, as a step function's value is. Where a decision flips, the result as
    a function of the inputs jumps (or bends), and has no derivative. It jumps least where
    ``tolerance_change`` stops the iteration near a minimum: by about that tolerance.

    The rule evaluates the loss itself (``needs_closure``): `innerloop.unroll` takes it with
    `StoreAll`, `ForwardMode`, `Truncated` and ``Checkpointed(product="reverse", save="params")``,
    `innerloop.track` with ``loop.step(closure)``. It decides by values, so ``torch.compile`` and
    ``torch.func.vmap`` over tasks are refused. One learning rate for all parameters; a gradient
    that is None counts as zero, as in ``torch.optim``.

    Args:
        lr: :math:`\eta`.
        max_iter: the largest number of iterations a step.
        max_eval: the largest number of evaluations a step, 5/4 of ``max_iter`` if None.
        tolerance_grad: stop when no entry of the gradient is larger.
        tolerance_change: stop when loss, parameters or slope along the direction change by less.
        history_size: how many pairs are kept.
        line_search_fn: None or "strong_wolfe" (Nocedal & Wright, "Numerical optimization", 2006,
            algorithms 3.5 and 3.6).

    Cost:
        One gradient for each evaluation, and the memory of ``2 history_size`` gradients, for every
        step of a loop that is stored.

    Example:
        On a quadratic loss an exact minimum is found from anywhere: the result does not depend on
        the start.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: (params["w"] - hyper) ** 2,
        ...     innerloop.optim.lbfgs(line_search_fn="strong_wolfe"),
        ... )
        >>> w, target = torch.tensor([2.0, 3.7], dtype=torch.float64).requires_grad_().unbind()
        >>> traj = innerloop.unroll(problem, {"w": w}, None, steps=1, hyper=target)
        >>> found = torch.autograd.grad(traj.params["w"], (w, target))
        >>> print(f"{traj.params['w']:.4f}, {abs(found[0]):.4f}, {found[1]:.4f}")
        3.7000, 0.0000, 1.0000
    """

    lr: Hyper = 1
    max_iter: int = 20
    max_eval: int | None = None
    tolerance_grad: float = 1e-7
    tolerance_change: float = 1e-9
    history_size: int = 100
    line_search_fn: str | None = None

    hyper_names: ClassVar = ("lr",)
    state_type: ClassVar = LBFGSState
    torch_layout: ClassVar = TorchLayout(
        torch.optim.LBFGS,
        {name: name for name in LBFGSState._fields[1:]},
        count="n_iter",
        shared=True,
    )

    compiles = False
    needs_closure = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_eval is None:
            object.__setattr__(self, "max_eval", self.max_iter * 5 // 4)
        require(
            self.line_search_fn in (None, "strong_wolfe"),
            f"line_search_fn={self.line_search_fn!r}: write None or 'strong_wolfe'",
        )
        require(
            self.history_size >= 1,
            f"history_size={self.history_size}: torch.optim.LBFGS fails below 1 as well",
        )
        searched = self.line_search_fn is None or self.max_iter < 1 or self.evaluations >= 1
        require(
            searched, f"max_eval={self.max_eval}: a line search evaluates the loss at least once"
        )
        self.validate(self.resolve(None))

    @property
    def evaluations(self) -> int:
        """Return ``max_eval`` as a number."""
        assert self.max_eval is not None
        return self.max_eval

    def validate(self, hyper: Mapping[str, Any]) -> None:
        lr = hyper["lr"]
        one = isinstance(lr, (int, float)) or (isinstance(lr, Tensor) and lr.numel() == 1)
        if not one:
            given = (
                f"of shape {tuple(lr.shape)}"
                if isinstance(lr, Tensor)
                else f"given as {type(lr).__name__}"
            )
            raise InvalidInputError(
                f"lr is {given}: all parameters move along one direction, write a number or a "
                "0-dim tensor"
            )
        check_nonnegative(hyper, "lr")
        searched = self.line_search_fn is None or isinstance(lr, Tensor) or lr > 0
        require(searched, "lr=0: the line search starts at the step length lr, write lr=1")

    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        return self.slots()

    def restored(self, slot: str, named: Mapping[str, Any], params: Params) -> Any:
        (value,) = named.values()
        own = tree.map_tensors(lambda x: x.detach().clone(), value)
        return tuple(own) if isinstance(own, list) else own

    def init(self, params: Params) -> LBFGSState:
        return LBFGSState(0, 0, None, None, (), (), (), 1, None, None)

    def update(
        self,
        grads: Grads,
        state: LBFGSState,
        params: Params,
        hyper: Mapping[str, Any] | None = None,
        value_and_grad: ValueAndGrad | None = None,
    ) -> tuple[dict[str, Tensor], LBFGSState]:
        """Take up to ``max_iter`` iterations; ``grads`` is the gradient at ``params``.

        See `Optimizer.update`.
        """
        if value_and_grad is None:
            raise InvalidInputError(
                f"{self!r} evaluates the loss several times a step: write it with "
                "innerloop.Problem, or with loop.step(closure) in "
                "innerloop.track; update() itself takes value_and_grad=, a function params -> "
                "(loss, grads)"
            )
        lr = self.resolve(hyper)["lr"]
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
        which_have_gradient(grads, params)
        gradient = flat(grads, params)
        if state.prev_flat_grad is not None and state.prev_flat_grad.shape != gradient.shape:
            raise InvalidInputError(
                f"the state is that of {state.prev_flat_grad.numel()} numbers, the parameters "
                f"have {gradient.numel()}: it belongs to other "
                "parameters"
            )
        if self._is_flat(gradient):
            return dict(params), state._replace(func_evals=state.func_evals + 1)
        new_params, new_state = self._iterate(gradient, state, params, lr, value_and_grad)
        for p in new_params.values():
            warn_of_half(p)
        return new_params, new_state

    def _iterate(
        self,
        gradient: Flat,
        state: LBFGSState,
        params: Params,
        lr: Scalar,
        value_and_grad: ValueAndGrad,
    ) -> tuple[dict[str, Tensor], LBFGSState]:
        """Return ``(new_params, new_state)``."""

        def evaluate(x: Params) -> tuple[Tensor, Flat]:
            loss, grads = value_and_grad(x)
            return loss, flat(grads, x)

        x, (loss, _) = dict(params), value_and_grad(params)
        evaluated = 1
        for k in range(1, self.max_iter + 1):
            state = _next_direction(state, gradient, self.history_size)
            before = number(loss)
            first = smaller(1.0, 1.0 / gradient.abs().sum()) if state.count == 1 else 1
            state = state._replace(
                t=first * lr if state.count == 1 else lr, prev_flat_grad=gradient, prev_loss=before
            )
            slope = gradient.dot(state.d)
            if number(slope) > -self.tolerance_change:
                break
            last = k == self.max_iter
            if self.line_search_fn is not None:
                start = Trial(0, loss, gradient, slope)
                x, found, used = _searched(evaluate, x, state, start, self.evaluations - evaluated)
                loss, gradient, state = found.f, found.g, state._replace(t=found.t)
            else:
                x, used = moved(x, state.t, state.d), 0
                if not last:
                    (loss, gradient), used = evaluate(x), 1
            evaluated += used
            if last or evaluated >= self.evaluations or self._is_flat(gradient):
                break
            if (
                largest(state.d * state.t) <= self.tolerance_change
                or abs(number(loss) - before) < self.tolerance_change
            ):
                break
        return x, state._replace(func_evals=state.func_evals + evaluated)

    def _is_flat(self, gradient: Flat) -> bool:
        return largest(gradient) <= self.tolerance_grad


lbfgs = LBFGS


def _searched(
    evaluate: Callable[..., Any], x: Params, state: LBFGSState, start: Trial, budget: int
) -> tuple[Any, Trial, int]:
    """Search along the state's direction; return ``(new_params, trial, evaluations)``."""

    def at(t: Scalar) -> Trial:
        f, g = evaluate(moved(x, t, state.d))
        return Trial(t, f, g, g.dot(state.d))

    found, used = strong_wolfe(at, start, state.t, budget, largest(state.d))
    return moved(x, found.t, state.d), found, used


def _next_direction(state: LBFGSState, gradient: Flat, history_size: int) -> LBFGSState:
    """Return the state at the start of an iteration: perhaps one more pair, a new direction."""
    if state.count == 0:
        return state._replace(count=1, d=-gradient, old_dirs=(), old_stps=(), ro=(), H_diag=1)
    y, s = gradient - state.prev_flat_grad, state.d * state.t
    ys = y.dot(s)
    if number(ys) > _CURVED:
        pairs = ((*state.old_dirs, y), (*state.old_stps, s), (*state.ro, 1.0 / ys))
        dirs, steps, ro = (kept[-history_size:] for kept in pairs)
        state = state._replace(old_dirs=dirs, old_stps=steps, ro=ro, H_diag=ys / y.dot(y))
    return state._replace(count=state.count + 1, d=_minus_inverse_hessian(state, gradient))


def _minus_inverse_hessian(state: LBFGSState, gradient: Flat) -> Flat:
    """Compute -H g by the two loops over the pairs, from the newest to the oldest and back."""
    pairs = list(zip(state.old_dirs, state.old_stps, state.ro, strict=True))
    q, alphas = -gradient, []
    for y, s, rho in reversed(pairs):
        alphas.append(s.dot(q) * rho)
        q = _plus(q, y, -alphas[-1])
    r = q * state.H_diag
    for (y, s, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        r = _plus(r, s, alpha - y.dot(r) * rho)
    return r


def flat(grads: Grads, params: Params) -> Flat:
    """Join all gradients to one vector.

    A gradient that is None is zero; a complex one has its real and imaginary parts side by side.
    """
    return torch.cat(
        [
            _real(torch.zeros_like(p) if (g := grads.get(n)) is None else g)
            for n, p in params.items()
        ]
    )


def _real(g: Tensor) -> Flat:
    g = g.to_dense() if g.layout != torch.strided else g
    return (torch.view_as_real(g.resolve_conj()) if g.is_complex() else g).reshape(-1)


def moved(params: Params, t: Scalar, d: Flat) -> dict[str, Tensor]:
    """Compute θ + t d."""
    pieces = d.split([p.numel() * (2 if p.is_complex() else 1) for p in params.values()])
    return {
        n: _plus(p, _like(piece, p), t).to(p.dtype)
        for (n, p), piece in zip(params.items(), pieces, strict=True)
    }


def _plus(x: Tensor, y: Tensor, a: Scalar) -> Tensor:
    """Compute x + a y by the kernel of ``torch.optim``: a line search magnifies the last bit.

    The derivative in a is that of a term 0.
    """
    total = torch.add(x, y, alpha=number(a))
    return (
        total + (a - a.detach()) * y
        if isinstance(a, Tensor) and torch_private.has_derivative(a)
        else total
    )


def _like(piece: Flat, p: Tensor) -> Tensor:
    return (
        torch.view_as_complex(piece.reshape(*p.shape, 2))
        if p.is_complex()
        else piece.reshape(p.shape)
    )


def largest(x: Flat) -> float:
    """Return the largest absolute value, for a decision; of nothing, 0."""
    return number(x.abs().max()) if x.numel() else 0.0
