"""A learned optimizer, meta-trained through unrolled training, against tuned SGD: random quadratics
and scikit-learn's digits.

    python examples/learned_optimizer.py                       # both families, two minutes
    python examples/learned_optimizer.py --family quadratics   # one of them

A network with a few hundred weights is the optimizer. For one entry of one parameter at a time, it
sees the gradient and its averages over several time scales, and says how far that entry moves
(Andrychowicz et al. 2016; features as in Metz et al. 2020). Its weights are trained by the exact
derivative of the losses along a short training run, over many random tasks at once.

The baselines are SGD, SGD with momentum and Adam. Each gets the best setting of a grid, chosen on
training tasks of the same family by the number that is reported. All are compared on the same
held-out tasks, after the same number of steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

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

    family: str = "both"
    """``quadratics``, ``digits`` or ``both``."""
    steps: int = 30
    """Inner steps that the optimizer is trained for."""
    test_steps: int = 30
    """Steps after which all are compared, and for which the baselines are tuned."""
    iterations: int = 150
    tasks: int = 16
    """Tasks per outer step, in one vmap."""
    outer_lr: float = 1e-2
    hidden: int = 16
    """Width of the network that is the optimizer."""
    tuning_tasks: int = 128
    """Training tasks on which the settings of the baselines are picked."""
    test_tasks: int = 256
    seed: int = 0


# -- the optimizer ---------------------------------------------------------------------------------

TIME_SCALES = (0.0, 0.5, 0.9, 0.97)
"""Decays of the averages of the gradient; the first is the gradient itself."""


def first_state(param: Tensor) -> dict[str, Any]:
    means = torch.zeros(len(TIME_SCALES), *param.shape)
    return {"step": 0, "means": means, "square": torch.zeros_like(param), "first": torch.zeros(())}


def rule(
    grad: Tensor, param: Tensor, state: dict[str, Any], weights: Named
) -> tuple[Tensor, dict[str, Any]]:
    """One entry at a time: features of its gradients in, direction and length of its move out."""
    step = state["step"] + 1
    decay = torch.tensor(TIME_SCALES).reshape(-1, *[1] * param.ndim)
    means = decay * state["means"] + (1 - decay) * grad
    square = 0.95 * state["square"] + 0.05 * grad**2
    # As in Adam: averages that start at zero are corrected, and divided by the root mean square.
    root = (square / (1 - 0.95**step) + 1e-16).sqrt()
    relative = means / ((1 - decay**step) * root)
    size = ((grad**2).mean() + 1e-16).log() / 2
    first = size if step == 1 else state["first"]
    common = torch.stack(
        [(size - first) / 3, torch.full((), step / 20), torch.exp(torch.full((), -step / 3))]
    )
    features = torch.cat(
        [relative, param[None], common.reshape(-1, *[1] * param.ndim).expand(-1, *param.shape)]
    )
    features = features.movedim(0, -1)
    hidden = (features @ weights["in"] + weights["bias"]).tanh()
    direction, length = (
        hidden @ weights["out"] + features @ weights["direct"] + weights["rate"]
    ).unbind(-1)
    change = -length.exp() * (relative[2] + direction)
    return change, {"step": step, "means": means, "square": square, "first": first}


def first_weights(args: Args) -> Named:
    generator = torch.Generator().manual_seed(args.seed)
    features = len(TIME_SCALES) + 4
    return {
        "in": torch.randn(features, args.hidden, generator=generator) / features**0.5,
        "bias": torch.zeros(args.hidden),
        "out": torch.zeros(args.hidden, 2),
        "direct": torch.zeros(features, 2),
        "rate": torch.tensor([0.0, math.log(0.03)]),
    }


# -- two families of tasks -------------------------------------------------------------------------


class Family(NamedTuple):
    """Tasks, stacked over the first dimension.

    Attributes:
        sample: ``sample(count, held_out, generator)``: tasks.
        start: ``start(task)``: the parameters before training.
        batch: ``batch(task, t)``: what step t sees.
        loss: ``loss(params, batch)``.
        judge: ``judge(params, task)``: the loss that counts, of which logarithms are averaged.
    """

    sample: Callable[[int, bool, torch.Generator], Any]
    start: Callable[[Any], Named]
    batch: Callable[[Any, int], Any]
    loss: Callable[[Named, Any], Tensor]
    judge: Callable[[Named, Any], Tensor]


class Quadratic(NamedTuple):
    hessian: Tensor
    minimum: Tensor
    start: Tensor


def quadratics(dimension: int = 10) -> Family:
    """(x - c)ᵀ A (x - c) / 2: eigenvalues of A between s/100 and s, log-uniform, and s between .1
    and 10 from task to task."""

    def sample(count: int, held_out: bool, generator: torch.Generator) -> Quadratic:
        basis = torch.linalg.qr(torch.randn(count, dimension, dimension, generator=generator))[0]
        scale = 100 ** (torch.rand(count, 1, generator=generator) - 0.5)
        eigenvalues = scale * 100 ** -torch.rand(count, dimension, generator=generator)
        hessian = basis @ (eigenvalues[..., None] * basis.transpose(1, 2))
        minimum, start = torch.randn(2, count, dimension, generator=generator).unbind()
        return Quadratic(hessian, minimum, start)

    def loss(params: Named, task: Quadratic) -> Tensor:
        away = params["x"] - task.minimum
        return away @ task.hessian @ away / 2

    return Family(sample, lambda task: {"x": task.start}, lambda task, t: task, loss, loss)


class Digits(NamedTuple):
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    noise: Tensor


def digits(steps: int, batch_size: int = 32, width: int = 16) -> Family:
    """A perceptron 64-16-10 on digits. Training tasks are made of one half of the images, held-out
    tasks of the other."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    sizes = {"w1": (64, width), "b1": (width,), "w2": (width, 10), "b2": (10,)}
    total = sum(math.prod(size) for size in sizes.values())

    def sample(count: int, held_out: bool, generator: torch.Generator) -> Digits:
        half = halves[held_out]
        drawn = half[torch.rand(count, len(half), generator=generator).argsort(1)]
        rows = torch.randint(500, (count, steps, batch_size), generator=generator)
        seen = drawn[torch.arange(count)[:, None, None], rows]
        unseen = drawn[:, 500:]
        noise = torch.randn(count, total, generator=generator)
        return Digits(images[seen], labels[seen], images[unseen], labels[unseen], noise)

    def start(task: Digits) -> Named:
        pieces = task.noise.split([math.prod(size) for size in sizes.values()])
        return {
            name: piece.reshape(size) / size[0] ** 0.5
            if len(size) == 2
            else torch.zeros_like(piece)
            for (name, size), piece in zip(sizes.items(), pieces, strict=True)
        }

    def predict(params: Named, x: Tensor) -> Tensor:
        return (x @ params["w1"] + params["b1"]).relu() @ params["w2"] + params["b2"]

    return Family(
        sample,
        start,
        lambda task, t: (task.x[t], task.y[t]),
        lambda params, batch: F.cross_entropy(predict(params, batch[0]), batch[1]),
        lambda params, task: F.cross_entropy(predict(params, task.test_x), task.test_y),
    )


