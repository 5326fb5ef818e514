"""Files that a public forge reads: they are well formed, and agree with the package."""

from __future__ import annotations

import re
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
    assert ["compiled" in command for command in commands] == [True, False]
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
