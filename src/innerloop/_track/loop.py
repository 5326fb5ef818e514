"""The loop that `track` returns: a module and an optimizer, one recorded step at a time."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import Node

from innerloop._carry import Carry, _alias, aliased
from innerloop._inner_gradient import block
from innerloop._inner_gradient.closure import CachedFirstEvaluation
from innerloop._inner_gradient.gradient import (
    check_graph,
    finish,
    inner_gradient,
    sent_sparse,
    with_dense_gradients,
)
from innerloop._inner_gradient.loss import check_loss
from innerloop._inner_gradient.torch_errors import explain
from innerloop._module.checks import LateHooks, check_names, check_not_inference
from innerloop._module.copier import GONE, Gate
from innerloop._module.edits import EditWatch, Placed, as_plain
from innerloop._module.view import ModuleView, keep_running_statistics, look_up_densely
from innerloop._track.buffers import BufferSnapshots
from innerloop._track.changes import Facts, explained, refuse_transform, unseen_edit
from innerloop._track.closure import Closure, Gradients, evaluate_at
from innerloop._track.cut import GraphCut
from innerloop._track.replay import StandIn
from innerloop._track.start import (
    Learn,
    Look,
    Model,
    TorchOptimizer,
    check_params,
    check_place,
    checked_hyper,
    pure_optimizer,
    time_zero,
    watch,
)
from innerloop._trajectory import Trajectory
from innerloop._types import Grads, Params
from innerloop._utils import torch_private, tree
from innerloop._utils.arguments import check_flag, check_has_values, check_mapping
from innerloop._utils.deep_graphs import Chain
from innerloop._utils.execution import may_read_values
from innerloop._utils.finite import all_finite, is_finite
from innerloop.errors import InvalidInputError, NonFiniteError
from innerloop.nn import _mode as replace
from innerloop.optim._base import Optimizer
from innerloop.optim._engine.callback import refuse_post_accumulate_hooks
from innerloop.optim._engine.grads import sparse_ones
from innerloop.optim._from_torch.from_torch import FromTorch
from innerloop.optim._transforms.base import Transform
from innerloop.optim._transforms.grad_callback import GradCallback

Callback = Callable[[Gradients], Grads] | Transform


class TrackedLoop:
    """A hand-written training loop whose steps are recorded; made by `track`.

    It is used in a ``with`` statement: inside, `model` stands for the user's module and `step` for
    ``loss.backward(); optimizer.step()``.
    """

    def __init__(
        self,
        model: Model,
        optimizer: TorchOptimizer | Optimizer,
        learn: Learn,
        params: Params | None,
        hyper: Mapping[str, object] | None,
        first_order: bool,
    ) -> None:
        check_place(learn)
        check_flag("first_order", first_order)
        if params is not None:
            check_mapping("params", params, "named tensors", "a dict, name -> tensor")
        self.learn = learn
        self.first_order = first_order
        self._second_order = learn != "nothing" and not first_order
        self._edits = EditWatch(unseen_edit)
        self._kernels = (
            None
            if learn == "nothing"
            else replace.LoopMode(self._edits, replaces=self._second_order)
        )
        self._gate = Gate(snapshots=learn == "nothing")
        self._view = ModuleView(model, self._gate)
        if self._second_order:
            keep_running_statistics(self._view)
        own, given = self._view.source, params or {}
        if not own:
            raise InvalidInputError(
                f"{type(model).__name__} has no parameters: there is nothing to train"
            )
        self._frozen = {name for name, p in own.items() if not p.requires_grad}
        self._optimizer = pure_optimizer(optimizer, own)
        if not self._optimizer.takes_sparse:
            look_up_densely(self._view.modules)
        again = partial(
            graph_free,
            model,
            keeps_statistics=self._second_order,
            densely=not self._optimizer.takes_sparse,
        )
        self._read = block.ReadModule(self._view, again)
        stand_in = partial(StandIn, learn=learn, first_order=first_order)
        self._read.stand_in(self, stand_in)
        self.hyper = checked_hyper(hyper, self._optimizer)
        self._names = (
            self._optimizer.names
            if isinstance(self._optimizer, FromTorch)
            else [n for n in own if n not in self._frozen]
        )
        self._steps_all = self._names == list(own)
        self._trained = [name for name in self._names if name not in self._frozen]
        self._hooks = [
            (name, hook)
            for name in self._trained
            for hook in torch_private.gradient_hooks(own[name])
        ]
        self._own = {id(p): name for name, p in own.items()}
        refuse_post_accumulate_hooks(
            own, self._trained, "Change gradients with loop.step(loss, grad_callback=...)"
        )
        self._grad_mode: AbstractContextManager[object] | None = None
        check_params(given, own)
        for name, p in {**own, **given}.items():
            check_has_values(f"the parameter {name!r}", p)
            if p.is_inference() and name not in self._frozen:
                check_not_inference(f"the parameter {name!r}", p)
        self._cut = GraphCut(learn)
        with torch.enable_grad():
            start = time_zero(own, given, self._frozen, learn, self._cut)
            self._view.write(start)
        self._facts = Facts(own, self._view.read(), self._optimizer)
        self._late_hooks = LateHooks(
            self._view.modules,
            "Register it on the user's own model before track, or change gradients with "
            "loop.step(loss, grad_callback=...)",
        )
        self._has_left = False
        self._place()
        if self._second_order and learn == "init":
            watch(start, self._look())
        copies = self._view.copies_of_buffers()
        if learn == "nothing":
            copies = {name: b.detach() for name, b in copies.items()}
        self._view.write_buffers(copies)
        state = self._optimizer.init({name: own[name] for name in self._names})
        self._buffers = BufferSnapshots(self._view, self._second_order)
        self._states = {0: Carry(self._view.read(), state, self._buffers.take(), None)}
        self._steps = 0
        self._losses: list[Tensor] = []
        self._chain = Chain()
        self._hypers: list[dict[str, object]] = []
        self._sparse = set(self._view.sparse)

    @property
    def model(self) -> Any:
        """Return the user's module (or dict of modules) at the current inner parameters."""
        return self._view.module

    def __enter__(self) -> TrackedLoop:
        if not torch.is_grad_enabled() and self._grad_mode is None:
            # A layer with a loop inside, under no_grad: the loop needs gradients all the same.
            self._grad_mode = torch.enable_grad()
            self._grad_mode.__enter__()
        if self._kernels is not None:
            self._kernels.enter()
        block.enter(self._read)
        self._facts.enter()
        if self._has_left:
            with self._own_code():
                self._place()
        elif self._kernels is not None:
            self._edits.start(self._placed.params)
        self._edits.enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._has_left = True
        self._facts.leave()
        block.leave(self._read)
        if self._kernels is not None:
            self._kernels.leave()
        handed_out = self._edits.stop()
        as_plain(self._states[self._steps].params)
        if self._grad_mode is not None:
            self._grad_mode.__exit__(kind, error, traceback)
            self._grad_mode = None
        if error is not None:
            refused = self._edits.refused
            # load_state_dict makes an error of its own out of every one.
            if refused is not None and "in loading state_dict" in str(error):
                raise refused from error
            if (clearer := explained(error, self._view.source)) is not None:
                raise clearer from error
        if isinstance(error, RuntimeError) and "nference tensor" in str(error):
            raise explain(error) from error
        # Pruning registers "weight_orig" before it takes the weight out.
        if isinstance(error, TypeError) and "_orig' (torch.nn.Parameter" in str(error):
            name = str(error).split("parameter '")[-1].split("_orig'")[0]
            raise InvalidInputError(GONE.format(name)) from error
        if kind is None and self._losses:
            self._check_edits(self._view.read(), handed_out)
        if kind is None and self._losses and self._losses[0].device.type != "cpu":
            self._check_finite(self._stacked_losses().detach())
        if kind is None and self._losses:
            self._check_last()

    def step(
        self,
        loss: Tensor | Callable[..., object],
        hyper: Mapping[str, object] | None = None,
        grad_callback: Callback | None = None,
        *,
        args: Sequence[object] = (),
    ) -> Float[Tensor, ""]:
        """Take one differentiable step of the optimizer.

        Args:
            loss: scalar, computed with ``loop.model``; or a closure, a function without arguments
                that computes it and returns it, and takes no gradient itself. A rule that evaluates
                the loss (LBFGS, ``adapt(..., closure=True)``) needs a closure and calls it several
                times, each time with other parameters in ``loop.model``; random numbers are drawn
                and running statistics written as often as under ``torch.optim``. Other rules call
                it once.
            hyper: overrides for this step, as in `track`.
            grad_callback: receives the gradients by name (None where the loss does not depend on a
                parameter) and returns those to use; at every evaluation of a closure. Or a
                transform of `innerloop.optim` that keeps no state, ``clip_by_global_norm(1.0)``.
            args: handed to the closure, ``loss(*args)``.

        Returns:
            The loss, detached; of a closure, that of the first evaluation.

        Raises:
            InvalidInputError: the loss is not a finite scalar, or does not depend on
                ``loop.model``; a loss where a closure is needed; a closure that calls
                ``backward()``; a ``grad_callback`` that keeps a state.
            NotDifferentiableError: the loss was computed by compiled code, which has no second
                derivative.
        """
        transform = self._transform_of(grad_callback)
        closure = None if isinstance(loss, Tensor) or not callable(loss) else loss
        if args:
            closure = _called_with(closure, args)
        with self._own_code():
            current = self._current()
            self._facts.check(current)
            if self._second_order:
                self._late_hooks.check(current.items())
            self._check_edits(current, self._edits.handed_out)
            if closure is None and transform is None:
                # None of the user's code runs from here on, and operations on plain tensors cost
                # less.
                as_plain(current)
            try:
                number = self._step(loss, closure, current, hyper, transform)
            except BaseException:
                if self._kernels is not None:
                    self._placed.mark()
                raise
            if closure is not None or transform is not None:
                as_plain(current)
        if self._kernels is not None and self._steps <= 2:
            self._decide_on_watching(self._kernels)
        return number

    def _step(
        self,
        loss: Tensor | Closure,
        closure: Closure | None,
        current: dict[str, Tensor],
        hyper: Mapping[str, object] | None,
        transform: Transform | None,
    ) -> Float[Tensor, ""]:
        """Take a step from the parameters ``current``, in a block of the loop's own code."""

        def gradient_of(loss: Tensor, at: Params) -> Gradients:
            with self._own_code():
                return self._gradient_of(loss, at, transform)

        def evaluate(at: Params, check: Callable[[object], Tensor]) -> tuple[Tensor, Gradients]:
            assert closure is not None
            with self._users_code():
                return evaluate_at(at, closure, self._view, self._trained, check, gradient_of)

        if closure is not None:
            value, grads = evaluate(current, self._checked)
        elif self._optimizer.needs_closure:
            raise InvalidInputError(
                f"{self._optimizer!r} evaluates the loss itself, and was given a "
                f"{type(loss).__name__}: write a function that computes it, "
                "loop.step(lambda: loss_fn(loop.model(x), y))"
            )
        else:
            value = self._checked(loss)
            grads = self._gradient_of(value, current, transform)
        if isinstance(self._optimizer, FromTorch):
            self._optimizer.refresh()
            self._optimizer.mark_stepped()
        self._edits.is_on = False
        try:
            with _grad_mode(self.learn != "nothing"):
                own = self._aliased_hyper(hyper or {})
                overrides = {**self.hyper, **own, **(hyper or {})}
                params = (
                    dict(current)
                    if self._steps_all
                    else {name: current[name] for name in self._names}
                )
                more: dict[str, Any] = {}
                if closure is not None and self._optimizer.needs_closure:

                    def at_trial(trial: Params) -> tuple[Tensor, Gradients]:
                        at = {**current, **with_dense_gradients(trial, self._sparse)}
                        found, grads = evaluate(at, self._as_loss)
                        return self._as_seen(found), grads

                    more["value_and_grad"] = CachedFirstEvaluation(
                        at_trial, params, self._as_seen(value), grads
                    )
                before = self._states[self._steps].optimizer_state
                updated, state = self._optimizer.update(grads, before, params, overrides, **more)
                # One that was skipped may be edited later; the times before must not change.
                # What is frozen stays the tensor that it is.
                updated = {
                    n: p.clone() if p is params[n] else p
                    for n, p in updated.items()
                    if n not in self._frozen
                }
            if not self._cut.reached:
                self._cut.note_outside_leaves(updated.values(), current.values())
            # Clone: a fused loss shares storage with the whole batch's output.
            number = value.detach().clone()
            if self._sparse:
                updated = with_dense_gradients(updated, self._sparse)
            self._place(self._advance(current, updated, state, value, number))
            self._hypers.append(own)
        finally:
            self._edits.is_on = True
        return number

    def _decide_on_watching(self, kernels: replace.LoopMode) -> None:
        """Look at the user's operations no longer once nothing has been met in two steps."""
        if self._steps == 1:
            kernels.after_first_step()
            if self.learn == "outer":
                newest = self._view.read()
                watch({name: newest[name] for name in self._trained}, self._look())
        elif self._steps == 2 and not self._edits.seen:
            kernels.stop_watching()
            self._edits.forget()

    def assign(self, params: Params) -> None:
        """Put tensors in the places of parameters of ``loop.model``, differentiably.

        Args:
            params: by name; what they were computed from, with gradients on, stays in the
                derivative. A tensor that does not require grad is a constant of it.

        Raises:
            InvalidInputError: an unknown name, a wrong shape, or a value that is no tensor.

        Example:
            Weights that are halved after each of two steps: the gradient is (.5 * .5)² w₂ dw₂/dw₀.

            >>> import torch, innerloop
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> _ = torch.nn.init.constant_(model.weight, 4.0)
            >>> with innerloop.track(model, innerloop.optim.sgd(lr=0.5)) as loop:
            ...     for _ in range(2):
            ...         _ = loop.step(loop.model.weight.square().sum() / 2)
            ...         loop.assign({"weight": 0.5 * loop.model.weight})
            >>> torch.autograd.grad(loop.model.weight.sum(), model.weight)
            (tensor([[0.0625]]),)
        """
        check_names(params, self._view.source)
        current, new = self._current(), {}
        with torch.enable_grad():
            for name, tensor in params.items():
                if name in self._frozen and not tensor.requires_grad:
                    new[name] = tensor.detach().clone()
                elif self.learn == "nothing" or not tensor.requires_grad:
                    new[name] = self._cut.cut(tensor.detach().clone())
                else:
                    new[name] = _alias(tensor)
            if self._differentiates_weights:
                new.update(_told_apart(new, current))
        if not self._cut.reached:
            self._cut.note_outside_leaves(new.values(), current.values())
        self._view.write(new)
        self._place()

    @property
    def _differentiates_weights(self) -> bool:
        """True if inner gradients are taken at the weights of ``loop.model`` themselves."""
        return self.learn != "nothing"

    def at(self, t: int) -> Carry:
        """Return the state after ``t`` steps, as `Trajectory.at` does: 0 is the start, -1 now.

        Raises:
            InvalidInputError: ``t`` is outside of the steps taken so far, or was not kept
                (``learn="nothing"`` keeps times 0 and -1).
        """
        return self.trajectory.at(t)

    def parameters(self, time: int = -1) -> dict[str, Tensor]:
        """Return the parameters after ``time`` steps, by name: 0 is the start, -1 the newest."""
        if time in (-1, self._steps):
            return self._view.read()
        return self.trajectory.at(time).params

    def buffers(self, time: int = -1) -> dict[str, Tensor]:
        """Return the buffers after ``time`` steps, by name; -1 is now."""
        return self._view.read_buffers() if time == -1 else self.trajectory.at(time).buffers

    @property
    def trajectory(self) -> Trajectory:
        """Return the states and losses so far."""
        states = {**self._states, self._steps: self._now()}
        missing = 'with learn="nothing" only time 0 and -1 are kept: use learn="init" or "outer"'
        found = Trajectory(states, self._stacked_losses, None, self._steps, missing)
        found.hypers = tuple(self._hypers)
        return found

    def _aliased_hyper(self, instead: Mapping[str, object]) -> dict[str, object]:
        """Return an alias of what is learned, so that each step's share of it can be told apart.

        Args:
            instead: what this step reads from somewhere else.
        """
        if self.learn == "nothing":
            return {}
        return {
            name: tree.map_tensors(lambda x: _alias(x) if x.requires_grad else x, value)
            for name, value in self.hyper.items()
            if name not in instead
        }

    def detach(self) -> None:
        """Cut the graph here: weights, buffers, optimizer state are kept, time restarts at 0.

        What is computed afterwards does not reach ``model.parameters()`` any more, only tensors
        outside of the model (as with ``learn="outer"``). `unroll` does the same with the strategy
        `Truncated`.
        """
        carry = tree.map_tensors(lambda x: x.detach().clone(), self._now())
        self._cut = GraphCut("nothing" if self.learn == "nothing" else "outer")
        with torch.enable_grad():
            self._view.write(
                {
                    name: p if name in self._frozen else self._cut.cut(p)
                    for name, p in carry.params.items()
                }
            )
        self._states = {0: carry._replace(params=self._view.read())}
        self._steps = 0
        self._losses, self._hypers = [], []
        self._place()

    def commit(self) -> None:
        """Write weights, buffers and optimizer state into the user's model and torch optimizer."""
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

    def __repr__(self) -> str:
        model = self._view.module
        shown = (
            f"{{{', '.join(f'{key!r}: {type(part).__name__}' for key, part in model.items())}}}"
            if isinstance(model, dict)
            else type(model).__name__
        )
        first_order = ", first_order=True" if self.first_order else ""
        return (
            f"TrackedLoop(model={shown}, optimizer={self._shown_optimizer()}, "
            f"steps={self._steps}, learn={self.learn!r}{first_order})"
        )

    def _shown_optimizer(self) -> str:
        """Return the optimizer as one would write it here."""
        if isinstance(self._optimizer, FromTorch) and len(self._optimizer.members) == 1:
            return repr(self._optimizer.members[0])
        return repr(self._optimizer)

    def _transform_of(self, grad_callback: Callback | None) -> Transform | None:
        """Return what a step does to gradients, as a transform; raise if it keeps a state."""
        if grad_callback is None or not isinstance(grad_callback, Transform):
            return None if grad_callback is None else GradCallback(grad_callback)
        if tree.leaves(grad_callback.init(self._view.read())):
            raise InvalidInputError(
                f"grad_callback={grad_callback!r} keeps a state between steps: write "
                f"innerloop.optim.chain({grad_callback!r}, {self._shown_optimizer()}) and pass "
                "that as the optimizer"
            )
        return grad_callback

    def _advance(
        self,
        current: dict[str, Tensor],
        updated: Params,
        state: object,
        loss: Tensor,
        number: Tensor,
    ) -> Params:
        """Go on to the next time, at updated parameters; return all as they stand there."""
        params = {**current, **updated}
        if self.learn == "nothing":
            with torch.enable_grad():
                params = {
                    n: p if n in self._frozen else self._cut.cut(p.detach())
                    for n, p in params.items()
                }
            state = tree.map_tensors(Tensor.detach, state)
            if self._steps:
                del self._states[self._steps]
        else:
            _, *rest = self._states[self._steps]
            self._states[self._steps] = Carry(current, *rest)
            if len(updated) < len(current):
                params = aliased(params, current)
        self._view.write(params)
        self._steps += 1
        self._states[self._steps] = Carry(params, state, self._buffers.take(), None)
        if self.learn != "nothing":
            self._chain.step(lambda: tree.tensors((params, state)))
        self._losses.append(loss if self._second_order else number)
        # Keep a number per step, not a tensor per step.
        if len(self._losses) == 256 and not self._second_order:
            self._losses = [self._stacked_losses()]
        return params

    def _place(self, placed: Params | None = None) -> None:
        """Note the parameters as they are: later edits are found by comparison."""
        if self._kernels is not None:
            placed = self._view.read() if placed is None else placed
            trained = {name: placed[name] for name in self._trained}
            self._placed = Placed(trained, self._edits, marks=self._second_order)
            self._edits.handed_out.clear()
            if self._kernels.watches:
                self._edits.start(trained)

    def _check_edits(self, current: Params, handed_out: Mapping[int, Tensor]) -> None:
        """Raise if a parameter was edited while nobody looked."""
        if self._kernels is None:
            return
        recorded = self._placed.check(lambda: current, handed_out)
        if recorded and self._differentiates_weights:
            exact, near = _met(
                [current[n] for n in recorded], {n: current[n] for n in self._trained}, recorded
            )
            # A first-order gradient lets go of the graph that it runs through.
            if others := exact or ((near - exact) if not self._second_order else set()):
                raise InvalidInputError(
                    f"the parameter {recorded[0]!r} of loop.model was edited in place, with "
                    f"gradients on, and now depends on {sorted(others)[0]!r} (or on what both came "
                    "from): the gradient of a step with respect to the latter would contain what "
                    f"it does through the former. Write loop.assign({{{recorded[0]!r}: new_value}})"
                )

    def _own_code(self) -> AbstractContextManager[object]:
        return nullcontext() if self._kernels is None else self._kernels.paused()

    def _users_code(self) -> AbstractContextManager[object]:
        """Return the block for a closure that runs inside `_own_code`."""
        return nullcontext() if self._kernels is None else self._kernels.resumed()

    def _now(self) -> Carry:
        """Return the newest state, with the user's edits in it."""
        return self._states[self._steps]._replace(
            params=self._view.read(), buffers=self._buffers.take()
        )

    def _stacked_losses(self) -> Float[Tensor, " steps"]:
        """Return the losses so far in one tensor."""
        like = next(iter(self._view.read().values()))
        return (
            torch.cat([loss.reshape(-1) for loss in self._losses])
            if self._losses
            else like.new_zeros(0)
        )

    def _as_loss(self, loss: object) -> Tensor:
        """Return ``loss`` as a scalar; raise unless it can be differentiated."""
        check_has_values("the loss given to loop.step", loss)
        loss = check_loss(loss, "the loss given to loop.step")
        if not self._trained:
            raise InvalidInputError(
                "there is nothing to train: every parameter of the optimizer is frozen "
                "(requires_grad=False)"
            )
        if not loss.requires_grad:
            refuse_transform()
            why = (
                "torch.no_grad() is on: compute it in `with torch.enable_grad():`"
                if not torch.is_grad_enabled()
                else "it was detached, or computed without loop.model"
            )
            raise InvalidInputError(
                f"the loss does not depend on any parameter through the graph ({why}): compute it "
                "as loss_fn(loop.model(x), y)"
            )
        return loss

    def _checked(self, loss: object) -> Tensor:
        """Return `_as_loss`; raise unless it is finite, which a trial of a line search may be."""
        checked = self._as_loss(loss)
        # On another device a check per step would wait for it: there, all are checked at the end.
        if may_read_values(checked):
            self._check_finite(checked)
        return checked

    def _check_finite(self, losses: Tensor) -> None:
        if losses.ndim == 0 and not math.isfinite(losses.item()):
            raise NonFiniteError(
                f"the loss of step {self._steps} is {losses.item()}: the inner loop diverged "
                "(lower the lr?)"
            )
        if losses.ndim and not bool(losses.isfinite().all()):
            first = int((~losses.isfinite()).nonzero()[0])
            raise NonFiniteError(
                f"the loss of step {first} is {losses[first].item()}: the inner loop diverged "
                "(lower the lr?)"
            )

    def _check_last(self) -> None:
        """Raise unless the newest parameters are finite: no later loss shows the last step."""
        current = self._view.read()
        for name in self._trained:
            # A parameter that was taken away is None.
            if isinstance(current[name], Tensor) and not is_finite(current[name]):
                raise NonFiniteError(self.not_finite(f"parameter {name!r} of loop.model"))

    def _look(self) -> Look:
        """Return what looks once at the outer gradients that arrive at parameters."""
        # The graph must not hold the loop, which holds the graph.
        this = weakref.ref(self)

        def look(names: Sequence[str | None], grads: Sequence[Tensor | None]) -> None:
            if all_finite(g for g in grads if g is not None):
                return
            pairs = zip(names, grads, strict=False)
            wrong = (n for n, g in pairs if n is not None and g is not None and not is_finite(g))
            name = next(wrong, next(filter(None, names), None))
            loop, what = this(), f"the outer gradient that arrives at {name!r}"
            raise NonFiniteError(f"{what} is not finite" if loop is None else loop.not_finite(what))

        return look

    def not_finite(self, what: str) -> str:
        """Say which step was the first after which parameters are not finite."""
        first = next(
            (
                t
                for t, carry in sorted(self._states.items())
                if t and not all_finite(carry.params[n] for n in self._trained)
            ),
            None,
        )
        # Within a backward pass the model's weights cannot be read otherwise.
        closed, self._gate.closed = self._gate.closed, False
        current = self._view.read()
        self._gate.closed = closed
        if first is None and all_finite(current[n] for n in self._trained):
            where = (
                "the losses and parameters of all steps are finite, but a second derivative in one "
                "of them (a norm or a square root at zero), or of the outer loss, is not; "
                "torch.autograd.detect_anomaly() around the block names the operation"
            )
        else:
            step = self._steps - 1 if first is None else first - 1
            where = (
                f"the loss of step {step} is finite, but its gradient or its update is not (a "
                "square root or a norm at zero has an infinite gradient; or lower the lr)"
            )
        return f"{what} is not finite: {where}"

    def _gradient_of(self, loss: Tensor, current: Params, transform: Transform | None) -> Gradients:
        """Compute the gradients, as ``backward()`` and the user's hooks and callback would."""

        def independent() -> InvalidInputError:
            return InvalidInputError(
                f"the loss depends on none of the {len(wanted)} parameters that the optimizer "
                "trains, as they are now: compute it with loop.model (not with the model that was "
                "passed to track), and anew after each step"
            )

        nodes: list[Node] = []
        leaves = check_graph(
            [loss], current.values(), second_order=self._second_order, sparse=nodes
        )
        wanted = {name: current[name] for name in self._trained if current[name].requires_grad}
        if not wanted:
            refuse_transform()
            raise independent()
        found = inner_gradient(
            loss,
            wanted,
            create_graph=self._second_order,
            independent=independent,
            gate=self._gate,
            # A buffer that the step has computed is there for the outer loss.
            keep_graph=not self._second_order
            and self.learn != "nothing"
            and any(b.requires_grad for b in self._view.read_buffers().values()),
        )
        self._gate.closed = self._second_order
        self._check_origin(found, leaves)
        sparse = sparse_ones(found)
        if nodes or sparse:
            self._sparse |= sparse | sent_sparse(nodes, wanted)
        # Where none is sparse, `finish` need not look again.
        as_they_are = not sparse or self._optimizer.takes_sparse
        with self._users_code() if self._hooks or transform is not None else nullcontext():
            grads = finish(found, hooks=self._hooks, takes_sparse=as_they_are)
            if transform is None:
                return grads
            at = {name: current[name] for name in grads}
            changed, _ = transform.apply(grads, transform.init(at), at, transform.resolve(None))
        return changed

    def _as_seen(self, loss: Tensor) -> Tensor:
        """Detach the loss unless second derivatives are tracked.

        The optimizer then sees loss and gradients alike.
        """
        return loss if self._second_order else loss.detach()

    def _current(self) -> dict[str, Tensor]:
        """Return the parameters as they are now; raise if one is no longer a tensor."""
        current = self._view.read()
        for name, p in current.items():
            if not isinstance(p, Tensor):
                raise InvalidInputError(
                    f"parameter {name!r} of loop.model was replaced by {p!r}: assign a tensor, or "
                    "freeze it"
                )
        return current

    def _check_origin(self, grads: Gradients, leaves: list[Tensor]) -> None:
        """Raise if the loss uses a parameter of the user's own model where it should use ours."""
        for name in (self._own[id(leaf)] for leaf in leaves if id(leaf) in self._own):
            if name in grads and grads[name] is None:
                raise InvalidInputError(
                    f"the loss uses {name!r} of the model that was passed to track, not that of "
                    "loop.model: it is reached through a "
                    "closure or an object that is not a module. Make that a method of the module, "
                    "or a submodule"
                )


