"""What `innerloop.track` differentiates: truth is a closed form, or finite differences of a plain
``torch.optim`` run.

What depends on the kind of module is in ``test_module_situations.py``, on ``loop.model`` in
``test_track_model.py``, ``commit`` in ``test_track_commit.py``, bad input in
``test_track_errors.py``, memory in ``test_track_memory.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from tests.networks import (
    adam,
    adapted,
    after_sparse_steps,
    detached,
    direction,
    gradients,
    leaf,
    looked_up,
    network,
    outer_value,
    sgd,
    train,
)
from tests.oracles import assert_derivative, assert_params, derivative, smooth_noise
from tests.situations import SEED, STEPS, TwoLayers, along, features, named, regression, target

pytestmark = pytest.mark.usefixtures("float64")


# -- closed form: on a quadratic loss every meta-gradient is a matrix power ------------------------

CURVATURE = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


class Point(nn.Module):
    """A vector; called, it gives half x'Ax, so that the inner gradient is Ax."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(START.clone())

    def forward(self) -> Tensor:
        return self.x @ CURVATURE @ self.x / 2


def contraction(lr: float, power: int) -> Tensor:
    return torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - lr * CURVATURE, power)


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_sgd_on_a_quadratic_is_a_matrix_power(steps: int):
    model, lr = Point(), leaf(0.3)
    with innerloop.track(
        model, torch.optim.SGD(model.parameters(), lr=0.1), hyper={"lr": lr}
    ) as loop:
        for _ in range(steps):
            loop.step(loop.model())
        outer = loop.model.x.square().sum() / 2
    outer.backward()
    end = contraction(0.3, steps) @ START
    torch.testing.assert_close(loop.parameters()["x"].detach(), end, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(model.x.grad, contraction(0.3, steps) @ end, rtol=1e-13, atol=1e-14)
    if steps:
        by_lr = -steps * end @ CURVATURE @ contraction(0.3, steps - 1) @ START
        assert lr.grad is not None
        assert lr.grad.item() == pytest.approx(by_lr.item(), rel=1e-13)


def test_an_outer_loss_may_use_every_step():
    """Parameters at all times and the inner losses: the sum of x_t'Ax_t/2 and |x_t|²/2 over t."""
    model = Point()
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.2)) as loop:
        for _ in range(4):
            loop.step(loop.model())
        outer = loop.trajectory.losses.sum() + sum(
            loop.parameters(time=t)["x"].square().sum() / 2 for t in range(5)
        )
    assert isinstance(outer, Tensor)
    outer.backward()
    powers = [contraction(0.2, t) for t in range(5)]
    truth = sum(m @ CURVATURE @ m @ START for m in powers[:4]) + sum(m @ m @ START for m in powers)
    torch.testing.assert_close(model.x.grad, truth, rtol=1e-13, atol=1e-14)


def test_a_loop_inside_a_loop():
    """The loss of each outer step is the loss behind two inner steps; on a quadratic it is
    x'MAMx/2, M = (1 - rA)²."""
    model, rate = Point(), leaf(0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with innerloop.track(model, optimizer) as loop:
        for _ in range(3):
            with innerloop.track(loop.model, innerloop.optim.sgd(), hyper={"lr": rate}) as inner:
                inner.step(inner.model())
                inner.step(inner.model())
                adapted = inner.model()
            loop.step(adapted)
        outer = loop.model.x.square().sum() / 2
    outer.backward()

    def end(r: float) -> tuple[Tensor, Tensor]:
        m = contraction(r, 2)
        step = torch.eye(3, dtype=torch.float64) - 0.3 * m @ CURVATURE @ m
        return torch.linalg.matrix_power(step, 3) @ START, torch.linalg.matrix_power(step, 3)

    x, power = end(0.4)
    torch.testing.assert_close(loop.parameters()["x"].detach(), x, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(model.x.grad, power @ x, rtol=1e-13, atol=1e-14)
    assert rate.grad is not None
    assert_derivative(
        rate.grad.item(),
        derivative(lambda h: (end(0.4 + h)[0].square().sum() / 2).item()),
        "inner rate",
    )


# -- learn -----------------------------------------------------------------------------------------


def test_outer_reaches_tensors_outside_of_the_model_and_only_those():
    """The weights of the training examples, as a learned data weighting has them."""
    weights = [leaf(1.0), leaf(0.5), leaf(-0.2)]

    def weighted(model: nn.Module, t: int) -> Tensor:
        errors = (model(features(t)) - target(t)).square().squeeze(1)
        return (errors * torch.cat([w.expand(2) for w in weights])).mean()

    model = network()
    with innerloop.track(model, sgd(model), learn="outer") as loop:
        for t in range(STEPS):
            loop.step(weighted(loop.model, t))
        outer = regression(loop.model, STEPS)
    outer.backward()
    assert all(p.grad is None for p in model.parameters())
    found = [float("nan") if weight.grad is None else weight.grad.item() for weight in weights]
    for i, ours in enumerate(found):

        def moved(h: float, i: int = i) -> float:
            with torch.no_grad():
                weights[i].add_(h)
            value = outer_value(train(start := network(), sgd(start), weighted))
            with torch.no_grad():
                weights[i].sub_(h)
            return value

        assert_derivative(ours, derivative(moved), f"weight {i}")


@pytest.mark.parametrize("learn", ["nothing", "outer"])
def test_the_graph_ends_before_the_models_own_parameters(learn: Any):
    """So that nothing of the loop is run backwards for them."""
    model = nn.Linear(1, 1, bias=False)
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1), learn=learn) as loop:
        loop.step(loop.model.weight.square().sum())
        end = loop.model.weight
    left, leaves = [end.grad_fn], []
    while left:
        node = left.pop()
        leaves.append(getattr(node, "variable", None))
        left += [child for child, _ in node.next_functions if child is not None]
    assert not any(leaf is model.weight for leaf in leaves)
    assert end.grad_fn is not None


def test_a_parameter_that_no_optimizer_steps_is_constant_inside_and_learned_outside():
    """ANIL: only the head adapts. `only-head-adapts` has the derivative; here, that the body really
    stays."""
    model = network()
    with innerloop.track(model, torch.optim.SGD(model.head.parameters(), lr=0.1)) as loop:
        loop.step(regression(loop.model, 0))
        regression(loop.model, 1).backward()
    assert torch.equal(loop.parameters(time=1)["body.weight"], model.body.weight)
    assert not torch.equal(loop.parameters(time=1)["head.weight"], model.head.weight)
    assert model.body.weight.grad is not None
    assert model.body.weight.grad.abs().min() > 0


def test_nothing_equals_init_in_values():
    runs = []
    for learn in ("init", "nothing"):
        model = network()
        with innerloop.track(model, adam(model), learn=learn) as loop:
            for t in range(STEPS):
                loss = loop.step(regression(loop.model, t))
                assert not loss.requires_grad
        runs.append({name: p.detach() for name, p in loop.parameters().items()})
    assert_params(runs[1], runs[0], 0)


# -- params= ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", ["init", "outer"])
def test_the_initial_parameters_may_come_from_a_hypernetwork(learn: Any):
    model = network()
    code = torch.tensor([0.5, -1.0], requires_grad=True)
    bases = {
        name: smooth_noise(2, *p.shape, phase=200.0 + i)
        for i, (name, p) in enumerate(model.named_parameters())
    }

    def generate(code: Tensor) -> dict[str, Tensor]:
        return {name: torch.tensordot(code.tanh(), basis, 1) for name, basis in bases.items()}

    with innerloop.track(model, sgd(model), learn=learn, params=generate(code)) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
        outer = regression(loop.model, STEPS)
    outer.backward()
    assert all(p.grad is None for p in model.parameters())

    def moved(h: float, along: Tensor) -> float:
        start = network()
        with torch.no_grad():
            for name, value in generate(code + h * along).items():
                named(start)[name].copy_(value)
        return outer_value(train(start, sgd(start)))

    assert code.grad is not None
    for i in range(2):
        truth = derivative(lambda h, i=i: moved(h, torch.eye(2)[i]))  # type: ignore[misc]
        assert_derivative(code.grad[i].item(), truth, f"code {i}")


def test_the_outer_gradient_may_go_to_another_model():
    """The seed's second cell: the task model adapts from the meta model's parameters, the meta
    model receives the gradient."""
    task, meta = network(shift=0.3), network()
    with innerloop.track(task, sgd(task), params=dict(meta.named_parameters())) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
        outer = regression(loop.model, STEPS)
    outer.backward()
    assert all(p.grad is None for p in task.parameters())
    truth = derivative(lambda h: outer_value(train(start := network(h), sgd(start))))
    assert_derivative(along(gradients(meta), direction(meta)), truth, "meta model")


def test_params_may_replace_a_part_also_of_what_is_frozen():
    """A generated, frozen first layer; the rest is the model's own. All of it receives the outer
    gradient but the frozen original."""
    model = network()
    model.body.requires_grad_(False)
    scale = leaf(1.2)
    with innerloop.track(
        model, sgd(model), params={"body.weight": scale * network().body.weight.detach()}
    ) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
        outer = regression(loop.model, STEPS)
    outer.backward()

    def moved(by: float, h: float) -> float:
        start = network(h)
        with torch.no_grad():
            start.body.weight.copy_((1.2 + by) * network().body.weight)
            start.body.bias.copy_(network().body.bias)
        start.body.requires_grad_(False)
        return outer_value(train(start, sgd(start)))

    assert scale.grad is not None
    assert_derivative(scale.grad.item(), derivative(lambda h: moved(h, 0.0)), "scale")
    assert model.body.weight.grad is None
    head = {name: v for name, v in direction(model).items() if name.startswith("head")}
    assert_derivative(along(gradients(model), head), derivative(lambda h: moved(0.0, h)), "head")


def test_params_without_gradient_are_only_values():
    model, other = network(), network(shift=0.5)
    start = {name: p.detach() for name, p in other.named_parameters()}
    with innerloop.track(model, sgd(model), params=start) as loop:
        loop.step(regression(loop.model, 0))
    assert_params({n: p.detach() for n, p in loop.parameters(time=0).items()}, start, 0)
    assert_params(
        {n: p.detach() for n, p in loop.parameters().items()},
        detached(train(other, sgd(other), steps=range(1))),
        1e-12,
    )


# -- hyper -----------------------------------------------------------------------------------------


def two_groups(
    model: TwoLayers, body: float = 0.1, head: float = 0.03, momentum: float = 0.9
) -> torch.optim.SGD:
    groups = [
        {"params": model.body.parameters(), "lr": body},
        {"params": model.head.parameters(), "lr": head},
    ]
    return torch.optim.SGD(groups, lr=1.0, momentum=momentum)


def test_hyper_parameters_per_group():
    head = leaf(0.05)
    model = network()
    adapted(model, two_groups(model), learn="outer", hyper={"lr": [None, head]}).backward()
    truth = derivative(
        lambda h: outer_value(train(start := network(), two_groups(start, head=0.05 + h)))
    )
    assert head.grad is not None
    assert_derivative(head.grad.item(), truth, "lr of the second group")


def test_one_hyper_parameter_for_all_groups():
    momentum = leaf(0.7)
    model = network()
    adapted(model, two_groups(model), learn="outer", hyper={"momentum": momentum}).backward()
    truth = derivative(
        lambda h: outer_value(train(start := network(), two_groups(start, momentum=0.7 + h)))
    )
    assert momentum.grad is not None
    assert_derivative(momentum.grad.item(), truth, "momentum of both groups")


def test_hyper_parameters_per_parameter():
    """Meta-SGD: a rate per element for one parameter, a scalar for the others."""
    model = network()
    rates = {name: leaf(0.1) for name, _ in model.named_parameters()}
    rates["body.weight"] = (0.1 + 0.05 * smooth_noise(4, 3)).requires_grad_()
    adapted(model, sgd(model), learn="outer", hyper={"lr": rates}).backward()

    def by_hand(h: float, name: str, index: tuple[int, ...]) -> float:
        """Every element in a group of its own is not possible in torch.optim, so: SGD with momentum
        written out."""
        lr = {n: r.detach().clone() for n, r in rates.items()}
        lr[name][index] += h
        start = network()
        buffers = {n: torch.zeros_like(p) for n, p in start.named_parameters()}
        for t in range(STEPS):
            grads = torch.autograd.grad(regression(start, t), list(start.parameters()))
            with torch.no_grad():
                for (n, p), g in zip(start.named_parameters(), grads, strict=True):
                    buffers[n].mul_(0.9).add_(g)
                    p.sub_(lr[n] * buffers[n])
        return outer_value(start)

    for name, index in (
        ("body.weight", (0, 1)),
        ("body.weight", (3, 2)),
        ("body.bias", ()),
        ("head.weight", ()),
        ("head.bias", ()),
    ):
        gradient = rates[name].grad
        assert gradient is not None
        truth = derivative(lambda h, n=name, i=index: by_hand(h, n, i))  # type: ignore[misc]
        assert_derivative(gradient[index].item(), truth, f"lr[{name}]{index}")


def test_hyper_parameters_per_step_go_before_those_of_track():
    """A learned schedule for two steps; the third has the rate given to `track`; the optimizer's
    own is never used."""
    schedule, rest = [leaf(0.2), leaf(0.05)], leaf(0.15)
    model = network()
    with innerloop.track(model, sgd(model, lr=9.0), learn="outer", hyper={"lr": rest}) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t), hyper={"lr": schedule[t]} if t < 2 else None)
        outer = regression(loop.model, STEPS)
    outer.backward()

    def scheduled(rates: list[float]) -> float:
        start = network()
        optimizer = sgd(start)
        for t, rate in enumerate(rates):
            optimizer.param_groups[0]["lr"] = rate
            train(start, optimizer, steps=range(t, t + 1))
        return outer_value(start)

    assert outer.item() == pytest.approx(scheduled([0.2, 0.05, 0.15]), rel=1e-12)
    for i, lr in enumerate([*schedule, rest]):
        truth = derivative(
            lambda h, i=i: scheduled([r + h * (i == k) for k, r in enumerate([0.2, 0.05, 0.15])])  # type: ignore[misc]
        )
        assert lr.grad is not None
        assert_derivative(lr.grad.item(), truth, f"lr at step {i}")


def test_a_pair_of_hyper_parameters():
    beta1, beta2 = leaf(0.8), leaf(0.95)
    model = network()
    adapted(model, adam(model), learn="outer", hyper={"betas": (beta1, beta2)}).backward()

    def trained(b1: float, b2: float) -> float:
        start = network()
        return outer_value(
            train(start, torch.optim.Adam(start.parameters(), lr=0.05, betas=(b1, b2), eps=0.1))
        )

    assert beta1.grad is not None
    assert beta2.grad is not None
    assert_derivative(beta1.grad.item(), derivative(lambda h: trained(0.8 + h, 0.95)), "beta1")
    assert_derivative(beta2.grad.item(), derivative(lambda h: trained(0.8, 0.95 + h)), "beta2")


def test_a_tensor_rate_inside_the_torch_optimizer():
    model, lr = network(), leaf(0.1)
    adapted(model, torch.optim.SGD(model.parameters(), lr=lr), learn="outer").backward()
    truth = derivative(
        lambda h: outer_value(train(start := network(), sgd(start, lr=0.1 + h, momentum=0.0)))
    )
    assert lr.grad is not None
    assert_derivative(lr.grad.item(), truth, "lr inside torch.optim")


@pytest.mark.filterwarnings("error")
def test_a_scheduler_may_be_stepped_inside_the_loop():
    """Two groups with rates of their own, which the scheduler halves after each step."""

    def with_scheduler(start: TwoLayers) -> TwoLayers:
        optimizer = two_groups(start)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for t in range(STEPS):
            train(start, optimizer, steps=range(t, t + 1))
            scheduler.step()
        return start

    model = network()
    optimizer = two_groups(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with innerloop.track(model, optimizer) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
            scheduler.step()
        outer = regression(loop.model, STEPS)
    outer.backward()
    assert_params(
        {n: p.detach() for n, p in loop.parameters().items()},
        detached(with_scheduler(network())),
        1e-12,
    )
    truth = derivative(lambda h: outer_value(with_scheduler(network(h))))
    assert_derivative(along(gradients(model), direction(model)), truth, "scheduled")


# -- first_order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_first_order_is_the_gradient_at_the_end_point(
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
):
    """First-order MAML: the outer loss's gradient at the adapted parameters, here taken by plain
    PyTorch."""
    model = network()
    adapted(model, optimizer(model), first_order=True).backward()
    end = network()
    train(end, optimizer(end))
    end.zero_grad()
    regression(end, STEPS).backward()
    for name, expected in gradients(end).items():
        torch.testing.assert_close(gradients(model)[name], expected, rtol=1e-12, atol=1e-14)


def test_first_order_keeps_what_the_rule_itself_adds():
    """Weight decay multiplies the parameters by 1 - lr * decay at every step, and so the
    gradient."""
    model = network()
    decaying = lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.5)  # noqa: E731
    adapted(model, decaying(model), first_order=True).backward()
    end = network()
    train(end, decaying(end))
    end.zero_grad()
    regression(end, STEPS).backward()
    for name, expected in gradients(end).items():
        assert expected is not None
        torch.testing.assert_close(
            gradients(model)[name], (1 - 0.1 * 0.5) ** STEPS * expected, rtol=1e-12, atol=1e-14
        )


