"""The losses: functions of the model's output, its parameters and the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.models import OUT, Batch

CLASS_WEIGHTS = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
Call = Callable[[Batch], Tensor]
Core = Callable[[Call, Batch, float], Tensor]


class Loss(NamedTuple):
    """One loss.

    Attributes:
        core: ``core(call, batch, ...)`` with ``call(batch)`` the output of the model.
        prepare: what is done to a model once, before it is trained.
        hooks: True if gradients are changed by hooks on their way: then the outer loss is a
            function of the parameters alone, since a hook would change its gradient too.
        vector: True if the core calls the model at other inputs, which tokens do not allow.
    """

    core: Callable[[Call, Batch], Tensor]
    prepare: Callable[[nn.Module], object] = lambda model: None
    hooks: bool = False
    continuous: bool = False


def of_output(value: Callable[[Tensor, Batch], Tensor]) -> Callable[[Call, Batch], Tensor]:
    """Make a loss from a function of the output and the batch."""
    return lambda call, batch: value(call(batch), batch)


def hooked_output(output: Tensor, batch: Batch) -> Tensor:
    if output.requires_grad:
        output.register_hook(lambda grad: 0.5 * grad + grad.square())
    return F.mse_loss(output, batch["y"])


def scaled_output(output: Tensor, batch: Batch) -> Tensor:
    if output.requires_grad:
        output.register_hook(lambda grad: 0.3 * grad)
    return F.cross_entropy(output, batch["labels"])


def with_module_hook(model: nn.Module) -> object:
    def hook(module: nn.Module, into: Any, out: Any) -> Any:
        return tuple(None if g is None else 0.5 * g for g in into)

    last: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return (last or [model])[-1].register_full_backward_hook(hook)


def with_parameter_hook(model: nn.Module) -> object:
    first = next(model.parameters())
    return first.register_hook(lambda grad: 0.5 * grad) if first.requires_grad else None


def gradient_penalty(call: Call, batch: Batch) -> Tensor:
    x = batch["x"].clone().requires_grad_()
    output = call({**batch, "x": x})
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return F.mse_loss(output, batch["y"]) + 0.1 * slope.square().sum()


def consistency(call: Call, batch: Batch) -> Tensor:
    near = call({**batch, "x": batch["x"] + 0.1})
    return F.mse_loss(call(batch), batch["y"]) + (near - call(batch)).square().mean()


def masked(output: Tensor, batch: Batch) -> Tensor:
    rows = (output - batch["y"]).square().sum(-1) * batch["mask"]
    return rows.sum() / batch["mask"].sum()


def ignoring(output: Tensor, batch: Batch) -> Tensor:
    labels = batch["labels"].masked_fill(batch["mask"] == 0, -100)
    return F.cross_entropy(output, labels, weight=CLASS_WEIGHTS)


def contrastive(output: Tensor, batch: Batch) -> Tensor:
    likeness = output @ batch["y"].T
    return F.cross_entropy(likeness, torch.arange(len(output)))


def binary(output: Tensor, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, (batch["y"] > 0).double())


def divergence(output: Tensor, batch: Batch) -> Tensor:
    return F.kl_div(output.log_softmax(-1), batch["y"].softmax(-1), reduction="batchmean")


def of_distances(output: Tensor, batch: Batch) -> Tensor:
    return torch.cdist(output, batch["y"]).sin().mean()


def correlation(output: Tensor, batch: Batch) -> Tensor:
    return 1 - F.cosine_similarity(output, batch["y"], dim=-1).mean() + 0.1 * output.std(0).mean()


def gaussian(output: Tensor, batch: Batch) -> Tensor:
    return F.gaussian_nll_loss(output, batch["y"], output.square().mean(-1, keepdim=True) + 0.5)


LOSSES: dict[str, Loss] = {
    "mse": Loss(of_output(lambda o, b: F.mse_loss(o, b["y"]))),
    "l1": Loss(of_output(lambda o, b: F.l1_loss(o, b["y"]))),
    "huber": Loss(of_output(lambda o, b: F.huber_loss(o, b["y"], delta=0.7))),
    "smooth l1": Loss(of_output(lambda o, b: F.smooth_l1_loss(o, b["y"], beta=0.5))),
    "cross entropy": Loss(of_output(lambda o, b: F.cross_entropy(o, b["labels"]))),
    "label smoothing": Loss(
        of_output(lambda o, b: F.cross_entropy(o, b["labels"], label_smoothing=0.2))
    ),
    "soft labels": Loss(of_output(lambda o, b: F.cross_entropy(o, b["y"].softmax(-1)))),
    "ignored labels": Loss(of_output(ignoring)),
    "masked rows": Loss(of_output(masked)),
    "nll": Loss(of_output(lambda o, b: F.nll_loss(o.log_softmax(-1), b["labels"]))),
    "binary": Loss(of_output(binary)),
    "kl": Loss(of_output(divergence)),
    "poisson": Loss(of_output(lambda o, b: F.poisson_nll_loss(o, b["y"].abs()))),
    "gaussian": Loss(of_output(gaussian)),
    "multi-margin": Loss(of_output(lambda o, b: F.multi_margin_loss(o, b["labels"], p=2))),
    "soft margin": Loss(of_output(lambda o, b: F.soft_margin_loss(o, b["y"].sign()))),
    "cosine": Loss(of_output(correlation)),
    "norm": Loss(of_output(lambda o, b: (o - b["y"]).norm(dim=-1).mean())),
    "distances": Loss(of_output(of_distances)),
    "contrastive": Loss(of_output(contrastive)),
    "log-sum-exp": Loss(of_output(lambda o, b: (o.logsumexp(-1) - o.mean(-1)).square().mean())),
    "consistency": Loss(consistency, continuous=True),
    "gradient penalty": Loss(gradient_penalty, continuous=True),
    "hook on the output": Loss(of_output(hooked_output), hooks=True),
    "scaling hook": Loss(of_output(scaled_output), hooks=True),
    "module hook": Loss(
        of_output(lambda o, b: F.mse_loss(o, b["y"])), prepare=with_module_hook, hooks=True
    ),
    "parameter hook": Loss(
        of_output(lambda o, b: F.mse_loss(o, b["y"])), prepare=with_parameter_hook, hooks=True
    ),
}
"""Loss -> how it is computed. One more line enrols one more; none stops a gradient."""

ROLES = ("scale", "decay", "output", "target", "none")


def value(
    loss: Loss,
    role: str,
    call: Call,
    params: Mapping[str, Tensor],
    batch: Batch,
    strength: Tensor,
    held: Tensor | None = None,
) -> Tensor:
    """Compute the loss, in which the outer variable ``strength`` has a role.

    ``held`` is the `target` of a step, if the role is to be the weight of the distance from it.
    """
    if role == "output":
        return loss.core(lambda b: call(b) * (1 + strength), batch)
    core = loss.core(call, batch)
    if role == "scale":
        return core * strength.exp()
    if role == "decay":
        return core + strength * torch.stack([p.square().sum() for p in params.values()]).sum()
    if held is not None:
        return core + strength * (outer_of_params(params) - held).square() / 10
    return core


def target(params: Mapping[str, Tensor]) -> Tensor:
    """Compute what a step holds constant, though it moves with the parameters."""
    return 0.5 * outer_of_params(params)


def weights(count: int) -> Tensor:
    return 1 + torch.sin(torch.arange(1.0, count + 1, dtype=torch.float64) * 12.9898) / 2


def outer_of_params(params: Mapping[str, Tensor]) -> Tensor:
    """Compute a smooth scalar in which every entry has another weight."""
    flat = torch.cat([params[name].reshape(-1) for name in sorted(params)])
    return (weights(len(flat)) * (flat + 0.5).sin()).sum()


def outer_of_output(output: Tensor, batch: Batch) -> Tensor:
    assert output.shape[-1] == OUT
    return (output - batch["y"]).square().mean() + (output * weights(OUT)).sin().sum() / 7
