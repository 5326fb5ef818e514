"""`innerloop.inspect` beyond the Jacobian: influence, products, gains, exponents, curvature, paths
by step and by state, and strategies against each other. On a quadratic loss all of it are matrix
powers; for the rest finite differences are the truth."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import inspect
from tests.oracles import assert_derivative, derivative

pytestmark = pytest.mark.usefixtures("float64")

T = 6
LR, MU = 0.2, 0.8
CURVATURE = torch.tensor([[2.0, 0.3, 0.1], [0.3, 1.0, -0.2], [0.1, -0.2, 0.5]], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)


def vector(named: Any) -> Tensor:
    return torch.cat([named["a"].reshape(1), named["b"]])


def quadratic(params: Any, hyper: Any, batch: Any) -> Tensor:
    x = vector(params)
    return x @ CURVATURE @ x / 2


def outer(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
    return WEIGHTS @ vector(traj.params).sin()


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(START[0].clone())
        self.b = nn.Parameter(START[1:].clone())

    def forward(self) -> Tensor:
        return quadratic(dict(self.named_parameters()), None, None)


RULES = {
    "sgd": (innerloop.optim.sgd(lr=LR), lambda p: torch.optim.SGD(p, lr=LR)),
    "momentum": (
        innerloop.optim.sgd(lr=LR, momentum=MU),
        lambda p: torch.optim.SGD(p, lr=LR, momentum=MU),
    ),
}


def run(rule: str, how: str) -> Any:
    """A finished loop of T steps: a trajectory, or a tracked loop."""
    pure, of_torch = RULES[rule]
    if how == "track":
        model = Quadratic()
        with innerloop.track(model, of_torch(model.parameters())) as loop:
            for _ in range(T):
                loop.step(loop.model())
        return loop
    start = {"a": START[0].clone().requires_grad_(), "b": START[1:].clone().requires_grad_()}
    strategies = {
        "StoreAll": innerloop.StoreAll(),
        "Checkpointed": innerloop.Checkpointed(),
        "two slots": innerloop.Checkpointed(slots=2),
    }
    return innerloop.unroll(
        innerloop.Problem(quadratic, pure), start, None, steps=T, strategy=strategies[how]
    )


EVERY_LOOP = pytest.mark.parametrize("how", ["StoreAll", "Checkpointed", "two slots", "track"])
EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))


def full(rule: str) -> Tensor:
    """One step on (x, momentum): m' = mu m + A x, x' = x - lr m'."""
    mu = MU if rule == "momentum" else 0.0
    top = torch.cat([EYE - LR * CURVATURE, -LR * mu * EYE], 1)
    return torch.cat([top, torch.cat([CURVATURE, mu * EYE], 1)])


def power(rule: str, steps: int) -> Tensor:
    """d x(t + steps) / d x(t), with the momentum at t held fixed."""
    return torch.linalg.matrix_power(full(rule), steps)[:3, :3]


def state(rule: str, steps: int) -> Tensor:
    begin = torch.cat([START, torch.zeros(3)])
    return torch.linalg.matrix_power(full(rule), steps) @ begin


def close(found: Any, truth: Any, tol: float = 1e-10) -> None:
    torch.testing.assert_close(torch.as_tensor(found).double(), truth, rtol=tol, atol=tol)


# -- influence -------------------------------------------------------------------------------------


@EVERY_LOOP
@EVERY_RULE
def test_influence_of_a_quadratic(rule: str, how: str) -> None:
    found = inspect.influence(run(rule, how), outer, probes=200)
    end = state(rule, T)[:3]
    rows = [WEIGHTS * end.cos() @ power(rule, T - t) for t in range(T + 1)]
    close(found.params["a"], torch.stack([r[0].abs() for r in rows]))
    close(found.params["b"], torch.stack([r[1:].norm() for r in rows]))
    close(found.whole, torch.stack([r.norm() for r in rows]))
    close(found.value, WEIGHTS @ end.sin())
    assert found.growth == pytest.approx(
        max(float(r.norm()) for r in rows) / float(rows[-1].norm())
    )
    norms = torch.stack([power(rule, T - t).norm() for t in range(T + 1)])
    assert found.jacobian is not None
    assert found.jacobian_error is not None
    assert bool(((found.jacobian - norms).abs() <= 4 * found.jacobian_error + 1e-12).all())
    assert bool((found.jacobian_error[:-1] < 0.15 * norms[:-1]).all())
    close(found.jacobian[-1], torch.tensor(3.0).sqrt())
    assert repr(found).startswith("Influence on an outer loss of")


