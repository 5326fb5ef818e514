"""Audited activations."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from innerloop.doctor._cases.case import Call, Case, F, X, _seeded, function, noise, positive

ACTIVATIONS: dict[str, Call] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "elu": F.elu,
    "selu": F.selu,
    "celu": functools.partial(F.celu, alpha=0.7),
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu(tanh)": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": functools.partial(F.softplus, beta=1.5),
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "logsigmoid": F.logsigmoid,
    "threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "glu": F.glu,
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "softmin": lambda x: F.softmin(x, -1),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "normalize": F.normalize,
}


def _activations() -> Iterator[Case]:
    for name, operation in ACTIVATIONS.items():
        yield function(f"F.{name}", "activations", operation, X)
    yield function("F.prelu", "activations", F.prelu, X, positive(4))
    yield function("F.rrelu (eval)", "activations", F.rrelu, X)
    yield function("F.gumbel_softmax", "activations", _seeded(F.gumbel_softmax), X)
    yield function("F.dropout", "activations", _seeded(F.dropout), X)
    yield function(
        "F.alpha_dropout",
        "activations",
        _seeded(functools.partial(F.alpha_dropout, training=True)),
        X,
    )
    yield function(
        "F.feature_alpha_dropout",
        "activations",
        _seeded(functools.partial(F.feature_alpha_dropout, training=True)),
        noise(2, 3, 4),
    )
    yield function("F.dropout1d", "activations", _seeded(F.dropout1d), noise(2, 3, 4))
    yield function("F.dropout2d", "activations", _seeded(F.dropout2d), noise(2, 3, 2, 2))
    yield function("F.dropout3d", "activations", _seeded(F.dropout3d), noise(2, 3, 2, 2, 1))
    yield function(
        "F.rrelu (train)", "activations", _seeded(functools.partial(F.rrelu, training=True)), X
    )
