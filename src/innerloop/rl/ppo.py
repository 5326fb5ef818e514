"""Proximal policy optimisation (Schulman et al. 2017): a learner, and the same as an inner loop."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import innerloop
from innerloop import optim
from innerloop.errors import InvalidInputError
from innerloop.rl import _run
from innerloop.rl._distributions import Categorical, Gaussian
from innerloop.rl._loss import PPOLoss, ppo_loss
from innerloop.rl._normalize import ObservationNormalizer, RewardNormalizer
from innerloop.rl._policy import ActorCritic, check_fits
from innerloop.rl._rollout import Minibatch, Rollout
from innerloop.rl._run import History
from innerloop.rl.envs._batch import Batch, Environments
from innerloop.rl.envs._make import make

__all__ = ["PPO", "ActorCritic", "PPOConfig", "ppo_loss", "ppo_problem"]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Settings of `PPO`; the defaults solve CartPole-v1 in 100,000 steps.

    Attributes:
        env: what `innerloop.rl.envs.make` takes as a name.
        total_steps: environment steps in all.
        num_envs: copies of the environment.
        steps: steps of each copy between two updates.
        epochs: how often each step is used.
        minibatch: steps in a minibatch.
        lr: learning rate of Adam.
        anneal: let ``lr`` fall linearly to 0.
        gamma: discount.
        lam: λ of the advantages.
        clip: clip range of the probability ratio.
        value_clip: clip range of the values; None for none.
        entropy_coef: weight of the entropy bonus.
        value_coef: weight of the critic's loss.
        max_grad_norm: gradients are scaled down to this global norm.
        target_kl: leave out the rest of an update after an epoch with an approximate KL divergence
            beyond this; None for never.
        normalize_advantages: to mean 0 and standard deviation 1 in each minibatch.
        normalize_observations: by running mean and variance.
        normalize_rewards: by the running deviation of the return.
        hidden: sizes of the hidden layers.
        log_std: the first log standard deviation of continuous actions.
        seed: of environments, weights, actions and minibatches.
    """

    env: str = "CartPole-v1"
    total_steps: int = 100_000
    num_envs: int = 8
    steps: int = 64
    epochs: int = 10
    minibatch: int = 256
    lr: float = 2e-3
    anneal: bool = True
    gamma: float = 0.98
    lam: float = 0.9
    clip: float = 0.2
    value_clip: float | None = None
    entropy_coef: float = 0.0
    value_coef: float = 0.5
    max_grad_norm: float = 0.5
    target_kl: float | None = None
    normalize_advantages: bool = True
    normalize_observations: bool = False
    normalize_rewards: bool = False
    hidden: tuple[int, ...] = (64, 64)
    log_std: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("total_steps", "num_envs", "steps", "epochs", "minibatch"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name}={getattr(self, name)}: write 1 or more")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name}={getattr(self, name)} must be between 0 and 1")
        for name in ("lr", "clip", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise InvalidInputError(f"{name}={getattr(self, name)} must be positive")
        if self.minibatch > self.num_envs * self.steps:
            raise InvalidInputError(
                f"minibatch={self.minibatch} is more than the num_envs * steps = "
                f"{self.num_envs * self.steps} steps of a rollout: make it smaller"
            )


class PPO:
    """Train a policy by PPO: collect a rollout, take a few epochs of clipped steps, again.

    Args:
        config: the settings.
        env: other environments than ``config.env`` names, in any form that
            `innerloop.rl.envs.make` takes.
        policy: a module that maps observations to ``(distribution, values)``; default an
            `ActorCritic`.

    Example:
        >>> from innerloop.rl.ppo import PPO, PPOConfig
        >>> learner = PPO(PPOConfig(env="cartpole", total_steps=1024))
        >>> history = learner.train()
        >>> history["steps"]
        [512, 1024]
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        *,
        env: object = None,
        policy: nn.Module | None = None,
    ) -> None:
        self.config = config = PPOConfig() if config is None else config
        name = config.env if env is None else env
        self.envs: Environments = make(name, config.num_envs, seed=config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        size, actions = self.envs.observation_space.size, self.envs.action_space
        self.policy = policy or ActorCritic(
            size,
            actions,
            hidden=config.hidden,
            log_std=config.log_std,
            generator=self.generator,
        )
        check_fits(self.policy, torch.zeros(2, size), actions)
        self.optimizer = torch.optim.Adam(
            self.policy.parameters(), lr=config.lr, eps=1e-5, fused=True
        )
        n = self.envs.num_envs
        self.observations = ObservationNormalizer([size])
        self.rewards = RewardNormalizer(n, gamma=config.gamma)
        self.counters: dict[str, Any] = {
            "iteration": 0,
            "steps": 0,
            "seconds": 0.0,
            "observation": self.envs.reset(),
            "running": torch.zeros(2, n),
            "recent": [],
            "history": {},
        }
        self.state = innerloop.OuterState(
            model=self.policy,
            optimizer=self.optimizer,
            scheduler={
                "config": _run.Settings(dataclasses.asdict(config), free=["total_steps"]),
                "envs": self.envs,
                "observations": self.observations,
                "rewards": self.rewards,
            },
            random=self.generator,
            counters=self.counters,
        )

    @property
    def history(self) -> History:
        """Return the diagnostics of all iterations, by name."""
        return self.counters["history"]

    def train(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
        checkpoint_every: int = 1,
        callback: Callable[[Mapping[str, float]], object] | None = None,
        progress: bool = True,
    ) -> History:
        """Train for what is left of ``total_steps``.

        Args:
            out: a folder for ``checkpoint.pt`` and ``progress.csv``.
            resume: go on from the checkpoint in ``out``, bit for bit; if there is none yet, start.
            checkpoint_every: iterations between two checkpoints; a killed run loses no more.
            callback: called with the diagnostics of each iteration; what it raises ends the run.
            progress: show a bar, by tqdm, if standard error is a terminal.

        Returns:
            The diagnostics of all iterations, by name.
        """
        folder = None if out is None else Path(out)
        _run.start(self.state, folder, resume)
        counters, total = self.counters, self.config.total_steps
        with _run.bar(total, counters["steps"], "step", progress) as shown:
            while counters["steps"] < total:
                before = counters["steps"]
                row = self.iterate()
                shown.update(counters["steps"] - before)
                shown.set_postfix_str(f"return {row['return']:.1f}", refresh=False)
                last = counters["steps"] >= total
                if folder and (last or counters["iteration"] % checkpoint_every == 0):
                    self.state.save(folder / _run.CHECKPOINT)
                    _run.write_table(self.history, folder / _run.TABLE)
                if callback is not None:
                    callback(row)
        return self.history

    def iterate(self) -> dict[str, float]:
        """Collect one rollout, update on it, and return the diagnostics."""
        start = time.perf_counter()
        lr = self.config.lr * self._left()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        rollout = self.collect()
        losses = self.update(rollout)
        return self._report({"lr": lr, **losses}, rollout.rewards.numel(), start)

    def _left(self) -> float:
        """Return the factor on the learning rate."""
        left = max(0.0, 1 - self.counters["steps"] / self.config.total_steps)
        return left if self.config.anneal else 1.0

    def _report(self, losses: Mapping[str, float], steps: int, start: float) -> dict[str, float]:
        """Count an iteration that took ``steps`` steps, and return its diagnostics."""
        self.counters["iteration"] += 1
        self.counters["steps"] += steps
        self.counters["seconds"] += time.perf_counter() - start
        recent = self.counters["recent"]
        row = {
            "iteration": self.counters["iteration"],
            "steps": self.counters["steps"],
            "return": sum(x for x, _ in recent) / len(recent) if recent else math.nan,
            "length": sum(n for _, n in recent) / len(recent) if recent else math.nan,
            **losses,
            "seconds": round(self.counters["seconds"], 3),
        }
        _run.append(self.history, row)
        return row

    @torch.no_grad()
    def collect(self) -> Rollout:
        """Act for ``steps`` steps, and return what happened.

        The values and log-probabilities are computed for all steps at once, at the end.
        """
        return self._valued(*self._act())

    def _valued(self, fields: dict[str, Tensor], after: Tensor, final: Tensor) -> Rollout:
        """Return a rollout of what happened, with the policy's values and log-probabilities."""
        distribution, values = self.policy(torch.cat([fields["observations"], after[None]]))
        if values is None:
            raise InvalidInputError("the policy has no critic: PPO needs values beside the actions")
        taken = type(distribution)(*(x[:-1] if x.ndim > 2 else x for x in distribution))
        truncated = fields["truncated"]
        final_values = torch.zeros_like(values[:-1])
        if len(final):
            final_values[truncated] = self.policy(final)[1]
        return Rollout(
            **fields,
            log_probs=taken.log_prob(fields["actions"]),
            values=values[:-1],
            last_value=values[-1],
            final_values=final_values,
        ).check()

    def _act(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Act for ``steps`` steps.

        Returns:
            What happened; the observations after the last step; the last observations of the
            episodes that were truncated, in the order of these steps.
        """
        config, counters = self.config, self.counters
        actor = self.policy.distribution if isinstance(self.policy, ActorCritic) else self._actor
        rows: list[dict[str, Tensor]] = []
        finals: list[Tensor] = []
        seen = self._seen(counters["observation"])
        for _ in range(config.steps):
            actions = actor(seen).sample(self.generator)
            found = self.envs.step(actions)
            ended = found.terminated | found.truncated
            reward = self._account(found.reward, ended, found.valid)
            rows.append(
                {
                    "observations": seen,
                    "actions": actions,
                    "rewards": reward,
                    "terminated": found.terminated,
                    "truncated": found.truncated,
                    "mask": found.valid,
                }
            )
            finals.append(found.final_observation)
            counters["observation"] = found.observation
            seen = self._seen(found.observation)
        fields = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if bool(fields["mask"].all()):
            del fields["mask"]
        final = torch.stack(finals)[fields["truncated"]]
        if config.normalize_observations:
            # Statistics stay as they are: these observations were counted, or follow no action.
            final = self.observations.normalize(final)
        return fields, seen, final

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Take the epochs of one rollout, and return the mean of the diagnostics."""
        config = self.config
        with torch.no_grad():
            advantages, returns = rollout.gae(gamma=config.gamma, lam=config.lam)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        found: list[PPOLoss] = []
        epochs = 0
        for _ in range(config.epochs):
            batches = rollout.minibatches(
                1, config.minibatch, self.generator, advantages=advantages, returns=returns
            )
            if len(batches) > 1 and len(batches[-1].indices) < config.minibatch // 2:
                # A remnant of a few steps would weigh as much as a whole minibatch.
                batches.pop()
            for batch in batches:
                loss = loss_of(self.policy(batch.observations), batch, config.__dict__)
                self.optimizer.zero_grad()
                loss.loss.backward()
                nn.utils.clip_grad_norm_(params, config.max_grad_norm)
                self.optimizer.step()
                found.append(PPOLoss(*(x.detach() for x in loss)))
            epochs += 1
            if config.target_kl is not None:
                kl = sum(float(loss.approx_kl) for loss in found[-len(batches) :]) / len(batches)
                if kl > config.target_kl:
                    break
        means = torch.stack([torch.stack(list(loss)) for loss in found]).nanmean(0).tolist()
        if not math.isfinite(means[0]):
            raise innerloop.NonFiniteError(
                f"the loss of iteration {self.counters['iteration']} is {means[0]}: the policy "
                "diverged (lower the lr?)"
            )
        return {**dict(zip(PPOLoss._fields, means, strict=True)), "epochs": epochs}

    @torch.no_grad()
    def evaluate(self, episodes: int = 20, *, sample: bool = False, seed: int = 10_000) -> Tensor:
        """Return the returns of ``episodes`` new episodes, with the most likely actions.

        The environments are new ones, of ``config.env`` or of the same tensor environment.

        Args:
            episodes: how many, each in a copy of its own.
            sample: draw actions in place of the most likely ones.
            seed: of the environments.
        """
        source: object = self.config.env
        if isinstance(self.envs, Batch):
            source = self.envs.env
        envs = make(source, episodes, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        seen, total = envs.reset(), torch.zeros(envs.num_envs)
        alive = torch.ones(envs.num_envs, dtype=torch.bool)
        while bool(alive.any()):
            if self.config.normalize_observations:
                seen = self.observations.normalize(seen)
            distribution = self._actor(seen)
            found = envs.step(distribution.sample(generator) if sample else distribution.mode())
            total += torch.where(alive, found.reward, torch.zeros(()))
            alive &= ~(found.terminated | found.truncated)
            seen = found.observation
        return total

    def summary(self) -> str:
        """Evaluate 20 episodes, and say in a line what training reached."""
        returns, seconds = self.evaluate(20), self.counters["seconds"]
        return (
            f"{self.counters['steps']} steps in {seconds:.0f} s; return of the most likely "
            f"actions over {len(returns)} episodes: {returns.mean():.1f} (from "
            f"{returns.min():.1f} to {returns.max():.1f})"
        )

    def write_picture(self, out: str | os.PathLike[str]) -> Path:
        """Draw the learning curve as ``curve.png`` in the folder ``out``, and return its path.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        path = Path(out) / _run.PICTURE
        _run.write_curve(self.history, "steps", ["return"], path)
        return path

    def _actor(self, observations: Tensor) -> Categorical | Gaussian:
        return cast("Categorical | Gaussian", self.policy(observations)[0])

    def _seen(self, observation: Tensor) -> Tensor:
        return self.observations(observation) if self.config.normalize_observations else observation

    def _account(self, reward: Tensor, ended: Tensor, valid: Tensor) -> Tensor:
        """Count the rewards of running episodes; return those to learn from."""
        running = self.counters["running"]
        running += torch.stack([reward, torch.ones_like(reward)]) * valid
        if bool(ended.any()):
            self.counters["recent"] += running[:, ended].T.tolist()
            self.counters["recent"] = self.counters["recent"][-100:]
            running[:, ended] = 0
        return self.rewards(reward, ended=ended) if self.config.normalize_rewards else reward


def ppo_problem(
    policy: nn.Module,
    optimizer: optim.Optimizer | None = None,
    *,
    clip: float = 0.2,
    value_clip: float | None = None,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    normalize: bool = True,
    optimizer_hyper: Any = None,
) -> innerloop.Problem:
    """Make PPO's inner loop a `innerloop.Problem`, to be unrolled under any strategy.

    The batches are `Rollout.minibatches`, and ``hyper`` a dict. It must have ``"advantages"`` (and,
    with a critic, ``"returns"``), ``[T, N]``, as `Rollout.gae` returns them: computed from γ and λ
    that are learned, they carry those gradients. Whatever of ``"clip"``, ``"value_clip"``,
    ``"value_coef"`` and ``"entropy_coef"`` is in ``hyper`` takes the place of the argument. What
    the rollout stored (observations, actions, rewards, old log-probabilities, old values) is
    constant; the normalisation of advantages is differentiated.

    Args:
        policy: a module that maps observations to ``(distribution, values)``.
        optimizer: of the inner loop; default ``innerloop.optim.adam(lr=3e-4, eps=1e-5)``.
        clip: as in `ppo_loss`; so are the next four.
        value_clip: as in `ppo_loss`.
        value_coef: as in `ppo_loss`.
        entropy_coef: as in `ppo_loss`.
        normalize: as in `ppo_loss`.
        optimizer_hyper: as in `innerloop.Problem`; ``("lr",)`` reads ``hyper["lr"]``.

    Example:
        >>> import torch, innerloop
        >>> from innerloop.rl import ActorCritic, Rollout, envs
        >>> from innerloop.rl.ppo import ppo_problem
        >>> policy = ActorCritic(1, envs.Discrete(2), hidden=(4,))
        >>> observations, actions = torch.randn(6, 2, 1), torch.randint(2, (6, 2))
        >>> with torch.no_grad():
        ...     distribution, values = policy(observations)
        >>> rollout = Rollout(
        ...     observations=observations,
        ...     actions=actions,
        ...     rewards=actions.float(),
        ...     log_probs=distribution.log_prob(actions),
        ...     values=values,
        ...     last_value=values[-1],
        ... )
        >>> gamma = torch.tensor(0.9, requires_grad=True)
        >>> advantages, returns = rollout.gae(gamma=gamma, lam=0.95)
        >>> traj = innerloop.unroll(
        ...     ppo_problem(policy),
        ...     dict(policy.named_parameters()),
        ...     rollout.minibatches(epochs=2, size=4),
        ...     hyper={"advantages": advantages, "returns": returns},
        ... )
        >>> torch.autograd.grad(traj.params["actor.0.weight"].sum(), gamma)[0].isfinite()
        tensor(True)
    """
    call, _, _ = innerloop.functional(policy)
    settings = {
        "clip": clip,
        "value_clip": value_clip,
        "value_coef": value_coef,
        "entropy_coef": entropy_coef,
        "normalize_advantages": normalize,
    }

    def loss(params: Any, hyper: Any, batch: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        if not isinstance(hyper, Mapping) or "advantages" not in hyper:
            raise InvalidInputError(
                "the inner loop of PPO takes its advantages from hyper: write hyper="
                "{'advantages': advantages, 'returns': returns}, as rollout.gae returns them"
            )
        picked = batch._replace(
            advantages=batch.pick(hyper["advantages"]),
            returns=batch.pick(hyper["returns"]) if "returns" in hyper else None,
        )
        chosen = {name: hyper.get(name, value) for name, value in settings.items()}
        found = loss_of(call(params, batch.observations), picked, chosen)
        aux = found._asdict()
        return aux.pop("loss"), aux

    return innerloop.Problem(
        loss,
        optim.adam(lr=3e-4, eps=1e-5) if optimizer is None else optimizer,
        optimizer_hyper=optimizer_hyper,
    )


def loss_of(output: Any, batch: Minibatch, settings: Mapping[str, Any]) -> PPOLoss:
    """Compute the PPO loss of a minibatch from what the policy returned."""
    distribution, values = output
    assert batch.advantages is not None
    critic = values is not None and batch.returns is not None
    return ppo_loss(
        distribution.log_prob(batch.actions),
        batch.log_probs,
        batch.advantages,
        values=values if critic else None,
        returns=batch.returns if critic else None,
        old_values=batch.values if critic else None,
        entropy=distribution.entropy(),
        clip=settings["clip"],
        value_clip=settings["value_clip"],
        value_coef=settings["value_coef"],
        entropy_coef=settings["entropy_coef"],
        normalize=settings["normalize_advantages"],
        mask=batch.mask,
    )
