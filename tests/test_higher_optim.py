"""Differentiable optimizers: the trajectory of torch.optim, and derivatives equal to finite
differences of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
import innerloop.higher as higher
from innerloop._utils.differences import four_point
from innerloop.higher.optim import DifferentiableOptimizer, DifferentiableRule, DifferentiableSGD
from tests.higher_models import (
    MODELS,
    SEEDS,
    assert_close,
    batches,
    loss_of,
    peer,
    plain,
    seeded,
    zeros_for_none,
)

pytestmark = pytest.mark.usefixtures("float64")

RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.5, "dampening": 0.1}),
    "sgd-nesterov": (torch.optim.SGD, {"momentum": 0.1, "nesterov": True}),
    "sgd-weight-decay": (torch.optim.SGD, {"weight_decay": 0.1}),
    "sgd-maximize": (torch.optim.SGD, {"maximize": True}),
    "adam": (torch.optim.Adam, {}),
    "adam-weight-decay": (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    "adam-decoupled": (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adamw": (torch.optim.AdamW, {}),
    "adamw-weight-decay": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adadelta-weight-decay": (torch.optim.Adadelta, {"weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adagrad-decays": (torch.optim.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.1}),
    "adamax": (torch.optim.Adamax, {}),
    "adamax-weight-decay": (torch.optim.Adamax, {"weight_decay": 0.1}),
    "asgd": (torch.optim.ASGD, {}),
    "asgd-weight-decay": (torch.optim.ASGD, {"weight_decay": 0.1, "lambd": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "rmsprop-centered": (
        torch.optim.RMSprop,
        {"centered": True, "momentum": 0.1, "weight_decay": 0.1, "eps": 1e-3},
    ),
    "rprop": (torch.optim.Rprop, {}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "adafactor": (torch.optim.Adafactor, {}),
}
NEVER_IN_HIGHER = ("nadam", "radam", "adafactor")
STEPS = 3
LR = 0.05


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: list[Tensor], scheduler: Any = None
) -> nn.Module:
    """Plain PyTorch."""
    for x in inputs:
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    half = len(params) // 2
    return [{"params": params[:half], "lr": 2 * LR}, {"params": params[half:]}]


@pytest.mark.covering
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in SEEDS[1:])])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "batch-norm"])
@pytest.mark.parametrize("rule", RULES)
def test_the_trajectory_is_that_of_torch(rule: str, name: str, seed: int) -> None:
    """Over one group and over two; the torch optimizer goes on in between, and its state is taken
    over."""
    cls, settings = RULES[rule]
    for groups in (lambda m: m.parameters(), grouped):
        model = seeded(seed, MODELS[name])
        optimizer = cls(groups(model), lr=LR, **settings)
        for round_ in range(2):
            inputs = batches(10 * seed + round_, STEPS, 10, 4)
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (
                fmodel,
                diffopt,
            ):
                for x in inputs:
                    diffopt.step(loss_of(fmodel(x)))
            train(model, optimizer, inputs)
            tolerance = (
                1e-7 if rule == "adafactor" else 1e-12
            )  # torch keeps the bias in single precision there
            assert_close(fmodel.parameters(), model.parameters(), tolerance)


@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_is_that_of_finite_differences(rule: str) -> None:
    cls, settings = RULES[rule]
    inputs = batches(1, STEPS + 1, 10, 4)
    model = seeded(1, plain)
    ways = [
        torch.sin(torch.arange(1.0, p.numel() + 1) + i).reshape(p.shape)
        for i, p in enumerate(model.parameters())
    ]

    def after(h: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, way in zip(moved.parameters(), ways, strict=True):
                p.add_(h * way)
        train(moved, cls(moved.parameters(), lr=LR, **settings), inputs[:-1])
        return float(loss_of(moved(inputs[-1])).detach())

    with higher.innerloop_ctx(
        model, cls(model.parameters(), lr=LR, **settings), copy_initial_weights=False
    ) as (
        fmodel,
        diffopt,
    ):
        for x in inputs[:-1]:
            diffopt.step(loss_of(fmodel(x)))
        loss_of(fmodel(inputs[-1])).backward()
    slope = sum(
        float((p.grad * way).sum()) for p, way in zip(model.parameters(), ways, strict=True)
    )
    assert slope == pytest.approx(four_point(after, 1e-4), rel=1e-6, abs=1e-8)


def learnable(value: Any) -> Any:
    return higher.utils._recursive_map(value, lambda v: torch.tensor(v, requires_grad=True))


@pytest.mark.parametrize("stepwise", [True, False])
def test_settings_of_two_groups_are_learned(stepwise: bool) -> None:
    """Override at creation or at the step: lr for both groups, betas for each; against finite
    differences."""
    model, inputs = seeded(0, plain), batches(0, STEPS + 1, 10, 4)
    values = [0.3, 0.9, 0.999, 0.8, 0.888]

    def after(values: list[float]) -> float:
        trained = copy.deepcopy(model)
        optimizer = torch.optim.Adam(grouped(trained), lr=LR)
        for group, betas in zip(optimizer.param_groups, (values[1:3], values[3:5]), strict=True):
            group.update(lr=values[0], betas=tuple(betas))
        train(trained, optimizer, inputs[:-1])
        return float(loss_of(trained(inputs[-1])).detach())

    override = {
        "lr": [learnable(values[0])],
        "betas": [learnable(tuple(values[1:3])), learnable(tuple(values[3:5]))],
    }
    meta = higher.utils.flatten(override)
    optimizer = torch.optim.Adam(grouped(model), lr=LR)
    fmodel = higher.monkeypatch(model)
    diffopt = higher.get_diff_optim(
        optimizer, model.parameters(), fmodel, override=None if stepwise else override
    )
    for x in inputs[:-1]:
        diffopt.step(loss_of(fmodel(x)), override=override if stepwise else None)
    found = torch.autograd.grad(loss_of(fmodel(inputs[-1])), meta)
    for i, g in enumerate(found):
        slope = four_point(lambda h: after([v + h * (j == i) for j, v in enumerate(values)]), 1e-5)  # noqa: B023
        assert g.item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_one_learned_rate_for_each_weight() -> None:
    """A group for each parameter, a tensor of its shape: on p²/2, dp₂/dlr = -2(1 - lr)p."""
    model = nn.Linear(3, 1)
    rates = [torch.full_like(p, 0.25).requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    with higher.innerloop_ctx(model, optimizer, override={"lr": rates}) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(sum(p.square().sum() for p in fmodel.parameters()) / 2)
    total = sum(p.sum() for p in fmodel.parameters())
    for g, p in zip(torch.autograd.grad(total, rates), model.parameters(), strict=True):
        torch.testing.assert_close(g, -2 * 0.75 * p.detach())
    with pytest.raises(innerloop.InvalidInputError, match="a group of its own"):
        diffopt.step(sum(p.sum() for p in fmodel.parameters()), override={"lr": [torch.ones(2)]})


@pytest.mark.usefixtures("types_unchecked")
def test_wrong_overrides_are_named() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrongs: list[tuple[Any, str]] = [
        ({"lr": [1.0, 2.0]}, "one entry"),
        ({"learning_rate": [0.1]}, "no such setting"),
        ({"lr": "a"}, "one entry"),
        ({"lr": torch.tensor(0.1)}, "one entry"),
        ({"lr": [torch.tensor(1j)]}, "complex"),
        ([0.1], "write a dict"),
    ]
    for override, message in wrongs:
        with pytest.raises(ValueError, match=message):
            higher.get_diff_optim(optimizer, model.parameters(), override=override)


def test_a_wrong_override_changes_nothing() -> None:
    model = nn.Linear(2, 1)
    fmodel = higher.monkeypatch(model)
    diffopt = higher.get_diff_optim(
        torch.optim.SGD(model.parameters(), lr=0.1), model.parameters(), fmodel
    )
    with pytest.raises(innerloop.InvalidInputError, match="no such setting"):
        diffopt.step(loss_of(fmodel(torch.ones(1, 2))), override={"lr": [0.5], "rate": [1.0]})
    assert diffopt.param_groups[0]["lr"] == 0.1
    wrongs: list[Any] = [{"lr": [0.7], "rate": [1.0]}, {"lr": [0.7], "betas": [(0.1,)]}]
    for wrong in wrongs:
        rate = torch.tensor(0.1)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        with pytest.raises(innerloop.InvalidInputError):
            higher.optim.apply_trainable_opt_params(optimizer, wrong)
        assert rate.item() == 0.1


def test_an_override_may_be_any_list_of_values() -> None:
    """As in higher: a ``ParameterList``, the elements of a tensor."""
    inputs = batches(0, 2, 10, 4)
    makes: list[Callable[[], Any]] = [
        lambda: nn.ParameterList([nn.Parameter(torch.tensor(r)) for r in (0.1, 0.2)]),
        lambda: torch.tensor([0.1, 0.2], requires_grad=True),
        lambda: torch.tensor([0.1], requires_grad=True),
        lambda: (0.1, 0.2),
    ]
    for make in makes:
        found = []
        for library in (peer(), higher):
            model, rates = seeded(0, plain), make()
            optimizer = torch.optim.SGD(grouped(model), lr=LR)
            with library.innerloop_ctx(model, optimizer, override={"lr": rates}) as (
                fmodel,
                diffopt,
            ):
                for x in inputs:
                    diffopt.step(loss_of(fmodel(x)))
                outer = loss_of(fmodel(inputs[0]))
            leaves = [
                t
                for t in (rates, *rates)
                if isinstance(t, Tensor) and t.is_leaf and t.requires_grad
            ]
            found.append([outer, *(torch.autograd.grad(outer, leaves) if leaves else ())])
        assert_close(found[1], found[0], 1e-13)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch.optim.Adagrad itself
def test_sparse_gradients(cls: Any) -> None:
    """Against central differences of a plain run, in which PyTorch makes the same sparse
    gradients."""
    rows = torch.tensor([[0, 1], [1, 3]])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 2, sparse=True)

        def forward(self) -> Tensor:
            return self.table(rows)

    model = seeded(0, Model)

    def after(h: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.table.weight.add_(h)
        optimizer = cls(moved.parameters(), lr=LR)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(moved()).backward()
            optimizer.step()
        return float(loss_of(moved()).detach())

    with higher.innerloop_ctx(
        model, cls(model.parameters(), lr=LR), copy_initial_weights=False
    ) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(loss_of(fmodel()))
        loss_of(fmodel()).backward()
    assert model.table.weight.grad.to_dense().sum().item() == pytest.approx(
        four_point(after, 1e-4), rel=1e-6
    )


def test_a_buffer_written_between_the_evaluations_of_a_closure() -> None:
    """LBFGS evaluates twice in a step, and the graph of each holds the counter that it wrote."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.calls: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return (self.layer(x) / self.calls).tanh()

    model, x = seeded(0, Counting), torch.randn(4, 3)
    make = functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=2)

    def outer(params: Iterable[Tensor]) -> Tensor:
        return torch.stack([p.sin().sum() for p in params]).sum()

    def after(h: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.layer.weight.add_(h)
        optimizer = make(moved.parameters())

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = moved(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        return float(outer(moved.parameters()).detach())

    with higher.innerloop_ctx(model, make(model.parameters()), copy_initial_weights=False) as (
        fmodel,
        diffopt,
    ):
        diffopt.step(lambda: fmodel(x).square().mean())
        outer(fmodel.parameters()).backward()
    assert model.layer.weight.grad.sum().item() == pytest.approx(four_point(after, 1e-4), rel=1e-6)


def test_a_hook_registered_in_the_closure_of_a_line_search() -> None:
    """It acts in each inner backward pass, and not in the outer one, which passes the values that
    the search compares."""
    model, x = seeded(0, lambda: nn.Linear(3, 2)), torch.randn(4, 3)
    make = functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=2, line_search_fn="strong_wolfe")

    def loss_of_output(output: Tensor) -> Tensor:
        if output.requires_grad:
            output.register_hook(lambda grad: 0.5 * grad + grad.square())
        return (output - 1).square().mean() + output.sin().mean()

    def after(h: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.weight.add_(h)
        optimizer = make(moved.parameters())

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of_output(moved(x))
            loss.backward()
            return loss

        optimizer.step(closure)
        return float(moved.weight.detach().sin().sum())

    with higher.innerloop_ctx(model, make(model.parameters()), copy_initial_weights=False) as (
        fmodel,
        diffopt,
    ):
        diffopt.step(lambda: loss_of_output(fmodel(x)))
        fmodel.weight.sin().sum().backward()
    assert model.weight.grad.sum().item() == pytest.approx(four_point(after, 1e-5), rel=1e-6)


def test_settings_may_be_changed_between_steps() -> None:
    """By hand in the groups of the diffopt, by a scheduler in those of the torch optimizer; an
    override goes before both."""
    model, inputs = seeded(0, plain), batches(0, 4, 10, 4)
    trained = copy.deepcopy(model)
    own = torch.optim.SGD(trained.parameters(), lr=0.4)
    train(trained, own, inputs, torch.optim.lr_scheduler.StepLR(own, 1, 0.5))
    for way in ("groups", "scheduler", "override"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
        scheduler = torch.optim.lr_scheduler.StepLR(
            optimizer, 1, 0.5 if way == "scheduler" else 0.1
        )
        with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
            for t, x in enumerate(inputs):
                rate = 0.4 * 0.5**t
                if way == "groups":
                    diffopt.param_groups[0]["lr"] = torch.tensor(rate)
                diffopt.step(
                    loss_of(fmodel(x)), override={"lr": [rate]} if way == "override" else None
                )
                if way != "groups":
                    scheduler.step()
        assert_close(fmodel.parameters(), trained.parameters(), 1e-14)


# -- grad_callback ---------------------------------------------------------------------------------


def test_a_callback_at_creation_or_at_the_step() -> None:
    model, inputs = seeded(0, plain), batches(0, 2, 10, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def run(at_creation: Any = None, at_step: Any = None) -> list[Tensor]:
        fmodel = higher.monkeypatch(model)
        diffopt = higher.get_diff_optim(
            optimizer, model.parameters(), fmodel, grad_callback=at_creation
        )
        for x in inputs:
            diffopt.step(loss_of(fmodel(x)), grad_callback=at_step)
        return list(fmodel.parameters())

    def scaled(factor: float) -> Callable[[list[Tensor]], list[Tensor]]:
        return lambda grads: [factor * g for g in grads]

    slower = train(copy.deepcopy(model), optimizer, [])
    train(slower, torch.optim.SGD(slower.parameters(), lr=0.2 * LR), inputs)
    assert_close(run(scaled(0.2)), slower.parameters(), 1e-14)
    assert_close(run(at_step=scaled(0.2)), slower.parameters(), 1e-14)
    assert_close(
        run(scaled(5.0), scaled(0.2)), slower.parameters(), 1e-14
    )  # the step's own goes first


def test_a_callback_gets_one_entry_for_each_parameter_of_the_model() -> None:
    """Also for those that the optimizer does not step; None for frozen ones and for those that the
    loss does not use."""
    model, seen = MODELS["half-used"](), []

    def look(grads: list[Any]) -> list[Any]:
        seen.append([None if g is None else g.shape for g in grads])
        return grads

    model.extra = nn.Linear(4, 3)
    model.extra.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([model.used], lr=LR)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        loss = loss_of(fmodel(torch.ones(2, 4))) + fmodel.extra.weight.square().sum()
        diffopt.step(loss, grad_callback=look)
    assert seen == [[(4, 3), None, (3, 4), None]]
    wrongs: list[tuple[Any, str]] = [
        (lambda grads: grads[:1], "for each of the 4 parameters"),
        (lambda grads: None, "for each of the 4 parameters"),
        (lambda grads: "abcd", "for each of the 4 parameters"),
        (lambda grads: [0.0] * 4, "0.0 for the parameter 'used'"),
        (
            lambda grads: [torch.zeros(4, 3), None, torch.zeros(7), None],
            r"shape \(7,\) for the parameter 'extra.weight'",
        ),
    ]
    for wrong, message in wrongs:
        with pytest.raises(innerloop.InvalidInputError, match=message):
            diffopt.step(loss_of(fmodel(torch.ones(2, 4))), grad_callback=wrong)


def test_a_callback_is_differentiated_through() -> None:
    """One step on w²/2 with the gradient scaled by s: dw₁/ds = -lr w."""
    model, scale = nn.Linear(1, 1, bias=False), torch.tensor(2.0, requires_grad=True)
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.5)) as (
        fmodel,
        diffopt,
    ):
        diffopt.step(
            fmodel(torch.ones(1, 1)).square().sum() / 2,
            grad_callback=lambda grads: [scale * g for g in grads],
        )
    (found,) = torch.autograd.grad(fmodel.weight.sum(), scale)
    assert found.item() == pytest.approx(-0.5 * model.weight.item())


def test_hooks_on_parameters_run_as_in_training() -> None:
    model = nn.Linear(2, 1)
    model.weight.register_hook(lambda g: 3 * g)
    trained = copy.deepcopy(model)
    trained.weight.register_hook(lambda g: 3 * g)  # a deepcopy has no hooks
    inputs = batches(0, 2, 5, 2)
    train(trained, torch.optim.SGD(trained.parameters(), lr=LR), inputs)
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=LR)) as (
        fmodel,
        diffopt,
    ):
        for x in inputs:
            diffopt.step(loss_of(fmodel(x)))
    assert_close(fmodel.parameters(), trained.parameters(), 1e-14)


