"""The folder of a loop that goes on where it was killed.

Each file is one ``torch.save``, written whole or not at all. Its name holds the checksum of its
bytes, and its contents say which loop it belongs to. There are two kinds: ``state-...`` holds the
state at one time, with the outputs of the steps before it; ``adjoint-...`` holds how far the
backward pass has come.
"""

from __future__ import annotations

import io
import pickle
import re
import time as clock
import zipfile
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._problem import Problem
from innerloop._utils import tree
from innerloop._utils.digest import digest, digest_bytes, own_code
from innerloop._utils.fingerprint import Fingerprint
from innerloop._utils.folder_lock import FolderLock
from innerloop._utils.random_state import RandomState
from innerloop._utils.warn import warn_user
from innerloop._utils.whole_file import whole_file
from innerloop.errors import InnerLoopError, InvalidInputError
from innerloop.strategy._base import Loop
from innerloop.strategy._engine.replay_context import Repeatable

FORMAT, VERSION = "innerloop.Disk", 1
NAME = re.compile(r"(state|adjoint)-(\d{9})-([0-9a-f]{32})\.pt")
UNFINISHED = re.compile(r"\.(state|adjoint)-\d{9}-[0-9a-f]{32}\.pt\..+")
SHARE = 10
"""The backward pass writes down where it is after this many times as long as writing takes."""
ALIGNMENT = 64


class Outputs(NamedTuple):
    """What steps of a loop gave besides their states.

    Attributes:
        begin: the first step.
        losses: their losses.
        aux: the leaves of their aux.
        saved: the states at those times of ``save_at`` that they led to.
        batches, overrides: fingerprints of what the user's functions returned, by time.
    """

    begin: int
    losses: list[Tensor]
    aux: list[list[Any]]
    saved: dict[int, Carry]
    batches: dict[int, Fingerprint]
    overrides: dict[int, Fingerprint]


class Adjoint(NamedTuple):
    """How far a backward pass has come.

    Attributes:
        time: the steps from this one on have been pulled back.
        state: the cotangents of the state at this time.
        hyper: those of hyper, by the steps from this one on.
        reached: the leaves of hyper that these steps depend on.
        later: the state at this time, if it is known.
    """

    time: int
    state: list[Tensor | None]
    hyper: list[Tensor | None]
    reached: set[int]
    later: Carry | None


class _Damaged(Exception):
    """A file whose checksum does not fit, or that is gone."""


