"""Figures and images as text that stands inside of a page."""

from __future__ import annotations

import base64
import io
import itertools
import re
from typing import TYPE_CHECKING

from torch import Tensor

from innerloop.errors import InvalidInputError
from innerloop.inspect._plot import COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_THEMED = {
    **{colour.lower(): f"var(--c{i})" for i, colour in enumerate(COLOURS[:6])},
    COLOURS[6].lower(): "var(--soft)",
    INK: "currentColor",
    "#000000": "currentColor",
}
"""What changes its colour between light and dark."""
_count = itertools.count()


def svg_of(figure: Figure, *, themed: bool = True) -> str:
    """Return a figure as SVG.

    Args:
        figure: the figure.
        themed: its colours follow the page, light or dark. A picture with a ground of its own stays
            as it is.
    """
    from matplotlib import rc_context

    file = io.StringIO()
    # Text stays text: it is small, and can be searched.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "innerloop"}):
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # Several pictures share a page, so each gets names of its own.
    own = f"f{next(_count)}-"
    text = re.sub(r'\bid="', f'id="{own}', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{own}", text)
    if not themed:
        return re.sub(r"\n\s*", "\n", text).replace("<svg ", '<svg class="plain" ', 1).strip()
    pattern = "|".join(map(re.escape, _THEMED))
    text = re.sub(
        rf"(?<=[ :;])({pattern})(?=[;\"'])",
        lambda found: _THEMED[found[1]],
        text,
        flags=re.IGNORECASE,
    )
    return re.sub(r"\n\s*", "\n", text).strip()


def image_of(pixels: Tensor) -> str:
    """Return an image ``[H, W]``, ``[1, H, W]`` or ``[3, H, W]`` as an address that holds it."""
    from matplotlib.image import imsave

    x = pixels.detach().double().cpu()
    low, high = float(x.min()), float(x.max())
    x = (x - low) / (high - low) if high > low else x * 0
    if x.ndim == 3:
        x = x[0] if len(x) == 1 else x.permute(1, 2, 0)
    file = io.BytesIO()
    imsave(file, x.numpy(), cmap="gray", vmin=0, vmax=1, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def check_images(images: Tensor | None, count: int, what: str) -> None:
    """Raise unless ``images`` holds one image for each of ``count`` things."""
    if images is None:
        return
    fits = images.ndim == 3 or (images.ndim == 4 and images.shape[1] in (1, 3))
    if not fits or len(images) != count:
        raise InvalidInputError(
            f"{what} has shape {tuple(images.shape)}: write one image for each of the {count}, "
            f"[{count}, height, width] or [{count}, 3, height, width]"
        )
