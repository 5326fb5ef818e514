"""Linear operators on the tensors of a pytree."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from innerloop._utils import tree

Vector = list[Tensor | None]
"""Tensors aligned with `tree.leaves` of what is acted on; None is zero."""


class LinearOperator(abc.ABC):
    """A linear map that is known by what it does to a vector.

    Attributes:
        takes: the leaves that a vector is aligned with; only their shapes, dtypes and devices
            count. Leaves that are not floating-point tensors have no part in it: their entries are
            None.
        gives: the same for the result.
    """

    takes: Sequence[object]
    gives: Sequence[object]

    @abc.abstractmethod
    def __call__(self, vector: Vector) -> Vector:
        """Apply the operator."""

    @property
    @abc.abstractmethod
    def T(self) -> LinearOperator:  # noqa: N802
        """Return the transposed operator."""

    def as_matrix(self) -> Tensor:
        """Apply the operator to every unit vector, for small problems and tests.

        Returns:
            The matrix, with a row for each element of ``gives`` and a column for each of ``takes``.
        """
        columns: list[Tensor] = []
        for i, leaf in enumerate(self.takes):
            if not tree.differentiable(leaf):
                continue
            assert isinstance(leaf, Tensor)
            for k in range(leaf.numel()):
                unit = torch.zeros_like(leaf).flatten()
                unit[k] = 1
                vector: Vector = [None] * len(self.takes)
                vector[i] = unit.reshape(leaf.shape)
                columns.append(self._flat(self(vector)))
        if columns:
            return torch.stack(columns, 1)
        return self._flat([None] * len(self.gives)).unsqueeze(1)[:, :0]

    def _flat(self, vector: Vector) -> Tensor:
        """Return a result as one tensor, zeros in the place of None."""
        parts = [
            (torch.zeros_like(leaf) if entry is None else entry).flatten()
            for leaf, entry in zip(self.gives, vector, strict=True)
            if isinstance(leaf, Tensor) and tree.differentiable(leaf)
        ]
        return torch.cat(parts) if parts else torch.zeros(0)
