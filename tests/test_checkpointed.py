"""`Checkpointed`: equal to `StoreAll` wherever it replays, and an error wherever a replay would not
be one.

The contract of all strategies, finite differences of ``torch.optim`` among it, is in
``test_strategy_contract.py``; how often a step runs again is in ``test_schedule.py``.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import pickle
import random
import signal
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from innerloop import Checkpointed, StoreAll
from innerloop._utils import tree
from innerloop.strategy import Strategy
from innerloop.strategy._engine.snapshots import Snapshots
from tests.memory import assert_nothing_is_left, without_collector
from tests.oracles import assert_derivative, derivative, smooth_noise
from tests.small_problems import one_weight, quadratic_problem

pytestmark = pytest.mark.usefixtures("float64")
INVALID, CAPTURED, NOT_DIFFERENTIABLE = (
    innerloop.InvalidInputError,
    innerloop.CapturedTensorError,
    innerloop.NotDifferentiableError,
)

RULES: dict[str, Callable[[], innerloop.optim.Optimizer]] = {
    "sgd": innerloop.optim.sgd,
    "momentum": lambda: innerloop.optim.sgd(momentum=0.9),
    "adam": lambda: innerloop.optim.adam(eps=0.01),
}
each_rule = pytest.mark.parametrize("rule", list(RULES))
each_product = pytest.mark.parametrize("product", ["reverse", "mixed"])


def assert_equal(ours: Any, truth: Any, tolerance: float = 1e-10) -> None:
    """Two flat sequences of tensors, relative to the largest entry of each; None only where the
    truth has none."""
    assert len(ours) == len(truth)
    for i, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert (a is None) == (b is None), f"entry {i}: {a}, StoreAll has {b}"
        if b is not None:
            assert a.shape == b.shape
            error, scale = (
                (a - b).abs().max().item() if b.numel() else 0.0,
                b.abs().max().item() if b.numel() else 0.0,
            )
            assert error <= tolerance * scale + 1e-14, (
                f"entry {i}: off by {error:.1e}, where values are up to {scale:.1e}"
            )


# -- a noisy module: dropout, running statistics, hyper-parameters everywhere ----------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.6 * smooth_noise(*p.shape, phase=float(i)) + (i == 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.norm(self.body(x)).tanh(), 0.3, training=self.training))


def noisy_loss(model: nn.Module, hyper: Any, t: Any) -> tuple[Tensor, Tensor]:
    """The data are a hyper-parameter too; aux is the mean prediction."""
    prediction = model(smooth_noise(6, 3, phase=float(t)) * hyper["scale"])
    decay = torch.stack([p.square().sum() for p in model.parameters()]).sum()
    error = (prediction - smooth_noise(6, 1, phase=t + 0.5)).square().mean()
    return error + hyper["decay"] * decay, prediction.mean()


def rate(hyper: Any, t: int) -> dict[str, Any]:
    return {"lr": hyper["log_lr"].exp() / (1 + 0.05 * t)}


def leaves() -> dict[str, Tensor]:
    values = {
        "log_lr": torch.tensor(-2.5),
        "decay": torch.tensor(0.02),
        "scale": torch.tensor([1.0, 0.8, 1.2]),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def mixture(tensors: Sequence[Tensor]) -> Tensor:
    """A smooth scalar in which every entry has another weight."""
    return torch.stack(
        [
            ((1 + smooth_noise(*x.shape, phase=30.0 + i) / 2) * (x + 0.3).sin()).sum()
            for i, x in enumerate(tensors)
        ]
    ).sum()


def floating(state: Any) -> list[Tensor]:
    return [
        x
        for x in torch.utils._pytree.tree_leaves(state)
        if isinstance(x, Tensor) and x.is_floating_point()
    ]


def seen_params(traj: innerloop.Trajectory, times: Sequence[int]) -> Tensor:
    return mixture(list(traj.params.values()))


def seen_losses(traj: innerloop.Trajectory, times: Sequence[int]) -> Tensor:
    return mixture([traj.losses])


def seen_aux(traj: innerloop.Trajectory, times: Sequence[int]) -> Tensor:
    return mixture([traj.aux])


def seen_saved(traj: innerloop.Trajectory, times: Sequence[int]) -> Tensor:
    states = [[*traj.at(t).params.values(), *floating(traj.at(t).optimizer_state)] for t in times]
    return torch.stack([mixture(state) for state in states]).prod()


def seen_all(traj: innerloop.Trajectory, times: Sequence[int]) -> Tensor:
    return (
        seen_params(traj, times) * seen_losses(traj, times)
        + seen_aux(traj, times)
        + seen_saved(traj, times)
    )


SEEN = {
    "params": seen_params,
    "losses": seen_losses,
    "aux": seen_aux,
    "saved": seen_saved,
    "all": seen_all,
}


def noisy_run(
    strategy: Strategy, rule: str, steps: int, seen: str
) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    """``(gradients, results, the user's next random numbers after the forward and after the
    backward pass)``."""
    model = Noisy()
    problem = innerloop.Problem.from_module(model, noisy_loss, RULES[rule](), optimizer_hyper=rate)
    params, hyper = dict(model.named_parameters()), leaves()
    times = sorted({0, steps // 3, steps // 2, max(steps - 1, 0), steps})
    torch.manual_seed(steps)
    traj = innerloop.unroll(
        problem,
        params,
        list(range(steps)),
        hyper=hyper,
        strategy=strategy,
        save_at=[*times, -1, times[0]],
    )
    random = [torch.rand(3)]
    results = [*traj.params.values(), *traj.at(-1).buffers.values(), traj.losses, traj.aux]
    results += [x for t in times for x in floating((traj.at(t).params, traj.at(t).optimizer_state))]
    inputs = [*params.values(), *hyper.values()]
    gradients = torch.autograd.grad(SEEN[seen](traj, times), inputs, allow_unused=True)
    random.append(torch.rand(3))
    assert_untouched(model)
    return list(gradients), [x.detach() for x in results], random


def assert_untouched(model: nn.Module) -> None:
    fresh = Noisy()
    for ours, before in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(ours, before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@functools.cache
def noisy_truth(rule: str, steps: int, seen: str) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    return noisy_run(StoreAll(), rule, steps, seen)


def assert_as_stored(strategy: Strategy, rule: str, steps: int, seen: str = "all") -> None:
    gradients, results, random = noisy_run(strategy, rule, steps, seen)
    truth, expected, expected_random = noisy_truth(rule, steps, seen)
    assert_equal(results, expected, 1e-12)
    assert_equal(gradients, truth)
    for ours, theirs in zip(random, expected_random, strict=True):
        assert torch.equal(ours, theirs), "the user's random numbers are others than after StoreAll"


MIXED = {(2, 1), (2, 7), ("all", 2), ("all", 23)}
"""Slots and steps at which ``product="mixed"`` runs: each pair of product, slots and steps occurs
once, and the rest of the grid is slow."""


def slots_and_steps() -> Iterator[Any]:
    for slots in (1, 2, 3, 5, "all", None):
        for steps in (1, 2, 7, 23):
            for product in ("reverse", "mixed") if slots in (2, "all") else ("reverse",):
                run = ((slots, steps) in MIXED) == (product == "mixed")
                marks = () if run else pytest.mark.slow
                yield pytest.param(steps, product, slots, marks=marks)


@pytest.mark.covering
@pytest.mark.parametrize(("steps", "product", "slots"), list(slots_and_steps()))
def test_every_number_of_slots_and_steps(steps: int, product: str, slots: Any):
    rule = list(RULES)[steps % 3]
    assert_as_stored(Checkpointed(slots=slots, product=product), rule, steps)


@each_product
@pytest.mark.parametrize(
    ("rule", "seen"), [("sgd", "all"), ("momentum", "all"), *(("adam", seen) for seen in SEEN)]
)
def test_every_rule_and_everything_a_trajectory_offers(rule: str, seen: str, product: str):
    assert_as_stored(Checkpointed(slots=2, product=product), rule, 7, seen)


@each_product
@pytest.mark.parametrize(("rule", "slots"), [("sgd", 1), ("momentum", 3), ("adam", 2)])
def test_kept_gradients(rule: str, slots: int, product: str):
    assert_as_stored(Checkpointed(slots=slots, product=product, save="gradients"), rule, 7)


@pytest.mark.covering(2)
@pytest.mark.parametrize("save", ["params", "gradients"])
@pytest.mark.parametrize("slots", [1, 3, "all"])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_states_may_wait_elsewhere(offload: str, slots: Any, save: str):
    assert_as_stored(Checkpointed(slots=slots, offload=offload, save=save), "adam", 7)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "product"), [("momentum", "mixed"), ("adam", "reverse")])
def test_a_hundred_steps(rule: str, product: str):
    assert_as_stored(Checkpointed(slots=20, product=product), rule, 100, "losses")


@each_rule
@pytest.mark.parametrize("steps", [3])
def test_finite_differences(rule: str, steps: int):
    """Of the loop run forward only, which no strategy differentiates: d / d of each
    hyper-parameter."""
    gradients = dict(
        zip(leaves(), noisy_run(Checkpointed(slots=2), rule, steps, "all")[0][-3:], strict=True)
    )

    def value(h: float, name: str) -> float:
        model, hyper = Noisy(), {n: x.detach() for n, x in leaves().items()}
        hyper[name] = hyper[name] + h
        problem = innerloop.Problem.from_module(
            model, noisy_loss, RULES[rule](), optimizer_hyper=rate
        )
        times = sorted({0, steps // 3, steps // 2, steps - 1, steps})
        torch.manual_seed(steps)
        with torch.no_grad():
            traj = innerloop.unroll(
                problem,
                dict(model.named_parameters()),
                list(range(steps)),
                hyper=hyper,
                strategy=Checkpointed(),
                save_at=times,
            )
        return seen_all(traj, times).item()

    for name, gradient in gradients.items():
        truth = derivative(functools.partial(value, name=name))
        assert_derivative(gradient.sum().item(), truth, f"d / d {name}")


# -- a plain problem, for everything else ----------------------------------------------------------


def plain_loss(params: Any, hyper: Any, batch: Any) -> Tensor:
    """Third derivatives do not vanish; ``batch`` may be anything that can be added to a number, or
    None."""
    error = (params["w"] * (hyper + 1)).sin().square().sum() + (
        params["b"] - 0.3
    ).square().sum() * params["w"].cos().sum()
    return error if batch is None else error + (params["w"] * batch).square().sum()


def plain(rule: str = "sgd", loss: Any = plain_loss, **arguments: Any) -> innerloop.Problem:
    optimizer = {
        "sgd": lambda: innerloop.optim.sgd(lr=0.1),
        "momentum": lambda: innerloop.optim.sgd(lr=0.1, momentum=0.9),
        "adam": lambda: innerloop.optim.adam(lr=0.1, eps=0.01),
    }[rule]()
    return innerloop.Problem(loss, optimizer, **arguments)


def begin() -> dict[str, Tensor]:
    return {"w": smooth_noise(3), "b": smooth_noise(2, phase=1.0)}


def inputs() -> tuple[dict[str, Tensor], Tensor]:
    return {name: p.requires_grad_() for name, p in begin().items()}, torch.tensor(
        0.4, requires_grad=True
    )


def of_end(traj: innerloop.Trajectory) -> Tensor:
    return mixture([*traj.params.values(), traj.losses])


def plain_gradients(
    strategy: Strategy, batches: Any = None, problem: Any = None, **arguments: Any
) -> list[Any]:
    params, hyper = inputs()
    traj = innerloop.unroll(
        problem or plain(), params, batches, hyper=hyper, strategy=strategy, **arguments
    )
    return list(torch.autograd.grad(of_end(traj), [*params.values(), hyper]))


def test_inputs_may_be_one_tensor():
    """As an initial value that the loss holds on to, under two names, and derived from one
    another."""

    def gradients(strategy: Strategy) -> Sequence[Tensor]:
        w = begin()["w"].requires_grad_()

        def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
            distance = (params["a"] - hyper[0]).square().sum() + (
                params["b"] * hyper[1]
            ).sin().sum()
            return distance + (params["a"] * params["b"]).sum()

        traj = innerloop.unroll(
            plain(loss=loss),
            {"a": w, "b": w},
            None,
            hyper=[w, w.square()],
            steps=5,
            strategy=strategy,
        )
        return torch.autograd.grad(mixture(list(traj.params.values())), [w])

    for product in ("reverse", "mixed"):
        assert_equal(gradients(Checkpointed(slots=2, product=product)), gradients(StoreAll()))


@pytest.mark.parametrize("product", ["StoreAll", "reverse", "mixed"])
def test_a_parameter_that_is_not_reached_has_no_gradient(product: str):
    """None, as autograd says, not zero."""
    strategy = StoreAll() if product == "StoreAll" else Checkpointed(slots=2, product=product)
    params, _ = inputs()
    problem = plain(loss=lambda p, h, batch: p["w"].sin().sum())
    traj = innerloop.unroll(problem, params, None, steps=4, strategy=strategy)
    (gradient,) = torch.autograd.grad(traj.params["w"].sum(), [params["b"]], allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize(
    "strategy",
    [StoreAll(), Checkpointed(slots=2), Checkpointed(slots=2, product="mixed")],
    ids=repr,
)
def test_a_hyper_parameter_that_is_not_reached_has_no_gradient(strategy: Strategy):
    used, idle, index = (
        torch.tensor(0.4, requires_grad=True),
        torch.ones(2, requires_grad=True),
        torch.tensor(1),
    )
    problem = plain(loss=lambda p, h, batch: (p["w"][h["index"]] * h["used"]).square())
    hyper = {"used": used, "idle": idle, "index": index, "text": "kept", "nothing": None}
    traj = innerloop.unroll(problem, begin(), None, hyper=hyper, steps=4, strategy=strategy)
    found = torch.autograd.grad(traj.params["w"].sum(), [used, idle], allow_unused=True)
    assert found[0] is not None
    assert found[1] is None


def test_results_may_be_edited_in_place():
    """Nothing of what the replay needs is shared with them."""

    def gradients(strategy: Strategy) -> Sequence[Tensor]:
        params, hyper = inputs()
        traj = innerloop.unroll(
            plain("momentum"), params, None, hyper=hyper, steps=7, strategy=strategy, save_at=[3, 6]
        )
        for t in (3, 6, 7):
            traj.at(t).params["w"].mul_(2)
            with torch.no_grad():
                traj.at(t).params["b"].detach().zero_()
        return torch.autograd.grad(
            mixture([traj.at(t).params["w"] for t in (3, 6, 7)]), [*params.values(), hyper]
        )

    assert_equal(gradients(Checkpointed(slots="all")), gradients(Checkpointed(slots=1)))
    assert_equal(gradients(Checkpointed(slots="all"))[:1], edited_truth())


def edited_truth() -> list[Tensor]:
    params, hyper = inputs()
    traj = innerloop.unroll(plain("momentum"), params, None, hyper=hyper, steps=7, save_at=[3, 6])
    return list(
        torch.autograd.grad(mixture([2 * traj.at(t).params["w"] for t in (3, 6, 7)]), [params["w"]])
    )


# -- the approximate product -----------------------------------------------------------------------


def finite_error(finite_step: float) -> float:
    found = plain_gradients(
        Checkpointed(slots=2, product="finite", finite_step=finite_step), steps=5
    )
    truth = plain_gradients(StoreAll(), steps=5)
    return max((a - b).abs().max().item() for a, b in zip(found, truth, strict=True))


def test_the_error_of_the_central_difference_falls_with_the_square_of_its_step():
    steps = [1e-2 / 10 ** (k / 4) for k in range(5)]
    errors = [finite_error(h) for h in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(2.0, abs=0.02), f"errors {errors}"
    assert errors[-1] > 1e-9, "rounding has taken over, the fit says nothing"


@each_rule
def test_the_central_difference_under_dropout(rule: str):
    """Both of its sides see the masks of the forward pass; another mask would be off by some tens
    of per cent."""
    gradients, results, random = noisy_run(Checkpointed(slots=2, product="finite"), rule, 7, "all")
    truth, expected, expected_random = noisy_truth(rule, 7, "all")
    assert_equal(gradients, truth, 1e-6)
    assert_equal(results, expected, 1e-12)
    assert all(torch.equal(a, b) for a, b in zip(random, expected_random, strict=True))


@pytest.mark.parametrize("product", ["reverse", "mixed", "finite"])
def test_a_stopped_gradient_stays_stopped(product: str):
    """``detach`` inside of the loss: constant for the second derivative too; the moved parameters
    of a difference move it."""
    problem = plain(loss=lambda p, h, batch: ((p["w"] * (1 + p["w"].detach())).sin() * h).sum())
    strategy = Checkpointed(slots=2, product=product)
    if product == "finite":
        with pytest.raises(innerloop.NotDifferentiableError, match="stops a gradient"):
            plain_gradients(strategy, problem=problem, steps=4)
        return
    assert_equal(
        plain_gradients(strategy, problem=problem, steps=4),
        plain_gradients(StoreAll(), problem=problem, steps=4),
        1e-10,
    )


def test_only_the_central_difference_is_not_exact():
    assert [Checkpointed(product=p).exact for p in ("auto", "reverse", "mixed", "finite")] == [
        True,
        True,
        True,
        False,
    ]


# -- captured tensors ------------------------------------------------------------------------------


def captured_by(where: str, x: Tensor) -> innerloop.Problem:
    """A problem that uses ``x`` without being given it."""
    calls = [0]

    def late(params: Any, hyper: Any, batch: Any) -> Tensor:
        calls[0] += 1
        return plain_loss(params, hyper, batch) * (x if batch == 3 else 1.0)

    if where == "loss":
        return plain(loss=lambda p, h, batch: plain_loss(p, h, None) * x)
    if where == "from step 3 on":
        return plain(loss=late)
    if where == "aux":
        return plain(loss=lambda p, h, batch: (plain_loss(p, h, None), (p["w"] * x).sum()))
    if where == "aux alone":
        return plain(loss=lambda p, h, batch: (plain_loss(p, h, None), x * 1.0))
    if where == "lr":
        return innerloop.Problem(plain_loss, innerloop.optim.sgd(lr=x))
    return plain(optimizer_hyper=lambda h, t: {"lr": x / 10})


each_capture = pytest.mark.parametrize(
    "where", ["loss", "from step 3 on", "aux", "aux alone", "lr", "optimizer_hyper"]
)


def at_end(where: str, strategy: Strategy, x: Tensor) -> Tensor:
    traj = innerloop.unroll(
        captured_by(where, x), begin(), list(range(5)), hyper=torch.tensor(0.4), strategy=strategy
    )
    return of_end(traj) + (0 if traj.aux is None else traj.aux.sum())


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(f)(torch.tensor(0.5)),
    "vmap(grad)": lambda f: torch.func.vmap(torch.func.grad(f))(torch.tensor([0.5, 0.6])),
    "grad(vmap)": lambda f: torch.func.grad(lambda xs: torch.func.vmap(f)(xs).sum())(
        torch.tensor([0.5, 0.6])
    ),
    "jvp": lambda f: torch.func.jvp(f, (torch.tensor(0.5),), (torch.tensor(1.0),)),
    "jacfwd": lambda f: torch.func.jacfwd(f)(torch.tensor(0.5)),
    "jacrev": lambda f: torch.func.jacrev(f)(torch.tensor(0.5)),
}


@pytest.mark.covering
@each_capture
@pytest.mark.parametrize("known", [True, False])
def test_a_captured_tensor_is_refused(where: str, known: bool):
    """With another input that requires grad, and without one."""
    x = torch.tensor(0.5, requires_grad=True)
    problem = captured_by(where, x)
    params, hyper = inputs() if known else (begin(), torch.tensor(0.4))
    with pytest.raises(CAPTURED, match="hyper"):
        innerloop.unroll(
            problem, params, list(range(5)), hyper=hyper, strategy=Checkpointed(slots=2)
        )
    if known:
        with pytest.raises(CAPTURED, match="hyper"):
            innerloop.metagradient(
                lambda traj, hyper: of_end(traj),
                problem,
                params,
                list(range(5)),
                hyper=hyper,
                strategy=Checkpointed(slots=2),
            )


@each_capture
@pytest.mark.parametrize("transform", list(TRANSFORMS))
def test_a_captured_tensor_is_refused_under_a_transform(where: str, transform: str):
    """Where StoreAll gives it a gradient."""
    run = TRANSFORMS[transform]
    run(lambda x: at_end(where, StoreAll(), x))
    with pytest.raises(CAPTURED, match="hyper"):
        run(lambda x: at_end(where, Checkpointed(slots=2), x))


def test_a_constant_may_be_captured():
    x = torch.tensor(0.5)
    problem = captured_by("loss", x)
    assert_equal(
        plain_gradients(Checkpointed(slots=2), [0] * 5, problem),
        plain_gradients(StoreAll(), [0] * 5, problem),
    )


def test_parameters_that_are_left_out():
    """They require grad, would get none, and are refused; frozen ones are constants."""
    model = Noisy()
    problem = innerloop.Problem.from_module(model, noisy_loss, RULES["sgd"](), optimizer_hyper=rate)
    params = {"head.weight": model.head.weight}
    arguments: dict[str, Any] = {"hyper": leaves(), "strategy": Checkpointed(slots=2)}
    with pytest.raises(CAPTURED, match="parameters"):
        innerloop.unroll(problem, params, [0, 1, 2], **arguments)
    for name, p in model.named_parameters():
        p.requires_grad_(name == "head.weight")
    frozen = innerloop.Problem.from_module(model, noisy_loss, RULES["sgd"](), optimizer_hyper=rate)
    found = []
    for strategy in (Checkpointed(slots=2), StoreAll()):
        torch.manual_seed(1)
        hyper = leaves()
        traj = innerloop.unroll(frozen, params, [0, 1, 2], hyper=hyper, strategy=strategy)
        found.append(torch.autograd.grad(of_end(traj), [*params.values(), *hyper.values()]))
    assert_equal(found[0], found[1])


@pytest.mark.parametrize("form", ["list", "stacked", "generator", "dict"])
def test_batches_that_require_grad_are_refused(form: str):
    x = torch.ones(4, 1, requires_grad=True)
    batches = {"list": list(x), "stacked": x, "generator": (row for row in x), "dict": {"x": x}}[
        form
    ]
    with pytest.raises(INVALID, match="requires grad"):
        innerloop.unroll(
            plain(), begin(), batches, hyper=torch.tensor(0.4), strategy=Checkpointed(slots=2)
        )


# -- is a replay a replay? -------------------------------------------------------------------------

DATA = smooth_noise(5, 4, 3)


def row_loss(params: Any, hyper: Any, batch: Any) -> Tensor:
    """Blind to the order of the rows, so that the loss itself does not betray a permutation."""
    return (batch @ params["w"] * hyper).sin().square().mean()


def impure(kind: str) -> Callable[[Any, Any, int], Any]:
    calls = [0]
    rng, numbers = np.random.default_rng(0), random.Random(0)

    def batches(params: Any, hyper: Any, t: int) -> Any:
        calls[0] += 1
        again = calls[0] > 5
        if kind == "values":
            return DATA[t] + 1e-3 * again
        if kind == "one value":
            return torch.cat(
                [DATA[t].flatten()[:-1], DATA[t].flatten()[-1:] * (1 + 1e-4 * again)]
            ).reshape(4, 3)
        if kind == "rows permuted":
            return DATA[t].roll(1, 0) if again else DATA[t]
        if kind == "fewer rows":
            return DATA[t][: 4 - again]
        if kind == "more zeros":
            return torch.cat([DATA[t], torch.zeros(1, 3)]) if again else DATA[t]
        if kind == "numpy":
            return torch.as_tensor(rng.normal(size=(4, 3)))
        if kind == "random":
            return DATA[numbers.randrange(5)]
        return DATA[t] if calls[0] != 8 else DATA[t] + 1.0  # one replay is wrong

    return batches


IMPURE = [
    "values",
    "one value",
    "rows permuted",
    "fewer rows",
    "more zeros",
    "numpy",
    "random",
    "one replay",
]


@each_product
@pytest.mark.parametrize("slots", [1, 2, "all"])
@pytest.mark.parametrize("kind", IMPURE)
def test_other_data_in_the_replay_are_an_error(kind: str, slots: Any, product: str):
    with pytest.raises(INVALID, match=r"pure function|a replayed step is not"):
        plain_row_gradients(Checkpointed(slots=slots, product=product), impure(kind), steps=5)


def plain_row_gradients(strategy: Strategy, batches: Any, **arguments: Any) -> list[Tensor]:
    w, hyper = begin()["w"].requires_grad_(), torch.tensor(1.4, requires_grad=True)
    problem = innerloop.Problem(row_loss, innerloop.optim.adam(lr=0.1, eps=0.01))
    traj = innerloop.unroll(problem, {"w": w}, batches, hyper=hyper, strategy=strategy, **arguments)
    return list(torch.autograd.grad(of_end(traj), [w, hyper]))


@pytest.mark.parametrize("kind", ["numpy", "random", "counter"])
def test_a_loss_that_is_no_function_of_its_arguments_is_an_error(kind: str):
    rng, numbers, count = np.random.default_rng(0), random.Random(0), [0.0]

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        count[0] += 1.0
        factor = {
            "numpy": lambda: rng.normal(),
            "random": numbers.random,
            "counter": lambda: count[0],
        }[kind]()
        return plain_loss(params, hyper, None) * factor

    for product in ("reverse", "mixed", "finite"):
        with pytest.raises(INVALID, match="a replayed step is not"):
            plain_gradients(
                Checkpointed(slots=2, product=product), problem=plain(loss=loss), steps=5
            )


@pytest.mark.parametrize("place", ["batches", "loss"])
def test_impurity_under_jvp_is_an_error(place: str):
    rng = np.random.default_rng(0)

    def behind(w: Tensor) -> Tensor:
        loss = (
            row_loss
            if place == "batches"
            else lambda p, h, batch: row_loss(p, h, batch * rng.normal())
        )
        batches = impure("numpy") if place == "batches" else list(DATA)
        traj = innerloop.unroll(
            plain(loss=loss),
            {"w": w},
            batches,
            steps=5,
            hyper=torch.tensor(1.4),
            strategy=Checkpointed(slots=2),
        )
        return traj.params["w"].sum()

    with pytest.raises(INVALID, match=r"pure function|a replayed step is not"):
        torch.func.jvp(behind, (begin()["w"],), (torch.ones(3),))


def test_impurity_in_a_second_derivative_is_an_error():
    """The first replay is right, the one for the second derivative is not."""
    spoiled = [False]
    problem = plain(loss=lambda p, h, batch: plain_loss(p, h, 2.0 if spoiled[0] else None))
    w = begin()["w"].requires_grad_()
    params = {"w": w, "b": begin()["b"]}
    traj = innerloop.unroll(
        problem, params, None, steps=5, hyper=torch.tensor(0.4), strategy=Checkpointed(slots=2)
    )
    (gradient,) = torch.autograd.grad(of_end(traj), [w], create_graph=True)
    spoiled[0] = True
    with pytest.raises(INVALID, match="a replayed step is not"):
        torch.autograd.grad(gradient.sum(), [w])


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "list": list,
    "stacked": lambda data: data,
    "tuple": lambda data: (data, data),
    "generator": lambda data: (row for row in data),
    "generator of one buffer": lambda data: (data[0].copy_(row) for row in data.clone()),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_data_written_in_place_before_the_backward_pass_are_an_error(form: str):
    """Torch's own error where it counts versions, else ours; never a number."""
    data = DATA.clone()
    w, hyper = begin()["w"].requires_grad_(), torch.tensor(1.4, requires_grad=True)
    loss = (lambda p, h, batch: row_loss(p, h, batch[0])) if form == "tuple" else row_loss
    traj = innerloop.unroll(
        plain(loss=loss), {"w": w}, FORMS[form](data), hyper=hyper, strategy=Checkpointed(slots=2)
    )
    if form != "generator of one buffer":
        data.mul_(1.5)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|written in place"):
        of_end(traj).backward()


