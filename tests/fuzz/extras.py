"""What was enrolled last, drawn from a generator of its own: the other cases stay what they were.

Hand-written loops with a strategy, activation checkpointing, parts of a batch, buffers with a
derivative, edits of weights, losses of earlier steps, and layers with fast weights.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import innerloop
from innerloop.strategy import Strategy
from tests.fuzz import losses, models, rules
from tests.fuzz.models import OUT, Batch

if TYPE_CHECKING:
    from tests.fuzz.case import Case

SHARE = 0.2
"""How many of the cases have extras, unless all are to have them."""
FRONT = "track, replayed"
"""How a hand-written loop with a strategy is called in the counts."""
STRATEGIES: tuple[Strategy, ...] = (
    innerloop.StoreAll(),
    innerloop.Checkpointed(),
    innerloop.Checkpointed(slots=1),
    innerloop.Checkpointed(slots=2),
    innerloop.Checkpointed(slots="all"),
    innerloop.Checkpointed(memory="20KB"),
    innerloop.Checkpointed(slots=2, offload="cpu"),
    innerloop.Truncated(1),
    innerloop.Truncated(2),
    innerloop.Truncated(9),
    innerloop.FirstOrder(),
)
"""Those of `innerloop.track`."""
CHECKPOINTS = ("reentrant", "non-reentrant", "block")
PLACES = ("call", "modules", "loss")
"""What is checkpointed: the call of the model, some of its modules, the whole loss."""
BUFFERS = ("learned", "assigned", "replaced", "written")
"""The model has a buffer that requires grad, that the loss computes from an outer variable, that
each call replaces by a function of its output, or that each call writes in place."""
STEPS = ("defaults", "late", "args")
"""How a closure gets its data: as defaults, from variables that change, or by ``args=``."""
FORMS = ("mean", "sum")
FLAGS: tuple[str, ...] = ("assign", "shift", "feedback", "callback", "computed")
"""Of hand-written loops: `loop.assign` once, of a function of two parameters; an edit in place
after each step; the loss of the step before in each loss; a callback that scales the gradients by
an outer variable; and that variable as the result of a computation before the loop."""
SHIFT = 0.03
"""What is added to a weight in place, under ``torch.no_grad``, after each step."""
FEEDBACK = 0.3
"""How much of the loss of the step before is in a loss."""


def draw(rng: random.Random, case: Case) -> Case:
    """Put extras into a case."""
    new = dataclasses.replace
    extras: dict[str, Any] = {}
    options = dict(case.options)
    if case.front == "bridge" and rng.random() < 0.7:
        options |= {"learn": "init", "first_order": False}
        options["by_torch"] = rules.RULES[case.rule].by_torch
        case = new(case, front="track", options=options)
    if rng.random() < 0.15 and case.rule != "sparse adam":
        case = new(case, family=rng.choice(list(models.NEWER)))
    if case.front == "track":
        case, options = _of_loop(rng, case, extras, options)
    if case.front in ("unroll", "metagradient") and rng.random() < 0.4:
        extras["micro"] = (rng.randint(1, 3), rng.choice(FORMS))
        if case.role == "target" and rng.random() < 0.9:  # refused by name
            case = new(case, role="scale")
    if rng.random() < 0.25:
        extras["buffer"] = rng.choice(BUFFERS)
        options["from_module"] = True
        if extras["buffer"] == "assigned":
            # The loss sets the buffer from `strength`, which has no other role then.
            case = new(case, role="gate" if "hyper" in case.wrt else "none")
            extras["buffer"] = "assigned" if case.role == "gate" else "learned"
    if not extras or rng.random() < 0.45:
        # On the bridge PyTorch's own runs, whose reentrant form gives no gradient where no input
        # requires one.
        kinds = CHECKPOINTS[1:] if case.front == "bridge" else CHECKPOINTS
        extras["checkpoint"] = (rng.choice(kinds), rng.choice(PLACES))
        extras["which"] = rng.randint(1, 2**20)
    return new(case, options=options, extras=extras)


def _of_loop(
    rng: random.Random, case: Case, extras: dict[str, Any], options: dict[str, Any]
) -> tuple[Case, dict[str, Any]]:
    """Draw what hand-written loops have."""
    new = dataclasses.replace
    if rng.random() < 0.8:
        strategy = rng.choice(STRATEGIES)
        extras["replayed"] = rng.choice(STEPS)
        options["closure"] = True
        if isinstance(strategy, innerloop.Truncated):
            options["learn"] = "outer"
        case = new(case, strategy=strategy)
        if rng.random() < 0.3:
            case = new(case, steps=case.steps + rng.randint(3, 12))
    if options["learn"] == "outer":
        role = case.role if case.varied or case.role != "none" else "scale"
        case = new(case, wrt=("hyper",), role=role)
    case = new(case, options=options)
    cut = isinstance(case.strategy, innerloop.Truncated)
    if case.first_order and case.role != "none":
        if rng.random() < 0.9:
            varied = case.varied or ("lr",)
            case = new(case, role="none", varied=varied if "hyper" in case.wrt else ())
        if case.outer == "losses":
            case = new(case, outer="params")
    tokens = case.family in models.OF_TOKENS and case.outer == "output"
    if rng.random() < 0.25 and not cut and not tokens and case.family not in models.SPARSE:
        extras["assign"] = rng.randint(0, case.steps - 1)
    if rng.random() < 0.15 and not tokens and case.family not in models.SPARSE:
        extras["shift"] = rng.randint(0, 9)
    if rng.random() < 0.25:
        extras["feedback"] = True
    if rng.random() < 0.25 and options["by_torch"] and case.rule != "lbfgs":
        extras["callback"] = True
    if rng.random() < 0.2 and not case.first_order:
        case = new(case, outer="losses")
    if rng.random() < 0.5:
        extras["computed"] = True
    return case, options


def enrolled() -> set[str]:
    """List what can be drawn here."""
    return {
        *models.NEWER,
        *(f"{FRONT} {strategy!r}" for strategy in STRATEGIES),
        *(f"checkpoint: {kind}, {place}" for kind in CHECKPOINTS for place in PLACES),
        *(f"buffer: {kind}" for kind in BUFFERS),
        *(f"micro-batches: {form}" for form in FORMS),
        *(f"steps: {form}" for form in STEPS),
        *FLAGS,
    }


def named(case: Case) -> list[str]:
    """List what a case has of it."""
    extras = case.extras
    found: list[str] = [key for key in FLAGS if key in extras]
    if "replayed" in extras:
        found += [f"{FRONT} {case.strategy!r}", f"steps: {extras['replayed']}"]
    if "checkpoint" in extras:
        found.append("checkpoint: {}, {}".format(*extras["checkpoint"]))
    if "buffer" in extras:
        found.append(f"buffer: {extras['buffer']}")
    if "micro" in extras:
        found.append(f"micro-batches: {extras['micro'][1]}")
    return found


# -- activation checkpointing ----------------------------------------------------------------------


def around(kind: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function, checkpointed."""
    if kind == "block":
        return innerloop.checkpoint_block(function, *args)
    return checkpoint(function, *args, use_reentrant=kind == "reentrant")


