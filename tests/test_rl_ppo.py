"""PPO: a killed run that is resumed goes on bit for bit; it learns from what happened."""

from __future__ import annotations

import csv
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import InvalidInputError
from innerloop.rl import Categorical, Rollout, envs
from innerloop.rl.ppo import PPO, ActorCritic, PPOConfig, ppo_problem
from tests.test_rl_envs import Counter

SMALL: dict[str, Any] = {
    "env": "cartpole",
    "total_steps": 320,
    "num_envs": 2,
    "steps": 20,
    "minibatch": 20,
    "epochs": 2,
    "hidden": (8,),
}


def same(a: PPO, b: PPO) -> bool:
    one, two = a.policy.state_dict(), b.policy.state_dict()
    # As text: NaN equals NaN, and floats are written with all of their digits.
    rows = [repr({k: v for k, v in x.history.items() if k != "seconds"}) for x in (a, b)]
    return all(torch.equal(one[name], two[name]) for name in one) and rows[0] == rows[1]


# -- files and resuming ----------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["cartpole", "navigation", "CartPole-v1"])
def test_a_resumed_run_equals_one_in_a_piece(env: str, tmp_path: Path) -> None:
    if env == "CartPole-v1":
        pytest.importorskip("gymnasium")
    config = PPOConfig(**{**SMALL, "env": env}, normalize_observations=True, normalize_rewards=True)
    whole = PPO(config)
    whole.train()

    class Stop(Exception):
        pass

    def stop(row: Any) -> None:
        if row["iteration"] == 5:
            raise Stop

    with pytest.raises(Stop):
        PPO(config).train(tmp_path, checkpoint_every=3, callback=stop)
    second = PPO(config)
    second.train(tmp_path, resume=True)
    assert same(whole, second)
    assert second.counters["iteration"] == 8
    with (tmp_path / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["steps"]) for row in rows] == list(range(40, 321, 40))
    # Again: there is nothing left to do, and nothing changes.
    third = PPO(config)
    third.train(tmp_path, resume=True)
    assert same(whole, third)


KILLED = """
import sys, torch
torch.set_num_threads(1)
from innerloop.rl.ppo import PPO, PPOConfig
learner = PPO(PPOConfig(**{settings}))
learner.train(sys.argv[1], resume=True, callback=lambda row: print("x", flush=True))
"""


def test_a_killed_run_goes_on_with_the_same_weights(tmp_path: Path) -> None:
    code = KILLED.replace("{settings}", repr(SMALL))
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    with process:
        for _ in range(random.Random().randrange(1, 5)):
            process.stdout.readline()
        time.sleep(random.Random().random() / 50)
        process.send_signal(signal.SIGKILL)
    resumed, whole = PPO(PPOConfig(**SMALL)), PPO(PPOConfig(**SMALL))
    resumed.train(tmp_path, resume=True)
    whole.train()
    assert same(whole, resumed)


def test_a_run_is_not_overwritten_and_belongs_to_its_settings(tmp_path: Path) -> None:
    config = PPOConfig(**SMALL)
    PPO(config).train(tmp_path)
    with pytest.raises(InvalidInputError, match="holds a run already"):
        PPO(config).train(tmp_path)
    other = PPO(PPOConfig(**{**SMALL, "gamma": 0.5}))
    before = [p.clone() for p in other.policy.parameters()]
    with pytest.raises(InvalidInputError, match=r"other settings \(gamma=0.98 not 0.5\)"):
        other.train(tmp_path, resume=True)
    assert all(map(torch.equal, before, other.policy.parameters()))
    assert other.counters["iteration"] == 0
    longer = PPO(PPOConfig(**{**SMALL, "total_steps": 360}))
    assert longer.train(tmp_path, resume=True)["steps"][-1] == 360
    with pytest.raises(InvalidInputError, match="needs the folder"):
        PPO(config).train(resume=True)


def test_a_run_leaves_the_users_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    PPO(PPOConfig(**SMALL)).train()
    assert torch.equal(state, torch.get_rng_state())


