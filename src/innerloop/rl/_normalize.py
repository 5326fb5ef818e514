"""Running statistics that bring observations and rewards to a common scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError


class _Moments:
    """Mean, variance and count of rows seen so far, in float64.

    Blocks of rows are merged as in Chan et al., "Updating formulae and a pairwise algorithm for
    computing sample variances", 1979.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.mean = torch.zeros(tuple(shape), dtype=torch.float64)
        self.var = torch.ones(tuple(shape), dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Merge the rows, ``[n, ...]``."""
        n = rows.shape[0]
        if not n:
            return
        mean, var = rows.mean(0), rows.var(0, correction=0)
        total = self.count + n
        shift = mean - self.mean
        squares = self.var * self.count + var * n + shift.square() * self.count * n / total
        self.mean, self.var = self.mean + shift * n / total, squares / total
        self.count = total


class _Normalizer:
    """What both normalisers have in common: they can be frozen, saved and loaded."""

    def __init__(self, shape: Sequence[int], *, clip: float, epsilon: float) -> None:
        if not clip > 0 or not epsilon > 0:
            raise InvalidInputError(
                f"clip={clip!r} and epsilon={epsilon!r} must be positive: write clip=float('inf') "
                "for no clipping"
            )
        self.clip = clip
        self.epsilon = epsilon
        self.moments = _Moments(shape)
        self._frozen = 0

    @property
    def is_frozen(self) -> bool:
        """True inside of a `frozen` block."""
        return self._frozen > 0

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Return a block in which the statistics stay as they are.

        All rollouts of one meta-iteration, before and after adaptation, belong in one: statistics
        that change in between make the inner loop another function than the one that is
        differentiated.
        """
        self._frozen += 1
        try:
            yield
        finally:
            self._frozen -= 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the statistics."""
        return {name: x.clone() for name, x in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over statistics from `state_dict`.

        Raises:
            InvalidInputError: other names or shapes.
        """
        own = self._state()
        if set(state) != set(own):
            raise InvalidInputError(
                f"the state has the entries {sorted(state)}, but a {type(self).__name__} has "
                f"{sorted(own)}: pass what its state_dict() returned"
            )
        for name, x in state.items():
            if x.shape != own[name].shape:
                raise InvalidInputError(
                    f"the state's {name!r} has shape {list(x.shape)}, but the normaliser was made "
                    f"for {list(own[name].shape)}: make it with that shape"
                )
        self._take({name: x.detach().clone().double() for name, x in state.items()})

    def _state(self) -> dict[str, Tensor]:
        return {"mean": self.moments.mean, "var": self.moments.var, "count": self.moments.count}

    def _take(self, state: Mapping[str, Tensor]) -> None:
        self.moments.mean, self.moments.var = state["mean"], state["var"]
        self.moments.count = state["count"]

    def _std(self) -> Tensor:
        return (self.moments.var + self.epsilon).sqrt()


class ObservationNormalizer(_Normalizer):
    r"""Shift and scale observations by the mean and the variance of all that were seen.

    .. math:: \mathrm{clip}\left((o - \mu) / \sqrt{\sigma^2 + \epsilon},\; -c,\; c\right)

    Args:
        shape: of one observation.
        clip: c.
        epsilon: ε.

    Example:
        >>> import torch
        >>> from innerloop.rl import ObservationNormalizer
        >>> normalizer = ObservationNormalizer([1])
        >>> normalizer(torch.tensor([[1.0], [3.0]])).tolist()
        [[-1.0], [1.0]]
        >>> with normalizer.frozen():
        ...     normalizer(torch.tensor([[5.0]])).tolist()
        [[3.0]]
        >>> normalizer.mean.tolist()
        [2.0]
    """

    def __init__(self, shape: Sequence[int], *, clip: float = 10.0, epsilon: float = 1e-8) -> None:
        super().__init__(shape, clip=clip, epsilon=epsilon)

    @property
    def mean(self) -> Tensor:
        """Return the mean of the observations seen so far, in float64."""
        return self.moments.mean

    @property
    def var(self) -> Tensor:
        """Return the variance of the observations seen so far, in float64."""
        return self.moments.var

    def __call__(self, observations: Tensor) -> Tensor:
        """Add observations, ``[..., *shape]``, to the statistics unless frozen; normalise them."""
        if not self.is_frozen:
            self.update(observations)
        return self.normalize(observations)

    def update(self, observations: Tensor) -> None:
        """Add observations, ``[..., *shape]``, to the statistics.

        Raises:
            InvalidInputError: inside of a `frozen` block, or they are NaN or infinite.
        """
        if self.is_frozen:
            raise InvalidInputError(
                "update was called in a frozen() block: call it after the meta-iteration, or write "
                "normalizer(observations), which only normalises there"
            )
        self._check_shape(observations)
        rows = observations.detach().double().reshape(-1, *self.moments.mean.shape)
        if not bool(rows.isfinite().all()):
            raise InvalidInputError(
                "observations hold NaN or infinite values, which would stay in the running "
                "statistics for ever: look at the environment"
            )
        self.moments.add(rows.to(self.moments.mean.device))

    def normalize(self, observations: Tensor) -> Tensor:
        """Return the observations at the present statistics, which stay as they are."""
        self._check_shape(observations)
        mean, std = self.moments.mean.to(observations), self._std().to(observations)
        return ((observations - mean) / std).clamp(-self.clip, self.clip)

    def _check_shape(self, observations: Tensor) -> None:
        shape = self.moments.mean.shape
        if observations.shape[observations.ndim - len(shape) :] != shape:
            raise InvalidInputError(
                f"observations has shape {list(observations.shape)}, but the normaliser was made "
                f"for observations of shape {list(shape)}, with other dimensions before it"
            )


class RewardNormalizer(_Normalizer):
    r"""Scale rewards by the standard deviation of the discounted return.

    .. math::
        R_t &= r_t + \gamma\, (1 - \mathrm{end}_{t-1})\, R_{t-1} \\
        r_t' &= \mathrm{clip}\left(r_t / \sqrt{\mathrm{Var}(R) + \epsilon},\; -c,\; c\right)

    Rewards are not shifted: that would change what is worth doing.

    Args:
        environments: N.
        gamma: γ.
        clip: c.
        epsilon: ε.

    Example:
        >>> import torch
        >>> from innerloop.rl import RewardNormalizer
        >>> normalizer = RewardNormalizer(2, gamma=0.5)
        >>> normalizer(torch.tensor([0.0, 2.0]), ended=torch.tensor([False, False])).tolist()
        [0.0, 2.0]
    """

    def __init__(
        self,
        environments: int,
        *,
        gamma: float = 0.99,
        clip: float = 10.0,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__((), clip=clip, epsilon=epsilon)
        if not 0 <= gamma <= 1:
            raise InvalidInputError(f"gamma={gamma!r} must lie between 0 and 1")
        self.gamma = gamma
        self.returns = torch.zeros(environments, dtype=torch.float64)

    def __call__(self, rewards: Tensor, *, ended: Tensor) -> Tensor:
        """Add the rewards of one step, ``[N]``, to the statistics unless frozen; scale them.

        Args:
            rewards: of one step of each environment.
            ended: True where that step ended an episode: the return starts again after it.

        Raises:
            InvalidInputError: another shape, or rewards that are NaN or infinite.
        """
        if rewards.shape != self.returns.shape or ended.shape != self.returns.shape:
            raise InvalidInputError(
                f"rewards has shape {list(rewards.shape)} and ended {list(ended.shape)}, but the "
                f"normaliser was made for {list(self.returns.shape)}: one step of each environment"
            )
        if not self.is_frozen:
            step = rewards.detach().double().to(self.returns.device)
            if not bool(step.isfinite().all()):
                raise InvalidInputError(
                    "rewards hold NaN or infinite values, which would stay in the running "
                    "statistics for ever: look at the environment"
                )
            returns = self.gamma * self.returns + step
            self.moments.add(returns)
            self.returns = torch.where(ended.to(returns.device), 0.0, returns)
        return self.normalize(rewards)

    def normalize(self, rewards: Tensor) -> Tensor:
        """Return rewards of any shape at the present scale, which stays as it is."""
        return (rewards / self._std().to(rewards)).clamp(-self.clip, self.clip)

    def _state(self) -> dict[str, Tensor]:
        return {**super()._state(), "returns": self.returns}

    def _take(self, state: Mapping[str, Tensor]) -> None:
        super()._take(state)
        self.returns = state["returns"]
