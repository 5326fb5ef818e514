"""What the library says of a case, by each front end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import innerloop
from tests.fuzz import extras, losses, rules
from tests.fuzz.case import Case
from tests.fuzz.extras import FEEDBACK, SHIFT
from tests.fuzz.models import Batch
from tests.fuzz.truth import CLIP, World, outer, torch_optimizer

Grads = dict[str, Tensor | None]


class Answer(NamedTuple):
    """The outer loss, its derivative along the direction, and by the names of the inputs."""

    value: float
    derivative: float
    parts: dict[str, float]
    changed: str


def answer(w: World) -> Answer:
    """Ask the front end of the case."""
    model = w.fresh()
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    attributes = len(getattr(model, "seen", ()))
    hyper = {n: _leaf(v) for n, v in w.values.items()}
    if w.case.role != "none":
        hyper["strength"] = _leaf(w.strength)
    torch.manual_seed(w.case.seed)
    value, grads = ASK[w.case.front](w, model, hyper)
    parts = {
        name: 0.0 if (g := grads.get(name)) is None else float((g.to_dense() * v).sum())
        for name, v in w.along.items()
    }
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    if len(getattr(model, "seen", ())) != attributes:
        changed.append("seen")
    return Answer(float(value), sum(parts.values()), parts, ", ".join(changed))


def _leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def _strength(w: World, hyper: Mapping[str, Tensor]) -> Tensor:
    return hyper["strength"] if "strength" in hyper else torch.tensor(w.strength).double()


def _overrides(w: World, hyper: Mapping[str, Tensor], t: int) -> dict[str, Any]:
    """What the optimizer takes from the outer variables at step t, as tensors."""
    varied = {n: v for n, v in hyper.items() if n != "strength"}
    chosen = rules.only(w.settings(varied), varied)
    if w.case.schedule != 1:
        lr = chosen.get("lr", torch.tensor(w.case.settings["lr"]).double())
        chosen["lr"] = lr * w.case.schedule**t
    by_torch = bool(w.case.options.get("by_torch"))
    if len(w.groups) == 2 and "lr" in chosen:
        first = 1 if by_torch else len(w.groups[0])  # `groups` is given one pattern for each name
        chosen["lr"] = [chosen["lr"] / 2] * first + [chosen["lr"]]
    if w.case.rule == "learned" and not by_torch:
        settings = w.settings(varied)
        weights = {n: torch.as_tensor(v).double() for n, v in settings.items()}
        return {"weights": weights} if varied else {}
    return chosen


def _optimizer(w: World, chained: bool = True) -> innerloop.optim.Optimizer:
    """Make the rule of innerloop."""
    make = rules.RULES[w.case.rule].ours
    members = [make(**own) for own in w.by_group(w.case.settings)]
    rule: innerloop.optim.Optimizer = members[0]
    if len(members) == 2:
        first = dict.fromkeys(w.groups[0], members[0])
        rule = innerloop.optim.groups({**first, "*": members[1]})
    transform = w.case.transform
    if transform == "none" or not chained:
        return rule
    made: Any = {
        "clip norm": innerloop.optim.clip_by_global_norm,
        "clip each": innerloop.optim.clip_per_parameter,
        "clip value": innerloop.optim.clip_by_value,
        "decay": innerloop.optim.add_decayed_weights,
        "scale": innerloop.optim.scale,
    }[transform](CLIP[transform])
    return innerloop.optim.chain(made, rule)


def _root(x: Tensor) -> Tensor:
    """Return the square root; at an exact zero, where it has no derivative, the user's own care."""
    return (x + 1e-24).sqrt()


def _called_back(transform: str, grads: list[Tensor | None]) -> list[Tensor | None]:
    """Write the transform as a user of ``grad_callback`` would."""
    limit = CLIP[transform]
    if transform == "clip norm":
        squares = [g.square().sum() for g in grads if g is not None]
        factor = (limit / (_root(torch.stack(squares).sum()) + 1e-6)).clamp(max=1.0)
        return [None if g is None else g * factor for g in grads]
    if transform == "clip each":
        return [
            None if g is None else g * (limit / (_root(g.square().sum()) + 1e-6)).clamp(max=1.0)
            for g in grads
        ]
    if transform == "clip value":
        return [None if g is None else g.clamp(-limit, limit) for g in grads]
    return [None if g is None else limit * g for g in grads]


def _named_callback(transform: str) -> Callable[[Mapping[str, Tensor]], dict[str, Any]] | None:
    if transform == "none":
        return None
    return lambda grads: dict(
        zip(grads, _called_back(transform, list(grads.values())), strict=True)
    )


def _torch_optimizer(w: World, model: nn.Module) -> torch.optim.Optimizer:
    return torch_optimizer(w, dict(model.named_parameters()), w.case.settings)


def _training_loss(w: World, model: Any, batch: Batch, strength: Tensor, held: Any) -> Tensor:
    """Compute the loss of a step with a module, checkpointed as was drawn."""
    if w.case.role == "gate":
        model.gate = extras.gate_of(strength)
    params = dict(model.named_parameters())
    return _value(w, model, params, batch, strength, held)


def _value(
    w: World, call: losses.Call, params: Any, batch: Batch, strength: Tensor, held: Any
) -> Tensor:
    kind, place = w.case.extras.get("checkpoint", ("", ""))

    def checkpointed(batch: Batch) -> Tensor:
        output: Tensor = extras.around(kind, call, batch)
        return output

    if place == "loss":
        found: Tensor = extras.around(
            kind, losses.value, w.loss, w.case.role, call, params, batch, strength, held
        )
        return found
    called = checkpointed if place == "call" else call
    return losses.value(w.loss, w.case.role, called, params, batch, strength, held)


def by_track(w: World, model: nn.Module, hyper: dict[str, Tensor]) -> tuple[Tensor, Grads]:
    case, options, more = w.case, w.case.options, w.case.extras
    by_torch = options["by_torch"]
    optimizer: Any = _torch_optimizer(w, model) if by_torch else _optimizer(w)
    if not by_torch and len(w.trained) < len(list(model.named_parameters())):
        for name, p in model.named_parameters():
            p.requires_grad_(name in w.trained)
    strength = _strength(w, hyper)
    if "computed" in more:
        strength = strength.exp().log()
    callback = _named_callback(case.transform) if by_torch else None
    if "callback" in more:
        first = callback or dict

        def callback(grads: Mapping[str, Tensor]) -> dict[str, Any]:
            found = first(grads)
            return {n: None if g is None else g * (1 + strength) for n, g in found.items()}

    given: dict[str, Any] = {} if callback is None else {"grad_callback": callback}
    strategy: dict[str, Any] = {}
    half = (case.steps + 1) // 2
    if "replayed" in more:
        strategy = {"strategy": case.strategy, "save_at": [half]}
    middle: Mapping[str, Tensor] = {}
    with innerloop.track(
        model, optimizer, learn=options["learn"], first_order=options["first_order"], **strategy
    ) as loop:
        for t in range(case.steps):
            batch = w.batches[t]
            held = (
                losses.target(dict(loop.model.named_parameters()))
                if case.role == "target"
                else None
            )
            factor: Any = 1.0
            if "feedback" in more and t:
                factor = 1 + FEEDBACK * loop.trajectory.losses[-1].tanh()

            def closure(
                batch: Batch = batch, held: Tensor | None = held, factor: Any = factor
            ) -> Tensor:
                found = _training_loss(w, loop.model, batch, strength, held)
                return found * factor if "feedback" in more else found

            def of_arguments(
                model: Any, batch: Batch, strength: Tensor, held: Any, factor: Any
            ) -> Tensor:
                return _training_loss(w, model, batch, strength, held) * factor

            overrides = _overrides(w, hyper, t)
            loss: Any = closure if options["closure"] else closure()
            form = more.get("replayed")
            if form == "late":
                loss = lambda: _training_loss(w, loop.model, batch, strength, held) * factor  # noqa: B023,E731
            if form == "args":
                loss = of_arguments
                given["args"] = (loop.model, batch, strength, held, factor)
            loop.step(loss, hyper=overrides or None, **given)
            if more.get("assign") == t:
                now = dict(loop.model.named_parameters())
                name, other = w.trained[0], w.trained[-1]
                new = 0.8 * now[name] + 0.1 * strength + 0.1 * now[other].sum()
                loop.assign({name: new})
            if "shift" in more:
                with torch.no_grad():
                    dict(loop.model.named_parameters())[w.shifted].add_(SHIFT)
            if t + 1 == half:
                # What is edited after the step belongs to the next one.
                middle = dict(loop.model.named_parameters())
        last = loop.parameters()
        value = outer(
            w,
            loop.model,
            {n: last[n] for n in w.trained},
            {n: middle[n] for n in w.trained},
            loop.trajectory.losses,
        )
    return value.detach(), _backward(value, model, hyper)


