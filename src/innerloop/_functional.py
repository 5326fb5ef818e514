"""A module as a function of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from innerloop._inner_gradient import block
from innerloop._module.checks import check_names, refusing_recomputation, versions_of
from innerloop._module.view import ModuleView
from innerloop._utils.execution import Mode, mode
from innerloop.errors import InvalidInputError
from innerloop.nn._mode import replacing


def functional(model: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor], dict[str, Tensor]]:
    """Return ``model`` as a pure function of its parameters and buffers.

    Args:
        model: any module; it is not changed, neither now nor by the calls.

    Returns:
        ``(call, params, buffers)``. ``call(params, *args, **kwargs)`` returns the output with these
        parameters, and the buffers as they are in the model; ``call(params, *args, buffers=buffers,
        **kwargs)`` returns ``(output, new_buffers)``. ``params`` are detached copies, ``buffers``
        copies.

    Example:
        >>> import torch, innerloop
        >>> call, params, buffers = innerloop.functional(torch.nn.Linear(2, 1, bias=False))
        >>> call({"weight": torch.tensor([[3.0, 4.0]])}, torch.tensor([1.0, 10.0]))
        tensor([43.])
    """
    view = ModuleView(model)
    read = block.ReadModule(view)
    pure: set[tuple[bool, ...]] = set()  # modes in which a call has left its parameters alone

    def call(
        params: Mapping[str, Tensor],
        *args: Any,
        buffers: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        check_names(params, view.source)
        if torch.is_grad_enabled() and mode() is not Mode.COMPILING:
            with refusing_recomputation():
                return evaluate(params, args, buffers, kwargs)
        return evaluate(params, args, buffers, kwargs)

    def evaluate(
        params: Mapping[str, Tensor],
        args: tuple[object, ...],
        buffers: Mapping[str, Tensor] | None,
        kwargs: Mapping[str, object],
    ) -> Any:
        kept = view.source_buffers if buffers is None else buffers
        modes = tuple(view.training)
        compiling = mode() is Mode.COMPILING
        copied = not compiling and modes not in pure
        given = {n: p.clone() for n, p in params.items()} if copied else params
        versions = [] if compiling else versions_of(given)
        blocks = nullcontext() if compiling else block.reading(read)
        with replacing(only_silent=True) if torch.is_grad_enabled() else nullcontext(), blocks:
            output, new_buffers = view.run(given, kept, view.module, *args, **kwargs)
        if not compiling and versions_of(given) == versions:
            pure.add(modes)
        elif not copied and not compiling:
            raise InvalidInputError(
                "the module's forward pass writes its parameters in place, and did not at its "
                "first call: write a clamp or a norm of the weight out of place"
            )
        return output if buffers is None else (output, new_buffers)

    params = {name: p.detach().clone() for name, p in view.source.items()}
    return call, params, {name: b.detach().clone() for name, b in view.source_buffers.items()}
