"""Learn a loss function that does not memorise wrong labels: digits with 30 % of them flipped.

    python examples/learned_loss.py                    # a table, and how long it took
    python examples/learned_loss.py --out loss.png     # and a picture of the loss
    python examples/learned_loss.py --resume state.pt  # killed? The same command goes on

A network of about a hundred weights is the loss. It sees what a classifier makes of one image (the
probability of the given label, those of the others, how far training is) and returns a number to
descend on; before it is trained it is cross-entropy. Its weights are learned by the exact gradient
of the cross-entropy on clean images, after 300 steps of Adam on the flipped labels. Then it trains
new networks, on new flips, and is judged on images that it has never seen.

Compared are cross-entropy, as it is, with the number of steps that is best on the clean images, and
with smoothed labels; the mean absolute error (Ghosh et al. 2017); and generalised cross-entropy
(Zhang & Sabuncu 2018). Each gets the rate that is best on the *test images*, in its favour.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
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

    flipped: float = 0.3
    """The share of training labels that are wrong."""
    steps: int = 200
    """Inner steps of Adam."""
    batch: int = 100
    lr: float = 0.01
    """The inner rate."""
    width: int = 64
    iterations: int = 60
    """Outer steps."""
    tasks: int = 4
    """Flips and initialisations per outer step, in one vmap."""
    outer_lr: float = 0.03
    hidden: int = 16
    """Width of the network that is the loss."""
    tests: int = 10
    """New flips and initialisations to test on."""
    seed: int = 0
    out: str = ""
    """Where to write a picture."""
    save_every: int = 10
    """Outer steps between checkpoints."""
    resume: str = ""
    """A file for checkpoints. The same command goes on from what it finds there."""


RATES = (1e-3, 3e-3, 1e-2)


class Digits(NamedTuple):
    """Images ``[n, 64]`` and right labels: to train on, for the outer loss, to test on."""

    x: Tensor
    y: Tensor
    clean_x: Tensor
    clean_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Run(NamedTuple):
    """Training runs, stacked: where they start, and of each step images, labels and progress."""

    params: Named
    x: Tensor
    y: Tensor
    progress: Tensor


def digits(seed: int) -> Digits:
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = order.split([900, 300, len(order) - 1200])
    return Digits(*(of[rows] for rows in parts for of in (images, labels)))


def runs(args: Args, data: Digits, count: int, generator: torch.Generator) -> Run:
    """Runs with flips, initialisations and batches of their own."""
    width, images = args.width, len(data.y)
    wrong = torch.rand(count, images, generator=generator) < args.flipped
    other = (data.y + torch.randint(1, 10, wrong.shape, generator=generator)) % 10
    given = torch.where(wrong, other, data.y)
    rows = torch.randint(images, (count, args.steps, args.batch), generator=generator)
    params = {
        "w1": torch.randn(count, 64, width, generator=generator) / 8,
        "b1": torch.zeros(count, width),
        "w2": torch.randn(count, width, 10, generator=generator) / width**0.5,
        "b2": torch.zeros(count, 10),
    }
    progress = torch.linspace(0, 1, args.steps).expand(count, -1)
    return Run(params, data.x[rows], given[torch.arange(count)[:, None, None], rows], progress)


def predict(params: Named, x: Tensor) -> Tensor:
    return (x @ params["w1"] + params["b1"]).tanh() @ params["w2"] + params["b2"]


# -- losses: of logits [n, 10], labels [n] and the progress of training ----------------------------

LossOf = Callable[[Named, Tensor, Tensor, Tensor], Tensor]


def features(logits: Tensor, labels: Tensor, progress: Tensor) -> Tensor:
    """What the learned loss sees of each image, ``[n, 5]``."""
    log_p = F.log_softmax(logits, -1)
    given = log_p.gather(-1, labels[:, None])[:, 0]
    p = given.exp()
    largest = (log_p.exp() ** 2).sum(-1)  # near 1 if the network is sure of one class
    # A softened logarithm: bounded, so that an image that is far out does not decide alone.
    return torch.stack(
        [given / (1 - given / 4), p, largest, p * largest, progress.expand_as(p)], -1
    )


def learned(weights: Named, logits: Tensor, labels: Tensor, progress: Tensor) -> Tensor:
    """Cross-entropy plus a network of the features, whose last layer starts at zero."""
    hidden = (features(logits, labels, progress) @ weights["in"] + weights["bias"]).tanh()
    each = F.cross_entropy(logits, labels, reduction="none") * weights["plain"]
    return (each + hidden @ weights["out"]).mean()


def first_weights(args: Args) -> Named:
    generator = torch.Generator().manual_seed(args.seed)
    return {
        "in": torch.randn(5, args.hidden, generator=generator),
        "bias": torch.randn(args.hidden, generator=generator),
        "out": torch.zeros(args.hidden),
        "plain": torch.ones(()),
    }


def cross_entropy(_: Named, logits: Tensor, labels: Tensor, progress: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def smoothed(_: Named, logits: Tensor, labels: Tensor, progress: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.3)


def absolute_error(_: Named, logits: Tensor, labels: Tensor, progress: Tensor) -> Tensor:
    """1 - p of the given label: half of the distance to the one-hot label."""
    return 1 - logits.softmax(-1).gather(-1, labels[:, None]).mean()


def generalised(_: Named, logits: Tensor, labels: Tensor, progress: Tensor) -> Tensor:
    """(1 - p^q) / q with the q = .7 of its paper: between the two."""
    return ((1 - logits.softmax(-1).gather(-1, labels[:, None]) ** 0.7) / 0.7).mean()


def problem_of(loss: LossOf) -> innerloop.Problem:
    """Training with Adam; ``hyper`` holds the weights of the loss and the rate."""
    return innerloop.Problem(
        lambda params, hyper, batch: loss(
            hyper["weights"], predict(params, batch[0]), batch[1], batch[2]
        ),
        innerloop.optim.adam(),
        optimizer_hyper=("lr",),
    )


BASELINES: dict[str, LossOf] = {
    "cross-entropy": cross_entropy,
    "cross-entropy, smoothed": smoothed,
    "absolute error": absolute_error,
    "generalised cross-entropy": generalised,
}
LEARNED = problem_of(learned)


def one_run(run: Run, weights: Named, lr: float, x: Tensor, y: Tensor) -> tuple[Tensor, Named]:
    """Cross-entropy on clean images after training with the learned loss, and its gradient."""

    def outer(traj: innerloop.Trajectory, _: object) -> Tensor:
        return F.cross_entropy(predict(traj.params, x), y)

    batches = (run.x, run.y, run.progress)
    value, grads = innerloop.metagradient(
        outer, LEARNED, run.params, batches, hyper={"weights": weights, "lr": lr}, wrt="hyper"
    )
    return value, grads["weights"]


def meta_train(args: Args, data: Digits, bar: tqdm) -> tuple[Named, list[float]]:
    """The weights of the loss, and the outer loss at each outer step."""
    generator = torch.Generator().manual_seed(args.seed)
    weights = {name: x.requires_grad_() for name, x in first_weights(args).items()}
    optimizer = torch.optim.Adam(weights.values(), lr=args.outer_lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations)
    counters: dict[str, list[float]] = {"losses": []}
    state = innerloop.OuterState(
        model=weights,
        optimizer=optimizer,
        scheduler=scheduler,
        random=generator,
        counters=counters,
    )
    if args.resume and Path(args.resume).exists():
        state.load(args.resume)
    bar.update(len(counters["losses"]))
    while len(counters["losses"]) < args.iterations:
        value, grads = innerloop.map_tasks(
            one_run,
            runs(args, data, args.tasks, generator),
            {name: x.detach() for name, x in weights.items()},
            args.lr,
            data.clean_x,
            data.clean_y,
            reduce="mean",
        )
        optimizer.zero_grad()
        innerloop.assign(weights, grads)
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        scheduler.step()
        counters["losses"].append(value.item())
        if args.resume and len(counters["losses"]) % args.save_every == 0:
            state.save(args.resume)
        bar.set_postfix(clean_loss=f"{value:.3f}")
        bar.update()
    return {name: x.detach() for name, x in weights.items()}, counters["losses"]


# -- testing ---------------------------------------------------------------------------------------


def accuracies(
    loss: LossOf, weights: Named, rate: float, unseen: Run, data: Digits
) -> tuple[Tensor, Tensor]:
    """Accuracy on clean and on test images, ``[runs, times]``, at twenty times of training."""
    problem, steps = problem_of(loss), unseen.progress.shape[1]
    times = sorted({math.ceil(steps * k / 20) for k in range(1, 21)})

    def of_run(run: Run) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            batches, hyper = (run.x, run.y, run.progress), {"weights": weights, "lr": rate}
            traj = innerloop.unroll(problem, run.params, batches, hyper=hyper)

            def right(x: Tensor, y: Tensor) -> Tensor:
                predicted = [predict(traj.at(t).params, x).argmax(-1) for t in times]
                return torch.stack([(p == y).float().mean() for p in predicted])

            return right(data.clean_x, data.clean_y), right(data.test_x, data.test_y)

    return innerloop.map_tasks(of_run, unseen)


class Results(NamedTuple):
    """Test accuracies ``[tests]`` by loss; the weights of the learned one; outer losses."""

    accuracies: dict[str, Tensor]
    weights: Named
    losses: list[float]
    seconds: float


def run(args: Args) -> Results:
    began = time.process_time()
    data = digits(args.seed)
    # disable=None: no bar where standard error is not a terminal, so that a log stays readable.
    with tqdm(total=args.iterations, desc="meta-training", unit="step", disable=None) as bar:
        weights, losses = meta_train(args, data, bar)
    unseen = runs(args, data, args.tests, torch.Generator().manual_seed(args.seed + 1))
    found = {"learned loss": accuracies(learned, weights, args.lr, unseen, data)[1][:, -1]}
    for name, loss in BASELINES.items():
        at_rates = [accuracies(loss, {}, rate, unseen, data) for rate in RATES]
        found[name] = max((test[:, -1] for _, test in at_rates), key=lambda a: a.mean().item())
        if name == "cross-entropy":
            stopped = [test[:, int(clean.mean(0).argmax())] for clean, test in at_rates]
            found["cross-entropy, stopped"] = max(stopped, key=lambda a: a.mean().item())
            found["cross-entropy, same rate"] = at_rates[RATES.index(args.lr)][1][:, -1]
    return Results(found, weights, losses, time.process_time() - began)


def interval(x: Tensor) -> str:
    """Mean and half width of the 95 % interval of Student's t."""
    half = scipy.stats.t.ppf(0.975, len(x) - 1) * x.std().item() / len(x) ** 0.5
    return f"{x.mean():.3f} ± {half:.3f}"


