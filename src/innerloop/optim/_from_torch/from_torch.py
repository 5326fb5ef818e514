"""A ``torch.optim`` optimizer as a pure one: same rule, groups, settings and current state."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from innerloop._types import Grads, Params, ValueAndGrad
from innerloop._utils import caches, torch_private, tree
from innerloop.errors import InvalidInputError
from innerloop.optim._base import Optimizer, Rule
from innerloop.optim._groups import GroupsState, PerGroup, split_hyper
from innerloop.optim._settings import check_state

_NAMES = ("params", "param_names")  # what a param group holds besides settings


class FromTorch(Optimizer):
    """What `from_torch` returns."""

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], names: Mapping[int, str] | None
    ) -> None:
        self._optimizers = tuple(optimizers)
        for opt in self._optimizers:
            refuse_wrapper(opt)
            refuse_hooks(opt)
        stepped = [p for group in self._groups() for p in group["params"]]
        self._stepped = stepped
        self._rules = [_rule_class(opt) for opt in self._optimizers for _ in opt.param_groups]
        self._read: list[dict[str, Any]] = []
        self._settings: list[dict[str, Any]] = []
        self.members: tuple[Rule, ...]
        self.refresh()
        self.compiles = all(member.compiles for member in self.members)
        self.takes_sparse = any(member.takes_sparse for member in self.members)
        self.needs_closure = any(member.needs_closure for member in self.members)
        if self.needs_closure and len(self.members) > 1:
            raise InvalidInputError(
                f"from_torch({list(self.members)}): one of them evaluates the loss itself, and "
                "moves its parameters while the others wait. "
                "Use one optimizer for all parameters"
            )
        ids = [id(p) for group in self._groups() for p in group["params"]]
        twice = {i for i in ids if ids.count(i) > 1} if len(ids) != len(set(ids)) else set()
        if twice:
            shown = [(names or {}).get(i, "a tensor") for i in twice]
            raise InvalidInputError(
                f"{shown} are in two of the optimizers: each step would move them twice. Give "
                "each its own parameters"
            )
        self._names = (
            None if names is None else [self._named(group, names) for group in self._groups()]
        )

    def refresh(self) -> None:
        """Read the settings of the param groups again (a scheduler may have changed them)."""
        groups = self._groups()
        if len(groups) == len(self._read) and all(map(_identical, groups, self._read)):
            return
        self._read = [dict(group) for group in groups]
        if len(groups) == len(self._settings) and all(map(_same, groups, self._settings)):
            return
        self._settings = [{k: v for k, v in group.items() if k not in _NAMES} for group in groups]
        defaults = [opt.defaults for opt in self._optimizers for _ in opt.param_groups]
        self.members = tuple(map(_build, self._rules, self._settings, defaults))

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """Return the torch optimizers."""
        return self._optimizers

    def check_unchanged(self) -> None:
        """Raise if a torch optimizer steps other parameters than at first, or has hooks now."""
        groups = self._groups()
        if len(groups) != len(self._rules):
            raise InvalidInputError(
                f"the torch optimizer has {len(groups)} param group(s), it had {len(self._rules)} "
                "when it was taken over: one that comes later (add_param_group) is not followed. "
                "Add it before track, or before from_torch, with lr=0 until it is to move"
            )
        now = groups[0]["params"] if len(groups) == 1 else [p for g in groups for p in g["params"]]
        if len(now) != len(self._stepped) or not all(map(operator.is_, now, self._stepped)):
            raise InvalidInputError(
                "the parameters of a param group of the torch optimizer were replaced after it was "
                "taken over, which is not followed: make the optimizer anew, and then track or "
                "from_torch"
            )
        for opt in self._optimizers:
            refuse_hooks(opt)

    def init(self, params: Params) -> GroupsState:
        self.check_unchanged()
        names = self._resolved(params)
        members = []
        for rule, group, ns in zip(self.members, self._groups(), names, strict=True):
            state = rule.init({n: params[n] for n in ns})
            members.append(
                self._warm(rule, state, dict(zip(ns, group["params"], strict=True)), params)
            )
        return GroupsState(tuple(members))

    def update(
        self,
        grads: Grads,
        state: GroupsState,
        params: Params,
        hyper: Mapping[str, Any] | None = None,
        value_and_grad: ValueAndGrad | None = None,
    ) -> tuple[dict[str, Tensor], GroupsState]:
        names = self._resolved(params)
        if not self.needs_closure and len(self.members) == 1 and list(params) == names[0]:
            # Nothing is to be dealt out, and a rule of torch.optim checks the names itself.
            check_state(self.members, state, GroupsState)
            (values,) = split_hyper(hyper, self.members, names)
            updated, alone = self.members[0].update(grads, state.members[0], params, values)
            return updated, GroupsState((alone,))
        if not self.needs_closure:
            return PerGroup.update(self.members, names, grads, state, params, hyper)
        (rule,), (own,), (values,) = self.members, names, split_hyper(hyper, self.members, names)
        closure: Any = {}
        if value_and_grad is not None:
            closure["value_and_grad"] = lambda part: value_and_grad({**params, **part})
        part, of_part = {n: params[n] for n in own}, {n: grads.get(n) for n in own}
        updated, new_state = rule.update(of_part, state.members[0], part, values, **closure)
        return {**params, **updated}, GroupsState((new_state,))

    def mark_stepped(self) -> None:
        """Let schedulers know that the optimizers took a step."""
        for optimizer in self._optimizers:
            torch_private.mark_stepped(optimizer)

    def write_back(self, state: GroupsState) -> None:
        """Write ``state`` into the torch optimizers, as if they had taken the steps."""
        if self._names is None:
            raise InvalidInputError(
                "write_back before init: the parameters' names are not known yet"
            )
        owners = [opt for opt in self._optimizers for _ in opt.param_groups]
        for owner, rule, member, group, ns in zip(
            owners, self.members, state.members, self._groups(), self._names, strict=True
        ):
            for name, parameter in _holding(
                rule, dict(zip(ns, group["params"], strict=True))
            ).items():
                exported = (
                    _export_shared(rule, member)
                    if rule.torch_layout.shared
                    else _export(rule, member, name, group)
                )
                if exported:
                    owner.state[parameter] = {**owner.state.get(parameter, {}), **exported}

    @property
    def names(self) -> list[str]:
        """Return the names of all parameters that these optimizers step, in order."""
        return [name for ns in self._names or () for name in ns]

    def _groups(self) -> list[dict[str, Any]]:
        return [group for opt in self._optimizers for group in opt.param_groups]

    def _named(self, group: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
        unknown = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if unknown:
            raise InvalidInputError(
                f"the optimizer steps {len(unknown)} tensor(s), of shapes {unknown[:4]}, that are "
                "not parameters of the model: pass "
                'every module whose parameters it steps, as a dict: track({"actor": actor, '
                '"critic": critic}, optimizer); '
                "a parameter that is in no module can be put into an nn.ParameterDict"
            )
        return [names[id(p)] for p in group["params"]]

    def _resolved(self, params: Params) -> list[list[str]]:
        """Return the names of each group's parameters."""
        if self._names is None:
            groups = self._groups()
            identities = {id(p): name for name, p in params.items()}
            if all(id(p) in identities for group in groups for p in group["params"]):
                self._names = [[identities[id(p)] for p in group["params"]] for group in groups]
            elif len(groups) == 1 and [p.shape for p in groups[0]["params"]] == [
                p.shape for p in params.values()
            ]:
                self._names = [list(params)]
            else:
                raise InvalidInputError(
                    "from_torch(optimizer): which name belongs to which of the optimizer's "
                    "tensors cannot be told. Pass the "
                    "module, from_torch(optimizer, model), or build the optimizer from "
                    "model.named_parameters()"
                )
        missing = [n for ns in self._names for n in ns if n not in params]
        if missing:
            raise InvalidInputError(
                f"the optimizer steps {missing}, but params has only {list(params)}"
            )
        return self._names

    def _warm(self, rule: Rule, state: Any, tensors: Mapping[str, Tensor], params: Params) -> Any:
        """Put the torch optimizer's own state into ``state``."""
        tensors = _holding(rule, tensors)
        saved = {name: self._saved(p) for name, p in tensors.items()}
        if not any(saved.values()) or not tensors:
            return state
        part = {name: params[name] for name in tensors}
        keys = {field: rule.torch_layout.state[field] for field in rule.slots()}
        values: dict[str, Any] = {}
        for field, key in keys.items():
            if any(s.get(key) is not None for s in saved.values()):
                values[field] = rule.restored(
                    field, {n: s.get(key) for n, s in saved.items()}, part
                )
        counts = {n: _count(rule, s, keys) for n, s in saved.items()}
        same = len(set(counts.values())) == 1
        return state._replace(count=next(iter(counts.values())) if same else counts, **values)

    def _saved(self, parameter: Tensor) -> dict[str, Any]:
        for opt in self._optimizers:
            if parameter in opt.state:
                return opt.state[parameter]
        return {}

    def __repr__(self) -> str:
        return f"from_torch({', '.join(map(repr, self.members))})"


