"""The contract of every optimizer in ``optimizers.RULES``: values and derivatives are those of ``torch.optim``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings as hypothesis_settings, strategies as st
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
    label,
    leaf,
    leaves,
    override,
    read,
    refused,
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
    smooth_noise,
    torch_run,
)

pytestmark = pytest.mark.usefixtures("float64")


# -- forward ------------------------------------------------------------------------------------------------------------


@cases(accepted)
def test_forward_equals_torch_whatever_kernel_torch_uses(rule: Rule, settings: dict[str, Any]):
    """``foreach``, ``fused``, ``differentiable``: torch's own results differ by rounding, and ours is one of them."""
    task = Task()
    params = task.params()
    ours = train(rule.make(**settings), task, params, steps=10)
    kernels = kernels_of(rule)
    assert {} in kernels
    assert len(kernels) > 5
    for flags in kernels:
        truth = torch_run(rule.torch, {**settings, **flags}, params, task.gradient, 10)
        assert_params(ours, truth, 1e-12)


@each_rule()
def test_arguments_that_choose_a_kernel_are_accepted_and_change_nothing(rule: Rule):
    task = Task()
    ours = train(rule.make(**rule.typical), task, task.params(), steps=3)
    for flags in kernels_of(rule):
        assert_params(train(rule.make(**rule.typical, **flags), task, task.params(), steps=3), ours, 0)


def kernels_of(rule: Rule) -> list[dict[str, Any]]:
    return [flags for flags in IMPLEMENTATION if accepts(rule.torch, {**rule.typical, **flags})]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@cases(accepted)