class SavedRun(MutableMapping[int, Any]):
    """The states of one loop by time, in a folder; in order of time.

    Args:
        folder: where they are; it is locked until `close`.
        identity: what the loop is, by name; files of any other are refused.
        random: the checksum of the random state before the first step.
        steps: T; the state at this time is not one of those that a backward pass starts from.

    Attributes:
        draws: whether any step so far drew random numbers.

    Raises:
        InvalidInputError: the folder is in use, or holds files of another loop.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str], random: str, steps: int) -> None:
        self.folder = folder
        self.draws = False
        self._steps = steps
        self._identity = dict(identity)
        self._random = random
        self._known: dict[int, Path] = {}
        self._swept: list[Path] = []
        self._adjoint: Path | None = None
        self._key = ""
        self._written_at, self._writing_took = 0.0, 0.0
        self._checked = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(folder)
        except OSError as error:
            raise InvalidInputError(
                f"the folder {folder} cannot be used for the states of a loop: {error}. Name a "
                'folder that can be written, Disk("run1") for example'
            ) from error
        try:
            self._found = self._scan()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others use the folder; the files stay."""
        self._lock.release()

    def clear(self) -> None:
        """Remove the files of this loop, which is done, and let others use the folder."""
        for path in [*self._files(), *self._swept]:
            path.unlink(missing_ok=True)
        self._known, self._swept, self._adjoint = {}, [], None
        self.close()

    def _files(self) -> list[Path]:
        return sorted(p for p in self.folder.iterdir() if NAME.fullmatch(p.name))

    def _scan(self) -> list[tuple[int, int, Path]]:
        """Look at every file: ``(begin, time, path)`` of the states with outputs, by time.

        Those that are damaged are removed.
        """
        found = []
        for path in list(self.folder.iterdir()):
            if UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)
        for path in self._files():
            kind, time, _ = NAME.fullmatch(path.name).groups()  # type: ignore[union-attr]
            try:
                held = self._read(path)
            except _Damaged as error:
                self._lost(path, error)
                continue
            self._refuse_others(path, held)
            if kind == "adjoint":
                if self._adjoint is not None:
                    # A process was killed before it removed the older one, of a later time.
                    path.unlink()
                else:
                    self._adjoint = path
                continue
            if int(time) < self._steps:
                self._known[int(time)] = path
            if held["outputs"] is not None:
                found.append((held["outputs"]["begin"], int(time), path))
        return found

    def _lost(self, path: Path, error: object) -> None:
        path.unlink(missing_ok=True)
        # The backward pass may run in a thread of autograd, which shows no line of the user's.
        warn_user(f"the file {path} is damaged ({error}): what it held is computed again")

    def _read(self, path: Path) -> dict[str, Any]:
        """Return what a file holds.

        Raises:
            _Damaged: it is not what was written.
            InvalidInputError: it is, but not by this class.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _Damaged(str(error)) from error
        if digest_bytes(data) != path.stem.rpartition("-")[2]:
            raise _Damaged("its checksum does not fit")
        try:
            held = torch.load(io.BytesIO(data), weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise _foreign(path, "it is no file of this format") from error
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            raise _foreign(path, "it is no file of this format")
        if held.get("version") != VERSION:
            raise _foreign(
                path,
                f"it has version {held.get('version')} of the format, and this innerloop reads "
                f"version {VERSION}",
            )
        return held

    def _refuse_others(self, path: Path, held: Mapping[str, Any]) -> None:
        theirs, ours = held["identity"], self._identity
        other = [name for name in ours if theirs.get(name) != ours[name]]
        if held["draws"] and held["random"] != self._random:
            other.append("random state")
        if other:
            shown = ", ".join(
                f"{name} ({theirs.get(name)} there, {ours[name]} here)"
                if len(ours.get(name, "")) < 20 and name in ours
                else name
                for name in other
            )
            raise _foreign(path, f"it belongs to another loop. These differ: {shown}")

    # -- writing -----------------------------------------------------------------------------------

    def _write(
        self, kind: str, time: int, contents: Mapping[str, object], lasting: bool = True
    ) -> Path:
        file = io.BytesIO()
        head = {"format": FORMAT, "version": VERSION, "identity": self._identity}
        head |= {"random": self._random, "draws": self.draws}
        try:
            torch.save({**head, **contents}, file)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise _unwritable(str(error)) from error
        if not self._checked:
            file.seek(0)
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if unsafe:
                raise _unwritable(", ".join(sorted(unsafe)))
            self._checked = True
        data = file.getvalue()
        path = self.folder / f"{kind}-{time:09d}-{digest_bytes(data)}.pt"
        try:
            with whole_file(path, lasting=lasting) as target:
                target.write(data)
        except OSError as error:
            raise InnerLoopError(
                f"a state of the loop cannot be written to the folder {self.folder}: {error}. "
                "What was written before is kept: make room there, and the same call goes on from "
                "it"
            ) from error
        return path

    def save(self, time: int, carry: Carry, outputs: Outputs | None) -> None:
        """Write the state at ``time``, with the outputs of the steps before it."""
        more = None
        if outputs is not None:
            more = {
                "begin": outputs.begin,
                "losses": torch.stack(outputs.losses) if outputs.losses else None,
                "aux": outputs.aux,
                "saved": {t: _alone(c) for t, c in outputs.saved.items()},
                "batches": {t: tuple(f) for t, f in outputs.batches.items()},
                "overrides": {t: tuple(f) for t, f in outputs.overrides.items()},
            }
        before = self._known.get(time)
        # What a backward pass keeps on its way can be replayed from older states.
        lasting = outputs is not None
        path = self._write("state", time, {"carry": _alone(carry), "outputs": more}, lasting)
        if time < self._steps:
            self._known[time] = path
        if before is not None and before != path:
            before.unlink(missing_ok=True)

    # -- states by time ----------------------------------------------------------------------------

    def __setitem__(self, time: int, carry: Any) -> None:
        self.save(time, carry, None)

    def __getitem__(self, time: int) -> Any:
        path = self._known[time]
        try:
            held = self._read(path)
        except _Damaged as error:
            del self._known[time]
            self._lost(path, error)
            raise KeyError(time) from error
        return settled(held["carry"])

    def __delitem__(self, time: int) -> None:
        self._swept.append(self._known.pop(time))

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._known))

    def __reversed__(self) -> Iterator[int]:
        return iter(sorted(self._known, reverse=True))

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, time: object) -> bool:
        return time in self._known

    # -- going on ----------------------------------------------------------------------------------

    def resume(self) -> tuple[int, Carry | None, list[Outputs]]:
        """Return the newest state from which the loop can go on.

        Returns:
            ``(time, carry, outputs)``: the outputs of all the steps before it, in order;
            ``(0, None, [])`` if there is none. States of later times are removed.
        """
        chains: dict[int, list[Path]] = {0: []}
        for begin, time, path in sorted(self._found, key=lambda entry: entry[1]):
            if begin in chains:
                chains[time] = [*chains[begin], path]
        for time in sorted(chains, reverse=True):
            try:
                held = [self._read(path) for path in chains[time]]
            except _Damaged as error:  # since it was scanned
                warn_user(f"the files of {self.folder} change while they are read: {error}")
                continue
            if time < self._steps:
                for late in [t for t in self._known if t > time]:
                    self._known.pop(late).unlink(missing_ok=True)
            self.draws = any(one["draws"] for one in held)
            carry = settled(held[-1]["carry"]) if held else None
            return time, carry, [_outputs(one) for one in held]
        return 0, None, []

    def adjoint(self, key: str) -> Adjoint | None:
        """Return how far an earlier backward pass with these cotangents came; None: there is none.

        Args:
            key: a checksum of the cotangents, and of what is wanted.
        """
        self._key = key
        path = self._adjoint
        if path is None:
            return None
        try:
            held = self._read(path)
        except _Damaged as error:
            self._lost(path, error)
            held = {"key": None}
        if held["key"] != key:
            path.unlink(missing_ok=True)
            self._adjoint = None
            return None
        found = Adjoint(*held["adjoint"])
        state, hyper, later = settled((found.state, found.hyper, found.later))
        return Adjoint(found.time, state, hyper, set(found.reached), later)

    @property
    def due(self) -> bool:
        """True if the backward pass has come so far that it should be written down."""
        return clock.perf_counter() - self._written_at > SHARE * self._writing_took

    def note(self, adjoint: Adjoint) -> None:
        """Write down how far the backward pass has come; states that it has used are removed."""
        begin = clock.perf_counter()
        before = self._adjoint
        state, hyper, later = _alone((adjoint.state, adjoint.hyper, adjoint.later))
        plain = (adjoint.time, state, hyper, sorted(adjoint.reached), later)
        contents = {"key": self._key, "adjoint": plain}
        self._adjoint = self._write("adjoint", adjoint.time, contents)
        if before is not None and before != self._adjoint:
            before.unlink(missing_ok=True)
        for path in self._swept:
            path.unlink(missing_ok=True)
        self._swept = []
        self._written_at = clock.perf_counter()
        self._writing_took = self._written_at - begin


def settled(value: Any) -> Any:
    """Return ``value`` with a copy of each tensor that does not lie in memory as a loaded one does.

    Kernels may round differently where data are aligned differently, and a loop that goes on from a
    file must give the bits of one that was not interrupted.
    """
    return tree.map_tensors(_settled, value)


def _settled(x: Tensor) -> Tensor:
    if x.layout is not torch.strided or (x.data_ptr() % ALIGNMENT == 0 and x.is_contiguous()):
        return x
    return x.clone()


def _alone(value: Any) -> Any:
    """Return ``value`` without the rest of the storages that its tensors are views of."""

    def alone(x: Tensor) -> Tensor:
        x = x.detach()
        whole = x.layout is not torch.strided or (
            x.untyped_storage().nbytes() == x.numel() * x.element_size()
        )
        return x if whole else x.clone()

    return tree.map_tensors(alone, value)


def _outputs(held: Mapping[str, Any]) -> Outputs:
    found = held["outputs"]
    losses = [] if found["losses"] is None else list(found["losses"].unbind())
    batches, overrides = (
        {t: Fingerprint(*given) for t, given in found[name].items()}
        for name in ("batches", "overrides")
    )
    return Outputs(found["begin"], losses, found["aux"], found["saved"], batches, overrides)


def plain_leaves(aux: object) -> list[Any]:
    """Return the leaves of ``aux``, numbers as Python's own."""
    return [
        type_(leaf) if (type_ := _number(leaf)) is not None else leaf for leaf in tree.leaves(aux)
    ]


