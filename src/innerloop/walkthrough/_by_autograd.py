"""The second column: `innerloop.track` and `innerloop.inspect`, used as any program would."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from innerloop import inspect
from innerloop._track.track import track
from innerloop.walkthrough._quantities import ManySteps, Matrix, OneStep, Pair, System, TwoModels


class Model(nn.Module):
    """The seed's model: two scalar parameters, in float64."""

    def __init__(self, start: Pair) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(start[0], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(start[1], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the prediction ŷ."""
        return (self.a**2 + self.b**2) * x


def half_square(prediction: Tensor, system: System) -> Tensor:
    """Compute the loss."""
    return 0.5 * (prediction - system.y) ** 2


def one_step(system: System) -> OneStep:
    """Take one inner step inside `track`, then one outer step by the user's own optimizer."""
    x = torch.tensor(system.x, dtype=torch.float64)
    model = Model(system.start)
    optimizer = torch.optim.SGD(model.parameters(), lr=system.rate)
    with track(model, optimizer) as loop:
        prediction = loop.model(x)
        loss = half_square(prediction, system)
        (by_prediction,) = torch.autograd.grad(loss, prediction, retain_graph=True)
        gradient = torch.autograd.grad(
            loss, list(loop.parameters(time=0).values()), retain_graph=True
        )
        loop.step(loss)
        outer_loss = half_square(loop.model(x), system)
    updated = loop.parameters(time=1)
    by_updated = torch.autograd.grad(outer_loss, list(updated.values()), retain_graph=True)
    jacobian = inspect.jacobian(loop.trajectory, time=1, wrt=0)
    paths = inspect.paths(loop.trajectory, outer_loss, time=1, wrt=0)
    outer_loss.backward()
    outer_gradient = _gradient(model)
    optimizer.step()
    return OneStep(
        loss=loss.item(),
        loss_by_prediction=by_prediction.item(),
        gradient=_pair(gradient),
        updated=_pair(updated.values()),
        jacobian=_matrix(jacobian),
        outer_loss=outer_loss.item(),
        outer_by_updated=_pair(by_updated),
        paths=_matrix(paths.through),
        outer_gradient=outer_gradient,
        final=_pair(model.parameters()),
    )


def two_models(system: System) -> TwoModels:
    """Start the loop of m at M's parameters by `params=`.

    The outer gradient arrives at M, and m is left alone.
    """
    x = torch.tensor(system.x, dtype=torch.float64)
    meta_model, task_model = Model(system.start), Model(system.start)
    meta_optimizer = torch.optim.SGD(meta_model.parameters(), lr=system.rate)
    task_optimizer = torch.optim.SGD(task_model.parameters(), lr=system.rate)
    with track(task_model, task_optimizer, params=dict(meta_model.named_parameters())) as loop:
        loop.step(half_square(loop.model(x), system))
        outer_loss = half_square(loop.model(x), system)
    outer_loss.backward()
    outer_gradient = _gradient(meta_model)
    meta_optimizer.step()
    return TwoModels(outer_gradient, _pair(meta_model.parameters()), _pair(task_model.parameters()))


def many_steps(system: System, steps: int) -> ManySteps:
    """Run a longer loop: every pair of times can be asked for its derivative."""
    x = torch.tensor(system.x, dtype=torch.float64)
    model = Model(system.start)
    with track(model, torch.optim.SGD(model.parameters(), lr=system.rate)) as loop:
        for _ in range(steps):
            loop.step(half_square(loop.model(x), system))
    times = range(steps + 1)
    return ManySteps(
        points=tuple(_pair(loop.parameters(time=t).values()) for t in times),
        from_start=tuple(_matrix(inspect.jacobian(loop.trajectory, time=t, wrt=0)) for t in times),
        to_end=tuple(_matrix(inspect.jacobian(loop.trajectory, time=steps, wrt=t)) for t in times),
    )


def _pair(values: Iterable[Tensor]) -> Pair:
    a, b = (value.item() for value in values)
    return a, b


def _matrix(nested: dict[str, dict[str, Tensor]]) -> Matrix:
    return _pair(nested["a"].values()), _pair(nested["b"].values())


def _gradient(model: Model) -> Pair:
    """Return what `backward` left in `.grad`.

    A gradient that never arrived is shown as nan, so that the table disagrees.
    """
    a, b = (float("nan") if p.grad is None else p.grad.item() for p in (model.a, model.b))
    return a, b
