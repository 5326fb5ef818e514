"""``Batch``: N copies of a tensor environment that start again by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError
from innerloop.rl.envs._tensor_env import (
    Box,
    Discrete,
    Tasks,
    TensorEnv,
    Transition,
    check_actions,
    check_horizon,
    choose,
    count,
)


@runtime_checkable
class Environments(Protocol):
    """N running environments: `Batch`, or `GymnasiumBatch`."""

    num_envs: int
    observation_space: Box
    action_space: Box | Discrete

    def reset(self) -> Tensor:
        """Start every copy anew and return the observations, ``[N, size]``."""

    def step(self, action: Tensor) -> Transition:
        """Take one step of every copy."""

    def state_dict(self) -> dict[str, object]:
        """Return what `load_state_dict` needs to go on from here, bit for bit."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a state."""


class Batch:
    """N copies of a `TensorEnv`; a copy whose episode ended starts again in the same step.

    Args:
        env: the environment.
        tasks: one for each copy; or their number N, to draw N tasks.
        seed: of the batch's own generator.

    Example:
        >>> import torch
        >>> from innerloop.rl.envs import Batch, Navigation
        >>> batch = Batch(Navigation(horizon=2), 3, seed=0)
        >>> _ = batch.reset()
        >>> [batch.step(torch.ones(3, 2)).truncated.any().item() for _ in range(4)]
        [False, True, False, True]
    """

    def __init__(self, env: TensorEnv, tasks: int | Tasks, *, seed: int = 0) -> None:
        check_horizon(env)
        self.env, self.generator = env, torch.Generator().manual_seed(seed)
        if isinstance(tasks, int):
            if tasks < 1:
                raise InvalidInputError(f"{tasks} copies of an environment: write 1 or more")
            tasks = env.sample_tasks(tasks, self.generator)
        self.tasks = dict(tasks)
        self.num_envs = count(tasks)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.time = torch.zeros(self.num_envs, dtype=torch.long)
        self.state: Tensor | None = None

    def reset(self) -> Tensor:
        """Start every copy anew and return the observations, ``[N, size]``."""
        self.state = self.env.initial(self.tasks, self.generator)
        self.time = torch.zeros_like(self.time)
        return self.env.observe(self.state)

    def step(self, action: Tensor) -> Transition:
        """Take one step of every copy.

        Raises:
            InvalidInputError: the actions do not fit the space, or ``reset`` was not called.
        """
        if self.state is None:
            raise InvalidInputError("call reset() before the first step()")
        action = check_actions(action, self.action_space, self.num_envs)
        state, reward, terminated = self.env.step(self.state, action, self.tasks, self.generator)
        self.time = self.time + 1
        truncated = (self.time >= self.env.horizon) & ~terminated
        final = self.env.observe(state)
        ended = (terminated | truncated).nonzero().squeeze(-1)
        if len(ended):
            state = state.clone()
            state[ended] = self.env.initial(choose(self.tasks, ended), self.generator)
            self.time[ended] = 0
        self.state = state
        seen = self.env.observe(state) if len(ended) else final
        valid = torch.ones_like(terminated)
        return Transition(seen, reward, terminated, truncated, final, valid)

    def state_dict(self) -> dict[str, object]:
        """Return tasks, state, time and the generator's state."""
        return {
            "tasks": self.tasks,
            "state": self.state,
            "time": self.time,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a state.

        Raises:
            InvalidInputError: it belongs to another number of copies.
        """
        time = state["time"]
        if not isinstance(time, Tensor) or len(time) != self.num_envs:
            raise InvalidInputError(f"the state is not one of {self.num_envs} environments")
        self.tasks, self.time = dict(state["tasks"]), time.clone()  # type: ignore[call-overload]
        self.state = state["state"]  # type: ignore[assignment]
        self.generator.set_state(state["generator"])  # type: ignore[arg-type]
