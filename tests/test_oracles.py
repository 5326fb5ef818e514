"""The oracles themselves, against closed forms: nothing here touches the optimizers of
innerloop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.oracles import (
    NoDerivative,
    Params,
    Task,
    TorchRun,
    accepts,
    assert_params,
    curvature,
    derivative,
    directional,
    directions,
    inner,
    torch_run,
)

CURVATURE = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def quadratic(params: Params, t: int) -> Params:
    """The gradient of half x'Ax."""
    return {"x": CURVATURE @ params["x"]}


def momentum_matrix(lr: float, momentum: float, decay: float) -> Tensor:
    """One step of SGD with momentum on the quadratic, as a matrix that acts on (parameters,
    buffer)."""
    eye = torch.eye(3, dtype=torch.float64)
    gradient = CURVATURE + decay * eye
    return torch.cat(
        [
            torch.cat([eye - lr * gradient, -lr * momentum * eye], 1),
            torch.cat([gradient, momentum * eye], 1),
        ],
        0,
    )


def momentum_run(lr: float, momentum: float, decay: float, steps: int) -> Tensor:
    z = torch.cat([START, torch.zeros(3, dtype=torch.float64)])
    return torch.linalg.matrix_power(momentum_matrix(lr, momentum, decay), steps)[:3] @ z


def test_a_torch_run_of_sgd_is_a_matrix_power():
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    run = torch_run(torch.optim.SGD, settings, {"x": START}, quadratic, steps=10)
    torch.testing.assert_close(run["x"], momentum_run(0.1, 0.9, 0.05, 10), rtol=1e-13, atol=1e-13)


def test_finite_differences_of_a_torch_run_are_the_derivative_of_the_matrix_power():
    matrix, steps = momentum_matrix(0.1, 0.9, 0.05), 10
    in_lr = torch.zeros(6, 6, dtype=torch.float64)
    in_lr[:3, :3] = -(CURVATURE + 0.05 * torch.eye(3, dtype=torch.float64))
    in_lr[:3, 3:] = -0.9 * torch.eye(3, dtype=torch.float64)
    power = torch.linalg.matrix_power
    slope = sum(power(matrix, k) @ in_lr @ power(matrix, steps - 1 - k) for k in range(steps))
    truth = (slope @ torch.cat([START, torch.zeros(3, dtype=torch.float64)]))[:3].sum()

    def final(lr: float) -> float:
        settings = {"lr": lr, "momentum": 0.9, "weight_decay": 0.05}
        return float(
            torch_run(torch.optim.SGD, settings, {"x": START}, quadratic, steps)["x"].sum()
        )

    assert directional(final, 0.1, 1.0) == pytest.approx(float(truth), rel=1e-9)


def test_finite_differences_of_two_adam_steps_are_the_closed_form():
    first, second, lr, beta1, eps = 0.7, -0.4, 0.05, 0.9, 0.01

    def final(beta2: float) -> float:
        settings = {"lr": lr, "betas": (beta1, beta2), "eps": eps}
        gradients = (torch.tensor([first]).double(), torch.tensor([second]).double())
        return float(
            torch_run(
                torch.optim.Adam,
                settings,
                {"x": torch.zeros(1).double()},
                lambda _, t: {"x": gradients[t]},
                2,
            )["x"]
        )

    first, second = (
        float(torch.tensor(first)),
        float(torch.tensor(second)),
    )  # what the gradients are: rounded to float32
    beta2 = 0.99
    mean = (beta1 * first + second) / (1 + beta1)
    root = math.sqrt((beta2 * first**2 + second**2) / (1 + beta2))
    in_root = (first**2 - second**2) / (1 + beta2) ** 2 / (2 * root)
    assert final(beta2) == pytest.approx(
        -lr * first / (abs(first) + eps) - lr * mean / (root + eps), rel=1e-13
    )
    assert directional(final, beta2, 1.0, largest=1e-3) == pytest.approx(
        lr * mean / (root + eps) ** 2 * in_root, rel=1e-8
    )


@pytest.mark.parametrize(
    "f", [abs, lambda x: max(x, 0.0), lambda x: float(x > 0), lambda x: abs(x) ** 0.5]
)
def test_no_derivative_at_a_kink_or_a_jump(f):
    with pytest.raises(NoDerivative):
        derivative(f)