def _number(leaf: object) -> type | None:
    for kind in (bool, int, float):
        if isinstance(leaf, kind):
            return kind
    return None


def fingerprints(loop: Loop, begin: int, end: int) -> tuple[dict[int, Fingerprint], ...]:
    """Return the fingerprints of batches and of overrides at the steps ``begin`` to ``end - 1``."""
    times = range(loop.time(begin), loop.time(end))
    given = loop.problem.optimizer_hyper
    overrides = given.seen if isinstance(given, Repeatable) else {}
    kept = loop.batches.fingerprints()
    return tuple({t: found[t] for t in times if t in found} for found in (kept, overrides))


def remember(loop: Loop, outputs: Outputs) -> None:
    """Let the functions of ``loop`` be compared with what they returned in an earlier process."""
    given = loop.problem.optimizer_hyper
    if isinstance(given, Repeatable):
        given.seen.update(outputs.overrides)
    loop.batches.fingerprints().update(outputs.batches)


def identity_of(loop: Loop, settings: Mapping[str, object]) -> dict[str, str]:
    """Return what tells a loop from others, by name.

    Args:
        loop: the loop, on constants.
        settings: of the strategy.
    """
    problem, start, batches = loop.problem, loop.start, loop.batches
    overrides = problem.optimizer_hyper
    if isinstance(overrides, Repeatable):
        overrides = overrides.function
    return {
        "version of PyTorch": torch.__version__.partition("+")[0],
        "steps": str(batches.steps),
        "save_at": str(sorted(loop.save_at)),
        "time of the start": str(start.time),
        **{name: str(value) for name, value in settings.items()},
        "params": digest(start.params),
        "the optimizer's state": digest(start.optimizer_state),
        "buffers": digest(start.buffers),
        "hyper": digest(loop.hyper),
        "batches": digest(batches.source()),
        "loss": digest(problem.loss),
        "targets": digest(problem.targets),
        "optimizer": digest(problem.optimizer),
        "optimizer_hyper": digest(overrides),
        "module": digest(_module_of(problem, start)),
    }


