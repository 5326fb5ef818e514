"""Steps whose gradient is not that of the loss, and derivatives that were once dropped silently."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from innerloop import (
    Checkpointed,
    FirstOrder,
    ForwardMode,
    NotDifferentiableError,
    Problem,
    StoreAll,
    Truncated,
    metagradient,
    optim,
    track,
    unroll,
)
from innerloop._utils.differences import derivative
from innerloop.strategy import Strategy

F64: Any = {"dtype": torch.float64}
EXACT = [StoreAll(), Checkpointed(), Checkpointed(slots=1), Checkpointed(save="gradients")]
REVERSE_AND_FORWARD: list[Strategy] = [*EXACT, ForwardMode()]


def tensor(x: Any) -> Tensor:
    return torch.tensor(x, **F64)


def slope(function: Callable[[float], float], at: float) -> float:
    return derivative(lambda h: function(at + h), 1e-3)[0]


# -- buffers ---------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """The loss of a step uses what the step before has computed from a hyper-parameter."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(tensor(0.5))
        self.seen: Tensor
        self.register_buffer("seen", tensor(0.0))
        self.in_place = in_place

    def forward(self, scale: Tensor) -> Tensor:
        value = (self.w * self.seen.clone() - 1) ** 2  # it is written in place below
        self.seen = self.seen.mul_(0.5).add_(scale) if self.in_place else scale.sin()
        return value


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("strategy", [*REVERSE_AND_FORWARD, Checkpointed(product="mixed")], ids=str)
def test_a_buffer_computed_from_hyper(strategy: Strategy, in_place: bool) -> None:
    problem = Problem.from_module(
        Remembers(in_place), lambda m, h, b: m(h["s"]), optim.sgd(lr=0.1, momentum=0.5)
    )

    def end(s: Tensor, strategy: Strategy) -> Tensor:
        traj = unroll(problem, None, None, steps=4, hyper={"s": s}, strategy=strategy)
        return traj.params["w"]

    s = tensor(0.7).requires_grad_()
    (found,) = torch.autograd.grad(end(s, strategy), s)
    expected = slope(lambda x: end(tensor(x), StoreAll()).item(), 0.7)
    assert found.item() == pytest.approx(expected, rel=1e-8)
    assert not problem.computed_buffers  # a problem remembers nothing of a run


# -- padding ---------------------------------------------------------------------------------------

ROWS = torch.tensor([[0, 1], [2, 0]])


def plain_embedding(rate: float, decay: float) -> Tensor:
    net = nn.Embedding(3, 2, padding_idx=0, **F64)
    with torch.no_grad():
        net.weight.copy_(torch.arange(6.0, **F64).reshape(3, 2) / 5 + 0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, weight_decay=decay, momentum=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        (net(ROWS).sum(1).sin().sum() ** 2).backward()
        optimizer.step()
    return net.weight.detach().square().sum()


def embedded_loss(net: nn.Module) -> Tensor:
    return net(ROWS).sum(1).sin().sum() ** 2


def embedding() -> nn.Embedding:
    net = nn.Embedding(3, 2, padding_idx=0, **F64)
    with torch.no_grad():
        net.weight.copy_(torch.arange(6.0, **F64).reshape(3, 2) / 5 + 0.1)
    return net


@pytest.mark.parametrize("strategy", REVERSE_AND_FORWARD, ids=str)
def test_a_padding_row_that_weight_decay_moves(strategy: Strategy) -> None:
    problem = Problem.from_module(
        embedding(),
        lambda m, h, b: embedded_loss(m),
        optim.sgd(lr=0.05, momentum=0.5),
        optimizer_hyper=("weight_decay",),
    )
    hyper = {"weight_decay": tensor(0.3)}
    value, grads = metagradient(
        lambda t, h: t.params["weight"].square().sum(),
        problem,
        None,
        None,
        steps=4,
        hyper=hyper,
        wrt="hyper",
        strategy=strategy,
    )
    assert value.item() == pytest.approx(plain_embedding(0.05, 0.3).item(), rel=1e-12)
    expected = slope(lambda d: float(plain_embedding(0.05, d)), 0.3)
    assert grads["weight_decay"].item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_padding_row_under_track(sparse: bool) -> None:
    net, decay = embedding(), tensor(0.3).requires_grad_()
    net.sparse = sparse
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5)
    with track(net, optimizer, hyper={"weight_decay": decay}) as loop:
        for _ in range(4):
            loop.step(embedded_loss(loop.model))
    loop.parameters()["weight"].square().sum().backward()
    assert decay.grad is not None
    expected = slope(lambda d: float(plain_embedding(0.05, d)), 0.3)
    assert decay.grad.item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("product", ["mixed", "finite"])
