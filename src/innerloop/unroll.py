"""Run an inner loop, and differentiate through it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop import _private, tree
from innerloop.batches import batches_of
from innerloop.errors import InvalidInputError, MetaGradientError, NotDifferentiableError
from innerloop.problem import Carry, Problem, check_loss, explained
from innerloop.progress import Report, closing, reporter
from innerloop.random_state import at_random_state, restored_on_error
from innerloop.strategy.base import Loop, Strategy
from innerloop.strategy.compiled import beyond_rounding
from innerloop.strategy.store_all import StoreAll
from innerloop.trajectory import Trajectory


def unroll(
    problem: Problem,
    params: Mapping[str, Tensor] | Carry,
    batches: Any,
    *,
    hyper: Any = None,
    strategy: Strategy | None = None,
    steps: int | None = None,
    save_at: Sequence[int] = (),
    progress: bool | Report = False,
) -> Trajectory:
    r"""Run T steps of ``problem``; gradients flow from the trajectory to ``params`` and ``hyper``.

    Args:
        problem: what one step is.
        params: named tensors at time 0, or a carry of an earlier loop (``traj.at(-1)``), which continues it.
        batches: the data, constant for the derivative: a list (one entry per step); a pytree of tensors (a tensor, tuple, dict,
            NamedTuple) stacked over steps; a pure function ``batches(params, hyper, t)`` together with ``steps``; or an iterator (a
            generator, a ``DataLoader``), whose length need not be known.
        hyper: any pytree of tensors, handed to the loss and to ``optimizer_hyper``.
        strategy: how the loop is differentiated; default `StoreAll`.
        steps: T; needed where ``batches`` does not say it.
        save_at: times whose states `Trajectory.at` must know, whatever the strategy. Other than under `StoreAll`, the states of one
            trajectory do not depend on each other: for d state(T) / d state(t), cut the loop at t and continue it from the carry.
        progress: True shows a bar for each of the forward and the backward phase (package ``tqdm``); or a function
            ``progress(phase, done, total)`` that is told after each step. An exception, Ctrl-C too, leaves everything as it was.

    Returns:
        The `Trajectory`; `Trajectory.params`, ``losses``, ``aux`` and ``at(t)`` are differentiable.

    Raises:
        InvalidInputError: a batch requires grad, the number of steps is unknown, a name or shape does not fit.

    Example:
        On the loss w²/2 every step multiplies w by 1 - lr, so d w₃/d w₀ = (1 - lr)³.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5))
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> traj = innerloop.unroll(problem, {"w": w}, None, steps=3)
        >>> torch.autograd.grad(traj.params["w"], w)
        (tensor(0.1250),)
    """
    strategy = StoreAll() if strategy is None else strategy
    _check_strategy(strategy)
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise InvalidInputError(
            "torch.inference_mode is on, in which no gradient can be taken, not even an inner one: write torch.no_grad instead"
        )
    if not isinstance(problem, Problem):
        raise InvalidInputError(
            f"expected an innerloop.Problem, got {type(problem).__name__}: write innerloop.Problem(loss, optimizer)"
        )
    data = batches_of(batches, steps)
    times = _times(save_at, data.steps)
    report = reporter(progress)
    with restored_on_error(), closing(report):
        start = problem.init(params)
        loop = Loop(problem, start, hyper, data, times, report)
        if not isinstance(params, Carry) or params.random_state is None:
            traj = strategy.run(loop)
        else:
            with at_random_state(params.random_state):
                traj = strategy.run(loop)
    late = [t for t in times if t > traj.steps]
    if late:
        raise InvalidInputError(f"save_at has {late}, but the iterator ended after {traj.steps} steps")
    return traj


def metagradient(
    outer: Callable[[Trajectory, Any], Any],
    problem: Problem,
    params: Mapping[str, Tensor] | Carry,
    batches: Any,
    *,
    hyper: Any = None,
    wrt: str | Sequence[str] = ("params", "hyper"),
    strategy: Strategy | None = None,
    steps: int | None = None,
    save_at: Sequence[int] = (),
    compile: bool = False,
    progress: bool | Report = False,
) -> tuple[Any, Any]:
    """The value and the gradient of an outer loss behind a loop: the form that composes with ``torch.func`` and compiles.

    Args:
        outer: ``outer(traj, hyper) -> scalar`` or ``(scalar, aux)``.
        problem, params, batches, hyper, strategy, steps, save_at, progress: as in `unroll`. Leaves of ``hyper`` that are not floating-point
            tensors are constants.
        wrt: ``"params"``, ``"hyper"`` or a tuple of both.
        compile: compile the whole meta-gradient with ``torch.compile(fullgraph=True)``. The first call with new shapes compiles
            (seconds to minutes; grows with T) and compares the result with the uncompiled one.

    Returns:
        ``(value, grads)``. ``value`` is what ``outer`` returned. ``grads`` is the gradient for a single ``wrt``, else a dict
        ``{"params": ..., "hyper": ...}``; it is detached unless taken inside a ``torch.func`` transform.

    Example:
        Outer loss w₂²/2 behind two steps on w²/2: d/dw₀ = (1-η)⁴ w₀, d/dη = -2 (1-η)³ w₀².

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2,
        ...     innerloop.optim.sgd(),
        ...     optimizer_hyper=lambda hyper, t: hyper,
        ... )
        >>> value, grads = innerloop.metagradient(
        ...     lambda traj, hyper: traj.params["w"] ** 2 / 2,
        ...     problem,
        ...     {"w": torch.tensor(2.0)},
        ...     None,
        ...     steps=2,
        ...     hyper={"lr": torch.tensor(0.5)},
        ... )
        >>> grads
        {'params': {'w': tensor(0.1250)}, 'hyper': {'lr': tensor(-1.)}}
    """
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    if not names or not set(names) <= {"params", "hyper"}:
        raise InvalidInputError(f'wrt={wrt!r}: write "params", "hyper" or ("params", "hyper")')
    strategy = StoreAll() if strategy is None else strategy
    _check_strategy(strategy)
    missing = sorted(set(names) - strategy.differentiates)
    if missing:
        raise InvalidInputError(
            f"{strategy!r} does not differentiate {missing}: choose wrt={tuple(sorted(strategy.differentiates))}"
        )

    if compile:
        problem.check_compiles()
    if compile and not strategy.compiles:
        raise InvalidInputError(
            f"{strategy!r} cannot be compiled as a whole: leave compile=True away, or use StoreAll(). Checkpointed(compile=True) compiles "
            "the steps"
        )

    def value_of(inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        start = params._replace(params=inputs["params"]) if isinstance(params, Carry) else inputs["params"]
        traj = unroll(
            problem,
            start,
            batches,
            hyper=inputs["hyper"],
            strategy=strategy,
            steps=steps,
            save_at=save_at,
            progress=progress,
        )
        result = outer(traj, inputs["hyper"])
        loss = check_loss(
            result[0] if isinstance(result, tuple) else result,
            "what outer(traj, hyper) returns (alone, or first of a pair (scalar, aux))",
        )
        return loss, result

    if not isinstance(params, (Mapping, Carry)):
        problem.init(params)  # raises, and says what params must be
    data = () if callable(batches) else tuple((tuple(t.shape), t.dtype) for t in tree.tensors(batches))
    variant = (outer, strategy, steps, tuple(save_at), data)
    inputs = {"params": dict(params.params if isinstance(params, Carry) else params), "hyper": hyper}
    result, grads = (
        _compiled_gradient(problem, value_of, inputs, names, variant) if compile else _gradient(value_of, inputs, names)
    )
    return result, grads[names[0]] if isinstance(wrt, str) else grads


Inputs = dict[str, Any]
ValueOf = Callable[[Inputs], tuple[Tensor, Any]]


def _gradient(value_of: ValueOf, inputs: Inputs, names: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """``(result, {name: gradient})``."""
    chosen = {name: inputs[name] for name in names}
    leaves = tree.leaves(chosen)
    wanted = [i for i, leaf in enumerate(leaves) if tree.differentiable(leaf)]
    if not wanted:
        raise InvalidInputError(f"nothing to differentiate: {' and '.join(names)} hold no floating-point tensor")

    transformed = not torch.compiler.is_compiling() and _private.inside_transform()

    def of_leaves(values: list[Tensor]) -> tuple[Tensor, Any]:
        loss, result = value_of({**inputs, **tree.with_leaves(chosen, tree.put(leaves, wanted, values))})
        if transformed and not _private.is_tracked(loss):
            raise NotDifferentiableError(UNREACHED)
        return loss, result

    values = [leaves[i] for i in wanted]
    if torch.compiler.is_compiling() or transformed:
        found, result = tree.grad_with_aux(of_leaves)(values)
    else:
        # The same mathematics with one graph less: torch.func.grad would record the backward pass as well.
        result, found = _autograd(of_leaves, values)
    grads = tree.put([None] * len(leaves), wanted, found)
    for name, group in tree.with_leaves(chosen, grads).items():
        if any(isinstance(t, Tensor) for t in tree.leaves(chosen[name])) and all(g is None for g in tree.leaves(group)):
            raise NotDifferentiableError(f"no gradient arrives at {name}: {UNREACHED}")
    # One tensor among several that the outer loss does not depend on has the gradient zero, as torch.func.grad says too.
    for i in wanted:
        grads[i] = torch.zeros_like(leaves[i]) if grads[i] is None else grads[i]
    return result, tree.with_leaves(chosen, grads)


UNREACHED = (
    "the outer loss does not depend on it through anything differentiable: compute it from traj.params, traj.losses, traj.aux or "
    "traj.at(t), not under torch.no_grad or from detached values; hyper-parameters of the optimizer reach it by "
    "Problem(loss, optimizer, optimizer_hyper=lambda hyper, t: {...})"
)


def _autograd(
    of_leaves: Callable[[list[Tensor]], tuple[Tensor, Any]], values: list[Tensor]
) -> tuple[Any, Sequence[Tensor | None]]:
    with torch.enable_grad():
        values = [value.detach().requires_grad_() for value in values]
        loss, result = of_leaves(values)
        if not loss.requires_grad:
            raise NotDifferentiableError(UNREACHED)
        try:
            grads = torch.autograd.grad(loss, values, allow_unused=True)
        except RuntimeError as error:
            raise explained(error) from error
    return tree.map_tensors(Tensor.detach, result), grads


_verified: weakref.WeakKeyDictionary[Problem, set[Any]] = weakref.WeakKeyDictionary()


def _compiled_gradient(
    problem: Problem, value_of: ValueOf, inputs: Inputs, names: Sequence[str], variant: Any
) -> tuple[Any, dict[str, Any]]:
    """`_gradient`, compiled as a whole: a transform over a compiled function would run eagerly, so compile goes outermost."""
    compiled = torch.compile(_gradient, fullgraph=True)
    result, grads = compiled(value_of, inputs, names)
    shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in tree.tensors(inputs))
    key = (shapes, tuple(names), variant)
    if key not in _verified.setdefault(problem, set()):
        _compare(result, grads, *_gradient(value_of, inputs, names))
        _verified[problem].add(key)
    return tree.map_tensors(Tensor.detach, (result, grads))


def _compare(result: Any, grads: Any, eager_result: Any, eager_grads: Any) -> None:
    """Refuse a compiled result that is not the eager one (torch 2.13 has silent cases)."""
    for (name, ours), (_, eager) in zip(
        tree.named_tensors([result, grads]), tree.named_tensors([eager_result, eager_grads]), strict=True
    ):
        difference = beyond_rounding(ours, eager, torch.finfo(eager.dtype).tiny) if eager.numel() else None
        if difference is not None:
            error, scale = difference
            raise MetaGradientError(
                f"the compiled meta-gradient differs from the eager one at {name}: by {error:.3e}, where values are up to "
                f"{scale:.3e}. This is a compiler error (or the loop draws random numbers): use compile=False"
            )


def _check_strategy(strategy: Any) -> None:
    if not isinstance(strategy, Strategy):
        raise InvalidInputError(
            f"strategy={strategy!r} is not a strategy: write an instance, for example innerloop.StoreAll()"
        )


def _times(save_at: Sequence[int], steps: int | None) -> tuple[int, ...]:
    """The times, counted from the start."""
    if not isinstance(save_at, Iterable) or any(type(t) is not int for t in save_at):
        raise InvalidInputError(f"save_at={save_at!r}: write a list of times, for example save_at=[0, 10]")
    if steps is None:
        if any(t < 0 for t in save_at):
            raise InvalidInputError(f"save_at={tuple(save_at)} counts from the end, which is not known: write steps=T")
        return tuple(save_at)
    times = tuple(t + steps + 1 if t < 0 else t for t in save_at)
    for t in times:
        if not 0 <= t <= steps:
            raise InvalidInputError(f"save_at has {t}, but the loop has times 0 to {steps}")
    return times
