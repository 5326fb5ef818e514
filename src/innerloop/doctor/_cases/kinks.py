"""Audited operations at points where they have a kink or a singularity."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations

from innerloop.doctor._cases.case import Call, Case, F, _zeroed, function, layer, noise


def _kinks() -> Iterator[Case]:
    zero, tied = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    at_zero: dict[str, Call] = {
        "F.relu": F.relu,
        "F.leaky_relu": F.leaky_relu,
        "F.elu": F.elu,
        "F.softshrink": F.softshrink,
        "F.softsign": F.softsign,
        "F.silu": F.silu,
        "F.gelu": F.gelu,
        "torch.abs": torch.abs,
        "F.normalize": F.normalize,
        "torch.linalg.vector_norm": torch.linalg.vector_norm,
        "torch.linalg.vector_norm(3)": lambda x: torch.linalg.vector_norm(x, 3),
        "torch.linalg.matrix_norm": torch.linalg.matrix_norm,
        "torch.std": lambda x: x.std(1),
        "torch.var": lambda x: x.var(1),
        "torch.prod": lambda x: x.prod(1),
        "torch.cumprod": lambda x: x.cumprod(1),
        "torch.sqrt": torch.sqrt,
        "torch.sinc": torch.sinc,
        "torch.xlogy": lambda x: torch.xlogy(x, x),
        "torch.entr": torch.special.entr,
        "torch.pow(2)": lambda x: x**2,
        "torch.pow(1.5)": lambda x: x**1.5,
        "torch.hypot": lambda x: torch.hypot(x, x),
        "torch.atan2": lambda x: torch.atan2(x, x),
        "torch.cdist": lambda x: torch.cdist(x, x),
        "F.pdist": F.pdist,
        "F.pairwise_distance": lambda x: F.pairwise_distance(x, x.flip(0)),
        "F.cosine_similarity": lambda x: F.cosine_similarity(x, x.flip(0)),
        "F.mse_loss": lambda x: F.mse_loss(x, x.flip(0)),
        "F.l1_loss": lambda x: F.l1_loss(x, x.flip(0)),
        "F.smooth_l1_loss": lambda x: F.smooth_l1_loss(x, x.flip(0)),
        "F.huber_loss": lambda x: F.huber_loss(x, x.flip(0)),
        "F.layer_norm": lambda x: F.layer_norm(x, (3,)),
        "F.rms_norm": lambda x: F.rms_norm(x, (3,), eps=1e-6),
        "F.rms_norm (default eps)": lambda x: F.rms_norm(x, (3,)),
        "F.group_norm": lambda x: F.group_norm(x, 1),
        "F.batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
        "F.softmax": lambda x: F.softmax(x, 1),
        "F.lp_pool1d": lambda x: F.lp_pool1d(x[None], 2.0, 2),
        "F.lp_pool1d (p=3)": lambda x: F.lp_pool1d(x[None], 3.0, 2),
        "F.max_pool1d": lambda x: F.max_pool1d(x[None], 2),
        "torch.amax": lambda x: x.amax(1),
        "torch.complex abs": lambda x: torch.complex(x, x).abs(),
        "torch.sgn (complex)": lambda x: torch.complex(x, x).sgn(),
        "F.cosine_embedding_loss": lambda x: F.cosine_embedding_loss(
            x, x.flip(0), torch.tensor([1.0, -1.0], dtype=x.dtype)
        ),
        "F.triplet_margin_loss": lambda x: F.triplet_margin_loss(x, x, x),
        "F.binary_cross_entropy(at 0 and 1)": lambda x: F.binary_cross_entropy(
            torch.cat([x, 1 + x]), torch.cat([x, 1 + x]).detach()
        ),
        "torch.renorm": lambda x: torch.renorm(x, 2, 0, 1.0),
        "torch.linalg.svdvals": torch.linalg.svdvals,
        "torch.linalg.matrix_exp": lambda x: torch.linalg.matrix_exp(x[:, :2]),
        "torch.linalg.det": lambda x: torch.linalg.det(x[:, :2]),
    }
    for name, operation in at_zero.items():
        yield function(f"{name} at 0", "at zero", operation, zero, smooth=False)
    yield from _padded()
    yield function(
        "torch.linalg.eigvalsh of equal eigenvalues",
        "at zero",
        lambda x: torch.linalg.eigvalsh(torch.diag(x[0])),
        tied,
        smooth=False,
    )
    yield function(
        "torch.linalg.svdvals of equal values",
        "at zero",
        lambda x: torch.linalg.svdvals(torch.diag(x[0])),
        tied,
        smooth=False,
    )
    yield function(
        "torch.logsumexp of -inf",
        "at zero",
        lambda x: torch.cat([x, torch.full_like(x, -math.inf)]).logsumexp(0),
        tied,
        smooth=False,
    )
    yield function(
        "torch.logsumexp of -inf only",
        "at zero",
        lambda x: (x * 0 + torch.full_like(x, -math.inf).detach()).logsumexp(0).exp(),
        tied,
        smooth=False,
    )
    yield layer(
        "parametrizations.weight_norm at 0",
        "at zero",
        lambda: _zeroed(parametrizations.weight_norm(nn.Linear(3, 2))),
        tied,
        smooth=False,
    )


def _padded() -> Iterator[Case]:
    """Yield operations on rows of which one pads the batch: it is a constant row of zeros."""
    x, rows = noise(3, 4), torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    operations: dict[str, Call] = {
        "torch.linalg.vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1),
        "torch.linalg.vector_norm(3)": lambda x: torch.linalg.vector_norm(x, 3, dim=1),
        "torch.linalg.norm": lambda x: torch.linalg.norm(x, dim=1),
        "torch.norm": lambda x: torch.norm(x, dim=1),
        "Tensor.norm": lambda x: x.norm(dim=1, keepdim=True),
        "F.normalize": F.normalize,
        "F.cosine_similarity": lambda x: F.cosine_similarity(x, noise(3, 4, phase=1.0)),
    }
    for name, operation in operations.items():
        yield function(
            f"{name} of a padded row",
            "at zero",
            lambda x, operation=operation: operation(x * rows),
            x,
        )
    index = np.array([2, 0, 2])
    yield function("Tensor.__getitem__", "at zero", lambda x: x[index], x)
