"""Networks with stock attention, and the meta-gradient of a short training of them, tracked and
unrolled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import innerloop
from innerloop import higher

Loss = Callable[[nn.Module, Any], Tensor]
LR = 0.1
STEPS = 2


def tracked(model: nn.Module, loss: Loss, batches: list[Any]) -> dict[str, Tensor]:
    """d loss(trained on all batches but the last; the last) / d initial parameters, through
    `innerloop.track`."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    with innerloop.track(model, optimizer) as loop:
        for batch in batches[:-1]:
            loop.step(loss(loop.model, batch))
        outer = loss(loop.model, batches[-1])
    outer.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def unrolled(model: nn.Module, loss: Loss, batches: list[Any]) -> dict[str, Tensor]:
    """The same through `innerloop.unroll`."""
    model = copy.deepcopy(model)
    optimizer = innerloop.optim.sgd(lr=LR, momentum=0.9)
    problem = innerloop.Problem.from_module(
        model, lambda model, hyper, batch: loss(model, batch), optimizer
    )
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    trajectory = innerloop.unroll(problem, params, batches[:-1])
    call, _, _ = innerloop.functional(model)
    view = _Called(model, call, trajectory.params)
    grads = torch.autograd.grad(loss(view, batches[-1]), list(params.values()), allow_unused=True)
    return {name: g for name, g in zip(params, grads, strict=True) if g is not None}


def bridged(model: nn.Module, loss: Loss, batches: list[Any]) -> dict[str, Tensor]:
    """The same through `innerloop.higher`."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
        for batch in batches[:-1]:
            diffopt.step(loss(fmodel, batch))
        loss(fmodel, batches[-1]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class _Called(nn.Module):
    """The model at other parameters, called as the model is."""

    def __init__(
        self, model: nn.Module, call: Callable[..., Any], params: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.call, self.params = call, params
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.params, *args, **kwargs)


def by_hand(
    model: nn.Module, loss: Loss, batches: list[Any], first_order: bool = False
) -> dict[str, Tensor]:
    """The same in plain PyTorch, for a model whose operations have all derivatives; `first_order`
    takes inner gradients for constants."""
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    start, momentum = dict(params), dict[str, Tensor]()

    def loss_at(params: Mapping[str, Tensor], batch: Any) -> Tensor:
        return loss(
            _Called(
                model, lambda p, *a, **k: torch.func.functional_call(model, dict(p), a, k), params
            ),
            batch,
        )

    for batch in batches[:-1]:
        grads = torch.autograd.grad(
            loss_at(params, batch), list(params.values()), create_graph=True, allow_unused=True
        )
        for (name, p), g in zip(list(params.items()), grads, strict=True):
            if g is not None:
                g = g.detach() if first_order else g
                momentum[name] = g if name not in momentum else 0.9 * momentum[name] + g
                params[name] = p - LR * momentum[name]
    grads = torch.autograd.grad(
        loss_at(params, batches[-1]), list(start.values()), allow_unused=True
    )
    return {name: g for name, g in zip(start, grads, strict=True) if g is not None}


def assert_equal(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor], tolerance: float) -> None:
    """Every gradient, relative to the largest entry of all of them."""
    assert set(ours) == set(truth)
    scale = max(float(g.abs().max()) for g in truth.values())
    worst = max(float((ours[name] - g).abs().max()) for name, g in truth.items())
    assert scale > 0
    assert worst <= tolerance * scale, f"off by {worst / scale:.1e} of the largest entry"
