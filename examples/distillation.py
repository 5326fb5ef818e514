"""Distil a data set: ten learned images, from which a new network learns digits in twenty steps.

    python examples/distillation.py                    # a table, and how long it took
    python examples/distillation.py --out images.png   # and a picture of the ten images
    python examples/distillation.py --resume state.pt  # killed? The same command goes on

Ten images, one for each class, are the whole training set of a small network. Their pixels, their
soft labels and the rate of each step are learned by the exact gradient of the loss on real images
after training (Wang et al. 2018, "Dataset distillation"; soft labels as in Sucholutsky & Schonlau
2019), over several random initialisations at once. They are tested on initialisations and images
that were never seen, against training on real images, one for each class.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import scipy.stats
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

import innerloop

Named = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Args:
    """The settings of a run."""

    steps: int = 20
    """Inner steps of gradient descent on the ten images."""
    iterations: int = 500
    """Outer steps."""
    starts: int = 8
    """Random initialisations per outer step, in one vmap."""
    batch: int = 256
    """Real images per outer step."""
    lr: float = 0.1
    """Where the inner rates start."""
    outer_lr: float = 0.01
    width: int = 64
    tests: int = 10
    """Unseen initialisations to test on."""
    real_steps: int = 200
    """Steps on real images, with the best rate of a grid."""
    seed: int = 0
    out: str = ""
    """Where to write a picture."""
    save_every: int = 10
    """Outer steps between checkpoints."""
    resume: str = ""
    """A file for checkpoints. The same command goes on from what it finds there."""


REAL_RATES = (0.03, 0.1, 0.3, 1.0)


class Digits(NamedTuple):
    """Real images ``[n, 64]`` and labels, to learn from and to test on."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(seed: int) -> Digits:
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[600:], order[:600]
    return Digits(images[train], labels[train], images[test], labels[test])


def starts(args: Args, count: int, generator: torch.Generator) -> Named:
    """Random parameters of the network, stacked."""
    width = args.width
    return {
        "w1": torch.randn(count, 64, width, generator=generator) / 8,
        "b1": torch.zeros(count, width),
        "w2": torch.randn(count, width, 10, generator=generator) / width**0.5,
        "b2": torch.zeros(count, 10),
    }


def predict(params: Named, x: Tensor) -> Tensor:
    return (x @ params["w1"] + params["b1"]).tanh() @ params["w2"] + params["b2"]


def inner_loss(params: Named, learned: Named, _: object) -> Tensor:
    """Cross-entropy with soft labels on the learned images; there is no other data."""
    log_p = F.log_softmax(predict(params, learned["images"]), -1)
    return -(F.softmax(learned["labels"], -1) * log_p).sum(-1).mean()


PROBLEM = innerloop.Problem(
    inner_loss,
    innerloop.optim.sgd(),
    optimizer_hyper=lambda learned, t: {"lr": learned["log_lr"][t].exp()},
)


def one_start(
    start: Named, learned: Named, x: Tensor, y: Tensor, steps: int
) -> tuple[Tensor, Named]:
    """Loss on real images after training on the learned ones, and its gradient by those."""

    def outer(traj: innerloop.Trajectory, _: Named) -> Tensor:
        return F.cross_entropy(predict(traj.params, x), y)

    return innerloop.metagradient(
        outer, PROBLEM, start, None, steps=steps, hyper=learned, wrt="hyper"
    )


def class_means(data: Digits) -> Tensor:
    return torch.stack([data.x[data.y == c].mean(0) for c in range(10)])


def first(args: Args, data: Digits) -> Named:
    """Where learning starts: the mean image of each class, its label, one rate."""
    return {
        "images": class_means(data),
        "labels": 4 * torch.eye(10),
        "log_lr": torch.full((args.steps,), math.log(args.lr)),
    }


def real_images(data: Digits, count: int, generator: torch.Generator) -> Tensor:
    """Numbers ``[count, 10]`` of real images, one for each class."""
    score = torch.rand(count, len(data.y), generator=generator)
    classes = [score.masked_fill(data.y != c, -1).argmax(1) for c in range(10)]
    return torch.stack(classes, 1)


