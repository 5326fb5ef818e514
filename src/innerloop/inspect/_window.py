"""What lies between two times of a loop: products with its Jacobian, from either side."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._inner_gradient.torch_errors import explain
from innerloop._track.loop import TrackedLoop
from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree
from innerloop._utils import tree
from innerloop._utils.arguments import check_integer, check_mapping
from innerloop._utils.execution import Mode, mode
from innerloop._utils.random_state import at_random_state
from innerloop.errors import InnerLoopError, InvalidInputError, NotDifferentiableError
from innerloop.strategy._base import Loop
from innerloop.strategy._checkpointed import Sweep
from innerloop.strategy._engine.loop_function import PulledMany, Watcher
from innerloop.strategy._engine.replay_context import Record
from innerloop.strategy._engine.step_operator import StepPushforward
from innerloop.strategy._engine.step_pullback import (
    Cotangents,
    OutputCotangents,
    RecordedStep,
    Step,
    _no_forward_mode,
    state_of,
)

Named = Mapping[str, Tensor]
Inspected = Trajectory | TrackedLoop
"""What can be looked into."""


def trajectory_of(given: Inspected) -> Trajectory:
    """Return the trajectory of a loop; raise if ``given`` is neither."""
    if mode() is not Mode.EAGER:
        raise InvalidInputError(
            "innerloop.inspect runs the loop and autograd itself, so it cannot stand inside of "
            "torch.func or compiled code: call it outside"
        )
    if isinstance(given, TrackedLoop):
        return given.trajectory
    if not isinstance(given, Trajectory):
        raise InvalidInputError(
            f"expected a Trajectory, got {type(given).__name__}: pass what innerloop.unroll "
            "returned, or the loop of innerloop.track"
        )
    return given


def time_of(traj: Trajectory, t: int) -> int:
    """Return a time as counted from the start; raise if the loop has no such time."""
    check_integer("a time", t)
    time = t + traj.steps + 1 if t < 0 else t
    if not 0 <= time <= traj.steps:
        traj.at(t)
    return time


class Layout:
    """Named tensors laid side by side in one vector."""

    def __init__(self, named: Named) -> None:
        self.names = list(named)
        self.shapes = [tuple(x.shape) for x in named.values()]
        self.sizes = [x.numel() for x in named.values()]
        self.size = sum(self.sizes)
        like = next(iter(named.values()), torch.zeros(0))
        self.dtype, self.device = like.dtype, like.device
        for x in named.values():
            self.dtype = torch.promote_types(self.dtype, x.dtype)
        self._dtypes = [x.dtype for x in named.values()]

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Return rows ``[k, size]`` as named tensors ``[k, *shape]``."""
        parts = rows.split(self.sizes, 1) if self.names else ()
        return {
            name: part.reshape((len(rows), *shape)).to(dtype)
            for name, part, shape, dtype in zip(
                self.names, parts, self.shapes, self._dtypes, strict=True
            )
        }

    def flat(self, named: Mapping[str, Tensor | None], count: int) -> Tensor:
        """Return named tensors ``[k, *shape]`` as rows ``[k, size]``; None is zero."""
        parts = []
        for name, size in zip(self.names, self.sizes, strict=True):
            x = named.get(name)
            parts.append(
                torch.zeros(count, size, dtype=self.dtype, device=self.device)
                if x is None
                else x.reshape(count, size).to(self.dtype)
            )
        return torch.cat(parts, 1) if parts else torch.zeros(count, 0)

    def row(self, named: Named, what: str) -> Tensor:
        """Return one direction that a user gave, as a row; raise if it does not fit."""
        check_mapping(what, named, "named tensors", "a dict, name -> tensor")
        wrong = [n for n in named if n not in self.names]
        if wrong:
            raise InvalidInputError(
                f"{what} has {wrong}, but there are only {self.names}: write a dict by these names "
                "(one that is missing is zero)"
            )
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name in named and tuple(named[name].shape) != shape:
                raise InvalidInputError(
                    f"{what}[{name!r}] has shape {tuple(named[name].shape)}, but {name!r} has "
                    f"{shape}"
                )
        return self.flat({n: x.detach()[None] for n, x in named.items()}, 1)


class Window(abc.ABC):
    """The Jacobian of the parameters at one time by something earlier, as two products.

    Attributes:
        inputs: what it is differentiated by.
        outputs: the parameters at the later time.
    """

    inputs: Layout
    outputs: Layout

    @abc.abstractmethod
    def push(self, rows: Tensor) -> Tensor:
        """Multiply from the right: tangents ``[k, inputs]`` become ``[k, outputs]``."""

    @abc.abstractmethod
    def pull(self, rows: Tensor) -> Tensor:
        """Multiply from the left: cotangents ``[k, outputs]`` become ``[k, inputs]``."""