def test_a_constant_written_in_place_before_the_backward_pass_is_an_error():
    factor = torch.tensor(1.0)
    w = begin()["w"].requires_grad_()
    traj = innerloop.unroll(
        plain(loss=lambda p, h, batch: (p["w"] * factor).sin().square().sum()),
        {"w": w},
        None,
        steps=5,
        strategy=Checkpointed(slots=2),
    )
    factor.mul_(1.01)
    with pytest.raises(INVALID, match="written in place"):
        of_end(traj).backward()


@each_product
def test_a_callable_may_draw_from_torch_and_from_the_parameters(product: str):
    """Rewound for the replay, before a loss that draws as well."""

    def batches(params: Any, hyper: Any, t: int) -> Tensor:
        return torch.randn(4, 3) + params["w"] * hyper + t / 10

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        return row_loss(params, hyper, F.dropout(batch, 0.3))

    def found(strategy: Strategy) -> list[Tensor]:
        torch.manual_seed(4)
        params, hyper = {"w": begin()["w"].requires_grad_()}, torch.tensor(0.4, requires_grad=True)
        problem = plain("adam", loss)
        traj = innerloop.unroll(problem, params, batches, hyper=hyper, steps=7, strategy=strategy)
        after = torch.rand(2)
        return [*torch.autograd.grad(of_end(traj), [params["w"], hyper]), after, torch.rand(2)]

    for slots in (1, 3, "all"):
        assert_equal(found(Checkpointed(slots=slots, product=product)), found(StoreAll()))


