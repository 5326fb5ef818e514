"""The audit as a command: what it finds on the PyTorch that it was written with, and when it says
so by its exit code."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from innerloop import cli, doctor
from innerloop.doctor import _probe as probe
from innerloop.doctor._cases.case import Applied, Case, noise


def find(name: str) -> Case:
    return next(case for case in doctor.all_cases() if case.name == name)


class TwiceWrong(torch.autograd.Function):
    """x³, whose gradient says 3x² and whose second derivative says 5x: made up, so that the probe
    has something to find."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (3 * x.detach() ** 2 + 5 * (x**2 - x.detach() ** 2) / 2)


WRONG = Case("made up", "functions", lambda: Applied(TwiceWrong.apply, (noise(3),)))


def test_a_second_derivative_that_is_wrong_without_an_error_is_found():
    finding = doctor.examine(WRONG)
    assert finding.torch["first"] == "right"
    assert finding.torch["second"] == "wrong"
    assert finding.silent
    assert not finding.supported
    assert finding.action == "SILENT"


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13"),
    reason="what a newer PyTorch has mended shows in the table",
)
@pytest.mark.parametrize(
    ("name", "derivative", "action"),
    [
        ("parametrizations.weight_norm (dim=0)", "second", "replaced"),
        ("nn.utils.weight_norm", "second", "replaced"),
        ("nn.LayerNorm", "third", "replaced"),
        ("nn.LayerNorm", "back", "replaced"),
        ("torch.linalg.solve", "back", "raises for back, else right"),
        ("nn.BatchNorm1d (train)", "third", "replaced"),
        ("torch.cholesky_inverse", "mixed", "replaced"),
        ("torch.scatter_reduce(prod)", "forward", "raises"),
        ("F.embedding (by frequency)", "second", "raises"),
        ("nn.CrossMapLRN2d", "first", "raises"),
        ("torch.special.bessel_j0", "first", "raises"),
    ],
)
def test_what_is_wrong_in_torch_2_13_is_found_and_does_not_pass(
    name: str, derivative: str, action: str
):
    finding = doctor.examine(find(name))
    assert finding.torch[derivative] == "wrong"
    assert not finding.silent
    assert finding.action == action


def test_an_operation_that_lacks_nothing_is_left_alone():
    finding = doctor.examine(find("nn.Linear"))
    assert finding.action == ""
    assert set(finding.torch.values()) == {"right"}
    assert finding.supported


# -- the page --------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "doctor.md"
RENEW = "docs/doctor.md is out of date: paste what `innerloop doctor --markdown` prints"


def rows_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_was_made_from_the_cases_that_there_are():
    names = [case.name for case in doctor.all_cases()]
    operations = Counter(name.partition("(")[0].strip() for name in names)
    text = PAGE.read_text().partition("## The table")[2]
    assert f": {len(names)} cases of {len(operations)} operations\n" in text, RENEW
    for title, *_ in rows_of(text):
        several = re.fullmatch(r"(.*) \((\d+) cases\)", title)
        known = operations[several[1]] >= int(several[2]) if several else title in names
        assert known, f"{RENEW} ({title})"


@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the page names its PyTorch")
def test_the_page_is_what_the_command_prints():
    found = doctor.to_markdown(tuple(doctor.examine_all()))
    text = PAGE.read_text().partition("## The table")[2]
    assert rows_of(text) == rows_of(found), RENEW
    assert text.partition("First:")[2] == found.partition("First:")[2], RENEW


def test_names_are_unique():
    names = [case.name for case in doctor.all_cases()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("markdown", [False, True])
def test_the_command_prints_a_table_and_fails_only_if_something_passes(
    markdown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    cases = [find("nn.utils.weight_norm"), find("nn.Linear"), find("F.pdist (p=2)")]
    monkeypatch.setattr(probe, "all_cases", lambda: cases)
    assert cli.main(["doctor", *(["--markdown"] if markdown else [])]) == cli.OK
    shown = capsys.readouterr().out
    assert "nn.utils.weight_norm" in shown
    assert "nn.Linear" not in shown
    assert "innerloop lets 0 pass" in shown
    monkeypatch.setattr(
        probe, "all_cases", lambda: [*cases, dataclasses.replace(WRONG, name="broken")]
    )
    assert cli.main(["doctor"]) == cli.DISAGREES
    assert "SILENT" in capsys.readouterr().out
