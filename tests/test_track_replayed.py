"""``innerloop.track(..., strategy=Checkpointed())``: the gradients of plain `track`, from closures
that run again, or a named error."""

# ruff: noqa: B023 (closures that bind late are what is tested here)

from __future__ import annotations

import gc
import math
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from innerloop import Checkpointed, InvalidInputError, NotDifferentiableError
from innerloop.strategy import Strategy
from tests.memory import assert_nothing_is_left
from tests.networks import adam, direction, leaf, network, sgd
from tests.oracles import assert_derivative, derivative
from tests.situations import (
    SEED,
    STEPS,
    Situation,
    all_groups,
    along,
    each_situation,
    features,
    named,
    regression,
    target,
)

pytestmark = pytest.mark.usefixtures("float64")
SLOTS = pytest.mark.parametrize("slots", [1, 3, "all"])
Body = Callable[[Any, bool], Tensor]


def gradients(
    body: Body, strategy: Strategy | None, *, model: Any = None, **arguments: Any
) -> dict[str, Tensor | None]:
    """The gradients by the parameters of the outer loss that ``body(loop, replayed)`` returns."""
    model = network() if model is None else model
    torch.manual_seed(SEED)
    with innerloop.track(model, sgd(model), strategy=strategy, **arguments) as loop:
        outer = body(loop, strategy is not None)
    outer.backward()
    return {name: p.grad for name, p in named(model).items()}


def assert_same(ours: dict[str, Any], truth: dict[str, Any], tolerance: float = 1e-12) -> None:
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        assert (ours[name] is None) == (expected is None), name
        if expected is not None:
            scale = (
                max(float(expected.detach().double().abs().max()), 1.0)
                if (expected.is_floating_point() and expected.numel())
                else 1.0
            )
            torch.testing.assert_close(
                ours[name], expected, rtol=0, atol=tolerance * scale, msg=lambda m: f"{name}: {m}"
            )


def assert_as_plain(body: Body, slots: Any = (1, 3, "all"), **arguments: Any) -> None:
    make = arguments.pop("model", network)
    truth = gradients(body, None, model=make(), **arguments)
    for count in slots:
        assert_same(gradients(body, Checkpointed(slots=count), model=make(), **arguments), truth)


# -- the module contract ---------------------------------------------------------------------------


def episode(
    situation: Situation,
    strategy: Checkpointed | None,
    learn: Any,
    times: Iterable[int] = range(STEPS),
) -> dict[str, Any]:
    """Take a step on the batch of each of ``times``."""
    model = situation.model()
    optimizers = situation.optimizer(model)
    lrs = [torch.tensor(group["lr"], requires_grad=True) for group in all_groups(optimizers)]
    torch.manual_seed(SEED)
    with innerloop.track(
        model, optimizers, learn=learn, hyper={"lr": lrs}, strategy=strategy
    ) as loop:
        for t in times:
            loop.step(lambda: situation.loss(loop.model, t))
        outer = situation.outer_loss(loop.model) + loop.trajectory.losses.sum()
        found: dict[str, Tensor | None] = {
            "losses": loop.trajectory.losses.detach(),
            "outer": outer.detach(),
        }
        found |= {f"buffer {n}": b for n, b in loop.buffers().items()}
    outer.backward()
    found |= {f"d {n}": p.grad for n, p in named(model).items()}
    return found | {f"d lr {i}": lr.grad for i, lr in enumerate(lrs)}


@pytest.mark.covering
@pytest.mark.parametrize("learn", ["init", "outer"])
@each_situation()
def test_every_situation_has_the_gradients_of_plain_track(situation: Situation, learn: Any):
    truth = episode(situation, None, learn)
    for slots in (1, 3, "all"):
        assert_same(episode(situation, Checkpointed(slots=slots), learn), truth)


def test_a_loop_that_is_replayed_many_times():
    """More steps than are replayed with their graphs: states of a replay are kept on the way."""

    def run(strategy: Strategy | None) -> tuple[list[Tensor], list[Tensor | None]]:
        model = nn.Linear(2, 1)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.5, -0.3]]))
            model.bias.zero_()
        x, found = torch.tensor([[1.0, 0.4], [-0.3, 0.8]]), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
        with innerloop.track(model, optimizer, strategy=strategy) as loop:
            for t in range(300):
                target = math.sin(t)
                found.append(loop.step(lambda: (loop.model(x).sum() - target) ** 2))
            outer = loop.model(x).sin().sum()
        outer.backward()
        return found, [p.grad for p in model.parameters()]

    losses, truth = run(None)
    ours, grads = run(Checkpointed(slots=2))
    torch.testing.assert_close(torch.stack(ours), torch.stack(losses), rtol=1e-12, atol=1e-14)
    for a, b in zip(grads, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)


def test_the_gradient_is_that_of_finite_differences():
    def outer(shift: float) -> Tensor:
        model = network(shift)
        with innerloop.track(model, sgd(model), strategy=Checkpointed(slots=2)) as loop:
            for t in range(5):
                loop.step(regression, args=(loop.model, t))
            return regression(loop.model, 5)

    model = network()
    with innerloop.track(model, sgd(model), strategy=Checkpointed(slots=2)) as loop:
        for t in range(5):
            loop.step(regression, args=(loop.model, t))
        regression(loop.model, 5).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    ours = along(gradients, direction(model))
    assert_derivative(ours, derivative(lambda h: outer(h).item()), "init")


