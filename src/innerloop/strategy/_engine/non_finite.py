"""The first step of a loop that is not finite, and the operation: found by running it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop._carry import Carry, _alias
from innerloop._utils import torch_private, tree
from innerloop._utils.finite import all_finite, is_finite
from innerloop._utils.progress import silent
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop.errors import InnerLoopError, NonFiniteError
from innerloop.strategy._base import Loop
from innerloop.strategy._engine.step_pullback import OutputCotangents, Step, reverse, state_of

WRITE = (
    "Lower the learning rate, or keep the operation away from that point: (x + eps).sqrt() in "
    "place of x.sqrt()"
)


def watched(loop: Loop) -> Loop:
    """Return the loop with inputs that look at the gradient which arrives at them.

    It is looked at once, where it leaves the loop; if it is not finite, `explanation` raises.
    """
    # On constants, or the graph would hold itself alive.
    again = _constant(loop)

    def watch(x: Tensor, name: str) -> Tensor:
        if not (x.requires_grad and tree.differentiable(x)):
            return x
        alias: Tensor = _alias(x)

        def look(grads: Sequence[Tensor | None]) -> None:
            if not all_finite(g for g in grads if g is not None):
                raise explanation(again, f"the gradient of {name}")

        assert alias.grad_fn is not None
        alias.grad_fn.register_prehook(look)
        return alias

    params = {n: watch(p, f"params[{n!r}]") for n, p in loop.start.params.items()}
    hyper = tree.map_tensors(lambda x: watch(x, "hyper"), loop.hyper)
    return loop._replace(start=loop.start._replace(params=params), hyper=hyper)


def _constant(loop: Loop) -> Loop:
    hyper = tree.map_tensors(Tensor.detach, loop.hyper)
    return loop._replace(start=loop.start.detach(), hyper=hyper, report=silent)


def explanation(loop: Loop, what: str) -> NonFiniteError:
    """Return the error that says why ``what``, seen after a loop, is not finite.

    The loop is run again, step by step, unless its data can be had once only.
    """
    if loop.batches.single_pass:
        return NonFiniteError(
            f"{what} is not finite. The step cannot be looked for, because the iterator of batches "
            f"is used up: pass a list, or look at traj.losses. {WRITE}"
        )
    loop = _constant(loop)
    random_state = loop.start.random_state or RandomState.now()
    try:
        with at_random_state(random_state), torch.enable_grad():
            found = _first(loop)
    except (InnerLoopError, RuntimeError) as error:
        found = f"and running the loop again raises: {error}"
    return NonFiniteError(f"{what} is not finite: {found}. {WRITE}")


def _first(loop: Loop) -> str:
    """Return a clause about the first step that is not finite."""
    carry = loop.start
    if not all_finite(carry.params.values()):
        return "the loop starts from parameters that are not finite"
    states: list[tuple[Carry, object]] = []
    for t in loop.batches.times():
        states.append((carry, loop.batch(carry, t)))
        with _Finder() as finder:
            new, loss, _ = loop.step(*states[-1], t)
        if not is_finite(loss):
            return (
                f"the loss of step {t} is {loss.item()}{finder}: the inner loop diverged, or the "
                "loss is not defined there"
            )
        if not all_finite(new.params.values()):
            return (
                f"the loss of step {t} is finite, but its inner gradient or update is not{finder}"
            )
        carry = new.detach()
    # From the end, as the outer gradient runs.
    after = carry
    for t, (before, batch) in reversed(list(enumerate(states))):
        with _Finder() as finder:
            pulled = _pulled(loop, before, after, batch, t)
        after = before
        if not all_finite(x for x in pulled if x is not None):
            return f"a second derivative in step {t} is not, though its loss is{finder}"
    return (
        "every step of the inner loop and its second derivatives are finite, so look at the outer "
        "loss (or the gradient grew by the product of many steps until it overflowed)"
    )


def _pulled(loop: Loop, carry: Carry, after: Carry, batch: object, t: int) -> list[Tensor | None]:
    """Return what a cotangent of ones becomes behind step t."""
    wanted = [tree.differentiable(x) for x in tree.leaves(loop.hyper)]
    ones = [
        torch.ones_like(x) if i < len(carry.params) and tree.differentiable(x) else None
        for i, x in enumerate(tree.leaves(state_of(after)))
    ]
    step = Step(loop.problem, carry, loop.hyper, batch, loop.time(t), wanted, set(), None)
    found = reverse(step, OutputCotangents(ones, None, []))
    return [*found.state, *found.hyper]


class _Finder:
    """A block that notes the first operations whose result is not finite, though the inputs are.

    ``str`` of it is a clause that names them.
    """

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._mode = torch_private.observing_operations(self._look)
        self._enter: Callable[[], Any] = self._mode.__enter__

    def __enter__(self) -> _Finder:
        self._enter()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    def _look(self, name: str, inputs: object, result: object) -> None:
        if len(self._names) == 2 or "fill" in name or "full" in name:
            return
        before = [x for x in tree.tensors(inputs) if tree.differentiable(x)]
        after = [x for x in tree.tensors(result) if tree.differentiable(x)]
        if not before or all_finite(after):
            return
        nan = any(bool(x.isnan().any()) for x in after)
        kind = "nan" if nan else "inf"
        if kind in self._names or any(bool(x.isnan().any()) for x in before):
            return
        if kind == "nan" or all_finite(before):
            self._names[kind] = name.removeprefix("aten.")

    def __str__(self) -> str:
        if not self._names:
            return ""
        return " (first " + ", then ".join(f"{k} in {n}" for k, n in self._names.items()) + ")"