@pytest.mark.parametrize(
    "strategy", [innerloop.StoreAll(), innerloop.Checkpointed(slots=2), "track"]
)
def test_influence_of_hyper_in_each_step(strategy: Any) -> None:
    """Step t adds -a_{t+1}' A x_t to dL/dlr; L also depends on lr directly."""
    hyper: Any = {"lr": torch.tensor(LR, requires_grad=True), "text": "kept"}
    problem = innerloop.Problem(quadratic, innerloop.optim.sgd(), optimizer_hyper=("lr",))
    start = {"a": START[0].clone().requires_grad_(), "b": START[1:].clone().requires_grad_()}
    traj: Any
    if strategy == "track":
        model, hyper = Quadratic(), {"lr": hyper["lr"]}
        rule = torch.optim.SGD(model.parameters(), lr=1.0)
        with innerloop.track(model, rule, hyper=hyper) as traj:
            for _ in range(T):
                traj.step(traj.model())
    else:
        traj = innerloop.unroll(problem, start, None, steps=T, hyper=hyper, strategy=strategy)

    def with_penalty(traj: Any, hyper: Any) -> Tensor:
        return outer(traj, hyper) + 3 * hyper["lr"]

    found = inspect.influence(traj, with_penalty)
    end = state("sgd", T)[:3]
    truth = [
        -(WEIGHTS * end.cos() @ power("sgd", T - t - 1)) @ CURVATURE @ state("sgd", t)[:3]
        for t in range(T)
    ]
    close(found.hyper["['lr']"], torch.stack(truth).abs())
    split = inspect.paths(traj, with_penalty, wrt={"lr": hyper["lr"]}, steps=True)
    assert split.steps is not None
    close(split.steps["lr"], torch.stack([*truth, torch.tensor(3.0)]))
    close(split.total["lr"], sum(truth) + 3)
    close(sum(row["lr"] for row in split.through.values()) + split.direct["lr"], sum(truth) + 3)


def test_a_step_that_reads_another_rate_adds_nothing() -> None:
    model, rate = Quadratic(), torch.tensor(LR, requires_grad=True)
    with innerloop.track(model, innerloop.optim.sgd(), hyper={"lr": rate}) as loop:
        loop.step(loop.model())
        loop.step(loop.model(), hyper={"lr": torch.tensor(LR, requires_grad=True)})
        loop.step(loop.model())
    found = inspect.influence(loop, outer).hyper["['lr']"]
    assert found[1] == 0
    assert bool((found[[0, 2]] > 0).all())


@EVERY_LOOP
def test_an_outer_loss_that_reads_the_way(how: str) -> None:
    """The losses and a state in between add to the adjoint where they are read."""
    loop = run("sgd", how)
    kept = how in ("StoreAll", "track")

    def reads(traj: Any, hyper: Any) -> Tensor:
        middle = vector(traj.at(2).params).square().sum() / 2 if kept else 0
        return traj.losses.sum() + middle

    found = inspect.influence(loop, reads)
    x = [state("sgd", t)[:3] for t in range(T + 1)]
    adjoint = torch.zeros(3)
    rows = [adjoint]
    for t in reversed(range(T)):
        adjoint = power("sgd", 1) @ adjoint + CURVATURE @ x[t]
        if t == 2 and kept:
            adjoint = adjoint + x[t]
        rows.append(adjoint)
    close(found.whole, torch.stack([r.norm() for r in rows[::-1]]))


def test_a_state_that_is_saved_counts_where_it_is_read() -> None:
    start = {"a": START[0].clone().requires_grad_(), "b": START[1:].clone().requires_grad_()}
    problem = innerloop.Problem(quadratic, innerloop.optim.sgd(lr=LR))
    strategy = innerloop.Checkpointed(slots=2)
    traj = innerloop.unroll(problem, start, None, steps=T, save_at=[2], strategy=strategy)
    found = inspect.influence(traj, lambda traj, hyper: WEIGHTS @ vector(traj.at(2).params))
    truth = [(WEIGHTS @ power("sgd", 2 - t)).norm() if t <= 2 else 0.0 for t in range(T + 1)]
    close(found.whole, torch.tensor(truth))


