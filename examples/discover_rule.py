"""Discover a rule of reinforcement learning, and compare it with a tuned actor-critic.

    python examples/discover_rule.py                     # one rule, a table
    python examples/discover_rule.py --rules 10          # ten rules from ten seeds, with intervals
    python examples/discover_rule.py --out curve.png     # and a picture of learning on new tasks
    python examples/discover_rule.py --resume state.pt   # killed? The same command goes on

The learner has two tables: the logits of its actions in each state, and a few predictions about
each state whose meaning nobody fixes. After some episodes a recurrent network reads them backwards
in time (rewards, the chance of the action taken, the predictions here and there) and says, for each
step, how much more likely its action shall become and what the state should have predicted. That
network is the rule (Oh et al., "Discovering reinforcement learning algorithms", 2020). It does not
know values, returns or bootstrapping. Its weights are learned by the exact derivative through
several updates of many learners; the outer loss is the exact expected return of the policies on the
way.

The rule is trained on small random MDPs and tested on five kinds of tasks, four of which it has
never seen, against an actor-critic whose settings are tuned on each kind.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import innerloop
from innerloop.rl import envs, gae

Named = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Args:
    """The settings of a run."""

    updates: int = 24
    """Updates in the life of a learner."""
    episodes: int = 8
    """Episodes before each update."""
    predictions: int = 4
    """Numbers that the learner predicts in each state."""
    hidden: int = 32
    """Width of the network that is the rule."""
    window: int = 12
    """Updates that the outer gradient goes through at once."""
    lives: int = 48
    """Learners that live at the same time."""
    iterations: int = 300
    """Outer steps."""
    outer_lr: float = 0.002
    entropy: float = 0.02
    """Weight of the policies' entropy in the outer loss."""
    rules: int = 1
    """Rules to discover, from as many seeds."""
    tests: int = 64
    """New tasks of each kind."""
    settings: int = 80
    """Settings of the actor-critic to choose from, for each kind."""
    tuning_tasks: int = 32
    """Tasks of each kind to choose them on."""
    seed: int = 0
    out: str = ""
    """Where to write a picture."""
    save_every: int = 25
    """Outer steps between checkpoints."""
    resume: str = ""
    """A file for checkpoints. The same command goes on from what it finds there."""


# -- tasks: all of them are tables -----------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of task: an environment, and how its tables are drawn."""

    env: envs.TabularMDP
    draw: Callable[[int, torch.Generator], Named]


def random_mdp(states: int, actions: int, horizon: int, noise: float, rare: bool = False) -> Kind:
    """Random MDPs: some mix their states, some hardly; some pay everywhere, some in few places.

    If ``rare``, all of them pay in few places, and few mix.
    """
    env = envs.TabularMDP(states, actions, horizon, noise)

    def draw(n: int, generator: torch.Generator) -> Named:
        tasks = env.sample_tasks(n, generator)
        # The higher the power, the more one next state dominates.
        power = 30 ** (torch.rand(n, 1, 1, 1, generator=generator) / 2 + 0.5 * rare)
        sharp = (tasks["transition"] / tasks["transition"].amax(-1, keepdim=True)) ** power
        share = 0.05 ** (torch.rand(n, 1, 1, generator=generator) / 2 + 0.5 * rare)
        pays = torch.rand(tasks["reward"].shape, generator=generator) < share
        reward = torch.where(pays, tasks["reward"] - 1, 0.0)
        return {"transition": sharp / sharp.sum(-1, keepdim=True), "reward": reward}

    return Kind(env, draw)


def lasting_choice(rooms: int = 3, size: int = 4) -> Kind:
    """The first action chooses one of several rooms, in which the rest of the episode is spent."""
    states = 1 + rooms * size
    env = envs.TabularMDP(states, rooms, 12, 0.3)
    room = torch.cat([torch.tensor([-1]), torch.arange(rooms).repeat_interleave(size)])
    enter = (room == torch.arange(rooms)[:, None]).float()
    stay = (room[:, None] == room).float()[:, None]

    def draw(n: int, generator: torch.Generator) -> Named:
        tasks = env.sample_tasks(n, generator)
        goes = tasks["transition"] * stay
        goes[:, 0] = enter
        # The rooms differ in what they pay, and so do the actions in them.
        usual = torch.randn(n, rooms, generator=generator)[:, room.clamp_min(0), None] / 4
        pays = torch.rand(tasks["reward"].shape, generator=generator) < 0.5
        reward = torch.where(pays, (tasks["reward"] - 1) / 2, 0.0) + usual
        reward[:, 0] = 0
        return {"transition": goes / goes.sum(-1, keepdim=True), "reward": reward}

    return Kind(env, draw)


