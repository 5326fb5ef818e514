"""Differentiable optimizers with the interface of ``higher.optim``, on top of `innerloop.optim`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from innerloop import graph, tree
from innerloop.errors import InvalidInputError
from innerloop.module import Gate
from innerloop.optim.from_torch import from_torch

GroupedGrads = Sequence[Sequence[Tensor | None]]


class DifferentiableOptimizer:
    """The differentiable form of a torch optimizer.

    Subclass one of the concrete classes and override `_update` to change or to watch the rule; then `register_optim`.

    Args:
        other: the torch optimizer: rule, groups, settings and current state are taken over.
        reference_params: the parameters of the model that ``other`` steps, in the model's order.
        fmodel: the patched module whose parameters each step replaces.
        device: where the optimizer's state goes; default: where it is.
        override: hyper-parameters as ``{"lr": [tensor]}``, one entry for all param groups or one per group.
        grad_callback: receives the list of gradients at each step and returns those to use.
        track_higher_grads: False detaches each step.
    """

    torch_class: ClassVar[type[torch.optim.Optimizer]]

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: Any = None,
        device: torch.device | str | None = None,
        override: Mapping[str, list[Any]] | None = None,
        grad_callback: Callable[[list[Tensor | None]], list[Tensor | None]] | None = None,
        track_higher_grads: bool = True,
        **_: Any,
    ) -> None:
        reference = {str(i): p for i, p in enumerate(reference_params)}
        self._pure = from_torch(other, reference)
        self._state = self._pure.init(reference)
        if device is not None:
            self._state = tree.map_tensors(lambda t: t.to(device), self._state)
        self._index = {id(p): i for i, p in enumerate(reference.values())}
        self._members = [[self._index[id(p)] for p in group["params"]] for group in other.param_groups]
        self.param_groups: list[dict[str, Any]] = [
            {**group, "params": list(group["params"])} for group in other.param_groups
        ]
        self._hyper: dict[str, Any] = {}
        self._apply_override(override)
        self._fmodel = fmodel
        self._grad_callback = grad_callback
        self._track = track_higher_grads

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Mapping[str, list[Any]] | None = None,
        grad_callback: Callable[[list[Tensor | None]], list[Tensor | None]] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """One differentiable step.

        Args:
            loss: scalar, computed with the patched module.
            params: the current parameters; default: the patched module's.
            override: as in the constructor, from this step on.
            grad_callback: as in the constructor, for this step.

        Returns:
            The new parameters, which the patched module (if any) uses from now on.
        """
        if params is None and self._fmodel is None:
            raise InvalidInputError(
                "step(loss) without a patched module needs the parameters: step(loss, params=params)"
            )
        current = list(self._fmodel.fast_params if params is None else params)
        self._apply_override(override)
        wanted = [i for i in sorted({i for group in self._members for i in group}) if current[i].requires_grad]
        found = self._gradients(loss, [current[i] for i in wanted])
        grads: dict[int, Tensor | None] = dict(zip(wanted, found, strict=True))
        callback = grad_callback or self._grad_callback
        if callback is not None:
            grads = dict(zip(wanted, callback([grads[i] for i in wanted]), strict=True))
        for group, members in zip(self.param_groups, self._members, strict=True):
            group["params"] = [current[i] for i in members]
        self._update([[grads.get(i) for i in members] for members in self._members], **kwargs)
        for group, members in zip(self.param_groups, self._members, strict=True):
            for i, p in zip(members, group["params"], strict=True):
                current[i] = p if self._track else p.detach().requires_grad_(current[i].requires_grad)
        if not self._track:
            self._state = tree.map_tensors(Tensor.detach, self._state)
        if self._fmodel is not None:
            self._fmodel.update_params(current)
        return current

    def _gradients(self, loss: Tensor, wanted: list[Tensor]) -> Sequence[Tensor | None]:
        graph.inspect([loss], wanted, second_order=self._track)
        gate = Gate() if self._fmodel is None else self._fmodel.gate
        gate.closed = False
        try:
            found = torch.autograd.grad(loss, wanted, create_graph=self._track, allow_unused=True)
        finally:
            gate.closed = self._track
        if wanted and all(g is None for g in found):
            raise InvalidInputError(
                "the loss depends on none of the parameters: compute it with the patched module, after the last step"
            )
        return found

    def _update(self, grouped_grads: GroupedGrads, **kwargs: Any) -> None:
        """Replace ``self.param_groups[i]["params"]`` by the parameters after a step with ``grouped_grads[i]``."""
        params = {
            str(i): p
            for g, m in zip(self.param_groups, self._members, strict=True)
            for i, p in zip(m, g["params"], strict=True)
        }
        grads = {
            str(i): g for gs, m in zip(grouped_grads, self._members, strict=True) for i, g in zip(m, gs, strict=True)
        }
        new, self._state = self._pure.update(grads, self._state, params, self._hyper)
        for group, members in zip(self.param_groups, self._members, strict=True):
            group["params"] = [new[str(i)] for i in members]

    def _apply_override(self, override: Mapping[str, list[Any]] | None) -> None:
        for name, values in (override or {}).items():
            if not isinstance(values, list) or len(values) not in (1, len(self.param_groups)):
                raise InvalidInputError(
                    f"override[{name!r}] must be a list with one entry, or one for each of the {len(self.param_groups)} param groups"
                )
            self._hyper[name] = values[0] if len(values) == 1 else values
            for i, group in enumerate(self.param_groups):
                group[name] = values[i % len(values)]


class DifferentiableSGD(DifferentiableOptimizer):
    """``torch.optim.SGD``."""

    torch_class = torch.optim.SGD


class DifferentiableAdam(DifferentiableOptimizer):
    """``torch.optim.Adam``."""

    torch_class = torch.optim.Adam


class DifferentiableAdamW(DifferentiableOptimizer):
    """``torch.optim.AdamW``."""

    torch_class = torch.optim.AdamW


_registered: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {
    cls.torch_class: cls for cls in (DifferentiableSGD, DifferentiableAdam, DifferentiableAdamW)
}


def register_optim(optim_type: type[torch.optim.Optimizer], diff_optim_type: type[DifferentiableOptimizer]) -> None:
    """Use ``diff_optim_type`` for optimizers of the class ``optim_type``."""
    _registered[optim_type] = diff_optim_type


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: Any = None,
    device: torch.device | str | None = None,
    override: Mapping[str, list[Any]] | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable form of ``opt``, as registered for its class.

    Raises:
        InvalidInputError: no differentiable optimizer is registered for this class.
    """
    for cls in type(opt).__mro__:
        if cls in _registered:
            return _registered[cls](
                opt, reference_params, fmodel, device, override, track_higher_grads=track_higher_grads, **kwargs
            )
    raise InvalidInputError(
        f"no differentiable optimizer for {type(opt).__name__}: register_optim({type(opt).__name__}, YourDifferentiableOptimizer); "
        f"known are {', '.join(c.__name__ for c in _registered)}"
    )