# -- frozen, partial, without a module -------------------------------------------------------------


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("filtered", [True, False])
def test_frozen_parameters_stay(tracked: bool, filtered: bool) -> None:
    model = nn.Sequential(nn.Linear(30, 50), nn.Linear(50, 1))
    model[0].requires_grad_(False)
    trained = copy.deepcopy(model)
    inputs = batches(0, 3, 16, 30)
    train(trained, torch.optim.SGD(trained.parameters(), lr=LR), inputs)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad or not filtered], lr=LR
    )
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=tracked) as (fmodel, diffopt):
        for x in inputs:
            diffopt.step(loss_of(fmodel(x)))
    assert_close(fmodel.parameters(), trained.parameters(), 1e-14)
    assert [p.requires_grad for p in fmodel.parameters()] == [False, False, True, True]


def test_without_a_module_the_parameters_are_given() -> None:
    y, a = torch.zeros(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    diffopt = higher.get_diff_optim(torch.optim.SGD([y], lr=0.5), [y])
    with pytest.raises(ValueError, match="params=params"):
        diffopt.step((y**2).sum())
    z = y
    for _ in range(5):
        (z,) = diffopt.step((z**2 / 2 - a * z).sum(), params=[z])
    assert torch.autograd.grad(z.sum(), a)[0].item() == pytest.approx(3 * (1 - 0.5**5), abs=1e-14)
    with pytest.raises(innerloop.InvalidInputError, match="2 parameters"):
        diffopt.step(z.sum(), params=[z, z])


@pytest.mark.parametrize("grouped", [False, True])
def test_an_optimizer_without_a_torch_optimizer(grouped: bool) -> None:
    tensors = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    params = [{"params": tensors[:1], "lr": 0.25}, {"params": tensors[1]}] if grouped else tensors
    diffopt = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.5}, params=params)
    new = diffopt.step((tensors[0].square().sum() + tensors[1].square().sum()) / 2, params=tensors)
    assert torch.equal(new[0], torch.full((2,), 0.75 if grouped else 0.5))
    assert torch.equal(new[1], torch.full((3,), 0.5))
    assert diffopt.param_groups[0]["lr"] == (0.25 if grouped else 0.5)


