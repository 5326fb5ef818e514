r"""Gradient noise by arithmetic: a function of seed, step and place, with no state to rewind.

A hash :math:`h` of 32 bits makes uniform numbers out of integers, and Box & Muller ("A note on the
generation of random normal deviates", 1958) normal ones out of these:

.. math:: z = \sqrt{-2 \ln u_1}\, \cos 2 \pi u_2, \qquad u_i = (h_i + \tfrac12) / 2^{32}.

The hash multiplies and shifts as the finalizer of MurmurHash3 (Appleby 2011) does. It is no
cryptography; ``tests/test_transform.py`` measures moments, and correlations between places, steps
and seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from innerloop._types import Grads, Hyper, Params, Scalar
from innerloop.errors import InvalidInputError
from innerloop.optim._engine.numerics import safe_sqrt
from innerloop.optim._settings import is_active
from innerloop.optim._transforms.base import Transform, cast_like, one_value

_LOW = 0xFFFFFFFF


class AddNoiseState(NamedTuple):
    """Steps taken: with the seed, all that the noise depends on."""

    count: Any


# A carry can be loaded by torch.load with its default, weights_only=True.
torch.serialization.add_safe_globals([AddNoiseState])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AddNoise(Transform):
    r"""Add Gaussian noise whose variance falls over the steps.

    .. math::
        g_t' = g_t + \sigma_t\, z_t, \quad z_t \sim \mathcal{N}(0, 1), \qquad
        \sigma_t^2 = \frac{\eta}{(1 + t)^\gamma}, \quad t = 0, 1, \dots

    Neelakantan et al., "Adding gradient noise improves learning for very deep networks", 2015. The
    noise is a function of ``seed``, the step and the place of the entry alone, made by arithmetic:
    torch's random state is neither read nor moved, a replayed step has the same noise whatever
    replays it, and it works under ``vmap``, ``jvp`` and compilation. Under ``vmap`` all tasks see
    the same noise, unless ``seed`` is a tensor with one number for each. Two of the same seed, in
    one chain or in two groups, add the same noise: give each its own.

    Args:
        eta: :math:`\eta`; may be a tensor (at the value 0, where :math:`\sigma` has no derivative,
            its gradient is 0).
        gamma: :math:`\gamma`; may be a tensor.
        seed: an integer, or a 0-dim integer tensor.

    Raises:
        InvalidInputError: a negative ``eta`` or ``gamma``, or a ``seed`` that is no integer.

    Example:
        The derivative of :math:`\sigma_0 z` with respect to :math:`\eta` is :math:`\sigma_0 z /
        2\eta`.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.chain(
        ...     innerloop.optim.add_noise(0.25), innerloop.optim.sgd(lr=1.0)
        ... )
        >>> def one_step(eta):
        ...     params = {"w": torch.tensor(0.0)}
        ...     return opt.update(params, opt.init(params), params, {"add_noise.eta": eta})[0]["w"]
        >>> eta = torch.tensor(0.25)
        >>> torch.allclose(torch.func.grad(one_step)(eta), one_step(eta) / 0.5)
        True
    """

    eta: Hyper
    gamma: Hyper = 0.55
    seed: int | Tensor = 0

    name: ClassVar = "add_noise"
    hyper_names: ClassVar = ("eta", "gamma", "seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate(self.resolve(None))

    def validate(self, hyper: Mapping[str, Any]) -> None:
        super().validate({**hyper, "seed": 0})
        seed = hyper["seed"]
        if isinstance(seed, Tensor):
            integer = not seed.is_floating_point() and not seed.is_complex() and seed.ndim == 0
        else:
            integer = isinstance(seed, int) and not isinstance(seed, bool)
        if not integer:
            raise InvalidInputError(
                f"add_noise: seed={seed!r}: write an integer, or a 0-dim tensor of one; not a "
                "torch.Generator, whose state would move on "
                "when a step is replayed"
            )

    def init(self, params: Params) -> AddNoiseState:
        return AddNoiseState(0)

    def apply(
        self, grads: Grads, state: AddNoiseState, params: Params, hyper: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], AddNoiseState]:
        if all(g is None for g in grads.values()):
            return dict(grads), state
        eta, gamma = (one_value(hyper[key], f"{self.name}.{key}") for key in ("eta", "gamma"))
        after = AddNoiseState(state.count + 1)
        if not is_active(eta):
            return dict(grads), after
        t = state.count
        if isinstance(t, Tensor):  # compiled; an integer tensor would become float32
            t = t.to(torch.float32 if t.device.type == "mps" else torch.float64)
        variance = eta / (1.0 + t) ** gamma
        sigma = safe_sqrt(variance) if isinstance(variance, Tensor) else variance**0.5
        noisy: dict[str, Tensor | None] = {}
        place = 0  # of the tensor's first entry among all: no two entries share a random number
        for name, p in params.items():
            g = grads[name]
            noisy[name] = (
                None
                if g is None
                else cast_like(g + sigma * standard_normal(g, hyper["seed"], state.count, place), g)
            )
            place += 2 * p.numel()
        return noisy, after


add_noise = AddNoise


def standard_normal(like: Tensor, seed: int | Tensor, count: Scalar, place: int) -> Tensor:
    """Return normal numbers of the shape, dtype and device of ``like``.

    Complex ones have independent real and imaginary parts.

    Args:
        like: says shape, dtype, device.
        seed: an integer.
        count: the step.
        place: the number of the first entry; other tensors of the same step use other numbers.
    """
    shape = (*like.shape, 2) if like.is_complex() else like.shape
    size = math.prod(shape)
    key = _mixed(_integer(seed, like) ^ 0x3C6EF372)
    key = _mixed(key ^ _integer(count, like))
    index = torch.arange(place, place + size, dtype=torch.int64, device=like.device)
    first = _mixed(_mixed(key ^ (index & _LOW)))
    second = _mixed(first ^ key ^ 0x1B873593)
    z = _normal(first, second).reshape(shape)
    real = torch.view_as_real(like).dtype if like.is_complex() else like.dtype
    return torch.view_as_complex(z.to(real)) if like.is_complex() else z.to(real)


def _normal(first: Int[Tensor, "*n"], second: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    dtype = torch.float32 if first.device.type == "mps" else torch.float64
    u1, u2 = ((h.to(dtype) + 0.5) / 2**32 for h in (first, second))
    return (-2 * u1.log()).sqrt() * (2 * math.pi * u2).cos()


def _integer(value: Scalar, like: Tensor) -> Int[Tensor, ""]:
    """Return 32 bits of an integer, on the device; both halves of a longer one count."""
    if isinstance(value, Tensor):
        wide = value.to(device=like.device, dtype=torch.int64)
    else:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            value = hash(value)
        wide = torch.full((), value, dtype=torch.int64, device=like.device)
    return (wide ^ (wide >> 32)) & _LOW


def _mixed(x: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Spread every bit of 32-bit numbers over all others (a bijection)."""
    x = _times(x ^ (x >> 16), 0x85EBCA6B)
    x = _times(x ^ (x >> 13), 0xC2B2AE35)
    return x ^ (x >> 16)


def _times(x: Int[Tensor, "*n"], factor: int) -> Int[Tensor, "*n"]:
    """Return the low 32 bits of a product.

    It multiplies by halves, because signed 64-bit numbers may not overflow.
    """
    low, high = (x & 0xFFFF) * factor, ((x >> 16) * factor) & 0xFFFF
    return (low + (high << 16)) & _LOW
