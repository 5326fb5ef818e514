"""What the audit found, as a table."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence

import torch

from innerloop.doctor._probe import DERIVATIVES, Finding

SIGNS = {"right": "ok", "missing": "-", "wrong": "WRONG", "not finite": "nan", "refused": "-"}
HEADINGS = ("operation", "innerloop", *DERIVATIVES)
LEGEND = (
    "First: reverse mode. Second: reverse over reverse. Forward: forward mode. Mixed: forward "
    "over reverse. "
    "Func: torch.func.grad of torch.func.grad. Back: reverse over forward mode. "
    "Third: reverse mode thrice, for loops inside of loops.\n"
    "ok: right against finite differences. -: raises. WRONG: wrong without an error. nan: not "
    "finite at that point.\n"
    "innerloop: what happens inside of its loops. Replaced: by a form that has what is missing. "
    "Raises: an error names the operation."
)


def to_text(findings: Sequence[Finding]) -> str:
    """A table for the terminal: what lacks something, and how many lack nothing."""
    rows = _rows(findings)
    widths = [max(len(row[i]) for row in [HEADINGS, *rows]) for i in range(len(HEADINGS))]
    line = lambda row: "  ".join(  # noqa: E731
        cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    return "\n".join(
        [
            _title(findings),
            "",
            line(HEADINGS),
            line(["-" * w for w in widths]),
            *map(line, rows),
            "",
            LEGEND,
            "",
            _sum(findings),
        ]
    )


def to_markdown(findings: Sequence[Finding]) -> str:
    """The same for a page."""
    rows = [HEADINGS, ["---"] * len(HEADINGS), *_rows(findings)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{_title(findings)}\n\n{table}\n\n{LEGEND}\n\n{_sum(findings)}\n"


def _title(findings: Sequence[Finding]) -> str:
    return f"PyTorch {torch.__version__}, {platform.machine()}: {len(findings)} cases of {len(_named(findings))} operations"


def _sum(findings: Sequence[Finding]) -> str:
    silent = sum("wrong" in f.torch.values() for f in findings)
    left = sum(f.silent for f in findings)
    fine = sum(not f.action for f in findings)
    return (
        f"{fine} cases lack nothing. {silent} are wrong in PyTorch without an error; of those, "
        f"innerloop lets {left} pass. "
        f"{sum(f.supported for f in findings)} of {sum(f.case.smooth for f in findings)} smooth "
        "cases can be trained through and "
        "differentiated in reverse mode."
    )


def _named(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """By operation, without what stands in brackets behind it."""
    named: dict[str, list[Finding]] = {}
    for finding in findings:
        named.setdefault(finding.case.name.partition("(")[0].strip(), []).append(finding)
    return named


def _rows(findings: Sequence[Finding]) -> list[list[str]]:
    """One row for the cases of an operation to which the same happens."""
    rows = []
    for name, group in _named(f for f in findings if f.action).items():
        alike: dict[tuple[str, ...], list[Finding]] = {}
        for finding in group:
            signs = [SIGNS[finding.torch[d]] if d in finding.torch else "" for d in DERIVATIVES]
            alike.setdefault((finding.action, *signs), []).append(finding)
        for cells, same in alike.items():
            forms = same[0].case.name if len(same) == 1 else f"{name} ({len(same)} cases)"
            rows.append([forms, *cells])
    return rows
