"""``innerloop.nn.functional.scaled_dot_product_attention``: both forms against the definition, in
every derivative."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import innerloop
from innerloop import InnerLoopError
from innerloop._utils import torch_private
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.nn import _twice_differentiable as twice
from innerloop.nn._replacements import attention
from innerloop.nn._replacements import attention_blockwise as blockwise
from innerloop.nn.functional import scaled_dot_product_attention
from tests.oracles import directional

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FORMS = ("plain", "blocks")
TINY = {"BLOCK": 40, "ROWS": 3, "CAUSAL_ROWS": 3}
"""Several blocks in a sequence of a few positions."""


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    choose(request.param, monkeypatch)
    return request.param


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    choose("blocks", monkeypatch)


def choose(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TINY.items():
        monkeypatch.setattr(blockwise, name, value)
    at = 0 if form == "blocks" else 2**60
    monkeypatch.setattr(attention, "TAKES_BLOCKS", {"cpu": at, "cuda": at})


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """exp(S) V / sum exp(S), with 0 / 0 = 0: neither softmax nor a masked fill."""
    scores = torch.einsum("...ie,...je->...ij", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    sees = torch.ones(scores.shape[-2:], dtype=scores.dtype, device=q.device)
    if causal:
        sees = sees.tril()
    if mask is not None and mask.dtype == torch.bool:
        sees = sees * mask
    elif mask is not None:
        sees = sees * mask.exp()
    weights = scores.exp() * sees
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("...ij,...jf->...if", weights / torch.where(total == 0, 1.0, total), v)


def draw(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device)


def tensors(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """2 sequences, 3 heads, 7 queries, 9 keys."""
    return (
        draw(2, 3, 7, 4, device=device),
        draw(2, 3, 9, 4, device=device),
        draw(2, 3, 9, 5, device=device),
    )


def dead_row(mask: Tensor) -> Tensor:
    """Of one row nothing is left."""
    mask[..., 2, :] = False if mask.dtype == torch.bool else -torch.inf
    return mask


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "boolean": lambda: torch.rand(7, 9) > 0.4,
    "boolean, a row sees nothing": lambda: dead_row(torch.rand(2, 1, 7, 9) > 0.4),
    "padding": lambda: torch.rand(2, 1, 1, 9) > 0.3,
    "additive": lambda: draw(2, 3, 7, 9),
    "additive, a row sees nothing": lambda: dead_row(draw(1, 3, 7, 9)),
    "additive, one for all": lambda: draw(9),
    "additive, with infinities": lambda: draw(7, 9).masked_fill(torch.rand(7, 9) > 0.7, -torch.inf),
    "one per row": lambda: draw(3, 7, 1),
}

Attention = Callable[..., Tensor]


def curved(attend: Attention, *args: Any) -> Tensor:
    """A loss of which no derivative vanishes."""
    out = attend(*args)
    return (out.sin() * torch.arange(1, 1 + out.shape[-1], device=out.device)).sum()


def derivatives(
    attend: Attention, inputs: Sequence[Tensor], along: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    """The value and every kind of derivative up to the third, by autograd and by torch.func."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = {"value": [attend(*leaves)]}
    order = curved(attend, *leaves)
    for name in ("gradient", "second", "third"):
        gradients = torch.autograd.grad(order, leaves, create_graph=True)
        found[name] = list(gradients)
        order = sum(
            ((g.sin() * u).sum() for g, u in zip(gradients, along, strict=True)), torch.zeros(())
        )  # bounded weights
    push = lambda *x: torch.func.jvp(attend, x, tuple(along))[1]  # noqa: E731
    found["push"] = [push(*inputs)]
    gradient = torch.func.grad(lambda *x: curved(attend, *x), tuple(range(len(inputs))))
    found["forward over reverse"] = list(torch.func.jvp(gradient, tuple(inputs), tuple(along))[1])
    found["reverse over forward"] = list(
        torch.func.grad(lambda *x: curved(push, *x), tuple(range(len(inputs))))(*inputs)
    )
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(x, u) for x, u in zip(leaves, along, strict=True)
        ]
        dual = torch.autograd.grad(curved(attend, *duals), duals, create_graph=True)
        found["dual"] = [
            t for x in dual if (t := torch.autograd.forward_ad.unpack_dual(x).tangent) is not None
        ]
    return found


