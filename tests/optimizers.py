"""The one list of optimizers under test.

**To enrol a new optimizer, add one entry to ``RULES``**: the rule, the ``torch.optim`` class that
is its truth, every setting to try, the names of its hyper-parameters, and where it has kinks. It
then stands under the whole contract: forward equal to torch, gradients equal to finite differences
of torch, finite at a zero gradient, ``vmap``, ``jvp``, compile, dtypes, bad input.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop
from tests.oracles import Bowl, Gradient, Params, Settings, Task, accepts, grid, torch_run

FLAG = (False, True)
IMPLEMENTATION = [
    {name: value for name, value in flags.items() if value is not None}
    for flags in grid(
        foreach=(None, *FLAG),
        fused=(None, *FLAG),
        differentiable=(None, True),
        capturable=(None, True),
    )
]
"""Arguments of ``torch.optim`` that choose a kernel and not a result; each class takes some,
``accepts`` finds out which."""


@dataclass(frozen=True, eq=False)  # equal if the same, so that it can be a key
class Rule:
    """One enrolled optimizer.

    Attributes:
        make: the rule of innerloop.
        torch: the class that it must agree with.
        settings: every combination to try; those that torch refuses are dropped (and must be
            refused by the rule too).
        hyper: its real-valued hyper-parameters; ``betas.0`` is the first entry of the pair
            ``betas``.
        typical: settings in which every hyper-parameter matters.
        kinks: hyper-parameter -> whether, at these settings, the rule has no derivative with
            respect to it, or one that is 0, or torch refuses every value beside this one.
        ranges: hyper-parameter -> between which values to try it, where `RANGES` does not fit.
        steps: after how many steps every hyper-parameter has made itself felt.
    """

    make: Callable[..., innerloop.optim.Optimizer]
    torch: type[torch.optim.Optimizer]
    settings: list[dict[str, Any]]
    hyper: tuple[str, ...]
    typical: dict[str, Any]
    kinks: Mapping[str, Callable[[Settings], bool]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    steps: int = 4

    @property
    def name(self) -> str:
        return self.torch.__name__.lower()

    def smooth(self, settings: Settings) -> tuple[str, ...]:
        """The hyper-parameters in which the rule is differentiable at these settings."""
        return tuple(
            name for name in self.hyper if name not in self.kinks or not self.kinks[name](settings)
        )

    def range(self, name: str) -> tuple[float, float]:
        """Between which values a hyper-parameter is tried."""
        return self.ranges.get(name) or RANGES[name]

    @property
    def undecayed(self) -> dict[str, Any]:
        """The typical settings without weight decay: entries whose gradient is zero keep it so."""
        return {key: 0.0 if key == "weight_decay" else value for key, value in self.typical.items()}


def buffer_appears(settings: Settings) -> bool:
    """SGD at momentum 0 has no buffer, and dampening does nothing; just beside it, dampening scales
    the step: a jump."""
    return settings["momentum"] == 0 and settings["dampening"] != 0


def is_zero(name: str) -> Callable[[Settings], bool]:
    """For ``kinks``: at the value 0, and there only."""
    return lambda settings: bool(read(settings, name) == 0)


RANGES = {
    "lr": (1e-4, 0.5),
    "momentum": (0.05, 0.95),
    "dampening": (0.0, 0.9),
    "weight_decay": (0.0, 0.5),
    "eps": (1e-3, 0.5),
    "betas.0": (0.0, 0.95),
    "betas.1": (0.3, 0.999),
    "alpha": (0.3, 0.99),
    "rho": (0.3, 0.99),
    "lr_decay": (0.0, 0.5),
    "initial_accumulator_value": (0.05, 1.0),
    "etas.0": (0.3, 0.9),
    "etas.1": (1.05, 1.5),
    "momentum_decay": (0.0, 1.0),
    "lambd": (0.0, 1.0),
    "step_sizes.0": (1e-3, 0.0177),
    "step_sizes.1": (0.03, 1.0),
}
"""Between which values random tests draw a hyper-parameter; also what a value that is moved per
parameter keeps within."""
BETAS = ((0.9, 0.99), (0.0, 0.9))
RULES = (
    Rule(
        innerloop.optim.sgd,
        torch.optim.SGD,
        grid(
            lr=[0.1],
            momentum=[0.0, 0.9],
            dampening=[0.0, 0.3],
            weight_decay=[0.0, 0.1],
            nesterov=FLAG,
            maximize=FLAG,
        ),
        hyper=("lr", "momentum", "dampening", "weight_decay"),
        typical={"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        kinks={
            "momentum": buffer_appears,
            "dampening": lambda settings: settings.get("nesterov", False),
        },
    ),
    Rule(
        innerloop.optim.adam,
        torch.optim.Adam,
        grid(
            lr=[0.05],
            betas=BETAS,
            weight_decay=[0.0, 0.1],
            amsgrad=FLAG,
            maximize=FLAG,
            decoupled_weight_decay=FLAG,
        )
        + grid(lr=[0.05], eps=[0.0, 0.1], amsgrad=FLAG),
        hyper=("lr", "betas.0", "betas.1", "eps", "weight_decay"),
        typical={"lr": 0.05, "betas": (0.9, 0.99), "eps": 0.1, "weight_decay": 0.1},
    ),
    Rule(
        innerloop.optim.adamw,
        torch.optim.AdamW,
        grid(lr=[0.05], betas=BETAS[:1], weight_decay=[0.0, 0.1], amsgrad=FLAG, maximize=FLAG)
        + [{"lr": 0.05}],
        hyper=("lr", "betas.0", "betas.1", "eps", "weight_decay"),
        typical={"lr": 0.05, "betas": (0.9, 0.99), "eps": 0.1, "weight_decay": 0.1},
    ),
    Rule(
        innerloop.optim.rmsprop,
        torch.optim.RMSprop,
        grid(
            lr=[0.02],
            alpha=[0.9],
            momentum=[0.0, 0.9],
            weight_decay=[0.0, 0.1],
            centered=FLAG,
            maximize=FLAG,
        )
        + grid(lr=[0.02], eps=[0.1], centered=FLAG),
        hyper=("lr", "alpha", "eps", "weight_decay", "momentum"),
        typical={"lr": 0.02, "alpha": 0.9, "eps": 0.1, "weight_decay": 0.1, "momentum": 0.9},
        kinks={
            "momentum": is_zero("momentum")
        },  # torch keeps no buffer for a negative momentum: a one-sided slope
    ),
    Rule(
        innerloop.optim.adagrad,
        torch.optim.Adagrad,
        grid(
            lr=[0.1],
            lr_decay=[0.0, 0.1],
            weight_decay=[0.0, 0.1],
            initial_accumulator_value=[0.0, 0.3],
            maximize=FLAG,
        )
        + grid(lr=[0.1], eps=[0.1], initial_accumulator_value=[0.1]),
        hyper=("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
        typical={
            "lr": 0.1,
            "lr_decay": 0.1,
            "weight_decay": 0.1,
            "initial_accumulator_value": 0.3,
            "eps": 0.1,
        },
        kinks={
            "initial_accumulator_value": is_zero("initial_accumulator_value")
        },  # as steep as the first gradient is small
    ),
    Rule(
        innerloop.optim.adadelta,
        torch.optim.Adadelta,
        grid(lr=[0.5], rho=[0.9, 0.5], eps=[1e-2], weight_decay=[0.0, 0.1], maximize=FLAG)
        + [{"lr": 1.0, "eps": 1e-3}],
        hyper=("lr", "rho", "eps", "weight_decay"),
        typical={"lr": 0.5, "rho": 0.7, "eps": 1e-2, "weight_decay": 0.1},
        kinks={
            "eps": lambda settings: settings["eps"] < 1e-6
        },  # the first step is proportional to its root
    ),
    Rule(
        innerloop.optim.adamax,
        torch.optim.Adamax,
        grid(lr=[0.05], betas=BETAS, weight_decay=[0.0, 0.1], maximize=FLAG)
        + grid(lr=[0.05], eps=[0.1]),
        hyper=("lr", "betas.0", "betas.1", "eps", "weight_decay"),
        typical={"lr": 0.05, "betas": (0.9, 0.9), "eps": 0.1, "weight_decay": 0.1},
        kinks={"betas.1": is_zero("betas.1")},  # no maximum of the past reaches the present
    ),
    Rule(
        innerloop.optim.radam,
        torch.optim.RAdam,
        grid(
            lr=[0.05],
            betas=BETAS,
            weight_decay=[0.0, 0.1],
            decoupled_weight_decay=FLAG,
            maximize=FLAG,
        )
        + grid(lr=[0.05], eps=[0.1], betas=[(0.9, 0.95)]),
        hyper=("lr", "betas.0", "betas.1", "eps", "weight_decay"),
        typical={"lr": 0.1, "betas": (0.9, 0.95), "eps": 0.1, "weight_decay": 0.1},
        kinks={
            "betas.1": is_zero("betas.1")
        },  # then the second moment is never certain enough to be used
        steps=10,  # the second moment is used from the sixth on
    ),
    Rule(
        innerloop.optim.nadam,
        torch.optim.NAdam,
        grid(
            lr=[0.05],
            betas=BETAS,
            weight_decay=[0.0, 0.1],
            momentum_decay=[0.1],
            decoupled_weight_decay=FLAG,
            maximize=FLAG,
        )
        + grid(lr=[0.05], eps=[0.1], momentum_decay=[0.0, 4e-3]),
        hyper=("lr", "betas.0", "betas.1", "eps", "weight_decay", "momentum_decay"),
        typical={
            "lr": 0.05,
            "betas": (0.9, 0.99),
            "eps": 0.1,
            "weight_decay": 0.1,
            "momentum_decay": 0.5,
        },
    ),
    Rule(
        innerloop.optim.asgd,
        torch.optim.ASGD,
        grid(
            lr=[0.1],
            lambd=[0.5],
            alpha=[0.75, 0.5],
            t0=[2.0],
            weight_decay=[0.0, 0.1],
            maximize=FLAG,
        )
        + [{"lr": 0.1}],
        hyper=(
            "lr",
            "lambd",
            "alpha",
            "weight_decay",
        ),  # t0 does not reach the parameters: see test_numerics
        typical={"lr": 0.2, "lambd": 1.0, "alpha": 0.75, "t0": 2.0, "weight_decay": 0.1},
    ),
    Rule(
        innerloop.optim.rprop,
        torch.optim.Rprop,
        grid(
            lr=[0.03],
            etas=[(0.5, 1.2), (0.7, 1.1)],
            step_sizes=[(1e-6, 50.0), (0.0173, 0.038)],
            maximize=FLAG,
        ),
        hyper=("lr", "etas.0", "etas.1", "step_sizes.0", "step_sizes.1"),
        typical={"lr": 0.03, "etas": (0.5, 1.2), "step_sizes": (0.0173, 0.039)},
        # A step size of zero grows from the smallest one; torch refuses factors on the wrong side
        # of 1.
        kinks={
            "lr": is_zero("lr"),
            "etas.0": is_zero("etas.0"),
            "etas.1": is_zero("etas.1"),
            "step_sizes.0": is_zero("step_sizes.0"),
        },
    ),
)


# -- the list as pytest parameters -----------------------------------------------------------------


def label(settings: Settings) -> str:
    """``momentum=0.9,nesterov``: what differs from the defaults that switch a term off."""
    shown = [
        k if v is True else f"{k}={v}".replace(" ", "")
        for k, v in settings.items()
        if v is not False and k != "lr"
    ]
    return ",".join(shown) or "default"


def cases(
    choose: Callable[[Rule], list[dict[str, Any]]],
    always: int | Callable[[Rule], list[dict[str, Any]]] | None = None,
) -> pytest.MarkDecorator:
    """Parametrize a test by ``rule`` and ``settings``; what comes after the first ``always``
    settings of a rule, or is not among those that it chooses, is slow."""
    chosen = [
        pytest.param(
            rule,
            settings,
            id=f"{rule.name}-{label(settings)}",
            marks=_slow_unless(settings in always(rule))
            if callable(always)
            else _slow_from(always, i),
        )
        for rule in RULES
        for i, settings in enumerate(choose(rule))
    ]
    return pytest.mark.parametrize(("rule", "settings"), chosen)


def _slow_from(always: int | None, i: int) -> Any:
    return _slow_unless(always is None or i < always)


def _slow_unless(run: bool) -> Any:
    return () if run else pytest.mark.slow


@functools.cache
def accepted(rule: Rule) -> list[dict[str, Any]]:
    """Every combination that torch takes."""
    return [settings for settings in rule.settings if accepts(rule.torch, settings)]


def refused(rule: Rule) -> list[dict[str, Any]]:
    """Every combination that torch refuses."""
    return [settings for settings in rule.settings if not accepts(rule.torch, settings)]


@functools.cache
def covering(rule: Rule) -> list[dict[str, Any]]:
    """A few settings in which every *pair* of values that torch takes occurs: for the checks that
    cost seconds each."""
    left = {pair for settings in accepted(rule) for pair in _pairs(settings)}
    few = []
    while left:
        best = max(accepted(rule), key=lambda settings: len(left & _pairs(settings)))
        few.append(best)
        left -= _pairs(best)
    return few


def typical(rule: Rule) -> list[dict[str, Any]]:
    return [rule.typical]


def each_rule() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def each_hyper(always: int | None = None) -> pytest.MarkDecorator:
    """Parametrize a test by ``rule`` and the ``name`` of each of its hyper-parameters; those after
    the first ``always`` are slow."""
    chosen = [
        pytest.param(
            rule,
            name,
            id=f"{rule.name}-{name}",
            marks=_slow_from(always, i),
        )
        for rule in RULES
        for i, name in enumerate(rule.hyper)
    ]
    return pytest.mark.parametrize(("rule", "name"), chosen)


def _pairs(settings: Settings) -> set[frozenset[tuple[str, Any]]]:
    items = list(settings.items())
    return {frozenset((a, b)) for i, a in enumerate(items) for b in items[i:]}


# -- hyper-parameters by name ----------------------------------------------------------------------


def defaults(rule: Rule, settings: Settings) -> dict[str, Any]:
    """The settings, completed by torch's own defaults.

    A class outside of ``torch.optim`` may have arguments that concern its own code only.
    """
    arguments = inspect.signature(rule.torch).parameters
    names = set(arguments)
    if not rule.torch.__module__.startswith("torch.optim"):
        names &= set(inspect.signature(rule.make).parameters)
    known = {name: arguments[name].default for name in arguments if name in names}
    return {**{k: v for k, v in known.items() if v is not inspect.Parameter.empty}, **settings}


def read(settings: Settings, name: str) -> Any:
    """``settings["betas"][0]`` for ``betas.0``."""
    key, _, index = name.partition(".")
    return settings[key][int(index)] if index else settings[key]


def replace(settings: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the named hyper-parameters replaced."""
    new = dict(settings)
    for name, value in values.items():
        key, _, index = name.partition(".")
        pair = new[key]
        new[key] = (value, pair[1]) if index == "0" else (pair[0], value) if index == "1" else value
    return new