def _grad_mode(enabled: bool) -> AbstractContextManager[object]:
    """Switch recording on or off in a block; where it is so already, nothing is done."""
    if torch.is_grad_enabled() is enabled:
        return nullcontext()
    return torch.set_grad_enabled(enabled)


def graph_free(model: Model, *, keeps_statistics: bool, densely: bool) -> ModuleView:
    """Return another view of the user's module, which never holds the graph of a loop."""
    view = ModuleView(model)
    if keeps_statistics:
        keep_running_statistics(view)
    if densely:
        look_up_densely(view.modules)
    return view


def _told_apart(new: Params, current: Params) -> dict[str, Tensor]:
    """Return aliases of the parameters that stay and that others are now computed from.

    The gradient with respect to such a parameter itself would contain what it does to the loss
    through the others, which an inner gradient holds constant.
    """
    _, near = _met(list(new.values()), current, new)
    return {n: _alias(current[n]) for n in current if n in near}


def _met(
    ends: Sequence[Tensor], params: Params, besides: Collection[str]
) -> tuple[set[str], set[str]]:
    """Return which of ``params``, but for some of them, ``ends`` were computed from.

    Returns:
        Those, and those that came out of one operation with a tensor from which they were computed:
        a backward pass towards one of these runs there too.
    """
    stay = {n: p for n, p in params.items() if n not in besides and p.requires_grad}
    leaves = {id(p): n for n, p in stay.items() if p.grad_fn is None}
    edges = {(p.grad_fn, p.output_nr): n for n, p in stay.items() if p.grad_fn is not None}
    nodes: dict[Node | None, set[str]] = {}
    for (node, _), name in edges.items():
        nodes.setdefault(node, set()).add(name)
    exact: set[str] = set()
    near: set[str] = set()
    stack: list[Any] = [(x.grad_fn, x.output_nr) for x in ends]
    seen: set[Any] = set()
    while stack:
        edge = stack.pop()
        node = edge[0]
        if node is None or edge in seen:
            continue
        seen.add(edge)
        if node in nodes:
            near |= nodes[node]
            exact |= {edges[edge]} if edge in edges else set()
        elif type(node).__name__ == "AccumulateGrad":
            exact |= {leaves[id(node.variable)]} if id(node.variable) in leaves else set()
        else:
            stack.extend(node.next_functions)
    return exact, near | exact


def _called_with(closure: Callable[..., object] | None, args: Sequence[object]) -> Closure:
    """Return a closure without arguments."""
    if closure is None:
        raise InvalidInputError(
            "args= was given to loop.step together with a loss: they are handed to a function that "
            "computes it, loop.step(fn, args=(x, y))"
        )
    return partial(closure, *args)
