"""innerloop's forms for a loop that it owns: `unroll` with a strategy, and `metagradient` vmapped
over the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.contenders.base import MetaGradient, named_grads
from benchmarks.workloads import Batch, Forward, Workload, loss

if TYPE_CHECKING:
    import innerloop


def prepare(workload: Workload, strategy: str = "StoreAll", **options: Any) -> MetaGradient:
    """`strategy` is named, not passed, so that the list of contenders can be read without
    innerloop."""
    import innerloop

    problem, forward, model = problem_of(workload)
    tasks = workload.batches()
    how = getattr(innerloop, strategy)(**options)
    initial = dict(model.named_parameters())

    def run() -> dict[str, Tensor]:
        for task in tasks:
            trajectory = innerloop.unroll(problem, initial, task.inner, strategy=how)
            outer = loss(forward(trajectory.params, task.outer.x), task.outer.y)
            (outer / len(tasks)).backward()
        return named_grads(model)

    return run


def prepare_vmap(workload: Workload, strategy: str = "StoreAll", **options: Any) -> MetaGradient:
    """All tasks at once; the steps' batches are stacked, one more leading dimension for the
    tasks."""
    import innerloop

    problem, forward, model = problem_of(workload)
    tasks = workload.batches()
    how = getattr(innerloop, strategy)(**options)
    initial = {name: p.detach() for name, p in model.named_parameters()}
    inner = _stack([_stack(task.inner) for task in tasks])
    outer = _stack([task.outer for task in tasks])

    def one_task(params: dict[str, Tensor], batches: Batch, held_out: Batch) -> dict[str, Tensor]:
        def outer_loss(trajectory: innerloop.Trajectory, _: object) -> Tensor:
            return loss(forward(trajectory.params, held_out.x), held_out.y)

        _, grads = innerloop.metagradient(
            outer_loss, problem, params, batches, wrt="params", strategy=how
        )
        return grads

    def run() -> Mapping[str, Tensor]:
        grads = torch.func.vmap(one_task, (None, 0, 0))(initial, inner, outer)
        return {name: g.mean(0) for name, g in grads.items()}

    return run


def prepare_map_tasks(workload: Workload, compile: bool = False) -> MetaGradient:
    """All tasks in one chunk of `innerloop.map_tasks`."""
    import innerloop

    problem, forward, model = problem_of(workload)
    tasks = workload.batches()
    initial = {name: p.detach() for name, p in model.named_parameters()}
    data = _stack([_stack(task.inner) for task in tasks]), _stack([task.outer for task in tasks])

    def one_task(data: tuple[Batch, Batch], params: dict[str, Tensor]) -> dict[str, Tensor]:
        inner, outer = data

        def outer_loss(trajectory: innerloop.Trajectory, _: object) -> Tensor:
            return loss(forward(trajectory.params, outer.x), outer.y)

        grads: dict[str, Tensor] = innerloop.metagradient(
            outer_loss, problem, params, inner, wrt="params"
        )[1]
        return grads

    def run() -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = innerloop.map_tasks(
            one_task, data, initial, reduce="mean", compile=compile
        )
        return found

    return run


def problem_of(workload: Workload) -> tuple[innerloop.Problem, Forward, torch.nn.Module]:
    import innerloop

    model = workload.model()
    optimizer = innerloop.optim.from_torch(workload.torch_optimizer(model))
    forward: Forward = workload.forward or innerloop.functional(model)[0]

    def step_loss(params: Mapping[str, Tensor], _: object, batch: Batch) -> Tensor:
        return loss(forward(params, batch.x), batch.y)

    return innerloop.Problem(step_loss, optimizer), forward, model


def _stack(batches: list[Batch]) -> Batch:
    return Batch(torch.stack([b.x for b in batches]), torch.stack([b.y for b in batches]))
