"""Faults planted by hand, to see that the fuzzer finds them.

Each leaves every forward pass as it is, and makes a derivative wrong. The last two sit where no
public name reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils import _pytree as pytree

import innerloop
from innerloop._inner_gradient import block
from innerloop._track import replay


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


@contextmanager
def captured_tensor() -> Iterator[None]:
    """`track` with a strategy: a step that runs again sends nothing to the tensors it captured."""
    right = replay.Recorder.pull

    def wrong(self: Any, t: int, cotangents: Any, wanted: Any) -> list[Tensor | None]:
        found = right(self, t, cotangents, wanted)
        layout = self.steps[t].layout
        count = len(layout.params) + len(layout.state) + layout.hyper
        return found[:count] + [None] * len(found[count:])

    with mock.patch.object(replay.Recorder, "pull", wrong):
        yield


@contextmanager
def newest_weights() -> Iterator[None]:
    """A checkpointed block runs again with the newest weights, and nobody compares its numbers."""
    newest: dict[str, Tensor] = {}
    state, run = block.ReadModule.state, block._ModuleState.run

    def noting(self: Any) -> Any:
        found = state(self)
        newest.clear()
        newest.update(found.params)
        return found

    def wrong(self: Any, values: Any, function: Any) -> Any:
        moved = list(values)
        for name, i in self.inputs.items():
            if name in newest and newest[name].shape == moved[i].shape:
                moved[i] = moved[i] + (newest[name] - moved[i]).detach()
        return run(self, moved, function)

    with (
        mock.patch.object(block.ReadModule, "state", noting),
        mock.patch.object(block._ModuleState, "run", wrong),
        mock.patch.object(block._Numbers, "agree", return_value=True),
    ):
        yield


FAULTS: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    "momentum": momentum,
    "detached state": detached_state,
    "dropped term": dropped_term,
    "captured tensor": captured_tensor,
    "newest weights": newest_weights,
}
NEWEST = ("captured tensor", "newest weights")
"""Those that only cases with extras show."""
