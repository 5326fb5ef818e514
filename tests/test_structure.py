"""The shape of the package: who may import whom, where things may stand, what importing costs, and
what is promised.

The checks read the source, so they see lazy imports and code that no test runs. Each returns the
places that break a rule, and each is tried on a source that breaks it.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import innerloop
from innerloop import Problem, Trajectory
from innerloop.strategy import Strategy

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "innerloop"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Each row may import the rows above it, and its own row as long as no cycle arises.
ROWS = (
    ("errors", "_types"),
    ("_utils",),
    ("nn",),
    ("optim",),
    ("_batches", "_carry"),
    ("_module",),
    ("_inner_gradient",),
    ("_functional", "_micro_batches", "_problem", "_trajectory"),
    ("_outer_state",),
    ("higher",),
    ("doctor",),
    ("_linear",),
    ("strategy",),
    ("_unroll", "_plan"),
    ("_check", "_fast_weights"),
    ("_track",),
    ("_metagradient",),
    ("inspect",),
    ("walkthrough",),
    ("rl",),
    ("cli",),
)
UPWARDS = {
    ("innerloop.nn", "innerloop._fast_weights"): "a layer is made of the loop; `innerloop` imports "
    "this package first, so that the files below find its other modules",
}
"""Public packages that export something of a later row, and why that is no cycle."""
ROW = {name: depth for depth, row in enumerate(ROWS) for name in row}

PUBLIC_MODULES = {"innerloop"} | {
    f"innerloop.{name}"
    for name in """
        cli doctor errors higher higher.__main__ higher.optim higher.patch higher.utils inspect nn
        nn.functional optim optim.helpers rl rl.envs rl.meta rl.ppo strategy strategy.solvers
        walkthrough
    """.split()
}

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
    check_metagradient Auto Checkpointed FirstOrder ForwardMode functional higher inspect
    metagradient optim plan Problem StoreAll strategy Truncated
    track Trajectory unroll
    CapturedTensorError InnerLoopError MetaGradientError NotDifferentiableError
    optim.Optimizer optim.adam optim.adamw optim.from_torch optim.groups optim.sgd
    inspect.jacobian inspect.paths
    higher.innerloop_ctx higher.optim.DifferentiableSGD higher.register_optim
    Problem.from_module
    Trajectory.at
    strategy.StoreAll
""".split()

EXPORTED = {
    "": """
        Auto CapturedTensorError Carry Checkpointed Evolution FirstOrder ForwardMode Implicit
        InnerLoopError
        InvalidInputError MetaGradientError MissingExtraError NotDifferentiableError Plan
        PrecisionWarning Problem StoreAll Trajectory Truncated assign check_metagradient functional
        higher implicit_root inspect metagradient nn optim plan strategy track unroll
    """,
    "optim": """
        ASGD LBFGS SGD ASGDState AccumulateState Adadelta AdadeltaState Adafactor AdafactorState
        Adagrad AdagradState Adam AdamState AdamW Adamax AdamaxState Adapted AdaptedState
        AddNoiseState ChainState Elementwise Hyper InFloat32State LBFGSState LearnedState Muon
        MuonState NAdam NAdamState Optimizer Packed PerTensor RAdam RAdamState RMSprop RMSpropState
        Rprop RpropState Rule SGDState SparseAdam SparseAdamState Support Supported SupportedList
        Transform accumulate adadelta adafactor adagrad adam adamax adamw adapt
        add_decayed_weights add_noise asgd chain clip_by_global_norm clip_by_value
        clip_per_parameter from_torch grad_callback groups in_float32 lbfgs learned muon nadam
        radam rmsprop rprop scale sgd sparse_adam supported
    """,
    "strategy": """
        Auto Checkpointed Evolution FirstOrder ForwardMode Implicit Loop StoreAll Strategy Truncated
        solvers
    """,
    "strategy.solvers": "CG Dense FixedPoint GMRES Neumann NormalCG",
    "nn.functional": """
        batch_norm cdist cholesky_inverse cross_entropy ctc_loss embedding_bag grid_sample
        hardsigmoid huber_loss instance_norm layer_norm mse_loss multi_margin_loss
        multilabel_margin_loss pdist scaled_dot_product_attention soft_margin_loss weight_norm
    """,
    "inspect": "Paths jacobian paths",
    "rl": """
        Advantages Categorical Gaussian Minibatch ObservationNormalizer PPOLoss RewardNormalizer
        Rollout check_objective check_separate discounted_returns gae lambda_returns
        minibatch_order next_values ppo_loss score_term surrogate
    """,
    "higher": """
        DifferentiableOptimizer PatchedModule create_diff_optim get_diff_optim innerloop_ctx
        monkeypatch optim patch register_optim utils
    """,
}
"""What each module exported before its files moved into their rooms: these names stay."""

