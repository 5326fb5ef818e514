"""The forms that replace PyTorch's operations: when they do, when they must not, and what is
refused."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import innerloop
from innerloop import doctor
from innerloop._inner_gradient import graph
from innerloop._utils import torch_private
from innerloop.nn import _catalogue as catalogue
from innerloop.nn import _mode as replace
from innerloop.nn import functional as ours
from innerloop.nn._derivative_order import _thread
from innerloop.nn._replacements import recurrent
from tests.oracles import assert_derivative, derivative, smooth_noise

F: Any = functional  # the stubs of torch lag behind its arguments
pytestmark = pytest.mark.usefixtures("float64")
STEPS = 3


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 3)
        self.head = nn.Linear(3, 1)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.7 * smooth_noise(*p.shape, phase=float(i)))

    def forward(self, t: int) -> Tensor:
        indices = (torch.arange(6).reshape(2, 3) * (t + 2)) % 5
        return self.head(self.bag(indices).tanh()).square().mean()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def modes() -> int:
    """How many replacing modes were left on; they are taken off."""
    count = 0
    while isinstance(mode := torch_private.function_mode(), replace.ReplacementMode):
        mode.__exit__(None, None, None)
        count += 1
    return count


def node_of(x: Tensor) -> str:
    return type(x.grad_fn).__name__


@pytest.fixture(autouse=True)
def _nothing_is_left_on() -> Any:
    yield
    assert modes() == 0
    assert _thread.loops == 0


# -- when ------------------------------------------------------------------------------------------


def test_operations_are_replaced_inside_the_block_only() -> None:
    model, weight = Bags(), torch.ones(2, 1, requires_grad=True)
    look = lambda: node_of(F.embedding_bag(torch.tensor([[0, 1]]), weight))  # noqa: E731
    assert look() == "EmbeddingBagBackward0"
    with innerloop.track(model, sgd(model)) as loop:
        assert look() != "EmbeddingBagBackward0"
        loop.step(loop.model(0))
        assert look() != "EmbeddingBagBackward0"
    assert look() == "EmbeddingBagBackward0"


def test_the_mode_ends_with_an_exception() -> None:
    model = Bags()

    def run() -> None:
        with innerloop.track(model, sgd(model)) as loop:
            loop.step(loop.model(0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert modes() == 0


def test_blocks_may_end_in_the_order_in_which_they_began() -> None:
    model = Bags()
    loops = [innerloop.track(model, sgd(model)) for _ in range(2)]
    for loop in loops:
        loop.__enter__()
    for loop in loops:
        loop.step(loop.model(0))
    for loop in loops:
        loop.__exit__(None, None, None)
    assert modes() == 0


def test_another_mode_may_begin_inside_the_block() -> None:
    model = Bags()
    with innerloop.track(model, sgd(model)) as loop, torch.device("cpu"):
        loop.step(loop.model(0))
        loop.step(loop.model(1))


def test_a_loop_without_such_operations_looks_at_its_first_two_steps_only() -> None:
    """The first for operations to replace, both for edits of weights."""
    model = nn.Linear(2, 1)
    with innerloop.track(model, sgd(model)) as loop:
        for _ in range(2):
            assert torch_private.function_mode() is not None
            loop.step(loop.model(torch.ones(2)).square().sum())
        assert torch_private.function_mode() is None


def test_an_operation_of_a_later_step_is_refused_by_name_and_can_be_announced() -> None:
    model = Bags()

    def run() -> Tensor:
        with innerloop.track(model, sgd(model)) as loop:
            loop.step(loop.model.head(torch.ones(3)).square().sum())
            loop.step(loop.model(0))
            return loop.model(1)

    with pytest.raises(
        innerloop.NotDifferentiableError, match=r"F\.embedding_bag.*innerloop\.nn\.replacing"
    ):
        run()
    with innerloop.nn.replacing():
        run().backward()


def test_a_loss_computed_before_the_block_is_refused() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))
    loop = innerloop.track(model, sgd(model))
    with pytest.raises(
        innerloop.NotDifferentiableError, match=r"torch\._weight_norm.*wrong second derivative"
    ):
        loop.step(loop.model(torch.ones(2)).square().sum())


def test_what_leads_to_outer_tensors_alone_is_differentiated_once_and_not_refused() -> None:
    """A network outside of the loop gives the targets, through an operation without a second
    derivative."""

    def run(table: Tensor) -> Tensor:
        targets = F.embedding_bag(
            torch.tensor([[0, 1], [1, 2]]), table
        )  # before the block: PyTorch's own
        assert not table.requires_grad or node_of(targets) == "EmbeddingBagBackward0"
        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.3, -0.2]]))
        x = torch.tensor([[1.0, 0.5], [-0.3, 0.8]])
        with innerloop.track(model, sgd(model), learn="outer") as loop:
            for _ in range(STEPS):
                loop.step((loop.model(x) - targets).tanh().square().mean())
            return loop.model(x).sin().sum()

    table = smooth_noise(3, 1).requires_grad_()
    run(table).backward()
    direction = smooth_noise(3, 1, phase=1.0)
    truth = derivative(lambda h: run(table.detach() + h * direction).item())
    assert table.grad is not None
    assert_derivative((table.grad * direction).sum().item(), truth, "targets")


def test_the_choice_is_logged_once_and_listed(caplog: pytest.LogCaptureFixture) -> None:
    model = Bags()
    replace._announced.pop("F.embedding_bag", None)
    with caplog.at_level(logging.INFO, "innerloop"):
        for _ in range(2):
            with innerloop.track(model, sgd(model)) as loop:
                loop.step(loop.model(0))
    assert [record.message for record in caplog.records if "F.embedding_bag" in record.message] == [
        "F.embedding_bag is replaced by innerloop's own while gradients of gradients are "
        "tracked: it has no second derivative"
    ]
    assert innerloop.nn.replaced()["F.embedding_bag"] == "it has no second derivative"


def test_kernels_can_be_kept_and_their_second_derivative_is_then_refused() -> None:
    model = Bags()
    with innerloop.nn.keep_kernels(), innerloop.track(model, sgd(model)) as loop:
        loss = loop.model(0)
        with pytest.raises(innerloop.NotDifferentiableError, match="keep_kernels"):
            loop.step(loss)
    v = smooth_noise(3, 2)
    with innerloop.nn.keep_kernels(), innerloop.nn.replacing():  # wrong without an error: not kept
        assert (
            node_of(torch._weight_norm(v.requires_grad_(), torch.ones(3, 1)))
            != "WeightNormInterfaceBackward0"
        )


@pytest.mark.parametrize("arguments", [{"first_order": True}, {"learn": "nothing"}])
def test_kernels_stay_where_no_second_derivative_is_taken(arguments: dict[str, Any]) -> None:
    model = Bags()
    with innerloop.track(model, sgd(model), **arguments) as loop:
        assert node_of(loop.model.bag(torch.tensor([[0, 1]]))) == "EmbeddingBagBackward0"
        loop.step(loop.model(0))


def test_first_order_gradients_are_those_of_constant_inner_gradients() -> None:
    """With SGD the FOMAML gradient is the outer gradient at the adapted parameters, here taken by
    plain PyTorch."""
    plain = Bags()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3)
    for t in range(STEPS):
        optimizer.zero_grad()
        plain(t).backward()
        optimizer.step()
    truth = torch.autograd.grad(plain(STEPS), list(plain.parameters()))
    model = Bags()
    with innerloop.track(
        model, torch.optim.SGD(model.parameters(), lr=0.3), first_order=True
    ) as loop:
        for t in range(STEPS):
            loop.step(loop.model(t))
        loop.model(STEPS).backward()
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], list(truth), rtol=1e-12, atol=1e-14
    )

    model, seen = Bags(), []

    def loss(m: Any, hyper: Any, t: int) -> Tensor:
        seen.append(node_of(m.bag(torch.tensor([[0, 1]]))))
        return m(t)

    problem = innerloop.Problem.from_module(model, loss, innerloop.optim.sgd(lr=0.3))
    params = dict(model.named_parameters())
    traj = innerloop.unroll(problem, params, list(range(STEPS)), strategy=innerloop.FirstOrder())
    assert set(seen) == {"EmbeddingBagBackward0"}
    call, _, _ = innerloop.functional(model)
    found = torch.autograd.grad(call(traj.params, STEPS), list(params.values()))
    torch.testing.assert_close(list(found), list(truth), rtol=1e-12, atol=1e-14)


STRATEGIES = (
    innerloop.StoreAll(),
    innerloop.Checkpointed(),
    innerloop.Checkpointed(product="mixed"),
    innerloop.Checkpointed(product="finite"),
    innerloop.Truncated(STEPS),
    innerloop.ForwardMode(),
)


class Normed(nn.Module):
    """Operations that PyTorch gets wrong, or does not differentiate twice, of which each strategy
    sees the right forms."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(2, 3))
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.8 + 0.5 * smooth_noise(*p.shape, phase=float(i)))

    def forward(self, t: Any) -> Tensor:
        y = self.layer(smooth_noise(4, 2, phase=10.0 + float(t)))
        return torch.cdist(y, 0.5 * y.flip(1)).tanh().mean() + F.huber_loss(
            y, y.flip(0).sin(), delta=0.4
        )


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_every_strategy_takes_the_right_forms(strategy: innerloop.strategy.Strategy) -> None:
    def plain(lr: float) -> float:
        model = Normed()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for t in range(STEPS):
            optimizer.zero_grad()
            model(t).backward()
            optimizer.step()
        return model(STEPS).item()

    model = Normed()
    problem = innerloop.Problem.from_module(
        model,
        lambda m, hyper, t: m(t),
        innerloop.optim.sgd(lr=0.0),
        optimizer_hyper=lambda hyper, t: {"lr": hyper},
    )
    lr = torch.tensor(0.2, requires_grad=True)
    params = {name: p.detach() for name, p in model.named_parameters()}
    traj = innerloop.unroll(problem, params, list(range(STEPS)), hyper=lr, strategy=strategy)
    call, _, _ = innerloop.functional(model)
    outer = call(traj.params, STEPS)
    assert outer.item() == pytest.approx(plain(0.2), rel=1e-10)
    (found,) = torch.autograd.grad(outer, lr)
    assert_derivative(
        found.item(),
        derivative(lambda h: plain(0.2 + h)),
        repr(strategy),
        relative=1e-5 if "finite" in repr(strategy) else 1e-6,
    )


