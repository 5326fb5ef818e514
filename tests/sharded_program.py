"""One of two processes that hold a part of each parameter: ``sharded_program.py RANK STORE``.

It prints one line for each check, ``name: largest difference from one process``, or the error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)

import innerloop

RULES: dict[str, Any] = {
    "sgd": innerloop.optim.sgd(lr=0.1),
    "momentum": innerloop.optim.sgd(lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": innerloop.optim.adam(lr=0.1, eps=0.1),
    "in_float32": innerloop.optim.in_float32(innerloop.optim.sgd(lr=0.1, momentum=0.9)),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.1, eps=0.1),
}
STRATEGIES = {
    "StoreAll": innerloop.StoreAll(),
    "Checkpointed": innerloop.Checkpointed(),
    "one slot": innerloop.Checkpointed(slots=1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except innerloop.InvalidInputError as error:
        return str(error)
    return "not refused"


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)
    mine = x.chunk(2)[rank], y.chunk(2)[rank]
    module = network()
    start = {n: p.detach() for n, p in module.named_parameters()}
    parts = {n: distribute_tensor(p, mesh, [Shard(0)]) for n, p in start.items()}

    def loss(params: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean over the batch, or this process's share of it."""
        gathered = {
            n: p.full_tensor(grad_placements=[Partial()]) if isinstance(p, DTensor) else p
            for n, p in params.items()
        }
        found = torch.func.functional_call(module, gathered, batch[0])
        error = (found - batch[1]).square().mean()
        return error / 2 if gathered["0.weight"] is not params["0.weight"] else error

    def data_parallel(rule: Any, strategy: Any, params: Any, batch: Any) -> Any:
        problem = innerloop.Problem(
            lambda params, hyper, batch: loss(params, batch),
            rule,
            optimizer_hyper=lambda hyper, t: {"lr": hyper["lr"]},
        )
        _, found = innerloop.metagradient(
            lambda traj, hyper: loss(traj.params, batch),
            problem,
            params,
            [batch] * 4,
            hyper={"lr": torch.tensor(0.1)},
            wrt=("params", "hyper"),
            strategy=strategy,
        )
        return [*found["params"].values(), found["hyper"]["lr"]]

    def report(name: str, one: Any, two: Any) -> None:
        off = max(
            float((a - whole(b)).abs().max() / a.abs().max()) for a, b in zip(one, two, strict=True)
        )
        print(f"{name}: {off:.3e}", flush=True)

    for kind, rule in RULES.items():
        for how, strategy in STRATEGIES.items():
            one = data_parallel(rule, strategy, start, (x, y))
            two = data_parallel(rule, strategy, parts, mine)
            report(f"metagradient {kind} {how}", one, two)

    def tracked(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Any:
        with innerloop.track(model, optimizer) as loop:
            for _ in range(3):
                loop.step((loop.model(x) - y).square().mean())
            (loop.model(x) - y).square().sum().backward()
        return [p.grad for p in model.parameters()]

    def shard(_: str, part: nn.Module, mesh: Any) -> None:
        for name, p in list(part.named_parameters(recurse=False)):
            new = distribute_tensor(p.detach(), mesh, [Shard(0)])
            part.register_parameter(name, nn.Parameter(new))

    everywhere = [distribute_tensor(t, mesh, [Replicate()]) for t in (x, y)]
    for kind, optimizer in OPTIMIZERS.items():
        one, two = network(), distribute_module(network(), mesh, shard)
        report(
            f"track {kind}",
            tracked(one, optimizer(one.parameters()), x, y),
            tracked(two, optimizer(two.parameters()), *everywhere),
        )

    gathering = network()
    fully_shard(gathering, mesh=mesh)
    sgd = torch.optim.SGD(gathering.parameters(), lr=0.1)
    apart = distribute_module(network(), mesh, shard)
    refused: dict[str, Callable[[], Any]] = {
        "track fully_shard": lambda: innerloop.track(gathering, sgd),
        "functional fully_shard": lambda: innerloop.functional(gathering),
        "module of fully_shard": lambda: innerloop.Problem.from_module(
            nn.ModuleDict({"a": gathering}), lambda m, hyper, b: m["a"](b).sum(), RULES["sgd"]
        ).init(None),
        "replayed": lambda: innerloop.track(
            apart, torch.optim.SGD(apart.parameters(), lr=0.1), strategy=innerloop.Checkpointed()
        ),
    }
    for name, call in refused.items():
        print(f"{name}: {refusal(call)}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
