"""The checksum of a value: the same for the same bits, another for any others."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from innerloop._utils.digest import digest

SCALE = 2.0


class Pair(NamedTuple):
    a: Any
    b: Any


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


def scaled(x: Any) -> Any:
    return x * SCALE


def calling(x: Any) -> Any:
    return scaled(x) + 1


def captured(value: Any) -> Any:
    return lambda x: x + value


DIFFERENT: list[Any] = [
    None,
    False,
    0,
    0.0,
    -0.0,
    1,
    1.0,
    "1",
    b"1",
    [1],
    (1,),
    [1, 2],
    [[1], 2],
    {"a": 1},
    {"a": 2},
    {"b": 1},
    {"a": 1, "b": 2},
    {"b": 2, "a": 1},
    Pair(1, 2),
    (1, 2),
    {1, 2},
    torch.zeros(2),
    torch.zeros(2).double(),
    torch.zeros(2, 1),
    -torch.zeros(2),
    torch.zeros(3),
    torch.tensor([0.0, 1e-45]),
    torch.zeros(()),
    torch.zeros(0),
    torch.zeros(2, dtype=torch.bfloat16),
    torch.zeros(2, dtype=torch.complex64),
    np.zeros(2),
    np.zeros(2, dtype=np.float32),
    torch.float32,
    Plain(1),
    Plain(2),
    nn.Linear(2, 1),
    nn.Linear(2, 1).eval(),
    nn.Dropout(0.1),
    nn.Dropout(0.2),
    lambda x: x + 1,
    lambda x: x + 2,
    lambda x: x - 1,
    lambda x, y=1: x + 1,
    captured(1),
    captured(2),
    captured(torch.ones(2)),
    captured(torch.zeros(2)),
    captured(captured(1)),
    captured(captured(2)),
    captured([torch.ones(2)]),
    captured([torch.zeros(2)]),
    scaled,
    calling,
    functools.partial(captured, 1),
    functools.partial(captured, 2),
    torch.sin,
    torch.cos,
]


def test_different_values_have_different_checksums():
    found = [digest(value) for value in DIFFERENT]
    assert len(set(found)) == len(found)
    assert all(len(text) == 32 for text in found)


def test_equal_values_have_equal_checksums():
    for value in DIFFERENT:
        assert digest(value) == digest(copy.deepcopy(value))


@pytest.mark.parametrize("name", ["scaled", "calling"])
def test_a_constant_that_a_function_reads_counts(name: str, monkeypatch: pytest.MonkeyPatch):
    function = globals()[name]
    before = digest(function)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert digest(function) != before
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert digest(function) == before


def test_a_log_of_earlier_calls_does_not_count():
    log: list[float] = []
    function = captured(log)
    before = digest(function)
    log.append(1.0)
    assert digest(function) == before


def test_what_holds_itself_has_a_checksum():
    ring: list[Any] = [1]
    ring.append(ring)
    nested: Any = 0
    for _ in range(1000):
        nested = [nested]
    assert digest(ring) != digest([1])
    assert digest(nested)
