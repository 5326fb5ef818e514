"""Running statistics against those of all data at once, and that a frozen one does not move."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from innerloop.errors import InvalidInputError
from innerloop.rl import ObservationNormalizer, RewardNormalizer
from tests.oracles import smooth_noise

OBSERVATIONS = 3 + 2 * smooth_noise(6, 4, 3)
REWARDS = smooth_noise(12, 4)
ENDED = smooth_noise(12, 4, phase=1.0) > 0.6


def test_statistics_are_those_of_all_observations():
    normalizer = ObservationNormalizer([3])
    for block in (OBSERVATIONS[:1], OBSERVATIONS[1:4], OBSERVATIONS[4:]):
        normalizer.update(block)
    rows = OBSERVATIONS.reshape(-1, 3)
    torch.testing.assert_close(normalizer.mean, rows.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(normalizer.var, rows.var(0, correction=0), rtol=0, atol=1e-12)
    found = normalizer.normalize(OBSERVATIONS).reshape(-1, 3)
    torch.testing.assert_close(found.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.var(0, correction=0), torch.ones(3).double())


def test_many_small_updates_at_a_large_offset_stay_exact():
    """A sum of squares would have lost every digit of the variance."""
    values = 1e8 + smooth_noise(500, 1)
    normalizer = ObservationNormalizer([1])
    for row in values:
        normalizer.update(row.unsqueeze(0))
    torch.testing.assert_close(normalizer.var, values.var(0, correction=0), rtol=1e-6, atol=0)


def test_observations_are_clipped_and_keep_their_dtype():
    normalizer = ObservationNormalizer([1], clip=1.5)
    normalizer.update(torch.tensor([[1.0], [3.0]]))
    found = normalizer.normalize(torch.tensor([[2.0], [100.0], [-100.0]]))
    assert found.flatten().tolist() == [0.0, 1.5, -1.5]
    assert found.dtype is torch.float32


def test_nothing_moves_in_a_frozen_block():
    normalizer = ObservationNormalizer([3])
    normalizer(OBSERVATIONS[0])
    before = normalizer.state_dict()
    with normalizer.frozen():
        with normalizer.frozen():
            normalizer(100 + OBSERVATIONS[1])
        assert normalizer.is_frozen
        first = normalizer(OBSERVATIONS[1])
        with pytest.raises(InvalidInputError, match="frozen"):
            normalizer.update(OBSERVATIONS[1])
    assert not normalizer.is_frozen
    assert all(torch.equal(x, before[name]) for name, x in normalizer.state_dict().items())
    assert torch.equal(first, normalizer.normalize(OBSERVATIONS[1]))
    assert not torch.equal(first, normalizer(OBSERVATIONS[1]))


def test_an_exception_leaves_a_frozen_block():
    normalizer = ObservationNormalizer([3])
    with pytest.raises(KeyError), normalizer.frozen():
        raise KeyError
    assert not normalizer.is_frozen


def test_observations_keep_their_graph():
    """A learned observation (an encoder's) is normalised at constant statistics."""
    normalizer = ObservationNormalizer([3])
    x = OBSERVATIONS[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(normalizer(x).sum(), x)
    expected = (1 / (normalizer.var + 1e-8).sqrt()).expand(4, 3)
    torch.testing.assert_close(slope, expected)
    assert not normalizer.mean.requires_grad


def returns_by_hand(rewards: Tensor, ended: Tensor, gamma: float) -> Tensor:
    found, so_far = [], torch.zeros(rewards.shape[1]).double()
    for r, e in zip(rewards, ended, strict=True):
        so_far = gamma * so_far + r
        found.append(so_far)
        so_far = torch.where(e, 0.0, so_far)
    return torch.stack(found)


def test_rewards_are_scaled_by_the_deviation_of_their_discounted_sum():
    normalizer = RewardNormalizer(4, gamma=0.9)
    for t, (r, e) in enumerate(zip(REWARDS, ENDED, strict=True)):
        found = normalizer(r, ended=e)
        past = returns_by_hand(REWARDS[: t + 1], ENDED[: t + 1], 0.9)
        expected = r / (past.var(correction=0) + 1e-8).sqrt()
        torch.testing.assert_close(found, expected.clamp(-10, 10))
    with normalizer.frozen():
        before = normalizer.state_dict()
        normalizer(100 * REWARDS[0], ended=ENDED[0])
        assert all(torch.equal(x, before[name]) for name, x in normalizer.state_dict().items())


@pytest.mark.parametrize("kind", ["observations", "rewards"])
def test_a_saved_normaliser_goes_on_bit_for_bit(kind: str):
    def make() -> Any:
        return ObservationNormalizer([3]) if kind == "observations" else RewardNormalizer(4)

    def step(normalizer: Any, t: int) -> Tensor:
        if kind == "observations":
            return normalizer(OBSERVATIONS[t])
        return normalizer(REWARDS[t], ended=ENDED[t])

    whole, half = make(), make()
    for t in range(3):
        step(whole, t)
        step(half, t)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for t in range(3, 6):
        assert torch.equal(step(whole, t), step(resumed, t))
    assert half.state_dict()["count"] == 12


def test_a_state_is_a_copy():
    normalizer = ObservationNormalizer([3])
    normalizer.update(OBSERVATIONS[0])
    state = normalizer.state_dict()
    state["mean"].zero_()
    assert normalizer.mean.abs().min() > 0
    normalizer.load_state_dict(state)
    state["mean"].fill_(1)
    assert (normalizer.mean == 0).all()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda o, r: o.update(torch.full((2, 3), float("nan"))), "NaN or infinite"),
        (lambda o, r: o.update(torch.zeros(3, 2)), "was made for observations of shape"),
        (lambda o, r: o.normalize(torch.zeros(2)), "was made for observations of shape"),
        (lambda o, r: r(torch.zeros(3), ended=torch.zeros(3).bool()), "one step of each"),
        (
            lambda o, r: r(torch.full((4,), float("inf")), ended=torch.zeros(4).bool()),
            "rewards hold NaN",
        ),
        (lambda o, r: o.load_state_dict(r.state_dict()), "has the entries"),
        (
            lambda o, r: o.load_state_dict({**o.state_dict(), "mean": torch.zeros(2)}),
            "'mean' has shape",
        ),
        (lambda o, r: ObservationNormalizer([3], clip=0.0), "must be positive"),
        (lambda o, r: RewardNormalizer(4, gamma=1.1), "between 0 and 1"),
    ],
)
def test_bad_input_is_refused_by_name(act: Any, message: str):
    o, r = ObservationNormalizer([3]), RewardNormalizer(4)
    before = {**o.state_dict(), **r.state_dict()}
    with pytest.raises(InvalidInputError, match=message):
        act(o, r)
    after = {**o.state_dict(), **r.state_dict()}
    assert all(torch.equal(x, before[name]) for name, x in after.items())
