"""``nn.MultiheadAttention`` and the Transformer's layers as they come: meta-gradients of a
double-precision training by hand.

The truth runs inside ``sdpa_kernel(MATH)``, whose kernel PyTorch can differentiate twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests import sdpa

WIDTH, HEADS, LENGTH, BATCH = 8, 2, 5, 3
Meta = Callable[..., dict[str, Tensor]]

PADDING = torch.arange(LENGTH) >= torch.tensor([LENGTH, LENGTH - 1, LENGTH - 3]).unsqueeze(1)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)


class SelfAttention(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **settings)

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False, **masks)[0]
        return out


class Decoder(nn.Module):
    """A decoder over what an encoder makes of the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, 12, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        out: Tensor = self.transformer(x, x.flip(1), **masks)
        return out


def layer(**settings: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 12, dropout=0.0, batch_first=True, **settings)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(layer(), 2)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "MultiheadAttention": (SelfAttention, {}),
    "MultiheadAttention, key_padding_mask": (SelfAttention, {"key_padding_mask": PADDING}),
    "MultiheadAttention, causal": (SelfAttention, {"attn_mask": CAUSAL, "is_causal": True}),
    "MultiheadAttention, both masks": (
        SelfAttention,
        {"attn_mask": CAUSAL.isinf(), "key_padding_mask": PADDING},
    ),
    "MultiheadAttention, bias_k": (lambda: SelfAttention(add_bias_kv=True, add_zero_attn=True), {}),
    "TransformerEncoderLayer": (layer, {}),
    "TransformerEncoderLayer, norm first, gelu": (
        lambda: layer(norm_first=True, activation="gelu"),
        {},
    ),
    "TransformerEncoderLayer, src_key_padding_mask": (layer, {"src_key_padding_mask": PADDING}),
    "TransformerEncoderLayer, causal": (layer, {"src_mask": CAUSAL, "is_causal": True}),
    "TransformerEncoder": (encoder, {}),
    "TransformerEncoder, causal": (encoder, {"mask": CAUSAL, "is_causal": True}),
    "TransformerDecoderLayer": (
        lambda: Crossed(
            nn.TransformerDecoderLayer(WIDTH, HEADS, 12, dropout=0.0, batch_first=True)
        ),
        {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": PADDING},
    ),
    "Transformer": (Decoder, {"tgt_mask": CAUSAL, "tgt_is_causal": True}),
}


class Crossed(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        out: Tensor = self.decoder(x, x.flip(1), **masks)
        return out


def prepared(name: str, train: bool) -> tuple[nn.Module, sdpa.Loss, list[Tensor]]:
    make, masks = CASES[name]
    model = make().double().train(train)
    weights = torch.randn(WIDTH, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x, **masks)
        return (out.sin() * weights).square().mean()

    return (
        model,
        loss,
        [torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64) for _ in range(sdpa.STEPS + 1)],
    )


@pytest.mark.covering
@pytest.mark.parametrize("meta_gradient", [sdpa.tracked, sdpa.unrolled, sdpa.bridged])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", list(CASES))
def test_the_meta_gradient_is_that_of_the_math_kernel(name: str, train: bool, meta_gradient: Meta):
    model, loss, data = prepared(name, train)
    with sdpa_kernel(SDPBackend.MATH):
        truth = sdpa.by_hand(model, loss, data)
    sdpa.assert_equal(meta_gradient(model, loss, data), truth, 1e-10)


@pytest.mark.parametrize("meta_gradient", [sdpa.tracked, sdpa.unrolled])
def test_dropout_is_drawn_as_training_draws_it(meta_gradient: Meta):
    """The same random numbers in the same order as the math kernel: the trained networks are
    equal."""
    model, loss, data = prepared("TransformerEncoderLayer", train=True)
    model.dropout.p = model.dropout1.p = model.dropout2.p = model.self_attn.dropout = 0.3  # type: ignore[union-attr]
    torch.manual_seed(3)
    with sdpa_kernel(SDPBackend.MATH):
        truth = sdpa.by_hand(model, loss, data)
    torch.manual_seed(3)
    sdpa.assert_equal(meta_gradient(model, loss, data), truth, 1e-10)
