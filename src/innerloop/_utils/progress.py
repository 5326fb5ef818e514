"""A progress bar for long loops."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from innerloop.errors import InvalidInputError, MissingExtraError

Report = Callable[[str, int, int | None], object]
"""``report(phase, done, total)``: phase is ``"forward"`` or ``"backward"``, total may be unknown."""


def silent(phase: str, done: int, total: int | None) -> None:
    """Report nothing."""


def reporter(progress: bool | Report) -> Report:
    """Return what a strategy calls after each step.

    Raises:
        MissingExtraError: True, but tqdm is not installed.
    """
    if progress is True:
        return Bars()
    if progress is False:
        return silent
    if callable(progress):
        return progress
    raise InvalidInputError(
        f"progress={progress!r}: write True for a bar, or a function progress(phase, done, total)"
    )


class Bars:
    """One tqdm bar per phase, closed when the phase ends, is left by an exception or starts anew.

    Nothing is shown where standard error is not a terminal: a log would get one line per update.
    """

    def __init__(self) -> None:
        try:
            self._tqdm: Any = importlib.import_module("tqdm").tqdm
        except ImportError as error:
            raise MissingExtraError.of("tqdm", "progress", "progress=True") from error
        self._bar: Any = None
        self._phase = ""

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None or phase != self._phase or done <= self._bar.n:
            self.close()
            self._bar = self._tqdm(total=total, desc=phase, unit="step", leave=True)
            self._phase = phase
        self._bar.update(done - self._bar.n)
        if total is not None and done >= total:
            self.close()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def closing(report: Report) -> Iterator[None]:
    """Close the bar of a phase that was interrupted, or whose length was not known."""
    try:
        yield
    finally:
        if isinstance(report, Bars):
            report.close()
