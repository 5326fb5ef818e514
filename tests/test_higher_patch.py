"""Patched modules: the module's own function of its newest parameters, and parameters by time."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import innerloop
import innerloop.higher as higher
from innerloop._utils import torch_private
from innerloop._utils.differences import four_point
from innerloop.higher import PatchedModule
from tests.higher_models import (
    MODELS,
    SEEDS,
    HalfUsed,
    Tied,
    assert_close,
    batches,
    call_at,
    loss_of,
    names_of,
    plain,
    seeded,
    unrolled_by_hand,
    zeros_for_none,
)
from tests.oracles import smooth_noise

pytestmark = pytest.mark.usefixtures("float64")

LR = 0.1
RECURRENT: dict[str, Callable[[], Any]] = {
    "rnn": lambda: nn.RNN(4, 5, 2),
    "lstm": lambda: nn.LSTM(4, 5, 2, bidirectional=True),
    "lstm-projected": lambda: nn.LSTM(4, 5, 2, proj_size=3),
    "gru": lambda: nn.GRU(4, 5, 2),
    "rnn-cell": lambda: nn.RNNCell(4, 5),
    "lstm-cell": lambda: nn.LSTMCell(4, 5),
    "gru-cell": lambda: nn.GRUCell(4, 5),
}
ALL = {**MODELS, **RECURRENT}


def shape(name: str) -> tuple[int, ...]:
    return (6, 3, 4) if name in ("rnn", "lstm", "lstm-projected", "gru") else (8, 4)


each_model = pytest.mark.parametrize("name", ALL)
each_seed = pytest.mark.parametrize("seed", SEEDS)


@each_seed
@each_model
def test_values_and_outputs_are_those_of_the_module(name: str, seed: int) -> None:
    model = seeded(seed, ALL[name])
    fmodel = higher.monkeypatch(model)
    copies = higher.utils.get_func_params(model)
    for own, theirs, copied in zip(model.parameters(), fmodel.parameters(), copies, strict=True):
        assert torch.equal(own, theirs)
        assert torch.equal(own, copied)
        assert theirs is not own
        assert copied.is_leaf
        assert copied.requires_grad
    for x in batches(seed, 3, *shape(name)):
        for a, b in zip(
            higher.utils.flatten(fmodel(x)), higher.utils.flatten(model(x)), strict=True
        ):
            assert torch.equal(a, b)


@each_seed
@each_model
def test_backward_fills_the_grads_of_the_copies(name: str, seed: int) -> None:
    model = seeded(seed, ALL[name])
    fmodel = higher.monkeypatch(model)
    for x in batches(seed, 3, *shape(name)):
        loss_of(model(x)).backward()
        loss_of(fmodel(x)).backward()
    for own, theirs in zip(model.parameters(), fmodel.parameters(), strict=True):
        assert (own.grad is None) == (theirs.grad is None)
        if own.grad is not None:
            assert torch.equal(own.grad, theirs.grad)


@each_seed
@each_model
def test_a_call_with_params_is_the_functional_forward(name: str, seed: int) -> None:
    model = seeded(seed, ALL[name])
    fmodel, functional = higher.monkeypatch(model), higher.patch.make_functional(model)
    for x in batches(seed, 3, *shape(name)):
        params = [torch.randn_like(p, requires_grad=True) for p in model.parameters()]
        expected = higher.utils.flatten(call_at(model, params, x))
        call, _, buffers = innerloop.functional(model)
        own = call(dict(zip(names_of(model), params, strict=True)), x, buffers=buffers)[0]
        for found in (
            fmodel(x, params=params),
            functional(x, params=params),
            fmodel.forward(x, params=params),
            own,
        ):
            assert all(
                torch.equal(a, b)
                for a, b in zip(higher.utils.flatten(found), expected, strict=True)
            )
        assert all(a is b for a, b in zip(fmodel.parameters(), params, strict=True))


@each_seed
@each_model
def test_gradient_descent_by_fast_params(name: str, seed: int) -> None:
    """Against the same loop over ``torch.func.functional_call``."""
    model = seeded(seed, ALL[name])
    inputs = batches(seed, 4, *shape(name))
    start, outer = unrolled_by_hand(model, inputs, LR)
    expected = zeros_for_none(torch.autograd.grad(outer, start, allow_unused=True), start)
    fmodel = higher.monkeypatch(model)
    for x in inputs[:-1]:
        params = list(fmodel.parameters())
        grads = torch.autograd.grad(
            loss_of(fmodel(x)), params, create_graph=True, allow_unused=True
        )
        fmodel.fast_params = [
            p if g is None else p - LR * g for p, g in zip(params, grads, strict=True)
        ]
    found = loss_of(fmodel(inputs[-1]))
    first = list(fmodel.parameters(time=0))
    assert_close([found], [outer], 1e-12)
    assert_close(
        zeros_for_none(torch.autograd.grad(found, first, allow_unused=True), first), expected, 1e-10
    )


@each_seed
@each_model
@pytest.mark.parametrize("copied", [True, False])
def test_gradient_descent_by_the_context_manager(name: str, seed: int, copied: bool) -> None:
    model = seeded(seed, ALL[name])
    inputs = batches(seed, 4, *shape(name))
    start, outer = unrolled_by_hand(model, inputs, LR)
    expected = zeros_for_none(torch.autograd.grad(outer, start, allow_unused=True), start)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=copied) as (fmodel, diffopt):
        for x in inputs[:-1]:
            returned = diffopt.step(loss_of(fmodel(x)))
            assert all(a is b for a, b in zip(returned, fmodel.parameters(), strict=True))
        found = loss_of(fmodel(inputs[-1]))
    first = list(fmodel.parameters(time=0))
    by_time = torch.autograd.grad(found, first, allow_unused=True, retain_graph=True)
    assert_close(zeros_for_none(by_time, first), expected, 1e-10)
    if not copied:
        found.backward()
        assert_close(zeros_for_none([p.grad for p in model.parameters()], start), expected, 1e-10)


@each_seed
@each_model
def test_evaluation_reaches_nothing(name: str, seed: int) -> None:
    model = seeded(seed, ALL[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with higher.innerloop_ctx(
        model, optimizer, copy_initial_weights=False, track_higher_grads=False
    ) as (
        fmodel,
        diffopt,
    ):
        first = list(fmodel.parameters(time=0))
        for x in batches(seed, 3, *shape(name)):
            diffopt.step(loss_of(fmodel(x)))
        total = sum(p.sum() for p in fmodel.parameters())
    trained = [a for a, b in zip(first, fmodel.parameters(), strict=True) if not torch.equal(a, b)]
    assert trained
    assert torch.autograd.grad(total, trained, allow_unused=True) == (None,) * len(trained)
    assert all(p.grad is None for p in model.parameters())


@each_seed
def test_a_convolutional_net_with_batch_norm_over_ten_steps(seed: int) -> None:
    def build() -> Any:
        parts: list[tuple[str, nn.Module]] = []
        for i, channels in enumerate((3, 8, 8)):
            parts += [
                (f"conv{i}", nn.Conv2d(channels, 8, 3)),
                (f"norm{i}", nn.BatchNorm2d(8, momentum=1.0)),
                (f"relu{i}", nn.ReLU(inplace=True)),
                (f"pool{i}", nn.MaxPool2d(2, 2)),
            ]
        features = nn.Sequential(OrderedDict(parts))
        return nn.Sequential(
            OrderedDict([("features", features), ("flat", nn.Flatten()), ("fc", nn.Linear(8, 5))])
        )

    model = seeded(seed, build)
    inputs = batches(seed, 6, 7, 3, 28, 28)
    start, outer = unrolled_by_hand(model, inputs, 0.01)
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.01)) as (
        fmodel,
        diffopt,
    ):
        assert names_of(fmodel) == names_of(model)
        assert all(
            torch.equal(a, b) for a, b in zip(fmodel.parameters(), model.parameters(), strict=True)
        )
        for x in inputs[:-1]:
            diffopt.step(loss_of(fmodel(x)))
        found = loss_of(fmodel(inputs[-1]))
    assert_close([found], [outer], 1e-12)
    assert_close(
        torch.autograd.grad(found, list(fmodel.parameters(time=0))),
        torch.autograd.grad(outer, start),
        1e-8,
    )


# -- parameters by time ----------------------------------------------------------------------------


def test_times_and_what_counts_as_one() -> None:
    fmodel = higher.monkeypatch(plain(), copy_initial_weights=False)
    zero = list(fmodel.parameters())
    fmodel.update_params([2 * p for p in zero])
    fmodel.fast_params = [3 * p for p in zero]
    fmodel(torch.ones(1, 4), params=[4 * p for p in zero])
    for time, factor in ((0, 1), (1, 2), (2, 3), (3, 4), (-1, 4), (None, 4), (-2, 3), (-4, 1)):
        assert all(
            torch.equal(p, factor * q)
            for p, q in zip(fmodel.parameters(time=time), zero, strict=True)
        )
    assert all(p is q for p, q in zip(fmodel.init_fast_params, zero, strict=True))
    assert all(p is q for p, q in zip(fmodel.fast_params, fmodel.parameters(), strict=True))
    for time in (4, -5):
        with pytest.raises(innerloop.InvalidInputError, match="times 0 to 3"):
            fmodel.parameters(time=time)


def test_parameters_of_a_part() -> None:
    """In higher, ``recurse=False`` has no effect, and a part knows no times."""
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1)))
    fmodel = higher.monkeypatch(model)
    fmodel.update_params([2 * p for p in fmodel.parameters()])
    assert list(fmodel.parameters(recurse=False)) == []
    weight, bias = fmodel[1].parameters(time=0)
    assert torch.equal(weight, model[1][0].weight)
    assert torch.equal(bias, model[1][0].bias)
    assert [p.shape for p in fmodel[1][0].parameters(recurse=False)] == [(1, 2), (1,)]


@pytest.mark.usefixtures("types_unchecked")
def test_without_tracking_only_the_newest_parameters_are_kept() -> None:
    fmodel = higher.monkeypatch(nn.Linear(2, 1), track_higher_grads=False)
    fmodel.update_params([2 * p for p in fmodel.parameters()])
    for time in (0, -1, None):  # as in higher, 0 is not refused
        assert all(
            a is b for a, b in zip(fmodel.parameters(time=time), fmodel.fast_params, strict=True)
        )
    with pytest.raises(innerloop.InvalidInputError, match="keeps no history"):
        fmodel.parameters(time=1)
    with pytest.raises(innerloop.InvalidInputError, match="only the newest"):
        _ = fmodel.init_fast_params
    with pytest.raises(ValueError, match="True or False"):
        fmodel.track_higher_grads = 1


def test_tracking_switched_off_on_the_way() -> None:
    """higher then goes on with the parameters it had."""
    fmodel = higher.monkeypatch(nn.Linear(1, 1, bias=False))
    for value in (1.0, 2.0):
        fmodel.update_params([torch.full((1, 1), value)])
        assert fmodel(torch.ones(1, 1)).item() == value
        fmodel.track_higher_grads = False


def test_a_weight_may_be_assigned() -> None:
    """d(3·2w)/dw = 6, and each assignment is a time of its own."""
    model: Any = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1))
    fmodel = higher.monkeypatch(model, copy_initial_weights=False)
    fmodel[0].weight = 2 * fmodel[0].weight
    fmodel[0].weight = 3 * fmodel[0].weight
    (grad,) = torch.autograd.grad(fmodel[0].weight.sum(), model[0].weight)
    assert grad.item() == 6.0
    assert [
        next(fmodel.parameters(time=t)).item() / model[0].weight.item() for t in range(3)
    ] == pytest.approx([1, 2, 6])
    assert torch.equal(fmodel[1].weight, model[1].weight)
    with pytest.raises(innerloop.InvalidInputError, match="must be a tensor"):
        fmodel[0].weight = 3.0


def test_an_assigned_weight_stays_tied() -> None:
    fmodel = higher.monkeypatch(Tied())
    fmodel.first[0].weight = torch.zeros(2, 4)
    assert fmodel.second[0].weight is fmodel.first[0].weight
    assert len(list(fmodel.parameters())) == 2


@pytest.mark.usefixtures("types_unchecked")
def test_wrong_parameters_are_named() -> None:
    fmodel = higher.monkeypatch(nn.Linear(2, 1))
    weight, bias = fmodel.parameters()
    for params, message in (
        ([weight], "got 1 tensors"),
        ([bias, weight], "order"),
        ([weight, 0.0], "must be a tensor"),
    ):
        with pytest.raises(innerloop.InvalidInputError, match=message):
            fmodel.update_params(params)
        with pytest.raises(innerloop.InvalidInputError, match=message):
            fmodel(torch.ones(1, 2), params=params)
    assert [p is q for p, q in zip(fmodel.parameters(), (weight, bias), strict=True)] == [
        True,
        True,
    ]


def test_one_tensor_for_two_parameters() -> None:
    fmodel = higher.monkeypatch(
        nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    )
    shared = torch.full((1, 1), 3.0)
    assert fmodel(torch.ones(1, 1), params=[shared, shared]).item() == 9.0
    assert len(list(fmodel.parameters())) == 2


# -- make_functional -------------------------------------------------------------------------------


def test_make_functional_has_no_parameters_until_they_are_given() -> None:
    model: Any = nn.Linear(2, 1, bias=False)
    fmodel = higher.patch.make_functional(model)
    assert not fmodel.fast_params
    for use in (
        lambda: fmodel(torch.ones(2)),
        lambda: fmodel.forward(torch.ones(2)),
        lambda: fmodel.parameters(),
    ):
        with pytest.raises(ValueError, match="params="):
            use()
    given = [torch.tensor([[3.0, 4.0]])]
    assert fmodel(torch.tensor([1.0, 10.0]), params=given).item() == 43.0
    assert fmodel(torch.tensor([1.0, 10.0])).item() == 43.0
    assert fmodel.fast_params[0] is given[0]
    assert model(torch.zeros(2)).item() == 0.0


def test_make_functional_calls_the_encapsulator_once() -> None:
    seen: list[Any] = []
    model: Any = nn.Linear(2, 1)

    def encapsulate(fmodel: PatchedModule, module: nn.Module) -> None:
        seen.append((fmodel, module))
        fmodel.update_params([torch.zeros_like(p) for p in module.parameters()])

    fmodel = higher.patch.make_functional(model, encapsulator=encapsulate)
    assert seen == [(fmodel, model)]
    assert fmodel(torch.ones(2)).item() == 0.0


def test_boxed_forward_is_the_forward() -> None:
    fmodel = higher.monkeypatch(nn.Linear(2, 1, bias=False))
    x = torch.ones(2)
    assert torch.equal(fmodel.boxed_forward(x), fmodel(x))
    assert fmodel.boxed_forward(x, params=[torch.tensor([[3.0, 4.0]])]).item() == 7.0
    assert fmodel(x).item() == 7.0


# -- the tree of modules ---------------------------------------------------------------------------


def test_root_and_parts() -> None:
    fmodel = higher.monkeypatch(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1))))
    parts = [m for m in fmodel.modules() if m is not fmodel]
    assert fmodel.is_root
    assert fmodel.root is fmodel
    assert not any(m.is_root for m in parts)
    assert all(m.root is fmodel for m in parts)
    assert all(isinstance(m, PatchedModule) for m in parts)
    assert isinstance(fmodel[0], nn.Linear)
    assert isinstance(fmodel, higher.patch._MonkeyPatchBase)


@each_seed
def test_parts_can_be_called_alone_before_during_and_after(seed: int) -> None:
    model = seeded(seed, plain)
    fmodel = higher.monkeypatch(model)
    (x,) = batches(seed, 1, 5, 4)
    assert torch.equal(fmodel[0](x), model[0](x))
    assert torch.equal(fmodel(x), model(x))
    assert torch.equal(fmodel[4](fmodel[3](fmodel[2](fmodel[1](fmodel[0](x))))), model(x))
    doubled = [2 * p for p in model.parameters()]
    assert torch.equal(
        fmodel[0](x, params=doubled), nn.functional.linear(x, doubled[0], doubled[1])
    )
    assert torch.equal(fmodel(x), call_at(model, doubled, x))


def test_hooks_see_the_newest_parameters() -> None:
    """Each hook fires once per call; the one before the forward already computes with the
    parameters of the call."""
    seen: list[Any] = []
    model: Any = nn.Sequential(nn.Linear(1, 1, bias=False))
    model.register_forward_pre_hook(lambda module, args: seen.append(module[0].weight.item()))
    model[0].register_forward_hook(lambda module, args, output: output + 100)
    fmodel = higher.monkeypatch(model)
    assert fmodel(torch.ones(1, 1), params=[torch.full((1, 1), 7.0)]).item() == 107.0
    assert seen == [7.0]
    fmodel[0].register_forward_hook(lambda *_: seen.append("copy"))
    model(torch.ones(1, 1))
    assert "copy" not in seen


def test_flatten_parameters_moves_nothing() -> None:
    model = nn.LSTM(2, 3)
    fmodel = higher.monkeypatch(model)
    before = list(fmodel.parameters())
    fmodel.flatten_parameters()
    assert all(a is b for a, b in zip(before, fmodel.parameters(), strict=True))
    assert not hasattr(higher.monkeypatch(nn.Linear(1, 1)), "flatten_parameters")


def test_buffers_are_copied_and_synchronised() -> None:
    model: Any = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    fmodel = higher.monkeypatch(model)
    fmodel(torch.randn(8, 2))
    assert not torch.equal(fmodel[0].running_mean, model[0].running_mean)
    assert torch.equal(model[0].running_mean, torch.zeros(2))
    model(torch.randn(8, 2))
    higher.patch.buffer_sync(model, fmodel)
    for (name, own), (other, theirs) in zip(
        model.named_buffers(), fmodel.named_buffers(), strict=True
    ):
        assert name == other
        assert torch.equal(own, theirs)
        assert own is not theirs
    higher.patch.buffer_sync(model, fmodel, torch.device("cpu"))
    with pytest.raises(innerloop.InvalidInputError, match="no submodule '1'"):
        higher.patch.buffer_sync(model, higher.monkeypatch(nn.Sequential(nn.BatchNorm1d(2))))


def test_a_synchronised_buffer_is_a_constant() -> None:
    model, scale = nn.Linear(1, 1), torch.tensor([2.0], requires_grad=True)
    model.register_buffer("scale", torch.ones(1))
    fmodel = higher.monkeypatch(model)
    model.scale = 3 * scale
    higher.patch.buffer_sync(model, fmodel)
    assert fmodel.scale.item() == 6
    assert not fmodel.scale.requires_grad


def test_modes_are_independent() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5)).eval()
    fmodel = higher.monkeypatch(model)
    assert not fmodel.training
    fmodel.train()
    assert fmodel[1].training
    assert not model[1].training


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated"
)  # raised inside of torch's compiler
def test_what_wraps_a_module() -> None:
    model, x = nn.Sequential(nn.Linear(2, 1)), torch.ones(3, 2)
    assert torch.equal(higher.monkeypatch(nn.DataParallel(model))(x), model(x))
    assert torch.equal(higher.monkeypatch(cast("nn.Module", torch.compile(model)))(x), model(x))


def test_a_loop_inside_a_loop() -> None:
    """higher refuses to patch a patched module. On w²/2 each level multiplies w by 1 - lr."""
    model: Any = nn.Linear(1, 1, bias=False)
    x = torch.ones(1, 1)
    outer = higher.monkeypatch(model, copy_initial_weights=False)
    outer_opt = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.5}, fmodel=outer)
    inner = higher.monkeypatch(outer, copy_initial_weights=False)
    inner_opt = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.25}, fmodel=inner)
    inner_opt.step(inner(x).square().sum() / 2)
    outer_opt.step(inner(x).square().sum() / 2)  # d/dw (.75 w)²/2 = .75² w
    (grad,) = torch.autograd.grad(outer(x).sum(), model.weight)
    assert grad.item() == pytest.approx(1 - 0.5 * 0.75**2, abs=1e-15)


# -- names of the user's own -----------------------------------------------------------------------


class Layer(nn.Module):
    """A linear layer with something under ``name``, which its forward multiplies by."""

    def __init__(self, **own: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class OwnParameters(Layer):
    """Decays its weight, but not its bias."""

    def parameters(self, recurse: bool = True) -> Any:
        return iter([self.layer.weight])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + sum(p.square().sum() for p in self.parameters())


class OwnMethods(Layer):
    """Names of the bridge, and of its inside."""

    def update_params(self, factor: float) -> float:
        return 2 * factor

    def _at(self, time: int) -> int:
        return time + 1

    @property
    def fast_params(self) -> float:
        return 3.0

    def forward(self, x: Tensor) -> Tensor:
        self.root = x.sum()
        return self.layer(x) * self.update_params(0.5) * self._at(1) * self.fast_params * self.root


class OwnWord(Layer):
    """Takes ``params`` itself."""

    def forward(self, x: Tensor, params: Any = None) -> Tensor:
        return self.layer(x) if params is None else params * self.layer(x)


class Holds(nn.Module):
    def __init__(self, part: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.part = part
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.part, x)


def attribute(name: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda part, x: (
        part(x) * (getattr(part, name) if not isinstance(getattr(part, name), nn.Module) else 1)
    )


PARTS: dict[str, Callable[[], nn.Module]] = {
    "parameters": lambda: Holds(OwnParameters(), lambda part, x: part(x)),
    "methods": lambda: Holds(OwnMethods(), lambda part, x: part(x)),
    "params": lambda: Holds(OwnWord(), lambda part, x: part(x, params=3.0) + part(x)),
    "is_root": lambda: Holds(Layer(is_root=5.0), attribute("is_root")),
    "track_higher_grads": lambda: Holds(
        Layer(track_higher_grads=5.0), attribute("track_higher_grads")
    ),
    "fast_params": lambda: Holds(Layer(fast_params=5.0), attribute("fast_params")),
    "_ready": lambda: Holds(Layer(_ready=5.0, _kernels=3.0), attribute("_ready")),
    "module": lambda: Holds(
        Layer(update_params=nn.Linear(2, 1)), lambda part, x: part(x) * part.update_params(x)
    ),
    "module root": lambda: Holds(
        Layer(root=nn.Linear(2, 1)), lambda part, x: part(x) * part.root(x)
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_keeps_names_of_its_own(name: str) -> None:
    """Gradient of the outer loss against central differences of a plain torch.optim run."""
    model, (x,) = seeded(0, PARTS[name]), batches(0, 1, 3, 2)

    def after(h: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p in nn.Module.parameters(moved):
                p.add_(h)
        optimizer = torch.optim.SGD(list(nn.Module.parameters(moved)), lr=LR)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(moved(x)).backward()
            optimizer.step()
        return float(loss_of(moved(x)).detach())

    with higher.innerloop_ctx(
        model, torch.optim.SGD(model.parameters(), lr=LR), copy_initial_weights=False
    ) as (
        fmodel,
        diffopt,
    ):
        for _ in range(2):
            diffopt.step(loss_of(fmodel(x)))
        loss_of(fmodel(x)).backward()
    slope = sum(float(p.grad.sum()) for p in model.parameters() if p.grad is not None)
    assert slope == pytest.approx(four_point(after, 1e-4), rel=1e-6)


def test_a_part_without_such_names_has_those_of_the_bridge() -> None:
    fmodel = higher.monkeypatch(nn.Sequential(nn.Linear(2, 1)))
    doubled = [2 * p for p in fmodel.parameters()]
    fmodel[0].update_params(doubled)
    assert all(a is b for a, b in zip(fmodel[0].fast_params, doubled, strict=True))
    fmodel[0].track_higher_grads = False
    assert not fmodel.track_higher_grads
    fmodel[0].is_root = 7
    assert fmodel[0].is_root == 7


class OwnMethodsAtTheRoot(Layer):
    def update_params(self) -> None:
        pass


def test_the_root_may_not_have_names_of_the_bridge() -> None:
    x = torch.ones(1, 2)
    for model, name in (
        (Layer(is_root=True), "is_root"),
        (Layer(root=nn.Linear(2, 1)), "root"),
        (OwnMethodsAtTheRoot(), "update_params"),
    ):
        with pytest.raises(innerloop.InvalidInputError, match=f"has an attribute '{name}'"):
            higher.monkeypatch(model)
        assert torch.equal(higher.monkeypatch(nn.Sequential(model))(x), model(x))
    with pytest.raises(
        innerloop.InvalidInputError, match=r"lists 1 tensors, while its modules hold 2"
    ):
        higher.monkeypatch(OwnParameters())
    with pytest.raises(innerloop.InvalidInputError, match="read only"):
        higher.monkeypatch(Layer()).root = 3
    with pytest.raises(innerloop.InvalidInputError, match="which is ours"):
        higher.monkeypatch(nn.Sequential(Layer(_innerloop_fast=nn.Linear(1, 1))))


def test_subclasses_that_register_themselves_are_not_told() -> None:
    told: list[str] = []

    class Base(nn.Linear):
        def __init_subclass__(cls, *, tag: str) -> None:
            told.append(tag)

    class Tagged(Base, tag="mine"):
        pass

    model = Tagged(2, 1)
    assert torch.equal(
        higher.monkeypatch(nn.Sequential(model))(torch.ones(2)),
        higher.monkeypatch(model)(torch.ones(2)),
    )
    assert told == ["mine"]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_what_cannot_be_patched_or_asked_for_is_named() -> None:
    bridge: Any = higher
    fmodel: Any = bridge.monkeypatch(nn.Sequential(nn.Linear(2, 1)))
    bad: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: bridge.monkeypatch(nn.Sequential(torch.jit.script(nn.Linear(2, 1)))),
            "ScriptModule",
        ),
        (lambda: bridge.monkeypatch(nn.Linear(2, 1), copy_initial_weights="no"), "True or False"),
        (lambda: bridge.patch.make_functional(nn.Linear(2, 1), 5), "encapsulator"),
        (lambda: bridge.patch.buffer_sync(None, fmodel), "buffer_sync got NoneType"),
        (lambda: bridge.utils.get_func_params(None), "get_func_params"),
        (lambda: fmodel.parameters(time="0"), "write an int"),
        (lambda: fmodel.parameters(time=[0]), "write an int"),
        (lambda: setattr(fmodel, "fast_params", None), "NoneType as parameters"),
        (lambda: fmodel.update_params(fmodel.named_parameters()), "must be a tensor, got tuple"),
        (lambda: fmodel.update_params([p.long() for p in fmodel.parameters()]), "torch.int64"),
        (lambda: delattr(fmodel[0], "weight"), "cannot be deleted"),
    ]
    for use, message in bad:
        with pytest.raises(innerloop.InvalidInputError, match=message):
            use()
    assert fmodel(torch.ones(1, 2)).shape == (1, 1)


# -- inside the outer backward pass ----------------------------------------------------------------


def test_a_hook_may_read_the_newest_parameters() -> None:
    fmodel, seen = higher.monkeypatch(nn.Linear(2, 1), copy_initial_weights=False), []
    fmodel.update_params([2 * p for p in fmodel.parameters()])
    loss = loss_of(fmodel(torch.ones(1, 2)))
    loss.register_hook(lambda _: seen.append(sum(p.sum().item() for p in fmodel.parameters())))
    loss.backward()
    assert seen == [sum(p.sum().item() for p in fmodel.parameters())]


def test_what_is_computed_again_in_the_backward_pass_is_refused() -> None:
    """It would be computed with the newest parameters, also where it asks for them by
    ``parameters()``."""
    fmodel = higher.monkeypatch(nn.Linear(2, 1), copy_initial_weights=False)
    checkpoint = torch.utils.checkpoint.checkpoint
    losses = [
        loss_of(checkpoint(fmodel, torch.ones(1, 2), use_reentrant=False)),
        checkpoint(lambda: sum(p.exp().sum() for p in fmodel.parameters()), use_reentrant=False),
    ]
    fmodel.update_params([2 * p for p in fmodel.parameters()])
    for loss in losses:
        with pytest.raises(innerloop.NotDifferentiableError, match="A hook that runs"):
            loss.backward()


class NormsItself(nn.Module):
    """Weight norm in the root's own code, whose second derivative is wrong in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.rand(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch._weight_norm(self.v, self.g, 0))