class GraphWindow(Window):
    """Products by the graph that a loop has left behind.

    Args:
        outputs: the later tensors.
        inputs: the earlier ones, which require grad.
    """

    def __init__(self, outputs: Named, inputs: Named) -> None:
        self.outputs, self.inputs = Layout(outputs), Layout(inputs)
        self._ends, self._starts = dict(outputs), dict(inputs)

    def pull(self, rows: Tensor) -> Tensor:
        found = []
        for i in range(len(rows)):
            given = self.outputs.split(rows[i : i + 1])
            ends = {n: y for n, y in self._ends.items() if y.requires_grad}
            grads = pulled(list(ends.values()), [given[n][0] for n in ends], self._starts)
            found.append(
                self.inputs.flat({n: g[None] for n, g in zip(self._starts, grads, strict=True)}, 1)
            )
        return torch.cat(found) if found else rows.new_zeros(0, self.inputs.size)

    def push(self, rows: Tensor) -> Tensor:
        # The derivative of u -> u'J by u, along v, is Jv: no forward mode is needed.
        ends = {n: y for n, y in self._ends.items() if y.requires_grad}
        with torch.enable_grad():
            weights = [torch.zeros_like(y).requires_grad_() for y in ends.values()]
            linear = vjp(list(ends.values()), weights, self._starts, create_graph=True)
        kept = [
            (name, g)
            for name, g in zip(self._starts, linear, strict=True)
            if g is not None and g.requires_grad
        ]
        found = []
        for i in range(len(rows)):
            along = self.inputs.split(rows[i : i + 1])
            grads: Sequence[Tensor | None] = [None] * len(weights)
            if kept:
                grads = torch.autograd.grad(
                    [g for _, g in kept],
                    weights,
                    [along[name][0] for name, _ in kept],
                    retain_graph=True,
                    allow_unused=True,
                )
            named = {n: None if g is None else g[None] for n, g in zip(ends, grads, strict=True)}
            found.append(self.outputs.flat(named, 1))
            if not i:
                self._check(rows[:1], found[0])
        return torch.cat(found) if found else rows.new_zeros(0, self.outputs.size)

    def _check(self, row: Tensor, pushed: Tensor) -> None:
        """Raise unless u'(Jv) is (u'J)v: of some operations PyTorch's third derivative is wrong."""
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(pushed.shape, generator=generator, dtype=torch.float64).to(pushed)
        check_transposed(u * pushed, self.pull(u) * row)


def check_transposed(ours: Tensor, theirs: Tensor) -> None:
    """Raise unless the sums of both, which are one number taken in two ways, agree."""
    difference = float((ours.sum() - theirs.sum()).abs())
    size = float(ours.abs().sum() + theirs.abs().sum())
    if difference > 3e3 * torch.finfo(ours.dtype).eps * size + 1e-300:
        raise NotDifferentiableError(
            "the product from the right does not fit that from the left: an operation of the loss "
            "has no forward mode, and PyTorch's derivative of its second derivative is wrong. "
            "Look from the other side, innerloop.inspect.vjp"
        )


