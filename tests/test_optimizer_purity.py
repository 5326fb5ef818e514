"""What an update keeps and what it leaves alone: dtypes are kept, inputs are not written, nothing
is remembered outside the state."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import innerloop
from tests.optimizers import (
    Rule,
    cases,
    covering,
    defaults,
    each_rule,
    leaf,
    leaves,
    override,
    read,
    train,
)
from tests.oracles import Params, Task, TorchRun, assert_params, torch_run

# -- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:an update of torch:innerloop.PrecisionWarning")
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

    def shaped(value: float) -> Params:
        return {
            n: torch.full_like(p, value, dtype=hyper).requires_grad_()
            for n, p in task.params().items()
        }

    for make in (lambda value: leaf(value, hyper), shaped):
        start = leaves(task.params(params))
        values = {name: make(read(full, name)) for name in rule.smooth(full)}
        optimizer = rule.make(**settings)
        state = optimizer.init(start)
        now = start
        for t in range(3):
            now, state = optimizer.update(
                torch.func.grad(task.loss)(now, t), state, now, override(rule, settings, values)
            )
            assert {value.dtype for value in now.values()} == {params}
            held = [t for t in pytree.tree_leaves(state) if isinstance(t, Tensor)]
            assert {t.dtype for t in held if t.ndim} <= {
                params
            }  # torch keeps single numbers in more precision, too
        wanted = [*start.values(), *pytree.tree_leaves(values)]
        found = torch.autograd.grad(
            task.outer(now), wanted, allow_unused=True, materialize_grads=True
        )
        assert [g.dtype for g in found] == [x.dtype for x in wanted]
        assert all(g.shape == x.shape for g, x in zip(found, wanted, strict=True))


@cases(covering)
def test_float32_parameters_with_float64_hyper_parameters_are_as_exact_as_torch(
    rule: Rule, settings: dict[str, Any]
):
    """Both are compared with a float64 run: the tensor hyper-parameters cost no more than
    rounding."""
    task, alone = Task(), {**settings, "foreach": False}
    exact = torch_run(rule.torch, alone, task.params(), task.gradient, 10)
    theirs = torch_run(rule.torch, alone, task.params(torch.float32), task.gradient, 10)
    full = defaults(rule, settings)
    values = {name: leaf(read(full, name)) for name in rule.smooth(full) if name != "eps"}
    ours = train(
        rule.make(**settings),
        task,
        task.params(torch.float32),
        override(rule, settings, values),
        steps=10,
        gradient=task.gradient,
    )
    error = lambda run: max(  # noqa: E731
        float((run[n].detach().double() - exact[n]).abs().max()) for n in exact if exact[n].numel()
    )
    assert error(ours) <= 3 * error(theirs) + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@cases(covering)
def test_half_precision_rounds_as_torch_does(
    rule: Rule, settings: dict[str, Any], dtype: torch.dtype
):
    """One step from a warm state. In half precision the vectorised part of a tensor and its tail
    round differently, so that small tensors, which lie side by side in memory here, need not agree
    with torch in the last bit; the large one must."""
    task = Task(large=True)
    settings = {**settings, "foreach": False, **({"eps": 1e-3} if "eps" in rule.hyper else {})}
    run = TorchRun.start(rule.torch, settings, task.params(dtype))
    for t in range(3):
        run.step(task.gradient(run.params, t))
    optimizer = innerloop.optim.from_torch(
        run.optimizer, {name: pieces[0] for name, pieces in run.leaves.items()}
    )
    warm = run.params
    grads = task.gradient(warm, 3)
    ours, _ = optimizer.update(grads, optimizer.init(warm), warm)
    run.step(grads)
    assert torch.equal(ours["large"], run.params["large"])
    unit = torch.finfo(dtype).eps
    for name, truth in run.params.items():
        assert ours[name].dtype == dtype
        torch.testing.assert_close(ours[name].double(), truth.double(), rtol=unit, atol=unit / 4)


# -- purity ----------------------------------------------------------------------------------------


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
        given = [
            x for x in pytree.tree_leaves((grads, state, params, hyper)) if isinstance(x, Tensor)
        ]
        before = [(x._version, x.clone()) for x in given]
        params, state = optimizer.update(grads, state, params, hyper)
        assert all(
            x._version == v and torch.equal(x, old)
            for x, (v, old) in zip(given, before, strict=True)
        )
    assert not tensors_reachable_from(optimizer)


@each_rule()
def test_a_state_counts_its_steps(rule: Rule):
    assert_counts(rule.make(**rule.typical))


def test_a_state_of_a_rule_that_keeps_nothing_counts_its_steps():
    assert_counts(innerloop.optim.sgd(lr=0.1))


def assert_counts(optimizer: Any) -> None:
    params, state = Task().params(), optimizer.init(Task().params())
    for t in range(3):
        params, state = optimizer.update(Task().gradient(params, t), state, params)
        counts = state.count.values() if isinstance(state.count, dict) else [state.count]
        assert [int(count) for count in counts] == [t + 1] * len(counts)


def test_the_average_of_asgd_is_differentiated_from_its_first_step_on():
    optimizer = innerloop.optim.asgd(lr=0.1, t0=0.0)
    start = torch.tensor([1.0, -2.0], requires_grad=True)
    params, state = {"w": start}, optimizer.init({"w": start})
    for _ in range(2):
        params, state = optimizer.update({"w": params["w"] * 1.0}, state, params)
        (slope,) = torch.autograd.grad(read_average(state).sum(), start, retain_graph=True)
        assert slope.abs().min() > 0.5


def read_average(state: Any) -> Tensor:
    (average,) = [x for x in pytree.tree_leaves(state.ax) if isinstance(x, Tensor)]
    return average


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
