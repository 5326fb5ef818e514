"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch

from innerloop import cli, inspect
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


def test_a_report_of_the_walkthrough(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "write_report", lambda result, file: Path(file).write_text("page"))
    assert cli.main(["walkthrough", "--report"]) == 0
    assert "Report: innerloop-walkthrough.html" in capsys.readouterr().out
    assert cli.main(["walkthrough", "--report", "missing/a.html"]) == cli.FAILED
    assert "cannot be written" in capsys.readouterr().err
    assert files(folder) == ["innerloop-walkthrough.html"]


# -- a script of one's own -------------------------------------------------------------------------

SCRIPT = """
import torch, innerloop
from torch import nn

def loss(params, hyper, batch):
    return (params["w"] ** 2).sum() / 2

def outer(traj, hyper):
    return traj.params["w"].sum()

def training(**more):
    problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.5))
    start = {"w": torch.tensor([2.0, 1.0])}
    return {"problem": problem, "params": start, "batches": None, "steps": 3, **more}

def looked_at():
    return training(outer=outer, directions=0)

def judged():
    return training(outer=outer)

def cut():
    return training(outer=lambda traj, hyper: traj.params["w"].sum().detach())

def right():
    return {"outer_fn": lambda x: (x ** 3).sum(), "inputs": torch.ones(2)}

def wrong():
    return {"outer_fn": lambda x: (x.detach() * x).sum(), "inputs": torch.ones(2)}

def attributed(rate=0.1, steps=3):
    x = torch.linspace(-1, 1, 12)
    def weighted(params, hyper, batch):
        w = params["p"]
        if rate > 1:
            return (hyper["weights"] * (w**4 / 4 - (1 + x / 10) * w**2 / 2)).mean()
        return (hyper["weights"] * (w - x) ** 2).mean()
    return {
        "queries": lambda params: torch.stack([params["p"].sin(), params["p"].cos()]),
        "problem": innerloop.Problem(weighted, innerloop.optim.sgd(lr=rate)),
        "params": {"p": torch.tensor(0.2)}, "batches": None, "steps": steps,
        "hyper": {"weights": torch.ones(12)}, "subsets": 6, "drop": 0.2,
    }

def chaotic():
    return attributed(1.6, 60)

def model():
    return nn.Linear(3, 2), torch.ones(1, 3)

class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g

class Refused(nn.Linear):
    def forward(self, x):
        return Once.apply(super().forward(x) ** 2)

def refused():
    return Refused(3, 2), torch.ones(1, 3)

def unknown():
    return training(outer=outer, rate=1)

def nothing():
    return None

def broken():
    raise KeyError("a key")
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's script in an empty current folder; pages are not drawn."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(SCRIPT)
    return "own.py"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages hold a word."""

    def write(what: object, page: Path, **more: object) -> inspect.ReportPage:
        page.write_text("page")
        return inspect.ReportPage(page, {}, {})

    monkeypatch.setattr(inspect, "report", write)


def test_inspect(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By closed form: each step halves the parameters."""
    arguments = ["inspect", f"{script}:looked_at", "--json", "--out", "seen"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["influence"]["params"]["w"] == pytest.approx(
        [2**0.5 / 8, 2**0.5 / 4, 2**0.5 / 2, 2**0.5], rel=1e-6
    )
    assert found["diagnosis"]["trusted"] is True
    assert "Report: seen/report.html" in printed.err
    assert (tmp_path / "seen" / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert cli.main(arguments) == cli.FAILED
    assert "--force" in capsys.readouterr().err
    assert "own" in sys.modules


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["check", "judged"], cli.OK, "is trusted for steps of relative size 0.01"),
        (["check", "cut"], cli.DISAGREES, "detach() at own.py, line"),
        (["check", "right"], cli.OK, "autograd: whole run"),
        (["check", "wrong"], cli.DISAGREES, "autograd and finite differences disagree"),
        (["attribute", "attributed"], cli.OK, "rank correlation"),
        (["attribute", "chaotic"], cli.DISAGREES, "does not do what the scores say"),
        (["inspect", "looked_at"], cli.OK, "inner loss 2.5 to"),
        (["doctor", "model"], cli.OK, "can be differentiated through this model"),
        (["doctor", "refused"], cli.DISAGREES, "CANNOT be differentiated"),
    ],
)
def test_commands_on_a_script(
    script: str, arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, name = arguments
    assert cli.main([command, f"{script}:{name}"]) == status
    printed = capsys.readouterr()
    assert said in printed.out
    assert all(
        line.startswith(f"innerloop {command}: running") for line in printed.err.splitlines()
    )


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "no.py:judged"], "names no function in a file"),
        (["check", "own.py"], "names no function in a file"),
        (["check", "own.py:absent"], "has no function 'absent'"),
        (["check", "own.py:nothing"], "returned NoneType: return a dict"),
        (["check", "own.py:broken"], "stopped with KeyError: 'a key'"),
        (["check", "own.py:unknown"], "has ['rate'], which are not among"),
        (["attribute", "own.py:judged"], "has ['outer'], which are not among"),
        (["inspect", "own.py:right"], "has ['outer_fn', 'inputs'], which are not among"),
        (["doctor", "own.py:judged"], "return (model, example)"),
    ],
)
def test_what_cannot_run_says_so(
    script: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == cli.FAILED == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.startswith(f"innerloop {arguments[0]}: ")
    assert not printed.out


@pytest.mark.usefixtures("undrawn")
def test_force_replaces_the_page(script: str, tmp_path: Path) -> None:
    page = tmp_path / "innerloop-check" / "report.html"
    page.parent.mkdir()
    page.write_text("mine")
    assert cli.main(["check", f"{script}:judged"]) == cli.FAILED
    assert page.read_text() == "mine"
    assert cli.main(["check", f"{script}:judged", "--force"]) == cli.OK
    assert page.read_text() == "page"


def test_what_takes_long_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with cli.Progress("check") as progress:
        progress("report", 3, 9)
        time.sleep(2.3)
    said = capsys.readouterr().err
    assert said == "innerloop check: report 3 of 9, 2 s\n"
    with cli.Progress("check"):
        pass
    assert not capsys.readouterr().err


def test_json_has_no_infinity_and_no_large_tensors() -> None:
    found = cli.plain({"a": float("inf"), "b": torch.ones(20_000), "c": (torch.ones(2), True)})
    assert found == {
        "a": None,
        "b": {"shape": [20_000], "norm": pytest.approx(20_000**0.5)},
        "c": [[1.0, 1.0], True],
    }


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


@pytest.mark.slow
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


def test_bench_hands_its_arguments_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--only", "M7"])
    assert ended.value.code == 2
    assert "M1, M2, M3, M4" in capsys.readouterr().err


def test_bench_outside_of_a_clone_says_where_to_run_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--only", "M2"]) == cli.FAILED
    assert "in a clone of the repository" in capsys.readouterr().err
