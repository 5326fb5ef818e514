"""The pullback of a compiled step is compiled from the graph of the step.

Truth is the same loop under eager `StoreAll`, in double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop._utils.compiling import CodePath
from innerloop._utils.traced import Traced, names_of
from innerloop.strategy._engine import compiled_step
from innerloop.strategy._engine.compiled_pullback import CompiledPullback
from tests.backends import trace_only

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.traced,
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
]
STEPS = 3


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_only(monkeypatch)


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"w": torch.randn(4, 3, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [
        (torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64))
        for _ in range(STEPS)
    ]


def predict(params: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ params["w"].T + params["b"])


def squares(params: Any, hyper: Any, batch: Any) -> Tensor:
    return (predict(params, batch[0]) - batch[1]).square().mean()


def end(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
    return traj.params["w"].sin().sum() + traj.params["b"].cos().sum()


def found_by(
    problem: innerloop.Problem,
    strategy: innerloop.strategy.Strategy,
    hyper: Any = None,
    outer: Callable[..., Tensor] = end,
    data: Any = None,
) -> Any:
    wrt = "params" if hyper is None else ("params", "hyper")
    return innerloop.metagradient(
        outer,
        problem,
        weights(),
        batches() if data is None else data,
        hyper=hyper,
        wrt=wrt,
        strategy=strategy,
    )


def paths(problem: innerloop.Problem) -> list[CodePath]:
    """What the steps of a problem took."""
    core = compiled_step._cores[problem]["reverse"]
    return list(core.compiled[0]._known.values())


def followed(problem: innerloop.Problem) -> int:
    """How often PyTorch followed a pullback of a problem itself."""
    return len(compiled_step._cores[problem]["reverse"].compiled[1]._known)


def check(problem: innerloop.Problem, *rest: Any, **named: Any) -> None:
    expected = found_by(problem, innerloop.StoreAll(), *rest, **named)
    found = found_by(problem, innerloop.Checkpointed(compile=True), *rest, **named)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def sgd(**named: Any) -> innerloop.optim.Optimizer:
    return innerloop.optim.sgd(lr=0.1, **named)


class _Norm(nn.Module):
    """Reads a tensor of its own that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4).double()
        self.mask: Tensor
        mask = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * self.mask


def penalised(params: Any, hyper: Any, batch: Any) -> Tensor:
    slope = torch.func.grad(lambda x: predict(params, x).sum())(batch[0])
    return squares(params, hyper, batch) + slope.square().mean()


def branching(params: Any, hyper: Any, batch: Any) -> Tensor:
    return squares(params, hyper, batch) * (2.0 if batch[0].requires_grad else 1.0)


def partly(params: Any, hyper: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        scale = predict(params, batch[0]).abs().mean()
    return squares(params, hyper, batch) * scale + (params["b"].detach() * params["w"].sum()).mean()


def of_one(params: Any, hyper: Any, batch: Any) -> Tensor:
    return (batch[0] @ params["w"].T - batch[1]).square().mean()


def learned(params: Any, hyper: Any, batch: Any) -> Tensor:
    return hyper["weight"].exp() * squares(params, hyper, batch)


def rates(hyper: Any, t: int) -> dict[str, Tensor]:
    return {"lr": hyper["rate"].exp() * (1 + t)}


def hypers(**more: Tensor) -> dict[str, Tensor]:
    one = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    return {"weight": one(0.3), "rate": one(-2.0), "unused": one(1.0), **more}


CASES: dict[str, Callable[[], Any]] = {
    "a module with a buffer": lambda: innerloop.Problem.from_module(
        _Norm(), lambda call, hyper, batch: (call(batch[0]) - batch[1]).square().mean(), sgd()
    ),
    "momentum": lambda: innerloop.Problem(squares, sgd(momentum=0.9)),
    "adam": lambda: innerloop.Problem(squares, innerloop.optim.adam(lr=0.1)),
    "a gradient in the loss": lambda: innerloop.Problem(penalised, sgd()),
    "what requires grad": lambda: innerloop.Problem(branching, sgd()),
    "parts held constant": lambda: innerloop.Problem(partly, sgd()),
    "a parameter that is not used": lambda: innerloop.Problem(of_one, sgd()),
    "targets": lambda: innerloop.Problem(
        lambda p, h, batch, targets: (predict(p, batch[0]) - targets).square().mean(),
        sgd(),
        targets=lambda p, h, batch: 0.5 * predict(p, batch[0]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_graph_of_the_step_is_differentiated(name: str) -> None:
    problem = CASES[name]()
    if problem.view is None and name != "a module with a buffer":
        check(problem)
    else:
        module = _Norm()
        torch.manual_seed(3)
        start = {n: torch.randn_like(p) for n, p in module.named_parameters()}
        results = [
            innerloop.metagradient(
                lambda traj, hyper: sum(
                    (p.sin().sum() for p in traj.params.values()), torch.zeros(())
                ),
                problem,
                start,
                batches(),
                wrt="params",
                strategy=strategy,
            )
            for strategy in (innerloop.StoreAll(), innerloop.Checkpointed(compile=True))
        ]
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)
    assert followed(problem) == 0
    (path,) = paths(problem)
    assert path.pullbacks
    assert None not in path.pullbacks.values()


@pytest.mark.parametrize(
    "outer",
    [
        end,
        lambda traj, hyper: traj.losses.square().sum(),
        lambda traj, hyper: end(traj, hyper) + traj.losses.sum() + hyper["weight"] * 3,
    ],
    ids=["end", "losses", "all"],
)
def test_hyper_gradients(outer: Callable[..., Tensor]) -> None:
    problem = innerloop.Problem(learned, sgd(), optimizer_hyper=rates)
    check(problem, hypers(), outer)
    assert followed(problem) == 0


def test_what_the_loss_returns_besides_has_a_derivative() -> None:
    problem = innerloop.Problem(
        lambda p, h, batch: (squares(p, h, batch), {"norm": p["w"].square().sum(), "n": 3}), sgd()
    )
    check(problem, outer=lambda traj, hyper: traj.aux["norm"].sin().sum())
    assert followed(problem) == 0


def test_a_captured_tensor_may_change_between_loops() -> None:
    scope = {"scale": torch.tensor(2.0, dtype=torch.float64)}
    problem = innerloop.Problem(lambda p, h, b: squares(p, h, b) * scope["scale"], sgd())
    check(problem)
    scope["scale"] = torch.tensor(3.0, dtype=torch.float64)
    check(problem)
    scope["scale"].mul_(2)
    check(problem)
    assert followed(problem) == 0
    assert len(paths(problem)) == 1


def test_one_tensor_in_two_places() -> None:
    """The compiler takes it for one input, which has one derivative."""
    both = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    problem = innerloop.Problem(
        lambda p, h, batch: (
            (predict(p, batch[0]) @ h["a"][0] - h["b"].sum(1)).square().mean()
            + (batch[1] - p["b"][0]).square().sum()
        ),
        sgd(),
    )
    hyper = {"a": torch.ones(5, 4, dtype=torch.float64)}
    check(problem, {**hyper, "b": hyper["a"]}, data=[(both, both)] * STEPS)
    assert followed(problem) == 0


class _Doubled(innerloop.optim.Optimizer):
    """Keeps one tensor in two places of its state."""

    def init(self, params: Any) -> Any:
        return [{n: torch.zeros_like(p) for n, p in params.items()}] * 2

    def update(self, grads: Any, state: Any, params: Any, hyper: Any = None) -> Any:
        new = {n: 0.5 * state[0][n] + 0.4 * state[1][n] + g for n, g in grads.items()}
        return {n: p - 0.1 * new[n] for n, p in params.items()}, [new, new]


def test_one_tensor_in_two_places_of_the_state() -> None:
    problem = innerloop.Problem(squares, _Doubled())
    check(problem)
    assert followed(problem) == 1


def test_where_results_come_from() -> None:
    x, y, z = torch.ones(1), torch.ones(1), torch.ones(1)
    graph = torch.fx.symbolic_trace(lambda x: x)
    traced = Traced.of(graph, [z], ([x, y], {"a": x}), (z, y, 3))
    assert traced is not None
    assert traced.outputs == [0, ~1, None]
    assert traced.names == names_of(([x, y], {"a": x}))
    assert Traced.of(graph, [z], [x], [torch.ones(1)]) is None


def two_hypers(params: Any, hyper: Any, batch: Any) -> Tensor:
    return (
        squares(params, hyper, batch) * hyper["a"].exp() + hyper["b"] * params["w"].square().sum()
    )


def test_the_order_of_keys_does_not_matter() -> None:
    """PyTorch takes the same path for it."""
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (0.3, 0.7))
    problem = innerloop.Problem(two_hypers, sgd())
    for hyper in ({"a": a, "b": b}, {"b": b, "a": a}):
        check(problem, hyper)
    problem = innerloop.Problem(
        lambda p, h, batch: (
            (predict(p, batch["x"]) - predict(p, batch["y"]).detach()).square().mean()
        ),
        sgd(),
    )
    one, two = batches()[0][0], batches()[1][0]
    check(problem, data=[{"x": one, "y": two}, {"y": two, "x": one}, {"x": two, "y": one}])
    assert followed(problem) == 0


def test_an_optimizer_whose_state_is_in_another_order_at_each_step() -> None:
    def rule(grad: Tensor, param: Tensor, state: Any, weights: Any) -> Any:
        new = 0.9 * state["m"] + grad
        after = {"m": new, "keep": state["keep"]} if "m" in list(state)[1] else None
        return -0.1 * new * state["keep"], after or {"keep": state["keep"], "m": new}

    optimizer = innerloop.optim.learned(
        rule, {}, init=lambda p: {"m": torch.zeros_like(p), "keep": torch.ones_like(p) * 2}
    )
    check(innerloop.Problem(squares, optimizer))


class _Grows(innerloop.optim.Optimizer):
    """Momentum whose state is empty before the first step."""

    def init(self, params: Any) -> Any:
        return {}

    def update(self, grads: Any, state: Any, params: Any, hyper: Any = None) -> Any:
        new = {n: 0.9 * state[n] + g if state else g for n, g in grads.items()}
        return {n: p - 0.1 * new[n] for n, p in params.items()}, new


def test_an_optimizer_whose_state_grows() -> None:
    check(innerloop.Problem(squares, _Grows()))


class _Rows:
    """A batch that no pytree knows."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


def test_a_batch_of_the_users_own_class() -> None:
    """Its loss has the same value whatever the data are."""

    def surrogate(params: Any, hyper: Any, batch: Any) -> Tensor:
        score = (predict(params, batch.x) * batch.y).sum(1)
        return (score - score.detach()).exp().mean()

    check(innerloop.Problem(surrogate, sgd()), data=[_Rows(x, y) for x, y in batches()])


def test_a_captured_tensor_that_another_loop_had_changed() -> None:
    scope = {"m": torch.tensor(2.0, dtype=torch.float64)}

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        value = squares(params, hyper, batch)
        return value.detach() + scope["m"] * (value - value.detach())

    def run(strategy: innerloop.strategy.Strategy) -> list[Tensor]:
        start = {n: p.requires_grad_() for n, p in weights().items()}
        problem = problems[type(strategy)]
        first = innerloop.unroll(problem, start, batches(), strategy=strategy)
        scope["m"] = torch.tensor(3.0, dtype=torch.float64)
        innerloop.unroll(problem, start, batches(), strategy=strategy)
        scope["m"] = torch.tensor(2.0, dtype=torch.float64)
        return list(torch.autograd.grad(end(first, None), list(start.values())))

    strategies = (innerloop.StoreAll(), innerloop.Checkpointed(compile=True))
    problems: dict[type, innerloop.Problem] = {
        type(s): innerloop.Problem(loss, sgd()) for s in strategies
    }
    for _ in range(2):
        torch.testing.assert_close(run(strategies[1]), run(strategies[0]), rtol=1e-9, atol=1e-12)


def test_a_graph_that_cannot_be_differentiated_by_itself() -> None:
    """Its result has a shape of its own, which nothing knows outside of what PyTorch follows."""
    problem = innerloop.Problem(
        lambda p, h, batch: (predict(p, batch[0]) - batch[1])[batch[1] > 0].square().mean(), sgd()
    )
    check(problem)
    (path,) = paths(problem)
    assert list(path.pullbacks.values()) == [None]
    assert followed(problem) == 1
    assert torch.is_grad_enabled()


def test_code_that_fails_when_it_runs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*inputs: Tensor) -> None:
        torch.rand(3)
        raise RuntimeError("not here")

    monkeypatch.setattr(CompiledPullback, "_compiled_from", lambda *_: fail)
    problem = innerloop.Problem(
        lambda p, h, batch: (
            (nn.functional.dropout(predict(p, batch[0]), 0.5) - batch[1]).square().mean()
        ),
        sgd(),
    )
    found = []
    for strategy in (innerloop.StoreAll(), innerloop.Checkpointed(compile=True)):
        torch.manual_seed(5)
        found.append(found_by(problem, strategy))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    assert followed(problem) == 1
    assert all(run is None for path in paths(problem) for run in path.pullbacks.values())


def test_a_path_whose_first_run_failed_keeps_its_own_graph() -> None:
    """Two are compiled and raise the user's own error; then the first one runs."""
    scope = {"power": "one"}
    eye = torch.eye(2, dtype=torch.float64)

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        x, y, matrix, slope = batch
        zero = 0 * torch.linalg.cholesky(matrix).sum() * params["b"].sum()
        part = (slope * params["w"]).square().sum()
        factor = 2.0 if scope["power"] == "one" else 7.0
        return squares(params, hyper, (x, y)) + factor * (part - part.detach()) + zero

    def data(matrix: Tensor) -> list[Any]:
        slopes = [0.5] * (STEPS - 1) + [0.0]
        return [
            (x, y, matrix, torch.tensor(slope, dtype=torch.float64))
            for (x, y), slope in zip(batches(), slopes, strict=True)
        ]

    problem = innerloop.Problem(loss, sgd())
    for scope["power"] in ("one", "two"):
        with pytest.raises(RuntimeError, match="cholesky"):
            found_by(problem, innerloop.Checkpointed(compile=True), data=data(-eye))
    scope["power"] = "one"
    check(problem, data=data(eye))


def test_cotangents_that_are_negated_in_name_only() -> None:
    problem = innerloop.Problem(squares, sgd())
    c = torch.randn(4, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(4))
    for factor in (c.imag, c.conj().imag):
        check(problem, outer=lambda traj, hyper, f=factor: (traj.params["w"] * f).sum())
        start = {n: p.requires_grad_() for n, p in weights().items()}
        found = [
            torch.autograd.grad(
                innerloop.unroll(problem, start, batches(), strategy=strategy).params["w"],
                start["w"],
                factor,
            )[0]
            for strategy in (innerloop.StoreAll(), innerloop.Checkpointed(compile=True))
        ]
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_other_shapes_have_pullbacks_of_their_own() -> None:
    problem = innerloop.Problem(squares, sgd())
    for rows in (5, 4):
        data = [(x[:rows], y[:rows]) for x, y in batches()]
        check(problem, data=data)


def test_a_step_that_returns_what_it_was_given() -> None:
    """The cotangent of a state that no step changes goes through it as it is."""

    def rule(grad: Tensor, param: Tensor, state: Tensor, weights: Any) -> Any:
        return -0.1 * grad * (1 + state), state

    optimizer = innerloop.optim.learned(rule, {}, init=lambda p: torch.zeros_like(p))
    problem = innerloop.Problem(squares, optimizer)
    check(problem)