TORCH_STRINGS = {
    "_buffers",
    "_compiled_call_impl",
    "_forward_cls",
    "_modules",
    "_orig_mod",
    "_parameters",
}
"""Private attributes of torch's objects: a string can name them as well as an attribute can."""

CALLS_AUTOGRAD = {
    "_inner_gradient/gradient.py": "the gradient of the inner loss",
    "_check.py": "the outer gradient of a checked loop",
    "_inner_gradient/block.py": "the pullback of a part of a loss that runs again",
    "_linear/": "second derivatives: it differentiates a gradient, not a loss",
    "_utils/torch_private.py": "what the gradient of the inner loss calls",
    "doctor/_model.py": "the derivatives of a model under audit; there is no loop",
    "doctor/_probe.py": "derivatives of one operation under audit; there is no loop",
    "higher/_context.py": "the outer gradient of the bridge",
    "_micro_batches.py": "the pullback of a loss in parts",
    "_track/replay.py": "the pullback of one step that runs again",
    "inspect/": "derivatives between two times of a finished loop",
    "optim/_adapt/verify.py": "a foreign step against finite differences of itself",
    "strategy/_base.py": "the outer gradient",
    "strategy/_engine/": "the pullback of one step",
    "strategy/_one_step.py": "one mixed derivative of the inner loss",
    "strategy/_forward_mode.py": "the partial derivatives of the outer loss",
    "strategy/_outer_gradient.py": "the outer gradient",
    "walkthrough/_by_autograd.py": "every derivative of the worked example, one by one",
}
"""Files and folders that call ``torch.autograd.grad``, and what they differentiate."""

REGISTRIES = {
    "_utils/caches.py:_caches": "the list of the caches themselves",
    "_utils/folder_lock.py:_held": "the folders that this process holds, emptied as it lets go",
    "_utils/tree.py:_nodes": "pytree nodes: what a user registered cannot be recomputed",
    "higher/optim.py:_opt_mapping": "the bridge's optimizers, with those that a user registered",
    "_inner_gradient/block.py:_references": "a constant of the interpreter, found when asked for",
    "doctor/_cases/all_cases.py:all_cases": "a constant table, built when it is first asked for",
    "strategy/_engine/schedule.py": "binomial schedules: functions of two integers",
    "_inner_gradient/graph.py:_refusing": "the threads that are inside of a block, emptied by it",
    "_module/edits.py:_watching": "the loops whose block is running, emptied by their ends",
    "_utils/torch_private.py:_forward_thread": "the thread that holds forward mode, emptied by it",
    "_utils/torch_private.py:_preparing": "the one thread that prepares the compiler",
}
"""What is kept at module level and is no cache: facts that nothing recomputes, or pure numbers."""

OPENERS = ("The", "A", "An", "Whether", "What", "That", "One")
PLAIN_ANY, NESTED_ANY = 0.05, 0.10


# -- reading the source ----------------------------------------------------------------------------


def inside(path: Path) -> str:
    """Name a file by its path inside the package."""
    return path.relative_to(PACKAGE).as_posix()


def module_name(path: Path) -> str:
    """``innerloop.optim._base`` for ``src/innerloop/optim/_base.py``, ``innerloop.optim`` for its
    ``__init__``."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(source: str | ast.Module, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names of everything that a source imports, wherever in the file: a lazy import is a
    dependence too."""
    for node in ast.walk(ast.parse(source) if isinstance(source, str) else source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = module.split(".")
                anchor = anchor[: len(anchor) - node.level + is_package]
                base = ".".join([*anchor, base] if base else anchor)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    return set(imported(tree_of(path), module_name(path), path.name == "__init__.py"))


def dependences() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, file by file."""
    names = {module_name(path) for path in SOURCES}
    return {
        module_name(path): {
            name if name in names else name.rpartition(".")[0]
            for name in imports_of(path)
            if name.split(".")[0] == "innerloop"
        }
        - {module_name(path)}
        for path in SOURCES
    }


def room(module: str) -> str:
    """``optim`` for ``innerloop.optim._base``; the empty string for the package itself."""
    return f"{module}.".split(".")[1]


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def is_hidden(name: str) -> bool:
    """True if any part of a dotted name starts with an underscore."""
    return any(map(is_private, name.split(".")))


def dotted(node: ast.AST) -> str:
    """``torch._C._functorch`` for the attribute chain that spells it, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


@functools.cache
def modules() -> tuple[str, ...]:
    """Every module of the package, with an underscore or without."""
    found = pkgutil.walk_packages(innerloop.__path__, "innerloop.")
    return ("innerloop", *(info.name for info in found))


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


def upwards(graph: Mapping[str, set[str]]) -> list[str]:
    """Arrows that point from a row to one below it, or to the package itself."""
    return sorted(
        f"{here} imports {there}"
        for here, theirs in graph.items()
        for there in theirs
        if here != "innerloop"
        and (here, there) not in UPWARDS
        and room(here) != "rl"
        and (ROW.get(room(there), len(ROWS)) > ROW[room(here)])
        and (room(there) or ROW[room(here)] < ROW["walkthrough"])
    )


def test_every_module_has_a_place_in_the_order() -> None:
    unplaced = {room(module) for module in modules()} - set(ROW) - {""}
    assert not unplaced, f"give these a row in ROWS (tests/test_structure.py): {sorted(unplaced)}"


def test_imports_point_one_way() -> None:
    assert upwards({"innerloop.optim._base": {"innerloop.strategy._auto"}})
    assert upwards({"innerloop._check": {"innerloop"}})
    assert not upwards(dependences())


def test_there_are_no_cycles() -> None:
    """File by file, in the whole package. A package's ``__init__`` gathers its files, so no file
    may import a name from the ``__init__`` of a package it lies in."""
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    below = {here: theirs - {"innerloop"} for here, theirs in dependences().items()}
    graphlib.TopologicalSorter(below).prepare()


def test_no_strategy_knows_the_loop_and_no_optimizer_knows_a_strategy() -> None:
    rooms: dict[str, set[str]] = {}
    for here, theirs in dependences().items():
        rooms.setdefault(room(here), set()).update(map(room, theirs))
    assert not rooms["strategy"] & {"_unroll", "_track", "_metagradient"}
    assert not rooms["optim"] & {"strategy", "_problem", "_trajectory", "_unroll", "_track"}


def is_alternative(module: str) -> bool:
    """True for a file among which users choose: a strategy, an update rule, a transform."""
    return module in strategies().values() or module.startswith(
        ("innerloop.optim._rules", "innerloop.optim._transforms")
    )


def test_no_engine_knows_the_alternatives_that_are_built_from_it() -> None:
    known = [
        f"{here} imports {there}"
        for here, theirs in dependences().items()
        for there in theirs
        if "._engine" in here and is_alternative(there)
    ]
    assert not known


def through_an_init(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports of a name that the package's ``__init__`` only passes on."""
    packages = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    return [
        f"{here} imports from {there}: name the file that defines it"
        for here, theirs in graph.items()
        for there in theirs & packages
        if here not in packages and ROW[room(here)] < ROW["walkthrough"]
    ]


def test_imports_name_the_file_that_defines_a_thing() -> None:
    assert through_an_init({"innerloop._unroll": {"innerloop.strategy"}})
    assert not through_an_init(dependences())


def private_outside(names: set[str], room: str) -> set[str]:
    """Private names of the package that do not lie in this room of it."""
    return {
        name
        for name in names
        if name.startswith("innerloop") and is_hidden(name) and not name.startswith(f"{room}.")
    }


def test_reinforcement_learning_knows_public_names_alone() -> None:
    assert private_outside({"innerloop._unroll.unroll"}, "innerloop.rl")
    assert not private_outside({"innerloop.unroll", "innerloop.rl._scan.scan"}, "innerloop.rl")
    files = [path for path in SOURCES if room(module_name(path)) == "rl"]
    assert files
    found = {inside(path): private_outside(imports_of(path), "innerloop.rl") for path in files}
    assert not {name: sorted(names) for name, names in found.items() if names}


def test_the_package_knows_neither_its_tests_nor_its_examples_nor_its_benchmarks() -> None:
    outside = {"benchmarks", "docs", "examples", "tests"}
    assert not {
        name for path in SOURCES for name in imports_of(path) if name.split(".")[0] in outside
    }


# -- layout ----------------------------------------------------------------------------------------


def hides(parent: object, name: str) -> bool:
    """True if an attribute of a package stands where one of its modules should."""
    return not inspect.ismodule(getattr(parent, name, None))


def test_no_module_is_hidden_by_a_function_or_class_of_its_name() -> None:
    for name in modules():
        importlib.import_module(name)
    hidden = [
        name
        for name in modules()[1:]
        for parent, _, own in [name.rpartition(".")]
        if hides(sys.modules[parent], own)
    ]
    assert hides(innerloop, "track")
    assert not hidden


def test_public_modules_are_those_that_are_listed() -> None:
    assert {name for name in modules() if not is_hidden(name)} == PUBLIC_MODULES


def misplaced(path: Path) -> str:
    """Say what is wrong with where a file lies, given its path inside the package."""
    folders = path.parts[:-1]
    if len(folders) > 2:
        return "more than two folders deep"
    own = path.stem if path.stem != "__init__" else folders[-1] if folders else ""
    above = folders if path.stem != "__init__" else folders[:-1]
    if any(map(is_private, above)) and is_private(own):
        return "an underscore inside of an underscore"
    return ""


def test_folders_are_shallow_and_underscores_are_not_repeated() -> None:
    assert misplaced(Path("optim/_rules/deep/adam.py"))
    assert misplaced(Path("optim/_rules/_adam.py"))
    assert misplaced(Path("_module/_parts/__init__.py"))
    assert not misplaced(Path("optim/_rules/adam.py"))
    found = {inside(path): misplaced(path.relative_to(PACKAGE)) for path in SOURCES}
    assert not {name: wrong for name, wrong in found.items() if wrong}


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def beyond_its_place(tree: ast.Module, *, public: bool, top: bool) -> list[str]:
    """Statements that have no place in an ``__init__.py``."""
    names = {"__all__", "__version__"} if top else {"__all__"}

    def belongs(node: ast.stmt) -> bool:
        if is_docstring(node):
            return True
        if isinstance(node, ast.Assign):
            return public and all(dotted(target) in names for target in node.targets)
        return public and isinstance(node, ast.Import | ast.ImportFrom)

    return [ast.unparse(node) for node in tree.body if not belongs(node)]


def test_an_init_holds_a_docstring_and_in_public_packages_imports_and_all() -> None:
    assert beyond_its_place(ast.parse("x = 1"), public=True, top=True)
    assert beyond_its_place(ast.parse("__version__ = '1'"), public=True, top=False)
    assert beyond_its_place(ast.parse("import torch"), public=False, top=False)
    found = {}
    for path in SOURCES:
        if path.name == "__init__.py":
            public = not is_hidden(module_name(path))
            top = path.parent == PACKAGE
            found[inside(path)] = beyond_its_place(tree_of(path), public=public, top=top)
            assert ast.get_docstring(tree_of(path)), path
    assert not {name: wrong for name, wrong in found.items() if wrong}


# -- one idea, one room ----------------------------------------------------------------------------


def private_torch(source: str | ast.Module) -> set[str]:
    """Private names of torch that a source imports, spells out, or names in a string."""
    tree = ast.parse(source) if isinstance(source, str) else source
    names = set(imported(tree, "innerloop.x", is_package=False))
    nodes = list(ast.walk(tree))
    names |= {dotted(node) for node in nodes if isinstance(node, ast.Attribute)}
    found = {name for name in names if name.split(".")[0] == "torch" and is_hidden(name)}
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                found |= TORCH_STRINGS & set(re.findall(r"\w+", node.value))
        elif isinstance(node, ast.Attribute) and dotted(node.value) != "self":
            found |= TORCH_STRINGS & {node.attr}
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._functorch.peek_interpreter_stack()",
        "from torch.utils import _pytree",
        "import torch.utils._pytree as pytree",
        "from torch._functorch import x",
        "def f():\n    import torch._dynamo",
        "import torch\ntorch._foreach_add([], [])",
        "vars(module)['_parameters']",
        "getattr(model, '_orig_mod', model)",
        "name.replace('_orig_mod.', '')",
        "f'_orig_mod.{name}'",
        "node._forward_cls",
    ],
)
def test_the_search_for_private_names_finds_every_form(source: str) -> None:
    assert private_torch(source)


