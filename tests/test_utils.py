"""The parts that would make sense without training loops: caches, tables, how code is being run."""

from __future__ import annotations

from collections.abc import MutableMapping

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from innerloop._utils import caches
from innerloop._utils.execution import Mode, may_call_autograd, may_read_values, mode
from innerloop._utils.text_table import table

# -- caches ----------------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A register of caches of its own, which the test may fill."""
    monkeypatch.setattr(caches, "_caches", {})


@pytest.mark.usefixtures("registered")
def test_a_cache_is_counted_and_cleared():
    squares: MutableMapping[int, int] = caches.cache("squares")
    cubes: MutableMapping[int, int] = caches.cache("cubes")
    squares.update({2: 4, 3: 9})
    cubes[2] = 8
    assert caches.sizes() == {"squares": 2, "cubes": 1}
    caches.clear()
    assert caches.sizes() == {"squares": 0, "cubes": 0}
    squares[4] = 16  # it still is the registered one
    assert caches.sizes()["squares"] == 1


@pytest.mark.usefixtures("registered")
def test_a_weak_cache_forgets_with_its_key():
    class Key:
        pass

    names: MutableMapping[Key, str] = caches.cache("names", weak=True)
    kept, dropped = Key(), Key()
    names[kept], names[dropped] = "kept", "dropped"
    assert caches.sizes() == {"names": 2}
    del dropped
    assert list(names.values()) == ["kept"]


@pytest.mark.usefixtures("registered")
def test_two_caches_cannot_have_one_name():
    caches.cache("twice")
    with pytest.raises(ValueError, match="'twice' already"):
        caches.cache("twice")


def test_each_test_begins_with_empty_caches():
    assert set(caches.sizes().values()) == {0}


# -- tables ----------------------------------------------------------------------------------------


def test_columns_are_as_wide_as_their_widest_cell():
    assert table([["a", "b", "c"], ["long", "", "x"]]).splitlines() == ["a     b  c", "long     x"]


def test_numbers_may_stand_on_the_right():
    lines = table([["a", "5"], ["b", "10"]], header=["name", "n"], align="<>", rule=True)
    assert lines.splitlines() == ["name   n", "----  --", "a      5", "b     10"]


def test_a_markdown_table():
    lines = table([["a", "5"], ["b", "10"]], header=["name", "n"], align="<>", markdown=True)
    assert lines.splitlines() == [
        "| name |  n |",
        "| ---- | -: |",
        "| a    |  5 |",
        "| b    | 10 |",
    ]


def test_lines_do_not_end_with_spaces():
    assert table([["a", ""], ["b", "c"]]).splitlines()[0] == "a"


def test_no_rows_are_no_table():
    assert table([]) == ""
    assert table([], header=["a", "b"]) == "a  b"


# -- how the code is being run ---------------------------------------------------------------------

ONE = torch.tensor(1.0)


def seen_inside(transform: str) -> Mode:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(mode())
        assert may_call_autograd() is (mode() is Mode.EAGER)
        return x * x

    if transform == "none":
        look(ONE)
    elif transform == "vmap":
        torch.func.vmap(look)(ONE.expand(2))
    elif transform == "jvp":
        torch.func.jvp(look, (ONE,), (ONE,))
    elif transform == "dual numbers":
        with forward_ad.dual_level():
            look(forward_ad.make_dual(ONE, ONE))
    else:
        torch.func.grad(look)(ONE)
    return seen[0]


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad", "dual numbers"])
def test_every_transform_is_seen(transform: str):
    assert seen_inside(transform) is Mode.TRANSFORMED


def test_plain_code_is_eager():
    assert seen_inside("none") is Mode.EAGER


@pytest.mark.compiled
def test_the_compiler_takes_precedence():
    def which(x: Tensor) -> Tensor:
        assert not may_call_autograd()
        assert not may_read_values(x)
        return x + (1 if mode() is Mode.COMPILING else 0)

    compiled = torch.compile(which, fullgraph=True, backend="eager")
    assert compiled(ONE) == 2
    assert torch.compile(torch.func.vmap(which), backend="eager")(ONE.expand(2)).tolist() == [2, 2]


def test_values_can_be_read_unless_each_task_has_its_own():
    seen = {}

    def look(x: Tensor, key: str) -> Tensor:
        seen[key] = may_read_values(x)
        return x

    look(ONE, "eager")
    torch.func.grad(lambda x: look(x, "grad"))(ONE)
    torch.func.vmap(lambda x: look(x, "vmap"))(ONE.expand(2))
    look(torch.ones((), device="meta"), "elsewhere")
    assert seen == {"eager": True, "grad": True, "vmap": False, "elsewhere": False}