def test_products_that_assume_symmetry_refuse_padding(product: str) -> None:
    problem = Problem.from_module(
        embedding(), lambda m, h, b: embedded_loss(m) * h, optim.sgd(lr=0.05)
    )
    with pytest.raises(NotDifferentiableError, match=f'{product}.*padding_idx=0.*"reverse"'):
        metagradient(
            lambda t, h: t.params["weight"].sum(),
            problem,
            None,
            None,
            steps=2,
            hyper=tensor(1.0),
            strategy=Checkpointed(product=product),
        )


# -- hooks -----------------------------------------------------------------------------------------


class Hooked(nn.Module):
    """A network whose hook of some kind changes the gradient that passes through it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(2, 2, **F64)
        self.last = nn.Linear(2, 1, **F64)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.linspace(-0.5, 0.8 + 0.1 * i, p.numel(), **F64).reshape(p.shape))
        if kind == "module":
            self.last.register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.3,))  # type: ignore[index]
        if kind == "module, before":
            self.last.register_full_backward_pre_hook(lambda m, go: (go[0] * go[0].abs(),))  # type: ignore[index]
        if kind == "parameter":
            self.first.weight.register_hook(lambda g: g * g.abs())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if self.kind == "tensor" and hidden.requires_grad:
            hidden.register_hook(lambda g: g * g.abs() + g)
        return self.last(hidden)


X, Y = torch.tensor([[0.3, -0.8], [1.0, 0.4]], **F64), torch.tensor([[1.0], [-0.5]], **F64)
KINDS = ["tensor", "module", "module, before", "parameter"]


def hooked_loss(net: Any, scale: Any) -> Tensor:
    return (net(X) * scale - Y).square().sum()


def plain_hooked(kind: str, scale: float) -> list[Tensor]:
    net = Hooked(kind)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        hooked_loss(net, scale).backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def outer(params: Any) -> Tensor:
    return sum(((p - 0.1) ** 2).sum() for p in params)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", EXACT, ids=str)
def test_a_hook_acts_in_the_inner_pass_only(strategy: Strategy, kind: str) -> None:
    problem = Problem.from_module(
        Hooked(kind), lambda m, h, b: hooked_loss(m, h), optim.sgd(lr=0.1, momentum=0.5)
    )
    value, found = metagradient(
        lambda t, h: outer(t.params.values()),
        problem,
        None,
        None,
        steps=3,
        hyper=tensor(0.9),
        wrt="hyper",
        strategy=strategy,
    )
    assert value.item() == pytest.approx(outer(plain_hooked(kind, 0.9)).item(), rel=1e-12)
    expected = slope(lambda s: float(outer(plain_hooked(kind, s))), 0.9)
    assert found.item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_acts_in_the_inner_pass_only_under_track(kind: str) -> None:
    net, scale = Hooked(kind), tensor(0.9).requires_grad_()
    with track(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)) as loop:
        for _ in range(3):
            loop.step(hooked_loss(loop.model, scale))
    outer(loop.parameters().values()).backward()
    expected = slope(lambda s: float(outer(plain_hooked(kind, s))), 0.9)
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("strategy", [FirstOrder(), StoreAll()], ids=str)
def test_hooks_on_parameters_run_as_in_training(strategy: Strategy) -> None:
    problem = Problem.from_module(
        Hooked("parameter"), lambda m, h, b: hooked_loss(m, 0.9), optim.sgd(lr=0.1, momentum=0.5)
    )
    found = unroll(problem, None, None, steps=3, strategy=strategy).params.values()
    for a, b in zip(found, plain_hooked("parameter", 0.9), strict=True):
        torch.testing.assert_close(a.detach(), b)


@pytest.mark.parametrize("kind", ["tensor", "parameter"])
def test_mixed_refuses_hooks(kind: str) -> None:
    problem = Problem.from_module(
        Hooked(kind), lambda m, h, b: hooked_loss(m, h), optim.sgd(lr=0.1)
    )
    with pytest.raises(NotDifferentiableError, match=r'hook.*product="reverse"'):
        metagradient(
            lambda t, h: outer(t.params.values()),
            problem,
            None,
            None,
            steps=2,
            hyper=tensor(0.9),
            strategy=Checkpointed(product="mixed"),
        )


class Reversed(torch.autograd.Function):
    """The identity, whose gradient changes its sign."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


