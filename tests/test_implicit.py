"""Implicit differentiation: equal to closed forms and to iterations that autograd differentiates,
or an error that says why not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from innerloop import Implicit, NotConvergedWarning, StoreAll, implicit_root
from innerloop.errors import (
    CapturedTensorError,
    IndefiniteSystemError,
    InvalidInputError,
    NonFiniteError,
    NotDifferentiableError,
    SingularSystemError,
    SolverNotConvergedError,
)
from innerloop.strategy import solvers
from tests.oracles import derivative, smooth_noise

pytestmark = pytest.mark.usefixtures("float64")
f = torch.func


def assert_near(ours: Tensor, truth: Tensor, tolerance: float = 1e-8) -> None:
    scale = max(truth.abs().max().item(), 1e-300) if truth.numel() else 1.0
    torch.testing.assert_close(ours, truth, rtol=0, atol=tolerance * scale)


def both_derivatives(ours: Any, truth: Any, *at: Tensor, tolerance: float = 1e-8) -> None:
    """First and second derivatives of a scalar function, by each way there is to take them."""
    every = tuple(range(len(at)))
    first = f.grad(truth, every)(*at)
    second = f.hessian(truth, every)(*at)
    leaves = [x.clone().requires_grad_() for x in at]
    gradients = torch.autograd.grad(ours(*leaves), leaves, create_graph=True)
    for gradient, expected in zip(gradients, first, strict=True):
        assert_near(gradient.detach(), expected, tolerance)
    for gradient, rows in zip(gradients, second, strict=True):
        weights = smooth_noise(*gradient.shape, phase=4.0)
        pulled = torch.autograd.grad(
            (gradient * weights).sum(), leaves, retain_graph=True, allow_unused=True
        )
        for found, row, leaf in zip(pulled, rows, leaves, strict=True):
            expected = (
                torch.tensordot(weights, row, gradient.ndim) if gradient.ndim else weights * row
            )
            assert_near(torch.zeros_like(leaf) if found is None else found, expected, tolerance)
    for taken in (f.grad(ours, every), f.jacrev(ours, every), f.jacfwd(ours, every)):
        for found, expected in zip(taken(*at), first, strict=True):
            assert_near(found, expected, tolerance)
    for taken in (f.hessian(ours, every), f.jacrev(f.jacrev(ours, every), every)):
        for row, expected_row in zip(taken(*at), second, strict=True):
            for found, expected in zip(row, expected_row, strict=True):
                assert_near(found, expected, tolerance)


# -- ridge regression: a Problem with a closed form ------------------------------------------------

X, Y = smooth_noise(20, 5), smooth_noise(20, phase=1.0)
XV, YV = smooth_noise(10, 5, phase=2.0), smooth_noise(10, phase=3.0)
RATE = 0.05


def ridge_loss(params: Any, hyper: Any, batch: Any) -> Tensor:
    """A weight for each example, and a decay."""
    errors = X @ params["w"] + params["b"] - Y
    decay = hyper["l2"].exp() * (params["w"].square().sum() + params["b"] ** 2)
    return (hyper["weights"] * errors.square()).sum() / 2 + decay / 2


RIDGE = innerloop.Problem(ridge_loss, innerloop.optim.sgd(lr=RATE, momentum=0.5))


def ridge_start() -> dict[str, Tensor]:
    return {"w": torch.zeros(5), "b": torch.tensor(0.0)}


def ridge_solution(l2: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Where a long loop would end, so that one step suffices."""
    solution = ridge_closed(l2.detach(), weights.detach())
    return {"w": solution[:5], "b": solution[5]}


def validation(w: Tensor, b: Tensor) -> Tensor:
    return (XV @ w + b - YV).square().sum() / 2


def ridge_closed(l2: Tensor, weights: Tensor) -> Tensor:
    rows = torch.cat([X, torch.ones(20, 1)], 1)
    hessian = rows.T @ (weights[:, None] * rows) + l2.exp() * torch.eye(6)
    return torch.linalg.inv(hessian) @ (rows.T @ (weights * Y))


def ridge_truth(l2: Tensor, weights: Tensor) -> Tensor:
    solution = ridge_closed(l2, weights)
    return validation(solution[:5], solution[5])


def ridge(l2: Tensor, weights: Tensor) -> Tensor:
    traj = solved_ridge(l2, weights)
    return validation(traj.params["w"], traj.params["b"])


def solved_ridge(l2: Tensor, weights: Tensor, **options: Any) -> innerloop.Trajectory:
    options = {"strategy": Implicit(), "steps": 1, **options}
    hyper = {"l2": l2, "weights": weights}
    return innerloop.unroll(RIDGE, ridge_solution(l2, weights), None, hyper=hyper, **options)


L2, WEIGHTS = torch.tensor(0.3, dtype=torch.float64), 1 + 0.5 * smooth_noise(20, phase=5.0)
WRONG: Any = 3
WRONG_FN: Any = len
WRONG_CLASS: Any = solvers.CG
KINDS = (
    solvers.CG(),
    solvers.NormalCG(),
    solvers.GMRES(),
    solvers.Neumann(step=0.05),
    solvers.FixedPoint(damping=0.05),
    solvers.Dense(),
)


