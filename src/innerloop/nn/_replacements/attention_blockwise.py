r"""Attention with first, second and forward-mode derivatives, in memory linear in the length.

.. math::
    S = s\, Q K^\top + M, \qquad P = \mathrm{softmax}(S), \qquad O = (P \circ D)\, V

with the scale s, a mask M and the dropout factors D (0 or 1/(1-p)). The quadratic matrices are made
for one block of rows at a time and never kept. The derivation of what a block computes is in
``docs/devnotes/attention.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from innerloop.nn import _twice_differentiable as twice
from innerloop.nn._replacements.attention_composite import above_diagonal, composite, dead_rows

BLOCK = 2**18
"""Elements of one quadratic block: a few of them stay in the cache of a core."""
ROWS = 64
"""At least so many rows in a block, however long they are: fewer do not feed a matrix product."""
CAUSAL_ROWS = 128
"""At most so many rows under a causal mask, or a quarter of all if that is more.

Keys that none of a block's rows sees are left out. Measured on a CPU, as the other two.
"""


@dataclass(frozen=True)
class Blockwise(twice.TwiceDifferentiable):
    """Attention of queries (..., L, E), keys (..., S, E) and values (..., S, F).

    All have the same leading dimensions. The mask, (..., L, S), has the same number of dimensions;
    any of them may be 1. It is the fourth input if it is differentiated and the only constant if it
    is not (or None there). Boolean: True takes part; else it is added to the scores.

    Attributes:
        scale: s.
        is_causal: position i sees the positions up to i.
        dropout_p: the chance of a weight to be dropped.
        seed: of the numbers that decide which.
    """

    scale: float
    is_causal: bool = False
    dropout_p: float = 0.0
    seed: int = 0

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """Return True if there is dropout."""
        return self.dropout_p > 0

    def forward(self, inputs: twice.Tensors, constants: twice.Constants) -> twice.Tensors:
        at = _Flat.of(inputs, constants)
        q, out = at.q * self.scale, at.v.new_empty(*at.q.shape[:2], at.v.shape[-1])
        for b in self._blocks(at, spaces=2):
            weights, drop = self._weights(b, q, at), self._drop(b)
            torch.bmm(_times(weights, drop, b.spaces[1]), at.v[b.n, b.j], out=out[b.n, b.i])
        return (out.view(*at.batch, *out.shape[1:]),)

    def vjp(
        self,
        inputs: twice.Tensors,
        constants: twice.Constants,
        outputs: twice.Constants,
        cotangents: twice.Tensors,
    ) -> twice.Tensors:
        at = _Flat.of(inputs, constants)
        q, do = at.q * self.scale, _flat(cotangents[0])
        out = self._output(inputs, constants, outputs)
        delta = (do * out).sum(-1, keepdim=True)
        dq, dk, dv, dm = at.zeros()
        for b in self._blocks(at, spaces=2):
            weights, drop = self._weights(b, q, at), self._drop(b)
            dv[b.n, b.j].baddbmm_(_times(weights, drop, b.spaces[1]).mT, do[b.n, b.i])
            ds = _times_(torch.bmm(do[b.n, b.i], at.v[b.n, b.j].mT, out=b.spaces[1]), drop)
            ds.sub_(delta[b.n, b.i]).mul_(weights)
            torch.bmm(ds, at.k[b.n, b.j], out=dq[b.n, b.i])
            dk[b.n, b.j].baddbmm_(ds.mT, q[b.n, b.i])
            at.add_to_mask(dm, b, ds)
        return at.shaped(inputs, dq.mul_(self.scale), dk, dv, dm)

    def jvp(
        self, inputs: twice.Tensors, constants: twice.Constants, tangents: twice.Tensors
    ) -> twice.Tensors:
        at, along = _Flat.of(inputs, constants), _Flat.of(tangents, constants)
        q, qq, kk = at.q * self.scale, *_side_by_side(self.scale, at, along)
        pushed = at.v.new_empty(*at.q.shape[:2], at.v.shape[-1])
        for b in self._blocks(at, spaces=3):
            weights, drop = self._weights(b, q, at), self._drop(b)
            moved = self._moved(b, qq, kk, along, weights)
            torch.bmm(_times(moved, drop, b.spaces[2]), at.v[b.n, b.j], out=pushed[b.n, b.i])
            pushed[b.n, b.i].baddbmm_(_times(weights, drop, b.spaces[2]), along.v[b.n, b.j])
        return (pushed.view(*at.batch, *pushed.shape[1:]),)

    def vjp_of_jvp(
        self,
        inputs: twice.Tensors,
        constants: twice.Constants,
        outputs: twice.Constants,
        cotangents: twice.Tensors,
        tangents: twice.Tensors,
    ) -> tuple[twice.Tensors, twice.Tensors]:
        at, along = _Flat.of(inputs, constants), _Flat.of(tangents, constants)
        qq, kk = _side_by_side(self.scale, at, along)
        along_q, q = qq.chunk(2, -1)
        do = _flat(cotangents[0])
        delta = (do * self._output(inputs, constants, outputs)).sum(-1, keepdim=True)
        pushed = torch.empty_like(do)
        dq, dk, dv, dm = at.zeros()
        for b in self._blocks(at, spaces=4):
            n, i, j = b.n, b.i, b.j
            weights, drop = self._weights(b, q, at), self._drop(b)
            moved = self._moved(b, qq, kk, along, weights)
            dropped = _times(moved, drop, b.spaces[2])
            torch.bmm(dropped, at.v[n, j], out=pushed[n, i])
            dv[n, j].baddbmm_(dropped.mT, do[n, i])
            pushed[n, i].baddbmm_(_times(weights, drop, b.spaces[2]), along.v[n, j])
            dp = _times_(torch.bmm(do[n, i], at.v[n, j].mT, out=b.spaces[2]), drop).sub_(
                delta[n, i]
            )
            x = _times_(torch.bmm(do[n, i], along.v[n, j].mT, out=b.spaces[3]), drop)
            x.sub_((do[n, i] * pushed[n, i]).sum(-1, keepdim=True)).mul_(weights).addcmul_(
                moved, dp
            )
            ds = dp.mul_(weights)
            torch.bmm(x, at.k[n, j], out=dq[n, i]).baddbmm_(ds, along.k[n, j])
            dk[n, j].baddbmm_(x.mT, q[n, i]).baddbmm_(ds.mT, along_q[n, i])
            at.add_to_mask(dm, b, x)
        gradients = at.shaped(inputs, dq.mul_(self.scale), dk, dv, dm)
        return gradients, (pushed.view(*at.batch, *pushed.shape[1:]),)

    def reference(self, inputs: twice.Tensors, constants: twice.Constants) -> twice.Tensors:
        drop = self._all_drops(inputs, constants) if self.dropout_p > 0 else None
        q, k, v, mask = _four(inputs, constants)
        return (
            composite(
                q, k, v, mask, self.scale, self.is_causal, lambda w: w if drop is None else w * drop
            ),
        )

    # -- one block ---------------------------------------------------------------------------------

    def _blocks(self, at: _Flat, spaces: int) -> Iterator[_Block]:
        """Cut the work into blocks, alike in every method, because dropout draws by block."""
        (heads, length), keys = at.q.shape[:2], at.k.shape[1]
        rows = min(length, max(ROWS, BLOCK // max(1, keys)))
        if self.is_causal:
            rows = min(rows, max(CAUSAL_ROWS, length // 4))
        group = max(1, BLOCK // max(1, length * keys)) if rows == length else 1
        memory = at.q.new_empty(spaces, group * rows * keys)
        number = 0
        for n in range(0, heads, group):
            for i in range(0, length, rows):
                count, end = min(group, heads - n), min(i + rows, length)
                seen = min(end, keys) if self.is_causal else keys
                shape = (count, end - i, seen)
                views = [space[: math.prod(shape)].view(shape) for space in memory]
                yield _Block(number, slice(n, n + count), slice(i, end), slice(0, seen), views)
                number += 1

    def _weights(self, b: _Block, q: Tensor, at: _Flat) -> Tensor:
        """Compute P of a block, in its first space; ``q`` is scaled."""
        scores = torch.bmm(q[b.n, b.i], at.k[b.n, b.j].mT, out=b.spaces[0])
        if self.is_causal and b.i.start < b.j.stop:
            late = slice(b.i.start, b.j.stop)
            above = above_diagonal(b.i.stop - b.i.start, late.stop - late.start, q.device)
            scores[..., late].masked_fill_(above, -math.inf)
        mask = at.mask_of(b)
        if mask is not None:
            scores = (
                scores.masked_fill_(~mask, -math.inf)
                if mask.dtype == torch.bool
                else scores.add_(mask)
            )
        torch.softmax(scores, -1, out=scores)
        return scores if mask is None else scores.masked_fill_(dead_rows(mask), 0.0)

    def _moved(self, b: _Block, qq: Tensor, kk: Tensor, along: _Flat, weights: Tensor) -> Tensor:
        """Compute the tangent of P, in the second space."""
        moved = torch.bmm(qq[b.n, b.i], kk[b.n, b.j].mT, out=b.spaces[1])
        mask = along.mask_of(b) if along.differentiates_mask else None
        if mask is not None:
            moved.add_(mask)
        moved.mul_(weights)
        return moved.addcmul_(weights, moved.sum(-1, keepdim=True), value=-1)

    def _drop(self, b: _Block) -> Tensor | None:
        """Draw D of a block: the same numbers at every call."""
        if self.dropout_p == 0:
            return None
        if self.dropout_p == 1:
            return torch.zeros_like(b.spaces[0])
        generator = torch.Generator(b.spaces[0].device).manual_seed(self.seed + b.number)
        kept = torch.empty_like(b.spaces[0]).bernoulli_(1 - self.dropout_p, generator=generator)
        return kept.div_(1 - self.dropout_p)

    def _all_drops(self, inputs: twice.Tensors, constants: twice.Constants) -> Tensor:
        """Draw D as a whole, for `reference`."""
        q, k = inputs[0], inputs[1]
        shape = (*q.shape[:-1], k.shape[-2])
        like = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:3]]
        whole = torch.zeros(math.prod(shape[:-2]), *shape[-2:], dtype=q.dtype, device=q.device)
        for b in self._blocks(_Flat.of(tuple(like), (None,)), spaces=1):
            drop = self._drop(b)
            assert drop is not None
            whole[b.n, b.i, b.j] = drop
        return whole.view(shape)

    def _output(
        self, inputs: twice.Tensors, constants: twice.Constants, outputs: twice.Constants
    ) -> Tensor:
        return _flat(self.forward(inputs, constants)[0] if outputs[0] is None else outputs[0])


class _Block(NamedTuple):
    """Heads ``n``, rows ``i`` and keys ``j`` of the flattened tensors.

    ``spaces`` is room for some matrices of the block's size.
    """

    number: int
    n: slice
    i: slice
    j: slice
    spaces: list[Tensor]


class _Flat(NamedTuple):
    """Queries, keys and values with one leading dimension, and the mask with its own.

    ``user`` says which part of the mask each head uses.
    """

    batch: tuple[int, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    user: Tensor | None
    differentiates_mask: bool

    @classmethod
    def of(cls, inputs: twice.Tensors, constants: twice.Constants) -> _Flat:
        """Flatten the leading dimensions."""
        q, k, v, mask = _four(inputs, constants)
        batch = tuple(q.shape[:-2])
        user = None
        if mask is not None:
            own = mask.shape[:-2]
            user = (
                torch.arange(math.prod(own), device=mask.device).view(own).expand(batch).reshape(-1)
            )
            mask = _flat(mask)
        return cls(batch, _flat(q), _flat(k), _flat(v), mask, user, len(inputs) == 4)

    def mask_of(self, b: _Block) -> Tensor | None:
        """Return the part of the mask that concerns a block; broadcast dimensions stay 1."""
        if self.mask is None or self.user is None:
            return None
        part = self.mask[
            :,
            b.i if self.mask.shape[1] > 1 else slice(None),
            b.j if self.mask.shape[2] > 1 else slice(None),
        ]
        return part[self.user[b.n]] if self.mask.shape[0] > 1 else part

    def zeros(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return room for the gradients."""
        mask = (
            torch.zeros_like(self.mask)
            if self.differentiates_mask and self.mask is not None
            else None
        )
        return torch.zeros_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v), mask

    def add_to_mask(self, total: Tensor | None, b: _Block, gradient: Tensor) -> None:
        """Add a block's gradient of the scores to the mask's, summed over broadcast dimensions."""
        if total is None or self.user is None:
            return
        broadcast = [d for d in (1, 2) if total.shape[d] == 1 and gradient.shape[d] != 1]
        found = gradient.sum(broadcast, keepdim=True) if broadcast else gradient
        part = total[
            :,
            b.i if total.shape[1] > 1 else slice(None),
            b.j if total.shape[2] > 1 else slice(None),
        ]
        part.index_add_(0, self.user[b.n], found)

    def shaped(self, inputs: twice.Tensors, *gradients: Tensor | None) -> twice.Tensors:
        """Give the gradients the shapes of the inputs."""
        return tuple(
            g.view(x.shape) for g, x in zip(gradients, inputs, strict=False) if g is not None
        )


def _four(
    inputs: twice.Tensors, constants: twice.Constants
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v, *mask = inputs
    return q, k, v, mask[0] if mask else constants[0]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _side_by_side(scale: float, at: _Flat, along: _Flat) -> tuple[Tensor, Tensor]:
    """Return the factors of the scores' tangent as one product: [Q', Q] [K, K']^T."""
    return torch.cat([along.q, at.q], -1).mul_(scale), torch.cat([at.k, along.k], -1)


def _times(x: Tensor, factor: Tensor | None, out: Tensor) -> Tensor:
    return x if factor is None else torch.mul(x, factor, out=out)


def _times_(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x.mul_(factor)
