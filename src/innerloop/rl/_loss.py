"""The loss of proximal policy optimisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError
from innerloop.optim.helpers import safe_sqrt
from innerloop.rl._checks import check_constant, check_log_probs, check_shape
from innerloop.rl._scan import Number, where_not


class PPOLoss(NamedTuple):
    r"""The loss of one minibatch, its parts, and what one watches during training.

    All are scalars; those from ``approx_kl`` on are detached.

    Attributes:
        loss: ``policy + value_coef * value - entropy_coef * entropy``: minimise it.
        policy: the clipped surrogate, with a minus sign.
        value: half the mean squared error of the critic; 0 without ``values``.
        entropy: the mean entropy of the policy; 0 without ``entropy``.
        approx_kl: the mean of :math:`r - 1 - \log r` for probability ratios r, an estimate of
            the KL divergence of the old policy from the new one (Schulman, "Approximating KL
            divergence", 2020, k3).
        clip_fraction: the fraction of ratios outside of [1 - clip, 1 + clip].
        explained_variance: 1 - Var(returns - values) / Var(returns), of the old values if given:
            1 for a perfect critic, 0 for one that is no better than a constant; NaN without
            ``values``, or if all returns are equal.
    """

    loss: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    explained_variance: Tensor


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    values: Tensor | None = None,
    returns: Tensor | None = None,
    old_values: Tensor | None = None,
    entropy: Tensor | None = None,
    clip: Number = 0.2,
    value_clip: Number | None = None,
    value_coef: Number = 0.5,
    entropy_coef: Number = 0.0,
    normalize: bool = True,
    mask: Tensor | None = None,
) -> PPOLoss:
    r"""Compute the PPO loss of a minibatch, differentiable in every argument that is not old.

    With the ratio :math:`r = \exp(\log\pi(a|s) - \log\pi_\text{old}(a|s))`, the clip range
    :math:`\epsilon`, the entropy H and the returns G,

    .. math::
        L = -\overline{\min\left(r A,\; \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon)\, A\right)}
            + c_v\, \tfrac12 \overline{(V - G)^2} - c_e\, \overline{H}

    (Schulman et al., "Proximal policy optimization algorithms", 2017). With ``value_clip`` the
    error of the critic is the larger one of that of V and of V clipped to that distance from the
    old values. Where a ratio is clipped its sample contributes nothing to the policy's gradient; a
    minibatch with all of them clipped has the gradient zero, and no NaN in any derivative.

    Args:
        log_probs: of the actions under the present policy, summed over action dimensions,
            ``[...]``.
        old_log_probs: as they were when the actions were taken: constants.
        advantages: ``[...]``, not normalised yet if ``normalize``.
        values: of the critic at present, ``[...]``; None for a loss without critic.
        returns: what the critic is fitted to, ``[...]``.
        old_values: as they were when the actions were taken, ``[...]``: constants, needed for
            ``value_clip``.
        entropy: of the policy in each state, ``[...]``.
        clip: :math:`\epsilon`; this, ``value_clip`` and the coefficients may be tensors with
            gradients.
        value_clip: the clip range of the values; None for none.
        value_coef: :math:`c_v`.
        entropy_coef: :math:`c_e`.
        normalize: True to give the advantages mean 0 and standard deviation 1 in this minibatch;
            that is differentiated too.
        mask: False for samples that do not count, ``[...]``.

    Returns:
        `PPOLoss`.

    Raises:
        InvalidInputError: shapes that differ, log-probabilities that keep the action dimension, old
            ones that require grad, a minibatch too small to normalise.

    Example:
        Ratios of 1 and 1.5 with advantages of 1: the second is clipped to 1.2.

        >>> import torch
        >>> from innerloop.rl import ppo_loss
        >>> new = torch.tensor([1.0, 1.5]).log().requires_grad_()
        >>> found = ppo_loss(new, torch.zeros(2), torch.ones(2), normalize=False)
        >>> found.policy.item(), found.clip_fraction.item()
        (-1.100000023841858, 0.5)
        >>> torch.autograd.grad(found.loss, new)[0].tolist()
        [-0.5, 0.0]
    """
    check_log_probs(log_probs, advantages, "advantages")
    check_constant("old_log_probs", old_log_probs)
    check_constant("old_values", old_values)
    named = {
        "old_log_probs": old_log_probs,
        "values": values,
        "returns": returns,
        "old_values": old_values,
        "entropy": entropy,
    }
    for name, x in named.items():
        check_shape(name, x, log_probs, "log_probs")
    check_shape("mask", mask, log_probs, "log_probs", flag=True)
    if (values is None) != (returns is None):
        given, missing = ("values", "returns") if returns is None else ("returns", "values")
        raise InvalidInputError(f"{given} is given without {missing}: the critic's loss needs both")
    if value_clip is not None and old_values is None:
        raise InvalidInputError(
            "value_clip needs old_values, the values that the rollout stored: pass them, or "
            "value_clip=None"
        )
    if mask is not None:
        # Zeros where nothing counts: there may be NaN, which a product with 0 would keep.
        log_probs, old_log_probs, advantages = (
            where_not(~mask, x) for x in (log_probs, old_log_probs, advantages)
        )
        values, returns, old_values, entropy = (
            None if x is None else where_not(~mask, x)
            for x in (values, returns, old_values, entropy)
        )
    if normalize:
        advantages = normalized(advantages, mask)
    policy, approx_kl, clip_fraction = _policy(log_probs - old_log_probs, advantages, clip, mask)
    zero = policy.new_zeros(())
    value = zero if values is None else _value(values, returns, old_values, value_clip, mask)
    mean_entropy = zero if entropy is None else _mean(entropy, mask)
    loss = policy
    if values is not None:
        loss = loss + value_coef * value
    if entropy is not None:
        loss = loss - entropy_coef * mean_entropy
    fit = old_values if old_values is not None else values
    explained = zero + float("nan") if fit is None else _explained(fit, returns, mask)
    return PPOLoss(loss, policy, value, mean_entropy, approx_kl, clip_fraction, explained)


def normalized(advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Return :math:`(A - \mathrm{mean}(A)) / (\mathrm{std}(A) + 10^{-8})`.

    The standard deviation is that of a sample, with n - 1. Where all advantages are equal they
    become 0, with finite derivatives.
    """
    if advantages.numel() < 2:
        raise InvalidInputError(
            "a minibatch of one advantage has no standard deviation, and would be normalised to 0: "
            "use larger minibatches, or write normalize=False"
        )
    centred = advantages - _mean(advantages, mask)
    if mask is None:
        variance = centred.square().sum() / (advantages.numel() - 1)
    else:
        variance = where_not(~mask, centred).square().sum() / (mask.sum() - 1).clamp_min(1)
    return centred / (safe_sqrt(variance) + 1e-8)


