"""The rules that look at a tensor as a whole (Adafactor, Muon) or at some of its entries
(SparseAdam), against ``torch.optim``.

Muon's bfloat16 iteration has no usable difference quotient: its derivatives are compared with those
of a plain float64 iteration that is written here. Adafactor is compared away from its kinks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop
from innerloop import optim
from tests.optimizers import gentle, leaf, leaves
from tests.oracles import (
    Params,
    Settings,
    assert_derivative,
    assert_params,
    directional,
    directions,
    grid,
    inner,
    plain_gradient,
    smooth_noise,
    torch_run,
)
from tests.test_numerics import anomaly_detection

pytestmark = pytest.mark.usefixtures("float64")
STEPS = 5
SHAPES = {"wide": (3, 5), "tall": (6, 2), "cube": (2, 3, 4), "vector": (5,), "scalar": ()}
MATRICES = ("wide", "tall")


def start(names: tuple[str, ...] = tuple(SHAPES), dtype: torch.dtype = torch.float64) -> Params:
    return {
        name: smooth_noise(*SHAPES[name], phase=float(i)).to(dtype) for i, name in enumerate(names)
    }


def loss(params: Params, t: int) -> Tensor:
    shift = torch.stack([p.sum() for p in params.values()]).sum().sin() / 10
    growing = 1 + 0.5 * t  # a gradient larger than those before it is what Adafactor clips
    return (
        growing
        * torch.stack(
            [((p + shift + 0.1 * t).sin() + 0.3 * p**2).sum() for p in params.values()]
        ).sum()
    )


def outer(params: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(
        [((i + 1.0) * p.double()).cos().sum() for i, p in enumerate(params.values())]
    ).sum()


def gradient(params: Params, t: int) -> Params:
    return plain_gradient(loss, params, t)


def train(
    optimizer: innerloop.optim.Optimizer,
    params: Params,
    hyper: Mapping[str, Any] | None = None,
    take: Callable[[Params, int], Any] | None = None,
    *,
    state: Any = None,
    first: int = 0,
    last: int = STEPS,
) -> Params:
    state = optimizer.init(params) if state is None else state
    for t in range(first, last):
        params, state = optimizer.update(
            (take or torch.func.grad(loss))(params, t), state, params, hyper
        )
    return params


def meta_gradient(
    make: Callable[..., Any], settings: Settings, params: Params, values: Mapping[str, Any]
) -> Any:
    """In the initial parameters and in hyper-parameters, which may be tuples."""
    at, tensors = leaves(params), {n: as_leaves(v) for n, v in values.items()}
    flat = [
        *at.values(),
        *(x for v in tensors.values() for x in (v if isinstance(v, tuple) else (v,))),
    ]
    found = iter(torch.autograd.grad(outer(train(make(**settings), at, tensors)), flat))
    by_param = {name: next(found) for name in at}
    return by_param, {
        n: tuple(next(found) for _ in v) if isinstance(v, tuple) else next(found)
        for n, v in values.items()
    }


def as_leaves(value: Any) -> Any:
    return tuple(map(leaf, value)) if isinstance(value, tuple) else leaf(value)


# -- Adafactor -------------------------------------------------------------------------------------

ADAFACTOR = [
    *grid(lr=[0.05], weight_decay=[0.0, 0.1], maximize=[False, True]),
    {"lr": 0.3, "d": 1.02, "eps": (1e-3, 0.01), "beta2_decay": -0.5, "weight_decay": 0.1},
]


@pytest.mark.parametrize("settings", ADAFACTOR, ids=str)
@pytest.mark.parametrize("foreach", [False, True])
def test_adafactor_has_the_forward_of_torch(settings: dict[str, Any], foreach: bool):
    truth = torch_run(
        torch.optim.Adafactor, {**settings, "foreach": foreach}, start(), gradient, 10
    )
    assert_params(train(innerloop.optim.adafactor(**settings), start(), last=10), truth, 1e-12)


@pytest.mark.parametrize("settings", ADAFACTOR, ids=str)
def test_adafactor_meta_gradients_equal_finite_differences_of_torch(settings: dict[str, Any]):
    values = {
        "lr": settings["lr"],
        "beta2_decay": settings.get("beta2_decay", -0.8),
        "weight_decay": settings["weight_decay"],
    }
    values |= {"d": settings["d"]} if "d" in settings else {}
    ours = meta_gradient(innerloop.optim.adafactor, settings, start(), values)

    def of_torch(at: Any) -> float:
        return float(
            outer(torch_run(torch.optim.Adafactor, {**settings, **at[1]}, at[0], gradient, STEPS))
        )

    for name in values:
        only = {n: float(n == name) for n in values}
        still = {n: torch.zeros_like(p) for n, p in start().items()}
        truth = directional(of_torch, (start(), values), (still, only))
        assert abs(truth) > 1e-4
        assert_derivative(float(ours[1][name]), truth, f"d outer / d {name}")
    for along in directions(start(), 2):
        direction = (along, gentle(values))
        assert_derivative(
            inner(ours, direction),
            directional(of_torch, (start(), values), direction),
            "all at once",
        )


def test_adafactor_feels_its_eps_where_they_act():
    """ε₁ and ε₂ larger than what they bound."""
    settings: dict[str, Any] = {"lr": 0.05, "eps": (2.0, 3.0)}
    ours = meta_gradient(innerloop.optim.adafactor, settings, start(), {"eps": settings["eps"]})[1][
        "eps"
    ]
    for i in (0, 1):

        def moved(h: float, i: int = i) -> float:
            eps = tuple(e + h * (i == k) for k, e in enumerate(settings["eps"]))
            return float(
                outer(
                    torch_run(
                        torch.optim.Adafactor, {"lr": 0.05, "eps": eps}, start(), gradient, STEPS
                    )
                )
            )

        assert_derivative(float(ours[i]), directional(moved, 0.0, 1.0), f"d outer / d eps[{i}]")


def test_adafactor_divides_a_small_gradient_by_eps():
    """A mean square below ε₁² counts as ε₁²: 0.05 / 0.1 and 0.2 / 0.2 are the updates here."""
    rule = innerloop.optim.adafactor(lr=0.01, eps=(0.1, 1e-3))
    params = {"w": torch.tensor([1.0, 1.0])}
    new, _ = rule.update({"w": torch.tensor([0.05, -0.2])}, rule.init(params), params)
    truth = torch.tensor([1 - 0.01 * 0.5, 1 + 0.01])
    torch.testing.assert_close(new["w"], truth, rtol=1e-12, atol=0)


def test_adafactor_is_finite_where_rows_have_no_gradient():
    params = leaves(start())

    def dead(params: Params, t: int) -> Params:
        grads = torch.func.grad(loss)(params, t)
        return {n: torch.cat([0 * g[:1], g[1:]]) if g.ndim else 0 * g for n, g in grads.items()}

    lr = leaf(0.05)
    with anomaly_detection():
        final = train(innerloop.optim.adafactor(), params, {"lr": lr}, dead)
        found = torch.autograd.grad(outer(final), [*params.values(), lr], create_graph=True)
        again = torch.autograd.grad(
            torch.stack([(g**2).sum() for g in found]).sum(), [*params.values(), lr]
        )
    assert all(g.isfinite().all() for g in (*found, *again))


# -- Muon ------------------------------------------------------------------------------------------

MUON = [
    *grid(lr=[0.05], nesterov=[False, True], adjust_lr_fn=[None, "original", "match_rms_adamw"]),
    {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.5, "ns_steps": 3, "eps": 0.5},
    {"lr": 0.1, "ns_coefficients": (1.5, -0.5, 0.1), "momentum": 0.3},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("settings", MUON, ids=str)
def test_muon_has_every_bit_of_torch(settings: dict[str, Any], dtype: torch.dtype):
    at = {**start(MATRICES, dtype), "large": smooth_noise(60, 130).to(dtype)}
    truth = torch_run(torch.optim.Muon, settings, at, gradient, 10)
    assert_params(train(innerloop.optim.muon(**settings), at, None, gradient, last=10), truth, 0)


def plain_muon(
    params: Params, steps: int, take: Any, settings: Settings, dtype: torch.dtype = torch.float64
) -> Params:
    """Muon in one precision, from its published equations."""
    s: dict[str, Any] = {
        "weight_decay": 0.1,
        "momentum": 0.95,
        "nesterov": True,
        "eps": 1e-7,
        "ns_steps": 5,
        "adjust_lr_fn": None,
    }
    s |= {"ns_coefficients": (3.4445, -4.7750, 2.0315), **settings}
    a, b, c = s["ns_coefficients"]
    now, buffers = dict(params), {n: torch.zeros_like(p) for n, p in params.items()}
    for t in range(steps):
        for name, g in take(now, t).items():
            buffers[name] = s["momentum"] * buffers[name] + (1 - s["momentum"]) * g
            x = (
                s["momentum"] * buffers[name] + (1 - s["momentum"]) * g
                if s["nesterov"]
                else buffers[name]
            )
            rows, columns = x.shape
            x = x / max(float((x**2).sum() ** 0.5), s["eps"])
            for _ in range(s["ns_steps"]):
                gram = x @ x.T if rows <= columns else x.T @ x
                poly = b * gram + c * gram @ gram
                x = a * x + (poly @ x if rows <= columns else x @ poly)
            ratio = (
                0.2 * max(rows, columns) ** 0.5
                if s["adjust_lr_fn"] == "match_rms_adamw"
                else max(1, rows / columns) ** 0.5
            )
            now[name] = now[name] - s["lr"] * s["weight_decay"] * now[name] - s["lr"] * ratio * x
    return now


@pytest.mark.parametrize("settings", MUON, ids=str)
def test_muon_meta_gradients_equal_finite_differences_of_the_float64_iteration(
    settings: dict[str, Any],
):
    values: dict[str, Any] = {
        "lr": settings["lr"],
        "weight_decay": settings.get("weight_decay", 0.1),
    }
    values |= {"momentum": settings.get("momentum", 0.95)}
    values |= {"ns_coefficients": settings.get("ns_coefficients", (3.4445, -4.7750, 2.0315))}
    values |= {"eps": settings["eps"]} if "eps" in settings else {}
    full = {**settings, "ns_dtype": torch.float64}
    at = start(MATRICES)
    assert_params(
        train(innerloop.optim.muon(**full), at), plain_muon(at, STEPS, gradient, settings), 1e-12
    )
    ours = meta_gradient(innerloop.optim.muon, full, at, values)
    of_plain = lambda x: float(outer(plain_muon(x[0], STEPS, gradient, {**settings, **x[1]})))  # noqa: E731
    still = {n: torch.zeros_like(p) for n, p in at.items()}
    nowhere: dict[str, Any] = {
        n: (0.0, 0.0, 0.0) if isinstance(v, tuple) else 0.0 for n, v in values.items()
    }
    moves = [nowhere | {n: 1.0} for n in values if n != "ns_coefficients"]
    moves += [
        nowhere | {"ns_coefficients": tuple(float(i == k) for k in range(3))} for i in range(3)
    ]
    for move in moves:
        truth = directional(of_plain, (at, values), (still, move))
        assert_derivative(inner(ours, (still, move)), truth, f"d outer / d {move}", absolute=1e-7)
    for along in directions(at, 2):
        assert_derivative(
            inner(ours, (along, nowhere)),
            directional(of_plain, (at, values), (along, nowhere)),
            "init",
        )


def test_muon_in_bfloat16_has_the_derivative_of_the_iteration_in_the_parameters_dtype():
    """One step from given gradients: the derivative sees the same numbers in both, the value
    differs by bfloat16's rounding."""
    at, g = start(("wide",)), smooth_noise(3, 5, phase=9.0)

    def one_step(g: Tensor, **settings: Any) -> Tensor:
        return train(
            innerloop.optim.muon(lr=0.1, **settings),
            at,
            None,
            lambda params, t: {"wide": g},
            last=1,
        )["wide"]

    weights = smooth_noise(3, 5, phase=4.0)
    low, high = (
        torch.func.grad(lambda g, s=s: (one_step(g, **s) * weights).sum())(g)
        for s in ({}, {"ns_dtype": torch.float64})
    )
    torch.testing.assert_close(low, high, rtol=1e-13, atol=1e-15)
    assert high.abs().max() > 1e-3
    apart = (one_step(g) - one_step(g, ns_dtype=torch.float64)).abs().max()
    assert 0 < apart < 0.05


