"""Differentiable optimizers with the interface of ``higher.optim``, on top of `innerloop.optim`.

Every optimizer of ``torch.optim`` whose rule `innerloop.optim` has is there, those that ``higher`` never had (NAdam, RAdam, Adafactor,
Muon, ...) as `DifferentiableRule`; any other class as `DifferentiableAdapted`, by `innerloop.optim.adapt`, verified or refused.
"""

from __future__ import annotations

import abc
import collections
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from innerloop import _private, graph, tree
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.higher import utils
from innerloop.higher.arithmetic import _add, _addcdiv, _addcmul, _get_mask_closure, _maybe_mask
from innerloop.higher.patch import PatchedModule
from innerloop.higher.trainable import apply_trainable_opt_params, get_trainable_opt_params
from innerloop.optim.adapted import Adapted, AdaptedState
from innerloop.optim.adapted.frozen import freeze, thaw
from innerloop.optim.base import Rule
from innerloop.optim.from_torch import FromTorch, from_torch
from innerloop.problem import check_loss, distinct, explained

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
_HELPERS = (_add, _addcdiv, _addcmul, _get_mask_closure, _maybe_mask)  # for rules written against higher

GroupedGrads = Sequence[Sequence[Tensor | None]]
Grads = list[Tensor | None]
GradCallback = Callable[[Grads], Sequence[Tensor | None]]
Override = Mapping[str, Sequence[Any]]
State = list[collections.defaultdict[int, Any]]

# The names that code written against higher has in its annotations.
_GroupedGradsType, _OverrideType, _GradCallbackType, _StateType = GroupedGrads, Override, GradCallback, State

_NAMES = ("params", "param_names")  # what a param group holds besides settings