def received(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("learn", ["init", "outer"])
def test_first_order_gives_the_rate_its_gradient(learn: Any):
    """With the inner gradients g_t constant, the end is x₀ - lr Σ g_t: the derivative is -Σ g_t ·
    (outer gradient)."""
    model, lr = network(), leaf(0.1)
    adapted(
        model, sgd(model, momentum=0.0), first_order=True, learn=learn, hyper={"lr": lr}
    ).backward()
    end = network()
    optimizer = sgd(end, momentum=0.0)
    total = [torch.zeros_like(p) for p in end.parameters()]
    for t in range(STEPS):
        train(end, optimizer, steps=range(t, t + 1))
        total = [s + g for s, g in zip(total, received(end), strict=True)]
    end.zero_grad()
    regression(end, STEPS).backward()
    assert lr.grad is not None
    expected = -torch.stack(
        [(s * g).sum() for s, g in zip(total, received(end), strict=True)]
    ).sum()
    torch.testing.assert_close(lr.grad, expected, rtol=1e-12, atol=0)


def test_first_order_is_exact_for_a_linear_inner_loss():
    """Its limit: inner gradients that do not depend on the parameters."""
    slope = {name: smooth_noise(*p.shape, phase=7.0) for name, p in network().named_parameters()}

    def linear(model: nn.Module, t: int) -> Tensor:
        return sum(((1.0 + t) * slope[name] * p).sum() for name, p in model.named_parameters())  # type: ignore[return-value]

    model = network()
    with innerloop.track(model, sgd(model), first_order=True) as loop:
        for t in range(STEPS):
            loop.step(linear(loop.model, t))
        outer = regression(loop.model, STEPS)
    outer.backward()
    truth = derivative(lambda h: outer_value(train(start := network(h), sgd(start), linear)))
    assert_derivative(along(gradients(model), direction(model)), truth, "linear inner loss")


# -- grad_callback, learned optimizers -------------------------------------------------------------


def test_gradients_may_be_clipped_between_loss_and_update():
    """By their global norm, which makes every gradient depend on all the others. Truth: torch's own
    clipping."""
    model = network()

    def clip(grads: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        norm = torch.stack([g.square().sum() for g in grads.values() if g is not None]).sum().sqrt()
        return {name: g if g is None else g * (0.3 / (norm + 1e-6)) for name, g in grads.items()}

    with innerloop.track(model, sgd(model)) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t), grad_callback=clip)
        outer = regression(loop.model, STEPS)
    outer.backward()

    def clipped(h: float) -> float:
        start = network(h)
        optimizer = sgd(start)
        for t in range(STEPS):
            optimizer.zero_grad()
            regression(start, t).backward()
            assert nn.utils.clip_grad_norm_(start.parameters(), 0.3) > 0.3
            optimizer.step()
        return outer_value(start)

    assert_derivative(along(gradients(model), direction(model)), derivative(clipped), "clipped")


def test_a_gradient_that_the_callback_drops_is_skipped():
    """As torch skips a parameter whose ``.grad`` is None; also its momentum stays as it is."""
    model, plain = network(), network()
    optimizer = sgd(plain)

    def drop(grads: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {**grads, "body.bias": None}

    with innerloop.track(model, sgd(model)) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t), grad_callback=drop if t == 1 else None)
            optimizer.zero_grad()
            regression(plain, t).backward()
            if t == 1:
                plain.body.bias.grad = None
            optimizer.step()
    assert_params({n: p.detach() for n, p in loop.parameters().items()}, detached(plain), 1e-12)


def test_a_learned_optimizer():
    """A network that turns each gradient entry into an update; its own weights are what is
    learned."""
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    for i, p in enumerate(net.parameters()):
        p.data = 0.5 * smooth_noise(*p.shape, phase=300.0 + i)

    def update(rule: nn.Module, g: Tensor | None) -> Tensor:
        assert g is not None
        return rule(g.reshape(-1, 1)).reshape(g.shape)

    model = network()
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1), learn="outer") as loop:
        for t in range(STEPS):
            loop.step(
                regression(loop.model, t),
                grad_callback=lambda grads: {n: update(net, g) for n, g in grads.items()},
            )
        outer = regression(loop.model, STEPS)
    outer.backward()

    def trained(h: float) -> float:
        rule = copy.deepcopy(net)
        for name, p in rule.named_parameters():
            p.data += h * direction(rule)[name]
        start = network()
        for t in range(STEPS):
            grads = torch.autograd.grad(regression(start, t), list(start.parameters()))
            with torch.no_grad():
                for p, g in zip(start.parameters(), grads, strict=True):
                    p.sub_(0.1 * update(rule, g))
        return outer_value(start)

    assert_derivative(
        along(gradients(net), direction(net)),
        derivative(trained),
        "weights of the learned optimizer",
    )


# -- detach: windows -------------------------------------------------------------------------------


def test_two_outer_rounds_with_adam_state_carried_over():
    """Round two starts from the detached weights and moments of round one: truth differentiates
    round two only."""
    lr = leaf(0.05)
    model = network()
    found = []
    with innerloop.track(model, adam(model), learn="outer", hyper={"lr": lr}) as loop:
        for window in range(2):
            for t in range(2 * window, 2 * window + 2):
                loop.step(regression(loop.model, t))
            (gradient,) = torch.autograd.grad(regression(loop.model, STEPS), lr)
            found.append(gradient.item())
            loop.detach()
            assert loop.trajectory.steps == 0
    plain = network()
    optimizer = adam(plain)
    for window in range(2):

        def moved(h: float, window: int = window) -> float:
            end, opt = copy.deepcopy((plain, optimizer))
            opt.param_groups[0]["lr"] += h
            return outer_value(train(end, opt, steps=range(2 * window, 2 * window + 2)))

        assert_derivative(found[window], derivative(moved), f"lr in window {window}")
        train(plain, optimizer, steps=range(2 * window, 2 * window + 2))
    assert_params({n: p.detach() for n, p in loop.parameters().items()}, detached(plain), 1e-12)


def test_time_starts_again_at_a_detach():
    model = network()
    with innerloop.track(model, sgd(model)) as loop:
        for t in range(2):
            loop.step(regression(loop.model, t))
        before = {name: p.detach().clone() for name, p in loop.parameters().items()}
        loop.detach()
        loop.step(regression(loop.model, 2))
    assert loop.trajectory.steps == 1
    assert len(loop.trajectory.losses) == 1
    assert_params({n: p.detach() for n, p in loop.parameters(time=0).items()}, before, 0)
    assert all(p.grad_fn is not None or p.is_leaf for p in loop.parameters(time=0).values())


# -- test-time training: a loop inside a module's forward ------------------------------------------


class FastWeights(nn.Module):
    """Adapts a linear layer on a self-supervised task (predict the input) before it is used; one
    step at a learned rate."""

    def __init__(self, *, by_hand: bool) -> None:
        super().__init__()
        self.fast = nn.Linear(3, 3, bias=False)
        self.rate = nn.Parameter(torch.tensor(0.3))
        self.head = nn.Linear(3, 1)
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ (self.formula(x) if self.by_hand else self.loop(x)).T).tanh())

    def formula(self, x: Tensor) -> Tensor:
        """W - rate · ∂/∂W mean((xW' - x)²)."""
        return self.fast.weight - self.rate * 2 / x.numel() * (x @ self.fast.weight.T - x).T @ x

    def loop(self, x: Tensor) -> Tensor:
        with innerloop.track(self.fast, innerloop.optim.sgd(), hyper={"lr": self.rate}) as loop:
            loop.step(F.mse_loss(loop.model(x), x))
            return loop.model.weight


def test_time_training_inside_of_a_forward():
    """Trained by plain PyTorch, and inside of a second loop; truth is the same module with its
    inner step written out."""

    def make(by_hand: bool, h: float = 0.0) -> FastWeights:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            model = FastWeights(by_hand=by_hand)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(h * direction(model)[name])
        return model

    ours, truth = (make(by_hand) for by_hand in (False, True))
    assert_params(detached(train(ours, sgd(ours))), detached(train(truth, sgd(truth))), 1e-12)

    model = make(by_hand=False)
    with innerloop.track(model, sgd(model)) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
        outer = regression(loop.model, STEPS)
    outer.backward()
    expected = derivative(lambda h: outer_value(train(start := make(True, h), sgd(start))))
    assert_derivative(
        along(gradients(model), direction(model)), expected, "meta-learned test-time training"
    )


# -- two loops over one model ----------------------------------------------------------------------


def test_loops_over_the_same_model_do_not_know_each_other():
    model = network()
    with innerloop.track(model, sgd(model)) as first, innerloop.track(model, sgd(model)) as second:
        first.step(regression(first.model, 0))
        second.step(regression(second.model, 1))
        first.step(regression(first.model, 1))
    plain = network()
    train(plain, sgd(plain), steps=range(2))
    assert_params({n: p.detach() for n, p in first.parameters().items()}, detached(plain), 1e-12)
    assert first.model is not second.model


