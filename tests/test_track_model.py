"""``loop.model``: the user's own module, at other parameters, and never the user's own tensors."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
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
def test_activation_checkpointing_is_right(reentrant: bool):
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

    ours, truth = outer_gradient(use_reentrant=reentrant), outer_gradient()
    assert_params(ours, truth, 1e-10)  # type: ignore[arg-type]


class Behind(nn.Module):
    """A body behind a frozen layer, under a checkpoint with ``use_reentrant=True`` or not."""

    def __init__(self, checkpointed: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.frozen(x).requires_grad_()
        hidden = (
            checkpoint(self.body, hidden, use_reentrant=True)
            if self.checkpointed
            else self.body(hidden)
        )
        return self.head(hidden.tanh())


def ones(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.ones(2, 4)).square().mean()
    return loss


@pytest.mark.parametrize("arguments", [{}, {"first_order": True}, {"learn": "nothing"}], ids=str)
def test_reentrant_checkpointing_trains_what_lies_inside(arguments: dict[str, Any]):
    """PyTorch's hides the parameters, which would stand still without an error."""

    def run(checkpointed: bool) -> dict[str, Tensor]:
        with loop_over(Behind(checkpointed), **arguments) as loop:
            loop.step(ones(loop.model))
            loop.step(ones(loop.model))
        return loop.parameters()

    ours = run(True)
    assert_params(ours, run(False), 1e-12)
    assert not torch.equal(ours["body.weight"], Behind().body.weight)


@pytest.mark.parametrize(
    "strategy", [innerloop.StoreAll(), innerloop.FirstOrder(), innerloop.Checkpointed()], ids=str
)
def test_reentrant_checkpointing_trains_what_lies_inside_under_a_strategy(strategy: Any):
    def run(checkpointed: bool) -> dict[str, Tensor]:
        problem = innerloop.Problem.from_module(
            Behind(checkpointed), lambda model, hyper, batch: ones(model), innerloop.optim.sgd(lr=1)
        )
        return innerloop.unroll(problem, None, None, steps=2, strategy=strategy).params

    ours = run(True)
    assert_params(ours, run(False), 1e-12)
    assert not torch.equal(ours["body.weight"], Behind().body.weight)


def test_reentrant_checkpointing_is_refused_by_name_in_the_bridge():
    model = Behind()
    optimizer = torch.optim.SGD([*model.body.parameters(), *model.head.parameters()], lr=0.1)
    with (
        innerloop.higher.innerloop_ctx(model, optimizer) as (patched, steps),
        pytest.raises(innerloop.NotDifferentiableError, match="use_reentrant=True"),
    ):
        steps.step(patched(torch.ones(2, 4)).square().mean())


def test_an_outer_loss_may_be_checkpointed():
    def outer_gradient(in_the_end: bool, **arguments: Any) -> dict[str, Tensor | None]:
        model = Recomputing()
        model.load_state_dict(network().state_dict())
        with innerloop.track(model, sgd(model)) as loop:
            for t in range(STEPS):
                loop.step(F.mse_loss(loop.model(features(t)), target(t)))
            loop.model.arguments = arguments
            outer = F.mse_loss(loop.model(features(STEPS)), target(STEPS))
            if not in_the_end:
                loop.model.arguments = {}
                loop.step(F.mse_loss(loop.model(features(0)), target(0)))
        outer.backward()
        return gradients(model)

    for in_the_end in (True, False):
        truth = outer_gradient(in_the_end)
        ours = outer_gradient(in_the_end, use_reentrant=False)
        assert_params(ours, truth, 1e-12)  # type: ignore[arg-type]


