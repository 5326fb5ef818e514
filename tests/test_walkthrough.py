"""The seed's system: three columns that agree, numbers that are known, a picture and a notebook
that show the same."""

from __future__ import annotations

import ast
import functools
import importlib.util
import io
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import numpy as np
import pytest

from innerloop import track
from innerloop.errors import MissingExtraError
from innerloop.walkthrough import Row, System, Walkthrough, draw, run, to_text, write_picture
from innerloop.walkthrough import _by_autograd as by_autograd
from innerloop.walkthrough import _by_differences as by_differences
from innerloop.walkthrough import _closed_form as closed_form
from innerloop.walkthrough import _picture as picture
from innerloop.walkthrough import _table as table
from innerloop.walkthrough import _text as text
from innerloop.walkthrough._quantities import Matrix, along

ROOT = Path(__file__).parent.parent

FACTS = {
    "loss L": 0.72,
    "d L / d ŷ": -1.2,
    "d L / d a₀": -0.48,
    "d L / d b₀": -0.72,
    "a₁": 2.48,
    "b₁": 3.72,
    "d a₁ / d a₀": 1.08,
    "d a₁ / d b₀": -0.24,
    "d b₁ / d a₀": -0.24,
    "d b₁ / d b₀": 0.88,
    "test loss TL": 0.1255606272,
    "d TL / d a₁": -0.24855552,
    "d TL / d b₁": -0.37283328,
    "d TL/d a₁ · d a₁/d a₀": -0.24855552 * 1.08,
    "+ d TL/d b₁ · d b₁/d a₀": -0.37283328 * -0.24,
    "= d TL / d a₀": -0.1789599744,
    "d TL/d a₁ · d a₁/d b₀": -0.24855552 * -0.24,
    "+ d TL/d b₁ · d b₁/d b₀": -0.37283328 * 0.88,
    "= d TL / d b₀": -0.2684399616,
    "a after the outer step": 2.1789599744,
    "b after the outer step": 3.2684399616,
    "d TL / d a of M": -0.1789599744,
    "d TL / d b of M": -0.2684399616,
    "a of M, after its step": 2.1789599744,
    "b of M, after its step": 3.2684399616,
    "a of m, not moved": 2.0,
    "b of m, not moved": 3.0,
}
"""Known without this program: arithmetic on paper from the numbers of the problem."""

VISIBLE = (
    "1.08",
    "-0.24",
    "0.88",
    "0.1255606272",
    "-0.1789599744",
    "-0.2684399616",
    "2.1789599744",
    "3.2684399616",
)


@pytest.fixture(scope="module")
def result() -> Walkthrough:
    return run()


def disagreeing(walkthrough: Walkthrough) -> set[str]:
    return {row.name.strip() for row in walkthrough.rows if not row.agrees}


# -- the numbers -----------------------------------------------------------------------------------


def test_every_known_number_is_there_in_all_three_columns(result: Walkthrough) -> None:
    rows = {row.name.strip(): row for row in result.rows}
    assert len(rows) == len(result.rows) - len(result.blocks[4].rows), (
        "a name stands for two rows of the first blocks"
    )
    for name, value in FACTS.items():
        assert rows[name].closed == pytest.approx(value, abs=1e-14), name
        assert rows[name].autograd == pytest.approx(value, abs=1e-12), name
        assert rows[name].finite == pytest.approx(value, abs=1e-6), name


def test_the_first_three_blocks_hold_the_known_numbers_and_nothing_else(
    result: Walkthrough,
) -> None:
    assert [row.name.strip() for block in result.blocks[:3] for row in block.rows] == list(FACTS)


def test_all_rows_agree(result: Walkthrough) -> None:
    assert (table.AUTOGRAD_TOLERANCE, table.FINITE_TOLERANCE) == (1e-12, 1e-6)
    assert not disagreeing(result)
    assert result.agrees


def test_other_numbers_agree_as_well() -> None:
    assert run(System(start=(-1.0, 0.5), true=(1.0, -2.0), x=-0.2, rate=0.8)).agrees


@pytest.mark.parametrize("rate", [table.SETTLES, 1.0, table.OVERSHOOTS])
def test_the_influence_across_and_along_the_valley_has_a_formula(rate: float) -> None:
    """Along it telescopes to ρₖ/ρ₀, across it is a product of 1 - 2ηxr - 4ηx²ρ²
    (docs/devnotes/walkthrough.md)."""
    system = System(rate=rate)
    many = closed_form.many_steps(system, 10)
    across, valley = system.directions
    radii = [math.hypot(*point) for point in many.points]
    product = 1.0
    for k, matrix in enumerate(many.from_start):
        assert along(matrix, valley) == pytest.approx(radii[k] / radii[0], rel=1e-12)
        assert along(matrix, across) == pytest.approx(product, rel=1e-9, abs=1e-14)
        r = radii[k] ** 2 * system.x - system.y
        product *= 1 - 2 * rate * system.x * r - 4 * rate * system.x**2 * radii[k] ** 2


