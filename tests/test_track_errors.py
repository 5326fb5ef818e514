"""What `innerloop.track` refuses, and what an exception leaves behind: each error says what was
passed and what to write."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

import innerloop
from tests.networks import adam, gradients, leaf, network, outer_value, sgd, train
from tests.oracles import smooth_noise
from tests.situations import SEED, STEPS, TwoLayers, features, regression
from tests.small_problems import Once
from tests.test_module_situations import Everything

pytestmark = pytest.mark.usefixtures("float64")
INVALID, NOT_DIFFERENTIABLE = innerloop.InvalidInputError, innerloop.NotDifferentiableError


def refused(kind: type[Exception], *words: str) -> Any:
    """The error of that kind whose message has all of the words."""
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


# -- an exception inside the block -----------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("learn", ["init", "outer", "nothing"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_an_exception_leaves_everything_as_it_was(learn: Any, where: str):
    """The user's module, optimizer and gradients; the random numbers are those that a plain loop
    would have drawn."""

    def noisy(model: nn.Module, t: int) -> Tensor:
        return regression(lambda x: model(F.dropout(x, 0.5)), t)

    model = network()
    optimizer = adam(model)
    train(model, optimizer)
    for p in model.parameters():
        p.grad = None
    before = Everything(model, [optimizer])

    def interrupted() -> None:
        with innerloop.track(model, optimizer, learn=learn) as loop:
            loop.step(noisy(loop.model, 0))
            loss = noisy(loop.model, 1)
            if where == "after":
                loop.step(loss)
            raise Interrupted

    torch.manual_seed(SEED)
    with pytest.raises(Interrupted):
        interrupted()
    after = torch.get_rng_state()
    before.assert_unchanged()
    torch.manual_seed(SEED)
    noisy(model, 0), noisy(model, 1)
    assert torch.equal(torch.get_rng_state(), after)
    with innerloop.track(model, optimizer, learn=learn) as loop:  # and all of it can be used again
        loop.step(noisy(loop.model, 0))


def test_a_refused_call_leaves_everything_as_it_was():
    model = network()
    optimizer = sgd(model)
    before = Everything(model, [optimizer])
    state = torch.get_rng_state()
    with pytest.raises(INVALID):
        innerloop.track(model, optimizer, params={"nobody": torch.zeros(1)})
    with pytest.raises(INVALID), innerloop.track(model, optimizer) as loop:
        loop.step(regression(loop.model, 0) * float("nan"))
    before.assert_unchanged()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_refused_step_does_not_count():
    """The loop stands where it stood and can go on."""
    model, plain = network(), network()
    with innerloop.track(model, sgd(model)) as loop:
        for t in range(STEPS):
            with pytest.raises(INVALID):
                loop.step(regression(loop.model, t), hyper={"nothing": 1.0})
            with pytest.raises(INVALID):
                loop.step(model(features(t)).sum())
            loop.step(regression(loop.model, t))
    assert loop.trajectory.steps == STEPS
    train(plain, sgd(plain))
    torch.testing.assert_close(
        loop.parameters()["head.weight"], plain.head.weight, rtol=1e-12, atol=0
    )


# -- arguments of track ----------------------------------------------------------------------------


def tied_in_a_tuple() -> nn.Module:
    model = network()
    setattr(model, "kept", (model.body.weight,))  # noqa: B010
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(2))


def scripted() -> nn.Module:
    with pytest.warns(
        (DeprecationWarning, FutureWarning), match="torch.jit.script"
    ):  # the latter from 2.15 on
        return torch.jit.script(nn.Linear(1, 1))


def with_step_hook(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = sgd(model)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


class WithOwnStep(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


OURS = innerloop.optim.sgd(lr=0.1)
TRACK: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "model is a function": (lambda: innerloop.track(lambda x: x, OURS), ["nn.Module", "function"]),  # type: ignore[arg-type]
    "model is a dict of numbers": (lambda: innerloop.track({"a": 3}, OURS), ["nn.Module", "int"]),  # type: ignore[dict-item]
    "model without parameters": (lambda: innerloop.track(nn.Tanh(), OURS), ["parameter"]),
    "model that is lazy": (
        lambda: innerloop.track(lazy(), OURS),
        ["0.weight", "not initialised", "example batch"],
    ),
    "model that is scripted": (
        lambda: innerloop.track(scripted(), OURS),
        ["ScriptModule", "pass the Python module"],
    ),
    "parameter in a tuple": (
        lambda: innerloop.track(tied_in_a_tuple(), OURS),
        ["body.weight", "tuple", "list"],
    ),
    "learn": (
        lambda: innerloop.track(network(), OURS, learn="all"),  # type: ignore[arg-type]
        ["'all'", '"init"', '"outer"', '"nothing"'],
    ),
    "params: unknown name": (
        lambda: innerloop.track(network(), OURS, params={"w": torch.ones(1)}),
        ["'w'", "body.weight"],
    ),
    "params: shape": (
        lambda: innerloop.track(network(), OURS, params={"head.weight": torch.ones(4)}),
        ["head.weight", "(4,)", "(1, 4)"],
    ),
    "params: dtype": (
        lambda: innerloop.track(
            network(), OURS, params={"head.weight": torch.ones(1, 4, dtype=torch.float32)}
        ),
        ["head.weight", "float32", "float64"],
    ),
    "hyper is a tensor": (
        lambda: innerloop.track(network(), OURS, hyper=torch.ones(2)),  # type: ignore[arg-type]
        ["hyper", "Tensor"],
    ),
    "optimizer is a string": (
        lambda: innerloop.track(network(), "sgd"),  # type: ignore[arg-type]
        ["str", "torch.optim", "innerloop.optim"],
    ),
    "optimizer of another model": (
        lambda: innerloop.track(network(), sgd(network())),
        ["4 tensor(s)", "(4, 3)", "not parameters of the model"],
    ),
    "optimizer with a step of its own": (
        lambda: innerloop.track(m := network(), WithOwnStep(m.parameters(), lr=0.1)),
        ["WithOwnStep", "SGD"],
    ),
    "optimizer with step hooks": (
        lambda: innerloop.track(m := network(), with_step_hook(m)),
        ["hook", "grad_callback"],
    ),
    "a parameter in two optimizers": (
        lambda: innerloop.track(m := network(), [sgd(m), sgd(m.body)]),
        ["body.weight"],
    ),
}


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("case", list(TRACK))
def test_track_refuses(case: str):
    call, words = TRACK[case]
    with refused(INVALID, *words):
        call()


@pytest.mark.filterwarnings("ignore")
def test_track_refuses_a_distributed_module():
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network())
        with refused(INVALID, "DistributedDataParallel", "model.module"):
            innerloop.track(wrapped, OURS)
    finally:
        distributed.destroy_process_group()


def test_track_under_inference_mode():
    with torch.inference_mode(), refused(INVALID, "inference_mode"):
        innerloop.track(network(), OURS)


def test_track_inside_vmap():
    model = network()

    def adapted(x: Tensor) -> Tensor:
        with innerloop.track(model, sgd(model)) as loop:
            loop.step(loop.model(x).square().mean())
            return loop.model(x).square().mean()

    x = smooth_noise(2, 5, 3)
    for call in (torch.func.vmap(adapted), torch.func.vmap(torch.func.grad(adapted))):
        with refused(innerloop.InnerLoopError, "vmap", "unroll"):
            call(x)


# -- the loss --------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[Callable[[Any, Any], Any], list[str]]] = {
    "NaN": (lambda inner, own: regression(inner, 0) * float("nan"), ["step 0", "nan", "diverged"]),
    "Inf": (lambda inner, own: regression(inner, 0) * float("inf"), ["step 0", "inf", "diverged"]),
    "not a scalar": (lambda inner, own: inner(features(0)), ["(6, 1)", "scalar", ".mean()"]),
    "a number": (lambda inner, own: regression(inner, 0).item(), ["scalar tensor", "float"]),
    "None": (lambda inner, own: None, ["scalar tensor", "NoneType"]),
    "a function that returns a number": (lambda inner, own: lambda: 3, ["scalar tensor", "int"]),
    "a function that returns what it found": (
        lambda inner, own: (lambda found: lambda: found)(regression(inner, 0)),
        ["depends on none", "loop.model"],
    ),
    "complex": (lambda inner, own: regression(inner, 0) * 1j, ["complex128", "real"]),
    "an integer": (lambda inner, own: torch.tensor(3), ["int64", "floating point"]),
    "detached": (lambda inner, own: regression(inner, 0).detach(), ["detached", "loop.model"]),
    "a constant leaf": (lambda inner, own: leaf(1.0), ["loop.model"]),
    "of the user's model": (
        lambda inner, own: regression(own, 0),
        ["loop.model", "passed to track"],
    ),
    "of the user's model in part": (
        lambda inner, own: F.mse_loss(own.head(inner.body(features(0)).tanh()), features(0)[:, :1]),
        ["head.weight", "loop.model"],
    ),
}


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("learn", ["init", "outer", "nothing"])
@pytest.mark.parametrize("case", list(LOSSES))
def test_a_loss_that_cannot_be_stepped(case: str, learn: Any):
    make, words = LOSSES[case]
    model = network()
    with innerloop.track(model, sgd(model), learn=learn) as loop, refused(INVALID, *words):
        loop.step(make(loop.model, model))


def test_a_later_loss_that_is_not_finite_names_its_step():
    model = network()
    with innerloop.track(model, sgd(model)) as loop:
        loop.step(regression(loop.model, 0))
        loop.step(regression(loop.model, 1))
        with refused(INVALID, "step 2", "nan"):
            loop.step(regression(loop.model, 2).log() * 0 + float("nan"))


def test_a_loss_under_no_grad():
    model = network()
    with innerloop.track(model, sgd(model)) as loop, torch.no_grad(), refused(INVALID, "no_grad"):
        loop.step(regression(loop.model, 0))


def test_a_loss_of_before_the_last_step():
    """Computed twice and stepped twice, or the same one again."""
    model = network()
    with innerloop.track(model, sgd(model)) as loop:
        early, stale = regression(loop.model, 0), regression(loop.model, 1)
        loop.step(early)
        for loss in (stale, early):
            with refused(INVALID, "as they are now", "anew after each step"):
                loop.step(loss)


def test_a_model_that_is_all_frozen():
    model = network().requires_grad_(False)
    with innerloop.track(model, sgd(model)) as loop, refused(INVALID, "frozen", "requires_grad"):
        loop.step(regression(loop.model, 0))


def test_an_optimizer_whose_parameters_the_loss_does_not_use():
    model = network()
    optimizer = torch.optim.SGD(model.body.parameters(), lr=0.1)
    with innerloop.track(model, optimizer) as loop, refused(INVALID, "none of the 2 parameters"):
        loop.step(loop.model.head.weight.square().sum())


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_is_reached_around_the_copy():
    """Through an object that is no module: there it is the user's own layer that computes."""

    class Helper:
        def __init__(self, layer: nn.Module) -> None:
            self.layer = layer

    class Around(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.helper = Helper(self.body)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.helper.layer(x).tanh())

    model = Around()
    with innerloop.track(model, sgd(model)) as loop, refused(INVALID, "body.weight", "closure"):
        loop.step(regression(loop.model, 0))


def test_a_parameter_that_was_taken_away():
    model = network()
    with innerloop.track(model, sgd(model)) as loop:
        loop.step(regression(loop.model, 0))
        loop.model.head.register_parameter("bias", None)
        with refused(INVALID, "'head.bias'", "None"):
            loop.step(regression(loop.model, 1))


# -- compiled losses -------------------------------------------------------------------------------


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, backend="aot_eager")


COMPILED: dict[str, Callable[[Any, int], Tensor]] = {
    "last part": lambda model, t: compiled(lambda out: F.mse_loss(out, features(t)[:, :1]))(
        model(features(t))
    ),
    "middle": lambda model, t: (
        model.head(compiled(torch.tanh)(model.body(features(t)))).square().mean()
    ),
    "whole": lambda model, t: compiled(lambda x: F.mse_loss(model(x), features(t)[:, :1]))(
        features(t)
    ),
    "model": lambda model, t: F.mse_loss(compiled(model)(features(t)), features(t)[:, :1]),
    "regulariser": lambda model, t: (
        regression(model, t) + compiled(lambda w: w.pow(3).sum())(model.body.weight)
    ),
}


# torch.compile looks at the .grad of everything that it is given, which torch warns about.
ASKS_FOR_GRAD = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)


@ASKS_FOR_GRAD
@pytest.mark.compiled
@pytest.mark.parametrize("learn", ["init", "outer"])
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("part", list(COMPILED))
def test_a_compiled_loss(part: str, step: int, learn: Any):
    """torch drops the second-order term through compiled code, in part without an error: at
    whichever step it first occurs."""
    model = network()
    with (
        refused(NOT_DIFFERENTIABLE, "torch.compile", "uncompiled"),
        innerloop.track(model, sgd(model), learn=learn, hyper={"lr": leaf(0.1)}) as loop,
    ):
        for t in range(step):
            loop.step(regression(loop.model, t))
        loop.step(COMPILED[part](loop.model, step))


@ASKS_FOR_GRAD
@pytest.mark.compiled
@pytest.mark.parametrize("arguments", [{"learn": "nothing"}, {"first_order": True}], ids=str)
def test_a_compiled_loss_where_no_second_derivative_is_taken(arguments: dict[str, Any]):
    found = []
    for loss in (
        COMPILED["whole"],
        lambda model, t: F.mse_loss(model(features(t)), features(t)[:, :1]),
    ):
        model = network()
        with innerloop.track(model, sgd(model), **arguments) as loop:
            for t in range(2):
                loop.step(loss(loop.model, t))
            outer = loss(loop.model, 2)
        if "first_order" in arguments:
            outer.backward()
        found.append((outer.item(), gradients(model)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


@ASKS_FOR_GRAD
@pytest.mark.compiled
def test_an_outer_loss_with_the_model_may_be_compiled_after_the_block():
    model = network()
    with innerloop.track(model, sgd(model)) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
    weights = [loop.parameters(t)["body.weight"] for t in (1, STEPS)]
    outer = torch.stack([compiled(lambda w: w.pow(3).sum())(w) for w in weights]).sum()
    again = torch.stack([w.pow(3).sum() for w in weights]).sum()
    own = list(model.parameters())
    found = torch.autograd.grad(outer, own, retain_graph=True, allow_unused=True)
    truth = torch.autograd.grad(again, own, allow_unused=True)
    torch.testing.assert_close(found[0], truth[0], rtol=1e-12, atol=1e-14)


@ASKS_FOR_GRAD
@pytest.mark.compiled
def test_the_outer_loss_may_be_compiled():
    model = network()
    with innerloop.track(model, sgd(model)) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
        out = loop.model(features(STEPS))
        compiled(lambda out: out.square().mean())(out).backward(retain_graph=True)
    ours = gradients(model)
    again = torch.autograd.grad(out.square().mean(), list(model.parameters()))
    torch.testing.assert_close(list(ours.values()), list(again), rtol=1e-12, atol=1e-14)


# -- hyper, grad_callback, time --------------------------------------------------------------------

STEP: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown hyper-parameter": ({"hyper": {"beta": 0.1}}, ["'beta'"]),
    "one entry per group": ({"hyper": {"lr": [0.1, 0.2]}}, ["'lr'", "2", "1 group"]),
    "a vector": ({"hyper": {"lr": torch.ones(3)}}, ["'lr'", "(3,)", "per parameter"]),
    "some parameters only": (
        {"hyper": {"lr": {"head.bias": torch.ones(1)}}},
        ["'lr'", "body.weight"],
    ),
    "a negative rate": ({"hyper": {"lr": -0.1}}, ["lr=-0.1"]),
    "a negative rate for one": (
        {"hyper": {"lr": {n: -0.1 for n, _ in TwoLayers().named_parameters()}}},
        ["lr", "-0.1"],
    ),
    "callback returns nothing": (
        {"grad_callback": lambda grads: None},
        ["grad_callback", "NoneType"],
    ),
    "callback returns a list": (
        {"grad_callback": lambda grads: list(grads.values())},
        ["grad_callback", "list"],
    ),
    "callback: unknown name": (
        {"grad_callback": lambda grads: {**grads, "nobody": torch.ones(1)}},
        ["nobody"],
    ),
    "callback: wrong shape": (
        {"grad_callback": lambda grads: {**grads, "head.bias": torch.ones(2)}},
        ["head.bias", "(2,)", "(1,)"],
    ),
}


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("case", list(STEP))
def test_step_refuses(case: str):
    arguments, words = STEP[case]
    model = network()
    with innerloop.track(model, sgd(model)) as loop, refused(INVALID, *words):
        loop.step(regression(loop.model, 0), **arguments)


@pytest.mark.parametrize("learn", ["init", "outer"])
def test_a_time_that_does_not_exist(learn: Any):
    model = network()
    with innerloop.track(model, sgd(model), learn=learn) as loop:
        loop.step(regression(loop.model, 0))
        for ask in (loop.parameters, loop.buffers, loop.trajectory.at):
            for time in (2, -3):
                with refused(INVALID, f"time {time}", "0 to 1"):
                    ask(time)


def test_nothing_knows_the_first_and_the_last_time_only():
    model = network()
    with innerloop.track(model, sgd(model), learn="nothing") as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
        for ask in (loop.parameters, loop.buffers, loop.trajectory.at):
            ask(0), ask(-1), ask(STEPS)
            with refused(INVALID, "time 1", 'learn="nothing"', '"init"'):
                ask(1)


# -- an outer loss that reaches nothing ------------------------------------------------------------


def steps_then(outer: Callable[[Any], Tensor], **arguments: Any) -> Tensor:
    model = network()
    with innerloop.track(model, sgd(model), **arguments) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
        return outer(loop.model)


def behind(model: nn.Module) -> Tensor:
    return regression(model, STEPS)


def test_nothing_has_no_outer_gradient():
    with refused(NOT_DIFFERENTIABLE, 'learn="nothing"', '"init"', '"outer"'):
        steps_then(behind, learn="nothing").backward()
    weight = leaf(2.0)
    outer = weight * steps_then(behind, learn="nothing")
    (gradient,) = torch.autograd.grad(outer, weight)  # what only the outer loss uses is there
    model = network()
    assert gradient.item() == pytest.approx(outer_value(train(model, sgd(model))), rel=1e-12)


def test_outer_with_nothing_outside():
    with refused(NOT_DIFFERENTIABLE, 'learn="outer"', '"init"', "hyper-parameters"):
        steps_then(behind, learn="outer").backward()


def test_outer_after_a_detach():
    model = network()
    with innerloop.track(model, sgd(model)) as loop:
        loop.step(regression(loop.model, 0))
        loop.detach()
        loop.step(regression(loop.model, 1))
        outer = regression(loop.model, 2)
    with refused(NOT_DIFFERENTIABLE, "detach", "start of the loop"):
        outer.backward()


def test_first_order_does_not_reach_what_is_only_in_the_inner_loss():
    """Its inner gradients are constants, so the weight of an inner loss has no influence: not None,
    an error."""
    weight = leaf(1.0)
    model = network()
    with innerloop.track(model, sgd(model), learn="outer", first_order=True) as loop:
        loop.step(weight * regression(loop.model, 0))
        outer = regression(loop.model, 1)
    with refused(NOT_DIFFERENTIABLE, "first_order"):
        outer.backward()


def test_params_that_do_not_require_grad_reach_nothing():
    model = network()
    start = {name: p.detach() for name, p in model.named_parameters()}
    with innerloop.track(model, sgd(model), params=start) as loop:
        loop.step(regression(loop.model, 0))
        outer = regression(loop.model, 1)
    with refused(NOT_DIFFERENTIABLE, "reaches no"):
        outer.backward()


def scaled(grads: dict[str, Tensor | None], by: Tensor) -> dict[str, Tensor | None]:
    return {name: None if g is None else g * by for name, g in grads.items()}


@pytest.mark.parametrize("where", ["hyper", "step", "optimizer", "loss", "callback", "params"])
def test_whatever_it_reaches_is_found(where: str):
    """No false alarm: a single outside tensor, used once, in each place where one can be used, at
    the first or the last step."""
    for at in (0, STEPS - 1):
        model, outside = network(), leaf(0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=outside if where == "optimizer" else 0.1)
        start = {"head.bias": outside.reshape(1)} if where == "params" else None
        hyper = {"lr": outside} if where == "hyper" else None
        with innerloop.track(model, optimizer, learn="outer", hyper=hyper, params=start) as loop:
            for t in range(STEPS):
                loss = regression(loop.model, t)
                now = t == at
                loop.step(
                    loss * (1 + outside) if where == "loss" and now else loss,
                    hyper={"lr": outside} if where == "step" and now else None,
                    grad_callback=partial(scaled, by=outside)
                    if where == "callback" and now
                    else None,
                )
            regression(loop.model, STEPS).backward()
        assert outside.grad is not None
        assert outside.grad != 0


# -- arguments of track ----------------------------------------------------------------------------


def exactly(text: str) -> Any:
    return pytest.raises(INVALID, match=f"^{re.escape(text)}$")


@pytest.mark.parametrize("kind", ["torch", "ours", "chain", "groups"])
def test_an_unknown_hyper_parameter_is_refused_when_the_loop_is_made(kind: str):
    model = network()
    ours = innerloop.optim.sgd(lr=0.1)
    scale, known = innerloop.optim.scale(2.0), "lr, momentum, dampening, weight_decay"
    cases: dict[str, tuple[Any, str, str]] = {
        "torch": (sgd(model), "SGD", known),
        "ours": (ours, "SGD", known),
        "chain": (innerloop.optim.chain(scale, ours), "Chain", f"scale.factor, {known}"),
        "groups": (
            innerloop.optim.groups({"body.*": ours, "*": innerloop.optim.rprop()}),
            "SGD, Rprop",
            f"{known}, etas, step_sizes",
        ),
    }
    optimizer, called, names = cases[kind]
    text = f"{called} has no hyper-parameter 'rate'; it has {names}"
    with exactly(text):
        innerloop.track(model, optimizer, hyper={"rate": leaf(0.1)})
    innerloop.track(model, optimizer, hyper={"lr": leaf(0.1)})


def test_an_optimizer_that_does_not_list_its_hyper_parameters_is_asked_at_the_first_step():
    class Mine(innerloop.optim.Optimizer):
        def init(self, params: Any) -> Any:
            return ()

        def update(self, grads: Any, state: Any, params: Any, hyper: Any = None) -> Any:
            return {n: p - hyper["rate"] * grads[n] for n, p in params.items()}, ()

    model = network()
    with innerloop.track(model, Mine(), hyper={"rate": leaf(0.1)}) as loop:
        loop.step(regression(loop.model, 0))


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("optimizer", "write"),
    [
        (torch.optim.SGD, "SGD(model.parameters(), lr=0.1)"),
        (innerloop.optim.SGD, "innerloop.optim.sgd(lr=0.1)"),
        (innerloop.optim.SparseAdam, "innerloop.optim.sparse_adam(lr=0.1)"),
    ],
)
def test_a_class_in_place_of_an_optimizer(optimizer: Any, write: str):
    text = f"optimizer is the class {optimizer.__name__}, not an optimizer: call it, {write}"
    for given in (optimizer, [optimizer]):
        with exactly(text):
            innerloop.track(network(), given)
    with exactly(text):
        innerloop.Problem(lambda params, hyper, batch: params["w"], optimizer)


def test_times_to_keep_where_all_are_kept():
    with refused(INVALID, "save_at=[2]", "leave save_at= away"):
        innerloop.track(network(), OURS, save_at=[2])


@pytest.mark.usefixtures("types_unchecked")
def test_a_class_in_place_of_a_strategy():
    with exactly("strategy is the class Checkpointed: write innerloop.Checkpointed()"):
        innerloop.track(network(), OURS, strategy=innerloop.Checkpointed)  # type: ignore[arg-type]


def test_arguments_for_a_loss_that_is_computed_already():
    with (
        innerloop.track(network(), OURS) as loop,
        refused(INVALID, "args= was given", "loop.step(fn, args=(x, y))"),
    ):
        loop.step(regression(loop.model, 0), args=(1,))


def test_a_grad_callback_that_keeps_a_state():
    model = network()
    transform = innerloop.optim.accumulate(4)
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
        loss = regression(loop.model, 0)
        with exactly(
            "grad_callback=accumulate(4) keeps a state between steps: write "
            "innerloop.optim.chain(accumulate(4), sgd(lr=0.1)) and pass that as the optimizer"
        ):
            loop.step(loss, grad_callback=transform)


@pytest.mark.usefixtures("types_unchecked")
def test_a_grad_callback_that_is_no_function():
    with (
        innerloop.track(network(), OURS) as loop,
        refused(INVALID, "grad_callback(3)", "function"),
    ):
        loop.step(regression(loop.model, 0), grad_callback=3)  # type: ignore[arg-type]


def test_at_refuses_as_a_trajectory_does():
    with innerloop.track(network(), OURS) as loop:
        loop.step(regression(loop.model, 0))
        with refused(INVALID, "time 2 is outside", "times 0 to 1"):
            loop.at(2)
    with innerloop.track(network(), OURS, learn="nothing") as loop:
        for t in range(2):
            loop.step(regression(loop.model, t))
        with refused(INVALID, "time 1", 'learn="nothing"'):
            loop.at(1)


def test_a_second_derivative_that_torch_would_drop_is_named():
    model = nn.Linear(1, 1)
    with (
        pytest.raises(innerloop.NotDifferentiableError, match="once_differentiable"),
        innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop,
    ):
        loop.step(Once.apply(loop.model(torch.ones(1, 1))).sum())


# -- what is not finite ----------------------------------------------------------------------------


class _Vector(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


@pytest.mark.parametrize("learn", ["init", "outer", "nothing"])
@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_parameters_that_are_not_finite_after_the_last_step_are_named(
    rule: type[torch.optim.Optimizer], learn: Any
) -> None:
    model = _Vector(0.0, 1.0)
    optimizer = rule(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    with (
        pytest.raises(innerloop.NonFiniteError, match="step 0 is finite, but its gradient"),
        innerloop.track(model, optimizer, learn=learn) as loop,
    ):
        loop.step(loop.model.w.abs().sqrt().sum())


@pytest.mark.parametrize("learn", ["init", "outer"])
def test_an_outer_gradient_that_is_not_finite_is_named(learn: Any) -> None:
    """|w|^1.5 has a finite gradient at 0, and an infinite second derivative."""
    model, scale = _Vector(0.0, 1.0), torch.tensor(1.0, requires_grad=True)
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1), learn=learn) as loop:
        for _ in range(2):
            loop.step(scale * (loop.model.w.abs() ** 1.5).sum())
        outer = loop.model.w.sum()
    with pytest.raises(innerloop.NonFiniteError, match="second derivative"):
        outer.backward()


@pytest.mark.parametrize("learn", ["init", "outer"])
@pytest.mark.parametrize("rule", [innerloop.optim.sgd(lr=0.1), innerloop.optim.adam(lr=0.1)])
def test_an_outer_gradient_that_is_not_finite_names_its_parameter(rule: Any, learn: Any) -> None:
    """Of parameters that do not depend on each other, the one whose gradient it is."""
    models = {"good": nn.Linear(1, 2, bias=False), "bad": nn.Linear(1, 2, bias=False)}
    scale = torch.ones((), requires_grad=True)
    with innerloop.track(models, rule, learn=learn) as loop:
        for _ in range(3):
            weights = [module.weight for module in loop.model.values()]
            loop.step(scale * sum(w.square().sum() for w in weights))
        last = loop.parameters()
        outer = last["good.weight"].sum() + (last["bad.weight"] * 0).sqrt().sum()
    goal = [scale] if learn == "outer" else list(models["bad"].parameters())
    with pytest.raises(innerloop.NonFiniteError, match=r"arrives at 'bad\.weight' is not finite"):
        torch.autograd.grad(outer, goal, retain_graph=True)
    if learn == "init":
        (found,) = torch.autograd.grad(outer, list(models["good"].parameters()))
        assert found.isfinite().all()