class DifferentiableOptimizer(abc.ABC):
    """The differentiable form of a torch optimizer: what is common to all rules.

    To write a rule of your own derive from this class, define `_update` and `register_optim` it; to change or to watch a
    rule derive from its class.

    Args:
        other: the torch optimizer: groups, settings and current state are taken over. A tensor among its settings keeps its gradient, and
            a scheduler may change them between steps (in ``higher`` both are lost).
        reference_params: the parameters of the model that ``other`` steps, in the model's order.
        fmodel: the patched module whose parameters each step replaces.
        device: where the optimizer's state goes; default: where it is.
        override: settings as ``{"lr": [tensor]}``, one entry for all param groups or one per group, from now on; a tensor may also
            have the shape of the parameters of its group.
        grad_callback: receives the list of gradients at each step, in the order of ``reference_params`` (None where there is none), and
            returns those to use.
        track_higher_grads: False detaches each step.
        kwargs: accepted and ignored, as in ``higher``.

    Attributes:
        param_groups: as in ``torch.optim``; settings may be changed between steps. ``"params"`` are the newest parameters.
        state: for each group what is kept for each of its parameters, by its position.
    """

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
        if _private.step_hooks(other):
            raise InvalidInputError(
                "the optimizer has step hooks (register_step_pre_hook or _post_hook), which diffopt.step does not run: change gradients "
                "with grad_callback"
            )
        self._reference = list(reference_params)
        self._other = other
        self._group_to_param_list = [self._positions(group["params"]) for group in other.param_groups]
        self.param_groups = [{**g, "params": [None] * len(g["params"])} for g in other.param_groups]
        self._seen = [_settings(group) for group in other.param_groups]
        self._overridden: set[str] = set()
        self._states = self._initial_state(device)
        self._apply_override(override)
        self._hooks = [(i, hook) for i, p in enumerate(self._reference) for hook in _private.gradient_hooks(p)]
        self._fmodel = fmodel
        self._device = device
        self._grad_callback = grad_callback
        self._track_higher_grads = track_higher_grads

    @property
    def state(self) -> State:
        """For each group what is kept for each of its parameters, by its position."""
        return self._states

    @state.setter
    def state(self, value: State) -> None:
        self._states = value

    def step(
        self,
        loss: Tensor | Callable[[], Tensor],
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """One differentiable step: instead of ``opt.zero_grad(); loss.backward(); opt.step()``.

        Args:
            loss: scalar, computed with the patched module at its newest parameters. For a rule that evaluates the loss itself (LBFGS)
                a function without arguments that computes it.
            params: the parameters that the loss was computed with; default: the patched module's.
            override: as in the constructor, from this step on.
            grad_callback: as in the constructor, for this step.
            kwargs: handed on to `_update`.

        Returns:
            The new parameters, which the patched module (if any) uses from now on.

        Raises:
            InvalidInputError: no parameters, a loss that is not a scalar or does not depend on them.
            NotDifferentiableError: the loss has no second derivative (compiled code, for example), and it would be needed.
        """
        before = self._current(params)
        self._follow_schedulers()
        self._apply_override(override)
        self._fill(before)
        callback = grad_callback or self._grad_callback
        grads = (
            self._closure(loss) if callable(loss) else self._gradients(check_loss(loss, "the loss"), before, callback)
        )
        with torch.set_grad_enabled(self._track_higher_grads):
            self._update([[grads[i] for i in members] for members in self._group_to_param_list], **kwargs)
        after = list(before)
        for group, members in zip(self.param_groups, self._group_to_param_list, strict=True):
            for i, p in zip(members, group["params"], strict=True):
                after[i] = p if self._track_higher_grads else p.detach().requires_grad_(before[i].requires_grad)
        if self._track_higher_grads:  # times are told apart by the identity of their tensors
            named = distinct(dict(_numbered(after)), dict(_numbered(before)))
            after = [named[name] for name, _ in _numbered(after)]
        self._fill(after)
        self._look_for_goals(after, before)
        if self._fmodel is not None:
            self._fmodel.update_params(after)
        _private.mark_stepped(self._other)
        return after

    @abc.abstractmethod
    def _update(self, grouped_grads: GroupedGrads, **kwargs: Any) -> None:
        """Replace ``self.param_groups[i]["params"]`` by the parameters after a step with ``grouped_grads[i]``."""

    def state_dict(self) -> dict[str, Any]:
        """What ``torch.optim.Optimizer.load_state_dict`` reads: state and settings, detached."""
        twin = _twin(self._other)
        twin.param_groups = [
            {name: _as_before(mine.get(name), value) for name, value in theirs.items() if name not in _NAMES}
            | {name: theirs[name] for name in _NAMES if name in theirs}
            for mine, theirs in zip(self.param_groups, self._other.param_groups, strict=True)
        ]
        twin.state = collections.defaultdict(dict)
        for held, group in zip(self.state, self._other.param_groups, strict=True):
            kept = {p: held[i] for i, p in enumerate(group["params"]) if held.get(i)}
            twin.state.update({p: tree.map_tensors(lambda t: t.detach().clone(), kept[p]) for p in kept})
        return torch.optim.Optimizer.state_dict(twin)

    def _initial_state(self, device: torch.device | str | None) -> State:
        """Copies of what the torch optimizer keeps."""
        state: State = [collections.defaultdict(dict) for _ in self.param_groups]
        for held, group in zip(state, self._other.param_groups, strict=True):
            for i, p in enumerate(group["params"]):
                if p in self._other.state:
                    held[i] = utils._recursive_copy_and_cast(self._other.state[p], device)
        return state

    def _positions(self, params: Iterable[Tensor]) -> list[int]:
        index = {id(p): i for i, p in enumerate(self._reference)}
        unknown = [tuple(p.shape) for p in params if id(p) not in index]
        if unknown:
            raise InvalidInputError(
                f"the optimizer steps {len(unknown)} tensor(s), of shapes {unknown[:4]}, that are not among reference_params: pass "
                "model.parameters() of the model whose parameters it was built from"
            )
        return [index[id(p)] for p in params]

    def _current(self, params: Iterable[Tensor] | None) -> list[Tensor]:
        current = list(params) if params is not None else self._fmodel.fast_params if self._fmodel is not None else None
        if current is None:
            raise InvalidInputError(
                "step(loss) without a patched module that has parameters needs them: step(loss, params=params)"
            )
        if len(current) != len(self._reference):
            raise InvalidInputError(
                f"step got {len(current)} parameters, the optimizer was made for {len(self._reference)}: pass one for each of "
                "reference_params, in their order"
            )
        return current

    def _fill(self, params: Sequence[Tensor]) -> None:
        for group, members in zip(self.param_groups, self._group_to_param_list, strict=True):
            group["params"] = [params[i] for i in members]

    def _closure(self, loss: Callable[[], Tensor]) -> Grads:
        raise InvalidInputError(f"{type(self).__name__} takes the loss itself, not a function: diffopt.step(loss)")

    def _gradients(self, loss: Tensor, params: Sequence[Tensor], callback: GradCallback | None) -> Grads:
        used = set(range(len(params))) if callback else {i for members in self._group_to_param_list for i in members}
        wanted = [i for i in sorted(used) if params[i].requires_grad]
        if not loss.requires_grad:
            why = (
                "torch.no_grad() is on"
                if not torch.is_grad_enabled()
                else "it was detached, or computed without fmodel"
            )
            raise InvalidInputError(
                f"the loss does not depend on any parameter through the graph ({why}): compute it as loss_fn(fmodel(x), y)"
            )
        leaves = graph.inspect([loss], params, self._track_higher_grads)
        found = self._differentiate(loss, [params[i] for i in wanted])
        if wanted and all(g is None for g in found):
            raise InvalidInputError(
                "the loss depends on none of the parameters: compute it with the patched module, after the last step"
            )
        self._note(leaves, params)
        grads: Grads = [None] * len(params)
        for i, g in zip(wanted, found, strict=True):
            if self._track_higher_grads and g is not None and g.layout != torch.strided:
                raise NotDifferentiableError(
                    f"the gradient of parameter {i} is sparse, which has no second derivative: build nn.Embedding with sparse=False"
                )
            grads[i] = g
        for i, hook in self._hooks:
            if grads[i] is not None and (changed := hook(grads[i])) is not None:  # type: ignore[arg-type]
                grads[i] = changed
        return grads if callback is None else self._called_back(callback, grads)

    def _differentiate(self, loss: Tensor, wanted: list[Tensor]) -> Sequence[Tensor | None]:
        gate = None if self._fmodel is None else self._fmodel._innerloop_fast.gate
        closed = gate is not None and gate.closed
        if gate is not None:
            gate.closed = False
        try:
            return (
                torch.autograd.grad(loss, wanted, create_graph=self._track_higher_grads, allow_unused=True)
                if wanted
                else []
            )
        except RuntimeError as error:
            raise explained(error) from error
        finally:
            if gate is not None:
                gate.closed = closed

    @staticmethod
    def _called_back(callback: GradCallback, grads: Grads) -> Grads:
        changed = callback(grads)
        if not isinstance(changed, Sequence) or len(changed) != len(grads):
            got = len(changed) if isinstance(changed, Sequence) else type(changed).__name__
            raise InvalidInputError(
                f"grad_callback must return a list with a gradient, or None, for each of the {len(grads)} parameters; got {got}"
            )
        return list(changed)

    def _apply_override(self, override: Override | None) -> None:
        for name, values in (override or {}).items():
            if not isinstance(values, Sequence) or len(values) not in (1, len(self.param_groups)):
                raise InvalidInputError(
                    f"override[{name!r}] must be a list with one entry, or one for each of the {len(self.param_groups)} param groups: "
                    f"override={{{name!r}: [tensor]}}"
                )
            self._check_setting(name)
            self._overridden.add(name)
            for i, group in enumerate(self.param_groups):
                value = values[i % len(values)]
                group[name] = tuple(value) if isinstance(value, list) and isinstance(group.get(name), tuple) else value

    def _check_setting(self, name: str) -> None:
        """Raise if there is no such setting; a rule of the user's own may have more than its torch form."""

    def _follow_schedulers(self) -> None:
        """Take over what was changed in the torch optimizer since the last step."""
        if len(self._other.param_groups) != len(self.param_groups):
            raise InvalidInputError("the torch optimizer got another param group inside the loop: make a new diffopt")
        for group, theirs, seen in zip(self.param_groups, self._other.param_groups, self._seen, strict=True):
            for name, value in _settings(theirs).items():
                old = seen.get(name)
                if value is not old and (_has_tensor(value) or _has_tensor(old) or value != old):
                    seen[name] = value
                    if name not in self._overridden:
                        group[name] = value

    def _look_for_goals(self, after: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """At the first step, which leaves it depends on (a learned rule, a setting); later ones the loss alone can bring in."""
        if self._fmodel is not None and self._track_higher_grads:
            teacher = self._fmodel._innerloop_fast.teacher
            if not teacher.outside and teacher.steps == 0:
                self._note(graph.inspect(after, before, second_order=False), before)
            teacher.outside |= any(
                t.requires_grad for group in self.param_groups for t in tree.tensors(_settings(group))
            )

    def _note(self, leaves: Iterable[Tensor], params: Sequence[Tensor]) -> None:
        if self._fmodel is not None and not self._fmodel._innerloop_fast.teacher.outside:
            own = {id(p) for p in params}
            self._fmodel._innerloop_fast.teacher.outside = any(id(leaf) not in own for leaf in leaves)


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
        self._value_and_grad: Any = None
        self._begin()
        self._shown: dict[tuple[int, int, str], Any] = {}
        self._stale = True

    def _initial_state(self, device: torch.device | str | None) -> State:
        return [collections.defaultdict(dict) for _ in self.param_groups]  # filled when somebody looks

    @property
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
        self._twin = _twin(self._other)
        self._twin.param_groups = [{**group} for group in self._other.param_groups]
        self._write_settings()
        reference = dict(_numbered(self._reference))
        self._pure: FromTorch | Adapted = from_torch(self._twin, reference)
        self._pure_state = self._pure.init(reference)
        if self._device is not None:
            self._pure_state = tree.map_tensors(lambda t: t.to(self._device), self._pure_state)

    def _advance(self, grads: dict[str, Tensor | None], params: dict[str, Tensor]) -> dict[str, Tensor]:
        pure = cast("FromTorch", self._pure)
        shaped = self._write_settings()
        pure.refresh()
        closure = {} if self._value_and_grad is None else {"value_and_grad": self._value_and_grad}
        new, self._pure_state = pure.update(grads, self._pure_state, params, shaped, **closure)
        return new

    def _write_settings(self) -> dict[str, list[Any]]:
        """Let the rule read the settings as they are now; returns those that have a value for each element of a parameter."""
        shaped: dict[str, list[Any]] = {}
        groups = zip(self.param_groups, self._twin.param_groups, self._other.param_groups, strict=True)
        for g, (mine, twins, theirs) in enumerate(groups):
            for name, value in _settings(mine).items():
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
                f"{name} is a tensor of shape {tuple(value.shape)}, the parameters of its group have {[tuple(s) for s in shapes.values()]}: "
                "write one number, or give each parameter a group of its own and a tensor of its shape"
            ) from error

    def _check_setting(self, name: str) -> None:
        if not any(name in group for group in self.param_groups) and type(self)._update in _OUR_UPDATES:
            raise InvalidInputError(
                f"override has {name!r}, but {type(self._other).__name__} has no such setting; it has {list(_settings(self.param_groups[0]))}"
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

    def _closure(self, loss: Callable[[], Tensor]) -> Grads:
        fmodel = self._fmodel
        if not self._pure.needs_closure:
            return super()._closure(loss)
        if fmodel is None:
            raise InvalidInputError(
                f"{type(self._other).__name__} evaluates the loss anew: it needs a patched module, fmodel="
            )

        def value_and_grad(params: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
            point = fmodel._innerloop_fast.newest
            wanted = {i: p if p.requires_grad else p.detach().requires_grad_() for i, p in params.items()}
            with torch.enable_grad(), fmodel._innerloop_fast.at([wanted.get(str(i), p) for i, p in enumerate(point)]):
                value = check_loss(loss(), "the loss")
                found = self._differentiate(value, list(wanted.values()))
            return value, dict(zip(wanted, found, strict=True))

        self._value_and_grad = value_and_grad
        grads: Grads = [None] * len(self._reference)
        start = fmodel._innerloop_fast.newest
        found = value_and_grad({name: start[int(name)] for name in self._pure.names})[1]  # type: ignore[union-attr]
        for name, g in found.items():
            grads[int(name)] = g
        return grads


class DifferentiableSGD(DifferentiableRule):
    """``torch.optim.SGD``. In ``higher`` ``maximize`` has no effect, and a learnable weight decay or momentum of 0 gets no gradient."""

    torch_class = torch.optim.SGD


class DifferentiableAdam(DifferentiableRule):
    """``torch.optim.Adam``.

    In ``higher`` 0.2.1 ``eps`` stands before the bias correction; in all versions the derivative in beta2 is wrong, and ``maximize`` and
    ``decoupled_weight_decay`` have no effect.
    """

    torch_class = torch.optim.Adam


class DifferentiableAdamW(DifferentiableRule):
    """``torch.optim.AdamW``. The release of ``higher`` lacks it; its git head has a wrong derivative in beta2."""

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
    """``torch.optim.ASGD``. In ``higher`` the derivatives in ``lr`` and ``lambd`` are wrong, and ``maximize`` has no effect."""

    torch_class = torch.optim.ASGD


class DifferentiableRMSprop(DifferentiableRule):
    """``torch.optim.RMSprop``. In ``higher`` a gradient of zero makes the centred form NaN, and it warns of wrong gradients; not here."""

    torch_class = torch.optim.RMSprop


class DifferentiableRprop(DifferentiableRule):
    """``torch.optim.Rprop``, which looks at signs only: its derivative in the gradients is zero, as it should be."""

    torch_class = torch.optim.Rprop


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
        reference = dict(_numbered(self._reference))
        groups = [
            (_settings(group), members)
            for group, members in zip(self._other.param_groups, self._group_to_param_list, strict=True)
        ]

        def make(named: dict[str, Tensor]) -> torch.optim.Optimizer:
            if {n: p.shape for n, p in named.items()} != {n: p.shape for n, p in stepped.items()}:
                return cls(list(named.values()), **settings)  # type: ignore[call-arg]
            return cls([{**rest, "params": [named[str(i)] for i in m]} for rest, m in groups], **settings)  # type: ignore[call-arg]

        stepped = {str(i): reference[str(i)] for _, members in groups for i in members}
        shown = ", ".join([cls.__name__, *(f"{name}={value!r}" for name, value in settings.items())])
        self._pure = Adapted(shown, make, needs_closure=False, verifies=True, cls=cls)
        self._pure.verify(stepped)
        if self._other.state:  # it has taken steps: what it keeps is a constant
            tensors, rest = freeze(self._other, list(stepped.values()))
            self._pure_state: Any = AdaptedState(0, tuple(t.detach().clone() for t in tensors), rest)
        else:
            self._pure_state = self._pure.start(stepped)
        if self._device is not None:
            self._pure_state = tree.map_tensors(lambda t: t.to(self._device), self._pure_state)
        self._initial = [_settings(group) for group in self._other.param_groups]

    def _advance(self, grads: dict[str, Tensor | None], params: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = {
            name
            for group, old in zip(self.param_groups, self._initial, strict=True)
            for name, value in _settings(group).items()
            if value is not old.get(name) and (_has_tensor(value) or value != old.get(name))
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


_OUR_UPDATES = (DifferentiableRule._update,)

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


def register_optim(optim_type: type[torch.optim.Optimizer], diff_optim_type: type[DifferentiableOptimizer]) -> None:
    """Use ``diff_optim_type`` for optimizers of the class ``optim_type``.

    Args:
        optim_type: a subclass of ``torch.optim.Optimizer``.
        diff_optim_type: a subclass of `DifferentiableOptimizer` that does the same.
    """
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
    """The differentiable form of ``opt``: as registered for its class, else by its rule, else by `innerloop.optim.adapt`.

    A subclass that does not override ``step`` counts as its parent (``higher`` refuses it). The arguments are those of
    `DifferentiableOptimizer`.

    Raises:
        InvalidInputError: ``opt`` steps tensors that are not among ``reference_params``.
        NotDifferentiableError: a class that is not known was adapted, and comes out wrong.

    Example:
        Five steps of gradient descent on y²/2 - a·y, by which y approaches a: dy/da = 1 - (1 - lr)⁵.

        >>> import torch, innerloop.higher as higher
        >>> a, y = torch.tensor(2.0, requires_grad=True), torch.zeros((), requires_grad=True)
        >>> diffopt = higher.get_diff_optim(torch.optim.SGD([y], lr=0.5), [y])
        >>> for _ in range(5):
        ...     (y,) = diffopt.step(y**2 / 2 - a * y, params=[y])
        >>> torch.autograd.grad(y, a)
        (tensor(0.9688),)
    """
    cls = _class_for(type(opt))
    return cls(opt, reference_params, fmodel, device, override, track_higher_grads=track_higher_grads, **kwargs)


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
    """A differentiable optimizer without a torch optimizer to start from.

    Args:
        opt_type: a subclass of ``torch.optim.Optimizer``.
        opt_kwargs: arguments of its constructor.
        params: the tensors that it will step, or param groups of them; only their shapes are used. Default: those of ``fmodel``.
        fmodel: as in `get_diff_optim`, like the other arguments.
        device: see there.
        override: see there.
        track_higher_grads: see there.
        kwargs: see there.

    Raises:
        InvalidInputError: neither ``params`` nor ``fmodel``.
    """
    given = list(params) if params is not None else None if fmodel is None else list(fmodel.parameters())
    if given is None:
        raise InvalidInputError("create_diff_optim needs params= or fmodel=: the tensors that it will step")
    groups = [
        {**group, "params": _stand_ins(group["params"])} if isinstance(group, dict) else _stand_ins(group)[0]
        for group in given
    ]
    reference = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    opt = opt_type(groups, **(opt_kwargs or {}))  # type: ignore[call-arg]
    return get_diff_optim(opt, reference, fmodel, device, override, track_higher_grads, **kwargs)


def _class_for(opt_type: type[torch.optim.Optimizer]) -> type[DifferentiableOptimizer]:
    for cls in opt_type.__mro__:
        if cls in _opt_mapping:
            return _opt_mapping[cls]
        if cls in Rule.by_torch_class:
            return DifferentiableRule
        if "step" in vars(cls):
            break
    return DifferentiableAdapted


def _stand_ins(params: Any) -> list[Tensor]:
    return [torch.zeros_like(p, requires_grad=True) for p in ([params] if isinstance(params, Tensor) else list(params))]


def _twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the same class, for its groups and state to be replaced."""
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    return twin


def _as_before(new: Any, old: Any) -> Any:
    """A setting without its graph, and as a number if it was one."""
    if isinstance(old, Tensor):
        return utils._recursive_detach(new)
    return utils._recursive_map(new, lambda v: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in _NAMES}


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value))


def _numbered(params: Iterable[Tensor]) -> Iterable[tuple[str, Tensor]]:
    return ((str(i), p) for i, p in enumerate(params))


def _with_graph(rule: Rule, kept: Any, name: str) -> dict[str, Tensor]:
    """The tensors that a rule keeps for one parameter, under torch's names, with their graph."""
    found = {}
    for field in rule.slots():
        held = getattr(kept, field)
        value = held.get(name) if isinstance(held, Mapping) else None
        if isinstance(value, Tensor):
            found[rule.torch_state[field]] = value
    return found
