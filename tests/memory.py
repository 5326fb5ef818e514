"""Whether something leaves objects behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Episode = Callable[[], None]


@contextmanager
def without_collector() -> Iterator[None]:
    """The collector is off, and `gc.get_objects` lists only what comes into being from here on
    (which makes it fast)."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def assert_nothing_is_left(episode: Episode, count: int) -> None:
    """The number of objects, and what the collector would find, after so many episodes.

    Three times, of which the best counts: what episodes leave behind they leave every time, while a
    thread of somebody else in this process may make an object at any moment.
    """
    found = []
    for _ in range(3):
        with without_collector():
            for _ in range(3):  # gradients, optimizer state and caches come into being
                episode()
            gc.collect()
            before = len(gc.get_objects())
            for _ in range(count):
                episode()
            found.append((len(gc.get_objects()) - before, gc.collect()))
        if found[-1] <= (0, 0):
            break
    grown, unreachable = (min(column) for column in zip(*found, strict=True))
    assert grown <= 0, f"{grown} objects more after {count} episodes"
    assert unreachable == 0, f"{unreachable} objects in reference cycles after {count} episodes"