def assert_same(
    ours: dict[str, list[Tensor]], truth: dict[str, list[Tensor]], tolerance: float = 1e-11
) -> None:
    for name, expected in truth.items():
        assert len(ours[name]) == len(expected), name
        for a, b in zip(ours[name], expected, strict=True):
            scale = 1 + b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


# -- against the definition ------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", list(MASKS))
def test_value_and_derivatives_are_those_of_the_definition(mask: str, device: str, form: str):
    made = MASKS[mask]()
    m = None if made is None else made.to(device)
    inputs = tensors(device)
    along = [torch.randn_like(x) for x in inputs]
    ours = derivatives(lambda q, k, v: scaled_dot_product_attention(q, k, v, m), inputs, along)
    assert_same(ours, derivatives(lambda q, k, v: definition(q, k, v, m), inputs, along))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("queries", "keys"), [(7, 9), (9, 7), (1, 5), (8, 8)])
def test_causal(queries: int, keys: int, device: str, form: str):
    inputs = tuple(draw(2, n, d, device=device) for n, d in ((queries, 4), (keys, 4), (keys, 5)))
    along = [torch.randn_like(x) for x in inputs]
    ours = derivatives(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        inputs,
        along,
    )
    truth = derivatives(lambda q, k, v: definition(q, k, v, causal=True, scale=0.3), inputs, along)
    assert_same(ours, truth)


@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (7, 9), (1, 3, 1, 9), (2, 1, 7, 1), (9,)])
def test_a_mask_is_differentiated(shape: tuple[int, ...], form: str):
    inputs = (*tensors(), draw(*shape))
    along = [torch.randn_like(x) for x in inputs]
    assert_same(
        derivatives(scaled_dot_product_attention, inputs, along),
        derivatives(definition, inputs, along),
    )


@pytest.mark.parametrize(("bias", "diagonal"), [(causal_lower_right, 2), (causal_upper_left, 0)])
def test_a_causal_bias_hides_what_it_hides_in_torch(bias: Any, diagonal: int, form: str):
    """As a tensor it is memory that nobody has written."""
    q, k, v = tensors()
    mask = torch.ones(7, 9, dtype=torch.bool).tril(diagonal)
    with innerloop.nn.replacing():
        ours = derivatives(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias(7, 9)),
            (q, k, v),
            (q.cos(), k.cos(), v.cos()),
        )
    assert_same(
        ours,
        derivatives(
            lambda q, k, v: definition(q, k, v, mask), (q, k, v), (q.cos(), k.cos(), v.cos())
        ),
    )


def test_grouped_queries(form: str):
    inputs = (draw(2, 6, 7, 4), draw(2, 3, 9, 4), draw(2, 2, 9, 5))
    along = [torch.randn_like(x) for x in inputs]

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return definition(q, k.repeat_interleave(2, 1), v.repeat_interleave(3, 1))

    grouped = lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
    assert_same(derivatives(grouped, inputs, along), derivatives(repeated, inputs, along))


@pytest.mark.parametrize("batch", [(), (2,), (2, 1, 3, 2)])
def test_any_leading_dimensions(batch: tuple[int, ...], form: str):
    inputs = (draw(*batch, 7, 4), draw(9, 4), draw(*batch[-1:], 9, 5))
    along = [torch.randn_like(x) for x in inputs]
    assert_same(
        derivatives(scaled_dot_product_attention, inputs, along),
        derivatives(definition, inputs, along),
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_mask(data: st.DataObject):
    size = st.integers(1, 6)
    heads, queries, keys, features, values = (data.draw(size) for _ in range(5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    of = lambda *s: torch.randn(*s, dtype=torch.float64, generator=generator)  # noqa: E731
    q, k, v = (
        of(2, heads, queries, features),
        of(2, heads, keys, features),
        of(2, heads, keys, values),
    )
    shape = [data.draw(st.sampled_from([1, n])) for n in (2, heads, queries, keys)][
        data.draw(st.integers(0, 3)) :
    ]
    additive = data.draw(st.booleans())
    mask = of(*shape) if additive else torch.rand(*shape, generator=generator) > 0.4
    inputs = (q, k, v, mask) if additive else (q, k, v)
    along = [torch.randn_like(x) for x in inputs]
    for form in FORMS:
        with pytest.MonkeyPatch.context() as patch:
            choose(form, patch)
            patch.setattr(blockwise, "BLOCK", data.draw(st.integers(8, 100)))
            ours = derivatives(
                lambda q, k, v, m=mask: scaled_dot_product_attention(q, k, v, m), inputs, along
            )
        assert_same(
            ours, derivatives(lambda q, k, v, m=mask: definition(q, k, v, m), inputs, along), 1e-10
        )


def test_derivatives_are_finite_differences(form: str):
    q, k, v = tensors()
    mask = dead_row(torch.rand(7, 9) > 0.4)
    leaves = {"q": q, "k": k, "v": v}
    along = {name: torch.randn_like(x) for name, x in leaves.items()}

    def gradient(at: dict[str, Tensor]) -> Tensor:
        x = [t.clone().requires_grad_() for t in at.values()]
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(*x), x)])

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return curved(scaled_dot_product_attention, q, k, v, mask)

    weights = torch.randn(sum(x.numel() for x in leaves.values()), dtype=torch.float64)
    x = [t.clone().requires_grad_() for t in leaves.values()]
    first = torch.autograd.grad(loss(*x), x, create_graph=True)
    slope = sum(float((g.detach() * u).sum()) for g, u in zip(first, along.values(), strict=True))
    assert slope == pytest.approx(
        directional(lambda at: loss(*at.values()).detach(), leaves, along), rel=1e-7
    )
    weighed = (torch.cat([g.reshape(-1) for g in first]) * weights).sum()
    second = torch.autograd.grad(weighed, x)
    slope = sum(float((g.detach() * u).sum()) for g, u in zip(second, along.values(), strict=True))
    assert slope == pytest.approx(
        directional(lambda at: (gradient(at) * weights).sum().detach(), leaves, along), rel=1e-7
    )


