"""All queries of `innerloop.attribute` in one replay beside one backward pass for each.

`python -m benchmarks.attribution` prints a Markdown table: processor time, interleaved, in one
process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import innerloop
from benchmarks import machine, timing
from benchmarks.spread import Spread

QUERIES, BATCH = 50, 32


def case(kind: str, examples: int, steps: int) -> dict[str, Callable[[], object]]:
    """Attribution of 50 queries, in both forms, and 50 separate backward passes."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(examples, 64, generator=g), torch.randint(10, (examples,), generator=g)
    xq, yq = torch.randn(QUERIES, 64, generator=g), torch.randint(10, (QUERIES,), generator=g)
    shapes = {"w": (64, 10)} if kind == "logistic" else {"a": (64, 64), "w": (64, 10)}
    params = {n: torch.randn(s, generator=g) / 8 for n, s in shapes.items()}
    batches = [torch.randint(examples, (BATCH,), generator=g) for _ in range(steps)]

    def logits(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return (x @ params["a"]).tanh() @ params["w"] if "a" in params else x @ params["w"]

    def per_example(params: Mapping[str, Tensor], hyper: Any, i: Tensor) -> Tensor:
        return F.cross_entropy(logits(params, x[i]), y[i], reduction="none")

    def weighted(params: Mapping[str, Tensor], hyper: Any, i: Tensor) -> Tensor:
        return (hyper["weights"][i] * per_example(params, hyper, i)).mean()

    def outcomes(params: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits(params, xq), yq, reduction="none")

    rule = innerloop.optim.sgd(lr=0.1) if kind == "logistic" else innerloop.optim.adam(lr=1e-3)
    problem, by_index = innerloop.Problem(weighted, rule), innerloop.Problem(per_example, rule)
    ones = torch.ones(examples)

    def at_once(form: innerloop.Problem, index: Any, compile: bool = False) -> Callable[[], object]:
        strategy = innerloop.Checkpointed(product="reverse", compile=compile)
        return lambda: innerloop.attribute(
            outcomes,
            form,
            params,
            batches,
            hyper={"weights": ones},
            index=index,
            strategy=strategy,
        )

    def apart() -> object:
        hyper = {"weights": ones.clone().requires_grad_()}
        traj = innerloop.unroll(
            problem, params, batches, hyper=hyper, strategy=innerloop.Checkpointed()
        )
        losses = outcomes(traj.params)
        return [torch.autograd.grad(loss, hyper["weights"], retain_graph=True) for loss in losses]

    return {
        "weights in the loss": at_once(problem, None),
        "one loss per example": at_once(by_index, lambda i: i),
        "compiled, weights in the loss": at_once(problem, None, True),
        "compiled, one loss per example": at_once(by_index, lambda i: i, True),
        "50 passes": apart,
    }


def main() -> None:
    torch.set_num_threads(1)
    facts = machine.describe()
    print(f"{facts['date']}, {facts['machine']}, torch {facts['torch']}, load {machine.load():.0f}")
    print("\n| 50 queries, s | weights in the loss | per example | compiled | compiled | apart |")
    print("|---|---|---|---|---|---|")
    for kind, examples, steps in (
        ("logistic", 300, 100),
        ("MLP, Adam", 300, 100),
    ):
        found = timing.interleave(case(kind, examples, steps), 3, warm_up=1, clock="cpu")
        shown = " | ".join(f"{Spread.of(s).median:.2f}" for s in found.values())
        print(f"| {kind}, N = {examples}, T = {steps} | {shown} |")
    sizes = [(n, steps) for n in (300, 200_000) for steps in (100, 300)]
    runs = {str(size): case("logistic", *size)["one loss per example"] for size in sizes}
    found = timing.interleave(runs, 7, warm_up=1, clock="cpu")
    few, more, few_of_many, more_of_many = (Spread.of(s).median for s in found.values())
    # What a run takes besides its steps is the same for both lengths.
    ratio = (more_of_many - few_of_many) / (more - few)
    print(f"\nOne loss per example, a step at N = 200,000 over one at N = 300: {ratio:.2f}")


if __name__ == "__main__":
    main()
