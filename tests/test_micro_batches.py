"""``micro_batches`` against the step on the whole batch, written out in plain PyTorch.

The truth knows nothing of parts: three steps by ``torch.autograd.grad(create_graph=True)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import innerloop
from innerloop import Checkpointed, StoreAll, micro_batches
from innerloop.strategy._measure import _peak
from tests.memory import assert_nothing_is_left

ROWS, WIDTH, STEPS = 7, 3, 3
STRATEGIES = {
    "StoreAll": StoreAll(),
    "Checkpointed": Checkpointed(slots=2),
    "mixed": Checkpointed(product="mixed"),
    "save gradients": Checkpointed(save="gradients"),
}
over_strategies = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
Batch = Mapping[str, Tensor]


def batches() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        x, y = torch.randn(2, ROWS, 5, WIDTH, generator=g, dtype=torch.float64)
        mask = torch.rand(ROWS, 5, generator=g) < 0.6
        mask[:, 0] = True
        found.append({"x": x, "y": y, "mask": mask})
    return found


def start() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = {"w": (WIDTH, WIDTH), "b": (WIDTH,)}
    return {
        n: torch.randn(s, generator=g, dtype=torch.float64).requires_grad_()
        for n, s in shapes.items()
    }


def hyper() -> dict[str, Tensor]:
    return {
        "lr": torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
        "scale": torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64, requires_grad=True),
    }


def wrong(params: Mapping[str, Tensor], hyper: Any, batch: Batch) -> Tensor:
    out = (batch["x"] @ params["w"] + params["b"]).tanh() * hyper["scale"]
    return (out - batch["y"]).square().sum(-1)


def mean(params: Any, hyper: Any, batch: Batch) -> Tensor:
    return wrong(params, hyper, batch).mean()


def total(params: Any, hyper: Any, batch: Batch) -> Tensor:
    return wrong(params, hyper, batch).sum() / 10


def over_tokens(params: Any, hyper: Any, batch: Batch) -> Tensor:
    return wrong(params, hyper, batch)[batch["mask"]].mean()


def tokens(batch: Batch) -> Tensor:
    return batch["mask"].sum()


KINDS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "mean": (mean, {}),
    "sum": (total, {"reduction": "sum"}),
    "tokens": (over_tokens, {"weight": tokens}),
}
over_kinds = pytest.mark.parametrize("kind", KINDS)


def by_hand(
    loss: Callable[..., Tensor], params: Mapping[str, Tensor], hyper: Any, data: list[Any]
) -> tuple[dict[str, Tensor], Tensor]:
    """Plain steps on the whole batches: the weights after the last, and the losses."""
    losses = []
    for batch in data:
        losses.append(loss(params, hyper, batch))
        grads = torch.autograd.grad(losses[-1], list(params.values()), create_graph=True)
        params = {n: p - hyper["lr"] * g for (n, p), g in zip(params.items(), grads, strict=True)}
    return dict(params), torch.stack(losses)


def outer(params: Mapping[str, Tensor], losses: Tensor) -> Tensor:
    """An outer loss that looks at the losses on the way too."""
    return params["w"].square().sum() + params["b"].exp().sum() + (losses * losses).sum()


def problem_of(loss: Any, **more: Any) -> Any:
    return innerloop.Problem(loss, innerloop.optim.sgd(), optimizer_hyper=("lr",), **more)


def unrolled(loss: Any, p: Any, h: Any, data: Any, strategy: Any = None) -> Tensor:
    traj = innerloop.unroll(problem_of(loss), p, data, hyper=h, strategy=strategy)
    return outer(traj.params, traj.losses)


def leaves(p: Mapping[str, Tensor], h: Mapping[str, Tensor]) -> list[Tensor]:
    return [*p.values(), *h.values()]


def assert_same(found: Any, truth: Any, tolerance: float = 1e-12) -> None:
    for g, h in zip(found, truth, strict=True):
        assert h.abs().max() > 1e-3, "a test of zeros"
        torch.testing.assert_close(g, h, rtol=tolerance, atol=tolerance)


# -- the derivative --------------------------------------------------------------------------------


@over_kinds
@over_strategies
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_it_is_the_step_on_the_whole_batch(strategy: Any, kind: str, size: int) -> None:
    loss, how = KINDS[kind]
    p, h = start(), hyper()
    expected = outer(*by_hand(loss, p, h, batches()))
    found = unrolled(micro_batches(loss, size, **how), p, h, batches(), strategy)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(found, leaves(p, h))
    assert_same(grads, torch.autograd.grad(expected, leaves(p, h)))


def test_parts_of_different_numbers_of_tokens_need_the_weight() -> None:
    """The rule of three: without it each part counts as many rows as it has."""
    p, h = start(), hyper()
    (truth,) = torch.autograd.grad(outer(*by_hand(over_tokens, p, h, batches())), p["w"])
    found = unrolled(micro_batches(over_tokens, 3), p, h, batches())
    (plain,) = torch.autograd.grad(found, p["w"])
    assert (plain - truth).abs().max() > 1e-4


def test_a_part_that_is_all_padding_counts_nothing() -> None:
    p, h = start(), hyper()
    data = batches()
    for batch in data:
        batch["mask"][2:4] = False
    expected = outer(*by_hand(over_tokens, p, h, data))
    found = unrolled(micro_batches(over_tokens, 2, weight=tokens), p, h, data)
    assert found.isfinite()
    grads = torch.autograd.grad(found, leaves(p, h))
    assert_same(grads, torch.autograd.grad(expected, leaves(p, h)))


@over_strategies
def test_data_that_need_a_gradient_are_in_hyper(strategy: Any) -> None:
    data = batches()[0]
    x = data["x"].requires_grad_()

    def loss(params: Any, hyper: Any, rows: Tensor) -> Tensor:
        return mean(params, hyper, {"x": hyper["x"][rows], "y": data["y"][rows]})

    p, h = start(), {**hyper(), "x": x}
    order = [torch.arange(ROWS), torch.tensor([4, 2, 0, 1])]
    expected = outer(*by_hand(loss, p, h, order))
    found = unrolled(micro_batches(loss, 3), p, h, order, strategy)
    grads = torch.autograd.grad(found, leaves(p, h))
    assert_same(grads, torch.autograd.grad(expected, leaves(p, h)))


@over_strategies
def test_what_the_loss_returns_besides_is_put_together(strategy: Any) -> None:
    def loss(params: Any, hyper: Any, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        each = wrong(params, hyper, batch).mean(-1)
        return each.mean(), {"each": each, "worst": each.square().mean(), "one": 1.0}

    p, h = start(), hyper()
    found = innerloop.unroll(
        problem_of(micro_batches(loss, 3)), p, batches(), hyper=h, strategy=strategy
    ).aux
    whole = innerloop.unroll(problem_of(loss), p, batches(), hyper=h).aux
    assert found["each"].shape == (STEPS, ROWS)
    assert torch.equal(found["one"], torch.ones(STEPS, dtype=found["one"].dtype))
    values = []
    for aux in (found, whole):
        torch.testing.assert_close(aux["each"], whole["each"])
        value = aux["each"].pow(3).sum() + aux["worst"].sum()
        values.append(torch.autograd.grad(value, leaves(p, h)))
    assert_same(values[0], values[1])


@over_strategies
@pytest.mark.parametrize("name", ["adam", "clip", "lbfgs"])
def test_every_rule_gets_the_gradient_of_the_whole(strategy: Any, name: str) -> None:
    rules = {
        "adam": innerloop.optim.adam(lr=0.05),
        "clip": innerloop.optim.chain(
            innerloop.optim.clip_by_global_norm(0.1), innerloop.optim.sgd(lr=0.1)
        ),
        "lbfgs": innerloop.optim.lbfgs(lr=0.1, max_iter=3),
    }
    if name == "lbfgs" and strategy in (STRATEGIES["mixed"], STRATEGIES["save gradients"]):
        pytest.skip("refused by these strategies, whatever the loss")
    p, h = start(), hyper()
    found = []
    for loss in (micro_batches(mean, 3), mean):
        problem = innerloop.Problem(loss, rules[name])
        way = strategy if loss is not mean else None
        traj = innerloop.unroll(problem, p, batches(), hyper=h, strategy=way)
        value = outer(traj.params, traj.losses)
        found.append(torch.autograd.grad(value, [*p.values(), h["scale"]]))
    assert_same(found[0], found[1], tolerance=1e-9 if name == "lbfgs" else 1e-11)


def test_a_second_derivative_of_the_outer_loss() -> None:
    p, h = start(), hyper()

    def penalty(value: Tensor) -> Tensor:
        grads = torch.autograd.grad(value, leaves(p, h), create_graph=True)
        return torch.stack([g.square().sum() for g in grads]).sum()

    expected = penalty(outer(*by_hand(mean, p, h, batches())))
    found = penalty(unrolled(micro_batches(mean, 3), p, h, batches()))
    assert_same(
        torch.autograd.grad(found, leaves(p, h)),
        torch.autograd.grad(expected, leaves(p, h)),
        tolerance=1e-10,
    )


def test_vmap_over_tasks() -> None:
    loss = micro_batches(mean, 3)
    p, h = start(), hyper()
    tasks = {n: torch.stack([p[n].detach(), 2 * p[n].detach()]) for n in p}
    constants = {n: x.detach() for n, x in h.items()}
    data = batches()

    def value(params: Mapping[str, Tensor]) -> Tensor:
        return unrolled(loss, params, constants, data)

    grads = torch.func.vmap(torch.func.grad(value))(tasks)
    for i in range(2):
        own = {n: x[i].clone().requires_grad_() for n, x in tasks.items()}
        truth = torch.autograd.grad(
            outer(*by_hand(mean, own, constants, batches())), list(own.values())
        )
        assert_same([g[i] for g in grads.values()], truth)


@pytest.mark.parametrize("name", ["StoreAll", "Checkpointed"])
def test_a_hook_acts_in_the_inner_gradient_and_not_in_the_outer_one(name: str) -> None:
    """Here the whole batch is the truth, by the same library: what it does is tested elsewhere."""

    def loss(params: Any, hyper: Any, batch: Batch) -> Tensor:
        each = wrong(params, hyper, batch)
        each.register_hook(lambda g: 2 * g)
        return each.mean()

    p, h = start(), hyper()
    values = [
        unrolled(way, p, h, batches(), STRATEGIES[name]) for way in (micro_batches(loss, 3), loss)
    ]
    parts, whole = (torch.autograd.grad(value, leaves(p, h)) for value in values)
    assert_same(parts, whole)


# -- modules ---------------------------------------------------------------------------------------


def network(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), *more, nn.Tanh(), nn.Linear(8, WIDTH)).double()


def module_loss(model: nn.Module, hyper: Any, batch: Batch) -> Tensor:
    return ((model(batch["x"]) - batch["y"]) * hyper["scale"]).square().mean()


def of_module(model: nn.Module, loss: Any, h: Any, strategy: Any = None, **how: Any) -> Tensor:
    problem = innerloop.Problem.from_module(
        model, loss, innerloop.optim.sgd(), optimizer_hyper=("lr",)
    )
    traj = innerloop.unroll(problem, None, batches(), hyper=h, strategy=strategy, **how)
    return torch.stack([p.square().sum() for p in traj.params.values()]).sum() + traj.losses.sum()


@over_strategies
def test_a_module(strategy: Any) -> None:
    model, h = network(nn.LayerNorm(8)), hyper()
    inputs = leaves(dict(model.named_parameters()), h)
    found = of_module(model, micro_batches(module_loss, 2), h, strategy)

    def loss(params: Any, hyper: Any, batch: Batch) -> Tensor:
        call = torch.func.functional_call(model, params, (batch["x"],))
        return ((call - batch["y"]) * hyper["scale"]).square().mean()

    params, losses = by_hand(loss, dict(model.named_parameters()), h, batches())
    truth = torch.stack([p.square().sum() for p in params.values()]).sum() + losses.sum()
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    assert_same(torch.autograd.grad(found, inputs), torch.autograd.grad(truth, inputs))


@pytest.mark.parametrize("name", ["StoreAll", "Checkpointed"])
def test_dropout_is_drawn_part_by_part_and_replayed(name: str) -> None:
    model, h = network(nn.Dropout(0.5)), hyper()
    loss = micro_batches(module_loss, 2)

    def value() -> Tensor:
        torch.manual_seed(7)
        return of_module(model, loss, h, STRATEGIES[name])

    state = torch.get_rng_state()
    (g,) = torch.autograd.grad(value(), h["scale"])
    after = torch.get_rng_state()
    ends = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            h["scale"][0] += step
        ends.append(value().item())
        with torch.no_grad():
            h["scale"][0] -= step
    assert g[0].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)
    # The backward pass left the user's random numbers alone.
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(state, after)


def test_autocast_holds_again_in_the_backward_pass() -> None:
    model, h = network().float(), {n: x.detach().float() for n, x in hyper().items()}
    data = [{n: x.float() for n, x in b.items()} for b in batches()]
    found = []
    for loss in (micro_batches(module_loss, 2), module_loss):
        problem = innerloop.Problem.from_module(
            model, loss, innerloop.optim.sgd(lr=0.1), optimizer_hyper=("lr",)
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            traj = innerloop.unroll(problem, None, data, hyper=h)
        value = torch.stack([p.square().sum() for p in traj.params.values()]).sum()
        found.append(torch.autograd.grad(value, list(model.parameters())))
    for g, whole in zip(*found, strict=True):
        assert (g - whole).norm() < 0.02 * whole.norm()


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StoreAll", "Checkpointed"])
def test_the_memory_is_that_of_one_part(name: str) -> None:
    """Forward and backward pass of two steps on 64 rows, in parts of 4 or as a whole, beside the
    step on 4 rows: what is counted is all tensor memory at its peak, without the data."""

    def deep(params: Any, hyper: Any, batch: Tensor) -> Tensor:
        x = batch
        for _ in range(4):
            x = (x @ params["w"]).tanh()
        return (x - hyper["target"]).square().mean()

    def peak(loss: Any, rows: int) -> float:
        p = {"w": (torch.eye(32) * 0.9).requires_grad_()}
        h = {"lr": torch.tensor(0.1, requires_grad=True), "target": torch.zeros(32)}
        h["target"].requires_grad_()
        data = [torch.randn(rows, 64, 32) for _ in range(2)]

        def run() -> None:
            traj = innerloop.unroll(problem_of(loss), p, data, hyper=h, strategy=STRATEGIES[name])
            torch.autograd.grad(traj.params["w"].sum() + traj.losses.sum(), leaves(p, h))

        run()
        size = sum(x.numel() * x.element_size() for x in data)
        return _peak(run, torch.device("cpu")) - size

    whole, parts, one = peak(deep, 64), peak(micro_batches(deep, 4), 64), peak(deep, 4)
    assert parts < 1.3 * one
    assert whole > 8 * parts


def test_nothing_is_left_behind() -> None:
    p, h = start(), hyper()
    loss = micro_batches(mean, 3)

    def episode() -> None:
        torch.autograd.grad(unrolled(loss, p, h, batches()), leaves(p, h))

    assert_nothing_is_left(episode, 10)


def test_each_part_is_evaluated_twice() -> None:
    calls: list[int] = []

    def counted(params: Any, hyper: Any, batch: Batch) -> Tensor:
        calls.append(len(batch["x"]))
        return mean(params, hyper, batch)

    p, h = start(), hyper()
    traj = innerloop.unroll(problem_of(micro_batches(counted, 3)), p, batches(), hyper=h)
    assert calls == [3, 3, 1] * STEPS
    torch.autograd.grad(traj.params["w"].sum(), leaves(p, h))
    assert calls == [3, 3, 1] * 2 * STEPS


# -- what is refused -------------------------------------------------------------------------------


def run_with(batch: Any, loss: Any = mean, **how: Any) -> Any:
    return innerloop.unroll(
        problem_of(micro_batches(loss, 3, **how)), start(), [batch], hyper=hyper()
    )


def captured(params: Any, hyper: Any, batch: Batch) -> Tensor:
    return mean(params, hyper, batch) * OUTSIDE


OUTSIDE = torch.ones((), dtype=torch.float64, requires_grad=True)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        seen: Any = self.seen
        seen += 1
        return x


class Replacing(nn.Module):
    """Puts another tensor in the place of its buffer, which leaves the old one as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return x


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "size": (lambda: micro_batches(mean, 0), "size=0: write a number of rows"),
    "no size": (lambda: micro_batches(mean, 2.5), "size=2.5"),  # type: ignore[arg-type]
    "reduction": (lambda: micro_batches(mean, 2, reduction="max"), '"mean" or "sum"'),
    "both": (lambda: micro_batches(mean, 2, reduction="sum", weight=tokens), "takes none"),
    "loss": (lambda: micro_batches(3, 2), "cannot be called"),  # type: ignore[arg-type]
    "another signature": (lambda: micro_batches(tokens, 2), "loss is called as"),
    "no rows": (lambda: run_with(3), "no tensor with rows"),
    "other lengths": (lambda: run_with({"x": torch.ones(3), "y": torch.ones(4)}), "3, 4"),
    "an empty batch": (lambda: run_with({"x": torch.ones(0, 2)}), "has no rows"),
    "all padding": (
        lambda: run_with(
            {**batches()[0], "mask": torch.zeros(ROWS, 5, dtype=torch.bool)},
            over_tokens,
            weight=tokens,
        ),
        "add up to 0",
    ),
    "weights by row": (
        lambda: run_with(batches()[0], over_tokens, weight=lambda b: b["mask"].sum(1)),
        "one number for the part",
    ),
    "a vector": (lambda: run_with(batches()[0], wrong), "scalar"),
    "a captured tensor": (lambda: run_with(batches()[0], captured), "hand it in through"),
    "targets": (
        lambda: problem_of(micro_batches(mean, 3), targets=lambda params, hyper, batch: None),
        "targets of the whole batch",
    ),
    "BatchNorm": (
        lambda: of_module(network(nn.BatchNorm1d(8)), micro_batches(module_loss, 2), hyper()),
        "normalises over the rows",
    ),
    "a buffer that is replaced": (
        lambda: of_module(network(Replacing()), micro_batches(module_loss, 2), hyper()),
        "once for each part",
    ),
    "a buffer": (
        lambda: of_module(network(Counting()), micro_batches(module_loss, 2), hyper()),
        "once for each part",
    ),
}


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


