"""The one list of strategies under test, and one training problem with plain PyTorch as its truth.

**To enrol a new strategy, add one line to ``STRATEGIES``.** It then stands under the contract of
``test_strategy_contract.py``: forward equal to ``torch.optim``; if it calls itself exact, gradients
of everything that a trajectory offers equal to finite differences, under ``torch.func`` too;
continuation, batches in every form, buffers and dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

import innerloop
from innerloop.strategy import Strategy
from tests.oracles import derivative, smooth_noise


@dataclass(frozen=True, eq=False)
class Enrolled:
    """One strategy under test.

    Attributes:
        strategy: the strategy.
        lacks: what the contract asks and this strategy promises not to do, by the name of the
            check: ``"jvp"``, ``"second order"``, ``"every time"`` (states at times that are not in
            ``save_at``), ``"compile"``, ``"params"`` (gradients with respect to the start).
    """

    strategy: Strategy
    lacks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class HandWritten(Strategy):
    """A strategy as a user would write it, of public names only: autograd keeps everything.

    **Cost**: that of `StoreAll`. **When**: in the tests, to show that the package needs no change
    for it. **Not** elsewhere.
    """

    exact = True
    differentiates: ClassVar = frozenset({"params", "hyper"})

    def run(self, loop: innerloop.strategy.Loop) -> innerloop.Trajectory:
        carry, states = loop.start, {0: loop.start}
        losses: list[Tensor] = []
        aux: list[Any] = []
        for t in loop.batches.times():
            carry, loss, more = loop.step(carry, loop.batch(carry, t), t)
            losses.append(loss)
            aux.append(more)
            if t + 1 in loop.save_at:
                states[t + 1] = carry
        states[len(losses)] = carry
        if not losses:
            return innerloop.Trajectory(states, torch.zeros(0), None, 0)
        stacked = torch.utils._pytree.tree_map(_stacked, *aux)
        return innerloop.Trajectory(states, torch.stack(losses), stacked, len(losses))


def _stacked(*values: Any) -> Tensor | None:
    return None if values[0] is None else torch.stack([torch.as_tensor(v) for v in values])


REPLAY = frozenset({"every time", "compile"})
STRATEGIES = (
    Enrolled(innerloop.StoreAll()),
    Enrolled(innerloop.Checkpointed(), REPLAY),
    Enrolled(innerloop.Checkpointed(slots="all", product="mixed"), REPLAY),
    Enrolled(innerloop.Checkpointed(slots=2, product="mixed", save="gradients"), REPLAY),
    Enrolled(innerloop.Checkpointed(memory="1GB"), REPLAY),
    Enrolled(innerloop.Auto(memory="1GB"), REPLAY),
    Enrolled(innerloop.ForwardMode(), REPLAY | {"params"}),
    Enrolled(innerloop.Truncated(2), REPLAY | {"params"}),
    Enrolled(innerloop.FirstOrder(), REPLAY),
    Enrolled(innerloop.Implicit(), REPLAY | {"params"}),
    Enrolled(innerloop.Evolution(), REPLAY | {"params"}),
    Enrolled(innerloop.strategy.DARTS(), REPLAY | {"params"}),
    Enrolled(innerloop.strategy.SAMA(), REPLAY | {"params"}),
    Enrolled(innerloop.strategy.T1T2(), REPLAY | {"params"}),
    Enrolled(HandWritten(), REPLAY),
)


def each_strategy(needs: str = "") -> pytest.MarkDecorator:
    """Parametrize a test by ``strategy``, leaving out those that lack what it ``needs``."""
    chosen = [
        pytest.param(e.strategy, id=repr(e.strategy)) for e in STRATEGIES if needs not in e.lacks
    ]
    return pytest.mark.parametrize("strategy", chosen)


def each_exact_strategy(needs: str = "") -> pytest.MarkDecorator:
    chosen = [
        pytest.param(e.strategy, id=repr(e.strategy))
        for e in STRATEGIES
        if e.strategy.exact and needs not in e.lacks
    ]
    return pytest.mark.parametrize("strategy", chosen)


# -- the problem: a small regression with learned rates, decay, data and initial weights -----------

STEPS = 4
SAVED = 2
Named = Mapping[str, Tensor]


class Batch(NamedTuple):
    """What one step sees: which of the examples, and the noise on them."""

    rows: Tensor
    noise: Tensor


def start() -> dict[str, Tensor]:
    return {
        "weight": 0.6 * smooth_noise(3, 2),
        "bias": 0.3 * smooth_noise(2, phase=1.0),
        "scale": torch.tensor(0.8, dtype=torch.float64),
    }


def hyper() -> dict[str, Any]:
    """Rates per step, a decay inside the loss, and the training data themselves; besides, a
    constant that is no tensor."""
    return {
        "log_lr": torch.linspace(-2.5, -1.5, STEPS, dtype=torch.float64),
        "decay": torch.tensor(0.05, dtype=torch.float64),
        "data": [1.5 * smooth_noise(6, 3, phase=5.0), smooth_noise(6, 2, phase=6.0)],
        "power": 2,
    }


def batches() -> list[Batch]:
    return [
        Batch(torch.arange(4) + t % 3, 0.1 * smooth_noise(4, 2, phase=20.0 + t))
        for t in range(STEPS)
    ]


def loss(params: Named, hyper: Any, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    x, y = (column[batch.rows] for column in hyper["data"])
    prediction = params["scale"] * (x @ params["weight"] + params["bias"]).tanh() + batch.noise
    decay = sum((p**2).sum() for p in params.values())
    value = ((prediction - y).abs() ** hyper["power"]).mean() + hyper["decay"] * decay
    return value, {"prediction": prediction.sum(), "nothing": None, "examples": len(batch.rows)}


class Rule(NamedTuple):
    """The same rule twice."""

    ours: innerloop.optim.Optimizer
    torch: Callable[[list[Tensor], float], torch.optim.Optimizer]


RULES = {
    "momentum": Rule(
        innerloop.optim.sgd(momentum=0.9), lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9)
    ),
    "adam": Rule(
        innerloop.optim.adam(eps=0.1), lambda ps, lr: torch.optim.Adam(ps, lr=lr, eps=0.1)
    ),
}
each_rule = pytest.mark.parametrize("rule", list(RULES))


def problem(rule: str) -> innerloop.Problem:
    return innerloop.Problem(
        loss, RULES[rule].ours, optimizer_hyper=lambda hyper, t: {"lr": hyper["log_lr"][t].exp()}
    )


# -- truth: the same training by torch.optim -------------------------------------------------------


class PlainRun(NamedTuple):
    params: list[dict[str, Tensor]]
    moments: list[dict[str, Tensor]]
    losses: list[Tensor]
    aux: list[Tensor]


def plain_run(rule: str, params: Named, hyper: Any, data: list[Batch]) -> PlainRun:
    """Parameters and first moments at times 0 to T, losses and aux at steps 0 to T - 1."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    optimizer = RULES[rule].torch(list(leaves.values()), 0.1)
    run = PlainRun(
        [copied(leaves)],
        [{name: torch.zeros_like(p) for name, p in copied(leaves).items()}],
        [],
        [],
    )
    for t, batch in enumerate(data):
        optimizer.param_groups[0]["lr"] = hyper["log_lr"][t].exp().item()
        optimizer.zero_grad()
        value, aux = loss(leaves, hyper, batch)
        value.backward()
        optimizer.step()
        key = "momentum_buffer" if rule == "momentum" else "exp_avg"
        run.params.append(copied(leaves))
        run.moments.append({name: optimizer.state[p][key].clone() for name, p in leaves.items()})
        run.losses.append(value.detach())
        run.aux.append(aux["prediction"].detach())
    return run


def copied(named: Named) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in named.items()}


# -- outer losses: one for each thing that a trajectory offers -------------------------------------


class Seen(NamedTuple):
    """What an outer loss may look at, from a trajectory or from a plain run."""

    params: Named
    saved: Named
    moments: Named
    losses: Tensor
    aux: Tensor


def seen(traj: innerloop.Trajectory) -> Seen:
    state = traj.at(SAVED).optimizer_state
    moments = state[1]  # the first field after the count, for both rules
    return Seen(traj.params, traj.at(SAVED).params, moments, traj.losses, traj.aux["prediction"])


def seen_plainly(run: PlainRun) -> Seen:
    return Seen(
        run.params[-1],
        run.params[SAVED],
        run.moments[SAVED],
        torch.stack(run.losses),
        torch.stack(run.aux),
    )


def of_params(named: Named) -> Tensor:
    """A smooth scalar in which every entry has another weight."""
    terms = [
        ((1 + smooth_noise(*p.shape, phase=40.0 + i) / 2) * (p + 0.5).sin()).sum()
        for i, p in enumerate(named.values())
    ]
    return torch.stack(terms).sum()


def of_steps(values: Tensor) -> Tensor:
    return (smooth_noise(STEPS, phase=50.0) * values**2).sum()


OUTER: dict[str, Callable[[Seen], Tensor]] = {
    "params": lambda s: of_params(s.params),
    "losses": lambda s: of_steps(s.losses),
    "aux": lambda s: of_steps(s.aux),
    "saved": lambda s: of_params(s.saved),
    "moments": lambda s: of_params({name: s.moments[name] for name in start()}),
    "all": lambda s: (
        of_params(s.params)
        + of_steps(s.losses)
        + of_steps(s.aux)
        + of_params(s.saved) * of_params(s.params)
    ),
}
each_outer = pytest.mark.parametrize("outer", list(OUTER))


