"""Repeated games of two players with two actions each, such as the prisoner's dilemma."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from innerloop.errors import InvalidInputError
from innerloop.rl.envs._tensor_env import Box, Discrete, Tasks, TensorEnv

PRISONERS_DILEMMA = ((-1.0, -3.0), (0.0, -2.0))
"""The row player's reward; action 0 cooperates, 1 defects."""


class MatrixGame(TensorEnv):
    """A symmetric game with two actions, played again and again.

    An observation is one of five one-hot vectors: the start, or who did what in the last round (CC,
    CD, DC, DD from the player's own point of view). As an environment for one player the opponent
    is the task: its probability of action 0 in each of the five states, seen from its own side.
    `play` is the game of two learners, and `returns` its exact value.

    Args:
        payoff: the row player's reward for its action and the other's, 2 x 2.
        horizon: rounds in an episode.

    Example:
        Two players who always defect get -2 in each round of the prisoner's dilemma.

        >>> import torch
        >>> from innerloop.rl.envs import MatrixGame
        >>> game, defect = MatrixGame(), torch.full((5,), -50.0)
        >>> [round(value.item(), 3) for value in game.returns(defect, defect, gamma=0.96)]
        [-2.0, -2.0]
    """

    observation_space, action_space = Box(5), Discrete(2)

    def __init__(
        self,
        payoff: tuple[tuple[float, float], tuple[float, float]] = PRISONERS_DILEMMA,
        horizon: int = 150,
    ) -> None:
        self.payoff, self.horizon = torch.tensor(payoff), horizon

    def sample_tasks(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"opponent": torch.rand(n, 5, generator=generator)}

    def initial(self, tasks: Tasks, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros(len(tasks["opponent"]), dtype=torch.long)

    def observe(self, state: Tensor) -> Tensor:
        return F.one_hot(state, 5).float()

    def step(
        self, state: Tensor, action: Tensor, tasks: Tasks, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        chance = tasks["opponent"].gather(-1, mirrored(state).unsqueeze(-1)).squeeze(-1)
        other = 1 - torch.bernoulli(chance, generator=generator).long()
        state, reward, _ = self.play(action, other)
        return state, reward, torch.zeros(len(state), dtype=torch.bool)

    def play(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the state as the first player sees it, and the rewards of both players."""
        return 1 + 2 * first + second, self.payoff[first, second], self.payoff[second, first]

    def returns(self, first: Tensor, second: Tensor, *, gamma: float) -> tuple[Tensor, Tensor]:
        r"""Compute the exact mean discounted reward of both players, differentiable in both.

        With the chances :math:`p_0` of the first round and P of the others,
        :math:`(1 - \gamma)\, p_0^\top (I - \gamma P)^{-1} r`.

        Args:
            first: logits of action 0 in the five states (start, CC, CD, DC, DD), ``[..., 5]``.
            second: those of the other player, whose CD is the first one's DC.
            gamma: the discount, below 1.
        """
        if not 0 <= gamma < 1:
            raise InvalidInputError(f"gamma={gamma} must be in [0, 1): the game has no end")
        p, q = first.sigmoid(), second.sigmoid()[..., mirrored(torch.arange(5))]
        joint = torch.stack([p * q, p * (1 - q), (1 - p) * q, (1 - p) * (1 - q)], -1)
        start, chances = joint[..., 0, :], joint[..., 1:, :]
        weights = torch.linalg.solve(
            torch.eye(4).to(p) - gamma * chances.mT, start.unsqueeze(-1)
        ).squeeze(-1)
        rewards = torch.stack([self.payoff.flatten(), self.payoff.T.flatten()], -1).to(p)
        own, other = ((1 - gamma) * weights @ rewards).unbind(-1)
        return own, other


def mirrored(state: Tensor) -> Tensor:
    """Return the states as the other player sees them: CD and DC change places."""
    return torch.tensor([0, 1, 3, 2, 4])[state]
