"""The replacing mode itself: which derivatives it counts, what lies above it, autocast, names by
which operations are reached."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import innerloop
from innerloop._utils import torch_private
from innerloop.nn._derivative_order import _thread
from tests.oracles import assert_derivative, derivative, smooth_noise

F: Any = functional  # the stubs of torch lag behind its arguments
pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def _nothing_is_left_on() -> Any:
    yield
    assert torch_private.function_mode() is None
    assert (_thread.loops, _thread.transform_levels, _thread.any_order) == (0, 0, False)


# -- a gradient inside of the inner loss -----------------------------------------------------------

NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(4),
    "batch": lambda: nn.BatchNorm1d(4),
    "group": lambda: nn.GroupNorm(2, 4),
}
X = smooth_noise(6, 3)


def network(norm: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), NORMS[norm](), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.3 * smooth_noise(*p.shape, phase=float(i)))
    return model


def penalised(model: Any, transform: bool = False) -> Tensor:
    """With a gradient penalty."""
    if transform:
        slopes = torch.func.grad(lambda x: model(x).sum())(X)
        return model(X).square().mean() + slopes.square().sum()
    x = X.clone().requires_grad_()
    out = model(x)
    (slopes,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.square().mean() + slopes.square().sum()


def plainly(norm: str, lr: float) -> float:
    torch.manual_seed(0)
    model = network(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(3):
        optimizer.zero_grad()
        penalised(model).backward()
        optimizer.step()
    return float(penalised(model).detach())


def tracked(norm: str, transform: bool = False) -> float:
    torch.manual_seed(0)
    lr = torch.tensor(0.05, requires_grad=True)
    model = network(norm)
    with innerloop.track(
        model, torch.optim.SGD(model.parameters(), lr=0.05), hyper={"lr": lr}
    ) as loop:
        for _ in range(3):
            loop.step(penalised(loop.model, transform))
        outer = penalised(loop.model, transform)
    return float(torch.autograd.grad(outer, lr)[0])


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_gradient_penalty_is_refused_and_right_in_any_order(norm: str):
    with pytest.raises(innerloop.NotDifferentiableError, match=r"gradient penalty.*any_order"):
        tracked(norm)
    with innerloop.nn.any_order():
        found = tracked(norm)
    assert_derivative(found, derivative(lambda h: plainly(norm, 0.05 + h)), norm)


def test_a_gradient_penalty_through_group_norm_needs_nothing():
    assert_derivative(
        tracked("group"), derivative(lambda h: plainly("group", 0.05 + h)), "group norm"
    )


def test_a_gradient_penalty_by_a_transform_is_noticed():
    assert_derivative(
        tracked("layer", transform=True),
        derivative(lambda h: plainly("layer", 0.05 + h)),
        "layer norm",
    )


# -- transforms and autograd around a loop ---------------------------------------------------------


def meta_loss(lr: Tensor) -> Tensor:
    problem = innerloop.Problem(
        lambda p, h, b: (F.layer_norm(b @ p["w"], [4]) * X.sum(1, keepdim=True)).tanh().sum(),
        innerloop.optim.sgd(),
        optimizer_hyper=lambda h, t: h,
    )
    start = {"w": smooth_noise(3, 4)}
    return innerloop.unroll(problem, start, [X] * 2, hyper={"lr": lr}).params["w"].sin().sum()


def second_by_autograd_around_grad(lr: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(torch.func.grad(meta_loss)(lr), lr)
    return found


def second_by_autograd_around_jvp(lr: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(torch.func.jvp(meta_loss, (lr,), (torch.ones_like(lr),))[1], lr)
    return found


def second_by_dual_numbers(lr: Tensor) -> Tensor:
    with forward_ad.dual_level():
        (slope,) = torch.autograd.grad(meta_loss(forward_ad.make_dual(lr, torch.ones_like(lr))), lr)
        return forward_ad.unpack_dual(slope).tangent


@pytest.mark.parametrize(
    "second",
    [
        second_by_autograd_around_grad,
        second_by_autograd_around_jvp,
        second_by_dual_numbers,
        lambda lr: torch.func.hessian(meta_loss)(lr.detach()),
        lambda lr: torch.func.jacrev(torch.func.jacfwd(meta_loss))(lr.detach()),
    ],
    ids=[
        "autograd of grad",
        "autograd of jvp",
        "dual numbers of autograd",
        "hessian",
        "reverse over forward",
    ],
)
def test_second_derivatives_of_a_meta_loss_through_layer_norm(second: Any):
    def slope(h: float) -> float:
        lr = torch.tensor(0.3 + h, requires_grad=True)
        return float(torch.autograd.grad(meta_loss(lr), lr)[0])

    found = second(torch.tensor(0.3, requires_grad=True))
    assert_derivative(float(found), derivative(slope), "second derivative of the meta-loss")


def test_solving_by_reverse_over_forward_is_refused():
    """PyTorch 2.13 has it wrong; in the other order it is right."""

    def of_solution(lr: Tensor) -> Tensor:
        problem = innerloop.Problem(
            lambda p, h, b: torch.linalg.solve(3 * torch.eye(3) + p["w"], X[0]).square().sum(),
            innerloop.optim.sgd(),
            optimizer_hyper=lambda h, t: h,
        )
        return (
            innerloop.unroll(problem, {"w": smooth_noise(3, 3)}, None, steps=2, hyper={"lr": lr})
            .params["w"]
            .sum()
        )

    at = torch.tensor(0.1)
    with pytest.raises(
        innerloop.NotDifferentiableError, match=r"linalg\.solve .*reverse mode over forward mode"
    ):
        torch.func.jacrev(torch.func.jacfwd(of_solution))(at)
    slope = torch.func.grad(of_solution)
    found = torch.func.hessian(of_solution)(at)
    assert_derivative(float(found), derivative(lambda h: float(slope(at + h))), "hessian")


@pytest.mark.parametrize("block", [innerloop.nn.any_order, None])
def test_a_functional_module_differentiated_by_reverse_over_forward(block: Any):
    """PyTorch 2.13 has even the second derivative wrong in this order; the third needs the
    block."""
    call, params, _ = innerloop.functional(nn.LayerNorm(4))
    x, shift = smooth_noise(3, 4), smooth_noise(3, 4, phase=2.0)

    def curve(s: Tensor) -> Tensor:
        return (call(params, s * x + shift) * x).tanh().sum()

    at = torch.tensor(0.3)
    if block is None:
        found = torch.func.jacrev(torch.func.jacfwd(curve))(at)
        below = torch.func.grad(curve)
    else:
        s = at.clone().requires_grad_()
        with block():
            (first,) = torch.autograd.grad(curve(s), s, create_graph=True)
            (second,) = torch.autograd.grad(first, s, create_graph=True)
        (found,) = torch.autograd.grad(second, s)
        below = torch.func.grad(torch.func.grad(curve))
    assert_derivative(float(found), derivative(lambda h: float(below(at + h))), "functional")


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("layer", lambda z: torch.layer_norm(z, (5,))),
        ("batch", lambda z: torch.batch_norm(z, None, None, None, None, True, 0.1, 1e-5, False)),
        (
            "instance",
            lambda z: torch.instance_norm(z, None, None, None, None, True, 0.1, 1e-5, False),
        ),
    ],
)
def test_norms_by_the_names_that_torch_itself_uses(name: str, call: Callable[[Tensor], Tensor]):
    z = smooth_noise(2, 3, 5).requires_grad_()
    with innerloop.nn.any_order(), innerloop.nn.replacing():
        out = call(z)
    theirs = call(z)
    torch.testing.assert_close(out, theirs, rtol=1e-12, atol=1e-13)
    assert "Norm" not in type(out.grad_fn).__name__
    ours, first = (torch.autograd.grad(y.sin().sum(), z)[0] for y in (out, theirs))
    torch.testing.assert_close(ours, first, rtol=1e-12, atol=1e-13)


# -- what lies above -------------------------------------------------------------------------------


class Watching(TorchFunctionMode):
    """A user's own mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_mode_of_the_user_during_the_first_step():
    model = nn.Linear(2, 1)
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
        with Watching():
            loop.step(loop.model(torch.ones(2)).square().sum())
        loop.step(loop.model(torch.ones(2)).square().sum())
    assert torch_private.function_mode() is None