@pytest.mark.parametrize("way", ["forward", "boxed_forward"])
def test_operations_are_replaced_in_every_way_of_calling(way: str) -> None:
    model, (x,) = seeded(0, NormsItself), batches(0, 1, 4, 3)
    found = []
    for name in ("__call__", way):
        with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=LR)) as (
            fmodel,
            diffopt,
        ):
            diffopt.step(loss_of(getattr(fmodel, name)(x)))
            outer = loss_of(getattr(fmodel, name)(x))
        found.append(torch.autograd.grad(outer, list(fmodel.parameters(time=0))))
    assert_close(found[1], found[0], 1e-14)


# -- copies ----------------------------------------------------------------------------------------


def through_pickle(fmodel: Any) -> Any:
    return pickle.loads(pickle.dumps(fmodel))


def through_save(fmodel: Any) -> Any:
    file = io.BytesIO()
    torch.save(fmodel, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


each_way = pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_save])


@each_way
@pytest.mark.parametrize("name", ALL)
def test_a_copy_starts_where_the_original_is(name: str, duplicate: Callable[[Any], Any]) -> None:
    model = ALL[name]()
    fmodel = higher.monkeypatch(model, copy_initial_weights=False)
    fmodel.update_params([2 * p for p in fmodel.parameters()])
    twin = duplicate(fmodel)
    assert type(twin) is type(fmodel)
    assert names_of(twin) == names_of(fmodel)
    for mine, theirs in zip(twin.parameters(time=0), fmodel.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.is_leaf
        assert mine.requires_grad
    (x,) = batches(0, 1, *shape(name))
    for a, b in zip(
        higher.utils.flatten(twin.eval()(x)), higher.utils.flatten(fmodel.eval()(x)), strict=True
    ):
        assert torch.equal(a, b)
    twin.update_params([0 * p for p in twin.parameters()])
    assert any(p.abs().sum() > 0 for p in fmodel.parameters())


@each_way
def test_a_copy_keeps_what_tracking_and_freezing_say(duplicate: Callable[[Any], Any]) -> None:
    model = plain()
    model[0].requires_grad_(False)
    twin = duplicate(higher.monkeypatch(model, track_higher_grads=False))
    assert not twin.track_higher_grads
    assert [p.requires_grad for p in twin.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    empty = duplicate(higher.patch.make_functional(model))
    assert empty.fast_params is None
    assert torch.equal(empty(torch.ones(4), params=list(model.parameters())), model(torch.ones(4)))


@each_way
def test_a_copy_of_a_part_is_a_plain_module(duplicate: Callable[[Any], Any]) -> None:
    fmodel = higher.monkeypatch(nn.Sequential(nn.Linear(2, 1)))
    part = duplicate(fmodel[0])
    assert type(part) is nn.Linear
    assert isinstance(part.weight, nn.Parameter)
    assert torch.equal(part.weight, fmodel[0].weight)
    assert isinstance(fmodel[0], PatchedModule)


def test_a_copy_of_what_holds_a_patched_module_and_its_part() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = higher.monkeypatch(nn.Sequential(nn.Linear(2, 1)))
            self.part = self.whole[0]

    holder = Holder()
    twin = copy.deepcopy(holder)
    assert twin.part is twin.whole[0]
    assert twin.part is not holder.part
    twin.whole.update_params([0 * p for p in twin.whole.parameters()])
    assert not twin.part.weight.any()
    assert holder.part.weight.any()


def test_state_dict_goes_back_into_the_module() -> None:
    model = MODELS["batch-norm"]()
    fmodel = higher.monkeypatch(model)
    fmodel(torch.randn(8, 4))
    fmodel.update_params([p + 1 for p in fmodel.parameters()])
    state = fmodel.state_dict()
    assert list(state) == list(model.state_dict())
    assert not any(t.requires_grad for t in state.values())
    model.load_state_dict(state)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fmodel.parameters(), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), fmodel.buffers(), strict=True))


