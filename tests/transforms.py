"""The one list of gradient transforms under test.

**To enrol a new transform, add one entry to ``TRANSFORMS``**: how to make it, what plain PyTorch
does in its place, and its real-valued hyper-parameters. It then stands under the contract of
``test_transform.py``, in front of each of ``RULES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop
from innerloop.optim._transforms.noise import standard_normal
from tests.oracles import Gradient, Params, torch_run

Grads = Mapping[str, Tensor | None]
Plain = Callable[[Grads, Params, int], dict[str, Tensor | None]]


@dataclass(frozen=True)
class Enrolled:
    """One transform under test.

    Attributes:
        make: ``make(**numbers)``, the transform.
        plain: ``plain(**numbers)``, the same written with PyTorch alone: a function of gradients,
            parameters and time, good for one run.
        numbers: real-valued hyper-parameters and where they are tested.
        label: for the test's name.
    """

    make: Callable[..., innerloop.optim.Transform]
    plain: Callable[..., Plain]
    numbers: dict[str, float]
    label: str

    @property
    def name(self) -> str:
        return self.make(**self.numbers).name


def edited(edit: Callable[[list[Tensor]], Any]) -> Plain:
    """What a function of ``torch.nn.utils`` does to the gradients of parameters that have elements
    (torch takes no inf-norm of others)."""

    def plain(grads: Grads, params: Params, t: int) -> dict[str, Tensor | None]:
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        for name, leaf in leaves.items():
            g = grads[name]
            leaf.grad = None if g is None else g.clone()
        edit([leaf for leaf in leaves.values() if leaf.numel()])
        return {name: leaf.grad for name, leaf in leaves.items()}

    return plain


def each(fn: Callable[[str, Tensor, Tensor, int], Tensor]) -> Plain:
    """A function of name, gradient, parameter and time, for each that has a gradient."""
    return lambda grads, params, t: {
        n: None if g is None else fn(n, g, params[n], t) for n, g in grads.items()
    }


def by_norm(norm_type: float) -> Callable[..., Plain]:
    return lambda max_norm: edited(
        lambda ps: torch.nn.utils.clip_grad_norm_(ps, max_norm, norm_type)
    )


def one_by_one(max_norm: float) -> Plain:
    return edited(
        lambda ps: [torch.nn.utils.clip_grad_norm_([p], max_norm) for p in ps if p.grad is not None]
    )


def masked_decay(weight_decay: float) -> Plain:
    return each(lambda n, g, p, t: g + weight_decay * p if p.ndim > 1 else g)


def noise(eta: float, gamma: float) -> Plain:
    """The random numbers are those of the library (their distribution has a test of its own), the
    rest is the paper's formula."""

    def plain(grads: Grads, params: Params, t: int) -> dict[str, Tensor | None]:
        place, noisy = 0, {}
        for name, p in params.items():
            g = grads[name]
            noisy[name] = (
                None
                if g is None
                else g + (eta / (1 + t) ** gamma) ** 0.5 * standard_normal(g, 3, t, place)
            )
            place += 2 * p.numel()
        return noisy

    return plain


def mean_of(every: int) -> Plain:
    """``backward`` adds up, the optimizer steps every k-th time and is skipped in between."""
    gathered: list[Grads] = []

    def plain(grads: Grads, params: Params, t: int) -> dict[str, Tensor | None]:
        gathered.append(grads)
        if len(gathered) < every:
            return dict.fromkeys(grads)
        mean: dict[str, Tensor | None] = {}
        for n in grads:
            had = [g for row in gathered if (g := row[n]) is not None]
            mean[n] = torch.stack(had).sum(0) / every if had else None
        gathered.clear()
        return mean

    return plain


def squashed(grads: Grads) -> dict[str, Tensor | None]:
    return {n: None if g is None else g.tanh() for n, g in grads.items()}


o = innerloop.optim
TRANSFORMS = (
    Enrolled(o.clip_by_global_norm, by_norm(2.0), {"max_norm": 1.3}, "global-2"),
    Enrolled(
        lambda max_norm: o.clip_by_global_norm(max_norm, 3.0),
        by_norm(3.0),
        {"max_norm": 0.9},
        "global-3",
    ),
    Enrolled(
        lambda max_norm: o.clip_by_global_norm(max_norm, 1),
        by_norm(1.0),
        {"max_norm": 5.0},
        "global-1",
    ),
    Enrolled(
        lambda max_norm: o.clip_by_global_norm(max_norm, float("inf")),
        by_norm(float("inf")),
        {"max_norm": 0.6},
        "global-inf",
    ),
    Enrolled(o.clip_per_parameter, one_by_one, {"max_norm": 0.45}, "per-parameter"),
    Enrolled(
        o.clip_by_value,
        lambda limit: edited(lambda ps: torch.nn.utils.clip_grad_value_(ps, limit)),
        {"limit": 0.21},
        "value",
    ),
    Enrolled(
        lambda weight_decay: o.add_decayed_weights(weight_decay, mask=lambda name, p: p.ndim > 1),
        masked_decay,
        {"weight_decay": 0.3},
        "decay",
    ),
    Enrolled(
        lambda eta, gamma: o.add_noise(eta, gamma, seed=3),
        noise,
        {"eta": 0.04, "gamma": 0.55},
        "noise",
    ),
    Enrolled(lambda: o.accumulate(3), lambda: mean_of(3), {}, "accumulate"),
    Enrolled(
        o.scale, lambda factor: each(lambda n, g, p, t: g * factor), {"factor": -0.7}, "scale"
    ),
    Enrolled(
        lambda: o.grad_callback(squashed),
        lambda: lambda grads, params, t: squashed(grads),
        {},
        "callback",
    ),
)
RULES: dict[str, tuple[innerloop.optim.Optimizer, type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (o.sgd(lr=0.1, momentum=0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adam": (o.adam(lr=0.05, eps=0.1), torch.optim.Adam, {"lr": 0.05, "eps": 0.1}),
}

each_transform = pytest.mark.parametrize("case", TRANSFORMS, ids=lambda case: case.label)
FEW = (
    "global-2",
    "per-parameter",
    "accumulate",
)  # the norms of three kinds are alike, and so is what works entry by entry
few_always = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.label, marks=() if case.label in FEW else pytest.mark.slow)
        for case in TRANSFORMS
    ],
)
"""The same for checks that cost seconds each: what is not in `FEW` is slow."""
each_rule = pytest.mark.parametrize("rule", list(RULES))


def addressed(case: Enrolled, values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a transform as the ``hyper`` argument of ``update``."""
    return {f"{case.name}.{key}": value for key, value in values.items()}


def chained(case: Enrolled, rule: str) -> innerloop.optim.Optimizer:
    return o.chain(case.make(**case.numbers), RULES[rule][0])


def plain_run(
    case: Enrolled,
    rule: str,
    values: Mapping[str, Any],
    params: Params,
    gradient: Gradient,
    steps: int,
) -> Params:
    """The parameters after a run with ``torch.optim``, the gradients changed by plain PyTorch
    before each step."""
    plain = case.plain(**values)
    _, cls, settings = RULES[rule]
    return torch_run(
        cls, settings, params, lambda params, t: plain(gradient(params, t), params, t), steps
    )
