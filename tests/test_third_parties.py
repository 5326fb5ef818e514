"""Packages that users bring along: BOAT, which is written on `higher`, and peft's LoRA adapters.

Both are optional, and their tests are skipped where they are not installed:
``pip install --no-deps boat-torch peft accelerate``. They pass with boat-torch 1.1.1 and peft
0.21.2.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop


def boat(library: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.boat_program", library],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_boat_on_the_bridge_gives_the_gradients_that_it_gives_on_higher() -> None:
    pytest.importorskip("boat_torch")
    pytest.importorskip("higher")
    theirs, ours = boat("higher"), boat("innerloop.higher")
    compared = 0
    for name, expected in theirs.items():
        if "RGT" in name:  # overwrites fast weights under no_grad before the first step
            assert "edited by load_state_dict or copy_" in ours[name]
        elif isinstance(expected, str):
            assert ours[name] == expected  # BOAT refuses the combination
        else:
            for a, b in zip(ours[name], expected, strict=True):
                assert a == pytest.approx(b, rel=1e-12, abs=1e-14)
            compared += 1
    assert compared >= 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(torch.tanh(self.hidden(x)))
        return found


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adam])
def test_lora_adapters_of_peft_are_differentiated(rule: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["hidden", "out"], init_lora_weights=False)
    model = peft.get_peft_model(Net(), config).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    learned = [p for p in model.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in learned]

    def loss(net: nn.Module) -> Tensor:
        return ((net(x) - y) ** 2).mean()

    def plain(shift: float) -> float:
        moved = copy.deepcopy(model)
        params = [p for p in moved.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, v in zip(params, direction, strict=True):
                p.add_(v, alpha=shift)
        opt = rule(params, lr=0.05)
        for _ in range(3):
            opt.zero_grad()
            loss(moved).backward()
            opt.step()
        return float(loss(moved).detach())

    with innerloop.track(model, rule(learned, lr=0.05)) as loop:
        for _ in range(3):
            loop.step(loss(loop.model))
        found = torch.autograd.grad(loss(loop.model), learned)
    exact = sum(float((g * v).sum()) for g, v in zip(found, direction, strict=True))
    assert exact == pytest.approx((plain(1e-5) - plain(-1e-5)) / 2e-5, rel=1e-6)
