"""``loop.model``: the user's own module, at other parameters, and never the user's own tensors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import innerloop
from tests.networks import (
    adam,
    adapted,
    detached,
    direction,
    gradients,
    network,
    outer_value,
    sgd,
    train,
)
from tests.oracles import assert_derivative, assert_params, derivative, smooth_noise
from tests.situations import STEPS, TwoLayers, along, features, regression, target

pytestmark = pytest.mark.usefixtures("float64")


# -- it is the user's module -----------------------------------------------------------------------


@contextmanager
def loop_over(model: Any, optimizer: Any = None, **arguments: Any) -> Iterator[Any]:
    with innerloop.track(model, optimizer or innerloop.optim.sgd(lr=0.1), **arguments) as loop:
        yield loop


def test_it_has_the_users_class_names_and_attributes():
    model = network()
    setattr(model, "note", "kept")  # noqa: B010
    with loop_over(model) as loop:
        assert type(loop.model) is TwoLayers
        assert type(loop.model.middle) is nn.Tanh
        assert loop.model.note == "kept"
        assert loop.model is not model
        assert loop.model.body is not model.body
        assert [name for name, _ in loop.model.named_parameters()] == [
            name for name, _ in model.named_parameters()
        ]
        assert list(loop.model.state_dict()) == list(model.state_dict())
        assert list(loop.parameters()) == [name for name, _ in model.named_parameters()]
        assert all(p.requires_grad for p in loop.model.parameters())
        assert loop.model.training
        loop.model.eval()
        assert not loop.model.body.training
    assert model.training
    assert model.body.training


def test_a_dict_of_modules_stays_a_dict():
    models = {"first": network(), "second": network()}
    with loop_over(
        models,
        torch.optim.SGD([*models["first"].parameters(), *models["second"].parameters()], lr=0.1),
    ) as loop:
        assert list(loop.model) == ["first", "second"]
        assert type(loop.model["first"]) is TwoLayers
        assert next(iter(loop.parameters())) == "first.body.weight"


def test_hooks_fire_on_it_and_do_not_spread():
    model = network()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("of the user's model"))
    model.middle.register_full_backward_pre_hook(lambda *_: calls.append("backward"))
    with loop_over(model) as loop:
        loop.model.head.register_forward_hook(lambda *_: calls.append("of loop.model"))
        loss = regression(loop.model, 0)
        assert calls == ["of loop.model", "of the user's model"]
        loop.step(loss)
        assert calls[2:] == ["backward"]
    calls.clear()
    regression(model, 0)
    assert calls == ["of the user's model"]


def test_what_forward_writes_stays_in_it():
    class Counting(TwoLayers):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x
            return super().forward(x)

    model = Counting()
    with loop_over(model) as loop:
        for t in range(3):
            loop.step(regression(loop.model, t))
        assert loop.model.calls == 3
    assert model.calls == 0
    assert not hasattr(model, "last")


def test_hooks_on_parameters_act_as_in_torch():
    """A mask on a gradient, as pruning and frozen embedding rows use it; registered on the user's
    tensor."""

    def masked(model: TwoLayers) -> TwoLayers:
        model.body.weight.register_hook(
            lambda g: g * (torch.arange(12).reshape(4, 3) % 2) + 0.01 * g**2
        )
        return model

    model = masked(network())
    with loop_over(model, sgd(model)) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
    plain = masked(network())
    assert_params(
        {n: p.detach() for n, p in loop.parameters().items()},
        detached(train(plain, sgd(plain))),
        1e-12,
    )

    # The hook belongs to the tensor that receives .grad, so it also acts on the outer gradient
    # there: read that elsewhere.
    model = network()
    model.body.weight.register_hook(lambda g: g.tanh())
    starts = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    adapted(model, sgd(model), params=starts).backward()

    def hooked(h: float) -> float:
        start = network(h)
        start.body.weight.register_hook(lambda g: g.tanh())
        return outer_value(train(start, sgd(start)))

    found = along({name: p.grad for name, p in starts.items()}, direction(model))
    assert_derivative(found, derivative(hooked), "through a hook")


def test_it_can_be_pickled_and_copied():
    """A snapshot: the values of now, cut from the graph."""
    model = network()
    with loop_over(model) as loop:
        loop.step(regression(loop.model, 0))
        expected = regression(loop.model, 1).item()
        for copied in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
            snapshot = copied(loop.model)
            assert type(snapshot) is TwoLayers
            assert regression(snapshot, 1).item() == expected
            loop.step(regression(loop.model, 1))
            assert regression(snapshot, 1).item() == expected
            expected = regression(loop.model, 1).item()


def test_modules_that_are_not_registered_are_outside():
    """A plain list hides them from ``parameters()``: constant inside, and tensors outside of the
    model for the outer gradient."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [network().body]
            self.head = network().head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers[0](x).tanh())

    model = Hidden()
    adapted(model, sgd(model), learn="outer").backward()  # type: ignore[arg-type]
    assert model.head.weight.grad is None
    gradient = model.layers[0].bias.grad
    assert gradient is not None

    def moved(h: float) -> float:
        start = Hidden()
        with torch.no_grad():
            start.layers[0].bias[1] += h
        return outer_value(train(start, sgd(start)))

    assert_derivative(gradient[1].item(), derivative(moved), "an unregistered layer")


