"""Distributions of actions: what a policy network's output means."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError


class Categorical(NamedTuple):
    r"""A choice among n actions, :math:`\pi(a) \propto \exp(\mathrm{logits}_a)`.

    A named tuple of tensors, so it passes through ``vmap``, and every method has derivatives of any
    order. A logit of ``-inf`` forbids an action.

    Attributes:
        logits: ``[..., n]``, not normalised.

    Example:
        >>> import torch
        >>> from innerloop.rl import Categorical
        >>> coin = Categorical(torch.zeros(2))
        >>> coin.log_prob(torch.tensor(1)).exp().item(), coin.entropy().exp().item()
        (0.5, 2.0)
    """

    logits: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw actions, ``[...]`` of int64, without a graph."""
        with torch.no_grad():
            logits = self.logits.detach().double()
            # In float64: the smallest float32 number but 0 would cut off actions below 1e-7.
            uniform = torch.rand(
                logits.shape, generator=generator, dtype=logits.dtype, device=logits.device
            )
            return (logits - (-uniform.log()).log()).argmax(-1)

    def mode(self) -> Tensor:
        """Return the most likely actions, ``[...]``."""
        return self.logits.argmax(-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the log-probability of each action, ``[...]``.

        Raises:
            InvalidInputError: ``actions`` do not have the shape of the logits without the last
                dimension, or are no integers.
        """
        if actions.shape != self.logits.shape[:-1]:
            raise InvalidInputError(
                f"actions has shape {list(actions.shape)}, but logits of shape "
                f"{list(self.logits.shape)} choose one action for each of "
                f"{list(self.logits.shape[:-1])}: the policy does not fit these actions. A policy "
                "for continuous actions is innerloop.rl.Gaussian"
            )
        if actions.is_floating_point() or actions.dtype is torch.bool:
            raise InvalidInputError(
                f"actions has dtype {actions.dtype}, but a categorical policy chooses among "
                "integers: write actions.long(), or innerloop.rl.Gaussian for continuous actions"
            )
        return self._log_probs().gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, ``[...]``."""
        log_probs = self._log_probs()
        return -(log_probs.exp() * _finite(log_probs)).sum(-1)

    def kl(self, other: Categorical) -> Tensor:
        r"""Return :math:`\mathrm{KL}(\text{self} \| \text{other})` in nats, ``[...]``."""
        ours, theirs = self._log_probs(), other._log_probs()
        # An action that self forbids adds nothing; one that other alone forbids adds infinity.
        difference = torch.where(ours.isneginf(), torch.zeros_like(ours), ours - theirs)
        return (ours.exp() * difference).sum(-1)

    def _log_probs(self) -> Tensor:
        return self.logits.log_softmax(-1)


class Gaussian(NamedTuple):
    """A normal distribution with independent entries, for continuous actions.

    A named tuple of tensors, so it passes through ``vmap``, and every method has derivatives of any
    order. Log-probabilities are *summed* over the D entries of an action. Clip the actions where
    the environment takes them, not here: a density of clipped actions would be another one.

    Attributes:
        mean: ``[..., D]``.
        log_std: the logarithm of the standard deviation, ``[..., D]``, or ``[D]`` for one that does
            not depend on the state.

    Example:
        The log-density of two standard normal entries at 0 is -log 2π.

        >>> import torch
        >>> from innerloop.rl import Gaussian
        >>> policy = Gaussian(torch.zeros(2), torch.zeros(2))
        >>> torch.allclose(policy.log_prob(torch.zeros(2)).exp(), torch.tensor(1 / (2 * torch.pi)))
        True
    """

    mean: Tensor
    log_std: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw actions, ``[..., D]``, without a graph."""
        with torch.no_grad():
            mean, log_std = self.mean.detach(), self.log_std.detach()
            noise = torch.randn(
                mean.shape, generator=generator, dtype=mean.dtype, device=mean.device
            )
            return mean + log_std.exp() * noise

    def mode(self) -> Tensor:
        """Return the most likely actions, ``[..., D]``."""
        return self.mean

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the log-density of each action, summed over its entries, ``[...]``.

        Raises:
            InvalidInputError: ``actions`` do not have the shape of ``mean``.
        """
        if actions.shape != self.mean.shape:
            raise InvalidInputError(
                f"actions has shape {list(actions.shape)}, but the policy's mean "
                f"{list(self.mean.shape)}: the policy does not fit these actions. A policy for "
                "discrete actions is innerloop.rl.Categorical"
            )
        scaled = (actions - self.mean) * (-self.log_std).exp()
        each = -scaled.square() / 2 - self.log_std - math.log(2 * math.pi) / 2
        return each.sum(-1)

    def entropy(self) -> Tensor:
        """Return the differential entropy in nats, ``[...]``."""
        each = self.log_std + (1 + math.log(2 * math.pi)) / 2
        return each.expand(self.mean.shape).sum(-1)

    def kl(self, other: Gaussian) -> Tensor:
        r"""Return :math:`\mathrm{KL}(\text{self} \| \text{other})` in nats, ``[...]``."""
        wider = other.log_std - self.log_std
        ratio, shift = (-2 * wider).exp(), (self.mean - other.mean) * (-other.log_std).exp()
        return ((ratio + shift.square() - 1) / 2 + wider).sum(-1)


def _finite(log_probs: Tensor) -> Tensor:
    """Return 0 where an action is forbidden, so that 0 · log 0 is 0 in every derivative."""
    return torch.where(log_probs.isneginf(), torch.zeros_like(log_probs), log_probs)