def test_private_names_of_torch_have_one_room() -> None:
    users = {inside(path): private_torch(tree_of(path)) for path in SOURCES}
    assert users.pop("_utils/torch_private.py"), "torch_private.py is there for nothing"
    assert not {name: sorted(found) for name, found in users.items() if found}


def lines_with(path: Path, names: set[str]) -> list[str]:
    """Lines of a file that use one of these names, alone or as the last part of a dotted one."""
    used = [
        node
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.Name) and node.id in names)
        or (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.alias) and node.name.rpartition(".")[2] in names)
    ]
    return [f"{inside(path)}:{node.lineno}" for node in used]


def test_how_code_is_run_is_asked_in_one_room() -> None:
    asked = {"is_compiling", "inside_transform"}
    users = [line for path in SOURCES for line in lines_with(path, asked)]
    here = [line for line in users if line.startswith("_utils/")]
    assert here, "the search finds nothing"
    others = sorted(set(users) - set(here))
    assert not others, f"ask innerloop._utils.execution instead ({len(others)}): {others}"


def autograd_calls(tree: ast.Module) -> list[int]:
    """Lines that name ``torch.autograd.grad``, or what calls it."""
    ends = ("autograd.grad", "torch_private.gradient")
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and dotted(node).endswith(ends))
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "torch.autograd"
            and any(alias.name == "grad" for alias in node.names)
        )
    ]


