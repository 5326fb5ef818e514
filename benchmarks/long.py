"""Long loops: what `Checkpointed` needs in memory and time, where `StoreAll` and its like run out
of memory.

Every peak is that of a process of its own, `python -m benchmarks.long WORK ARGUMENTS...`, which
prints what it measured. A further figure is one entry of `WORKS`, one field of `LongTimes` and one
reading in `benchmarks/figures.py`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import memory, timing
from benchmarks.contenders import CONTENDERS, higher_loop, innerloop_unroll
from benchmarks.contenders.base import MetaGradient
from benchmarks.models import MLP, Conv4, mlp
from benchmarks.results import say
from benchmarks.spread import Spread
from benchmarks.workloads import WARM_UP, WORKLOADS, Batch, Forward, loss

GB = 1e3
"""In MB, the unit of all peaks."""

PEAK = 2 * GB
"""P8 and conv4: the process may take so much."""

TIMES_HIGHER = 20
"""P8: as many times the steps of higher."""


@dataclass(frozen=True)
class LongLoop:
    """A loop of Adam steps of any length: step t sees the batch that `draw` makes with a generator
    seeded by t."""

    network: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Batch]
    forward: Forward | None = None

    def batch(self, t: int, dtype: torch.dtype) -> Batch:
        """Drawn in float32 so that other dtypes see the same numbers."""
        x, y = self.draw(torch.Generator().manual_seed(t))
        return Batch(x.to(dtype), y)


def _vectors(count: int) -> Callable[[torch.Generator], Batch]:
    return lambda g: Batch(
        torch.randn(count, 32, generator=g), torch.randint(10, (count,), generator=g)
    )


LOOPS = {
    "warm-up": LongLoop(lambda: MLP((32, 8, 10)), _vectors(16), mlp),
    "P7": LongLoop(lambda: MLP((32, 256, 256, 10)), _vectors(128), mlp),
    "P9": LongLoop(lambda: MLP((32, 32, 10)), _vectors(16), mlp),
    "conv4": LongLoop(
        Conv4,
        lambda g: Batch(
            torch.randn(25, 1, 28, 28, generator=g), torch.randint(5, (25,), generator=g)
        ),
    ),
}


def prepare(
    loop: LongLoop,
    steps: int,
    strategy: str,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> MetaGradient:
    """The whole meta-gradient with respect to the initial parameters, as a function; the outer
    batch is that of step `steps`."""
    import innerloop

    torch.manual_seed(0)
    model = loop.network().to(dtype)
    initial = {name: p.detach() for name, p in model.named_parameters()}
    forward = loop.forward or innerloop.functional(model)[0]
    held_out = loop.batch(steps, dtype)
    how = getattr(innerloop, strategy)()

    def step_loss(params: Mapping[str, Tensor], _: object, batch: Batch) -> Tensor:
        return loss(forward(params, batch.x), batch.y)

    def outer_loss(trajectory: innerloop.Trajectory, _: object) -> Tensor:
        return loss(forward(trajectory.params, held_out.x), held_out.y)

    problem = innerloop.Problem(step_loss, innerloop.optim.adam(lr=1e-3))

    def run() -> dict[str, Tensor]:
        def batches(_: object, __: object, t: int) -> Batch:
            return loop.batch(t, dtype)

        _, found = innerloop.metagradient(
            outer_loss,
            problem,
            initial,
            batches,
            wrt="params",
            strategy=how,
            steps=steps,
            progress=progress or False,
        )
        return dict(found)

    return run


# -- measured in processes of their own ------------------------------------------------------------


@dataclass(frozen=True)
class LongPeak:
    """One loop under `Checkpointed()`: peaks in MB, `slots` as it chose them, and the bytes of one
    step.

    `states` is P + S of one time, `saved` is A.
    """

    steps: int
    process: float
    imported: float
    seconds: float
    slots: int
    states: int
    saved: int

    @property
    def above_import(self) -> float:
        return self.process - self.imported

    @property
    def model(self) -> float:
        """slots (P + S) + 3 A in MB: what P7 compares the peak with."""
        return (self.slots * self.states + 3 * self.saved) / 1e6


def peak(name: str, steps: int, runs: int) -> dict[str, Any]:
    """A `LongPeak`; `seconds` of processor time are those of the first of the runs."""
    _warm_up("adam")
    imported = memory.high_water()
    run = prepare(LOOPS[name], steps, "Checkpointed")
    slots: list[int] = []
    with _noting(slots):
        start = time.process_time()
        run()
        seconds = time.process_time() - start
        for _ in range(runs - 1):
            run()
    process = memory.high_water()
    states, saved = weigh(LOOPS[name])
    return dataclasses.asdict(LongPeak(steps, process, imported, seconds, slots[0], states, saved))


def gpt(contender: str, steps: int) -> dict[str, Any]:
    """Peak of one meta-gradient on M4 with that many steps, the processor time, and whether all of
    it is finite."""
    workload = dataclasses.replace(WORKLOADS["M4"], steps=steps)
    _warm_up(workload.optimizer)
    run = (
        higher_loop.prepare(workload)
        if contender == "higher"
        else innerloop_unroll.prepare(workload, strategy=contender)
    )
    start = time.process_time()
    found = run()
    seconds = time.process_time() - start
    finite = all(isinstance(g, Tensor) and bool(g.isfinite().all()) for g in found.values())
    return {"process": memory.high_water(), "seconds": seconds, "finite": finite}


def ratio(name: str, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of `Checkpointed()` and of `StoreAll()`, interleaved, and how far their float64
    meta-gradients are apart."""
    exact = [prepare(LOOPS[name], steps, s, torch.float64)() for s in ("StoreAll", "Checkpointed")]
    reference, ours = ({n: torch.as_tensor(g) for n, g in found.items()} for found in exact)
    off = max(float((ours[n] - r).abs().max() / r.abs().max()) for n, r in reference.items())
    runs = {s: prepare(LOOPS[name], steps, s) for s in ("StoreAll", "Checkpointed")}
    return {"difference": off, **timing.interleave(runs, rounds, warm_up=1, clock="cpu")}