def bandit(arms: int = 10) -> Kind:
    """One pull a step, of arms whose mean rewards are N(0, 1)."""
    env = envs.TabularMDP(1, arms, 5, 1.0)

    def draw(n: int, generator: torch.Generator) -> Named:
        return {
            "transition": torch.ones(n, 1, arms, 1),
            "reward": torch.randn(n, 1, arms, generator=generator),
        }

    return Kind(env, draw)


def grid(side: int = 4, slip: float = 0.1) -> Kind:
    """A grid with a goal and a trap in it: 1 in each step at the goal, -1 in the trap.

    A step goes elsewhere with the chance ``slip``; the goal is not next to the start.
    """
    states = side * side
    env = envs.TabularMDP(states, 4, 12, 0.1)
    place = torch.arange(states)
    row, column = place // side, place % side
    moves = torch.stack(
        [
            (row + dr).clamp(0, side - 1) * side + (column + dc).clamp(0, side - 1)
            for dr, dc in ((0, 1), (0, -1), (1, 0), (-1, 0))
        ],
        -1,
    )
    goes = F.one_hot(moves, states).float()
    goes = (1 - slip) * goes + slip * goes.mean(1, keepdim=True)
    far = (row + column >= 2).nonzero().squeeze(-1)

    def draw(n: int, generator: torch.Generator) -> Named:
        order = torch.rand(n, len(far), generator=generator).argsort(1)
        goal, trap = far[order[:, 0]], far[order[:, 1]]
        reward = (F.one_hot(goal, states) - F.one_hot(trap, states)).float()
        # Who is at the goal or in the trap stays there.
        ends = F.one_hot(place, states).float()[:, None].expand(-1, 4, -1)
        stuck = (reward != 0)[..., None, None]
        return {
            "transition": torch.where(stuck, ends, goes),
            "reward": reward[..., None].expand(-1, -1, 4).clone(),
        }

    return Kind(env, draw)


def chain(length: int = 8) -> Kind:
    """A delayed reward: the first of two actions decides what the last state pays; noise between.

    The first action leads into one of two corridors. The states on the way pay noise, the last one
    of each corridor 1 or -1; which is the task.
    """
    states = 1 + 2 * length
    env = envs.TabularMDP(states, 2, length + 1, 0.3)
    to = torch.arange(states) + 2
    to[-2:] = torch.tensor([states - 2, states - 1])
    moves = to[:, None].expand(-1, 2).clone()
    moves[0] = torch.tensor([1, 2])
    goes = F.one_hot(moves, states).float()

    def draw(n: int, generator: torch.Generator) -> Named:
        sign = torch.randint(2, (n,), generator=generator) * 2.0 - 1
        reward = torch.zeros(n, states, 2)
        reward[:, -2], reward[:, -1] = sign[:, None], -sign[:, None]
        return {"transition": goes.expand(n, -1, -1, -1), "reward": reward}

    return Kind(env, draw)


TRAINING = (
    random_mdp(5, 2, 10, 0.3),
    random_mdp(10, 4, 10, 0.3),
    random_mdp(10, 3, 15, 1.0),
    random_mdp(12, 3, 20, 0.2, rare=True),
    lasting_choice(),
)
HELD_OUT = {
    "random MDPs": random_mdp(10, 4, 10, 0.3),
    "larger MDPs": random_mdp(20, 5, 20, 0.5),
    "bandits": bandit(),
    "grids": grid(),
    "delayed reward": chain(),
}


def expected_return(logits: Tensor, tasks: Named, horizon: int) -> Tensor:
    """The exact expected return of policies, ``[..., N]``, differentiable."""
    policy = logits.softmax(-1)
    reward = (policy * tasks["reward"]).sum(-1)
    goes = torch.einsum("...nsa,nsat->...nst", policy, tasks["transition"])
    value = torch.zeros_like(reward)
    for _ in range(horizon):
        value = reward + (goes @ value[..., None])[..., 0]
    return value[..., 0]


def bounds(tasks: Named, horizon: int) -> tuple[Tensor, Tensor]:
    """The returns of the uniform policy and of the best one (which may look at the clock)."""
    value = torch.zeros_like(tasks["reward"][..., 0])
    for _ in range(horizon):
        value = (tasks["reward"] + (tasks["transition"] @ value[:, None, :, None])[..., 0]).amax(-1)
    return expected_return(torch.zeros_like(tasks["reward"]), tasks, horizon), value[:, 0]


