"""The model families: small networks in double precision, called with a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop

Batch = dict[str, Tensor]
ROWS, WIDTH, OUT, LENGTH, VOCABULARY = 4, 4, 3, 3, 5
PADDING = 0


class OfInputs(nn.Module):
    """A stack of layers applied to ``batch["x"]``, seen in another shape if the layers want one."""

    def __init__(self, *layers: nn.Module, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.shape = shape

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"]
        output: Tensor = self.layers(x.reshape(len(x), *self.shape) if self.shape else x)
        return output.reshape(len(x), -1)


class OfTokens(nn.Module):
    """An embedding with a padding row, then a mean over the positions or a network over them."""

    def __init__(self, after: str, *, sparse: bool = False) -> None:
        super().__init__()
        self.after = after
        if after == "bag":
            self.bag = nn.EmbeddingBag(VOCABULARY, WIDTH, padding_idx=PADDING, mode="mean")
        else:
            self.embedding = nn.Embedding(
                VOCABULARY, OUT if sparse else WIDTH, padding_idx=PADDING, sparse=sparse
            )
        if after == "lstm":
            self.cell: nn.Module = nn.LSTM(WIDTH, 2, batch_first=True)
        elif after == "gru":
            self.cell = nn.GRU(WIDTH, 2, batch_first=True)
        elif after == "attention":
            self.cell = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        elif after == "transformer":
            self.cell = nn.TransformerEncoderLayer(WIDTH, 2, 4, dropout=0.0, batch_first=True)
        if not sparse:
            self.head = nn.Linear(2 if after in ("lstm", "gru") else WIDTH, OUT)

    def forward(self, batch: Batch) -> Tensor:
        tokens = batch["tokens"]
        hidden: Tensor
        if self.after == "bag":
            hidden = self.bag(tokens)
        else:
            hidden = self.embedding(tokens)
            if self.after in ("lstm", "gru"):
                hidden = self.cell(hidden)[0]
            elif self.after == "attention":
                padded = (tokens == PADDING) & (torch.arange(LENGTH) > 0)
                hidden = self.cell(hidden, hidden, hidden, key_padding_mask=padded)[0]
            elif self.after == "transformer":
                hidden = self.cell(hidden)
            hidden = hidden.mean(1)
        output: Tensor = self.head(hidden) if hasattr(self, "head") else hidden
        return output


class Tied(nn.Module):
    """One weight used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.head = nn.Linear(WIDTH, OUT)

    def forward(self, batch: Batch) -> Tensor:
        output: Tensor = self.head(self.second(self.first(batch["x"]).tanh()).sin())
        return output


class Unused(nn.Module):
    """A parameter that no loss uses, and one that only the even steps use."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, OUT)
        self.never = nn.Parameter(torch.ones(2))
        self.sometimes = nn.Parameter(torch.full((OUT,), 0.3))

    def forward(self, batch: Batch) -> Tensor:
        output: Tensor = self.body(batch["x"])
        return output + self.sometimes.sin() if int(batch["step"]) % 2 == 0 else output.tanh()


class HandWrittenAttention(nn.Module):
    """Scaled dot-product attention over the rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, OUT)

    def forward(self, batch: Batch) -> Tensor:
        q, k, v = self.project(batch["x"]).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        output: Tensor = self.head(mixed)
        return output


class Normalized(nn.Module):
    """Cosine classification: normalised features, normalised class weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.classes = nn.Parameter(torch.randn(OUT, WIDTH))

    def forward(self, batch: Batch) -> Tensor:
        features = F.normalize(self.body(batch["x"]), dim=-1)
        return 2 * features @ F.normalize(self.classes, dim=-1).T


class Stateful(nn.Module):
    """A module that counts its calls in a buffer and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, OUT)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.calls: Tensor
        self.seen: list[int] = []

    def forward(self, batch: Batch) -> Tensor:
        self.calls += 1
        self.seen.append(len(batch["x"]))
        output: Tensor = self.body(batch["x"]) / self.calls
        return output.tanh()


