"""Normalisation by the statistics of the input itself, differentiable any number of times.

PyTorch's first two derivatives of its fused kernels are right. The formula of their second
derivative takes the saved mean and variance for constants, so that the third derivative, which a
loop inside a loop needs, is wrong without an error (torch 2.13).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from innerloop._utils import torch_private
from innerloop.errors import InvalidInputError


def _normalised(input: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(normalised, mean, variance)``, for half precision in float32 as in PyTorch.

    The squares of half precision would soon be infinite.
    """
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    variance = centred.square().mean(dims, keepdim=True)
    return centred * (variance + eps).rsqrt(), mean, variance


def layer_norm(
    input: Float[Tensor, "..."],
    normalized_shape: Sequence[int],
    weight: Float[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "..."]:
    r"""Compute ``F.layer_norm`` over the last dimensions.

    .. math:: \frac{x - \bar x}{\sqrt{\mathrm{var}(x) + \epsilon}} \cdot w + b

    Example:
        >>> import torch
        >>> from innerloop.nn.functional import layer_norm
        >>> layer_norm(torch.tensor([1.0, 3.0]), [2], eps=0.0)
        tensor([-1.,  1.])
    """
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise InvalidInputError(
            f"input {tuple(input.shape)}, normalized_shape {shape}: the latter must be the last "
            "dimensions of the former, at least one"
        )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and tuple(x.shape) != shape:
            raise InvalidInputError(
                f"{name} {tuple(x.shape)}: it must have the normalized_shape, {shape}"
            )
    output, _, _ = _normalised(input, tuple(range(-len(shape), 0)), eps)
    output = output if weight is None else output * weight
    output = output if bias is None else output + bias
    return output.to(input.dtype)


def is_strided(args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    """True if a forward-mode derivative of a tensor that is not contiguous is being taken."""
    x = args[0] if args else kwargs.get("input")
    return torch_private.forward_mode() and isinstance(x, Tensor) and not x.is_contiguous()


def group_norm(
    input: Float[Tensor, "batch channels *rest"],
    num_groups: int,
    weight: Float[Tensor, " channels"] | None = None,
    bias: Float[Tensor, " channels"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "batch channels *rest"]:
    """Compute ``F.group_norm`` of a contiguous copy: PyTorch's derivative views its input."""
    return F.group_norm(input.contiguous(), num_groups, weight, bias, eps)


def batch_norm(
    input: Float[Tensor, "batch channels *rest"],
    running_mean: Float[Tensor, " channels"] | None,
    running_var: Float[Tensor, " channels"] | None,
    weight: Float[Tensor, " channels"] | None = None,
    bias: Float[Tensor, " channels"] | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Float[Tensor, "batch channels *rest"]:
    """Compute ``F.batch_norm``; the running statistics are written in place, as there."""
    count = input.numel() // max(1, input.shape[1])
    if not training or count < 2:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    dims = tuple(d for d in range(input.dim()) if d != 1)
    output, mean, variance = _normalised(input, dims, eps)
    _follow(running_mean, mean.flatten(), momentum)
    _follow(running_var, variance.flatten() * (count / (count - 1)), momentum)
    return _affine(output, weight, bias).to(input.dtype)


def instance_norm(
    input: Float[Tensor, "batch channels *rest"],
    running_mean: Float[Tensor, " channels"] | None = None,
    running_var: Float[Tensor, " channels"] | None = None,
    weight: Float[Tensor, " channels"] | None = None,
    bias: Float[Tensor, " channels"] | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Float[Tensor, "batch channels *rest"]:
    """Compute ``F.instance_norm``; the running statistics are written in place, as there."""
    count = math.prod(input.shape[2:])
    if not use_input_stats or count < 2:
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    output, mean, variance = _normalised(input, tuple(range(2, input.dim())), eps)
    of_channel = lambda x: x.flatten(1).mean(0)  # noqa: E731
    _follow(running_mean, of_channel(mean), momentum)
    _follow(running_var, of_channel(variance) * (count / (count - 1)), momentum)
    return _affine(output, weight, bias).to(input.dtype)


def _affine(output: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1] + [1] * (output.dim() - 2)
    output = output if weight is None else output * weight.reshape(shape)
    return output if bias is None else output + bias.reshape(shape)


def _follow(running: Tensor | None, new: Tensor, momentum: float) -> None:
    if running is not None:
        with torch.no_grad():
            running.mul_(1 - momentum).add_(new.detach().to(running.dtype), alpha=momentum)
