"""The findings of the audit, as a table."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Iterable, Sequence

import torch

from innerloop._utils import text_table
from innerloop.doctor._probe import DERIVATIVES, Finding

SIGNS = {"right": "ok", "missing": "-", "wrong": "WRONG", "not finite": "nan", "refused": "-"}
HEADINGS = ("operation", "innerloop", *DERIVATIVES)
DIRECTIONS = (
    "First: reverse mode. Second: reverse over reverse. Forward: forward mode. Mixed: forward over "
    "reverse. Func: torch.func.grad of torch.func.grad. Back: reverse over forward mode. Third: "
    "reverse mode three times, for loops inside loops."
)
VERDICTS = (
    "ok: right against finite differences. -: raises. WRONG: wrong without an error. nan: not "
    "finite at that point."
)
ACTIONS = (
    "innerloop: what happens inside its loops. Replaced: by an operation that has what is missing. "
    "Raises: an error names the operation."
)


def to_text(findings: Sequence[Finding]) -> str:
    """Return a table for the terminal: what lacks something, and how many cases lack nothing."""
    rows = text_table.table(_rows(findings), header=HEADINGS, rule=True)
    legend = "\n".join((DIRECTIONS, VERDICTS, ACTIONS))
    return "\n\n".join((_title(findings), rows, legend, _sum(findings)))


def to_markdown(findings: Sequence[Finding]) -> str:
    """Return the table for a page, in Markdown."""
    rows = text_table.table(_rows(findings), header=HEADINGS, markdown=True)
    prose = (DIRECTIONS, VERDICTS, ACTIONS, _sum(findings))
    return "\n\n".join((_title(findings), rows, *map(_filled, prose))) + "\n"


def _filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, 99, break_long_words=False, break_on_hyphens=False)


def _title(findings: Sequence[Finding]) -> str:
    return (
        f"PyTorch {torch.__version__}, {platform.machine()}: {len(findings)} cases of "
        f"{len(_named(findings))} operations"
    )


def _sum(findings: Sequence[Finding]) -> str:
    silent = sum("wrong" in f.torch.values() for f in findings)
    left = sum(f.silent for f in findings)
    fine = sum(not f.action for f in findings)
    return (
        f"{fine} cases lack nothing. {silent} are wrong in PyTorch without an error; of those, "
        f"innerloop lets {left} pass. "
        f"{sum(f.supported for f in findings)} of {sum(f.case.smooth for f in findings)} smooth "
        "cases can be trained through and differentiated in reverse mode."
    )


def _named(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Group findings by operation: the name of the case without its brackets."""
    named: dict[str, list[Finding]] = {}
    for finding in findings:
        named.setdefault(finding.case.name.partition("(")[0].strip(), []).append(finding)
    return named


def _rows(findings: Sequence[Finding]) -> list[list[str]]:
    """Make one row for all cases of an operation to which the same happens."""
    rows = []
    for name, group in _named(f for f in findings if f.action).items():
        alike: dict[tuple[str, ...], list[Finding]] = {}
        for finding in group:
            signs = [SIGNS[finding.torch[d]] if d in finding.torch else "" for d in DERIVATIVES]
            alike.setdefault((finding.action, *signs), []).append(finding)
        for cells, same in alike.items():
            title = same[0].case.name if len(same) == 1 else f"{name} ({len(same)} cases)"
            rows.append([title, *cells])
    return rows
