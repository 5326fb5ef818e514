"""The contract of every strategy in ``strategies.STRATEGIES``: a loop runs as ``torch.optim`` does,
and is differentiated."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import innerloop
from innerloop import Checkpointed, FirstOrder, StoreAll
from innerloop.strategy import Forecast, Inputs, Objective, Strategy
from tests.oracles import assert_derivative, assert_params, derivative, smooth_noise
from tests.small_problems import Once, one_weight
from tests.strategies import (
    OUTER,
    RULES,
    SAVED,
    STEPS,
    Batch,
    HandWritten,
    along_direction,
    batches,
    copied,
    differentiated,
    direction,
    each_exact_strategy,
    each_outer,
    each_rule,
    each_strategy,
    hyper,
    loss,
    of_params,
    plain_run,
    problem,
    seen,
    start,
    truth,
)

pytestmark = pytest.mark.usefixtures("float64")


def outer_of(name: str) -> Any:
    return lambda traj, hyper: OUTER[name](seen(traj))


def metagradient(
    strategy: Strategy, rule: str, outer: str, **arguments: Any
) -> tuple[Tensor, dict[str, Any]]:
    wrt = tuple(sorted(strategy.differentiates))
    inputs = {"params": start(), "batches": batches(), "hyper": hyper(), "wrt": wrt, **arguments}
    return innerloop.metagradient(
        outer_of(outer), problem(rule), strategy=strategy, save_at=[SAVED], **inputs
    )


def leaves(strategy: Strategy) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs that require grad, as far as the strategy differentiates with respect to them."""
    values = hyper()
    values = {**values, "data": [x.requires_grad_() for x in values["data"]]}
    for name in ("log_lr", "decay"):
        values[name].requires_grad_()
    learned = "params" in strategy.differentiates
    return {name: p.requires_grad_(learned) for name, p in start().items()}, values


# -- forward ---------------------------------------------------------------------------------------


@each_strategy()
@each_rule
def test_the_loop_runs_as_torch_does(strategy: Strategy, rule: str):
    run = plain_run(rule, start(), hyper(), batches())
    traj = innerloop.unroll(
        problem(rule),
        start(),
        batches(),
        hyper=hyper(),
        strategy=strategy,
        save_at=range(STEPS + 1),
    )
    assert traj.steps == STEPS
    assert_params(traj.params, run.params[-1], 1e-12)
    for t in range(STEPS + 1):
        assert_params(traj.at(t).params, run.params[t], 1e-12)
        assert_params(traj.at(t - STEPS - 1).params, run.params[t], 1e-12)
    torch.testing.assert_close(traj.losses, torch.stack(run.losses), rtol=1e-12, atol=0)
    torch.testing.assert_close(traj.aux["prediction"], torch.stack(run.aux), rtol=1e-12, atol=1e-14)
    assert traj.aux["nothing"] is None
    assert traj.aux["examples"].tolist() == [4] * STEPS


@each_strategy("params")
def test_a_loop_of_no_steps_is_the_identity(strategy: Strategy):
    params = {name: p.requires_grad_() for name, p in start().items()}
    traj = innerloop.unroll(problem("adam"), params, [], hyper=hyper(), strategy=strategy)
    assert traj.steps == 0
    assert traj.losses.shape == (0,)
    assert_params(traj.params, {name: p.detach() for name, p in params.items()}, 0)
    traj.params["bias"].sum().backward()
    assert torch.equal(params["bias"].grad, torch.ones(2))  # type: ignore[arg-type]


@each_strategy()
def test_precision_is_kept(strategy: Strategy):
    params = {name: p.float() for name, p in start().items()}
    simple = innerloop.Problem(
        lambda p, hyper, batch: sum((x**2).sum() for x in p.values()), innerloop.optim.adam()
    )
    traj = innerloop.unroll(simple, params, None, steps=3, strategy=strategy)
    assert {p.dtype for p in traj.params.values()} == {torch.float32}
    assert traj.losses.dtype == torch.float32


# -- gradients -------------------------------------------------------------------------------------


