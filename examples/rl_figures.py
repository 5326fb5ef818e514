"""Figures of reinforcement learning whose right values are known: learners that look ahead at each
other, tabular MDPs, navigation, CartPole.

    python examples/rl_figures.py lola          # exact iterated prisoner's dilemma, two settings
    python examples/rl_figures.py lola-dice     # the same game from samples
    python examples/rl_figures.py discounts     # learned discounts where noise and signal alternate
    python examples/rl_figures.py meta-gradient # PPO that learns γ, λ and the entropy coefficient
    python examples/rl_figures.py mdp           # Meta-SGD on tabular MDPs
    python examples/rl_figures.py navigation    # ProMP on two-dimensional navigation
    python examples/rl_figures.py cheetah       # ProMP on the half cheetah; needs MuJoCo
    python examples/rl_figures.py cartpole      # plain PPO
    python examples/rl_figures.py acrobot       # plain PPO, beside stable-baselines3 if installed
    python examples/rl_figures.py pendulum      # the same with continuous actions

Each prints what it reached, for each seed; docs/rl-results.md has the numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import innerloop
from innerloop.rl import discounted_returns, envs, surrogate
from innerloop.rl.meta import MetaConfig, MetaGradient, MetaGradientConfig, MetaLearner
from innerloop.rl.ppo import PPO, PPOConfig

GAMMA = 0.96
GAME = envs.MatrixGame()


# -- learners that look ahead ----------------------------------------------------------------------


def look_ahead(
    own: Tensor, other: Tensor, reward: Callable[[Tensor, Tensor], Tensor], rate: float, steps: int
) -> Tensor:
    """Return the other player after ``steps`` gradient steps on its own reward, differentiable."""
    problem = innerloop.Problem(
        lambda params, own, batch: -reward(params["other"], own).sum(),
        innerloop.optim.sgd(lr=rate),
    )
    return innerloop.unroll(problem, {"other": other}, None, hyper=own, steps=steps).params["other"]


def mean_reward(own: Tensor, other: Tensor) -> Tensor:
    """Return the exact discounted reward of the first player, per round."""
    return GAME.returns(own, other, gamma=GAMMA)[0]


def total_reward(own: Tensor, other: Tensor) -> Tensor:
    """Return the exact discounted reward of the first player, summed over rounds."""
    return mean_reward(own, other) / (1 - GAMMA)


def lola_exact(ahead: int, seeds: int = 500, iterations: int = 200, rate: float = 1.0) -> Tensor:
    """Return the mean rewards of pairs of learners from N(0, 1), one for each seed, in one batch.

    Foerster et al., "Learning with opponent-learning awareness", 2018: gradient ascent with lr 1
    on the total discounted reward, with ``ahead`` steps of the opponent, of the same rate, in view.
    """
    players = [*torch.randn(2, seeds, 5, generator=torch.Generator().manual_seed(0))]
    for _ in range(iterations):
        moved = []
        for own, other in (players, players[::-1]):
            own, other = own.detach().requires_grad_(), other.detach().requires_grad_()
            adapted = other
            if ahead:
                # LOLA takes its own reward where the opponent is now, and only the derivative
                # through the opponent's step: a first-order expansion of looking ahead.
                adapted = look_ahead(own, other, total_reward, rate, ahead)
                adapted = other + adapted - adapted.detach()
            value = total_reward(own, adapted).sum()
            moved.append(own.detach() + torch.autograd.grad(value, own)[0])
        players = moved
    return mean_reward(*players)


def lola_from_zeros(ahead: int, updates: int = 50) -> float:
    """Return the mean reward of two learners that start at 0: Adam .2, inner lr .3."""
    players = [torch.zeros(5, requires_grad=True) for _ in range(2)]
    optimizers = [torch.optim.Adam([p], lr=0.2) for p in players]
    for _ in range(updates):
        grads = []
        for own, other in (players, players[::-1]):
            copy = other.detach().requires_grad_()
            adapted = look_ahead(own, copy, total_reward, 0.3, ahead) if ahead else copy
            grads.append(torch.autograd.grad(-total_reward(own, adapted), own)[0])
        for own, optimizer, grad in zip(players, optimizers, grads, strict=True):
            own.grad = grad
            optimizer.step()
    return mean_reward(*players).item()


def lola() -> None:
    """Figures 4 and 5: the exact game."""
    for name, ahead in (("naive", 0), ("LOLA", 1)):
        found = lola_exact(ahead)
        print(
            f"{name}: mean reward {found.mean():.3f}, deviation {found.std():.3f} over "
            f"{len(found)} seeds; {(found > -1.2).float().mean():.1%} above -1.2"
        )
    rewards = ", ".join(f"{lola_from_zeros(k):.3f}" for k in range(4))
    print(f"from zeros, 0 to 3 steps ahead: {rewards}")


def played(first: Tensor, second: Tensor, n: int, rounds: int) -> tuple[Tensor, ...]:
    """Play, and return states of both players, actions of both, rewards of both, ``[T, n]``."""
    mirror = torch.tensor([0, 1, 3, 2, 4])
    state = torch.zeros(n, dtype=torch.long)
    rows = []
    with torch.no_grad():
        for _ in range(rounds):
            actions = [
                1 - torch.bernoulli(logits.sigmoid()[s]).long()
                for logits, s in ((first, state), (second, mirror[state]))
            ]
            following, *rewards = GAME.play(*actions)
            rows.append((state, mirror[state], *actions, *rewards))
            state = following
    return tuple(torch.stack(x) for x in zip(*rows, strict=True))


def joint_log_probs(logits: Tensor, state: Tensor, action: Tensor) -> Tensor:
    """Return the log-probability of the actions, where 0 has the chance sigmoid(logits)."""
    return torch.nn.functional.logsigmoid(logits[state] * (1 - 2 * action))


def sampled_objective(
    own: Tensor, other: Tensor, mine: bool, kind: str, n: int, rounds: int
) -> Tensor:
    """Return a surrogate for the reward of one player, that depends on both."""
    with torch.no_grad():
        states, mirrored, a, b, first, second = played(own, other, n, rounds)
    discounts = (GAMMA ** torch.arange(rounds)).unsqueeze(-1)
    reward = (first if mine else second) * discounts
    log_probs = joint_log_probs(own, states, a) + joint_log_probs(other, mirrored, b)
    if kind == "dice":
        baseline = (reward.mean(1, keepdim=True)).expand_as(reward)
        return surrogate(log_probs, reward, kind="dice", baseline=baseline)
    # The naive surrogate: log π times the return that follows, whose second derivative is wrong.
    following = reward.flip(0).cumsum(0).flip(0)
    return surrogate(log_probs, following - following.mean(1, keepdim=True), kind="reinforce")


def lola_sampled(kind: str, seed: int, iterations: int = 100, n: int = 1024) -> float:
    """Return the exact mean reward of two learners from samples, one step ahead.

    Foerster et al., "DiCE", 2018: batch 1024, 150 rounds, inner lr .3; outer Adam with lr .1.
    """
    torch.manual_seed(seed)
    players = [torch.zeros(5, requires_grad=True) for _ in range(2)]
    optimizers = [torch.optim.Adam([p], lr=0.1) for p in players]
    for _ in range(iterations):
        grads = []
        for own, other in (players, players[::-1]):
            copy = other.detach().requires_grad_()
            inner = sampled_objective(own, copy, False, kind, n, 150)
            step = torch.autograd.grad(inner, copy, create_graph=True)[0]
            outer = sampled_objective(own, copy + 0.3 * step, True, kind, n, 150)
            grads.append(torch.autograd.grad(-outer, own)[0])
        for own, optimizer, grad in zip(players, optimizers, grads, strict=True):
            own.grad = grad
            optimizer.step()
    return mean_reward(*players).item()


def lola_dice(seeds: int = 5) -> None:
    """Figure 6: the same game from samples, with the right surrogate and with the naive one."""
    for kind in ("dice", "reinforce"):
        found = torch.tensor([lola_sampled(kind, seed) for seed in range(seeds)])
        print(
            f"{kind}: median reward {found.median():.3f} of {[round(x, 3) for x in found.tolist()]}"
        )


# -- learned discounts -----------------------------------------------------------------------------


def learned_discounts(
    seeds: int = 20, iterations: int = 5000, meta_lr: float = 0.02
) -> tuple[Tensor, Tensor]:
    """Return the discounts behind which a signal comes, and those behind which noise comes.

    Xu et al., "Meta-gradient reinforcement learning", 2018: ten states in a row, which pay noise,
    N(0, 1), and a signal, .1, in turns. A table of values moves to the return under a discount for
    each state, all of them .5 at first; the discounts learn from how well the new values predict
    the undiscounted return of another episode. That return is the same for all states but for the
    noise, which a discount of 0 keeps out.

    Returns:
        Two tensors, ``[states, seeds]``.
    """
    generator = torch.Generator().manual_seed(0)

    def rewards() -> Tensor:
        paid = torch.full((10, seeds), 0.1)
        paid[::2] = torch.randn(5, seeds, generator=generator)
        return paid

    problem = innerloop.Problem(
        lambda params, discounts, paid: (
            (params["values"] - discounted_returns(paid, gamma=discounts)).square().sum() / 2
        ),
        innerloop.optim.sgd(lr=1.0),
    )
    logits = torch.zeros(10, seeds, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=meta_lr)
    values = torch.zeros(10, seeds)
    for _ in range(iterations):
        traj = innerloop.unroll(problem, {"values": values}, [rewards()], hyper=logits.sigmoid())
        error = traj.params["values"] - discounted_returns(rewards(), gamma=1.0)
        optimizer.zero_grad()
        (error.square().sum() / 2).backward()
        optimizer.step()
        values = traj.params["values"].detach()
    # The last state has nothing behind it.
    found = logits.detach().sigmoid()[:-1]
    return found[::2], found[1::2]


def discounts() -> None:
    """Figure 7: state-dependent discounts."""
    for name, found in zip(("signal", "noise"), learned_discounts(), strict=True):
        print(
            f"in front of {name}: mean discount {found.mean():.3f}, for each state "
            f"{[round(x, 3) for x in found.mean(1).tolist()]}, deviation over seeds "
            f"{found.mean(0).std():.3f}"
        )


# -- meta-learners and PPO -------------------------------------------------------------------------


def mdp(seeds: int = 3, iterations: int = 500) -> None:
    """Figure 3: tabular MDPs, one inner step with learned rates for all numbers."""
    for seed in range(seeds):
        config = MetaConfig(
            env="mdp",
            algorithm="meta-sgd",
            iterations=iterations,
            tasks=20,
            episodes=20,
            inner_lr=300.0,
            outer_lr=0.02,
            anneal=True,
            outer_epochs=1,
            gamma=1.0,
            hidden=(),
            seed=seed,
        )
        learner = MetaLearner(config)
        learner.train()
        found = learner.evaluate(400, steps=1)
        before, after = (f"{x.mean():.2f} ± {1.96 * x.std() / 20:.2f}" for x in found)
        print(f"seed {seed}, 400 held-out tasks: {before} before, {after} after", flush=True)


def navigation(seeds: int = 3, iterations: int = 20) -> None:
    """Figure 2: ProMP on two-dimensional navigation, at 1.5 million steps."""
    for seed in range(seeds):
        config = MetaConfig(
            iterations=iterations,
            tasks=27,
            adaptation_steps=2,
            outer_weights=(2.0, 1.0),
            outer_epochs=6,
            outer_lr=0.013,
            anneal=True,
            seed=seed,
        )
        learner = MetaLearner(config)
        print(f"seed {seed}, untrained: {learner.summary()}", flush=True)
        learner.train()
        print(f"seed {seed}: {learner.summary()}", flush=True)


def cheetah(iterations: int = 300) -> None:
    """Figure 8: which way to run, episodes of 200 steps."""
    learner = MetaLearner(
        MetaConfig(
            env="cheetah",
            iterations=iterations,
            tasks=8,
            episodes=8,
            inner_lr=0.1,
            outer_lr=0.003,
            outer_epochs=5,
        )
    )
    learner.train()
    print(learner.summary(), flush=True)


def cartpole(seeds: int = 3) -> None:
    """Figure 1: plain PPO on CartPole-v1, 100,000 steps."""
    for seed in range(seeds):
        learner = PPO(PPOConfig(seed=seed))
        learner.train()
        print(f"seed {seed}: {learner.summary()}", flush=True)


ACROBOT: dict[str, Any] = {
    "env": "Acrobot-v1",
    "total_steps": 500_000,
    "num_envs": 16,
    "steps": 128,
    "epochs": 4,
    "minibatch": 256,
    "lr": 1e-3,
    "gamma": 0.99,
    "lam": 0.95,
    "anneal": False,
    "value_coef": 1.0,
}
PENDULUM: dict[str, Any] = {
    **ACROBOT,
    "env": "Pendulum-v1",
    "total_steps": 100_000,
    "num_envs": 4,
    "steps": 1024,
    "epochs": 10,
    "gamma": 0.9,
}


def beside_sb3(settings: dict[str, Any], seed: int, episodes: int = 100) -> dict[str, Tensor]:
    """Train our PPO and that of stable-baselines3, if it is installed, with the same settings.

    The critic's loss is half the mean squared error here and all of it there, so its weight there
    is half of ours.

    Returns:
        For each the returns of the most likely actions in new episodes that start alike.
    """
    learner = PPO(PPOConfig(**settings, seed=seed))
    start = time.process_time()
    learner.train()
    found = {f"innerloop, {time.process_time() - start:.0f} s": learner.evaluate(episodes)}
    try:
        import stable_baselines3 as sb3
        from stable_baselines3.common.env_util import make_vec_env
    except ImportError:
        return found
    theirs = sb3.PPO(
        "MlpPolicy",
        make_vec_env(settings["env"], n_envs=settings["num_envs"], seed=seed),
        learning_rate=settings["lr"],
        n_steps=settings["steps"],
        batch_size=settings["minibatch"],
        n_epochs=settings["epochs"],
        gamma=settings["gamma"],
        gae_lambda=settings["lam"],
        vf_coef=settings["value_coef"] / 2,
        seed=seed,
        device="cpu",
    )
    start = time.process_time()
    theirs.learn(settings["total_steps"])
    name = f"stable-baselines3, {time.process_time() - start:.0f} s"
    # Its networks are ours: two of two hidden layers with tanh. Let our evaluation act with them.
    weights = {
        **{f"actor.{i}": theirs.policy.mlp_extractor.policy_net[i] for i in (0, 2)},
        **{f"critic.{i}": theirs.policy.mlp_extractor.value_net[i] for i in (0, 2)},
        "actor.4": theirs.policy.action_net,
        "critic.4": theirs.policy.value_net,
    }
    state = {f"{k}.{n}": p for k, m in weights.items() for n, p in m.named_parameters()}
    if hasattr(theirs.policy, "log_std"):
        state["log_std"] = theirs.policy.log_std
    learner.policy.load_state_dict(state)
    return {**found, name: learner.evaluate(episodes)}


def control(settings: dict[str, Any], seeds: int = 3) -> None:
    """Figure 10: plain PPO beside stable-baselines3."""
    for seed in range(seeds):
        for name, found in beside_sb3(settings, seed).items():
            print(
                f"{settings['env']}, seed {seed}, {name}: return of {len(found)} episodes "
                f"{found.mean():.1f} ± {1.96 * found.std() / len(found) ** 0.5:.1f}",
                flush=True,
            )


def meta_gradient(seeds: int = 3, steps: int = 600_000) -> None:
    """Figure 9: CartPole from a bad discount, which is kept, learned, or replaced by a good one.

    Rollouts are long, because the gradient of the discount is a few hundredths of its noise on 512
    steps.
    """
    learn = ("gamma", "lam", "entropy_coef")
    for seed in range(seeds):
        usual: dict[str, Any] = {
            "env": "cartpole",
            "total_steps": steps,
            "num_envs": 64,
            "minibatch": 1024,
            "epochs": 5,
            "seed": seed,
        }
        bad = {**usual, "gamma": 0.5}
        learners: dict[str, PPO] = {
            "γ = .5": PPO(PPOConfig(**bad)),
            "γ from .5, λ from .9, entropy coefficient from .01": MetaGradient(
                MetaGradientConfig(**bad, learn=learn, meta_lr=0.15)
            ),
            "γ = .98": PPO(PPOConfig(**usual)),
        }
        for name, learner in learners.items():
            history = learner.train()
            drawn = learner.evaluate(40, sample=True)
            print(
                f"seed {seed}, {name}: {learner.summary()}; of drawn actions {drawn.mean():.1f}; "
                f"last 100 training episodes {history['return'][-1]:.1f}",
                flush=True,
            )


COMMANDS: dict[str, Callable[[], None]] = {
    "lola": lola,
    "lola-dice": lola_dice,
    "discounts": discounts,
    "meta-gradient": meta_gradient,
    "mdp": mdp,
    "navigation": navigation,
    "cheetah": cheetah,
    "cartpole": cartpole,
    "acrobot": lambda: control(ACROBOT),
    "pendulum": lambda: control(PENDULUM),
}


def main() -> None:
    """Run the figure that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", choices=list(COMMANDS))
    torch.set_num_threads(1)
    figure = parser.parse_args().figure
    start = time.process_time()
    COMMANDS[figure]()
    print(f"{time.process_time() - start:.0f} s of processor time")


if __name__ == "__main__":
    main()
