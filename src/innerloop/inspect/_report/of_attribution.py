"""What a report says about an attribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from innerloop.errors import InvalidInputError
from innerloop.inspect._attribution import Attribution, Check
from innerloop.inspect._plot import axes_of
from innerloop.inspect._report.drawing import check_images, image_of, svg_of
from innerloop.inspect._report.page import (
    Section,
    picture,
    side_by_side,
    thumbnails,
    verdict,
    words,
)

QUERIES, EXAMPLES = 6, 8
"""How many outcomes are shown, and examples for each."""
GOOD, POOR = 0.8, 0.5
SIZE = (4.8, 2.6)


class Shown(NamedTuple):
    """How examples and outcomes are shown; see `report`."""

    images: Tensor | None
    labels: Sequence[str] | None
    query_images: Tensor | None
    query_labels: Sequence[str] | None


def sections(found: Attribution, shown: Shown) -> list[Section]:
    """Return the sections of an attribution; it is checked by training again if it was not yet."""
    queries, examples = found.scores.shape
    check_images(shown.images, examples, "images")
    check_images(shown.query_images, queries, "query_images")
    _check_labels(shown.labels, examples, "labels")
    _check_labels(shown.query_labels, queries, "query_labels")
    checked = found.checked if found.checked is not None else found.check()
    return [
        Section("Can the attribution be believed?", _verdict(found, checked)),
        Section("Which examples was it?", _examples(found, shown)),
    ]


def _check_labels(labels: Sequence[str] | None, count: int, what: str) -> None:
    if labels is not None and len(labels) != count:
        raise InvalidInputError(f"{what} has {len(labels)} lines: write one for each of {count}")


def _verdict(found: Attribution, checked: Check) -> str:
    queries, examples = found.scores.shape
    mean = float(checked.correlation.mean())
    if mean >= GOOD:
        head, good = "Yes, the ranks of the scores hold", True
    elif mean >= POOR:
        head, good = "With care: the ranks of the scores hold in part", None
    else:
        head, good = "No: training again does not do what the scores say", False
    text = (
        f"{queries} outcomes were traced back to {examples} examples. Training again "
        f"{len(checked.real)} times without some of them, the changes had a rank correlation of "
        f"{mean:.3f} with the predicted ones (mean over the outcomes; the smallest is "
        f"{float(checked.correlation.min()):.3f}). In size they were "
        f"{float(checked.slope.median()):.2g} times the predicted ones (median)."
    )
    return verdict(head, text, good=good) + side_by_side(
        [
            picture(
                svg_of(checked.plot()),
                "Each dot is one training and one outcome: what the scores predicted, and what "
                "training again gave.",
            )
        ]
    )


def _examples(found: Attribution, shown: Shown) -> str:
    parts = [
        words(
            "A helpful example lowers the outcome; a harmful one raises it. The number is the "
            "derivative of the outcome by the weight of the example."
        )
    ]
    for q in range(min(QUERIES, len(found.scores))):
        name = f"outcome {q}" if shown.query_labels is None else shown.query_labels[q]
        best = found.top(q, EXAMPLES)
        parts.append(f"<h3>{_escaped(name)}: {float(found.losses[q]):.4g}</h3>")
        if shown.query_images is not None:
            parts.append(thumbnails([(image_of(shown.query_images[q]), "")]))
        columns = []
        for side in ("helpful", "harmful"):
            cells = [_cell(found, shown, q, i) for i in best[side].tolist()]
            columns.append(f"<div><b>most {side}</b>{thumbnails(cells)}</div>")
        columns.append(
            picture(
                svg_of(found.plot(q, axes_of(None, "a report", SIZE))),
                f"All scores of {name}, from helpful to harmful.",
            )
        )
        parts.append(side_by_side(columns))
    rest = len(found.scores) - QUERIES
    if rest > 0:
        parts.append(words(f"{rest} more outcomes are not shown.", soft=True))
    return "".join(parts)


def _cell(found: Attribution, shown: Shown, q: int, i: int) -> tuple[str, str]:
    source = "" if shown.images is None else image_of(shown.images[i])
    name = f"example {i}" if shown.labels is None else shown.labels[i]
    return source, f"{name} ({float(found.scores[q, i]):+.2g})"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