# -- against PyTorch -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", list(MASKS))
def test_value_and_two_derivatives_are_those_of_the_math_kernel(mask: str, form: str):
    m, inputs = MASKS[mask](), tensors()

    def twice_differentiated(attend: Attention) -> list[Tensor]:
        x = [t.clone().requires_grad_() for t in inputs]
        first = torch.autograd.grad(curved(attend, *x, m), x, create_graph=True)
        return [*first, *torch.autograd.grad(torch.stack([(g**3).sum() for g in first]).sum(), x)]

    with sdpa_kernel(SDPBackend.MATH):
        truth = twice_differentiated(F.scaled_dot_product_attention)
    for a, b in zip(twice_differentiated(scaled_dot_product_attention), truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_is_as_accurate_as_the_math_kernel(
    dtype: torch.dtype, device: str, form: str
):
    def differentiated(attend: Attention, given: list[Tensor]) -> list[Tensor]:
        x = [t.clone().requires_grad_() for t in given]
        out = attend(*x)
        assert out.dtype == given[0].dtype
        first = torch.autograd.grad((out.double().sin()).sum(), x, create_graph=True)
        second = torch.autograd.grad(torch.stack([(g.double() ** 2).sum() for g in first]).sum(), x)
        return [t.detach().double() for t in (out, *first, *second)]

    errors = torch.zeros(
        2, 7
    )  # squared, relative, of theirs and ours: value, three gradients, three second derivatives
    for _ in range(20):
        inputs = [x.to(dtype) for x in tensors(device)]
        truth = differentiated(definition, [x.double() for x in inputs])
        with sdpa_kernel(SDPBackend.MATH):
            theirs = differentiated(F.scaled_dot_product_attention, inputs)
        for row, found in enumerate((theirs, differentiated(scaled_dot_product_attention, inputs))):
            errors[row] += torch.tensor(
                [float((a - b).norm() / b.norm()) ** 2 for a, b in zip(found, truth, strict=True)]
            )
    assert (errors[1] <= 1.3**2 * errors[0]).all()


def test_what_is_not_differentiated_takes_the_fused_kernel(monkeypatch: pytest.MonkeyPatch):
    seen = []
    inputs: Any = [x.requires_grad_() for x in tensors()]
    original: Any = F.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        assert torch.equal(scaled_dot_product_attention(*inputs), original(*inputs))
    constants: Any = [x.detach() for x in inputs]
    scaled_dot_product_attention(*constants)
    assert len(seen) == 2
    scaled_dot_product_attention(*inputs)
    torch.func.grad(lambda q: scaled_dot_product_attention(q, *inputs[1:]).sum())(
        inputs[0].detach()
    )
    torch.func.jvp(
        lambda q: scaled_dot_product_attention(q, q, q),
        (inputs[0].detach(),),
        (inputs[0].detach(),),
    )
    assert len(seen) == 2


# -- transforms ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_dims", "causal"),
    list(itertools.product([(0, 0, 0), (0, None, 1), (None, 2, None)], [False, True])),
)
def test_vmap(in_dims: tuple[int | None, ...], causal: bool, form: str):
    inputs = tensors()
    stacked = [
        x if d is None else torch.stack([x, 2 * x, x - 1], d)
        for x, d in zip(inputs, in_dims, strict=True)
    ]
    each = [
        [x if d is None else x.select(d, i) for x, d in zip(stacked, in_dims, strict=True)]
        for i in range(3)
    ]

    def loss(attend: Attention) -> Callable[..., Any]:
        return torch.func.grad(lambda q, k, v: curved(attend, q, k, v, None, causal), (0, 1, 2))

    def ours(q: Tensor, k: Tensor, v: Tensor, m: None, causal: bool) -> Tensor:
        return scaled_dot_product_attention(q, k, v, m, is_causal=causal)

    found = torch.func.vmap(loss(ours), in_dims)(*stacked)
    for i in range(3):
        for a, b in zip(found, loss(definition)(*each[i]), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-11, atol=1e-11)


def test_jacobians_and_hessians(form: str):
    q, k, v = draw(3, 2), draw(4, 2), draw(4, 2)
    mask = draw(3, 4)
    ours = lambda q, m: scaled_dot_product_attention(q, k, v, m).sin()  # noqa: E731
    truth = lambda q, m: definition(q, k, v, m).sin()  # noqa: E731
    for transform in (
        torch.func.jacrev,
        torch.func.jacfwd,
        lambda f, argnums: torch.func.hessian(f, argnums),
        lambda f, argnums: torch.func.jacrev(torch.func.jacrev(f, argnums), argnums),
        lambda f, argnums: torch.func.jacrev(torch.func.jacfwd(f, argnums), argnums),
    ):
        for argnums in (0, 1):
            a, b = (transform(f, argnums)(q, mask) for f in (ours, truth))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_the_batching_that_knows_no_function_raises(blocks: None):
    q = draw(1, 3, 2)
    attend = lambda z: scaled_dot_product_attention(z, z, z)  # noqa: E731
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.functional.jacobian(attend, q, vectorize=True)
    jacobian = torch.autograd.functional.jacobian(attend, q)
    torch.testing.assert_close(torch.func.jacrev(attend)(q), jacobian)