@pytest.mark.parametrize("rate", [table.SETTLES, table.OVERSHOOTS])
def test_the_influence_of_each_step_agrees_three_ways(rate: float) -> None:
    """∂θ₁₀/∂θₜ is in the picture, not in the table."""
    system = System(rate=rate)
    closed, autograd, finite = (
        m.many_steps(system, 10) for m in (closed_form, by_autograd, by_differences)
    )
    assert len(closed.to_end) == len(autograd.to_end) == len(finite.to_end) == 11
    for c, a, f in zip(closed.to_end, autograd.to_end, finite.to_end, strict=True):
        size = max(1.0, *(abs(x) for x in flat(c)))
        assert flat(a) == pytest.approx(flat(c), abs=1e-12 * size)
        assert flat(f) == pytest.approx(flat(c), abs=1e-6 * size)
    assert flat(autograd.to_end[0]) == pytest.approx(flat(autograd.from_start[-1]), rel=1e-12)


def flat(matrix: Matrix) -> list[float]:
    return [x for row in matrix for x in row]


def test_small_steps_forget_and_large_steps_amplify(result: Walkthrough) -> None:
    for long_run, low, high in ((result.settles, 0, 0.01), (result.overshoots, 10, math.inf)):
        across, valley = long_run.system.directions
        last = long_run.steps.from_start[-1]
        assert low < abs(along(last, across)) < high
        assert 1 < along(last, valley) < 1.7


def test_finite_differences_do_not_use_innerloop() -> None:
    """Only the record they fill in; not the library that they check."""
    tree = ast.parse(Path(by_differences.__file__).read_text())
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    plain = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert {name for name in froms | plain if name and name.startswith("innerloop")} == {
        "innerloop.walkthrough._quantities"
    }


# -- it can fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "agrees"),
    [
        (Row("exact", 1.0, 1.0, 1.0), True),
        (Row("rounding", 1.0, 1.0 + 0.9e-12, 1.0 + 0.9e-6), True),
        (Row("autograd off", 1.0, 1.0 + 1.1e-12, 1.0), False),
        (Row("finite off", 1.0, 1.0, 1.0 + 1.1e-6), False),
        (Row("relative above one", 100.0, 100.0 + 0.9e-10, 100.0 + 0.9e-4), True),
        (Row("absolute below one", 1e-9, 0.0, 0.0), False),
        (Row("autograd nan", 1.0, math.nan, 1.0), False),
        (Row("finite nan", 1.0, 1.0, math.nan), False),
        (Row("closed nan", math.nan, 1.0, 1.0), False),
        (Row("infinite", 1.0, math.inf, 1.0), False),
    ],
    ids=lambda value: value.name if isinstance(value, Row) else None,
)
def test_a_row_agrees_within_its_tolerances_only(row: Row, agrees: bool) -> None:
    assert row.agrees is agrees


def test_dropping_the_second_order_term_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """First-order MAML instead of the exact gradient: every derivative through the step is wrong,
    no value is."""
    monkeypatch.setattr(by_autograd, "track", functools.partial(track, first_order=True))
    wrong = disagreeing(run())
    assert {
        "d a₁ / d a₀",
        "d a₁ / d b₀",
        "= d TL / d a₀",
        "a after the outer step",
        "a of M, after its step",
    } <= wrong
    assert not {"loss L", "d L / d a₀", "a₁", "test loss TL", "d TL / d a₁"} & wrong