def _policy(
    log_ratio: Tensor, advantages: Tensor, clip: Number, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the policy's loss, the approximate KL divergence and the fraction clipped."""
    with torch.no_grad():
        now = log_ratio.detach().exp()
        above, below = now > 1 + clip, now < 1 - clip
        clipped = (above & (advantages > 0)) | (below & (advantages < 0))
        approx_kl = _mean(now - 1 - log_ratio.detach(), mask)
        clip_fraction = _mean((above | below).to(now), mask)
    # Not torch.minimum: a ratio that overflows would send 0 · inf = NaN back from where it is
    # clipped, and a tie would be split between both arguments.
    ratio = torch.where(clipped, torch.zeros_like(log_ratio), log_ratio).exp()
    sides = torch.where(above, torch.ones_like(ratio), -torch.ones_like(ratio))
    gain = torch.where(clipped, 1 + sides * clip, ratio) * advantages
    return -_mean(gain, mask), approx_kl, clip_fraction


def _value(
    values: Tensor,
    returns: Tensor | None,
    old_values: Tensor | None,
    value_clip: Number | None,
    mask: Tensor | None,
) -> Tensor:
    """Return half the mean squared error of the critic."""
    assert returns is not None
    error = (values - returns).square()
    if value_clip is not None:
        assert old_values is not None
        moved = values - old_values
        limit = value_clip if isinstance(value_clip, Tensor) else moved.new_full((), value_clip)
        near = old_values + torch.minimum(torch.maximum(moved, -limit), limit)
        clipped = (near - returns).square()
        error = torch.where(clipped.detach() > error.detach(), clipped, error)
    return _mean(error, mask) / 2


@torch.no_grad()
def _explained(values: Tensor, returns: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the fraction of the returns' variance that the values explain."""
    if returns is None:
        return values.new_full((), float("nan"))
    error, total = (_mean((x - _mean(x, mask)).square(), mask) for x in (returns - values, returns))
    return torch.where(total == 0, torch.full_like(total, float("nan")), 1 - error / total)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of what counts; 0 where nothing does."""
    if mask is None:
        return x.mean()
    return where_not(~mask, x).sum() / mask.sum().clamp_min(1)
