"""Where the arithmetic of an update rule is delicate: gradients of exactly zero, tiny and infinite ones, mixed dtypes, closed forms."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop
from tests.optimizers import (
    RULES,
    Rule,
    accepted,
    cases,
    covering,
    defaults,
    each_hyper,
    each_rule,
    leaf,
    leaves,
    override,
    read,
    replace,
    train,
)
from tests.oracles import (
    Params,
    Task,
    TorchRun,
    assert_derivative,
    assert_params,
    directional,
    inner,
    smooth_noise,
    torch_run,
)

STEPS = 12


@contextmanager
def anomaly_detection() -> Iterator[None]:
    """Any backward function that returns a NaN raises, also where the NaN would be multiplied away later."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled", UserWarning)
        with torch.autograd.set_detect_anomaly(True):
            yield


# -- gradient entries that are exactly zero -----------------------------------------------------------------------------


def autograd_gradient(task: Task) -> Any:
    """The inner gradient as a hand-written loop takes it, with a graph; ``torch.func.grad`` is the other way."""

    def gradient(params: Params, t: int) -> Params:
        inputs = {name: value if value.requires_grad else value.clone().requires_grad_() for name, value in params.items()}
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


@cases(lambda rule: has_eps(rule)[:5])
def test_meta_gradients_are_right_where_gradient_entries_are_zero(rule: Rule, settings: dict[str, Any]):
    """All hyper-parameters are numbers, so that only the initial parameters are differentiated; then all are tensors."""
    task, full = Task(dead=True), defaults(rule, settings)
    smooth = [name for name in rule.smooth(full) if not bends(name, read(full, name))]
    along = {name: smooth_noise(*value.shape, phase=7.0) for name, value in task.params().items()}
    for names, direction in (([], dead_entries(task)), (smooth, along)):
        params, values = leaves(task.params()), {name: leaf(read(full, name)) for name in names}
        with anomaly_detection():
            hyper = override(rule, settings, values) if values else None
            outer = task.outer(train(rule.make(**settings), task, params, hyper, steps=STEPS))
            found = torch.autograd.grad(outer, [*params.values(), *values.values()], allow_unused=True, materialize_grads=True)
        assert all(value.isfinite().all() for value in found)
        at = [*task.params().values(), *(read(full, name) for name in names)]
        v = [*direction.values(), *(0.2 if name != "eps" else 1e-4 for name in names)]

        def outer_of_torch(at: list[Any], names: list[str] = names) -> float:
            start = dict(zip(params, at, strict=False))  # noqa: B023
            numbers = replace(full, dict(zip(names, at[len(start) :], strict=True)))
            return float(task.outer(torch_run(rule.torch, numbers, start, task.gradient, STEPS)))

        truth = directional(outer_of_torch, at, v, largest=5e-5)
        assert abs(truth) > 1e-3
        assert_derivative(inner(list(found), v), truth, f"d outer / d (init, {names})")


def bends(name: str, value: float) -> bool:
    """At decay 0 and a zero gradient, Adam's update is g / (|g| + eps) of g = decay · p: its second derivative jumps."""
    return name == "weight_decay" and value == 0


@each_hyper()
def test_each_hyper_gradient_is_right_where_gradient_entries_are_zero(rule: Rule, name: str):
    """One hyper-parameter a tensor; weight decay 0, or it would make the gradient entries nonzero."""
    task, settings = Task(dead=True), replace(rule.typical, {"weight_decay": 0.0})
    value = read(settings, name)
    given = leaf(value)
    with anomaly_detection():
        final = train(rule.make(**settings), task, task.params(), override(rule, settings, {name: given}), steps=STEPS)
        (ours,) = torch.autograd.grad(task.outer(final), given)

    def outer(v: float) -> float:
        return float(task.outer(torch_run(rule.torch, replace(settings, {name: v}), task.params(), task.gradient, STEPS)))

    # Where the second derivative jumps, the difference quotient is right to first order in its step only (see test_oracles).
    options = {"largest": 1e-6, "need": 1e-5} if bends(name, value) else {"largest": 5e-5}
    truth = directional(outer, value, 1.0, **options)
    assert abs(truth) > 1e-3
    assert_derivative(float(ours), truth, f"d outer / d {name}", relative=1e-5 if bends(name, value) else 1e-6)