@each_exact_strategy()
@each_rule
@each_outer
def test_metagradient_equals_finite_differences(strategy: Strategy, rule: str, outer: str):
    value, gradients = metagradient(strategy, rule, outer)
    assert not value.requires_grad
    assert gradients["hyper"]["power"] is None  # a number is a constant
    for what in differentiated(strategy):
        assert_derivative(
            along_direction(gradients, what), truth(rule, outer, what), f"d {outer} / d {what}"
        )


@each_exact_strategy()
@each_rule
@each_outer
def test_unroll_and_backward_equal_finite_differences(strategy: Strategy, rule: str, outer: str):
    params, values = leaves(strategy)
    traj = innerloop.unroll(
        problem(rule), params, batches(), hyper=values, strategy=strategy, save_at=[SAVED]
    )
    OUTER[outer](seen(traj)).backward()
    gradients = {
        "params": {name: p.grad for name, p in params.items()},
        "hyper": {
            "log_lr": values["log_lr"].grad,
            "decay": values["decay"].grad,
            "data": [x.grad for x in values["data"]],
        },
    }
    for what in differentiated(strategy):
        assert_derivative(
            along_direction(gradients, what), truth(rule, outer, what), f"d {outer} / d {what}"
        )


@each_exact_strategy("every time")
def test_every_time_may_be_asked_for(strategy: Strategy):
    params, values = leaves(strategy)
    traj = innerloop.unroll(problem("momentum"), params, batches(), hyper=values, strategy=strategy)
    OUTER["saved"](seen(traj)).backward()
    ours = sum(
        (p.grad * v).sum().item()
        for p, v in zip(params.values(), direction()["params"].values(), strict=True)
    )
    assert_derivative(ours, truth("momentum", "saved", "params"), "a state without save_at")


@each_exact_strategy("params")
def test_only_what_requires_a_gradient_gets_one(strategy: Strategy):
    """Parameters alone, hyper-parameters alone."""
    params, values = leaves(strategy)
    for learned, given in ((params, hyper()), (start(), values)):
        arguments: dict[str, Any] = {"hyper": given, "strategy": strategy, "save_at": [SAVED]}
        OUTER["all"](
            seen(innerloop.unroll(problem("adam"), learned, batches(), **arguments))
        ).backward()
    ours = {
        "params": {n: p.grad for n, p in params.items()},
        "hyper": {"decay": values["decay"].grad},
    }
    assert_derivative(
        along_direction(ours, "params"), truth("adam", "all", "params"), "params alone"
    )
    assert_derivative(along_direction(ours, "decay"), truth("adam", "all", "decay"), "hyper alone")
    traj = innerloop.unroll(problem("adam"), start(), batches(), hyper=hyper(), strategy=strategy)
    assert not traj.params["bias"].requires_grad


@pytest.mark.parametrize(
    "strategy", [StoreAll(), Checkpointed(), innerloop.ForwardMode()], ids=repr
)
def test_a_complex_parameter(strategy: Strategy):
    """Truth: w = a w₀ with a = (1 - 2 lr h)³, so |w - 1|² = a² |w₀|² - 2 a Re w₀ + 1."""
    rate, h, start = 0.1, 1.0, torch.tensor([3.0 + 2.0j], dtype=torch.complex128)
    problem = innerloop.Problem(
        lambda p, hyper, b: hyper * p["w"].abs().square().sum(), innerloop.optim.sgd(lr=rate)
    )
    _, found = innerloop.metagradient(
        lambda traj, hyper: (traj.params["w"] - 1).abs().square().sum(),
        problem,
        {"w": start},
        None,
        steps=3,
        hyper=torch.tensor(h, dtype=torch.float64),
        wrt="hyper",
        strategy=strategy,
    )
    a, slope = (1 - 2 * rate * h) ** 3, -6 * rate * (1 - 2 * rate * h) ** 2
    assert found.item() == pytest.approx((2 * a * 13 - 2 * 3) * slope, rel=1e-12)


# -- under torch.func ------------------------------------------------------------------------------


@each_exact_strategy()
@each_rule
def test_torch_func_grad(strategy: Strategy, rule: str):
    def behind(inputs: dict[str, Any]) -> Tensor:
        values = {**hyper(), **inputs["hyper"]}
        traj = innerloop.unroll(
            problem(rule),
            inputs.get("params", start()),
            batches(),
            hyper=values,
            strategy=strategy,
            save_at=[SAVED],
        )
        return OUTER["all"](seen(traj))

    inputs = {"params": start(), "hyper": {k: v for k, v in hyper().items() if k != "power"}}
    inputs = {name: inputs[name] for name in strategy.differentiates}
    gradients = torch.func.grad(behind)(inputs)
    for what in differentiated(strategy):
        assert_derivative(
            along_direction(gradients, what), truth(rule, "all", what), f"d / d {what}"
        )


