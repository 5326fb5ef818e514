"""Meta-learners: the outer gradient against enumeration and differences, exact resuming, and that
adapting pays after meta-training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import InvalidInputError
from innerloop.errors import BiasedSurrogateWarning
from innerloop.rl import ActorCritic, Categorical, discounted_returns, envs, gae
from innerloop.rl._policy import stacked
from innerloop.rl.meta import ALGORITHMS, Episodes, MetaConfig, MetaLearner
from tests import rl_beds

SMALL: dict[str, Any] = {
    "env": "mdp",
    "iterations": 4,
    "tasks": 3,
    "episodes": 4,
    "hidden": (4,),
    "outer_epochs": 2,
    "inner_lr": 0.3,
}


def small(**settings: Any) -> MetaConfig:
    return MetaConfig(**{**SMALL, **settings})


def weights(learner: MetaLearner) -> list[Tensor]:
    return [*learner.params.values(), *learner.rates.values()]


# -- the outer gradient ----------------------------------------------------------------------------


class Logits(nn.Module):
    """The policy of a bandit: one logit for each arm."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, observations: Tensor) -> tuple[Categorical, None]:
        return Categorical(self.logits.expand(*observations.shape[:-1], len(self.logits))), None


REWARDS = torch.tensor([1.0, 0.3, -0.5], dtype=torch.float64)
START = [0.2, -0.1, 0.4]


def pulls(actions: Tensor, logits: Tensor) -> Episodes:
    """Return the data of one task with these pulls; the advantages are the rewards."""
    log_probs = logits.detach().log_softmax(-1)[actions]
    rewards = REWARDS[actions]
    fields = (torch.ones(*actions.shape, 1).double(), actions, log_probs, rewards, rewards)
    return Episodes(*(x[None, None] for x in (*fields, torch.ones_like(actions).bool())))


def expected_outer_gradient(algorithm: str) -> Tensor:
    """Enumerate 4 pulls before and 1 after adaptation (bed A), and average the outer gradients that
    the learner computes."""
    config = MetaConfig(
        env="bandit", algorithm=algorithm, inner_lr=1.0, outer_epochs=1, gamma=1.0, hidden=()
    )
    learner = MetaLearner(config, env=envs.Bandit(arms=3), policy=Logits(START))
    logits = learner.params["logits"]
    chances = logits.detach().softmax(-1)
    total = torch.zeros(3, dtype=torch.float64)
    for before in torch.cartesian_prod(*[torch.arange(3)] * 4):
        inner = pulls(before, logits)
        adapted = learner.adapt(inner)["logits"][0]
        for arm in range(3):
            # Pulls of all arms, weighted by their chances: the outer loss is a mean over pulls.
            outer = pulls(torch.tensor([arm]), adapted)
            learner.optimizer.step = lambda *_: None  # type: ignore[method-assign, assignment]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.ones(()))
                learner._update([[inner]], [inner, outer])
            weight = chances[before].prod() * adapted.softmax(-1)[arm]
            assert logits.grad is not None
            total -= weight * logits.grad
    return total


BED_A_I = torch.tensor([0.308748, -0.053655, -0.255093], dtype=torch.float64)
BED_A_II = torch.tensor([0.304909, -0.051260, -0.253648], dtype=torch.float64)


@pytest.mark.slow
def test_promp_and_maml_estimate_the_expected_objective() -> None:
    """Right up to the bias of four pulls, 1 % (bed A of the acceptance figures)."""
    for algorithm in ("maml", "promp"):
        found = expected_outer_gradient(algorithm)
        assert (found - BED_A_I).norm() / BED_A_I.norm() < 0.0105


def test_first_order_maml_has_the_known_bias() -> None:
    found = expected_outer_gradient("fomaml")
    assert (found - BED_A_I).norm() / BED_A_I.norm() == pytest.approx(0.127, abs=0.001)


def test_e_maml_estimates_the_sampled_objective() -> None:
    """Exactly (bed A): how the data of the inner step were drawn counts, once."""
    found = expected_outer_gradient("e-maml")
    torch.testing.assert_close(found, BED_A_II, rtol=0, atol=5e-7)


