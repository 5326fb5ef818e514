"""Bandits: one state, and actions that pay."""

from __future__ import annotations

import torch
from torch import Tensor

from innerloop.rl.envs._tensor_env import Box, Discrete, Tasks, TensorEnv


class Bandit(TensorEnv):
    """A bandit whose arms pay 1 with a probability of their own, or a normal reward.

    The observation is constant; the mean rewards of the arms are the task.

    Args:
        arms: how many.
        noise: the standard deviation of normal rewards; None for rewards of 0 or 1.
        horizon: pulls in an episode.

    Example:
        >>> import torch
        >>> from innerloop.rl.envs import Bandit
        >>> env, task = Bandit(arms=2, noise=0.0), {"mean": torch.tensor([[0.25, 3.0]])}
        >>> env.step(env.initial(task), torch.tensor([1]), task)[1]
        tensor([3.])
    """

    def __init__(self, arms: int = 5, noise: float | None = None, horizon: int = 1) -> None:
        self.observation_space = Box(1)
        self.action_space: Discrete = Discrete(arms)
        self.noise, self.horizon = noise, horizon

    def sample_tasks(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        draw = torch.rand if self.noise is None else torch.randn
        return {"mean": draw(n, self.action_space.n, generator=generator)}

    def initial(self, tasks: Tasks, generator: torch.Generator | None = None) -> Tensor:
        return torch.ones(len(tasks["mean"]), 1)

    def observe(self, state: Tensor) -> Tensor:
        return state

    def step(
        self, state: Tensor, action: Tensor, tasks: Tasks, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean = tasks["mean"].gather(-1, action.unsqueeze(-1)).squeeze(-1)
        if self.noise is None:
            reward = torch.bernoulli(mean, generator=generator)
        else:
            reward = mean + self.noise * torch.randn(len(mean), generator=generator).to(mean)
        return state, reward, torch.zeros(len(mean), dtype=torch.bool)