def test_ridge_regression_first_and_second_derivatives() -> None:
    both_derivatives(ridge, ridge_truth, L2, WEIGHTS)


@pytest.mark.parametrize("solver", KINDS, ids=repr)
def test_ridge_regression_with_each_solver(solver: solvers.Solver) -> None:
    reports: list[solvers.Solved] = []
    solver = type(solver)(**{**vars(solver), "report": reports.append})
    _, grads = innerloop.metagradient(
        lambda traj, hyper: validation(traj.params["w"], traj.params["b"]),
        RIDGE,
        ridge_start() if solver == solvers.CG() else ridge_solution(L2, WEIGHTS),
        None,
        steps=200 if solver == solvers.CG() else 1,
        hyper={"l2": L2, "weights": WEIGHTS},
        wrt="hyper",
        strategy=Implicit(solver),
    )
    for found, truth in zip(
        (grads["l2"], grads["weights"]),
        f.grad(ridge_truth, (0, 1))(L2, WEIGHTS),
        strict=True,
    ):
        assert_near(found, truth)
    assert len(reports) == 2  # the check in the forward pass, and the backward pass
    assert all(report.residual < 1.2e-11 for report in reports)


def test_vmap_over_tasks() -> None:
    rates = torch.tensor([-1.0, 0.3, 1.0]).double()
    weights = torch.stack([WEIGHTS, 2 * WEIGHTS, WEIGHTS.flip(0)])
    for order in (lambda g: g, f.hessian):
        ours = f.vmap(order(f.grad(ridge, 1)))(rates, weights)
        truth = f.vmap(order(f.grad(ridge_truth, 1)))(rates, weights)
        assert_near(ours, truth)
    # The other way round: the derivative of all tasks at once.
    ours = f.grad(lambda r: f.vmap(ridge)(r, weights).sum())(rates)
    assert_near(ours, f.vmap(f.grad(ridge_truth))(rates, weights))
    leaf = rates.clone().requires_grad_()
    (ours,) = torch.autograd.grad(f.vmap(ridge)(leaf, weights).sum(), leaf)
    assert_near(ours, f.vmap(f.grad(ridge_truth))(rates, weights))


def test_batched_cotangents_of_autograd_are_refused() -> None:
    """A solver looks at its numbers, and those that autograd batches cannot be looked at."""
    l2 = L2.clone().requires_grad_()
    w = solved_ridge(l2, WEIGHTS).params["w"]
    with pytest.raises(NotDifferentiableError, match="is_grads_batched"):
        torch.autograd.grad(w, l2, torch.eye(5), is_grads_batched=True)


def test_it_is_the_limit_of_longer_and_longer_loops() -> None:
    """The error of the implicit gradient falls by 1 - ημ a step, that of the unrolled one by the
    same, but for a factor T."""
    rates, at = torch.tensor([1.0, 0.4]), torch.tensor(0.7).double()

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        w = params["w"]
        return (rates * (w - hyper.sin()) ** 2).sum() / 2 + hyper * (w**4).sum() / 8

    problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.3))

    def gradient(strategy: innerloop.strategy.Strategy, steps: int) -> float:
        _, found = innerloop.metagradient(
            lambda traj, hyper: (traj.params["w"] ** 2).sum(),
            problem,
            {"w": torch.tensor([2.0, -1.0])},
            None,
            steps=steps,
            hyper=at,
            wrt="hyper",
            strategy=strategy,
        )
        return found.item()

    def newton(hyper: Tensor) -> Tensor:
        w = torch.ones(2)
        for _ in range(20):
            slope = rates * (w - hyper.sin()) + hyper * w**3 / 2
            w = w - slope / (rates + 1.5 * hyper * w**2)
        return w

    limit = f.grad(lambda hyper: (newton(hyper) ** 2).sum())(at).item()
    curvature = (rates + 1.5 * at * newton(at) ** 2).min().item()
    times = torch.arange(30.0, 70.0, 10)
    implicit, unrolled = (
        torch.tensor([gradient(strategy, int(t)) - limit for t in times])
        for strategy in (Implicit(tolerance=math.inf), StoreAll())
    )
    centred = times - times.mean()
    slope = (centred * implicit.abs().log()).sum() / centred.square().sum()
    assert slope.item() == pytest.approx(math.log(1 - 0.3 * curvature), rel=0.02)
    # Their ratio is a line in T.
    assert torch.corrcoef(torch.stack([times, unrolled / implicit]))[0, 1].abs() > 0.9999
    assert unrolled[0].abs() > 2 * implicit[0].abs()
    for strategy in (Implicit(), StoreAll()):
        assert gradient(strategy, 120) == pytest.approx(limit, rel=1e-8)


