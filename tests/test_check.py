"""``check_metagradient``: it passes what is right, and names what is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop._utils.differences import derivative
from tests.oracles import smooth_noise

X = smooth_noise(6, 3)
Y = smooth_noise(6, 2, phase=1.0)


class WrongBackward(torch.autograd.Function):
    """The identity, whose gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def wrong(x: Tensor, factor: float = 1.5) -> Tensor:
    return WrongBackward.apply(x, factor)


def inputs() -> dict[str, Any]:
    return {
        "params": {"w": smooth_noise(3, 2, phase=2.0), "b": smooth_noise(2, phase=3.0)},
        "log_lr": torch.tensor(-2.0),
    }


def train(inputs: dict[str, Any], optimizer: Any = None) -> Tensor:
    """Two steps of a small regression; the outer loss is the loss on other targets."""
    optimizer = optimizer or innerloop.optim.sgd(momentum=0.9)
    params, hyper = inputs["params"], {"lr": inputs["log_lr"].exp()}
    loss = lambda params, y: ((X @ params["w"] + params["b"]).tanh() - y).square().mean()  # noqa: E731
    state = optimizer.init(params)
    for _ in range(2):
        params, state = optimizer.update(torch.func.grad(loss)(params, Y), state, params, hyper)
    return loss(params, -Y)


# -- what is right passes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", [innerloop.optim.sgd(momentum=0.9), innerloop.optim.adam(eps=1e-3)], ids=repr
)
def test_a_right_gradient_passes_and_is_reported_input_by_input(
    optimizer: innerloop.optim.Optimizer,
):
    report = innerloop.check_metagradient(lambda x: train(x, optimizer), inputs())
    assert report.ok
    assert report.wrong == []
    assert [c.input for c in report.comparisons[::3]] == [
        "['params']['w']",
        "['params']['b']",
        "['log_lr']",
    ]
    lines = str(report).splitlines()
    assert all(
        word in lines[0]
        for word in ("input", "autograd", "finite diff.", "difference", "uncertainty")
    )
    assert len(lines) == 2 + len(report.comparisons)
    assert not any("<--" in line for line in lines)


def test_the_numbers_of_the_report_are_directional_derivatives():
    report = innerloop.check_metagradient(lambda x: 3 * x, torch.tensor(2.0))
    for c in report.comparisons:  # of length 1 along +1 or -1: there is only one direction to go
        assert abs(c.autograd) == pytest.approx(3.0, rel=1e-12)
        assert c.finite == pytest.approx(c.autograd, rel=1e-9)
        assert c.uncertainty < 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: [x],
        lambda x: (torch.arange(3), {"x": x}),
        lambda x: {"x": x, "n": None, "k": 3},
    ],
)
def test_inputs_are_any_pytree(make: Any):
    x = torch.tensor([1.0, 2.0])

    def outer(tree: Any) -> Tensor:
        leaves = [
            leaf
            for leaf in torch.utils._pytree.tree_leaves(tree)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        return leaves[0].pow(3).sum()

    assert innerloop.check_metagradient(outer, make(x)).ok
    assert torch.equal(x, torch.tensor([1.0, 2.0]))


def test_inputs_are_not_changed_and_get_no_grad():
    given = inputs()
    given["log_lr"].requires_grad_()
    before = copy.deepcopy(given)
    innerloop.check_metagradient(train, given, directions=1)
    assert given["log_lr"].grad is None
    for name, value in before["params"].items():
        assert torch.equal(given["params"][name], value)
    assert given["log_lr"].dtype == torch.float32


def test_empty_tensors_need_no_check():
    report = innerloop.check_metagradient(
        lambda x: (x["a"] ** 2).sum() + x["none"].sum(),
        {"a": torch.ones(2), "none": torch.zeros(0, 3)},
    )
    assert {c.input for c in report.comparisons} == {"['a']"}


def test_large_and_small_values_are_checked_at_their_own_scale():
    x = {"large": torch.tensor([3e6, -2e6]), "small": torch.tensor([2e-3, 1e-3])}
    assert innerloop.check_metagradient(
        lambda x: (x["large"] / 1e6).sin().sum() + (10 * x["small"]).exp().sum(), x
    ).ok
    with pytest.raises(innerloop.MetaGradientError, match=r"\['large'\]"):
        innerloop.check_metagradient(
            lambda x: (wrong(x["large"]) / 1e6).sin().sum() + (10 * x["small"]).exp().sum(), x
        )


def test_dropout_is_replayed_and_leaves_the_random_state_alone():
    x = torch.ones(20)
    state = torch.get_rng_state()
    assert innerloop.check_metagradient(lambda x: nn.functional.dropout(x**3, 0.5).sum(), x).ok
    assert torch.equal(torch.get_rng_state(), state)


# -- what is wrong is named ------------------------------------------------------------------------


def test_a_wrong_backward_is_named_and_what_is_right_is_not():
    def outer(x: dict[str, Any]) -> Tensor:
        return train(
            {"params": {**x["params"], "b": wrong(x["params"]["b"])}, "log_lr": x["log_lr"]}
        )

    with pytest.raises(innerloop.MetaGradientError) as caught:
        innerloop.check_metagradient(outer, inputs())
    message = str(caught.value)
    assert (
        message.splitlines()[0] == "autograd and finite differences disagree for ['params']['b']:"
    )
    flagged = [line.split()[0] for line in message.splitlines() if "<--" in line]
    assert set(flagged) == {"['params']['b']"}
    assert len(flagged) == 3
    assert "WRONG" in message


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.999, 1.0001])
def test_a_gradient_that_is_off_by_a_factor_is_found(factor: float):
    with pytest.raises(innerloop.MetaGradientError):
        innerloop.check_metagradient(
            lambda x: wrong(x, factor).sin().sum(), torch.tensor([0.3, 0.7])
        )


