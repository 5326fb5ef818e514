"""Is an adapted optimizer right? Compare it with the class itself and finite differences."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from innerloop._types import ValueAndGrad
from innerloop._utils import tree
from innerloop._utils.differences import four_point
from innerloop.errors import InvalidInputError, NotDifferentiableError

STEPS = 6  # enough for what only starts at the second, third or fifth step
FORWARD = 3e-11
GRADIENT = 1e-6
"""Of the classes of pytorch_optimizer, right ones are off by 2e-11 and 1e-7 at most."""
Named = Mapping[str, Tensor]
At = tuple[dict[str, Tensor], dict[str, Any]]


@runtime_checkable
class Steps(Protocol):
    """What is verified: an adapted class, without the comparisons that it makes itself."""

    make: Callable[[dict[str, Tensor]], torch.optim.Optimizer]
    needs_closure: bool

    def start(self, params: Named) -> Any:
        """Return the state before the first step."""

    def run(
        self,
        grads: Named,
        state: Any,
        params: Named,
        hyper: Mapping[str, Any] | None = None,
        value_and_grad: ValueAndGrad | None = None,
        hold: list[Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], Any]:
        """Take one step."""


def verify(
    adapted: Steps, shapes: Mapping[str, Sequence[int]], hyper: Mapping[str, Any] | None = None
) -> None:
    """Take six steps on a smooth problem with parameters of these shapes, in float64.

    Args:
        adapted: the optimizer.
        shapes: of the named parameters.
        hyper: hyper-parameters; where they are 0-dim tensors, their gradient is compared too.

    Raises:
        InvalidInputError: the class itself fails on this problem.
        NotDifferentiableError: its steps or its gradient come out differently; with the numbers.
    """
    with (
        _float64(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
        torch.autograd.set_detect_anomaly(False),
    ):
        numbers = tree.map_tensors(
            lambda t: t.detach().double().cpu().reshape(()).clone(), dict(hyper or {})
        )
        task = _Task(adapted, shapes, numbers)
        start = (task.params(), tree.map_tensors(float, numbers))
        theirs, ours = task.plain(*start), task.tracked(*start)
        if task.draws:
            raise NotDifferentiableError(
                f"{adapted!r}: its step draws random numbers of Python's random module or of "
                "NumPy, which are not rewound where a step is run again. Write torch.rand(())"
            )
        _compare(adapted, theirs, ours)
        _repeat(adapted, task)
        for index in range(2):
            _differentiate(adapted, task, index)


def _foreign_random_states() -> tuple[object, ...]:
    """Return the states of the global generators that are not torch's."""
    numpy = sys.modules.get("numpy")
    return (random.getstate(), None if numpy is None else str(numpy.random.get_state(legacy=False)))


