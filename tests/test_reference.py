"""The built documentation: the names in its reference, and that its pages need no network."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sphinx")

DOCS = Path(__file__).parent.parent / "docs"

PUBLIC_MODULES = (
    "innerloop innerloop.optim innerloop.optim.helpers innerloop.strategy "
    "innerloop.strategy.solvers innerloop.nn innerloop.nn.functional innerloop.inspect "
    "innerloop.higher innerloop.higher.optim innerloop.higher.patch innerloop.higher.utils "
    "innerloop.errors innerloop.doctor innerloop.walkthrough innerloop.cli innerloop.rl "
    "innerloop.rl.envs innerloop.rl.ppo innerloop.rl.meta"
).split()

INTERNAL = """
    innerloop.Problem.check_compiles innerloop.Problem.computed_buffers innerloop.Problem.evaluate
    innerloop.Problem.gradient innerloop.Problem.new_params innerloop.Problem.overrides
    innerloop.Problem.residual innerloop.Problem.update innerloop.StoreAll.run
    innerloop.Problem.original innerloop.Problem.for_one_run innerloop.Problem.with_targets
    innerloop.Problem.parameter_hooks
    innerloop.optim.Rule.torch_layout innerloop.optim.Packed.of innerloop.MissingExtraError.of
""".split()
"""Members without an underscore that are there for the package itself."""


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "sphinx", "-q", "-b", "html", *options, str(DOCS), str(folder))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    # Sphinx tries the installed package; tests run from a checkout.
    path = os.pathsep.join([str(DOCS.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# No page is written: that takes as long as reading all docstrings.
READ = """
import json, sys
from sphinx.application import Sphinx
docs, folder = sys.argv[1:]
app = Sphinx(
    docs, docs, folder, folder, "dummy", status=None, warning=sys.stderr,
    confoverrides={"include_patterns": ["api/**"], "root_doc": "api/index"},
)
app.build()
objects = app.env.get_domain("py").get_objects()
print(json.dumps({name: kind for name, _, kind, *_ in objects}))
"""


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every Python name in the reference and the kind of thing it is."""
    read = run("-c", READ, str(DOCS), str(tmp_path_factory.mktemp("read")))
    assert read.returncode == 0, read.stderr
    found: dict[str, str] = json.loads(read.stdout)
    return found


def exported(module: ModuleType) -> Iterator[str]:
    """Full public names of a module; one without `__all__` exports what it defines."""
    for name, value in vars(module).items():
        own = not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        if name in module.__all__ if hasattr(module, "__all__") else own:
            yield f"{module.__name__}.{name}"


def public_names() -> set[str]:
    modules = [importlib.import_module(name) for name in PUBLIC_MODULES]
    return {*PUBLIC_MODULES, *(name for module in modules for name in exported(module))}


def test_every_public_name_is_in_the_reference(listed: dict[str, str]) -> None:
    assert not public_names() - set(listed)


def test_nothing_else_is_in_the_reference(listed: dict[str, str]) -> None:
    """A member counts as public if its class is and its name has no underscore."""
    public = public_names()
    members = {"method", "property", "attribute", "classmethod", "staticmethod"}
    for name, kind in listed.items():
        owner, _, last = name.rpartition(".")
        assert name in public or (kind in members and owner in public), name
        assert not last.startswith("_"), name


@pytest.mark.parametrize("name", INTERNAL)
def test_what_is_there_for_the_package_itself_is_not_in_the_reference(
    listed: dict[str, str], name: str
) -> None:
    assert name not in listed


def test_the_members_of_a_problem(listed: dict[str, str]) -> None:
    found = {name.rpartition(".")[2] for name in listed if name.startswith("innerloop.Problem.")}
    assert found == {"from_module", "init", "step"}


@pytest.mark.slow  # every page, each warning an error
def test_every_page_builds_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    built = build(tmp_path, "-W", "--keep-going")
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    fetched = re.compile(
        r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"((?:https?:)?//[^\"]+)"
    )
    for page in pages:
        assert not fetched.findall(page.read_text()), page.name
    for style in tmp_path.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text()), style
