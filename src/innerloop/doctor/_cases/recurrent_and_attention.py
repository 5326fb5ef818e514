"""Audited recurrent and attention layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from innerloop.doctor._cases.case import Case, F, _seeded, function, layer, noise


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
        yield layer(
            f"nn.{name} (eval)",
            "recurrence",
            lambda n=name: getattr(nn, n)(3, 4),
            x,
            evaluation=True,
        )
        yield layer(
            f"nn.{name} (packed)",
            "recurrence",
            lambda n=name: getattr(nn, n)(3, 4),
            x,
            call=_packed,
        )
        yield layer(
            f"nn.{name}Cell",
            "recurrence",
            lambda n=name: getattr(nn, f"{n}Cell")(3, 4),
            noise(2, 3),
        )
    yield layer("nn.RNN (relu)", "recurrence", lambda: nn.RNN(3, 4, nonlinearity="relu"), x)
    yield layer(
        "nn.RNNCell (relu)",
        "recurrence",
        lambda: nn.RNNCell(3, 4, nonlinearity="relu"),
        noise(2, 3),
    )
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


def _packed(module: nn.Module, x: Tensor) -> object:
    output, state = module(rnn.pack_padded_sequence(x, torch.tensor([4, 2])))
    return rnn.pad_packed_sequence(output)[0], state


def _attention() -> Iterator[Case]:
    q, k, v = noise(1, 2, 4, 8), noise(1, 2, 5, 8, phase=1.0), noise(1, 2, 5, 8, phase=2.0)
    sdpa = F.scaled_dot_product_attention
    mask = noise(4, 5, phase=5.0) > -0.5
    yield function("F.scaled_dot_product_attention", "attention", sdpa, q, k, v)
    yield function(
        "F.scaled_dot_product_attention (causal)",
        "attention",
        lambda q, k, v: sdpa(q, k, v, is_causal=True),
        k,
        k,
        v,
    )
    yield function(
        "F.scaled_dot_product_attention (mask)",
        "attention",
        lambda q, k, v: sdpa(q, k, v, attn_mask=mask),
        q,
        k,
        v,
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
        "nn.MultiheadAttention",
        "attention",
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        x,
        call=twice,
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
        lambda: nn.MultiheadAttention(
            4, 2, kdim=3, vdim=5, add_bias_kv=True, add_zero_attn=True, batch_first=True
        ),
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
