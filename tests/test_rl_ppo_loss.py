"""The PPO loss against one written by hand with torch.min and clamp, its derivatives against finite
differences, its diagnostics against their definitions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from innerloop.errors import InvalidInputError
from innerloop.rl import PPOLoss, ppo_loss
from tests.oracles import smooth_noise

N = 24


def arguments() -> dict[str, Any]:
    old = smooth_noise(N) - 1
    return {
        "log_probs": old + 0.4 * smooth_noise(N, phase=1.0),
        "old_log_probs": old,
        "advantages": smooth_noise(N, phase=2.3) + 0.2,
        "values": smooth_noise(N, phase=3.0),
        "returns": smooth_noise(N, phase=4.0) + smooth_noise(N, phase=3.0),
        "old_values": 0.9 * smooth_noise(N, phase=3.0) + 0.2 * smooth_noise(N, phase=5.0),
        "entropy": 1 + smooth_noise(N, phase=6.0) / 2,
    }


def by_hand(
    d: dict[str, Tensor],
    clip: float,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    normalize: bool,
) -> Tensor:
    """As in CleanRL, which follows Huang et al., "The 37 implementation details of PPO", 2022."""
    a = d["advantages"]
    if normalize:
        a = (a - a.mean()) / (a.std() + 1e-8)
    ratio = (d["log_probs"] - d["old_log_probs"]).exp()
    policy = torch.max(-a * ratio, -a * torch.clamp(ratio, 1 - clip, 1 + clip)).mean()
    error = (d["values"] - d["returns"]) ** 2
    if value_clip is not None:
        near = d["old_values"] + torch.clamp(d["values"] - d["old_values"], -value_clip, value_clip)
        error = torch.max(error, (near - d["returns"]) ** 2)
    return policy + value_coef * 0.5 * error.mean() - entropy_coef * d["entropy"].mean()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value_clip", [None, 0.1])
def test_equals_the_loss_written_by_hand(value_clip: float | None, normalize: bool):
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for make, results in ((by_hand, expected), (None, found)):
        d = arguments()
        learned = [d[name].requires_grad_() for name in d if not name.startswith("old")]
        settings: dict[str, Any] = {
            "clip": 0.2,
            "value_clip": value_clip,
            "value_coef": 0.5,
            "entropy_coef": 0.01,
            "normalize": normalize,
        }
        loss = by_hand(d, **settings) if make else ppo_loss(**d, **settings).loss
        results += [loss, *torch.autograd.grad(loss, learned)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_parts_make_up_the_loss():
    d = arguments()
    out = ppo_loss(**d, value_coef=0.7, entropy_coef=0.3)
    torch.testing.assert_close(out.loss, out.policy + 0.7 * out.value - 0.3 * out.entropy)
    torch.testing.assert_close(out.entropy, d["entropy"].mean())
    torch.testing.assert_close(out.value, (d["values"] - d["returns"]).square().mean() / 2)
    assert isinstance(out, PPOLoss)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value_clip", [False, True])
def test_derivatives_equal_finite_differences_in_every_argument(value_clip: bool, masked: bool):
    d = arguments()
    old: dict[str, Any] = {name: d.pop(name) for name in ("old_log_probs", "old_values")}
    numbers = ["clip", "value_coef", "entropy_coef", *(["value_clip"] if value_clip else [])]
    tensors = {name: torch.tensor(0.23 + i / 10).double() for i, name in enumerate(numbers)}
    d |= tensors
    mask = smooth_noise(N, phase=7.0) > -0.6 if masked else None

    def call(*args: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(d, args, strict=True))
        return ppo_loss(**given, **old, mask=mask).loss

    inputs = tuple(x.clone().requires_grad_() for x in d.values())
    torch.autograd.gradcheck(call, inputs)
    torch.autograd.gradgradcheck(call, inputs)


def test_some_are_clipped_at_either_side_and_none_at_an_edge():
    """What the derivatives above rely on."""
    d = arguments()
    ratio = (d["log_probs"] - d["old_log_probs"]).exp()
    for clip in (0.2, 0.23):
        above, below = ratio > 1 + clip, ratio < 1 - clip
        up = d["advantages"] > 0
        assert all(x.any() for x in (above & up, above & ~up, below & up, below & ~up))
        assert (torch.stack([ratio - 1 - clip, ratio - 1 + clip]).abs() > 1e-4).all()


def test_normalisation_is_differentiated():
    """A shift or a scale of all advantages changes nothing, so the gradient has no part along
    either."""
    d = arguments()
    a = d["advantages"].requires_grad_()
    (slope,) = torch.autograd.grad(ppo_loss(**d).loss, a)
    assert slope.abs().max() > 1e-3
    assert slope.sum().abs() < 1e-12
    assert (slope * a).sum().abs() < 1e-7


def test_a_mask_leaves_out_samples_whatever_they_hold():
    d = arguments()
    mask = smooth_noise(N, phase=7.0) > -0.3
    expected = ppo_loss(
        **{name: x[mask] for name, x in d.items()}, value_clip=0.1, entropy_coef=0.1
    )
    for name in d:
        d[name] = torch.where(mask, d[name], float("nan"))
    learned = [x.requires_grad_() for name, x in d.items() if not name.startswith("old")]
    found = ppo_loss(**d, mask=mask, value_clip=0.1, entropy_coef=0.1)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = torch.autograd.grad(found.loss, learned, create_graph=True)
    assert all(g.isfinite().all() for g in grads)
    squares = torch.stack([g.square().sum() for g in grads]).sum()
    second = torch.autograd.grad(squares, learned, materialize_grads=True)
    assert all(g.isfinite().all() for g in second)


def test_a_fully_clipped_minibatch_has_the_gradient_zero():
    advantages = torch.tensor([1.0, -1.0, 2.0]).double().requires_grad_()
    old = torch.zeros(3).double()
    # the third ratio overflows
    new = torch.tensor([0.5, -0.5, 1000.0]).double().requires_grad_()
    clip = torch.tensor(0.2).double().requires_grad_()
    out = ppo_loss(new, old, advantages, clip=clip, normalize=False)
    assert out.clip_fraction == 1
    assert out.loss.item() == pytest.approx(-(1.2 - 0.8 + 2.4) / 3)
    slopes = torch.autograd.grad(out.loss, (new, advantages, clip), create_graph=True)
    assert slopes[0].tolist() == [0, 0, 0]
    assert slopes[1].tolist() == pytest.approx([-0.4, -0.8 / 3, -0.4])
    assert slopes[2].item() == pytest.approx(-(1 + 1 + 2) / 3)
    second = torch.autograd.grad(slopes[0].sum(), new, allow_unused=True)[0]
    assert second is None or second.tolist() == [0, 0, 0]


def test_equal_advantages_normalise_to_zero_with_finite_derivatives():
    a = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    new = torch.zeros(4).double().requires_grad_()
    out = ppo_loss(new, torch.zeros(4).double(), a)
    slopes = torch.autograd.grad(out.loss, (a, new), create_graph=True)
    assert slopes[1].tolist() == [0, 0, 0, 0]
    assert slopes[0].isfinite().all()
    assert torch.autograd.grad(slopes[1][0], a)[0].isfinite().all()


def test_diagnostics():
    d = arguments()
    d["log_probs"].requires_grad_()
    out = ppo_loss(**d)
    log_ratio = (d["log_probs"] - d["old_log_probs"]).detach()
    assert out.approx_kl.item() == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item())
    outside = ((log_ratio.exp() - 1).abs() > 0.2).double().mean()
    assert out.clip_fraction.item() == pytest.approx(outside.item())
    rest = (d["returns"] - d["old_values"]).var() / d["returns"].var()
    assert out.explained_variance.item() == pytest.approx(1 - rest.item())
    assert not any(x.requires_grad for x in out[4:])


def test_explained_variance_of_a_perfect_and_of_no_critic():
    d = arguments()
    perfect = {**d, "old_values": d["returns"]}
    assert ppo_loss(**perfect).explained_variance.item() == pytest.approx(1)
    flat = {**d, "returns": torch.ones(N).double()}
    assert ppo_loss(**flat).explained_variance.isnan()
    actor = {name: d[name] for name in ("log_probs", "old_log_probs", "advantages")}
    out = ppo_loss(**actor)
    assert out.explained_variance.isnan()
    assert out.value == 0
    assert out.entropy == 0
    torch.testing.assert_close(out.loss, out.policy)


def test_under_vmap():
    d = arguments()
    batched: dict[str, Any] = {name: torch.stack([x, x.flip(0) / 2]) for name, x in d.items()}
    found = torch.func.vmap(lambda d: ppo_loss(**d, value_clip=0.1, entropy_coef=0.1))(batched)
    for i in range(2):
        one = ppo_loss(
            **{name: x[i] for name, x in batched.items()}, value_clip=0.1, entropy_coef=0.1
        )
        for a, b in zip(found, one, strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": torch.zeros(N, 2).double()}, r"log_probs.sum\(-1\)"),
        ({"old_log_probs": torch.zeros(N, 1).double()}, "old_log_probs has shape"),
        ({"values": torch.zeros(N, 1).double()}, r"squeeze\(-1\)"),
        ({"old_log_probs": torch.zeros(N).double().requires_grad_()}, r"old_log_probs.detach\(\)"),
        ({"old_values": torch.zeros(N).double().requires_grad_()}, "old_values requires grad"),
        ({"returns": None}, "values is given without returns"),
        ({"values": None}, "returns is given without values"),
        ({"old_values": None, "value_clip": 0.2}, "value_clip needs old_values"),
        ({"mask": torch.ones(N).double()}, r"mask.bool\(\)"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str):
    with pytest.raises(InvalidInputError, match=message):
        ppo_loss(**{**arguments(), **change})


def test_one_sample_cannot_be_normalised():
    one = torch.zeros(1)
    with pytest.raises(InvalidInputError, match="normalize=False"):
        ppo_loss(one, one, one)
    assert ppo_loss(one, one, one, normalize=False).loss == 0
