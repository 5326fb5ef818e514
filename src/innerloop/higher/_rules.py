"""Differentiable optimizers by a rule of `innerloop.optim`, or another class's own ``step``."""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from innerloop._carry import _alias as _identity
from innerloop._inner_gradient.closure import CachedFirstEvaluation
from innerloop._inner_gradient.gradient import with_dense_gradients
from innerloop._utils import torch_private, tree
from innerloop.errors import InvalidInputError
from innerloop.higher._base import (
    DifferentiableOptimizer,
    GradCallback,
    GradList,
    GroupedGrads,
    Override,
    State,
    has_tensor,
    numbered,
    scalar,
    settings_of,
    twin_of,
)
from innerloop.higher._fast_weights import fast_weights
from innerloop.higher._nested import copy_and_cast
from innerloop.higher.patch import PatchedModule
from innerloop.optim._adapt.frozen import freeze, thaw
from innerloop.optim._adapt.number import TracedNumber
from innerloop.optim._adapt.rule import Adapted, AdaptedState
from innerloop.optim._base import Rule
from innerloop.optim._from_torch.from_torch import FromTorch, from_torch

Place = tuple[int, int, str]  # group, position in it, name
_GONE = object()


class DifferentiableRule(DifferentiableOptimizer):
    """An optimizer whose rule `innerloop.optim` has.

    Its arguments are those of `DifferentiableOptimizer`.

    The classes of ``higher``'s names derive from this one.
    """

    torch_class: ClassVar[type[torch.optim.Optimizer]]

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: PatchedModule | None = None,
        device: torch.device | str | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            other,
            reference_params,
            fmodel,
            device,
            override,
            grad_callback,
            track_higher_grads,
            **kwargs,
        )
        self._evaluations: CachedFirstEvaluation | None = None
        self._begin()
        self._shown: dict[
            Place, tuple[Any, Any]
        ] = {}  # what was handed out as `state`, each with its mark
        self._stale = True

    def _initial_state(self, device: torch.device | str | None) -> State:
        return [
            collections.defaultdict(dict) for _ in self.param_groups
        ]  # filled when somebody looks

    @property
    def state(self) -> State:
        """Return what is kept for each parameter of each group, under torch's names.

        It may be edited or assigned (detached for a truncated loop, cleared for a new start): the
        next step goes on from it.
        """
        if self._stale:
            self._stale = False
            self._shown = {}
            for g, held in enumerate(self._exported()):
                for i, kept in held.items():
                    for key, value in kept.items():
                        self._states[g][i][key] = value
                        self._shown[g, i, key] = (value, _mark(value))
        return self._states

    @state.setter
    def state(self, value: object) -> None:
        if not isinstance(value, Sequence) or len(value) != len(self.param_groups):
            raise InvalidInputError(
                f"state must be a list with a dict for each of the {len(self.param_groups)} param "
                "groups, as diffopt.state gives it; got "
                f"{type(value).__name__}"
            )
        if not all(
            isinstance(held, Mapping) and all(isinstance(k, Mapping) for k in held.values())
            for held in value
        ):
            raise InvalidInputError(
                "state must hold, for each param group, a dict from a position to a dict of what "
                "is kept"
            )
        _ = self.state  # so that it is known what changes
        self._states = [
            h if isinstance(h, collections.defaultdict) else collections.defaultdict(dict, h)
            for h in value
        ]

    def _kept(self) -> object:
        return self._pure_state

    def _update(self, grouped_grads: GroupedGrads, **kwargs: Any) -> None:
        current = [
            zip(m, g["params"], strict=True)
            for g, m in zip(self.param_groups, self._group_to_param_list, strict=True)
        ]
        params = {str(i): p for group in current for i, p in group}
        grads = {
            str(i): g
            for gs, m in zip(grouped_grads, self._group_to_param_list, strict=True)
            for i, g in zip(m, gs, strict=True)
        }
        if not self._stale and (edits := self._edits()):
            self._take_over(edits, params)
        new = self._advance(grads, params)
        for group, members in zip(self.param_groups, self._group_to_param_list, strict=True):
            group["params"] = [new[str(i)] for i in members]
        self._stale = True

    def _begin(self) -> None:
        self._twin = twin_of(self._other)
        self._twin.param_groups = [{**group} for group in self._other.param_groups]
        self._write_settings()
        reference = dict(numbered(self._reference))
        self._pure: FromTorch | Adapted = from_torch(self._twin, reference)
        self._pure_state = self._pure.init(reference)
        if self._device is not None:
            self._pure_state = tree.map_tensors(lambda t: t.to(self._device), self._pure_state)

    def _advance(
        self, grads: dict[str, Tensor | None], params: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        pure = cast("FromTorch", self._pure)
        shaped = self._write_settings()
        pure.refresh()
        closure: Any = {} if self._evaluations is None else {"value_and_grad": self._evaluations}
        new, self._pure_state = pure.update(grads, self._pure_state, params, shaped, **closure)
        return new

    def _write_settings(self) -> dict[str, list[Any]]:
        """Let the rule read the settings as they are now.

        It returns those that have a value for each element of a parameter.
        """
        shaped: dict[str, list[Any]] = {}
        groups = zip(
            self.param_groups, self._twin.param_groups, self._other.param_groups, strict=True
        )
        for g, (mine, twins, theirs) in enumerate(groups):
            for name, value in settings_of(mine).items():
                if isinstance(value, Tensor) and value.numel() != 1:
                    members = self._group_to_param_list[g]
                    shaped.setdefault(name, [None] * len(self.param_groups))[g] = self._expanded(
                        name, value, members
                    )
                    twins[name] = theirs[name]
                else:
                    twins[name] = value
        return shaped

    def _expanded(self, name: str, value: Tensor, members: list[int]) -> dict[str, Tensor]:
        shapes = {str(i): self._reference[i].shape for i in members}
        try:
            return {i: value.expand(shape) for i, shape in shapes.items()}
        except RuntimeError as error:
            raise InvalidInputError(
                f"{name} is a tensor of shape {tuple(value.shape)}, the parameters of its group "
                "have "
                f"{[tuple(s) for s in shapes.values()]}: write one number, or give each parameter "
                "a group of its own and a tensor of "
                "its shape"
            ) from error

    def _check_setting(self, name: str) -> None:
        more = type(self).__mro__[: type(self).__mro__.index(DifferentiableRule)]
        own_rule = any("_update" in vars(cls) for cls in more)
        if not own_rule and not any(name in group for group in self.param_groups):
            raise InvalidInputError(
                f"override has {name!r}, but {type(self._other).__name__} has no such setting; it "
                "has "
                f"{list(settings_of(self.param_groups[0]))}"
            )

    def _exported(self) -> State:
        pure = cast("FromTorch", self._pure)
        self._twin.state = collections.defaultdict(dict)
        pure.write_back(self._pure_state)
        exported: State = []
        for rule, kept, group, members in zip(
            pure.members,
            self._pure_state.members,
            self._twin.param_groups,
            self._group_to_param_list,
            strict=True,
        ):
            held: collections.defaultdict[int, Any] = collections.defaultdict(dict)
            for position, (i, p) in enumerate(zip(members, group["params"], strict=True)):
                saved = (
                    self._twin.state[p] if p in self._twin.state else self._as_constructed(rule, p)
                )
                if saved:
                    held[position] = {**saved, **_with_graph(rule, kept, str(i))}
            exported.append(held)
        return exported

    def _as_constructed(self, rule: Rule, parameter: Tensor) -> dict[str, Any]:
        """Return what a torch optimizer keeps before its first step (Adagrad does)."""
        kept, count = self._other.state.get(parameter, {}), rule.torch_layout.count
        return (
            dict(copy_and_cast(kept, self._device))
            if count is not None and not kept.get(count)
            else {}
        )

    def _edits(self) -> dict[Place, Any]:
        """Return what was changed in the state that was handed out: the new value, or `_GONE`.

        Keys that a subclass adds are its own.
        """
        found: dict[Place, Any] = {}
        there = set()
        for g, held in enumerate(self._states):
            own = self._kept_names(g)
            for i, kept in held.items():
                for key, value in kept.items():
                    there.add((g, i, key))
                    shown, mark = self._shown.get((g, i, key), (_GONE, None))
                    if (own is None or key in own) and (value is not shown or _mark(value) != mark):
                        found[g, i, key] = value
        return found | dict.fromkeys(self._shown.keys() - there, _GONE)

    def _kept_names(self, g: int) -> set[str] | None:
        """Return the names under which torch keeps what this rule keeps; None for all."""
        rule = cast("FromTorch", self._pure).members[g]
        layout = rule.torch_layout
        names = {layout.state[field] for field in rule.slots()}
        return names if layout.count is None else {*names, layout.count}

    def _take_over(self, edits: Mapping[Place, Any], params: Mapping[str, Tensor]) -> None:
        """Go on from the state as it was edited; what was not edited keeps its graph."""
        rules = cast("FromTorch", self._pure).members
        if any(rule.torch_layout.shared for rule in rules):
            raise InvalidInputError(
                f"diffopt.state was changed, which the rule of {type(self._other).__name__} "
                "cannot take over inside of a loop: change the "
                "state of the torch optimizer before the loop"
            )
        members = []
        for g, (rule, kept) in enumerate(zip(rules, self._pure_state.members, strict=True)):
            names = {str(i): j for j, i in enumerate(self._group_to_param_list[g])}
            of_group = {
                name: {key: v for (k, i, key), v in edits.items() if (k, i) == (g, j)}
                for name, j in names.items()
            }
            edited = {name: changes for name, changes in of_group.items() if changes}
            members.append(
                _edited(rule, kept, edited, {name: params[name] for name in names})
                if edited
                else kept
            )
        self._pure_state = self._pure_state._replace(members=tuple(members))

    def _evaluated(
        self,
        loss: Tensor | Callable[[], Tensor],
        params: list[Tensor],
        callback: GradCallback | None,
    ) -> GradList:
        if not self._pure.needs_closure:
            return super()._evaluated(loss, params, callback)
        if not callable(loss) or self._fmodel is None:
            raise InvalidInputError(
                f"{type(self._other).__name__} evaluates the loss itself: give it a patched "
                "module, fmodel=, and a function, "
                "diffopt.step(lambda: loss_fn(fmodel(x), y))"
            )
        fast = fast_weights(self._fmodel)

        def evaluate(trial: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
            with torch.enable_grad():
                at = [
                    _alias(trial[str(i)]) if str(i) in trial and p.requires_grad else p
                    for i, p in enumerate(params)
                ]
                at = list(with_dense_gradients(dict(enumerate(at)), self._sparse).values())
                with fast.at(at):
                    # The loop's own block is left while a rule runs.
                    with fast.kernels():
                        value = scalar(loss())
                    grads = self._gradients(value, at, callback)
            return value if self._track_higher_grads else value.detach(), {
                name: grads[int(name)] for name in trial
            }

        start = {str(i): params[i] for members in self._group_to_param_list for i in members}
        first = evaluate(start)
        self._evaluations = CachedFirstEvaluation(evaluate, start, *first)
        return [first[1].get(str(i)) for i in range(len(params))]


class DifferentiableAdapted(DifferentiableRule):
    """An optimizer of any other class, by `innerloop.optim.adapt`.

    Its own ``step`` runs, verified before the first use, or it is refused.

    Raises:
        InvalidInputError: the class itself fails on a list of parameters.
        NotDifferentiableError: it cannot be differentiated, or comes out wrong; with the line or
            the numbers.
    """

    def _begin(self) -> None:
        cls = type(self._other)
        accepted = inspect.signature(cls).parameters
        settings = {name: value for name, value in self._other.defaults.items() if name in accepted}
        reference = dict(numbered(self._reference))
        groups = [
            (settings_of(group), members)
            for group, members in zip(
                self._other.param_groups, self._group_to_param_list, strict=True
            )
        ]

        def make(named: dict[str, Tensor]) -> torch.optim.Optimizer:
            if {n: p.shape for n, p in named.items()} != {n: p.shape for n, p in stepped.items()}:
                return cls(list(named.values()), **settings)
            return cls(
                [{**rest, "params": [named[str(i)] for i in m]} for rest, m in groups], **settings
            )

        stepped = {str(i): reference[str(i)] for _, members in groups for i in members}
        shown = ", ".join(
            [cls.__name__, *(f"{name}={value!r}" for name, value in settings.items())]
        )
        self._pure = Adapted(shown, make, needs_closure=False, verifies=True, cls=cls)
        self._pure.verify(stepped)
        if self._other.state:  # it has taken steps: what it keeps is a constant
            tensors, rest = freeze(self._other, stepped)
            self._pure_state: Any = AdaptedState(
                0, tuple(t.detach().clone() for t in tensors), rest
            )
        else:
            self._pure_state = self._pure.start(stepped)
        if self._device is not None:
            self._pure_state = tree.map_tensors(lambda t: t.to(self._device), self._pure_state)
        self._initial = [settings_of(group) for group in self._other.param_groups]

    def _advance(
        self, grads: dict[str, Tensor | None], params: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        changed = {
            name
            for group, old in zip(self.param_groups, self._initial, strict=True)
            for name, value in settings_of(group).items()
            if value is not old.get(name) and (has_tensor(value) or value != old.get(name))
        }
        hyper = {name: [group.get(name) for group in self.param_groups] for name in changed}
        new, self._pure_state = cast("Adapted", self._pure).update(
            grads, self._pure_state, params, hyper
        )
        return new

    def _kept_names(self, g: int) -> set[str] | None:
        return None

    def _take_over(self, edits: Mapping[Place, Any], params: Mapping[str, Tensor]) -> None:
        stand_ins = {i: torch.empty(0) for members in self._group_to_param_list for i in members}
        optimizer = thaw(self._pure_state.rest, self._pure_state.tensors, list(stand_ins.values()))
        for (g, j, key), value in edits.items():
            kept = optimizer.state[stand_ins[self._group_to_param_list[g][j]]]
            if value is _GONE:
                kept.pop(key, None)
            elif isinstance(kept.get(key), TracedNumber):
                kept[key] = TracedNumber(torch.as_tensor(value, dtype=kept[key].tensor.dtype))
            else:
                kept[key] = value
        for p in [p for p, kept in optimizer.state.items() if not kept]:
            del optimizer.state[p]
        tensors, rest = freeze(optimizer, {str(i): p for i, p in stand_ins.items()})
        self._pure_state = AdaptedState(self._pure_state.count, tensors, rest)

    def _exported(self) -> State:
        stand_ins = {i: torch.empty(0) for members in self._group_to_param_list for i in members}
        optimizer = thaw(
            self._pure_state.rest, self._pure_state.tensors, list(stand_ins.values()), lambda t: t
        )
        return [
            collections.defaultdict(
                dict,
                {
                    j: dict(optimizer.state[stand_ins[i]])
                    for j, i in enumerate(members)
                    if stand_ins[i] in optimizer.state
                },
            )
            for members in self._group_to_param_list
        ]


def _with_graph(rule: Rule, kept: object, name: str) -> dict[str, Tensor]:
    """Return the tensors that a rule keeps for one parameter, under torch's names."""
    found = {}
    for field in rule.slots():
        held = getattr(kept, field)
        value = held.get(name) if isinstance(held, Mapping) else None
        if isinstance(value, Tensor):
            found[rule.torch_layout.state[field]] = value
    return found


def _mark(value: object) -> object:
    """Return a mark that changes when a value is written in place.

    It is a tensor's version; and its number, if it is one, for a write through ``.data``.
    """
    if not isinstance(value, Tensor):
        return None
    number = value.item() if value.numel() == 1 and value.device.type == "cpu" else None
    return torch_private.version(value), number


def _edited(
    rule: Rule, kept: Any, edited: Mapping[str, Mapping[str, Any]], params: dict[str, Tensor]
) -> Any:
    """Return the state of a rule with some of what torch keeps, for some parameters, replaced."""
    cold, layout = rule.init(params), rule.torch_layout
    fields = {}
    for field in rule.slots():
        held, start = getattr(kept, field), getattr(cold, field)
        if held is not None:
            changes = {
                n: c[layout.state[field]] for n, c in edited.items() if layout.state[field] in c
            }
            fields[field] = {
                n: (start[n] if changes[n] is _GONE else _slot(rule, field, changes[n], start[n]))
                if n in changes
                else held[n]
                for n in params
            }
    counts = {n: kept.count[n] if isinstance(kept.count, Mapping) else kept.count for n in params}
    for name, new in edited.items():
        if layout.count is not None:
            value = new.get(layout.count, counts[name])
            counts[name] = 0 if value is _GONE else int(value)
        else:  # it has taken a step if it keeps anything
            counts[name] = int(any(value is not _GONE for value in new.values()))
    same = len(set(counts.values())) == 1
    return kept._replace(count=next(iter(counts.values())) if same else counts, **fields)


def _slot(rule: Rule, field: str, value: Any, like: Any) -> object:
    """Return a value that a user gave, as the rule keeps it."""
    if not isinstance(like, Tensor):
        return value if isinstance(value, Tensor) and value.requires_grad else float(value)
    if not isinstance(value, Tensor) or value.shape != like.shape:
        got = (
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        )
        raise InvalidInputError(
            f"{rule.torch_layout.state[field]!r} in diffopt.state is {got}: it must be a tensor of "
            f"the shape {tuple(like.shape)}"
        )
    return value


def _alias(p: Tensor) -> Tensor:
    """Return the same values to differentiate with respect to.

    A gradient is taken where a line search looks, not where the step started.
    """
    # Not view_as, whose derivative takes no sparse gradient.
    return _identity(p) if p.requires_grad else p.detach().requires_grad_()