def from_torch(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    model: nn.Module | Mapping[str, Tensor] | None = None,
) -> FromTorch:
    """Take over rule, param groups, settings and current state of a ``torch.optim`` optimizer.

    A learning rate that is a tensor stays that tensor: gradients flow to it. Settings are read now;
    later changes (a scheduler's, say) are seen by `innerloop.track` only. The state is read by each
    ``init``.

    Args:
        optimizer: one of ``torch.optim`` whose rule `innerloop.optim` has (or a list of them, for
            disjoint parameters). A subclass counts as its parent unless it overrides ``step``.
        model: whose ``named_parameters`` gives the optimizer's tensors their names, or a mapping
            name -> tensor. Not needed if the optimizer was built from ``named_parameters()``, if
            ``init`` is called with the optimizer's own tensors, or if there is one group and the
            order is the same.

    Raises:
        InvalidInputError: an optimizer whose rule is not known, or whose tensors are not parameters
            of the model.

    Example:
        >>> import torch, innerloop
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> opt = innerloop.optim.from_torch(
        ...     torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        ... )
        >>> opt
        from_torch(sgd(lr=0.5, momentum=0.9))
    """
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    names: dict[int, str] | None = None
    if model is not None:
        named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
        names = {id(p): name for name, p in named}
    elif all("param_names" in group for opt in optimizers for group in opt.param_groups):
        names = {
            id(p): name
            for opt in optimizers
            for group in opt.param_groups
            for p, name in zip(group["params"], group["param_names"], strict=True)
        }
    return FromTorch(optimizers, names)


