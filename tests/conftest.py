"""Shared fixtures, and the checking of types at run time.

The annotations of the package are executed under ``pytest --types``: every call of a function of
``innerloop`` checks its arguments and its result (beartype by way of jaxtyping's import hook). It
multiplies the time of a test by 1.2 to 3, so `make test` does it for the first setting of each test
that has several (``--types=first``), and `make slow` for all. ``torch.compile`` cannot trace the
wrappers that check, so tests with the marker ``compiled`` are left out there.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import logging
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

from tests import type_checker

_hook = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--types",
        choices=["first", "all"],
        help="check types at run time: in the first setting of each parametrized test, or in all",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Install the hook, if it was asked for, before anything imports the package."""
    if config.getoption("--types"):
        config.stash[_hook] = jaxtyping.install_import_hook(
            checked_modules(), f"{type_checker.__name__}.checked"
        )


FOLDER = Path(importlib.util.find_spec("innerloop").submodule_search_locations[0])  # type: ignore[union-attr, index]
NOT_CHECKED = {
    "innerloop._utils.tree",
    "innerloop.optim._adapt.interpreter",
    "innerloop.optim._adapt.number",
    "innerloop.optim._adapt.pure_calls",
    "innerloop.optim._engine.packing",
}
"""Called for every node of every tree, every operation of a foreign optimizer, and every parameter
at every step: they alone would double the time of the suite."""

UNCHECKED_FILES = {
    # What they run, they run in other processes, which do not see the hook.
    "test_contributing.py",
    "test_fuzz.py",
    "test_reference.py",
    "test_rl_killed.py",
    # Most of their time passes in modules that are not checked; test_adapt_packages.py calls the
    # others.
    "test_adapt.py",
    # They count objects.
    "test_track_memory.py",
}
UNCHECKED_TESTS = {
    # What they run, they run in other processes.
    "test_a_loop_that_is_interrupted_gives_the_same_bits",
    "test_several_processes_equal_one",
    # They measure memory, count objects, or free long graphs; others call the same functions.
    "test_a_long_graph_is_freed_in_any_order",
    "test_episodes_leave_no_objects",
    "test_episodes_leave_no_objects_behind",
    "test_episodes_that_use_transforms_leave_what_can_be_collected",
    "test_the_memory_is_that_of_one_part",
    "test_the_memory_of_64_chunks_is_at_most_1_3_of_that_of_8",
}
"""Files and tests that `--types=first` leaves out: they take long, and could find little."""


def checked_modules(package: str = "innerloop", folder: Path = FOLDER) -> list[str]:
    """Modules and packages that hold none of those; a package stands for all that is in it. Nothing
    is imported here."""
    names = [f"{package}.{found.name}" for found in pkgutil.iter_modules([str(folder)])]
    whole = [name for name in names if not any(skipped.startswith(name) for skipped in NOT_CHECKED)]
    parts = [
        name for name in names if any(skipped.startswith(f"{name}.") for skipped in NOT_CHECKED)
    ]
    return whole + [
        name for part in parts for name in checked_modules(part, folder / part.rpartition(".")[2])
    ]


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_slow(items)
    # Looking through all objects is rarely worth it: the compiler makes millions, and keeps them.
    gc.set_threshold(700, 10, 100)
    # The compiler writes down what it does, and pytest would keep it for each test.
    logging.getLogger("torch.__trace").propagate = False
    # The compiler leaves objects and settings behind, and some tests count objects: it comes last.
    items.sort(key=lambda item: item.get_closest_marker("compiled") is not None)
    if types := config.getoption("--types"):
        kept = first_settings(items) if types == "first" else items
        items[:] = [item for item in kept if not item.get_closest_marker("compiled")]


def first_settings(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the first default setting of each test that has several."""
    found: dict[str, pytest.Item] = {}
    for item in items:
        if item.path.name in UNCHECKED_FILES or item.get_closest_marker("slow"):
            continue
        if getattr(item, "originalname", "") in UNCHECKED_TESTS:
            continue
        if hasattr(item, "callspec"):
            found.setdefault(item.nodeid.partition("[")[0], item)
    return list(found.values())


def mark_slow(items: list[pytest.Item]) -> None:
    """Mark as slow what a test marked `covering` need not run by default."""
    grids: dict[str, list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            continue
        if isinstance(item, pytest.Function) and item.get_closest_marker("covering"):
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for grid in grids.values():
        marker = grid[0].get_closest_marker("covering")
        assert marker is not None
        wanted = [combinations(item, *marker.args) for item in grid]
        chosen = set(covering(wanted))
        for i, item in enumerate(grid):
            if i not in chosen:
                item.add_marker(pytest.mark.slow)


def combinations(item: pytest.Function, together: int = 1) -> set[tuple[tuple[str, int], ...]]:
    """Return the values of a test's parameters, or its pairs of them (``together=2``)."""
    # The values of a grid are the same objects in all of its tests; few can be hashed.
    values = sorted((name, id(value)) for name, value in item.callspec.params.items())
    return set(itertools.combinations(values, min(together, len(values))))


def covering(sets: list[set[Any]]) -> list[int]:
    """Choose a few of the sets, greedily and in order, that hold all there is in any of them."""
    left, chosen = set().union(*sets), []
    while left:
        best = max(range(len(sets)), key=lambda i: len(left & sets[i]))
        chosen.append(best)
        left -= sets[best]
    return chosen


def pytest_unconfigure(config: pytest.Config) -> None:
    if _hook in config.stash:
        config.stash[_hook].uninstall()


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    if torch.accelerator.is_available():
        torch.manual_seed(0)
    else:  # where it formats a stack for each kind of accelerator that there might be
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_left_from_other_tests() -> None:
    from innerloop._utils import caches  # not before the hook is installed

    caches.clear()


@pytest.fixture(autouse=True)
def _nothing_left_switched() -> Iterator[None]:
    """What a test, or the code that it calls, switches in this thread is switched back."""
    yield
    hooks = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    torch._C._autograd._saved_tensors_hooks_enable()
    assert hooks is None, "hooks on saved tensors are still forbidden"
    assert torch.is_grad_enabled()
    assert torch._C._functorch.peek_interpreter_stack() is None, "inside of a transform"
    assert not torch.overrides._get_current_function_mode_stack(), "a function mode is still on"
    blocks = sys.modules.get("innerloop._inner_gradient.block")
    if blocks is not None and blocks.readable() is not None:
        blocks._thread.modules = None
        raise AssertionError("checkpoints of this thread still run as blocks of a loop")


@pytest.fixture
def float64() -> Iterator[None]:
    """``torch.optim`` keeps some of its scalars in the default dtype: parity is measured in
    float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def types_unchecked() -> Iterator[None]:
    """For tests that pass what the annotations forbid, to see the error that a user gets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