def checkpoint_modules(model: nn.Module, kind: str, which: int) -> None:
    """Checkpoint the forward passes of some modules, those whose bit is set in ``which``."""
    for i, module in enumerate(model.modules()):
        if which >> i & 1 and not parametrize.is_parametrized(module):
            module.__class__ = _checkpointed(type(module), kind)


def _checkpointed(cls: type[nn.Module], kind: str) -> type[nn.Module]:
    """Make a subclass whose forward pass is checkpointed."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(kind, lambda *given: cls.forward(self, *given, **kwargs), *args)

    return type(f"Checkpointed{cls.__name__}", (cls,), {"forward": forward})


# -- buffers with a derivative ---------------------------------------------------------------------

GATE = "gate"


def add_gate(model: nn.Module, kind: str) -> None:
    """Multiply the output of the model by a function of a buffer."""
    cls = type(model)

    def forward(self: Any, batch: Batch) -> Tensor:
        output: Tensor = cls.forward(self, batch) * (1 + self.gate.tanh())
        if kind == "replaced":
            self.gate = 0.5 * self.gate + 0.2 * output.mean(0)
        if kind == "written":
            self.gate.mul_(0.5).add_(output.mean(0), alpha=0.2)
        return output

    model.__class__ = type(f"Gated{cls.__name__}", (cls,), {"forward": forward})
    gate = torch.linspace(-0.3, 0.4, OUT, dtype=torch.float64)
    model.register_buffer(GATE, gate.requires_grad_(kind == "learned"))


def gate_of(strength: Tensor) -> Tensor:
    """Compute what the loss puts in the place of the buffer."""
    return (1 + strength).log() * losses.weights(OUT)


def detach_gate(model: Any) -> None:
    """Let a plain run forget the history of the buffer, as each inner gradient does."""
    if model.gate.grad_fn is not None:
        model.gate = model.gate.detach()


# -- parts of a batch ------------------------------------------------------------------------------


def weight_of(loss: str) -> Callable[[Batch], Tensor] | None:
    """Return what a loss that is no mean over rows is a mean over."""
    if loss == "masked rows":
        return lambda batch: batch["mask"].sum()
    if loss == "ignored labels":
        return lambda batch: (losses.CLASS_WEIGHTS[batch["labels"]] * (batch["mask"] != 0)).sum()
    return None


def parts(batch: Batch, micro: tuple[int, str], loss: str) -> list[tuple[float, Batch]]:
    """Cut a batch into parts by hand; return them with their factors."""
    size, form = micro
    rows = len(batch["x"])
    found = []
    for begin in range(0, rows, size):
        part = {k: x[begin : begin + size] if x.dim() else x for k, x in batch.items()}
        found.append(part)
    if form == "sum":
        return [(1.0, part) for part in found]
    weight = weight_of(loss)
    shares = [float(len(p["x"]) if weight is None else weight(p)) for p in found]
    return [(s / sum(shares), p) for s, p in zip(shares, found, strict=True) if s]
