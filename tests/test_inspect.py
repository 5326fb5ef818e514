"""`innerloop.inspect`: derivatives between times and the paths of an outer gradient, against closed
forms and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from tests.networks import direction, network, sgd, train
from tests.oracles import assert_derivative, derivative
from tests.situations import STEPS, regression
from tests.small_problems import half_square

pytestmark = pytest.mark.usefixtures("float64")

CURVATURE = torch.tensor([[2.0, 0.3, 0.1], [0.3, 1.0, -0.2], [0.1, -0.2, 0.5]], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
LR = 0.2


def quadratic(params: Any, hyper: Any, batch: Any) -> Tensor:
    """Half x'Ax over x = (a, b₁, b₂): a scalar and a vector that act on each other."""
    x = torch.cat([params["a"].reshape(1), params["b"]])
    return x @ CURVATURE @ x / 2


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(START[0].clone())
        self.b = nn.Parameter(START[1:].clone())

    def forward(self) -> Tensor:
        return quadratic(dict(self.named_parameters()), None, None)


def power(steps: int) -> Tensor:
    """The Jacobian over so many steps of SGD, as a matrix that acts on (a, b₁, b₂)."""
    return torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - LR * CURVATURE, steps)


def by_unroll() -> innerloop.Trajectory:
    start = {"a": START[0].clone().requires_grad_(), "b": START[1:].clone().requires_grad_()}
    return innerloop.unroll(
        innerloop.Problem(quadratic, innerloop.optim.sgd(lr=LR)), start, None, steps=4
    )


def by_track(learn: Any = "init") -> innerloop.Trajectory:
    model = Quadratic()
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=LR), learn=learn) as loop:
        for _ in range(4):
            loop.step(loop.model())
    return loop.trajectory


def as_matrix(jacobian: dict[str, dict[str, Tensor]]) -> Tensor:
    rows = [
        torch.cat([jacobian[i]["a"].reshape(-1, 1), jacobian[i]["b"].reshape(-1, 2)], 1)
        for i in ("a", "b")
    ]
    return torch.cat(rows)


EVERY_TRAJECTORY = pytest.mark.parametrize(
    "make", [by_unroll, by_track, lambda: by_track("outer")], ids=["unroll", "track", "track-outer"]
)


# -- jacobian --------------------------------------------------------------------------------------


@EVERY_TRAJECTORY
@pytest.mark.parametrize(("time", "wrt"), [(1, 0), (4, 0), (-1, 0), (3, 1), (4, -2), (2, 2)])
def test_a_jacobian_is_a_matrix_power(make: Any, time: int, wrt: int):
    traj = make()
    jacobian = innerloop.inspect.jacobian(traj, time=time, wrt=wrt)
    assert {i: {j: tuple(x.shape) for j, x in row.items()} for i, row in jacobian.items()} == {
        "a": {"a": (), "b": (2,)},
        "b": {"a": (2,), "b": (2, 2)},
    }
    torch.testing.assert_close(
        as_matrix(jacobian), power(time % 5 - wrt % 5), rtol=1e-13, atol=1e-15
    )
    again = innerloop.inspect.jacobian(traj, time=time, wrt=wrt)  # the graph is still there
    assert torch.equal(as_matrix(again), as_matrix(jacobian))


def test_a_jacobian_of_a_network_equals_finite_differences():
    """With momentum, whose buffer carries influence past a single step, and parameters that are
    matrices."""
    model = network()
    with innerloop.track(model, sgd(model)) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
    jacobian = innerloop.inspect.jacobian(loop.trajectory, time=STEPS, wrt=0)

    def end(h: float, name: str, index: tuple[int, ...]) -> float:
        start = network(h)
        train(start, sgd(start))
        return float(start.get_parameter(name).detach()[index])

    for name, index in (
        ("body.weight", (2, 1)),
        ("body.bias", (0,)),
        ("head.weight", (0, 3)),
        ("head.bias", (0,)),
    ):
        ours = sum(
            (row[index] * direction(model)[i]).sum().item() for i, row in jacobian[name].items()
        )
        assert_derivative(
            ours,
            derivative(lambda h, n=name, k=index: end(h, n, k)),  # type: ignore[misc]
            f"d {name}{index}",
        )


