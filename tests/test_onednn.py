"""Products by oneDNN: their derivatives of every order, and what is left to PyTorch's BLAS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from innerloop._utils import torch_private
from innerloop.errors import InvalidInputError
from innerloop.nn import _onednn

needs_onednn = pytest.mark.skipif(
    not torch_private.has_onednn(), reason="this PyTorch was built without oneDNN"
)


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let products of any size be large ones; returns the sizes of those that oneDNN computes."""
    _onednn._times()
    sizes: list[tuple[int, ...]] = []
    product = torch_private.onednn_product

    def noted(a: Tensor, b: Tensor) -> Tensor:
        sizes.append((*a.shape, len(b)))
        return product(a, b)

    monkeypatch.setattr(_onednn, "LARGE", 1)
    monkeypatch.setattr(torch_private, "onednn_product", noted)
    return sizes


def loss(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.linear(x, weight, bias).tanh(), weight.mT).square().sum()


@needs_onednn
def test_derivatives_of_every_order_are_those_of_blas(everything: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    # So small that the sines below do not multiply what is rounded.
    weight, x, bias = 0.3 * torch.randn(4, 6), 0.3 * torch.randn(2, 3, 6), 0.3 * torch.randn(4)

    def derivatives(order: int) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (weight, x, bias)]
        value = loss(*inputs)
        found = [value]
        for _ in range(order):
            slopes = torch.autograd.grad(value, inputs, create_graph=True)
            found += slopes
            value = torch.stack([s.sin().sum() for s in slopes]).sum()
        return found

    expected = derivatives(3)
    with innerloop.nn.onednn_products(gain=0) as found:
        assert found.used
        ours = derivatives(3)
    assert {(6, 6, 4), (6, 4, 6), (4, 6, 6)} <= set(everything)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("strategy", [None, innerloop.Checkpointed(slots=2)])
def test_a_tracked_loop(everything: list[tuple[int, ...]], strategy: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 7, 5), torch.randint(3, (4, 7))

    def gradient() -> list[Tensor]:
        model.zero_grad()
        with innerloop.track(model, optimizer, strategy=strategy) as loop:
            for i in range(4):
                loop.step(lambda x, y: F.cross_entropy(loop.model(x), y), args=(x[i], y[i]))
            F.cross_entropy(loop.model(x[0]), y[0]).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradient()
    with innerloop.nn.onednn_products(gain=0):
        found = gradient()
    assert (7, 5, 8) in everything
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@needs_onednn
def test_what_is_left_to_blas(everything: list[tuple[int, ...]]) -> None:
    weight, x = torch.randn(4, 6), torch.randn(3, 6)
    with innerloop.nn.onednn_products(gain=0):
        F.linear(x.double(), weight.double())
        with torch.autocast("cpu", torch.bfloat16):
            F.linear(x, weight)
        torch.func.vmap(F.linear, (0, None))(x[None], weight)
        torch.func.grad(lambda w: F.linear(x, w).sum())(weight)
        assert not everything
        wanted = weight.clone().requires_grad_()
        out = F.linear(x, wanted)
        assert everything == [(3, 6, 4)]
        rows = torch.eye(12).view(12, 3, 4)
        (many,) = torch.autograd.grad(out, wanted, rows, is_grads_batched=True)
        assert everything == [(3, 6, 4)]
    plain = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.linear(x, plain), plain, rows, is_grads_batched=True)
    torch.testing.assert_close(many, expected)


def test_small_products_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(a: Tensor, b: Tensor) -> Tensor:
        raise AssertionError("a small product")

    _onednn._times()
    monkeypatch.setattr(torch_private, "onednn_product", never)
    with innerloop.nn.onednn_products(gain=0):
        F.linear(torch.ones(32, 64), torch.ones(64, 64))


def test_it_is_used_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for onednn, used in ((0.5, True), (0.99, False), (2.0, False), (float("inf"), False)):
        monkeypatch.setattr(_onednn, "_times", lambda onednn=onednn: (1.0, onednn))
        with innerloop.nn.onednn_products() as found:
            assert found == (1.0, onednn, used)
    with innerloop.nn.onednn_products(gain=0) as found:
        assert not found.used  # there is none


@pytest.mark.parametrize("gain", [-1.0, float("nan"), "fast", True])
def test_a_gain_that_is_no_number_is_refused(gain: Any) -> None:
    with (
        pytest.raises(InvalidInputError, match="how many times faster"),
        innerloop.nn.onednn_products(gain),
    ):
        pass


@needs_onednn
def test_what_does_not_fit_gets_the_error_of_pytorch(everything: list[tuple[int, ...]]) -> None:
    with innerloop.nn.onednn_products(gain=0):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            F.linear(torch.ones(2, 3), torch.ones(4, 5))
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4).double())
    assert not everything