def test_numbers_as_hyper_parameters_give_every_bit_of_torch(rule: Rule, settings: dict[str, Any], dtype: torch.dtype):
    task = Task(large=True)
    params = task.params(dtype)
    truth = torch_run(rule.torch, {**settings, "foreach": False}, params, task.gradient, 10)
    assert_params(train(rule.make(**settings), task, params, steps=10, gradient=task.gradient), truth, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@cases(accepted)
def test_forward_continues_a_warm_torch_optimizer(rule: Rule, settings: dict[str, Any], dtype: torch.dtype):
    task = Task(large=True)
    run = TorchRun.start(rule.torch, {**settings, "foreach": False}, task.params(dtype))
    for t in range(4):
        run.step(task.gradient(run.params, t))
    tensors = {name: pieces[0] for name, pieces in run.leaves.items()}
    optimizer = innerloop.optim.from_torch(run.optimizer, tensors)
    warm = run.params
    ours = train(optimizer, task, warm, steps=6, start=4, state=optimizer.init(warm), gradient=task.gradient)
    for t in range(4, 10):
        run.step(task.gradient(run.params, t))
    assert_params(ours, run.params, 0)


@cases(covering)
def test_tensors_as_hyper_parameters_do_not_move_the_forward_pass(rule: Rule, settings: dict[str, Any]):
    task = Task()
    params = task.params()
    truth = torch_run(rule.torch, settings, params, task.gradient, 10)
    full = defaults(rule, settings)
    values = {name: leaf(read(full, name)) for name in rule.smooth(full) if read(full, name) != 0}
    assert_params(train(rule.make(**settings), task, params, override(rule, settings, values), steps=10), truth, 1e-12)
    assert_params(train(rule.make(**replace(full, values)), task, params, steps=10), truth, 1e-12)


def test_parameters_of_several_dtypes_and_layouts():
    task = Task()
    for rule in RULES:
        params = {**task.params(), "bias": task.params(torch.float32)["bias"]}
        params["weight"] = params["weight"].t().contiguous().t()
        assert not params["weight"].is_contiguous()
        grads = [{n: smooth_noise(*p.shape, phase=float(t)).to(p.dtype) for n, p in params.items()} for t in range(5)]
        truth = torch_run(rule.torch, {**rule.typical, "foreach": False}, params, lambda _, t: grads[t], 5)
        assert_params(train(rule.make(**rule.typical), task, params, steps=5, gradient=lambda _, t: grads[t]), truth, 0)


@cases(covering)
def test_complex_parameters(rule: Rule, settings: dict[str, Any]):
    params = {
        "z": torch.complex(smooth_noise(3, 2), smooth_noise(3, 2, phase=1.0)),
        "w": torch.complex(smooth_noise(4, phase=2.0), smooth_noise(4, phase=3.0)),
        "real": smooth_noise(2, phase=4.0),
    }

    def loss(params: Params, t: int) -> Tensor:
        z, w = params["z"], params["w"]
        return ((z * (1 + 2j) - t).abs() ** 2).sum() + ((w**2 + 1j).abs() ** 2).sum() / 4 + (params["real"] ** 2).sum() * w.real.sum()

    def gradient(params: Params, t: int) -> Params:
        given = leaves(params)
        return dict(zip(given, torch.autograd.grad(loss(given, t), list(given.values())), strict=True))

    truth = torch_run(rule.torch, {**settings, "foreach": False}, params, gradient, 10)
    ours = train(rule.make(**settings), Task(), params, steps=10, gradient=torch.func.grad(loss))
    assert_params(ours, truth, 1e-12)


@cases(covering)
def test_a_parameter_without_gradient_is_skipped_and_its_step_not_counted(rule: Rule, settings: dict[str, Any]):
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


# -- derivatives --------------------------------------------------------------------------------------------------------


def gradients(rule: Rule, settings: dict[str, Any], task: Task | Bowl, values: dict[str, Any], steps: int) -> tuple[Params, dict[str, Any]]:
    """Our meta-gradients of ``task.outer`` in the initial parameters and in the hyper-parameters given as leaves."""
    params = leaves(task.params())
    hyper = override(rule, settings, values) if values else None
    outer = task.outer(train(rule.make(**settings), task, params, hyper, steps=steps))
    wanted = [*params.values(), *values.values()]
    # A number 0 switches its term off: the dampening of a momentum of 0 is not used, and its gradient is zero.
    found = torch.autograd.grad(outer, wanted, allow_unused=True, materialize_grads=True)
    return dict(zip(params, found, strict=False)), dict(zip(values, found[len(params) :], strict=True))


def outer_of_torch(rule: Rule, settings: dict[str, Any], task: Task | Bowl, steps: int) -> Any:
    """The same outer value from a plain ``torch.optim`` run, as a function of initial parameters and hyper-parameters."""
    full = defaults(rule, settings)

    def outer(params: Params, values: dict[str, Any]) -> float:
        return float(task.outer(torch_run(rule.torch, replace(full, values), params, task.gradient, steps)))

    return outer


@cases(accepted)
def test_meta_gradients_equal_finite_differences_of_torch(rule: Rule, settings: dict[str, Any]):
    """In the initial parameters, with every hyper-parameter a number; then along directions that move everything at once."""
    task, steps = Task(), 6
    outer, full = outer_of_torch(rule, settings, task, steps), defaults(rule, settings)
    along = directions(task.params(), 2)
    ours, _ = gradients(rule, settings, task, {}, steps)
    truth = directional(lambda p: outer(p, {}), task.params(), along[0])
    assert abs(truth) > 1e-3
    assert_derivative(inner(ours, along[0]), truth, "d outer / d init")

    values = {name: read(full, name) for name in rule.smooth(full)}
    found = gradients(rule, settings, task, {name: leaf(value) for name, value in values.items()}, steps)
    direction = (along[1], dict(zip(values, (0.3, -0.2, 0.25, 0.002, 0.4), strict=False)))
    joint = directional(lambda at: outer(*at), (task.params(), values), direction)
    assert_derivative(inner(found, direction), joint, "d outer / d (init, hyper)")


@cases(covering)
def test_each_hyper_gradient_equals_finite_differences_of_torch(rule: Rule, settings: dict[str, Any]):
    """One hyper-parameter a tensor, the others numbers."""
    task, steps = Task(), 6
    outer, full = outer_of_torch(rule, settings, task, steps), defaults(rule, settings)
    for name in rule.smooth(full):
        value = read(full, name)
        _, found = gradients(rule, settings, task, {name: leaf(value)}, steps)
        truth = directional(lambda v, name=name: outer(task.params(), {name: v}), value, 1.0, largest=step_for(name))
        assert_derivative(float(found[name]), truth, f"d outer / d {name}")


def step_for(name: str) -> float:
    """The largest step of the ladder; eps bends the update as soon as it reaches the root of the second moment."""
    return 1e-6 if name == "eps" else 2e-4


@each_hyper()
def test_a_tensor_hyper_parameter_of_value_zero_has_its_gradient(rule: Rule, name: str):
    task, steps = Bowl(), 6
    settings = replace(rule.typical, {name: 1e-12 if name == "eps" else 0.0})
    if name == "momentum":  # with dampening it would be a jump, see `buffer_appears`
        settings["dampening"] = 0.0
    value = read(settings, name)
    outer = outer_of_torch(rule, settings, task, steps)
    truth = directional(lambda v: outer(task.params(), {name: v}), value, 1.0, largest=step_for(name))
    assert abs(truth) > 1e-4
    by_update = gradients(rule, settings, task, {name: leaf(value)}, steps)[1][name]
    assert_derivative(float(by_update), truth, f"d outer / d {name} at {value}")
    given = leaf(value)
    by_constructor = task.outer(train(rule.make(**replace(settings, {name: given})), task, task.params(), steps=steps))
    assert_derivative(float(torch.autograd.grad(by_constructor, given)[0]), truth, f"d outer / d {name} at {value}")


@each_rule()
def test_all_hyper_parameters_at_once_beside_a_large_tensor(rule: Rule):
    task, steps = Task(large=True), 4
    names = rule.smooth(rule.typical)
    ours, found = gradients(rule, rule.typical, task, {name: leaf(read(rule.typical, name)) for name in names}, steps)
    outer = outer_of_torch(rule, rule.typical, task, steps)
    at = {"params": task.params(), "hyper": {name: read(rule.typical, name) for name in names}}
    for weights in (smooth_noise(len(names)), smooth_noise(len(names), phase=1.0)):
        direction = {
            "params": directions(task.params(), 1)[0],
            "hyper": dict(zip(names, (0.1 * weights).tolist(), strict=True)),
        }
        truth = directional(lambda x: outer(x["params"], x["hyper"]), at, direction)
        assert_derivative(inner({"params": ours, "hyper": found}, direction), truth, "along a joint direction")


@pytest.mark.parametrize("full", [False, True], ids=["one number each", "of the parameter's shape"])
@each_hyper()
def test_a_hyper_parameter_per_parameter_by_name(rule: Rule, name: str, full: bool):
    task, steps = Task(), 4
    params = task.params()
    value = read(rule.typical, name)
    by_name = {
        key: value * (1 + 0.2 * smooth_noise(*(p.shape if full else ()), phase=float(i)))
        for i, (key, p) in enumerate(params.items())
    }
    if name.startswith("betas"):
        by_name = {key: b.clamp(max=0.99) for key, b in by_name.items()}
    outer = outer_of_torch(rule, rule.typical, task, steps)
    given = leaves(by_name)
    hyper = override(rule, rule.typical, {name: given})
    final = train(rule.make(**rule.typical), task, params, hyper, steps=steps)
    truth = torch_run(rule.torch, replace(rule.typical, {name: by_name}), params, task.gradient, steps)
    assert_params(final, truth, 1e-12)
    ours = dict(zip(given, torch.autograd.grad(task.outer(final), list(given.values())), strict=True))
    direction = {key: torch.cos(3.0 * b + i) for i, (key, b) in enumerate(by_name.items())}
    slope = directional(lambda v: outer(params, {name: v}), by_name, direction, largest=step_for(name))
    assert abs(slope) > 1e-4
    assert_derivative(inner(ours, direction), slope, f"d outer / d {name} by name")


@each_rule()
def test_meta_gradient_through_steps_that_skip_a_parameter(rule: Rule):
    task, steps = Task(), 6
    skipped = lambda t: "weight" if t in (0, 3) else "cube" if t == 1 else "no parameter"  # noqa: E731

    def sparse(gradient: Any) -> Any:
        return lambda params, t: {n: None if n == skipped(t) else g for n, g in gradient(params, t).items()}

    given, lr = leaves(task.params()), leaf(rule.typical["lr"])
    final = train(
        rule.make(**rule.typical), task, given, {"lr": lr}, steps=steps, gradient=sparse(torch.func.grad(task.loss))
    )
    found = torch.autograd.grad(task.outer(final), [*given.values(), lr])
    ours = {"params": dict(zip(given, found, strict=False)), "lr": found[-1]}

    def outer(at: dict[str, Any]) -> float:
        settings = {**rule.typical, "lr": at["lr"]}
        return float(task.outer(torch_run(rule.torch, settings, at["params"], sparse(task.gradient), steps)))

    direction = {"params": directions(task.params(), 1)[0], "lr": 0.1}
    truth = directional(outer, {"params": task.params(), "lr": rule.typical["lr"]}, direction)
    assert_derivative(inner(ours, direction), truth, "d outer / d (init, lr)")


# -- random settings and shapes -----------------------------------------------------------------------------------------


NUMBERS = {
    "lr": st.floats(1e-4, 0.5),
    "momentum": st.floats(0.05, 0.95),
    "dampening": st.floats(0.0, 0.9),
    "weight_decay": st.floats(0.0, 0.5),
    "eps": st.floats(1e-3, 0.5),
    "betas.0": st.floats(0.0, 0.95),
    "betas.1": st.floats(0.3, 0.999),
}


@st.composite
def random_case(draw: st.DrawFn) -> tuple[Rule, dict[str, Any], Bowl, int]:
    rule = draw(st.sampled_from(RULES))
    flags = draw(st.sampled_from(accepted(rule)))
    values = {name: draw(NUMBERS[name]) for name in rule.hyper}
    settings = replace(defaults(rule, flags), values)
    if settings.get("nesterov"):
        settings["dampening"] = 0.0
    shapes = draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5))
    return rule, settings, Bowl(tuple(map(tuple, shapes))), draw(st.integers(1, 5))


