"""Norms with the arguments of ``torch.layer_norm`` and its kind, which have another order.

``torch.nn.functional`` and modules of other libraries call the norms by these names, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from innerloop.nn._replacements import norm


def layer_norm(
    input: Float[Tensor, "..."],
    normalized_shape: Sequence[int],
    weight: Float[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Float[Tensor, "..."]:
    """Compute ``torch.layer_norm``."""
    return norm.layer_norm(input, normalized_shape, weight, bias, eps)


def group_norm(
    input: Float[Tensor, "batch channels *rest"],
    num_groups: int,
    weight: Float[Tensor, " channels"] | None = None,
    bias: Float[Tensor, " channels"] | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Float[Tensor, "batch channels *rest"]:
    """Compute ``torch.group_norm``."""
    return norm.group_norm(input, num_groups, weight, bias, eps)


def batch_norm(
    input: Float[Tensor, "batch channels *rest"],
    weight: Float[Tensor, " channels"] | None,
    bias: Float[Tensor, " channels"] | None,
    running_mean: Float[Tensor, " channels"] | None,
    running_var: Float[Tensor, " channels"] | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Float[Tensor, "batch channels *rest"]:
    """Compute ``torch.batch_norm``."""
    return norm.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def instance_norm(
    input: Float[Tensor, "batch channels *rest"],
    weight: Float[Tensor, " channels"] | None,
    bias: Float[Tensor, " channels"] | None,
    running_mean: Float[Tensor, " channels"] | None,
    running_var: Float[Tensor, " channels"] | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Float[Tensor, "batch channels *rest"]:
    """Compute ``torch.instance_norm``."""
    return norm.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )
