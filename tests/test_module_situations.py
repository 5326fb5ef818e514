"""The contract of every entry of ``situations.SITUATIONS``: innerloop does what plain PyTorch does,
and differentiates it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import innerloop
from tests.oracles import assert_derivative, assert_params
from tests.situations import (
    SEED,
    STEPS,
    Optimizers,
    Situation,
    all_groups,
    along,
    each_situation,
    fixed_directions,
    named,
    named_buffers,
    plain_run,
    true_init_derivatives,
    true_lr_derivative,
)

pytestmark = pytest.mark.usefixtures("float64")
Learn = Literal["init", "outer", "nothing"]
EVERY_LEARN = pytest.mark.parametrize("learn", ["init", "outer", "nothing"])


@contextlib.contextmanager
def running(
    situation: Situation, model: Any, optimizers: Optimizers, **arguments: Any
) -> Iterator[Any]:
    """A loop that has taken its steps."""
    torch.manual_seed(SEED)
    with innerloop.track(model, optimizers, **arguments) as loop:
        for t in range(STEPS):
            loop.step(situation.loss(loop.model, t))
        yield loop


def outer_loss(
    situation: Situation, model: Any, optimizers: Optimizers, **arguments: Any
) -> Tensor:
    with running(situation, model, optimizers, **arguments) as loop:
        return situation.outer_loss(loop.model)


def has_gradient(situation: Situation) -> bool:
    return not situation.forward_only


def is_unrolled(situation: Situation) -> bool:
    return not situation.not_unrolled


def lr_leaves(optimizers: Optimizers) -> list[Tensor]:
    """One leaf per group, of the value that the group has."""
    return [torch.tensor(group["lr"], requires_grad=True) for group in all_groups(optimizers)]


# -- track -----------------------------------------------------------------------------------------


@pytest.mark.covering
@EVERY_LEARN
@each_situation()
def test_track_runs_as_torch_does(situation: Situation, learn: Learn):
    truth = plain_run(situation)
    model = situation.model()
    with running(situation, model, situation.optimizer(model), learn=learn) as loop:
        torch.testing.assert_close(
            loop.trajectory.losses.detach(), torch.tensor(truth.losses), rtol=1e-12, atol=0
        )
        for time in (0, -1) if learn == "nothing" else range(STEPS + 1):
            assert_params(loop.parameters(time=time), truth.params[time], 1e-12)
            assert_params(loop.buffers(time=time), truth.buffers[time], 1e-12)
        assert situation.outer_loss(loop.model).item() == pytest.approx(truth.outer, rel=1e-12)


@each_situation(has_gradient)
def test_track_differentiates_with_respect_to_initial_parameters(situation: Situation):
    model = situation.model()
    outer_loss(situation, model, situation.optimizer(model)).backward()
    gradients = {name: p.grad for name, p in named(model).items()}
    assert all(gradients[name] is None for name, p in named(model).items() if not p.requires_grad)
    for truth, direction in zip(
        true_init_derivatives(situation), fixed_directions(situation), strict=True
    ):
        assert_derivative(along(gradients, direction), truth, situation.name)


@pytest.mark.parametrize("learn", ["init", "outer"])
@each_situation(has_gradient)
def test_track_differentiates_with_respect_to_learning_rates(situation: Situation, learn: Learn):
    model = situation.model()
    optimizers = situation.optimizer(model)
    lrs = lr_leaves(optimizers)
    outer_loss(situation, model, optimizers, learn=learn, hyper={"lr": lrs}).backward()
    ours = sum(lr.grad.item() for lr in lrs if lr.grad is not None)
    assert_derivative(ours, true_lr_derivative(situation), situation.name)
    if learn == "outer":
        assert all(p.grad is None for p in named(model).values())


@each_situation()
def test_track_commits_what_torch_would_have_left(situation: Situation):
    """After every step, so that the state also goes into the user's optimizer and out of it
    again."""
    truth = plain_run(situation)
    model = situation.model()
    optimizers = situation.optimizer(model)
    torch.manual_seed(SEED)
    for t in range(STEPS):
        with innerloop.track(model, optimizers, learn="nothing") as loop:
            loop.step(situation.loss(loop.model, t))
            loop.commit()
    assert_params({n: p.detach() for n, p in named(model).items()}, truth.params[-1], 1e-12)
    assert_params(named_buffers(model), truth.buffers[-1], 1e-12)
    for ours, theirs in zip(optimizers, truth.optimizers, strict=True):
        assert_states(ours.state_dict(), theirs.state_dict(), 1e-12)
    assert situation.outer_loss(model).item() == pytest.approx(truth.outer, rel=1e-12)


@pytest.mark.covering
@EVERY_LEARN
@each_situation()
def test_track_leaves_the_users_objects_alone(situation: Situation, learn: Learn):
    model = situation.model()
    optimizers = situation.optimizer(model)
    before = Everything(model, optimizers)
    with running(situation, model, optimizers, learn=learn) as loop:
        outer = situation.outer_loss(loop.model)
        loop.detach()
    before.assert_unchanged()
    if learn == "init":
        outer.backward()
        before.assert_unchanged(but_gradients=True)


@each_situation()
def test_track_gives_the_same_in_every_episode(situation: Situation):
    """Nothing leaks from one to the next, and gradients add up."""
    model = situation.model()
    optimizers = situation.optimizer(model)
    outer_loss(situation, model, optimizers).backward()
    once = {name: None if p.grad is None else p.grad.clone() for name, p in named(model).items()}
    for _ in range(2):
        outer_loss(situation, model, optimizers).backward()
    for name, p in named(model).items():
        first = once[name]
        assert (p.grad is None) == (first is None)
        if first is not None:
            torch.testing.assert_close(p.grad, 3 * first, rtol=1e-12, atol=1e-14)


class Everything:
    """The user's objects as they were: identities, values, flags, gradients, attributes, optimizer
    state."""

    def __init__(self, model: Any, optimizers: Optimizers) -> None:
        self.model, self.optimizers = model, optimizers
        self.tensors = dict(self._tensors())
        self.values = {
            name: (x.detach().clone(), x.requires_grad, x._version)
            for name, x in self.tensors.items()
        }
        self.attributes = self._attributes()
        self.states = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*named(self.model).items(), *named_buffers(self.model).items()]

    def _modules(self) -> list[nn.Module]:
        roots = [self.model] if isinstance(self.model, nn.Module) else list(self.model.values())
        return [module for root in roots for module in root.modules()]

    def _attributes(self) -> list[dict[str, Any]]:
        # torch.func.functional_call renews this cache of nn.RNNBase, which notices by itself when
        # it is out of date.
        return [
            {
                key: copy.copy(x) if isinstance(x, (dict, list)) else x
                for key, x in vars(m).items()
                if key != "_flat_weight_refs"
            }
            for m in self._modules()
        ]

    def assert_unchanged(self, *, but_gradients: bool = False) -> None:
        assert [(name, id(x)) for name, x in self._tensors()] == [
            (name, id(x)) for name, x in self.tensors.items()
        ]
        for name, x in self.tensors.items():
            value, requires_grad, version = self.values[name]
            assert torch.equal(x.detach(), value), name
            assert x.requires_grad == requires_grad, name
            assert x._version == version, name
            assert but_gradients or x.grad is None, name
        for now, before in zip(self._attributes(), self.attributes, strict=True):
            assert now.keys() == before.keys()
            assert all(same(now[key], before[key]) for key in now)
        for optimizer, state in zip(self.optimizers, self.states, strict=True):
            assert_states(optimizer.state_dict(), state, 0)


def same(a: Any, b: Any) -> bool:
    """The same objects, one level deep."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, (bool, int, float, str)) and a == b)