def test_an_optimizer_for_a_patched_module_alone() -> None:
    model = nn.Linear(2, 1)
    fmodel = higher.monkeypatch(model)
    rate = torch.tensor(0.5, requires_grad=True)
    diffopt = higher.create_diff_optim(
        torch.optim.Adam,
        {"eps": 1e-3},
        fmodel=fmodel,
        override={"lr": [rate]},
        track_higher_grads=True,
    )
    diffopt.step(loss_of(fmodel(torch.ones(1, 2))))
    trained = copy.deepcopy(model)
    train(trained, torch.optim.Adam(trained.parameters(), lr=0.5, eps=1e-3), [torch.ones(1, 2)])
    assert_close(fmodel.parameters(), trained.parameters(), 1e-12)
    g = torch.autograd.grad(loss_of(model(torch.ones(1, 2))), model.bias)[0].item()
    slope = -g / (abs(g) + 1e-3)  # the first step of Adam is lr g / (|g| + eps)
    assert torch.autograd.grad(fmodel.bias.sum(), rate)[0].item() == pytest.approx(slope, abs=1e-12)
    with pytest.raises(ValueError, match="params= or fmodel="):
        higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1})


@pytest.mark.usefixtures("types_unchecked")
def test_what_is_no_optimizer_and_what_is_no_parameter_is_named() -> None:
    bridge: Any = higher
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    fmodel = bridge.monkeypatch(model)
    diffopt = bridge.get_diff_optim(optimizer, model.parameters(), fmodel)
    create, apply = bridge.create_diff_optim, bridge.optim.apply_trainable_opt_params
    others: list[Any] = [None, torch.optim.SGD, schedule, diffopt, innerloop.optim.sgd(lr=0.1)]
    bad: list[tuple[Callable[[], Any], str]] = [
        *(
            (bridge.innerloop_ctx(model, other).__enter__, "expected a torch optimizer")
            for other in others
        ),
        (lambda: bridge.get_diff_optim(optimizer, model.named_parameters()), "holds a tuple"),
        (
            lambda: bridge.get_diff_optim(optimizer, model.parameters(), grad_callback=3),
            "pass a function",
        ),
        (lambda: bridge.register_optim(5, 6), "subclass of Optimizer"),
        (lambda: bridge.register_optim(torch.optim.SGD, 6), "subclass of DifferentiableOptimizer"),
        (lambda: create("SGD", fmodel=fmodel), "pass a class"),
        (lambda: create(optimizer, fmodel=fmodel), "pass a class"),
        (lambda: create(nn.Linear, fmodel=fmodel), "pass a class"),
        (lambda: create(torch.optim.SGD, params=[1, 2]), "params is a int"),
        (lambda: create(torch.optim.SGD, params=[]), "no tensors"),
        (lambda: create(torch.optim.SGD, {"rate": 0.1}, fmodel=fmodel), "cannot be made with"),
        (lambda: bridge.optim.get_trainable_opt_params(None), "expected a torch optimizer"),
        (lambda: apply(optimizer, None), "write a dict"),
        (lambda: apply(optimizer, {"lr": 5}), "has a int"),
        (lambda: apply(optimizer, {"lr": ["a"]}), "is a number"),
    ]
    for params, message in (
        (5, "params is a int"),
        (fmodel.named_parameters(), "holds a tuple"),
        (dict(fmodel.named_parameters()), "holds a str"),
        ([None, None], "holds a NoneType"),
    ):
        bad.append((functools.partial(diffopt.step, fmodel(torch.ones(2)).sum(), params), message))
    bad.append(
        (lambda: diffopt.step(fmodel(torch.ones(2)).sum(), grad_callback=5), "pass a function")
    )
    bad.append((lambda: diffopt.step((fmodel(torch.ones(2)).sum(), 1)), "takes the loss alone"))
    for use, message in bad:
        with pytest.raises(innerloop.InvalidInputError, match=message):
            use()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_parameters_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="reference_params"):
        higher.innerloop_ctx(
            nn.Linear(2, 1), torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
        ).__enter__()