@each_rule()
def test_an_inner_gradient_taken_by_autograd_is_as_clean(rule: Rule):
    """A hand-written loop takes it with ``create_graph``, where ``Problem`` uses ``torch.func.grad``."""
    task, found = Task(dead=True), []
    for gradient in (autograd_gradient(task), torch.func.grad(task.loss)):
        params = leaves(task.params())
        with anomaly_detection():
            outer = task.outer(train(rule.make(**rule.typical), task, params, steps=STEPS, gradient=gradient))
            found.append(dict(zip(params, torch.autograd.grad(outer, list(params.values())), strict=True)))
    assert_params(found[0], found[1], 1e-12)


@each_rule()
def test_every_gradient_zero_at_every_step(rule: Rule):
    """A fully clipped minibatch: nothing moves but by weight decay, and the derivative says exactly that."""
    settings = replace(rule.typical, {"weight_decay": 0.0})
    params = {"p": smooth_noise(5).requires_grad_()}
    zero = lambda params, t: {"p": params["p"] * 0}  # noqa: E731
    hyper = {name: leaf(read(settings, name)) for name in rule.hyper}
    with anomaly_detection():
        final = train(rule.make(**settings), Task(), params, override(rule, settings, hyper), steps=STEPS, gradient=zero)["p"]
        found = torch.autograd.grad(final.sum(), [params["p"], *hyper.values()])
    assert torch.equal(final, params["p"])
    assert torch.equal(found[0], torch.ones(5))
    by_name = dict(zip(hyper, found[1:], strict=True))
    assert all(value.isfinite() for value in by_name.values())
    assert all(value == 0 for name, value in by_name.items() if name != "weight_decay")


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(torch.float64, (1e-12, 1e-160, 1e-200, 1e-320)), (torch.float32, (1e-12, 1e-21, 1e-30, 1e-42))],
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
            final = train(rule.make(**settings), Task(), given, {"lr": lr}, steps=4, gradient=gradient)
            found = torch.autograd.grad(final["p"].sum(), [given["p"], lr])
        assert all(value.isfinite().all() for value in found)
        assert_params(train(rule.make(**settings), Task(), params, steps=4, gradient=gradient), truth, 0)


@cases(covering)
def test_infinite_and_undefined_gradients_pass_as_in_torch(rule: Rule, settings: dict[str, Any]):
    params = {"p": smooth_noise(6)}
    bad = torch.tensor([1.0, math.inf, -math.inf, math.nan, 1e200, -1e308], dtype=torch.float64)
    gradient = lambda params, t: {"p": bad if t == 1 else smooth_noise(6, phase=float(t))}  # noqa: E731
    truth = torch_run(rule.torch, {**settings, "foreach": False}, params, gradient, 3)
    assert not truth["p"].isfinite().all()
    assert_params(train(rule.make(**settings), Task(), params, steps=3, gradient=gradient), truth, 0)


@pytest.mark.parametrize("rule", [rule for rule in RULES if "eps" in rule.hyper], ids=lambda rule: rule.name)
def test_eps_zero_at_a_zero_gradient_is_undefined_as_in_torch(rule: Rule):
    params, zero = {"p": torch.ones(2)}, lambda params, t: {"p": torch.tensor([0.0, 1.0])}
    settings = {"lr": 0.1, "eps": 0.0}
    truth = torch_run(rule.torch, settings, params, zero, 2)
    assert truth["p"][0].isnan()
    assert_params(train(rule.make(**settings), Task(), params, steps=2, gradient=zero), truth, 0)


# -- dtypes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "hyper"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@cases(lambda rule: covering(rule)[:4])
def test_parameters_keep_their_dtype_and_so_do_the_gradients(
    rule: Rule, settings: dict[str, Any], params: torch.dtype, hyper: torch.dtype
):
    task = Task(large=True)
    full = defaults(rule, settings)
    shaped = lambda value: {n: torch.full_like(p, value, dtype=hyper).requires_grad_() for n, p in task.params().items()}  # noqa: E731
    for make in (lambda value: leaf(value, hyper), shaped):
        start = leaves(task.params(params))
        values = {name: make(read(full, name)) for name in rule.smooth(full)}
        optimizer = rule.make(**settings)
        state = optimizer.init(start)
        now = start
        for t in range(3):
            now, state = optimizer.update(torch.func.grad(task.loss)(now, t), state, now, override(rule, settings, values))
            assert {value.dtype for value in now.values()} == {params}
            assert {t.dtype for t in torch.utils._pytree.tree_leaves(state) if isinstance(t, Tensor)} <= {params}
        wanted = [*start.values(), *torch.utils._pytree.tree_leaves(values)]
        found = torch.autograd.grad(task.outer(now), wanted, allow_unused=True, materialize_grads=True)
        assert [g.dtype for g in found] == [x.dtype for x in wanted]
        assert all(g.shape == x.shape for g, x in zip(found, wanted, strict=True))