@given(random_case())
@hypothesis_settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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
    found = torch.autograd.grad(bowl.outer(final), [*start.values(), *values.values()], allow_unused=True, materialize_grads=True)
    at = {"params": params, "hyper": {name: read(settings, name) for name in names}}
    ours = {"params": dict(zip(start, found, strict=False)), "hyper": dict(zip(names, found[len(start) :], strict=True))}
    direction = {"params": {n: torch.cos(p) for n, p in params.items()}, "hyper": {n: 0.3 + 0.1 * i for i, n in enumerate(names)}}

    def outer(x: dict[str, Any]) -> float:
        return float(bowl.outer(torch_run(rule.torch, replace(settings, x["hyper"]), x["params"], bowl.gradient, steps)))

    try:
        slope = directional(outer, at, direction)
    except (NoDerivative, TypeError):  # TypeError: torch takes the root of a negative number, a beta beyond 1
        assume(False)
    assert_derivative(inner(ours, direction), slope, f"{rule.name}({label(settings)})", absolute=1e-8)


# -- bad input ----------------------------------------------------------------------------------------------------------


@each_rule()
def test_settings_that_torch_refuses_are_refused(rule: Rule):
    for settings in refused(rule):
        with pytest.raises(innerloop.InnerLoopError):
            rule.make(**settings)