def test_losses_that_are_none() -> None:
    model, x = nn.Linear(2, 1), torch.ones(3, 2)
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (
        fmodel,
        diffopt,
    ):
        for loss, message in (
            (fmodel(x).square(), "must be a scalar"),
            (fmodel(x).sum().detach(), "does not depend on any parameter"),
            (model(x).sum(), "depends on none"),
        ):
            with pytest.raises(innerloop.InvalidInputError, match=message):
                diffopt.step(loss)
        diffopt.step(
            fmodel(x[:1]).square().reshape(1)
        )  # as in higher, a single number of any shape will do


def test_step_hooks_are_refused() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(innerloop.InvalidInputError, match="step hooks"):
        higher.get_diff_optim(optimizer, model.parameters())


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_state_and_settings_go_back_into_torch(rule: str) -> None:
    """``state_dict`` after some steps lets the torch optimizer go on as if it had taken them."""
    cls, settings = RULES[rule]
    model, inputs = seeded(0, plain), batches(0, 6, 10, 4)
    trained = copy.deepcopy(model)
    train(trained, cls(trained.parameters(), lr=LR, **settings), inputs)
    optimizer = cls(model.parameters(), lr=LR, **settings)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        for x in inputs[:3]:
            diffopt.step(loss_of(fmodel(x)))
    optimizer.load_state_dict(diffopt.state_dict())
    model.load_state_dict(fmodel.state_dict())
    train(model, optimizer, inputs[3:])
    assert_close(model.parameters(), trained.parameters(), 1e-7 if rule == "adafactor" else 1e-12)


