"""Environments: batched tensor environments, and those of Gymnasium, with one interface."""

from innerloop.rl.envs._bandit import Bandit
from innerloop.rl.envs._batch import Batch, Environments
from innerloop.rl.envs._cartpole import CartPole
from innerloop.rl.envs._gymnasium_batch import GymnasiumBatch
from innerloop.rl.envs._half_cheetah import HalfCheetah
from innerloop.rl.envs._make import make, tensor_env
from innerloop.rl.envs._matrix_game import MatrixGame
from innerloop.rl.envs._navigation import Navigation
from innerloop.rl.envs._tabular_mdp import TabularMDP
from innerloop.rl.envs._tensor_env import Box, Discrete, TensorEnv, Transition, repeat
from innerloop.rl.envs._to_gymnasium import to_gymnasium

__all__ = [
    "Bandit",
    "Batch",
    "Box",
    "CartPole",
    "Discrete",
    "Environments",
    "GymnasiumBatch",
    "HalfCheetah",
    "MatrixGame",
    "Navigation",
    "TabularMDP",
    "TensorEnv",
    "Transition",
    "make",
    "repeat",
    "tensor_env",
    "to_gymnasium",
]