def test_containers_that_hold_each_other():
    """A list that is in itself, and modules that know their parent, are copied once."""
    model = network()
    ring: list[Any] = [model.head]
    ring.append(ring)
    parent = [model]
    for name, value in {"ring": ring, "parent": parent}.items():
        object.__setattr__(model, name, value)
    with loop_over(model) as loop:
        assert loop.model.parent[0] is loop.model
        assert loop.model.ring[0] is loop.model.head
        loop.step(
            F.mse_loss(loop.model.parent[0](features(0)), target(0)) + loop.model.ring[0].bias.sum()
        )
    assert model.parent[0] is model  # type: ignore[index]


# -- weight edits between steps --------------------------------------------------------------------


def add_in_place(model: TwoLayers) -> None:
    with torch.no_grad():
        model.body.weight.add_(0.2)
        model.head.weight[0, 1] += 0.1


def add_to_data(model: TwoLayers) -> None:
    model.body.weight.data.add_(0.2)
    model.head.weight.data[0, 1] += 0.1


def set_data(model: TwoLayers) -> None:
    model.body.weight.data = model.body.weight.data + 0.2


def load(model: nn.Module) -> None:
    model.load_state_dict(
        {name: value.detach() + 0.1 for name, value in model.state_dict().items()}
    )


EDITS = pytest.mark.parametrize("edit", [add_in_place, add_to_data, set_data, load])


def edited(
    model: TwoLayers, edit: Callable[[Any], None], optimizer: torch.optim.Optimizer, *, first: bool
) -> TwoLayers:
    """Plain PyTorch with an edit before (or after) every step."""
    for t in range(STEPS):
        if first:
            edit(model)
        train(model, optimizer, steps=range(t, t + 1))
        if not first:
            edit(model)
    return model


@EDITS
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("learn", ["init", "outer", "nothing"])
def test_an_edit_between_steps_sticks(learn: Any, first: bool, edit: Callable[[Any], None]):
    """It adds a constant, so that finite differences of the edited run are the truth for the
    gradients too."""
    model = network()
    lr = torch.tensor(0.05, requires_grad=True)
    with loop_over(model, adam(model), learn=learn, hyper={"lr": lr}) as loop:
        for t in range(STEPS):
            if first:
                edit(loop.model)
            loop.step(regression(loop.model, t))
            if not first:
                edit(loop.model)
        outer = regression(loop.model, STEPS)
    truth = edited(start := network(), edit, adam(start), first=first)
    assert_params({n: p.detach() for n, p in loop.parameters().items()}, detached(truth), 1e-12)
    if learn == "nothing":
        return
    outer.backward()
    assert lr.grad is not None
    by_lr = derivative(
        lambda h: outer_value(
            edited(start := network(), edit, adam(start, lr=0.05 + h), first=first)
        )
    )
    assert_derivative(lr.grad.item(), by_lr, "lr")
    if learn == "init":
        by_init = derivative(
            lambda h: outer_value(edited(start := network(h), edit, adam(start), first=first))
        )
        assert_derivative(along(gradients(model), direction(model)), by_init, "init")


