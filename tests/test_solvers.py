"""Solvers of linear systems: equal to LAPACK, alone and under ``vmap``, or an error that says why
not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop
from innerloop.errors import (
    IndefiniteSystemError,
    InvalidInputError,
    SingularSystemError,
    SolverError,
    SolverNotConvergedError,
)
from innerloop.strategy import solvers
from tests.oracles import smooth_noise

pytestmark = pytest.mark.usefixtures("float64")

N = 12


def symmetric(size: int = N, shift: float = 0.2, phase: float = 0.0) -> Tensor:
    """A matrix with eigenvalues between ``shift`` and ``1 + shift``."""
    basis, _ = torch.linalg.qr(smooth_noise(size, size, phase=3.0 + phase))
    return basis @ torch.diag(torch.linspace(shift, 1 + shift, size)) @ basis.T


def general(size: int = N, phase: float = 0.0) -> Tensor:
    """A matrix that is not symmetric, a contraction away from 1."""
    noise = smooth_noise(size, size, phase=7.0 + phase)
    return torch.eye(size) - 0.7 * noise / torch.linalg.matrix_norm(noise, 2)


SYMMETRIC = (
    solvers.CG(),
    solvers.NormalCG(),
    solvers.GMRES(),
    solvers.GMRES(restart=4, max_iterations=400),
    solvers.Neumann(step=1.4),
    solvers.FixedPoint(),
    solvers.FixedPoint(memory=0),
    solvers.Dense(),
)
GENERAL = (
    solvers.NormalCG(),
    solvers.GMRES(),
    solvers.GMRES(restart=5, max_iterations=400),
    solvers.Neumann(),
    solvers.FixedPoint(),
    solvers.Dense(),
)
each_symmetric = pytest.mark.parametrize("solver", SYMMETRIC, ids=repr)
each_general = pytest.mark.parametrize("solver", GENERAL, ids=repr)
each_kind = pytest.mark.parametrize(
    "solver", [s for s in SYMMETRIC if "(4" not in repr(s) and "0)" not in repr(s)], ids=repr
)


def assert_near(ours: Tensor, truth: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        ours, truth, rtol=tolerance, atol=tolerance * truth.abs().max().item()
    )


# -- right -----------------------------------------------------------------------------------------


@each_symmetric
def test_symmetric_systems(solver: solvers.Solver) -> None:
    matrix, b = symmetric(), smooth_noise(N, phase=1.0)
    solved = solver(lambda v: matrix @ v, b)
    assert_near(solved.value, torch.linalg.solve(matrix, b))
    assert solved.residual <= 1.2e-11
    truth = (b - matrix @ solved.value).norm() / b.norm()
    # Two ways of rounding a difference of numbers of size 1.
    torch.testing.assert_close(solved.residual, truth, rtol=0, atol=1e-15)
    assert solved.iterations >= 1


@each_general
def test_general_systems(solver: solvers.Solver) -> None:
    matrix, b = general(), smooth_noise(N, phase=1.0)
    assert_near(solver(lambda v: matrix @ v, b).value, torch.linalg.solve(matrix, b))


@each_kind
def test_each_task_of_vmap_is_solved_as_if_it_were_alone(solver: solvers.Solver) -> None:
    """Tasks that need different numbers of iterations, one of them none."""
    matrices = torch.stack([symmetric(shift=s, phase=s) for s in (0.1, 0.4, 0.2)])
    vectors = torch.stack([smooth_noise(N), torch.zeros(N), smooth_noise(N, phase=2.0)])
    together = torch.func.vmap(lambda m, b: solver(lambda v: m @ v, b))(matrices, vectors)
    for i in range(3):
        assert_near(together.value[i], torch.linalg.solve(matrices[i], vectors[i]))
        alone = solver(partial(torch.mv, matrices[i]), vectors[i])
        assert abs(int(together.iterations[i]) - int(alone.iterations)) <= 2
    if "Dense" not in repr(solver):
        assert together.iterations[1] == 0


@each_kind
def test_unknowns_are_a_pytree(solver: solvers.Solver) -> None:
    """0-dim, empty, a matrix, complex numbers; a number is passed by."""
    b = {
        "scalar": torch.tensor(2.0),
        "rest": [smooth_noise(2, 3), torch.zeros(0, 2), 7],
        "complex": torch.complex(smooth_noise(2, phase=1.0), smooth_noise(2, phase=2.0)),
    }

    def operator(x: Any) -> Any:
        shared = 0.1 * (x["scalar"] + x["rest"][0].sum())
        return {
            "scalar": x["scalar"] + shared,
            "rest": [0.5 * x["rest"][0] + shared, 0.9 * x["rest"][1], 7],
            "complex": 0.6 * x["complex"],
        }

    solved = solver(operator, b).value
    assert solved["rest"][2] == 7
    assert solved["scalar"].shape == ()
    assert solved["complex"].is_complex()
    for ours, truth in zip(
        torch.utils._pytree.tree_leaves(operator(solved)),
        torch.utils._pytree.tree_leaves(b),
        strict=True,
    ):
        if isinstance(truth, Tensor) and truth.numel():
            assert_near(ours, truth)


@each_kind
def test_the_precision_of_single_is_reached_where_rounding_allows_it(
    solver: solvers.Solver,
) -> None:
    matrix, b = symmetric(shift=0.05).float(), smooth_noise(N).float()
    solved = solver(lambda v: matrix @ v, b)
    assert solved.value.dtype == torch.float32
    assert solved.residual < 1e-4
    assert_near(solved.value.double(), torch.linalg.solve(matrix.double(), b.double()), 1e-3)


@each_kind
def test_a_right_hand_side_of_zero_has_the_solution_zero(solver: solvers.Solver) -> None:
    matrix = symmetric()
    solved = solver(lambda v: matrix @ v, torch.zeros(N))
    assert torch.equal(solved.value, torch.zeros(N))
    assert solved.residual == 0


@each_kind
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_the_right_hand_side_does_not_matter(
    solver: solvers.Solver, size: float
) -> None:
    """In single precision the square of its length would be zero, or infinite."""
    matrix, b = symmetric().float(), smooth_noise(N).float()
    one, other = (solver(lambda v: matrix @ v, s * b).value for s in (1.0, size))
    assert_near((other.double() / size), one.double(), 1e-4)


def test_an_approximation_is_taken_even_if_its_residual_grew() -> None:
    """A matrix far from normal: the second sum of the series is further away than the first."""
    matrix, b = torch.tensor([[1.0, -9.0], [0.0, 1.0]]), torch.tensor([0.0, 1.0])
    solver = solvers.Neumann(max_iterations=1, must_converge=False)
    solved = solver(lambda v: matrix @ v, b)
    assert torch.equal(solved.value, b)
    assert solved.residual == 9


def test_conjugate_gradients_are_exact_after_n_iterations() -> None:
    matrix, b = symmetric(30, shift=0.01), smooth_noise(30)
    truth = torch.linalg.solve(matrix, b)
    solved = solvers.CG(max_iterations=30)(lambda v: matrix @ v, b)
    assert_near(solved.value, truth)
    early = solvers.CG(max_iterations=10, must_converge=False)(lambda v: matrix @ v, b)
    assert early.iterations == 10
    assert (early.value - truth).norm() > 1e-3 * truth.norm()
    # In k distinct eigenvalues, k iterations suffice.
    three = torch.diag(torch.tensor([1.0, 2.0, 5.0]).repeat(10))
    assert solvers.CG()(lambda v: three @ v, b).iterations == 3


def test_the_error_of_conjugate_gradients_falls_as_their_bound_says() -> None:
    """In the norm of the matrix, by 2 ((√κ - 1) / (√κ + 1))^k."""
    matrix, b = torch.diag(torch.linspace(1.0, 100.0, 200)), smooth_noise(200)
    truth = torch.linalg.solve(matrix, b)
    first = truth @ matrix @ truth
    for k in (5, 10, 20):
        solved = solvers.CG(max_iterations=k, must_converge=False)(lambda v: matrix @ v, b)
        error = solved.value - truth
        assert (error @ matrix @ error / first).sqrt() <= 2 * (9 / 11) ** k


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_the_partial_sums_of_the_neumann_series(terms: int) -> None:
    matrix, b, step = general(), smooth_noise(N), 0.8
    solver = solvers.Neumann(step, max_iterations=terms, must_converge=False)
    power, total = torch.eye(N), torch.zeros(N, N)
    for _ in range(terms):
        total, power = total + power, power @ (torch.eye(N) - step * matrix)
    assert_near(solver(lambda v: matrix @ v, b).value, step * total @ b, 1e-13)


def test_a_singular_system_with_a_solution_is_solved() -> None:
    """The part of x along the null space is free: conjugate gradients leave it at zero."""
    matrix = torch.diag(torch.tensor([2.0, 3.0, 0.0]))
    b = torch.tensor([2.0, 6.0, 0.0])
    for solver in (solvers.CG(), solvers.NormalCG(), solvers.GMRES()):
        assert_near(solver(lambda v: matrix @ v, b).value, torch.tensor([1.0, 2.0, 0.0]))


def test_the_transpose_may_be_given() -> None:
    matrix, b = general(), smooth_noise(N)
    told: list[int] = []

    def transpose(v: Tensor) -> Tensor:
        told.append(1)
        return matrix.T @ v

    solved = solvers.NormalCG()(lambda v: matrix @ v, b, transpose)
    assert_near(solved.value, torch.linalg.solve(matrix, b))
    assert told


def test_a_solver_reports() -> None:
    matrix = symmetric()
    reports: list[solvers.Solved] = []
    solved = solvers.CG(report=reports.append)(lambda v: matrix @ v, smooth_noise(N))
    (report,) = reports
    assert report.value is None
    assert (report.iterations, report.residual) == (solved.iterations, solved.residual)


def test_a_solver_says_what_it_is() -> None:
    for solver in (*SYMMETRIC, solvers.CG(tolerance=1e-3, must_converge=False)):
        assert eval(repr(solver), {"solvers": solvers}) == solver  # noqa: S307
        assert "Cost" in (type(solver).__doc__ or "")
    assert repr(solvers.CG(tolerance=1e-3)) == "solvers.CG(tolerance=0.001)"
    assert repr(solvers.CG()) == "solvers.CG()"


# -- or loud ---------------------------------------------------------------------------------------


def test_an_indefinite_matrix_is_named() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, -1.0]))
    with pytest.raises(IndefiniteSystemError, match=r"negative curvature.*NormalCG"):
        solvers.CG()(lambda v: matrix @ v, torch.ones(3))
    for solver in (solvers.NormalCG(), solvers.GMRES(), solvers.Dense()):
        assert_near(
            solver(lambda v: matrix @ v, torch.ones(3)).value, torch.tensor([1.0, 0.5, -1.0])
        )


@pytest.mark.parametrize(
    "solver", [solvers.CG(), solvers.NormalCG(), solvers.GMRES(), solvers.Dense()], ids=repr
)
@pytest.mark.parametrize("task", ["diagonal", "rank", "zero", "one"])
def test_a_singular_matrix_is_named(solver: solvers.Solver, task: str) -> None:
    column = smooth_noise(6, 2)
    matrix = {
        "diagonal": torch.diag(torch.tensor([1.0, 2.0, 0.0])),
        "rank": column @ column.T,
        "zero": torch.zeros(3, 3),
        "one": torch.zeros(1, 1),
    }[task]
    with pytest.raises(SingularSystemError, match="singular"):
        solver(lambda v: matrix @ v, torch.ones(len(matrix)))
    matrices = torch.stack([torch.eye(len(matrix)), matrix])
    with pytest.raises(SingularSystemError, match="singular"):
        torch.func.vmap(lambda m: solver(lambda v: m @ v, torch.ones(len(matrix))).value)(matrices)


def test_dense_refuses_a_matrix_that_leaves_no_digits() -> None:
    hilbert = 1 / (torch.arange(12.0)[:, None] + torch.arange(12.0) + 1)
    with pytest.raises(SingularSystemError, match="condition number"):
        solvers.Dense()(lambda v: hilbert @ v, torch.ones(12))


@pytest.mark.parametrize(
    "solver",
    [
        solvers.CG(max_iterations=3),
        solvers.NormalCG(max_iterations=3),
        solvers.GMRES(max_iterations=3),
        solvers.Neumann(max_iterations=3),
        solvers.FixedPoint(max_iterations=3),
    ],
    ids=repr,
)
def test_a_solver_that_does_not_converge_is_named(solver: Any) -> None:
    matrix, b = symmetric(shift=0.05), smooth_noise(N)
    with pytest.raises(SolverNotConvergedError, match=r"stopped after 3 iterations .*residual"):
        solver(lambda v: matrix @ v, b)
    tolerant = type(solver)(max_iterations=3, must_converge=False)
    solved = tolerant(lambda v: matrix @ v, b)
    assert 1e-6 < solved.residual < 1
    assert solved.value.isfinite().all()


@pytest.mark.parametrize(
    "solver", [solvers.Neumann(step=3.0), solvers.FixedPoint(3.0, 0)], ids=repr
)
def test_a_series_that_diverges_is_named(solver: solvers.Solver) -> None:
    matrix = symmetric()
    with pytest.raises(SolverNotConvergedError, match="diverges"):
        solver(lambda v: matrix @ v, smooth_noise(N))


@each_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(solver: solvers.Solver, value: float) -> None:
    matrix = symmetric()
    broken = matrix.clone()
    broken[0, 1] = value
    for m, b in ((matrix, torch.full((N,), value)), (broken, smooth_noise(N))):
        with pytest.raises(SolverError):
            solver(partial(torch.mv, m), b)


def test_a_tolerance_is_that_of_the_true_residual() -> None:
    """One that rounding does not allow is not claimed."""
    matrix, b = symmetric(40, shift=1e-7), smooth_noise(40)
    with pytest.raises(SolverNotConvergedError):
        solvers.CG(tolerance=1e-15, max_iterations=500)(lambda v: matrix @ v, b)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: solvers.CG(tolerance=-1.0), "tolerance=-1.0"),
        (lambda: solvers.CG(max_iterations=0), "max_iterations=0"),
        (lambda: solvers.GMRES(restart=0), "restart=0"),
        (lambda: solvers.Neumann(step=0.0), "step=0.0"),
        (lambda: solvers.FixedPoint(damping=-1.0), "damping=-1.0"),
        (lambda: solvers.FixedPoint(memory=-1), "memory=-1"),
        (lambda: solvers.CG()(lambda v: v[:1], torch.ones(2)), "must be square"),
        (lambda: solvers.CG()(lambda v: v, [1, 2]), "no unknowns"),
        (lambda: solvers.Dense()(lambda v: v, torch.zeros(30_000)), "30000 times 30000"),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        make()


def test_every_error_of_a_solver_is_one_of_innerloop() -> None:
    for error in (SingularSystemError, IndefiniteSystemError, SolverNotConvergedError):
        assert issubclass(error, SolverError)
        assert issubclass(error, innerloop.InnerLoopError)
