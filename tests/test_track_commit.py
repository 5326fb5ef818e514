"""``loop.commit``: training in windows leaves what one long ``torch.optim`` run leaves, in every
bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from tests.oracles import assert_params, smooth_noise
from tests.situations import SEED, TwoLayers

STEPS = 12
RULES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, foreach=False),
    "momentum": lambda ps: torch.optim.SGD(
        ps, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01, foreach=False
    ),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, foreach=False),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=False),
    "amsgrad": lambda ps: torch.optim.Adam(
        ps, lr=0.01, weight_decay=0.1, amsgrad=True, foreach=False
    ),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, foreach=False),
    "maximize": lambda ps: torch.optim.Adam(ps, lr=1e-4, maximize=True, foreach=False),
}
EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))


class Images(nn.Module):
    """A convolution, BatchNorm with its buffers, dropout, and a linear layer too large to be packed
    with the others."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2)
        )
        self.hidden = nn.Linear(4 * 6 * 6, 120)
        self.head = nn.Linear(120, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.features(x.reshape(-1, 1, 8, 8)).flatten(1)).relu())


def made(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return kind().to(dtype)


def loss_of(model: Any, t: int) -> Tensor:
    """A batch of its own at every step."""
    dtype = next(iter(model.parameters())).dtype
    if isinstance(model, Images):
        return F.cross_entropy(
            model(smooth_noise(10, 64, phase=float(t)).to(dtype)), torch.arange(t, t + 10) % 3
        )
    return F.mse_loss(
        model(smooth_noise(10, 3, phase=float(t)).to(dtype)),
        smooth_noise(10, 1, phase=t + 0.5).to(dtype),
    )


def torch_trained(
    kind: type[nn.Module], rule: str, dtype: torch.dtype
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = made(kind, dtype)
    optimizer = RULES[rule](model.parameters())
    torch.manual_seed(SEED)
    torch_continue(model, optimizer, 0, STEPS)
    return model, optimizer


def torch_continue(
    model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int
) -> None:
    for t in range(start, stop):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()


def window(
    model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int, **arguments: Any
) -> None:
    with innerloop.track(model, optimizer, **arguments) as loop:
        for t in range(start, stop):
            loop.step(loss_of(loop.model, t))
        loop.commit()


def assert_same(
    ours: tuple[nn.Module, torch.optim.Optimizer], truth: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    assert_params(
        {n: p.detach() for n, p in ours[0].named_parameters()},
        {n: p.detach() for n, p in truth[0].named_parameters()},
        0,
    )
    assert_params(dict(ours[0].named_buffers()), dict(truth[0].named_buffers()), 0)
    state, expected = ours[1].state_dict(), truth[1].state_dict()
    assert state["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(state["state"], expected["state"], rtol=0, atol=0)


@pytest.mark.covering(2)
@pytest.mark.parametrize("learn", ["init", "nothing"])
@pytest.mark.parametrize("size", [1, 3, 12])
@pytest.mark.parametrize("kind", [TwoLayers, Images])
@EVERY_RULE
def test_windows_reproduce_one_long_run(rule: str, kind: type[nn.Module], size: int, learn: Any):
    model = made(kind, torch.float32)
    optimizer = RULES[rule](model.parameters())
    torch.manual_seed(SEED)
    for start in range(0, STEPS, size):
        window(model, optimizer, start, start + size, learn=learn)
    assert_same((model, optimizer), torch_trained(kind, rule, torch.float32))


@EVERY_RULE
@pytest.mark.usefixtures("float64")
def test_windows_in_float64(rule: str):
    model = made(TwoLayers, torch.float64)
    optimizer = RULES[rule](model.parameters())
    torch.manual_seed(SEED)
    for start in range(0, STEPS, 4):
        window(model, optimizer, start, start + 4)
    assert_same((model, optimizer), torch_trained(TwoLayers, rule, torch.float64))


@EVERY_RULE
def test_torch_may_take_over_and_hand_back(rule: str):
    """Three steps by torch, three by innerloop, and so on: each continues from the other's
    state."""
    model = made(TwoLayers, torch.float32)
    optimizer = RULES[rule](model.parameters())
    torch.manual_seed(SEED)
    for start in range(0, STEPS, 6):
        torch_continue(model, optimizer, start, start + 3)
        window(model, optimizer, start + 3, start + 6)
    assert_same((model, optimizer), torch_trained(TwoLayers, rule, torch.float32))


@EVERY_RULE
def test_windows_of_one_loop_cut_by_detach(rule: str):
    """One `track`, detached between the windows, committed once at the end, after the block."""
    model = made(Images, torch.float32)
    optimizer = RULES[rule](model.parameters())
    torch.manual_seed(SEED)
    with innerloop.track(model, optimizer) as loop:
        for t in range(STEPS):
            if t % 5 == 4:
                loop.detach()
            loop.step(loss_of(loop.model, t))
    assert torch.equal(
        model.get_parameter("head.bias"), made(Images, torch.float32).get_parameter("head.bias")
    )
    loop.commit()
    assert_same((model, optimizer), torch_trained(Images, rule, torch.float32))


def test_a_scheduler_runs_through_the_windows():
    def run(train: Callable[..., None]) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = made(TwoLayers, torch.float32)
        optimizer = RULES["adam"](model.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        for start in range(0, STEPS, 3):
            train(model, optimizer, start, start + 3)
            scheduler.step()
        return model, optimizer

    assert_same(run(window), run(torch_continue))


def test_a_commit_changes_values_and_nothing_else():
    """The same tensors with the same flags and gradients; and the loop goes on as if nothing had
    happened."""
    model = made(TwoLayers, torch.float32)
    optimizer = RULES["adam"](model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [(name, id(p), p.requires_grad, id(p.grad)) for name, p in model.named_parameters()]
    torch.manual_seed(SEED)
    with innerloop.track(model, optimizer) as loop:
        for t in range(STEPS):
            loop.step(loss_of(loop.model, t))
            if t % 4 == 0:
                loop.commit()
                loop.commit()
    assert [
        (name, id(p), p.requires_grad, id(p.grad)) for name, p in model.named_parameters()
    ] == before
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
    loop.commit()
    for p in model.parameters():
        p.grad = None
    assert_same((model, optimizer), torch_trained(TwoLayers, "adam", torch.float32))


def test_a_commit_before_backward_leaves_the_outer_gradient_as_it_is():
    """The outer gradient belongs to the weights at time 0, although the user's tensors have other
    values by then."""
    found = []
    for commit in (False, True):
        model = made(TwoLayers, torch.float32)
        with innerloop.track(model, RULES["momentum"](model.parameters())) as loop:
            for t in range(3):
                loop.step(loss_of(loop.model, t))
            outer = loss_of(loop.model, 3)
            if commit:
                loop.commit()
        outer.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 4
    assert_params(found[1], found[0], 0)


def test_what_did_not_learn_has_no_state():
    """torch keeps no state for a parameter that never had a gradient, and steps start to count when
    the first one comes."""

    def run(ours: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = made(TwoLayers, torch.float32)
        optimizer = RULES["adam"](model.parameters())
        by_body = lambda m, t: m.body(smooth_noise(4, 3, phase=float(t)).float()).square().mean()  # noqa: E731
        for t in range(4):
            loss = by_body if t < 2 else loss_of
            if ours:
                with innerloop.track(model, optimizer) as loop:
                    loop.step(loss(loop.model, t))
                    loop.commit()
            else:
                optimizer.zero_grad()
                loss(model, t).backward()
                optimizer.step()
            if t == 0:
                assert len(optimizer.state) == 2
        return model, optimizer

    assert_same(run(ours=True), run(ours=False))


def test_a_rule_of_our_own_has_no_torch_optimizer_to_write_to():
    model = made(TwoLayers, torch.float32)
    plain = made(TwoLayers, torch.float32)
    with innerloop.track(model, innerloop.optim.sgd(lr=0.1)) as loop:
        for t in range(3):
            loop.step(loss_of(loop.model, t))
        loop.commit()
    torch_continue(plain, RULES["sgd"](plain.parameters()), 0, 3)
    assert_params(
        {n: p.detach() for n, p in model.named_parameters()},
        {n: p.detach() for n, p in plain.named_parameters()},
        0,
    )
