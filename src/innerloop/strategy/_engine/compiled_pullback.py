"""The pullback of a compiled step, compiled from the graph of that step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._utils import torch_private, tree
from innerloop._utils.compiling import CodePath, Compiled, compiler_at_work
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop._utils.traced import Traced, names_of
from innerloop.strategy._engine.step_pullback import (
    Cotangents,
    InputCotangents,
    OutputCotangents,
    State,
    add,
)


class CompiledPullback(Compiled):
    """The pullback of a step.

    The graph that PyTorch made of the step is differentiated, so that PyTorch need not follow the
    user's code a second time. Where that is not possible, the pullback is compiled as any function
    is.

    Args:
        pull: the pullback, as ``pull(state, hyper, batch, wanted, given)``.
        step: the step, which keeps its graph.
        chosen: tells of the leaves of ``(state, hyper)`` which ones are differentiated.
        rest: as for `Compiled`.
    """

    def __init__(
        self,
        pull: Callable[..., InputCotangents],
        step: Compiled,
        chosen: Callable[..., list[bool]],
        *rest: Any,
    ) -> None:
        super().__init__(pull, *rest)
        self._step = step
        self._chosen = chosen

    def __call__(self, *args: Any, explain: Callable[[], object] = lambda: None) -> Any:
        with torch.enable_grad():
            path = self._step.path_for(args[:3])
        if path is not None and path.traced is not None:
            before = RandomState.now() if path.draws else None
            try:
                found = self._by_graph(path, path.traced, *args)
            except Exception:
                # The other way raises the true reason.
                found = None
                if before is not None:
                    before.restore()
            if found is not None:
                return found
        return super().__call__(*args, explain=explain)

    def _by_graph(
        self,
        path: CodePath,
        traced: Traced,
        state: State,
        hyper: Any,
        batch: object,
        wanted: Sequence[bool],
        given: OutputCotangents,
    ) -> InputCotangents | None:
        """Run the derivative of a path's graph; None: it has none, or cannot tell all of it."""
        ends = _ends(traced, given)
        if ends is None:
            return None
        with torch.enable_grad(), self._around():
            # Code that was compiled under modes takes them off, and would be left before it puts
            # them on again.
            if not torch_private.are_plain(ends.bars):
                return None
            inputs = self._step.inputs_of(path, (state, hyper, batch))
        if inputs is None:
            return None
        leaves = tree.leaves((state, hyper, batch))
        chosen = self._chosen(state, hyper, batch, wanted)
        learned = {id(x): i for i, x in enumerate(leaves[: len(chosen)]) if chosen[i]}
        # A leaf that is one tensor with another has one cotangent with it in the graph.
        if sum(id(x) in learned for x in leaves) > len(learned):
            return None
        if ends.passed and names_of((state, hyper, batch)) != traced.names:
            return None
        places = [at for at, x in enumerate(inputs) if id(x) in learned]
        # Inputs among the arguments are of the kind that the path has been asked about.
        inside = set(map(id, leaves))
        kinds = [_kind(x) for x in inputs if id(x) not in inside]
        key = tuple(places), tuple(ends.outputs), (*kinds, *map(_kind, ends.bars))
        if key not in path.pullbacks:
            if not torch_private.may_compile():
                return None
            graph = traced.pulled(places, ends.outputs, ends.loss)
            path.pullbacks[key] = self._compiled_from(graph, [*inputs, *ends.bars])
        run = path.pullbacks[key]
        if run is None:
            return None
        self.path, self.random_state = None, RandomState.now() if path.draws else None
        try:
            with self._around():
                *pulled, loss = run(*inputs, *ends.bars)
        except Exception:
            # What answers now will be compared with eager code, not this.
            path.pullbacks[key] = None
            raise
        reached = {learned[id(inputs[at])]: bar for at, bar in zip(places, pulled, strict=True)}
        row: Cotangents = [
            None if not c else reached[i] if i in reached else torch.zeros_like(leaves[i])
            for i, c in enumerate(chosen)
        ]
        for i, bar in ends.passed:
            if i < len(chosen) and chosen[i]:
                row[i] = add(row[i], bar)
        count = len(tree.leaves(state))
        return InputCotangents(row[:count], row[count:], loss)

    def _compiled_from(
        self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]
    ) -> Callable[..., Any] | None:
        try:
            with (
                self._around(),
                at_random_state(RandomState.now()),
                compiler_at_work(),
                torch_private.inputs_for_compiler(inputs) as stand_ins,
            ):
                run: Callable[..., Any] = self.lowered(graph, stand_ins)
        except Exception:
            # PyTorch says why where it follows the function itself.
            return None
        self.compilations += 1
        self.precision = max(self.precision, self._step.precision)
        return run


class _Ends(NamedTuple):
    """What is pulled back.

    Attributes:
        loss: which output of the graph is the loss.
        outputs: the outputs of the graph that have a cotangent.
        bars: these.
        passed: for each result with a cotangent that is an argument as well, which leaf of them it
            is, and the cotangent.
    """

    loss: int
    outputs: list[int]
    bars: list[Tensor]
    passed: list[tuple[int, Tensor]]


def _ends(traced: Traced, given: OutputCotangents) -> _Ends | None:
    """Find the cotangents of a graph; None: its results are not those of which they are given."""
    bars = [*given.state, given.loss, *given.aux]
    count = len(traced.outputs)
    loss = traced.outputs[len(given.state)] if len(bars) <= count else None
    if loss is None or loss < 0:
        return None
    bars += [None] * (count - len(bars))
    ends = _Ends(loss, [], [], [])
    for place, bar in zip(traced.outputs, bars, strict=True):
        if bar is not None and place is not None and place >= 0:
            ends.outputs.append(place)
            # Code is not specialised for a sign, or a conjugation, that is still to be taken.
            ends.bars.append(bar.resolve_conj().resolve_neg())
        elif bar is not None and place is not None:
            ends.passed.append((~place, bar))
    return ends


def _kind(x: Tensor) -> tuple[object, ...]:
    """Return what code is specialised for."""
    return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad
