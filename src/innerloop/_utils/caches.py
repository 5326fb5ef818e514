"""Caches that can be cleared together.

What is kept between calls only to save time lives in a cache made here, so that a test, or a user
who hunts a strange result, can empty all of them at once. Registries (pytree nodes, rules by torch
class) hold facts that nothing recomputes; they are not caches.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

_caches: dict[str, MutableMapping[object, object]] = {}


def cache(name: str, *, weak: bool = False) -> MutableMapping[K, V]:
    """Make an empty cache under a name of its own.

    Args:
        name: what is kept, for `sizes`.
        weak: forget an entry when its key is no longer used elsewhere.

    Returns:
        A dict, or a ``WeakKeyDictionary``.

    Raises:
        ValueError: if there is a cache of that name already.
    """
    if name in _caches:
        raise ValueError(f"there is a cache called {name!r} already")
    made: MutableMapping[K, V] = weakref.WeakKeyDictionary() if weak else {}
    _caches[name] = made  # type: ignore[assignment]
    return made


def sizes() -> dict[str, int]:
    """Return the number of entries in each cache, by its name."""
    return {name: len(entries) for name, entries in _caches.items()}


def clear() -> None:
    """Empty every cache."""
    for entries in _caches.values():
        entries.clear()
