"""`innerloop.plan` and `innerloop.Auto`: what is said about memory, and what is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import innerloop
from innerloop import Auto, Checkpointed, ForwardMode, StoreAll
from innerloop._plan import shown_bytes, shown_seconds
from innerloop.strategy import Strategy
from innerloop.strategy import _measure as cost
from tests.small_problems import Square, one_weight, quadratic_problem

WIDTH, BATCH = 64, 32


def problem() -> innerloop.Problem:
    return innerloop.Problem(
        lambda p, hyper, x: ((x @ p["w"]).tanh() @ p["w"].T).square().mean() * hyper["scale"],
        innerloop.optim.adam(),
    )


def inputs(steps: int) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    return (
        {"w": torch.randn(WIDTH, WIDTH)},
        torch.randn(steps, BATCH, WIDTH),
        {"scale": torch.tensor(0.5)},
    )


def test_a_state_is_counted_in_bytes():
    params, data, hyper = inputs(10)
    plan = innerloop.plan(problem(), params, data, hyper=hyper)
    assert plan.steps == 10
    assert plan.state == 3 * 4 * WIDTH * WIDTH  # Adam: parameters and two moments, in float32
    assert plan.batch == 4 * BATCH * WIDTH


def test_the_memory_of_kept_states_and_of_a_graph_is_foreseen():
    """Every kept state takes P + S; the graph of one step at least what its backward pass must
    keep."""
    params, data, hyper = inputs(100)
    few, many, graph = innerloop.plan(
        problem(),
        params,
        data,
        hyper=hyper,
        strategies=[Checkpointed(slots=10), Checkpointed(slots="all"), StoreAll()],
    ).rows
    assert many.bytes - few.bytes == 90 * 3 * 4 * WIDTH * WIDTH
    assert graph.bytes > 100 * (3 * 4 * WIDTH * WIDTH + 2 * 4 * BATCH * WIDTH)
    assert few.seconds > many.seconds  # replayed steps


def test_the_tally_of_live_memory():
    """Three blocks, of which at most two live at once; a view is no block of its own."""

    def run() -> None:
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(500, dtype=torch.uint8)
        b[10:].view(7, 70)
        del a
        torch.empty(600, dtype=torch.uint8)

    assert cost._peak(run, torch.device("cpu")) == 1500


def test_a_budget_decides():
    params, data, hyper = inputs(200)
    small = innerloop.plan(problem(), params, data, hyper=hyper, memory="4MB")
    assert not small.fits(next(r for r in small.rows if r.strategy == StoreAll()))
    assert isinstance(small.best, Checkpointed)
    large = innerloop.plan(problem(), params, data, hyper=hyper, memory="10GB")
    assert all(large.fits(row) for row in large.rows)
    assert large.best.exact
    hopeless = innerloop.plan(problem(), params, data, hyper=hyper, memory=1000)
    assert not any(hopeless.fits(row) for row in hopeless.rows)
    with pytest.raises(innerloop.InnerLoopError, match="too little"):
        innerloop.unroll(
            problem(),
            {"w": params["w"].requires_grad_()},
            data,
            hyper=hyper,
            strategy=Checkpointed(memory=1000),
        )


def test_none_fits():
    params, data, hyper = inputs(200)
    plan = innerloop.plan(
        problem(), params, data, hyper=hyper, memory=10_000, strategies=[StoreAll()]
    )
    with pytest.raises(innerloop.InnerLoopError, match="no exact strategy fits into 10 kB"):
        _ = plan.best


def test_the_table():
    params, data, hyper = inputs(20)
    lines = str(innerloop.plan(problem(), params, data, hyper=hyper, memory="10GB")).splitlines()
    assert lines[0].startswith("20 steps, one state 49.2 kB, one batch 8.19 kB, budget 10 GB")
    assert lines[1].split() == ["strategy", "exact", "differentiates", "time", "memory", "fits"]
    assert {line.split("(")[0] for line in lines[2:]} == {
        "StoreAll", "Checkpointed", "Truncated", "FirstOrder", "ForwardMode",
    }  # fmt: skip
    many = {"scale": torch.ones(100)}
    wide = innerloop.Problem(
        lambda p, h, x: (x @ p["w"]).square().mean() * h["scale"].sum(), innerloop.optim.sgd()
    )
    assert ForwardMode() not in [
        r.strategy for r in innerloop.plan(wide, params, data, hyper=many).rows
    ]


def test_an_iterator_is_drawn_from_once_and_its_batches_are_counted():
    params, data, hyper = inputs(10)
    source = iter(list(data))
    plan = innerloop.plan(problem(), params, source, hyper=hyper, steps=10)
    assert len(list(source)) == 9
    assert "An iterator's batches are kept for the replay: 81.9 kB" in str(plan)
    with pytest.raises(innerloop.InnerLoopError, match="steps=T"):
        innerloop.plan(problem(), params, iter([1]), hyper=hyper)


def test_nothing_of_the_users_is_changed():
    params, data, hyper = inputs(5)
    noisy = innerloop.Problem(
        lambda p, h, x: torch.nn.functional.dropout(x @ p["w"], 0.5).square().mean(),
        innerloop.optim.sgd(),
    )
    before, w = torch.get_rng_state(), params["w"].clone()
    innerloop.plan(noisy, params, data, hyper=hyper)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(params["w"], w)
    assert not params["w"].requires_grad


@pytest.mark.parametrize("memory", ["10GB", "4MB"])
def test_auto_takes_what_fits(memory: str):
    params, data, hyper = inputs(200)
    with pytest.MonkeyPatch.context() as patch:
        seen: list[str] = []
        for kind in (StoreAll, Checkpointed):
            run = kind.run

            def noted(self: object, loop: object, run: object = run) -> object:
                if loop.batches.steps == 200:  # type: ignore[attr-defined]
                    seen.append(repr(self))
                return run(self, loop)  # type: ignore[operator]

            patch.setattr(kind, "run", noted)
        value, grads = innerloop.metagradient(
            lambda traj, h: traj.params["w"].square().sum(),
            problem(),
            params,
            data,
            hyper=hyper,
            strategy=Auto(memory),
        )
    assert seen[-1].startswith(
        "Checkpointed(memory='4MB')"
        if memory == "4MB"
        else ("StoreAll", "Checkpointed(slots='all')")
    )
    expected, truth = innerloop.metagradient(
        lambda traj, h: traj.params["w"].square().sum(), problem(), params, data, hyper=hyper
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        grads["hyper"]["scale"], truth["hyper"]["scale"], rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
def test_a_loop_stays_within_the_memory_it_was_given():
    """Counted, not resident: the most live bytes of a run, above what is there before."""
    params, data, hyper = inputs(200)
    budget = 4_000_000
    loop_strategy = Checkpointed(memory=budget)

    def run() -> None:
        innerloop.metagradient(
            lambda traj, h: traj.params["w"].sum(),
            problem(),
            params,
            data,
            hyper=hyper,
            strategy=loop_strategy,
        )

    learned = problem()
    del learned
    run()
    assert cost._peak(run, torch.device("cpu")) <= budget * 1.05


def test_numbers_for_people():
    assert [shown_bytes(x) for x in (12, 1500, 2.5e6, 3e9)] == ["12 B", "1.5 kB", "2.5 MB", "3 GB"]
    assert [shown_seconds(x) for x in (0.0123, 12.3, 600)] == ["12.3 ms", "12.3 s", "10 min"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("strategy", [Auto(memory="1GB"), Checkpointed(memory="1GB")], ids=repr)
def test_measuring_draws_nothing_from_an_iterator(strategy: Strategy):
    problem = innerloop.Problem(lambda p, h, x: (p["w"] - x).square(), innerloop.optim.sgd(lr=0.1))
    data = [torch.tensor(float(i)) for i in range(4)]
    for given in (iter(data), (x for x in data)):
        params = one_weight()
        traj = innerloop.unroll(problem, params, given, steps=4, strategy=strategy)
        traj.params["w"].backward()
        assert params["w"].grad is not None
        torch.testing.assert_close(params["w"].grad, torch.tensor(0.8**4), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            traj.params["w"], innerloop.unroll(problem, one_weight(), data).params["w"]
        )


@pytest.mark.usefixtures("float64")
def test_an_iterator_that_is_used_up_is_named():
    problem = innerloop.Problem(lambda p, h, x: (p["w"] - x).square(), innerloop.optim.sgd(lr=0.1))
    for used in (
        lambda: innerloop.plan(problem, {"w": torch.tensor(2.0)}, iter([]), steps=2),
        lambda: innerloop.unroll(
            problem, one_weight(), iter([]), strategy=Checkpointed(memory="1GB")
        ),
        lambda: innerloop.unroll(problem, one_weight(), iter([]), steps=2),
    ):
        with pytest.raises(innerloop.InvalidInputError, match="iterator of batches"):
            used()


@pytest.mark.usefixtures("float64")
def test_a_loop_of_one_step_with_a_schedule():
    problem = quadratic_problem(optimizer_hyper=lambda h, t: {"lr": h["lr"][t]})
    plan = innerloop.plan(
        problem, {"w": torch.tensor(2.0)}, None, steps=1, hyper={"lr": torch.tensor([0.5])}
    )
    assert not any(row.problem for row in plan.rows)


@pytest.mark.usefixtures("float64")
def test_a_row_that_is_not_possible_says_so():
    problem = innerloop.Problem(
        lambda p, h, b: Square.apply(p["w"]) * h, innerloop.optim.sgd(lr=0.1)
    )
    plan = innerloop.plan(problem, {"w": torch.tensor(2.0)}, None, steps=5, hyper=torch.tensor(1.0))
    row = next(r for r in plan.rows if r.strategy == ForwardMode())
    assert row.problem
    assert "not possible" in str(plan)
    assert plan.best.exact
