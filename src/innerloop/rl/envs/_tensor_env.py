"""``TensorEnv``: an environment whose copies are rows of tensors."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError

Tasks = Mapping[str, Tensor]
"""What differs between copies of an environment: tensors by name, ``[N, ...]``."""


class Discrete(NamedTuple):
    """Actions 0 to ``n - 1``, or observations that are such numbers."""

    n: int


class Box(NamedTuple):
    """Vectors of ``size`` numbers; actions are clipped to [low, high]."""

    size: int
    low: float = -float("inf")
    high: float = float("inf")


class Transition(NamedTuple):
    """What one step of N copies led to.

    Attributes:
        observation: the next one to act on, ``[N, ...]``; where an episode ended, the first one of
            the next episode (but see ``valid``).
        reward: ``[N]``.
        terminated: the episode ended for good, ``[N]``.
        truncated: the episode ended by a limit of time, ``[N]``.
        final_observation: what the step led to before any reset, ``[N, ...]``: a truncated episode
            would have gone on from here.
        valid: False where the environment only reset itself and ignored the action, ``[N]``.
    """

    observation: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    final_observation: Tensor
    valid: Tensor


class TensorEnv(abc.ABC):
    """An environment as pure functions on tensors: N copies are the first dimension.

    A state is a tensor ``[N, ...]``; what differs between copies (a goal, a payoff, the length of a
    pole) is in ``tasks``. `Batch` runs one with resets, `to_gymnasium` makes a
    ``gymnasium.vector.VectorEnv`` of it.
    """

    observation_space: Box
    action_space: Box | Discrete
    horizon: int
    """Steps after which an episode is truncated."""

    @abc.abstractmethod
    def sample_tasks(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw ``n`` tasks from their distribution."""

    @abc.abstractmethod
    def initial(self, tasks: Tasks, generator: torch.Generator | None = None) -> Tensor:
        """Draw a first state for each task, ``[N, ...]``."""

    @abc.abstractmethod
    def observe(self, state: Tensor) -> Tensor:
        """Return what an agent sees, ``[N, size]``."""

    @abc.abstractmethod
    def step(
        self, state: Tensor, action: Tensor, tasks: Tasks, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next state, the reward ``[N]``, and whether the episode terminated ``[N]``."""


def check_horizon(env: TensorEnv) -> None:
    """Raise if the environment ends before its first step."""
    if env.horizon < 1:
        raise InvalidInputError(
            f"horizon={env.horizon}: the environment ends at step 0, before there is a reward; "
            "write horizon=1 or more"
        )


def repeat(tasks: Tasks, times: int) -> dict[str, Tensor]:
    """Return tasks of which each stands ``times`` times in a row."""
    return {name: x.repeat_interleave(times, 0) for name, x in tasks.items()}


def choose(tasks: Tasks, index: Tensor | slice) -> dict[str, Tensor]:
    """Return some of the tasks."""
    return {name: x[index] for name, x in tasks.items()}


def count(tasks: Tasks) -> int:
    """Return how many tasks there are.

    Raises:
        InvalidInputError: none, or tensors of different lengths.
    """
    sizes = {name: x.shape[0] if x.ndim else 0 for name, x in tasks.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise InvalidInputError(
            f"tasks has {sizes or 'no entries'}: every entry has the tasks in its first dimension, "
            "for example {'goal': torch.zeros(20, 2)}"
        )
    return next(iter(sizes.values()))


def check_actions(action: Tensor, space: Box | Discrete, n: int) -> Tensor:
    """Return actions that fit the space, those of a box clipped to it.

    Raises:
        InvalidInputError: another shape, a discrete action out of range, or NaN.
    """
    shape = (n,) if isinstance(space, Discrete) else (n, space.size)
    if tuple(action.shape) != shape:
        raise InvalidInputError(
            f"actions have shape {tuple(action.shape)}, and {n} copies of this environment with "
            f"actions {space} take {shape}: the policy does not fit the action space"
        )
    if isinstance(space, Discrete):
        if action.is_floating_point() or bool(((action < 0) | (action >= space.n)).any()):
            raise InvalidInputError(
                f"actions must be whole numbers from 0 to {space.n - 1}: the policy does not fit "
                f"the action space {space}"
            )
        return action
    if bool(action.isnan().any()):
        raise InvalidInputError("an action is NaN: the policy diverged (lower the lr?)")
    return action.clamp(space.low, space.high)
