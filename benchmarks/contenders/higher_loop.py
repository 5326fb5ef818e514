"""The peer `higher`: a patched module and its differentiable optimizer."""

from __future__ import annotations

import math

from torch import Tensor

from benchmarks.contenders.base import MetaGradient, named_grads
from benchmarks.workloads import Workload, loss


def prepare(workload: Workload) -> MetaGradient:
    import higher

    model = workload.model()
    tasks = workload.batches()
    optimizer = workload.torch_optimizer(model)

    def run() -> dict[str, Tensor]:
        for task in tasks:
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (
                fast,
                inner,
            ):
                for t, (x, y) in enumerate(task.inner):
                    inner.step(loss(fast(x), y), override=_override(workload, t + 1))
                (loss(fast(task.outer.x), task.outer.y) / len(tasks)).backward()
        return named_grads(model)

    return run


def _override(workload: Workload, count: int) -> dict[str, list[float]] | None:
    """Adam's eps as torch means it: higher 0.2.1 adds it before the bias correction, which is
    another algorithm.

    On M2 the meta-gradient would differ by a quarter. Setting it costs a dictionary entry a step.
    """
    if workload.optimizer != "adam":
        return None
    return {"eps": [1e-8 * math.sqrt(1 - 0.999**count)]}
