"""What the user's functions store elsewhere: its derivative is that of plain training, or an error.

The truth is a loop of which autograd keeps everything: plain `track`, or `StoreAll`, which other
tests compare with finite differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import Checkpointed, FirstOrder, StoreAll, Truncated
from innerloop.errors import NotDifferentiableError
from tests.strategies import STRATEGIES, Enrolled

STEPS = 4
Store = Callable[[Any], None]


# -- hand-written loops ----------------------------------------------------------------------------

DATA = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3), torch.ones(5, 1).double()


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def output(loop: Any, kept: list[Tensor], phi: Tensor) -> Tensor:
    out = loop.model(DATA[0])
    kept.append(out.square().sum())
    return phi * (out - DATA[1]).square().mean()


def weights(loop: Any, kept: list[Tensor], phi: Tensor) -> Tensor:
    kept.append(phi * sum(p.square().sum() for p in loop.model.parameters()))
    return phi * (loop.model(DATA[0]) - DATA[1]).square().mean()


def loss_itself(loop: Any, kept: list[Tensor], phi: Tensor) -> Tensor:
    loss = phi * (loop.model(DATA[0]) - DATA[1]).square().mean()
    kept.append(loss.square())
    return loss


def tracked(
    store: Callable[..., Tensor],
    make: Callable[[nn.Module], torch.optim.Optimizer],
    strategy: Any,
    callback: Callable[..., Any] | None = None,
    learn: Any = "init",
) -> list[Tensor]:
    """Return the gradient by the initialisation and by phi, of what was stored among others."""
    model, phi = network(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    arguments = {} if strategy is None else {"strategy": strategy}
    with innerloop.track(model, make(model), learn=learn, **arguments) as loop:
        for _ in range(STEPS):
            if callback is None:
                loop.step(lambda: store(loop, kept, phi))
            else:
                loop.step(
                    lambda: store(loop, [], phi),
                    grad_callback=lambda grads: callback(grads, kept),
                )
        outer = (loop.model(DATA[0]) - DATA[1]).square().mean()
        for i, x in enumerate(kept[:]):
            outer = outer + (i + 1) * x
        wanted = [phi, *model.parameters()] if learn == "init" else [phi]
        return list(torch.autograd.grad(outer, wanted))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.1)


def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)


def of_the_head(model: nn.Module) -> torch.optim.Optimizer:
    """The other parameters require grad, and are not trained."""
    head: Any = model[2]  # type: ignore[index]
    return torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("strategy", [Checkpointed(), Checkpointed(slots=1), Truncated(STEPS)])
@pytest.mark.parametrize("learn", ["init", "outer"])
@pytest.mark.parametrize("make", [sgd, adam, of_the_head])
@pytest.mark.parametrize("store", [output, weights, loss_itself])
def test_what_a_closure_stores_has_its_derivative(
    store: Callable[..., Tensor], make: Any, learn: Any, strategy: Any
) -> None:
    truth = tracked(store, make, None, learn=learn)
    for x, y in zip(tracked(store, make, strategy, learn=learn), truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_what_is_stored_at_a_trial_of_a_line_search_is_named() -> None:
    with pytest.raises(NotDifferentiableError, match="the parameters that a line search tries"):
        tracked(output, lbfgs, Checkpointed())


def stores_gradient(grads: dict[str, Tensor], kept: list[Tensor]) -> dict[str, Tensor]:
    kept.append(sum(g.square().sum() for g in grads.values()))  # type: ignore[arg-type]
    return grads


@pytest.mark.parametrize("learn", ["init", "outer"])
def test_an_inner_gradient_that_a_callback_stores_is_named(learn: Any) -> None:
    with pytest.raises(NotDifferentiableError, match=r"an inner gradient \(by grad_callback"):
        tracked(output, sgd, Checkpointed(), stores_gradient, learn)


def test_the_first_gradient_alone_is_named_too() -> None:
    """Nothing but the captured tensor leads to it: no step was taken before."""
    model, phi = network().requires_grad_(), torch.tensor(0.7).double().requires_grad_()
    kept: list[Tensor] = []
    with innerloop.track(model, sgd(model), learn="outer", strategy=Checkpointed()) as loop:
        loop.step(
            lambda: phi * loop.model(DATA[0]).square().mean(),
            grad_callback=lambda grads: stores_gradient(grads, kept),
        )
        with pytest.raises(NotDifferentiableError, match="an inner gradient"):
            torch.autograd.grad(kept[0], phi)


def test_a_hook_that_stores_a_gradient_is_named() -> None:
    model, kept = network(), []
    weight = next(model.parameters())
    weight.register_hook(lambda g: kept.append(g.square().sum()))
    with innerloop.track(model, sgd(model), strategy=Checkpointed()) as loop:
        loop.step(lambda: loop.model(DATA[0]).square().mean())
        with pytest.raises(NotDifferentiableError, match="by a hook of a parameter"):
            kept[0].backward()


def test_a_callback_with_weights_and_captured_tensors_is_right() -> None:
    """Its gradients have a history now, which must end where the step begins."""

    def decayed(strategy: Any) -> list[Tensor]:
        model, phi = network(), torch.tensor(0.1).double().requires_grad_()
        arguments = {} if strategy is None else {"strategy": strategy}
        with innerloop.track(model, adam(model), **arguments) as loop:

            def decay(grads: dict[str, Any]) -> dict[str, Any]:
                named = dict(loop.model.named_parameters())
                return {n: g + phi * named[n] for n, g in grads.items()}

            for _ in range(STEPS):
                loop.step(
                    lambda: (loop.model(DATA[0]) - DATA[1]).square().mean(), grad_callback=decay
                )
            outer = loop.model(DATA[0]).square().mean()
            return list(torch.autograd.grad(outer, [phi, *model.parameters()]))

    for x, y in zip(decayed(Checkpointed(slots=1)), decayed(None), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_what_is_stored_and_only_looked_at_does_not_matter() -> None:
    last: list[Tensor] = []

    def body(strategy: Any) -> list[Tensor]:
        model = network()
        arguments = {} if strategy is None else {"strategy": strategy}
        with innerloop.track(model, sgd(model), **arguments) as loop:

            def loss() -> Tensor:
                out = loop.model(DATA[0])
                last[:] = [out]
                return (out - DATA[1]).square().mean()

            for _ in range(STEPS):
                loop.step(loss)
                assert last[0].detach().isfinite().all()
            outer = loop.model(DATA[0]).square().mean()
            return list(torch.autograd.grad(outer, list(model.parameters())))

    for x, y in zip(body(Checkpointed()), body(None), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [sgd, adam])
def test_an_output_of_the_step_before_takes_part_in_the_next_loss(make: Any) -> None:
    def body(strategy: Any) -> list[Tensor]:
        model, box = network(), [None]
        arguments = {} if strategy is None else {"strategy": strategy}
        with innerloop.track(model, make(model), **arguments) as loop:

            def loss() -> Tensor:
                out = loop.model(DATA[0])
                value = (out - DATA[1]).square().mean()
                if box[0] is not None:
                    value = value + (out - box[0]).square().mean()
                box[0] = out
                return value

            for _ in range(STEPS):
                loop.step(loss)
            outer = loop.model(DATA[0]).square().mean()
            return list(torch.autograd.grad(outer, list(model.parameters())))

    for x, y in zip(body(Checkpointed(slots=1)), body(None), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_an_output_of_the_step_before_in_the_next_loss_of_unroll_is_named() -> None:
    last: list[Tensor] = []

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        out = params["w"] * 2
        value: Tensor = out.square().sum() + sum((out - x).square().sum() for x in last[-1:])
        last.append(out)
        return value

    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    problem: innerloop.Problem[Any, Any] = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))
    with pytest.raises(innerloop.errors.CapturedTensorError):
        innerloop.unroll(problem, {"w": w}, None, steps=3, strategy=Checkpointed())


@pytest.mark.parametrize("strategy", [Checkpointed(), Checkpointed(save="gradients"), Truncated(1)])
def test_what_is_computed_once_from_hyper_and_kept_is_named(strategy: Any) -> None:
    cache: list[Tensor] = []

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        if not cache:
            cache.append(hyper["phi"] ** 2)
        value: Tensor = (params["w"] * cache[0] - 1).square().sum()
        return value

    phi = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    problem: innerloop.Problem[Any, Any] = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))
    with pytest.raises(innerloop.errors.CapturedTensorError):
        innerloop.unroll(
            problem,
            {"w": torch.ones(2).double()},
            None,
            steps=3,
            hyper={"phi": phi},
            strategy=strategy,
        )


# -- unroll, under every strategy ------------------------------------------------------------------


def of_params(params: Any, hyper: Any) -> Tensor:
    return params["w"].square().sum()


def of_hyper(params: Any, hyper: Any) -> Tensor:
    return hyper["phi"] ** 3


def of_both(params: Any, hyper: Any) -> Tensor:
    return hyper["phi"] * params["w"].sum()


def unrolled(strategy: Any, where: str, what: Callable[..., Tensor]) -> list[Tensor]:
    phi = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([0.3, 0.5], dtype=torch.float64)
    kept: list[Tensor] = []

    def note(name: str, params: Any, hyper: Any) -> None:
        if name == where:
            kept.append(what(params, hyper))

    def loss(params: Any, hyper: Any, batch: Any, *_: Any) -> Tensor:
        note("loss", params, hyper)
        return (params["w"] * hyper["phi"] - 1).square().sum()

    def targets(params: Any, hyper: Any, batch: Any) -> Tensor:
        note("targets", params, hyper)
        return torch.zeros(())

    def batches(params: Any, hyper: Any, t: int) -> Tensor:
        note("batches", params, hyper)
        return torch.zeros(1)

    def optimizer_hyper(hyper: Any, t: int) -> dict[str, Any]:
        note("optimizer_hyper", {"w": w}, hyper)
        return {"lr": 0.1 * hyper["phi"]}

    def callback(grads: Any) -> Any:
        note("grad_callback", grads, {"phi": 1.0})
        return grads

    rule: innerloop.optim.Optimizer = innerloop.optim.sgd(lr=0.1)
    if where == "grad_callback":
        rule = innerloop.optim.chain(innerloop.optim.grad_callback(callback), rule)
    problem: innerloop.Problem[Any, Any] = innerloop.Problem(
        loss,
        rule,
        optimizer_hyper=optimizer_hyper if where == "optimizer_hyper" else None,
        targets=targets if where == "targets" else None,
    )
    traj = innerloop.unroll(
        problem,
        {"w": w},
        batches if where == "batches" else None,
        steps=STEPS,
        hyper={"phi": phi},
        strategy=strategy,
    )
    # A strategy may call the functions more often than it takes steps.
    outer = traj.params["w"].sum() + sum(kept[-STEPS:])
    return list(torch.autograd.grad(outer, [phi]))


PLACES = [
    ("loss", of_params),
    ("loss", of_hyper),
    ("loss", of_both),
    ("targets", of_params),
    ("targets", of_hyper),
    ("batches", of_both),
    ("optimizer_hyper", of_hyper),
    ("grad_callback", of_params),
]


@pytest.mark.parametrize("enrolled", STRATEGIES, ids=lambda e: repr(e.strategy))
@pytest.mark.parametrize(("where", "what"), PLACES, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.filterwarnings("ignore::innerloop.errors.NotConvergedWarning")
def test_what_is_stored_is_right_or_named(
    where: str, what: Callable[..., Tensor], enrolled: Enrolled
) -> None:
    truth = unrolled(StoreAll(), where, what)
    try:
        found = unrolled(enrolled.strategy, where, what)
    except NotDifferentiableError:
        return
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", ["loss", "targets", "batches"])
def test_first_order_by_the_start(where: str) -> None:
    w = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []

    def note(name: str, params: Any) -> Tensor:
        if name == where:
            kept.append(params["w"].square().sum())
        return torch.zeros(())

    problem: innerloop.Problem[Any, Any] = innerloop.Problem(
        lambda params, hyper, batch, *_: note("loss", params) + (params["w"] - 1).square().sum(),
        innerloop.optim.sgd(lr=0.1),
        targets=(lambda params, hyper, batch: note("targets", params))
        if where == "targets"
        else None,
    )
    batches = (lambda params, hyper, t: note("batches", params)) if where == "batches" else None
    traj = innerloop.unroll(problem, {"w": w}, batches, steps=3, strategy=FirstOrder())
    (found,) = torch.autograd.grad(traj.params["w"].sum(), w, retain_graph=True)
    assert torch.equal(found, torch.ones(2).double())  # the update alone, gradients constant
    with pytest.raises(NotDifferentiableError, match="stored elsewhere"):
        torch.autograd.grad(sum(kept), w)  # type: ignore[arg-type]


def test_a_captured_tensor_is_found_behind_a_callback_and_hooks() -> None:
    """The history that gradients have for this check must not hide it."""
    phi = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def scaled(grads: dict[str, Any]) -> dict[str, Any]:
        return {n: phi * g for n, g in grads.items()}

    rule = innerloop.optim.chain(
        innerloop.optim.grad_callback(scaled),
        innerloop.optim.sgd(lr=0.1),
    )
    problem: innerloop.Problem[Any, Any] = innerloop.Problem(
        lambda params, hyper, batch: params["w"].square().sum(), rule
    )
    with pytest.raises(innerloop.errors.CapturedTensorError):
        innerloop.unroll(problem, {"w": w}, None, steps=2, strategy=Checkpointed())


def test_hyper_that_is_constant_outside_is_constant_inside() -> None:
    seen: list[bool] = []

    def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
        seen.append(hyper["rate"].requires_grad)
        return (params["w"] * hyper["phi"] * float(hyper["rate"].numpy())).square().sum()

    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    hyper = {"phi": w.new_tensor(0.5), "rate": w.new_tensor(2.0)}
    hyper["phi"].requires_grad_()
    problem: innerloop.Problem[Any, Any] = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))
    traj = innerloop.unroll(
        problem, {"w": w}, None, steps=2, hyper=hyper, strategy=Checkpointed(product="reverse")
    )
    assert traj.params["w"].requires_grad
    assert not any(seen)
