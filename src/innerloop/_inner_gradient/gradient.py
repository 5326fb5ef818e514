"""The gradient of an inner loss, as every front end takes it.

A front end calls three functions, each where it needs it: `check_graph` once the loss is known,
`inner_gradient` once it has decided whether to record, `finish` before the optimizer sees the
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from innerloop._inner_gradient.graph import check_graph as check_graph
from innerloop._inner_gradient.graph import sent_sparse as sent_sparse
from innerloop._inner_gradient.torch_errors import explain
from innerloop._module.copier import Gate
from innerloop._utils import torch_private
from innerloop._utils.inner_pass import inner_pass
from innerloop.errors import InnerLoopError
from innerloop.optim._engine.callback import call_back
from innerloop.optim._engine.grads import dense, is_sparse

K = TypeVar("K", str, int)
"""How a front end calls its parameters: by name, or by position."""
Hook = Callable[[Tensor], Tensor | None]
"""What a user gave to ``Tensor.register_hook``."""
_HOOK = "a hook (register_hook) on a parameter"


def inner_gradient(
    loss: Tensor,
    params: Mapping[K, Tensor],
    *,
    create_graph: bool,
    independent: Callable[[], Exception],
    gate: Gate | None = None,
    keep_graph: bool = False,
) -> dict[K, Tensor | None]:
    """Differentiate ``loss`` by ``params``; None for those that it does not use.

    Args:
        loss: a scalar, or the losses of several samples, whose sum is differentiated.
        params: what to differentiate by; may be empty.
        create_graph: let the gradients have derivatives of their own.
        independent: makes the error for a loss that uses none of ``params``, in the words of the
            front end.
        gate: opened while the backward pass runs, which may read the weights of its own step,
            and then put back as it was.
        keep_graph: without ``create_graph``, keep the graph of the loss, of which something besides
            the loss has come.

    Returns:
        A gradient, or None, for each of ``params``.
    """
    if not params:
        return {}
    if not loss.requires_grad:
        raise independent()
    before = True
    if gate is not None:
        before, gate.closed = gate.closed, False
    try:
        with inner_pass():
            values = torch_private.gradient(
                loss, list(params.values()), create_graph, create_graph or keep_graph
            )
    except InnerLoopError:
        raise
    except RuntimeError as error:
        raise explain(error) from error
    finally:
        if gate is not None:
            gate.closed = before
    if all(g is None for g in values):
        raise independent()
    return dict(zip(params, values, strict=True))


def finish(
    grads: Mapping[K, Tensor | None],
    *,
    hooks: Iterable[tuple[K, Hook]] = (),
    takes_sparse: bool = False,
) -> dict[K, Tensor | None]:
    """Make sparse gradients dense unless the optimizer takes them, then run the user's hooks.

    Most operations on sparse tensors have no derivative; making one dense has. The new parameter is
    as large as the dense gradient, so no memory is lost.

    Args:
        grads: what `inner_gradient` returned.
        hooks: the hooks of the user's own parameters, each with the key of its parameter.
        takes_sparse: True if the rule works on sparse gradients (``sparse_adam``).

    Returns:
        The gradients for the optimizer.
    """
    found = dict(grads) if takes_sparse else dense(grads)
    for key, hook in hooks:
        g = found.get(key)
        if g is not None and (changed := call_back(hook, g, _HOOK)) is not None:
            found[key] = changed
    return found


def with_dense_gradients(params: Mapping[K, Tensor], chosen: Collection[K]) -> dict[K, Tensor]:
    """Return ``params`` with an alias, whose gradient is always dense, for the chosen ones.

    Where the inner gradient of a parameter was sparse, so is what an outer loss sends back to it
    through the same operation, and few update rules have a derivative for that. The inner gradient
    need not show it: see `sent_sparse`.
    """
    found = dict(params)
    keys = [key for key in chosen if key in found and found[key].requires_grad]
    if keys:
        found.update(zip(keys, _DenseGradients.apply(*(found[k] for k in keys)), strict=True))
    return found


def tables(params: Mapping[K, Tensor]) -> list[K]:
    """Return the keys of what ``F.embedding`` could look up: parameters of two dimensions."""
    return [key for key, p in params.items() if p.dim() == 2]


class _DenseGradients(torch.autograd.Function):
    """The identity on any number of tensors, whose derivatives are dense.

    One call for all of them, and no `setup_context`, for which PyTorch reads the signature of
    `forward` at every call.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(g.to_dense() if g is not None and is_sparse(g) else g for g in grads)
