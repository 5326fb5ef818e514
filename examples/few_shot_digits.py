"""MAML with learned per-parameter rates on scikit-learn's digits: 3-way 5-shot, against
pre-training and random initialisation.

    python examples/few_shot_digits.py                # five class splits, a table at the end
    python examples/few_shot_digits.py --splits 1     # one of them

Six of the ten classes are for training; rotations and flips make 48 of them. The other four are for
testing, with unchanged images. A task has three classes, with five images of each to adapt to and
fifteen of each to test on. Three ways are compared:

(a) an initialisation and one learning rate per parameter, meta-learned through five inner steps
    (Finn et al. 2017, MAML; Li et al. 2017, Meta-SGD),
(b) ordinary pre-training on the same 48 classes, with a new head,
(c) a random initialisation.

(b) and (c) adapt all layers with the best rate of a grid. That rate is chosen *on the test tasks
themselves*, separately for each number of steps, which favours the baselines.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import innerloop

Named = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Args:
    """The settings of a run."""

    splits: int = 5
    test_classes: int = 4
    ways: int = 3
    shots: int = 5
    queries: int = 15
    inner_steps: int = 5
    """The number of steps that (a) is trained for."""
    inner_lr: float = 0.1
    """Where the learned rates start."""
    iterations: int = 600
    tasks: int = 16
    """Tasks per outer step, in one vmap."""
    outer_lr: float = 2e-3
    width: int = 64
    depth: int = 3
    pretrain_iterations: int = 1500
    test_tasks: int = 200
    seed: int = 0


TEST_STEPS = (0, 1, 5, 10)
GRID = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)


class Tasks(NamedTuple):
    """Support and query sets, stacked over tasks."""

    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor


class Net(nn.Module):
    """A perceptron: deep enough that a random one does not adapt within five steps by itself."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        sizes = [64] + [width] * depth
        hidden = [
            layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())
        ]
        self.body = nn.Sequential(nn.Flatten(), *hidden)
        self.head = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image))


class Split:
    """Images of training classes ``[classes, images, 8, 8]``, each rotated and flipped copy a class
    of its own, and of test classes."""

    def __init__(self, args: Args, number: int) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32) / 16
        images = (images - images.mean()) / images.std()
        labels = torch.tensor(digits.target)
        smallest = int(labels.bincount().min())
        by_class = torch.stack([images[labels == c][:smallest] for c in range(10)])
        order = torch.randperm(10, generator=torch.Generator().manual_seed(args.seed + number))
        self.test = by_class[order[: args.test_classes]]
        train = by_class[order[args.test_classes :]]
        turned = [
            flipped.rot90(k, (-2, -1)) for flipped in (train, train.flip(-1)) for k in range(4)
        ]
        self.train = torch.cat(turned)


def sample(bank: Tensor, count: int, args: Args, generator: torch.Generator) -> Tasks:
    """Random tasks from images ``[classes, images, 8, 8]``."""
    classes, images = bank.shape[:2]
    chosen = torch.rand(count, classes, generator=generator).argsort(1)[:, : args.ways]
    drawn = torch.rand(count, args.ways, images, generator=generator).argsort(2)[
        ..., : args.shots + args.queries
    ]
    x = bank[chosen[..., None], drawn]
    y = torch.arange(args.ways)[:, None].expand(count, args.ways, args.shots + args.queries)
    support, query = slice(None, args.shots), slice(args.shots, None)
    return Tasks(*(part[:, :, s].flatten(1, 2) for s in (support, query) for part in (x, y)))


class Learner:
    """The inner problem: cross-entropy on the support set, SGD with one rate per parameter."""

    def __init__(self, args: Args) -> None:
        self.args = args
        self.call, self.start, _ = innerloop.functional(Net(args.width, args.depth, args.ways))
        self.problem = innerloop.Problem(
            lambda params, log_lr, batch: F.cross_entropy(self.call(params, batch[0]), batch[1]),
            innerloop.optim.sgd(),
            optimizer_hyper=lambda log_lr, t: {
                "lr": {name: rate.exp() for name, rate in log_lr.items()}
            },
        )

    def metagradient(
        self, params: Named, log_lr: Named, tasks: Tasks
    ) -> tuple[Tensor, dict[str, Named]]:
        """The mean query loss after adaptation and its gradient, over all tasks at once."""

        def of_task(task: Tasks) -> tuple[Tensor, dict[str, Named]]:
            def outer(traj: innerloop.Trajectory, _: Named) -> Tensor:
                return F.cross_entropy(self.call(traj.params, task.query_x), task.query_y)

            batches = [(task.x, task.y)] * self.args.inner_steps
            return innerloop.metagradient(outer, self.problem, params, batches, hyper=log_lr)

        value, grads = torch.func.vmap(of_task)(tasks)
        return value.mean(), {
            kind: {name: g.mean(0) for name, g in of.items()} for kind, of in grads.items()
        }

    def accuracy(self, params: Named, log_lr: Named, tasks: Tasks) -> Tensor:
        """Query accuracy ``[tasks, TEST_STEPS]`` after each number of steps."""

        def of_task(task: Tasks) -> Tensor:
            traj = innerloop.unroll(
                self.problem, params, [(task.x, task.y)] * max(TEST_STEPS), hyper=log_lr
            )
            predicted = [self.call(traj.at(t).params, task.query_x).argmax(-1) for t in TEST_STEPS]
            return torch.stack([(p == task.query_y).float().mean() for p in predicted])

        with torch.no_grad():
            chunks = zip(*(part.split(50) for part in tasks), strict=True)
            return torch.cat([torch.func.vmap(of_task)(Tasks(*chunk)) for chunk in chunks])


