"""Compiled steps, of ``Checkpointed(compile=True)`` and ``StoreAll(compile=True)``, compiled loops
and compiled chunks of tasks are those of uncompiled code."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import Checkpointed, StoreAll
from innerloop._utils import compiling, torch_private
from innerloop.strategy import Strategy
from innerloop.strategy._engine.compiled_step import _check_step
from innerloop.strategy._engine.step_pullback import State
from tests.backends import generates_code, trace_only
from tests.oracles import smooth_noise
from tests.strategies import OUTER, SAVED, batches, hyper, problem, seen, start

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings(
        "ignore:.torch.jit.script_method. is deprecated"
    ),  # raised inside of torch's compiler
]


INDUCTOR = {
    "test_cpp_that_cannot_be_compiled_is_named",
    "test_compiled_steps_equal_a_plain_run",
    "test_the_mixed_product_compiled",
    "test_autocast_rounds_more_than_the_parameters",
}
"""Tests that are run with inductor by the test command too."""


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace without generating code, but for a few tests; `make compiled` generates it for all."""
    chosen = generates_code(request.config)
    if not chosen and (request.node.originalname not in INDUCTOR or "adam" in request.node.name):
        trace_only(monkeypatch)


def gradients(strategy: Strategy, learned: innerloop.Problem) -> Any:
    return innerloop.metagradient(
        lambda traj, hyper: OUTER["all"](seen(traj)),
        learned,
        start(),
        batches(),
        hyper=hyper(),
        strategy=strategy,
        save_at=[SAVED],
    )


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_compiled_steps_equal_a_plain_run(rule: str):
    learned = problem(rule)
    value, grads = gradients(StoreAll(), learned)
    for slots in (2, "all"):
        ours, found = gradients(Checkpointed(slots=slots, compile=True), learned)
        torch.testing.assert_close(ours, value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found["params"], grads["params"], rtol=1e-10, atol=1e-12)
        for name in ("log_lr", "decay", "data"):
            torch.testing.assert_close(
                found["hyper"][name], grads["hyper"][name], rtol=1e-10, atol=1e-12
            )


def test_an_outer_loss_that_is_zero_in_eager_code_may_be_rounding_in_compiled_code():
    torch.manual_seed(0)
    true = torch.randn(6, dtype=torch.float32)
    x = torch.randn(3, 4, 6, dtype=torch.float32)
    y = torch.stack([rows @ true for rows in x])
    fitted = innerloop.Problem(
        lambda params, hyper, batch: ((batch[0] @ params["w"] - batch[1] * hyper) ** 2).mean(),
        innerloop.optim.sgd(lr=0.1),
    )
    for compiled in (False, True):
        value, grads = innerloop.metagradient(
            lambda traj, hyper: ((x[0] @ traj.params["w"] - y[0]) ** 2).mean(),
            fitted,
            {"w": true.clone()},
            list(zip(x, y, strict=True)),
            hyper=torch.tensor(1.0, dtype=torch.float32),
            compile=compiled,
        )
        assert abs(value) < 1e-12
        assert abs(grads["hyper"]) < 1e-5


@pytest.mark.slow
def test_the_mixed_product_compiled():
    learned = innerloop.Problem(
        lambda p, hyper, x: ((x @ p["w"]).tanh() @ p["v"]).square().mean() * hyper["scale"],
        innerloop.optim.adam(eps=0.1),
        optimizer_hyper=lambda hyper, t: {"lr": hyper["lr"][t]},
    )
    params = {"w": smooth_noise(3, 4), "v": smooth_noise(4, phase=1.0)}
    values = {"scale": torch.tensor(0.7), "lr": torch.linspace(0.1, 0.2, 4)}
    data = smooth_noise(4, 6, 3, phase=2.0)
    found = [
        innerloop.metagradient(
            lambda traj, h: traj.params["w"].sin().sum() + traj.losses.sum(),
            learned,
            params,
            data,
            hyper=values,
            strategy=s,
        )[1]
        for s in (StoreAll(), Checkpointed(product="mixed", compile=True))
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_forward_mode_works_after_a_compilation_that_failed(monkeypatch: pytest.MonkeyPatch):
    """PyTorch's compiler cannot push a tangent through ``w.T`` (2.13)."""
    trace_only(monkeypatch)
    x = torch.ones(5, 3)
    transposed = innerloop.Problem(
        lambda p, h, b: (x @ p["w"].T).tanh().square().sum(), innerloop.optim.sgd(lr=0.1)
    )
    with contextlib.suppress(innerloop.NotDifferentiableError):
        innerloop.metagradient(
            lambda traj, h: traj.params["w"].sum(),
            transposed,
            {"w": torch.ones(4, 3)},
            None,
            steps=2,
            strategy=Checkpointed(product="mixed", compile=True),
            wrt="params",
        )
    assert torch.func.jvp(torch.square, (torch.ones(1),), (torch.ones(1),))[1] == 2


def test_one_compilation_serves_all_steps_and_all_loops():
    learned = problem("adam")
    gradients(Checkpointed(compile=True), learned)
    with torch.compiler.set_stance("fail_on_recompile"):
        gradients(Checkpointed(compile=True), learned)
        gradients(Checkpointed(compile=True, slots=1), learned)


def test_a_loss_that_cancels_exactly_is_rounding_in_compiled_code():
    """In one order of evaluation; nothing else is excused by that."""
    number = lambda x: torch.tensor(x, dtype=torch.float32)  # noqa: E731
    state: State = ({"w": number([1.0, 2.0])}, (number([0.0, 0.0]),), {})
    step: Any = types.SimpleNamespace(precision=0.0)
    for error, aux, refused in ((5e-7, 0.0, False), (1e-3, 0.0, True), (0.0, 5e-7, True)):
        expected = (state, number(0.0), {"n": number(0.0)})
        found = (state, number(error), {"n": number(aux)})
        with (
            pytest.raises(innerloop.MetaGradientError, match=r"in (loss|aux)")
            if refused
            else contextlib.nullcontext()
        ):
            _check_step(found, expected, step, (state, (None, None), None), None)


def scaled(factor: int) -> Callable[..., Tensor]:
    return lambda p, h, b: (p["x"] * factor).square().sum() / 2


@pytest.mark.slow
def test_many_problems_in_one_process():
    """More than the eight recompilations that torch.compile allows one function."""
    for i in range(10):
        learned = innerloop.Problem(scaled(i + 1), innerloop.optim.sgd(lr=0.01))
        _, grads = innerloop.metagradient(
            lambda traj, h: traj.params["x"].sum(),
            learned,
            {"x": torch.ones(2)},
            None,
            steps=2,
            wrt="params",
            strategy=Checkpointed(compile=True),
        )
        torch.testing.assert_close(
            grads["x"], torch.full((2,), (1 - 0.01 * (i + 1) ** 2) ** 2), rtol=1e-12, atol=0
        )


def of_module(layer: Any, drop: float, strategy: Strategy) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), layer(4), nn.Dropout(drop), nn.Linear(4, 1))
    learned = innerloop.Problem.from_module(
        model,
        lambda model, hyper, t: (
            (model(hyper["x"].index_select(0, t.reshape(1))[0]) - hyper["y"]).square().mean()
        ),
        innerloop.optim.adam(eps=0.1, lr=0.1),
    )
    values = {"x": smooth_noise(4, 6, 3), "y": torch.tensor(0.3)}
    value, grads = innerloop.metagradient(
        lambda traj, hyper: (sum(p.sin().sum() for p in traj.params.values()), traj.at(-1).buffers),
        learned,
        dict(model.named_parameters()),
        torch.arange(4),
        hyper=values,
        strategy=strategy,
    )
    return [value[0], *value[1].values(), *grads["params"].values(), *grads["hyper"].values()]


@pytest.mark.parametrize("layer", [nn.LayerNorm, nn.BatchNorm1d])
def test_a_module(layer: type[nn.Module]):
    """Right, or refused: torch 2.13 compiles the second derivative of batch norm wrongly on the CPU
    (off by a tenth)."""
    try:
        found = of_module(layer, 0.0, Checkpointed(compile=True))
    except innerloop.MetaGradientError:
        assert layer is nn.BatchNorm1d
        return
    for ours, theirs in zip(found, of_module(layer, 0.0, StoreAll()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_dropout_draws_the_numbers_of_eager_code():
    expected = of_module(nn.LayerNorm, 0.5, StoreAll())
    for strategy in (Checkpointed(slots=2, compile=True), StoreAll(compile=True)):
        for ours, theirs in zip(of_module(nn.LayerNorm, 0.5, strategy), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_captured_tensors_are_refused():
    w = torch.tensor(2.0, requires_grad=True)
    learned = innerloop.Problem(
        lambda p, h, b: (p["x"] * w).square().sum(), innerloop.optim.sgd(lr=0.1)
    )
    with pytest.raises(innerloop.CapturedTensorError):
        innerloop.unroll(
            learned, {"x": torch.ones(2)}, None, steps=2, strategy=Checkpointed(compile=True)
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def outside(x: Tensor) -> Tensor:
    return x


def test_what_cannot_be_compiled_is_said_to_be_so():
    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        return outside(params["x"].square().sum())

    learned = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(innerloop.NotDifferentiableError, match="compile=False"):
        innerloop.unroll(learned, {"x": x}, None, steps=2, strategy=Checkpointed(compile=True))
    with pytest.raises(innerloop.InnerLoopError, match="save"):
        Checkpointed(compile=True, save="gradients")


class _Clipped(torch.autograd.Function):
    """The identity, with a backward rule that compiled code drops under torch.func."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:
        return given.clamp(-1.0, 1.0)


def _clipped(x: Tensor) -> Tensor:
    return _Clipped.apply(x)


# Of torch's compiler, which makes an instance of the class.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("where", "whole"), [("loss", False), ("loss", True), ("update", True), ("outer", True)]
)
def test_a_backward_rule_of_the_users_is_refused(where: str, whole: bool):
    # The rule acts at the second step only: a comparison of numbers at the first sees nothing.
    def same(x: Tensor) -> Tensor:
        return x

    inner, update, outer = (
        _clipped if name == where else same for name in ("loss", "update", "outer")
    )
    learned = innerloop.Problem(
        lambda p, h, b: (b * inner(p["w"])).square().sum() / 2,
        innerloop.optim.sgd(lr=0.1),
        optimizer_hyper=lambda h, t: {"lr": update(h)},
    )
    with pytest.raises(innerloop.errors.NotDifferentiableError, match=r"_Clipped.*compile=False"):
        innerloop.metagradient(
            lambda traj, h: outer(traj.params["w"]).square().sum(),
            learned,
            {"w": torch.tensor([0.5, 0.8])},
            [torch.tensor([1.0, 1.0]), torch.tensor([3.0, 1.0])],
            hyper=torch.tensor(0.1),
            strategy=StoreAll() if whole else Checkpointed(slots="all", compile=True),
            compile=whole,
        )


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "adagrad"])
def test_a_softmax_regression_compiled(rule: str):
    # alpha= on a product of two tensors is dropped by the compiler of torch 2.13.
    x, y = smooth_noise(3, 4, 3), torch.tensor([0, 1, 2, 1])
    make = {"momentum": lambda: innerloop.optim.sgd(lr=0.1, momentum=0.9)}
    learned = innerloop.Problem(
        lambda p, h, b: nn.functional.cross_entropy(b @ p["w"], y),
        make.get(rule, lambda: getattr(innerloop.optim, rule)(lr=0.1))(),
    )
    found = [
        innerloop.metagradient(
            lambda traj, h: traj.params["w"].square().sum(),
            learned,
            {"w": smooth_noise(3, 3, phase=1.0)},
            x,
            wrt="params",
            strategy=strategy,
        )[1]["w"]
        for strategy in (StoreAll(), Checkpointed(compile=True))
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


# -- StoreAll(compile=True) ------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_store_all_compiled_equals_store_all(rule: str):
    learned = problem(rule)
    value, grads = gradients(StoreAll(), learned)
    ours, found = gradients(StoreAll(compile=True), learned)
    torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found["params"], grads["params"], rtol=1e-12, atol=1e-13)
    for name in ("log_lr", "decay", "data"):
        torch.testing.assert_close(
            found["hyper"][name], grads["hyper"][name], rtol=1e-12, atol=1e-13
        )


def test_one_compiled_step_serves_loops_of_every_length():
    learned = innerloop.Problem(
        lambda p, h, b: p["x"].sin().sum() * h, innerloop.optim.adam(lr=0.1, eps=0.1)
    )

    def run(steps: int, strategy: Strategy) -> Any:
        return innerloop.metagradient(
            lambda traj, h: sum(traj.at(t).params["x"].sum() for t in range(steps + 1)),
            learned,
            {"x": smooth_noise(3)},
            None,
            steps=steps,
            hyper=torch.tensor(0.7),
            strategy=strategy,
        )

    run(2, StoreAll(compile=True))
    with torch.compiler.set_stance("fail_on_recompile"):
        found = run(30, StoreAll(compile=True))
    torch.testing.assert_close(found, run(30, StoreAll()), rtol=1e-12, atol=1e-13)


def test_the_states_of_a_compiled_loop_are_those_of_an_eager_one():
    learned = problem("adam")
    trajs = [
        innerloop.unroll(learned, start(), batches(), hyper=hyper(), strategy=strategy)
        for strategy in (StoreAll(), StoreAll(compile=True))
    ]
    for t in trajs[0].times:
        eager, compiled = (traj.at(t) for traj in trajs)
        assert compiled.time == eager.time
        assert compiled.optimizer_state.count == eager.optimizer_state.count
        assert type(compiled.optimizer_state.count) is int
        torch.testing.assert_close(compiled.params, eager.params, rtol=1e-12, atol=1e-13)
    # One loop of four steps is two loops of two.
    half, again = batches()[:2], batches()[2:]
    first = innerloop.unroll(learned, start(), half, hyper=hyper(), strategy=StoreAll(compile=True))
    second = innerloop.unroll(
        learned, first.at(-1), again, hyper=hyper(), strategy=StoreAll(compile=True)
    )
    torch.testing.assert_close(second.params, trajs[0].params, rtol=1e-12, atol=1e-13)


def test_compiled_steps_have_no_further_derivative():
    learned = problem("momentum")
    params = {n: p.requires_grad_() for n, p in start().items()}
    traj = innerloop.unroll(
        learned, params, batches(), hyper=hyper(), strategy=StoreAll(compile=True)
    )
    end = traj.params["weight"].sin().sum()
    first, again = (
        torch.autograd.grad(end, params["weight"], retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, again)
    (g,) = torch.autograd.grad(end, params["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(g.sum(), params["weight"])


def test_inside_a_transform_nothing_is_compiled():
    learned = problem("momentum")

    def value(w: Tensor, strategy: Strategy) -> Tensor:
        traj = innerloop.unroll(
            learned, {**start(), "weight": w}, batches(), hyper=hyper(), strategy=strategy
        )
        return traj.params["weight"].sin().sum()

    w = torch.stack([start()["weight"], 0.5 * start()["weight"]])
    for transform in (torch.func.vmap, torch.func.hessian):
        at = w if transform is torch.func.vmap else w[0]
        with torch.compiler.set_stance("fail_on_recompile"):
            found = transform(lambda w: value(w, StoreAll(compile=True)))(at)
        torch.testing.assert_close(found, transform(lambda w: value(w, StoreAll()))(at))


def test_a_problem_that_changes_its_code_is_compiled_again_and_warned_about():
    learned = innerloop.Problem(
        lambda p, h, b: (p["x"] * b).square().sum(), innerloop.optim.sgd(lr=0.1)
    )

    def run(columns: int) -> Any:
        return innerloop.metagradient(
            lambda traj, h: traj.params["x"].sum(),
            learned,
            {"x": torch.ones((2,) * columns)},
            torch.ones(2, *(2,) * columns),
            wrt="params",
            strategy=StoreAll(compile=True),
        )

    with pytest.warns(innerloop.RecompilationWarning, match="compiled 4 times"):  # noqa: PT031
        for columns in range(1, 5):
            run(columns)


def under_autocast(strategy: Strategy) -> Tensor:
    """Three steps of Adam, whose first one has the size of lr however small a gradient is."""
    drawn = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn, dtype=torch.float32)

    params = {"w": normal(8, 32), "b": torch.zeros(32), "v": normal(32, 32), "u": normal(32, 8)}
    params = {name: 0.3 * p.float() for name, p in params.items()}
    rows = torch.arange(16) % 8

    def loss(p: dict[str, Tensor], h: object, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ p["w"] + p["b"]
            y = (y.tanh() * y.sin() + y).exp() @ p["v"]
            y = (y.tanh() * y) @ p["u"]
        return nn.functional.cross_entropy(y.float(), rows)

    learned = innerloop.Problem(loss, innerloop.optim.adam(lr=0.01))
    traj = innerloop.unroll(learned, params, normal(3, 16, 8), strategy=strategy)
    return torch.cat([p.flatten() for p in traj.params.values()])


@pytest.mark.slow
def test_autocast_rounds_more_than_the_parameters():
    # Compiled code rounds less often; where a gradient is nearly zero Adam may go the other way.
    off = (under_autocast(StoreAll(compile=True)) - under_autocast(StoreAll())).abs()
    assert off.max() > 1e-2
    assert (off > 1e-3).float().mean() < 0.01


def test_wrong_numbers_under_autocast_are_refused(monkeypatch: pytest.MonkeyPatch):
    def wrong(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        return lambda *args: tuple(1.5 * y if y.is_floating_point() else y for y in graph(*args))

    monkeypatch.setattr(compiling, "BACKEND", wrong)
    with pytest.raises(innerloop.MetaGradientError, match="the step, compiled, differs"):
        under_autocast(StoreAll(compile=True))


FACTOR = 1.0


def squares(x: Tensor) -> Tensor:
    return x.square().sum()


def cubes(x: Tensor) -> Tensor:
    return x.pow(3).sum()


class Settings:
    power = 2


@pytest.mark.parametrize(
    ("owner", "name", "new"),
    [
        ("module", "FACTOR", 3.0),
        ("module", "squares", cubes),
        ("settings", "power", 3),
        ("functional", "relu", nn.functional.softplus),
        ("forward", "softsign", nn.functional.tanhshrink),
    ],
)
def test_what_a_loss_reads_may_change_between_loops(
    owner: str, name: str, new: Any, monkeypatch: pytest.MonkeyPatch
):
    # Guards of innerloop's own code are left out; those of everything else stay.
    module = sys.modules[__name__]
    owners = {
        "module": module,
        "settings": Settings,
        "functional": nn.functional,
        "forward": nn.functional,
    }
    layer = nn.Softsign()

    def loss(p: dict[str, Tensor], h: object, b: Tensor) -> Tensor:
        x = layer(p["x"]) if owner == "forward" else nn.functional.relu(p["x"])
        return FACTOR * squares(x * b) + (x**Settings.power).sum()

    learned = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))

    def run(strategy: Strategy) -> Tensor:
        traj = innerloop.unroll(
            learned, {"x": torch.linspace(0.2, 1.0, 3)}, torch.ones(2, 3), strategy=strategy
        )
        return traj.params["x"]

    before = run(StoreAll(compile=True))
    torch.testing.assert_close(before, run(StoreAll()))
    monkeypatch.setattr(owners[owner], name, new)
    after = run(StoreAll(compile=True))
    torch.testing.assert_close(after, run(StoreAll()))
    assert not torch.allclose(after, before)


@pytest.mark.slow
def test_whole_loops_of_many_problems_and_outer_losses():
    """More than the eight recompilations that torch.compile allows one function."""
    for i in range(10):
        learned = innerloop.Problem(scaled(i + 1), innerloop.optim.sgd(lr=0.007))
        _, grads = innerloop.metagradient(
            lambda traj, h: traj.params["x"].sum(),
            learned,
            {"x": torch.ones(2)},
            None,
            steps=2,
            wrt="params",
            compile=True,
        )
        torch.testing.assert_close(
            grads["x"], torch.full((2,), (1 - 0.007 * (i + 1) ** 2) ** 2), rtol=1e-12, atol=0
        )


# -- map_tasks(compile=True) -----------------------------------------------------------------------


def test_compiled_chunks_equal_eager_ones():
    learned = innerloop.Problem(
        lambda p, h, b: (b @ p["w"]).tanh().square().mean(), innerloop.optim.adam(lr=0.1, eps=0.1)
    )

    def one(task: dict[str, Tensor], params: dict[str, Tensor]) -> Any:
        return innerloop.metagradient(
            lambda traj, h: (task["outer"] @ traj.params["w"]).square().mean(),
            learned,
            params,
            task["inner"],
            wrt="params",
        )

    tasks = {"inner": smooth_noise(5, 2, 4, 3), "outer": smooth_noise(5, 4, 3, phase=2.0)}
    params = {"w": smooth_noise(3, 2, phase=3.0)}
    for reduce in (None, "mean"):
        expected = innerloop.map_tasks(one, tasks, params, reduce=reduce)
        # The last chunk is filled up: one compilation serves all.
        found = innerloop.map_tasks(one, tasks, params, reduce=reduce, chunk_size=2, compile=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_chunks_refuse_foreign_rules_and_random_numbers():
    tasks = torch.ones(3, 2)
    for loss, says in (
        (lambda p, h, b: _clipped(p["w"] * b).square().sum(), "_Clipped"),
        (lambda p, h, b: nn.functional.dropout(p["w"] * b, 0.5).square().sum(), "random"),
    ):
        learned = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))

        def one(task: Tensor, params: Any, learned: innerloop.Problem = learned) -> Any:
            return innerloop.metagradient(
                lambda traj, h: traj.params["w"].square().sum(),
                learned,
                params,
                task[None].expand(2, 2),
                wrt="params",
            )

        with pytest.raises((innerloop.InnerLoopError, RuntimeError), match=says):
            innerloop.map_tasks(one, tasks, {"w": torch.ones(2)}, compile=True)


def test_a_problem_is_made_inside_of_what_the_user_compiles():
    def gradient(w: Tensor) -> Tensor:
        fitted = innerloop.Problem(
            lambda params, hyper, batch: ((params["w"] - 1) ** 2).sum(),
            innerloop.optim.adam(lr=0.1),
        )
        grads: dict[str, Tensor] = innerloop.metagradient(
            lambda traj, hyper: (traj.params["w"] ** 2).sum(),
            fitted,
            {"w": w},
            None,
            steps=2,
            wrt="params",
        )[1]
        return grads["w"]

    w = torch.tensor([0.3, -0.7, 2.0])
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(w), gradient(w))


@pytest.mark.parametrize("strategy", [StoreAll(compile=True), Checkpointed(compile=True)], ids=str)
@pytest.mark.parametrize("graph", [1, 2])
def test_cpp_that_cannot_be_compiled_is_named(
    strategy: Strategy, graph: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The forward part of a step, and its pullback, whose files threads compile."""
    from torch._inductor.codecache import CppWrapperCodeCache
    from torch._inductor.cpp_builder import CppBuilder

    torch_private.prepare_compiler({})
    for thread in torch_private._preparing:
        thread.join()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    CppWrapperCodeCache.cache_clear()
    build, seen = CppBuilder.build, set()

    def ill(self: Any) -> None:
        file = self.get_target_file_path()
        if file.endswith(".main.o"):
            seen.add(file)
            if len(seen) >= graph:
                raise RuntimeError("the compiler is ill")
        build(self)

    monkeypatch.setattr(CppBuilder, "build", ill)
    scale = torch.tensor(1.5, requires_grad=True)
    w = torch.ones(3, requires_grad=True)
    made = innerloop.Problem(
        lambda params, hyper, _: (params["w"] ** 2).sum() * hyper["scale"], innerloop.optim.adam()
    )

    def meta_gradient() -> None:
        found = innerloop.unroll(
            made, {"w": w}, [None] * 3, hyper={"scale": scale}, strategy=strategy
        )
        torch.autograd.grad(found.params["w"].sum(), [w, scale])

    with pytest.raises(innerloop.NotDifferentiableError, match=r"compile=False.*compiler is ill"):
        meta_gradient()
    assert len(seen) >= graph
    # It has recovered.
    monkeypatch.setattr(CppBuilder, "build", build)
    meta_gradient()