@pytest.mark.parametrize(
    ("f", "truth"),
    [(math.exp, 1.0), (lambda x: 3.0, 0.0), (lambda x: abs(x - 1e-3), -1.0), (lambda x: x**4, 0.0)],
)
def test_derivative_of_what_is_smooth_within_reach(f, truth):
    assert derivative(f) == pytest.approx(truth, abs=1e-9)


def test_a_second_derivative_that_jumps_needs_small_steps():
    """Adam at a gradient of zero is of this kind, g / (|g| + eps): the error is of first order in
    the step."""
    with pytest.raises(NoDerivative):
        derivative(lambda x: x * abs(x) + x)
    assert derivative(lambda x: x * abs(x) + x, largest=1e-7) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize(
    ("f", "truth"), [(math.exp, 1.0), (math.sin, 0.0), (lambda x: (1 + x) ** 5, 20.0)]
)
def test_curvature(f, truth):
    assert curvature(f) == pytest.approx(truth, rel=1e-6, abs=1e-6)


def test_no_curvature_where_the_slope_bends():
    with pytest.raises(NoDerivative):
        curvature(lambda x: abs(x) ** 1.5)


def test_element_wise_settings_make_groups_that_agree_with_the_whole():
    task = Task()
    params = task.params()
    typical = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    whole = torch_run(torch.optim.SGD, typical, params, task.gradient, 5)
    by_element = {
        **typical,
        "lr": {name: torch.full_like(value, 0.1) for name, value in params.items()},
    }
    assert_params(torch_run(torch.optim.SGD, by_element, params, task.gradient, 5), whole, 0)
    other = {**typical, "lr": {name: torch.tensor(0.1 * (i + 1)) for i, name in enumerate(params)}}
    moved = torch_run(torch.optim.SGD, other, params, task.gradient, 1)
    gradient = task.gradient(params, 0)
    for i, name in enumerate(params):
        lr = torch.tensor(0.1 * (i + 1)).item()
        torch.testing.assert_close(
            moved[name],
            params[name] - lr * (gradient[name] + 0.1 * params[name]),
            rtol=1e-13,
            atol=1e-15,
        )


def test_a_run_leaves_its_inputs_alone_and_skips_what_has_no_gradient():
    params = Task().params()
    before = {name: value.clone() for name, value in params.items()}
    run = TorchRun.start(torch.optim.SGD, {"lr": 0.1}, params)
    run.step(
        {name: None if name == "bias" else torch.ones_like(value) for name, value in params.items()}
    )
    assert_params(params, before, 0)
    assert torch.equal(run.params["bias"], before["bias"])
    assert torch.equal(run.params["weight"], before["weight"] - 0.1)


def test_what_torch_accepts_is_asked_of_torch():
    assert accepts(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True})
    assert not accepts(torch.optim.SGD, {"lr": 0.1, "nesterov": True})
    assert not accepts(torch.optim.SGD, {"lr": 0.1, "foreach": True, "fused": True})
    assert not accepts(torch.optim.SGD, {"lr": 0.1, "no_such_argument": True})


def test_the_dead_entries_of_the_task_have_gradients_that_are_exactly_zero():
    task = Task(dead=True)
    for t in range(12):
        gradient = task.gradient(task.params(), t)
        assert (gradient["weight"][1] == 0).all()
        assert (gradient["weight"][:, 4] == 0).all()
        assert gradient["bias"][4] == 0
        assert (gradient["weight"][0, :4] != 0).all()
        assert (gradient["weight"][2] == 0).all() == (t < 5)


def test_the_gradient_of_the_task_agrees_with_finite_differences():
    task = Task(large=True)
    params = task.params()
    for direction in directions(params, 2):
        truth = directional(lambda p: task.loss(p, 0), params, direction)
        assert inner(task.gradient(params, 0), direction) == pytest.approx(truth, rel=1e-7)
        assert inner(torch.func.grad(task.outer)(params), direction) == pytest.approx(
            directional(lambda p: task.outer(p), params, direction), rel=1e-7
        )
