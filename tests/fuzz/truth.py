"""The same training by plain torch, and its derivative by finite differences."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.fuzz import extras, losses, models, rules
from tests.fuzz.case import Case
from tests.fuzz.extras import FEEDBACK, SHIFT

STEPS = (4e-6, 1.5e-6)
"""The two difference steps."""
AGREE = 1e-6
ROUNDING = 1e-13
"""A gradient below this is a zero that was rounded: its sign, which Rprop follows, is chance."""
CLIP = {"clip norm": 0.5, "clip each": 0.2, "clip value": 0.1, "scale": 0.7, "decay": 0.2}


@dataclass
class World:
    """What a case is made of.

    Attributes:
        model: the untrained model; whoever trains copies it.
        batches: one for each step, and one for the outer loss.
        trained: the names of the parameters that the optimizer has.
        strength: the outer variable in the loss.
        values: the varied settings.
        along: the direction of the derivative, by the names of parameters and of outer variables.
    """

    case: Case
    model: nn.Module
    batches: list[models.Batch]
    trained: list[str]
    strength: float
    values: dict[str, float]
    along: dict[str, Tensor]

    @property
    def loss(self) -> losses.Loss:
        return losses.LOSSES[self.case.loss]

    def fresh(self, *, plain: bool = False) -> nn.Module:
        """Copy the model, with the hooks that belong to the loss; ``plain`` for the truth."""
        model = copy.deepcopy(self.model)
        if isinstance(model, models.Adapting):
            model.by_hand = plain
        if "buffer" in self.case.extras:
            extras.add_gate(model, self.case.extras["buffer"])
        kind, place = self.case.extras.get("checkpoint", ("", ""))
        if place == "modules" and not plain:
            extras.checkpoint_modules(model, kind, self.case.extras["which"])
        self.loss.prepare(model)
        return model

    def settings(self, values: dict[str, Any]) -> rules.Settings:
        return rules.replaced(self.case.settings, values)

    @property
    def shifted(self) -> str:
        """The name of the parameter that is edited in place after each step."""
        return self.trained[self.case.extras["shift"] % len(self.trained)]

    @property
    def groups(self) -> list[list[str]]:
        """The names of the parameters that the optimizer has, in its groups."""
        half = len(self.trained) // 2
        if not self.case.grouped or half == 0:
            return [self.trained]
        return [self.trained[:half], self.trained[half:]]

    def by_group(self, settings: rules.Settings) -> list[rules.Settings]:
        """Return the settings of each group."""
        if len(self.groups) == 1:
            return [settings]
        return [settings | {"lr": settings["lr"] / 2}, settings]


def world(case: Case) -> World:
    """Build what a case is made of."""
    model = models.make(case.family, case.seed % 10_007)
    names = [n for n, p in model.named_parameters()]
    trained = [n for n, p in model.named_parameters() if case.rule != "muon" or p.dim() == 2]
    if case.frozen is not None and len(trained) > 1:
        left_out = trained.pop(case.frozen % len(trained))
        dict(model.named_parameters())[left_out].requires_grad_(False)
    generator = torch.Generator().manual_seed(case.seed)
    along = {}
    params = dict(model.named_parameters())
    for name in names:
        v = torch.randn(params[name].shape, generator=generator, dtype=torch.float64)
        # Under `track` and the bridge these are the parameters of the user, whose hook acts on the
        # outer gradient too. The gradient of an output with respect to a padding row is zero by
        # definition, also in the outer loss; the inner steps are differentiated as they are.
        own = case.front in ("track", "bridge")
        hooked = case.loss == "parameter hook" and name == names[0] and own
        if name in models.with_padding(model) and case.outer == "output":
            v[models.PADDING] = 0
        if "params" in case.wrt and name in trained and not hooked:
            along[name] = v
    values = {name: rules.read(case.settings, name) for name in case.varied}
    for name, value in values.items():
        v = torch.randn((), generator=generator, dtype=torch.float64).sign()
        along[f"hyper.{name}"] = v * min(abs(value), 1.0)
    if case.role != "none":
        along["hyper.strength"] = torch.randn((), generator=generator, dtype=torch.float64).sign()
    # `metagradient` returns the derivatives in its inputs, to which a buffer does not belong.
    if case.extras.get("buffer") == "learned" and case.front != "metagradient":
        along["buffer.gate"] = torch.randn(models.OUT, generator=generator, dtype=torch.float64)
    return World(
        case, model, models.batches(case.seed, case.steps + 1), trained, 0.2, values, along
    )


def torch_optimizer(
    w: World, params: Mapping[str, nn.Parameter], settings: rules.Settings
) -> torch.optim.Optimizer:
    """Make the optimizer of torch."""
    make = rules.RULES[w.case.rule].torch
    if len(w.groups) == 1:
        return make([params[n] for n in w.trained], **settings)
    groups = [
        {"params": [params[n] for n in names], **own}
        for names, own in zip(w.groups, w.by_group(settings), strict=True)
    ]
    return make(groups, **settings)  # Adagrad reads its initial value from here, not from a group


class Run(NamedTuple):
    """The outer loss, the gradients of the steps, and whether their signs are mere rounding."""

    value: float
    grads: list[dict[str, Tensor | None]]
    by_chance: bool


def plain_run(w: World, h: float, grads: list[dict[str, Tensor | None]] | None = None) -> Run:
    """Train by torch at the inputs moved by ``h``, and return the outer loss.

    With ``grads``, the steps take these gradients instead of those of the loss: what first-order
    methods call the derivative.
    """
    case = w.case
    model: Any = w.fresh(plain=True)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in params.items():
            if name in w.along:
                p.add_(h * w.along[name])
        if "buffer.gate" in w.along:
            model.gate.add_(h * w.along["buffer.gate"])
    more = case.extras
    gated = "buffer" in more

    def moved(t: int) -> float:
        return h if t >= case.cut else 0.0

    def settings(t: int) -> rules.Settings:
        step = moved(t)
        new = w.settings(
            {n: v + step * float(w.along.get(f"hyper.{n}", 0.0)) for n, v in w.values.items()}
        )
        if case.schedule != 1:
            new["lr"] = new["lr"] * case.schedule**t
        return new

    optimizer = torch_optimizer(w, params, settings(0))
    losses_seen: list[Tensor] = []
    kept: list[dict[str, Tensor | None]] = []
    by_chance = False
    middle = {n: p.detach().clone() for n, p in params.items()}
    torch.manual_seed(case.seed)
    for t in range(case.steps):
        for group, own in zip(optimizer.param_groups, w.by_group(settings(t)), strict=True):
            group.update(own)
        batch = w.batches[t]
        strength = torch.tensor(
            w.strength + moved(t) * float(w.along.get("hyper.strength", 0.0)), dtype=torch.float64
        )
        seen: list[Tensor] = []
        held = None
        if case.role == "target":
            with torch.no_grad():
                held = losses.target(params)

        def value_of(batch: models.Batch) -> Tensor:
            return losses.value(
                w.loss,
                case.role,
                model,
                params,
                batch,
                strength,  # noqa: B023
                held,  # noqa: B023
            )

        def closure() -> Tensor:
            optimizer.zero_grad()
            if gated:
                extras.detach_gate(model)
            if case.role == "gate":
                model.gate = extras.gate_of(strength)  # noqa: B023
            if "micro" in more:
                pieces = extras.parts(batch, more["micro"], case.loss)  # noqa: B023
                value = torch.stack([share * value_of(part) for share, part in pieces]).sum()
            else:
                value = value_of(batch)  # noqa: B023
            if "feedback" in more and losses_seen:
                value = value * (1 + FEEDBACK * losses_seen[-1].tanh())
            value.backward()
            if case.front in ("unroll", "metagradient"):
                # As documented there: what a step does not use has the gradient zero.
                for name in w.trained:
                    p = params[name]
                    if p.grad is None and p.requires_grad:
                        p.grad = torch.zeros_like(p)
            if grads is not None:
                for name in w.trained:
                    given = grads[t][name]  # noqa: B023
                    params[name].grad = None if given is None else given.clone()
            else:
                kept.append(
                    {n: None if (g := params[n].grad) is None else g.clone() for n in w.trained}
                )
            _transform(case, [params[n] for n in w.trained])
            if "callback" in more:
                for n in w.trained:
                    if (p := params[n]).grad is not None:
                        p.grad = p.grad * (1 + strength)  # noqa: B023
            seen.append(value.detach())  # noqa: B023
            return value.detach()

        if case.rule == "lbfgs":
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            by_chance |= case.rule == "rprop" and any(
                p.grad is not None and bool(((p.grad != 0) & (p.grad.abs() < ROUNDING)).any())
                for p in params.values()
            )
            optimizer.step()
        losses_seen.append(seen[0])
        if more.get("assign") == t:
            with torch.no_grad():
                p, other = params[w.trained[0]], params[w.trained[-1]]
                p.copy_(0.8 * p + 0.1 * strength + 0.1 * other.sum())
        if "shift" in more:
            params[w.shifted].data.add_(SHIFT)
        if t + 1 == (case.steps + 1) // 2:
            middle = {n: p.detach().clone() for n, p in params.items()}
    if gated:
        extras.detach_gate(model)
    with torch.no_grad():
        value = outer(
            w,
            model,
            {n: params[n] for n in w.trained},
            {n: middle[n] for n in w.trained},
            losses_seen,
        )
    return Run(float(value), kept, by_chance)


def _transform(case: Case, params: list[nn.Parameter]) -> None:
    present = [p for p in params if p.grad is not None]
    if case.transform == "clip norm":
        torch.nn.utils.clip_grad_norm_(present, CLIP["clip norm"])
    elif case.transform == "clip each":
        for p in present:
            torch.nn.utils.clip_grad_norm_([p], CLIP["clip each"])
    elif case.transform == "clip value":
        torch.nn.utils.clip_grad_value_(present, CLIP["clip value"])
    elif case.transform == "scale":
        for p in present:
            assert p.grad is not None
            p.grad.mul_(CLIP["scale"])
    elif case.transform == "decay":
        for p in present:
            assert p.grad is not None
            p.grad.add_(p.detach(), alpha=CLIP["decay"])


def outer(
    w: World,
    call: losses.Call,
    params: dict[str, Tensor],
    middle: dict[str, Tensor],
    losses_seen: list[Tensor] | Tensor,
) -> Tensor:
    """Compute the outer loss from what a training leaves."""
    if w.case.outer == "output":
        return losses.outer_of_output(call(w.batches[-1]), w.batches[-1])
    total = losses.outer_of_params(params)
    if w.case.outer == "middle":
        return total + losses.outer_of_params(middle) ** 2 / 10
    if w.case.outer == "losses":
        stacked = torch.stack(list(losses_seen))
        return total + (losses.weights(len(stacked)) * stacked).sum()
    return total


class Truth(NamedTuple):
    """The outer loss, its derivative, and whether both difference steps agree on it."""

    value: float
    derivative: float
    decided: bool


def truth(w: World) -> Truth:
    """Differentiate the plain run along the direction, at two difference steps.

    A kink at the very point is seen by the second differences, which then grow as the step falls.
    """
    base = plain_run(w, 0.0)
    grads = base.grads if w.case.first_order else None
    slopes, bends = [], []
    for h in STEPS:
        above, below = plain_run(w, h, grads).value, plain_run(w, -h, grads).value
        slopes.append((above - below) / (2 * h))
        bends.append((above - 2 * base.value + below) / h)
    scale = max(1.0, abs(slopes[-1]))
    smooth = abs(bends[-1]) < 1e-2 * scale
    decided = smooth and not base.by_chance and abs(slopes[0] - slopes[1]) <= AGREE * scale
    return Truth(base.value, slopes[-1], decided)
