"""Training through every operation of the audit: equal to ``torch.optim``, differentiated as finite
differences say, or refused.

The list of operations is the one of ``innerloop doctor``. What the probe calls supported must be
right here; anything else may only fail loudly. Truth is a plain loop of ``torch.optim`` over the
plain module, and its finite differences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop.doctor import Case, all_cases, examine
from innerloop.doctor._cases.case import value
from tests.oracles import assert_derivative, derivative, smooth_noise

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore")]
STEPS = 3
RULES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.005, eps=0.1),
}
NO_TRUTH = {
    "torch.cholesky_inverse (full "
    "matrix)": "torch.optim descends along a wrong gradient there, ours is right"
}
SMOOTH = [case for case in all_cases() if case.smooth]


def loss_of(module: nn.Module, t: int) -> Tensor:
    return (1 + 0.1 * t) * value(module())


def direction(case: Case) -> dict[str, Tensor]:
    return {
        n: smooth_noise(*p.shape, phase=70.0 + i)
        for i, (n, p) in enumerate(case.module().named_parameters())
    }


def plain_run(
    case: Case, rule: str, h: float = 0.0, constants: tuple[dict[str, Tensor], ...] = ()
) -> Any:
    """``(outer loss, losses, buffers by time)`` of plain PyTorch from parameters moved by h.

    With ``constants``, the buffers of another run take the place of its own: what PyTorch holds
    constant in a derivative (the singular vectors of spectral norm) is held constant in the
    difference too. Evaluation mode is what leaves such buffers alone.
    """
    module = case.module()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.add_(h * direction(case)[name])
    optimizer = RULES[rule](module.parameters())
    losses, buffers = [], []
    for t in range(STEPS + 1):
        if constants:
            module.eval()
            for name, b in module.named_buffers():
                b.copy_(constants[t][name])
        loss = loss_of(module, t)
        losses.append(loss.item())
        buffers.append({name: b.clone() for name, b in module.named_buffers()})
        if t < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses[-1], losses[:-1], tuple(buffers)


@functools.cache
def truth(name: str, rule: str) -> tuple[float, list[float], float]:
    """``(outer loss, losses, derivative)``."""
    case = next(case for case in SMOOTH if case.name == name)
    outer, losses, buffers = plain_run(case, rule)
    constants = buffers if case.constants else ()
    return outer, losses, derivative(lambda h: plain_run(case, rule, h, constants)[0])


def by_track(case: Case, rule: str) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    module = case.module()
    with innerloop.track(module, RULES[rule](module.parameters())) as loop:
        for t in range(STEPS):
            loop.step(loss_of(loop.model, t))
        outer = loss_of(loop.model, STEPS)
        losses = loop.trajectory.losses.detach()
    outer.backward()
    return outer.detach(), losses, {name: p.grad for name, p in module.named_parameters()}


class Outer(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self) -> Tensor:
        return loss_of(self.inner, STEPS)


def by_unroll(case: Case, rule: str) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    module = case.module()
    optimizer = innerloop.optim.from_torch(RULES[rule](module.parameters()), module)
    problem = innerloop.Problem.from_module(module, lambda m, hyper, t: loss_of(m, t), optimizer)

    def outer(traj: innerloop.Trajectory, hyper: Any) -> tuple[Tensor, Tensor]:
        call, _, _ = innerloop.functional(Outer(module))
        prefixed = [
            {f"inner.{n}": x for n, x in xs.items()} for xs in (traj.params, traj.at(-1).buffers)
        ]
        return call(prefixed[0], buffers=prefixed[1])[0], traj.losses.detach()

    params = dict(module.named_parameters())
    (loss, losses), gradients = innerloop.metagradient(
        outer, problem, params, list(range(STEPS)), wrt=("params",)
    )
    return loss.detach(), losses, gradients["params"]


def check(case: Case, rule: str, method: Callable[[Case, str], Any]) -> None:
    try:
        outer, losses, gradients = method(case, rule)
    except (innerloop.InnerLoopError, RuntimeError, NotImplementedError):
        assert not examine(case).supported
        return
    if case.name in NO_TRUTH:
        return
    true_outer, true_losses, true_derivative = truth(case.name, rule)
    torch.testing.assert_close(losses, torch.tensor(true_losses), rtol=1e-10, atol=1e-12)
    assert outer.item() == pytest.approx(true_outer, rel=1e-10, abs=1e-12)
    along = [(g * direction(case)[name]).sum() for name, g in gradients.items() if g is not None]
    assert_derivative(float(sum(along)), true_derivative, case.name)


def first_of_each(cases: list[Case]) -> set[str]:
    """One case per operation."""
    return {
        case.name
        for case in reversed(
            {c.name.partition("(")[0].strip(): c for c in reversed(cases)}.values()
        )
    }


def parametrized() -> list[Any]:
    """One case per operation, and all that must be right whatever the probe says; the others take
    their time."""
    chosen = first_of_each([c for c in SMOOTH if c.family not in ("functions", "linear algebra")])
    now = lambda c, rule: c.name in chosen and rule == "sgd"  # noqa: E731
    return [
        pytest.param(
            case, rule, id=f"{case.name}-{rule}", marks=() if now(case, rule) else pytest.mark.slow
        )
        for case in SMOOTH
        for rule in RULES
    ]


@pytest.mark.parametrize(("case", "rule"), parametrized())
def test_training_through_an_operation_is_differentiated_or_refused(case: Case, rule: str) -> None:
    check(case, rule, by_track)
    check(case, rule, by_unroll)


MUST = {
    "losses": {"nn.CrossMapLRN2d"},
    "norms": {"nn.CrossMapLRN2d"},
    "parametrizations": set(),
    "recurrence": set(),
    "embeddings": {"F.embedding (by frequency)"},
    "distances": set(),
    "attention": set(),
}
"""Families that must be right, not refused, and the exceptions."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [c for c in SMOOTH if c.family in MUST and c.name not in MUST[c.family]],
    ids=lambda c: c.name,
)
def test_what_must_be_right_is_supported(case: Case) -> None:
    assert examine(case).supported
