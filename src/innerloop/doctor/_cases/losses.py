"""Audited losses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from innerloop.doctor._cases.case import (
    CLASSES,
    SIGNS,
    A,
    B,
    Call,
    Case,
    F,
    function,
    layer,
    noise,
    positive,
    probabilities,
)

REDUCTIONS = ("mean", "sum")
PAIRS: dict[str, Call] = {
    "mse_loss": F.mse_loss,
    "l1_loss": F.l1_loss,
    "smooth_l1_loss": functools.partial(F.smooth_l1_loss, beta=0.7),
    "huber_loss": functools.partial(F.huber_loss, delta=0.7),
    "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
    "poisson_nll_loss": F.poisson_nll_loss,
    "poisson_nll_loss(full)": lambda x, y, reduction: F.poisson_nll_loss(
        x, y.abs() + 1.5, full=True, reduction=reduction
    ),
    "kl_div": lambda x, y, reduction: F.kl_div(x, y.exp(), reduction=reduction),
    "kl_div(log_target)": functools.partial(F.kl_div, log_target=True),
    "cross_entropy(probabilities)": lambda x, y, reduction: F.cross_entropy(
        x, y.softmax(1), reduction=reduction
    ),
}
CTC = (torch.tensor([[1, 2, 2], [3, 1, 0]]), torch.tensor([7, 5]), torch.tensor([3, 2]))


def _losses() -> Iterator[Case]:
    for reduction in REDUCTIONS:
        mode = "" if reduction == "mean" else f" ({reduction})"
        for name, operation in PAIRS.items():
            yield function(
                f"F.{name}{mode}", "losses", functools.partial(operation, reduction=reduction), A, B
            )
        yield function(
            f"F.binary_cross_entropy{mode}",
            "losses",
            functools.partial(F.binary_cross_entropy, reduction=reduction),
            probabilities(4, 3),
            probabilities(4, 3, phase=1.0),
        )
        yield function(
            f"F.cross_entropy{mode}",
            "losses",
            lambda x, r=reduction: F.cross_entropy(x, CLASSES, reduction=r),
            A,
        )
        yield function(
            f"F.nll_loss{mode}",
            "losses",
            lambda x, r=reduction: F.nll_loss(x, CLASSES, reduction=r),
            A,
        )
        yield function(
            f"F.gaussian_nll_loss{mode}",
            "losses",
            lambda x, y, v, r=reduction: F.gaussian_nll_loss(x, y, v, reduction=r),
            A,
            B,
            positive(4, 3),
        )
        yield function(
            f"F.cosine_embedding_loss{mode}",
            "losses",
            lambda x, y, r=reduction: F.cosine_embedding_loss(
                x, y, SIGNS, margin=-0.9, reduction=r
            ),
            A,
            B,
        )
        yield function(
            f"F.hinge_embedding_loss{mode}",
            "losses",
            lambda x, r=reduction: F.hinge_embedding_loss(
                x, SIGNS[:, None].expand(4, 3), margin=2.0, reduction=r
            ),
            A,
        )
        yield function(
            f"F.margin_ranking_loss{mode}",
            "losses",
            lambda x, y, r=reduction: F.margin_ranking_loss(
                x, y, SIGNS[:, None], margin=0.5, reduction=r
            ),
            A,
            B,
        )
        yield function(
            f"F.triplet_margin_loss{mode}",
            "losses",
            lambda x, y, z, r=reduction: F.triplet_margin_loss(x, y, z, margin=3.0, reduction=r),
            A,
            B,
            noise(4, 3, phase=2.0),
        )
        yield function(
            f"F.triplet_margin_loss(swap){mode}",
            "losses",
            lambda x, y, z, r=reduction: F.triplet_margin_loss(
                x, y, z, margin=3.0, swap=True, reduction=r
            ),
            A,
            B,
            noise(4, 3, phase=2.0),
        )
        yield function(
            f"F.triplet_margin_with_distance_loss{mode}",
            "losses",
            lambda x, y, z, r=reduction: F.triplet_margin_with_distance_loss(
                x, y, z, margin=3.0, reduction=r
            ),
            A,
            B,
            noise(4, 3, phase=2.0),
        )
        yield function(
            f"F.soft_margin_loss{mode}",
            "losses",
            lambda x, r=reduction: F.soft_margin_loss(x, SIGNS[:, None].expand(4, 3), reduction=r),
            A,
        )
        yield function(
            f"F.multi_margin_loss{mode}",
            "losses",
            lambda x, r=reduction: F.multi_margin_loss(x, CLASSES, reduction=r),
            A,
        )
        yield function(
            f"F.multilabel_margin_loss{mode}",
            "losses",
            lambda x, r=reduction: F.multilabel_margin_loss(
                x, torch.tensor([[0, -1, 0], [2, 0, -1], [1, -1, 0], [2, -1, -1]]), reduction=r
            ),
            A,
        )
        yield function(
            f"F.multilabel_soft_margin_loss{mode}",
            "losses",
            lambda x, y, r=reduction: F.multilabel_soft_margin_loss(x, y, reduction=r),
            A,
            probabilities(4, 3),
        )
        yield function(
            f"F.ctc_loss{mode}",
            "losses",
            lambda x, r=reduction: F.ctc_loss(x.log_softmax(-1), *CTC, reduction=r),
            noise(7, 2, 5),
        )
    weights = positive(3, phase=4.0)
    yield function(
        "F.multi_margin_loss(p=2)",
        "losses",
        lambda x: F.multi_margin_loss(x, CLASSES, p=2, weight=weights),
        A,
    )
    yield function(
        "F.cross_entropy(weight, smoothing)",
        "losses",
        lambda x: F.cross_entropy(x, CLASSES, weight=weights, label_smoothing=0.1),
        A,
    )
    yield function(
        "F.cross_entropy(ignore_index)",
        "losses",
        lambda x: F.cross_entropy(x, CLASSES, ignore_index=2),
        A,
    )
    yield function(
        "F.cross_entropy(images)",
        "losses",
        lambda x: F.cross_entropy(x, torch.tensor([[[0, 2], [1, 1]]])),
        noise(1, 3, 2, 2),
    )
    yield function(
        "F.nll_loss(weight, images)",
        "losses",
        lambda x: F.nll_loss(x, torch.tensor([[[0, 2], [1, 1]]]), weight=weights),
        noise(1, 3, 2, 2),
    )
    yield function(
        "F.mse_loss(weight)",
        "losses",
        lambda x, y, w: F.mse_loss(x, y, weight=w),
        A,
        B,
        positive(4, 3),
    )
    yield function(
        "F.huber_loss(weight)",
        "losses",
        lambda x, y, w: F.huber_loss(x, y, delta=0.7, weight=w),
        A,
        B,
        positive(4, 3),
    )
    yield function(
        "F.l1_loss(weight)",
        "losses",
        lambda x, y, w: F.l1_loss(x, y, weight=w),
        A,
        B,
        positive(4, 3),
    )
    yield function(
        "F.bce_with_logits(pos_weight)",
        "losses",
        lambda x, y: F.binary_cross_entropy_with_logits(x, y, weight=weights, pos_weight=weights),
        A,
        probabilities(4, 3),
    )
    yield function(
        "F.binary_cross_entropy(weight)",
        "losses",
        lambda x, y: F.binary_cross_entropy(x, y, weight=weights),
        probabilities(4, 3),
        probabilities(4, 3, phase=2.0),
    )
    yield function(
        "F.ctc_loss(concatenated)",
        "losses",
        lambda x: F.ctc_loss(x.log_softmax(-1), torch.tensor([1, 2, 2, 3, 1]), *CTC[1:]),
        noise(7, 2, 5),
    )
    yield function(
        "F.ctc_loss(zero_infinity)",
        "losses",
        lambda x: F.ctc_loss(
            x.log_softmax(-1), CTC[0], torch.tensor([7, 1]), CTC[2], zero_infinity=True
        ),
        noise(7, 2, 5),
    )
    if hasattr(F, "linear_cross_entropy"):
        options: Any = nn.LinearCrossEntropyOptions(batch_chunk_size=2)  # type: ignore[attr-defined,unused-ignore]
        for name, chosen in (("", None), (" (in chunks)", options)):
            yield function(
                f"F.linear_cross_entropy{name}",
                "losses",
                lambda x, w, o=chosen: F.linear_cross_entropy(x, w, CLASSES, options=o),
                A,
                noise(3, 3, phase=2.0),
            )
    yield layer(
        "nn.AdaptiveLogSoftmaxWithLoss",
        "losses",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 7, cutoffs=[2, 5], div_value=1.0),
        noise(5, 4),
        call=lambda m, x: m(x, torch.tensor([0, 1, 3, 6, 2])),
    )
