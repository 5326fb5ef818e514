"""The examples in small: what they promise about their data, and that learning learns."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop

EXAMPLES = Path(__file__).parent.parent / "examples"


def imported(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return imported("few_shot_digits")


@pytest.fixture(scope="module")
def learned() -> ModuleType:
    return imported("learned_optimizer")


# -- few-shot digits -------------------------------------------------------------------------------


def test_training_classes_are_multiplied_and_test_classes_are_not(example: ModuleType) -> None:
    split = example.Split(example.Args(), 0)
    assert split.train.shape[0] == 6 * 8
    assert split.test.shape[0] == 4
    # No test image is among the training images, turned or not.
    train = {image.numpy().tobytes() for image in split.train.flatten(0, 1)}
    assert not any(image.numpy().tobytes() in train for image in split.test.flatten(0, 1))
    # The eight copies of an image are its rotations and reflections: the same numbers in another
    # order.
    first = split.train.unflatten(0, (8, 6))[:, 0, 0]
    assert torch.equal(
        first.flatten(1).sort(1).values, first[0].flatten().sort().values.expand(8, 64)
    )
    assert torch.equal(first[1], first[0].rot90(1))


def test_tasks_do_not_share_images_between_support_and_query(example: ModuleType) -> None:
    args = example.Args()
    split = example.Split(args, 0)
    tasks = example.sample(split.test, 20, args, torch.Generator().manual_seed(0))
    assert tasks.x.shape == (20, 15, 8, 8)
    assert tasks.query_x.shape == (20, 45, 8, 8)
    assert (
        tasks.y.bincount(minlength=3) if tasks.y.ndim == 1 else tasks.y[0].bincount()
    ).tolist() == [5, 5, 5]
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
            loss = torch.nn.functional.cross_entropy(
                torch.func.functional_call(net, params, (x,)), y
            )
            inner = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {
                n: p - rates[n].exp() * g for (n, p), g in zip(params.items(), inner, strict=True)
            }
        losses.append(
            torch.nn.functional.cross_entropy(
                torch.func.functional_call(net, params, (query_x,)), query_y
            )
        )
    expected = torch.stack(losses).mean()
    expected.backward()
    assert torch.allclose(value, expected, rtol=1e-5)
    for name, p in start.items():
        for found, leaf in ((grads["params"][name], p), (grads["hyper"][name], rates[name])):
            assert leaf.grad is not None
            assert torch.allclose(found, leaf.grad, rtol=1e-3, atol=1e-6)


def test_a_short_run_learns_and_prints_a_table(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--splits 1 --iterations 30 --tasks 4 --width 32 --depth 1 "
        "--pretrain-iterations 30 --test-tasks 20"
    ).split()
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


def one_small_task(example: ModuleType) -> tuple[Any, Any, Any, dict[str, Tensor]]:
    """``(args, network, a task in float64, parameters)``."""
    args = example.Args(width=6, depth=1, inner_steps=3, shots=2, queries=4)
    torch.manual_seed(0)
    tasks = example.sample(example.Split(args, 0).train, 1, args, torch.Generator().manual_seed(0))
    task = example.Tasks(*(p[0].double() if p.is_floating_point() else p[0] for p in tasks))
    net = example.Net(args.width, args.depth, args.ways).double()
    return args, net, task, {name: p.detach().clone() for name, p in net.named_parameters()}


def loss_at(net: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(torch.func.functional_call(net, params, (x,)), y)


@pytest.mark.parametrize("name", ["MAML", "FOMAML", "ANIL"])
def test_the_gradient_of_a_method_is_that_of_a_plain_loop(example: ModuleType, name: str) -> None:
    args, net, task, start = one_small_task(example)
    method = example.METHODS[name](innerloop.functional(net)[0], args)
    value, grads = method.metagradient(task, start)

    leaves = {n: p.clone().requires_grad_() for n, p in start.items()}
    params = dict(leaves)
    adapts = [n for n in params if name != "ANIL" or n.startswith("head")]
    for _ in range(args.inner_steps):
        inner = torch.autograd.grad(
            loss_at(net, params, task.x, task.y),
            [params[n] for n in adapts],
            create_graph=name != "FOMAML",
        )
        for n, g in zip(adapts, inner, strict=True):
            params[n] = params[n] - method.inner_lr * g
    expected = loss_at(net, params, task.query_x, task.query_y)
    expected.backward()
    assert torch.allclose(value, expected, rtol=1e-12)
    assert set(grads) == set(leaves)
    for n, leaf in leaves.items():
        assert leaf.grad is not None
        assert torch.allclose(grads[n], leaf.grad, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_imaml_is_that_of_the_solution(example: ModuleType) -> None:
    """(I + H / strength)⁻¹ times the gradient of the query loss, where the loop ends."""
    args, net, task, start = one_small_task(example)
    strategy = innerloop.Implicit(innerloop.strategy.solvers.GMRES(), tolerance=math.inf)
    kind = type(
        "Solved", (example.IMAML,), {"strategy": strategy, "strength": 2.0, "inner_lr": 0.1}
    )
    method = kind(innerloop.functional(net)[0], args)
    value, grads = method.metagradient(task, start)

    solution = {n: p.clone().requires_grad_() for n, p in start.items()}
    optimizer = torch.optim.SGD(solution.values(), lr=method.inner_lr)
    for _ in range(method.inner_steps):
        optimizer.zero_grad()
        distance = sum((p - start[n]).square().sum() for n, p in solution.items())
        (loss_at(net, solution, task.x, task.y) + distance).backward()
        optimizer.step()
    shapes = {n: p.shape for n, p in start.items()}

    def flat_loss(vector: Tensor) -> Tensor:
        pieces = vector.split([shape.numel() for shape in shapes.values()])
        params = {n: q.reshape(s) for (n, s), q in zip(shapes.items(), pieces, strict=True)}
        return loss_at(net, params, task.x, task.y)

    vector = torch.cat([p.detach().flatten() for p in solution.values()])
    hessian = torch.func.hessian(flat_loss)(vector)
    query = loss_at(net, solution, task.query_x, task.query_y)
    outer = torch.cat([g.flatten() for g in torch.autograd.grad(query, list(solution.values()))])
    truth = torch.linalg.solve(torch.eye(len(vector)).double() + hessian / 2, outer)
    assert torch.allclose(value, query, rtol=1e-9)
    found = torch.cat([g.flatten() for g in grads.values()])
    assert torch.allclose(found, truth, rtol=1e-6, atol=1e-9)


def test_reptile_goes_where_torch_optim_goes(example: ModuleType) -> None:
    args, net, task, start = one_small_task(example)
    method = example.Reptile(innerloop.functional(net)[0], args)
    _, grads = method.metagradient(task, start)
    optimizer = torch.optim.SGD(net.parameters(), lr=method.inner_lr)
    rows = [torch.arange(4 * c, 4 * c + 2) for c in range(3)]  # the first two of each class's four
    first, second = torch.cat(rows), torch.cat(rows) + 2
    batches = [
        (task.x, task.y),
        (task.query_x[first], task.query_y[first]),
        (task.query_x[second], task.query_y[second]),
    ]
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    for n, p in net.named_parameters():
        assert torch.allclose(start[n] - grads[n], p, rtol=1e-12)


def test_the_methods_learn_and_are_compared_and_drawn(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "accuracy.png"
    args = example.parse(
        "--compare methods --splits 2 --iterations 6 --tasks 4 --width 32 --depth 1 "
        f"--test-tasks 20 --plot {path}".split()
    )
    results = example.run(args)
    assert set(results) == {"MAML", "FOMAML", "iMAML", "ANIL", "Reptile"}
    for accuracy in results.values():
        assert accuracy.shape == (40, 4)
        assert accuracy.mean(0)[2] > accuracy.mean(0)[0] + 0.1
    text = example.methods_table(results, args)
    assert "Reptile minus MAML" in text
    assert "2 splits of 20 tasks" in text
    assert path.stat().st_size > 1000
    capsys.readouterr()


def test_intervals_over_splits_are_those_of_students_t(example: ModuleType) -> None:
    # Of the table: 2.776 for four degrees of freedom.
    assert example.t_interval(torch.arange(5.0)) == pytest.approx(2.776 * 0.5**0.5, rel=1e-3)


@pytest.mark.slow
def test_maml_beats_fomaml_and_anil_on_digits(example: ModuleType) -> None:
    torch.set_num_threads(1)
    args = example.Args(compare="methods", splits=3)
    by_split = {n: a[:, 2].unflatten(0, (3, -1)).mean(1) for n, a in example.run(args).items()}
    for name in ("FOMAML", "ANIL"):
        assert (by_split["MAML"] > by_split[name]).all()


def test_intervals_are_those_of_paired_differences(example: ModuleType) -> None:
    mean, half = example.interval(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert mean == pytest.approx(1.5)
    assert half == pytest.approx(1.96 * (5 / 3) ** 0.5 / 2)


# -- a learned optimizer ---------------------------------------------------------------------------


def test_quadratics_have_the_minimum_and_the_curvature_that_they_promise(
    learned: ModuleType,
) -> None:
    family = learned.quadratics()
    tasks = family.sample(50, True, torch.Generator().manual_seed(0))
    for hessian, minimum, start in zip(*tasks, strict=True):
        eigenvalues = torch.linalg.eigvalsh(hessian)
        assert eigenvalues.min() > 0.99e-3
        assert eigenvalues.max() < 10.1
        task = learned.Quadratic(hessian, minimum, start)
        assert family.judge({"x": minimum}, task) == 0
        assert family.judge({"x": start}, task) > 0


def test_held_out_digits_share_no_image_with_the_training_tasks(learned: ModuleType) -> None:
    family = learned.digits(steps=4)
    generator = torch.Generator().manual_seed(0)
    seen = family.sample(5, False, generator)
    held_out = family.sample(5, True, generator)
    images = lambda x: {image.numpy().tobytes() for image in x.reshape(-1, 64)}  # noqa: E731
    assert not images(torch.cat([seen.x.flatten(0, 2), seen.test_x.flatten(0, 1)])) & images(
        torch.cat([held_out.x.flatten(0, 2), held_out.test_x.flatten(0, 1)])
    )
    for x, test_x in zip(
        held_out.x, held_out.test_x, strict=True
    ):  # nor a task's training images with its test images
        assert not images(x) & images(test_x)


def test_the_untrained_learned_rule_is_normalised_momentum(learned: ModuleType) -> None:
    """All output weights start at zero: what is left is Adam's direction, at the first step the
    sign, times a rate."""
    args = learned.Args()
    weights = learned.first_weights(args)
    param, grad = torch.randn(3, 2), torch.randn(3, 2)
    change, _ = learned.rule(grad, param, learned.first_state(param), weights)
    assert torch.allclose(change, -weights["rate"][1].exp() * grad.sign(), rtol=1e-4)


def test_a_short_meta_training_beats_sgd_on_quadratics(
    learned: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    args = learned.parse(
        "--family quadratics --iterations 15 --steps 12 --test-steps 12 --tasks 16 --tuning-tasks "
        "16 --test-tasks 16".split()
    )
    result = learned.run(args)["quadratics"]
    assert set(result.losses) == {"learned", "SGD", "SGD, momentum", "Adam"}
    assert all(losses.shape == (16,) for losses in result.losses.values())
    assert (result.losses["learned"] - result.losses["SGD"]).mean() < 0
    text = learned.table("quadratics", result, args)
    assert "learned minus SGD" in text
    assert "16 held-out tasks" in text
    capsys.readouterr()


def test_a_baseline_is_what_torch_optim_does(learned: ModuleType) -> None:
    family = learned.digits(steps=5)
    args = learned.Args(test_steps=5)
    tasks = family.sample(2, True, torch.Generator().manual_seed(0))
    ours = learned.final_losses(args, family, innerloop.optim.sgd(momentum=0.5), {"lr": 0.3}, tasks)
    for i in range(2):
        task = learned.Digits(*(part[i] for part in tasks))
        params = {name: p.clone().requires_grad_() for name, p in family.start(task).items()}
        optimizer = torch.optim.SGD(list(params.values()), lr=0.3, momentum=0.5)
        for t in range(5):
            optimizer.zero_grad()
            family.loss(params, family.batch(task, t)).backward()
            optimizer.step()
        assert ours[i].item() == pytest.approx(family.judge(params, task).log10().item(), abs=1e-4)


# -- test-time training ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ttt() -> ModuleType:
    return imported("test_time_training")


def test_known_tokens_are_those_that_came_behind_their_neighbour_before(ttt: ModuleType) -> None:
    text = ttt.generate(4, torch.Generator().manual_seed(0))
    assert text.tokens.shape == text.known.shape == (4, 512)
    for tokens, known in zip(text.tokens.tolist(), text.known.tolist(), strict=True):
        behind: dict[int, int] = {}
        for t in range(1, len(tokens)):
            if known[t]:
                assert behind[tokens[t - 1]] == tokens[t]
            behind[tokens[t - 1]] = tokens[t]
        # Values follow keys, and letters inside of a phrase their predecessor, from the second
        # time on: no other token is known.
        first = {tokens.index(token) for token in set(tokens)}
        begins_pair = {t for t in range(0, 512, 2) if 32 <= tokens[t] < 56}
        begins_phrase = {t for t in range(0, 512, 8) if tokens[t] < 32}
        unknown = {t for t in range(512) if not known[t]}
        assert unknown == first | begins_pair | begins_phrase


def test_fast_weights_are_those_of_gradient_descent_by_hand(ttt: ModuleType) -> None:
    """With the gradient of the inner loss in closed form, kᵀ (k W - v), and by autograd."""
    torch.manual_seed(0)
    layer = ttt.FastWeights(6, 4).double()
    torch.nn.init.normal_(layer.fast.module.weight)
    x = torch.randn(3, 16, 6, dtype=torch.float64)
    weights = torch.randn(3, 16, 6, dtype=torch.float64)

    queries = nn.functional.normalize(layer.to_query(x), dim=-1)
    keys = torch.cat([torch.zeros(3, 1, 6).double(), queries[:, :-1]], 1)
    values, w, read = layer.to_value(x), layer.fast.module.weight.T.expand(3, 6, 6), []
    for t in range(0, 16, 4):
        k, v = keys[:, t : t + 4], values[:, t : t + 4]
        read.append(queries[:, t : t + 4] @ w)
        w = w - layer.fast.hyper()["lr"] * k.transpose(1, 2) @ (k @ w - v)
    expected = layer.out(torch.cat(read, 1))
    leaves = list(layer.parameters())
    truth = torch.autograd.grad((expected * weights).sum(), leaves)
    for found in (layer(x), ttt.by_hand(layer, x)):
        assert torch.allclose(found, expected, rtol=1e-10)
        for g, h in zip(torch.autograd.grad((found * weights).sum(), leaves), truth, strict=True):
            assert torch.allclose(g, h, rtol=1e-9, atol=1e-12)
            assert h.abs().max() > 0


def test_no_token_sees_what_comes_later(ttt: ModuleType) -> None:
    args = ttt.Args(width=8)
    net = ttt.GPT(args, True)
    tokens = ttt.generate(1, torch.Generator().manual_seed(0)).tokens
    torch.nn.init.normal_(net.blocks[1].mixer.fast.module.weight, std=0.1)
    with torch.no_grad():
        before = net(tokens)
        for place in (1, 15, 16, 100, 511):
            changed = tokens.clone()
            changed[0, place] = (changed[0, place] + 1) % ttt.VOCABULARY
            moved = (net(changed) - before).abs().amax(-1)[0] > 0
            assert not moved[:place].any()
            assert moved[place]


def test_a_short_run_compares_networks_of_equal_size(
    ttt: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ttt.parse("--seeds 2 --steps 2 --batch 2 --width 8 --test-sequences 2".split())
    count = [sum(p.numel() for p in ttt.GPT(args, adapts).parameters()) for adapts in (True, False)]
    assert count[0] == count[1]
    assert ttt.flops(args, True) > ttt.flops(args, False)
    results, curves = ttt.run(args)
    assert all(losses.shape == (2, 2) for losses in results.values())
    assert len(results) == 3
    text = ttt.table(results, args)
    assert "fast weights minus no inner steps" in text
    ttt.draw(curves, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
    capsys.readouterr()


@pytest.mark.slow
def test_fast_weights_reach_a_lower_loss_than_none(ttt: ModuleType) -> None:
    """Than the same network without inner steps, after as many steps and as many operations."""
    torch.set_num_threads(1)
    results, _ = ttt.run(ttt.Args())
    ours, *controls = results.values()
    for losses in controls:
        difference = (ours - losses)[:, 0]
        assert difference.mean() + ttt.t_interval(difference) < 0


@pytest.mark.slow
def test_a_layer_takes_at_most_half_as_long_again_as_one_that_is_batched_by_hand(
    ttt: ModuleType,
) -> None:
    """Where the products take the time: an inner step costs a fixed time as well."""
    torch.set_num_threads(1)
    seconds = ttt.timing(ttt.Args(width=64, batch=16))
    assert seconds["innerloop"] < 1.5 * seconds["batched by hand"]


# -- LoRA ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora() -> ModuleType:
    pytest.importorskip("transformers")
    return imported("lora")


def small_lora(lora: ModuleType) -> tuple[Any, Any]:
    args = lora.Args(width=8, layers=1, rank=2, inner_steps=2, sequences=3)
    return args, lora.with_adapters(lora.base_model(args), args.rank)


def test_adapters_change_nothing_at_first_and_alone_are_trained(lora: ModuleType) -> None:
    args = lora.Args(width=8, layers=1, rank=2)
    generator = torch.Generator().manual_seed(0)
    (dialect,) = lora.Language(0).dialects(1, generator)
    tokens = lora.sequences(dialect, 4, generator)
    model = lora.base_model(args).eval()
    before = lora.language_loss(model, tokens)
    model = lora.with_adapters(model, args.rank)
    assert lora.language_loss(model, tokens).item() == pytest.approx(before.item(), abs=1e-6)
    learner = lora.Learner(model, args)
    # Two matrices for each of the four linear layers of a block.
    assert len(learner.start) == 8
    assert {name.rpartition(".")[2] for name in learner.start} == {"a", "b"}


def test_sequences_have_the_frequencies_of_their_dialect(lora: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = lora.Language(0).dialects(2, generator)
    assert not torch.allclose(first, second)
    tokens = lora.sequences(first, 4_000, generator)
    pairs = torch.zeros(16, 16).index_put_(
        (tokens[:, :-1], tokens[:, 1:]), torch.ones(()), accumulate=True
    )
    counts = pairs.sum(1, keepdim=True)
    error = (first.exp() * (1 - first.exp()) / counts).sqrt()
    assert ((pairs / counts - first.exp()).abs() < 5 * error + 1e-3).all()


def test_the_metagradient_of_adapters_is_that_of_a_plain_loop(lora: ModuleType) -> None:
    """On the same model with eager attention, whose second derivative PyTorch has."""
    args, model = small_lora(lora)
    learner = lora.Learner(model, args)
    torch.manual_seed(1)
    start = {n: 0.3 * torch.randn_like(p) for n, p in learner.start.items()}
    log_lr = {n: torch.randn(()) - 1 for n in start}
    generator = torch.Generator().manual_seed(0)
    (dialect,) = learner.language.dialects(1, generator)
    value, grads = learner.metagradient(start, log_lr, dialect, generator)

    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    (dialect,) = learner.language.dialects(1, generator)
    support = lora.sequences(dialect, args.sequences, generator)
    query = lora.sequences(dialect, lora.QUERIES, generator)
    leaves = {n: p.clone().requires_grad_() for n, p in start.items()}
    rates = {n: r.clone().requires_grad_() for n, r in log_lr.items()}
    params = dict(leaves)
    for _ in range(args.inner_steps):
        inner = torch.autograd.grad(
            learner.query_loss(params, support), list(params.values()), create_graph=True
        )
        params = {
            n: p - rates[n].exp() * g for (n, p), g in zip(params.items(), inner, strict=True)
        }
    expected = learner.query_loss(params, query)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for kind, of in (("params", leaves), ("hyper", rates)):
        for n, leaf in of.items():
            assert leaf.grad is not None
            assert torch.allclose(grads[kind][n], leaf.grad, rtol=1e-3, atol=1e-5)


def test_a_short_run_of_adapters_is_compared_and_drawn(
    lora: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora, "GRID", (0.03, 0.1))
    args = lora.parse(
        "--width 8 --layers 1 --rank 2 --pretrain-steps 3 --inner-steps 2 --iterations 2 --tasks 1 "
        "--test-tasks 3".split()
    )
    results = lora.run(args)
    assert all(losses.shape == (3, 3) for losses in results.values())
    assert "learned minus Adam" in lora.table(results, args)
    lora.draw(results, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
    capsys.readouterr()