def test_user_random_numbers_between_forward_and_backward_do_not_matter():
    model = Noisy()
    problem = innerloop.Problem.from_module(
        model, noisy_loss, RULES["adam"](), optimizer_hyper=rate
    )
    params, hyper, found = dict(model.named_parameters()), leaves(), []
    for strategy, drawn in (
        (StoreAll(), 0),
        (Checkpointed(slots=2), 0),
        (Checkpointed(slots=2), 17),
    ):
        torch.manual_seed(2)
        traj = innerloop.unroll(problem, params, list(range(7)), hyper=hyper, strategy=strategy)
        torch.manual_seed(9)
        torch.rand(drawn)
        found.append(torch.autograd.grad(of_end(traj), [*params.values(), *hyper.values()]))
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


def test_the_model_may_be_switched_to_evaluation_before_the_backward_pass():
    found = []
    for strategy in (StoreAll(), Checkpointed(slots=2)):
        model = Noisy()
        problem = innerloop.Problem.from_module(
            model, noisy_loss, RULES["adam"](), optimizer_hyper=rate
        )
        params, hyper = dict(model.named_parameters()), leaves()
        torch.manual_seed(2)
        traj = innerloop.unroll(problem, params, list(range(5)), hyper=hyper, strategy=strategy)
        model.eval()
        found.append(torch.autograd.grad(of_end(traj), [*params.values(), *hyper.values()]))
        assert not any(module.training for module in model.modules())
    assert_equal(found[1], found[0])


