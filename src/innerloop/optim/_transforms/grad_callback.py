"""Whatever a user does to gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from innerloop._types import Grads, Params
from innerloop.errors import InvalidInputError
from innerloop.optim._engine.callback import call_back
from innerloop.optim._transforms.base import Transform


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GradCallback(Transform):
    """Whatever you write: a function of all gradients by name.

    .. math:: g' = f(g)

    As higher's ``grad_callback``, with a dict instead of a list. It must be a function of its
    argument: a tensor that it captures and that requires grad is refused by the strategies that
    replay.

    Args:
        fn: ``fn(grads) -> grads``, of a dict with a tensor, or None, for each parameter; a name
            that it leaves out is skipped in this step.

    Raises:
        InvalidInputError: ``fn`` is no function, or returns anything but gradients by name.

    Example:
        >>> import torch, innerloop
        >>> signs = innerloop.optim.grad_callback(
        ...     lambda grads: {name: g.sign() for name, g in grads.items()}
        ... )
        >>> opt = innerloop.optim.chain(signs, innerloop.optim.sgd(lr=1.0))
        >>> params = {"w": torch.tensor([5.0, 5.0])}
        >>> opt.update({"w": torch.tensor([-3.0, 0.1])}, opt.init(params), params)[0]
        {'w': tensor([6., 4.])}
    """

    fn: Callable[[dict[str, Tensor | None]], Any]

    name: ClassVar = "grad_callback"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fn):
            raise InvalidInputError(
                f"grad_callback({self.fn!r}): write a function of the gradients by name"
            )

    def apply(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], Any]:
        changed = call_back(self.fn, dict(grads))
        if not isinstance(changed, Mapping) or not set(changed) <= set(grads):
            got = (
                sorted(set(changed) - set(grads))
                if isinstance(changed, Mapping)
                else type(changed).__name__
            )
            raise InvalidInputError(
                f"grad_callback must return the gradients by name, as it gets them; got {got}, "
                f"expected {list(grads)}"
            )
        return {n: changed.get(n) for n in grads}, state


grad_callback = GradCallback
