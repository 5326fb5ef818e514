"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(
    path: Path, check: Callable[[Path], None] | None = None, *, lasting: bool = True
) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends.

    It is written beside it, flushed to the disk and then renamed: a process that is killed, a disk
    that is full or a loss of power leaves what was there before.

    Args:
        path: the file; its folder exists.
        check: looks at the written file before it takes its place, and may raise.
        lasting: False leaves the flushing to the system: a loss of power may then damage the file.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if lasting:
        _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make the new name of a file last; some systems cannot open a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
