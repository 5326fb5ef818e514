"""Everyday losses that compile and are right.

**To enrol a loss, add a function under ``@everyday``** that returns a module in float32, the loss
``loss(model, hyper, batch)``, and the batch of one step at a given phase.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from innerloop import rl
from innerloop.strategy import Strategy
from tests.oracles import smooth_noise

Loss = Callable[[Any, Any, Any], Tensor]


class Everyday(NamedTuple):
    """A module, its loss, and data.

    Attributes:
        model: in float32.
        loss: ``loss(model, hyper, batch)``.
        batch: ``batch(phase)``, the data of a step.
    """

    model: nn.Module
    loss: Loss
    batch: Callable[[float], Any]


LOSSES: dict[str, Callable[[], Everyday]] = {}
RULES: dict[str, innerloop.optim.Optimizer] = {
    "sgd": innerloop.optim.sgd(lr=0.05),
    "momentum": innerloop.optim.sgd(lr=0.05, momentum=0.9),
    # With the usual eps a float32 meta-gradient has few digits, compiled or not.
    "adam": innerloop.optim.adam(lr=0.02, eps=0.1),
}
STEPS = 3


def everyday(function: Callable[[], Everyday]) -> Callable[[], Everyday]:
    """Enrol a loss under the name of the function; its module is the same at every call."""

    def seeded() -> Everyday:
        torch.manual_seed(0)
        return function()

    LOSSES[function.__name__] = seeded
    return seeded


def noise(*shape: int, phase: float = 0.0) -> Tensor:
    return smooth_noise(*shape, phase=phase).float()


def labels(count: int, classes: int, phase: float) -> Tensor:
    return (torch.arange(count) + int(phase)) % classes


def classify(count: int = 6, features: int = 5, classes: int = 4) -> Callable[[float], Any]:
    return lambda phase: (noise(count, features, phase=phase), labels(count, classes, phase))


def values(count: int = 6, features: int = 5) -> Callable[[float], Any]:
    return lambda phase: (noise(count, features, phase=phase), noise(count, phase=phase + 50))


def cross_entropy(model: Any, h: Any, b: Any) -> Tensor:
    return F.cross_entropy(model(b[0]), b[1])


def of_output(function: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda model, h, b: function(model(b[0]).squeeze(-1), b[1])


def hidden(activation: nn.Module, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), activation, nn.Linear(8, out))


@everyday
def linear_cross_entropy() -> Everyday:
    return Everyday(nn.Linear(5, 4), cross_entropy, classify())


@everyday
def relu() -> Everyday:
    return Everyday(hidden(nn.ReLU(), 4), cross_entropy, classify())


@everyday
def gelu_label_smoothing() -> Everyday:
    return Everyday(
        hidden(nn.GELU(), 4),
        lambda model, h, b: F.cross_entropy(model(b[0]), b[1], label_smoothing=0.1),
        classify(),
    )


@everyday
def mse() -> Everyday:
    return Everyday(hidden(nn.Tanh(), 1), of_output(F.mse_loss), values())


@everyday
def vector_norm() -> Everyday:
    return Everyday(
        hidden(nn.Tanh(), 4),
        lambda model, h, b: torch.linalg.vector_norm(model(b[0]), dim=1).mean(),
        classify(),
    )


@everyday
def normalize() -> Everyday:
    def loss(model: Any, h: Any, b: Any) -> Tensor:
        return F.cross_entropy(3 * F.normalize(model(b[0]), dim=1), b[1])

    return Everyday(hidden(nn.Tanh(), 4), loss, classify())


@everyday
def layer_norm_mlp() -> Everyday:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))
    return Everyday(model, cross_entropy, classify())


class Block(nn.Module):
    """A pre-LayerNorm block."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        parts = self.qkv(self.norms[0](x)).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        q, k, v = parts
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = torch.ones(t, t, dtype=torch.bool).tril()
            scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
            y = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + torch.as_tensor(self.mlp(self.norms[1](x)))


class GPT(nn.Module):
    """A tiny GPT."""

    def __init__(self, tied: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.positions = nn.Parameter(0.1 * noise(6, 8, phase=3.0))
        self.block = Block(8, fused)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, rows: Tensor) -> Tensor:
        x = self.embed(rows) + self.positions
        return torch.as_tensor(self.head(self.norm(self.block(x))))


