"""``examples/learned_loss.py`` in small, and what its page claims."""

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
    return imported("learned_loss")


def test_sets_are_disjoint_and_three_tenths_of_the_labels_are_wrong(example: ModuleType) -> None:
    data, args = example.digits(0), example.Args(steps=300)
    parts = [data.x, data.clean_x, data.test_x]
    assert [len(part) for part in parts] == [900, 300, 597]
    keys = [{image.numpy().tobytes() for image in part} for part in parts]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]
    runs = example.runs(args, data, 3, torch.Generator().manual_seed(0))
    right = {image.numpy().tobytes(): int(y) for image, y in zip(data.x, data.y, strict=True)}
    for x, y in zip(runs.x, runs.y, strict=True):
        given = [right[image.numpy().tobytes()] for image in x.flatten(0, 1)]
        wrong = (torch.tensor(given) != y.flatten()).float().mean().item()
        assert wrong == pytest.approx(0.3, abs=0.06)


def test_the_untrained_loss_is_cross_entropy_and_the_others_are_what_they_are_called(
    example: ModuleType,
) -> None:
    logits, labels = torch.randn(7, 10), torch.arange(7)
    now = torch.tensor(0.3)
    p = logits.softmax(-1)[torch.arange(7), labels]
    untrained = example.learned(example.first_weights(example.Args()), logits, labels, now)
    torch.testing.assert_close(untrained, -p.log().mean())
    torch.testing.assert_close(
        example.generalised({}, logits, labels, now), ((1 - p**0.7) / 0.7).mean()
    )
    one_hot = torch.eye(10)[labels]
    distance = (logits.softmax(-1) - one_hot).abs().sum(-1).mean()
    torch.testing.assert_close(example.absolute_error({}, logits, labels, now), distance / 2)


def test_its_metagradient_is_that_of_a_plain_loop(example: ModuleType) -> None:
    """Against Adam written out by hand, in float32, for one task of three steps."""
    args = example.Args(steps=3, tasks=1, width=8)
    data = example.digits(0)
    runs = example.runs(args, data, 1, torch.Generator().manual_seed(0))
    weights = example.first_weights(args)
    weights["out"] = torch.linspace(-0.1, 0.1, args.hidden)
    value, grads = innerloop.map_tasks(
        example.one_run, runs, weights, args.lr, data.clean_x, data.clean_y, reduce="mean"
    )
    leaves = {name: x.clone().requires_grad_() for name, x in weights.items()}
    params = {name: p[0].clone().requires_grad_() for name, p in runs.params.items()}
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    for t in range(3):
        logits = example.predict(params, runs.x[0, t])
        loss = example.learned(leaves, logits, runs.y[0, t], runs.progress[0, t])
        inner = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        for (name, p), g in zip(list(params.items()), inner, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            root = (second[name] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8
            params[name] = p - args.lr * first[name] / (1 - 0.9 ** (t + 1)) / root
    logits = example.predict(params, data.clean_x)
    expected = torch.nn.functional.cross_entropy(logits, data.clean_y)
    by_hand = torch.autograd.grad(expected, list(leaves.values()))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=0)
    for (name, found), g in zip(grads.items(), by_hand, strict=True):
        torch.testing.assert_close(found, g, rtol=1e-2, atol=1e-3 * g.abs().max().item(), msg=name)


def test_a_killed_run_goes_on_bit_for_bit(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, small = example.digits(0), "--steps 3 --iterations 5 --tasks 2 --save-every 2".split()
    whole, losses = example.meta_train(example.parse(small), data, tqdm(disable=True))
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
            example.meta_train(args, data, tqdm(disable=True))
    resumed, again = example.meta_train(args, data, tqdm(disable=True))
    assert again == losses
    assert len(losses) == 5
    assert all(torch.equal(resumed[name], x) for name, x in whole.items())


def test_a_small_run_prints_a_table_and_draws(example: ModuleType, tmp_path: Path) -> None:
    args = example.parse("--steps 20 --iterations 3 --tasks 2 --tests 3 --width 16".split())
    results = example.run(args)
    assert all(a.shape == (3,) and a.mean() > 0.3 for a in results.accuracies.values())
    text = example.table(results)
    assert "cross-entropy, stopped" in text
    assert "3 unseen runs" in text
    example.draw(results, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_learned_loss_reaches_94_per_cent(example: ModuleType) -> None:
    found = example.run(example.Args()).accuracies
    assert found["learned loss"].mean() >= 0.94
    assert found["cross-entropy, same rate"].mean() < 0.9
