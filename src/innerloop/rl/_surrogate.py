"""Surrogates: functions whose derivatives estimate those of an expected return."""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from innerloop.errors import BiasedSurrogateWarning, InvalidInputError
from innerloop.rl._checks import check_log_probs, check_shape, check_time_first, per_step
from innerloop.rl._scan import Number, number_where_not, scan, where_not

Kind = Literal["loaded_dice", "dice", "ratio", "reinforce"]
"""The surrogates among which `surrogate` chooses."""
Objective = Literal["expected", "sampled"]
"""What a meta-learner maximises: see `check_objective`."""
Reduction = Literal["episodes", "steps", "none"]


def surrogate(
    log_probs: Tensor,
    advantages: Tensor,
    *,
    kind: Kind = "loaded_dice",
    lam: float = 1.0,
    discount: Number = 1.0,
    per_step_ratio: bool = True,
    baseline: Tensor | None = None,
    ends: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "episodes",
    objective: Objective | None = None,
    with_score_term: bool = False,
) -> Tensor:
    r"""Return a scalar whose gradient by the policy is the policy gradient. Maximise it.

    The mean of the first derivative is the same for every kind. That of the second is not, and a
    meta-gradient through a policy-gradient step needs it. With
    :math:`\ell_t = \log \pi(a_t | s_t)`, and
    :math:`\square(x) = \exp(x - \mathrm{detach}(x))`, which is 1 and whose derivative is that of x:

    .. math::
        \text{loaded_dice:} \quad & \sum_t \gamma^t
            \left[\square(w_t) - \square(w_t - \ell_t) + 1\right] A_t,
            \qquad w_t = \ell_t + \lambda\, w_{t-1} \\
        \text{dice:} \quad & \sum_t \gamma^t \left[\square(\ell_0 + \dots + \ell_t)\, r_t
            + (\square(\ell_0 + \dots + \ell_{t-1}) - \square(\ell_0 + \dots + \ell_t))\, b_t
            \right] \\
        \text{ratio:} \quad & \sum_t \gamma^t\, \square(\ell_t)\, A_t \\
        \text{reinforce:} \quad & \sum_t \gamma^t\, \ell_t\, A_t

    - ``"loaded_dice"`` (Farquhar et al., "Loaded DiCE", 2019) has every derivative right for
      λ = 1, and works with advantages; use this one. λ < 1 forgets how earlier actions led to a
      state: less variance, and a bias that grows to that of ``"ratio"`` at λ = 0.
    - ``"dice"`` (Foerster et al., "DiCE", 2018) has every derivative right, but takes *rewards* in
      place of advantages, and its variance makes it useless for long episodes. The baseline is
      that of Mao et al., "A baseline for any order gradient estimation", 2019: one value per state.
    - ``"ratio"`` (LVC; Rothfuss et al., "ProMP", 2019) leaves out how earlier actions led to a
      state: the right second derivative for episodes of one step, biased for longer ones, with
      little variance. With ``per_step_ratio=False``, one ratio for the whole episode, it is right
      again; ``advantages`` are then rewards.
    - ``"reinforce"`` (Williams, 1992) has the first derivative only. Differentiated twice it is
      right together with `score_term`, for the objective ``"sampled"``.

    Args:
        log_probs: of the actions taken, summed over action dimensions, ``[T, ...]``, time first:
            one episode for each column, or several if ``ends`` says where they end. Independent
            actions of one step each (a bandit) are ``[1, N]``.
        advantages: :math:`A_t`, or the rewards :math:`r_t` for ``"dice"`` and whole-episode ratios,
            ``[T, ...]``. Gradients flow into them: detach what is constant.
        kind: as above.
        lam: λ of ``"loaded_dice"``, a number. The first derivative does not depend on it.
        discount: γ of the weight :math:`\gamma^t`, counted from the start of each episode. 1, as
            most code has it, leaves the weights out.
        per_step_ratio: False for one ratio per episode.
        baseline: :math:`b_t` of ``"dice"``, a function of the state, ``[T, ...]``; elsewhere it is
            part of the advantage.
        ends: True for the last step of each episode (terminated or truncated), ``[T, ...]``.
        mask: False for rows that are no steps, ``[T, ...]``: time stands still there.
        reduction: ``"episodes"``: sum over time, mean over the other dimensions; ``"steps"``: mean
            over all steps that count; ``"none"``: the terms, ``[T, ...]``.
        objective: if given, a kind that is biased for it warns, see `check_objective`.
        with_score_term: True if `score_term` is added to the outer objective.

    Returns:
        The scalar. Its value is the sum of the weighted ``advantages`` (but for ``"reinforce"``,
        whose value means nothing).

    Raises:
        InvalidInputError: shapes that differ, log-probabilities that keep the action dimension, an
            option that the kind does not have.

    Warns:
        BiasedSurrogateWarning: ``kind`` is biased for ``objective``.

    Example:
        The gradient by the log-probabilities is the advantage.

        >>> import torch
        >>> from innerloop.rl import surrogate
        >>> log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> value = surrogate(log_probs, torch.tensor([[3.0, 5.0]]))
        >>> value.item(), torch.autograd.grad(value, log_probs)[0].tolist()
        (4.0, [[1.5, 2.5]])
    """
    check_log_probs(log_probs, advantages, "advantages")
    check_time_first("advantages", advantages)
    check_shape("baseline", baseline, log_probs, "log_probs")
    check_shape("ends", ends, log_probs, "log_probs", flag=True)
    check_shape("mask", mask, log_probs, "log_probs", flag=True)
    _check_options(kind, lam, per_step_ratio, baseline, reduction)
    if objective is not None:
        steps = log_probs.shape[0]
        if not _is_right(objective, kind, with_score_term, steps, lam, per_step_ratio):
            warnings.warn(
                _bias(objective, kind, with_score_term, lam), BiasedSurrogateWarning, stacklevel=2
            )
    if mask is not None:
        log_probs, advantages = where_not(~mask, log_probs), where_not(~mask, advantages)
        baseline = None if baseline is None else where_not(~mask, baseline)
    starts = None if ends is None else _starts(ends)
    terms = _terms(log_probs, advantages, kind, lam, per_step_ratio, baseline, starts, mask)
    terms = _weighted(terms, discount, starts, mask)
    if reduction == "none":
        return terms
    if reduction == "steps":
        count = terms.numel() if mask is None else mask.sum().clamp_min(1)
        return terms.sum() / count
    return terms.sum(0).mean()


