"""The update rules: the library's, the plain ones that are their truth, and their flags."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

import innerloop

Settings = dict[str, Any]
FLAG = (False, True)


class PlainMuon(torch.optim.Optimizer):
    """Muon in double precision: ``torch.optim.Muon`` itself orthogonalises in bfloat16."""

    def __init__(self, params: Any, **settings: Any) -> None:
        defaults = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True}
        super().__init__(params, {**defaults, "adjust_lr_fn": None, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mu, state = group["momentum"], self.state[p]
                old = state.get("buffer", torch.zeros_like(p))
                buffer = mu * old + (1 - mu) * p.grad
                state["buffer"] = buffer
                u = (1 - mu) * p.grad + mu * buffer if group["nesterov"] else buffer
                rows, columns = p.shape
                x = u.T if rows > columns else u
                x = x / x.norm().clamp(min=1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                u = x.T if rows > columns else x
                if group["adjust_lr_fn"] == "match_rms_adamw":
                    scale = 0.2 * max(rows, columns) ** 0.5
                else:
                    scale = max(1.0, rows / columns) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-group["lr"] * scale)


class PlainLearned(torch.optim.Optimizer):
    """The learned rule of `learned`: a momentum, squashed by tanh."""

    def __init__(self, params: Any, lr: float = 0.1, gain: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "gain": gain})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                kept = 0.7 * self.state[p].get("kept", torch.zeros_like(p)) + p.grad
                self.state[p]["kept"] = kept
                p.sub_(group["lr"] * torch.tanh(group["gain"] * kept))


class Foreign(torch.optim.Optimizer):
    """An optimizer of somebody else, written in place: a normalised momentum."""

    def __init__(self, params: Any, lr: float = 0.1, mu: float = 0.8) -> None:
        super().__init__(params, {"lr": lr, "mu": mu})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["average"] = torch.zeros_like(p)
                    state["step"] = 0
                state["step"] += 1
                state["average"].mul_(group["mu"]).add_(p.grad, alpha=1 - group["mu"])
                size = state["average"].square().mean().add(0.1).sqrt()
                p.addcdiv_(state["average"], size, value=-group["lr"] / state["step"] ** 0.5)


def learned(lr: float = 0.1, gain: float = 1.0) -> innerloop.optim.Optimizer:
    def fn(grad: Tensor, param: Tensor, state: Tensor, weights: Any) -> tuple[Tensor, Tensor]:
        kept = 0.7 * state + grad
        return -weights["lr"] * torch.tanh(weights["gain"] * kept), kept

    return innerloop.optim.learned(
        fn,
        {"lr": torch.tensor(lr).double(), "gain": torch.tensor(gain).double()},
        init=torch.zeros_like,
    )


def muon(**settings: Any) -> innerloop.optim.Optimizer:
    return innerloop.optim.muon(**settings, ns_dtype=torch.float64)


def foreign(**settings: Any) -> innerloop.optim.Optimizer:
    return innerloop.optim.adapt(Foreign, **settings)


class Rule(NamedTuple):
    """One update rule.

    Attributes:
        ours: its constructor in the library.
        torch: the class that is its truth.
        choices: setting -> the values to draw from.
        varied: the settings that are differentiated; ``betas.0`` is the first of the pair.
        steps: more steps than usual are needed for everything to make itself felt.
        by_torch: True if the front ends take an object of the torch class for it.
        allowed: False for combinations that torch refuses, or at which it has a jump.
    """

    ours: Callable[..., innerloop.optim.Optimizer]
    torch: Callable[..., torch.optim.Optimizer]
    choices: dict[str, tuple[Any, ...]]
    varied: tuple[str, ...]
    steps: int = 0
    by_torch: bool = True
    allowed: Callable[[Settings], bool] = lambda settings: True


def _nesterov(settings: Settings) -> bool:
    plain = settings["momentum"] == 0
    if settings["nesterov"]:
        return not plain and settings["dampening"] == 0
    return not (plain and settings["dampening"])


BETAS = ((0.9, 0.99), (0.7, 0.8), (0.0, 0.9))
DECAY = (0.0, 0.1)
EPS = (1e-2, 0.1, 1e-3)
OURS = innerloop.optim
T = torch.optim
RULES: dict[str, Rule] = {
    "sgd": Rule(
        OURS.sgd,
        T.SGD,
        {
            "lr": (0.1, 0.3),
            "momentum": (0.0, 0.9, 0.5),
            "dampening": (0.0, 0.3),
            "weight_decay": DECAY,
            "nesterov": FLAG,
            "maximize": (False, False, True),
        },
        ("lr", "momentum", "dampening", "weight_decay"),
        allowed=_nesterov,
    ),
    "adam": Rule(
        OURS.adam,
        T.Adam,
        {
            "lr": (0.05, 0.1),
            "betas": BETAS,
            "eps": EPS,
            "weight_decay": DECAY,
            "amsgrad": FLAG,
            "maximize": (False, False, True),
            "decoupled_weight_decay": FLAG,
        },
        ("lr", "betas.0", "betas.1", "eps", "weight_decay"),
    ),
    "adamw": Rule(
        OURS.adamw,
        T.AdamW,
        {
            "lr": (0.05,),
            "betas": BETAS,
            "eps": EPS,
            "weight_decay": DECAY,
            "amsgrad": FLAG,
            "maximize": FLAG,
        },
        ("lr", "betas.0", "betas.1", "eps", "weight_decay"),
    ),
    "rmsprop": Rule(
        OURS.rmsprop,
        T.RMSprop,
        {
            "lr": (0.02, 0.05),
            "alpha": (0.9, 0.5),
            "eps": EPS,
            "momentum": (0.0, 0.9),
            "weight_decay": DECAY,
            "centered": FLAG,
            "maximize": FLAG,
        },
        ("lr", "alpha", "eps", "momentum", "weight_decay"),
    ),
    "adagrad": Rule(
        OURS.adagrad,
        T.Adagrad,
        {
            "lr": (0.1,),
            "lr_decay": (0.0, 0.1),
            "eps": EPS,
            "weight_decay": DECAY,
            "initial_accumulator_value": (0.0, 0.3),
            "maximize": FLAG,
        },
        ("lr", "lr_decay", "eps", "weight_decay"),
    ),
    "adadelta": Rule(
        OURS.adadelta,
        T.Adadelta,
        {
            "lr": (0.5, 1.0),
            "rho": (0.9, 0.5),
            "eps": (1e-2, 1e-3),
            "weight_decay": DECAY,
            "maximize": FLAG,
        },
        ("lr", "rho", "eps", "weight_decay"),
    ),
    "adamax": Rule(
        OURS.adamax,
        T.Adamax,
        {"lr": (0.05,), "betas": BETAS[:2], "eps": EPS, "weight_decay": DECAY, "maximize": FLAG},
        ("lr", "betas.0", "betas.1", "eps", "weight_decay"),
    ),
    "radam": Rule(
        OURS.radam,
        T.RAdam,
        {
            "lr": (0.05,),
            "betas": ((0.9, 0.95), (0.7, 0.9)),
            "eps": EPS,
            "weight_decay": DECAY,
            "decoupled_weight_decay": FLAG,
            "maximize": FLAG,
        },
        ("lr", "betas.0", "betas.1", "eps", "weight_decay"),
        steps=4,
    ),
    "nadam": Rule(
        OURS.nadam,
        T.NAdam,
        {
            "lr": (0.05,),
            "betas": BETAS[:2],
            "eps": EPS,
            "weight_decay": DECAY,
            "momentum_decay": (0.1, 4e-3),
            "decoupled_weight_decay": FLAG,
            "maximize": FLAG,
        },
        ("lr", "betas.0", "betas.1", "eps", "weight_decay", "momentum_decay"),
    ),
    "asgd": Rule(
        OURS.asgd,
        T.ASGD,
        {
            "lr": (0.1,),
            "lambd": (0.5, 0.1),
            "alpha": (0.75, 0.5),
            "t0": (2.0,),
            "weight_decay": DECAY,
            "maximize": FLAG,
        },
        ("lr", "lambd", "alpha", "weight_decay"),
    ),
    "rprop": Rule(
        OURS.rprop,
        T.Rprop,
        {
            "lr": (0.03,),
            "etas": ((0.5, 1.2), (0.7, 1.1)),
            "step_sizes": ((1e-6, 50.0), (0.0173, 0.038)),
            "maximize": FLAG,
        },
        ("lr", "etas.0", "etas.1"),
    ),
    "adafactor": Rule(
        OURS.adafactor,
        T.Adafactor,
        {
            "lr": (0.1, 0.05),
            "beta2_decay": (-0.8, -0.5),
            "d": (1.5, 2.0),
            "weight_decay": DECAY,
            "eps": ((1e-2, 1e-3), (1e-3, 1e-2)),
            "maximize": FLAG,
        },
        ("lr", "beta2_decay", "d", "weight_decay"),
    ),
    "lbfgs": Rule(
        OURS.lbfgs,
        T.LBFGS,
        {
            "lr": (0.1, 0.3),
            "max_iter": (1, 2),
            "history_size": (2, 5),
            "line_search_fn": (None, None, "strong_wolfe"),
            # Since torch 2.14.
            **({"maximize": (False, True)} if "maximize" in signature(T.LBFGS).parameters else {}),
        },
        ("lr",),
    ),
    "muon": Rule(
        muon,
        PlainMuon,
        {
            "lr": (0.05,),
            "weight_decay": DECAY,
            "momentum": (0.9, 0.5),
            "nesterov": FLAG,
            "adjust_lr_fn": (None, "match_rms_adamw"),
        },
        ("lr", "weight_decay", "momentum"),
        by_torch=False,
    ),
    "sparse adam": Rule(
        OURS.sparse_adam,
        T.SparseAdam,
        {"lr": (0.05,), "betas": BETAS[:2], "eps": EPS, "maximize": FLAG},
        ("lr", "betas.0", "betas.1", "eps"),
    ),
    "learned": Rule(
        learned, PlainLearned, {"lr": (0.1,), "gain": (1.0, 0.5)}, ("lr", "gain"), by_torch=False
    ),
    "adapted": Rule(
        foreign, Foreign, {"lr": (0.1, 0.2), "mu": (0.8, 0.5)}, ("lr", "mu"), by_torch=False
    ),
}
"""Rule -> how it is drawn. One more line enrols one more."""
TAKES_SPARSE = ("sparse adam", "sgd", "adagrad")


def draw(rng: random.Random, name: str) -> Settings:
    """Draw settings that torch accepts."""
    rule = RULES[name]
    while True:
        settings = {key: rng.choice(values) for key, values in rule.choices.items()}
        if rule.allowed(settings):
            return settings


def read(settings: Settings, name: str) -> float:
    """Read ``lr``, or ``betas.0``: the first entry of the pair ``betas``."""
    key, _, index = name.partition(".")
    return float(settings[key][int(index)] if index else settings[key])


def replaced(settings: Settings, values: dict[str, Any]) -> Settings:
    """Replace settings by values under their names; of a pair the other entry stays."""
    new = dict(settings)
    for name, value in values.items():
        key, _, index = name.partition(".")
        if index:
            pair = list(new[key])
            pair[int(index)] = value
            new[key] = tuple(pair)
        else:
            new[key] = value
    return new


def only(settings: Settings, names: Iterable[str]) -> Settings:
    """Keep the settings that these names belong to."""
    return {key: settings[key] for key in dict.fromkeys(n.partition(".")[0] for n in names)}
