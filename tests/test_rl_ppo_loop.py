"""A PPO inner loop, several epochs of minibatches with Adam, differentiated in every way, against
finite differences of the same loop written with torch.optim.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop
from innerloop import rl
from tests import rl_plain_ppo as plain
from tests.oracles import assert_derivative, directional, directions, inner, smooth_noise

TASKS = (2, 3, 4, 11, 12, 16, 17, 18)
"""Tasks whose ratios stay away from the edges of the clip range."""
LOOPS = {"bed D": (2, 16), "2 epochs x 4 minibatches": (2, 8)}
STRATEGIES = {
    "StoreAll": innerloop.StoreAll(),
    "Checkpointed": innerloop.Checkpointed(),
    "Checkpointed, one slot": innerloop.Checkpointed(slots=1),
}


def rollout_of(d: plain.Data) -> rl.Rollout:
    return rl.Rollout(**d._asdict())


def ppo(model: Any, hyper: Any, batch: rl.Minibatch, advantages: rl.Advantages) -> rl.PPOLoss:
    logits, values = model(batch.observations)
    policy = rl.Categorical(logits)
    return rl.ppo_loss(
        policy.log_prob(batch.actions),
        batch.log_probs,
        batch.pick(advantages.advantages),
        values=values,
        returns=batch.pick(advantages.returns),
        entropy=policy.entropy(),
        clip=hyper["clip"],
        entropy_coef=hyper["entropy_coef"],
        value_coef=hyper["value_coef"],
    )


def problem(model: plain.ActorCritic) -> innerloop.Problem:
    def loss(model: Any, hyper: Any, batch: rl.Minibatch) -> Tensor:
        assert batch.rollout is not None
        advantages = batch.rollout.gae(gamma=hyper["gamma"], lam=hyper["lam"])
        return ppo(model, hyper, batch, advantages).loss

    adam = innerloop.optim.adam(eps=plain.EPS)
    return innerloop.Problem.from_module(model, loss, adam, optimizer_hyper=("lr",))


def by_strategy(
    d: plain.Data, epochs: int, size: int, strategy: Any, model: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    model = plain.ActorCritic() if model is None else model
    call, _, _ = innerloop.functional(model)
    batches = rollout_of(d).minibatches(epochs, size, order=plain.order(epochs), with_rollout=True)
    return innerloop.metagradient(
        lambda traj, hyper: plain.outer(call(traj.params, plain.other(d)), traj.losses),
        problem(model),
        {name: p.detach() for name, p in model.named_parameters()},
        batches,
        hyper=plain.hyper_tensors(),
        strategy=strategy,
    )


def by_track(d: plain.Data, epochs: int, size: int) -> tuple[Tensor, dict[str, Any]]:
    model = plain.ActorCritic()
    hyper = {name: x.requires_grad_() for name, x in plain.hyper_tensors().items()}
    rollout, losses = rollout_of(d), []
    advantages = rollout.gae(gamma=hyper["gamma"], lam=hyper["lam"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, eps=plain.EPS)
    with innerloop.track(model, optimizer, hyper={"lr": hyper["lr"]}) as loop:
        for batch in rollout.minibatches(epochs, size, order=plain.order(epochs)):
            loss = ppo(loop.model, hyper, batch, advantages).loss
            losses.append(loss)
            loop.step(loss)
        value = plain.outer(loop.model(plain.other(d)), torch.stack(losses))
    value.backward()
    params = {name: p.grad for name, p in model.named_parameters()}
    return value.detach(), {
        "params": params,
        "hyper": {name: x.grad for name, x in hyper.items()},
    }


@functools.cache
def truths(task: int, loop: str) -> dict[str, tuple[Any, float]]:
    """Directions, and the slope along each: every hyper-parameter alone, and the start."""
    d, (epochs, size) = plain.data(task), LOOPS[loop]
    params, hyper = plain.start(), plain.hyper_tensors()
    still = [{name: torch.zeros_like(x) for name, x in tree.items()} for tree in (params, hyper)]
    along: dict[str, Any] = {
        name: (still[0], {**still[1], name: torch.ones_like(x)}) for name, x in hyper.items()
    }
    steps = directions(params, 3)
    if task == TASKS[0]:
        along |= {f"initialisation, direction {k}": (v, still[1]) for k, v in enumerate(steps)}
    else:
        # One direction in all of them: enough to tell the tasks of a batch apart.
        along = {"everything": (steps[0], {name: x / 10 for name, x in hyper.items()})}
    slope = functools.partial(plain.outer_after, d=d, epochs=epochs, size=size)
    return {name: (v, directional(slope, (params, hyper), v)) for name, v in along.items()}


def assert_right(value: Tensor, grads: dict[str, Any], task: int, loop: str, what: str) -> None:
    at = plain.start(), plain.hyper_tensors()
    expected = plain.outer_after(at, plain.data(task), *LOOPS[loop])
    assert value.item() == pytest.approx(expected, abs=1e-11)
    for name, (v, slope) in truths(task, loop).items():
        found = inner((grads["params"], grads["hyper"]), v)
        assert_derivative(found, slope, f"{what}, task {task}: {name}", relative=1e-6)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("task", TASKS)
def test_the_loops_are_where_the_loss_is_smooth_and_clips(task: int, loop: str):
    margins = plain.run(plain.data(task), plain.start(), plain.HYPER, *LOOPS[loop]).margins
    assert margins.nearest > 1e-3
    assert 5 <= margins.clipped <= margins.total - 20


@pytest.mark.parametrize("loop", LOOPS)
def test_under_track(loop: str):
    assert_right(*by_track(plain.data(TASKS[0]), *LOOPS[loop]), TASKS[0], loop, "track")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_under_a_strategy(name: str, loop: str):
    value, grads = by_strategy(plain.data(TASKS[0]), *LOOPS[loop], STRATEGIES[name])
    assert_right(value, grads, TASKS[0], loop, name)


@pytest.mark.parametrize("name", ["StoreAll", "Checkpointed"])
def test_under_vmap_over_tasks(name: str):
    loop, model = "2 epochs x 4 minibatches", plain.ActorCritic()
    stacked = plain.Data(*map(torch.stack, zip(*map(plain.data, TASKS), strict=True)))

    def one(*fields: Tensor) -> Any:
        return by_strategy(plain.Data(*fields), *LOOPS[loop], STRATEGIES[name], model)

    values, grads = torch.func.vmap(one)(*stacked)
    for i, task in enumerate(TASKS):
        own = {kind: {key: x[i] for key, x in group.items()} for kind, group in grads.items()}
        assert_right(values[i], own, task, loop, f"vmap of {name}")


def rates() -> dict[str, Tensor]:
    """A learning rate for every number in the parameters."""
    return {
        name: 0.05 * (1 + smooth_noise(*p.shape, phase=80.0 + i) / 2)
        for i, (name, p) in enumerate(plain.start().items())
    }


def after_at_rates(chosen: dict[str, Tensor], d: plain.Data, epochs: int, size: int) -> float:
    """The plain loop with these rates: Adam's step at rate 1, scaled entry by entry."""
    model, losses = plain.ActorCritic(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, eps=plain.EPS)
    found = rollout_of(d).gae(gamma=plain.HYPER["gamma"], lam=plain.HYPER["lam"])
    for batch in rollout_of(d).minibatches(epochs, size, order=plain.order(epochs)):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss = ppo(model, plain.HYPER, batch, found).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name] + chosen[name] * (p - before[name]))
    with torch.no_grad():
        return plain.outer(model(plain.other(d)), torch.stack(losses)).item()


@pytest.mark.parametrize("name", ["track", "StoreAll", "Checkpointed", "vmap"])
def test_a_learning_rate_for_every_number_in_the_parameters(name: str):
    d, (epochs, size) = plain.data(TASKS[0]), LOOPS["2 epochs x 4 minibatches"]
    model, chosen = plain.ActorCritic(), rates()
    order, start = plain.order(epochs), plain.start()
    call, _, _ = innerloop.functional(model)

    def loss(params: Any, hyper: Any, batch: rl.Minibatch) -> Tensor:
        assert batch.rollout is not None
        found = batch.rollout.gae(gamma=plain.HYPER["gamma"], lam=plain.HYPER["lam"])
        return ppo(functools.partial(call, params), plain.HYPER, batch, found).loss

    problem = innerloop.Problem(
        loss,
        innerloop.optim.adam(eps=plain.EPS),
        optimizer_hyper=lambda hyper, t: {"lr": hyper},
    )

    def by_unroll(*fields: Tensor) -> Any:
        d = plain.Data(*fields)
        batches = rollout_of(d).minibatches(epochs, size, order=order, with_rollout=True)
        return innerloop.metagradient(
            lambda traj, hyper: plain.outer(call(traj.params, plain.other(d)), traj.losses),
            problem,
            start,
            batches,
            hyper=chosen,
            wrt="hyper",
            strategy=STRATEGIES.get(name),
        )

    if name == "track":
        learned = {n: x.requires_grad_() for n, x in chosen.items()}
        batches = rollout_of(d).minibatches(epochs, size, order=order, with_rollout=True)
        losses = []
        with innerloop.track(
            model, innerloop.optim.adam(eps=plain.EPS), learn="outer", hyper={"lr": learned}
        ) as loop:
            for batch in batches:
                losses.append(loss(loop.parameters(), None, batch))
                loop.step(losses[-1])
            value = plain.outer(loop.model(plain.other(d)), torch.stack(losses))
        grads = dict(zip(learned, torch.autograd.grad(value, list(learned.values())), strict=True))
    elif name == "vmap":
        stacked = plain.Data(*map(torch.stack, zip(*map(plain.data, TASKS), strict=True)))
        value, grads = torch.func.vmap(by_unroll)(*stacked)
        value, grads = value[0], {n: g[0] for n, g in grads.items()}
    else:
        value, grads = by_unroll(*d)
    at = {n: x.detach() for n, x in chosen.items()}
    slope = functools.partial(after_at_rates, d=d, epochs=epochs, size=size)
    assert value.item() == pytest.approx(slope(at), abs=1e-11)
    for step in directions(at, 2):
        small = {n: x / 10 for n, x in step.items()}
        assert_derivative(
            inner(grads, small), directional(slope, at, small), f"rates, {name}", relative=1e-6
        )