def test_muon_refuses_what_is_no_matrix():
    for params in (
        {"bias": torch.ones(3)},
        {"conv": torch.ones(2, 2, 2)},
        {"z": torch.ones(2, 2, dtype=torch.complex128)},
    ):
        with pytest.raises(innerloop.InnerLoopError, match=rf"(?s){next(iter(params))}.*groups"):
            innerloop.optim.muon().init(params)
    for wrong in ({"ns_steps": 100}, {"adjust_lr_fn": "other"}, {"lr": -1.0}, {"momentum": -0.1}):
        with pytest.raises(innerloop.InnerLoopError, match=next(iter(wrong))):
            innerloop.optim.muon(**wrong)


# -- SparseAdam ------------------------------------------------------------------------------------


def lookup(t: int) -> Tensor:
    return torch.tensor([[0, 2, 0], [3, 3, 1], [], [2, 4, 1], [0, 1, 2]][t % 5], dtype=torch.long)


def sparse_loss(weight: Tensor, t: int) -> Tensor:
    rows = torch.nn.functional.embedding(lookup(t), weight, sparse=True)
    return ((rows + 0.1 * t).sin() * torch.arange(1.0, 4.0) + 0.2 * rows**2).sum()


def sparse_gradient(params: Params, t: int, create_graph: bool = False) -> Params:
    weight = params["w"] if create_graph else params["w"].detach().requires_grad_()
    with torch.enable_grad():
        return {
            "w": torch.autograd.grad(sparse_loss(weight, t), weight, create_graph=create_graph)[0]
        }