def test_a_gradient_that_does_not_arrive_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without params=, meta-model M has no gradient, and no number stands for it."""

    def forgets_params(model: Any, optimizer: Any, params: Any = None) -> Any:
        return track(model, optimizer)

    monkeypatch.setattr(by_autograd, "track", forgets_params)
    wrong = [row for row in run().rows if not row.agrees]
    assert [row.name for row in wrong] == [
        "d TL / d a of M", "d TL / d b of M", "a of M, after its step", "b of M, after its step",
    ]  # fmt: skip
    assert math.isnan(wrong[0].autograd)


def test_a_wrong_formula_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = closed_form.step_jacobian

    def wrong(system: System, at: tuple[float, float]) -> Matrix:
        (aa, ab), lower = right(system, at)
        return (aa + 2e-6, ab), lower

    monkeypatch.setattr(closed_form, "step_jacobian", wrong)
    assert "d a₁ / d a₀" in disagreeing(run())


# -- text ------------------------------------------------------------------------------------------


def test_the_text_shows_the_numbers_in_every_column(result: Walkthrough) -> None:
    printed = to_text(result)
    for number in VISIBLE:
        assert any(line.split().count(number) >= 3 for line in printed.splitlines()), number
    assert (
        "d TL / d a₀  =  (-0.24855552) · (1.08) + (-0.37283328) · (-0.24)  =  -0.1789599744"
        in printed
    )
    assert f"All {len(result.rows)} rows agree" in printed
    assert "✗" not in printed


def test_the_text_fits_and_has_a_sentence_for_each_block(result: Walkthrough) -> None:
    printed = to_text(result)
    assert max(map(len, printed.splitlines())) <= text.WIDTH == 100
    for block in result.blocks:
        assert block.title in printed
        assert block.sentence in printed
        assert block.sentence.endswith(".")


def test_the_text_names_what_disagrees(result: Walkthrough) -> None:
    inner = result.blocks[0]
    broken = inner.rows[1]._replace(autograd=-1.2 + 3e-9)
    blocks = (inner._replace(rows=(inner.rows[0], broken, *inner.rows[2:])), *result.blocks[1:])
    printed = to_text(replace(result, blocks=blocks))
    assert f"1 of {len(result.rows)} rows DISAGREE (allowed: 1e-12 and 1e-06): d L / d ŷ" in printed
    (line,) = (line for line in printed.splitlines() if "✗" in line)
    assert line.split()[:5] == ["d", "L", "/", "d", "ŷ"]
    assert line.split()[-2] in ("2e-09", "3e-09")  # relative to 1.2


# -- picture ---------------------------------------------------------------------------------------


def test_the_picture_is_labelled_and_draws_the_data(result: Walkthrough) -> None:
    surface, influence = draw(result).axes
    for axes in (surface, influence):
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.get_title("left")
    drawn = [np.asarray(line.get_ydata()).tolist() for line in influence.lines]
    for long_run, which in ((result.overshoots, 0), (result.settles, 0), (result.settles, 1)):
        direction = long_run.system.directions[which]
        assert [abs(along(matrix, direction)) for matrix in long_run.steps.to_end] in drawn
    paths = [np.asarray(line.get_xydata()).tolist() for line in surface.lines]
    assert [list(point) for point in result.settles.steps.points] in paths


def test_the_picture_shows_every_point_it_draws(result: Walkthrough) -> None:
    for long_run, shown in ((result.settles, 11), (result.overshoots, 4)):
        for point in long_run.steps.points[:shown]:
            assert all(picture.LOW < value < picture.HIGH for value in point)


def test_the_picture_is_written_to_paths_and_files(result: Walkthrough, tmp_path: Path) -> None:
    write_picture(result, tmp_path / "p.png", dpi=30)
    write_picture(result, tmp_path / "p.svg", dpi=30)
    buffer = io.BytesIO()
    write_picture(result, buffer, dpi=30)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert buffer.getvalue().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_without_matplotlib_the_picture_says_what_to_install(
    result: Walkthrough, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'innerloop\[plot\]'"):
        draw(result)


# -- notebook --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "build_notebook", ROOT / "scripts" / "build_notebook.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(notebook: Any) -> list[str]:
    """What each code cell wrote to standard output."""
    return [
        "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_the_stored_notebook_is_the_one_its_source_makes(builder: ModuleType) -> None:
    stored = nbformat.read(builder.NOTEBOOK, as_version=4)
    made = builder.unexecuted(builder.SOURCE.read_text(encoding="utf-8"))
    assert [(cell.cell_type, cell.source, cell.id) for cell in stored.cells] == [
        (cell.cell_type, cell.source, cell.id) for cell in made.cells
    ], "run python scripts/build_notebook.py"
    assert stored.metadata == made.metadata


@pytest.mark.slow
def test_the_notebook_runs_and_prints_the_known_numbers(builder: ModuleType) -> None:
    made = builder.execute(builder.unexecuted(builder.SOURCE.read_text(encoding="utf-8")))
    everything = "".join(printed(made))
    for number in VISIBLE:
        assert number in everything
    assert "all agree: True" in everything
    assert [
        output.data.keys() & {"image/png"}
        for cell in made.cells
        for output in cell.get("outputs", ())
        if "data" in output
    ]
    assert printed(nbformat.read(builder.NOTEBOOK, as_version=4)) == printed(made), (
        "run python scripts/build_notebook.py"
    )


def test_the_percent_format_is_split_into_cells(builder: ModuleType) -> None:
    source = (
        '"""Not a cell."""\n\n# %% [markdown]\n# # Title\n#\n# text\n\n'
        "# %%\nx = 1  # %\n\n\n# %%\nprint(x)\n"
    )
    assert builder.cells(source) == [
        ("markdown", "# Title\n\ntext"),
        ("code", "x = 1  # %"),
        ("code", "print(x)"),
    ]
