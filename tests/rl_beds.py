"""Small decision problems whose expected returns are known exactly, with every derivative. Nothing
here imports innerloop.

Bed A is a bandit, bed B a process with two states; all outcomes of both can be enumerated. Bed C is
too large for that, but its value is the solution of a linear system.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

# -- bed A: three arms, softmax policy, one gradient step of size 1 --------------------------------

ARMS = torch.tensor([1.0, 0.3, -0.5], dtype=torch.float64)
BANDIT_THETA = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)


def bandit_return(theta: Tensor) -> Tensor:
    return (theta.softmax(0) * ARMS).sum()


def pulls(n: int) -> Tensor:
    """All outcomes of n pulls, ``[3^n, n]``."""
    return torch.tensor(list(itertools.product(range(3), repeat=n)))


def pull_log_probs(theta: Tensor, arms: Tensor) -> Tensor:
    return theta.log_softmax(0)[arms]


def expected_objective(theta: Tensor) -> Tensor:
    """I: the return behind a step along the expected gradient."""
    return bandit_return(theta + torch.func.grad(bandit_return)(theta))


def sampled_objective(theta: Tensor, n: int) -> Tensor:
    """II: the expected return behind a step along the gradient that n pulls estimate, which is
    written out: the gradient of log softmax is one-hot minus probabilities."""
    arms = pulls(n)
    score = torch.eye(3, dtype=torch.float64)[arms] - theta.softmax(0)
    step = (ARMS[arms].unsqueeze(-1) * score).mean(1)
    probability = pull_log_probs(theta, arms).sum(1).exp()
    return (probability * ((theta + step).softmax(1) @ ARMS)).sum()


# -- bed B: two states, two actions, three steps ---------------------------------------------------

HORIZON, GAMMA = 3, 0.9
MOVES = torch.tensor([[[0.7, 0.3], [0.2, 0.8]], [[0.9, 0.1], [0.4, 0.6]]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, 0.0], [-0.5, 2.0]], dtype=torch.float64)
START = torch.tensor([0.6, 0.4], dtype=torch.float64)
TABLE_THETA = torch.tensor([0.3, -0.2, -0.4, 0.5], dtype=torch.float64)


def table_values(theta: Tensor) -> list[Tensor]:
    """The value of both states with 3, 2, 1 and 0 steps to go."""
    policy, found = theta.view(2, 2).softmax(1), [torch.zeros(2, dtype=torch.float64)]
    for _ in range(HORIZON):
        found.append((policy * (REWARDS + GAMMA * MOVES @ found[-1])).sum(1))
    return found[::-1]


def table_return(theta: Tensor) -> Tensor:
    return (START * table_values(theta)[0]).sum()


class Episodes(NamedTuple):
    """All 128 episodes, time first: states ``[4, 128]``, actions and rewards ``[3, 128]``, the
    probability of what the environment did, ``[128]``."""

    states: Tensor
    actions: Tensor
    rewards: Tensor
    environment: Tensor


def episodes() -> Episodes:
    runs = torch.tensor(list(itertools.product(range(2), repeat=2 * HORIZON + 1))).T
    states, actions = runs[::2], runs[1::2]
    moves = MOVES[states[:-1], actions, states[1:]].prod(0)
    return Episodes(states, actions, REWARDS[states[:-1], actions], START[states[0]] * moves)


def table_log_probs(theta: Tensor, runs: Episodes) -> Tensor:
    return theta.view(2, 2).log_softmax(1)[runs.states[:-1], runs.actions]


def values_on_the_way(theta: Tensor, runs: Episodes) -> Tensor:
    """The value of each visited state, with what is left of the episode, ``[4, 128]``."""
    return torch.stack([v[s] for v, s in zip(table_values(theta), runs.states, strict=True)])


# -- bed C: five states, four actions, fifty steps -------------------------------------------------

LONG, LONG_GAMMA = 50, 0.95


class Chain(NamedTuple):
    """Transition probabilities ``[A, S, S]``, rewards ``[S]``, logits ``[A, S]``."""

    moves: Tensor
    rewards: Tensor
    theta: Tensor


def chain(states: int = 5, actions: int = 4) -> Chain:
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    moves = torch.distributions.Dirichlet(torch.ones(states)).sample((actions, states)).double()
    rewards = ((torch.randn(states) + 5) * 10).double()
    theta = torch.randn(actions, states).double()
    torch.set_rng_state(generator_state)
    return Chain(moves, rewards, theta)


def chain_values(c: Chain, theta: Tensor) -> Tensor:
    """The values V = (1 - γ P)^-1 r of an endless episode."""
    moves = torch.einsum("as,asp->sp", theta.softmax(0), c.moves)
    return torch.linalg.solve(torch.eye(len(moves)).double() - LONG_GAMMA * moves, c.rewards)


def walk(c: Chain, episodes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample states ``[51, episodes]`` and actions ``[50, episodes]`` from a uniform start."""
    policy, states, actions = c.theta.softmax(0).T, [], []
    s = torch.randint(len(c.rewards), (episodes,), generator=generator)
    for _ in range(LONG):
        a = torch.multinomial(policy[s], 1, generator=generator)[:, 0]
        states.append(s)
        actions.append(a)
        s = torch.multinomial(c.moves[a, s], 1, generator=generator)[:, 0]
    return torch.stack([*states, s]), torch.stack(actions)