SPARSE = [{"lr": 0.05, "eps": 1e-2}, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1, "maximize": True}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("settings", SPARSE, ids=str)
def test_sparse_adam_has_every_bit_of_torch(settings: dict[str, Any], dtype: torch.dtype):
    at = {"w": smooth_noise(6, 3).to(dtype)}
    truth = torch_run(torch.optim.SparseAdam, settings, at, sparse_gradient, 10)
    ours = train(innerloop.optim.sparse_adam(**settings), at, None, sparse_gradient, last=10)
    assert_params(ours, truth, 0)
    assert torch.equal(ours["w"][5], at["w"][5])


@pytest.mark.parametrize("settings", SPARSE, ids=str)
def test_sparse_adam_meta_gradients_equal_finite_differences_of_torch(settings: dict[str, Any]):
    at = {"w": 0.5 * smooth_noise(6, 3)}
    values = {"lr": settings["lr"], "betas": settings.get("betas", (0.9, 0.999))}
    values |= {"eps": settings["eps"]} if "eps" in settings else {}
    params, hyper = leaves(at), {n: as_leaves(v) for n, v in values.items()}
    final = train(
        innerloop.optim.sparse_adam(**settings),
        params,
        hyper,
        lambda p, t: sparse_gradient(p, t, create_graph=True),
    )
    flat = [params["w"], hyper["lr"], *hyper["betas"], *([hyper["eps"]] if "eps" in hyper else [])]
    found = [g.to_dense() for g in torch.autograd.grad(outer(final), flat)]

    def of_torch(x: list[Any]) -> float:
        named = {"lr": x[1], "betas": (x[2], x[3]), **({"eps": x[4]} if "eps" in values else {})}
        return float(
            outer(
                torch_run(
                    torch.optim.SparseAdam,
                    {**settings, **named},
                    {"w": x[0]},
                    sparse_gradient,
                    STEPS,
                )
            )
        )

    point = [at["w"], values["lr"], *values["betas"], *([values["eps"]] if "eps" in values else [])]
    for i in range(len(point)):
        move = [torch.zeros_like(at["w"]), *[0.0] * (len(point) - 1)]
        move[i] = directions(at, 1)[0]["w"] if i == 0 else 1.0
        truth = directional(of_torch, point, move)
        assert_derivative(inner(found, move), truth, f"direction {i}")


