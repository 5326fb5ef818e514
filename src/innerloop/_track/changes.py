"""What a tracked loop reads once, and refuses to see changed between steps."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Mapping

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from innerloop._types import Params
from innerloop._utils import torch_private
from innerloop._utils.execution import Mode, mode
from innerloop.errors import InnerLoopError, InvalidInputError, NotDifferentiableError
from innerloop.optim._base import Optimizer
from innerloop.optim._from_torch.from_torch import FromTorch, StateMark

LEAVE_OUT = (
    "a parameter rests in the steps whose grad_callback leaves its name out: loop.step(loss, "
    "grad_callback=lambda grads: {n: g for n, g in grads.items() if n not in resting})"
)


class Facts:
    """What a loop has read of the user's model and optimizers, compared with them at each step.

    Args:
        own: the user's own parameters, by name.
        start: the parameters of ``loop.model`` when the loop was made.
        optimizer: the pure form of the user's optimizer.
    """

    def __init__(self, own: Params, start: Params, optimizer: Optimizer) -> None:
        self._own = own
        self._requires_grad = [p.requires_grad for p in own.values()]
        self._frozen = [name for name in own if not start[name].requires_grad]
        self._optimizer = optimizer if isinstance(optimizer, FromTorch) else None
        self._state = StateMark(
            () if self._optimizer is None else self._optimizer.optimizers,
            "Load or clear it before track, and begin a new loop where the state begins anew",
        )
        self._handles: list[RemovableHandle] = []

    def check(self, current: Mapping[str, Tensor]) -> None:
        """Raise if something has changed that the loop does not follow.

        Args:
            current: the parameters of ``loop.model`` as they are now, by name.
        """
        now = [p.requires_grad for p in self._own.values()]
        if now != self._requires_grad:
            changed = [
                name
                for name, a, b in zip(self._own, now, self._requires_grad, strict=True)
                if a is not b
            ]
            raise InvalidInputError(
                f"requires_grad of {changed[:4]} was changed while the loop runs, which reads once "
                f"what is frozen. Freeze or unfreeze before track; {LEAVE_OUT}"
            )
        for name in self._frozen:
            if current[name].requires_grad:
                raise InvalidInputError(
                    f"the parameter {name!r} of loop.model, frozen when the loop began, requires "
                    "grad now: the optimizer would not train it. Unfreeze the model before track; "
                    f"{LEAVE_OUT}"
                )
        if self._optimizer is not None:
            self._optimizer.check_unchanged()
            self._state.check()

    def enter(self) -> None:
        """Refuse the steps of the user's own optimizers from now on."""
        if self._optimizer is None or self._handles:
            return
        self._handles = [
            opt.register_step_pre_hook(torch_private.OwnStepHook(_refuse_step))
            for opt in self._optimizer.optimizers
        ]

    def leave(self) -> None:
        """Let the user's own optimizers step again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _refuse_step(*_: object) -> None:
    raise InvalidInputError(
        "optimizer.step() was called inside of the block of track: it moves the user's own model, "
        "not loop.model. Write loop.step(loss) in place of optimizer.zero_grad(); loss.backward(); "
        "optimizer.step(), and of scaler.step(optimizer): an inner loop needs no scaler. An outer "
        "step of this optimizer comes after the block"
    )


def unseen_edit(weight: str, how: str) -> NotDifferentiableError:
    """Return the error for an edit of a weight of which the derivative would know nothing."""
    return NotDifferentiableError(
        f"the weight {weight!r} of loop.model was edited {how} under torch.no_grad or through "
        ".data (clamp_, mul_, load_state_dict, an average of weights): the derivative would pass "
        "as if the edit had not happened. Write "
        f'loop.assign({{"{weight}": 0.5 * loop.parameters()["{weight}"]}}), with gradients on, '
        "which is differentiated (a detached tensor is a constant, and cuts there). Adding a "
        "constant in place is right as it stands if the loop does it from its first step on; "
        'with learn="nothing" everything is'
    )


def explained(error: BaseException | None, names: Collection[str]) -> InnerLoopError | None:
    """Return what to raise for an error of PyTorch's that comes of a habit inside the block.

    Args:
        error: what ended the block.
        names: of the parameters of ``loop.model``.
    """
    text = str(error)
    if isinstance(error, TypeError) and text.startswith("cannot assign") and "as parameter" in text:
        last = text.split("as parameter '")[-1].split("'")[0]
        full = [name for name in names if name.rsplit(".", 1)[-1] == last]
        if full:
            return InvalidInputError(
                f"a tensor was assigned to the parameter {last!r}: a module takes parameters "
                f'only. Write loop.assign({{"{full[0]}": tensor}}), which keeps the derivative of '
                "the tensor"
            )
    if isinstance(error, TypeError) and "Multiple dispatch failed" in text:
        return NotDifferentiableError(
            "code compiled by torch.compile was given parameters of loop.model inside the block, "
            "where it has no second derivative: write the loss and the model uncompiled there (or "
            "first_order=True). After the block they may be compiled"
        )
    if isinstance(error, RuntimeError) and "can only change requires_grad flags of leaf" in text:
        return InvalidInputError(
            "requires_grad of a parameter of loop.model was changed: it is the result of the "
            "steps so far, and stays in the derivative. To freeze it: freeze the model before "
            f"track; {LEAVE_OUT}"
        )
    if (
        isinstance(error, AssertionError)
        and "inf checks were recorded" in text
        and any(f.name == "step" for f in traceback.extract_tb(error.__traceback__))
    ):
        return InvalidInputError(
            "scaler.step(optimizer) was called inside of the block of track, where the optimizer's "
            "own parameters get no gradient. Write loop.step(loss): the loss need not be scaled "
            "in the inner loop"
        )
    return None


def refuse_transform() -> None:
    """Raise inside of a transform of ``torch.func``: a loss there has no gradient by the model.

    Asked once that is known; the parameters of a model that was made inside have one.
    """
    if mode() is Mode.TRANSFORMED:
        raise InvalidInputError(
            "the loop runs inside a transform of torch.func (grad, vjp, jvp, jacrev, ...), and its "
            "model was made outside of it: there is no gradient by parameters from outside. Make "
            "(or copy.deepcopy) the model and the optimizer inside of the function that is "
            "transformed; or call torch.autograd.grad on what the block computes; or write the "
            "loop with innerloop.unroll"
        )