class _Task:
    r"""Losses :math:`\sum_i \sin(\theta_i + s + t/10) + 1.5\,\theta_i`, with s coupling all.

    Their gradients are between .3 and 2.8 in size.
    """

    def __init__(
        self, adapted: Steps, shapes: Mapping[str, Sequence[int]], hyper: dict[str, Any]
    ) -> None:
        self.adapted = adapted
        self.shapes = shapes
        self.hyper = hyper
        self.draws = False
        """True if a step of the class drew random numbers that are not torch's."""

    def params(self) -> dict[str, Tensor]:
        return {
            name: 0.6 * _noise(shape, float(i))
            for i, (name, shape) in enumerate(self.shapes.items())
        }

    def direction(self, index: int) -> At:
        params = {
            name: _noise(shape, 100.0 * (index + 1) + i)
            for i, (name, shape) in enumerate(self.shapes.items())
        }
        return params, tree.map_tensors(
            lambda value: 0.05 * (index + 1) * value.abs().clamp_min(0.01), self.hyper
        )

    def loss(self, params: Named, t: int) -> Tensor:
        v = torch.cat([p.reshape(-1) for p in params.values()])
        return ((v + v.mean().sin() / 2 + 0.1 * t).sin() + 1.5 * v).sum()

    def outer(self, params: Named) -> Tensor:
        v = torch.cat([p.reshape(-1) for p in params.values()])
        return (torch.arange(1.0, len(v) + 1) / 5 * v).cos().sum()

    def plain(self, params: Named, hyper: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the class itself, as its users do."""
        torch.default_generator.manual_seed(
            0
        )  # torch.manual_seed would seed the user's other devices, too
        leaves = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
        try:
            optimizer = self.adapted.make(dict(leaves))
            for group in optimizer.param_groups:
                group.update((k, v) for k, v in hyper.items() if k in group)
            for t in range(STEPS):

                def closure(t: int = t) -> Tensor:
                    optimizer.zero_grad()
                    with torch.enable_grad():
                        loss = self.loss(leaves, t)
                        loss.backward()
                    return loss

                # An adapted optimizer always has the gradient where it starts, whatever its closure
                # does.
                closure()
                before = _foreign_random_states()
                if self.adapted.needs_closure:
                    optimizer.step(closure)  # type: ignore[arg-type]
                else:
                    optimizer.step()
                self.draws = self.draws or _foreign_random_states() != before
        except Exception as error:
            raise InvalidInputError(
                f"{self.adapted!r}: the class itself fails on parameters of shapes "
                f"{[tuple(p.shape) for p in params.values()]}: "
                f"{type(error).__name__}: {error}. If step() needs a closure, write adapt(..., "
                "closure=True); if the constructor "
                "needs more than a list of parameters, pass a function from named parameters to "
                "the optimizer: "
                "adapt(lambda named: MyOptimizer([{'params': [...]}, ...]))"
            ) from error
        return {name: p.detach() for name, p in leaves.items()}

    def tracked(
        self, params: Named, hyper: Mapping[str, Any], state: Any = None
    ) -> dict[str, Tensor]:
        """Run the adapted class, differentiable in both arguments.

        It begins from ``state``, if there is one.
        """
        torch.default_generator.manual_seed(0)
        made = self.adapted.start(params)  # always, for the random numbers that it may draw
        now, state = dict(params), made if state is None else state
        seen: list[
            Tensor
            # Kept alive, so that no step meets the identity of an earlier one's parameter by
            # chance.
        ] = []
        for t in range(STEPS):

            def value_and_grad(params: Named, t: int = t) -> tuple[Tensor, dict[str, Tensor]]:
                with torch.enable_grad():
                    params = {
                        n: p if p.requires_grad else p.detach().requires_grad_()
                        for n, p in params.items()
                    }
                    loss = self.loss(params, t)
                    found = torch.autograd.grad(loss, list(params.values()), create_graph=True)
                return loss, dict(zip(params, found, strict=True))

            now, state = self.adapted.run(
                value_and_grad(now)[1], state, now, hyper, value_and_grad, seen
            )
        return now


def _compare(adapted: Steps, theirs: Named, ours: Named) -> None:
    filled = {n: p for n, p in theirs.items() if p.numel()}
    worst = max(
        float((ours[n].detach() - p).abs().max()) / max(1.0, float(p.abs().max()))
        for n, p in filled.items()
    )
    if not worst <= FORWARD:
        raise NotDifferentiableError(
            f"{adapted!r}: after {STEPS} steps its parameters are off those of the class itself "
            f"by {worst:.1e} (allowed {FORWARD:.0e}): it "
            "does something to tensors that adapt does not follow. Write its rule as an "
            "innerloop.optim.Rule"
        )


def _repeat(adapted: Steps, task: _Task) -> None:
    """Take the same steps twice from one state.

    Whatever else changes between steps would not be rewound where steps are replayed.
    """
    params, state = task.params(), adapted.start(task.params())
    first, again = (task.tracked(params, task.hyper, state) for _ in range(2))
    if not all(torch.allclose(p, again[name], rtol=0, atol=FORWARD) for name, p in first.items()):
        raise NotDifferentiableError(
            f"{adapted!r}: the same {STEPS} steps from the same state end elsewhere the second "
            "time: something that its step changes is "
            "neither in the optimizer's state, groups nor attributes (a function that counts its "
            "calls, a generator of random numbers, a "
            "global). Keep it on the optimizer, as a number or a tensor"
        )


def _differentiate(adapted: Steps, task: _Task, index: int) -> None:
    along, in_hyper = task.direction(index)
    params = {name: p.requires_grad_() for name, p in task.params().items()}
    hyper = tree.map_tensors(lambda value: value.clone().requires_grad_(), task.hyper)
    leaves, directions = (
        [*params.values(), *tree.tensors(hyper)],
        [*along.values(), *tree.tensors(in_hyper)],
    )
    outer = task.outer(task.tracked(params, hyper))
    try:
        found = torch.autograd.grad(outer, leaves, allow_unused=True, materialize_grads=True)
    except RuntimeError as error:
        raise NotDifferentiableError(
            f"{adapted!r}: an operation of its step has no derivative: {error}"
        ) from error
    slope = float(sum((g * v).sum() for g, v in zip(found, directions, strict=True)))

    def shifted(h: float) -> float:
        moved = {name: p.detach() + h * along[name] for name, p in params.items()}
        ways = tree.tensors(in_hyper)
        return float(
            task.outer(
                task.plain(moved, tree.map_tensors(lambda v: float(v + h * next(ways)), task.hyper))
            )
        )

    size = max(abs(slope), 1e-3) if slope == slope else 1.0
    truth, apart = _settled(shifted, 1e-7 * size)
    size = max(abs(truth), size)
    by = f" in the initialisation and in {list(hyper)}" if hyper else ""
    what = f"the derivative of an outer loss after {STEPS} steps{by}"
    if not apart <= GRADIENT * size:
        raise NotDifferentiableError(
            f"{adapted!r}: {what} cannot be confirmed: autograd gives {slope:.9g}, finite "
            "differences of the class do not settle "
            f"({truth:.9g}, changing by {apart:.1e} with the step): a jump, low precision, or a "
            "decomposition that is not smooth"
        )
    if not abs(slope - truth) <= GRADIENT * size:
        raise NotDifferentiableError(
            f"{adapted!r}: {what} is {slope:.9g} by autograd and {truth:.9g} by finite "
            "differences of the class (known to "
            f"{apart:.1e}): something in its step leaves the graph without a trace, or is rounded "
            "to half precision"
        )


def _settled(f: Callable[[float], float], enough: float) -> tuple[float, float]:
    """Return the derivative at 0 and its uncertainty.

    The uncertainty is how far three neighbouring steps are apart, for the step that is best.

    Three, because where something is rounded to float32 two neighbours may well agree by chance.
    """
    found = []
    for h in (
        4e-3,
        4e-4,
        2e-5,
        1e-6,
    ):  # a large one where the class calculates in float32, a small one near a kink
        estimates = sorted(four_point(f, h / 2**k) for k in range(3))
        found.append((estimates[1], estimates[2] - estimates[0]))
        if found[-1][1] <= enough:
            break
    return min(found, key=lambda pair: pair[1] if pair[1] == pair[1] else float("inf"))


def _noise(shape: Sequence[int], phase: float) -> Tensor:
    """Return fixed numbers in (-1, 1) and leave the random state alone."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1.0, count + 1.0) * 12.9898 + phase * 78.233).reshape(
        tuple(shape)
    )


@contextmanager
def _float64() -> Iterator[None]:
    """Make float64 the default type: at float32, rounding would hide the slope."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
