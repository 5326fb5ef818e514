"""Learned optimizers: the network's weights get their meta-gradient, whatever differentiates the
loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import innerloop
from innerloop.optim import learned
from tests.optimizers import leaves, train
from tests.oracles import (
    Params,
    Task,
    assert_derivative,
    assert_params,
    directional,
    directions,
    inner,
    smooth_noise,
    torch_run,
)
from tests.strategies import each_exact_strategy

STEPS = 5


def weights() -> Params:
    return {
        "in": smooth_noise(3, 4),
        "bias": 0.2 * smooth_noise(4, phase=1.0),
        "out": smooth_noise(4, phase=2.0),
    }


def small_network(
    grad: Tensor, param: Tensor, state: Tensor, weights: Params
) -> tuple[Tensor, Tensor]:
    """Entry by entry: gradient, its running mean, and the parameter."""
    mean = 0.8 * state + 0.2 * grad
    hidden = (torch.stack([grad, mean, param], -1) @ weights["in"] + weights["bias"]).tanh()
    return -0.1 * (mean + hidden @ weights["out"]), mean


NETWORK = learned(small_network, init=torch.zeros_like)


def by_hand(weights: Params, params: Params) -> Params:
    """The same training as a plain loop over detached tensors."""
    task, means = Task(), {n: torch.zeros_like(p) for n, p in params.items()}
    for t in range(STEPS):
        grads = task.gradient(params, t)
        changes = {n: small_network(grads[n], params[n], means[n], weights) for n in params}
        params = {n: params[n] + change for n, (change, _) in changes.items()}
        means = {n: mean for n, (_, mean) in changes.items()}
    return params


def test_forward_is_the_loop_by_hand():
    task = Task()
    ours = train(NETWORK, task, task.params(), {"weights": weights()}, steps=STEPS)
    assert_params(ours, by_hand(weights(), task.params()), 1e-12)
    fixed = learned(small_network, weights(), init=torch.zeros_like)
    assert_params(train(fixed, task, task.params(), steps=STEPS), ours, 0)


def test_meta_gradients_equal_finite_differences():
    """In the network's weights and in the initial parameters."""
    task = Task()
    phi, params = leaves(weights()), leaves(task.params())
    final = task.outer(train(NETWORK, task, params, {"weights": phi}, steps=STEPS))
    found = torch.autograd.grad(final, [*phi.values(), *params.values()])
    ours = (dict(zip(phi, found, strict=False)), dict(zip(params, found[len(phi) :], strict=True)))
    for along in zip(directions(weights(), 2), directions(task.params(), 2), strict=True):
        truth = directional(lambda at: task.outer(by_hand(*at)), (weights(), task.params()), along)
        assert abs(truth) > 1e-3
        assert_derivative(inner(ours, along), truth, "d outer / d (weights, init)")


def test_a_rule_written_by_hand_is_that_of_torch():
    def momentum(grad: Tensor, param: Tensor, state: Any, weights: Params) -> tuple[Tensor, Tensor]:
        buffer = weights["mu"] * state + grad
        return -weights["lr"] * buffer, buffer

    task = Task()
    numbers = {
        "lr": torch.tensor(0.1, dtype=torch.float64),
        "mu": torch.tensor(0.9, dtype=torch.float64),
    }

    def gradient(params: Params, t: int) -> dict[str, Tensor | None]:
        grads: dict[str, Tensor | None] = dict(task.gradient(params, t))
        if t in (1, 4):
            grads["weight"] = None
        return grads

    truth = torch_run(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, task.params(), gradient, 8)
    opt = learned(momentum, init=torch.zeros_like)
    assert_params(
        train(opt, task, task.params(), {"weights": numbers}, steps=8, gradient=gradient),
        truth,
        1e-12,
    )


@each_exact_strategy()
def test_every_exact_strategy_gives_what_store_all_gives(strategy: innerloop.strategy.Strategy):
    task = Task()
    problem = innerloop.Problem(
        lambda params, hyper, t: task.loss(params, int(t)),
        NETWORK,
        optimizer_hyper=lambda hyper, t: {"weights": hyper},
    )

    def gradient(strategy: innerloop.strategy.Strategy) -> Any:
        return innerloop.metagradient(
            lambda traj, _: task.outer(traj.params),
            problem,
            task.params(),
            [torch.tensor(t) for t in range(STEPS)],
            hyper=weights(),
            wrt="hyper",
            strategy=strategy,
        )[1]

    for a, b in zip(
        pytree.tree_leaves(gradient(strategy)),
        pytree.tree_leaves(gradient(innerloop.StoreAll())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_vmap_over_networks_and_forward_mode():
    task = Task()
    several = [{n: w * (1 + 0.2 * i) for n, w in weights().items()} for i in range(2)]
    stacked = {n: torch.stack([phi[n] for phi in several]) for n in weights()}
    run = lambda phi: train(NETWORK, task, task.params(), {"weights": phi}, steps=STEPS)  # noqa: E731
    both = torch.func.vmap(run)(stacked)
    for i in range(2):
        assert_params({n: p[i] for n, p in both.items()}, by_hand(several[i], task.params()), 1e-12)
    along = directions(weights(), 1)[0]
    slope = torch.func.jvp(lambda phi: task.outer(run(phi)), (weights(),), (along,))[1]
    truth = directional(lambda phi: task.outer(by_hand(phi, task.params())), weights(), along)
    assert_derivative(float(slope), truth, "jvp")


@pytest.mark.compiled
def test_a_compiled_meta_gradient_is_the_eager_one():
    def outer(phi: Params, w: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda params, t: (params["w"].sin() * (1 + params["w"])).sum())
        return (
            train(NETWORK, Task(), {"w": w}, {"weights": phi}, steps=2, gradient=gradient)["w"]
            .square()
            .sum()
        )

    meta = torch.func.grad(outer, argnums=(0, 1))
    torch.compiler.reset()
    compiled = torch.compile(meta, fullgraph=True, backend="aot_eager")
    at = (weights(), smooth_noise(2, 3, phase=7.0))
    for a, b in zip(pytree.tree_leaves(compiled(*at)), pytree.tree_leaves(meta(*at)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_network_of_modules_in_groups_and_after_a_clip():
    """What a user writes: an ``nn.Module``, made a function; its parameters are the weights."""
    net = torch.nn.Sequential(
        torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)
    ).double()
    call, start, _ = innerloop.functional(net)
    opt = learned(
        lambda grad, param, state, phi: (0.1 * call(phi, grad.unsqueeze(-1)).squeeze(-1), state)
    )
    rule = innerloop.optim.groups(
        {
            "a": innerloop.optim.chain(innerloop.optim.clip_by_value(0.5), opt),
            "*": innerloop.optim.sgd(lr=1.0),
        }
    )
    params = {"a": smooth_noise(4), "b": smooth_noise(2)}
    grads = {"a": 3 * smooth_noise(4), "b": smooth_noise(2)}
    new, _ = rule.update(grads, rule.init(params), params, {"weights": start})
    expected = params["a"] + 0.1 * net(grads["a"].clamp(-0.5, 0.5).unsqueeze(-1)).squeeze(-1)
    assert_params({"a": new["a"]}, {"a": expected.detach()}, 1e-12)


def test_track_trains_a_network_that_is_an_optimizer():
    model = torch.nn.Linear(3, 1).double()
    phi = leaves(weights())
    x, y = smooth_noise(6, 3), smooth_noise(6, 1, phase=1.0)
    with innerloop.track(model, NETWORK, learn="outer", hyper={"weights": phi}) as loop:
        for _ in range(3):
            loop.step((loop.model(x) - y).square().mean())
        outer = (loop.model(x) - y).square().mean()
    outer.backward()
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in phi.values())


PARAMS = {"w": torch.ones(2)}
untyped: Any = learned  # what is passed here is wrong
BAD: dict[str, tuple[Any, str]] = {
    "no function": (lambda: untyped(3), "fn=3 is no function"),
    "init is no function": (lambda: untyped(small_network, init=3), "init=3 is no function"),
    "weights in a list": (
        lambda: untyped(small_network, [torch.ones(2)]),
        "weights is list.*named_parameters",
    ),
    "no weights": (lambda: update(NETWORK, None), "weights is NoneType.*hyper="),
    "another name": (
        lambda: update(NETWORK, {"lr": 1.0}),
        "does not know the hyper-parameter 'lr'.*'weights'",
    ),
    "no pair": (
        lambda: update(learned(lambda *a: a[0]), {"weights": {}}),
        "returned Tensor for 'w'.*pair",
    ),
    "another shape": (
        lambda: update(learned(lambda g, p, s, w: (g.sum(), s)), {"weights": {}}),
        r"shape \(\) for 'w', which has \(2,\)",
    ),
    "unknown gradient": (
        lambda: NETWORK.update(
            {"v": torch.ones(2)}, NETWORK.init(PARAMS), PARAMS, {"weights": weights()}
        ),
        "does not know the gradient 'v'",
    ),
    "wrong gradient": (
        lambda: NETWORK.update(
            {"w": torch.ones(3)}, NETWORK.init(PARAMS), PARAMS, {"weights": weights()}
        ),
        r"'w' has shape \(3,\), the parameter has \(2,\)",
    ),
}


def update(optimizer: innerloop.optim.Optimizer, hyper: Any) -> Any:
    return optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, hyper)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("what", list(BAD))
def test_bad_input(what: str):
    make, message = BAD[what]
    with pytest.raises(innerloop.InnerLoopError, match=message):
        make()