def test_state_has_the_names_of_torch_and_its_graph() -> None:
    """b₁ = w on w²/2."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
        assert not diffopt.state[0][0]
        diffopt.step(fmodel(torch.ones(1, 1)).square().sum() / 2)
        buffer = diffopt.state[0][0]["momentum_buffer"]
        assert torch.equal(buffer, model.weight)
        assert torch.autograd.grad(buffer.sum(), model.weight, retain_graph=True)[0].item() == 1.0
    assert not optimizer.state


EDITS: dict[str, Callable[[Any], Any]] = {
    "assigned": lambda d: setattr(d, "state", higher.utils._recursive_detach(d.state)),
    "copied": lambda d: setattr(
        d, "state", [{i: dict(kept) for i, kept in held.items()} for held in d.state]
    ),
    "replaced": lambda d: [
        kept.update({k: v.detach() for k, v in kept.items()})
        for h in d.state
        for kept in h.values()
    ],
    "cleared": lambda d: [held.clear() for held in d.state],
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_state_counts(edit: str) -> None:
    """As in higher, after each of three steps: momentum without its graph, or none."""
    inputs = batches(1, 4, 10, 4)
    found = []
    for library in (peer(), higher):
        model = seeded(0, plain)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        with library.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (
            fmodel,
            diffopt,
        ):
            for x in inputs[:-1]:
                diffopt.step(loss_of(fmodel(x)))
                EDITS[edit](diffopt)
            loss_of(fmodel(inputs[-1])).backward()
        found.append(
            [*(p.grad for p in model.parameters()), *(p.detach() for p in fmodel.parameters())]
        )
    assert_close(found[1], found[0], 1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_an_emptied_state_is_that_of_a_new_optimizer(rule: str) -> None:
    """The same after each step as with a new torch optimizer for each; an untouched copy changes
    neither values nor gradients."""
    cls, settings = RULES[rule]
    inputs = batches(1, 3, 10, 4)

    def run(between: Callable[[Any], Any]) -> tuple[list[Tensor], list[Tensor]]:
        model = seeded(0, plain)
        with higher.innerloop_ctx(
            model, cls(model.parameters(), lr=LR, **settings), copy_initial_weights=False
        ) as (
            fmodel,
            diffopt,
        ):
            for x in inputs:
                diffopt.step(loss_of(fmodel(x)))
                between(diffopt)
            loss_of(fmodel(inputs[0])).backward()
        return [p.detach() for p in fmodel.parameters()], [p.grad for p in model.parameters()]

    def copied(diffopt: Any) -> None:
        diffopt.state = higher.utils._recursive_map(
            diffopt.state, lambda v: 1 * v if isinstance(v, Tensor) else v
        )

    trained = seeded(0, plain)
    for x in inputs:
        train(trained, cls(trained.parameters(), lr=LR, **settings), [x])
    assert_close(
        run(EDITS["cleared"])[0], trained.parameters(), 1e-7 if rule == "adafactor" else 1e-12
    )
    for a, b in zip(run(copied), run(lambda diffopt: None), strict=True):
        assert_close(a, b, 0.0)


@pytest.mark.parametrize("way", [lambda t: t.zero_(), lambda t: t.data.zero_()])
def test_the_step_count_may_be_set_back_in_place(way: Any) -> None:
    """Adam's bias correction starts again: against torch.optim.Adam whose state is edited alike."""
    model, inputs = seeded(0, plain), batches(0, 3, 10, 4)
    trained = copy.deepcopy(model)
    optimizer = torch.optim.Adam(trained.parameters(), lr=LR)
    with higher.innerloop_ctx(model, torch.optim.Adam(model.parameters(), lr=LR)) as (
        fmodel,
        diffopt,
    ):
        for x in inputs:
            train(trained, optimizer, [x])
            diffopt.step(loss_of(fmodel(x)))
            for kept in (*optimizer.state.values(), *diffopt.state[0].values()):
                way(kept["step"])
    assert_close(fmodel.parameters(), trained.parameters(), 1e-14)