class LoopWindow(Window):
    """Products by running a part of the loop again, whatever is left of its graph.

    Args:
        record: the loop as it ran.
        start: the state at the earlier time.
        begin: the earlier time.
        end: the later one.
        names: the parameters that it is differentiated by; None for hyper.
        hyper: path -> place among the leaves of hyper.
    """

    def __init__(
        self,
        record: Record,
        start: Carry,
        begin: int,
        end: int,
        names: Sequence[str] | None,
        hyper: Mapping[str, int],
    ) -> None:
        self.loop = part_of(record, start, begin, end)
        self._context = record.context
        self._names, self._hyper = names, dict(hyper)
        self._leaves = tree.leaves(self.loop.hyper)
        self.outputs = Layout(start.params)
        self.inputs = Layout(
            {n: start.params[n] for n in names}
            if names is not None
            else {path: self._leaves[i] for path, i in hyper.items()}
        )
        self._steps = end - begin

    @cached_property
    def sweep(self) -> Sweep:
        """Return the part of the loop, run once."""
        return Sweep(self.loop, self._context)

    def pull(self, rows: Tensor) -> Tensor:
        given = self.outputs.split(rows)
        rest = len(tree.leaves(state_of(self.loop.start))) - len(given)
        return self.pull_state([*given.values(), *[None] * rest])

    def pull_state(self, many: Cotangents) -> Tensor:
        """Pull cotangents of the whole state, each ``[k, *shape]``, back to the inputs."""
        count = next(len(c) for c in many if c is not None)
        given = dict(zip(self.outputs.names, many, strict=False))
        if not self._steps:
            return self.inputs.flat(given if self._names is not None else {}, count)
        watcher = Collect(many)
        places = set(self._hyper.values())
        self.sweep.pull(watcher, [i in places for i in range(len(self._leaves))])
        if self._names is None:
            return self.inputs.flat(
                {path: watcher.of_hyper.get(i) for path, i in self._hyper.items()}, count
            )
        return self.inputs.flat(dict(zip(given, watcher.state, strict=False)), count)

    def push(self, rows: Tensor) -> Tensor:
        along = self.inputs.split(rows)
        if not self._steps:
            return self.outputs.flat(along if self._names is not None else {}, len(rows))
        count = len(tree.leaves(state_of(self.loop.start)))
        tangents: list[list[Tensor | None]] = [[None] * count for _ in range(len(rows))]
        of_hyper: list[list[Tensor | None]] = [[None] * len(self._leaves) for _ in rows]
        for k in range(len(rows)):
            for name, x in along.items():
                if self._names is not None:
                    tangents[k][self.outputs.names.index(name)] = x[k]
                else:
                    of_hyper[k][self._hyper[name]] = x[k]
        tangents = push_through(
            self.loop, self._context, tangents, of_hyper if self._names is None else None
        )
        named = {
            name: _stacked_rows([row[i] for row in tangents])
            for i, name in enumerate(self.outputs.names)
        }
        return self.outputs.flat(named, len(rows))


def apart(window: GraphWindow, rows: Tensor, *, forward: bool) -> Tensor:
    """Tell tensors of one time apart, some of which were computed from others.

    A momentum is there before the parameters of the same time, which are computed from it. With N
    what the graph knows of such paths, a derivative by all of them is J (1 + N), and J is wanted.

    Args:
        window: from the tensors to themselves, 1 + N.
        rows: tangents that are pushed next, or derivatives that were taken.
        forward: True for tangents.

    Returns:
        Those multiplied by the inverse of 1 + N (or of its transpose): N is nilpotent.
    """
    product = window.push if forward else window.pull
    found = rows
    for _ in range(window.inputs.size + 1):
        new = rows - (product(found) - found)
        if torch.equal(new, found):
            break
        found = new
    return found


def push_through(
    loop: Loop,
    context: Any,
    tangents: list[list[Tensor | None]],
    of_hyper: list[list[Tensor | None]] | None = None,
    after_step: Any = None,
) -> list[list[Tensor | None]]:
    """Push tangents of a state through all steps of ``loop``, in forward mode.

    Args:
        loop: on constants.
        context: the modes in which it runs.
        tangents: each aligned with the leaves of a state.
        of_hyper: for each of them a tangent of hyper; None: hyper is constant.
        after_step: ``after_step(t, carry, tangents) -> tangents``, called after each step.
    """
    carry = loop.start
    with at_random_state(carry.random_state), context.restored(loop.problem):
        for t in loop.batches.times():
            batch = loop.batch(carry, t)
            step = Step(
                loop.problem, carry, loop.hyper, batch, loop.time(t), (), set(), carry.random_state
            )
            tangents, carry = _pushed(loop, step, tangents, of_hyper)
            if after_step is not None:
                tangents = after_step(t, carry, tangents)
    return tangents


def _pushed(
    loop: Loop,
    step: Step,
    tangents: list[list[Tensor | None]],
    of_hyper: list[list[Tensor | None]] | None,
) -> tuple[list[list[Tensor | None]], Carry]:
    """Push tangents through one step; return the new state as well."""
    known = loop.problem.loss in _no_forward_mode
    if not known:
        push, carry = StepPushforward(step), step.carry
        found: list[list[Tensor | None]] = []
        try:
            for k, row in enumerate(tangents):
                pushed, carry = push.advance(row, None if of_hyper is None else of_hyper[k])
                found.append(pushed)
            return found, carry
        except NotDifferentiableError as error:
            if "forward-mode" not in str(error):
                raise
            _no_forward_mode[loop.problem.loss] = True
    wanted = (
        [x is not None for x in of_hyper[0]] if of_hyper else [False] * len(tree.leaves(loop.hyper))
    )
    recorded = RecordedStep(step._replace(wanted=wanted))
    rows = [
        [*row, *(of_hyper[k] if of_hyper else [None] * len(wanted))]
        for k, row in enumerate(tangents)
    ]
    pushed_rows = recorded.push(rows)
    if rows:
        _check_push(recorded, rows[0], pushed_rows[0])
    return pushed_rows, recorded.after.detach()


