"""Meta-gradient reinforcement learning: the derivative of what an update earns by the
hyper-parameters of the update, its critic, and exact resuming.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from innerloop import InvalidInputError
from innerloop.errors import NonFiniteError
from innerloop.rl import Categorical
from innerloop.rl.meta import MetaGradient, MetaGradientConfig
from tests.test_rl_ppo import rollout_of

SMALL: dict[str, Any] = {
    "env": "cartpole",
    "total_steps": 200,
    "num_envs": 2,
    "steps": 20,
    "minibatch": 20,
    "epochs": 2,
    "hidden": (8,),
    "gamma": 0.8,
}


def small(**settings: Any) -> MetaGradientConfig:
    return MetaGradientConfig(**{**SMALL, **settings})


# -- the outer gradient ----------------------------------------------------------------------------


class Tanh(nn.Module):
    """A small smooth policy and critic, in float64, for observations of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 3, dtype=torch.float64)
        self.head = nn.Linear(3, 4, dtype=torch.float64)

    def forward(self, observations: Tensor) -> tuple[Categorical, Tensor]:
        output = self.head(torch.tanh(self.body(observations.double())))
        return Categorical(output[..., :3]), output[..., 3]


class Frozen:
    """An update of a learner on fixed rollouts, as a function of the learned numbers."""

    def __init__(self) -> None:
        from innerloop.rl import envs

        class Three(envs.CartPole):
            """Only its spaces matter."""

            observation_space, action_space = envs.Box(2), envs.Discrete(3)

        self.policy = Tanh()
        # Clip range, gradient norm and annealing are all at work.
        config = small(minibatch=4, num_envs=2, steps=8, lr=0.02, max_grad_norm=0.3)
        self.learner = MetaGradient(config, env=Three(), policy=self.policy)
        self.learner.counters["steps"] = 50
        for x in self.learner.learned.values():
            x.data = x.data.double()
        self.inner, self.outer = rollout_of(self.policy), rollout_of(self.policy)
        self.start = {n: x.clone() for n, x in self.policy.state_dict().items()}
        self.generator = self.learner.generator.get_state()
        # The optimizer is warm: its averages belong to the start as well.
        for p in self.policy.parameters():
            p.grad = torch.randn_like(p) / 10
        self.learner.optimizer.step()
        self.policy.load_state_dict(self.start)
        self.warm = {
            p: {n: x.clone() for n, x in state.items()}
            for p, state in self.learner.optimizer.state.items()
        }

    def __call__(self) -> Tensor:
        self.policy.load_state_dict(self.start)
        for p, state in self.warm.items():
            self.learner.optimizer.state[p] = {n: x.clone() for n, x in state.items()}
        self.learner.generator.set_state(self.generator)
        params, _ = self.learner._updated(self.inner, self.learner.settings())
        return self.learner._objective(params, self.outer)


def test_the_gradient_of_every_hyper_parameter_equals_differences() -> None:
    """Through two epochs of four minibatches with Adam, gradient clipping and the critic."""
    run = Frozen()
    learned = run.learner.learned
    assert set(learned) == {"gamma", "lam", "entropy_coef", "lr"}
    grads = torch.autograd.grad(run(), list(learned.values()))
    size = 1e-5
    for (name, x), grad in zip(learned.items(), grads, strict=True):
        ends = []
        for sign in (size, -size):
            x.data += sign
            ends.append(run().item())
            x.data -= sign
        difference = (ends[0] - ends[1]) / (2 * size)
        assert abs(difference) > 1e-6, name
        assert grad.item() == pytest.approx(difference, rel=1e-5), name


