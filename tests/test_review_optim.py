"""What a review of the optimizers found; the truth is torch.optim, a closed form, or the class
itself."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop
from innerloop import InvalidInputError, NotDifferentiableError, optim
from innerloop._utils import caches
from innerloop.errors import PrecisionWarning
from innerloop.optim import adapt
from innerloop.optim._from_torch.from_torch import overrides_step

pytestmark = pytest.mark.usefixtures("float64")


def a_class(step: Callable[[Any, Any], Any], prepare: Callable[[Any], Any] | None = None) -> Any:
    """A new optimizer class whose step is a function of itself and of its parameters."""

    class Written(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: Any = 0.1, **settings: Any) -> None:
            super().__init__(params, {"lr": lr})
            self.settings = settings
            if prepare is not None:
                prepare(self)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            step(self, self.param_groups[0]["params"])

    return Written


def descend(self: Any, params: Any) -> None:
    for p in params:
        p.sub_(self.param_groups[0]["lr"] * p.grad)


# --- the rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_numbers_per_parameter_are_those_of_param_groups_in_every_dtype(dtype: torch.dtype):
    """.999 is 1 in bfloat16: as a tensor of the parameter's dtype the bias correction was 0/0."""
    leaves = {name: torch.nn.Parameter(torch.randn(4).to(dtype)) for name in "ab"}
    theirs = torch.optim.Adam(
        [
            {"params": [leaves["a"]], "betas": (0.9, 0.999)},
            {"params": [leaves["b"]], "betas": (0.8, 0.99)},
        ],
        lr=0.1,
        eps=1e-3,
    )
    rule = optim.adam(lr=0.1, eps=1e-3)
    params = {name: p.detach().clone() for name, p in leaves.items()}
    state, betas = rule.init(params), ({"a": 0.9, "b": 0.8}, {"a": 0.999, "b": 0.99})
    for _ in range(4):
        grads = {name: torch.randn(4).to(dtype) for name in "ab"}
        for name, p in leaves.items():
            p.grad = grads[name]
        theirs.step()
        params, state = rule.update(grads, state, params, {"betas": betas})
    for name, p in leaves.items():
        tolerance = 1e-12 if dtype == torch.float64 else 0.0
        torch.testing.assert_close(params[name], p.detach(), rtol=tolerance, atol=tolerance)


def test_adagrad_starts_every_group_at_the_value_of_its_constructor():
    """As torch does, whatever a param group says."""
    leaves = {name: torch.nn.Parameter(torch.tensor([1.0, 2.0])) for name in "ab"}
    groups: list[dict[str, Any]] = [
        {"params": [leaves["a"]], "initial_accumulator_value": 1.0},
        {"params": [leaves["b"]]},
    ]
    theirs = torch.optim.Adagrad(groups, lr=0.1, initial_accumulator_value=0.25)
    rule = optim.from_torch(theirs, leaves)
    params = {name: p.detach().clone() for name, p in leaves.items()}
    state = rule.init(params)
    for _ in range(3):
        grads = {name: torch.randn(2) for name in "ab"}
        for name, p in leaves.items():
            p.grad = grads[name]
        theirs.step()
        params, state = rule.update(grads, state, params)
    for name, p in leaves.items():
        torch.testing.assert_close(params[name], p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("theirs", "settings", "scale", "tolerance"),
    [
        pytest.param(torch.optim.Muon, {"lr": 0.1}, 1.0, 0.0, id="muon"),
        pytest.param(
            torch.optim.Adafactor, {"lr": 0.01}, 300.0, 0.1, id="adafactor"
        ),  # 300² is infinite in float16; an ulp is up to .5
    ],
)
def test_float16_matrices(theirs: Any, settings: dict[str, Any], scale: float, tolerance: float):
    p = torch.nn.Parameter((scale * torch.randn(20, 30)).half())
    optimizer = theirs([p], **settings)
    rule = optim.from_torch(optimizer, {"p": p})
    params = {"p": p.detach().clone()}
    state = rule.init(params)
    for _ in range(4):
        p.grad = torch.randn(20, 30).half()
        optimizer.step()
        params, state = rule.update({"p": p.grad}, state, params)
    torch.testing.assert_close(params["p"], p.detach(), rtol=tolerance / 100, atol=tolerance)


