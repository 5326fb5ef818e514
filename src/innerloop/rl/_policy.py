"""``ActorCritic``: the usual networks of a policy and its critic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from innerloop.errors import InvalidInputError
from innerloop.rl._distributions import Categorical, Gaussian
from innerloop.rl.envs._tensor_env import Box, Discrete


class ActorCritic(nn.Module):
    """A policy and a critic that share no weight.

    Two tanh networks with orthogonal weights (gain √2 in hidden layers, .01 in the head of the
    policy, 1 in that of the critic) and biases of 0. For continuous actions the standard deviation
    is a parameter that does not depend on the state.

    Args:
        observations: their size.
        actions: the action space of the environments.
        hidden: sizes of the hidden layers, of both networks.
        log_std: the first logarithm of the standard deviation of continuous actions.
        generator: for the weights; default torch's own.
        critic: False for a policy alone: the values are then None.

    Example:
        >>> import torch
        >>> from innerloop.rl import ActorCritic, envs
        >>> net = ActorCritic(4, envs.Discrete(2))
        >>> distribution, values = net(torch.zeros(3, 4))
        >>> distribution.log_prob(torch.tensor([0, 1, 1])).exp(), values
        (tensor([0.5000, 0.5000, 0.5000], grad_fn=<ExpBackward0>),
         tensor([0., 0., 0.], grad_fn=<SqueezeBackward1>))
    """

    def __init__(
        self,
        observations: int,
        actions: Discrete | Box,
        *,
        hidden: Sequence[int] = (64, 64),
        log_std: float = 0.0,
        generator: torch.Generator | None = None,
        critic: bool = True,
    ) -> None:
        super().__init__()
        outputs = actions.n if isinstance(actions, Discrete) else actions.size
        self.actor = _network([observations, *hidden, outputs], 0.01, generator)
        self.critic = _network([observations, *hidden, 1], 1.0, generator) if critic else None
        if isinstance(actions, Discrete):
            self.register_parameter("log_std", None)
        else:
            self.log_std = nn.Parameter(torch.full((outputs,), log_std))

    def distribution(self, observations: Tensor) -> Categorical | Gaussian:
        """Return the distribution of actions."""
        output = self.actor(observations)
        return Categorical(output) if self.log_std is None else Gaussian(output, self.log_std)

    def values(self, observations: Tensor) -> Tensor | None:
        """Return the critic's values, ``[...]``."""
        return None if self.critic is None else self.critic(observations).squeeze(-1)

    def forward(self, observations: Tensor) -> tuple[Categorical | Gaussian, Tensor | None]:
        return self.distribution(observations), self.values(observations)


def stacked(
    policy: ActorCritic, params: Mapping[str, Tensor]
) -> Callable[[Tensor], Categorical | Gaussian]:
    """Return the distributions of several policies of one form at once, as a function.

    One matrix product for each layer: under ``torch.func.vmap`` the same costs several times as
    much for networks of this size.

    Args:
        policy: what they have in common.
        params: their parameters by name, stacked, ``[policies, ...]``.

    Returns:
        A function of observations, ``[policies, n, size]``.
    """
    layers = [
        (params[f"actor.{i}.weight"].mT, params[f"actor.{i}.bias"].unsqueeze(1))
        for i, layer in enumerate(policy.actor)
        if isinstance(layer, nn.Linear)
    ]
    log_std = None if policy.log_std is None else params["log_std"].unsqueeze(1)

    def distribution(observations: Tensor) -> Categorical | Gaussian:
        x = observations
        for i, (weight, bias) in enumerate(layers):
            x = torch.baddbmm(bias, x.tanh() if i else x, weight)
        return Categorical(x) if log_std is None else Gaussian(x, log_std.expand_as(x))

    return distribution


def check_fits(policy: nn.Module, observation: Tensor, actions: Discrete | Box) -> None:
    """Raise unless a policy returns ``(distribution, values)`` that fit the environments."""
    with torch.no_grad():
        try:
            found = policy(observation)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InvalidInputError(
                f"{type(policy).__name__} cannot be called with observations of shape "
                f"{tuple(observation.shape)}: {error}"
            ) from error
    if not isinstance(found, tuple) or not isinstance(found[0], (Categorical, Gaussian)):
        raise InvalidInputError(
            f"{type(policy).__name__} returned {type(found).__name__}: a policy returns "
            "(distribution, values), with innerloop.rl.Categorical or innerloop.rl.Gaussian"
        )
    distribution = found[0]
    if isinstance(distribution, Categorical):
        size, fits = distribution.logits.shape[-1], isinstance(actions, Discrete)
    else:
        size, fits = distribution.mean.shape[-1], isinstance(actions, Box)
    wanted = actions.n if isinstance(actions, Discrete) else actions.size
    if not fits or size != wanted:
        raise InvalidInputError(
            f"the policy returns a {type(distribution).__name__} over {size} actions, and the "
            f"environments have the actions {actions}: it does not fit the action space"
        )
    if isinstance(distribution, Gaussian):
        _check_summed(distribution, size)


def _check_summed(policy: Gaussian, size: int) -> None:
    """Raise if a subclass of `Gaussian` averages its log-probabilities over the action."""
    with torch.no_grad():
        found = policy.log_prob(policy.mean)
        each = Gaussian(policy.mean.unsqueeze(-1), policy.log_std.unsqueeze(-1))
        expected = each.log_prob(each.mean)
    if size > 1 and found.shape == expected.shape[:-1]:
        averaged = torch.allclose(found, expected.mean(-1))
        if averaged and not torch.allclose(found, expected.sum(-1)):
            raise InvalidInputError(
                f"the log-probabilities of {type(policy).__name__} are the means over the {size} "
                "dimensions of the action: the log-density of a vector is the sum. With the mean, "
                "every gradient of the policy is too small by that factor, and the clip range is "
                "another one. Write log_prob.sum(-1)"
            )


def _network(sizes: Sequence[int], head: float, generator: torch.Generator | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        # No weights are drawn from torch's own generator.
        layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
        nn.init.orthogonal_(layer.weight, head if last else math.sqrt(2), generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer] if last else [layer, nn.Tanh()]
    return nn.Sequential(*layers)