def _backward(value: Tensor, model: nn.Module, hyper: dict[str, Tensor]) -> Grads:
    if value.requires_grad:
        value.backward()
    grads: Grads = {n: p.grad for n, p in model.named_parameters()}
    grads |= {f"buffer.{n}": b.grad for n, b in model.named_buffers() if b.requires_grad}
    model.zero_grad()
    return grads | {f"hyper.{n}": h.grad for n, h in hyper.items()}


def by_bridge(w: World, model: nn.Module, hyper: dict[str, Tensor]) -> tuple[Tensor, Grads]:
    case = w.case
    opt = _torch_optimizer(w, model)
    names = [n for n, _ in model.named_parameters()]

    def of_trained(grads: list[Tensor | None]) -> list[Tensor | None]:
        # The bridge hands over the gradients of all parameters, also those nobody trains.
        own = dict(zip(names, grads, strict=True))
        called = _called_back(case.transform, [own[n] for n in w.trained])
        return list((own | dict(zip(w.trained, called, strict=True))).values())

    callback = None if case.transform == "none" else of_trained
    with innerloop.higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diff):
        for t in range(case.steps):
            batch = w.batches[t]
            held = losses.target(dict(fmodel.named_parameters())) if case.role == "target" else None

            def closure(batch: Batch = batch, held: Tensor | None = held) -> Tensor:
                return _training_loss(w, fmodel, batch, _strength(w, hyper), held)

            override = {
                n: v if isinstance(v, list) else [v] * len(w.groups)
                for n, v in _overrides(w, hyper, t).items()
            }
            diff.step(
                closure if case.options["closure"] else closure(),
                override=override or None,
                grad_callback=callback,
            )
        last = dict(zip(names, fmodel.parameters(), strict=True))
        middle = dict(zip(names, fmodel.parameters(time=(case.steps + 1) // 2), strict=True))
        value = outer(
            w, fmodel, {n: last[n] for n in w.trained}, {n: middle[n] for n in w.trained}, []
        )
        return value.detach(), _backward(value, model, hyper)


class _Posed(NamedTuple):
    problem: innerloop.Problem
    batches: Any
    steps: int | None
    outer: Callable[[innerloop.Trajectory], Tensor]


def _posed(w: World, model: nn.Module, captured: dict[str, Tensor]) -> _Posed:
    """Pose the case as a `Problem`, with its batches in the form that was drawn."""
    case, options = w.case, w.case.options
    optimizer = _optimizer(w)
    varied = case.varied or case.schedule != 1
    more: dict[str, Any] = (
        {"optimizer_hyper": lambda hyper, t: _overrides(w, hyper or {}, t)} if varied else {}
    )
    for name, p in model.named_parameters():
        p.requires_grad_(name in w.trained)
    call, everything, buffers = innerloop.functional(model)
    # Outside of a loop torch's own checkpoint would read the weights that the module has by then.
    outer_call = innerloop.functional(w.fresh(plain=True))[0]

    def strength(hyper: Any) -> Tensor:
        return _strength(w, {**(hyper or {}), **captured})

    from_module = options["from_module"] or bool(buffers) or case.family == "stateful"
    from_module = from_module or w.case.loss in ("module hook", "parameter hook")
    if from_module:

        def of_module(
            model: nn.Module, hyper: Any, batch: Batch, held: Tensor | None = None
        ) -> Tensor:
            return _training_loss(w, model, batch, strength(hyper), held)

        if case.role == "target":
            more["targets"] = lambda model, hyper, batch: losses.target(
                dict(model.named_parameters())
            )
        problem = innerloop.Problem.from_module(
            model, _in_parts(case, of_module), optimizer, **more
        )
    else:

        def of_params(params: Any, hyper: Any, batch: Batch, held: Tensor | None = None) -> Tensor:
            complete = {**everything, **params}
            return _value(w, lambda b: call(complete, b), complete, batch, strength(hyper), held)

        if case.role == "target":
            more["targets"] = lambda params, hyper, batch: losses.target({**everything, **params})
        problem = innerloop.Problem(_in_parts(case, of_params), optimizer, **more)

    half = (case.steps + 1) // 2

    def of_trajectory(traj: innerloop.Trajectory) -> Tensor:
        last = traj.at(-1)
        complete = {**everything, **traj.params}

        def final(batch: Batch) -> Tensor:
            output: Tensor = (
                outer_call(complete, batch, buffers=last.buffers)[0]
                if buffers
                else outer_call(complete, batch)
            )
            return output

        middle = traj.at(half).params if case.outer == "middle" else {}
        return outer(w, final, dict(traj.params), dict(middle), traj.losses)

    data = w.batches[:-1]
    form = options["form"]
    if form == "stacked":
        keys = data[0]
        stacked = {key: torch.stack([b[key] for b in data]) for key in keys}
        return _Posed(problem, stacked, None, of_trajectory)
    if form == "function":
        return _Posed(problem, lambda params, hyper, t: data[t], case.steps, of_trajectory)
    if form == "iterator":
        return _Posed(problem, iter(data), case.steps, of_trajectory)
    return _Posed(problem, data, None, of_trajectory)


def _in_parts(case: Case, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Evaluate the loss on some rows at a time, if that was drawn."""
    if "micro" not in case.extras:
        return loss
    size, form = case.extras["micro"]
    weight = extras.weight_of(case.loss) if form == "mean" else None
    return innerloop.micro_batches(loss, size, reduction=form, weight=weight)


def _captures(case: Case, hyper: Mapping[str, Tensor]) -> bool:
    return bool(case.options["captured"]) and "strength" in hyper


def by_unroll(w: World, model: nn.Module, hyper: dict[str, Tensor]) -> tuple[Tensor, Grads]:
    case = w.case
    captured = {"strength": hyper["strength"]} if _captures(case, hyper) else {}
    posed = _posed(w, model, captured)
    given = {n: h for n, h in hyper.items() if n not in captured}
    params = {
        n: p.detach().clone().requires_grad_("params" in case.wrt)
        for n, p in model.named_parameters()
        if n in w.trained
    }
    more: dict[str, Any] = {"strategy": case.strategy}
    if case.outer == "middle":
        more["save_at"] = [(case.steps + 1) // 2]
    # A continued loop draws from its carry and leaves the random state of the caller, from which a
    # dropout in the outer loss draws.
    outers = ("params",) if case.family == "dropout" else ("params", "output")
    pieces = case.options["pieces"] == 2 and case.outer in outers
    if pieces and case.steps > 1 and case.cut == 0 and case.options["form"] == "list":
        first = innerloop.unroll(posed.problem, params, posed.batches[:1], hyper=given, **more)
        traj = innerloop.unroll(posed.problem, first.at(-1), posed.batches[1:], hyper=given, **more)
    else:
        traj = innerloop.unroll(
            posed.problem, params, posed.batches, hyper=given, steps=posed.steps, **more
        )
    value = posed.outer(traj)
    inputs = {**params} if "params" in case.wrt else {}
    inputs |= {f"hyper.{n}": h for n, h in hyper.items()}
    inputs |= {f"buffer.{n}": b for n, b in model.named_buffers() if b.requires_grad}
    if not value.requires_grad:
        return value.detach(), {}
    found = torch.autograd.grad(value, list(inputs.values()), allow_unused=True)
    return value.detach(), dict(zip(inputs, found, strict=True))


def by_metagradient(w: World, model: nn.Module, hyper: dict[str, Tensor]) -> tuple[Tensor, Grads]:
    case = w.case
    posed = _posed(w, model, {})
    params = {n: p.detach().clone() for n, p in model.named_parameters() if n in w.trained}
    more: dict[str, Any] = {"strategy": case.strategy}
    if case.outer == "middle":
        more["save_at"] = [(case.steps + 1) // 2]
    if hyper:
        more["hyper"] = {n: h.detach() for n, h in hyper.items()}
    value, grads = innerloop.metagradient(
        lambda traj, hyper: posed.outer(traj),
        posed.problem,
        params,
        posed.batches,
        steps=posed.steps,
        wrt=case.wrt,
        **more,
    )
    named: Grads = dict(grads.get("params") or {})
    return value, named | {f"hyper.{n}": g for n, g in (grads.get("hyper") or {}).items()}


ASK: dict[str, Callable[[World, nn.Module, dict[str, Tensor]], tuple[Tensor, Grads]]] = {
    "track": by_track,
    "unroll": by_unroll,
    "metagradient": by_metagradient,
    "bridge": by_bridge,
}
