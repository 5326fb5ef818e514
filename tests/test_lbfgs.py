"""L-BFGS against ``torch.optim.LBFGS``: every bit of its forward pass, finite differences of it for
every derivative.

And closures in ``track``, for all rules that evaluate the loss themselves.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import innerloop
from innerloop import InvalidInputError, PrecisionWarning
from innerloop._utils import caches, tree
from innerloop.optim import from_torch, lbfgs
from innerloop.optim._engine import strong_wolfe
from tests.oracles import (
    Params,
    Settings,
    Task,
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
    """The regression of the other rules, in a bowl: L-BFGS would follow its linear terms to
    infinity."""

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
    return torch_steps(
        torch.optim.LBFGS(list(leaves.values()), **settings), leaves, range(steps), loss
    )


def problem(rule: Any, loss: Loss = TASK.loss) -> innerloop.Problem:
    return innerloop.Problem(
        lambda params, hyper, t: loss(params, t), rule, optimizer_hyper=lambda hyper, t: hyper or {}
    )


def trained(
    rule: Any,
    params: Params,
    steps: Any = range(STEPS),
    hyper: Any = None,
    loss: Loss = TASK.loss,
    **options: Any,
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


# -- forward ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", GRID, ids=str)
def test_every_bit_of_torch_cold_and_warm(chosen: dict[str, Any]):
    leaves = fresh(TASK.params())
    optimizer = torch.optim.LBFGS(list(leaves.values()), **chosen)
    middle = torch_steps(optimizer, leaves, range(3))
    assert_params(trained(lbfgs(**chosen), TASK.params(), range(3)), middle, 0.0)
    warm = from_torch(optimizer, leaves)
    ours = trained(warm, middle, range(3, 5))
    assert_params(ours, torch_steps(optimizer, leaves, range(3, 5)), 0.0)


@pytest.mark.parametrize(
    "chosen", [{"max_iter": 3}, {"max_iter": 3, "line_search_fn": WOLFE}], ids=str
)
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
    optimizer = torch.optim.LBFGS(
        list(leaves.values()), lr=0.5, max_iter=3, history_size=2, line_search_fn=WOLFE
    )
    rule = from_torch(optimizer, leaves)
    assert (
        repr(rule) == "from_torch(lbfgs(lr=0.5, max_iter=3, max_eval=3, history_size=2, "
        "line_search_fn='strong_wolfe'))"
    )
    torch_steps(optimizer, leaves, range(2))
    kept = optimizer.state[leaves["weight"]]
    (state,) = rule.init(leaves).members
    assert (state.count, state.func_evals) == (kept["n_iter"], kept["func_evals"])
    assert len(state.old_dirs) == len(kept["old_dirs"]) > 0
    assert torch.equal(state.d, kept["d"])
    assert state.d is not kept["d"]


LANDSCAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "quartic": lambda w: (w**4).sum() / 4 + w[0] * w[1] / 2 + w[0],
    "banana": lambda w: 5 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2,
    "waves": lambda w: (3 * w).sin().sum() + (w**2).sum() / 5,
    "wall": lambda w: torch.where(
        w @ w < 1, w[0] + w[1] / 3 - (1 - w @ w).clamp_min(1e-9).log(), torch.inf
    ),
    "steep": lambda w: (2 * w).exp().sum() - w.sum(),
    "flat": lambda w: (1 + (w - 0.2) ** 2).log().sum(),
}


@pytest.mark.covering
@pytest.mark.parametrize("lr", [0.01, 0.7, 1.0, 30.0])
@pytest.mark.parametrize("landscape", list(LANDSCAPES))
def test_every_branch_of_the_line_search(landscape: str, lr: float):
    """Steps far too short and far too long, bounds, bisection where a trial is not finite, budgets
    that run out."""
    start = {"w": torch.tensor([0.4, -0.3])}

    def loss(params: Params, t: int) -> Tensor:
        return LANDSCAPES[landscape](params["w"] + 0.05 * t)

    for more in (
        {"max_iter": 2},
        {"max_iter": 6, "max_eval": 4},
        {"max_iter": 2, "max_eval": 2},
        {"max_iter": 3},
    ):
        chosen: dict[str, Any] = {"lr": lr, "line_search_fn": WOLFE, **more}
        assert_params(
            trained(lbfgs(**chosen), start, loss=loss), plain(chosen, start, loss=loss), 0.0
        )


@pytest.mark.parametrize("line_search", [None, WOLFE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
def test_other_dtypes_are_kept_and_as_in_torch(dtype: torch.dtype, line_search: str | None):
    start = {"w": torch.tensor([0.4, -0.3]).to(dtype), "v": torch.tensor([[0.5], [0.2]]).to(dtype)}
    if dtype.is_complex:
        start = {name: p * (1 + 0.5j) for name, p in start.items()}

    def loss(params: Params, t: int) -> Tensor:
        return torch.stack(
            [(p - 0.3 * (1 + t)).abs().pow(2).sum() + p.abs().pow(4).sum() for p in params.values()]
        ).sum()

    chosen: dict[str, Any] = {"lr": 0.5, "max_iter": 3, "line_search_fn": line_search}
    with torch.no_grad():
        ours = trained(lbfgs(**chosen), start, loss=loss)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}.get(dtype, 1e-12)
    assert_params(ours, plain(chosen, start, loss=loss), tolerance)


def test_half_precision_is_warned_of():
    start = {"w": torch.tensor([0.4, -0.3], dtype=torch.bfloat16, requires_grad=True)}
    caches.clear()
    with pytest.warns(PrecisionWarning, match="float32"):
        trained(lbfgs(max_iter=2), start, [0], loss=lambda params, t: (params["w"] ** 4).sum())


# -- derivatives -----------------------------------------------------------------------------------

SMOOTH = [
    *grid(lr=[1.0, 0.3], max_iter=[4], history_size=[2, 100], line_search_fn=[None, WOLFE]),
    {"lr": 0.5, "max_iter": 7},
    {"lr": 1.0, "max_iter": 2, "line_search_fn": WOLFE},
    {"lr": 0.2, "max_iter": 1},
]


def meta_gradient(
    chosen: Settings, params: Params, lr: float, loss: Loss = TASK.loss, **options: Any
) -> Any:
    leaves, rate = fresh(params), torch.tensor(float(lr), requires_grad=True)
    outer = TASK.outer(trained(lbfgs(**chosen), leaves, hyper={"lr": rate}, loss=loss, **options))
    # A line search that takes no step at all does not depend on lr.
    *of_params, of_lr = torch.autograd.grad(outer, [*leaves.values(), rate], materialize_grads=True)
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

    chosen: dict[str, Any] = {"lr": lr, "max_iter": 2, "max_eval": 6, "line_search_fn": WOLFE}
    start, v = {"w": torch.tensor([0.41, -0.33])}, {"w": torch.tensor([0.6, 0.8])}
    of_params, of_lr = meta_gradient(chosen, start, lr, loss)

    def of_torch(at: Any) -> Tensor:
        return TASK.outer(plain({**chosen, "lr": float(at[1])}, at[0], loss=loss))

    truth = directional(of_torch, (start, lr), (v, 0.4))
    assert_derivative(inner(of_params, v) + 0.4 * float(of_lr), truth, landscape)


@pytest.mark.parametrize("line_search", [None, WOLFE])
def test_the_derivative_from_a_warm_optimizer(line_search: str | None):
    chosen: dict[str, Any] = {"lr": 0.5, "max_iter": 3, "line_search_fn": line_search}

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
    chosen: dict[str, Any] = {"lr": 1.0, "max_iter": 2, "line_search_fn": WOLFE}
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

    along = torch.func.jvp(outer, (TASK.params(),), (v,))[1]
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
    chosen: dict[str, Any] = {
        "lr": 0.5,
        "max_iter": 3,
        "history_size": 2,
        "line_search_fn": line_search,
    }
    found = [
        meta_gradient(chosen, TASK.params(), 0.5, strategy=s)
        for s in (innerloop.StoreAll(), strategy)
    ]
    assert_params(found[1][0], found[0][0], 1e-12)
    assert_params({"lr": found[1][1]}, {"lr": found[0][1]}, 1e-12)


@pytest.mark.parametrize(
    "strategy", [innerloop.ForwardMode(), innerloop.Truncated(STEPS)], ids=repr
)
@pytest.mark.parametrize("line_search", [None, WOLFE])
def test_strategies_for_hyper_parameters(strategy: Any, line_search: str | None):
    """Two hyper-parameters: `ForwardMode` pushes both derivatives at once, inside ``vmap``, past
    decisions that are the same for both."""
    rule = lbfgs(max_iter=3, line_search_fn=line_search)
    setting = innerloop.Problem(
        lambda params, hyper, t: (
            TASK.loss(params, t) + hyper["decay"] * (params["weight"] ** 2).sum()
        ),
        rule,
        optimizer_hyper=lambda hyper, t: {"lr": hyper["lr"]},
    )
    found = []
    for s in (innerloop.StoreAll(), strategy):
        hyper = {
            name: torch.tensor(value, requires_grad=True)
            for name, value in (("lr", 0.5), ("decay", 0.1))
        }
        traj = innerloop.unroll(setting, TASK.params(), list(range(STEPS)), hyper=hyper, strategy=s)
        found.append(
            dict(
                zip(
                    hyper,
                    torch.autograd.grad(TASK.outer(traj.params), list(hyper.values())),
                    strict=True,
                )
            )
        )
    assert all(found[0].values())
    assert_params(found[1], found[0], 1e-10)


REFUSED = [
    innerloop.FirstOrder(),
    innerloop.Checkpointed(save="gradients"),
    innerloop.Checkpointed(product="mixed"),
    innerloop.Checkpointed(product="finite"),
]


@pytest.mark.parametrize("strategy", REFUSED, ids=repr)
def test_strategies_that_take_loss_and_update_apart_refuse_it(strategy: Any):
    with pytest.raises(
        InvalidInputError, match=r"lbfgs.*evaluates the loss within its update.*StoreAll\(\)"
    ):
        meta_gradient({"max_iter": 2}, TASK.params(), 1.0, strategy=strategy)


def test_auto_finds_a_strategy_that_takes_it():
    chosen: dict[str, Any] = {"max_iter": 2}
    found = [
        meta_gradient(chosen, TASK.params(), 0.5, strategy=s)
        for s in (innerloop.StoreAll(), innerloop.Auto("1GB"))
    ]
    assert_params(found[1][0], found[0][0], 1e-12)


def test_a_step_length_close_to_an_end_of_its_interval_is_moved_away_the_second_time():
    """A tenth of the interval, by which end is nearer; at an end at once."""
    kept = {0.5: (0.5, False), 0.98: (0.98, True), 0.03: (0.03, True)}
    kept |= {1.0: (0.9, False), 0.0: (0.1, False), 0.88: (0.88, False)}
    for ends in ((0.0, 1.0), (1.0, 0.0)):
        for t, expected in kept.items():
            assert strong_wolfe._inside(t, *ends, False) == pytest.approx(expected), (t, ends)
        assert strong_wolfe._inside(0.98, *ends, True) == pytest.approx((0.9, False))
        assert strong_wolfe._inside(0.03, *ends, True) == pytest.approx((0.1, False))


@pytest.mark.parametrize(
    ("height", "waves", "phase", "first"),
    [(0.5, 4, 1.2, 3.0), (1.2, 4, 4.9, 3.0), (1.6, 4, 1.5, 20.0), (0.2, 5, 0.9, 20.0)],
)
def test_the_line_search_satisfies_both_wolfe_conditions(
    height: float, waves: int, phase: float, first: float
):
    """Of -t + t² / 20 and a wave, where the better end of the interval changes sides."""

    def at(length: Any) -> strong_wolfe.Trial:
        t = torch.as_tensor(float(length), dtype=torch.float64).requires_grad_()
        f = -t + t**2 / 20 + height * (waves * t + phase).sin()
        (slope,) = torch.autograd.grad(f, t)
        return strong_wolfe.Trial(length, f.detach(), slope, slope)

    start = at(0.0)
    found, used = strong_wolfe.strong_wolfe(at, start, first, 25, 1.0)
    assert start.slope < 0
    assert found.f <= start.f + 1e-4 * found.t * start.slope
    assert found.slope.abs() <= -0.9 * start.slope
    assert used < 25


# -- places where a rule of this kind could break --------------------------------------------------


@pytest.mark.parametrize("line_search", [None, WOLFE])
def test_at_a_minimum_nothing_moves_and_derivatives_are_finite(line_search: str | None):
    start = {"w": torch.zeros(3, requires_grad=True)}

    def loss(params: Params, t: int) -> Tensor:
        return (params["w"] ** 2).sum()

    traj = innerloop.unroll(problem(lbfgs(line_search_fn=line_search), loss), start, [0, 1])
    assert torch.equal(traj.params["w"].detach(), torch.zeros(3))
    (found,) = torch.autograd.grad(traj.params["w"].sum(), start["w"])
    assert torch.equal(found, torch.ones(3))  # no iteration: the identity
    state = traj.at(-1).optimizer_state
    assert (state.count, state.func_evals, state.d) == (0, 2, None)


@pytest.mark.parametrize("line_search", [None, WOLFE])
def test_entries_without_a_gradient_stay_where_they_are(line_search: str | None):
    task = Task(dead=True)

    def loss(params: Params, t: int) -> Tensor:
        return (
            task.loss(params, 0)
            + torch.stack([(p**2).sum() for n, p in params.items() if n != "bias"]).sum() / 5
        )

    start = fresh(task.params())
    traj = innerloop.unroll(
        problem(lbfgs(max_iter=4, line_search_fn=line_search), loss), start, list(range(12))
    )
    assert torch.equal(traj.params["bias"][4], start["bias"][4])
    found = torch.autograd.grad(task.outer(traj.params), list(start.values()))
    assert all(g.isfinite().all() for g in found)


def test_a_missing_gradient_counts_as_zero():
    rule, params = lbfgs(lr=0.5, max_iter=1), {"w": torch.tensor(2.0), "v": torch.tensor(3.0)}
    grads = {"w": torch.tensor(0.5), "v": None}
    new, state = rule.update(
        grads, rule.init(params), params, value_and_grad=lambda at: (at["w"] ** 2, grads)
    )
    assert new == {"w": torch.tensor(1.75), "v": torch.tensor(3.0)}
    assert torch.equal(state.d, torch.tensor([-0.5, 0.0]))


def test_nothing_but_empty_parameters():
    start = {"w": torch.zeros(0, 3)}
    new = trained(lbfgs(), start, loss=lambda params, t: params["w"].sum())
    assert new["w"].shape == (0, 3)


def test_arguments_are_left_alone():
    leaves = fresh(TASK.params())
    optimizer = torch.optim.LBFGS(list(leaves.values()), max_iter=3)
    torch_steps(optimizer, leaves, range(2))
    rule = from_torch(optimizer, leaves)
    params = {name: p.detach().clone() for name, p in leaves.items()}
    carry = problem(rule).init(params)
    before = [t.clone() for t in tree.tensors((carry.params, carry.optimizer_state))]
    innerloop.unroll(problem(rule), carry, [2, 3])
    after = list(tree.tensors((carry.params, carry.optimizer_state)))
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(
    lr=st.floats(0.05, 1.5),
    max_iter=st.integers(1, 6),
    max_eval=st.none() | st.integers(1, 8),
    history_size=st.integers(1, 6),
    tolerances=st.sampled_from([(1e-7, 1e-9), (0.05, 1e-9), (1e-7, 0.01), (0.0, 0.0)]),
    line_search=st.sampled_from([None, WOLFE]),
)
def test_random_settings(
    lr: float,
    max_iter: int,
    max_eval: int | None,
    history_size: int,
    tolerances: tuple[float, float],
    line_search: str | None,
):
    chosen: dict[str, Any] = {
        "lr": lr,
        "max_iter": max_iter,
        "max_eval": max_eval,
        "history_size": history_size,
    }
    chosen |= {
        "tolerance_grad": tolerances[0],
        "tolerance_change": tolerances[1],
        "line_search_fn": line_search,
    }
    start = fresh(TASK.params())
    ours = trained(lbfgs(**chosen), start)
    assert_params(ours, plain(chosen, TASK.params()), 1e-12)
    found = torch.autograd.grad(TASK.outer(ours), list(start.values()))
    assert all(g.isfinite().all() for g in found)


# -- what is refused -------------------------------------------------------------------------------

BAD_SETTINGS: dict[str, dict[str, Any]] = {
    "line_search_fn='wolfe'": {"line_search_fn": "wolfe"},
    "history_size=0": {"history_size": 0},
    "max_eval=0": {"max_eval": 0, "line_search_fn": WOLFE},
    "lr=-1": {"lr": -1},
    "lr=0": {"lr": 0, "line_search_fn": WOLFE},
    "of shape \\(2,\\)": {"lr": torch.ones(2)},
    "given as dict": {"lr": {"w": 1.0}},
}


@pytest.mark.parametrize("message", list(BAD_SETTINGS))
@pytest.mark.usefixtures("types_unchecked")
def test_settings_on_which_torch_fails(message: str):
    chosen = BAD_SETTINGS[message]
    with pytest.raises(InvalidInputError, match=message):
        lbfgs(**chosen)
    with pytest.raises(
        (ValueError, RuntimeError, IndexError, UnboundLocalError, ZeroDivisionError, TypeError)
    ):
        plain(
            chosen,
            {"w": torch.tensor([0.4, -0.3])},
            loss=lambda params, t: ((params["w"] - t) ** 4).sum(),
        )


def test_a_nan_that_torch_stumbles_over():
    start = {"w": torch.tensor([0.4, -0.3])}

    def loss(params: Params, t: int) -> Tensor:
        return -(1 - (params["w"] ** 2).sum()).log() + params["w"][0]

    chosen: dict[str, Any] = {"lr": 30.0, "max_iter": 2, "line_search_fn": WOLFE}
    with pytest.raises(IndexError):
        plain(chosen, start, loss=loss)
    with pytest.raises(InvalidInputError, match=r"loss is NaN at the step length .*Lower lr"):
        trained(lbfgs(**chosen), start, loss=loss)


def test_it_is_refused_where_it_cannot_work():
    rule, params = lbfgs(), TASK.params()
    with pytest.raises(InvalidInputError, match=r"loop\.step\(closure\).*value_and_grad="):
        rule.update(params, rule.init(params), params)
    with pytest.raises(InvalidInputError, match="no hyper-parameter 'tolerance_grad'"):
        trained(rule, params, hyper={"tolerance_grad": torch.tensor(0.1)})
    with pytest.raises(InvalidInputError, match=r"groups.*evaluates the loss itself"):
        innerloop.optim.groups({"*": rule})
    with pytest.raises(InvalidInputError, match="evaluates the loss"):
        innerloop.optim.chain(innerloop.optim.clip_by_value(1.0), rule)
    with pytest.raises(InvalidInputError, match="evaluates the loss"):
        innerloop.optim.in_float32(rule)
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    both = [
        torch.optim.LBFGS(layers[0].parameters()),
        torch.optim.SGD(layers[1].parameters(), lr=0.1),
    ]
    with pytest.raises(
        InvalidInputError, match=r"evaluates the loss itself.*one optimizer for all"
    ):
        from_torch(both, layers)
    with pytest.raises(InvalidInputError, match=r"cannot be compiled.*compile=False"):
        innerloop.metagradient(
            lambda traj, _: TASK.outer(traj.params),
            problem(rule),
            params,
            [0],
            wrt="params",
            compile=True,
        )
    _, state = problem(rule).init(params), trained_state(params)
    with pytest.raises(InvalidInputError, match="belongs to other parameters"):
        rule.update(
            {"w": torch.ones(2)},
            state,
            {"w": torch.ones(2)},
            value_and_grad=lambda at: (torch.ones(()), at),
        )


def trained_state(params: Params) -> Any:
    return innerloop.unroll(problem(lbfgs(max_iter=1)), params, [0]).at(-1).optimizer_state


def test_vmap_over_tasks_is_refused_and_over_what_it_does_not_depend_on_is_not():
    params = TASK.params()

    def outer(scale: Tensor) -> Tensor:
        start = {name: p * scale for name, p in params.items()}
        return TASK.outer(trained(lbfgs(max_iter=2), start))

    with pytest.raises(InvalidInputError, match=r"vmap over tasks.*Python loop"):
        torch.func.vmap(outer)(torch.tensor([1.0, 0.9]))
    final = trained(lbfgs(max_iter=2), params)
    both = torch.func.vmap(lambda x: x * TASK.outer(trained(lbfgs(max_iter=2), params)))(
        torch.ones(2)
    )
    assert_params({"outer": both}, {"outer": TASK.outer(final).expand(2)}, 1e-15)


# -- modules: random numbers and running statistics ------------------------------------------------

X, Y = 1.2 * smooth_noise(16, 3), smooth_noise(16, 1, phase=1.0)


def network(noisy: bool = False) -> nn.Sequential:
    between: list[nn.Module] = (
        [nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2)] if noisy else [nn.Tanh()]
    )
    model = nn.Sequential(nn.Linear(3, 4), *between, nn.Linear(4, 1))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(
                0.6 * smooth_noise(*p.shape, phase=20.0 + i) + (1 if noisy and i in (2, 3) else 0)
            )
    return model


def model_loss(model: Any) -> Tensor:
    decay = torch.stack([(p**2).sum() for p in model.parameters()]).sum()
    return (model(X) - Y).square().mean() + 0.01 * decay


def torch_on_model(
    make: Callable[[Any], Any],
    model: nn.Module,
    steps: int = STEPS,
    also: Callable[[Any], Any] = lambda model: None,
) -> nn.Module:
    optimizer = make(model.parameters())
    for _ in range(steps):

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = model_loss(model)
            value.backward()
            also(model)
            return value

        optimizer.step(closure)
    return model


def named(model: nn.Module) -> Params:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def closure_rule(line_search: str | None) -> Callable[[Any], Any]:
    return lambda params: torch.optim.LBFGS(params, lr=0.5, max_iter=4, line_search_fn=line_search)


class SharpnessAware(torch.optim.Optimizer):
    """Foret et al. 2021: the gradient at a displaced point."""

    def __init__(self, params: Any, lr: float = 0.1, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = torch.enable_grad()(closure)()
        group = self.param_groups[0]
        norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
        moves = [p.grad * (group["rho"] / (norm + 1e-12)) for p in group["params"]]
        for p, move in zip(group["params"], moves, strict=True):
            p.add_(move)
        self.zero_grad()
        torch.enable_grad()(closure)()
        for p, move in zip(group["params"], moves, strict=True):
            p.sub_(move).sub_(p.grad, alpha=group["lr"])
        return loss


CLOSURE_RULES: dict[str, tuple[Callable[[Any], Any], Callable[[nn.Module], Any]]] = {
    "torch LBFGS": (closure_rule(None), lambda model: closure_rule(None)(model.parameters())),
    "torch LBFGS, line search": (
        closure_rule(WOLFE),
        lambda model: closure_rule(WOLFE)(model.parameters()),
    ),
    "lbfgs": (closure_rule(WOLFE), lambda model: lbfgs(lr=0.5, max_iter=4, line_search_fn=WOLFE)),
    "adapt(closure=True)": (
        SharpnessAware,
        lambda model: innerloop.optim.adapt(SharpnessAware, closure=True),
    ),
    "torch SGD": (
        lambda params: torch.optim.SGD(params, lr=0.1),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    ),
}
each_closure_rule = pytest.mark.parametrize("rule", list(CLOSURE_RULES))


@pytest.mark.covering
@each_closure_rule
@pytest.mark.parametrize("learn", ["init", "outer", "nothing"])
def test_track_draws_and_writes_as_often_as_torch(rule: str, learn: Any):
    """Dropout and batch norm, in every evaluation: parameters, running statistics and the random
    state end up the same."""
    of_torch, of_ours = CLOSURE_RULES[rule]
    plainly = network(noisy=True)
    torch.manual_seed(1)
    truth = named(torch_on_model(of_torch, plainly))
    random_state = torch.get_rng_state()
    model = network(noisy=True)
    torch.manual_seed(1)
    with innerloop.track(model, of_ours(model), learn=learn) as loop:
        for _ in range(STEPS):
            before = loop.model[0].weight
            value = loop.step(lambda: model_loss(loop.model))
            assert loop.model[0].weight is not before
            assert not value.requires_grad
        loop.commit()
    assert_params(named(model), truth, 1e-12)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(loop.trajectory.losses) == STEPS


@each_closure_rule
def test_unroll_draws_and_writes_as_often_as_torch(rule: str):
    of_torch, of_ours = CLOSURE_RULES[rule]
    plainly = network(noisy=True)
    torch.manual_seed(1)
    truth = named(torch_on_model(of_torch, plainly))
    found = []
    for strategy in (innerloop.StoreAll(), innerloop.Checkpointed(slots=1, product="reverse")):
        model = network(noisy=True)
        pure = of_ours(model)
        pure = from_torch(pure, model) if isinstance(pure, torch.optim.Optimizer) else pure
        setting = innerloop.Problem.from_module(
            model, lambda model, hyper, batch: model_loss(model), pure
        )
        torch.manual_seed(1)
        traj = innerloop.unroll(
            setting, dict(model.named_parameters()), None, steps=STEPS, strategy=strategy
        )
        assert_params(
            {
                **truth,
                **{n: p.detach() for n, p in (*traj.params.items(), *traj.at(-1).buffers.items())},
            },
            truth,
            1e-12,
        )
        outer = torch.stack([p.sin().sum() for p in traj.params.values()]).sum()
        found.append(
            dict(
                zip(traj.params, torch.autograd.grad(outer, list(model.parameters())), strict=True)
            )
        )
    assert_params(found[1], found[0], 1e-12)


def final(params: Mapping[str, Tensor]) -> Tensor:
    terms = [
        ((1 + smooth_noise(*p.shape, phase=40.0 + i) / 2) * p.sin()).sum()
        for i, p in enumerate(params.values())
    ]
    return torch.stack(terms).sum()


@each_closure_rule
def test_track_with_a_closure_has_the_derivative_of_torch(rule: str):
    of_torch, of_ours = CLOSURE_RULES[rule]
    model = network()
    lr = torch.tensor(0.3, requires_grad=True)
    with innerloop.track(model, of_ours(model), hyper={"lr": lr}) as loop:
        for _ in range(STEPS):
            loop.step(lambda: model_loss(loop.model))
        final(loop.parameters()).backward()
    found = {name: p.grad for name, p in model.named_parameters()}

    def plainly(at: Any) -> Tensor:
        model = network()
        model.load_state_dict(at[0])

        def make(params: Any) -> Any:
            optimizer = of_torch(params)
            optimizer.param_groups[0]["lr"] = float(at[1])
            return optimizer

        return final(dict(torch_on_model(make, model).named_parameters())).detach()

    v = {
        name: smooth_noise(*p.shape, phase=90.0 + i)
        for i, (name, p) in enumerate(model.named_parameters())
    }
    at = (named(network()), 0.3)
    still = {name: torch.zeros_like(p) for name, p in v.items()}
    assert_derivative(inner(found, v), directional(plainly, at, (v, 0.0)), "d/dinit")
    assert lr.grad is not None
    assert_derivative(float(lr.grad), directional(plainly, at, (still, 1.0)), "d/dlr")


@pytest.mark.parametrize("line_search", [None, WOLFE])
def test_first_order_keeps_the_identity_path(line_search: str | None):
    """With constant losses and gradients every direction and step length is a constant: d θ_T / d
    θ_0 is the identity."""
    model = network()
    with innerloop.track(
        model, closure_rule(line_search)(model.parameters()), first_order=True
    ) as loop:
        for _ in range(STEPS):
            loop.step(lambda: model_loss(loop.model))
        end = {name: p.detach().requires_grad_() for name, p in loop.parameters().items()}
        final(loop.parameters()).backward()
    truth = dict(zip(end, torch.autograd.grad(final(end), list(end.values())), strict=True))
    assert_params(
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, truth, 1e-14
    )


def test_a_callback_and_hooks_see_every_evaluation():
    """Clipping inside of the closure, as one writes it for torch."""

    def clip(model: Any) -> None:
        for p in model.parameters():
            p.grad.clamp_(-0.05, 0.05)

    truth = named(torch_on_model(closure_rule(None), network(), also=clip))
    model, calls = network(), []

    def callback(grads: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        calls.append(len(grads))
        return {name: None if g is None else g.clamp(-0.05, 0.05) for name, g in grads.items()}

    with innerloop.track(model, closure_rule(None)(model.parameters()), learn="nothing") as loop:
        for _ in range(STEPS):
            loop.step(lambda: model_loss(loop.model), grad_callback=callback)
        loop.commit()
    assert_params(named(model), truth, 1e-12)
    hooked = network()
    for p in hooked.parameters():
        p.register_hook(lambda g: g.clamp(-0.05, 0.05))
    with innerloop.track(hooked, closure_rule(None)(hooked.parameters()), learn="nothing") as loop:
        for _ in range(STEPS):
            loop.step(lambda: model_loss(loop.model))
        loop.commit()
    assert_params(named(hooked), truth, 1e-12)
    assert len(calls) == 2 * 4


def test_a_scheduler_is_followed():
    def run(step: Callable[[Any, Any], Any], model: nn.Module) -> None:
        optimizer = closure_rule(None)(model.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        step(optimizer, scheduler)

    def with_torch(optimizer: Any, scheduler: Any) -> None:
        for _ in range(3):

            def closure() -> Tensor:
                optimizer.zero_grad()
                value = model_loss(plainly)
                value.backward()
                return value

            optimizer.step(closure)
            scheduler.step()

    def with_track(optimizer: Any, scheduler: Any) -> None:
        with innerloop.track(ours, optimizer) as loop:
            for _ in range(3):
                loop.step(lambda: model_loss(loop.model))
                scheduler.step()
            loop.commit()

    plainly, ours = network(), network()
    run(with_torch, plainly)
    run(with_track, ours)
    assert_params(named(ours), named(plainly), 1e-12)


def test_a_frozen_layer_and_an_optimizer_over_a_part():
    """What is frozen, or not in the optimizer, is seen by every evaluation as it is."""
    found = []
    for tracked in (False, True):
        model = network()
        model[0].weight.requires_grad_(False)
        optimizer = closure_rule(None)([*model[0].parameters(), model[2].weight])
        if not tracked:
            torch_on_model(lambda _: optimizer, model)  # noqa: B023
        else:
            with innerloop.track(model, optimizer) as loop:
                for _ in range(STEPS):
                    loop.step(lambda: model_loss(loop.model))
                loop.commit()
        found.append(named(model))
    assert_params(found[1], found[0], 1e-12)


# -- closures that cannot work ---------------------------------------------------------------------


@pytest.fixture
def model() -> nn.Sequential:
    return network()


def test_a_loss_where_a_closure_is_needed(model: nn.Sequential):
    with innerloop.track(model, lbfgs()) as loop:
        with pytest.raises(
            InvalidInputError,
            match=r"lbfgs.*given a Tensor.*loop\.step\(lambda: loss_fn\(loop\.model\(x\), y\)\)",
        ):
            loop.step(model_loss(loop.model))
        with pytest.raises(InvalidInputError, match="given a Tensor"):
            loop.step(torch.tensor(1.0))


@pytest.mark.parametrize("rule", [lbfgs(max_iter=2), innerloop.optim.sgd(lr=0.1)], ids=repr)
@pytest.mark.parametrize("learn", ["init", "outer", "nothing"])
def test_a_closure_that_takes_the_gradient_itself(model: nn.Sequential, rule: Any, learn: Any):
    gathered = torch.ones(4, 3)
    model[0].weight.grad = gathered
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with innerloop.track(model, rule, learn=learn) as loop:

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = model_loss(loop.model)
            value.backward()
            return value

        before = loop.model[0].weight
        with pytest.raises(InvalidInputError, match=r"calls backward\(\).*only return the loss"):
            loop.step(closure)
        assert loop.model[0].weight is before  # the loop is as it was
        assert model[0].weight.grad is gathered
        loop.step(lambda: model_loss(loop.model))


def test_zero_grad_alone_costs_no_outer_gradient(model: nn.Sequential):
    gathered = model[0].weight.grad = torch.ones(4, 3)
    with innerloop.track(model, lbfgs(max_iter=2)) as loop:

        def closure(set_to_none: bool = True) -> Tensor:
            torch.optim.SGD(model.parameters()).zero_grad(set_to_none=set_to_none)
            return model_loss(loop.model)

        loop.step(closure)
        assert model[0].weight.grad is gathered
        with pytest.raises(InvalidInputError, match=r"changes \.grad.*zero_grad"):
            loop.step(lambda: closure(set_to_none=False))


def test_a_gradient_taken_for_a_penalty_is_none_of_these(model: nn.Sequential):
    """``torch.autograd.grad`` inside of a closure writes nowhere."""
    with innerloop.track(model, lbfgs(max_iter=2)) as loop:

        def closure() -> Tensor:
            value = model_loss(loop.model)
            grads = torch.autograd.grad(value, list(loop.model.parameters()), create_graph=True)
            return value + 0.01 * torch.stack([(g**2).sum() for g in grads]).sum()

        loop.step(closure)
        final(loop.parameters()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_closure_that_does_not_evaluate_the_model(model: nn.Sequential):
    with innerloop.track(model, lbfgs()) as loop:
        value = model_loss(loop.model)
        with pytest.raises(InvalidInputError, match="depends on none"):
            loop.step(lambda: value)
        with pytest.raises(InvalidInputError, match=r"nan.*diverged"):
            loop.step(lambda: model_loss(loop.model) * torch.nan)
        with pytest.raises(InvalidInputError, match="does not depend on any parameter"):
            loop.step(lambda: model_loss(loop.model).detach())
        with pytest.raises(InvalidInputError, match=r"must return a scalar tensor.*NoneType"):
            loop.step(lambda: None)
        loop.step(functools.partial(model_loss, loop.model))  # nothing was left behind


def test_a_loop_under_no_grad_evaluates_with_gradients_as_torch_does(model: nn.Sequential):
    with innerloop.track(model, lbfgs(max_iter=2), learn="nothing") as loop, torch.no_grad():
        loop.step(lambda: model_loss(loop.model))
        loop.commit()
    truth = torch_on_model(lambda params: torch.optim.LBFGS(params, max_iter=2), network(), steps=1)
    assert_params(named(model), named(truth), 1e-12)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_maximizing_is_minimizing_the_negative(search: str | None) -> None:
    def taken(sign: float, maximize: bool) -> list[Tensor]:
        problem = innerloop.Problem(
            lambda params, hyper, batch: (
                sign * ((params["w"] - hyper) ** 4 + (params["w"] - 1) ** 2).sum()
            ),
            lbfgs(lr=0.5, max_iter=3, line_search_fn=search, maximize=maximize),
        )
        start = {"w": torch.linspace(-1, 1, 3, dtype=torch.float64)}
        target = torch.tensor(0.3, dtype=torch.float64)
        traj, grads = innerloop.metagradient(
            lambda traj, hyper: traj.params["w"].square().sum(),
            problem,
            start,
            None,
            steps=3,
            hyper=target,
        )
        return [traj, grads["params"]["w"], grads["hyper"]]

    torch.testing.assert_close(taken(-1.0, True), taken(1.0, False), rtol=0, atol=0)
    if "maximize" in inspect.signature(torch.optim.LBFGS).parameters:
        w = torch.zeros(2, requires_grad=True)
        newest: Any = torch.optim.LBFGS
        assert "maximize=True" in repr(from_torch(newest([w], maximize=True)))