def test_a_tangent_of_a_tangent(form: str):
    """Blocks have none, so plain operations are taken."""
    q, k, v = tensors()
    f = lambda attend: torch.func.jacfwd(  # noqa: E731
        torch.func.jacfwd(lambda s: attend(q * s, k, v).sin().sum())
    )
    at = torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(
        f(scaled_dot_product_attention)(at), f(definition)(at), rtol=1e-10, atol=1e-10
    )


def test_a_tangent_of_a_tangent_of_blocks_is_refused():
    q, k, v = tensors()
    function = blockwise.Blockwise(0.5)
    twice_forward = torch.func.jacfwd(
        torch.func.jacfwd(lambda s: twice.evaluate(function, (q * s, k, v), (None,))[0].sum())
    )
    with pytest.raises(NotDifferentiableError, match="tangent of a tangent"):
        twice_forward(torch.tensor(0.7, dtype=torch.float64))


def test_gradcheck_of_blocks(blocks: None):
    q, k, v, mask = (draw(*s).requires_grad_() for s in ((2, 3, 2), (2, 4, 2), (2, 4, 1), (3, 4)))
    torch.autograd.gradcheck(scaled_dot_product_attention, (q, k, v, mask), check_forward_ad=True)
    torch.autograd.gradgradcheck(
        scaled_dot_product_attention, (q, k, v, mask), check_fwd_over_rev=True
    )


# -- dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_plain_operations_drop_what_the_math_kernel_drops(
    causal: bool, monkeypatch: pytest.MonkeyPatch
):
    choose("plain", monkeypatch)
    q, k, v = (x.requires_grad_() for x in tensors())
    torch.manual_seed(3)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=causal)
    after = torch.rand(())
    torch.manual_seed(3)
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=causal), theirs
    )
    assert torch.equal(torch.rand(()), after)


def kept(q: Tensor, k: Tensor, **settings: Any) -> Tensor:
    """D, read off by letting every value be a unit vector: O = P D."""
    with torch.no_grad():
        shape = (*q.shape[:-1], k.shape[-2])
        unit = torch.eye(k.shape[-2], dtype=q.dtype).expand(*q.shape[:-2], -1, -1)
        torch.manual_seed(5)
        dropped = scaled_dot_product_attention(q, k, unit, dropout_p=0.4, **settings)
        return (
            (
                dropped
                / definition(
                    q, k, unit, settings.get("attn_mask"), settings.get("is_causal", False)
                )
            )
            .nan_to_num()
            .view(shape)
        )


@pytest.mark.parametrize(
    "settings", [{}, {"is_causal": True}, {"attn_mask": torch.ones(7, 9, dtype=torch.bool).tril(2)}]
)
def test_every_derivative_drops_the_same(settings: dict[str, Any], form: str):
    inputs = tensors()
    q, k, _ = inputs
    factors = kept(q, k, **settings)
    seen = factors[factors != 0]
    torch.testing.assert_close(seen, torch.full_like(seen, 1 / 0.6))

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        unit = torch.eye(9, dtype=q.dtype).expand(2, 3, -1, -1)
        return (
            definition(q, k, unit, settings.get("attn_mask"), settings.get("is_causal", False))
            * factors
        ) @ v

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        return scaled_dot_product_attention(q, k, v, dropout_p=0.4, **settings)

    along = [torch.randn_like(x) for x in inputs]
    assert_same(derivatives(ours, inputs, along), derivatives(truth, inputs, along))


def test_as_many_are_dropped_as_asked_for(blocks: None):
    factors = torch.stack([kept(draw(4, 40, 2) * 0.01, draw(4, 50, 2) * 0.01)])
    assert (factors == 0).double().mean().item() == pytest.approx(
        0.4, abs=0.02
    )  # 8000 of them: a standard error of .005


def test_cotangents_of_one_forward_pass_see_one_draw(blocks: None):
    """``vmap`` over a pullback: as many rows, but not as many draws."""
    q, k, v = tensors()
    torch.manual_seed(5)
    pair: Any = torch.func.vjp(lambda q: scaled_dot_product_attention(q, k, v, dropout_p=0.4), q)
    out, pull = pair
    cotangents = torch.stack([torch.randn_like(out) for _ in range(3)])
    found = torch.func.vmap(pull)(cotangents)[0]
    for i in range(3):
        torch.testing.assert_close(found[i], pull(cotangents[i])[0])


