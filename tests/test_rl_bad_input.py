"""What cannot be right is named, wherever it comes in: rewards, action spaces, episodes without a
step, old log-probabilities, trajectories used twice, averages over the action.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import InvalidInputError
from innerloop.errors import BiasedSurrogateWarning
from innerloop.rl import ActorCritic, Gaussian, Rollout, check_separate, envs, ppo_loss
from innerloop.rl.meta import Episodes, MetaConfig, MetaLearner
from innerloop.rl.ppo import PPO, PPOConfig, ppo_problem

T, N = 4, 3


def meta_config(**settings: Any) -> MetaConfig:
    small: dict[str, Any] = {"tasks": 2, "episodes": 3, "iterations": 1, "hidden": (4,)}
    return MetaConfig(**{**small, **settings})


def ppo_config(**settings: Any) -> PPOConfig:
    small: dict[str, Any] = {"total_steps": 16, "num_envs": 2, "steps": 8, "minibatch": 8}
    return PPOConfig(**{**small, "hidden": (4,), **settings})


def rollout(**changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "observations": torch.randn(T, N, 2),
        "actions": torch.randn(T, N, 2),
        "rewards": torch.randn(T, N),
        "log_probs": -torch.rand(T, N),
        "values": torch.randn(T, N),
        "last_value": torch.randn(N),
    }
    return Rollout(**{**fields, **changes})


def unchanged(learner: PPO | MetaLearner, act: Callable[[], object], message: str) -> None:
    """The error is named, and neither the policy nor its optimizer has moved."""
    before = [p.detach().clone() for p in learner.policy.parameters()]
    with pytest.raises(InvalidInputError, match=message):
        act()
    assert all(map(torch.equal, before, learner.policy.parameters()))
    assert not learner.optimizer.state
    assert not learner.history


# -- rewards ---------------------------------------------------------------------------------------


class Paying(envs.Navigation):
    """Pays one number at the second step of every copy."""

    def __init__(self, number: float) -> None:
        super().__init__(horizon=4)
        self.number = number

    def initial(self, tasks: Any, generator: torch.Generator | None = None) -> Tensor:
        self.steps = 0
        return super().initial(tasks, generator)

    def step(
        self, state: Tensor, action: Tensor, tasks: Any, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        state, reward, ended = super().step(state, action, tasks, generator)
        self.steps += 1
        return state, torch.full_like(reward, self.number) if self.steps == 2 else reward, ended


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
class TestRewards:
    """A reward that is NaN or infinite."""

    def test_in_a_rollout(self, number: float):
        rewards = torch.zeros(T, N)
        rewards[2, 1] = number
        with pytest.raises(InvalidInputError, match=f"rewards is {number} at step 2 of env.* 1"):
            rollout(rewards=rewards).check()
        # Not where the step does not count.
        mask = rewards.isfinite()
        assert rollout(rewards=rewards, mask=mask).check().rewards is rewards

    def test_in_ppo(self, number: float):
        learner = PPO(ppo_config(), env=Paying(number))
        unchanged(learner, learner.train, f"rewards is {number} at step 1 of environment 0")

    def test_in_a_meta_learner(self, number: float):
        learner = MetaLearner(meta_config(), env=Paying(number))
        unchanged(learner, learner.train, f"reward of {number} at step 1 of episode 0 of task 0")


# -- action spaces ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ActorCritic(2, envs.Discrete(2)), "Categorical over 2 actions.*does not fit the action"),
        (ActorCritic(2, envs.Box(3)), "Gaussian over 3 actions.*does not fit the action space"),
        (ActorCritic(3, envs.Box(2)), "cannot be called with observations of shape"),
        (nn.Linear(2, 2), r"a policy returns \(distribution, values\)"),
    ],
)
def test_a_policy_that_does_not_fit_the_action_space(policy: nn.Module, message: str):
    with pytest.raises(InvalidInputError, match=message):
        PPO(ppo_config(env="navigation"), policy=policy)
    with pytest.raises(InvalidInputError, match=message):
        MetaLearner(meta_config(), policy=policy)


@pytest.mark.parametrize(
    ("env", "action", "message"),
    [
        (envs.Bandit(3), torch.tensor([0, 3]), "whole numbers from 0 to 2"),
        (envs.Bandit(3), torch.tensor([0, -1]), "whole numbers from 0 to 2"),
        (envs.Bandit(3), torch.tensor([0.0, 1.0]), "whole numbers from 0 to 2"),
        (envs.Bandit(3), torch.zeros(2, 1).long(), "does not fit the action space"),
        (envs.Navigation(), torch.zeros(2, 3), "does not fit the action space"),
        (envs.Navigation(), torch.tensor([[0.0, math.nan]] * 2), "an action is NaN"),
    ],
)
def test_actions_that_do_not_fit_the_space(env: Any, action: Tensor, message: str):
    batch = envs.Batch(env, 2)
    batch.reset()
    with pytest.raises(InvalidInputError, match=message):
        batch.step(action)


# -- episodes without a step -----------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [0, -1])
def test_an_environment_that_ends_at_step_0(horizon: int):
    env = envs.Navigation(horizon=horizon)
    for make in (
        lambda: envs.Batch(env, 2),
        lambda: PPO(ppo_config(), env=env),
        lambda: MetaLearner(meta_config(), env=env),
    ):
        with pytest.raises(InvalidInputError, match=f"horizon={horizon}: .* ends at step 0"):
            make()


def test_a_rollout_without_a_step():
    with pytest.raises(InvalidInputError, match="ended before the first step"):
        Rollout.stack([])
    with pytest.raises(InvalidInputError, match="at least one step"):
        rollout(rewards=torch.zeros(0, N)).check()
    mask = torch.zeros(T, N, dtype=torch.bool)
    with pytest.raises(InvalidInputError, match="mask is False at every step"):
        rollout(mask=mask).check()


def test_episodes_of_one_step_are_no_error():
    """What terminates in its first step has a reward, and is learned from."""
    learner = MetaLearner(meta_config(env="bandit", gamma=1.0))
    assert learner.train()["iteration"] == [1]
    found = PPO(ppo_config(env="bandit"), env=envs.Bandit(horizon=1)).train()
    assert found["length"] == [1.0]


# -- constants of the rollout ----------------------------------------------------------------------


def test_old_log_probabilities_that_require_grad():
    old = torch.zeros(T, N, requires_grad=True)
    message = "log_probs requires grad.*ratio of probabilities is 1"
    with pytest.raises(InvalidInputError, match=message):
        rollout(log_probs=old).check()
    with pytest.raises(InvalidInputError, match=message):
        ppo_loss(torch.zeros(T, N), old, torch.randn(T, N))


def test_old_log_probabilities_that_require_grad_in_an_inner_loop():
    """Also where they come in by a batch of `unroll` or by data that was collected elsewhere."""
    policy = ActorCritic(2, envs.Box(2), hidden=(4,))
    wrong = rollout(log_probs=torch.zeros(T, N, requires_grad=True))
    with pytest.raises(innerloop.InnerLoopError, match="grad"):
        innerloop.unroll(
            ppo_problem(policy),
            dict(policy.named_parameters()),
            wrong.minibatches(1, 6),
            hyper={"advantages": torch.randn(T, N)},
        )
    for inner in ("pg", "ppo"):
        learner = MetaLearner(meta_config(inner=inner))
        tasks = learner.env.sample_tasks(2, learner.generator)
        data = learner.collect(
            {n: p.detach().expand(2, *p.shape) for n, p in learner.params.items()}, tasks
        )
        wrong_data = data._replace(log_probs=data.log_probs.clone().requires_grad_())
        with pytest.raises(InvalidInputError, match="log_probs requires grad"):
            learner.adapt(wrong_data)


# -- trajectories used twice -----------------------------------------------------------------------


def test_inner_and_outer_loss_on_the_same_trajectories():
    first, second = rollout(), rollout()
    assert check_separate(first, second)
    with pytest.warns(BiasedSurrogateWarning, match="same trajectories.*biases the outer gradient"):
        assert not check_separate(first, first._replace(log_probs=torch.zeros(T, N)))


def test_a_meta_learner_keeps_its_trajectories_apart():
    learner = MetaLearner(meta_config(adaptation_steps=2))
    tasks = learner.env.sample_tasks(2, learner.generator)
    data, _ = learner._acted(tasks, 2)
    assert all(check_separate(a, b) for a, b in itertools.pairwise(data))
    with pytest.warns(BiasedSurrogateWarning, match="same trajectories"):
        check_separate(data[0], Episodes(*(x.clone() for x in data[0])))


# -- averages over the action ----------------------------------------------------------------------


class Averaged(Gaussian):
    """A normal distribution whose log-probability is the mean over the action."""

    def log_prob(self, actions: Tensor) -> Tensor:
        return super().log_prob(actions) / actions.shape[-1]


class Wrong(ActorCritic):
    """A policy with that distribution."""

    def distribution(self, observations: Tensor) -> Any:
        return Averaged(*super().distribution(observations))


def test_log_probabilities_averaged_over_the_action():
    message = "are the means over the 2 dimensions of the action"
    with pytest.raises(InvalidInputError, match=f"Averaged {message}"):
        PPO(ppo_config(env="navigation"), policy=Wrong(2, envs.Box(2)))
    with pytest.raises(InvalidInputError, match=f"Averaged {message}"):
        MetaLearner(meta_config(), policy=Wrong(2, envs.Box(2)))
    # Of one number the mean is the sum.
    one = envs.Box(1)
    innerloop.rl._policy.check_fits(Wrong(2, one), torch.zeros(3, 2), one)
    # Stored by somebody else's code.
    policy = Gaussian(torch.randn(T, N, 2), torch.randn(2))
    actions = policy.sample()
    stored = rollout(actions=actions, log_probs=policy.log_prob(actions) / 2)
    with pytest.raises(InvalidInputError, match=f"stored log-probabilities {message}"):
        stored.check_log_probs(policy.log_prob(actions))


def test_log_probabilities_that_keep_the_action_dimension():
    each = torch.randn(T, N, 2)
    with pytest.raises(InvalidInputError, match=r"log_probs.sum\(-1\)"):
        rollout(log_probs=each).check()
    with pytest.raises(InvalidInputError, match=r"log_probs.sum\(-1\)"):
        ppo_loss(each, torch.zeros(T, N), torch.randn(T, N))