def test_what_influence_cannot_be_asked() -> None:
    loop = run("sgd", "StoreAll")
    problem = innerloop.Problem(quadratic, innerloop.optim.sgd(lr=LR))
    constant = {"a": START[0], "b": START[1:]}
    with pytest.raises(innerloop.InvalidInputError, match="probes=-1"):
        inspect.influence(loop, outer, probes=-1)
    with pytest.raises(innerloop.InvalidInputError, match="scalar"):
        inspect.influence(loop, lambda traj, hyper: vector(traj.params))
    with pytest.raises(innerloop.NotDifferentiableError, match="does not depend"):
        inspect.influence(loop, torch.ones((), requires_grad=True) * 2)
    for strategy in (innerloop.StoreAll(), innerloop.Checkpointed()):
        traj = innerloop.unroll(problem, constant, None, steps=2, strategy=strategy)
        with pytest.raises(innerloop.InvalidInputError, match="depends on the trajectory"):
            inspect.influence(traj, outer)
    start = {n: p.clone().requires_grad_() for n, p in constant.items()}
    traj = innerloop.unroll(problem, start, None, steps=4, strategy=innerloop.Truncated(last=2))
    with pytest.raises(innerloop.NotDifferentiableError, match="StoreAll"):
        inspect.influence(traj, outer)


# -- products --------------------------------------------------------------------------------------


@EVERY_LOOP
@EVERY_RULE
@pytest.mark.parametrize(("time", "wrt"), [(T, 0), (4, 1), (3, 3)])
def test_products_are_matrix_powers(rule: str, how: str, time: int, wrt: int) -> None:
    loop = run(rule, how)
    v, u = {"b": torch.tensor([1.0, -3.0])}, {"a": torch.tensor(2.0), "b": torch.tensor([0.5, 1.0])}
    truth = power(rule, time - wrt)
    pushed = inspect.jvp(loop, time, wrt, v)
    close(vector(pushed), truth @ torch.tensor([0.0, 1.0, -3.0]))
    pulled = inspect.vjp(loop, time, wrt, u)
    close(vector(pulled), truth.T @ torch.tensor([2.0, 0.5, 1.0]))
    jacobian = inspect.jacobian(loop, time, wrt)
    close(torch.cat([jacobian["b"]["a"].reshape(2, 1), jacobian["b"]["b"]], 1), truth[1:])


@pytest.mark.parametrize("strategy", [innerloop.StoreAll(), innerloop.Checkpointed(slots=2)])
def test_a_jacobian_by_hyper_takes_forward_mode(strategy: innerloop.strategy.Strategy) -> None:
    """One input, three outputs: one pass, as the progress says."""
    hyper = {"lr": torch.tensor(LR, requires_grad=True)}
    problem = innerloop.Problem(quadratic, innerloop.optim.sgd(), optimizer_hyper=("lr",))
    start = {"a": START[0], "b": START[1:]}
    traj = innerloop.unroll(problem, start, None, steps=4, hyper=hyper, strategy=strategy)
    seen: list[tuple[str, int, int | None]] = []
    jacobian = inspect.jacobian(traj, -1, hyper, progress=lambda *told: seen.append(told))
    truth = -4 * CURVATURE @ power("sgd", 3) @ START
    close(torch.cat([jacobian["a"]["lr"].reshape(1), jacobian["b"]["lr"]]), truth)
    assert seen == [("columns", 1, 1)]
    pulled = inspect.vjp(traj, -1, hyper, {"b": torch.tensor([1.0, 2.0])})
    close(pulled["lr"], truth[1] + 2 * truth[2])