def test_a_jacobian_with_respect_to_hyper_parameters():
    """x_T = (1 - lr A)^T x_0, so dx_T/dlr = -T A (1 - lr A)^(T-1) x_0; also with respect to what
    has no influence."""
    hyper = {
        "lr": torch.tensor(LR, requires_grad=True),
        "unused": torch.zeros(2, requires_grad=True),
    }
    problem = innerloop.Problem(
        quadratic, innerloop.optim.sgd(), optimizer_hyper=lambda hyper, t: {"lr": hyper["lr"]}
    )
    traj = innerloop.unroll(problem, {"a": START[0], "b": START[1:]}, None, steps=4, hyper=hyper)
    jacobian = innerloop.inspect.jacobian(traj, time=-1, wrt=hyper)
    truth = -4 * CURVATURE @ power(3) @ START
    ours = torch.cat([jacobian["a"]["lr"].reshape(1), jacobian["b"]["lr"]])
    torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-15)
    assert torch.equal(jacobian["b"]["unused"], torch.zeros(2, 2))


def head_by_track() -> innerloop.Trajectory:
    model = network()
    with innerloop.track(model, torch.optim.SGD(model.head.parameters(), lr=0.3)) as loop:
        for t in range(STEPS):
            loop.step(regression(loop.model, t))
    return loop.trajectory


def head_by_unroll() -> innerloop.Trajectory:
    model = network()
    optimizer = innerloop.optim.from_torch(torch.optim.SGD(model.head.parameters(), lr=0.3), model)
    problem = innerloop.Problem.from_module(model, lambda m, hyper, t: regression(m, t), optimizer)
    return innerloop.unroll(problem, dict(model.named_parameters()), list(range(STEPS)))


@pytest.mark.parametrize("make", [head_by_track, head_by_unroll])
def test_a_parameter_that_is_not_stepped_has_times_of_its_own(make: Any):
    """ANIL: the body does not move, but at each step it moves the head. Steps before s must not
    count for the body at time s."""
    late = innerloop.inspect.jacobian(make(), time=STEPS, wrt=STEPS - 1)
    assert torch.equal(late["body.bias"]["body.bias"], torch.eye(4))

    def last_step(h: float) -> float:
        start = network()
        optimizer = torch.optim.SGD(start.head.parameters(), lr=0.3)
        train(start, optimizer, steps=range(STEPS - 1))
        with torch.no_grad():
            start.body.bias[1] += h
        start.zero_grad()
        train(start, optimizer, steps=range(STEPS - 1, STEPS))
        return start.head.bias.item()

    assert_derivative(
        late["head.bias"]["body.bias"][0, 1].item(), derivative(last_step), "the last step alone"
    )


def test_zero_elements_and_scalars():
    start = {"s": torch.tensor(2.0, requires_grad=True), "e": torch.zeros(0, 3, requires_grad=True)}
    problem = innerloop.Problem(
        lambda p, hyper, batch: p["s"] ** 2 / 2 + p["e"].sum(), innerloop.optim.sgd(lr=0.5)
    )
    jacobian = innerloop.inspect.jacobian(innerloop.unroll(problem, start, None, steps=2), time=2)
    assert jacobian["s"]["s"].item() == 0.25
    assert jacobian["e"]["s"].shape == (0, 3)
    assert jacobian["s"]["e"].shape == (0, 3)
    assert jacobian["e"]["e"].shape == (0, 3, 0, 3)


# -- paths -----------------------------------------------------------------------------------------


def vector(named: Any) -> Tensor:
    return torch.cat([named["a"].reshape(1), named["b"].reshape(2)])


