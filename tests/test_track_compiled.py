"""``track(strategy=Checkpointed(compile=True))``: the gradients of plain `track`, from steps that
are compiled once, or a named error."""

# ruff: noqa: B023 (closures that bind late are what is tested here)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import innerloop
from innerloop import Checkpointed, InvalidInputError
from innerloop._track.compiled import _compiled
from innerloop._utils import compiling, torch_private
from innerloop.strategy import Strategy
from tests.backends import generates_code, trace_only
from tests.networks import adam, leaf, network, sgd
from tests.oracles import smooth_noise
from tests.situations import SEED, SITUATIONS, Situation
from tests.test_track_replayed import (
    assert_same,
    by_generator,
    by_iterator,
    by_numpy,
    by_object,
    episode,
    overwritten_without_a_trace,
)

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

COMPILED = Checkpointed(slots=2, compile=True)
INDUCTOR = {"test_a_fresh_lambda_at_each_step_is_compiled_once"}
"""Tests that are run with inductor by `make compiled`."""


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace without generating code; `make compiled` generates it for some."""
    chosen = generates_code(request.config)
    if not chosen or request.node.originalname not in INDUCTOR:
        trace_only(monkeypatch)


def compilations() -> list[tuple[int, int]]:
    """How often each closure's step and pullback were compiled."""
    return [
        (c.core._advance.compiled.compilations, c.core._pull.compiled.compilations)
        for c in _compiled.values()
    ]


def batch(t: int) -> tuple[Tensor, Tensor]:
    return smooth_noise(6, 3, phase=float(t)), smooth_noise(6, 2, phase=9.0 + t)