def test_the_baseline_of_e_maml_leaves_the_task_out() -> None:
    """Two tasks at once, one pull before and one after adaptation of each: all 81 outcomes.

    The mean gradient is that of the sampled objective, exactly. A mean over both tasks as the
    baseline would halve the score term.
    """
    config = MetaConfig(
        env="bandit", algorithm="e-maml", inner_lr=1.0, outer_epochs=1, gamma=1.0, hidden=()
    )
    learner = MetaLearner(config, env=envs.Bandit(arms=3), policy=Logits(START))
    learner.optimizer.step = lambda *_: None  # type: ignore[method-assign, assignment]
    logits = learner.params["logits"]
    chances = logits.detach().softmax(-1)
    arms = [torch.tensor([arm]) for arm in range(3)]
    adapted = [learner.adapt(pulls(arm, logits))["logits"][0] for arm in arms]
    total = torch.zeros(3, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.ones(()))
        for a, b, c, d in itertools.product(range(3), repeat=4):
            before = both(pulls(arms[a], logits), pulls(arms[b], logits))
            after = both(pulls(arms[c], adapted[a]), pulls(arms[d], adapted[b]))
            learner._update([[before]], [before, after])
            weight = chances[a] * chances[b] * adapted[a].softmax(-1)[c]
            assert logits.grad is not None
            total -= weight * adapted[b].softmax(-1)[d] * logits.grad
    theta = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    truth = torch.autograd.grad(rl_beds.sampled_objective(theta, 1), theta)[0]
    torch.testing.assert_close(total, truth, rtol=0, atol=1e-12)


def both(*tasks: Episodes) -> Episodes:
    return Episodes(*map(torch.cat, zip(*tasks, strict=True)))


@pytest.mark.parametrize("algorithm", ["maml", "promp", "meta-sgd", "anil", "e-maml"])
@pytest.mark.parametrize("inner", ["pg", "ppo"])
def test_the_outer_gradient_equals_finite_differences(algorithm: str, inner: str) -> None:
    """At the rollouts of one iteration, which are held constant. The surrogates whose value differs
    from what their gradient stands for have their own test by enumeration."""
    if inner == "ppo" and algorithm in ("e-maml", "maml"):
        pytest.skip("a score term refuses PPO, and maml differs from promp by the surrogate only")
    if inner == "pg" and algorithm != "promp":
        pytest.skip("loaded DiCE and reinforce are no functions whose differences mean anything")
    learner = MetaLearner(small(algorithm=algorithm, inner=inner, outer_epochs=1))
    assert_outer_gradient_is_right(learner)


PPO_INNER = {"inner": "ppo", "inner_adam": True, "inner_lr": 0.01, "inner_minibatches": 2}


@pytest.mark.parametrize(
    ("weights", "settings"),
    [((), {}), ((2.0, 1.0), {}), ((1.0, 0.0), {}), ((2.0, 1.0), PPO_INNER)],
)
def test_the_outer_gradient_of_two_adaptation_steps(
    weights: tuple[float, ...], settings: dict[str, Any]
) -> None:
    config = small(**settings, adaptation_steps=2, outer_weights=weights, outer_epochs=1)
    assert_outer_gradient_is_right(MetaLearner(config))


def assert_outer_gradient_is_right(learner: MetaLearner) -> None:
    """Compare the outer gradient with differences in float64."""
    tasks = learner.env.sample_tasks(3, learner.generator)
    data, _ = learner._acted(tasks, learner.config.adaptation_steps)
    for p in weights(learner):
        p.data = p.data.double()
    data = [Episodes(*(x.double() if x.is_floating_point() else x for x in d)) for d in data]
    batches = [learner._batches(d) for d in data[:-1]]
    grads: dict[int, Tensor] = {}

    def keep(*_: Any) -> None:
        grads.update(
            {i: p.grad.clone() for i, p in enumerate(weights(learner)) if p.grad is not None}
        )

    learner.optimizer.step = keep  # type: ignore[method-assign, assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.ones(()))
        learner._update(batches, data)
        found = dict(grads)
        for i, p in enumerate(weights(learner)):
            if i not in found:
                continue
            direction, size = torch.randn_like(p), 1e-6
            ends = []
            for sign in (size, -size):
                p.data += sign * direction
                ends.append(learner._update(batches, data))
                p.data -= sign * direction
            difference = (ends[0] - ends[1]) / (2 * size)
            slope = (found[i] * direction).sum().item()
            assert slope == pytest.approx(difference, rel=1e-4, abs=1e-8), i


def test_e_maml_accounts_for_the_sampling_of_every_rollout() -> None:
    """One pull before each of two adaptation steps and one after: all 27 outcomes, exactly.

    What the policy reaches counts after the first step (once) and after the second (three times).
    """
    config = MetaConfig(
        env="bandit",
        algorithm="e-maml",
        adaptation_steps=2,
        outer_weights=(1.0, 3.0),
        inner_lr=1.0,
        outer_epochs=1,
        gamma=1.0,
        hidden=(),
    )
    learner = MetaLearner(config, env=envs.Bandit(arms=3), policy=Logits(START))
    learner.optimizer.step = lambda *_: None  # type: ignore[method-assign, assignment]
    logits = learner.params["logits"]
    arms = [torch.tensor([arm]) for arm in range(3)]
    total = torch.zeros(3, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.ones(()))
        for a, b, c in itertools.product(range(3), repeat=3):
            first = pulls(arms[a], logits)
            once = learner.adapt(first)["logits"]
            second = pulls(arms[b], once[0])
            twice = learner.adapt(second, {"logits": once}, step=1)["logits"]
            third = pulls(arms[c], twice[0])
            learner._update([[first], [second]], [first, second, third])
            weight = logits.softmax(-1)[a] * once[0].softmax(-1)[b] * twice[0].softmax(-1)[c]
            assert logits.grad is not None
            total -= weight.detach() * logits.grad

    def adapted(theta: Tensor, arm: int, rate: float) -> Tensor:
        score = torch.func.grad(lambda logits: logits.log_softmax(-1)[arm])
        return theta + rate * REWARDS[arm] * score(theta)

    theta = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    objective = torch.zeros((), dtype=torch.float64)
    for a in range(3):
        once = adapted(theta, a, 1.0)
        reached = once.softmax(-1) @ REWARDS / 4
        for b in range(3):
            twice = adapted(once, b, config.later_lr)
            reached = reached + once.softmax(-1)[b] * (twice.softmax(-1) @ REWARDS) * 3 / 4
        objective = objective + theta.softmax(-1)[a] * reached
    truth = torch.autograd.grad(objective, theta)[0]
    torch.testing.assert_close(total, truth, rtol=0, atol=1e-12)


def test_reptile_moves_towards_the_mean_of_the_adapted_parameters() -> None:
    learner = MetaLearner(small(algorithm="reptile", outer_lr=0.25))
    before = {name: p.detach().clone() for name, p in learner.params.items()}
    adapted = {name: torch.randn(3, *p.shape) for name, p in before.items()}
    learner._step_towards(adapted)
    for name, p in learner.params.items():
        assert torch.allclose(p, before[name] + 0.25 * (adapted[name].mean(0) - before[name]))


def test_anil_adapts_the_head_alone_and_learns_everything() -> None:
    learner = MetaLearner(small(algorithm="anil"))
    tasks = learner.env.sample_tasks(3, learner.generator)
    _, adapted = learner._acted(tasks, 1)
    changed = {n for n, p in adapted.items() if not torch.equal(p[0], learner.params[n])}
    assert changed == {"actor.2.weight", "actor.2.bias"}
    before = [p.detach().clone() for p in weights(learner)]
    learner.iterate()
    assert not any(map(torch.equal, before, weights(learner)))