def test_the_inner_loss_is_differentiated_in_one_room() -> None:
    assert autograd_calls(ast.parse("import torch\ntorch.autograd.grad(x, y)"))
    assert autograd_calls(ast.parse("from torch.autograd import grad"))
    assert autograd_calls(ast.parse("torch_private.gradient(x, y, True)"))
    callers = {inside(path): autograd_calls(tree_of(path)) for path in SOURCES}
    others = [
        f"{name}:{line}"
        for name, lines in callers.items()
        for line in lines
        if not name.startswith(tuple(CALLS_AUTOGRAD))
    ]
    assert not others, f"use innerloop._inner_gradient.gradient, or say why not: {others}"


@functools.cache
def strategies() -> dict[str, str]:
    """Concrete strategies, and the modules that define them."""
    for name in modules():
        importlib.import_module(name)
    return {
        cls.__name__: cls.__module__
        for cls in subclasses(Strategy)
        if cls.__module__.startswith("innerloop.")
    }


def subclasses(cls: type) -> set[type]:
    found: set[type] = set()
    direct: list[type] = cls.__subclasses__()
    for sub in direct:
        found |= {sub} | subclasses(sub)
    return found


def kinds_of_batches() -> dict[str, str]:
    """Classes of ``_batches.py`` that derive from another one there, and their module."""
    path = PACKAGE / "_batches.py"
    classes = {node.name: node for node in tree_of(path).body if isinstance(node, ast.ClassDef)}
    return {
        name: module_name(path)
        for name, node in classes.items()
        if any(dotted(getattr(base, "value", base)) in classes for base in node.bases)
    }


def classes_asked_for(tree: ast.Module, module: str, homes: Mapping[str, str]) -> list[str]:
    """Uses of ``isinstance`` or ``match`` on a class outside of its own file."""
    nodes = list(ast.walk(tree))
    asked: list[tuple[int, ast.AST]] = [
        (node.lineno, node.args[1])
        for node in nodes
        if isinstance(node, ast.Call)
        and dotted(node.func) in ("isinstance", "issubclass")
        and len(node.args) == 2
    ]
    asked += [(node.cls.lineno, node.cls) for node in nodes if isinstance(node, ast.MatchClass)]
    return [
        f"{module}:{line} {name}"
        for line, kinds in asked
        for kind in ast.walk(kinds)
        for name in [dotted(kind).rpartition(".")[2]]
        if homes.get(name, module) != module
    ]


def test_no_code_asks_which_strategy_or_which_kind_of_batches_it_has() -> None:
    homes = {**strategies(), **kinds_of_batches()}
    assert {"StoreAll", "Checkpointed"} <= set(homes)
    assert len(kinds_of_batches()) >= 4
    for source in ("isinstance(x, (int, s.Truncated))", "match x:\n    case StoreAll(): pass"):
        assert classes_asked_for(ast.parse(source), "innerloop._plan", homes)
    assert not classes_asked_for(ast.parse("isinstance(x, StoreAll)"), homes["StoreAll"], homes)
    found = [
        where
        for path in SOURCES
        for where in classes_asked_for(tree_of(path), module_name(path), homes)
    ]
    assert not found, f"give the class a method or an attribute instead: {found}"


