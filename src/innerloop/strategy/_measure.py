"""What one step of a problem costs, in time and memory, measured on a few steps of it."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop._batches import Batches
from innerloop._problem import Problem
from innerloop._types import HyperTree, Params
from innerloop._utils import torch_private, tree
from innerloop._utils.caches import cache
from innerloop._utils.progress import silent
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop.strategy._base import BOTH, Loop, Measure, Strategy
from innerloop.strategy._engine.step_pullback import state_of
from innerloop.strategy._forecast import Cost, LinearCost
from innerloop.strategy._store_all import StoreAll

NOTHING: frozenset[str] = frozenset()


def state_bytes(loop: Loop) -> int:
    """Return the size of one state (P + S)."""
    return max(bytes_of(state_of(loop.start)), 1)


def bytes_of(values: object) -> int:
    """Return the size of the tensors in a pytree."""
    return sum(x.numel() * x.element_size() for x in tree.tensors(values))


class MeasuredLoop(Measure):
    """A loop of which a few steps are run, once for each strategy, to draw a line through them.

    Args:
        loop: the loop.
        steps: T.
        kept_batch_bytes: the size of the batches that have to be kept for a replay.
    """

    def __init__(self, loop: Loop, steps: int, kept_batch_bytes: int = 0) -> None:
        self.loop = loop
        self.steps = steps
        self.state_bytes = state_bytes(loop)
        self.kept_batch_bytes = kept_batch_bytes
        self._known: dict[tuple[Strategy, frozenset[str]], Cost] = {}

    def __call__(self, strategy: Strategy, wrt: frozenset[str] = BOTH) -> Cost:
        """Time one and a few steps, and fit a line."""
        key = strategy, wrt
        if key not in self._known:
            self._known[key] = measure(self.loop, strategy, wrt=wrt)
        return self._known[key]

    def plain(self) -> Cost:
        """Time the forward pass alone."""
        return self(StoreAll(), NOTHING)


def measure(loop: Loop, strategy: Strategy, *, wrt: frozenset[str] = BOTH, rounds: int = 5) -> Cost:
    """Run one and a few steps of ``loop``, and draw a line.

    Args:
        loop: the loop; its first batch is used again and again.
        strategy: how the steps are differentiated.
        wrt: with respect to what the final parameters are differentiated; nothing: no backward
            pass.
        rounds: how often times are taken; the smallest counts, since other work on the machine only
            adds.
    """
    few = 4 if loop.batches.steps is None else max(min(4, loop.batches.steps), 1)
    runs = [_run(loop, strategy, steps, wrt & strategy.differentiates) for steps in (1, few)]
    with at_random_state(RandomState.now()):
        runs[1]()  # lazy imports, kernels chosen by the first call
        seconds = _least(runs, rounds)
        peaks = [_peak(run, next(iter(loop.start.params.values())).device) for run in runs]
    return Cost(_line(seconds, few), _line(peaks, few))


_working: MutableMapping[Problem, dict[object, float]] = cache(
    "working memory of a step, by problem", weak=True
)


def working_bytes(loop: Loop, strategy: Strategy) -> float:
    """Return the memory of one step and its pullback, besides the states that are kept.

    It is measured once per problem and shape.
    """
    shapes = tuple(
        (tuple(x.shape), x.dtype, x.device)
        for x in tree.tensors((state_of(loop.start), loop.hyper, loop.batches.data))
    )
    known = _working.setdefault(loop.problem, {})
    if shapes not in known:
        with at_random_state(RandomState.now()):
            known[shapes] = _peak(
                _run(loop, strategy, 1, strategy.differentiates),
                next(iter(loop.start.params.values())).device,
            )
    return known[shapes]


class _FirstBatch(Batches):
    """The first batch of other batches, at every step."""

    def __init__(self, batches: Batches, steps: int) -> None:
        super().__init__(steps)
        self.inner = batches
        self.data = batches.data

    def at(self, params: Params, hyper: HyperTree, t: int, time: int) -> object:
        return self.inner.holding(self.data).first(params, hyper, time - t)


def _run(loop: Loop, strategy: Strategy, steps: int, wrt: frozenset[str]) -> Callable[[], None]:
    batches = _FirstBatch(loop.batches, steps)

    def fresh(x: Tensor) -> Tensor:
        return x.detach().requires_grad_() if tree.differentiable(x) else x

    def run() -> None:
        params = tree.map_tensors(fresh if "params" in wrt else Tensor.detach, loop.start.params)
        hyper = tree.map_tensors(fresh if "hyper" in wrt else Tensor.detach, loop.hyper)
        start = loop.start.detach()._replace(params=params, random_state=RandomState.now())
        with torch.set_grad_enabled(bool(wrt)):
            traj = strategy.run(
                loop._replace(start=start, hyper=hyper, batches=batches, save_at=(), report=silent)
            )
            ends = [p for p in traj.params.values() if p.requires_grad]
        if ends:
            torch.autograd.backward(ends, [torch.ones_like(p) for p in ends])

    return run


clock = time.perf_counter


def _least(runs: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, times in zip(runs, taken, strict=True):
            _finish()
            begin = clock()
            run()
            _finish()
            times.append(clock() - begin)
    return [min(times) for times in taken]


def _finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _line(values: Sequence[float], few: int) -> LinearCost:
    if few == 1:
        return LinearCost(0.0, values[1])
    each = max((values[1] - values[0]) / (few - 1), 0.0)
    return LinearCost(max(values[0] - each, 0.0), each)


def _peak(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    tally = _Tally()
    with torch_private.observing(tally.add):
        run()
    return tally.peak


class _Tally:
    """Adds up the memory of all tensors that come into being, as long as it is in use.

    Attributes:
        peak: most bytes at once.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._live: dict[int, tuple[Any, int]] = {}
        self._sum = 0

    def add(self, x: Tensor) -> None:
        """Count the memory of ``x``, unless it is counted already."""
        if x.layout is not torch.strided:
            # A sparse tensor is made of dense ones, which are counted.
            return
        reference = torch_private.storage_weakref(x)
        known = self._live.get(reference.cdata)
        if known is not None:
            if not known[0].expired():
                return
            self._sum -= known[1]
        size = x.untyped_storage().nbytes()
        self._live[reference.cdata] = reference, size
        self._sum += size
        if self._sum > self.peak:
            for key, (old, bytes_) in list(self._live.items()):
                if old.expired():
                    del self._live[key]
                    self._sum -= bytes_
            self.peak = max(self.peak, self._sum)
