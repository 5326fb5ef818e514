"""Markov decision processes with a table of transitions and rewards, drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from innerloop.rl.envs._tensor_env import Box, Discrete, Tasks, TensorEnv


class TabularMDP(TensorEnv):
    """Random tables (Duan et al., "RL²", 2016): Dirichlet(1) transitions, N(1, 1) mean rewards.

    An observation is the state as a one-hot vector. Episodes start in state 0 and are truncated at
    the horizon.

    Args:
        states: S.
        actions: A.
        horizon: steps in an episode.
        noise: standard deviation of the rewards around their mean.

    Example:
        >>> import torch
        >>> from innerloop.rl.envs import TabularMDP
        >>> env = TabularMDP(states=10, actions=5)
        >>> tasks = env.sample_tasks(3)
        >>> {name: tuple(x.shape) for name, x in tasks.items()}
        {'transition': (3, 10, 5, 10), 'reward': (3, 10, 5)}
        >>> env.observe(env.initial(tasks)).sum(-1)
        tensor([1., 1., 1.])
    """

    def __init__(
        self, states: int = 10, actions: int = 5, horizon: int = 10, noise: float = 1.0
    ) -> None:
        self.observation_space = Box(states)
        self.action_space: Discrete = Discrete(actions)
        self.horizon, self.noise = horizon, noise

    def sample_tasks(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        states, actions = self.observation_space.size, self.action_space.n
        uniform = torch.rand(n, states, actions, states, generator=generator)
        weights = -uniform.clamp_min(1e-12).log()
        reward = 1 + torch.randn(n, states, actions, generator=generator)
        return {"transition": weights / weights.sum(-1, keepdim=True), "reward": reward}

    def initial(self, tasks: Tasks, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros(len(tasks["reward"]), dtype=torch.long)

    def observe(self, state: Tensor) -> Tensor:
        return F.one_hot(state, self.observation_space.size).float()

    def step(
        self, state: Tensor, action: Tensor, tasks: Tasks, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, states, actions = tasks["reward"].shape
        row = (torch.arange(n) * states + state) * actions + action
        mean = tasks["reward"].flatten()[row]
        reward = mean + self.noise * torch.randn(n, generator=generator).to(mean)
        chances = tasks["transition"].flatten(0, 2)[row]
        state = torch.multinomial(chances, 1, generator=generator).squeeze(-1)
        return state, reward, torch.zeros(n, dtype=torch.bool)
