"""Learn hundreds of hyper-parameters and a learning-rate schedule through 500 steps of Adam.

    python examples/hyperparameters.py                    # both tasks, three seeds, tables
    python examples/hyperparameters.py --task sensors     # one of them
    python examples/hyperparameters.py --out curves.png   # and a picture
    python examples/hyperparameters.py --resume state     # killed? The same command goes on

Both tasks use scikit-learn's digits. The outer variables are moved by an ordinary ``torch.optim``
optimizer along the exact gradient of the validation loss after training.

*labels*: 40 % of the training labels are wrong. Each training image gets a weight. The validation
images are clean and as many as the training images, so simple ways exist: train on those alone, or
throw out what a model trained on them finds unlikely. The table has them beside the learned
weights.

*sensors*: an image is seen by 20 sensors. Each looks at a patch of its own, through noise of its
own strength. The weights that read one sensor get a strength of L2 regularisation of their own.
One strength for all, the validation images alone, ranking the sensors one by one and random search
are compared with it. All train on the validation images too, once their settings are chosen.
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

    task: str = "both"
    """``labels``, ``sensors`` or ``both``."""
    seeds: int = 3
    seed: int = 0
    """The first of the seeds."""
    steps: int = 500
    """Inner steps of Adam."""
    iterations: int = 50
    """Outer steps."""
    knots: int = 8
    """The logarithm of the inner rate is linear between so many points, equally far apart."""
    lr: float = 3e-3
    """The rate that the schedule starts from."""
    outer_lr: float = 0.15
    schedule_lr: float = 0.03
    """The outer rate of the schedule's points."""
    runs: int = 3
    """Training runs, from fresh initialisations, over which a row of the table averages."""
    search: int = 150
    """Draws of random search, three for each outer step."""
    out: str = ""
    """Where to write a picture."""
    save_every: int = 10
    """Outer steps between checkpoints."""
    resume: str = ""
    """A folder for checkpoints. The same command goes on from what it finds there."""


RATES = (1e-3, 3e-3, 1e-2)
STRENGTHS = tuple(math.exp(v) for v in (-12.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0))
SENSORS = 20


class Task(NamedTuple):
    """An inner problem, and what it is judged by.

    Attributes:
        hyper: what is learned besides the rates, at its start.
        start: ``start(generator)``: parameters before training.
        loss: ``loss(params, hyper, rows)`` on images with these numbers.
        predict: ``predict(params, rows)``: logits.
        labels: of all images, the right ones.
        train, validation, test: numbers of images.
        batch: images in a step.
    """

    hyper: Named
    start: Callable[[torch.Generator], Named]
    loss: Callable[[Named, Named, Tensor], Tensor]
    predict: Callable[[Named, Tensor], Tensor]
    labels: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor
    batch: int


class Learned(NamedTuple):
    """Hyper-parameters, and the validation loss before each outer step."""

    hyper: Named
    losses: list[float]


class Run(NamedTuple):
    """A training run: where it starts, the images of each step, and its hyper-parameters."""

    params: Named
    rows: Tensor
    hyper: Named


# -- the two tasks ---------------------------------------------------------------------------------


def images_and_labels() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 64]`` with mean 0 and variance 1, and their labels."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    return (images - images.mean()) / images.std(), torch.tensor(digits.target)


class Labels(NamedTuple):
    """The task of wrong labels: ``given`` are those that training sees, ``wrong`` says which."""

    task: Task
    given: Tensor
    wrong: Tensor


