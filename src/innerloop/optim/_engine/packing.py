"""Many small named tensors as a few flat ones.

Small models are bound by the number of operations, not by arithmetic: one update of a flat vector
instead of one per tensor is what makes an unrolled Adam step cheap. Two rules keep this exact:

- the flat vector is concatenated from the *named* tensors and split into the next named ones at
  every step, so that ``d parameters(t+1) / d parameters(t)`` keeps its identity path for the
  tensors that a user holds;
- every tensor starts at a multiple of 64 bytes inside the flat one (padding in between), as it
  would when allocated alone: matrix kernels may round differently at other alignments (measured: 12
  % of small ``linear`` calls differ in the last bit).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._utils import caches, tree
from innerloop._utils.execution import Mode, may_call_autograd, mode
from innerloop._utils.sharded import sharded_names

# Elements; a larger tensor is bound by memory traffic, so it is updated alone and never copied.
FLAT_LIMIT = 16_384
_ALIGNMENT = 64  # bytes


class Bucket(NamedTuple):
    """Which parameters share one flat tensor."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    pads: tuple[int, ...]  # elements of padding after each tensor
    is_complex: bool
    active: bool  # whether these parameters received a gradient in this step
    age: int  # equal for parameters with equal step counts


Layout = tuple[Bucket, ...]
_layouts: MutableMapping[object, Layout] = caches.cache("layouts of optimizer states")


def layout_of(
    params: Mapping[str, Tensor],
    active: Mapping[str, bool] | None = None,
    ages: Mapping[str, int] | None = None,
    limit: int = FLAT_LIMIT,
) -> Layout:
    """Split ``params`` into buckets of equal dtype, device, activity and age.

    Args:
        params: the named parameters.
        active: which of them take part in this step; None means all.
        ages: equal for parameters with equal step counts; None means that all are equal.
        limit: a parameter of more elements gets a bucket of its own; 0 gives each one of its own.
    """
    key = tuple(
        (
            name,
            p.shape,
            p.dtype,
            p.device,
            active is None or active[name],
            0 if ages is None else ages[name],
        )
        for name, p in params.items()
    )
    if mode() is Mode.COMPILING:
        return _build(key, limit)
    # Parts of tensors that lie in other processes cannot be joined.
    apart = sharded_names(params)
    if apart:
        return _build(key, limit, apart)
    layout = _layouts.get((key, limit))
    if layout is None:
        if len(_layouts) > 512:
            _layouts.clear()
        layout = _layouts[key, limit] = _build(key, limit)
    return layout


def _build(
    key: tuple[tuple[str, torch.Size, torch.dtype, torch.device, bool, int], ...],
    limit: int,
    apart: Collection[str] = (),
) -> Layout:
    members: dict[object, list[int]] = {}
    for i, (name, shape, dtype, device, active, age) in enumerate(key):
        # Half precision rounds differently in the vectorised part and the tail of a kernel: alone,
        # it has the bits of torch.optim.
        is_alone = not limit or shape.numel() > limit or dtype.itemsize < 4 or name in apart
        alone = name if is_alone else None
        members.setdefault((alone, dtype, device, active, age), []).append(i)
    return tuple(
        Bucket(
            names=tuple(key[i][0] for i in group),
            shapes=tuple(key[i][1] for i in group),
            pads=tuple(_padding(key[i][1], key[i][2]) for i in group),
            is_complex=key[group[0]][2].is_complex,
            active=key[group[0]][4],
            age=key[group[0]][5],
        )
        for group in members.values()
    )


def is_whole(
    bucket: Bucket,
    flat: Tensor,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor | None],
    limit: int = FLAT_LIMIT,
) -> bool:
    """True if ``bucket`` alone is what `layout_of` returns for these parameters.

    Args:
        bucket: the only one of the layout of a state.
        flat: a tensor of that bucket.
        params: the parameters, of which none lies in other processes.
        grads: the gradients; one that is missing, or of another shape, makes it False.
        limit: as for `layout_of`.
    """
    names = bucket.names
    if len(names) == 1 or not bucket.active or tuple(params) != names or len(grads) != len(names):
        return False
    shapes = list(bucket.shapes)
    if list(map(_SHAPE, params.values())) != shapes:
        return False
    if [getattr(grads.get(name), "shape", None) for name in names] != shapes:
        return False
    place = flat.dtype, flat.device
    if set(map(_PLACE, params.values())) != {place}:
        return False
    # A state may have been made for another dtype, or by a rule with another limit.
    key = bucket, place, limit
    found = _whole.get(key)
    if found is None:
        if len(_whole) > 512:
            _whole.clear()
        found = _whole[key] = layout_of(params, limit=limit) == (bucket,)
    return found


_whole: MutableMapping[object, bool] = caches.cache("buckets that are whole layouts")
_SHAPE, _PLACE = operator.attrgetter("shape"), operator.attrgetter("dtype", "device")


