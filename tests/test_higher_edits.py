"""Edits of a patched module's weights between steps that autograd does not see: named, or right."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import higher
from tests.networks import adam, direction, network, outer_value, sgd, train
from tests.oracles import assert_derivative, derivative
from tests.situations import STEPS, along, regression
from tests.test_track_changes import (
    HABITS,
    INVALID,
    NOT_DIFFERENTIABLE,
    refused,
)

pytestmark = pytest.mark.usefixtures("float64")

Edit = Callable[[Any], None]
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum": sgd,
    "adam": adam,
}
LOOP = 4


def scale_many(model: Any) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.5)


def copy_in(model: Any) -> None:
    with torch.no_grad():
        model.body.weight.copy_(0.5 * model.body.weight)


def scale(model: Any) -> None:
    with torch.no_grad():
        model.body.weight.mul_(0.5)


def from_vector(model: Any) -> None:
    length = sum(p.numel() for p in model.parameters())
    nn.utils.vector_to_parameters(torch.linspace(-0.5, 0.5, length), model.parameters())


def reset(model: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.head.reset_parameters()


def shrink(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p *= 0.9


REFUSED = [*HABITS, scale_many, copy_in, scale, from_vector, reset, shrink]


def noise(model: Any) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * direction(model)[name])


def noise_in_data(model: Any) -> None:
    for name, p in model.named_parameters():
        p.data += 0.1 * direction(model)[name]


def noise_of_many(model: Any) -> None:
    with torch.no_grad():
        torch._foreach_add_(list(model.parameters()), [0.1 * d for d in direction(model).values()])


def copied_sum(model: Any) -> None:
    weight = model.body.weight
    weight.data.copy_(weight.data + 0.1)


RIGHT = [noise, noise_in_data, noise_of_many, copied_sum]


def value_behind(make: Any, edit: Edit, times: range, h: float = 0.0) -> float:
    """The outer loss of plain PyTorch, its start moved by ``h``, edited before the steps."""
    model = network(h)
    optimizer = make(model)
    for t in range(LOOP):
        if t in times:
            edit(model)
        train(model, optimizer, steps=range(t % STEPS, t % STEPS + 1))
    if LOOP in times:
        edit(model)
    return outer_value(model)


def bridge_run(make: Any, edit: Edit, times: range, *, context: bool = True) -> float:
    """The derivative of the outer loss by the start on the bridge, along `direction`."""
    model = network()

    def train_on(fmodel: Any, diffopt: Any) -> None:
        for t in range(LOOP):
            if t in times:
                edit(fmodel)
            diffopt.step(regression(fmodel, t % STEPS))
        if LOOP in times:
            edit(fmodel)
        regression(fmodel, STEPS).backward()

    if context:
        with higher.innerloop_ctx(model, make(model), copy_initial_weights=False) as (f, d):
            train_on(f, d)
    else:
        f = higher.monkeypatch(model, copy_initial_weights=False)
        train_on(f, higher.get_diff_optim(make(model), model.parameters(), fmodel=f))
    return along({name: p.grad for name, p in model.named_parameters()}, direction(model))


@pytest.mark.covering(2)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("context", [True, False], ids=["context", "none"])
@pytest.mark.parametrize("at", [0, 1, 3, LOOP])
@pytest.mark.parametrize("edit", REFUSED)
def test_an_edit_with_a_derivative(edit: Edit, at: int, context: bool, make: Any):
    with refused(NOT_DIFFERENTIABLE, "was edited", "fmodel.update_params"):
        bridge_run(make, edit, range(at, at + 1), context=context)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("times", [range(LOOP + 1), range(3, 4)], ids=["each", "late"])
@pytest.mark.parametrize("edit", RIGHT)
def test_an_added_constant(edit: Edit, times: range, make: Any):
    truth = derivative(lambda h: value_behind(make, edit, times, h))
    assert_derivative(bridge_run(make, edit, times), truth, "start")
    # Outside of a block nobody sees what is done with .data.
    if edit in (noise, noise_of_many):
        assert_derivative(bridge_run(make, edit, times, context=False), truth, "start")
    else:
        with refused(NOT_DIFFERENTIABLE, "innerloop_ctx"):
            bridge_run(make, edit, times, context=False)


def scale_data(model: Any) -> None:
    model.body.weight.data.mul_(0.5)


def scale_data_and_set_it(model: Any) -> None:
    model.body.weight.data *= 0.5


@pytest.mark.parametrize("context", [True, False], ids=["context", "none"])
@pytest.mark.parametrize("scaled", [scale_data, scale_data_and_set_it])
@pytest.mark.parametrize("noise_first", [True, False])
def test_an_edit_beside_an_added_constant(noise_first: bool, scaled: Edit, context: bool):
    """What is right does not hide what is not."""

    def both(model: Any) -> None:
        for edit in (noise, scaled) if noise_first else (scaled, noise):
            edit(model)

    with refused(NOT_DIFFERENTIABLE, "'body.weight'"):
        bridge_run(sgd, both, range(1, 2), context=context)


def test_an_array_beside_an_added_constant():
    """No mode sees what is written through numpy."""

    def both(model: Any) -> None:
        model.body.bias.detach().numpy()[:] *= 0.5
        noise(model)

    with refused(NOT_DIFFERENTIABLE, "'body.bias'"):
        bridge_run(sgd, both, range(1, 2))
    model = network()
    with (
        refused(NOT_DIFFERENTIABLE, "'body.bias'"),
        innerloop.track(model, sgd(model)) as loop,
    ):
        loop.step(regression(loop.model, 0))
        both(loop.model)
        loop.step(regression(loop.model, 1))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_line_that_the_error_shows(make: Any):
    """It is taken out of the message and run; truth is the edit that was refused, in PyTorch."""
    with pytest.raises(NOT_DIFFERENTIABLE) as error:
        bridge_run(make, scale, range(1, 2))
    message = str(error.value)
    line = message[message.index("fmodel.update_params") : message.index(", with gradients on")]

    def written(fmodel: Any) -> None:
        eval(line, {"fmodel": fmodel})  # noqa: S307

    truth = derivative(lambda h: value_behind(make, scale, range(1, 4), h))
    assert_derivative(bridge_run(make, written, range(1, 4)), truth, "start")


@pytest.mark.parametrize("edit", REFUSED)
def test_an_edit_where_nothing_is_differentiated(edit: Edit):
    """Values are those of plain PyTorch with the edit in it."""
    model, twin = network(), network()
    optimizer = adam(twin)
    with higher.innerloop_ctx(model, adam(model), track_higher_grads=False) as (fmodel, diffopt):
        for t in range(STEPS):
            edit(fmodel)
            diffopt.step(regression(fmodel, t))
            edit(twin)
            train(twin, optimizer, steps=range(t, t + 1))
        assert regression(fmodel, STEPS).item() == pytest.approx(outer_value(twin), rel=1e-12)


@pytest.mark.parametrize("edit", REFUSED)
def test_an_edit_of_copies_before_the_first_step(edit: Edit):
    """They are leaves, of which no derivative leads anywhere: a start that is loaded, say."""

    def plain(lr: float) -> float:
        model = network()
        edit(model)
        return outer_value(train(model, sgd(model, lr=lr)))

    model, lr = network(), torch.tensor(0.1, requires_grad=True)
    with higher.innerloop_ctx(model, sgd(model), override={"lr": [lr]}) as (fmodel, diffopt):
        edit(fmodel)
        for t in range(STEPS):
            diffopt.step(regression(fmodel, t))
        (found,) = torch.autograd.grad(regression(fmodel, STEPS), lr)
    assert_derivative(found.item(), derivative(lambda h: plain(0.1 + h)), "lr")


def test_weights_that_are_cut_in_place_may_be_edited():
    """Truncated differentiation as programs write it; truth is the last step alone."""
    lr = torch.tensor(0.1, requires_grad=True)

    def plain(last: float) -> float:
        model = network()
        optimizer = sgd(model)
        for t in range(STEPS):
            optimizer.param_groups[0]["lr"] = last if t == STEPS - 1 else 0.1
            train(model, optimizer, steps=range(t, t + 1))
            if t < STEPS - 1:
                shrink(model)
        return outer_value(model)

    model = network()
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), 0.1, 0.9)) as (f, d):
        for t in range(STEPS):
            d.step(regression(f, t), override={"lr": [lr if t == STEPS - 1 else 0.1]})
            if t < STEPS - 1:
                for p in f.parameters():
                    p.detach_()
                    p.mul_(0.9)
                    p.requires_grad_()
                for state in d.state:
                    for kept in state.values():
                        kept["momentum_buffer"] = kept["momentum_buffer"].detach()
        (found,) = torch.autograd.grad(regression(f, STEPS), lr)
    assert_derivative(found.item(), derivative(lambda h: plain(0.1 + h)), "lr")


def test_readings_copies_and_evaluations_are_no_edits():
    model = network()
    truth = bridge_run(sgd, lambda model: None, range(0))
    average = copy.deepcopy(model)

    def look(fmodel: Any) -> None:
        for mean, p in zip(average.parameters(), fmodel.parameters(), strict=True):
            mean.data.mul_(0.9).add_(p.data, alpha=0.1)
        fmodel.state_dict()
        copy.deepcopy(fmodel)
        kept = fmodel.body.weight.detach().clone()
        with torch.no_grad():
            regression(fmodel, 0)
            (fmodel.body.weight * 2).clamp_(0, 1)
        assert repr(fmodel.body.weight).startswith("tensor(")
        assert torch.equal(kept, fmodel.body.weight)

    assert bridge_run(sgd, look, range(LOOP + 1)) == pytest.approx(truth, rel=1e-12)


def test_an_evaluation_is_not_kept_in_memory():
    model = network()
    with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
        diffopt.step(regression(fmodel, 0))
        with torch.no_grad():
            hidden = fmodel.body(torch.ones(5, 3))
        seen = weakref.ref(hidden)
        del hidden
        gc.collect()
        assert seen() is None


def test_nested_loops_watch_their_own_weights():
    model = network()
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (outer, d):
        d.step(regression(outer, 0))
        with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (inner, e):
            e.step(regression(inner, 0))
            noise(inner)
            with refused(NOT_DIFFERENTIABLE, "'body.weight'"):
                scale(inner)
            with refused(NOT_DIFFERENTIABLE, "'body.weight'"):
                scale(outer)
            e.step(regression(inner, 1))
        d.step(regression(outer, 1))
    assert {type(p) for p in [*outer.parameters(), *inner.parameters()]} == {Tensor}


def edit_in_the_loss(fmodel: Any, diffopt: Any) -> None:
    def loss() -> Tensor:
        fmodel.body.weight.data.mul_(0.5)
        return regression(fmodel, 1)

    diffopt.step(loss)


def edit_in_the_callback(fmodel: Any, diffopt: Any) -> None:
    def callback(grads: list[Tensor]) -> list[Tensor]:
        fmodel.body.weight.data.mul_(0.5)
        return grads

    diffopt.step(regression(fmodel, 1), grad_callback=callback)


@pytest.mark.parametrize("step", [edit_in_the_loss, edit_in_the_callback])
def test_an_edit_inside_of_a_step(step: Any):
    model = network()
    with (
        refused(NOT_DIFFERENTIABLE, "'body.weight'", "update_params"),
        higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt),
    ):
        diffopt.step(regression(fmodel, 0))
        step(fmodel, diffopt)


def test_freezing_in_the_loop_and_the_line_that_the_error_shows():
    """Truth is PyTorch, frozen in the same step."""

    def plain(h: float) -> float:
        model = network(h)
        optimizer = adam(model)
        for t in range(STEPS):
            model.body.requires_grad_(t != 1)
            for p in model.parameters():
                p.grad = None
            train(model, optimizer, steps=range(t, t + 1))
        return outer_value(model)

    model = network()
    with (  # noqa: PT012
        pytest.raises(INVALID, match="requires_grad") as error,
        higher.innerloop_ctx(model, adam(model)) as (fmodel, diffopt),
    ):
        diffopt.step(regression(fmodel, 0))
        fmodel.body.requires_grad_(False)
    message = str(error.value)
    line = message[message.index("diffopt.step(loss") :]
    with higher.innerloop_ctx(model, adam(model), copy_initial_weights=False) as (fmodel, diffopt):
        for t in range(STEPS):
            resting = {"body.weight", "body.bias"} if t == 1 else set()
            names = {"fmodel": fmodel, "diffopt": diffopt, "resting": resting}
            eval(line, {**names, "loss": regression(fmodel, t)})  # noqa: S307
        regression(fmodel, STEPS).backward()
    found = along({name: p.grad for name, p in model.named_parameters()}, direction(model))
    assert_derivative(found, derivative(plain), "start")


def load_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def clear_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


@pytest.mark.parametrize("front_end", ["track", "higher"])
@pytest.mark.parametrize("change", [load_state, clear_state])
def test_the_state_of_the_torch_optimizer_in_the_loop(change: Any, front_end: str):
    """The loop has a copy: a reset would have no effect."""
    model = network()
    optimizer = adam(model)
    train(model, optimizer)
    with refused(INVALID, "state of the torch optimizer", "load"):
        if front_end == "track":
            with innerloop.track(model, optimizer) as loop:
                loop.step(regression(loop.model, 0))
                change(optimizer)
                loop.step(regression(loop.model, 1))
        else:
            with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
                diffopt.step(regression(fmodel, 0))
                change(optimizer)
                diffopt.step(regression(fmodel, 1))


def test_a_committed_state_is_no_change():
    model = network()
    optimizer = adam(model)
    with innerloop.track(model, optimizer) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
            loop.commit()
    assert len(optimizer.state) == 4
