"""Do the tests notice small mistakes? ``python scripts/mutants.py [--count 240] [--seed 0]``.

Each mutation of `scripts/mutations.py` is put into a copy of the repository, and the tests that
reach the changed lines are run there until one fails, the quickest and most special ones first.
Which tests reach which lines is measured once, and again for a file of tests that has changed.
Everything is kept in ``.mutants/``; the tree itself is not touched.

A mutant that no test notices is a gap in the tests, or changes nothing that can be observed. The
latter are listed, with the reason, in docs/devnotes/mutants.md; the command fails if another one
survives, or if fewer than 95 % are caught.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mutations
from mutations import ROOT, Mutant

WORK = ROOT / ".mutants"
PAGE = ROOT / "docs" / "devnotes" / "mutants.md"
LEAST = 0.95
READING_SOURCE = {
    f"tests/test_{name}.py"
    for name in ("structure", "project_files", "reference", "contributing", "examples", "mutants")
}
"""Tests that read the text of the package or run others: what they notice is no behaviour."""
STAGES = ((6, 6.0), (40, 30.0), (400, 120.0))
"""``(tests, seconds)``: how many of the tests that reach a line are run in each stage."""
MAPPED = ("-m", "not slow and not compiled")
"""Tests that compile are not asked: starting the compiler takes longer than all the others."""
UNCHECKED = ("-m", "compiled or not compiled")
"""Tests by their names, the slow ones too, without the checking of types at run time. Survivors are
tried once more with it."""
CHECKED_TESTS = 100
"""How many tests are run again for that."""
GRACE = 120.0
"""Seconds that a stage may take beyond ten times what its tests took without a mutation."""
WARM = (
    *("numpy", "torch", "torch.func", "torch._dynamo", "jaxtyping", "beartype", "hypothesis"),
    *("pytest", "yaml", "lion_pytorch"),
)
"""What every child would import again; never the package itself."""
QUIET = (
    *("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov"),
    # of the modules that are imported before pytest starts
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
)


# -- a copy, and processes in it ------------------------------------------------------------------


class Copy:
    """A copy of the repository, in which files are changed and tests are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
        ).stdout.splitlines()
        for name in listed:
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self._time = time.time()

    def write(self, path: str, text: str) -> None:
        """Replace a file of the package; compiled files that were kept of it are out of date."""
        file = self.folder / "src" / "innerloop" / path
        file.write_text(text)
        self._time += 2  # Python compares whole seconds
        os.utime(file, (self._time, self._time))

    def pytest(self, arguments: Sequence[str], plugin: Plugin, limit: float) -> Ran:
        """Run pytest in a fork of this process, in which torch is imported and innerloop is not."""
        result, log = self.folder / "result.json", self.folder / "log.txt"
        result.unlink(missing_ok=True)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = self._child(arguments, plugin, result, log)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() - began > limit:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Ran(None, {}, time.monotonic() - began)
            time.sleep(0.02)
        found = json.loads(result.read_text()) if result.exists() else {}
        return Ran(os.waitstatus_to_exitcode(status), found, time.monotonic() - began)

    def _child(self, arguments: Sequence[str], plugin: Plugin, result: Path, log: Path) -> int:
        os.setsid()
        to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(to, 1)
        os.dup2(to, 2)
        os.chdir(self.folder)
        paths = [str(self.folder / "src"), str(self.folder)]
        sys.path[:0] = paths
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        sys.dont_write_bytecode = not plugin.writes_bytecode
        import pytest

        plugin.begin()
        code = pytest.main(
            [*QUIET, *arguments],
            plugins=[plugin],
        )
        result.write_text(json.dumps(plugin.result()))
        return int(code)


class Ran(NamedTuple):
    """The exit code of a child (None: it ran out of time), its result, and the seconds it took."""

    code: int | None
    result: dict[str, Any]
    seconds: float


class Plugin:
    """Notes the first test that fails, and how."""

    writes_bytecode = False

    def __init__(self) -> None:
        self.failed: list[tuple[str, str]] = []
        self.passed: list[str] = []
        self.seconds: dict[str, float] = {}

    def begin(self) -> None:
        """Prepare the child."""

    def result(self) -> dict[str, Any]:
        return {"failed": self.failed, "passed": self.passed}

    def pytest_collection(self) -> None:
        # Here, and not by the first test, which would seem slow, nor by pytest, which runs a module
        # with doctests a second time unless its package is there. What fails will fail again.
        with contextlib.suppress(Exception):
            importlib.import_module("innerloop.higher")

    def pytest_runtest_logreport(self, report: Any) -> None:
        seconds = self.seconds.get(report.nodeid, 0.0)
        self.seconds[report.nodeid] = seconds + report.duration
        if report.failed:
            self.failed.append((report.nodeid, _how(report)))
        elif report.when == "call":
            self.passed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append((report.nodeid, "collection"))


