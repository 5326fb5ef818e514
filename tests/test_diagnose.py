"""`innerloop.diagnose`: the verdict against a real retraining, and ten broken loops that must be
explained with the true cause and its place."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import diagnose, optim
from innerloop.inspect._diagnose import Diagnosis

T = 6


def line_of(function: Any, text: str) -> str:
    """Where ``text`` stands in the source of a function, as a finding says it."""
    import inspect

    lines, first = inspect.getsourcelines(function)
    at = next(i for i, line in enumerate(lines) if text in line)
    return f"test_diagnose.py, line {first + at}"


def data(steps: int = T) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps + 1, 16, 3, generator=generator)
    return list(zip(x, x.sin().sum(-1, keepdim=True), strict=True))


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "w": torch.randn(3, 5, generator=generator) / 2,
        "v": torch.randn(5, 1, generator=generator) / 2,
    }


def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
    x, y = batch
    penalty = hyper["l2"] * params["w"].square().sum() if hyper and "l2" in hyper else 0
    return ((x @ params["w"]).tanh() @ params["v"] - y).square().mean() + penalty


def outer(traj: Any, hyper: Any) -> Tensor:
    return loss(traj.params, None, data()[-1])


def found(problem: innerloop.Problem, **changes: Any) -> Diagnosis:
    arguments: dict[str, Any] = {"params": weights(), "batches": data()[:T], "outer": outer}
    arguments |= changes
    with torch.random.fork_rng():
        return diagnose(
            arguments.pop("outer"),
            problem,
            arguments.pop("params"),
            arguments.pop("batches"),
            quiet=True,
            **arguments,
        )


def only(diagnosis: Diagnosis, kind: str) -> Any:
    """The one finding of this kind, in a diagnosis that trusts nothing."""
    assert not diagnosis.trusted
    named = [f for f in diagnosis.findings if f.kind == kind]
    assert len(named) == 1, diagnosis
    assert named[0].text in str(diagnosis)
    assert "NOT trusted" in str(diagnosis)
    assert "\n" not in named[0].text
    return named[0]


SGD = {"lr": torch.tensor(0.1), "l2": torch.tensor(0.01)}
LEARNED = optim.sgd(lr=0.1)


# -- the verdict -----------------------------------------------------------------------------------


def test_a_smooth_loop_is_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    problem = innerloop.Problem(loss, optim.sgd(), optimizer_hyper=("lr",))
    diagnosis = diagnose(outer, problem, weights(), data()[:T], hyper=SGD)
    assert diagnosis.trusted
    assert not diagnosis.findings
    assert diagnosis.error < 0.2
    assert len(diagnosis.promised) == len(diagnosis.kept) == 8
    assert 0 < max(diagnosis.growth.values()) < 10
    printed = capsys.readouterr().out
    assert printed.startswith("This meta-gradient is trusted for steps of relative size 0.01.")
    assert diagnosis.cost < 6


def test_promises_are_those_of_the_gradient() -> None:
    """On w²/2 with rate 1/2 and T steps the outer loss w_T is linear: kept is promised."""
    problem = innerloop.Problem(lambda p, h, b: p["w"].square().sum() / 2, optim.sgd(lr=0.5))
    start = {"w": torch.tensor([2.0, -1.0], dtype=torch.float64)}
    diagnosis = diagnose(
        lambda traj, hyper: traj.params["w"].sum(), problem, start, None, steps=3, quiet=True
    )
    assert diagnosis.error < 1e-10
    for a, b in zip(diagnosis.promised, diagnosis.kept, strict=True):
        assert a == pytest.approx(b, rel=1e-9)
    assert diagnosis.value == pytest.approx(0.125)


def test_chaos_is_not_trusted_at_the_size_that_is_meant() -> None:
    """w⁴/4 - w²/2 at a chaotic rate: exact in float64, and worthless for a real step."""
    problem = innerloop.Problem(
        lambda p, h, b: (p["w"] ** 4 / 4 - p["w"] ** 2 / 2).sum(), optim.sgd(lr=1.4)
    )
    start = {"w": torch.tensor([0.3, 0.4], dtype=torch.float64)}
    diagnosis = diagnose(
        lambda traj, hyper: traj.params["w"].sum(),
        problem,
        start,
        None,
        steps=25,
        probes=3,
        quiet=True,
        thorough=True,
    )
    only(diagnosis, "promise")
    assert diagnosis.error > 0.5
    assert min(diagnosis.sizes) < 0.005
    assert diagnosis.precision == 0
    short = diagnose(
        lambda traj, hyper: traj.params["w"].sum(), problem, start, None, steps=1, quiet=True
    )
    assert short.trusted


def test_trainings_at_once_are_those_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a loop that vmap cannot run, for reading a number, is judged all the same."""
    problem = innerloop.Problem(loss, optim.sgd(), optimizer_hyper=("lr",))
    at_once = found(problem, hyper=SGD, probes=2)
    monkeypatch.setattr("innerloop.inspect._diagnose.TOGETHER", 0)
    assert found(problem, hyper=SGD, probes=2).kept == pytest.approx(at_once.kept, rel=1e-3)

    def reads(traj: Any, hyper: Any) -> Tensor:
        value = outer(traj, hyper)
        return value if float(value.detach()) > 0 else -value

    monkeypatch.setattr("innerloop.inspect._diagnose.TOGETHER", 10**9)
    assert found(problem, hyper=SGD, probes=2, outer=reads).kept == pytest.approx(
        at_once.kept, rel=1e-3
    )


