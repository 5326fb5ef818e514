"""Returns and advantages: what the rewards of a rollout say about its actions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError
from innerloop.rl._checks import check_shape, check_time_first, per_step
from innerloop.rl._scan import Number, number_where_not, scan, where_not


class Advantages(NamedTuple):
    """Advantages and the returns that a critic is fitted to.

    Attributes:
        advantages: how much better than its value each step was, ``[T, ...]``.
        returns: ``advantages + values``, the λ-returns, ``[T, ...]``.
    """

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    last_value: Tensor,
    *,
    gamma: Number,
    lam: Number,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
) -> Advantages:
    r"""Compute generalised advantage estimates, differentiable in every argument.

    .. math::
        \delta_t &= r_t + \gamma_t\, V(s_{t+1}) - V(s_t) \\
        A_t &= \delta_t + \gamma_t \lambda_t\, A_{t+1}

    (Schulman et al., "High-dimensional continuous control using generalized advantage estimation",
    2016). Where an episode terminates, nothing follows: :math:`V(s_{t+1}) = 0`. Where it is
    truncated, by a time limit say, it would have gone on, so the value of its last state counts.
    At both, :math:`A_{t+1}` belongs to the next episode and is left out.

    Args:
        rewards: ``[T, ...]``, time first.
        values: :math:`V(s_t)` of the state in which step t was taken, ``[T, ...]``.
        last_value: the value of the state after the last step, ``[...]``.
        gamma: the discount of what follows a step: a number, a 0-dim tensor, one value per step
            ``[T]``, or anything that broadcasts to the rewards with time first.
        lam: the λ of the estimate, in the same forms; 0 for one-step advantages, 1 for the whole
            return.
        terminated: True where step t ended its episode for good, ``[T, ...]``.
        truncated: True where step t ended its episode by a limit, ``[T, ...]``.
        final_values: the value of the state that step t led to, ``[T, ...]``; read where truncated
            only. If a rollout keeps that state in its next row (Gymnasium's ``NEXT_STEP``
            autoreset), these are `next_values(values, last_value) <next_values>`.

    Returns:
        `Advantages`: ``advantages`` and ``returns``. Detach what an update should hold constant;
        here nothing is.

    Raises:
        InvalidInputError: shapes that differ, flags that are not boolean, ``truncated`` without
            ``final_values``, a number outside of [0, 1].

    Cost:
        T small operations, one after the other.

    Example:
        With λ = 1 and values of 0 the advantage is the discounted return, here 1 + .5 · 2 + .25 ·
        4, whose derivative by γ is 2 + 2γ · 4.

        >>> import torch
        >>> from innerloop.rl import gae
        >>> gamma = torch.tensor(0.5, requires_grad=True)
        >>> found = gae(
        ...     torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3), torch.zeros(()), gamma=gamma, lam=1.0
        ... )
        >>> found.advantages.tolist()
        [3.0, 4.0, 4.0]
        >>> torch.autograd.grad(found.advantages[0], gamma)
        (tensor(6.),)
    """
    gamma, lam, ended = _checked(
        rewards, values, last_value, gamma, lam, terminated, truncated, final_values
    )
    after = _value_after(values, last_value, terminated, truncated, final_values)
    delta = rewards + gamma * after - values
    decay = number_where_not(ended, gamma * lam, rewards)
    advantages = scan(delta, decay, torch.zeros_like(last_value), reverse=True)
    return Advantages(advantages, advantages + values)


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    last_value: Tensor,
    *,
    gamma: Number,
    lam: Number,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
) -> Tensor:
    r"""Compute λ-returns, the targets of TD(λ), differentiable in every argument.

    .. math::
        G_t = r_t + \gamma_t \left[(1 - \lambda_t)\, V(s_{t+1}) + \lambda_t\, G_{t+1}\right],
        \qquad G_T = V(s_T)

    (Sutton & Barto, "Reinforcement learning", 2nd ed. 2018, section 12.3). They equal the
    ``returns`` of `gae`.

    Args:
        rewards: ``[T, ...]``, time first.
        values: :math:`V(s_t)` of the state in which step t was taken, ``[T, ...]``.
        last_value: the value of the state after the last step, ``[...]``.
        gamma: as in `gae`.
        lam: as in `gae`.
        terminated: as in `gae`.
        truncated: as in `gae`.
        final_values: as in `gae`.

    Returns:
        :math:`G_t`, ``[T, ...]``.

    Raises:
        InvalidInputError: as in `gae`.

    Example:
        With λ = 0 each return is the reward and the discounted next value.

        >>> import torch
        >>> from innerloop.rl import lambda_returns
        >>> rewards, values = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])
        >>> lambda_returns(rewards, values, torch.tensor(8.0), gamma=0.5, lam=0.0).tolist()
        [4.0, 6.0]
    """
    gamma, lam, ended = _checked(
        rewards, values, last_value, gamma, lam, terminated, truncated, final_values
    )
    after = gamma * _value_after(values, last_value, terminated, truncated, final_values)
    # Where an episode ends there is no later return to mix in: the whole weight is on the value.
    inputs = rewards + after * (1 - number_where_not(ended, lam, rewards))
    return scan(inputs, number_where_not(ended, gamma * lam, rewards), last_value, reverse=True)


def discounted_returns(
    rewards: Tensor,
    last_value: Tensor | None = None,
    *,
    gamma: Number,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
) -> Tensor:
    r"""Compute the discounted sum of the rewards from each step on.

    .. math:: G_t = r_t + \gamma_t\, G_{t+1}, \qquad G_T = V(s_T)

    Args:
        rewards: ``[T, ...]``, time first.
        last_value: the value of the state after the last step, ``[...]``; default 0.
        gamma: as in `gae`.
        terminated: as in `gae`.
        truncated: as in `gae`.
        final_values: as in `gae`.

    Returns:
        :math:`G_t`, ``[T, ...]``.

    Raises:
        InvalidInputError: as in `gae`.

    Example:
        >>> import torch
        >>> from innerloop.rl import discounted_returns
        >>> discounted_returns(torch.tensor([1.0, 2.0, 4.0]), gamma=0.5).tolist()
        [3.0, 4.0, 4.0]
    """
    check_time_first("rewards", rewards)
    last = torch.zeros_like(rewards[0]) if last_value is None else last_value
    gamma, _, ended = _checked(rewards, None, last, gamma, 1.0, terminated, truncated, final_values)
    inputs = rewards
    if truncated is not None and final_values is not None:
        bootstraps = truncated if terminated is None else truncated & ~terminated
        inputs = rewards + number_where_not(~bootstraps, gamma * final_values, rewards)
    return scan(inputs, number_where_not(ended, gamma, rewards), last, reverse=True)


def next_values(values: Tensor, last_value: Tensor) -> Tensor:
    r"""Return the value in the next row of each step.

    That is :math:`V(s_{t+1})` for every step whose next row continues its episode. For a step that
    ended one, it is the value of the state that the step led to if the rollout keeps that state in
    its next row, as under Gymnasium's ``NEXT_STEP`` autoreset, and the value of a new episode's
    first state otherwise.

    Args:
        values: ``[T, ...]``.
        last_value: ``[...]``.

    Returns:
        ``[T, ...]``: ``values`` moved up by one row, with ``last_value`` at the end.

    Raises:
        InvalidInputError: the shapes do not fit.

    Example:
        >>> import torch
        >>> from innerloop.rl import next_values
        >>> next_values(torch.tensor([1.0, 2.0]), torch.tensor(3.0)).tolist()
        [2.0, 3.0]
    """
    check_time_first("values", values)
    check_shape("last_value", last_value, values[0], "a row of values")
    return torch.cat([values[1:], last_value.unsqueeze(0)])


def _checked(
    rewards: Tensor,
    values: Tensor | None,
    last_value: Tensor,
    gamma: Number,
    lam: Number,
    terminated: Tensor | None,
    truncated: Tensor | None,
    final_values: Tensor | None,
) -> tuple[Number, Number, Tensor | None]:
    """Return γ and λ in a form that broadcasts, and where episodes end; raise if shapes differ."""
    check_time_first("rewards", rewards)
    check_shape("values", values, rewards, "rewards")
    check_shape("last_value", last_value, rewards[0], "a row of rewards")
    check_shape("terminated", terminated, rewards, "rewards", flag=True)
    check_shape("truncated", truncated, rewards, "rewards", flag=True)
    check_shape("final_values", final_values, rewards, "rewards")
    if truncated is not None and final_values is None:
        raise InvalidInputError(
            "truncated is given without final_values: an episode that was cut short is worth what "
            "its last state is worth, and the next row of values may belong to a new episode. "
            "Write final_values=the values of the last observations; or, if the rollout keeps "
            "these observations in its next rows (Gymnasium's NEXT_STEP autoreset), "
            "final_values=innerloop.rl.next_values(values, last_value)"
        )
    if terminated is None or truncated is None:
        ended = truncated if terminated is None else terminated
    else:
        ended = terminated | truncated
    return per_step("gamma", gamma, rewards), per_step("lam", lam, rewards), ended


def _value_after(
    values: Tensor,
    last_value: Tensor,
    terminated: Tensor | None,
    truncated: Tensor | None,
    final_values: Tensor | None,
) -> Tensor:
    """Return the value of the state that each step led to, 0 where it terminated."""
    after = next_values(values, last_value)
    if truncated is not None and final_values is not None:
        after = torch.where(truncated, final_values, after)
    if terminated is not None:
        after = where_not(terminated, after)
    return after
