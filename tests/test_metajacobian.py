"""`innerloop.inspect.metajacobian`: against matrix powers, and one meta-gradient per outcome."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop.inspect import metajacobian
from tests.backends import generates_code, trace_only

pytestmark = pytest.mark.usefixtures("float64")

T, LR, MU = 5, 0.3, 0.6
HESSIAN = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
START = torch.tensor([1.0, -2.0], dtype=torch.float64)


def quadratic(params: Any, hyper: Any, batch: Any) -> Tensor:
    return params["w"] @ HESSIAN @ params["w"] / 2


def outcomes(traj: Any, hyper: Any) -> Tensor:
    w = traj.params["w"]
    return torch.stack([w[0].sin(), w.square().sum(), w[1] * hyper["lr"], hyper["lr"] ** 2 + w[0]])


def test_outcomes_of_a_quadratic() -> None:
    """w_T = Mᵀ w_0 with M = 1 - lr A, and dM/dlr = -A commutes with it."""
    problem = innerloop.Problem(quadratic, innerloop.optim.sgd(), optimizer_hyper=("lr",))
    values, found = metajacobian(
        outcomes,
        problem,
        {"w": START},
        None,
        steps=T,
        hyper={"lr": torch.tensor(LR), "text": "kept"},
    )
    step = torch.eye(2) - LR * HESSIAN
    power = torch.linalg.matrix_power(step, T)
    w = power @ START
    by_end = torch.stack(
        [
            torch.stack([w[0].cos(), torch.tensor(0.0)]),
            2 * w,
            torch.tensor([0.0, LR]),
            torch.tensor([1.0, 0.0]),
        ]
    )
    by_rate = -T * torch.linalg.matrix_power(step, T - 1) @ HESSIAN @ START
    direct = torch.stack([torch.tensor(0.0), torch.tensor(0.0), w[1], torch.tensor(2 * LR)])
    truth = torch.stack([w[0].sin(), w @ w, w[1] * LR, LR**2 + w[0]])
    torch.testing.assert_close(values, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["params"]["w"], by_end @ power, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        found["hyper"]["lr"], by_end @ by_rate + direct, rtol=1e-12, atol=1e-12
    )
    assert found["hyper"]["text"] == "kept"


@pytest.mark.parametrize("chunk", [None, 2])
def test_all_outcomes_at_once_are_one_meta_gradient_each(chunk: int | None) -> None:
    """A network with dropout, by momentum: the same random numbers, state and all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 3))
    x = torch.randn(6, 2)

    def loss(m: Any, hyper: Any, batch: Tensor) -> Tensor:
        return m(batch).square().mean() + hyper["l2"] * m[0].weight.square().sum()

    def outer(traj: Any, hyper: Any) -> Tensor:
        h = (x @ traj.params["0.weight"].T).tanh() @ traj.params["3.weight"].T
        return h.square().mean(0) + hyper["l2"]

    problem = innerloop.Problem.from_module(model, loss, innerloop.optim.sgd(lr=0.2, momentum=0.7))
    hyper = {"l2": torch.tensor(0.1)}
    state = torch.get_rng_state()
    values, found = metajacobian(outer, problem, None, [x] * 4, hyper=hyper, chunk=chunk)
    for q in range(3):
        torch.set_rng_state(state)
        value, truth = innerloop.metagradient(
            lambda traj, hyper, q=q: outer(traj, hyper)[q],  # type: ignore[misc]
            problem,
            None,
            [x] * 4,
            hyper=hyper,
        )
        torch.testing.assert_close(values[q], value.detach(), rtol=1e-12, atol=1e-14)
        for name, g in truth["params"].items():
            torch.testing.assert_close(found["params"][name][q], g, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            found["hyper"]["l2"][q], truth["hyper"]["l2"], rtol=1e-12, atol=1e-14
        )


def test_a_loop_of_no_steps_and_one_argument() -> None:
    problem = innerloop.Problem(quadratic, innerloop.optim.sgd(lr=LR))
    _, found = metajacobian(
        lambda traj, hyper: 3 * traj.params["w"], problem, {"w": START}, [], wrt="params"
    )
    assert torch.equal(found["w"], 3 * torch.eye(2))


def test_what_cannot_be_differentiated() -> None:
    problem = innerloop.Problem(quadratic, innerloop.optim.sgd(lr=LR))

    def ask(outer: Any, **more: Any) -> Any:
        return metajacobian(outer, problem, {"w": START}, None, steps=2, **more)

    with pytest.raises(innerloop.NotDifferentiableError, match=r"outer reads traj\.losses"):
        ask(lambda traj, hyper: traj.losses)
    with pytest.raises(innerloop.InvalidInputError, match="parameters after the last step only"):
        ask(lambda traj, hyper: traj.at(1).params["w"])
    for wrong in (lambda traj, hyper: traj.params["w"].sum(), lambda traj, hyper: torch.ones(2)):
        with pytest.raises(innerloop.InvalidInputError, match=r"return a tensor \[Q\]"):
            ask(wrong)
    for more in ({"chunk": 0}, {"wrt": "all"}):
        with pytest.raises(innerloop.InvalidInputError, match="write"):
            ask(lambda traj, hyper: traj.params["w"], **more)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("chunk", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_compiled_pullbacks_of_many_outcomes(
    chunk: int | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam, whose state has zeros behind the last step, dropout, and a learned rate."""
    if not generates_code(request.config):
        # `make compiled` generates code.
        trace_only(monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 3)).float()
    x = torch.randn(6, 2, dtype=torch.float32)

    def loss(m: Any, hyper: Any, batch: Tensor) -> Tensor:
        return m(batch).square().mean() + hyper["l2"] * m[0].weight.square().sum()

    def outer(traj: Any, hyper: Any) -> Tensor:
        h = (x @ traj.params["0.weight"].T).tanh() @ traj.params["3.weight"].T
        return h.square().mean(0) + hyper["l2"]

    problem = innerloop.Problem.from_module(
        model,
        loss,
        innerloop.optim.adam(eps=0.1),
        optimizer_hyper=lambda hyper, t: {"lr": hyper["log_lr"].exp()},
    )
    hyper = {"l2": torch.tensor(0.1).float(), "log_lr": torch.tensor(-2.0).float()}

    def run(compile: bool) -> Any:
        torch.manual_seed(3)
        strategy = innerloop.Checkpointed(product="reverse", compile=compile)
        return metajacobian(
            outer, problem, None, [x] * 4, hyper=hyper, chunk=chunk, strategy=strategy
        )

    (values, truth), (compiled, found) = run(False), run(True)
    torch.testing.assert_close(compiled, values, rtol=1e-5, atol=1e-6)
    assert found["params"].keys() == truth["params"].keys()
    for ours, theirs in zip(
        [*found["params"].values(), *found["hyper"].values()],
        [*truth["params"].values(), *truth["hyper"].values()],
        strict=True,
    ):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