def _check_push(recorded: RecordedStep, row: Cotangents, pushed: Cotangents) -> None:
    """Raise unless the push of a step is the transpose of its pullback."""
    generator = torch.Generator().manual_seed(0)
    u: Cotangents = [
        None if x is None else torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        for x in pushed
    ]
    found = recorded.pull(OutputCotangents(u, None, []), keep=True)
    ours = [
        (a * b).flatten() for a, b in zip(u, pushed, strict=True) if a is not None and b is not None
    ]
    theirs = [
        (a * b).flatten()
        for a, b in zip([*found.state, *found.hyper], row, strict=True)
        if a is not None and b is not None
    ]
    if ours and theirs:
        check_transposed(torch.cat(ours), torch.cat(theirs))


class Collect(Watcher):
    """Keeps the cotangents before the first step, and the sum of those of hyper."""

    def __init__(self, many: Cotangents) -> None:
        self.many = many
        self.state: Cotangents = list(many)
        self.of_hyper: dict[int, Tensor] = {}

    def on_step(
        self, t: int, adjoint: Cotangents, of_hyper: Cotangents, many: PulledMany | None
    ) -> None:
        assert many is not None
        self.state = many.state
        for i, c in enumerate(many.hyper):
            if c is not None:
                self.of_hyper[i] = self.of_hyper[i] + c if i in self.of_hyper else c


def _stacked_rows(rows: list[Tensor | None]) -> Tensor | None:
    if all(x is None for x in rows):
        return None
    like = next(x for x in rows if x is not None)
    return torch.stack([torch.zeros_like(like) if x is None else x for x in rows])


def part_of(record: Record, start: Carry, begin: int, end: int) -> Loop:
    """Return the steps ``begin`` to ``end - 1`` of a loop that has been run, on constants."""
    loop = record.loop
    return loop._replace(
        start=start.detach(),
        hyper=tree.map_tensors(Tensor.detach, loop.hyper),
        batches=loop.batches.part(begin, end),
        save_at=(),
    )


def state_at(traj: Trajectory, time: int) -> Carry:
    """Return the state at a time, as constants; it is computed again if it was not kept."""
    record: Record = traj.record
    if time == 0:
        return record.loop.start.detach()
    if time in traj.times:
        return traj.at(time).detach()
    before = max(t for t in traj.times if t < time)
    carry = state_at(traj, before)
    loop = part_of(record, carry, before, time)
    with (
        torch.no_grad(),
        at_random_state(carry.random_state),
        record.context.restored(loop.problem),
    ):
        for t in loop.batches.times():
            carry = loop.step(carry, loop.batch(carry, t), t)[0].detach()
    return carry


def window_of(traj: Trajectory, time: int, wrt: int | Named, *, forward: bool = False) -> Window:
    """Return the Jacobian between two times, by the graph or by running the loop again.

    Args:
        traj: the trajectory.
        time: the later time.
        wrt: the earlier time, or named tensors.
        forward: True if products from the right are wanted.
    """
    if not isinstance(wrt, int) or isinstance(wrt, bool):
        check_mapping("wrt", wrt, "a time or named tensors", "wrt=0, or a dict, name -> tensor")
    record: Record | None = traj.record
    again = record is not None and record.exact
    kept = traj.function is None
    if again and record is not None and (forward or not kept):
        found = _loop_window(traj, record, time, wrt)
        if found is not None:
            return found
    outputs, inputs = traj.at(time).params, inputs_of(traj, wrt, time)
    if not any(
        output.requires_grad and is_connected(output.sum(), inputs) for output in outputs.values()
    ):
        raise NotDifferentiableError(
            f"nothing connects the parameters at time {time} with "
            f"wrt={wrt if isinstance(wrt, int) else list(wrt)}: the graph was cut "
            'between them (learn="nothing", loop.detach()), or the tensors take no part in the loop'
        )
    return GraphWindow(outputs, inputs)