def corrupted_labels(seed: int, share: float = 0.4, width: int = 32) -> Labels:
    """600 training images, a share of them with another label; 600 for validation; a perceptron."""
    images, labels = images_and_labels()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, validation, test = order.split([600, 600, len(order) - 1200])
    wrong = torch.zeros(len(images), dtype=torch.bool)
    wrong[train] = torch.rand(600, generator=generator) < share
    other = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    given = torch.where(wrong, other, labels)

    def start(generator: torch.Generator) -> Named:
        return {
            "w1": torch.randn(64, width, generator=generator) / 8,
            "b1": torch.zeros(width),
            "w2": torch.randn(width, 10, generator=generator) / width**0.5,
            "b2": torch.zeros(10),
        }

    def predict(params: Named, rows: Tensor) -> Tensor:
        hidden = (images[rows] @ params["w1"] + params["b1"]).tanh()
        return hidden @ params["w2"] + params["b2"]

    def loss(params: Named, hyper: Named, rows: Tensor) -> Tensor:
        weight = hyper["logit"][rows].sigmoid()
        each = F.cross_entropy(predict(params, rows), given[rows], reduction="none")
        return (weight * each).sum() / weight.sum()

    # One entry for each image; only those of training images are ever read or moved.
    hyper = {"logit": torch.zeros(len(images))}
    return Labels(
        Task(hyper, start, loss, predict, labels, train, validation, test, 100), given, wrong
    )


def sensors(seed: int, size: int = 3, low: float = 0.3, high: float = 6.0) -> Task:
    """Twenty noisy patches of each image, side by side; a linear model of them."""
    images, labels = images_and_labels()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, validation, test = order.split([200, 200, len(order) - 400])
    noise = torch.logspace(math.log10(low), math.log10(high), SENSORS)
    noise = noise[torch.randperm(SENSORS, generator=generator)]
    patches = []
    for k in range(SENSORS):
        row, column = torch.randint(9 - size, (2,), generator=generator).tolist()
        patch = images.view(-1, 8, 8)[:, row : row + size, column : column + size].flatten(1)
        patches.append(patch + noise[k] * torch.randn(patch.shape, generator=generator))
    seen = torch.cat(patches, 1)
    seen = (seen - seen.mean(0)) / seen.std(0)
    sensor = torch.arange(SENSORS).repeat_interleave(size**2)

    def start(generator: torch.Generator) -> Named:
        return {
            "w": torch.randn(len(sensor), 10, generator=generator) / len(sensor) ** 0.5,
            "b": torch.zeros(10),
        }

    def predict(params: Named, rows: Tensor) -> Tensor:
        return seen[rows] @ params["w"] + params["b"]

    def loss(params: Named, hyper: Named, rows: Tensor) -> Tensor:
        # A sensor that is switched off is neither read nor regularised.
        w = params["w"] * hyper["use"][sensor, None]
        logits = seen[rows] @ w + params["b"]
        penalty = (hyper["log_strength"].exp()[sensor, None] * w**2).sum()
        return F.cross_entropy(logits, labels[rows]) + penalty

    hyper = {
        "log_strength": torch.full((SENSORS,), -7.0),
        "use": torch.ones(SENSORS, dtype=torch.bool),
    }
    return Task(hyper, start, loss, predict, labels, train, validation, test, 64)


# -- training --------------------------------------------------------------------------------------


def problem_of(task: Task, args: Args) -> innerloop.Problem:
    """Training with Adam; ``hyper["log_lr"]`` has the logarithms of the rate at the knots."""
    place = torch.linspace(0, args.knots - 1, args.steps)[:, None]
    between = (1 - (place - torch.arange(args.knots)).abs()).clamp(min=0)
    return innerloop.Problem(
        task.loss,
        innerloop.optim.adam(),
        optimizer_hyper=lambda hyper, t: {"lr": (between[t] @ hyper["log_lr"]).exp()},
    )


