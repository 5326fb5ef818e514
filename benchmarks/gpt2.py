"""One meta-gradient through Adam steps of GPT-2 small on a GPU: ``python -m benchmarks.gpt2``.

The model is Hugging Face's GPT-2 with 124 million parameters, randomly initialised, without
dropout; the texts are random tokens; the derivative is that of the loss on one more batch with
respect to the initial parameters. Goals: 64 x 128 tokens, 16 steps, in 3.2 s and 20 GB (a run in
JAX that was published took 3.24 s and 52 GB on an H100, and ran out of memory from 256 tokens on),
and 1,024 tokens run at all.

Without a GPU it says so; ``--small`` takes a tiny model on the CPU, which shows that the script
works, not how fast it is.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from benchmarks.memory import fresh
from benchmarks.results import say
from innerloop._utils.text_table import table


@dataclass(frozen=True)
class Case:
    """One row of the table.

    `slots` are the states that are kept, `parts` the micro-batches of a step; `blocks`: only the
    inputs of the transformer's blocks are kept; `half`: the forward pass is in bfloat16.
    """

    batch: int = 64
    length: int = 128
    steps: int = 16
    slots: int | str = 6
    parts: int = 1
    blocks: bool = True
    half: bool = True
    compile: bool = False
    rounds: int = 3
    small: bool = False

    @property
    def title(self) -> str:
        """What a reader of the table sees."""
        words = [f"{self.slots} states"]
        words += ["blocks"] if self.blocks else []
        words += [f"{self.parts} micro-batches"] if self.parts > 1 else []
        words += ["bfloat16" if self.half else "float32 (TF32)"]
        return ", ".join(words + (["compiled"] if self.compile else []))


CASES = (
    Case(),
    Case(blocks=False),
    Case(blocks=False, slots="all"),
    Case(blocks=False, slots="all", compile=True),
    Case(half=False),
    Case(length=256),
    Case(length=512, parts=2),
    Case(length=1024, parts=4),
)

GOALS = {"seconds": 3.2, "gigabytes": 20.0}
"""Of the first length, for the fastest and the smallest case."""


def gpt2(case: Case, device: str) -> nn.Module:
    """Return the model, with random weights."""
    import transformers

    size: dict[str, Any] = (
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97} if case.small else {}
    )
    config = transformers.GPT2Config(
        n_positions=max(case.length, 1024),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        **size,
    )
    made: Any = transformers.GPT2LMHeadModel(config)
    model: nn.Module = made.to(device)
    if case.blocks:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return model.train()


def meta_gradient(case: Case, model: nn.Module, texts: Tensor) -> Tensor:
    """Take one meta-gradient; return its norm and the outer loss.

    Args:
        case: how.
        model: the model.
        texts: tokens, steps + 1 batches.
    """
    kind = texts.device.type

    def text_loss(m: Any, text: Tensor) -> Tensor:
        half = torch.autocast(kind, torch.bfloat16) if case.half else nullcontext()
        with half:
            logits = m(input_ids=text[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())

    def loss(m: Any, hyper: object, text: Tensor) -> Tensor:
        return text_loss(m, text)

    problem = innerloop.Problem.from_module(
        model,
        innerloop.micro_batches(loss, case.batch // case.parts) if case.parts > 1 else loss,
        innerloop.optim.adam(lr=1e-4, eps_root=1e-12),
    )
    call, _, _ = innerloop.functional(model)

    def outer(traj: innerloop.Trajectory, hyper: object) -> Tensor:
        return text_loss(lambda input_ids: call(traj.params, input_ids=input_ids), texts[-1])

    value, grads = innerloop.metagradient(
        outer,
        problem,
        None,
        texts[:-1],
        wrt="params",
        strategy=innerloop.Checkpointed(slots=case.slots, compile=case.compile),
    )
    norm = torch.stack([g.float().square().sum() for g in grads.values()]).sum().sqrt()
    return torch.stack([norm, value.detach()])


def measured(case: Case) -> dict[str, float]:
    """Run one case in this process."""
    cuda = torch.cuda.is_available() and not case.small
    device = "cuda" if cuda else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = gpt2(case, device)
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    shape = (case.steps + 1, case.batch, case.length + 1)
    texts = torch.randint(int(vocabulary), shape, device=device)  # type: ignore[arg-type]
    begin = time.perf_counter()
    found = meta_gradient(case, model, texts).tolist()
    first = time.perf_counter() - begin
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(case.rounds):
        begin = time.perf_counter()
        # Reading the numbers waits for the device.
        found = meta_gradient(case, model, texts).tolist()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else math.nan
    return {
        "seconds": statistics.median(seconds),
        "first": first,
        "gigabytes": peak,
        "norm": found[0],
        "loss": found[1],
    }


def _row(case: Case, found: dict[str, float]) -> tuple[str, ...]:
    return (
        f"{case.batch} x {case.length:,}",
        case.title,
        f"{found['seconds']:.2f}",
        f"{found['first']:.1f}",
        f"{found['gigabytes']:.1f}",
        f"{found['norm']:.4g}",
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--case", type=int, help="one row, in this process, as JSON")
    options = parser.parse_args(arguments)
    cases = [_small(case) for case in CASES] if options.small else list(CASES)
    if options.case is not None:
        print(json.dumps(measured(cases[options.case])))
        return 0
    if not (torch.cuda.is_available() or options.small):
        say("benchmarks.gpt2 needs a CUDA device: skipped (--small runs a tiny model on the CPU)")
        return 0
    rows, found = [], {}
    for number, case in enumerate(cases):
        more = ("--small",) if options.small else ()
        try:
            found[number] = fresh("benchmarks.gpt2", "--case", str(number), *more, mapped=False)
        except RuntimeError as error:
            say(f"{case.title}: {error}")
            continue
        rows.append(_row(case, found[number]))
        print(*rows[-1], file=sys.stderr, flush=True)
    head = ("tokens", "how", "seconds", "first call", "GB", "norm of the gradient")
    print(table(rows, header=head, markdown=True))
    base = [
        found[i] for i, case in enumerate(cases) if case.length == CASES[0].length and i in found
    ]
    if base and not options.small:
        for name, limit in GOALS.items():
            best = min(f[name] for f in base)
            say(f"{name}: {best:.2f}, limit {limit}: {'reached' if best <= limit else 'missed'}")
    return 0


def _small(case: Case) -> Case:
    return Case(
        batch=4,
        length=max(case.length // 16, 8),
        steps=3,
        slots=case.slots if isinstance(case.slots, str) else 2,
        parts=case.parts,
        blocks=case.blocks,
        half=case.half,
        compile=case.compile,
        rounds=1,
        small=True,
    )


if __name__ == "__main__":
    sys.exit(main())