def test_the_update_is_that_of_ppo() -> None:
    """The same steps as PPO's trainer takes, at the same hyper-parameters."""
    from innerloop.rl.ppo import PPO, PPOConfig

    settings = {**SMALL, "entropy_coef": 0.02, "anneal": False}
    plain, ours = PPO(PPOConfig(**settings)), MetaGradient(small(**settings, learn=("lam",)))
    with torch.no_grad():
        for a, b in zip(plain.policy.parameters(), ours.policy.parameters(), strict=True):
            b.copy_(a)
    rollout = plain.collect()
    for learner in (plain, ours):
        learner.generator.manual_seed(3)
    plain.update(rollout)
    ours._updated(rollout, ours.settings())
    for a, b in zip(plain.policy.parameters(), ours.policy.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_objective_knows_neither_the_critic_nor_the_discount_of_the_policy() -> None:
    """Other values in the rollout, another γ: the same advantages."""
    learner = MetaGradient(small())
    rollout, outer = learner._collect_both()
    params = dict(learner.policy.named_parameters())
    first = learner._objective(params, outer)
    assert rollout.values is not None
    assert outer.values is not None
    assert not torch.allclose(rollout.values, outer.values)
    with torch.no_grad():
        for name, p in learner.policy.named_parameters():
            if name.startswith("critic"):
                p.add_(1.0)
        learner.learned["gamma"].sub_(3.0)
    assert torch.equal(first, learner._objective(params, outer))
    values = learner.critic(outer.observations).squeeze(-1)
    assert torch.allclose(values, outer.values, atol=1e-6)


def test_the_outer_critic_learns_the_returns_under_the_fixed_discount() -> None:
    """A reward of 1 for ever is worth 1/(1 - γ')."""
    learner = MetaGradient(small(outer_gamma=0.5, outer_lam=0.0, critic_lr=0.02, epochs=30))
    _, outer = learner._collect_both()
    always: dict[str, Any] = {
        "rewards": torch.ones_like(outer.rewards),
        "terminated": None,
        "truncated": None,
    }
    seen = outer.observations
    assert isinstance(seen, Tensor)
    for _ in range(25):
        values = learner._values(torch.cat([seen, seen[-1:]])).detach()
        learner._fit(outer._replace(**always, values=values[:-1], last_value=values[-1]))
    assert torch.allclose(learner._values(outer.observations), torch.tensor(2.0), atol=0.1)


# -- learning --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_discount_that_is_too_small_grows() -> None:
    config = MetaGradientConfig(
        env="cartpole", total_steps=24_000, gamma=0.5, learn=("gamma",), epochs=4
    )
    history = MetaGradient(config).train()
    assert history["gamma"][0] == 0.5
    assert history["gamma"][-1] > 0.6
    assert set(history["lr"]) == {config.lr}


def test_a_resumed_run_equals_one_in_a_piece(tmp_path: Path) -> None:
    def stop(row: Mapping[str, float]) -> None:
        if row["iteration"] == 2:
            raise KeyboardInterrupt

    whole = MetaGradient(small())
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        MetaGradient(small()).train(tmp_path, callback=stop)
    second = MetaGradient(small())
    second.train(tmp_path, resume=True)
    assert same(whole, second)
    assert second.history["steps"] == [80, 120, 160, 200]


def same(a: MetaGradient, b: MetaGradient) -> bool:
    """Policy, critic, learned numbers and diagnostics are equal, to the last bit."""
    rows = [repr({k: v for k, v in x.history.items() if k != "seconds"}) for x in (a, b)]
    states = [tensors(x) for x in (a, b)]
    return all(map(torch.equal, *states)) and rows[0] == rows[1]


def tensors(learner: MetaGradient) -> list[Tensor]:
    modules = learner.policy, learner.critic
    return [*(p for m in modules for p in m.parameters()), *learner.learned.values()]


def test_the_command_line_learns_a_discount(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from innerloop import cli

    options = "rl meta-gradient --env cartpole --total-steps 120 --num-envs 2 --steps 20"
    more = "--minibatch 20 --hidden 8 --learn gamma lr --gamma 0.7"
    arguments = [*options.split(), *more.split(), "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == cli.OK
    assert "learned: gamma from 0.7 to 0." in capsys.readouterr().out
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learn": ()}, "learn is empty.*PPO, which learns none"),
        ({"learn": ("clip",)}, "'clip' cannot be learned: choose from gamma"),
        ({"gamma": 1.0}, "gamma=1.0 has no logit.*above 0 and below 1"),
        ({"entropy_coef": 0.0}, "entropy_coef=0.0 has no logarithm.*above 0, or leave it out"),
        ({"outer_gamma": 1.5}, "outer_gamma=1.5 must be between"),
        ({"meta_lr": 0.0}, "meta_lr=0.0 must be positive"),
        ({"target_kl": 0.1}, "write target_kl=None"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        small(**settings)


def test_an_outer_gradient_that_is_no_number_changes_nothing() -> None:
    learner = MetaGradient(small())
    before = {n: x.detach().clone() for n, x in learner.learned.items()}
    with pytest.raises(NonFiniteError, match=r"outer gradient of gamma, .* is not finite"):
        learner._learn(torch.stack(list(learner.learned.values())).sum() * float("nan"))
    assert all(torch.equal(x, before[n]) for n, x in learner.learned.items())
