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


class Traced(NamedTuple):
    """What PyTorch made of a function.

    Attributes:
        graph: computes tensors from tensors.
        outputs: for each leaf of what the function returns, which output of the graph it is;
            ``~i``: it is leaf i of the arguments; None: it is no tensor.
        names: of the tensors in the arguments, in their order, where one of them is a result.
    """

    graph: torch.fx.GraphModule
    outputs: list[int | None]
    names: list[str]

    @classmethod
    def of(
        cls, graph: torch.fx.GraphModule, gave: Sequence[object], arguments: object, found: object
    ) -> Traced | None:
        """Find the places of a graph's outputs; None: that is not possible.

        Args:
            graph: the graph.
            gave: its outputs in one call.
            arguments: what the function was called with.
            found: what it returned.
        """
        places = {id(x): ~i for i, x in enumerate(tree.leaves(arguments)) if isinstance(x, Tensor)}
        places.update((id(x), i) for i, x in enumerate(gave))
        leaves = tree.leaves(found)
        if any(isinstance(x, Tensor) and id(x) not in places for x in leaves):
            return None
        outputs = [places.get(id(x)) for x in leaves]
        passes = any(place is not None and place < 0 for place in outputs)
        return cls(graph, outputs, names_of(arguments) if passes else [])

    def pulled(self, wanted: Sequence[int], ends: Sequence[int], loss: int) -> torch.fx.GraphModule:
        """Return the graph of the pullback.

        Args:
            wanted: the inputs of the graph whose cotangents it returns.
            ends: the outputs whose cotangents are its inputs, after those of the graph.
            loss: the output that it returns last, as a constant.
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
        new.output((*rows, new.call_function(torch.detach, (outputs[loss],))))
        return torch.fx.GraphModule(self.graph, new)


def names_of(arguments: object) -> list[str]:
    """Return the names of the tensors in a tree, in their order."""
    return [name for name, _ in tree.named_tensors(arguments)]


def copy_of(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return a copy of a graph, which a compiler may change."""
    new = torch.fx.Graph()
    new.output(new.graph_copy(graph.graph, {}))
    return torch.fx.GraphModule(graph, new)
