"""A step of a differentiable optimizer of ``higher.optim``, all but the rule."""

from __future__ import annotations

import abc
import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from innerloop._carry import aliased
from innerloop._inner_gradient.gradient import (
    check_graph,
    finish,
    inner_gradient,
    sent_sparse,
    with_dense_gradients,
)
from innerloop._inner_gradient.loss import check_loss
from innerloop._module.checks import LateHooks
from innerloop._module.view import look_up_densely
from innerloop._utils import torch_private, tree
from innerloop._utils.arguments import check_device, check_flag
from innerloop._utils.deep_graphs import Chain
from innerloop.errors import InvalidInputError
from innerloop.higher._fast_weights import fast_weights
from innerloop.higher._nested import copy_and_cast, detach, flatten, recursive_map
from innerloop.higher.patch import PatchedModule
from innerloop.optim._engine.callback import call_back, refuse_post_accumulate_hooks
from innerloop.optim._engine.grads import sparse_ones
from innerloop.optim._from_torch.from_torch import StateMark, refuse_hooks, refuse_wrapper

GroupedGrads = Sequence[Sequence[Tensor | None]]
GradList = list[Tensor | None]
GradCallback = Callable[[list[Any]], Sequence[Any]]
Override = Mapping[str, Sequence[Any] | nn.ParameterList | Tensor]
State = list[collections.defaultdict[int, Any]]
_NAMES = ("params", "param_names")  # what a param group holds besides settings


