"""L-BFGS against ``torch.optim.LBFGS``: every bit of its forward pass, finite differences of it for every derivative.

And closures in ``track``, for all rules that evaluate the loss themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import innerloop
from innerloop import InnerLoopError, InvalidInputError, NotDifferentiableError, PrecisionWarning
from innerloop.optim import from_torch, lbfgs
from tests.oracles import (
    Params,
    Settings,
    Task,
    accepts,
    assert_derivative,
    assert_params,
    directional,
    directions,
    grid,
    inner,
    smooth_noise,
)

pytestmark = pytest.mark.usefixtures("float64")
WOLFE = "strong_wolfe"
STEPS = 2


class Valley(Task):
    """The regression of the other rules, in a bowl: L-BFGS would follow its linear terms to infinity."""

    def loss(self, params: Params, t: int) -> Tensor:
        bowl = torch.stack([(0.2 * p**2 + 0.02 * p**4).sum() for p in params.values()]).sum()
        return super().loss(params, t) + bowl


TASK = Valley()
Loss = Callable[[Any, int], Tensor]


def torch_steps(optimizer: Any, leaves: Params, steps: range, loss: Loss = TASK.loss) -> Params:
    """Steps of a ``torch.optim`` optimizer with an ordinary closure."""
    for t in steps:

        def closure(t: int = t) -> Tensor:
            optimizer.zero_grad()
            value = loss(leaves, t)
            value.backward()
            return value

        optimizer.step(closure)
    return {name: p.detach().clone() for name, p in leaves.items()}


def fresh(params: Params) -> Params:
    return {name: p.detach().clone().requires_grad_() for name, p in params.items()}


def plain(settings: Settings, params: Params, steps: int = STEPS, loss: Loss = TASK.loss) -> Params:
    leaves = fresh(params)
    return torch_steps(torch.optim.LBFGS(list(leaves.values()), **settings), leaves, range(steps), loss)


def problem(rule: Any, loss: Loss = TASK.loss) -> innerloop.Problem:
    return innerloop.Problem(lambda params, hyper, t: loss(params, t), rule, optimizer_hyper=lambda hyper, t: hyper or {})


def trained(
    rule: Any, params: Params, steps: Any = range(STEPS), hyper: Any = None, loss: Loss = TASK.loss, **options: Any
) -> Params:
    return innerloop.unroll(problem(rule, loss), params, list(steps), hyper=hyper, **options).params


GRID = [
    *grid(lr=[1.0, 0.3], max_iter=[1, 5], history_size=[2, 100], line_search_fn=[None, WOLFE]),
    *grid(lr=[1.0], max_eval=[1, 3], line_search_fn=[None, WOLFE]),
    *grid(lr=[0.5], max_iter=[5], tolerance_change=[0.05], line_search_fn=[None, WOLFE]),
    *grid(lr=[1.0], max_iter=[8], tolerance_grad=[0.3], line_search_fn=[None, WOLFE]),
    {"lr": 1, "max_iter": 0},
    {"lr": 0.0},
    {},
]


# -- forward ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", GRID, ids=str)
def test_every_bit_of_torch_cold_and_warm(chosen: dict[str, Any]):
    leaves = fresh(TASK.params())
    optimizer = torch.optim.LBFGS(list(leaves.values()), **chosen)
    middle = torch_steps(optimizer, leaves, range(3))
    assert_params(trained(lbfgs(**chosen), TASK.params(), range(3)), middle, 0.0)
    warm = from_torch(optimizer, leaves)
    ours = trained(warm, middle, range(3, 5))
    assert_params(ours, torch_steps(optimizer, leaves, range(3, 5)), 0.0)


@pytest.mark.parametrize("chosen", [{"max_iter": 3}, {"max_iter": 3, "line_search_fn": WOLFE}], ids=str)
def test_torch_goes_on_from_what_is_written_back(chosen: dict[str, Any]):
    truth = plain(chosen, TASK.params(), 4)
    leaves = fresh(TASK.params())
    optimizer = torch.optim.LBFGS(list(leaves.values()), **chosen)
    rule = from_torch(optimizer, leaves)
    traj = innerloop.unroll(problem(rule), TASK.params(), [0, 1])
    with torch.no_grad():
        for name, p in leaves.items():
            p.copy_(traj.params[name])
    rule.write_back(traj.at(-1).optimizer_state)
    assert_params(torch_steps(optimizer, leaves, range(2, 4)), truth, 0.0)
    kinds = {key: type(value) for key, value in optimizer.state[leaves["weight"]].items()}
    assert kinds["old_dirs"] is kinds["ro"] is list
    assert kinds["n_iter"] is kinds["func_evals"] is int


def test_settings_and_state_are_taken_over():
    leaves = fresh(TASK.params())
    optimizer = torch.optim.LBFGS(list(leaves.values()), lr=0.5, max_iter=3, history_size=2, line_search_fn=WOLFE)
    rule = from_torch(optimizer, leaves)
    assert repr(rule) == "from_torch(lbfgs(lr=0.5, max_iter=3, max_eval=3, history_size=2, line_search_fn='strong_wolfe'))"
    torch_steps(optimizer, leaves, range(2))
    kept = optimizer.state[leaves["weight"]]
    (state,) = rule.init(leaves).members
    assert (state.count, state.func_evals) == (kept["n_iter"], kept["func_evals"])
    assert len(state.old_dirs) == len(kept["old_dirs"]) == 2
    assert torch.equal(state.d, kept["d"])
    assert state.d is not kept["d"]


LANDSCAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "quartic": lambda w: (w**4).sum() / 4 + w[0] * w[1] / 2 + w[0],
    "banana": lambda w: 5 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2,
    "waves": lambda w: (3 * w).sin().sum() + (w**2).sum() / 5,
    "wall": lambda w: -(1 - (w**2).sum()).log() + w[0] + w[1] / 3,  # not finite beyond the unit circle
    "steep": lambda w: (2 * w).exp().sum() - w.sum(),
    "flat": lambda w: (1 + (w - 0.2) ** 2).log().sum(),
}


@pytest.mark.parametrize("lr", [0.01, 0.7, 1.0, 30.0])
@pytest.mark.parametrize("landscape", list(LANDSCAPES))
def test_every_branch_of_the_line_search(landscape: str, lr: float):
    """Steps far too short and far too long, bounds, bisection where a trial is not finite, budgets that run out."""
    start = {"w": torch.tensor([0.4, -0.3])}

    def loss(params: Params, t: int) -> Tensor:
        return LANDSCAPES[landscape](params["w"] + 0.05 * t)

    for more in ({"max_iter": 2}, {"max_iter": 6, "max_eval": 4}, {"max_iter": 2, "max_eval": 2}, {"max_iter": 3}):
        chosen = {"lr": lr, "line_search_fn": WOLFE, **more}
        assert_params(trained(lbfgs(**chosen), start, loss=loss), plain(chosen, start, loss=loss), 0.0)


@pytest.mark.parametrize("line_search", [None, WOLFE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
def test_other_dtypes_are_kept_and_as_in_torch(dtype: torch.dtype, line_search: str | None):
    start = {"w": torch.tensor([0.4, -0.3]).to(dtype), "v": torch.tensor([[0.5], [0.2]]).to(dtype)}
    if dtype.is_complex:
        start = {name: p * (1 + 0.5j) for name, p in start.items()}

    def loss(params: Params, t: int) -> Tensor:
        return torch.stack([(p - 0.3 * (1 + t)).abs().pow(2).sum() + p.abs().pow(4).sum() for p in params.values()]).sum()

    chosen = {"lr": 0.5, "max_iter": 3, "line_search_fn": line_search}
    with torch.no_grad():
        ours = trained(lbfgs(**chosen), start, loss=loss)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}.get(dtype, 1e-12)
    assert_params(ours, plain(chosen, start, loss=loss), tolerance)


def test_half_precision_is_warned_of():
    start = {"w": torch.tensor([0.4, -0.3], dtype=torch.bfloat16, requires_grad=True)}
    innerloop.optim.precision.forget_warning()
    with pytest.warns(PrecisionWarning, match="float32"):
        trained(lbfgs(max_iter=2), start, [0], loss=lambda params, t: (params["w"] ** 4).sum())


# -- derivatives --------------------------------------------------------------------------------------------------------

SMOOTH = [
    *grid(lr=[1.0, 0.3], max_iter=[4], history_size=[2, 100], line_search_fn=[None, WOLFE]),
    {"lr": 0.5, "max_iter": 7},
    {"lr": 1.0, "max_iter": 2, "line_search_fn": WOLFE},
    {"lr": 0.2, "max_iter": 1},
]


def meta_gradient(chosen: Settings, params: Params, lr: float, loss: Loss = TASK.loss, **options: Any) -> Any:
    leaves, rate = fresh(params), torch.tensor(float(lr), requires_grad=True)
    outer = TASK.outer(trained(lbfgs(**chosen), leaves, hyper={"lr": rate}, loss=loss, **options))
    *of_params, of_lr = torch.autograd.grad(outer, [*leaves.values(), rate])
    return dict(zip(leaves, of_params, strict=True)), of_lr


@pytest.mark.parametrize("chosen", SMOOTH, ids=str)
def test_meta_gradients_equal_finite_differences_of_torch(chosen: dict[str, Any]):
    of_params, of_lr = meta_gradient(chosen, TASK.params(), chosen["lr"])

    def of_torch(at: Any) -> Tensor:
        return TASK.outer(plain({**chosen, "lr": float(at[1])}, at[0]))

    still = {name: torch.zeros_like(p) for name, p in of_params.items()}
    at = (TASK.params(), chosen["lr"])
    for v in directions(TASK.params(), 2):
        assert_derivative(inner(of_params, v), directional(of_torch, at, (v, 0.0)), "d/dinit")
    truth = directional(of_torch, at, (still, 1.0))
    assert abs(truth) > 1e-3
    assert_derivative(float(of_lr), truth, "d/dlr")


@pytest.mark.parametrize("lr", [0.05, 0.7, 3.0])
@pytest.mark.parametrize("landscape", list(LANDSCAPES))
def test_the_derivative_through_every_branch_of_the_line_search(landscape: str, lr: float):
    def loss(params: Params, t: int) -> Tensor:
        return LANDSCAPES[landscape](params["w"] + 0.05 * t)

    chosen = {"lr": lr, "max_iter": 2, "line_search_fn": WOLFE}
    start, v = {"w": torch.tensor([0.41, -0.33])}, {"w": torch.tensor([0.6, 0.8])}
    of_params, of_lr = meta_gradient(chosen, start, lr, loss)

    def of_torch(at: Any) -> Tensor:
        return TASK.outer(plain({**chosen, "lr": float(at[1])}, at[0], loss=loss))

    truth = directional(of_torch, (start, lr), (v, 0.4))
    assert_derivative(inner(of_params, v) + 0.4 * float(of_lr), truth, landscape)


@pytest.mark.parametrize("line_search", [None, WOLFE])
def test_the_derivative_from_a_warm_optimizer(line_search: str | None):
    chosen = {"lr": 0.5, "max_iter": 3, "line_search_fn": line_search}

    def warm() -> tuple[Any, Params]:
        leaves = fresh(TASK.params())
        optimizer = torch.optim.LBFGS(list(leaves.values()), **chosen)
        torch_steps(optimizer, leaves, range(2))
        return optimizer, leaves

    optimizer, leaves = warm()
    start = fresh(leaves)
    outer = TASK.outer(trained(from_torch(optimizer, leaves), start, [2, 3]))
    found = dict(zip(start, torch.autograd.grad(outer, list(start.values())), strict=True))

    def of_torch(at: Params) -> Tensor:
        optimizer, leaves = warm()
        with torch.no_grad():
            for name, p in leaves.items():
                p.copy_(at[name])
        return TASK.outer(torch_steps(optimizer, leaves, range(2, 4)))

    (v,) = directions(TASK.params(), 1)
    at = {name: p.detach() for name, p in start.items()}
    assert_derivative(inner(found, v), directional(of_torch, at, v), "d/dinit")


def test_the_second_derivative_of_the_outer_loss():
    chosen = {"lr": 1.0, "max_iter": 2, "line_search_fn": WOLFE}
    (v,) = directions(TASK.params(), 1)

    def slope(h: float, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        by = torch.tensor(h, requires_grad=True)
        start = {name: p + by * v[name] for name, p in TASK.params().items()}
        outer = TASK.outer(trained(lbfgs(**chosen), start))
        (found,) = torch.autograd.grad(outer, by, create_graph=create_graph)
        return by, found

    by, first = slope(0.0, create_graph=True)
    (ours,) = torch.autograd.grad(first, by)
    truth = directional(lambda h: slope(float(h))[1], 0.0, 1.0)
    assert_derivative(float(ours), truth, "second derivative")


@pytest.mark.parametrize("chosen", SMOOTH[:8:2] + SMOOTH[1:8:2], ids=str)
def test_jvp(chosen: dict[str, Any]):
    of_params, _ = meta_gradient(chosen, TASK.params(), chosen["lr"])
    (v,) = directions(TASK.params(), 1)

    def outer(params: Params) -> Tensor:
        return TASK.outer(trained(lbfgs(**chosen), params, hyper={"lr": chosen["lr"]}))

    _, along = torch.func.jvp(outer, (TASK.params(),), (v,))
    assert_derivative(float(along), inner(of_params, v), "jvp", relative=1e-9)
    by_func = torch.func.grad(outer)(TASK.params())
    assert_derivative(inner(by_func, v), inner(of_params, v), "torch.func.grad", relative=1e-9)


EXACT = [
    innerloop.Checkpointed(product="reverse", save="params"),
    innerloop.Checkpointed(),
    innerloop.Checkpointed(slots=1),
    innerloop.Checkpointed(slots="all"),
]


@pytest.mark.parametrize("strategy", EXACT, ids=repr)
@pytest.mark.parametrize("line_search", [None, WOLFE])
def test_every_strategy_that_takes_it_equals_store_all(strategy: Any, line_search: str | None):
    chosen = {"lr": 0.5, "max_iter": 3, "history_size": 2, "line_search_fn": line_search}
    found = [
        meta_gradient(chosen, TASK.params(), 0.5, strategy=s) for s in (innerloop.StoreAll(), strategy)
    ]
    assert_params(found[1][0], found[0][0], 1e-12)
    assert_params({"lr": found[1][1]}, {"lr": found[0][1]}, 1e-12)