def score(logits: Tensor, tasks: Named, horizon: int) -> Tensor:
    """The expected return on a scale from 0 (uniform policy) to 1 (optimum)."""
    low, high = bounds(tasks, horizon)
    return (expected_return(logits, tasks, horizon) - low) / (high - low).clamp_min(1e-3)


# -- the learner -----------------------------------------------------------------------------------


class Episodes(NamedTuple):
    """What was seen, ``[T, N, episodes]``; of states also the last one."""

    states: Tensor
    actions: Tensor
    rewards: Tensor


@torch.no_grad()
def act(
    env: envs.TabularMDP, tasks: Named, logits: Tensor, episodes: int, generator: torch.Generator
) -> Episodes:
    """Episodes of N learners, each in its own task."""
    n, each = len(logits), envs.repeat(tasks, episodes)
    chances = logits.softmax(-1).repeat_interleave(episodes, 0)
    every, state = torch.arange(n * episodes), env.initial(each, generator)
    rows, states = [], [state]
    for _ in range(env.horizon):
        action = torch.multinomial(chances[every, state], 1, generator=generator).squeeze(-1)
        state, reward, _ = env.step(state, action, each, generator)
        states.append(state)
        rows.append((action, reward))
    found = (torch.stack(states), *(torch.stack(x) for x in zip(*rows, strict=True)))
    return Episodes(*(x.unflatten(1, (n, episodes)) for x in found))


def looked_up(table: Tensor, states: Tensor) -> Tensor:
    """Rows of tables ``[N, S, k]`` at states ``[T, N, e]``: ``[T, N, e, k]``."""
    return table[torch.arange(len(table))[:, None], states]


def log_chances(logits: Tensor, seen: Episodes) -> Tensor:
    """Log-probabilities of the actions taken, ``[T, N, e]``."""
    rows = looked_up(logits.log_softmax(-1), seen.states[:-1])
    return rows.gather(-1, seen.actions[..., None])[..., 0]


class Said(NamedTuple):
    """What the rule says of each step: push on the action taken, and what to predict."""

    push: Tensor
    prediction: Tensor


def rule(params: Named, weights: Named, seen: Episodes) -> Said:
    """Read the episodes backwards, with a linear recurrence whose gates depend on what is read."""
    here, there = (
        looked_up(params["predictions"], states) for states in (seen.states[:-1], seen.states[1:])
    )
    chance = log_chances(params["logits"], seen).exp()
    last = torch.zeros_like(chance)
    last[-1] = 1.0
    singles = torch.stack([seen.rewards, chance, last], -1)
    inputs = torch.cat([singles, here, there], -1)
    features = (inputs @ weights["in"] + weights["bias"]).tanh()
    keep = (features @ weights["keep"] + weights["keep_bias"]).sigmoid()
    add = inputs @ weights["add"] + features @ weights["add_more"]
    memory, found = torch.zeros_like(add[0]), []
    for k, x in zip(keep.flip(0), add.flip(0), strict=True):
        memory = torch.addcmul(x, k, memory)
        found.append(memory)
    memories = torch.stack(found[::-1])
    hidden = (memories @ weights["mix"] + features @ weights["mix_more"]).tanh()
    push, gain, prediction = (hidden @ weights["out"]).tensor_split([1, 2], -1)
    push = push[..., 0] / (push[..., 0].square().mean((0, 2), keepdim=True) + 1e-4).sqrt()
    return Said(push * gain[..., 0].mean((0, 2), keepdim=True).exp(), prediction)


def first_weights(args: Args, seed: int) -> Named:
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs, width = 3 + 2 * args.predictions, 2 + args.predictions, args.hidden
    sizes = {
        "in": (inputs, width),
        "keep": (width, width),
        "add": (inputs, width),
        "add_more": (width, width),
        "mix": (width, width),
        "mix_more": (width, width),
        "out": (width, outputs),
    }
    drawn = {
        name: torch.randn(size, generator=generator) / (2 * size[0] ** 0.5)
        for name, size in sizes.items()
    }
    # Of the memories some fade within two steps at first, some hardly.
    return {**drawn, "bias": torch.zeros(width), "keep_bias": torch.linspace(0, 4, width)}


def visits(states: Tensor, tables: Tensor) -> Tensor:
    """How often the state of each step is visited in all episodes of its learner."""
    flat = states.transpose(0, 1).flatten(1)
    count = torch.zeros(tables.shape[:2]).scatter_add_(1, flat, torch.ones(flat.shape))
    return looked_up(count, states)


