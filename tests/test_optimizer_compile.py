"""Optimizers inside ``torch.compile(fullgraph=True)``: the compiled meta-gradient is the eager
one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import innerloop
from tests.optimizers import (
    Rule,
    accepted,
    cases,
    covering,
    defaults,
    each_rule,
    override,
    read,
    train,
)
from tests.oracles import Params, Task, assert_params, plain_gradient, smooth_noise, torch_run

pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("float64")]
STEPS = 2


def start() -> Params:
    return {
        "w": smooth_noise(2, 3),
        "b": torch.tensor(0.3, dtype=torch.float64),
        "none": torch.zeros(0, dtype=torch.float64),
    }


def loss(params: Params, t: int) -> Tensor:
    """Smaller than `Task`, because compiling takes seconds per hundred operations."""
    return (params["w"].sin().sum() * params["b"] + 1.5 * params["w"].sum()).sin() + params[
        "none"
    ].sum()


def outer(params: Params) -> Tensor:
    return (params["w"] * smooth_noise(2, 3, phase=5.0)).sum() + params["b"].sin()


def check(rule: Rule, settings: dict[str, Any], backend: str, tolerance: float) -> None:
    """The whole meta-gradient, inner gradients and all, is one graph."""
    optimizer, full = rule.make(**settings), defaults(rule, settings)
    values = {
        name: torch.tensor(float(read(full, name)), dtype=torch.float64)
        for name in rule.smooth(full)
    }

    def value(params: Params, values: dict[str, Tensor]) -> Tensor:
        hyper = override(rule, settings, values)
        return outer(
            train(optimizer, Task(), params, hyper, steps=STEPS, gradient=torch.func.grad(loss))
        )

    def meta(params: Params, values: dict[str, Tensor]) -> Any:
        return torch.func.grad(value, argnums=(0, 1))(params, values)

    torch.compiler.reset()
    compiled = torch.compile(meta, fullgraph=True, backend=backend)
    for factor in (1.0, 0.98):  # the second call runs what the first one compiled, on other numbers
        at = pytree.tree_map(lambda x, factor=factor: factor * x, (start(), values))
        ours, eager = compiled(*at), meta(*at)
        for got, expected in zip(pytree.tree_leaves(ours), pytree.tree_leaves(eager), strict=True):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.traced
@cases(lambda rule: [rule.typical, covering(rule)[1]], always=1)
def test_compiled_meta_gradient_is_the_eager_one(rule: Rule, settings: dict[str, Any]):
    check(rule, settings, "aot_eager", 1e-12)


@pytest.mark.slow
@pytest.mark.traced
@cases(lambda rule: [settings for settings in accepted(rule) if settings != covering(rule)[1]])
def test_compiled_meta_gradient_is_the_eager_one_in_every_setting(
    rule: Rule, settings: dict[str, Any]
):
    check(rule, settings, "aot_eager", 1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # raised inside inductor
@each_rule()
def test_meta_gradient_compiled_by_inductor_is_the_eager_one(rule: Rule):
    check(rule, rule.typical, "inductor", 1e-10)


@pytest.mark.traced
@each_rule()
def test_a_compiled_update_is_not_compiled_anew_at_every_step(rule: Rule):
    """A state is carried from call to call; its step count becomes data as soon as it changes.
    Hyper-parameters are numbers."""
    optimizer = rule.make(**rule.typical)
    params, state = start(), optimizer.init(start())
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        lambda params, state: optimizer.update(torch.func.grad(loss)(params, 0), state, params),
        fullgraph=True,
        backend=counter,
    )
    compilations = []
    for _ in range(rule.steps + 6):
        params, state = step(params, state)
        compilations.append(counter.frame_count)
    truth = torch_run(
        rule.torch,
        rule.typical,
        start(),
        lambda params, t: plain_gradient(loss, params, 0),
        rule.steps + 6,
    )
    assert_params(params, truth, 1e-12)
    assert compilations[rule.steps - 1] == compilations[-1]


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # raised inside inductor
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_of_a_matrix_product_is_scaled(dtype: torch.dtype):
    """Inductor drops the ``alpha`` of ``torch.add`` where the second term is a matrix product, as
    the gradient of every linear layer is: the step must not depend on it."""
    optimizer = innerloop.optim.sgd(lr=0.05)
    weight, x, y = (smooth_noise(*shape).to(dtype) for shape in ((32, 16), (8, 32), (8, 16)))

    def step(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        params = {"w": weight}
        return optimizer.update({"w": x.t() @ y}, optimizer.init(params), params)[0]["w"]

    compiled = torch.compile(step, fullgraph=True, backend="inductor")
    torch.testing.assert_close(compiled(weight, x, y), weight - 0.05 * (x.t() @ y))