def run_of(task: Task, args: Args, hyper: Named, rows: Tensor, seed: int) -> Run:
    """A run on random batches of the images ``rows``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(rows), (args.steps, task.batch), generator=generator)
    return Run(task.start(generator), rows[drawn], hyper)


def trained(task: Task, args: Args, runs: list[Run]) -> list[Named]:
    """Parameters after each run; many run at once."""
    problem = problem_of(task, args)

    def of_run(run: Run) -> Named:
        with torch.no_grad():
            return innerloop.unroll(problem, run.params, run.rows, hyper=run.hyper).params

    stacked = Run(
        {name: torch.stack([run.params[name] for run in runs]) for name in runs[0].params},
        torch.stack([run.rows for run in runs]),
        {name: torch.stack([run.hyper[name] for run in runs]) for name in runs[0].hyper},
    )
    found = innerloop.map_tasks(of_run, stacked, chunk_size=100)
    return [{name: p[i] for name, p in found.items()} for i in range(len(runs))]


def learn(task: Task, args: Args, seed: int, checkpoint: Path | None, bar: tqdm) -> Learned:
    """Move the hyper-parameters along the gradient of the validation loss after training.

    Each outer step starts from a fresh initialisation and draws its own batches, so that what is
    learned is not made for one of them.
    """
    problem = problem_of(task, args)
    log_lr = torch.full((args.knots,), math.log(args.lr))
    hyper = {name: x.clone() for name, x in {**task.hyper, "log_lr": log_lr}.items()}
    leaves = {n: x.requires_grad_() for n, x in hyper.items() if x.is_floating_point()}
    rates = {name: args.schedule_lr if name == "log_lr" else args.outer_lr for name in leaves}
    optimizer = torch.optim.Adam([{"params": [leaves[n]], "lr": rates[n]} for n in leaves])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    counters = {"losses": losses}
    state = innerloop.OuterState(
        model=hyper, optimizer=optimizer, scheduler=scheduler, random=generator, counters=counters
    )
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint)

    def outer(traj: innerloop.Trajectory, _: Named) -> Tensor:
        logits = task.predict(traj.params, task.validation)
        return F.cross_entropy(logits, task.labels[task.validation])

    bar.reset(args.iterations)
    bar.update(len(counters["losses"]))
    while len(counters["losses"]) < args.iterations:
        fresh = int(torch.randint(2**31, (), generator=generator))
        run = run_of(task, args, hyper, task.train, fresh)
        value, grads = innerloop.metagradient(
            outer, problem, run.params, run.rows, hyper=hyper, wrt="hyper"
        )
        optimizer.zero_grad()
        innerloop.assign(hyper, grads)
        for leaf in leaves.values():  # a run that blows up must not decide alone
            torch.nn.utils.clip_grad_norm_(leaf, 1.0)
        optimizer.step()
        scheduler.step()
        counters["losses"].append(value.item())
        if checkpoint is not None and len(counters["losses"]) % args.save_every == 0:
            state.save(checkpoint)
        bar.set_postfix(validation_loss=f"{value:.3f}")
        bar.update()
    return Learned({name: x.detach() for name, x in hyper.items()}, counters["losses"])


def accuracy(task: Task, params: Named, rows: Tensor) -> float:
    return (task.predict(params, rows).argmax(-1) == task.labels[rows]).float().mean().item()


def losses_of(task: Task, params: list[Named], rows: Tensor) -> Tensor:
    """The cross-entropy on the images ``rows``, for each of several parameters."""
    return torch.stack([F.cross_entropy(task.predict(p, rows), task.labels[rows]) for p in params])


def tested(task: Task, args: Args, hyper: Named, rows: Tensor, seed: int) -> float:
    """Accuracy on test images after training on ``rows``, mean of several runs."""
    first = 1_000_000 * (seed + 1)
    runs = [run_of(task, args, hyper, rows, first + i) for i in range(args.runs)]
    found = trained(task, args, runs)
    return sum(accuracy(task, params, task.test) for params in found) / args.runs


def constant(args: Args, rate: float) -> Tensor:
    """A schedule that does not change."""
    return torch.full((args.knots,), math.log(rate))


# -- what it is compared with ----------------------------------------------------------------------


def auc(score: Tensor, positive: Tensor) -> float:
    """How often a positive has a higher score than a negative."""
    difference = score[positive][:, None] - score[~positive][None]
    return ((difference > 0).float() + (difference == 0).float() / 2).mean().item()


def compare_labels(
    args: Args, seed: int, learned: Learned, data: Labels
) -> tuple[dict[str, float], dict[str, float]]:
    """Test accuracy of each way, and how well the scores of two ways tell wrong labels (AUC).

    The rate of each simple way is the one of `RATES` that is best on the *test images*, in its
    favour.
    """
    task, given, wrong = data
    logit = torch.zeros(len(task.labels))
    logit[task.validation] = 4.0  # a weight of .98

    def simple(rows: Tensor) -> float:
        rates = (constant(args, rate) for rate in RATES)
        return max(
            tested(task, args, {"logit": logit, "log_lr": rate}, rows, seed) for rate in rates
        )

    equal = {"logit": logit, "log_lr": constant(args, args.lr)}
    judge = trained(task, args, [run_of(task, args, equal, task.validation, seed)])[0]
    unlikely = F.cross_entropy(task.predict(judge, task.train), given[task.train], reduction="none")
    kept = task.train[unlikely.argsort()[: int((~wrong[task.train]).sum())]]
    with_validation = {**learned.hyper, "logit": learned.hyper["logit"].clone()}
    with_validation["logit"][task.validation] = 4.0
    found = {
        "given labels": simple(task.train),
        "given labels + validation": simple(torch.cat([task.train, task.validation])),
        "validation alone": simple(task.validation),
        "ranking": simple(kept),
        "ranking + validation": simple(torch.cat([kept, task.validation])),
        "learned": tested(task, args, learned.hyper, task.train, seed),
        "learned + validation": tested(
            task, args, with_validation, torch.cat([task.train, task.validation]), seed
        ),
    }
    tells = {
        "ranking": auc(unlikely, wrong[task.train]),
        "learned": auc(-learned.hyper["logit"][task.train], wrong[task.train]),
    }
    return found, tells


def compare_sensors(args: Args, seed: int, learned: Learned, task: Task) -> dict[str, float]:
    """Test accuracy of each way.

    The settings are chosen by the validation loss after training on the training images; then all
    but *validation alone* train on both, with the settings that they chose.
    """
    both = torch.cat([task.train, task.validation])

    def setting(strength: Tensor, rate: float, use: Tensor) -> Named:
        return {"log_strength": strength, "use": use, "log_lr": constant(args, rate)}

    def losses(settings: list[Named]) -> Tensor:
        runs = [run_of(task, args, hyper, task.train, seed) for hyper in settings]
        return losses_of(task, trained(task, args, runs), task.validation)

    def best(settings: list[Named]) -> Named:
        return settings[int(losses(settings).argmin())]

    everything = torch.ones(SENSORS, dtype=torch.bool)
    strengths = [torch.full((SENSORS,), math.log(s)) for s in STRENGTHS]
    single = best([setting(s, rate, everything) for s in strengths for rate in RATES])
    # Each sensor on its own gives its rank; how many of the first are used is chosen like the rest.
    alone = losses([{**single, "use": torch.arange(SENSORS) == k} for k in range(SENSORS)])
    rank = alone.argsort().argsort()
    ranking = best(
        [
            setting(strength, single["log_lr"][0].exp().item(), rank < count)
            for count in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20)
            for strength in strengths
        ]
    )
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(args.search, SENSORS + 1, generator=generator)
    searched = best(
        [
            setting(
                -12 + 10 * draw[:-1],
                RATES[0] * (RATES[-1] / RATES[0]) ** draw[-1].item(),
                everything,
            )
            for draw in draws
        ]
    )
    return {
        "no regularisation": tested(
            task, args, {**single, "log_strength": torch.full((SENSORS,), -30.0)}, both, seed
        ),
        "one strength": tested(task, args, single, both, seed),
        "validation alone": tested(task, args, single, task.validation, seed),
        "ranking": tested(task, args, ranking, both, seed),
        "random search": tested(task, args, searched, both, seed),
        "learned": tested(task, args, learned.hyper, both, seed),
    }


# -- tables and a picture --------------------------------------------------------------------------


def interval(differences: list[float]) -> str:
    """Mean and half width of the 95 % interval of Student's t."""
    x, n = torch.tensor(differences), len(differences)
    if n == 1:
        return f"{x.item():+.3f}"
    half = scipy.stats.t.ppf(0.975, n - 1) * x.std().item() / n**0.5
    return f"{x.mean().item():+.3f} ± {half:.3f}"


