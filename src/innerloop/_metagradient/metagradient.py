"""``metagradient``: the value of an outer loss and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from innerloop._batches import batches_of
from innerloop._carry import Carry
from innerloop._inner_gradient import block
from innerloop._inner_gradient.graph import refuse_own_functions
from innerloop._inner_gradient.loss import check_loss
from innerloop._metagradient.compiled import compiled_value_and_grad
from innerloop._metagradient.unreached import Unreached
from innerloop._module.checks import check_not_inference
from innerloop._problem import Problem, check_problem
from innerloop._trajectory import Trajectory
from innerloop._types import Aux, Batch, HyperTree, Params, Result
from innerloop._unroll import check_strategy, unroll
from innerloop._utils import tree
from innerloop._utils.arguments import check_flag, check_has_values, check_outer, names_in
from innerloop._utils.execution import Mode, mode
from innerloop._utils.finite import is_finite
from innerloop._utils.progress import Report
from innerloop.errors import InvalidInputError, NonFiniteError
from innerloop.nn._mode import replacing
from innerloop.strategy._base import Strategy
from innerloop.strategy._outer_gradient import Inputs
from innerloop.strategy._store_all import StoreAll


def metagradient(
    outer: Callable[[Trajectory[Aux], Any], Result],
    problem: Problem[Batch, Aux],
    params: Params | Carry | None,
    batches: object,
    *,
    hyper: HyperTree = None,
    wrt: str | Sequence[str] = ("params", "hyper"),
    strategy: Strategy | None = None,
    steps: int | None = None,
    save_at: Sequence[int] = (),
    compile: bool = False,
    progress: bool | Report = False,
) -> tuple[Result, Any]:
    """Return the value and the gradient of an outer loss behind a loop.

    This is the form that composes with ``torch.func`` and that can be compiled.

    Args:
        outer: ``outer(traj, hyper) -> scalar`` or ``(scalar, aux)``.
        problem, params, batches, hyper, strategy, steps, save_at, progress: as in `unroll`.
            Leaves of ``hyper`` that are not floating-point tensors are constants.
        wrt: ``"params"``, ``"hyper"`` or a tuple of both.
        compile: compile the whole meta-gradient with ``torch.compile(fullgraph=True)``. The first
            call with new shapes compiles (seconds to minutes; grows with T) and compares the result
            with the uncompiled one.

    Returns:
        ``(value, grads)``. ``value`` is what ``outer`` returned. ``grads`` is the gradient for a
        single ``wrt``, else a dict ``{"params": ..., "hyper": ...}``; it is detached unless taken
        inside a ``torch.func`` transform.

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
    check_problem(problem)
    check_outer(outer)
    check_flag("compile", compile)
    names = names_in(wrt)
    strategy = StoreAll() if strategy is None else strategy
    check_strategy(strategy)
    missing = sorted(set(names) - strategy.differentiates)
    if missing and not set(missing) <= strategy.differentiates_in(_length(batches, steps)):
        raise InvalidInputError(
            f"{strategy!r} does not differentiate {missing}: choose "
            f"wrt={tuple(sorted(strategy.differentiates))}"
        )
    if compile:
        problem.check_compiles()
    if compile and not strategy.compiles:
        raise InvalidInputError(
            f"{strategy!r} cannot be compiled as a whole: leave compile=True away, or use "
            "StoreAll(). Checkpointed(compile=True) compiles the steps"
        )
    if params is None:
        params = problem.trainable_params()
    if not isinstance(params, (Mapping, Carry)):
        problem.init(params)  # raises, and says what params must be
    for name, p in (params.params if isinstance(params, Carry) else params).items():
        if isinstance(p, Tensor):
            check_not_inference(f"params[{name!r}]", p)
            check_has_values(f"params[{name!r}]", p)

    unreached = Unreached(problem, hyper if "hyper" in names else None)

    def objective(inputs: Inputs) -> tuple[Tensor, Result]:
        start = (
            params._replace(params=dict(inputs.params))
            if isinstance(params, Carry)
            else inputs.params
        )
        traj = unroll(
            problem,
            start,
            batches,
            hyper=inputs.hyper,
            strategy=strategy,
            steps=steps,
            save_at=save_at,
            progress=progress,
        )
        # Compiled as a whole, the outer loss is differentiated by torch.func, which asks for second
        # derivatives of what it meets.
        with replacing() if mode() is Mode.COMPILING else block.reading(None):
            result = outer(traj, inputs.hyper)
        loss = check_loss(
            result[0] if isinstance(result, tuple) else result,
            "what outer(traj, hyper) returns (alone, or first of a pair (scalar, aux))",
        )
        refuse_own_functions([loss])
        return loss, result

    inputs = Inputs(dict(params.params if isinstance(params, Carry) else params), hyper)
    if compile:
        data = tree.tensors(None if callable(batches) else batches)
        shapes = tuple((tuple(t.shape), t.dtype) for t in data)
        variant = (outer, steps, tuple(save_at), shapes)
        result, grads = compiled_value_and_grad(
            strategy, objective, inputs, names, unreached, variant
        )
    else:
        result, grads = strategy.value_and_grad(objective, inputs, names)
        if mode() is Mode.EAGER:
            _check_finite(result, grads)
    grads = unreached.filled(inputs, grads)
    return result, grads[names[0]] if isinstance(wrt, str) else grads


def _check_finite(result: Any, grads: Mapping[str, object]) -> None:
    """Raise unless the outer loss and the gradients are finite, where `unroll` saw nothing."""
    loss = result[0] if isinstance(result, tuple) else result
    if not is_finite(loss):
        raise NonFiniteError(
            f"the outer loss is {loss.item()}, though every inner loss and the last parameters are "
            "finite: look at what outer(traj, hyper) computes from them"
        )
    for path, x in tree.named_tensors(grads, "grads"):
        if not is_finite(x):
            raise NonFiniteError(
                f"{path} is not finite, though what the inner loop passes on is: look at the "
                "derivative of what outer(traj, hyper) computes"
            )


def _length(batches: object, steps: int | None) -> int | None:
    """Return the number of steps as far as it is known before the loop runs."""
    if steps is not None or hasattr(batches, "__next__") or callable(batches) or batches is None:
        return steps
    given = isinstance(batches, (list, tuple, dict, Tensor))
    return batches_of(batches, None).steps if given else None