def test_autocast_holds_in_the_replay():
    """The backward pass stands outside of the block, as the documentation of torch asks."""
    found = []
    for strategy in (StoreAll(), Checkpointed(slots=2)):
        params = {"w": (0.5 * smooth_noise(3, 3)).float().requires_grad_()}
        problem = plain(loss=lambda p, h, batch: (batch @ p["w"]).sin().square().mean())
        with torch.autocast("cpu", torch.bfloat16):
            traj = innerloop.unroll(problem, params, [x.float() for x in DATA], strategy=strategy)
        found.append(torch.autograd.grad(traj.params["w"].sin().sum(), params["w"]))
    assert_equal(found[1], found[0], 1e-5)


# -- iterators -------------------------------------------------------------------------------------


def loader(shuffle: bool = False) -> torch.utils.data.DataLoader[Any]:
    dataset: Any = torch.utils.data.TensorDataset(DATA.reshape(20, 3))
    return torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=shuffle)


def first_of(loss: Any) -> Any:
    return lambda params, hyper, batch: loss(
        params, hyper, batch[0] if isinstance(batch, list) else batch
    )


ITERATORS: dict[str, Callable[[], tuple[Any, int | None]]] = {
    "generator": lambda: ((x for x in DATA), None),
    "generator and steps": lambda: ((x for x in DATA), 5),
    "iter": lambda: (iter(list(DATA)), None),
    "iter and fewer steps": lambda: (iter([*DATA, *DATA]), 5),
    "DataLoader": lambda: (loader(), None),
    "DataLoader and steps": lambda: (loader(), 5),
    "map": lambda: (map(torch.clone, DATA), None),
}


def iterated(strategy: Strategy, given: Any, steps: int | None) -> list[Tensor]:
    w, hyper = begin()["w"].requires_grad_(), torch.tensor(1.4, requires_grad=True)
    problem = plain("adam", first_of(row_loss))
    traj = innerloop.unroll(
        problem, {"w": w}, given, hyper=hyper, steps=steps, strategy=strategy, save_at=[0, 2]
    )
    assert traj.steps == 5
    outer = of_end(traj) + traj.at(2).params["w"].square().sum()
    return [
        *torch.autograd.grad(outer, [w, hyper]),
        traj.losses.detach(),
        traj.params["w"].detach(),
    ]


@each_product
@pytest.mark.parametrize("form", list(ITERATORS))
def test_an_iterator_equals_a_list(form: str, product: str):
    truth = iterated(StoreAll(), list(DATA), None)
    for slots in (2, "all") if product == "mixed" else (1, 3, None):
        assert_equal(
            iterated(Checkpointed(slots=slots, product=product), *ITERATORS[form]()), truth
        )


def test_no_more_than_the_steps_is_drawn():
    source = iter([*DATA, *DATA])
    for _ in range(2):  # one iterator for two loops
        assert_equal(
            iterated(Checkpointed(slots=2), source, 5), iterated(StoreAll(), list(DATA), None)
        )
    assert next(source, None) is None


@each_product
def test_a_long_iterator(product: str):
    given = [0.3 * smooth_noise(3, phase=float(t)) for t in range(25)]
    truth = plain_gradients(StoreAll(), given, plain("momentum"))
    for slots in (3, 6):
        ours = plain_gradients(
            Checkpointed(slots=slots, product=product), iter(given), plain("momentum")
        )
        assert_equal(ours, truth)


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian"])
def test_an_iterator_under_a_transform(transform: str):
    run: Any = {
        "grad": lambda f: torch.func.grad(f)(torch.tensor(0.4)),
        "jvp": lambda f: torch.func.jvp(f, (torch.tensor(0.4),), (torch.tensor(1.0),))[1],
        "hessian": lambda f: torch.func.hessian(f)(torch.tensor(0.4)),
    }[transform]

    def behind(hyper: Tensor, strategy: Strategy, given: Any) -> Tensor:
        return of_end(innerloop.unroll(plain(), begin(), given(), hyper=hyper, strategy=strategy))

    truth = run(lambda hyper: behind(hyper, StoreAll(), lambda: list(DATA[:, 0])))
    ours = run(lambda hyper: behind(hyper, Checkpointed(slots=2), lambda: iter(DATA[:, 0])))
    assert_equal([ours], [truth])


def test_an_iterator_of_each_task():
    """A generator inside of ``vmap(grad)``, whose data differ from task to task."""

    def behind(w: Tensor, data: Tensor, strategy: Strategy) -> Tensor:
        loss = lambda p, h, batch: (p["w"] * batch).sin().square()  # noqa: E731
        return innerloop.unroll(
            plain(loss=loss), {"w": w}, (x for x in data.unbind()), strategy=strategy
        ).params["w"]

    found = []
    for strategy in (StoreAll(), Checkpointed(slots=2)):
        gradient = torch.func.grad(functools.partial(behind, strategy=strategy))
        found.append(
            [
                torch.func.vmap(gradient)(
                    torch.tensor([0.3, 0.4]), torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
                )
            ]
        )
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("source", ["DataLoader", "generator"])
def test_an_iterator_may_draw_before_a_loss_that_draws(source: str):
    """As every DataLoader with shuffle=True does, at its first batch."""

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        return row_loss(params, hyper, F.dropout(batch, 0.3))

    def gradients(strategy: Strategy) -> list[Tensor]:
        torch.manual_seed(6)
        given: Any = (
            loader(shuffle=True)
            if source == "DataLoader"
            else (torch.randn(4, 3) for _ in range(5))
        )
        w, hyper = begin()["w"].requires_grad_(), torch.tensor(1.4, requires_grad=True)
        traj = innerloop.unroll(
            plain(loss=first_of(loss)), {"w": w}, given, hyper=hyper, strategy=strategy
        )
        return list(torch.autograd.grad(of_end(traj), [w, hyper]))

    assert_equal(gradients(Checkpointed(slots=2)), gradients(StoreAll()))


def test_an_iterator_that_draws_before_a_loss_that_does_not():
    def gradients(strategy: Strategy) -> list[Tensor]:
        torch.manual_seed(6)
        found = plain_row_gradients(strategy, (torch.randn(4, 3) for _ in range(5)))
        return [*found, torch.rand(2)]

    assert_equal(gradients(Checkpointed(slots=2)), gradients(StoreAll()))


@pytest.mark.parametrize("form", list(ITERATORS))
def test_an_iterator_without_its_data_is_refused(form: str):
    given, steps = ITERATORS[form]()
    with pytest.raises(INVALID, match="keep_batches=True"):
        innerloop.unroll(
            plain(loss=row_loss),
            begin(),
            given,
            steps=steps,
            strategy=Checkpointed(keep_batches=False),
        )


def test_without_an_iterator_nothing_has_to_be_kept():
    ours = plain_gradients(Checkpointed(slots=2, keep_batches=False), list(DATA[:, 0]))
    assert_equal(ours, plain_gradients(StoreAll(), list(DATA[:, 0])))


def test_times_of_an_iterator_count_from_the_start():
    with pytest.raises(INVALID, match="write steps=T"):
        innerloop.unroll(plain(), begin(), iter([1.0]), save_at=[-1], strategy=Checkpointed())


@pytest.mark.parametrize("strategy", [StoreAll(), Checkpointed(slots=2)], ids=repr)
def test_an_iterator_that_ends_before_its_steps_is_an_error(strategy: Strategy):
    with pytest.raises(INVALID, match="steps=5"):
        innerloop.unroll(
            plain(), begin(), iter([1.0] * 3), steps=5, hyper=torch.tensor(0.4), strategy=strategy
        )


@pytest.mark.parametrize("source", [[], iter([])], ids=["list", "iterator"])
def test_no_steps(source: Any):
    params, hyper = inputs()
    traj = innerloop.unroll(plain(), params, source, hyper=hyper, strategy=Checkpointed())
    assert traj.steps == 0
    (gradient,) = torch.autograd.grad(traj.params["w"].square().sum(), params["w"])
    assert torch.equal(gradient, 2 * begin()["w"])


# -- more than one derivative ----------------------------------------------------------------------


@each_product
@pytest.mark.parametrize("options", [{}, {"save": "gradients"}, {"offload": "disk"}], ids=str)
def test_a_graph_may_be_used_again(product: str, options: dict[str, Any]):
    """With other cotangents, too."""
    found = []
    for strategy in (StoreAll(), Checkpointed(slots=2, product=product, **options)):
        params, hyper = inputs()
        traj = innerloop.unroll(
            plain("adam"), params, None, hyper=hyper, steps=7, save_at=[4], strategy=strategy
        )
        ends: list[Tensor] = [
            of_end(traj),
            of_end(traj),
            traj.at(4).params["w"].sum(),
            traj.losses[2],
        ]
        leaves = [*params.values(), hyper]
        rows = [torch.autograd.grad(y, leaves, retain_graph=True, allow_unused=True) for y in ends]
        found.append([x for row in rows for x in row])
    assert_equal(found[1], found[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1][:3], found[1][3:6], strict=True))


def test_a_graph_is_freed():
    params, hyper = inputs()
    traj = innerloop.unroll(plain(), params, None, hyper=hyper, steps=3, strategy=Checkpointed())
    traj.params["w"].sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        traj.params["w"].sum().backward()


