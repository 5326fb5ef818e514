"""The peer `TorchOpt`: its meta-optimizers, which replace the parameters inside the user's module.

Its fused operator for Adam (`use_accelerated_op=True`) is left out: slower on M2 (1.2x), and off by
a quarter in float32.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.contenders.base import MetaGradient, named_grads
from benchmarks.workloads import Workload, loss


def prepare(workload: Workload) -> MetaGradient:
    import torchopt

    model = workload.model()
    tasks = workload.batches()
    rule = {"sgd": torchopt.MetaSGD, "adam": torchopt.MetaAdam}[workload.optimizer]
    inner = rule(model, lr=workload.lr)
    initial = torchopt.extract_state_dict(model, by="reference")
    fresh = torchopt.extract_state_dict(inner, by="reference")

    def run() -> dict[str, Tensor]:
        for task in tasks:
            for x, y in task.inner:
                inner.step(loss(model(x), y))
            (loss(model(task.outer.x), task.outer.y) / len(tasks)).backward()
            torchopt.recover_state_dict(model, initial)
            torchopt.recover_state_dict(inner, fresh)
        return named_grads(model)

    return run
