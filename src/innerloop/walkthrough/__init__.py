"""The walk-through: two parameters whose every derivative is known, computed three ways.

One record of quantities (`quantities`) is filled in by hand-derived formulas (`closed_form`), by
innerloop (`by_autograd`) and by finite differences of a plain torch.optim loop (`by_differences`).
`table` lays the three side by side and says whether they agree; `text`, `picture` and `report` show
the result. ``innerloop walkthrough`` runs all of it.
"""

from innerloop.walkthrough._picture import draw, write_picture
from innerloop.walkthrough._quantities import System
from innerloop.walkthrough._report import write_report
from innerloop.walkthrough._table import Block, LongRun, Row, Walkthrough, run
from innerloop.walkthrough._text import to_text

__all__ = [
    "Block",
    "LongRun",
    "Row",
    "System",
    "Walkthrough",
    "draw",
    "run",
    "to_text",
    "write_picture",
    "write_report",
]
