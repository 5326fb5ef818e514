"""Rollouts: what an agent saw and did, as stacked tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from innerloop.errors import BiasedSurrogateWarning, InvalidInputError
from innerloop.rl._checks import check_constant, check_shape, check_time_first
from innerloop.rl._returns import Advantages, gae
from innerloop.rl._scan import Number

Observations = Tensor | Mapping[str, Tensor]
"""Observations of a rollout, ``[T, N, ...]``: a tensor, or named ones."""


class Minibatch(NamedTuple):
    """Some steps of a rollout, in the form of one batch of `innerloop.unroll`: all constants.

    Attributes:
        observations: ``[size, ...]``.
        actions: ``[size, ...]``.
        log_probs: of the policy that took the actions, ``[size]``.
        values: of the critic at that time, ``[size]``; None if the rollout has none.
        indices: where the steps stand in the rollout, counted as by ``flatten(0, 1)``, ``[size]``.
        mask: False for steps that do not count; None if all do.
        advantages: if they were given to `Rollout.minibatches`.
        returns: likewise.
        rollout: the whole rollout, for a loss that computes the advantages itself; None unless
            `Rollout.minibatches` was asked for it.
    """

    observations: Observations
    actions: Tensor
    log_probs: Tensor
    values: Tensor | None
    indices: Tensor
    mask: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    rollout: Rollout | None = None

    def pick(self, x: Tensor) -> Tensor:
        """Return the entries of ``x``, ``[T, N, ...]``, that belong to this minibatch.

        Use it for advantages that depend on what is learned (γ, λ). A batch holds constants only,
        so they are computed once and passed in ``hyper``, or at every step from ``rollout``.
        """
        return x.flatten(0, 1)[self.indices]


class Rollout(NamedTuple):
    """T steps of N environments, time first.

    Every field is a constant of the updates that follow: the actions, their log-probabilities and
    the values are those of the policy and the critic that acted. What is learned enters through
    `gae`, which is computed anew from ``gamma`` and ``lam``, and through the log-probabilities of
    the same actions under the present policy.

    Attributes:
        observations: in which each action was taken, ``[T, N, ...]``: a tensor, or named ones.
        actions: ``[T, N, ...]``.
        rewards: ``[T, N]``.
        log_probs: of the actions, summed over action dimensions, ``[T, N]``.
        values: of the observations, ``[T, N]``, or None.
        last_value: of the observation after the last step, ``[N]``, or None.
        terminated: True where a step ended its episode for good, ``[T, N]``, or None for never.
        truncated: True where a step ended its episode by a limit, ``[T, N]``, or None for never.
        final_values: of the observation that a step led to, read where it was truncated,
            ``[T, N]``, or None.
        mask: False for steps that do not count, ``[T, N]``, or None. Gymnasium's ``NEXT_STEP``
            autoreset inserts one such step after each episode.

    Example:
        >>> import torch
        >>> from innerloop.rl import Rollout
        >>> rollout = Rollout(
        ...     observations=torch.zeros(3, 2, 4),
        ...     actions=torch.zeros(3, 2, dtype=torch.long),
        ...     rewards=torch.ones(3, 2),
        ...     log_probs=torch.zeros(3, 2),
        ...     values=torch.zeros(3, 2),
        ...     last_value=torch.zeros(2),
        ... )
        >>> rollout.gae(gamma=0.5, lam=1.0).returns[:, 0].tolist()
        [1.75, 1.5, 1.0]
        >>> [len(batch.indices) for batch in rollout.minibatches(epochs=2, size=3)]
        [3, 3, 3, 3]
    """

    observations: Observations
    actions: Tensor
    rewards: Tensor
    log_probs: Tensor
    values: Tensor | None = None
    last_value: Tensor | None = None
    terminated: Tensor | None = None
    truncated: Tensor | None = None
    final_values: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def stack(
        cls,
        steps: Sequence[Mapping[str, Observations]],
        *,
        last_value: Tensor | None = None,
    ) -> Rollout:
        """Stack steps into a checked rollout.

        Args:
            steps: for each step the fields by name, ``[N, ...]``, all but ``last_value``.
            last_value: as the field.

        Raises:
            InvalidInputError: there are no steps, they have other fields, or as `check`.
        """
        if not steps:
            raise InvalidInputError(
                "the rollout is empty: the environments ended before the first step, or no step "
                "was taken; collect at least one"
            )
        names = set(steps[0])
        unknown = sorted(names - set(cls._fields) | {"last_value"} & names)
        different = [t for t, step in enumerate(steps) if set(step) != names]
        if unknown or different:
            raise InvalidInputError(
                f"steps have the fields {sorted(names)}"
                + (f", and step {different[0]} other ones" if different else "")
                + f": each step is a dict with the same of the fields {list(cls._fields)}, without "
                "last_value"
            )
        fields = {name: _stack([step[name] for step in steps]) for name in names}
        missing = sorted({"observations", "actions", "rewards", "log_probs"} - names)
        if missing:
            raise InvalidInputError(f"steps lack the fields {missing}: a rollout needs them")
        return cls(**fields, last_value=last_value).check()  # type: ignore[arg-type]

    def check(self) -> Rollout:
        """Return this rollout after a look at its shapes and values.

        Raises:
            InvalidInputError: it is empty, its shapes differ, its rewards are NaN or infinite, its
                log-probabilities keep the action dimension, what is constant requires grad, or no
                step counts.
        """
        if self.rewards.ndim != 2 or not self.rewards.numel():
            raise InvalidInputError(
                f"rewards has shape {list(self.rewards.shape)}: a rollout holds at least one step "
                "of at least one environment, [T, N]; for one environment write "
                "rewards.unsqueeze(1), and the same for the other fields"
            )
        check_time_first("rewards", self.rewards)
        if self.log_probs.ndim == 3 and self.log_probs.shape[:2] == self.rewards.shape:
            raise InvalidInputError(
                f"log_probs has shape {list(self.log_probs.shape)}, but there is one action for "
                f"each of {list(self.rewards.shape)}: write log_probs.sum(-1), the log-probability "
                "of all dimensions of the action together, not their mean"
            )
        named = {name: getattr(self, name) for name in ("log_probs", "values", "final_values")}
        for name, x in named.items():
            check_shape(name, x, self.rewards, "rewards")
        for name in ("terminated", "truncated", "mask"):
            check_shape(name, getattr(self, name), self.rewards, "rewards", flag=True)
        check_shape("last_value", self.last_value, self.rewards[0], "a row of rewards")
        _check_counts(self.mask)
        for name, x in {"actions": self.actions, **_named(self.observations)}.items():
            if x.shape[:2] != self.rewards.shape:
                raise InvalidInputError(
                    f"{name} has shape {list(x.shape)}, but rewards {list(self.rewards.shape)}: "
                    "the first two dimensions are time and environments in every field"
                )
            check_constant(name, x)
        for name in ("log_probs", "rewards", "values", "last_value", "final_values"):
            check_constant(name, getattr(self, name))
        _check_finite("rewards", self.rewards, self.mask)
        _check_finite("log_probs", self.log_probs, self.mask)
        return self

    def gae(self, *, gamma: Number, lam: Number) -> Advantages:
        """Compute advantages and returns by `innerloop.rl.gae`, differentiable by γ and λ.

        Raises:
            InvalidInputError: there are no values; or as `innerloop.rl.gae`.
        """
        if self.values is None or self.last_value is None:
            raise InvalidInputError(
                "the rollout has no values or no last_value: store those of the critic, or call "
                "innerloop.rl.discounted_returns(rollout.rewards, gamma=...)"
            )
        return gae(
            self.rewards,
            self.values,
            self.last_value,
            gamma=gamma,
            lam=lam,
            terminated=self.terminated,
            truncated=self.truncated,
            final_values=self.final_values,
        )

    def ends(self) -> Tensor:
        """Return True for the last step of each episode, and for the last step of all, ``[T, N]``.

        This is the argument ``ends`` of `innerloop.rl.surrogate`.
        """
        ends = torch.zeros_like(self.rewards, dtype=torch.bool)
        for flags in (self.terminated, self.truncated):
            ends = ends if flags is None else ends | flags
        return torch.cat([ends[:-1], torch.ones_like(ends[-1:])])

    def check_log_probs(self, log_probs: Tensor, *, tolerance: float = 1e-4) -> None:
        """Raise unless log-probabilities that were computed anew equal the stored ones.

        Before the first update the ratio of probabilities is 1 for every action. Where it is not,
        the stored log-probabilities are those of other inputs or of another density, and the update
        is clipped by an error instead of by a change of the policy.

        Args:
            log_probs: of the stored actions in the stored observations, under the policy that took
                them, ``[T, N]``.
            tolerance: allowed difference, absolute for small numbers and relative for large ones.

        Raises:
            InvalidInputError: they differ; the message says so if one is the mean over the
                dimensions of the action and the other the sum.
        """
        check_shape("log_probs", log_probs, self.rewards, "rewards")
        new, old = log_probs.detach(), self.log_probs.detach()
        wrong = ~torch.isclose(new, old, rtol=tolerance, atol=tolerance)
        wrong = wrong if self.mask is None else wrong & self.mask
        if not bool(wrong.any()):
            return
        size = self.actions[0, 0].numel()
        pairs = (("stored", old, new), ("new", new, old))
        for which, averaged, summed in pairs if size > 1 else ():
            if torch.allclose(averaged * size, summed, rtol=tolerance, atol=tolerance):
                raise InvalidInputError(
                    f"the {which} log-probabilities are the means over the {size} dimensions of "
                    "the action: the log-density of a vector is the sum. With the mean, ratios are "
                    "raised to the power of one over that number, and the clip range is another "
                    "one. Write log_prob.sum(-1)"
                )
        t, n = wrong.nonzero()[0].tolist()
        raise InvalidInputError(
            f"the log-probability at step {t} of environment {n} was stored as "
            f"{old[t, n].item():.6g} and is now {new[t, n].item():.6g}: before the first update "
            "they must be equal. Usual reasons: a normaliser that has changed since (freeze it), "
            "dropout, actions that were clipped before they were stored, or other parameters"
        )

    def minibatches(
        self,
        epochs: int,
        size: int,
        generator: torch.Generator | None = None,
        *,
        order: Tensor | None = None,
        advantages: Tensor | None = None,
        returns: Tensor | None = None,
        with_rollout: bool = False,
    ) -> list[Minibatch]:
        """Shuffle all T · N steps once for each epoch, and cut them into minibatches.

        The list is a ``batches`` argument of `innerloop.unroll`, one entry for each step of the
        inner loop, and can be looped over under `innerloop.track`.

        Args:
            epochs: how often each step is used.
            size: steps in a minibatch; the last one of an epoch may have fewer.
            generator: for the order; default torch's own.
            order: the order itself, ``[epochs, T · N]``, each row a permutation: for
                ``torch.func.vmap``, inside of which no generator may be used.
            advantages: constant advantages, ``[T, N]``. Those with a gradient go to the loss by way
                of ``hyper``, and `Minibatch.pick` takes the part that belongs to a minibatch.
            returns: likewise.
            with_rollout: True to put the whole rollout into every minibatch (not copied), so that
                the loss can compute ``batch.rollout.gae(gamma=hyper["gamma"], ...)``.

        Returns:
            ``epochs * ceil(T * N / size)`` minibatches.

        Raises:
            InvalidInputError: ``epochs`` or ``size`` is not positive, advantages require grad, or
                as `check`.

        Cost:
            ``epochs`` copies of the observations and actions.
        """
        self.check()
        for name, n in (("epochs", epochs), ("size", size)):
            if not isinstance(n, int) or n < 1:
                raise InvalidInputError(f"{name}={n!r} must be a positive number")
        for name, x in (("advantages", advantages), ("returns", returns)):
            check_shape(name, x, self.rewards, "rewards")
            if x is not None and x.requires_grad:
                raise InvalidInputError(
                    f"{name} requires grad, but batches are constants: pass {name} in hyper and "
                    f"write batch.pick(hyper[{name!r}]) in the loss, or detach it"
                )
        total = self.rewards.numel()
        if order is None:
            order = minibatch_order(epochs, total, generator)
        elif tuple(order.shape) != (epochs, total):
            raise InvalidInputError(
                f"order has shape {list(order.shape)}, but there are {epochs} epochs of {total} "
                "steps: write order=innerloop.rl.minibatch_order(epochs, T * N)"
            )
        order = order.to(self.rewards.device)
        flat = {
            "observations": self.observations,
            "actions": self.actions,
            "log_probs": self.log_probs,
            "values": self.values,
            "mask": self.mask,
            "advantages": advantages,
            "returns": returns,
        }
        return [
            Minibatch(
                indices=indices,
                rollout=self if with_rollout else None,
                **{  # type: ignore[arg-type]
                    name: _map(lambda x, indices=indices: x.flatten(0, 1)[indices], x)  # type: ignore[misc]
                    for name, x in flat.items()
                },
            )
            for row in order.unbind()
            for indices in row.split(size)
        ]


def minibatch_order(epochs: int, total: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw a permutation of ``total`` steps for each epoch.

    Args:
        epochs: how many.
        total: T · N.
        generator: default torch's own.

    Returns:
        ``[epochs, total]``, for ``order`` of `Rollout.minibatches`.

    Example:
        >>> import torch
        >>> from innerloop.rl import minibatch_order
        >>> minibatch_order(2, 5, torch.Generator().manual_seed(0)).sort(1).values.tolist()
        [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    """
    device = None if generator is None else generator.device
    rows = [torch.randperm(total, generator=generator, device=device) for _ in range(epochs)]
    return torch.stack(rows)