def learned(strategy: Strategy | None, make: Callable[..., Any], steps: int = 5) -> dict[str, Any]:
    """Gradients by the start, a learned rate, a captured leaf and a captured non-leaf."""
    model, lr, w = network(), leaf(0.1), leaf(0.7)
    scale = w.sin() * 2
    with innerloop.track(model, make(model), hyper={"lr": lr}, strategy=strategy) as loop:
        for t in range(steps):
            x, y = batch(t)
            loop.step(
                lambda: (
                    F.mse_loss(loop.model(x)[:, :1], y[:, :1]) * scale
                    + w * loop.model.body.weight.square().sum()
                )
            )
        outer = loop.model(batch(9)[0]).sin().sum() + loop.trajectory.losses.sum()
    outer.backward()
    return {"outer": outer, "lr": lr.grad, "w": w.grad} | {
        n: p.grad for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("make", [sgd, pytest.param(adam, marks=pytest.mark.slow)])
def test_a_fresh_lambda_at_each_step_is_compiled_once(make: Callable[..., Any]):
    plain = learned(None, make)
    assert_same(learned(COMPILED, make), plain, 1e-10)
    once = compilations()
    # Another loop, with other modules and another optimizer, and more steps.
    assert_same(learned(Checkpointed(slots="all", compile=True), make), plain, 1e-10)
    assert_same(learned(COMPILED, make, 8), learned(None, make, 8), 1e-10)
    assert len(once) == 1
    assert compilations() == once


ONE_PATH = (1, 1, 1)
"""Batches of an episode: all the same, so that one path is compiled."""
FEW = ("batch-norm-then-evaluated",)
"""Situations that the test command runs."""
REFUSED = {
    "lstm": "RNN, GRU, or LSTM",
    "gru": "RNN, GRU, or LSTM",
    "attention": "cannot be compiled",
    "weight-norm-legacy": "cannot be compiled",
}


@pytest.mark.traced
@pytest.mark.parametrize(
    "situation",
    [
        pytest.param(s, id=s.name, marks=[] if s.name in FEW else [pytest.mark.slow])
        for s in SITUATIONS
    ],
)
@pytest.mark.parametrize("learn", ["init", pytest.param("outer", marks=pytest.mark.slow)])
def test_every_situation_has_the_gradients_of_plain_track(situation: Situation, learn: Any):
    if situation.name in REFUSED:
        with pytest.raises(innerloop.InnerLoopError, match=REFUSED[situation.name]):
            episode(situation, COMPILED, learn, ONE_PATH)
        return
    found = episode(situation, COMPILED, learn, ONE_PATH)
    assert_same(found, episode(situation, None, learn, ONE_PATH), 1e-9)


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """A helper of the module, which has globals of its own."""
    return F.softplus(x) * by


class Task:
    def loss(self, model: Any, parts: list[Tensor], *, power: float = 2.0) -> Tensor:
        return (scaled(model(parts[0])[:, 0], parts[1]) - 0.1).abs().pow(power).mean()


@pytest.mark.slow
def test_functions_of_all_kinds_and_containers_of_captured_tensors():
    def run(strategy: Strategy | None) -> dict[str, Any]:
        model, w = network(), leaf(0.4)
        parts = {"scale": (w.exp(), w)}

        def helper(x: Tensor, times: Tensor = parts["scale"][0]) -> Tensor:
            return parts["scale"][1] * times * loop.model(x).square().mean()

        def whole(x: Tensor) -> Tensor:
            return helper(x) + sum((helper(x, times=p) for p in parts["scale"]), torch.zeros(()))

        with innerloop.track(model, sgd(model), strategy=strategy) as loop:
            for t in range(2):
                x, _ = batch(t)
                loop.step(lambda: whole(x))
                loop.step(Task().loss, args=(loop.model, [x, w.sin()]))
            outer = loop.model(batch(9)[0]).sin().sum()
        outer.backward()
        return {"w": w.grad} | {n: p.grad for n, p in model.named_parameters()}

    assert_same(run(COMPILED), run(None), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("first_order", [False, True])
def test_edits_cuts_and_constant_gradients(first_order: bool):
    def run(strategy: Strategy | None) -> dict[str, Any]:
        model, w = network(), leaf(1.2)
        with innerloop.track(
            model, adam(model), first_order=first_order, strategy=strategy
        ) as loop:
            for t in range(6):
                x, _ = batch(t)
                if t == 2:
                    loop.detach()
                if t == 4:
                    loop.assign({"head.bias": w * loop.model.head.bias})
                loop.step(lambda: w * loop.model(x).square().mean())
            outer = loop.model(batch(9)[0]).sin().sum()
        outer.backward()
        return {"w": w.grad} | {n: p.grad for n, p in model.named_parameters()}

    assert_same(run(COMPILED), run(None), 1e-10)


def gradients_of(run: Callable[[Any, Any], None], strategy: Strategy | None) -> dict[str, Any]:
    """Gradients by the start of what ``run(loop, outer)`` adds to the list ``outer``."""
    model = network()
    outer: list[Tensor] = []
    with innerloop.track(model, adam(model), strategy=strategy) as loop:
        run(loop, outer)
    torch.stack(outer).sum().backward()
    return {n: p.grad for n, p in model.named_parameters()}


def a_step(loop: Any, t: int) -> None:
    x, y = batch(t)
    loop.step(lambda: F.mse_loss(loop.model(x), y[:, :1]))


def test_steps_that_run_again_take_the_path_that_they_took(monkeypatch: pytest.MonkeyPatch):
    """PyTorch is asked for the first steps and pullbacks of a kind alone."""
    asked: list[str] = []
    call = compiling.Compiled.__call__

    def counting(self: Any, *arguments: Any, **keywords: Any) -> Any:
        asked.append(self._what)
        return call(self, *arguments, **keywords)

    monkeypatch.setattr(compiling.Compiled, "__call__", counting)

    def run(loop: Any, outer: list[Tensor]) -> None:
        for t in range(12):
            a_step(loop, t)
        outer.append(loop.model(batch(20)[0]).sin().sum())

    plain = gradients_of(run, None)
    assert_same(gradients_of(run, COMPILED), plain, 1e-9)
    assert asked.count("the step") == 12
    assert asked.count("the pullback of a step") == 2  # of the first step, and of any other


def test_cotangents_of_all_kinds():
    """Broadcast, negated by a flag, and one tensor in two places: compiled code knows of none."""

    def run(loop: Any, outer: list[Tensor]) -> None:
        for t in range(6):
            a_step(loop, t)
            weight = loop.model.body.weight
            outer.append(t * weight.sum())
            if t % 2:
                outer.append(torch.complex(weight, weight.sin()).conj().imag.sum())
        outer.append(loop.model(batch(20)[0]).sin().sum())

    assert_same(gradients_of(run, COMPILED), gradients_of(run, None), 1e-9)

    def given(strategy: Strategy | None) -> list[Tensor]:
        model = network()
        with innerloop.track(model, sgd(model), strategy=strategy) as loop:
            for t in range(3):
                a_step(loop, t)
            ends = [loop.model.body.weight, loop.model.body.weight * 1.0]
            same = torch.ones_like(ends[0])
            return list(torch.autograd.grad(ends, list(model.parameters()), [same, same]))

    def by_place(rows: list[Tensor]) -> dict[str, Any]:
        return {str(i): x for i, x in enumerate(rows)}

    found, expected = given(COMPILED), given(None)
    assert_same(by_place(found), by_place(expected), 1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::innerloop.errors.RecompilationWarning")
def test_what_differs_from_step_to_step():
    """The size of the batch, and a number."""

    def run(loop: Any, outer: list[Tensor]) -> None:
        for t in range(6):
            x, y = smooth_noise(4 + t % 3, 3, phase=float(t)), smooth_noise(4 + t % 3, 1)
            factor = 1.0 + 0.25 * t
            loop.step(lambda: factor * F.mse_loss(loop.model(x), y))
        outer.append(loop.model(batch(20)[0]).sin().sum())

    assert_same(gradients_of(run, COMPILED), gradients_of(run, None), 1e-9)


def test_states_that_lie_in_memory_in_another_way():
    """A kept state has no strides of its own, and an edit may have others."""

    def run(strategy: Strategy | None) -> dict[str, Any]:
        model = network()
        weight = model.body.weight
        model.body.weight = torch.nn.Parameter(weight.detach().t().contiguous().t())
        with innerloop.track(model, adam(model), strategy=strategy) as loop:
            for t in range(6):
                a_step(loop, t)
                if t == 3:
                    edited = loop.model.body.weight.mean(0, keepdim=True).expand_as(weight)
                    loop.assign({"body.weight": edited})
            outer = loop.model(batch(9)[0]).sin().sum()
        outer.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    assert not network().body.weight.detach().t().contiguous().t().is_contiguous()
    assert_same(run(COMPILED), run(None), 1e-9)


class Scaled:
    """A loss whose gradient has a factor that its value does not show."""

    factor = 1.0

    def loss(self, model: Any, x: Tensor) -> Tensor:
        found = model(x).square().mean()
        return found.detach() + self.scaled(found - found.detach())

    def scaled(self, x: Tensor) -> Tensor:
        return self.factor * x


def three_times(_: Scaled, x: Tensor) -> Tensor:
    return 3.0 * x


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("change", ["attribute", "method"])
def test_a_factor_of_the_gradient_that_is_another_in_the_backward_pass(
    steps: int, change: str, monkeypatch: pytest.MonkeyPatch
):
    model, scaled = network(), Scaled()
    with innerloop.track(model, sgd(model), strategy=COMPILED) as loop:
        for t in range(steps):
            loop.step(scaled.loss, args=(loop.model, batch(t)[0]))
        outer = loop.model(batch(9)[0]).sum()
    if change == "attribute":
        scaled.factor = 3.0
    else:
        monkeypatch.setattr(Scaled, "scaled", three_times)
    with pytest.raises(InvalidInputError, match="parameters are others"):
        outer.backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    "body", [by_object, by_iterator, by_numpy, by_generator, overwritten_without_a_trace]
)
def test_data_that_change_unseen_are_an_error(body: Callable[[Any], Any]):
    def run() -> None:
        model = network()
        with innerloop.track(model, sgd(model), strategy=Checkpointed(compile=True)) as loop:
            for _ in body(loop):
                pass
            loop.model(batch(9)[0]).sum().backward()

    with pytest.raises(innerloop.InnerLoopError):
        run()


def test_a_model_that_changes_is_not_run_by_the_code_of_another():
    """Hooks are not looked at by compiled code, nor all attributes of PyTorch's own modules."""

    def run(strategy: Strategy | None, hooked: bool, slope: float) -> dict[str, Any]:
        torch.manual_seed(SEED)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LeakyReLU(slope))
        if hooked:
            model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
        with innerloop.track(model, sgd(model), strategy=strategy) as loop:
            loop.step(lambda: F.mse_loss(loop.model(x), y))
            outer = loop.model(x).sum()
        outer.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    x, y = batch(0)
    for case in ((False, 0.1), (True, 0.6)):
        assert_same(run(COMPILED, *case), run(None, *case), 1e-10)


def test_what_is_refused():
    model = network()
    with innerloop.track(model, sgd(model), strategy=COMPILED) as loop:
        x, _ = batch(0)
        loop.step(lambda: loop.model(x).square().mean())
        loop.model.head.slope = 0.3
        with pytest.raises(InvalidInputError, match="attribute of a module"):
            loop.step(lambda: loop.model(x).square().mean())
    with (
        pytest.raises(InvalidInputError, match=r"optim\.chain"),
        innerloop.track(model, sgd(model), strategy=COMPILED) as loop,
    ):
        loop.step(lambda: loop.model(batch(0)[0]).mean(), grad_callback=lambda grads: grads)
    norm = torch.nn.BatchNorm1d(2)
    with (
        pytest.raises(InvalidInputError, match="buffers in train mode"),
        innerloop.track(model, sgd(model), strategy=COMPILED) as loop,
    ):
        loop.step(lambda: norm(loop.model(x)).mean())

    class Remembers(torch.nn.Linear):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__(3, 2)
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x) + self.mean
            self.mean = y.mean(0)
            return y

    other = Remembers()
    with innerloop.track(other, sgd(other), strategy=COMPILED) as loop:

        def steps() -> None:
            for _ in range(2):
                loop.step(lambda: loop.model(x).square().mean())

        with pytest.raises(InvalidInputError, match="buffer 'mean'"):
            steps()
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(InvalidInputError, match="cannot be compiled"):
        innerloop.track(model, lbfgs, strategy=COMPILED)


