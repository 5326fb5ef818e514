"""The contract of every gradient transform in ``transforms.TRANSFORMS``: a chain is what plain
PyTorch does before ``optimizer.step``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import innerloop
from innerloop.optim import chain
from innerloop.optim._transforms.clip import norm
from innerloop.optim._transforms.noise import standard_normal
from tests.optimizers import leaf, leaves, train
from tests.oracles import (
    Params,
    Task,
    assert_derivative,
    assert_params,
    directional,
    directions,
    inner,
    smooth_noise,
    torch_run,
)
from tests.strategies import each_exact_strategy
from tests.transforms import (
    RULES,
    TRANSFORMS,
    Enrolled,
    addressed,
    chained,
    each_rule,
    each_transform,
    few_always,
    plain_run,
)

STEPS = 7


def skipping(params: Params, t: int) -> dict[str, Tensor | None]:
    """Gradients of which some are missing, and once all."""
    grads: dict[str, Tensor | None] = dict(Task().gradient(params, t))
    if t in (0, 1, 4):
        grads["weight"] = None
    if t in (1, 2):
        grads["scale"] = grads["cube"] = None
    return grads


# -- forward ---------------------------------------------------------------------------------------


@each_rule
@each_transform
def test_forward_equals_plain_pytorch(case: Enrolled, rule: str):
    task = Task(large=True)
    truth = plain_run(case, rule, case.numbers, task.params(), task.gradient, 10)
    assert_params(train(chained(case, rule), task, task.params(), steps=10), truth, 1e-12)
    without = torch_run(*RULES[rule][1:], task.params(), task.gradient, 10)
    assert any(not torch.allclose(truth[n], without[n], rtol=1e-3) for n in truth), (
        "the transform must matter here"
    )


@each_rule
@each_transform
def test_a_parameter_without_gradient_is_skipped(case: Enrolled, rule: str):
    params = Task().params()
    truth = plain_run(case, rule, case.numbers, params, skipping, 10)
    assert_params(
        train(chained(case, rule), Task(), params, steps=10, gradient=skipping), truth, 1e-12
    )


@each_transform
def test_no_gradient_at_all_changes_nothing(case: Enrolled):
    params = Task().params()
    opt = chained(case, "sgd")
    state = opt.init(params)
    new, after = opt.update(dict.fromkeys(params), state, params)
    assert_params(new, params, 0)
    assert after.rule.count == state.rule.count == 0
    assert_params(dict(after.rule.momentum_buffer), dict(state.rule.momentum_buffer), 0)
    assert repr(after.transforms) == repr(state.transforms)


@each_transform
def test_tensors_as_hyper_parameters_do_not_move_the_forward_pass(case: Enrolled):
    task = Task()
    values = {key: leaf(value) for key, value in case.numbers.items()}
    truth = plain_run(case, "sgd", case.numbers, task.params(), task.gradient, 10)
    assert_params(
        train(chained(case, "sgd"), task, task.params(), addressed(case, values), steps=10),
        truth,
        1e-12,
    )
    given = chain(case.make(**values), RULES["sgd"][0])
    assert_params(train(given, task, task.params(), steps=10), truth, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_transform
def test_dtype_is_kept_and_values_are_those_of_torch_up_to_rounding(
    case: Enrolled, dtype: torch.dtype
):
    task = Task()
    params = task.params(dtype)
    grads = {
        n: smooth_noise(*p.shape, phase=float(i)).to(dtype)
        for i, (n, p) in enumerate(params.items())
    }
    values = {key: torch.tensor(value, dtype=torch.float64) for key, value in case.numbers.items()}
    transform = case.make(**case.numbers)
    truth = case.plain(**case.numbers)(grads, params, 0)
    for hyper in (case.numbers, values):
        found, _ = transform.apply(grads, transform.init(params), params, transform.resolve(hyper))
        for name, g in found.items():
            expected = truth[name]
            if expected is None:
                assert g is None
            else:
                assert g is not None
                assert g.dtype == dtype
                torch.testing.assert_close(
                    g, expected, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
                )


@each_transform
def test_inputs_are_not_changed(case: Enrolled):
    params = Task().params()
    grads = Task().gradient(params, 0)
    before = pytree.tree_map(torch.clone, (params, grads))
    opt = chained(case, "adam")
    state = opt.init(params)
    kept = [x.clone() if isinstance(x, Tensor) else x for x in pytree.tree_leaves(state)]
    opt.update(grads, state, params)
    for x, y in zip(pytree.tree_leaves((params, grads)), pytree.tree_leaves(before), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(pytree.tree_leaves(state), kept, strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


# -- derivatives -----------------------------------------------------------------------------------


@pytest.mark.covering
@each_rule
@each_transform
def test_derivatives_equal_finite_differences_of_plain_pytorch(case: Enrolled, rule: str):
    """In the initial parameters and in each number of the transform."""
    task = Task()
    params, values = (
        leaves(task.params()),
        {key: leaf(value) for key, value in case.numbers.items()},
    )
    final = train(chained(case, rule), task, params, addressed(case, values), steps=STEPS)
    found = torch.autograd.grad(task.outer(final), [*params.values(), *values.values()])

    def outer(params: Params, values: dict[str, Any]) -> float:
        return float(task.outer(plain_run(case, rule, values, params, task.gradient, STEPS)))

    along = directions(task.params(), 1)[0]
    slope = directional(lambda p: outer(p, case.numbers), task.params(), along)
    assert abs(slope) > 1e-4
    assert_derivative(
        inner(dict(zip(params, found, strict=False)), along), slope, "d outer / d init"
    )
    for key, ours in zip(values, found[len(params) :], strict=True):
        move = {other: float(other == key) for other in case.numbers}
        slope = directional(lambda at: outer(task.params(), at), case.numbers, move)
        assert abs(slope) > 1e-4
        assert_derivative(float(ours), slope, f"d outer / d {key}")


@each_rule
@each_transform
def test_derivatives_are_finite_where_gradients_are_zero(case: Enrolled, rule: str):
    """Entries that are zero, a whole tensor, and every one of them; first and second
    derivatives."""

    def gradient(params: Params, t: int) -> Params:
        grads = torch.func.grad(Task(dead=True).loss)(params, t)
        zero = {"cube"} if t < 3 else set(grads) if t == 3 else set()
        return {n: 0.0 * g if n in zero else g for n, g in grads.items()}

    task = Task(dead=True)

    def outer(params: Params, values: Params) -> Tensor:
        optimizer = chained(case, rule)
        return task.outer(
            train(optimizer, task, params, addressed(case, values), steps=6, gradient=gradient)
        )

    values = {key: leaf(value) for key, value in case.numbers.items()}
    first = torch.func.grad(outer, argnums=(0, 1))
    assert all(g.isfinite().all() for g in pytree.tree_leaves(first(task.params(), values)))

    def length(params: Params, values: Params) -> Tensor:
        return sum(
            (g.square().sum() for g in pytree.tree_leaves(first(params, values))), torch.zeros(())
        )

    second = torch.func.grad(length, argnums=(0, 1))(task.params(), values)
    assert all(g.isfinite().all() for g in pytree.tree_leaves(second))


@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.0, 3.0, float("inf")])
def test_the_norm_is_torchs_and_its_derivative_at_zero_is_zero(p: float):
    x = smooth_noise(4, 3).requires_grad_()
    y = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    truth = torch.linalg.vector_norm(torch.cat([x.detach().reshape(-1), y.detach()]), p)
    torch.testing.assert_close(norm([x, y], p), truth, rtol=1e-14, atol=0.0)
    first = torch.autograd.grad(norm([0 * x, 0 * y], p), (x, y))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in first)
    assert all(g.isfinite().all() for g in torch.autograd.grad(norm([x, y], p), (x, y)))


def test_second_derivative_of_the_norm_at_a_zero_tensor_beside_others():
    """|(x, y)| is smooth at y = 0 if x is not 0; its second derivative there is 1/|x|. From a norm
    of norms it would be lost."""
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    second = torch.func.hessian(lambda y: norm([x, y]))(torch.zeros(1, dtype=torch.float64))
    assert second.item() == pytest.approx(1 / 5, rel=1e-12)


# -- torch.func, strategies, compilation -----------------------------------------------------------


@each_transform
def test_vmap_over_tasks_and_hyper_parameters(case: Enrolled):
    task = Task()
    starts = [
        {n: p + 0.1 * smooth_noise(*p.shape, phase=float(i)) for n, p in task.params().items()}
        for i in range(2)
    ]
    several = [
        {key: value * (1 + 0.1 * i) for key, value in case.numbers.items()} for i in range(2)
    ]
    optimizer = chained(case, "adam")
    final = torch.func.vmap(lambda p, v: train(optimizer, task, p, addressed(case, v), steps=STEPS))
    both = (
        final(stack(starts), stack(several))
        if several[0]
        else final_without(optimizer, stack(starts))
    )
    for i in range(2):
        truth = plain_run(case, "adam", several[i], starts[i], task.gradient, STEPS)
        assert_params({n: x[i] for n, x in both.items()}, truth, 1e-12)


def stack(rows: list[Any]) -> Params:
    return {
        n: torch.stack([torch.as_tensor(row[n], dtype=torch.float64) for row in rows])
        for n in rows[0]
    }


def final_without(optimizer: innerloop.optim.Optimizer, starts: Params) -> Params:
    return torch.func.vmap(lambda p: train(optimizer, Task(), p, steps=STEPS))(starts)


@each_transform
def test_forward_mode_equals_reverse_mode(case: Enrolled):
    task, optimizer = Task(), chained(case, "adam")
    values = {key: torch.tensor(value, dtype=torch.float64) for key, value in case.numbers.items()}

    def outer(params: Params, values: Params) -> Tensor:
        return task.outer(train(optimizer, task, params, addressed(case, values), steps=STEPS))

    direction = (
        directions(task.params(), 1)[0],
        {key: torch.tensor(0.3).double() for key in values},
    )
    at = (task.params(), values)
    slope = torch.func.jvp(outer, at, direction)[1]
    assert_derivative(
        inner(torch.func.grad(outer, argnums=(0, 1))(*at), direction),
        float(slope),
        "vjp",
        relative=1e-11,
    )


@pytest.mark.covering
@each_exact_strategy()
@few_always
def test_every_exact_strategy_gives_what_store_all_gives(
    case: Enrolled, strategy: innerloop.strategy.Strategy
):
    """The update is replayed: noise must come again, counts go on. Truth for StoreAll is in the
    finite differences above."""
    task = Task()
    values = {key: torch.tensor(value, dtype=torch.float64) for key, value in case.numbers.items()}
    hyper = {"lr": torch.tensor(0.05, dtype=torch.float64), **addressed(case, values)}
    problem = innerloop.Problem(
        lambda params, hyper, t: task.loss(params, int(t)),
        chained(case, "adam"),
        optimizer_hyper=lambda hyper, t: hyper,
    )
    batches = [torch.tensor(t) for t in range(STEPS)]
    wrt = tuple(sorted(strategy.differentiates))

    def gradient(strategy: innerloop.strategy.Strategy) -> Any:
        return innerloop.metagradient(
            lambda traj, hyper: task.outer(traj.params) + traj.losses.square().sum(),
            problem,
            task.params(),
            batches,
            hyper=hyper,
            wrt=wrt,
            strategy=strategy,
        )

    (value, ours), (expected, truth) = gradient(strategy), gradient(innerloop.StoreAll())
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(truth), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.compiled
@few_always
def test_a_compiled_meta_gradient_is_the_eager_one(case: Enrolled):
    start = {"w": smooth_noise(2, 3), "b": torch.tensor(0.3, dtype=torch.float64)}
    optimizer = chained(case, "sgd")
    values = {key: torch.tensor(value, dtype=torch.float64) for key, value in case.numbers.items()}

    def loss(params: Params, t: int) -> Tensor:
        return (params["w"].sin().sum() * params["b"] + 1.5 * params["w"].sum()).sin()

    def outer(params: Params, values: Params) -> Tensor:
        hyper = addressed(case, values)
        return (
            train(optimizer, Task(), params, hyper, steps=3, gradient=torch.func.grad(loss))["w"]
            ** 2
        ).sum()

    def meta(params: Params, values: Params) -> Any:
        return torch.func.grad(outer, argnums=(0, 1) if values else 0)(params, values)

    torch.compiler.reset()
    compiled = torch.compile(meta, fullgraph=True, backend="aot_eager")
    for factor in (1.0, 0.98):
        at = pytree.tree_map(lambda x, factor=factor: factor * x, (start, values))
        for a, b in zip(
            pytree.tree_leaves(compiled(*at)), pytree.tree_leaves(meta(*at)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# -- chains ----------------------------------------------------------------------------------------


def test_transforms_act_in_the_order_in_which_they_are_written():
    """Decay after clipping is not clipped. Truth: the two lines that a plain loop would have, in
    either order."""
    task = Task()
    clip, decay = innerloop.optim.clip_by_global_norm(0.3), innerloop.optim.add_decayed_weights(0.5)
    rule = innerloop.optim.sgd(lr=0.1)

    def clipped(grads: Params) -> Params:
        total = torch.cat([g.reshape(-1) for g in grads.values()]).norm()
        return {n: g * min(1.0, 0.3 / (total.item() + 1e-6)) for n, g in grads.items()}

    def decayed(grads: Params, params: Params) -> Params:
        return {n: g + 0.5 * params[n] for n, g in grads.items()}

    orders: dict[Any, Any] = {
        (clip, decay): lambda params, t: decayed(clipped(task.gradient(params, t)), params),
        (decay, clip): lambda params, t: clipped(decayed(task.gradient(params, t), params)),
    }
    for order, gradient in orders.items():
        truth = torch_run(torch.optim.SGD, {"lr": 0.1}, task.params(), gradient, 5)
        assert_params(train(chain(*order, rule), task, task.params(), steps=5), truth, 1e-12)


def test_decay_of_chosen_parameters_is_that_of_two_param_groups():
    task = Task()
    params = task.params()
    decays = {n: 0.3 if n in ("weight", "cube") else 0.0 for n in params}
    truth = torch_run(
        torch.optim.Adam, {"lr": 0.05, "weight_decay": decays}, params, task.gradient, 8
    )
    masks: list[Any] = [["weight", "cu*"], lambda name, p: name in ("weight", "cube")]
    for mask in masks:
        decay = innerloop.optim.add_decayed_weights(0.3, mask=mask)
        assert_params(
            train(chain(decay, innerloop.optim.adam(lr=0.05)), task, params, steps=8), truth, 1e-12
        )
    by_name = chain(innerloop.optim.add_decayed_weights(decays), innerloop.optim.adam(lr=0.05))
    assert_params(train(by_name, task, params, steps=8), truth, 1e-12)


def test_a_chain_in_groups_clips_its_own_group():
    task = Task()
    clip = innerloop.optim.clip_by_global_norm(0.02)
    members = {
        "weight": chain(clip, innerloop.optim.sgd(lr=0.1)),
        "*": innerloop.optim.sgd(lr=0.05),
    }

    def gradient(params: Params, t: int) -> Params:
        grads = task.gradient(params, t)
        w = torch.nn.Parameter(params["weight"].clone())
        w.grad = grads["weight"].clone()
        assert torch.nn.utils.clip_grad_norm_([w], 0.02) > 0.02
        assert w.grad is not None
        return {**grads, "weight": w.grad}

    rates = {n: 0.1 if n == "weight" else 0.05 for n in task.params()}
    truth = torch_run(torch.optim.SGD, {"lr": rates}, task.params(), gradient, 5)
    grouped = innerloop.optim.groups(members)
    assert_params(train(grouped, task, task.params(), steps=5), truth, 1e-12)
    limit = leaf(0.02)
    final = train(grouped, task, task.params(), {"clip_by_global_norm.max_norm": limit}, steps=5)
    assert_params(final, truth, 1e-12)
    assert torch.autograd.grad(task.outer(final), limit)[0].abs() > 1e-3
    with pytest.raises(
        innerloop.InnerLoopError, match=r"no group has a hyper-parameter 'clip_by_value.limit'"
    ):
        train(grouped, task, task.params(), {"clip_by_value.limit": limit}, steps=1)


def test_groups_in_a_chain_are_clipped_together():
    task = Task()
    grouped = innerloop.optim.groups(
        {"weight": innerloop.optim.sgd(lr=0.1), "*": innerloop.optim.sgd(lr=0.05)}
    )
    optimizer = chain(innerloop.optim.clip_by_global_norm(0.4), grouped)
    rates = {n: 0.1 if n == "weight" else 0.05 for n in task.params()}
    case = TRANSFORMS[0]
    plain = case.plain(max_norm=0.4)
    gradient = lambda params, t: plain(task.gradient(params, t), params, t)  # noqa: E731
    truth = torch_run(torch.optim.SGD, {"lr": rates}, task.params(), gradient, 5)
    assert_params(train(optimizer, task, task.params(), steps=5), truth, 1e-12)
    hyper = {"lr": [leaf(0.1), leaf(0.05)], "clip_by_global_norm.max_norm": 0.4}
    assert_params(train(optimizer, task, task.params(), hyper, steps=5), truth, 1e-12)


def test_two_transforms_of_a_kind_and_nested_chains():
    o = innerloop.optim
    opt = chain(o.scale(2.0), chain(o.clip_by_value(1.0), o.scale(3.0), o.sgd(lr=1.0)))
    assert repr(opt) == "chain(scale(2.0), clip_by_value(1.0), scale(3.0), sgd(lr=1.0))"
    params = {"w": torch.tensor(0.0)}
    step = lambda hyper: opt.update({"w": torch.tensor(1.0)}, opt.init(params), params, hyper)[0][  # noqa: E731
        "w"
    ].item()
    assert step(None) == -3.0
    assert step({"scale.factor": 0.25}) == -0.75
    assert step({"scale_2.factor": 5.0, "lr": 0.1}) == -0.5


def test_accumulation_is_one_step_with_the_mean_gradient():
    """The state of the rule too: one step of Adam has been counted, not four."""
    task, o = Task(), innerloop.optim
    params = task.params()
    grads = [task.gradient(params, t) for t in range(4)]
    mean = {n: torch.stack([g[n] for g in grads]).mean(0) for n in params}
    opt, plain = chain(o.accumulate(4), o.adam(lr=0.05)), o.adam(lr=0.05)
    state, now = opt.init(params), params
    for i, g in enumerate(grads):
        now, state = opt.update(g, state, now)
        if i < 3:
            assert_params(now, params, 0)
            assert state.rule.count == 0
    expected, after = plain.update(mean, plain.init(params), params)
    assert_params(now, expected, 1e-15)
    assert state.rule.count == after.count == 1
    for name in params:
        torch.testing.assert_close(state.rule.mu[name], after.mu[name], rtol=1e-14, atol=1e-16)


def test_track_takes_a_chain_and_a_callback():
    """Both ways to clip in a loop that the user owns. Truth: plain PyTorch."""
    x, y = smooth_noise(6, 3), smooth_noise(6, 2, phase=1.0)
    first = torch.nn.Linear(3, 2).double()

    def start() -> torch.nn.Linear:
        model = torch.nn.Linear(3, 2).double()
        model.load_state_dict(first.state_dict())
        return model

    plain = start()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        (plain(x) - y).square().sum().backward()
        assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5) > 0.5
        optimizer.step()

    clip = innerloop.optim.clip_by_global_norm(0.5)
    pure = chain(clip, innerloop.optim.sgd(lr=0.5, momentum=0.9))
    for kind in ("chain", "callback"):
        model = start()
        rule = (
            pure if kind == "chain" else torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        )
        callback = (
            None
            if kind == "chain"
            else lambda grads: clip.apply(grads, (), {}, {"max_norm": 0.5})[0]
        )
        with innerloop.track(model, rule) as loop:
            for _ in range(4):
                loop.step((loop.model(x) - y).square().sum(), grad_callback=callback)
        truth = {n: p.detach() for n, p in plain.named_parameters()}
        assert_params({n: p.detach() for n, p in loop.parameters().items()}, truth, 1e-12)


# -- noise -----------------------------------------------------------------------------------------


def test_the_noise_is_normal_and_independent_between_places_steps_and_seeds():
    """Moments of 200,000 numbers within five standard errors."""
    like = torch.zeros(200_000, dtype=torch.float64)
    rows = [
        standard_normal(like, seed, count, 0)
        for seed, count in ((0, 0), (0, 1), (1, 0), (1, 1), (2**40, 7))
    ]
    error = 5 / len(like) ** 0.5
    for z in rows:
        for power, (expected, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
            assert abs((z**power).mean().item() - expected) < error * variance**0.5
        for lag in (1, 2, 3, 64, 1000):
            assert abs((z[lag:] * z[:-lag]).mean().item()) < error
            assert abs(((z[lag:] ** 2 - 1) * (z[:-lag] ** 2 - 1)).mean().item()) < 2 * error
    for i, z in enumerate(rows):
        for other in rows[:i]:
            assert abs((z * other).mean().item()) < error
            assert abs((z[1:] * other[:-1]).mean().item()) < error


def test_the_noise_leaves_the_random_state_alone_and_depends_on_nothing_else():
    params = Task().params()
    opt = chain(innerloop.optim.add_noise(0.1, seed=5), innerloop.optim.sgd(lr=0.1))
    before = torch.get_rng_state()
    first = train(opt, Task(), params, steps=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert_params(train(opt, Task(), params, steps=3), first, 0)
    other = chain(innerloop.optim.add_noise(0.1, seed=6), innerloop.optim.sgd(lr=0.1))
    assert not torch.equal(train(other, Task(), params, steps=3)["weight"], first["weight"])


def test_noise_per_task_under_vmap():
    params = {"w": torch.zeros(4, dtype=torch.float64)}
    opt = chain(innerloop.optim.add_noise(1.0), innerloop.optim.sgd(lr=1.0))

    def step(seed: Any) -> Tensor:
        return opt.update(params, opt.init(params), params, {"add_noise.seed": seed})[0]["w"]

    rows = torch.func.vmap(step)(torch.tensor([3, 4]))
    assert torch.equal(rows[0], step(3))
    assert torch.equal(rows[1], step(4))
    assert not torch.equal(rows[0], rows[1])


def test_noise_of_complex_gradients():
    like = torch.zeros(50_000, dtype=torch.complex128)
    z = standard_normal(like, 0, 0, 0)
    assert z.dtype == torch.complex128
    assert (z.real * z.imag).mean().abs() < 5 / 50_000**0.5
    assert (z.abs() ** 2).mean().item() == pytest.approx(2, rel=0.03)


def test_complex_gradients_are_clipped_as_torch_clips_them():
    p = torch.nn.Parameter(torch.complex(smooth_noise(3), smooth_noise(3, phase=1.0)))
    p.grad = torch.complex(smooth_noise(3, phase=2.0), smooth_noise(3, phase=3.0))
    clip = innerloop.optim.clip_by_global_norm(0.5)
    ours, _ = clip.apply({"p": p.grad.clone()}, (), {"p": p}, {"max_norm": 0.5})
    torch.nn.utils.clip_grad_norm_([p], 0.5)
    torch.testing.assert_close(ours["p"], p.grad, rtol=1e-12, atol=0.0)


# -- bad input -------------------------------------------------------------------------------------


O: Any = innerloop.optim  # untyped: what is passed here is wrong  # noqa: E741
BAD: dict[str, tuple[Any, str]] = {
    "no optimizer": (lambda: chain(O.scale(2.0)), r"chain\(scale\(2.0\)\).*one optimizer last"),
    "nothing": (lambda: chain(), "one optimizer last"),
    "wrong order": (lambda: chain(O.sgd(), O.scale(2.0)), "transforms first"),
    "two optimizers": (lambda: chain(O.sgd(), O.adam()), "transforms first"),
    "a torch optimizer": (
        lambda: O.chain(O.scale(2.0), torch.optim.SGD([torch.zeros(1)])),
        "one optimizer last",
    ),
    "negative norm": (lambda: O.clip_by_global_norm(-1.0), "max_norm=-1.0 is negative"),
    "NaN norm": (lambda: O.clip_per_parameter(float("nan")), r"max_norm=nan.*NaN"),
    "no norm": (lambda: O.clip_by_global_norm(1.0, 0), "norm_type=0.*positive"),
    "a string": (lambda: O.clip_by_value("1"), "limit='1'.*number"),
    "negative limit": (lambda: O.clip_by_value(-0.1), "limit=-0.1"),
    "NaN factor": (lambda: O.scale(float("nan")), "factor=nan"),
    "every 0": (lambda: O.accumulate(0), "every=0.*positive integer"),
    "every 1.5": (lambda: O.accumulate(1.5), "every=1.5"),
    "negative eta": (lambda: O.add_noise(-1.0), "eta=-1.0"),
    "a generator": (
        lambda: O.add_noise(1.0, seed=torch.Generator()),
        r"seed=.*Generator.*replayed",
    ),
    "a seed with a fraction": (lambda: O.add_noise(1.0, seed=0.5), "seed=0.5.*integer"),
    "a mask that is a number": (lambda: O.add_decayed_weights(0.1, mask=3), "mask=3.*pattern"),
    "no callback": (lambda: O.grad_callback(3), r"grad_callback\(3\).*function"),
}


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("what", list(BAD))
def test_bad_arguments(what: str):
    make, message = BAD[what]
    with pytest.raises(innerloop.InnerLoopError, match=message):
        make()


BAD_UPDATE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown": (
        O.scale(2.0),
        {"clip_by_value.limit": 1.0},
        r"no hyper-parameter 'clip_by_value.limit'; it has scale.factor, lr",
    ),
    "unknown of the rule": (
        O.scale(2.0),
        {"rate": 1.0},
        r"no hyper-parameter 'rate'; it has scale.factor, lr",
    ),
    "not real-valued": (O.accumulate(2), {"accumulate.every": 3}, r"accumulate.every.*constructor"),
    "negative": (O.clip_by_value(1.0), {"clip_by_value.limit": -2.0}, "limit=-2.0 is negative"),
    "wrong shape": (
        O.scale(2.0),
        {"scale.factor": torch.ones(3)},
        r"scale.factor.*\(3,\).*by name",
    ),
    "missing name": (O.scale(2.0), {"scale.factor": {"v": 1.0}}, r"no entry for 'w'.*\['v'\]"),
    "shared": (
        O.clip_by_global_norm(1.0),
        {"clip_by_global_norm.max_norm": {"w": 1.0}},
        "all share it",
    ),
    "lost": (O.grad_callback(lambda grads: None), {}, "grad_callback must return.*NoneType"),
    "invented": (
        O.grad_callback(lambda grads: {"v": grads["w"]}),
        {},
        r"\['v'\].*expected \['w'\]",
    ),
}


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("what", list(BAD_UPDATE))
def test_bad_input_to_an_update(what: str):
    transform, hyper, message = BAD_UPDATE[what]
    opt = chain(transform, O.sgd(lr=0.1))
    params = {"w": torch.ones(2)}
    with pytest.raises(innerloop.InnerLoopError, match=message):
        opt.update(params, opt.init(params), params, hyper)


def test_bad_gradients():
    opt = chain(O.add_decayed_weights(0.1), O.sgd(lr=0.1))
    params = {"w": torch.ones(2)}
    with pytest.raises(innerloop.InnerLoopError, match=r"\['v'\].*\['w'\]"):
        opt.update({"v": torch.ones(2)}, opt.init(params), params)
    with pytest.raises(innerloop.InnerLoopError, match=r"'w' has shape \(1,\).*\(2,\)"):
        opt.update({"w": torch.ones(1)}, opt.init(params), params)
    with pytest.raises(innerloop.InnerLoopError, match=r"'\*.bias' matches no parameter.*\['w'\]"):
        chain(O.add_decayed_weights(0.1, mask="*.bias"), O.sgd()).init(params)
    clip = O.clip_by_value(1.0)
    with pytest.raises(innerloop.InnerLoopError, match=r"complex.*no order"):
        clip.apply({"w": torch.ones(1) * 1j}, (), {"w": torch.ones(1) * 1j}, {"limit": 1.0})


# -- steps that are compiled one by one ------------------------------------------------------------


def gradient_of_compiled_steps(transform: innerloop.optim.Transform, compile: bool) -> Any:
    problem = innerloop.Problem(
        lambda params, hyper, t: (params["w"].sin() * (1 + params["w"])).sum(),
        chain(transform, innerloop.optim.sgd(lr=0.1)),
    )
    return innerloop.metagradient(
        lambda traj, _: traj.params["w"].square().sum(),
        problem,
        {"w": smooth_noise(2, 3)},
        None,
        steps=4,
        wrt="params",
        strategy=innerloop.Checkpointed(compile=compile),
    )


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_noise_in_compiled_steps():
    """The count is a tensor there."""
    noise = innerloop.optim.add_noise(0.3, 0.7, seed=9)
    (value, ours), (expected, truth) = (
        gradient_of_compiled_steps(noise, flag) for flag in (True, False)
    )
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(ours["w"], truth["w"], rtol=1e-10, atol=1e-12)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_accumulation_in_compiled_steps_is_refused_by_name():
    with pytest.raises(
        innerloop.NotDifferentiableError, match="accumulate in steps that are compiled one by one"
    ):
        gradient_of_compiled_steps(innerloop.optim.accumulate(2), True)


# -- rules of other kinds --------------------------------------------------------------------------


class Closure(innerloop.optim.Optimizer):
    """A rule that wants to evaluate the loss itself, as LBFGS does."""

    needs_closure = True
    compiles = False

    def init(self, params):
        return ()

    def update(self, grads, state, params, hyper=None):
        return dict(params), state

    def __repr__(self) -> str:
        return "closure()"


class Foreign(Closure):
    needs_closure = False


def test_a_rule_that_evaluates_the_loss_itself_is_refused_and_what_cannot_compile_says_so():
    for wrap in (lambda rule: chain(O.scale(2.0), rule), O.in_float32):
        with pytest.raises(innerloop.InnerLoopError, match=r"closure\(\).*evaluates the loss"):
            wrap(Closure())
        assert not wrap(Foreign()).compiles
        assert wrap(O.sgd()).compiles