def table(results: Results) -> str:
    """Test accuracy, and the paired difference of the learned loss to it."""
    ours = results.accuracies["learned loss"]
    lines = [f"{'':<28}{'test accuracy':<18}learned loss minus it"]
    for name, accuracy in results.accuracies.items():
        difference = "" if accuracy is ours else interval(ours - accuracy)
        lines.append(f"{name:<28}{interval(accuracy):<18}{difference}".rstrip())
    seconds = f"{results.seconds:.0f} s of processor time"
    return "\n".join([*lines, f"({len(ours)} unseen runs; {seconds})"])


def draw(results: Results, path: Path) -> None:
    """The loss of an image over the probability of its given label, in the middle and at the end
    of training, beside cross-entropy; the other nine classes share the rest, or one has it all."""
    figure = matplotlib.figure.Figure(figsize=(7.6, 3.2), layout="constrained")
    p = torch.linspace(0.001, 0.999, 200)
    label = torch.zeros(1, dtype=torch.long)
    for k, (title, others) in enumerate({"rest on one class": 1, "rest on all": 9}.items()):
        axes = figure.add_subplot(1, 2, 1 + k)
        rest = torch.full((len(p), 9), 1e-6)
        rest[:, :others] = ((1 - p) / others)[:, None]
        logits = torch.cat([p[:, None], rest], 1).log()
        for progress, style in ((0.0, ":"), (0.5, "--"), (1.0, "-")):
            of = [
                learned(results.weights, row[None], label, torch.tensor(progress)) for row in logits
            ]
            axes.plot(p.tolist(), [(x - of[-1]).item() for x in of], f"C0{style}")
        axes.plot(p.tolist(), (-p.log()).tolist(), "C1", lw=0.9)
        axes.set(xlabel="probability of the given label", title=title, ylim=(-2, 7))
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