@each_exact_strategy("jvp")
@each_rule
def test_jvp(strategy: Strategy, rule: str):
    for what in differentiated(strategy):

        def behind(h: Tensor, what: str = what) -> Tensor:
            inputs = moved_by(h, what)
            traj = innerloop.unroll(
                problem(rule),
                inputs["params"],
                batches(),
                hyper=inputs["hyper"],
                strategy=strategy,
                save_at=[SAVED],
            )
            return OUTER["all"](seen(traj))

        zero, one = torch.tensor(0.0), torch.tensor(1.0)
        assert_derivative(
            torch.func.jvp(behind, (zero,), (one,))[1].item(),
            truth(rule, "all", what),
            f"d / d {what}",
        )


def moved_by(h: Tensor, what: str) -> dict[str, Any]:
    """`strategies.moved`, differentiable in h."""
    params, values, along = start(), hyper(), direction()
    if what == "params":
        return {
            "params": {name: p + h * along["params"][name] for name, p in params.items()},
            "hyper": values,
        }
    if what == "data":
        values["data"] = [
            x + h * v for x, v in zip(values["data"], along["hyper"]["data"], strict=True)
        ]
    else:
        values[what] = values[what] + h * along["hyper"][what]
    return {"params": params, "hyper": values}


@each_exact_strategy("jvp")
def test_forward_mode_without_torch_func(strategy: Strategy):
    """Dual numbers of ``torch.autograd.forward_ad``: right, or an error; never a missing
    tangent."""
    with forward_ad.dual_level():
        h = forward_ad.make_dual(torch.tensor(0.0), torch.tensor(1.0))
        inputs = moved_by(h, "params")
        arguments: dict[str, Any] = {
            "hyper": inputs["hyper"],
            "strategy": strategy,
            "save_at": [SAVED],
        }
        try:
            traj = innerloop.unroll(problem("momentum"), inputs["params"], batches(), **arguments)
        except innerloop.InnerLoopError:
            return
        tangent = forward_ad.unpack_dual(OUTER["all"](seen(traj))).tangent
    assert tangent is not None
    assert_derivative(tangent.item(), truth("momentum", "all", "params"), "dual numbers")


@each_exact_strategy()
@each_rule
def test_vmap_over_tasks(strategy: Strategy, rule: str):
    """Initial parameters, hyper-parameters and batches of several tasks at once, against one after
    the other."""
    tasks = 3
    shifts = torch.linspace(0.0, 0.4, tasks)
    params = {name: torch.stack([p + s for s in shifts]) for name, p in start().items()}
    values = {
        "log_lr": torch.stack([hyper()["log_lr"] - s for s in shifts]),
        "decay": torch.stack([0.05 + s for s in shifts]),
    }
    stacked = Batch(*(torch.stack(column) for column in zip(*batches(), strict=True)))
    data = Batch(
        torch.stack([stacked.rows] * tasks), torch.stack([stacked.noise + s for s in shifts])
    )

    def task(params: Any, values: Any, data: Any) -> Any:
        value, gradients = metagradient(
            strategy, rule, "all", params=params, hyper={**hyper(), **values}, batches=data
        )
        return (
            value,
            gradients.get("params", {}),
            {name: gradients["hyper"][name] for name in ("log_lr", "decay")},
        )

    together = torch.func.vmap(task)(params, values, data)
    for i in range(tasks):
        pick = lambda tree: torch.utils._pytree.tree_map(lambda x: x[i], tree)  # noqa: B023, E731
        torch.testing.assert_close(
            pick(together), task(pick(params), pick(values), pick(data)), rtol=1e-11, atol=1e-13
        )


