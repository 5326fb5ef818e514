"""Surrogates: exact expectations over all outcomes, and derivatives written out term by term."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap

import innerloop
from innerloop.errors import BiasedSurrogateWarning, InvalidInputError
from innerloop.rl import check_objective, discounted_returns, score_term, surrogate
from tests import rl_beds as beds
from tests.oracles import smooth_noise

THETA = beds.BANDIT_THETA
# log π·A with the gradient of the inner step held constant
FIRST_ORDER = "first order"


def error(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).norm() / truth.norm()).item()


# -- bed A -----------------------------------------------------------------------------------------


def adapted_return(theta: Tensor, arms: Tensor, kind: Any, with_score: bool) -> Tensor:
    """The return behind one inner step on these pulls, one-step episodes side by side."""

    def inner(t: Tensor) -> Tensor:
        log_probs = beds.pull_log_probs(t, arms).unsqueeze(0)
        chosen: Any = "reinforce" if kind == FIRST_ORDER else kind
        return surrogate(log_probs, beds.ARMS[arms].unsqueeze(0), kind=chosen)

    step = grad(inner)(theta)
    value = beds.bandit_return(theta + (step.detach() if kind == FIRST_ORDER else step))
    if with_score:
        value = value + score_term(beds.pull_log_probs(theta, arms), value)
    return value


def expected_estimate(kind: Any, with_score: bool, n: int) -> Tensor:
    arms = beds.pulls(n)
    probability = beds.pull_log_probs(THETA, arms).sum(1).exp()
    return probability @ vmap(lambda a: grad(adapted_return)(THETA, a, kind, with_score))(arms)


@functools.cache
def truths(n: int) -> tuple[Tensor, Tensor]:
    """Gradients of both objectives."""
    sampled = functools.partial(beds.sampled_objective, n=n)
    return grad(beds.expected_objective)(THETA), grad(sampled)(THETA)


def test_the_bandit_is_the_one_of_the_figures():
    torch.testing.assert_close(
        torch.stack([beds.bandit_return(THETA), beds.expected_objective(THETA)]),
        torch.tensor([0.206448, 0.362062]).double(),
        rtol=0,
        atol=1e-6,
    )
    expected, sampled = truths(4)
    for found, figure in (
        (expected, (0.308748, -0.053655, -0.255093)),
        (sampled, (0.304909, -0.051260, -0.253648)),
    ):
        torch.testing.assert_close(found, torch.tensor(figure).double(), rtol=0, atol=1e-6)
    values = [beds.sampled_objective(THETA, n).item() for n in (1, 2, 4, 6)]
    assert values == pytest.approx([0.366423, 0.364394, 0.363273, 0.362880], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "with_score", "of_expected", "of_sampled"),
    [
        ("reinforce", False, 0.168, 0.158),
        ("ratio", False, 0.010, 0.002),
        ("dice", False, 0.010, 0.002),
        ("loaded_dice", False, 0.010, 0.002),
        ("reinforce", True, 0.012, 0.0),
        ("ratio", True, 0.146, 0.159),
        ("dice", True, 0.146, 0.159),
        ("loaded_dice", True, 0.146, 0.159),
        (FIRST_ORDER, False, 0.127, 0.118),
    ],
)
def test_bed_a(kind: Any, with_score: bool, of_expected: float, of_sampled: float):
    found = expected_estimate(kind, with_score, 4)
    errors = [error(found, truth) for truth in truths(4)]
    assert errors == pytest.approx([of_expected, of_sampled], abs=1e-3)


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_reinforce_with_score_term_is_exact_for_the_sampled_objective(n: int):
    found = expected_estimate("reinforce", True, n)
    torch.testing.assert_close(found, truths(n)[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["ratio", "dice", "loaded_dice"])
def test_the_error_for_the_expected_objective_falls_with_the_number_of_pulls(kind: Any):
    errors = [error(expected_estimate(kind, False, n), truths(n)[0]) for n in (1, 2, 4, 6)]
    assert errors == pytest.approx([0.043, 0.021, 0.010, 0.007], abs=5e-4)


@pytest.mark.parametrize("kind", ["ratio", "dice", "loaded_dice"])
def test_the_bandits_expected_second_derivative_is_exact(kind: Any):
    """One step long, so that even the per-step ratio is right: what is left in the test above
    comes from the step, which is not linear in the estimate."""
    arms = beds.pulls(2)
    probability = beds.pull_log_probs(THETA, arms).sum(1).exp()

    def mean(theta: Tensor) -> Tensor:
        def one(a: Tensor) -> Tensor:
            return surrogate(beds.pull_log_probs(theta, a)[None], beds.ARMS[a][None], kind=kind)

        return (probability * vmap(one)(arms)).sum()

    for derivative in (grad, hessian):
        torch.testing.assert_close(
            derivative(mean)(THETA), derivative(beds.bandit_return)(THETA), rtol=0, atol=1e-10
        )


def test_the_score_term_is_right_to_second_order():
    arms = beds.pulls(2)
    weight = beds.pull_log_probs(THETA, arms).sum(1).exp()

    def mean(theta: Tensor) -> Tensor:
        each = vmap(lambda a: adapted_return(theta, a, "reinforce", True))(arms)
        return (weight * each).sum()

    truth = functools.partial(beds.sampled_objective, n=2)
    torch.testing.assert_close(mean(THETA), truth(THETA), rtol=0, atol=1e-12)
    for derivative in (grad, hessian):
        found = derivative(mean)(THETA)
        torch.testing.assert_close(found, derivative(truth)(THETA), rtol=0, atol=1e-10)


def test_a_baseline_leaves_the_mean_of_the_score_term_and_a_mask_takes_actions_out():
    arms = beds.pulls(2)
    probability = beds.pull_log_probs(THETA, arms).sum(1).exp()

    def mean(baseline: float) -> Tensor:
        def one(a: Tensor) -> Tensor:
            value = adapted_return(THETA, a, "reinforce", False)
            term = functools.partial(score_term, outer_value=value, baseline=baseline)
            return grad(lambda t: term(beds.pull_log_probs(t, a)))(THETA)

        return probability @ vmap(one)(arms)

    torch.testing.assert_close(mean(0.0), mean(0.3), rtol=0, atol=1e-12)
    log_probs = torch.tensor([-1.0, float("nan")], requires_grad=True)
    term = score_term(log_probs, torch.tensor(3.0), mask=torch.tensor([True, False]))
    assert torch.autograd.grad(term, log_probs)[0].tolist() == [3.0, 0.0]


# -- bed B -----------------------------------------------------------------------------------------

RUNS = beds.episodes()
TABLE = beds.TABLE_THETA
TO_GO = discounted_returns(RUNS.rewards, gamma=beds.GAMMA)
VALUES = beds.values_on_the_way(TABLE, RUNS)
ADVANTAGES = TO_GO - VALUES[:-1]
ONE_STEP = RUNS.rewards + beds.GAMMA * VALUES[1:] - VALUES[:-1]

KINDS: dict[str, tuple[Tensor, dict[str, Any], float]] = {
    "log": (TO_GO, {"kind": "reinforce"}, 2.68),
    "log, with values": (ADVANTAGES, {"kind": "reinforce"}, 1.00),
    "per-step ratio": (TO_GO, {"kind": "ratio"}, 0.62),
    "per-step ratio, with values": (ADVANTAGES, {"kind": "ratio"}, 0.62),
    "whole-episode ratio": (RUNS.rewards, {"kind": "ratio", "per_step_ratio": False}, 0.0),
    "DiCE": (RUNS.rewards, {"kind": "dice"}, 0.0),
    "DiCE, with values": (RUNS.rewards, {"kind": "dice", "baseline": VALUES[:-1]}, 0.0),
    "Loaded DiCE": (ADVANTAGES, {}, 0.0),
    "Loaded DiCE, one-step advantages": (ONE_STEP, {}, 0.0),
    "Loaded DiCE, λ = .5": (ADVANTAGES, {"lam": 0.5}, 0.31),
    "Loaded DiCE, λ = 0": (ADVANTAGES, {"lam": 0.0}, 0.62),
}


def mean_surrogate(theta: Tensor, name: str) -> Tensor:
    """The expectation of a surrogate over all episodes under the fixed policy that took them."""
    signal, options, _ = KINDS[name]
    log_probs = beds.table_log_probs(theta, RUNS)
    probability = RUNS.environment * beds.table_log_probs(TABLE, RUNS).sum(0).exp()
    terms = surrogate(log_probs, signal, discount=beds.GAMMA, reduction="none", **options)
    return (probability * terms.sum(0)).sum()


def test_the_table_is_the_one_of_the_figures():
    probability = RUNS.environment * beds.table_log_probs(TABLE, RUNS).sum(0).exp()
    assert probability.shape == (128,)
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    assert beds.table_return(TABLE).item() == pytest.approx(2.479958, abs=1e-6)
    slope = [0.279267, -0.279267, -0.671561, 0.671561]
    assert grad(beds.table_return)(TABLE).tolist() == pytest.approx(slope, abs=1e-6)
    curvature = hessian(beds.table_return)(TABLE)
    assert curvature[0].tolist() == pytest.approx([-0.02479, 0.02479, 0.07628, -0.07628], abs=1e-5)
    assert curvature[2, 2].item() == pytest.approx(-0.20132, abs=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_bed_b(name: str):
    mean = functools.partial(mean_surrogate, name=name)
    slope, curvature = grad(mean)(TABLE), hessian(mean)(TABLE)
    torch.testing.assert_close(slope, grad(beds.table_return)(TABLE), rtol=0, atol=1e-10)
    truth, bias = hessian(beds.table_return)(TABLE), KINDS[name][2]
    if bias == 0:
        torch.testing.assert_close(curvature, truth, rtol=0, atol=1e-10)
    else:
        assert error(curvature, truth) == pytest.approx(bias, abs=8e-3)
    if name == "per-step ratio":
        cosine = (curvature * truth).sum() / (curvature.norm() * truth.norm())
        assert cosine.item() == pytest.approx(0.877, abs=1e-3)


@pytest.mark.parametrize("name", [name for name, (_, _, bias) in KINDS.items() if bias == 0])
def test_the_third_derivative_is_right_where_the_second_is(name: str):
    mean = functools.partial(mean_surrogate, name=name)
    truth = jacrev(hessian(beds.table_return))(TABLE)
    torch.testing.assert_close(jacrev(hessian(mean))(TABLE), truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["whole-episode ratio", "DiCE", "DiCE, with values"])
def test_the_value_from_rewards_is_the_expected_return(name: str):
    found = mean_surrogate(TABLE, name)
    torch.testing.assert_close(found, beds.table_return(TABLE), rtol=0, atol=1e-12)


def test_autograd_gives_what_transforms_give():
    theta = TABLE.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mean_surrogate(theta, "Loaded DiCE"), theta, create_graph=True)
    (row,) = torch.autograd.grad(slope[2], theta)
    truth = hessian(beds.table_return)(TABLE)[2]
    torch.testing.assert_close(row, truth, rtol=0, atol=1e-10)


# -- each kind, written out term by term -----------------------------------------------------------

T, N, D = 5, 3, 2
WEIGHTS = smooth_noise(T, N, D)
SIGNAL = smooth_noise(T, N, phase=1.0)
VALUE = smooth_noise(T, N, phase=2.0)
ENDS = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).T.bool()
MASK = smooth_noise(T, N, phase=3.0) > -0.5
AT = torch.tensor([0.3, -0.6], dtype=torch.float64)


def curved(theta: Tensor) -> Tensor:
    """Log-probabilities of a made-up policy, whose own second derivatives are known."""
    return (WEIGHTS @ theta).sin()


def written_out(
    kind: str, lam: float, discount: float, whole: bool, ends: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the sum of all terms: sums over pairs of steps, no magic boxes."""
    slope, curve = jacrev(curved)(AT), hessian(curved)(AT)
    log_probs = curved(AT)
    first, second = torch.zeros(D).double(), torch.zeros(D, D).double()
    for n in range(N):
        begin = 0
        for t in range(T):
            if t and ends is not None and ends[t - 1, n]:
                begin = t
            over = next(
                (k for k in range(t, T) if ends is not None and ends[k, n]),
                T - 1,
            )
            if mask is not None and not mask[t, n] and not whole and kind != "dice":
                continue
            counts = [k for k in range(T) if mask is None or mask[k, n]]
            time = len([k for k in counts if begin <= k < t])
            a = SIGNAL[t, n] * discount**time if t in counts else torch.zeros(())
            b = VALUE[t, n] * discount**time if t in counts else torch.zeros(())

            def exponential(weights: dict[int, float], n: int = n) -> tuple[Tensor, Tensor]:
                """Gradient and Hessian of exp(Σ w_k l_k - the same, detached)."""
                g = sum((w * slope[k, n] for k, w in weights.items()), torch.zeros(D).double())
                h = sum((w * curve[k, n] for k, w in weights.items()), torch.zeros(D, D).double())
                return g, h + torch.outer(g, g)

            def powers(
                last: int, begin: int = begin, t: int = t, counts: list[int] = counts
            ) -> dict[int, float]:
                age = {k: len([j for j in counts if k < j <= t]) for k in counts}
                return {k: lam ** age[k] for k in counts if begin <= k <= last}

            if kind == "reinforce":
                parts = [(a, (slope[t, n], curve[t, n]))]
            elif kind == "ratio" and not whole:
                parts = [(a, exponential({t: 1.0}))]
            elif kind == "ratio":
                ks = [k for k in range(begin, over + 1) if k in counts]
                parts = [(a, exponential(dict.fromkeys(ks, 1.0)))]
            elif kind == "dice":
                here, before = exponential(powers(t)), exponential(powers(t - 1))
                parts = [(a - b, here), (b, before)]
            else:
                parts = [(a, exponential(powers(t))), (-a, exponential(powers(t - 1)))]
            for factor, (g, h) in parts:
                first, second = first + factor * g, second + factor * h
    assert log_probs.shape == (T, N)
    return first, second


