"""A block that changes something of the whole process, for as long as any thread is in it."""

from __future__ import annotations

import abc
import threading


class SharedBlock(abc.ABC):
    """A block in which several threads may be at the same time, and one several times.

    The first one that enters makes the change, and the last one that leaves takes it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    @abc.abstractmethod
    def begin(self) -> None:
        """Make the change."""

    @abc.abstractmethod
    def end(self) -> None:
        """Take it back."""

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self.begin()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self.end()
