"""A third party's optimizer class as a pure, differentiable update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from innerloop._types import Grads, Params, ValueAndGrad
from innerloop._utils import caches, torch_private, tree
from innerloop._utils.execution import Mode, mode
from innerloop._utils.random_state import RandomState
from innerloop.errors import InnerLoopError, InvalidInputError, NotDifferentiableError
from innerloop.optim._adapt.frozen import FrozenState, freeze, thaw
from innerloop.optim._adapt.interpreter import ValueInterpreter
from innerloop.optim._adapt.number import TracedNumber, math_on_numbers
from innerloop.optim._adapt.pure_calls import TrackedTensor, copy_of, same
from innerloop.optim._adapt.verify import verify
from innerloop.optim._base import Optimizer
from innerloop.optim._engine.grads import which_have_gradient
from innerloop.optim._engine.precision import warn_of_half
from innerloop.optim._settings import check_state, has_overrides

Make = Callable[[dict[str, Tensor]], torch.optim.Optimizer]
_SHAPES = {0: ((), ()), 1: ((4,), (3,)), 2: ((5, 2), (2, 4))}
"""Shapes of the small problem, by number of axes; wide and tall: one side of G Gᵀ is singular."""
_verified: MutableMapping[Any, set[Any]] = caches.cache("verified optimizer classes")
"""What was verified for each class and settings."""
_IN_TRANSFORM = (
    '{!r} inside torch.func.grad, vjp or vmap (the products "mixed" and "finite" use them): torch '
    "cannot save copies there of what "
    "in-place code overwrites. Use backward() or torch.autograd.grad in eager code, or write the "
    "rule as an innerloop.optim.Rule"
)
_KERNELS = ("foreach", "fused")  # choose how, not what; the fused ones have no derivative


def verified() -> Iterator[tuple[type, str, bool, tuple[str, ...]]]:
    """Yield what was verified so far.

    Each entry is ``(class, class and settings as shown, needs a closure, names of tensor
    hyper-parameters)``.
    """
    for (cls, shown, needs_closure), keys in _verified.items():
        names = sorted(
            {name for key in keys if key[0] != "step" for name, places in key[1:] if any(places)}
        )
        if any(key[0] != "step" for key in keys):
            yield cls, shown, needs_closure, tuple(names)


class AdaptedState(NamedTuple):
    """Steps taken, the tensors that the optimizer keeps, and everything else that it keeps."""

    count: Any
    tensors: tuple[Tensor, ...]
    rest: FrozenState


class Adapted(Optimizer):
    """What `adapt` returns.

    Attributes:
        make: from named parameters to the torch optimizer.
        needs_closure: whether ``step`` is called with a closure.
        cls: the class, if ``make`` only calls it with the list of parameters.
    """

    compiles = False

    def __init__(
        self,
        shown: str,
        make: Make,
        needs_closure: bool,
        verifies: bool,
        cls: type[torch.optim.Optimizer] | None,
        key: object = None,
    ) -> None:
        self.make = make
        self.needs_closure = needs_closure
        self.cls = cls
        self._shown = shown
        self._verifies = verifies
        self._verified: set[Any] = set() if key is None else _verified.setdefault(key, set())

    def init(self, params: Params) -> AdaptedState:
        self.verify(params)
        return self.start(params)

    def start(self, params: Params) -> AdaptedState:
        """Return the state before the first step; unlike `init`, do not verify the class."""
        with _running(self, [*params.values()]) as (values, enter, leave):
            working = {name: enter(p) for name, p in params.items()}
            values.own(working.values())
            optimizer = self.make(dict(working))
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise InvalidInputError(
                    f"{self!r} made a {type(optimizer).__name__}, not a torch.optim.Optimizer"
                )
            tensors, rest = freeze(optimizer, working)
        # What is no `TrackedTensor` was not computed from the parameters: it is a setting of the
        # user's, whose graph is its own.
        return AdaptedState(
            0, tuple(leave(t) if isinstance(t, TrackedTensor) else t for t in tensors), rest
        )

    def verify(self, params: Params, hyper: Mapping[str, Any] | None = None) -> None:
        """Compare values and gradient with the class itself, on a small problem.

        Its parameters have as many axes as these.

        Once for each class, settings, numbers of axes and names of tensor hyper-parameters.

        Raises:
            InvalidInputError: the class itself fails.
            NotDifferentiableError: they differ; with the numbers.
        """
        if not self._verifies or mode() is Mode.TRANSFORMED:
            return
        if self.cls is None:
            small = {
                name: tuple(min(n, 2 if i else 5) for i, n in enumerate(p.shape))
                for name, p in params.items()
            }
        else:  # its parameters' names do not matter
            axes = sorted({p.ndim for p in params.values()})
            small = {
                f"{n}d.{i}": shape
                for n in axes
                for i, shape in enumerate(_SHAPES.get(n, ((3,) + (2,) * (n - 1),)))
            }
        values = {k: _first(v) for k, v in (hyper or {}).items()}
        key = (
            tuple(small),
            *((name, _tensor_places(value)) for name, value in sorted(values.items())),
        )
        if key not in self._verified:
            verify(self, small, values)
            self._verified.add(key)

    def update(
        self,
        grads: Grads,
        state: AdaptedState,
        params: Params,
        hyper: Mapping[str, Any] | None = None,
        value_and_grad: ValueAndGrad | None = None,
    ) -> tuple[dict[str, Tensor], AdaptedState]:
        """Take one step; see `Optimizer.update`.

        A hyper-parameter is verified the first time that it is a tensor.
        """
        if self.needs_closure and value_and_grad is None:
            raise InvalidInputError(
                f"{self!r} evaluates the loss itself: pass value_and_grad=, params -> (loss, grads)"
            )
        if has_overrides(hyper) and _check_tensors(hyper or {}):
            self.verify(params, hyper)
        random_state = RandomState.now()
        new, new_state = self.run(grads, state, params, hyper, value_and_grad)
        for p in new.values():
            warn_of_half(p)
        if (
            state.count == 0
            and self._verifies
            and not self.needs_closure
            and mode() is not Mode.TRANSFORMED
        ):
            self._compare(new, grads, state, params, hyper or {}, random_state)
        return new, new_state

    def run(
        self,
        grads: Grads,
        state: AdaptedState,
        params: Params,
        hyper: Mapping[str, Any] | None = None,
        value_and_grad: ValueAndGrad | None = None,
        hold: list[Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], AdaptedState]:
        """Take one step without verifying it.

        ``hold`` takes the parameters that the class saw.
        """
        check_state(self, state, AdaptedState)
        which_have_gradient(grads, params)
        if set(state.rest.names) != set(params):
            raise InvalidInputError(
                f"{self!r}: the state is that of the parameters {list(state.rest.names)}, but "
                f"these are {list(params)}"
            )
        params = {
            name: params[name] for name in state.rest.names
        }  # the class knows them by their places
        overrides = dict(hyper or {})
        given = [
            *params.values(),
            *grads.values(),
            *state.tensors,
            *_tensors_in(overrides.values()),
        ]
        with _running(self, [t for t in given if isinstance(t, Tensor)]) as (values, enter, leave):
            working = {name: enter(p) for name, p in params.items()}
            values.own(working.values())
            if hold is not None:
                hold.extend(working.values())

            def arrive(grads: Grads) -> None:
                values.grads.update((id(p), None) for p in working.values())
                values.grads.update(
                    (id(working[n]), enter(g)) for n, g in grads.items() if g is not None
                )

            # Under torch.inference_mode, where no closure can be differentiated, tensors have no
            # version.
            written = (
                [torch_private.version(p) for p in working.values()] if self.needs_closure else []
            )

            def closure() -> object:
                assert value_and_grad is not None
                # At the start of the step the evaluation is known already: it is not made, nor
                # random numbers drawn, a second time.
                unchanged = written == [torch_private.version(p) for p in working.values()]
                with values.paused(), torch_private.no_saved_tensors_hooks():
                    at = params if unchanged else {name: p.clone() for name, p in working.items()}
                    loss, found = value_and_grad(at)
                arrive(found)
                return loss.clone()

            arrive(grads)
            with values.paused():
                pairs = zip(state.tensors, state.rest.tracked, strict=True)
                kept = [enter(t) if tracked else _constant(t) for t, tracked in pairs]
            optimizer = thaw(state.rest, kept, list(working.values()))
            with self._hyper(optimizer, overrides, enter):
                self._step(optimizer, closure if self.needs_closure else None)
            tensors, rest = freeze(optimizer, working)
        new = {name: leave(p) for name, p in working.items()}
        return new, AdaptedState(state.count + 1, tuple(map(leave, tensors)), rest)

    def _compare(
        self,
        ours: Params,
        grads: Grads,
        state: AdaptedState,
        params: Params,
        hyper: Mapping[str, Any],
        random_state: RandomState | None,
    ) -> None:
        """Compare the first step with that of the class itself, once for each set of shapes.

        The small problem may have taken other branches.
        """
        key = ("step", *(tuple(p.shape) for p in params.values()))
        if key in self._verified:
            return
        leaves = {name: nn.Parameter(params[name].detach().clone()) for name in state.rest.names}
        optimizer = thaw(
            state.rest, [t.detach().clone() for t in state.tensors], list(leaves.values()), float
        )
        for name, g in grads.items():
            leaves[name].grad = None if g is None else g.detach().clone()
        after = RandomState.now()
        try:
            if random_state is not None:
                random_state.restore()
            with self._hyper(
                optimizer, tree.map_tensors(lambda t: t.detach().item(), dict(hyper)), _plain
            ):
                type(optimizer).step(optimizer)
        finally:
            if after is not None:
                after.restore()
        for name, p in leaves.items():
            same_value = torch.isclose(
                ours[name].detach(), p.detach(), rtol=0, atol=0, equal_nan=True
            )
            error = (
                (ours[name].detach() - p.detach()).abs().masked_fill(same_value, 0).max()
                if p.numel()
                else 0.0
            )
            if not error <= 1e3 * torch.finfo(p.dtype).eps * max(
                1.0, float(p.detach().abs().max()) if p.numel() else 1.0
            ):
                raise NotDifferentiableError(
                    f"{self!r}: its first step moves {name!r} otherwise than the class itself "
                    f"does, by {float(error):.1e}: it does "
                    "something to tensors that adapt does not follow. Write its rule as an "
                    "innerloop.optim.Rule"
                )
        self._verified.add(key)

    def _step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> None:
        try:
            with math_on_numbers(type(optimizer)):
                arguments = () if closure is None else (closure,)
                type(optimizer).step(
                    optimizer, *arguments
                )  # a scheduler puts another step on the object
        except InnerLoopError as error:
            raise type(error)(f"{self!r}: {error}") from error.__cause__
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            raise NotDifferentiableError(
                f"{self!r}: step() runs on plain tensors, but not on tracked ones: "
                f"{type(error).__name__}: {error}"
                if self.needs_closure or "closure" not in str(error)
                else f"{self!r}: {error}. If it needs a closure: adapt(..., closure=True)"
            ) from error

    @contextmanager
    def _hyper(
        self,
        optimizer: torch.optim.Optimizer,
        overrides: Mapping[str, Any],
        enter: Callable[[Tensor], Tensor],
    ) -> Iterator[None]:
        """Put these hyper-parameters into the param groups for the length of the block.

        Afterwards, what ``step`` did not replace itself is put back.
        """
        for group in optimizer.param_groups:
            group.update((key, False) for key in _KERNELS if key in group)
        replaced = []
        for key, value in overrides.items():
            having = [group for group in optimizer.param_groups if key in group and key != "params"]
            if not having:
                names = [k for k in optimizer.param_groups[0] if k not in ("params", *_KERNELS)]
                raise InvalidInputError(
                    f"{self!r} has no hyper-parameter {key!r}: its param groups have {names}"
                )
            values = value if isinstance(value, list) else [value] * len(having)
            if len(values) != len(having):
                raise InvalidInputError(
                    f"hyper[{key!r}] is a list of {len(values)}, but {len(having)} param groups "
                    "have it: write one entry for each"
                )
            for group, entry in zip(having, values, strict=True):
                if entry is not None:
                    during = _numbers(entry, enter)
                    replaced.append((group, key, group[key], during))
                    group[key] = during
        yield
        for group, key, before, during in replaced:
            if group[key] is during:
                group[key] = before

    def __repr__(self) -> str:
        return f"adapt({self._shown})"


@contextmanager
def _running(owner: Adapted, given: Sequence[Tensor]) -> Iterator[Any]:
    """Yield ``(mode, enter, leave)`` for one run of foreign code.

    Tensors enter as copies that may be overwritten, and leave without what was only for us.

    Everything is tracked even where nobody differentiates: which numbers depend on the parameters
    must not depend on that, since a strategy runs the same step once plainly and once tracked, from
    the state that the plain run left.
    """
    values = ValueInterpreter()
    if mode() is Mode.TRANSFORMED:
        if torch_private.inside_reverse_transform():
            raise NotDifferentiableError(_IN_TRANSFORM.format(owner))
        with torch.autograd.graph.saved_tensors_hooks(copy_of, same), values:
            yield values, lambda t: t.clone().as_subclass(TrackedTensor), _plain
        return
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in given)

    def enter(t: Tensor) -> Tensor:
        with values.paused():
            if not (wanted and t.requires_grad) and t.is_floating_point():
                t = t.detach().requires_grad_()
            return t.clone().as_subclass(TrackedTensor)

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(copy_of, same), values:
        yield values, enter, _plain if wanted else lambda t: _plain(t).detach()


def _plain(t: Tensor) -> Tensor:
    return t.as_subclass(Tensor)


def _constant(t: Tensor) -> Tensor:
    """Copy what does not depend on the parameters.

    A strategy may have made it require a gradient all the same.
    """
    return t.clone() if mode() is Mode.TRANSFORMED else t.detach().clone()


def _tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors_in(value)


def _is_plain(settings: object) -> bool:
    """True if what is shown of the settings tells them apart.

    Functions, tensors and other objects may look alike and differ.
    """
    if isinstance(settings, dict):
        return all(map(_is_plain, settings.values()))
    if isinstance(settings, (tuple, list)):
        return all(map(_is_plain, settings))
    return settings is None or type(settings) in (bool, int, float, complex, str, torch.dtype)


def _check_tensors(hyper: Mapping[str, Any]) -> bool:
    """True if a hyper-parameter is a tensor; raise if one has several entries."""
    found = [(key, t) for key, value in hyper.items() for t in _tensors_in([value])]
    for key, t in found:
        if t.numel() != 1:
            raise InvalidInputError(
                f"hyper-parameter {key!r} is a tensor of shape {tuple(t.shape)}: an adapted "
                "optimizer takes 0-dim tensors, one for each "
                "param group in a list"
            )
    return bool(found)


def _first(value: Any) -> Any:
    """Return a hyper-parameter's value for the first group that has one."""
    return next((v for v in value if v is not None), None) if isinstance(value, list) else value