def test_conjugate_gradients_of_a_random_quadratic_are_exact_after_n_iterations() -> None:
    """The inner loss wᵀAw/2 - λᵀw has the solution A⁻¹λ, and the gradient of cᵀw is A⁻¹c. Betty's
    CG is off by a factor 2.5 on such a problem, BOAT's by 5e-4."""
    n = 20
    basis, _ = torch.linalg.qr(smooth_noise(n, n))
    matrix = basis @ torch.diag(torch.linspace(0.1, 3.0, n)) @ basis.T
    problem = innerloop.Problem(
        lambda p, h, b: p["w"] @ matrix @ p["w"] / 2 - h @ p["w"], innerloop.optim.sgd(lr=0.6)
    )
    c, l2 = smooth_noise(n, phase=1.0), smooth_noise(n, phase=2.0)

    def gradient(solver: solvers.Solver) -> Tensor:
        return innerloop.metagradient(
            lambda traj, hyper: c @ traj.params["w"],
            problem,
            {"w": torch.linalg.solve(matrix, l2)},
            None,
            steps=1,
            hyper=l2,
            wrt="hyper",
            strategy=Implicit(solver),
        )[1]

    truth = torch.linalg.solve(matrix, c)
    assert_near(gradient(solvers.CG(max_iterations=n)), truth, 1e-10)
    assert_near(gradient(solvers.Neumann(0.6)), truth, 1e-8)
    early = gradient(solvers.CG(max_iterations=5, must_converge=False))
    assert (early - truth).norm() > 1e-3 * truth.norm()


# -- equations without a Problem -------------------------------------------------------------------


def cubic_root(a: Tensor) -> Tensor:
    x = torch.full_like(a, 1.5)
    for _ in range(50):
        x = x - (a * x**3 - x - 2) / (3 * a * x**2 - 1)
    return x


@pytest.mark.parametrize("solver", [*KINDS[:3], KINDS[5]], ids=repr)
def test_an_unknown_without_a_dimension(solver: solvers.Solver) -> None:
    """a x³ - x - 2 = 0 at a = 2: dx/da = -0.2214, for which TorchOpt gives 0. Newton's iteration,
    differentiated by autograd, is the truth up to the third derivative."""

    def root(a: Tensor) -> Tensor:
        return implicit_root(
            lambda x, a: a * x**3 - x - 2, cubic_root(a.detach()), a, solver=solver
        )

    a = torch.tensor(2.0).double()
    assert f.grad(root)(a).item() == pytest.approx(-0.2214, abs=1e-4)
    both_derivatives(root, cubic_root, a, tolerance=1e-11)
    leaf = a.clone().requires_grad_()
    (first,) = torch.autograd.grad(root(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first, leaf, create_graph=True)
    (third,) = torch.autograd.grad(second, leaf)
    assert_near(third, f.grad(f.grad(f.grad(cubic_root)))(a), 1e-10)


def equilibrium(w: Tensor, u: Tensor, x: Tensor, steps: int = 120) -> Tensor:
    z = torch.zeros(x.shape[0], w.shape[0])
    for _ in range(steps):
        z = torch.tanh(z @ w.T + x @ u.T)
    return z


W, U = 0.25 * smooth_noise(4, 4), smooth_noise(4, 3, phase=1.0)
INPUT = smooth_noise(5, 3, phase=2.0)


@pytest.mark.parametrize("solver", [solvers.GMRES(), solvers.FixedPoint()], ids=repr)
def test_a_deep_equilibrium_layer(solver: solvers.Solver) -> None:
    """z = tanh(Wz + Ux) for five inputs at once, against the iteration that finds it,
    differentiated by autograd."""
    mixing = smooth_noise(5, 4, phase=3.0)

    def layer(w: Tensor, u: Tensor) -> Tensor:
        with torch.no_grad():
            z = equilibrium(w.detach(), u.detach(), INPUT)
        z = implicit_root(
            lambda z, w, u: z - torch.tanh(z @ w.T + INPUT @ u.T), z, w, u, solver=solver
        )
        return (mixing * z.square()).sum()

    def truth(w: Tensor, u: Tensor) -> Tensor:
        return (mixing * equilibrium(w, u, INPUT).square()).sum()

    both_derivatives(layer, truth, W, U)
    along = smooth_noise(4, 4, phase=9.0)
    slope = derivative(lambda h: truth(W + h * along, U).item())
    assert (f.grad(layer)(W, U) * along).sum().item() == pytest.approx(slope, rel=1e-8)


def test_a_fixed_point_in_a_box() -> None:
    """The minimum of xᵀQx/2 - bᵀx over a box, a fixed point of the projected gradient step: the
    free entries solve a linear system, the others stay at their bound."""
    q = torch.diag(torch.tensor([2.0, 1.0, 1.5, 1.0])) + 0.2 * torch.ones(4, 4)
    b = torch.tensor([3.0, -2.0, 0.5, 0.8])
    low, high = torch.full((4,), -1.0), torch.full((4,), 1.0)

    def step(x: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x - 0.3 * (q @ x - b), low), high)

    x = torch.zeros(4)
    for _ in range(300):
        x = step(x, b, low, high)
    active = (x.abs() == 1).tolist()
    assert active == [True, True, False, False]

    def truth(b: Tensor, low: Tensor, high: Tensor) -> Tensor:
        fixed = torch.stack([high[0], low[1]])
        free = torch.linalg.inv(q[2:, 2:]) @ (b[2:] - q[2:, :2] @ fixed)
        return (torch.cat([fixed, free]) ** 3).sum()

    def ours(b: Tensor, low: Tensor, high: Tensor) -> Tensor:
        found = implicit_root(lambda x, *a: x - step(x, *a), x, b, low, high)
        return (found**3).sum()

    both_derivatives(ours, truth, b, low, high, tolerance=1e-11)

    problem = innerloop.Problem(
        lambda p, h, batch: p["x"] @ q @ p["x"] / 2 - h @ p["x"], innerloop.optim.sgd(lr=0.3)
    )
    strategy = Implicit(fixed_point=lambda p, h, batch: {"x": step(p["x"], h, low, high)})
    _, grad = innerloop.metagradient(
        lambda traj, hyper: (traj.params["x"] ** 3).sum(), problem, {"x": x}, None, steps=0 + 1,
        hyper=b, wrt="hyper", strategy=Implicit(residual=strategy.residual, tolerance=math.inf),
    )  # fmt: skip
    # The loop itself is unconstrained, so its own gradient is another one: the box has to be said.
    assert not torch.allclose(grad, f.grad(truth)(b, low, high))


