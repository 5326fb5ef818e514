"""`make mutants` itself: which mistakes it makes, and that it notices when a test finds one."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-B", "-c", code, *arguments]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT / "scripts"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def changes(tmp_path: Path, source: str) -> set[tuple[str, str, str]]:
    """The kinds, old and new texts of all mutants of ``source``."""
    file = tmp_path / "file.py"
    file.write_text(source)
    code = (
        "import json, pathlib, sys, mutations; file = pathlib.Path(sys.argv[1])\n"
        "found = mutations.mutants_of(file, file.parent)\n"
        "print(json.dumps([(m.kind, m.old, m.new) for m in found]))"
    )
    return {(kind, old, new) for kind, old, new in json.loads(run(code, str(file)))}


def test_every_mutation_of_a_line_is_made(tmp_path: Path) -> None:
    source = "def f(x, y):\n    z = x.detach() - y\n    return z\n"
    assert changes(tmp_path, source) == {
        ("sign", "x.detach() - y", "(x.detach() + (y))"),
        ("term", "x.detach() - y", "(x.detach())"),
        ("term", "x.detach() - y", "(-(y))"),
        ("detach", "x.detach() - y", "x.detach() - detached(y)"),
        ("detach", "x.detach()", "(x)"),
    }


def test_a_tensor_that_is_returned_gets_a_factor_a_sign_and_a_detach(tmp_path: Path) -> None:
    found = changes(tmp_path, "def f(x: Tensor) -> Tensor:\n    return x.sqrt()\n")
    assert found == {
        ("factor", "return x.sqrt()", "return 2 * (x.sqrt())"),
        ("sign", "return x.sqrt()", "return -(x.sqrt())"),
        ("detach", "return x.sqrt()", "return (x.sqrt()).detach()"),
        ("function", "x.sqrt()", "(x)"),
    }


@pytest.mark.parametrize(
    "source",
    [
        'def f(x):\n    raise ValueError("a" + x)\n',
        "def check_f(x):\n    return x + 1\n",
        "def f(x):\n    return [x] + [1]\n",
        "def f(x):\n    return x[: x.n - 1]\n",
        "lr: float = 1 - 0.5\n",
    ],
    ids=["message", "check", "list", "bounds", "default"],
)
def test_what_computes_nothing_is_left_alone(tmp_path: Path, source: str) -> None:
    assert changes(tmp_path, source) == set()


DRAWN = """
import json, mutations
pool = mutations.all_mutants()
first, again, other = (mutations.chosen(240, seed, pool) for seed in (0, 0, 1))
assert first == again != other
assert len({m.key for m in pool}) == len(pool)
sources = {m.path: (mutations.PACKAGE / m.path).read_text() for m in first}
print(json.dumps([(m.path, m.kind, sources[m.path], m.applied(sources[m.path])) for m in first]))
"""


@pytest.mark.slow
def test_the_mutants_that_are_drawn_are_many_and_differ_from_the_package() -> None:
    drawn = json.loads(run(DRAWN))
    assert len(drawn) >= 200
    assert {kind for _, kind, _, _ in drawn} >= {"sign", "factor", "term", "detach", "graph"}
    assert len({path for path, _, _, _ in drawn}) > 60
    for path, _, source, mutant in drawn:
        assert ast.dump(ast.parse(mutant)) != ast.dump(ast.parse(source)), path


PLANTED = """
import sys, pathlib, mutations, mutants
mutants.WARM = ("torch",)
mutants.warm()
copy = mutants.Copy(pathlib.Path(sys.argv[1]))
path = "optim/_rules/sgd.py"
(sign,) = (m for m in mutations.mutants_of(mutations.PACKAGE / path)
           if m.function == "SGD.step" and m.old == "-lr")
tests = [mutants.Test(f"src/innerloop/{path}", 1.0, 1)]
nothing = sign._replace(text=sign.old)
for mutant in (sign, nothing):
    print(mutants.try_one(copy, mutant, tests).caught or "survived")
print(mutants.mutations.PACKAGE.joinpath(path).read_text()
      == (copy.folder / "src" / "innerloop" / path).read_text())
"""


@pytest.mark.slow
def test_a_planted_mistake_is_caught_and_no_mistake_is_not(tmp_path: Path) -> None:
    """By the docstring of SGD, whose derivatives are a closed form."""
    if not (ROOT / ".git").exists():
        pytest.skip("the copy is made of the files that git knows")
    assert run(PLANTED, str(tmp_path / "copy")).split() == ["test", "survived", "True"]
