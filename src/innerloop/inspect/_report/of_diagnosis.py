"""What a report says about a diagnosis."""

from __future__ import annotations

from innerloop.inspect._diagnose import ERROR, Diagnosis
from innerloop.inspect._report.drawing import svg_of
from innerloop.inspect._report.page import (
    Section,
    grid,
    picture,
    side_by_side,
    verdict,
    words,
)


def sections(found: Diagnosis) -> list[Section]:
    """Return the sections of a diagnosis: the verdict in words, then the numbers behind it."""
    return [Section("Is the meta-gradient worth anything?", _body(found))]


def _body(found: Diagnosis) -> str:
    head = f"{'Trusted' if found.trusted else 'Not trusted'} for steps of size {found.size:g}"
    text = ""
    if found.kept:
        text = (
            f"Training again {len(found.kept)} times from inputs moved at random by "
            f"{found.size:.2g} of their size, the outer loss ({found.value:.6g}) changed as the "
            f"gradient promised up to an error of {found.error:.0%} (limit {ERROR:.0%})."
        )
    parts = [verdict(head, text, good=found.trusted)]
    for finding in found.findings:
        place = f" ({finding.where})" if finding.where else ""
        parts.append(
            verdict(f"{finding.kind}{place}", finding.text, good=False if finding.fatal else None)
        )
    if found.worst is not None:
        parts.append(
            words(
                "Seen from the end backwards, the derivative of the outer loss is at most "
                f"{max(found.growth.values()):.3g} times as large as at the end ({found.worst[0]}, "
                f"step {found.worst[1]})."
            )
        )
    if found.precision is not None:
        parts.append(words(f"Off from the gradient in float64 by {found.precision:.1e}."))
    figures = []
    if found.kept:
        caption = "Each dot is one training from moved inputs; on the line, the promise was kept."
        figures.append(picture(svg_of(found.plot()), caption))
    if found.growth:
        rows = [[name, f"{x:.3g}"] for name, x in found.growth.items()]
        figures.append(grid(["parameter", "largest adjoint over that at the end"], rows))
    if len(found.sizes) > 1:
        rows = [[f"{size:.2g}", f"{error:.0%}"] for size, error in sorted(found.sizes.items())]
        figures.append(grid(["size", "error of the promise"], rows))
    parts.append(side_by_side(figures))
    parts.append(words(f"Cost: {found.cost:.1f} meta-gradients.", soft=True))
    return "".join(parts)
