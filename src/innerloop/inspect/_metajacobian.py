"""Many outcomes of one training, differentiated in one replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop._batches import batches_of
from innerloop._carry import Carry
from innerloop._problem import Problem, check_problem
from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree, Params
from innerloop._unroll import unroll
from innerloop._utils import tree
from innerloop._utils.arguments import check_outer, names_in
from innerloop._utils.random_state import RandomState
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.inspect._window import Collect, part_of, vjp
from innerloop.strategy._checkpointed import Checkpointed, Sweep
from innerloop.strategy._engine.step_pullback import Cotangents, state_of


def metajacobian(
    outer: Callable[[Trajectory, Any], Tensor],
    problem: Problem,
    params: Params | Carry | None,
    batches: object,
    *,
    hyper: HyperTree = None,
    wrt: str | Sequence[str] = ("params", "hyper"),
    strategy: Checkpointed | None = None,
    steps: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Any]:
    r"""Compute the outer outcomes of a loop, and their derivatives, all in one replay.

    Where `metagradient` differentiates one number, this differentiates Q of them: each step is
    recorded once, and Q cotangents are pulled through it,

    .. math:: J_{q} = \frac{dL_q}{d(\theta_0, \lambda)}.

    Args:
        outer: ``outer(traj, hyper) -> [Q]``, computed from ``traj.params``, the parameters after
            the last step, and from ``hyper``.
        problem, params, batches, hyper, wrt, steps: as in `metagradient`.
        strategy: which states are kept; default `Checkpointed`.
        chunk: how many outcomes are pulled back at once; None: all. Memory grows with it.

    Returns:
        ``(values, jacobian)``: the outcomes ``[Q]``, and for each tensor of ``wrt`` a tensor
        ``[Q, *shape]``, in the form in which `metagradient` returns gradients. All are detached.

    Raises:
        InvalidInputError: ``outer`` returns no ``[Q]`` that depends on what training made.
        NotDifferentiableError: ``outer`` asks for losses, or for states before the end.

    Cost:
        One training, one replay, and Q pulls through each recorded step, batched by vmap; memory
        for Q adjoints of the state.

    Example:
        Both weights after two steps on w²/2: dw₂/dw₀ = (1-η)², dw₂/dη = -2 (1-η) w₀.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"].square().sum() / 2,
        ...     innerloop.optim.sgd(),
        ...     optimizer_hyper=("lr",),
        ... )
        >>> values, jacobian = innerloop.inspect.metajacobian(
        ...     lambda traj, hyper: traj.params["w"],
        ...     problem,
        ...     {"w": torch.tensor([2.0, 4.0])},
        ...     None,
        ...     steps=2,
        ...     hyper={"lr": torch.tensor(0.5)},
        ... )
        >>> values, jacobian["hyper"]["lr"]
        (tensor([0.5000, 1.0000]), tensor([-2., -4.]))
        >>> jacobian["params"]["w"]
        tensor([[0.2500, 0.0000],
                [0.0000, 0.2500]])
    """
    check_problem(problem)
    check_outer(outer)
    names = names_in(wrt)
    check_chunk(chunk)
    strategy = Checkpointed(product="reverse") if strategy is None else strategy
    start = problem.init(params).detach()
    if start.random_state is None:
        start = start._replace(random_state=RandomState.now())
    constant = tree.map_tensors(Tensor.detach, hyper)
    sweep = sweep_of(problem, start, batches, constant, strategy, steps)
    end = {
        n: p.detach().requires_grad_(tree.differentiable(p)) for n, p in sweep.end.params.items()
    }
    given = tree.map_tensors(
        lambda x: x.detach().clone().requires_grad_(tree.differentiable(x)), hyper
    )
    with torch.enable_grad():
        values = _outcomes(outer(_end_of(sweep, end), given))
    leaves = tree.leaves(given)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    wanted = [i in places and "hyper" in names for i in range(len(leaves))]
    of_params: dict[str, list[Tensor]] = {n: [] for n, p in end.items() if p.requires_grad}
    of_hyper: dict[int, list[Tensor]] = {i: [] for i in places}
    for chosen in chunks(len(values), chunk):
        collect = Collect(cotangents_of(values, end, chosen, sweep))
        if sweep.steps:
            sweep.pull(collect, wanted)
        for name, row in zip(end, collect.state, strict=False):
            if name in of_params:
                shape = (len(chosen), *end[name].shape)
                of_params[name].append(end[name].new_zeros(shape) if row is None else row)
        if "hyper" in names:
            # What outer reads from hyper itself has not passed any step.
            direct = [vjp([values[q]], None, {str(i): leaves[i] for i in places}) for q in chosen]
            for k, i in enumerate(places):
                found = collect.of_hyper.get(i)
                total = leaves[i].new_zeros((len(chosen), *leaves[i].shape))
                total = total if found is None else total + found
                for q, grads in enumerate(direct):
                    if (g := grads[k]) is not None:
                        total[q] += g
                of_hyper[i].append(total)
    jacobian: dict[str, Any] = {}
    if "params" in names:
        jacobian["params"] = {n: torch.cat(rows).detach() for n, rows in of_params.items()}
    if "hyper" in names:
        put = dict(zip(places, (torch.cat(of_hyper[i]).detach() for i in places), strict=True))
        jacobian["hyper"] = tree.with_leaves(given, [put.get(i, x) for i, x in enumerate(leaves)])
    return values.detach(), jacobian[names[0]] if isinstance(wrt, str) else jacobian


def check_chunk(chunk: int | None) -> None:
    """Raise unless ``chunk`` is a number of queries, or None."""
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise InvalidInputError(f"chunk={chunk!r}: write a number of queries, 1 or more")


def chunks(count: int, chunk: int | None) -> Iterator[range]:
    """Yield the numbers of the outcomes that are pulled back together."""
    size = chunk or max(1, count)
    for begin in range(0, count, size):
        yield range(begin, min(begin + size, count))


def sweep_of(
    problem: Problem,
    start: Carry,
    batches: object,
    hyper: HyperTree,
    strategy: Checkpointed,
    steps: int | None,
) -> Sweep:
    """Return a loop on constants, run once, through which cotangents can be pulled."""
    data = batches_of(batches, steps)
    # An empty trajectory says how it is run.
    with torch.no_grad():
        empty = unroll(problem, start, data.part(0, 0), hyper=hyper, strategy=strategy)
    record = empty.record._replace(loop=empty.record.loop._replace(batches=data))
    assert data.steps is not None
    return Sweep(part_of(record, start, 0, data.steps), record.context, strategy)


def cotangents_of(
    values: Tensor, end: dict[str, Tensor], chosen: range, sweep: Sweep
) -> Cotangents:
    """Return the derivatives of some outcomes by the last state, each ``[chosen, *shape]``."""
    named = {n: p for n, p in end.items() if p.requires_grad}
    grads = [vjp([values[q]], None, named) for q in chosen]
    rows = {
        n: torch.stack([torch.zeros_like(p) if (g := row[i]) is None else g for row in grads])
        for i, (n, p) in enumerate(named.items())
    }
    rest = len(tree.leaves(state_of(sweep.end))) - len(end)
    return [*(rows.get(n) for n in end), *[None] * rest]


def _end_of(sweep: Sweep, end: dict[str, Tensor]) -> Trajectory:
    """Return the trajectory that outer is handed: the end, and nothing else."""

    def losses() -> Tensor:
        raise NotDifferentiableError(
            "outer reads traj.losses, but metajacobian differentiates by the parameters after the "
            "last step only: compute the outcomes from traj.params, or call metagradient for each"
        )

    carry = sweep.end._replace(params=end)
    missing = (
        "metajacobian differentiates by the parameters after the last step only: compute the "
        "outcomes from traj.params, or call metagradient for each"
    )
    return Trajectory({sweep.steps: carry}, losses, None, sweep.steps, missing)


def _outcomes(found: object) -> Tensor:
    if not isinstance(found, Tensor) or found.ndim != 1 or not found.requires_grad:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InvalidInputError(
            f"outer(traj, hyper) returned {shape}: return a tensor [Q], one number for each "
            "outcome, that is computed from traj.params"
        )
    return found
