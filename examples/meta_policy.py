"""Meta-learn how a policy learns from one rollout: tabular MDPs, in a minute.

    python examples/meta_policy.py                  # numbers and two pictures
    python examples/meta_policy.py --paths          # paths on the plane too, two minutes more

A task is a Markov decision process with random tables. The inner learner takes one policy-gradient
step on 20 episodes. An outer loop differentiates through it, and learns where the policy starts and
a step size for every single weight (Li et al., "Meta-SGD", 2017). It is compared with a random
start, at the best of several learning rates, chosen on the test tasks themselves, which favours the
comparison. The second picture shows how much the parameters before each of the eight steps of a PPO
update matter for the adapted policy. The paths are those of a policy on the plane to a goal that it
cannot see, before and after one step.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import matplotlib.figure
import torch
from torch import Tensor

import innerloop
from innerloop.rl import envs
from innerloop.rl.meta import Episodes, MetaConfig, MetaLearner

CONFIG = MetaConfig(
    env="mdp",
    algorithm="meta-sgd",
    iterations=300,
    tasks=20,
    episodes=20,
    inner_lr=300.0,
    outer_lr=0.05,
    outer_epochs=1,
    gamma=1.0,
    hidden=(),
)
RATES = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
PPO = dataclasses.replace(CONFIG, inner="ppo", inner_lr=20.0)


def interval(returns: Tensor) -> str:
    """Write a mean over tasks with its 95 % interval."""
    return f"{returns.mean():.2f} ± {1.96 * returns.std() / math.sqrt(len(returns)):.2f}"


def random_start(config: MetaConfig) -> Tensor:
    """Return the returns from a random start, ``[2, tasks]``, at the rate that is best on them."""
    found = [
        MetaLearner(dataclasses.replace(config, inner_lr=rate)).evaluate(200, steps=1)
        for rate in RATES
    ]
    return max(found, key=lambda returns: returns[1].mean().item())


def influence(learner: MetaLearner) -> list[float]:
    """Return how far the adapted policy turns with the parameters before each step of PPO.

    One number for each of the inner steps: the norm of d (log-probabilities of the adapted policy)
    along a random direction at the parameters before that step.
    """
    tasks = learner.env.sample_tasks(1, torch.Generator().manual_seed(5))
    start = {name: p.detach().expand(1, *p.shape) for name, p in learner.params.items()}
    data = learner.collect(start, tasks)
    batches = [Episodes(*(x[0] for x in batch)) for batch in learner._batches([data])]  # noqa: SLF001
    hyper = {"step": torch.zeros(()), **{f"rate.{n}": r for n, r in learner.rates.items()}}
    traj = innerloop.unroll(learner.problem, learner.params, batches, hyper=hyper)
    seen = torch.eye(learner.env.observation_space.size)
    call, _, _ = innerloop.functional(learner.policy)
    output = call(traj.params, seen)[0].logits.log_softmax(-1)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(6))
    found = []
    for t in range(len(batches) + 1):
        states = list(traj.at(t).params.values())
        grads = torch.autograd.grad((output * weights).sum(), states, retain_graph=True)
        found.append(math.sqrt(sum(g.square().sum().item() for g in grads)))
    return found


def draw_returns(trained: Tensor, random: Tensor, path: Path) -> None:
    """Draw returns before and after one step."""
    figure = matplotlib.figure.Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, returns) in enumerate({"random start": random, "meta-learned": trained}.items()):
        error = 1.96 * returns.std(1) / math.sqrt(returns.shape[1])
        places = [x + (i - 0.5) * 0.36 for x in (0, 1)]
        axes.bar(places, returns.mean(1), 0.34, yerr=error, capsize=4, label=name)
    axes.set_xticks([0, 1], ["before", "after one step"])
    axes.set_ylabel("return on held-out tasks")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)


def draw_influence(trained: list[float], path: Path) -> None:
    """Draw the influence of the parameters at each step on the adapted policy."""
    figure = matplotlib.figure.Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(trained, "o-", color="C0")
    half = len(trained) // 2
    axes.axvspan(0, half, color="0.93", lw=0)
    top = max(trained)
    axes.text(half / 2, top * 1.06, "epoch 1", ha="center")
    axes.text(half * 1.5, top * 1.06, "epoch 2", ha="center")
    axes.set_ylim(0, top * 1.2)
    axes.set_xlabel("PPO steps taken")
    axes.set_ylabel("influence on the adapted policy")
    figure.savefig(path, dpi=150)


def draw_paths(learner: MetaLearner, path: Path) -> None:
    """Draw paths on the plane before and after one adaptation step, for four goals."""
    goals = {"goal": torch.tensor([[0.4, 0.4], [-0.4, 0.3], [-0.3, -0.4], [0.4, -0.3]])}
    generator = torch.Generator().manual_seed(1)
    params = {name: p.detach().expand(4, *p.shape) for name, p in learner.params.items()}
    before = learner.collect(params, goals, 20, generator)
    after = learner.collect(learner.adapt(before), goals, 20, generator)
    figure = matplotlib.figure.Figure(figsize=(7.4, 3.7), layout="constrained")
    for k, (title, data) in enumerate({"before": before, "after one step": after}.items()):
        axes = figure.add_subplot(1, 2, 1 + k, aspect="equal")
        for i in range(4):
            for episode in range(4):
                alive = data.mask[i, :, episode]
                x, y = data.observations[i, alive, episode].T
                axes.plot(x, y, color=f"C{i}", lw=0.9, alpha=0.7)
            goal = goals["goal"][i]
            axes.plot(goal[0], goal[1], "*", color=f"C{i}", ms=13, mec="black", zorder=5)
        axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), title=title)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Meta-learn, compare, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=CONFIG.iterations)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--paths", action="store_true", help="train on the plane too (2 minutes)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(CONFIG, iterations=options.iterations)
    learner = MetaLearner(config)
    learner.train()
    trained, random = learner.evaluate(200, steps=1), random_start(config)
    for name, returns in {"random start": random, "meta-learned": trained}.items():
        print(f"{name}: {interval(returns[0])} before, {interval(returns[1])} after one step")
    draw_returns(trained, random, options.out / "rl-returns.png")
    draw_influence(influence(MetaLearner(PPO)), options.out / "rl-influence.png")
    if options.paths:
        walker = MetaLearner(MetaConfig(), env=envs.Navigation())
        walker.train()
        print(f"navigation: {walker.summary()}")
        draw_paths(walker, options.out / "rl-paths.png")


if __name__ == "__main__":
    main()