class Keys(nn.Module):
    """An inner loss with parameters of its own: from keys to values."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, module: Callable[[Tensor], Tensor], data: Tensor) -> Tensor:
        return (module(self.key(data)) - self.value(data)).square().mean()


def next_token(module: Callable[[Tensor], Tensor], data: Tensor) -> Tensor:
    """An inner loss that is a function: each token from its neighbour."""
    return (module(data) - data.roll(1, -1)).square().sum().sin()


class Adapting(nn.Module):
    """A network with a layer of fast weights; ``by_hand`` is the same layer, sample by sample.

    What kind of layer it is comes from the random state.
    """

    by_hand = False

    def __init__(self) -> None:
        super().__init__()

        def chosen(*values: Any) -> Any:
            return values[int(torch.randint(len(values), ()))]

        optim = innerloop.optim
        self.rule = chosen("sgd", "momentum", "adam", "clipped")
        rule = {
            "sgd": lambda: optim.sgd(lr=0.3),
            "momentum": lambda: optim.sgd(lr=0.2, momentum=0.5),
            "adam": lambda: optim.adam(lr=0.1, eps=1e-2),
            "clipped": lambda: optim.chain(optim.clip_by_global_norm(0.3), optim.sgd(lr=0.3)),
        }[self.rule]()
        inner = chosen(
            lambda: nn.Linear(2, 2),
            lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)),
            # No LayerNorm: with a gradient penalty the truth takes its third derivative, which is
            # wrong in PyTorch.
            lambda: nn.Sequential(nn.Linear(2, 2, bias=False), nn.Softplus()),
        )()
        learned = chosen(True, False)
        self.rate = {"sgd": 0.3, "momentum": 0.2, "adam": 0.1, "clipped": 0.3}[self.rule]
        self.body = nn.Linear(WIDTH, 2 * LENGTH)
        self.fast = innerloop.nn.FastWeights(
            inner,
            chosen(Keys, lambda: next_token)(),
            rule,
            chosen(1, 2, 3),
            chosen(None, None, innerloop.Checkpointed(slots=1), innerloop.Checkpointed(slots=2)),
            read=chosen("before", "after"),
            hyper={"lr": nn.Parameter(torch.tensor(self.rate))} if learned else None,
            output=chosen(None, lambda module, x: module(x.sin()) + x),
        )
        self.head = nn.Linear(2 * LENGTH, OUT)

    def forward(self, batch: Batch) -> Tensor:
        tokens = self.body(batch["x"]).reshape(-1, LENGTH, 2)
        if self.by_hand:
            answers = torch.stack([self._of_sample(x) for x in tokens])
        else:
            answers = self.fast(tokens)
        output: Tensor = self.head(answers.flatten(1))
        return output

    def _of_sample(self, x: Tensor) -> Tensor:
        """Train on the chunks of one sample, one after the other."""
        fast = self.fast
        weights: dict[str, Tensor] = dict(fast.module.named_parameters())
        first = {name: torch.zeros_like(p) for name, p in weights.items()}
        state: tuple[dict[str, Tensor], dict[str, Tensor]] = first, first
        found = []
        for t, chunk in enumerate(x.split(fast.chunk)):
            before = weights
            with torch.enable_grad():
                # Fast weights that are frozen from outside are trained inside all the same.
                weights = {
                    n: p if p.requires_grad else p.detach().requires_grad_()
                    for n, p in weights.items()
                }
                loss = fast.loss(_at(fast.module, weights), chunk)
                grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                weights, state = self._updated(
                    weights, dict(zip(weights, grads, strict=True)), state, t + 1
                )
            module = _at(fast.module, before if fast.read == "before" else weights)
            found.append(module(chunk) if fast.output is None else fast.output(module, chunk))
        return torch.cat(found)

    def _updated(
        self, weights: dict[str, Tensor], grads: dict[str, Tensor], state: Any, t: int
    ) -> tuple[dict[str, Tensor], Any]:
        """Do one step of the inner rule."""
        lr = self.rate if self.fast.hyper is None else self.fast.hyper()["lr"]
        first, second = state
        if self.rule == "adam":
            first = {n: 0.9 * first[n] + 0.1 * g for n, g in grads.items()}
            second = {n: 0.999 * second[n] + 0.001 * g.square() for n, g in grads.items()}
            steps = {
                n: (m / (1 - 0.9**t)) / ((second[n] / (1 - 0.999**t) + 1e-300).sqrt() + 1e-2)
                for n, m in first.items()
            }
        elif self.rule == "momentum":
            first = steps = {n: 0.5 * first[n] + g for n, g in grads.items()}
        elif self.rule == "clipped":
            total = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
            steps = {n: g * (0.3 / (total + 1e-6)).clamp(max=1.0) for n, g in grads.items()}
        else:
            steps = grads
        return {n: p - lr * steps[n] for n, p in weights.items()}, (first, second)


def _at(module: nn.Module, params: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a module at other parameters, by torch."""
    return lambda x: torch.func.functional_call(module, params, (x,))


def _mlp(*between: nn.Module) -> Callable[[], nn.Module]:
    return lambda: OfInputs(nn.Linear(WIDTH, 4), *_fresh(between), nn.Linear(4, OUT))