def test_a_solution_may_be_any_pytree_and_so_may_the_arguments() -> None:
    """Rows in another order, an entry that is no tensor, 0-dim and empty unknowns."""
    solution: dict[str, Any] = {
        "a": [torch.tensor(0.5), "text"],
        "b": (torch.ones(2, 2), torch.zeros(0)),
    }
    given = {"shift": torch.tensor(0.5), "matrix": torch.ones(2, 2), "unused": torch.tensor(1.0)}

    def residual(x: Any, given: Any, factor: float) -> Any:
        return {
            "b": (x["b"][0] - factor * given["matrix"] * x["a"][0], x["b"][1]),
            "a": [x["a"][0] - given["shift"], "text"],
        }

    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    found = implicit_root(residual, solution, leaves, 2.0)
    assert found["a"][1] == "text"
    assert torch.equal(found["b"][0], solution["b"][0])
    gradients = torch.autograd.grad(found["b"][0].sum(), list(leaves.values()), allow_unused=True)
    assert gradients[0].item() == pytest.approx(8.0)
    assert_near(gradients[1], torch.ones(2, 2))
    assert gradients[2] is None


def test_complex_unknowns() -> None:
    """z² = c: dz = dc / (2 z)."""

    def ours(c: Tensor) -> Tensor:
        with torch.no_grad():
            z = c.detach().sqrt()
        return implicit_root(lambda z, c: z**2 - c, z, c).abs().sum()

    c = torch.complex(smooth_noise(3), 1 + smooth_noise(3, phase=1.0)).requires_grad_()
    (found,) = torch.autograd.grad(ours(c), c)
    (truth,) = torch.autograd.grad(c.sqrt().abs().sum(), c)
    assert_near(torch.view_as_real(found), torch.view_as_real(truth))


def test_single_precision_is_kept() -> None:
    a = torch.tensor(2.0, dtype=torch.float32, requires_grad=True)
    x = implicit_root(lambda x, a: a * x**3 - x - 2, cubic_root(a.detach()), a)
    assert x.dtype == torch.float32
    (slope,) = torch.autograd.grad(x, a)
    assert slope.dtype == torch.float32
    assert slope.item() == pytest.approx(-0.2213992, rel=1e-5)


def test_nothing_is_recorded_where_nothing_asks() -> None:
    calls: list[int] = []

    def residual(x: Tensor, a: Tensor) -> Tensor:
        calls.append(1)
        return x - a

    one = torch.tensor(1.0)
    assert not implicit_root(residual, one, one).requires_grad
    with torch.no_grad():
        assert not implicit_root(residual, one, one.clone().requires_grad_()).requires_grad
    assert not calls


# -- training problems -----------------------------------------------------------------------------


def test_implicit_maml() -> None:
    """iMAML (Rajeswaran et al. 2019): the inner loss has a proximal term λ/2 |φ - θ|², and
    d outer / dθ = (I + H/λ)⁻¹ g, which does not depend on the path."""
    tasks = [(smooth_noise(8, 3, phase=i), smooth_noise(8, phase=i + 0.5)) for i in range(2)]
    strength = 2.0

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        x, y = batch
        proximal = (params["w"] - hyper["w"]).square().sum()
        return (x @ params["w"] - y).square().sum() / 2 + strength * proximal / 2

    def outer_of(x: Tensor, y: Tensor) -> Callable[..., Tensor]:
        return lambda traj, hyper: (x @ traj.params["w"] - y).exp().sum()

    problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))
    meta = {"w": smooth_noise(3, phase=8.0)}
    for x, y in tasks:
        _, grads = innerloop.metagradient(
            outer_of(x, y),
            problem,
            meta,
            [(x, y)] * 120,
            hyper=meta,
            wrt="hyper",
            strategy=Implicit(),
        )
        hessian = x.T @ x
        adapted = torch.linalg.solve(
            hessian + strength * torch.eye(3), x.T @ y + strength * meta["w"]
        )
        outer = x.T @ (x @ adapted - y).exp()
        truth = torch.linalg.solve(torch.eye(3) + hessian / strength, outer)
        assert_near(grads["w"], truth)