def _how(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash is not None else str(report.longrepr)
    first = re.match(r"[A-Za-z_.]+", message.strip())
    return first.group().rpartition(".")[2] if first else "Error"


class Mapper(Plugin):
    """Notes which statements of the package each test runs, by the marks of `marked`.

    The tests of a file come in a random order, so that those that fit into the limit are of every
    kind.
    """

    def __init__(self, limit: float) -> None:
        super().__init__()
        self._limit, self._complete = limit, True

    def begin(self) -> None:
        self._began = time.monotonic()
        self._hits: set[str] = set()
        self._reached: dict[str, list[str]] = {}
        setattr(builtins, MARK, self._hits)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._hits.clear()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._reached[nodeid] = sorted(self._hits)

    def pytest_runtest_teardown(self, item: Any) -> None:
        if time.monotonic() - self._began > self._limit:
            self._complete = False
            item.session.shouldstop = "the rest is not mapped"

    def result(self) -> dict[str, Any]:
        passed = set(self.passed)
        tests = [
            (n, self.seconds[n], reached) for n, reached in self._reached.items() if n in passed
        ]
        return {"tests": tests, "failed": self.failed, "complete": self._complete}


MARK = "__reached__"


class _Marks(ast.NodeTransformer):
    """Puts before each statement of a function a line that notes that it was reached."""

    def __init__(self, path: str) -> None:
        self._path = path

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        has_docstring = ast.get_docstring(node) is not None
        kept, body = node.body[:has_docstring], node.body[has_docstring:]
        node.body = [*kept, *self._marked(body)] if body else kept
        return node

    def _marked(self, body: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for statement in body:
            found.append(ast.parse(f"{MARK}.add('{self._path}:{statement.lineno}')").body[0])
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                found.append(self.visit(statement))
                continue
            for name in ("body", "orelse", "finalbody"):
                if getattr(statement, name, None):
                    setattr(statement, name, self._marked(getattr(statement, name)))
            for handler in getattr(statement, "handlers", ()):
                handler.body = self._marked(handler.body)
            found.append(statement)
        return found


def marked(path: str, source: str) -> str:
    """Return the text of a file with a mark before each statement of its functions."""
    return ast.unparse(ast.fix_missing_locations(_Marks(path).visit(ast.parse(source))))


# -- which tests reach which lines ----------------------------------------------------------------


class Test(NamedTuple):
    """A test: its name, its seconds, and how many statements of the package it runs."""

    name: str
    seconds: float
    lines: int


class Map:
    """The tests that reach a line."""

    def __init__(self) -> None:
        self._reached: dict[str, set[Test]] = {}

    def add(self, found: Mapping[str, Any]) -> None:
        """Add the tests of one file, as `Mapper` gives them."""
        for name, seconds, reached in found["tests"]:
            test = Test(name, seconds, len(reached))
            for place in reached:
                self._reached.setdefault(place, set()).add(test)

    def tests_of(self, mutant: Mutant) -> list[Test]:
        """Return the tests that reach the mutant's statement, the best ones first."""
        found = self._reached.get(f"{mutant.path}:{mutant.statement}", set())
        words = set(re.split(r"[/_.]+", mutant.path)) - {"py", "optim", "strategy", "engine", "nn"}
        words |= {word for word in re.split(r"[._]+", mutant.function.lower()) if len(word) > 3}

        def merit(test: Test) -> float:
            name = test.name.lower()
            special = sum(word in name for word in words if len(word) > 2)
            return (test.seconds + 0.02) * (test.lines + 50) / (1 + 3 * special)

        return sorted(found, key=lambda test: (merit(test), test.name))


def test_files() -> list[str]:
    """Return the files whose tests are asked: tests, doctests and pages."""
    found = [*ROOT.glob("tests/test_*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    found += [p for p in ROOT.glob("src/innerloop/**/*.py") if ">>>" in p.read_text()]
    names = (
        str(path.relative_to(ROOT))
        for path in found
        if ">>>" in path.read_text() or "/test_" in str(path)
    )
    return [n for n in sorted(names) if n not in READING_SOURCE and "_build" not in n]


def measure(copy: Copy, files: Iterable[str], limit: float) -> Map:
    """Return the map of the tests in ``files``; what was measured before is read.

    Args:
        copy: where they are run.
        files: the files of tests.
        limit: seconds for which the tests of one file are mapped, drawn by chance.
    """
    folder, whole = WORK / "map", Map()
    folder.mkdir(parents=True, exist_ok=True)
    source = _hash(sorted((ROOT / "src").rglob("*.py")))
    files = list(files)
    groups: dict[str, list[str]] = {}
    for name in files:  # those of a file of tests in one process, the doctests in two
        key = name.removesuffix(".py") if name.startswith("tests/") else name.partition("/")[0]
        groups.setdefault("docs" if key == "README.md" else key, []).append(name)
    todo: dict[Path, list[str]] = {}
    marks = {}
    for key, group in groups.items():
        known = folder / (key.replace("/", "-") + ".json")
        marks[known] = [source, _hash(ROOT / name for name in sorted(group))]
        found = json.loads(known.read_text()) if known.exists() else {}
        enough = found.get("complete") or found.get("limit", 0.0) >= limit
        if found.get("mark") == marks[known] and enough:
            whole.add(found)
        else:
            todo[known] = group
    sources = {
        str(path.relative_to(mutations.PACKAGE)): path.read_text() for path in mutations.files()
    }
    if todo:
        for path, text in sources.items():
            copy.write(path, marked(path, text))
    for known, group in todo.items():
        ran = copy.pytest([*MAPPED, *group], Mapper(limit), 120 + 2 * limit)
        found = {"tests": [], **ran.result, "mark": marks[known], "limit": limit}
        known.write_text(json.dumps(found))
        whole.add(found)
        print(f"{known.stem}: {len(found['tests'])} tests mapped, {ran.seconds:.0f} s", flush=True)
    if todo:
        for path, text in sources.items():
            copy.write(path, text)
    return whole


def _hash(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()


# -- one mutant -----------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of a mutant.

    Attributes:
        key: of the mutant.
        line: where it was.
        caught: "test", "time" (the tests did not come to an end), or "" if it survived.
        by: the test that failed first.
        how: the class of what it raised.
        reached: how many tests reach the line.
        seconds: how long it took.
    """

    key: tuple[str, ...]
    line: int
    kind: str
    caught: str
    by: str
    how: str
    reached: int
    seconds: float


def stages(tests: Sequence[Test]) -> Iterator[list[Test]]:
    """Yield the tests in a few portions, each with more of them and slower ones."""
    left = list(tests)
    for count, seconds in STAGES:
        portion: list[Test] = []
        spent = 0.0
        for test in left:
            if len(portion) < count and spent + test.seconds <= seconds:
                portion.append(test)
                spent += test.seconds
        if portion:
            yield portion
        chosen = set(portion)
        left = [test for test in left if test not in chosen]


def try_one(
    copy: Copy,
    mutant: Mutant,
    tests: Sequence[Test],
    without: Iterable[str] = (),
    *,
    quick: bool = False,
) -> Outcome:
    """Run the tests that reach the mutant until one fails; ``quick``: but for the last stages."""
    source = (mutations.PACKAGE / mutant.path).read_text()
    copy.write(mutant.path, mutant.applied(source))
    began, caught, by, how = time.monotonic(), "", "", ""
    skipped = set(without)
    asked = [test for test in tests if test.name not in skipped]
    runs: list[tuple[tuple[str, ...], list[Test]]] = [
        (UNCHECKED, portion) for portion in stages(asked)
    ]
    if asked:
        runs = runs[:2] if quick else [*runs, (("--types=all",), asked[:CHECKED_TESTS])]
    try:
        for mode, portion in runs:
            limit = GRACE + 10 * sum(test.seconds for test in portion)
            ran = copy.pytest([*mode, "-x", *(test.name for test in portion)], Plugin(), limit)
            if ran.code is None:
                caught, by, how = "time", portion[0].name, f"{limit:.0f} s"
                break
            if ran.code and ran.result.get("failed"):
                caught, (by, how) = "test", ran.result["failed"][0]
                break
            if ran.code == 4:
                # The mutant cannot be imported, so pytest finds none of the tests; or the map is
                # out of date, and the run without mutations at the end does not find them either.
                caught, by, how = "test", portion[0].name, "not collected"
                break
            if ran.code not in (0, 5):
                caught, by, how = "test", portion[0].name, f"exit code {ran.code}"
                break
    finally:
        copy.write(mutant.path, source)
    seconds = time.monotonic() - began
    return Outcome(mutant.key, mutant.line, mutant.kind, caught, by, how, len(tests), seconds)


def warm() -> None:
    """Import what the children would import."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in WARM:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


# -- what is known, and the report ----------------------------------------------------------------


def listed(page: Path = PAGE) -> dict[tuple[str, ...], str]:
    """Return the survivors of the page, with the reason for each."""
    found = {}
    for line in page.read_text().splitlines() if page.exists() else ():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 5 and cells[0].startswith("`"):
            key = tuple(cell.strip("`").replace("\\|", "|") for cell in cells[:4])
            found[key] = cells[4]
    return found


def row(key: Sequence[str], reason: str) -> str:
    """Return the line of the page for one survivor."""
    cells = ("`" + cell.replace("|", "\\|") + "`" for cell in key)
    return f"| {' | '.join(cells)} | {reason} |"


def report(outcomes: Sequence[Outcome]) -> int:
    """Print what was caught and what was not, and return the exit code."""
    known = listed()
    caught = [o for o in outcomes if o.caught]
    left = [o for o in outcomes if not o.caught]
    new = [o for o in left if o.key not in known]
    by_time = sum(o.caught == "time" for o in caught)
    wrong = sum(o.how == "AssertionError" for o in caught)
    print(
        f"{len(outcomes)} mutants, {len(caught)} caught ({len(caught) / len(outcomes):.1%}; "
        f"{wrong} by a wrong result, {by_time} because the tests did not end), {len(left)} not, "
        f"{len(left) - len(new)} of these with a reason; "
        f"{sum(o.seconds for o in outcomes) / 60:.0f} min"
    )
    for outcome in new:
        print(row(outcome.key, f"not caught by any of {outcome.reached} tests"))
    return int(bool(new) or len(caught) < LEAST * len(outcomes))


def main(arguments: Sequence[str] | None = None) -> int:
    """Try mutants, print what became of them, and return the exit code."""
    parser = argparse.ArgumentParser(description="do the tests notice small mistakes?")
    parser.add_argument("--count", type=int, default=240, help="how many mutants (240)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (0)")
    parser.add_argument("--only", default="", help="a word in the file or function of a mutant")
    parser.add_argument("--tests", nargs="*", help="the files of tests that are asked (all)")
    parser.add_argument("--list", action="store_true", help="print the mutants, and try none")
    parser.add_argument("--map", action="store_true", help="measure which tests reach which lines")
    parser.add_argument(
        "--map-limit", type=float, default=600.0, help="seconds to map one file of tests (600)"
    )
    parser.add_argument("--resume", action="store_true", help="only those not caught so far")
    parser.add_argument("--quick", action="store_true", help="leave out the wider lists of tests")
    options = parser.parse_args(arguments)
    wanted = [
        mutant
        for mutant in mutations.chosen(options.count, options.seed)
        if options.only in f"{mutant.path}:{mutant.function}"
    ]
    if options.list:
        for mutant in wanted:
            print(f"{mutant.path}:{mutant.line} {mutant.kind}: {mutant.old} -> {mutant.new}")
        return 0
    warm()
    copy = Copy(WORK / "copy")
    reached = measure(copy, options.tests or test_files(), options.map_limit)
    if options.map:
        return 0
    results = WORK / f"results-{options.seed}.jsonl"
    known = dict[tuple[str, ...], Outcome]()
    if options.resume and results.exists():
        for line in results.read_text().splitlines():
            values = json.loads(line)
            outcome = Outcome(tuple(values[0]), *values[1:])
            known[outcome.key] = outcome
    else:
        results.unlink(missing_ok=True)
    outcomes = []
    for i, mutant in enumerate(wanted):
        outcome = known.get(mutant.key)
        if outcome is None or not (outcome.caught or options.quick):
            outcome = try_one(copy, mutant, reached.tests_of(mutant), quick=options.quick)
            with results.open("a") as file:
                file.write(json.dumps(outcome) + "\n")
            word = f"{outcome.how} in {outcome.by}" if outcome.caught else "NOT CAUGHT"
            print(
                f"{i + 1}/{len(wanted)} {mutant.path}:{mutant.line} {mutant.old} -> {mutant.new}: "
                f"{word} ({outcome.reached} tests, {outcome.seconds:.1f} s)",
                flush=True,
            )
        outcomes.append(outcome)
    outcomes = confirmed(copy, wanted, outcomes, reached)
    return report(outcomes)


def confirmed(
    copy: Copy, mutants: Sequence[Mutant], outcomes: Sequence[Outcome], reached: Map
) -> list[Outcome]:
    """Run the tests that caught mutants once more without any; those that fail caught nothing."""
    names = sorted({outcome.by for outcome in outcomes if outcome.caught and "::" in outcome.by})
    failing: set[str] = set()
    if names:
        ran = copy.pytest([*UNCHECKED, *names], Plugin(), 3600)
        failing = set(names) - set(ran.result.get("passed", ()))
    if failing:
        print("these tests fail without a mutation, too:", *sorted(failing), sep="\n  ")
    return [
        try_one(copy, mutant, reached.tests_of(mutant), failing)
        if outcome.by in failing
        else outcome
        for mutant, outcome in zip(mutants, outcomes, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
