"""The operations under audit, each as a small module with smooth inputs in float64.

**To enrol an operation, add one line.** A line buys the probe of every derivative, and the contract of ``tests/test_audit_contract.py``:
training through it with SGD and Adam, by `track` and by `unroll`, against ``torch.optim`` and finite differences.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, rnn

Operation = Callable[..., Any]
F: Any = functional  # the stubs of torch lag behind its arguments


def noise(*shape: int, phase: float = 0.0, scale: float = 1.0) -> Tensor:
    """Fixed numbers in (-scale, scale) that look random, none of them zero, and leave the random state alone."""
    count = math.prod(shape)
    angles = torch.arange(1.0, count + 1.0, dtype=torch.float64) * 12.9898 + phase * 78.233
    return scale * angles.sin().reshape(shape)


def spread(*shape: int) -> Tensor:
    """Numbers in (-1, 1) in an order that looks random, evenly apart: no small step changes which is the largest."""
    order = noise(*shape).flatten().argsort().argsort().to(torch.float64)
    return ((order + 0.5) * (2 / order.numel()) - 1).reshape(shape)


def positive(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers in (.3, 1.7)."""
    return 1 + noise(*shape, phase=phase, scale=0.7)


def probabilities(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers in (.1, .9)."""
    return 0.5 + noise(*shape, phase=phase, scale=0.4)


def matrix(n: int, phase: float = 0.0) -> Tensor:
    """A well-conditioned matrix with distinct singular values and eigenvalues."""
    return torch.diag(torch.arange(1.0, n + 1.0, dtype=torch.float64)) + noise(n, n, phase=phase, scale=0.3)


class Applied(nn.Module):
    """A function of parameters."""

    def __init__(self, operation: Operation, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.operation = operation
        self.inputs = nn.ParameterList([nn.Parameter(x.clone()) for x in inputs])

    def forward(self) -> Any:
        """What the operation gives."""
        return self.operation(*self.inputs)


class OnInput(nn.Module):
    """A module at an input that is a parameter too."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], call: Operation | None = None) -> None:
        super().__init__()
        self.module = module
        self.inputs = nn.ParameterList([nn.Parameter(x.clone()) for x in inputs])
        self.call = call

    def forward(self) -> Any:
        """What the module gives."""
        return self.module(*self.inputs) if self.call is None else self.call(self.module, *self.inputs)


@dataclass(frozen=True)
class Case:
    """One operation at one input.

    Attributes:
        name: as a user writes it.
        family: the heading under which it is reported.
        build: makes the module; its ``forward`` takes nothing and returns a tensor, or several.
        smooth: False at a kink or an exact zero, where only finiteness is asked for.
        constants: True if a part of the forward is a constant of the derivative for PyTorch (running statistics, singular vectors
            of the power iteration), so that finite differences of forward and gradient are not their derivatives.
        first: False if the gradient is by design not the derivative of the forward.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    smooth: bool = True
    constants: bool = False
    first: bool = True

    def module(self) -> nn.Module:
        """The same module at every call, in float64."""
        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(5)
            torch.set_default_dtype(torch.float64)
            try:
                return self.build().to(torch.float64)
            finally:
                torch.set_default_dtype(before)


def value(output: Any) -> Tensor:
    """A smooth scalar of what an operation gives, whose own derivatives depend on it, and which couples all entries."""
    parts = list(_tensors(output))
    total = torch.zeros((), dtype=torch.float64, device=parts[0].device)
    for i, part in enumerate(parts):
        real = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
        weights, count = (1.2 + noise(*real.shape, phase=3.0 + i)).to(real), max(1, real.numel())
        waves = (real + 0.3).sin()
        total = (
            total + (weights * waves).sum() / count + (weights.flip(0) * waves if real.dim() else waves).mean().square()
        )
    return total


def linear(output: Any) -> Tensor:
    """A linear scalar of what an operation gives: the gradient that comes in is a constant."""
    parts = list(_tensors(output))
    if len(parts) == 1 and parts[0].dim() == 0 and not parts[0].is_complex():
        return parts[0]
    total = torch.zeros((), dtype=torch.float64, device=parts[0].device)
    for i, part in enumerate(parts):
        real = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
        total = total + ((1.2 + noise(*real.shape, phase=3.0 + i)).to(real) * real).sum()
    return total


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() or output.is_complex():
            yield output
    elif isinstance(output, rnn.PackedSequence):
        yield output.data
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


def function(name: str, family: str, operation: Operation, *inputs: Tensor, **flags: bool) -> Case:
    """The case of a function of tensors."""
    return Case(name, family, lambda: Applied(operation, inputs), **flags)


def layer(
    name: str,
    family: str,
    make: Callable[..., nn.Module],
    *inputs: Tensor,
    call: Operation | None = None,
    evaluation: bool = False,
    **flags: bool,
) -> Case:
    """The case of a module."""
    return Case(name, family, lambda: OnInput(make(), inputs, call).train(not evaluation), **flags)


# -- activations ---------------------------------------------------------------------------------------------------------

X = noise(3, 4, scale=1.5)
ACTIVATIONS: dict[str, Operation] = {
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
    yield function("F.alpha_dropout", "activations", _seeded(functools.partial(F.alpha_dropout, training=True)), X)
    yield function(
        "F.feature_alpha_dropout",
        "activations",
        _seeded(functools.partial(F.feature_alpha_dropout, training=True)),
        noise(2, 3, 4),
    )
    yield function("F.dropout1d", "activations", _seeded(F.dropout1d), noise(2, 3, 4))
    yield function("F.dropout2d", "activations", _seeded(F.dropout2d), noise(2, 3, 2, 2))
    yield function("F.dropout3d", "activations", _seeded(F.dropout3d), noise(2, 3, 2, 2, 1))
    yield function("F.rrelu (train)", "activations", _seeded(functools.partial(F.rrelu, training=True)), X)


def _seeded(operation: Operation) -> Operation:
    """The operation with the same random numbers at every call."""

    def call(*inputs: Tensor) -> Any:
        torch.manual_seed(3)
        return operation(*inputs)

    return call


# -- losses --------------------------------------------------------------------------------------------------------------

A, B = noise(4, 3, scale=1.5), noise(4, 3, phase=1.0)
CLASSES = torch.tensor([0, 2, 1, 2])
SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
REDUCTIONS = ("mean", "sum")
PAIRS: dict[str, Operation] = {
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
    "cross_entropy(probabilities)": lambda x, y, reduction: F.cross_entropy(x, y.softmax(1), reduction=reduction),
}
CTC = (torch.tensor([[1, 2, 2], [3, 1, 0]]), torch.tensor([7, 5]), torch.tensor([3, 2]))


def _losses() -> Iterator[Case]:
    for reduction in REDUCTIONS:
        mode = "" if reduction == "mean" else f" ({reduction})"
        for name, operation in PAIRS.items():
            yield function(f"F.{name}{mode}", "losses", functools.partial(operation, reduction=reduction), A, B)
        yield function(
            f"F.binary_cross_entropy{mode}",
            "losses",
            functools.partial(F.binary_cross_entropy, reduction=reduction),
            probabilities(4, 3),
            probabilities(4, 3, phase=1.0),
        )
        yield function(
            f"F.cross_entropy{mode}", "losses", lambda x, r=reduction: F.cross_entropy(x, CLASSES, reduction=r), A
        )
        yield function(f"F.nll_loss{mode}", "losses", lambda x, r=reduction: F.nll_loss(x, CLASSES, reduction=r), A)
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
            lambda x, y, r=reduction: F.cosine_embedding_loss(x, y, SIGNS, margin=-0.9, reduction=r),
            A,
            B,
        )
        yield function(
            f"F.hinge_embedding_loss{mode}",
            "losses",
            lambda x, r=reduction: F.hinge_embedding_loss(x, SIGNS[:, None].expand(4, 3), margin=2.0, reduction=r),
            A,
        )
        yield function(
            f"F.margin_ranking_loss{mode}",
            "losses",
            lambda x, y, r=reduction: F.margin_ranking_loss(x, y, SIGNS[:, None], margin=0.5, reduction=r),
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
            lambda x, y, z, r=reduction: F.triplet_margin_loss(x, y, z, margin=3.0, swap=True, reduction=r),
            A,
            B,
            noise(4, 3, phase=2.0),
        )
        yield function(
            f"F.triplet_margin_with_distance_loss{mode}",
            "losses",
            lambda x, y, z, r=reduction: F.triplet_margin_with_distance_loss(x, y, z, margin=3.0, reduction=r),
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
        "F.multi_margin_loss(p=2)", "losses", lambda x: F.multi_margin_loss(x, CLASSES, p=2, weight=weights), A
    )
    yield function(
        "F.cross_entropy(weight, smoothing)",
        "losses",
        lambda x: F.cross_entropy(x, CLASSES, weight=weights, label_smoothing=0.1),
        A,
    )
    yield function("F.cross_entropy(ignore_index)", "losses", lambda x: F.cross_entropy(x, CLASSES, ignore_index=2), A)
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
    yield function("F.mse_loss(weight)", "losses", lambda x, y, w: F.mse_loss(x, y, weight=w), A, B, positive(4, 3))
    yield function(
        "F.huber_loss(weight)", "losses", lambda x, y, w: F.huber_loss(x, y, delta=0.7, weight=w), A, B, positive(4, 3)
    )
    yield function("F.l1_loss(weight)", "losses", lambda x, y, w: F.l1_loss(x, y, weight=w), A, B, positive(4, 3))
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
        lambda x: F.ctc_loss(x.log_softmax(-1), CTC[0], torch.tensor([7, 1]), CTC[2], zero_infinity=True),
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


# -- normalisation -------------------------------------------------------------------------------------------------------


def _norms() -> Iterator[Case]:
    sequence, image, volume = noise(3, 4, 5), noise(2, 4, 3, 3), noise(2, 4, 2, 2, 2)
    for mode, evaluation in (("train", False), ("eval", True)):
        for name, x in (("BatchNorm1d", noise(6, 4)), ("BatchNorm2d", image), ("BatchNorm3d", volume)):
            yield layer(
                f"nn.{name} ({mode})", "norms", lambda n=name: _moved(getattr(nn, n)(4)), x, evaluation=evaluation
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
    yield layer("nn.LayerNorm (no affine)", "norms", lambda: nn.LayerNorm((4, 5), elementwise_affine=False), sequence)
    yield layer("nn.LayerNorm (no bias)", "norms", lambda: _moved(nn.LayerNorm(5, bias=False)), sequence)
    yield layer("nn.RMSNorm", "norms", lambda: _moved(nn.RMSNorm(5)), sequence)
    yield layer("nn.RMSNorm (no affine)", "norms", lambda: nn.RMSNorm(5, elementwise_affine=False), sequence)
    yield layer("nn.GroupNorm", "norms", lambda: _moved(nn.GroupNorm(2, 4)), image)
    yield layer("nn.GroupNorm (no affine)", "norms", lambda: nn.GroupNorm(2, 4, affine=False), image)
    yield layer("nn.LocalResponseNorm", "norms", lambda: nn.LocalResponseNorm(2), image)
    yield layer("nn.CrossMapLRN2d", "norms", lambda: nn.CrossMapLRN2d(3), image)


def _moved(module: nn.Module) -> nn.Module:
    """With weights and statistics that are not those of initialisation, where errors hide behind ones and zeros."""
    with torch.no_grad():
        for i, x in enumerate([*module.parameters(), *module.buffers()]):
            if x.is_floating_point():
                x.add_(noise(*x.shape, phase=20.0 + i, scale=0.3))
    return module


# -- parametrizations ----------------------------------------------------------------------------------------------------


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
    yield layer("nn.utils.weight_norm", "parametrizations", lambda: _moved(nn.utils.weight_norm(nn.Linear(3, 4))), x)
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
            parametrizations.orthogonal(nn.Linear(3, 5), orthogonal_map="matrix_exp", use_trivialization=False)
        ),
        x,
    )


# -- layers --------------------------------------------------------------------------------------------------------------


def _layers() -> Iterator[Case]:
    sequence, image, volume = noise(2, 4, 6), noise(2, 4, 5, 5), noise(1, 2, 3, 3, 3)
    yield layer("nn.Linear", "layers", lambda: nn.Linear(4, 3), noise(5, 4))
    yield layer("nn.Bilinear", "layers", lambda: nn.Bilinear(4, 3, 2), noise(5, 4), noise(5, 3))
    for dims, x in ((1, sequence), (2, image), (3, noise(1, 4, 3, 3, 3))):
        yield layer(
            f"nn.Conv{dims}d",
            "layers",
            lambda d=dims: getattr(nn, f"Conv{d}d")(4, 6, 2, stride=2, padding=1, groups=2),
            x,
        )
        yield layer(
            f"nn.Conv{dims}d (dilated, circular)",
            "layers",
            lambda d=dims: getattr(nn, f"Conv{d}d")(4, 3, 2, dilation=2, padding=1, padding_mode="circular"),
            x,
        )
        yield layer(
            f"nn.ConvTranspose{dims}d", "layers", lambda d=dims: getattr(nn, f"ConvTranspose{d}d")(4, 2, 2, stride=2), x
        )
    yield layer("nn.Conv2d (same, depthwise)", "layers", lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4), image)
    yield function("F.unfold", "layers", lambda x: F.unfold(x, 2), image)
    yield function("F.fold", "layers", lambda x: F.fold(x, (3, 3), 2), noise(1, 8, 4))
    yield function("F.pixel_shuffle", "layers", lambda x: F.pixel_shuffle(x, 2), image)
    yield function("F.pixel_unshuffle", "layers", lambda x: F.pixel_unshuffle(x, 2), noise(1, 2, 4, 4))
    yield function("F.channel_shuffle", "layers", lambda x: F.channel_shuffle(x, 2), image)
    for mode in ("reflect", "replicate", "circular", "constant"):
        for dims, x in ((1, sequence), (2, image), (3, volume)):
            yield function(
                f"F.pad ({mode}, {dims}d)",
                "padding",
                lambda x, m=mode, d=dims: F.pad(x, (1, 2) * d if m != "reflect" or d < 3 else (1, 1) * d, mode=m),
                x,
            )


# -- pooling and resampling ----------------------------------------------------------------------------------------------


def _of_dimension(d: int, name: str, *args: Any, **options: Any) -> Operation:
    return lambda x: getattr(F, f"{name}{d}d")(x, *args, **options)


def _pooling() -> Iterator[Case]:
    inputs = {1: spread(2, 3, 8), 2: spread(2, 3, 6, 6), 3: spread(1, 2, 4, 4, 4)}
    for d, x in inputs.items():
        of = functools.partial(_of_dimension, d)
        yield function(f"F.avg_pool{d}d", "pooling", of("avg_pool", 2), x)
        yield function(f"F.max_pool{d}d", "pooling", of("max_pool", 3, stride=2, padding=1), x)
        yield function(f"F.max_pool{d}d (dilated)", "pooling", of("max_pool", 2, dilation=2), x)
        yield function(f"F.adaptive_avg_pool{d}d", "pooling", of("adaptive_avg_pool", 3), x)
        yield function(f"F.adaptive_avg_pool{d}d (1)", "pooling", of("adaptive_avg_pool", 1), x)
        yield function(f"F.adaptive_max_pool{d}d", "pooling", of("adaptive_max_pool", 3), x)
        yield function(f"F.lp_pool{d}d", "pooling", of("lp_pool", 3.0, 2), 1.5 + x.abs())
        yield function(
            f"F.max_unpool{d}d",
            "pooling",
            lambda x, d=d: getattr(F, f"max_unpool{d}d")(*getattr(F, f"max_pool{d}d")(x, 2, return_indices=True), 2),
            x,
        )
    samples = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    yield function(
        "F.fractional_max_pool2d",
        "pooling",
        lambda x: F.fractional_max_pool2d(x, 2, output_size=3, _random_samples=samples),
        inputs[2],
    )
    yield function(
        "F.fractional_max_pool3d",
        "pooling",
        lambda x: F.fractional_max_pool3d(
            x, 2, output_size=2, _random_samples=torch.full((1, 2, 3), 0.4, dtype=torch.float64)
        ),
        inputs[3],
    )
    for mode, d in (
        ("nearest", 1),
        ("nearest", 2),
        ("nearest", 3),
        ("nearest-exact", 2),
        ("linear", 1),
        ("bilinear", 2),
        ("bicubic", 2),
        ("trilinear", 3),
        ("area", 2),
    ):
        yield function(
            f"F.interpolate ({mode}, {d}d)",
            "resampling",
            lambda x, m=mode: F.interpolate(x, scale_factor=1.5, mode=m),
            inputs[d],
        )
    for mode in ("bilinear", "bicubic"):
        yield function(
            f"F.interpolate ({mode}, antialias)",
            "resampling",
            lambda x, m=mode: F.interpolate(x, size=(3, 4), mode=m, antialias=True),
            inputs[2],
        )
        yield function(
            f"F.interpolate ({mode}, align_corners)",
            "resampling",
            lambda x, m=mode: F.interpolate(x, size=(8, 7), mode=m, align_corners=True),
            inputs[2],
        )
    grid = noise(2, 3, 4, 2, phase=1.0, scale=0.8)
    for mode in ("bilinear", "nearest", "bicubic"):
        for padding in ("zeros", "border", "reflection"):
            yield function(
                f"F.grid_sample ({mode}, {padding})",
                "resampling",
                lambda x, g, m=mode, p=padding: F.grid_sample(x, g, mode=m, padding_mode=p, align_corners=False),
                inputs[2],
                1.3 * grid,
            )
    for mode in ("bilinear", "nearest"):
        yield function(
            f"F.grid_sample ({mode}, 3d)",
            "resampling",
            lambda x, g, m=mode: F.grid_sample(x, g, mode=m, align_corners=True),
            inputs[3],
            noise(1, 2, 3, 2, 3, phase=1.0, scale=0.8),
        )
    yield function(
        "F.affine_grid", "resampling", lambda t: F.affine_grid(t, [2, 3, 4, 4], align_corners=False), noise(2, 2, 3)
    )


# -- embeddings ----------------------------------------------------------------------------------------------------------

BAGS, OFFSETS = torch.tensor([1, 2, 4, 5, 4, 3, 2, 2]), torch.tensor([0, 3, 3, 6])


def _embeddings() -> Iterator[Case]:
    w = noise(6, 3)
    yield function("F.embedding", "embeddings", lambda w: F.embedding(BAGS, w), w)
    yield function(
        "F.embedding (padding_idx)",
        "embeddings",
        lambda w: F.embedding(BAGS, torch.cat([w[:2], torch.ones_like(w[:1]), w[3:]]), padding_idx=2),
        w,
    )
    yield function(
        "F.embedding (by frequency)",
        "embeddings",
        lambda w: F.embedding(BAGS, w, scale_grad_by_freq=True),
        w,
        first=False,
    )
    for mode in ("sum", "mean", "max"):
        yield function(
            f"F.embedding_bag ({mode})", "embeddings", lambda w, m=mode: F.embedding_bag(BAGS, w, OFFSETS, mode=m), w
        )
        yield function(
            f"F.embedding_bag ({mode}, 2d)",
            "embeddings",
            lambda w, m=mode: F.embedding_bag(BAGS.reshape(2, 4), w, mode=m),
            w,
        )
        yield function(
            f"F.embedding_bag ({mode}, padding_idx, last offset)",
            "embeddings",
            lambda w, m=mode: F.embedding_bag(
                BAGS, w, torch.tensor([0, 3, 3, 8]), mode=m, padding_idx=2, include_last_offset=True
            ),
            w,
        )
    yield function(
        "F.embedding_bag (per_sample_weights)",
        "embeddings",
        lambda w, s: F.embedding_bag(BAGS, w, OFFSETS, mode="sum", per_sample_weights=s),
        w,
        positive(8),
    )
    yield layer("nn.Embedding", "embeddings", lambda: nn.Embedding(6, 3), call=lambda m: m(BAGS))
    yield layer("nn.EmbeddingBag", "embeddings", lambda: nn.EmbeddingBag(6, 3), call=lambda m: m(BAGS, OFFSETS))


# -- distances -----------------------------------------------------------------------------------------------------------


def _distances() -> Iterator[Case]:
    a, b = noise(4, 3), noise(5, 3, phase=1.0)
    for p in (0.5, 1.0, 1.5, 2.0, 3.0, math.inf):
        yield function(f"torch.cdist (p={p:g})", "distances", lambda a, b, p=p: torch.cdist(a, b, p=p), a, b)
        yield function(f"F.pdist (p={p:g})", "distances", lambda a, p=p: F.pdist(a, p=p), a)
    yield function("torch.cdist (batched)", "distances", torch.cdist, noise(2, 4, 3), noise(1, 5, 3, phase=1.0))
    yield function(
        "torch.cdist (matrix product)",
        "distances",
        lambda a, b: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"),
        a,
        b,
    )
    yield function("F.pairwise_distance", "distances", F.pairwise_distance, a, b[:4])
    yield function("F.pairwise_distance (p=3)", "distances", lambda a, b: F.pairwise_distance(a, b, p=3.0), a, b[:4])
    yield function("F.cosine_similarity", "distances", F.cosine_similarity, a, b[:4])
    yield function("torch.dist", "distances", lambda a, b: torch.dist(a, b, 3), a, b[:4])
    yield function("torch.renorm", "distances", lambda a: torch.renorm(a, 2, 0, 0.8), a)


# -- recurrence ----------------------------------------------------------------------------------------------------------


def _recurrent() -> Iterator[Case]:
    x = noise(4, 2, 3)
    for name in ("RNN", "LSTM", "GRU"):
        yield layer(f"nn.{name}", "recurrence", lambda n=name: getattr(nn, n)(3, 4), x)
        yield layer(
            f"nn.{name} (2 layers, both directions)",
            "recurrence",
            lambda n=name: getattr(nn, n)(3, 2, num_layers=2, bidirectional=True, batch_first=True),
            x,
        )
        yield layer(f"nn.{name} (eval)", "recurrence", lambda n=name: getattr(nn, n)(3, 4), x, evaluation=True)
        yield layer(f"nn.{name} (packed)", "recurrence", lambda n=name: getattr(nn, n)(3, 4), x, call=_packed)
        yield layer(f"nn.{name}Cell", "recurrence", lambda n=name: getattr(nn, f"{n}Cell")(3, 4), noise(2, 3))
    yield layer("nn.RNN (relu)", "recurrence", lambda: nn.RNN(3, 4, nonlinearity="relu"), x)
    yield layer("nn.RNNCell (relu)", "recurrence", lambda: nn.RNNCell(3, 4, nonlinearity="relu"), noise(2, 3))
    yield layer("nn.LSTM (projected)", "recurrence", lambda: nn.LSTM(3, 4, proj_size=2), x)
    yield layer("nn.LSTM (no bias)", "recurrence", lambda: nn.LSTM(3, 4, bias=False), x)
    yield layer(
        "nn.LSTM (initial state)",
        "recurrence",
        lambda: nn.LSTM(3, 4),
        x,
        noise(1, 2, 4),
        noise(1, 2, 4, phase=1.0),
        call=lambda m, x, h, c: m(x, (h, c)),
    )


def _packed(module: nn.Module, x: Tensor) -> Any:
    output, state = module(rnn.pack_padded_sequence(x, torch.tensor([4, 2])))
    return rnn.pad_packed_sequence(output)[0], state


# -- attention -----------------------------------------------------------------------------------------------------------


def _attention() -> Iterator[Case]:
    q, k, v = noise(1, 2, 4, 8), noise(1, 2, 5, 8, phase=1.0), noise(1, 2, 5, 8, phase=2.0)
    sdpa = F.scaled_dot_product_attention
    mask = noise(4, 5, phase=5.0) > -0.5
    yield function("F.scaled_dot_product_attention", "attention", sdpa, q, k, v)
    yield function(
        "F.scaled_dot_product_attention (causal)", "attention", lambda q, k, v: sdpa(q, k, v, is_causal=True), k, k, v
    )
    yield function(
        "F.scaled_dot_product_attention (mask)", "attention", lambda q, k, v: sdpa(q, k, v, attn_mask=mask), q, k, v
    )
    yield function(
        "F.scaled_dot_product_attention (learned mask)",
        "attention",
        lambda q, k, v, m: sdpa(q, k, v, attn_mask=m, scale=0.5),
        q,
        k,
        v,
        noise(4, 5),
    )
    yield function(
        "F.scaled_dot_product_attention (gqa)",
        "attention",
        lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
        noise(1, 4, 4, 8),
        k,
        v,
    )
    yield function(
        "F.scaled_dot_product_attention (dropout)",
        "attention",
        _seeded(functools.partial(sdpa, dropout_p=0.3)),
        q,
        k,
        v,
    )
    x = noise(2, 3, 4)
    twice = lambda m, x: m(x, x, x)  # noqa: E731
    yield layer(
        "nn.MultiheadAttention", "attention", lambda: nn.MultiheadAttention(4, 2, batch_first=True), x, call=twice
    )
    yield layer(
        "nn.MultiheadAttention (no weights)",
        "attention",
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        x,
        call=lambda m, x: m(x, x, x, need_weights=False),
    )
    yield layer(
        "nn.MultiheadAttention (eval)",
        "attention",
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        x,
        call=lambda m, x: m(x, x, x, need_weights=False),
        evaluation=True,
    )
    yield layer(
        "nn.MultiheadAttention (kdim, bias_kv)",
        "attention",
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True, add_zero_attn=True, batch_first=True),
        x,
        noise(2, 5, 3),
        noise(2, 5, 5),
        call=lambda m, q, k, v: m(q, k, v, need_weights=False),
    )
    for mode, evaluation in (("train", False), ("eval", True)):
        yield layer(
            f"nn.TransformerEncoderLayer ({mode})",
            "attention",
            lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
            x,
            evaluation=evaluation,
        )
        yield layer(
            f"nn.TransformerDecoderLayer ({mode})",
            "attention",
            lambda: nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
            x,
            noise(2, 5, 4),
            evaluation=evaluation,
        )
    yield layer(
        "nn.TransformerEncoder (eval)",
        "attention",
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True), 2
        ),
        x,
        evaluation=True,
    )
    yield layer(
        "nn.Transformer",
        "attention",
        lambda: nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True),
        x,
        noise(2, 5, 4),
    )


# -- linear algebra ------------------------------------------------------------------------------------------------------


def _linalg() -> Iterator[Case]:
    a, b, tall = matrix(3), matrix(3, phase=1.0), torch.cat([matrix(3), noise(1, 3, phase=2.0)])
    symmetric = lambda a: a + a.mT  # noqa: E731
    definite = lambda a: a @ a.mT + torch.eye(3, dtype=a.dtype)  # noqa: E731
    la = torch.linalg
    calls: dict[str, Operation] = {
        "inv": la.inv,
        "det": la.det,
        "slogdet": la.slogdet,
        "cholesky": lambda a: la.cholesky(definite(a)),
        "qr": la.qr,
        "eigh": lambda a: la.eigh(symmetric(a))[0],
        "eigh(vectors)": lambda a: la.eigh(symmetric(a))[1] ** 2,
        "eigvalsh": lambda a: la.eigvalsh(symmetric(a)),
        "eigvals": lambda a: la.eigvals(a).real,
        "svdvals": la.svdvals,
        "matrix_exp": la.matrix_exp,
        "matrix_power": lambda a: la.matrix_power(a, 3),
        "pinv": la.pinv,
        "norm": la.norm,
        "matrix_norm(nuc)": lambda a: la.matrix_norm(a, "nuc"),
        "matrix_norm(2)": lambda a: la.matrix_norm(a, 2),
        "vector_norm": la.vector_norm,
        "vector_norm(1)": lambda a: la.vector_norm(a, 1),
        "vector_norm(3)": lambda a: la.vector_norm(a, 3, dim=1),
        "vector_norm(inf)": lambda a: la.vector_norm(a, math.inf),
        "cond": la.cond,
        "lu": lambda a: la.lu(a)[1:],
        "lu_factor": lambda a: la.lu_factor(a)[0],
        "cross": lambda a: la.cross(a, a.flip(0)),
        "vander": lambda a: la.vander(a[0]),
        "multi_dot": lambda a: la.multi_dot([a, a.mT, a]),
        "householder_product": lambda a: la.householder_product(a, a[0]),
        "cholesky_ex": lambda a: la.cholesky_ex(definite(a))[0],
        "inv_ex": lambda a: la.inv_ex(a)[0],
        "ldl_factor": lambda a: la.ldl_factor(definite(a))[0],
        "matrix_norm(fro)": la.matrix_norm,
    }
    for name, operation in calls.items():
        yield function(f"linalg.{name}", "linear algebra", operation, a)
    yield function("linalg.qr (tall)", "linear algebra", la.qr, tall)
    yield function(
        "linalg.svd (tall)",
        "linear algebra",
        lambda a: (lambda u, s, v: (u[:, :1] * v[:1], s))(*la.svd(a, full_matrices=False)),
        tall,
    )
    yield function("linalg.pinv (tall)", "linear algebra", la.pinv, tall)
    pairs: dict[str, Operation] = {
        "solve": la.solve,
        "lstsq": lambda a, b: la.lstsq(a, b).solution,
        "solve_triangular": lambda a, b: la.solve_triangular(a.triu(), b, upper=True),
        "solve_ex": lambda a, b: la.solve_ex(a, b)[0],
        "lu_solve": lambda a, b: la.lu_solve(*la.lu_factor(a), b),
        "tensorsolve": lambda a, b: la.tensorsolve(a, b[0]),
    }
    for name, operation in pairs.items():
        yield function(f"linalg.{name}", "linear algebra", operation, a, b)
    yield function(
        "torch.cholesky_solve", "linear algebra", lambda b, a: torch.cholesky_solve(b, la.cholesky(definite(a))), b, a
    )
    yield function(
        "torch.cholesky_inverse", "linear algebra", lambda a: torch.cholesky_inverse(la.cholesky(definite(a))), a
    )
    yield function("torch.logdet", "linear algebra", lambda a: torch.logdet(definite(a)), a)
    yield function("torch.lobpcg", "linear algebra", _seeded(lambda a: torch.lobpcg(definite(a), k=1)[0]), a)


# -- functions of tensors ------------------------------------------------------------------------------------------------


def _functions() -> Iterator[Case]:
    x, y, p = noise(3, 4), noise(3, 4, phase=1.0), positive(3, 4)
    unit = probabilities(3, 4)
    sp = torch.special
    of_any: dict[str, Operation] = {
        "cumsum": lambda x: x.cumsum(0),
        "cumprod": lambda x: x.cumprod(1),
        "prod": lambda x: x.prod(1),
        "std": lambda x: x.std(1),
        "var": lambda x: x.var(1),
        "std_mean": lambda x: torch.std_mean(x, 1),
        "logsumexp": lambda x: x.logsumexp(1),
        "logcumsumexp": lambda x: x.logcumsumexp(1),
        "max": lambda x: x.max(1)[0],
        "amax": lambda x: x.amax(1),
        "aminmax": torch.aminmax,
        "median": lambda x: x.median(1)[0],
        "kthvalue": lambda x: x.kthvalue(2, 1)[0],
        "topk": lambda x: x.topk(2, 1)[0],
        "sort": lambda x: x.sort(1)[0],
        "cummax": lambda x: x.cummax(1)[0],
        "mode": lambda x: x.mode(1)[0],
        "quantile": lambda x: x.quantile(0.3, 1),
        "nanmean": torch.nanmean,
        "trapezoid": torch.trapezoid,
        "cov": torch.cov,
        "corrcoef": torch.corrcoef,
        "diff": torch.diff,
        "gradient": lambda x: torch.gradient(x, dim=1),
        "fft": torch.fft.fft,
        "rfft": torch.fft.rfft2,
        "irfft": torch.fft.irfft,
        "stft": lambda x: torch.stft(x.reshape(1, -1), 4, window=torch.ones(4, dtype=x.dtype), return_complex=True),
        "roll": lambda x: x.roll(1, 0),
        "scatter_reduce(prod)": lambda x: torch.zeros(4, dtype=x.dtype).scatter_reduce(
            0, torch.tensor([0, 1, 1, 2]), x[0], "prod", include_self=False
        ),
        "scatter_reduce(amax)": lambda x: torch.zeros(4, dtype=x.dtype).scatter_reduce(
            0, torch.tensor([0, 1, 1, 2]), x[0], "amax", include_self=False
        ),
        "scatter_reduce(mean)": lambda x: torch.zeros(4, dtype=x.dtype).scatter_reduce(
            0, torch.tensor([0, 1, 1, 2]), x[0], "mean", include_self=False
        ),
        "scatter_add": lambda x: torch.zeros(4, dtype=x.dtype).scatter_add(0, torch.tensor([0, 1, 1, 2]), x[0]),
        "index_add": lambda x: x.index_add(0, torch.tensor([0, 0]), x[1:]),
        "index_reduce(prod)": lambda x: x.index_reduce(0, torch.tensor([0, 0]), x[1:], "prod"),
        "index_put": lambda x: x.index_put((torch.tensor([0, 1]),), x[1:], accumulate=True),
        "take_along_dim": lambda x: x.take_along_dim(torch.tensor([[1], [0], [3]]), 1),
        "masked_scatter": lambda x: x.masked_scatter(y > 0, x.flip(0)),
        "clamp": lambda x: x.clamp(-0.5, 0.5),
        "erfinv": lambda x: torch.erfinv(0.8 * x),
        "sinc": torch.sinc,
        "i0": torch.i0,
        "i0e": sp.i0e,
        "i1": sp.i1,
        "i1e": sp.i1e,
        "erfcx": sp.erfcx,
        "ndtr": sp.ndtr,
        "log_ndtr": sp.log_ndtr,
        "expm1": torch.expm1,
        "atanh": lambda x: torch.atanh(0.8 * x),
        "asin": lambda x: torch.asin(0.8 * x),
        "frac": torch.frac,
        "combinations": lambda x: torch.combinations(x[0]),
        "block_diag": lambda x: torch.block_diag(x, x),
        "segment_reduce": lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([2, 1])),
        "segment_reduce(max)": lambda x: torch.segment_reduce(x, "max", lengths=torch.tensor([2, 1])),
        "segment_reduce(mean)": lambda x: torch.segment_reduce(x, "mean", lengths=torch.tensor([2, 1])),
        "segment_reduce(prod)": lambda x: torch.segment_reduce(x, "prod", lengths=torch.tensor([2, 1])),
    }
    for name, operation in of_any.items():
        yield function(f"torch.{name}", "functions", operation, x)
    of_positive: dict[str, Operation] = {
        "lgamma": torch.lgamma,
        "digamma": torch.digamma,
        "polygamma": lambda x: torch.polygamma(2, x + 1),
        "mvlgamma": lambda x: torch.mvlgamma(x + 1, 2),
        "entr": sp.entr,
        "log1p": torch.log1p,
        "acosh": lambda x: torch.acosh(x + 1),
        "rsqrt": torch.rsqrt,
        "bessel_j0": sp.bessel_j0,
        "bessel_j1": sp.bessel_j1,
        "airy_ai": sp.airy_ai,
        "legendre_polynomial_p": lambda x: sp.legendre_polynomial_p(x, 2),
    }
    for name, operation in of_positive.items():
        yield function(f"torch.{name}", "functions", operation, p)
    yield function(
        "torch.triangular_solve",
        "functions",
        lambda a, b: torch.triangular_solve(b, a)[0],
        matrix(3),
        matrix(3, phase=1.0),
    )
    yield function("torch.cholesky_inverse (full matrix)", "functions", torch.cholesky_inverse, matrix(3))
    yield function(
        "linalg.solve_triangular (full matrix)",
        "functions",
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=True),
        matrix(3),
        matrix(3, phase=1.0),
    )
    yield function("torch.logit", "functions", torch.logit, unit)
    yield function("torch.ndtri", "functions", sp.ndtri, unit)
    of_two: dict[str, Operation] = {
        "atan2": torch.atan2,
        "hypot": torch.hypot,
        "logaddexp": torch.logaddexp,
        "logaddexp2": torch.logaddexp2,
        "maximum": torch.maximum,
        "fmod": lambda x, y: torch.fmod(x, y + 2.2),
        "remainder": lambda x, y: torch.remainder(x, y + 2.2),
        "lerp": lambda x, y: torch.lerp(x, y, 0.3 * x),
        "pow": lambda x, y: (x + 2) ** y,
        "xlogy": lambda x, y: torch.xlogy(x, y + 2),
        "xlog1py": lambda x, y: sp.xlog1py(x, y + 1.5),
        "addcdiv": lambda x, y: torch.addcdiv(x, x, y + 2),
        "bmm": lambda x, y: torch.bmm(x[None], y.mT[None]),
        "baddbmm": lambda x, y: torch.baddbmm((x @ y.mT)[None], x[None], y.mT[None]),
        "einsum": lambda x, y: torch.einsum("ij,kj->ik", x, y),
        "kron": torch.kron,
        "copysign": torch.copysign,
        "float_power": lambda x, y: torch.float_power(x + 2, y),
        "ldexp": torch.ldexp,
        "where": lambda x, y: torch.where(x > 0, x * y, y),
        "complex": torch.complex,
        "polar": lambda x, y: torch.polar(x + 2, y),
        "tensordot": lambda x, y: torch.tensordot(x, y, dims=([1], [1])),
    }
    for name, operation in of_two.items():
        yield function(f"torch.{name}", "functions", operation, x, y)
    yield function("torch.gammainc", "functions", lambda x: sp.gammainc(torch.full_like(x, 1.3), x), p)
    yield function("torch.gammaincc", "functions", lambda x: sp.gammaincc(torch.full_like(x, 1.3), x), p)
    yield function("torch.zeta", "functions", lambda x: sp.zeta(torch.full_like(x, 2.3), x + 1), p)
    yield function(
        "torch._standard_gamma (rsample)",
        "functions",
        _seeded(lambda x: torch.distributions.Gamma(x, torch.ones_like(x)).rsample()),
        p,
        constants=True,
    )
    yield function("torch.angle", "functions", lambda x, y: torch.angle(torch.complex(x, y)), x, y)
    yield function("torch.complex abs", "functions", lambda x, y: torch.complex(x, y).abs(), x, y)
    yield function("torch.sgn (complex)", "functions", lambda x, y: torch.complex(x, y).sgn(), x, y)


# -- kinks and exact zeros -----------------------------------------------------------------------------------------------


def _kinks() -> Iterator[Case]:
    zero, tied = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    at_zero: dict[str, Operation] = {
        "F.relu": F.relu,
        "F.leaky_relu": F.leaky_relu,
        "F.elu": F.elu,
        "F.softshrink": F.softshrink,
        "F.softsign": F.softsign,
        "F.silu": F.silu,
        "F.gelu": F.gelu,
        "torch.abs": torch.abs,
        "F.normalize": F.normalize,
        "linalg.vector_norm": torch.linalg.vector_norm,
        "linalg.vector_norm(3)": lambda x: torch.linalg.vector_norm(x, 3),
        "linalg.matrix_norm": torch.linalg.matrix_norm,
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
        "linalg.svdvals": torch.linalg.svdvals,
        "linalg.matrix_exp": lambda x: torch.linalg.matrix_exp(x[:, :2]),
        "linalg.det": lambda x: torch.linalg.det(x[:, :2]),
    }
    for name, operation in at_zero.items():
        yield function(f"{name} at 0", "at zero", operation, zero, smooth=False)
    yield function(
        "linalg.eigvalsh of equal eigenvalues",
        "at zero",
        lambda x: torch.linalg.eigvalsh(torch.diag(x[0])),
        tied,
        smooth=False,
    )
    yield function(
        "linalg.svdvals of equal values",
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


def _zeroed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    return module


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Every operation under audit."""
    families = (
        _activations,
        _losses,
        _norms,
        _parametrized,
        _layers,
        _pooling,
        _embeddings,
        _distances,
        _recurrent,
        _attention,
        _linalg,
        _functions,
        _kinks,
    )
    return tuple(case for family in families for case in family())
