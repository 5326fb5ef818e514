"""The shape of the package: who may import whom, what importing it costs, and what it promises to
offer."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import innerloop

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "innerloop"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Each row may import the rows above it, and its own row as long as no cycle arises.
LAYERS = (
    ("errors", "differences", "tree", "graph", "random_state", "batches", "progress", "_private"),
    ("module", "nn", "optim"),
    ("problem",),
    ("trajectory",),
    ("strategy",),
    ("unroll", "check"),
    ("track",),
    ("inspect", "plan", "doctor", "higher", "rl"),
    ("walkthrough",),
    ("cli", "__main__"),
)
LAYER = {name: depth for depth, row in enumerate(LAYERS) for name in row}

OPTIONAL = (
    "gymnasium",
    "higher",
    "jax",
    "matplotlib",
    "numpy",
    "optree",
    "scipy",
    "sklearn",
    "torchopt",
    "tqdm",
)
"""Packages that ``import innerloop`` does not bring in, beyond those that torch itself does."""

PUBLIC = """
    check_metagradient Auto Checkpointed FirstOrder ForwardMode functional higher inspect metagradient optim plan
    Problem StoreAll strategy Truncated
    track Trajectory unroll
    CapturedTensorError InnerLoopError MetaGradientError NotDifferentiableError
    optim.Optimizer optim.adam optim.adamw optim.from_torch optim.groups optim.sgd
    inspect.jacobian inspect.paths
    higher.innerloop_ctx higher.optim.DifferentiableSGD higher.register_optim
    Problem.from_module
    Trajectory.at
    strategy.StoreAll
""".split()


# -- reading imports off the source ----------------------------------------------------------------


def module_name(path: Path) -> str:
    """``innerloop.optim.sgd`` for ``src/innerloop/optim/sgd.py``, ``innerloop.optim`` for its
    ``__init__``."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names of everything that a source imports, wherever in the file: a lazy import is a
    dependence too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = module.split(".")
                anchor = anchor[: len(anchor) - node.level + is_package]
                base = ".".join([*anchor, base] if base else anchor)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """``optim`` for ``innerloop.optim.sgd.SGD``; the empty string for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYER else ""


def imports_of(path: Path) -> set[str]:
    return set(imported(path.read_text(), module_name(path), path.name == "__init__.py"))


def dependences() -> dict[str, set[str]]:
    """Room -> rooms that it imports; the package's own ``__init__`` is left out, it gathers
    everything."""
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        if path == PACKAGE / "__init__.py":
            continue
        here = room(module_name(path))
        inside = {room(name) for name in imports_of(path) if name.split(".")[0] == "innerloop"}
        found.setdefault(here, set()).update(inside - {here})
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn as nn", {"torch.nn"}),
        ("from innerloop.optim import sgd", {"innerloop.optim.sgd"}),
        ("from . import base", {"innerloop.optim.base"}),
        ("from .base import Rule", {"innerloop.optim.base.Rule"}),
        ("from ..tree import map", {"innerloop.tree.map"}),
        ("def f():\n    from innerloop import unroll", {"innerloop.unroll"}),
    ],
)
def test_the_reader_of_imports_sees_every_form(source: str, expected: set[str]) -> None:
    assert set(imported(source, "innerloop.optim.sgd", is_package=False)) == expected


# -- direction -------------------------------------------------------------------------------------


def test_every_module_has_a_place_in_the_order() -> None:
    unplaced = (
        {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES}
        - set(LAYER)
        - {"__init__"}
    )
    assert not unplaced, f"give these a row in LAYERS (tests/test_structure.py): {sorted(unplaced)}"


def test_imports_point_one_way() -> None:
    upwards = [
        f"{here} imports {there or 'the package itself'}"
        for here, theirs in dependences().items()
        for there in theirs
        if LAYER.get(there, len(LAYERS)) > LAYER[here]
        and (there or LAYER[here] < LAYER["walkthrough"])
    ]
    assert not upwards


def test_there_are_no_cycles() -> None:
    graphlib.TopologicalSorter(dependences()).prepare()


@pytest.mark.parametrize("folder", ["optim", "strategy"])
def test_the_files_of_a_folder_form_no_cycle(folder: str) -> None:
    graph: dict[str, set[str]] = {}
    names = {module_name(path) for path in (PACKAGE / folder).rglob("*.py")}
    for path in (PACKAGE / folder).rglob("*.py"):
        theirs = {name if name in names else name.rpartition(".")[0] for name in imports_of(path)}
        graph[module_name(path)] = theirs & names - {module_name(path)}
    assert graph
    graphlib.TopologicalSorter(graph).prepare()


def test_no_strategy_knows_the_loop_and_no_optimizer_knows_a_strategy() -> None:
    found = dependences()
    assert not found["strategy"] & {"unroll", "track"}
    assert not found["optim"] & {"strategy", "problem", "trajectory", "unroll", "track"}


def test_the_package_knows_neither_its_tests_nor_its_examples_nor_its_benchmarks() -> None:
    outside = {"benchmarks", "docs", "examples", "tests"}
    assert not {
        name for path in SOURCES for name in imports_of(path) if name.split(".")[0] in outside
    }


# -- private names of torch ------------------------------------------------------------------------


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def dotted(node: ast.AST) -> str:
    """``torch._C._functorch`` for the attribute chain that spells it, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def private_torch(source: str) -> set[str]:
    """Private names below ``torch`` that a source imports or spells out."""
    names = set(imported(source, "innerloop.x", is_package=False))
    names |= {
        dotted(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
    }
    return {
        name
        for name in names
        if name.split(".")[0] == "torch" and any(map(is_private, name.split(".")))
    }


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._functorch.peek_interpreter_stack()",
        "from torch.utils import _pytree",
        "import torch.utils._pytree as pytree",
        "from torch._functorch import x",
        "def f():\n    import torch._dynamo",
        "import torch\ntorch._foreach_add([], [])",
    ],
)
def test_the_search_for_private_names_finds_every_form(source: str) -> None:
    assert private_torch(source)