class DifferentiableOptimizer(abc.ABC):
    """The differentiable form of a torch optimizer: what is common to all rules.

    To write a rule of your own derive from this class, define `_update` and `register_optim` it; to
    change or to watch a rule derive from its class.

    Args:
        other: the torch optimizer: groups, settings and current state are taken over. A tensor
            among its settings keeps its gradient, and a scheduler may change them between steps (in
            ``higher`` both are lost).
        reference_params: the parameters of the model that ``other`` steps, in the model's order.
        fmodel: the patched module whose parameters each step replaces.
        device: where the optimizer's state goes; default: where it is.
        override: settings as ``{"lr": [tensor]}``, one entry for all param groups or one per group,
            from now on; a tensor may also have the shape of the parameters of its group.
        grad_callback: receives the list of gradients at each step, in the order of
            ``reference_params`` (None where there is none), and returns those to use.
        track_higher_grads: False detaches each step.
        kwargs: accepted and ignored, as in ``higher``.

    Attributes:
        param_groups: as in ``torch.optim``; settings may be changed between steps. ``"params"`` are
            the newest parameters.
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
        check_optimizer(other)
        check_device(device)
        check_flag("track_higher_grads", track_higher_grads)
        refuse_hooks(other)
        if fmodel is not None and not isinstance(fmodel, PatchedModule):
            raise InvalidInputError(
                f"fmodel is a {type(fmodel).__name__}: pass what "
                "innerloop.higher.monkeypatch(model) returns"
            )
        self._reference = listed(reference_params, "reference_params")
        self._other = other
        self._group_to_param_list = [
            self._positions(group["params"]) for group in other.param_groups
        ]
        self.param_groups = [{**g, "params": [None] * len(g["params"])} for g in other.param_groups]
        self._seen = [settings_of(group) for group in other.param_groups]
        self._state_mark = StateMark(
            [other],
            "Edit, assign or clear diffopt.state, which takes effect at the next step; or load it "
            "before the loop",
        )
        self._overridden: set[str] = set()
        self._states = self._initial_state(device)
        self._chain = Chain()
        self._apply_override(override)
        _check_callback(grad_callback)
        self._late_hooks = (
            None
            if fmodel is None
            else LateHooks(
                fmodel.modules(),
                "Register it on the model's own before the loop, or change gradients with "
                "diffopt.step(loss, grad_callback=...)",
            )
        )
        refuse_post_accumulate_hooks(
            dict(numbered(self._reference)),
            [str(i) for members in self._group_to_param_list for i in members],
            "Change gradients with diffopt.step(loss, grad_callback=...)",
        )
        self._hooks = [
            (i, hook)
            for i, p in enumerate(self._reference)
            for hook in torch_private.gradient_hooks(p)
        ]
        self._fmodel = fmodel
        self._device = device
        self._grad_callback = grad_callback
        self._track_higher_grads = track_higher_grads
        self._sparse = set() if fmodel is None else fast_weights(fmodel).sparse()
        self._takes_sparse = isinstance(other, torch.optim.SparseAdam)
        if fmodel is not None and not self._takes_sparse:
            look_up_densely(fmodel.modules())

    @property
    def state(self) -> State:
        """Return for each group what is kept for each of its parameters, by its position."""
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
        """Take one differentiable step: ``opt.zero_grad(); loss.backward(); opt.step()``.

        Args:
            loss: scalar, computed with the patched module at its newest parameters; or a function
                without arguments that computes it, which a rule that evaluates the loss itself
                (LBFGS) needs, and calls as often as ``torch.optim`` does.
            params: the parameters that the loss was computed with; default: the patched module's.
            override: as in the constructor, from this step on.
            grad_callback: as in the constructor, for this step.
            kwargs: handed on to `_update`.

        Returns:
            The new parameters, which the patched module (if any) uses from now on.

        Raises:
            InvalidInputError: no parameters, a loss that is not a scalar or does not depend on
                them.
            NotDifferentiableError: the loss has no second derivative (compiled code, for example),
                and it would be needed.
        """
        before = self._current(params)
        _check_callback(grad_callback)
        self._follow_schedulers()
        self._apply_override(override)
        self._fill(before)
        callback = grad_callback or self._grad_callback
        if self._fmodel is None:
            return self._step(loss, before, callback, kwargs)
        users_too = callable(loss) or callback is not None or bool(self._hooks)
        with fast_weights(self._fmodel).own_code(users_too=users_too):
            return self._step(loss, before, callback, kwargs)

    def _step(
        self,
        loss: Tensor | Callable[[], Tensor],
        before: list[Tensor],
        callback: GradCallback | None,
        kwargs: dict[str, Any],
    ) -> list[Tensor]:
        """Take a step from the parameters ``before``."""
        grads = self._evaluated(loss, before, callback)
        with torch.set_grad_enabled(self._track_higher_grads):
            self._update(
                [[grads[i] for i in members] for members in self._group_to_param_list], **kwargs
            )
        after = list(before)
        for group, members in zip(self.param_groups, self._group_to_param_list, strict=True):
            for i, p in zip(members, group["params"], strict=True):
                after[i] = (
                    p
                    if self._track_higher_grads
                    else p.detach().requires_grad_(before[i].requires_grad)
                )
        if self._track_higher_grads:  # times are told apart by the identity of their tensors
            named = aliased(dict(numbered(after)), dict(numbered(before)))
            after = [named[name] for name, _ in numbered(after)]
            after = list(with_dense_gradients(dict(enumerate(after)), self._sparse).values())
            # Programs cut the graph in place, p.detach_(), which PyTorch refuses for views.
            after = [p.clone() if torch_private.is_view(p) else p for p in after]
            self._chain.step(lambda: tree.tensors((after, self._kept())))
        self._fill(after)
        self._look_for_goals(after, before)
        if self._fmodel is not None:
            self._fmodel.update_params(after)
        torch_private.mark_stepped(self._other)
        return after

    def _kept(self) -> object:
        """Return what a step leaves to the next one, besides the parameters."""
        return [dict(held) for held in self._states]

    @abc.abstractmethod
    def _update(self, grouped_grads: GroupedGrads, **kwargs: Any) -> None:
        """Replace ``"params"`` of each param group by those after a step with its gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Return detached state and settings, as torch's ``load_state_dict`` reads them."""
        twin = twin_of(self._other)
        twin.param_groups = [
            {
                name: _as_before(mine.get(name), value)
                for name, value in theirs.items()
                if name not in _NAMES
            }
            | {name: theirs[name] for name in _NAMES if name in theirs}
            for mine, theirs in zip(self.param_groups, self._other.param_groups, strict=True)
        ]
        twin.state = collections.defaultdict(dict)
        for held, group in zip(self.state, self._other.param_groups, strict=True):
            kept = {p: held[i] for i, p in enumerate(group["params"]) if held.get(i)}
            twin.state.update(
                {p: tree.map_tensors(lambda t: t.detach().clone(), kept[p]) for p in kept}
            )
        return torch.optim.Optimizer.state_dict(twin)

    def _initial_state(self, device: torch.device | str | None) -> State:
        """Copy what the torch optimizer keeps."""
        state: State = [collections.defaultdict(dict) for _ in self.param_groups]
        for held, group in zip(state, self._other.param_groups, strict=True):
            for i, p in enumerate(group["params"]):
                if p in self._other.state:
                    held[i] = copy_and_cast(self._other.state[p], device)
        return state

    def _positions(self, params: Iterable[Tensor]) -> list[int]:
        index = {id(p): i for i, p in enumerate(self._reference)}
        unknown = [tuple(p.shape) for p in params if id(p) not in index]
        if unknown:
            raise InvalidInputError(
                f"the optimizer steps {len(unknown)} tensor(s), of shapes {unknown[:4]}, that are "
                "not among reference_params: pass "
                "model.parameters() of the model whose parameters it was built from"
            )
        return [index[id(p)] for p in params]

    def _current(self, params: Iterable[Tensor] | None) -> list[Tensor]:
        if params is not None:
            current: list[Tensor] | None = listed(params, "params")
        else:
            current = (
                fast_weights(self._fmodel).newest_or_none() if self._fmodel is not None else None
            )
        if current is None:
            raise InvalidInputError(
                "step(loss) without a patched module that has parameters needs them: step(loss, "
                "params=params)"
            )
        if len(current) != len(self._reference):
            raise InvalidInputError(
                f"step got {len(current)} parameters, the optimizer was made for "
                f"{len(self._reference)}: pass one for each of "
                "reference_params, in their order"
            )
        return current

    def _fill(self, params: Sequence[Tensor]) -> None:
        for group, members in zip(self.param_groups, self._group_to_param_list, strict=True):
            group["params"] = [params[i] for i in members]

    def _evaluated(
        self,
        loss: Tensor | Callable[[], Tensor],
        params: list[Tensor],
        callback: GradCallback | None,
    ) -> GradList:
        if callable(loss):
            with self._users_code():
                loss = loss()
        return self._gradients(scalar(loss), params, callback)

    def _users_code(self) -> AbstractContextManager[None]:
        """Return the block for the user's own code in a step."""
        return nullcontext() if self._fmodel is None else fast_weights(self._fmodel).users_code()

    def _gradients(
        self, loss: Tensor, params: Sequence[Tensor], callback: GradCallback | None
    ) -> GradList:
        used = (
            set(range(len(params)))
            if callback
            else {i for members in self._group_to_param_list for i in members}
        )
        wanted = [i for i in sorted(used) if params[i].requires_grad]
        if not loss.requires_grad:
            why = (
                "torch.no_grad() is on"
                if not torch.is_grad_enabled()
                else "it was detached, or computed without fmodel"
            )
            raise InvalidInputError(
                f"the loss does not depend on any parameter through the graph ({why}): compute it "
                "as loss_fn(fmodel(x), y)"
            )
        if self._late_hooks is not None and self._track_higher_grads:
            self._late_hooks.check(enumerate(params))
        nodes: list[Node] = []
        leaves = check_graph([loss], params, second_order=self._track_higher_grads, sparse=nodes)
        found = inner_gradient(
            loss,
            {i: params[i] for i in wanted},
            create_graph=self._track_higher_grads,
            independent=lambda: InvalidInputError(
                "the loss depends on none of the parameters: compute it with the patched module, "
                "after the last step (a function that "
                "is kept in the model, and has taken hold of the model itself, computes with the "
                "model's own)"
            ),
            gate=None if self._fmodel is None else fast_weights(self._fmodel).gate,
            # A buffer that the step has computed is there for the outer loss.
            keep_graph=not self._track_higher_grads
            and self._fmodel is not None
            and any(b.requires_grad for b in self._fmodel.buffers()),
        )
        self._note(leaves, params)
        self._look_for_captured(loss, leaves)
        self._sparse |= sparse_ones(found)
        if nodes:
            self._sparse |= sent_sparse(nodes, {i: params[i] for i in wanted})
        with self._users_code() if self._hooks else nullcontext():
            finished = finish(found, hooks=self._hooks, takes_sparse=self._takes_sparse)
        grads = [finished.get(i) for i in range(len(params))]
        return grads if callback is None else self._called_back(callback, grads)

    def _called_back(self, callback: GradCallback, grads: GradList) -> GradList:
        with self._users_code():
            changed = call_back(callback, grads)
        if (
            not isinstance(changed, Sequence)
            or isinstance(changed, str)
            or len(changed) != len(grads)
        ):
            got = len(changed) if isinstance(changed, Sequence) else type(changed).__name__
            raise InvalidInputError(
                "grad_callback must return a list with a gradient, or None, for each of the "
                f"{len(grads)} parameters; got {got}"
            )
        for i, g in enumerate(changed):
            if g is not None and not (
                isinstance(g, Tensor) and g.shape == self._reference[i].shape
            ):
                found = f"a tensor of shape {tuple(g.shape)}" if isinstance(g, Tensor) else repr(g)
                raise InvalidInputError(
                    f"grad_callback returned {found} for the parameter {self._name_of(i)}: it "
                    "must be a tensor of the parameter's shape "
                    f"{tuple(self._reference[i].shape)}, or None"
                )
        return list(changed)

    def _name_of(self, i: int) -> str:
        """Return a parameter's name, as an error should call it."""
        names = [] if self._fmodel is None else list(fast_weights(self._fmodel).shapes)
        return repr(names[i]) if len(names) == len(self._reference) else f"number {i}"

    def _apply_override(self, override: Override | None) -> None:
        """Let these settings hold from now on: all of them, or none if one of them is wrong."""
        if override is not None and not isinstance(override, Mapping):
            raise InvalidInputError(
                f"override is a {type(override).__name__}: write a dict, override={{'lr': "
                "[tensor]}"
            )
        checked = {name: self._entries(name, values) for name, values in (override or {}).items()}
        for name, values in checked.items():
            self._overridden.add(name)
            for i, group in enumerate(self.param_groups):
                value = values[i % len(values)]
                group[name] = (
                    tuple(value)
                    if isinstance(value, list) and isinstance(group.get(name), tuple)
                    else value
                )

    def _entries(self, name: str, values: object) -> list[Any]:
        """Return what ``override`` has under ``name``: one entry, or one per param group."""
        found = entries(values)
        if found is None or len(found) not in (1, len(self.param_groups)):
            raise InvalidInputError(
                f"override[{name!r}] must be a list with one entry, or one for each of the "
                f"{len(self.param_groups)} param groups: "
                f"override={{{name!r}: [tensor]}}"
            )
        if any(isinstance(v, Tensor) and v.is_complex() for v in flatten(found)):
            raise InvalidInputError(f"override[{name!r}] has a complex tensor: settings are real")
        self._check_setting(name)
        return found

    def _check_setting(self, name: str) -> None:
        """Raise if there is no such setting.

        A rule of the user's own may have more settings than its torch form, so here all will do.
        """
        return

    def _follow_schedulers(self) -> None:
        """Take over what was changed in the torch optimizer since the last step."""
        if len(self._other.param_groups) != len(self.param_groups):
            raise InvalidInputError(
                "the torch optimizer got another param group inside the loop: make a new diffopt"
            )
        self._state_mark.check()
        for group, theirs, seen in zip(
            self.param_groups, self._other.param_groups, self._seen, strict=True
        ):
            for name, value in settings_of(theirs).items():
                old = seen.get(name)
                if value is not old and (has_tensor(value) or has_tensor(old) or value != old):
                    seen[name] = value
                    if name not in self._overridden:
                        group[name] = value

    def _look_for_goals(self, after: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Note at the first step which leaves it depends on (a learned rule, a setting).

        Only the loss can bring in others later.
        """
        if self._fmodel is not None and self._track_higher_grads:
            reach = fast_weights(self._fmodel).reach
            if not reach.outside and reach.steps == 0:
                self._note(check_graph(after, before, second_order=False), before)
            reach.outside |= any(
                t.requires_grad
                for group in self.param_groups
                for t in tree.tensors(settings_of(group))
            )

    def _look_for_captured(self, loss: Tensor, leaves: Iterable[Tensor]) -> None:
        """Warn if the loss uses the user's own parameters, which no step moves.

        A function kept in the model may close over the model itself.
        """
        own = {id(p): i for i, p in enumerate(self._reference)}
        if self._fmodel is None or not any(id(leaf) in own for leaf in leaves):
            return
        fast = fast_weights(self._fmodel)
        times = [
            p for params in fast.history for p in params
        ]  # a loss may use them; they lead back to the model
        known = {id(p) for p in times}
        for leaf in check_graph([loss], times, second_order=False):
            if id(leaf) in own and id(leaf) not in known:
                fast.reach.captured(self._name_of(own[id(leaf)]))

    def _note(self, leaves: Iterable[Tensor], params: Sequence[Tensor]) -> None:
        if self._fmodel is not None and not fast_weights(self._fmodel).reach.outside:
            own = {id(p) for p in params}
            fast_weights(self._fmodel).reach.outside = any(id(leaf) not in own for leaf in leaves)


def check_optimizer(optimizer: object) -> None:
    """Raise unless this is a torch optimizer."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        got = (
            f"the class {optimizer.__name__}"
            if isinstance(optimizer, type)
            else f"a {type(optimizer).__name__}"
        )
        raise InvalidInputError(
            f"expected a torch optimizer over the model's parameters, got {got}: write "
            "torch.optim.SGD(model.parameters(), lr=...), or "
            "create_diff_optim(torch.optim.SGD, {'lr': ...}, fmodel=fmodel) for one without a "
            "torch optimizer"
        )
    refuse_wrapper(optimizer)