def test_advantages_may_be_computed_once_and_handed_in():
    """The same gradients of γ and λ, from `unroll` with the advantages in hyper."""
    d, loop = plain.data(TASKS[0]), "bed D"
    model = plain.ActorCritic()
    hyper: dict[str, Any] = {name: x.requires_grad_() for name, x in plain.hyper_tensors().items()}
    rollout = rollout_of(d)
    found = rollout.gae(gamma=hyper["gamma"], lam=hyper["lam"])
    traj = innerloop.unroll(
        innerloop.Problem.from_module(
            model,
            lambda model, hyper, batch: ppo(model, hyper, batch, hyper["advantages"]).loss,
            innerloop.optim.adam(eps=plain.EPS),
            optimizer_hyper=("lr",),
        ),
        None,
        rollout.minibatches(*LOOPS[loop], order=plain.order(2)),
        hyper={**hyper, "advantages": found},
        strategy=innerloop.Checkpointed(),
    )
    call, _, _ = innerloop.functional(model)
    value = plain.outer(call(traj.params, plain.other(d)), traj.losses)
    value.backward()
    grads = {
        "params": {name: p.grad for name, p in model.named_parameters()},
        "hyper": {name: x.grad for name, x in hyper.items()},
    }
    assert_right(value.detach(), grads, TASKS[0], loop, "advantages in hyper")


def test_the_clip_range_does_not_move_the_adapted_policy():
    """Between two jumps: what is clipped has no gradient, wherever the edge is. The losses move."""
    d, (epochs, size) = plain.data(TASKS[0]), LOOPS["bed D"]
    runs = [
        plain.run(d, plain.start(), {**plain.HYPER, "clip": clip}, epochs, size)
        for clip in (0.2, 0.2001)
    ]
    moved = [
        (a - b).abs().max().item()
        for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True)
    ]
    assert max(moved) == 0
    assert (runs[0].losses - runs[1].losses).abs().max() > 1e-6


# -- where gradients vanish ------------------------------------------------------------------------


def clipped_everywhere(d: plain.Data) -> tuple[rl.Rollout, rl.Advantages]:
    """A rollout whose every sample is clipped: the ratio is near 1.6 where the advantage is
    positive, and near .6 where it is negative."""
    rollout = rollout_of(d)
    found = rollout.gae(gamma=0.9, lam=0.8)
    with torch.no_grad():
        logits, _ = plain.ActorCritic()(d.observations)
        now = rl.Categorical(logits).log_prob(d.actions)
    shift = torch.where(found.advantages > 0, -0.5, 0.5)
    return rollout._replace(log_probs=now + shift), found


def actor_loss(model: Any, batch: rl.Minibatch, advantages: Tensor, clip: Any = 0.2) -> rl.PPOLoss:
    logits, _ = model(batch.observations)
    log_probs = rl.Categorical(logits).log_prob(batch.actions)
    return rl.ppo_loss(
        log_probs, batch.log_probs, batch.pick(advantages), clip=clip, normalize=False
    )


