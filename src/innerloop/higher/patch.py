"""Modules whose parameters are replaced step by step, with the interface that ``higher`` gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from innerloop.errors import InvalidInputError
from innerloop.module import Gate, ModuleView


class PatchedModule:
    """What `monkeypatch` adds to the class of a module: parameters by time.

    The module's own forward runs on the newest parameters.
    """

    _view: ModuleView
    gate: Gate
    _history: list[list[Tensor]]
    track_higher_grads: bool

    def parameters(self, recurse: bool = True, time: int = -1) -> Iterator[Tensor]:
        """The parameters after ``time`` steps, in the order of ``nn.Module.parameters``; -1 is the newest."""
        if time == -1:
            return nn.Module.parameters(self, recurse)  # type: ignore[arg-type]
        if not recurse:
            raise InvalidInputError("parameters(recurse=False) knows only time=-1")
        known = len(self._history) - 1
        if not -known - 1 <= time <= known:
            kept = "" if self.track_higher_grads else " (track_higher_grads=False keeps no history)"
            raise InvalidInputError(f"time={time}, but this module has parameters of times 0 to {known}{kept}")
        return iter(self._history[time])

    @property
    def fast_params(self) -> list[Tensor]:
        """The newest parameters."""
        return list(self._view.read().values())

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Take these as the newest parameters."""
        new = list(params)
        if len(new) != len(self._view.parameters):
            raise InvalidInputError(
                f"update_params got {len(new)} tensors, the module has {len(self._view.parameters)} parameters"
            )
        self._view.write(dict(zip(self._view.parameters, new, strict=True)))
        if not self.track_higher_grads:
            self._history.clear()
        self._history.append(new)


_patched: dict[type[nn.Module], type[Any]] = {}


def monkeypatch(
    module: nn.Module,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> Any:
    """A copy of ``module`` whose parameters are plain tensors that can be replaced.

    Args:
        module: any module; it is not changed.
        device: where the copy lives; default: where the module is.
        copy_initial_weights: start from detached copies; False connects them to ``module.parameters()``.
        track_higher_grads: keep the history of parameters.

    Returns:
        An instance of a subclass of the module's own class and of `PatchedModule`.
    """
    gate = Gate()
    view = ModuleView(module, gate)
    new = view.module
    view.module = None  # the copy holds the view; a reference back would be a cycle
    with torch.enable_grad():
        start = {
            name: (p.detach().clone().requires_grad_(p.requires_grad) if copy_initial_weights else p.clone())
            for name, p in module.named_parameters()
        }
        if device is not None:
            start = {name: p.to(device) for name, p in start.items()}
    view.write(start)
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    view.write_buffers(buffers if device is None else {name: buffer.to(device) for name, buffer in buffers.items()})
    cls = type(new)
    if cls not in _patched:
        _patched[cls] = type(f"Patched{cls.__name__}", (PatchedModule, cls), {"__module__": cls.__module__})
    new.__class__ = _patched[cls]
    vars(new).update(_view=view, gate=gate, _history=[list(start.values())], track_higher_grads=track_higher_grads)
    return new
