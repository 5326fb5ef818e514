"""The few-shot example in small: what it promises about its data, and that meta-learning learns."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "few_shot_digits.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("few_shot_digits", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["few_shot_digits"] = module
    spec.loader.exec_module(module)
    return module


def test_training_classes_are_multiplied_and_test_classes_are_not(example: ModuleType) -> None:
    split = example.Split(example.Args(), 0)
    assert split.train.shape[0] == 6 * 8
    assert split.test.shape[0] == 4
    # No test image is among the training images, turned or not.
    train = {image.numpy().tobytes() for image in split.train.flatten(0, 1)}
    assert not any(image.numpy().tobytes() in train for image in split.test.flatten(0, 1))
    # The eight copies of an image are its rotations and reflections: the same numbers in another order.
    first = split.train.unflatten(0, (8, 6))[:, 0, 0]
    assert torch.equal(first.flatten(1).sort(1).values, first[0].flatten().sort().values.expand(8, 64))
    assert torch.equal(first[1], first[0].rot90(1))


def test_tasks_do_not_share_images_between_support_and_query(example: ModuleType) -> None:
    args = example.Args()
    split = example.Split(args, 0)
    tasks = example.sample(split.test, 20, args, torch.Generator().manual_seed(0))
    assert tasks.x.shape == (20, 15, 8, 8)
    assert tasks.query_x.shape == (20, 45, 8, 8)
    assert (tasks.y.bincount(minlength=3) if tasks.y.ndim == 1 else tasks.y[0].bincount()).tolist() == [5, 5, 5]
    for support, query in zip(tasks.x, tasks.query_x, strict=True):
        distances = (support[:, None] - query[None]).abs().amax((-1, -2))
        assert distances.min() > 0


def test_its_metagradient_is_that_of_a_plain_loop(example: ModuleType) -> None:
    """Against a hand-written differentiable SGD loop over the tasks, one after the other."""
    args = example.Args(width=8, depth=2, inner_steps=2)
    torch.manual_seed(0)
    split, learner = example.Split(args, 0), example.Learner(args)
    tasks = example.sample(split.train, 3, args, torch.Generator().manual_seed(0))
    log_lr = {name: torch.full_like(p, -2.0) for name, p in learner.start.items()}
    value, grads = learner.metagradient(learner.start, log_lr, tasks)

    start = {name: p.clone().requires_grad_() for name, p in learner.start.items()}
    rates = {name: r.clone().requires_grad_() for name, r in log_lr.items()}
    net, losses = example.Net(args.width, args.depth, args.ways), []
    for x, y, query_x, query_y in zip(*tasks, strict=True):
        params = dict(start)
        for _ in range(2):
            loss = torch.nn.functional.cross_entropy(torch.func.functional_call(net, params, (x,)), y)
            inner = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {n: p - rates[n].exp() * g for (n, p), g in zip(params.items(), inner, strict=True)}
        losses.append(torch.nn.functional.cross_entropy(torch.func.functional_call(net, params, (query_x,)), query_y))
    expected = torch.stack(losses).mean()
    expected.backward()
    assert torch.allclose(value, expected, rtol=1e-5)
    for name, p in start.items():
        for found, leaf in ((grads["params"][name], p), (grads["hyper"][name], rates[name])):
            assert leaf.grad is not None
            assert torch.allclose(found, leaf.grad, rtol=1e-3, atol=1e-6)


def test_a_short_run_learns_and_prints_a_table(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--splits 1 --iterations 30 --tasks 4 --width 32 --depth 1 --pretrain-iterations 30 --test-tasks 20".split()
    )
    args = example.parse(options)
    results = example.run(args)
    assert set(results) == {"meta-learned", "pre-trained", "random"}
    assert all(accuracy.shape == (20, 4) for accuracy in results.values())
    after = results["meta-learned"].mean(0)
    assert after[2] > 0.6 > 0.45 > after[0]  # chance is 1/3 before the first step
    text = example.table(results, args)
    assert "(a) minus random" in text
    assert "trained for 5 steps" in text
    capsys.readouterr()


def test_intervals_are_those_of_paired_differences(example: ModuleType) -> None:
    mean, half = example.interval(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert mean == pytest.approx(1.5)
    assert half == pytest.approx(1.96 * (5 / 3) ** 0.5 / 2)