def steps_of(loop: Any, count: int = 6, **arguments: Any) -> None:
    for t in range(count):
        loop.step(lambda: regression(loop.model, t), **arguments)


@pytest.mark.parametrize("steps", [0, 1, 2, 40])
def test_any_number_of_steps(steps: int):
    def body(loop: Any, _: bool) -> Tensor:
        steps_of(loop, steps)
        return regression(loop.model, steps)

    assert_as_plain(body, slots=(1, 2, 5, "all", None))


@pytest.mark.parametrize("arguments", [{"offload": "cpu"}, {"offload": "disk"}, {"memory": "20KB"}])
def test_where_states_wait(arguments: dict[str, Any]):
    def body(loop: Any, _: bool) -> Tensor:
        steps_of(loop, 9)
        return regression(loop.model, 9)

    truth = gradients(body, None)
    assert_same(gradients(body, Checkpointed(**arguments)), truth)


# -- what a closure captures -----------------------------------------------------------------------

GLOBAL_X = torch.zeros(())
GLOBAL_SHIFT = torch.zeros(())


def shifted(loop: Any) -> Tensor:
    """A helper that reads globals, which are others at every step."""
    return F.mse_loss(loop.model(GLOBAL_X), GLOBAL_SHIFT)


def test_late_binding_gives_every_step_its_own_data():
    """Variables of a loop, a function that is defined inside, defaults, globals, a dict."""

    def body(loop: Any, _: bool) -> Tensor:
        global GLOBAL_X, GLOBAL_SHIFT
        batch = {}
        for t in range(6):
            x, y = features(t), target(t)
            loop.step(lambda: F.mse_loss(loop.model(x), y))

            def loss() -> Tensor:
                return F.mse_loss(loop.model(x) * t, y)

            loop.step(lambda: 0.3 * loss())
            loop.step(lambda x=x, y=y: F.mse_loss(loop.model(2 * x), y))
            GLOBAL_X, GLOBAL_SHIFT = 0.5 * x, y + 1
            loop.step(lambda: shifted(loop))
            batch["x"] = 0.1 * x
            loop.step(lambda: F.mse_loss(loop.model(batch["x"]), y))
        del x, y
        return regression(loop.model, 6)

    assert_as_plain(body)


def test_captured_tensors_get_their_gradients():
    """A leaf, a leaf inside a module, a hypernetwork's output (its own gradient too), one in a
    container, one in args, and one that enters through grad_callback."""

    def run(strategy: Checkpointed | None) -> dict[str, Any]:
        torch.manual_seed(1)
        weight, seed = leaf(0.3), leaf(0.7)
        net = nn.Linear(1, 1)
        scale = seed.sin() * 2
        parts = [seed.exp(), seed.cos()]
        clip = seed.tanh()
        last = seed * 0.5
        model = network()
        with innerloop.track(model, sgd(model), strategy=strategy) as loop:
            for t in range(5):
                loop.step(
                    lambda: (
                        regression(loop.model, t) * scale * parts[1]
                        + weight * loop.model.head.weight.square().sum()
                        + net(loop.model.body.weight.sum().reshape(1, 1)).sum()
                    ),
                    grad_callback=lambda grads: {n: g * clip for n, g in grads.items()},
                )
                loop.step(
                    lambda a, b: regression(loop.model, t) * a[0] + b * parts[0],
                    args=((last,), loop.model.body.bias.detach().sum()),
                )
            outer = regression(loop.model, 5)
        wrt = {"weight": weight, "seed": seed, "scale": scale, "clip": clip, "last": last}
        wrt |= dict(net.named_parameters()) | {f"m.{n}": p for n, p in model.named_parameters()}
        found = torch.autograd.grad(outer, list(wrt.values()), allow_unused=True)
        return dict(zip(wrt, found, strict=True))

    truth = run(None)
    assert all(g is not None for n, g in truth.items() if n != "bias")
    for slots in (1, 3, "all"):
        assert_same(run(Checkpointed(slots=slots)), truth)


def test_a_history_that_cannot_be_seen_is_refused():
    class Holder:
        value = leaf(0.4).sin()

    model = network()
    with (
        pytest.raises(InvalidInputError, match=r"args=\(tensor"),
        innerloop.track(model, sgd(model), strategy=Checkpointed()) as loop,
    ):
        loop.step(lambda: regression(loop.model, 0) * Holder.value)


class Holder:
    x = torch.zeros(())
    y = torch.zeros(())


def by_object(loop: Any) -> Iterator[None]:
    holder = Holder()
    for t in range(4):
        holder.x, holder.y = features(t), target(t)
        loop.step(lambda: F.mse_loss(loop.model(holder.x), holder.y))
        yield


def overwritten(loop: Any) -> Iterator[None]:
    x, y = features(0), target(0)
    for t in range(4):
        x.copy_(features(t))
        loop.step(lambda: F.mse_loss(loop.model(x), y))
        yield


def overwritten_without_a_trace(loop: Any) -> Iterator[None]:
    data = features(0).numpy()
    x, y = torch.from_numpy(data), target(0)
    for t in range(4):
        data[:] = features(t).numpy()
        loop.step(lambda: F.mse_loss(loop.model(x), y))
        yield