def test_a_mode_of_the_user_around_the_whole_block():
    model = nn.Linear(2, 1)
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(
            innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1))
        )
        stack.enter_context(Watching())
        loop.step(loop.model(torch.ones(2)).square().sum())
    assert torch_private.function_mode() is None


def test_checkpointed_attention_is_replaced_when_it_runs_again():
    def gradients(checkpointed: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(0)

        class Recomputed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

            def forward(self, x: Tensor) -> Any:
                return (
                    checkpoint(self.layer, x, use_reentrant=False)
                    if checkpointed
                    else self.layer(x)
                )

        model = Recomputed()
        with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
            for _ in range(2):
                loop.step(loop.model(smooth_noise(2, 3, 4)).square().mean())
            outer = loop.model(smooth_noise(2, 3, 4)).square().mean()
        return torch.autograd.grad(outer, list(model.parameters()))

    for ours, truth in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, truth)


# -- at a later step -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "late",
    [
        lambda w: torch.cholesky_inverse(w @ w.T + torch.eye(3)).sum(),
        lambda w: F.embedding(torch.tensor([0, 0, 1]), w, scale_grad_by_freq=True).square().sum(),
    ],
    ids=["cholesky_inverse", "embedding by frequency"],
)
def test_a_wrong_operation_of_a_later_step_is_refused(late: Callable[[Tensor], Tensor]):
    model = nn.Linear(3, 3)
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
        loop.step(loop.model.weight.square().sum())
        with pytest.raises(innerloop.NotDifferentiableError, match="wrong second derivative"):
            loop.step(late(loop.model.weight))
        loop.step(
            F.embedding(torch.tensor([0, 0, 1]), loop.model.weight).square().sum()
        )  # nothing wrong with this one