@pytest.mark.parametrize("where", ["one episode", "several", "several, some masked"])
@pytest.mark.parametrize("discount", [1.0, 0.8])
@pytest.mark.parametrize(
    ("kind", "lam", "whole"),
    [
        ("reinforce", 1.0, False),
        ("ratio", 1.0, False),
        ("ratio", 1.0, True),
        ("dice", 1.0, False),
        ("loaded_dice", 1.0, False),
        ("loaded_dice", 0.7, False),
        ("loaded_dice", 0.0, False),
    ],
)
def test_first_and_second_derivatives_as_written_out(
    kind: Any, lam: float, whole: bool, discount: float, where: str
):
    ends = None if where == "one episode" else ENDS
    mask = MASK if "masked" in where else None

    def total(theta: Tensor) -> Tensor:
        terms = surrogate(
            curved(theta),
            SIGNAL,
            kind=kind,
            lam=lam,
            per_step_ratio=not whole,
            discount=discount,
            baseline=VALUE if kind == "dice" else None,
            ends=ends,
            mask=mask,
            reduction="none",
        )
        return terms.sum()

    first, second = written_out(kind, lam, discount, whole, ends, mask)
    torch.testing.assert_close(grad(total)(AT), first, rtol=0, atol=1e-12)
    torch.testing.assert_close(hessian(total)(AT), second, rtol=0, atol=1e-12)


def test_gradients_reach_advantages_discount_and_baseline():
    """A learned γ acts through the advantages; what is constant, the user detaches."""
    inputs = tuple(
        x.clone().requires_grad_()
        for x in (curved(AT), SIGNAL, VALUE, torch.tensor(0.8, dtype=torch.float64))
    )
    weights = smooth_noise(T, N, phase=8.0)

    def inner_gradient(log_probs: Tensor, signal: Tensor, value: Tensor, discount: Tensor):
        at = log_probs.detach().requires_grad_()
        found = surrogate(at, signal, kind="dice", discount=discount, baseline=value)
        return (torch.autograd.grad(found, at, create_graph=True)[0] * weights).sum()

    assert torch.autograd.gradcheck(lambda s, v, d: inner_gradient(inputs[0], s, v, d), inputs[1:])


def test_a_discount_per_step_is_that_of_what_follows():
    gamma = torch.tensor([0.5, 0.25, 0.125])
    terms = surrogate(torch.zeros(3), torch.ones(3), discount=gamma, reduction="none")
    assert terms.tolist() == [1.0, 0.5, 0.125]


def test_reductions():
    log_probs, signal = curved(AT), SIGNAL
    terms = surrogate(log_probs, signal, mask=MASK, reduction="none")
    torch.testing.assert_close(terms, torch.where(MASK, signal, 0.0))
    torch.testing.assert_close(surrogate(log_probs, signal, mask=MASK), terms.sum() / N)
    steps = surrogate(log_probs, signal, mask=MASK, reduction="steps")
    torch.testing.assert_close(steps, terms.sum() / MASK.sum())
    torch.testing.assert_close(surrogate(log_probs, signal, reduction="steps"), signal.mean())
    torch.testing.assert_close(surrogate(log_probs[:, 0], signal[:, 0]), signal[:, 0].sum())


