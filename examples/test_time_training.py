"""Test-time training: a small GPT with a layer that trains its own fast weights inside `forward`.

    python examples/test_time_training.py               # three seeds, a table at the end
    python examples/test_time_training.py --seeds 1     # one of them
    python examples/test_time_training.py --timing      # the layer's time, and nothing else

The layer has a weight matrix W that is trained anew on every sequence, while the sequence is read
(Sun et al. 2024, "Learning to (learn at test time)"). It predicts a token from the token before it,

    loss(W; chunk t) = sum over i in chunk t of |k_i W - v_i|² / 2,

takes one step of gradient descent for each chunk of 16 tokens, and answers the query of a token
with the W of the chunks before: z_i = q_i W. What is learned by ordinary training, through all
inner steps, are the maps that make keys, values and queries, the start of W, and the inner rate.

`innerloop.nn.FastWeights` is the layer: it cuts the sequences into chunks and trains a W for each.

The text is generated: phrases that are copied and pairs of keys and values that come back, made
anew for each sequence of 512 tokens. The other layer, attention, sees no further than its chunk.
The comparison is with the same network whose W takes no steps, after as many steps of training and
after as many floating-point operations.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import innerloop

Named = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Args:
    """The settings of a run."""

    seeds: int = 3
    steps: int = 300
    """Steps of training of the network whose W is trained inside."""
    batch: int = 4
    lr: float = 5e-3
    width: int = 32
    chunk: int = 16
    test_sequences: int = 64
    timing: bool = False
    """Time the layer beside one that is batched by hand, and stop."""
    plot: str = ""
    """Draw the loss over the steps of training into this file."""
    seed: int = 0


# -- the text --------------------------------------------------------------------------------------

LENGTH, BLOCK = 512, 8
PHRASES, PAIRS = 4, 24
LETTERS = PHRASES * BLOCK
VOCABULARY = LETTERS + 2 * PAIRS


class Text(NamedTuple):
    """Sequences.

    Attributes:
        tokens: ``[count, 512]``.
        known: true where what came before determines the token: the value of a key that was seen,
            or a letter inside of a phrase that was seen.
    """

    tokens: Tensor
    known: Tensor


def generate(count: int, generator: torch.Generator) -> Text:
    """Sequences of 64 blocks of 8 tokens, each a phrase or four pairs with equal probability.

    A sequence has phrases of its own, 32 letters in random order cut into 4, and values of its own
    for 24 keys. A block is one of the phrases, or four keys with their values behind them.
    """

    def rand(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    def pick(below: int, *shape: int) -> Tensor:
        return torch.randint(below, (count, *shape), generator=generator)

    blocks = LENGTH // BLOCK
    row = torch.arange(count)[:, None]
    phrases = rand(LETTERS).argsort(1).unflatten(1, (PHRASES, BLOCK))
    copies = phrases[row, pick(PHRASES, blocks)]
    keys = pick(PAIRS, blocks, BLOCK // 2)
    values = rand(PAIRS).argsort(1)[row[..., None], keys]
    pairs = torch.stack([keys + LETTERS, values + LETTERS + PAIRS], -1).flatten(2)
    is_copy = rand(blocks)[..., None] < 0.5
    tokens = torch.where(is_copy, copies, pairs).flatten(1)
    # A token is determined by the one before it, unless a phrase or a pair begins with it.
    place = torch.arange(BLOCK)
    inside = torch.where(is_copy, place > 0, place % 2 == 1).flatten(1)
    seen = F.one_hot(tokens, VOCABULARY).cumsum(1).gather(2, tokens[..., None])[..., 0] > 1
    known = inside & torch.cat([torch.zeros(count, 1, dtype=torch.bool), seen[:, :-1]], 1)
    return Text(tokens, known)


# -- the layer -------------------------------------------------------------------------------------


def inner_loss(module: nn.Module, data: Named) -> Tensor:
    """Squared error of the values that W predicts from the keys of a chunk of one sequence."""
    return (module(data["keys"]) - data["values"]).square().sum() / 2


class Rate(nn.Module):
    """The inner rate, between 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(-1.0))

    def forward(self) -> Named:
        """Return the hyper-parameters of the inner optimizer."""
        return {"lr": self.raw.sigmoid()}


