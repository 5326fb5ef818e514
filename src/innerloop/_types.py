"""Types that the whole package shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import TypeVar  # its default makes a bare `Problem` mean any batch and aux

Scalar = int | float | Tensor
Hyper = Scalar | Mapping[str, Scalar]
"""A hyper-parameter: a number, a 0-dim tensor, or a mapping from parameter names to scalars or to
tensors of the parameter's shape."""
Params = Mapping[str, Tensor]
Grads = Mapping[str, Tensor | None]
Buffers = Mapping[str, Tensor]
HyperTree = Tensor | Scalar | Mapping[str, object] | Sequence[object] | None
"""The outer variables: a pytree of tensors."""
Batch = TypeVar("Batch", default=Any)
"""The data of one step: whatever the loss takes."""
Aux = TypeVar("Aux", default=Any)
"""What the loss returns besides the scalar."""
Module = TypeVar("Module", bound=nn.Module)
"""The class of the module that is trained."""
Result = TypeVar("Result")
"""What an outer loss returns: a scalar, or a pair ``(scalar, aux)``. It has no bound, because a
type checker takes the result of ``sum(...)`` for a tensor or 0."""
Loss = (
    Callable[[dict[str, Tensor], Any, Batch], Tensor | tuple[Tensor, Aux]]
    | Callable[[dict[str, Tensor], Any, Batch, Any], Tensor | tuple[Tensor, Aux]]
)
"""``loss(params, hyper, batch)``, a scalar or a pair ``(scalar, aux)``; with targets
``loss(params, hyper, batch, targets)``. What ``hyper`` is, the loss says itself."""
ModuleLoss = (
    Callable[[Module, Any, Batch], Tensor | tuple[Tensor, Aux]]
    | Callable[[Module, Any, Batch, Any], Tensor | tuple[Tensor, Aux]]
)
"""The same with the module in place of its parameters."""
ValueAndGrad = Callable[[Params], tuple[Tensor, Grads]]
"""The inner loss and its gradient at other parameters, for rules that evaluate it themselves."""
Named = Mapping[str, Tensor]