def test_the_command_line_trains_resumes_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from innerloop import cli

    options = "rl ppo --env cartpole --total-steps 160 --num-envs 2 --steps 20 --minibatch 20"
    arguments = [*options.split(), "--hidden", "8", "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == cli.OK
    assert "160 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
    assert cli.main(arguments) == cli.FAILED
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume", "--no-picture"]) == cli.OK
    assert cli.main([*arguments[:2], "--gamma", "7"]) == cli.FAILED
    assert "gamma=7.0 must be between" in capsys.readouterr().err


# -- what it learns from ---------------------------------------------------------------------------


def test_a_rollout_holds_what_the_policy_did() -> None:
    learner = PPO(PPOConfig(**SMALL))
    rollout = learner.collect()
    distribution, values = learner.policy(rollout.observations)
    assert torch.allclose(distribution.log_prob(rollout.actions), rollout.log_probs)
    assert rollout.values is not None
    assert torch.allclose(values, rollout.values)
    assert rollout.mask is None
    # The first row of the next rollout follows the last row of this one.
    following = learner.collect()
    assert rollout.last_value is not None
    assert isinstance(following.observations, Tensor)
    assert torch.allclose(learner.policy(following.observations[0])[1], rollout.last_value)


class Ones(nn.Module):
    """A critic that returns the observation, and a policy that does not care."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, observations: Tensor) -> tuple[Categorical, Tensor]:
        shape = observations.shape[:-1]
        return Categorical(self.logits.expand(*shape, 2)), observations.squeeze(-1)


@pytest.mark.parametrize(("horizon", "end"), [(3, 99), (3, 3)])
def test_truncated_episodes_are_bootstrapped_and_terminated_ones_are_not(
    horizon: int, end: int
) -> None:
    config = PPOConfig(**{**SMALL, "steps": 10})
    learner = PPO(config, env=Counter(horizon, end), policy=Ones())
    found = learner.collect().gae(gamma=0.5, lam=1.0)
    # The rewards of an episode are 1, 2, 3; the value of its last observation is 3.
    bootstrap = 3.0 if end == 99 else 0.0
    returns = [1 + 0.5 * 2 + 0.25 * 3 + bootstrap / 8, 2 + 0.5 * 3 + bootstrap / 4]
    assert found.returns[:2, 0].tolist() == pytest.approx(returns)
    assert found.returns[3:5, 0].tolist() == pytest.approx(returns)
    assert learner.counters["recent"][0] == [6.0, 3.0]


def test_steps_that_only_reset_are_masked() -> None:
    pytest.importorskip("gymnasium")
    learner = PPO(PPOConfig(**{**SMALL, "env": "CartPole-v1", "steps": 60, "minibatch": 60}))
    rollout = learner.collect()
    assert rollout.mask is not None
    assert rollout.terminated is not None
    ended = rollout.terminated[:-1].nonzero().tolist()
    assert ended
    assert (~rollout.mask[1:]).nonzero().tolist() == ended
    # The reward of such a step is 0, that of every other one 1.
    assert torch.equal(rollout.rewards, rollout.mask.float())


def test_learning_raises_the_return() -> None:
    config = PPOConfig(env="bandit", total_steps=6000, steps=25, minibatch=100, lr=1e-2)
    tasks = {"mean": torch.tensor([0.1, 0.2, 0.9, 0.3, 0.1]).expand(8, 5)}
    learner = PPO(config, env=envs.Batch(envs.Bandit(), tasks))
    history = learner.train()
    assert history["return"][0] < 0.6
    assert history["return"][-1] > 0.8
    assert history["entropy"][-1] < history["entropy"][0]


@pytest.mark.slow
def test_ppo_solves_cartpole() -> None:
    pytest.importorskip("gymnasium")
    torch.set_num_threads(1)
    for seed in range(3):
        learner = PPO(PPOConfig(seed=seed))
        learner.train()
        assert learner.evaluate(20).mean() >= 475


# -- what does not fit -----------------------------------------------------------------------------


class Constant(nn.Module):
    """Returns what it is given, whatever it sees."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.output = output

    def forward(self, observations: Tensor) -> Any:
        return self.output


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (ActorCritic(4, envs.Discrete(3)), "over 3 actions.*does not fit the action space"),
        (ActorCritic(4, envs.Box(2)), "Gaussian over 2 actions"),
        (ActorCritic(5, envs.Discrete(2)), "cannot be called with observations of shape"),
        (Constant(torch.zeros(2, 2)), r"a policy returns \(distribution, values\)"),
    ],
)
def test_a_policy_that_does_not_fit_is_named(policy: nn.Module, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        PPO(PPOConfig(env="cartpole"), policy=policy)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps=0"),
        ({"gamma": 1.5}, "gamma=1.5 must be between"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"minibatch": 10_000}, "more than the num_envs"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        PPOConfig(**settings)


class Broken(envs.CartPole):
    """Pays NaN."""

    def step(
        self, state: Tensor, action: Tensor, tasks: Any, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        state, reward, ended = super().step(state, action, tasks, generator)
        return state, reward * math.nan, ended


def test_rewards_that_are_no_numbers_are_named() -> None:
    learner = PPO(PPOConfig(**SMALL), env=Broken())
    before = [p.clone() for p in learner.policy.parameters()]
    with pytest.raises(InvalidInputError, match="rewards is nan at step 0 of environment 0"):
        learner.train()
    assert all(map(torch.equal, before, learner.policy.parameters()))


# -- the same as an inner loop ---------------------------------------------------------------------


class Tanh(nn.Module):
    """A small smooth policy and critic, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 3, dtype=torch.float64)
        self.head = nn.Linear(3, 4, dtype=torch.float64)

    def forward(self, observations: Tensor) -> tuple[Categorical, Tensor]:
        output = self.head(torch.tanh(self.body(observations)))
        return Categorical(output[..., :3]), output[..., 3]


def rollout_of(policy: nn.Module, steps: int = 8, copies: int = 2) -> Rollout:
    observations = torch.randn(steps, copies, 2, dtype=torch.float64)
    actions = torch.randint(3, (steps, copies))
    with torch.no_grad():
        distribution, values = policy(observations)
    return Rollout(
        observations=observations,
        actions=actions,
        rewards=torch.randn(steps, copies, dtype=torch.float64),
        log_probs=distribution.log_prob(actions),
        values=values,
        last_value=values[-1],
        terminated=torch.rand(steps, copies) < 0.2,
    )


def outer_of(policy: nn.Module, params: Any, test: Rollout) -> Tensor:
    call, _, _ = innerloop.functional(policy)
    distribution, values = call(params, test.observations)
    return (distribution.log_prob(test.actions) * test.rewards).mean() + values.square().mean()


@pytest.mark.parametrize(
    "strategy",
    [innerloop.StoreAll(), innerloop.Checkpointed(), None],
    ids=["StoreAll", "Checkpointed", "track"],
)
def test_the_meta_gradient_through_a_whole_inner_loop_equals_differences(strategy: Any) -> None:
    """2 epochs x 4 minibatches of clipped steps with Adam, actor and critic; every ratio stays
    1e-3 away from the edge of the clip range."""
    policy = Tanh()
    rollout, test = rollout_of(policy), rollout_of(policy)
    batches = rollout.minibatches(2, 4)
    numbers = {"gamma": 0.9, "lam": 0.8, "lr": 0.05, "clip": 0.2, "entropy_coef": 0.1}
    problem = ppo_problem(policy, innerloop.optim.adam(eps=1e-5), optimizer_hyper=("lr",))
    ratios: list[Tensor] = []

    def unrolled(params: Any, hyper: Any) -> Tensor:
        found = rollout.gae(gamma=hyper["gamma"], lam=hyper["lam"])
        given = {**hyper, "advantages": found.advantages, "returns": found.returns}
        traj = innerloop.unroll(problem, params, batches, hyper=given, strategy=strategy)
        return outer_of(policy, traj.params, test)

    def tracked(params: Any, hyper: Any) -> Tensor:
        found = rollout.gae(gamma=hyper["gamma"], lam=hyper["lam"])
        adam = innerloop.optim.adam(eps=1e-5)
        lr = {"lr": hyper["lr"]}
        with innerloop.track(policy, adam, params=params, hyper=lr, learn="outer") as loop:
            for batch in batches:
                distribution, values = loop.model(batch.observations)
                log_probs = distribution.log_prob(batch.actions)
                ratios.append((log_probs - batch.log_probs).detach().exp())
                loss = innerloop.rl.ppo_loss(
                    log_probs,
                    batch.log_probs,
                    batch.pick(found.advantages),
                    values=values,
                    returns=batch.pick(found.returns),
                    entropy=distribution.entropy(),
                    clip=hyper["clip"],
                    entropy_coef=hyper["entropy_coef"],
                )
                loop.step(loss.loss)
            distribution, values = loop.model(test.observations)
            outer = (distribution.log_prob(test.actions) * test.rewards).mean()
            return outer + values.square().mean()

    run = tracked if strategy is None else unrolled
    params = {n: p.detach().clone().requires_grad_() for n, p in policy.named_parameters()}
    hyper = {
        n: torch.tensor(x, dtype=torch.float64, requires_grad=True) for n, x in numbers.items()
    }
    value = run(params, hyper)
    # The clip range decides which samples count, but no parameter depends on it smoothly.
    learned = [*params.values(), *hyper.values()]
    grads = torch.autograd.grad(value, learned, materialize_grads=True)
    # Along a random direction of the initialisation, and along each hyper-parameter. The rounding
    # of float64 over the step, 1e-16 / 1e-5, is well below the tolerance.
    size = 1e-5
    direction = {n: torch.randn_like(p) for n, p in params.items()}
    slopes = [sum((g * d).sum() for g, d in zip(grads, direction.values(), strict=False))]
    moves: list[tuple[Any, Any]] = [(direction, {})]
    for name, grad in zip(hyper, grads[len(params) :], strict=True):
        slopes.append(grad)
        moves.append(({}, {name: 1.0}))
    for slope, (move, change) in zip(slopes, moves, strict=True):
        ends = []
        for sign in (size, -size):
            at = {n: (p + sign * move.get(n, 0.0)).detach() for n, p in params.items()}
            given = {n: (x + sign * change.get(n, 0.0)).detach() for n, x in hyper.items()}
            ends.append(run(at, given).item())
        difference = (ends[0] - ends[1]) / (2 * size)
        assert float(slope) == pytest.approx(difference, rel=1e-6, abs=1e-9), change or "params"
    tracked(params, hyper)
    edges = torch.cat([(r - edge).abs() for r in ratios for edge in (0.8, 1.2)])
    assert edges.min() > 1e-3
    outside = torch.cat([(r - 1).abs() for r in ratios]) > 0.2
    assert outside.any()


def test_the_inner_loop_is_mapped_over_tasks() -> None:
    policy = Tanh()
    params = dict(policy.named_parameters())
    rollouts, tests = ([rollout_of(policy) for _ in range(8)] for _ in range(2))
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    problem = ppo_problem(policy, innerloop.optim.adam(lr=0.02, eps=1e-5))
    gamma = torch.tensor(0.9, dtype=torch.float64)

    def one(params: Any, gamma: Tensor, rollout: Any, test: Any) -> Tensor:
        found = rollout.gae(gamma=gamma, lam=0.8)
        given = {"advantages": found.advantages, "returns": found.returns}
        batches = rollout.minibatches(2, 4, order=order)
        traj = innerloop.unroll(problem, params, batches, hyper=given)
        return outer_of(policy, traj.params, test)

    def stacked(rows: list[Rollout]) -> Rollout:
        columns = zip(*rows, strict=True)
        found: list[Any] = [None if c[0] is None else torch.stack(c) for c in columns]
        return Rollout(*found)

    both = torch.func.grad(one, argnums=(0, 1))
    many = stacked(rollouts)
    zeros: list[Any] = [None if x is None else 0 for x in many]
    dims = Rollout(*zeros)
    mapped = torch.func.vmap(both, in_dims=(None, None, dims, dims))(
        params, gamma, many, stacked(tests)
    )
    for i in range(8):
        single = both(params, gamma, rollouts[i], tests[i])
        for name in params:
            assert torch.allclose(mapped[0][name][i], single[0][name], rtol=1e-9, atol=1e-12)
        assert torch.allclose(mapped[1][i], single[1], rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("types_unchecked")
def test_advantages_come_by_way_of_hyper() -> None:
    policy = Tanh()
    batches = rollout_of(policy).minibatches(1, 8)
    for hyper in (None, {"gamma": torch.tensor(0.9)}):
        with pytest.raises(InvalidInputError, match="takes its advantages from hyper"):
            innerloop.unroll(
                ppo_problem(policy), dict(policy.named_parameters()), batches, hyper=hyper
            )
