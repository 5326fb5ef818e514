"""What the trainers share: a folder of files, a bar, a table and a plot."""

from __future__ import annotations

import csv
import importlib
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from innerloop import OuterState
from innerloop.errors import InvalidInputError, MissingExtraError

CHECKPOINT, TABLE, PICTURE = "checkpoint.pt", "progress.csv", "curve.png"
History = dict[str, list[float]]
"""Diagnostics by name, one number for each iteration."""


class Bar(Protocol):
    """A progress bar: that of tqdm, or none."""

    def update(self, n: int) -> object:
        """Add ``n`` steps."""

    def set_postfix_str(self, s: str, refresh: bool = True) -> object:
        """Show a text behind the bar."""

    def close(self) -> object:
        """Leave the bar as it stands."""


class _NoBar:
    """Shows nothing."""

    def update(self, n: int) -> None:
        """Do nothing."""

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@contextmanager
def bar(total: int, done: int, unit: str, show: bool) -> Iterator[Bar]:
    """Return a bar that is closed at the end; none where standard error is no terminal.

    Raises:
        MissingExtraError: a bar would be shown, but tqdm is not installed.
    """
    shown: Any = _NoBar()
    if show and sys.stderr.isatty():
        try:
            tqdm = importlib.import_module("tqdm").tqdm
        except ImportError as error:
            raise MissingExtraError.of("tqdm", "rl", "progress=True") from error
        shown = tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True)
    try:
        yield shown
    finally:
        shown.close()


class Settings:
    """A config as a part of a checkpoint: loading another one is an error."""

    def __init__(self, config: Mapping[str, Any], free: Sequence[str] = ()) -> None:
        self.config = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
        self.free = set(free)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return dict(self.config)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with the settings of a file.

        Raises:
            InvalidInputError: they differ in more than how long to train.
        """
        names = sorted({*self.config, *state} - self.free)
        differing = [n for n in names if self.config.get(n) != state.get(n)]
        if differing:
            listed = ", ".join(
                f"{n}={state.get(n)!r} not {self.config.get(n)!r}" for n in differing
            )
            raise InvalidInputError(
                f"the checkpoint belongs to a run with other settings ({listed}): resume with "
                "those, or write to another folder"
            )


def start(state: OuterState, folder: Path | None, resume: bool) -> None:
    """Load the checkpoint of a run that is resumed; refuse to overwrite one that is not.

    Raises:
        InvalidInputError: there is no folder to resume from, or a run in it that would be lost.
    """
    if folder is None:
        if resume:
            raise InvalidInputError("resume=True needs the folder of the run: write out=...")
        return
    found = (folder / CHECKPOINT).exists()
    if found and not resume:
        raise InvalidInputError(
            f"{folder} holds a run already: write resume=True (--resume) to go on with it, or "
            "choose another folder"
        )
    if found:
        state.load(folder / CHECKPOINT)


def append(history: History, row: Mapping[str, float]) -> None:
    """Add a row to the columns."""
    for name, value in row.items():
        history.setdefault(name, []).append(value)


def write_table(history: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write the columns as a CSV file, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(history)
    writer.writerows(zip(*history.values(), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text.getvalue())
    temporary.replace(path)


def write_curve(
    history: Mapping[str, Sequence[float]], x: str, lines: Sequence[str], path: Path
) -> None:
    """Draw some columns over another one.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "rl", "a picture of the curve") from error
    figure = figure_module.Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in lines:
        axes.plot(history[x], history[name], label=name.replace("_", " "))
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel("return of an episode")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
