"""Steps that are one node of the graph (`Kernel`): the bits of the rule's own ``step``, its
derivatives, and derivatives of these."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import optim
from innerloop._utils import tree
from innerloop.optim._base import Rule
from innerloop.optim._engine import fused
from innerloop.optim._engine.elementwise import Elementwise
from innerloop.optim._engine.packing import is_whole

# A rule with a kernel is enrolled by one entry.
RULES: dict[str, Callable[[], optim.Optimizer]] = {
    "adam": lambda: optim.adam(lr=0.03, betas=(0.8, 0.95)),
    "adamw": lambda: optim.adamw(lr=0.03, betas=(0.8, 0.95), weight_decay=0.1),
}
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "padded": [(3,), (2, 2), (5,)],
    "aligned": [(16,), (4, 8)],
    "single": [(130, 130)],
}
Named = dict[str, Tensor]


@pytest.fixture(params=sorted(RULES))
def rule(request: pytest.FixtureRequest) -> Any:
    return RULES[request.param]()


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Named]:
    """Return parameters and the gradients of three steps."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            str(i): torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
            for i, shape in enumerate(shapes)
        }
        for _ in range(4)
    ]


def results(rule: Any, params: Named, *grads: Named) -> list[Tensor]:
    """Return the parameters and the state after a step by each of ``grads``."""
    state = rule.init(params)
    for g in grads:
        params, state = rule.update(g, state, params)
    return [*params.values(), *(x for slot in state[1:] if slot is not None for x in slot.flats)]