def test_one_wrong_entry_among_a_thousand_is_found():
    mask = torch.ones(1000)
    mask[371] = 0.0
    with pytest.raises(innerloop.MetaGradientError):
        innerloop.check_metagradient(
            lambda x: ((x * mask).sin() + (x * (1 - mask)).detach().sin()).sum(), smooth_noise(1000)
        )


def test_a_detached_path_is_named_and_the_verdict_says_that_nothing_arrives():
    def outer(x: dict[str, Any]) -> Tensor:
        return train({"params": x["params"], "log_lr": x["log_lr"].detach()})

    with pytest.raises(
        innerloop.MetaGradientError,
        match=r"(?s)disagree for \['log_lr'\]:.*<-- no gradient arrives",
    ):
        innerloop.check_metagradient(outer, inputs(), directions=1)


def test_a_half_detached_path_is_found():
    """First-order MAML: the identity path is left, so that the gradient is neither zero nor
    right."""

    def outer(params: Tensor) -> Tensor:
        grad = torch.func.grad(lambda p: (p**3).sum())(params)
        return (params - 0.1 * grad.detach()).sin().sum()

    with pytest.raises(innerloop.MetaGradientError, match="disagree for input"):
        innerloop.check_metagradient(outer, torch.tensor([1.0, 0.5]))


def test_a_loss_without_any_path_says_so():
    with pytest.raises(innerloop.MetaGradientError, match="detached"):
        innerloop.check_metagradient(lambda x: x.detach().sum(), torch.ones(2))


def test_torchs_own_differentiable_sgd_is_found_out():
    """facts.md: its first momentum buffer is a detached clone; dp₂/dp₀ is .72 and it says .90."""

    def outer(p: Tensor) -> Tensor:
        q = p.clone()
        optimizer = torch.optim.SGD([q], lr=0.1, momentum=0.9, differentiable=True)
        for _ in range(2):
            q.grad = q.clone()
            optimizer.step()
        return q.sum()

    with pytest.raises(innerloop.MetaGradientError) as caught:
        innerloop.check_metagradient(outer, torch.tensor([1.0]))
    assert "0.72" in str(caught.value)
    assert "0.9" in str(caught.value)


def test_a_kink_within_reach_is_not_called_a_wrong_gradient():
    with pytest.raises(innerloop.MetaGradientError, match="kink"):
        innerloop.check_metagradient(
            lambda x: (x - 1.0001).abs().sum(), torch.ones(1, dtype=torch.float64)
        )


@pytest.mark.parametrize(
    ("f", "left", "right"),
    [(lambda x: x.abs(), -1.0, 1.0), (lambda x: torch.where(x > 0, 3 * x, x + x**2), 1.0, 3.0)],
    ids=["symmetric", "one-sided"],
)
def test_a_kink_at_the_point_is_told_with_its_slopes(f: Any, left: float, right: float):
    """|x| at 0: finite differences and autograd agree on 0, which is no derivative."""
    report = innerloop.check_metagradient(lambda x: f(x) + x.exp(), torch.tensor(0.0), raises=False)
    (found,) = report.comparisons
    assert found.kink is not None
    # The sign of a random direction says which side is left.
    slopes = {round(abs(a), 4) for a in found.kink}
    assert slopes == {abs(round(left + 1, 4)), abs(round(right + 1, 4))}
    assert not report.ok
    assert "a kink: the slope is" in str(report)
    smooth = innerloop.check_metagradient(lambda x: f(x) + x.exp(), torch.tensor(0.3))
    assert smooth.ok
    assert smooth.comparisons[0].kink is None


