"""A point in the plane that is to go to a goal that it does not see."""

from __future__ import annotations

import torch
from torch import Tensor

from innerloop.rl.envs._tensor_env import Box, Tasks, TensorEnv


class Navigation(TensorEnv):
    r"""Two-dimensional navigation (Finn et al., "Model-agnostic meta-learning", 2017).

    The point starts at the origin, sees its position x and moves by a tenth of the action a. The
    goal g is the task, drawn from a square; only the rewards tell where it is:

    .. math::
        x_{t+1} = x_t + \tfrac1{10}\, \mathrm{clip}(a_t, -1, 1), \qquad
        r_t = -\lVert x_{t+1} - g \rVert

    An episode terminates when both coordinates are within ``radius`` of the goal's.

    Args:
        horizon: steps in an episode.
        size: goals are uniform in [-size, size]².
        radius: how near is near enough.

    Example:
        >>> import torch
        >>> from innerloop.rl.envs import Navigation
        >>> env = Navigation()
        >>> goal = {"goal": torch.tensor([[0.1, 0.0]])}
        >>> env.step(env.initial(goal), torch.tensor([[5.0, 0.0]]), goal)
        (tensor([[0.1000, 0.0000]]), tensor([-0.]), tensor([True]))
    """

    observation_space = Box(2)
    action_space = Box(2, -1.0, 1.0)

    def __init__(self, horizon: int = 100, size: float = 0.5, radius: float = 0.01) -> None:
        self.horizon, self.size, self.radius = horizon, size, radius

    def sample_tasks(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"goal": (torch.rand(n, 2, generator=generator) * 2 - 1) * self.size}

    def initial(self, tasks: Tasks, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros_like(tasks["goal"])

    def observe(self, state: Tensor) -> Tensor:
        return state

    def step(
        self, state: Tensor, action: Tensor, tasks: Tasks, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        state = state + 0.1 * action.clamp(-1, 1)
        distance = state - tasks["goal"]
        return state, -distance.norm(dim=-1), (distance.abs() < self.radius).all(-1)