@each_exact_strategy("params")
def test_hessian_of_the_meta_objective(strategy: Strategy):
    """On a quadratic inner loss x_T = M x_0, and the Hessian of |x_T|²/2 is M'M."""
    curvature = torch.tensor([[2.0, 0.3], [0.3, 1.0]])
    quadratic = innerloop.Problem(
        lambda p, hyper, batch: p["x"] @ curvature @ p["x"] / 2, innerloop.optim.sgd(lr=0.2)
    )

    def behind(x: Tensor) -> Tensor:
        return (
            innerloop.unroll(quadratic, {"x": x}, None, steps=5, strategy=strategy)
            .params["x"]
            .square()
            .sum()
            / 2
        )

    power = torch.linalg.matrix_power(torch.eye(2) - 0.2 * curvature, 5)
    x = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(
        torch.func.hessian(behind)(x), power.T @ power, rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(
        torch.func.grad(behind)(x), power.T @ power @ x, rtol=1e-12, atol=1e-14
    )
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(behind(leaf), leaf, create_graph=True)
    (row,) = torch.autograd.grad(gradient[0], leaf)
    torch.testing.assert_close(row, (power.T @ power)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated"
)  # raised inside of torch's compiler
@pytest.mark.compiled
@pytest.mark.slow
@each_exact_strategy("compile")
@each_rule
def test_compiled(strategy: Strategy, rule: str):
    _, gradients = metagradient(strategy, rule, "all", compile=True)
    for what in differentiated(strategy):
        assert_derivative(
            along_direction(gradients, what), truth(rule, "all", what), f"compiled: d / d {what}"
        )


# -- continuation ----------------------------------------------------------------------------------


@each_exact_strategy("params")
@each_rule
def test_a_loop_continues_from_a_carry(strategy: Strategy, rule: str):
    """One and three steps make four: parameters, optimizer state, losses, and the gradient through
    the carry."""
    params, values = leaves(strategy)
    run = plain_run(rule, start(), hyper(), batches())
    shared: dict[str, Any] = {"hyper": values, "strategy": strategy}
    first = innerloop.unroll(problem(rule), params, batches()[:1], **shared)
    second = innerloop.unroll(problem(rule), first.at(-1), batches()[1:], **shared)
    assert_params({n: p.detach() for n, p in second.params.items()}, run.params[-1], 1e-12)
    torch.testing.assert_close(
        torch.cat([first.losses, second.losses]).detach(),
        torch.stack(run.losses),
        rtol=1e-12,
        atol=0,
    )

    of_params(second.params).backward()
    gradients = {
        "params": {name: p.grad for name, p in params.items()},
        "hyper": {
            "log_lr": values["log_lr"].grad,
            "decay": values["decay"].grad,
            "data": [x.grad for x in values["data"]],
        },
    }
    for what in differentiated(strategy):
        assert_derivative(
            along_direction(gradients, what),
            truth(rule, "params", what),
            f"through a carry: d / d {what}",
        )


@each_exact_strategy("params")
def test_metagradient_from_a_carry(strategy: Strategy):
    """``wrt="params"`` is the carry's parameters; its optimizer state is a constant. Truth: a warm
    torch optimizer."""
    first = innerloop.unroll(
        problem("adam"), start(), batches()[:2], hyper=hyper(), strategy=strategy
    )
    carry = first.at(-1)

    def plain(h: float) -> float:
        leaves = {name: p.requires_grad_() for name, p in start().items()}
        optimizer = RULES["adam"].torch(list(leaves.values()), 0.1)
        for t, batch in enumerate([*batches()[:2], *batches()[:2]]):
            if t == 2:
                with torch.no_grad():
                    for name, p in leaves.items():
                        p.add_(h * direction()["params"][name])
            optimizer.param_groups[0]["lr"] = hyper()["log_lr"][t].exp().item()
            optimizer.zero_grad()
            loss(leaves, hyper(), batch)[0].backward()
            optimizer.step()
        return of_params(copied(leaves)).item()

    _, gradients = innerloop.metagradient(
        outer_of_params,
        problem("adam"),
        carry,
        batches()[:2],
        hyper=hyper(),
        wrt="params",
        strategy=strategy,
    )
    ours = sum((gradients[name] * v).sum().item() for name, v in direction()["params"].items())
    assert_derivative(ours, derivative(plain), "from a carry")


def outer_of_params(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
    return of_params(traj.params)


SCHEDULE = (0.5, 0.1, 0.2, 0.3)


@each_strategy()
def test_a_schedule_goes_on_where_the_last_loop_stopped(strategy: Strategy):
    """Four steps in one piece are two and two: w is multiplied by 1 - rate of each step, so that
    8 becomes 8 * 0.5 * 0.9 * 0.8 * 0.7 = 2.016. A data function is told the time, too."""
    told: list[int] = []

    def data(params: Any, hyper: Any, t: int) -> Tensor:
        told.append(t)
        return torch.tensor(0.0)

    decay = innerloop.Problem(
        lambda params, hyper, batch: (params["w"] - batch) ** 2 / 2,
        innerloop.optim.sgd(),
        optimizer_hyper=lambda hyper, t: {"lr": hyper["rates"][t]},
    )
    hyper = {"rates": torch.tensor(SCHEDULE)}
    whole = innerloop.unroll(
        decay, {"w": torch.tensor(8.0)}, data, steps=4, hyper=hyper, strategy=strategy
    )
    first = innerloop.unroll(
        decay, {"w": torch.tensor(8.0)}, data, steps=2, hyper=hyper, strategy=strategy
    )
    told.clear()
    second = innerloop.unroll(
        decay, first.at(-1), data, steps=2, hyper=hyper, strategy=strategy, save_at=[1]
    )
    assert whole.params["w"].item() == pytest.approx(2.016, rel=1e-14)
    assert second.params["w"].item() == pytest.approx(2.016, rel=1e-14)
    assert set(told) == {2, 3}
    assert [second.at(t).time for t in (0, 1, 2)] == [2, 3, 4]
    again = innerloop.unroll(
        decay, first.at(-1)._replace(time=0), data, steps=2, hyper=hyper, strategy=strategy
    )
    assert again.params["w"].item() == pytest.approx(8 * (0.5 * 0.9) ** 2, rel=1e-14)


@each_exact_strategy()
def test_the_gradient_of_a_schedule_goes_on_as_well(strategy: Strategy):
    """d w4 / d rate_t = -w4 / (1 - rate_t), for the steps of the second loop; a list of batches
    counts from the second loop's start."""
    decay = innerloop.Problem(
        lambda params, hyper, batch: (params["w"] - batch) ** 2 / 2,
        innerloop.optim.sgd(),
        optimizer_hyper=lambda hyper, t: {"lr": hyper["rates"][t]},
    )
    rates = torch.tensor(SCHEDULE)
    carry = innerloop.unroll(
        decay, {"w": torch.tensor(8.0)}, [torch.tensor(0.0)] * 2, hyper={"rates": rates}
    ).at(-1)
    _, grads = innerloop.metagradient(
        lambda traj, hyper: traj.params["w"],
        decay,
        carry,
        [torch.tensor(0.0)] * 2,
        hyper={"rates": rates},
        wrt="hyper",
        strategy=strategy,
    )
    expected = [0.0, 0.0, -2.016 / 0.8, -2.016 / 0.7]
    torch.testing.assert_close(grads["rates"], torch.tensor(expected), rtol=1e-12, atol=0)


# -- strategies of a user's own --------------------------------------------------------------------


def test_a_strategy_of_a_users_own_can_be_planned():
    """`HandWritten` stands under this contract; `plan` measures it like one of the package's."""
    forecast = innerloop.plan(
        problem("adam"), start(), batches(), hyper=hyper(), strategies=[HandWritten()]
    )
    (row,) = forecast.rows
    assert row.strategy is forecast.best
    assert 0 < row.seconds < 10
    assert 0 < row.bytes < 1e7
    assert "HandWritten()" in str(forecast)


@dataclasses.dataclass(frozen=True)
class Sampled(HandWritten):
    """Estimates the gradient by evaluating the outer loss at random displacements."""

    exact = False

    def value_and_grad(
        self, objective: Objective, inputs: Inputs, wrt: tuple[str, ...]
    ) -> tuple[Any, dict[str, Any]]:
        assert wrt == ("hyper",)
        rate, width = inputs.hyper["lr"], 0.01  # type: ignore[index, call-overload]
        signs = torch.randint(0, 2, (8,)) * 2 - 1
        with torch.no_grad():
            slopes = [
                sign * (objective(inputs._replace(hyper={"lr": rate + width * sign}))[0])
                for sign in (*signs, *-signs)
            ]
            result = objective(inputs)[1]
        return result, {"hyper": {"lr": torch.stack(slopes).mean() / width}}

    def forecast(self, measure: innerloop.strategy.Measure) -> Forecast:
        plain = measure.plain()
        return Forecast(17 * plain.seconds.at(measure.steps), plain.bytes.at(1))


def test_a_strategy_may_sample_the_outer_loss():
    """w3 = 8 (1 - lr)^3: its slope at 0.5 is -6, and the third-order term of a difference of width
    0.01 is 8e-4. Nothing is recorded."""
    decay = innerloop.Problem(
        lambda params, hyper, batch: params["w"] ** 2 / 2,
        innerloop.optim.sgd(),
        optimizer_hyper=("lr",),
    )
    start, hyper = {"w": torch.tensor(8.0)}, {"lr": torch.tensor(0.5)}
    value, grads = innerloop.metagradient(
        lambda traj, hyper: (traj.params["w"], traj.steps),
        decay,
        start,
        None,
        steps=3,
        hyper=hyper,
        wrt="hyper",
        strategy=Sampled(),
    )
    assert value == (1.0, 3)  # type: ignore[comparison-overlap]
    assert grads["lr"].item() == pytest.approx(-6 - 8e-4, rel=1e-9)
    (row,) = innerloop.plan(decay, start, None, steps=3, hyper=hyper, strategies=[Sampled()]).rows
    assert 0 < row.seconds < 10
    assert 0 < row.bytes < 1e6


# -- batches ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


X, Y = 0.5 * smooth_noise(STEPS, 5, 3), smooth_noise(STEPS, 5, phase=2.0)
FORMS: dict[str, tuple[Any, Any]] = {
    "list of tuples": ([(X[t], Y[t]) for t in range(STEPS)], lambda b: b),
    "list of dicts": (
        [{"x": X[t], "y": Y[t], "note": "text"} for t in range(STEPS)],
        lambda b: (b["x"], b["y"]),
    ),
    "list of numbers": (list(range(STEPS)), lambda b: (X[b], Y[b])),
    "stacked tuple": ((X, Y), lambda b: b),
    "stacked dict": ({"x": X, "y": Y}, lambda b: (b["x"], b["y"])),
    "stacked NamedTuple": (Pair(X, Y), lambda b: (b.x, b.y)),
    "stacked nested": ({"pair": Pair(X, Y), "weights": (X,)}, lambda b: (b["pair"].x, b["pair"].y)),
    "one stacked tensor": (torch.cat([X, Y.unsqueeze(-1)], -1), lambda b: (b[:, :3], b[:, 3])),
    "callable": (lambda params, hyper, t: Pair(X[t], Y[t]), lambda b: (b.x, b.y)),
    "indices into hyper": (torch.arange(STEPS), None),
}


@each_strategy()
@pytest.mark.parametrize("form", list(FORMS))
def test_batches_in_every_form(strategy: Strategy, form: str):
    """The same data, so the same losses, as a plain loop gives."""
    given, unpack = FORMS[form]

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        x, y = (hyper[0][batch], hyper[1][batch]) if unpack is None else unpack(batch)
        return (x @ params["w"] - y).square().mean()

    learned = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.3))
    steps = STEPS if callable(given) else None
    traj = innerloop.unroll(
        learned, {"w": torch.ones(3)}, given, hyper=[X, Y], steps=steps, strategy=strategy
    )
    w = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.3)
    for t in range(STEPS):
        optimizer.zero_grad()
        expected = (X[t] @ w - Y[t]).square().mean()
        torch.testing.assert_close(traj.losses[t], expected.detach(), rtol=1e-12, atol=0)
        expected.backward()
        optimizer.step()
    torch.testing.assert_close(traj.params["w"], w.detach(), rtol=1e-12, atol=1e-14)