def test_vmap_has_its_own_rules_for_random_numbers(form: str):
    q = draw(3, 2, 5, 4)
    attend = lambda q: torch.func.grad(  # noqa: E731
        lambda q: scaled_dot_product_attention(q, q, q, dropout_p=0.5).sum()
    )(q)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(attend)(q)
    same = torch.func.vmap(attend, randomness="same")(q[:1].expand(3, -1, -1, -1))
    assert torch.equal(same[0], same[2])
    different = torch.func.vmap(attend, randomness="different")(q[:1].expand(3, -1, -1, -1))
    assert not torch.equal(different[0], different[2])


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_or_everything_is_dropped(p: float, form: str):
    q, k, v = (x.requires_grad_() for x in tensors())
    out = scaled_dot_product_attention(q, k, v, dropout_p=p)
    torch.testing.assert_close(out, definition(q, k, v) * (1 - p))
    assert all(
        g.isfinite().all()
        for g in torch.autograd.grad(out.sin().sum(), (q, k, v), create_graph=True)
    )


# -- surroundings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 0, 4), (2, 5, 4), (2, 5, 3)),
        ((2, 3, 4), (2, 0, 4), (2, 0, 3)),
        ((0, 3, 4), (0, 5, 4), (0, 5, 3)),
    ],
)
def test_nothing_to_attend_to(shapes: tuple[tuple[int, ...], ...], form: str):
    q, k, v = (draw(*s).requires_grad_() for s in shapes)
    out = scaled_dot_product_attention(q, k, v)
    assert out.shape == (*shapes[0][:-1], 3)
    assert not out.any()
    first = torch.autograd.grad(out.sin().sum(), (q, k, v), create_graph=True)
    assert [g.shape for g in first] == [x.shape for x in (q, k, v)]


def test_what_comes_out_may_be_edited_in_place(form: str):
    """The output, and the gradient that is to be differentiated again."""
    q, k, v = (x.requires_grad_() for x in tensors())

    def second(edit: Callable[[Tensor], Tensor]) -> list[Tensor]:
        out = edit(scaled_dot_product_attention(q, k, v))
        first = torch.autograd.grad(out.sin().sum(), (q, k, v), create_graph=True)
        return list(
            torch.autograd.grad(torch.stack([edit(g).sin().sum() for g in first]).sum(), (q, k, v))
        )

    torch.testing.assert_close(
        second(lambda x: x.mul_(2.0).add_(1.0)), second(lambda x: x * 2.0 + 1.0)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_lowers_it_as_it_lowers_torchs(device: str, form: str):
    q, k, v = (x.float().requires_grad_() for x in tensors(device))
    with torch.autocast(device, torch.bfloat16):
        ours, theirs = (
            scaled_dot_product_attention(q, k, v),
            F.scaled_dot_product_attention(q, k, v),
        )
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    first = torch.autograd.grad(ours.float().sin().sum(), (q, k, v), create_graph=True)
    assert all(
        g.dtype == torch.float32
        for g in torch.autograd.grad(torch.stack([(g**2).sum() for g in first]).sum(), (q, k, v))
    )


@pytest.mark.parametrize("mask", [torch.bool, torch.bfloat16, torch.float32])
def test_autocast_lowers_a_mask_too(mask: torch.dtype, form: str):
    q, k, v = (x.float().requires_grad_() for x in tensors())
    m = (draw(7, 9) > 0) if mask == torch.bool else draw(7, 9).to(mask)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (
            scaled_dot_product_attention(q, k, v, m),
            F.scaled_dot_product_attention(q, k, v, m),
        )
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_autocast_leaves_double_precision_alone(form: str):
    q, k, v = (x.requires_grad_() for x in tensors())
    mask = draw(7, 9)
    expected = definition(q, k, v, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v, mask).dtype == torch.float64
        torch.testing.assert_close(
            scaled_dot_product_attention(q, k, v, mask), expected, rtol=1e-12, atol=1e-12
        )


@pytest.mark.usefixtures("types_unchecked")
def test_autocast_leaves_a_double_mask_alone_which_is_then_refused():
    q, k, v = (x.float().requires_grad_() for x in tensors())
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k, v, draw(7, 9))
        with pytest.raises(InvalidInputError, match=r"attn_mask is torch\.float64"):
            scaled_dot_product_attention(q, k, v, draw(7, 9))