def test_the_outer_loss_may_use_hyper_directly() -> None:
    at = L2
    _, grads = innerloop.metagradient(
        lambda traj, hyper: validation(traj.params["w"], traj.params["b"]) + 3 * hyper["l2"],
        RIDGE,
        ridge_solution(at, WEIGHTS),
        None,
        steps=1,
        hyper={"l2": at, "weights": WEIGHTS},
        wrt="hyper",
        strategy=Implicit(),
    )
    assert_near(grads["l2"] - 3, f.grad(ridge_truth)(at, WEIGHTS))


def test_a_module_with_buffers() -> None:
    """Batch norm in front of a linear layer, in training mode: the statistics are those of the
    batch, and the solution is ridge regression on normalised data."""
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 1))
    x, y = smooth_noise(12, 3), smooth_noise(12, 1, phase=1.0)

    def loss(model: nn.Module, hyper: Any, batch: Any) -> Tensor:
        decay = sum(p.square().sum() for p in model.parameters())
        return (model(x) - y).square().mean() / 2 + hyper.exp() * decay / 2

    problem = innerloop.Problem.from_module(model, loss, innerloop.optim.sgd(lr=0.5))
    rows = F.batch_norm(x, None, None, training=True)
    rows = torch.cat([rows, torch.ones(12, 1)], 1)

    def solution(decay: Tensor) -> Tensor:
        return torch.linalg.inv(rows.T @ rows / 12 + decay.exp() * torch.eye(4)) @ (rows.T @ y / 12)

    def ours(decay: Tensor) -> Tensor:
        traj = innerloop.unroll(problem, None, None, steps=130, hyper=decay, strategy=Implicit())
        return torch.stack([p.sin().sum() for p in traj.params.values()]).sum()

    decay = torch.tensor(-1.0).double()
    truth = f.grad(lambda d: solution(d).sin().sum())(decay)
    before = {name: b.clone() for name, b in model.named_buffers()}
    assert_near(f.grad(ours)(decay), truth)
    leaf = decay.clone().requires_grad_()
    assert_near(torch.autograd.grad(ours(leaf), leaf)[0], truth)
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name])


def test_random_numbers_of_the_last_step_are_drawn_again() -> None:
    """With a rate of 1 one step solves (w - λ noise)² / 2 exactly, whatever the noise was."""
    drawn: list[float] = []

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        noise = torch.rand(())
        drawn.append(noise.item())
        return (params["w"] - hyper * noise) ** 2 / 2

    problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=1.0))
    rate = torch.tensor(2.0).requires_grad_()
    traj = innerloop.unroll(
        problem, {"w": torch.tensor(0.0)}, None, steps=4, hyper=rate, strategy=Implicit()
    )
    last = drawn[3]
    state = torch.get_rng_state()
    (found,) = torch.autograd.grad(traj.params["w"], rate)
    assert found.item() == pytest.approx(last, rel=1e-14)
    assert torch.equal(state, torch.get_rng_state())
    assert set(drawn[3:]) == {last}


def test_targets_make_the_equation_one_that_is_not_symmetric() -> None:
    """Two equations, w = λ v / 2 + 1 and v = w / 2: the targets count as constants in the inner
    gradient, not in its derivative. w = 1 / (1 - λ / 4), so dw/dλ = w² / 4."""
    problem = innerloop.Problem(
        lambda p, h, b, t: ((p["w"] - t[0]) ** 2 + (p["v"] - t[1]) ** 2) / 2,
        innerloop.optim.sgd(lr=0.5),
        targets=lambda p, h, b: (h * p["v"] / 2 + 1, p["w"] / 2),
    )
    rate = torch.tensor(0.8).requires_grad_()
    start = {"w": torch.tensor(0.0), "v": torch.tensor(0.0)}
    traj = innerloop.unroll(
        problem, start, None, steps=200, hyper=rate, strategy=Implicit(solvers.GMRES())
    )
    w = traj.params["w"]
    assert w.item() == pytest.approx(1.25)
    (slope,) = torch.autograd.grad(w, rate, create_graph=True)
    assert slope.item() == pytest.approx(1.25**2 / 4, rel=1e-9)
    (second,) = torch.autograd.grad(slope, rate)
    assert second.item() == pytest.approx(2 * 1.25**3 / 16, rel=1e-9)


def test_a_loop_continues_from_a_solution() -> None:
    """The carry at the end holds the solution, a function of hyper; StoreAll goes on from there."""
    l2 = L2.clone().requires_grad_()
    hyper = {"l2": l2, "weights": WEIGHTS}
    problem = innerloop.Problem(ridge_loss, innerloop.optim.sgd(lr=RATE))
    first = innerloop.unroll(
        problem, ridge_solution(l2, WEIGHTS), None, steps=1, hyper=hyper, strategy=Implicit()
    )
    second = innerloop.unroll(problem, first.at(-1), None, steps=3, hyper=hyper)
    outer = validation(second.params["w"], second.params["b"])
    (found,) = torch.autograd.grad(outer, l2)
    assert_near(found, f.grad(ridge_truth)(L2, WEIGHTS))


def test_plan_says_what_it_may_cost() -> None:
    (row,) = innerloop.plan(
        RIDGE, ridge_start(), None, steps=100, hyper={"l2": L2, "weights": WEIGHTS},
        strategies=[Implicit()],
    ).rows  # fmt: skip
    assert 0 < row.seconds < 10
    assert 0 < row.bytes < 1e6