@EVERY_TRAJECTORY
@pytest.mark.parametrize(("time", "wrt"), [(1, 0), (2, 0), (-1, 0), (3, 2), (4, 4)])
def test_paths_of_a_final_loss(make: Any, time: int, wrt: int):
    """The outer gradient is g'M^(T-s); through parameter i at time t goes (g'M^(T-t))_i times row i
    of M^(t-s)."""
    traj = make()
    weights = torch.tensor([1.0, -0.5, 2.0])
    found = innerloop.inspect.paths(
        traj, (weights * vector(traj.params).sin()).sum(), time=time, wrt=wrt
    )
    t = time % 5
    outer = (weights * vector(traj.params).detach().cos()) @ power(4 - t)
    jacobian = power(t - wrt)
    rows = {"a": outer[:1] @ jacobian[:1], "b": outer[1:] @ jacobian[1:]}
    torch.testing.assert_close(vector(found.outer), outer, rtol=1e-12, atol=1e-14)
    for name, row in rows.items():
        torch.testing.assert_close(vector(found.through[name]), row, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(vector(found.total), outer @ jacobian, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(vector(found.direct), torch.zeros(3), rtol=0, atol=1e-14)
    assert (found.time, found.wrt) == (t, wrt)


@EVERY_TRAJECTORY
def test_what_goes_around_a_time_is_direct(make: Any):
    """Through the inner losses and the parameters before time t: here the loss at step 0 and
    |x₁|²/2, seen from time 2."""
    traj = make()
    outer = (
        traj.losses[0]
        + vector(traj.at(1).params).square().sum() / 2
        + vector(traj.params).square().sum() / 2
    )
    found = innerloop.inspect.paths(traj, outer, time=2, wrt=0)
    x1, x4 = power(1) @ START, power(4) @ START
    direct = CURVATURE @ START + power(1) @ x1
    torch.testing.assert_close(vector(found.direct), direct, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(vector(found.total), direct + power(4) @ x4, rtol=1e-12, atol=1e-14)
    through = vector(found.through["a"]) + vector(found.through["b"])
    torch.testing.assert_close(through, power(4) @ x4, rtol=1e-12, atol=1e-14)


def test_paths_past_a_parameter_that_is_not_stepped():
    """ANIL again: what the body does through the head at time 1 must not also count as going
    through the body."""
    model = network()
    with innerloop.track(model, torch.optim.SGD(model.head.parameters(), lr=0.3)) as loop:
        for t in range(2):
            loop.step(regression(loop.model, t))
        outer = loop.model.head.bias.square().sum()
        found = innerloop.inspect.paths(loop.trajectory, outer, time=1, wrt=0)
    assert all(
        torch.equal(x, torch.zeros_like(x)) or x.abs().max() < 1e-14 for x in found.direct.values()
    )
    outer.backward()
    torch.testing.assert_close(
        found.total["body.bias"], model.body.bias.grad, rtol=1e-12, atol=1e-14
    )

    def through_body_at_one(h: float) -> float:
        start = network()
        optimizer = torch.optim.SGD(start.head.parameters(), lr=0.3)
        train(start, optimizer, steps=range(1))
        with torch.no_grad():
            start.body.bias[2] += h
        start.zero_grad()
        train(start, optimizer, steps=range(1, 2))
        return start.head.bias.square().sum().item()

    truth = derivative(through_body_at_one)
    assert_derivative(
        found.through["body.bias"]["body.bias"][2].item(), truth, "through the body at time 1"
    )


def test_paths_print_as_a_table():
    """The seed's numbers: y = (a² + b²)x at a=2, b=3, x=.1, true a=3, b=4, rate 1."""

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        return (0.1 * (params["a"] ** 2 + params["b"] ** 2) - 2.5) ** 2 / 2

    start = {"a": torch.tensor(2.0, requires_grad=True), "b": torch.tensor(3.0, requires_grad=True)}
    traj = innerloop.unroll(
        innerloop.Problem(loss, innerloop.optim.sgd(lr=1.0)), start, None, steps=1
    )
    found = innerloop.inspect.paths(traj, loss(traj.params, None, None))
    assert found.through["a"]["a"].item() == pytest.approx(-0.24855552 * 1.08, abs=1e-12)
    assert found.through["b"]["a"].item() == pytest.approx(-0.37283328 * -0.24, abs=1e-12)
    assert found.total["a"].item() == pytest.approx(-0.1789599744, abs=1e-12)
    assert found.total["b"].item() == pytest.approx(-0.2684399616, abs=1e-12)
    table = str(found).splitlines()
    assert table[0].split() == ["through", "d/d", "a[0]", "d/d", "b[0]"]
    assert [line.split()[0] for line in table[1:]] == ["a[1]", "b[1]", "direct", "total"]
    assert table[-1].split()[1:] == ["-0.17896", "-0.26844"]
    assert len({len(line) for line in table}) == 1


# -- refusals --------------------------------------------------------------------------------------


def test_what_cannot_be_asked():
    traj = by_unroll()
    outer = vector(traj.params).sum()
    invalid, missing = innerloop.InvalidInputError, innerloop.NotDifferentiableError
    with pytest.raises(invalid, match="swap time and wrt"):
        innerloop.inspect.jacobian(traj, time=1, wrt=3)
    with pytest.raises(invalid, match="swap time and wrt"):
        innerloop.inspect.paths(traj, outer, time=1, wrt=3)
    with pytest.raises(invalid, match="times 0 to 4"):
        innerloop.inspect.jacobian(traj, time=5)
    with pytest.raises(invalid, match="times 0 to 4"):
        innerloop.inspect.jacobian(traj, time=2, wrt=-6)
    with pytest.raises(invalid, match=r"do not require grad: \['lr'\]"):
        innerloop.inspect.jacobian(traj, wrt={"lr": torch.tensor(1.0)})
    with pytest.raises(invalid, match="scalar"):
        innerloop.inspect.paths(traj, vector(traj.params))
    with pytest.raises(invalid, match="detached"):
        innerloop.inspect.paths(traj, outer.detach())
    big = {"w": torch.zeros(8000, requires_grad=True)}
    square = innerloop.Problem(lambda p, hyper, batch: p["w"].square().sum(), innerloop.optim.sgd())
    long = innerloop.unroll(square, big, None, steps=1)
    with pytest.raises(invalid, match="64,000,000 elements"):
        innerloop.inspect.jacobian(long)
    constant = {"a": START[0], "b": START[1:]}
    plain = innerloop.unroll(
        innerloop.Problem(quadratic, innerloop.optim.sgd(lr=LR)), constant, None, steps=2
    )
    with pytest.raises(missing, match="no graph"):
        innerloop.inspect.jacobian(plain)
    with pytest.raises((invalid, missing)):
        innerloop.inspect.jacobian(by_track("nothing"), time=4, wrt=0)


def test_an_outer_loss_that_does_not_use_the_trajectory():
    """All zero would be a silent answer to a question that was probably not meant."""
    traj = by_unroll()
    other = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(innerloop.NotDifferentiableError, match="does not depend"):
        innerloop.inspect.paths(traj, other * 2)


def test_a_graph_that_is_gone():
    """One backward pass through the loop frees it."""
    for make in (by_unroll, by_track):
        traj = make()
        vector(traj.params).sum().backward()
        with pytest.raises(innerloop.NotDifferentiableError, match="retain_graph=True"):
            innerloop.inspect.jacobian(traj, time=3, wrt=1)


def test_half_of_the_parameters_learned():
    """Only what requires grad is an input; all parameters are outputs."""
    start = {"a": START[0].clone().requires_grad_(), "b": START[1:]}
    traj = innerloop.unroll(
        innerloop.Problem(quadratic, innerloop.optim.sgd(lr=LR)), start, None, steps=1
    )
    jacobian = innerloop.inspect.jacobian(traj)
    assert {name: list(row) for name, row in jacobian.items()} == {"a": ["a"], "b": ["a"]}
    torch.testing.assert_close(jacobian["b"]["a"], power(1)[1:, 0], rtol=1e-13, atol=1e-15)


def test_unrelated_tensors_have_no_jacobian() -> None:
    problem = innerloop.Problem(half_square, innerloop.optim.sgd(lr=0.1))
    traj = innerloop.unroll(problem, {"w": torch.ones(2, requires_grad=True)}, None, steps=1)
    with pytest.raises(innerloop.NotDifferentiableError, match="nothing connects"):
        innerloop.inspect.jacobian(traj, wrt={"lr": torch.tensor(0.1, requires_grad=True)})