def changes_a_dict(model: Any) -> None:
    model.options["factor"] = 2.0


def writes_a_tensor(model: Any) -> None:
    model.offset.mul_(2)


def replaces_a_tensor(model: Any) -> None:
    model.offset = torch.ones(2)


def replaces_a_submodule(model: Any) -> None:
    model.last = torch.nn.Tanh()


@pytest.mark.parametrize(
    "change", [changes_a_dict, writes_a_tensor, replaces_a_tensor, replaces_a_submodule]
)
def test_what_a_module_holds_may_not_change_inside_a_compiled_loop(
    change: Callable[[Any], None],
) -> None:
    class Holds(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(3, 2), torch.nn.Sigmoid()
            self.options, self.offset = {"factor": 1.0}, torch.zeros(2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(self.first(x) * self.options["factor"] + self.offset)
            return found

    model, x = Holds(), torch.ones(4, 3)
    with innerloop.track(model, sgd(model), strategy=COMPILED) as loop:
        loop.step(lambda: loop.model(x).square().mean())
        with torch.no_grad():
            change(loop.model)
        with pytest.raises(InvalidInputError, match=r"was changed inside the loop"):
            loop.step(lambda: loop.model(x).square().mean())


@pytest.mark.parametrize("around", [Checkpointed(compile=True), None], ids=str)
def test_two_loops_are_open_at_once(around: Strategy | None) -> None:
    """The compiler does not trace the watch of the other loop, which looks at operations."""

    def run(outside: Strategy | None, inside: Strategy | None) -> dict[str, Any]:
        models, w = [network(), network()], leaf(0.7)
        with (
            innerloop.track(models[0], sgd(models[0]), strategy=outside) as first,
            innerloop.track(models[1], sgd(models[1]), strategy=inside) as second,
        ):
            for t in range(2):
                x, y = batch(t)
                for loop in (first, second) if t else (second, first):
                    loop.step(lambda: w * F.mse_loss(loop.model(x), y[:, :1]))
            outer = first.model(x).sum() + second.model(x).sin().sum()
        outer.backward()
        return {"w": w.grad} | {
            f"{i} {n}": p.grad for i, m in enumerate(models) for n, p in m.named_parameters()
        }

    assert_same(run(around, COMPILED), run(None, None), 1e-10)


def test_compiled_code_runs_inside_of_a_loop_that_is_watched() -> None:
    model, x = network(), batch(0)[0]
    problem = innerloop.Problem(
        lambda p, h, b: (b @ p["w"]).square().mean(), innerloop.optim.sgd(lr=0.1)
    )

    def gradient(compiles: bool) -> Any:
        return innerloop.metagradient(
            lambda traj, h: traj.params["w"].sum(),
            problem,
            {"w": torch.ones(3)},
            x[None],
            wrt="params",
            compile=compiles,
        )

    with innerloop.track(model, sgd(model)) as loop:
        loop.step(loop.model(x).square().mean())
        (watching,) = (m.watch for m in torch_private.function_modes())
        torch.testing.assert_close(gradient(True), gradient(False))
        assert watching is not None
        assert [m.watch for m in torch_private.function_modes()] == [watching]


def test_numbers_of_numpy_are_numbers_and_arrays_are_refused() -> None:
    def run(strategy: Strategy | None) -> dict[str, Any]:
        model = network()
        with innerloop.track(model, sgd(model), strategy=strategy) as loop:
            x, y = batch(0)
            for n in (np.float64(0.5), np.float64(1.5)):
                loop.step(lambda: n * F.mse_loss(loop.model(x), y[:, :1]))
            outer = loop.model(x).sum()
        outer.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    assert_same(run(COMPILED), run(None), 1e-10)
    model, array = network(), np.ones(2)
    with (
        pytest.raises(InvalidInputError, match=r"NumPy data.*torch\.as_tensor"),
        innerloop.track(model, sgd(model), strategy=COMPILED) as loop,
    ):
        loop.step(lambda: (torch.as_tensor(array) * loop.model(batch(0)[0])).sum())


def test_numpy_data_in_a_loss_are_named() -> None:
    array = np.ones(3)
    problem = innerloop.Problem(
        lambda p, h, b: (torch.as_tensor(array) * p["w"]).sum(), innerloop.optim.sgd(lr=0.1)
    )
    with pytest.raises(InvalidInputError, match="the loss reads 'array', NumPy data"):
        innerloop.unroll(
            problem,
            {"w": torch.ones(3)},
            None,
            steps=1,
            strategy=innerloop.StoreAll(compile=True),
        )


def test_a_function_that_refers_to_itself_is_refused() -> None:
    model = network()

    def counted() -> Tensor:
        counted.calls = 1  # type: ignore[attr-defined]
        found: Tensor = loop.model(batch(0)[0]).sum()
        return found

    with (
        pytest.raises(InvalidInputError, match=r"holds the function itself.*attribute of its own"),
        innerloop.track(model, sgd(model), strategy=COMPILED) as loop,
    ):
        loop.step(counted)


@pytest.mark.slow
def test_the_limit_of_compilations_is_named() -> None:
    model, x = network(), batch(0)[0]

    def steps(loop: Any) -> None:
        for i in range(12):
            word = "a" * i
            loop.step(lambda: loop.model(x).mean() * (1 + len(word)))

    with (
        pytest.warns(innerloop.RecompilationWarning),
        pytest.raises(innerloop.NotDifferentiableError, match=r"compiled 8 times.*as tensors"),
        innerloop.track(model, sgd(model), strategy=COMPILED) as loop,
    ):
        steps(loop)
