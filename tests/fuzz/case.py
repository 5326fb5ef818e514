"""What one case is, and how it is drawn from a seed and a number."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import innerloop
from innerloop.strategy import Strategy
from tests.fuzz import losses, models, rules

FRONT_ENDS = ("track", "unroll", "metagradient", "bridge")
STRATEGIES: tuple[Strategy, ...] = (
    innerloop.StoreAll(),
    innerloop.Checkpointed(),
    innerloop.Checkpointed(slots=1, product="reverse"),
    innerloop.Checkpointed(slots="all", product="mixed"),
    innerloop.Checkpointed(slots=2, product="mixed", save="gradients"),
    innerloop.Checkpointed(slots=2, product="reverse", save="gradients"),
    innerloop.Checkpointed(memory="1GB", product="reverse"),
    innerloop.ForwardMode(),
    innerloop.Truncated(1),
    innerloop.Truncated(2),
    innerloop.Truncated(9),
    innerloop.FirstOrder(),
    innerloop.Auto(memory="1GB"),
)
FORMS = ("list", "stacked", "function", "iterator")
OUTERS = ("output", "params", "middle", "losses")
TRANSFORMS = ("none", "none", "none", "clip norm", "clip value", "scale")


@dataclass(frozen=True)
class Case:
    """One random training.

    Attributes:
        seed: of the parameters, the data and the direction.
        family, loss, rule, settings: what is trained.
        role: what the outer variable ``strength`` does in the loss.
        varied: the settings of the rule that are differentiated.
        steps: T.
        front: the front end.
        strategy: of ``unroll`` and ``metagradient``.
        wrt: ``"params"`` and ``"hyper"``: what is differentiated.
        outer: what the outer loss looks at: the output of the trained model, its parameters, those
            at half time, or the losses.
        transform: what is done to the gradients before the rule sees them.
        schedule: the learning rate is multiplied by this at every step.
        frozen: the position of a parameter that is not trained; None: all are.
        options: what only some front ends have.
    """

    seed: int
    family: str
    loss: str
    rule: str
    settings: dict[str, Any]
    role: str
    varied: tuple[str, ...]
    steps: int
    front: str
    strategy: Strategy
    wrt: tuple[str, ...]
    outer: str
    transform: str = "none"
    schedule: float = 1.0
    frozen: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def first_order(self) -> bool:
        """True if the inner gradients count as constants."""
        return bool(self.options.get("first_order")) or isinstance(
            self.strategy, innerloop.FirstOrder
        )

    @property
    def cut(self) -> int:
        """The step before which nothing is differentiated."""
        last = self.strategy.last if isinstance(self.strategy, innerloop.Truncated) else self.steps
        return max(self.steps - last, 0)


def draw(seed: int, number: int) -> Case:
    """Draw one case; the same seed and number give the same one."""
    rng = random.Random(f"{seed}-{number}")
    rule = rng.choice(list(rules.RULES))
    front = rng.choice(FRONT_ENDS)
    if rule == "sparse adam":
        family = "sparse embedding"
    else:
        family = rng.choice(list(models.FAMILIES))
        if family in models.SPARSE and rule not in rules.TAKES_SPARSE:
            family = "embedding"
    loss = rng.choice(list(losses.LOSSES))
    of_tokens = "embedding" in family or family in (
        "lstm",
        "gru",
        "multi-head attention",
        "transformer",
    )
    if losses.LOSSES[loss].continuous and of_tokens:
        loss = "mse"
    strategy: Strategy = innerloop.StoreAll()
    if front in ("unroll", "metagradient"):
        strategy = rng.choice(STRATEGIES)
    settings = rules.draw(rng, rule)
    if rng.random() < 0.03 and "eps" in settings and not isinstance(settings["eps"], tuple):
        settings["eps"] = 1e-8
    options = _options(rng, front, rule)
    role = rng.choice(losses.ROLES)
    wrt = rng.choice((("params", "hyper"), ("params", "hyper"), ("params",), ("hyper",)))
    if "params" not in strategy.differentiates or options.get("learn") == "outer":
        wrt = ("hyper",)
    first_order = isinstance(strategy, innerloop.FirstOrder) or options.get("first_order")
    if "hyper" not in wrt or (first_order and rng.random() < 0.95):
        role = "none"
    candidates = [
        name
        for name in rules.RULES[rule].varied
        if rules.read(settings, name) != 0 and (name != "eps" or settings["eps"] > 1e-4)
    ]
    varied: tuple[str, ...] = ()
    if "hyper" in wrt:
        varied = tuple(n for n in candidates if rng.random() < 0.5)
        if not varied and (role == "none" or rng.random() < 0.8):
            varied = ("lr",)
    if rule == "sparse adam" and role == "decay":
        role = "scale"  # a decay would make the gradient dense
    if "hyper" in wrt and not varied and role == "none":
        role = "scale"
    steps = rng.randint(1, 4) + rng.randint(0, rules.RULES[rule].steps)
    outer = rng.choice(OUTERS)
    if losses.LOSSES[loss].hooks and outer == "output":
        outer = "params"
    if outer == "losses" and (front in ("track", "bridge") or first_order):
        outer = "params"
    transform = rng.choice(TRANSFORMS) if rule not in ("lbfgs", "sparse adam") else "none"
    if family in models.SPARSE:
        transform = "none"
    schedule = 0.8 if rule not in ("learned", "lbfgs", "rprop") and rng.random() < 0.2 else 1.0
    frozen = rng.randint(0, 9) if rng.random() < 0.15 else None
    return Case(
        rng.randint(0, 2**31), family, loss, rule, settings, role, varied, steps, front, strategy,
        wrt, outer, transform, schedule, frozen, options,
    )  # fmt: skip


def _options(rng: random.Random, front: str, rule: str) -> dict[str, Any]:
    """Draw what only some front ends have."""
    if front == "track":
        return {
            "by_torch": rules.RULES[rule].by_torch and rng.random() < 0.6,
            "learn": "outer" if rng.random() < 0.15 else "init",
            "first_order": rng.random() < 0.15,
            "closure": rule == "lbfgs" or rng.random() < 0.2,
        }
    if front == "bridge":
        return {"by_torch": True, "closure": rule == "lbfgs"}
    return {
        "form": rng.choice(FORMS),
        "from_module": rng.random() < 0.6,
        "pieces": 2 if front == "unroll" and rng.random() < 0.15 else 1,
    }