# -- nothing is left behind ------------------------------------------------------------------------


class Slowed(torch.optim.SGD):
    """A class that has to be adapted: its step is its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] / 2)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    parts = [
        (
            type(m),
            m.training,
            set(vars(m)),
            {k: id(v) for k, v in vars(m).items()},
            {
                k: (id(p), p.requires_grad, p.detach().clone(), p.grad)
                for k, p in m.named_parameters(recurse=False)
            },
            {k: (id(b), b.clone()) for k, b in m.named_buffers(recurse=False)},
        )
        for m in model.modules()
    ]
    state = {p: copy.deepcopy(kept) for p, kept in optimizer.state.items()}
    return parts, [dict(g) for g in optimizer.param_groups], state, torch.get_rng_state()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_an_exception_in_the_block_leaves_nothing_changed(copied: bool, tracked: bool) -> None:
    model = MODELS["batch-norm"]()
    optimizer = torch.optim.Adam(model.parameters())
    loss_of(model(torch.randn(8, 4))).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    (x,) = batches(0, 1, 8, 4)

    def episode() -> None:
        override = {"lr": [torch.tensor(0.1)]}
        with higher.innerloop_ctx(model, optimizer, None, copied, override, tracked) as (
            fmodel,
            diffopt,
        ):
            diffopt.step(loss_of(fmodel(x)))
            fmodel.eval()
            raise KeyError

    with pytest.raises(KeyError):
        episode()
    assert same(snapshot(model, optimizer), before)
    assert torch.is_grad_enabled()


def test_an_exception_in_the_forward_leaves_a_module_that_works() -> None:
    """higher runs parts at outdated parameters from then on."""

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() < 0:
                raise KeyError
            return self.layer(x)

    fmodel = higher.monkeypatch(Fails())
    with pytest.raises(KeyError):
        fmodel(-torch.ones(1, 1))
    fmodel.update_params([torch.full((1, 1), 5.0)])
    assert fmodel.layer(torch.ones(1, 1)).item() == fmodel(torch.ones(1, 1)).item() == 5.0


@pytest.mark.parametrize("tracked", [True, False])
def test_episodes_leave_no_objects_behind(tracked: bool) -> None:
    """Without the garbage collector: whatever were part of a cycle would stay."""
    model, inputs = MODELS["batch-norm"](), batches(0, 4, 8, 4)
    optimizer = torch.optim.Adam(model.parameters())

    def episode() -> None:
        with higher.innerloop_ctx(
            model, optimizer, copy_initial_weights=False, track_higher_grads=tracked
        ) as (
            fmodel,
            diffopt,
        ):
            for x in inputs:
                diffopt.step(loss_of(fmodel(x)))
            outer = loss_of(fmodel(inputs[0]))
        if tracked:
            outer.backward()

    for _ in range(3):
        episode()
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(40):
            episode()
        grown = len(gc.get_objects()) - before
    finally:
        gc.enable()
    assert grown < 40


def test_a_class_is_freed_with_what_it_closes_over() -> None:
    held = []
    for _ in range(2):
        big = torch.zeros(1)
        held.append(weakref.ref(big))

        class Local(nn.Linear):
            kept = big

        model = nn.Sequential(Local(2, 1), Local(1, 1))
        assert type(higher.monkeypatch(model)[0]) is type(higher.monkeypatch(model)[1])
        del big, Local, model
    gc.collect()
    assert [ref() for ref in held] == [None, None]


@pytest.mark.parametrize("tracked", [True, False])
def test_the_random_state_is_left_alone(tracked: bool) -> None:
    model, (x,) = plain(), batches(0, 1, 8, 4)
    before = torch.get_rng_state()
    for make in (torch.optim.Adam, Slowed):
        with higher.innerloop_ctx(
            model, make(model.parameters(), lr=LR), track_higher_grads=tracked
        ) as (
            fmodel,
            diffopt,
        ):
            diffopt.step(loss_of(fmodel(x)))
            _ = diffopt.state, diffopt.state_dict(), copy.deepcopy(fmodel)
            with pytest.raises(innerloop.InvalidInputError):
                diffopt.step(loss_of(model(x)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_unused_half_is_the_same_at_all_times() -> None:
    model = HalfUsed()
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=LR)) as (
        fmodel,
        diffopt,
    ):
        diffopt.step(loss_of(fmodel(torch.ones(2, 4))))
    now, start = list(fmodel.parameters()), list(fmodel.parameters(time=0))
    assert torch.equal(now[1], start[1])
    assert torch.autograd.grad(now[1].sum(), start[1])[0].eq(1).all()


# -- operations that lack a derivative -------------------------------------------------------------


def test_a_loss_outside_of_the_module_has_all_derivatives() -> None:
    """``F.hardsigmoid`` has no second derivative in PyTorch; nothing stays on, whatever order the
    blocks end in."""
    model = nn.Linear(3, 2).double()
    x = smooth_noise(4, 3)

    def outer(h: float) -> float:
        w, b = (p.detach().clone().requires_grad_() for p in model.parameters())
        with torch.no_grad():
            b += h
        for _ in range(2):
            grads = torch.autograd.grad(
                functional.hardsigmoid(functional.linear(x, w, b)).square().sum(), (w, b)
            )
            w, b = (
                (p - 0.1 * g).detach().requires_grad_() for p, g in zip((w, b), grads, strict=True)
            )
        return float(functional.linear(x, w, b).square().sum().detach())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    blocks = [higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) for _ in range(2)]
    (fmodel, diffopt), _ = (block.__enter__() for block in blocks)
    for _ in range(2):
        diffopt.step(functional.hardsigmoid(fmodel(x)).square().sum())
    (found,) = torch.autograd.grad(fmodel(x).square().sum(), model.bias)
    for block in blocks:
        block.__exit__(None, None, None)
    assert torch_private.function_mode() is None
    assert float(found.sum()) == pytest.approx(
        four_point(outer, 1e-4), rel=1e-6
    )  # torch rounds a sixth to 8 digits


# -- habits of published programs ------------------------------------------------------------------


def test_the_history_can_be_counted() -> None:
    model = nn.Linear(2, 1)
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (
        fmodel,
        diffopt,
    ):
        for _ in range(3):
            diffopt.step(fmodel(torch.ones(1, 2)).square().mean())
    assert len(fmodel._fast_params) == 4
    assert fmodel._fast_params[0] is not fmodel._fast_params[-1]
    assert {"_parameters", "_forward_pre_hooks", "training"} <= set(higher.patch._internal_attrs)


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
    ],
)
def test_parameters_are_cut_in_place(make: Any, used: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    base = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})

    def loss(m: Any) -> Tensor:
        found = (m["a"](x) - 1).square().mean()
        return found + m["b"](x).square().mean() if used else found

    model, plain = copy.deepcopy(base), copy.deepcopy(base)
    with higher.innerloop_ctx(model, make(model.parameters())) as (fmodel, diffopt):
        for t in range(3):
            if t == 2:
                for p in fmodel.fast_params:
                    p.detach_().requires_grad_()
            diffopt.step(loss(fmodel))
        assert all(p.requires_grad for p in fmodel.fast_params)
    optimizer = make(plain.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        loss(plain).backward()
        optimizer.step()
    for p, q in zip(fmodel.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def _hooked(hook: Any) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    x, model = torch.randn(4, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    model[2].register_full_backward_hook(hook)
    shift = torch.tensor(0.1, requires_grad=True)
    fmodel = higher.monkeypatch(model)
    fmodel.update_params([p + shift for p in fmodel.parameters()])
    return fmodel, x, shift


def test_a_hook_may_make_a_note_at_a_parameter() -> None:
    shapes: list[Any] = []

    def note(module: Any, grad_input: Any, grad_output: Any) -> None:
        module.weight.note = grad_output[0].detach()
        shapes.append((module.weight.shape, module.weight.dtype, module.weight.size(1)))

    fmodel, x, shift = _hooked(note)
    found = torch.autograd.grad(fmodel(x).sum(), shift)[0]
    params = {n: p.detach() for n, p in fmodel.named_parameters()}

    def plain(step: float) -> float:
        moved = {n: p.double() + step for n, p in params.items()}
        h = (x.double() @ moved["0.weight"].T + moved["0.bias"]).tanh()
        return float((h @ moved["2.weight"].T + moved["2.bias"]).sum())

    assert abs(found.item() - (plain(1e-5) - plain(-1e-5)) / 2e-5) < 1e-4
    assert torch.equal(fmodel[2].weight.note, torch.ones(4, 1))
    assert shapes == [(torch.Size([1, 3]), x.dtype, 3)]


@pytest.mark.parametrize(
    "compute",
    [
        lambda w, g: g @ w,
        lambda w, g: g * w.norm(),
        lambda w, g: g + w.data.sum(),
        lambda w, g: g + float(w.detach()[0, 0]),
        lambda w, g: g + torch.stack([w, w]).sum(),
        lambda w, g: w.grad,
        lambda w, g: setattr(w, "data", g),
        lambda w, g: g + torch.from_numpy(w.numpy()).sum(),
    ],
)
def test_a_hook_may_not_compute_with_a_parameter(compute: Any) -> None:
    fmodel, x, shift = _hooked(lambda module, _, given: compute(module.weight, given[0]))
    with pytest.raises(innerloop.NotDifferentiableError, match=r"'weight' was read during"):
        torch.autograd.grad(fmodel(x).sum(), shift)
