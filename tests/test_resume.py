"""A loop that was killed goes on from its folder, with the same bits, or says why it does not."""

from __future__ import annotations

import errno
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop
from innerloop import Checkpointed, InvalidInputError
from innerloop._utils.digest import digest_bytes
from innerloop._utils.folder_lock import FolderLock
from innerloop.strategy import Disk
from innerloop.strategy._engine import saved_run
from innerloop.strategy._engine.saved_run import SavedRun
from tests import resume_program
from tests.oracles import smooth_noise

STEPS = 24


class Killed(BaseException):
    """A simulated kill: nothing in the package handles it."""


def killing(phase: str, step: int) -> Callable[[str, int, int | None], None]:
    def progress(where: str, done: int, total: int | None) -> None:
        if (where, done) == (phase, step):
            raise Killed

    return progress


def counting(steps: list[tuple[str, int]]) -> Callable[[str, int, int | None], None]:
    return lambda phase, done, total: steps.append((phase, done))


def files(folder: Path, kind: str = "") -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.startswith(kind) and p.name != "lock")


def assert_same_bits(ours: list[Tensor], truth: list[Tensor]) -> None:
    assert len(ours) == len(truth)
    for a, b in zip(ours, truth, strict=True):
        assert torch.equal(a, b)


@pytest.fixture(autouse=True)
def _each_step_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass writes down where it is after each step, not after some time. No test sees
    a loss of power, so none waits for the disk."""
    monkeypatch.setattr(saved_run, "SHARE", -1)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# -- a loop that is interrupted again and again ----------------------------------------------------

STRATEGIES: dict[str, dict[str, Any]] = {
    "default": {},
    "few": {"slots": 4},
    "one": {"slots": 1},
    "mixed": {"slots": 6, "product": "mixed"},
    "finite": {"slots": 6, "product": "finite"},
}


@functools.cache
def truth(name: str) -> list[Tensor]:
    """The gradients of a loop whose states wait in memory."""
    return resume_program.gradient(Checkpointed(**STRATEGIES[name]), STEPS, False)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_loop_that_is_interrupted_gives_the_same_bits(name: str, tmp_path: Path):
    strategy = Checkpointed(**STRATEGIES[name], offload=Disk(tmp_path / "run"))
    kills = [("forward", 1), ("forward", STEPS - 2), ("forward", STEPS)]
    kills += [("backward", 1), ("backward", 13), ("backward", STEPS)]
    for phase, step in kills:
        with pytest.raises(Killed):
            resume_program.gradient(strategy, STEPS, killing(phase, step))
        assert files(tmp_path / "run") or step == 1 or (phase == "forward" and name == "one")
    assert_same_bits(resume_program.gradient(strategy, STEPS, False), truth(name))
    assert files(tmp_path / "run") == []


def test_a_loop_goes_on_where_it_was(tmp_path: Path):
    strategy = Checkpointed(slots=8, offload=Disk(tmp_path))
    with pytest.raises(Killed):
        resume_program.gradient(strategy, STEPS, killing("forward", 20))
    newest = max(int(p.name.split("-")[1]) for p in files(tmp_path, "state"))
    assert 14 < newest <= 19
    taken: list[tuple[str, int]] = []
    resume_program.gradient(strategy, STEPS, counting(taken))
    forward = [done for phase, done in taken if phase == "forward"]
    assert forward == list(range(newest, STEPS + 1))
    with pytest.raises(Killed):
        resume_program.gradient(strategy, STEPS, killing("backward", 18))
    taken.clear()
    resume_program.gradient(strategy, STEPS, counting(taken))
    # The step that was interrupted had been written down.
    backward = [("backward", done) for done in range(18, STEPS + 1)]
    assert taken == [("forward", STEPS), *backward]


@pytest.mark.slow
def test_both_phases_go_on_from_any_interruption(tmp_path: Path):
    strategy = Checkpointed(slots=4, offload=Disk(tmp_path))
    for phase in ("forward", "backward"):
        for step in range(1, STEPS, 2):
            with pytest.raises(Killed):
                resume_program.gradient(strategy, STEPS, killing(phase, step))
            assert_same_bits(resume_program.gradient(strategy, STEPS, False), truth("few"))


# -- real kills ------------------------------------------------------------------------------------


def start(folder: Path, result: Path, steps: int) -> subprocess.Popen[str]:
    arguments = [str(folder), str(result), str(steps)]
    command = [sys.executable, "-m", "tests.resume_program", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)


def reported(process: subprocess.Popen[str]) -> Iterator[tuple[str, int]]:
    assert process.stdout is not None
    for line in process.stdout:
        phase, done = line.split()
        yield phase, int(done)


def kill_at(folder: Path, result: Path, steps: int, point: int, delay: float) -> tuple[int, int]:
    """Run the program and kill it at a point: steps forward, then steps backward.

    Returns:
        From where it went on, and the last point that it reported.
    """
    points: list[int] = []
    with start(folder, result, steps) as process:
        for phase, done in reported(process):
            points.append(done if phase == "forward" else steps + done)
            if points[-1] >= point:
                break
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    # A forward pass that is done is reported once more.
    return points[1] if points[0] == steps and len(points) > 1 else points[0], points[-1]


def finish(folder: Path, result: Path, steps: int) -> list[Tensor]:
    with start(folder, result, steps) as process:
        for _ in reported(process):
            pass
    assert process.returncode == 0
    return torch.load(result)


def test_a_process_that_is_killed_goes_on(tmp_path: Path):
    folder, result = tmp_path / "run", tmp_path / "result.pt"
    steps = 100
    for point in (70, 150):
        kill_at(folder, result, steps, point, random.Random().random() / 100)
        assert files(folder, "state")
    assert_same_bits(
        finish(folder, result, steps), resume_program.gradient(Checkpointed(), steps, False)
    )
    assert files(folder) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = random.Random().randrange(len(data))
    data[place] ^= 1 << random.Random().randrange(8)
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.slow
def test_twenty_random_kills_in_two_thousand_steps(tmp_path: Path):
    """With files that are cut, changed in a bit, or of another loop in between."""
    steps, seed = 2000, random.Random().randrange(10**6)
    print("seed", seed)  # shown if the test fails
    rng = random.Random(seed)
    expected = resume_program.gradient(Checkpointed(), steps, False)
    folder, result = tmp_path / "run", tmp_path / "result.pt"
    points = sorted(rng.sample(range(50, steps), 10)) + sorted(
        rng.sample(range(steps + 1, 2 * steps), 10)
    )
    other = tmp_path / "other"
    kill_at(other, result, 600, 500, 0)
    foreign = files(other, "state")[0]
    before, damaged = 0, False
    for i, point in enumerate(points):
        first, now = kill_at(folder, result, steps, point, rng.random() / 20)
        print(f"killed at {now}, went on from {first}")
        assert not result.exists()
        assert files(folder, "state")
        if not damaged and before > 100:
            # At most the steps between two states are lost, or those since the last note.
            assert first >= before - 100 if before < steps else first >= min(steps, before - 600)
        before, damaged = now, False
        if i % 4 == 1:
            truncate(rng.choice(files(folder, "state")))
            flip_a_bit(rng.choice(files(folder)))
            damaged = True
        if i % 7 == 3:
            shutil.copy(foreign, folder)
            with start(folder, result, steps) as process:
                assert list(reported(process)) == []
            assert process.returncode != 0
            (folder / foreign.name).unlink()
    assert_same_bits(finish(folder, result, steps), expected)
    assert files(folder) == []


# -- files that are damaged, or of another loop ----------------------------------------------------


def interrupted(strategy: Checkpointed, phase: str = "backward", step: int = 9) -> None:
    with pytest.raises(Killed):
        resume_program.gradient(strategy, STEPS, killing(phase, step))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": truncate,
    "a bit": flip_a_bit,
    "empty": empty,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "where",
    [*(f"{p} {w}" for p in ("forward", "backward") for w in ("first", "last", "every"))]
    + ["backward adjoint"],
)
@pytest.mark.covering
def test_a_damaged_file_is_computed_again(damage: str, where: str, tmp_path: Path):
    phase, which = where.split()
    strategy = Checkpointed(slots=4, offload=Disk(tmp_path))
    interrupted(strategy, phase, STEPS - 1 if phase == "forward" else 9)
    kept = files(tmp_path, "state")
    assert kept
    chosen = {"first": kept[:1], "last": kept[-1:], "every": kept}.get(which, [])
    if which == "adjoint":
        chosen = files(tmp_path, "adjoint")
    assert chosen
    for path in chosen:
        DAMAGE[damage](path)
    if damage != "gone":
        with pytest.warns(UserWarning, match=r"is damaged .*: what it held is computed again"):
            found = resume_program.gradient(strategy, STEPS, False)
    else:
        found = resume_program.gradient(strategy, STEPS, False)
    assert_same_bits(found, truth("few"))
    assert files(tmp_path) == []


def test_a_file_that_is_damaged_while_the_loop_runs_is_computed_again(tmp_path: Path):
    done: list[int] = []

    def damaging(phase: str, step: int, total: int | None) -> None:
        if phase == "backward" and step in (1, 4, 12):
            for path in files(tmp_path, "state"):
                truncate(path)
            done.append(step)

    strategy = Checkpointed(slots=4, offload=Disk(tmp_path))
    with pytest.warns(UserWarning, match="is damaged"):
        found = resume_program.gradient(strategy, STEPS, damaging)
    assert done == [1, 4, 12]
    assert_same_bits(found, truth("few"))


# A small loop, of which every part can be changed.


def quadratic(params: Any, hyper: Any, batch: Any) -> Tensor:
    noise = 0.1 * torch.rand(()) if batch > 2 else 0.0
    return (hyper["weight"] * (params["w"] - batch) ** 2).sum() + noise * params["w"].sum()


def another(params: Any, hyper: Any, batch: Any) -> Tensor:
    noise = 0.1 * torch.rand(()) if batch > 2 else 0.0
    return (hyper["weight"] * (params["w"] - batch) ** 2).sum() + noise * params["w"].mean()


def small(folder: Path | None, progress: Any = False, **changed: Any) -> list[Tensor]:
    torch.manual_seed(changed.get("seed", 0))
    problem = innerloop.Problem(
        changed.get("loss", quadratic),
        changed.get("optimizer", innerloop.optim.sgd(momentum=0.5)),
        optimizer_hyper=changed.get("optimizer_hyper", ("lr",)),
    )
    data = changed.get("batches", [torch.tensor(float(t)) for t in range(12)])
    options = changed.get("options", {})
    place: dict[str, Any] = {} if folder is None else {"offload": Disk(folder)}
    value, grads = innerloop.metagradient(
        changed.get("outer", lambda traj, hyper: traj.params["w"].square().sum()),
        problem,
        {"w": changed.get("w", smooth_noise(3).float())},
        data,
        steps=changed.get("steps", 12 if callable(data) else None),
        hyper={"lr": torch.tensor(0.1), "weight": changed.get("weight", torch.tensor(0.5))},
        strategy=Checkpointed(**place, **{"slots": 3, **options}),
        save_at=changed.get("save_at", ()),
        progress=progress,
    )
    return [value, grads["params"]["w"], *grads["hyper"].values()]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "params": ({"w": torch.ones(3)}, "params"),
    "shape": ({"w": torch.ones(4)}, "params"),
    "dtype": ({"w": torch.ones(3, dtype=torch.float64)}, "params"),
    "hyper": ({"weight": torch.tensor(0.25)}, "hyper"),
    "batches": ({"batches": [torch.tensor(t + 0.5) for t in range(12)]}, "batches"),
    "a batch": ({"batches": [torch.tensor(float(t % 11)) for t in range(12)]}, "batches"),
    "steps": ({"steps": 11}, r"steps \(12 there, 11 here\)"),
    "save_at": ({"save_at": [3]}, "save_at"),
    "loss": ({"loss": another}, "loss"),
    "optimizer": ({"optimizer": innerloop.optim.sgd(momentum=0.25)}, "optimizer"),
    "rule": ({"optimizer": innerloop.optim.adam()}, "the optimizer's state, optimizer"),
    "schedule": ({"optimizer_hyper": lambda hyper, t: {"lr": hyper["lr"]}}, "optimizer_hyper"),
    "product": ({"options": {"product": "mixed"}}, r"product \(auto there, mixed here\)"),
    "seed": ({"seed": 1}, "random state"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.covering
def test_the_files_of_another_loop_are_refused(other: str, phase: str, tmp_path: Path):
    changed, named = OTHERS[other]
    with pytest.raises(Killed):
        small(tmp_path, killing(phase, 10))
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with pytest.raises(InvalidInputError, match=f"belongs to another loop. These differ: {named}"):
        small(tmp_path, **changed)
    assert {path: path.read_bytes() for path in files(tmp_path)} == before
    # Nothing is lost by that, and nothing stays locked.
    assert_same_bits(small(tmp_path), small(None))
    assert_same_bits(small(tmp_path, **changed), small(None, **changed))


def test_the_seed_of_a_loop_that_draws_nothing_does_not_matter(tmp_path: Path):
    data = [torch.tensor(1.0)] * 12
    with pytest.raises(Killed):
        small(tmp_path, killing("backward", 5), batches=data)
    taken: list[tuple[str, int]] = []
    assert_same_bits(
        small(tmp_path, counting(taken), batches=data, seed=1), small(None, batches=data)
    )
    assert taken[:2] == [("forward", 12), ("backward", 5)]


def test_another_number_of_slots_goes_on(tmp_path: Path):
    for phase in ("forward", "backward"):
        with pytest.raises(Killed):
            small(tmp_path, killing(phase, 8), options={"slots": 6})
        assert_same_bits(small(tmp_path, options={"slots": 2}), small(None))


def test_a_file_of_another_loop_among_those_of_this_one_is_refused(tmp_path: Path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, changed in ((ours, {}), (theirs, {"weight": torch.tensor(0.25)})):
        with pytest.raises(Killed):
            small(folder, killing("forward", 10), **changed)
    copied = shutil.copy(files(theirs)[-1], ours)
    with pytest.raises(InvalidInputError, match=rf"{re.escape(str(copied))}.*differ: hyper\."):
        small(ours)
    Path(copied).unlink()
    assert_same_bits(small(ours), small(None))


@pytest.mark.parametrize(
    ("contents", "named"),
    [
        (
            {"format": saved_run.FORMAT, "version": 2},
            "has version 2 of the format.*reads version 1",
        ),
        ({"weights": torch.zeros(3)}, "no file of this format"),
        (Path("code that runs"), "no file of this format"),
    ],
    ids=["version", "state_dict", "pickle"],
)
def test_a_file_of_another_kind_is_refused(contents: Any, named: str, tmp_path: Path):
    torch.save(contents, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    (tmp_path / f"state-000000004-{digest_bytes(data)}.pt").write_bytes(data)
    with pytest.raises(InvalidInputError, match=named):
        small(tmp_path)


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path):
    (tmp_path / "state-of-the-art.pt").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Killed):
        small(tmp_path, killing("forward", 10))
    small(tmp_path)
    assert [p.name for p in files(tmp_path)] == ["notes.txt", "state-of-the-art.pt"]


# -- a loss that has changed in a way that its code does not show ----------------------------------


def reading_a_file(path: Path) -> Callable[..., Tensor]:
    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        target, since = map(float, path.read_text().split())
        return quadratic(params, hyper, batch) + (
            params["w"].sum() * target if batch >= since else 0
        )

    return loss


@pytest.mark.parametrize(
    ("since", "phase", "step", "named"),
    [
        (0, "forward", 10, "the loss of step 0 is .*, and was .* when the states"),
        (0, "backward", 3, "the loss of step 0 is .*, and was .* when the states"),
        (2, "forward", 10, "when the step was replayed|the loss of a replayed step"),
        (2, "backward", 3, "when the step was replayed|the loss of a replayed step"),
    ],
)
def test_a_loss_that_reads_something_else_is_named(
    since: int, phase: str, step: int, named: str, tmp_path: Path
):
    path = tmp_path / "target"
    loss = reading_a_file(path)
    path.write_text("0.25 0" if since == 0 else "0.25 20")
    with pytest.raises(Killed):
        small(tmp_path / "run", killing(phase, step), loss=loss)
    path.write_text("0.75 0" if since == 0 else "0.25 2")
    with pytest.raises(InvalidInputError, match=named):
        small(tmp_path / "run", loss=loss)


def test_batches_that_are_others_when_they_are_made_again_are_named(tmp_path: Path):
    path = tmp_path / "data"

    def batches(params: Any, hyper: Any, t: int) -> Tensor:
        return torch.tensor(float(t)) + (float(path.read_text()) if t == 3 else 0.0)

    path.write_text("0.0")
    with pytest.raises(Killed):
        small(tmp_path / "run", killing("forward", 10), batches=batches)
    path.write_text("1e-3")
    with pytest.raises(InvalidInputError, match="gave other data at t=3"):
        small(tmp_path / "run", batches=batches)


def test_another_outer_loss_starts_the_backward_pass_over(tmp_path: Path):
    def outer(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
        return traj.params["w"].sin().sum() + traj.losses.sum()

    with pytest.raises(Killed):
        small(tmp_path, killing("backward", 9))
    taken: list[tuple[str, int]] = []
    found = small(tmp_path, counting(taken), outer=outer)
    assert_same_bits(found, small(None, outer=outer))
    assert taken == [("forward", 12), *(("backward", t) for t in range(1, 13))]


# -- a full disk -----------------------------------------------------------------------------------


class _Full:
    """A file on a disk that is full after so many bytes."""

    def __init__(self, file: Any, room: list[int]) -> None:
        self._file, self._room = file, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        fits = min(self._room[0], len(data))
        self._room[0] -= fits
        self._file.write(data[:fits])
        if fits < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        return fits


@pytest.mark.parametrize("room", [0, 10_000, 60_000, 90_000, 130_000])
def test_a_full_disk_is_named_and_loses_nothing(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    strategy = Checkpointed(slots=4, offload=Disk(tmp_path))
    left = [room]
    opened = os.fdopen
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", lambda *a, **k: _Full(opened(*a, **k), left))
        with pytest.raises(innerloop.InnerLoopError, match=r"No space left.*the same call goes on"):
            resume_program.gradient(strategy, STEPS, False)
    assert all(saved_run.NAME.fullmatch(path.name) for path in files(tmp_path))
    taken: list[tuple[str, int]] = []
    found = resume_program.gradient(strategy, STEPS, counting(taken))
    assert_same_bits(found, truth("few"))
    if room > 10_000:
        assert taken[0][1] > 1


def test_a_disk_that_fills_when_data_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(innerloop.InnerLoopError, match="No space left"):
            small(tmp_path)
    assert files(tmp_path) == []
    assert_same_bits(small(tmp_path), small(None))


# -- who may use a folder --------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(tmp_path: Path):
    w = torch.tensor(2.0, requires_grad=True)

    def unroll() -> innerloop.Trajectory:
        problem = innerloop.Problem(lambda p, h, b: p["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5))
        strategy = Checkpointed(offload=Disk(tmp_path))
        return innerloop.unroll(problem, {"w": w}, None, steps=5, strategy=strategy)

    traj = unroll()
    with pytest.raises(InvalidInputError, match=r"in use by a loop of this process.*Disk\("):
        unroll()
    traj.params["w"].backward()
    assert w.grad == 1 / 32
    traj = unroll()  # its backward pass is through
    del traj
    unroll()  # nobody can differentiate it any more


def test_the_folder_of_a_living_process_is_refused_and_that_of_a_dead_one_is_not(tmp_path: Path):
    with start(tmp_path, tmp_path / "result.pt", 100) as process:
        next(reported(process))
        with pytest.raises(InvalidInputError, match=f"in use by a loop of process {process.pid}:"):
            FolderLock(tmp_path)
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "lock").read_text() == str(process.pid)
    lock = FolderLock(tmp_path)
    assert (tmp_path / "lock").read_text() == str(os.getpid())
    lock.release()


@pytest.mark.parametrize("where", ["file", "below"])
def test_a_folder_that_cannot_be_made_is_named(where: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" if where == "file" else tmp_path / "file" / "below"
    with pytest.raises(InvalidInputError, match="cannot be used for the states of a loop"):
        small(folder)


# -- what is refused -------------------------------------------------------------------------------


def test_an_iterator_is_refused(tmp_path: Path):
    with pytest.raises(InvalidInputError, match=r"iterator.*pass a list, or a function"):
        small(tmp_path, batches=iter([torch.tensor(1.0)] * 12))
    assert files(tmp_path) == []


def test_transforms_are_refused(tmp_path: Path):
    with pytest.raises(InvalidInputError, match=r"torch\.func transforms"):
        torch.func.vmap(lambda w: small(tmp_path, w=w)[1])(torch.ones(2, 3))


def test_kept_gradients_are_refused():
    with pytest.raises(InvalidInputError, match=r'save="gradients".*write save="params"'):
        Checkpointed(offload=Disk("run1"), save="gradients")


@pytest.mark.parametrize("folder", ["", 3, None])
@pytest.mark.usefixtures("types_unchecked")
def test_a_folder_that_is_none_is_refused(folder: Any):
    with pytest.raises(InvalidInputError, match=r'write the path of a folder, Disk\("run1"\)'):
        Disk(folder)


class Foreign(torch.optim.SGD):
    pass


def test_a_state_of_foreign_objects_is_refused(tmp_path: Path):
    class Local(Foreign):
        pass

    for kind, named in ((Foreign, "FrozenState"), (Local, "Local")):
        with pytest.raises(InvalidInputError, match=rf'{named}.*write offload="disk"'):
            small(tmp_path, optimizer=innerloop.optim.adapt(kind, lr=0.1), optimizer_hyper=())
        assert files(tmp_path) == []


# -- everything else -------------------------------------------------------------------------------


def test_the_folder_is_empty_when_nothing_is_left_to_do(tmp_path: Path):
    problem = innerloop.Problem(lambda p, h, b: p["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5))
    strategy = Checkpointed(slots=3, offload=Disk(tmp_path))
    with torch.no_grad():
        for w in (2.0, 3.0):
            traj = innerloop.unroll(
                problem, {"w": torch.tensor(w)}, None, steps=8, strategy=strategy
            )
            assert traj.params["w"] == w / 256
            assert files(tmp_path) == []
    for weight in (0.5, 0.25):  # an outer loop: each call is another loop
        small(tmp_path, weight=torch.tensor(weight))
        assert files(tmp_path) == []


def test_a_loop_without_a_gradient_goes_on(tmp_path: Path):
    problem = innerloop.Problem(lambda p, h, b: p["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5))
    strategy = Checkpointed(slots=3, offload=Disk(tmp_path))
    taken: list[tuple[str, int]] = []

    def run(progress: Any) -> innerloop.Trajectory:
        params = {"w": torch.tensor(256.0)}
        return innerloop.unroll(
            problem, params, None, steps=8, strategy=strategy, progress=progress
        )

    with torch.no_grad(), pytest.raises(Killed):
        run(killing("forward", 7))
    with torch.no_grad():
        traj = run(counting(taken))
    assert traj.params["w"] == 1
    assert traj.losses.tolist() == [2.0 ** (15 - 2 * t) for t in range(8)]
    assert 1 < taken[0][1] < 7


def test_a_graph_may_be_used_again(tmp_path: Path):
    w = torch.tensor(2.0, requires_grad=True)
    problem = innerloop.Problem(lambda p, h, b: p["w"].sin(), innerloop.optim.sgd(lr=0.5))
    found = []
    for offload in (Disk(tmp_path), None):
        strategy = Checkpointed(slots=3, offload=offload)
        traj = innerloop.unroll(problem, {"w": w}, None, steps=9, strategy=strategy)
        outers = (traj.params["w"], traj.params["w"], traj.losses.sum())
        found += [torch.autograd.grad(outer, w, retain_graph=True)[0] for outer in outers]
    assert found[:3] == found[3:]
    assert files(tmp_path) == []


def test_the_inner_loop_of_unroll_goes_on_too(tmp_path: Path):
    """With the same outer loss in the backward pass as well."""
    problem = innerloop.Problem(lambda p, h, b: p["w"].sin(), innerloop.optim.sgd(lr=0.5))
    taken: list[tuple[str, int]] = []

    def gradient(offload: Disk | None, progress: Any) -> Tensor:
        w = torch.tensor(2.0, requires_grad=True)
        strategy = Checkpointed(slots=3, offload=offload)
        traj = innerloop.unroll(
            problem, {"w": w}, None, steps=9, strategy=strategy, progress=progress
        )
        return torch.autograd.grad(traj.params["w"], w)[0]

    for phase in ("forward", "backward"):
        with pytest.raises(Killed):
            gradient(Disk(tmp_path), killing(phase, 8))
    assert gradient(Disk(tmp_path), counting(taken)) == gradient(None, False)
    assert taken == [("forward", 9), ("backward", 8), ("backward", 9)]


def test_a_plan_leaves_the_folder_alone(tmp_path: Path):
    strategy = Checkpointed(offload=Disk(tmp_path / "run"))
    problem = innerloop.Problem(lambda p, h, b: p["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5))
    params = {"w": torch.tensor(2.0)}
    found = innerloop.plan(problem, params, None, steps=8, memory="1GB", strategies=[strategy])
    assert repr(strategy) in str(found)
    bounded = Checkpointed(offload=Disk(tmp_path / "other"), memory="1GB")
    innerloop.unroll(problem, params, None, steps=8, strategy=bounded)
    assert not (tmp_path / "run").exists()
    assert files(tmp_path / "other") == []


def test_strategies_with_a_folder_say_so_and_can_be_compared():
    strategy = Checkpointed(offload=Disk("run1"))
    assert repr(strategy) == "Checkpointed(offload=Disk('run1'))"
    assert strategy == Checkpointed(offload=Disk("run1"))
    assert len({strategy, Checkpointed(offload=Disk("run2"))}) == 2


def test_lbfgs_whose_state_grows_goes_on(tmp_path: Path):
    def gradient(offload: Disk | None, progress: Any) -> list[Tensor]:
        problem = innerloop.Problem(
            lambda p, h, b: ((p["w"] - h) ** 4).sum() + (p["w"] ** 2).sum(),
            innerloop.optim.lbfgs(lr=0.1, max_iter=2),
        )
        _, grads = innerloop.metagradient(
            lambda traj, hyper: traj.params["w"].sum(),
            problem,
            {"w": smooth_noise(4)},
            None,
            steps=8,
            hyper=torch.tensor(0.3, dtype=torch.float64),
            strategy=Checkpointed(slots=4, offload=offload),
            progress=progress,
        )
        return [grads["params"]["w"], grads["hyper"]]

    for phase in ("forward", "backward"):
        with pytest.raises(Killed):
            gradient(Disk(tmp_path), killing(phase, 6))
    assert_same_bits(gradient(Disk(tmp_path), False), gradient(None, False))


def test_views_are_written_without_what_they_are_views_of(tmp_path: Path):
    run = SavedRun(tmp_path, {}, "", 9)
    large = torch.zeros(10**6)
    run[3] = innerloop.Carry({"w": large[5:8]}, None, {}, None)
    assert files(tmp_path)[0].stat().st_size < 10_000
    assert torch.equal(run[3].params["w"], torch.zeros(3))
    run.close()