def flat_objective(rule: str, strategy: Strategy) -> Callable[[Tensor], Tensor]:
    """Of three initial values and one hyper-parameter at once."""

    def behind(x: Tensor) -> Tensor:
        problem = plain(rule, optimizer_hyper=lambda h, t: {"lr": 0.1 * (h * (t + 1)).cos()})
        params = {"w": x[:3], "b": begin()["b"]}
        return of_end(
            innerloop.unroll(problem, params, None, hyper=x[3], steps=5, strategy=strategy)
        )

    return behind


def at() -> Tensor:
    return torch.cat([begin()["w"], torch.tensor([0.4])])


SECOND: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "hessian": lambda f: torch.func.hessian(f)(at()),
    "jacrev of jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f))(at()),
    "grad of grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sin().sum())(at()),
    "autograd": lambda f: torch.autograd.functional.hessian(f, at()),
    "autograd, rows at once": lambda f: torch.autograd.functional.hessian(f, at(), vectorize=True),
    "autograd of grad": lambda f: of_grad(f),
}


def of_grad(f: Callable[[Tensor], Tensor]) -> Tensor:
    x = at().requires_grad_()
    return torch.autograd.grad(torch.func.grad(f)(x).sin().sum(), x)[0]


@functools.cache
def second_truth(rule: str, how: str) -> Tensor:
    return SECOND[how](flat_objective(rule, StoreAll()))


@pytest.mark.covering
@each_product
@pytest.mark.parametrize(
    ("rule", "how"),
    [("sgd", "autograd"), ("momentum", "hessian"), *(("adam", how) for how in SECOND)],
)
def test_second_derivatives(rule: str, how: str, product: str):
    ours = SECOND[how](flat_objective(rule, Checkpointed(slots=2, product=product)))
    assert_equal([ours], [second_truth(rule, how)])


@each_rule
def test_forward_over_forward_is_right_or_an_error(rule: str):
    truth = second_truth(rule, "hessian")
    try:
        ours = torch.func.jacfwd(torch.func.jacfwd(flat_objective(rule, Checkpointed(slots=2))))(
            at()
        )
    except NOT_DIFFERENTIABLE:
        return
    assert_equal([ours], [truth])


@pytest.mark.parametrize("rule", ["adam"])
def test_third_derivatives(rule: str):
    """By eager autograd, against a finite difference of the Hessian of StoreAll."""
    x = at().requires_grad_()
    (first,) = torch.autograd.grad(
        flat_objective(rule, Checkpointed(slots=2))(x), x, create_graph=True
    )
    (second,) = torch.autograd.grad(first[0], x, create_graph=True)
    (third,) = torch.autograd.grad(second[1], x)
    h = 1e-4
    hessian = lambda x: torch.func.hessian(flat_objective(rule, StoreAll()))(x)[0, 1]  # noqa: E731
    for i, step in enumerate(h * torch.eye(4)):
        difference = (hessian(at() + step) - hessian(at() - step)) / (2 * h)
        assert_derivative(
            third[i].item(), difference.item(), f"entry {i}", relative=1e-5, absolute=1e-6
        )


@each_product
@pytest.mark.parametrize(("rule", "slots"), [("sgd", 1), ("momentum", "all"), ("adam", 2)])
def test_tasks_at_once(rule: str, slots: Any, product: str):
    """``vmap`` of grad, and several rows of a Jacobian in one backward pass."""
    tasks = torch.stack([at(), at() + 0.2, at() - 0.3])
    gradient = torch.func.grad(flat_objective(rule, Checkpointed(slots=slots, product=product)))
    truth = torch.stack([torch.func.grad(flat_objective(rule, StoreAll()))(x) for x in tasks])
    assert_equal([torch.func.vmap(gradient)(tasks)], [truth])


@each_product
def test_rows_of_a_jacobian_at_once(product: str):
    found = []
    for strategy in (StoreAll(), Checkpointed(slots=2, product=product)):
        params, hyper = inputs()
        traj = innerloop.unroll(
            plain("adam"), params, None, hyper=hyper, steps=5, strategy=strategy
        )
        found.append(
            torch.autograd.grad(
                traj.params["w"],
                [*params.values(), hyper],
                grad_outputs=torch.eye(3),
                is_grads_batched=True,
            )
        )
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_of_several_tasks(randomness: str):
    def behind(w: Tensor, strategy: Strategy) -> Tensor:
        problem = plain(loss=lambda p, h, batch: row_loss(p, h, F.dropout(batch, 0.3)))
        return of_end(
            innerloop.unroll(
                problem, {"w": w}, list(DATA), hyper=torch.tensor(1.4), strategy=strategy
            )
        )

    found = []
    for strategy in (StoreAll(), Checkpointed(slots=2)):
        torch.manual_seed(8)
        gradient = torch.func.grad(functools.partial(behind, strategy=strategy))
        tasks = torch.func.vmap(gradient, randomness=randomness)(torch.stack([begin()["w"]] * 2))
        assert torch.equal(tasks[0], tasks[1]) == (randomness == "same")
        found.append([tasks, torch.rand(2)])
    assert_equal(found[1], found[0])


def test_a_transform_inside_of_autograd():
    """``torch.func.grad`` of a loop whose hyper-parameter requires grad outside of it."""
    found = []
    for strategy in (StoreAll(), Checkpointed(slots=2), Checkpointed(slots=2, product="mixed")):
        _, hyper = inputs()

        def behind(w: Tensor, strategy: Strategy = strategy, hyper: Tensor = hyper) -> Tensor:
            params = {**begin(), "w": w}
            return of_end(
                innerloop.unroll(plain(), params, None, hyper=hyper, steps=4, strategy=strategy)
            )

        found.append(torch.autograd.grad(torch.func.grad(behind)(begin()["w"]).sum(), [hyper]))
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


# -- more than one loop ----------------------------------------------------------------------------


def test_loops_that_share_a_hyper_parameter():
    """Side by side and one behind the other, in one graph."""

    def gradients(*strategies: Strategy) -> Sequence[Tensor]:
        params, hyper = inputs()
        first, second, third = strategies
        arguments: dict[str, Any] = {"hyper": hyper, "steps": 5}
        a = innerloop.unroll(plain("adam"), params, None, strategy=first, **arguments)
        b = innerloop.unroll(plain("sgd"), params, None, strategy=second, **arguments)
        c = innerloop.unroll(
            plain("momentum"), a.params, None, strategy=third, hyper=hyper * b.losses[-1], steps=4
        )
        return torch.autograd.grad(of_end(a) + of_end(b) * of_end(c), [*params.values(), hyper])

    truth = gradients(*[StoreAll()] * 3)
    assert_equal(gradients(*[Checkpointed(slots=2)] * 3), truth)
    assert_equal(
        gradients(Checkpointed(slots=2), StoreAll(), Checkpointed(slots="all", product="mixed")),
        truth,
    )


INNER = [StoreAll(), Checkpointed(slots=2), Checkpointed(slots=2, product="mixed")]


@pytest.mark.covering
@pytest.mark.parametrize("outer", INNER[1:], ids=repr)
@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_a_loop_inside_of_a_loop(outer: Strategy, inner: Strategy):
    """The inner loop stands in the loss of the outer one: outer parameters start it, and are its
    hyper-parameter."""

    def nested(inner: Strategy) -> innerloop.Problem:
        def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
            begin = {"w": params["w"], "b": params["b"]}
            return (
                of_end(
                    innerloop.unroll(
                        plain("momentum"), begin, None, hyper=hyper, steps=3, strategy=inner
                    )
                )
                / 10
            )

        return plain("adam", loss)

    def gradients(inner: Strategy, outer: Strategy) -> Sequence[Tensor]:
        params, hyper = inputs()
        traj = innerloop.unroll(nested(inner), params, None, hyper=hyper, steps=3, strategy=outer)
        return torch.autograd.grad(of_end(traj), [*params.values(), hyper])

    assert_equal(gradients(inner, outer), gradients(StoreAll(), StoreAll()))


@each_product
@each_rule
def test_a_loop_that_goes_on(rule: str, product: str):
    """From the end, and from a state in the middle: with dropout and optimizer state; the random
    numbers come from the carry."""

    def run(strategy: Strategy, time: int) -> list[Tensor]:
        model = Noisy()
        problem = innerloop.Problem.from_module(
            model, noisy_loss, RULES[rule](), optimizer_hyper=rate
        )
        params, hyper = dict(model.named_parameters()), leaves()
        torch.manual_seed(3)
        first = innerloop.unroll(
            problem, params, list(range(5)), hyper=hyper, strategy=strategy, save_at=[3]
        )
        torch.rand(5)
        second = innerloop.unroll(
            problem, first.at(time), [4, 5, 6], hyper=hyper, strategy=strategy
        )
        state = torch.rand(2)
        gradients = torch.autograd.grad(of_end(second), [*params.values(), *hyper.values()])
        return [*gradients, *second.params.values(), second.losses, state, torch.rand(2)]

    for time in (3, -1):
        ours = run(Checkpointed(slots=2, product=product), time)
        assert_equal([x.detach() for x in ours], [x.detach() for x in run(StoreAll(), time)])


# -- memory ----------------------------------------------------------------------------------------


def noisy_episode(strategy: Strategy) -> Callable[[], None]:
    model = Noisy()
    problem = innerloop.Problem.from_module(
        model, noisy_loss, RULES["adam"](), optimizer_hyper=rate
    )
    params, hyper = dict(model.named_parameters()), leaves()

    def episode() -> None:
        traj = innerloop.unroll(
            problem, params, [0, 1], hyper=hyper, strategy=strategy, save_at=[1]
        )
        torch.autograd.grad(
            of_end(traj) + traj.at(1).params["body.bias"].sum(), [*params.values(), *hyper.values()]
        )

    return episode


@pytest.mark.slow
def test_two_hundred_episodes_leave_no_objects():
    """Not even a reference cycle, with the collector off."""
    assert_nothing_is_left(noisy_episode(Checkpointed(slots=1, product="reverse")), count=200)