def next_token(model: Any, h: Any, rows: Tensor) -> Tensor:
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def tokens(phase: float) -> Tensor:
    return (torch.arange(14).reshape(2, 7) * 5 + int(phase)) % 11


@everyday
def gpt() -> Everyday:
    return Everyday(GPT(), next_token, tokens)


@everyday
def tied_embedding() -> Everyday:
    return Everyday(GPT(tied=True), next_token, tokens)


@everyday
def fused_attention() -> Everyday:
    return Everyday(GPT(fused=True), next_token, tokens)


def images(phase: float) -> Any:
    return noise(3, 1, 8, 8, phase=phase), labels(3, 4, phase)


@everyday
def conv_group_norm_pool() -> Everyday:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )
    return Everyday(model, cross_entropy, images)


@everyday
def two_pools() -> Everyday:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    return Everyday(model, cross_entropy, images)


def _batch_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


@everyday
def batch_norm_train() -> Everyday:
    return Everyday(_batch_norm(), cross_entropy, classify())


@everyday
def batch_norm_eval() -> Everyday:
    return Everyday(_batch_norm().eval(), cross_entropy, classify())


@everyday
def spectral_norm_eval() -> Everyday:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8))
    return Everyday(
        nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 4)).eval(), cross_entropy, classify()
    )


@everyday
def huggingface_gpt2() -> Everyday:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return Everyday(
        transformers.GPT2LMHeadModel(config),
        lambda model, h, rows: F.cross_entropy(
            model(input_ids=rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()
        ),
        tokens,
    )


@everyday
def softplus_bce() -> Everyday:
    def loss(model: Any, h: Any, b: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(b[0]).squeeze(-1), (b[1] > 0).float())

    return Everyday(hidden(nn.Softplus(), 1), loss, values())


@everyday
def smooth_l1() -> Everyday:
    return Everyday(hidden(nn.Tanh(), 1), of_output(F.smooth_l1_loss), values())


@everyday
def kl() -> Everyday:
    def loss(model: Any, h: Any, b: Any) -> Tensor:
        target = (b[1][:, None] * noise(1, 4)).softmax(-1)
        return F.kl_div(model(b[0]).log_softmax(-1), target, reduction="batchmean")

    return Everyday(hidden(nn.Tanh(), 4), loss, values())


@everyday
def ppo() -> Everyday:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5))

    def loss(model: Any, h: Any, b: Any) -> Tensor:
        out = model(b[0])
        policy = rl.Categorical(out[:, :4])
        return rl.ppo_loss(
            policy.log_prob(b[1]),
            b[2],
            b[3],
            values=out[:, 4],
            returns=b[3],
            entropy=policy.entropy(),
        ).loss

    def batch(phase: float) -> Any:
        old = -1.4 + 0.1 * noise(6, phase=phase)
        return noise(6, 5, phase=phase), labels(6, 4, phase), old, noise(6, phase=phase + 1)

    return Everyday(model, loss, batch)


def found_by(
    case: Everyday,
    rule: str,
    strategy: Strategy,
    *,
    whole: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The outer loss and its gradient behind three steps."""

    def batch(phase: float) -> Any:
        cast = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
        return torch.utils._pytree.tree_map(cast, case.batch(phase))

    with torch.no_grad():
        for i, p in enumerate(case.model.parameters()):
            if p.dim() > 1:
                p.copy_(0.5 * noise(*p.shape, phase=float(i)))
    case.model.to(dtype)
    problem = innerloop.Problem.from_module(case.model, case.loss, RULES[rule])
    final, (call, _, _) = batch(90.0), innerloop.functional(case.model)

    def outer(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
        moved = functools.partial(call, traj.params)
        return case.loss(moved, hyper, final) + traj.losses.mean()

    value, grads = innerloop.metagradient(
        outer,
        problem,
        {n: p for n, p in case.model.named_parameters() if p.requires_grad},
        [batch(10.0 + t) for t in range(STEPS)],
        wrt="params",
        strategy=strategy,
        compile=whole,
    )
    return [value, *grads.values()]