@pytest.mark.usefixtures("types_unchecked")
def test_a_state_of_another_form_is_named() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        diffopt.step(loss_of(fmodel(torch.ones(1, 2))))
        wrongs: list[Any] = [[], {}, 3, [3], [{0: 3}]]
        for wrong in wrongs:
            with pytest.raises(innerloop.InvalidInputError, match="state must"):
                diffopt.state = wrong
        for value in (torch.zeros(7), 3.0):
            diffopt.state[0][0]["momentum_buffer"] = value
            with pytest.raises(
                innerloop.InvalidInputError, match=r"'momentum_buffer' in diffopt\.state"
            ):
                diffopt.step(loss_of(fmodel(torch.ones(1, 2))))


def test_the_state_of_an_adapted_class_may_be_edited() -> None:
    """Rates 1/2 and 1/4 on w²/2; emptied, the second is 1/2 again."""
    model = nn.Linear(1, 1, bias=False)
    with higher.innerloop_ctx(
        model, Decayed(model.parameters(), lr=0.5), copy_initial_weights=False
    ) as (f, diffopt):
        for _ in range(2):
            diffopt.step(f(torch.ones(1, 1)).square().sum() / 2)
            diffopt.state[0].clear()
    assert torch.autograd.grad(f.weight.sum(), model.weight)[0].item() == pytest.approx(
        0.75**2, abs=1e-14
    )


def test_a_cold_adagrad_keeps_what_torch_keeps() -> None:
    """A rule of the user's own reads it before the first step: the sum starts at 4, so that the
    first step on w²/2 is w/√(4 + w²)."""

    class Mine(higher.optim.DifferentiableAdagrad):
        def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
            for group, grads, held in zip(
                self.param_groups, grouped_grads, self.state, strict=True
            ):
                for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                    held[i]["step"] += 1
                    held[i]["sum"] = held[i]["sum"] + g * g
                    group["params"][i] = p - group["lr"] * g / held[i]["sum"].sqrt()

    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1.0, initial_accumulator_value=4.0)
    fmodel = higher.monkeypatch(model)
    diffopt = Mine(optimizer, model.parameters(), fmodel)
    diffopt.step(fmodel(torch.ones(1, 1)).square().sum() / 2)
    w = model.weight.item()
    assert fmodel.weight.item() == pytest.approx(w - w / (4 + w * w) ** 0.5, abs=1e-15)
    assert diffopt.state[0][0]["step"] == 1
    assert optimizer.state[model.weight]["step"] == 0
    assert optimizer.state[model.weight]["sum"].item() == 4.0


def test_param_groups_hold_the_newest_parameters() -> None:
    model = seeded(0, plain)
    with higher.innerloop_ctx(model, torch.optim.SGD(grouped(model), lr=LR)) as (fmodel, diffopt):
        diffopt.step(loss_of(fmodel(torch.ones(2, 4))))
    held = [p for group in diffopt.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(held, fmodel.parameters(), strict=True))
    assert [group["lr"] for group in diffopt.param_groups] == [2 * LR, LR]


@pytest.mark.parametrize("rule", ["sgd-momentum", "adam", "asgd", "nadam"])
def test_device_and_dtype_are_kept(rule: str) -> None:
    cls, settings = RULES[rule]
    model = nn.Linear(2, 1, dtype=torch.float32)
    optimizer = cls(model.parameters(), lr=LR, **settings)
    train(model, optimizer, [torch.ones(1, 2, dtype=torch.float32)])
    with higher.innerloop_ctx(model, optimizer, device=torch.device("cpu")) as (fmodel, diffopt):
        diffopt.step(loss_of(fmodel(torch.ones(1, 2, dtype=torch.float32))))
    assert {p.dtype for p in fmodel.parameters()} == {torch.float32}


# -- other classes ---------------------------------------------------------------------------------


class Decayed(torch.optim.Optimizer):
    """A third party's rule: gradient descent with a rate that shrinks, all in place."""

    def __init__(self, params: Any, lr: float = 0.1, shrink: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "shrink": shrink})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["rate"] = state.get("rate", 1.0) * group["shrink"]
                    p.add_(p.grad, alpha=-group["lr"] * state["rate"])


class DifferentiableDecayed(DifferentiableOptimizer):
    """The same, as somebody would write it for higher."""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for group, grads, held in zip(self.param_groups, grouped_grads, self.state, strict=True):
            for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                if g is not None:
                    held[i]["rate"] = held[i].get("rate", 1.0) * group["shrink"]
                    group["params"][i] = higher.optim._add(p, -group["lr"] * held[i]["rate"], g)


@pytest.fixture
def registry() -> Any:
    before = dict(higher.optim._opt_mapping)
    yield
    higher.optim._opt_mapping.clear()
    higher.optim._opt_mapping.update(before)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("warm", [True, False])
def test_a_class_that_nobody_knows(registered: bool, warm: bool) -> None:
    """Registered as in higher, or adapted and verified. Two steps of rate 1/2 and 1/4 (then 1/8,
    1/16 if warm) on w²/2."""
    if registered:
        higher.register_optim(Decayed, DifferentiableDecayed)
    model = nn.Linear(1, 1, bias=False)
    optimizer = Decayed(model.parameters(), lr=0.5)
    if warm:
        train(model, optimizer, batches(0, 2, 1, 1))
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(fmodel(torch.ones(1, 1)).square().sum() / 2)
    rates = (0.125, 0.0625) if warm else (0.5, 0.25)
    expected = (1 - 0.5 * rates[0]) * (1 - 0.5 * rates[1])
    assert torch.autograd.grad(fmodel.weight.sum(), model.weight)[0].item() == pytest.approx(
        expected, abs=1e-14
    )
    assert diffopt.state[0][0]["rate"] == rates[1]
    assert isinstance(
        diffopt, DifferentiableDecayed if registered else higher.optim.DifferentiableAdapted
    )


