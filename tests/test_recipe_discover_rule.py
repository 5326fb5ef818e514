"""``examples/discover_rule.py`` in small: tasks, exact returns, gradients, the baseline."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tqdm import tqdm

import innerloop
from innerloop.rl import envs
from tests.test_examples import imported


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return imported("discover_rule")


def kinds(example: ModuleType) -> dict[str, Any]:
    return {**example.HELD_OUT, **{str(i): kind for i, kind in enumerate(example.TRAINING)}}


def test_all_tasks_are_tables_of_probabilities_and_differ(example: ModuleType) -> None:
    for name, kind in kinds(example).items():
        tasks = kind.draw(20, torch.Generator().manual_seed(0))
        size, actions = kind.env.observation_space.size, kind.env.action_space.n
        assert tasks["transition"].shape == (20, size, actions, size), name
        assert tasks["reward"].shape == (20, size, actions), name
        assert bool((tasks["transition"] >= 0).all())
        torch.testing.assert_close(tasks["transition"].sum(-1), torch.ones(20, size, actions))
        low, high = example.bounds(tasks, kind.env.horizon)
        assert bool((high >= low - 1e-5).all()), name
        assert low.unique().numel() > 1 or high.unique().numel() > 1 or name == "delayed reward"
    reward = example.HELD_OUT["delayed reward"].draw(20, torch.Generator().manual_seed(0))["reward"]
    assert {tuple(row) for row in reward[:, -2:, 0].tolist()} == {(1.0, -1.0), (-1.0, 1.0)}


def test_the_expected_return_is_that_of_all_trajectories(example: ModuleType) -> None:
    """Two states, two actions, three steps: against the sum over all 64 trajectories."""
    generator = torch.Generator().manual_seed(1)
    env = envs.TabularMDP(2, 2, 3)
    tasks = {k: x.double() for k, x in env.sample_tasks(2, generator).items()}
    tasks["transition"] /= tasks["transition"].sum(-1, keepdim=True)
    logits = torch.randn(2, 2, 2, generator=generator).double()
    found = example.expected_return(logits, tasks, 3)
    for i in range(2):
        policy, goes = logits[i].softmax(-1), tasks["transition"][i]
        total = 0.0
        for actions in itertools.product(range(2), repeat=3):
            for path in itertools.product(range(2), repeat=3):
                states, chance, paid = (0, *path), 1.0, 0.0
                for s, a, following in zip(states, actions, path, strict=False):
                    chance *= float(policy[s, a] * goes[s, a, following])
                    paid += float(tasks["reward"][i, s, a])
                total += chance * paid
        assert found[i].item() == pytest.approx(total, abs=1e-12)
    # The best of the 16 policies without a clock is not above the bound, which has one.
    low, high = example.bounds(tasks, 3)
    best = torch.stack(
        [
            example.expected_return(torch.tensor([[a, b]] * 2).double() * 1000, tasks, 3)
            for a, b in itertools.product([[0.0, 1.0], [1.0, 0.0]], repeat=2)
        ]
    ).amax(0)
    assert bool((best <= high + 1e-12).all())
    assert bool((low <= best).all())


def test_episodes_have_the_expected_return(example: ModuleType) -> None:
    kind = example.HELD_OUT["grids"]
    generator = torch.Generator().manual_seed(0)
    tasks = kind.draw(3, generator)
    logits = torch.randn(tasks["reward"].shape, generator=generator)
    seen = example.act(kind.env, tasks, logits, 4000, generator)
    assert seen.states.shape == (13, 3, 4000)
    returns = seen.rewards.sum(0)
    error = returns.std(1) / 4000**0.5
    expected = example.expected_return(logits, tasks, kind.env.horizon)
    assert bool(((returns.mean(1) - expected).abs() < 4 * error).all())


def test_the_loss_moves_tables_as_the_page_says(example: ModuleType) -> None:
    """Against loops: the policy gradient of -push · log π, and half of the way to the mean."""
    generator = torch.Generator().manual_seed(0)
    kind = example.TRAINING[0]
    tasks = kind.draw(2, generator)
    params = {
        "logits": torch.randn(2, 5, 2, generator=generator).double().requires_grad_(),
        "predictions": torch.randn(2, 5, 3, generator=generator).double().requires_grad_(),
    }
    seen = example.act(kind.env, tasks, params["logits"].detach(), 4, generator)
    shape = seen.actions.shape
    said = example.Said(
        torch.randn(shape, generator=generator).double(),
        torch.randn(*shape, 3, generator=generator).double(),
    )
    loss = example.inner_loss(params, {}, seen, said)
    grads = torch.autograd.grad(loss, list(params.values()))
    push = torch.zeros(2, 5, 2).double()
    told: dict[tuple[int, int], list[torch.Tensor]] = {}
    policy = params["logits"].detach().softmax(-1)
    for t, n, e in itertools.product(*map(range, shape)):
        s, a = int(seen.states[t, n, e]), int(seen.actions[t, n, e])
        score = torch.eye(2)[a].double() - policy[n, s]
        push[n, s] += said.push[t, n, e] * score / shape[2]
        told.setdefault((n, s), []).append(said.prediction[t, n, e])
    torch.testing.assert_close(-grads[0], push)
    for (n, s), rows in told.items():
        way = torch.stack(rows).mean(0) - params["predictions"][n, s].detach()
        torch.testing.assert_close(-grads[1][n, s], way / 2)


def test_the_outer_gradient_is_that_of_a_plain_loop(example: ModuleType) -> None:
    """Two updates on fixed episodes, against autograd and by differences."""
    args = example.Args(predictions=2, hidden=4, lives=3, episodes=2)
    generator = torch.Generator().manual_seed(0)
    kind = example.TRAINING[0]
    tasks = {k: x.double() for k, x in kind.draw(3, generator).items()}
    start = {k: x.double() for k, x in example.newborn(kind.env, 3, 2).items()}
    weights = {k: x.double() for k, x in example.first_weights(args, 0).items()}
    seen = [
        example.Episodes(found.states, found.actions, found.rewards.double())
        for found in (example.act(kind.env, tasks, start["logits"], 2, generator) for _ in range(2))
    ]

    def outer(traj: innerloop.Trajectory, _: object) -> torch.Tensor:
        return example.score(traj.params["logits"], tasks, kind.env.horizon).mean()

    def value(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        params = dict(start)
        for episodes in seen:
            leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
            constant = {
                k: p.detach() for k, p in example.rule(params, weights, episodes)._asdict().items()
            }
            loss = example.inner_loss(leaves, {}, episodes, example.Said(**constant))
            grads = torch.autograd.grad(loss, list(leaves.values()))
            params = {k: p - g for (k, p), g in zip(params.items(), grads, strict=True)}
        return example.score(params["logits"], tasks, kind.env.horizon).mean()

    problem = example.problem_of(example.rule)
    found, grads = innerloop.metagradient(outer, problem, start, seen, hyper=weights, wrt="hyper")
    assert found.item() == pytest.approx(value(weights).item(), abs=1e-12)
    direction = {k: torch.randn(x.shape, generator=generator).double() for k, x in weights.items()}
    step = 1e-5
    ahead, behind = (
        value({k: x + sign * step * direction[k] for k, x in weights.items()}) for sign in (1, -1)
    )
    expected = (ahead - behind).item() / (2 * step)
    along = sum((grads[k] * x).sum().item() for k, x in direction.items())
    assert along == pytest.approx(expected, rel=1e-6)
    assert abs(expected) > 1e-4


def test_the_baseline_is_an_actor_critic(example: ModuleType) -> None:
    """With λ = γ = 1 and no bonus the push is lr · (return to go - value), values move to it."""
    kind, generator = example.HELD_OUT["grids"], torch.Generator().manual_seed(0)
    tasks = kind.draw(2, generator)
    params = example.newborn(kind.env, 2, 1)
    params["predictions"] = torch.randn(2, 16, 1, generator=generator)
    seen = example.act(kind.env, tasks, params["logits"], 3, generator)
    settings = {"lr": 2.0, "critic": 0.25, "gamma": 1.0, "lam": 1.0, "entropy": 0.0}
    hyper = {k: torch.full((2,), x) for k, x in {**settings, "normalize": 0.0}.items()}
    said = example.actor_critic(params, hyper, seen)
    to_go = seen.rewards.flip(0).cumsum(0).flip(0)
    values = example.looked_up(params["predictions"], seen.states[:-1])[..., 0]
    torch.testing.assert_close(said.push, 2 * (to_go - values))
    torch.testing.assert_close(said.prediction[..., 0], values + (to_go - values) / 2)
    hyper["normalize"] = torch.ones(2)
    push = example.actor_critic(params, hyper, seen).push / 2
    torch.testing.assert_close(push.mean((0, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(push.square().mean((0, 2)), torch.ones(2), atol=1e-3, rtol=0)


def test_a_tuned_actor_critic_learns(example: ModuleType) -> None:
    args = example.Args(settings=8, tuning_tasks=8, updates=16)
    kind = example.HELD_OUT["bandits"]
    settings = example.tuned(args, kind)
    generator = torch.Generator().manual_seed(0)
    of_all = {k: x.expand(32) for k, x in settings.items()}
    tasks = kind.draw(32, generator)
    scores = example.lives(args, kind, tasks, example.actor_critic, of_all, generator)
    assert scores.shape == (17, 32)
    torch.testing.assert_close(scores[0], torch.zeros(32), atol=1e-5, rtol=0)
    assert scores[-1].mean() > 0.8


SMALL = "--iterations 6 --lives 4 --episodes 2 --updates 6 --window 3 --save-every 2".split()


def test_a_killed_run_goes_on_bit_for_bit(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, scores = example.discover(example.parse(SMALL), 0, tqdm(disable=True))
    calls, metagradient = [], innerloop.metagradient

    def killed(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return metagradient(*arguments, **options)

    args = example.parse([*SMALL, "--resume", str(tmp_path / "state.pt")])
    with monkeypatch.context() as patch:
        patch.setattr(innerloop, "metagradient", killed)
        with pytest.raises(KeyboardInterrupt):
            example.discover(args, 0, tqdm(disable=True))
    resumed, again = example.discover(args, 0, tqdm(disable=True))
    assert again == scores
    assert len(scores) == 6
    assert all(torch.equal(resumed[name], x) for name, x in whole.items())


def test_a_small_run_prints_a_table_and_draws(example: ModuleType, tmp_path: Path) -> None:
    small = "--rules 2 --tests 4 --settings 4 --tuning-tasks 4".split()
    args = example.parse([*SMALL, *small])
    results = example.run(args)
    assert list(results.kinds) == list(example.HELD_OUT)
    assert all(r.found.shape == r.critic.shape == (2, 7) for r in results.kinds.values())
    text = example.table(args, results)
    assert "actor-critic" in text
    assert "2 rules, 4 tasks of each kind" in text
    example.draw(results, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_discovery_learns_to_learn(example: ModuleType) -> None:
    """A rule as first drawn does not learn; after a hundred outer steps it does, in new tasks."""
    args = example.Args(iterations=100)
    weights, _ = example.discover(args, 0, tqdm(disable=True))
    kind = example.HELD_OUT["random MDPs"]
    ends = []
    for tried in (example.first_weights(args, 0), weights):
        generator = torch.Generator().manual_seed(1)
        tasks = kind.draw(64, generator)
        ends.append(example.lives(args, kind, tasks, example.rule, tried, generator)[-1].mean())
    assert ends[0] < 0.3
    assert ends[1] > 0.7
