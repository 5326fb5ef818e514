"""What one case is, and how it is drawn from a seed and a number."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import innerloop
from innerloop.strategy import Strategy
from tests.fuzz import extras, losses, models, rules

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
FINITE = innerloop.Checkpointed(slots=2, product="finite")
"""Drawn in place of some of the others, from a generator of its own: the cases that were drawn
before it was enrolled stay what they were."""
FORMS = ("list", "stacked", "function", "iterator")
OUTERS = ("output", "params", "middle", "losses")
TRANSFORMS = ("none",) * 4 + ("clip norm", "clip each", "clip value", "scale", "decay")


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
        grouped: the first half of the parameters has half the learning rate.
        options: what only some front ends have.
        extras: what `extras.draw` has put in.
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
    grouped: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)

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


def draw(seed: int, number: int, *, newest: bool = False) -> Case:
    """Draw one case; the same seed and number give the same one.

    Args:
        seed, number: of the case.
        newest: give extras to every case, not to some.
    """
    rng = random.Random(f"extras-{seed}-{number}")
    case = _drawn(seed, number)
    return extras.draw(rng, case) if newest or rng.random() < extras.SHARE else case


def _drawn(seed: int, number: int) -> Case:
    """Draw what there was from the beginning."""
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
    if losses.LOSSES[loss].continuous and family in models.OF_TOKENS:
        loss = "mse"
    strategy: Strategy = innerloop.StoreAll()
    if front in ("unroll", "metagradient"):
        strategy = rng.choice(STRATEGIES)
        if random.Random(f"finite-{seed}-{number}").random() < 0.06:
            strategy = FINITE
    settings = rules.draw(rng, rule)
    if rng.random() < 0.03 and "eps" in settings and not isinstance(settings["eps"], tuple):
        settings["eps"] = 1e-8
    options = _options(rng, front, rule, isinstance(strategy, innerloop.StoreAll))
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
    if family in models.SPARSE:
        settings |= {"weight_decay": 0.0} if "weight_decay" in settings else {}  # torch refuses it
    dense = rule == "sparse adam" and role in ("decay", "target")  # they would make it dense
    if dense or (role == "target" and not options.get("closure", True)):
        role = "scale"  # a target that a closure computes itself would need a detach
    if "hyper" in wrt and not varied and role == "none":
        role = "scale"
    steps = rng.randint(1, 4) + rng.randint(0, rules.RULES[rule].steps)
    outer = rng.choice(OUTERS)
    if losses.LOSSES[loss].hooks and outer == "output":
        outer = "params"
    if outer == "losses" and (front in ("track", "bridge") or first_order):
        outer = "params"
    if role == "target" and outer == "output" and family in models.OF_TOKENS:
        outer = "params"  # the padding row moves, and torch drops the outer gradient at it
    transform = rng.choice(TRANSFORMS) if rule not in ("lbfgs", "sparse adam") else "none"
    if family in models.SPARSE or (transform == "decay" and options.get("by_torch")):
        transform = "none"
    schedule = 0.8 if rule not in ("learned", "lbfgs", "rprop") and rng.random() < 0.2 else 1.0
    frozen = rng.randint(0, 9) if rng.random() < 0.15 else None
    grouped = rule not in ("lbfgs", "learned") and rng.random() < 0.15
    return Case(
        rng.randint(0, 2**31), family, loss, rule, settings, role, varied, steps, front, strategy,
        wrt, outer, transform, schedule, frozen, grouped, options,
    )  # fmt: skip


def _options(rng: random.Random, front: str, rule: str, stores: bool) -> dict[str, Any]:
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
        "captured": front == "unroll" and rng.random() < (0.2 if stores else 0.02),
    }
