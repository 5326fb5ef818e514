"""Evolution strategies: an unbiased estimate of the outer gradient, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop
from innerloop import Evolution
from innerloop.errors import InvalidInputError, NonFiniteError, NotDifferentiableError
from innerloop.strategy import Estimate
from innerloop.strategy._forecast import Cost, LinearCost
from tests.oracles import smooth_noise

pytestmark = pytest.mark.usefixtures("float64")

CURVATURE = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
PROBLEM = innerloop.Problem(
    lambda params, hyper, batch: (CURVATURE * (params["w"] - hyper["target"]) ** 2).sum() / 2,
    innerloop.optim.sgd(lr=0.4),
)


def outer(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
    return (traj.params["w"] - 1).square().sum() / 2


def gradient(strategy: innerloop.strategy.Strategy, steps: int = 3, outer: Any = outer) -> Tensor:
    """The outer gradient by the target; the outer loss is quadratic in it."""
    found: Tensor = innerloop.metagradient(
        outer,
        PROBLEM,
        {"w": torch.zeros(3)},
        None,
        steps=steps,
        hyper={"target": TARGET},
        wrt="hyper",
        strategy=strategy,
    )[1]["target"]
    return found


def exact(steps: int = 3) -> Tensor:
    """With r = 1 - 0.4 c, w_T = (1 - r^T) target."""
    reached = 1 - (1 - 0.4 * CURVATURE) ** steps
    return reached * (reached * TARGET - 1)


def test_the_closed_form_is_the_gradient() -> None:
    torch.testing.assert_close(gradient(innerloop.StoreAll()), exact(), rtol=1e-12, atol=0)


def test_the_mean_of_ten_thousand_pairs() -> None:
    """Within three standard errors of the exact gradient, at any width, where the standard error is
    below 2 % of it. A horizon that is cut short fails the same test."""
    reports: list[Estimate] = []
    strategy = Evolution(sigma=0.7, pairs=10_000, chunk=20_000, seed=1, report=reports.append)

    def error(steps: int) -> float:
        found = gradient(strategy, steps)
        spread = reports[-1].standard_error["hyper"]["target"]
        assert spread.norm() < 0.025 * exact().norm()
        assert (spread < 0.02 * exact().norm()).all()
        return ((found - exact()) / spread).abs().max().item()

    assert error(3) < 3
    assert error(1) > 30


def test_the_error_falls_with_the_square_root_of_the_number_of_pairs() -> None:
    counts = torch.tensor([4.0, 16.0, 64.0, 256.0])
    errors = []
    for count in counts:
        n = int(count)
        found = [gradient(Evolution(0.1, n, 2 * n, seed)) - exact() for seed in range(30)]
        errors.append(torch.stack(found).square().sum(1).mean().sqrt())
    x, y = counts.log(), torch.stack(errors).log()
    slope = ((x - x.mean()) * y).sum() / (x - x.mean()).square().sum()
    assert slope.item() == pytest.approx(-0.5, abs=0.06)


def test_the_standard_error_is_the_spread_of_estimates() -> None:
    reports: list[Estimate] = []
    found = [gradient(Evolution(0.1, 32, 64, seed, report=reports.append)) for seed in range(100)]
    spread = torch.stack(found).std(0)
    told = torch.stack([r.standard_error["hyper"]["target"] for r in reports]).mean(0)
    torch.testing.assert_close(told, spread, rtol=0.25, atol=0)
    assert reports[0].pairs == 32
    assert torch.equal(reports[0].gradient["hyper"]["target"], found[0])


def test_one_after_the_other_is_the_same_as_all_at_once() -> None:
    one = gradient(Evolution(0.1, pairs=5, seed=3))
    for chunk in (2, 3, 10, 100):
        torch.testing.assert_close(gradient(Evolution(0.1, 5, chunk, seed=3)), one)


def test_a_step_has_the_slope_of_the_smoothed_one() -> None:
    """L = sign(w) behind w = target: E L = 2 Φ(target / σ) - 1, whose slope at zero is
    2 / (σ √(2π))."""
    problem = innerloop.Problem(lambda p, h, b: (p["w"] - h) ** 2 / 2, innerloop.optim.sgd(lr=1.0))
    reports: list[Estimate] = []
    value, found = innerloop.metagradient(
        lambda traj, hyper: traj.params["w"].sign(),
        problem,
        {"w": torch.tensor(0.0)},
        None,
        steps=1,
        hyper=torch.tensor(0.0),
        wrt="hyper",
        strategy=Evolution(0.5, pairs=4000, chunk=8000, seed=0, report=reports.append),
    )
    assert value == 0
    error = reports[0].standard_error["hyper"].item()
    assert error < 0.03
    assert abs(found.item() - 2 / (0.5 * math.sqrt(2 * math.pi))) < 3 * error


@pytest.mark.parametrize("chunk", [1, 8])
def test_random_numbers_are_common(chunk: int) -> None:
    """A noise a thousand times as large as the loss cancels; afterwards the generator stands where
    one plain run would leave it."""

    def noisy(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
        return outer(traj, hyper) + 1000 * torch.rand(())

    strategy = Evolution(0.1, pairs=4, chunk=chunk, seed=2)
    torch.manual_seed(7)
    found = gradient(strategy, outer=noisy)
    after = torch.rand(())
    torch.testing.assert_close(found, gradient(strategy), rtol=1e-9, atol=0)
    torch.manual_seed(7)
    torch.rand(())
    assert torch.rand(()) == after


def test_a_seed_repeats_and_none_does_not() -> None:
    assert torch.equal(gradient(Evolution(pairs=2, seed=1)), gradient(Evolution(pairs=2, seed=1)))
    assert not torch.equal(
        gradient(Evolution(pairs=2, seed=1)), gradient(Evolution(pairs=2, seed=2))
    )
    assert not torch.equal(gradient(Evolution(pairs=2)), gradient(Evolution(pairs=2)))
    torch.manual_seed(3)
    first = gradient(Evolution(pairs=2))
    torch.manual_seed(3)
    assert torch.equal(first, gradient(Evolution(pairs=2)))


def test_parameters_and_every_leaf_of_hyper() -> None:
    """0-dim and empty tensors, constants; on a linear outer loss the estimate of a pair is
    (g ε) ε."""
    problem = innerloop.Problem(
        lambda p, h, b: h["power"] * (p["w"] - h["a"][0]).square().sum() / 4,
        innerloop.optim.sgd(lr=0.5),
    )
    hyper = {"a": [torch.tensor(2.0), torch.zeros(0)], "power": 2, "index": torch.tensor([1])}
    value, grads = innerloop.metagradient(
        lambda traj, hyper: (traj.params["w"].sum(), traj.steps),
        problem,
        {"w": smooth_noise(2)},
        None,
        steps=1,
        hyper=hyper,
        strategy=Evolution(0.5, pairs=4000, chunk=8000, seed=0),
    )
    assert value[1] == 1
    assert grads["hyper"]["power"] is None
    assert grads["hyper"]["a"][1].shape == (0,)
    torch.testing.assert_close(grads["params"]["w"], torch.full((2,), 0.5), rtol=0, atol=0.1)
    assert abs(grads["hyper"]["a"][0].item() - 1) < 0.1


class Known(innerloop.strategy.Measure):
    """A loop whose plain run takes 2 seconds and then 3 a step, with 5 bytes and 7 a step."""

    steps = 10

    def __call__(self, strategy: innerloop.strategy.Strategy, wrt: Any = None) -> Any:
        raise AssertionError

    def plain(self) -> Cost:
        return Cost(LinearCost(2.0, 3.0), LinearCost(5.0, 7.0))


def test_a_forecast_counts_the_forward_passes() -> None:
    assert Evolution(pairs=4, chunk=2).forecast(Known()) == (9 * 32.0, 2 * 12.0)
    (row,) = innerloop.plan(
        PROBLEM,
        {"w": torch.zeros(3)},
        None,
        steps=5,
        hyper={"target": TARGET},
        strategies=[Evolution()],
    ).rows
    assert row.seconds > 0
    assert not row.problem


def test_unroll_cannot_estimate() -> None:
    target = TARGET.clone().requires_grad_()
    traj = innerloop.unroll(
        PROBLEM, {"w": torch.zeros(3)}, None, steps=3, hyper={"target": target},
        strategy=Evolution(), save_at=[1],
    )  # fmt: skip
    for value in (traj.params["w"], traj.losses, traj.at(1).params["w"]):
        with pytest.raises(NotDifferentiableError, match="unroll does not see the outer loss"):
            value.sum().backward()


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_loss_that_is_not_finite_is_named(chunk: int) -> None:
    def broken(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
        shift = hyper["target"][0] - TARGET[0]
        return torch.where(shift > 0, shift / 0, shift)

    with pytest.raises(NonFiniteError, match="smaller sigma"):
        gradient(Evolution(pairs=2, chunk=chunk), outer=broken)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Evolution(sigma=0.0), "sigma=0.0"),
        (lambda: Evolution(sigma=math.inf), "sigma=inf"),
        (lambda: Evolution(pairs=0), "pairs=0"),
        (lambda: Evolution(chunk=0), "chunk=0"),
        (
            lambda: torch.func.vmap(lambda _: gradient(Evolution()))(torch.zeros(2)),
            "cannot stand inside torch.func",
        ),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        make()


# -- while the loop runs ---------------------------------------------------------------------------


def influence_balancing(size: int = 23, positive: int = 10) -> tuple[Tensor, Tensor]:
    """The system of Tallec & Ollivier 2017, on which Vicol et al. 2021 show that truncation fails:
    h ← A h + θ v, where the first entries of v push h₁ up, and the later ones, which arrive later,
    pull it down."""
    matrix = torch.diag(torch.full((size,), 0.5)) + torch.diag(torch.full((size - 1,), 0.5), 1)
    sign = torch.ones(size)
    sign[positive:] = -1
    return matrix, sign


T, WINDOW, THETA = 60, 5, 0.5


def balanced(noise: str, pairs: int, seed: int, window: int = WINDOW) -> Tensor:
    """An estimate of the gradient of all T losses (h₁ - 1)² / 2."""
    matrix, sign = influence_balancing()
    problem = innerloop.Problem(
        lambda params, hyper, batch, target: (params["h"] - target).square().sum() / 2,
        innerloop.optim.sgd(lr=1.0),
        targets=lambda params, hyper, batch: matrix @ params["h"] + hyper * sign,
    )
    run = Evolution(0.1, pairs, 2 * pairs, seed).online(
        lambda params, hyper: (params["h"][0] - 1) ** 2 / 2,
        problem,
        {"h": torch.ones(23)},
        None,
        steps=T,
        hyper=torch.tensor(THETA),
        window=window,
        noise=noise,
    )
    found = list(run)
    assert [now.t for now in found] == list(range(window, T + 1, window))
    value = torch.stack([now.value for now in found]).sum()
    torch.testing.assert_close(value, balanced_truth(torch.tensor(THETA)), rtol=1e-12, atol=0)
    return torch.stack([now.grads for now in found]).sum()


def balanced_truth(theta: Tensor) -> Tensor:
    matrix, sign = influence_balancing()
    h, total = torch.ones(23), torch.tensor(0.0)
    for _ in range(T):
        h = matrix @ h + theta * sign
        total = total + (h[0] - 1) ** 2 / 2
    return total


@pytest.mark.parametrize("noise", ["persistent", "reuse", "truncated"])
def test_persistent_and_reused_noise_are_unbiased_where_truncation_is_not(noise: str) -> None:
    """The mean of 6 runs lies within three of its standard errors, which are at most 4 % of the
    exact gradient; truncated ES is off by most of it."""
    truth = torch.func.grad(balanced_truth)(torch.tensor(THETA))
    found = torch.stack([balanced(noise, 1000, seed) for seed in range(6)])
    error = found.std() / 6**0.5
    assert error < 0.04 * truth.abs()
    if noise == "truncated":
        assert abs(found.mean() - truth) > 0.5 * truth.abs()
    else:
        assert abs(found.mean() - truth) < 3 * error


def test_one_window_is_plain_evolution() -> None:
    """Then there is nothing that could persist."""
    found = [balanced(noise, 50, seed=1, window=T) for noise in ("persistent", "reuse")]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_hyper_may_be_sent() -> None:
    problem = innerloop.Problem(lambda p, h, b: (p["w"] - h) ** 2 / 2, innerloop.optim.sgd(lr=1.0))
    run = Evolution(0.1, pairs=40, chunk=1, seed=0).online(
        lambda params, hyper: params["w"] ** 2 / 2, problem, {"w": torch.tensor(0.0)}, None,
        steps=3, hyper=torch.tensor(2.0), window=1, noise="truncated",
    )  # fmt: skip
    assert next(run).value == 2
    now = run.send(torch.tensor(4.0))
    assert now.value == 8
    assert abs(now.grads - 4) < 4 * now.standard_error
    assert now.carry.params["w"] == 4
    with pytest.raises(InvalidInputError, match="another structure"):
        run.send(torch.zeros(2))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"noise": "white"}, "noise='white'"), ({"window": 0}, "window=0"), ({"hyper": 1}, "hyper")],
)
def test_bad_input_of_online_is_named(options: dict[str, Any], match: str) -> None:
    given = {"hyper": torch.tensor(1.0), "window": 1, "steps": 2, **options}
    run = Evolution().online(
        lambda params, hyper: params["w"].sum(), PROBLEM, {"w": torch.zeros(3)}, None, **given
    )
    with pytest.raises(InvalidInputError, match=match):
        next(run)
