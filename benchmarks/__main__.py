"""`python -m benchmarks`: check, time and weigh every contender on the workloads, and say which
figures are reached."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import (
    attention,
    figures,
    forecast,
    implicit,
    imports,
    long,
    machine,
    products,
    recorded,
    report,
    results,
    timing,
    updates,
)
from benchmarks.workloads import WORKLOADS

SECTIONS = (
    *WORKLOADS,
    "long",
    "forecast",
    "products",
    "updates",
    "attention",
    "implicit",
    "import",
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="M1,M2,import", help="a part of: " + ", ".join(SECTIONS))
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="rounds per workload (default: its own)"
    )
    parser.add_argument(
        "--clock", choices=list(timing.CLOCKS), default="wall", help="cpu: for a machine in use"
    )
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory too"
    )
    parser.add_argument(
        "--out",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help=".md: update its tables; .json: every measurement",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        default=Path("benchmarks.png") if importlib.util.find_spec("matplotlib") else None,
        help="the times as bars (default: benchmarks.png, where matplotlib is installed)",
    )
    arguments = parser.parse_args(argv)
    arguments.only = arguments.only.split(",") if arguments.only else list(SECTIONS)
    unknown = sorted(set(arguments.only) - set(SECTIONS))
    if unknown:
        parser.error(f"--only {','.join(unknown)}: choose from {', '.join(SECTIONS)}")
    if arguments.repeats is not None and arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    for path in arguments.out:
        if path.suffix not in (".md", ".json"):
            parser.error(f"--out {path}: the name must end in .md or .json")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if a contender that is installed failed or was wrong."""
    arguments = parse(argv)
    # Before --out rewrites them.
    known = recorded.recorded(recorded.PAGE.read_text()) if recorded.PAGE.exists() else {}
    torch.set_num_threads(1)
    measured = []
    sections: dict[str, str] = {}
    readings: list[figures.Reading] = []
    long_times: long.LongTimes | None = None
    for name in arguments.only:
        if name in WORKLOADS:
            result = results.measure(
                WORKLOADS[name], arguments.repeats, arguments.memory, arguments.clock
            )
            measured.append(result)
            reached = figures.read(result)
            section = report.workload_section(result)
        elif name == "long":
            long_times = long.measure(arguments.repeats)
            reached = figures.read_long(long_times)
            section = report.long_section(long_times, machine.describe())
        elif name == "forecast":
            forecasts = forecast.measure()
            reached = figures.read_forecasts(forecasts)
            section = report.forecast_section(forecasts, machine.describe())
        elif name == "attention":
            steps = attention.measure()
            reached = figures.read_attention(steps)
            section = report.attention_section(steps, machine.describe())
        elif name == "products":
            reached = []
            section = report.products_section(products.measure(), machine.describe())
        elif name == "implicit":
            reached = []
            found_roots = implicit.measure(arguments.repeats, arguments.clock)
            section = report.implicit_section(found_roots, machine.describe())
        elif name == "updates":
            found = updates.measure(arguments.repeats, arguments.clock)
            reached = figures.read_updates(found)
            section = report.updates_section(found, machine.describe())
        else:
            times = imports.measure()
            reached = figures.read_import(times)
            section = report.import_section(times, machine.describe())
        sections[name] = f"{section}\n\n{report.figures_table(reached)}" if reached else section
        readings += reached
        print(sections[name], end="\n\n", flush=True)
    if len(sections) > 1:
        print(report.figures_table(readings))
    beside, worse = recorded.regressions(readings, known)
    print(f"Beside {recorded.PAGE.name}:\n{beside}")
    if worse:
        print(f"{len(worse)} figures regressed by more than 10 %.")
    if measured and arguments.picture is not None:
        recorded.draw(measured, arguments.picture)
        print(f"Picture: {arguments.picture}")
    for path in arguments.out:
        if path.suffix == ".json":
            path.write_text(report.as_json(measured, readings, long_times), encoding="utf-8")
        else:
            report.update(path, sections)
    failed = [
        f"{result.workload}: {row.name}: {row.problem}"
        for result in measured
        for row in result.failed
    ]
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
