"""The example of a new optimizer in CONTRIBUTING.md is complete, and does what it says."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import lion_pytorch
import pytest
import torch

from tests.optimizers import leaf, leaves, train
from tests.oracles import (
    Task,
    assert_derivative,
    assert_params,
    directional,
    directions,
    inner,
    torch_run,
)

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the first block of code is."""
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    code = next(
        block
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if "class Lion" in block
    )
    module = types.ModuleType("innerloop_example_lion")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(code, "CONTRIBUTING.md", "exec"), vars(module))  # noqa: S102
    return module


@pytest.mark.usefixtures("float64")
def test_the_example_optimizer_is_the_one_that_it_names(example: Any):
    task = Task()
    truth = torch_run(lion_pytorch.Lion, SETTINGS, task.params(), task.gradient, 10)
    assert_params(train(example.lion(**SETTINGS), task, task.params(), steps=10), truth, 1e-12)


@pytest.mark.usefixtures("float64")
def test_the_example_optimizer_has_the_derivatives_of_the_one_that_it_names(example: Any):
    task, start, lr, decay = Task(), leaves(Task().params()), leaf(0.01), leaf(0.1)
    final = train(
        example.lion(betas=(0.8, 0.95)), task, start, {"lr": lr, "weight_decay": decay}, steps=5
    )
    found = torch.autograd.grad(task.outer(final), [*start.values(), lr, decay])
    ours = (dict(zip(start, found, strict=False)), {"lr": found[-2], "weight_decay": found[-1]})
    along = (directions(task.params(), 1)[0], {"lr": 0.1, "weight_decay": 1.0})

    def outer(at: Any) -> float:
        settings = {"betas": (0.8, 0.95), **at[1]}
        return float(task.outer(torch_run(lion_pytorch.Lion, settings, at[0], task.gradient, 5)))

    at = (task.params(), {"lr": 0.01, "weight_decay": 0.1})
    assert_derivative(
        inner(ours, along), directional(outer, at, along), "d outer / d (init, lr, weight_decay)"
    )


@pytest.mark.usefixtures("float64")
def test_what_a_rule_gets_for_nothing(example: Any):
    assert repr(example.lion(lr=0.5)) == "lion(lr=0.5)"
    with pytest.raises(ValueError, match=r"betas\[0\]=1.5"):
        example.lion(betas=(1.5, 0.9))
    task, rates = Task(), torch.tensor([0.01, 0.02])
    many = torch.func.vmap(
        lambda lr: task.outer(train(example.lion(), task, task.params(), {"lr": lr}, steps=3))
    )(rates)
    one_by_one = [
        task.outer(train(example.lion(), task, task.params(), {"lr": float(lr)}, steps=3))
        for lr in rates
    ]
    torch.testing.assert_close(many, torch.stack(one_by_one), rtol=1e-12, atol=1e-12)
