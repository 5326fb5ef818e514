"""The pullback of a compiled step, compiled from the graph of that step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop._utils import torch_private, tree
from innerloop._utils.compiling import CodePath, Compiled, compiler_at_work
from innerloop._utils.random_state import RandomState
from innerloop.strategy._engine.step_pullback import (
    Cotangents,
    InputCotangents,
    OutputCotangents,
    State,
    add,
)


class CompiledPullback(Compiled):
    """The pullback of a step.

    Where the step reads nothing but its arguments, the graph that PyTorch made of it is
    differentiated: it need not follow the user's code a second time. Else the pullback is compiled
    as any function is.

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
            found = self._differentiated(path, *args)
            if found is not None:
                return found
        return super().__call__(*args, explain=explain)

    def _differentiated(
        self,
        path: CodePath,
        state: State,
        hyper: Any,
        batch: object,
        wanted: Sequence[bool],
        given: OutputCotangents,
    ) -> InputCotangents | None:
        """Run the derivative of a path's graph; None: it has none."""
        traced = path.traced
        assert traced is not None
        leaves = tree.leaves((state, hyper, batch))
        count = len(tree.leaves(state))
        shown = traced.outputs[count]
        if shown is None or shown < 0:
            return None
        chosen = self._chosen(state, hyper, batch, wanted)
        if any(chosen[i] for i in traced.shared if i < len(chosen)):
            return None
        rows = zip(traced.outputs, [*given.state, given.loss, *given.aux], strict=False)
        ends = [(place, c) for place, c in rows if c is not None and place is not None]
        cotangents = [c for place, c in ends if place >= 0]
        inputs = traced.given(leaves)
        places = {
            i: at
            for at, i in enumerate(traced.inputs)
            if i is not None and i < len(chosen) and chosen[i]
        }
        outputs = [place for place, _ in ends if place >= 0]
        key = (*places, None, *outputs, None, *map(_kind, cotangents))
        if key not in path.pullbacks:
            if not torch_private.may_compile():
                return None
            graph = traced.pulled(list(places.values()), outputs, shown)
            path.pullbacks[key] = self._compiled_from(graph, [*inputs, *cotangents])
        run = path.pullbacks[key]
        if run is None:
            return None
        self.path, self.random_state = None, RandomState.now() if path.draws else None
        with self._around():
            *pulled, loss = run(*inputs, *cotangents)
        row: Cotangents = [
            torch.zeros_like(leaves[i]) if c and i not in places else None
            for i, c in enumerate(chosen)
        ]
        row = tree.put(row, list(places), pulled)
        for place, c in ends:
            # An argument that is a result as well.
            if place < 0 and ~place < len(chosen) and chosen[~place]:
                row[~place] = add(row[~place], c)
        return InputCotangents(row[:count], row[count:], loss)

    def _compiled_from(
        self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]
    ) -> Callable[..., Any] | None:
        try:
            with (
                self._around(),
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
    return x.shape, x.stride(), x.dtype, x.device