@pytest.mark.parametrize("rule", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.SGD])
def test_a_fully_clipped_minibatch_contributes_nothing_and_stays_finite(rule: Any):
    d = plain.data(0)
    rollout, found = clipped_everywhere(d)
    model = plain.ActorCritic()
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    clip = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    optimizer = rule(model.parameters(), lr=0.05)
    with innerloop.track(model, optimizer, hyper={"lr": lr}) as loop:
        for batch in rollout.minibatches(2, 16, order=plain.order(2)):
            out = actor_loss(loop.model, batch, found.advantages, clip)
            assert out.clip_fraction == 1
            loop.step(out.loss)
        moved = loop.parameters(time=-1)
        value = plain.outer(loop.model(plain.other(d)), torch.zeros(1, dtype=torch.float64))
    for name, p in model.named_parameters():
        assert torch.equal(moved[name], p), name
    with torch.autograd.set_detect_anomaly(True):
        value.backward()
    # Nothing moved, so the outer gradient is that of the outer loss alone, and lr and clip do not
    # matter.
    same = copy.deepcopy(model)
    same.zero_grad()
    plain.outer(same(plain.other(d)), torch.zeros(1, dtype=torch.float64)).backward()
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    assert lr.grad is None or lr.grad == 0
    assert clip.grad is None or clip.grad == 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_fully_clipped_minibatch_between_two_others(name: str):
    """Adam's averages carry the first step's gradient through it; everything stays finite, and
    right."""
    d = plain.data(TASKS[0])
    rollout, found = clipped_everywhere(d)
    clipped = rollout.minibatches(1, 32, order=torch.arange(32).unsqueeze(0))
    usual = rollout_of(d).minibatches(1, 32, order=torch.arange(32).unsqueeze(0))
    batches = usual + clipped + usual
    lr = torch.tensor(0.002, dtype=torch.float64)

    def loss(model: Any, hyper: Any, batch: rl.Minibatch) -> Any:
        out = actor_loss(model, batch, found.advantages)
        return out.loss, out.clip_fraction

    model = plain.ActorCritic()
    problem = innerloop.Problem.from_module(
        model, loss, innerloop.optim.adam(eps=plain.EPS), optimizer_hyper=("lr",)
    )
    call, _, _ = innerloop.functional(model)
    fractions: list[Tensor] = []

    def outer(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
        fractions.append(traj.aux)
        return plain.outer(call(traj.params, plain.other(d)), traj.losses)

    _, grads = innerloop.metagradient(
        outer, problem, plain.start(), batches, hyper={"lr": lr}, strategy=STRATEGIES[name]
    )
    assert fractions[0][1] == 1
    assert fractions[0][0] < 1

    def after(lr: Tensor) -> float:
        model = plain.ActorCritic()
        optimizer = torch.optim.Adam(model.parameters(), lr=float(lr), eps=plain.EPS)
        losses = []
        for batch in batches:
            out = actor_loss(model, batch, found.advantages)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.detach())
        with torch.no_grad():
            return plain.outer(model(plain.other(d)), torch.stack(losses)).item()

    truth = directional(after, lr, torch.ones_like(lr), largest=1e-4)
    assert_derivative(grads["hyper"]["lr"].item(), truth, name)
    assert all(g.isfinite().all() for g in grads["params"].values())


@pytest.mark.parametrize("name", STRATEGIES)
def test_clipping_a_gradient_of_norm_zero_is_finite(name: str):
    d = plain.data(0)
    rollout, found = clipped_everywhere(d)
    model = plain.ActorCritic()
    problem = innerloop.Problem.from_module(
        model,
        lambda model, hyper, batch: actor_loss(model, batch, found.advantages).loss,
        innerloop.optim.chain(
            innerloop.optim.clip_by_global_norm(0.5), innerloop.optim.adam(eps=plain.EPS)
        ),
        optimizer_hyper=("lr", "clip_by_global_norm.max_norm"),
    )
    call, _, _ = innerloop.functional(model)
    _, grads = innerloop.metagradient(
        lambda traj, hyper: plain.outer(call(traj.params, plain.other(d)), traj.losses),
        problem,
        plain.start(),
        rollout.minibatches(2, 16, order=plain.order(2)),
        hyper={
            "lr": torch.tensor(0.05).double(),
            "clip_by_global_norm.max_norm": torch.tensor(0.5).double(),
        },
        strategy=STRATEGIES[name],
    )
    assert grads["hyper"]["lr"] == 0
    assert grads["hyper"]["clip_by_global_norm.max_norm"] == 0
    assert all(g.isfinite().all() for g in grads["params"].values())
