r"""Softmax cross-entropy whose first two derivatives keep little in memory.

Of the size of the logits, they keep nothing but the logits and their gradient.

For logits :math:`z` of C classes, a label y or target weights :math:`t_c`, :math:`p =
\mathrm{softmax}(z)`,
:math:`\ell = \log\sum_c e^{z_c}` and :math:`\tau = \sum_c t_c`:

.. math::
    L_y = \ell - z_y, \qquad L_t = \sum_c t_c\,(\ell - z_c) .

With their cotangents g and h, a direction u of z and r of t, :math:`\bar u = \sum_c p_c u_c`,
:math:`\rho = \sum_c r_c`:

.. math::
    \nabla_z &= (g + h\tau)\, p - g\, 1_y - h\, t, & \nabla_t &= h\,(\ell - z), \\
    \dot L_y &= \bar u - u_y, & \dot L_t &= \tau \bar u - t^\top u + r^\top(\ell - z), \\
    \nabla_z \langle (g, h), \dot L\rangle &=
    (g + h\tau)\, p \circ (u - \bar u) + h\,(\rho\, p - r), &
    \nabla_t \langle (g, h), \dot L\rangle &= h\,(\bar u - u) .

The probabilities are computed again wherever they occur, a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from innerloop.nn import _twice_differentiable as twice

CHUNK = 2**18
"""Elements of the logits that are worked on at a time: they stay in the cache of a core."""


@dataclass(frozen=True)
class SoftmaxLoss(twice.TwiceDifferentiable):
    """The losses of logits (..., C, D): L_y, then L_t, each (..., D).

    The labels have the shape (..., D), the target weights (... or 1, C, D or 1). The target weights
    are the second input if they are differentiated, else the second constant; the labels are the
    first constant. Either may be None. Logits in half precision are computed with in float32, which
    is then the dtype of the losses.
    """

    def forward(self, inputs: twice.Tensors, constants: twice.Constants) -> twice.Tensors:
        at = _Rows.of(inputs, constants)
        losses = at.empty_losses()
        for c in at.chunks():
            log_p = c.z.log_softmax(1)
            if c.y is not None:
                losses[0][c.rows] = -_at(log_p, c.y)
            if c.t is not None:
                losses[-1][c.rows] = -log_p.mul_(c.t).sum(1)
        return at.shaped(losses)

    def vjp(
        self,
        inputs: twice.Tensors,
        constants: twice.Constants,
        outputs: twice.Constants,
        cotangents: twice.Tensors,
    ) -> twice.Tensors:
        at = _Rows.of(inputs, constants)
        g, h = at.cotangents(cotangents)
        found = at.zeros()
        for c in at.chunks():
            p = c.z.softmax(1).mul_(_factor(c, g, h))
            if g is not None and c.y is not None:
                p.scatter_add_(1, c.y.unsqueeze(1), -g[c.rows].unsqueeze(1))
            if h is not None and c.t is not None:
                p.addcmul_(c.t, h[c.rows].unsqueeze(1), value=-1)
                if at.differentiates_t:
                    at.add_to_t(found, c, -c.z.log_softmax(1) * h[c.rows].unsqueeze(1))
            found[0][c.rows] = p
        return at.like(inputs, found)

    def jvp(
        self, inputs: twice.Tensors, constants: twice.Constants, tangents: twice.Tensors
    ) -> twice.Tensors:
        at, along = _Rows.of(inputs, constants), _Rows.of(tangents, constants)
        pushed = at.empty_losses()
        for c, d in zip(at.chunks(), along.chunks(), strict=True):
            self._pushed(at, c, d, (c.z.softmax(1) * d.z).sum(1, keepdim=True), pushed)
        return at.shaped(pushed)

    def vjp_of_jvp(
        self,
        inputs: twice.Tensors,
        constants: twice.Constants,
        outputs: twice.Constants,
        cotangents: twice.Tensors,
        tangents: twice.Tensors,
    ) -> tuple[twice.Tensors, twice.Tensors]:
        at, along = _Rows.of(inputs, constants), _Rows.of(tangents, constants)
        g, h = at.cotangents(cotangents)
        pushed, found = at.empty_losses(), at.zeros()
        for c, d in zip(at.chunks(), along.chunks(), strict=True):
            p = c.z.softmax(1)
            mean = (p * d.z).sum(1, keepdim=True)
            self._pushed(at, c, d, mean, pushed)
            x = (d.z - mean).mul_(p).mul_(_factor(c, g, h))
            if h is not None and at.differentiates_t and d.t is not None:
                over = h[c.rows].unsqueeze(1)
                x.addcmul_(p.mul_(d.t.sum(1, keepdim=True)).sub_(d.t), over)
                at.add_to_t(found, c, (mean - d.z).mul_(over))
            found[0][c.rows] = x
        return at.like(inputs, found), at.shaped(pushed)

    def reference(self, inputs: twice.Tensors, constants: twice.Constants) -> twice.Tensors:
        z, t, y = inputs[0], inputs[1] if len(inputs) == 2 else constants[1], constants[0]
        log_p = precise(z).log_softmax(-2)
        losses = [] if y is None else [-log_p.gather(-2, y.unsqueeze(-2)).squeeze(-2)]
        return (*losses, *(() if t is None else (-(log_p * t).sum(-2),)))

    @staticmethod
    def _pushed(at: _Rows, c: _Chunk, d: _Chunk, mean: Tensor, pushed: list[Tensor]) -> None:
        """Write the tangents of a chunk's losses; ``mean`` is that of the logits' tangent."""
        if c.y is not None:
            pushed[0][c.rows] = mean.squeeze(1) - _at(d.z, c.y)
        if c.t is not None:
            pushed[-1][c.rows] = ((mean - d.z) * c.t).sum(1)
            if at.differentiates_t and d.t is not None:
                pushed[-1][c.rows] -= (c.z.log_softmax(1) * d.t).sum(1)


class _Chunk(NamedTuple):
    """Some rows: logits, labels, target weights."""

    rows: slice
    z: Tensor
    y: Tensor | None
    t: Tensor | None


class _Rows(NamedTuple):
    """Logits as (rows, C, D), or (rows, C) where D is 1; the rest alike."""

    shape: tuple[int, ...]
    z: Tensor
    y: Tensor | None
    t: Tensor | None
    differentiates_t: bool

    @classmethod
    def of(cls, inputs: twice.Tensors, constants: twice.Constants) -> _Rows:
        """Flatten the leading dimensions."""
        z, y, t = inputs[0], constants[0], inputs[1] if len(inputs) == 2 else constants[1]
        batch = z.shape[:-2]
        if t is not None and math.prod(t.shape[:-2]) != 1:
            t = t.expand(*batch, *t.shape[-2:])
        flat = [None if x is None else x.reshape(-1, *x.shape[-2:]) for x in (z, t)]
        labels = None if y is None else y.reshape(-1, y.shape[-1])
        if z.shape[-1] == 1:
            flat, labels = (
                [None if x is None else x.squeeze(-1) for x in flat],
                None if y is None else y.reshape(-1),
            )
        assert flat[0] is not None
        return cls((*batch, z.shape[-1]), flat[0], labels, flat[1], len(inputs) == 2)

    def chunks(self) -> Iterator[_Chunk]:
        """Cut the rows into pieces that stay in the cache."""
        size = max(1, CHUNK // max(1, math.prod(self.z.shape[1:])))
        for start in range(0, len(self.z), size):
            rows = slice(start, start + size)
            t = self.t if self.t is None or len(self.t) == 1 else self.t[rows]
            yield _Chunk(rows, precise(self.z[rows]), None if self.y is None else self.y[rows], t)

    def empty_losses(self) -> list[Tensor]:
        """Return room for each of the losses."""
        shape = (self.z.shape[0], *self.z.shape[2:])
        like = precise(self.z[:0])
        return [like.new_empty(shape) for x in (self.y, self.t) if x is not None]

    def shaped(self, losses: list[Tensor]) -> twice.Tensors:
        """Give the losses the shape that the user expects."""
        return tuple(x.view(self.shape) for x in losses)

    def cotangents(self, given: twice.Tensors) -> tuple[Tensor | None, Tensor | None]:
        """Return the cotangents of L_y and L_t, None where there is no such loss."""
        shape = (self.z.shape[0], *self.z.shape[2:])
        return (
            None if self.y is None else given[0].reshape(shape),
            None if self.t is None else given[-1].reshape(shape),
        )

    def zeros(self) -> list[Tensor]:
        """Return room for the gradients."""
        return [
            torch.empty_like(self.z),
            *([torch.zeros_like(self.t)] if self.differentiates_t and self.t is not None else []),
        ]

    def add_to_t(self, found: list[Tensor], c: _Chunk, gradient: Tensor) -> None:
        """Add to the target weights' gradient, summed over the dimensions that are broadcast."""
        total = found[1] if len(found[1]) == 1 else found[1][c.rows]
        total += gradient.sum_to_size(total.shape)

    def like(self, inputs: twice.Tensors, found: list[Tensor]) -> twice.Tensors:
        """Give the gradients the shapes of the inputs.

        Those of target weights that were broadcast over leading dimensions are summed up.
        """
        batch = inputs[0].shape[:-2]
        gradients = []
        for x, g in zip(inputs, found, strict=True):
            whole = math.prod(x.shape[:-2]) in (1, math.prod(batch))
            gradients.append(
                g.view(x.shape) if whole else g.view(*batch, *x.shape[-2:]).sum_to_size(x.shape)
            )
        return tuple(gradients)


def _factor(c: _Chunk, g: Tensor | None, h: Tensor | None) -> Tensor:
    """Compute g + h τ, with a dimension of size 1 for the classes."""
    total = torch.zeros_like(c.z[:, :1])
    if g is not None:
        total = total + g[c.rows].unsqueeze(1)
    if h is not None and c.t is not None:
        total = total + h[c.rows].unsqueeze(1) * c.t.sum(1, keepdim=True)
    return total


def _at(x: Tensor, y: Tensor) -> Tensor:
    return x.gather(1, y.unsqueeze(1)).squeeze(1)


def precise(x: Tensor) -> Tensor:
    """Cast half precision to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