def test_masked_entries_may_be_nan():
    log_probs = torch.where(MASK, curved(AT), float("nan")).requires_grad_()
    signal = torch.where(MASK, SIGNAL, float("inf"))
    value = surrogate(log_probs, signal, mask=MASK, ends=ENDS)
    (slope,) = torch.autograd.grad(value, log_probs, create_graph=True)
    assert slope.isfinite().all()
    assert (slope[~MASK] == 0).all()
    assert torch.autograd.grad(slope.square().sum(), log_probs)[0].isfinite().all()


# -- which surrogate for which objective -----------------------------------------------------------

RIGHT = [
    ("expected", {"kind": "loaded_dice"}),
    ("expected", {"kind": "dice"}),
    ("expected", {"kind": "ratio", "per_step_ratio": False}),
    ("expected", {"kind": "ratio", "steps": 1}),
    ("expected", {"kind": "loaded_dice", "lam": 0.5, "steps": 1}),
    ("sampled", {"kind": "reinforce", "score_term": True}),
]
BIASED = [
    ("expected", {"kind": "reinforce"}, "leaves out the effect of sampling", "loaded_dice"),
    ("expected", {"kind": "reinforce", "score_term": True}, "right for 'sampled'", "loaded_dice"),
    ("expected", {"kind": "ratio"}, "forgets how earlier actions", "loaded_dice"),
    ("expected", {"kind": "loaded_dice", "lam": 0.5}, "lam=0.5", "lam=1"),
    ("expected", {"kind": "dice", "score_term": True}, "twice", "without score_term"),
    ("sampled", {"kind": "reinforce"}, "leaves out the effect", "with score_term"),
    ("sampled", {"kind": "dice"}, r"O\(1/N\)", 'kind="reinforce" with score_term'),
    ("sampled", {"kind": "ratio", "score_term": True}, "twice", 'kind="reinforce"'),
]