CONTAINERS = {"Counter", "OrderedDict", "WeakKeyDictionary", "WeakSet", "WeakValueDictionary"} | {
    "ContextVar",
    "defaultdict",
    "deque",
    "dict",
    "list",
    "set",
}
CHANGES = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove"} | {
    "setdefault",
    "update",
}


def kept(tree: ast.Module) -> list[str]:
    """Names at module level that remember something between calls: containers that start empty or
    are changed, variables that a function assigns, and memoised functions."""
    nodes = list(ast.walk(tree))
    changed = {
        dotted(node.value)
        for node in nodes
        if (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del))
        or (isinstance(node, ast.Attribute) and node.attr in CHANGES)
    }
    assigned = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}

    def starts_empty(value: ast.expr) -> bool:
        if isinstance(value, ast.Call):
            return dotted(value.func).rpartition(".")[2] in CONTAINERS and not value.args
        return not getattr(value, "elts", getattr(value, "keys", [value]))

    def is_container(value: ast.expr) -> bool:
        literal = ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp
        return isinstance(value, literal) or (
            isinstance(value, ast.Call) and dotted(value.func).rpartition(".")[2] in CONTAINERS
        )

    found = []
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in map(dotted, targets):
                remembers = is_container(node.value) and (
                    starts_empty(node.value) or name in changed
                )
                if name in assigned or remembers:
                    found.append(name)
    for function in (node for node in nodes if isinstance(node, ast.FunctionDef)):
        for mark in function.decorator_list:
            name = dotted(mark.func if isinstance(mark, ast.Call) else mark)
            if name.rpartition(".")[2] in ("cache", "lru_cache"):
                found.append(function.name)
    return found


def test_what_is_kept_between_calls_can_be_cleared() -> None:
    for source in (
        "x = {}",
        "x: dict[int, int] = {}",
        "x = weakref.WeakKeyDictionary()",
        "x = {1: 2}\ndef f():\n    x[3] = 4",
        "x = [1]\ndef f():\n    x.append(2)",
        "x = None\ndef f():\n    global x\n    x = 1",
        "@functools.lru_cache(maxsize=4)\ndef x(): pass",
    ):
        assert kept(ast.parse(source)) == ["x"], source
    assert not kept(ast.parse("x = {1: 2}\ny = cache('y')\nz = ()"))
    found = [f"{inside(path)}:{name}" for path in SOURCES for name in kept(tree_of(path))]
    others = [place for place in found if not place.startswith(tuple(REGISTRIES))]
    assert not others, f"use innerloop._utils.caches.cache, or say why not: {others}"
    unused = [known for known in REGISTRIES if not any(p.startswith(known) for p in found)]
    assert not unused, f"no longer there: take them off REGISTRIES: {unused}"


# -- types -----------------------------------------------------------------------------------------


class Count(NamedTuple):
    """Annotations of one file: all, those that are plain ``Any``, those that contain ``Any``."""

    all: int = 0
    plain: int = 0
    nested: int = 0

    def plus(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(self, other, strict=True)))


