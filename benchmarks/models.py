"""The networks of the benchmarks: an MLP, a small convolutional net and a small GPT, in plain
PyTorch.

Nothing here knows innerloop or one of its peers. The MLP also has a functional form, because a
hand-written loop over so small a net is dominated by the cost of going through a module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear layers of the given widths with tanh between them."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.tanh(layer(x))
        out: Tensor = last(x)
        return out


def mlp(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """`MLP.forward` as a function of the module's named parameters."""
    depth = len(params) // 2
    for i in range(depth):
        x = F.linear(x, params[f"layers.{i}.weight"], params[f"layers.{i}.bias"])
        if i < depth - 1:
            x = torch.tanh(x)
    return x


class Conv4(nn.Module):
    """Four times [3x3 convolution, GroupNorm, ReLU, 2x2 max-pool], then a linear layer; 28x28 grey
    images."""

    def __init__(self, channels: int = 64, classes: int = 5) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for before in (1, channels, channels, channels):
            convolution = nn.Conv2d(before, channels, 3, padding=1)
            blocks += [convolution, nn.GroupNorm(8, channels), nn.ReLU(), nn.MaxPool2d(2)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x).flatten(1))
        return out


class Attention(nn.Module):
    """Causal self-attention as a plain masked softmax: the fused kernels have no second
    derivative."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        query, key, value = self.query_key_value(x).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        scores = query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5
        mask = self.get_buffer("mask")[:length, :length]
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
        out: Tensor = self.project((weights @ value).transpose(1, 2).reshape(batch, length, width))
        return out


class Block(nn.Module):
    """A pre-LayerNorm transformer block with exact GELU."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, length)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.contract(F.gelu(self.expand(self.norm2(x))))
        return out


class GPT(nn.Module):
    """A pre-LayerNorm GPT with learned positions, no dropout and an untied head; tokens in, logits
    out."""

    def __init__(
        self,
        vocabulary: int = 256,
        width: int = 128,
        heads: int = 4,
        depth: int = 4,
        length: int = 128,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads, length) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        out: Tensor = self.head(self.norm(self.blocks(x)))
        return out
