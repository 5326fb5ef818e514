"""Every rule under every exact strategy, and once more under the usual default dtype; random
settings for rules on whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import innerloop
from tests.fuzz.rules import RULES
from tests.optimizers import Rule, accepted, defaults, each_rule, leaf, leaves, override, read
from tests.optimizers import train as train_rule
from tests.oracles import (
    NoDerivative,
    Params,
    Task,
    assert_derivative,
    assert_params,
    directional,
    directions,
    inner,
    smooth_noise,
    torch_run,
)
from tests.test_per_tensor_rules import (
    SHAPES,
    gradient,
    meta_gradient,
    outer,
    sparse_loss,
    start,
    train,
)

STEPS = 5
STRATEGIES = (
    innerloop.Checkpointed(slots=2),
    innerloop.Checkpointed(slots="all", product="mixed"),
    innerloop.Checkpointed(slots=2, save="gradients"),
    innerloop.ForwardMode(),
)
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)


def gradients_under(
    strategy: Any, problem: innerloop.Problem, params: Params, hyper: Params, value: Any
) -> tuple[Params, dict[str, Params]]:
    """The final parameters, and the outer gradient in those of the two that the strategy
    differentiates."""
    given = {"params": leaves(params), "hyper": leaves(hyper)}
    given = {
        kind: tensors if kind in strategy.differentiates else {} for kind, tensors in given.items()
    }
    traj = innerloop.unroll(
        problem,
        given["params"] or params,
        list(torch.arange(STEPS)),
        hyper=given["hyper"],
        strategy=strategy,
    )
    flat = [t for tensors in given.values() for t in tensors.values()]
    found = iter(torch.autograd.grad(value(traj.params), flat))
    return traj.params, {
        kind: {name: next(found) for name in tensors} for kind, tensors in given.items()
    }


def compare(
    strategy: Any, problem: innerloop.Problem, params: Params, hyper: Params, value: Any
) -> None:
    truth_params, truth = gradients_under(innerloop.StoreAll(), problem, params, hyper, value)
    found_params, found = gradients_under(strategy, problem, params, hyper, value)
    assert_params(found_params, truth_params, 1e-12)
    assert any(found.values())
    for kind, tensors in found.items():
        assert_params(tensors, {name: truth[kind][name] for name in tensors}, 1e-10)
        assert all(t.abs().max() > 0 for t in tensors.values() if t.numel())


@pytest.mark.usefixtures("float64")
@each_strategy
@each_rule()
def test_an_exact_strategy_gives_the_gradients_of_store_all(rule: Rule, strategy: Any):
    """In the initial parameters and in every hyper-parameter of the rule."""
    task, full = Task(), defaults(rule, rule.typical)
    hyper = {name: torch.tensor(float(read(full, name))) for name in rule.smooth(full)}
    problem = innerloop.Problem(
        lambda params, hyper, t: task.loss(params, t),
        rule.make(**rule.typical),
        optimizer_hyper=lambda hyper, t: override(rule, rule.typical, hyper),
    )
    if rule.name == "radam":  # its second moment is not used yet after these steps
        hyper = {name: value for name, value in hyper.items() if name not in ("betas.1", "eps")}
    compare(strategy, problem, task.params(), hyper, task.outer)


WHOLE: dict[str, tuple[innerloop.optim.Optimizer, Params]] = {
    "adafactor": (
        innerloop.optim.adafactor(),
        {"lr": torch.tensor(0.05), "weight_decay": torch.tensor(0.1)},
    ),
    "muon": (
        innerloop.optim.muon(ns_dtype=torch.float64),
        {
            "lr": torch.tensor(0.05),
            "momentum": torch.tensor(0.9),
            "weight_decay": torch.tensor(0.1),
        },
    ),
}


@pytest.mark.usefixtures("float64")
@each_strategy
@pytest.mark.parametrize("name", WHOLE)
def test_an_exact_strategy_takes_rules_on_whole_tensors(name: str, strategy: Any):
    optimizer, hyper = WHOLE[name]
    names = ("wide", "tall") if name == "muon" else tuple(SHAPES)
    problem = innerloop.Problem(loss_of, optimizer, optimizer_hyper=lambda hyper, t: hyper)
    hyper = {key: value.double() for key, value in hyper.items()}
    compare(strategy, problem, start(names), hyper, outer)


def loss_of(params: Params, hyper: Any, t: Tensor) -> Tensor:
    shift = torch.stack([p.sum() for p in params.values()]).sum().sin() / 10
    terms = [((p + shift + 0.1 * t).sin() + 0.3 * p**2).sum() for p in params.values()]
    return (1 + 0.5 * t) * torch.stack(terms).sum()


@pytest.mark.usefixtures("float64")
@each_strategy
def test_sparse_gradients_are_right_under_an_exact_strategy_or_refused_by_name(strategy: Any):
    """torch has no forward mode through sparse tensors."""
    problem = innerloop.Problem(
        lambda params, hyper, t: sparse_loss(params["w"], int(t)),
        innerloop.optim.sparse_adam(lr=0.05, eps=1e-2),
        optimizer_hyper=lambda hyper, t: hyper,
    )
    case = (strategy, problem, {"w": smooth_noise(6, 3)}, {"lr": torch.tensor(0.05)}, outer)
    if getattr(strategy, "product", "forward") in ("forward", "mixed"):
        with pytest.raises(
            innerloop.NotDifferentiableError, match=r"forward-mode derivatives.* write "
        ):
            compare(*case)
    else:
        compare(*case)


@each_rule()
def test_forward_under_the_usual_default_dtype(rule: Rule):
    """torch keeps NAdam's ``mu_product`` and ASGD's ``eta`` in the default dtype; nothing else may
    depend on it."""
    assert torch.get_default_dtype() == torch.float32
    task, tolerance = Task(), 1e-8 if rule.name in ("nadam", "asgd") else 1e-12
    params = task.params()
    for settings in accepted(rule):
        truth = torch_run(rule.torch, {**settings, "foreach": False}, params, task.gradient, 10)
        assert_params(train_rule(rule.make(**settings), task, params, steps=10), truth, tolerance)


@st.composite
def random_adafactor(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "lr": draw(st.floats(1e-3, 0.5)),
        "beta2_decay": draw(st.floats(-1.0, -0.1)),
        "d": draw(st.floats(1.0, 3.0)),
        "weight_decay": draw(st.floats(0.0, 0.5)),
        "eps": (draw(st.sampled_from([None, 1e-3, 0.1])), draw(st.floats(1e-3, 0.5))),
        "maximize": draw(st.booleans()),
    }


@st.composite
def random_muon(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "lr": draw(st.floats(1e-3, 0.3)),
        "weight_decay": draw(st.floats(0.0, 0.5)),
        "momentum": draw(st.floats(0.0, 0.98)),
        "nesterov": draw(st.booleans()),
        "ns_steps": draw(st.integers(1, 6)),
        "adjust_lr_fn": draw(st.sampled_from([None, "original", "match_rms_adamw"])),
    }


@given(random_adafactor())
@hypothesis_settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@pytest.mark.usefixtures("float64")
def test_random_settings_of_adafactor(settings: dict[str, Any]):
    truth = torch_run(
        torch.optim.Adafactor, {**settings, "foreach": False}, start(), gradient, STEPS
    )
    assert_params(train(innerloop.optim.adafactor(**settings), start()), truth, 1e-11)
    values = {name: settings[name] for name in ("lr", "beta2_decay", "weight_decay")}
    ours = meta_gradient(innerloop.optim.adafactor, settings, start(), values)
    along = (
        directions(start(), 1)[0],
        {"lr": 0.1 * settings["lr"], "beta2_decay": 0.05, "weight_decay": 0.02},
    )

    def of_torch(at: Any) -> float:
        return float(
            outer(torch_run(torch.optim.Adafactor, {**settings, **at[1]}, at[0], gradient, STEPS))
        )

    try:
        slope = directional(of_torch, (start(), values), along)
    except (NoDerivative, ValueError):  # a kink (its clipping), or a value that torch refuses
        assume(False)
    assert_derivative(inner(ours, along), slope, str(settings), absolute=1e-8)


@given(random_muon())
@hypothesis_settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@pytest.mark.usefixtures("float64")
def test_random_settings_of_muon_have_every_bit_of_torch(settings: dict[str, Any]):
    params = start(("wide", "tall"))
    truth = torch_run(torch.optim.Muon, settings, params, gradient, STEPS)
    assert_params(train(innerloop.optim.muon(**settings), params, None, gradient), truth, 0)
    rate = leaf(settings["lr"])
    found = torch.autograd.grad(
        outer(train(innerloop.optim.muon(**settings), params, {"lr": rate})), rate
    )[0]
    assert found.isfinite()


AT_DEFAULTS = [name for name in RULES if name not in ("sparse adam", "lbfgs", "adapted")]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("under", ["autograd", "vmap"])
@pytest.mark.parametrize("name", AT_DEFAULTS)
def test_finite_products_where_part_of_the_gradient_is_zero(name: str, under: str):
    """At a zero gradient the derivative of Adam's update is lr / eps, 1e7 times that elsewhere; so
    large an entry of the direction must not keep the others from moving."""
    rule = RULES[name].ours(lr=0.1)

    def value(strategy: Any) -> Any:
        def outer_loss(w: Tensor, h: Tensor) -> Tensor:
            problem = innerloop.Problem(
                lambda p, h, t: (p["w"][:1].sin() * (t + 1)).sum() + h * p["w"][:1].square().sum(),
                rule,
            )
            batches = [torch.tensor(float(t)) for t in range(3)]
            traj = innerloop.unroll(problem, {"w": w}, batches, hyper=h, strategy=strategy)
            return (traj.params["w"] ** 3).sum()

        return outer_loss

    w, h = torch.linspace(-1, 1, 6).reshape(2, 3), torch.tensor(0.3)
    found = []
    for strategy in (innerloop.Checkpointed(product="finite"), innerloop.StoreAll()):
        gradient = torch.func.grad(value(strategy), (0, 1))
        if under == "vmap" and not isinstance(strategy, innerloop.StoreAll):
            of_both = torch.func.vmap(gradient)(torch.stack([w, -w]), torch.stack([h, h]))
            found.append([g[0] for g in of_both])
        elif under == "vmap":
            found.append(list(gradient(w, h)))
        else:
            leaves_ = w.clone().requires_grad_(), h.clone().requires_grad_()
            found.append(list(torch.autograd.grad(value(strategy)(*leaves_), leaves_)))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-6 * max(1.0, float(b.abs().max()))
