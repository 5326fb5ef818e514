"""Steps of a hand-written loop that run again in the backward pass.

Each step is one node of the graph that saves no tensors. Its backward asks the `Recorder` for the
state before the step, runs the step once more with a graph, and pulls the cotangents back through
it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from innerloop._carry import _alias
from innerloop._inner_gradient import block
from innerloop._inner_gradient.closure import CachedFirstEvaluation
from innerloop._inner_gradient.gradient import finish, inner_gradient, with_dense_gradients
from innerloop._inner_gradient.loss import check_loss
from innerloop._inner_gradient.torch_errors import explain
from innerloop._module.copier import Gate
from innerloop._module.view import ModuleView, replaced
from innerloop._track.closure import Gradients
from innerloop._types import Params
from innerloop._utils import torch_private, tree
from innerloop._utils.autocast import AutocastModes
from innerloop._utils.compiling import CodePath
from innerloop._utils.fingerprint import Fingerprint, agree
from innerloop._utils.frozen import thaw
from innerloop._utils.heap import give_back_free_pages
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop.errors import InnerLoopError, InvalidInputError, NotDifferentiableError
from innerloop.nn import _mode as replace
from innerloop.nn._derivative_order import Situation
from innerloop.optim._base import Optimizer
from innerloop.optim._transforms.base import Transform
from innerloop.optim._transforms.grad_callback import GradCallback
from innerloop.strategy._engine.kept_states import KeptStates

USE_ARGS = (
    "Hand the data over as arguments, loop.step(fn, args=(x, y)), or let the function capture "
    "them by name; draw batches and random numbers that are not torch's own before loop.step"
)


class State(NamedTuple):
    """The state before a step, as constants.

    Attributes:
        params: those that are not frozen.
        optimizer_state: the optimizer's.
        buffers: of the module.
    """

    params: dict[str, Tensor]
    optimizer_state: Any
    buffers: Params


class Layout(NamedTuple):
    """Which tensors go into a node and come out of it; equal for most steps of a loop.

    Attributes:
        params: the names of the parameters that go in.
        state: the places of those leaves of the optimizer's state that go in.
        hyper: the number of hyper-parameters that go in.
        updated: the names of the parameters that come out.
        new_state: the places of those leaves of the new state that come out.
        new_leaves: how many leaves that has.
    """

    params: tuple[str, ...]
    state: tuple[int, ...]
    hyper: int
    updated: tuple[str, ...]
    new_state: tuple[int, ...]
    new_leaves: int


class Surroundings(NamedTuple):
    """What a step runs in; equal for most steps of a loop.

    Attributes:
        training: the mode of each module.
        autocast: the modes of autocast.
        replaced: what decided which operations were replaced; None: none was.
    """

    training: tuple[bool, ...]
    autocast: AutocastModes
    replaced: Situation | None


class Fixed:
    """Frozen parameters, which steps share with the user's model: nobody may write them in place.

    Args:
        params: detached, by name.
    """

    __slots__ = ("params", "versions")

    def __init__(self, params: dict[str, Tensor]) -> None:
        self.params = params
        self.versions = torch_private.versions(params.values())

    def holds(self, params: Params) -> bool:
        """True if these are the same tensors, and were not written."""
        return params.keys() == self.params.keys() and all(
            p.data_ptr() == params[n].data_ptr() and torch_private.version(params[n]) == version
            for (n, p), version in zip(self.params.items(), self.versions, strict=True)
        )

    def is_unchanged(self) -> bool:
        """True if none was written since."""
        return torch_private.versions(self.params.values()) == self.versions


class StepRecord:
    """What is needed to run one step again, besides the state before it.

    Attributes:
        closure: the frozen closure.
        code: what tells closures apart that are compiled.
        transform: what is done to gradients: a transform, or a frozen callback in a list.
        hyper: overrides of the optimizer's hyper-parameters.
        captured: captured tensors with a history, without it.
        leaves: captured tensors that require grad and have none.
        modules: captured modules that are no part of the model.
        written: tensors that must stay as they are, and how often each had been written.
        optimizer: the optimizer, with its settings at this step.
        random_state: that before the step; None: it draws nothing.
        surroundings: the modes.
        form: of the closure, as compiled code takes it, if that reads nothing else; or None.
        frozen: the parameters that are not trained and do not require grad.
        params, buffers: those that were edited before the step; None: none was.
        loss: the value of the loss.
        gradient: a fingerprint of the gradients that the optimizer got; None: nothing but the loss
            makes them.
        layout: of the node.
        path: of compiled code that took the step; None: not known.
    """

    __slots__ = (
        "buffers", "captured", "closure", "code", "form", "frozen", "gradient", "hyper", "layout",
        "leaves", "loss", "modules", "optimizer", "params", "path", "random_state", "surroundings",
        "transform", "written",
    )  # fmt: skip

    closure: Any
    code: Any
    transform: Any
    hyper: Mapping[str, object]
    captured: list[Tensor]
    leaves: list[Tensor]
    form: Any
    modules: list[nn.Module]
    written: tuple[list[Tensor], list[int]]
    optimizer: Optimizer
    random_state: RandomState | None
    surroundings: Surroundings
    frozen: Fixed
    params: Params | None
    buffers: Params | None
    loss: float | Tensor
    gradient: Fingerprint | None
    layout: Layout
    path: CodePath | None


_CUT_OFF = StepRecord()
"""In the place of a step that is not differentiated any more."""


class Taken(NamedTuple):
    """What a step computes.

    Attributes:
        updated: the new parameters that the optimizer returned.
        optimizer_state: the new state.
        loss: the loss, where the step starts.
        grads: the gradients that the optimizer got first.
    """

    updated: Params
    optimizer_state: Any
    loss: Tensor
    grads: Gradients


class Prepared(NamedTuple):
    """A step that has run again, with its graph.

    Attributes:
        before, after: the states before and after it, as constants.
        ends: where the outputs of its node come out of the graph; None: it does not depend on the
            inputs. The outputs themselves are not kept.
        inputs: the inputs of its node.
    """

    before: State
    after: State
    ends: list[GradientEdge | None]
    inputs: list[Tensor]


Evaluate = Callable[[Params], tuple[Tensor, Gradients]]


def take(
    optimizer: Optimizer,
    names: Sequence[str],
    at: Params,
    state: object,
    hyper: Mapping[str, object],
    evaluate: Evaluate,
    *,
    sparse: set[str],
    keeps_loss: bool,
) -> Taken:
    """Take one step from constants, or from leaves.

    Args:
        optimizer: the optimizer.
        names: of the parameters that it steps.
        at: all parameters.
        state: the optimizer's.
        hyper: overrides.
        evaluate: returns loss and gradients at parameters.
        sparse: the names of those whose gradients may be sparse.
        keeps_loss: True if a rule that evaluates the loss sees its graph.
    """

    def seen(loss: Tensor) -> Tensor:
        return loss if keeps_loss else loss.detach()

    def at_trial(trial: Params) -> tuple[Tensor, Gradients]:
        found, grads = evaluate({**at, **with_dense_gradients(trial, sparse)})
        return seen(found), grads

    loss, grads = evaluate(at)
    params = {name: at[name] for name in names}
    more: dict[str, Any] = {}
    if optimizer.needs_closure:
        more["value_and_grad"] = CachedFirstEvaluation(at_trial, params, seen(loss), grads)
    updated, new_state = optimizer.update(grads, state, params, hyper, **more)
    return Taken(updated, new_state, loss, grads)


class StandIn:
    """Stands for the loop in a closure that runs again."""

    def __init__(self, view: ModuleView, learn: str, first_order: bool) -> None:
        self._view = view
        self.learn = learn
        self.first_order = first_order

    @property
    def model(self) -> Any:
        """Return the module (or dict of modules) at the parameters of the step that runs again."""
        return self._view.module

    def parameters(self, time: int = -1) -> dict[str, Tensor]:
        """Return the parameters of the step that runs again."""
        if time != -1:
            raise self._refusal(f"parameters(time={time})")
        return self._view.read()

    def buffers(self, time: int = -1) -> dict[str, Tensor]:
        """Return the buffers of the step that runs again."""
        if time != -1:
            raise self._refusal(f"buffers(time={time})")
        return self._view.read_buffers()

    def __getattr__(self, name: str) -> Any:
        raise self._refusal(name)

    @staticmethod
    def _refusal(name: str) -> InvalidInputError:
        return InvalidInputError(
            f"a step that runs again in the backward pass asks for loop.{name}, which it cannot "
            "know: a closure under a strategy may use loop.model, loop.parameters() and "
            "loop.buffers(). Compute other things before loop.step and hand them over, "
            "loop.step(fn, args=(...,))"
        )


class ModelCopy:
    """A copy of the user's model in which steps run again; ``loop.model`` is left alone.

    The copy holds no graph: the nodes hold it, and it must not hold them.

    Args:
        view: the copy.
        gate: of the copy; closed but for the step's own code.
        stand_in: the loop, for the closures.
        make_copy: makes the view in which blocks of these steps run again.
        live: ``loop.model``.
    """

    def __init__(
        self,
        view: ModuleView,
        gate: Gate,
        stand_in: StandIn,
        make_copy: Callable[[], ModuleView],
        live: ModuleView,
    ) -> None:
        self.view = view
        self.live = weakref.ref(live)
        self.read = block.ReadModule(view, make_copy)
        again = partial(StandIn, learn=stand_in.learn, first_order=stand_in.first_order)
        self.read.stand_in(stand_in, again)
        self.gate = gate
        self.stand_in = stand_in
        self.lock = threading.RLock()

    @contextmanager
    def running(self, record: StepRecord) -> Iterator[None]:
        """Run in the modes and at the random state of a step."""
        around = record.surroundings
        for module, training in zip(self.view.modules, around.training, strict=True):
            if module.training != training:  # it takes a while to set
                module.training = training
        home, self.gate.home = self.gate.home, torch_private.backward_pass()
        try:
            drawn = record.random_state
            random = nullcontext() if drawn is None else at_random_state(drawn)
            with torch.enable_grad(), random, around.autocast.restored():
                yield
        finally:
            self.gate.home = home


class Recorder:
    """Knows the steps of a loop so far, and computes the state before any of them again.

    Args:
        model: where steps run again.
        kept: the states that are kept.
        names: of the parameters that the optimizer steps.
        trained: of those that are not frozen.
        hooks: the user's hooks on the gradients of parameters.
        second_order: False treats inner gradients as constants.
        start_is_learned: True if gradients with respect to the start of the loop are wanted.
    """

    def __init__(
        self,
        model: ModelCopy,
        kept: KeptStates,
        names: Sequence[str],
        trained: Sequence[str],
        hooks: Sequence[tuple[str, Callable[[Tensor], Tensor | None]]],
        second_order: bool,
        start_is_learned: bool,
    ) -> None:
        self.model = model
        self.kept = kept
        self.names = names
        self.trained = trained
        self.hooks = hooks
        self.second_order = second_order
        self.sparse: set[str] = set()
        self.steps: list[StepRecord] = []
        self._last: tuple[int, State] | None = None
        self._later: tuple[int, State] | None = None
        self._ready: dict[int, Prepared] = {}
        self._merges = True
        self.newest: Params | Fingerprint | None = None
        """Copies of the parameters that the newest step gave; once it ran again, their mark."""
        self.start_is_learned = start_is_learned

    def add(self, record: StepRecord, before: State) -> None:
        """Add a step that was taken from the state ``before``."""
        with self.model.lock:
            t = len(self.steps)
            self.kept.offer(t, before)
            self.newest = None
            self._last = t, before
            self._later = None
            self._ready.clear()
            self.steps.append(record)
            if cut := self.kept.cut(len(self.steps)):
                self.steps[cut - 1] = _CUT_OFF
            if len(self.steps) % TIDIED == 0:
                give_back_free_pages()

    def _prepare(self, t: int) -> Prepared:
        """Run step ``t`` again with a graph, from the last state that is kept.

        The steps just before it, as many as their graphs are small, keep theirs for the nodes that
        come next: each of them then runs again once, not twice.
        """
        known = self._ready.pop(t, None)
        if known is not None:
            return known
        self._ready.clear()
        begin, state, planned = self._where_to_begin(t)
        chained = False
        for time in range(begin, t):
            if self._merges and t - time < self.kept.stride:
                prepared = self._with_graph(time, state, chained)
                if prepared is None:
                    return self._prepare_apart(t)
                self._ready[time], state = prepared, prepared.after
                chained = True
                continue
            state = self._advance(time, state)
            if time + 1 in planned:
                self.kept.keep_for_sweep(time + 1, state)
        prepared = self._with_graph(t, state, chained)
        if prepared is None:
            return self._prepare_apart(t)
        return prepared

    def _where_to_begin(self, t: int) -> tuple[int, State, set[int]]:
        """Return the time and the state from which to come to ``t``, and which times to keep."""
        if self._last is not None and self._last[0] == t:
            return *self._last, set()
        begin, state = self.kept.newest(t)
        return begin, state, self.kept.planned(begin, t) if begin < t else set()

    def _prepare_apart(self, t: int) -> Prepared:
        """Run step ``t`` again, the steps before it without graphs.

        An update with a graph may round otherwise than one without.
        """
        self._merges = False
        return self._prepare(t)

    def _advance(self, t: int, state: State) -> State:
        """Take step ``t`` again, without a graph of the whole."""
        record = self.steps[t]
        # Operations may ask if a tensor requires grad: those ask the same that did in the forward
        # pass.
        untrained = {
            n: state.params[n].detach().requires_grad_()
            for n in record.layout.params
            if n not in self.trained
        }
        at = {**record.frozen.params, **state.params, **untrained}
        hyper = tree.map_tensors(Tensor.detach, record.hyper) if record.hyper else record.hyper
        with self.model.running(record):
            taken, buffers = self._taken(t, record, at, state, hyper, record.captured, graph=False)
        self._check_loss(t, taken.loss)
        params = {**state.params, **{n: taken.updated[n].detach() for n in record.layout.updated}}
        after = taken.optimizer_state
        if any(isinstance(x, Tensor) and x.requires_grad for x in tree.leaves(after)):
            after = tree.map_tensors(Tensor.detach, after)
        new = State(params, after, buffers)
        return self._edited(t + 1, new)

    def _edited(self, t: int, state: State) -> State:
        """Return the state at time ``t`` with the edits that the user made there."""
        record = self.steps[t]
        if record.params is not None:
            edits = {n: p for n, p in record.params.items() if n in state.params}
            state = state._replace(params={**state.params, **edits})
        if record.buffers is not None:
            state = state._replace(buffers=record.buffers)
        return state

    def _taken(
        self,
        t: int,
        record: StepRecord,
        at: Params,
        state: State,
        hyper: Mapping[str, object],
        captured: Sequence[Tensor],
        *,
        graph: bool,
    ) -> tuple[Taken, Params]:
        """Take step ``t`` again from the parameters ``at``; return it, and the new buffers."""
        self._check_written(t, record)
        view = self.model.view
        view.write(at)
        view.write_buffers({name: b.clone() for name, b in state.buffers.items()})
        outside = _with_copied_buffers(record.modules)
        done: dict[int, Any] = {}
        closure = thaw(record.closure, captured, done)
        transform = record.transform
        if isinstance(transform, list):
            transform = GradCallback(thaw(transform[0], captured, done))
        create_graph = graph and self.second_order
        again = record.optimizer.needs_closure
        replaced = record.surroundings.replaced

        def users_code() -> AbstractContextManager[None]:
            return nullcontext() if replaced is None else replace.replacing_as(replaced)

        def evaluate(at: Params) -> tuple[Tensor, Gradients]:
            trial = {
                n: at[n] if at[n].requires_grad else at[n].detach().requires_grad_()
                for n in self.trained
            }
            # Where a rule evaluates the loss again, the gradient is taken where it looks.
            alias = {n: _alias(p) for n, p in trial.items()} if again else trial
            view.write(alias)
            try:
                with users_code(), block.reading(self.model.read, ()):
                    loss = closure()
                loss = check_loss(loss, "the loss of a step that runs again")
                wanted = {n: p for n, p in alias.items() if p.requires_grad}
                found = inner_gradient(
                    loss,
                    wanted,
                    create_graph=create_graph,
                    independent=lambda: self._differs(t, "the loss does not depend on the model"),
                    gate=self.model.gate,
                )
                view.renew_written_buffers()
            finally:
                if again:
                    view.write(trial)
            takes_sparse = record.optimizer.takes_sparse
            if transform is None and not self.hooks:
                return loss, finish(found, takes_sparse=takes_sparse)
            with users_code():
                grads = finish(found, hooks=self.hooks, takes_sparse=takes_sparse)
                if transform is not None:
                    here = {**at, **alias}
                    here = {name: here[name] for name in grads}
                    grads = transformed(transform, grads, here)
            return loss, grads

        try:
            taken = take(
                record.optimizer,
                self.names,
                at,
                state.optimizer_state,
                hyper,
                evaluate,
                sparse=self.sparse,
                keeps_loss=create_graph,
            )
        except InnerLoopError:
            raise
        except RuntimeError as error:
            clearer = explain(error)
            if clearer is not error:
                raise clearer from error
            raise self._failed(t, error) from error
        except Exception as error:
            raise self._failed(t, error) from error
        finally:
            for table, name, buffer in outside:
                table[name] = buffer
            new_buffers = view.read_buffers()
            # The copy holds no graph between steps.
            view.write({**at, **state.params})
        return taken, new_buffers

    def _differs(self, t: int, what: str) -> InvalidInputError:
        """Return the error for a step that does something else when it runs again."""
        return self._unless_replaced(t, _differs(t, what))

    def _failed(self, t: int, error: Exception) -> InvalidInputError:
        """Return the error for a closure that raises when it runs again."""
        return self._unless_replaced(t, _failed(t, error))

    def _unless_replaced(self, t: int, error: InvalidInputError) -> InvalidInputError:
        """Return ``error``, or that of a submodule which the user has replaced."""
        live = self.model.live()
        submodule = None if live is None else live.replaced_submodule(self.model.view)
        return error if submodule is None else replaced(submodule, f"step {t}")

    def _check_written(self, t: int, record: StepRecord) -> None:
        tensors, versions = record.written
        if tensors and torch_private.versions(tensors) != versions:
            raise self._differs(t, "a tensor that the step reads was written in place after it")
        if not record.frozen.is_unchanged():
            raise self._differs(t, "a frozen parameter was written in place after it")

    def _has_same_loss(self, t: int, loss: Tensor) -> bool:
        """True if the loss is what it was, on the processor to the last bit."""
        was, now = self.steps[t].loss, loss.detach()
        return agree(now, was) if isinstance(was, Tensor) else now.item() == was

    def _check_loss(self, t: int, loss: Tensor) -> None:
        if not self._has_same_loss(t, loss):
            raise self._differs(t, "its loss is another number than in the forward pass")

    def pull(
        self, t: int, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Pull the cotangents of what step ``t`` gave back to what went into it.

        Args:
            t: the step.
            cotangents: of the parameters and state that came out, and of the loss.
            wanted: for each input of the node, True if its cotangent is wanted.
        """
        with self.model.lock:
            again = torch_private.keeps_graph()
            cut = self.kept.cut(len(self.steps))
            if t < cut:
                # ``losses[-1]`` sends zeros back to the others.
                if not any(bool(c.any()) for c in cotangents if c is not None):
                    return [None] * len(wanted)
                self.kept.refuse_early()
            if cut and t == cut:
                layout = self.steps[t].layout
                before = len(layout.params) + len(layout.state)
                if self.start_is_learned and any(wanted[:before]):
                    self.kept.refuse_start()
                wanted = [False] * before + list(wanted[before:])
            state, found = self._pull_back(t, cotangents, wanted)
            self._later = t, state
            if self._last is not None and self._last[0] >= t and not again:
                self._last = None
            self.kept.pass_by(t, again=again)
            if t % TIDIED == TIDIED - 1:
                give_back_free_pages()
            return found

    def _pull_back(
        self, t: int, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> tuple[State, list[Tensor | None]]:
        """Run step ``t`` again and pull cotangents back; return the state before it as well."""
        prepared = self._prepare(t)
        return prepared.before, _pulled(prepared, cotangents, wanted)

    def _with_graph(self, t: int, state: State, chained: bool) -> Prepared | None:
        """Run step ``t`` again with a graph; None if the state before it was rounded otherwise.

        Args:
            t: the step.
            state: the state before it.
            chained: True if that comes out of a step with a graph.
        """
        record = self.steps[t]
        layout = record.layout
        with self.model.running(record):
            params = dict(state.params)
            for name in layout.params:
                params[name] = params[name].detach().requires_grad_()
            leaves, optimizer_state = tree.leaves(state.optimizer_state), state.optimizer_state
            if layout.state:
                for place in layout.state:
                    leaves[place] = leaves[place].detach().requires_grad_()
                optimizer_state = tree.with_leaves(optimizer_state, leaves)
            learned: list[Tensor] = []

            def learn(x: Tensor) -> Tensor:
                if not x.requires_grad:
                    return x
                learned.append(x.detach().requires_grad_())
                return learned[-1]

            hyper = tree.map_tensors(learn, record.hyper) if record.hyper else record.hyper
            captured = [x.detach().requires_grad_() for x in record.captured]
            taken, buffers = self._taken(
                t,
                record,
                {**record.frozen.params, **params},
                State(state.params, optimizer_state, state.buffers),
                hyper,
                captured,
                graph=True,
            )
        if chained and not self._has_same_loss(t, taken.loss):
            return None
        self._check_loss(t, taken.loss)
        self._check_gradient(t, taken.grads)
        self._check_later(t, state, taken.updated)
        self._check_newest(t, state, taken.updated)
        new_state = tree.leaves(taken.optimizer_state)
        ends = [taken.updated[n] for n in layout.updated]
        ends += [new_state[place] for place in layout.new_state]
        if self.second_order:
            ends.append(taken.loss)
        inputs = [
            *(params[n] for n in layout.params),
            *(leaves[place] for place in layout.state),
            *learned,
            *captured,
            *record.leaves,
        ]
        after = state
        if t + 1 < len(self.steps):
            new = {**state.params, **{n: taken.updated[n].detach() for n in layout.updated}}
            of_optimizer = tree.map_tensors(Tensor.detach, taken.optimizer_state)
            after = self._edited(t + 1, State(new, of_optimizer, buffers))
        edges = [get_gradient_edge(y) if y.requires_grad else None for y in ends]
        return Prepared(state, after, edges, inputs)

    def _check_gradient(self, t: int, grads: Gradients) -> None:
        """Raise if hooks or a callback made other gradients than in the forward pass."""
        was = self.steps[t].gradient
        if was is not None and not gradient_mark(grads).agrees(was):
            raise self._differs(t, "its gradients (after hooks and grad_callback) are others")

    def _check_newest(self, t: int, before: State, updated: Params) -> None:
        """Raise if the newest parameters are far from those that the forward pass had.

        No later loss tells.
        """
        if t + 1 < len(self.steps) or self.newest is None:
            return
        names = self.steps[t].layout.updated
        now = [updated[n].detach() for n in names]
        if isinstance(self.newest, Fingerprint):
            same = Fingerprint.of(now).agrees(self.newest)
        else:
            then, old = [self.newest[n] for n in names], [before.params[n].detach() for n in names]
            same = not names or _close(now, then, old)
            if same:
                self.newest = Fingerprint.of(now)
        if not same:
            raise self._differs(t, "its new parameters are others than in the forward pass")

    def _check_later(self, t: int, before: State, updated: Params) -> None:
        """Raise if the new parameters are far from those that the forward pass had."""
        if self._later is None or self._later[0] != t + 1:
            return
        edited = self.steps[t + 1].params or {}
        names = [n for n in self.steps[t].layout.updated if n not in edited]
        if not names:
            return
        now, then, old = (
            [x.detach() for x in xs]
            for xs in (
                [updated[n] for n in names],
                [self._later[1].params[n] for n in names],
                [before.params[n] for n in names],
            )
        )
        if not _close(now, then, old):
            raise self._differs(t, "its new parameters are others than in the forward pass")


def _pulled(
    prepared: Prepared, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Pull cotangents back through a step that has run again."""
    pairs = [
        (y, c)
        for y, c in zip(prepared.ends, cotangents, strict=True)
        if c is not None and y is not None
    ]
    row: list[Tensor | None] = [None] * len(prepared.inputs)
    chosen = [i for i, w in enumerate(wanted) if w]
    if not pairs or not chosen:
        return row
    try:
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            [prepared.inputs[i] for i in chosen],
            [c for _, c in pairs],
            allow_unused=True,
        )
    except InnerLoopError:
        raise
    except RuntimeError as error:
        raise explain(error) from error
    for i, g in zip(chosen, found, strict=True):
        row[i] = g if g is None or g.layout == torch.strided else g.to_dense()
    return row


GRAPHS = 16 * 2**20
"""Bytes of graphs of steps that ran again that may wait for the backward pass to come to them."""

TIDIED = 512
"""After how many steps the heap is tidied."""

MOST_GRAPHS = 64
"""How many graphs of steps may wait."""


def working_bytes(loss: Tensor, params: Params) -> int:
    """Return about what the graph of a step that runs again holds, given its loss.

    That of a gradient and of an update holds three times what that of the loss holds, and some
    tensors of the size of the parameters.
    """
    size = sum(p.numel() * p.element_size() for p in params.values())
    return 3 * torch_private.graph_bytes([loss]) + 8 * size


def stride_for(working: int) -> int:
    """Return how many steps may run again with their graphs at once."""
    return max(min(GRAPHS // max(working, 1), MOST_GRAPHS), 1)


def _with_copied_buffers(modules: Sequence[nn.Module]) -> list[tuple[Any, str, Tensor]]:
    """Put copies in the places of buffers, and return where each stood.

    A module beside the model writes its running statistics in the forward pass, and not again when
    the step runs again.
    """
    found: list[tuple[Any, str, Tensor]] = []
    for module in {id(part): part for m in modules for part in m.modules()}.values():
        table = torch_private.buffer_table(module)
        for name, buffer in list(table.items()):
            if isinstance(buffer, Tensor):
                found.append((table, name, buffer))
                table[name] = buffer.detach().clone()
    return found


SHARE = 0.05
"""How much of a step may differ by rounding, which Adam makes large where a gradient is zero."""


def _close(now: list[Tensor], then: list[Tensor], old: list[Tensor]) -> bool:
    """True if two results of one step are the same, up to rounding."""
    error = torch_private.distance(now, then)
    if error == 0:
        return True
    step = torch_private.distance(then, old)
    size = torch_private.distance(then, [torch.zeros_like(x) for x in then])
    eps = max(torch.finfo(x.dtype).eps for x in then)
    return not error > SHARE * step + 100 * eps * size


def gradient_mark(grads: Gradients) -> Fingerprint:
    """Compute a fingerprint of gradients."""
    return Fingerprint.of([g.detach().to_dense() for g in grads.values() if g is not None])


def transformed(transform: Transform, grads: Gradients, at: Params) -> Gradients:
    """Return gradients as a transform without a state, or a user's callback, changes them."""
    changed, _ = transform.apply(grads, transform.init(at), at, transform.resolve(None))
    found: Gradients = changed
    return found


def _differs(t: int, what: str) -> InvalidInputError:
    return InvalidInputError(
        f"step {t} ran again in the backward pass (track with a strategy), and {what}: the "
        f"derivative would be that of another step. {USE_ARGS}; and do not write data in place "
        "before the backward pass"
    )


def _failed(t: int, error: Exception) -> InvalidInputError:
    return InvalidInputError(
        f"step {t} ran again in the backward pass (track with a strategy), and its closure raised "
        f"{type(error).__name__}: {error}. {USE_ARGS}"
    )


class _StepNode(torch.autograd.Function):
    """One step as a node; it hands on outputs that have been computed from constants."""

    # Not with a `setup_context`, for which torch looks up the signature at every call.
    @staticmethod
    def forward(
        ctx: Any, recorder: Recorder, t: int, outputs: list[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.recorder, ctx.t = recorder, t
        ctx.set_materialize_grads(False)
        # Not views of what they were computed from: they may be edited in place.
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotDifferentiableError(
                "a derivative of the meta-gradient was asked for (create_graph=True, or a loop "
                "around this one that differentiates through it), and track with a strategy whose "
                "steps run again gives the first one only. Write track without strategy, or "
                "innerloop.metagradient with strategy=Checkpointed()"
            )
        if torch_private.inside_vmap():
            raise NotDifferentiableError(
                "many cotangents at once (is_grads_batched=True, vmap) do not pass through a loop "
                "whose steps run again (track with a strategy): take one gradient after the other, "
                "or write track without strategy"
            )
        dense = [c if c is None or c.layout == torch.strided else c.to_dense() for c in cotangents]
        none = None, None, None
        wanted = ctx.needs_input_grad[3:]
        if all(c is None for c in dense):
            return (*none, *[None] * len(wanted))
        return (*none, *ctx.recorder.pull(ctx.t, dense, wanted))


def as_node(
    recorder: Recorder, t: int, outputs: list[Tensor], inputs: list[Tensor]
) -> list[Tensor]:
    """Return outputs as the results of a node with these inputs."""
    return list(_StepNode.apply(recorder, t, outputs, *inputs))
