"""Tables of text, for terminals and for Markdown pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(
    rows: Iterable[Sequence[str]],
    *,
    header: Sequence[str] | None = None,
    align: str = "",
    rule: bool = False,
    markdown: bool = False,
) -> str:
    """Lay out rows of cells in columns.

    Args:
        rows: the cells of each row; all rows have the same number of cells.
        header: the cells of a first row.
        align: one letter per column, ``"<"`` (the default) for left and ``">"`` for right.
        rule: draw a line below the header.
        markdown: write a Markdown table, whose columns are separated by bars.

    Returns:
        The lines of the table, without a newline at the end.

    Example:
        >>> print(table([["a", "1"], ["bc", "23"]], header=["name", "n"], align="<>", rule=True))
        name   n
        ----  --
        a      1
        bc    23
    """
    body = [list(row) for row in rows]
    everything = ([list(header)] if header is not None else []) + body
    if not everything:
        return ""
    columns = len(everything[0])
    align = align.ljust(columns, "<")
    widths = [max(len(row[i]) for row in everything) for i in range(columns)]

    def line(row: Sequence[str]) -> str:
        cells = [
            f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)
        ]
        return f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()

    lines = [line(row) for row in everything]
    if header is not None and markdown:
        dashes = [
            "-" * (w - 1) + ":" if a == ">" else "-" * w for a, w in zip(align, widths, strict=True)
        ]
        lines.insert(1, f"|{'|'.join(f' {d} ' for d in dashes)}|")
    elif header is not None and rule:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
