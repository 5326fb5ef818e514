"""What a review of the strategies found: wrong numbers without a word, each now right or an
error."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import Auto, Checkpointed, FirstOrder, ForwardMode, StoreAll, Truncated
from innerloop.strategy import Strategy

pytestmark = pytest.mark.usefixtures("float64")


def quadratic(**kwargs: Any) -> innerloop.Problem:
    return innerloop.Problem(
        lambda p, h, b: p["w"].square() / 2, innerloop.optim.sgd(lr=0.5), **kwargs
    )


def w() -> dict[str, Tensor]:
    return {"w": torch.tensor(2.0, requires_grad=True)}


@pytest.mark.parametrize("slots", ["all", 1])
def test_an_optimizer_hyper_that_changes_is_noticed(slots: Any):
    calls = [0]

    def changing(hyper: Any, t: int) -> dict[str, float]:
        calls[0] += 1
        return {"lr": 0.5 / calls[0]}

    traj = innerloop.unroll(
        quadratic(optimizer_hyper=changing), w(), None, steps=3, strategy=Checkpointed(slots=slots)
    )
    with pytest.raises(innerloop.InvalidInputError, match="optimizer_hyper"):
        traj.params["w"].backward()


def test_a_hyper_parameter_written_in_place_by_data_is_noticed():
    hyper = {"lr": torch.tensor(0.5, requires_grad=True)}
    traj = innerloop.unroll(
        quadratic(optimizer_hyper=lambda h, t: h),
        w(),
        None,
        steps=3,
        hyper=hyper,
        strategy=Checkpointed(),
    )
    hyper["lr"].data.mul_(2)
    with pytest.raises(innerloop.InvalidInputError):
        traj.params["w"].backward()


@pytest.mark.parametrize("strategy", [StoreAll(), Checkpointed(slots=2)], ids=repr)
def test_threads_may_share_a_problem(strategy: Strategy):
    """Each loop as if it ran alone, and the user's module untouched."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {n: b.clone() for n, b in model.named_buffers()}
    problem = innerloop.Problem.from_module(
        model, lambda m, h, x: (m(x) - h).square().mean(), innerloop.optim.sgd(lr=0.1)
    )
    data = torch.randn(20, 6, 3)
    found: dict[Any, Tensor] = {}

    def run(target: float, key: Any) -> None:
        _, grads = innerloop.metagradient(
            lambda traj, h: sum(p.sin().sum() for p in traj.params.values()),
            problem,
            dict(model.named_parameters()),
            data,
            hyper=torch.tensor(target),
            wrt="hyper",
            strategy=strategy,
        )
        found[key] = grads

    threads = [threading.Thread(target=run, args=(float(i), i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        run(float(i), "alone")
        torch.testing.assert_close(found[i], found["alone"], rtol=1e-12, atol=0)
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name])


def test_truncated_refuses_captured_tensors():
    c = torch.tensor(1.0, requires_grad=True)
    problem = innerloop.Problem(
        lambda p, h, b: c * p["w"].square() / 2, innerloop.optim.sgd(lr=0.5)
    )
    with pytest.raises(innerloop.CapturedTensorError):
        innerloop.unroll(problem, {"w": torch.tensor(8.0)}, None, steps=3, strategy=Truncated(1))


def test_first_order_refuses_losses_where_the_optimizer_captures_a_tensor():
    lr = torch.tensor(0.5, requires_grad=True)
    traj = innerloop.unroll(
        quadratic(optimizer_hyper=lambda h, t: {"lr": lr}),
        {"w": torch.tensor(8.0)},
        None,
        steps=3,
        strategy=FirstOrder(),
    )
    with pytest.raises(innerloop.NotDifferentiableError, match="constants"):
        torch.autograd.grad(traj.params["w"] + traj.losses.sum(), lr, retain_graph=True)
    assert torch.autograd.grad(traj.params["w"], lr)[0] == -(8 + 4 + 2)


class Moving(nn.Module):
    """A weight, and its moving average in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))
        self.ema: Tensor
        self.register_buffer("ema", torch.tensor(0.0))

    def forward(self) -> Tensor:
        self.ema = 0.5 * self.ema + 0.5 * self.w
        return (self.w - 1) ** 2 + 0.1 * self.ema**2


def test_buffers_that_depend_on_parameters():
    model = Moving()
    problem = innerloop.Problem.from_module(model, lambda m, h, b: m(), innerloop.optim.sgd(lr=0.1))

    def gradient(strategy: Strategy) -> Tensor:
        params = {"w": torch.tensor(2.0, requires_grad=True)}
        traj = innerloop.unroll(problem, params, None, steps=3, strategy=strategy)
        (found,) = torch.autograd.grad(traj.params["w"] + traj.at(-1).buffers["ema"], params["w"])
        return found

    exact = gradient(StoreAll())
    for strategy in (
        Checkpointed(slots=1),
        Checkpointed(product="mixed"),
        Checkpointed(slots=2, save="gradients"),
    ):
        torch.testing.assert_close(gradient(strategy), exact, rtol=1e-12, atol=0)
    with pytest.raises(innerloop.NotDifferentiableError, match="buffers"):
        gradient(FirstOrder())


def test_online_refuses_other_names_and_reaches_what_it_says():
    problem = innerloop.Problem(
        lambda p, h, b: h["weight"] * p["w"].square() / 2,
        innerloop.optim.sgd(),
        optimizer_hyper=lambda h, t: {"lr": h["lr"]},
    )
    hyper = {"lr": torch.tensor(0.5), "weight": torch.tensor(2.0)}
    start = {"w": torch.tensor(8.0)}
    run = ForwardMode().online(lambda p, h: p["w"], problem, start, None, steps=3, hyper=hyper)
    next(run)
    with pytest.raises(innerloop.InvalidInputError, match="same tensors"):
        run.send({"weight": torch.tensor(1.0), "lr": torch.tensor(0.25)})
    for outer, learned in (
        (lambda p, h: p["w"].detach(), problem),
        (lambda p, h: p["w"], quadratic()),
    ):
        with pytest.raises(innerloop.NotDifferentiableError, match="no gradient arrives"):
            next(ForwardMode().online(outer, learned, start, None, steps=2, hyper=hyper))


def test_online_draws_from_the_carry():
    problem = innerloop.Problem(
        lambda p, h, b: nn.functional.dropout(p["w"] * h, 0.5).square().sum(),
        innerloop.optim.sgd(lr=0.1),
    )
    start = {"w": torch.ones(6)}
    carry = innerloop.unroll(problem, start, None, steps=1, hyper=torch.tensor(1.0)).at(-1)
    truth = innerloop.unroll(problem, carry, None, steps=3, hyper=torch.tensor(1.0))
    torch.manual_seed(9)
    before = torch.get_rng_state()
    run = ForwardMode().online(
        lambda p, h: p["w"].sum(), problem, carry, None, steps=3, hyper=torch.tensor(1.0)
    )
    *_, last = run
    torch.testing.assert_close(last.carry.params["w"], truth.params["w"], rtol=1e-12, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("strategy", [Auto(memory="1GB"), Checkpointed(memory="1GB")], ids=repr)
def test_measuring_draws_nothing_from_an_iterator(strategy: Strategy):
    problem = innerloop.Problem(lambda p, h, x: (p["w"] - x).square(), innerloop.optim.sgd(lr=0.1))
    data = [torch.tensor(float(i)) for i in range(4)]
    for given in (iter(data), (x for x in data)):
        params = w()
        traj = innerloop.unroll(problem, params, given, steps=4, strategy=strategy)
        traj.params["w"].backward()
        assert params["w"].grad is not None
        torch.testing.assert_close(params["w"].grad, torch.tensor(0.8**4), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            traj.params["w"], innerloop.unroll(problem, w(), data).params["w"]
        )


def test_an_iterator_that_is_used_up_is_named():
    problem = innerloop.Problem(lambda p, h, x: (p["w"] - x).square(), innerloop.optim.sgd(lr=0.1))
    for used in (
        lambda: innerloop.plan(problem, {"w": torch.tensor(2.0)}, iter([]), steps=2),
        lambda: innerloop.unroll(problem, w(), iter([]), strategy=Checkpointed(memory="1GB")),
        lambda: innerloop.unroll(problem, w(), iter([]), steps=2),
    ):
        with pytest.raises(innerloop.InvalidInputError, match="iterator of batches"):
            used()


def test_a_loop_of_one_step_with_a_schedule():
    problem = quadratic(optimizer_hyper=lambda h, t: {"lr": h["lr"][t]})
    plan = innerloop.plan(
        problem, {"w": torch.tensor(2.0)}, None, steps=1, hyper={"lr": torch.tensor([0.5])}
    )
    assert not any(row.problem for row in plan.rows)


class Square(torch.autograd.Function):
    """Without a forward-mode derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


class Once(Square):
    """The same, whose backward may not be differentiated."""

    backward = staticmethod(torch.autograd.function.once_differentiable(Square.backward))  # type: ignore[assignment]


def test_a_row_that_is_not_possible_says_so():
    problem = innerloop.Problem(
        lambda p, h, b: Square.apply(p["w"]) * h, innerloop.optim.sgd(lr=0.1)
    )
    plan = innerloop.plan(problem, {"w": torch.tensor(2.0)}, None, steps=5, hyper=torch.tensor(1.0))
    row = next(r for r in plan.rows if r.strategy == ForwardMode())
    assert row.problem
    assert "not possible" in str(plan)
    assert plan.best.exact


def test_times_are_whole_numbers():
    with pytest.raises(innerloop.InvalidInputError, match="list of times"):
        innerloop.unroll(quadratic(), w(), None, steps=3, save_at=[True])


def test_inference_mode_is_named():
    with torch.inference_mode(), pytest.raises(innerloop.InvalidInputError, match="no_grad"):
        innerloop.unroll(quadratic(), w(), None, steps=3)


@pytest.mark.parametrize("strategy", [StoreAll(), Checkpointed()], ids=repr)
def test_a_second_derivative_that_torch_would_drop_is_named(strategy: Strategy):
    """d w_2 / d w_0 is (1 - lr)^2 = 1/4; torch says 1, because the gradient that comes in does not
    require grad."""
    problem = innerloop.Problem(lambda p, h, b: Once.apply(p["w"]) / 2, innerloop.optim.sgd(lr=0.5))
    with pytest.raises(
        innerloop.NotDifferentiableError, match="Once is marked once_differentiable"
    ):
        innerloop.unroll(problem, w(), None, steps=2, strategy=strategy).params["w"].backward()
    params = w()
    innerloop.unroll(problem, params, None, steps=2, strategy=FirstOrder()).params["w"].backward()
    assert params["w"].grad == 1


def test_track_names_it_too():
    model = nn.Linear(1, 1)
    with (
        pytest.raises(innerloop.NotDifferentiableError, match="once_differentiable"),
        innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop,
    ):
        loop.step(Once.apply(loop.model(torch.ones(1, 1))).sum())
