"""What changes between the steps of a tracked loop, and habits of plain PyTorch inside the block:
followed rightly, or refused by an error that shows the line to write."""

from __future__ import annotations

import copy
import io
import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.optimizer import register_optimizer_step_post_hook

import innerloop
from innerloop import higher, optim
from tests.networks import (
    adam,
    detached,
    direction,
    gradients,
    network,
    outer_value,
    sgd,
    train,
)
from tests.oracles import assert_derivative, assert_params, derivative
from tests.situations import STEPS, TwoLayers, along, features, regression, target

pytestmark = pytest.mark.usefixtures("float64")
INVALID, NOT_DIFFERENTIABLE = innerloop.InvalidInputError, innerloop.NotDifferentiableError


def refused(kind: type[Exception], *words: str) -> Any:
    """The error of that kind whose message has all of the words."""
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


def snapshot_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in detached(model).items()}


# -- facts that are read once ----------------------------------------------------------------------


def add_a_group(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": list(model.head.parameters())})


def replace_a_parameter(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(4, 3))


def freeze(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model.body.requires_grad_(False)


def hook_the_steps(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.register_step_post_hook(lambda *_: None)


@pytest.mark.parametrize("learn", ["init", "outer", "nothing"])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (add_a_group, "add_param_group"),
        (replace_a_parameter, "were replaced"),
        (freeze, "body.weight"),
        (hook_the_steps, "register_step_pre_hook"),
    ],
)
def test_a_change_of_the_users_own_objects(change: Callable[..., None], word: str, learn: Any):
    model = network()
    optimizer = torch.optim.SGD(model.body.parameters(), lr=0.1)
    with innerloop.track(model, optimizer, learn=learn) as loop:
        loop.step(regression(loop.model, 0))
        change(model, optimizer)
        with refused(INVALID, word):
            loop.step(regression(loop.model, 1))


def test_freezing_and_unfreezing_in_the_view():
    model = network()
    with (
        refused(INVALID, "freeze", "grad_callback"),
        innerloop.track(model, sgd(model)) as loop,
    ):
        loop.model.body.requires_grad_(False)
    model.body.requires_grad_(False)
    with innerloop.track(model, sgd(model)) as loop:
        loop.step(regression(loop.model, 0))
        loop.model.body.requires_grad_(True)
        with refused(INVALID, "body.weight", "grad_callback"):
            loop.step(regression(loop.model, 1))


def test_a_parameter_rests_where_the_callback_leaves_it_out():
    """The line that the error above shows; truth is torch, frozen in the same step."""

    def plain(h: float = 0.0) -> TwoLayers:
        model = network(h)
        optimizer = adam(model)
        for t in range(STEPS):
            model.body.requires_grad_(t != 1)
            for p in model.parameters():
                p.grad = None
            train(model, optimizer, steps=range(t, t + 1))
        return model

    model = network()
    with innerloop.track(model, adam(model)) as loop:
        for t in range(STEPS):

            def callback(grads: dict[str, Any], t: int = t) -> dict[str, Any]:
                return {n: g for n, g in grads.items() if t != 1 or not n.startswith("body")}

            loop.step(regression(loop.model, t), grad_callback=callback)
        outer = regression(loop.model, STEPS)
    outer.backward()
    assert_params(loop.parameters(), detached(plain()), 1e-12)


@pytest.mark.parametrize("front_end", ["track", "unroll", "higher"])
def test_hooks_on_every_optimizer(front_end: str):
    model = network()
    optimizer = sgd(model)
    handle = register_optimizer_step_post_hook(lambda *_: None)
    try:
        with refused(INVALID, "register_optimizer_step_pre_hook"):
            if front_end == "track":
                innerloop.track(model, optimizer)
            elif front_end == "unroll":
                optim.from_torch(optimizer, model)
            else:
                higher.get_diff_optim(optimizer, model.parameters())
    finally:
        handle.remove()


@pytest.mark.parametrize("front_end", ["track", "higher"])
def test_a_hook_after_accumulation(front_end: str):
    model = network()
    model.body.bias.register_post_accumulate_grad_hook(lambda p: None)
    with refused(INVALID, "register_post_accumulate_grad_hook", "grad_callback"):
        if front_end == "track":
            innerloop.track(model, sgd(model))
        else:
            higher.get_diff_optim(sgd(model), model.parameters())


class Wrapper(torch.optim.Optimizer):
    """As training frameworks hand out; it does not call the constructor of its base."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.inside = inside

    param_groups = property(lambda self: self.inside.param_groups)
    state = property(lambda self: self.inside.state)
    defaults = property(lambda self: self.inside.defaults)


def test_an_optimizer_behind_a_wrapper():
    model = network()
    wrapper = Wrapper(sgd(model))
    for make in (
        lambda: innerloop.track(model, wrapper),
        lambda: innerloop.track(model, [wrapper]),
        lambda: optim.from_torch(wrapper, model),
        lambda: higher.get_diff_optim(wrapper, model.parameters()),
    ):
        with refused(INVALID, "Wrapper", ".inside"):
            make()


def hook_a_parameter(view: Any) -> None:
    view.body.weight.register_hook(lambda g: 2 * g)


def hook_a_module(view: Any) -> None:
    view.body.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("hook", [hook_a_parameter, hook_a_module])
@pytest.mark.parametrize("front_end", ["track", "higher"])
def test_a_hook_that_comes_while_the_loop_runs(front_end: str, hook: Any, at: int):
    """On the running model; it would act on other gradients than in PyTorch, or twice."""
    model = network()
    with refused(INVALID, "hook", "grad_callback"):
        if front_end == "track":
            with innerloop.track(model, sgd(model)) as loop:
                for t in range(STEPS):
                    if t == at:
                        hook(loop.model)
                    loop.step(regression(loop.model, t))
        else:
            with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
                for t in range(STEPS):
                    if t == at:
                        hook(fmodel)
                    diffopt.step(regression(fmodel, t))


def test_a_forward_hook_may_come_while_the_loop_runs():
    model, seen = network(), []
    with innerloop.track(model, sgd(model)) as loop:
        for t in range(STEPS):
            if t == 1:
                loop.model.body.register_forward_hook(lambda *_: seen.append(1))
            loop.step(regression(loop.model, t))
    assert len(seen) == STEPS - 1


# -- where the loop runs ---------------------------------------------------------------------------


@pytest.mark.parametrize("learn", ["init", "nothing"])
def test_a_loop_under_no_grad(learn: Any):
    model = network()
    with torch.no_grad():
        with innerloop.track(model, sgd(model), learn=learn) as loop:
            for t in range(STEPS):
                loop.step(regression(loop.model, t))
        assert not torch.is_grad_enabled()
    assert_params(loop.parameters(), detached(train(start := network(), sgd(start))), 1e-12)


def test_a_model_from_outside_of_a_transform():
    model, x = network(), features(0)

    def behind(x: Tensor, model: TwoLayers) -> Tensor:
        with innerloop.track(model, sgd(model)) as loop:
            loop.step((loop.model(x) - target(0)).square().mean())
            return regression(loop.model, STEPS)

    with refused(INVALID, "torch.func", "inside"):
        torch.func.grad(behind)(x, model)
    with refused(INVALID, "torch.func", "inside"):
        torch.func.jvp(lambda x: behind(x, model), (x,), (x,))
    found = torch.func.grad(lambda x: behind(x, network()))(x)
    leaf = x.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(behind(leaf, network()), [leaf])
    assert_params({"x": found}, {"x": by_autograd}, 1e-12)


# -- old habits inside the block -------------------------------------------------------------------


@pytest.mark.parametrize("several", [True, False])
def test_the_usual_three_lines(several: bool):
    model = network()
    optimizers = (
        [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.body, model.head)]
        if several
        else [sgd(model)]
    )
    before = snapshot_of(model)
    with innerloop.track(model, optimizers) as loop:
        regression(loop.model, 0).backward()
        for optimizer in optimizers:
            with refused(INVALID, "loop.step(loss)", "optimizer.step()"):
                optimizer.step()
    assert_params(detached(model), before, 0)
    optimizers[-1].step()  # after the block it is the user's again
    assert not torch.equal(detached(model)["head.weight"], before["head.weight"])


@pytest.mark.parametrize(
    ("learn", "kind", "backward"),
    [
        ("init", INVALID, True),
        ("outer", NOT_DIFFERENTIABLE, True),
        ("nothing", NOT_DIFFERENTIABLE, True),
        ("outer", INVALID, False),
    ],
)
def test_a_scaler_inside_the_block(learn: Any, kind: type[Exception], backward: bool):
    model = network()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with refused(kind, "loop.step(loss)"), innerloop.track(model, optimizer, learn=learn) as loop:
        loss = scaler.scale(regression(loop.model, 0))
        if backward:
            loss.backward()
        scaler.step(optimizer)


def test_a_loop_in_a_loop_over_one_optimizer():
    """The hook that refuses its steps is no hook of the user's."""
    model = network()
    optimizer = sgd(model)
    with innerloop.track(model, optimizer) as outer_loop:
        with innerloop.track(model, optimizer) as loop:
            loop.step(regression(loop.model, 0))
        outer_loop.step(regression(outer_loop.model, 0))
    assert_params(outer_loop.parameters(), loop.parameters(), 0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
@pytest.mark.parametrize("learn", ["init", "outer", "nothing"])
@pytest.mark.parametrize("as_dict", [True, False])
def test_clipping_through_the_parameters(clip: Callable[..., Any], learn: Any, as_dict: bool):
    model = network()
    with innerloop.track({"net": model} if as_dict else model, sgd(model), learn=learn) as loop:
        for t in range(STEPS):
            view = loop.model["net"] if as_dict else loop.model
            view.zero_grad()  # looks at .grad too, and harms nobody
            loss = regression(view, t)
            with refused(INVALID, clip.__name__, "clip_by", "grad_callback"):
                clip(view.parameters(), 0.5)
            if learn != "nothing" and t == 0:
                with refused(INVALID, clip.__name__, "clip_by"):
                    clip(list(view.parameters()), 0.5)
            loop.step(loss)
    clip_grad_norm_(model.parameters(), 1.0)


def test_clipping_through_the_fast_parameters():
    model = network()
    with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
        loss = regression(fmodel, 0)
        with refused(INVALID, "clip_grad_norm_", "diffopt.step"):
            clip_grad_norm_(fmodel.body.parameters(), 0.5)
        diffopt.step(loss)


# -- weights that are edited -----------------------------------------------------------------------


def halve(model: TwoLayers) -> None:
    model.body.weight.data.mul_(0.5)


def clamp(model: TwoLayers) -> None:
    with torch.no_grad():
        model.body.weight.clamp_(-0.1, 0.1)


def load(model: TwoLayers) -> None:
    model.load_state_dict(detached(network()))


def average(model: TwoLayers) -> None:
    for p in model.parameters():
        p.data = 0.9 * p.data + 0.1 * torch.ones_like(p)


def average_in_place(model: TwoLayers) -> None:
    for p in model.parameters():
        p.data.mul_(0.9).add_(0.1)


def decay(model: TwoLayers) -> None:
    with torch.no_grad():
        model.head.weight.sub_(0.1 * model.head.weight)


def set_an_element(model: TwoLayers) -> None:
    with torch.no_grad():
        model.head.weight[0, 1] = 0.3


def initialise(model: TwoLayers) -> None:
    nn.init.zeros_(model.head.weight)


def average_of_many(model: TwoLayers) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(model.parameters()), [torch.ones(())] * 4, 0.1)


def through_numpy(model: TwoLayers) -> None:
    values = model.body.bias.detach().numpy()
    values *= 0.5


def swap_rows(model: TwoLayers) -> None:
    model.body.weight.data[[0, 1]] = model.body.weight.data[[1, 0]]


HABITS = [
    halve, clamp, load, average, average_in_place, decay, set_an_element, initialise,
    average_of_many, through_numpy, swap_rows,
]  # fmt: skip
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adam": adam,
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "groups": lambda model: torch.optim.Adam(
        [{"params": part.parameters()} for part in (model.head, model.body)]  # type: ignore[union-attr]
    ),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("edit", HABITS)
def test_an_edit_with_a_derivative(edit: Callable[[Any], None], at: int, optimizer: str):
    """At every step, and after the last one; nobody looks at operations from the third on."""
    model = network()
    with (
        refused(NOT_DIFFERENTIABLE, "was edited", "loop.assign"),
        innerloop.track(model, OPTIMIZERS[optimizer](model)) as loop,
    ):
        for t in range(5):
            if t == at:
                edit(loop.model)
            loop.step(regression(loop.model, t % STEPS))
        if at == 5:
            edit(loop.model)


def test_the_parameters_look_like_plain_tensors():
    """They are of a class of their own, of which nothing shows."""
    model = network()
    with innerloop.track(model, sgd(model)) as loop:
        loop.step(regression(loop.model, 0))
        weight = loop.model.body.weight
        assert repr(weight).startswith("tensor(")
        assert type(weight * 2) is Tensor
        assert type(weight.clone()) is Tensor
        stored = io.BytesIO()
        torch.save({n: p.detach() for n, p in loop.parameters().items()}, stored)
        stored.seek(0)
        loaded = torch.load(stored)
        assert {type(p) for p in loaded.values()} == {Tensor}
        stored = io.BytesIO()
        torch.save(loop.parameters(), stored)
        stored.seek(0)
        assert torch.equal(torch.load(stored)["body.weight"], weight)
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(weight)
        assert type(weight).__name__ == "Weight"
    assert {type(p) for t in (0, 1) for p in loop.parameters(t).values()} == {Tensor}
    with innerloop.track(model, sgd(model)) as loop:
        loop.step(regression(loop.model, 0))
        torch.testing.assert_close(loop.parameters(0)["body.weight"], model.body.weight)
        torch.testing.assert_close(model.body.weight, loop.parameters(0)["body.weight"])


def test_after_the_block_the_parameters_of_all_times_are_plain_tensors():
    model = network()
    with innerloop.track(model, sgd(model)) as loop:
        loop.step(lambda: regression(loop.model, 0))
        loop.step(regression(loop.model, 1), grad_callback=lambda grads: grads)
        loop.step(regression(loop.model, 2))
        with pytest.raises(innerloop.NonFiniteError):
            loop.step(regression(loop.model, 0) * torch.inf)
        loop.step(lambda: regression(loop.model, 0))
    assert {type(p) for t in range(5) for p in loop.parameters(t).values()} == {Tensor}


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("edit", [clamp, decay, set_an_element, initialise, average_of_many])
def test_an_edit_with_a_derivative_in_first_order(edit: Callable[[Any], None], at: int):
    """Those that PyTorch counts; others are seen in the first two steps only."""
    model = network()
    with (
        refused(NOT_DIFFERENTIABLE, "was edited", "loop.assign"),
        innerloop.track(model, sgd(model), first_order=True) as loop,
    ):
        for t in range(STEPS):
            if t == at:
                edit(loop.model)
            loop.step(regression(loop.model, t))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_edits_that_are_taken_back_or_recorded(optimizer: str):
    """Weights swapped for an evaluation, and edits with gradients on; truth is plain PyTorch."""

    def plain(h: float = 0.0) -> float:
        model = network(h)
        own = OPTIMIZERS[optimizer](model)
        for t in range(4):
            train(model, own, steps=range(t % STEPS, t % STEPS + 1))
            if t == 2:
                with torch.no_grad():
                    model.head.weight.mul_(0.5)
        return outer_value(model)

    model = network()
    with innerloop.track(model, OPTIMIZERS[optimizer](model)) as loop:
        for t in range(4):
            loop.step(regression(loop.model, t % STEPS))
            if t >= 2:
                kept = loop.model.body.weight.detach().clone()
                loop.model.body.weight.data.zero_()
                loop.model.body.weight.data.copy_(kept)
            if t == 2:
                loop.model.head.weight.mul_(0.5)
        outer = regression(loop.model, STEPS)
    outer.backward()
    assert_derivative(along(gradients(model), direction(model)), derivative(plain), "init")


@pytest.mark.parametrize("edit", HABITS)
def test_an_edit_where_nothing_is_learned(edit: Callable[[Any], None]):
    model = network()
    with innerloop.track(model, sgd(model), learn="nothing") as loop:
        loop.step(regression(loop.model, 0))
        edit(loop.model)


@pytest.mark.parametrize("at_the_end", [True, False])
def test_a_late_edit_under_no_grad(at_the_end: bool):
    """Nobody looks at operations any more; the parameters' versions tell."""
    model = network()
    with (
        refused(NOT_DIFFERENTIABLE, "'body.weight'", "was edited", "loop.assign"),
        innerloop.track(model, sgd(model)) as loop,
    ):
        for t in range(4):
            loop.step(regression(loop.model, t % STEPS))
        with torch.no_grad():
            loop.model.body.weight.mul_(0.5)
        if not at_the_end:
            loop.step(regression(loop.model, 0))


def test_copies_and_readings_are_no_edits():
    model = network()
    average = copy.deepcopy(model)
    with innerloop.track(model, sgd(model)) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
            for mean, p in zip(average.parameters(), loop.model.parameters(), strict=True):
                mean.data.mul_(0.9).add_(p.data, alpha=0.1)
            with torch.no_grad():
                (loop.model.body.weight * 2).clamp_(0, 1)
                loop.model.body.weight.clone().mul_(2)
                sum(p.norm().item() for p in loop.model.parameters())


@pytest.mark.parametrize("learn", ["init", "outer"])
def test_assigned_weights_keep_the_derivative(learn: Any):
    """Weights halved after each step; truth is finite differences of the run in plain PyTorch."""

    def plain(h: float = 0.0, lr: float = 0.05) -> float:
        model = network(h)
        optimizer = adam(model, lr=lr)
        for t in range(STEPS):
            train(model, optimizer, steps=range(t, t + 1))
            with torch.no_grad():
                model.body.weight.mul_(0.5)
        return outer_value(model)

    model, lr = network(), torch.tensor(0.05, requires_grad=True)
    with innerloop.track(model, adam(model), learn=learn, hyper={"lr": lr}) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
            loop.assign({"body.weight": 0.5 * loop.model.body.weight})
        outer = regression(loop.model, STEPS)
    outer.backward()
    assert lr.grad is not None
    assert_derivative(lr.grad.item(), derivative(lambda h: plain(lr=0.05 + h)), "lr")
    if learn == "init":
        assert_derivative(along(gradients(model), direction(model)), derivative(plain), "init")


def test_an_assigned_constant_and_a_tensor_from_outside():
    model, other = network(), torch.full((1, 4), 0.3, requires_grad=True)
    with innerloop.track(model, sgd(model), learn="outer") as loop:
        loop.step(regression(loop.model, 0))
        loop.assign({"head.weight": other})
        loop.step(regression(loop.model, 1))
    (by_other,) = torch.autograd.grad(loop.parameters()["head.weight"].sum(), other)
    assert by_other.abs().sum() > 0
    with innerloop.track(model, sgd(model)) as loop:
        loop.step(regression(loop.model, 0))
        loop.assign({"head.weight": torch.full((1, 4), 0.3)})
    head = loop.parameters()["head.weight"].sum()
    assert torch.autograd.grad(head, model.head.weight, allow_unused=True) == (None,)  # type: ignore[comparison-overlap]
    with refused(INVALID, "nothing"):
        loop.assign({"nothing": other})
    with refused(INVALID, "shape"):
        loop.assign({"head.weight": torch.zeros(3)})


def test_a_tensor_in_the_place_of_a_parameter():
    model = network()
    with (
        refused(INVALID, "'weight'", 'loop.assign({"body.weight": tensor})'),
        innerloop.track(model, sgd(model)) as loop,
    ):
        loop.model.body.weight = loop.model.body.weight * 0.5


def test_the_past_of_a_parameter_that_no_step_moved():
    """Torch moves it by the edits alone; the times before keep their own values."""
    for edit in ("add_", "assign"):
        model = network()
        model.extra = nn.Parameter(torch.ones(2))
        with innerloop.track(model, sgd(model)) as loop:
            loop.step(regression(loop.model, 0))
            if edit == "assign":
                loop.assign({"extra": loop.model.extra + 10})
            else:
                with torch.no_grad():
                    loop.model.extra.add_(10.0)
            assert loop.parameters(0)["extra"].tolist() == [1.0, 1.0]
            loop.step(regression(loop.model, 1))
        assert [loop.parameters(t)["extra"].tolist() for t in range(3)] == [
            [1, 1],
            [11, 11],
            [11, 11],
        ]


# -- callbacks -------------------------------------------------------------------------------------


def factor(g: Tensor) -> Tensor:
    return (0.1 / (g.norm() + 1e-6)).clamp(max=1.0)


def in_place_without_graph(gs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        for g in gs:
            g.mul_(factor(g))
    return gs


def new_without_graph(gs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [g * factor(g) for g in gs]


def in_place(gs: list[Tensor]) -> list[Tensor]:
    for g in gs:
        g.mul_(factor(g))
    return gs


def through_data(gs: list[Tensor]) -> list[Tensor]:
    for g in gs:
        g.data.mul_(factor(g.detach()))
    return gs


def replaced_data(gs: list[Tensor]) -> list[Tensor]:
    for g in gs:
        g.data = g.data * factor(g.detach())
    return gs


CLIPS = pytest.mark.parametrize(
    "clip", [in_place_without_graph, new_without_graph, in_place, through_data, replaced_data]
)


def by_name(clip: Callable[[list[Any]], list[Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda grads: dict(zip(grads, clip(list(grads.values())), strict=True))


@CLIPS
@pytest.mark.parametrize("front_end", ["track", "closure", "unroll", "higher", "hook"])
def test_clipping_that_autograd_does_not_see(clip: Any, front_end: str):
    model = network()
    with refused(NOT_DIFFERENTIABLE, "clip_by", "differentiable"):
        if front_end in ("track", "closure"):
            with innerloop.track(model, sgd(model)) as loop:
                loss = (
                    (lambda: regression(loop.model, 0))
                    if front_end == "closure"
                    else regression(loop.model, 0)
                )
                loop.step(loss, grad_callback=by_name(clip))
        elif front_end == "unroll":
            rule = optim.chain(optim.grad_callback(by_name(clip)), optim.sgd(lr=0.1))
            problem = innerloop.Problem(lambda p, h, b: (p["w"] ** 3).sum(), rule)
            innerloop.metagradient(
                lambda t, h: t.params["w"].sum(),
                problem,
                {"w": torch.ones(2)},
                None,
                steps=2,
                wrt="params",
            )
        elif front_end == "higher":
            with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
                diffopt.step(regression(fmodel, 0), grad_callback=clip)
        else:
            model.body.weight.register_hook(lambda g: clip([g])[0])
            with innerloop.track(model, sgd(model)) as loop:
                loop.step(regression(loop.model, 0))


def test_callbacks_that_autograd_sees_and_constants_that_are_meant():
    def scaled_in_place(grads: dict[str, Any]) -> dict[str, Any]:
        for g in grads.values():
            g.mul_(0.5)
        return grads

    def constant(grads: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            print(sum(g.norm() for g in grads.values()))
        return {
            n: g.detach() if n == "body.bias" else torch.zeros_like(g) for n, g in grads.items()
        }

    for callback in (
        scaled_in_place,
        constant,
        lambda grads: {n: g.sign() for n, g in grads.items()},
    ):
        model = network()
        with innerloop.track(model, sgd(model)) as loop:
            for t in range(STEPS):
                loop.step(regression(loop.model, t), grad_callback=callback)
            outer = regression(loop.model, STEPS)
        outer.backward()
    with innerloop.track(model, sgd(model), learn="nothing") as loop:
        loop.step(regression(loop.model, 0), grad_callback=by_name(in_place_without_graph))


# -- buffers and functions -------------------------------------------------------------------------


@pytest.mark.parametrize("front_end", ["track", "higher"])
@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_running_statistics_that_are_rewritten(reset: bool, evaluated: bool, front_end: str):
    torch.manual_seed(0)
    x, first = torch.randn(4, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    snapshot = {name: b.clone() for name, b in first.named_buffers()}

    def loss(model: Any, t: int) -> Tensor:
        model.train(not (evaluated and t == 0))
        if t and reset:
            model[1].reset_running_stats()
        elif t:
            model.load_state_dict(snapshot, strict=False)
        return model(x).sin().sum()

    def plain(h: float) -> float:
        model = copy.deepcopy(first)
        model[1].weight.data[1] += h  # type: ignore[index, operator]
        train(model, sgd(model), loss, steps=range(2))
        return model[0].weight.square().sum().item()  # type: ignore[operator]

    model = copy.deepcopy(first)
    if front_end == "track":
        with innerloop.track(model, sgd(model)) as loop:
            for t in range(2):
                loop.step(loss(loop.model, t))
        weight = loop.parameters()["0.weight"]
    else:
        with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, opt):
            for t in range(2):
                opt.step(loss(fmodel, t))
            weight = fmodel[0].weight
    (found,) = torch.autograd.grad(weight.square().sum(), model[1].weight)  # type: ignore[arg-type]
    assert_derivative(found[1].item(), derivative(plain), "scale")


class ByFunction(TwoLayers):
    """Its layers are also reached through functions that hold them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.calls = [0]
        body = self.body
        if how == "lambda":
            self.hidden: Any = lambda x: self.body(x).tanh()
        elif how == "default":
            self.hidden = lambda x, layer=self.body: layer(x).tanh()
        elif how == "keyword":
            self.hidden = lambda x, *, layer=self.body: layer(x).tanh()
        elif how == "nested":
            inner = lambda x: body(x)  # noqa: E731
            self.hidden = lambda x: inner(x).tanh()
        else:
            forward = self.body.forward
            self.body.forward = lambda x: forward(x).tanh()  # type: ignore[assignment, method-assign]
            self.hidden = self.body
        self.counting: Any = counter()

    def forward(self, x: Tensor) -> Tensor:
        self.counting()
        return self.head(self.hidden(x) + self.body(x))


def counter() -> Callable[[], int]:
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


@pytest.mark.parametrize("how", ["lambda", "default", "keyword", "nested", "forward"])
@pytest.mark.parametrize("front_end", ["track", "unroll", "higher"])
def test_a_layer_that_a_function_has_captured(how: str, front_end: str):
    model, truth = ByFunction(how), ByFunction(how)
    truth.load_state_dict(model.state_dict())
    if front_end == "track":
        with innerloop.track(model, sgd(model)) as loop:
            for t in range(STEPS):
                loop.step(regression(loop.model, t))
        found = loop.parameters()
    elif front_end == "unroll":
        rule = optim.from_torch(sgd(model), model)
        problem = innerloop.Problem.from_module(model, lambda m, h, t: regression(m, int(t)), rule)
        found = innerloop.unroll(
            problem, dict(model.named_parameters()), torch.arange(STEPS)
        ).params
    else:
        with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
            for t in range(STEPS):
                diffopt.step(regression(fmodel, t))
            found = dict(zip(detached(model), fmodel.parameters(), strict=True))
    before = snapshot_of(model)
    assert_params(dict(found), detached(train(truth, sgd(truth))), 1e-12)
    assert_params(detached(model), before, 0)


SWITCHED: dict[str, tuple[Any, str, list[Any]]] = {
    "sgd": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), "momentum", [0.9, 0.0, 0.9]),
    "rmsprop": (partial(torch.optim.RMSprop, eps=0.01, momentum=0.9), "momentum", [0.9, 0.0, 0.9]),
    "centered": (
        partial(torch.optim.RMSprop, eps=0.01, centered=True), "centered", [True, False, True],
    ),
    "centered from the first": (
        partial(torch.optim.RMSprop, eps=0.01), "centered", [True, True, True],
    ),
    "adam": (partial(torch.optim.Adam, eps=0.01, amsgrad=True), "amsgrad", [True, False, True]),
    "adam from the first": (partial(torch.optim.Adam, eps=0.01), "amsgrad", [True, True, True]),
    "adamw": (partial(torch.optim.AdamW, eps=0.01, amsgrad=True), "amsgrad", [True, False, True]),
}  # fmt: skip


@pytest.mark.parametrize("front", ["track", "bridge"])
@pytest.mark.parametrize("name", SWITCHED)
def test_a_setting_switched_off_and_on_keeps_what_was_kept(name: str, front: str) -> None:
    """As torch does: what a switched-off momentum had gathered is there when it is on again."""
    make, key, values = SWITCHED[name]

    def loss(model: Any, t: int) -> Tensor:
        return ((model.weight - 0.3 * (t + 1)).sin() * (t + 1)).sum()

    def fresh(h: float) -> nn.Linear:
        model = nn.Linear(2, 2, bias=False, dtype=torch.float64)
        start = torch.tensor([[0.2, -0.4], [0.7, 0.1]], dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(start + h)
        return model

    def plain(h: float) -> float:
        model = fresh(h)
        optimizer = make(model.parameters())
        for t, value in enumerate(values):
            optimizer.param_groups[0][key] = value
            optimizer.zero_grad()
            loss(model, t).backward()
            optimizer.step()
        return loss(model, 1).item()

    model = fresh(0.0)
    optimizer = make(model.parameters())
    if front == "track":
        with innerloop.track(model, optimizer) as loop:
            for t, value in enumerate(values):
                optimizer.param_groups[0][key] = value
                loop.step(loss(loop.model, t))
            loss(loop.model, 1).backward()
    else:
        with innerloop.higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (
            fmodel,
            diffopt,
        ):
            for t, value in enumerate(values):
                optimizer.param_groups[0][key] = value
                diffopt.step(loss(fmodel, t))
            loss(fmodel, 1).backward()
    assert model.weight.grad is not None
    assert_derivative(model.weight.grad.sum().item(), derivative(plain), name)


@pytest.mark.parametrize(
    ("make", "key"), [(torch.optim.Adam, "amsgrad"), (torch.optim.RMSprop, "centered")]
)
def test_what_is_switched_on_too_late_is_named(make: Any, key: str) -> None:
    """PyTorch fails there with a KeyError."""
    model = nn.Linear(2, 2, bias=False)
    optimizer = make(model.parameters())
    with innerloop.track(model, optimizer) as loop:
        loop.step(loop.model.weight.square().sum())
        optimizer.param_groups[0][key] = True
        with pytest.raises(innerloop.InvalidInputError, match=f"{key} was switched on after"):
            loop.step(loop.model.weight.square().sum())


class Two(nn.Module):
    """Two weights a and b, and the loss exp(b) a sin(a)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.b = nn.Parameter(torch.tensor([0.5, -0.3]))

    def forward(self) -> Tensor:
        return (self.b.exp() * self.a * self.a.sin()).sum()


def two_by_hand(a: Tensor, b: Tensor, first_order: bool) -> tuple[Tensor, Tensor]:
    """Three steps, after two of which a becomes a/2 + 2 b; the gradients are written out."""
    for t in range(3):
        of_a, of_b = b.exp() * (a.sin() + a * a.cos()), b.exp() * a * a.sin()
        if first_order:
            of_a, of_b = of_a.detach(), of_b.detach()
        a, b = a - 0.1 * of_a, b - 0.1 * of_b
        a = a / 2 + 2 * b if t < 2 else a
    return a, b


OF_TWO: dict[str, Callable[[nn.Module], Any]] = {
    # The first keeps all weights in one tensor, from which each comes out.
    "innerloop": lambda model: innerloop.optim.sgd(lr=0.1),
    "torch": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
}


@pytest.mark.parametrize("strategy", [None, innerloop.Checkpointed()], ids=repr)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("optimizer", OF_TWO)
def test_a_weight_that_is_computed_from_another_one(
    optimizer: str, first_order: bool, strategy: Any
) -> None:
    """The gradient of a step is a partial one: by b itself, not by b through a."""
    model = Two()
    with innerloop.track(
        model, OF_TWO[optimizer](model), first_order=first_order, strategy=strategy
    ) as loop:
        for t in range(3):
            loop.step(loop.model if strategy is not None else loop.model())
            if t < 2:
                loop.assign({"a": loop.model.a / 2 + 2 * loop.model.b})
        found = (loop.model.a, loop.model.b)
    same = Two()
    truth = two_by_hand(same.a, same.b, first_order)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad((found[0] * found[1]).sum(), list(model.parameters())),
        torch.autograd.grad((truth[0] * truth[1]).sum(), list(same.parameters())),
        rtol=1e-12,
        atol=1e-12,
    )


RECORDED: dict[str, Callable[[Any], object]] = {
    "add_": lambda model: model.a.add_(model.b),
    "copy_": lambda model: model.a.copy_(2 * model.b),
    "an entry": lambda model: model.a.__setitem__(0, model.b[1]),
}


@pytest.mark.parametrize("optimizer", OF_TWO)
@pytest.mark.parametrize("edit", RECORDED)
def test_a_recorded_edit_by_another_weight_is_refused(edit: str, optimizer: str) -> None:
    model = Two()
    with (
        refused(INVALID, "'a' of loop.model was edited in place", "'b'", "loop.assign({'a'"),
        innerloop.track(model, OF_TWO[optimizer](model)) as loop,
    ):
        loop.step(loop.model())
        RECORDED[edit](loop.model)
        loop.step(loop.model())


@pytest.mark.parametrize("optimizer", OF_TWO)
def test_a_recorded_edit_by_the_weight_itself_goes_on(optimizer: str) -> None:
    def run(by_assign: bool) -> Any:
        model = Two()
        with innerloop.track(model, OF_TWO[optimizer](model)) as loop:
            for _ in range(3):
                loop.step(loop.model())
                if by_assign:
                    loop.assign({"a": 0.5 * loop.model.a})
                else:
                    loop.model.a.mul_(0.5)
            return torch.autograd.grad(loop.model(), list(model.parameters()))

    torch.testing.assert_close(run(False), run(True), rtol=1e-12, atol=1e-12)


def test_an_optimizer_that_writes_to_what_it_is_given_leaves_the_history_alone():
    """It may not do so; the earlier times stay as they were all the same."""

    class Writing(innerloop.optim.Optimizer):
        def init(self, params: Any) -> Any:
            return ()

        def update(self, grads: Any, state: Any, params: Any, hyper: Any = None) -> Any:
            for name, g in grads.items():
                params[name] = params[name] - 0.1 * g
            return params, state

    model = network()
    with innerloop.track(model, Writing()) as loop:
        for t in range(3):
            loop.step(regression(loop.model, t))
    weights = [loop.parameters(t)["body.weight"] for t in range(4)]
    assert torch.equal(weights[0], model.body.weight)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(weights))