def _fresh(layers: tuple[nn.Module, ...]) -> list[nn.Module]:
    import copy

    return [copy.deepcopy(layer) for layer in layers]


def _evaluated(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make().eval()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: OfInputs(nn.Linear(WIDTH, OUT)),
    "tanh": _mlp(nn.Tanh()),
    "relu": _mlp(nn.ReLU()),
    "gelu": _mlp(nn.GELU()),
    "silu": _mlp(nn.SiLU()),
    "prelu": _mlp(nn.PReLU()),
    "softplus": _mlp(nn.Softplus(), nn.Softmax(-1)),
    "dropout": _mlp(nn.Tanh(), nn.Dropout(0.3)),
    "batch norm": _mlp(nn.BatchNorm1d(4), nn.Tanh()),
    "batch norm, evaluated": _evaluated(_mlp(nn.BatchNorm1d(4), nn.Tanh())),
    "layer norm": _mlp(nn.LayerNorm(4), nn.SiLU()),
    "group norm": lambda: OfInputs(
        nn.Conv1d(1, 4, 2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, OUT),
        shape=(1, WIDTH),
    ),
    "instance norm": lambda: OfInputs(
        nn.Conv1d(1, 2, 2),
        nn.InstanceNorm1d(2, affine=True),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6, OUT),
        shape=(1, WIDTH),
    ),
    "rms norm": _mlp(nn.RMSNorm(4), nn.GELU()),
    "conv": lambda: OfInputs(
        nn.Conv2d(1, 3, 2, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3, OUT),
        shape=(1, 2, 2),
    ),
    "max pool": lambda: OfInputs(
        nn.Conv2d(1, 3, 2, padding=1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3, OUT),
        shape=(1, 2, 2),
    ),
    "transposed conv": lambda: OfInputs(
        nn.ConvTranspose1d(1, 2, 2), nn.ELU(), nn.Flatten(), nn.Linear(10, OUT), shape=(1, WIDTH)
    ),
    "weight norm": lambda: OfInputs(
        nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 4)), nn.Tanh(), nn.Linear(4, OUT)
    ),
    "orthogonal": lambda: OfInputs(
        nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH), use_trivialization=False),
        nn.Tanh(),
        nn.Linear(WIDTH, OUT),
    ),
    "embedding": lambda: OfTokens("mean"),
    "embedding bag": lambda: OfTokens("bag"),
    "lstm": lambda: OfTokens("lstm"),
    "gru": lambda: OfTokens("gru"),
    "multi-head attention": lambda: OfTokens("attention"),
    "transformer": lambda: OfTokens("transformer"),
    "attention": HandWrittenAttention,
    "tied": Tied,
    "unused": Unused,
    "normalized": Normalized,
    "stateful": Stateful,
    "sparse embedding": lambda: OfTokens("mean", sparse=True),
}
"""Family -> its constructor. One more line enrols one more."""

NEWER: dict[str, Callable[[], nn.Module]] = {"fast weights": Adapting}
"""Families that `extras` draws."""

OF_TOKENS = frozenset(
    {
        "embedding",
        "embedding bag",
        "sparse embedding",
        "lstm",
        "gru",
        "multi-head attention",
        "transformer",
    }
)
"""Families that look tokens up in a table with a padding row."""
SPARSE = frozenset({"sparse embedding"})
OWN_STATE = frozenset({"stateful"})
"""Families whose next output depends on buffers that they change: only `Problem.from_module` and
the front ends with modules carry those."""


def make(family: str, seed: int) -> nn.Module:
    """Build a member of a family with random parameters of moderate size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {**FAMILIES, **NEWER}[family]().double()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
            for module in model.modules():
                if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                    module.weight[PADDING] = 0
    return model


def with_padding(model: nn.Module) -> list[str]:
    """List the parameters of which one row is padding, which torch gives no gradient."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, kinds)]


def batches(seed: int, count: int) -> list[Batch]:
    """Draw batches: inputs, tokens with padding, targets, labels and a mask."""
    generator = torch.Generator().manual_seed(seed)

    def draw(t: int) -> Batch:
        tokens = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator)
        lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=generator)
        tokens[torch.arange(LENGTH) >= lengths] = PADDING
        labels = torch.randint(OUT, (ROWS,), generator=generator)
        return {
            "x": torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64),
            "tokens": tokens,
            "y": torch.randn(ROWS, OUT, generator=generator, dtype=torch.float64),
            "labels": labels,
            "mask": (torch.arange(ROWS) < 1 + t % ROWS).double(),
            "step": torch.tensor(t),
        }

    return [draw(t) for t in range(count)]