def by_operations(monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Run with the rule's own operations in place of the kernel."""
    with monkeypatch.context() as patch:
        for make in RULES.values():
            patch.setattr(type(make()), "kernel", Elementwise.kernel)
        return run()


def test_every_kernel_is_enrolled() -> None:
    having = {
        cls
        for cls in Rule.by_torch_class.values()
        if issubclass(cls, Elementwise) and cls.kernel is not Elementwise.kernel
    }
    assert having
    assert having == {type(make()) for make in RULES.values()}


@pytest.mark.parametrize("shapes", sorted(SHAPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_values_are_those_of_the_rule(
    rule: Any, shapes: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = drawn(SHAPES[shapes], dtype)
    with torch.no_grad():
        for g in data[1:]:
            g["0"].view(-1)[0] = 0.0  # a dead unit
    found = results(rule, *data)
    expected = by_operations(monkeypatch, lambda: results(rule, *data))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("shapes", sorted(SHAPES))
def test_the_gradients_are_those_of_the_rule(
    rule: Any, shapes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = drawn(SHAPES[shapes])
    with torch.no_grad():
        for g in data[1:]:
            g["0"].view(-1)[0] = 0.0
    leaves = [x for named in data for x in named.values()]

    def gradients(used: slice) -> list[Tensor]:
        ends = results(rule, *data)[used]
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in ends]
        found = torch.autograd.grad(ends, leaves, weights, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]

    n = len(SHAPES[shapes])
    # All results; one parameter alone; the state alone.
    for used in (slice(None), slice(0, 1), slice(n, None)):
        found = gradients(used)
        expected = by_operations(monkeypatch, lambda used=used: gradients(used))  # type: ignore[misc]
        for a, b in zip(found, expected, strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shapes", ["padded", "alone"])
def test_the_second_derivatives_are_right(rule: Any, shapes: str) -> None:
    data = drawn(SHAPES.get(shapes, [(2, 3)]))[:3]
    leaves = [x for named in data for x in named.values()]
    n = len(data[0])

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        parts = [tensors[i : i + n] for i in range(0, len(tensors), n)]
        named = [{str(i): x for i, x in enumerate(part)} for part in parts]
        ends = results(rule, *named)
        assert ends[0].grad_fn is not None
        assert "_Step" in type(ends[0].grad_fn).__name__
        return tuple(ends[: n + 2])

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_second_derivatives_are_finite_where_the_gradient_is_zero(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.float64):
        params, first, second, _ = drawn(SHAPES["padded"], dtype)
        with torch.no_grad():
            for g in (first, second):
                g["1"].zero_()
        leaves = [*params.values(), *first.values(), *second.values()]

        def curvature(
            leaves: list[Tensor] = leaves, data: tuple[Named, ...] = (params, first, second)
        ) -> list[Tensor]:
            end = sum((x.sin() * x).sum() for x in results(rule, *data))
            assert isinstance(end, Tensor)
            slopes = torch.autograd.grad(end, leaves, create_graph=True)
            total = torch.stack([(s * s).sum() for s in slopes]).sum()
            return list(torch.autograd.grad(total, leaves, materialize_grads=True))

        found = curvature()
        assert all(x.isfinite().all() for x in found)
        for a, b in zip(found, by_operations(monkeypatch, curvature), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3 if dtype is torch.float32 else 1e-9, atol=0)


def test_many_gradients_at_once(rule: Any) -> None:
    data = drawn(SHAPES["padded"])
    leaves = [x for named in data for x in named.values()]
    end = torch.cat([x.flatten() for x in results(rule, *data)[:3]])
    rows = torch.eye(len(end), dtype=end.dtype)
    together = torch.autograd.grad(end, leaves, rows, is_grads_batched=True, retain_graph=True)
    for i, row in enumerate(rows):
        alone = torch.autograd.grad(end, leaves, row, retain_graph=True)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b)


def test_a_backward_pass_may_run_twice_and_changes_nothing(rule: Any) -> None:
    data = drawn(SHAPES["single"], torch.float32)
    leaves = [x for named in data for x in named.values()]
    ends = results(rule, *data)
    weights = [torch.ones_like(x) for x in ends]
    first, second = (torch.autograd.grad(ends, leaves, weights, retain_graph=True) for _ in "ab")
    assert all(map(torch.equal, first, second))
    assert all(bool((w == 1).all()) for w in weights)


@pytest.mark.parametrize("name", sorted(RULES))
def test_only_what_needs_a_gradient_gets_one(name: str) -> None:
    rule: Any = RULES[name]()
    params, grads, *_ = drawn(SHAPES["padded"])
    constant = {n: g.detach() for n, g in grads.items()}
    new, _ = rule.update(constant, rule.init(params), params)
    (slope,) = torch.autograd.grad(new["1"].sum(), params["1"])
    decay = 1 - 0.03 * 0.1 if name == "adamw" else 1.0
    torch.testing.assert_close(slope, torch.full_like(slope, decay))
    fixed = {n: p.detach() for n, p in params.items()}
    new, _ = rule.update(grads, rule.init(fixed), fixed)
    (slope,) = torch.autograd.grad(new["1"].sum(), grads["1"])
    # At the first step -lr g/|g|, flat but for eps.
    assert slope.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tracked_step_is_one_node(rule: Any, dtype: torch.dtype) -> None:
    model = torch.nn.Linear(3, 2).to(dtype)
    with innerloop.track(model, rule) as loop:
        for _ in range(2):
            loop.step(loop.model(torch.ones(4, 3, dtype=dtype)).square().mean())
        node: Any = loop.model.weight.grad_fn
        seen = set()
        while node is not None and "_Step" not in type(node).__name__:
            seen.add(type(node).__name__)
            node = node.next_functions[0][0]
        assert node is not None, seen


def test_what_a_kernel_does_not_take_is_left_to_the_operations() -> None:
    rule: Any = optim.adam()
    params, grads, *_ = drawn(SHAPES["padded"])
    (bucket,) = rule.init(params).mu.layout
    state = {"mu": torch.zeros(24).double(), "nu": torch.zeros(24).double()}
    hyper = rule.resolve(None)
    args: list[Any] = [rule, bucket, grads, params, 0, state, hyper]
    assert fused.step(*args) is not None

    def refused(**instead: Any) -> bool:
        names = ["rule", "bucket", "grads", "params", "count", "state", "hyper"]
        changed = [instead.get(name, arg) for name, arg in zip(names, args, strict=True)]
        return fused.step(*changed) is None

    assert refused(hyper={**hyper, "lr": torch.tensor(0.1)})
    assert refused(hyper={**hyper, "betas": (torch.tensor(0.9), 0.999)})
    assert refused(hyper={**hyper, "lr": {"0": 0.1, "1": 0.2, "2": 0.3}})
    assert refused(hyper={**hyper, "eps": 0.0})
    assert refused(hyper={**hyper, "eps_root": 1e-8})
    assert refused(hyper={**hyper, "weight_decay": 0.1})
    assert refused(count=torch.tensor(3))
    assert refused(rule=optim.adam(amsgrad=True))
    assert refused(rule=optim.adam(maximize=True))
    assert refused(grads={n: g.float() for n, g in grads.items()})
    assert refused(grads={n: g.detach().to_sparse() for n, g in grads.items()})
    assert refused(params={n: p.half() for n, p in params.items()})
    with torch.autograd.forward_ad.dual_level():
        assert refused()
    assert torch.func.vmap(lambda x: x + float(refused()))(torch.zeros(2)).tolist() == [1, 1]
    assert not math.isnan(float(state["mu"].sum()))


def test_what_is_looked_up_for_each_parameter_is_left_out_only_where_nothing_differs(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of all parameters at once, beside the way that takes buckets one by one."""
    params, grads, *_ = drawn(SHAPES["padded"])
    state = rule.init(params)
    (bucket,), (flat,) = state.mu.layout, state.mu.flats
    assert is_whole(bucket, flat, params, grads)
    turned = dict(reversed(params.items()))
    assert not is_whole(bucket, flat, turned, grads)
    assert not is_whole(bucket, flat, params, {**grads, "1": None})
    assert not is_whole(bucket, flat, params, {n: g for n, g in grads.items() if n != "1"})
    assert not is_whole(bucket, flat, params, {**grads, "more": grads["0"]})
    assert not is_whole(bucket, flat, params, {**grads, "1": grads["1"][:1]})
    assert not is_whole(bucket, flat, {**params, "1": params["1"].float()}, grads)
    assert not is_whole(bucket, flat, {**params, "1": params["1"].to("meta")}, grads)
    assert not is_whole(bucket._replace(active=False), flat, params, grads)
    assert not is_whole(bucket, flat, params, grads, limit=0)

    # Of equal shapes, the order alone differs.
    alike, slopes, *_ = drawn([(2,), (2,)])
    other = dict(reversed(alike.items()))
    after = rule.init(alike)
    assert not is_whole(after.mu.layout[0], after.mu.flats[0], other, slopes)
    assert list(rule.update(slopes, after, other)[0]) == list(other)

    # A state that was made for another dtype has other padding.
    single = {n: p.detach().float() for n, p in params.items()}
    doubled = tree.map_tensors(Tensor.double, rule.init(single))
    assert not is_whole(doubled.mu.layout[0], doubled.mu.flats[0], params, grads)
    assert rule.update(grads, doubled, params)[1].mu.layout == (bucket,)

    at_once = rule.update(grads, state, params)
    with monkeypatch.context() as patch:
        patch.setattr(Elementwise, "_at_once", lambda *_: None)
        one_by_one = rule.update(grads, state, params)
    assert list(at_once[0]) == list(one_by_one[0])
    assert all(map(torch.equal, at_once[0].values(), one_by_one[0].values()))
    assert at_once[1].mu.layout is one_by_one[1].mu.layout
    assert at_once[1].count == one_by_one[1].count == 1
    for found, expected in zip(at_once[1][1:], one_by_one[1][1:], strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found.flats[0], expected.flats[0])

    # Where something differs, the other way answers, and says what is wrong.
    skipped, _ = rule.update({**grads, "1": None}, state, params)
    assert skipped["1"] is params["1"]
    assert not torch.equal(skipped["0"], params["0"])
    new, _ = rule.update(grads, state, turned)
    assert torch.equal(new["2"], at_once[0]["2"])
    with pytest.raises(innerloop.InvalidInputError, match="gradients for"):
        rule.update({**grads, "more": grads["0"]}, state, params)
    with pytest.raises(innerloop.InvalidInputError, match="has shape"):
        rule.update({**grads, "1": grads["1"][:1]}, state, params)
    theirs = [nn.Parameter(p.detach()) for p in params.values()]
    alone = optim.from_torch(torch.optim.Adam(theirs), dict(zip(params, theirs, strict=True)))
    with pytest.raises(innerloop.InvalidInputError, match="gradients for"):
        alone.update({**grads, "more": grads["0"]}, alone.init(params), params)


def halved(base: Any) -> Any:
    """Return a rule that inherits everything but its step from ``base``."""

    class Halved(base):
        def step(self, grad: Tensor, param: Tensor, state: Any, hyper: Any) -> tuple[Tensor, Any]:
            return 0.5 * param - hyper["lr"] * grad, state

    return Halved


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}])
@pytest.mark.parametrize(
    "base", [type(optim.adam()), type(optim.adamw()), type(optim.sgd()), type(optim.rmsprop())]
)
def test_a_subclass_with_a_step_of_its_own(base: Any, settings: dict[str, Any]) -> None:
    """What stands for the step of its parent does not stand for its own."""
    if settings and base is not type(optim.sgd()):
        settings = {}
    rule = halved(base)(lr=0.25, **settings)
    params, grads, *_ = drawn(SHAPES["padded"])
    for hyper in (None, {"lr": torch.tensor(0.25, dtype=torch.float64)}):
        new, _ = rule.update(grads, rule.init(params), params, hyper)
        for name, p in params.items():
            torch.testing.assert_close(new[name], 0.5 * p - 0.25 * grads[name])


def test_to_first_order_a_step_keeps_nothing(rule: Any) -> None:
    for shapes in SHAPES.values():
        params, grads, *_ = drawn(shapes)
        constant = {n: g.detach() for n, g in grads.items()}
        held: list[Tensor] = []

        def keep(x: Tensor, held: list[Tensor] = held) -> Tensor:
            held.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            new, state = rule.update(constant, rule.init(params), params)
        assert not held
        assert all(p.requires_grad for p in new.values())
        assert not any(x.requires_grad for slot in (state.mu, state.nu) for x in slot.flats)


def test_a_negative_zero_stays_one() -> None:
    for shape in ([(2,)], [(2,), (3,)]):
        values = [torch.tensor([-0.0, 0.0, 1.0][: s[0]]) for s in shape]
        theirs = [nn.Parameter(v.clone()) for v in values]
        optimizer = torch.optim.Adam(theirs)
        for p in theirs:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        params = {str(i): v for i, v in enumerate(values)}
        ours = optim.adam()
        new, _ = ours.update(
            {n: torch.zeros_like(p) for n, p in params.items()}, ours.init(params), params
        )
        for a, b in zip(new.values(), theirs, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a.signbit(), b.signbit())


def test_both_pullbacks_agree_where_eps_is_tiny() -> None:
    rule: Any = optim.adam(eps=1e-20)
    start = {"a": torch.ones(3), "b": torch.ones(2)}
    grads = {
        "a": torch.tensor([0.0, 1e-25, 1e-3], requires_grad=True),
        "b": torch.zeros(2, requires_grad=True),
    }
    new, _ = rule.update(grads, rule.init(start), start)
    end = torch.stack([p.sum() for p in new.values()]).sum()
    plain = torch.autograd.grad(end, list(grads.values()), retain_graph=True)
    again = torch.autograd.grad(end, list(grads.values()), create_graph=True)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_constants_are_not_kept_from_inside_a_transform() -> None:
    fused._constants.clear()
    params, grads, *_ = drawn(SHAPES["padded"], torch.float32)
    rule: Any = optim.adam()
    with torch.inference_mode():
        rule.update(
            {n: g.clone() for n, g in grads.items()},
            rule.init(params),
            {n: p.clone() for n, p in params.items()},
        )
    new, _ = rule.update(grads, rule.init(params), params)
    fused._constants.clear()
    rows = torch.func.vmap(lambda bar: torch.autograd.grad(new["0"], grads["0"], bar)[0])
    assert rows(torch.eye(3)).shape == (3, 3)
    for constant in fused._constants.values():
        assert not constant.is_inference()
        assert not torch._C._functorch.is_functorch_wrapped_tensor(constant)