# -- how far from the solution ---------------------------------------------------------------------


def test_a_loop_that_has_not_converged_warns_and_the_bound_holds() -> None:
    """On a w² / 2 - λ w the hyper-gradient of w⁴ is g(w) = 4 w³ / a, with the slope 12 w² / a, and
    the distance from the solution is |w - λ / a| exactly."""
    a = 2.0
    problem = innerloop.Problem(
        lambda p, h, b: a * p["w"] ** 2 / 2 - h * p["w"], innerloop.optim.sgd(lr=0.1)
    )
    rate = torch.tensor(3.0)

    def run(steps: int) -> tuple[float, float]:
        value, grad = innerloop.metagradient(
            lambda traj, hyper: (traj.params["w"] ** 4, traj.params["w"]), problem,
            {"w": torch.tensor(0.0)}, None, steps=steps, hyper=rate, wrt="hyper",
            strategy=Implicit(),
        )  # fmt: skip
        return value[1].item(), grad.item()

    with pytest.warns(NotConvergedWarning, match="not solved") as caught:
        w, found = run(5)
    text = str(caught[0].message)
    distance = abs(w - 1.5)
    assert f"norm {a * distance:.1e}" in text
    assert f"d = {distance:.1e}" in text
    truth = 4 * 1.5**3 / a
    assert abs(found - truth) <= 12 * 1.5**2 / a * distance
    assert abs(found - truth) > 0.1 * truth
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(100)[1] == pytest.approx(truth, rel=1e-8)


@pytest.mark.parametrize("level", [1e-1, 1e-2, 1e-4])
def test_an_approximate_root_warns_above_the_tolerance(level: float) -> None:
    a = torch.tensor(2.0).double().requires_grad_()
    x = cubic_root(a.detach()) + level
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        implicit_root(lambda x, a: a * x**3 - x - 2, x, a)
        implicit_root(lambda x, a: a * x**3 - x - 2, x, a, tolerance=math.inf)
    assert len(caught) == (level > 2e-3)
    for each in caught:
        assert each.category is NotConvergedWarning


def test_a_solution_at_zero_does_not_warn() -> None:
    """Relative to a solution of length zero everything is far away."""
    problem = innerloop.Problem(
        lambda p, h, b: h * p["w"].square().sum() / 2, innerloop.optim.sgd(lr=0.5)
    )
    rate = torch.tensor(1.0).requires_grad_()
    traj = innerloop.unroll(
        problem, {"w": torch.ones(3)}, None, steps=40, hyper=rate, strategy=Implicit()
    )
    assert 0 < traj.params["w"].detach().abs().max() < 1e-11


def test_weight_decay_of_the_optimizer_is_noticed() -> None:
    """The loop minimises another function than the loss."""
    problem = innerloop.Problem(
        lambda p, h, b: (p["w"] - h) ** 2 / 2, innerloop.optim.sgd(lr=0.5, weight_decay=0.3)
    )
    rate = torch.tensor(1.0).requires_grad_()
    with pytest.warns(NotConvergedWarning, match="weight decay"):
        innerloop.unroll(
            problem, {"w": torch.tensor(0.0)}, None, steps=60, hyper=rate, strategy=Implicit()
        )


# -- or loud ---------------------------------------------------------------------------------------


def test_the_starting_point_has_no_gradient_and_that_is_no_zero() -> None:
    with pytest.raises(InvalidInputError, match=r"does not differentiate \['params'\]"):
        innerloop.metagradient(
            lambda traj, hyper: traj.params["w"].sum(), RIDGE, ridge_start(), None, steps=3,
            hyper={"l2": L2, "weights": WEIGHTS}, strategy=Implicit(),
        )  # fmt: skip
    start = {name: p.requires_grad_() for name, p in ridge_start().items()}
    traj = innerloop.unroll(
        RIDGE, start, None, steps=120, hyper={"l2": L2, "weights": WEIGHTS},
        strategy=Implicit(),
    )  # fmt: skip
    with pytest.raises(NotDifferentiableError, match="where the search for it began"):
        traj.params["w"].sum().backward()
    a = torch.tensor(2.0).double().requires_grad_()
    searched = cubic_root(a)  # with a graph
    root = implicit_root(lambda x, a: a * x**3 - x - 2, searched, a)
    with pytest.raises(NotDifferentiableError, match="not on where its search began"):
        root.backward()
    other = torch.tensor(1.0).requires_grad_()
    with pytest.raises(NotDifferentiableError, match="not on where its search began"):
        implicit_root(lambda x: x - 1, other).backward()
    with pytest.raises(NotDifferentiableError, match="not on where its search began"):
        f.jvp(
            lambda x: implicit_root(lambda x: x - 1, x), (torch.tensor(1.0),), (torch.tensor(1.0),)
        )


