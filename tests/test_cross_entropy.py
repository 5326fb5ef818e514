"""``innerloop.nn.functional.cross_entropy``: the definition's derivatives, and how many tensors of
the logits' size it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from innerloop import InnerLoopError
from innerloop._utils import torch_private
from innerloop.errors import InvalidInputError
from innerloop.nn._replacements import cross_entropy as module
from innerloop.nn._replacements import softmax_loss
from innerloop.nn.functional import cross_entropy
from tests.oracles import directional
from tests.test_attention import DEVICES, assert_same

Loss = Callable[..., Tensor]
SHAPES = [(5,), (4, 5), (3, 5, 2), (2, 3, 2, 3)]


@pytest.fixture(autouse=True)
def _own_form_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TAKES_CHUNKS", 0)
    monkeypatch.setattr(softmax_loss, "CHUNK", 12)


def draw(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device)


def labels(shape: tuple[int, ...], ignored: bool = False) -> Tensor:
    without = shape[:1] + shape[2:] if len(shape) > 1 else ()
    y = torch.randint(shape[min(1, len(shape) - 1)], without)
    if ignored and y.ndim:
        y.view(-1)[0] = -100
    return y


def definition(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0,
) -> Tensor:
    """Sums of logarithms of ratios of exponentials over one-hot targets."""
    z = z.movedim(1, -1) if z.ndim > 1 else z
    classes = z.shape[-1]
    w = torch.ones(classes, dtype=z.dtype, device=z.device) if weight is None else weight
    log_p = (z.exp() / z.exp().sum(-1, keepdim=True)).log()
    if target.is_floating_point():
        q = target.movedim(1, -1) if target.ndim > 1 else target
        count: Any = q[..., 0].numel()
    else:
        counted = (target != ignore_index).unsqueeze(-1)
        q = torch.nn.functional.one_hot(target.clamp_min(0), classes).to(z.dtype) * counted
        count = (q * w).sum()
        w = w * counted
    losses = -((1 - label_smoothing) * q + label_smoothing / classes) * w * log_p
    losses = losses.sum(-1)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / count


def derivatives(
    loss: Loss, inputs: tuple[Tensor, ...], along: list[Tensor]
) -> dict[str, list[Tensor]]:
    """The value and every kind of derivative up to the third; of curved functions of it, so that no
    derivative vanishes."""

    def curved(*x: Tensor) -> Tensor:
        out = loss(*x)
        return (
            out.sin() * torch.arange(1, 1 + out.numel(), device=out.device).view(out.shape)
        ).sum()

    everything = tuple(range(len(inputs)))
    leaves = [x.clone().requires_grad_() for x in inputs]
    found, order = {"value": [loss(*leaves)]}, curved(*leaves)
    for name in ("gradient", "second", "third"):
        gradients = torch.autograd.grad(order, leaves, create_graph=True)
        found[name] = list(gradients)
        order = sum(
            ((g.sin() * u).sum() for g, u in zip(gradients, along, strict=True)), torch.zeros(())
        )
    push = lambda *x: torch.func.jvp(curved, x, tuple(along))[1]  # noqa: E731
    found["push"] = [push(*inputs)]
    found["forward over reverse"] = list(
        torch.func.jvp(torch.func.grad(curved, everything), inputs, tuple(along))[1]
    )
    found["reverse over forward"] = list(torch.func.grad(push, everything)(*inputs))
    found["hessian"] = [torch.func.hessian(curved)(*inputs)]
    stacked = [torch.stack([x, 0.5 * x, 0.1 * x]) for x in inputs]
    found["vmap"] = [torch.func.vmap(torch.func.hessian(curved))(*stacked)]
    return found


# -- against the definition ------------------------------------------------------------------------


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_class_indices(
    shape: tuple[int, ...], weighted: bool, smoothing: float, reduction: str, device: str
):
    z, y = draw(*shape, device=device), labels(shape, ignored=True).to(device)
    weight = (
        torch.rand(shape[min(1, len(shape) - 1)], dtype=torch.float64).to(device)
        if weighted
        else None
    )
    rest: dict[str, Any] = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    along = [torch.randn_like(z)]
    ours, truth = (
        derivatives(lambda z, f=f: f(z, y, **rest), (z,), along)
        for f in (cross_entropy, definition)
    )
    assert_same(ours, truth, 1e-12)


@pytest.mark.covering(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_probabilities_that_are_differentiated_too(
    shape: tuple[int, ...], weighted: bool, smoothing: float, reduction: str, device: str
):
    inputs = (
        draw(*shape, device=device),
        draw(*shape, device=device).softmax(min(1, len(shape) - 1)),
    )
    weight = (
        torch.rand(shape[min(1, len(shape) - 1)], dtype=torch.float64).to(device)
        if weighted
        else None
    )
    rest: dict[str, Any] = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    along = [torch.randn_like(x) for x in inputs]
    ours, truth = (
        derivatives(lambda z, q, f=f: f(z, q, **rest), inputs, along)
        for f in (cross_entropy, definition)
    )
    assert_same(ours, truth, 1e-12)


def test_class_weights_are_differentiated():
    """torch refuses them with class indices."""
    y = labels((4, 5))
    inputs = (draw(4, 5), torch.rand(5, dtype=torch.float64) + 0.5)
    along = [torch.randn_like(x) for x in inputs]
    ours, truth = (
        derivatives(lambda z, w, f=f: f(z, y, w, label_smoothing=0.3), inputs, along)
        for f in (cross_entropy, definition)
    )
    assert_same(ours, truth, 1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_it_is_torchs(data: st.DataObject):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    classes = data.draw(st.integers(1, 6))
    shape = (
        data.draw(st.integers(1, 5)),
        classes,
        *data.draw(st.lists(st.integers(1, 3), max_size=2)),
    )
    z = 5 * torch.randn(*shape, dtype=torch.float64, generator=generator)
    y = torch.randint(classes, shape[:1] + shape[2:], generator=generator)
    rest: dict[str, Any] = {
        "weight": torch.rand(classes, dtype=torch.float64, generator=generator)
        if data.draw(st.booleans())
        else None,
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        "ignore_index": data.draw(st.sampled_from([-100, 0])),
    }
    if rest["reduction"] == "mean" and (y == rest["ignore_index"]).all():
        rest["reduction"] = "sum"  # else 0 / 0
    found = []
    for f in (cross_entropy, F.cross_entropy):
        x = z.clone().requires_grad_()
        value = f(x, y, **rest)
        (first,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), x)
        found.append((value, first, second))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_second_derivative_is_a_finite_difference():
    z, y, weights = draw(4, 5), labels((4, 5)), draw(4, 5)

    def weighed(z: Tensor) -> Tensor:
        x = z.clone().requires_grad_()
        return (torch.autograd.grad(F.cross_entropy(x, y), x)[0] * weights).sum()

    x = z.clone().requires_grad_()
    (first,) = torch.autograd.grad(cross_entropy(x, y), x, create_graph=True)
    (second,) = torch.autograd.grad((first * weights).sum(), x)
    along = draw(4, 5)
    assert float((second * along).sum()) == pytest.approx(directional(weighed, z, along), rel=1e-7)


@pytest.mark.parametrize(
    "target", [torch.tensor([0, 2, 1, 4]), torch.full((4, 5), 0.2, dtype=torch.float64)]
)
def test_losses_may_be_edited_in_place(target: Tensor):
    z = draw(4, 5).requires_grad_()
    edited = cross_entropy(z, target, reduction="none").mul_(2.0)
    (found,) = torch.autograd.grad(edited.sum(), z)
    torch.testing.assert_close(
        found, torch.autograd.grad(2 * definition(z, target, reduction="sum"), z)[0]
    )


def test_gradcheck():
    z, y, q = draw(2, 3).requires_grad_(), labels((2, 3)), draw(2, 3).softmax(1).requires_grad_()
    for f, inputs in (
        (lambda z: cross_entropy(z, y, label_smoothing=0.2), (z,)),
        (cross_entropy, (z, q)),
    ):
        torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
        torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True)


# -- numbers ---------------------------------------------------------------------------------------


def test_large_logits_lose_nothing():
    """log(1 + e^-40) = 4.2e-18, which a difference of two numbers near 400 would not show."""
    z = torch.tensor([[400.0, 360.0], [-1e30, 1e30]], dtype=torch.float64, requires_grad=True)
    losses = cross_entropy(z, torch.tensor([0, 1]), reduction="none")
    theirs = F.cross_entropy(z, torch.tensor([0, 1]), reduction="none")
    torch.testing.assert_close(losses, theirs, rtol=1e-12, atol=0)
    assert torch.autograd.grad(losses.sum(), z)[0].isfinite().all()


def test_an_ignored_target_hides_infinite_logits():
    z = torch.tensor([[-torch.inf, 0.0], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([-100, 1])
    for f in (F.cross_entropy, cross_entropy):
        value = f(z, y)
        (first,) = torch.autograd.grad(value, z, create_graph=True)
        assert value.isfinite()
        assert first[0].tolist() == [0, 0]
        assert torch.autograd.grad(first.sum(), z)[0].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_lower_precision_is_as_accurate_as_torch(dtype: torch.dtype, smoothing: float, device: str):
    def differentiated(f: Loss, z: Tensor, y: Tensor) -> list[Tensor]:
        x = z.clone().requires_grad_()
        value = f(x, y, label_smoothing=smoothing)
        assert value.dtype == z.dtype
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad((first * weights).sum(), x)
        return [t.detach().double() for t in (value, first, second)]

    errors = torch.zeros(2, 3)
    for _ in range(20):
        z, y = draw(16, 40, device=device).to(dtype), labels((16, 40)).to(device)
        weights = torch.randn(16, 40, device=device).to(dtype)
        truth = differentiated(definition, z.double(), y)
        for row, f in enumerate((F.cross_entropy, cross_entropy)):
            found = differentiated(f, z, y)
            errors[row] += torch.tensor(
                [float((a - b).norm() / b.norm()) ** 2 for a, b in zip(found, truth, strict=True)]
            )
    assert (errors[1] <= 1.3**2 * errors[0] + 20 * torch.finfo(dtype).eps ** 2 / 16).all()


def test_dtypes_under_autocast_are_torchs():
    z, y = draw(4, 5).bfloat16().requires_grad_(), labels((4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_entropy(z, y).dtype == F.cross_entropy(z, y).dtype == torch.float32


# -- what is kept ----------------------------------------------------------------------------------


class Alive:
    """How many storages of one size are alive, after each operation of a block."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.most, self._seen = nbytes, 0, dict[int, Any]()

    def see(self, x: Tensor) -> None:
        if x.untyped_storage().nbytes() == self.nbytes:
            reference = torch_private.storage_weakref(x)
            self._seen[reference.cdata] = reference
            self.most = max(self.most, self.now())

    def now(self) -> int:
        self._seen = {
            key: reference for key, reference in self._seen.items() if not reference.expired()
        }
        return len(self._seen)


def kept(f: Loss, **rest: Any) -> tuple[int, int]:
    """Logits and their like that are alive between the inner gradient and the outer backward pass,
    and at most until its end.

    The logits are those of a linear layer, as in a language model. The user holds the gradient of
    its weights, nothing else.
    """
    x, weight = draw(32, 8), draw(8, 1000).requires_grad_()
    target = labels((32, 1000))
    alive = Alive(32 * 1000 * 8)
    with torch_private.observing(alive.see):
        (first,) = torch.autograd.grad(f(x @ weight, target, **rest), weight, create_graph=True)
        between, alive.most = alive.now(), 0
        torch.autograd.grad((first**2).sum(), weight)
    return between, alive.most


@pytest.mark.parametrize(
    "rest",
    [{}, {"label_smoothing": 0.1}, {"weight": torch.linspace(0.5, 2, 1000, dtype=torch.float64)}],
)
def test_at_most_three_tensors_of_the_logits_size(
    rest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """torch 2.13 keeps two and needs seven at once; here one (the logits) is kept and three are
    needed: cotangent and result besides."""
    monkeypatch.setattr(softmax_loss, "CHUNK", 4000)
    assert kept(F.cross_entropy, **rest)[1] >= 6
    between, most = kept(cross_entropy, **rest)
    assert between <= 1
    assert most <= 3


def test_few_logits_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    z, y = draw(4, 5).requires_grad_(), labels((4, 5))
    assert torch.equal(cross_entropy(z, y), F.cross_entropy(z, y))
    assert "NllLoss" in type(cross_entropy(z, y).grad_fn).__name__


def test_reverse_over_forward_over_reverse():
    """Of the square of the loss, whose cotangent has a tangent of its own."""
    z, y, along = draw(2, 3), labels((2, 3)), draw(2, 3)
    ours, truth = (
        torch.func.grad(
            lambda z, f=f: (
                torch.func.jvp(torch.func.grad(lambda z: f(z, y).square()), (z,), (along,))[  # type: ignore[misc]
                    1
                ].sin()
            ).sum()
        )(z)
        for f in (cross_entropy, definition)
    )
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


def test_a_tangent_of_a_tangent():
    """The own form has none, so torch's is taken."""
    z, y = draw(4, 5), labels((4, 5))
    twice = lambda f: torch.func.jacfwd(torch.func.jacfwd(lambda s: f(z * s, y)))  # noqa: E731
    at = torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(
        twice(cross_entropy)(at), twice(definition)(at), rtol=1e-10, atol=1e-12
    )


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "reduction"),
    [
        ({"reduce": False}, "none"),
        ({"size_average": False}, "sum"),
        ({"size_average": True}, "mean"),
    ],
)
def test_deprecated_arguments(old: Any, reduction: str):
    z, y = draw(4, 5).requires_grad_(), labels((4, 5))
    assert torch.equal(cross_entropy(z, y, **old), cross_entropy(z, y, reduction=reduction))


