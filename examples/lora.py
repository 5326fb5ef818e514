"""LoRA adapters of a Hugging Face model in the inner loop: learn where they start, and their rates.

    python examples/lora.py                 # needs the package transformers; nothing is downloaded

A small GPT-2 with random weights is trained, in the ordinary way, on sequences of many dialects of
one small language. Then its weights are frozen, and LoRA adapters (Hu et al. 2021) adapt it to one
new dialect at a time: five steps of SGD on eight sequences. The outer loop differentiates through
these five steps, and learns where the adapters start and one rate for each of their matrices.

It is compared with adapters that start as usual (one factor random, the other zero), trained by SGD
or Adam with the best rate of a grid, chosen on the test tasks themselves.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.figure
import torch
from torch import Tensor, nn
from tqdm import tqdm

import innerloop

Named = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Args:
    """The settings of a run."""

    width: int = 32
    layers: int = 2
    rank: int = 4
    pretrain_steps: int = 300
    sequences: int = 8
    """Sequences to adapt to."""
    inner_steps: int = 5
    iterations: int = 60
    tasks: int = 4
    """Tasks per outer step."""
    outer_lr: float = 1e-2
    test_tasks: int = 24
    plot: str = ""
    """Draw the loss over the inner steps into this file."""
    seed: int = 0


SYMBOLS, LENGTH, QUERIES = 16, 12, 32
GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
KNOWN = "who knows the dialect"


# -- tasks -----------------------------------------------------------------------------------------


class Language:
    """Markov chains: the next symbol's scores are A[x] + z₁ B₁[x] + z₂ B₂[x].

    The tables A, B₁ and B₂ are those of the language; z ~ N(0, 1) tells its dialects apart.
    """

    def __init__(self, seed: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        self.tables = 1.5 * torch.randn(3, SYMBOLS, SYMBOLS, generator=drawn)

    def dialects(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Draw some dialects: the log-probabilities of the next symbol, ``[SYMBOLS, SYMBOLS]``."""
        z = torch.randn(count, 2, generator=generator)
        scores = self.tables[0] + torch.tensordot(z, self.tables[1:], 1)
        return list(scores.log_softmax(-1))