def test_the_proximal_term_to_the_users_own_parameters():
    """iMAML's regulariser: the loss uses the inner parameters *and* those of the user's model,
    which get both gradients."""

    def proximal(model: nn.Module, anchor: nn.Module, t: int) -> Tensor:
        distance = sum(
            (p - q).square().sum()
            for p, q in zip(model.parameters(), anchor.parameters(), strict=True)
        )
        return regression(model, t) + 0.3 * distance

    model = network()
    with innerloop.track(model, sgd(model)) as loop:
        for t in range(STEPS):
            loop.step(proximal(loop.model, model, t))
        outer = regression(loop.model, STEPS)
    outer.backward()

    def trained(h: float) -> float:
        start, anchor = network(h), network(h).requires_grad_(False)
        return outer_value(train(start, sgd(start), lambda m, t: proximal(m, anchor, t)))

    assert_derivative(along(gradients(model), direction(model)), derivative(trained), "proximal")


# -- under torch.func ------------------------------------------------------------------------------


def test_the_outer_gradient_by_torch_func():
    """With respect to the data of the loop, by reverse and by forward mode. (``vmap`` is
    refused.)"""
    x, v = features(0), features(7)

    def behind_a_loop(x: Tensor) -> Tensor:
        model = network()
        with innerloop.track(model, sgd(model)) as loop:
            for t in range(STEPS):
                loop.step(
                    (loop.model(x) - target(t)).square().mean()
                )  # mse_loss has no forward-mode derivative of its backward
            return regression(loop.model, STEPS)

    def plain(h: float) -> float:
        model = network()
        train(model, sgd(model), lambda m, t: F.mse_loss(m(x + h * v), target(t)))
        return outer_value(model)

    truth = derivative(plain)
    assert_derivative(
        (torch.func.grad(behind_a_loop)(x) * v).sum().item(), truth, "torch.func.grad"
    )
    assert_derivative(torch.func.jvp(behind_a_loop, (x,), (v,))[1].item(), truth, "torch.func.jvp")


# -- inside a backward pass ------------------------------------------------------------------------


