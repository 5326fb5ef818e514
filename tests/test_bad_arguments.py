"""An argument of the wrong kind is refused by name, whichever function it is given to.

Each entry of `CALLS` is a call that works. Every argument of it is replaced by things that are of
the wrong kind for most arguments; what comes out is a result or an `InnerLoopError`, or an error
that the user's own function raised. A new public function needs one entry.
"""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
import innerloop.doctor
import innerloop.higher
import innerloop.inspect
from innerloop.errors import InnerLoopError

Make = Callable[[], object]


def loss(params: dict[str, Tensor], hyper: Any, batch: Tensor) -> Tensor:
    return ((params["w"] - batch) ** 2 * hyper["c"]).sum()


def outer(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
    return (traj.params["w"] ** 2).sum()


def start() -> dict[str, Tensor]:
    return {"w": torch.randn(3, requires_grad=True)}


def hyper() -> dict[str, Tensor]:
    return {"c": torch.ones(3, requires_grad=True)}


def batches() -> list[Tensor]:
    return [torch.randn(3) for _ in range(3)]


def problem() -> innerloop.Problem:
    return innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))


def trajectory() -> innerloop.Trajectory:
    return innerloop.unroll(problem(), start(), batches(), hyper=hyper())


def linear() -> nn.Module:
    return nn.Linear(3, 1)


def always(value: object) -> Make:
    return lambda: value


def tracked(given: dict[str, object], step: dict[str, object] | None = None) -> None:
    model: Any = given.pop("model") if "model" in given else linear()
    sgd = torch.optim.SGD(model.parameters(), 0.1) if isinstance(model, nn.Module) else None
    with innerloop.track(model, given.pop("optimizer", sgd), **given) as loop:  # type: ignore[arg-type]
        value = loop.model(torch.ones(1, 3)).sum() ** 2
        loop.step(**{"loss": value, **(step or {})})


def bridged(**given: Any) -> None:
    model = linear()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    given = {"model": model, "opt": sgd, **given}
    with innerloop.higher.innerloop_ctx(**given) as (fmodel, diffopt):
        diffopt.step(fmodel(torch.ones(1, 3)).sum() ** 2)


def by(make_strategy: Callable[..., Any], **more: Any) -> Callable[..., object]:
    """Take a meta-gradient with a strategy made of the arguments."""

    def call(**given: Any) -> object:
        chosen = make_strategy(**given)
        return innerloop.metagradient(
            outer, problem(), start(), batches(), hyper=hyper(), strategy=chosen, **more
        )

    return call


def trained_by(rule: Callable[..., Any]) -> Callable[..., object]:
    def call(**given: Any) -> object:
        trained = innerloop.Problem(
            lambda params, hyper, batch: ((params["w"] - batch) ** 2).sum(), rule(**given)
        )
        return innerloop.unroll(trained, {"w": torch.ones(3, 3)}, [torch.zeros(3, 3)] * 2)

    return call


def layered(**given: Any) -> object:
    inputs = {key: given.pop(key) for key in ("x", "data") if key in given}
    return innerloop.nn.FastWeights(**given)(**inputs)


def in_parts(**given: Any) -> object:
    split = innerloop.Problem(innerloop.micro_batches(**given), innerloop.optim.sgd(lr=0.1))
    return innerloop.unroll(split, start(), batches(), hyper=hyper())


LOOP: dict[str, Make] = {"problem": problem, "params": start, "batches": batches, "hyper": hyper}
BEHIND: dict[str, Make] = {"outer": always(outer), **LOOP}
WHEN: dict[str, Make] = {"time": always(1), "wrt": always(0)}
RULES = ("sgd", "adam", "adamw", "lbfgs", "muon", "rmsprop", "adafactor", "asgd", "adagrad")


def made(**given: Any) -> object:
    return innerloop.unroll(innerloop.Problem(**given), start(), batches(), hyper=hyper())


