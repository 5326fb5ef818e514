"""Shared fixtures, and the checking of types at run time.

The annotations of the package are executed: every call of a function of ``innerloop`` checks its arguments and its result (beartype
by way of jaxtyping's import hook). ``torch.compile`` cannot trace the wrappers that do this, so the tests that compile carry the
marker ``compiled`` and run in a session of their own, ``pytest -m compiled``, without the hook.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch

from tests import type_checker

_hook = pytest.StashKey[Any]()


def pytest_configure(config: pytest.Config) -> None:
    """Install the hook before anything imports the package, unless the session was asked for the tests that compile."""
    asked = config.option.markexpr
    if not re.search(r"\bcompiled\b", re.sub(r"\bnot compiled\b", "", asked)):
        config.stash[_hook] = jaxtyping.install_import_hook(checked_modules(), f"{type_checker.__name__}.checked")


def checked_modules() -> list[str]:
    """All but the walkers of pytrees: called for every node of every tree, they alone would double the time of the suite."""
    spec = importlib.util.find_spec("innerloop")
    assert spec is not None
    found = [module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)]
    return [f"innerloop.{name}" for name in found if name != "tree"]


def pytest_unconfigure(config: pytest.Config) -> None:
    if _hook in config.stash:
        config.stash[_hook].uninstall()


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """``torch.optim`` keeps some of its scalars in the default dtype: parity is measured in float64."""
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
