"""``OuterState``: a resumed loop goes on bit for bit; a bad file changes nothing."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import innerloop
from innerloop import InvalidInputError, OuterState


class Outer:
    """A MAML-like outer loop that draws from every generator there is."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.log_lr = torch.tensor(-2.0, requires_grad=True)
        self.optimizer = torch.optim.Adam([*self.model.parameters(), self.log_lr], lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.generator = torch.Generator().manual_seed(1)
        self.counters: dict[str, Any] = {"iteration": 0, "losses": []}
        self.state = OuterState(
            model={"net": self.model, "log_lr": self.log_lr},
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            random=self.generator,
            counters=self.counters,
        )

    def run(self, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(8, 3, generator=self.generator)
            x = x * random.random() + float(np.random.rand())  # noqa: NPY002
            inner = torch.optim.SGD(self.model.parameters(), lr=0.1)
            self.optimizer.zero_grad()
            with innerloop.track(self.model, inner, hyper={"lr": self.log_lr.exp()}) as loop:
                loop.step(loop.model(x).square().mean())
                outer = (loop.model(x) - 1).square().mean()
            outer.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.counters["iteration"] += 1
            self.counters["losses"].append(outer.item())

    def everything(self) -> list[Any]:
        averages = self.optimizer.state_dict()["state"]
        return [
            *self.model.state_dict().values(),
            self.log_lr,
            *(value for entry in averages.values() for value in entry.values()),
            torch.tensor(self.counters["losses"]),
            torch.tensor(self.scheduler.get_last_lr()),
            torch.get_rng_state(),
            self.generator.get_state(),
        ]


def same(a: Outer, b: Outer) -> bool:
    one, two = a.everything(), b.everything()
    return len(one) == len(two) and all(map(torch.equal, one, two))


# The type checker looks at random entries of containers, by Python's own generator.
@pytest.mark.usefixtures("types_unchecked")
def test_a_loop_that_is_resumed_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    first = Outer()
    first.run(3)
    first.state.save(tmp_path / "outer.pt")
    first.run(4)
    other = Outer()
    other.run(1)
    torch.rand(5)
    other.state.load(tmp_path / "outer.pt")
    assert other.counters["iteration"] == 3
    other.run(4)
    assert same(first, other)
    assert first.counters == other.counters
    third = Outer()
    third.run(7)
    assert same(first, third)


@pytest.mark.usefixtures("types_unchecked")
def test_saving_changes_nothing_and_loading_keeps_the_objects(tmp_path: Path) -> None:
    one, two = Outer(), Outer()
    one.run(2)
    one.state.save(tmp_path / "outer.pt")
    kept = [id(p) for p in one.model.parameters()]
    one.state.load(tmp_path / "outer.pt")
    assert kept == [id(p) for p in one.model.parameters()]
    one.run(1)
    two.run(3)
    assert not same(one, two)  # the generators of numpy and Python went on for `one` meanwhile
    two = Outer()
    two.run(2)
    two.state.save(tmp_path / "outer.pt")
    two.run(1)
    two.state.load(tmp_path / "outer.pt")
    one.state.load(tmp_path / "outer.pt")
    assert same(one, two)
    # What was loaded is not what is trained: a second load gives the same again.
    two.run(2)
    two.state.load(tmp_path / "outer.pt")
    assert same(one, two)


def flip(data: bytes) -> bytes:
    """Change one bit in the middle of the file: of a weight, not of the zip's headers."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class Foreign:
    """A class that a file should not be able to name."""


def foreign_pickle(path: Path) -> None:
    torch.save({"format": "innerloop.OuterState", "x": Foreign()}, path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "there is no file"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "damaged"),
        (lambda path: path.write_bytes(flip(path.read_bytes())), "damaged"),
        (lambda path: path.write_text("hello"), "damaged"),
        (lambda path: torch.save({"weight": torch.ones(3)}, path), "was not written by"),
        (foreign_pickle, "could run code"),
        (
            lambda path: torch.save({"format": "innerloop.OuterState", "version": 99}, path),
            "has version 99",
        ),
        (
            lambda path: OuterState(model=nn.Linear(1, 1)).save(path),
            "was saved with model, and this OuterState has",
        ),
    ],
)
def test_a_bad_file_changes_nothing(
    spoil: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "outer.pt"
    loop = Outer()
    loop.run(1)
    loop.state.save(path)
    spoil(path)
    before = [x.clone() for x in loop.everything()]
    counters = copy.deepcopy(loop.counters)
    with pytest.raises(InvalidInputError, match=says):
        loop.state.load(path)
    assert all(map(torch.equal, before, loop.everything()))
    assert counters == loop.counters


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read"):
        OuterState(model=nn.Linear(1, 1)).load(tmp_path)


def test_objects_of_other_shapes_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    saved = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.Adam(saved.parameters())
    saved(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    OuterState(model=saved, optimizer=optimizer).save(tmp_path / "a.pt")
    # The first layer fits, the second does not: the first must be put back.
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(InvalidInputError, match="size mismatch"):
        OuterState(model=model, optimizer=torch.optim.Adam(model.parameters())).load(
            tmp_path / "a.pt"
        )
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert torch.equal(state, torch.get_rng_state())
    # torch itself accepts averages of another shape.
    other = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 1))
    with pytest.raises(InvalidInputError, match="'exp_avg' of shape"):
        OuterState(model=saved, optimizer=torch.optim.Adam(other.parameters())).load(
            tmp_path / "a.pt"
        )
    with pytest.raises(InvalidInputError, match="parameter group"):
        OuterState(model=saved, optimizer=torch.optim.Adam(saved[0].parameters())).load(
            tmp_path / "a.pt"
        )
    OuterState(model={"a": torch.ones(2)}).save(tmp_path / "b.pt")
    with pytest.raises(InvalidInputError, match=r"model\['a'\] has shape \(3,\)"):
        OuterState(model={"a": torch.ones(3)}).load(tmp_path / "b.pt")
    with pytest.raises(InvalidInputError, match="was saved with a, and now has b"):
        OuterState(model={"b": torch.ones(2)}).load(tmp_path / "b.pt")


def test_random_states_must_be_in_the_file(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    OuterState(model=model, random=False).save(tmp_path / "a.pt")
    with pytest.raises(InvalidInputError, match="random=False"):
        OuterState(model=model).load(tmp_path / "a.pt")
    OuterState(model=model).save(tmp_path / "b.pt")
    with pytest.raises(InvalidInputError, match="0 generators"):
        OuterState(model=model, random=torch.Generator()).load(tmp_path / "b.pt")
    torch.manual_seed(0)
    OuterState(model=model, random=False).load(tmp_path / "b.pt")
    first = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(3))


def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "outer.pt"
    OuterState(model=nn.Linear(1, 1)).save(path)
    before = path.read_bytes()
    with pytest.raises(InvalidInputError, match="Foreign"):
        OuterState(counters={"x": Foreign()}).save(path)
    with pytest.raises(InvalidInputError, match="cannot be written"):
        OuterState(counters={"x": lambda: 0}).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["outer.pt"]


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": 3}, "model is a int"),
        ({"model": {"a": [nn.Linear(1, 1), "x"]}}, r"model\['a'\]\[1\] is a str"),
        ({"counters": 3}, "counters is a int"),
        ({"random": [3]}, "random holds a int"),
    ],
)
def test_bad_parts_are_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        OuterState(**arguments)


KILLED = """
import sys, torch, innerloop
model = torch.nn.Linear(300, 300)
state = innerloop.OuterState(model=model, counters=(counters := {"n": 0}))
print("ready", flush=True)
while True:
    counters["n"] += 1
    torch.nn.init.constant_(model.weight, counters["n"])
    state.save(sys.argv[1])
"""


def test_a_process_killed_while_it_saves_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "outer.pt"
    model, counters = nn.Linear(300, 300), dict[str, Any]()
    state = OuterState(model=model, counters=counters)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    with process:
        process.stdout.readline()
        while not path.exists():
            assert process.poll() is None, "the process has ended by itself"
            time.sleep(0.01)
        time.sleep(random.Random().random() / 5)
        process.send_signal(signal.SIGKILL)
    state.load(path)
    assert bool((model.weight == counters["n"]).all())
