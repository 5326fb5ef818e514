"""The walk-through as plain text, at most 100 columns wide."""

from __future__ import annotations

from innerloop.walkthrough._table import (
    AUTOGRAD_TOLERANCE,
    FINITE_TOLERANCE,
    Block,
    Row,
    Walkthrough,
)

WIDTH = 100
_BAR = 18


def to_text(walkthrough: Walkthrough) -> str:
    """Write the header, one table per block, and the verdict."""
    parts = [
        _header(walkthrough),
        *(_block(block) for block in walkthrough.blocks),
        verdict_of(walkthrough),
    ]
    return "\n\n".join(parts)


def _header(walkthrough: Walkthrough) -> str:
    s = walkthrough.system
    return "\n".join(
        (
            "innerloop walkthrough",
            "The derivative of parameters with respect to their earlier version, computed three "
            "times.",
            "",
            "    model   ŷ = (a² + b²) x          loss    L = ½ (ŷ − y)²",
            f"    start   a₀ = {s.start[0]:g}, b₀ = {s.start[1]:g}"
            f"           target  y = ({s.true[0]:g}² + {s.true[1]:g}²) x     x = {s.x:g}, y = "
            f"{s.y:g}",
            f"    inner and outer steps: SGD with learning rate {s.rate:g}",
            "",
            "    closed form    formulas derived by hand, in plain floats",
            "    autograd       innerloop.track and innerloop.inspect, on a torch.nn.Module and "
            "torch.optim.SGD",
            "    finite diff.   a plain torch.optim loop run again from nudged starts, without "
            "innerloop",
        )
    )


def _block(block: Block) -> str:
    lines = [block.title, "─" * WIDTH, block.sentence, "", _titles(block)]
    largest = max(abs(row.closed) for row in block.rows)
    lines += [_row(row, largest if block.bars else 0.0) for row in block.rows]
    if block.note:
        lines += ["", "  " + block.note]
    return "\n".join(lines)


def _titles(block: Block) -> str:
    head = f"  {'':<24}{'closed form':>13}  {'autograd':>15}  {'finite diff.':>15}"
    return f"{head}      size" if block.bars else f"{head}   off by autograd, finite"


def _row(row: Row, largest: float) -> str:
    numbers = "  ".join(_number(value) for value in (row.closed, row.autograd, row.finite))
    errors = f"{_error(row.autograd_error)}   {_error(row.finite_error)}"
    if not row.agrees:
        tail = f"✗  {errors}"
    elif largest:
        tail = f"✓  {'█' * round(_BAR * abs(row.closed) / largest) or '·'}"
    else:
        tail = f"✓  {errors}"
    return f"  {row.name:<24}{numbers}   {tail}".rstrip()


def _number(value: float) -> str:
    """Write ten decimals, the points below each other, without the zeros at the end."""
    text = f"{value:.10f}"
    digits = text.rstrip("0").rstrip(".") if "." in text else text
    return ("0" if digits == "-0" else digits).ljust(len(text)).rjust(15)


def _error(value: float) -> str:
    return f"{value:.0e}" if value else "0    "


def verdict_of(walkthrough: Walkthrough) -> str:
    """Say in a sentence if the columns agree."""
    rows = walkthrough.rows
    limits = f"allowed: {AUTOGRAD_TOLERANCE:.0e} and {FINITE_TOLERANCE:.0e}"
    wrong = [row for row in rows if not row.agrees]
    if wrong:
        names = ", ".join(" ".join(row.name.split()) for row in wrong)
        return f"{len(wrong)} of {len(rows)} rows DISAGREE ({limits}): {names}"
    autograd, finite = (
        max(row.autograd_error for row in rows),
        max(row.finite_error for row in rows),
    )
    return (
        f"All {len(rows)} rows agree with the closed form: autograd within "
        f"{_error(autograd).strip()}, "
        f"finite differences within {_error(finite).strip()}\n({limits}; relative for values "
        "above 1)."
    )