@cases(covering)
def test_float32_parameters_with_float64_hyper_parameters_are_as_exact_as_torch(rule: Rule, settings: dict[str, Any]):
    """Both are compared with a float64 run: the tensor hyper-parameters cost no more than rounding."""
    task = Task()
    settings = {**settings, "foreach": False}
    exact = torch_run(rule.torch, settings, task.params(), task.gradient, 10)
    theirs = torch_run(rule.torch, settings, task.params(torch.float32), task.gradient, 10)
    full = defaults(rule, settings)
    values = {name: leaf(read(full, name)) for name in rule.smooth(full) if name != "eps"}
    ours = train(
        rule.make(**settings), task, task.params(torch.float32), override(rule, settings, values), steps=10, gradient=task.gradient
    )
    error = lambda run: max(float((run[n].detach().double() - exact[n]).abs().max()) for n in exact if exact[n].numel())  # noqa: E731
    assert error(ours) <= 3 * error(theirs) + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@cases(covering)
def test_half_precision_rounds_as_torch_does(rule: Rule, settings: dict[str, Any], dtype: torch.dtype):
    """One step from a warm state. In half precision the vectorised part of a tensor and its tail round differently, so that
    small tensors, which lie side by side in memory here, need not agree with torch in the last bit; the large one must."""
    task = Task(large=True)
    settings = {**settings, "foreach": False, **({"eps": 1e-3} if "eps" in rule.hyper else {})}
    run = TorchRun.start(rule.torch, settings, task.params(dtype))
    for t in range(3):
        run.step(task.gradient(run.params, t))
    optimizer = innerloop.optim.from_torch(run.optimizer, {name: pieces[0] for name, pieces in run.leaves.items()})
    warm = run.params
    grads = task.gradient(warm, 3)
    ours, _ = optimizer.update(grads, optimizer.init(warm), warm)
    run.step(grads)
    assert torch.equal(ours["large"], run.params["large"])
    unit = torch.finfo(dtype).eps
    for name, truth in run.params.items():
        assert ours[name].dtype == dtype
        torch.testing.assert_close(ours[name].double(), truth.double(), rtol=unit, atol=unit / 4)


# -- purity -------------------------------------------------------------------------------------------------------------


@cases(covering)
def test_an_update_writes_into_nothing_and_keeps_nothing(rule: Rule, settings: dict[str, Any]):
    task = Task(large=True)
    full = defaults(rule, settings)
    values = {name: torch.tensor(float(read(full, name))) for name in rule.smooth(full)}
    hyper = override(rule, settings, values)
    optimizer = rule.make(**settings)
    params, state = task.params(), optimizer.init(task.params())
    for t in range(3):
        grads = task.gradient(params, t)
        given = [x for x in torch.utils._pytree.tree_leaves((grads, state, params, hyper)) if isinstance(x, Tensor)]
        before = [(x._version, x.clone()) for x in given]
        params, state = optimizer.update(grads, state, params, hyper)
        assert all(x._version == v and torch.equal(x, old) for x, (v, old) in zip(given, before, strict=True))
    assert not tensors_reachable_from(optimizer)


def tensors_reachable_from(thing: Any) -> list[Tensor]:
    """Tensors that an object holds, however deep; not those of its class and module."""
    found, seen, queue = [], set(), [vars(thing)]
    while queue:
        current = queue.pop()
        if id(current) in seen or isinstance(current, type):
            continue
        seen.add(id(current))
        if isinstance(current, Tensor):
            found.append(current)
        elif isinstance(current, (dict, list, tuple, set)):
            queue += gc.get_referents(current)
    return found