def test_sparse_adam_refuses_a_dense_gradient():
    params = {"w": torch.ones(2, 2)}
    optimizer = innerloop.optim.sparse_adam()
    with pytest.raises(innerloop.InnerLoopError, match=r"dense gradient.*adam"):
        optimizer.update(params, optimizer.init(params), params)


def test_sparse_adam_cannot_be_compiled_and_says_so():
    problem = innerloop.Problem(
        lambda params, hyper, t: sparse_loss(params["w"], 0), innerloop.optim.sparse_adam()
    )
    with pytest.raises(
        innerloop.InnerLoopError,
        match=r"sparse_adam.* cannot be compiled.*sparse tensors.*compile=False",
    ):
        innerloop.metagradient(
            lambda traj, hyper: outer(traj.params),
            problem,
            {"w": smooth_noise(6, 3)},
            None,
            steps=1,
            compile=True,
        )


# -- all of them -----------------------------------------------------------------------------------

EACH: dict[str, tuple[Any, dict[str, Any], Params, Any]] = {
    "adafactor": (torch.optim.Adafactor, {"lr": 0.05, "weight_decay": 0.1}, start(), gradient),
    "muon": (torch.optim.Muon, {"lr": 0.05}, start(MATRICES), gradient),
    "sparse_adam": (
        torch.optim.SparseAdam,
        {"lr": 0.05},
        {"w": smooth_noise(6, 3)},
        sparse_gradient,
    ),
    "nadam": (torch.optim.NAdam, {"lr": 0.05, "momentum_decay": 0.1}, start(), gradient),
    "asgd": (torch.optim.ASGD, {"lr": 0.002, "lambd": 0.5, "t0": 1.0}, start(), gradient),
}