def _padding(shape: torch.Size, dtype: torch.dtype) -> int:
    """Count the real elements from the end of a tensor to the next multiple of 64 bytes."""
    real = shape.numel() * (2 if dtype.is_complex else 1)
    return -real % (_ALIGNMENT // (dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize))


def pack(bucket: Bucket, named: Mapping[str, Tensor | None]) -> Tensor:
    """Join the tensors of ``bucket`` to one (real) tensor; a bucket of one keeps its shape."""
    if len(bucket.names) == 1:
        tensor = _given(named, bucket.names[0])
        return torch.view_as_real(tensor) if bucket.is_complex else tensor
    pieces = []
    for name, pad in zip(bucket.names, bucket.pads, strict=True):
        tensor = _given(named, name)
        piece = torch.view_as_real(tensor) if bucket.is_complex else tensor
        if piece.ndim != 1:
            piece = piece.reshape(-1)
        pieces.append(piece)
        if pad:  # ones, not zeros: the padding must not meet the singularities of an update rule
            pieces.append(piece.new_ones(pad))
    return torch.cat(pieces)


def _given(named: Mapping[str, Tensor | None], name: str) -> Tensor:
    tensor = named[name]
    assert tensor is not None, "buckets without gradients are not packed"
    return tensor


def real_dtype(bucket: Bucket, named: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of what `pack` returns."""
    first = named[bucket.names[0]]
    return torch.view_as_real(first).dtype if bucket.is_complex else first.dtype


def zeros(bucket: Bucket, named: Mapping[str, Tensor]) -> Tensor:
    """Return what `pack` returns for zeros like the tensors of ``named``."""
    first = named[bucket.names[0]]
    if len(bucket.names) == 1:
        alone = torch.zeros_like(first)
        return torch.view_as_real(alone) if bucket.is_complex else alone
    factor = 2 if bucket.is_complex else 1
    size = sum(shape.numel() * factor for shape in bucket.shapes) + sum(bucket.pads)
    return (torch.view_as_real(first) if bucket.is_complex else first).new_zeros(size)


def unpack(bucket: Bucket, flat: Tensor) -> dict[str, Tensor]:
    """Undo `pack`."""
    if len(bucket.names) == 1:
        return {bucket.names[0]: torch.view_as_complex(flat) if bucket.is_complex else flat}
    factor = 2 if bucket.is_complex else 1
    sizes: list[int] = []
    for shape, pad in zip(bucket.shapes, bucket.pads, strict=True):
        sizes.append(shape.numel() * factor)
        if pad:
            sizes.append(pad)
    # The pieces of torch.split share a version counter and refuse in-place writes; a user may edit
    # one weight between steps.
    split = torch.unsafe_split_with_sizes if may_call_autograd() else torch.split
    pieces = iter(split(flat, sizes))
    named = {}
    for name, shape, pad in zip(bucket.names, bucket.shapes, bucket.pads, strict=True):
        piece = next(pieces)
        if bucket.is_complex:
            named[name] = torch.view_as_complex(piece.view(*shape, 2))
        else:
            named[name] = piece if len(shape) == 1 else piece.view(shape)
        if pad:
            next(pieces)
    return named


class Packed(Mapping[str, Any]):
    """Named tensors of an optimizer's state, stored flat; ``state.mu["fc.weight"]`` reads one.

    It is a pytree whose leaves are the flat tensors. In place of a flat tensor there may be one
    number for all of a bucket's parameters (or a 0-dim tensor), for what a rule keeps once per
    parameter.
    """

    __slots__ = ("flats", "layout")

    def __init__(
        self, layout: Layout, flats: tuple[Any, ...]
    ) -> None:  # tensors, or what stands for them in a template
        self.layout = layout
        self.flats = flats

    @classmethod
    def of(cls, layout: Layout, named: Mapping[str, Any]) -> Packed:
        """Pack ``named`` into the buckets of ``layout``: free if it is packed that way already."""
        if isinstance(named, Packed) and (named.layout is layout or named.layout == layout):
            return named
        return cls(layout, tuple(pack(bucket, named) for bucket in layout))

    def __getitem__(self, name: str) -> Any:
        for bucket, flat in zip(self.layout, self.flats, strict=True):
            if name in bucket.names:
                one_for_all = not isinstance(flat, Tensor) or (
                    flat.ndim == 0 and (len(bucket.names) > 1 or bucket.is_complex)
                )
                return flat if one_for_all else unpack(bucket, flat)[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for bucket in self.layout for name in bucket.names)

    def __len__(self) -> int:
        return sum(len(bucket.names) for bucket in self.layout)

    def __eq__(self, other: object) -> bool:
        """True if both are packed alike and hold the same tensors.

        That is enough for torch to compare the structure of two pytrees.
        """
        if (
            not isinstance(other, Packed)
            or self.layout != other.layout
            or len(self.flats) != len(other.flats)
        ):
            return False
        return all(a is b for a, b in zip(self.flats, other.flats, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        pairs = (pair for b in self.layout for pair in zip(b.names, b.shapes, strict=True))
        return f"Packed({', '.join(f'{name}: {tuple(shape)}' for name, shape in pairs)})"


tree.register(
    Packed,
    lambda packed: list(packed.flats),
    lambda packed, flats: Packed(packed.layout, tuple(flats)),
)

# A carry can be loaded by torch.load with its default, weights_only=True.
torch.serialization.add_safe_globals([Bucket, Packed])


def padding_masks(state: object) -> list[Tensor | None]:
    """Return for each leaf of an optimizer's state where it is not padding; None: nowhere."""
    if isinstance(state, Packed):
        return [_mask(b, flat) for b, flat in zip(state.layout, state.flats, strict=True)]
    if isinstance(state, Mapping):
        state = tuple(state.values())
    if isinstance(state, (tuple, list)):
        return [mask for value in state for mask in padding_masks(value)]
    return [None] * len(tree.leaves(state))


def _mask(bucket: Bucket, flat: object) -> Tensor | None:
    if not isinstance(flat, Tensor) or len(bucket.names) == 1 or flat.ndim == 0:
        return None
    mask = torch.ones_like(flat, dtype=torch.bool)
    factor, at = 2 if bucket.is_complex else 1, 0
    for shape, pad in zip(bucket.shapes, bucket.pads, strict=True):
        at += shape.numel() * factor
        mask[at : at + pad] = False
        at += pad
    return mask
