"""Attention and cross-entropy in a second-order step: ours, PyTorch's math kernel, and plain
attention recomputed in the backward pass.

The step is an inner gradient with `create_graph=True` and a backward pass through its square. Times
are interleaved in one process; every peak is that of a process of its own, `python -m
benchmarks.attention CASE FORM`, which prints what it measured. On CUDA where there is one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import memory, timing
from benchmarks.results import say
from benchmarks.spread import Spread

Form = Callable[..., Tensor]
PEER = "PyTorch"


@dataclass(frozen=True)
class Case:
    """`inputs` are the shapes of what is differentiated."""

    title: str
    inputs: tuple[tuple[int, ...], ...]
    rounds: int
    causal: bool = False

    @property
    def long(self) -> bool:
        """Whether memory is what limits it."""
        return max(self.inputs[0]) >= 4096


HEADS, FEATURES = 8, 64


def _attention(length: int, rounds: int, causal: bool = False) -> Case:
    masked = ", causal" if causal else ""
    title = f"attention, {HEADS} heads of {FEATURES}, {length:,} positions{masked}"
    return Case(title, ((1, HEADS, length, FEATURES),) * 3, rounds, causal)


CASES = {
    "256": _attention(256, 40),
    "1024": _attention(1024, 9),
    "1024 causal": _attention(1024, 9, causal=True),
    "4096": _attention(4096, 3),
    "4096 causal": _attention(4096, 3, causal=True),
    "small vocabulary": Case("cross-entropy, 512 x 256 logits", ((512, 256),), 40),
    "vocabulary": Case("cross-entropy, 512 x 32,000 logits", ((512, 32_000),), 5),
}


@dataclass(frozen=True)
class Measured:
    """Seconds of PyTorch's form, time of each form over it, and peaks in MB above the warmed-up
    process."""

    case: Case
    device: str
    seconds: float
    ratios: Mapping[str, Spread]
    peaks: Mapping[str, float]


def measure(names: Sequence[str] = tuple(CASES)) -> list[Measured]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [_measure(name, device) for name in names]


def _measure(name: str, device: str) -> Measured:
    case = CASES[name]
    say(f"{case.title}: timing, {case.rounds} rounds")
    runs = {form: prepare(case, form, device) for form in forms(case)}
    clock = "cpu" if device == "cpu" else "wall"
    seconds = timing.interleave(runs, case.rounds, warm_up=1, clock=clock)
    ratios = {form: Spread.of_ratios(s, seconds[PEER]) for form, s in seconds.items()}
    say(f"{case.title}: memory")
    peaks = {form: memory.fresh("benchmarks.attention", name, form)["above"] for form in runs}
    return Measured(case, device, Spread.of(seconds[PEER]).median, ratios, peaks)


def forms(case: Case) -> dict[str, Form]:
    """What is compared, by name; each takes the inputs of the case, then whether it is causal or
    the labels."""
    from innerloop.nn import functional

    if len(case.inputs) == 1:
        return {PEER: F.cross_entropy, "innerloop": functional.cross_entropy}
    ours = functional.scaled_dot_product_attention
    return {
        PEER: _math,
        "recomputed": _Recomputed.apply,
        "innerloop": lambda q, k, v, causal: ours(q, k, v, is_causal=causal),
    }


def prepare(
    case: Case, form: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], list[Tensor]]:
    """The second-order step, which returns the derivative with respect to each input."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in case.inputs
    ]
    shape = case.inputs[0]
    labels = torch.randint(shape[1], shape[:1], generator=generator).to(device)
    run, rest = forms(case)[form], labels if len(inputs) == 1 else case.causal

    def step() -> list[Tensor]:
        value = run(*inputs, rest).square().sum()
        first = torch.autograd.grad(value, inputs, create_graph=True)
        del value
        second = torch.autograd.grad([g.square().sum() for g in first], inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return list(second)

    return step


def _math(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class _Recomputed(torch.autograd.Function):
    """The fused kernel; in its backward pass plain attention, which autograd differentiates
    (GradMem, arXiv 2603.13875, appendix C)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.causal = causal
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = q, k, v = [x.view_as(x) for x in ctx.saved_tensors]
            out = _math(q, k, v, ctx.causal)
            return (*torch.autograd.grad(out, inputs, cotangent, create_graph=again), None)


def _child(name: str, form: str) -> None:
    torch.set_num_threads(1)
    case = CASES[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    few = tuple(tuple(min(n, 64) for n in shape) for shape in case.inputs)
    prepare(replace(case, inputs=few), form, device)()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.max_memory_allocated() / 1e6
        prepare(case, form, device)()
        print(json.dumps({"above": torch.cuda.max_memory_allocated() / 1e6 - base}))
        return
    base = memory.high_water()
    start = time.process_time()
    prepare(case, form)()
    print(json.dumps({"above": memory.high_water() - base, "seconds": time.process_time() - start}))


if __name__ == "__main__":
    _child(*sys.argv[1:])
