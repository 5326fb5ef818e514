"""Transforms of the gradient, chained in front of an update rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Grads, Params
from innerloop.errors import InvalidInputError
from innerloop.optim._base import Optimizer
from innerloop.optim._settings import check_state, has_overrides
from innerloop.optim._transforms.base import Transform


class ChainState(NamedTuple):
    """The states of the transforms, in order, and that of the rule."""

    transforms: tuple[Any, ...]
    rule: Any


# A carry can be loaded by torch.load with its default, weights_only=True.
torch.serialization.add_safe_globals([ChainState])


class Chain(Optimizer):
    r"""Transforms of the gradient, then a rule: ``chain(clip_by_global_norm(1.0), adam())``.

    .. math:: g \leftarrow \tau_n(\dots \tau_1(g)), \qquad \theta' = u(g, \theta)

    Args:
        links: transforms in the order in which they see the gradient, and last an optimizer.

    Hyper-parameters in ``update`` (and in ``optimizer_hyper``): those of the rule by their names,
    those of a transform behind its own, ``{"lr": t0, "clip_by_global_norm.max_norm": t1}``. A
    second transform of the same kind is ``scale_2``, and so on.

    Raises:
        InvalidInputError: no optimizer at the end, or anything but transforms before it.

    Example:
        Weight decay, by a transform and by the rule's own.

        >>> import torch, innerloop
        >>> opt = innerloop.optim.chain(
        ...     innerloop.optim.add_decayed_weights(0.5), innerloop.optim.sgd(lr=0.1)
        ... )
        >>> opt
        chain(add_decayed_weights(0.5), sgd(lr=0.1))
        >>> opt.hyper_names
        ('add_decayed_weights.weight_decay', 'lr', 'momentum', 'dampening', 'weight_decay')
        >>> params = {"w": torch.tensor(2.0)}
        >>> opt.update(params, opt.init(params), params)[0]  # 2 - .1 (2 + .5 * 2)
        {'w': tensor(1.7000)}
    """

    def __init__(self, *links: Transform | Optimizer) -> None:
        transforms = [link for link in links[:-1] if isinstance(link, Transform)]
        rule = links[-1] if links else None
        if not isinstance(rule, Optimizer) or len(transforms) < len(links) - 1:
            shown = ", ".join(repr(link) for link in links)
            raise InvalidInputError(
                f"chain({shown}): write transforms first and one optimizer last, "
                "chain(innerloop.optim.clip_by_global_norm(1.0), innerloop.optim.adam())"
            )
        inner: tuple[Any, ...] = ()
        if isinstance(rule, Chain):
            inner, rule = tuple(rule.transforms.values()), rule.rule
        if rule.needs_closure:
            raise InvalidInputError(
                f"chain(..., {rule!r}): this optimizer evaluates the loss and its gradients "
                "itself, past the transforms: put what they do "
                "into the loss, or use a rule that is handed one gradient"
            )
        self.rule: Optimizer = rule
        self.compiles = rule.compiles
        self.takes_sparse = rule.takes_sparse
        self.transforms: dict[str, Transform] = dict(_numbered((*transforms, *inner)))
        if (
            of_rule := getattr(rule, "hyper_names", None)
        ) is not None:  # groups have those of their members
            self.hyper_names = (*self._own_names(), *of_rule)

    def init(self, params: Params) -> ChainState:
        return ChainState(
            tuple(t.init(params) for t in self.transforms.values()), self.rule.init(params)
        )

    def update(
        self,
        grads: Grads,
        state: ChainState,
        params: Params,
        hyper: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Tensor], ChainState]:
        check_state(self, state, ChainState)
        of_transforms, of_rule = self._split(hyper)
        grads, states = _checked(grads, params), []
        for (name, transform), before in zip(
            self.transforms.items(), state.transforms, strict=True
        ):
            grads, after = transform.apply(
                grads, before, params, transform.resolve(of_transforms.get(name))
            )
            states.append(after)
        new_params, rule = self.rule.update(grads, state.rule, params, of_rule)
        return new_params, ChainState(tuple(states), rule)

    def _own_names(self) -> tuple[str, ...]:
        return tuple(
            f"{name}.{key}"
            for name, transform in self.transforms.items()
            for key in transform.hyper_names
        )

    def _split(
        self, hyper: Mapping[str, Any] | None
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
        """Return the overrides of each transform, and those of the rule."""
        if not has_overrides(hyper):
            return {}, None
        assert hyper is not None
        own, of_transforms, of_rule = set(self._own_names()), {}, {}  # type: ignore[var-annotated]
        known = getattr(self, "hyper_names", None)
        for key, value in hyper.items():
            name, _, inner = key.rpartition(".")
            if key in own:
                of_transforms.setdefault(name, {})[inner] = value
            elif name in self.transforms or (known is not None and key not in known):
                raise InvalidInputError(
                    f"{self!r} has no hyper-parameter {key!r}; it has {', '.join(known or own)}. "
                    "What is not real-valued cannot be a "
                    "tensor: set it in the constructor"
                )
            else:
                of_rule[key] = value
        return of_transforms, of_rule or None

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, (*self.transforms.values(), self.rule)))})"


chain = Chain


def _numbered(transforms: Sequence[Transform]) -> Iterator[tuple[str, Transform]]:
    seen: dict[str, int] = {}
    for transform in transforms:
        count = seen[transform.name] = seen.get(transform.name, 0) + 1
        yield transform.name if count == 1 else f"{transform.name}_{count}", transform


def _checked(grads: Grads, params: Params) -> dict[str, Tensor | None]:
    """Return a gradient or None for each parameter.

    A transform that adds to a gradient of the wrong shape could hide that from the rule.
    """
    unknown = [name for name in grads if name not in params]
    if unknown:
        raise InvalidInputError(f"gradients for {unknown} but the parameters are {list(params)}")
    for name, g in grads.items():
        if g is not None and g.shape != params[name].shape:
            raise InvalidInputError(
                f"the gradient of {name!r} has shape {tuple(g.shape)}, the parameter has "
                f"{tuple(params[name].shape)}"
            )
    return {name: grads.get(name) for name in params}
