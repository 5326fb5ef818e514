"""DARTS, SAMA and T1-T2: the approximations that they promise, and where these become exact."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from innerloop import Implicit, InvalidInputError, NotDifferentiableError, Truncated
from innerloop.strategy import DARTS, SAMA, T1T2, Strategy, solvers
from tests.oracles import smooth_noise

pytestmark = pytest.mark.usefixtures("float64")
ALL = (DARTS(), SAMA(), T1T2())
each = pytest.mark.parametrize("strategy", ALL, ids=repr)

X, Y = 1.5 * smooth_noise(6, 3, phase=5.0), smooth_noise(6, phase=6.0)


def curved(params: Any, hyper: Any, batch: Any) -> Tensor:
    """Nothing in it is quadratic; every example has a weight."""
    errors = (X @ params["w"] + params["b"]).tanh() - Y
    return (hyper["weights"].sigmoid() * errors**2).sum() + (
        params["w"] * hyper["decay"]
    ).cosh().sum()


def outer(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
    w = traj.params["w"]
    return (w.sin() + w**2).sum() * traj.params["b"].cos() + hyper["decay"] ** 2


def inputs() -> dict[str, Any]:
    return {"weights": smooth_noise(6, phase=7.0), "decay": torch.tensor(0.4)}


def gradient(
    strategy: Strategy,
    loss: Callable[..., Any] = curved,
    optimizer: Any = None,
    hyper: Any = None,
    steps: int = 3,
    outer: Callable[..., Any] = outer,
    params: Any = None,
    **options: Any,
) -> Any:
    problem = innerloop.Problem(loss, optimizer or innerloop.optim.sgd(lr=0.1), **options)
    params = {"w": smooth_noise(3), "b": torch.tensor(0.2)} if params is None else params
    hyper = inputs() if hyper is None else hyper
    return innerloop.metagradient(
        outer, problem, params, None, steps=steps, hyper=hyper, wrt="hyper", strategy=strategy
    )[1]


def flat(grads: Any) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.utils._pytree.tree_leaves(grads)])


def slope(errors: list[float]) -> float:
    """By how much log error falls with log radius, which is halved each time."""
    return float(torch.tensor([a / b for a, b in itertools.pairwise(errors)]).log2().mean())


# -- DARTS -----------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda: innerloop.optim.sgd(lr=0.1),
    "momentum": lambda: innerloop.optim.sgd(lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda: innerloop.optim.adam(lr=0.1, eps=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_darts_becomes_the_last_step_as_the_radius_falls(optimizer: str, steps: int):
    make = OPTIMIZERS[optimizer]
    exact = flat(gradient(Truncated(1), optimizer=make(), steps=steps))
    errors = [
        (flat(gradient(DARTS(r), optimizer=make(), steps=steps)) - exact).norm().item()
        for r in (0.04, 0.02, 0.01)
    ]
    assert errors[-1] < 1e-4 * exact.norm()
    assert 1.9 < slope(errors) < 2.1


def test_darts_is_the_formula_of_the_paper():
    """By plain PyTorch: w' = w - ξ ∇ℓ, w± = w ± ε ∇L(w'), ε = 0.01 / |∇L(w')|."""
    xi, hyper = 0.1, {name: x.requires_grad_() for name, x in inputs().items()}
    w = {"w": smooth_noise(3).requires_grad_(), "b": torch.tensor(0.2, requires_grad=True)}
    slopes = torch.autograd.grad(curved(w, hyper, None), list(w.values()))
    ahead = {
        n: (p - xi * g).detach().requires_grad_()
        for (n, p), g in zip(w.items(), slopes, strict=True)
    }

    class Ends:
        params = ahead

    value = outer(Ends, hyper)  # type: ignore[arg-type]
    v = torch.autograd.grad(value, list(ahead.values()), retain_graph=True)
    direct = torch.autograd.grad(value, list(hyper.values()), allow_unused=True)
    eps = 0.01 / torch.cat([x.reshape(-1) for x in v]).norm()
    sides = [
        torch.autograd.grad(
            curved(
                {n: p + s * eps * x for (n, p), x in zip(w.items(), v, strict=True)}, hyper, None
            ),
            list(hyper.values()),
        )
        for s in (1, -1)
    ]
    expected = [
        (0 if d is None else d) - xi * (a - b) / (2 * eps)
        for d, a, b in zip(direct, *sides, strict=True)
    ]
    ours = gradient(DARTS(), steps=1, hyper={n: x.detach() for n, x in hyper.items()})
    torch.testing.assert_close(flat(ours), flat(expected), rtol=1e-12, atol=1e-14)


def test_darts_has_the_gradient_of_what_the_last_update_reads():
    def of(strategy: Strategy) -> Tensor:
        hyper = {**inputs(), "lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.2)}
        read = ("lr", "weight_decay")
        return flat(gradient(strategy, hyper=hyper, optimizer_hyper=read))

    torch.testing.assert_close(of(DARTS(1e-4)), of(Truncated(1)), rtol=1e-7, atol=1e-9)


# -- quadratic inner losses: a difference is exact, and so are the limits --------------------------

H = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.5]], dtype=torch.float64)