def test_an_edit_between_a_checkpointed_outer_loss_and_its_backward_pass_is_refused():
    model = Recomputing(use_reentrant=False)
    with loop_over(model) as loop:
        loop.model.arguments = {}
        loop.step(F.mse_loss(loop.model(features(0)), target(0)))
        loop.model.arguments = {"use_reentrant": False}
        outer = loop.model(features(1)).square().mean()
        with torch.no_grad():
            loop.model.body.weight.add_(2)
    with pytest.raises(innerloop.NotDifferentiableError, match="checkpoint"):
        outer.backward()


# -- the user's module is not changed --------------------------------------------------------------


class Recording(nn.Module):
    """Plain attributes that a forward pass writes, one of them registered besides."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.mean, self.array = torch.zeros(3), np.zeros(2)
        self.log: list[Any] = []
        self.log.append(self.log)
        self.nested = {"calls": [0], "tuple": ([],), "counted": Counter(a=1)}
        self.register_buffer("total", torch.zeros(()))
        self.also_total = self.total

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1)
        self.array += 1
        self.log[0].append(x)
        self.nested["calls"][0] += 1  # type: ignore[index]
        self.nested["tuple"][0].append(1)  # type: ignore[index]
        self.nested["counted"]["a"] += 1  # type: ignore[index]
        self.total += 1  # type: ignore[assignment, operator]
        assert self.also_total is self.total
        return self.layer(x - self.mean)


def _unrolled(model: nn.Module, x: Tensor) -> None:
    problem = innerloop.Problem.from_module(
        model, lambda m, hyper, batch: m(x).square().mean(), innerloop.optim.sgd(lr=0.1)
    )
    innerloop.unroll(problem, None, None, steps=2)


def _tracked(model: nn.Module, x: Tensor) -> None:
    with loop_over(model) as loop:
        loop.step(loop.model(x).square().mean())
        loop.step(loop.model(x).square().mean())


def _called(model: nn.Module, x: Tensor) -> None:
    call, params, _ = innerloop.functional(model)
    call(params, x)


def _bridged(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with innerloop.higher.innerloop_ctx(model, optimizer) as (patched, steps):
        steps.step(patched(x).square().mean())


@pytest.mark.parametrize("run", [_tracked, _unrolled, _called, _bridged])
def test_plain_attributes_stay_as_they_are(run: Callable[[nn.Module, Tensor], None]):
    model = Recording()
    run(model, torch.ones(4, 3))
    assert not model.mean.any()
    assert not model.array.any()
    assert len(model.log) == 1
    assert model.nested == {"calls": [0], "tuple": ([],), "counted": Counter(a=1)}
    assert not model.total


def test_a_tensor_with_a_derivative_among_the_attributes_is_shared():
    model = network()
    scale = torch.tensor(2.0, requires_grad=True)
    model.scales = [scale]  # type: ignore[assignment]
    with loop_over(model, learn="outer") as loop:
        loop.step((loop.model(features(0)) * loop.model.scales[0]).square().mean())
        loop.model(features(0)).sum().backward()
    assert scale.grad is not None


class InPlaceBuffer(nn.Module):
    """A buffer that is written in place and then used, in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # type: ignore[assignment, operator]
        return self.layer(x) / self.calls


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("bridge", [False, True])
def test_a_buffer_that_is_written_and_used_in_one_forward_pass(steps: int, bridge: bool):
    """Each step is ``w -> (1 - lr / calls ** 2) w``, on a loss of ``(w / calls) ** 2 / 2``."""
    model = InPlaceBuffer()
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[2.0, 0.0]]))
        model.layer.bias.zero_()
    model.layer.bias.requires_grad_(False)
    x = torch.tensor([[1.0, 0.0]])
    optimizer = torch.optim.SGD([model.layer.weight], lr=0.5)
    factor = 1.0
    for calls in range(2, steps + 2):
        factor *= 1 - 0.5 / calls**2
    truth = (factor / (steps + 2)) ** 2 * 2
    if bridge:
        context = innerloop.higher.innerloop_ctx(model, optimizer, copy_initial_weights=False)
        with context as (patched, opt):
            for _ in range(steps):
                opt.step(patched(x).square().sum() / 2)
            (patched(x).square().sum() / 2).backward()
    else:
        with innerloop.track(model, optimizer) as loop:
            for _ in range(steps):
                loop.step(loop.model(x).square().sum() / 2)
            seen = [float(loop.buffers(t)["calls"]) for t in range(steps)]
            (loop.model(x).square().sum() / 2).backward()
        assert seen == [float(t) for t in range(1, steps + 1)]
    assert model.layer.weight.grad is not None
    assert model.layer.weight.grad[0, 0].item() == pytest.approx(truth)
    assert model.calls == 1


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [("", "b"), (0, 1), (False, "x")])
def test_every_key_of_a_dict_of_modules_is_part_of_the_names(keys: Any):
    models: Any = {key: nn.Linear(1, 1, bias=False) for key in keys}
    for model in models.values():
        nn.init.ones_(model.weight)
    names = [f"{key}.weight" for key in keys]
    rule = innerloop.optim.groups(
        {names[0]: innerloop.optim.sgd(lr=0.1), "*": innerloop.optim.sgd(lr=0.0)}
    )
    with innerloop.track(models, rule) as loop:
        loop.step(sum(m.weight.square().sum() for m in loop.model.values()))
        assert list(loop.parameters()) == names
    assert [p.item() for p in loop.parameters().values()] == pytest.approx([0.8, 1.0])


