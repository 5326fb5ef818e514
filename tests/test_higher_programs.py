"""What higher's two example programs do, written anew: the same numbers from the bridge and from
higher, in one process, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop.higher as bridge
from tests.higher_models import SEEDS, peer

TOLERANCE = 1e-5


@contextmanager
def same_random_numbers(seed: int) -> Iterator[None]:
    # On one thread: on several, sums are rounded in another order, which max-pooling and ReLU turn
    # into differences of 2e-4 in a meta-gradient.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(value, theirs[name], rtol=TOLERANCE, atol=TOLERANCE)


# -- few-shot learning with a small convolutional net ----------------------------------------------


def block(channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, 8, 3),
        nn.BatchNorm2d(8, momentum=1, affine=True),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 2),
    ]


def few_shot(
    library: Any, seed: int, ways: int = 5, tasks: int = 3, steps: int = 5
) -> dict[str, Tensor]:
    """Two rounds of MAML, then an evaluation without tracking: losses, meta-gradients, final
    weights and accuracy."""
    found: dict[str, Tensor] = {}
    with same_random_numbers(seed):
        net = nn.Sequential(*block(1), *block(8), nn.Flatten(), nn.Linear(200, ways))
        meta = torch.optim.Adam(net.parameters(), lr=1e-3)
        prototypes = torch.randn(ways, 1, 28, 28)

        def sample(shots: int) -> tuple[Tensor, Tensor]:
            labels = torch.arange(ways).repeat(shots)
            return prototypes[labels] + 0.5 * torch.randn(len(labels), 1, 28, 28), labels

        for round_ in range(2):
            inner = torch.optim.SGD(net.parameters(), lr=0.1)
            meta.zero_grad()
            for task in range(tasks):
                (x, y), (x_query, y_query) = sample(1), sample(2)
                with library.innerloop_ctx(net, inner, copy_initial_weights=False) as (
                    fnet,
                    diffopt,
                ):
                    for _ in range(steps):
                        diffopt.step(F.cross_entropy(fnet(x), y))
                    query = F.cross_entropy(fnet(x_query), y_query)
                    query.backward()
                found[f"query loss {round_}.{task}"] = query.detach()
            found.update(gradients(net, round_))
            if round_ == 0:
                meta.step()
        (x, y), (x_query, y_query) = sample(1), sample(2)
        with library.innerloop_ctx(
            net, torch.optim.SGD(net.parameters(), lr=0.1), track_higher_grads=False
        ) as (
            fnet,
            diffopt,
        ):
            for _ in range(steps):
                diffopt.step(F.cross_entropy(fnet(x), y))
            found["evaluation"] = fnet(x_query).detach()
    return found


def gradients(net: nn.Module, round_: int) -> dict[str, Tensor]:
    """All but those that are rounding: of the bias of a convolution before batch norm, of an offset
    of the energy."""
    found = {
        f"{name} grad {round_}": p.grad.clone()
        for name, p in net.named_parameters()
        if p.grad is not None
    }
    return {name: grad for name, grad in found.items() if grad.abs().max() > 1e-6}


@pytest.mark.parametrize("seed", SEEDS)
def test_few_shot_learning(seed: int) -> None:
    assert_same(few_shot(bridge, seed), few_shot(peer(), seed))


# -- learning an energy by minimising it over its argument -----------------------------------------


class Energy(nn.Module):
    """E(x, y) of an image and a proposed label."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 5), nn.Softplus(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 16)
        )
        self.head = nn.Sequential(nn.Linear(16 + classes, 16), nn.Softplus(), nn.Linear(16, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.cat([self.features(x), y], dim=1)).squeeze(1)


def energy_learning(
    library: Any, seed: int, rule: Any, classes: int = 4, steps: int = 5
) -> dict[str, Tensor]:
    """The label is found by unrolled descent on the energy, and the energy learns from the loss of
    that label."""
    found: dict[str, Tensor] = {}
    with same_random_numbers(seed):
        energy = Energy(classes)
        outer = torch.optim.Adam(energy.parameters(), lr=1e-3)
        for round_ in range(3):
            x, target = torch.randn(8, 1, 16, 16), torch.randint(classes, (8,))
            y = torch.zeros(8, classes, requires_grad=True)
            inner = library.get_diff_optim(rule([y]), [y], device=y.device)
            for _ in range(steps):
                (y,) = inner.step(energy(x, y).sum(), params=[y])
            loss = F.cross_entropy(y, target)
            outer.zero_grad()
            loss.backward()
            found[f"loss {round_}"] = loss.detach()
            found[f"label {round_}"] = y.detach()
            found.update(gradients(energy, round_))
            outer.step()
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "rule",
    [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)],
    ids=["sgd", "momentum"],
)
def test_learning_an_energy(seed: int, rule: Any) -> None:
    ours, theirs = energy_learning(bridge, seed, rule), energy_learning(peer(), seed, rule)
    assert_same(ours, theirs)
