"""``unroll``: run an inner loop, and differentiate through it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from innerloop._batches import batches_of
from innerloop._carry import Carry
from innerloop._problem import Problem, check_problem
from innerloop._trajectory import Trajectory
from innerloop._types import Aux, Batch, HyperTree, Params
from innerloop._utils import torch_private, tree
from innerloop._utils.arguments import check_has_values
from innerloop._utils.execution import Mode, mode
from innerloop._utils.finite import is_finite
from innerloop._utils.progress import Report, closing, reporter, silent
from innerloop._utils.random_state import RandomState, at_random_state, restored_on_error
from innerloop.errors import InvalidInputError
from innerloop.strategy._base import Loop, Strategy
from innerloop.strategy._engine import non_finite
from innerloop.strategy._engine.guards import connected, refusing_unused
from innerloop.strategy._engine.replay_context import Record, ReplayContext
from innerloop.strategy._store_all import StoreAll


def unroll(
    problem: Problem[Batch, Aux],
    params: Params | Carry | None,
    batches: object,
    *,
    hyper: HyperTree = None,
    strategy: Strategy | None = None,
    steps: int | None = None,
    save_at: Sequence[int] = (),
    progress: bool | Report = False,
) -> Trajectory[Aux]:
    r"""Run T steps of ``problem``; gradients flow from the trajectory to ``params`` and ``hyper``.

    Args:
        problem: what one step is.
        params: named tensors at time 0; None for the trainable parameters of the module given to
            `Problem.from_module`; or a carry of an earlier loop (``traj.at(-1)``), which continues
            it: its time goes on in ``optimizer_hyper(hyper, t)`` and ``batches(params, hyper, t)``,
            while lists and stacked tensors, ``save_at``, ``Trajectory.at`` and ``losses`` count
            from this call.
        batches: the data, constant for the derivative: a list (one entry per step); a pytree of
            tensors (a tensor, tuple, dict, NamedTuple) stacked over steps, whose first dimension is
            T, not the size of a data set; a pure function
            ``batches(params, hyper, t)`` together with ``steps``; or an iterator (a generator, a
            ``DataLoader``), whose length need not be known.
        hyper: any pytree of tensors, handed to the loss and to ``optimizer_hyper``. The optimizer
            reads from it only what ``optimizer_hyper`` of the problem says; where that seems to be
            forgotten (nothing in the loop reads an entry that has the name of a hyper-parameter),
            asking for the gradient of the entry raises.
        strategy: how the loop is differentiated; default `StoreAll`.
        steps: T; needed where ``batches`` does not say it.
        save_at: times whose states `Trajectory.at` must know, whatever the strategy. Other than
            under `StoreAll`, the states of one trajectory do not depend on each other: for d
            state(T) / d state(t), cut the loop at t and continue it from the carry.
        progress: True shows a bar for each of the forward and the backward phase (package
            ``tqdm``); or a function ``progress(phase, done, total)`` that is told after each step.
            An exception, Ctrl-C too, leaves everything as it was.

    Returns:
        The `Trajectory`; `Trajectory.params`, ``losses``, ``aux`` and ``at(t)`` are differentiable.

    Raises:
        InvalidInputError: a batch requires grad, the number of steps is unknown, a name or shape
            does not fit.
        NonFiniteError: a loss, a parameter after the last step or, in the backward pass, a gradient
            that leaves the loop is NaN or infinite. The error names the first step and the
            operation. In eager code only: not under ``torch.func``, not in compiled code.

    Note:
        A parameter that the loss of a step does not use has the gradient zero, as in
        ``torch.func``, so weight decay, or the momentum of earlier steps (also that of Adam and its
        kind), may still move it; `track` skips it, as ``backward()`` does.
        Sparse gradients are made dense, except for a rule that takes them (``sparse_adam``).

    Example:
        On the loss w²/2 every step multiplies w by 1 - lr, so d w₃/d w₀ = (1 - lr)³.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5)
        ... )
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> traj = innerloop.unroll(problem, {"w": w}, None, steps=3)
        >>> torch.autograd.grad(traj.params["w"], w)
        (tensor(0.1250),)
    """
    strategy = StoreAll() if strategy is None else strategy
    check_strategy(strategy)
    if mode() is not Mode.COMPILING and torch.is_inference_mode_enabled():
        raise InvalidInputError(
            "torch.inference_mode is on, in which no gradient can be taken, not even an inner "
            "one: write torch.no_grad instead"
        )
    check_problem(problem)
    data = batches_of(batches, steps)
    times = _times(save_at, data.steps)
    report = reporter(progress)
    with restored_on_error(), closing(report):
        start = problem.init(params)
        if problem.optimizer_hyper is not None and data.steps != 0 and mode() is Mode.EAGER:
            problem.check_overrides(hyper, start.time)
        if mode() is not Mode.COMPILING:
            problem = problem.for_one_run(start)
        for leaf in tree.tensors(hyper):
            check_has_values("hyper (or a tensor in it)", leaf)
        given = hyper
        hyper, tokens = _noticing_unread(problem, hyper)
        loop = Loop(problem, start, hyper, data, times, report)
        eager = mode() is Mode.EAGER
        record = _record(loop._replace(hyper=given), strategy) if eager else None
        if eager and torch.is_grad_enabled():
            loop = non_finite.watched(loop)
        if not isinstance(params, Carry) or params.random_state is None:
            traj = strategy.run(loop)
        else:
            with at_random_state(params.random_state):
                traj = strategy.run(loop)
        traj.record = record
        if eager and traj.steps:
            _check_finite(loop, traj)
    late = [t for t in times if t > traj.steps]
    if late:
        raise InvalidInputError(
            f"save_at has {late}, but the iterator ended after {traj.steps} steps"
        )
    return _with_tokens(traj, tokens) if tokens else traj


def _noticing_unread(problem: Problem, hyper: HyperTree) -> tuple[HyperTree, list[Tensor]]:
    """Return hyper, and tokens that raise when an entry is asked for that nothing in a loop reads.

    Only entries that have the name of a hyper-parameter, which the optimizer was not told to read.
    """
    names = () if mode() is Mode.COMPILING else problem.unread_names(hyper)
    if not names or not torch.is_grad_enabled():
        return hyper, []
    assert isinstance(hyper, Mapping)
    by_id = {id(x): name for name in names for x in tree.tensors(hyper[name])}
    tokens: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        if not (id(x) in by_id and tree.differentiable(x) and torch_private.has_derivative(x)):
            return x
        alias, token = refusing_unused(x, problem.unread(by_id[id(x)]))
        tokens.append(token)
        return alias

    return tree.map_tensors(watched, hyper), tokens


def _with_tokens(traj: Trajectory, tokens: Sequence[Tensor]) -> Trajectory:
    """Return ``traj`` whose last parameters, losses and aux reach ``tokens`` backwards."""
    states = {t: traj.at(t) for t in traj.times}
    if traj.steps:
        last = states[traj.steps]
        states[traj.steps] = last._replace(params=connected(last.params, tokens))
    found = Trajectory(states, *connected((traj.losses, traj.aux), tokens), traj.steps)
    found.hypers, found.record, found.function = traj.hypers, traj.record, traj.function
    return found


def _record(loop: Loop, strategy: Strategy) -> Record:
    """Return what is needed to run the loop again."""
    start = loop.start
    if start.random_state is None:
        start = start._replace(random_state=RandomState.now())
    exact = bool(strategy.exact) and strategy.differentiates == {"params", "hyper"}
    return Record(loop._replace(start=start, report=silent), ReplayContext(loop), exact)


def _check_finite(loop: Loop, traj: Trajectory) -> None:
    """Raise unless the losses and the last parameters, looked at once, are finite."""
    if not is_finite(traj.losses):
        first = int((~traj.losses.isfinite()).nonzero()[0])
        raise non_finite.explanation(loop, f"the inner loss of step {first}")
    for name, p in traj.params.items():
        if not is_finite(p):
            raise non_finite.explanation(loop, f"parameter {name!r} after the last step")


def check_strategy(strategy: object, what: str = "strategy is") -> None:
    """Raise unless ``strategy`` is an instance of `Strategy`."""
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        raise InvalidInputError(f"{what} the class {strategy.__name__}: write {_call_of(strategy)}")
    if not isinstance(strategy, Strategy):
        raise InvalidInputError(
            f"{what} {strategy!r}, not a strategy: write an instance, for example "
            "innerloop.StoreAll()"
        )


def _call_of(kind: type[Strategy]) -> str:
    """Return how an instance of ``kind`` is written: ``"innerloop.Truncated(last=...)"``."""
    arguments = inspect.signature(kind).parameters.values()
    needed = [f"{p.name}=..." for p in arguments if p.default is p.empty and p.kind < p.VAR_KEYWORD]
    package = "innerloop." if kind.__module__.startswith("innerloop.") else ""
    return f"{package}{kind.__name__}({', '.join(needed)})"


def _times(save_at: Sequence[int], steps: int | None) -> tuple[int, ...]:
    """Return the times, counted from the start."""
    if not isinstance(save_at, Iterable) or any(type(t) is not int for t in save_at):
        raise InvalidInputError(
            f"save_at={save_at!r}: write a list of times, for example save_at=[0, 10]"
        )
    if steps is None:
        if any(t < 0 for t in save_at):
            raise InvalidInputError(
                f"save_at={tuple(save_at)} counts from the end, which is not known: write steps=T"
            )
        return tuple(save_at)
    times = tuple(t + steps + 1 if t < 0 else t for t in save_at)
    for t in times:
        if not 0 <= t <= steps:
            raise InvalidInputError(f"save_at has {t}, but the loop has times 0 to {steps}")
    return times