def score_term(
    log_probs: Tensor,
    outer_value: Tensor,
    *,
    baseline: Number = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Return the term that accounts for the sampling of the inner data. Add it to the outer value.

    .. math::
        \nabla_\theta\, E_{\tau \sim \pi_\theta}\left[J(\theta'(\theta, \tau))\right] = E\left[
            \nabla_\theta J(\theta') + J(\theta') \sum_i \nabla_\theta \log \pi_\theta(a_i)\right]

    The first part is what the derivative through the inner update gives; this is the second one,
    without which exploration is not rewarded (E-MAML: Stadie et al., "Some considerations on
    learning to explore via meta-reinforcement learning", 2018). The value of the term is 0, and its
    derivatives are right to any order. It belongs to inner updates with
    ``surrogate(kind="reinforce")``; the other kinds count the effect of sampling already.

    Args:
        log_probs: of *all* actions of the inner data, under the policy that took them, with their
            graph; any shape. They are summed, not averaged: one adapted policy follows from all.
        outer_value: :math:`J(\theta')`, or an outer loss, a scalar.
        baseline: subtracted from ``outer_value`` here: less variance, and the same mean if it does
            not depend on these actions (the mean over the *other* tasks, say, not over all).
        mask: False for actions that were not used, the shape of ``log_probs``.

    Returns:
        A scalar, 0.

    Raises:
        InvalidInputError: ``outer_value`` is no scalar, ``log_probs`` have no derivative.

    Example:
        >>> import torch
        >>> from innerloop.rl import score_term
        >>> log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> term = score_term(log_probs, torch.tensor(7.0))
        >>> term.item(), torch.autograd.grad(term, log_probs)[0].tolist()
        (0.0, [7.0, 7.0])
    """
    if outer_value.ndim:
        raise InvalidInputError(
            f"outer_value has shape {list(outer_value.shape)}: the sampling of one adapted policy "
            "is weighted by one number; call score_term for each task, or under torch.func.vmap"
        )
    check_shape("mask", mask, log_probs, "log_probs", flag=True)
    if _is_constant(log_probs):
        raise InvalidInputError(
            "log_probs have no derivative, so the term would be 0 and add nothing: the ones that a "
            "rollout stores are constants. Compute them anew, "
            "policy.log_prob(rollout.actions), with the parameters at the start of the inner loop"
        )
    if mask is not None:
        log_probs = where_not(~mask, log_probs)
    return (outer_value - baseline) * (_box(log_probs.sum()) - 1)


def check_objective(
    objective: Objective,
    *,
    kind: Kind,
    score_term: bool = False,
    steps: int = 2,
    lam: float = 1.0,
    per_step_ratio: bool = True,
) -> bool:
    r"""Warn if an inner surrogate is biased for the objective of a meta-learner.

    With J the expected return and g the gradient estimated from N samples, the objective is

    .. math::
        \text{"expected":}\quad J(\theta + \alpha \nabla J(\theta)), \qquad
        \text{"sampled":}\quad E_{\tau \sim \pi_\theta^N}\left[J(\theta + \alpha\, g(\tau))\right].

    "expected" is right, up to O(1/N), with ``"loaded_dice"`` at λ = 1, ``"dice"`` or a
    whole-episode ratio, without `score_term`; for episodes of one step with any ratio. "sampled" is
    right, exactly, with ``"reinforce"`` and `score_term`. The page :doc:`/rl` has the numbers.

    Args:
        objective: which of the two is meant.
        kind: the surrogate of the inner update.
        score_term: True if `score_term` is added to the outer value.
        steps: the length of an episode; what is biased for two steps is so for more.
        lam: λ of ``"loaded_dice"``.
        per_step_ratio: as in `surrogate`.

    Returns:
        True if the combination is right for the objective.

    Raises:
        InvalidInputError: an unknown objective or kind.

    Warns:
        BiasedSurrogateWarning: it is biased; the message names one that is not.

    Example:
        >>> from innerloop.rl import check_objective
        >>> check_objective("expected", kind="loaded_dice")
        True
        >>> check_objective("sampled", kind="reinforce", score_term=True)
        True
    """
    right = _is_right(objective, kind, score_term, steps, lam, per_step_ratio)
    if not right:
        warnings.warn(_bias(objective, kind, score_term, lam), BiasedSurrogateWarning, stacklevel=2)
    return right


def _terms(
    log_probs: Tensor,
    advantages: Tensor,
    kind: Kind,
    lam: float,
    per_step_ratio: bool,
    baseline: Tensor | None,
    starts: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Return the summands of `surrogate`, without their discount."""
    if kind == "reinforce":
        return log_probs * advantages
    if kind == "ratio" and per_step_ratio:
        return _box(log_probs) * advantages
    if kind == "ratio":
        return _box(_of_whole_episode(log_probs, starts)) * advantages
    up_to_here = _sum_so_far(log_probs, lam, starts, mask)
    before = up_to_here - log_probs
    if kind == "loaded_dice":
        return (_box(up_to_here) - _box(before) + 1) * advantages
    terms = _box(up_to_here) * advantages
    if baseline is not None:
        terms = terms + (_box(before) - _box(up_to_here)) * baseline
    return terms


def _box(x: Tensor) -> Tensor:
    """Return 1, with the derivatives of exp(x) relative to its value: DiCE's magic box."""
    return (x - x.detach()).exp()


def _is_constant(x: Tensor) -> bool:
    """Return True if a tensor is known to have no derivative where one could be recorded."""
    if x.requires_grad or not torch.is_grad_enabled():
        return False
    try:
        bool((x == 0).all())
    except RuntimeError:
        # Under torch.func.vmap a tensor has no single value, and hides its derivative.
        return False
    return forward_ad.unpack_dual(x).tangent is None


def _starts(ends: Tensor) -> Tensor:
    """Return True for the first step of each episode."""
    return torch.cat([torch.ones_like(ends[:1]), ends[:-1]])


def _sum_so_far(x: Tensor, lam: float, starts: Tensor | None, mask: Tensor | None) -> Tensor:
    """Sum an episode's entries up to each step, older ones weighted by powers of λ."""
    if lam == 1 and starts is None:
        return x.cumsum(0)
    decay: Number = lam
    if mask is not None and lam != 1:
        decay = torch.where(mask, x.new_full((), lam), x.new_ones(()))
    return scan(x, number_where_not(starts, decay, x), torch.zeros_like(x[0]))


def _of_whole_episode(x: Tensor, starts: Tensor | None) -> Tensor:
    """Return the sum over the episode that each step belongs to."""
    if starts is None:
        return x.sum(0, keepdim=True).expand(x.shape)
    ends = torch.cat([starts[1:], torch.ones_like(starts[:1])])
    until_end = scan(x, number_where_not(ends, 1.0, x), torch.zeros_like(x[0]), reverse=True)
    return until_end + _sum_so_far(x, 1.0, starts, None) - x


def _weighted(
    terms: Tensor, discount: Number, starts: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Return the terms times γ to the power of their time in the episode."""
    gamma = per_step("discount", discount, terms)
    if not isinstance(gamma, Tensor):
        if gamma == 1:
            return terms
        gamma = terms.new_full((), gamma)
    gamma = gamma.expand(terms.shape)
    if mask is not None:
        gamma = torch.where(mask, gamma, torch.ones_like(gamma))
    # γ of step t discounts what follows it, so it acts on the weight of step t + 1.
    gamma = torch.cat([gamma[:1], gamma[:-1]])
    if starts is None:
        starts = torch.zeros_like(terms, dtype=torch.bool)
        starts = torch.cat([~starts[:1], starts[1:]])
    weights = scan(starts.to(terms), where_not(starts, gamma), torch.zeros_like(terms[0]))
    return weights * terms


def _check_options(
    kind: str, lam: object, per_step_ratio: bool, baseline: Tensor | None, reduction: str
) -> None:
    """Raise if a kind is unknown, or an option was given that it does not have."""
    _check_choice("kind", kind, Kind)
    _check_choice("reduction", reduction, Reduction)
    if isinstance(lam, Tensor):
        raise InvalidInputError(
            "lam is a tensor: λ of the surrogate decides which second derivative is estimated, and "
            "the first does not depend on it, so there is nothing to learn. Write a number; λ of "
            "the advantages is an argument of innerloop.rl.gae"
        )
    if not isinstance(lam, (int, float)) or not 0 <= lam <= 1:
        raise InvalidInputError(f"lam={lam!r} must be a number between 0 and 1")
    if lam != 1 and kind != "loaded_dice":
        raise InvalidInputError(f'lam={lam!r} belongs to kind="loaded_dice", not to {kind!r}')
    if not per_step_ratio and kind != "ratio":
        raise InvalidInputError(f'per_step_ratio=False belongs to kind="ratio", not to {kind!r}')
    if baseline is not None and kind != "dice":
        raise InvalidInputError(
            f'baseline belongs to kind="dice"; for {kind!r} subtract it from the advantages'
        )


def _check_choice(name: str, value: object, choices: object) -> None:
    """Raise unless ``value`` is one of the literals in ``choices``."""
    known = get_args(choices)
    if value not in known:
        raise InvalidInputError(f"{name}={value!r} is not known: write one of {list(known)}")


def _is_right(
    objective: str, kind: str, score_term: bool, steps: int, lam: float, per_step_ratio: bool
) -> bool:
    """Return True if a surrogate is right for an objective, up to O(1/N) for "expected"."""
    _check_choice("objective", objective, Objective)
    _check_choice("kind", kind, Kind)
    if objective == "sampled":
        return kind == "reinforce" and score_term
    every_order = (
        kind == "dice"
        or (kind == "loaded_dice" and (lam == 1 or steps == 1))
        or (kind == "ratio" and (not per_step_ratio or steps == 1))
    )
    return every_order and not score_term


def _bias(objective: str, kind: str, score_term: bool, lam: float) -> str:
    """Return what is wrong with a surrogate for an objective, and one that is right."""
    instead = (
        'kind="loaded_dice" with lam=1, without score_term'
        if objective == "expected"
        else 'kind="reinforce" with score_term added to the outer value'
    )
    what = f"loaded_dice with lam={lam:g}" if kind == "loaded_dice" else kind
    return (
        f"the surrogate {what} {'with' if score_term else 'without'} score_term is biased for the "
        f"objective {objective!r} ({_why(objective, kind, score_term)}): write {instead}"
    )


def _why(objective: str, kind: str, score_term: bool) -> str:
    """Say where the bias comes from."""
    if kind != "reinforce" and score_term:
        return "it counts the effect of sampling twice"
    if kind == "reinforce" and not score_term:
        return "the second derivative of log π · A leaves out the effect of sampling"
    if objective == "sampled":
        return "by O(1/N) for N samples"
    if kind == "reinforce":
        return "by O(1/N) for N samples; it is right for 'sampled'"
    return "it forgets how earlier actions led to a state"
