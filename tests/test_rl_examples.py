"""The examples of reinforcement learning in small: that they run, and the figures that are cheap
to reproduce.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def imported(name: str, folder: Path = EXAMPLES) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def policy() -> ModuleType:
    return imported("meta_policy")


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return imported("rl_figures")


# -- one PPO update --------------------------------------------------------------------------------


def test_the_meta_learned_policy_is_compared_and_drawn(
    policy: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy, "RATES", (0.1,))
    monkeypatch.setattr(policy, "CLIPS", (0.5,))
    config = dataclasses.replace(policy.CONFIG, iterations=1, tasks=2, episodes=2, hidden=(4,))
    trained, random = policy.run(config, 3, tmp_path)
    assert trained.shape == random.shape == (2, 3)
    printed = capsys.readouterr().out
    assert "meta-learned: " in printed
    assert "random start, rate 0.1, clip range 0.5: " in printed
    for name in ("returns", "influence", "paths"):
        assert (tmp_path / f"rl-{name}.png").stat().st_size > 1000


def test_the_update_is_one_of_ppo(policy: ModuleType) -> None:
    """One rollout, several epochs of several minibatches, a clip range."""
    config = policy.CONFIG
    assert config.inner == "ppo"
    assert config.adaptation_steps == 1
    assert config.inner_epochs * config.inner_minibatches == 8
    learner = policy.learner_of(dataclasses.replace(config, episodes=3))
    tasks = learner.env.sample_tasks(2, learner.generator)
    (data,), _ = learner._acted(tasks, 0)
    assert len(learner._batches(data)) == 8


@pytest.mark.slow
def test_meta_learning_beats_the_best_random_start_after_one_update(
    policy: ModuleType, tmp_path: Path
) -> None:
    """The 95 % intervals do not overlap."""
    torch.set_num_threads(1)
    trained, random = policy.run(policy.CONFIG, 200, tmp_path)
    halves = [1.96 * x[1].std() / len(x[1]) ** 0.5 for x in (trained, random)]
    assert trained[1].mean() - halves[0] > random[1].mean() + halves[1]


# -- figures ---------------------------------------------------------------------------------------


def test_discounts_rise_in_front_of_signals_and_fall_in_front_of_noise(figures: ModuleType) -> None:
    signal, noise = figures.learned_discounts(seeds=200, iterations=200, meta_lr=0.1)
    assert signal.shape == (5, 200)
    assert noise.shape == (4, 200)
    # From .5 both. The mean over seeds is known to .007.
    assert signal.mean() > 0.52
    assert noise.mean() < 0.2


@pytest.mark.slow
def test_the_figure_of_learned_discounts(figures: ModuleType) -> None:
    signal, noise = figures.learned_discounts()
    assert signal.mean() > 0.7
    assert noise.mean() < 0.05


def test_a_look_ahead_from_zeros_has_the_known_rewards(figures: ModuleType) -> None:
    assert figures.lola_from_zeros(0) == pytest.approx(-1.997, abs=1e-3)
    assert figures.lola_from_zeros(1) == pytest.approx(-1.005, abs=1e-3)


@pytest.mark.slow
def test_naive_learners_defect_and_those_that_look_ahead_cooperate(figures: ModuleType) -> None:
    assert figures.lola_exact(0).mean() == pytest.approx(-1.99, abs=0.02)
    found = figures.lola_exact(1)
    assert found.mean() == pytest.approx(-1.04, abs=0.02)
    assert (found > -1.2).float().mean() >= 0.9


def test_plain_ppo_is_run_beside_another(figures: ModuleType) -> None:
    pytest.importorskip("gymnasium")
    small = {"total_steps": 256, "steps": 64, "minibatch": 64, "epochs": 1}
    found = figures.beside_sb3({**figures.PENDULUM, **small}, seed=0, episodes=2)
    assert next(iter(found)).startswith("innerloop")
    for returns in found.values():
        # 200 steps, each of which costs between 0 and π² + .1 · 8² + .001 · 2².
        assert returns.shape == (2,)
        assert bool(((returns < 0) & (returns > -200 * 16.3)).all())


# -- the notebook ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    return imported("build_notebook", EXAMPLES.parent / "scripts")


def test_the_stored_notebook_is_the_one_its_source_makes(builder: ModuleType) -> None:
    path = EXAMPLES / "meta_policy.ipynb"
    stored = nbformat.read(path, as_version=4)
    made = builder.unexecuted(builder.NOTEBOOKS[path].read_text(encoding="utf-8"))
    assert [(cell.cell_type, cell.source, cell.id) for cell in stored.cells] == [
        (cell.cell_type, cell.source, cell.id) for cell in made.cells
    ], "run python scripts/build_notebook.py meta_policy"
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    pictures = [output for cell in code for output in cell.outputs if "data" in output]
    assert sum("image/png" in output.data for output in pictures) == 4
    printed = "".join(o.text for cell in code for o in cell.outputs if o.output_type == "stream")
    assert "d new / d old = 0.5" in printed
    assert "reinforce                     16.8%    15.8%" in printed
    found = {
        name: [float(x) for x in re.findall(rf"{name}: .*, (-[\d.]+) ± ([\d.]+) after", printed)[0]]
        for name in ("meta-learned", "random start")
    }
    lower = found["meta-learned"][0] - found["meta-learned"][1]
    assert lower > sum(found["random start"]), "the intervals overlap"


def test_the_cells_of_the_notebook_run_in_small(
    builder: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of them in one process, without a kernel."""
    pytest.importorskip("IPython")
    source = builder.NOTEBOOKS[EXAMPLES / "meta_policy.ipynb"].read_text(encoding="utf-8")
    code = "\n\n".join(text for kind, text in builder.cells(source) if kind == "code")
    for old, new in {
        "ITERATIONS, TASKS = CONFIG.iterations, 200": "ITERATIONS, TASKS = 1, 2",
        "dataclasses.replace(CONFIG,": "dataclasses.replace(CONFIG, tasks=2, episodes=2,",
        "times = [0, 30, 60, 125, 250, 500, 1000]": "times = [0, 5]",
    }.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    (tmp_path / "cells.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(imported("meta_policy"), "RATES", (0.1,))
    monkeypatch.setattr(sys.modules["meta_policy"], "CLIPS", (0.5,))
    imported("cells", tmp_path)
    assert "random start: -" in capsys.readouterr().out
