"""Files that a public forge reads: they are well formed, and agree with the package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import innerloop

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "tests.yml"


def project() -> dict[str, Any]:
    reader = pytest.importorskip("tomllib")  # from Python 3.11 on
    return reader.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_matrix_covers_every_supported_python_and_both_ends_of_torch() -> None:
    matrix = yaml.safe_load(WORKFLOW.read_text())["jobs"]["tests"]["strategy"]["matrix"]
    prefix = "Programming Language :: Python :: 3."
    supported = [c.rpartition(" ")[2] for c in project()["classifiers"] if c.startswith(prefix)]
    assert matrix["python"] == supported
    assert project()["requires-python"] == f">={supported[0]}"
    (lowest,) = (d for d in project()["dependencies"] if d.startswith("torch>="))
    wanted = {entry["torch"]: entry["requirement"] for entry in matrix["include"]}
    assert set(wanted) == set(matrix["torch"]) == {"oldest", "newest"}
    assert wanted["newest"] == lowest
    assert wanted["oldest"] == lowest.replace(">=", "==") + ".*"


def test_the_matrix_runs_both_stages_of_the_test_command() -> None:
    """As the Makefile does; and the file says what of it was never run."""
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["tests"]["steps"]
    commands = [step["run"] for step in steps if step.get("run", "").startswith("pytest")]
    assert ["--types=first" in command for command in commands] == [True, False]
    assert "unchecked" in WORKFLOW.read_text()


def test_the_citation_is_that_of_this_version_and_invents_no_address() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    citation = yaml.safe_load(text)
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["message"]
    assert citation["title"].startswith(project()["name"])
    assert citation["authors"] == project()["authors"] == [{"name": "The innerloop authors"}]
    assert citation["version"] == innerloop.__version__
    assert citation["license"] == project()["license"]
    assert not re.search(r"https?:|doi|@|orcid", text)


# -- the length of lines ---------------------------------------------------------------------------

LIMIT = 100
PRAGMA = re.compile(r"\s+# (noqa|type: ignore)\b.*$")
OTHERS = {"examples/seed_notebook.py": "the cells of another project, as they stand there"}


def files(*endings: str) -> list[Path]:
    """Files of the checkout with these endings, without what tools put there."""
    skipped = {".git", ".mypy_cache", ".ruff_cache", ".venv", "_build", "node_modules"}
    return [
        path
        for path in sorted(ROOT.rglob("*"))
        if path.name.endswith(endings)
        and not skipped & set(path.relative_to(ROOT).parts)
        and path.relative_to(ROOT).as_posix() not in OTHERS
    ]


def too_long(name: str, text: str) -> list[int]:
    """Numbers of lines beyond the limit.

    Not counted are rows of Markdown tables, what tells a linter or type checker about a line of
    Python, and, in files without a language of their own here, everything but comments.
    """

    def counted(line: str) -> str:
        if name.endswith(".md"):
            return "" if line.startswith("|") else line
        if name.endswith(".py"):
            return PRAGMA.sub("", line)
        return line if line.lstrip().startswith("#") else ""

    lines = enumerate(text.splitlines(), 1)
    return [number for number, line in lines if len(counted(line)) > LIMIT]


def test_no_line_of_code_or_prose_is_longer_than_100_columns() -> None:
    long = "x" * (LIMIT + 1)
    assert too_long("a.md", f"{long}\n| {long} |") == [1]
    assert too_long("a.py", f"{long}\n# {long}\nx  # noqa: E501 {long}") == [1, 2]
    assert too_long("Makefile", f"{long}\n# {long}") == [2]
    found = files(".md", ".py", ".toml", ".yaml", ".yml", ".cff", "Makefile", "constraints.txt")
    assert len(found) > 250
    names = [path.relative_to(ROOT).as_posix() for path in found]
    lines = {n: too_long(n, p.read_text()) for n, p in zip(names, found, strict=True)}
    assert not {name: numbers for name, numbers in lines.items() if numbers}


# -- the page of errors ----------------------------------------------------------------------------


def run_errors_page(code: str) -> str:
    command = [sys.executable, "-c", f"import errors_page\n{code}"]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT / "scripts"
    ).stdout


def test_the_page_of_errors_holds_every_message() -> None:
    found = run_errors_page("print(errors_page.PAGE.read_text() == errors_page.page())")
    assert found.strip() == "True", "docs/errors.md is out of date: run `make errors`"


def test_no_message_of_an_error_is_left_out_of_the_page() -> None:
    assert run_errors_page("print(*errors_page.unwritten())").strip() == ""
