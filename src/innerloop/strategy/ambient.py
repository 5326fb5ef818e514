"""What surrounds a loop and must be the same when a step is replayed later: autocast, the modes of the modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from innerloop import tree
from innerloop.problem import Problem
from innerloop.strategy.base import Loop


class Ambient:
    """The surroundings at the moment.

    Args:
        loop: the loop that runs in them.
    """

    def __init__(self, loop: Loop) -> None:
        self._training = None if loop.problem.view is None else loop.problem.view.training
        kinds = {"cpu", *(x.device.type for x in tree.tensors(loop.start.params))}
        self._autocast = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in sorted(kinds)]

    @contextmanager
    def restored(self, problem: Problem) -> Iterator[None]:
        """In them once more."""
        with ExitStack() as stack:
            if problem.view is not None and self._training is not None:
                stack.enter_context(problem.view.in_modes(self._training))
            for kind, enabled, dtype in self._autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    # The cache keeps a cast copy of every parameter that it has seen: here of every step's.
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield
