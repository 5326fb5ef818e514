"""`unroll` and `metagradient` as functions: arguments, results and errors. Gradients are in
``test_strategy_contract.py``."""

from __future__ import annotations

import gc
import io
import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import innerloop
from innerloop._problem import residual
from tests.memory import assert_nothing_is_left
from tests.networks import after_sparse_steps, looked_up, network, sgd
from tests.oracles import assert_derivative, derivative, smooth_noise
from tests.situations import STEPS, TwoLayers, features, regression
from tests.small_problems import one_weight, quadratic_problem
from tests.strategies import Batch, each_exact_strategy

pytestmark = pytest.mark.usefixtures("float64")
INVALID, NOT_DIFFERENTIABLE = innerloop.InvalidInputError, innerloop.NotDifferentiableError


def half_square(params: Any, hyper: Any, batch: Any) -> Tensor:
    return params["w"].square().sum() / 2


def simple(loss: Any = half_square, lr: float = 0.5, **arguments: Any) -> innerloop.Problem:
    return innerloop.Problem(loss, innerloop.optim.sgd(lr=lr), **arguments)


def begin() -> dict[str, Tensor]:
    return {"w": torch.tensor([2.0, -1.0])}


def last(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
    return traj.params["w"].sum()


def refused(kind: type[Exception], *words: str) -> Any:
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


# -- results ---------------------------------------------------------------------------------------


def test_the_form_of_grads_follows_wrt():
    hyper = {"lr": torch.tensor(0.5)}
    problem = innerloop.Problem(
        half_square, innerloop.optim.sgd(), optimizer_hyper=lambda hyper, t: hyper
    )
    both = innerloop.metagradient(last, problem, begin(), None, hyper=hyper, steps=2)[1]
    assert {key: sorted(value) for key, value in both.items()} == {"params": ["w"], "hyper": ["lr"]}
    for name in ("params", "hyper"):
        alone = innerloop.metagradient(
            last, problem, begin(), None, hyper=hyper, steps=2, wrt=name
        )[1]
        listed = innerloop.metagradient(
            last, problem, begin(), None, hyper=hyper, steps=2, wrt=[name]
        )[1]
        assert list(listed) == [name]
        for key, gradient in alone.items():
            assert torch.equal(gradient, both[name][key])
            assert torch.equal(gradient, listed[name][key])
    assert both["params"]["w"].tolist() == [0.25, 0.25]
    assert both["hyper"]["lr"].item() == -2 * 0.5 * 1.0


def test_value_and_grads_are_detached_and_inputs_untouched():
    w = torch.tensor([2.0, -1.0], requires_grad=True)
    value, grads = innerloop.metagradient(last, simple(), {"w": w}, None, steps=2, wrt="params")
    assert not value.requires_grad
    assert not grads["w"].requires_grad
    assert w.grad is None
    assert w.tolist() == [2.0, -1.0]
    assert w._version == 0


def test_the_outer_loss_may_return_more():
    def outer(traj: innerloop.Trajectory, hyper: object) -> tuple[torch.Tensor, dict[str, Any]]:
        more = {"steps": traj.steps, "end": traj.params["w"], "text": "kept", "none": None}
        return last(traj, hyper), more

    (value, extra), grads = innerloop.metagradient(
        outer,
        simple(),
        begin(),
        None,
        steps=3,
        wrt="params",
    )
    assert value.item() == 0.125
    assert extra["steps"] == 3
    assert extra["text"] == "kept"
    assert extra["none"] is None
    assert extra["end"].tolist() == [0.25, -0.125]
    assert not extra["end"].requires_grad
    assert grads["w"].tolist() == [0.125, 0.125]


def test_leaves_of_hyper_that_are_no_numbers_are_constants():
    hyper = {
        "scale": torch.tensor(2.0),
        "index": torch.tensor(1),
        "flag": True,
        "name": "text",
        "nothing": None,
    }

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        return hyper["scale"] * params["w"][hyper["index"]] ** 2 / 2

    _, grads = innerloop.metagradient(
        last, simple(loss, lr=0.1), begin(), None, hyper=hyper, steps=1
    )
    assert {k: v for k, v in grads["hyper"].items() if k != "scale"} == dict.fromkeys(
        ("index", "flag", "name", "nothing")
    )
    assert grads["hyper"]["scale"].item() == pytest.approx(-0.1 * -1.0, abs=1e-15)
    assert grads["params"]["w"].tolist() == pytest.approx([1.0, 0.8])


def test_hyper_may_be_any_pytree():
    for hyper in (
        torch.tensor(0.25),
        [torch.tensor(0.25)],
        (torch.tensor(0.25),),
        {"a": {"b": torch.tensor(0.25)}},
    ):
        find = lambda h: next(iter(torch.utils._pytree.tree_leaves(h)))  # noqa: E731
        problem = innerloop.Problem(
            half_square,
            innerloop.optim.sgd(),
            optimizer_hyper=lambda h, t: {"lr": find(h)},  # noqa: B023
        )
        _, grads = innerloop.metagradient(
            last, problem, begin(), None, hyper=hyper, steps=2, wrt="hyper"
        )
        assert type(grads) is type(hyper)
        assert find(grads).item() == pytest.approx(-2 * 0.75)


def test_an_input_without_influence_has_gradient_zero():
    """As torch.func.grad says too; but an outer loss that depends on nothing at all is refused."""
    params = {**begin(), "idle": torch.ones(3)}
    _, grads = innerloop.metagradient(last, simple(), params, None, steps=1, wrt="params")
    assert grads["idle"].tolist() == [0.0, 0.0, 0.0]


def decayed(params: Any, hyper: Any, batch: Any) -> Tensor:
    return half_square(params, hyper, batch) * (1 + hyper["l2"])


def test_the_optimizer_reads_entries_of_hyper_by_name():
    """w2 = (1 - lr (1 + l2))^2 w0, with w0 = (2, -1) summed to 1, at lr = 0.5 and l2 = 0.2."""
    hyper = {"lr": torch.tensor(0.5), "l2": torch.tensor(0.2)}
    for names in (("lr",), ["lr"]):
        _, grads = innerloop.metagradient(
            last,
            simple(decayed, lr=7.0, optimizer_hyper=names),
            begin(),
            None,
            hyper=hyper,
            steps=2,
            wrt="hyper",
        )
        assert grads["lr"].item() == pytest.approx(-2 * 0.4 * 1.2, rel=1e-14)
        assert grads["l2"].item() == pytest.approx(-2 * 0.4 * 0.5, rel=1e-14)


UNREAD = (
    "no gradient arrives at hyper['lr']. sgd has a hyper-parameter of that name, but reads it only "
    "if you say so: write Problem(loss, optimizer, optimizer_hyper=('lr',)), or optimizer_hyper=() "
    "if the name means something else"
)


@pytest.mark.parametrize("strategy", [innerloop.StoreAll(), innerloop.Checkpointed()], ids=repr)
def test_a_rate_that_nobody_reads(strategy: innerloop.strategy.Strategy):
    """Its gradient was a silent zero once."""
    both = {"lr": torch.tensor(0.5), "l2": torch.tensor(0.2)}
    alone = {"lr": torch.tensor(0.5)}
    shared: dict[str, Any] = {"steps": 2, "strategy": strategy}
    for loss, hyper in ((decayed, both), (half_square, alone)):
        for wrt in ("hyper", ("params", "hyper")):
            with refused(NOT_DIFFERENTIABLE, UNREAD):
                innerloop.metagradient(
                    last, simple(loss), begin(), None, hyper=hyper, wrt=wrt, **shared
                )
    # Not asked for, or said to be none of the optimizer's, it is what it is: zero.
    innerloop.metagradient(last, simple(decayed), begin(), None, hyper=both, wrt="params", **shared)
    none = simple(decayed, optimizer_hyper=())
    _, grads = innerloop.metagradient(last, none, begin(), None, hyper=both, **shared)
    assert grads["hyper"]["lr"].item() == 0


def test_a_rate_that_nobody_reads_under_vmap():
    def gradient(rate: Tensor) -> Any:
        hyper = {"lr": rate, "l2": torch.tensor(0.2)}
        return innerloop.metagradient(last, simple(decayed), begin(), None, hyper=hyper, steps=2)[1]

    with refused(NOT_DIFFERENTIABLE, UNREAD):
        torch.func.vmap(gradient)(torch.ones(2))


def _by_backward(fn: Callable[[Any], Tensor], hyper: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in hyper.items()}
    return dict(zip(leaves, torch.autograd.grad(fn(leaves), [*leaves.values()]), strict=True))


def _in_a_population(fn: Callable[[Any], Tensor], hyper: dict[str, Tensor]) -> dict[str, Tensor]:
    stacked = {name: torch.stack([x, x]) for name, x in hyper.items()}
    found = torch.func.vmap(torch.func.grad(fn))(stacked)
    return {name: g[1] for name, g in found.items()}


WAYS: dict[str, Callable[[Callable[[Any], Tensor], dict[str, Tensor]], dict[str, Tensor]]] = {
    "backward": _by_backward,
    "grad": lambda fn, hyper: torch.func.grad(fn)(hyper),
    "vjp": lambda fn, hyper: torch.func.vjp(fn, hyper)[1](torch.ones(()))[0],
    "jacrev": lambda fn, hyper: torch.func.jacrev(fn)(hyper),
    "vmap of grad": _in_a_population,
}


@each_exact_strategy()
@pytest.mark.parametrize("way", WAYS)
def test_a_rate_that_nobody_reads_raises_where_its_gradient_is_asked_for(
    strategy: innerloop.strategy.Strategy, way: str
):
    """It was None or, under torch.func, zero. With w0 = (2, -1) and w1 = (1 - (1 + l2) / 2) w0,
    d (sum w1) / d l2 = -1 / 2."""
    both = {"lr": torch.tensor(0.5), "l2": torch.tensor(0.2)}

    def outer(hyper: Any, **kwargs: Any) -> Tensor:
        problem = simple(decayed, **kwargs)
        traj = innerloop.unroll(problem, begin(), None, steps=1, hyper=hyper, strategy=strategy)
        return last(traj, hyper)

    def value(hyper: Any) -> Any:
        return innerloop.metagradient(
            last, simple(decayed), begin(), None, steps=1, hyper=hyper, strategy=strategy,
            wrt="hyper",
        )[0]  # fmt: skip

    for fn in (outer, value)[: 1 if way == "backward" else 2]:
        with refused(NOT_DIFFERENTIABLE, UNREAD):
            WAYS[way](fn, both)
    if way != "backward":
        # Said to be none of the optimizer's, it has the gradient zero.
        none = WAYS[way](lambda h: outer(h, optimizer_hyper=()), both)
        assert none["lr"].item() == 0
        assert none["l2"].item() == pytest.approx(-0.5, rel=1e-6)
    # A constant asks for nothing.
    alone = WAYS[way](lambda h: outer({**h, "lr": both["lr"]}), {"l2": both["l2"]})
    assert alone["l2"].item() == pytest.approx(-0.5, rel=1e-6)


@each_exact_strategy()
def test_what_nothing_arrives_at_is_refused_under_transforms_too(
    strategy: innerloop.strategy.Strategy,
):
    """Zeros under vmap, where eager code raised. One entry among others has the gradient zero."""

    def gradient(x: Tensor, loss: Any, **more: Tensor) -> Any:
        hyper = {"idle": x, **more}
        return innerloop.metagradient(
            last, simple(loss), begin(), None, steps=1, hyper=hyper, wrt="hyper", strategy=strategy
        )[1]

    for call in (lambda f: f(torch.ones(())), lambda f: torch.func.vmap(f)(torch.ones(2))):
        with refused(NOT_DIFFERENTIABLE, "no gradient arrives at hyper: "):
            call(lambda x: gradient(x, half_square))
        found = call(lambda x: gradient(x, decayed, l2=torch.tensor(0.2)))
        assert not found["idle"].any()
        assert found["l2"].flatten()[0].item() == pytest.approx(-0.5, rel=1e-6)


def test_the_loss_may_use_the_name_of_a_hyper_parameter():
    """A penalty that the loss calls weight_decay is no mistake: w1 = (1 - 0.5 - wd / 2) w0."""
    problem = simple(lambda p, h, batch: half_square(p, h, batch) * (1 + h["weight_decay"]))
    hyper = {"weight_decay": torch.tensor(0.2)}
    for call in (
        lambda h: innerloop.metagradient(
            last, problem, begin(), None, hyper=h, steps=1, wrt="hyper"
        )[1],
        lambda h: torch.func.vmap(
            lambda wd: innerloop.metagradient(
                last, problem, begin(), None, hyper={"weight_decay": wd}, steps=1, wrt="hyper"
            )[1]
        )(h["weight_decay"][None]),
    ):
        assert call(hyper)["weight_decay"].item() == pytest.approx(-0.5, rel=1e-14)


def test_params_may_be_left_to_the_module():
    """None stands for all parameters that require grad; a frozen one keeps its value."""
    model = TwoLayers()
    model.head.bias.requires_grad_(False)
    problem = innerloop.Problem.from_module(
        model, lambda m, h, b: regression(m, b), innerloop.optim.sgd(lr=0.1)
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) < len(dict(model.named_parameters()))
    traj = innerloop.unroll(problem, None, [0, 1])
    assert list(traj.params) == list(trained)
    given = innerloop.unroll(problem, trained, [0, 1])
    for name, p in given.params.items():
        assert torch.equal(traj.params[name], p)
    assert all(
        g is not None
        for g in torch.autograd.grad(
            torch.stack([p.sum() for p in traj.params.values()]).sum(), [*trained.values()]
        )
    )
    outer = lambda traj, hyper: sum(p.square().sum() for p in traj.params.values())  # noqa: E731
    ours, expected = (
        innerloop.metagradient(outer, problem, params, [0, 1], wrt="params")[1]
        for params in (None, trained)
    )
    assert list(ours) == list(expected)
    for name, g in expected.items():
        assert torch.equal(ours[name], g)


def test_the_trajectory_says_which_times_it_knows():
    traj = innerloop.unroll(simple(), begin(), None, steps=3)
    assert list(traj.times) == [0, 1, 2, 3]
    assert traj.at(-4).params["w"].tolist() == [2.0, -1.0]
    assert repr(traj) == "Trajectory(steps=3, parameters=['w'])"
    for time in (4, -5):
        with refused(INVALID, f"time {time}", "0 to 3"):
            traj.at(time)


def test_the_optimizer_may_come_from_torch():
    """With its groups and its warm state: the loop goes on where torch stopped."""
    model = network()
    groups: list[dict[str, Any]] = [
        {"params": model.head.parameters(), "lr": 0.03},
        {"params": model.body.parameters()},
    ]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    regression(model, 0).backward()
    optimizer.step()
    problem = innerloop.Problem.from_module(
        model, lambda m, hyper, t: regression(m, t), innerloop.optim.from_torch(optimizer, model)
    )
    traj = innerloop.unroll(problem, dict(model.named_parameters()), [1, 2])
    for t in (1, 2):
        optimizer.zero_grad()
        regression(model, t).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(traj.params[name].detach(), p.detach(), rtol=1e-12, atol=1e-14)


def test_a_carry_can_be_cut_from_its_history():
    w = begin()["w"].requires_grad_()
    end = innerloop.unroll(simple(), {"w": w}, None, steps=2).at(-1)
    cut = end.detach()
    assert end.params["w"].requires_grad
    assert not cut.params["w"].requires_grad
    assert torch.equal(cut.params["w"], end.params["w"])
    assert not innerloop.unroll(simple(), cut, None, steps=1).params["w"].requires_grad


def test_a_problem_says_what_it_is():
    assert repr(simple(lr=0.5)) == "Problem(half_square, sgd(lr=0.5))"


# -- recording -------------------------------------------------------------------------------------


def test_what_is_not_asked_for_is_not_recorded():
    """Plain training: no graph, so nothing of a step stays alive."""
    alive: list[weakref.ref[Tensor]] = []

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        hidden = params["w"].tanh()
        alive.append(weakref.ref(hidden))
        return hidden.square().sum()

    gc.disable()
    try:
        traj = innerloop.unroll(simple(loss), begin(), None, steps=4)
        assert not traj.params["w"].requires_grad
        assert [ref() for ref in alive] == [None] * 4
        with torch.no_grad():
            traj = innerloop.unroll(
                simple(loss), {"w": begin()["w"].requires_grad_()}, None, steps=4
            )
        assert not traj.losses.requires_grad
        assert [ref() for ref in alive] == [None] * 8
        kept = innerloop.unroll(simple(loss), {"w": begin()["w"].requires_grad_()}, None, steps=4)
        assert all(ref() is not None for ref in alive[8:])
        del kept
        assert [ref() for ref in alive] == [None] * 12
    finally:
        gc.enable()


def test_loops_leave_no_objects():
    """Not even a reference cycle, with the collector off."""
    model = network()
    problem = innerloop.Problem.from_module(
        model, lambda m, hyper, t: (regression(m, t), {"t": t}), innerloop.optim.adam(lr=0.1)
    )
    params = dict(model.named_parameters())

    def outer(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
        return traj.losses.sum() + traj.params["head.bias"].sum()

    def episode() -> None:
        innerloop.metagradient(outer, problem, params, [0, 1], wrt="params")
        innerloop.unroll(problem, params, [0, 1]).losses.sum().backward()
        innerloop.unroll(problem, params, lambda params, hyper, t: t, steps=2)

    assert_nothing_is_left(episode, count=20)


def test_a_captured_tensor_still_gets_its_gradient():
    """By StoreAll, whose graph is plain autograd: in the loss, in the optimizer, when nothing else
    requires grad."""
    weight, rate = (torch.tensor(x, requires_grad=True) for x in (1.5, 0.2))
    problem = innerloop.Problem(
        lambda p, hyper, batch: weight * p["w"].square().sum() / 2, innerloop.optim.sgd(lr=rate)
    )
    innerloop.unroll(problem, begin(), None, steps=2).params["w"].sum().backward()
    end = lambda w, r: ((1 - r * w) ** 2 * begin()["w"]).sum().item()  # noqa: E731
    for leaf, moved in ((weight, lambda h: end(1.5 + h, 0.2)), (rate, lambda h: end(1.5, 0.2 + h))):
        assert leaf.grad is not None
        assert_derivative(leaf.grad.item(), derivative(moved), "captured")


# -- errors ----------------------------------------------------------------------------------------

UNROLL: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no steps": (lambda: innerloop.unroll(simple(), begin(), None), ["steps=T"]),
    "callable without steps": (
        lambda: innerloop.unroll(simple(), begin(), lambda params, hyper, t: t),
        ["steps=T"],
    ),
    "negative steps": (lambda: innerloop.unroll(simple(), begin(), None, steps=-1), ["steps=-1"]),
    "steps is a float": (
        lambda: innerloop.unroll(simple(), begin(), None, steps=2.0),  # type: ignore[arg-type]
        ["steps=2.0"],
    ),
    "more steps than batches": (
        lambda: innerloop.unroll(simple(), begin(), [1, 2], steps=3),
        ["steps=3", "2"],
    ),
    "lengths differ": (
        lambda: innerloop.unroll(simple(), begin(), (torch.ones(3), torch.ones(4))),
        ["3", "4", "tuple"],
    ),
    "no length": (
        lambda: innerloop.unroll(simple(), begin(), {"x": torch.tensor(1.0)}),
        ["list", "stacked", "function"],
    ),
    "no tensors": (
        lambda: innerloop.unroll(simple(), begin(), {"x": 3}),
        ["list", "stacked", "function"],
    ),
    "save_at": (
        lambda: innerloop.unroll(simple(), begin(), None, steps=2, save_at=[3]),
        ["save_at", "3", "0 to 2"],
    ),
    "strategy is a class": (
        lambda: innerloop.unroll(simple(), begin(), None, steps=1, strategy=innerloop.StoreAll),  # type: ignore[arg-type]
        ["strategy is the class StoreAll: write innerloop.StoreAll()"],
    ),
    "strategy is a class with arguments": (
        lambda: innerloop.metagradient(
            last,
            simple(),
            begin(),
            None,
            steps=1,
            strategy=innerloop.Truncated,  # type: ignore[arg-type]
        ),
        ["strategy is the class Truncated: write innerloop.Truncated(last=...)"],
    ),
    "strategy is a name": (
        lambda: innerloop.unroll(simple(), begin(), None, steps=1, strategy="all"),  # type: ignore[arg-type]
        ["strategy is 'all', not a strategy", "innerloop.StoreAll()"],
    ),
    "planned strategy is a class": (
        lambda: innerloop.plan(simple(), begin(), None, steps=1, strategies=[innerloop.StoreAll]),  # type: ignore[list-item]
        ["strategies has the class StoreAll: write innerloop.StoreAll()"],
    ),
    "params is None without a module": (
        lambda: innerloop.unroll(simple(), None, None, steps=1),
        [
            "params is None, and the problem was not made from a module: pass a dict of tensors, "
            "or use Problem.from_module"
        ],
    ),
    "params of a metagradient is None without a module": (
        lambda: innerloop.metagradient(last, simple(), None, None, steps=1),
        ["params is None, and the problem was not made from a module"],
    ),
    "optimizer_hyper names an unknown hyper-parameter": (
        lambda: simple(optimizer_hyper=("rate",)),
        ["optimizer_hyper names 'rate', but sgd has lr, momentum, dampening, weight_decay"],
    ),
    "optimizer_hyper names an unknown one of a group": (
        lambda: innerloop.Problem(
            half_square,
            innerloop.optim.groups({"w": innerloop.optim.sgd()}),
            optimizer_hyper=["betas"],
        ),
        ["optimizer_hyper names 'betas', but groups has lr, momentum, dampening, weight_decay"],
    ),
    "optimizer_hyper is a string": (
        lambda: simple(optimizer_hyper="lr"),
        ["optimizer_hyper='lr'", "optimizer_hyper=('lr',)"],
    ),
    "optimizer_hyper names an entry that is missing": (
        lambda: innerloop.unroll(
            simple(optimizer_hyper=("lr",)), begin(), None, steps=1, hyper={"l2": torch.tensor(1.0)}
        ),
        ["optimizer_hyper names 'lr', but hyper has no such entry; it has ['l2']"],
    ),
    "optimizer_hyper names an entry of a tensor": (
        lambda: innerloop.unroll(
            simple(optimizer_hyper=("lr",)), begin(), None, steps=1, hyper=torch.tensor(0.5)
        ),
        ["optimizer_hyper names 'lr', but hyper is Tensor: write a dict, hyper={'lr': tensor}"],
    ),
    "problem is a function": (
        lambda: innerloop.unroll(half_square, begin(), None, steps=1),  # type: ignore[arg-type]
        ["Problem", "function"],
    ),
    "params is a module": (
        lambda: innerloop.unroll(simple(), network(), None, steps=1),  # type: ignore[arg-type]
        ["TwoLayers", "named_parameters"],
    ),
    "params is a list": (
        lambda: innerloop.unroll(simple(), [torch.ones(1)], None, steps=1),  # type: ignore[arg-type]
        ["list", "dict"],
    ),
    "params are numbers": (
        lambda: innerloop.unroll(simple(), {"w": 1.0}, None, steps=1),  # type: ignore[dict-item]
        ["named tensors"],
    ),
    "params are integers": (
        lambda: innerloop.unroll(simple(), {"w": torch.tensor([1])}, None, steps=1),
        ["'w'", "int64"],
    ),
    "params are empty": (
        lambda: innerloop.unroll(simple(), {}, None, steps=1),
        ["params", "empty"],
    ),
    "loss is no function": (lambda: innerloop.Problem(3, innerloop.optim.sgd()), ["int"]),  # type: ignore[arg-type]
    "optimizer is of torch": (
        lambda: innerloop.Problem(half_square, sgd(network())),  # type: ignore[arg-type]
        ["SGD", "from_torch"],
    ),
    "optimizer is a name": (
        lambda: innerloop.Problem(half_square, "sgd"),  # type: ignore[arg-type]
        ["str", "innerloop.optim.sgd"],
    ),
    "vector loss": (
        lambda: innerloop.unroll(simple(lambda p, h, b: p["w"]), begin(), None, steps=1),
        ["(2,)", "scalar"],
    ),
    "number loss": (
        lambda: innerloop.unroll(simple(lambda p, h, b: 3.0), begin(), None, steps=1),
        ["float", "scalar"],
    ),
    "integer loss": (
        lambda: innerloop.unroll(simple(lambda p, h, b: torch.tensor(3)), begin(), None, steps=1),
        ["int64"],
    ),
    "aux of text": (
        lambda: innerloop.unroll(
            simple(lambda p, h, b: (p["w"].sum(), "text")), begin(), None, steps=2
        ),
        ["aux", "'text'", "tensors and numbers"],
    ),
    "aux of changing structure": (
        lambda: innerloop.unroll(simple(lambda p, h, b: (p["w"].sum(), [b] * b)), begin(), [1, 2]),
        ["aux", "every step"],
    ),
    "wrong names for the module": (
        lambda: innerloop.unroll(
            innerloop.Problem.from_module(
                network(), lambda m, h, b: regression(m, b), innerloop.optim.sgd()
            ),
            begin(),
            [0],
        ),
        ["'w'", "body.weight"],
    ),
    "from_module of no module": (
        lambda: innerloop.Problem.from_module(half_square, half_square, innerloop.optim.sgd()),  # type: ignore[type-var]
        ["nn.Module", "function"],
    ),
    "wrt": (
        lambda: innerloop.metagradient(last, simple(), begin(), None, steps=1, wrt="lr"),
        ["'lr'", '"params"', '"hyper"'],
    ),
    "nothing to differentiate": (
        lambda: innerloop.metagradient(last, simple(), begin(), None, steps=1, wrt="hyper"),
        ["nothing to differentiate", "hyper"],
    ),
    "outer returns a vector": (
        lambda: innerloop.metagradient(
            lambda traj, hyper: traj.losses, simple(), begin(), None, steps=2
        ),
        ["outer(traj, hyper)", "(2,)", "scalar"],
    ),
}


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("case", list(UNROLL))
def test_unroll_refuses(case: str):
    call, words = UNROLL[case]
    with refused(INVALID, *words):
        call()


def test_batches_that_require_grad():
    wanted = torch.ones(3, 2, requires_grad=True)
    forms = {
        "batches": wanted,
        "batches['x']": {"x": wanted, "y": torch.ones(3)},
        "batches[1]": [torch.ones(2), wanted[0], torch.ones(2)],
        "batches[0]['x']": [{"x": wanted}],
        "batches.noise": Batch(torch.ones(3), wanted),
    }
    for name, batches in forms.items():
        with refused(INVALID, name, "hyper", "indices"):
            innerloop.unroll(simple(), begin(), batches)


def total_loss(loss: Any, w: Tensor) -> Tensor:
    return innerloop.unroll(simple(loss), {"w": w}, [0]).losses.sum()


def test_a_loss_that_does_not_use_its_params():
    model = network()
    for loss in (lambda p, hyper, b: torch.tensor(1.0), lambda p, hyper, b: regression(model, b)):
        for params in (begin(), {"w": begin()["w"].requires_grad_()}):
            with refused(NOT_DIFFERENTIABLE, "does not depend on params"):
                innerloop.unroll(simple(loss), params, [0])
        with refused(NOT_DIFFERENTIABLE, "does not depend on params"):
            torch.func.grad(partial(total_loss, loss))(begin()["w"])


def test_a_loss_that_uses_only_what_an_outer_transform_sees():
    """It depends on hyper, which is differentiated outside, and not on params: still no training
    takes place."""

    def behind(hyper: Tensor) -> Tensor:
        return innerloop.unroll(
            simple(lambda p, h, batch: h.square()), begin(), None, hyper=hyper, steps=2
        ).losses.sum()

    for call in (
        lambda: torch.func.grad(behind)(torch.tensor(1.0)),
        lambda: torch.func.jvp(behind, (torch.tensor(1.0),), (torch.tensor(1.0),)),
        lambda: torch.func.vmap(behind)(torch.ones(2)),
        lambda: behind(torch.tensor(1.0, requires_grad=True)),
    ):
        with refused(NOT_DIFFERENTIABLE, "does not depend on params"):
            call()


def test_an_outer_loss_that_depends_on_nothing():
    for outer in (
        lambda traj, hyper: torch.tensor(1.0),
        lambda traj, hyper: traj.params["w"].detach().sum(),
    ):
        with refused(NOT_DIFFERENTIABLE, "outer loss", "traj.params"):
            innerloop.metagradient(outer, simple(), begin(), None, steps=1)


class WithCheckpoint(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda y: self.body(y).tanh(), x, use_reentrant=False))


class WithoutCheckpoint(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def test_activation_checkpointing_inside_the_loop():
    """What runs again runs with the weights of its own step."""

    def run(model: nn.Module) -> list[Tensor]:
        model.load_state_dict(TwoLayers().state_dict())
        problem = innerloop.Problem.from_module(
            model, lambda m, hyper, t: regression(m, t), innerloop.optim.sgd(lr=0.1)
        )
        _, grads = innerloop.metagradient(
            lambda traj, hyper: traj.losses.sum(), problem, None, [0, 1], wrt="params"
        )
        constants = {n: p.detach() for n, p in model.named_parameters()}
        traj = innerloop.unroll(problem, constants, list(range(STEPS)))
        return [*grads.values(), *traj.params.values()]

    torch.manual_seed(0)
    ours = run(WithCheckpoint())
    torch.manual_seed(0)
    for a, b in zip(ours, run(WithoutCheckpoint()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_operations_without_a_second_derivative():
    """One that innerloop has no form of: refused by name; where torch itself takes the derivative,
    by torch's own message."""

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        sums = torch.segment_reduce(
            params["w"].flatten().exp(), "sum", lengths=torch.tensor([params["w"].numel()])
        )
        return sums.square().sum()

    with refused(NOT_DIFFERENTIABLE, "segment_reduce", "index_add"):
        innerloop.metagradient(last, simple(loss), begin(), None, steps=2, wrt="params")
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.func.grad(
            lambda w: innerloop.unroll(simple(loss), {"w": w}, None, steps=2).losses.sum()
        )(begin()["w"])


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_loss_inside_unroll():
    compiled = torch.compile(lambda p: p["w"].pow(3).sum(), backend="aot_eager")
    later = lambda p, hyper, t: compiled(p) if t == 1 else p["w"].pow(3).sum()  # noqa: E731
    for loss in (lambda p, hyper, t: compiled(p), later):
        with refused(NOT_DIFFERENTIABLE, "torch.compile", "uncompiled"):
            innerloop.unroll(simple(loss, lr=0.1), {"w": begin()["w"].requires_grad_()}, [0, 1])


def test_an_error_of_the_loss_comes_through_as_it_is():
    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        raise LookupError("a bug of the user")

    for call in (
        lambda: innerloop.unroll(simple(loss), begin(), None, steps=1),
        lambda: innerloop.metagradient(last, simple(loss), begin(), None, steps=1),
        lambda: torch.func.grad(
            lambda w: innerloop.unroll(simple(loss), {"w": w}, None, steps=1).losses.sum()
        )(begin()["w"]),
    ):
        with pytest.raises(LookupError, match="a bug of the user"):
            call()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        innerloop.unroll(
            simple(lambda p, h, b: (features(0) @ p["w"].reshape(1, 2)).sum()),
            begin(),
            None,
            steps=1,
        )


# -- the inner gradient ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [
        innerloop.StoreAll(),
        innerloop.Checkpointed(product="reverse"),
        innerloop.Checkpointed(product="reverse", save="params"),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "rule", [innerloop.optim.adagrad(lr=0.1), innerloop.optim.sgd(lr=0.1, momentum=0.9)], ids=repr
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch.optim itself
def test_a_sparse_embedding_equals_finite_differences_of_torch(strategy: Any, rule: Any):
    problem = innerloop.Problem(lambda params, hyper, t: looked_up(params["w"], int(t)), rule)
    start = 0.5 * smooth_noise(5, 2)
    w = start.clone().requires_grad_()
    traj = innerloop.unroll(problem, {"w": w}, [0, 1, 2], strategy=strategy)
    (found,) = torch.autograd.grad(looked_up(traj.params["w"], 1), w)
    along = smooth_noise(5, 2, phase=1.0)

    def of_torch(h: float) -> float:
        make = (
            partial(torch.optim.SGD, lr=0.1, momentum=0.9)
            if isinstance(rule, innerloop.optim.SGD)
            else partial(torch.optim.Adagrad, lr=0.1)
        )
        return after_sparse_steps(make, start + h * along)

    assert_derivative(float((found.to_dense() * along).sum()), derivative(of_torch), repr(rule))


def test_finite_products_take_a_sparse_gradient_of_the_outer_loss():
    rule = innerloop.optim.adagrad(lr=0.1, eps=0.1)
    problem = innerloop.Problem(lambda params, hyper, t: looked_up(params["w"], int(t)), rule)
    w = (0.5 * smooth_noise(5, 2)).requires_grad_()
    found: list[Tensor] = []
    for strategy in (innerloop.Checkpointed(product="finite"), innerloop.StoreAll()):
        traj = innerloop.unroll(problem, {"w": w}, [0, 1, 2], strategy=strategy)
        found += torch.autograd.grad(looked_up(traj.params["w"], 1), w)
    assert (found[0].to_dense() - found[1].to_dense()).abs().max() < 1e-7


@pytest.mark.parametrize("save", ["params", "gradients"])
def test_mixed_products_of_a_sparse_embedding_are_refused_by_name(save: Any):
    """The outer loss sends back a sparse gradient, which the rule must not stumble over first."""
    rule = innerloop.optim.adagrad(lr=0.1)
    problem = innerloop.Problem(lambda params, hyper, t: looked_up(params["w"], int(t)), rule)
    w = (0.5 * smooth_noise(5, 2)).requires_grad_()
    strategy = innerloop.Checkpointed(product="mixed", save=save)
    traj = innerloop.unroll(problem, {"w": w}, [0, 1, 2], strategy=strategy)
    with pytest.raises(innerloop.NotDifferentiableError, match='"mixed" needs forward-mode'):
        looked_up(traj.params["w"], 1).backward()


def test_groups_make_gradients_dense_for_the_rules_that_need_it():
    """`sparse_adam` takes its gradient sparse, its neighbour dense."""
    optimizer = innerloop.optim.groups(
        {"a": innerloop.optim.sparse_adam(lr=0.1), "b": innerloop.optim.adagrad(lr=0.1)}
    )

    def loss(params: Any, hyper: Any, t: Any) -> Tensor:
        return looked_up(params["a"], int(t)) + looked_up(params["b"], int(t))

    start = {name: 0.5 * smooth_noise(5, 2) for name in "ab"}
    traj = innerloop.unroll(innerloop.Problem(loss, optimizer), start, [0, 1])
    for name, rule in optimizer.members.items():
        alone = innerloop.unroll(
            innerloop.Problem(lambda params, hyper, t: looked_up(params["w"], int(t)), rule),
            {"w": start[name]},
            [0, 1],
        )
        assert torch.equal(traj.params[name], alone.params["w"])


def test_a_parameter_that_the_loss_does_not_use_has_the_gradient_zero():
    """As in `torch.func`, so weight decay moves it; `track` skips it, as after ``backward()``."""
    problem = innerloop.Problem(
        lambda params, hyper, batch: params["used"] ** 2 / 2,
        innerloop.optim.sgd(lr=0.1, weight_decay=0.5),
    )
    start = {"used": torch.tensor(1.0), "unused": torch.tensor(1.0)}

    def run(params: Any) -> Any:
        return innerloop.unroll(problem, params, None, steps=1).params

    batched = torch.func.vmap(run)({name: p.expand(2) for name, p in start.items()})
    for end in (run(start), {name: p[0] for name, p in batched.items()}):
        assert end["unused"].item() == pytest.approx(0.95)
        assert end["used"].item() == pytest.approx(0.85)


def test_the_residual_is_the_inner_gradient_as_constants():
    problem = innerloop.Problem(
        lambda params, hyper, batch: (params["w"] * hyper["scale"] - batch) ** 2 / 2,
        innerloop.optim.adam(),
    )
    params = {"w": leaf_of(3.0), "unused": leaf_of(1.0)}
    found: Any = residual(problem, problem.init(params), {"scale": leaf_of(2.0)}, torch.tensor(1.0))
    assert {n: g.item() for n, g in found.items()} == {"w": 10.0, "unused": 0.0}
    assert not any(g.requires_grad for g in found.values())


def leaf_of(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def test_a_loop_that_is_continued_leaves_the_users_random_numbers_alone() -> None:
    problem = innerloop.Problem(half_square, innerloop.optim.sgd(lr=0.1))
    carry = innerloop.unroll(problem, {"w": torch.ones(2)}, None, steps=1).at(-1)
    drawn = []
    for _ in range(3):
        drawn.append(torch.randn(2))
        carry = innerloop.unroll(problem, carry, None, steps=1).at(-1)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_hyper_parameters_that_reach_nothing() -> None:
    problem = innerloop.Problem(
        half_square, innerloop.optim.sgd(lr=0.1)
    )  # optimizer_hyper was forgotten
    for wrt in ("hyper", ("params", "hyper")):
        with pytest.raises(innerloop.NotDifferentiableError, match="optimizer_hyper"):
            innerloop.metagradient(
                lambda traj, hyper: traj.params["w"].sum(),
                problem,
                {"w": torch.ones(2)},
                None,
                steps=2,
                hyper={"lr": torch.tensor(0.5)},
                wrt=wrt,
            )


def test_a_constant_outer_loss_under_vmap() -> None:
    problem = innerloop.Problem(half_square, innerloop.optim.sgd(lr=0.1))
    outer = lambda traj, hyper: torch.ones(())  # noqa: E731
    one = lambda w: innerloop.metagradient(outer, problem, {"w": w}, None, steps=1, wrt="params")[  # noqa: E731
        1
    ]["w"]
    with pytest.raises(innerloop.NotDifferentiableError, match="does not depend"):
        torch.func.vmap(one)(torch.ones(3, 2))


def test_a_loss_that_uses_the_captured_model() -> None:
    model = nn.Linear(2, 1)
    x = torch.ones(4, 2)
    problem = innerloop.Problem.from_module(
        model, lambda m, hyper, b: model(x).square().mean(), innerloop.optim.sgd()
    )
    with pytest.raises(innerloop.NotDifferentiableError, match="does not depend on params"):
        innerloop.unroll(problem, dict(model.named_parameters()), None, steps=2)


def test_times_are_whole_numbers():
    with pytest.raises(innerloop.InvalidInputError, match="list of times"):
        innerloop.unroll(quadratic_problem(), one_weight(), None, steps=3, save_at=[True])


def test_inference_mode_is_named():
    with torch.inference_mode(), pytest.raises(innerloop.InvalidInputError, match="no_grad"):
        innerloop.unroll(quadratic_problem(), one_weight(), None, steps=3)


# -- what is not finite ----------------------------------------------------------------------------


def _sqrt_of_size(w: Tensor) -> Tensor:
    return w.abs().sqrt().sum()


def _fourth_power(w: Tensor) -> Tensor:
    return (w**4).sum()


EXACT = [
    innerloop.StoreAll(),
    innerloop.Checkpointed(slots=1),
    innerloop.Checkpointed(product="mixed"),
    innerloop.Truncated(20),
    innerloop.Auto("1GB"),
]


@pytest.mark.parametrize("strategy", EXACT, ids=repr)
@pytest.mark.parametrize("rule", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("front", ["unroll", "metagradient"])
def test_an_infinite_inner_gradient_is_named_with_its_step(
    strategy: innerloop.strategy.Strategy, rule: str, front: str
):
    """The loss of the only step is finite, so nothing but the last parameters shows it."""
    problem = innerloop.Problem(
        lambda p, h, b: _sqrt_of_size(p["w"] - b), getattr(innerloop.optim, rule)(lr=0.1)
    )
    start = {"w": torch.tensor([0.0, 1.0], requires_grad=front == "unroll")}
    with pytest.raises(innerloop.NonFiniteError, match=r"not finite") as raised:  # noqa: PT012
        if front == "unroll":
            innerloop.unroll(problem, start, [0.0], strategy=strategy)
        else:
            innerloop.metagradient(
                lambda traj, h: traj.params["w"].sum(),
                problem,
                start,
                [0.0],
                wrt="params",
                strategy=strategy,
            )
    assert "step 0" in str(raised.value)
    assert "SqrtBackward" in str(raised.value)


@pytest.mark.parametrize("strategy", EXACT, ids=repr)
def test_a_loop_that_diverges_is_named_with_its_step(strategy: innerloop.strategy.Strategy):
    problem = innerloop.Problem(lambda p, h, b: _fourth_power(p["w"]), innerloop.optim.sgd(lr=10.0))
    w, first = torch.ones(2, dtype=torch.float64), 0
    while _fourth_power(w).isfinite():
        w, first = w - 10 * 4 * w**3, first + 1
    given = (problem, {"w": torch.ones(2, dtype=torch.float64)}, None)
    with pytest.raises(innerloop.NonFiniteError, match=f"step {first}.*pow"):
        innerloop.unroll(*given, steps=20, strategy=strategy)


def test_a_second_derivative_that_is_infinite_is_named_at_the_outer_backward_pass():
    """|w|^1.5 has a finite gradient at 0, and an infinite second derivative."""
    w = torch.tensor([0.0, 1.0], requires_grad=True)
    problem = innerloop.Problem(
        lambda p, h, b: (p["w"].abs() ** 1.5).sum() if b else p["w"].square().sum(),
        innerloop.optim.sgd(lr=0.1),
    )
    for strategy in (innerloop.StoreAll(), innerloop.Checkpointed(slots=1)):
        traj = innerloop.unroll(problem, {"w": w}, [0, 1, 0], strategy=strategy)
        with pytest.raises(innerloop.NonFiniteError, match="second derivative in step 1"):
            traj.params["w"].sum().backward()


def test_an_outer_loss_that_is_not_finite_is_named():
    problem = innerloop.Problem(lambda p, h, b: p["w"].square(), innerloop.optim.sgd(lr=0.1))
    for outer, match in (
        (lambda traj, h: traj.params["w"].log() * 0, "outer loss is nan"),
        (lambda traj, h: (traj.params["w"] * 0 + h).sqrt(), "look at the outer loss"),
    ):
        with pytest.raises(innerloop.NonFiniteError, match=match):
            innerloop.metagradient(
                outer, problem, {"w": torch.tensor(-1.0)}, None, steps=2, hyper=torch.tensor(0.0)
            )


def test_nothing_is_raised_under_a_transform():
    problem = innerloop.Problem(lambda p, h, b: _fourth_power(p["w"]), innerloop.optim.sgd(lr=10.0))

    def final(w: Tensor) -> Tensor:
        return innerloop.unroll(problem, {"w": w}, None, steps=20).params["w"]

    found = torch.func.vmap(final)(torch.tensor([[0.0], [1.0]]))
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()


def test_an_iterator_that_is_used_up_is_named_as_the_reason_for_no_step():
    problem = innerloop.Problem(lambda p, h, b: _fourth_power(p["w"]), innerloop.optim.sgd(lr=10.0))
    with pytest.raises(innerloop.NonFiniteError, match=r"inner loss of step \d.*used up"):
        innerloop.unroll(problem, {"w": torch.ones(2)}, iter(range(20)))


def test_sums_that_overflow_are_not_taken_for_infinite_entries():
    huge = torch.full((4,), 1e38)
    problem = innerloop.Problem(lambda p, h, b: p["w"].mean(), innerloop.optim.sgd(lr=0.0))
    assert innerloop.unroll(problem, {"w": huge}, None, steps=0).params["w"].isfinite().all()


# -- arguments that mean something else ------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensor", "pair", "dict"])
def test_all_of_the_data_is_not_a_stack_of_steps(form: str):
    x, y = torch.ones(32, 2), torch.ones(32)
    data = {"tensor": x, "pair": (x, y), "dict": {"x": x, "y": y}}[form]
    with pytest.raises(INVALID, match=r"steps=3, but .* stacked over 32 steps.*lambda params"):
        innerloop.unroll(simple(), begin(), data, steps=3)
    with pytest.raises(INVALID, match="32 steps"):
        next(
            innerloop.ForwardMode().online(
                lambda p, h: p["w"].sum(), simple(), begin(), data, hyper=x[0], steps=3
            )
        )


class _Pieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"net": _Pieces()}, r"a module, _Pieces.*named_parameters"),
        ({"net": _Pieces(), "lr": torch.tensor(0.5)}, r"a module, _Pieces.*named_parameters"),
        ([_Pieces().parameters()], "generator, which can be read only once"),
        ({"lr": 0.5}, r"hyper\['lr'\] is the number 0.5; write torch.tensor\(0.5\)"),
        ([None, 2], r"hyper\[1\] is the number 2; write torch.tensor\(2.0\)"),
        ({"lr": torch.tensor(1)}, r"hyper\['lr'\] has dtype torch.int64; write hyper"),
        ({"lr": "fast"}, r"hyper\['lr'\] is str"),
    ],
)
@pytest.mark.parametrize("strategy", [innerloop.StoreAll(), innerloop.Checkpointed()], ids=repr)
def test_hyper_holds_tensors(hyper: Any, message: str, strategy: innerloop.strategy.Strategy):
    with pytest.raises(INVALID, match=message):
        innerloop.metagradient(
            lambda traj, h: traj.params["w"].sum(),
            simple(),
            begin(),
            None,
            steps=2,
            hyper=hyper,
            wrt="hyper",
            strategy=strategy,
        )


# -- a carry in a file -----------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[], innerloop.optim.Optimizer]] = {
    **{
        name: partial(getattr(innerloop.optim, name), lr=0.05)
        for name in (
            "sgd",
            "adam",
            "adamw",
            "adamax",
            "nadam",
            "radam",
            "rmsprop",
            "rprop",
            "adagrad",
            "adadelta",
            "adafactor",
            "asgd",
        )
    },
    "momentum": lambda: innerloop.optim.sgd(lr=0.05, momentum=0.9),
    "lbfgs": lambda: innerloop.optim.lbfgs(lr=0.5),
    "chain": lambda: innerloop.optim.chain(
        innerloop.optim.accumulate(2), innerloop.optim.adam(lr=0.05)
    ),
    "float32": lambda: innerloop.optim.in_float32(innerloop.optim.adam(lr=0.05)),
    "from torch": lambda: innerloop.optim.from_torch(
        torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=0.05)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_carry_is_saved_and_loaded(name: str):
    optimizer = OPTIMIZERS[name]()
    x = smooth_noise(6, 3)
    problem = innerloop.Problem(
        lambda p, h, b: ((p["w"] * b).sum() - 1).square() + p["v"].square().sum(), optimizer
    )
    params = {"w": smooth_noise(3, phase=1.0), "v": smooth_noise(2, phase=2.0)}
    if name == "from torch":
        given = [nn.Parameter(p) for p in params.values()]
        bound = innerloop.optim.from_torch(torch.optim.Adam(given, lr=0.05))
        problem = innerloop.Problem(problem.loss, bound)
    whole = innerloop.unroll(problem, params, list(x)).params
    carry = innerloop.unroll(problem, params, list(x[:3])).at(-1).detach()
    file = io.BytesIO()
    torch.save(carry, file)
    file.seek(0)
    loaded = torch.load(file)
    assert isinstance(loaded, innerloop.Carry)
    assert loaded.time == 3
    found = innerloop.unroll(problem, loaded, list(x[3:])).params
    for key, p in whole.items():
        assert torch.equal(found[key], p), key


# -- modules that write, and what they leave behind ------------------------------------------------


class Clamped(nn.Module):
    """A forward pass that clips the module's own weight."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0, -3.0, 0.3]))
        self.calls, self.first = 0, first

    def forward(self, x: Tensor) -> Tensor:
        if self.calls >= self.first:
            with torch.no_grad():
                self.w.clamp_(-1, 1)
        self.calls += 1
        return x @ self.w


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    "strategy",
    [
        innerloop.StoreAll(),
        innerloop.Checkpointed(),
        innerloop.Checkpointed(product="mixed"),
        innerloop.FirstOrder(),
        innerloop.ForwardMode(),
        innerloop.Truncated(last=1),
    ],
    ids=str,
)
def test_a_forward_pass_that_writes_its_weight_is_refused(strategy: Any, first: int):
    model, x = Clamped(first), torch.ones(2, 3)
    problem = innerloop.Problem.from_module(
        model, lambda m, hyper, batch: (m(x) - hyper).square().mean(), innerloop.optim.sgd(lr=0.1)
    )
    hyper = torch.tensor(1.0, requires_grad=not isinstance(strategy, innerloop.FirstOrder))
    start = dict(model.named_parameters())
    with pytest.raises(INVALID, match="writes the parameter 'w' in place"):
        innerloop.unroll(problem, start, None, steps=3, hyper=hyper, strategy=strategy)
    assert model.w.tolist() == [2.0, -3.0, 0.3]


def test_a_forward_pass_that_writes_its_weight_leaves_the_arguments_of_functional_alone():
    call, params, _ = innerloop.functional(Clamped())
    for _ in range(2):
        assert call(params, torch.ones(1, 3)).item() == pytest.approx(0.3)
        assert params["w"].tolist() == [2.0, -3.0, 0.3]
    call, params, _ = innerloop.functional(Clamped(first=1))
    call(params, torch.ones(1, 3))
    with pytest.raises(INVALID, match="did not at its first call"):
        call(params, torch.ones(1, 3))


@pytest.mark.parametrize(
    "strategy", [innerloop.StoreAll(), innerloop.Checkpointed(), innerloop.ForwardMode()], ids=str
)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d], ids=lambda n: n.__name__)
@pytest.mark.parametrize("cut", [False, True])
def test_an_outer_loss_and_a_loop_that_goes_on_use_running_statistics(
    strategy: Any, norm: Any, cut: bool
):
    """The norm comes first, so that its statistics are those of the data."""
    x = smooth_noise(4, 5, 3, 2) if norm is nn.InstanceNorm1d else smooth_noise(4, 5, 3)
    width = x.shape[-1]

    def made() -> nn.Module:
        arguments = {"affine": True, "track_running_stats": True}
        model = nn.Sequential(norm(3, **arguments), nn.Linear(width, 1))
        with torch.no_grad():
            model[1].weight.copy_(torch.linspace(-1, 1, width))  # type: ignore[operator]
            model[1].bias.fill_(0.1)  # type: ignore[operator]
        return model

    def plain(c: float) -> float:
        net = made()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for batch in x:
            optimizer.zero_grad()
            (net(batch) - 1 - c).square().mean().backward()
            optimizer.step()
        return net.eval()(x[0]).square().sum().item()

    model, c = made(), torch.tensor(1.0, requires_grad=True)
    start = {n: p.detach() for n, p in model.named_parameters()}
    evaluated, _, _ = innerloop.functional(made().eval())
    problem = innerloop.Problem.from_module(
        model, lambda m, hyper, batch: (m(batch) - hyper).square().mean(), innerloop.optim.sgd(0.1)
    )
    first = x[:2] if cut else x
    traj = innerloop.unroll(problem, start, first, hyper=c, strategy=strategy)
    if cut:
        traj = innerloop.unroll(problem, traj.at(-1), x[2:], hyper=c)
    out, _ = evaluated(traj.params, x[0], buffers=traj.at(-1).buffers)
    (ours,) = torch.autograd.grad(out.square().sum(), c)
    assert_derivative(ours.item(), derivative(plain), f"{strategy}")


@pytest.mark.parametrize("strategy", [innerloop.StoreAll(), innerloop.Checkpointed()], ids=str)
def test_inference_tensors_are_named(strategy: Any):
    with torch.inference_mode():
        made = torch.ones(2)
    problem = simple(lambda params, hyper, batch: ((params["w"] * batch - hyper) ** 2).sum())
    with pytest.raises(NOT_DIFFERENTIABLE, match="inference_mode"):
        innerloop.unroll(
            problem, begin(), [made], hyper=torch.ones(2, requires_grad=True), strategy=strategy
        )
    for run in (
        innerloop.unroll,
        partial(innerloop.metagradient, lambda t, h: t.params["w"].sum()),
    ):
        with pytest.raises(INVALID, match="made under torch"):
            run(simple(), {"w": made}, None, steps=1, strategy=strategy)


@pytest.mark.parametrize("strategy", [innerloop.StoreAll(), innerloop.Checkpointed()], ids=str)
@pytest.mark.parametrize("around", ["checkpoint", "reentrant checkpoint", "save_on_cpu"])
def test_hooks_on_saved_tensors_around_a_loop(strategy: Any, around: str):
    def layer(w: Tensor) -> Tensor:
        traj = innerloop.unroll(simple(lr=0.1), {"w": w}, None, steps=3, strategy=strategy)
        return traj.params["w"]

    w = torch.tensor(2.0, requires_grad=True)
    if around == "save_on_cpu":
        with torch.autograd.graph.save_on_cpu():
            out = layer(w)
    else:
        out = checkpoint(layer, w, use_reentrant=around != "checkpoint")
    out.backward()
    assert w.grad is not None
    assert w.grad.item() == pytest.approx(0.9**3)