def test_what_cannot_be_asked() -> None:
    problem = innerloop.Problem(loss, LEARNED)
    for wrong in ({"probes": 0}, {"size": 0.0}, {"size": 2.0}):
        with pytest.raises(innerloop.InvalidInputError, match="write"):
            found(problem, **wrong)


# -- ten broken loops ------------------------------------------------------------------------------


def test_detach_in_the_loss() -> None:
    def broken(params: Any, hyper: Any, batch: Any) -> Tensor:
        return loss(params, None, batch) + hyper["l2"].detach() * params["w"].square().sum()

    finding = only(found(innerloop.Problem(broken, LEARNED), hyper={"l2": SGD["l2"]}), "cut")
    assert finding.where == line_of(broken, "detach()")
    assert "hyper['l2']" in finding.text
    assert "detach()" in finding.text


def test_the_whole_inner_loss_detached() -> None:
    def broken(params: Any, hyper: Any, batch: Any) -> Tensor:
        w = {n: p.detach() for n, p in params.items()}
        return loss(w, None, batch)

    finding = only(found(innerloop.Problem(broken, LEARNED)), "cut")
    assert finding.where == line_of(broken, "detach()")


def test_item_in_the_learning_rate() -> None:
    def rate(hyper: Any, t: int) -> Any:
        return {"lr": hyper["lr"].item()}

    problem = innerloop.Problem(loss, optim.sgd(), optimizer_hyper=rate)
    finding = only(found(problem, hyper=dict(SGD)), "cut")
    assert finding.where == line_of(rate, ".item()")
    assert "hyper['lr']" in finding.text


def test_a_captured_hyper_parameter() -> None:
    l2 = torch.tensor(0.01)

    def broken(params: Any, hyper: Any, batch: Any) -> Tensor:
        return loss(params, None, batch) + l2 * params["w"].square().sum()

    finding = only(found(innerloop.Problem(broken, LEARNED), hyper={"l2": l2}), "captured")
    assert "broken" in finding.where
    assert "Read it from hyper" in finding.text
    learned = torch.tensor(0.01, requires_grad=True)

    def loud(params: Any, hyper: Any, batch: Any) -> Tensor:
        return loss(params, None, batch) + learned * params["w"].square().sum()

    finding = only(found(innerloop.Problem(loud, LEARNED), hyper={"l2": learned}), "captured")
    assert finding.where.startswith("test_diagnose.py")


def test_a_learning_rate_that_explodes() -> None:
    problem = innerloop.Problem(loss, optim.sgd(lr=30.0))
    finding = only(found(problem, batches=data(60)[:60]), "not finite")
    assert finding.where.startswith("step ")


def test_an_adjoint_that_explodes() -> None:
    """|w| grows by 4 a step, and the loss stays finite: only the adjoint shows it."""
    problem = innerloop.Problem(lambda p, h, b: p["w"].square().sum() / 2, optim.sgd(lr=5.0))
    start = {"w": torch.tensor([1e-12, 1e-12])}
    diagnosis = diagnose(
        lambda traj, hyper: traj.params["w"].sum(), problem, start, None, steps=20, quiet=True
    )
    finding = only(diagnosis, "exploding")
    assert finding.where == "step 0"
    assert diagnosis.growth["w"] == pytest.approx(4.0**20 / math.sqrt(1), rel=1e-4)
    assert "starts to grow at step 16" in finding.text


def test_a_dead_relu_under_adam() -> None:
    def dying(params: Any, hyper: Any, batch: Any) -> Tensor:
        x, y = batch
        h = (x.abs() @ params["w"] + params["b"]).relu()
        return (h @ params["v"] - y).square().mean() + 1e-3 * params["b"].square().sum()

    # The second unit never fires, and its bias stays at zero, where the penalty still curves.
    params = {**weights(), "b": torch.zeros(5)}
    params["w"][:, 1] = -10
    diagnosis = found(
        innerloop.Problem(dying, optim.adam(lr=1e-2)),
        params=params,
        outer=lambda traj, hyper: (
            dying(traj.params, None, data()[-1]) + 1e-3 * traj.params["b"].sum()
        ),
    )
    finding = only(diagnosis, "dead unit")
    assert finding.where == "b"
    assert max(x for n, x in diagnosis.growth.items() if n != "b") < 100
    assert "lr/eps" in finding.text


def test_integer_weights() -> None:
    problem = innerloop.Problem(loss, LEARNED)
    finding = only(found(problem, hyper={"l2": torch.tensor(1)}), "integer")
    assert finding.where == "hyper['l2']"


