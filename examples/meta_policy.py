"""Meta-learn a policy that one PPO update adapts to a new task: the plane, in a minute.

    python examples/meta_policy.py                  # numbers and three pictures

A task is a goal on the plane that the policy cannot see; the reward is the distance to it. The
inner learner takes one PPO update: ten episodes, two epochs of four minibatches, the clipped
surrogate. The outer loop differentiates through all eight steps, and learns where the policy
starts. It is compared with a random start, which may choose its learning rate and its clip range,
and chooses them on the test tasks themselves, in its favour.

The pictures: returns before and after the update, with 95 % intervals; paths before and after it;
and how much the parameters before each of the eight steps matter for the adapted policy.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path

import matplotlib.figure
import torch
from torch import Tensor

import innerloop
from innerloop.rl import envs
from innerloop.rl.meta import Episodes, MetaConfig, MetaLearner

CONFIG = MetaConfig(
    inner="ppo",
    iterations=100,
    inner_lr=0.3,
    inner_epochs=2,
    inner_minibatches=4,
    clip=1.0,
    outer_lr=0.002,
    outer_epochs=2,
    hidden=(32, 32),
)
RATES, CLIPS = (0.03, 0.1, 0.3, 1.0), (0.5, 1.0)


def learner_of(config: MetaConfig) -> MetaLearner:
    """Return a learner on the plane, with episodes of 30 steps."""
    return MetaLearner(config, env=envs.Navigation(horizon=30))


def interval(returns: Tensor) -> str:
    """Write a mean over tasks with its 95 % interval."""
    return f"{returns.mean():.2f} ± {1.96 * returns.std() / math.sqrt(len(returns)):.2f}"


def random_start(config: MetaConfig, tasks: int) -> tuple[Tensor, MetaConfig]:
    """Return the returns from a random start, ``[2, tasks]``, at the settings that are best."""
    found = []
    for clip in CLIPS:
        for rate in RATES:
            tried = dataclasses.replace(config, inner_lr=rate, clip=clip)
            found.append((learner_of(tried).evaluate(tasks, steps=1), tried))
    return max(found, key=lambda pair: pair[0][1].mean().item())


def influence(learner: MetaLearner) -> list[float]:
    """Return how far the adapted policy turns with the parameters before each step of PPO.

    One number for each of the inner steps: the norm of d (mean actions of the adapted policy) along
    a random direction, at the parameters before that step.
    """
    tasks = learner.env.sample_tasks(1, torch.Generator().manual_seed(5))
    start = {name: p.detach().expand(1, *p.shape) for name, p in learner.params.items()}
    data = learner.collect(start, tasks)
    batches = [Episodes(*(x[0] for x in batch)) for batch in learner._batches(data)]  # noqa: SLF001
    hyper = {"step": torch.zeros(()), **{f"rate.{n}": r for n, r in learner.rates.items()}}
    traj = innerloop.unroll(learner.problem, learner.params, batches, hyper=hyper)
    line = torch.linspace(-0.5, 0.5, 5)
    seen = torch.cartesian_prod(line, line)
    call, _, _ = innerloop.functional(learner.policy)
    output = call(traj.params, seen)[0].mean
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(6))
    found = []
    for t in range(len(batches) + 1):
        states = list(traj.at(t).params.values())
        grads = torch.autograd.grad(
            (output * weights).sum(), states, retain_graph=True, materialize_grads=True
        )
        found.append(math.sqrt(sum(g.square().sum().item() for g in grads)))
    return found


def draw_returns(trained: Tensor, random: Tensor, path: Path, dpi: int = 150) -> None:
    """Draw returns before and after one PPO update."""
    figure = matplotlib.figure.Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, returns) in enumerate({"random start": random, "meta-learned": trained}.items()):
        error = 1.96 * returns.std(1) / math.sqrt(returns.shape[1])
        places = [x + (i - 0.5) * 0.36 for x in (0, 1)]
        height = returns.mean(1).tolist()
        axes.bar(places, height, 0.34, yerr=error.tolist(), capsize=4, label=name)
    axes.set_xticks([0, 1], ["before", "after one PPO update"])
    axes.set_ylabel("return on held-out tasks")
    axes.axhline(0, color="black", lw=0.8)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=dpi)


def draw_influence(found: list[float], path: Path, dpi: int = 150) -> None:
    """Draw the influence of the parameters at each step on the adapted policy."""
    figure = matplotlib.figure.Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(found, "o-", color="C0")
    half = (len(found) - 1) / 2
    axes.axvspan(0, half, color="0.93", lw=0)
    top = max(found)
    axes.text(half / 2, top * 1.06, "epoch 1", ha="center")
    axes.text(half * 1.5, top * 1.06, "epoch 2", ha="center")
    axes.set_ylim(0, top * 1.2)
    axes.set_xlabel("PPO steps taken")
    axes.set_ylabel("influence on the adapted policy")
    figure.savefig(path, dpi=dpi)


def draw_paths(learner: MetaLearner, path: Path, dpi: int = 150) -> None:
    """Draw paths on the plane before and after one PPO update, for four goals."""
    goals = {"goal": torch.tensor([[0.4, 0.4], [-0.4, 0.3], [-0.3, -0.4], [0.4, -0.3]])}
    generator = torch.Generator().manual_seed(1)
    params = {name: p.detach().expand(4, *p.shape) for name, p in learner.params.items()}
    before = learner.collect(params, goals, 20, generator)
    after = learner.collect(learner.adapt(before), goals, 20, generator)
    figure = matplotlib.figure.Figure(figsize=(7.4, 3.7), layout="constrained")
    for k, (title, data) in enumerate({"before": before, "after one PPO update": after}.items()):
        axes = figure.add_subplot(1, 2, 1 + k, aspect="equal")
        for i in range(4):
            for episode in range(4):
                alive = data.mask[i, :, episode]
                x, y = data.observations[i, alive, episode].T
                axes.plot(x.tolist(), y.tolist(), color=f"C{i}", lw=0.9, alpha=0.7)
            axes.plot(*goals["goal"][i].tolist(), "*", color=f"C{i}", ms=13, mec="black", zorder=5)
        axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), title=title)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=dpi)


def run(config: MetaConfig, tasks: int, out: Path) -> tuple[Tensor, Tensor]:
    """Meta-learn, compare, and draw; return the returns of the learned and of the random start."""
    learner = learner_of(config)
    learner.train()
    trained = learner.evaluate(tasks, steps=1)
    random, chosen = random_start(config, tasks)
    best = f"random start, rate {chosen.inner_lr}, clip range {chosen.clip}"
    for name, returns in {best: random, "meta-learned": trained}.items():
        print(f"{name}: {interval(returns[0])} before, {interval(returns[1])} after one PPO update")
    out.mkdir(parents=True, exist_ok=True)
    draw_returns(trained, random, out / "rl-returns.png")
    draw_influence(influence(learner), out / "rl-influence.png")
    draw_paths(learner, out / "rl-paths.png")
    return trained, random


def main() -> None:
    """Run it as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=CONFIG.iterations)
    parser.add_argument("--tasks", type=int, default=200, help="held-out tasks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    config = dataclasses.replace(CONFIG, iterations=options.iterations, seed=options.seed)
    run(config, options.tasks, options.out)
    print(f"{time.process_time() - start:.0f} s of processor time")


if __name__ == "__main__":
    main()
