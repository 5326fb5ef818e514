"""What a tracked loop is made of before its first step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from innerloop._module.checks import check_names
from innerloop._problem import hyper_names, rules_of
from innerloop._track.cut import GraphCut
from innerloop._types import Params
from innerloop._utils import torch_private, tree
from innerloop._utils.arguments import check_has_values
from innerloop.errors import InvalidInputError
from innerloop.optim._base import Optimizer, refuse_class
from innerloop.optim._from_torch.from_torch import from_torch

Learn = Literal["init", "outer", "nothing"]
Model = nn.Module | Mapping[str, nn.Module]
TorchOptimizer = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def check_place(learn: str) -> None:
    """Raise if a loop cannot be tracked in this way, or not here."""
    if learn not in ("init", "outer", "nothing"):
        raise InvalidInputError(f'learn={learn!r}: write "init", "outer" or "nothing"')
    if torch.is_inference_mode_enabled():
        raise InvalidInputError(
            "track under torch.inference_mode: an inner loop needs gradients even when "
            "nothing is learned"
        )
    if torch_private.inside_vmap():
        raise InvalidInputError(
            "track does not work inside torch.func.vmap: write the loop with innerloop.unroll "
            "or innerloop.metagradient there"
        )


def check_save_at(save_at: Sequence[int], learn: str) -> None:
    """Raise if times are given where every one is kept, or none is."""
    if len(save_at):
        why = (
            'learn="nothing" keeps times 0 and -1 only'
            if learn == "nothing"
            else "without strategy= track keeps every time: leave save_at= away"
        )
        raise InvalidInputError(f"save_at={list(save_at)!r} was given to track, and {why}")


def pure_optimizer(optimizer: object, own: Params) -> Optimizer:
    """Return the pure form of what a user gave as the optimizer.

    Args:
        optimizer: a torch optimizer, a list of them, or one of `innerloop.optim`.
        own: the model's own parameters, by name.

    Raises:
        InvalidInputError: it is something else, or has hooks that a tracked step does not run.
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    given: Sequence[object] = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    known = []
    for opt in given:
        refuse_class(opt)
        if not isinstance(opt, torch.optim.Optimizer):
            raise InvalidInputError(
                f"optimizer is {type(opt).__name__}: pass a torch.optim optimizer, a list of "
                "them, or one of innerloop.optim"
            )
        known.append(opt)
    return from_torch(known, own)


def checked_hyper(hyper: object, optimizer: Optimizer) -> dict[str, object]:
    """Return the overrides that a user gave; raise at a name that no rule of the optimizer has."""
    if hyper is None:
        return {}
    if not isinstance(hyper, Mapping):
        raise InvalidInputError(
            f'hyper is {type(hyper).__name__}: write a dict, hyper={{"lr": tensor}}'
        )
    for name, value in hyper.items():
        for x in tree.tensors(value):
            check_has_values(f"hyper[{name!r}]", x)
    names = hyper_names(optimizer)
    # An optimizer of the user's own need not say which names it has.
    if names is not None:
        for name in hyper:
            if name not in names:
                rules = dict.fromkeys(type(rule).__name__ for rule in rules_of(optimizer))
                called = ", ".join(rules)
                raise InvalidInputError(
                    f"{called} has no hyper-parameter {name!r}; it has {', '.join(names)}"
                )
    return dict(hyper)


def check_params(given: Params, own: Params) -> None:
    """Raise unless the tensors given for time 0 can take the place of the model's parameters."""
    check_names(given, own)
    for name, tensor in given.items():
        if tensor.dtype != own[name].dtype and len(given) < len(own):
            raise InvalidInputError(
                f"params[{name!r}] has dtype {tensor.dtype}, the model's parameter "
                f"{own[name].dtype}: give all parameters in one dtype"
            )


Look = Callable[[Sequence[str | None], Sequence[Tensor | None]], None]
"""Looks at the outer gradients that arrive at a node: the names of its results, and the gradients.
"""


def watch(params: Params, look: Look) -> None:
    """Let ``look`` see the outer gradients where they arrive at ``params``."""
    names: dict[Node, dict[int, str]] = {}
    for name, p in params.items():
        if p.grad_fn is not None:
            names.setdefault(p.grad_fn, {})[p.output_nr] = name
    for node, found in names.items():
        node.register_prehook(partial(look, [found.get(i) for i in range(max(found) + 1)]))


def time_zero(
    own: Params, given: Params, frozen: Collection[str], learn: Learn, cut: GraphCut
) -> dict[str, Tensor]:
    """Return the parameters at time 0: never the user's own tensors, unless they are frozen.

    Args:
        own: the model's own parameters.
        given: tensors that take the place of some of them.
        frozen: the names of those that are not trained, and are shared.
        learn: says which of them stay connected to where they come from.
        cut: ends the graph at the other ones.
    """
    start = {}
    for name, p in own.items():
        source = given.get(name, p)
        connected = learn != "nothing" and (learn == "init" or name in given)
        if connected and source.requires_grad:
            start[name] = source.clone()
        elif name in frozen:
            start[name] = source.detach()
        else:
            start[name] = cut.cut(source.detach().clone())
    if any(t.requires_grad for t in given.values()) or (learn == "init" and len(given) < len(own)):
        cut.reached = True
    return start
