"""The audit as a command: what it finds on the PyTorch that it was written with, and when it says
so by its exit code."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import innerloop
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


# -- a model of the user's own ---------------------------------------------------------------------


class Reader(nn.Module):
    """An encoder with attention, of which PyTorch's fused kernel has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.norm(self.attend(h, h, h, need_weights=False)[0])


def test_a_model_whose_operations_are_replaced() -> None:
    model = Reader()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    report = doctor.examine(model, torch.randn(2, 3, 4))
    assert report.ok
    assert report.steps == (len(list(model.parameters())),) * 2
    names = [op.operation for op in report.operations]
    assert any("attention" in name for name in names), names
    assert all(op.action == "replaced" for op in report.operations)
    where = next(op.modules for op in report.operations if "attention" in op.operation)
    assert where == ("attend",)
    assert "can be differentiated" in str(report)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert not model.body._forward_pre_hooks


def test_a_model_with_an_operation_that_is_refused() -> None:
    """once_differentiable: there is no second derivative to be had, and nothing replaces it."""
    from tests.small_problems import Once

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(self.w * x)

    report = doctor.examine(Model(), torch.ones(3))
    assert not report.ok
    assert "once_differentiable" in report.error
    assert "CANNOT" in str(report)


def test_a_model_is_called_as_its_example_says() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.unused = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.w * x * scale

    for example in ((torch.ones(3), torch.ones(3)), {"x": torch.ones(3), "scale": torch.ones(3)}):
        report = doctor.examine(Two(), example)
        assert report.ok
        assert report.steps == (1, 2)
        assert "1 of 2 parameters have no gradient" in str(report)


def test_what_cannot_be_examined() -> None:
    with pytest.raises(innerloop.InvalidInputError, match="no parameters"):
        doctor.examine(nn.ReLU(), torch.ones(2))

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w.detach()

    with pytest.raises(innerloop.InvalidInputError, match="does not depend on its parameters"):
        doctor.examine(Constant(), torch.ones(3))