def inner_loss(params: Named, hyper: object, seen: Episodes, said: Said) -> Tensor:
    """Push on actions, and move each state's predictions to the mean of what the rule says there.

    The sum over steps and mean over episodes of -push · log π, as in a policy gradient; of the
    squared error the mean over the visits of each state.
    """
    push = -(said.push * log_chances(params["logits"], seen)).sum(0).mean(-1)
    here = seen.states[:-1]
    missed = (looked_up(params["predictions"], here) - said.prediction).square().sum(-1)
    return push.sum() + (missed / visits(here, params["predictions"])).sum() / 4


RuleOf = Callable[[Named, Named, Episodes], Said]


def problem_of(what: RuleOf) -> innerloop.Problem:
    """One update by a rule. What it says is constant for the learner and differentiated by the
    outer gradient: that is what ``targets`` is for."""
    return innerloop.Problem(inner_loss, innerloop.optim.sgd(lr=1.0), targets=what)


def newborn(env: envs.TabularMDP, n: int, predictions: int) -> Named:
    states, actions = env.observation_space.size, env.action_space.n
    return {
        "logits": torch.zeros(n, states, actions),
        "predictions": torch.zeros(n, states, predictions),
    }


# -- discovery -------------------------------------------------------------------------------------


class Population:
    """Learners of different ages in tasks of one kind; who has lived its life is born again."""

    def __init__(self, kind: Kind, args: Args, generator: torch.Generator) -> None:
        self.kind, self.args, self.generator = kind, args, generator
        self.tasks = kind.draw(args.lives, generator)
        self.params = newborn(kind.env, args.lives, args.predictions)
        windows = -(-args.updates // args.window)
        self.age = args.window * torch.randint(windows, (args.lives,), generator=generator)

    def live(self, problem: innerloop.Problem, weights: Named) -> tuple[Tensor, Named]:
        """Let everyone learn for a window; return the mean score and the outer gradient."""
        args, env = self.args, self.kind.env

        def batches(params: Named, hyper: object, t: int) -> Episodes:
            return act(env, self.tasks, params["logits"], args.episodes, self.generator)

        def outer(traj: innerloop.Trajectory, _: object) -> tuple[Tensor, tuple[Tensor, Named]]:
            on_the_way = [traj.at(t).params["logits"] for t in range(1, args.window + 1)]
            reached = score(torch.stack(on_the_way), self.tasks, env.horizon)
            # What counts is where a life leads.
            times = self.age + torch.arange(1, args.window + 1)[:, None]
            mean = (reached * times).sum() / times.sum()
            # A policy that has stopped trying cannot improve beyond the window.
            policy = torch.stack(on_the_way).log_softmax(-1)
            entropy = -(policy.exp() * policy).sum(-1).mean()
            ends = {name: p.detach() for name, p in traj.params.items()}
            return -mean - args.entropy * entropy, (mean.detach(), ends)

        (_, (mean, lived)), grads = innerloop.metagradient(
            outer, problem, self.params, batches, hyper=weights, steps=args.window, wrt="hyper"
        )
        # In place: the checkpoint holds these tensors.
        for name, p in self.params.items():
            p.copy_(lived[name])
        self.age += args.window
        old = (self.age >= args.updates).nonzero().flatten()
        if len(old):
            born = newborn(env, len(old), args.predictions)
            tasks = self.kind.draw(len(old), self.generator)
            for of, new in ((self.params, born), (self.tasks, tasks)):
                for name, x in of.items():
                    x[old] = new[name]
            self.age[old] = 0
        return mean, grads


def discover(args: Args, seed: int, bar: tqdm) -> tuple[Named, list[float]]:
    """The weights of a rule, and the mean score of the learners in each outer step."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: x.requires_grad_() for name, x in first_weights(args, seed).items()}
    optimizer = torch.optim.Adam(weights.values(), lr=args.outer_lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations)
    problem, populations = problem_of(rule), [Population(k, args, generator) for k in TRAINING]
    counters: dict[str, list[float]] = {"scores": []}
    state = innerloop.OuterState(
        model={"weights": weights, "living": [[p.tasks, p.params, p.age] for p in populations]},
        optimizer=optimizer,
        scheduler=scheduler,
        random=generator,
        counters=counters,
    )
    path = Path(f"{args.resume}.{seed}")
    if args.resume and path.exists():
        state.load(path)
    bar.update(len(counters["scores"]))
    while len(counters["scores"]) < args.iterations:
        population = populations[len(counters["scores"]) % len(populations)]
        mean, grads = population.live(problem, {k: x.detach() for k, x in weights.items()})
        optimizer.zero_grad()
        innerloop.assign(weights, grads)
        torch.nn.utils.clip_grad_norm_(weights.values(), 0.1)
        optimizer.step()
        scheduler.step()
        counters["scores"].append(mean.item())
        done = len(counters["scores"])
        if args.resume and (done % args.save_every == 0 or done == args.iterations):
            state.save(path)
        bar.set_postfix(score=f"{mean:.3f}")
        bar.update()
    return {name: x.detach() for name, x in weights.items()}, counters["scores"]


# -- the actor-critic ------------------------------------------------------------------------------

CRITIC = {
    "lr": (0.1, 10.0),
    "critic": (0.05, 1.0),
    "gamma": (0.8, 1.0),
    "lam": (0.0, 1.0),
    "entropy": (0.001, 0.3),
}
"""Settings of the actor-critic and their ranges: rates and the entropy coefficient log-uniform."""


def drawn_settings(count: int, seed: int = 0) -> Named:
    """Settings drawn at random, ``[count]`` each; every other one normalises its advantages."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (low, high) in CRITIC.items():
        share = torch.rand(count, generator=generator)
        log = name in ("lr", "critic", "entropy")
        found[name] = low * (high / low) ** share if log else low + (high - low) * share
    # A third each at the usual limits: the whole return, no discount, no entropy bonus.
    for name, limit in (("lam", 1.0), ("gamma", 1.0), ("entropy", 0.0)):
        found[name] = torch.where(
            torch.rand(count, generator=generator) < 1 / 3, limit, found[name]
        )
    return {**found, "normalize": (torch.arange(count) % 2).float()}


def actor_critic(params: Named, settings: Named, seen: Episodes) -> Said:
    """The same update with what is known: advantages (GAE), values, an entropy bonus.

    ``settings`` has a number for each learner, ``[N]``.
    """
    settings = {name: x[:, None] for name, x in settings.items()}
    values = looked_up(params["predictions"], seen.states[:-1])[..., 0]
    found = gae(
        seen.rewards,
        values,
        torch.zeros_like(values[0]),
        gamma=settings["gamma"].expand_as(values),
        lam=settings["lam"].expand_as(values),
    )
    advantages = found.advantages
    centred = advantages - advantages.mean((0, 2), keepdim=True)
    normalized = centred / (centred.square().mean((0, 2), keepdim=True).sqrt() + 1e-6)
    advantages = torch.where(settings["normalize"] > 0, normalized, advantages)
    surprise = -log_chances(params["logits"], seen)
    push = settings["lr"] * (advantages + settings["entropy"] * surprise)
    # The learner goes half of the way to what it is told to predict.
    told = values + 2 * settings["critic"] * (found.returns - values)
    return Said(push, told[..., None])


# -- testing ---------------------------------------------------------------------------------------


@torch.no_grad()
def lives(
    args: Args, kind: Kind, tasks: Named, what: RuleOf, hyper: Named, generator: torch.Generator
) -> Tensor:
    """Scores of newborn learners on the way through their lives, ``[updates + 1, N]``."""
    n = len(tasks["reward"])

    def batches(params: Named, hyper: object, t: int) -> Episodes:
        return act(kind.env, tasks, params["logits"], args.episodes, generator)

    predictions = args.predictions if what is rule else 1
    start = newborn(kind.env, n, predictions)
    traj = innerloop.unroll(problem_of(what), start, batches, hyper=hyper, steps=args.updates)
    logits = [traj.at(t).params["logits"] for t in range(args.updates + 1)]
    return torch.stack([score(x, tasks, kind.env.horizon) for x in logits])


def tuned(args: Args, kind: Kind) -> Named:
    """The settings of the actor-critic whose last score is best on tasks of this kind."""
    generator = torch.Generator().manual_seed(args.seed + 10_000)
    tasks = kind.draw(args.tuning_tasks, generator)
    settings, best = drawn_settings(args.settings), []
    for part in torch.arange(args.settings).split(20):
        hyper = {k: x[part].repeat_interleave(args.tuning_tasks) for k, x in settings.items()}
        each = {k: x.repeat(len(part), *[1] * (x.ndim - 1)) for k, x in tasks.items()}
        last = lives(args, kind, each, actor_critic, hyper, generator)[-1]
        best.append(last.unflatten(0, (len(part), -1)).mean(1))
    chosen = torch.cat(best).argmax()
    return {name: x[chosen] for name, x in settings.items()}


class Result(NamedTuple):
    """Mean scores on the way, ``[rules, updates + 1]``, and what the tuning chose."""

    found: Tensor
    critic: Tensor
    settings: Named


class Results(NamedTuple):
    kinds: dict[str, Result]
    training: Tensor
    seconds: float


def run(args: Args) -> Results:
    began = time.process_time()
    seeds = range(args.seed, args.seed + args.rules)
    # disable=None: no bar where standard error is not a terminal, so that a log stays readable.
    total = args.rules * args.iterations
    with tqdm(total=total, desc="discovering", unit="step", disable=None) as bar:
        rules = [discover(args, seed, bar) for seed in seeds]
    kinds = {}
    for name, kind in HELD_OUT.items():
        settings, rows = tuned(args, kind), []
        for seed, (weights, _) in zip(seeds, rules, strict=True):
            generator = torch.Generator().manual_seed(seed + 20_000)
            tasks = kind.draw(args.tests, generator)
            of_all = {k: x.expand(args.tests) for k, x in settings.items()}
            rows.append(
                torch.stack(
                    [
                        lives(args, kind, tasks, what, hyper, generator).mean(1)
                        for what, hyper in ((rule, weights), (actor_critic, of_all))
                    ]
                )
            )
        found, critic = torch.stack(rows, 1)
        kinds[name] = Result(found, critic, settings)
    training = torch.tensor([scores for _, scores in rules])
    return Results(kinds, training, time.process_time() - began)


def interval(x: Tensor) -> str:
    """Mean and half width of the 95 % interval of Student's t."""
    if len(x) < 2:
        return f"{x.mean():.3f}"
    half = scipy.stats.t.ppf(0.975, len(x) - 1) * x.std().item() / len(x) ** 0.5
    return f"{x.mean():.3f} ± {half:.3f}"


def table(args: Args, results: Results) -> str:
    """Scores after a life, and the ratio of the rule's to the actor-critic's."""
    lines = [f"{'':<16}{'discovered rule':<18}{'actor-critic':<18}{'ratio':<18}its settings"]
    for name, (found, critic, settings) in results.kinds.items():
        cells = [interval(x) for x in (found[:, -1], critic[:, -1], found[:, -1] / critic[:, -1])]
        chosen = ", ".join(f"{k} {x:.2g}" for k, x in settings.items())
        lines.append(f"{name:<16}{''.join(f'{cell:<18}' for cell in cells)}{chosen}")
    every = torch.stack([r.found[:, -1] / r.critic[:, -1] for r in results.kinds.values()]).mean(0)
    lines.append(f"{'mean':<16}{'':<36}{interval(every)}")
    lines.append(
        f"({args.rules} rules, {args.tests} tasks of each kind; {results.seconds:.0f} s of "
        "processor time)"
    )
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Scores of the training learners while the rule is discovered; then learning curves on new
    tasks, thin for each rule and thick for their mean."""
    figure = matplotlib.figure.Figure(figsize=(9.6, 5.6), layout="constrained")
    axes = figure.subplots(2, 3, sharey=True)
    window = min(15, results.training.shape[1])
    smooth = results.training.unfold(1, window, 1).mean(-1)
    for row in smooth:
        axes[0, 0].plot(range(window, window + len(row)), row.tolist(), "C0", lw=0.6, alpha=0.7)
    axes[0, 0].set(title="discovery", xlabel="outer steps", ylabel="score of living learners")
    for ax, (name, result) in zip(axes.flat[1:], results.kinds.items(), strict=True):
        for label, scores, colour in (
            ("discovered rule", result.found, "C0"),
            ("actor-critic, tuned here", result.critic, "C1"),
        ):
            for row in scores:
                ax.plot(row.tolist(), colour, lw=0.6, alpha=0.5)
            ax.plot(scores.mean(0).tolist(), colour, label=label)
        ax.set(title=name, xlabel="updates")
    axes[0, 1].legend(loc="lower right", fontsize=8)
    axes[1, 0].set_ylabel("score")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None = None) -> Args:
    """Each field of `Args` as an option."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for field in dataclasses.fields(Args):
        default = field.default
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(default), default=default
        )
    return Args(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
    chosen_args = parse()
    outcome = run(chosen_args)
    print(table(chosen_args, outcome))
    if chosen_args.out:
        draw(outcome, Path(chosen_args.out))
