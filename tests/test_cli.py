"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

from innerloop import cli
from innerloop.walkthrough import Walkthrough, run


@pytest.fixture(scope="module")
def computed() -> Walkthrough:
    return run()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: Walkthrough) -> Path:
    """An empty current folder; the numbers are computed once for all tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run", lambda: computed)
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def disagree(computed: Walkthrough) -> Walkthrough:
    first = computed.blocks[0]
    row = first.rows[0]._replace(autograd=0.72 + 1e-11)
    return replace(
        computed, blocks=(first._replace(rows=(row, *first.rows[1:])), *computed.blocks[1:])
    )


def test_the_walkthrough_prints_its_tables_and_writes_its_picture(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["walkthrough"]) == 0
    printed = capsys.readouterr()
    assert "-0.1789599744" in printed.out
    assert "Picture: innerloop-walkthrough.png" in printed.out
    assert not printed.err
    assert files(folder) == ["innerloop-walkthrough.png"]
    assert (folder / "innerloop-walkthrough.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["walkthrough", "--no-picture"]) == 0
    assert "icture" not in capsys.readouterr().out
    assert files(folder) == []


@pytest.mark.parametrize(("asked", "written"), [("a.svg", "a.svg"), ("a", "a.png")])
def test_the_picture_goes_where_it_is_sent(
    folder: Path, capsys: pytest.CaptureFixture[str], asked: str, written: str
) -> None:
    assert cli.main(["walkthrough", "--picture", asked]) == 0
    assert f"Picture: {written}" in capsys.readouterr().out
    assert files(folder) == [written]


@pytest.mark.parametrize("asked", ["missing/a.png", "a.no-such-format"])
def test_a_picture_that_cannot_be_written_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    assert cli.main(["walkthrough", "--picture", asked]) == cli.FAILED
    printed = capsys.readouterr()
    assert "rows agree" in printed.out
    assert f"No picture: {asked} cannot be written" in printed.err
    assert files(folder) == []


@pytest.mark.parametrize("more", [[], ["--no-picture"]])
def test_columns_that_disagree_make_it_fail(
    folder: Path,
    computed: Walkthrough,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:
    monkeypatch.setattr(cli, "run", lambda: disagree(computed))
    assert cli.main(["walkthrough", *more]) == cli.DISAGREES == 1
    assert "DISAGREE (allowed: 1e-12 and 1e-06): loss L" in capsys.readouterr().out


def test_a_disagreement_outranks_a_missing_picture(
    folder: Path, computed: Walkthrough, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "run", lambda: disagree(computed))
    assert cli.main(["walkthrough", "--picture", "missing/a.png"]) == cli.DISAGREES


def test_without_matplotlib_the_tables_are_printed_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["walkthrough"]) == 0
    printed = capsys.readouterr().out
    assert "rows agree" in printed
    assert "pip install 'innerloop[plot]'" in printed
    assert files(folder) == []


def test_without_matplotlib_a_picture_that_was_asked_for_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["walkthrough", "--picture", "a.png"]) == cli.FAILED
    printed = capsys.readouterr()
    assert "rows agree" in printed.out
    assert "pip install 'innerloop[plot]'" in printed.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"innerloop {version('innerloop')}\n"


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert "walkthrough" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["walkthrough", "--picture", "a.png", "--no-picture"],
        ["walkthrough", "x"],
    ],
)
def test_wrong_usage_says_so(
    folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: innerloop" in capsys.readouterr().err


def test_the_command_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="innerloop")
    assert script.load() is cli.main


def test_a_terminal_without_greek_gets_question_marks_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "innerloop.cli", "walkthrough", "--no-picture"],
        check=False,
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert b"-0.1789599744" in done.stdout
    assert b"d a? / d a?" in done.stdout