def test_no_grad_around_the_step() -> None:
    def broken(params: Any, hyper: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            return loss(params, hyper, batch)

    finding = only(found(innerloop.Problem(broken, LEARNED)), "cut")
    assert "torch.no_grad()" in finding.text
    assert finding.where.startswith("test_diagnose.py, line ")


def test_mismatched_dtypes() -> None:
    problem = innerloop.Problem(loss, LEARNED)
    double = {n: p.double() for n, p in weights().items()}
    finding = only(found(problem, params=double), "dtype")
    assert "the parameters float64" in finding.text
    assert "the data float32" in finding.text


def test_batches_that_differ_at_every_call() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(params: Any, hyper: Any, t: int) -> Any:
        x = torch.randn(16, 3, generator=generator)
        return x, x.sum(-1, keepdim=True)

    finding = only(
        found(innerloop.Problem(loss, LEARNED), batches=draw, steps=T), "not deterministic"
    )
    assert "pure function" in finding.text
    assert finding.where.startswith("test_diagnose.py, line ")


def test_an_outer_loss_on_stale_parameters() -> None:
    params = {n: p.requires_grad_() for n, p in weights().items()}

    def stale(traj: Any, hyper: Any) -> Tensor:
        return loss(params, None, data()[-1])

    finding = only(found(innerloop.Problem(loss, LEARNED), params=params, outer=stale), "stale")
    assert finding.where == line_of(stale, "def stale")
    assert "traj.params" in finding.text


def test_an_outer_loss_that_is_detached() -> None:
    def broken(traj: Any, hyper: Any) -> Tensor:
        return loss(traj.params, None, data()[-1]).detach()

    finding = only(found(innerloop.Problem(loss, LEARNED), outer=broken), "cut")
    assert finding.where == line_of(broken, ".detach()")


def test_an_unused_entry_of_hyper() -> None:
    finding = only(found(innerloop.Problem(loss, LEARNED), hyper=dict(SGD)), "unused")
    assert finding.where == "hyper['lr']"
    assert "optimizer_hyper" in finding.text


def test_float32_that_has_no_digit_left() -> None:
    """The chaotic quartic in float32: the float64 gradient is another one."""
    problem = innerloop.Problem(
        lambda p, h, b: (p["w"] ** 4 / 4 - p["w"] ** 2 / 2).sum(), optim.sgd(lr=1.4)
    )
    diagnosis = diagnose(
        lambda traj, hyper: traj.params["w"].sum(),
        problem,
        {"w": torch.tensor([0.3, 0.4])},
        None,
        steps=40,
        probes=1,
        quiet=True,
        thorough=True,
    )
    assert diagnosis.precision is not None
    assert diagnosis.precision > 0.1
    only(diagnosis, "precision")


@pytest.mark.slow
def test_a_convolution_in_float32_whose_branches_flip() -> None:
    """Max-pooling at a rate that amplifies: the gradient in float32 is another one than in float64,
    by what a copy of everything in float64 says."""
    torch.manual_seed(1)
    steps = 40
    x, y = torch.randn(steps + 1, 8, 1, 8, 8), torch.randint(4, (steps + 1, 8))
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Tanh(),
        nn.Flatten(), nn.Linear(4, 4),
    )  # fmt: skip

    def asked(model: nn.Module, x: Tensor) -> tuple[Any, innerloop.Problem, Any]:
        def judge(traj: Any, hyper: Any) -> Tensor:
            found = torch.func.functional_call(model, traj.params, (x[-1],))
            return nn.functional.cross_entropy(found, y[-1])

        problem = innerloop.Problem.from_module(
            model,
            lambda m, hyper, b: nn.functional.cross_entropy(m(b[0]), b[1]),
            optim.sgd(lr=0.5, momentum=0.9),
        )
        return judge, problem, list(zip(x[:-1], y[:-1], strict=True))

    def gradient(model: nn.Module, x: Tensor) -> Tensor:
        judge, problem, batches = asked(model, x)
        _, found = innerloop.metagradient(judge, problem, None, batches, wrt="params")
        return torch.cat([g.double().flatten() for g in found.values()])

    judge, problem, batches = asked(model, x)
    diagnosis = diagnose(judge, problem, None, batches, probes=1, quiet=True, thorough=True)
    finding = only(diagnosis, "precision")
    assert "max-pooling" in finding.text
    rough, exact = gradient(model, x), gradient(copy.deepcopy(model).double(), x.double())
    off = float((rough - exact).norm() / exact.norm())
    assert off > 0.1
    assert diagnosis.precision == pytest.approx(off, rel=0.05)


def test_dropout_sees_the_same_numbers_in_every_training() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
    problem = innerloop.Problem.from_module(
        model, lambda m, hyper, b: (m(b[0]) - b[1]).square().mean(), optim.sgd(lr=0.1)
    )
    before = torch.get_rng_state()
    x, y = data()[-1]

    def judge(traj: Any, hyper: Any) -> Tensor:
        h = (x @ traj.params["0.weight"].T + traj.params["0.bias"]).tanh()
        return (h @ traj.params["3.weight"].T + traj.params["3.bias"] - y).square().mean()

    diagnosis = diagnose(judge, problem, None, data()[:T], quiet=True)
    assert diagnosis.trusted
    assert torch.equal(before, torch.get_rng_state())
