"""The context manager of the bridge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from innerloop.errors import InvalidInputError
from innerloop.higher._base import Override
from innerloop.higher._fast_weights import fast_weights
from innerloop.higher.optim import DifferentiableOptimizer, get_diff_optim
from innerloop.higher.patch import monkeypatch
from innerloop.nn._mode import LoopMode


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    override: Override | None = None,
    track_higher_grads: bool = True,
) -> Iterator[tuple[Any, DifferentiableOptimizer]]:
    """Give a functional copy of ``model`` and a differentiable form of ``opt``.

    Args:
        model: any module; it is not changed.
        opt: an optimizer over its parameters; its state is taken over, it is not changed.
        device: where the copy lives; default: where the model is.
        copy_initial_weights: True starts from copies that no gradient leaves (as in ``higher``);
            False lets the outer gradient reach ``model.parameters()``, which is what MAML needs.
        override: hyper-parameters as ``{"lr": [tensor]}``: one entry for all param groups, or one
            per group.
        track_higher_grads: False for evaluation: nothing is differentiated through the steps, and
            memory does not grow.

    Returns:
        A context manager that gives ``(fmodel, diffopt)``; ``fmodel.parameters(time=t)`` are the
        parameters after t steps.

    Example:
        >>> import torch, innerloop.higher as higher
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 4.0)
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> x = torch.ones(1, 1)
        >>> with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        ...     _ = diffopt.step(fmodel(x).square().sum() / 2)
        ...     (fmodel(x).square().sum() / 2).backward()
        >>> model.weight.grad
        tensor([[1.]])
    """
    fmodel = monkeypatch(model, device, copy_initial_weights, track_higher_grads)
    diffopt = get_diff_optim(
        opt,
        model.parameters(),
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
    )
    fast = fast_weights(fmodel)
    loop = LoopMode(fast.edits)  # losses are computed outside of the module, too
    if track_higher_grads:
        loop.enter()
        fast.watch(loop)
    try:
        yield fmodel, diffopt
        fast.check_edits()
    except RuntimeError as error:
        if "can only change requires_grad flags of leaf" not in str(error):
            raise
        raise InvalidInputError(
            "requires_grad of a parameter of fmodel was changed: it is the result of the steps so "
            "far, and stays in the derivative. To freeze it: freeze the model before the loop; a "
            "parameter rests in the steps whose grad_callback gives None for it: "
            "diffopt.step(loss, grad_callback=lambda grads: [None if name in resting else g for "
            "(name, _), g in zip(fmodel.named_parameters(), grads)])"
        ) from error
    finally:
        loop.leave()
        fast.stop_watching()