def second_derivative() -> None:
    params, hyper = inputs()
    traj = innerloop.unroll(
        plain(), params, None, hyper=hyper, steps=3, strategy=Checkpointed(slots=2)
    )
    (gradient,) = torch.autograd.grad(of_end(traj), [hyper], create_graph=True)
    torch.autograd.grad(gradient, [hyper])


CYCLIC = {
    "mixed": lambda: noisy_episode(Checkpointed(slots=1, product="mixed", save="gradients")),
    "finite": lambda: noisy_episode(Checkpointed(slots=1, product="finite")),
    "second derivative": lambda: second_derivative,
}


@pytest.mark.parametrize("kind", list(CYCLIC))
def test_episodes_that_use_transforms_leave_what_can_be_collected(kind: str):
    """The transforms of torch.func leave reference cycles; what they hold must go with them."""
    episode = CYCLIC[kind]()
    with without_collector():
        for _ in range(3):
            episode()
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(10):
            episode()
        gc.collect()
        assert len(gc.get_objects()) <= before


def test_other_episodes_leave_no_objects():
    """Dropped without a backward pass, retained, of an iterator, interrupted."""
    params, hyper = inputs()
    strategy = Checkpointed(slots=2)

    def stop(phase: str, done: int, total: int | None) -> None:
        if phase == "backward" and done == 2:
            raise KeyboardInterrupt

    def episode() -> None:
        innerloop.unroll(plain(), params, None, hyper=hyper, steps=3, strategy=strategy)
        traj = innerloop.unroll(
            plain(), params, iter([0.1, 0.2, 0.3]), hyper=hyper, strategy=strategy
        )
        torch.autograd.grad(of_end(traj), [hyper], retain_graph=True)
        traj = innerloop.unroll(
            plain(), params, None, hyper=hyper, steps=3, strategy=strategy, progress=stop
        )
        with contextlib.suppress(KeyboardInterrupt):
            torch.autograd.grad(of_end(traj), [hyper])

    assert_nothing_is_left(episode, count=10)