# -- loops inside of loops -------------------------------------------------------------------------


def normalised_net() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.6 * smooth_noise(*p.shape, phase=float(i)))
    return model


def error(model: Callable[[Tensor], Tensor], t: float) -> Tensor:
    return (model(smooth_noise(5, 2, phase=t)) - smooth_noise(5, 1, phase=t + 50)).square().mean()


def _called(model: nn.Module, params: dict[str, Tensor], x: Tensor) -> Any:
    return torch.func.functional_call(model, params, (x,))


def adapted(model: Any, steps: int = 2) -> Tensor:
    """An inner loop's outer loss."""
    with innerloop.track(model, innerloop.optim.sgd(lr=0.2)) as inner:
        for t in range(steps):
            inner.step(error(inner.model, float(t)))
        return error(inner.model, 9.0)


def test_a_loop_inside_a_loop_differentiates_layer_norm_three_times() -> None:
    """The outer loop trains the initialisation of the inner one; truth are plain second
    derivatives, differenced."""
    directions = [
        smooth_noise(*p.shape, phase=80.0 + i) for i, p in enumerate(normalised_net().parameters())
    ]

    def moved(h: float) -> nn.Module:
        model = normalised_net()
        with torch.no_grad():
            for p, v in zip(model.parameters(), directions, strict=True):
                p.add_(h * v)
        return model

    def plain(h: float) -> float:
        """Plain PyTorch whose gradients are taken by autograd up to the second derivative, which is
        right."""
        model = moved(h)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            values = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
            fast = dict(values)
            for t in range(2):
                loss = error(functools.partial(_called, model, fast), float(t))
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {n: p - 0.2 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            outer = error(functools.partial(_called, model, fast), 9.0)
            for p, g in zip(
                model.parameters(), torch.autograd.grad(outer, list(values.values())), strict=True
            ):
                p.grad = g
            optimizer.step()
        return error(model, 12.0).item()

    model = normalised_net()
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
        for _ in range(2):
            loop.step(adapted(loop.model))
        outer = error(loop.model, 12.0)
    assert outer.item() == pytest.approx(plain(0.0), rel=1e-10)
    outer.backward()
    found = sum(
        (p.grad * v).sum().item()
        for p, v in zip(model.parameters(), directions, strict=True)
        if p.grad is not None
    )
    assert_derivative(found, derivative(plain), "nested loops")


def test_a_third_derivative_of_layer_norm_is_refused_and_can_be_asked_for() -> None:
    model = normalised_net()
    params = list(model.parameters())
    with pytest.raises(innerloop.NotDifferentiableError, match=r"any_order"):
        torch.autograd.grad(adapted(model), params, create_graph=True)
    torch.autograd.grad(adapted(model), params)  # nothing to refuse
    with innerloop.nn.any_order():
        outer = adapted(model)
    slopes = torch.autograd.grad(outer, params, create_graph=True)
    directions = [smooth_noise(*p.shape, phase=80.0 + i) for i, p in enumerate(params)]
    along = torch.stack([(g * v).sum() for g, v in zip(slopes, directions, strict=True)]).sum()
    bends = torch.autograd.grad(along, params)

    def slope(h: float) -> float:
        moved = normalised_net()
        with torch.no_grad():
            for p, v in zip(moved.parameters(), directions, strict=True):
                p.add_(h * v)
        found = torch.autograd.grad(adapted(moved), list(moved.parameters()))
        return sum((g * v).sum().item() for g, v in zip(found, directions, strict=True))

    found = sum((g * v).sum().item() for g, v in zip(bends, directions, strict=True))
    assert_derivative(found, derivative(slope), "second derivative of the meta-loss")


# -- forms against PyTorch -------------------------------------------------------------------------

X, Y, W = smooth_noise(4, 3), smooth_noise(4, 3, phase=1.0), 1 + smooth_noise(4, 3, phase=2.0) / 2
LABELS, SIGNS = (
    torch.tensor([0, 2, 1, 2]),
    torch.tensor([[1.0], [-1.0], [-1.0], [1.0]]).expand(4, 3),
)
MANY = torch.tensor([[0, -1, 0], [2, 0, -1], [1, -1, 0], [2, -1, -1]])
IMAGE, GRID = smooth_noise(2, 3, 5, 6), 1.4 * smooth_noise(2, 3, 4, 2, phase=1.0)
FLAT, OFFSETS = torch.tensor([1, 2, 4, 5, 4, 3, 2, 2]), torch.tensor([0, 3, 3, 6])
TABLE = smooth_noise(6, 3)
LOG_PROBABILITIES = smooth_noise(
    7, 2, 5
)  # not normalised: PyTorch's gradient has a term of its own there
CTC = (torch.tensor([[1, 2, 2], [3, 1, 0]]), torch.tensor([7, 5]), torch.tensor([3, 2]))

CALLS: dict[
    str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]
] = {}