def once_differentiable(params: Any, hyper: Any, batch: Batch) -> Tensor:
    value: Tensor = _Once.apply(params["w"])
    return value.mean() + mean(params, hyper, batch)


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused_by_name(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(innerloop.InnerLoopError, match=message):
        call()


def test_an_operation_without_a_second_derivative_is_refused_where_it_is_needed() -> None:
    p, h = start(), hyper()
    traj = innerloop.unroll(
        problem_of(micro_batches(once_differentiable, 3)), p, [batches()[0]], hyper=h
    )
    with pytest.raises(innerloop.NotDifferentiableError, match="once_differentiable"):
        torch.autograd.grad(traj.params["w"].sum(), p["w"])


def test_attention_is_replaced_in_both_passes() -> None:
    """The fused kernel has no second derivative; the truth takes PyTorch's composite one."""

    def loss(params: Any, hyper: Any, batch: Batch) -> Tensor:
        q = (batch["x"] @ params["w"] + params["b"])[:, None]
        found = F.scaled_dot_product_attention(q, q, q)[:, 0] * hyper["scale"]
        return (found - batch["y"]).square().mean()

    p, h = start(), hyper()
    found = unrolled(micro_batches(loss, 3), p, h, batches())
    grads = torch.autograd.grad(found, leaves(p, h))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = torch.autograd.grad(outer(*by_hand(loss, p, h, batches())), leaves(p, h))
    assert_same(grads, truth, 1e-9)


def test_frozen_statistics_are_no_obstacle() -> None:
    model = network(nn.BatchNorm1d(8))
    model.eval()

    def loss(model: nn.Module, hyper: Any, batch: Batch) -> Tensor:
        out = model(batch["x"].flatten(0, 1)).unflatten(0, (-1, 5))
        return ((out - batch["y"]) * hyper["scale"]).square().mean()

    h = hyper()
    inputs = leaves(dict(model.named_parameters()), h)
    found = torch.autograd.grad(of_module(model, micro_batches(loss, 3), h), inputs)
    assert_same(found, torch.autograd.grad(of_module(model, loss, h), inputs))


def test_a_named_folder_knows_the_loss(tmp_path: Any) -> None:
    p, h = start(), hyper()
    where = innerloop.strategy.Disk(str(tmp_path / "run"))
    truth = torch.autograd.grad(outer(*by_hand(mean, p, h, batches())), leaves(p, h))
    for _ in range(2):
        found = unrolled(micro_batches(mean, 3), p, h, batches(), Checkpointed(offload=where))
        assert_same(torch.autograd.grad(found, leaves(p, h)), truth)


@pytest.mark.parametrize("strategy", [None, Checkpointed(slots=1)], ids=repr)
def test_parts_of_a_step_written_by_hand(strategy: Any) -> None:
    """Under `track` the parts are blocks of activation checkpointing."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(50, 1, generator=generator, dtype=torch.float64)

    def part(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (model(x) - y).square().mean() * (len(x) / 50)

    def gradients(size: int) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, eps=0.1)

        def loss(model: nn.Module) -> Any:
            pieces = zip(x.split(size), y.split(size), strict=True)
            return sum(checkpoint(part, model, *piece, use_reentrant=False) for piece in pieces)

        with innerloop.track(model, optimizer, strategy=strategy) as loop:
            for _ in range(3):
                loop.step(loss(loop.model) if strategy is None else lambda: loss(loop.model))
            outer = part(loop.model, x, y)
        return list(torch.autograd.grad(outer, list(model.parameters())))

    for ours, whole in zip(gradients(16), gradients(50), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("strategy", [StoreAll(), Checkpointed(slots=1)], ids=repr)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts(reentrant: bool, strategy: Any) -> None:
    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        found: Tensor = checkpoint(mean, params, hyper, batch, use_reentrant=reentrant)
        return found

    p, h = start(), hyper()
    truth = torch.autograd.grad(outer(*by_hand(mean, p, h, batches())), leaves(p, h))
    found = unrolled(micro_batches(loss, 3), p, h, batches(), strategy)
    assert_same(torch.autograd.grad(found, leaves(p, h)), truth)


@pytest.mark.parametrize("what", ["data written in place", "a generator", "a factor of backward"])
def test_parts_that_are_others_when_they_run_again_are_refused(what: str):
    x = torch.linspace(0.0, 1.0, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    settings = {"factor": -0.5}

    def loss(params: Any, hyper: Any, batch: Tensor) -> Tensor:
        y = torch.sin(params["w"]) * batch
        if what == "a generator":
            y = y * torch.rand(1, generator=generator, dtype=torch.float64)
        k = settings["factor"]
        return (k * y + ((1 - k) * y).detach() - 0.3).square().mean()

    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    problem = innerloop.Problem(innerloop.micro_batches(loss, 2), innerloop.optim.sgd(lr=0.1))
    traj = innerloop.unroll(problem, {"w": w}, [x] * 2)
    if what == "data written in place":
        x.mul_(2)
    elif what == "a factor of backward":
        settings["factor"] = 1.0
    with pytest.raises(innerloop.InvalidInputError, match="ran again in a backward pass"):
        torch.autograd.grad(traj.params["w"], w)
