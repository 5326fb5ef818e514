"""The two questions that users of higher ask are answered when they bite, and only then."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop.higher as higher
from innerloop.errors import CapturedParameterWarning, UnreachedGradientWarning

X = torch.ones(3, 2)


def loss(fmodel: Any) -> Tensor:
    return fmodel(X).square().mean()


def episode(model: nn.Module, **options: Any) -> tuple[Any, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(model, optimizer, **options) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(loss(fmodel))
        return fmodel, loss(fmodel)


def untouched(model: nn.Module) -> bool:
    return all(p.grad is None for p in model.parameters())


# -- they bite -------------------------------------------------------------------------------------


def test_copied_initial_weights() -> None:
    model = nn.Linear(2, 1)
    _, outer = episode(model)
    with pytest.warns(UnreachedGradientWarning, match="copy_initial_weights=False") as caught:
        outer.backward()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert untouched(model)


def test_tracking_switched_off() -> None:
    model = nn.Linear(2, 1)
    _, outer = episode(model, copy_initial_weights=False, track_higher_grads=False)
    with pytest.warns(UnreachedGradientWarning, match="track_higher_grads=True") as caught:
        outer.backward()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert untouched(model)


@pytest.mark.parametrize(
    "options", [{}, {"copy_initial_weights": False, "track_higher_grads": False}]
)
def test_it_is_said_once_for_each_episode(options: dict[str, Any]) -> None:
    _, outer = episode(nn.Linear(2, 1), **options)
    with pytest.warns(UnreachedGradientWarning):
        outer.backward(retain_graph=True)
    outer.backward(retain_graph=True)


class Keeper:
    """An object of the user's own that holds a layer of the model."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