@pytest.mark.parametrize("rule", ["asgd", "nadam"])
def test_a_complex_parameter_keeps_its_step_sizes_when_another_has_no_gradient(rule: str):
    """A complex parameter is two real ones side by side; rates differ, so that each has a step size
    (or product) of its own."""
    start = torch.tensor([1.0 - 2.0j, 0.5 + 0.3j])
    rate = torch.tensor([0.1, 0.2])

    def run(cut: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        optimizer = getattr(optim, rule)(**({"t0": 2.0, "lambd": 0.1} if rule == "asgd" else {}))
        params = {
            name: piece
            for key in ("first", "second")
            for name, piece in cut(start).items()
            for name in [f"{key}.{name}"]
        }
        state = optimizer.init(params)
        rates = {name: rate if name.startswith("first") else 2 * rate for name in params}
        decay = {name: rate if name.startswith("first") else 3 * rate for name in params}
        hyper = {"lr": rates, **({"alpha": decay} if rule == "asgd" else {"momentum_decay": decay})}
        for t in range(5):
            missing = {1: "first", 3: "second"}.get(t, "none")
            grads = {
                name: None if name.startswith(missing) else p * 2 for name, p in params.items()
            }
            params, state = optimizer.update(grads, state, params, hyper)
        return params

    together = run(lambda z: {"z": z})
    apart = run(lambda z: {"re": z.real, "im": z.imag})
    for key in ("first", "second"):
        expected = torch.complex(apart[f"{key}.re"], apart[f"{key}.im"])
        torch.testing.assert_close(together[f"{key}.z"], expected, rtol=1e-12, atol=1e-12)


def test_one_complex_parameter_with_a_tensor_rate_and_a_missing_gradient():
    optimizer, rate = optim.asgd(t0=2.0), torch.tensor(0.1)
    params = {"z": torch.tensor([1.0 - 2.0j]), "x": torch.ones(1)}
    state = optimizer.init(params)
    for t in range(4):
        grads = {"z": None if t == 2 else 2 * params["z"], "x": params["x"]}
        params, state = optimizer.update(grads, state, params, {"lr": rate})
    assert isinstance(state.eta["z"], Tensor)
    assert params["z"].isfinite().all()


@pytest.mark.parametrize("name", ["learned", "adapt"])
def test_half_precision_is_warned_of(name: str):
    optimizer, p = MADE[name](), torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    caches.clear()
    with pytest.warns(PrecisionWarning, match="bfloat16"):
        optimizer.update({"p": p * 2}, optimizer.init({"p": p}), {"p": p})


# --- input that does not fit ----------------------------------------------------------------------


def _leaf() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(2))


MADE: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optim.sgd(momentum=0.9),
    "muon": lambda: optim.muon(),
    "groups": lambda: optim.groups({"*": optim.sgd(momentum=0.9)}),
    "from_torch": lambda: optim.from_torch(torch.optim.SGD([_leaf()], lr=0.1, momentum=0.9)),
    "chain": lambda: optim.chain(optim.accumulate(2), optim.sgd()),
    "in_float32": lambda: optim.in_float32(optim.sgd(momentum=0.9)),
    "learned": lambda: optim.learned(lambda grad, param, state, weights: (-grad, state), {}),
    "adapt": lambda: adapt(a_class(descend)),
}


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


@pytest.mark.usefixtures("types_unchecked")
def test_arguments_of_the_wrong_kind():
    with pytest.raises(InvalidInputError, match="mapping from name patterns"):
        optim.groups([optim.sgd()])  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"ns_steps=2\.5.*integer"):
        optim.muon(ns_steps=2.5)  # type: ignore[arg-type]


# --- adapt ----------------------------------------------------------------------------------------


class _ThreeTenths(torch.autograd.Function):
    """A value with a wrong derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 0.3 * grad


class _Shown:
    """Two of these look alike and do different things."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __repr__(self) -> str:
        return "f"


def test_settings_that_look_alike_are_verified_each():
    cls = a_class(
        lambda self, params: [p.sub_(0.1 * self.settings["f"].function(p.grad)) for p in params]
    )
    adapt(cls, f=_Shown(torch.clone))
    with pytest.raises(NotDifferentiableError, match="finite differences"):
        adapt(cls, f=_Shown(_ThreeTenths.apply))


def test_a_step_that_changes_what_is_not_its_state_is_refused():
    """From the third call on it is another step; where steps are replayed, or compared, the calls
    are not counted back."""

    def count(self: Any) -> None:
        calls: list[int] = []

        def factor() -> float:
            calls.append(1)
            return 1.0 if len(calls) < 3 else 0.5

        self.factor = factor

    def step(self: Any, params: Any) -> None:
        factor = self.factor()
        for p in params:
            p.sub_(0.1 * factor * p.grad)

    with pytest.raises(NotDifferentiableError, match="the second time"):
        adapt(a_class(step, count))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_class_is_verified_under_any_mode_of_the_user(mode: Any):
    with mode():
        optimizer = adapt(a_class(descend))
        params = {"p": torch.ones(3, 2, 2)}
        new, _ = optimizer.update(params, optimizer.init(params), params)
    torch.testing.assert_close(new["p"], torch.full((3, 2, 2), 0.9))


def test_a_setting_that_requires_grad_gets_its_gradient_from_constant_parameters():
    """On the loss p² three steps give (1 - 2η)³ p."""
    lr = torch.tensor(0.1, requires_grad=True)
    problem = innerloop.Problem(
        lambda params, hyper, batch: params["p"].square().sum(), adapt(a_class(descend), lr=lr)
    )
    for strategy in (innerloop.StoreAll(), innerloop.Checkpointed()):
        traj = innerloop.unroll(problem, {"p": torch.ones(2)}, None, steps=3, strategy=strategy)
        (found,) = torch.autograd.grad(traj.params["p"].sum(), lr)
        torch.testing.assert_close(found, torch.tensor(-2 * 2 * 3 * 0.8**2))