def test_a_wrong_gradient_is_reported_without_raising():
    report = innerloop.check_metagradient(
        lambda x: (x.detach() * x).sum(),
        torch.ones(2),
        raises=False,
    )
    assert report.wrong == ["input"]


@pytest.mark.parametrize(
    "strategy", [None, innerloop.Checkpointed(slots=2)], ids=["StoreAll", "Checkpointed"]
)
def test_a_problem_is_checked_as_it_stands(strategy: Any):
    """A module with batch norm in float32, data of an iterator, learned rate and penalty."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3, affine=False), nn.Tanh())
    x = torch.randn(3, 6, 2)

    def loss(m: Any, hyper: Any, batch: Any) -> Any:
        return (m(batch) - batch[:, :1]).square().mean() + hyper["l2"] * m[0].weight.square().sum()

    problem = innerloop.Problem.from_module(
        model, loss, innerloop.optim.adam(eps=1e-2), optimizer_hyper=("lr",)
    )
    before = {n: v.clone() for n, v in model.state_dict().items()}
    report = innerloop.check_metagradient(
        lambda traj, hyper: (traj.params["0.weight"].square().sum() + hyper["l2"], "aux"),
        problem,
        None,
        iter(x),
        hyper={"lr": torch.tensor(0.05), "l2": torch.tensor(0.1)},
        strategy=strategy,
        directions=1,
    )
    names = {"['params']['0.weight']", "['hyper']['lr']", "['hyper']['l2']"}
    assert {c.input for c in report.comparisons} == names
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_an_approximate_strategy_is_found_out():
    problem = innerloop.Problem(
        lambda params, hyper, batch: params["w"] ** 4 / 4, innerloop.optim.sgd(lr=0.1)
    )
    report = innerloop.check_metagradient(
        lambda traj, hyper: traj.params["w"],
        problem,
        {"w": torch.tensor(1.0)},
        steps=3,
        strategy=innerloop.FirstOrder(),
        raises=False,
    )
    assert report.wrong == ["['params']['w']"]
    carry = problem.init({"w": torch.tensor(1.0)})
    assert innerloop.check_metagradient(
        lambda traj, hyper: traj.params["w"], problem, carry, steps=3
    ).ok
    with pytest.raises(innerloop.InvalidInputError, match="belong to a Problem"):
        innerloop.check_metagradient(lambda x: x.sum(), torch.ones(2), {"w": torch.ones(1)})
    with pytest.raises(innerloop.InvalidInputError, match="wrt='all'"):
        innerloop.check_metagradient(lambda t, h: t, problem, carry, steps=3, wrt="all")


def test_float32_inside_is_not_called_a_wrong_gradient():
    with pytest.raises(innerloop.MetaGradientError, match="float32 inside"):
        innerloop.check_metagradient(lambda x: (1000 + x.float().sin()).sum(), torch.ones(1))


def test_a_wrong_gradient_drowned_in_rounding_is_not_called_right():
    """Beside 1e9 a slope of 1e-3 cannot be measured: whatever the report says, it must not say that
    zero is right."""
    with pytest.raises(innerloop.InnerLoopError):
        innerloop.check_metagradient(lambda x: 1e9 + 1e-3 * wrong(x, 0.0).sum(), torch.ones(1))


# -- modules ---------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)
        self.tied = self.last
        self.register_buffer("offset", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.norm(self.first(x)).tanh()) + self.offset


def module_outer(model: nn.Module) -> Tensor:
    """Two hand-written steps, in the precision of the model."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    params: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dtype = next(iter(params.values())).dtype
    optimizer = innerloop.optim.sgd(lr=0.1, momentum=0.9)
    state = optimizer.init(params)
    call = lambda params, x: torch.func.functional_call(model, params, (x,))  # noqa: E731
    for _ in range(2):
        loss = (call(params, X.to(dtype)) - Y.to(dtype)).square().mean()
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params, state = optimizer.update(dict(zip(names, grads, strict=True)), state, params)
    return (call(params, X.to(dtype)) + Y.to(dtype)).square().mean()


