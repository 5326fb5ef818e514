"""Long episodes, sampled: how well each surrogate's Hessian correlates with the true one.

The figures are means over five seeds. At batch 64 such a mean has a standard error of .04, so small
batches are averaged over more repetitions here, and the figures hold within the same .05.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from innerloop.rl import discounted_returns, surrogate
from tests import rl_beds as beds

CHAIN = beds.chain()
REPEATS = {64: 64, 256: 20, 1024: 8, 4096: 5}
LOADED = {64: 0.87, 256: 0.97, 1024: 0.993, 4096: 0.998}
BATCHES = sorted(REPEATS)
RATIO = {64: 0.95, 256: 0.95, 1024: 0.96, 4096: 0.95}


@functools.cache
def truth() -> Tensor:
    """The row of the Hessian that belongs to the logit of action 0 in state 0."""
    value = functools.partial(beds.chain_values, CHAIN)
    return torch.func.grad(lambda t: torch.func.grad(lambda s: value(s).mean())(t)[0, 0])(
        CHAIN.theta
    ).flatten()


@functools.cache
def data(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, actions, rewards and one-step advantages of all repetitions, side by side; the last
    reward contains the value of the state after it."""
    generator = torch.Generator().manual_seed(100)
    states, actions = beds.walk(CHAIN, batch * REPEATS[batch], generator)
    values = beds.chain_values(CHAIN, CHAIN.theta)[states]
    rewards = CHAIN.rewards[states[:-1]]
    advantages = rewards + beds.LONG_GAMMA * values[1:] - values[:-1]
    last = rewards[-1:] + beds.LONG_GAMMA * values[-1:]
    return states, actions, torch.cat([rewards[:-1], last]), advantages


def correlation(batch: int, signal: Tensor, **options: Any) -> float:
    """The mean over repetitions of the correlation of the estimated row with the true one."""
    states, actions, _, _ = data(batch)
    repeats = REPEATS[batch]
    theta = CHAIN.theta.expand(repeats, *CHAIN.theta.shape).clone().requires_grad_()
    which = torch.arange(repeats).repeat_interleave(batch)
    log_probs = theta.log_softmax(1)[which, actions, states[:-1]]
    total = surrogate(log_probs, signal, discount=beds.LONG_GAMMA, reduction="none", **options)
    (slope,) = torch.autograd.grad(total.sum() / batch, theta, create_graph=True)
    rows = torch.autograd.grad(slope[:, 0, 0].sum(), theta)[0].flatten(1)
    found = [torch.corrcoef(torch.stack([row, truth()]))[0, 1] for row in rows]
    return torch.stack(found).mean().item()


@pytest.mark.parametrize("batch", BATCHES)
def test_loaded_dice_converges(batch: int):
    found = correlation(batch, data(batch)[3])
    assert found == pytest.approx(LOADED[batch], abs=0.05)


@pytest.mark.parametrize("batch", BATCHES)
def test_the_per_step_ratio_stops_at_its_bias(batch: int):
    found = correlation(batch, data(batch)[3], kind="ratio")
    assert found == pytest.approx(RATIO[batch], abs=0.05)


@pytest.mark.parametrize("batch", BATCHES)
def test_plain_dice_drowns_in_noise(batch: int):
    found = correlation(batch, data(batch)[2], kind="dice")
    assert found < 0.3


def test_loaded_dice_is_better_than_its_bias_in_the_end():
    """With many samples the unbiased estimate is closer than the biased one."""
    advantages = data(4096)[3]
    assert correlation(4096, advantages) > 0.99 > correlation(4096, advantages, kind="ratio")


def test_returns_make_the_same_estimate_noisier():
    """The advantages of λ = 1 are unbiased too: the default of the surrogate is not tied to one
    way of estimating them."""
    states, _, rewards, advantages = data(1024)
    values = beds.chain_values(CHAIN, CHAIN.theta)[states]
    to_go = discounted_returns(rewards, gamma=beds.LONG_GAMMA) - values[:-1]
    assert 0.9 < correlation(1024, to_go) < correlation(1024, advantages)
