"""A folder that one writer at a time may use."""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from pathlib import Path

from innerloop.errors import InvalidInputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NAME = "lock"

_held: set[Path] = set()


class FolderLock:
    """A lock on a folder, held until `release`, or until the process ends, in whatever way.

    The lock is the operating system's, on the file ``lock`` in the folder, which stays there: what
    a process that was killed has left is taken over by the next one. Child processes do not inherit
    it.

    Args:
        folder: an existing folder.

    Raises:
        InvalidInputError: another loop, of this process or another one, uses the folder.
    """

    def __init__(self, folder: Path) -> None:
        path = folder.resolve() / NAME
        if path in _held:
            # The system's lock does not tell apart two users within one process.
            raise _in_use(folder, "this process")
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
        except OSError as error:
            found = os.read(handle, 20).decode(errors="replace").strip()
            os.close(handle)
            raise _in_use(folder, f"process {found}" if found else "another process") from error
        _held.add(path)
        self.release = weakref.finalize(self, _release, handle, path, os.getpid())
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        # Unlike flock, not shared with a forked child, which may outlive this process.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _release(handle: int, path: Path, owner: int) -> None:
    if os.getpid() == owner:
        _held.discard(path)
    with contextlib.suppress(OSError):
        os.close(handle)


def _in_use(folder: Path, who: str) -> InvalidInputError:
    return InvalidInputError(
        f"the folder {folder} is in use by a loop of {who}: name another folder, "
        f'Disk("{folder}-2"), or wait until that loop and its backward pass are done'
    )