def _module_of(problem: Problem, start: Carry) -> object:
    """Return what a module gives to the loop besides the parameters and buffers of the state."""
    view = problem.view
    if view is None:
        return None
    fixed = [
        (name, x)
        for name, x in [*view.source.items(), *view.source_buffers.items()]
        if name not in start.params and name not in start.buffers
    ]
    parts = [
        (
            type(part).__qualname__,
            own_code(part, "forward"),
            {n: v for n, v in vars(part).items() if isinstance(v, (int, float, str, tuple))},
        )
        for part in view.modules
    ]
    return fixed, parts, view.training


def random_of(start: Carry) -> str:
    """Return the checksum of the random state before the first step."""
    return digest(start.random_state or RandomState.now())


def _foreign(path: Path, why: str) -> InvalidInputError:
    return InvalidInputError(
        f"the file {path} cannot be used for this loop: {why}. Make the same call as the one that "
        "wrote it, name another folder in Disk, or remove this one if that loop is not needed any "
        "more"
    )


def _unwritable(what: str) -> InvalidInputError:
    return InvalidInputError(
        "the state of this loop holds objects that are not loaded from files, since a file that "
        f'names classes can run code ({what}): write offload="disk", which does not go on from its '
        "files, or register the class with torch.serialization.add_safe_globals"
    )
