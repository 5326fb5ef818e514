"""A hand-written loop whose steps run again in the backward pass, under a strategy of `track`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import Node

from innerloop._carry import Carry, aliased
from innerloop._inner_gradient.gradient import check_graph, finish, inner_gradient, sent_sparse
from innerloop._inner_gradient.stored import connected, lost, with_each
from innerloop._module.copier import Gate
from innerloop._module.view import ModuleView, keep_running_statistics, look_up_densely
from innerloop._track.changes import refuse_transform
from innerloop._track.closure import Closure, Gradients, evaluate_at
from innerloop._track.compiled import CompiledRecorder, ModuleFacts
from innerloop._track.constant_buffers import constant_buffer, held_buffer, hold_constant
from innerloop._track.loop import Callback, TrackedLoop, graph_free
from innerloop._track.replay import (
    Fixed,
    Layout,
    ModelCopy,
    Recorder,
    StandIn,
    State,
    StepRecord,
    Surroundings,
    Taken,
    as_node,
    gradient_mark,
    stride_for,
    take,
    transformed,
    working_bytes,
)
from innerloop._track.start import Learn, Model, TorchOptimizer
from innerloop._trajectory import Trajectory
from innerloop._types import Params
from innerloop._utils import torch_private, tree
from innerloop._utils.autocast import AutocastModes
from innerloop._utils.execution import Mode, mode
from innerloop._utils.frozen import Freezer
from innerloop._utils.random_state import RandomState
from innerloop._utils.sharded import sharded_names
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.nn._derivative_order import Situation
from innerloop.optim._base import Optimizer, refuse_uncompiled
from innerloop.optim._engine.grads import sparse_ones
from innerloop.optim._from_torch.from_torch import FromTorch
from innerloop.optim._transforms.base import Transform
from innerloop.optim._transforms.grad_callback import GradCallback
from innerloop.strategy._base import Strategy
from innerloop.strategy._engine.compiled_step import counted


class ReplayedLoop(TrackedLoop):
    """A hand-written training loop that keeps some of its states instead of all graphs.

    Args:
        strategy: says which states are kept.
        save_at: the times whose states `at` returns, besides the start and the newest.
    """

    def __init__(
        self,
        model: Model,
        optimizer: TorchOptimizer | Optimizer,
        learn: Learn,
        params: Params | None,
        hyper: Mapping[str, object] | None,
        first_order: bool,
        strategy: Strategy,
        save_at: Sequence[int],
    ) -> None:
        _check_place()
        super().__init__(model, optimizer, learn, params, hyper, first_order)
        self._strategy = strategy
        self._compiles = strategy.kept_states(1).compiled
        if self._compiles:
            refuse_uncompiled(self._optimizer)
        for name, b in self._view.source_buffers.items():
            if b.requires_grad and learn != "nothing":
                raise InvalidInputError(
                    f"the buffer {name!r} of the model requires grad, and a step that runs again "
                    "computes with constant buffers: let the function given to loop.step use the "
                    "tensor itself, loop.step(fn, args=(tensor,)), or detach it, or leave "
                    "strategy= away"
                )
        self._start_is_learned = learn == "init" or any(
            p.requires_grad for p in (params or {}).values()
        )
        _check_devices(self._view.read())
        self._save_at = checked_times(save_at)
        gate = Gate(snapshots=False)
        gate.closed = True
        # The compiler cannot look into the tables of a module that has a gate.
        view = ModuleView(model, None if self._compiles else gate)
        if self._second_order and not self._compiles:
            keep_running_statistics(view)
        if not self._optimizer.takes_sparse:
            look_up_densely(view.modules)
        make_copy = partial(
            graph_free,
            model,
            keeps_statistics=self._second_order,
            densely=not self._optimizer.takes_sparse,
        )
        self._copy = ModelCopy(view, gate, StandIn(view, learn, first_order), make_copy, self._view)
        self._swap: dict[int, object] = {id(self): self._copy.stand_in}
        self._swap.update(
            (id(ours), theirs)
            for ours, theirs in zip(self._view.modules, view.modules, strict=True)
        )
        if isinstance(self._view.module, dict):
            self._swap[id(self._view.module)] = view.module
        self._copy.view.write(
            {n: p.detach() for n, p in self._view.read().items() if isinstance(p, Tensor)}
        )
        self._module_facts: ModuleFacts | None = None
        self._unused: tuple[str, ...] = ()
        self._optimizer_now: tuple[object, Optimizer, list[Tensor], list[int]] | None = None
        self._begin()

    def _begin(self) -> None:
        """Forget the steps so far: the next one is the first."""
        size = sum(
            x.numel() * x.element_size()
            for x in tree.tensors(
                (
                    {n: p for n, p in self._view.read().items() if n not in self._frozen},
                    self._states[self._steps].optimizer_state,
                    self._states[self._steps].buffers,
                )
            )
        )
        self._recorder = (CompiledRecorder if self._compiles else Recorder)(
            self._copy,
            self._strategy.kept_states(max(size, 1)),
            self._names,
            self._trained,
            self._hooks,
            self._second_order,
            self._start_is_learned,
        )
        self._recorder.sparse = self._sparse
        if isinstance(self._recorder, CompiledRecorder):
            self._recorder.unused = self._unused
        start = self._states[0].optimizer_state
        self._plain_state = tree.map_tensors(Tensor.detach, start)
        if self._compiles:
            self._plain_state = counted((self._view.read(), self._plain_state, {}))[1]
        self._plain_leaves = tree.leaves(self._plain_state)
        self._state_leaves = tree.leaves(start)
        self._placed_now: dict[str, tuple[Tensor, int, Tensor]] = {}
        self._frozen_now = Fixed({})
        self._last_record: StepRecord | None = None

    def step(
        self,
        loss: Tensor | Callable[..., object],
        hyper: Mapping[str, object] | None = None,
        grad_callback: Callback | None = None,
        *,
        args: Sequence[object] = (),
    ) -> Float[Tensor, ""]:
        """Take one differentiable step of the optimizer, as `TrackedLoop.step` does.

        Args:
            loss: a function that computes the loss with ``loop.model``. It is called now, and once
                or twice in a backward pass. The values that it reads (its variables, and those of
                the functions around it and in its module) are noted now; data that it reads in
                another way, and that are others by then, are an error.
            hyper: as there.
            grad_callback: as there; called in the backward pass as well.
            args: handed to ``loss``.

        Returns:
            The loss, detached.

        Raises:
            InvalidInputError: a loss in place of a function; besides, as there.
        """
        if isinstance(loss, Tensor) or not callable(loss):
            raise InvalidInputError(
                f"strategy={self._strategy!r} runs each step again in the backward pass, so "
                "loop.step needs a function that computes the loss: loop.step(lambda: "
                "loss_fn(loop.model(x), y))"
            )
        transform = self._transform_of(grad_callback)
        closure = partial(loss, *args) if args else loss
        with self._own_code():
            current = self._current()
            self._facts.check(current)
            if self._second_order:
                self._late_hooks.check(current.items())
            self._check_edits(current, self._edits.handed_out)
            try:
                number = self._replayed(closure, loss, args, current, hyper or {}, transform)
            except BaseException:
                self._view.write(current)
                if self._kernels is not None:
                    self._placed.mark()
                raise
        if self._kernels is not None and self._steps <= 2:
            self._decide_on_watching(self._kernels)
        return number

    def _replayed(
        self,
        closure: Closure,
        function: Callable[..., object],
        args: Sequence[object],
        current: dict[str, Tensor],
        instead: Mapping[str, object],
        transform: Transform | None,
    ) -> Float[Tensor, ""]:
        """Take a step from the parameters ``current``, in a block of the loop's own code."""
        record = StepRecord()
        freezer = Freezer(self._swap, leaves_too=self._compiles)
        record.closure = freezer.call(function, args)
        record.transform = (
            [freezer.value(transform.fn)] if isinstance(transform, GradCallback) else transform
        )
        record.code = _code_of(function)
        record.modules = freezer.modules
        record.captured = [x.detach() for x in freezer.captured]
        record.written = freezer.constants, torch_private.versions(freezer.constants)
        record.surroundings = self._surroundings(current)
        record.optimizer = self._optimizer_as_it_is()
        before, values = self._before(current, record)
        own = self._aliased_hyper(instead)
        hyper = {**self.hyper, **own, **instead}
        record.hyper, learned = _as_constants(hyper)
        random_state = None if self._compiles else RandomState.now()
        weights = list(before.params.values())
        versions_of_weights = torch_private.versions(weights)

        given = record, closure, values, before, freezer.captured, learned, transform
        if isinstance(self._recorder, CompiledRecorder):
            taken, leaves, mark = self._compiled_forward(self._recorder, *given)
        else:
            taken, leaves, mark = self._forward(*given)
        if torch_private.versions(record.written[0]) != record.written[1]:
            raise InvalidInputError(
                "the closure given to loop.step writes a tensor in place that it has captured: it "
                "would be written once more when the step runs again in the backward pass. Return "
                "the loss only, and note other things after loop.step"
            )
        if torch_private.versions(weights) != versions_of_weights:
            raise _writes_weights()
        if random_state is not None:
            now = RandomState.now()
            drawn = now is not None and not random_state.equals(now)
            record.random_state = random_state if drawn else None
        record.leaves = leaves
        versions = torch_private.versions(leaves)
        record.written = [*record.written[0], *leaves], [*record.written[1], *versions]
        record.gradient = mark
        number = taken.loss.detach().clone()
        # A number of Python's where that costs no wait: small tensors that stay fragment memory.
        record.loss = number.item() if number.device.type == "cpu" else number
        self._connect(record, before, taken, current, learned, freezer.captured)
        self._hypers.append(own)
        return number

    def _before(self, current: Params, record: StepRecord) -> tuple[State, dict[str, Tensor]]:
        """Return the state before the step, and all parameters to compute with.

        What the user has edited since the last step is noted in ``record``.
        """
        known, edits = self._placed_now, {}
        values: dict[str, Tensor] = {}
        frozen: dict[str, Tensor] = {}
        moved = self._edits.seen and self._edits.handed_out
        for name, p in current.items():
            seen = known.get(name)
            if (
                seen is not None
                and seen[0] is p
                and seen[1] == torch_private.version(p)
                and not (moved and id(p) in moved)
            ):
                values[name] = seen[2]
                continue
            # Not p.detach(), which tells the watch that the memory is handed out.
            value = Tensor.detach(p)
            if name in self._frozen:
                frozen[name] = value
                continue
            if seen is not None:
                edits[name] = value.clone()
            values[name] = value
        if not self._frozen_now.holds(frozen):
            self._frozen_now = Fixed(frozen)
        record.frozen = self._frozen_now
        record.params = edits or None
        carry = self._states[self._steps]
        hold_constant(self._view)
        buffers = {n: Tensor.detach(b) for n, b in self._buffers.take().items()}
        changed = known and any(
            b is not carry.buffers[n] and not torch.equal(b, carry.buffers[n])
            for n, b in buffers.items()
        )
        record.buffers = buffers if changed else None
        state = State(values, self._plain_state, buffers)
        at = {
            n: p
            if n in self._frozen
            else values[n]
            if n in self._trained or not current[n].requires_grad
            else Tensor.detach(values[n]).requires_grad_()
            for n, p in {**frozen, **values}.items()
        }
        return state, {n: at[n] for n in current}

    def _forward(
        self,
        record: StepRecord,
        closure: Closure,
        at: dict[str, Tensor],
        before: State,
        captured: list[Tensor],
        learned: list[Tensor],
        transform: Transform | None,
    ) -> tuple[Taken, list[Tensor], Any]:
        """Take the step on constants.

        Returns:
            What it gives, the leaves that it captured, and a fingerprint of the gradients if other
            code than the loss has made them.
        """
        leaves: dict[int, Tensor] = {}
        makes = transform is not None or bool(self._hooks)
        so_far = torch_private.nodes_so_far()
        # What the closure stores elsewhere knows where it comes from.
        current = self._current()
        owned = [n for n in before.params if current[n].requires_grad]
        owners = [current[n] for n in owned]
        ties: list[Tensor] = []

        def anchors() -> list[Tensor]:
            return [*owners, *captured, *learned, *leaves.values()]

        def as_stored(grads: Gradients) -> Gradients:
            def tie(values: list[Tensor]) -> list[Tensor]:
                tied = lost(_stored_gradient, values, anchors())
                ties.extend(tied)
                return tied

            return with_each(grads, tie)

        def note(ends: list[Tensor], found: list[Tensor], inside: Params) -> None:
            known = {id(p) for p in inside.values()}
            outside = [x for x in found if id(x) not in known]
            if outside:
                for leaf in _captured_leaves(ends, inside, captured, so_far):
                    leaves[id(leaf)] = leaf

        def note_ends(ends: Sequence[Tensor]) -> None:
            if ends:
                for leaf in _captured_leaves(ends, {}, [*captured, *ties], so_far):
                    leaves[id(leaf)] = leaf

        def evaluate(here: Params) -> tuple[Tensor, Gradients]:
            def gradient_of(loss: Tensor, inside: Params) -> Gradients:
                return self._first_gradient(loss, inside, transform, note, note_ends, as_stored)

            values = [here[n] for n in owned]
            tied = (
                connected(values, owners) if here is at else lost(_stored_trial, values, anchors())
            )
            ties.extend(tied)
            versions = torch_private.versions(tied)
            here = {**here, **dict(zip(owned, tied, strict=True))}
            # Those that are trained are written there.
            self._view.write({n: here[n] for n in owned if n not in self._trained})
            found = evaluate_at(
                here, in_users_code, self._view, self._trained, self._checked, gradient_of
            )
            if torch_private.versions(tied) != versions:
                raise _writes_weights()
            return found

        def in_users_code() -> object:
            with self._users_code():
                return closure()

        if isinstance(self._optimizer, FromTorch):
            self._optimizer.mark_stepped()
        # Weights are leaves or constants here: there is nothing to watch.
        self._edits.is_on = False
        try:
            self._view.write(at)
            hyper = record.hyper
            constants = tree.map_tensors(Tensor.detach, hyper) if hyper else hyper
            with torch.enable_grad():
                taken = take(
                    record.optimizer,
                    self._names,
                    at,
                    before.optimizer_state,
                    constants,
                    evaluate,
                    sparse=self._sparse,
                    keeps_loss=False,
                )
        finally:
            self._edits.is_on = True
        values = [*taken.updated.values(), *tree.leaves(taken.optimizer_state)]
        ends = [x for x in values if isinstance(x, Tensor) and x.requires_grad]
        note_ends([x for x in ends if not any(x is p for p in at.values())])
        return taken, list(leaves.values()), gradient_mark(taken.grads) if makes else None

    def _compiled_forward(
        self,
        recorder: CompiledRecorder,
        record: StepRecord,
        closure: Closure,
        at: dict[str, Tensor],
        before: State,
        captured: list[Tensor],
        learned: list[Tensor],
        transform: Transform | None,
    ) -> tuple[Taken, list[Tensor], Any]:
        """Take the step on constants by compiled code; the first one by uncompiled code as well."""
        if self._module_facts is None:
            self._module_facts = ModuleFacts(self._view)
        if transform is not None or self._hooks:
            raise InvalidInputError(
                "grad_callback, or a hook on the gradients of a parameter, is not compiled: write "
                "what it does as a part of the optimizer, innerloop.optim.chain(innerloop.optim."
                "clip_by_global_norm(1.0), innerloop.optim.sgd(lr=0.1)) for example, or "
                "compile=False"
            )
        for module in record.modules:
            if module.training and next(module.buffers(), None) is not None:
                raise InvalidInputError(
                    f"the closure given to loop.step captures a {type(module).__name__} with "
                    "buffers in train mode besides loop.model, which would be written each time "
                    "that the step runs: call .eval() on it, pass both to track as a dict of "
                    "modules, or write compile=False"
                )
        if not self._steps:
            random_state = RandomState.now()
            taken, leaves, _ = self._forward(record, closure, at, before, captured, learned, None)
            if random_state is not None:
                random_state.restore()
            self._view.write_buffers({n: b.clone() for n, b in before.buffers.items()})
            known = {id(x) for x in captured}
            if any(id(x) not in known for x in leaves):
                raise InvalidInputError(
                    "the closure given to loop.step depends on a tensor that requires grad and "
                    "that it does not capture itself (a parameter of a module, or an attribute of "
                    "an object): hand it over, loop.step(fn, args=(tensor,)), or write "
                    "compile=False"
                )
            self._unused = tuple(n for n, g in taken.grads.items() if g is None)
            recorder.unused = self._unused
        unchanged = self._module_facts.are_unchanged()
        if not unchanged and self._steps:
            raise _changed_module()
        if isinstance(self._optimizer, FromTorch):
            self._optimizer.mark_stepped()
        taken, buffers = recorder.step(record, before)
        if not unchanged:
            # After the first step: that a module cannot be compiled is the better reason.
            raise _changed_module()
        self._check_finite(taken.loss)
        self._view.write_buffers(buffers)
        return taken, [], None

    def _first_gradient(
        self,
        loss: Tensor,
        current: Params,
        transform: Transform | None,
        note: Callable[[list[Tensor], list[Tensor], Params], None],
        note_ends: Callable[[Sequence[Tensor]], None],
        as_stored: Callable[[Gradients], Gradients],
    ) -> Gradients:
        """Compute the gradients without a graph of their own; raise if they can have none."""

        def independent() -> InvalidInputError:
            return InvalidInputError(
                f"the loss depends on none of the {len(wanted)} parameters that the optimizer "
                "trains, as they are now: compute it with loop.model (not with the model that was "
                "passed to track) inside of the function that is given to loop.step"
            )

        nodes: list[Node] = []
        leaves = check_graph(
            [loss], current.values(), second_order=self._second_order, sparse=nodes
        )
        note([loss], leaves, current)
        if not self._steps and self._recorder.kept.stride == 0:
            trained = {n: current[n] for n in self._trained}
            working = working_bytes(loss, trained)
            self._recorder.kept.stride = stride_for(working)
            self._recorder.kept.make_room(2 * working)
        wanted = {name: current[name] for name in self._trained if current[name].requires_grad}
        if not wanted:
            refuse_transform()
            raise independent()
        found = inner_gradient(
            loss,
            wanted,
            create_graph=False,
            independent=independent,
            gate=self._gate,
            keep_graph=self._second_order,
        )
        self._gate.closed = self._second_order
        self._check_origin(found, leaves)
        sparse = sparse_ones(found)
        if nodes or sparse:
            self._sparse |= sparse | sent_sparse(nodes, wanted)
        as_they_are = not sparse or self._optimizer.takes_sparse
        if transform is None and not self._hooks:
            return finish(found, takes_sparse=as_they_are)
        grads = finish(found, takes_sparse=as_they_are)
        if self._second_order:
            grads = as_stored(grads)
        with self._users_code():
            grads = finish(grads, hooks=self._hooks, takes_sparse=True)
            if transform is not None:
                grads = transformed(transform, grads, {name: current[name] for name in grads})
        note_ends([g for g in grads.values() if g is not None and g.requires_grad])
        return {n: g if g is None else g.detach() for n, g in grads.items()}

    def _connect(
        self,
        record: StepRecord,
        before: State,
        taken: Taken,
        current: dict[str, Tensor],
        learned: list[Tensor],
        captured: list[Tensor],
    ) -> None:
        """Go on to the next time; what the step gave becomes the result of its node."""
        t = self._steps
        carry = self._states[t]
        names = [n for n in before.params if tree.differentiable(before.params[n])]
        old, plain_old = self._state_leaves, self._plain_leaves
        places = [i for i, x in enumerate(old) if tree.differentiable(x)]
        new = tree.leaves(taken.optimizer_state)
        as_before = {id(x): g for x, g in zip(plain_old, old, strict=True) if isinstance(x, Tensor)}
        new_places = [
            i for i, x in enumerate(new) if tree.differentiable(x) and id(x) not in as_before
        ]
        updated = [
            n
            for n, p in taken.updated.items()
            if n not in self._frozen and p is not before.params[n]
        ]
        layout = Layout(
            tuple(names), tuple(places), len(learned), tuple(updated), tuple(new_places), len(new)
        )
        if self._last_record is not None and self._last_record.layout == layout:
            layout = self._last_record.layout
        record.layout = layout
        outputs = [taken.updated[n].data for n in updated] + [new[i].data for i in new_places]
        if self._second_order:
            outputs.append(self._loss_place(taken.loss))
        inputs = [
            *(current[n] for n in names),
            *(old[i] for i in places),
            *learned,
            *captured,
            *record.leaves,
        ]
        if not self._cut.reached and (
            learned or record.leaves or any(x.requires_grad for x in captured)
        ):
            self._cut.reached = True
        # Copies: the user may edit what the step gave.
        newest = {n: p.clone() for n, p in zip(updated, outputs, strict=False)}
        with torch.enable_grad():
            results = as_node(self._recorder, t, outputs, inputs)
            # One that was skipped may be edited later; the times before must not change.
            stepped = dict(zip(updated, results, strict=False))
            skipped = {
                n: p if n in self._frozen else p.clone()
                for n, p in current.items()
                if n not in stepped
            }
            params = {n: stepped[n] if n in stepped else skipped[n] for n in current}
            params = aliased(params, current)
        state_leaves = [as_before.get(id(x), x) if isinstance(x, Tensor) else x for x in new]
        if self._compiles and len(new) == len(old):
            # Counts are tensors in compiled code alone.
            state_leaves = [
                int(x) if type(y) is int else x for x, y in zip(state_leaves, old, strict=True)
            ]
        for i, x in zip(new_places, results[len(updated) :], strict=False):
            state_leaves[i] = x
        state = tree.with_leaves(taken.optimizer_state, state_leaves)
        self._state_leaves = state_leaves
        self._plain_leaves, self._plain_state = new, taken.optimizer_state
        if not self._compiles:
            self._plain_leaves = [x.detach() if isinstance(x, Tensor) else x for x in new]
            self._plain_state = tree.with_leaves(taken.optimizer_state, self._plain_leaves)
        self._recorder.add(record, before)
        self._recorder.newest = newest
        self._last_record = record
        if t == 0 or t in self._save_at:
            self._states[t] = carry._replace(params=current)
        else:
            del self._states[t]
        self._view.write(params)
        self._steps += 1
        hold_constant(self._view, inputs)
        self._states[self._steps] = Carry(params, state, self._buffers.take(), None)
        self._losses.append(results[-1] if self._second_order else taken.loss.detach().clone())
        # Keep a number per step, not a tensor per step.
        if len(self._losses) == 256 and not self._second_order:
            self._losses = [self._stacked_losses()]
        self._place(params)
        plain = taken.updated if self._compiles else {n: taken.updated[n].detach() for n in updated}
        self._placed_now = {
            n: (p, torch_private.version(p), plain[n] if n in stepped else Tensor.detach(p))
            for n, p in params.items()
            if n not in self._frozen
        }

    def _loss_place(self, loss: Tensor) -> Tensor:
        """Return a copy of a loss, beside those of the steps before."""
        place = self._steps % 256
        if not place:
            self._loss_block = loss.detach().new_empty(256)
        found = self._loss_block[place].data
        found.copy_(loss.detach())
        return found

    def _surroundings(self, current: Params) -> Surroundings:
        found = Surroundings(
            tuple(m.training for m in self._view.modules),
            # All of them are on one device.
            AutocastModes.now([next(iter(current.values()))]),
            Situation.now() if self._kernels is not None and self._kernels.replaces else None,
        )
        last = self._last_record
        return last.surroundings if last is not None and last.surroundings == found else found

    def _optimizer_as_it_is(self) -> Optimizer:
        """Return the optimizer with its settings as they are at this step."""
        if not isinstance(self._optimizer, FromTorch):
            return self._optimizer
        self._optimizer.refresh()
        members = self._optimizer.members
        known = self._optimizer_now
        if known is None or known[0] is not members or torch_private.versions(known[2]) != known[3]:
            found = copy.copy(self._optimizer)
            tensors = [x for member in members for x in _tensors_of(member)]
            found.members = tuple(map(_with_copies, members))
            known = members, found, tensors, torch_private.versions(tensors)
            self._optimizer_now = known
        return known[1]

    @property
    def _differentiates_weights(self) -> bool:
        """Return False: a step runs on constants."""
        return False

    @property
    def trajectory(self) -> Trajectory:
        """Return the losses so far, and the states at the start, at ``save_at``, and now."""
        states = {**self._states, self._steps: self._now()}
        found = Trajectory(
            states,
            self._stacked_losses,
            None,
            self._steps,
            "write track(..., save_at=[t]) for each time t that you need",
        )
        found.hypers = tuple(self._hypers)
        return found

    def detach(self) -> None:
        """Cut the graph here, as `TrackedLoop.detach` does."""
        super().detach()
        self._start_is_learned = False
        self._begin()