def test_a_float32_module_is_checked_through_a_float64_copy():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    seen: list[torch.dtype] = []

    def outer(model: nn.Module) -> Tensor:
        seen.extend(p.dtype for p in model.parameters())
        return module_outer(model)

    report = innerloop.check_metagradient(outer, model, directions=1)
    assert report.ok
    assert set(seen) == {torch.float64}
    assert {c.input for c in report.comparisons} == {name for name, _ in model.named_parameters()}
    assert all(c.uncertainty < 1e-7 for c in report.comparisons)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())


def test_captured_float32_data_does_not_stop_the_check_of_a_module():
    x, y = X.float(), Y.float()
    assert innerloop.check_metagradient(
        lambda model: (model(x) - y).square().mean(), nn.Linear(3, 2)
    ).ok


def test_a_wrong_layer_of_a_module_is_named():
    class Wrong(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(wrong(self.norm(self.first(x)).tanh())) + self.offset

    with pytest.raises(innerloop.MetaGradientError) as caught:
        innerloop.check_metagradient(module_outer, Wrong(), directions=1)
    assert "first.weight" in str(caught.value).splitlines()[0]


def test_a_frozen_parameter_of_a_module_is_left_out():
    model = Net()
    model.first.weight.requires_grad_(False)
    report = innerloop.check_metagradient(module_outer, model, directions=1)
    assert "first.weight" not in {c.input for c in report.comparisons}
    assert "first.bias" in {c.input for c in report.comparisons}


def test_a_tracked_loop_is_checked_with_its_own_torch_optimizer():
    def outer(model: nn.Module) -> Tensor:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-3)
        with innerloop.track(model, optimizer) as loop:
            for _ in range(3):
                loop.step((loop.model(X) - Y).square().mean())
            return (loop.model(X) + Y).square().mean()

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    assert innerloop.check_metagradient(outer, model, directions=1).ok


def test_a_library_owned_loop_is_checked():
    problem = innerloop.Problem(
        lambda params, hyper, batch: (
            hyper["weights"] * (X @ params["w"] + params["b"] - Y).square().mean(1)
        ).mean(),
        innerloop.optim.adam(eps=1e-3),
        optimizer_hyper=lambda hyper, t: {"lr": hyper["log_lr"].exp()},
    )

    def outer(x: dict[str, Any]) -> Tensor:
        traj = innerloop.unroll(problem, x["params"], None, hyper=x["hyper"], steps=3)
        return (X @ traj.params["w"] + traj.params["b"] + Y).square().mean() + traj.losses.sum()

    given = {
        "params": inputs()["params"],
        "hyper": {"weights": torch.ones(6), "log_lr": torch.tensor(-3.0)},
    }
    assert innerloop.check_metagradient(outer, given, directions=1).ok


# -- what cannot be checked ------------------------------------------------------------------------


