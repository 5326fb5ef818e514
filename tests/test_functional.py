"""`innerloop.functional` as a function; that it is the module itself, in every situation, is in
``test_module_situations.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import innerloop
from innerloop import higher
from tests.networks import network
from tests.oracles import assert_params, smooth_noise
from tests.situations import TwoLayers, features

pytestmark = pytest.mark.usefixtures("float64")


class Standardised(nn.Module):
    """Counts its calls and keeps a running mean; takes arguments of every kind and returns a
    dict."""

    mean: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor, *more: Tensor, power: int = 1) -> dict[str, Any]:
        self.calls += 1
        self.mean.mul_(0.5).add_(x.detach(), alpha=0.5)
        return {
            "out": (self.weight * (x - self.mean) + sum(more)) ** power,
            "calls": int(self.calls),
        }


def test_arguments_and_results_go_through():
    call, params, _ = innerloop.functional(Standardised())
    x = torch.tensor([1.0, -1.0])
    assert call(params, x)["out"].tolist() == [1.0, -1.5]
    assert call(params, x, torch.ones(2), power=2)["out"].tolist() == [4.0, 0.25]
    assert call({"weight": torch.tensor([4.0, 0.0])}, x=x)["out"].tolist() == [2.0, 0.0]


def test_buffers_are_inputs_and_outputs():
    model = Standardised()
    call, params, buffers = innerloop.functional(model)
    x = torch.tensor([1.0, -1.0])
    first, after = call(params, x, buffers=buffers)
    second, later = call(params, x, buffers=after)
    assert (first["calls"], second["calls"]) == (1, 2)
    assert buffers["mean"].tolist() == [0.0, 0.0]  # what was put in is not written
    assert after["mean"].tolist() == [0.5, -0.5]
    assert later["mean"].tolist() == [0.75, -0.75]
    assert int(model.calls) == 0
    assert (
        call(params, x)["calls"] == 1
    )  # without buffers: the module's own, and what becomes of them is dropped
    assert int(model.calls) == 0


def test_params_and_buffers_are_copies():
    model = Standardised()
    _, params, buffers = innerloop.functional(model)
    params["weight"].zero_()
    buffers["mean"].add_(1)
    assert not params["weight"].requires_grad
    assert model.weight.tolist() == [2.0, 3.0]
    assert model.mean.tolist() == [0.0, 0.0]


def test_it_is_a_snapshot_of_the_structure_and_reads_the_values_of_now():
    """Parameters that are not given are the module's own, as they are when the call is made."""
    model = network()
    call, params, _ = innerloop.functional(model)
    with torch.no_grad():
        model.head.bias.add_(1.0)
    part = {"body.weight": params["body.weight"]}
    assert torch.equal(call(part, features(0)), model(features(0)))


def test_gradients_vmap_and_jvp():
    """Per-example gradients against one backward pass per example; forward mode against reverse
    mode."""
    model = network()
    call, params, _ = innerloop.functional(model)
    x = features(0)
    loss = lambda params, x: call(params, x).square().sum()  # noqa: E731
    per_example = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    for i in range(len(x)):
        model.zero_grad()
        model(x[i]).square().sum().backward()
        assert_params(
            {n: g[i] for n, g in per_example.items()},
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
            1e-13,
        )
    direction = {n: smooth_noise(*p.shape) for n, p in params.items()}
    forward = torch.func.jvp(lambda p: loss(p, x), (params,), (direction,))[1]
    reverse = sum((g * direction[n]).sum() for n, g in torch.func.grad(loss)(params, x).items())
    torch.testing.assert_close(forward, reverse, rtol=1e-12, atol=0)