def table(title: str, results: list[dict[str, float]], ours: str, first: int = 0) -> str:
    """A column for each seed from the ``first`` one, the mean, and what ``ours`` differs by."""
    head = "".join(f"{f'seed {first + i}':>9}" for i in range(len(results)))
    lines = [f"{title:<28}{head}{'mean':>9}    {ours} minus it"]
    for name in results[0]:
        values = [found[name] for found in results]
        cells = "".join(f"{v:>9.3f}" for v in [*values, sum(values) / len(values)])
        difference = interval([found[ours] - found[name] for found in results])
        lines.append(f"  {name:<26}{cells}    {'' if name == ours else difference}")
    return "\n".join(lines)


def draw(learned: dict[str, list[Learned]], path: Path, args: Args) -> None:
    """Validation losses along the outer steps, and the schedules that were learned."""
    figure = matplotlib.figure.Figure(figsize=(7.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, (name, of_task) in enumerate(learned.items()):
        for i, found in enumerate(of_task):
            label = name if i == 0 else None
            left.plot(found.losses, color=f"C{k}", lw=0.9, label=label)
            steps = torch.linspace(0, args.steps, args.knots).tolist()
            rates = found.hyper["log_lr"].exp().tolist()
            right.plot(steps, rates, color=f"C{k}", lw=0.9, label=label)
    left.set(xlabel="outer step", ylabel="validation loss after training", yscale="log")
    right.set(xlabel="inner step", ylabel="learned rate of Adam", yscale="log")
    left.legend()
    figure.savefig(path, dpi=150)


class Results(NamedTuple):
    """Test accuracies by task and seed; AUC by seed; what was learned."""

    accuracies: dict[str, list[dict[str, float]]]
    tells: list[dict[str, float]]
    learned: dict[str, list[Learned]]


def run(args: Args) -> Results:
    names = ("labels", "sensors") if args.task == "both" else (args.task,)
    results = Results({name: [] for name in names}, [], {name: [] for name in names})
    for name in names:
        for seed in range(args.seed, args.seed + args.seeds):
            began = time.process_time()
            checkpoint = Path(args.resume) / f"{name}-{seed}.pt" if args.resume else None
            # disable=None: no bar where standard error is not a terminal.
            with tqdm(desc=f"{name}, seed {seed}", unit="step", disable=None) as bar:
                if name == "labels":
                    data = corrupted_labels(seed)
                    learned = learn(data.task, args, seed, checkpoint, bar)
                    found, tells = compare_labels(args, seed, learned, data)
                    results.tells.append(tells)
                else:
                    task = sensors(seed)
                    learned = learn(task, args, seed, checkpoint, bar)
                    found = compare_sensors(args, seed, learned, task)
            results.accuracies[name].append(found)
            results.learned[name].append(learned)
            cells = ", ".join(f"{way} {a:.3f}" for way, a in found.items())
            tqdm.write(
                f"{name}, seed {seed}: {cells}; "
                f"{time.process_time() - began:.0f} s of processor time"
            )
    return results


def report(results: Results, first: int = 0) -> str:
    parts = [
        table(f"{name}: test accuracy", found, "learned", first)
        for name, found in results.accuracies.items()
    ]
    if results.tells:
        parts.append(table("labels: AUC of wrong ones", results.tells, "learned", first))
    return "\n\n".join(parts)


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
    print(report(outcome, settings.seed))
    if settings.out:
        draw(outcome.learned, Path(settings.out), settings)