@runtime_checkable
class Acted(Protocol):
    """What has actions and rewards: `Rollout`, or `innerloop.rl.meta.Episodes`."""

    @property
    def actions(self) -> Tensor:
        """Return the actions that were taken."""

    @property
    def rewards(self) -> Tensor:
        """Return what they earned."""


def check_separate(inner: Acted, outer: Acted) -> bool:
    """Warn if the inner and the outer loss use the same trajectories.

    The policy after an inner step is fitted to its data, so on these data the outer loss is too
    good, and its gradient is biased: outer trajectories come from the adapted policy.

    Args:
        inner: the data of the inner loop: a `Rollout`, or anything with actions and rewards.
        outer: those of the outer loss.

    Returns:
        True if they differ.

    Warns:
        BiasedSurrogateWarning: actions and rewards are the same.

    Example:
        >>> import torch
        >>> from innerloop.rl import Rollout, check_separate
        >>> first, second = (
        ...     Rollout(
        ...         observations=torch.zeros(1, 1, 1),
        ...         actions=torch.zeros(1, 1, dtype=torch.long),
        ...         rewards=torch.tensor([[reward]]),
        ...         log_probs=torch.zeros(1, 1),
        ...     )
        ...     for reward in (1.0, 2.0)
        ... )
        >>> check_separate(first, second)
        True
    """
    same = inner.rewards is outer.rewards or (
        inner.rewards.shape == outer.rewards.shape
        and inner.actions.shape == outer.actions.shape
        and torch.equal(inner.rewards, outer.rewards)
        and torch.equal(inner.actions, outer.actions)
    )
    if same:
        warnings.warn(
            "the inner and the outer loss use the same trajectories: the adapted policy is fitted "
            "to them, which biases the outer gradient. Collect the outer trajectories with the "
            "adapted policy",
            BiasedSurrogateWarning,
            stacklevel=2,
        )
    return not same