@each_rule()
def test_two_loops_with_one_optimizer_do_not_meet(rule: Rule):
    task, other = Task(), Task(dead=True)
    optimizer = rule.make(**rule.typical)
    alone = train(optimizer, task, task.params(), steps=5)
    a, b = task.params(), other.params()
    state_a, state_b = optimizer.init(a), optimizer.init(b)
    for t in range(5):
        a, state_a = optimizer.update(task.gradient(a, t), state_a, a)
        b, state_b = optimizer.update(other.gradient(b, t), state_b, b)
    assert_params(a, alone, 1e-14)


@each_rule()
def test_an_old_state_can_be_stepped_again(rule: Rule):
    """A state is a value: branching from it twice gives the same, whatever was done in between."""
    task = Task(large=True)
    optimizer = rule.make(**rule.typical)
    params, state = task.params(), optimizer.init(task.params())
    for t in range(3):
        params, state = optimizer.update(task.gradient(params, t), state, params)
    first, later = optimizer.update(task.gradient(params, 3), state, params)
    optimizer.update(task.gradient(first, 4), later, first)
    again, _ = optimizer.update(task.gradient(params, 3), state, params)
    assert_params(again, first, 0)


# -- closed forms -------------------------------------------------------------------------------------------------------

CURVATURE = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def quadratic(params: Params, t: int) -> Params:
    return {"x": CURVATURE @ params["x"]}


def test_sgd_with_momentum_on_a_quadratic_is_a_matrix_power():
    lr, momentum, decay, steps = leaf(0.1), leaf(0.9), leaf(0.05), 10
    start = leaves({"x": START})
    hyper = {"lr": lr, "momentum": momentum, "weight_decay": decay}
    final = train(innerloop.optim.sgd(momentum=0.5), Task(), start, hyper, steps=steps, gradient=quadratic)["x"]
    eye = torch.eye(3, dtype=torch.float64)

    def closed(lr: Tensor, momentum: Tensor, decay: Tensor, x: Tensor) -> Tensor:
        gradient = CURVATURE + decay * eye
        step = torch.cat([torch.cat([eye - lr * gradient, -lr * momentum * eye], 1), torch.cat([gradient, momentum * eye], 1)])
        return (torch.linalg.matrix_power(step, steps)[:3, :3] @ x).sum()

    torch.testing.assert_close(final.sum(), closed(lr, momentum, decay, start["x"]), rtol=1e-13, atol=1e-13)
    wanted = [lr, momentum, decay, start["x"]]
    ours = torch.autograd.grad(final.sum(), wanted)
    truth = torch.autograd.grad(closed(*wanted), wanted)
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_two_steps_of_momentum_by_hand():
    """facts.md: .72, where ``torch.optim.SGD(differentiable=True)`` says .90."""
    p = leaf(1.0)
    final = train(innerloop.optim.sgd(lr=0.1, momentum=0.9), Task(), {"p": p}, steps=2, gradient=lambda params, t: params)["p"]
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
    square = (beta2 * g1**2 + g2**2) / (1 + beta2)  # v_2 = (1-b)(b g1² + g2²) > v_1 = (1-b) g1²: amsgrad changes nothing here
    closed = -lr * g1 / (g1 + eps) - lr * mean / (square.sqrt() + eps)
    torch.testing.assert_close(final, closed, rtol=1e-14, atol=1e-16)
    wanted = [lr, beta1, beta2, eps]
    for got, expected in zip(torch.autograd.grad(final, wanted), torch.autograd.grad(closed, wanted), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-15)


def test_the_padding_between_packed_tensors_never_reaches_a_gradient():
    """Small tensors are updated side by side, padded: a learning rate far too large for the padding must not turn 0 · inf to NaN."""
    for rule in RULES:
        params = {f"p{i}": torch.full((i + 1,), 1e-3, dtype=torch.float32) for i in range(3)}
        lr = leaf(1e30, torch.float32)
        tiny = lambda params, t: {n: 1e-32 * p for n, p in params.items()}  # noqa: E731
        final = train(rule.make(**rule.typical), Task(), leaves(params), {"lr": lr}, steps=6, gradient=tiny)
        truth = torch_run(rule.torch, {**rule.typical, "lr": 1e30}, params, tiny, 6)
        finite = all(value.isfinite().all() for value in truth.values())
        (ours,) = torch.autograd.grad(sum(p.sum() for p in final.values()), lr)  # type: ignore[arg-type]
        assert ours.isfinite() or not finite