def direction() -> dict[str, Any]:
    """A fixed direction over everything that is differentiated."""
    return {
        "params": {
            name: smooth_noise(*p.shape, phase=60.0 + i)
            for i, (name, p) in enumerate(start().items())
        },
        "hyper": {
            "log_lr": smooth_noise(STEPS, phase=70.0),
            "decay": torch.tensor(0.7, dtype=torch.float64),
            "data": [smooth_noise(6, 3, phase=71.0), smooth_noise(6, 2, phase=72.0)],
        },
    }


def moved(h: float, what: str) -> dict[str, Any]:
    """The inputs, of which ``what`` (``"params"`` or a name in ``hyper``) is moved by h."""
    params, values, along = start(), hyper(), direction()
    if what == "params":
        params = {name: p + h * along["params"][name] for name, p in params.items()}
    elif what == "data":
        values["data"] = [
            x + h * v for x, v in zip(values["data"], along["hyper"]["data"], strict=True)
        ]
    else:
        values[what] = values[what] + h * along["hyper"][what]
    return {"params": params, "hyper": values}


WHAT = ("params", "log_lr", "decay", "data")


def differentiated(strategy: Strategy) -> tuple[str, ...]:
    """Which of `WHAT` a strategy gives gradients for."""
    return tuple(what for what in WHAT if what != "params" or "params" in strategy.differentiates)


@functools.cache
def truth(rule: str, outer: str, what: str) -> float:
    """The derivative of an outer loss along `direction`, by finite differences of `plain_run`."""

    def value(h: float) -> float:
        inputs = moved(h, what)
        return OUTER[outer](
            seen_plainly(plain_run(rule, inputs["params"], inputs["hyper"], batches()))
        ).item()

    return derivative(value)


def along_direction(gradients: Mapping[str, Any], what: str) -> float:
    """The scalar product of ``{"params": ..., "hyper": ...}`` with `direction`, the part of
    ``what``."""
    along = direction()
    pairs: list[tuple[Any, Tensor]]
    if what == "params":
        pairs = [(gradients["params"][name], v) for name, v in along["params"].items()]
    elif what == "data":
        pairs = list(zip(gradients["hyper"]["data"], along["hyper"]["data"], strict=True))
    else:
        pairs = [(gradients["hyper"][what], along["hyper"][what])]
    return sum((g * v).sum().item() for g, v in pairs if g is not None)