def test_what_an_equation_captures_is_an_error() -> None:
    a, c = torch.tensor(2.0).requires_grad_(), torch.tensor(3.0).requires_grad_()
    solution = torch.tensor(6.0)
    with pytest.raises(CapturedTensorError, match="residual uses a tensor that requires grad"):
        implicit_root(lambda x, a: x - a * c, solution, a)
    with pytest.raises(CapturedTensorError, match="residual uses a tensor that requires grad"):
        f.grad(lambda q: implicit_root(lambda x, a: x - a * q, solution, a))(torch.tensor(3.0))
    with pytest.raises(CapturedTensorError, match="residual uses a tensor that requires grad"):
        f.grad(
            lambda a: f.jvp(
                lambda q: implicit_root(lambda x, a: x - a * q, solution, a),
                (torch.tensor(3.0),),
                (torch.tensor(1.0),),
            )[1]
        )(torch.tensor(2.0))
    captured = innerloop.Problem(
        lambda p, h, b: (p["w"] - h * c) ** 2 / 2, innerloop.optim.sgd(lr=0.5)
    )
    with pytest.raises(CapturedTensorError, match="captured by the loss"):
        innerloop.unroll(captured, {"w": solution}, None, steps=3, hyper=a, strategy=Implicit())
    module = nn.Linear(2, 2)
    with pytest.raises(InvalidInputError, match="holds a module"):
        implicit_root(lambda x, m: x - m(x), torch.zeros(2), module)
    plain = innerloop.Problem(lambda p, h, b: (p["w"] - h) ** 2 / 2, innerloop.optim.sgd(lr=0.5))
    with pytest.raises(CapturedTensorError, match="residual uses a tensor that requires grad"):
        innerloop.unroll(
            plain, {"w": solution}, None, steps=3, hyper=a,
            strategy=Implicit(residual=lambda p, h, b: {"w": p["w"] - h * c}),
        )  # fmt: skip


def test_what_is_no_part_of_the_solution_raises() -> None:
    l2 = L2.clone().requires_grad_()
    traj = solved_ridge(l2, WEIGHTS, steps=3, save_at=[2])
    for value, match in (
        (traj.losses[2], "losses"),
        (traj.at(2).params["w"].sum(), "the state at time 2"),
        (traj.at(-1).optimizer_state[1]["w"].sum(), "optimizer's state"),
    ):
        with pytest.raises(NotDifferentiableError, match=match):
            torch.autograd.grad(value, l2, retain_graph=True)

    def losses(l2: Tensor) -> Tensor:
        return solved_ridge(l2, WEIGHTS).losses.sum()

    def states(l2: Tensor) -> Tensor:
        return solved_ridge(l2, WEIGHTS, steps=3, save_at=[2]).at(2).params["w"].sum()

    for behind, match in ((losses, "losses"), (states, "the state at time 2")):
        with pytest.raises(NotDifferentiableError, match=match):
            f.grad(behind)(L2)
        with pytest.raises(NotDifferentiableError, match=match):
            f.jvp(behind, (L2,), (torch.tensor(1.0).double(),))


def test_hyper_parameters_of_the_optimizer_raise() -> None:
    problem = innerloop.Problem(
        ridge_loss, innerloop.optim.sgd(), optimizer_hyper=("lr", "weight_decay")
    )
    hyper = {
        "l2": L2.clone(),
        "weights": WEIGHTS,
        "lr": torch.tensor(0.05).double(),
        "weight_decay": torch.tensor(0.0).double(),
    }
    start = ridge_solution(hyper["l2"], WEIGHTS)
    with pytest.raises(NotDifferentiableError, match="hyper-parameters of the optimizer"):
        innerloop.metagradient(
            lambda traj, hyper: validation(traj.params["w"], traj.params["b"]),
            problem,
            start,
            None,
            steps=1,
            hyper=hyper,
            wrt="hyper",
            strategy=Implicit(),
        )
    # Those of the loss alone are right.
    hyper["l2"].requires_grad_()
    traj = innerloop.unroll(problem, start, None, steps=1, hyper=hyper, strategy=Implicit())
    outer = validation(traj.params["w"], traj.params["b"])
    (found,) = torch.autograd.grad(outer, hyper["l2"])
    assert_near(found, f.grad(ridge_truth)(L2, WEIGHTS))


def test_an_inner_problem_without_a_unique_solution_is_named() -> None:
    """Three parameters for two data; and a parameter that the loss does not use."""
    x = smooth_noise(2, 3)
    problem = innerloop.Problem(
        lambda p, h, b: (x @ p["w"] - h).square().sum() / 2, innerloop.optim.sgd(lr=0.3)
    )
    target = torch.ones(2).requires_grad_()
    start = {"w": torch.linalg.pinv(x) @ target.detach()}
    for solver in (solvers.CG(), solvers.GMRES(), solvers.NormalCG(), solvers.Dense()):
        strategy = Implicit(solver, tolerance=math.inf)
        traj = innerloop.unroll(problem, start, None, steps=1, hyper=target, strategy=strategy)
        with pytest.raises(SingularSystemError, match="singular"):
            torch.autograd.grad(traj.params["w"][0], target)
    # What the data determine has a gradient: x w = target.
    traj = innerloop.unroll(problem, start, None, steps=1, hyper=target, strategy=Implicit())
    (found,) = torch.autograd.grad(x[0] @ traj.params["w"], target)
    assert_near(found, torch.tensor([1.0, 0.0]))


