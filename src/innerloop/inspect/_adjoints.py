"""One backward sweep through a loop that tells what passes at every step."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree
from innerloop._utils import tree
from innerloop.errors import NotDifferentiableError
from innerloop.inspect._window import vjp
from innerloop.strategy._engine.loop_function import PulledMany, Watcher
from innerloop.strategy._engine.step_pullback import Cotangents, state_of

UNRELATED = (
    "outer_loss does not depend on this trajectory: compute it from the same loop's parameters"
)


class Sink(abc.ABC):
    """Takes what passes in a backward sweep. The tensors may be used for something else later."""

    @abc.abstractmethod
    def param(self, name: str, t: int, g: Tensor | None) -> None:
        """Take the derivative of the outer loss by a parameter at time t; None is zero."""

    @abc.abstractmethod
    def of_hyper(self, path: str, t: int, g: Tensor) -> None:
        """Take what step t alone adds to the derivative by an outer variable."""

    def state(self, t: int, adjoint: Cotangents) -> None:  # noqa: B027
        """Take the derivatives by all leaves of the state before step t, where they are known."""

    def probe(self, k: int, name: str, t: int, g: Tensor) -> None:  # noqa: B027
        """Take the k-th probe, pulled back to a parameter at time t."""


def sweep_back(
    traj: Trajectory,
    value: Tensor,
    hyper: HyperTree,
    sink: Sink,
    signs: list[dict[str, Tensor]] | None = None,
) -> dict[str, Tensor | None]:
    """Differentiate ``value``, and tell ``sink`` what passes at each step.

    Args:
        traj: the trajectory.
        value: the outer loss.
        hyper: the outer variables.
        sink: told about every step.
        signs: probes, cotangents of the last parameters.

    Returns:
        The whole gradient by each outer variable that requires grad, by path.
    """
    if traj.function is None:
        return _by_graph(traj, value, hyper, sink, signs or [])
    return _by_replay(traj, value, sink, signs or [])


def _no_graph() -> NotDifferentiableError:
    return NotDifferentiableError(
        "the parameters of this trajectory have no graph: pass params that require grad to unroll "
        '(outside of torch.no_grad), or track with learn="init" or "outer"'
    )


def _numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(map(str, range(len(tensors))), tensors, strict=True))


def _by_graph(
    traj: Trajectory,
    value: Tensor,
    hyper: HyperTree,
    sink: Sink,
    signs: list[dict[str, Tensor]],
) -> dict[str, Tensor | None]:
    missing = [t for t in range(traj.steps + 1) if t not in traj.times]
    if missing:
        raise NotDifferentiableError(
            f"the state at time {missing[0]} was not kept, and this strategy does not "
            "differentiate every step: use StoreAll() or Checkpointed()"
        )
    first: dict[str, tuple[int, Tensor]] = {}
    later: list[tuple[str, int, Tensor]] = []
    for t in range(traj.steps + 1):
        for name, p in traj.at(t).params.items():
            if not p.requires_grad:
                continue
            sink.param(name, t, None)
            if name in first:
                later.append((name, t, p))
            else:
                first[name] = t, p
    if not first:
        raise _no_graph()
    leaves = {path: x for path, x in tree.named_tensors(hyper) if x.requires_grad}
    aliases = [
        (path, t, x)
        for t, seen in enumerate(traj.hypers)
        for path, x in tree.named_tensors(seen)
        if path in leaves
    ]
    inputs = [*[p for _, p in first.values()], *leaves.values()]

    def sweep(
        ends: list[Tensor],
        given: list[Tensor] | None,
        note: Callable[[str, int, Tensor], None],
        hyper_too: bool,
    ) -> tuple[Tensor | None, ...]:
        with contextlib.ExitStack() as stack:
            for name, t, x in later:
                stack.callback(x.register_hook(_calling(note, name, t)).remove)
            for path, t, x in aliases if hyper_too else ():
                stack.callback(x.register_hook(_calling(sink.of_hyper, path, t)).remove)
            grads = vjp(ends, given, _numbered(inputs))
        for (name, (t, _)), g in zip(first.items(), grads, strict=False):
            if g is not None:
                note(name, t, g)
        return grads

    grads = sweep([value], None, sink.param, True)
    if all(g is None for g in grads):
        raise NotDifferentiableError(UNRELATED)
    for k, named in enumerate(signs):
        ends = {n: p for n, p in traj.at(-1).params.items() if n in named and p.requires_grad}

        def probe(name: str, t: int, g: Tensor, k: int = k) -> None:
            sink.probe(k, name, t, g)

        sweep(list(ends.values()), [named[n] for n in ends], probe, False)
    return dict(zip(leaves, grads[len(first) :], strict=True))


def _calling(
    note: Callable[[str, int, Tensor], None], name: str, t: int
) -> Callable[[Tensor], None]:
    return lambda g: note(name, t, g)


class _Watch(Watcher):
    """Passes on what a replay tells."""

    def __init__(self, traj: Trajectory, sink: Sink, signs: list[dict[str, Tensor]]) -> None:
        self._sink = sink
        self._names = list(traj.at(-1).params)
        self._paths = _paths_of_leaves(traj.record.loop.hyper)
        if signs:
            rest = len(tree.leaves(state_of(traj.at(-1)))) - len(self._names)
            stacked = [
                torch.stack([row[n] for row in signs]) if n in signs[0] else None
                for n in self._names
            ]
            self.many = [*stacked, *[None] * rest]

    def on_step(
        self, t: int, adjoint: Cotangents, of_hyper: Cotangents, many: PulledMany | None
    ) -> None:
        sink = self._sink
        for name, a in zip(self._names, adjoint, strict=False):
            sink.param(name, t, a)
        sink.state(t, adjoint)
        for path, g in zip(self._paths, of_hyper, strict=True):
            if g is not None:
                sink.of_hyper(path, t, g)
        if many is not None:
            for name, rows in zip(self._names, many.state, strict=False):
                for k in range(0 if rows is None else len(rows)):
                    assert rows is not None
                    sink.probe(k, name, t, rows[k])


def _paths_of_leaves(hyper: HyperTree) -> list[str]:
    """Return a path for each leaf of hyper; an empty one for what is no tensor."""
    leaves = tree.leaves(hyper)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    named = [path for path, _ in tree.named_tensors(hyper)]
    found: list[str] = tree.put([""] * len(leaves), places, named)
    return found


def _by_replay(
    traj: Trajectory, value: Tensor, sink: Sink, signs: list[dict[str, Tensor]]
) -> dict[str, Tensor | None]:
    function, hyper = traj.function, traj.record.loop.hyper
    if not function.watched:
        raise NotDifferentiableError(
            "this strategy pulls no adjoint through the steps: use StoreAll() or Checkpointed()"
        )
    start = {n: p for n, p in traj.at(0).params.items() if p.requires_grad}
    leaves = {path: x for path, x in tree.named_tensors(hyper) if x.requires_grad}
    end = {n: p for n, p in traj.at(-1).params.items() if p.requires_grad} if traj.steps else {}
    if not start and not end:
        raise _no_graph()
    watch = _Watch(traj, sink, signs)
    function.watcher = watch
    try:
        grads = vjp([value], None, _numbered([*start.values(), *leaves.values(), *end.values()]))
    finally:
        function.watcher = None
    if all(g is None for g in grads):
        raise NotDifferentiableError(UNRELATED)
    found = iter(grads)
    # What the outer loss takes from the start itself has not passed any step.
    for name in start:
        sink.param(name, 0, next(found))
    whole = {path: next(found) for path in leaves}
    for name in end:
        sink.param(name, traj.steps, next(found))
    for k, named in enumerate(signs):
        for name, x in named.items():
            sink.probe(k, name, traj.steps, x)
    return whole