@each_hyper()
def test_values_out_of_range_are_refused_with_their_name(rule: Rule, name: str):
    for value in (-0.1, float("nan"), *((1.0, 1.5) if name.startswith("betas") else ())):
        if accepts(rule.torch, replace(rule.typical, {name: value})):
            continue  # torch takes any dampening, and what is no number where it does not look
        optimizer, params = rule.make(**rule.typical), Task().params()
        shown = name.replace(".0", "[0]").replace(".1", "[1]")
        with pytest.raises(innerloop.InnerLoopError, match=rf"{shown.partition('[')[0]}.*{value}"):
            rule.make(**replace(rule.typical, {name: value}))
        hyper = override(rule, rule.typical, {name: value})
        with pytest.raises(innerloop.InnerLoopError, match=rf"{shown.partition('[')[0]}.*{value}"):
            optimizer.update(params, optimizer.init(params), params, hyper)


BAD_HYPER = {
    "an unknown name": ({"learning_rate": 0.1}, r"learning_rate.*\blr\b"),
    "a flag": ({"maximize": True}, "maximize.*constructor"),
    "a missing parameter": ({"lr": {"weight": 0.1}}, r"lr.*no entry for.*bias.*\bweight\b"),
    "a wrong shape": ({"lr": {"weight": torch.ones(2), **dict.fromkeys(("bias", "scale", "shift", "cube", "empty"), 0.1)}}, r"\(2,\).*\(3, 5\)"),
    "a tensor for all of one shape": ({"lr": torch.ones(3, 5)}, r"lr.*\(3, 5\).*by name"),
    "a string": ({"lr": "0.1"}, "lr.*'0.1'.*number"),
    "a negative number for one parameter": ({"lr": dict.fromkeys(("weight", "bias", "scale", "shift", "cube", "empty"), -0.1)}, "lr.*-0.1"),
    "None": ({"lr": None}, "lr.*None"),
}


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("what", BAD_HYPER)
@each_rule()
def test_bad_hyper_parameters_in_update(rule: Rule, what: str):
    hyper, message = BAD_HYPER[what]
    optimizer, params = rule.make(**rule.typical), Task().params()
    with pytest.raises(innerloop.InnerLoopError, match=f"(?s){message}"):
        optimizer.update(params, optimizer.init(params), params, hyper)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), torch.tensor([0.9, 0.99])], ids=str)
