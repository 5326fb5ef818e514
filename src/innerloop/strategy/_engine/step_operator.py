"""The derivative of one step of training as a linear operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._inner_gradient.torch_errors import explain
from innerloop._linear.operator import LinearOperator, Vector
from innerloop._linear.products import lacks_forward_mode
from innerloop._utils import torch_private, tree
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop.errors import InnerLoopError, NotDifferentiableError
from innerloop.strategy._engine.step_pullback import (
    OutputCotangents,
    Step,
    carry_of,
    pull,
    state_of,
    takes_part,
)

_jvp: Any = torch.func.jvp


class StepPullback(LinearOperator):
    r"""The pullback of one step: from a cotangent of the new state to one of the old state.

    With :math:`s_{t+1} = F(s_t, \lambda)` it is the matrix :math:`(\partial F / \partial s)^T`. A
    state is the parameters, the optimizer's state and the buffers; vectors are aligned with
    ``tree.leaves(state_of(carry))``.

    Args:
        step: the step. ``step.wanted`` says for which leaves of hyper `both` gives a cotangent.
        product: how the second derivative is taken, as in `Checkpointed`.
    """

    def __init__(self, step: Step, product: str = "reverse") -> None:
        self.step = _at_own_random_numbers(step)
        self.product = product
        self.takes = self.gives = tree.leaves(state_of(step.carry))

    def __call__(self, vector: Vector) -> Vector:
        """Pull ``vector`` back to the old state."""
        return self.both(vector)[0]

    def both(self, vector: Vector) -> tuple[Vector, Vector]:
        """Pull ``vector`` back through one step, to ``(state, hyper)``."""
        with at_random_state(self.step.random_state):
            found = pull(self.product, self.step, OutputCotangents(vector, None, []))
        return found.state, found.hyper

    @property
    def T(self) -> StepPushforward:  # noqa: N802
        """Return the derivative of the step, which pushes tangents of the old state forward."""
        return StepPushforward(self.step, self.product)


class StepPushforward(LinearOperator):
    r"""The derivative of one step, :math:`\partial F / \partial s`: it needs forward mode.

    Args:
        step: the step.
        product: of the pullback that is its transpose.
    """

    def __init__(self, step: Step, product: str = "reverse") -> None:
        self.step = _at_own_random_numbers(step)
        self.product = product
        self.takes = self.gives = tree.leaves(state_of(step.carry))

    def __call__(self, vector: Vector) -> Vector:
        """Push ``vector`` forward to the new state."""
        return self.advance(vector)[0]

    def advance(self, vector: Vector, of_hyper: Vector | None = None) -> tuple[Vector, Carry]:
        """Push ``vector`` forward, and return the new state as well.

        Args:
            vector: a tangent of the old state.
            of_hyper: a tangent of hyper, aligned with its leaves; None: hyper is held constant.
        """
        step, state = self.step, state_of(self.step.carry)
        wanted = [v is not None for v in of_hyper or ()]
        parts = (*state, step.hyper if of_hyper is not None else None)
        places_of = takes_part(step._replace(wanted=wanted or (False,)), parts, buffers_at=2)
        vector = [*vector, *(of_hyper or [None])]
        leaves = tree.leaves(parts)
        chosen = [i for i, takes in enumerate(places_of) if takes and vector[i] is not None]
        box: list[Any] = []
        places: list[int] = []

        def advance(*values: Tensor) -> list[Tensor]:
            *filled, hyper = tree.with_leaves(parts, tree.put(leaves, chosen, values))
            carry = carry_of(filled, step.carry.random_state)
            hyper = step.hyper if of_hyper is None else hyper
            new, _, _ = step.problem.step(carry, hyper, step.batch, step.t)
            found = tree.leaves(state_of(new))
            places[:] = [i for i, x in enumerate(found) if tree.differentiable(x)]
            box[:] = [new, found]
            return [found[i] for i in places]

        with at_random_state(step.random_state):
            if not chosen:
                with torch.no_grad():
                    advance()
                new = box[0]
                return [None] * len(self.gives), new.detach()
            try:
                with torch_private.only_forward_mode():
                    values, pushed = _jvp(
                        advance, tuple(leaves[i] for i in chosen), tuple(vector[i] for i in chosen)
                    )
            except InnerLoopError:
                raise
            except RuntimeError as error:
                if not lacks_forward_mode(error):
                    raise explain(error) from error
                raise NotDifferentiableError(
                    "the transpose of a step's pullback needs forward-mode derivatives, and an "
                    "operation of the loss lacks one: use the pullback itself. PyTorch says: "
                    f"{error}"
                ) from error
        new, found = box
        # What was returned is without the wrappers of the transform.
        state = tree.with_leaves(state_of(new), tree.put(found, places, values))
        after = carry_of(state, new.random_state)
        return tree.put([None] * len(self.gives), places, pushed), after

    @property
    def T(self) -> StepPullback:  # noqa: N802
        """Return the pullback."""
        return StepPullback(self.step, self.product)


def _at_own_random_numbers(step: Step) -> Step:
    """Return ``step`` with a random state, so that every product sees the same numbers."""
    known = step.random_state or step.carry.random_state or RandomState.now()
    return step._replace(random_state=known)
