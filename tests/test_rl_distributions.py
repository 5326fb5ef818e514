"""Distributions of actions against torch.distributions, and their samples against themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from innerloop.errors import InvalidInputError
from innerloop.rl import Categorical, Gaussian
from tests.oracles import smooth_noise

LOGITS = smooth_noise(4, 3, 5), smooth_noise(4, 3, 5, phase=1.0)
ACTIONS = smooth_noise(4, 3, phase=2.0).mul(2.4).round().long() + 2
MEANS = smooth_noise(4, 3, 2), smooth_noise(4, 3, 2, phase=1.0)
LOG_STDS = smooth_noise(2, phase=2.0), smooth_noise(4, 3, 2, phase=3.0)
VECTORS = 2 * smooth_noise(4, 3, 2, phase=4.0)


def test_categorical_equals_torch():
    ours, other = map(Categorical, LOGITS)
    peer, peer_other = (torch.distributions.Categorical(logits=x) for x in LOGITS)
    torch.testing.assert_close(ours.log_prob(ACTIONS), peer.log_prob(ACTIONS))
    torch.testing.assert_close(ours.entropy(), peer.entropy())
    torch.testing.assert_close(ours.kl(other), torch.distributions.kl_divergence(peer, peer_other))
    assert torch.equal(ours.mode(), LOGITS[0].argmax(-1))


def test_gaussian_equals_torch():
    ours, other = (Gaussian(m, s) for m, s in zip(MEANS, LOG_STDS, strict=True))
    peer, peer_other = (
        torch.distributions.Independent(torch.distributions.Normal(m, s.exp().expand_as(m)), 1)
        for m, s in zip(MEANS, LOG_STDS, strict=True)
    )
    torch.testing.assert_close(ours.log_prob(VECTORS), peer.log_prob(VECTORS))
    torch.testing.assert_close(ours.entropy(), peer.entropy())
    torch.testing.assert_close(ours.kl(other), torch.distributions.kl_divergence(peer, peer_other))
    assert torch.equal(ours.mode(), MEANS[0])


def quantities(kind: Any, *args: Tensor) -> Tensor:
    half = len(args) // 2
    one, other = kind(*args[:half]), kind(*args[half:])
    actions = ACTIONS if kind is Categorical else VECTORS
    return torch.stack([one.log_prob(actions), one.entropy(), one.kl(other)])


@pytest.mark.parametrize("kind", [Categorical, Gaussian])
def test_first_and_second_derivatives(kind: Any):
    args = LOGITS if kind is Categorical else (MEANS[0], LOG_STDS[0], MEANS[1], LOG_STDS[1])
    inputs = tuple(x.clone().requires_grad_() for x in args)
    torch.autograd.gradcheck(lambda *x: quantities(kind, *x), inputs)
    torch.autograd.gradgradcheck(lambda *x: quantities(kind, *x), inputs)


@pytest.mark.parametrize("kind", [Categorical, Gaussian])
def test_passes_through_vmap(kind: Any):
    args = LOGITS[:1] if kind is Categorical else (MEANS[0], LOG_STDS[1])
    actions = ACTIONS if kind is Categorical else VECTORS
    policy = torch.func.vmap(lambda *x: kind(*x))(*args)
    assert isinstance(policy, kind)
    found = torch.func.vmap(lambda p, a: (p.log_prob(a), p.entropy(), p.kl(p)))(policy, actions)
    expected = kind(*args).log_prob(actions), kind(*args).entropy(), torch.zeros(4, 3).double()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_categorical_samples_have_its_probabilities():
    logits = torch.tensor([0.0, 1.0, -2.0, float("-inf")])
    policy = Categorical(logits.expand(40_000, 4).clone().requires_grad_())
    actions = policy.sample(torch.Generator().manual_seed(0))
    found = actions.bincount(minlength=4) / len(actions)
    torch.testing.assert_close(found, logits.softmax(0), rtol=0, atol=0.01)
    assert found[3] == 0
    assert not actions.requires_grad


def test_gaussian_samples_have_its_moments():
    policy = Gaussian(torch.tensor([1.0, -2.0]).expand(40_000, 2), torch.tensor([0.0, -1.0]))
    actions = policy.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(actions.mean(0), policy.mean[0], rtol=0, atol=0.02)
    torch.testing.assert_close(actions.std(0), policy.log_std.exp(), rtol=0, atol=0.02)


@pytest.mark.parametrize("policy", [Categorical(LOGITS[0]), Gaussian(MEANS[0], LOG_STDS[0])])
def test_a_generator_decides_the_sample(policy: Any):
    first, again = (policy.sample(torch.Generator().manual_seed(3)) for _ in range(2))
    state = torch.get_rng_state()
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    first, second = policy.sample(), policy.sample()
    torch.manual_seed(1)
    assert torch.equal(first, policy.sample())
    assert not torch.equal(first, second)


def test_a_forbidden_action_has_no_part_in_entropy_and_divergence():
    allowed = torch.tensor([0.3, -0.2], dtype=torch.float64)
    logits = torch.cat([allowed, torch.tensor([float("-inf")])]).requires_grad_()
    policy, other = Categorical(logits), Categorical(torch.zeros(3).double())
    expected = torch.distributions.Categorical(logits=allowed).entropy()
    torch.testing.assert_close(policy.entropy(), expected)
    value = policy.entropy() + policy.kl(other)
    (slope,) = torch.autograd.grad(value, logits, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), logits)
    assert slope.isfinite().all()
    assert second.isfinite().all()
    assert policy.kl(policy) == 0
    assert other.kl(policy).item() == float("inf")


@pytest.mark.parametrize(
    ("policy", "actions", "message"),
    [
        (Categorical(torch.zeros(4, 3)), torch.zeros(4, 3, dtype=torch.long), "innerloop.rl.Gaus"),
        (Categorical(torch.zeros(4, 3)), torch.zeros(4), r"actions.long\(\)"),
        (Gaussian(torch.zeros(4, 2), torch.zeros(2)), torch.zeros(4), "innerloop.rl.Categorical"),
        (Gaussian(torch.zeros(4, 2), torch.zeros(2)), torch.zeros(4, 3), "does not fit"),
    ],
)
def test_actions_that_the_policy_does_not_fit(policy: Any, actions: Tensor, message: str):
    with pytest.raises(InvalidInputError, match=message):
        policy.log_prob(actions)