def refuse_wrapper(optimizer: torch.optim.Optimizer) -> None:
    """Raise if ``optimizer`` is a wrapper of a training framework around the real one."""
    if not torch_private.is_initialised(optimizer):
        inside = next(
            (k for k, v in vars(optimizer).items() if isinstance(v, torch.optim.Optimizer)), None
        )
        instead = "the optimizer inside" if inside is None else f"the one inside, .{inside}"
        raise InvalidInputError(
            f"{type(optimizer).__name__} is a wrapper around an optimizer (it never called "
            f"Optimizer.__init__): pass {instead}"
        )


class StateMark:
    """The states of torch optimizers as a loop has copied them, to tell if they are replaced.

    Only what costs nothing at a step is looked at: a new table of states (``load_state_dict``), and
    one with fewer entries. A table that was empty and is cleared stays as it was.

    Args:
        optimizers: the torch optimizers.
        instead: what to write.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], instead: str) -> None:
        self._seen = [(opt, opt.state, len(opt.state)) for opt in optimizers]
        self._instead = instead

    def check(self) -> None:
        """Raise if a state was replaced or cleared."""
        for opt, state, entries in self._seen:
            if opt.state is not state or len(state) < entries:
                raise InvalidInputError(
                    "the state of the torch optimizer was replaced or cleared (load_state_dict, "
                    "state.clear()) while the loop runs, which has a copy of it: the loop would go "
                    f"on as if nothing had happened. {self._instead}"
                )


def refuse_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Raise if hooks run at the optimizer's steps, which a differentiable step does not run."""
    if torch_private.step_hooks(optimizer):
        raise InvalidInputError(
            "the optimizer has step hooks (register_step_pre_hook or _post_hook, or those of all "
            "optimizers, register_optimizer_step_pre_hook), which a differentiable step does not "
            "run: remove them, and change gradients with loop.step(loss, grad_callback=...) or "
            "optim.chain(optim.grad_callback(...), rule)"
        )


def rule_of(cls: type[torch.optim.Optimizer]) -> type[Rule] | None:
    """Find the rule whose steps a class takes.

    It is the class's own, or its parent's as long as the class does not override ``step``.
    """
    for ancestor in cls.__mro__:
        if ancestor in Rule.by_torch_class:
            return Rule.by_torch_class[ancestor]
        if overrides_step(ancestor):
            break
    return None


def overrides_step(cls: type[torch.optim.Optimizer]) -> bool:
    """True if a class has a ``step`` of its own.

    PyTorch gives it to the first class of a family that is instantiated: an inherited step with a
    profiler around it.
    """
    if "step" not in vars(cls):
        return False
    inherited = next(
        (vars(parent)["step"] for parent in cls.__mro__[1:] if "step" in vars(parent)), None
    )
    return _without_profiler(vars(cls)["step"]) is not _without_profiler(inherited)


def _without_profiler(step: Any) -> Any:
    return step.__wrapped__ if getattr(step, "__code__", None) is _PROFILER else step


_PROFILER = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__


def _rule_class(optimizer: torch.optim.Optimizer) -> type[Rule]:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidInputError(f"{optimizer!r} is not a torch.optim.Optimizer")
    found = rule_of(type(optimizer))
    if found is not None:
        return found
    known = ", ".join(cls.__name__ for cls in Rule.by_torch_class)
    raise InvalidInputError(
        f"{type(optimizer).__module__}.{type(optimizer).__name__} has an update rule of its own "
        "that innerloop does not know. "
        f"Known: {known}, and their subclasses that do not override step(). Write "
        f"innerloop.optim.adapt({type(optimizer).__name__}, lr=...), which differentiates the "
        "class's own step (from a cold state)"
    )