def distil(args: Args, data: Digits, bar: tqdm) -> tuple[Named, list[float]]:
    """Learn images, labels and rates; return them and the outer loss at each outer step."""
    generator = torch.Generator().manual_seed(args.seed)
    learned = {n: x.requires_grad_() for n, x in first(args, data).items()}
    optimizer = torch.optim.Adam(learned.values(), lr=args.outer_lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations)
    counters: dict[str, list[float]] = {"losses": []}
    state = innerloop.OuterState(
        model=learned,
        optimizer=optimizer,
        scheduler=scheduler,
        random=generator,
        counters=counters,
    )
    if args.resume and Path(args.resume).exists():
        state.load(args.resume)
    bar.update(len(counters["losses"]))
    while len(counters["losses"]) < args.iterations:
        rows = torch.randint(len(data.y), (args.batch,), generator=generator)
        value, grads = innerloop.map_tasks(
            one_start,
            starts(args, args.starts, generator),
            {name: x.detach() for name, x in learned.items()},
            data.x[rows],
            data.y[rows],
            args.steps,
            reduce="mean",
        )
        optimizer.zero_grad()
        innerloop.assign(learned, grads)
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimizer.step()
        scheduler.step()
        counters["losses"].append(value.item())
        if args.resume and len(counters["losses"]) % args.save_every == 0:
            state.save(args.resume)
        bar.set_postfix(loss=f"{value:.3f}")
        bar.update()
    return {name: x.detach() for name, x in learned.items()}, counters["losses"]


def accuracies(data: Digits, unseen: Named, learned: Named, each: bool = False) -> Tensor:
    """Test accuracy for each of the initialisations, after training on ``learned``.

    With ``each``, all but the rates is stacked: every initialisation has images of its own.
    """
    steps = len(learned["log_lr"])
    stacked = {n: learned[n] for n in ("images", "labels")} if each else {}

    def of_start(task: tuple[Named, Named]) -> Tensor:
        start, own = task
        with torch.no_grad():
            hyper = {**learned, **own}
            params = innerloop.unroll(PROBLEM, start, None, steps=steps, hyper=hyper).params
            return (predict(params, data.test_x).argmax(-1) == data.test_y).float().mean()

    return innerloop.map_tasks(of_start, (unseen, stacked))


def with_real(
    args: Args, data: Digits, unseen: Named, x: Tensor, y: Tensor, each: bool = False
) -> Tensor:
    """Test accuracy after training on real images with the rate that is best on the test images."""
    labels = 20 * F.one_hot(y, 10).float()
    found = []
    for rate in REAL_RATES:
        log_lr = torch.full((args.real_steps,), math.log(rate))
        real = {"images": x, "labels": labels, "log_lr": log_lr}
        found.append(accuracies(data, unseen, real, each))
    return max(found, key=lambda accuracy: accuracy.mean().item())


class Results(NamedTuple):
    """Test accuracies ``[tests]`` by the data trained on; what was learned; outer losses."""

    accuracies: dict[str, Tensor]
    learned: Named
    losses: list[float]
    seconds: float


def run(args: Args) -> Results:
    began = time.process_time()
    data = digits(args.seed)
    # disable=None: no bar where standard error is not a terminal, so that a log stays readable.
    with tqdm(total=args.iterations, desc="distilling", unit="step", disable=None) as bar:
        learned, losses = distil(args, data, bar)
    generator = torch.Generator().manual_seed(args.seed + 1)
    unseen = starts(args, args.tests, generator)
    chosen = real_images(data, args.tests, generator)
    found = {
        "ten learned images": accuracies(data, unseen, learned),
        "one real image a class": with_real(
            args, data, unseen, data.x[chosen], data.y[chosen], each=True
        ),
        "the mean of each class": with_real(
            args, data, unseen, class_means(data), torch.arange(10)
        ),
        f"all {len(data.y)} real images": with_real(args, data, unseen, data.x, data.y),
    }
    return Results(found, learned, losses, time.process_time() - began)


def table(results: Results) -> str:
    """Means over initialisations with 95 % intervals of Student's t."""
    lines = []
    for name, accuracy in results.accuracies.items():
        n = len(accuracy)
        half = scipy.stats.t.ppf(0.975, n - 1) * accuracy.std().item() / n**0.5
        lines.append(f"{name:<26}{accuracy.mean():.3f} ± {half:.3f}")
    seconds = f"{results.seconds:.0f} s of processor time"
    return "\n".join([*lines, f"({n} unseen initialisations; {seconds})"])


def draw(results: Results, path: Path) -> None:
    """The ten images with their most likely labels, and the rates."""
    figure = matplotlib.figure.Figure(figsize=(7.6, 3.0), layout="constrained")
    grid = figure.add_gridspec(2, 8)
    for i, (image, label) in enumerate(
        zip(results.learned["images"], results.learned["labels"].softmax(-1), strict=True)
    ):
        axes = figure.add_subplot(grid[i // 5, i % 5])
        axes.imshow(image.view(8, 8).tolist(), cmap="gray")
        axes.set_title(f"{int(label.argmax())} ({label.max():.2f})", fontsize=8)
        axes.set_axis_off()
    axes = figure.add_subplot(grid[:, 5:])
    axes.plot(results.learned["log_lr"].exp().tolist(), "o-", ms=3)
    axes.set(xlabel="inner step", ylabel="learned rate")
    figure.savefig(path, dpi=150)


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
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
    settings = parse()
    outcome = run(settings)
    print(table(outcome))
    if settings.out:
        draw(outcome, Path(settings.out))
