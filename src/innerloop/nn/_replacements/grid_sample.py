"""Sampling an image at points of a grid, in forward mode too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from innerloop.errors import InvalidInputError

Padding = Literal["zeros", "border", "reflection"]


def grid_sample(
    input: Float[Tensor, "batch channels *sizes"],
    grid: Float[Tensor, "batch *points dims"],
    mode: Literal["bilinear", "nearest", "bicubic"] = "bilinear",
    padding_mode: Padding = "zeros",
    align_corners: bool | None = None,
) -> Float[Tensor, "batch channels *points"]:
    """Compute ``F.grid_sample`` by indexing, which has forward-mode derivatives.

    PyTorch's own has all other derivatives.

    Args, Returns: as for ``torch.nn.functional.grid_sample``. Costs a tensor of the output's size
    per neighbour (4, 8 or 16).

    Example:
        In the middle of four pixels there is their mean.

        >>> import torch
        >>> from innerloop.nn.functional import grid_sample
        >>> grid_sample(
        ...     torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]),
        ...     torch.zeros(1, 1, 1, 2),
        ...     align_corners=False,
        ... )
        tensor([[[[3.]]]])
    """
    if mode not in ("bilinear", "nearest", "bicubic") or padding_mode not in (
        "zeros",
        "border",
        "reflection",
    ):
        raise InvalidInputError(
            f"grid_sample: mode={mode!r}, padding_mode={padding_mode!r}; choose mode from "
            "'bilinear', 'nearest', 'bicubic' and padding_mode from 'zeros', 'border', 'reflection'"
        )
    aligned = bool(align_corners)
    sizes = input.shape[2:]
    # The last dimension of the grid counts from the last dimension of the image.
    places = [_pixels(grid[..., -1 - d], size, aligned) for d, size in enumerate(sizes)]
    if mode == "bicubic":
        return _bicubic(input, places, padding_mode, aligned)
    places = [
        _inside(x, size, padding_mode, aligned) for x, size in zip(places, sizes, strict=True)
    ]
    if mode == "nearest":
        return _look_up(input, [x.round() for x in places])
    lows = [x.detach().floor() for x in places]
    total: Tensor | None = None
    for corner in itertools.product((0, 1), repeat=len(sizes)):
        weight = torch.ones_like(places[0])
        for x, low, upper in zip(places, lows, corner, strict=True):
            weight = weight * (x - low if upper else 1 + low - x)
        part = _look_up(
            input, [low + upper for low, upper in zip(lows, corner, strict=True)]
        ) * weight.unsqueeze(1)
        total = part if total is None else total + part
    assert total is not None
    return total


def _pixels(x: Tensor, size: int, aligned: bool) -> Tensor:
    """Convert coordinates in (-1, 1) to pixels."""
    return (x + 1) / 2 * (size - 1) if aligned else ((x + 1) * size - 1) / 2


def _inside(x: Tensor, size: int, padding: Padding, aligned: bool) -> Tensor:
    if padding == "zeros":
        return x
    if padding == "reflection":
        low, span = (0.0, size - 1.0) if aligned else (-0.5, float(size))
        if span == 0:
            return torch.zeros_like(x)
        x = (x - low).abs()
        flips = (x.detach() / span).floor()
        rest = x - flips * span
        x = torch.where(flips % 2 == 0, rest + low, span - rest + low)
    # On the border itself PyTorch's gradient is 0; a clamp's would be 1 there.
    return torch.where((x > 0) & (x < size - 1), x, x.detach().clamp(0, size - 1))


def _look_up(input: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Return the pixels at whole-numbered places; zero outside."""
    sizes = input.shape[2:]
    inside = torch.ones_like(places[0], dtype=torch.bool)
    flat = torch.zeros_like(places[0], dtype=torch.long)
    for x, size in zip(places, sizes, strict=True):
        x = x.detach()
        inside = inside & (x >= 0) & (x <= size - 1)
        flat = flat * size + x.clamp(0, size - 1).long()
    count, channels = input.shape[:2]
    found = input.flatten(2).gather(2, flat.reshape(count, 1, -1).expand(count, channels, -1))
    found = found.reshape(count, channels, *places[0].shape[1:])
    return torch.where(inside.unsqueeze(1), found, torch.zeros_like(found))


def _bicubic(input: Tensor, places: Sequence[Tensor], padding: Padding, aligned: bool) -> Tensor:
    """Sample by cubic convolution with a = -3/4 (Keys 1981)."""
    sizes = input.shape[2:]
    if len(sizes) != 2:
        raise InvalidInputError(
            f"input has {len(sizes)} image dimensions, and mode='bicubic' takes two; write "
            "mode='bilinear'"
        )
    lows = [x.detach().floor() for x in places]
    weights = [_cubic(x - low) for x, low in zip(places, lows, strict=True)]
    total: Tensor | None = None
    for i, j in itertools.product(range(4), repeat=2):
        at = [
            _inside(low + k - 1, size, padding, aligned)
            for low, k, size in zip(lows, (i, j), sizes, strict=True)
        ]
        part = _look_up(input, [x.round() for x in at]) * (weights[0][i] * weights[1][j]).unsqueeze(
            1
        )
        total = part if total is None else total + part
    assert total is not None
    return total


def _cubic(t: Tensor, a: float = -0.75) -> list[Tensor]:
    """Return the weights of the four neighbours at distances 1 + t, t, 1 - t, 2 - t."""
    near = lambda x: ((a + 2) * x - (a + 3)) * x * x + 1  # noqa: E731
    far = lambda x: ((a * x - 5 * a) * x + 8 * a) * x - 4 * a  # noqa: E731
    return [far(t + 1), near(t), near(1 - t), far(2 - t)]
