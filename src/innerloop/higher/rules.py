"""Differentiable optimizers that follow a rule of `innerloop.optim`, or another class's own ``step``."""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from innerloop import tree
from innerloop.errors import InvalidInputError
from innerloop.higher.base import (
    DifferentiableOptimizer,
    GradCallback,
    Grads,
    GroupedGrads,
    Override,
    State,
    has_tensor,
    numbered,
    settings_of,
    twin_of,
)
from innerloop.higher.patch import PatchedModule, fast_weights
from innerloop.optim.adapted import Adapted, AdaptedState
from innerloop.optim.adapted.frozen import freeze, thaw
from innerloop.optim.base import Rule
from innerloop.optim.from_torch import FromTorch, from_torch
from innerloop.problem import Evaluations, check_loss


class DifferentiableRule(DifferentiableOptimizer):
    """Any optimizer whose rule `innerloop.optim` has; its arguments are those of `DifferentiableOptimizer`.

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
        super().__init__(other, reference_params, fmodel, device, override, grad_callback, track_higher_grads, **kwargs)
        self._evaluations: Evaluations | None = None
        self._begin()
        self._shown: dict[tuple[int, int, str], Any] = {}
        self._stale = True

    def _initial_state(self, device: torch.device | str | None) -> State:
        return [collections.defaultdict(dict) for _ in self.param_groups]  # filled when somebody looks

    @property  # type: ignore[misc]
    def state(self) -> State:
        """What is kept, under the names of ``torch.optim``; to be read, not changed: the rule keeps it elsewhere."""
        if self._stale:
            self._stale = False
            exported = self._exported()
            self._shown = {
                (g, i, key): value
                for g, held in enumerate(exported)
                for i, kept in held.items()
                for key, value in kept.items()
            }
            for (g, i, key), value in self._shown.items():
                self._states[g][i][key] = value
        return self._states

    def _update(self, grouped_grads: GroupedGrads, **kwargs: Any) -> None:
        self._refuse_edits()
        current = [
            zip(m, g["params"], strict=True) for g, m in zip(self.param_groups, self._group_to_param_list, strict=True)
        ]
        params = {str(i): p for group in current for i, p in group}
        grads = {
            str(i): g
            for gs, m in zip(grouped_grads, self._group_to_param_list, strict=True)
            for i, g in zip(m, gs, strict=True)
        }
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

    def _advance(self, grads: dict[str, Tensor | None], params: dict[str, Tensor]) -> dict[str, Tensor]:
        pure = cast("FromTorch", self._pure)
        shaped = self._write_settings()
        pure.refresh()
        closure: Any = {} if self._evaluations is None else {"value_and_grad": self._evaluations}
        new, self._pure_state = pure.update(grads, self._pure_state, params, shaped, **closure)
        return new

    def _write_settings(self) -> dict[str, list[Any]]:
        """Let the rule read the settings as they are now; returns those that have a value for each element of a parameter."""
        shaped: dict[str, list[Any]] = {}
        groups = zip(self.param_groups, self._twin.param_groups, self._other.param_groups, strict=True)
        for g, (mine, twins, theirs) in enumerate(groups):
            for name, value in settings_of(mine).items():
                if isinstance(value, Tensor) and value.numel() != 1:
                    members = self._group_to_param_list[g]
                    shaped.setdefault(name, [None] * len(self.param_groups))[g] = self._expanded(name, value, members)
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
                f"{name} is a tensor of shape {tuple(value.shape)}, the parameters of its group have "
                f"{[tuple(s) for s in shapes.values()]}: write one number, or give each parameter a group of its own and a tensor of "
                "its shape"
            ) from error

    def _check_setting(self, name: str) -> None:
        more = type(self).__mro__[: type(self).__mro__.index(DifferentiableRule)]
        own_rule = any("_update" in vars(cls) for cls in more)
        if not own_rule and not any(name in group for group in self.param_groups):
            raise InvalidInputError(
                f"override has {name!r}, but {type(self._other).__name__} has no such setting; it has "
                f"{list(settings_of(self.param_groups[0]))}"
            )

    def _exported(self) -> State:
        pure = cast("FromTorch", self._pure)
        self._twin.state = collections.defaultdict(dict)
        pure.write_back(self._pure_state)
        exported: State = []
        for rule, kept, group, members in zip(
            pure.members, self._pure_state.members, self._twin.param_groups, self._group_to_param_list, strict=True
        ):
            held: collections.defaultdict[int, Any] = collections.defaultdict(dict)
            for position, (i, p) in enumerate(zip(members, group["params"], strict=True)):
                if p in self._twin.state:
                    held[position] = {**self._twin.state[p], **_with_graph(rule, kept, str(i))}
            exported.append(held)
        return exported

    def _refuse_edits(self) -> None:
        """Raise if the state that was handed out has been changed: the rule would go on without noticing."""
        if self._stale:
            return
        known = {key for _, _, key in self._shown}
        now = {
            (g, i, key): value
            for g, held in enumerate(self._states)
            for i, kept in held.items()
            for key, value in kept.items()
            if key in known
        }
        if now.keys() != self._shown.keys() or any(now[place] is not value for place, value in self._shown.items()):
            raise InvalidInputError(
                f"diffopt.state was changed, which {type(self).__name__} would not notice: change the state of the torch optimizer before "
                "the loop, or write the rule's _update yourself (derive from DifferentiableOptimizer)"
            )

    def _evaluated(
        self, loss: Tensor | Callable[[], Tensor], params: list[Tensor], callback: GradCallback | None
    ) -> Grads:
        if not self._pure.needs_closure:
            return super()._evaluated(loss, params, callback)
        if not callable(loss) or self._fmodel is None:
            raise InvalidInputError(
                f"{type(self._other).__name__} evaluates the loss itself: give it a patched module, fmodel=, and a function, "
                "diffopt.step(lambda: loss_fn(fmodel(x), y))"
            )
        fast = fast_weights(self._fmodel)

        def evaluate(trial: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
            with torch.enable_grad():
                at = [_alias(trial[str(i)]) if str(i) in trial else p for i, p in enumerate(params)]
                with fast.at(at):
                    value = check_loss(loss(), "the loss")
                    grads = self._gradients(value, at, callback)
            return value if self._track_higher_grads else value.detach(), {name: grads[int(name)] for name in trial}

        start = {str(i): params[i] for members in self._group_to_param_list for i in members}
        first = evaluate(start)
        self._evaluations = Evaluations(evaluate, start, *first)
        return [first[1].get(str(i)) for i in range(len(params))]


class DifferentiableAdapted(DifferentiableRule):
    """Any other optimizer class, by `innerloop.optim.adapt`: its own ``step`` runs, verified before the first use, or it is refused.

    Raises:
        InvalidInputError: the class itself fails on a list of parameters.
        NotDifferentiableError: it cannot be differentiated, or comes out wrong; with the line or the numbers.
    """

    def _begin(self) -> None:
        cls = type(self._other)
        accepted = inspect.signature(cls).parameters
        settings = {name: value for name, value in self._other.defaults.items() if name in accepted}
        reference = dict(numbered(self._reference))
        groups = [
            (settings_of(group), members)
            for group, members in zip(self._other.param_groups, self._group_to_param_list, strict=True)
        ]

        def make(named: dict[str, Tensor]) -> torch.optim.Optimizer:
            if {n: p.shape for n, p in named.items()} != {n: p.shape for n, p in stepped.items()}:
                return cls(list(named.values()), **settings)
            return cls([{**rest, "params": [named[str(i)] for i in m]} for rest, m in groups], **settings)

        stepped = {str(i): reference[str(i)] for _, members in groups for i in members}
        shown = ", ".join([cls.__name__, *(f"{name}={value!r}" for name, value in settings.items())])
        self._pure = Adapted(shown, make, needs_closure=False, verifies=True, cls=cls)
        self._pure.verify(stepped)
        if self._other.state:  # it has taken steps: what it keeps is a constant
            tensors, rest = freeze(self._other, stepped)
            self._pure_state: Any = AdaptedState(0, tuple(t.detach().clone() for t in tensors), rest)
        else:
            self._pure_state = self._pure.start(stepped)
        if self._device is not None:
            self._pure_state = tree.map_tensors(lambda t: t.to(self._device), self._pure_state)
        self._initial = [settings_of(group) for group in self._other.param_groups]

    def _advance(self, grads: dict[str, Tensor | None], params: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = {
            name
            for group, old in zip(self.param_groups, self._initial, strict=True)
            for name, value in settings_of(group).items()
            if value is not old.get(name) and (has_tensor(value) or value != old.get(name))
        }
        hyper = {name: [group.get(name) for group in self.param_groups] for name in changed}
        new, self._pure_state = cast("Adapted", self._pure).update(grads, self._pure_state, params, hyper)
        return new

    def _exported(self) -> State:
        stand_ins = {i: torch.empty(0) for members in self._group_to_param_list for i in members}
        optimizer = thaw(self._pure_state.rest, self._pure_state.tensors, list(stand_ins.values()), lambda t: t)
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


def _with_graph(rule: Rule, kept: Any, name: str) -> dict[str, Tensor]:
    """The tensors that a rule keeps for one parameter, under torch's names, with their graph."""
    found = {}
    for field in rule.slots():
        held = getattr(kept, field)
        value = held.get(name) if isinstance(held, Mapping) else None
        if isinstance(value, Tensor):
            found[rule.torch_state[field]] = value
    return found


def _alias(p: Tensor) -> Tensor:
    """The same values to differentiate with respect to: where a line search looks, not where the step started."""
    return p.view_as(p) if p.requires_grad else p.detach().requires_grad_()
