"""With which backend of PyTorch's compiler a test runs."""

from __future__ import annotations

import pytest
from torch._dynamo import lookup_backend

from innerloop._utils import compiling


def trace_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler trace without generating code, until the end of the test."""
    monkeypatch.setattr(compiling, "BACKEND", lookup_backend("aot_eager"))


def generates_code(config: pytest.Config) -> bool:
    """True under `make compiled`, which generates code for all tests not marked ``traced``."""
    return bool(config.getoption("markexpr").startswith("compiled"))