@each_exact_strategy("params")
def test_what_a_callable_returns_is_constant_for_the_derivative(strategy: Strategy):
    """Batches sampled from the current parameters: truth holds them at the values that the first
    run had."""

    def sampled(params: Any, hyper: Any, t: int) -> Tensor:
        return (params["w"] * hyper["scale"] + t).sin()

    simple = innerloop.Problem(
        lambda p, hyper, batch: (p["w"] * batch).square().sum(), innerloop.optim.sgd(lr=0.1)
    )
    values, begin = (
        {"scale": torch.tensor(1.5), "shift": torch.tensor(0.0)},
        torch.tensor([0.5, -1.0]),
    )
    outer = lambda traj, hyper: traj.params["w"].square().sum() + hyper["shift"]  # noqa: E731
    _, gradients = innerloop.metagradient(
        outer, simple, {"w": begin}, sampled, hyper=values, steps=3, strategy=strategy
    )

    seen_batches, w = [], begin.clone()
    for t in range(3):
        seen_batches.append((w * 1.5 + t).sin())
        w = w * (1 - 0.2 * seen_batches[-1] ** 2)
    product = torch.stack([1 - 0.2 * b**2 for b in seen_batches]).prod(0)
    torch.testing.assert_close(
        gradients["params"]["w"], 2 * product**2 * begin, rtol=1e-12, atol=1e-14
    )
    assert gradients["hyper"] == {"scale": 0, "shift": 1}
    with pytest.raises(
        innerloop.NotDifferentiableError, match="no gradient arrives at hyper"
    ):  # nothing else uses it
        innerloop.metagradient(
            lambda traj, hyper: traj.params["w"].sum(),
            simple,
            {"w": begin},
            sampled,
            hyper=values,
            steps=3,
            strategy=strategy,
        )


