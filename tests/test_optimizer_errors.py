"""Bad input to an optimizer: the error says what was passed and what to write instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import innerloop
from innerloop import InvalidInputError, optim
from tests.optimizers import (
    MADE,
    RULES,
    Rule,
    each_hyper,
    each_rule,
    override,
    refused,
    replace,
)
from tests.oracles import Task, accepts

NAMES = tuple(Task().params())


@each_rule()
def test_settings_that_torch_refuses_are_refused(rule: Rule):
    for settings in refused(rule):
        with pytest.raises(innerloop.InnerLoopError):
            rule.make(**settings)


TAKEN_FROM_ANYWHERE = ("dampening", "alpha", "lambd", "step_sizes.0", "step_sizes.1")


@each_hyper()
def test_values_that_torch_refuses_are_refused_with_their_name(rule: Rule, name: str):
    candidates = (-0.1, 1.0, 1.5) if name.startswith("betas") else (-0.1,)
    values = [
        value
        for value in candidates
        if not accepts(rule.torch, replace(rule.typical, {name: value}))
    ]
    assert values == list(candidates) or name in TAKEN_FROM_ANYWHERE
    optimizer, params = rule.make(**rule.typical), Task().params()
    for value in values:
        message = rf"{name.partition('.')[0]}.*{value}"
        with pytest.raises(innerloop.InnerLoopError, match=message):
            rule.make(**replace(rule.typical, {name: value}))
        with pytest.raises(innerloop.InnerLoopError, match=message):
            optimizer.update(
                params, optimizer.init(params), params, override(rule, rule.typical, {name: value})
            )


@each_rule()
def test_a_rate_that_is_no_number_is_refused(rule: Rule):
    """torch takes it, and trains to NaN."""
    with pytest.raises(innerloop.InnerLoopError, match=r"lr.*nan"):
        rule.make(lr=float("nan"))


BAD_HYPER: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown name": ({"learning_rate": 0.1}, r"learning_rate.*\blr\b"),
    "a flag": ({"maximize": True}, "maximize.*constructor"),
    "a missing parameter": ({"lr": {"weight": 0.1}}, r"lr.*no entry for.*bias.*\bweight\b"),
    "a wrong shape": (
        {"lr": {**dict.fromkeys(NAMES, 0.1), "weight": torch.ones(2)}},
        r"weight.*\(2,\).*\(3, 5\)",
    ),
    "one tensor of one parameter's shape": ({"lr": torch.ones(3, 5)}, r"lr.*\(3, 5\).*by name"),
    "a string": ({"lr": "0.1"}, "lr.*'0.1'.*number"),
    "a negative number for one parameter": (
        {"lr": {**dict.fromkeys(NAMES, 0.1), "cube": -0.1}},
        "lr.*-0.1",
    ),
    "None": ({"lr": None}, "lr.*None"),
}


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("what", BAD_HYPER)
@each_rule()
def test_bad_hyper_parameters_in_update(rule: Rule, what: str):
    hyper, message = BAD_HYPER[what]
    optimizer, params = rule.make(**rule.typical), Task().params()
    with pytest.raises(innerloop.InnerLoopError, match=f"(?s){message}"):
        optimizer.update(params, optimizer.init(params), params, hyper)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    "betas", [0.9, (0.9,), (0.9, 0.99, 0.999), torch.tensor([0.9, 0.99])], ids=str
)
@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if "betas.0" in rule.hyper], ids=lambda rule: rule.name
)
def test_betas_must_be_a_pair(rule: Rule, betas: Any):
    params = Task().params()
    optimizer = rule.make(**rule.typical)
    with pytest.raises(innerloop.InnerLoopError, match=r"betas.*pair|pair.*betas"):
        rule.make(betas=betas)
    with pytest.raises(innerloop.InnerLoopError, match=r"betas.*pair|pair.*betas"):
        optimizer.update(params, optimizer.init(params), params, {"betas": betas})


@each_rule()
def test_bad_gradients(rule: Rule):
    optimizer, params = rule.make(**rule.typical), Task().params()
    state = optimizer.init(params)
    with pytest.raises(innerloop.InnerLoopError, match=r"wieght.*weight"):
        optimizer.update({**params, "wieght": params["weight"]}, state, params)
    wrong = {**params, "weight": params["weight"][:2]}
    with pytest.raises(innerloop.InnerLoopError, match=r"(?s)weight.*\(2, 5\).*\(3, 5\)"):
        optimizer.update(wrong, state, params)
    # Of the right size in all, but two shapes swapped: packed flat, this would train the wrong
    # entries without a word.
    swapped = {**params, "bias": params["bias"].new_zeros(6), "cube": params["cube"].new_zeros(5)}
    with pytest.raises(innerloop.InnerLoopError, match=r"(?s)bias.*\(6,\).*\(5,\)"):
        optimizer.update(swapped, state, params)


@each_rule()
def test_a_state_of_other_parameters_is_refused(rule: Rule):
    optimizer, params = rule.make(**rule.typical), Task().params()
    state = optimizer.init({"other": params["weight"]})
    with pytest.raises(innerloop.InnerLoopError, match=r"other|weight"):
        optimizer.update(params, state, params)


@pytest.mark.usefixtures("float64")
def test_a_pattern_that_matches_nothing() -> None:
    sgd = innerloop.optim.sgd(lr=0.1)
    for patterns in ({"*": sgd, "head.*": sgd}, {"haed.*": sgd, "*": sgd}):
        with pytest.raises(innerloop.InvalidInputError, match="match no parameter"):
            innerloop.optim.groups(patterns).init(
                {"head.w": torch.ones(1), "body.w": torch.ones(1)}
            )


@pytest.mark.usefixtures("float64")
@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("name", MADE)
def test_what_belongs_to_other_parameters_or_optimizers_is_refused(name: str):
    optimizer, params = MADE[name](), {"w": torch.ones(2, 2) if name == "muon" else torch.ones(2)}
    state = optimizer.init(params)
    with pytest.raises(
        InvalidInputError, match="typo"
    ):  # in groups it was taken for a parameter without gradient
        optimizer.update({"typo": params["w"]}, state, params)
    with pytest.raises(InvalidInputError, match=r"AdamState.*init"):
        optimizer.update(params, optim.adam().init(params), params)
    other = {"v": params["w"]}
    with pytest.raises(InvalidInputError, match=r"'v'"):
        MADE[name]().update(other, state, other)
    with pytest.raises(InvalidInputError, match=r"hyper is Tensor.*dict"):
        optimizer.update(params, state, params, torch.tensor(0.1))


@pytest.mark.usefixtures("float64")
@pytest.mark.usefixtures("types_unchecked")
def test_arguments_of_the_wrong_kind():
    with pytest.raises(InvalidInputError, match="mapping from name patterns"):
        optim.groups([optim.sgd()])  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"ns_steps=2\.5.*integer"):
        optim.muon(ns_steps=2.5)  # type: ignore[arg-type]


def test_a_group_of_all_parameters_deals_out_as_any_other_does() -> None:
    """To an optimizer of the user's own, that relies on it."""

    class Mine(optim.Optimizer):
        def init(self, params: Any) -> Any:
            return ()

        def update(self, grads: Any, state: Any, params: Any, hyper: Any = None) -> Any:
            assert list(grads) == list(params)
            return {n: p - grads[n] for n, p in params.items() if grads[n] is not None}, state

    params = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    group = optim.groups({"*": Mine()})
    state = group.init(params)
    new, _ = group.update({"b": torch.tensor(0.5)}, state, params)
    assert {n: p.item() for n, p in new.items()} == {"a": 1.0, "b": 1.5}
    with pytest.raises(InvalidInputError, match="gradients for"):
        group.update({"b": torch.tensor(0.5), "c": torch.tensor(0.5)}, state, params)
