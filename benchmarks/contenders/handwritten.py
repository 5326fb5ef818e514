"""The loop one writes without a library: functional parameters and
`torch.autograd.grad(create_graph=True)`.

In float64 it is also the reference that every contender must agree with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.contenders.base import MetaGradient
from benchmarks.workloads import Batch, Task, Workload, loss

Params = dict[str, Tensor]
Moments = list[tuple[Tensor, Tensor]]
AdamTensor = Callable[[Tensor, Tensor, Tensor, Tensor, float, int], tuple[Tensor, Tensor, Tensor]]

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def prepare(workload: Workload, fused: bool = False) -> MetaGradient:
    """`fused` writes Adam with as few operations a tensor as torch allows, which papers' code
    rarely does."""
    return _loop(workload, torch.float32, True, _fused_adam if fused else _plain_adam)


def reference(workload: Workload) -> Params:
    """The meta-gradient in float64."""
    return dict(_loop(workload, torch.float64, True, _plain_adam)())


def first_order(workload: Workload) -> Params:
    """The meta-gradient without second derivatives, in float64: the check must tell it from the
    reference."""
    return dict(_loop(workload, torch.float64, False, _plain_adam)())


def _loop(
    workload: Workload, dtype: torch.dtype, create_graph: bool, adam: AdamTensor
) -> MetaGradient:
    model = workload.model(dtype)
    tasks = workload.batches(dtype)
    forward = workload.forward or partial(functional_call, model)
    initial = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}

    def batch_loss(params: Params, batch: Batch) -> Tensor:
        return loss(forward(params, batch.x), batch.y)

    def adapted_loss(task: Task) -> Tensor:
        params = initial
        moments = [(torch.zeros_like(p, requires_grad=False),) * 2 for p in initial.values()]
        for t, batch in enumerate(task.inner):
            grads = torch.autograd.grad(
                batch_loss(params, batch), list(params.values()), create_graph=create_graph
            )
            if workload.optimizer == "sgd":
                params = {
                    name: p - workload.lr * g
                    for (name, p), g in zip(params.items(), grads, strict=True)
                }
            else:
                params, moments = _adam_step(adam, params, moments, grads, workload.lr, t + 1)
        return batch_loss(params, task.outer)

    def run() -> Params:
        for task in tasks:
            (adapted_loss(task) / len(tasks)).backward()
        return {name: _take_grad(p) for name, p in initial.items()}

    return run


def _adam_step(
    adam: AdamTensor,
    params: Params,
    moments: Moments,
    grads: tuple[Tensor, ...],
    lr: float,
    count: int,
) -> tuple[Params, Moments]:
    new = [
        adam(p, g, mu, nu, lr, count)
        for p, g, (mu, nu) in zip(params.values(), grads, moments, strict=True)
    ]
    return {name: p for name, (p, _, _) in zip(params, new, strict=True)}, [
        (mu, nu) for _, mu, nu in new
    ]


def _plain_adam(
    p: Tensor, g: Tensor, mu: Tensor, nu: Tensor, lr: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    mu = BETA1 * mu + (1 - BETA1) * g
    nu = BETA2 * nu + (1 - BETA2) * g * g
    unbiased_mu = mu / (1 - BETA1**count)
    unbiased_nu = nu / (1 - BETA2**count)
    return p - lr * unbiased_mu / (unbiased_nu.sqrt() + EPS), mu, nu


def _fused_adam(
    p: Tensor, g: Tensor, mu: Tensor, nu: Tensor, lr: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    mu = mu.lerp(g, 1 - BETA1)
    nu = (nu * BETA2).addcmul(g, g, value=1 - BETA2)
    scale = nu.sqrt() / math.sqrt(1 - BETA2**count) + EPS
    return p.addcdiv(mu, scale, value=-lr / (1 - BETA1**count)), mu, nu


def _take_grad(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    if grad is None:
        raise RuntimeError("no meta-gradient reached an initial parameter")
    parameter.grad = None
    return grad