def invalid() -> Iterator[Any]:
    z, y = torch.zeros(4, 5), torch.zeros(4, dtype=torch.long)
    yield pytest.param((z.long(), y), {}, "floating-point logits", id="integers")
    yield pytest.param((torch.zeros(()), y), {}, "floating-point logits", id="number")
    yield pytest.param((z, y), {"reduction": "all"}, "'mean', 'sum', 'none'", id="reduction")
    yield pytest.param((z, y), {"label_smoothing": 2.0}, "from 0 to 1", id="smoothing")
    yield pytest.param((z, y, torch.ones(4)), {}, "each of 5 classes", id="weight")
    yield pytest.param((z, z), {"ignore_index": 1}, "class indices only", id="ignored probability")
    yield pytest.param((z, y[:3]), {}, r"shape \(4,\)", id="shape")
    yield pytest.param((z, y.float()), {}, r"target\.long\(\)", id="dtype")
    yield pytest.param(
        (z, y + 5), {}, r"label 5, but there are only 5 classes \(0 to 4\)", id="label"
    )


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(("args", "rest", "match"), list(invalid()))
def test_bad_input_is_refused(args: tuple[Any, ...], rest: dict[str, Any], match: str):
    with pytest.raises(InvalidInputError, match=match) as raised:
        cross_entropy(*args, **rest)
    assert isinstance(raised.value, InnerLoopError)
