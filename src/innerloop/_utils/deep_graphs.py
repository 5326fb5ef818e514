"""Let the graph of a long loop be freed in pieces.

The destructor of a node of autograd's graph frees what the node leads to. PyTorch does that
iteratively, but for nodes that Python has looked at (2.13): such a node is freed by its Python
object, and so the destructors of a chain of steps call each other. The 8 MB of a usual stack end
after some 10,000 steps of a small network, and with them the process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

EVERY = 64
"""So many steps are freed by destructors that call each other."""

_KEY = "innerloop: the steps before"


class _Earlier:
    """Nodes between two steps, and those between earlier ones; lets go of the latest ones first.

    The nodes between two later steps hold it as metadata. Those outlive the edges of a node, so
    that its destructor frees nothing that is held here.
    """

    __slots__ = ("_before", "_nodes")

    def __init__(self, nodes: list[Node], before: _Earlier | None) -> None:
        self._nodes = nodes
        self._before = before

    def give_up(self) -> _Earlier | None:
        """Let go of the nodes, and return the earlier ones."""
        before, self._before, self._nodes = self._before, None, []
        return before

    def __del__(self) -> None:
        before = self.give_up()
        # One reference is `before`, one the argument; with another one somebody else holds the
        # earlier steps.
        while before is not None and sys.getrefcount(before) <= 2:
            before = before.give_up()


class Chain:
    """The nodes between the steps of a loop so far."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._earlier: _Earlier | None = None
        self._steps = 0

    def __deepcopy__(self, memo: object) -> Chain:
        """Return a new chain: a copy of a loop has another graph."""
        return Chain()

    def step(self, carried: Callable[[], Iterable[Tensor]]) -> None:
        """Note a step.

        Args:
            carried: returns the tensors by which later steps depend on the loop so far.
        """
        self._steps += 1
        if self._steps % EVERY:
            return
        tensors = carried()
        nodes = list({x.grad_fn for x in tensors if x.grad_fn is not None})
        if not nodes:
            return
        self._earlier = _Earlier(self._nodes, self._earlier)
        self._nodes = nodes
        for node in nodes:
            metadata: Any = node.metadata  # typed as a method
            metadata[_KEY] = self._earlier