def by_iterator(loop: Any) -> Iterator[None]:
    data = iter([features(t) for t in range(40)])
    for t in range(4):
        loop.step(lambda: F.mse_loss(loop.model(next(data)), target(t)))
        yield


def by_ending_iterator(loop: Any) -> Iterator[None]:
    data = iter([features(t) for t in range(4)])
    for t in range(4):
        loop.step(lambda: F.mse_loss(loop.model(next(data)), target(t)))
        yield


def by_numpy(loop: Any) -> Iterator[None]:
    for t in range(4):
        loop.step(lambda: regression(loop.model, t) * float(np.random.default_rng().random()))
        yield


def by_generator(loop: Any) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)
    for t in range(4):
        loop.step(lambda: regression(loop.model, t) * torch.rand((), generator=generator))
        yield


def noisy_callback(loop: Any) -> Iterator[None]:
    for t in range(4):
        loop.step(
            lambda: regression(loop.model, t),
            grad_callback=lambda grads: {
                n: g * (1 + 1e-2 * random.random()) for n, g in grads.items()
            },
        )
        yield


def by_attribute(loop: Any) -> Iterator[None]:
    for t in range(4):
        loop.model.gain = 1.0 + t
        loop.step(lambda: regression(loop.model, t) * loop.model.gain)
        yield


@pytest.mark.parametrize(
    "steps",
    [
        by_object,
        overwritten,
        overwritten_without_a_trace,
        by_iterator,
        by_ending_iterator,
        by_numpy,
        by_generator,
        noisy_callback,
        by_attribute,
    ],
)
@pytest.mark.parametrize("slots", [1, "all"])
def test_what_cannot_run_again_is_an_error(steps: Callable[[Any], Iterator[None]], slots: Any):
    model = network()
    with innerloop.track(model, sgd(model), strategy=Checkpointed(slots=slots)) as loop:
        for _ in steps(loop):
            pass
        outer = regression(loop.model, 5)
    state = torch.get_rng_state()
    before = {n: p.detach().clone() for n, p in loop.parameters().items()}
    with pytest.raises(InvalidInputError, match=r"args=\(x, y\)"):
        outer.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], p) for n, p in loop.parameters().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_closure_that_writes_what_it_has_captured_is_refused():
    total = torch.zeros(())
    model = network()

    def loss() -> Tensor:
        value = regression(loop.model, 0)
        total.add_(value.detach())
        return value

    with (
        pytest.raises(InvalidInputError, match="writes a tensor in place"),
        innerloop.track(model, sgd(model), strategy=Checkpointed()) as loop,
    ):
        loop.step(loss)


def test_a_closure_that_writes_a_weight_is_refused():
    model = network()

    def loss() -> Tensor:
        with torch.no_grad():
            loop.model.body.weight.clamp_(-0.1, 0.1)
        return regression(loop.model, 0)

    with (
        pytest.raises(InvalidInputError, match=r"loop\.assign"),
        innerloop.track(model, sgd(model), strategy=Checkpointed()) as loop,
    ):
        loop.step(loss)


def test_notes_in_a_list_are_taken_once():
    notes: list[float] = []

    def body(loop: Any, _: bool) -> Tensor:
        def loss() -> Tensor:
            value = regression(loop.model, t)
            notes.append(value.item())
            return value

        for t in range(4):  # noqa: B007
            loop.step(loss)
        return regression(loop.model, 4)

    gradients(body, Checkpointed(slots=1))
    assert len(notes) == 4


# -- what users do between steps -------------------------------------------------------------------


def assigned(loop: Any, t: int) -> None:
    loop.assign({"head.weight": 0.9 * loop.model.head.weight + 0.01 * t})


def added(loop: Any, t: int) -> None:
    with torch.no_grad():
        loop.model.body.weight.add_(0.01 * (t + 1))


def added_to_data(loop: Any, t: int) -> None:
    loop.model.body.weight.data.add_(0.01 * (t + 1))


def recorded(loop: Any, t: int) -> None:
    loop.model.head.weight.mul_(0.9)


def replaced(loop: Any, t: int) -> None:
    loop.assign({"body.bias": torch.full((4,), 0.1 * t)})


@pytest.mark.parametrize("edit", [assigned, added, added_to_data, recorded, replaced])
@pytest.mark.parametrize("at", [(0, 1, 2, 3, 4, 5), (2, 5)])
def test_edits_of_weights(edit: Callable[[Any, int], None], at: tuple[int, ...]):
    if edit in (added, added_to_data) and at[0]:
        pytest.skip("refused by plain track: nobody looks any more")

    def body(loop: Any, _: bool) -> Tensor:
        for t in range(6):
            if t in at:
                edit(loop, t)
            loop.step(lambda: regression(loop.model, t))
        edit(loop, 6)
        return regression(loop.model, 6)

    assert_as_plain(body, slots=(1, 2, "all"))


def test_an_edit_that_has_a_derivative_is_refused():
    model = network()
    with (  # noqa: PT012
        pytest.raises(NotDifferentiableError, match=r"loop\.assign"),
        innerloop.track(model, sgd(model), strategy=Checkpointed()) as loop,
    ):
        loop.step(lambda: regression(loop.model, 0))
        with torch.no_grad():
            loop.model.body.weight.clamp_(-0.1, 0.1)
        loop.step(lambda: regression(loop.model, 1))


