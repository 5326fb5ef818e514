"""The cart with a pole on it, whose sizes may differ between copies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from innerloop.rl.envs._tensor_env import Box, Discrete, Tasks, TensorEnv

USUAL = {"gravity": 9.8, "cart": 1.0, "pole": 0.1, "length": 0.5, "force": 10.0}


class CartPole(TensorEnv):
    """CartPole-v1 of Gymnasium (Barto et al., 1983), with gravity, masses, length, force as tasks.

    The state is (x, v, angle, angular velocity); an episode terminates at 2.4 m or 12 degrees, is
    truncated after ``horizon`` steps, and pays 1 a step.

    Args:
        horizon: steps in an episode.
        spread: tasks multiply each of the five sizes by a factor that is log-uniform in
            [1/(1 + spread), 1 + spread]; 0 for the usual cart.

    Example:
        >>> from innerloop.rl.envs import CartPole
        >>> env = CartPole()
        >>> round(env.sample_tasks(1)["gravity"].item(), 3)
        9.8
    """

    observation_space, action_space = Box(4), Discrete(2)

    def __init__(self, horizon: int = 500, spread: float = 0.0) -> None:
        self.horizon, self.spread = horizon, spread

    def sample_tasks(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        exponents = torch.rand(len(USUAL), n, generator=generator) * 2 - 1
        factors = (exponents * math.log1p(self.spread)).exp()
        return {name: usual * f for (name, usual), f in zip(USUAL.items(), factors, strict=True)}

    def initial(self, tasks: Tasks, generator: torch.Generator | None = None) -> Tensor:
        return torch.rand(len(tasks["gravity"]), 4, generator=generator) * 0.1 - 0.05

    def observe(self, state: Tensor) -> Tensor:
        return state

    def step(
        self, state: Tensor, action: Tensor, tasks: Tasks, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, speed, angle, spin = state.unbind(-1)
        total, moment = tasks["cart"] + tasks["pole"], tasks["pole"] * tasks["length"]
        cos, sin = angle.cos(), angle.sin()
        push = (tasks["force"] * (2.0 * action - 1) + moment * spin**2 * sin) / total
        turn = (tasks["gravity"] * sin - cos * push) / (
            tasks["length"] * (4 / 3 - tasks["pole"] * cos**2 / total)
        )
        rates = torch.stack([speed, push - moment * turn * cos / total, spin, turn], -1)
        state = state + 0.02 * rates
        out = (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > 12 * 2 * math.pi / 360)
        return state, torch.ones_like(x), out