def test_mixed_is_compared_with_reverse() -> None:
    problem = Problem(
        lambda p, h, b: (Reversed.apply(p["w"][:1]) * p["w"][1:] * h).sin().sum(), optim.sgd(lr=0.3)
    )
    with pytest.raises(
        NotDifferentiableError, match=r'"mixed" is off by .* Write product="reverse"'
    ):
        metagradient(
            lambda t, h: t.params["w"].square().sum(),
            problem,
            {"w": tensor([0.4, 0.7])},
            None,
            steps=2,
            hyper=tensor(0.9),
            strategy=Checkpointed(product="mixed"),
        )


# -- what the user holds constant ------------------------------------------------------------------


def no_grad(x: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        return by(x)


STOPS: dict[str, Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "detach": lambda x, by: by(x).detach(),
    "no_grad": no_grad,
    "no_grad as a decorator": lambda x, by: torch.no_grad()(by)(x),
    "data": lambda x, by: by(x).data,
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_target_is_a_constant_under_every_strategy(stop: str) -> None:
    matrix = tensor([[1.0, 0.5], [-0.2, 1.0]])

    def loss(p: Any, h: Tensor, b: object) -> Tensor:
        target = STOPS[stop](p["w"], lambda w: (matrix @ w * h).tanh())
        return h * (p["w"] - target).pow(2).sum() + (p["w"] * target).sum()

    w = tensor([1.0, 2.0])
    h = tensor(0.8).requires_grad_()
    end = w
    for _ in range(3):  # a loop with create_graph
        end = end.detach().requires_grad_() if end is w else end
        (g,) = torch.autograd.grad(loss({"w": end}, h, None), end, create_graph=True)
        end = end - 0.1 * g
    (expected,) = torch.autograd.grad(end.square().sum(), h)
    for strategy in (*REVERSE_AND_FORWARD, Checkpointed(product="mixed")):
        _, found = metagradient(
            lambda t, h: t.params["w"].square().sum(),
            Problem(loss, optim.sgd(lr=0.1)),
            {"w": w},
            None,
            steps=3,
            hyper=tensor(0.8),
            wrt="hyper",
            strategy=strategy,
        )
        torch.testing.assert_close(found, expected, msg=str(strategy))


# -- dropped without a word ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [Checkpointed(), ForwardMode()], ids=str)
def test_batches_that_require_grad_outside_of_vmap(strategy: Strategy) -> None:
    problem = Problem(lambda p, h, b: (p["w"] * b - h) ** 2, optim.sgd(lr=0.1))
    keys = tensor([[1.0, 2.0], [3.0, 4.0]]).requires_grad_()
    h = tensor(1.0).requires_grad_()

    def run(rows: Tensor) -> Tensor:
        start = {"w": tensor(0.5)}
        return unroll(problem, start, rows, hyper=h, strategy=strategy).params["w"]

    with pytest.raises(innerloop.InvalidInputError, match="batches requires grad"):
        torch.func.vmap(run)(keys)
    assert torch.func.vmap(run)(keys.detach()).shape == (2,)


@pytest.mark.parametrize("strategy", REVERSE_AND_FORWARD, ids=str)
def test_a_derivative_that_is_zero_is_no_mistake(strategy: Strategy) -> None:
    problem = Problem(
        lambda p, h, b: (p["w"] ** 2).sum(), optim.sgd(lr=0.1), optimizer_hyper=("weight_decay",)
    )
    hyper = {"weight_decay": tensor(0.1)}
    arguments = (problem, {"w": torch.zeros(2, **F64)}, None)
    _, grads = metagradient(
        lambda t, h: t.params["w"].sum(),
        *arguments,
        steps=2,
        hyper=hyper,
        wrt="hyper",
        strategy=strategy,
    )
    assert grads["weight_decay"].item() == 0
    with pytest.raises(NotDifferentiableError, match="no gradient arrives at hyper"):
        metagradient(
            lambda t, h: t.params["w"].sum(),
            Problem(lambda p, h, b: (p["w"] ** 2).sum(), optim.sgd(lr=0.1)),
            *arguments[1:],
            steps=2,
            hyper={"unused": tensor(1.0)},
            wrt="hyper",
            strategy=strategy,
        )


def quadratic(net: Any) -> Tensor:
    return (net(X) - Y).square().mean()


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("learn", ["init", "outer"])
def test_a_copy_of_the_model_in_the_outer_loss(learn: Any, first_order: bool) -> None:
    found = []
    for copied in (copy.deepcopy, lambda net: net):
        net, rate = Hooked("none"), tensor(0.1).requires_grad_()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with track(net, optimizer, learn=learn, hyper={"lr": rate}, first_order=first_order) as run:
            for _ in range(2):
                # Inside the loop a copy is a constant, as in PyTorch.
                run.step(quadratic(run.model) + copy.deepcopy(run.model).last.weight.sum())
            quadratic(copied(run.model)).backward()
        found.append([rate.grad, *[p.grad for p in net.parameters()]])
    assert found[0][0] is not None
    assert (found[0][1] is None) == (learn == "outer")
    torch.testing.assert_close(found[0], found[1])


def test_a_copy_that_is_an_average_is_refused() -> None:
    net = Hooked("none")
    with track(net, torch.optim.SGD(net.parameters(), lr=0.1)) as loop:
        average = torch.optim.swa_utils.AveragedModel(loop.model)
        for _ in range(2):
            loop.step(quadratic(loop.model))
            average.update_parameters(loop.model)
        with torch.no_grad():
            assert quadratic(average).isfinite()
        with pytest.raises(NotDifferentiableError, match=r"copy of loop.model.*AveragedModel"):
            quadratic(average).backward()
        target = copy.deepcopy(loop.model).requires_grad_(False)
        assert not quadratic(target).requires_grad
        assert isinstance(copy.deepcopy(loop.model).last.weight, nn.Parameter)
    with track(net, torch.optim.SGD(net.parameters(), lr=0.1), learn="nothing") as loop:
        loop.step(quadratic(loop.model))
        trained_further = copy.deepcopy(loop.model)
        torch.optim.SGD(trained_further.parameters(), lr=0.1)  # leaves of its own


def test_an_embedding_without_padding_keeps_its_kernel() -> None:
    weight = torch.randn(3, 2, requires_grad=True)
    with innerloop.nn.replacing():
        out = F.embedding(ROWS, weight)
    assert type(out.grad_fn).__name__ == "EmbeddingBackward0"


# -- targets ---------------------------------------------------------------------------------------

MATRIX = tensor([[1.0, 0.5], [-0.2, 1.0]])


def targets(p: Any, h: Tensor, b: object) -> Tensor:
    return (MATRIX @ p["w"] * h).tanh()


def towards(p: Any, h: Tensor, b: object, target: Tensor) -> Tensor:
    return h * (p["w"] - target).pow(2).sum() + (p["w"] * target).sum()


def plain_towards(h: float) -> float:
    w = tensor([1.0, 2.0])
    for _ in range(3):
        w = w.detach().requires_grad_()
        loss = towards({"w": w}, tensor(h), None, targets({"w": w.detach()}, tensor(h), None))
        (g,) = torch.autograd.grad(loss, w)
        w = w - 0.1 * g
    return w.square().sum().item()


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(tensor([1.0, 2.0]))


def problem_with_targets(from_module: bool, rule: optim.Optimizer | None = None) -> Problem:
    rule = rule or optim.sgd(lr=0.1)
    if not from_module:
        return Problem(towards, rule, targets=targets)
    return Problem.from_module(
        Weight(),
        lambda m, h, b, target: towards({"w": m.w}, h, b, target),
        rule,
        targets=lambda m, h, b: targets({"w": m.w}, h, b),
    )


@pytest.mark.parametrize("from_module", [False, True])
@pytest.mark.parametrize("strategy", REVERSE_AND_FORWARD, ids=str)
def test_targets_are_differentiated_as_training_moves_them(
    strategy: Strategy, from_module: bool
) -> None:
    value, found = metagradient(
        lambda t, h: t.params["w"].square().sum(),
        problem_with_targets(from_module),
        {"w": tensor([1.0, 2.0])},
        None,
        steps=3,
        hyper=tensor(0.8),
        wrt="hyper",
        strategy=strategy,
    )
    assert value.item() == pytest.approx(plain_towards(0.8), rel=1e-12)
    assert found.item() == pytest.approx(slope(plain_towards, 0.8), rel=1e-7)


def plain_towards_by_lbfgs(h: float) -> float:
    w = tensor([1.0, 2.0]).requires_grad_()
    optimizer = torch.optim.LBFGS([w], lr=0.1, max_iter=3)
    for _ in range(2):
        target = targets({"w": w.detach()}, tensor(h), None)

        def closure(target: Tensor = target) -> float:
            optimizer.zero_grad()
            loss = towards({"w": w}, tensor(h), None, target)
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
    return w.square().sum().item()


@pytest.mark.parametrize("from_module", [False, True])
@pytest.mark.parametrize("strategy", [StoreAll(), Checkpointed(product="reverse")], ids=str)
def test_targets_hold_for_a_step_that_evaluates_the_loss_often(
    strategy: Strategy, from_module: bool
) -> None:
    problem = problem_with_targets(from_module, optim.lbfgs(lr=0.1, max_iter=3))
    value, found = metagradient(
        lambda t, h: t.params["w"].square().sum(),
        problem,
        {"w": tensor([1.0, 2.0])},
        None,
        steps=2,
        hyper=tensor(0.8),
        wrt="hyper",
        strategy=strategy,
    )
    assert value.item() == pytest.approx(plain_towards_by_lbfgs(0.8), rel=1e-12)
    assert found.item() == pytest.approx(slope(plain_towards_by_lbfgs, 0.8), rel=1e-7)


def test_targets_elsewhere() -> None:
    problem = problem_with_targets(False)
    start = {"w": tensor([1.0, 2.0])}
    found = unroll(problem, start, None, steps=3, hyper=tensor(0.8), strategy=FirstOrder())
    assert found.params["w"].square().sum().item() == pytest.approx(plain_towards(0.8))
    with pytest.raises(NotDifferentiableError, match=r'"mixed".*targets=.*"reverse"'):
        metagradient(
            lambda t, h: t.params["w"].sum(),
            problem,
            start,
            None,
            steps=2,
            hyper=tensor(0.8),
            strategy=Checkpointed(product="mixed"),
        )


# -- a buffer that requires grad -------------------------------------------------------------------


class Scaled(nn.Module):
    """A loss (sum w b)² whose b is a buffer, a hypernetwork's output say."""

    b: Tensor

    def __init__(self, b: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        self.register_buffer("b", b)

    def forward(self) -> Tensor:
        return (self.w * self.b).sum() ** 2


def by_hand(source: Tensor) -> Tensor:
    """The gradient of the outer loss behind two steps of SGD, by plain PyTorch."""
    b = source.exp()
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        (g,) = torch.autograd.grad((w * b).sum() ** 2, w, create_graph=True)
        w = w - 0.1 * g
    return torch.autograd.grad(w.sin().sum(), source)[0]


SOURCE = [0.2, -0.4]


@pytest.mark.parametrize("strategy", [StoreAll(), Checkpointed(slots=1), Checkpointed()], ids=repr)
def test_a_buffer_that_requires_grad(strategy: Strategy) -> None:
    source = tensor(SOURCE).requires_grad_()
    problem = innerloop.Problem.from_module(
        Scaled(source.exp()), lambda m, hyper, batch: m(), innerloop.optim.sgd(lr=0.1)
    )
    traj = innerloop.unroll(problem, None, None, steps=2, strategy=strategy)
    (found,) = torch.autograd.grad(traj.params["w"].sin().sum(), source)
    torch.testing.assert_close(found, by_hand(source), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "strategy", [ForwardMode(), innerloop.Truncated(1), innerloop.FirstOrder()], ids=repr
)
def test_a_buffer_that_requires_grad_where_none_is_passed_on(strategy: Strategy) -> None:
    source = tensor(SOURCE).requires_grad_()
    problem = innerloop.Problem.from_module(
        Scaled(source.exp()), lambda m, hyper, batch: m(), innerloop.optim.sgd(lr=0.1)
    )

    def gradient() -> None:
        traj = innerloop.unroll(problem, None, None, steps=2, strategy=strategy)
        torch.autograd.grad(traj.params["w"].sin().sum(), source)

    with pytest.raises(innerloop.InnerLoopError):
        gradient()


def test_a_buffer_that_requires_grad_in_loops_written_by_hand() -> None:
    source = tensor(SOURCE).requires_grad_()
    truth = by_hand(source)
    model = Scaled(source.exp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with innerloop.track(model, optimizer) as loop:
        for _ in range(2):
            loop.step(loop.model())
    (found,) = torch.autograd.grad(loop.model.w.sin().sum(), source)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    model = Scaled(source.exp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with innerloop.higher.innerloop_ctx(model, optimizer) as (fast, inner):
        for _ in range(2):
            inner.step(fast())
        (found,) = torch.autograd.grad(fast.w.sin().sum(), source)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    with pytest.raises(innerloop.InvalidInputError, match="the buffer 'b' of the model"):
        innerloop.track(model, optimizer, strategy=Checkpointed())


# -- the meta device: shapes without numbers -------------------------------------------------------


def on_meta() -> Any:
    return nn.Linear(2, 1).to("meta")


def tracked_on_meta(**arguments: Any) -> object:
    model = on_meta()
    return innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1), **arguments)


def meta_problem() -> Any:
    return innerloop.Problem(
        lambda params, hyper, batch: (params["w"] * hyper - batch).square().sum(),
        innerloop.optim.sgd(lr=0.1),
    )


def meta_loop(where: str, call: Callable[..., object]) -> object:
    """Call a front end of `Problem` with parameters, hyper or batches on the meta device."""
    params, hyper, batch = (
        torch.ones((), device="meta" if where == name else "cpu")
        for name in ("params", "hyper", "batch")
    )
    return call(meta_problem(), {"w": params}, [batch] * 2, hyper=hyper)


def outer_of_w(traj: Any, hyper: Any) -> Any:
    return traj.params["w"].sum()


OF_PROBLEM: dict[str, Callable[..., object]] = {
    "unroll": unroll,
    "unroll, Checkpointed": partial(unroll, strategy=Checkpointed()),
    "unroll, FirstOrder": partial(unroll, strategy=FirstOrder()),
    "unroll, ForwardMode": partial(unroll, strategy=ForwardMode()),
    "metagradient": partial(metagradient, outer_of_w, wrt="hyper"),
    "check": partial(innerloop.check_metagradient, outer_of_w, wrt="hyper"),
}
ON_META: dict[str, Callable[..., object]] = {
    "track": tracked_on_meta,
    "track, evaluation": lambda: tracked_on_meta(learn="nothing"),
    "track, first order": lambda: tracked_on_meta(first_order=True),
    "track, Checkpointed": lambda: tracked_on_meta(strategy=Checkpointed()),
    "track, Truncated": lambda: tracked_on_meta(strategy=Truncated(1), learn="outer"),
    "from_module": lambda: unroll(
        innerloop.Problem.from_module(
            on_meta(), lambda model, hyper, x: model(x).sum(), innerloop.optim.sgd(lr=0.1)
        ),
        None,
        [torch.ones(3, 2, device="meta")],
    ),
    **{
        f"{name}, {where}": partial(meta_loop, where, call)
        for where in ("params", "hyper", "batch")
        for name, call in OF_PROBLEM.items()
    },
    "plan": partial(meta_loop, "params", innerloop.plan),
    "implicit_root": lambda: innerloop.implicit_root(
        lambda x, a: x - a, *torch.ones(2, device="meta", requires_grad=True)
    ),
}


@pytest.mark.parametrize("name", ON_META)
def test_the_meta_device_is_refused_by_name(name: str) -> None:
    with pytest.raises(innerloop.InvalidInputError, match="on the meta device"):
        ON_META[name]()