def sequences(dialect: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw sequences of a dialect, ``[count, LENGTH]``."""
    symbols = [torch.randint(SYMBOLS, (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        nexts = torch.multinomial(dialect[symbols[-1]].exp(), 1, generator=generator)
        symbols.append(nexts.squeeze(1))
    return torch.stack(symbols, 1)


# -- the model -------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen layer, plus a product of two thin matrices.

    Args:
        layer: GPT-2's ``Conv1D``, x @ weight + bias.
        rank: the inner size of the product.
    """

    def __init__(self, layer: Any, rank: int) -> None:
        super().__init__()
        self.layer = layer
        inputs, outputs = layer.weight.shape
        self.a = nn.Parameter(torch.randn(inputs, rank) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(rank, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a @ self.b


def base_model(args: Args) -> nn.Module:
    """GPT-2 with random weights. Nothing is downloaded."""
    import transformers

    torch.manual_seed(args.seed)
    config = transformers.GPT2Config(
        vocab_size=SYMBOLS,
        n_positions=LENGTH,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def language_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of the next token."""
    found: Tensor = model(input_ids=tokens, labels=tokens).loss
    return found


def pretrain(model: nn.Module, args: Args, bar: tqdm) -> None:
    """Train on a mixture of dialects."""
    language, generator = Language(args.seed), torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(args.pretrain_steps):
        drawn = language.dialects(32, generator)
        loss = language_loss(model, torch.cat([sequences(d, 2, generator) for d in drawn]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        bar.update()


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Freeze the model, and put an adapter on every layer of attention and of the perceptrons."""
    model.requires_grad_(False)
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRA(layer, rank))
    return model


# -- the two loops ---------------------------------------------------------------------------------


class Learner:
    """The inner problem on a model with adapters: what requires a gradient adapts."""

    def __init__(self, model: nn.Module, args: Args) -> None:
        self.model, self.args, self.language = model, args, Language(args.seed)
        self.start = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def problem(self, optimizer: innerloop.optim.Optimizer) -> innerloop.Problem:
        """The language loss, with the logarithm of one rate for each matrix in ``hyper``."""
        return innerloop.Problem.from_module(
            self.model,
            lambda model, log_lr, tokens: language_loss(model, tokens),
            optimizer,
            optimizer_hyper=lambda log_lr, t: {
                "lr": {name: rate.exp() for name, rate in log_lr.items()}
            },
        )

    def query_loss(self, params: Named, tokens: Tensor) -> Tensor:
        """The loss on new sequences, of the model with these adapters."""
        found: Tensor = torch.func.functional_call(
            self.model, params, (), {"input_ids": tokens, "labels": tokens}
        ).loss
        return found

    def metagradient(
        self, start: Named, log_lr: Named, dialect: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Named]]:
        """Value and gradient of the query loss after the inner steps, for one task."""
        support = sequences(dialect, self.args.sequences, generator)
        query = sequences(dialect, QUERIES, generator)
        return innerloop.metagradient(
            lambda traj, _: self.query_loss(traj.params, query),
            self.problem(innerloop.optim.sgd()),
            start,
            [support] * self.args.inner_steps,
            hyper=log_lr,
        )

    def tests(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same test dialects at every call, each with its support and query sequences."""
        generator = torch.Generator().manual_seed(self.args.seed + 1)
        for dialect in self.language.dialects(self.args.test_tasks, generator):
            support = sequences(dialect, self.args.sequences, generator)
            yield dialect, support, sequences(dialect, QUERIES, generator)

    def losses(self, start: Named, log_lr: Named, optimizer: innerloop.optim.Optimizer) -> Tensor:
        """Query losses ``[test tasks, inner steps + 1]``."""
        problem, found = self.problem(optimizer), list[list[Tensor]]()
        steps = self.args.inner_steps
        with torch.no_grad():
            for _, support, query in self.tests():
                traj = innerloop.unroll(problem, start, [support] * steps, hyper=log_lr)
                found.append([self.query_loss(traj.at(t).params, query) for t in range(steps + 1)])
        return torch.tensor(found)

    def floor(self) -> Tensor:
        """Query losses ``[test tasks, inner steps + 1]`` of one who knows the dialects."""
        known = [-d[query[:, :-1], query[:, 1:]].mean() for d, _, query in self.tests()]
        return torch.stack(known)[:, None].expand(-1, self.args.inner_steps + 1)


def meta_learn(learner: Learner, bar: tqdm) -> tuple[Named, Named]:
    """Where adapters start, and the logarithms of their rates."""
    args = learner.args
    generator = torch.Generator().manual_seed(args.seed + 2)
    start = {n: p.clone().requires_grad_() for n, p in learner.start.items()}
    log_lr = {n: torch.tensor(math.log(0.1), requires_grad=True) for n in start}
    optimizer = torch.optim.Adam([*start.values(), *log_lr.values()], lr=args.outer_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations)
    for _ in range(args.iterations):
        optimizer.zero_grad()
        values = []
        for dialect in learner.language.dialects(args.tasks, generator):
            value, grads = learner.metagradient(start, log_lr, dialect, generator)
            innerloop.assign(start, grads["params"])  # adds, as backward() does
            innerloop.assign(log_lr, grads["hyper"])
            values.append(value)
        nn.utils.clip_grad_norm_([*start.values(), *log_lr.values()], float(args.tasks))
        optimizer.step()
        schedule.step()
        bar.set_postfix(query_loss=f"{torch.stack(values).mean():.3f}")
        bar.update()
    learned, rates = ({n: p.detach() for n, p in of.items()} for of in (start, log_lr))
    return learned, rates


def run(args: Args) -> dict[str, Tensor]:
    """Query losses ``[test tasks, inner steps + 1]`` of each way."""
    model = base_model(args)
    # disable=None: no bar where standard error is not a terminal, so that a log stays readable.
    with tqdm(total=args.pretrain_steps, desc="pre-training", unit="step", disable=None) as bar:
        pretrain(model, args, bar)
    learner = Learner(with_adapters(model, args.rank), args)
    results: dict[str, Tensor] = {}
    rules = {"SGD": innerloop.optim.sgd(), "Adam": innerloop.optim.adam()}
    for name, optimizer in rules.items():
        tried = [
            learner.losses(
                learner.start, {n: torch.tensor(math.log(r)) for n in learner.start}, optimizer
            )
            for r in GRID
        ]
        best = min(range(len(GRID)), key=lambda i: tried[i].nan_to_num(1e9)[:, -1].mean().item())
        results[f"usual start, {name} {GRID[best]}"] = tried[best]
    with tqdm(total=args.iterations, desc="meta-learning", unit="step", disable=None) as bar:
        start, log_lr = meta_learn(learner, bar)
    results["learned start and rates"] = learner.losses(start, log_lr, innerloop.optim.sgd())
    results[KNOWN] = learner.floor()
    return results


def interval(values: Tensor) -> str:
    """Write a mean over tasks with its 95 % interval."""
    return f"{values.mean():+.3f} ± {1.96 * values.std() / math.sqrt(len(values)):.3f}"


def table(results: dict[str, Tensor], args: Args) -> str:
    """Query losses before and after the inner steps, and paired differences to the last row."""
    lines = [f"{'loss on new dialects':<36}{'before':>18}{f'after {args.inner_steps} steps':>18}"]
    rows = dict(results)
    learned = results["learned start and rates"]
    for name, losses in results.items():
        if losses is not learned and name != KNOWN:
            rows[f"learned minus {name.removeprefix('usual start, ')}"] = learned - losses
    for name, losses in rows.items():
        lines.append(f"{name:<36}{interval(losses[:, 0]):>18}{interval(losses[:, -1]):>18}")
    return "\n".join([*lines, f"({len(learned)} dialects that no training saw)"])


def draw(results: dict[str, Tensor], path: Path) -> None:
    """Draw the loss over the inner steps."""
    figure = matplotlib.figure.Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, losses in results.items():
        if name == KNOWN:
            axes.axhline(losses.mean().item(), color="gray", linestyle="--", label=name)
            continue
        half = 1.96 * losses.std(0) / math.sqrt(len(losses))
        axes.errorbar(range(losses.shape[1]), losses.mean(0), half, capsize=3, label=name)
    axes.set(xlabel="inner steps", ylabel="loss on new dialects")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None = None) -> Args:
    """Each field of `Args` as an option."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for field in dataclasses.fields(Args):
        default = field.default
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(default), default=default
        )
    return Args(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    settings = parse()
    torch.set_num_threads(1)
    began = time.process_time()
    found = run(settings)
    print(table(found, settings))
    if settings.plot:
        draw(found, Path(settings.plot))
    print(f"{time.process_time() - began:.0f} s of processor time")
