"""Do the scores of `innerloop.attribute` predict real retraining? Beside TracIn, on digits.

`python -m benchmarks.retrain` prints a Markdown table. 300 training digits, 12 held-out digits as
queries; 60 retrainings leave out 1 to 5 % of the examples each (12 for each share). The figure is
Spearman's rank correlation of predicted and real change of a query's loss over the retrainings, the
mean over the queries. TracIn (Pruthi et al. 2020) is the sum over the steps of the rate times the
product of the gradients of example and query, at the parameters of the step, for the examples drawn
in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import innerloop
from benchmarks import machine
from innerloop.inspect._attribution import _rank_correlation

EXAMPLES, QUERIES, BATCH, SHARES, EACH = 300, 12, 32, (0.01, 0.02, 0.03, 0.04, 0.05), 12
Params = Mapping[str, Tensor]


class Case(NamedTuple):
    """One training."""

    name: str
    hidden: int
    rule: Callable[[], innerloop.optim.Optimizer]
    rate: float
    steps: int


CASES = {
    "logistic": Case(
        "logistic regression, SGD, T = 200", 0, lambda: innerloop.optim.sgd(lr=0.5), 0.5, 200
    ),
    "mlp": Case("MLP 64-32-10, SGD, T = 200", 32, lambda: innerloop.optim.sgd(lr=0.2), 0.2, 200),
    "adam": Case(
        "MLP 64-32-10, Adam, T = 200", 32, lambda: innerloop.optim.adam(lr=3e-3), 3e-3, 200
    ),
    "chaotic": Case(
        "MLP 64-32-10, Adam at .1, T = 500", 32, lambda: innerloop.optim.adam(lr=0.1), 0.1, 500
    ),
}


class Digits(NamedTuple):
    """Training and held-out digits, with the labels that training sees."""

    x: Tensor
    y: Tensor
    true: Tensor
    xq: Tensor
    yq: Tensor


def digits(mislabelled: float = 0.0, queries: int = QUERIES) -> Digits:
    """Training digits, some of whose labels are wrong, and held-out ones."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float64) / 16
    y = torch.tensor(data.target)
    g = torch.Generator().manual_seed(3)
    order = torch.randperm(len(x), generator=g)
    train, held = order[:EXAMPLES], order[EXAMPLES : EXAMPLES + queries]
    labels = y[train].clone()
    wrong = torch.randperm(EXAMPLES, generator=g)[: round(mislabelled * EXAMPLES)]
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=g)) % 10
    return Digits(x[train], labels, y[train], x[held], y[held])


def logits(params: Params, x: Tensor) -> Tensor:
    """The network, or without a hidden layer the linear model."""
    h = (x @ params["a"] + params["b"]).tanh() if "a" in params else x
    return h @ params["w"] + params["c"]


def start(hidden: int) -> dict[str, Tensor]:
    """First parameters."""
    g = torch.Generator().manual_seed(0)
    last = hidden or 64
    params = {
        "w": torch.randn(last, 10, generator=g, dtype=torch.float64) / last**0.5,
        "c": torch.zeros(10, dtype=torch.float64),
    }
    if hidden:
        params["a"] = torch.randn(64, hidden, generator=g, dtype=torch.float64) / 8
        params["b"] = torch.zeros(hidden, dtype=torch.float64)
    return params


def drawn(steps: int) -> list[Tensor]:
    """The examples of each step."""
    g = torch.Generator().manual_seed(1)
    return [torch.randint(EXAMPLES, (BATCH,), generator=g) for _ in range(steps)]


def trace(case: Case, data: Digits) -> innerloop.inspect.Attribution:
    """The exact scores."""

    def loss(params: Params, hyper: object, i: Tensor) -> Tensor:
        return F.cross_entropy(logits(params, data.x[i]), data.y[i], reduction="none")

    def outcomes(params: Params) -> Tensor:
        return F.cross_entropy(logits(params, data.xq), data.yq, reduction="none")

    return innerloop.attribute(
        outcomes,
        innerloop.Problem(loss, case.rule()),
        start(case.hidden),
        drawn(case.steps),
        hyper={"weights": torch.ones(EXAMPLES, dtype=torch.float64)},
        index=lambda i: i,
    )