class Closes(nn.Module):
    """A function or an object kept as an attribute, or a hook, that holds a part of the model."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.last = nn.Linear(2, 2), nn.Linear(2, 1)
        self.way = way
        self.function: Any = None
        if way == "function":
            self.function = lambda x: self.hidden(x)
        if way == "object":
            self.function = Keeper(self.hidden)
        if way == "hook":
            self.hidden.register_forward_hook(
                lambda module, args, output: output + self.hidden.bias
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = (self.function or self.hidden)(x)
        return self.last(hidden + self.hidden.bias if self.way == "added" else hidden)


def test_weights_of_the_model_itself() -> None:
    model = Closes("object")
    with pytest.warns(
        CapturedParameterWarning, match=r"own parameter 'hidden\.(weight|bias)'"
    ) as caught:
        episode(model, copy_initial_weights=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("way", "same_as"), [("function", "plainly"), ("hook", "added")])
def test_functions_and_hooks_use_the_layers_of_the_copy(way: str, same_as: str) -> None:
    models = [Closes(way), Closes(same_as)]
    for model in models:
        _, outer = episode(model, copy_initial_weights=False)
        outer.backward()
    for p, truth in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, truth.grad)


def test_a_proximal_term() -> None:
    """Its starting point written in three ways: the model's own parameters (which could be a
    mistake), time 0, constants."""

    def pulled(start: Any) -> list[Any]:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (
            fmodel,
            diffopt,
        ):
            for _ in range(2):
                pull = sum(
                    (p - q).square().sum()
                    for p, q in zip(fmodel.parameters(), start(model, fmodel), strict=True)
                )
                diffopt.step(loss(fmodel) + pull)
            loss(fmodel).backward()
        return [p.grad for p in model.parameters()]

    with pytest.warns(CapturedParameterWarning, match="proximal"):
        expected = pulled(lambda model, fmodel: model.parameters())
    found = pulled(lambda model, fmodel: fmodel.parameters(time=0))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    pulled(lambda model, fmodel: [p.detach() for p in model.parameters()])


def test_by_hand_too() -> None:
    fmodel = higher.monkeypatch(nn.Linear(2, 1))
    grads = torch.autograd.grad(loss(fmodel), list(fmodel.parameters()), create_graph=True)
    fmodel.fast_params = [p - 0.1 * g for p, g in zip(fmodel.parameters(), grads, strict=True)]
    with pytest.warns(UnreachedGradientWarning, match="copies"):
        loss(fmodel).backward()


# -- right use is silent (a warning in a test is an error) -----------------------------------------


def test_the_gradient_of_the_model() -> None:
    model = nn.Linear(2, 1)
    episode(model, copy_initial_weights=False)[1].backward()
    assert not untouched(model)


def test_autograd_grad_of_anything() -> None:
    fmodel, outer = episode(nn.Linear(2, 1))
    torch.autograd.grad(outer, list(fmodel.parameters(time=0)))
    for copied in (True, False):
        fmodel, outer = episode(
            nn.Linear(2, 1), copy_initial_weights=copied, track_higher_grads=False
        )
        torch.autograd.grad(outer, list(fmodel.parameters()))


def test_evaluation() -> None:
    for copied in (True, False):
        for tracked in (True, False):
            _, outer = episode(
                nn.Linear(2, 1), copy_initial_weights=copied, track_higher_grads=tracked
            )
            assert outer.item() >= 0


def test_who_asks_for_the_copies_reads_their_grad() -> None:
    for ask in (lambda f: list(f.parameters(time=0)), lambda f: f.init_fast_params):
        fmodel, outer = episode(nn.Linear(2, 1))
        start = ask(fmodel)
        outer.backward()
        assert all(p.grad is not None for p in start)


def test_before_the_first_step_the_copies_are_the_parameters() -> None:
    for tracked in (True, False):
        fmodel = higher.monkeypatch(nn.Linear(2, 1), track_higher_grads=tracked)
        loss(fmodel).backward()
        assert all(p.grad is not None for p in fmodel.parameters())


@pytest.mark.parametrize("at_step", [True, False])
def test_a_learned_setting(at_step: bool) -> None:
    model, rate = nn.Linear(2, 1), torch.tensor(0.1, requires_grad=True)
    override = {"lr": [rate]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer, override=None if at_step else override) as (
        fmodel,
        diffopt,
    ):
        diffopt.step(loss(fmodel), override=override if at_step else None)
        loss(fmodel).backward()
    assert rate.grad is not None


def test_a_learned_loss_or_callback() -> None:
    for where in ("loss", "callback"):
        model, weight = nn.Linear(2, 1), torch.tensor(2.0, requires_grad=True)
        with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (
            fmodel,
            diffopt,
        ):
            if where == "loss":
                diffopt.step(weight * loss(fmodel))
            else:
                diffopt.step(loss(fmodel), grad_callback=lambda grads: [weight * g for g in grads])  # noqa: B023
            loss(fmodel).backward()
        assert weight.grad is not None


def test_what_the_outer_loss_alone_depends_on() -> None:
    """A generator against a critic that has taken some steps."""
    generator, critic = nn.Linear(2, 2), nn.Linear(2, 1)
    with higher.innerloop_ctx(critic, torch.optim.SGD(critic.parameters(), lr=0.1)) as (
        fcritic,
        diffopt,
    ):
        diffopt.step(fcritic(generator(X).detach()).square().mean())
        fcritic(generator(X)).mean().backward()
    assert not untouched(generator)


def test_who_asks_for_the_newest_parameters_reads_their_grad() -> None:
    """First-order MAML by hand."""
    fmodel, outer = episode(nn.Linear(2, 1), track_higher_grads=False)
    newest = list(fmodel.parameters())
    outer.backward()
    assert all(p.grad is not None for p in newest)


def test_parameters_from_elsewhere() -> None:
    """A hypernetwork's output takes the place of the copies: its gradient goes where it should."""
    source = nn.Linear(2, 1)
    fmodel = higher.monkeypatch(nn.Linear(2, 1))
    fmodel(X, params=[2 * p for p in source.parameters()]).sum().backward()
    assert not untouched(source)


def test_ordinary_training_in_between() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    episode(model, track_higher_grads=False)
    loss(model).backward()
    optimizer.step()


def test_it_can_be_silenced_by_its_class() -> None:
    _, outer = episode(nn.Linear(2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreachedGradientWarning)
        outer.backward()
