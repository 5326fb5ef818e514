"""``examples/distillation.py`` in small, and what its page claims."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tqdm import tqdm

import innerloop
from tests.test_examples import imported


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return imported("distillation")


def test_test_images_are_unseen_and_real_images_are_one_of_each_class(example: ModuleType) -> None:
    data = example.digits(0)
    assert len(data.test_y) == 600
    assert len(torch.cat([data.y, data.test_y])) == 1797
    seen = {image.numpy().tobytes() for image in data.x}
    assert not any(image.numpy().tobytes() in seen for image in data.test_x)
    chosen = example.real_images(data, 5, torch.Generator().manual_seed(0))
    assert torch.equal(data.y[chosen], torch.arange(10).expand(5, 10))
    assert len(chosen.unique()) > 30  # drawn anew each time


def test_training_on_the_images_is_that_of_torch_optim(example: ModuleType) -> None:
    args, data = example.Args(steps=5), example.digits(0)
    generator = torch.Generator().manual_seed(0)
    learned = example.first(args, data)
    learned["log_lr"] = torch.linspace(-3, -1, 5)
    unseen = example.starts(args, 2, generator)
    found = example.accuracies(data, unseen, learned)
    for i in range(2):
        params = {name: p[i].clone().requires_grad_() for name, p in unseen.items()}
        optimizer = torch.optim.SGD(params.values())
        for log_rate in learned["log_lr"]:
            optimizer.param_groups[0]["lr"] = log_rate.exp().item()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(
                example.predict(params, learned["images"]), learned["labels"].softmax(-1)
            ).backward()
            optimizer.step()
        right = example.predict(params, data.test_x).argmax(-1) == data.test_y
        assert found[i].item() == pytest.approx(right.float().mean().item(), abs=0.002)


def test_a_killed_run_goes_on_bit_for_bit(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, small = example.digits(0), "--steps 3 --iterations 5 --starts 2 --save-every 2".split()
    whole, losses = example.distil(example.parse(small), data, tqdm(disable=True))
    calls, map_tasks = [], innerloop.map_tasks

    def killed(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return map_tasks(*arguments, **options)

    args = example.parse([*small, "--resume", str(tmp_path / "state.pt")])
    with monkeypatch.context() as patch:
        patch.setattr(innerloop, "map_tasks", killed)
        with pytest.raises(KeyboardInterrupt):
            example.distil(args, data, tqdm(disable=True))
    resumed, again = example.distil(args, data, tqdm(disable=True))
    assert again == losses
    assert len(losses) == 5
    assert all(torch.equal(resumed[name], x) for name, x in whole.items())


def test_a_few_outer_steps_beat_real_images(example: ModuleType, tmp_path: Path) -> None:
    args = example.parse(
        "--steps 10 --iterations 30 --starts 4 --real-steps 15 --tests 3 --width 32".split()
    )
    results = example.run(args)
    mean = {name: accuracy.mean().item() for name, accuracy in results.accuracies.items()}
    assert mean["ten learned images"] > mean["one real image a class"]
    assert results.losses[-1] < results.losses[0]
    text = example.table(results)
    assert "all 1197 real images" in text
    assert "3 unseen initialisations" in text
    example.draw(results, tmp_path / "images.png")
    assert (tmp_path / "images.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_ten_images_train_unseen_initialisations_to_94_per_cent(example: ModuleType) -> None:
    found = example.run(example.Args()).accuracies
    assert found["ten learned images"].mean() >= 0.94
    assert len(found["ten learned images"]) == 10
    assert found["one real image a class"].mean() < 0.75
