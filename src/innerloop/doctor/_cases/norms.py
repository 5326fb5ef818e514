"""Audited normalisation layers and parametrisations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrizations

from innerloop._utils import torch_private
from innerloop.doctor._cases.case import Case, F, _moved, function, layer, noise, positive


def _norms() -> Iterator[Case]:
    sequence, image, volume = noise(3, 4, 5), noise(2, 4, 3, 3), noise(2, 4, 2, 2, 2)
    for mode, evaluation in (("train", False), ("eval", True)):
        for name, x in (
            ("BatchNorm1d", noise(6, 4)),
            ("BatchNorm2d", image),
            ("BatchNorm3d", volume),
        ):
            yield layer(
                f"nn.{name} ({mode})",
                "norms",
                lambda n=name: _moved(getattr(nn, n)(4)),
                x,
                evaluation=evaluation,
            )
        yield layer(
            f"nn.InstanceNorm1d ({mode})",
            "norms",
            lambda: _moved(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
            sequence,
            evaluation=evaluation,
        )
    yield layer(
        "nn.BatchNorm1d (no statistics, no affine)",
        "norms",
        lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
        noise(6, 4),
    )
    yield layer("nn.InstanceNorm2d", "norms", lambda: nn.InstanceNorm2d(4), image)
    yield layer("nn.InstanceNorm3d", "norms", lambda: nn.InstanceNorm3d(4), volume)
    yield layer("nn.LayerNorm", "norms", lambda: _moved(nn.LayerNorm(5)), sequence)
    yield layer(
        "nn.LayerNorm (no affine)",
        "norms",
        lambda: nn.LayerNorm((4, 5), elementwise_affine=False),
        sequence,
    )
    yield layer(
        "nn.LayerNorm (no bias)", "norms", lambda: _moved(nn.LayerNorm(5, bias=False)), sequence
    )
    yield function("F.layer_norm", "norms", lambda x: F.layer_norm(x, (5,)), sequence)
    yield function(
        "F.group_norm (channels_last)",
        "norms",
        lambda x: F.group_norm(x.contiguous(memory_format=torch.channels_last), 2),
        image,
    )
    for kind in ("batch", "instance"):
        yield function(
            f"F.batch_norm or F.instance_norm ({kind})",
            "norms",
            lambda x, k=kind: (
                F.batch_norm(x, None, None, training=True) if k == "batch" else F.instance_norm(x)
            ),
            sequence,
        )
    yield layer("nn.RMSNorm", "norms", lambda: _moved(nn.RMSNorm(5)), sequence)
    yield layer(
        "nn.RMSNorm (no affine)", "norms", lambda: nn.RMSNorm(5, elementwise_affine=False), sequence
    )
    yield layer("nn.GroupNorm", "norms", lambda: _moved(nn.GroupNorm(2, 4)), image)
    yield layer(
        "nn.GroupNorm (no affine)", "norms", lambda: nn.GroupNorm(2, 4, affine=False), image
    )
    yield layer("nn.LocalResponseNorm", "norms", lambda: nn.LocalResponseNorm(2), image)
    yield layer("nn.CrossMapLRN2d", "norms", lambda: nn.CrossMapLRN2d(3), image)


def _parametrized() -> Iterator[Case]:
    x = noise(5, 3)
    for dim in (0, 1, None):
        yield layer(
            f"parametrizations.weight_norm (dim={dim})",
            "parametrizations",
            lambda d=dim: _moved(parametrizations.weight_norm(nn.Linear(3, 4), dim=d)),
            x,
        )
    yield layer(
        "parametrizations.weight_norm (conv)",
        "parametrizations",
        lambda: _moved(parametrizations.weight_norm(nn.Conv1d(3, 4, 2))),
        noise(2, 3, 5),
    )
    yield layer(
        "parametrizations.weight_norm (conv, dim=1)",
        "parametrizations",
        lambda: _moved(parametrizations.weight_norm(nn.Conv1d(3, 4, 2), dim=1)),
        noise(2, 3, 5),
    )
    yield layer(
        "nn.utils.weight_norm",
        "parametrizations",
        lambda: _moved(nn.utils.weight_norm(nn.Linear(3, 4))),
        x,
    )
    yield function(
        "torch._weight_norm",
        "parametrizations",
        torch_private.weight_norm(),
        noise(4, 3),
        positive(4, 1),
    )
    yield layer(
        "parametrizations.spectral_norm (train)",
        "parametrizations",
        lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
        x,
        constants=True,
    )
    yield layer(
        "parametrizations.spectral_norm (eval)",
        "parametrizations",
        lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
        x,
        evaluation=True,
    )
    yield layer(
        "parametrizations.spectral_norm (conv, eval)",
        "parametrizations",
        lambda: parametrizations.spectral_norm(nn.Conv1d(3, 4, 2)),
        noise(2, 3, 5),
        evaluation=True,
    )
    yield layer(
        "nn.utils.spectral_norm (train)",
        "parametrizations",
        lambda: nn.utils.spectral_norm(nn.Linear(3, 4)),
        x,
        constants=True,
    )
    yield layer(
        "nn.utils.spectral_norm (eval)",
        "parametrizations",
        lambda: nn.utils.spectral_norm(nn.Linear(3, 4)),
        x,
        evaluation=True,
    )
    for form in ("matrix_exp", "cayley", "householder"):
        yield layer(
            f"parametrizations.orthogonal ({form})",
            "parametrizations",
            lambda f=form: _moved(parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map=f)),
            x,
        )
        yield layer(
            f"parametrizations.orthogonal ({form}, 3x5)",
            "parametrizations",
            lambda f=form: _moved(parametrizations.orthogonal(nn.Linear(3, 5), orthogonal_map=f)),
            x,
        )
    yield layer(
        "parametrizations.orthogonal (no trivialization)",
        "parametrizations",
        lambda: _moved(
            parametrizations.orthogonal(
                nn.Linear(3, 5), orthogonal_map="matrix_exp", use_trivialization=False
            )
        ),
        x,
    )
