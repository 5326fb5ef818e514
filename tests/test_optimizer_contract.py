"""The contract of every optimizer in ``optimizers.RULES``: values and derivatives are those of
``torch.optim``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import innerloop
from tests.optimizers import (
    IMPLEMENTATION,
    RULES,
    Rule,
    accepted,
    cases,
    covering,
    defaults,
    each_hyper,
    each_rule,
    gentle,
    label,
    largest_step,
    leaf,
    leaves,
    meta_gradient,
    outer_of_torch,
    override,
    read,
    replace,
    train,
)
from tests.oracles import (
    Bowl,
    NoDerivative,
    Params,
    Task,
    TorchRun,
    accepts,
    assert_derivative,
    assert_params,
    directional,
    directions,
    inner,
    plain_gradient,
    smooth_noise,
    torch_run,
)

pytestmark = pytest.mark.usefixtures("float64")


# -- forward ---------------------------------------------------------------------------------------


@cases(accepted, always=5)
def test_forward_equals_torch_whatever_kernel_torch_uses(rule: Rule, settings: dict[str, Any]):
    """``foreach``, ``fused``, ``differentiable``: torch's own results differ by rounding, and ours
    is one of them."""
    task = Task()
    params = task.params()
    ours = train(rule.make(**settings), task, params, steps=10)
    kernels = kernels_of(rule)
    assert {} in kernels
    if rule.torch.__module__.startswith("torch.optim"):  # other classes have one kernel
        assert len(kernels) > 2
    for flags in kernels:
        truth = torch_run(rule.torch, {**settings, **flags}, params, task.gradient, 10)
        assert_params(ours, truth, 1e-12)


@each_rule()
def test_arguments_that_choose_a_kernel_are_accepted_and_change_nothing(rule: Rule):
    task = Task()
    ours = train(rule.make(**rule.typical), task, task.params(), steps=3)
    for flags in kernels_of(rule):
        assert_params(
            train(rule.make(**rule.typical, **flags), task, task.params(), steps=3), ours, 0
        )


def kernels_of(rule: Rule) -> list[dict[str, Any]]:
    return [flags for flags in IMPLEMENTATION if accepts(rule.torch, {**rule.typical, **flags})]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@cases(accepted, always=covering)
def test_numbers_as_hyper_parameters_give_every_bit_of_torch(
    rule: Rule, settings: dict[str, Any], dtype: torch.dtype
):
    task = Task(large=True)
    params = task.params(dtype)
    truth = torch_run(rule.torch, {**settings, "foreach": False}, params, task.gradient, 10)
    assert_params(
        train(rule.make(**settings), task, params, steps=10, gradient=task.gradient), truth, 0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@cases(accepted, always=covering)
def test_forward_continues_a_warm_torch_optimizer(
    rule: Rule, settings: dict[str, Any], dtype: torch.dtype
):
    task = Task(large=True)
    run = TorchRun.start(rule.torch, {**settings, "foreach": False}, task.params(dtype))
    for t in range(4):
        run.step(task.gradient(run.params, t))
    tensors = {name: pieces[0] for name, pieces in run.leaves.items()}
    optimizer = innerloop.optim.from_torch(run.optimizer, tensors)
    warm = run.params
    ours = train(
        optimizer, task, warm, steps=6, start=4, state=optimizer.init(warm), gradient=task.gradient
    )
    for t in range(4, 10):
        run.step(task.gradient(run.params, t))
    assert_params(ours, run.params, 0)


@cases(covering)
def test_tensors_as_hyper_parameters_do_not_move_the_forward_pass(
    rule: Rule, settings: dict[str, Any]
):
    task = Task()
    params = task.params()
    truth = torch_run(rule.torch, settings, params, task.gradient, 10)
    full = defaults(rule, settings)
    values = {name: leaf(read(full, name)) for name in rule.smooth(full) if read(full, name) != 0}
    assert_params(
        train(rule.make(**settings), task, params, override(rule, settings, values), steps=10),
        truth,
        1e-12,
    )
    assert_params(train(rule.make(**replace(full, values)), task, params, steps=10), truth, 1e-12)


def test_parameters_of_several_dtypes_and_layouts():
    task = Task()
    for rule in RULES:
        params = {**task.params(), "bias": task.params(torch.float32)["bias"]}
        params["weight"] = params["weight"].t().contiguous().t()
        assert not params["weight"].is_contiguous()
        grads = [
            {n: smooth_noise(*p.shape, phase=float(t)).to(p.dtype) for n, p in params.items()}
            for t in range(5)
        ]
        given = lambda params, t, grads=grads: grads[t]  # noqa: E731
        truth = torch_run(rule.torch, {**rule.typical, "foreach": False}, params, given, 5)
        assert_params(
            train(rule.make(**rule.typical), task, params, steps=5, gradient=given), truth, 0
        )


@cases(covering)
def test_complex_parameters(rule: Rule, settings: dict[str, Any]):
    params = {
        "z": torch.complex(smooth_noise(3, 2), smooth_noise(3, 2, phase=1.0)),
        "w": torch.complex(smooth_noise(4, phase=2.0), smooth_noise(4, phase=3.0)),
        "real": smooth_noise(2, phase=4.0),
    }

    def loss(params: Params, t: int) -> Tensor:
        z, w = params["z"], params["w"]
        return (
            ((z * (1 + 2j) - t).abs() ** 2).sum()
            + ((w**2 + 1j).abs() ** 2).sum() / 4
            + (params["real"] ** 2).sum() * w.real.sum()
        )

    gradient = lambda params, t: plain_gradient(loss, params, t)  # noqa: E731
    truth = torch_run(rule.torch, {**settings, "foreach": False}, params, gradient, 10)
    ours = train(rule.make(**settings), Task(), params, steps=10, gradient=torch.func.grad(loss))
    assert_params(ours, truth, 1e-12)


@cases(covering)
def test_a_parameter_without_gradient_is_skipped_and_its_step_not_counted(
    rule: Rule, settings: dict[str, Any]
):
    task = Task()

    def gradient(params: Params, t: int) -> dict[str, Tensor | None]:
        grads: dict[str, Tensor | None] = dict(task.gradient(params, t))
        if t in (0, 1, 4):
            grads["weight"] = None
        if t in (1, 2, 5):
            grads["scale"] = grads["cube"] = None
        return dict.fromkeys(grads) if t == 6 else grads

    params = task.params()
    truth = torch_run(rule.torch, {**settings, "foreach": False}, params, gradient, 10)
    assert_params(train(rule.make(**settings), task, params, steps=10, gradient=gradient), truth, 0)


# -- derivatives -----------------------------------------------------------------------------------


@cases(accepted, always=covering)
def test_meta_gradients_equal_finite_differences_of_torch(rule: Rule, settings: dict[str, Any]):
    """In the initial parameters, with every hyper-parameter a number; then along directions that
    move everything at once."""
    task, steps = Task(), max(6, rule.steps)
    outer, full = outer_of_torch(rule, settings, task, steps), defaults(rule, settings)
    along = directions(task.params(), 2)
    ours, _ = meta_gradient(rule, settings, task, {}, steps)
    truth = directional(lambda p: outer(p, {}), task.params(), along[0])
    assert abs(truth) > 1e-3
    assert_derivative(inner(ours, along[0]), truth, "d outer / d init")

    values = {name: read(full, name) for name in rule.smooth(full)}
    found = meta_gradient(rule, settings, task, values, steps)
    direction = (along[1], gentle(values))
    joint = directional(lambda at: outer(*at), (task.params(), values), direction)
    assert_derivative(inner(found, direction), joint, "d outer / d (init, hyper)")


@cases(covering)
def test_each_hyper_gradient_equals_finite_differences_of_torch(
    rule: Rule, settings: dict[str, Any]
):
    """One hyper-parameter a tensor, the others numbers."""
    task, steps = Task(), max(6, rule.steps)
    outer, full = outer_of_torch(rule, settings, task, steps), defaults(rule, settings)
    for name in rule.smooth(full):
        value = read(full, name)
        _, found = meta_gradient(rule, settings, task, {name: value}, steps)
        truth = directional(
            lambda v: outer(task.params(), v),
            {name: value},
            {name: 1.0},
            largest=largest_step(name),
        )
        assert_derivative(float(found[name]), truth, f"d outer / d {name}")


@each_hyper()
def test_a_tensor_hyper_parameter_of_value_zero_has_its_gradient(rule: Rule, name: str):
    task, steps = Bowl(), max(6, rule.steps)
    settings = replace(rule.typical, {name: 1e-12 if name == "eps" else 0.0})
    if (
        name == "momentum" and "dampening" in settings
    ):  # with dampening it would be a jump, see `buffer_appears`
        settings["dampening"] = 0.0
    if name not in rule.smooth(settings) and not accepts(rule.torch, settings):
        return
    value = read(settings, name)
    by_update = meta_gradient(rule, settings, task, {name: value}, steps)[1][name]
    if name not in rule.smooth(settings):
        assert by_update.isfinite()
        return
    outer = outer_of_torch(rule, settings, task, steps)
    truth = directional(
        lambda v: outer(task.params(), {name: v}), value, 1.0, largest=largest_step(name)
    )
    assert abs(truth) > 1e-4
    assert_derivative(float(by_update), truth, f"d outer / d {name} at {value}")
    given = leaf(value)
    by_constructor = task.outer(
        train(rule.make(**replace(settings, {name: given})), task, task.params(), steps=steps)
    )
    assert_derivative(
        float(torch.autograd.grad(by_constructor, given)[0]),
        truth,
        f"d outer / d {name} at {value}",
    )


@each_rule()
def test_all_hyper_parameters_at_once_beside_a_large_tensor(rule: Rule):
    task, steps = Task(large=True), rule.steps
    names = rule.smooth(rule.typical)
    ours, found = meta_gradient(
        rule, rule.typical, task, {name: read(rule.typical, name) for name in names}, steps
    )
    outer = outer_of_torch(rule, rule.typical, task, steps)
    at = {"params": task.params(), "hyper": {name: read(rule.typical, name) for name in names}}
    for weights in (smooth_noise(len(names)), smooth_noise(len(names), phase=1.0)):
        direction = {
            "params": directions(task.params(), 1)[0],
            "hyper": gentle(names, (0.1 * weights).tolist()),
        }
        truth = directional(lambda x: outer(x["params"], x["hyper"]), at, direction)
        assert_derivative(
            inner({"params": ours, "hyper": found}, direction), truth, "along a joint direction"
        )


@pytest.mark.parametrize("full", [False, True], ids=["one number each", "of the parameter's shape"])
@each_hyper()
def test_a_hyper_parameter_per_parameter_by_name(rule: Rule, name: str, full: bool):
    task, steps = Task(), rule.steps
    params = task.params()
    value = read(rule.typical, name)
    by_name = {
        key: (value * (1 + 0.2 * smooth_noise(*(p.shape if full else ()), phase=float(i)))).clamp(
            *rule.range(name)
        )
        for i, (key, p) in enumerate(params.items())
    }
    outer = outer_of_torch(rule, rule.typical, task, steps)
    given = leaves(by_name)
    hyper = override(rule, rule.typical, {name: given})
    final = train(rule.make(**rule.typical), task, params, hyper, steps=steps)
    truth = torch_run(
        rule.torch, replace(rule.typical, {name: by_name}), params, task.gradient, steps
    )
    assert_params(final, truth, 1e-12)
    ours = dict(
        zip(given, torch.autograd.grad(task.outer(final), list(given.values())), strict=True)
    )
    direction = {key: torch.cos(3.0 * b + i) for i, (key, b) in enumerate(by_name.items())}
    slope = directional(
        lambda v: outer(params, {name: v}), by_name, direction, largest=largest_step(name)
    )
    assert abs(slope) > 1e-4
    assert_derivative(inner(ours, direction), slope, f"d outer / d {name} by name")


@each_rule()
def test_meta_gradient_through_steps_that_skip_a_parameter(rule: Rule):
    task, steps = Task(), 6
    skipped = lambda t: "weight" if t in (0, 3) else "cube" if t == 1 else "no parameter"  # noqa: E731

    def sparse(gradient: Any) -> Any:
        return lambda params, t: {
            n: None if n == skipped(t) else g for n, g in gradient(params, t).items()
        }

    given, lr = leaves(task.params()), leaf(rule.typical["lr"])
    final = train(
        rule.make(**rule.typical),
        task,
        given,
        {"lr": lr},
        steps=steps,
        gradient=sparse(torch.func.grad(task.loss)),
    )
    found = torch.autograd.grad(task.outer(final), [*given.values(), lr])
    ours = {"params": dict(zip(given, found, strict=False)), "lr": found[-1]}

    def outer(at: dict[str, Any]) -> float:
        settings = {**rule.typical, "lr": at["lr"]}
        return float(
            task.outer(torch_run(rule.torch, settings, at["params"], sparse(task.gradient), steps))
        )

    direction = {"params": directions(task.params(), 1)[0], "lr": 0.1}
    truth = directional(outer, {"params": task.params(), "lr": rule.typical["lr"]}, direction)
    assert_derivative(inner(ours, direction), truth, "d outer / d (init, lr)")


# -- random settings and shapes --------------------------------------------------------------------


@st.composite
def random_case(draw: st.DrawFn) -> tuple[Rule, dict[str, Any], Bowl, int]:
    rule = draw(st.sampled_from(RULES))
    flags = draw(st.sampled_from(accepted(rule)))
    values = {name: draw(st.floats(*rule.range(name))) for name in rule.hyper}
    settings = replace(defaults(rule, flags), values)
    if settings.get("nesterov"):
        settings["dampening"] = 0.0
    shapes = draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5))
    return rule, settings, Bowl(tuple(map(tuple, shapes))), draw(st.integers(1, rule.steps + 1))


@given(random_case())
@hypothesis_settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_random_settings_and_shapes(case: tuple[Rule, dict[str, Any], Bowl, int]):
    rule, settings, bowl, steps = case
    params = bowl.params()
    truth = torch_run(rule.torch, settings, params, bowl.gradient, steps)
    allowed = {key: value for key, value in settings.items() if value is not None}
    start, names = leaves(params), list(rule.smooth(settings))
    values = {name: leaf(read(settings, name)) for name in names}
    optimizer = rule.make(**allowed)
    hyper = override(rule, settings, values)
    final = train(optimizer, bowl, start, hyper, steps=steps)
    assert_params(final, truth, 1e-11)
    assert_params(train(optimizer, bowl, params, steps=steps), truth, 1e-12)
    found = torch.autograd.grad(
        bowl.outer(final),
        [*start.values(), *values.values()],
        allow_unused=True,
        materialize_grads=True,
    )
    at = {"params": params, "hyper": {name: read(settings, name) for name in names}}
    ours = {
        "params": dict(zip(start, found, strict=False)),
        "hyper": dict(zip(names, found[len(start) :], strict=True)),
    }
    direction = {
        "params": {n: torch.cos(p) for n, p in params.items()},
        "hyper": gentle(names, (0.3 + 0.1 * i for i in range(len(names)))),
    }

    def outer(x: dict[str, Any]) -> float:
        return float(
            bowl.outer(
                torch_run(
                    rule.torch, replace(settings, x["hyper"]), x["params"], bowl.gradient, steps
                )
            )
        )

    try:
        slope = directional(outer, at, direction)
    except (
        NoDerivative,
        TypeError,
    ):  # TypeError: torch takes the root of a negative number, a beta beyond 1
        assume(False)
    assert_derivative(
        inner(ours, direction), slope, f"{rule.name}({label(settings)})", absolute=1e-8
    )