def _named(observations: Observations) -> dict[str, Tensor]:
    if isinstance(observations, Tensor):
        return {"observations": observations}
    return {f"observations[{name!r}]": x for name, x in observations.items()}


def _map(fn: Callable[[Tensor], Tensor], x: Observations | None) -> Observations | None:
    if x is None or isinstance(x, Tensor):
        return None if x is None else fn(x)
    return {name: fn(value) for name, value in x.items()}


def _stack(rows: Sequence[Observations]) -> Observations:
    first = rows[0]
    if isinstance(first, Tensor):
        return torch.stack([row for row in rows if isinstance(row, Tensor)])
    return {
        name: torch.stack([row[name] for row in rows if not isinstance(row, Tensor)])
        for name in first
    }


def _check_counts(mask: Tensor | None) -> None:
    """Raise if no step counts."""
    try:
        empty = mask is not None and not bool(mask.any())
    except RuntimeError:
        # Under torch.func.vmap a tensor has no single value to look at.
        return
    if empty:
        raise InvalidInputError(
            "mask is False at every step, so there is nothing to learn from: the environments "
            "ended at step 0, or the mask is inverted (True stands for a step that counts)"
        )


def _check_finite(name: str, x: Tensor, mask: Tensor | None) -> None:
    """Raise at the first NaN or infinite entry that counts."""
    wrong = ~x.isfinite() if mask is None else ~x.isfinite() & mask
    try:
        found = bool(wrong.any())
    except RuntimeError:
        # Under torch.func.vmap a tensor has no single value to look at.
        return
    if found:
        t, n = wrong.nonzero()[0].tolist()
        raise InvalidInputError(
            f"{name} is {x[t, n].item()} at step {t} of environment {n}, which would turn every "
            "parameter into NaN: look at the environment and the policy, or leave the step out by "
            "mask"
        )
