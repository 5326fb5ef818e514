"""Warnings at the moment when a gradient goes where nobody looks for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from innerloop._utils.warn import warn_user
from innerloop.errors import CapturedParameterWarning, UnreachedGradientWarning

COPIED = (
    "backward() left its gradient in the copies that fmodel.parameters(time=0) gives, and the "
    ".grad of your model's own parameters is "
    "what it was before: copy_initial_weights=True (the default, as in higher) starts the loop "
    "from detached copies. Write "
    "innerloop_ctx(model, opt, copy_initial_weights=False) for the gradient of model.parameters() "
    "(MAML). If you do want the copies' "
    "gradients, read them by torch.autograd.grad(outer, fmodel.parameters(time=0))"
)
UNTRACKED = (
    "backward() left its gradient in the newest inner parameters, fmodel.parameters(), and the "
    ".grad of your model's own parameters is "
    "what it was before: with track_higher_grads=False each step is cut off from the one before. "
    "Write track_higher_grads=True for "
    "the gradient through the steps; innerloop.track(model, opt, first_order=True) for that of "
    "first-order MAML; or "
    "torch.autograd.grad(outer, list(fmodel.parameters())) if the gradient at the newest "
    "parameters is what you want (or call "
    "fmodel.parameters() before backward(), and read .grad of what it gives)"
)
CAPTURED = (
    "the inner loss was computed with your model's own parameter {name}, which the inner loop "
    "does not update. If a function kept in "
    "the model (a lambda, a hook) has taken hold of the model itself, let it find the module "
    "otherwise: by an argument, by a bound method. "
    "If you mean the starting point (a proximal term), write fmodel.parameters(time=0) with "
    "copy_initial_weights=False, which is the same; "
    "if you mean a constant, .detach() it"
)


class ReachMonitor:
    """A monitor of where ``backward()`` leaves gradients, for one patched module.

    ``torch.autograd.grad`` never disturbs it. Each warning is given once.

    Attributes:
        steps: how many updates the parameters have had.
        aware: the user asked for the parameters at time 0, where the gradients of copies are.
        asked: the user asked for the newest parameters since the last step.
        outside: a step depended on a leaf outside of the module (a hyper-parameter, another
            network): the outer gradient has a goal.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.aware = False
        self.asked = False
        self.outside = False
        self._captured = False
        self._said: set[str] = set()

    def watch_copies(self, leaves: list[Tensor]) -> None:
        """Watch the parameters at time 0, which are copies."""
        for leaf in leaves:
            if leaf.requires_grad:
                leaf.register_post_accumulate_grad_hook(self._copy_reached)

    def watch_newest(self, leaves: list[Tensor]) -> None:
        """Watch the parameters after a step that was cut off from the one before."""
        for leaf in leaves:
            if leaf.requires_grad and leaf.is_leaf:
                leaf.register_post_accumulate_grad_hook(self._newest_reached)

    def look_at_inputs(self, args: Iterable[object], kwargs: Mapping[str, object]) -> None:
        """Look for a goal of the outer gradient among the inputs of a call.

        An outer loss may be meant for a leaf that no step has seen (a generator's output).
        """
        if self.steps and not self.outside:
            self.outside = any(
                isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())
            )

    def captured(self, name: str) -> None:
        """Warn that an inner loss was computed with a parameter of the user's own model."""
        if not self._captured:
            self._captured = True
            self._say(CAPTURED.format(name=name), CapturedParameterWarning)

    def _copy_reached(self, _: Tensor) -> None:
        if self.steps and not self.aware and not self.outside:
            self._say(COPIED)

    def _newest_reached(self, _: Tensor) -> None:
        if not self.asked:
            self._say(UNTRACKED)

    def _say(self, message: str, category: type[Warning] = UnreachedGradientWarning) -> None:
        if message in self._said:
            return
        self._said.add(message)
        warn_user(message, category)