@pytest.mark.parametrize("backward", [True, False])
def test_the_disk_is_left_as_it_was(
    backward: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    params, hyper = inputs()
    strategy = Checkpointed(slots=4, offload="disk", save="gradients")
    traj = innerloop.unroll(plain("adam"), params, None, hyper=hyper, steps=9, strategy=strategy)
    assert len(list(tmp_path.rglob("*.pt"))) >= 9, "nothing was written: the test says nothing"
    if backward:
        of_end(traj).backward()
    del traj
    gc.collect()
    assert list(tmp_path.iterdir()) == []


# -- progress and interruption ---------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("form", ["unroll", "metagradient"])
def test_progress_is_reported(form: str, known: bool):
    told: list[Any] = []
    arguments: dict[str, Any] = {
        "strategy": Checkpointed(slots=2),
        "progress": lambda *call: told.append(call),
        "steps": 5 if known else None,
    }
    params, hyper = inputs()
    given = None if known else iter([0.1] * 5)
    if form == "unroll":
        traj = innerloop.unroll(plain(), params, given, hyper=hyper, **arguments)
        assert told == [("forward", t, 5 if known else None) for t in range(1, 6)]
        of_end(traj).backward()
    else:
        innerloop.metagradient(
            lambda traj, hyper: of_end(traj), plain(), params, given, hyper=hyper, **arguments
        )
    assert told[:5] == [("forward", t, 5 if known else None) for t in range(1, 6)]
    assert told[5:] == [("backward", t, 5) for t in range(1, 6)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("form", ["unroll", "metagradient"])
def test_an_interruption_leaves_everything_as_it_was(
    form: str, phase: str, error: type[BaseException]
):
    model = Noisy()
    problem = innerloop.Problem.from_module(
        model, noisy_loss, RULES["adam"](), optimizer_hyper=rate
    )
    params, hyper = dict(model.named_parameters()), leaves()

    def stop(now: str, done: int, total: int | None) -> None:
        if now == phase and done == 3:
            raise error("stop")

    arguments: dict[str, Any] = {"hyper": hyper, "strategy": Checkpointed(slots=2)}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    if form == "metagradient":
        with pytest.raises(error, match="stop"):
            innerloop.metagradient(
                lambda traj, hyper: of_end(traj),
                problem,
                params,
                list(range(7)),
                progress=stop,
                **arguments,
            )
    elif phase == "forward":
        with pytest.raises(error, match="stop"):
            innerloop.unroll(problem, params, list(range(7)), progress=stop, **arguments)
    else:
        traj = innerloop.unroll(problem, params, list(range(7)), progress=stop, **arguments)
        state = torch.get_rng_state()
        with pytest.raises(error, match="stop"):
            of_end(traj).backward(retain_graph=True)
    if not (
        form == "metagradient" and phase == "backward"
    ):  # there the forward pass has drawn its numbers
        assert torch.equal(torch.get_rng_state(), state)
    assert_untouched(model)


def test_after_an_interruption_the_graph_can_be_used():
    params, hyper = inputs()
    stops = [True]

    def stop(phase: str, done: int, total: int | None) -> None:
        if phase == "backward" and done == 3 and stops.pop():
            raise KeyboardInterrupt

    stops = [False, True]
    traj = innerloop.unroll(
        plain(),
        params,
        None,
        hyper=hyper,
        steps=7,
        strategy=Checkpointed(slots=3, save="gradients"),
        progress=stop,
    )
    with pytest.raises(KeyboardInterrupt):
        torch.autograd.grad(of_end(traj), [hyper], retain_graph=True)
    again = torch.autograd.grad(of_end(traj), [*params.values(), hyper])
    assert_equal(again, plain_gradients(StoreAll(), steps=7))


def test_a_bar_needs_tqdm(monkeypatch: pytest.MonkeyPatch):
    imported = importlib.import_module

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "tqdm":
            raise ModuleNotFoundError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(
        innerloop.MissingExtraError, match=r"tqdm.*pip install 'innerloop\[progress\]'"
    ):
        innerloop.unroll(plain(), begin(), None, steps=2, strategy=Checkpointed(), progress=True)


def test_a_bar_for_each_phase(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    params, hyper = inputs()
    traj = innerloop.unroll(
        plain(), params, None, hyper=hyper, steps=4, strategy=Checkpointed(slots=2), progress=True
    )
    assert "forward: 100%" in capsys.readouterr().err
    of_end(traj).backward()
    assert "backward: 100%" in capsys.readouterr().err


def test_no_bar_where_standard_error_is_no_terminal(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("tqdm")
    params, hyper = inputs()
    traj = innerloop.unroll(
        plain(), params, None, hyper=hyper, steps=4, strategy=Checkpointed(slots=2), progress=True
    )
    of_end(traj).backward()
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("types_unchecked")
def test_progress_is_a_function_or_a_bool():
    with pytest.raises(INVALID, match="progress=3"):
        innerloop.unroll(plain(), begin(), None, steps=2, strategy=Checkpointed(), progress=3)  # type: ignore[arg-type]


# -- arguments -------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no slots": ({"slots": 0}, r"slots=0.*1 or more.*\"all\""),
    "negative slots": ({"slots": -1}, "slots=-1"),
    "slots is a float": ({"slots": 2.0}, r"slots=2\.0"),
    "slots is a bool": ({"slots": True}, "slots=True"),
    "slots is a word": ({"slots": "some"}, "slots='some'"),
    "slots and memory": ({"slots": 2, "memory": "1GB"}, "write one"),
    "product": ({"product": "forward"}, "product='forward'.*'reverse', 'mixed', 'finite'"),
    "save": ({"save": "all"}, "save='all'.*'params', 'gradients'"),
    "offload": ({"offload": "gpu"}, "offload='gpu'.*'cpu', 'disk'"),
    "finite_step of another product": ({"finite_step": 1e-3}, 'product="finite"'),
    "memory is a word": ({"memory": "much"}, "memory='much'.*4GB"),
    "memory without a number": ({"memory": "GB"}, "memory='GB'"),
    "memory of another unit": ({"memory": "4 apples"}, "memory='4 apples'"),
    "memory with two points": ({"memory": "1.2.3GB"}, "memory="),
    "no memory": ({"memory": 0}, "memory=0"),
    "zero GB": ({"memory": "0GB"}, "memory="),
    "negative memory": ({"memory": -5}, "memory=-5"),
    "memory is a fraction of a byte": ({"memory": 0.5}, "memory="),
    "finite_step zero": ({"product": "finite", "finite_step": 0.0}, "finite_step="),
    "finite_step negative": ({"product": "finite", "finite_step": -1e-3}, "finite_step="),
}


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("case", list(WRONG))
def test_arguments_that_make_no_sense(case: str):
    arguments, words = WRONG[case]
    with pytest.raises(INVALID, match="(?s)" + words):
        Checkpointed(**arguments)


def test_a_strategy_says_what_it_is():
    assert repr(Checkpointed()) == "Checkpointed()"
    assert repr(Checkpointed(slots=3, product="mixed")) == "Checkpointed(slots=3, product='mixed')"
    assert Checkpointed(slots=3) == Checkpointed(slots=3)
    assert len({Checkpointed(slots=3), Checkpointed(slots=3), Checkpointed()}) == 2


def test_dual_numbers_are_refused():
    with torch.autograd.forward_ad.dual_level():
        w = torch.autograd.forward_ad.make_dual(begin()["w"], torch.ones(3))
        with pytest.raises(NOT_DIFFERENTIABLE, match=r"torch\.func\.jvp"):
            innerloop.unroll(
                plain(),
                {**begin(), "w": w},
                None,
                steps=2,
                hyper=torch.tensor(0.4),
                strategy=Checkpointed(),
            )


@pytest.mark.parametrize("kind", ["aux", "buffers"])
@pytest.mark.parametrize("product", ["reverse", "mixed"])
def test_what_has_no_derivative_is_an_error_and_not_zero(kind: str, product: str):
    """Detached aux, running statistics: as StoreAll says."""
    model = Noisy()
    problem = innerloop.Problem.from_module(
        model,
        lambda m, h, t: (noisy_loss(m, h, t)[0], m.head.weight.detach().sum()),
        RULES["sgd"](),
        optimizer_hyper=rate,
    )

    def outer(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
        return traj.aux.sum() if kind == "aux" else traj.at(-1).buffers["norm.running_mean"].sum()

    for strategy in (StoreAll(), Checkpointed(slots=2, product=product)):
        with pytest.raises(NOT_DIFFERENTIABLE, match="does not depend"):
            innerloop.metagradient(
                outer,
                problem,
                dict(model.named_parameters()),
                [0, 1, 2],
                hyper=leaves(),
                wrt="params",
                strategy=strategy,
            )


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated"
)  # raised inside of torch's compiler
@pytest.mark.compiled
@pytest.mark.parametrize("how", ["metagradient", "torch.compile"])
def test_compiled_code_around_it_is_refused(how: str):
    """By name where the compilation is ours; what the user compiles raises torch's own error, which
    quotes ours."""
    params, hyper = inputs()
    ours = how == "metagradient"

    def gradient() -> Any:
        return innerloop.metagradient(
            lambda traj, hyper: of_end(traj),
            plain(),
            params,
            None,
            hyper=hyper,
            steps=2,
            strategy=Checkpointed(slots=2),
            compile=ours,
        )

    run = gradient if ours else torch.compile(gradient, fullgraph=True)
    message = "cannot be compiled as a whole" if ours else "cannot stand inside of compiled code"
    with pytest.raises(innerloop.InvalidInputError if ours else RuntimeError, match=message):
        run()


@pytest.mark.parametrize("slots", ["all", 1])
def test_an_optimizer_hyper_that_changes_is_noticed(slots: Any):
    calls = [0]

    def changing(hyper: Any, t: int) -> dict[str, float]:
        calls[0] += 1
        return {"lr": 0.5 / calls[0]}

    traj = innerloop.unroll(
        quadratic_problem(optimizer_hyper=changing),
        one_weight(),
        None,
        steps=3,
        strategy=Checkpointed(slots=slots),
    )
    with pytest.raises(innerloop.InvalidInputError, match="optimizer_hyper"):
        traj.params["w"].backward()


def test_a_hyper_parameter_written_in_place_by_data_is_noticed():
    hyper = {"lr": torch.tensor(0.5, requires_grad=True)}
    traj = innerloop.unroll(
        quadratic_problem(optimizer_hyper=lambda h, t: h),
        one_weight(),
        None,
        steps=3,
        hyper=hyper,
        strategy=Checkpointed(),
    )
    hyper["lr"].data.mul_(2)
    with pytest.raises(innerloop.InvalidInputError):
        traj.params["w"].backward()


def _gradient_penalty(w: Tensor, x: Tensor) -> Tensor:
    """The squared slope of tanh(x w) by x, whose leaf is made inside the loss."""
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad((leaf * w).tanh().sum(), leaf, create_graph=True)
    return slope.square().mean()


def _by_hand(w: Tensor, x: Tensor) -> Tensor:
    return (w * (1 - (x * w).tanh().square())).square().mean()


def _inner_descent(w: Tensor, x: Tensor) -> Tensor:
    """The distance to one descent step of a loop inside the loss, from a constant start."""
    start = torch.zeros_like(x).requires_grad_()
    (slope,) = torch.autograd.grad((start - w * x).square().sum() / 2, start, create_graph=True)
    return (start - 0.5 * slope - 1).square().mean()


def _inner_descent_by_hand(w: Tensor, x: Tensor) -> Tensor:
    return (0.5 * w * x - 1).square().mean()


LEAVES = {
    "gradient penalty": (_gradient_penalty, _by_hand),
    "inner loop": (_inner_descent, _inner_descent_by_hand),
}
WITHOUT_TRANSFORMS: list[Strategy] = [
    StoreAll(),
    Checkpointed(slots=1),
    Checkpointed(save="gradients"),
    innerloop.Truncated(4),
    innerloop.Truncated(2),
    innerloop.Auto("1GB"),
    innerloop.FirstOrder(),
]


@pytest.mark.covering
@pytest.mark.parametrize("strategy", WITHOUT_TRANSFORMS, ids=repr)
@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_leaf_made_inside_the_loss_is_not_a_captured_tensor(
    strategy: Strategy, kind: str, rule: str
):
    """Truth: the same loss in closed form, under the same strategy."""
    x = torch.linspace(0.2, 1.4, 5, dtype=torch.float64)

    def gradients(loss: Any) -> list[Tensor]:
        start = {"w": torch.linspace(0.5, 1.5, 5, dtype=torch.float64)}
        problem = innerloop.Problem(
            lambda p, h, b: (1 if h is None else h) * loss(p["w"], x),
            getattr(innerloop.optim, rule)(lr=0.1),
        )
        first = isinstance(strategy, innerloop.FirstOrder)
        return list(
            tree.tensors(
                innerloop.metagradient(
                    lambda traj, h: (traj.params["w"] * x).sum().square(),
                    problem,
                    start,
                    None,
                    steps=4,
                    hyper=None if first else torch.tensor(0.7, dtype=torch.float64),
                    wrt="params" if first else "hyper",
                    strategy=strategy,
                )[1]
            )
        )

    inside, by_hand = LEAVES[kind]
    torch.testing.assert_close(gradients(inside), gradients(by_hand), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("strategy", "instead"),
    [
        (Checkpointed(product="mixed"), "product="),
        (Checkpointed(product="finite"), "product="),
        (innerloop.ForwardMode(), "strategy="),
    ],
    ids=repr,
)
def test_a_leaf_inside_the_loss_where_torch_func_runs_is_refused_by_name(
    strategy: Strategy, instead: str
):
    x = torch.linspace(0.2, 1.4, 5)
    problem = innerloop.Problem(
        lambda p, h, b: h * _gradient_penalty(p["w"], x), innerloop.optim.sgd(lr=0.1)
    )
    with pytest.raises(innerloop.NotDifferentiableError, match=instead):
        innerloop.metagradient(
            lambda traj, h: traj.params["w"].sum(),
            problem,
            {"w": torch.ones(5)},
            None,
            steps=2,
            hyper=torch.tensor(0.7),
            wrt="hyper",
            strategy=strategy,
        )


# -- noise that the loss does not show -------------------------------------------------------------


class _Counter(nn.Module):
    """A weight, and a buffer that keeps a number of a generator that is not rewound."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        self.register_buffer("noise", torch.zeros(()))


HIDDEN = ["aux", "buffer", "gradient", "offset"]
REPLAYS = [
    Checkpointed(slots=1),
    Checkpointed(slots="all"),
    Checkpointed(slots=1, product="mixed"),
    Checkpointed(slots=2, offload="disk"),
    Checkpointed(slots=2, save="gradients"),
    Checkpointed(slots=2, save="gradients", product="mixed"),
    Checkpointed(slots=2, save="gradients", product="finite"),
    Checkpointed(slots=2, product="finite"),
]


def _noisy(hidden: str, source: str) -> Any:
    """Make a loss whose noise enters in one ``hidden`` place."""
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        return (
            torch.from_numpy(random.random(4))
            if source == "numpy"
            else torch.rand(4, generator=generator)
        )

    def loss(module: Any, hyper: Any, batch: Any) -> Any:
        w, mask = module.w, (drawn() > 0.5).to(module.w)
        if hidden == "aux":
            return w.square().sum() / 2, (w * drawn()).sum()
        if hidden == "buffer":
            module.noise = module.noise + drawn().sum()
            return w.square().sum() / 2
        if hidden == "offset":
            return (w.square() * drawn()).sum() * 1e-3 + 1e12
        return (mask * w.square() + (1 - mask) * w.square().detach()).sum() / 2

    return loss


@pytest.mark.covering(2)
@pytest.mark.parametrize("strategy", REPLAYS, ids=repr)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("source", ["numpy", "generator"])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("steps", [1, 3])
def test_noise_that_the_loss_does_not_show_is_refused(
    hidden: str, source: str, rule: str, strategy: Strategy, steps: int
):
    loss = _noisy(hidden, source)
    problem = innerloop.Problem.from_module(
        _Counter(),
        loss,
        getattr(innerloop.optim, rule)(lr=0.1, **({"eps": 1e-2} if rule == "adam" else {})),
    )
    traj = innerloop.unroll(problem, None, None, steps=steps, strategy=strategy)
    total = traj.params["w"].sum() + (traj.aux.sum() if hidden == "aux" else 0)
    with pytest.raises(innerloop.InvalidInputError, match="not what it was in the forward pass"):
        total.backward()


REPLAYING: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(f)(torch.tensor(1.0)),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f))(torch.tensor([1.0, 2.0])),
    "hessian": lambda f: torch.func.jacrev(torch.func.jacrev(f))(torch.tensor(1.0)),
    "jvp": lambda f: torch.func.jvp(f, (torch.tensor(1.0),), (torch.tensor(1.0),)),
}


def _under(transform: str, loss: Any, strategy: Strategy) -> Any:
    def outer(factor: Tensor) -> Tensor:
        def scaled(module: Any, hyper: Any, batch: Any) -> Any:
            found = loss(module, hyper, batch)
            return (hyper * found[0], found[1]) if isinstance(found, tuple) else hyper * found

        problem = innerloop.Problem.from_module(_Counter(), scaled, innerloop.optim.sgd(lr=0.1))
        traj = innerloop.unroll(problem, None, None, steps=3, hyper=factor, strategy=strategy)
        return traj.params["w"].sum() + (0 if traj.aux is None else traj.aux.sum())

    return REPLAYING[transform](outer)


@pytest.mark.covering(2)
@pytest.mark.parametrize("product", ["reverse", "mixed"])
@pytest.mark.parametrize("save", ["params", "gradients"])
@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "hessian"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_noise_is_refused_under_transforms_too(
    hidden: str, transform: str, save: str, product: str
):
    """Only the losses were compared."""
    strategy = Checkpointed(slots=2, save=save, product=product)
    with pytest.raises(innerloop.InvalidInputError, match="not what it was in the forward pass"):
        _under(transform, _noisy(hidden, "numpy"), strategy)


@pytest.mark.parametrize("hidden", ["aux", "buffer"])
def test_noise_besides_the_loss_is_refused_in_forward_mode(hidden: str):
    with pytest.raises(innerloop.InvalidInputError, match="not what it was in the forward pass"):
        _under("jvp", _noisy(hidden, "numpy"), Checkpointed(slots=2))


@pytest.mark.parametrize("product", ["reverse", "mixed"])
@pytest.mark.parametrize("save", ["params", "gradients"])
@pytest.mark.parametrize("dim", [0, 1])
def test_populations_without_noise_pass(product: str, save: str, dim: int):
    """With as many tasks as entries, so that a mistaken dimension would not show in a shape."""

    def loss(module: Any, hyper: Any, batch: Any) -> Any:
        module.noise = module.noise + (module.w * hyper).sum()
        return (module.w.square() * hyper).sum() / 2, module.w * hyper

    def outer(hyper: Tensor, strategy: Strategy) -> Tensor:
        problem = innerloop.Problem.from_module(_Counter(), loss, innerloop.optim.adam(lr=0.1))
        traj = innerloop.unroll(problem, None, None, steps=4, hyper=hyper, strategy=strategy)
        return traj.params["w"].sum() + traj.aux.sum() + traj.at(-1).buffers["noise"]

    tasks = torch.linspace(0.3, 2.0, 16).reshape(4, 4)
    found, expected = (
        torch.func.vmap(
            torch.func.grad(lambda h, strategy=strategy: outer(h, strategy)), in_dims=dim
        )(tasks)
        for strategy in (Checkpointed(slots=2, save=save, product=product), innerloop.StoreAll())
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.compiled
@pytest.mark.parametrize("source", ["numpy", "generator"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_noise_cannot_be_compiled(hidden: str, source: str):
    problem = innerloop.Problem.from_module(
        _Counter(), _noisy(hidden, source), innerloop.optim.sgd(lr=0.1)
    )
    with pytest.raises(innerloop.InnerLoopError, match=r"cannot be compiled|compile=False"):
        innerloop.unroll(problem, None, None, steps=2, strategy=Checkpointed(compile=True))


# -- data that are filled again --------------------------------------------------------------------


def _refilled(data: np.ndarray) -> Iterator[Any]:
    buffer = np.empty_like(data[0])
    for array in data:
        buffer[:] = array
        yield torch.from_numpy(buffer)


def _refilled_pairs(data: np.ndarray) -> Iterator[Any]:
    for x in _refilled(data):
        yield {"x": x, "again": [x.numpy()]}


class _Collate:
    """A ``collate_fn`` that stacks into one array."""

    def __init__(self, like: np.ndarray) -> None:
        self.buffer = np.empty_like(like)

    def __call__(self, rows: list[np.ndarray]) -> Tensor:
        np.stack(rows, out=self.buffer)
        return torch.from_numpy(self.buffer)


def _loader(data: np.ndarray) -> Any:
    rows = list(data.reshape(-1, data.shape[-1]))
    return torch.utils.data.DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=data.shape[1],
        collate_fn=_Collate(data[0]),
    )


def _function(data: np.ndarray) -> Any:
    buffer = np.empty_like(data[0])

    def batches(params: Any, hyper: Any, t: int) -> Tensor:
        buffer[:] = data[t]
        return torch.from_numpy(buffer)

    return batches


SOURCES: dict[str, Callable[[np.ndarray], Any]] = {
    "generator": _refilled,
    "generator of dicts": _refilled_pairs,
    "collate_fn": _loader,
    "function": _function,
}


@pytest.mark.covering
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "strategy",
    [StoreAll(), Checkpointed(slots=1), innerloop.Truncated(4), Checkpointed(product="mixed")],
    ids=repr,
)
def test_data_whose_memory_is_filled_again_are_copied(strategy: Strategy, source: str):
    """Truth: the same loop over a list of copies."""
    data = np.random.default_rng(0).normal(size=(4, 5, 3))

    def loss(p: Any, h: Any, batch: Any) -> Tensor:
        x = torch.as_tensor(batch["again"][0]) if isinstance(batch, dict) else batch
        return ((x @ p["w"]).sin() - 0.3).square().mean()

    def gradient(batches: Any, steps: int | None = None) -> Tensor:
        problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.3))
        w = torch.ones(3, requires_grad=True)
        traj = innerloop.unroll(problem, {"w": w}, batches, steps=steps, strategy=strategy)
        return torch.autograd.grad(traj.params["w"].sum(), w)[0]

    found = gradient(SOURCES[source](data), 4)
    torch.testing.assert_close(found, gradient(list(torch.from_numpy(data))), rtol=1e-12, atol=0)


def test_one_array_for_all_steps_is_copied_once():
    array, seen = torch.from_numpy(np.ones(3)), []

    def loss(p: Any, h: Any, batch: Tensor) -> Tensor:
        seen.append(batch.data_ptr())
        return (p["w"] * batch).square().sum()

    problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))
    innerloop.unroll(problem, {"w": torch.ones(3)}, iter([array] * 4))
    assert len(set(seen)) == 1


def test_a_tensor_that_an_iterator_fills_again_is_named():
    def batches() -> Iterator[Tensor]:
        buffer = torch.empty(3)
        for t in range(3):
            yield buffer.fill_(float(t + 1))

    problem = innerloop.Problem(
        lambda p, h, b: (p["w"] * b).sin().sum(), innerloop.optim.sgd(lr=0.1)
    )
    with pytest.raises(innerloop.InnerLoopError, match=r"batch.clone\(\)"):
        innerloop.metagradient(
            lambda traj, h: traj.params["w"].sum(),
            problem,
            {"w": torch.ones(3)},
            batches(),
            wrt="params",
        )


# -- states that are lost on the disk --------------------------------------------------------------


def _overwritten(folder: Path) -> None:
    for file in folder.rglob("*.pt"):
        file.write_bytes(b"\0" * 64 + file.read_bytes()[64:])


def _cut_short(folder: Path) -> None:
    for file in folder.rglob("*.pt"):
        file.write_bytes(file.read_bytes()[:100])


def _emptied(folder: Path) -> None:
    for file in folder.rglob("*.pt"):
        file.write_bytes(b"")


def _removed(folder: Path) -> None:
    for file in folder.rglob("*.pt"):
        file.unlink()


@pytest.mark.parametrize("save", ["params", "gradients"])
@pytest.mark.parametrize("damage", [_overwritten, _cut_short, _emptied, _removed])
def test_a_state_that_is_lost_on_the_disk_is_named(
    damage: Any, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    params, hyper = inputs()
    strategy = Checkpointed(slots=3, offload="disk", save=save)
    traj = innerloop.unroll(plain("adam"), params, None, hyper=hyper, steps=6, strategy=strategy)
    damage(tmp_path)
    with pytest.raises(innerloop.InnerLoopError, match=r"the file .*\.pt.* the disk .*offload"):
        of_end(traj).backward()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left"),
        pickle.PicklingError("No space left"),
        ValueError("No space left"),
    ],
    ids=repr,
)
def test_a_state_that_cannot_be_written_is_named(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch, "save", full)
    params, hyper = inputs()
    strategy = Checkpointed(slots=3, offload="disk")
    with pytest.raises(innerloop.InnerLoopError, match=r"No space left.*offload=None"):
        innerloop.unroll(plain(), params, None, hyper=hyper, steps=6, strategy=strategy)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork on this system")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_neither_waits_nor_removes_the_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = Snapshots("disk")
    for t in range(2):
        kept[t] = {"w": torch.full((3,), float(t))}

    def in_child() -> str:
        def says(run: Callable[[], object]) -> str:
            try:
                run()
            except innerloop.InnerLoopError as error:
                return str(error)
            return "nothing"

        found = says(lambda: kept[1]) + says(lambda: kept.__setitem__(2, {"w": torch.ones(3)}))
        del kept[0]
        every: Any = weakref.finalize
        for finalizer in list(every._registry):  # as where the interpreter ends
            if finalizer.peek() is not None and finalizer.peek()[0] is kept:
                finalizer()
        return found

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            os.write(writing, in_child().encode())
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0
    said = os.read(reading, 10_000).decode()
    assert said.count("which was forked from it") == 2
    assert kept[0]["w"].tolist() == [0.0] * 3
    assert kept[1]["w"].tolist() == [1.0] * 3


# -- gradients with a graph, sparse gradients ------------------------------------------------------


def test_kept_gradients_of_a_step_that_captures_a_tensor():
    # The gradients require grad, and small ones are copied side by side.
    outside = torch.ones(3, requires_grad=True)
    problem = innerloop.Problem(
        lambda p, h, b: ((p["a"] * outside).sum() + p["b"].sum()) ** 2,
        innerloop.optim.chain(innerloop.optim.clip_by_global_norm(1.0), innerloop.optim.sgd()),
    )
    with pytest.raises(innerloop.CapturedTensorError):
        innerloop.metagradient(
            lambda traj, h: traj.params["a"].sum(),
            problem,
            {"a": torch.ones(3), "b": torch.ones(2)},
            None,
            steps=3,
            strategy=Checkpointed(slots=2, save="gradients"),
            wrt="params",
        )


@pytest.mark.parametrize(
    "strategy",
    [
        Checkpointed(slots=2),
        Checkpointed(slots=2, save="gradients"),
        Checkpointed(slots=2, product="finite"),
        innerloop.Auto("1GB"),
        innerloop.Truncated(last=4),
    ],
    ids=repr,
)
def test_sparse_gradients_as_stored(strategy: Any):
    rows = torch.tensor([[0, 1], [2, 1], [3, 0], [1, 1]])
    problem = innerloop.Problem(
        lambda p, h, b: (torch.nn.functional.embedding(b, p["e"], sparse=True) * h).sin().sum(),
        innerloop.optim.sparse_adam(lr=0.1, eps=0.1),
    )
    found = [
        innerloop.metagradient(
            lambda traj, h: traj.params["e"].sin().sum(),
            problem,
            {"e": torch.linspace(0.1, 1.0, 10).reshape(5, 2)},
            rows,
            hyper=torch.tensor(0.7),
            strategy=s,
            wrt="hyper",
        )[1]
        for s in (StoreAll(), strategy)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)
