"""Several optimizers side by side, each for its own parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._types import Grads, Params
from innerloop.errors import InvalidInputError
from innerloop.optim._base import Optimizer
from innerloop.optim._engine.grads import dense
from innerloop.optim._settings import check_state, has_overrides


class GroupsState(NamedTuple):
    """The states of the members, in order."""

    members: tuple[Any, ...]


# A carry can be loaded by torch.load with its default, weights_only=True.
torch.serialization.add_safe_globals([GroupsState])


class PerGroup:
    """Dealing gradients, parameters and hyper-parameters out to members, for every grouping."""

    @staticmethod
    def init(
        members: Sequence[Optimizer], names: Sequence[Sequence[str]], params: Params
    ) -> GroupsState:
        """Return the state of each member before the first step."""
        return GroupsState(
            tuple(
                opt.init({n: params[n] for n in ns}) for opt, ns in zip(members, names, strict=True)
            )
        )

    @staticmethod
    def update(
        members: Sequence[Optimizer],
        names: Sequence[Sequence[str]],
        grads: Grads,
        state: GroupsState,
        params: Params,
        hyper: Mapping[str, Any] | None,
    ) -> tuple[dict[str, Tensor], GroupsState]:
        """Update the parameters of each member by its own rule: ``(new_params, new_state)``."""
        check_state(members, state, GroupsState)
        if unknown := [name for name in grads if name not in params]:
            raise InvalidInputError(
                f"gradients for {unknown} but the parameters are {list(params)}"
            )
        new_params, states = dict(params), []
        # Where no rule takes sparse gradients, the inner gradient is dense already.
        some_sparse = any(opt.takes_sparse for opt in members)
        for opt, ns, member, values in zip(
            members, names, state.members, split_hyper(hyper, members, names), strict=True
        ):
            part = {n: params[n] for n in ns}
            own = {n: grads.get(n) for n in ns}
            if some_sparse and not opt.takes_sparse:
                own = dense(own)
            updated, new_state = opt.update(own, member, part, values)
            new_params.update(updated)
            states.append(new_state)
        return new_params, GroupsState(tuple(states))


class Groups(Optimizer):
    """Optimizers chosen by the names of the parameters; the first matching pattern wins.

    Args:
        members: pattern (as in a shell: ``"head.*"``, ``"*"``) -> optimizer.

    Hyper-parameters in ``update`` are given as a list with one entry per group, ``{"lr": [t0,
    t1]}`` (None leaves a group's own value), or as one value for every group that has that
    hyper-parameter.

    Example:
        >>> import torch, innerloop
        >>> opt = innerloop.optim.groups(
        ...     {"head.*": innerloop.optim.sgd(lr=1.0), "*": innerloop.optim.sgd(lr=0.1)}
        ... )
        >>> params = {"body.w": torch.tensor(1.0), "head.w": torch.tensor(1.0)}
        >>> new, _ = opt.update(params, opt.init(params), params)
        >>> {name: round(value.item(), 3) for name, value in new.items()}
        {'body.w': 0.9, 'head.w': 0.0}
    """

    def __init__(self, members: Mapping[str, Optimizer]) -> None:
        if (
            not isinstance(members, Mapping)
            or not members
            or not all(isinstance(opt, Optimizer) for opt in members.values())
        ):
            raise InvalidInputError(
                f"groups({members!r}): write a mapping from name patterns to innerloop optimizers, "
                'groups({"head.*": innerloop.optim.adam(), "*": innerloop.optim.sgd(lr=0.1)})'
            )
        for pattern, opt in members.items():
            if opt.needs_closure:
                raise InvalidInputError(
                    f"groups({{{pattern!r}: {opt!r}}}): this optimizer evaluates the loss itself, "
                    "and moves its parameters while the "
                    "others wait. Use it for all parameters, or a rule that is handed one gradient"
                )
        self.members = dict(members)
        self.compiles = all(opt.compiles for opt in members.values())
        self.takes_sparse = any(opt.takes_sparse for opt in members.values())

    def init(self, params: Params) -> GroupsState:
        return PerGroup.init(tuple(self.members.values()), self._names(params), params)

    def update(
        self,
        grads: Grads,
        state: GroupsState,
        params: Params,
        hyper: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Tensor], GroupsState]:
        return PerGroup.update(
            tuple(self.members.values()), self._names(params), grads, state, params, hyper
        )

    def _names(self, params: Params) -> list[list[str]]:
        names: dict[str, list[str]] = {pattern: [] for pattern in self.members}
        for name in params:
            for pattern in self.members:
                if fnmatchcase(name, pattern):
                    names[pattern].append(name)
                    break
            else:
                raise InvalidInputError(
                    f"parameter {name!r} matches none of the patterns {list(self.members)}: add a "
                    "last group "
                    '"*", or leave the parameter out of params'
                )
        idle = [pattern for pattern, matched in names.items() if not matched]
        if idle:
            raise InvalidInputError(
                f"the patterns {idle} match no parameter that an earlier pattern has not taken: "
                f"the parameters are {list(params)}, and "
                "the first matching pattern wins"
            )
        return list(names.values())

    def __repr__(self) -> str:
        return f"groups({self.members!r})"


groups = Groups


def split_hyper(
    hyper: Mapping[str, Any] | None, members: Sequence[Optimizer], names: Sequence[Sequence[str]]
) -> list[dict[str, Any] | None]:
    """Return one mapping of overrides per group."""
    if not has_overrides(hyper):
        return [None] * len(members)
    assert hyper is not None
    split: list[dict[str, Any]] = [{} for _ in members]
    for key, value in hyper.items():
        if isinstance(value, list):
            if len(value) != len(members):
                raise InvalidInputError(
                    f"hyper[{key!r}] is a list of {len(value)}, but there are {len(members)} "
                    "groups: write one entry per "
                    "group (None keeps the group's own value), or one value for all"
                )
            for part, entry in zip(split, value, strict=True):
                if entry is not None:
                    part[key] = entry
            continue
        having = [i for i, opt in enumerate(members) if key in getattr(opt, "hyper_names", (key,))]
        if not having:
            raise InvalidInputError(
                f"no group has a hyper-parameter {key!r}: the groups are {list(members)}"
            )
        for i in having:
            split[i][key] = value
    return [part or None for part in split]