class Noisy(nn.Module):
    """Batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.body(x)).tanh()))


def noisy() -> Noisy:
    torch.manual_seed(3)
    return Noisy()


def test_random_numbers_and_buffers_that_change_between_steps():
    def body(loop: Any, _: bool) -> Tensor:
        total = torch.zeros(())
        for t in range(8):
            loop.step(lambda: regression(loop.model, t))
            if t == 2:
                torch.rand(7)
            if t == 3:
                total = total + regression(loop.model, 50)  # in train mode: it writes the buffers
            if t == 4:
                loop.model.norm.reset_running_stats()
            if t == 5:
                loop.model.eval()
            if t == 6:
                loop.model.train()
        return total + regression(loop.model, 9)

    assert_as_plain(body, model=noisy)


def test_the_users_random_numbers_go_on_as_they_were():
    def drawn(strategy: Checkpointed | None) -> list[Tensor]:
        model = noisy()
        torch.manual_seed(SEED)
        with innerloop.track(model, sgd(model), strategy=strategy) as loop:
            for t in range(5):
                loop.step(lambda: regression(loop.model, t))
            first = torch.rand(2)
            outer = regression(loop.model, 5)
        outer.backward()
        return [first, torch.rand(2)]

    for ours, truth in zip(drawn(Checkpointed(slots=1)), drawn(None), strict=True):
        assert torch.equal(ours, truth)


def test_autocast_holds_again():
    def body(loop: Any, _: bool) -> Tensor:
        for t in range(5):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=t in (1, 3)):
                loop.step(lambda: F.mse_loss(loop.model(features(t).float()), target(t).float()))
        return F.mse_loss(loop.model(features(5).float()), target(5).float())

    assert_as_plain(body, model=lambda: network().float())


def test_outer_losses_on_the_way_and_several_backward_passes():
    """Each backward pass alone, all of them at once, and one of a graph that is retained."""
    model = network()

    def run(strategy: Checkpointed | None, how: str) -> dict[str, Any]:
        model.zero_grad()
        losses = []
        with innerloop.track(model, sgd(model), strategy=strategy) as loop:
            for t in range(9):
                loop.step(lambda: regression(loop.model, t))
                if t % 3 == 2:
                    losses.append(regression(loop.model, 20 + t))
                    if how == "at once":
                        losses[-1].backward(retain_graph=True)
        if how == "after":
            for loss in losses:
                loss.backward(retain_graph=True)
        if how == "sum":
            torch.stack(losses).sum().backward()
        if how == "twice":
            for _ in range(2):
                (torch.stack(losses).sum() / 2).backward(retain_graph=True)
        grads = {n: p.grad for n, p in model.named_parameters()}
        return {n: None if g is None else g.clone() for n, g in grads.items()}

    truth = run(None, "sum")
    for how in ("at once", "after", "sum", "twice"):
        for slots in (1, 3, "all", None):
            assert_same(run(Checkpointed(slots=slots), how), truth)


def test_times_that_are_saved():
    model = network()
    with innerloop.track(model, sgd(model), strategy=Checkpointed(slots=1), save_at=[2, 4]) as loop:
        steps_of(loop)
    with innerloop.track(model, sgd(model)) as plain:
        for t in range(6):
            plain.step(regression(plain.model, t))
    for time in (0, 2, 4, 6, -1):
        ours, truth = (x.at(time).params["body.weight"] for x in (loop, plain))
        assert torch.equal(ours, truth)
        a, b = (
            torch.autograd.grad(x.sum(), model.body.weight, retain_graph=True)[0]
            for x in (ours, truth)
        )
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert torch.equal(loop.trajectory.losses, plain.trajectory.losses)
    with pytest.raises(InvalidInputError, match="save_at"):
        loop.at(3)


def test_detach_and_commit():
    def run(strategy: Checkpointed | None) -> dict[str, Any]:
        model, lr = network(), leaf(0.1)
        optimizer = adam(model)
        with innerloop.track(
            model, optimizer, learn="outer", hyper={"lr": lr}, strategy=strategy
        ) as loop:
            for window in range(3):
                for t in range(4):
                    loop.step(lambda: regression(loop.model, 4 * window + t))
                regression(loop.model, 30).backward()
                loop.detach()
            loop.commit()
        found = {n: p.detach().clone() for n, p in model.named_parameters()} | {"lr": lr.grad}
        return found | {
            f"{k}{i}": v
            for i, s in enumerate(optimizer.state_dict()["state"].values())
            for k, v in s.items()
        }

    assert_same(run(Checkpointed(slots=2)), run(None))


# -- optimizers ------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, eps=0.1),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, eps=0.1),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1, eps=0.1),
    "adadelta": lambda m: torch.optim.Adadelta(m.parameters(), lr=0.5, eps=0.1),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), lr=0.1),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=0.01),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.3, max_iter=3),
    "several": lambda m: [
        torch.optim.Adam(m.head.parameters(), lr=0.05, eps=0.1),
        torch.optim.SGD(m.body.parameters(), lr=0.1),
    ],
    "chain": lambda m: innerloop.optim.chain(
        innerloop.optim.clip_by_global_norm(0.5), innerloop.optim.adam(lr=0.05, eps=0.1)
    ),
    "muon": lambda m: innerloop.optim.groups(
        {"*.weight": innerloop.optim.muon(lr=0.05), "*": innerloop.optim.sgd(lr=0.1)}
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name: str):
    def run(strategy: Checkpointed | None, **arguments: Any) -> dict[str, Any]:
        model = network()
        torch.manual_seed(SEED)
        with innerloop.track(
            model, OPTIMIZERS[name](model), strategy=strategy, **arguments
        ) as loop:
            for t in range(6):
                loop.step(lambda: regression(loop.model, t))
            outer = regression(loop.model, 6)
        outer.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    for first_order in (False, True):
        truth = run(None, first_order=first_order)
        for slots in (1, "all"):
            assert_same(run(Checkpointed(slots=slots), first_order=first_order), truth)


def test_a_scheduler_changes_the_settings_between_steps():
    def run(strategy: Checkpointed | None, rate: Any) -> dict[str, Any]:
        model = network()
        optimizer = sgd(model, lr=rate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        with innerloop.track(model, optimizer, strategy=strategy) as loop:
            for t in range(6):
                loop.step(lambda: regression(loop.model, t))
                scheduler.step()
            regression(loop.model, 6).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    for slots in (1, "all"):
        assert_same(run(Checkpointed(slots=slots), 0.1), run(None, 0.1))
        assert_same(run(Checkpointed(slots=slots), torch.tensor(0.1)), run(None, 0.1))


def test_hyper_parameters_of_a_step_and_hooks():
    def run(strategy: Checkpointed | None) -> dict[str, Any]:
        model = network()
        model.body.weight.register_hook(lambda g: 1.5 * g)
        rates = torch.linspace(0.05, 0.2, 5, requires_grad=True)
        decay = leaf(0.01)
        with innerloop.track(
            model, sgd(model), hyper={"weight_decay": decay}, strategy=strategy
        ) as loop:
            for t in range(5):
                loop.step(lambda: regression(loop.model, t), hyper={"lr": rates[t].exp() - 1})
            outer = regression(loop.model, 5)
        wrt = {"rates": rates, "decay": decay, **dict(model.named_parameters())}
        return dict(zip(wrt, torch.autograd.grad(outer, list(wrt.values())), strict=True))

    for slots in (1, 3, "all"):
        assert_same(run(Checkpointed(slots=slots)), run(None))


# -- refusals --------------------------------------------------------------------------------------


def test_a_loss_in_place_of_a_function():
    model = network()
    with (
        pytest.raises(InvalidInputError, match="needs a function that computes the loss"),
        innerloop.track(model, sgd(model), strategy=Checkpointed()) as loop,
    ):
        loop.step(regression(loop.model, 0))


@pytest.mark.parametrize(
    "strategy",
    [
        innerloop.StoreAll(compile=True),
        innerloop.ForwardMode(),
        innerloop.Auto(memory="1GB"),
        Checkpointed(product="mixed"),
        Checkpointed(save="gradients"),
        Checkpointed(offload=innerloop.strategy.Disk("run1")),
    ],
    ids=repr,
)
def test_strategies_that_do_not_fit(strategy: Any):
    model = network()
    with pytest.raises(InvalidInputError, match="hand-written loop"):
        innerloop.track(model, sgd(model), strategy=strategy)


# -- other strategies ------------------------------------------------------------------------------


def test_strategies_that_keep_every_graph():
    def body(loop: Any, replayed: bool) -> Tensor:
        for t in range(3):
            loop.step(regression(loop.model, t))
        return regression(loop.model, 9) + loop.at(1).params["head.weight"].sum()

    plain = gradients(body, None)
    assert_same(gradients(body, innerloop.StoreAll()), plain)
    assert_same(gradients(body, innerloop.StoreAll(), save_at=[1]), plain)
    assert_same(gradients(body, innerloop.FirstOrder()), gradients(body, None, first_order=True))
    with pytest.raises(InvalidInputError, match="save_at"):
        gradients(body, innerloop.StoreAll(), save_at=[-1])


def cut_off(
    steps: int, cut: int | None, last: int | None, learn: Any = "outer"
) -> dict[str, Tensor | None]:
    """Gradients where `loop.detach` cuts the graph before step ``cut``, or ``Truncated`` does."""
    model, lr, scale = network(), leaf(0.1), leaf(1.5)
    strategy = None if last is None else innerloop.Truncated(last)
    optimizer = adam(model)
    torch.manual_seed(SEED)
    with innerloop.track(model, optimizer, learn, hyper={"lr": lr}, strategy=strategy) as loop:
        for t in range(steps):
            if t == cut:
                loop.detach()
            weight = scale * (t + 1)
            loop.step(lambda: weight * regression(loop.model, t))
            if t == steps - 2:
                loop.assign({"head.bias": scale * loop.model.head.bias})
        (regression(loop.model, 30) * scale).backward()
    return {"lr": lr.grad, "scale": scale.grad} | {n: p.grad for n, p in named(model).items()}


@pytest.mark.parametrize("last", [1, 2, 5])
def test_truncated_differentiates_the_last_steps(last: int):
    assert_same(cut_off(6, None, last), cut_off(6, 6 - last, None))


@pytest.mark.parametrize("learn", ["init", "outer"])
def test_truncated_is_exact_where_no_step_is_cut_off(learn: Any):
    assert_same(cut_off(4, None, 4, learn), cut_off(4, None, None, learn))


def test_truncated_counts_from_the_newest_step():
    """Outer gradients while the loop goes on: each one reaches two steps back."""

    def slopes(last: int | None) -> list[float]:
        found = []
        for end in range(2, 6) if last is None else [6]:
            model, lr = network(), leaf(0.1)
            strategy = None if last is None else innerloop.Truncated(last)
            with innerloop.track(
                model, sgd(model), "outer", hyper={"lr": lr}, strategy=strategy
            ) as loop:
                for t in range(end):
                    if last is None and t == end - 2:
                        loop.detach()
                    loop.step(lambda: regression(loop.model, t))
                    if last is not None and t > 0:
                        outer = regression(loop.model, 30)
                        found.append(torch.autograd.grad(outer, lr)[0].item())
                if last is None:
                    outer = regression(loop.model, 30)
                    found.append(torch.autograd.grad(outer, lr)[0].item())
        return found

    assert slopes(2)[:4] == pytest.approx(slopes(None), rel=1e-12)


def test_what_truncated_holds_constant_is_named():
    with pytest.raises(NotDifferentiableError, match="does not differentiate with respect to what"):
        cut_off(4, None, 3, "init")
    model, lr = network(), leaf(0.1)
    with innerloop.track(
        model, sgd(model), "outer", hyper={"lr": lr}, strategy=innerloop.Truncated(2), save_at=[1]
    ) as loop:
        losses = [loop.step(lambda: regression(loop.model, t)) for t in range(2)]
        early = regression(loop.model, 30)
        losses += [loop.step(lambda: regression(loop.model, t)) for t in range(2)]
    assert torch.equal(loop.trajectory.losses, torch.stack(losses))
    for outer in (early, loop.trajectory.losses.sum(), loop.at(1).params["head.bias"].sum()):
        with pytest.raises(NotDifferentiableError, match="holds constant by now"):
            torch.autograd.grad(outer, lr, retain_graph=True)
    assert torch.autograd.grad(loop.trajectory.losses[3], lr)[0].isfinite()


def test_truncated_keeps_as_much_as_its_last_steps():
    model, lr = network(), leaf(0.1)
    with innerloop.track(
        model, sgd(model), "outer", hyper={"lr": lr}, strategy=innerloop.Truncated(3)
    ) as loop:
        data: list[weakref.ref[Tensor]] = []
        for t in range(8):
            x = features(t)
            data.append(weakref.ref(x))
            loop.step(lambda: loop.model(x).square().mean())
            del x
    gc.collect()
    assert [ref() is not None for ref in data] == [False] * 5 + [True] * 3


def test_times_that_are_none():
    model = network()
    for times in ([-1], [True]):
        with pytest.raises(InvalidInputError, match="save_at"):
            innerloop.track(model, sgd(model), strategy=Checkpointed(), save_at=times)
    with pytest.raises(InvalidInputError, match="save_at"):
        innerloop.track(model, sgd(model), save_at=[1])
    with pytest.raises(InvalidInputError, match="save_at"):
        innerloop.track(model, sgd(model), "nothing", strategy=Checkpointed(), save_at=[1])


def test_nothing_learned_needs_no_strategy():
    model = network()
    with innerloop.track(model, sgd(model), "nothing", strategy=Checkpointed()) as loop:
        steps_of(loop)
    assert loop.trajectory.steps == 6


@pytest.mark.parametrize("place", ["direct", "outer loop", "outer replayed loop"])
def test_a_second_derivative_is_refused(place: str):
    model = network()

    def inner(outer_model: nn.Module) -> Tensor:
        with innerloop.track(
            outer_model, innerloop.optim.sgd(lr=0.1), strategy=Checkpointed()
        ) as loop:
            steps_of(loop, 3)
            return regression(loop.model, 3)

    with pytest.raises(NotDifferentiableError, match="derivative of the meta-gradient"):  # noqa: PT012
        if place == "direct":
            torch.autograd.grad(inner(model), list(model.parameters()), create_graph=True)
        strategy = Checkpointed() if place == "outer replayed loop" else None
        with innerloop.track(model, sgd(model), strategy=strategy) as loop:
            for _ in range(2):
                loop.step(lambda: inner(loop.model))
            outer = regression(loop.model, 3)
        outer.backward()


def test_a_plain_loop_inside_a_step():
    def body(loop: Any, _: bool) -> Tensor:
        def loss(t: int) -> Tensor:
            with innerloop.track(loop.model, innerloop.optim.sgd(lr=0.1)) as inside:
                for s in range(2):
                    inside.step(regression(inside.model, t + s))
                return regression(inside.model, t + 2)

        for t in range(3):
            loop.step(loss, args=(t,))
        return regression(loop.model, 5)

    assert_as_plain(body, slots=(1, "all"))


def test_transforms_are_refused():
    model = network()

    def outer(x: Tensor) -> Tensor:
        innerloop.track(model, sgd(model), strategy=Checkpointed())
        return x

    with pytest.raises(NotDifferentiableError, match=r"transform of torch\.func"):
        torch.func.grad(outer)(torch.ones(()))


def test_many_cotangents_at_once():
    """As `innerloop.inspect.jacobian` takes them."""
    found = []
    for strategy in (None, Checkpointed(slots=1)):
        model = network()
        with innerloop.track(
            model, sgd(model), strategy=strategy, save_at=() if strategy is None else [1, 3]
        ) as loop:
            steps_of(loop, 4)
        found.append(innerloop.inspect.jacobian(loop.trajectory, time=3, wrt=1)["body.weight"])
    assert_same(found[1], found[0])


class Statistic(nn.Module):
    """A module beside the model, which counts and averages."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).square().mean()