def test_a_direction_that_does_not_fit() -> None:
    loop = run("sgd", "StoreAll")
    with pytest.raises(innerloop.InvalidInputError, match=r"there are only \['a', 'b'\]"):
        inspect.jvp(loop, 2, 0, {"c": torch.zeros(1)})
    with pytest.raises(innerloop.InvalidInputError, match=r"has shape \(3,\), but 'b' has \(2,\)"):
        inspect.vjp(loop, 2, 0, {"b": torch.zeros(3)})


def adam_run(how: str, lr: float | Tensor = 0.05, shift: float = 0.0, at: int = 0) -> Any:
    """Adam on a loss that is no quadratic; the parameters are nudged at one time."""
    loss_of = lambda x: (x.sin() * WEIGHTS).sum() + x.square().sum() / 3  # noqa: E731
    problem = innerloop.Problem(
        lambda p, h, b: loss_of(vector(p)), innerloop.optim.adam(lr=0.05, eps=1e-3)
    )
    start = {"a": START[0].clone().requires_grad_(), "b": START[1:].clone().requires_grad_()}
    strategy = innerloop.StoreAll() if how == "StoreAll" else innerloop.Checkpointed(slots=2)
    if not shift:
        return innerloop.unroll(problem, start, None, steps=T, strategy=strategy)
    middle = innerloop.unroll(problem, start, None, steps=at).at(-1)
    moved = {"a": middle.params["a"].detach(), "b": middle.params["b"].detach() + shift * NUDGE}
    return innerloop.unroll(problem, middle._replace(params=moved), None, steps=T - at)


NUDGE = torch.tensor([0.7, -1.1], dtype=torch.float64)


@pytest.mark.parametrize("how", ["StoreAll", "Checkpointed"])
@pytest.mark.parametrize("at", [0, 2])
def test_adam_against_finite_differences(how: str, at: int) -> None:
    traj = adam_run(how)
    pushed = inspect.jvp(traj, -1, at, {"b": NUDGE})
    for i in range(3):
        truth = derivative(
            lambda h, i=i: float(
                vector(adam_run("StoreAll", shift=h or 1e-300, at=at).params).detach()[i]
            )  # type: ignore[misc]
        )
        assert_derivative(float(vector(pushed)[i]), truth, f"d x{i}")
    pulled = inspect.vjp(traj, -1, at, {"a": torch.tensor(1.0)})
    close(NUDGE @ pulled["b"], pushed["a"], 1e-9)
    found = inspect.influence(traj, lambda traj, hyper: traj.params["a"])
    close(found.params["b"][at], pulled["b"].norm(), 1e-9)


def test_an_operation_without_forward_mode_is_pushed_by_two_pullbacks() -> None:
    """cdist has a second derivative here, but not everything has a forward mode."""
    from tests.small_problems import Square

    problem = innerloop.Problem(
        lambda p, h, b: (Square.apply(vector(p)) * WEIGHTS).sum() / 2, innerloop.optim.sgd(lr=LR)
    )
    start = {"a": START[0].clone().requires_grad_(), "b": START[1:].clone().requires_grad_()}
    for strategy in (innerloop.StoreAll(), innerloop.Checkpointed(slots=2)):
        traj = innerloop.unroll(problem, start, None, steps=3, strategy=strategy)
        pushed = inspect.jvp(traj, -1, 0, {"b": NUDGE})
        close(pushed["b"], NUDGE * (1 - LR * WEIGHTS[1:]) ** 3)


# -- gains -----------------------------------------------------------------------------------------


@EVERY_LOOP
@EVERY_RULE
def test_gains_are_singular_values(rule: str, how: str) -> None:
    loop = run(rule, how)
    _, s, v = torch.linalg.svd(power(rule, 4))
    found = inspect.gains(loop, 5, 1, k=2)
    close(found.values, s[:2], 1e-8)
    for i in range(2):
        right = vector({n: x[i] for n, x in found.inputs.items()})
        left = vector({n: x[i] for n, x in found.outputs.items()})
        close((right @ v[i]).abs(), torch.tensor(1.0), 1e-8)
        close(power(rule, 4) @ right, s[i] * left, 1e-8)
    smallest = inspect.gains(loop, 5, 1, k=1, which="smallest")
    close(smallest.values, s[-1:], 1e-8)
    assert (found.time, found.wrt) == (5, 1)
    assert "pairs of products" in repr(found)


