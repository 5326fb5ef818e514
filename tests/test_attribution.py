"""`innerloop.attribute`: against one backward pass for each query, closed forms, and retraining."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import attribute, optim

pytestmark = pytest.mark.usefixtures("float64")

N, D, BATCH, T, Q = 24, 3, 6, 8, 5

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, D, generator=GENERATOR, dtype=torch.float64)
Y = (X.sum(1) + 0.5 * torch.randn(N, generator=GENERATOR, dtype=torch.float64) > 0).long()
XQ = torch.randn(Q, D, generator=GENERATOR, dtype=torch.float64)
YQ = (XQ.sum(1) > 0).long()
# The last two examples are never drawn.
INDICES = [torch.randperm(N - 2, generator=GENERATOR)[:BATCH] for _ in range(T)]

RULES = {
    "sgd": optim.sgd(lr=0.3),
    "momentum": optim.sgd(lr=0.2, momentum=0.8, weight_decay=0.01),
    "adam": optim.adam(lr=0.05, eps=1e-3),
}


def network(middle: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        parts = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), copy.deepcopy(middle), nn.Linear(6, 2))
        return parts.double()


def weighted(m: Any, hyper: Any, i: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(m(X[i]), Y[i], reduction="none")
    return (hyper["weights"][i] * losses).mean()


def per_example(m: Any, hyper: Any, i: Tensor) -> Tensor:
    return nn.functional.cross_entropy(m(X[i]), Y[i], reduction="none")


def outcomes(params: Any) -> Tensor:
    h = (XQ @ params["0.weight"].T + params["0.bias"]).tanh()
    logits = h @ params["3.weight"].T + params["3.bias"]
    return nn.functional.cross_entropy(logits, YQ, reduction="none")


def separately(problem: innerloop.Problem, indices: list[Tensor] = INDICES) -> Tensor:
    """One meta-gradient with StoreAll for each query."""
    state = torch.get_rng_state()
    rows = []
    for q in range(Q):
        torch.set_rng_state(state)
        _, g = innerloop.metagradient(
            lambda traj, hyper, q=q: outcomes(traj.params)[q],  # type: ignore[misc]
            problem,
            None,
            indices,
            hyper={"weights": torch.ones(N)},
            wrt="hyper",
        )
        rows.append(g["weights"])
    torch.set_rng_state(state)
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["weights in the loss", "one loss per example"])
@pytest.mark.parametrize(
    ("rule", "middle", "tolerance"),
    [
        ("sgd", nn.Identity(), 1e-12),
        ("momentum", nn.Identity(), 1e-12),
        ("adam", nn.Identity(), 1e-12),
        ("sgd", nn.Dropout(0.4), 1e-12),
        ("sgd", nn.BatchNorm1d(6), 1e-9),
    ],
    ids=["sgd", "momentum", "adam", "dropout", "batch norm"],
)
def test_all_queries_at_once_equal_one_pass_each(
    rule: str, middle: nn.Module, tolerance: float, form: str
) -> None:
    model = network(middle)
    problem = innerloop.Problem.from_module(model, weighted, RULES[rule])
    truth = separately(problem)
    more: dict[str, Any] = {}
    if form == "one loss per example":
        problem = innerloop.Problem.from_module(model, per_example, RULES[rule])
        more["index"] = lambda i: i
    found = attribute(
        outcomes,
        problem,
        None,
        INDICES,
        hyper={"weights": torch.ones(N)},
        chunk=2 if rule == "momentum" else None,
        by_step=True,
        **more,
    )
    torch.testing.assert_close(found.scores, truth, rtol=tolerance, atol=tolerance)
    assert torch.equal(found.scores[:, -2:], torch.zeros(Q, 2))
    assert found.by_step is not None
    torch.testing.assert_close(found.by_step.sum(0), found.scores, rtol=1e-12, atol=1e-14)
    drawn = torch.zeros(T, N, dtype=torch.bool)
    for t, i in enumerate(INDICES):
        drawn[t, i] = True
    assert not found.by_step.abs().sum(1)[~drawn].any()


def test_a_penalty_beside_the_losses() -> None:
    """The second return value is not weighted."""

    def penalised(m: Any, hyper: Any, i: Tensor) -> Any:
        return per_example(m, hyper, i), 0.1 * m[0].weight.square().sum()

    def by_hand(m: Any, hyper: Any, i: Tensor) -> Tensor:
        return weighted(m, hyper, i) + 0.1 * m[0].weight.square().sum()

    model = network(nn.Identity())
    truth = separately(innerloop.Problem.from_module(model, by_hand, RULES["sgd"]))
    found = attribute(
        outcomes,
        innerloop.Problem.from_module(model, penalised, RULES["sgd"]),
        None,
        INDICES,
        hyper={"weights": torch.ones(N)},
        index=lambda i: i,
    )
    torch.testing.assert_close(found.scores, truth, rtol=1e-12, atol=1e-12)


def linear(params: Any, hyper: Any, i: Tensor) -> Tensor:
    logits = X[i] @ params["w"]
    losses = nn.functional.binary_cross_entropy_with_logits(logits, Y[i].to(X), reduction="none")
    return (hyper["weights"][i] * losses).mean() + 0.01 * params["w"].square().sum()


def linear_outcomes(params: Any) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(
        XQ @ params["w"], YQ.to(X), reduction="none"
    )


def logistic() -> innerloop.inspect.Attribution:
    problem = innerloop.Problem(linear, optim.sgd(lr=0.5))
    full = [torch.arange(N)] * 40
    weights = {"weights": torch.ones(N)}
    return attribute(linear_outcomes, problem, {"w": torch.zeros(D)}, full, hyper=weights)


def test_retraining_without_examples_is_predicted() -> None:
    """A small change of the weights exactly to first order; removal in rank."""
    found = logistic()
    small = found.check(subsets=6, drop=0.1, to=1 - 1e-5)
    torch.testing.assert_close(small.predicted, small.real, rtol=1e-3, atol=1e-11)
    removal = found.check(subsets=12, drop=0.1)
    assert float(removal.correlation.mean()) > 0.9
    assert 0.5 < float(removal.slope.median()) < 2
    assert "rank correlation" in repr(removal)
    one = found.predicted([3, 5])
    torch.testing.assert_close(one, -(found.scores[:, 3] + found.scores[:, 5]))
    mask = torch.zeros(N, dtype=torch.bool)
    mask[[3, 5]] = True
    assert torch.equal(one, found.predicted(mask))
    groups = torch.arange(N) % 3
    torch.testing.assert_close(found.grouped(groups)[:, 1], found.scores[:, 1::3].sum(1))
    best = found.top(2, 4)
    assert best["helpful"].tolist() == found.scores[2].argsort()[:4].tolist()
    assert found.scores[2, best["harmful"][0]] == found.scores[2].max()
    assert f"{Q} outcomes to {N} examples" in repr(found)


def test_trainings_at_once_are_those_one_after_the_other() -> None:
    """With dropout vmap gives up; the random numbers are those of the run all the same."""
    for middle in (nn.Identity(), nn.Dropout(0.4)):
        found = attribute(
            outcomes,
            innerloop.Problem.from_module(network(middle), weighted, RULES["momentum"]),
            None,
            INDICES,
            hyper={"weights": torch.ones(N)},
        )
        weights = torch.ones(3, N)
        weights[1, :4] = 0
        weights[2, 4:8] = 0.5
        at_once = found.retrain(weights)
        torch.testing.assert_close(at_once[0], found.losses, rtol=1e-12, atol=1e-12)
        for row, one in zip(at_once, weights, strict=True):
            torch.testing.assert_close(row, found.retrain(one), rtol=1e-12, atol=1e-12)
        with pytest.raises(innerloop.InvalidInputError, match="one number for each of the 24"):
            found.retrain(torch.ones(3))


def test_ranks_with_ties() -> None:
    """Against scipy."""
    stats = pytest.importorskip("scipy.stats")
    from innerloop.inspect._attribution import _rank_correlation

    a, b = torch.tensor([1.0, 2.0, 2.0, 5.0, -1.0]), torch.tensor([3.0, 1.0, 1.0, 9.0, 0.0])
    truth = stats.spearmanr(a.numpy(), b.numpy()).statistic
    assert float(_rank_correlation(a, b)) == pytest.approx(float(truth), abs=1e-12)
    assert float(_rank_correlation(a, torch.ones(5))) == 0


def test_a_chaotic_training_is_flagged_by_the_check() -> None:
    """The weighted quartic at a chaotic rate: the scores are exact, and predict nothing."""
    x = torch.linspace(0.9, 1.1, 20)

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        w = params["w"]
        return (hyper["weights"] * (w**4 / 4 - x * w**2 / 2)).mean()

    found = attribute(
        lambda params: params["w"][None].sin().expand(2) * torch.tensor([1.0, 2.0]),
        innerloop.Problem(loss, optim.sgd(lr=1.6)),
        {"w": torch.tensor(0.3)},
        None,
        steps=60,
        hyper={"weights": torch.ones(20)},
    )
    assert float(found.check(subsets=16, drop=0.1).correlation.abs().mean()) < 0.6


def test_what_cannot_be_attributed() -> None:
    problem = innerloop.Problem(linear, optim.sgd(lr=0.5))
    start, full = {"w": torch.zeros(D)}, [torch.arange(N)] * 3

    def ask(queries: Any = linear_outcomes, given: Any = problem, **changes: Any) -> Any:
        arguments: dict[str, Any] = {"hyper": {"weights": torch.ones(N)}} | changes
        return attribute(queries, given, start, full, **arguments)

    invalid = innerloop.InvalidInputError
    with pytest.raises(invalid, match="hyper has no tensor 'weights'"):
        ask(hyper={"w": torch.ones(N)})
    with pytest.raises(invalid, match="one floating-point number for each example"):
        ask(hyper={"weights": torch.ones(N, dtype=torch.long)})
    with pytest.raises(invalid, match="return a tensor"):
        ask(lambda params: params["w"].sum())
    with pytest.raises(invalid, match="does not depend on params"):
        ask(lambda params: torch.ones(3))
    with pytest.raises(invalid, match="chunk=0"):
        ask(chunk=0)
    with pytest.raises(invalid, match="one number per example"):
        ask(index=lambda i: i)
    deaf = innerloop.Problem(lambda p, h, i: p["w"].square().sum(), optim.sgd(lr=0.1))
    with pytest.raises(innerloop.NotDifferentiableError, match="does not depend on hyper"):
        ask(given=deaf)
    with pytest.raises(invalid, match="at least 2 subsets"):
        ask().check(drop=0.001)


def test_the_plot() -> None:
    pytest.importorskip("matplotlib")
    assert len(logistic().plot(1).axes) == 1


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.slow
@pytest.mark.parametrize("form", ["weights in the loss", "one loss per example"])
def test_compiled_steps_give_the_same_scores(form: str) -> None:
    by_index = form == "one loss per example"
    problem = innerloop.Problem.from_module(
        network(nn.Dropout(0.4)), per_example if by_index else weighted, RULES["adam"]
    )
    index = (lambda i: i) if by_index else None

    def scores(compile: bool) -> Tensor:
        torch.manual_seed(4)
        found = attribute(
            outcomes,
            problem,
            None,
            INDICES,
            hyper={"weights": torch.ones(N)},
            index=index,
            strategy=innerloop.Checkpointed(product="reverse", compile=compile),
            chunk=3,
        )
        return found.scores

    truth, found = scores(False), scores(True)
    assert truth.abs().max() > 1e-3
    torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-10)
