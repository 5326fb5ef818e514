"""The walk-through as a page for a browser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from innerloop._problem import Problem
from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree
from innerloop._unroll import unroll
from innerloop.errors import MissingExtraError
from innerloop.inspect._report import of_loop
from innerloop.inspect._report.drawing import svg_of
from innerloop.inspect._report.page import Section, grid, page, picture, verdict, words
from innerloop.inspect._report.report import versions
from innerloop.optim import sgd
from innerloop.walkthrough._picture import draw
from innerloop.walkthrough._quantities import System
from innerloop.walkthrough._table import STEPS, Block, Walkthrough
from innerloop.walkthrough._text import verdict_of


def write_report(walkthrough: Walkthrough, file: str | Path) -> Path:
    """Write tables, picture, and a look inside one of the long runs as one page for a browser.

    Args:
        walkthrough: what `innerloop.walkthrough.run` returned.
        file: where the page is written.

    Returns:
        The file.

    Raises:
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> from innerloop import walkthrough
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = walkthrough.run()
        ...     walkthrough.write_report(found, folder + "/page.html").name
        'page.html'
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtraError.of(
            "matplotlib", "plot", "the report of the walk-through"
        ) from error
    head = "All columns agree" if walkthrough.agrees else "The columns disagree"
    first = [
        Section(
            "Do the three ways agree?",
            verdict(head, verdict_of(walkthrough), good=walkthrough.agrees)
            + words(
                "Two parameters a and b, the model ŷ = (a² + b²) x and the loss ½ (ŷ − y)²: every "
                "derivative of a parameter by its earlier version is known. It is computed by "
                "hand-derived formulas, by innerloop, and by finite differences of plain "
                "torch.optim."
            )
            + picture(
                svg_of(draw(walkthrough), themed=False),
                "Where the parameters go, and what a nudge at each step does to the end.",
                wide=True,
            ),
        ),
        *(Section(block.title, _table(block)) for block in walkthrough.blocks),
    ]
    system = walkthrough.settles.system
    traj, outer = _long_run(system)
    found = of_loop.look(
        traj, outer, directions=2, probes=1, judge=True, told=lambda phase, done, total: None
    )
    lead = words(
        f"Below the tables, a look inside the run of section 4: {STEPS} steps with learning rate "
        f"{system.rate:g}.",
        soft=True,
    )
    target = Path(file)
    text = page(
        "innerloop walkthrough",
        [*first, *of_loop.sections(found), versions(matplotlib=mpl.__version__)],
        lead,
    )
    target.write_text(text, encoding="utf-8")
    return target


def _table(block: Block) -> str:
    rows = [
        [
            row.name.strip(),
            f"{row.closed:.10g}",
            f"{row.autograd:.10g}",
            f"{row.finite:.10g}",
            f"{row.autograd_error:.0e}",
            f"{row.finite_error:.0e}",
            "✓" if row.agrees else "✗",
        ]
        for row in block.rows
    ]
    header = ["", "closed form", "autograd", "finite diff.", "off by autograd", "finite", ""]
    note = words(block.note) if block.note else ""
    return words(block.sentence) + grid(header, rows) + note


def _long_run(system: System) -> tuple[Trajectory, Callable[[Trajectory, HyperTree], Tensor]]:
    """Train as the long run does; the outer loss is the loss at the end."""

    def loss(params: Mapping[str, Tensor], hyper: HyperTree, batch: object) -> Tensor:
        prediction = (params["a"] ** 2 + params["b"] ** 2) * system.x
        return 0.5 * (prediction - system.y) ** 2

    def loss_at_the_end(traj: Trajectory, hyper: HyperTree) -> Tensor:
        return loss(traj.params, hyper, None)

    start = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in zip("ab", system.start, strict=True)
    }
    traj = unroll(Problem(loss, sgd(lr=system.rate)), start, None, steps=STEPS)
    return traj, loss_at_the_end
