"""The states that a backward sweep starts from: on their device, in main memory, or on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from innerloop._utils import tree
from innerloop._utils.sharded import is_sharded
from innerloop.errors import InnerLoopError

PLACES = (None, "cpu", "disk")


class Snapshots(MutableMapping[int, Any]):
    """Pytrees of tensors by time.

    Args:
        place: None keeps the tensors where they are (large ones by reference), ``"cpu"`` copies
            those of another device to pinned main memory while that device goes on computing,
            ``"disk"`` writes them to a temporary file each while the loop goes on; the next
            access waits until that is done.
    """

    def __init__(self, place: str | None) -> None:
        self.place = place
        self._held: dict[int, Any] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="innerloop-")) if place == "disk" else None
        self._writer: ThreadPoolExecutor | None = None
        self._writing: tuple[Future[None], Path] | None = None
        if self._folder is not None:
            self._writer = ThreadPoolExecutor(1, "innerloop-snapshots")
            weakref.finalize(self, _clean_up, self._writer, self._folder, os.getpid())
        self._owner = os.getpid()
        self._written = 0

    def __setitem__(self, t: int, value: object) -> None:
        if self.place is None:
            self._held[t] = _compact(value)
            return
        tensors, template = tree.split(value)
        devices = [x.device for x in tensors]
        if self.place == "cpu":
            self._held[t] = template, devices, [_to_host(x) for x in tensors]
            return
        assert self._folder is not None
        assert self._writer is not None
        self._check_process()
        self._wait()
        self._written += 1
        path = self._folder / f"{self._written}.pt"
        # Copies: the loop may write in place, and a view would write the whole of its storage.
        copies = [x.detach().clone() for x in tensors]
        self._writing = self._writer.submit(torch.save, copies, path), path
        self.pop(t, None)
        self._held[t] = template, devices, path

    def _wait(self) -> None:
        """Wait for the file that is being written, and raise if that failed."""
        if self._writing is None:
            return
        self._check_process()
        (future, path), self._writing = self._writing, None
        try:
            future.result()
        except Exception as error:  # what torch.save raises depends on the tensor
            raise InnerLoopError(
                f"a state of the loop cannot be written to the disk, to the file {path} "
                f"({type(error).__name__}: {error}). Free some space there, let TMPDIR name "
                "another folder, or keep the states in memory (tensors of a class that cannot be "
                'pickled, too): offload="cpu" or offload=None'
            ) from error

    def _check_process(self) -> None:
        """Raise in a forked process: the thread that writes is not in it, nor is it the owner."""
        if os.getpid() != self._owner:
            raise InnerLoopError(
                f"the loop keeps its states on the disk for process {self._owner}, and goes on in "
                f"process {os.getpid()}, which was forked from it (os.fork) and lacks the thread "
                "that writes them: run the whole loop and its backward pass in one process, or "
                'keep the states in memory, offload="cpu" or offload=None'
            )

    def __getitem__(self, t: int) -> Any:
        if self.place is None:
            return self._held[t]
        template, devices, kept = self._held[t]
        self._wait()
        tensors = _read(kept) if self.place == "disk" else kept
        return tree.join(
            template, [x.to(d, non_blocking=True) for x, d in zip(tensors, devices, strict=True)]
        )

    def __delitem__(self, t: int) -> None:
        entry = self._held.pop(t)
        if self.place == "disk" and os.getpid() == self._owner:
            if self._writing is not None and self._writing[1] == entry[2]:
                self._wait()
            entry[2].unlink(missing_ok=True)

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def __reversed__(self) -> Iterator[int]:
        return reversed(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _clean_up(writer: ThreadPoolExecutor, folder: Path, owner: int) -> None:
    """Remove the files, once none is being written; not at the end of a forked process."""
    if os.getpid() != owner:
        return
    writer.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> list[Tensor]:
    """Return the tensors in a file that `Snapshots` has written."""
    try:
        found: list[Tensor] = torch.load(path, weights_only=True)
    except Exception as error:  # what torch.load raises depends on the damage
        what = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
        raise InnerLoopError(
            f"the file {path}, in which a state of the loop waited on the disk for the backward "
            f"pass, {what}: a full disk and a cleaner of temporary files do that. Let TMPDIR name "
            'a folder with space that nothing cleans, or keep the states in memory: offload="cpu" '
            f"or offload=None. The error was {type(error).__name__}: {error}"
        ) from error
    return found


SMALL = 1_048_576
"""Bytes; smaller tensors of a kept state share one block."""
_ALIGNMENT = 64


def _compact(value: object) -> object:
    """Return ``value`` with its small tensors copied side by side into one block.

    Kept one by one among the temporary tensors of the steps in between they fragment the heap: on
    M2 with every fourth state kept, twice the memory. Each begins at a multiple of 64 bytes,
    because kernels may round differently at other alignments.
    """
    tensors, template = tree.split(value)
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, x in enumerate(tensors):
        if (
            x.layout is torch.strided
            and x.is_floating_point()
            and 0 < x.numel() * x.element_size() <= SMALL
            and not is_sharded(x)
        ):
            groups.setdefault((x.dtype, x.device), []).append(i)
    for (dtype, device), members in groups.items():
        step = _ALIGNMENT // dtype.itemsize
        sizes = [-(-tensors[i].numel() // step) * step for i in members]
        pieces = torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)
        for i, piece in zip(members, pieces, strict=True):
            x = tensors[i]
            # A gradient may come with a graph, which is not kept: a step is recorded again.
            with torch.no_grad():
                tensors[i] = piece[: x.numel()].view(x.shape).copy_(x)
    return tree.join(template, tensors)


def _to_host(x: Tensor) -> Tensor:
    """Copy ``x`` to main memory, without waiting where that is possible."""
    if x.device.type == "cpu":
        return x
    # Pinned memory is for dense tensors.
    if x.layout is not torch.strided:
        return x.cpu()
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
    return host.copy_(x, non_blocking=True)
