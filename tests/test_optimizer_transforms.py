"""Optimizers under ``torch.func``: ``vmap``, ``jvp``, and derivatives of derivatives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.optimizers import (
    Rule,
    cases,
    covering,
    defaults,
    each_hyper,
    each_rule,
    gentle,
    outer_of_rule,
    outer_of_torch,
    override,
    read,
    replace,
    train,
)
from tests.oracles import (
    Bowl,
    Params,
    Task,
    assert_derivative,
    assert_params,
    curvature,
    directional,
    directions,
    inner,
    smooth_noise,
    torch_run,
)

pytestmark = pytest.mark.usefixtures("float64")
STEPS = 4


def numbers(rule: Rule, settings: dict[str, Any]) -> dict[str, float]:
    full = defaults(rule, settings)
    return {name: float(read(full, name)) for name in rule.smooth(full)}


def tensors(values: dict[str, float]) -> Params:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def joint_direction(task: Task | Bowl, values: dict[str, float]) -> tuple[Params, dict[str, float]]:
    """One that moves everything at once."""
    return directions(task.params(), 1)[0], gentle(values, itertools.repeat(0.1))


# -- vmap ------------------------------------------------------------------------------------------


@cases(covering)
def test_vmap_over_tasks_is_a_loop_of_torch_runs(rule: Rule, settings: dict[str, Any]):
    task, values = Task(), numbers(rule, settings)
    starts = [
        {n: p + 0.1 * smooth_noise(*p.shape, phase=float(i)) for n, p in task.params().items()}
        for i in range(3)
    ]
    several = [{n: v * (0.7 + 0.1 * i) for n, v in values.items()} for i in range(3)]
    optimizer = rule.make(**settings)

    def final(params: Params, values: Params) -> Params:
        return train(optimizer, task, params, override(rule, settings, values), steps=STEPS)

    def truth(params: Params, values: dict[str, float]) -> Params:
        return torch_run(
            rule.torch, replace(defaults(rule, settings), values), params, task.gradient, STEPS
        )

    both = torch.func.vmap(final)(stacked(starts), stacked([tensors(v) for v in several]))
    only_init = torch.func.vmap(final, in_dims=(0, None))(stacked(starts), tensors(values))
    only_hyper = torch.func.vmap(final, in_dims=(None, 0))(
        task.params(), stacked([tensors(v) for v in several])
    )
    for i in range(3):
        assert_params(row(both, i), truth(starts[i], several[i]), 1e-12)
        assert_params(row(only_init, i), truth(starts[i], values), 1e-12)
        assert_params(row(only_hyper, i), truth(task.params(), several[i]), 1e-12)


def stacked(trees: list[Params]) -> Params:
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def row(batch: Params, i: int) -> Params:
    return {name: value[i] for name, value in batch.items()}


@each_rule()
def test_vmap_of_meta_gradients_is_a_loop_of_finite_differences(rule: Rule):
    task, values = Task(), numbers(rule, rule.typical)
    outer, truth = (
        outer_of_rule(rule, rule.typical, task, STEPS),
        outer_of_torch(rule, rule.typical, task, STEPS),
    )
    rates = torch.tensor([0.02, 0.05, 0.08], dtype=torch.float64)
    grads = torch.func.vmap(
        lambda lr: torch.func.grad(outer, argnums=(0, 1))(
            task.params(), {**tensors(values), "lr": lr}
        )
    )(rates)
    direction = joint_direction(task, values)
    for i, lr in enumerate(rates.tolist()):
        at = (task.params(), {**values, "lr": lr})
        slope = directional(lambda x: truth(*x), at, direction)
        assert_derivative(inner([row(part, i) for part in grads], direction), slope, f"task {i}")


@each_rule()
def test_vmap_with_a_hyper_parameter_of_the_parameters_shape(rule: Rule):
    """Meta-SGD over tasks: each task with rates of its own."""
    task = Task()
    optimizer = rule.make(**rule.typical)
    rates = [
        {
            n: 0.05 * (1 + 0.3 * smooth_noise(*p.shape, phase=float(i)))
            for n, p in task.params().items()
        }
        for i in range(2)
    ]
    final = torch.func.vmap(
        lambda lr: train(optimizer, task, task.params(), {"lr": lr}, steps=STEPS)
    )(stacked(rates))
    for i, lr in enumerate(rates):
        truth = torch_run(
            rule.torch, {**rule.typical, "lr": lr}, task.params(), task.gradient, STEPS
        )
        assert_params(row(final, i), truth, 1e-12)


# -- forward mode ----------------------------------------------------------------------------------


@cases(covering)
def test_jvp_equals_finite_differences_and_reverse_mode(rule: Rule, settings: dict[str, Any]):
    task, values = Task(), numbers(rule, settings)
    outer, truth = (
        outer_of_rule(rule, settings, task, STEPS),
        outer_of_torch(rule, settings, task, STEPS),
    )
    direction = joint_direction(task, values)
    at, along = (task.params(), tensors(values)), (direction[0], tensors(direction[1]))
    value, slope, *_ = torch.func.jvp(outer, at, along)
    assert value.item() == pytest.approx(truth(task.params(), values), rel=1e-12)
    assert_derivative(
        float(slope), directional(lambda x: truth(*x), (task.params(), values), direction), "jvp"
    )
    assert_derivative(
        inner(torch.func.grad(outer, argnums=(0, 1))(*at), direction),
        float(slope),
        "vjp",
        relative=1e-11,
    )


@each_rule()
def test_jvp_is_right_where_gradient_entries_are_zero(rule: Rule):
    task = Task(dead=True)
    settings = rule.undecayed
    values = {
        name: value for name, value in numbers(rule, settings).items() if name != "weight_decay"
    }
    outer, truth = (
        outer_of_rule(rule, settings, task, STEPS),
        outer_of_torch(rule, settings, task, STEPS),
    )
    direction = joint_direction(task, values)
    slope = torch.func.jvp(
        outer, (task.params(), tensors(values)), (direction[0], tensors(direction[1]))
    )[1]
    assert_derivative(
        float(slope), directional(lambda x: truth(*x), (task.params(), values), direction), "jvp"
    )


@each_rule()
def test_a_jacobian_in_all_rates_at_once(rule: Rule):
    """``jacfwd`` is vmap over jvp: its rows are the derivatives of every parameter in each
    hyper-parameter."""
    task, values = Task(), numbers(rule, rule.typical)
    optimizer = rule.make(**rule.typical)

    def weight(values: Params) -> Tensor:
        return train(optimizer, task, task.params(), override(rule, rule.typical, values), steps=2)[
            "weight"
        ].sum()

    rows = torch.func.jacfwd(weight)(tensors(values))
    for name, value in values.items():

        def moved(v: float, name: str = name) -> float:
            return float(
                torch_run(
                    rule.torch, replace(rule.typical, {name: v}), task.params(), task.gradient, 2
                )["weight"].sum()
            )

        truth = directional(moved, value, 1.0, largest=1e-6 if name == "eps" else 2e-4)
        assert_derivative(float(rows[name]), truth, f"d weight / d {name}")


# -- second derivatives ----------------------------------------------------------------------------


@cases(lambda rule: [rule.typical, *covering(rule)[:3]], always=1)
def test_second_derivatives_equal_finite_differences_of_torch(rule: Rule, settings: dict[str, Any]):
    """The curvature of the outer loss along one direction, by each order of forward and reverse
    mode."""
    if "eps" in rule.hyper:
        settings = {
            **settings,
            "eps": 0.1,
        }  # a tiny eps bends the update so sharply that no second difference settles
    task, values = Bowl(), numbers(rule, settings)
    outer, truth = (
        outer_of_rule(rule, settings, task, STEPS),
        outer_of_torch(rule, settings, task, STEPS),
    )
    direction = joint_direction(task, values)
    along = (direction[0], tensors(direction[1]))

    def line(h: Tensor) -> Tensor:
        at = (task.params(), tensors(values))
        return outer(*pytree.tree_map(lambda x, v: x + h * v, at, along))

    def line_of_torch(h: float) -> float:
        return truth(*pytree.tree_map(lambda x, v: x + h * v, (task.params(), values), direction))

    expected = curvature(line_of_torch)
    assert abs(expected) > 1e-4
    zero = torch.zeros((), dtype=torch.float64)
    grad, jacfwd = torch.func.grad, torch.func.jacfwd
    ways = {
        "reverse over reverse": grad(grad(line)),
        "forward over reverse": jacfwd(grad(line)),
        "forward over forward": jacfwd(jacfwd(line)),
    }
    for way, second in ways.items():
        assert_derivative(float(second(zero)), expected, way, relative=1e-5)
    h = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(line(h), h, create_graph=True)
    assert_derivative(
        float(torch.autograd.grad(slope, h)[0]), expected, "create_graph", relative=1e-5
    )


@each_hyper()
def test_second_derivatives_are_finite_where_gradient_entries_are_zero(rule: Rule, name: str):
    """There Adam's update has no second derivative (it bends); a number must come out nevertheless,
    not NaN."""
    task = Task(dead=True)
    settings = rule.undecayed
    outer = outer_of_rule(rule, settings, task, STEPS)
    value = tensors({name: float(read(settings, name))})

    def slope(params: Params, value: Params) -> Tensor:
        grads = torch.func.grad(outer, argnums=(0, 1))(params, value)
        return sum(
            (g.sum() for g in pytree.tree_leaves(grads)), torch.zeros((), dtype=torch.float64)
        )

    second = torch.func.grad(slope, argnums=(0, 1))(task.params(), value)
    assert all(g.isfinite().all() for g in pytree.tree_leaves(second))
