"""Faults planted by hand, to see that the fuzzer finds them.

Each leaves every forward pass as it is, and makes a derivative wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils import _pytree as pytree

import innerloop


def _scaled(value: object, factor: float) -> object:
    """Scale the derivative through a tensor, and leave its value."""
    if isinstance(value, Tensor) and value.requires_grad and not value.is_sparse:
        return value.detach() + factor * (value - value.detach())
    return value


def _through_state(cls: type, factor: float) -> AbstractContextManager[Any]:
    """Make the derivative wrong that passes through the state of a rule."""
    right: Callable[..., tuple[Any, Any]] = cls.update  # type: ignore[attr-defined]

    def wrong(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        params, state = right(self, *args, **kwargs)
        return params, pytree.tree_map(lambda x: _scaled(x, factor), state)

    return mock.patch.object(cls, "update", wrong)


@contextmanager
def momentum() -> Iterator[None]:
    """SGD: the derivative through the momentum is 5 % too small."""
    with _through_state(innerloop.optim.SGD, 0.95):
        yield


@contextmanager
def detached_state() -> Iterator[None]:
    """Adam: the averages of the gradients are detached after each step."""
    with _through_state(innerloop.optim.Adam, 0.0):
        yield


@contextmanager
def dropped_term() -> Iterator[None]:
    """`Problem`: the gradient of the loss counts as constant in ``hyper``."""
    right = innerloop.Problem.gradient

    def wrong(self: innerloop.Problem, params: Any, buffers: Any, hyper: Any, batch: Any) -> Any:
        constant = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, hyper)
        return right(self, params, buffers, constant, batch)

    with mock.patch.object(innerloop.Problem, "gradient", wrong):
        yield


FAULTS: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    "momentum": momentum,
    "detached state": detached_state,
    "dropped term": dropped_term,
}