def test_a_module_beside_the_model_is_not_written_again():
    def run(strategy: Checkpointed | None) -> dict[str, Any]:
        model, beside = network(), Statistic()
        with innerloop.track(model, sgd(model), strategy=strategy) as loop:
            for t in range(4):
                loop.step(lambda: regression(loop.model, t) + beside(loop.model(features(t))))
            outer = regression(loop.model, 4)
        outer.backward()
        return {n: p.grad for n, p in model.named_parameters()} | dict(beside.named_buffers())

    assert_same(run(Checkpointed(slots=1)), run(None))


def test_checkpointing_inside_the_loss():
    """What runs again in a step that runs again has the weights of that step."""
    from torch.utils.checkpoint import checkpoint

    def run(strategy: Checkpointed | None, checkpointed: bool) -> dict[str, Any]:
        model = network()

        def predict(t: int) -> Tensor:
            if not checkpointed:
                return loop.model(features(t))
            return checkpoint(loop.model, features(t), use_reentrant=False)

        with innerloop.track(model, sgd(model), strategy=strategy) as loop:
            for t in range(3):
                loop.step(lambda: F.mse_loss(predict(t), target(t)))
            regression(loop.model, 3).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    assert_same(run(Checkpointed(slots=1), True), run(None, False))


def test_the_users_model_used_by_mistake():
    model = network()
    with (
        pytest.raises(InvalidInputError, match="not that of"),
        innerloop.track(model, sgd(model), strategy=Checkpointed()) as loop,
    ):
        loop.step(lambda: regression(model, 0) + 0 * loop.model.head.bias.sum())


