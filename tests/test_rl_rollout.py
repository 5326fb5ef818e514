"""Rollouts: what they refuse, and minibatches as the batches of a loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop.errors import BiasedSurrogateWarning, InvalidInputError
from innerloop.rl import Gaussian, Minibatch, Rollout, check_separate, gae, minibatch_order
from tests.oracles import smooth_noise

T, N = 5, 4


def rollout(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "observations": smooth_noise(T, N, 3),
        "actions": smooth_noise(T, N, 2, phase=1.0),
        "rewards": smooth_noise(T, N, phase=2.0),
        "log_probs": smooth_noise(T, N, phase=3.0),
        "values": smooth_noise(T, N, phase=4.0),
        "last_value": smooth_noise(N, phase=5.0),
        "terminated": smooth_noise(T, N, phase=6.0) > 0.7,
        "truncated": smooth_noise(T, N, phase=7.0) > 0.8,
        "final_values": smooth_noise(T, N, phase=8.0),
        "mask": smooth_noise(T, N, phase=9.0) > -0.9,
    }
    return Rollout(**{**fields, **changes})


def test_gae_reads_all_fields():
    r = rollout()
    expected = gae(
        r.rewards,
        r.values,
        r.last_value,
        gamma=0.9,
        lam=0.8,
        terminated=r.terminated,
        truncated=r.truncated,
        final_values=r.final_values,
    )
    found = r.gae(gamma=0.9, lam=0.8)
    assert torch.equal(found.advantages, expected.advantages)
    assert torch.equal(found.returns, expected.returns)


def test_ends():
    r = rollout()
    ends = r.ends()
    assert ends[-1].all()
    assert torch.equal(ends[:-1], (r.terminated | r.truncated)[:-1])
    assert rollout(terminated=None, truncated=None).ends()[:-1].any().item() is False


def rows(r: Rollout) -> list[dict[str, Any]]:
    names = [name for name in Rollout._fields if name != "last_value"]
    return [{name: getattr(r, name)[t] for name in names} for t in range(T)]


def test_steps_are_stacked():
    r = rollout()
    found: Any = Rollout.stack(rows(r), last_value=r.last_value)
    for one, other in zip(found, r, strict=True):
        assert torch.equal(one, other)


def test_named_observations_are_stacked_and_cut():
    pixels = {"pixels": smooth_noise(T, N, 2, 2), "speed": smooth_noise(T, N)}
    steps = [
        {**row, "observations": {name: x[t] for name, x in pixels.items()}}
        for t, row in enumerate(rows(rollout()))
    ]
    found: Any = Rollout.stack(steps, last_value=torch.zeros(N).double())
    assert all(torch.equal(found.observations[name], x) for name, x in pixels.items())
    batch = found.minibatches(1, 7)[0]
    at = batch.indices
    assert torch.equal(batch.observations["pixels"], pixels["pixels"].flatten(0, 1)[at])
    assert batch.observations["speed"].shape == (7,)


# -- minibatches -----------------------------------------------------------------------------------


def test_every_epoch_uses_every_step_once():
    batches = rollout().minibatches(3, 8, torch.Generator().manual_seed(0))
    assert [len(batch.indices) for batch in batches] == [8, 8, 4] * 3
    for epoch in range(3):
        used = torch.cat([batch.indices for batch in batches[3 * epoch : 3 * epoch + 3]])
        assert used.sort().values.tolist() == list(range(T * N))
    assert batches[0].indices.tolist() != batches[3].indices.tolist()


def test_a_minibatch_holds_the_steps_that_it_names():
    r = rollout()
    advantages, returns = r.gae(gamma=0.9, lam=0.8)
    for batch in r.minibatches(1, 6, advantages=advantages, returns=returns):
        assert batch.rollout is None
        for name in ("observations", "actions", "log_probs", "values", "mask"):
            expected = getattr(r, name).flatten(0, 1)[batch.indices]
            assert torch.equal(getattr(batch, name), expected), name
        assert torch.equal(batch.advantages, batch.pick(advantages))
        assert torch.equal(batch.returns, returns.flatten(0, 1)[batch.indices])


def test_the_generator_decides_the_order():
    r = rollout()
    first, again = (
        [b.indices.tolist() for b in r.minibatches(2, 6, torch.Generator().manual_seed(3))]
        for _ in range(2)
    )
    assert first == again
    order = minibatch_order(2, T * N, torch.Generator().manual_seed(3))
    assert [b.indices.tolist() for b in r.minibatches(2, 6, order=order)] == first


def linear() -> nn.Module:
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(smooth_noise(*p.shape, phase=30.0 + i))
    return model


def fit(model: Any, batch: Minibatch) -> Tensor:
    return (model(batch.observations) - batch.actions).square().mean()


def test_minibatches_are_the_batches_of_a_loop_and_of_a_hand_written_one():
    """The same parameters as with torch.optim, from `unroll` and under `track`."""
    batches = rollout().minibatches(2, 6, torch.Generator().manual_seed(0))
    plain = linear()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        fit(plain, batch).backward()
        optimizer.step()
    model = linear()
    problem = innerloop.Problem.from_module(
        model, lambda model, hyper, batch: fit(model, batch), innerloop.optim.adam(lr=0.1)
    )
    for strategy in (innerloop.StoreAll(), innerloop.Checkpointed(slots=2)):
        traj = innerloop.unroll(problem, None, batches, strategy=strategy)
        for name, p in plain.named_parameters():
            torch.testing.assert_close(traj.params[name], p.detach(), rtol=0, atol=1e-12)
    with innerloop.track(model, torch.optim.Adam(model.parameters(), lr=0.1)) as loop:
        for batch in batches:
            loop.step(fit(loop.model, batch))
        for name, p in plain.named_parameters():
            found = loop.parameters(time=-1)[name]
            torch.testing.assert_close(found, p, rtol=0, atol=1e-12)


def test_rollouts_are_cut_inside_of_vmap_with_an_order_from_outside():
    stacked = Rollout(*(torch.stack([x, 2 * x if x.is_floating_point() else x]) for x in rollout()))
    order = minibatch_order(1, T * N)

    def first(r: Rollout) -> Any:
        return r.minibatches(1, 6, order=order)[0]

    found = torch.func.vmap(lambda r: tuple(first(r)[:4]))(stacked)
    expected = first(rollout())
    for one, other in zip(found, expected[:4], strict=True):
        torch.testing.assert_close(one[0], other)
        torch.testing.assert_close(one[1], 2 * other)


def test_advantages_with_a_gradient_are_picked_in_the_loss():
    gamma = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    r = rollout()
    advantages = r.gae(gamma=gamma, lam=0.8).advantages
    with pytest.raises(InvalidInputError, match=r"batch.pick\(hyper\['advantages'\]\)"):
        r.minibatches(1, 6, advantages=advantages)
    total = torch.stack([b.pick(advantages).sum() for b in r.minibatches(1, 6)]).sum()
    found, expected = (
        torch.autograd.grad(x, gamma, retain_graph=True)[0] for x in (total, advantages.sum())
    )
    torch.testing.assert_close(found, expected)


# -- errors ----------------------------------------------------------------------------------------


def broken(name: str, value: float) -> dict[str, Tensor]:
    x = getattr(rollout(), name).clone()
    x[2, 1] = value
    return {name: x}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (broken("rewards", float("nan")), "rewards is nan at step 2 of environment 1"),
        (broken("rewards", float("inf")), "rewards is inf at step 2 of environment 1"),
        (broken("log_probs", float("-inf")), "log_probs is -inf at step 2"),
        ({"rewards": torch.zeros(0, N)}, "at least one step"),
        ({"rewards": torch.zeros(T, 0)}, "of at least one environment"),
        ({"rewards": torch.zeros(T)}, r"rewards.unsqueeze\(1\)"),
        ({"rewards": torch.zeros(T, N, dtype=torch.long)}, r"rewards.float\(\)"),
        ({"log_probs": smooth_noise(T, N).requires_grad_()}, r"log_probs.detach\(\)"),
        ({"values": smooth_noise(T, N).requires_grad_()}, "values requires grad"),
        ({"log_probs": smooth_noise(T, N, 2)}, r"log_probs.sum\(-1\).*not their mean"),
        ({"values": smooth_noise(T, N, 1)}, r"squeeze\(-1\)"),
        ({"terminated": torch.zeros(T, N)}, r"terminated.bool\(\)"),
        ({"actions": torch.zeros(N, T)}, "actions has shape"),
        ({"observations": {"x": torch.zeros(T)}}, r"observations\['x'\] has shape"),
    ],
)
def test_a_broken_rollout_is_refused_by_name(changes: dict[str, Any], message: str):
    r = rollout(**{"mask": None, **changes})
    with pytest.raises(InvalidInputError, match=message):
        r.check()
    with pytest.raises(InvalidInputError, match=message):
        r.minibatches(1, 4)


def test_what_is_masked_may_be_nan():
    mask = torch.ones(T, N, dtype=torch.bool)
    mask[2, 1] = False
    rollout(**broken("rewards", float("nan")), mask=mask).check()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "the rollout is empty"),
        ([*rows(rollout())[:2], {"rewards": torch.zeros(N)}], "step 2 other ones"),
        ([{"rewards": torch.zeros(N)}], "lack the fields"),
        ([{**row, "last_value": torch.zeros(N)} for row in rows(rollout())], "without last_value"),
        ([{**row, "reward": torch.zeros(N)} for row in rows(rollout())], "the same of the fields"),
    ],
)
def test_steps_that_cannot_be_stacked(steps: list[Any], message: str):
    with pytest.raises(InvalidInputError, match=message):
        Rollout.stack(steps)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"epochs": 0, "size": 4}, "epochs=0"),
        ({"epochs": 1, "size": 0}, "size=0"),
        ({"epochs": 1, "size": 4, "order": torch.zeros(2, 3).long()}, "minibatch_order"),
        ({"epochs": 1, "size": 4, "returns": torch.zeros(T)}, "returns has shape"),
    ],
)
def test_minibatches_that_cannot_be_cut(args: dict[str, Any], message: str):
    with pytest.raises(InvalidInputError, match=message):
        rollout().minibatches(**args)


def test_advantages_need_values():
    with pytest.raises(InvalidInputError, match="discounted_returns"):
        rollout(values=None).gae(gamma=0.9, lam=0.8)


def gaussian() -> tuple[Rollout, Tensor]:
    policy = Gaussian(smooth_noise(T, N, 2), smooth_noise(2, phase=1.0))
    log_probs = policy.log_prob(rollout().actions)
    return rollout(log_probs=log_probs), log_probs


def test_the_first_ratio_must_be_one():
    r, log_probs = gaussian()
    r.check_log_probs(log_probs)
    with pytest.raises(InvalidInputError, match="before the first update they must be equal"):
        r.check_log_probs(log_probs + 0.01)


@pytest.mark.parametrize("which", ["stored", "new"])
def test_a_mean_over_action_dimensions_is_recognised(which: str):
    r, log_probs = gaussian()
    if which == "stored":
        r = r._replace(log_probs=log_probs / 2)
    else:
        log_probs = log_probs / 2
    with pytest.raises(InvalidInputError, match=f"the {which} log-probabilities are the means"):
        r.check_log_probs(log_probs)


def test_the_same_trajectories_for_inner_and_outer_loss_warn():
    r = rollout()
    with pytest.warns(BiasedSurrogateWarning, match="same trajectories"):
        assert not check_separate(r, r)
    with pytest.warns(BiasedSurrogateWarning, match="same trajectories"):
        assert not check_separate(r, copy.deepcopy(r))
    assert check_separate(r, r._replace(rewards=r.rewards + 1))
