"""The parameters of a patched module over time, which the module and its parts share."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from innerloop._module.copier import Gate
from innerloop._module.view import ModuleView
from innerloop._utils import torch_private
from innerloop.errors import InvalidInputError
from innerloop.higher._unreached import ReachMonitor
from innerloop.nn._mode import ReplacementMode, replacing


class FastWeights:
    """The parameters of a patched module by time, shared with all its submodules.

    Attributes:
        gate: tells when a backward pass must not read the parameters.
        reach: says where gradients went.
        history: the parameters of each time; only the newest while ``track`` is off; empty before
            there are any.
        track: whether times are told apart.
    """

    def __init__(self, view: ModuleView, gate: Gate, root: nn.Module) -> None:
        self.gate = gate
        self.reach = ReachMonitor()
        self.history: list[list[Tensor]] = []
        self.track = True
        self.shapes = {name: p.shape for name, p in view.source.items()}
        self._numbers = [p.is_floating_point() or p.is_complex() for p in view.source.values()]
        self._view = view
        self._root = weakref.ref(root)

    def sparse(self) -> set[int]:
        """Return the positions of the parameters whose gradients may be sparse."""
        return {i for i, name in enumerate(self._view.source) if name in self._view.sparse}

    @property
    def root(self) -> nn.Module:
        """Return the patched module that this is a part of; raise if it is gone."""
        root = self._root()
        if root is None:
            raise InvalidInputError(
                "the patched module that this is a part of does not exist any more: keep it"
            )
        return root

    def is_root(self, module: nn.Module) -> bool:
        """Return True if ``module`` was patched itself; a part that has outlived it was not."""
        return self._root() is module

    @property
    def newest(self) -> list[Tensor]:
        """Return the parameters as they stand in the module."""
        return list(self._view.read().values())

    def newest_or_none(self) -> list[Tensor] | None:
        """Return the newest parameters, None before there are any."""
        return self.newest if self.history else None

    def read_in_hooks(self) -> list[Tensor]:
        """Return the newest parameters, also in a hook of the outer backward pass.

        A recomputation, which has gradients switched on, is refused them.
        """
        if not self.gate.closed or torch.is_grad_enabled():
            return self.newest
        self.gate.closed = False
        try:
            return self.newest
        finally:
            self.gate.closed = True

    def ready(self, params: Iterable[Tensor] | None) -> None:
        """Take ``params`` before anything is computed; raise if there are none at all."""
        if params is not None:
            self.take(params)
        elif not self.history:
            raise InvalidInputError(
                "this module has no parameters of its own: call it with params=, a list with a "
                "tensor for each parameter, for example "
                "higher.utils.get_func_params(model)"
            )

    def of_time(self, time: int) -> list[Tensor]:
        """Return the parameters after ``time`` updates."""
        if not isinstance(time, int):
            raise InvalidInputError(
                f"time={time!r}: write an int, 0 for the start, -1 (or None) for the newest"
            )
        if not self.track and time in (-1, 0):
            return self.newest
        known = len(self.history) - 1
        if not -known - 1 <= time <= known:
            kept = "" if self.track else " (track_higher_grads=False keeps no history)"
            raise InvalidInputError(
                f"time={time}, but this module has parameters of times 0 to {known}{kept}"
            )
        self.reach.aware |= time in (0, -known - 1)
        return self.history[time]

    def kernels(self) -> AbstractContextManager[Any]:
        """Return the block in which operations without second derivatives are replaced.

        A module inside another one is in its block already.
        """
        mode = torch_private.function_mode()
        inside = isinstance(mode, ReplacementMode) and mode.on
        return replacing() if self.track and not inside else nullcontext()

    def move_buffers(self, device: torch.device | str) -> None:
        """Put copies of the buffers on ``device``."""
        self._view.write_buffers(
            {name: buffer.to(device) for name, buffer in self._view.read_buffers().items()}
        )

    def take(self, params: Iterable[Tensor]) -> None:
        """Make these the parameters from now on."""
        if not isinstance(params, Iterable) or isinstance(params, Mapping):
            raise InvalidInputError(
                f"got {type(params).__name__} as parameters: pass a list with a tensor for each"
            )
        new = list(params)
        self._check(new)
        self._view.write(dict(zip(self._view.parameters, new, strict=True)))
        if self.history:
            if self.track:
                self._view.renew_written_buffers()
            self.reach.steps += 1
            self.reach.asked = False
            self.gate.closed = self.track
        if not self.track:
            self.history.clear()
            if self.reach.steps:
                self.reach.watch_newest(new)
        self.history.append(new)

    @contextmanager
    def at(self, params: Sequence[Tensor]) -> Iterator[None]:
        """Make these the parameters for a while; time does not go on."""
        before = self._view.read()
        if self.track:
            # The graph of an earlier evaluation may hold the buffers that it wrote.
            self._view.renew_written_buffers()
        self._view.write(dict(zip(self._view.parameters, params, strict=True)))
        try:
            yield
        finally:
            self._view.write(before)

    def _check(self, new: list[Any]) -> None:
        shapes = self.shapes
        if len(new) != len(shapes):
            raise InvalidInputError(
                f"got {len(new)} tensors, the module has {len(shapes)} parameters: pass one for "
                f"each of {list(shapes)[:8]}, in this order"
            )
        for (name, shape), tensor, is_real in zip(shapes.items(), new, self._numbers, strict=True):
            if not isinstance(tensor, Tensor):
                raise InvalidInputError(
                    f"the parameter {name!r} must be a tensor, got {type(tensor).__name__}"
                )
            if (tensor.is_floating_point() or tensor.is_complex()) is not is_real:
                raise InvalidInputError(
                    f"the parameter {name!r} cannot be a tensor of {tensor.dtype}"
                )
            if tensor.shape != shape:
                raise InvalidInputError(
                    f"the parameter {name!r} has shape {tuple(shape)}, but got a tensor of shape "
                    f"{tuple(tensor.shape)}: the order is "
                    "that of model.parameters()"
                )


def fast_weights(fmodel: nn.Module) -> FastWeights:
    """Return what a patched module and its parts share."""
    return vars(fmodel)["_innerloop_fast"]