@pytest.mark.parametrize("algorithm", ["promp", "reptile"])
def test_the_outer_rate_falls_linearly_if_it_is_to(algorithm: str) -> None:
    learner = MetaLearner(small(algorithm=algorithm, anneal=True, outer_lr=0.1))
    rates: list[float] = []
    learner.train(callback=lambda row: rates.append(learner.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])
    # One iteration more than planned moves nothing.
    before = [p.detach().clone() for p in weights(learner)]
    learner.iterate()
    assert all(map(torch.equal, before, weights(learner)))
    constant = MetaLearner(small(algorithm=algorithm, outer_lr=0.1))
    constant.train()
    assert constant.optimizer.param_groups[0]["lr"] == 0.1


def test_later_adaptation_steps_are_smaller() -> None:
    learner = MetaLearner(small(later_lr=0.5, adaptation_steps=2))
    tasks = learner.env.sample_tasks(3, learner.generator)
    params = {n: p.detach().expand(3, *p.shape) for n, p in learner.params.items()}
    data = learner.collect(params, tasks)
    first, second = (learner.adapt(data, step=k) for k in (0, 1))
    for name, p in learner.params.items():
        assert torch.allclose(first[name] - p, 2 * (second[name] - p), atol=1e-6)
    # And inside of a loop that the outer gradient goes through.
    rates = [learner._rates_at({"step": torch.tensor(k)}, 0)["lr"] for k in (0, 1)]
    assert all(rates[0][name] == 2 * rates[1][name] for name in learner.params)


# -- rollouts --------------------------------------------------------------------------------------


def test_episodes_end_where_they_should_and_every_task_has_its_own_policy() -> None:
    learner = MetaLearner(MetaConfig(episodes=5), env=envs.Navigation(horizon=12))
    goals = {"goal": torch.tensor([[0.2, 0.0], [0.0, 0.3]])}
    params = {n: p.detach().expand(2, *p.shape).clone() for n, p in learner.params.items()}
    # Straight to the goal of each task, at full speed.
    params["actor.4.bias"] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    params["actor.4.weight"] *= 0
    params["log_std"] = torch.full((2, 2), -9.0)
    data = learner.collect(params, goals)
    assert data.mask.shape == (2, 3, 5)
    assert data.mask.sum(1).tolist() == [[2] * 5, [3] * 5]
    assert data.returns().tolist() == pytest.approx([-0.1, -0.3], abs=0.01)
    distribution = learner._call({n: p[1] for n, p in params.items()}, data.observations[1])[0]
    assert torch.allclose(distribution.log_prob(data.actions[1]), data.log_probs[1], atol=1e-4)


@pytest.mark.parametrize("actions", [envs.Discrete(3), envs.Box(2)], ids=["discrete", "box"])
@pytest.mark.parametrize("hidden", [(), (5, 7)])
def test_several_policies_at_once_equal_each_on_its_own(
    actions: envs.Discrete | envs.Box, hidden: tuple[int, ...]
) -> None:
    policy = ActorCritic(4, actions, hidden=hidden, critic=False).double()
    draw = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(6, *p.shape, dtype=p.dtype, generator=draw)
        for name, p in policy.named_parameters()
    }
    seen = torch.randn(6, 9, 4, dtype=torch.float64, generator=draw)
    found = stacked(policy, params)(seen)
    call, _, _ = innerloop.functional(policy)
    for i in range(6):
        expected = call({name: p[i] for name, p in params.items()}, seen[i])[0]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[i], theirs.expand_as(ours[i]))