def network(width: int = 4) -> tuple[innerloop.Problem, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator)
    params = {
        "w": torch.randn(4, width, generator=generator) / 2,
        "v": torch.randn(width, 1, generator=generator) / 2,
    }

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        return ((batch @ params["w"]).tanh() @ params["v"] - batch[:, :1] ** 2).square().mean()

    problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.3, momentum=0.5))
    return problem, {n: p.requires_grad_() for n, p in params.items()}, x


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [innerloop.StoreAll(), innerloop.Checkpointed(slots=3)])
def test_gains_of_a_network_against_a_dense_svd(strategy: innerloop.strategy.Strategy) -> None:
    problem, params, x = network()
    traj = innerloop.unroll(problem, params, [x] * 6, strategy=strategy)
    jacobian = inspect.jacobian(innerloop.unroll(problem, params, [x] * 6), 6, 0)
    matrix = torch.cat(
        [
            torch.cat([jacobian[i][j].reshape(params[i].numel(), -1) for j in params], 1)
            for i in params
        ]
    )
    truth = torch.linalg.svdvals(matrix)
    found = inspect.gains(traj, 6, 0, k=3)
    close(found.values, truth[:3], 1e-8)
    close(inspect.gains(traj, k=2, which="smallest").values, truth.flip(0)[:2], 1e-8)
    assert found.products <= len(matrix)
    assert float(found.residuals.max()) <= 1e-10


def test_equal_gains_are_all_found() -> None:
    """SGD on |w|²/2 multiplies every direction alike: one Krylov sequence sees one of them."""
    problem = innerloop.Problem(
        lambda p, h, b: (p["w"].square() * b).sum() / 2, innerloop.optim.sgd(lr=0.5)
    )
    curvature = torch.tensor([0.2, 0.2, 0.2, 1.0, 1.0, 1.5, 1.7, 1.8, 1.9, 0.3])
    start = {"w": torch.ones(10, requires_grad=True)}
    traj = innerloop.unroll(problem, start, [curvature] * 2)
    found = inspect.gains(traj, k=4)
    close(found.values, torch.tensor([0.81, 0.81, 0.81, 0.85**2]), 1e-8)


def test_gains_that_are_not_done_say_so() -> None:
    problem, params, x = network()
    traj = innerloop.unroll(problem, params, [x] * 10)
    with pytest.warns(innerloop.CostWarning, match="raise max_products"):
        found = inspect.gains(traj, k=3, max_products=3)
    assert float(found.residuals.max()) > 1e-10
    for wrong in ({"k": 0}, {"which": "middle"}):
        with pytest.raises(innerloop.InvalidInputError, match="write"):
            inspect.gains(traj, **wrong)


# -- exponents -------------------------------------------------------------------------------------


@EVERY_LOOP
@EVERY_RULE
def test_exponents_of_a_linear_map(rule: str, how: str) -> None:
    """The sum of all holds after any number of steps: it is ln |det|. The first step of a momentum
    ignores the buffer, as torch does, and is left out."""
    loop = run(rule, how)
    size = 6 if rule == "momentum" else 3
    found = inspect.lyapunov(loop, k=size, start=1)
    matrix = full(rule)[:size, :size]
    close(found.exponents.sum(), torch.linalg.det(matrix).abs().log())
    with pytest.raises(innerloop.InvalidInputError, match=f"from 1 to {size}"):
        inspect.lyapunov(loop, k=size + 1)
    assert "shrinks e-fold" in repr(found)


@pytest.mark.slow
@EVERY_RULE
def test_exponents_of_a_long_linear_map(rule: str) -> None:
    """Zero is a fixed point, so the steps may be many."""
    start = {"a": torch.zeros((), requires_grad=True), "b": torch.zeros(2, requires_grad=True)}
    problem = innerloop.Problem(quadratic, RULES[rule][0])
    traj = innerloop.unroll(problem, start, None, steps=90, strategy=innerloop.Checkpointed())
    size = 2 if rule == "momentum" else 3
    found = inspect.lyapunov(traj, k=size, skip=60)
    truth = torch.linalg.eigvals(full(rule)).abs().log().sort(descending=True)[0]
    # Complex pairs turn, so their average settles with 1/steps only.
    close(found.exponents, truth[:size], 1e-10 if rule == "sgd" else 2e-2)