_known_defaults: MutableMapping[type, dict[str, Any]] = caches.cache("settings of torch.optim")


def _defaults(cls: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """Return the default of each setting in the constructor of a class of ``torch.optim``."""
    if cls not in _known_defaults:
        arguments = inspect.signature(cls).parameters.values()
        _known_defaults[cls] = {a.name: a.default for a in arguments if a.default is not a.empty}
    return _known_defaults[cls]


_built: MutableMapping[object, Rule] = caches.cache("rules by settings of torch.optim")
_PLAIN = frozenset((bool, float, int, str, type(None)))


def _build(rule: type[Rule], group: Mapping[str, Any], defaults: Mapping[str, Any]) -> Rule:
    """Make the rule of a param group; a loop that begins with the settings of another shares it."""
    shared = {k: defaults[k] for k in rule.torch_layout.from_constructor if k in defaults}
    settings = dict(group) | shared
    if not all(
        type(v) in _PLAIN or (type(v) is tuple and _PLAIN.issuperset(map(type, v)))
        for v in settings.values()
    ):
        return _made(rule, group, settings)
    # With their types: 1, 1.0 and True are equal.
    values = tuple(settings.values())
    key = rule, tuple(settings), tuple(map(type, values)), values
    found = _built.get(key)
    if found is None:
        if len(_built) > 512:
            _built.clear()
        found = _built[key] = _made(rule, group, settings)
    return found


def _made(rule: type[Rule], group: Mapping[str, Any], settings: Mapping[str, Any]) -> Rule:
    names = {field.name for field in dataclasses.fields(rule)}  # type: ignore[arg-type]
    for key, default in _defaults(rule.torch_layout.torch_class).items():
        if key in group and key not in names and group[key] != default:
            raise InvalidInputError(
                f"{rule.torch_layout.torch_class.__name__}({key}={group[key]!r}): this version of "
                f"innerloop does not know the setting, which came with a newer PyTorch: leave it "
                f"at {key}={default!r}"
            )
    return rule(**{k: v for k, v in settings.items() if k in names})


def _identical(group: Mapping[str, Any], read: Mapping[str, Any]) -> bool:
    """True if a group holds the very objects that were read."""
    return group.keys() == read.keys() and all(map(operator.is_, group.values(), read.values()))


def _same(group: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """True if the settings are as known.

    Tensors are compared by identity, because a comparison of values would wait for the device.
    """
    for key, value in group.items():
        if key not in _NAMES and value is not known.get(key, _NAMES):
            old = known.get(key)
            if _has_tensor(value) or _has_tensor(old) or value != old:
                return False
    return True


def _has_tensor(value: object) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)
    )


def _holding(rule: Rule, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters with which torch keeps the state of this rule."""
    return dict(list(tensors.items())[: 1 if rule.torch_layout.shared else None])


def _count(rule: Rule, saved: Mapping[str, Any], keys: Mapping[str, str]) -> int:
    """Return the number of steps taken.

    A rule whose torch form keeps none has taken one as soon as it has any state.
    """
    if rule.torch_layout.count is not None:
        return int(saved.get(rule.torch_layout.count, 0))
    return int(any(saved.get(key) is not None for key in keys.values()))


def _export(rule: Rule, state: Any, name: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what torch keeps in ``state[p]`` for one parameter."""
    count = state.count[name] if isinstance(state.count, Mapping) else state.count
    if not count:
        return {}
    layout = rule.torch_layout
    exported: dict[str, Any] = {}
    on_device = group.get("capturable") or group.get("fused")
    device = group["params"][0].device if on_device else "cpu"
    for field in rule.slots():
        held = getattr(state, field)
        value = None if held is None else held.get(name)
        if isinstance(value, Tensor):
            exported[layout.state[field]] = value.detach().clone()
        elif value is not None:
            exported[layout.state[field]] = _scalar(value, device)
    if layout.count is not None:
        exported[layout.count] = int(count) if layout.count_type is int else _scalar(count, device)
    return exported


def _export_shared(rule: Rule, state: Any) -> dict[str, Any]:
    """Return what torch keeps in ``state[p]`` of the first parameter."""
    layout = rule.torch_layout
    exported = {} if layout.count is None else {layout.count: state.count}
    for field in rule.slots():
        held = tree.map_tensors(lambda x: x.detach().clone(), getattr(state, field))
        if held is not None:
            exported[layout.state[field]] = list(held) if isinstance(held, tuple) else held
    return exported


def _scalar(value: float, device: torch.device | str) -> Tensor:
    """Convert a number to the form in which torch keeps those of its state."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(float(value), dtype=dtype, device=device)
