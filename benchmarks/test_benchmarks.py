"""The benchmark's own tests: `pytest benchmarks`. What is measured must be measured right."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from benchmarks import (
    __main__,
    check,
    figures,
    implicit,
    long,
    memory,
    optimizers,
    recorded,
    report,
    results,
    timing,
)
from benchmarks.contenders import CONTENDERS, Contender, handwritten
from benchmarks.imports import ImportTimes
from benchmarks.spread import Spread
from benchmarks.workloads import WARM_UP, WORKLOADS, Workload

SMALL = {
    "M1": dataclasses.replace(WORKLOADS["M1"], tasks=2, steps=2),
    "M2": dataclasses.replace(WORKLOADS["M2"], steps=2),
    "M3": dataclasses.replace(WORKLOADS["M3"], steps=1),
    "M4": dataclasses.replace(WORKLOADS["M4"], steps=1),
}


def _pairs() -> list[ParameterSet]:
    """Every contender on every workload that it takes; XLA compiles M4 for half a minute."""
    return [
        pytest.param(
            contender,
            name,
            id=f"{name}, {contender.name}",
            marks=[pytest.mark.slow] if "jax" in contender.packages and name == "M4" else [],
        )
        for contender in CONTENDERS
        for name, workload in SMALL.items()
        if contender.takes(workload)
    ]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's compiler
@pytest.mark.parametrize(("contender", "name"), _pairs())
def test_every_contender_computes_the_meta_gradient_twice(contender: Contender, name: str) -> None:
    workload = SMALL[name]
    if contender.missing():
        pytest.skip(f"not installed: {contender.missing()}")
    reference = handwritten.reference(workload)
    run = contender.prepare(workload)
    assert check.error(run(), reference) < workload.tolerance
    assert check.error(run(), reference) < workload.tolerance  # the first run leaves nothing behind


@pytest.mark.parametrize("name", SMALL)
def test_the_check_sees_a_missing_second_derivative(name: str) -> None:
    workload = WORKLOADS["M2"] if name == "M2" else SMALL[name]  # one step of Adam hardly has one
    off = check.error(handwritten.first_order(workload), handwritten.reference(workload))
    assert off > 10 * workload.tolerance


def test_the_reference_is_the_derivative_of_the_loop() -> None:
    """Central differences along one direction; their error is h² = 1e-8 times a third
    derivative."""
    reference = handwritten.reference(WARM_UP)
    torch.manual_seed(3)
    direction = {name: torch.randn_like(g) for name, g in reference.items()}
    h = 1e-4
    outer = [
        _outer_loss(WARM_UP, {n: sign * h * d for n, d in direction.items()}) for sign in (1, -1)
    ]
    expected = sum(float((reference[n] * d).sum()) for n, d in direction.items())
    assert (outer[0] - outer[1]) / (2 * h) == pytest.approx(expected, rel=1e-5)


def _outer_loss(workload: Workload, shift: dict[str, Tensor]) -> float:
    """The loop with `torch.optim` itself, from shifted initial parameters."""
    model = workload.model(torch.float64)
    task = workload.batches(torch.float64)[0]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(shift[name])
    optimizer = workload.torch_optimizer(model)
    for x, y in task.inner:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return torch.nn.functional.cross_entropy(model(task.outer.x), task.outer.y).item()


def test_functional_and_module_forms_agree() -> None:
    for workload in WORKLOADS.values():
        if workload.forward is not None:
            model, x = workload.model(), workload.batches()[0].outer.x
            assert torch.equal(workload.forward(dict(model.named_parameters()), x), model(x))


def test_error_of_missing_wrong_and_nan() -> None:
    reference = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(1)}
    assert check.error(reference, reference) == 0
    assert check.error({"a": reference["a"]}, reference) == math.inf
    assert check.error({**reference, "b": torch.full((1,), math.nan)}, reference) == math.inf
    assert check.error({**reference, "a": torch.ones(3)}, reference) == math.inf
    assert check.error({**reference, "a": torch.tensor([3.0, 4.5])}, reference) == pytest.approx(
        0.1, rel=2e-3
    )


def test_spread_pairs_rounds() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == (1, 2, 3, 4, 5)
    assert Spread.of([7.0]) == (7,) * 5
    # A machine twice as slow in the second round changes neither ratio.
    assert Spread.of_ratios([1.0, 2.0], [2.0, 4.0]) == (0.5,) * 5


def test_interleaving_rotates() -> None:
    order: list[str] = []
    seconds = timing.interleave(
        {name: lambda name=name: order.append(name) for name in "abc"},  # type: ignore[misc]
        3,
        warm_up=0,
    )
    assert "".join(order) == "abcbcacab"
    assert [len(times) for times in seconds.values()] == [3, 3, 3]


def test_one_contender_that_fails_or_is_absent_stops_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: Workload) -> object:
        raise ValueError("no such thing")

    contenders = (
        Contender("absent", handwritten.prepare, ("a_package_that_does_not_exist",)),
        Contender("broken", broken),  # type: ignore[arg-type]
        Contender("wrong", lambda workload: lambda: handwritten.first_order(workload)),
        Contender("right", handwritten.prepare, ours=True),
    )
    monkeypatch.setattr(results, "CONTENDERS", contenders)
    result = results.measure(SMALL["M1"], repeats=2, with_memory=False)
    problems = {row.name: row.problem for row in result.rows}
    assert problems["absent"] == "not installed: a_package_that_does_not_exist"
    assert problems["broken"] == "failed: ValueError: no such thing"
    assert str(problems["wrong"]).startswith("wrong meta-gradient")
    assert problems["right"] is None
    assert len(result.rows[-1].seconds) == 2
    assert [row.name for row in result.failed] == ["broken", "wrong"]
    assert "not installed: a_package_that_does_not_exist" in report.workload_section(result)
    assert {reading.verdict for reading in figures.read(result)} == {"not measured"}


def test_peak_memory_sees_an_allocation() -> None:
    """In a fresh process: this one may have had a higher peak already."""
    program = (
        "from benchmarks.memory import high_water; before = high_water(); "
        "block = bytearray(b'x') * 300_000_000; print(high_water() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=memory.ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == pytest.approx(300, rel=0.01)


def test_memory_of_a_contender_in_its_own_process() -> None:
    peak = memory.measure("M1", "hand-written loop")
    assert 0 <= peak.above_import < 100 < peak.process
    with pytest.raises(RuntimeError, match="was not measured"):
        memory.measure("M1", "no such contender")


def test_the_document_is_updated_in_place(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    report.update(document, {"M1": "first", "M2": "second"})
    report.update(document, {"M1": r"third \1"})
    text = document.read_text()
    assert "first" not in text
    assert text.index(r"third \1") < text.index("second")
    assert text.count("<!-- begin M1 -->") == 1


def test_import_figure() -> None:
    reading = figures.read_import(ImportTimes([1.0] * 3, [0.1, 0.2, 0.9]))[0]
    assert (reading.value, reading.verdict) == (0.2, "reached")


def test_long_loops_are_weighed() -> None:
    states, saved = long.weigh(long.LOOPS["P7"])
    parameters = 4 * (32 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10)
    assert states == pytest.approx(
        3 * parameters, rel=1e-3
    )  # Adam keeps two more of each; packing pads a few bytes
    activations = (
        4 * 128 * (32 + 256 + 256 + 10) + 8 * 128 + 4
    )  # input, tanh twice, log-probabilities, targets, weight
    assert saved == activations


def test_long_loops_are_measured_and_told() -> None:
    """Everything but its length: the real one takes a quarter of an hour."""
    peak = long.LongPeak(**long._fresh("peak", "P9", 3, 1))
    assert 0 < peak.above_import < 100 < peak.process
    assert peak.slots == 3
    timed = long._fresh("ratio", "P9", 3, 2)
    assert timed["difference"] < 1e-10
    per_step = {
        int(steps): values for steps, values in long._fresh("growth", "P9", 1, 100, 50, 100).items()
    }
    assert all(value > 0 for values in per_step.values() for value in values)
    times = long.LongTimes(
        peak,
        peak,
        Spread.of_ratios(timed["Checkpointed"], timed["StoreAll"]),
        timed["difference"],
        **dict.fromkeys(("higher_steps", "higher_peak", "higher_above", "gpt_peak", "gpt_seconds")),
        endless=peak,
        per_step=per_step,
        conv4=dataclasses.replace(peak, process=3000),
    )
    readings = figures.read_long(times)
    verdicts = {reading.title: reading.verdict for reading in readings}
    assert verdicts["T=100: difference from StoreAll in float64"] == "reached"
    assert verdicts["conv4, T=1000: MB of the process"] == "missed"
    assert [reading.verdict for reading in readings if reading.name == "P8"] == ["not measured"]
    told = report.long_section(times, {"date": "today", "machine": "this one"})
    assert "| conv4" in told or "M3's conv4" in told
    assert "higher does" not in told
    assert "higher does 7 steps" in report.long_section(
        dataclasses.replace(
            times, higher_steps=7, higher_peak=1.0, higher_above=2.0, gpt_peak=3.0, gpt_seconds=4.0
        ),
        {"date": "today", "machine": "this one"},
    )
    assert json.loads(report.as_json([], readings, times))["long"]["conv4"]["process"] == 3000


@pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained")
def test_every_library_gives_the_closed_form_of_a_given_solution() -> None:
    with implicit._double_precision_in_jax():
        found = [
            implicit._measure(case, 2, "wall")
            for case in (implicit._roots(()), implicit._roots((3,)), implicit._ridge(20, 5))
        ]
    for derivative in found:
        assert derivative.seconds > 0
        assert all(error < 1e-8 for error in derivative.errors.values()), derivative
    told = report.implicit_section(found, {"date": "today", "machine": "this one"})
    assert "3 roots by vmap" in told
    assert "BLAS: " in told


def test_the_longest_loop_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        long, "_fresh", lambda _, __, steps: {"process": 300 + 50 * steps + steps**2 / 10}
    )
    steps, peak, above = long.longest("higher", 2000)
    assert (steps, peak < 2000 < above) == (31, True)


@pytest.mark.parametrize(
    "arguments", [["--only", "M9"], ["--repeats", "0"], ["--out", "figures.csv"]]
)
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.parse(arguments)


# -- optimizers ------------------------------------------------------------------------------------


def test_the_table_of_optimizers_tells_right_from_wrong() -> None:
    """SGD with momentum, by hand: differentiable=True says .90 where .72 is right; higher ignores
    `maximize`."""
    rules = [rule for rule in optimizers.ROWS if rule.title in ("SGD (momentum)", "SGD (maximize)")]
    lines = {(line.rule.title, line.contender): line.cells for line in optimizers.measure(rules)}
    for (_, who), cells in lines.items():
        if who == "innerloop":
            assert {cell.verdict for cell in cells.values()} == {"right"}
    assert lines["SGD (momentum)", "torch, differentiable=True"]["forward"].verdict == "right"
    assert lines["SGD (momentum)", "torch, differentiable=True"]["start"].verdict == "wrong"
    assert lines["SGD (maximize)", "higher"]["forward"].verdict == "wrong"
    assert lines["SGD (momentum)", "higher"]["weight_decay = 0"].verdict == "missing"
    text = optimizers.section(
        [
            optimizers.Line(rule, who, cells)
            for rule in rules
            for (t, who), cells in lines.items()
            if t == rule.title
        ]
    )
    assert "| SGD (momentum) | all 8 right |" in text


def test_the_page_of_optimizers_has_its_marks_and_no_wrong_cell_of_ours() -> None:
    page = (Path(__file__).parent.parent / "docs" / "optimizers.md").read_text(encoding="utf-8")
    table = page[page.index(optimizers.BEGIN) : page.index(optimizers.END)]
    listed = [
        line.split("|")[1:3]
        for line in table.splitlines()
        if line.startswith("| ") and " right" in line
    ]
    assert {name.strip() for name, _ in listed} == {rule.title for rule in optimizers.ROWS}
    assert all(ours.strip().startswith("all ") for _, ours in listed)


def test_updates_are_those_of_higher_where_it_is_right() -> None:
    from benchmarks import updates

    params, grads = ([torch.linspace(-1, 1, 6) * (i + 1) for i in range(3)] for _ in range(2))
    for rule in ("SGD", "SGD, momentum"):
        pairs = zip(
            updates._ours(rule, params, grads)(),
            updates._theirs(rule, params, grads)(),
            strict=True,
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs)


# -- beside what is recorded -----------------------------------------------------------------------


def test_a_figure_is_compared_with_the_recorded_one() -> None:
    before = [
        figures.Reading("P2", "M1: time of a / higher", 0.25, 0.2),
        figures.Reading("P3", "M2: time of b / higher", 0.55, 0.61),
        figures.Reading("P4", "M3: time of c / higher", 1.03, 0.9),
    ]
    known = recorded.recorded(f"text\n\n{report.figures_table(before)}\n\nmore")
    assert known == {(r.name, r.title): pytest.approx(r.value, abs=1e-3) for r in before}
    now = [
        dataclasses.replace(before[0], value=0.23),
        dataclasses.replace(before[1], value=0.62),
        dataclasses.replace(before[2], value=0.7),
        figures.Reading("P5", "M4: not recorded", 1.0, 2.0),
    ]
    table, worse = recorded.regressions(now, known)
    assert worse == now[:1]
    assert [line.split()[-1] for line in table.splitlines()[1:]] == [
        "REGRESSED",
        "recorded",
        "better",
    ]


def test_the_page_records_the_figures_that_are_measured() -> None:
    known = recorded.recorded(recorded.PAGE.read_text(encoding="utf-8"))
    titles = {(figure.name, figure.title()) for figure in figures.FIGURES}
    assert len(titles & set(known)) >= 8


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        results.Row("hand-written loop", "hand-written loop", False, seconds=[1.0, 1.1, 1.2]),
        results.Row("track", "track", True, seconds=[0.5, 0.5, 0.7]),
        results.Row("JAX jit", "JAX jit", False, "not installed: jax"),
    ]
    result = results.Result("M2", "a loop", 3, "cpu", 1e-3, 0.5, {}, 0.0, rows)
    recorded.draw([result], tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