def growth(name: str, rounds: int, block: int, *lengths: int) -> dict[str, Any]:
    """The time per step for loops of these lengths, one list entry a round, in units of a probe
    taken every 50 steps.

    Short loops are repeated until they make a block of steps.

    Over half a minute the clock speed that a shared machine grants drifts by more than the 15 %
    that are to be seen; the probe, a gradient of about the same kernels, drifts along. Its own time
    is not counted.
    """
    probed: list[float] = []

    def progress(_: str, done: int, __: int | None) -> None:
        if done % 50 == 0:
            probed.append(_probe())

    runs = {
        steps: prepare(LOOPS[name], steps, "Checkpointed", progress=progress) for steps in lengths
    }
    for _ in range(5):
        runs[min(lengths)]()
    found: dict[int, list[float]] = {steps: [] for steps in lengths}
    for round_number in range(rounds):
        for steps in lengths if round_number % 2 == 0 else reversed(lengths):
            repeats = max(1, block // steps)
            gc.collect()
            probed.clear()
            start = time.process_time()
            for _ in range(repeats):
                runs[steps]()
            seconds = time.process_time() - start - sum(probed)
            found[steps].append(seconds / (repeats * steps) / (sum(probed) / len(probed) / PROBES))
    return {str(steps): values for steps, values in found.items()}


PROBES = 100


def _probe() -> float:
    """Seconds for `PROBES` gradients of a small network."""
    a = torch.full((32, 32), 0.01)
    start = time.process_time()
    for _ in range(PROBES):
        with torch.enable_grad():
            b = a.clone().requires_grad_()
            torch.autograd.grad(torch.tanh(a @ b).sum(), b)
    return time.process_time() - start


WORKS: dict[str, Callable[..., dict[str, Any]]] = {
    "peak": peak,
    "gpt": gpt,
    "ratio": ratio,
    "growth": growth,
}


def weigh(loop: LongLoop) -> tuple[int, int]:
    """Bytes of parameters and Adam's state, and of what the graph of one first-order step holds
    besides the parameters."""
    import innerloop

    torch.manual_seed(0)
    model = loop.network()
    params = dict(model.named_parameters())
    state = innerloop.optim.adam(lr=1e-3).init(params)
    kept = [
        *params.values(),
        *(x for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, Tensor)),
    ]
    own = {p.untyped_storage().data_ptr() for p in params.values()}
    held: dict[
        int, Tensor
    ] = {}  # the tensors, too: a storage that is freed may be followed by another at its address

    def pack(x: Tensor) -> Tensor:
        held.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    x, y = loop.batch(0, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        end = loss(model(x), y)
    saved = sum(x.untyped_storage().nbytes() for address, x in held.items() if address not in own)
    del end
    return sum(x.numel() * x.element_size() for x in kept), saved


def _warm_up(optimizer: str) -> None:
    """Lazy imports, which belong to no method: those of the contenders that are measured here, on a
    tiny network."""
    torch.set_num_threads(1)
    WARM_UP.torch_optimizer(WARM_UP.model())
    prepare(LOOPS["warm-up"], 3, "Checkpointed")()
    if optimizer == "sgd":
        innerloop_unroll.prepare(dataclasses.replace(WARM_UP, optimizer="sgd"))()


def _noting(slots: list[int]) -> Any:
    """While a loop runs, note how many slots it takes."""
    from innerloop import Checkpointed

    chosen = Checkpointed.slots_for

    def noted(self: Checkpointed, *arguments: Any, **options: Any) -> int:
        slots.append(chosen(self, *arguments, **options))
        return slots[-1]

    return mock.patch.object(Checkpointed, "slots_for", noted)


# -- the figures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongTimes:
    """Everything that `python -m benchmarks --only long` measures.

    Attributes:
        short, long: P7's loop with T=30 and T=1000.
        ratio: P7's time over that of StoreAll at T=100, round by round.
        difference: P7's meta-gradient from that of StoreAll at T=100, in float64.
        higher_steps: the steps that higher does on M4 within `PEAK`; None: it is not installed.
        higher_peak: at that number of steps.
        higher_above: with one step more.
        gpt_peak: that of `Checkpointed()` at `TIMES_HIGHER` times the steps; None: there is nothing
            to compare with.
        gpt_seconds: and its time.
        endless: P9's loop with T=10,000.
        per_step: time per step of P9's loop by number of steps, round by round, in units of a
            probe.
        conv4: M3's network, T=1000.
    """

    short: LongPeak
    long: LongPeak
    ratio: Spread
    difference: float
    higher_steps: int | None
    higher_peak: float | None
    higher_above: float | None
    gpt_peak: float | None
    gpt_seconds: float | None
    endless: LongPeak
    per_step: dict[int, list[float]]
    conv4: LongPeak

    def growth(self) -> dict[int, Spread]:
        """Time per step over that of the shortest loop, round by round."""
        shortest = self.per_step[min(self.per_step)]
        return {
            steps: Spread.of_ratios(values, shortest) for steps, values in self.per_step.items()
        }


def measure(rounds: int | None = None) -> LongTimes:
    """All of it: about a quarter of an hour."""
    short, long = (_peak("P7", steps, 2) for steps in (30, 1000))
    say("long: time of Checkpointed() and StoreAll(), T=100")
    timed = _fresh("ratio", "P7", 100, rounds or 10)
    endless = _peak("P9", 10_000, 1)
    say("long: time per step, T=100, 1000, 10,000")
    per_step = {
        int(steps): values
        for steps, values in _fresh("growth", "P9", 3, 3000, 100, 1000, 10_000).items()
    }
    steps = higher_peak = higher_above = gpt_peak = gpt_seconds = None
    if not next(c for c in CONTENDERS if c.name == "higher").missing():
        steps, higher_peak, higher_above = longest("higher", PEAK)
        say(
            f"long: higher does {steps} steps of M4 within {PEAK:.0f} MB; Checkpointed() does "
            f"{TIMES_HIGHER * steps}"
        )
        ours = _fresh("gpt", "Checkpointed", TIMES_HIGHER * steps)
        gpt_peak, gpt_seconds = ours["process"] if ours["finite"] else float("inf"), ours["seconds"]
    conv4 = _peak("conv4", 1000, 1)
    return LongTimes(
        short,
        long,
        Spread.of_ratios(timed["Checkpointed"], timed["StoreAll"]),
        timed["difference"],
        steps,
        higher_peak,
        higher_above,
        gpt_peak,
        gpt_seconds,
        endless,
        per_step,
        conv4,
    )


def longest(contender: str, limit: float) -> tuple[int, float, float]:
    """The steps of M4 that fit into a process of `limit` MB, its peak there, and the peak with one
    step more."""
    peaks: dict[int, float] = {}

    def at(steps: int) -> float:
        if steps not in peaks:
            say(f"long: memory of {contender} on M4 with {steps} steps")
            peaks[steps] = _fresh("gpt", contender, steps)["process"]
        return peaks[steps]

    few, more = 4, 8
    steps = int(few + (limit - at(few)) * (more - few) / (at(more) - at(few)))
    while at(steps) > limit:
        steps -= 1
    while at(steps + 1) <= limit:
        steps += 1
    return steps, at(steps), at(steps + 1)


def _peak(name: str, steps: int, runs: int) -> LongPeak:
    say(f"long: memory of {name}, T={steps}")
    return LongPeak(**_fresh("peak", name, steps, runs))


def _fresh(work: str, *arguments: object) -> dict[str, Any]:
    return memory.fresh(
        "benchmarks.long", json.dumps([work, *arguments]), mapped=work in ("peak", "gpt")
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen, *given = json.loads(sys.argv[1])
    print(json.dumps(WORKS[chosen](*given)))
