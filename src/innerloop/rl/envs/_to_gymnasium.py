"""``to_gymnasium``: a tensor environment as a vector environment of Gymnasium."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from innerloop.rl.envs._batch import Batch
from innerloop.rl.envs._gymnasium_batch import load_gymnasium
from innerloop.rl.envs._tensor_env import Box, Discrete, Tasks, TensorEnv


def to_gymnasium(env: TensorEnv, tasks: int | Tasks, *, seed: int = 0) -> Any:
    """Return N copies of a tensor environment as a ``gymnasium.vector.VectorEnv``.

    Its autoreset is ``SAME_STEP``. ``reset(seed=...)`` seeds it anew; the tasks stay.

    Args:
        env: the environment.
        tasks: one for each copy, or their number.
        seed: for the tasks, and for the first reset if that is given none.

    Raises:
        MissingExtraError: Gymnasium is not installed.
    """
    gymnasium = load_gymnasium()
    numpy = importlib.import_module("numpy")
    batch = Batch(env, tasks, seed=seed)

    def space_of(space: Box | Discrete) -> Any:
        if isinstance(space, Discrete):
            return gymnasium.spaces.Discrete(space.n)
        return gymnasium.spaces.Box(space.low, space.high, (space.size,), numpy.float32)

    # The class is made here, because its base exists only where Gymnasium is installed.
    class TensorVectorEnv(gymnasium.vector.VectorEnv):  # type: ignore[name-defined]
        """N copies of a tensor environment, with arrays in and out."""

        num_envs = batch.num_envs
        metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}  # noqa: RUF012
        single_observation_space = space_of(env.observation_space)
        single_action_space = space_of(env.action_space)
        observation_space = gymnasium.vector.utils.batch_space(single_observation_space, num_envs)
        action_space = gymnasium.vector.utils.batch_space(single_action_space, num_envs)

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[Any, dict[str, Any]]:
            """Start every copy anew."""
            super().reset(seed=seed)
            if seed is not None:
                batch.generator.manual_seed(seed)
            return batch.reset().numpy(), {}

        def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
            """Take one step of every copy."""
            found = batch.step(torch.as_tensor(actions))
            ended = (found.terminated | found.truncated).numpy()
            info: dict[str, Any] = {}
            if ended.any():
                final = numpy.full(batch.num_envs, None, dtype=object)
                for i in ended.nonzero()[0]:
                    final[i] = found.final_observation[i].numpy()
                info = {"final_obs": final, "_final_obs": ended}
            flags = found.terminated.numpy(), found.truncated.numpy()
            return found.observation.numpy(), found.reward.numpy(), *flags, info

    return TensorVectorEnv()