@pytest.mark.parametrize("rule", [rule for rule in RULES if "betas.0" in rule.hyper], ids=lambda rule: rule.name)
def test_betas_must_be_a_pair(rule: Rule, betas: Any):
    params = Task().params()
    optimizer = rule.make(**rule.typical)
    with pytest.raises(innerloop.InnerLoopError, match=r"betas.*pair|pair.*betas"):
        rule.make(betas=betas)
    with pytest.raises(innerloop.InnerLoopError, match=r"betas.*pair|pair.*betas"):
        optimizer.update(params, optimizer.init(params), params, {"betas": betas})


@each_rule()
def test_bad_gradients(rule: Rule):
    optimizer, params = rule.make(**rule.typical), Task().params()
    state = optimizer.init(params)
    with pytest.raises(innerloop.InnerLoopError, match=r"wieght.*weight"):
        optimizer.update({**params, "wieght": params["weight"]}, state, params)
    wrong = {**params, "weight": params["weight"][:2]}
    with pytest.raises(innerloop.InnerLoopError, match=r"(?s)weight.*\(2, 5\).*\(3, 5\)"):
        optimizer.update(wrong, state, params)
    # Of the right size in all, but two shapes swapped: packed flat, this would train the wrong entries without a word.
    swapped = {**params, "bias": params["bias"].new_zeros(6), "cube": params["cube"].new_zeros(5)}
    with pytest.raises(innerloop.InnerLoopError, match=r"(?s)bias.*\(6,\).*\(5,\)"):
        optimizer.update(swapped, state, params)


@each_rule()
def test_a_state_of_other_parameters_is_refused(rule: Rule):
    optimizer, params = rule.make(**rule.typical), Task().params()
    state = optimizer.init({"other": params["weight"]})
    with pytest.raises(innerloop.InnerLoopError, match=r"other|weight"):
        optimizer.update(params, state, params)
