"""Compare what comes out of a replayed step with what came out of the forward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._types import Params
from innerloop._utils import torch_private, tree
from innerloop._utils.fingerprint import Fingerprint
from innerloop.errors import InvalidInputError
from innerloop.strategy._engine.loop_function import differs
from innerloop.strategy._engine.step_pullback import After

SHARE = 0.05
"""How much of a step may differ by rounding, which Adam makes large where a gradient is zero."""


class ReplayCheck:
    """The results of the steps of one loop, as far as they show that a replay is another run.

    The losses are compared elsewhere. Noise in the gradient alone, or in a buffer, is seen in the
    next state, which the backward sweep has anyway; of the last state and of aux a fingerprint is
    kept.
    """

    def __init__(self) -> None:
        self._aux: dict[int, Fingerprint] = {}
        self._last: tuple[Fingerprint, Fingerprint] | None = None
        self._found: InvalidInputError | None = None

    def note_aux(self, t: int, aux: object) -> None:
        """Note the aux of step t in the forward pass."""
        if aux is not None:
            self._aux[t] = _fingerprint(aux)

    def note_last(self, carry: Carry) -> None:
        """Note the last state of the forward pass."""
        self._last = _fingerprint(carry.params), _fingerprint(carry.buffers)

    def raise_if_different(self) -> None:
        """Raise if `compare` has found a difference in this sweep."""
        found, self._found = self._found, None
        if found is not None:
            raise found

    def compare(
        self, t: int, before: Carry, after: After, later: Carry | None, kept: Params | None
    ) -> None:
        """Compare what a replayed step gave with what it gave in the forward pass.

        Args:
            t: the time of the step.
            before: the state before it.
            after: what came out.
            later: the state at time t + 1; None after the last step.
            kept: the inner gradient of the forward pass; None: it was not kept.
        """
        if t in self._aux and not _fingerprint(after.aux).agrees(self._aux[t]):
            self._found = differs(f"aux of step {t}, when the step was replayed, is")
        if later is None:
            ends = zip((after.params, after.buffers), self._last or (), strict=False)
            same = all(not now or _fingerprint(now).agrees(then) for now, then in ends)
        else:
            same = _agree(after.params, later.params, before.params) and _agree(
                after.buffers, later.buffers, before.buffers
            )
        if kept is not None and after.gradient is not None:
            same = same and _same_gradient(after.gradient, kept, before.params)
        if not same:
            self._found = differs(
                f"the gradient (or a buffer) of step {t}, when the step was replayed, is"
            )


def _fingerprint(values: object) -> Fingerprint:
    """Compute the fingerprint of what ``values`` are without transforms."""
    return Fingerprint.of(tree.map_tensors(torch_private.plain_form, values))


def _agree(
    found: Mapping[str, Tensor], seen: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> bool:
    """True if two results of one step are the same, up to rounding.

    Those that the tasks of ``vmap`` share in one of them, but not in the other, are passed over.
    """
    seen, before = (
        {n: torch_private.plain_form(x) for n, x in given.items()} for given in (seen, before)
    )
    if torch_private.inside_vmap():
        seen = {
            n: x
            for n, x in seen.items()
            if n in found and found[n].shape == x.shape == before[n].shape
        }
    if all(torch.equal(found[n], x) for n, x in seen.items() if n in found):
        return True
    error = step = size = 0.0
    eps = 0.0
    for name, x in seen.items():
        if tree.differentiable(x) and name in found and found[name].shape == x.shape:
            error = math.hypot(error, float((found[name] - x).double().norm()))
            step = math.hypot(step, float((x - before[name]).double().norm()))
            size = math.hypot(size, float(x.double().norm()))
            eps = max(eps, torch.finfo(x.dtype).eps)
        elif name in found and not torch.equal(found[name], x):
            return False
    limit: float = SHARE * step + 100 * eps * size
    return not error > limit


def _same_gradient(found: Params, kept: Params, params: Params) -> bool:
    """True if two gradients, taken in two ways, are the same up to rounding and finite steps."""
    error = size = scale = 0.0
    eps = 0.0
    for name, p in params.items():
        now, then, at = (torch_private.plain_form(x) for x in (found[name], kept[name], p))
        now, then = (x.to_dense() if x.layout is not torch.strided else x for x in (now, then))
        if now.shape == then.shape:
            error = math.hypot(error, float((now - then).norm()))
            size = math.hypot(size, float(then.norm()))
            scale = math.hypot(scale, float(at.norm()))
            eps = max(eps, torch.finfo(at.dtype).eps)
    limit: float = SHARE * size + eps**0.75 * (1 + scale)
    return not error > limit
