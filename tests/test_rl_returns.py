"""Returns and advantages against their definitions, written out number by number, and TorchRL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from innerloop.errors import InvalidInputError
from innerloop.rl import discounted_returns, gae, lambda_returns, next_values
from tests.oracles import smooth_noise

T, N = 6, 3


def data(steps: int = T, columns: int = N) -> dict[str, Any]:
    """Rewards and values, with every way an episode can end, one in the last row too."""
    flags = smooth_noise(2, steps, columns, phase=4.0)
    return {
        "rewards": smooth_noise(steps, columns),
        "values": 2 * smooth_noise(steps, columns, phase=1.0),
        "last_value": 2 * smooth_noise(columns, phase=2.0),
        "final_values": 3 * smooth_noise(steps, columns, phase=3.0),
        "terminated": flags[0] > 0.6,
        "truncated": flags[1] > 0.5,
    }


def value_after(d: dict[str, Any], t: int, n: int) -> float:
    """The value of the state that step t of column n led to."""
    if d["terminated"][t, n]:
        return 0.0
    if d["truncated"][t, n]:
        return d["final_values"][t, n].item()
    return (d["values"][t + 1, n] if t + 1 < len(d["rewards"]) else d["last_value"][n]).item()


def returns_by_definition(d: dict[str, Any], gamma: float, lam: float) -> Tensor:
    """The λ-return as the weighted mean of the n-step returns of the rest of the episode."""
    rewards = d["rewards"]
    found = torch.zeros_like(rewards)
    for n in range(rewards.shape[1]):
        for t in range(rewards.shape[0]):
            so_far, weight = 0.0, 1.0
            for k in range(t, rewards.shape[0]):
                so_far += gamma ** (k - t) * rewards[k, n].item()
                n_step = so_far + gamma ** (k - t + 1) * value_after(d, k, n)
                over = bool(d["terminated"][k, n] or d["truncated"][k, n])
                if over or k + 1 == rewards.shape[0]:
                    found[t, n] += weight * n_step
                    break
                found[t, n] += weight * (1 - lam) * n_step
                weight *= lam
    return found


def test_the_data_have_every_end():
    d = data()
    both = d["terminated"] & d["truncated"]
    assert both.any()
    assert (d["terminated"] & ~both).any()
    assert (d["truncated"] & ~both).any()
    assert not (d["terminated"] | d["truncated"]).all(0).any()


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_returns_are_those_of_the_definition(gamma: float, lam: float):
    d = data()
    expected = returns_by_definition(d, gamma, lam)
    advantages, returns = gae(**d, gamma=gamma, lam=lam)
    torch.testing.assert_close(returns, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(advantages, expected - d["values"], rtol=0, atol=1e-12)
    found = lambda_returns(**d, gamma=gamma, lam=lam)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if lam == 1:
        del d["values"]
        found = discounted_returns(**d, gamma=gamma)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_nothing_follows_a_termination_and_the_last_value_follows_a_truncation():
    ends = {"terminated": torch.tensor([False, True]), "truncated": torch.tensor([False, False])}
    flipped = {"terminated": ends["truncated"], "truncated": ends["terminated"]}
    numbers: dict[str, Any] = {"gamma": 0.5, "lam": 1.0, "final_values": torch.tensor([100.0, 8.0])}
    rewards = torch.ones(2)
    numbers |= {
        "rewards": rewards,
        "values": torch.zeros(2),
        "last_value": torch.tensor(1000.0),
    }
    assert gae(**ends, **numbers).returns.tolist() == [1.5, 1.0]
    assert gae(**flipped, **numbers).returns.tolist() == [3.5, 5.0]
    assert discounted_returns(rewards, gamma=0.5).tolist() == [1.5, 1.0]


def forms(value: float) -> dict[str, Tensor]:
    """γ or λ in every form that is allowed."""
    return {
        "scalar": torch.tensor(value, dtype=torch.float64),
        "per step": value + smooth_noise(T, phase=5.0) / 20,
        "per environment": value + smooth_noise(1, N, phase=6.0) / 20,
        "per state": value + smooth_noise(T, N, phase=7.0) / 20,
    }


@pytest.mark.parametrize("form", forms(0.5))
@pytest.mark.parametrize("function", [gae, lambda_returns, discounted_returns])
def test_derivatives_equal_finite_differences_in_every_argument(function: Any, form: str):
    d = data()
    flags = {name: d.pop(name) for name in ("terminated", "truncated")}
    d |= {"gamma": forms(0.8)[form], "lam": forms(0.6)[form]}
    if function is discounted_returns:
        del d["values"], d["lam"]
    inputs = tuple(x.clone().requires_grad_() for x in d.values())

    def call(*args: Tensor) -> Any:
        return function(**dict(zip(d, args, strict=True)), **flags)

    torch.autograd.gradcheck(call, inputs)
    torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_derivatives_exist_at_the_ends_of_the_range(gamma: float):
    d = data()
    where = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (gamma, 1 - gamma)]
    torch.autograd.gradcheck(lambda a, b: gae(**d, gamma=a, lam=b), where)


def test_one_value_per_step_counts_at_that_step():
    """γ of step t multiplies what follows it; so does λ."""
    rewards, values = torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3)
    gamma, lam = torch.tensor([0.5, 0.25, 0.125]), torch.tensor([1.0, 0.5, 0.0])
    found = gae(rewards, values, torch.tensor(16.0), gamma=gamma, lam=lam).advantages
    last = 4 + 0.125 * 16
    middle = 2 + 0.25 * 0.5 * last
    assert found.tolist() == [1 + 0.5 * 1.0 * middle, middle, last]
    assert discounted_returns(rewards, gamma=gamma).tolist() == [1 + 0.5 * (2 + 0.25 * 4), 3.0, 4.0]


def test_numbers_and_tensors_give_the_same():
    d = data()
    for one, other in zip(
        gae(**d, gamma=0.9, lam=0.8),
        gae(
            **d,
            gamma=torch.tensor(0.9, dtype=torch.float64),
            lam=torch.full((T, N), 0.8, dtype=torch.float64),
        ),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-15)


def test_any_number_of_dimensions_after_time():
    d = data()
    one = gae(**{name: x[..., 1] for name, x in d.items()}, gamma=0.9, lam=0.8)
    more = gae(**{name: x[..., None] for name, x in d.items()}, gamma=0.9, lam=0.8)
    expected = gae(**d, gamma=0.9, lam=0.8).advantages
    torch.testing.assert_close(one.advantages, expected[:, 1])
    torch.testing.assert_close(more.advantages[..., 0], expected)


def test_vmap_over_tasks_with_a_discount_each():
    d = data()
    gammas = torch.tensor([0.5, 0.9], dtype=torch.float64)
    found = torch.func.vmap(lambda g: torch.func.grad(lambda g: total(d, g))(g))(gammas)
    each = [torch.func.jvp(lambda g: total(d, g), (g,), (torch.ones_like(g),))[1] for g in gammas]
    torch.testing.assert_close(found, torch.stack(each))


def total(d: dict[str, Any], gamma: Tensor) -> Tensor:
    return gae(**d, gamma=gamma, lam=gamma / 2).advantages.square().sum()


def test_values_that_are_never_read_may_be_nan():
    d = data()
    ended = d["terminated"] | d["truncated"]
    d["final_values"] = d["final_values"].masked_fill(~ended | d["terminated"], float("nan"))
    gamma = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    found = gae(**d, gamma=gamma, lam=0.8).advantages
    assert found.isfinite().all()
    assert torch.autograd.grad(found.sum(), gamma)[0].isfinite()
    del d["values"]
    assert discounted_returns(**d, gamma=gamma).isfinite().all()


def test_next_values_serve_rollouts_that_keep_the_last_observation_in_the_next_row():
    """Gymnasium's NEXT_STEP autoreset: row 2 holds the state in which the episode was cut."""
    values, rewards = torch.tensor([1.0, 2.0, 64.0, 4.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    truncated = torch.tensor([False, True, False, False])
    last = torch.tensor(8.0)
    final = next_values(values, last)
    assert final.tolist() == [2.0, 64.0, 4.0, 8.0]
    found = lambda_returns(
        rewards, values, last, gamma=0.5, lam=1.0, truncated=truncated, final_values=final
    )
    assert found[:2].tolist() == [1 + 0.5 * 33, 33.0]


# -- TorchRL ---------------------------------------------------------------------------------------


def torchrl_arguments(d: dict[str, Any], of_gae: bool) -> dict[str, Tensor]:
    """TorchRL takes [batch, time, 1], and the values after each step."""
    after = next_values(d["values"], d["last_value"])
    after = torch.where(d["truncated"], d["final_values"], after)
    named = {
        **({"state_value": d["values"]} if of_gae else {}),
        "next_state_value": after,
        "reward": d["rewards"],
        "done": d["terminated"] | d["truncated"],
        "terminated": d["terminated"],
    }
    return {name: x.T.unsqueeze(-1) for name, x in named.items()}


def both_ways(function: Any, ours: Any, d: dict[str, Any]) -> list[list[Any]]:
    """Result and gradients by γ and λ, of TorchRL and of ours."""
    found = []
    for call in (
        lambda a, b: function(a, b, **torchrl_arguments(d, ours is gae)),
        lambda a, b: ours(**d, gamma=a, lam=b),
    ):
        at = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.9, 0.8)]
        result = call(*at)
        result = result[0] if isinstance(result, tuple) else result
        result = result.squeeze(-1).T if result.ndim == 3 else result
        weights = smooth_noise(*result.shape, phase=9.0)
        found.append(
            [result, *torch.autograd.grad((weights * result).sum(), at, allow_unused=True)]
        )
    return found


