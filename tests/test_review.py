"""Silent errors that a review found: each was a wrong number, or nothing, without an error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import innerloop
from innerloop import higher

pytestmark = pytest.mark.usefixtures("float64")


def quadratic(params: Any, hyper: Any, batch: Any) -> Tensor:
    return params["w"].square().sum() / 2


def test_a_loop_that_is_continued_leaves_the_users_random_numbers_alone() -> None:
    problem = innerloop.Problem(quadratic, innerloop.optim.sgd(lr=0.1))
    carry = innerloop.unroll(problem, {"w": torch.ones(2)}, None, steps=1).at(-1)
    drawn = []
    for _ in range(3):
        drawn.append(torch.randn(2))
        carry = innerloop.unroll(problem, carry, None, steps=1).at(-1)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_hyper_parameters_that_reach_nothing() -> None:
    problem = innerloop.Problem(
        quadratic, innerloop.optim.sgd(lr=0.1)
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
    problem = innerloop.Problem(quadratic, innerloop.optim.sgd(lr=0.1))
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


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.layer(y).tanh(), x, use_reentrant=False)


def test_activation_checkpointing_in_functional_and_in_the_bridge() -> None:
    model, x = Checkpointed(), torch.ones(3, 2)
    call, params, _ = innerloop.functional(model)
    params = {name: p.requires_grad_() for name, p in params.items()}
    with pytest.raises(innerloop.NotDifferentiableError, match="checkpoint"):
        call(params, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (patched, steps):
        steps.step(patched(x).square().mean())
        with pytest.raises(innerloop.NotDifferentiableError, match="checkpoint"):
            patched(x).square().mean().backward()


def test_the_bridge_refuses_a_loss_of_the_users_model() -> None:
    model, x = nn.Linear(2, 1), torch.ones(3, 2)
    with (
        higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (_, steps),
        pytest.raises(innerloop.InvalidInputError, match="patched module"),
    ):
        steps.step(model(x).square().mean())


def test_a_pattern_that_matches_nothing() -> None:
    sgd = innerloop.optim.sgd(lr=0.1)
    for patterns in ({"*": sgd, "head.*": sgd}, {"haed.*": sgd, "*": sgd}):
        with pytest.raises(innerloop.InvalidInputError, match="match no parameter"):
            innerloop.optim.groups(patterns).init(
                {"head.w": torch.ones(1), "body.w": torch.ones(1)}
            )


def test_unrelated_tensors_have_no_jacobian() -> None:
    problem = innerloop.Problem(quadratic, innerloop.optim.sgd(lr=0.1))
    traj = innerloop.unroll(problem, {"w": torch.ones(2, requires_grad=True)}, None, steps=1)
    with pytest.raises(innerloop.NotDifferentiableError, match="nothing connects"):
        innerloop.inspect.jacobian(traj, wrt={"lr": torch.tensor(0.1, requires_grad=True)})