def enrol(name: str, mine: Any, theirs: Any, *args: Any, **options: Any) -> None:
    CALLS[f"{name} {options}"] = (mine, theirs, args, options)


for reduction in ("mean", "sum", "none"):
    enrol("mse", ours.mse_loss, F.mse_loss, X, Y, reduction=reduction)
    enrol("mse-weight", ours.mse_loss, F.mse_loss, X, Y, reduction=reduction, weight=W)
    enrol("huber", ours.huber_loss, F.huber_loss, X, Y, reduction=reduction, delta=0.4)
    enrol("huber-weight", ours.huber_loss, F.huber_loss, X, Y, reduction=reduction, weight=W)
    enrol("soft-margin", ours.soft_margin_loss, F.soft_margin_loss, X, SIGNS, reduction=reduction)
    enrol(
        "multi-margin",
        ours.multi_margin_loss,
        F.multi_margin_loss,
        X,
        LABELS,
        reduction=reduction,
        margin=0.7,
    )
    enrol(
        "multi-margin-2",
        ours.multi_margin_loss,
        F.multi_margin_loss,
        X,
        LABELS,
        reduction=reduction,
        p=2,
        weight=W[0],
    )
    enrol(
        "multilabel",
        ours.multilabel_margin_loss,
        F.multilabel_margin_loss,
        X,
        MANY,
        reduction=reduction,
    )
    enrol("ctc", ours.ctc_loss, F.ctc_loss, LOG_PROBABILITIES, *CTC, reduction=reduction)
    enrol(
        "ctc-flat",
        ours.ctc_loss,
        F.ctc_loss,
        LOG_PROBABILITIES,
        torch.tensor([1, 2, 2, 3, 1]),
        *CTC[1:],
        reduction=reduction,
        blank=4,
    )
enrol(
    "ctc-one",
    ours.ctc_loss,
    F.ctc_loss,
    LOG_PROBABILITIES[:, 0],
    CTC[0][0],
    torch.tensor(7),
    torch.tensor(3),
)
enrol(
    "ctc-short",
    ours.ctc_loss,
    F.ctc_loss,
    LOG_PROBABILITIES,
    CTC[0],
    torch.tensor([7, 1]),
    CTC[2],
    zero_infinity=True,
)
enrol(
    "ctc-no-label",
    ours.ctc_loss,
    F.ctc_loss,
    LOG_PROBABILITIES,
    CTC[0],
    CTC[1],
    torch.tensor([3, 0]),
    reduction="none",
)
for filler in (-1, -100, 99):
    padded = torch.tensor([[1, 2, 2], [3, filler, filler]])
    lengths = (CTC[1], torch.tensor([3, 1]))
    enrol(
        "ctc-padded",
        ours.ctc_loss,
        F.ctc_loss,
        LOG_PROBABILITIES.log_softmax(-1),
        padded,
        *lengths,
        blank=filler % 5,
    )
enrol(
    "ctc-no-time",
    ours.ctc_loss,
    F.ctc_loss,
    LOG_PROBABILITIES,
    CTC[0],
    torch.tensor([7, 0]),
    torch.tensor([3, 0]),
)
enrol("multi-margin-1d", ours.multi_margin_loss, F.multi_margin_loss, X[0], LABELS[1])
for reduction in ("none", "mean"):
    enrol(
        "multi-margin-one",
        ours.multi_margin_loss,
        F.multi_margin_loss,
        X[0],
        LABELS[1:2],
        reduction=reduction,
    )
    enrol(
        "multi-margin-row",
        ours.multi_margin_loss,
        F.multi_margin_loss,
        X[:1],
        LABELS[1],
        reduction=reduction,
    )
for mode in ("sum", "mean", "max"):
    enrol("bag", ours.embedding_bag, F.embedding_bag, FLAT, TABLE, OFFSETS, mode=mode)
    enrol(
        "bag-rows",
        ours.embedding_bag,
        F.embedding_bag,
        FLAT.reshape(2, 4),
        TABLE,
        mode=mode,
        padding_idx=-2,
    )
    enrol(
        "bag-last",
        ours.embedding_bag,
        F.embedding_bag,
        FLAT,
        TABLE,
        torch.tensor([0, 3, 3, 8]),
        mode=mode,
        include_last_offset=True,
        padding_idx=2,
    )
