"""The derivative of a solution that is given: time of ours over that of JAXopt and Optimistix.

Each library is handed the solution, so that only implicit differentiation is timed: the linear
system and the products around it. JAX is compiled. A library whose derivative differs from the
closed form is shown with its error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.spread import Spread

TOLERANCE = 1e-10
OURS = "innerloop"
PEERS = ("JAXopt", "Optimistix")


class Case(NamedTuple):
    """A solution to differentiate.

    Attributes:
        title: what it is.
        closed: the derivative in closed form.
        runs: library -> a function that returns the derivative.
    """

    title: str
    closed: Tensor
    runs: dict[str, Callable[[], Any]]


class Derivative(NamedTuple):
    """What one case has cost.

    Attributes:
        title: what it is.
        seconds: ours.
        ratios: time of ours over that of each peer, round by round.
        errors: library -> relative error of its derivative.
    """

    title: str
    seconds: float
    ratios: dict[str, Spread]
    errors: dict[str, float]


def measure(repeats: int | None = None, clock: str = "wall") -> list[Derivative]:
    with _double_precision_in_jax():
        cases = [_roots(()), _roots((1000,)), _ridge(500, 100), _ridge(2000, 1000)]
        return [_measure(case, repeats or 30, clock) for case in cases]


def _measure(case: Case, repeats: int, clock: str) -> Derivative:
    errors = {name: _error(run(), case.closed) for name, run in case.runs.items()}
    times = timing.interleave(case.runs, repeats, clock=clock)
    ratios = {
        name: Spread.of_ratios(times[OURS], seconds)
        for name, seconds in times.items()
        if name != OURS
    }
    return Derivative(case.title, Spread.of(times[OURS]).median, ratios, errors)


def _error(found: Any, closed: Tensor) -> float:
    import numpy as np

    ours = found if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
    return ((ours - closed).abs().max() / closed.abs().max()).item()


@contextlib.contextmanager
def _double_precision_in_jax() -> Iterator[None]:
    if importlib.util.find_spec("jax") is None:
        yield
        return
    import jax

    before = bool(jax.numpy.zeros(0, dtype=float).dtype == "float64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _roots(shape: tuple[int, ...]) -> Case:
    """a x³ - x - 2 = 0, for one a or for many at once."""
    from innerloop import implicit_root

    a = torch.linspace(2.0, 3.0, shape[0] if shape else 1, dtype=torch.float64).reshape(shape)
    x = torch.full_like(a, 1.5)
    for _ in range(50):
        x = x - (a * x**3 - x - 2) / (3 * a * x**2 - 1)
    closed = -(x**3) / (3 * a * x**2 - 1)

    def residual(x: Any, a: Any) -> Any:
        return a * x**3 - x - 2

    def root(a: Tensor, x: Tensor) -> Tensor:
        return implicit_root(residual, x, a, tolerance=float("inf"))

    def ours() -> Tensor:
        leaf = a.clone().requires_grad_()
        found = torch.func.vmap(root)(leaf, x) if shape else root(leaf, x)
        return torch.autograd.grad(found.sum(), leaf)[0]

    runs: dict[str, Callable[[], Any]] = {OURS: ours}
    peers = _peers_of_roots(residual, bool(shape))
    given = _to_jax(a, x) if peers else ()
    runs |= {name: functools.partial(_blocked, run, *given) for name, run in peers.items()}
    return Case(f"{shape[0]:,} roots by vmap" if shape else "one root", closed, runs)


def _peers_of_roots(residual: Callable[..., Any], batched: bool) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}

    def derivative(of: Callable[..., Any]) -> Callable[..., Any]:
        import jax

        grad = jax.grad(of)
        return jax.jit(jax.vmap(grad) if batched else grad)

    if importlib.util.find_spec("jaxopt") is not None:
        from jaxopt import implicit_diff, linear_solve

        solve = functools.partial(linear_solve.solve_gmres, tol=TOLERANCE)
        solved = implicit_diff.custom_root(residual, solve=solve)(lambda x, a: x)
        found["JAXopt"] = derivative(lambda a, x: solved(x, a))
    if importlib.util.find_spec("optimistix") is not None:
        import lineax
        import optimistix

        adjoint = optimistix.ImplicitAdjoint(lineax.GMRES(TOLERANCE, TOLERANCE))
        newton = optimistix.Newton(rtol=1e-3, atol=1e-3)
        found["Optimistix"] = derivative(
            lambda a, x: optimistix.root_find(residual, newton, x, args=a, adjoint=adjoint).value
        )
    return found


def _ridge(rows: int, columns: int) -> Case:
    """The derivative of a validation loss by the logarithm of the decay."""
    from innerloop import implicit_root
    from innerloop.strategy import solvers

    generator = torch.Generator().manual_seed(0)
    x, x_val = (
        torch.randn(n, columns, dtype=torch.float64, generator=generator) for n in (rows, 100)
    )
    y, y_val = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (rows, 100))
    decay = torch.tensor(5.0, dtype=torch.float64)
    hessian = x.T @ x + decay.exp() * torch.eye(columns, dtype=torch.float64)
    w = torch.linalg.solve(hessian, x.T @ y)
    outer = x_val.T @ (x_val @ w - y_val)
    closed = -decay.exp() * outer @ torch.linalg.solve(hessian, w)

    def residual(w: Any, decay: Any, x: Any, y: Any) -> Any:
        return x.T @ (x @ w - y) + _exp(decay) * w

    solver = solvers.CG(tolerance=TOLERANCE)

    def ours() -> Tensor:
        leaf = decay.clone().requires_grad_()
        found = implicit_root(residual, w, leaf, x, y, solver=solver, tolerance=float("inf"))
        return torch.autograd.grad((x_val @ found - y_val).square().sum() / 2, leaf)[0]

    runs: dict[str, Callable[[], Any]] = {OURS: ours}
    peers = _peers_of_ridge(residual)
    given = _to_jax(decay, w, x, y, x_val, y_val) if peers else ()
    runs |= {name: functools.partial(_blocked, run, *given) for name, run in peers.items()}
    return Case(f"ridge regression, {rows:,} x {columns:,}", closed, runs)


def _peers_of_ridge(residual: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}

    def derivative(solution: Callable[..., Any]) -> Callable[..., Any]:
        import jax

        def outer(decay: Any, w: Any, x: Any, y: Any, x_val: Any, y_val: Any) -> Any:
            return ((x_val @ solution(w, decay, x, y) - y_val) ** 2).sum() / 2

        return jax.jit(jax.grad(outer))

    if importlib.util.find_spec("jaxopt") is not None:
        from jaxopt import implicit_diff, linear_solve

        solve = functools.partial(linear_solve.solve_cg, tol=TOLERANCE)
        solved = implicit_diff.custom_root(residual, solve=solve)(lambda w, *args: w)
        found["JAXopt"] = derivative(solved)
    if importlib.util.find_spec("optimistix") is not None:
        import lineax
        import optimistix

        adjoint = optimistix.ImplicitAdjoint(lineax.CG(TOLERANCE, TOLERANCE))
        # One step of a search that is at its end already.
        search = optimistix.FixedPointIteration(rtol=1e-3, atol=1e-3)

        def fixed(w: Any, args: Any) -> Any:
            return w - residual(w, *args)

        def by_optimistix(w: Any, *args: Any) -> Any:
            return optimistix.fixed_point(
                fixed, search, w, args=args, adjoint=adjoint, max_steps=3, throw=False,
                tags=frozenset({lineax.negative_semidefinite_tag}),
            ).value  # fmt: skip

        found["Optimistix"] = derivative(by_optimistix)
    return found


def _exp(x: Any) -> Any:
    """Return the exponential of a tensor of torch or of JAX."""
    if isinstance(x, Tensor):
        return x.exp()
    import jax

    return jax.numpy.exp(x)


def _to_jax(*tensors: Tensor) -> tuple[Any, ...]:
    import jax

    return tuple(jax.numpy.asarray(t.numpy()) for t in tensors)


def _blocked(run: Callable[..., Any], *args: Any) -> Any:
    return run(*args).block_until_ready()