def test_an_exception_in_a_closure_leaves_the_loop_as_it_was():
    model = network()

    def plain(loop: Any, _: bool) -> Tensor:
        steps_of(loop, 3)
        return regression(loop.model, 3)

    truth = gradients(plain, None)

    def body(loop: Any, _: bool) -> Tensor:
        for t in range(3):
            with pytest.raises(ZeroDivisionError):
                loop.step(lambda: regression(loop.model, t) / (1 // 0))
            loop.step(lambda: regression(loop.model, t))
        return regression(loop.model, 3)

    assert_same(gradients(body, Checkpointed(slots=1), model=model), truth)


# -- memory and threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, None])
def test_episodes_leave_no_objects(slots: Any):
    model = Noisy()
    optimizer = adam(model)
    seed = leaf(0.5)

    def one() -> None:
        scale = seed.sin()
        with innerloop.track(model, optimizer, strategy=Checkpointed(slots=slots)) as loop:
            module = loop.model
            for t in range(4):
                loop.step(lambda: regression(loop.model, t) * scale)
                loop.step(lambda: regression(module, t))
                early = loop.parameters()["head.bias"]
                loop.step(lambda: regression(module, t) + (early * loop.model.head.bias).sum())
            outer = regression(loop.model, 5) + loop.trajectory.losses.sum()
        outer.backward()

    assert_nothing_is_left(one, count=10)


@pytest.mark.slow
def test_two_hundred_episodes():
    model = network()
    optimizer = sgd(model)

    def one() -> None:
        with innerloop.track(model, optimizer, strategy=Checkpointed()) as loop:
            steps_of(loop, 4)
            outer = regression(loop.model, 5)
        outer.backward()

    assert_nothing_is_left(one, count=200)


def test_backward_passes_in_two_threads():
    model = network()
    with innerloop.track(model, sgd(model), strategy=Checkpointed(slots=2)) as loop:
        for t in range(12):
            loop.step(lambda: regression(loop.model, t))
        outers = [regression(loop.model, 20 + i) for i in range(2)]
    params = list(model.parameters())
    truth = [torch.autograd.grad(o, params, retain_graph=True) for o in outers]
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        found[i] = torch.autograd.grad(outers[i], params, retain_graph=True)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        for ours, expected in zip(found[i], truth[i], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "after"])
def test_operations_are_replaced_as_they_were(inside: bool):
    """A step that runs again inside of the block is no loop in a loop, in which batch norm has
    another form that rounds otherwise. Adam makes the rounding of a zero gradient large."""

    def gradients(strategy: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        x, y = torch.randn(9, 6, 3), torch.randn(9, 6, 1)
        adam = torch.optim.Adam(model.parameters(), lr=0.05)
        with innerloop.track(model.double(), adam, strategy=strategy) as loop:
            for t in range(9):
                loop.step(lambda: (loop.model(x[t].double()) - y[t].double()).square().mean())
            outer = loop.model(x[0].double()).square().mean()
            if inside:
                return list(torch.autograd.grad(outer, list(model.parameters())))
        return list(torch.autograd.grad(outer, list(model.parameters())))

    plain = gradients(None)
    for slots in (2, "all"):
        torch.testing.assert_close(gradients(Checkpointed(slots=slots)), plain, rtol=0, atol=1e-12)


class Factor:
    """A factor that acts on gradients alone, as that of a gradient reversal does."""

    value = 1.0


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Factor) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.factor.value, None


@pytest.mark.parametrize("changed", ["before the last step", "after it", "never"])
def test_a_factor_of_the_gradient_that_changes_is_noticed(changed: str):
    """The losses are the same; no loss tells what the newest step did."""
    model, factor = network(), Factor()

    def loss(x: Tensor) -> Tensor:
        found: Tensor = Scaled.apply(loop.model(x), factor).square().mean()
        return found

    with innerloop.track(model, sgd(model), strategy=Checkpointed()) as loop:
        for t in range(3):
            if changed == "before the last step" and t == 2:
                factor.value = -0.5
            loop.step(loss, args=(features(t),))
        outer = loop.model(features(9)).sum()
    if changed == "after it":
        factor.value = -0.5
    if changed == "never":
        outer.backward()
        return
    factor.value = 3.0
    with pytest.raises(InvalidInputError, match="ran again in the backward pass"):
        outer.backward()


# -- buffers with a derivative ---------------------------------------------------------------------


class Remembering(nn.Module):
    """A model that keeps what it computed in a buffer."""

    def __init__(self, keeps: Callable[[Any], Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("seen", torch.zeros(2))
        self.keeps = keeps

    def forward(self) -> Tensor:
        self.keeps(self)
        return self.w.square().sum()


KEEPS: dict[str, Callable[[Any], object]] = {
    # Without saved tensors nothing in PyTorch complains.
    "a sum": lambda model: setattr(model, "seen", model.w + 1),
    "in place": lambda model: model.seen.copy_(model.w),
    "a square": lambda model: setattr(model, "seen", model.w.square()),
}


@pytest.mark.parametrize("strategy", [Checkpointed(), innerloop.Truncated(9)], ids=repr)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("keeps", KEEPS)
def test_a_derivative_through_a_buffer_is_refused(
    keeps: str, steps: int, strategy: Strategy
) -> None:
    """A step runs again with constant buffers: the outer gradient through one would be lost."""
    model, scale = Remembering(KEEPS[keeps]), leaf(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learn: Any = "outer" if isinstance(strategy, innerloop.Truncated) else "init"
    with innerloop.track(model, optimizer, learn, strategy=strategy) as loop:
        for _ in range(steps):
            loop.step(lambda: loop.model() * scale)
        outer = loop.model.seen.sum()
        of_weights = loop.model.w.sum()
    with pytest.raises(InvalidInputError, match=r"the buffer 'seen' of loop.model requires grad"):
        torch.autograd.grad(outer, [model.w, scale], allow_unused=True)
    with pytest.raises(InvalidInputError, match="leave strategy= away"):
        outer.backward()
    assert torch.isfinite(torch.autograd.grad(of_weights, scale)[0])  # what is not asked for


def test_a_step_that_reads_a_buffer_with_a_derivative_is_refused() -> None:
    model = Remembering(lambda model: setattr(model, "seen", model.seen / 2 + model.w.sin()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with innerloop.track(model, optimizer, strategy=Checkpointed()) as loop:
        loop.step(lambda: loop.model() + loop.model.seen.sum())
        with pytest.raises(InvalidInputError, match=r"the buffer 'seen' of loop.model"):
            loop.step(lambda: loop.model() + loop.model.seen.sum())


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("value", [lambda x: x, torch.sin], ids=["leaf", "computed"])
def test_a_tensor_that_is_put_into_a_buffer(value: Callable[[Tensor], Tensor], when: int) -> None:
    """One that requires grad is refused as at the start of the loop; a constant is none."""

    def run(outside: Tensor, strategy: Strategy | None) -> Tensor:
        model = Remembering(lambda model: None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with innerloop.track(model, optimizer, strategy=strategy) as loop:
            for t in range(3):
                if t == when:
                    loop.model.seen = outside
                loop.step(lambda: (loop.model.w.square() * (1 + loop.model.seen)).sum())
            (found,) = torch.autograd.grad(loop.model.w.sum(), model.w)
        return found

    outside = torch.tensor([0.3, 0.4], requires_grad=True)
    with pytest.raises(InvalidInputError, match=r"the buffer 'seen' of loop.model requires grad"):
        run(value(outside), Checkpointed())
    constant = value(outside).detach()
    torch.testing.assert_close(run(constant, Checkpointed()), run(constant, None))


def test_a_buffer_that_is_written_between_two_uses_is_named() -> None:
    """As in PyTorch, and by name: the size of the graph is asked for before its gradient."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self) -> Any:
            calls: Any = self.calls
            calls += 1
            return self.w / calls

    for strategy in (None, Checkpointed()):
        model = Counting()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with innerloop.track(model, optimizer, strategy=strategy) as loop:

            def loss() -> Tensor:
                return (loop.model() * loop.model()).sum()

            with pytest.raises(innerloop.InnerLoopError, match="in place"):
                loop.step(loss)