def tracin(case: Case, data: Digits) -> Tensor:
    """The scores of TracIn, by plain PyTorch: rate times product of gradients, over the steps."""
    params = {n: p.clone().requires_grad_() for n, p in start(case.hidden).items()}
    optimizer = (
        torch.optim.SGD(params.values(), lr=case.rate)
        if case.rule().__class__ is innerloop.optim.sgd
        else torch.optim.Adam(params.values(), lr=case.rate)
    )

    def each(x: Tensor, y: Tensor) -> Tensor:
        """The gradient of every example, as a row."""

        def one(params: Params, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(logits(params, x[None]), y[None])

        at = {n: p.detach() for n, p in params.items()}
        grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(at, x, y)
        return torch.cat([g.flatten(1) for g in grads.values()], 1)

    scores = torch.zeros(QUERIES, EXAMPLES, dtype=torch.float64)
    for i in drawn(case.steps):
        products = each(data.xq, data.yq) @ each(data.x[i], data.y[i]).T
        scores.index_add_(1, i, -case.rate * products / BATCH)
        optimizer.zero_grad()
        F.cross_entropy(logits(params, data.x[i]), data.y[i]).backward()
        optimizer.step()
    return scores


def retrained(found: innerloop.inspect.Attribution) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Predicted and real changes of 60 retrainings, and what each left out."""
    predicted, kept, left_out = [], [], []
    g = torch.Generator().manual_seed(7)
    for share in SHARES:
        for _ in range(EACH):
            dropped = torch.randperm(EXAMPLES, generator=g)[: round(share * EXAMPLES)]
            weights = torch.ones(EXAMPLES, dtype=torch.float64)
            weights[dropped] = 0
            predicted.append(found.predicted(dropped))
            kept.append(weights)
            left_out.append(dropped)
    real = found.retrain(torch.stack(kept)) - found.losses
    return torch.stack(predicted), real, left_out


def correlation(predicted: Tensor, real: Tensor) -> float:
    """The mean rank correlation over the queries."""
    return float(
        torch.stack([_rank_correlation(a, b) for a, b in zip(predicted.T, real.T, strict=True)])
        .mean()
    )  # fmt: skip


def row(case: Case) -> Sequence[str]:
    """The figures of one training."""
    data = digits()
    found = trace(case, data)
    predicted, real, left_out = retrained(found)
    simple = tracin(case, data)
    rough = torch.stack([-simple[:, dropped].sum(1) for dropped in left_out])
    slope = float(((predicted * real).sum(0) / (predicted**2).sum(0)).median())
    checked = found.check()
    return [
        case.name,
        f"{correlation(predicted, real):.3f}",
        f"{correlation(rough, real):.3f}",
        f"{slope:.2f}",
        f"{float(checked.correlation.mean()):.3f}",
    ]


def draw(file: str) -> str:
    """Draw the most harmful digits of a training set with wrong labels; say how many are found."""
    from matplotlib.figure import Figure

    data = digits(mislabelled=0.1, queries=500)
    harm = trace(CASES["mlp"], data).scores.mean(0)
    wrong = data.y != data.true
    count = int(wrong.sum())
    order = harm.argsort(descending=True)
    found = int(wrong[order[:count]].sum())
    figure = Figure(figsize=(9.6, 5.4), facecolor="white", layout="constrained")
    for ax, i in zip(figure.subplots(3, 8).flat, order.tolist(), strict=False):
        ax.imshow(data.x[i].view(8, 8), cmap="gray_r")
        ax.set_xticks([]), ax.set_yticks([])
        title = f"labelled {int(data.y[i])}"
        if wrong[i]:
            title += f"\nis a {int(data.true[i])}"
        colour = "#D55E00" if wrong[i] else "#222222"
        ax.set_title(title, fontsize=10, color=colour)
        for spine in ax.spines.values():
            spine.set_color(colour)
    figure.savefig(file, dpi=100)
    return (
        f"{count} of {EXAMPLES} labels are wrong; of the {count} most harmful examples {found} have"
        f" a wrong label, of the 24 in the picture {int(wrong[order[:24]].sum())}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--picture", metavar="FILE", help="draw the most harmful digits instead")
    options = parser.parse_args()
    only = options.only
    torch.set_num_threads(1)
    if options.picture:
        print(draw(options.picture))
        return
    facts = machine.describe()
    print(f"{facts['date']}, {facts['machine']}, torch {facts['torch']}")
    print("\n| training | scores | TracIn | real over predicted | `.check()`, 16 trainings |")
    print("|---|---|---|---|---|")
    for name, case in CASES.items():
        if only in (None, name):
            print(f"| {' | '.join(row(case))} |", flush=True)


if __name__ == "__main__":
    main()
