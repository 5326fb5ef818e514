"""Compare figures with those that `docs/benchmarks.md` records, and draw them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.figures import Reading
from benchmarks.results import Result
from benchmarks.spread import Spread
from innerloop._utils import text_table

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
SLOWER = 1.1
"""Ratios move by 5 to 10 % from run to run: only more than that is called slower."""
_ROW = re.compile(r"^\| (\S+) +\| (.+?) +\| ≤ (\S+) +\| (\S+) +\| (?:reached|missed) +\|$", re.M)


def recorded(page: str) -> dict[tuple[str, str], float]:
    """Return the figures of a page, by their goal and title."""
    return {(goal, title): float(value) for goal, title, _, value in _ROW.findall(page)}


def verdict(now: float, before: float) -> str:
    """Say how a figure stands beside the recorded one; smaller is better for all of them."""
    if now > SLOWER * before:
        return "REGRESSED"
    return "better" if now < before / SLOWER else "as recorded"


def regressions(
    readings: Sequence[Reading], known: Mapping[tuple[str, str], float]
) -> tuple[str, list[Reading]]:
    """Return a table of what was measured beside what is recorded, and what regressed."""
    rows, worse = [], []
    for reading in readings:
        before = known.get((reading.name, reading.title))
        if before is None or reading.value is None:
            continue
        found = verdict(reading.value, before)
        rows.append((reading.name, reading.title, f"{before:.3g}", f"{reading.value:.3g}", found))
        if found == "REGRESSED":
            worse.append(reading)
    if not rows:
        return "No figure that is recorded was measured.", worse
    head = ("goal", "figure", "recorded", "now", "")
    return text_table.table(rows, header=head), worse


def draw(results: Sequence[Result], file: Path) -> None:
    """Draw the time of every contender over that of the hand-written loop, one panel a workload."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    height = 1 + 0.3 * sum(len(result.rows) for result in results)
    figure, panels = plt.subplots(
        len(results), 1, figsize=(7, height), squeeze=False, layout="constrained"
    )
    for result, axes in zip(results, panels[:, 0], strict=True):
        base = result.row("hand-written loop")
        rows = [row for row in result.rows if row.seconds]
        if base is None or not base.seconds:
            continue
        spreads = [Spread.of_ratios(row.seconds, base.seconds) for row in rows]
        middle = [s.median for s in spreads]
        error = [
            [s.median - s.quarter for s in spreads],
            [s.three_quarters - s.median for s in spreads],
        ]
        colours = ["#2166ac" if row.ours else "#999999" for row in rows]
        names = [f"innerloop: {row.label}" if row.ours else row.label for row in rows]
        axes.barh(names, middle, xerr=error, color=colours)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_title(f"{result.workload}: {result.title}", loc="left", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("time over the hand-written loop (median, quartiles)", fontsize=8)
    figure.savefig(file, dpi=150)
    plt.close(figure)