def quadratic(hessian: Tensor) -> Callable[..., Tensor]:
    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        away = params["w"] - hyper
        return away @ hessian @ away / 2

    return loss


def of_w(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
    return (traj.params["w"] ** 3).sum()


def of_quadratic(strategy: Strategy, hessian: Tensor, optimizer: Any, steps: int = 2) -> Tensor:
    return gradient(
        strategy,
        quadratic(hessian),
        optimizer,
        smooth_noise(3, phase=2.0),
        steps,
        of_w,
        {"w": smooth_noise(3)},
    )


def test_for_a_quadratic_every_radius_is_the_limit():
    for strategy in (DARTS, SAMA):
        found = [of_quadratic(strategy(r), H, innerloop.optim.adam(), 3) for r in (0.001, 0.1, 10)]
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)
    exact = of_quadratic(Truncated(1), H, innerloop.optim.adam(), 3)
    torch.testing.assert_close(of_quadratic(DARTS(), H, innerloop.optim.adam(), 3), exact)


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_they_are_exact_where_the_hessian_is_the_identity_over_the_rate(rate: float):
    """The solution is λ itself, and the outer loss its cube."""
    hessian, optimizer = torch.eye(3) / rate, innerloop.optim.sgd(lr=rate)
    truth = 3 * smooth_noise(3, phase=2.0) ** 2
    exact = of_quadratic(Implicit(solver=solvers.Dense()), hessian, optimizer)
    torch.testing.assert_close(exact, truth)
    for strategy in (SAMA(), T1T2(rate)):
        torch.testing.assert_close(of_quadratic(strategy, hessian, optimizer), truth)


def test_the_bias_is_the_curvature_times_the_scale():
    """At the solution λ of another Hessian: α H v instead of v."""
    solution = smooth_noise(3, phase=2.0)
    v, optimizer = 3 * solution**2, innerloop.optim.sgd(lr=0.4)
    for strategy in (SAMA(), T1T2(0.4)):
        found = gradient(
            strategy, quadratic(H), optimizer, solution, 1, of_w, {"w": solution.clone()}
        )
        torch.testing.assert_close(found, 0.4 * H @ v, rtol=1e-9, atol=1e-12)
        assert (found - v).norm() > 0.3 * v.norm()


def test_t1t2_is_one_more_step_of_gradient_descent_and_the_first_neumann_term():
    """Also where nothing is solved: the step begins where the loop ends."""
    alpha = 0.05
    hyper = {name: x.requires_grad_() for name, x in inputs().items()}
    problem = innerloop.Problem(curved, innerloop.optim.adam(lr=0.1))
    start = {"w": smooth_noise(3), "b": torch.tensor(0.2)}
    with torch.no_grad():
        end = innerloop.unroll(problem, start, None, steps=4, hyper=hyper).params
    ends = {n: p.requires_grad_() for n, p in end.items()}

    class Ends:
        params = ends

    value = outer(Ends, hyper)  # type: ignore[arg-type]
    v = torch.autograd.grad(value, list(ends.values()), retain_graph=True)
    slopes = torch.autograd.grad(curved(ends, hyper, None), list(ends.values()), create_graph=True)
    step = sum((-alpha * g * x).sum() for g, x in zip(slopes, v, strict=True))
    expected = torch.autograd.grad(value + step, list(hyper.values()))
    constants = {n: x.detach() for n, x in hyper.items()}
    arguments: dict[str, Any] = {
        "optimizer": innerloop.optim.adam(lr=0.1),
        "steps": 4,
        "hyper": constants,
    }
    ours = gradient(T1T2(alpha), **arguments)
    torch.testing.assert_close(flat(ours), flat(expected), rtol=1e-12, atol=1e-14)
    neumann = solvers.Neumann(alpha, max_iterations=1, must_converge=False)
    implicit = Implicit(solver=neumann, tolerance=float("inf"))
    torch.testing.assert_close(flat(ours), flat(gradient(implicit, **arguments)))