def test_two_parameters_of_one_name_are_refused():
    models = {"a": nn.ModuleDict({"b": nn.Linear(2, 1)}), "a.b": nn.Linear(2, 1)}
    with pytest.raises(innerloop.InvalidInputError, match=r"called 'a\.b\.weight'"):
        innerloop.track(models, innerloop.optim.sgd(lr=0.1))


def test_two_buffers_of_one_name_are_refused():
    def norm() -> nn.Module:
        return nn.BatchNorm1d(2, affine=False)

    models = {"layer": nn.Linear(2, 2), "a": nn.ModuleDict({"b": norm()}), "a.b": norm()}
    with pytest.raises(innerloop.InvalidInputError, match=r"called 'a\.b\.running_mean'"):
        innerloop.track(models, innerloop.optim.sgd(lr=0.1))


class Fresh(nn.Module):
    """An adapter that registers its frozen weight anew whenever its modules are listed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.frozen = nn.Parameter(torch.full((2,), 3.0), requires_grad=False)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        weight = self.frozen.data
        del self.frozen
        self.register_parameter("frozen", nn.Parameter(weight, requires_grad=False))
        return super().named_modules(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.frozen)


def test_a_module_that_registers_its_parameters_anew():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    model = nn.Sequential(Fresh(), nn.Tanh())
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain[0].layer.parameters(), lr=0.1)  # type: ignore[union-attr]
    for _ in range(2):
        optimizer.zero_grad()
        plain(x).square().mean().backward()
        optimizer.step()
    truth = {f"0.layer.{name}": p.detach() for name, p in plain[0].layer.named_parameters()}  # type: ignore[union-attr]

    def chosen(params: Any) -> dict[str, Tensor]:
        return {name: params[name].detach() for name in truth}

    optimizer = torch.optim.SGD(model[0].layer.parameters(), lr=0.1)  # type: ignore[union-attr]
    with innerloop.track(model, optimizer) as loop:
        for _ in range(2):
            loop.step(loop.model(x).square().mean())
    assert_params(chosen(loop.parameters()), truth, 1e-12)
    problem = innerloop.Problem.from_module(
        model, lambda m, hyper, batch: m(x).square().mean(), innerloop.optim.sgd(lr=0.1)
    )
    start = {f"0.layer.{name}": p for name, p in model[0].layer.named_parameters()}  # type: ignore[union-attr]
    found = innerloop.unroll(problem, start, None, steps=2).params
    assert_params(chosen(found), truth, 1e-12)
    call, params, _ = innerloop.functional(model)
    assert torch.equal(call(params, x), model(x))


def test_inference_tensors_are_named():
    with torch.inference_mode():
        data, frozen = torch.tensor(2.0), network()
    with (
        pytest.raises(innerloop.NotDifferentiableError, match="inference_mode"),
        loop_over(network()) as loop,
    ):
        loop.step((loop.model(features(0)) * data).square().mean())
    with pytest.raises(innerloop.InvalidInputError, match="made under torch"):
        innerloop.track(frozen, innerloop.optim.sgd(lr=0.1))


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


# -- what is changed between steps -----------------------------------------------------------------


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


@pytest.mark.parametrize(
    "apply",
    [
        lambda layer: nn.utils.parametrizations.spectral_norm(layer),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrizations.orthogonal(layer),
        lambda layer: nn.utils.spectral_norm(layer),
        pruned,
    ],
    ids=["spectral norm", "weight norm", "orthogonal", "old spectral norm", "prune"],
)
def test_a_parametrization_applied_in_mid_loop_is_refused(apply: Callable[[nn.Module], Any]):
    model = network()
    with (  # noqa: PT012
        pytest.raises(innerloop.InvalidInputError, match="apply them to the model before"),
        loop_over(model) as loop,
    ):
        loop.step(loop.model(features(0)).square().mean())
        apply(loop.model.body)
    with (  # noqa: PT012
        pytest.raises(innerloop.InvalidInputError, match="before"),
        innerloop.higher.innerloop_ctx(model, sgd(model)) as (patched, steps),
    ):
        steps.step(patched(features(0)).square().mean())
        apply(patched.body)


def doubled(layer: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("apply", "remove"),
    [
        (pruned, lambda layer: prune.remove(layer, "weight")),
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        (doubled, lambda layer: nn.utils.parametrize.remove_parametrizations(layer, "weight")),
    ],
    ids=["prune", "old weight norm", "old spectral norm", "parametrization"],
)
def test_a_parametrization_removed_in_mid_loop_is_refused(
    apply: Callable[[nn.Module], Any], remove: Callable[[nn.Module], Any]
):
    model = network()
    apply(model.body)
    with pytest.raises(innerloop.InnerLoopError), loop_over(model) as loop:  # noqa: PT012
        loop.step(loop.model(features(0)).square().mean())
        remove(loop.model.body)
        loop.step(loop.model(features(0)).square().mean())
    with (  # noqa: PT012
        pytest.raises(innerloop.InvalidInputError, match="before"),
        innerloop.higher.innerloop_ctx(model, sgd(model)) as (patched, steps),
    ):
        steps.step(patched(features(0)).square().mean())
        remove(patched.body)
    model(features(0)).sum().backward()  # the user's own still has its parametrization


def test_a_frozen_parameter_taken_out_in_mid_loop_is_named():
    model = network()
    model.body.weight.requires_grad_(False)
    with loop_over(model) as loop:
        nn.utils.parametrizations.weight_norm(loop.model.body)
        with pytest.raises(innerloop.InvalidInputError, match="parameter 'weight' is taken out"):
            loop.step(loop.model(features(0)).square().mean())


@pytest.mark.parametrize("arguments", [{}, {"learn": "nothing"}], ids=str)
def test_a_parameter_that_a_step_skips_may_be_edited_in_place(arguments: dict[str, Any]):
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    with loop_over(model, **arguments) as loop:
        loop.step(loop.model.a**2)
        with torch.no_grad():
            loop.model.b.add_(1)
        loop.step(loop.model.a**2 + loop.model.b**2)
    assert loop.parameters(0)["b"].item() == 1
    assert loop.parameters(2)["b"].item() == pytest.approx(1.6)
    if not arguments:
        loop.parameters(2)["b"].backward()
        assert model.b.grad is not None
        assert model.b.grad.item() == pytest.approx(0.8)