def test_settings_of_an_adapted_class_are_learned() -> None:
    """One step on w²/2: dw₁/dlr = -w/2."""
    model, rate = nn.Linear(1, 1, bias=False), torch.tensor(0.5, requires_grad=True)
    with higher.innerloop_ctx(model, Decayed(model.parameters()), override={"lr": [rate]}) as (
        fmodel,
        diffopt,
    ):
        diffopt.step(fmodel(torch.ones(1, 1)).square().sum() / 2)
    assert torch.autograd.grad(fmodel.weight.sum(), rate)[0].item() == pytest.approx(
        -model.weight.item() / 2, abs=1e-14
    )


class Signs(torch.optim.Optimizer):
    """Cannot be followed: it asks Python for a number."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(torch.as_tensor(p.grad.tolist()), alpha=group["lr"])


def test_a_class_that_cannot_be_adapted_is_refused() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(innerloop.InnerLoopError, match="Signs"):
        higher.get_diff_optim(Signs(model.parameters()), model.parameters())


def test_subclasses_count_as_their_parent() -> None:
    class Named(torch.optim.SGD):
        pass

    model = nn.Linear(2, 1)
    assert (
        type(higher.get_diff_optim(Named(model.parameters(), lr=0.1), model.parameters()))
        is DifferentiableSGD
    )
    assert (
        type(higher.create_diff_optim(Named, {"lr": 0.1}, params=[torch.ones(1)]))
        is DifferentiableSGD
    )


@pytest.mark.parametrize("rule", NEVER_IN_HIGHER)
def test_optimizers_that_higher_never_had(rule: str) -> None:
    cls, settings = RULES[rule]
    model = nn.Linear(2, 1)
    assert (
        type(higher.get_diff_optim(cls(model.parameters(), **settings), model.parameters()))
        is DifferentiableRule
    )


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_takes_a_function(search: str | None) -> None:
    """Trajectory and meta-gradient along one direction, against torch.optim.LBFGS."""
    inputs = batches(0, 3, 10, 4)
    settings: dict[str, Any] = {"lr": 0.2, "max_iter": 3, "line_search_fn": search}
    model = seeded(0, plain)

    def trained(h: float) -> Any:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p in moved.parameters():
                p.add_(h)
        optimizer = torch.optim.LBFGS(moved.parameters(), **settings)
        for x in inputs[:-1]:

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(moved(x))
                loss.backward()
                return loss

            optimizer.step(closure)
        return moved

    optimizer = torch.optim.LBFGS(model.parameters(), **settings)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
        for x in inputs[:-1]:
            diffopt.step(lambda: loss_of(fmodel(x)))  # noqa: B023
        loss_of(fmodel(inputs[-1])).backward()
    assert_close(fmodel.parameters(), trained(0.0).parameters(), 1e-10)
    slope = sum(float(p.grad.sum()) for p in model.parameters())
    assert slope == pytest.approx(
        four_point(lambda h: float(loss_of(trained(h)(inputs[-1])).detach()), 1e-4), rel=1e-5
    )
    with pytest.raises(innerloop.InvalidInputError, match="a function"):
        diffopt.step(loss_of(fmodel(inputs[0])))


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("tracking", [True, False])
def test_lbfgs_leaves_a_frozen_parameter_where_it_is(search: str | None, tracking: bool) -> None:
    """Truth: torch.optim.LBFGS."""
    settings: dict[str, Any] = {"lr": 0.3, "max_iter": 4, "line_search_fn": search}
    model, x = nn.Linear(2, 1).double(), torch.randn(5, 2, dtype=torch.float64)
    model.bias.requires_grad_(False)
    truth = copy.deepcopy(model)
    theirs = torch.optim.LBFGS(truth.parameters(), **settings)

    def closure() -> Tensor:
        theirs.zero_grad()
        loss = (truth(x) - 1).square().mean()
        loss.backward()
        return loss

    theirs.step(closure)
    optimizer = torch.optim.LBFGS(model.parameters(), **settings)
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=tracking) as (fmodel, diffopt):
        frozen = fmodel.bias
        diffopt.step(lambda: (fmodel(x) - 1).square().mean())
    assert_close(fmodel.parameters(), truth.parameters(), 1e-12)
    assert torch.equal(fmodel.bias, model.bias)
    assert not frozen.requires_grad


def test_a_function_will_do_for_other_rules() -> None:
    model, x = nn.Linear(2, 1), torch.ones(1, 2)
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.5)) as (
        fmodel,
        diffopt,
    ):
        diffopt.step(lambda: fmodel(x).sum())
    assert torch.equal(fmodel.weight, model.weight - 0.5)


@pytest.mark.usefixtures("registry")
def test_a_subclass_that_watches_and_changes_the_rule() -> None:
    seen: list[Any] = []

    class Watching(DifferentiableSGD):
        def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
            seen.append(
                ([g.item() for g in grouped_grads[0]], kwargs, self.state[0][0].get("calls", 0))
            )
            self.state[0][0]["calls"] = len(seen)
            super()._update([[2 * g for g in grads] for grads in grouped_grads], **kwargs)

    higher.register_optim(torch.optim.SGD, Watching)
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    with higher.innerloop_ctx(model, optimizer, override={"mine": [1.0]}) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(fmodel(torch.ones(1, 1)).square().sum() / 2, note="hello")
    w = model.weight.item()
    assert seen[0] == ([w], {"note": "hello"}, 0)
    assert seen[1] == ([w - 0.5 * w], {"note": "hello"}, 1)
    assert fmodel.weight.item() == pytest.approx(w - 0.5 * w - 0.25 * (0.5 * 2 * w + 2 * 0.5 * w))
    assert diffopt.param_groups[0]["mine"] == 1.0


# -- settings as tensors, and back -----------------------------------------------------------------


def test_settings_as_tensors_and_back() -> None:
    model = seeded(0, plain)
    optimizer = torch.optim.Adam(grouped(model), lr=LR)
    override = higher.optim.get_trainable_opt_params(optimizer)
    assert set(override) == {"lr", "betas", "eps", "weight_decay"}
    assert all(isinstance(t, Tensor) and t.requires_grad for t in higher.utils.flatten(override))
    other = torch.optim.Adam(grouped(copy.deepcopy(model)), lr=7.0, betas=(0.1, 0.2))
    other.param_groups[0]["lr"] = 9.0
    higher.optim.apply_trainable_opt_params(other, override)
    for mine, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        for name in mine.keys() - {"params"}:
            assert type(mine[name]) is type(theirs[name])
            assert mine[name] == pytest.approx(theirs[name])


def test_what_is_written_back() -> None:
    weight = torch.tensor(0.5)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=weight, momentum=0, nesterov=False)
    higher.optim.apply_trainable_opt_params(
        optimizer, {"lr": [torch.tensor(0.25)], "momentum": [torch.tensor(0.37)]}
    )
    assert optimizer.param_groups[0]["lr"] is weight
    assert weight.item() == 0.25
    assert optimizer.param_groups[0]["momentum"] == 0.37
    for override, message in (
        ({"lr": [1.0, 2.0]}, "2 entries"),
        ({"rate": [1.0]}, "no hyper-parameter 'rate'"),
        ({"momentum": [(1.0, 2.0)]}, "one number"),
    ):
        with pytest.raises(ValueError, match=message):
            higher.optim.apply_trainable_opt_params(optimizer, override)


def test_tensors_among_the_settings_are_copied() -> None:
    rate = torch.tensor(0.5)
    (found,) = higher.optim.get_trainable_opt_params(torch.optim.SGD([torch.zeros(1)], lr=rate))[
        "lr"
    ]
    assert found.requires_grad
    assert found.item() == 0.5
    assert found is not rate


def test_a_setting_that_is_a_tensor_with_a_graph_becomes_a_leaf() -> None:
    """Or an optimizer of what is learned could not take it."""
    rate = torch.tensor(0.5, requires_grad=True)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    optimizer.param_groups[0]["lr"] = rate
    (found,) = higher.optim.get_trainable_opt_params(optimizer)["lr"]
    assert found.is_leaf
    assert found is not rate


def test_without_tracking_an_unused_parameter_is_cut_off_too() -> None:
    model = nn.ModuleDict({"used": nn.Linear(1, 1), "unused": nn.Linear(1, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=False) as (fmodel, diffopt):
        before = list(fmodel.parameters())
        diffopt.step(fmodel["used"](torch.ones(1, 1)).sum())
        for old, new in zip(before, fmodel.parameters(), strict=True):
            assert torch.autograd.grad(new.sum(), [old], allow_unused=True) == (None,)  # type: ignore[comparison-overlap]


# -- helpers ---------------------------------------------------------------------------------------


def test_sums_with_a_factor() -> None:
    a, b, c = (torch.tensor(v) for v in (2.0, 3.0, 4.0))
    assert higher.optim._add(a, b).item() == 5.0
    assert higher.optim._add(a, 10, b).item() == 32.0
    assert higher.optim._addcdiv(a, b, c).item() == 2.75
    assert higher.optim._addcdiv(a, 10, b, c).item() == 9.5
    assert higher.optim._addcmul(a, b, c).item() == 14.0
    assert higher.optim._addcmul(a, 10, b, c).item() == 122.0


def test_masks_stop_gradients_of_every_order() -> None:
    mask = torch.tensor([False, True])
    assert torch.equal(
        higher.optim._get_mask_closure(mask)(torch.ones(2)), torch.tensor([1.0, 0.0])
    )
    x = torch.tensor([2.0, 0.0], requires_grad=True)
    y = x**2
    higher.optim._maybe_mask(y, mask)
    (first,) = torch.autograd.grad(y.sqrt().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(first, torch.tensor([1.0, 0.0]))
    assert second.isfinite().all()
    higher.optim._maybe_mask(torch.ones(2), mask)  # nothing to mask


def test_maps_keep_the_kinds_of_containers() -> None:
    tree = {"a": [1, (2, 3)], "b": {4}}
    assert higher.utils._recursive_map(tree, lambda v: 10 * v) == {"a": [10, (20, 30)], "b": {40}}
    assert higher.utils.flatten(tree) == [1, 2, 3, 4]
    assert higher.utils.flatten(5) == [5]
    size = torch.Size([1, 2])
    assert isinstance(higher.utils._recursive_map(size, lambda v: v + 1), torch.Size)
    shared = higher.utils.get_func_params(
        nn.Linear(1, 1), device=torch.device("cpu"), safe_copy=False
    )
    assert all(p.is_leaf and p.requires_grad for p in shared)


def test_gradients_of_parameters_that_the_loss_does_not_use() -> None:
    model = MODELS["half-used"]()
    with higher.innerloop_ctx(model, torch.optim.Adam(model.parameters())) as (fmodel, diffopt):
        diffopt.step(loss_of(fmodel(torch.ones(2, 4))))
        diffopt.step(loss_of(fmodel(torch.ones(2, 4))))
        outer = loss_of(fmodel(torch.ones(2, 4)))
    first = list(fmodel.parameters(time=0))
    found = zeros_for_none(torch.autograd.grad(outer, first, allow_unused=True), first)
    assert found[0].abs().sum() > 0
    assert not found[1].any()


def test_a_parameter_that_the_loss_does_not_use_is_skipped_as_after_backward() -> None:
    model = nn.ParameterDict(
        {"used": nn.Parameter(torch.tensor(1.0)), "unused": nn.Parameter(torch.tensor(1.0))}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        diffopt.step(fmodel["used"] ** 2 / 2)
        assert fmodel["unused"].item() == 1.0
        assert fmodel["used"].item() == pytest.approx(0.85)
