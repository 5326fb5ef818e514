"""The meta-gradient compiled as a whole, and compared with the eager one."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

from innerloop._inner_gradient.graph import refusing_own_functions
from innerloop._metagradient.unreached import Unreached
from innerloop._problem import Problem
from innerloop._types import Result
from innerloop._utils import tree
from innerloop._utils.caches import cache
from innerloop._utils.compiled_check import LaterChecks, Trust, check_compiled, moved_by_rounding
from innerloop._utils.compiling import Compiled
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop._utils.traceable import refuse_numpy
from innerloop.nn._catalogue import HIDDEN
from innerloop.nn._mode import unwatched
from innerloop.strategy._base import Strategy
from innerloop.strategy._outer_gradient import Inputs, Objective

WHAT = "the meta-gradient"


class _Whole:
    """The compiled meta-gradient of one problem and one outer loss.

    Attributes:
        call: the compiled `Strategy.value_and_grad`.
        verified: shapes and settings at which it was compared with eager code.
        trust, later: what was compared, and when it is compared again.
        lock: what a thread holds while it calls and compares.
    """

    def __init__(self) -> None:
        def value_and_grad(strategy: Any, objective: Any, inputs: Any, wrt: Any) -> Any:
            return strategy.value_and_grad(objective, inputs, wrt)

        self.call = Compiled(value_and_grad, WHAT, HIDDEN, unwatched)
        self.verified: set[object] = set()
        self.trust, self.later = Trust(), LaterChecks()
        self.lock = threading.RLock()


_wholes: MutableMapping[Problem, dict[object, _Whole]] = cache("compiled meta-gradients", weak=True)


def compiled_value_and_grad(
    strategy: Strategy,
    objective: Objective[Result],
    inputs: Inputs,
    wrt: tuple[str, ...],
    unreached: Unreached,
    variant: tuple[object, ...],
) -> tuple[Result, dict[str, Any]]:
    """Return `Strategy.value_and_grad`, compiled as a whole.

    A transform over a compiled function would run eagerly, so the compiler goes outermost.

    Args:
        variant: what the code depends on besides ``inputs``; the first of them is the outer loss.
    """
    outer, *settings = variant
    # By the code of the outer loss: a function that is made anew at each call has the same.
    key = getattr(outer, "__code__", outer)
    whole = _wholes.setdefault(unreached.problem, {}).setdefault(key, _Whole())
    with whole.lock:
        return _checked(whole, strategy, objective, inputs, wrt, unreached, settings, outer)


def _checked(
    whole: _Whole,
    strategy: Strategy,
    objective: Objective[Result],
    inputs: Inputs,
    wrt: tuple[str, ...],
    unreached: Unreached,
    settings: list[object],
    outer: object,
) -> tuple[Result, dict[str, Any]]:
    """Call the compiled meta-gradient, and compare it with eager code where that is due."""

    def eager(inputs: Inputs = inputs) -> tuple[Result, dict[str, Any]]:
        with refusing_own_functions(), at_random_state(random_state):
            return strategy.value_and_grad(objective, inputs, wrt)

    def perturbed() -> dict[str, object]:
        # An outer loss that eager code finds to be exactly 0 may be the rounding of its terms.
        result, grads = eager(moved_by_rounding(inputs, whole.call.precision))
        return _groups(result, unreached.filled(inputs, grads))

    def explain() -> None:
        eager()
        problem = unreached.problem
        refuse_numpy("a loss of the meta-gradient", (outer, problem.loss, problem.targets))

    random_state = RandomState.now()
    begin = time.perf_counter()
    with whole.trust.at_stake(whole.call):
        result, grads = whole.call(strategy, objective, inputs, wrt, explain=explain)
    end = time.perf_counter()
    shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in tree.tensors(inputs))
    kind = (shapes, wrt, strategy, *settings)
    known = whole.trust.covers(whole.call.compilations) and kind in whole.verified
    if known:
        whole.later.called(end - begin)
    if not known or whole.later.due():
        with whole.trust.at_stake():
            eager_result, eager_grads = eager()
            eager_grads = unreached.filled(inputs, eager_grads)
            expected = _groups(eager_result, eager_grads)
            check_compiled(_groups(result, grads), expected, WHAT, perturbed=perturbed)
        whole.verified.add(kind)
        whole.trust.gained(whole.call.compilations)
        whole.later.checked(time.perf_counter() - end)
    return tree.map_tensors(Tensor.detach, (result, grads))


def _groups(result: object, grads: Mapping[str, object]) -> dict[str, object]:
    """Return what `metagradient` gives, by groups of one scale."""
    loss, *aux = result if isinstance(result, tuple) else (result,)
    gradients = {f"gradient of {name}": group for name, group in grads.items()}
    return {"loss": loss, "aux": aux, **gradients}
