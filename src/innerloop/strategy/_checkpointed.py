"""Some states are kept, and the steps between them run again."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._trajectory import Trajectory
from innerloop._types import Params
from innerloop._utils import tree
from innerloop._utils.digest import digest
from innerloop._utils.execution import Mode, mode
from innerloop._utils.fingerprint import agree
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.strategy._base import Loop, Measure, StepOutputs, Strategy
from innerloop.strategy._disk import Disk
from innerloop.strategy._engine import loop_function, schedule, step_pullback
from innerloop.strategy._engine.compiled_step import CompiledProblem, uncounted
from innerloop.strategy._engine.guards import on_constants
from innerloop.strategy._engine.kept_states import KeptStates
from innerloop.strategy._engine.loop_function import (
    EVERY,
    LoopFunction,
    LoopOutputs,
    PulledMany,
    Watcher,
)
from innerloop.strategy._engine.replay_check import ReplayCheck
from innerloop.strategy._engine.replay_context import ReplayContext
from innerloop.strategy._engine.saved_run import (
    Adjoint,
    Outputs,
    SavedRun,
    fingerprints,
    identity_of,
    plain_leaves,
    random_of,
    remember,
    settled,
)
from innerloop.strategy._engine.snapshots import PLACES, Snapshots
from innerloop.strategy._engine.step_pullback import (
    Cotangents,
    InputCotangents,
    OutputCotangents,
    RecordedStep,
    Step,
    state_of,
)
from innerloop.strategy._forecast import Forecast
from innerloop.strategy._measure import state_bytes, working_bytes

SMALL = 256 * 2**20
"""Bytes of states that are kept in any case when ``slots`` is not given."""

SMALL_UNDER_TRACK = 16 * 2**20
"""As `SMALL`, for a hand-written loop: each step is kept in memory besides, in some kilobytes."""


@dataclasses.dataclass(frozen=True)
class Checkpointed(Strategy):
    r"""Run the loop without a graph, and replay its steps to differentiate them.

    Some of the states are kept, so the memory is bounded; the derivative is exact.

    With s slots the T steps are run backwards by binomial checkpointing (Griewank & Walther 2000),
    which replays the fewest steps possible. The data of an iterator need no known length (Wang,
    Moin & Iaccarino 2009).

    **Cost** with G one inner gradient, A what a first-order step saves, P parameters, S optimizer
    state:

    ============================================  ==========================  ======================
    kept                                          time                        memory
    ============================================  ==========================  ======================
    every state (``slots="all"``)                 4 T G                       T (P + S) + 2.23 A
    :math:`2\sqrt T` states                       about 5 T G                 2 √T (P + S) + 2.23 A
    s states                                      (4 + replays/T) T G         s (P + S) + 2.23 A
    ============================================  ==========================  ======================

    **When**: whenever `StoreAll` does not fit; any number of steps. **Not** for a few steps of a
    small model, where `StoreAll` is up to a third faster; not for second derivatives of long loops,
    which are right but take the memory of `StoreAll`.

    Args:
        slots: how many states are kept at once, the start among them; ``"all"``: every one.
            Default: as many as 256 MB hold, but at least :math:`2\sqrt T`.
        memory: instead of ``slots``: as many as fit into ``"4GB"``, ``"500MB"`` or a number of
            bytes, besides what one step needs.
        product: how a step's second derivative is taken: ``"reverse"`` (reverse over reverse),
            ``"mixed"`` (forward over reverse, one ``jvp`` of the inner gradient), ``"finite"`` (a
            central difference of it: approximate, no second derivative needed), or ``"auto"``: the
            faster exact one on this kind of device.
        save: ``"params"``, or ``"gradients"`` to keep the inner gradient of every step as well (T P
            more): replayed steps then take an update each, not a gradient, and ``"mixed"`` a
            quarter less time.
        offload: where states wait: None (on their device), ``"cpu"`` (pinned memory, copied while
            the device computes), ``"disk"`` (temporary files), or `strategy.Disk`: a named folder,
            from which a loop that was killed goes on when it is called again. ``slots`` is then
            :math:`2\sqrt T` (32 or more) by default; a loop that is killed loses the steps since
            the last state. Iterators, ``save="gradients"`` and ``torch.func`` transforms are
            refused with it.
        keep_batches: data of an iterator are kept for the replay; False refuses an iterator.
        compile: compile the step and its pullback with ``torch.compile``: seconds to a minute once
            per problem and shape, whatever T is; the first ones are compared with the uncompiled
            and refused if they differ (so are losses that draw random numbers). Inside
            ``torch.func`` transforms nothing is compiled.
        finite_step: relative step of ``product="finite"``; its error falls with the square of it,
            until rounding takes over. With the default step, the first and the last step are
            compared with ``"reverse"`` where the loss has a second derivative: one that stops
            gradients (``detach``) has another finite difference than derivative, and is refused.

    Example:
        On the loss w²/2 every step multiplies w by 1 - lr, so d w₃/d w₀ = (1 - lr)³.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5)
        ... )
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> traj = innerloop.unroll(
        ...     problem, {"w": w}, None, steps=3, strategy=innerloop.Checkpointed(slots=1)
        ... )
        >>> torch.autograd.grad(traj.params["w"], w)
        (tensor(0.1250),)
    """

    slots: int | str | None = None
    memory: float | str | None = None
    product: str = "auto"
    save: str = "params"
    offload: str | Disk | None = None
    keep_batches: bool = True
    compile: bool = False
    finite_step: float | None = None

    differentiates: ClassVar[frozenset[str]] = frozenset({"params", "hyper"})

    def __post_init__(self) -> None:
        super().__post_init__()
        slots = self.slots
        if (
            slots is not None
            and slots != "all"
            and (not isinstance(slots, int) or isinstance(slots, bool) or slots < 1)
        ):
            raise InvalidInputError(
                f'slots={slots!r}: write a number of states, 1 or more, or "all"'
            )
        if slots is not None and self.memory is not None:
            raise InvalidInputError("slots and memory are both given: write one of them")
        _choice("product", self.product, ("auto", *step_pullback.PRODUCTS))
        _choice("save", self.save, ("params", "gradients"))
        if not isinstance(self.offload, Disk):
            _choice("offload", self.offload, PLACES, ', or a folder: strategy.Disk("run1")')
        elif self.save == "gradients":
            raise InvalidInputError(
                f'save="gradients" keeps something of every step, which would be a file each in '
                f'{self.offload!r}: write save="params"'
            )
        if self.finite_step is not None and self.product != "finite":
            raise InvalidInputError(
                f'finite_step={self.finite_step} belongs to product="finite", not to '
                f"{self.product!r}"
            )
        if self.finite_step is not None and not self.finite_step > 0:
            raise InvalidInputError(
                f"finite_step={self.finite_step!r}: write a positive number, 1e-5 for example"
            )
        if self.memory is not None:
            in_bytes(self.memory)
        if self.compile and self.save == "gradients":
            raise InvalidInputError(
                'compile=True compiles gradient and update together: write save="params"'
            )

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """True unless the second derivative is a finite difference."""
        return self.product != "finite"

    def __repr__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"Checkpointed({', '.join(changed)})"

    def run(self, loop: Loop) -> Trajectory:
        """Run the loop as one node of the autograd graph, whose backward pass replays it."""
        if mode() is Mode.COMPILING:
            raise NotDifferentiableError(loop_function.COMPILING.format(self))
        if loop.batches.single_pass and not self.keep_batches:
            raise InvalidInputError(
                "batches is an iterator, which yields each batch once, and with "
                "keep_batches=False they are not there for the replay: "
                "write keep_batches=True, or a function batches(params, hyper, t) with steps=T"
            )
        if isinstance(self.offload, Disk):
            _check_resumable(loop, self.offload)
        elif (
            loop.batches.single_pass and mode() is not Mode.TRANSFORMED and self.offload is not None
        ):
            loop.batches.kept = Snapshots(self.offload)
        return loop_function.run(_Replay(loop, self))

    def kept_states(self, size: int) -> KeptStates:
        r"""Return an empty storage for the states of a hand-written loop, whose steps run again.

        Without ``slots`` and ``memory`` it has :math:`2\sqrt t` places after t steps, at least
        32, and more where 16 MB hold more. ``memory`` is that of the states alone.
        """
        offload = self.offload
        if isinstance(offload, Disk):
            raise InvalidInputError(
                f"track(..., strategy=Checkpointed(offload={offload!r})): a hand-written loop does "
                'not go on from its files. Write offload="disk" to keep its states out of memory, '
                "or the loop with innerloop.unroll or innerloop.metagradient to resume it"
            )
        unlike = {
            "product": self.product not in ("auto", "reverse"),
            "save": self.save != "params",
        }
        for name, is_unlike in unlike.items():
            if is_unlike:
                raise InvalidInputError(
                    f"track(..., strategy=Checkpointed({name}={getattr(self, name)!r})): a "
                    "hand-written loop takes slots, memory, offload and compile only; product is "
                    '"reverse", save is "params". Leave it away, or write the loop with '
                    "innerloop.unroll"
                )
        # In place of graphs, the states of so many compiled steps wait for the backward pass.
        stride = min(max(SMALL_UNDER_TRACK // 2 // size, 1), 32) if self.compile else 0
        found: KeptStates
        if self.memory is not None:
            fitting = int(in_bytes(self.memory) // size)
            if fitting < 1:
                raise InvalidInputError(
                    f"memory={self.memory!r} is too little: a state takes {size / 1e6:.3g} MB"
                )
            found = KeptStates(lambda _: fitting, offload, stride=stride)
        elif self.slots == "all":
            found = KeptStates(lambda _: sys.maxsize, offload, stride=1)
        elif isinstance(self.slots, int):
            given = self.slots
            found = KeptStates(lambda _: given, offload, stride=stride)
        else:
            least = max(SMALL_UNDER_TRACK // size, 32)
            found = KeptStates(lambda t: max(least, math.isqrt(4 * t)), offload, stride=stride)
        found.compiled = self.compile
        return found

    def forecast(self, measure: Measure) -> Forecast:
        """Predict the cost: every step replayed once, and the replays that the slots need."""
        steps, state = measure.steps, measure.state_bytes
        cost = measure(dataclasses.replace(self._measured, slots="all", memory=None))
        slots = self.slots_for(measure.loop, steps)
        again = schedule.replays(steps, slots) if slots < steps else 0
        # The line starts from one step, with its state; it grows by what is kept of each.
        gradients = steps if self.save == "gradients" else 0
        kept = state * slots + max(cost.bytes.each - state, 0) * gradients
        working = max(cost.bytes.at(1) - state, 0)
        return Forecast(
            cost.seconds.at(steps) + again * measure.plain().seconds.each,
            kept + working + measure.kept_batch_bytes,
        )

    @property
    def _measured(self) -> Checkpointed:
        """Return what is run to measure the cost of a step: nothing that writes into a folder."""
        named = isinstance(self.offload, Disk)
        return dataclasses.replace(self, offload="disk") if named else self

    def slots_for(self, loop: Loop, steps: int | None, needed: bool = True) -> int:
        """Return how many states are kept at once.

        Args:
            loop: the loop.
            steps: T, or None: not known yet.
            needed: True if the loop will be differentiated.

        Raises:
            InvalidInputError: ``memory`` does not suffice for one step.
        """
        if self.slots == "all":
            return sys.maxsize if steps is None else max(steps, 1)
        if isinstance(self.slots, int):
            return self.slots
        size = state_bytes(loop)
        if self.memory is None:
            small = 0 if isinstance(self.offload, Disk) else SMALL // size
            fitting = max(small, 32, 0 if steps is None else math.ceil(2 * math.sqrt(steps)))
        else:
            # Under a transform a step is not measured: the states may then take the whole budget.
            step = dataclasses.replace(self._measured, slots=1, memory=None)
            measured = needed and steps != 0 and mode() is not Mode.TRANSFORMED
            working = working_bytes(loop, step) if measured else 0.0
            fitting = int((in_bytes(self.memory) - working) // size)
            if fitting < 1 and needed:
                raise InvalidInputError(
                    f"memory={self.memory!r} is too little: a state takes {size / 1e6:.3g} MB, a "
                    "step and its pullback "
                    f"{working / 1e6:.3g} MB"
                )
        return max(fitting, 1) if steps is None else max(min(fitting, steps), 1)


class _Replay(LoopFunction):
    """A loop under `Checkpointed`."""

    watched = True

    def __init__(self, loop: Loop, strategy: Checkpointed) -> None:
        super().__init__(loop)
        self.strategy = strategy
        self._draws = False
        compiles = strategy.compile and not self.transformed
        self._compiled = CompiledProblem(loop.problem, strategy.product) if compiles else None
        self._checks_product = strategy.finite_step is None and not self.transformed
        self._slots = 1
        self._check = ReplayCheck()
        self._open: Callable[[], SavedRun] | None = None
        """Opens the folder of a loop that can go on after it was killed."""

    # -- forward -----------------------------------------------------------------------------------

    def forward(self, loop: Loop) -> LoopOutputs:
        disk = self.strategy.offload
        if not isinstance(disk, Disk):
            return self._forward(loop, None)
        loop = loop._replace(start=settled(loop.start))
        settings = {n: getattr(self.strategy, n) for n in ("product", "finite_step", "compile")}
        identity, random = identity_of(loop, settings), random_of(loop.start)
        steps = loop.batches.steps
        assert steps is not None, "iterators are refused"
        self._open = partial(SavedRun, disk.path, identity, random, steps)
        run = self._open()
        try:
            return self._forward(loop, run)
        except BaseException:
            run.close()
            raise

    def _forward(self, loop: Loop, run: SavedRun | None) -> LoopOutputs:
        steps = loop.batches.steps
        self._slots = self.strategy.slots_for(loop, steps, self.recorded)
        marks = _CheckpointTimes(self._slots, steps)
        snapshots = self._storage() if run is None else run
        gradients = self._storage() if self.strategy.save == "gradients" else None
        states: dict[int, Carry] = {}
        outputs: list[tuple[Tensor, Any]] = []
        begin, carry = 0, loop.start
        if run is not None:
            begin, carry = self._resumed(loop, run, outputs, states)
        written = begin
        before = carry
        checks = self.recorded
        for t in loop.batches.times():
            if t < begin:
                continue
            batch = loop.batch(carry, t)
            if self.recorded or run is not None:
                keep, dropped = marks.at(t)
                if dropped is not None:
                    del snapshots[dropped]
                if keep and run is None:
                    snapshots[t] = carry
                elif keep and run is not None and t > written:
                    self._save(loop, run, t, carry, outputs, states, written)
                    written = t
            before = carry
            if gradients is None:
                carry, loss, aux = on_constants(
                    t, partial(self._step, loop, carry, batch, t), outside=loop.problem.outside
                )
            else:
                (carry, loss, aux), grads = on_constants(
                    t,
                    partial(self._step_by_gradient, loop, carry, batch, t),
                    outside=loop.problem.outside,
                )
                if self.recorded:
                    gradients[t] = (grads, carry.buffers, carry.random_state)
            outputs.append((loss, aux))
            if checks:
                self._check.note_aux(t, aux)
            if t + 1 in loop.save_at and t + 1 != steps:
                kept_state = tree.map_tensors(Tensor.clone, state_of(carry))
                states[t + 1] = step_pullback.carry_of(kept_state, carry.random_state)
            loop.report("forward", t + 1, steps)
        end = len(outputs)
        if run is not None and self.recorded and end > begin:
            # All outputs once more: the backward pass removes the states that hold them.
            self._save(loop, run, end, carry, outputs, states, 0)
        if checks and self._compiled is None:
            self._check.note_last(carry)
        states[end] = carry
        randoms = {t: kept.random_state for t, kept in states.items()}
        found = {t: state_of(kept) for t, kept in states.items()}
        if self._compiled is not None:
            found = {time: uncounted(state, state_of(loop.start)) for time, state in found.items()}
        if self.recorded:
            last = {end - 1: before} if end > begin else {}
            self.kept = _ReplayData(snapshots, last, gradients)
        elif run is not None:
            run.clear()
        rows = StepOutputs(loop.start.params)
        for loss, aux in outputs:
            rows.add(loss, aux)
        return LoopOutputs(found, *rows.stacked(), end, randoms)

    def _resumed(
        self,
        loop: Loop,
        run: SavedRun,
        outputs: list[tuple[Tensor, Any]],
        states: dict[int, Carry],
    ) -> tuple[int, Carry]:
        """Return the time and the state from which the loop goes on.

        What the steps before it gave is added to ``outputs`` and ``states``.
        """
        begin, carry, found = run.resume()
        if carry is None:
            return 0, loop.start
        for part in found:
            remember(loop, part)
        # One step runs again: it tells the structure of aux, and whether the loss is the same.
        with at_random_state(loop.start.random_state):
            batch = loop.batch(loop.start, 0)
            _, loss, aux = on_constants(
                0, partial(self._step, loop, loop.start, batch, 0), outside=loop.problem.outside
            )
        losses = [loss for part in found for loss in part.losses]
        if not agree(loss, losses[0]):
            raise InvalidInputError(
                f"the loss of step 0 is {loss.item():.6g}, and was {losses[0].item():.6g} when the "
                f"states in {run.folder} were written: the loss reads something that has changed. "
                "Change it back, name another folder in Disk, or remove this one"
            )
        leaves = [row for part in found for row in part.aux]
        for t, (loss, row) in enumerate(zip(losses, leaves, strict=True)):
            outputs.append((loss, tree.with_leaves(aux, list(row))))
            if self.recorded:
                self._check.note_aux(t, outputs[-1][1])
        for part in found:
            states.update(part.saved)
        self._draws = self._draws or run.draws
        self._rewind(carry)
        loop.report("forward", begin, loop.batches.steps)
        return begin, carry

    def _save(
        self,
        loop: Loop,
        run: SavedRun,
        t: int,
        carry: Carry,
        outputs: list[tuple[Tensor, Any]],
        states: dict[int, Carry],
        begin: int,
    ) -> None:
        """Write the state at time t, with what the steps from ``begin`` on have given."""
        new = outputs[begin:t]
        run.draws = self._draws
        batches, overrides = fingerprints(loop, begin, t)
        part = Outputs(
            begin,
            [loss for loss, _ in new],
            [plain_leaves(aux) for _, aux in new],
            {time: state for time, state in states.items() if begin < time <= t},
            batches,
            overrides,
        )
        run.save(t, carry, part)

    def _storage(self) -> dict[int, Any] | Snapshots | SavedRun:
        """Return an empty storage for states."""
        # Under a transform tensors have to stay where torch.func sees them: a dict is a pytree, an
        # input of the pullback's node.
        if self.transformed:
            return {}
        if self._open is not None:
            return self._open()
        place = self.strategy.offload
        assert not isinstance(place, Disk), "forward() opens it"
        return Snapshots(place)

    def _sharing(self, new: Carry, old: Carry) -> Carry:
        """Return ``new`` with the random state of ``old``, as long as nothing is drawn."""
        a, b = new.random_state, old.random_state
        if a is None or b is None or a.equals(b):
            return new._replace(random_state=b)
        self._draws = True
        return new

    # -- backward ----------------------------------------------------------------------------------

    def pull(
        self, loop: Loop, kept: Any, cotangents: LoopOutputs, wanted: list[bool]
    ) -> tuple[Cotangents, Cotangents]:
        kept = _ReplayData(self._storage(), {}, None) if kept is None else kept
        run = kept.snapshots if isinstance(kept.snapshots, SavedRun) else None
        if run is None:
            return self._pull(loop, kept, cotangents, wanted, None)
        loop = loop._replace(start=settled(loop.start))
        try:
            found = self._pull(loop, kept, cotangents, wanted, run)
        except BaseException:
            run.close()
            raise
        run.clear()
        return found

    def _pull(
        self,
        loop: Loop,
        kept: _ReplayData,
        cotangents: LoopOutputs,
        wanted: list[bool],
        run: SavedRun | None,
    ) -> tuple[Cotangents, Cotangents]:
        steps = first = self.steps
        saved = {t: tree.leaves(c) for t, c in cotangents.states.items()}
        aux = tree.leaves(cotangents.aux)
        cotangent = saved[steps]
        of_hyper: Cotangents = [None] * len(wanted)
        reached: set[int] = set()
        to_check: list[tuple[Step, OutputCotangents, InputCotangents]] = []
        losses: list[Tensor] = []
        later: Carry | None = None
        watcher = self.watcher
        many = None if watcher is None else watcher.many
        if watcher is not None:
            # It has to see every step.
            run = None
        if run is not None:
            asked = (cotangents.states, cotangents.losses, cotangents.aux, wanted)
            done = run.adjoint(digest(asked))
            if done is not None:
                first, cotangent, of_hyper, reached, later = done
                kept.last.clear()
                for time in [time for time in kept.snapshots if time >= first]:
                    del kept.snapshots[time]
                loop.report("backward", steps - first, steps)
        verified = first
        for t in range(first - 1, -1, -1):
            carry = self._state(loop, t, kept)
            self._rewind(carry)
            batch = loop.batch(carry, t)
            here = RandomState.now() if self._draws else None
            step = Step(
                loop.problem,
                carry,
                loop.hyper,
                batch,
                loop.time(t),
                wanted,
                reached,
                here,
                self.strategy.finite_step,
            )
            if watcher is not None:
                step = watcher.prepare(t, step)
            loss_cotangent = None if cotangents.losses is None else cotangents.losses[t]
            given = OutputCotangents(
                cotangent, loss_cotangent, [None if a is None else a[t] for a in aux]
            )
            gradient = None if kept.gradients is None else kept.gradients[t][0]
            of_many: PulledMany | None = None
            if many is not None and self._compiled is not None and given.is_zero:
                compiled = CompiledProblem(step.problem, self.strategy.product)
                pulled = compiled.pull_many(step, many)
                of_many = PulledMany(pulled.state, pulled.hyper)
                many = of_many.state
                nothing: Cotangents = [None] * len(cotangent)
                pulled = pulled._replace(state=nothing, hyper=[None] * len(wanted))
            elif many is not None:
                recorded = RecordedStep(step)
                pulled = recorded.pull(given, keep=True)
                of_many = PulledMany(*recorded.pull_many(many))
                many = of_many.state
                del recorded
            elif self._compiled is None:
                pulled = step_pullback.pull(self.strategy.product, step, given, gradient)
            else:
                pulled = self._compiled.pull(step, given)
            if self._checks_product and t in self._checked_times(steps):
                to_check.append((step, given, pulled))
            if pulled.after is not None:
                self._check.compare(t, carry, pulled.after, later, gradient)
            later = carry
            cotangent = pulled.state
            losses.append(pulled.loss)
            if t in saved:
                cotangent = [
                    step_pullback.add(a, b) for a, b in zip(cotangent, saved[t], strict=True)
                ]
            of_hyper = [
                step_pullback.add(a, b) for a, b in zip(of_hyper, pulled.hyper, strict=True)
            ]
            if watcher is not None:
                watcher.on_step(t, cotangent, pulled.hyper, of_many)
            if t in kept.snapshots:
                del kept.snapshots[t]
            if kept.gradients is not None:
                del kept.gradients[t]
            if run is not None:
                cotangent, of_hyper = settled((cotangent, of_hyper))
                if t > 0 and run.due:
                    # What is written down has been checked.
                    self._verify(losses, slice(t, verified), to_check)
                    verified = t
                    run.draws = self._draws
                    run.note(Adjoint(t, cotangent, of_hyper, reached, later))
            loop.report("backward", steps - t, steps)
        self._verify(losses, slice(0, verified), to_check)
        return cotangent, [c if i in reached else None for i, c in enumerate(of_hyper)]

    def _verify(
        self,
        losses: list[Tensor],
        steps: slice,
        to_check: list[tuple[Step, OutputCotangents, InputCotangents]],
    ) -> None:
        """Raise unless some replayed steps were those of the forward pass; empty the lists.

        Args:
            losses: theirs, from the last to the first.
            steps: which steps they are.
            to_check: those whose product is compared with another one.
        """
        if losses:
            part = EVERY if len(losses) == self.steps else steps
            self.compare(torch.stack(losses[::-1]), part)
        self._check.raise_if_different()
        for checked in to_check:
            step_pullback.check_product(self.strategy.product, *checked)
        losses.clear()
        to_check.clear()

    def _checked_times(self, steps: int) -> tuple[int, ...]:
        """Return the steps at which a product that assumes symmetry is compared with reverse."""
        return {"finite": (0, steps - 1), "mixed": (steps - 1,)}.get(self.strategy.product, ())

    def _state(self, loop: Loop, t: int, kept: _ReplayData) -> Carry:
        """Return the state before step t.

        It is kept, or replayed from the last one that is; others are kept on the way.
        """
        if t in kept.last:
            return kept.last.pop(t)
        if t == 0:
            return loop.start
        snapshots = kept.snapshots
        # Snapshots are in order of time.
        begin, carry = _last_of(snapshots) or (0, loop.start)
        marks = set(schedule.kept(begin, t + 1, self._slots - len(snapshots)))
        self._rewind(carry)
        for time in range(begin, t):
            carry = self._advance(loop, carry, time, kept)
            if time + 1 in marks and time + 1 < t:
                snapshots[time + 1] = carry
        return carry

    def _advance(self, loop: Loop, carry: Carry, t: int, kept: _ReplayData) -> Carry:
        """Run step t again on constants."""
        if kept.gradients is not None:
            grads, buffers, random_state = kept.gradients[t]
            return loop.problem.update(carry, grads, buffers, loop.hyper, loop.time(t))._replace(
                random_state=random_state
            )
        return self._step(loop, carry, loop.batch(carry, t), t)[0]

    def _step(self, loop: Loop, carry: Carry, batch: object, t: int) -> tuple[Carry, Tensor, Any]:
        problem = loop.problem if self._compiled is None else self._compiled
        new, loss, aux = problem.step(carry, loop.hyper, batch, loop.time(t))
        if self._open is not None:
            new = settled(new)
        return self._sharing(new, carry), loss, aux

    def _step_by_gradient(
        self, loop: Loop, carry: Carry, batch: Any, t: int
    ) -> tuple[tuple[Carry, Tensor, Any], Params]:
        """Run step t, and return its gradient as well."""
        problem = loop.problem
        grads, loss, aux, buffers = problem.gradient(carry.params, carry.buffers, loop.hyper, batch)
        new = problem.update(carry, grads, buffers, loop.hyper, loop.time(t))
        return (self._sharing(new, carry), loss, aux), grads

    def _rewind(self, carry: Carry) -> None:
        if self._draws and carry.random_state is not None:
            carry.random_state.restore()


class Sweep:
    """A loop that has been run once on constants, to be pulled back any number of times.

    Args:
        loop: the loop; its start knows the random state.
        context: the modes in which it runs.
        strategy: which of the states are kept.

    Attributes:
        end: the state after the last step.
        steps: how many there were.
    """

    def __init__(
        self, loop: Loop, context: ReplayContext, strategy: Checkpointed | None = None
    ) -> None:
        self._function = function = _Replay(
            loop, Checkpointed(product="reverse") if strategy is None else strategy
        )
        function.recorded = True
        function.context = context
        self._tensors = [x.detach() for x in function.tensors]
        with (
            torch.no_grad(),
            at_random_state(loop.start.random_state),
            context.restored(loop.problem),
        ):
            ran = function.forward(function.filled(self._tensors))
        function.losses, function.steps = ran.losses, ran.steps
        self.losses, self.steps = ran.losses, ran.steps
        self._kept: _ReplayData = function.kept
        state = ran.states[ran.steps]
        self.end = step_pullback.carry_of(state, ran.random_states[ran.steps])
        self._none = tree.map_leaves(lambda _: None, state)

    def pull(self, watcher: Watcher, wanted: Sequence[bool] = ()) -> None:
        """Pull the cotangents ``watcher.many`` of the last state back; ``watcher`` looks on.

        Args:
            watcher: is told about every step.
            wanted: for each leaf of hyper, True if its cotangent is wanted; default: none is.
        """
        function, kept = self._function, self._kept
        loop = function.filled(self._tensors)
        again = _ReplayData({t: kept.snapshots[t] for t in kept.snapshots}, dict(kept.last), None)
        steps = function.steps
        cotangents = LoopOutputs({steps: self._none}, cast("Tensor", None), None, steps, {})
        function.watcher = watcher
        places = list(wanted) or [False] * len(tree.leaves(loop.hyper))
        try:
            with (
                torch.no_grad(),
                at_random_state(RandomState.now()),
                function.context.restored(loop.problem),
            ):
                function.pull(loop, again, cotangents, places)
        finally:
            function.watcher = None


class _ReplayData(NamedTuple):
    """The data that a backward sweep starts from.

    Attributes:
        snapshots: time -> carry.
        last: the state before the last step, which the sweep needs first.
        gradients: time -> (gradient, buffers and random state after the step), with
            ``save="gradients"``.
    """

    snapshots: dict[int, Carry] | Snapshots | SavedRun
    last: dict[int, Carry]
    gradients: dict[int, Any] | Snapshots | SavedRun | None


def _last_of(snapshots: dict[int, Carry] | Snapshots | SavedRun) -> tuple[int, Carry] | None:
    """Return the last time of which the state is kept, and the state; None: there is none."""
    while snapshots:
        time = next(reversed(snapshots))
        try:
            return time, snapshots[time]
        except KeyError:
            # The file of a `SavedRun` was damaged: an earlier state will do.
            continue
    return None


def _check_resumable(loop: Loop, disk: Disk) -> None:
    """Raise unless the loop can go on from files."""
    if loop.batches.single_pass:
        raise InvalidInputError(
            f"batches is an iterator, which yields each batch once, and a loop that goes on from "
            f"{disk!r} needs those of earlier steps again: pass a list, or a function "
            'batches(params, hyper, t) with steps=T, or write offload="disk", which does not go on'
        )
    if mode() is Mode.TRANSFORMED:
        raise InvalidInputError(
            f"inside of torch.func transforms the states of a loop cannot be written to {disk!r}: "
            "leave offload away there, or take the gradient outside, by innerloop.metagradient"
        )


class _CheckpointTimes:
    """The times whose states the forward pass keeps."""

    def __init__(self, slots: int, steps: int | None) -> None:
        self._all = steps is not None and slots >= steps
        self._online = schedule.OnlineSchedule(slots) if steps is None else None
        self._times = set() if steps is None or self._all else set(schedule.kept(0, steps, slots))

    def at(self, t: int) -> tuple[bool, int | None]:
        """Decide about the state before step t, as `schedule.OnlineSchedule.keep` does."""
        if t == 0:
            return False, None
        if self._online is not None:
            return self._online.keep(t)
        return self._all or t in self._times, None


def in_bytes(memory: float | str) -> int:
    """Return ``"4GB"``, ``"500MB"``, ``"1.5 GiB"`` or a number as bytes.

    Example:
        >>> in_bytes("4GB"), in_bytes("1.5 MiB"), in_bytes(1000)
        (4000000000, 1572864, 1000)
    """
    if isinstance(memory, (int, float)) and not isinstance(memory, bool) and memory >= 1:
        return int(memory)
    pattern = r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]?)(i?)B?\s*"
    found = re.fullmatch(pattern, memory, re.IGNORECASE) if isinstance(memory, str) else None
    count = 0
    if found is not None:
        number, prefix, binary = found.groups()
        count = int(
            float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")
        )
    if count < 1:
        raise InvalidInputError(
            f'memory={memory!r}: write "4GB", "500MB", "1.5GiB", or a number of bytes'
        )
    return count


def _choice(name: str, value: object, choices: tuple[object, ...], more: str = "") -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InvalidInputError(
            f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}{more}"
        )