def parsed(annotation: ast.AST) -> ast.AST:
    """A quoted annotation is read too; a shape in a string is no annotation."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            return ast.parse(annotation.value, mode="eval").body
        except SyntaxError:
            return annotation
    return annotation


def how_any(annotation: ast.AST, known: Mapping[str, str]) -> str:
    """``plain`` for ``Any``, an alias of it or a union with it; ``nested`` where it stands inside
    another type or an alias; else the empty string."""
    annotation = parsed(annotation)
    name = dotted(annotation).rpartition(".")[2]
    if name:
        return "plain" if name == "Any" else known.get(name, "")
    if isinstance(annotation, ast.BinOp):
        sides = [how_any(side, known) for side in (annotation.left, annotation.right)]
        return "plain" if "plain" in sides else "nested" if "nested" in sides else ""
    parts = [how_any(part, known) for part in ast.iter_child_nodes(annotation)]
    return "nested" if any(parts) else ""


@functools.cache
def aliases() -> dict[str, str]:
    """Aliases of the package that are, or contain, ``Any``; an alias may stand for another one."""
    values: dict[str, ast.AST] = {}
    for path in SOURCES:
        for node in tree_of(path).body:
            if isinstance(node, ast.Assign) and isinstance(
                node.value, ast.Name | ast.Attribute | ast.Subscript | ast.BinOp
            ):
                values.update({dotted(target): node.value for target in node.targets})
    known: dict[str, str] = {}
    while True:
        found = {
            name: how for name, value in values.items() if name and (how := how_any(value, known))
        }
        if found == known:
            return known
        known = found


def count_any(tree: ast.Module, known: Mapping[str, str]) -> Count:
    """Count the annotations of arguments and results; not those of ``*args`` and ``**kwargs``."""
    total = Count()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for annotation in [*(a.annotation for a in arguments), node.returns]:
                if annotation is not None:
                    how = how_any(annotation, known)
                    total = total.plus(Count(1, how == "plain", how == "nested"))
    return total


@pytest.mark.parametrize(
    ("annotation", "how"),
    [
        ("Any", "plain"),
        ("typing.Any", "plain"),
        ("'Any'", "plain"),
        ("Any | None", "plain"),
        ("State", "plain"),
        ("dict[str, Any]", "nested"),
        ("dict[str, 'Any'] | None", "nested"),
        ("Callable[..., Any]", "nested"),
        ("Loss", "nested"),
        ("list[State]", "nested"),
        ("Tensor", ""),
        ("Float[Tensor, 'batch n']", ""),
        ("Mapping[str, object]", ""),
    ],
)
def test_the_count_of_any_reads_every_form(annotation: str, how: str) -> None:
    tree = ast.parse(f"def f(self, x: {annotation}, *args: Any, **kwargs: Any): ...")
    expected = Count(1, how == "plain", how == "nested")
    assert count_any(tree, {"State": "plain", "Loss": "nested"}) == expected


def table_of_any(counts: Mapping[str, Count]) -> str:
    """Say for each file how many annotations it has, and how many are or contain ``Any``."""
    guilty = sorted(counts.items(), key=lambda entry: (-entry[1].plain, -entry[1].nested))
    rows = [(name, *count) for name, count in guilty if count.plain or count.nested]
    lines = [f"{name:48}{n:>6}{plain:>7}{nested:>8}" for name, n, plain, nested in rows]
    return "\n".join([f"{'file':48}{'all':>6}{'plain':>7}{'nested':>8}", *lines])


def test_types_are_real() -> None:
    counts = {inside(path): count_any(tree_of(path), aliases()) for path in SOURCES}
    total = functools.reduce(Count.plus, counts.values())
    assert total.all > 1000
    plain, nested = total.plain / total.all, total.nested / total.all
    said = f"Any: plain {plain:.1%}, nested {nested:.1%} of {total.all} annotations"
    assert plain < PLAIN_ANY, f"{said}\n{table_of_any(counts)}"
    assert nested < NESTED_ANY, f"{said}\n{table_of_any(counts)}"


def test_batch_and_aux_are_type_variables_that_a_problem_carries() -> None:
    from innerloop import _types

    variables = (_types.Batch, _types.Aux)
    assert all(isinstance(variable, TypeVar) for variable in variables)
    assert variables == Problem.__parameters__  # type: ignore[attr-defined]
    assert (_types.Aux,) == Trajectory.__parameters__  # type: ignore[attr-defined]
    names = {"Batch", "Aux"}
    assert names <= names_in(inspect.signature(Problem.step))
    assert names <= names_in(inspect.signature(Problem.__init__))
    assert names <= names_in(inspect.signature(innerloop.unroll))
    assert {*names, "Result"} <= names_in(inspect.signature(innerloop.metagradient))


def names_in(signature: inspect.Signature) -> set[str]:
    """Words in the annotations of a signature, which are strings."""
    values = [p.annotation for p in signature.parameters.values()]
    return set(re.findall(r"\w+", f"{values} {signature.return_annotation}"))


def test_a_type_checker_infers_batch_aux_and_result() -> None:
    """``make types`` checks what stands here; a line that is wrong on purpose is marked, and an
    idle mark is an error there."""

    def loss(params: dict[str, Tensor], hyper: Tensor, batch: Tensor) -> tuple[Tensor, int]:
        return (params["w"] - hyper * batch).square().sum() / 2, 3

    def of_module(model: nn.Linear, hyper: object, batch: Tensor, targets: Tensor) -> Tensor:
        return (model(batch) - targets).square().sum()

    def outer(traj: Trajectory[int], hyper: Tensor) -> tuple[Tensor, int]:
        return traj.params["w"], traj.steps

    sgd = innerloop.optim.sgd(lr=0.5)
    problem = Problem(loss, sgd)
    assert_type(problem, Problem[Tensor, int])
    made = Problem.from_module(nn.Linear(1, 1), of_module, sgd, targets=lambda m, h, b: b)
    assert_type(made, Problem[Tensor, Any])
    one = torch.tensor(1.0)
    traj = innerloop.unroll(problem, {"w": one}, [2 * one], hyper=one)
    assert_type(traj, Trajectory[int])
    result, _ = innerloop.metagradient(outer, problem, {"w": one}, [2 * one], hyper=one)
    assert_type(result, tuple[Tensor, int])
    assert result == (1.5, 1)  # type: ignore[comparison-overlap]

    def wrong(params: dict[str, Tensor], hyper: Tensor, batch: Tensor) -> float:
        return 0.0

    Problem(wrong, sgd)  # type: ignore[arg-type]


# -- docstrings ------------------------------------------------------------------------------------

Function = ast.FunctionDef | ast.AsyncFunctionDef


def openings(tree: ast.Module) -> list[str]:
    """Functions and methods whose docstring opens with a word that cannot be a verb."""
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    return [
        f"{node.lineno} {node.name}: {text.splitlines()[0]}"
        for node in functions
        if (text := ast.get_docstring(node) or "") and text.split()[0].rstrip(",.:") in OPENERS
    ]


def by_file(found: Mapping[str, list[str]]) -> str:
    """List offenders below the file in which they stand, after their number."""
    guilty = {name: lines for name, lines in found.items() if lines}
    heads = {name: f"{name} ({len(lines)})" for name, lines in guilty.items()}
    texts = [f"{heads[name]}\n  " + "\n  ".join(lines) for name, lines in guilty.items()]
    return f"{sum(map(len, guilty.values()))} in {len(guilty)} files\n" + "\n".join(texts)


def test_docstrings_of_functions_open_with_a_verb() -> None:
    for opener in OPENERS:
        assert openings(ast.parse(f'def f():\n    """{opener} number."""'))
    assert not openings(ast.parse('def f():\n    """Return a number."""'))
    found = {inside(path): openings(tree_of(path)) for path in SOURCES}
    assert not any(found.values()), by_file(found)


def undescribed(module: ModuleType) -> list[str]:
    """Functions, classes and methods without an underscore and without a description; a method may
    inherit its own from the class that declares it."""
    own = {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }
    silent = [
        key
        for key, value in own.items()
        if (inspect.isroutine(value) or inspect.isclass(value)) and not inspect.getdoc(value)
    ]
    for cls in filter(inspect.isclass, own.values()):
        for key, value in vars(cls).items():
            described = inspect.isroutine(value) or isinstance(
                value, property | functools.cached_property
            )
            if described and not key.startswith("_") and not inspect.getdoc(getattr(cls, key)):
                silent.append(f"{cls.__qualname__}.{key}")
    return silent if module.__doc__ else ["the module", *silent]


def test_everything_without_an_underscore_is_described_in_every_module() -> None:
    broken = ModuleType("broken")
    exec("def f(): pass\nclass C:\n    'Text.'\n    def g(self): pass", vars(broken))  # noqa: S102
    for value in (vars(broken)["f"], vars(broken)["C"]):
        value.__module__ = "broken"
    assert undescribed(broken) == ["the module", "f", "C.g"]
    found = {name: undescribed(importlib.import_module(name)) for name in modules()}
    assert not any(found.values()), by_file(found)


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
    for part in filter(None, name.split(".")):
        if inspect.ismodule(found) and not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_exists_and_says_what_it_is(name: str) -> None:
    assert inspect.getdoc(resolve(name))


@pytest.mark.parametrize("module", EXPORTED)
def test_what_was_exported_still_is(module: str) -> None:
    names = EXPORTED[module].split()
    assert not [name for name in names if resolve(f"{module}.{name}") is None]
    assert set(names) <= set(vars(resolve(module))["__all__"])


@pytest.mark.parametrize("name", sorted(PUBLIC_MODULES))
def test_everything_exported_exists(name: str) -> None:
    module = importlib.import_module(name)
    names = list(getattr(module, "__all__", ()))
    assert set(names) <= set(dir(module))
    assert sorted(set(names)) == sorted(names)
    assert not [exported for exported in names if is_private(exported)]


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()
