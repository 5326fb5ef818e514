"""A PPO inner loop as one writes it with torch.optim alone, for finite differences. Nothing here
imports innerloop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.oracles import Params, smooth_noise

STEPS, ENVIRONMENTS = 4, 8
HYPER = {
    "lr": 0.05,
    "gamma": 0.9,
    "lam": 0.8,
    "clip": 0.2,
    "entropy_coef": 0.05,
    "value_coef": 0.7,
}
EPS = 1e-5


class ActorCritic(nn.Module):
    """Two networks, three observations, three actions."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        with torch.no_grad():
            for i, p in enumerate(self.double().parameters()):
                p.copy_(0.8 * smooth_noise(*p.shape, phase=20.0 + i))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(observations), self.critic(observations).squeeze(-1)


class Data(NamedTuple):
    """What a rollout stores, time first, all constants."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    log_probs: Tensor
    values: Tensor
    last_value: Tensor
    terminated: Tensor


def data(task: int = 0) -> Data:
    """Made-up data; the old log-probabilities are those of a policy that differs from the model's,
    so that some ratios are clipped and some are not."""
    phase = 100.0 * task
    shape = (STEPS, ENVIRONMENTS)
    observations = 1.5 * smooth_noise(*shape, 3, phase=phase)
    actions = (1.5 * (1 + smooth_noise(*shape, phase=phase + 1))).long().clamp(0, 2)
    with torch.no_grad():
        logits, values = ActorCritic()(observations)
        logits = logits + 0.25 * smooth_noise(*logits.shape, phase=phase + 2)
        log_probs = logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return Data(
        observations,
        actions,
        rewards=smooth_noise(*shape, phase=phase + 3),
        log_probs=log_probs,
        values=values + 0.3 * smooth_noise(*shape, phase=phase + 4),
        last_value=smooth_noise(ENVIRONMENTS, phase=phase + 5),
        terminated=smooth_noise(*shape, phase=phase + 6) > 0.8,
    )


def order(epochs: int) -> Tensor:
    """Fixed permutations of all steps, ``[epochs, 32]``."""
    return smooth_noise(epochs, STEPS * ENVIRONMENTS, phase=7.0).argsort(1)


def advantages(d: Data, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates, step by step."""
    found, following, value = [], torch.zeros_like(d.last_value), d.last_value
    for t in reversed(range(STEPS)):
        goes_on = 1.0 - d.terminated[t].double()
        following = d.rewards[t] + gamma * goes_on * (value + lam * following) - d.values[t]
        value = d.values[t]
        found.append(following)
    return torch.stack(found[::-1])


class Margins(NamedTuple):
    """How near the ratios of a run came to the edges of the clip range, and how many were beyond
    an edge where that counts."""

    nearest: float
    clipped: int
    total: int


class Run(NamedTuple):
    """The trained model, the losses of all steps, and `Margins`."""

    model: ActorCritic
    losses: Tensor
    margins: Margins


def run(d: Data, params: Params, hyper: dict[str, float], epochs: int, size: int) -> Run:
    """Train by PPO with torch.optim.Adam from these parameters."""
    model = ActorCritic()
    model.load_state_dict({name: p.detach() for name, p in params.items()})
    optimizer = torch.optim.Adam(model.parameters(), lr=hyper["lr"], eps=EPS)
    gae = advantages(d, hyper["gamma"], hyper["lam"])
    flat = [x.flatten(0, 1) for x in (d.observations, d.actions, d.log_probs, gae, gae + d.values)]
    nearest, clipped, total, losses = float("inf"), 0, 0, []
    for row in order(epochs):
        for at in row.split(size):
            observations, actions, old, a, returns = (x[at] for x in flat)
            a = (a - a.mean()) / (a.std() + 1e-8)
            logits, values = model(observations)
            policy = torch.distributions.Categorical(logits=logits)
            ratio = (policy.log_prob(actions) - old).exp()
            low, high = 1 - hyper["clip"], 1 + hyper["clip"]
            gain = torch.min(ratio * a, ratio.clamp(low, high) * a).mean()
            error = ((values - returns) ** 2).mean() / 2
            loss = (
                -gain
                + hyper["value_coef"] * error
                - hyper["entropy_coef"] * policy.entropy().mean()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            with torch.no_grad():
                edges = torch.stack([ratio - low, ratio - high]).abs().min().item()
                nearest = min(nearest, edges)
                clipped += int((((ratio > high) & (a > 0)) | ((ratio < low) & (a < 0))).sum())
                total += len(at)
    return Run(model, torch.stack(losses), Margins(nearest, clipped, total))


def outer(outputs: tuple[Tensor, Tensor], losses: Tensor) -> Tensor:
    """A smooth function of both networks' outputs behind the loop and of the losses on the way."""
    logits, values = outputs
    weights = smooth_noise(*logits.shape, phase=55.0)
    on_the_way = (smooth_noise(*losses.shape, phase=56.0) * losses).sum()
    return (weights * logits.log_softmax(-1)).sum() + (values - 0.5).square().mean() + on_the_way


def other(d: Data) -> Tensor:
    """Observations on which the outer loss is evaluated."""
    return d.observations + 0.3


def start() -> Params:
    return {name: p.detach().clone() for name, p in ActorCritic().named_parameters()}


def hyper_tensors() -> Params:
    return {name: torch.tensor(x, dtype=torch.float64) for name, x in HYPER.items()}


def outer_after(at: tuple[Params, Params], d: Data, epochs: int, size: int) -> float:
    """The outer loss behind a whole plain run, as a function of parameters and hyper-parameters."""
    params, hyper = at
    found = run(d, params, {name: float(x) for name, x in hyper.items()}, epochs, size)
    with torch.no_grad():
        return outer(found.model(other(d)), found.losses).item()