enrol(
    "bag-weights",
    ours.embedding_bag,
    F.embedding_bag,
    FLAT.reshape(2, 4),
    TABLE,
    mode="sum",
    per_sample_weights=W.flatten()[:8].reshape(2, 4),
)
for p in (0.5, 1.0, 2.0, 3.0, float("inf")):
    enrol(
        "cdist",
        ours.cdist,
        torch.cdist,
        smooth_noise(2, 4, 3),
        smooth_noise(1, 5, 3, phase=1.0),
        p=p,
    )
    enrol("pdist", ours.pdist, F.pdist, X, p=p)
enrol("cdist-many", ours.cdist, torch.cdist, smooth_noise(30, 3), smooth_noise(31, 3, phase=1.0))
for padding in ("zeros", "border", "reflection"):
    for aligned in (True, False):
        for mode in ("bilinear", "nearest", "bicubic"):
            enrol(
                "grid",
                ours.grid_sample,
                F.grid_sample,
                IMAGE,
                GRID,
                mode=mode,
                padding_mode=padding,
                align_corners=aligned,
            )
        for mode in ("bilinear", "nearest"):
            enrol(
                "grid-3d",
                ours.grid_sample,
                F.grid_sample,
                smooth_noise(1, 2, 3, 4, 5),
                1.3 * smooth_noise(1, 2, 3, 2, 3, phase=1.0),
                mode=mode,
                padding_mode=padding,
                align_corners=aligned,
            )
# Data that sits on the kinks: a head of zeros, the identity grid, ties.
ZEROS, CORNERS = (
    torch.zeros(4, 3, dtype=torch.float64),
    torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double(),
)
TIED = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).double()
enrol("multi-margin-kink", ours.multi_margin_loss, F.multi_margin_loss, ZEROS, LABELS, margin=0.0)
enrol("multi-margin-kink-2", ours.multi_margin_loss, F.multi_margin_loss, CORNERS, LABELS, p=2)
enrol("multilabel-kink", ours.multilabel_margin_loss, F.multilabel_margin_loss, CORNERS, MANY)
enrol("hardsigmoid-kink", ours.hardsigmoid, F.hardsigmoid, 3 * CORNERS - 3 * CORNERS.roll(1, 0))
for p in (0.0, 0.5, 1.0, 2.0, 3.0, float("inf")):
    enrol("cdist-ties", ours.cdist, torch.cdist, TIED, TIED.flip(0), p=p)
    enrol("pdist-ties", ours.pdist, F.pdist, TIED, p=p)
for aligned in (True, False):
    identity = F.affine_grid(
        torch.eye(2, 3, dtype=torch.float64)[None].expand(2, 2, 3),
        (2, 3, 5, 6),
        align_corners=aligned,
    )
    for padding in ("zeros", "border", "reflection"):
        for mode in ("bilinear", "bicubic"):
            enrol(
                "grid-identity",
                ours.grid_sample,
                F.grid_sample,
                IMAGE,
                identity,
                mode=mode,
                padding_mode=padding,
                align_corners=aligned,
            )
enrol(
    "layer-norm",
    ours.layer_norm,
    F.layer_norm,
    IMAGE,
    [5, 6],
    weight=1 + smooth_noise(5, 6) / 2,
    bias=smooth_noise(5, 6, phase=1.0),
)
enrol(
    "batch-norm",
    ours.batch_norm,
    F.batch_norm,
    IMAGE,
    None,
    None,
    weight=W[0],
    bias=Y[0],
    training=True,
)
enrol("instance-norm", ours.instance_norm, F.instance_norm, IMAGE, weight=W[0], bias=Y[0])
enrol("hardsigmoid", ours.hardsigmoid, F.hardsigmoid, 4 * X)
enrol(
    "cholesky-inverse",
    lambda x: ours.cholesky_inverse(torch.linalg.cholesky(x @ x.mT + torch.eye(4).double())),
    lambda x: torch.cholesky_inverse(torch.linalg.cholesky(x @ x.mT + torch.eye(4).double())),
    X,
)
enrol("weight-norm", ours.weight_norm, torch._weight_norm, X, W[:, :1])
enrol("weight-norm-1", ours.weight_norm, torch._weight_norm, X, W[:1], 1)
for dim in (-2, -3, 2):
    enrol(
        "weight-norm",
        ours.weight_norm,
        torch._weight_norm,
        smooth_noise(3, 4, 2),
        1 + smooth_noise(*(n if d == dim % 3 else 1 for d, n in enumerate((3, 4, 2)))) / 2,
        dim=dim,
    )
enrol("weight-norm-all", ours.weight_norm, torch._weight_norm, X, W[0, 0], -1)


