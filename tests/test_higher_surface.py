"""Nothing that code written against higher calls is missing from the bridge, and nothing takes
other arguments."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import innerloop.higher as bridge
from tests.higher_models import peer

MODULES = ("", ".optim", ".patch", ".utils")

GIT_HEAD = {
    ".optim": ("DifferentiableAdamW", "DifferentiableOptimizer.state_dict"),
    ".utils": ("_recursive_detach",),
}
"""What the release from PyPI lacks."""

PRIVATE = {
    ".optim": (
        "_get_mask_closure",
        "_maybe_mask",
        "_add",
        "_addcdiv",
        "_addcmul",
        "_opt_mapping",
        "_OverrideType",
    ),
    ".optim ": ("_GradCallbackType", "_GroupedGradsType", "_StateType"),
    ".patch": ("_MonkeyPatchBase",),
    ".utils": (
        "_recursive_map",
        "_copy_tensor",
        "_find_param_in_list",
        "_is_container",
        "_recursive_copy_and_cast",
    ),
}
"""Private names that higher's own tests and README, or other people's annotations, use."""


def modules(suffix: str) -> tuple[Any, Any]:
    peer()
    return importlib.import_module("higher" + suffix), importlib.import_module(
        "innerloop.higher" + suffix
    )


def public(module: Any) -> Iterator[str]:
    return (name for name in vars(module) if not name.startswith("_"))


@pytest.mark.parametrize("suffix", MODULES)
def test_no_public_name_is_missing(suffix: str) -> None:
    theirs, ours = modules(suffix)
    assert len(list(public(theirs))) > 1
    assert not set(public(theirs)) - set(dir(ours))


@pytest.mark.parametrize("names", [GIT_HEAD, PRIVATE])
def test_names_of_the_git_head_and_of_its_tests(names: dict[str, tuple[str, ...]]) -> None:
    for suffix, wanted in names.items():
        module = importlib.import_module("innerloop.higher" + suffix.strip())
        for name in wanted:
            found: Any = module
            for part in name.split("."):
                found = getattr(found, part)
            assert found is not None


def functions(module: Any) -> Iterator[tuple[str, Any]]:
    """Public functions, and constructors and methods of public classes."""
    for name in public(module):
        value = getattr(module, name)
        if inspect.isclass(value):
            yield from (
                (f"{name}.{key}", fn)
                for key, fn in inspect.getmembers(value, inspect.isfunction)
                if wanted(key)
            )
        elif inspect.isfunction(value):
            yield name, value


def wanted(method: str) -> bool:
    return not method.startswith("_") or method in ("__init__", "_update")


def incompatible(theirs: Any, ours: Any) -> list[str]:
    """Why a call that suits ``theirs`` may not suit ``ours``."""
    a, b = (list(inspect.signature(f).parameters.values()) for f in (theirs, ours))
    named = [p for p in a if p.kind is p.POSITIONAL_OR_KEYWORD]
    said = [p for p in b if p.kind is p.POSITIONAL_OR_KEYWORD]
    reasons = [
        f"argument {i} is {mine.name}={mine.default!r}, not {p.name}={p.default!r}"
        for i, (p, mine) in enumerate(zip(named, said, strict=False))
        if (p.name, p.default) != (mine.name, mine.default)
    ]
    if len(said) < len(named):
        reasons.append(f"{[p.name for p in named[len(said) :]]} are missing")
    reasons += [f"{p.name} has no default" for p in said[len(named) :] if p.default is p.empty]
    if any(p.kind is p.VAR_KEYWORD for p in a) and not any(p.kind is p.VAR_KEYWORD for p in b):
        reasons.append("other keywords are refused")
    return reasons


@pytest.mark.parametrize("suffix", MODULES)
def test_signatures_are_compatible(suffix: str) -> None:
    theirs, _ = modules(suffix)
    found = {}
    for name, function in functions(theirs):
        if (
            name.endswith("Optimizer.__init__")
            or ".__init__" not in name
            or "Differentiable" in name
        ):
            mine: Any = importlib.import_module("innerloop.higher" + suffix)
            for part in name.split("."):
                mine = getattr(mine, part)
            if not has_only_stars(function):
                found[name] = incompatible(function, mine)
    assert found
    assert not {name: reasons for name, reasons in found.items() if reasons}


def has_only_stars(function: Any) -> bool:
    """``__init__(self, *args, **kwargs)`` of a subclass says nothing."""
    return all(
        p.name == "self" or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in inspect.signature(function).parameters.values()
    )


def test_the_comparison_of_signatures_sees_differences() -> None:
    assert incompatible(lambda a, b=1: 0, lambda b, a=1: 0)
    assert incompatible(lambda a, b=1: 0, lambda a, b=2: 0)
    assert incompatible(lambda a, b=1: 0, lambda a: 0)
    assert incompatible(lambda a: 0, lambda a, b: 0)
    assert incompatible(lambda a, **k: 0, lambda a: 0)
    assert not incompatible(lambda a, b=1: 0, lambda a, b=1, c=2: 0)


def test_patched_modules_and_optimizers_have_all_attributes() -> None:
    found = []
    for library in (peer(), bridge):
        model = nn.Sequential(nn.LSTM(2, 3), nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with library.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
            objects = (fmodel, fmodel[0], fmodel[1], diffopt)
            found.append([{name for name in dir(x) if not name.startswith("_")} for x in objects])
    for theirs, ours in zip(*found, strict=True):
        assert not theirs - ours


def test_what_can_be_assigned_in_higher_can_be_assigned_here() -> None:
    written = []
    for library in (peer(), bridge):
        model = nn.Sequential(nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with library.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
            diffopt.step(fmodel(torch.ones(1, 3)).sum())
            names = {name for x in (fmodel, diffopt) for name in dir(x) if not name.startswith("_")}
            written.append(
                {name for name in names if assigned(fmodel, name) or assigned(diffopt, name)}
            )
    assert not written[0] - written[1]
    assert {"state", "param_groups", "fast_params", "track_higher_grads"} <= written[1]


def assigned(target: Any, name: str) -> bool:
    """Whether an attribute, of no method and no module, takes its own value."""
    value = getattr(target, name, None)
    if value is None or callable(value):
        return False
    try:
        setattr(target, name, value)
    except (AttributeError, ValueError):
        return False
    return True


def test_patched_parameters_take_the_same_arguments() -> None:
    theirs = type(peer().monkeypatch(nn.Linear(1, 1)))
    ours = bridge.PatchedModule
    assert list(inspect.signature(ours.parameters).parameters) == list(
        inspect.signature(theirs.parameters).parameters
    )
    assert inspect.signature(ours.parameters).parameters["time"].default is None
    assert (
        inspect.signature(ours.forward).parameters["params"].kind is inspect.Parameter.KEYWORD_ONLY
    )


def test_the_modules_are_modules() -> None:
    from innerloop.higher.optim import DifferentiableSGD
    from innerloop.higher.patch import monkeypatch
    from innerloop.higher.utils import flatten

    assert bridge.optim.DifferentiableSGD is DifferentiableSGD
    assert bridge.patch.monkeypatch is bridge.monkeypatch is monkeypatch
    assert bridge.utils.flatten is flatten


PROGRAM = """
import sys, warnings
import neighbour, higher, higher.patch
from higher import innerloop_ctx
from higher.optim import DifferentiableOptimizer
import torch