class FastWeights(nn.Module):
    """A layer that adapts a matrix to the sequence that it reads.

    Args:
        width: size of a token's features.
        chunk: tokens per inner step.
        adapts: False leaves W where it starts, the control.
    """

    def __init__(self, width: int, chunk: int, adapts: bool = True) -> None:
        super().__init__()
        self.adapts = adapts
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        matrix = nn.Linear(width, width, bias=False)
        nn.init.zeros_(matrix.weight)
        self.fast = innerloop.nn.FastWeights(
            matrix, inner_loss, innerloop.optim.sgd(), chunk, hyper=Rate()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[sequences, length, width]`` to the same shape."""
        queries = F.normalize(self.to_query(x), dim=-1)
        # The key of a token is the query of the token before it.
        keys = F.pad(queries, (0, 0, 1, -1))
        if not self.adapts:
            return self.out(self.fast.module(queries))
        return self.out(self.fast(queries, {"keys": keys, "values": self.to_value(x)}))


def by_hand(layer: FastWeights, x: Tensor) -> Tensor:
    """What `FastWeights` computes, batched by hand: a matrix for each sequence, and one inner
    gradient by autograd for all of them."""
    queries = F.normalize(layer.to_query(x), dim=-1)
    fast: Any = layer.fast  # the attributes of a module have no types
    chunk = fast.chunk
    keys = F.pad(queries, (0, 0, 1, -1)).unflatten(1, (-1, chunk))
    values = layer.to_value(x).unflatten(1, (-1, chunk))
    asked = queries.unflatten(1, (-1, chunk))
    w = fast.module.weight.T.expand(len(x), -1, -1)
    rate, read = fast.hyper()["lr"], list[Tensor]()
    for t in range(keys.shape[1]):
        read.append(asked[:, t] @ w)
        if t < keys.shape[1] - 1:
            loss = (keys[:, t] @ w - values[:, t]).square().sum() / 2
            w = w - rate * torch.autograd.grad(loss, w, create_graph=True)[0]
    return layer.out(torch.stack(read, 1).flatten(1, 2))


# -- the network -----------------------------------------------------------------------------------


class LocalAttention(nn.Module):
    """Causal attention inside of each chunk."""

    def __init__(self, width: int, chunk: int, heads: int = 4) -> None:
        super().__init__()
        self.chunk, self.heads = chunk, heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        chunks = self.qkv(x).reshape(-1, self.chunk, 3, self.heads, x.shape[-1] // self.heads)
        q, k, v = chunks.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(found.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """A layer that mixes tokens, and a perceptron, each added to what came in."""

    def __init__(self, width: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(width), mixer
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(x)


class GPT(nn.Module):
    """Two blocks: attention inside of chunks, then fast weights."""

    def __init__(self, args: Args, adapts: bool) -> None:
        super().__init__()
        width = args.width
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(torch.zeros(args.chunk, width))
        mixers = [LocalAttention(width, args.chunk), FastWeights(width, args.chunk, adapts)]
        self.blocks = nn.ModuleList(Block(width, mixer) for mixer in mixers)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next tokens, ``[sequences, length, vocabulary]``."""
        x = self.embed(tokens) + self.place.repeat(tokens.shape[1] // len(self.place), 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(net: GPT, text: Text) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the next token, over all tokens and over the known ones."""
    logits = net(text.tokens)[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), text.tokens[:, 1:], reduction="none")
    return losses.mean(), losses[text.known[:, 1:]].mean()


# -- training and comparison -----------------------------------------------------------------------


def flops(args: Args, adapts: bool) -> int:
    """Floating-point operations of the products in one step of training."""
    net, text = GPT(args, adapts), generate(args.batch, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        loss_of(net, text)[0].backward()
    return counter.get_total_flops()


class Curve(NamedTuple):
    """Losses in the course of training.

    Attributes:
        train: one number for each step.
        test: after each of the numbers of steps that were asked for, over all tokens and over the
            known ones.
    """

    train: list[float]
    test: dict[int, tuple[float, float]]


def train(args: Args, seed: int, adapts: bool, times: tuple[int, ...], bar: tqdm) -> Curve:
    """Train by AdamW, with warm-up and a constant rate, and test at ``times``."""
    torch.manual_seed(seed)
    net = GPT(args, adapts)
    generator = torch.Generator().manual_seed(1000 + seed)
    unseen = generate(args.test_sequences, torch.Generator().manual_seed(2000 + seed))
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 50))
    losses: list[float] = []
    test: dict[int, tuple[float, float]] = {}
    for t in range(max(times)):
        loss, _ = loss_of(net, generate(args.batch, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
        bar.update()
        if t + 1 in times:
            with torch.no_grad():
                parts = [Text(*p) for p in zip(*(x.split(16) for x in unseen), strict=True)]
                found = torch.tensor([loss_of(net, part) for part in parts]).mean(0)
            test[t + 1] = (found[0].item(), found[1].item())
    return Curve(losses, test)


def run(args: Args) -> tuple[dict[str, Tensor], dict[str, list[list[float]]]]:
    """Return test losses ``[seeds, 2]``, over all and over known tokens, and curves of training."""
    ratio = flops(args, True) / flops(args, False)
    longer = round(ratio * args.steps)
    names = ("fast weights", "no inner steps", f"the same, {longer} steps")
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    curves: dict[str, list[list[float]]] = {name: [] for name in names[:2]}
    total = args.seeds * (args.steps + longer)
    # disable=None: no bar where standard error is not a terminal, so that a log stays readable.
    with tqdm(total=total, unit="step", disable=None) as bar:
        for seed in range(args.seed, args.seed + args.seeds):
            began = time.perf_counter()
            ours = train(args, seed, True, (args.steps,), bar)
            middle = time.perf_counter()
            control = train(args, seed, False, (args.steps, longer), bar)
            for name, curve in zip(names, (ours, control), strict=False):
                curves[name].append(curve.train)
            found = (ours.test[args.steps], control.test[args.steps], control.test[longer])
            for name, losses in zip(names, found, strict=True):
                results[name].append(losses)
            cells = ", ".join(f"{name} {results[name][-1][0]:.3f}" for name in names)
            tqdm.write(
                f"seed {seed}: {cells}; {middle - began:.0f} s and "
                f"{time.perf_counter() - middle:.0f} s"
            )
    return {name: torch.tensor(of) for name, of in results.items()}, curves


def t_interval(values: Tensor) -> float:
    """Half width of the 95 % interval of the mean of a few values, by Student's t."""
    if len(values) < 2:
        return float("nan")
    factor = scipy.stats.t.ppf(0.975, len(values) - 1)
    return float(factor * values.std() / len(values) ** 0.5)


def table(results: dict[str, Tensor], args: Args) -> str:
    """Test losses with 95 % intervals over seeds, and paired differences to the first."""
    lines = [f"{'test loss':<38}{'all tokens':>18}{'known tokens':>18}"]
    (first, ours), *controls = results.items()
    rows = list(results.items())
    rows += [(f"{first} minus {name}", ours - losses) for name, losses in controls]
    for name, losses in rows:
        cells = [f"{x.mean():+.3f} ± {t_interval(x):.3f}" for x in losses.unbind(1)]
        lines.append(f"{name:<38}" + "".join(f"{cell:>18}" for cell in cells))
    count = sum(p.numel() for p in GPT(args, True).parameters())
    ratio = flops(args, True) / flops(args, False)
    return "\n".join(
        [
            *lines,
            f"({args.seeds} seeds, {args.steps} steps; {count:,} parameters each)",
            f"(a step with fast weights takes {ratio:.2f} times the operations)",
        ]
    )


def timing(args: Args, repeats: int = 20) -> dict[str, float]:
    """Seconds of processor time of a forward and backward pass of the layer, the median."""
    torch.manual_seed(args.seed)
    layer = FastWeights(args.width, args.chunk)
    x = torch.randn(args.batch, LENGTH, args.width, requires_grad=True)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "innerloop": layer,
        "batched by hand": lambda x: by_hand(layer, x),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 2):  # in turns, so that other work on the machine hits both
        for name, way in ways.items():
            began = time.process_time()
            way(x).square().sum().backward()
            seconds[name].append(time.process_time() - began)
    return {name: sorted(of[2:])[repeats // 2] for name, of in seconds.items()}


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Draw the loss of training over its steps, one line for each seed."""
    figure = matplotlib.figure.Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, of_seeds) in enumerate(curves.items()):
        for k, losses in enumerate(of_seeds):
            axes.plot(losses, color=f"C{i}", lw=0.8, label="" if k else name)
    axes.set(xlabel="steps of training", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None = None) -> Args:
    """Each field of `Args` as an option."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for field in dataclasses.fields(Args):
        name, default = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(default, bool):
            parser.add_argument(name, action="store_true")
        else:
            parser.add_argument(name, type=type(default), default=default)
    return Args(**vars(parser.parse_args(argv)))


def main() -> None:
    """Run it as the command line says."""
    args = parse()
    torch.set_num_threads(1)
    if args.timing:
        seconds = timing(args)
        print(", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in seconds.items()))
        print(f"ratio {seconds['innerloop'] / seconds['batched by hand']:.2f}")
        return
    began = time.process_time()
    results, curves = run(args)
    print(table(results, args))
    if args.plot:
        draw(curves, Path(args.plot))
    print(f"{time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
    main()
