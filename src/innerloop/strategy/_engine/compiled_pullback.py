"""The pullback of a compiled step, compiled from the graph of that step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
            found = self._by_graph(path, path.traced, *args)
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
        new = len(given.state)
        if len(traced.outputs) < new + 1:
            return None
        loss = traced.outputs[new]
        bars = [*given.state, given.loss, *given.aux]
        bars += [None] * (len(traced.outputs) - len(bars))
        ends = [
            (place, bar)
            for place, bar in zip(traced.outputs, bars, strict=True)
            if bar is not None and place is not None
        ]
        if loss is None or loss < 0:
            return None
        with torch.enable_grad(), self._around():
            # Code that was compiled under modes takes them off, and would be left before it puts
            # them on again.
            if not torch_private.are_plain([bar for _, bar in ends]):
                return None
            inputs = self._step.inputs_of(path, (state, hyper, batch))
        if inputs is None:
            return None
        leaves = tree.leaves((state, hyper, batch))
        chosen = self._chosen(state, hyper, batch, wanted)
        learned = {id(x): i for i, x in enumerate(leaves[: len(chosen)]) if chosen[i]}
        # A leaf that is one tensor with another has one cotangent with it in the graph.
        if sum(id(x) in learned for x in leaves) > sum(chosen):
            return None
        pairs = [(at, learned[id(x)]) for at, x in enumerate(inputs) if id(x) in learned]
        passed = [(~place, bar) for place, bar in ends if place < 0]
        if passed and names_of((state, hyper, batch)) != traced.names:
            return None
        outputs = [place for place, _ in ends if place >= 0]
        cotangents = [bar.resolve_conj().resolve_neg() for place, bar in ends if place >= 0]
        # Those among the arguments are of the kind that the path has been asked about.
        inside = set(map(id, leaves))
        kinds = [_kind(x) for x in inputs if id(x) not in inside]
        key = tuple(at for at, _ in pairs), tuple(outputs), (*kinds, *map(_kind, cotangents))
        if key not in path.pullbacks:
            if not torch_private.may_compile():
                return None
            graph = traced.pulled([at for at, _ in pairs], outputs, loss)
            path.pullbacks[key] = self._compiled_from(graph, [*inputs, *cotangents])
        run = path.pullbacks[key]
        if run is None:
            return None
        self.path, self.random_state = None, RandomState.now() if path.draws else None
        with self._around():
            *pulled, value = run(*inputs, *cotangents)
        row: Cotangents = [None] * len(chosen)
        for (_, i), bar in zip(pairs, pulled, strict=True):
            row[i] = bar
        for i, c in enumerate(chosen):
            if c and row[i] is None:
                row[i] = torch.zeros_like(leaves[i])
        for i, bar in passed:
            # An argument that is a result as well.
            if i < len(chosen) and chosen[i]:
                row[i] = add(row[i], bar)
        count = len(tree.leaves(state))
        return InputCotangents(row[:count], row[count:], value)

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


def _kind(x: Tensor) -> tuple[object, ...]:
    """Return what code is specialised for."""
    return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad
