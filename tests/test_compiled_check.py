"""When a compiled result counts as the eager one: rounding is accepted, anything more is refused.

Nothing is compiled here. In place of the compiler stand functions that make the errors to be found;
``test_compiled_steps.py`` compiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop
from innerloop._utils import tree
from innerloop._utils.compiled_check import LaterChecks, check_compiled, difference_beyond_rounding


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_equal_results_and_none_for_zeros_are_accepted() -> None:
    eager = {"params": {"w": numbers(1.0, 2.0), "b": None}, "aux": [3, "text", numbers()]}
    check_compiled({"params": {"w": numbers(1.0, 2.0), "b": None}, "aux": eager["aux"]}, eager, "x")
    check_compiled({"params": {"w": numbers(1.0, 2.0), "b": numbers(0.0)}}, {
        "params": eager["params"]
    }, "x")  # fmt: skip
    check_compiled({"params": [None]}, {"params": [numbers(0.0)]}, "x")


@pytest.mark.parametrize("side", ["compiled", "eager"])
def test_a_gradient_beside_none_is_refused(side: str) -> None:
    found: dict[str, object] = {"gradient of hyper": [numbers(1.0)]}
    eager: dict[str, object] = {"gradient of hyper": [None]}
    if side == "eager":
        found, eager = eager, found
    with pytest.raises(innerloop.MetaGradientError, match="gradient of hyper"):
        check_compiled(found, eager, "the pullback of a step")


def test_a_loss_in_float64_is_as_precise_as_its_parameters() -> None:
    """A hyper-parameter in float64 makes it one."""
    loss = torch.tensor(0.25, dtype=torch.float64)
    for params, error, accepted in (
        (numbers(1.0), 1e-5, True),
        (numbers(1.0), 1e-3, False),
        (numbers(1.0).double(), 1e-6, False),
    ):
        eager, found = (
            {"params": [params], "loss": loss},
            {"params": [params], "loss": loss + error},
        )
        if accepted:
            check_compiled(found, eager, "the step")
            continue
        with pytest.raises(innerloop.MetaGradientError, match="in loss"):
            check_compiled(found, eager, "the step")


def test_a_large_loss_does_not_excuse_a_wrong_state() -> None:
    eager = {"optimizer_state.mu": {"w": numbers(0.001)}, "loss": torch.tensor(1000.0)}
    wrong = {"optimizer_state.mu": {"w": numbers(0.002)}, "loss": torch.tensor(1000.0)}
    with pytest.raises(
        innerloop.MetaGradientError, match=r"the step, compiled,.*optimizer_state.mu\['w'\]"
    ):
        check_compiled(wrong, eager, "the step")


def test_rounding_at_a_true_zero_is_accepted_beside_larger_numbers_of_its_group() -> None:
    eager = {"gradient of params": {"w": numbers(1.0, -0.5), "shift": numbers(0.0)}}
    found = {"gradient of params": {"w": numbers(1.0, -0.5), "shift": numbers(3e-6)}}
    check_compiled(found, eager, "the meta-gradient")
    found["gradient of params"]["shift"] = numbers(3e-5)
    with pytest.raises(innerloop.MetaGradientError, match="shift"):
        check_compiled(found, eager, "the meta-gradient")


@pytest.mark.parametrize(("error", "refused"), [(1e-2, True), (2e-3, True), (5e-4, False)])
def test_one_percent_in_single_precision_is_refused(error: float, refused: bool) -> None:
    """3 √ε is 1.04e-3."""
    found = difference_beyond_rounding(numbers(2.0 * (1 + error)), numbers(2.0), 0.0)
    assert (found is not None) == refused
    assert found is None or found == pytest.approx((2.0 * error, 2.0), rel=1e-3)


def test_double_precision_has_a_tolerance_of_its_own() -> None:
    eager = torch.tensor([1.0], dtype=torch.float64)
    assert difference_beyond_rounding(eager * (1 + 4e-8), eager, 0.0) is None
    assert difference_beyond_rounding(eager * (1 + 5e-8), eager, 0.0) is not None


def test_infinities_and_nan_agree_with_themselves_only() -> None:
    eager = numbers(float("inf"), float("nan"), 1.0)
    assert difference_beyond_rounding(eager.clone(), eager, 0.0) is None
    for other in ((float("inf"), 0.0, 1.0), (0.0, float("nan"), 1.0), (float("inf"),) * 3):
        assert difference_beyond_rounding(numbers(*other), eager, 0.0) is not None


# -- where it is used ------------------------------------------------------------------------------


def spoiled(index: Callable[[Any], Tensor]) -> Callable[..., Callable[..., Any]]:
    """A compiler whose code doubles the tensor that ``index`` finds in a result."""

    def compiler(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = function(*args)
            try:
                wrong = index(result)
            except (AttributeError, IndexError, KeyError, TypeError):
                return result
            with torch.no_grad():
                wrong.mul_(2)
            return result

        return call

    return compiler


def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
    return 1000 + (params["w"] * hyper["scale"]).square().sum() * 1e-3


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda found: found[0][0]["w"], r"the step, compiled,.* params\['w'\]"),
        (
            lambda found: next(tree.tensors(found[0][1].mu)),
            "the step, compiled,.* optimizer_state.mu",
        ),
        (lambda found: found.state[0], r"pullback of a step, compiled,.*gradient of params\['w'\]"),
        (lambda found: found.hyper[0], r"gradient of hyper\['hyper'\]\['scale'\]"),
    ],
    ids=["params", "state", "gradient of params", "gradient of hyper"],
)
def test_a_wrong_step_is_refused_and_named(
    wrong: Callable[[Any], Tensor], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", spoiled(wrong))
    problem = innerloop.Problem(loss, innerloop.optim.adam(eps=1.0))
    with pytest.raises(innerloop.MetaGradientError, match=named):
        innerloop.metagradient(
            lambda traj, hyper: traj.params["w"].sum(),
            problem,
            {"w": torch.tensor([0.5, -0.25])},
            None,
            hyper={"scale": torch.tensor(2.0)},
            steps=2,
            strategy=innerloop.Checkpointed(compile=True),
        )


@pytest.mark.parametrize("group", ["params", "hyper"])
def test_a_wrong_meta_gradient_is_refused_and_named(
    group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"params": "w", "hyper": "scale"}[group]
    monkeypatch.setattr(torch, "compile", spoiled(lambda found: found[1][group][name]))
    with pytest.raises(
        innerloop.MetaGradientError,
        match=rf"the meta-gradient, compiled,.*gradient of {group}\['{name}'\]",
    ):
        innerloop.metagradient(
            lambda traj, hyper: traj.params["w"].sum(),
            innerloop.Problem(loss, innerloop.optim.adam(eps=1.0)),
            {"w": torch.tensor([0.5, -0.25])},
            None,
            hyper={"scale": torch.tensor(2.0)},
            steps=2,
            compile=True,
        )


def test_later_checks_take_less_than_two_percent_and_come_at_random() -> None:
    checks = LaterChecks()
    assert not checks.due()
    checks.checked(0.05)
    spent, calls, places = 0.0, 100_000, []
    for i in range(calls):
        checks.called(0.01)
        if checks.due():
            spent += 0.05
            checks.checked(0.05)
            places.append(i)
    assert len(places) > 50
    assert spent < 0.02 * 0.01 * calls
    assert len({b - a for a, b in itertools.pairwise(places)}) > 20


def test_a_compiler_that_goes_wrong_later_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]

    def wrong_after_ten(found: Any) -> Tensor:
        calls[0] += 1
        if calls[0] < 10:
            raise IndexError
        result: Tensor = found[0][0]["w"]
        return result

    monkeypatch.setattr(torch, "compile", spoiled(wrong_after_ten))
    monkeypatch.setattr(LaterChecks, "due", lambda self: True)
    with pytest.raises(innerloop.MetaGradientError, match=r"the step, compiled,.* params\['w'\]"):
        innerloop.metagradient(
            lambda traj, hyper: traj.params["w"].sum(),
            innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1)),
            {"w": torch.tensor([0.5, -0.25])},
            None,
            hyper={"scale": torch.tensor(2.0)},
            steps=20,
            strategy=innerloop.StoreAll(compile=True),
        )


def test_rounding_that_a_derivative_magnifies_is_accepted() -> None:
    eager = {"gradient of hyper": [numbers(1.0)]}
    found = {"gradient of hyper": [numbers(1.005)]}
    with pytest.raises(innerloop.MetaGradientError):
        check_compiled(found, eager, "x")
    check_compiled(found, eager, "x", perturbed=lambda: {"gradient of hyper": [numbers(1.001)]})
    with pytest.raises(innerloop.MetaGradientError):
        check_compiled(
            found, eager, "x", perturbed=lambda: {"gradient of hyper": [numbers(1.0001)]}
        )