def scalar(loss: object) -> Tensor:
    """Return the loss of a step; raise unless it is one number."""
    if not isinstance(loss, Tensor):
        raise InvalidInputError(
            f"the loss is a {type(loss).__name__}: step takes the loss alone, a tensor with one "
            "number, diffopt.step(loss_fn(fmodel(x), y))"
        )
    return check_loss(loss, "the loss")


def _check_callback(callback: object) -> None:
    if callback is not None and not callable(callback):
        raise InvalidInputError(
            f"grad_callback is {callback!r}: pass a function of the list of gradients"
        )


def listed(params: object, name: str) -> list[Tensor]:
    """Return ``params`` as a list; raise if there is anything but tensors in it."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise InvalidInputError(
            f"{name} is a {type(params).__name__}: pass a list of tensors, "
            "list(fmodel.parameters())"
        )
    found = list(params)
    wrong = next((p for p in found if not isinstance(p, Tensor)), found)
    if wrong is not found:
        raise InvalidInputError(
            f"{name} holds a {type(wrong).__name__}: pass tensors, without names, as "
            "list(fmodel.parameters()) gives them"
        )
    return found


def entries(values: object) -> list[Any] | None:
    """Return the elements of a list, an ``nn.ParameterList``, a tensor; None if there are none."""
    if isinstance(values, (str, Mapping)) or (isinstance(values, Tensor) and values.ndim == 0):
        return None
    if not hasattr(values, "__len__") or not hasattr(values, "__getitem__"):
        return None
    return [values[i] for i in range(len(values))]


def twin_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return an optimizer of the same class, for its groups and state to be replaced."""
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    return twin


def _as_before(new: object, old: object) -> object:
    """Return a setting without its graph, and as a number if it was one."""
    if isinstance(old, Tensor):
        return detach(new)
    return recursive_map(new, lambda v: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v)


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a param group holds besides parameters."""
    return {name: value for name, value in group.items() if name not in _NAMES}


def has_tensor(value: object) -> bool:
    """Return True for a tensor, or a pair with one in it, which is compared by identity."""
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)
    )


def numbered(params: Iterable[Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Return parameters by the names that the rules know them under: their positions."""
    return ((str(i), p) for i, p in enumerate(params))