# -- training and testing --------------------------------------------------------------------------


def problem_of(family: Family, optimizer: innerloop.optim.Optimizer) -> innerloop.Problem:
    """``hyper`` holds the overrides of the optimizer: the weights of the learned one, the rate of
    another."""
    return innerloop.Problem(
        lambda params, hyper, batch: family.loss(params, batch),
        optimizer,
        optimizer_hyper=lambda hyper, t: hyper,
    )


def meta_train(args: Args, family: Family, bar: tqdm) -> Named:
    """The weights of the optimizer, by Adam on the mean log loss along the inner run."""
    problem = problem_of(family, innerloop.optim.learned(rule, init=first_state))
    weights = first_weights(args)
    generator = torch.Generator().manual_seed(args.seed)
    outer_optimizer = torch.optim.Adam(list(weights.values()), lr=args.outer_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer_optimizer, args.iterations)

    def of_task(weights: Named, task: Any) -> tuple[Tensor, Named]:
        def outer(traj: innerloop.Trajectory, _: Any) -> Tensor:
            final = family.judge(traj.params, task)
            return (traj.losses + 1e-12).log().mean() + (final + 1e-12).log()

        batches = [family.batch(task, t) for t in range(args.steps)]
        value, grads = innerloop.metagradient(
            outer, problem, family.start(task), batches, hyper={"weights": weights}, wrt="hyper"
        )
        return value, grads["weights"]

    for _ in range(args.iterations):
        tasks = family.sample(args.tasks, False, generator)
        value, grads = torch.func.vmap(of_task, in_dims=(None, 0))(weights, tasks)
        # One task whose run explodes must not decide the direction: the gradient of each is scaled
        # to length 1 at most.
        length = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        share = length.clamp(min=1).reciprocal().nan_to_num(0.0)
        for name, weight in weights.items():
            weight.grad = (
                torch.einsum("n,n...->...", share, grads[name].nan_to_num(0.0)) / args.tasks
            )
        outer_optimizer.step()
        schedule.step()
        bar.set_postfix(outer_loss=f"{value.mean():.3f}")
        bar.update()
    return weights


def final_losses(
    args: Args,
    family: Family,
    optimizer: innerloop.optim.Optimizer,
    hyper: dict[str, Any],
    tasks: Any,
) -> Tensor:
    """log10 of the judged loss after training, for each task."""
    problem = problem_of(family, optimizer)

    def of_task(task: Any) -> Tensor:
        batches = [family.batch(task, t) for t in range(args.test_steps)]
        params = innerloop.unroll(problem, family.start(task), batches, hyper=hyper).params
        return family.judge(params, task)

    with torch.no_grad():
        return torch.func.vmap(of_task)(tasks).nan_to_num(1e9, 1e9).clamp(1e-12, 1e9).log10()


RATES = tuple(round(10 ** (k / 4), 4) for k in range(-12, 5))
GRIDS: dict[str, list[Any]] = {
    "SGD": [innerloop.optim.sgd()],
    "SGD, momentum": [innerloop.optim.sgd(momentum=m) for m in (0.5, 0.8, 0.9, 0.95, 0.99)],
    "Adam": [innerloop.optim.adam(betas=(b, 0.999)) for b in (0.5, 0.9)],
}


def tuned(args: Args, family: Family, grid: list[Any], tasks: Any) -> innerloop.optim.Optimizer:
    """The optimizer of the grid, with one of `RATES`, whose mean on these tasks is best."""
    found = []
    for optimizer in grid:
        score = torch.func.vmap(
            lambda rate, o=optimizer: final_losses(args, family, o, {"lr": rate}, tasks).mean()
        )
        scores = score(torch.tensor(RATES))
        found.append(
            (scores.min().item(), dataclasses.replace(optimizer, lr=RATES[int(scores.argmin())]))
        )
    return min(found, key=lambda candidate: candidate[0])[1]


class Result(NamedTuple):
    """log10 of the judged loss ``[test_tasks]`` per optimizer, and which setting the grids
    chose."""

    losses: dict[str, Tensor]
    chosen: dict[str, str]
    seconds: float


def run_family(args: Args, name: str) -> Result:
    began = time.perf_counter()
    family = quadratics() if name == "quadratics" else digits(max(args.steps, args.test_steps))
    # disable=None: no bar where standard error is not a terminal, so that a log stays readable.
    with tqdm(
        total=args.iterations, desc=f"{name}: meta-training", unit="step", disable=None
    ) as bar:
        weights = meta_train(args, family, bar)
    training = family.sample(args.tuning_tasks, False, torch.Generator().manual_seed(args.seed + 1))
    testing = family.sample(args.test_tasks, True, torch.Generator().manual_seed(args.seed + 2))
    learned = innerloop.optim.learned(rule, init=first_state)
    losses = {"learned": final_losses(args, family, learned, {"weights": weights}, testing)}
    chosen: dict[str, str] = {}
    for kind, grid in GRIDS.items():
        opt = tuned(args, family, grid, training)
        chosen[kind] = repr(opt)
        losses[kind] = final_losses(args, family, opt, {}, testing)
    return Result(losses, chosen, time.perf_counter() - began)


def mean_and_error(values: Tensor) -> str:
    """Mean and standard error."""
    return f"{values.mean().item():+.3f} ± {values.std().item() / len(values) ** 0.5:.3f}"


def table(name: str, result: Result, args: Args) -> str:
    lines = [
        f"{name}: log10 of the loss after {args.test_steps} steps, {args.test_tasks} held-out "
        "tasks (mean ± standard error; median)"
    ]
    for kind, losses in result.losses.items():
        median = f"{losses.median().item():+.3f}"
        lines.append(
            f"  {kind:<27}{mean_and_error(losses):>16}{median:>9}   {result.chosen.get(kind, '')}"
        )
    for kind in result.chosen:
        difference = result.losses["learned"] - result.losses[kind]
        median, won = f"{difference.median().item():+.3f}", (difference < 0).float().mean().item()
        label = f"learned minus {kind}"
        lines.append(
            f"  {label:<27}{mean_and_error(difference):>16}{median:>9}   better on {won:.0%} of "
            "the tasks"
        )
    return "\n".join([*lines, f"  {result.seconds:.0f} s"])


def run(args: Args) -> dict[str, Result]:
    names = ("quadratics", "digits") if args.family == "both" else (args.family,)
    results = {}
    for name in names:
        results[name] = run_family(args, name)
        tqdm.write(table(name, results[name], args))
    return results


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
    print(
        f"rates of the grids: {', '.join(map(str, RATES))}; momenta .5, .8, .9, .95, .99; Adam's "
        "first beta .5, .9"
    )
    run(parse())
