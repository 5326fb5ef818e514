"""Reinforcement learning: building blocks whose derivatives are right, for learners of learners."""

from innerloop.rl import envs, meta, ppo
from innerloop.rl._distributions import Categorical, Gaussian
from innerloop.rl._loss import PPOLoss, ppo_loss
from innerloop.rl._normalize import ObservationNormalizer, RewardNormalizer
from innerloop.rl._policy import ActorCritic
from innerloop.rl._returns import (
    Advantages,
    discounted_returns,
    gae,
    lambda_returns,
    next_values,
)
from innerloop.rl._rollout import Minibatch, Rollout, check_separate, minibatch_order
from innerloop.rl._surrogate import check_objective, score_term, surrogate

__all__ = [
    "ActorCritic",
    "Advantages",
    "Categorical",
    "Gaussian",
    "Minibatch",
    "ObservationNormalizer",
    "PPOLoss",
    "RewardNormalizer",
    "Rollout",
    "check_objective",
    "check_separate",
    "discounted_returns",
    "envs",
    "gae",
    "lambda_returns",
    "meta",
    "minibatch_order",
    "next_values",
    "ppo",
    "ppo_loss",
    "score_term",
    "surrogate",
]
