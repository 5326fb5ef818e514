"""``optim.adapt``: foreign optimizer classes, each written to lose the gradient in its own way, and
the refusals."""

from __future__ import annotations

import io
import math
import pickle
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import dlpack
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

import innerloop
from innerloop import InvalidInputError, NotDifferentiableError
from innerloop.optim import adapt
from tests.optimizers import a_class, descend
from tests.oracles import (
    Params,
    Task,
    assert_derivative,
    assert_params,
    directional,
    directions,
    inner,
)

pytestmark = pytest.mark.usefixtures("float64")
STEPS = 4


class Base(torch.optim.Optimizer):
    """One rule for each parameter; a subclass says what it does with ``p``, ``p.grad`` and its
    state."""

    def __init__(self, params: Any, lr: float = 0.1, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.one(p, group, self.state[p])

    def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        raise NotImplementedError


class ThroughData(Base):
    """``.data`` is read, written in place and assigned."""

    def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.data.mul_(1 - group["lr"] * group["decay"])
        p.data = p.data - group["lr"] * p.grad.data.detach().sin()


class StateOfAnyKind(Base):
    """State that appears late, a count in the group, a tensor and a list on the object, a count as
    a tensor."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.seen: list[Tensor] = []
        self.anchor = {id_: p.clone() for id_, p in enumerate(self.param_groups[0]["params"])}

    def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        group["calls"] = group.get("calls", 0) + 1
        if not state:
            state.update(step=torch.zeros(()), history=[], nested={"mean": torch.zeros_like(p)})
        state["step"] += 1
        state["history"].append(p.grad.clone())
        if len(state["history"]) > 2:
            state["history"].pop(0)
        state["nested"]["mean"].lerp_(sum(state["history"]), 0.3)
        corrected = state["nested"]["mean"] / (1 - 0.7 ** state["step"])
        self.seen = [*self.seen[-1:], p.grad.norm()]
        index = next(i for i, q in enumerate(group["params"]) if q is p)
        p.add_(corrected, alpha=-group["lr"]).add_((self.anchor[index] - p) * group["decay"])
        p.sub_(0.001 * self.seen[0] / math.sqrt(group["calls"]))


class NumbersFromTensors(Base):
    """``.item()`` in arithmetic, in the group, in comparisons, as ``alpha``; tensors as ``alpha``
    and ``value``."""

    def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        size = p.grad.pow(2).mean().item() if p.numel() else 0.0
        group["largest"] = max(group.get("largest", 0.0), size)
        scale = group["lr"] / (1.0 + math.sqrt(group["largest"]))
        trust = (p.norm() / (p.grad.norm() + 1.0)).clamp(max=10.0)
        p.add_(p.grad, alpha=-scale)
        p.add_(p.grad, alpha=-0.1 * group["lr"] * trust)
        p.addcmul_(p, p.grad, value=-0.01 * trust)
        p.mul_(1 - group["decay"] * scale)
        if scale > 1e3:
            raise AssertionError("not reached")


class InPlaceTwiceDifferentiated(Base):
    """Memory that autograd would need again is overwritten; ``out=``; views; a root in place."""

    def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        second = state.setdefault("second", torch.zeros_like(p))
        second.mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
        denominator = second.clone().sqrt_().add_(0.5)
        buffer = torch.empty_like(p)
        torch.div(p.grad, denominator, out=buffer)
        buffer.view(-1).mul_(group["lr"])
        buffer.mul_(buffer.exp())
        p.sub_(buffer)
        p.view(-1)[: p.numel() // 2].mul_(1 - group["decay"])


class Wrapping(torch.optim.Optimizer):
    """An optimizer that holds another one, and slow weights (as in Lookahead)."""

    def __init__(self, params: Any, lr: float = 0.1, decay: float = 0.01) -> None:
        params = list(params)
        super().__init__(params, {"lr": lr, "decay": decay})
        self.inner = torch.optim.Adam(params, lr=lr, eps=0.1)
        self.slow = [p.clone().detach() for group in self.param_groups for p in group["params"]]
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        self.inner.param_groups[0].update(lr=group["lr"], weight_decay=group["decay"])
        self.inner.step()
        self.count += 1
        if self.count % 2 == 0:
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                slow.add_(p.data - slow, alpha=0.5)
                p.data.copy_(slow)


class Noisy(Base):
    """Random numbers of torch's own generator, which a strategy replays."""

    def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.add_(p.grad * (1 + 0.1 * torch.randn_like(p)), alpha=-group["lr"])
        p.mul_(1 - group["decay"] * torch.rand(()))


CLASSES = (
    ThroughData,
    StateOfAnyKind,
    NumbersFromTensors,
    InPlaceTwiceDifferentiated,
    Wrapping,
    Noisy,
)
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def plain_run(
    cls: Any, settings: Mapping[str, Any], start: Params, task: Task, steps: int = STEPS
) -> Params:
    """As the users of the class run it."""
    torch.manual_seed(0)
    params = {name: nn.Parameter(p.detach().clone()) for name, p in start.items()}
    optimizer = cls(list(params.values()), **settings)
    for t in range(steps):
        optimizer.zero_grad()
        task.loss(dict(params), t).backward()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def adapted_run(
    optimizer: innerloop.optim.Optimizer,
    start: Params,
    task: Task,
    hyper: Any = None,
    strategy: Any = None,
) -> Params:
    torch.manual_seed(0)
    problem = innerloop.Problem(
        lambda params, hyper, t: task.loss(params, int(t)),
        optimizer,
        optimizer_hyper=lambda hyper, t: hyper,
    )
    batches = list(torch.arange(STEPS))
    return innerloop.unroll(
        problem, start, batches, hyper=hyper, strategy=strategy or innerloop.StoreAll()
    ).params


def gradients(outer: Tensor, *trees: Params) -> list[Params]:
    leaves = [t for tree in trees for t in tree.values()]
    found = iter(torch.autograd.grad(outer, leaves, allow_unused=True, materialize_grads=True))
    return [{name: next(found) for name in tree} for tree in trees]


def tracked(values: Params) -> Params:
    return {name: value.detach().clone().requires_grad_() for name, value in values.items()}


@each_class
def test_steps_and_gradients_are_those_of_the_class(cls: Any):
    task, settings = Task(), {"lr": 0.1, "decay": 0.05}
    start, hyper = (
        tracked(task.params()),
        tracked({k: torch.tensor(v) for k, v in settings.items()}),
    )
    final = adapted_run(adapt(cls, lr=0.1, decay=0.05), start, task, hyper)
    assert_params(final, plain_run(cls, settings, start, task), 1e-12)
    found = gradients(task.outer(final), start, hyper)
    along = [
        directions(task.params(), 1)[0],
        {"lr": torch.tensor(0.02), "decay": torch.tensor(0.03)},
    ]
    outer = lambda at: task.outer(  # noqa: E731
        plain_run(cls, {k: float(v) for k, v in at[1].items()}, at[0], task)
    )
    at = [task.params(), {k: torch.tensor(v) for k, v in settings.items()}]
    assert_derivative(
        inner(found, along),
        directional(outer, at, along),
        f"{cls.__name__}: d outer / d (init, lr, decay)",
    )


EXACT = (innerloop.Checkpointed(slots=2), innerloop.Checkpointed(save="gradients"))


some_classes = pytest.mark.parametrize(
    "cls",
    [
        pytest.param(
            c, id=c.__name__, marks=() if c in (StateOfAnyKind, Noisy) else pytest.mark.slow
        )
        for c in CLASSES
    ],
)


@pytest.mark.covering
@some_classes
@pytest.mark.parametrize("strategy", EXACT, ids=repr)
def test_every_exact_strategy_gives_the_same(cls: Any, strategy: Any):
    task = Task()
    results = []
    for chosen in (innerloop.StoreAll(), strategy):
        start, hyper = tracked(task.params()), tracked({"lr": torch.tensor(0.1)})
        final = adapted_run(adapt(cls, lr=0.1), start, task, hyper, chosen)
        results.append(gradients(task.outer(final), start, hyper))
    for ours, truth in zip(results[1], results[0], strict=True):
        assert_params(ours, truth, 1e-10)


@pytest.mark.parametrize(
    "cls",
    [
        pytest.param(c, id=c.__name__, marks=() if c is StateOfAnyKind else pytest.mark.slow)
        for c in CLASSES
        if c is not Noisy
    ],
)
def test_forward_mode(cls: Any):
    task = Task()
    found = []
    for strategy in (innerloop.StoreAll(), innerloop.ForwardMode()):
        hyper = tracked({"lr": torch.tensor(0.1), "decay": torch.tensor(0.02)})
        final = adapted_run(adapt(cls, lr=0.1), task.params(), task, hyper, strategy)
        found.append(gradients(task.outer(final), hyper)[0])
    assert_params(found[1], found[0], 1e-10)


@some_classes
def test_a_second_derivative_of_the_loop(cls: Any):
    task = Task()
    along = directions(task.params(), 2)

    def slope(start: Params, create_graph: bool) -> Tensor:
        start = {n: p if p.requires_grad else p.detach().requires_grad_() for n, p in start.items()}
        outer = task.outer(adapted_run(adapt(cls, lr=0.1), start, task))
        found = torch.autograd.grad(
            outer,
            list(start.values()),
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return sum(
            ((g * v).sum() for g, v in zip(found, along[0].values(), strict=True)), torch.zeros(())
        )

    start = tracked(task.params())
    second = gradients(slope(start, create_graph=True), start)
    truth = directional(
        lambda p: slope(p, create_graph=False).detach(), task.params(), along[1], largest=1e-3
    )
    assert_derivative(inner(second, [along[1]]), truth, f"{cls.__name__}: second derivative")


@some_classes
def test_update_changes_nothing_that_it_is_given(cls: Any):
    task = Task()
    params = task.params()
    optimizer = adapt(cls, lr=0.1)
    grads = task.gradient(params, 0)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    before = [t.clone() for t in (*params.values(), *grads.values(), *state.tensors)]
    optimizer.update(grads, state, params)
    optimizer.update(grads, state, params, {"lr": torch.tensor(0.2)})
    for now, then in zip((*params.values(), *grads.values(), *state.tensors), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
        assert not now.requires_grad
        assert type(now) is Tensor


def test_a_parameter_without_gradient_is_left_alone():
    task = Task()
    params = task.params()
    optimizer = adapt(StateOfAnyKind, lr=0.1)
    grads = {**task.gradient(params, 0), "weight": None}
    new, _ = optimizer.update(grads, optimizer.init(params), params)
    assert_params({"weight": new["weight"]}, {"weight": params["weight"]}, 0)
    assert not torch.equal(new["bias"], params["bias"])


def test_zero_gradients_have_a_finite_derivative():
    task = Task(dead=True)
    start = tracked(task.params())
    with torch.autograd.set_detect_anomaly(True):
        found = gradients(
            task.outer(adapted_run(adapt(torch.optim.Adam, lr=0.05), start, task)), start
        )[0]
    assert all(g.isfinite().all() for g in found.values())


def test_own_rules_agree_with_adapted_classes():
    """Two implementations of ours that share nothing but `safe_sqrt`."""
    task = Task()
    for rule, adapted in (
        (innerloop.optim.adam(lr=0.05), adapt(torch.optim.Adam, lr=0.05)),
        (innerloop.optim.sgd(lr=0.1, momentum=0.9), adapt(torch.optim.SGD, lr=0.1, momentum=0.9)),
    ):
        found = []
        for optimizer in (rule, adapted):
            start = tracked(task.params())
            found.append(gradients(task.outer(adapted_run(optimizer, start, task)), start)[0])
        assert_params(found[1], found[0], 1e-10)


# -- closures and constructors ---------------------------------------------------------------------


class SharpnessAware(torch.optim.Optimizer):
    """Foret et al. 2021: the gradient is taken again at a displaced point."""

    def __init__(self, params: Any, lr: float = 0.1, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        loss = closure()
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for _, p in pairs]).norm()
        moves = []
        for group, p in pairs:
            moves.append(p.grad * (group["rho"] / (norm + 1e-12)))
            p.add_(moves[-1])
        self.zero_grad()
        closure()
        for (group, p), move in zip(pairs, moves, strict=True):
            p.sub_(move)
            p.data.add_(p.grad, alpha=-group["lr"])
        return loss


@pytest.mark.parametrize(
    "strategy", [innerloop.StoreAll(), innerloop.Checkpointed(slots=2)], ids=repr
)
def test_a_class_that_needs_a_closure(strategy: Any):
    task = Task()

    def plain(at: tuple[Params, Params]) -> Tensor:
        params = {name: nn.Parameter(p.detach().clone()) for name, p in at[0].items()}
        optimizer = SharpnessAware(list(params.values()), **{k: float(v) for k, v in at[1].items()})
        for t in range(STEPS):

            def closure(t: int = t) -> Tensor:
                optimizer.zero_grad()
                loss = task.loss(dict(params), t)
                loss.backward()
                return loss

            optimizer.step(closure)
        return task.outer({name: p.detach() for name, p in params.items()})

    start, hyper = (
        tracked(task.params()),
        tracked({"lr": torch.tensor(0.1), "rho": torch.tensor(0.05)}),
    )
    optimizer = adapt(SharpnessAware, closure=True)
    outer = task.outer(adapted_run(optimizer, start, task, hyper, strategy))
    at = (task.params(), {"lr": torch.tensor(0.1), "rho": torch.tensor(0.05)})
    assert abs(float(outer.detach()) - float(plain(at))) < 1e-12
    along = (directions(task.params(), 1)[0], {"lr": torch.tensor(0.3), "rho": torch.tensor(0.2)})
    assert_derivative(
        inner(gradients(outer, start, hyper), list(along)), directional(plain, at, along), "SAM"
    )


def test_a_strategy_that_cannot_replay_a_closure_says_so():
    task = Task()
    for strategy in (innerloop.FirstOrder(), innerloop.Checkpointed(save="gradients")):
        with pytest.raises(InvalidInputError, match="evaluates the loss within its update"):
            adapted_run(
                adapt(SharpnessAware, closure=True), tracked(task.params()), task, strategy=strategy
            )


def test_a_constructor_that_needs_groups():
    task = Task()

    def make(named: dict[str, Tensor]) -> torch.optim.Optimizer:
        first, *rest = named.values()
        return ThroughData([{"params": [first], "lr": 0.3}, {"params": rest}], lr=0.05)

    def plain(at: tuple[Params, list[Tensor]]) -> Tensor:
        params = {name: nn.Parameter(p.detach().clone()) for name, p in at[0].items()}
        optimizer = make(dict(params))
        for group, lr in zip(optimizer.param_groups, at[1], strict=True):
            group["lr"] = float(lr)
        for t in range(STEPS):
            optimizer.zero_grad()
            task.loss(dict(params), t).backward()
            optimizer.step()
        return task.outer({name: p.detach() for name, p in params.items()})

    start, lr = tracked(task.params()), [torch.tensor(v, requires_grad=True) for v in (0.3, 0.05)]
    outer = task.outer(adapted_run(adapt(make), start, task, {"lr": lr}))
    at = (task.params(), [torch.tensor(0.3), torch.tensor(0.05)])
    assert abs(float(outer.detach()) - float(plain(at))) < 1e-12
    found = torch.autograd.grad(outer, [*start.values(), *lr])
    along = (directions(task.params(), 1)[0], [torch.tensor(0.2), torch.tensor(-0.1)])
    ours = (dict(zip(start, found, strict=False)), list(found[-2:]))
    assert_derivative(inner(ours, along), directional(plain, at, along), "two groups")


# -- refusals --------------------------------------------------------------------------------------


class TakesAFloat(Base):
    def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.sub_(p.grad, alpha=group["lr"] / float(1.0 + p.grad.norm()))


class TakesAnInteger(Base):
    def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.sub_(p.grad, alpha=group["lr"] * int(10 * p.grad.norm()))


class TakesAnArray(Base):
    def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.sub_(torch.from_numpy(p.grad.numpy()), alpha=group["lr"])


class KeepsIdentities(Base):
    """``id(p)`` as a key: the parameters of the next step are others, so what was kept under it is
    not found again."""

    def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        kept = self.__dict__.setdefault("kept", {})
        kept[id(p)] = kept.get(id(p), 0.0) + p.grad
        p.sub_(kept[id(p)], alpha=group["lr"])


class Rounds(Base):
    """Half precision in the middle: a derivative that finite differences do not confirm."""

    def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.sub_((p.grad.to(torch.bfloat16) ** 3).to(p.dtype), alpha=group["lr"])


class LeavesWithoutATrace(Base):
    def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.sub_(Tensor._make_subclass(Tensor, p.grad), alpha=group["lr"])


class Crashes(Base):
    def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        raise KeyError("nothing here")


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (TakesAFloat, r"test_adapt.py:\d+: `.*float\(1.0.*into a float"),
        (TakesAnInteger, r"test_adapt.py:\d+: `.*int\(10.*makes an integer"),
        (TakesAnArray, r"test_adapt.py:\d+: `.*numpy.*numpy array"),
        (KeepsIdentities, "after 6 steps its parameters are off those of the class itself by"),
        (Rounds, "finite differences of the class"),
        (LeavesWithoutATrace, r"by autograd and .* by finite differences of the class"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_what_has_no_derivative_is_refused_by_name(cls: Any, said: str):
    with pytest.raises(NotDifferentiableError, match=said):
        adapt(cls)


def test_a_class_that_fails_itself():
    with pytest.raises(InvalidInputError, match=r"the class itself fails .*KeyError.*nothing here"):
        adapt(Crashes)
    with pytest.raises(InvalidInputError, match="closure=True"):
        adapt(SharpnessAware)
    makes_a_list: Any = lambda named: list(named)  # noqa: E731
    with pytest.raises(InvalidInputError, match=r"not a torch\.optim\.Optimizer"):
        adapt(makes_a_list, verify=False).init({"w": torch.ones(2)})


def test_verification_is_done_once_and_can_be_left_out():
    calls = []

    class Counted(ThroughData):
        def step(self, closure: Any = None) -> Any:
            calls.append(1)
            return super().step(closure)

    params = {"w": torch.ones(3, 2), "b": torch.ones(2)}
    adapt(Counted)
    assert len(calls) > 100
    calls.clear()
    adapt(Counted).init(params)
    assert not calls
    adapt(Counted).init({"kernel": torch.ones(3, 2, 2, 2)})
    assert calls
    calls.clear()
    adapt(Counted, lr=0.2, verify=False).init(params)
    assert not calls


def test_bad_hyper_parameters():
    task = Task()
    optimizer = adapt(ThroughData)
    cases: list[tuple[Any, str]] = [
        ({"nope": 0.1}, "no hyper-parameter 'nope': its param groups have"),
        ({"lr": torch.ones(3)}, r"'lr' is a tensor of shape \(3,\)"),
        ({"lr": [0.1, 0.2]}, "list of 2, but 1 param groups"),
    ]
    for hyper, said in cases:
        with pytest.raises(InvalidInputError, match=said):
            adapted_run(optimizer, task.params(), task, hyper)


def test_transforms_and_compile_are_refused_by_name():
    optimizer = adapt(ThroughData)
    params = {"w": torch.ones(3)}

    def step(w: Tensor) -> Tensor:
        return optimizer.update({"w": w}, optimizer.init({"w": w}), {"w": w})[0]["w"].sum()

    with pytest.raises(NotDifferentiableError, match=r"inside torch\.func\.grad"):
        torch.func.grad(step)(params["w"])
    rows = torch.stack([params["w"], 2 * params["w"]])
    torch.testing.assert_close(
        torch.func.vmap(step)(rows), torch.stack([step(row) for row in rows])
    )
    torch.testing.assert_close(
        torch.func.jvp(step, (params["w"],), (params["w"],))[1],
        torch.autograd.functional.jvp(step, params["w"], params["w"])[1],
    )
    problem = innerloop.Problem(lambda params, hyper, batch: (params["w"] ** 2).sum(), optimizer)
    with pytest.raises(InvalidInputError, match="cannot be compiled"):
        innerloop.metagradient(
            lambda traj, hyper: traj.params["w"].sum(), problem, params, None, steps=2, compile=True
        )
    strategy = innerloop.Checkpointed(compile=True)
    with pytest.raises(InvalidInputError, match="cannot be compiled"):
        innerloop.unroll(problem, tracked(params), None, steps=2, strategy=strategy)


def test_the_first_step_on_other_shapes_is_compared_with_the_class():
    class LargeOnly(KeepsIdentities):
        """Right on the small problem, wrong on a large tensor."""

        def one(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
            p.sub_(
                p.grad, alpha=group["lr"] * (1 + (type(p) is not nn.Parameter and p.numel() > 50))
            )

    optimizer = adapt(LargeOnly)
    small, large = {"w": torch.ones(3)}, {"w": torch.ones(51)}
    optimizer.update(small, optimizer.init(small), small)
    with pytest.raises(
        NotDifferentiableError, match="its first step moves 'w' otherwise than the class itself"
    ):
        optimizer.update(large, optimizer.init(large), large)


def test_track_takes_an_adapted_class():
    model = nn.Linear(2, 1)
    found = []
    for optimizer in (adapt(ThroughData, lr=0.1, decay=0.0), adapt(torch.optim.SGD, lr=0.1)):
        with innerloop.track(model, optimizer) as loop:
            for _ in range(3):
                loop.step((loop.model(torch.ones(4, 2)) ** 2).mean())
            outer = loop.model(torch.ones(4, 2)).mean()
        found.append(torch.autograd.grad(outer, list(model.parameters())))
    assert not torch.equal(found[0][0], found[1][0])  # sin(g) is not g
    assert all(g.isfinite().all() for g in found[0])


class _ThreeTenths(torch.autograd.Function):
    """A value with a wrong derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 0.3 * grad


class _Shown:
    """Two of these look alike and do different things."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __repr__(self) -> str:
        return "f"


def test_settings_that_look_alike_are_verified_each():
    cls = a_class(
        lambda self, params: [p.sub_(0.1 * self.settings["f"].function(p.grad)) for p in params]
    )
    adapt(cls, f=_Shown(torch.clone))
    with pytest.raises(NotDifferentiableError, match="finite differences"):
        adapt(cls, f=_Shown(_ThreeTenths.apply))


def test_a_step_that_changes_what_is_not_its_state_is_refused():
    """From the third call on it is another step; where steps are replayed, or compared, the calls
    are not counted back."""

    def count(self: Any) -> None:
        calls: list[int] = []

        def factor() -> float:
            calls.append(1)
            return 1.0 if len(calls) < 3 else 0.5

        self.factor = factor

    def step(self: Any, params: Any) -> None:
        factor = self.factor()
        for p in params:
            p.sub_(0.1 * factor * p.grad)

    with pytest.raises(NotDifferentiableError, match="the second time"):
        adapt(a_class(step, count))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_class_is_verified_under_any_mode_of_the_user(mode: Any):
    with mode():
        optimizer = adapt(a_class(descend))
        params = {"p": torch.ones(3, 2, 2)}
        new, _ = optimizer.update(params, optimizer.init(params), params)
    torch.testing.assert_close(new["p"], torch.full((3, 2, 2), 0.9))


def test_a_setting_that_requires_grad_gets_its_gradient_from_constant_parameters():
    """On the loss p² three steps give (1 - 2η)³ p."""
    lr = torch.tensor(0.1, requires_grad=True)
    problem = innerloop.Problem(
        lambda params, hyper, batch: params["p"].square().sum(), adapt(a_class(descend), lr=lr)
    )
    for strategy in (innerloop.StoreAll(), innerloop.Checkpointed()):
        traj = innerloop.unroll(problem, {"p": torch.ones(2)}, None, steps=3, strategy=strategy)
        (found,) = torch.autograd.grad(traj.params["p"].sum(), lr)
        torch.testing.assert_close(found, torch.tensor(-2 * 2 * 3 * 0.8**2))


def test_gradients_that_are_not_numbers_are_not_blamed_on_the_class():
    optimizer, params = adapt(a_class(descend)), {"p": torch.ones(2)}
    new, _ = optimizer.update({"p": torch.tensor([torch.nan, 1.0])}, optimizer.init(params), params)
    torch.testing.assert_close(new["p"], torch.tensor([torch.nan, 0.9]), equal_nan=True)


def test_parameters_in_another_order_keep_their_own_state():
    def accumulate(self: Any, params: Any) -> None:
        for p in params:
            p.sub_(self.state[p].setdefault("sum", torch.zeros_like(p)).add_(p.grad))

    optimizer = adapt(a_class(accumulate))
    params = {"a": torch.zeros(2), "b": torch.zeros(2)}
    grads = {"a": torch.ones(2), "b": torch.full((2,), 5.0)}
    params, state = optimizer.update(grads, optimizer.init(params), params)
    new, _ = optimizer.update(grads, state, dict(reversed(params.items())))
    torch.testing.assert_close(new["a"], torch.full((2,), -3.0))
    torch.testing.assert_close(new["b"], torch.full((2,), -15.0))


def _by_lists(self: Any, params: Any) -> None:
    lr, grads = self.param_groups[0]["lr"], [p.grad for p in params]
    norms = torch._foreach_norm(grads)
    factor = 1 / (1 + sum(norm.item() for norm in norms))
    moments = [self.state[p].setdefault("moment", torch.zeros_like(p)) for p in params]
    torch._foreach_lerp_(moments, grads, 0.1)
    squares = torch._foreach_pow(torch._foreach_div(grads, torch.stack(norms).sum() + 1), 2)
    torch._foreach_maximum_(squares, torch._foreach_mul(squares, 0.5))
    torch._foreach_addcdiv_(
        params,
        moments,
        torch._foreach_add(torch._foreach_sqrt(squares), 0.1),
        value=-lr * factor,
    )
    torch._foreach_addcmul_(params, moments, moments, [0.01] * len(params))
    torch._foreach_add_(params, grads, alpha=-lr * factor)


def test_steps_over_lists_of_tensors():
    """``adapt`` itself compares with the class and with finite differences; torch alone fails at
    the division by a tensor."""
    optimizer = adapt(a_class(_by_lists))
    p = torch.zeros(3, requires_grad=True)
    new, _ = optimizer.update({"p": p * 1.0}, optimizer.init({"p": p}), {"p": p})
    (found,) = torch.autograd.grad(new["p"].sum(), p)
    assert found.isfinite().all()


def test_a_number_from_a_tensor_beside_out():
    def step(self: Any, params: Any) -> None:
        size = sum(p.grad.pow(2).sum().item() for p in params)
        for p in params:
            torch.addcmul(p, p.grad, p.grad, value=-0.1 / (1 + size), out=p)

    adapt(a_class(step))


def test_functions_of_math_that_mean_something_else_in_torch_are_refused():
    """math.remainder(5, 3) is -1, torch.remainder 2; math.isclose has other tolerances."""
    for function in ("remainder", "isclose"):

        def step(self: Any, params: Any, name: str = function) -> None:
            for p in params:
                p.sub_(0.1 * getattr(math, name)(p.grad.sum().item(), 3.0) * p.grad)

        with pytest.raises(NotDifferentiableError, match="float"):
            adapt(a_class(step))


def _by_storage(p: Tensor, new: Tensor) -> None:
    p.untyped_storage().copy_(new.untyped_storage())


def _by_typed_storage(p: Tensor, new: Tensor) -> None:
    p.storage().copy_(new.storage())


def _by_dlpack(p: Tensor, new: Tensor) -> None:
    p.copy_(torch.from_dlpack(new.detach()))  # type: ignore[attr-defined]


def _by_old_dlpack(p: Tensor, new: Tensor) -> None:
    p.copy_(dlpack.from_dlpack(dlpack.to_dlpack(new)))  # type: ignore[attr-defined]


def _by_imported_dlpack(p: Tensor, new: Tensor) -> None:
    p.copy_(dlpack.from_dlpack(to_dlpack(new)))


def _by_pickle(p: Tensor, new: Tensor) -> None:
    p.copy_(pickle.loads(pickle.dumps(new)))


def _by_file(p: Tensor, new: Tensor) -> None:
    file = io.BytesIO()
    torch.save(new, file)
    file.seek(0)
    p.copy_(torch.load(file))


def _by_set(p: Tensor, new: Tensor) -> None:
    p.set_(new)  # type: ignore[call-overload]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_by_storage, r"test_adapt.py:\d+: `.*memory.*untyped_storage"),
        (_by_typed_storage, r"test_adapt.py:\d+: `.*memory"),
        (_by_dlpack, r"test_adapt.py:\d+: `.*memory.*dlpack"),
        (_by_old_dlpack, r"test_adapt.py:\d+: `.*memory.*dlpack"),
        (_by_imported_dlpack, r"test_adapt.py:\d+: `.*memory.*dlpack"),
        (_by_pickle, r"test_adapt.py:\d+: `.*writes a tracked tensor out"),
        (_by_file, r"test_adapt.py:\d+: `.*writes a tracked tensor out"),
        (_by_set, "set_"),
    ],
)
def test_a_step_that_writes_memory_later_is_refused(write: Any, message: str) -> None:
    """After the steps that are verified (six, four times over at most)."""
    late = 9

    class Writes(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, {"lr": lr})
            self.taken = 0

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                new = p - 0.1 * p.grad
                if self.taken < late:
                    p.copy_(new)
                else:
                    write(p, new)
            self.taken += 1

    problem = innerloop.Problem(
        lambda p, h, b: p["w"].square().sum() / 2, innerloop.optim.adapt(Writes)
    )
    with pytest.raises(innerloop.NotDifferentiableError, match=message):
        innerloop.metagradient(
            lambda traj, h: traj.params["w"].sum(),
            problem,
            {"w": torch.ones(3)},
            None,
            steps=12,
            wrt="params",
        )


def test_dlpack_is_as_ever_outside_of_a_step():
    """The name is put back, and constants may be handed over inside a step too."""
    before = dlpack.to_dlpack  # type: ignore[attr-defined]
    handed: list[Tensor] = []

    def step(self: Any, params: Any) -> None:
        for p in params:
            handed.append(dlpack.from_dlpack(to_dlpack(torch.ones(2))))
            p.sub_(0.1 * p.grad)

    adapt(a_class(step))
    assert dlpack.to_dlpack is before  # type: ignore[attr-defined]
    assert to_dlpack is before
    assert handed
    assert all(x.tolist() == [1.0, 1.0] for x in handed)


@pytest.mark.parametrize("draw", [random.random, np.random.random])
def test_random_numbers_that_are_not_torchs_are_refused(draw: Any):
    """They are not rewound where a step is run again; rare draws escaped the comparison of runs."""

    def step(self: Any, params: Any) -> None:
        rare = draw() < 1e-9
        for p in params:
            p.sub_((0.2 if rare else 0.1) * p.grad)

    with pytest.raises(NotDifferentiableError, match="not rewound where a step is run again"):
        adapt(a_class(step))


def test_an_adapted_rule_counts_its_steps():
    optimizer = adapt(torch.optim.SGD, lr=0.1)
    params = {"w": torch.ones(2)}
    state = optimizer.init(params)
    for step in range(3):
        assert state.count == step
        params, state = optimizer.update({"w": torch.ones(2)}, state, params)
