"""The one list of optimizers under test.

**To enrol a new optimizer, add one entry to ``RULES``**: the rule, the ``torch.optim`` class that is its truth, every setting to
try, the names of its hyper-parameters, and where it has kinks. It then stands under the whole contract: forward equal to torch,
gradients equal to finite differences of torch, finite at a zero gradient, ``vmap``, ``jvp``, compile, dtypes, bad input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
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
    for flags in grid(foreach=(None, *FLAG), fused=(None, *FLAG), differentiable=(None, True), capturable=(None, True))
]
"""Arguments of ``torch.optim`` that choose a kernel and not a result; each class takes some, ``accepts`` finds out which."""


@dataclass(frozen=True)
class Rule:
    """One enrolled optimizer.

    Attributes:
        make: the rule of innerloop.
        torch: the class that it must agree with.
        settings: every combination to try; those that torch refuses are dropped (and must be refused by the rule too).
        hyper: its real-valued hyper-parameters; ``betas.0`` is the first entry of the pair ``betas``.
        kinks: hyper-parameter -> whether, at these settings, the rule has no derivative with respect to it (or torch refuses
            every value beside this one).
        typical: settings in which every hyper-parameter matters.
    """

    make: Callable[..., innerloop.optim.Optimizer]
    torch: type[torch.optim.Optimizer]
    settings: list[dict[str, Any]]
    hyper: tuple[str, ...]
    typical: dict[str, Any]
    kinks: Mapping[str, Callable[[Settings], bool]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.torch.__name__.lower()

    def smooth(self, settings: Settings) -> tuple[str, ...]:
        """The hyper-parameters in which the rule is differentiable at these settings."""
        return tuple(name for name in self.hyper if name not in self.kinks or not self.kinks[name](settings))


def buffer_appears(settings: Settings) -> bool:
    """SGD at momentum 0 has no buffer, and dampening does nothing; just beside it, dampening scales the step: a jump."""
    return settings["momentum"] == 0 and settings["dampening"] != 0


BETAS = ((0.9, 0.99), (0.0, 0.9))
RULES = (
    Rule(
        innerloop.optim.sgd,
        torch.optim.SGD,
        grid(
            lr=[0.1], momentum=[0.0, 0.9], dampening=[0.0, 0.3], weight_decay=[0.0, 0.1], nesterov=FLAG, maximize=FLAG
        ),
        hyper=("lr", "momentum", "dampening", "weight_decay"),
        typical={"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        kinks={"momentum": buffer_appears, "dampening": lambda settings: settings.get("nesterov", False)},
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
        grid(lr=[0.05], betas=BETAS[:1], weight_decay=[0.0, 0.1], amsgrad=FLAG, maximize=FLAG) + [{"lr": 0.05}],
        hyper=("lr", "betas.0", "betas.1", "eps", "weight_decay"),
        typical={"lr": 0.05, "betas": (0.9, 0.99), "eps": 0.1, "weight_decay": 0.1},
    ),
)


# -- the list as pytest parameters --------------------------------------------------------------------------------------


def label(settings: Settings) -> str:
    """``momentum=0.9,nesterov``: what differs from the defaults that switch a term off."""
    shown = [
        k if v is True else f"{k}={v}".replace(" ", "") for k, v in settings.items() if v is not False and k != "lr"
    ]
    return ",".join(shown) or "default"


def cases(choose: Callable[[Rule], list[dict[str, Any]]]) -> pytest.MarkDecorator:
    """Parametrize a test by ``rule`` and ``settings``."""
    chosen = [
        pytest.param(rule, settings, id=f"{rule.name}-{label(settings)}") for rule in RULES for settings in choose(rule)
    ]
    return pytest.mark.parametrize(("rule", "settings"), chosen)


def accepted(rule: Rule) -> list[dict[str, Any]]:
    """Every combination that torch takes."""
    return [settings for settings in rule.settings if accepts(rule.torch, settings)]


def refused(rule: Rule) -> list[dict[str, Any]]:
    """Every combination that torch refuses."""
    return [settings for settings in rule.settings if not accepts(rule.torch, settings)]


def covering(rule: Rule) -> list[dict[str, Any]]:
    """A few settings in which every *pair* of values that torch takes occurs: for the checks that cost seconds each."""
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


def each_hyper() -> pytest.MarkDecorator:
    """Parametrize a test by ``rule`` and the ``name`` of each of its hyper-parameters."""
    return pytest.mark.parametrize(
        ("rule", "name"), [pytest.param(rule, name, id=f"{rule.name}-{name}") for rule in RULES for name in rule.hyper]
    )


def _pairs(settings: Settings) -> set[frozenset[tuple[str, Any]]]:
    items = list(settings.items())
    return {frozenset((a, b)) for i, a in enumerate(items) for b in items[i:]}


# -- hyper-parameters by name -------------------------------------------------------------------------------------------


def defaults(rule: Rule, settings: Settings) -> dict[str, Any]:
    """The settings, completed by torch's own defaults."""
    arguments = inspect.signature(rule.torch).parameters.values()
    return {**{a.name: a.default for a in arguments if a.default is not a.empty}, **settings}


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


# -- training with the rule under test ----------------------------------------------------------------------------------


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
    """The parameters after ``steps`` pure updates; differentiable, by ``torch.func.grad``, unless another gradient is given."""
    gradient = gradient or torch.func.grad(task.loss)
    state = optimizer.init(params) if state is None else state
    for t in range(start, start + steps):
        params, state = optimizer.update(gradient(params, t), state, params, hyper)
    return params


def leaves(params: Params) -> Params:
    return {name: value.detach().clone().requires_grad_() for name, value in params.items()}


def leaf(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(float(value), dtype=dtype, requires_grad=True)


# -- the outer loss as a function of initial parameters and hyper-parameters ---------------------------------------------


def outer_of_rule(rule: Rule, settings: Settings, task: Task | Bowl, steps: int) -> Callable[[Params, Params], Tensor]:
    """By the rule under test; hyper-parameters by name, as tensors; differentiable in both arguments."""
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
        return float(task.outer(torch_run(rule.torch, replace(full, values), params, task.gradient, steps)))

    return outer


def meta_gradient(
    rule: Rule, settings: Settings, task: Task | Bowl, values: Mapping[str, float], steps: int
) -> tuple[Params, Params]:
    """The rule's gradient of the outer loss in the initial parameters and in the named hyper-parameters."""
    params, tensors = leaves(task.params()), {name: leaf(value) for name, value in values.items()}
    outer = outer_of_rule(rule, settings, task, steps)(params, tensors)
    # A number 0 switches its term off: the dampening of a momentum of 0 is not used, and its gradient is zero.
    wanted = [*params.values(), *tensors.values()]
    found = torch.autograd.grad(outer, wanted, allow_unused=True, materialize_grads=True)
    return dict(zip(params, found, strict=False)), dict(zip(tensors, found[len(params) :], strict=True))


def largest_step(name: str) -> float:
    """Where the ladder of finite differences starts; eps bends the update once it nears the root of the second moment."""
    return 1e-6 if name == "eps" else 2e-4
