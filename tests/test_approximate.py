"""Truncated, FirstOrder and ForwardMode beyond the contract: the limits in which they are exact,
and what they refuse."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import FirstOrder, ForwardMode, StoreAll, Truncated
from innerloop.strategy import Strategy
from tests.oracles import smooth_noise
from tests.small_problems import quadratic_problem

pytestmark = pytest.mark.usefixtures("float64")

CURVATURE = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
ETA = 0.3


def quadratic(lr: float = ETA) -> innerloop.Problem:
    """x_{t+1} = x_t - η (C x_t - b): every derivative is a sum of powers of 1 - η C."""
    return innerloop.Problem(
        lambda p, hyper, batch: (CURVATURE * p["x"].square() / 2 - hyper["b"] * p["x"]).sum(),
        innerloop.optim.sgd(lr=lr),
    )


def hyper_gradient(strategy: Strategy, steps: int, lr: float = ETA) -> Tensor:
    """d sum(x_T) / d b."""
    b = torch.tensor([0.3, -0.2, 0.7], requires_grad=True)
    traj = innerloop.unroll(
        quadratic(lr), {"x": torch.ones(3)}, None, steps=steps, hyper={"b": b}, strategy=strategy
    )
    (gradient,) = torch.autograd.grad(traj.params["x"].sum(), b)
    return gradient


def slope(xs: list[float], ys: list[float]) -> float:
    """Of the least-squares line."""
    x, y = torch.tensor(xs), torch.tensor(ys)
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


# -- Truncated -------------------------------------------------------------------------------------


def test_truncation_is_a_shorter_geometric_sum():
    """d x_T / d b = η Σ_{k<T} (1 - η C)^k, of which the last K terms are kept."""
    for last in (1, 3, 10, 12, 50):
        kept = min(last, 12)
        exact = (1 - (1 - ETA * CURVATURE) ** kept) / CURVATURE
        torch.testing.assert_close(hyper_gradient(Truncated(last), 12), exact, rtol=1e-12, atol=0)


def test_the_error_of_truncation_falls_geometrically():
    """As (1 - η μ)^K with the smallest curvature μ: the slope of its logarithm."""
    exact = hyper_gradient(StoreAll(), 200)
    lasts = [20, 30, 40, 50, 60]
    errors = [(hyper_gradient(Truncated(k), 200) - exact).norm().item() for k in lasts]
    fitted = slope([float(k) for k in lasts], [math.log(e) for e in errors])
    assert fitted == pytest.approx(math.log(1 - ETA * 0.5), rel=1e-3)


def test_truncation_over_an_iterator_needs_its_length():
    with pytest.raises(innerloop.InnerLoopError, match="steps=T"):
        innerloop.unroll(
            quadratic(),
            {"x": torch.ones(3)},
            iter([1, 2]),
            hyper={"b": torch.zeros(3)},
            strategy=Truncated(1),
        )
    for last in (0, True):
        with pytest.raises(innerloop.InnerLoopError, match="1 or more"):
            Truncated(last)


def test_truncation_keeps_its_graph_over_the_last_steps_only():
    """Memory: the graph behind the result has as many updates as steps are differentiated."""

    def size(strategy: Strategy, steps: int) -> int:
        b = torch.zeros(3, requires_grad=True)
        traj = innerloop.unroll(
            quadratic(), {"x": torch.ones(3)}, None, steps=steps, hyper={"b": b}, strategy=strategy
        )
        seen, stack = set(), [traj.params["x"].grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack += [child for child, _ in node.next_functions]
        return len(seen)

    assert size(Truncated(3), 50) == size(Truncated(3), 10)
    assert size(Truncated(6), 50) > 1.5 * size(Truncated(3), 50)


def test_truncation_has_a_forward_derivative():
    """d x_T / d b as by reverse mode; losses come in one tensor, early and late."""

    def end(b: Tensor, strategy: Strategy = Truncated(3)) -> innerloop.Trajectory:  # noqa: B008
        return innerloop.unroll(
            quadratic(),
            {"x": torch.ones(3)},
            None,
            steps=12,
            hyper={"b": b},
            strategy=strategy,
            save_at=[2, 11],
        )

    b, along = torch.tensor([0.3, -0.2, 0.7]), torch.tensor([1.0, 2.0, 3.0])
    exact = (1 - (1 - ETA * CURVATURE) ** 3) / CURVATURE
    for outer in (lambda b: end(b).params["x"], lambda b: end(b).at(11).params["x"]):
        pushed = torch.func.jvp(outer, (b,), (along,))[1]
        (pulled,) = torch.func.vjp(outer, b)[1](torch.ones(3))
        torch.testing.assert_close(pushed, pulled * along, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.func.jvp(lambda b: end(b).params["x"], (b,), (along,))[1], exact * along
    )
    for refused, match in (
        (lambda b: end(b).losses[-1], "losses or aux under torch.func.jvp"),
        (lambda b: end(b).at(2).params["x"].sum(), "the state at time 2"),
    ):
        with pytest.raises(innerloop.NotDifferentiableError, match=match):
            torch.func.jvp(refused, (b,), (along,))
    whole = torch.func.jvp(lambda b: end(b, Truncated(12)).losses.sum(), (b,), (along,))[1]
    exact = torch.func.jvp(lambda b: end(b, StoreAll()).losses.sum(), (b,), (along,))[1]
    torch.testing.assert_close(whole, exact, rtol=1e-12, atol=0)


# -- FirstOrder ------------------------------------------------------------------------------------


def start_gradient(strategy: Strategy, lr: float) -> Tensor:
    x = torch.ones(3, requires_grad=True)
    traj = innerloop.unroll(
        quadratic(lr), {"x": x}, None, steps=3, hyper={"b": torch.ones(3)}, strategy=strategy
    )
    (gradient,) = torch.autograd.grad(traj.params["x"].square().sum() / 2, x)
    return gradient


def test_first_order_maml_is_the_outer_gradient_at_the_end():
    x = start_gradient(FirstOrder(), ETA)
    power = (1 - ETA * CURVATURE) ** 3
    torch.testing.assert_close(x, power + (1 - power) / CURVATURE, rtol=1e-12, atol=0)  # = x_3


def test_the_error_of_first_order_is_linear_in_the_step_size():
    sizes = [1e-3, 2e-3, 4e-3]
    errors = [
        (start_gradient(FirstOrder(), lr) - start_gradient(StoreAll(), lr)).norm().item()
        for lr in sizes
    ]
    assert slope([math.log(s) for s in sizes], [math.log(e) for e in errors]) == pytest.approx(
        1, abs=0.02
    )


def test_first_order_keeps_the_direct_effect_of_an_optimizers_hyper_parameter():
    """θ_{t+1} = θ_t - η g_t with constant g_t: d θ_T / d η = -Σ g_t."""
    lr = torch.tensor(ETA, requires_grad=True)
    problem = innerloop.Problem(
        lambda p, hyper, batch: p["x"].square() / 2,
        innerloop.optim.sgd(),
        optimizer_hyper=lambda h, t: h,
    )
    traj = innerloop.unroll(
        problem,
        {"x": torch.tensor(1.0)},
        None,
        steps=3,
        hyper={"lr": lr},
        strategy=FirstOrder(),
        save_at=[1],
    )
    (gradient,) = torch.autograd.grad(traj.params["x"], lr, retain_graph=True)
    assert gradient.item() == pytest.approx(-(1 + 0.7 + 0.49), rel=1e-12)
    (gradient,) = torch.autograd.grad(traj.at(1).params["x"], lr)
    assert gradient.item() == -1


def test_first_order_evaluates_no_second_derivative():
    """A loss whose second derivative raises."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * g

    x = torch.ones(2, requires_grad=True)
    problem = innerloop.Problem(
        lambda p, h, b: Once.apply(p["x"]).sum(), innerloop.optim.adam(lr=0.1)
    )
    innerloop.unroll(problem, {"x": x}, None, steps=3, strategy=FirstOrder()).params[
        "x"
    ].sum().backward()
    assert torch.equal(x.grad, torch.ones(2))  # type: ignore[arg-type]