def test_sama_scales_as_the_last_update_of_adam_does():
    """The derivative of Adam's update by the gradient, written out."""
    lr, b1, b2, eps, steps = 0.1, 0.9, 0.99, 1e-2, 4
    target = smooth_noise(3, phase=2.0)
    w, m, s = smooth_noise(3), torch.zeros(3), torch.zeros(3)
    for t in range(1, steps + 1):
        g = H @ (w - target)
        m, s = b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g**2
        mean, root = m / (1 - b1**t), (s / (1 - b2**t)).sqrt()
        w = w - lr * mean / (root + eps)
    scale = (1 - b1) / (1 - b1**steps) / (root + eps)
    scale -= mean / (root + eps) ** 2 * (1 - b2) / (1 - b2**steps) * g / root
    expected = H @ (lr * scale * 3 * w**2)
    found = of_quadratic(SAMA(), H, innerloop.optim.adam(lr, (b1, b2), eps), steps)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_difference_of_sama_has_an_error_of_second_order():
    """Against the exact product: for SGD that is T1-T2 at the learning rate."""
    exact = flat(gradient(T1T2(0.1)))
    errors = [(flat(gradient(SAMA(r))) - exact).norm().item() for r in (0.04, 0.02, 0.01)]
    assert errors[-1] < 1e-4 * exact.norm()
    assert 1.9 < slope(errors) < 2.1


# -- modules, random numbers, what nothing depends on ----------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.6 * smooth_noise(*p.shape, phase=float(i)) + (i == 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.norm(self.body(x)).tanh(), 0.3, self.training))


def test_dropout_draws_the_same_masks_on_both_sides():
    def loss(model: nn.Module, hyper: Tensor, batch: Any) -> Tensor:
        errors = (model(X).squeeze(1) - Y) ** 2
        return (hyper.sigmoid() * errors).mean()

    def of(strategy: Strategy) -> Tensor:
        torch.manual_seed(4)
        model = Net()
        before = {n: x.clone() for n, x in model.state_dict().items()}
        found = innerloop.metagradient(
            lambda traj, hyper: torch.stack([p.square().sum() for p in traj.params.values()]).sum(),
            innerloop.Problem.from_module(model, loss, innerloop.optim.sgd(lr=0.1)),
            None,
            None,
            steps=3,
            hyper=smooth_noise(6, phase=7.0),
            wrt="hyper",
            strategy=strategy,
        )[1]
        assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
        return torch.cat([found, torch.rand(2)])

    torch.testing.assert_close(of(DARTS(1e-4)), of(Truncated(1)), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(of(SAMA(1e-4)), of(T1T2(0.1)), rtol=1e-6, atol=1e-8)


@each
def test_an_iterator_and_a_list_are_the_same(strategy: Strategy):
    def loss(params: Any, hyper: Any, batch: Tensor) -> Tensor:
        return (hyper * (params["w"] - batch) ** 2).sum()

    found = [
        innerloop.metagradient(
            of_w,
            innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1)),
            {"w": smooth_noise(3)},
            make([torch.tensor(float(t)) for t in range(4)]),
            hyper=torch.tensor(0.7),
            wrt="hyper",
            strategy=strategy,
        )[1]
        for make in (list, iter)
    ]
    assert torch.equal(*found)
    assert found[0] != 0