assert __name__ == "__main__" and sys.argv[1:] == ["--steps", "2"], sys.argv
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.ones_(model.weight)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
    for _ in range(int(sys.argv[2])):
        diffopt.step(fmodel(torch.ones(1, 1)).square().sum() / 2)
    fmodel(torch.ones(1, 1)).sum().backward()
print(higher.__name__, round(model.weight.grad.item(), 4), neighbour.NAME)
"""


def _run_program(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "innerloop.higher", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_unmodified_program_runs_on_the_bridge(tmp_path: Path) -> None:
    place = tmp_path / "programs"
    place.mkdir()
    (place / "program.py").write_text(PROGRAM)
    (place / "neighbour.py").write_text("NAME = 'beside it'")
    for where, arguments in ((tmp_path, ["programs/program.py"]), (place, ["-m", "program"])):
        done = _run_program(where, *arguments, "--steps", "2")
        assert done.stdout == "innerloop.higher 0.81 beside it\n", done.stderr


def test_which_program_must_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("innerloop.higher.__main__").main
    for arguments, code, text in (
        ([], 2, "usage: python -m innerloop.higher"),
        (["--help"], 0, "usage: python -m innerloop.higher"),
        (["missing.py"], 2, "there is no file missing.py"),
    ):
        assert main(arguments) == code
        seen = capsys.readouterr()
        assert text in (seen.err if code else seen.out)
