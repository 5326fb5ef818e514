"""Differentiate through a hand-written loop over an ``nn.Module`` and a ``torch.optim`` optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from innerloop._carry import Carry, distinct
from innerloop._inner_gradient import graph
from innerloop._inner_gradient.closure import Evaluations
from innerloop._inner_gradient.loss import check_loss
from innerloop._inner_gradient.torch_errors import explained
from innerloop._module.checks import check_names
from innerloop._module.copier import Gate
from innerloop._module.view import ModuleView, keep_running_statistics
from innerloop._track.buffers import _Snapshots
from innerloop._track.closure import _refusing_backward
from innerloop._track.cut import CutGuard
from innerloop._track.start import _pure
from innerloop._trajectory import Trajectory
from innerloop._utils import torch_private, tree
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.nn import _mode as replace
from innerloop.optim._base import Optimizer
from innerloop.optim._from_torch.from_torch import FromTorch

Learn = Literal["init", "outer", "nothing"]
Model = nn.Module | Mapping[str, nn.Module]
TorchOptimizer = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
GradCallback = Callable[[dict[str, Tensor | None]], Mapping[str, Tensor | None]]
Gradients = dict[str, Tensor | None]
Closure = Callable[[], Any]


class Loop:
    """What `track` returns."""

    def __init__(
        self,
        model: Model,
        optimizer: TorchOptimizer | Optimizer,
        learn: Learn,
        params: Mapping[str, Tensor] | None,
        hyper: Mapping[str, Any] | None,
        first_order: bool,
    ) -> None:
        if learn not in ("init", "outer", "nothing"):
            raise InvalidInputError(f'learn={learn!r}: write "init", "outer" or "nothing"')
        if torch.is_inference_mode_enabled():
            raise InvalidInputError(
                "track under torch.inference_mode: an inner loop needs gradients even when "
                "nothing is learned"
            )
        if torch_private.inside_vmap():
            raise InvalidInputError(
                "track does not work inside torch.func.vmap: write the loop with innerloop.unroll "
                "or innerloop.metagradient there"
            )
        if hyper is not None and not isinstance(hyper, Mapping):
            raise InvalidInputError(
                f'hyper is {type(hyper).__name__}: write a dict, hyper={{"lr": tensor}}'
            )
        self.learn = learn
        self.first_order = first_order
        self._second_order = learn != "nothing" and not first_order
        self.hyper = dict(hyper or {})
        self._kernels = replace.LoopMode() if self._second_order else None
        self._gate = Gate()
        self._view = ModuleView(model, self._gate)
        if self._second_order:
            keep_running_statistics(self._view)
        own = self._view.source
        if not own:
            raise InvalidInputError(
                f"{type(model).__name__} has no parameters: there is nothing to train"
            )
        self._frozen = {name for name, p in own.items() if not p.requires_grad}
        self._optimizer = _pure(optimizer, own)
        self._names = (
            self._optimizer.names
            if isinstance(self._optimizer, FromTorch)
            else [n for n in own if n not in self._frozen]
        )
        self._trained = [name for name in self._names if name not in self._frozen]
        self._hooks = [
            (name, hook)
            for name in self._trained
            for hook in torch_private.gradient_hooks(own[name])
        ]
        self._own = {id(p): name for name, p in own.items()}
        check_names(params or {}, own)
        for name, tensor in (params or {}).items():
            if tensor.dtype != own[name].dtype and len(params or {}) < len(own):
                raise InvalidInputError(
                    f"params[{name!r}] has dtype {tensor.dtype}, the model's parameter "
                    f"{own[name].dtype}: give all parameters in one dtype"
                )
        self._guard = CutGuard(learn)
        with torch.enable_grad():
            self._view.write(self._time_zero(own, params or {}))
        self._view.write_buffers(
            {name: buffer.detach().clone() for name, buffer in self._view.source_buffers.items()}
        )
        state = self._optimizer.init({name: own[name] for name in self._names})
        self._buffers = _Snapshots(self._view)
        self._states = {0: Carry(self._view.read(), state, self._buffers.take(), None)}
        self._steps = 0
        self._losses: list[Tensor] = []

    @property
    def model(self) -> Any:
        """The user's module (or dict of modules) at the current inner parameters."""
        return self._view.module

    def __enter__(self) -> Loop:
        if self._kernels is not None:
            self._kernels.enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._kernels is not None:
            self._kernels.leave()
        if kind is None and self._losses and self._losses[0].device.type != "cpu":
            self._check_finite(self._stacked_losses().detach())

    def step(
        self,
        loss: Tensor | Closure,
        hyper: Mapping[str, Any] | None = None,
        grad_callback: GradCallback | None = None,
    ) -> Float[Tensor, ""]:
        """One differentiable step of the optimizer.

        Args:
            loss: scalar, computed with ``loop.model``; or a closure, a function without arguments
                that computes it and returns it, and takes no gradient itself. A rule that evaluates
                the loss (LBFGS, ``adapt(..., closure=True)``) needs a closure and calls it several
                times, each time with other parameters in ``loop.model``; random numbers are drawn
                and running statistics written as often as under ``torch.optim``. Other rules call
                it once.
            hyper: overrides for this step, as in `track`.
            grad_callback: receives the gradients by name (None where the loss does not depend on a
                parameter) and returns those to use; at every evaluation of a closure.

        Returns:
            The loss, detached; of a closure, that of the first evaluation.

        Raises:
            InvalidInputError: the loss is not a finite scalar, or does not depend on
                ``loop.model``; a loss where a closure is needed; a closure that calls
                ``backward()``.
            NotDifferentiableError: the loss was computed by compiled code, which has no second
                derivative.
        """
        current = self._current()
        closure = None if isinstance(loss, Tensor) or not callable(loss) else loss
        if closure is None and self._optimizer.needs_closure:
            raise InvalidInputError(
                f"{self._optimizer!r} evaluates the loss itself, and was given a "
                f"{type(loss).__name__}: write a function that computes it, "
                "loop.step(lambda: loss_fn(loop.model(x), y))"
            )
        if closure is None:
            loss = self._checked(loss)
            grads = self._with_hooks(self._gradient_of(loss, current), grad_callback)
        else:
            loss, grads = self._evaluated(closure, current, grad_callback, self._checked)
        if isinstance(self._optimizer, FromTorch):
            self._optimizer.refresh()
            self._optimizer.mark_stepped()
        overrides = {**self.hyper, **(hyper or {})}
        with self._own_code(), torch.set_grad_enabled(self.learn != "nothing"):
            params = {name: current[name] for name in self._names}
            more: Any = {}
            if closure is not None and self._optimizer.needs_closure:

                def evaluate(trial: Mapping[str, Tensor]) -> tuple[Tensor, Gradients]:
                    with self._users_code():
                        found, grads = self._evaluated(
                            closure, {**current, **trial}, grad_callback, self._as_loss
                        )
                    return self._as_seen(found), grads

                more["value_and_grad"] = Evaluations(evaluate, params, self._as_seen(loss), grads)
            before = self._states[self._steps].optimizer_state
            updated, state = self._optimizer.update(grads, before, params, overrides, **more)
        if not self._guard.reached:
            self._guard.follow(updated.values(), current.values())
        number = (
            loss.detach().clone()
        )  # a clone, because a fused loss owns a storage of the size of the whole batch's output
        self._advance({**current, **updated}, state, loss, number)
        if self._kernels is not None and self._steps == 1:
            self._kernels.after_first_step()
        return number

    def parameters(self, time: int = -1) -> dict[str, Tensor]:
        """The parameters after ``time`` steps, by name: 0 is the start, -1 the newest."""
        return self._view.read() if time in (-1, self._steps) else self.trajectory.at(time).params

    def buffers(self, time: int = -1) -> dict[str, Tensor]:
        """The buffers after ``time`` steps, by name; -1 is now."""
        return self._view.read_buffers() if time == -1 else self.trajectory.at(time).buffers

    @property
    def trajectory(self) -> Trajectory:
        """States and losses so far."""
        states = {**self._states, self._steps: self._now()}
        missing = 'with learn="nothing" only time 0 and -1 are kept: use learn="init" or "outer"'
        return Trajectory(states, self._stacked_losses, None, self._steps, missing)

    def detach(self) -> None:
        """Cut the graph here: weights, buffers and optimizer state are kept, time starts again at 0.

        What is computed afterwards does not reach ``model.parameters()`` any more, only tensors
        outside of the model (as with ``learn="outer"``).
        """
        carry = tree.map_tensors(lambda x: x.detach().clone(), self._now())
        self._guard = CutGuard("nothing" if self.learn == "nothing" else "outer")
        with torch.enable_grad():
            self._view.write(
                {
                    name: p if name in self._frozen else self._guard.leaf(p)
                    for name, p in carry.params.items()
                }
            )
        self._states = {0: carry._replace(params=self._view.read())}
        self._steps = 0
        self._losses = []

    def commit(self) -> None:
        """Write the current weights, buffers and optimizer state into the user's model and torch optimizer."""
        with torch.no_grad():
            current = self._view.read()
            for name, p in self._view.source.items():
                if name not in self._frozen:
                    p.copy_(current[name])
            buffers = self._view.read_buffers()
            for name, buffer in self._view.source_buffers.items():
                buffer.copy_(buffers[name])
        if isinstance(self._optimizer, FromTorch):
            self._optimizer.write_back(self._states[self._steps].optimizer_state)

    def _time_zero(
        self, own: Mapping[str, Tensor], given: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The parameters at time 0: connected to what receives the outer gradient, never the user's own tensors."""
        start = {}
        for name, p in own.items():
            source = given.get(name, p)
            connected = self.learn != "nothing" and (self.learn == "init" or name in given)
            if connected and source.requires_grad:
                start[name] = source.clone()
            elif name in self._frozen:
                start[name] = source.detach()
            else:
                start[name] = self._guard.leaf(source.detach().clone())
        if any(t.requires_grad for t in given.values()) or (
            self.learn == "init" and len(given) < len(own)
        ):
            self._guard.reached = True
        return start

    def _advance(self, params: dict[str, Tensor], state: Any, loss: Tensor, number: Tensor) -> None:
        if self.learn == "nothing":
            with torch.enable_grad():
                params = {
                    n: p if n in self._frozen else self._guard.leaf(p.detach())
                    for n, p in params.items()
                }
            state = tree.map_tensors(Tensor.detach, state)
            if self._steps:
                del self._states[self._steps]
        else:
            before = self._view.read()
            self._states[self._steps] = self._states[self._steps]._replace(params=before)
            params = distinct(params, before)
        self._view.write(params)
        self._steps += 1
        self._states[self._steps] = Carry(params, state, self._buffers.take(), None)
        self._losses.append(loss if self._second_order else number)
        if (
            len(self._losses) == 256 and not self._second_order
        ):  # a number per step, not a tensor per step
            self._losses = [self._stacked_losses()]

    def _own_code(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._kernels is None else self._kernels.paused()

    def _users_code(self) -> AbstractContextManager[Any]:
        """Inside `_own_code`: what a closure runs."""
        return nullcontext() if self._kernels is None else self._kernels.resumed()

    def _now(self) -> Carry:
        """The newest state, with the user's edits in it."""
        return self._states[self._steps]._replace(
            params=self._view.read(), buffers=self._buffers.take()
        )

    def _stacked_losses(self) -> Float[Tensor, " steps"]:
        like = next(iter(self._view.read().values()))
        return (
            torch.cat([loss.reshape(-1) for loss in self._losses])
            if self._losses
            else like.new_zeros(0)
        )

    def _as_loss(self, loss: Any) -> Tensor:
        loss = check_loss(loss, "the loss given to loop.step")
        if not self._trained:
            raise InvalidInputError(
                "there is nothing to train: every parameter of the optimizer is frozen "
                "(requires_grad=False)"
            )
        if not loss.requires_grad:
            why = (
                "torch.no_grad() is on"
                if not torch.is_grad_enabled()
                else "it was detached, or computed without loop.model"
            )
            raise InvalidInputError(
                f"the loss does not depend on any parameter through the graph ({why}): compute it "
                "as loss_fn(loop.model(x), y)"
            )
        return loss

    def _checked(self, loss: Any) -> Tensor:
        """`_as_loss`, and finite; a trial of a line search need not be."""
        loss = self._as_loss(loss)
        if (
            loss.device.type == "cpu"
        ):  # elsewhere a check per step would wait for the device: done on leaving the block
            self._check_finite(loss.detach())
        return loss

    def _check_finite(self, losses: Tensor) -> None:
        if losses.ndim == 0 and not math.isfinite(losses.item()):
            raise InvalidInputError(
                f"the loss of step {self._steps} is {losses.item()}: the inner loop diverged "
                "(lower the lr?)"
            )
        if losses.ndim and not bool(losses.isfinite().all()):
            first = int((~losses.isfinite()).nonzero()[0])
            raise InvalidInputError(
                f"the loss of step {first} is {losses[first].item()}: the inner loop diverged "
                "(lower the lr?)"
            )

    def _gradient_of(self, loss: Tensor, current: Mapping[str, Tensor]) -> Gradients:
        leaves = graph.inspect([loss], current.values(), self._second_order)
        wanted = {name: current[name] for name in self._trained if current[name].requires_grad}
        with self._own_code():
            grads = self._gradients(loss, wanted)
        self._check_gradients(grads, leaves)
        return grads

    def _with_hooks(self, grads: Gradients, grad_callback: GradCallback | None) -> Gradients:
        """What the hooks on the user's parameters, and then the callback, make of the gradients."""
        for name, hook in self._hooks:
            g = grads.get(name)
            if g is not None and (changed := hook(g)) is not None:
                grads[name] = changed
        return grads if grad_callback is None else self._called_back(grad_callback, grads)

    def _as_seen(self, loss: Tensor) -> Tensor:
        """The loss as a rule sees it: like the gradients, a constant where no second derivative is taken."""
        return loss if self._second_order else loss.detach()

    def _evaluated(
        self,
        closure: Closure,
        at: Mapping[str, Tensor],
        grad_callback: GradCallback | None,
        check: Callable[[Any], Tensor],
    ) -> tuple[Tensor, Gradients]:
        """``(loss, gradients)`` of a closure, with these parameters in ``loop.model`` while it runs."""
        own = self._view.read()
        with torch.enable_grad():
            trial = {
                n: at[n] if at[n].requires_grad else at[n].detach().requires_grad_()
                for n in self._trained
            }
            alias = {n: p.view_as(p) for n, p in trial.items()}
            self._view.write(alias)
            try:
                with _refusing_backward(trial.values(), self._view.source.values()):
                    loss = check(closure())
                return loss, self._with_hooks(
                    self._gradient_of(loss, {**at, **alias}), grad_callback
                )
            finally:
                self._view.write({n: own[n] for n in alias})

    def _gradients(self, loss: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        self._gate.closed = False
        try:
            values = torch.autograd.grad(
                loss, list(wanted.values()), create_graph=self._second_order, allow_unused=True
            )
        except RuntimeError as error:
            raise explained(error) from error
        finally:
            self._gate.closed = self._second_order
        return dict(zip(wanted, values, strict=True))

    @staticmethod
    def _called_back(
        grad_callback: GradCallback, grads: dict[str, Tensor | None]
    ) -> dict[str, Tensor | None]:
        changed = grad_callback(grads)
        if not isinstance(changed, Mapping) or not set(changed) <= set(grads):
            got = (
                sorted(set(changed) - set(grads))
                if isinstance(changed, Mapping)
                else type(changed).__name__
            )
            raise InvalidInputError(
                f"grad_callback must return the gradients by name, as it gets them; got {got}, "
                f"expected {list(grads)}"
            )
        return dict(changed)

    def _current(self) -> dict[str, Tensor]:
        current = self._view.read()
        for name, p in current.items():
            if not isinstance(p, Tensor):
                raise InvalidInputError(
                    f"parameter {name!r} of loop.model was replaced by {p!r}: assign a tensor, or "
                    "freeze it"
                )
        return current

    def _check_gradients(self, grads: Mapping[str, Tensor | None], leaves: list[Tensor]) -> None:
        if all(g is None for g in grads.values()):
            raise InvalidInputError(
                f"the loss depends on none of the {len(grads)} parameters that the optimizer "
                "trains, as they are now: compute it with "
                "loop.model (not with the model that was passed to track), and anew after each step"
            )
        for name in (self._own[id(leaf)] for leaf in leaves if id(leaf) in self._own):
            if name in grads and grads[name] is None:
                raise InvalidInputError(
                    f"the loss uses {name!r} of the model that was passed to track, not that of "
                    "loop.model: it is reached through a "
                    "closure or an object that is not a module. Make that a method of the module, "
                    "or a submodule"
                )
        for name, g in grads.items():
            if g is not None and g.layout != torch.strided:
                raise NotDifferentiableError(
                    f"the gradient of {name!r} is sparse, and most operations on sparse tensors "
                    "have no derivative: build nn.Embedding "
                    "with sparse=False, which gives the same numbers; sparse_adam runs in "
                    "innerloop.unroll"
                )