def assert_states(ours: Any, truth: Any, tolerance: float) -> None:
    """Two ``state_dict``s of a torch optimizer are equal."""
    assert ours["param_groups"] == truth["param_groups"]
    torch.testing.assert_close(ours["state"], truth["state"], rtol=tolerance, atol=tolerance)


# -- Problem.from_module ---------------------------------------------------------------------------


class Outer(nn.Module):
    """A situation's outer loss as a module, to be called at other parameters."""

    def __init__(self, situation: Situation, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outer_loss = situation.outer_loss

    def forward(self) -> Tensor:
        return self.outer_loss(self.model)


def unrolled(
    situation: Situation,
) -> tuple[Tensor, innerloop.Trajectory, dict[str, Any], nn.Module]:
    """``(outer loss, trajectory, gradients, the user's model)``."""
    model = situation.model()
    optimizers = situation.optimizer(model)
    before = Everything(model, optimizers)
    problem = innerloop.Problem.from_module(
        model,
        lambda m, hyper, t: situation.loss(m, t),
        innerloop.optim.from_torch(optimizers, model),
        optimizer_hyper=lambda hyper, t: {"lr": list(hyper)},
    )

    def outer(traj: innerloop.Trajectory, hyper: Any) -> tuple[Tensor, innerloop.Trajectory]:
        call, start, _ = innerloop.functional(Outer(situation, situation.model()))
        prefixed = [
            {f"model.{name}": x for name, x in tensors.items()}
            for tensors in (traj.params, traj.at(-1).buffers)
        ]
        return call({**start, **prefixed[0]}, buffers=prefixed[1])[0], traj

    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lrs = [lr.detach() for lr in lr_leaves(optimizers)]
    torch.manual_seed(SEED)
    (loss, traj), gradients = innerloop.metagradient(
        outer, problem, params, list(range(STEPS)), hyper=lrs
    )
    before.assert_unchanged()
    return loss, traj, gradients, model


@each_situation(is_unrolled)
def test_unroll_runs_as_torch_does(situation: Situation):
    truth = plain_run(situation)
    loss, traj, _, _ = unrolled(situation)
    assert loss.item() == pytest.approx(truth.outer, rel=1e-12)
    torch.testing.assert_close(traj.losses, torch.tensor(truth.losses), rtol=1e-12, atol=0)
    for time in range(STEPS + 1):
        expected = {
            name: p for name, p in truth.params[time].items() if name in traj.at(time).params
        }
        assert_params(traj.at(time).params, expected, 1e-12)
        assert_params(traj.at(time).buffers, truth.buffers[time], 1e-12)


@each_situation(lambda situation: is_unrolled(situation) and has_gradient(situation))
def test_unroll_differentiates(situation: Situation):
    _, _, gradients, _ = unrolled(situation)
    for truth, direction in zip(
        true_init_derivatives(situation), fixed_directions(situation), strict=True
    ):
        assert_derivative(along(gradients["params"], direction), truth, situation.name)
    assert_derivative(
        sum(g.item() for g in gradients["hyper"]), true_lr_derivative(situation), situation.name
    )


# -- functional ------------------------------------------------------------------------------------


class Loss(nn.Module):
    """A situation's loss as a module's forward, so that `innerloop.functional` meets every
    situation."""

    def __init__(self, situation: Situation, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = situation.loss

    def forward(self, t: int) -> Tensor:
        return self.loss(self.model, t)


def is_one_module(situation: Situation) -> bool:
    return isinstance(situation.make(), nn.Module)


def moved(params: Mapping[str, Tensor], situation: Situation) -> dict[str, Tensor]:
    """Other parameters than the model's own."""
    direction = fixed_directions(situation)[0]
    return {
        name: p + 0.1 * direction.get(name.removeprefix("model."), torch.zeros(()))
        for name, p in params.items()
    }


@each_situation(is_one_module)
def test_functional_is_the_module_at_other_parameters(situation: Situation):
    """Truth: another copy of the module into which the parameters are written."""
    model = situation.model()
    before = Everything(model, [])
    call, params, buffers = innerloop.functional(Loss(situation, model))
    assert_params(
        {name.removeprefix("model."): p for name, p in params.items()},
        {n: p.detach() for n, p in named(model).items()},
        0,
    )
    params = moved(params, situation)
    reference = situation.model()
    with torch.no_grad():
        for name, p in named(reference).items():
            p.copy_(params[f"model.{name}"])
    torch.manual_seed(SEED)
    expected = situation.loss(reference, 0)
    torch.manual_seed(SEED)
    output, new_buffers = call(params, 0, buffers=buffers)
    torch.testing.assert_close(output, expected.detach(), rtol=1e-13, atol=0)
    assert_params(
        {n.removeprefix("model."): b for n, b in new_buffers.items()},
        named_buffers(reference),
        1e-13,
    )
    before.assert_unchanged()
    torch.manual_seed(SEED)
    assert torch.equal(call(params, 0), output)
    before.assert_unchanged()