def _tensor_places(value: object) -> tuple[bool, ...]:
    return tuple(
        isinstance(v, Tensor) for v in (value if isinstance(value, (tuple, list)) else (value,))
    )


def _numbers(value: object, enter: Callable[[Tensor], Tensor]) -> object:
    """Return a hyper-parameter as ``step`` reads it."""
    if isinstance(value, (tuple, list)):
        return tuple(_numbers(v, enter) for v in value)
    if not isinstance(value, Tensor):
        return value
    return TracedNumber(enter(value.reshape(()).double()).as_subclass(Tensor))


def adapt(
    optimizer: type[torch.optim.Optimizer] | Make,
    *,
    closure: bool = False,
    verify: bool = True,
    **settings: Any,
) -> Adapted:
    """Make a third party's ``torch.optim.Optimizer`` differentiable.

    Its own ``step`` runs, on copies that autograd records.

    In-place updates, ``@torch.no_grad()``, ``.data``, ``detach()``, ``.item()`` and state of any
    form (in ``state[p]``, in the param groups, on the object, made during a step) lose no gradient,
    and functions of ``math`` take the numbers. What has no derivative is refused by name and line:
    a tracked tensor turned into a float or an integer. Square roots have derivative 0 at 0, as in
    the rules of `innerloop.optim`.

    Before its first use, a class is verified once with these settings on a small smooth problem in
    float64, with parameters of as many axes as yours: six steps equal to the class's own (1e-9),
    and the derivative of an outer loss equal to finite differences of the class (1e-5). A
    hyper-parameter is verified so when it first is a tensor. The first step on parameters of new
    shapes is compared with the class's own, too. Settings that are functions, tensors or other
    objects are verified at each ``adapt``: two of them may look alike. Steps that change something
    outside of the optimizer (a global, a counter inside a function) are refused. What a small
    problem cannot show (a branch taken at step 1000) is not verified.

    Args:
        optimizer: the class; or a function from named parameters to an optimizer, for constructors
            that need more than a list: ``adapt(lambda named: Muon([{"params": [named["w"]],
            "use_muon": True}, ...]))``.
        closure: whether ``step`` is given a closure that evaluates the loss (again); the gradient
            where the step starts is in ``.grad`` when it is called, as after ``loss.backward();
            optimizer.step(closure)``.
        verify: False skips every comparison; a wrong gradient is then silent.
        settings: keyword arguments of the class.

    Returns:
        An optimizer like any other. Hyper-parameters are the real-valued entries of the param
        groups, 0-dim tensors (or numbers), one for all groups or a list with one per group.
        ``torch.func.grad`` and ``torch.compile`` are refused: in-place code is differentiated in
        eager autograd, and by `innerloop.ForwardMode`.

    Raises:
        InvalidInputError: the class itself fails on a list of parameters.
        NotDifferentiableError: it cannot be differentiated, or comes out wrong; with the line or
            the numbers.

    Cost:
        About 3 times the class's own step: each tensor is copied once per step, and each value that
        autograd saves once more.

    Example:
        A class that autograd alone cannot see through, on a quadratic loss p²/2: each step
        multiplies p by 1 - lr.

        >>> import torch, innerloop
        >>> class Descent(torch.optim.Optimizer):
        ...     def __init__(self, params, lr=0.1):
        ...         super().__init__(params, {"lr": lr})
        ...
        ...     @torch.no_grad()
        ...     def step(self):
        ...         for group in self.param_groups:
        ...             for p in group["params"]:
        ...                 p.data.add_(p.grad, alpha=-group["lr"])
        >>> opt = innerloop.optim.adapt(Descent, lr=0.5)
        >>> problem = innerloop.Problem(lambda params, hyper, batch: params["p"] ** 2 / 2, opt)
        >>> p = torch.tensor(8.0, requires_grad=True)
        >>> traj = innerloop.unroll(problem, {"p": p}, None, steps=3)
        >>> torch.autograd.grad(traj.params["p"], p)
        (tensor(0.1250),)
    """
    if isinstance(optimizer, type):
        cls = optimizer
        shown = ", ".join([cls.__name__, *(f"{k}={v!r}" for k, v in settings.items())])
        key = (cls, shown, closure) if _is_plain(settings) else None
        adapted = Adapted(
            shown, lambda named: cls(list(named.values()), **settings), closure, verify, cls, key
        )
        if verify:
            adapted.verify({"matrix": torch.empty(1, 1), "vector": torch.empty(1)})
        return adapted
    if settings:
        raise InvalidInputError(
            f"adapt(function, {', '.join(settings)}): settings belong into the function's own call"
        )
    return Adapted(
        getattr(optimizer, "__name__", repr(optimizer)), optimizer, closure, verify, None
    )