@pytest.mark.parametrize("env", ["navigation", "mdp"])
def test_a_policy_of_another_class_acts_as_an_actor_critic_does(env: str) -> None:
    class Other(ActorCritic):
        pass

    config = MetaConfig(env=env, episodes=3, hidden=(5,))
    ours = MetaLearner(config)
    size, actions = ours.env.observation_space.size, ours.env.action_space
    theirs = MetaLearner(config, policy=Other(size, actions, hidden=(5,), critic=False))
    theirs.policy.load_state_dict(ours.policy.state_dict())
    tasks = ours.env.sample_tasks(4, torch.Generator().manual_seed(1))
    found, expected = (
        learner.collect(
            {name: p.detach().expand(4, *p.shape) for name, p in learner.params.items()},
            tasks,
            generator=torch.Generator().manual_seed(2),
        )
        for learner in (ours, theirs)
    )
    for name, x in found._asdict().items():
        torch.testing.assert_close(x, getattr(expected, name), atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("lam", [1.0, 0.9])
def test_advantages_are_those_of_gae_over_the_fitted_baseline(lam: float) -> None:
    """Against a baseline by lstsq, and each episode cut where it ends."""
    learner = MetaLearner(MetaConfig(episodes=5, gamma=0.9, lam=lam))
    draw = torch.Generator().manual_seed(0)
    seen = torch.randn(7, 1, 5, 2, generator=draw)
    lengths = [7, 3, 5, 1, 6]
    mask = torch.arange(7).view(7, 1, 1) < torch.tensor(lengths)
    reward = torch.randn(7, 1, 5, generator=draw) * mask
    features, targets = [], []
    for i, n in enumerate(lengths):
        clock = (torch.arange(n) / 100).unsqueeze(-1)
        x = seen[:n, 0, i]
        features.append(torch.cat([x, x**2, clock, clock**2, clock**3, 1 + 0 * clock], -1))
        targets.append(discounted_returns(reward[:n, 0, i], gamma=0.9))
    x, y = torch.cat(features).double(), torch.cat(targets).double()
    # Ridge of 1e-5 for each row of the padded data.
    rows = (1e-5 * 35) ** 0.5 * torch.eye(x.shape[1], dtype=torch.float64)
    fit = torch.linalg.lstsq(torch.cat([x, rows]), torch.cat([y, torch.zeros(len(rows))])).solution
    each = []
    for i, n in enumerate(lengths):
        values = (features[i].double() @ fit).float()
        rewards = reward[:n, 0, i]
        each.append(gae(rewards, values, torch.zeros(()), gamma=0.9, lam=lam).advantages)
    together = torch.cat(each)
    scale = together.std(correction=0)
    found = learner._advantages(seen, reward, mask)
    for i, n in enumerate(lengths):
        expected = (each[i] - together.mean()) / scale
        torch.testing.assert_close(found[:n, 0, i], expected, atol=1e-4, rtol=1e-4)
        assert not found[n:, 0, i].any()


def test_advantages_are_normalised_for_each_task_and_ignore_what_follows_the_end() -> None:
    learner = MetaLearner(MetaConfig(episodes=5))
    seen, reward = torch.randn(7, 2, 5, 2), torch.randn(7, 2, 5)
    mask = torch.ones(7, 2, 5, dtype=torch.bool)
    mask[4:, 0, 1] = False
    found = learner._advantages(seen, reward * mask, mask)
    assert torch.equal(found[~mask], torch.zeros(3))
    for task in range(2):
        own = found[:, task][mask[:, task]]
        assert abs(own.mean()) < 1e-5
        assert abs(own.std(correction=0) - 1) < 1e-5


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_resumed_run_equals_one_in_a_piece(algorithm: str, tmp_path: Path) -> None:
    settings = small(algorithm=algorithm)
    whole = MetaLearner(settings)
    whole.train()
    first = MetaLearner(small(algorithm=algorithm, iterations=2))
    first.train(tmp_path)
    second = MetaLearner(settings)
    second.evaluate(2)
    second.train(tmp_path, resume=True)
    assert all(map(torch.equal, weights(whole), weights(second)))
    assert whole.history["return_1"] == second.history["return_1"]
    assert second.history["iteration"] == [1, 2, 3, 4]


@pytest.mark.parametrize("adam", [False, True])
def test_a_ppo_inner_loop_of_two_rollouts_runs_and_resumes(adam: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"inner": "ppo", "adaptation_steps": 2, "inner_adam": adam}
    settings["inner_lr"] = 0.01
    whole = MetaLearner(small(**settings, iterations=2))
    whole.train()
    MetaLearner(small(**settings, iterations=1)).train(tmp_path)
    second = MetaLearner(small(**settings, iterations=2))
    second.train(tmp_path, resume=True)
    assert all(map(torch.equal, weights(whole), weights(second)))


def test_evaluation_changes_nothing() -> None:
    for inner in ("pg", "ppo"):
        learner = MetaLearner(small(inner=inner))
        before = [p.clone() for p in weights(learner)], learner.generator.get_state()
        found = learner.evaluate(5, steps=2, episodes=3)
        assert found.shape == (3, 5)
        assert torch.equal(found, learner.evaluate(5, steps=2, episodes=3))
        assert all(map(torch.equal, before[0], weights(learner)))
        assert torch.equal(before[1], learner.generator.get_state())


def test_meta_learning_makes_one_step_of_adaptation_pay() -> None:
    """Bandits of three arms: after meta-training one step finds the best arm more often."""
    settings: dict[str, Any] = {
        "env": "bandit",
        "gamma": 1.0,
        "episodes": 30,
        "tasks": 30,
        "hidden": (),
    }
    config = MetaConfig(**settings, algorithm="meta-sgd", inner_lr=0.5, outer_lr=0.1, iterations=40)
    learner = MetaLearner(config)
    untrained = learner.evaluate(200, steps=1, episodes=100)
    learner.train()
    trained = learner.evaluate(200, steps=1, episodes=100)
    gain = trained[1] - untrained[1]
    assert gain.mean() > 0.05
    assert gain.mean() > 4 * gain.std() / 200**0.5


def test_the_command_line_meta_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from innerloop import cli

    options = (
        "rl meta --env mdp --iterations 1 --tasks 2 --episodes 2 --hidden 4 "
        "--adaptation-steps 2 --outer-weights 2 .5"
    )
    assert cli.main([*options.split(), "--out", str(tmp_path)]) == cli.OK
    assert "on 40 held-out tasks after 0 to 3 adaptation steps" in capsys.readouterr().out
    assert (tmp_path / "curve.png").stat().st_size > 1000


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"algorithm": "mamel"}, "choose one of maml"),
        ({"inner": "sac"}, "write 'pg' or 'ppo'"),
        ({"tasks": 0}, "tasks=0"),
        ({"inner_lr": -1.0}, "inner_lr=-1.0 must be positive"),
        ({"algorithm": "e-maml", "inner": "ppo"}, "score term of e-maml"),
        ({"outer_weights": (1.0, 2.0)}, "has 2 numbers for 1 adaptation_steps"),
        ({"adaptation_steps": 2, "outer_weights": (0.0, 0.0)}, "at least one that is positive"),
        ({"outer_weights": (-1.0,)}, "not negative"),
        ({"adaptation_steps": 2, "outer_weights": (1e308, 1e308)}, "sum"),
        ({"outer_weights": 1.0}, "write one number for each"),
        ({"outer_weights": ("a",)}, "write one number for each"),
        ({"outer_weights": (float("nan"),)}, "not negative"),
        ({"algorithm": "reptile", "outer_weights": (1.0,)}, "has no outer loss"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        MetaConfig(**settings)


def test_an_algorithm_that_is_biased_for_the_objective_warns() -> None:
    with pytest.warns(BiasedSurrogateWarning):
        MetaLearner(small(algorithm="promp", objective="expected"))
    MetaLearner(small(algorithm="maml", objective="expected"))
    MetaLearner(small(algorithm="e-maml", objective="sampled"))
    with pytest.warns(BiasedSurrogateWarning):
        MetaLearner(small(algorithm="maml", objective="sampled"))


def test_another_diverged_update_changes_nothing() -> None:
    learner = MetaLearner(small())
    tasks = learner.env.sample_tasks(3, learner.generator)
    data, _ = learner._acted(tasks, 1)
    broken = data[1]._replace(advantages=data[1].advantages * float("nan"))
    before = [p.clone() for p in weights(learner)]
    with pytest.raises(innerloop.InnerLoopError):
        learner._update([[data[0]]], [data[0], broken])
    assert all(map(torch.equal, before, weights(learner)))