def test_a_chaotic_learning_rate_on_a_quartic() -> None:
    """w⁴/4 - w²/2 with lr 1.4: w' = w - lr (w³ - w), whose exponent is the mean of
    ln |1 - lr (3w² - 1)|, which is positive."""
    problem = innerloop.Problem(
        lambda p, h, b: p["w"] ** 4 / 4 - p["w"] ** 2 / 2, innerloop.optim.sgd(lr=1.4)
    )
    start = {"w": torch.tensor(0.3, requires_grad=True)}
    steps = 40
    traj = innerloop.unroll(problem, start, None, steps=steps)
    logs = []
    for t in range(steps):
        w = float(traj.at(t).params["w"].detach())
        logs.append(math.log(abs(1 - 1.4 * (3 * w * w - 1))))
    found = inspect.lyapunov(traj)
    close(found.history[:, 0], torch.tensor(logs))
    close(found.exponents[0], torch.tensor(sum(logs) / steps))
    assert float(found.exponents[0]) > 0.1
    assert "grows e-fold" in repr(found)
    twin = inspect.lyapunov(traj, start=20, end=40, skip=10)
    close(twin.exponents[0], torch.tensor(sum(logs[30:40]) / 10))


# -- curvature -------------------------------------------------------------------------------------


@EVERY_LOOP
def test_curvature_of_a_quadratic(how: str) -> None:
    found = inspect.curvature(run("momentum", how), [0, 3], k=2)
    truth = torch.linalg.eigvalsh(CURVATURE)
    close(found.largest, truth.flip(0)[:2].expand(2, 2))
    close(found.smallest, truth[:2].expand(2, 2))
    assert found.times == (0, 3)


def test_curvature_of_a_network_by_lanczos() -> None:
    pytest.importorskip("scipy")
    problem, params, x = network(width=20)
    traj = innerloop.unroll(problem, params, [x] * 4, strategy=innerloop.Checkpointed())
    found = inspect.curvature(traj, [3], k=2, tol=1e-10)
    at = {n: p.detach() for n, p in innerloop.unroll(problem, params, [x] * 3).params.items()}
    flat = torch.cat([p.flatten() for p in at.values()])

    def loss(flat: Tensor) -> Tensor:
        named = {"w": flat[:80].view(4, 20), "v": flat[80:].view(20, 1)}
        found = problem.loss(named, None, x)
        assert isinstance(found, Tensor)
        return found

    truth = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
    close(found.largest[0], truth.flip(0)[:2], 1e-8)
    close(found.smallest[0], truth[:2], 1e-8)
    with pytest.raises(innerloop.InvalidInputError, match="0 to 3"):
        inspect.curvature(traj, [4])


# -- paths -----------------------------------------------------------------------------------------


@pytest.mark.covering(2)
@EVERY_LOOP
@EVERY_RULE
@pytest.mark.parametrize(("time", "wrt"), [(T, 0), (3, 0), (4, 2), (3, 3)])
def test_paths_by_state_and_by_step(rule: str, how: str, time: int, wrt: int) -> None:
    """Through (x, m) at time t goes everything: with state=True nothing is left around it."""
    loop = run(rule, how)
    found = inspect.paths(loop, outer, time, wrt, state=True, steps=True)
    gradient = WEIGHTS * state(rule, T)[:3].cos()
    end = torch.linalg.matrix_power(full(rule), T - time)[:3]
    begin = torch.linalg.matrix_power(full(rule), time - wrt)[:, :3]
    split = {"x": gradient @ end[:, :3] @ begin[:3], "m": gradient @ end[:, 3:] @ begin[3:]}
    through = {n: vector(row) for n, row in found.through.items()}
    close(through["a"] + through["b"], split["x"])
    carried = [x for n, x in through.items() if n.startswith("optimizer_state")]
    if carried:
        close(sum(carried), split["m"])
    close(vector(found.total), gradient @ power(rule, T - wrt))
    close(vector(found.direct), torch.zeros(3), 1e-12)
    whole = {n: found.direct[n] + sum(row[n] for row in found.through.values()) for n in ("a", "b")}
    close(vector(whole), vector(found.total), 1e-12)
    assert found.steps is not None
    adjoint = [gradient @ power(rule, T - t) for t in range(wrt, T + 1)]
    for i, (a, b) in enumerate(itertools.pairwise(adjoint)):
        close(vector({n: x[i] for n, x in found.steps.items()}), a - b)
    close(vector({n: x.sum(0) for n, x in found.steps.items()}), vector(found.total), 1e-12)