def override(rule: Rule, settings: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    """The named values as the ``hyper`` argument of ``update``."""
    full = replace(defaults(rule, settings), values)
    return {key: full[key] for key in {name.partition(".")[0] for name in values}}


# -- training with the rule under test -------------------------------------------------------------


def train(
    optimizer: innerloop.optim.Optimizer,
    task: Task | Bowl,
    params: Params,
    hyper: Mapping[str, Any] | None = None,
    *,
    steps: int,
    start: int = 0,
    state: Any = None,
    gradient: Gradient | None = None,
) -> Params:
    """The parameters after ``steps`` pure updates; differentiable, by ``torch.func.grad``, unless
    another gradient is given."""
    gradient = gradient or torch.func.grad(task.loss)
    state = optimizer.init(params) if state is None else state
    for t in range(start, start + steps):
        params, state = optimizer.update(gradient(params, t), state, params, hyper)
    return params


def leaves(params: Params) -> Params:
    return {name: value.detach().clone().requires_grad_() for name, value in params.items()}


def leaf(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(float(value), dtype=dtype, requires_grad=True)


# -- the outer loss as a function of initial parameters and hyper-parameters -----------------------


def outer_of_rule(
    rule: Rule, settings: Settings, task: Task | Bowl, steps: int
) -> Callable[[Params, Params], Tensor]:
    """By the rule under test; hyper-parameters by name, as tensors; differentiable in both
    arguments."""
    optimizer = rule.make(**settings)

    def outer(params: Params, values: Params) -> Tensor:
        hyper = override(rule, settings, values) if values else None
        return task.outer(train(optimizer, task, params, hyper, steps=steps))

    return outer


def outer_of_torch(
    rule: Rule, settings: Settings, task: Task | Bowl, steps: int
) -> Callable[[Params, dict[str, Any]], float]:
    """By a plain ``torch.optim`` run; hyper-parameters as numbers (or by parameter name)."""
    full = defaults(rule, settings)

    def outer(params: Params, values: dict[str, Any]) -> float:
        return float(
            task.outer(torch_run(rule.torch, replace(full, values), params, task.gradient, steps))
        )

    return outer


def meta_gradient(
    rule: Rule, settings: Settings, task: Task | Bowl, values: Mapping[str, float], steps: int
) -> tuple[Params, Params]:
    """The rule's gradient of the outer loss in the initial parameters and in the named
    hyper-parameters."""
    params, tensors = leaves(task.params()), {name: leaf(value) for name, value in values.items()}
    outer = outer_of_rule(rule, settings, task, steps)(params, tensors)
    # A number 0 switches its term off: the dampening of a momentum of 0 is not used, and its
    # gradient is zero.
    wanted = [*params.values(), *tensors.values()]
    found = torch.autograd.grad(outer, wanted, allow_unused=True, materialize_grads=True)
    return dict(zip(params, found, strict=False)), dict(
        zip(tensors, found[len(params) :], strict=True)
    )


BENDING = ("eps", "initial_accumulator_value")
"""What bends the update once it nears the second moment or its root."""


def largest_step(name: str) -> float:
    """Where the ladder of finite differences starts."""
    return 1e-6 if name in BENDING else 2e-4


def gentle(
    names: Iterable[str], sizes: Iterable[float] = itertools.cycle((0.3, -0.2, 0.25, 0.4))
) -> dict[str, float]:
    """A direction that moves hyper-parameters by ``sizes``, those that bend the update only a
    little."""
    return {
        name: size * (1e-3 if name in BENDING else 1)
        for name, size in zip(names, sizes, strict=False)
    }


def a_class(step: Callable[[Any, Any], Any], prepare: Callable[[Any], Any] | None = None) -> Any:
    """A new optimizer class whose step is a function of itself and of its parameters."""

    class Written(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: Any = 0.1, **settings: Any) -> None:
            super().__init__(params, {"lr": lr})
            self.settings = settings
            if prepare is not None:
                prepare(self)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            step(self, self.param_groups[0]["params"])

    return Written


def descend(self: Any, params: Any) -> None:
    for p in params:
        p.sub_(self.param_groups[0]["lr"] * p.grad)


def _leaf() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(2))


MADE: dict[str, Callable[[], Any]] = {
    "sgd": lambda: innerloop.optim.sgd(momentum=0.9),
    "muon": lambda: innerloop.optim.muon(),
    "groups": lambda: innerloop.optim.groups({"*": innerloop.optim.sgd(momentum=0.9)}),
    "from_torch": lambda: innerloop.optim.from_torch(
        torch.optim.SGD([_leaf()], lr=0.1, momentum=0.9)
    ),
    "chain": lambda: innerloop.optim.chain(innerloop.optim.accumulate(2), innerloop.optim.sgd()),
    "in_float32": lambda: innerloop.optim.in_float32(innerloop.optim.sgd(momentum=0.9)),
    "learned": lambda: innerloop.optim.learned(
        lambda grad, param, state, weights: (-grad, state), {}
    ),
    "adapt": lambda: innerloop.optim.adapt(a_class(descend)),
}
