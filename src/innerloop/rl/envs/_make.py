"""``make``: running environments from a name or an object."""

from __future__ import annotations

from typing import Any

from innerloop.errors import InvalidInputError
from innerloop.rl.envs._bandit import Bandit
from innerloop.rl.envs._batch import Batch, Environments
from innerloop.rl.envs._cartpole import CartPole
from innerloop.rl.envs._gymnasium_batch import GymnasiumBatch, load_gymnasium
from innerloop.rl.envs._half_cheetah import HalfCheetah
from innerloop.rl.envs._matrix_game import MatrixGame
from innerloop.rl.envs._navigation import Navigation
from innerloop.rl.envs._tabular_mdp import TabularMDP
from innerloop.rl.envs._tensor_env import TensorEnv

TENSOR_ENVS: dict[str, type[TensorEnv]] = {
    "bandit": Bandit,
    "cartpole": CartPole,
    "cheetah": HalfCheetah,
    "game": MatrixGame,
    "mdp": TabularMDP,
    "navigation": Navigation,
}


def tensor_env(name: str) -> TensorEnv:
    """Make a tensor environment by its name, with its defaults.

    Args:
        name: bandit, cartpole, cheetah, game, mdp or navigation.

    Raises:
        InvalidInputError: there is none of that name.
        MissingExtraError: it is the cheetah, and MuJoCo is not installed.

    Example:
        >>> from innerloop.rl import envs
        >>> envs.tensor_env("navigation").horizon
        100
    """
    if name not in TENSOR_ENVS:
        raise InvalidInputError(
            f"there is no tensor environment {name!r}: choose one of {', '.join(TENSOR_ENVS)}"
        )
    return TENSOR_ENVS[name]()


def make(env: Any, num_envs: int = 8, *, seed: int = 0) -> Environments:
    """Make N running environments.

    Args:
        env: the name of an environment of Gymnasium (``"CartPole-v1"``) or of a tensor environment
            (``"navigation"``), a `TensorEnv`, a ``gymnasium.vector.VectorEnv``, or environments
            that run already.
        num_envs: N; not used where ``env`` has its own number.
        seed: of the environments.

    Returns:
        `Batch` or `GymnasiumBatch`.

    Raises:
        InvalidInputError: there is no such environment.
        MissingExtraError: it is one of Gymnasium, which is not installed.

    Example:
        >>> from innerloop.rl import envs
        >>> envs.make("navigation", 4).action_space
        Box(size=2, low=-1.0, high=1.0)
    """
    if isinstance(env, (Batch, GymnasiumBatch)):
        return env
    if isinstance(env, TensorEnv):
        return Batch(env, num_envs, seed=seed)
    if isinstance(env, str) and env in TENSOR_ENVS:
        return Batch(tensor_env(env), num_envs, seed=seed)
    if not isinstance(env, str):
        return GymnasiumBatch(env, seed=seed)
    gymnasium = load_gymnasium()
    try:
        found = gymnasium.make_vec(env, num_envs=num_envs)
    except gymnasium.error.Error as error:
        raise InvalidInputError(
            f"Gymnasium cannot make {env!r} ({error}); tensor environments are "
            f"{', '.join(TENSOR_ENVS)}"
        ) from error
    return GymnasiumBatch(found, seed=seed)
