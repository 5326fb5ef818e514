"""Tensors that a step's own functions store elsewhere, where steps run on constants.

What a loss computes on the way, and the user keeps in a list or an object, must still know where it
came from: its derivative is right, or an error when a backward pass of the user's comes by here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from innerloop._inner_gradient.graph import check_graph
from innerloop._types import Grads, HyperTree, Named, Params
from innerloop._utils import torch_private, tree
from innerloop.errors import NotDifferentiableError

T = TypeVar("T")


class _Connected(torch.autograd.Function):
    """Values as outputs of a node whose inputs are the tensors that they are the values of."""

    # Not with a `setup_context`, for which torch looks up the signature at every call.
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        # The outputs are the values themselves, no views: they may be edited in place.
        ctx.mark_dirty(*tensors[:count])
        ctx.set_materialize_grads(False)
        ctx.count = count
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *[None] * ctx.count, *cotangents)


class _Lost(torch.autograd.Function):
    """Values as outputs of a node whose backward raises.

    Its inputs are tensors for which somebody may want the derivative: a backward pass that looks
    for one of them comes by here.
    """

    @staticmethod
    def forward(
        ctx: Any, error: Callable[[], Exception], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.mark_dirty(*tensors[:count])
        ctx.error = error
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise ctx.error()


def connected(values: Sequence[Tensor], owners: Sequence[Tensor]) -> list[Tensor]:
    """Return values whose derivative is that of their owners.

    Args:
        values: constants; the results share their memory.
        owners: the tensors that they are the values of.
    """
    if not values:
        return []
    return list(_Connected.apply(len(values), *_data(values), *owners))


def lost(
    error: Callable[[], Exception], values: Sequence[Tensor], anchors: Sequence[Tensor]
) -> list[Tensor]:
    """Return values whose derivative is an error.

    Args:
        error: makes it.
        values: constants; the results share their memory.
        anchors: lead to all for which somebody may want a derivative.
    """
    if not values:
        return []
    return list(_Lost.apply(error, len(values), *_data(values), *anchors))


def with_each(
    values: Mapping[str, Tensor | None], tie: Callable[[list[Tensor]], list[Tensor]]
) -> dict[str, Any]:
    """Return values by name with what ``tie`` makes of all that may have a derivative."""
    known = {n: x for n, x in values.items() if x is not None and tree.differentiable(x)}
    return {**values, **dict(zip(known, tie([*known.values()]), strict=True))}


def _data(values: Sequence[Tensor]) -> list[Tensor]:
    # A mode that interprets tensors (of `adapt`) would make views of them.
    with torch_private.unseen():
        return [x.data for x in values]


def _stored() -> NotDifferentiableError:
    return NotDifferentiableError(
        "an outer loss uses a tensor that the loss (or batches, optimizer_hyper, targets, a hook "
        "or a callback) has stored elsewhere. This strategy runs the loop on constants and keeps "
        "no graph of that, so its derivative would be lost. Return it: loss(params, hyper, batch) "
        "-> (loss, aux), and use traj.aux; or write strategy=innerloop.StoreAll(), or detach it"
    )


class _Anchor(torch.autograd.Function):
    """A tensor that leads to others."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise _stored()


class Outside:
    """What is outside of a loop that runs on constants, and knows of no graph inside.

    Args:
        tensors: those that require grad, for which somebody may want a derivative.
        hyper: the loop's, as the user gave it.

    Attributes:
        hyper: constants. Those that require grad outside require it here, for the functions of the
            user's, and their derivative is an error.
        now: what the functions of the present step were given. What one has stored in an earlier
            step, and uses in this one, leads somewhere else: it counts as captured.
        anchor: leads to all that requires grad outside.
    """

    def __init__(self, tensors: Sequence[Tensor], hyper: HyperTree) -> None:
        with torch.enable_grad():
            self.anchor: Tensor = _Anchor.apply(*tensors)
        self._given = hyper
        self._leaves = [x for x in tree.tensors(hyper) if x.requires_grad]
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self.now: list[Tensor] = []
        known = dict(zip(map(id, self._leaves), self._tied(self._leaves), strict=True))
        self.hyper = tree.map_tensors(lambda x: known.get(id(x), x.detach()), self._given)

    def _tied(self, values: Sequence[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            tied = lost(_stored, values, [self.anchor])
        # They come from one node.
        self.now += tied[:1]
        return tied

    def beside(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return the values of leaves so; a walk finds each leaf behind its own."""
        with torch.enable_grad():
            return [lost(_stored, [x], [x, self.anchor])[0] for x in leaves]

    def params(self, params: Named) -> Params:
        """Return parameters as tensors whose derivative is an error."""
        return with_each(params, self._tied)

    def gradients(self, grads: Grads) -> dict[str, Tensor | None]:
        """Return gradients so."""
        return with_each(grads, self._tied)

    def constant(self, found: T) -> T:
        """Return results without a graph, unless it leads to something else than this step."""
        ends = [x for x in tree.tensors(found) if x.requires_grad]
        if not ends or check_graph(ends, (), second_order=False, stops=self.now):
            return found
        return tree.map_tensors(Tensor.detach, found)

    def call(self, function: Callable[[Params, HyperTree], T], params: Named) -> T:
        """Call a function of params and hyper; its result is a constant."""
        given = self.params(params)
        with torch.enable_grad():
            found = function(given, self.hyper)
        return self.constant(found)
