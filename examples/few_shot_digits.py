"""Few-shot learning of scikit-learn's digits, 3-way 5-shot: MAML with learned per-parameter rates
against pre-training, and MAML, FOMAML, iMAML, ANIL and Reptile in one table.

    python examples/few_shot_digits.py                     # MAML with learned rates, five splits
    python examples/few_shot_digits.py --compare methods   # the five methods, five splits
    python examples/few_shot_digits.py --splits 1          # one split only

Six of the ten classes are for training; rotations and flips make 48 of them. The other four are for
testing, with unchanged images. A task has three classes, with five images of each to adapt to and
fifteen of each to test on. Three ways are compared:

(a) an initialisation and one learning rate per parameter, meta-learned through five inner steps
    (Finn et al. 2017, MAML; Li et al. 2017, Meta-SGD),
(b) ordinary pre-training on the same 48 classes, with a new head,
(c) a random initialisation.

(b) and (c) adapt all layers with the best rate of a grid. That rate is chosen *on the test tasks
themselves*, separately for each number of steps, which favours the baselines.

``--compare methods`` learns an initialisation by each of `METHODS`, with one inner rate for all
parameters and the same outer optimizer. Each is one class: what adapts, what the inner loss is, and
how the loop is differentiated.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

import matplotlib.figure
import scipy.stats
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import innerloop
from innerloop.strategy import solvers

Named = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Args:
    """The settings of a run."""

    compare: str = "baselines"
    """``baselines`` or ``methods``."""
    splits: int = 5
    test_classes: int = 4
    ways: int = 3
    shots: int = 5
    queries: int = 15
    inner_steps: int = 5
    """The number of steps that (a) is trained for."""
    inner_lr: float = 0.1
    """Where the learned rates start, with ``compare="baselines"``."""
    iterations: int = 600
    tasks: int = 16
    """Tasks per outer step, in one vmap."""
    outer_lr: float = 2e-3
    width: int = 64
    depth: int = 3
    pretrain_iterations: int = 1500
    test_tasks: int = 200
    plot: str = ""
    """Draw accuracy over the number of steps into this file."""
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


# -- MAML and its relatives ------------------------------------------------------------------------


class MAML:
    """Finn et al. 2017: the exact derivative of the query loss through the inner steps.

    A derived class is another method. It changes what adapts, the inner loss or the strategy. Inner
    rates were chosen, one for each method, on two class splits that are not in the table.
    """

    inner_lr: ClassVar = 0.3
    strategy: ClassVar[innerloop.strategy.Strategy] = innerloop.StoreAll()
    wrt: ClassVar[tuple[str, ...]] = ("params",)

    def __init__(self, call: Callable[[Named, Tensor], Tensor], args: Args) -> None:
        self.call, self.args, self.inner_steps = call, args, args.inner_steps
        self.problem = innerloop.Problem(self.loss, innerloop.optim.sgd(lr=self.inner_lr))

    def loss(self, params: Named, hyper: Named, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The inner loss."""
        return F.cross_entropy(self.call(params, batch[0]), batch[1])

    def split(self, meta: Named) -> tuple[Named, Named]:
        """What adapts, and what the inner loss reads besides."""
        return meta, {}

    def whole(self, params: Named, hyper: Named) -> Named:
        """The parameters of the network after adaptation."""
        return params

    def metagradient(self, task: Tasks, meta: Named) -> tuple[Tensor, Named]:
        """Value and gradient of one task."""

        def outer(traj: innerloop.Trajectory, hyper: Named) -> Tensor:
            return F.cross_entropy(
                self.call(self.whole(traj.params, hyper), task.query_x), task.query_y
            )

        params, hyper = self.split(meta)
        value, grads = innerloop.metagradient(
            outer,
            self.problem,
            params,
            [(task.x, task.y)] * self.inner_steps,
            hyper=hyper,
            wrt=self.wrt,
            strategy=self.strategy,
        )
        return value, {name: g for kind in self.wrt for name, g in grads[kind].items()}

    def accuracy(self, task: Tasks, meta: Named) -> Tensor:
        """Query accuracy ``[TEST_STEPS]`` after each number of steps."""
        params, hyper = self.split(meta)
        with torch.no_grad():
            traj = innerloop.unroll(
                self.problem, params, [(task.x, task.y)] * max(TEST_STEPS), hyper=hyper
            )
            found = [
                self.call(self.whole(traj.at(t).params, hyper), task.query_x).argmax(-1)
                for t in TEST_STEPS
            ]
        return torch.stack([(p == task.query_y).float().mean() for p in found])