@pytest.mark.parametrize("learn", ["init", "outer", "nothing"])
def test_a_replaced_parameter_sticks_and_is_constant(learn: Any):
    """As for torch's autograd, what comes before the replacement has no influence any more through
    this parameter."""
    value = 0.5 * smooth_noise(1, 4)

    def replaced(model: TwoLayers, optimizer: Any) -> TwoLayers:
        train(model, optimizer, steps=range(1))
        with torch.no_grad():
            model.head.weight.copy_(value)  # the optimizer must go on with this tensor
        return train(model, optimizer, steps=range(1, STEPS))  # type: ignore[return-value]

    model = network()
    with loop_over(model, sgd(model), learn=learn) as loop:
        loop.step(regression(loop.model, 0))
        loop.model.head.weight = nn.Parameter(value.clone())
        for t in range(1, STEPS):
            loop.step(regression(loop.model, t))
        outer = regression(loop.model, STEPS)
    truth = replaced(start := network(), sgd(start))
    assert_params({n: p.detach() for n, p in loop.parameters().items()}, detached(truth), 1e-12)
    if learn == "init":
        outer.backward()
        by_init = derivative(lambda h: outer_value(replaced(start := network(h), sgd(start))))
        assert_derivative(along(gradients(model), direction(model)), by_init, "init")


@pytest.mark.parametrize("learn", ["init", "outer", "nothing"])
def test_an_edited_buffer_sticks(learn: Any):
    def with_reset(model: Any, t: int, reset: bool) -> Tensor:
        if reset and t == 2:
            model[1].running_mean.zero_()
        return regression(model, t)

    make = lambda: nn.Sequential(network().body, nn.BatchNorm1d(4), nn.Linear(4, 1))  # noqa: E731
    torch.manual_seed(3)
    model = make()
    torch.manual_seed(3)
    plain = make()
    with loop_over(model, sgd(model), learn=learn) as loop:
        for t in range(STEPS):
            loop.step(with_reset(loop.model, t, reset=True))
    train(plain, sgd(plain), lambda m, t: with_reset(m, t, reset=True))
    assert_params(loop.buffers(), dict(plain.named_buffers()), 1e-12)
    assert int(loop.buffers(time=0)["1.num_batches_tracked"]) == 0


# -- compiled and wrapped modules ------------------------------------------------------------------