def test_a_distance_of_the_users_inside_of_a_loss_is_seen():
    """``F.triplet_margin_with_distance_loss`` hands itself over to modes as a whole."""
    a, b, c = (smooth_noise(4, 3, phase=float(i)).requires_grad_() for i in range(3))

    def distance(x: Tensor, y: Tensor) -> Tensor:
        seen.append(F.hardsigmoid(x).grad_fn)
        return (x - y).square().sum(-1)

    seen: list[Any] = []
    expected = F.triplet_margin_with_distance_loss(a, b, c, distance_function=distance)
    with innerloop.nn.replacing():
        found = F.triplet_margin_with_distance_loss(a, b, c, distance_function=distance)
    assert torch.equal(found, expected)
    assert ["Hardsigmoid" in type(node).__name__ for node in seen] == [True, True, False, False]


# -- autocast --------------------------------------------------------------------------------------

FAR = (3 + 0.05 * smooth_noise(40, 8)).float()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.cdist(x, x.flip(0)),
        lambda x: F.multi_margin_loss(x, torch.arange(40) % 8),
        lambda x: F.embedding_bag(torch.arange(6).reshape(2, 3), x),
        lambda x: F.hardsigmoid(x),
        lambda x: torch.cholesky_inverse(torch.eye(8) + 0 * x.sum()),
    ],
    ids=["cdist", "multi_margin_loss", "embedding_bag", "hardsigmoid", "cholesky_inverse"],
)
@pytest.mark.parametrize("half", [False, True])
def test_autocast_changes_neither_dtype_nor_precision(call: Any, half: bool):
    x = (FAR.bfloat16() if half else FAR).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = call(x)
        with innerloop.nn.replacing():
            found = call(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(
        found, expected, rtol=2e-2 if expected.dtype == torch.bfloat16 else 1e-4, atol=1e-3
    )


@pytest.mark.parametrize("front", ["track", "bridge", "unroll"])
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
def test_the_warning_of_two_sizes_points_at_the_users_line(name: str, front: str) -> None:
    """PyTorch points at the caller of its function, which is the mode while that is on."""
    function = getattr(torch.nn.functional, name)
    model, y = torch.nn.Linear(3, 1), torch.linspace(0, 1, 4)
    x = torch.linspace(-1, 1, 12).reshape(4, 3)

    def loss(model: Any) -> Tensor:
        return function(model(x), y)

    with warnings.catch_warnings(record=True) as plain:
        warnings.simplefilter("always")
        value = loss(model)
    found: Any
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if front == "track":
            with innerloop.track(model, innerloop.optim.sgd(lr=0.1)) as loop:
                found = loop.step(loss(loop.model))
        elif front == "bridge":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with innerloop.higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
                found = loss(fmodel)
                diffopt.step(found)
        else:
            problem = innerloop.Problem.from_module(
                model, lambda model, hyper, t: loss(model), innerloop.optim.sgd(lr=0.1)
            )
            found = innerloop.unroll(problem, None, [0]).losses[0]
    assert float(found.detach()) == value.item()
    assert [(w.filename, w.lineno, str(w.message), w.category) for w in caught] == [
        (w.filename, w.lineno, str(w.message), w.category) for w in plain
    ]