class Implicit(torch.autograd.Function):
    """Its derivative is computed by a loop, as implicit differentiation does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        with torch.enable_grad():
            model = network()
            value = adapted(model, sgd(model)).detach()
        return grads[0] * value


def test_a_loop_inside_a_backward_pass():
    x = leaf(1.0)
    Implicit.apply(x).backward()
    model = network()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(outer_value(train(model, sgd(model))), rel=1e-12)


# -- sparse and missing gradients ------------------------------------------------------------------

SPARSE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "sparse adam": lambda params: torch.optim.SparseAdam(params, lr=0.05, eps=1e-2),
}


@pytest.mark.parametrize("rule", SPARSE)
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch.optim itself
def test_a_sparse_embedding_equals_finite_differences_of_torch(rule: str, closure: bool):
    start = 0.5 * smooth_noise(5, 2)
    model = nn.Embedding(5, 2, sparse=True, _weight=start.clone())
    with innerloop.track(model, SPARSE[rule](model.parameters())) as loop:
        for t in range(3):
            if closure:
                loop.step(partial(lambda t: looked_up(loop.model.weight, t), t))
            else:
                loop.step(looked_up(loop.model.weight, t))
        looked_up(loop.model.weight, 1).backward()
    along = smooth_noise(5, 2, phase=1.0)
    truth = derivative(lambda h: after_sparse_steps(SPARSE[rule], start + h * along))
    found = model.weight.grad
    assert found is not None
    assert_derivative(float((found.to_dense() * along).sum()), truth, rule)


def test_a_parameter_that_the_loss_does_not_use_is_skipped_as_after_backward():
    """`unroll` differentiates a function instead: see ``test_unroll.py``."""
    model = nn.ParameterDict(
        {"used": nn.Parameter(torch.tensor(1.0)), "unused": nn.Parameter(torch.tensor(1.0))}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    with innerloop.track(model, optimizer) as loop:
        loop.step(loop.model["used"] ** 2 / 2)
        assert loop.model["unused"].item() == 1.0
        assert loop.model["used"].item() == pytest.approx(0.85)


# -- the loop as an object -------------------------------------------------------------------------


def test_the_loop_says_what_it_is():
    model = nn.Linear(2, 1)
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.5)) as loop:
        for _ in range(3):
            loop.step(loop.model(torch.ones(2)).square().sum())
    assert isinstance(loop, innerloop.TrackedLoop)
    expected = "TrackedLoop(model=Linear, optimizer=sgd(lr=0.5), steps=3, learn='init')"
    assert repr(loop) == expected
    several = innerloop.track(
        {"a": model, "b": nn.Bilinear(1, 1, 1)}, innerloop.optim.adam(lr=0.1), first_order=True
    )
    assert repr(several) == (
        "TrackedLoop(model={'a': Linear, 'b': Bilinear}, optimizer=adam(lr=0.1), steps=0, "
        "learn='init', first_order=True)"
    )


def test_at_returns_the_carry_of_each_time():
    model = network()
    with innerloop.track(model, adam(model)) as loop:
        for t in range(2):
            loop.step(regression(loop.model, t))
    for t in range(3):
        carry = loop.at(t)
        assert isinstance(carry, innerloop.Carry)
        for name, p in loop.parameters(time=t).items():
            assert carry.params[name] is p
    assert loop.at(-1).params["head.bias"] is loop.model.head.bias
    assert torch.equal(loop.at(-1).params["head.bias"], loop.trajectory.at(2).params["head.bias"])


def test_a_carry_of_a_tracked_loop_knows_its_time_and_goes_on_from_there():
    """On w²/2 every step multiplies w by 1 - rate: four rates in one piece, or the first two
    again."""
    rates, rule = (0.5, 0.5, 0.2, 0.3), innerloop.optim.sgd()
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor(4.0))
    with innerloop.track(model, rule, hyper={"lr": 0.5}) as loop:
        for _ in range(2):
            loop.step(loop.model.w**2 / 2)
        assert [loop.at(t).time for t in (0, 1, 2, -1)] == [0, 1, 2, 2]
        carry = loop.at(2)
    assert carry.params["w"].item() == 1.0
    problem = innerloop.Problem(
        lambda params, hyper, batch: params["w"] ** 2 / 2,
        rule,
        optimizer_hyper=lambda hyper, t: {"lr": rates[t]},
    )
    onward = innerloop.unroll(problem, carry, None, steps=2)
    assert [onward.at(t).time for t in range(3)] == [2, 3, 4]
    assert onward.params["w"].item() == pytest.approx(0.8 * 0.7, rel=1e-14)
    again = innerloop.unroll(problem, carry._replace(time=0), None, steps=2)
    assert [again.at(t).time for t in range(3)] == [0, 1, 2]
    assert again.params["w"].item() == pytest.approx(0.5 * 0.5, rel=1e-14)
    (slope,) = torch.autograd.grad(onward.params["w"], model.w)
    assert slope.item() == pytest.approx(0.5 * 0.5 * 0.8 * 0.7, rel=1e-14)


@pytest.mark.parametrize(
    "transform",
    [innerloop.optim.clip_by_global_norm(0.1), innerloop.optim.scale(0.5)],
    ids=repr,
)
def test_a_transform_without_a_state_as_grad_callback(transform: Any):
    """Equal to the same transform in a chain, to the function that it is, and for a closure."""

    def as_function(grads: Any) -> Any:
        return transform.apply(grads, (), grads, transform.resolve(None))[0]

    def run(optimizer: Any, callback: Any, closure: bool = False) -> dict[str, Any]:
        model = network()
        with innerloop.track(model, optimizer) as loop:
            for t in range(3):
                given: Any = (
                    (lambda t=t: regression(loop.model, t))
                    if closure
                    else regression(loop.model, t)
                )
                loop.step(given, grad_callback=callback)
            regression(loop.model, 3).backward()
        return gradients(model)

    ours = innerloop.optim.sgd(lr=0.1)
    truth = run(innerloop.optim.chain(transform, ours), None)
    for found in (
        run(ours, transform),
        run(ours, as_function),
        run(ours, transform, closure=True),
    ):
        assert list(found) == list(truth)
        for name, g in found.items():
            torch.testing.assert_close(g, truth[name], rtol=1e-12, atol=1e-12)


def test_labels_that_numpy_refills_must_be_copied():
    """As docs/concepts.md says: nothing tells that NumPy wrote what the graph has saved. A copy of
    the labels gives the gradient of the run: that of labels which stay."""

    def gradient(refill: bool, copy: bool) -> Tensor:
        model = nn.Linear(2, 3, dtype=torch.float64)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.arange(p.numel()).reshape(p.shape).cos() + i)
        table = smooth_noise(3, 3).requires_grad_()
        array = np.array([0, 1])
        labels = torch.from_numpy(array)
        x = torch.tensor([[0.3, -1.0], [0.7, 0.2]], dtype=torch.float64)
        with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.5)) as loop:
            for _ in range(2):
                target = labels.clone() if copy else labels
                rows = F.embedding(target, table)
                loop.step((rows * loop.model(x).sigmoid()).square().sum())
            if refill:
                array[:] = [2, 2]
            loop.model(x).square().sum().backward()
        assert table.grad is not None
        return table.grad

    expected = gradient(refill=False, copy=False)
    assert torch.equal(gradient(refill=True, copy=True), expected)
    assert not torch.allclose(gradient(refill=True, copy=False), expected, rtol=1e-3)