# -- ForwardMode -----------------------------------------------------------------------------------


def trained(strategy: Strategy, rule: str, steps: int, second_too: bool) -> list[Tensor]:
    """First and second derivatives with respect to hyper-parameters of loss and optimizer, through
    dropout and batch norm."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 1)
    )
    rules = {
        "sgd": innerloop.optim.sgd(),
        "momentum": innerloop.optim.sgd(momentum=0.9),
        "adam": innerloop.optim.adam(eps=0.1),
    }

    def loss(model: nn.Module, hyper: Any, t: int) -> tuple[Tensor, Tensor]:
        value = (model(smooth_noise(8, 3, phase=float(t))) - hyper["shift"].sum()).square().mean()
        return value, hyper["shift"].square().sum() * value

    problem = innerloop.Problem.from_module(
        model, loss, rules[rule], optimizer_hyper=lambda h, t: {"lr": h["lr"]}
    )
    hyper = {
        "lr": torch.tensor(0.05, requires_grad=True),
        "shift": torch.tensor([0.3, 0.1], requires_grad=True),
        "unused": torch.tensor([1, 2]),
    }
    # The second outer derivative needs a third one, which torch's batch norm has wrong (2.13), or
    # lacks (2.15).
    with innerloop.nn.any_order() if second_too else contextlib.nullcontext():
        traj = innerloop.unroll(
            problem,
            {n: p.detach() for n, p in model.named_parameters()},
            list(range(steps)),
            hyper=hyper,
            strategy=strategy,
            save_at=[steps // 2],
        )
    ends = [*traj.params.values(), *traj.at(steps // 2).params.values(), traj.losses, traj.aux]
    outer = torch.stack([x.sin().sum() for x in ends]).sum()
    first = torch.autograd.grad(outer, [hyper["lr"], hyper["shift"]], create_graph=second_too)
    second = (
        torch.autograd.grad(first[0] + first[1].sum(), [hyper["lr"], hyper["shift"]])
        if second_too
        else ()
    )
    return [outer.detach(), *(x.detach() for x in first), *second, torch.rand(1)]


@pytest.mark.covering(2)
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize(
    ("steps", "second_too"),
    [(t, second) for t in (1, 2, 7, 23) for second in (False, True)] + [(100, False)],
)
def test_forward_mode_equals_store_all(rule: str, steps: int, second_too: bool):
    pairs = zip(
        *(trained(s, rule, steps, second_too) for s in (ForwardMode(), StoreAll())), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def online_problem() -> innerloop.Problem:
    return innerloop.Problem(
        lambda p, hyper, batch: ((p["x"] - batch).square() * hyper["weight"]).sum(),
        innerloop.optim.adam(eps=0.1),
        optimizer_hyper=lambda h, t: {"lr": h["lr"]},
    )


def test_online_hyper_gradients_are_those_of_a_loop_that_ends_there():
    hyper = {"lr": torch.tensor(0.1), "weight": torch.tensor([0.5, 2.0]), "note": "kept"}
    data = [smooth_noise(2, phase=float(t)) for t in range(5)]
    outer = lambda params, hyper: params["x"].sin().sum() * hyper["weight"].sum()  # noqa: E731
    run = ForwardMode().online(outer, online_problem(), {"x": torch.ones(2)}, data, hyper=hyper)
    for t, now in enumerate(run, start=1):
        value, grads = innerloop.metagradient(
            lambda traj, hyper: outer(traj.params, hyper),
            online_problem(),
            {"x": torch.ones(2)},
            data[:t],
            hyper=hyper,
            wrt="hyper",
        )
        assert now.t == t
        torch.testing.assert_close(now.value, value, rtol=1e-12, atol=0)
        for name in ("lr", "weight"):
            torch.testing.assert_close(now.grads[name], grads[name], rtol=1e-10, atol=1e-14)
        assert now.grads["note"] is None
    assert t == 5


def test_online_hyper_parameters_may_be_changed_on_the_way():
    """On w²/2: w_{t+1} = (1 - lr_t) w_t, and the kept derivative is Σ_t d w / d lr_t."""
    problem = innerloop.Problem(
        lambda p, h, b: p["w"].square() / 2, innerloop.optim.sgd(), optimizer_hyper=lambda h, t: h
    )
    run = ForwardMode().online(
        lambda params, hyper: params["w"],
        problem,
        {"w": torch.tensor(8.0)},
        None,
        steps=3,
        hyper={"lr": torch.tensor(0.5)},
    )
    assert next(run).grads["lr"].item() == -8
    now = run.send({"lr": torch.tensor(0.25)})
    assert now.value.item() == 3
    assert now.grads["lr"].item() == -8 * 0.75 - 4
    run.close()


def test_an_operation_without_forward_mode_is_named():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    problem = innerloop.Problem(
        lambda p, h, b: Twice.apply(p["x"] * h).sum(), innerloop.optim.sgd(lr=0.1)
    )
    with pytest.raises(innerloop.NotDifferentiableError, match="needs forward-mode"):
        innerloop.unroll(
            problem,
            {"x": torch.ones(2)},
            None,
            steps=2,
            hyper=torch.tensor(2.0, requires_grad=True),
            strategy=ForwardMode(),
        )


@pytest.mark.parametrize(
    "batches", [None, [0, 0, 0], torch.zeros(3)], ids=["none", "list", "stack"]
)
@pytest.mark.parametrize("last", [3, 5])
def test_truncation_that_cuts_nothing_off_is_exact_for_the_parameters_too(
    last: int, batches: object
):
    """d x_T / d x_0 = (1 - η C)^T, entry by entry."""
    x = torch.ones(3, requires_grad=True)
    steps = 3 if batches is None else None
    given = (quadratic(), {"x": x}, batches)
    options: Any = {"hyper": {"b": torch.zeros(3)}, "steps": steps, "strategy": Truncated(last)}
    traj = innerloop.unroll(*given, **options)
    (gradient,) = torch.autograd.grad(traj.params["x"].sum(), x)
    _, same = innerloop.metagradient(
        lambda traj, h: traj.params["x"].sum(), *given, wrt="params", **options
    )
    exact = (1 - ETA * CURVATURE) ** 3
    torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(same["x"], exact, rtol=1e-12, atol=0)
    with pytest.raises(innerloop.InvalidInputError, match="does not differentiate"):
        innerloop.metagradient(
            lambda traj, h: traj.params["x"].sum(),
            *given,
            wrt="params",
            **{**options, "strategy": Truncated(2)},
        )


# -- what is not differentiated --------------------------------------------------------------------

STRATEGIES = [Truncated(2), FirstOrder(), ForwardMode()]


@pytest.mark.parametrize("strategy", [Truncated(2), ForwardMode()], ids=repr)
def test_parameters_may_require_grad_as_long_as_theirs_is_not_asked_for(strategy: Strategy):
    x, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    traj = innerloop.unroll(quadratic(), {"x": x}, None, steps=4, hyper={"b": b}, strategy=strategy)
    (gradient,) = torch.autograd.grad(traj.params["x"].sum(), b, retain_graph=True)
    torch.testing.assert_close(gradient, hyper_gradient(strategy, 4), rtol=1e-12, atol=0)
    for ask in (
        lambda: torch.autograd.grad(traj.losses[-1], x, retain_graph=True),
        traj.params["x"].sum().backward,
    ):
        with pytest.raises(innerloop.NotDifferentiableError, match="Checkpointed"):
            ask()
    with pytest.raises(innerloop.InnerLoopError, match="does not differentiate"):
        innerloop.metagradient(
            lambda traj, h: traj.params["x"].sum(),
            quadratic(),
            {"x": x},
            None,
            steps=4,
            hyper={"b": b},
            strategy=strategy,
        )


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_what_is_held_constant_raises(strategy: Strategy):
    b = torch.ones(3, requires_grad=True)
    traj = innerloop.unroll(
        quadratic(),
        {"x": torch.ones(3)},
        None,
        steps=4,
        hyper={"b": b},
        strategy=strategy,
        save_at=[1],
    )
    asked = {
        "the last loss": (traj.losses[-1], {"FirstOrder"}),
        "an early loss": (traj.losses[0], {"FirstOrder", "Truncated"}),
        "an early state": (traj.at(1).params["x"].sum(), {"FirstOrder", "Truncated"}),
        "the last state": (traj.params["x"].sum(), {"FirstOrder"}),
    }
    truth = innerloop.unroll(
        quadratic(), {"x": torch.ones(3)}, None, steps=4, hyper={"b": b}, save_at=[1]
    )
    exact = {"an early loss": truth.losses[0], "an early state": truth.at(1).params["x"].sum()}
    for name, (value, refused_by) in asked.items():
        if type(strategy).__name__ in refused_by:
            with pytest.raises(innerloop.NotDifferentiableError, match=type(strategy).__name__):
                torch.autograd.grad(value, b, retain_graph=True)
        else:
            (gradient,) = torch.autograd.grad(value, b, retain_graph=True)
            if name in exact:
                (expected,) = torch.autograd.grad(exact[name], b, retain_graph=True)
                torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_a_tensor_captured_by_the_loss_is_refused_under_first_order():
    w = torch.tensor(2.0, requires_grad=True)
    problem = innerloop.Problem(
        lambda p, h, b: (p["x"] * w).square().sum(), innerloop.optim.sgd(lr=0.1)
    )
    x = torch.ones(2, requires_grad=True)
    traj = innerloop.unroll(problem, {"x": x}, None, steps=2, strategy=FirstOrder())
    (gradient,) = torch.autograd.grad(traj.params["x"].sum(), x, retain_graph=True)
    assert torch.equal(gradient, torch.ones(2))
    with pytest.raises(innerloop.NotDifferentiableError, match="inner loss uses it"):
        torch.autograd.grad(traj.params["x"].sum(), w)


def test_captured_tensors_are_refused_by_forward_mode():
    w = torch.tensor(2.0, requires_grad=True)
    problem = innerloop.Problem(
        lambda p, h, b: (p["x"] * w * h).square().sum(), innerloop.optim.sgd(lr=0.1)
    )
    with pytest.raises(innerloop.CapturedTensorError):
        innerloop.unroll(
            problem,
            {"x": torch.ones(2)},
            None,
            steps=2,
            hyper=torch.tensor(1.0, requires_grad=True),
            strategy=ForwardMode(),
        )


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
        quadratic_problem(optimizer_hyper=lambda h, t: {"lr": lr}),
        {"w": torch.tensor(8.0)},
        None,
        steps=3,
        strategy=FirstOrder(),
    )
    with pytest.raises(innerloop.NotDifferentiableError, match="constants"):
        torch.autograd.grad(traj.params["w"] + traj.losses.sum(), lr, retain_graph=True)
    assert torch.autograd.grad(traj.params["w"], lr)[0] == -(8 + 4 + 2)


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
        (lambda p, h: p["w"], quadratic_problem()),
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


def test_online_names_what_is_not_finite():
    """It handed on nan and inf: a loop that diverges, a derivative of sqrt at 0, an outer loss."""
    w = {"w": torch.ones((), dtype=torch.float64)}
    rate = {"lr": torch.tensor(1e200, dtype=torch.float64)}
    square = innerloop.Problem(
        lambda p, h, b: p["w"].square() / 2, innerloop.optim.sgd(), optimizer_hyper=("lr",)
    )
    run = ForwardMode().online(lambda p, h: p["w"].square(), square, w, None, steps=4, hyper=rate)
    with pytest.raises(innerloop.NonFiniteError, match="the outer loss is not finite after step 0"):
        list(run)

    kink = innerloop.Problem(lambda p, h, b: p["w"] * h["a"].sqrt(), innerloop.optim.sgd(lr=0.1))
    zero = {"a": torch.zeros((), dtype=torch.float64)}
    run = ForwardMode().online(lambda p, h: p["w"], kink, w, None, steps=2, hyper=zero)
    with pytest.raises(innerloop.NonFiniteError, match=r"grads\['a'\] is not finite after step 0"):
        next(run)

    rate = {"lr": torch.tensor(1e120, dtype=torch.float64)}
    run = ForwardMode().online(lambda p, h: p["w"] * 1e-300, square, w, None, steps=9, hyper=rate)
    with pytest.raises(innerloop.NonFiniteError, match="inner loop diverged"):
        list(run)
