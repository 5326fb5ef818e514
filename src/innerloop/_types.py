"""Types that the whole package shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

Scalar = int | float | Tensor
Hyper = Scalar | Mapping[str, Scalar]
"""A hyper-parameter: a number, a 0-dim tensor, or a mapping from parameter names to scalars or to
tensors of the parameter's shape."""
Params = Mapping[str, Tensor]
Grads = Mapping[str, Tensor | None]
Buffers = Mapping[str, Tensor]
HyperTree = Tensor | Scalar | Mapping[str, object] | Sequence[object] | None
"""The outer variables: a pytree of tensors."""
Batch = TypeVar("Batch")
"""The data of one step: whatever the loss takes."""
Aux = TypeVar("Aux")
"""What the loss returns besides the scalar."""
Loss = Callable[..., Any]
"""``loss(params, hyper, batch)``, a scalar or a pair ``(scalar, aux)``."""
ValueAndGrad = Callable[[Params], tuple[Tensor, Grads]]
"""The inner loss and its gradient at other parameters, for rules that evaluate it themselves."""
Named = Mapping[str, Tensor]