@pytest.mark.parametrize("name", EACH)
def test_a_warm_torch_optimizer_is_continued_and_written_back(name: str):
    cls, settings, at, take = EACH[name]
    tensors = {n: p.clone().requires_grad_() for n, p in at.items()}
    optimizer = cls(list(tensors.values()), **settings)
    beside = {n: p.clone().requires_grad_() for n, p in at.items()}
    truth = cls(list(beside.values()), **settings)

    def torch_step(optimizer: torch.optim.Optimizer, tensors: Params, t: int) -> None:
        grads = take({n: p.detach() for n, p in tensors.items()}, t)
        for n, p in tensors.items():
            p.grad = grads[n]
        optimizer.step()

    for t in range(3):
        torch_step(optimizer, tensors, t)
    for t in range(10):
        torch_step(truth, beside, t)
    ours = innerloop.optim.from_torch(optimizer, tensors)
    params = {n: p.detach() for n, p in tensors.items()}
    state = ours.init(params)
    for t in range(3, 6):
        params, state = ours.update(take(params, t), state, params)
    ours.write_back(state)
    for n, p in tensors.items():
        p.data.copy_(params[n])
    for t in range(6, 10):
        torch_step(optimizer, tensors, t)
    assert_params(
        {n: p.detach() for n, p in tensors.items()},
        {n: p.detach() for n, p in beside.items()},
        1e-13,
    )
    for p, q in zip(tensors.values(), beside.values(), strict=True):
        left, right = optimizer.state[p], truth.state[q]
        assert {k for k, v in left.items() if v is not None} == set(right)
        for key, value in right.items():
            torch.testing.assert_close(
                torch.as_tensor(left[key]), torch.as_tensor(value), rtol=1e-12, atol=1e-13
            )


