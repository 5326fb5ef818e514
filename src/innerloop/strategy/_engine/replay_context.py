"""What surrounds a loop and must be the same when a step is replayed later: autocast, the modes of the modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from innerloop._problem import Problem
from innerloop._utils import tree
from innerloop._utils.fingerprint import Fingerprint
from innerloop.errors import InvalidInputError
from innerloop.strategy._base import Loop


class Repeatable:
    """A function ``optimizer_hyper(hyper, t)`` that raises if it gives something else when it is called again with the same t."""

    def __init__(self, function: Callable[[Any, int], Any]) -> None:
        self.function = function
        self._seen: dict[int, Fingerprint] = {}

    def __call__(self, hyper: Any, t: int) -> Any:
        result = self.function(hyper, t)
        found = Fingerprint.of(result)
        if t not in self._seen:
            self._seen[t] = found
        elif not found.agrees(self._seen[t]):
            raise InvalidInputError(
                f"optimizer_hyper(hyper, t) gave other values at t={t} when it was called again "
                "for the replay: it must be a pure function "
                "of its arguments (and hyper must not be written in place between the forward and "
                "the backward pass)"
            )
        return result


class ReplayContext:
    """The surroundings at the moment.

    Args:
        loop: the loop that runs in them.
    """

    def __init__(self, loop: Loop) -> None:
        self._training = None if loop.problem.view is None else loop.problem.view.training
        kinds = {"cpu", *(x.device.type for x in tree.tensors(loop.start.params))}
        self._autocast = [
            (k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in sorted(kinds)
        ]

    @contextmanager
    def restored(self, problem: Problem) -> Iterator[None]:
        """In them once more."""
        with ExitStack() as stack:
            if problem.view is not None and self._training is not None:
                stack.enter_context(problem.view.in_modes(self._training))
            for kind, enabled, dtype in self._autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    # The cache keeps a cast copy of every parameter that it has seen: here of every
                    # step's.
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                    )
            yield