@each
def test_what_the_loss_does_not_read_has_no_part_in_it(strategy: Strategy):
    more = {"flag": "yes", "direct": torch.tensor(3.0), "whole": torch.arange(3)}
    grads = gradient(
        strategy,
        hyper={**inputs(), **more},
        outer=lambda traj, hyper: outer(traj, hyper) + hyper["direct"] ** 2,
    )
    assert grads["direct"] == 6
    assert grads["flag"] is None
    assert grads["whole"] is None
    plain = gradient(strategy)
    assert all(torch.equal(grads[name], plain[name]) for name in plain)


# -- what is refused -------------------------------------------------------------------------------


@each
def test_other_derivatives_are_refused(strategy: Strategy):
    hyper = inputs()
    for x in hyper.values():
        x.requires_grad_()
    start = {"w": smooth_noise(3).requires_grad_(), "b": torch.tensor(0.2)}
    problem = innerloop.Problem(curved, innerloop.optim.adam())

    def run(**more: Any) -> innerloop.Trajectory:
        return innerloop.unroll(
            problem, start, None, steps=4, hyper=hyper, strategy=strategy, save_at=[2]
        )

    named = rf"{type(strategy).__name__}\(.*\) does not differentiate with respect to params"
    with pytest.raises(NotDifferentiableError, match=named):
        run().params["w"].sum().backward()
    start = {n: p.detach() for n, p in start.items()}
    for what, value in {
        "losses or aux": lambda traj: traj.losses.sum(),
        "state at time 2": lambda traj: traj.at(2).params["w"].sum(),
        "optimizer's state": lambda traj: traj.at(-1).optimizer_state.mu["w"].sum(),
    }.items():
        with pytest.raises(NotDifferentiableError, match=f"{what}.* counts as a constant"):
            value(run()).backward()
    with pytest.raises(NotDifferentiableError, match="no second derivative"):
        torch.autograd.grad(run().params["w"].sum(), hyper["decay"], create_graph=True)
    with pytest.raises(NotDifferentiableError, match="eager code only"):
        torch.func.grad(lambda h: gradient(strategy, hyper={**inputs(), "decay": h})["decay"])(
            torch.tensor(0.4)
        )
    with pytest.raises(InvalidInputError, match="has no steps"):
        gradient(strategy, steps=0)


@pytest.mark.parametrize("strategy", [SAMA(), T1T2()], ids=repr)
def test_hyper_parameters_of_the_optimizer_are_refused(strategy: Strategy):
    with pytest.raises(NotDifferentiableError, match=r"not what the optimizer reads.*DARTS\(\)"):
        gradient(strategy, hyper={**inputs(), "lr": torch.tensor(0.1)}, optimizer_hyper=("lr",))


@pytest.mark.parametrize("strategy", [DARTS(), SAMA()], ids=repr)
def test_gradients_that_are_not_those_of_the_loss_are_refused(strategy: Strategy):
    def loss(params: Any, hyper: Any, batch: Any, target: Tensor) -> Tensor:
        return hyper["decay"] * ((params["w"] - target) ** 2).sum() + params["b"] ** 2

    with pytest.raises(NotDifferentiableError, match=r"targets=.*Truncated\(1\)"):
        gradient(strategy, loss, targets=lambda params, hyper, batch: params["w"] / 2)
    with pytest.raises(
        NotDifferentiableError, match=r"evaluates the loss several times.*Truncated"
    ):
        gradient(strategy, optimizer=innerloop.optim.lbfgs())


def test_t1t2_differentiates_targets():
    def loss(params: Any, hyper: Any, batch: Any, target: Tensor) -> Tensor:
        return ((params["w"] - target) ** 2).sum() / 2 + params["b"] ** 2

    found = gradient(
        T1T2(0.5),
        loss,
        targets=lambda params, hyper, batch: hyper["decay"] * torch.ones(3),
        outer=lambda traj, hyper: traj.params["w"].sum(),
    )
    torch.testing.assert_close(found["decay"], torch.tensor(1.5))


@pytest.mark.parametrize("given", [0, -1.0, float("inf"), float("nan"), True, "0.01", None])
@pytest.mark.usefixtures("types_unchecked")
def test_sizes_that_are_none_are_refused(given: Any):
    for strategy, name in ((DARTS, "radius"), (SAMA, "radius"), (T1T2, "scale")):
        with pytest.raises(InvalidInputError, match=f"{name}={given!r}: write"):
            strategy(given)
