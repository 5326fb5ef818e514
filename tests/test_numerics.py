"""Where the arithmetic of an update rule is delicate: gradients of exactly zero, tiny and infinite
ones, mixed dtypes, closed forms."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import innerloop
from innerloop import optim
from innerloop.optim._engine.numerics import safe_sqrt
from tests.optimizers import (
    RULES,
    Rule,
    cases,
    covering,
    defaults,
    each_hyper,
    each_rule,
    gentle,
    leaf,
    leaves,
    meta_gradient,
    outer_of_torch,
    override,
    read,
    train,
)
from tests.oracles import (
    Params,
    Task,
    assert_derivative,
    assert_params,
    directional,
    inner,
    smooth_noise,
    torch_run,
)

pytestmark = pytest.mark.usefixtures("float64")
STEPS = 12


@contextmanager
def anomaly_detection() -> Iterator[None]:
    """Any backward function that returns a NaN raises, also where the NaN would be multiplied away
    later. Where the forward call stands is not kept: the formatted stack of every operation takes
    longer than the test."""
    with (
        warnings.catch_warnings(),
        mock.patch("torch.fx.traceback.format_stack", return_value=["not kept\n"]),
    ):
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled", UserWarning)
        with torch.autograd.set_detect_anomaly(True):
            yield


# -- gradient entries that are exactly zero --------------------------------------------------------


def autograd_gradient(task: Task) -> Any:
    """The inner gradient as a hand-written loop takes it, with a graph; ``torch.func.grad`` is the
    other way."""

    def gradient(params: Params, t: int) -> Params:
        inputs = {
            name: value if value.requires_grad else value.clone().requires_grad_()
            for name, value in params.items()
        }
        grads = torch.autograd.grad(task.loss(inputs, t), list(inputs.values()), create_graph=True)
        return dict(zip(inputs, grads, strict=True))

    return gradient


def has_eps(rule: Rule) -> list[dict[str, Any]]:
    """Settings without eps = 0, where torch itself divides 0 by 0."""
    return [settings for settings in covering(rule) if settings.get("eps") != 0]


def dead_entries(task: Task) -> Params:
    """The direction that moves only what has no gradient."""
    direction = {name: torch.zeros_like(value) for name, value in task.params().items()}
    direction["weight"][1] = direction["weight"][:, 4] = direction["bias"][4] = 1.0
    return direction


@cases(lambda rule: has_eps(rule)[:5], always=1)
def test_meta_gradients_are_right_where_gradient_entries_are_zero(
    rule: Rule, settings: dict[str, Any]
):
    """All hyper-parameters are numbers, so that only the initial parameters are differentiated;
    then all are tensors."""
    task, full = Task(dead=True), defaults(rule, settings)
    outer = outer_of_torch(rule, settings, task, STEPS)
    numbers = {
        name: read(full, name) for name in rule.smooth(full) if not bends(name, read(full, name))
    }
    along = {name: smooth_noise(*value.shape, phase=7.0) for name, value in task.params().items()}
    for values, direction in (({}, dead_entries(task)), (numbers, along)):
        with anomaly_detection():
            ours = meta_gradient(rule, settings, task, values, STEPS)
        assert all(value.isfinite().all() for value in (*ours[0].values(), *ours[1].values()))
        v = (direction, gentle(values, itertools.repeat(0.2)))
        truth = directional(lambda at: outer(*at), (task.params(), values), v, largest=5e-5)
        assert abs(truth) > 1e-3
        assert_derivative(inner(ours, v), truth, f"d outer / d (init, {list(values)})")


def bends(name: str, value: float) -> bool:
    """At decay 0 and a zero gradient, Adam's update is g / (|g| + eps) of g = decay · p: its second
    derivative jumps."""
    return name == "weight_decay" and value == 0


@each_hyper(always=2)
def test_each_hyper_gradient_is_right_where_gradient_entries_are_zero(rule: Rule, name: str):
    """One hyper-parameter a tensor; weight decay 0, or it would make the gradient entries
    nonzero."""
    task, settings = Task(dead=True), rule.undecayed
    value = read(settings, name)
    with anomaly_detection():
        ours = meta_gradient(rule, settings, task, {name: value}, STEPS)[1][name]
    outer = outer_of_torch(rule, settings, task, STEPS)
    # Where the second derivative jumps, the difference quotient is right to first order in its step
    # only (see test_oracles).
    options = {"largest": 1e-6, "need": 1e-5} if bends(name, value) else {"largest": 5e-5}
    truth = directional(lambda v: outer(task.params(), {name: v}), value, 1.0, **options)
    assert abs(truth) > 1e-3
    assert_derivative(
        float(ours), truth, f"d outer / d {name}", relative=1e-5 if bends(name, value) else 1e-6
    )


@each_rule()
def test_an_inner_gradient_taken_by_autograd_is_as_clean(rule: Rule):
    """A hand-written loop takes it with ``create_graph``, where ``Problem`` uses
    ``torch.func.grad``."""
    task, found = Task(dead=True), []
    for gradient in (autograd_gradient(task), torch.func.grad(task.loss)):
        params = leaves(task.params())
        with anomaly_detection():
            outer = task.outer(
                train(rule.make(**rule.typical), task, params, steps=STEPS, gradient=gradient)
            )
            found.append(
                dict(zip(params, torch.autograd.grad(outer, list(params.values())), strict=True))
            )
    assert_params(found[0], found[1], 1e-12)


@each_rule()
def test_every_gradient_zero_at_every_step(rule: Rule):
    """A fully clipped minibatch: nothing moves but by weight decay, and the derivative says exactly
    that."""
    settings = {**rule.undecayed, **({"lambd": 0.0} if "lambd" in rule.hyper else {})}
    params = {"p": smooth_noise(5).requires_grad_()}
    zero = lambda params, t: {"p": params["p"] * 0}  # noqa: E731
    hyper = {name: leaf(read(settings, name)) for name in rule.hyper}
    with anomaly_detection():
        final = train(
            rule.make(**settings),
            Task(),
            params,
            override(rule, settings, hyper),
            steps=STEPS,
            gradient=zero,
        )["p"]
        found = torch.autograd.grad(final.sum(), [params["p"], *hyper.values()])
    assert torch.equal(final, params["p"])
    assert torch.equal(found[0], torch.ones(5))
    by_name = dict(zip(hyper, found[1:], strict=True))
    assert all(value.isfinite() for value in by_name.values())
    assert all(
        value == 0 for name, value in by_name.items() if name not in ("weight_decay", "lambd")
    )


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float64, (1e-12, 1e-160, 1e-200, 1e-320)),
        (torch.float32, (1e-12, 1e-21, 1e-30, 1e-42)),
    ],
    ids=["float64", "float32"],
)
@cases(has_eps)
def test_tiny_gradients_have_the_forward_of_torch_and_finite_derivatives(
    rule: Rule, settings: dict[str, Any], dtype: torch.dtype, sizes: tuple[float, ...]
):
    """Squares underflow, to subnormal numbers and to zero, while the gradient itself does not."""
    params = {"p": smooth_noise(5).to(dtype)}
    for size in sizes:
        slopes = (size * smooth_noise(5, phase=1.0)).to(dtype)
        gradient = lambda params, t, slopes=slopes: {"p": slopes * (1 + params["p"] / 4)}  # noqa: E731
        truth = torch_run(rule.torch, {**settings, "foreach": False}, params, gradient, 4)
        given, lr = leaves(params), leaf(settings["lr"], dtype)
        with anomaly_detection():
            final = train(
                rule.make(**settings), Task(), given, {"lr": lr}, steps=4, gradient=gradient
            )
            found = torch.autograd.grad(final["p"].sum(), [given["p"], lr])
        assert all(value.isfinite().all() for value in found)
        assert_params(
            train(rule.make(**settings), Task(), params, steps=4, gradient=gradient), truth, 0
        )


@cases(covering)
def test_infinite_and_undefined_gradients_pass_as_in_torch(rule: Rule, settings: dict[str, Any]):
    params = {"p": smooth_noise(6)}
    bad = torch.tensor([1.0, math.inf, -math.inf, math.nan, 1e200, -1e308], dtype=torch.float64)
    gradient = lambda params, t: {"p": bad if t == 1 else smooth_noise(6, phase=float(t))}  # noqa: E731
    truth = torch_run(rule.torch, {**settings, "foreach": False}, params, gradient, 3)
    good = torch_run(
        rule.torch, settings, params, lambda params, t: {"p": smooth_noise(6, phase=float(t))}, 3
    )
    assert not torch.allclose(truth["p"], good["p"])
    assert_params(
        train(rule.make(**settings), Task(), params, steps=3, gradient=gradient), truth, 0
    )


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if "eps" in rule.hyper], ids=lambda rule: rule.name
)
def test_eps_zero_at_a_zero_gradient_is_undefined_as_in_torch(rule: Rule):
    params, zero = {"p": torch.ones(2)}, lambda params, t: {"p": torch.tensor([0.0, 1.0])}
    settings = {"lr": 0.1, "eps": 0.0}
    truth = torch_run(rule.torch, settings, params, zero, rule.steps)
    assert truth["p"][0].isnan()
    assert_params(
        train(rule.make(**settings), Task(), params, steps=rule.steps, gradient=zero), truth, 0
    )


# -- closed forms ----------------------------------------------------------------------------------

CURVATURE = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def quadratic(params: Params, t: int) -> Params:
    return {"x": CURVATURE @ params["x"]}


def test_sgd_with_momentum_on_a_quadratic_is_a_matrix_power():
    lr, momentum, decay, steps = leaf(0.1), leaf(0.9), leaf(0.05), 10
    start = leaves({"x": START})
    hyper = {"lr": lr, "momentum": momentum, "weight_decay": decay}
    final = train(
        innerloop.optim.sgd(momentum=0.5), Task(), start, hyper, steps=steps, gradient=quadratic
    )["x"]
    eye = torch.eye(3, dtype=torch.float64)

    def closed(lr: Tensor, momentum: Tensor, decay: Tensor, x: Tensor) -> Tensor:
        gradient = CURVATURE + decay * eye
        step = torch.cat(
            [
                torch.cat([eye - lr * gradient, -lr * momentum * eye], 1),
                torch.cat([gradient, momentum * eye], 1),
            ]
        )
        return (torch.linalg.matrix_power(step, steps)[:3, :3] @ x).sum()

    torch.testing.assert_close(
        final.sum(), closed(lr, momentum, decay, start["x"]), rtol=1e-13, atol=1e-13
    )
    wanted = [lr, momentum, decay, start["x"]]
    ours = torch.autograd.grad(final.sum(), wanted)
    truth = torch.autograd.grad(closed(*wanted), wanted)
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_two_steps_of_momentum_by_hand():
    """facts.md: .72, where ``torch.optim.SGD(differentiable=True)`` says .90."""
    p = leaf(1.0)
    final = train(
        innerloop.optim.sgd(lr=0.1, momentum=0.9),
        Task(),
        {"p": p},
        steps=2,
        gradient=lambda params, t: params,
    )["p"]
    assert torch.autograd.grad(final, p)[0].item() == pytest.approx(0.72, abs=1e-14)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_two_adam_steps_by_hand(amsgrad: bool):
    g1, g2 = 0.7, -0.4
    lr, beta1, beta2, eps = leaf(0.05), leaf(0.9), leaf(0.99), leaf(0.01)
    gradients = [torch.tensor(g, dtype=torch.float64) for g in (g1, g2)]
    final = train(
        innerloop.optim.adam(amsgrad=amsgrad),
        Task(),
        {"x": torch.zeros((), dtype=torch.float64)},
        {"lr": lr, "betas": (beta1, beta2), "eps": eps},
        steps=2,
        gradient=lambda _, t: {"x": gradients[t]},
    )["x"]
    mean = (beta1 * g1 + g2) / (1 + beta1)
    square = (beta2 * g1**2 + g2**2) / (
        1 + beta2
    )  # v_2 = (1-b)(b g1² + g2²) > v_1 = (1-b) g1²: amsgrad changes nothing here
    closed = -lr * g1 / (g1 + eps) - lr * mean / (square.sqrt() + eps)
    torch.testing.assert_close(final, closed, rtol=1e-14, atol=1e-16)
    wanted = [lr, beta1, beta2, eps]
    for got, expected in zip(
        torch.autograd.grad(final, wanted), torch.autograd.grad(closed, wanted), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-15)


def test_the_padding_between_packed_tensors_never_reaches_a_gradient():
    """Small tensors are updated side by side, padded: a learning rate far too large for the padding
    must not turn 0 · inf to NaN."""
    for rule in RULES:
        params = {f"p{i}": torch.full((i + 1,), 1e-3, dtype=torch.float32) for i in range(3)}

        def slope(params: Params, rule: Rule = rule) -> Tensor:
            lr = leaf(1e30, torch.float32)
            tiny = lambda params, t: {n: 1e-32 * p for n, p in params.items()}  # noqa: E731
            final = train(
                rule.make(**rule.typical),
                Task(),
                leaves(params),
                {"lr": lr},
                steps=6,
                gradient=tiny,
            )
            return torch.autograd.grad(sum(p.sum() for p in final.values()), lr)[0]  # type: ignore[arg-type]

        alone = [
            slope({name: value}) for name, value in params.items()
        ]  # nothing lies beside a tensor on its own
        assert slope(params).isfinite() or not all(value.isfinite() for value in alone)


SMOOTHED = [rule for rule in RULES if "eps_root" in rule.make.hyper_names]  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", SMOOTHED, ids=lambda rule: rule.name)
def test_eps_root_makes_the_update_smooth_at_a_zero_gradient(rule: Rule):
    """``torch.optim`` has none: the truth is the finite difference of the forward pass, and of its
    slope."""
    optimizer = rule.make(**{**rule.undecayed, "eps": 1e-8, "eps_root": 0.3})

    def final(x: Tensor) -> Tensor:
        gradient = lambda params, t: {"p": params["p"] * (1 + 0.1 * t)}  # noqa: E731
        p = train(optimizer, Task(), {"p": x.reshape(1)}, steps=rule.steps, gradient=gradient)["p"]
        return (p + 0.3).sin().sum()

    for x in (0.0, 0.2):
        at = leaf(x)
        with anomaly_detection():
            (slope,) = torch.autograd.grad(final(at), at, create_graph=True)
            (bend,) = torch.autograd.grad(slope, at)
        truth = directional(lambda v: float(final(torch.tensor(v))), x, 1.0, largest=1e-3)
        assert_derivative(float(slope.detach()), truth, "slope")
        second = directional(
            lambda v: float(torch.func.grad(final)(torch.tensor(v)).detach()), x, 1.0, largest=1e-3
        )
        assert_derivative(float(bend), second, "second derivative")


@pytest.mark.parametrize("rule", SMOOTHED, ids=lambda rule: rule.name)
def test_eps_root_is_a_hyper_parameter(rule: Rule):
    given, task = leaf(0.2), Task(dead=True)
    optimizer = rule.make(**rule.undecayed)
    value = lambda v: task.outer(  # noqa: E731
        train(optimizer, task, task.params(), {"eps_root": v}, steps=rule.steps)
    )
    truth = directional(lambda v: float(value(v)), 0.2, 1.0)
    assert abs(truth) > 1e-5
    assert_derivative(
        float(torch.autograd.grad(value(given), given)[0]), truth, "d outer / d eps_root"
    )
    zero = leaf(0.0)
    assert torch.autograd.grad(value(zero), zero)[0].isfinite()
    torch.testing.assert_close(value(zero), value(0.0), rtol=1e-12, atol=1e-12)
    with pytest.raises(innerloop.InnerLoopError, match=r"eps_root.*-1"):
        rule.make(eps_root=-1.0)


def test_adagrad_feels_its_first_sums_at_zero():
    """One step moves by lr g / √(s₀ + g²): its derivative in s₀ at 0 is -lr / (2 g²)."""
    first, g = leaf(0.0), torch.tensor([0.5, -2.0], dtype=torch.float64)
    optimizer = innerloop.optim.adagrad(lr=0.1, eps=0.0)
    hyper = {"initial_accumulator_value": first}
    final = train(
        optimizer,
        Task(),
        {"p": torch.zeros_like(g)},
        hyper,
        steps=1,
        gradient=lambda params, t: {"p": g},
    )
    (found,) = torch.autograd.grad((final["p"] * torch.tensor([1.0, -3.0])).sum(), first)
    truth = 0.1 / (2 * 0.25) * 1.0 + -0.1 / (2 * 4.0) * -3.0
    assert found.item() == pytest.approx(truth, rel=1e-14)


def test_rmsprop_feels_a_momentum_of_zero():
    """Torch keeps no buffer below 0, so the slope at 0 is that from the right: the last step's,
    times the step before."""
    momentum, g = leaf(0.0), torch.tensor(0.5, dtype=torch.float64)
    optimizer = innerloop.optim.rmsprop(lr=0.1, alpha=0.75, eps=0.0)
    p = {"p": torch.zeros_like(g)}
    final = train(
        optimizer, Task(), p, {"momentum": momentum}, steps=2, gradient=lambda params, t: {"p": g}
    )
    # b₂ = μ b₁ + g / √v₂ with b₁ = g / √v₁ = 1 / √(1 - α) = 2, and p₂ = -lr (b₁ + b₂).
    assert torch.autograd.grad(final["p"], momentum)[0].item() == pytest.approx(-0.1 * 2, rel=1e-14)


@pytest.mark.parametrize("rule", ["asgd", "nadam"])
def test_a_complex_parameter_keeps_its_step_sizes_when_another_has_no_gradient(rule: str):
    """A complex parameter is two real ones side by side; rates differ, so that each has a step size
    (or product) of its own."""
    start = torch.tensor([1.0 - 2.0j, 0.5 + 0.3j])
    rate = torch.tensor([0.1, 0.2])

    def run(cut: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        optimizer = getattr(optim, rule)(**({"t0": 2.0, "lambd": 0.1} if rule == "asgd" else {}))
        params = {
            name: piece
            for key in ("first", "second")
            for name, piece in cut(start).items()
            for name in [f"{key}.{name}"]
        }
        state = optimizer.init(params)
        rates = {name: rate if name.startswith("first") else 2 * rate for name in params}
        decay = {name: rate if name.startswith("first") else 3 * rate for name in params}
        hyper = {"lr": rates, **({"alpha": decay} if rule == "asgd" else {"momentum_decay": decay})}
        for t in range(5):
            missing = {1: "first", 3: "second"}.get(t, "none")
            grads = {
                name: None if name.startswith(missing) else p * 2 for name, p in params.items()
            }
            params, state = optimizer.update(grads, state, params, hyper)
        return params

    together = run(lambda z: {"z": z})
    apart = run(lambda z: {"re": z.real, "im": z.imag})
    for key in ("first", "second"):
        expected = torch.complex(apart[f"{key}.re"], apart[f"{key}.im"])
        torch.testing.assert_close(together[f"{key}.z"], expected, rtol=1e-12, atol=1e-12)


def test_one_complex_parameter_with_a_tensor_rate_and_a_missing_gradient():
    optimizer, rate = optim.asgd(t0=2.0), torch.tensor(0.1)
    params = {"z": torch.tensor([1.0 - 2.0j]), "x": torch.ones(1)}
    state = optimizer.init(params)
    for t in range(4):
        grads = {"z": None if t == 2 else 2 * params["z"], "x": params["x"]}
        params, state = optimizer.update(grads, state, params, {"lr": rate})
    assert isinstance(state.eta["z"], Tensor)
    assert params["z"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_safe_root_has_the_derivative_of_the_root(dtype: torch.dtype):
    v = torch.tensor([0.0, 0.25, 1.0, 4.0], dtype=dtype, requires_grad=True)
    root = safe_sqrt(v)
    torch.testing.assert_close(root, v.detach().sqrt(), rtol=0.0, atol=1e-15)
    root.sum().backward()
    assert v.grad is not None
    assert v.grad.tolist() == [0.0, 1.0, 0.5, 0.25]