def _changed_module() -> InvalidInputError:
    return InvalidInputError(
        "an attribute of a module of loop.model was changed inside the loop (a rate of "
        "dropout, a tensor or a submodule, or what a forward pass keeps), or a hook was "
        "registered on it: compiled steps run in a copy that was made before. Do it before "
        "track, or write compile=False"
    )


def _writes_weights() -> InvalidInputError:
    return InvalidInputError(
        "the closure given to loop.step writes a weight of loop.model in place, of which the "
        "derivative would know nothing: edit weights before loop.step, by loop.assign"
    )


def _stored_trial() -> NotDifferentiableError:
    return _stored("the parameters that a line search tries")


def _stored_gradient() -> NotDifferentiableError:
    return _stored("an inner gradient (by grad_callback, or by a hook of a parameter)")


def _stored(what: str) -> NotDifferentiableError:
    return NotDifferentiableError(
        "an outer loss uses a tensor that a step has stored elsewhere and that was computed from "
        f"{what}. With a strategy a step keeps no graph of that, so its derivative would be lost: "
        "compute what the outer loss needs from loop.model after the step, or leave strategy= "
        "away, or detach it"
    )


def _code_of(function: Callable[..., object]) -> object:
    """Return what is the same for a function that is defined anew at each step."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", type(function))


def _check_place() -> None:
    """Raise where a step cannot run again."""
    if mode() is not Mode.EAGER or torch_private.inside_dual_level():
        raise NotDifferentiableError(
            "track with a strategy runs inside a transform of torch.func, forward-mode "
            "differentiation or compiled code, where a step cannot run again: leave strategy= "
            "away, or write the loop with innerloop.unroll"
        )


def _check_devices(params: Params) -> None:
    """Raise if a model lies on several devices, whose backward passes run in threads of their own.

    Two of them would run steps again in one copy of the model, each waiting for the other.
    """
    if sharded := sharded_names(params):
        raise InvalidInputError(
            f"track(..., strategy=...) does not run steps again whose parameters "
            f"({sorted(sharded)[:4]}) are DTensors: leave strategy= away, or write the loop with "
            "innerloop.unroll, whose Checkpointed() takes them"
        )
    devices = sorted({str(p.device) for p in params.values() if isinstance(p, Tensor)})
    if len(devices) > 1:
        raise InvalidInputError(
            f"track(..., strategy=...) runs steps again in one copy of the model, which lies on "
            f"{devices}: put the model on one device, or leave strategy= away"
        )


def checked_times(save_at: Sequence[int]) -> frozenset[int]:
    """Return the times at which states are wanted; raise if one is no time."""
    for t in save_at:
        if not isinstance(t, int) or isinstance(t, bool) or t < 0:
            raise InvalidInputError(
                f"save_at={list(save_at)!r}: write the numbers of steps, 0 or more, after which "
                "loop.at(t) is wanted"
            )
    return frozenset(save_at)


def _as_constants(hyper: Mapping[str, object]) -> tuple[dict[str, object], list[Tensor]]:
    """Return copies of hyper-parameters as leaves; and those that require grad, as they are."""
    learned: list[Tensor] = []
    if not hyper:
        return {}, learned

    def constant(x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x.detach().clone()
        learned.append(x)
        return x.detach().clone().requires_grad_()

    return tree.map_tensors(constant, dict(hyper)), learned


def _tensors_of(member: object) -> list[Tensor]:
    if not dataclasses.is_dataclass(member):
        return []
    values = [getattr(member, f.name) for f in dataclasses.fields(member)]
    return [x for x in tree.tensors(values) if not x.requires_grad]


def _with_copies(member: Any) -> Any:
    """Return a rule with copies of the tensors among its settings: a scheduler writes them."""
    if not _tensors_of(member):
        return member
    changed = {
        f.name: tree.map_tensors(
            lambda x: x if x.requires_grad else x.clone(), getattr(member, f.name)
        )
        for f in dataclasses.fields(member)
    }
    return dataclasses.replace(member, **changed)


def _captured_leaves(
    ends: Sequence[Tensor], inside: Params, captured: list[Tensor], so_far: int
) -> list[Tensor]:
    """Return the leaves outside of the loop that a step depends on, besides ``captured``.

    Args:
        ends: what the step computed.
        inside: the parameters, at which the walk ends.
        captured: tensors with a history, at which it ends too.
        so_far: how many nodes there were before the step.

    Raises:
        InvalidInputError: the step depends on another tensor with a history.
    """
    stops = {(x.grad_fn, x.output_nr) for x in (*inside.values(), *captured) if x.grad_fn}
    own = {id(p) for p in inside.values()}
    leaves: list[Tensor] = []
    seen: set[Node] = set()
    edges: list[Any] = [(x.grad_fn, x.output_nr) for x in ends if x.grad_fn is not None]
    leaves += [x for x in ends if x.grad_fn is None and id(x) not in own]
    while edges:
        edge = edges.pop()
        node = edge[0]
        if node is None or edge in stops or node in seen:
            continue
        if type(node).__name__ == "AccumulateGrad":
            seen.add(node)
            if id(node.variable) not in own:
                leaves.append(node.variable)
            continue
        if (name := held_buffer(node)) is not None:
            raise constant_buffer(name)
        if not torch_private.is_newer(node, so_far):
            raise InvalidInputError(
                "the loss (or grad_callback, or the update) of a step uses a tensor that was "
                f"computed before it ({node.name()}) and that was not found among the variables "
                "of the function given to loop.step: the step cannot run again without it. Hand "
                "it over, loop.step(fn, args=(tensor,)), or capture it by name in the function"
            )
        seen.add(node)
        edges.extend(node.next_functions)
    return leaves