def _loop_window(
    traj: Trajectory, record: Record, time: int, wrt: int | Named
) -> LoopWindow | None:
    later = time_of(traj, time)
    if isinstance(wrt, int):
        earlier = ordered(traj, time, wrt)
        if traj.function is None:
            # The graph is there, and says what may be asked.
            names = list(inputs_of(traj, wrt, time))
        else:
            start = record.loop.start.params
            names = [n for n, p in start.items() if tree.differentiable(p)]
            learned = [n for n in names if start[n].requires_grad]
            names = learned if learned and not earlier else names
        return LoopWindow(record, state_at(traj, earlier), earlier, later, names, {})
    places = {id(x): i for i, x in enumerate(tree.leaves(record.loop.hyper))}
    if all(id(x) in places for x in wrt.values()):
        check_requires_grad(wrt)
        hyper = {name: places[id(x)] for name, x in wrt.items()}
        return LoopWindow(record, state_at(traj, 0), 0, later, None, hyper)
    starts = {id(p): n for n, p in record.loop.start.params.items()}
    if all(id(x) in starts for x in wrt.values()) and list(wrt) == [
        starts[id(x)] for x in wrt.values()
    ]:
        return LoopWindow(record, state_at(traj, 0), 0, later, list(wrt), {})
    return None


def ordered(traj: Trajectory, time: int, wrt: int) -> int:
    """Return the earlier time, counted from the start; raise if it is the later one."""
    later, earlier = time_of(traj, time), time_of(traj, wrt)
    if later < earlier:
        raise InvalidInputError(
            f"parameters at time {later} do not depend on those at the later time {earlier}: swap "
            "time and wrt"
        )
    return earlier


def check_requires_grad(wrt: Named) -> None:
    """Raise unless ``wrt`` is a dict of tensors, and all of them require grad."""
    check_mapping("wrt", wrt, "a time or named tensors", "wrt=0, or a dict, name -> tensor")
    if not all(t.requires_grad for t in wrt.values()):
        raise InvalidInputError(
            "wrt has tensors that do not require grad: "
            f"{[n for n, t in wrt.items() if not t.requires_grad]}"
        )


def inputs_of(traj: Trajectory, wrt: int | Named, time: int) -> dict[str, Tensor]:
    """Return the tensors that stand for ``wrt`` in the graph of the loop."""
    if not isinstance(wrt, int):
        check_requires_grad(wrt)
        return dict(wrt)
    traj.at(time), traj.at(wrt)  # raise if out of range, or not kept
    earlier = ordered(traj, time, wrt)
    inputs = {name: p for name, p in traj.at(wrt).params.items() if p.requires_grad}
    if not inputs:
        raise NotDifferentiableError(
            f"the parameters at time {earlier} have no graph: pass params that require grad to "
            "unroll, use a strategy that keeps the "
            'graph (StoreAll), or track with learn="init" or "outer"'
        )
    return inputs


def is_connected(output: Tensor, inputs: Named) -> bool:
    """True if ``output`` depends on one of ``inputs``."""
    return any(g is not None for g in vjp([output], None, inputs))


def pulled(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None, inputs: Named
) -> list[Tensor]:
    """Return the vector-Jacobian product; zero where nothing connects."""
    if not outputs or not outputs[0].requires_grad:
        return [torch.zeros_like(p) for p in inputs.values()]
    grads = vjp(outputs, cotangents, inputs)
    return [
        torch.zeros_like(p) if g is None else g for g, p in zip(grads, inputs.values(), strict=True)
    ]


def vjp(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    inputs: Named,
    *,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return ``torch.autograd.grad``, whose graph is kept; explain what may be wrong with it."""
    try:
        return torch.autograd.grad(
            outputs,
            list(inputs.values()),
            cotangents,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    except InnerLoopError:
        raise
    except RuntimeError as error:
        if "second time" not in str(error):
            raise explain(error) from error
        raise NotDifferentiableError(
            "the graph of this trajectory was freed by a backward pass: inspect before "
            "outer.backward(), or call "
            "outer.backward(retain_graph=True)"
        ) from error


def outer_value(traj: Trajectory, outer: Any, hyper: HyperTree = None) -> Tensor:
    """Return the outer loss as a scalar with a graph.

    Args:
        traj: the trajectory.
        outer: ``outer(traj, hyper)``, a scalar or a pair ``(scalar, aux)``; or the scalar itself.
        hyper: handed to it.
    """
    if callable(outer) and not isinstance(outer, Tensor):
        if traj.record is not None:
            hyper = traj.record.loop.hyper
        with torch.enable_grad():
            outer = outer(traj, hyper)
        outer = outer[0] if isinstance(outer, tuple) else outer
    if not isinstance(outer, Tensor) or outer.numel() != 1 or not outer.requires_grad:
        raise InvalidInputError(
            "outer_loss must be a scalar that depends on the trajectory (not detached, not under "
            "no_grad)"
        )
    return outer


def hyper_of(given: Inspected) -> HyperTree:
    """Return the outer variables of a loop as its outer loss is handed them."""
    if isinstance(given, TrackedLoop):
        return dict(given.hyper)
    return None if given.record is None else given.record.loop.hyper