def test_a_loss_that_is_not_a_function_of_its_inputs():
    calls: list[int] = []

    def outer(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sum() * len(calls)

    with pytest.raises(innerloop.InnerLoopError, match="function of its inputs"):
        innerloop.check_metagradient(outer, torch.ones(2))


@pytest.mark.parametrize(
    "outer",
    [lambda x: x, lambda x: None, lambda x: 1.0, lambda x: (x.sum(), 1)],
    ids=["vector", "None", "number", "pair"],
)
def test_a_loss_that_is_no_scalar_tensor(outer: Any):
    with pytest.raises(innerloop.InnerLoopError, match="scalar"):
        innerloop.check_metagradient(outer, torch.ones(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(value: float):
    with pytest.raises(innerloop.InnerLoopError, match=r"\bnan\b|\binf\b|finite"):
        innerloop.check_metagradient(lambda x: (x * value).sum(), torch.ones(2))


@pytest.mark.parametrize(
    "given",
    [{}, torch.arange(3), {"a": 1.0}, None],
    ids=["nothing", "integers", "a number", "None"],
)
def test_inputs_without_a_floating_point_tensor(given: Any):
    with pytest.raises(innerloop.InnerLoopError, match="floating-point"):
        innerloop.check_metagradient(lambda x: torch.ones(()), given)


def test_complex_inputs_are_checked_or_refused_but_not_passed_over():
    def outer(x: dict[str, Tensor]) -> Tensor:
        return (x["z"].detach().abs() ** 2).sum() + x["a"].sum()

    with pytest.raises(innerloop.InnerLoopError, match=r"\['z'\]|complex"):
        innerloop.check_metagradient(
            outer, {"z": torch.ones(2, dtype=torch.complex64), "a": torch.ones(1)}
        )


def _bootstrapped(how: str) -> innerloop.Problem:
    """A regression on targets that are made of the parameters themselves."""

    def target(params: Any, hyper: Any, batch: Any) -> Tensor:
        return (params["w"] * (batch + 1)).sin()

    def loss(params: Any, hyper: Any, batch: Any, *targets: Tensor) -> Tensor:
        if how == "no_grad":
            with torch.no_grad():
                goal = target(params, hyper, batch)
        elif how == "data":
            goal = target({"w": params["w"].data}, hyper, batch)
        else:
            goal = targets[0] if targets else target(params, hyper, batch).detach()
        return (params["w"] * batch - goal).square().sum()

    targets = target if how == "targets" else None
    return innerloop.Problem(loss, innerloop.optim.sgd(), optimizer_hyper=("lr",), targets=targets)


def _through_three_steps(problem: innerloop.Problem, **kwargs: Any) -> Any:
    batches = torch.tensor([0.5, 1.0, 0.7], dtype=torch.float64)

    def outer(x: Any) -> Tensor:
        traj = innerloop.unroll(problem, {"w": x["w"]}, batches, hyper={"lr": x["lr"]}, **kwargs)
        return traj.params["w"].square()

    return outer


AT = {"w": torch.tensor(2.0), "lr": torch.tensor(0.1)}


@pytest.mark.covering
@pytest.mark.parametrize("how", ["detach", "no_grad", "data"])
@pytest.mark.parametrize("strategy", [innerloop.StoreAll(), innerloop.Checkpointed()], ids=repr)
def test_a_gradient_with_constant_targets_is_told_from_a_wrong_one(
    how: str, strategy: innerloop.strategy.Strategy
):
    """The derivative is right where the target is held constant, and the error says so."""
    outer = _through_three_steps(_bootstrapped(how), strategy=strategy)
    with pytest.raises(innerloop.MetaGradientError) as caught:
        innerloop.check_metagradient(outer, AT, directions=1)
    message = str(caught.value)
    assert "autograd: detached values constant)" in message
    assert (
        "They agree if what the code detaches (detach, no_grad, .data) keeps its value" in message
    )
    assert "Problem(loss, optimizer, targets=fn)" in message


def test_targets_follow_the_whole_run():
    report = innerloop.check_metagradient(_through_three_steps(_bootstrapped("targets")), AT)
    assert report.reading == "whole run"
    assert str(report).endswith("autograd: whole run)")


def test_a_tracked_loop_with_constant_targets():
    def outer(module: nn.Module) -> Tensor:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        with innerloop.track(module, optimizer) as loop:
            for _ in range(2):
                goal = loop.model(torch.ones(1, 1).double()).detach().sin()
                loop.step((loop.model(torch.ones(1, 1).double()) - goal).square().sum())
            return loop.model(torch.ones(1, 1).double()).square().sum()

    with pytest.raises(innerloop.MetaGradientError, match="autograd: detached values constant"):
        innerloop.check_metagradient(outer, nn.Linear(1, 1))


def test_a_wrong_gradient_is_not_excused_by_a_detached_value():
    """A value that is detached beside a wrong backward explains nothing; nor does one that is not
    used, or decides about a branch."""
    for outer in (
        lambda x: (wrong(x) * x.detach()).sin().sum(),
        lambda x: (wrong(x).sin() + 0 * x.detach()).sum(),
        lambda x: wrong(x).sin().sum() * (1 + int(x.detach()[0] > 0.3)),
    ):
        with pytest.raises(innerloop.MetaGradientError) as caught:
            innerloop.check_metagradient(outer, torch.tensor([0.3, 0.7]))
        assert "They agree" not in str(caught.value)
        assert "constant" not in str(caught.value)


def test_a_derivative_by_differences_refines_its_step():
    asked: list[float] = []

    def kinked(x: float) -> float:
        # Linear near 0 only: the first step is too long.
        asked.append(x)
        return 3 * x if abs(x) < 1.5 else 100.0

    value, uncertainty = derivative(kinked, 1.0, rungs=4)
    assert value == pytest.approx(3.0)
    assert uncertainty == pytest.approx(0.0, abs=1e-12)
    assert max(map(abs, asked)) == 2.0
    assert min(map(abs, asked)) == 1 / 8