@pytest.mark.parametrize(("objective", "options"), RIGHT)
def test_a_right_combination_passes(objective: Any, options: dict[str, Any]):
    assert check_objective(objective, **options)


@pytest.mark.parametrize(("objective", "options", "why", "instead"), BIASED)
def test_a_biased_combination_warns_and_names_the_right_one(
    objective: Any, options: dict[str, Any], why: str, instead: str
):
    with pytest.warns(innerloop.BiasedSurrogateWarning, match=why) as caught:
        assert not check_objective(objective, **options)
    assert instead in str(caught[0].message).rpartition("write")[2]


def test_the_surrogate_itself_warns():
    log_probs, signal = curved(AT), SIGNAL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surrogate(log_probs, signal, objective="expected")
        surrogate(log_probs, signal, kind="reinforce", objective="sampled", with_score_term=True)
        surrogate(log_probs[:1], signal[:1], kind="ratio", objective="expected")
    with pytest.warns(BiasedSurrogateWarning, match="earlier actions"):
        surrogate(log_probs, signal, kind="ratio", objective="expected")


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": torch.zeros(T, N, 4)}, r"log_probs.sum\(-1\)"),
        ({"log_probs": torch.zeros(T)}, "log_probs has shape"),
        ({"log_probs": torch.zeros(T, N, dtype=torch.long)}, "not a floating-point"),
        ({"advantages": torch.zeros(T, N, dtype=torch.long)}, "advantages.float()"),
        ({"ends": torch.zeros(T, N)}, r"ends.bool\(\)"),
        ({"mask": torch.zeros(T, dtype=torch.bool)}, "mask has shape"),
        ({"baseline": torch.zeros(T, N)}, "subtract it from the advantages"),
        ({"kind": "ratio", "lam": 0.5}, "belongs to kind=.loaded_dice"),
        ({"per_step_ratio": False}, "belongs to kind=.ratio"),
        ({"lam": 1.5}, "between 0 and 1"),
        ({"discount": -1.0}, "between 0 and 1"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str):
    args = {"log_probs": torch.zeros(T, N), "advantages": torch.zeros(T, N), **change}
    with pytest.raises(InvalidInputError, match=message):
        surrogate(**args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lvc"}, "write one of"),
        ({"reduction": "sum"}, "write one of"),
        ({"objective": "both"}, "write one of"),
        ({"lam": torch.tensor(0.5)}, "nothing to learn"),
    ],
)
@pytest.mark.usefixtures("types_unchecked")
def test_unknown_choices_are_refused_by_name(change: dict[str, Any], message: str):
    with pytest.raises(InvalidInputError, match=message):
        surrogate(torch.zeros(T, N), torch.zeros(T, N), **change)


def test_a_score_term_of_stored_log_probabilities_is_refused():
    """It would be zero without a word."""
    constant, value = torch.zeros(3), torch.tensor(2.0)
    with pytest.raises(InvalidInputError, match=r"policy.log_prob\(rollout.actions\)"):
        score_term(constant, value)
    with torch.no_grad():
        assert score_term(constant, value) == 0
    at = torch.ones(2, 3)
    mean = lambda x: vmap(lambda y: score_term(2 * y, value))(x).mean()  # noqa: E731
    assert (grad(mean)(at) == 2).all()
    assert torch.func.jvp(lambda x: score_term(x, value), (at,), (at,))[1] == 12
    assert (vmap(grad(lambda x: score_term(x, value)))(at) == 2).all()


def test_a_score_term_has_one_outer_value():
    with pytest.raises(InvalidInputError, match="one number"):
        score_term(torch.zeros(3), torch.zeros(3))
