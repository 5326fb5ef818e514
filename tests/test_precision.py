"""Half precision: what is said about it, and the wrapper that keeps an optimizer in float32."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import innerloop
from innerloop import optim
from innerloop._utils import caches
from innerloop.errors import PrecisionWarning
from innerloop.optim import chain, clip_by_global_norm, in_float32
from tests.optimizers import MADE, RULES, Rule, each_rule
from tests.oracles import Params, Task, assert_params, smooth_noise
from tests.strategies import each_exact_strategy

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def quiet() -> Iterator[None]:
    """For tests about numbers: the warning is expected, and has a test of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", innerloop.PrecisionWarning)
        yield


def grads_of(params: Params, t: int) -> Params:
    return {
        n: smooth_noise(*p.shape, phase=10.0 * t + i).to(p.dtype)
        for i, (n, p) in enumerate(params.items())
    }


# -- the warning -----------------------------------------------------------------------------------


def step(params: Params, optimizer: innerloop.optim.Optimizer | None = None) -> Params:
    opt = optimizer or in_float32(innerloop.optim.sgd(lr=0.1))
    return opt.update(grads_of(params, 0), opt.init(params), params)[0]


OPTIMIZERS = {
    "elementwise": innerloop.optim.sgd(lr=0.1, momentum=0.9),
    "per tensor": innerloop.optim.muon(),
    "in_float32": in_float32(innerloop.optim.sgd(lr=0.1)),
    "chain": chain(clip_by_global_norm(1.0), innerloop.optim.adam()),
}


@HALF
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_differentiated_update_of_half_precision_warns_once(kind: str, dtype: torch.dtype):
    params = {"w": torch.ones(3, 2, dtype=dtype, requires_grad=True)}
    with pytest.warns(
        innerloop.PrecisionWarning, match=f"{dtype}.*second-order gradients need float32"
    ) as caught:
        step(params, OPTIMIZERS[kind])
    assert caught[0].filename == __file__  # the user's line, none of the library's
    step(params, OPTIMIZERS[kind])  # a second warning would be an error
    caches.clear()
    with pytest.warns(innerloop.PrecisionWarning):
        step(params)


def test_nothing_is_said_where_nothing_is_differentiated_or_nothing_is_half():
    step({"w": torch.ones(3, dtype=torch.bfloat16)})
    step({"w": torch.ones(3, requires_grad=True)})
    with torch.no_grad():
        step({"w": torch.ones(3, dtype=torch.bfloat16, requires_grad=True)})
    torch.func.vmap(lambda w: step({"w": w})["w"])(torch.ones(2, 3, dtype=torch.bfloat16))


def test_transforms_count_as_differentiation_and_are_not_broken():
    w = torch.ones(3, dtype=torch.bfloat16)
    with pytest.warns(innerloop.PrecisionWarning):
        torch.func.grad(lambda w: step({"w": w})["w"].sum())(w)
    caches.clear()
    with pytest.warns(innerloop.PrecisionWarning):
        torch.func.vmap(torch.func.grad(lambda w: step({"w": w})["w"].sum()))(w.expand(2, 3))
    caches.clear()
    with pytest.warns(innerloop.PrecisionWarning):
        torch.func.jvp(lambda w: step({"w": w})["w"], (w,), (w,))


@pytest.mark.compiled
def test_compiled_code_says_nothing():
    w = torch.ones(3, dtype=torch.bfloat16)
    opt = in_float32(innerloop.optim.adam(), master=True)
    fn = torch.func.grad(lambda w: step({"w": w}, opt)["w"].sum())
    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")(w)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", innerloop.PrecisionWarning)
        torch.testing.assert_close(compiled, fn(w))


# -- the wrapper -----------------------------------------------------------------------------------


@HALF
@pytest.mark.parametrize("master", [False, True], ids=["plain", "master"])
@each_rule()
def test_it_is_the_float32_optimizer_between_casts(rule: Rule, dtype: torch.dtype, master: bool):
    """Truth: a loop that casts by hand around ``torch.optim``, as mixed-precision training is
    written."""
    params = Task().params(dtype)
    copies = {n: torch.nn.Parameter(p.float()) for n, p in params.items()}
    theirs = rule.torch(list(copies.values()), **rule.typical)
    ours, state = dict(params), in_float32(rule.make(**rule.typical), master=master).init(params)
    optimizer = in_float32(rule.make(**rule.typical), master=master)
    for t in range(6):
        grads = grads_of(params, t)
        ours, state = optimizer.update(grads, state, ours)
        for n, copy in copies.items():
            copy.grad = grads[n].float()
        theirs.step()
        if not master:
            for copy in copies.values():
                copy.data.copy_(copy.data.to(dtype).float())
        truth = {n: copy.detach().to(dtype) for n, copy in copies.items()}
        assert_params(ours, truth, 2 * torch.finfo(dtype).eps if t else 0)
    kept = [x for x in pytree.tree_leaves(state) if isinstance(x, Tensor)]
    assert all(x.dtype == torch.float32 for x in kept)


def test_other_dtypes_are_handed_through():
    params = {**Task().params(), "half": torch.ones(3, dtype=torch.float16)}
    plain, wrapped = (
        innerloop.optim.adam(lr=0.1),
        in_float32(innerloop.optim.adam(lr=0.1), master=True),
    )
    new, state = wrapped.update(grads_of(params, 0), wrapped.init(params), params)
    expected, _ = plain.update(grads_of(params, 0), plain.init(params), params)
    assert_params(
        {n: new[n] for n in Task().params()}, {n: expected[n] for n in Task().params()}, 0
    )
    assert new["half"].dtype == torch.float16
    assert state.master is not None
    assert list(state.master) == ["half"]