@pytest.mark.parametrize("name", CALLS)
def test_a_form_has_the_values_and_gradients_of_pytorch(name: str) -> None:
    mine, theirs, args, options = CALLS[name]

    def run(call: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
        leaves = [
            x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in args
        ]
        output = call(*leaves, **options)
        chosen = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        if "soft-margin" in name:
            chosen = chosen[:1]  # PyTorch has no gradient for the target
        weights = 1 + smooth_noise(*output.shape, phase=9.0) / 2
        found = torch.autograd.grad((output * weights).sum(), chosen, allow_unused=True)
        return output.detach(), [
            torch.zeros_like(x) if g is None else g for g, x in zip(found, chosen, strict=True)
        ]

    if "soft-margin" in name:
        args = (args[0], args[1].detach())
        theirs_call = theirs
        theirs = lambda x, y, **options: theirs_call(x, y.detach(), **options)  # noqa: E731
    expected, expected_grads = run(theirs)
    found, grads = run(mine)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    # PyTorch's gradient of hardsigmoid multiplies by a sixth in single precision.
    torch.testing.assert_close(
        grads, expected_grads, rtol=1e-7 if "hardsigmoid" in name else 1e-10, atol=1e-12
    )


def test_the_old_words_for_reductions_are_understood() -> None:
    expected = F.multi_margin_loss(X, LABELS, reduction="sum")
    torch.testing.assert_close(ours.multi_margin_loss(X, LABELS, size_average=False), expected)
    assert ours.mse_loss(X, Y, reduce=False).shape == X.shape


def test_the_weight_of_l1_loss_survives_the_mode() -> None:
    """PyTorch drops it under any torch function mode."""
    expected = F.l1_loss(X, Y, weight=W)
    with innerloop.nn.replacing():
        assert torch.equal(F.l1_loss(X, Y, weight=W), expected)
        assert torch.equal(F.l1_loss(X, Y, reduction="sum"), (X - Y).abs().sum())


def test_the_weight_of_l1_loss_is_differentiated() -> None:
    x, y, w = (z.detach().clone().requires_grad_() for z in (X, Y, W))
    with innerloop.nn.replacing():
        grads = torch.autograd.grad(F.l1_loss(x, y, weight=w, reduction="sum"), [x, y, w])
    slope = W * (X - Y).sign()
    torch.testing.assert_close(grads, (slope, -slope, (X - Y).abs()))


def test_the_weight_of_l1_loss_survives_autocast() -> None:
    """With a weight it is a few plain operations, which autocast leaves alone."""
    x, y, w = (z.bfloat16() for z in (X, Y, W))
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.l1_loss(x, y, weight=w)
        with innerloop.nn.replacing():
            found = F.l1_loss(x, y, weight=w)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("outside", [False, True])
def test_the_weight_of_l1_loss_survives_two_modes(reduction: str, outside: bool) -> None:
    """A device is a mode too; under both, PyTorch's function is called twice, and the second call
    has no weight."""
    expected = F.l1_loss(X, Y, reduction=reduction, weight=W)
    modes = [innerloop.nn.replacing(), torch.device("cpu")]
    first, second = reversed(modes) if outside else modes
    with first, second:
        torch.testing.assert_close(
            F.l1_loss(X, Y, reduction=reduction, weight=W), expected, rtol=1e-14, atol=0.0
        )
        torch.testing.assert_close(F.l1_loss(X, Y), (X - Y).abs().mean(), rtol=1e-14, atol=0.0)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 has it")
def test_a_linear_cross_entropy_in_chunks_is_trained_through() -> None:
    """PyTorch computes its gradient beforehand and keeps it: a constant of the second
    derivative."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)  # type: ignore[attr-defined,unused-ignore]

    def loss(weight: Tensor) -> Tensor:
        return F.linear_cross_entropy(X, weight.tanh(), LABELS, options=options)

    def gradient(h: float) -> Tensor:
        weight = (Y + h * W).requires_grad_()
        return torch.autograd.grad(loss(weight), weight)[0]

    weight = Y.clone().requires_grad_()
    with innerloop.nn.replacing():
        value = loss(weight)
    torch.testing.assert_close(value, loss(weight), rtol=1e-12, atol=0.0)
    (slope,) = torch.autograd.grad(value, weight, create_graph=True)
    (bend,) = torch.autograd.grad((slope * X).sum(), weight)
    assert_derivative(
        (bend * W).sum().item(), derivative(lambda h: (gradient(h) * X).sum().item()), "in chunks"
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm2d(3),
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
    ],
)
def test_running_statistics_follow_as_in_pytorch(make: Callable[[], nn.Module]) -> None:
    plain, mine = make(), make()
    for t in range(3):
        expected = plain(IMAGE + t)
        with innerloop.nn.any_order(), innerloop.nn.replacing():
            torch.testing.assert_close(mine(IMAGE + t), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(list(mine.buffers()), list(plain.buffers()), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
def test_norms_of_half_precision_are_computed_in_single(dtype: torch.dtype, mixed: bool) -> None:
    """Squares of 300 and more are infinite in float16; PyTorch's outputs are those of float32,
    rounded."""
    of_weights = torch.float32 if mixed else dtype
    for module in (nn.LayerNorm(6), nn.BatchNorm2d(3), nn.InstanceNorm2d(3, affine=True)):
        module, x = module.to(of_weights), (300 * IMAGE + 100).to(dtype)
        expected = module(x)
        with innerloop.nn.any_order(), innerloop.nn.replacing():
            found = module(x)
        assert found.dtype == expected.dtype == dtype
        assert expected.isfinite().all()
        torch.testing.assert_close(
            found, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps
        )


def test_layer_norm_refuses_the_shapes_that_pytorch_refuses() -> None:
    cases: list[tuple[list[int], dict[str, Any]]] = [
        ([4], {}),
        ([], {}),
        ([6], {"weight": W[0]}),
        ([6], {"bias": W[0]}),
    ]
    for shape, settings in cases:
        with pytest.raises(RuntimeError):
            F.layer_norm(IMAGE, shape, **settings)
        with pytest.raises(innerloop.InvalidInputError, match="normalized_shape"):
            ours.layer_norm(IMAGE, shape, **settings)
    with pytest.raises(innerloop.InvalidInputError, match="dim=3"):
        ours.weight_norm(X, W[:, :1], 3)


def test_in_place_arguments_are_written() -> None:
    x = 4 * X
    with innerloop.nn.replacing():
        F.hardsigmoid(x, inplace=True)
    torch.testing.assert_close(x, F.hardsigmoid(4 * X))


def test_a_result_may_be_written_where_pytorch_writes_it() -> None:
    factor, out = torch.linalg.cholesky(X.mT @ X + torch.eye(3)), torch.empty(3, 3)
    with innerloop.nn.replacing():
        torch.cholesky_inverse(factor, out=out)
    torch.testing.assert_close(out, torch.cholesky_inverse(factor))


def test_distances_without_features_are_zero() -> None:
    for p in (1.0, 2.0, float("inf")):
        assert torch.equal(ours.cdist(torch.ones(2, 0), torch.ones(3, 0), p=p), torch.zeros(2, 3))


ARGUMENTS: dict[str, Callable[[], Any]] = {
    "compute_mode='fast'": lambda: ours.cdist(X, X, compute_mode="fast"),
    "p=-1.0": lambda: ours.cdist(X, X, -1.0),
    "p=-2.0": lambda: ours.pdist(X, -2.0),
    "p=3": lambda: ours.multi_margin_loss(X, LABELS, p=3),
    "one label": lambda: ours.multi_margin_loss(X, LABELS[:2]),
    r"target has the label \d, but there are only 3 classes \(0 to 2\)": lambda: (
        ours.multi_margin_loss(X, LABELS + 1)
    ),
    "only 3 classes": lambda: ours.multilabel_margin_loss(X, MANY + 1),
    "shapes must be equal": lambda: ours.multilabel_margin_loss(X, MANY[0]),
    "7 times": lambda: ours.ctc_loss(LOG_PROBABILITIES, CTC[0], torch.tensor([8, 5]), CTC[2]),
    "hold its labels": lambda: ours.ctc_loss(
        LOG_PROBABILITIES, CTC[0], CTC[1], torch.tensor([4, 1])
    ),
    "must be used": lambda: ours.ctc_loss(
        LOG_PROBABILITIES, torch.tensor([1, 2, 3, 4]), CTC[1], torch.tensor([2, 1])
    ),
    "targets has the label 5, but there are only 5 classes": lambda: ours.ctc_loss(
        LOG_PROBABILITIES, CTC[0] + 2, CTC[1], CTC[2]
    ),
}


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("match", ARGUMENTS)
def test_what_pytorch_refuses_is_refused(match: str) -> None:
    with pytest.raises(innerloop.InvalidInputError, match=match):
        ARGUMENTS[match]()


def test_the_gradient_of_a_ctc_loss_is_pytorchs_and_right_behind_a_log_softmax() -> None:
    """That of probabilities from elsewhere is not the derivative of the loss, in PyTorch and here;
    docs/doctor.md says what to write."""
    logits, direction = smooth_noise(7, 2, 5, phase=1.0), smooth_noise(7, 2, 5, phase=2.0)

    def normalised(h: float, leaf: bool = False) -> tuple[Tensor, Tensor]:
        x = (logits + h * direction).requires_grad_(leaf)
        return x, (x.sigmoid() / x.sigmoid().sum(-1, keepdim=True)).log()

    slope = derivative(lambda h: F.ctc_loss(normalised(h)[1], *CTC).item())
    found = {}
    for name, call in {
        "torch": lambda p: F.ctc_loss(p, *CTC),
        "ours": lambda p: ours.ctc_loss(p, *CTC),
        "behind": lambda p: ours.ctc_loss(p.log_softmax(-1), *CTC),
    }.items():
        x, p = normalised(0.0, leaf=True)
        found[name] = (torch.autograd.grad(call(p), x)[0] * direction).sum().item()
    assert found["ours"] == pytest.approx(found["torch"], rel=1e-10)
    assert_derivative(found["behind"], slope, "behind a log_softmax")


def test_an_impossible_alignment_is_infinite() -> None:
    short = (CTC[0], torch.tensor([7, 1]), CTC[2])
    assert ours.ctc_loss(LOG_PROBABILITIES, *short, reduction="none").isinf().tolist() == [
        False,
        True,
    ]


# -- refusals --------------------------------------------------------------------------------------


def refused(operation: Callable[[Tensor], Tensor], match: str, product: str = "reverse") -> None:
    problem = innerloop.Problem(
        lambda params, hyper, t: operation(params["x"]).sum() * hyper, innerloop.optim.sgd(lr=0.1)
    )
    hyper = torch.tensor(1.0, requires_grad=True)

    def run() -> None:
        strategy = innerloop.Checkpointed(product=product)
        traj = innerloop.unroll(problem, {"x": 0.5 + W}, [0, 1], hyper=hyper, strategy=strategy)
        traj.params["x"].sum().backward()

    with pytest.raises(innerloop.NotDifferentiableError, match=match):
        run()


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
def test_what_is_silently_wrong_and_has_no_form_is_refused_by_name() -> None:
    refused(torch.special.bessel_j0, r"bessel_j0 has no derivative")
    refused(
        lambda x: F.embedding(torch.tensor([0, 0, 1]), x, scale_grad_by_freq=True),
        "scale_grad_by_freq",
    )
    refused(
        lambda x: F.embedding_bag(torch.tensor([[0, 0, 1]]), x, scale_grad_by_freq=True),
        "scale_grad_by_freq",
    )
    refused(
        lambda x: F.embedding(torch.tensor([0, 0, 1]), x, max_norm=0.5),
        r"F\.embedding\(max_norm=0\.5\).*clamp_min",
    )
    refused(
        lambda x: F.embedding_bag(torch.tensor([[0, 0, 1]]), x, max_norm=0.5),
        r"F\.embedding_bag\(max_norm",
    )
    refused(lambda x: nn.CrossMapLRN2d(3)(x[:, :, None, None]), "CrossMapLRN2d.*LocalResponseNorm")
    refused(
        lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([3, 1])), "segment_reduce"
    )
    index = torch.tensor([0, 0, 1, 2])[:, None].expand(4, 3)
    product = lambda x: torch.ones(3, 3).scatter_reduce(0, index, x, "prod")  # noqa: E731
    refused(product, r"scatter_reduce", product="mixed")
    solve = lambda x: torch.triangular_solve(x[:3], x[:3])[0]  # noqa: E731
    refused(solve, "solve_triangular", product="mixed")


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_is_rescaled_is_refused_whatever_is_kept_and_not_written(
    make: Any,
) -> None:
    """PyTorch rescales the weight in place, behind the back of autograd."""
    model, indices = make(4, 3, max_norm=0.5), torch.tensor([[0, 1, 2]])
    before = model.weight.detach().clone()
    match = r"max_norm=0\.5"
    with (
        innerloop.track(model, sgd(model)) as loop,
        pytest.raises(innerloop.NotDifferentiableError, match=match),
    ):
        loop.step(loop.model(indices).square().sum())
    for around in (innerloop.nn.keep_kernels(), innerloop.nn.replacing(only_silent=True)):
        with (
            around,
            innerloop.nn.replacing(only_silent=True),
            pytest.raises(innerloop.NotDifferentiableError, match=match),
        ):
            model(indices)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("norm", [1.0, 2.0, float("inf")])
def test_a_constant_embedding_is_rescaled_as_in_pytorch_and_not_written(norm: float) -> None:
    bag, settings = torch.tensor([[0, 1], [1, 5]]), {"max_norm": 0.5, "norm_type": norm}
    for call in (F.embedding, F.embedding_bag):
        table = TABLE.clone()
        with innerloop.nn.replacing():
            found = call(bag, table, **settings)
        assert torch.equal(table, TABLE)
        torch.testing.assert_close(found, call(bag, table, **settings), rtol=1e-14, atol=0.0)


BAGS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "start with 0": ((FLAT, TABLE, torch.tensor([1, 3])), {}),
    "never decrease": ((FLAT, TABLE, torch.tensor([0, 3, 1])), {}),
    "at the latest": ((FLAT, TABLE, torch.tensor([0, 9])), {}),
    "offsets is empty": (
        (FLAT, TABLE, torch.tensor([], dtype=torch.long)),
        {"include_last_offset": True},
    ),
    "padding_idx=6": ((FLAT, TABLE, OFFSETS), {"padding_idx": 6}),
    "weight.dtype": (
        (FLAT, TABLE, OFFSETS),
        {"mode": "sum", "per_sample_weights": torch.ones(8, dtype=torch.float32)},
    ),
    "two dimensions": ((FLAT, TABLE[0], OFFSETS), {}),
}


@pytest.mark.parametrize("match", BAGS)
def test_bags_that_are_none_are_refused(match: str) -> None:
    args, settings = BAGS[match]
    with pytest.raises(innerloop.InvalidInputError, match=match):
        ours.embedding_bag(*args, **settings)


@pytest.mark.filterwarnings("ignore:Argument order")
def test_bags_take_the_old_order_of_arguments() -> None:
    assert torch.equal(
        ours.embedding_bag(TABLE, FLAT, OFFSETS), F.embedding_bag(TABLE, FLAT, OFFSETS)
    )


def test_constants_may_go_through_functions_without_derivative() -> None:
    with innerloop.nn.replacing():
        assert torch.special.bessel_j0(X).shape == X.shape


# -- the catalogue ---------------------------------------------------------------------------------

ELSEWHERE = {
    "nn.RNN, nn.LSTM or nn.GRU on a GPU or under vmap",
    "torch.normal under vmap",
    "torch.empty or Tensor.new under vmap",
}
"""Operations that the doctor has no case of, because they lack something there only."""


@pytest.mark.parametrize("operation", catalogue.OPERATIONS, ids=lambda op: op.name)
def test_an_operation_is_replaced_or_says_what_to_write_instead(
    operation: catalogue.Operation,
) -> None:
    assert operation.reason
    assert operation.replacements or operation.instead
    assert all(callable(f) for pair in operation.replacements.items() for f in pair)


@pytest.mark.parametrize("operation", catalogue.OPERATIONS, ids=lambda op: op.name)
def test_an_operation_has_a_case_of_the_doctor_under_its_name(
    operation: catalogue.Operation,
) -> None:
    cases = {case.name.partition("(")[0].strip() for case in doctor.all_cases()}
    assert (operation.name in cases) != (operation.name in ELSEWHERE)


def test_names_functions_and_nodes_lead_to_one_operation_each() -> None:
    operations = catalogue.OPERATIONS
    assert len({op.name for op in operations}) == len(operations)
    functions = [(f, op) for op in operations for f in op.replacements]
    nodes = [(node, op) for op in operations for node in (*op.nodes, *op.nodes_of_derivative)]
    assert len({f for f, _ in functions}) == len(functions)
    assert len({node for node, _ in nodes}) == len(nodes)
    assert all(catalogue.by_call(f) is op for f, op in functions)
    assert all(catalogue.by_node(node) is op for node, op in nodes)
    assert not {f for f, _ in functions} & set(catalogue.LOOK_INSIDE)
    assert catalogue.by_call(torch.add) is None
    assert catalogue.by_node("AddBackward0") is None


def test_the_nodes_of_a_third_derivative_follow_from_those_of_the_first() -> None:
    third = [op for op in catalogue.OPERATIONS if op.order == 3]
    assert third
    x = smooth_noise(4, 3).requires_grad_()
    for call in (
        lambda: F.layer_norm(x, (3,)),
        lambda: F.batch_norm(x, None, None, training=True),
        lambda: F.instance_norm(x[None]),
    ):
        out = call()
        (slope,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        operation = catalogue.by_node(nodes_of(out)[0])
        assert operation in third
        assert any(name in operation.nodes_of_derivative for name in nodes_of(slope))


def nodes_of(x: Tensor) -> list[str]:
    """The names of the nodes behind ``x`` that the catalogue knows."""
    found, stack, seen = [], [x.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if catalogue.by_node(type(node).__name__):
                found.append(type(node).__name__)
            stack.extend(child for child, _ in node.next_functions)
    return found


def test_a_recurrent_layer_in_cudnn_is_refused_under_a_name_that_is_in_the_catalogue() -> None:
    for node in ("CudnnRnnBackward0", "MiopenRnnBackward0"):
        operation = catalogue.by_node(node)
        assert operation is not None
        assert operation is catalogue.by_call(torch.lstm)
        assert graph._lacks_derivative(operation, node).startswith(operation.name)


def test_the_catalogue_is_a_markdown_table() -> None:
    lines = catalogue.to_markdown().splitlines()
    assert len(lines) == 2 + len(catalogue.OPERATIONS)
    cells = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in lines}
    assert cells["`F.pdist`"] == "replaced"
    assert cells["`torch.special.bessel_j0`"] == "refused"
    assert cells["`torch.segment_reduce`"] == "Write torch.scatter_reduce, or index_add"


# -- cuDNN -----------------------------------------------------------------------------------------


def test_cudnn_is_off_during_a_recurrent_call_and_only_then() -> None:
    """What runs where there is a GPU, by the flag that it sets."""
    before = torch.backends.cudnn.enabled
    assert recurrent.in_plain_code(lambda: torch.backends.cudnn.enabled)() is False
    assert torch.backends.cudnn.enabled == before
    assert not recurrent.on_cuda((X,), {})


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: cuDNN has no second derivative there"
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_run_on_a_gpu_without_flags(kind: Callable[..., nn.RNNBase]) -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = kind(2, 3).to(device)
        with innerloop.track(model, sgd(model)) as loop:
            for t in range(STEPS):
                loop.step(
                    loop.model(smooth_noise(4, 2, 2, phase=float(t)).to(device))[0].square().mean()
                )
            loop.model(smooth_noise(4, 2, 2).to(device))[0].square().mean().backward()
        gradients.append([p.grad.cpu() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


# -- compiled --------------------------------------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_compiled_meta_gradients_take_the_forms_too() -> None:
    problem = innerloop.Problem(
        lambda params, hyper, t: (
            torch.cdist(params["x"], params["x"].flip(1) * hyper).tanh().mean()
        ),
        innerloop.optim.sgd(lr=0.2),
    )
    outer = lambda traj, hyper: traj.params["x"].sin().sum()  # noqa: E731
    found = [
        innerloop.metagradient(
            outer, problem, {"x": X}, [0, 1], hyper=torch.tensor(0.5), compile=compiled
        )[1]
        for compiled in (False, True)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_weight_norm_is_replaced_in_compiled_code() -> None:
    model = Normed()
    problem = innerloop.Problem.from_module(
        model, lambda m, hyper, t: m(0).square() * hyper, innerloop.optim.sgd(lr=0.2)
    )
    params = {name: p.detach() for name, p in model.named_parameters()}
    outer = lambda traj, hyper: traj.params["layer.bias"].sum()  # noqa: E731
    compiled, eager = (
        innerloop.metagradient(
            outer, problem, params, [0, 1], hyper=torch.tensor(0.5), compile=whole
        )
        for whole in (True, False)
    )
    torch.testing.assert_close(compiled, eager)


# -- rows of zeros, and indices in NumPy's memory --------------------------------------------------

ROW_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "linalg.vector_norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "linalg.vector_norm(3)": lambda x: torch.linalg.vector_norm(x, 3, -1, True),
    "linalg.norm": lambda x: torch.linalg.norm(x, dim=-1),
    "torch.norm": lambda x: torch.norm(x, dim=1, keepdim=True),
    "Tensor.norm": lambda x: x.norm(2, -1),
    "whole": lambda x: x[1:2].norm(),
    "F.normalize": lambda x: functional.normalize(x, dim=-1),
    "F.normalize(3)": lambda x: functional.normalize(x, 3.0, -1),
    "F.cosine_similarity": lambda x: functional.cosine_similarity(x, torch.ones_like(x), dim=-1),
    "nn.CosineSimilarity": lambda x: nn.CosineSimilarity()(x, torch.arange(3.0).to(x)),
}


@pytest.mark.covering
@pytest.mark.parametrize("name", ROW_NORMS)
@pytest.mark.parametrize("front", ["reverse", "mixed", "StoreAll", "ForwardMode"])
def test_a_padded_row_leaves_the_derivatives_of_the_other_rows_alone(name: str, front: str) -> None:
    """Truth: the same loop without the row of zeros, which contributes a constant."""
    x = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 0.0], [0.5, -1.0, 2.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    strategy = {
        "reverse": innerloop.Checkpointed(product="reverse"),
        "mixed": innerloop.Checkpointed(product="mixed"),
        "StoreAll": innerloop.StoreAll(),
        "ForwardMode": innerloop.ForwardMode(),
    }[front]

    def gradient(rows: list[int]) -> Tensor:
        def loss(p: Any, h: Tensor, b: Any) -> Tensor:
            out = ROW_NORMS[name]((x @ p["w"])[rows])
            if out.dim() == 0:
                return h * (out + p["w"].sin().sum())
            kept = weights[rows].reshape(-1, *[1] * (out.dim() - 1))
            return h * (kept * (out + 0.3 * out.square())).sum()

        found: Tensor = innerloop.metagradient(
            lambda traj, h: traj.params["w"].square().sum(),
            innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1)),
            {"w": torch.eye(3, dtype=torch.float64) + 0.1},
            None,
            steps=3,
            hyper=torch.tensor(0.7, dtype=torch.float64),
            wrt="hyper",
            strategy=strategy,
        )[1]
        return found

    if name == "whole":
        assert gradient([0, 1, 2]).isfinite()
    else:
        torch.testing.assert_close(gradient([0, 1, 2]), gradient([0, 2]), rtol=1e-10, atol=0)


def test_norms_have_the_bits_of_pytorch() -> None:
    x = torch.randn(7, 3, requires_grad=True)
    for name, operation in ROW_NORMS.items():
        with innerloop.nn.replacing():
            ours = operation(x)
        theirs = operation(x)
        assert torch.equal(ours, theirs), name
        slopes = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*slopes, msg=name)


def test_the_cosine_of_a_row_shorter_than_eps_divides_by_eps() -> None:
    """Truth: x · y / (eps ‖y‖), and PyTorch's first derivative."""
    eps, y = 0.5, torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    x = torch.tensor([[0.1, -0.2]], dtype=torch.float64, requires_grad=True)
    with innerloop.nn.replacing():
        ours = functional.cosine_similarity(x, y, dim=-1, eps=eps)
    theirs = functional.cosine_similarity(x, y, dim=-1, eps=eps)
    torch.testing.assert_close(ours, (x * y).sum(-1) / (eps * 5), rtol=1e-14, atol=0)
    slopes = [torch.autograd.grad(value.sum(), x)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-13, atol=0)


INDEXED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "getitem": lambda x, i: x[i[:3]],
    "getitem of a tuple": lambda x, i: x[i[:3], 0],
    "getitem by a tensor": lambda x, i: x[torch.from_numpy(i)[:3]],
    "index_select": lambda x, i: x.index_select(0, torch.from_numpy(i[:3])),
    "gather": lambda x, i: x.gather(0, index=torch.from_numpy(i[:3])[:, None]),
}


