"""The modes around a loop that hold again when a step is replayed: autocast, train and eval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from innerloop._problem import Problem
from innerloop._types import HyperTree
from innerloop._utils.autocast import AutocastModes
from innerloop._utils.fingerprint import Fingerprint
from innerloop.errors import InvalidInputError
from innerloop.strategy._base import Loop


class Repeatable:
    """A function ``optimizer_hyper(hyper, t)`` whose results are compared.

    It raises if it gives something else when it is called again with the same t.

    Attributes:
        seen: the fingerprints of its results, by t.
    """

    def __init__(self, function: Callable[[Any, int], Mapping[str, Any] | None]) -> None:
        self.function = function
        self.seen: dict[int, Fingerprint] = {}

    def __call__(self, hyper: HyperTree, t: int) -> Mapping[str, Any] | None:
        """Call the function, and compare its result with the one that it gave before."""
        result = self.function(hyper, t)
        found = Fingerprint.of(result)
        if t not in self.seen:
            self.seen[t] = found
        elif not found.agrees(self.seen[t]):
            raise InvalidInputError(
                f"optimizer_hyper(hyper, t) gave other values at t={t} when it was called again "
                "for the replay: it must be a pure function "
                "of its arguments (and hyper must not be written in place between the forward and "
                "the backward pass)"
            )
        return result


class ReplayContext:
    """The autocast and train/eval modes that are active when a loop first runs.

    Args:
        loop: the loop.
    """

    def __init__(self, loop: Loop) -> None:
        self._training = None if loop.problem.view is None else loop.problem.view.training
        self._autocast = AutocastModes.now(loop.start.params.values())

    @contextmanager
    def restored(self, problem: Problem) -> Iterator[None]:
        """Re-enter the modes that were active when the loop first ran."""
        with ExitStack() as stack:
            if problem.view is not None and self._training is not None:
                stack.enter_context(problem.view.in_modes(self._training))
            stack.enter_context(self._autocast.restored())
            yield


class Record(NamedTuple):
    """A loop as it was run, to run it or a part of it again.

    Attributes:
        loop: the loop; its start knows the random state.
        context: the modes that were active.
        exact: True if the strategy differentiates it exactly, by params and hyper.
    """

    loop: Loop
    context: ReplayContext
    exact: bool