def test_without_state_the_momentum_goes_around() -> None:
    found = inspect.paths(run("momentum", "two slots"), outer, 3)
    gradient = WEIGHTS * state("momentum", T)[:3].cos()
    carried = (
        gradient
        @ torch.linalg.matrix_power(full("momentum"), T - 3)[:3, 3:]
        @ torch.linalg.matrix_power(full("momentum"), 3)[3:, :3]
    )
    close(vector(found.direct), carried)
    assert set(found.through) == {"a", "b"}


# -- strategies ------------------------------------------------------------------------------------


def test_strategies_against_each_other() -> None:
    """Checkpointed is exact; Truncated(last=2) is x -> M² in place of M⁶."""
    traj = run("sgd", "StoreAll")
    same = inspect.compare(traj, outer, innerloop.Checkpointed(slots=2))
    assert same.cosine["whole"] == pytest.approx(1, abs=1e-12)
    assert same.difference["whole"] < 1e-12
    found = inspect.compare(traj, outer, innerloop.FirstOrder())
    gradient = WEIGHTS * state("sgd", T)[:3].cos()
    exact = gradient @ power("sgd", T)
    cosine = gradient @ exact / gradient.norm() / exact.norm()
    assert found.cosine["whole"] == pytest.approx(float(cosine), abs=1e-10)
    assert found.ratio["whole"] == pytest.approx(float(gradient.norm() / exact.norm()), abs=1e-10)
    assert "FirstOrder() against StoreAll()" in repr(found)
    with pytest.raises(innerloop.InvalidInputError, match="tracked loop"):
        inspect.compare(run("sgd", "track"), outer, innerloop.FirstOrder())


# -- random numbers, data, what is left alone ------------------------------------------------------


@pytest.mark.parametrize("strategy", [innerloop.StoreAll(), innerloop.Checkpointed(slots=2)])
def test_dropout_is_the_same_in_every_product(strategy: innerloop.strategy.Strategy) -> None:
    """The loop draws random numbers; every product must see those of the first run."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
    x = torch.randn(6, 3)
    problem = innerloop.Problem.from_module(
        model, lambda m, hyper, batch: m(batch).square().mean(), innerloop.optim.sgd(lr=0.3)
    )
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    traj = innerloop.unroll(problem, params, [x] * 5, strategy=strategy)
    before = torch.get_rng_state()
    value = torch.stack([p.square().sum() for p in traj.params.values()]).sum()
    cotangent = {n: 2 * p.detach() for n, p in traj.params.items()}
    pulled = inspect.vjp(traj, -1, 0, cotangent)
    found = inspect.influence(traj, lambda traj, hyper: value, probes=3)
    exact = torch.autograd.grad(value, list(params.values()), retain_graph=True)
    for (name, g), truth in zip(pulled.items(), exact, strict=True):
        close(g, truth, 1e-12)
        close(found.params[name][0], truth.norm(), 1e-12)
    direction = {n: torch.randn(p.shape) for n, p in params.items()}
    after = torch.get_rng_state()
    pushed = inspect.jvp(traj, -1, 0, direction)
    ours = sum(float((cotangent[n] * x).sum()) for n, x in pushed.items())
    theirs = sum(float((g * direction[n]).sum()) for n, g in zip(params, exact, strict=True))
    assert ours == pytest.approx(theirs, rel=1e-12)
    later = inspect.vjp(traj, 4, 2, {"3.bias": torch.ones(1)})
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(before, after)
    assert set(later) == set(params)


def test_data_of_an_iterator() -> None:
    """Checkpointed keeps them; StoreAll has them in its graph alone, and says what to write."""
    problem, params, x = network()

    def entries() -> Any:
        return (x[t : t + 8] for t in range(5))

    whole = inspect.jvp(
        innerloop.unroll(problem, params, list(entries())), 4, 1, {"v": torch.ones(4, 1)}
    )
    traj = innerloop.unroll(problem, params, entries(), strategy=innerloop.Checkpointed())
    close(inspect.jvp(traj, 4, 1, {"v": torch.ones(4, 1)})["w"], whole["w"], 1e-12)
    gone = innerloop.unroll(problem, params, entries())
    with pytest.raises(innerloop.InvalidInputError, match="was an iterator"):
        inspect.jvp(gone, 4, 1, {"v": torch.ones(4, 1)})


def test_the_graph_is_still_there_afterwards() -> None:
    for how in ("StoreAll", "Checkpointed", "track"):
        loop = run("momentum", how)
        traj = loop if isinstance(loop, innerloop.Trajectory) else loop.trajectory
        first = inspect.influence(loop, outer, probes=2)
        again = inspect.influence(loop, outer, probes=2)
        assert torch.equal(first.whole, again.whole)
        outer(traj, None).backward()


def test_plots() -> None:
    pytest.importorskip("matplotlib")
    loop = run("momentum", "StoreAll")
    results: list[Any] = [
        inspect.influence(loop, outer, probes=2),
        inspect.gains(loop, k=2),
        inspect.lyapunov(loop, k=2),
        inspect.curvature(loop),
        inspect.paths(loop, outer, 3, state=True),
        inspect.compare(loop, outer, innerloop.FirstOrder()),
    ]
    for found in results:
        figure = found.plot()
        assert len(figure.axes) == 1
        assert found.plot(figure.axes[0]) is figure


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    found = inspect.influence(run("sgd", "StoreAll"), outer)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(innerloop.MissingExtraError, match=r"innerloop\[plot\]"):
        found.plot()
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    problem, params, x = network(width=20)
    with pytest.raises(innerloop.MissingExtraError, match=r"innerloop\[inspect\]"):
        inspect.curvature(innerloop.unroll(problem, params, [x]))


@pytest.mark.parametrize("how", ["StoreAll", "Checkpointed"])
def test_a_product_where_gradients_are_off_is_the_same(how: str) -> None:
    traj = run("momentum", how)
    with torch.no_grad():
        pushed = inspect.jvp(traj, -1, 0, {"b": NUDGE})
    torch.testing.assert_close(pushed, inspect.jvp(traj, -1, 0, {"b": NUDGE}))


def test_a_single_probe_has_no_error() -> None:
    found = inspect.influence(run("sgd", "StoreAll"), outer, probes=1)
    assert found.jacobian_error is not None
    assert found.jacobian_error.isnan().all()


def test_the_error_of_the_jacobian_is_its_spread_over_seeds() -> None:
    traj = run("momentum", "StoreAll")
    found = [inspect.influence(traj, outer, probes=8, seed=seed) for seed in range(60)]
    norms, errors = (
        torch.stack([getattr(i, name)[: T - 1] for i in found])
        for name in ("jacobian", "jacobian_error")
    )
    ratio = norms.std(0) / errors.square().mean(0).sqrt()
    assert ratio.min() > 0.7
    assert ratio.max() < 1.4


@pytest.mark.parametrize("how", ["StoreAll", "Checkpointed", "track"])
def test_times_are_counted_from_the_end_too(how: str) -> None:
    traj = run("momentum", how)
    late, same = (inspect.gains(traj, time, wrt, k=1) for time, wrt in ((-2, -4), (T - 1, T - 3)))
    assert (late.time, late.wrt) == (same.time, same.wrt) == (T - 1, T - 3)
    torch.testing.assert_close(late.values, same.values)
    params = dict(traj.model.named_parameters()) if how == "track" else traj.params
    value = WEIGHTS @ vector(params).sin()
    late_paths, same_paths = (
        inspect.paths(traj, value, time, wrt) for time, wrt in ((-2, -4), (T - 1, T - 3))
    )
    assert (late_paths.time, late_paths.wrt) == (same_paths.time, same_paths.wrt) == (T - 1, T - 3)
    torch.testing.assert_close(late_paths.total, same_paths.total)
    torch.testing.assert_close(late_paths.through, same_paths.through)
