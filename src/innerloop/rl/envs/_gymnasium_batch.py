"""``GymnasiumBatch``: a vector environment of Gymnasium, with tensors in and out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError, MissingExtraError
from innerloop.rl.envs._tensor_env import Box, Discrete, Transition, check_actions

MODES = ("NEXT_STEP", "SAME_STEP", "DISABLED")


class GymnasiumBatch:
    """Any ``gymnasium.vector.VectorEnv`` as running environments.

    The three kinds of autoreset are told apart: under ``NEXT_STEP`` (the default of Gymnasium 1.1
    and later) the step after the end of an episode only resets, ignores the action, and is marked
    by ``valid=False``; under ``SAME_STEP`` the last observation comes from ``info["final_obs"]``;
    under ``DISABLED`` the copies that ended are reset here.

    A simulator's state cannot be written to a file in general. `state_dict` keeps the seed and all
    actions since `reset`, and `load_state_dict` takes the same steps again and compares the last
    observation. That costs the time of these steps, and 8 bytes for each discrete action.

    Args:
        env: the vector environment.
        seed: passed to its ``reset``.

    Raises:
        InvalidInputError: it is no vector environment, says nothing of its autoreset, or its spaces
            are neither ``Box`` nor ``Discrete``.
        MissingExtraError: Gymnasium is not installed.
    """

    def __init__(self, env: Any, *, seed: int = 0) -> None:
        gymnasium = load_gymnasium()
        if not isinstance(env, gymnasium.vector.VectorEnv):
            raise InvalidInputError(
                f"{type(env).__name__} is no gymnasium.vector.VectorEnv: write "
                "gymnasium.make_vec('CartPole-v1', num_envs=8), or "
                "gymnasium.vector.SyncVectorEnv([lambda: env])"
            )
        mode = getattr(env.metadata.get("autoreset_mode"), "name", None)
        if mode not in MODES:
            raise InvalidInputError(
                f"{type(env).__name__} does not say how it resets, so the step after an episode "
                "may be one or none: set env.metadata['autoreset_mode'] to one of "
                "gymnasium.vector.AutoresetMode"
            )
        self.env, self.seed, self.mode = env, seed, mode
        self.num_envs: int = env.num_envs
        self._numpy = importlib.import_module("numpy")
        self.observation_space = self._space("observation", env.single_observation_space)
        space = self._space("action", env.single_action_space)
        self.action_space: Box | Discrete = space
        if isinstance(space, Discrete):
            self._start = int(env.single_action_space.start)
        else:
            self._bounds = [
                torch.as_tensor(bound).flatten().float()
                for bound in (env.single_action_space.low, env.single_action_space.high)
            ]
        if isinstance(self.observation_space, Discrete):
            self._one_hot = self.observation_space.n
            self._start_seen = int(env.single_observation_space.start)
            self.observation_space = Box(self._one_hot)
        else:
            self._one_hot = 0
        self._actions: list[Tensor] = []
        self._ended = torch.zeros(self.num_envs, dtype=torch.bool)
        self._seen: Tensor | None = None

    def reset(self) -> Tensor:
        """Start every copy anew, from the seed, and return the observations, ``[N, size]``."""
        observation, _ = self.env.reset(seed=self.seed)
        self._actions = []
        self._ended = torch.zeros(self.num_envs, dtype=torch.bool)
        self._seen = self._tensor(observation)
        return self._seen

    def step(self, action: Tensor) -> Transition:
        """Take one step of every copy; actions outside of a box are clipped to it.

        Raises:
            InvalidInputError: the actions do not fit the space, or ``reset`` was not called.
        """
        if self._seen is None:
            raise InvalidInputError("call reset() before the first step()")
        action = check_actions(action, self.action_space, self.num_envs).detach()
        self._actions.append(action)
        found = self.env.step(self._array(action))
        observation, reward, terminated, truncated, info = found
        seen = self._tensor(observation)
        ended = torch.as_tensor(terminated) | torch.as_tensor(truncated)
        valid = ~self._ended if self.mode == "NEXT_STEP" else torch.ones_like(ended)
        final = seen
        if self.mode == "SAME_STEP" and bool(ended.any()):
            final = seen.clone()
            for i in ended.nonzero().flatten().tolist():
                final[i] = self._tensor(self._numpy.asarray(info["final_obs"][i])[None])[0]
        if self.mode == "DISABLED" and bool(ended.any()):
            observation, _ = self.env.reset(options={"reset_mask": ended.numpy().copy()})
            seen = self._tensor(observation)
        self._ended, self._seen = ended, seen
        return Transition(
            seen,
            torch.as_tensor(reward).float(),
            torch.as_tensor(terminated).clone(),
            torch.as_tensor(truncated) & ~torch.as_tensor(terminated),
            final,
            valid,
        )

    def state_dict(self) -> dict[str, object]:
        """Return the seed, the actions since `reset`, and the last observation."""
        actions = torch.stack(self._actions) if self._actions else None
        return {"seed": self.seed, "actions": actions, "observation": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Reset from the seed and take the same steps again.

        Raises:
            InvalidInputError: they lead to another observation.
        """
        if state["observation"] is None:
            self._seen = None
            return
        self.seed = state["seed"]
        self.reset()
        for action in state["actions"] if state["actions"] is not None else ():
            self.step(action)
        if self._seen is None or not torch.equal(self._seen, state["observation"]):
            raise InvalidInputError(
                "the same seed and actions led to another observation: this environment is not "
                "the one that was saved, or draws from a generator that reset(seed=) does not set"
            )

    def _tensor(self, observation: Any) -> Tensor:
        # A copy: some environments write the next observation into the same array.
        seen = torch.tensor(self._numpy.asarray(observation))
        if self._one_hot:
            seen = torch.nn.functional.one_hot(seen.long() - self._start_seen, self._one_hot)
        return seen.reshape(self.num_envs if len(seen) == self.num_envs else 1, -1).float()

    def _array(self, action: Tensor) -> Any:
        space = self.env.single_action_space
        if isinstance(self.action_space, Discrete):
            return (action.numpy() + self._start).astype(space.dtype)
        clipped = action.clamp(*self._bounds).reshape(self.num_envs, *space.shape)
        return clipped.numpy().astype(space.dtype)

    def _space(self, what: str, space: Any) -> Any:
        if type(space).__name__ == "Discrete":
            return Discrete(int(space.n))
        if type(space).__name__ == "Box":
            size = int(self._numpy.prod(space.shape))
            if what == "observation":
                return Box(size)
            return Box(size, float(space.low.min()), float(space.high.max()))
        raise InvalidInputError(
            f"the {what} space is {space}: only Box and Discrete are known here; wrap the "
            "environment, for example with gymnasium.wrappers.vector.FlattenObservation"
        )


def load_gymnasium() -> ModuleType:
    """Import Gymnasium, with its vector environments.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        module = importlib.import_module("gymnasium")
        importlib.import_module("gymnasium.vector")
    except ImportError as error:
        raise MissingExtraError.of("gymnasium", "rl", "an environment of Gymnasium") from error
    return module
