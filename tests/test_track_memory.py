"""What `innerloop.track` keeps alive: nothing after an episode, and a constant amount where nothing
is learned."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from innerloop._utils.heap import give_back_free_pages
from tests.memory import assert_nothing_is_left, without_collector
from tests.networks import adam, leaf, sgd
from tests.situations import features, target

STEPS = 3


class Network(nn.Module):
    """With buffers, dropout and hooks; float32."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 1)
        self.register_forward_hook(lambda module, args, output: output * 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.norm(self.body(x)).tanh(), 0.1))


def loss_of(model: nn.Module, t: int) -> Tensor:
    return F.mse_loss(model(features(t).float()), target(t).float())


def simple(model: nn.Module, optimizer: Any, **arguments: Any) -> None:
    with innerloop.track(model, optimizer, **arguments) as loop:
        for t in range(STEPS):
            loop.step(loss_of(loop.model, t))
        outer = loss_of(loop.model, STEPS)
    if loop.learn != "nothing":
        outer.backward()


def looking(model: nn.Module, optimizer: Any, **arguments: Any) -> None:
    """Everything that can be asked of a loop."""
    with innerloop.track(model, optimizer, **arguments) as loop:
        for t in range(STEPS):
            loop.step(
                loss_of(loop.model, t),
                grad_callback=lambda grads: {
                    n: None if g is None else 2 * g for n, g in grads.items()
                },
            )
        trajectory = loop.trajectory
        for time in (0, -1):
            loop.parameters(time=time), loop.buffers(time=time), trajectory.at(time)
        outer = loss_of(loop.model, STEPS) + trajectory.losses.sum()
        if loop.learn != "nothing":
            innerloop.inspect.paths(trajectory, outer)
            outer.backward()


def in_windows(model: nn.Module, optimizer: Any, *, cut: str, **arguments: Any) -> None:
    with innerloop.track(model, optimizer, **arguments) as loop:
        for t in range(STEPS):
            loop.step(loss_of(loop.model, t))
            getattr(loop, cut)()
        loss_of(loop.model, STEPS)


def interrupted(model: nn.Module, optimizer: Any, **arguments: Any) -> None:
    try:
        with innerloop.track(model, optimizer, **arguments) as loop:
            loop.step(loss_of(loop.model, 0))
            loop.step(loss_of(loop.model, 1) * float("nan"))
    except innerloop.InvalidInputError:
        pass


EPISODES: dict[str, Callable[..., None]] = {
    "simple": simple,
    "looking": looking,
    "detach": lambda *args, **kw: in_windows(*args, cut="detach", **kw),
    "commit": lambda *args, **kw: in_windows(*args, cut="commit", **kw),
    "interrupted": interrupted,
}


@pytest.mark.covering
@pytest.mark.parametrize("learn", ["init", "outer", "nothing"])
@pytest.mark.parametrize("kind", list(EPISODES))
def test_episodes_leave_no_objects(kind: str, learn: str):
    """Without a single reference cycle: the collector is off, and what it would have found is
    nothing."""
    model = Network()
    optimizer = adam(model)
    lr = leaf(0.1)
    assert_nothing_is_left(
        lambda: EPISODES[kind](model, optimizer, learn=learn, hyper={"lr": lr}), count=10
    )


@pytest.mark.slow
def test_two_hundred_episodes():
    model = Network()
    optimizer = sgd(model)
    assert_nothing_is_left(lambda: simple(model, optimizer), count=200)


def test_what_the_user_lets_go_goes():
    """Neither the user's module nor anything global holds the loop, its module or its
    trajectory."""
    model = Network()
    with without_collector():
        with innerloop.track(model, sgd(model)) as loop:
            loop.step(loss_of(loop.model, 0))
        trajectory, parameters = loop.trajectory, loop.parameters()
        references = [
            weakref.ref(x) for x in (loop, loop.model, trajectory, parameters["head.bias"])
        ]
        assert all(reference() is not None for reference in references)
        del loop, trajectory, parameters
        assert [reference() for reference in references] == [None] * 4


# -- learn="nothing" -------------------------------------------------------------------------------


class Watched(nn.Module):
    """Keeps a weak reference to the activation that tanh's backward saves: alive as long as the
    step's graph is."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x).tanh()
        self.seen.append(weakref.ref(hidden))
        return self.head(hidden)


def alive_after(steps: int, **arguments: Any) -> int:
    model = Watched()
    with innerloop.track(model, adam(model), **arguments) as loop, without_collector():
        for t in range(steps):
            loop.step(loss_of(loop.model, t))
        return sum(reference() is not None for reference in loop.model.seen)


def test_the_graphs_of_the_steps():
    """Every graph is kept where it is needed (so that this test can fail), and none where nothing
    is learned."""
    assert alive_after(7) == 7
    assert alive_after(7, learn="outer") == 7
    assert alive_after(7, learn="nothing") == 0
    assert alive_after(7, first_order=True) == 0


def live_bytes() -> int:
    """Bytes of all storages that a Python tensor holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking some objects for their class is deprecated
        tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return sum(
        {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()
    )


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_nothing_needs_the_same_memory_for_any_number_of_steps(
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
):
    """But for the losses, one number of four bytes each."""
    model = Network()
    with innerloop.track(model, optimizer(model), learn="nothing") as loop, without_collector():
        used = {}
        for t in range(1, 601):
            loop.step(loss_of(loop.model, t))
            if t in (10, 100, 600):
                used[t] = live_bytes()
        assert used[100] - used[10] <= 4 * 90
        assert used[600] - used[10] <= 4 * 590
    assert len(loop.trajectory.losses) == 600


@pytest.mark.parametrize("kind", ["closure", "grad_callback"])
@pytest.mark.parametrize("way", ["nothing", "detach"])
def test_what_no_gradient_needs_is_gone_after_the_step(way: str, kind: str):
    """Also where the user's code runs inside of a step."""
    model = Network()
    seen: list[weakref.ref[Tensor]] = []
    with innerloop.track(
        model, adam(model), learn="nothing" if way == "nothing" else "init"
    ) as loop:
        for t in range(6):
            seen.append(weakref.ref(loop.model.body.weight))
            if kind == "closure":
                loop.step(lambda t=t: loss_of(loop.model, t))
            else:
                loop.step(loss_of(loop.model, t), grad_callback=lambda grads: grads)
            if way == "detach":
                loop.detach()
        gc.collect()
        assert sum(reference() is not None for reference in seen) <= 2


def test_init_needs_more_with_every_step():
    """So that the test above can fail."""
    model = Network()
    with innerloop.track(model, adam(model)) as loop, without_collector():
        loop.step(loss_of(loop.model, 0))
        before = live_bytes()
        for t in range(10):
            loop.step(loss_of(loop.model, t))
        assert live_bytes() - before > 10 * sum(p.nbytes for p in model.parameters())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of the C library there")
def test_free_pages_between_what_is_in_use_are_given_back() -> None:
    """40 MB in holes of 16 kB, each of which is too small for what is wanted next."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("not the GNU C library")

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    between, holes = [], []
    for _ in range(2_500):
        holes.append(torch.ones(4_096, dtype=torch.float32))
        between.append(torch.ones(64, dtype=torch.float32))
    del holes
    before = resident()
    give_back_free_pages()
    assert before - resident() > 10e6
    assert all(bool((x == 1).all()) for x in between)
