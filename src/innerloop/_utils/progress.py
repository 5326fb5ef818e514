"""A progress bar for long loops."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from innerloop.errors import InvalidInputError, MissingExtraError

Report = Callable[[str, int, int | None], Any]
"""``report(phase, done, total)``: phase is ``"forward"`` or ``"backward"``, total is None while the length is unknown."""


def silent(phase: str, done: int, total: int | None) -> None:
    """No progress bar."""


def reporter(progress: bool | Report) -> Report:
    """What a strategy calls after each step.

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
    """One tqdm bar per phase; a bar closes when its phase ends, is left by an exception, or starts anew."""

    def __init__(self) -> None:
        try:
            self._tqdm: Any = importlib.import_module("tqdm").tqdm
        except ImportError as error:
            raise MissingExtraError.of("tqdm", "progress", "progress=True") from error
        self._bar: Any = None
        self._phase = ""

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        if self._bar is None or phase != self._phase or done <= self._bar.n:
            self.close()
            self._bar, self._phase = (
                self._tqdm(total=total, desc=phase, unit="step", leave=True),
                phase,
            )
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