def test_a_parameter_without_gradient_is_the_same_tensor():
    params = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.bfloat16)}
    opt = in_float32(innerloop.optim.sgd(lr=0.1), master=True)
    new, _ = opt.update({"a": params["a"], "b": None}, opt.init(params), params)
    assert new["b"] is params["b"]


def test_a_change_written_into_a_parameter_reaches_its_copy():
    opt = in_float32(innerloop.optim.sgd(lr=2**-12), master=True)
    params = {"w": torch.ones((), dtype=torch.bfloat16)}
    state = opt.init(params)
    for _ in range(4):
        params, state = opt.update({"w": torch.ones_like(params["w"])}, state, params)
    assert params["w"] == 1
    params, state = opt.update({"w": torch.ones_like(params["w"])}, state, {"w": params["w"] + 2})
    assert state.master is not None
    assert state.master["w"].item() == 3 - 5 * 2**-12


def quadratic(hessian: Tensor, dtype: torch.dtype) -> Any:
    a = hessian.to(dtype)
    return lambda params, hyper, batch: (params["w"] @ a @ params["w"]) / 2


def along(optimizer: innerloop.optim.Optimizer, dtype: torch.dtype, steps: int = 60) -> Tensor:
    """The meta-gradient of a weighted sum of the final parameters, in the initial ones, on a
    quadratic."""
    size = 24
    basis = torch.linalg.qr(smooth_noise(size, size))[0]
    hessian = basis @ torch.diag(torch.logspace(-3, 0, size, dtype=torch.float64)) @ basis.T
    problem = innerloop.Problem(quadratic(hessian, dtype), optimizer)
    _, grads = innerloop.metagradient(
        lambda traj, _: (traj.params["w"].double() * smooth_noise(size, phase=1.0)).sum(),
        problem,
        {"w": smooth_noise(size, phase=2.0).to(dtype)},
        [None] * steps,
        wrt="params",
    )
    return grads["w"].double()


@pytest.mark.usefixtures("quiet")
def test_the_master_copy_brings_the_meta_gradient_nearer_to_float64():
    """Truth: float64. Rounding at each of the steps is what the copy spares."""
    rule = innerloop.optim.sgd(lr=0.3)
    truth = along(rule, torch.float64)
    error = lambda opt: ((along(opt, torch.bfloat16) - truth).norm() / truth.norm()).item()  # noqa: E731
    plain, kept, master = error(rule), error(in_float32(rule)), error(in_float32(rule, master=True))
    assert master < 0.02
    assert master < plain / 2
    assert master < kept / 2


@pytest.mark.usefixtures("quiet")
@each_exact_strategy()
def test_every_exact_strategy_gives_what_store_all_gives(strategy: innerloop.strategy.Strategy):
    optimizer = chain(
        clip_by_global_norm(1.0), in_float32(innerloop.optim.adam(eps=0.1), master=True)
    )
    problem = innerloop.Problem(
        lambda params, hyper, batch: ((params["w"] * batch).sin() ** 2).sum(),
        optimizer,
        optimizer_hyper=lambda hyper, t: hyper,
    )
    hyper = {"lr": torch.tensor(0.05), "clip_by_global_norm.max_norm": torch.tensor(0.7)}
    start = {"w": smooth_noise(5).to(torch.bfloat16)}

    def gradient(strategy: innerloop.strategy.Strategy) -> Any:
        return innerloop.metagradient(
            lambda traj, _: traj.params["w"].float().square().sum(),
            problem,
            start,
            list(torch.linspace(1, 2, 5, dtype=torch.bfloat16)),
            hyper=hyper,
            wrt=tuple(sorted(strategy.differentiates)),
            strategy=strategy,
        )[1]

    ours, truth = gradient(strategy), gradient(innerloop.StoreAll())
    for name in ours:
        for a, b in zip(
            pytree.tree_leaves(ours[name]), pytree.tree_leaves(truth[name]), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


def test_it_stands_in_groups_and_names_the_hyper_parameters_of_what_it_wraps():
    opt = innerloop.optim.groups(
        {"a": in_float32(innerloop.optim.sgd(lr=1.0)), "*": innerloop.optim.adam(lr=1.0)}
    )
    params = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2)}
    new, _ = opt.update(params, opt.init(params), params, {"momentum": 0.5})
    assert new["a"].dtype == torch.bfloat16
    with pytest.raises(innerloop.InnerLoopError, match="no group has a hyper-parameter 'rate'"):
        opt.update(params, opt.init(params), params, {"rate": 0.5})


@pytest.mark.usefixtures("types_unchecked")
def test_what_is_no_optimizer_is_refused():
    wrap: Any = in_float32
    with pytest.raises(innerloop.InnerLoopError, match=r"in_float32\(innerloop.optim.adam\(\)\)"):
        wrap(torch.optim.SGD([torch.zeros(1)]))
    assert (
        repr(in_float32(RULES[0].make(lr=0.1), master=True))
        == "in_float32(sgd(lr=0.1), master=True)"
    )


@pytest.mark.usefixtures("float64")
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


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["learned", "adapt"])
def test_half_precision_is_warned_of(name: str):
    optimizer, p = MADE[name](), torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    caches.clear()
    with pytest.warns(PrecisionWarning, match="bfloat16"):
        optimizer.update({"p": p * 2}, optimizer.init({"p": p}), {"p": p})