CALLS: dict[str, tuple[Callable[..., object], dict[str, Make]]] = {
    "Problem": (
        made,
        {
            "loss": always(loss),
            "optimizer": lambda: innerloop.optim.sgd(lr=0.1),
            "optimizer_hyper": always(None),
            "targets": always(None),
        },
    ),
    "unroll": (
        innerloop.unroll,
        {
            **LOOP,
            "strategy": always(None),
            "steps": always(3),
            "save_at": always((1,)),
            "progress": always(False),
        },
    ),
    "metagradient": (
        innerloop.metagradient,
        {
            **BEHIND,
            "wrt": always("params"),
            "strategy": always(None),
            "steps": always(3),
            "save_at": always((1,)),
            "compile": always(False),
        },
    ),
    "plan": (innerloop.plan, {**LOOP, "steps": always(3), "memory": always(None)}),
    "check_metagradient": (
        innerloop.check_metagradient,
        {
            "outer_fn": always(outer),
            "inputs": problem,
            **{name: make for name, make in LOOP.items() if name != "problem"},
            "seed": always(0),
        },
    ),
    "diagnose": (
        innerloop.diagnose,
        {**BEHIND, "size": always(0.01), "probes": always(1), "quiet": always(True)},
    ),
    "metajacobian": (
        innerloop.inspect.metajacobian,
        {**BEHIND, "outer": always(lambda traj, hyper: traj.params["w"]), "wrt": always("params")},
    ),
    "attribute": (
        innerloop.attribute,
        {
            **LOOP,
            "queries": always(lambda params: params["w"]),
            "weights": always("c"),
            "index": always(None),
        },
    ),
    "map_tasks": (
        innerloop.map_tasks,
        {
            "fn": always(lambda task: (task**2).sum()),
            "tasks": lambda: torch.randn(4, 3),
            "chunk_size": always(2),
            "randomness": always("different"),
            "reduce": always(None),
            "compile": always(False),
        },
    ),
    "micro_batches": (
        in_parts,
        {
            "loss": always(loss),
            "size": always(3),
            "reduction": always("mean"),
            "weight": always(None),
        },
    ),
    "FastWeights": (
        layered,
        {
            "module": always(nn.Linear(3, 3)),
            "loss": always(lambda module, data: module(data).square().mean()),
            "optimizer": lambda: innerloop.optim.sgd(lr=0.1),
            "chunk": always(2),
            "strategy": always(None),
            "output": always(None),
            "read": always("before"),
            "hyper": always(None),
            "x": lambda: torch.ones(2, 4, 3),
            "data": always(None),
        },
    ),
    "assign": (innerloop.assign, {"tree": start, "grads": lambda: {"w": torch.ones(3)}}),
    "functional": (innerloop.functional, {"model": linear}),
    "implicit_root": (
        innerloop.implicit_root,
        {
            "residual": always(lambda x: x - 1),
            "solution": lambda: torch.ones(2),
            "solver": always(None),
            "tolerance": always(1e-3),
        },
    ),
    "track": (
        lambda **given: tracked(given),
        {
            "model": linear,
            "learn": always("init"),
            "params": always(None),
            "hyper": always(None),
            "first_order": always(False),
        },
    ),
    "step": (lambda **given: tracked({}, given), {"grad_callback": always(None)}),
    "innerloop_ctx": (
        bridged,
        {
            "device": always(None),
            "copy_initial_weights": always(True),
            "override": always(None),
            "track_higher_grads": always(True),
        },
    ),
    "compare": (
        innerloop.inspect.compare,
        {"traj": trajectory, "outer": always(outer), "strategy": innerloop.Checkpointed},
    ),
    "curvature": (
        innerloop.inspect.curvature,
        {"traj": trajectory, "times": always([0]), "k": always(1)},
    ),
    "gains": (innerloop.inspect.gains, {"traj": trajectory, **WHEN, "k": always(2)}),
    "influence": (
        innerloop.inspect.influence,
        {"traj": trajectory, "outer": always(outer), "probes": always(0), "seed": always(0)},
    ),
    "jacobian": (innerloop.inspect.jacobian, {"traj": trajectory, **WHEN}),
    "jvp": (
        innerloop.inspect.jvp,
        {"traj": trajectory, **WHEN, "direction": lambda: {"w": torch.ones(3)}},
    ),
    "vjp": (
        innerloop.inspect.vjp,
        {"traj": trajectory, **WHEN, "cotangent": lambda: {"w": torch.ones(3)}},
    ),
    "lyapunov": (
        innerloop.inspect.lyapunov,
        {"traj": trajectory, "k": always(1), "start": always(0), "end": always(-1)},
    ),
    "paths": (
        innerloop.inspect.paths,
        {"traj": trajectory, "outer_loss": always(outer), **WHEN},
    ),
    "Trajectory.at": (lambda t: trajectory().at(t), {"t": always(-1)}),
    "examine": (
        innerloop.doctor.examine,
        {"what": linear, "example": lambda: torch.ones(1, 3)},
    ),
    "OuterState": (
        innerloop.OuterState,
        {
            "model": linear,
            "optimizer": always(None),
            "scheduler": always(None),
            "random": always(True),
            "counters": always(None),
        },
    ),
    "Checkpointed": (
        by(innerloop.Checkpointed),
        {
            "slots": always(2),
            "memory": always(None),
            "product": always("auto"),
            "save": always("params"),
            "offload": always(None),
        },
    ),
    "Truncated": (by(innerloop.Truncated, wrt="hyper"), {"last": always(2)}),
    "DARTS": (by(innerloop.strategy.DARTS, wrt="hyper"), {"radius": always(0.01)}),
    "SAMA": (by(innerloop.strategy.SAMA, wrt="hyper"), {"radius": always(0.01)}),
    "T1T2": (by(innerloop.strategy.T1T2, wrt="hyper"), {"scale": always(0.1)}),
    "StoreAll": (by(innerloop.StoreAll), {"compile": always(False)}),
    "Auto": (by(innerloop.Auto), {"memory": always("1 GB")}),
    "Implicit": (
        by(innerloop.Implicit, wrt="hyper"),
        {
            "solver": always(None),
            "residual": always(None),
            "fixed_point": always(None),
            "tolerance": always(10.0),
        },
    ),
    "Evolution": (
        by(innerloop.Evolution),
        {
            "sigma": always(0.1),
            "pairs": always(2),
            "chunk": always(1),
            "seed": always(0),
            "report": always(None),
        },
    ),
    "CG": (
        by(
            lambda **given: innerloop.Implicit(
                solver=innerloop.strategy.solvers.CG(**given), tolerance=9.0
            ),
            wrt="hyper",
        ),
        {"tolerance": always(None), "max_iterations": always(None), "report": always(None)},
    ),
    **{
        f"optim.{name}": (
            trained_by(getattr(innerloop.optim, name)),
            {
                field: always(parameter.default)
                for field, parameter in inspect.signature(
                    getattr(innerloop.optim, name)
                ).parameters.items()
                if parameter.default is not parameter.empty
            },
        )
        for name in RULES
    },
}


