"""Optimizers of ``torch.optim`` read in: the rule does what their class and groups say."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest
import torch

import innerloop
from innerloop import InvalidInputError, optim
from innerloop.optim._from_torch.from_torch import overrides_step

pytestmark = pytest.mark.usefixtures("float64")


def test_adagrad_starts_every_group_at_the_value_of_its_constructor():
    """As torch does, whatever a param group says."""
    leaves = {name: torch.nn.Parameter(torch.tensor([1.0, 2.0])) for name in "ab"}
    groups: list[dict[str, Any]] = [
        {"params": [leaves["a"]], "initial_accumulator_value": 1.0},
        {"params": [leaves["b"]]},
    ]
    theirs = torch.optim.Adagrad(groups, lr=0.1, initial_accumulator_value=0.25)
    rule = optim.from_torch(theirs, leaves)
    params = {name: p.detach().clone() for name, p in leaves.items()}
    state = rule.init(params)
    for _ in range(3):
        grads = {name: torch.randn(2) for name in "ab"}
        for name, p in leaves.items():
            p.grad = grads[name]
        theirs.step()
        params, state = rule.update(grads, state, params)
    for name, p in leaves.items():
        torch.testing.assert_close(params[name], p.detach(), rtol=1e-12, atol=1e-12)


def test_a_state_that_is_taken_over_is_a_constant():
    """Where the optimizer's buffer carries a graph, of ``differentiable=True`` say."""
    w = torch.nn.Parameter(torch.tensor([1.0]))
    theirs = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    theirs.state[w]["momentum_buffer"] = 2 * torch.tensor([3.0], requires_grad=True)
    rule = optim.from_torch(theirs, {"w": w})
    params = {"w": w.detach().clone()}
    new, _ = rule.update({"w": torch.tensor([4.0])}, rule.init(params), params)
    torch.testing.assert_close(new["w"], torch.tensor([1 - 0.1 * (0.9 * 6 + 4)]))
    assert not new["w"].requires_grad


def test_a_step_with_the_profiler_around_it_is_still_inherited():
    class Family(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> Any:
            """Does nothing."""

    class Child(Family):
        pass

    @functools.wraps(Family.step)
    def decorated(self: Any, closure: Any = None) -> Any:
        self.param_groups[0]["lr"] = 0.0
        return Family.step(self, closure)

    Decorated: Any = type("Decorated", (Family,), {"step": decorated})

    for cls in (Child, Decorated, Family):  # the first one gets a step of its own
        cls([torch.ones(1)])
        assert "step" in vars(cls)
    assert [overrides_step(cls) for cls in (Child, Decorated, Family)] == [False, True, True]
    assert not overrides_step(type("Grandchild", (Child,), {}))


def test_a_subclass_that_is_the_first_of_its_family():
    program = """
import torch, innerloop, innerloop.higher
class Mine(torch.optim.SGD): pass
model = torch.nn.Linear(1, 1)
optimizer = Mine(model.parameters(), lr=0.5)
print(innerloop.optim.from_torch(optimizer, model))
print(type(innerloop.higher.get_diff_optim(optimizer, model.parameters())).__name__)
"""
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert shown.split() == ["from_torch(sgd(lr=0.5))", "DifferentiableSGD"]


def test_a_setting_that_came_with_a_newer_torch_is_refused_unless_it_is_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["innerloop.optim._from_torch.from_torch"]
    monkeypatch.setattr(module, "_defaults", lambda cls: {"lr": 1e-3, "newer": False})
    sgd = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    sgd.param_groups[0]["newer"] = False
    innerloop.optim.from_torch(sgd)
    sgd.param_groups[0]["newer"] = True
    with pytest.raises(InvalidInputError, match=r"SGD\(newer=True\).*does not know"):
        innerloop.optim.from_torch(sgd)
