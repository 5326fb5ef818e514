"""The half cheetah of MuJoCo, which is to run forwards or backwards, or at a given speed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError, MissingExtraError
from innerloop.rl.envs._gymnasium_batch import load_gymnasium
from innerloop.rl.envs._tensor_env import Box, Tasks, TensorEnv

POSITIONS, SUBSTEPS, DT = 9, 5, 0.05


class HalfCheetah(TensorEnv):
    r"""HalfCheetah-v5 of Gymnasium with tasks (Finn et al., "Model-agnostic meta-learning", 2017).

    The body, the actuators, the observation (17 numbers: all but the position x) and the cost of
    actions are Gymnasium's. With the speed v over one step of .05 s,

    .. math::
        r = d\, v - \tfrac1{10} \lVert a \rVert^2
        \qquad\text{or}\qquad
        r = -\lvert v - g \rvert - \tfrac1{10} \lVert a \rVert^2

    for a direction d of 1 or -1, or a goal g uniform in [0, 2] m/s. All copies are simulated by one
    call of ``mujoco.rollout`` for each step; episodes are truncated at the horizon.

    Args:
        task: ``"direction"`` or ``"velocity"``.
        horizon: steps in an episode.

    Raises:
        InvalidInputError: another task.
        MissingExtraError: MuJoCo or Gymnasium is not installed.

    Cost:
        About 40 microseconds for each step of each copy.

    Example:
        >>> import pytest
        >>> _ = pytest.importorskip("mujoco")
        >>> from innerloop.rl.envs import HalfCheetah
        >>> env = HalfCheetah("velocity")
        >>> tasks = env.sample_tasks(3)
        >>> env.observe(env.initial(tasks)).shape
        torch.Size([3, 17])
    """

    observation_space = Box(17)
    action_space = Box(6, -1.0, 1.0)

    def __init__(
        self, task: Literal["direction", "velocity"] = "direction", horizon: int = 200
    ) -> None:
        if task not in ("direction", "velocity"):
            raise InvalidInputError(f"task={task!r}: write 'direction' or 'velocity'")
        self.task, self.horizon = task, horizon
        mujoco = _load_mujoco()
        assets = Path(str(load_gymnasium().__file__)).parent / "envs" / "mujoco" / "assets"
        self._rollout = importlib.import_module("mujoco.rollout").rollout
        self._model = mujoco.MjModel.from_xml_path(str(assets / "half_cheetah.xml"))
        self._data = mujoco.MjData(self._model)

    def sample_tasks(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        draw = torch.rand(n, generator=generator)
        if self.task == "direction":
            return {"direction": torch.where(draw < 0.5, -1.0, 1.0)}
        return {"velocity": 2 * draw}

    def initial(self, tasks: Tasks, generator: torch.Generator | None = None) -> Tensor:
        n = len(next(iter(tasks.values())))
        shape = (n, POSITIONS)
        positions = 0.2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.1
        speeds = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.cat([positions, speeds], -1)

    def observe(self, state: Tensor) -> Tensor:
        return state[:, 1:].float()

    def step(
        self, state: Tensor, action: Tensor, tasks: Tasks, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        action = action.clamp(-1, 1)
        start = torch.cat([torch.zeros_like(state[:, :1]), state], -1)  # the time comes first
        control = action.double().unsqueeze(1).repeat(1, SUBSTEPS, 1)
        states, _ = self._rollout(self._model, self._data, start.numpy(), control.numpy())
        after = torch.from_numpy(states[:, -1, 1:].copy())
        speed = ((after[:, 0] - state[:, 0]) / DT).float()
        cost = 0.1 * action.square().sum(-1)
        if self.task == "direction":
            reward = tasks["direction"] * speed - cost
        else:
            reward = -(speed - tasks["velocity"]).abs() - cost
        return after, reward, torch.zeros(len(state), dtype=torch.bool)


def _load_mujoco() -> ModuleType:
    """Import MuJoCo.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module("mujoco")
    except ImportError as error:
        raise MissingExtraError.of("mujoco", "mujoco", "the half cheetah") from error
