"""Audited layers: convolution, pooling, embeddings and distances."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import nn

from innerloop.doctor._cases.case import (
    Case,
    F,
    _of_dimension,
    function,
    layer,
    noise,
    positive,
    spread,
)


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
            lambda d=dims: getattr(nn, f"Conv{d}d")(
                4, 3, 2, dilation=2, padding=1, padding_mode="circular"
            ),
            x,
        )
        yield layer(
            f"nn.ConvTranspose{dims}d",
            "layers",
            lambda d=dims: getattr(nn, f"ConvTranspose{d}d")(4, 2, 2, stride=2),
            x,
        )
    yield layer(
        "nn.Conv2d (same, depthwise)",
        "layers",
        lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4),
        image,
    )
    yield function("F.unfold", "layers", lambda x: F.unfold(x, 2), image)
    yield function("F.fold", "layers", lambda x: F.fold(x, (3, 3), 2), noise(1, 8, 4))
    yield function("F.pixel_shuffle", "layers", lambda x: F.pixel_shuffle(x, 2), image)
    yield function(
        "F.pixel_unshuffle", "layers", lambda x: F.pixel_unshuffle(x, 2), noise(1, 2, 4, 4)
    )
    yield function("F.channel_shuffle", "layers", lambda x: F.channel_shuffle(x, 2), image)
    for mode in ("reflect", "replicate", "circular", "constant"):
        for dims, x in ((1, sequence), (2, image), (3, volume)):
            yield function(
                f"F.pad ({mode}, {dims}d)",
                "padding",
                lambda x, m=mode, d=dims: F.pad(
                    x, (1, 2) * d if m != "reflect" or d < 3 else (1, 1) * d, mode=m
                ),
                x,
            )


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
            lambda x, d=d: getattr(F, f"max_unpool{d}d")(
                *getattr(F, f"max_pool{d}d")(x, 2, return_indices=True), 2
            ),
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
                lambda x, g, m=mode, p=padding: F.grid_sample(
                    x, g, mode=m, padding_mode=p, align_corners=False
                ),
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
        "F.affine_grid",
        "resampling",
        lambda t: F.affine_grid(t, [2, 3, 4, 4], align_corners=False),
        noise(2, 2, 3),
    )


BAGS, OFFSETS = torch.tensor([1, 2, 4, 5, 4, 3, 2, 2]), torch.tensor([0, 3, 3, 6])


def _embeddings() -> Iterator[Case]:
    w = noise(6, 3)
    yield function("F.embedding", "embeddings", lambda w: F.embedding(BAGS, w), w)
    yield function(
        "F.embedding (padding_idx)",
        "embeddings",
        lambda w: F.embedding(
            BAGS, torch.cat([w[:2], torch.ones_like(w[:1]), w[3:]]), padding_idx=2
        ),
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
            f"F.embedding_bag ({mode})",
            "embeddings",
            lambda w, m=mode: F.embedding_bag(BAGS, w, OFFSETS, mode=m),
            w,
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
    yield layer(
        "nn.EmbeddingBag",
        "embeddings",
        lambda: nn.EmbeddingBag(6, 3),
        call=lambda m: m(BAGS, OFFSETS),
    )


def _distances() -> Iterator[Case]:
    a, b = noise(4, 3), noise(5, 3, phase=1.0)
    for p in (0.5, 1.0, 1.5, 2.0, 3.0, math.inf):
        yield function(
            f"torch.cdist (p={p:g})", "distances", lambda a, b, p=p: torch.cdist(a, b, p=p), a, b
        )
        yield function(f"F.pdist (p={p:g})", "distances", lambda a, p=p: F.pdist(a, p=p), a)
    yield function(
        "torch.cdist (batched)", "distances", torch.cdist, noise(2, 4, 3), noise(1, 5, 3, phase=1.0)
    )
    yield function(
        "torch.cdist (matrix product)",
        "distances",
        lambda a, b: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"),
        a,
        b,
    )
    yield function("F.pairwise_distance", "distances", F.pairwise_distance, a, b[:4])
    yield function(
        "F.pairwise_distance (p=3)",
        "distances",
        lambda a, b: F.pairwise_distance(a, b, p=3.0),
        a,
        b[:4],
    )
    yield function("F.cosine_similarity", "distances", F.cosine_similarity, a, b[:4])
    yield function("torch.dist", "distances", lambda a, b: torch.dist(a, b, 3), a, b[:4])
    yield function("torch.renorm", "distances", lambda a: torch.renorm(a, 2, 0, 0.8), a)