class Thing:
    """Nothing that any function expects."""


class Refusing(nn.Module):
    """A module, and a class that can be called; it says itself that it does not fit."""

    def __init__(self, *given: object, **named: object) -> None:
        if given or named:
            raise TypeError("not with these arguments")
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, *given: object, **named: object) -> Tensor:
        raise TypeError("not with these arguments")


WRONG: dict[str, Make] = {
    "an object": Thing,
    "a string": always("junk"),
    "a negative number": always(-1),
    "a fraction": always(2.5),
    "not a number": always(float("nan")),
    "True": always(True),
    "None": always(None),
    "a list": always([1]),
    "a dict": always({"x": 1}),
    "a tensor": lambda: torch.ones(2),
    "tensors on the meta device": lambda: {k: torch.ones(3, device="meta") for k in ("w", "c")},
    "a list of tensors": lambda: [torch.ones(3)],
    "a class": always(Refusing),
    "a module": Refusing,
}


def own(error: Exception) -> bool:
    """True if a function of this file, which stands for the user's, was running."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [Path(frame.filename) for frame in frames]
    first = next((i for i, file in enumerate(files) if "innerloop" in file.parts), 0)
    return Path(__file__) in files[first:]


@pytest.fixture
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", CALLS)
def test_the_call_works_with_the_right_arguments(name: str) -> None:
    call, arguments = CALLS[name]
    call(**{key: make() for key, make in arguments.items()})


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, (_, arguments) in CALLS.items() for argument in arguments],
)
def test_an_argument_of_the_wrong_kind_is_refused_by_name(name: str, argument: str) -> None:
    call, arguments = CALLS[name]
    bare = []
    for what, make in WRONG.items():
        given = {key: right() for key, right in arguments.items()}
        given[argument] = make()
        try:
            call(**given)
        except InnerLoopError:
            continue
        except Exception as error:
            if not own(error):
                bare.append(f"{argument}={what}: {type(error).__name__}: {error}")
    assert not bare, "\n".join(bare)


def test_an_error_inside_of_the_package_is_told_from_one_of_the_users_function() -> None:
    def failing(params: Any, hyper: Any, batch: Any) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError) as mine:
        innerloop.unroll(innerloop.Problem(failing, innerloop.optim.sgd()), start(), None, steps=1)
    with pytest.raises(AttributeError) as ours:
        innerloop.unroll.__globals__["_check_finite"](None, 3)
    assert own(mine.value)
    assert not own(ours.value)
