"""``examples/hyperparameters.py`` in small, and what its page claims."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tqdm import tqdm

import innerloop
from tests.test_examples import imported

SMALL = "--seeds 1 --steps 20 --iterations 3 --search 10 --runs 1".split()


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return imported("hyperparameters")


def test_the_three_sets_of_images_are_disjoint_and_only_training_labels_are_wrong(
    example: ModuleType,
) -> None:
    task, given, wrong = example.corrupted_labels(0)
    sets = [task.train, task.validation, task.test]
    assert [len(rows) for rows in sets] == [600, 600, 597]
    assert torch.cat(sets).sort().values.equal(torch.arange(1797))
    assert torch.equal(given != task.labels, wrong)
    assert not wrong[task.validation].any()
    assert not wrong[task.test].any()
    assert wrong[task.train].float().mean().item() == pytest.approx(0.4, abs=0.06)
    sensors = example.sensors(0)
    assert [len(rows) for rows in (sensors.train, sensors.validation)] == [200, 200]
    assert torch.cat([sensors.train, sensors.validation, sensors.test]).unique().numel() == 1797


def test_a_sensor_that_is_switched_off_is_neither_read_nor_regularised(
    example: ModuleType,
) -> None:
    task = example.sensors(0)
    params = task.start(torch.Generator().manual_seed(0))
    off = {**task.hyper, "use": torch.arange(example.SENSORS) != 3}
    changed = {**params, "w": params["w"].clone()}
    changed["w"][27:36] += 1
    rows = task.train[:50]
    assert torch.equal(task.loss(params, off, rows), task.loss(changed, off, rows))
    assert not torch.equal(
        task.loss(params, task.hyper, rows), task.loss(changed, task.hyper, rows)
    )
    # The penalty by hand: the strength of each sensor times its squared weights.
    strength = torch.linspace(-7, -2, example.SENSORS)
    by_hand = sum(
        float(s.exp()) * float((block**2).sum())
        for s, block in zip(strength, params["w"].split(9), strict=True)
    )
    with_it = task.loss(params, {**task.hyper, "log_strength": strength}, rows)
    without = task.loss(params, {**task.hyper, "log_strength": torch.full((20,), -200.0)}, rows)
    assert (with_it - without).item() == pytest.approx(by_hand, rel=1e-4)


def test_training_is_that_of_torch_optim_with_the_schedule(example: ModuleType) -> None:
    """The rate is linear between the knots in its logarithm; all wrong labels weigh nothing."""
    args = example.Args(steps=7, knots=3)
    task, given, wrong = example.corrupted_labels(0)
    logit = torch.where(wrong, -100.0, 0.0)
    log_lr = torch.tensor([-6.0, -3.0, -4.0])
    run = example.run_of(task, args, {"logit": logit, "log_lr": log_lr}, task.train, 0)
    found = example.trained(task, args, [run, run])
    params = {name: p.clone().requires_grad_() for name, p in run.params.items()}
    optimizer = torch.optim.Adam(params.values())
    for rows, log_rate in zip(run.rows, [-6, -5, -4, -3, -10 / 3, -11 / 3, -4], strict=True):
        rows = rows[~wrong[rows]]
        optimizer.param_groups[0]["lr"] = torch.tensor(log_rate).exp().item()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(task.predict(params, rows), given[rows]).backward()
        optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(found[1][name], p.detach(), rtol=1e-4, atol=1e-5)


def test_a_killed_run_goes_on_bit_for_bit(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = example.Args(steps=10, iterations=6, save_every=2)
    task = example.sensors(0)
    whole = example.learn(task, args, 0, None, tqdm(disable=True))
    calls, metagradient = [], innerloop.metagradient

    def killed(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return metagradient(*arguments, **options)

    checkpoint = tmp_path / "state.pt"
    with monkeypatch.context() as patch:
        patch.setattr(innerloop, "metagradient", killed)
        with pytest.raises(KeyboardInterrupt):
            example.learn(task, args, 0, checkpoint, tqdm(disable=True))
    resumed = example.learn(task, args, 0, checkpoint, tqdm(disable=True))
    assert resumed.losses == whole.losses
    assert len(whole.losses) == 6
    for name, x in whole.hyper.items():
        assert torch.equal(resumed.hyper[name], x)
    assert not torch.equal(whole.hyper["log_strength"], task.hyper["log_strength"])


def test_a_small_run_prints_tables_and_draws(example: ModuleType, tmp_path: Path) -> None:
    args = example.parse(SMALL)
    results = example.run(args)
    text = example.report(results)
    assert "validation alone" in text
    assert "random search" in text
    assert "AUC" in text
    assert results.tells[0]["ranking"] > 0.7
    assert all(0 < a < 1 for of in results.accuracies.values() for a in of[0].values())
    example.draw(results.learned, tmp_path / "curves.png", args)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_intervals_and_auc_by_hand(example: ModuleType) -> None:
    """Mean 2 and standard deviation 1 of three values: Student's t with two degrees is 4.303."""
    assert example.interval([1.0, 2.0, 3.0]) == f"+2.000 ± {4.3027 / 3**0.5:.3f}"
    score = torch.tensor([3.0, 1.0, 2.0, 1.0])
    assert example.auc(score, torch.tensor([True, True, False, False])) == 2.5 / 4


@pytest.mark.slow
def test_strengths_of_sensors_beat_every_baseline_and_the_simple_ways_win_on_labels(
    example: ModuleType,
) -> None:
    results = example.run(example.Args())
    for found in results.accuracies["sensors"]:
        assert found["learned"] == max(found.values())
    for found in results.accuracies["labels"]:
        assert found["validation alone"] > found["learned"] > found["given labels"]
