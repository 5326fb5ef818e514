"""innerloop's form for a hand-written loop: `track` over the module and its torch optimizer."""

from __future__ import annotations

from torch import Tensor

from benchmarks.contenders.base import MetaGradient, named_grads
from benchmarks.workloads import Workload, loss


def prepare(workload: Workload) -> MetaGradient:
    import innerloop

    model = workload.model()
    tasks = workload.batches()
    optimizer = workload.torch_optimizer(model)

    def run() -> dict[str, Tensor]:
        for task in tasks:
            with innerloop.track(model, optimizer) as loop:
                for x, y in task.inner:
                    loop.step(loss(loop.model(x), y))
                (loss(loop.model(task.outer.x), task.outer.y) / len(tasks)).backward()
        return named_grads(model)

    return run