def test_a_saddle_point_is_named() -> None:
    problem = innerloop.Problem(
        lambda p, h, b: (p["w"][0] ** 2 - p["w"][1] ** 2) / 2 - h * p["w"].sum(),
        innerloop.optim.sgd(lr=0.1),
    )
    rate = torch.tensor(1.0).requires_grad_()
    at = {"w": torch.tensor([1.0, -1.0])}
    traj = innerloop.unroll(problem, at, None, steps=1, hyper=rate, strategy=Implicit())
    with pytest.raises(IndefiniteSystemError, match="negative curvature"):
        torch.autograd.grad(traj.params["w"][1], rate)
    # Its point is differentiated by a solver for such matrices.
    traj = innerloop.unroll(
        problem, at, None, steps=1, hyper=rate, strategy=Implicit(solvers.GMRES())
    )
    (found,) = torch.autograd.grad(traj.params["w"][1], rate)
    assert found.item() == pytest.approx(-1.0)


def test_a_solver_that_does_not_converge_gives_no_nan() -> None:
    l2 = L2.clone().requires_grad_()
    strategy = Implicit(solvers.CG(max_iterations=2), tolerance=math.inf)
    traj = solved_ridge(l2, WEIGHTS, strategy=strategy)
    with pytest.raises(SolverNotConvergedError, match="stopped after 2 iterations"):
        traj.params["w"].sum().backward()
    assert l2.grad is None


def test_a_double_root_is_named() -> None:
    """x² = a at a = 0 does not move smoothly."""
    a = torch.tensor(0.0).requires_grad_()
    root = implicit_root(lambda x, a: x**2 - a, torch.tensor(0.0), a)
    with pytest.raises(SingularSystemError):
        root.backward()


def test_derivatives_that_pytorch_drops_are_refused() -> None:
    def root(a: Tensor) -> Tensor:
        return implicit_root(lambda x, a: a * x**3 - x - 2, cubic_root(a.detach()), a)

    at, one = torch.tensor(2.0).double(), torch.tensor(1.0).double()
    with pytest.raises(NotDifferentiableError, match=r"jvp of torch\.func\.jvp"):
        f.jvp(lambda a: f.jvp(root, (a,), (one,))[1], (at,), (one,))
    # Reverse over forward is not among them.
    found = f.grad(lambda a: f.jvp(root, (a,), (one,))[1])(at)
    assert_near(found, f.grad(f.grad(cubic_root))(at))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(at, one)
        with pytest.raises(NotDifferentiableError, match="dual numbers"):
            root(dual)


def test_a_residual_that_is_not_finite_is_named() -> None:
    a = torch.tensor(-1.0).requires_grad_()
    with pytest.raises(NonFiniteError, match="residual at the solution is nan"):
        implicit_root(lambda x, a: x - a.log(), torch.tensor(0.0), a)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda a: implicit_root(WRONG, a, a), "residual is int"),
        (lambda a: implicit_root(lambda x, a: x - a, 1.0, a), "no floating-point tensor"),
        (lambda a: implicit_root(lambda x, a: x[:1] - a, torch.ones(2), a), "as many equations"),
        (lambda a: implicit_root(lambda x, a: {"x": x}, a.detach(), a), "as many equations"),
        (lambda a: implicit_root(lambda x, a: x - a, a.detach(), a, solver=WRONG), "solver is 3,"),
        (lambda a: Implicit(WRONG_CLASS), "solver is CG, not a solver"),
        (lambda a: Implicit(residual=WRONG), "residual is int"),
        (lambda a: Implicit(residual=WRONG_FN, fixed_point=WRONG_FN), "give one of them"),
        (lambda a: Implicit(tolerance=0.0), "tolerance=0.0"),
        (
            lambda a: innerloop.unroll(RIDGE, ridge_start(), [], strategy=Implicit()),
            "this one has no steps",
        ),
        (
            lambda a: innerloop.unroll(
                innerloop.Problem(lambda p, h, b: (p["w"] - h) ** 2, innerloop.optim.sgd()),
                {"w": torch.tensor(1.0)},
                None,
                steps=1,
                hyper=a,
                strategy=Implicit(fixed_point=lambda p, h, b: h),
            ),
            "fixed_point.* as many equations",
        ),
        (
            lambda a: innerloop.metagradient(
                lambda traj, hyper: traj.params["w"].sum(), RIDGE, ridge_start(), None, steps=2,
                hyper={"l2": a, "weights": WEIGHTS}, wrt="hyper", strategy=Implicit(), compile=True,
            ),
            "cannot be compiled as a whole",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(make: Callable[[Tensor], object], match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        make(torch.tensor(1.0).requires_grad_())


def test_nothing_remains_of_a_gradient() -> None:
    """Backward passes with the garbage collector off: no cycle holds a graph."""
    import gc

    def once() -> None:
        a = torch.tensor(2.0).double().requires_grad_()
        x = implicit_root(lambda x, a: a * x**3 - x - 2, cubic_root(a.detach()), a)
        (g,) = torch.autograd.grad(x, a, create_graph=True)
        torch.autograd.grad(g, a)

    for _ in range(3):
        once()
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(8):
            once()
        after = len(gc.get_objects())
    finally:
        gc.enable()
    assert after - before < 50
