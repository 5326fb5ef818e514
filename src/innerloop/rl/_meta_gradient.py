"""``MetaGradient``: PPO that learns its own hyper-parameters while it trains."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import innerloop
from innerloop.errors import InvalidInputError, NonFiniteError
from innerloop.rl._loss import PPOLoss, ppo_loss
from innerloop.rl._policy import ActorCritic
from innerloop.rl._rollout import Rollout
from innerloop.rl.ppo import PPO, PPOConfig, loss_of

LEARNABLE = ("gamma", "lam", "entropy_coef", "lr")
FRACTIONS = ("gamma", "lam")
"""Learned by their logits; the others by their logarithms."""


@dataclasses.dataclass(frozen=True)
class MetaGradientConfig(PPOConfig):
    """Settings of `MetaGradient`: those of PPO, of which some are where learning starts.

    Attributes:
        learn: which of γ, λ, the entropy coefficient and the learning rate are learned.
        meta_lr: learning rate of Adam for their logits (γ, λ) or logarithms; ``anneal`` lets it
            fall too.
        outer_gamma: discount of the outer objective: fixed, or it would choose its own measure.
        outer_lam: λ of the outer advantages.
        critic_lr: learning rate of the outer critic.
    """

    entropy_coef: float = 0.01
    learn: tuple[str, ...] = LEARNABLE
    meta_lr: float = 0.05
    outer_gamma: float = 0.99
    outer_lam: float = 0.95
    critic_lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learn:
            raise InvalidInputError(
                "learn is empty: name some of "
                f"{', '.join(LEARNABLE)}, or use innerloop.rl.ppo.PPO, which learns none"
            )
        for name in self.learn:
            if name not in LEARNABLE:
                raise InvalidInputError(
                    f"{name!r} cannot be learned: choose from {', '.join(LEARNABLE)}"
                )
            value, most = getattr(self, name), 1 if name in FRACTIONS else math.inf
            if not 0 < value < most:
                kind = "logit" if name in FRACTIONS else "logarithm"
                raise InvalidInputError(
                    f"{name}={value} has no {kind} to start learning from: write a number above 0"
                    + (" and below 1" if name in FRACTIONS else "")
                    + ", or leave it out of learn"
                )
        for name in ("outer_gamma", "outer_lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name}={getattr(self, name)} must be between 0 and 1")
        for name in ("meta_lr", "critic_lr"):
            if not getattr(self, name) > 0:
                raise InvalidInputError(f"{name}={getattr(self, name)} must be positive")
        if self.target_kl is not None:
            raise InvalidInputError(
                "target_kl ends an update at a point that jumps with the hyper-parameters: write "
                "target_kl=None"
            )


class MetaGradient(PPO):
    r"""Train a policy by PPO, and PPO's hyper-parameters by the gradient of what an update earns.

    One iteration updates the policy on a rollout, with γ, λ, the entropy coefficient and the
    learning rate :math:`\eta`, acts with the new policy :math:`\theta'(\eta)`, and moves η along

    .. math::
        \nabla_\eta\, \overline{\log \pi_{\theta'(\eta)}(a|s)\, A'}

    where the actions and the advantages A' are those of the new rollout, which is the next one to
    be learned from (Xu et al., "Meta-gradient reinforcement learning", 2018). The derivative goes
    through all minibatches of the update, exactly; the parameters before it are constant. A' has a
    fixed discount and a critic of its own: the one of the policy predicts returns under the learned
    γ, and would bias A' (Bonnet et al., "Debiasing meta-gradient reinforcement learning by learning
    the outer value function", 2022).

    Args:
        config: the settings.
        env: as in `innerloop.rl.ppo.PPO`.
        policy: as in `innerloop.rl.ppo.PPO`.

    Cost:
        About four times PPO's time for each update, and the graph of one update in memory.

    Example:
        >>> from innerloop.rl.meta import MetaGradient, MetaGradientConfig
        >>> config = MetaGradientConfig(env="cartpole", total_steps=1536, gamma=0.9)
        >>> learner = MetaGradient(config)
        >>> history = learner.train()
        >>> round(history["gamma"][0], 6), history["gamma"][1] != history["gamma"][0]
        (0.9, True)
    """

    config: MetaGradientConfig

    def __init__(
        self,
        config: MetaGradientConfig | None = None,
        *,
        env: object = None,
        policy: nn.Module | None = None,
    ) -> None:
        config = MetaGradientConfig() if config is None else config
        super().__init__(config, env=env, policy=policy)
        self._call, _, _ = innerloop.functional(self.policy)
        critic = ActorCritic(
            self.envs.observation_space.size,
            self.envs.action_space,
            hidden=config.hidden,
            generator=self.generator,
        ).critic
        assert critic is not None
        self.critic: nn.Module = critic
        self.critic_optimizer = torch.optim.Adam(
            self.critic.parameters(), lr=config.critic_lr, eps=1e-5
        )
        self.learned = {
            name: _free(name, getattr(config, name)).requires_grad_() for name in config.learn
        }
        self.meta_optimizer = torch.optim.Adam(self.learned.values(), lr=config.meta_lr)
        self.state = innerloop.OuterState(
            model={"policy": self.policy, "critic": self.critic, "learned": self.learned},
            optimizer={
                "policy": self.optimizer,
                "critic": self.critic_optimizer,
                "meta": self.meta_optimizer,
            },
            scheduler=self.state.scheduler,
            random=self.generator,
            counters=self.counters,
        )

    def settings(self) -> dict[str, Any]:
        """Return γ, λ, entropy coefficient and learning rate: learned ones as tensors."""
        fixed = {name: getattr(self.config, name) for name in LEARNABLE}
        return {**fixed, **{name: _bounded(name, x) for name, x in self.learned.items()}}

    def iterate(self) -> dict[str, float]:
        """Update the policy, act with the new one, update the hyper-parameters."""
        start, taken = time.perf_counter(), 0
        if "rollout" not in self.counters:
            rollout, outer = self._collect_both()
            self._fit(outer)
            taken = rollout.rewards.numel()
        else:
            rollout = Rollout(**self.counters["rollout"])
        settings = self.settings()
        params, losses = self._updated(rollout, settings)
        following, outer = self._collect_both()
        objective = self._objective(params, outer)
        self._learn(objective)
        self._fit(outer)
        # The next update learns from it; a checkpoint holds it.
        self.counters["rollout"] = {n: x for n, x in following._asdict().items() if x is not None}
        taken += following.rewards.numel()
        shown = {n: x.item() if isinstance(x, Tensor) else x for n, x in settings.items()}
        return self._report({**shown, **losses, "outer_loss": objective.item()}, taken, start)

    @torch.no_grad()
    def _collect_both(self) -> tuple[Rollout, Rollout]:
        """Act; return the rollout with the policy's values, and with those of the outer critic."""
        fields, after, final = self._act()
        rollout = self._valued(fields, after, final)
        values = self._values(torch.cat([fields["observations"], after[None]]))
        final_values = torch.zeros_like(values[:-1])
        final_values[fields["truncated"]] = self._values(final)
        outer = rollout._replace(
            values=values[:-1], last_value=values[-1], final_values=final_values
        )
        return rollout, outer

    def summary(self) -> str:
        """Say in a line what training reached, and what was learned."""
        now = self.settings()
        moves = (
            f"{name} from {getattr(self.config, name):.4g} to {now[name].item():.4g}"
            for name in self.learned
        )
        return f"{super().summary()}; learned: {', '.join(moves)}"

    def _updated(
        self, rollout: Rollout, settings: Mapping[str, Any]
    ) -> tuple[Mapping[str, Tensor], dict[str, float]]:
        """Update the policy; return its parameters as functions of what is learned."""
        config = self.config
        advantages, returns = rollout.gae(gamma=settings["gamma"], lam=settings["lam"])
        chosen = {**config.__dict__, "entropy_coef": settings["entropy_coef"]}
        lr = settings["lr"] * self._left()
        clip = innerloop.optim.clip_by_global_norm(config.max_grad_norm)
        batches = rollout.minibatches(config.epochs, config.minibatch, self.generator)
        found: list[PPOLoss] = []
        hyper = {"lr": torch.as_tensor(lr)}
        with innerloop.track(self.policy, self.optimizer, learn="outer", hyper=hyper) as loop:
            for batch in batches:
                if len(batch.indices) < config.minibatch // 2:
                    # A remnant of a few steps would weigh as much as a whole minibatch.
                    continue
                batch = batch._replace(
                    advantages=batch.pick(advantages), returns=batch.pick(returns)
                )
                loss = loss_of(loop.model(batch.observations), batch, chosen)
                loop.step(loss.loss, grad_callback=clip)
                found.append(PPOLoss(*(x.detach() for x in loss)))
            loop.commit()
        means = torch.stack([torch.stack(list(loss)) for loss in found]).nanmean(0).tolist()
        return loop.parameters(), dict(zip(PPOLoss._fields, means, strict=True))

    def _objective(self, params: Mapping[str, Tensor], outer: Rollout) -> Tensor:
        """Return the outer loss: the policy gradient's surrogate, and nothing else."""
        config = self.config
        advantages = outer.gae(gamma=config.outer_gamma, lam=config.outer_lam).advantages
        distribution, _ = self._call(params, outer.observations)
        # At the policy that acted the ratio is 1, and its derivative that of the log-probability.
        return ppo_loss(
            distribution.log_prob(outer.actions),
            outer.log_probs,
            advantages,
            clip=math.inf,
            mask=outer.mask,
        ).policy

    def _learn(self, objective: Tensor) -> None:
        """Move the hyper-parameters along the outer gradient."""
        self.meta_optimizer.zero_grad()
        objective.backward(inputs=list(self.learned.values()))
        wrong = [n for n, x in self.learned.items() if not _is_finite(x.grad)]
        if wrong:
            raise NonFiniteError(
                f"the outer gradient of {', '.join(wrong)} in iteration "
                f"{self.counters['iteration']} is not finite (lower the lr?); the hyper-parameters "
                "were not changed"
            )
        # What an update earns shrinks with its learning rate, and Adam would magnify the noise.
        for group in self.meta_optimizer.param_groups:
            group["lr"] = self.config.meta_lr * self._left()
        self.meta_optimizer.step()

    def _fit(self, outer: Rollout) -> None:
        """Fit the outer critic to the returns under the fixed discount, after they were used."""
        config = self.config
        with torch.no_grad():
            returns = outer.gae(gamma=config.outer_gamma, lam=config.outer_lam).returns
        for batch in outer.minibatches(
            config.epochs, config.minibatch, self.generator, returns=returns
        ):
            assert batch.returns is not None
            error = (self._values(batch.observations) - batch.returns).square()
            loss = error.mean() if batch.mask is None else (error * batch.mask).mean()
            self.critic_optimizer.zero_grad()
            loss.backward()
            self.critic_optimizer.step()

    def _values(self, observations: Any) -> Tensor:
        """Return the values of the outer critic."""
        return self.critic(observations).squeeze(-1)


def _free(name: str, value: float) -> Tensor:
    """Return the number without bounds that stands for a hyper-parameter: logit or logarithm."""
    x = torch.tensor(value)
    return x.logit() if name in FRACTIONS else x.log()


def _bounded(name: str, x: Tensor) -> Tensor:
    """Return the hyper-parameter that a number without bounds stands for."""
    return x.sigmoid() if name in FRACTIONS else x.exp()


def _is_finite(grad: Tensor | None) -> bool:
    return grad is None or bool(grad.isfinite())