def ones(steps: int) -> dict[str, Any]:
    """Rewards and values of 1, and no end."""
    never = torch.zeros(steps, 1, dtype=torch.bool)
    one = torch.ones(steps, 1, dtype=torch.float64)
    return {
        **dict.fromkeys(("rewards", "values", "final_values"), one),
        "last_value": one[0],
        **dict.fromkeys(("terminated", "truncated"), never),
    }


def test_derivatives_by_gamma_and_lambda_have_the_values_of_the_formula():
    """Every error is δ = γ, so Σ A = γ Σ_k (T - k) (γλ)^k, at γ = .95, λ = .9, T = 100.

    TorchRL 0.14's vectorised form, which agrees in value, has the derivatives 649.0 and None here:
    it takes the factors (γλ)^k for constants, and what is left is Σ_k (T - k) (γλ)^k.
    """
    steps, numbers = 100, (0.95, 0.9)
    gamma, lam = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in numbers)
    found = gae(**ones(steps), gamma=gamma, lam=lam).advantages.sum()
    x = numbers[0] * numbers[1]
    constant = sum((steps - k) * x**k for k in range(steps))
    slope = sum((steps - k) * k * x ** (k - 1) for k in range(1, steps))
    assert found.item() == pytest.approx(numbers[0] * constant, rel=1e-12)
    by_gamma, by_lam = torch.autograd.grad(found, (gamma, lam))
    assert by_gamma.item() == pytest.approx(constant + x * slope, rel=1e-12)
    assert by_lam.item() == pytest.approx(numbers[0] ** 2 * slope, rel=1e-12)
    rounded = [round(float(v), 1) for v in (by_gamma, by_lam, constant)]
    assert rounded == [4195.3, 3743.4, 649.0]


@pytest.mark.parametrize("name", ["generalized_advantage_estimate", "td_lambda_return_estimate"])
def test_equals_the_loops_of_torchrl(name: str):
    peer = pytest.importorskip("torchrl.objectives.value.functional")
    ours = gae if "advantage" in name else lambda_returns
    theirs, found = both_ways(getattr(peer, name), ours, data())
    for a, b in zip(theirs, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["generalized_advantage_estimate", "td_lambda_return_estimate"])
def test_the_vectorised_forms_of_torchrl_lose_gradients(name: str):
    """Why ours is a loop: theirs agree in value, but not in the derivatives by γ and λ."""
    peer = pytest.importorskip("torchrl.objectives.value.functional")
    ours = gae if "advantage" in name else lambda_returns
    theirs, found = both_ways(getattr(peer, f"vec_{name}"), ours, data())
    torch.testing.assert_close(theirs[0], found[0], rtol=1e-9, atol=1e-9)
    lost = [a is None or abs(a - b) > 1e-3 for a, b in zip(theirs[1:], found[1:], strict=True)]
    if not any(lost):
        pytest.skip("this version of TorchRL has mended it")


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(0, N).double()}, "holds no step"),
        ({"rewards": torch.zeros(T, N, dtype=torch.long)}, "rewards.float()"),
        ({"values": torch.zeros(T, N, 1).double()}, r"squeeze\(-1\)"),
        ({"last_value": torch.zeros(()).double()}, "last_value has shape"),
        ({"terminated": torch.zeros(T, N).double()}, r"terminated.bool\(\)"),
        ({"truncated": torch.zeros(T, dtype=torch.bool)}, "truncated has shape"),
        ({"final_values": None}, r"next_values\(values, last_value\)"),
        ({"gamma": 1.5}, "between 0 and 1"),
        ({"lam": -0.1}, "between 0 and 1"),
        ({"gamma": torch.zeros(N).double()}, r"\[1, N\]"),
        ({"lam": torch.zeros(T, N, 1).double()}, "does not fit"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str):
    args = {**data(), "gamma": 0.9, "lam": 0.9, **change}
    for function in (gae, lambda_returns):
        with pytest.raises(InvalidInputError, match=message):
            function(**args)


def test_next_values_checks_the_last_one():
    with pytest.raises(InvalidInputError, match="last_value has shape"):
        next_values(torch.zeros(T, N), torch.zeros(N + 1))
