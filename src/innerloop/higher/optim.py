"""Differentiable optimizers with the interface of ``higher.optim``, on top of `innerloop.optim`.

Every optimizer of ``torch.optim`` whose rule `innerloop.optim` has is there, those that ``higher``
never had (NAdam, RAdam, Adafactor, Muon, ...) as `DifferentiableRule`; any other class as
`DifferentiableAdapted`, by `innerloop.optim.adapt`, verified or refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError
from innerloop.higher import _base as base
from innerloop.higher._arithmetic import _add as _add
from innerloop.higher._arithmetic import _addcdiv as _addcdiv
from innerloop.higher._arithmetic import _addcmul as _addcmul
from innerloop.higher._arithmetic import _get_mask_closure as _get_mask_closure
from innerloop.higher._arithmetic import _maybe_mask as _maybe_mask
from innerloop.higher._base import DifferentiableOptimizer, Override
from innerloop.higher._rules import DifferentiableAdapted, DifferentiableRule
from innerloop.higher._trainable import apply_trainable_opt_params, get_trainable_opt_params
from innerloop.higher.patch import PatchedModule
from innerloop.optim._base import Rule
from innerloop.optim._from_torch.from_torch import overrides_step

__all__ = [
    "DifferentiableASGD",
    "DifferentiableAdadelta",
    "DifferentiableAdagrad",
    "DifferentiableAdam",
    "DifferentiableAdamW",
    "DifferentiableAdamax",
    "DifferentiableAdapted",
    "DifferentiableOptimizer",
    "DifferentiableRMSprop",
    "DifferentiableRprop",
    "DifferentiableRule",
    "DifferentiableSGD",
    "apply_trainable_opt_params",
    "create_diff_optim",
    "get_diff_optim",
    "get_trainable_opt_params",
    "register_optim",
]
# The names that code written against higher has in its annotations.
_GroupedGradsType, _OverrideType = base.GroupedGrads, base.Override
_GradCallbackType, _StateType = base.GradCallback, base.State


class DifferentiableSGD(DifferentiableRule):
    """``torch.optim.SGD``.

    In ``higher`` ``maximize`` has no effect, and a learnable weight decay or momentum of 0 gets no
    gradient.
    """

    torch_class = torch.optim.SGD


class DifferentiableAdam(DifferentiableRule):
    """``torch.optim.Adam``.

    In ``higher`` 0.2.1 ``eps`` stands before the bias correction; in all versions the derivative in
    beta2 is wrong, and ``maximize`` and ``decoupled_weight_decay`` have no effect.
    """

    torch_class = torch.optim.Adam


class DifferentiableAdamW(DifferentiableRule):
    """``torch.optim.AdamW``.

    The release of ``higher`` lacks it; its git head has a wrong derivative in beta2.
    """

    torch_class = torch.optim.AdamW


class DifferentiableAdadelta(DifferentiableRule):
    """``torch.optim.Adadelta``. In ``higher`` ``maximize`` has no effect."""

    torch_class = torch.optim.Adadelta


class DifferentiableAdagrad(DifferentiableRule):
    """``torch.optim.Adagrad``. In ``higher`` ``maximize`` has no effect."""

    torch_class = torch.optim.Adagrad


class DifferentiableAdamax(DifferentiableRule):
    """``torch.optim.Adamax``. In ``higher`` ``maximize`` has no effect."""

    torch_class = torch.optim.Adamax


class DifferentiableASGD(DifferentiableRule):
    """``torch.optim.ASGD``.

    In ``higher`` the derivatives in ``lr`` and ``lambd`` are wrong, and ``maximize`` has no
    effect.
    """

    torch_class = torch.optim.ASGD


class DifferentiableRMSprop(DifferentiableRule):
    """``torch.optim.RMSprop``.

    In ``higher`` a gradient of zero makes the centred form NaN, and it warns of wrong gradients;
    not here.
    """

    torch_class = torch.optim.RMSprop


class DifferentiableRprop(DifferentiableRule):
    """``torch.optim.Rprop``.

    It looks at signs only: its derivative in the gradients is zero, as it should be.
    """

    torch_class = torch.optim.Rprop


_opt_mapping: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {
    cls.torch_class: cls
    for cls in (
        DifferentiableAdadelta,
        DifferentiableAdagrad,
        DifferentiableAdam,
        DifferentiableAdamax,
        DifferentiableAdamW,
        DifferentiableASGD,
        DifferentiableRMSprop,
        DifferentiableRprop,
        DifferentiableSGD,
    )
}


def register_optim(
    optim_type: type[torch.optim.Optimizer], diff_optim_type: type[DifferentiableOptimizer]
) -> None:
    """Use ``diff_optim_type`` for optimizers of the class ``optim_type``.

    Args:
        optim_type: a subclass of ``torch.optim.Optimizer``.
        diff_optim_type: a subclass of `DifferentiableOptimizer` that does the same.
    """
    for cls, parent, name in (
        (optim_type, torch.optim.Optimizer, "optim_type"),
        (diff_optim_type, DifferentiableOptimizer, "diff_optim_type"),
    ):
        if not (isinstance(cls, type) and issubclass(cls, parent)):
            raise InvalidInputError(
                f"register_optim got {cls!r} as {name}: pass a subclass of {parent.__name__}"
            )
    _opt_mapping[optim_type] = diff_optim_type


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: PatchedModule | None = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """Return the differentiable form of ``opt``.

    It is that registered for its class, else one by its rule, else one by `innerloop.optim.adapt`.

    A subclass that does not override ``step`` counts as its parent (``higher`` refuses it). The
    arguments are those of `DifferentiableOptimizer`.

    Raises:
        InvalidInputError: ``opt`` steps tensors that are not among ``reference_params``.
        NotDifferentiableError: a class that is not known was adapted, and comes out wrong.

    Example:
        Five steps of gradient descent on y²/2 - a·y, by which y approaches a: dy/da = 1 - (1 -
        lr)⁵.

        >>> import torch, innerloop.higher as higher
        >>> a, y = torch.tensor(2.0, requires_grad=True), torch.zeros((), requires_grad=True)
        >>> diffopt = higher.get_diff_optim(torch.optim.SGD([y], lr=0.5), [y])
        >>> for _ in range(5):
        ...     (y,) = diffopt.step(y**2 / 2 - a * y, params=[y])
        >>> torch.autograd.grad(y, a)
        (tensor(0.9688),)
    """
    base.check_optimizer(opt)
    cls = _class_for(type(opt))
    return cls(
        opt,
        reference_params,
        fmodel,
        device,
        override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def create_diff_optim(
    opt_type: type[torch.optim.Optimizer],
    opt_kwargs: dict[str, Any] | None = None,
    params: Iterable[Any] | None = None,
    fmodel: PatchedModule | None = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """Make a differentiable optimizer without a torch optimizer to start from.

    Args:
        opt_type: a subclass of ``torch.optim.Optimizer``.
        opt_kwargs: arguments of its constructor.
        params: the tensors that it will step, or param groups of them; only their shapes are used.
            Default: those of ``fmodel``.
        fmodel: as in `get_diff_optim`, like the other arguments.
        device: see there.
        override: see there.
        track_higher_grads: see there.
        kwargs: see there.

    Raises:
        InvalidInputError: neither ``params`` nor ``fmodel``.
    """
    if not (isinstance(opt_type, type) and issubclass(opt_type, torch.optim.Optimizer)):
        raise InvalidInputError(
            f"create_diff_optim got {opt_type!r}: pass a class, torch.optim.SGD; for an optimizer "
            "use get_diff_optim(optimizer, params)"
        )
    given = (
        list(params)
        if params is not None
        else None
        if fmodel is None
        else list(fmodel.parameters())
    )
    if given is None:
        raise InvalidInputError(
            "create_diff_optim needs params= or fmodel=: the tensors that it will step"
        )
    held = [
        group["params"] if isinstance(group, dict) and "params" in group else group
        for group in given
    ]
    for group in held:
        base.listed([group] if isinstance(group, Tensor) else group, "params")
    if not held:
        raise InvalidInputError(
            "create_diff_optim got no tensors: pass params=list(fmodel.parameters())"
        )
    groups: Any = [
        {**group, "params": _stand_ins(group["params"])}
        if isinstance(group, dict)
        else _stand_ins(group)[0]
        for group in given
    ]
    reference = [
        p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])
    ]
    try:
        opt = opt_type(groups, **(opt_kwargs or {}))
    except TypeError as error:
        raise InvalidInputError(
            f"{opt_type.__name__} cannot be made with opt_kwargs={opt_kwargs!r}: {error}"
        ) from error
    return get_diff_optim(opt, reference, fmodel, device, override, track_higher_grads, **kwargs)


def _class_for(opt_type: type[torch.optim.Optimizer]) -> type[DifferentiableOptimizer]:
    for cls in opt_type.__mro__:
        if cls in _opt_mapping:
            return _opt_mapping[cls]
        if cls in Rule.by_torch_class:
            return DifferentiableRule
        if overrides_step(cls):
            break
    return DifferentiableAdapted


def _stand_ins(params: Any) -> list[Tensor]:
    return [
        torch.zeros_like(p, requires_grad=True)
        for p in ([params] if isinstance(params, Tensor) else list(params))
    ]
