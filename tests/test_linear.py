"""Second derivatives as linear operators: equal to closed forms, to dense matrices by autograd, and
to finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from innerloop._linear.hessian import Hessian
from innerloop._linear.operator import LinearOperator, Vector
from innerloop._linear.products import (
    central_difference,
    forward_over_reverse,
    reverse_over_reverse,
)
from innerloop._utils import tree
from innerloop.strategy._engine.step_operator import StepPullback
from innerloop.strategy._engine.step_pullback import Step, carry_of, state_of
from tests.oracles import derivative, smooth_noise

pytestmark = pytest.mark.usefixtures("float64")
each_product = pytest.mark.parametrize("product", ["reverse", "mixed", "finite"])
TOLERANCE = {"reverse": 1e-12, "mixed": 1e-12, "finite": 1e-6}
"""Relative; a central difference has an error of its step squared."""


def assert_near(ours: Tensor, truth: Tensor, tolerance: float) -> None:
    assert ours.shape == truth.shape
    error, scale = (ours - truth).abs().max().item(), truth.abs().max().item()
    assert error <= tolerance * scale, f"off by {error:.1e}, where values are up to {scale:.1e}"


# -- products of a plain function ------------------------------------------------------------------


def cubic(values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The gradients of x₁² x₂ + x₂³ / 3, whose Hessian is [[2 x₂, 2 x₁], [2 x₁, 2 x₂]]."""
    x, y = values
    return [2 * x * y, x**2 + y**2], x**2 * y + y**3 / 3


@pytest.mark.parametrize("how", ["forward", "reverse", "difference"])
def test_the_products_of_a_polynomial(how: str) -> None:
    at, along = [torch.tensor(3.0), torch.tensor(5.0)], [torch.tensor(1.0), torch.tensor(-2.0)]
    evaluations: list[None] = []
    common = {"before_each": lambda: evaluations.append(None)}
    if how == "forward":
        found = forward_over_reverse(cubic, at, along, **common)
    elif how == "reverse":
        found = reverse_over_reverse(cubic, at, along, **common)
    else:
        found = central_difference(
            cubic, at, along, value=lambda: cubic(at)[1], moved=2, relative_step=None, **common
        )
    # Gradients of degree two have no error of truncation; their mean has one of its own.
    tolerance = 1e-9 if how == "difference" else 1e-15
    torch.testing.assert_close(torch.stack(found.product), torch.tensor([-2.0, -14.0]),
                               rtol=tolerance, atol=0)  # fmt: skip
    torch.testing.assert_close(torch.stack(found.gradient), torch.tensor([30.0, 34.0]),
                               rtol=1e-8 if how == "difference" else 1e-15, atol=0)  # fmt: skip
    assert found.loss.item() == pytest.approx(45 + 125 / 3, rel=1e-15)
    assert len(evaluations) == (3 if how == "difference" else 1)