def test_gradients_that_are_not_numbers_are_not_blamed_on_the_class():
    optimizer, params = adapt(a_class(descend)), {"p": torch.ones(2)}
    new, _ = optimizer.update({"p": torch.tensor([torch.nan, 1.0])}, optimizer.init(params), params)
    torch.testing.assert_close(new["p"], torch.tensor([torch.nan, 0.9]), equal_nan=True)


def test_parameters_in_another_order_keep_their_own_state():
    def accumulate(self: Any, params: Any) -> None:
        for p in params:
            p.sub_(self.state[p].setdefault("sum", torch.zeros_like(p)).add_(p.grad))

    optimizer = adapt(a_class(accumulate))
    params = {"a": torch.zeros(2), "b": torch.zeros(2)}
    grads = {"a": torch.ones(2), "b": torch.full((2,), 5.0)}
    params, state = optimizer.update(grads, optimizer.init(params), params)
    new, _ = optimizer.update(grads, state, dict(reversed(params.items())))
    torch.testing.assert_close(new["a"], torch.full((2,), -3.0))
    torch.testing.assert_close(new["b"], torch.full((2,), -15.0))


def _by_lists(self: Any, params: Any) -> None:
    lr, grads = self.param_groups[0]["lr"], [p.grad for p in params]
    norms = torch._foreach_norm(grads)
    factor = 1 / (1 + sum(norm.item() for norm in norms))
    moments = [self.state[p].setdefault("moment", torch.zeros_like(p)) for p in params]
    torch._foreach_lerp_(moments, grads, 0.1)
    squares = torch._foreach_pow(torch._foreach_div(grads, torch.stack(norms).sum() + 1), 2)
    torch._foreach_maximum_(squares, torch._foreach_mul(squares, 0.5))
    torch._foreach_addcdiv_(
        params,
        moments,
        torch._foreach_add(torch._foreach_sqrt(squares), 0.1),
        value=-lr * factor,
    )
    torch._foreach_addcmul_(params, moments, moments, [0.01] * len(params))
    torch._foreach_add_(params, grads, alpha=-lr * factor)


def test_steps_over_lists_of_tensors():
    """``adapt`` itself compares with the class and with finite differences; torch alone fails at
    the division by a tensor."""
    optimizer = adapt(a_class(_by_lists))
    p = torch.zeros(3, requires_grad=True)
    new, _ = optimizer.update({"p": p * 1.0}, optimizer.init({"p": p}), {"p": p})
    (found,) = torch.autograd.grad(new["p"].sum(), p)
    assert found.isfinite().all()


def test_a_number_from_a_tensor_beside_out():
    def step(self: Any, params: Any) -> None:
        size = sum(p.grad.pow(2).sum().item() for p in params)
        for p in params:
            torch.addcmul(p, p.grad, p.grad, value=-0.1 / (1 + size), out=p)

    adapt(a_class(step))


def test_functions_of_math_that_mean_something_else_in_torch_are_refused():
    """math.remainder(5, 3) is -1, torch.remainder 2; math.isclose has other tolerances."""
    for function in ("remainder", "isclose"):

        def step(self: Any, params: Any, name: str = function) -> None:
            for p in params:
                p.sub_(0.1 * getattr(math, name)(p.grad.sum().item(), 3.0) * p.grad)

        with pytest.raises(NotDifferentiableError, match="float"):
            adapt(a_class(step))


# -- subclasses, and the profiler that torch puts around an inherited step -------------------------


def test_a_step_with_the_profiler_around_it_is_still_inherited():
    class Family(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> Any:
            """Does nothing."""

    class Child(Family):
        pass

    @functools.wraps(Family.step)
    def decorated(self: Any, closure: Any = None) -> Any:
        self.param_groups[0]["lr"] = 0.0
        return Family.step(self, closure)

    Decorated: Any = type("Decorated", (Family,), {"step": decorated})

    for cls in (Child, Decorated, Family):  # the first one gets a step of its own
        cls([torch.ones(1)])
        assert "step" in vars(cls)
    assert [overrides_step(cls) for cls in (Child, Decorated, Family)] == [False, True, True]
    assert not overrides_step(type("Grandchild", (Child,), {}))


def test_a_subclass_that_is_the_first_of_its_family():
    program = """
import torch, innerloop, innerloop.higher
class Mine(torch.optim.SGD): pass
model = torch.nn.Linear(1, 1)
optimizer = Mine(model.parameters(), lr=0.5)
print(innerloop.optim.from_torch(optimizer, model))
print(type(innerloop.higher.get_diff_optim(optimizer, model.parameters())).__name__)
"""
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert shown.split() == ["from_torch(sgd(lr=0.5))", "DifferentiableSGD"]
