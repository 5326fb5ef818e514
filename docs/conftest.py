"""The migration pages run other libraries beside this one: what those warn of is theirs, and a page
whose peer is missing is skipped.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

collect_ignore = ["offline_mathjax.py", "reference.py"]  # extensions of Sphinx

PEERS = {
    "migration-from-betty.md": ["betty"],
    "migration-from-higher.md": ["higher"],
    "migration-from-jax.md": ["jax", "jaxopt", "optax"],
    "migration-from-torchopt.md": ["torchopt"],
}
WARNINGS = {
    # higher takes the square root of a tensor by `math.sqrt`; the page says what that does to the
    # derivative
    "migration-from-higher.md": "ignore:Converting a tensor with requires_grad=True to a scalar",
    # JAXopt says at its import that it is no longer maintained; so does the page
    "migration-from-jax.md": "ignore:JAXopt is no longer maintained",
    "migration-from-torchopt.md": "ignore:We.ve integrated functorch into PyTorch",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the pages, wherever the session was started."""
    for item in items:
        page = item.path.name
        missing = [peer for peer in PEERS.get(page, []) if find_spec(peer) is None]
        if missing:
            item.add_marker(
                pytest.mark.skip(reason=f"needs {', '.join(missing)}: see PEERS in the Makefile")
            )
        if page in WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(WARNINGS[page]))