def test_buffers_under_vmap():
    """Running statistics of several tasks at once: in place inside the module, functional
    outside."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    call, params, buffers = innerloop.functional(model)
    tasks = torch.stack([features(t) for t in range(3)])
    batched = {name: torch.stack([b] * 3) for name, b in buffers.items()}
    outputs, after = torch.func.vmap(lambda x, b: call(params, x, buffers=b))(tasks, batched)
    for i, x in enumerate(tasks):
        output, expected = call(params, x, buffers=buffers)
        torch.testing.assert_close(outputs[i], output, rtol=1e-12, atol=1e-14)
        assert_params({n: b[i] for n, b in after.items()}, expected, 1e-12)


@pytest.mark.parametrize(
    "model", [network(), nn.LSTM(3, 4).double(), Standardised()], ids=lambda m: type(m).__name__
)
def test_the_module_is_itself_again_after_an_exception(model: nn.Module):
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: x.detach().clone() for name, x in before.items()}
    call, params, _ = innerloop.functional(model)
    with pytest.raises((RuntimeError, ValueError)):
        call({name: 2 * p for name, p in params.items()}, torch.zeros(7, 7, 7, 7))
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is x for name, x in before.items())
    assert_params({name: x.detach() for name, x in after.items()}, values, 0)


def test_a_module_called_inside_itself():
    """A loop inside a loop calls the same function while it is running."""
    call, params, _ = innerloop.functional(network())

    class Outer(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + call({n: 2 * p for n, p in params.items()}, x)

    outer = Outer()
    outer.load_state_dict(network().state_dict())
    call_outer, outer_params, _ = innerloop.functional(outer)
    doubled = network()
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    torch.testing.assert_close(
        call_outer(outer_params, features(0)),
        (network()(features(0)) + doubled(features(0))).detach(),
    )


def test_the_same_function_reentered():
    """The module's own forward calls the function that was made from it, at other parameters."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            out = self.inner(x)
            return (
                out + call({n: p * 0.5 for n, p in self.named_parameters()}, x, depth=depth - 1)
                if depth
                else out
            )

    call, params, _ = innerloop.functional(Outer())
    expected = torch.zeros(6, 1)
    for k in range(3):
        scaled = network()
        with torch.no_grad():
            for p in scaled.parameters():
                p.mul_(0.5**k)
        expected = expected + scaled(features(0)).detach()
    torch.testing.assert_close(call(params, features(0)), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("types_unchecked")
def test_what_it_refuses():
    with pytest.raises(innerloop.InvalidInputError, match="got function"):
        innerloop.functional(lambda x: x)  # type: ignore[arg-type]
    call, _, _ = innerloop.functional(network())
    with pytest.raises(innerloop.InvalidInputError, match="'nobody'"):
        call({"nobody": torch.zeros(1)}, features(0))
    with pytest.raises(innerloop.InvalidInputError, match=r"head.weight.*\(4,\).*\(1, 4\)"):
        call({"head.weight": torch.zeros(4)}, features(0))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.layer(y).tanh(), x, use_reentrant=False)


def test_activation_checkpointing_in_functional() -> None:
    """What runs again runs with the parameters of its own call."""
    model, x = Checkpointed(), torch.ones(3, 2)
    call, params, _ = innerloop.functional(model)
    for scale in (1.0, 2.0):
        params = {name: (scale * p).detach().requires_grad_() for name, p in params.items()}
        ours = call(params, x)
        call({name: 0 * p for name, p in params.items()}, x)
        truth = (x @ params["layer.weight"].T + params["layer.bias"]).tanh()
        found, expected = (
            torch.autograd.grad(y.square().sum(), list(params.values())) for y in (ours, truth)
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_activation_checkpointing_in_the_bridge() -> None:
    model, x = Checkpointed(), torch.ones(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (patched, steps):
        steps.step(patched(x).square().mean())
        with pytest.raises(innerloop.NotDifferentiableError, match="checkpoint"):
            patched(x).square().mean().backward()


@pytest.mark.parametrize("inner", [False, True])
def test_a_checkpointed_outer_loss_does_not_hide_a_checkpointed_step(inner: bool) -> None:
    """The step would be recomputed with the newest weights, which the outer loss has read."""

    def gradient(inner: bool, outer: bool) -> list[Any]:
        torch.manual_seed(0)
        model, x = Checkpointed(), torch.ones(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (patched, steps):
            for uses, last in ((inner, False), (outer, True)):
                out = patched(x) if uses else patched.layer(x).tanh()
                if last:
                    out.square().mean().backward()
                else:
                    steps.step(out.square().mean())
        return [p.grad for p in model.parameters()]

    if inner:
        with pytest.raises(innerloop.NotDifferentiableError, match="checkpoint"):
            gradient(True, True)
        return
    torch.testing.assert_close(gradient(False, True), gradient(False, False))