# -- buffers and random numbers --------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.norm(self.body(x)).tanh(), 0.4, training=self.training))


def noisy(shift: float = 0.0) -> Noisy:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Noisy()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(shift * smooth_noise(*p.shape, phase=80.0 + i))
    return model


def noisy_loss(model: nn.Module, hyper: Any, t: Any) -> Tensor:
    return (
        (model(smooth_noise(8, 3, phase=float(t))) - smooth_noise(8, 1, phase=t + 0.5))
        .square()
        .mean()
    )


@each_strategy()
def test_buffers_and_random_numbers_are_those_of_a_plain_run(strategy: Strategy):
    """Dropout draws the same masks, running statistics come out the same, and afterwards the
    generator stands where it should."""

    def plain() -> tuple[Noisy, Tensor]:
        model = noisy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(5)
        for t in range(STEPS):
            optimizer.zero_grad()
            noisy_loss(model, None, t).backward()
            optimizer.step()
        return model, torch.get_rng_state()

    truth, state = plain()
    model = noisy()
    learned = innerloop.Problem.from_module(model, noisy_loss, innerloop.optim.sgd(lr=0.1))
    torch.manual_seed(5)
    traj = innerloop.unroll(
        learned, dict(model.named_parameters()), list(range(STEPS)), strategy=strategy
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert_params(
        {n: p.detach() for n, p in traj.params.items()},
        {n: p.detach() for n, p in truth.named_parameters()},
        1e-12,
    )
    assert_params(traj.at(-1).buffers, dict(truth.named_buffers()), 1e-12)
    assert_params(dict(model.named_buffers()), dict(noisy().named_buffers()), 0)

    # From a carry the same again, whatever has been drawn in between.
    begin = learned.init(dict(model.named_parameters()))
    torch.manual_seed(5)
    begin = begin._replace(random_state=learned.init(dict(model.named_parameters())).random_state)
    torch.rand(17)
    again = innerloop.unroll(learned, begin, list(range(STEPS)), strategy=strategy)
    assert_params(
        {n: p.detach() for n, p in again.params.items()},
        {n: p.detach() for n, p in traj.params.items()},
        0,
    )


@each_exact_strategy("params")
def test_gradients_through_dropout_and_batch_norm(strategy: Strategy):
    def plain(h: float) -> float:
        model = noisy(h)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(5)
        for t in range(STEPS):
            optimizer.zero_grad()
            noisy_loss(model, None, t).backward()
            optimizer.step()
        return sum(p.sin().sum().item() for p in model.parameters())

    model = noisy()
    learned = innerloop.Problem.from_module(model, noisy_loss, innerloop.optim.sgd(lr=0.1))
    torch.manual_seed(5)
    _, gradients = innerloop.metagradient(
        lambda traj, hyper: torch.stack([p.sin().sum() for p in traj.params.values()]).sum(),
        learned,
        dict(model.named_parameters()),
        list(range(STEPS)),
        wrt="params",
        strategy=strategy,
    )
    ours = sum(
        (g * smooth_noise(*g.shape, phase=80.0 + i)).sum().item()
        for i, g in enumerate(gradients.values())
    )
    assert_derivative(ours, derivative(plain), "noisy module")


@each_exact_strategy("params")
def test_vmap_over_tasks_with_buffers(strategy: Strategy):
    """Each task has its own running statistics, whether the carry holds a batch of them or not."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    learned = innerloop.Problem.from_module(
        model, lambda m, hyper, x: m(x).square().mean(), innerloop.optim.sgd(lr=0.1)
    )
    params = {name: p.detach() for name, p in model.named_parameters()}
    tasks = torch.stack([smooth_noise(STEPS, 8, 3, phase=float(i)) for i in range(3)])

    def task(data: Tensor, buffers: Any = None) -> tuple[Any, Any]:
        carry = learned.init(params)
        carry = carry if buffers is None else carry._replace(buffers=buffers)
        (_, after), gradients = innerloop.metagradient(
            lambda traj, hyper: (traj.losses.sum(), traj.at(-1).buffers),
            learned,
            carry,
            data,
            wrt="params",
            strategy=strategy,
        )
        return after, gradients

    batched = {name: torch.stack([b] * 3) for name, b in model.named_buffers()}
    for given in ((tasks, batched), (tasks,)):
        together = torch.func.vmap(task)(*given)
        for i, data in enumerate(tasks):
            for ours, alone in zip(together, task(data), strict=True):
                assert_params({name: x[i] for name, x in ours.items()}, alone, 1e-12)


@each_strategy()
def test_an_error_in_a_step_leaves_the_random_numbers_alone(strategy: Strategy):
    def failing(params: Any, hyper: Any, t: int) -> Tensor:
        torch.rand(3)
        if t == 2:
            raise KeyError("a bug of the user")
        return params["w"].square().sum()

    before = torch.get_rng_state()
    with pytest.raises(KeyError, match="a bug of the user"):
        innerloop.unroll(
            innerloop.Problem(failing, innerloop.optim.sgd()),
            {"w": torch.ones(2)},
            list(range(4)),
            strategy=strategy,
        )
    assert torch.equal(torch.get_rng_state(), before)


# -- the object itself -----------------------------------------------------------------------------


@each_strategy()
def test_it_says_what_it_is(strategy: Strategy):
    assert isinstance(strategy.exact, bool)
    assert strategy.differentiates <= {"params", "hyper"}
    assert repr(strategy).startswith(type(strategy).__name__ + "(")
    scope = {**vars(innerloop.strategy), "HandWritten": HandWritten}
    assert eval(repr(strategy), scope) == strategy  # noqa: S307
    assert dataclasses.is_dataclass(strategy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.exact = False
    text = type(strategy).__doc__ or ""
    for word in ("Cost", "When", "Not"):
        assert word in text, f"the docstring of {type(strategy).__name__} lacks **{word}**"


@pytest.mark.parametrize(
    "strategy",
    [
        StoreAll(),
        Checkpointed(slots=2),
        Checkpointed(product="mixed"),
        Checkpointed(product="finite"),
        innerloop.ForwardMode(),
        innerloop.Truncated(last=25),
    ],
    ids=repr,
)
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


@pytest.mark.parametrize("strategy", [StoreAll(), Checkpointed()], ids=repr)
def test_a_second_derivative_that_torch_would_drop_is_named(strategy: Strategy):
    """d w_2 / d w_0 is (1 - lr)^2 = 1/4; torch says 1, because the gradient that comes in does not
    require grad."""
    problem = innerloop.Problem(lambda p, h, b: Once.apply(p["w"]) / 2, innerloop.optim.sgd(lr=0.5))
    with pytest.raises(
        innerloop.NotDifferentiableError, match="Once is marked once_differentiable"
    ):
        innerloop.unroll(problem, one_weight(), None, steps=2, strategy=strategy).params[
            "w"
        ].backward()
    params = one_weight()
    innerloop.unroll(problem, params, None, steps=2, strategy=FirstOrder()).params["w"].backward()
    assert params["w"].grad == 1