def test_private_names_of_torch_have_one_room() -> None:
    users = {path.name: private_torch(path.read_text()) for path in SOURCES}
    assert users.pop("_private.py"), "_private.py is there for nothing"
    assert not {name: found for name, found in users.items() if found}


# -- what importing costs --------------------------------------------------------------------------


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout


def test_importing_brings_in_no_optional_package() -> None:
    code = """
import sys, torch
packages = lambda: {name.split(".")[0] for name in sys.modules}
before = packages()
import innerloop
print(*sorted(packages() - before))
"""
    brought = run_python(code).split()
    assert "innerloop" in brought
    assert not set(brought) & set(OPTIONAL)


# -- what is promised ------------------------------------------------------------------------------


def resolve(name: str) -> object:
    """The object behind a dotted public name; a module of the package may still have to be
    imported."""
    found: object = innerloop
    for part in name.split("."):
        if inspect.ismodule(found) and not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_exists_and_says_what_it_is(name: str) -> None:
    assert inspect.getdoc(resolve(name))


def test_everything_exported_exists() -> None:
    assert set(innerloop.__all__) <= set(dir(innerloop))
    assert sorted(set(innerloop.__all__)) == sorted(innerloop.__all__)


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()


def modules() -> list[str]:
    """Every public module of the package."""
    names = [info.name for info in pkgutil.walk_packages(innerloop.__path__, "innerloop.")]
    return [
        name
        for name in names
        if not any(map(is_private, name.split("."))) and not name.endswith("__main__")
    ]


@pytest.mark.parametrize("name", modules())
def test_public_members_are_described(name: str) -> None:
    """A method may inherit its description from the class that declares it."""
    module = importlib.import_module(name)
    assert module.__doc__
    own = [
        obj
        for key, obj in vars(module).items()
        if not is_private(key) and getattr(obj, "__module__", "") == name
    ]
    described = [obj for obj in own if inspect.isroutine(obj) or inspect.isclass(obj)]
    silent = [obj.__qualname__ for obj in described if not inspect.getdoc(obj)]
    for cls in filter(inspect.isclass, described):
        methods = [
            key
            for key, value in vars(cls).items()
            if not key.startswith("_") and inspect.isfunction(value)
        ]
        silent += [
            f"{cls.__qualname__}.{key}" for key in methods if not inspect.getdoc(getattr(cls, key))
        ]
    assert not silent


def exported(module: ModuleType) -> Iterator[str]:
    """``optim.sgd`` and the like: what ``__all__`` names, and what the modules named there export
    in turn."""
    for name in vars(module)["__all__"]:
        value = getattr(module, name)
        if inspect.ismodule(value):
            yield from (f"{name}.{inner}" for inner in getattr(value, "__all__", ()))
        else:
            yield name


@pytest.mark.parametrize("name", tuple(exported(innerloop)))
def test_exported_name_is_in_the_reference(name: str) -> None:
    reference = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(r"auto\w+:: innerloop\.(\S+)", reference)
    value = resolve(name)
    by_module = getattr(value, "__module__", "").removeprefix("innerloop.") in shown
    assert by_module or any(value is resolve(other) for other in shown), f"add {name} to docs/api"