def meta_learn(learner: Learner, split: Split, bar: tqdm) -> tuple[Named, Named]:
    """(a): initialisation and logarithms of the rates."""
    args = learner.args
    generator = torch.Generator().manual_seed(args.seed)
    params = {name: p.clone() for name, p in learner.start.items()}
    log_lr = {name: torch.full_like(p, math.log(args.inner_lr)) for name, p in params.items()}
    leaves = {"params": params, "hyper": log_lr}
    optimizer = torch.optim.Adam(
        [t for of in leaves.values() for t in of.values()], lr=args.outer_lr
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations)
    for _ in range(args.iterations):
        value, grads = learner.metagradient(
            params, log_lr, sample(split.train, args.tasks, args, generator)
        )
        for kind, of in leaves.items():
            for name, leaf in of.items():
                leaf.grad = grads[kind][name]
        optimizer.step()
        schedule.step()
        bar.set_postfix(query_loss=f"{value:.3f}")
        bar.update()
    return params, log_lr


def pretrain(args: Args, split: Split) -> Named:
    """(b): a classifier of all training classes."""
    images = split.train.flatten(0, 1)
    labels = torch.arange(len(split.train)).repeat_interleave(split.train.shape[1])
    net = Net(args.width, args.depth, len(split.train))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.pretrain_iterations)
    for _ in range(args.pretrain_iterations):
        chosen = torch.randint(len(images), (128,))
        loss = F.cross_entropy(net(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: p.detach() for name, p in net.named_parameters()}


def baseline(learner: Learner, params: Named, tasks: Tasks) -> Tensor:
    """Accuracy ``[tasks, TEST_STEPS]``, for each number of steps with the rate of the grid that is
    best on these very tasks."""
    start = {n: learner.start[n] if n.startswith("head") else p for n, p in params.items()}
    found = []
    for rate in GRID:
        log_lr = {name: torch.full_like(p, math.log(rate)) for name, p in start.items()}
        found.append(learner.accuracy(start, log_lr, tasks))
    accuracy = torch.stack(found).nan_to_num()
    best = accuracy.mean(1).argmax(0)
    return torch.stack([accuracy[best[i], :, i] for i in range(len(TEST_STEPS))], 1)


def run_split(args: Args, number: int) -> dict[str, Tensor]:
    """Accuracies ``[tasks, TEST_STEPS]`` of (a), (b), (c) on the same test tasks."""
    torch.manual_seed(args.seed + number)
    split, learner = Split(args, number), Learner(args)
    tasks = sample(
        split.test, args.test_tasks, args, torch.Generator().manual_seed(args.seed + 1000 + number)
    )
    # disable=None: no bar where standard error is not a terminal, so that a log stays readable.
    with tqdm(
        total=args.iterations, desc=f"split {number}: meta-learning", unit="step", disable=None
    ) as bar:
        learned = learner.accuracy(*meta_learn(learner, split, bar), tasks)
        bar.set_description(f"split {number}: baselines")
        pretrained = baseline(learner, pretrain(args, split), tasks)
        return {
            "meta-learned": learned,
            "pre-trained": pretrained,
            "random": baseline(learner, learner.start, tasks),
        }


def interval(differences: Tensor) -> tuple[float, float]:
    """Mean and half width of the 95 % interval."""
    return differences.mean().item(), 1.96 * differences.std().item() / len(differences) ** 0.5


def table(results: dict[str, Tensor], args: Args) -> str:
    """Accuracy of each, and the paired differences to (a)."""
    lines = [f"{'inner steps':<24}" + "".join(f"{t:>18}" for t in TEST_STEPS)]
    for name, accuracy in results.items():
        lines.append(f"{name:<24}" + "".join(f"{a:>18.3f}" for a in accuracy.mean(0)))
    for name in ("pre-trained", "random"):
        cells = [interval(d) for d in (results["meta-learned"] - results[name]).unbind(1)]
        lines.append(
            f"{'(a) minus ' + name:<24}" + "".join(f"{f'{m:+.3f} ± {w:.3f}':>18}" for m, w in cells)
        )
    return "\n".join(
        [*lines, f"({len(results['random'])} tasks; (a) was trained for {args.inner_steps} steps)"]
    )


def run(args: Args) -> dict[str, Tensor]:
    """All splits; returns accuracies ``[splits * tasks, TEST_STEPS]``."""
    results: list[dict[str, Tensor]] = []
    for number in range(args.splits):
        began = time.perf_counter()
        results.append(run_split(args, number))
        cells = ", ".join(
            f"{name} {a[:, TEST_STEPS.index(5)].mean():.3f}" for name, a in results[-1].items()
        )
        tqdm.write(f"split {number}: after 5 steps {cells}; {time.perf_counter() - began:.0f} s")
    return {name: torch.cat([r[name] for r in results]) for name in results[0]}


def parse(argv: list[str] | None = None) -> Args:
    """Each field of `Args` as an option."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for field in dataclasses.fields(Args):
        default = field.default
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(default), default=default
        )
    return Args(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    settings = parse()
    print(table(run(settings), settings))