@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize("front", ["track", "StoreAll"])
def test_an_index_that_is_shuffled_in_place_does_not_move_the_gradient(
    name: str, front: str
) -> None:
    """Truth: the same loop with a product by rows of the unit matrix in place of the index."""

    def gradient(by_product: bool) -> Tensor:
        data = torch.arange(6.0, dtype=torch.float64).reshape(6, 1) / 4 + 1
        x, random, index = data.requires_grad_(), np.random.default_rng(0), np.arange(6)

        def loss(w: Tensor, x: Tensor) -> Tensor:
            random.shuffle(index)
            if by_product:
                rows = torch.eye(6, dtype=x.dtype)[torch.tensor(index[:3])] @ x
            else:
                rows = INDEXED[name](x, index)
            return (w * rows - rows**2).square().sum()

        if front == "track":
            model = nn.Linear(1, 1, bias=False).double()
            nn.init.ones_(model.weight)
            with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.01)) as loop:
                for _ in range(3):
                    loop.step(loss(loop.model.weight, x))
                end = loop.model.weight.sum()
        else:
            problem = innerloop.Problem(
                lambda p, h, b: loss(p["w"], h), innerloop.optim.sgd(lr=0.01)
            )
            start = {"w": torch.ones(1, 1, dtype=torch.float64)}
            end = innerloop.unroll(problem, start, None, steps=3, hyper=x).params["w"].sum()
        return torch.autograd.grad(end, x)[0]

    torch.testing.assert_close(gradient(False), gradient(True), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "strategy", [innerloop.Checkpointed(product="mixed"), innerloop.ForwardMode()], ids=repr
)
@pytest.mark.parametrize("name", ["attention", "dropout", "alpha_dropout"])
def test_forward_mode_drops_the_entries_that_eager_code_drops(
    name: str, strategy: innerloop.strategy.Strategy
) -> None:
    """Behind attention the input of dropout is a transposed view. Truth: `StoreAll`."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dtype=torch.float64)
    if name != "attention":
        layer = nn.Linear(4, 4, dtype=torch.float64)  # type: ignore[assignment]

    def forward(model: nn.Module) -> Tensor:
        out: Tensor = model(x)
        if name != "attention":
            out = getattr(functional, name)(out.transpose(0, 1), 0.4, True)
        return out

    def run(strategy: innerloop.strategy.Strategy) -> list[Tensor]:
        torch.manual_seed(1)
        scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        problem = innerloop.Problem.from_module(
            layer, lambda m, h, b: (forward(m) * h - 1).square().mean(), innerloop.optim.sgd(lr=0.1)
        )
        params = {n: p.detach() for n, p in layer.named_parameters()}
        traj = innerloop.unroll(problem, params, None, steps=2, hyper=scale, strategy=strategy)
        end = sum(p.square().sum() for p in traj.params.values())
        assert isinstance(end, Tensor)
        return [traj.losses, *torch.autograd.grad(end, scale)]

    torch.testing.assert_close(run(strategy), run(innerloop.StoreAll()), rtol=1e-10, atol=1e-14)