class FOMAML(MAML):
    """Finn et al. 2017, first order: inner gradients are constants of the derivative."""

    inner_lr = 1.0
    strategy = innerloop.FirstOrder()


class ANIL(MAML):
    """Raghu et al. 2020: only the head adapts. The body is an outer variable of the inner loss."""

    inner_lr = 3.0
    wrt = ("params", "hyper")

    def loss(self, params: Named, hyper: Named, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss({**hyper, **params}, hyper, batch)

    def split(self, meta: Named) -> tuple[Named, Named]:
        head = {name: p for name, p in meta.items() if name.startswith("head")}
        return head, {name: p for name, p in meta.items() if name not in head}

    def whole(self, params: Named, hyper: Named) -> Named:
        return {**hyper, **params}


class IMAML(MAML):
    """Rajeswaran et al. 2019: a proximal term ties a task's solution to the initialisation, and the
    derivative is that of the solution.

    The solution depends on the initialisation through the inner loss, so the initialisation enters
    in ``hyper``. There are three times as many steps, to come nearer to the solution. The paper
    solves the linear system by five iterations of conjugate gradients; the Hessian of this network
    is indefinite even with the proximal term, which CG refuses, so it is ten of GMRES here.
    """

    inner_lr = 0.1
    strength: ClassVar = 1.0
    strategy = innerloop.Implicit(
        solvers.GMRES(max_iterations=10, must_converge=False), tolerance=math.inf
    )
    wrt = ("hyper",)

    def __init__(self, call: Callable[[Named, Tensor], Tensor], args: Args) -> None:
        super().__init__(call, args)
        self.inner_steps = 3 * args.inner_steps

    def loss(self, params: Named, hyper: Named, batch: tuple[Tensor, Tensor]) -> Tensor:
        distance = sum((p - hyper[name]).square().sum() for name, p in params.items())
        return super().loss(params, hyper, batch) + self.strength / 2 * distance

    def split(self, meta: Named) -> tuple[Named, Named]:
        return meta, meta


class Reptile(MAML):
    """Nichol et al. 2018: the way that plain training goes stands for the gradient. No derivative
    of anything is taken. The query images of a task are minibatches like its support set.
    """

    inner_lr = 0.03

    def metagradient(self, task: Tasks, meta: Named) -> tuple[Tensor, Named]:
        ways, shots = self.args.ways, self.args.shots
        query = [q.unflatten(0, (ways, -1)).split(shots, 1) for q in (task.query_x, task.query_y)]
        later = [(x.flatten(0, 1), y.flatten()) for x, y in zip(*query, strict=True)]
        cycle = itertools.cycle([(task.x, task.y), *later])
        batches = list(itertools.islice(cycle, self.inner_steps))
        adapted = innerloop.unroll(self.problem, meta, batches).params
        value = F.cross_entropy(self.call(adapted, task.query_x), task.query_y)
        return value, {name: p - adapted[name] for name, p in meta.items()}


METHODS = {"MAML": MAML, "FOMAML": FOMAML, "iMAML": IMAML, "ANIL": ANIL, "Reptile": Reptile}


def learn(method: MAML, start: Named, split: Split, bar: tqdm) -> Named:
    """An initialisation: Adam along the method's gradient, averaged over the tasks of a step."""
    args = method.args
    generator = torch.Generator().manual_seed(args.seed)
    meta = {name: p.clone().requires_grad_() for name, p in start.items()}
    optimizer = torch.optim.Adam(meta.values(), lr=args.outer_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations)
    for _ in range(args.iterations):
        tasks = sample(split.train, args.tasks, args, generator)
        constant = {name: p.detach() for name, p in meta.items()}
        value, grads = innerloop.map_tasks(method.metagradient, tasks, constant, reduce="mean")
        optimizer.zero_grad()
        innerloop.assign(meta, grads)
        optimizer.step()
        schedule.step()
        bar.set_postfix(query_loss=f"{value:.3f}")
        bar.update()
    return {name: p.detach() for name, p in meta.items()}


def compare_split(args: Args, number: int) -> dict[str, Tensor]:
    """Accuracies ``[tasks, TEST_STEPS]`` of all methods on the same test tasks."""
    torch.manual_seed(args.seed + number)
    split, learner = Split(args, number), Learner(args)
    tasks = sample(
        split.test, args.test_tasks, args, torch.Generator().manual_seed(args.seed + 1000 + number)
    )
    results: dict[str, Tensor] = {}
    with tqdm(total=args.iterations * len(METHODS), unit="step", disable=None) as bar:
        for name, kind in METHODS.items():
            bar.set_description(f"split {number}: {name}")
            method = kind(learner.call, args)
            meta = learn(method, learner.start, split, bar)
            results[name] = innerloop.map_tasks(method.accuracy, tasks, meta, chunk_size=50)
    return results


# -- tables, and the command line ------------------------------------------------------------------


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


def methods_table(results: dict[str, Tensor], args: Args) -> str:
    """Accuracy of each method, with 95 % t intervals over the splits, and what separates the rest
    from MAML."""
    lines = [f"{'inner steps':<24}" + "".join(f"{t:>18}" for t in TEST_STEPS)]
    by_split = {name: a.unflatten(0, (args.splits, -1)).mean(1) for name, a in results.items()}
    for name, accuracy in by_split.items():
        cells = [f"{a.mean():.3f} ± {t_interval(a):.3f}" for a in accuracy.unbind(1)]
        lines.append(f"{name:<24}" + "".join(f"{cell:>18}" for cell in cells))
    for name in list(by_split)[1:]:
        cells = [
            f"{d.mean():+.3f} ± {t_interval(d):.3f}"
            for d in (by_split[name] - by_split["MAML"]).unbind(1)
        ]
        lines.append(f"{name + ' minus MAML':<24}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(
        [*lines, f"({args.splits} splits of {args.test_tasks} tasks; intervals over splits)"]
    )


def t_interval(values: Tensor) -> float:
    """Half width of the 95 % interval of the mean of a few values, by Student's t."""
    if len(values) < 2:
        return math.nan
    factor = scipy.stats.t.ppf(0.975, len(values) - 1)
    return float(factor * values.std() / len(values) ** 0.5)


def draw(results: dict[str, Tensor], path: Path) -> None:
    """Draw accuracy over the number of steps, with 95 % intervals over tasks."""
    figure = matplotlib.figure.Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, accuracy) in enumerate(results.items()):
        mean, half = zip(*[interval(a) for a in accuracy.unbind(1)], strict=True)
        places = [k + 0.06 * (i - len(results) / 2) for k in range(len(TEST_STEPS))]
        axes.errorbar(places, mean, half, fmt="o-", ms=4, lw=1, capsize=3, label=name)
    axes.set_xticks(range(len(TEST_STEPS)), map(str, TEST_STEPS))
    axes.set(xlabel="inner steps", ylabel="accuracy on new classes")
    axes.legend()
    figure.savefig(path, dpi=150)


def run(args: Args) -> dict[str, Tensor]:
    """All splits; returns accuracies ``[splits * tasks, TEST_STEPS]``."""
    one_split = {"baselines": run_split, "methods": compare_split}[args.compare]
    results: list[dict[str, Tensor]] = []
    for number in range(args.splits):
        began = time.perf_counter()
        results.append(one_split(args, number))
        cells = ", ".join(
            f"{name} {a[:, TEST_STEPS.index(5)].mean():.3f}" for name, a in results[-1].items()
        )
        tqdm.write(f"split {number}: after 5 steps {cells}; {time.perf_counter() - began:.0f} s")
    found = {name: torch.cat([r[name] for r in results]) for name in results[0]}
    if args.plot:
        draw(found, Path(args.plot))
    return found


def parse(argv: list[str] | None = None) -> Args:
    """Each field of `Args` as an option."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    choices = {"compare": ("baselines", "methods")}
    for field in dataclasses.fields(Args):
        default = field.default
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(default),
            default=default,
            choices=choices.get(field.name),
        )
    return Args(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    settings = parse()
    began = time.process_time()
    written = methods_table if settings.compare == "methods" else table
    print(written(run(settings), settings))
    print(f"{time.process_time() - began:.0f} s of processor time")