def test_a_difference_along_entries_without_a_gradient_is_taken_apart() -> None:
    """They would make the common step too short for the others."""
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])

    def quadratic(values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        (x,) = values
        return [matrix @ x], x @ matrix @ x / 2

    at, along = [torch.tensor([3.0, -1.0])], [torch.tensor([1.0, 100.0])]
    assert quadratic(at)[0][0][1] == 0
    found = central_difference(
        quadratic, at, along, before_each=lambda: None, value=lambda: quadratic(at)[1], moved=1,
        relative_step=None,
    )  # fmt: skip
    torch.testing.assert_close(found.product[0], matrix @ along[0], rtol=1e-8, atol=0)


def test_a_vector_of_zeros_has_the_difference_zero() -> None:
    at, zeros = [torch.tensor(3.0), torch.tensor(5.0)], [torch.tensor(0.0)] * 2
    found = central_difference(
        cubic, at, zeros, before_each=lambda: None, value=lambda: cubic(at)[1], moved=2,
        relative_step=None,
    )  # fmt: skip
    assert [x.item() for x in found.product] == [0.0, 0.0]


def test_what_does_not_depend_has_the_product_zero() -> None:
    linear = lambda values: ([values[1] * 0 + 2.0, torch.tensor(1.0)], values[0] * 2)  # noqa: E731
    at = [torch.tensor(3.0), torch.tensor(5.0)]
    found = reverse_over_reverse(linear, at, at, before_each=lambda: None)
    assert [x.item() for x in found.product] == [0.0, 0.0]


# -- the Hessian -----------------------------------------------------------------------------------


def network_loss(params: Any, hyper: Any, batch: Tensor) -> Tensor:
    hidden = (batch @ params["w"] + params["b"]).tanh()
    decay = hyper["decay"] * (params["w"].square().sum() + params["b"].pow(4).sum())
    return (hidden @ hyper["head"]).square().mean() + decay


def network() -> tuple[innerloop.Problem, Any, dict[str, Any], Tensor]:
    problem = innerloop.Problem(network_loss, innerloop.optim.adam(eps=0.1, lr=0.1))
    params = {"w": smooth_noise(3, 2), "b": smooth_noise(2, phase=1.0)}
    hyper = {"decay": torch.tensor(0.3), "power": 2, "head": smooth_noise(2, phase=2.0)}
    return problem, problem.init(params), hyper, smooth_noise(5, 3, phase=3.0)


def dense(fn: Callable[[list[Tensor]], list[Tensor]], at: list[Tensor]) -> Tensor:
    """The Jacobian of ``fn`` as a matrix, by autograd."""
    sizes = [x.numel() for x in at]

    def flat(x: Tensor) -> Tensor:
        parts = [p.reshape(a.shape) for p, a in zip(x.split(sizes), at, strict=True)]
        return torch.cat([y.flatten() for y in fn(parts)])

    return torch.autograd.functional.jacobian(flat, torch.cat([x.flatten() for x in at]))


def network_gradient(values: list[Tensor]) -> list[Tensor]:
    """∇_θ at (w, b, decay, head), by plain autograd."""
    w, b, decay, head = values
    if not w.requires_grad:
        w, b = w.requires_grad_(), b.requires_grad_()
    hyper = {"decay": decay, "head": head}
    loss = network_loss({"w": w, "b": b}, hyper, smooth_noise(5, 3, phase=3.0))
    return list(torch.autograd.grad(loss, [w, b], create_graph=True))


def network_values() -> list[Tensor]:
    _, carry, hyper, _ = network()
    return [*carry.params.values(), hyper["decay"], hyper["head"]]


@each_product
def test_the_hessian_equals_the_dense_one(product: str) -> None:
    hessian = Hessian(*network(), product=product)
    truth = dense(network_gradient, network_values())[:, :8]
    assert_near(hessian.as_matrix(), truth, TOLERANCE[product])
    assert hessian.T is hessian


@each_product
def test_the_mixed_derivative_equals_the_dense_one(product: str) -> None:
    hessian = Hessian(*network(), product=product)
    vector = [smooth_noise(3, 2, phase=4.0), smooth_noise(2, phase=5.0)]
    decay, power, head = hessian.mixed([*vector])
    assert power is None
    assert decay is not None
    assert head is not None
    truth = dense(network_gradient, network_values())[:, 8:].T @ torch.cat(
        [v.flatten() for v in vector]
    )
    assert_near(torch.cat([decay.reshape(1), head]), truth, TOLERANCE[product])


@each_product
def test_none_stands_for_zero(product: str) -> None:
    hessian = Hessian(*network(), product=product)
    only = [None, smooth_noise(2, phase=5.0)]
    full: Vector = [torch.zeros(3, 2), only[1]]
    for ours, theirs in zip(hessian(only), hessian(full), strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


def noisy_loss(model: nn.Module, hyper: Any, batch: Tensor) -> Tensor:
    return F.dropout(model(batch), 0.5).square().mean() * hyper


@each_product
def test_random_numbers_are_the_same_at_every_product_and_the_users_go_on(product: str) -> None:
    """Dropout and batch norm: the Hessian is symmetric only if every product drops the same."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(smooth_noise(*p.shape, phase=float(i)))
    problem = innerloop.Problem.from_module(model, noisy_loss, innerloop.optim.sgd())
    carry = problem.init(dict(model.named_parameters()))
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    hessian = Hessian(problem, carry, torch.tensor(2.0), smooth_noise(6, 3), product=product)
    matrix = hessian.as_matrix()
    assert torch.equal(torch.rand(2), expected)
    assert not matrix.requires_grad
    assert_near(matrix, matrix.T, 10 * TOLERANCE[product])
    # The loss is proportional to hyper: the derivative of its gradient is the gradient at 1.
    vector = [smooth_noise(*p.shape, phase=9.0) for p in carry.params.values()]
    assert carry.random_state is not None
    carry.random_state.restore()
    with torch.no_grad():
        grads, _, _, _ = problem.gradient(
            carry.params, carry.buffers, torch.tensor(1.0), smooth_noise(6, 3)
        )
    truth = sum((g * v).sum().item() for g, v in zip(grads.values(), vector, strict=True))
    (mixed,) = hessian.mixed([*vector])
    assert mixed is not None
    assert mixed.item() == pytest.approx(truth, rel=TOLERANCE[product])


@pytest.mark.parametrize("product", ["reverse", "mixed"])
def test_the_hessian_of_several_tasks_at_once(product: str) -> None:
    problem, carry, hyper, batch = network()

    def product_at(scale: Tensor) -> Tensor:
        moved = carry._replace(params={n: p * scale for n, p in carry.params.items()})
        found = Hessian(problem, moved, hyper, batch, product=product)([None, torch.ones(2)])
        assert found[1] is not None
        return found[1]

    scales = torch.tensor([0.5, 1.0, 2.0])
    together = torch.func.vmap(product_at)(scales)
    assert_near(together, torch.stack([product_at(s) for s in scales]), 1e-12)


@each_product
def test_what_is_wrong_is_said(product: str) -> None:
    problem, carry, hyper, batch = network()
    with pytest.raises(innerloop.InvalidInputError, match="1 entries"):
        Hessian(problem, carry, hyper, batch, product=product)([None])
    blind = innerloop.Problem(lambda params, hyper, batch: hyper**2, innerloop.optim.sgd())
    with pytest.raises(innerloop.NotDifferentiableError, match="does not depend on params"):
        Hessian(blind, carry, torch.tensor(1.0), None, product=product)([None, torch.ones(2)])
    with pytest.raises(innerloop.InvalidInputError, match="product='newton'"):
        Hessian(problem, carry, hyper, batch, product="newton")


def test_an_operation_without_forward_mode_is_named() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 3 * grad * ctx.saved_tensors[0] ** 2

    problem = innerloop.Problem(
        lambda params, hyper, batch: Cube.apply(params["w"]), innerloop.optim.sgd()
    )
    carry = problem.init({"w": torch.tensor(2.0)})
    with pytest.raises(innerloop.NotDifferentiableError, match='product="reverse"'):
        Hessian(problem, carry, None, None, product="mixed")([torch.tensor(1.0)])
    assert Hessian(problem, carry, None, None)([torch.tensor(1.0)]) == [torch.tensor(12.0)]


# -- the pullback of a step ------------------------------------------------------------------------


def network_step(product: str) -> tuple[Step, StepPullback]:
    problem, carry, hyper, batch = network()
    for _ in range(2):  # away from the zeros of a new optimizer
        carry = problem.step(carry, hyper, batch, 0)[0].detach()
    wanted = [tree.differentiable(x) for x in tree.leaves(hyper)]
    step = Step(problem, carry, hyper, batch, 2, wanted, set(), None)
    return step, StepPullback(step, product)


def new_state(step: Step, values: list[Tensor], hyper: Any) -> list[Tensor]:
    """The floating-point leaves of the state after the step, from those before it."""
    state = state_of(step.carry)
    leaves = tree.leaves(state)
    places = [i for i, x in enumerate(leaves) if tree.differentiable(x)]
    carry = carry_of(tree.with_leaves(state, tree.put(leaves, places, values)), None)
    new, _, _ = step.problem.step(carry, hyper, step.batch, step.t)
    return [x for x in tree.leaves(state_of(new)) if tree.differentiable(x)]


@each_product
def test_the_pullback_of_a_step_is_the_transposed_jacobian(product: str) -> None:
    step, pullback = network_step(product)
    at = [x for x in pullback.takes if isinstance(x, Tensor) and tree.differentiable(x)]
    jacobian = dense(lambda values: new_state(step, values, step.hyper), at)
    assert_near(pullback.as_matrix(), jacobian.T, TOLERANCE[product])
    assert_near(pullback.T.as_matrix(), jacobian, 1e-12)
    assert isinstance(pullback.T.T, StepPullback)


@each_product
def test_both_gives_the_part_of_hyper_too(product: str) -> None:
    step, pullback = network_step(product)
    hyper: Any = step.hyper
    vector: Vector = [
        smooth_noise(*x.shape, phase=10.0 + i) if isinstance(x, Tensor) and x.ndim else None
        for i, x in enumerate(pullback.takes)
    ]
    state, (decay, power, head) = pullback.both(vector)
    for ours, alone in zip(state, pullback(vector), strict=True):
        assert (ours is None) == (alone is None)
        assert ours is None or (alone is not None and torch.equal(ours, alone))
    assert power is None
    assert decay is not None
    assert head is not None
    at = [x for x in pullback.takes if isinstance(x, Tensor) and tree.differentiable(x)]
    given = [v for v in vector if v is not None]

    def along(h: float) -> float:
        moved = {**hyper, "decay": hyper["decay"] + h, "head": hyper["head"] + 2 * h}
        ends = new_state(step, at, moved)
        return sum((y * v).sum().item() for y, v in zip(ends, given, strict=True))

    assert decay.item() + 2 * head.sum().item() == pytest.approx(derivative(along), rel=1e-6)


def test_a_pullback_of_zero_is_zero() -> None:
    _, pullback = network_step("reverse")
    state, hyper = pullback.both([None] * len(pullback.takes))
    assert all(x is None for x in (*state, *hyper))
    assert all(x is None for x in pullback.T([None] * len(pullback.takes)))


@each_product
def test_a_step_that_draws_sees_the_same_numbers_at_every_product(product: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(smooth_noise(*p.shape, phase=float(i)))
    problem = innerloop.Problem.from_module(model, noisy_loss, innerloop.optim.sgd(lr=0.1))
    carry = problem.init(dict(model.named_parameters())).detach()
    hyper, batch = torch.tensor(2.0), smooth_noise(6, 3)
    step = Step(problem, carry, hyper, batch, 0, [True], set(), None)
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    pullback = StepPullback(step, product).as_matrix()
    assert torch.equal(torch.rand(2), expected)
    # A step of SGD is w - lr g: its Jacobian is 1 - lr H.
    hessian = Hessian(problem, carry, hyper, batch, product="reverse").as_matrix()
    assert_near(pullback, torch.eye(len(hessian)) - 0.1 * hessian, TOLERANCE[product])


# -- matrices --------------------------------------------------------------------------------------


class Scale(LinearOperator):
    """Doubles the first of two tensors, and forgets the second."""

    takes = (torch.zeros(2), 7, torch.zeros(1))
    gives = (torch.zeros(2), torch.zeros(0))

    def __call__(self, vector: Vector) -> Vector:
        return [None if vector[0] is None else 2 * vector[0], None]

    @property
    def T(self) -> LinearOperator:
        raise NotImplementedError


def test_a_matrix_has_a_column_for_each_element_taken() -> None:
    assert torch.equal(Scale().as_matrix(), torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
