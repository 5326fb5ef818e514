"""The graph that a function was compiled from, of which its pullback can be compiled as well.

PyTorch then follows the function once and not twice, which for a network of some layers takes as
long as all else that a second process does before its first step.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._utils import torch_private, tree


class Captured:
    """The tensors that compiled code read besides its arguments when it ran last.

    Attributes:
        places: which inputs of its graph they are.
        tensors: themselves.
    """

    __slots__ = ("places", "tensors")

    def __init__(self) -> None:
        self.places: list[int] = []
        self.tensors: list[Tensor] = []

    def note(self, given: Sequence[Any]) -> None:
        """Note them among the inputs of a graph."""
        self.tensors = [given[i] for i in self.places]


class Traced(NamedTuple):
    """What PyTorch made of a function.

    Attributes:
        graph: computes tensors from tensors.
        inputs: for each of its inputs, which leaf of the arguments it is; None: it is captured.
        outputs: for each leaf of what the function returns, which output of the graph it is;
            ``~i``: it is leaf i of the arguments; None: it is no tensor.
        shared: leaves of the arguments that are one tensor with another leaf, of which the graph
            makes one input: they have one cotangent between them.
        captured: the other inputs.
    """

    graph: torch.fx.GraphModule
    inputs: list[int | None]
    outputs: list[int | None]
    shared: set[int]
    captured: Captured

    @classmethod
    def of(
        cls,
        graph: torch.fx.GraphModule,
        captured: Captured,
        fed: Sequence[object],
        gave: Sequence[object],
        arguments: object,
        found: object,
    ) -> Traced | None:
        """Find the places of a graph's inputs and outputs; None: that is not possible.

        Args:
            graph: the graph.
            captured: looks on while it runs.
            fed: its inputs in one call.
            gave: its outputs then.
            arguments: what the function was called with.
            found: what it returned.
        """
        at: dict[int, list[int]] = {}
        for i, x in enumerate(tree.leaves(arguments)):
            if isinstance(x, Tensor):
                at.setdefault(id(x), []).append(i)
        shared = {i for same in at.values() if len(same) > 1 for i in same}
        places = {tensor: same[0] for tensor, same in at.items()}
        inputs = [places.get(id(x)) for x in fed]
        if not all(isinstance(x, Tensor) for x in fed):
            return None
        results = {i: ~place for i, place in places.items()}
        results.update((id(x), i) for i, x in enumerate(gave))
        leaves = tree.leaves(found)
        if any(isinstance(x, Tensor) and id(x) not in results for x in leaves):
            return None
        captured.places = [i for i, place in enumerate(inputs) if place is None]
        captured.note(fed)
        return cls(graph, inputs, [results.get(id(x)) for x in leaves], shared, captured)

    def given(self, leaves: Sequence[Any]) -> list[Tensor]:
        """Return the inputs of the graph, given the leaves of the arguments."""
        outside = iter(self.captured.tensors)
        return [next(outside) if place is None else leaves[place] for place in self.inputs]

    def pulled(
        self, wanted: Sequence[int], ends: Sequence[int], shown: int
    ) -> torch.fx.GraphModule:
        """Return the graph of the pullback.

        Args:
            wanted: the inputs of the graph whose cotangents it returns.
            ends: the outputs whose cotangents are its inputs, after those of the graph.
            shown: an output that it returns last.
        """
        new = torch.fx.Graph()
        place: dict[torch.fx.Node, torch.fx.Node] = {}
        old = list(self.graph.graph.nodes)
        given = [node for node in old if node.op == "placeholder"]
        for node in given:
            place[node] = new.node_copy(node)
        cotangents = [new.placeholder(f"cotangent_{i}") for i in range(len(ends))]
        new.call_function(torch_private.GRAD_MODE, (True,))
        for i in wanted:
            like = place[given[i]]
            copy = new.call_function(torch.detach, (like,))
            # A method is looked up by what a node computes, which says how it can be cached.
            copy.meta["example_value"] = like.meta.get("example_value")
            place[given[i]] = new.call_method("requires_grad_", (copy,))
        outputs: Sequence[Any] = ()
        for node in old[len(given) :]:
            if node.op == "output":
                outputs = torch.fx.map_arg(node.args[0], place.__getitem__)
            else:
                place[node] = new.node_copy(node, place.__getitem__)
        new.call_function(torch_private.GRAD_MODE, (False,))
        found = new.call_function(
            torch_private.gradient_or_zeros,
            ([outputs[i] for i in ends], [place[given[i]] for i in wanted], cotangents),
            {"create_graph": False},
        )
        rows = [new.call_function(operator.getitem, (found, i)) for i in range(len(wanted))]
        loss = new.call_function(torch.detach, (outputs[shown],))
        new.output((*rows, loss))
        return torch.fx.GraphModule(self.graph, new)


def copy_of(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return a copy of a graph, which a compiler may change."""
    new = torch.fx.Graph()
    new.output(new.graph_copy(graph.graph, {}))
    return torch.fx.GraphModule(graph, new)