@pytest.mark.parametrize("name", ["nadam", "asgd"])
def test_numbers_that_torch_keeps_in_single_precision(name: str):
    """Under the usual default dtype torch rounds ``mu_product`` and ``eta`` to float32; ours are
    Python floats."""
    cls, settings, at, take = EACH[name]
    torch.set_default_dtype(torch.float32)
    truth = torch_run(cls, settings, at, take, 10)
    assert_params(train(getattr(innerloop.optim, name)(**settings), at, last=10), truth, 1e-8)


def test_asgd_feels_t0_in_the_average_alone():
    """ax₄ of three averaged steps from given gradients, with μ = 1 / max(1, t - t₀); torch keeps
    the average in its state."""
    g = {"p": smooth_noise(3)}

    def average_of_torch(t0: float) -> float:
        p = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.ASGD([p], lr=0.1, lambd=0.2, t0=t0)
        for t in range(5):
            p.grad = g["p"] * (t + 1)
            optimizer.step()
        return float(optimizer.state[p]["ax"].sin().sum())

    t0, optimizer = leaf(1.3), innerloop.optim.asgd(lr=0.1, lambd=0.2)
    params: Params = {"p": torch.zeros(3)}
    state = optimizer.init(params)
    for t in range(5):
        params, state = optimizer.update({"p": g["p"] * (t + 1)}, state, params, {"t0": t0})
    average = state.ax["p"].sin().sum()
    assert float(average.detach()) == pytest.approx(average_of_torch(1.3), rel=1e-13)
    truth = directional(average_of_torch, 1.3, 1.0)
    assert abs(truth) > 1e-3
    assert_derivative(float(torch.autograd.grad(average, t0)[0]), truth, "d average / d t0")


@pytest.mark.parametrize("name", EACH)
def test_a_tensor_rate_and_a_scheduler_reach_the_rule(name: str):
    cls, settings, at, take = EACH[name]
    rate = leaf(settings["lr"])
    tensors = {n: p.clone().requires_grad_() for n, p in at.items()}
    alone = {"foreach": False} if name in ("nadam", "asgd") else {}
    ours = innerloop.optim.from_torch(
        cls(list(tensors.values()), **{**settings, **alone, "lr": rate}), tensors
    )
    final = train(ours, at, None, take)
    assert_params(final, torch_run(cls, settings, at, take, STEPS), 1e-12)
    assert torch.autograd.grad(outer(final), rate)[0].abs() > 1e-3
    optimizer = cls(list(tensors.values()), **settings)
    scheduled = innerloop.optim.from_torch(optimizer, tensors)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.param_groups[0]["lr"] = settings["lr"] * 2
    scheduled.refresh()
    twice = {**settings, "lr": settings["lr"] * 2}
    truth = torch_run(cls, twice, at, take, 2)
    assert_params(train(scheduled, at, None, take, last=2), truth, 1e-12)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_vmap_and_jvp(name: str):
    _, settings, at, _ = EACH[name]
    exact = {"ns_dtype": torch.float64} if name == "muon" else {}
    optimizer = getattr(innerloop.optim, name)(**settings, **exact)
    value = lambda params, lr: outer(train(optimizer, params, {"lr": lr}))  # noqa: E731
    rates = torch.tensor([0.02, 0.05])
    both = torch.func.vmap(torch.func.grad(value, argnums=(0, 1)), in_dims=(None, 0))(at, rates)
    along = directions(at, 1)[0]
    for i, lr in enumerate(rates):
        one = torch.func.grad(value, argnums=(0, 1))(at, lr)
        assert_params({n: g[i] for n, g in both[0].items()}, one[0], 1e-12)
        slope = torch.func.jvp(value, (at, lr), (along, torch.tensor(0.1)))[1]
        assert_derivative(
            inner(one, (along, torch.tensor(0.1))), float(slope), "jvp", relative=1e-11
        )


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_rate_per_element_and_a_skipped_parameter(name: str):
    _, settings, at, take = EACH[name]
    optimizer = getattr(innerloop.optim, name)(**settings)
    skip = lambda params, t: {  # noqa: E731
        n: None if n == "wide" and t == 1 else g for n, g in take(params, t).items()
    }
    truth = torch_run(EACH[name][0], settings, at, skip, STEPS)
    rates = {n: torch.full_like(p, settings["lr"]).requires_grad_() for n, p in at.items()}
    ours = train(optimizer, at, {"lr": rates}, skip)
    assert_params(ours, truth, 1e-12)
    found = torch.autograd.grad(outer(ours), list(rates.values()))
    assert all(g.isfinite().all() and g.abs().min() > 0 for g in found)


def check_compiled(name: str, settings: dict[str, Any], backend: str, tolerance: float) -> None:
    """The whole meta-gradient, inner gradients and all, is one graph."""
    exact = {"ns_dtype": torch.float64} if name == "muon" else {}
    optimizer = getattr(innerloop.optim, name)(**settings, **exact)
    at = {n: EACH[name][2][n] for n in list(EACH[name][2])[:2]}
    value = lambda params, lr: outer(train(optimizer, params, {"lr": lr}, last=2))  # noqa: E731
    meta = lambda params, lr: torch.func.grad(value, argnums=(0, 1))(params, lr)  # noqa: E731
    torch.compiler.reset()
    ours = torch.compile(meta, fullgraph=True, backend=backend)(at, torch.tensor(0.05))
    eager = meta(at, torch.tensor(0.05))
    assert_params(ours[0], eager[0], tolerance)
    torch.testing.assert_close(ours[1], eager[1], rtol=tolerance, atol=tolerance)


@pytest.mark.compiled
@pytest.mark.traced
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_compiled_meta_gradient_is_the_eager_one(name: str):
    check_compiled(name, EACH[name][1], "aot_eager", 1e-12)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.traced
@pytest.mark.parametrize(
    ("name", "settings"),
    [*(("adafactor", s) for s in ADAFACTOR), *(("muon", s) for s in MUON)],
    ids=str,
)
def test_compiled_meta_gradient_is_the_eager_one_in_every_setting(
    name: str, settings: dict[str, Any]
):
    check_compiled(name, settings, "aot_eager", 1e-12)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # inside inductor
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_meta_gradient_compiled_by_inductor_is_the_eager_one(name: str):
    check_compiled(name, EACH[name][1], "inductor", 1e-10)


@pytest.mark.parametrize(
    ("theirs", "settings", "scale", "tolerance"),
    [
        pytest.param(torch.optim.Muon, {"lr": 0.1}, 1.0, 0.0, id="muon"),
        pytest.param(
            torch.optim.Adafactor, {"lr": 0.01}, 300.0, 0.1, id="adafactor"
        ),  # 300² is infinite in float16; an ulp is up to .5
    ],
)
def test_float16_matrices(theirs: Any, settings: dict[str, Any], scale: float, tolerance: float):
    p = torch.nn.Parameter((scale * torch.randn(20, 30)).half())
    optimizer = theirs([p], **settings)
    rule = optim.from_torch(optimizer, {"p": p})
    params = {"p": p.detach().clone()}
    state = rule.init(params)
    for _ in range(4):
        p.grad = torch.randn(20, 30).half()
        optimizer.step()
        params, state = rule.update({"p": p.grad}, state, params)
    torch.testing.assert_close(params["p"], p.detach(), rtol=tolerance / 100, atol=tolerance)