def compiled_around(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def compiled_part(model: Any) -> nn.Module:
    model.body = torch.compile(model.body, backend="aot_eager")
    return model


def compiled_part_in_place(model: Any) -> nn.Module:
    model.body.compile(backend="aot_eager")
    return model


@pytest.mark.compiled
@pytest.mark.parametrize(
    "wrap", [compiled_around, compiled_in_place, compiled_part, compiled_part_in_place]
)
def test_a_compiled_model_runs_uncompiled(wrap: Callable[[nn.Module], nn.Module]):
    expected = network()
    adapted(expected, sgd(expected)).backward()
    inside = network()
    model = wrap(inside)
    adapted(model, sgd(model)).backward()  # type: ignore[arg-type]
    ours = {name.replace("_orig_mod.", ""): p.grad for name, p in inside.named_parameters()}
    assert_params(ours, gradients(expected), 1e-13)  # type: ignore[arg-type]
    with loop_over(model, sgd(model)) as loop:
        assert not any("_orig_mod" in name for name in loop.parameters())


# -- checkpointed activations ----------------------------------------------------------------------


class Recomputing(TwoLayers):
    """Activation checkpointing: in the backward pass the body runs once more, with the weights that
    it finds *then*."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        hidden = (
            checkpoint(lambda y: self.middle(self.body(y)), x, **self.arguments)
            if self.arguments
            else self.middle(self.body(x))
        )
        return self.head(hidden)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_right_or_refused(reentrant: bool):
    def loss(model: nn.Module, t: int) -> Tensor:
        return F.mse_loss(model(features(t).requires_grad_()), target(t))

    def outer_gradient(**arguments: Any) -> dict[str, Tensor | None]:
        model = Recomputing(**arguments)
        model.load_state_dict(network().state_dict())
        with innerloop.track(model, sgd(model)) as loop:
            for t in range(STEPS):
                loop.step(loss(loop.model, t))
            outer = loss(loop.model, STEPS)
        outer.backward()
        return gradients(model)

    truth = outer_gradient()
    try:
        ours = outer_gradient(use_reentrant=reentrant)
    except innerloop.NotDifferentiableError as error:
        assert "checkpoint" in str(error)  # noqa: PT017
        return
    assert_params(ours, truth, 1e-10)  # type: ignore[arg-type]


class InAList(nn.Module):
    """A parameter that also stands in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))
        self.all = [self.w]

    def forward(self) -> Tensor:
        return (self.all[0] * self.w).square() / 4


def test_a_loop_inside_a_loop_over_a_module_with_a_list() -> None:
    """One step of rate .1 on w⁴/4 from 2: 2 - .1 · 8 = 1.2."""
    model = InAList()
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as outside:
        with innerloop.track(outside.model, innerloop.optim.sgd(lr=0.1)) as inside:
            inside.step(inside.model())
        assert inside.parameters()["w"].item() == pytest.approx(1.2, abs=1e-12)


def test_evaluation_between_training_forwards_of_a_batch_norm() -> None:
    """The graph of a forward in evaluation mode must keep the running statistics that it read:
    truth from copies made by hand."""
    torch.manual_seed(0)
    x, z = torch.randn(6, 3), 2 * torch.randn(6, 3) + 1
    start = nn.Sequential(nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 1))

    def run(module: nn.Module, step: Any, statistics: Any) -> Tensor:
        total = torch.zeros(())
        for _ in range(3):
            module.train()
            step(module(z).square().mean())
            module.eval()
            total = total + statistics(module)
        return total

    tracked = copy.deepcopy(start)
    with innerloop.track(tracked, torch.optim.SGD(tracked.parameters(), lr=0.1)) as loop:
        run(loop.model, loop.step, lambda module: module(x).square().mean()).backward()

    params = {name: p.detach().clone().requires_grad_() for name, p in start.named_parameters()}
    leaves, mean, var = dict(params), torch.zeros(3), torch.ones(3)
    total = torch.zeros(())
    for _ in range(3):
        hidden = F.batch_norm(z, None, None, leaves["0.weight"], leaves["0.bias"], training=True)
        mean, var = 0.5 * mean + 0.5 * z.mean(0), 0.5 * var + 0.5 * z.var(0)
        loss = F.linear(hidden, leaves["1.weight"], leaves["1.bias"]).square().mean()
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        leaves = {n: p - 0.1 * g for (n, p), g in zip(leaves.items(), grads, strict=True)}
        hidden = (x - mean) / (var + 1e-5).sqrt() * leaves["0.weight"] + leaves["0.bias"]
        total = total + F.linear(hidden, leaves["1.weight"], leaves["1.bias"]).square().mean()
    total.backward()
    for name, p in tracked.named_parameters():
        assert p.grad is not None
        assert torch.allclose(p.grad, params[name].grad, rtol=1e-10), name  # type: ignore[arg-type]