def largest(run: Callable[[], Any]) -> int:
    """Elements of the largest tensor that any operation of ``run`` returns."""
    sizes = [0]
    with torch_private.observing(
        lambda t: sizes.append(t.untyped_storage().nbytes() // t.element_size())
    ):
        run()
    return max(sizes)


@pytest.mark.parametrize("settings", [{}, {"is_causal": True}, {"dropout_p": 0.2}])
def test_no_tensor_grows_with_the_square_of_the_length(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "TAKES_BLOCKS", {"cpu": 0, "cuda": 0})
    for name, value in {"BLOCK": 2**11, "ROWS": 2, "CAUSAL_ROWS": 16}.items():
        monkeypatch.setattr(blockwise, name, value)

    def step(length: int) -> None:
        q, k, v = (torch.randn(2, length, 4, requires_grad=True) for _ in range(3))
        out = scaled_dot_product_attention(q, k, v, **settings)
        first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
        torch.autograd.grad(torch.stack([(g**2).sum() for g in first]).sum(), (q, k, v))

    short, long = (largest(functools.partial(step, n)) for n in (64, 256))
    assert long <= 4 * short
    assert long <= 256 * 256 / 8


def invalid() -> Iterator[Any]:
    q, k, v = (torch.zeros(2, 4, n, d) for n, d in ((5, 8), (6, 8), (6, 3)))
    mask = torch.ones(5, 6, dtype=torch.bool)
    yield pytest.param((q[0, 0, 0], k, v), {}, r"two dimensions at least", id="a vector")
    yield pytest.param((q[..., :7], k, v), {}, r"7 and 8 features", id="features")
    yield pytest.param((q, k[..., :5, :], v), {}, r"5 keys and 6 values", id="keys")
    yield pytest.param((q, k.double(), v), {}, r"key\.to\(query\.dtype\)", id="dtypes")
    yield pytest.param((q.long(), k.long(), v.long()), {}, r"floating-point", id="integers")
    yield pytest.param((q, k[:, :3], v[:, :3]), {}, r"do not broadcast", id="heads")
    yield pytest.param((q, k[:, :3], v[:, :3]), {"enable_gqa": True}, r"must divide", id="groups")
    yield pytest.param((q, k, v), {"dropout_p": 1.5}, r"not a probability", id="dropout")
    yield pytest.param((q, k, v, mask), {"is_causal": True}, r"tril\(\)", id="mask and causal")
    yield pytest.param(
        (q, k, v, causal_upper_left(5, 6)),
        {"is_causal": True},
        r"CausalBias",
        id="two causal masks",
    )
    yield pytest.param(
        (q, k, v, mask.long()), {}, r"attn_mask is torch.int64", id="mask of integers"
    )
    yield pytest.param((q, k, v, mask[:, :4]), {}, r"do not broadcast", id="mask too narrow")
    yield pytest.param(
        (q, k, v, mask.expand(3, 1, 1, 5, 6)), {}, r"more dimensions", id="mask too large"
    )


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(("args", "settings", "match"), list(invalid()))
def test_bad_input_is_refused(args: tuple[Any, ...], settings: dict[str, Any], match: str):
    with pytest.raises(InvalidInputError, match=match) as raised:
        scaled_dot_product_attention(*args, **settings)
    assert isinstance(raised.value, InnerLoopError)
