"""Compiled code sees what changes later, and what the user's code raises comes through.

PyTorch's compiler takes for granted that classes keep their methods, and that modules without hooks
get none; innerloop looks.
"""

from __future__ import annotations

import functools
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

import innerloop
from innerloop import Checkpointed, StoreAll
from innerloop._utils import compiling
from innerloop._utils.definitions import Definitions
from innerloop.strategy import Strategy
from innerloop.strategy._engine.compiled_step import _cores
from tests.backends import trace_only
from tests.oracles import smooth_noise

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # other threads take filters away
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def compiled(test: Any) -> Any:
    """Mark a test that compiles; the fixture below lets PyTorch trace only."""
    return pytest.mark.compiled(pytest.mark.traced(test))


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_only(monkeypatch)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(3, 3), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.inner(x))
        return found


class Owned:
    """Something of the user's that a loss calls, with a base and a class of its own in a cell."""

    def __init__(self) -> None:
        class Base:
            factor = 1.0

            def inherited(self, x: Tensor) -> Tensor:
                return x

        class Own(Base):
            def method(self, x: Tensor) -> Tensor:
                return x

            @classmethod
            def of_class(cls, x: Tensor) -> Tensor:
                return x

            def __getitem__(self, i: int) -> float:
                return 1.0

        class Net(Small):
            pass

        self.base, self.own, self.net, self.chosen = Base, Own, Net, Own
        self.one = Own()
        torch.manual_seed(0)
        self.model = Net().requires_grad_(False)
        self.table: dict[str, Any] = {"class": Own}

    def renew(self) -> None:
        """Take another model, which has a hook."""
        self.model = self.net().requires_grad_(False)
        self.model.last.register_forward_hook(twice_after)


def twice(self: object, x: Tensor) -> Tensor:
    return 2 * x


def twice_after(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    # What was compiled may be a module too, which a hook of all modules is called for.
    return 2 * output if isinstance(module, nn.Tanh) else output


CHANGES: dict[
    str, tuple[Callable[[Owned], Callable[[Tensor], Tensor]], Callable[[Owned], object]]
] = {
    "a method": (lambda o: o.one.method, lambda o: None),  # bound: it is kept, as in eager code
    "a method of a class": (
        lambda o: lambda x: o.one.method(x),
        lambda o: setattr(o.own, "method", twice),
    ),
    "a method of a base": (
        lambda o: lambda x: o.one.inherited(x),
        lambda o: setattr(o.base, "inherited", twice),
    ),
    "a method before that of a base": (
        lambda o: lambda x: o.one.inherited(x),
        lambda o: setattr(o.own, "inherited", twice),
    ),
    "a number before that of a base": (
        lambda o: lambda x: o.one.factor * x,
        lambda o: setattr(o.own, "factor", 2.0),
    ),
    "the code of a method": (
        lambda o: lambda x: o.one.method(x),
        lambda o: setattr(o.own.method, "__code__", twice.__code__),
    ),
    "a class method": (
        lambda o: lambda x: o.one.of_class(x),
        lambda o: setattr(o.own, "of_class", classmethod(twice)),
    ),
    "an operator": (
        lambda o: lambda x: o.one[0] * x,
        lambda o: setattr(o.own, "__getitem__", lambda self, i: 2.0),
    ),
    "the base of a class": (
        lambda o: lambda x: o.one.inherited(x),
        lambda o: setattr(o.own, "__bases__", (type("Other", (), {"inherited": twice}),)),
    ),
    "a method of an object made in the loss": (
        lambda o: (lambda own: lambda x: own().method(x))(o.own),
        lambda o: setattr(o.own, "method", twice),
    ),
    "a class in a dict": (
        lambda o: (lambda table: lambda x: table["class"]().method(x))(o.table),
        lambda o: o.table.update({"class": type("Other", (), {"method": twice})}),
    ),
    "a class in an attribute": (
        lambda o: lambda x: o.chosen().method(x),
        lambda o: setattr(o, "chosen", type("Other", (), {"method": twice})),
    ),
    "forward of a module": (
        lambda o: lambda x: o.model(x),
        lambda o: setattr(o.net, "forward", twice),
    ),
    "a first hook": (
        lambda o: lambda x: o.model(x),
        lambda o: o.model.last.register_forward_hook(twice_after),
    ),
    "a first hook before": (
        lambda o: lambda x: o.model(x),
        lambda o: o.model.register_forward_pre_hook(lambda m, inputs: (2 * inputs[0],)),
    ),
    "another module with a hook": (
        lambda o: (lambda box: lambda x: box.model(x))(o),
        Owned.renew,
    ),
}


def losses(problem: innerloop.Problem, strategy: Strategy) -> Tensor:
    """The losses of three steps."""
    data = 0.3 + smooth_noise(3, 3)
    start = {"w": torch.tensor([0.3, -0.7, 1.1])}
    return innerloop.unroll(problem, start, data, strategy=strategy).losses


def problem_of(function: Callable[[Tensor], Tensor]) -> innerloop.Problem:
    return innerloop.Problem(
        lambda p, h, b: function((p["w"] * b).sin()).sum(), innerloop.optim.sgd(lr=0.1)
    )


FEW = {"a method of a class", "a number before that of a base", "a first hook", "a class in a dict"}


@compiled
@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in CHANGES]
)
def test_compiled_code_sees(name: str) -> None:
    make, change = CHANGES[name]
    owned = Owned()
    problem = problem_of(make(owned))
    before = losses(problem, StoreAll())
    torch.testing.assert_close(losses(problem, StoreAll(compile=True)), before)
    with torch.no_grad():
        change(owned)
    after = losses(problem, StoreAll())
    assert torch.equal(after, before) == (name == "a method")
    torch.testing.assert_close(losses(problem, StoreAll(compile=True)), after)


@pytest.fixture
def hook_of_all_modules() -> Iterator[Callable[[], None]]:
    handles: list[Any] = []
    register: Any = all_modules.register_module_forward_hook
    yield lambda: handles.append(register(twice_after))
    for handle in handles:
        handle.remove()


@compiled
def test_a_hook_of_all_modules_and_a_method_of_torch_are_seen(
    hook_of_all_modules: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(Owned().model)
    found = []
    for change in (
        lambda: None,
        hook_of_all_modules,
        lambda: monkeypatch.setattr(nn.Tanh, "forward", twice),
    ):
        change()
        found.append(losses(problem, StoreAll()))
        torch.testing.assert_close(losses(problem, StoreAll(compile=True)), found[-1])
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


@compiled
def test_a_first_hook_on_gradients_is_refused() -> None:
    model = Owned().model
    problem = problem_of(model)
    losses(problem, StoreAll(compile=True))
    model.inner.register_full_backward_hook(lambda m, given, out: None)
    with pytest.raises(innerloop.NotDifferentiableError, match="backward rule of its own"):
        losses(problem, StoreAll(compile=True))


@compiled
def test_what_changes_nothing_is_not_compiled_anew() -> None:
    owned = Owned()
    problem = problem_of(lambda x: owned.one.method(owned.model(x)))
    losses(problem, StoreAll(compile=True))
    (core,) = _cores[problem].values()
    once = core._advance.compiled.compilations
    owned.own.calls = 1  # type: ignore[attr-defined]
    losses(problem, StoreAll(compile=True))
    new = core._advance.compiled.compilations
    assert new == once + 1  # an attribute may stand before one of a base
    for i in range(3):
        owned.own.calls = i  # type: ignore[attr-defined]
        owned.one.calls = i  # type: ignore[attr-defined]
        _ = owned.own.__annotations__
        owned.own.method = functools.partialmethod(owned.own.method).func  # type: ignore[method-assign]
        losses(problem, StoreAll(compile=True))
    assert core._advance.compiled.compilations == new


@compiled
def test_changes_are_seen_in_a_hand_written_loop_a_whole_meta_gradient_and_tasks() -> None:
    class Penalty:
        def of(self, x: Tensor) -> Tensor:
            return x.square()

    penalty = Penalty()
    x = smooth_noise(3, 4, 3)
    problem = innerloop.Problem(
        lambda p, h, b: penalty.of(b @ p["w"]).mean(), innerloop.optim.sgd(lr=0.1)
    )

    def gradient(data: Tensor, params: Any, **how: Any) -> Any:
        return innerloop.metagradient(
            lambda traj, h: traj.params["w"].sum(), problem, params, data, wrt="params", **how
        )[1]["w"]

    def tracked(compiles: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        strategy = Checkpointed(compile=True) if compiles else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with innerloop.track(model, optimizer, strategy=strategy) as loop:
            for batch in x:
                loop.step(lambda batch=batch: penalty.of(loop.model(batch)).mean())
            outer = loop.model(x[0]).sin().sum()
        return torch.autograd.grad(outer, model.weight)[0]

    w = {"w": smooth_noise(3, phase=1.0)}
    ways: list[Callable[[bool], Tensor]] = [
        tracked,
        lambda compiles: gradient(x, w, compile=compiles),
        lambda compiles: innerloop.map_tasks(gradient, x[None], w, compile=compiles),
    ]
    before = [way(False) for way in ways]
    for way, expected in zip(ways, before, strict=True):
        torch.testing.assert_close(way(True), expected)
    Penalty.of = lambda self, x: x.cos() * 3  # type: ignore[method-assign]
    for way, old in zip(ways, before, strict=True):
        assert not torch.allclose(way(False), old)
        torch.testing.assert_close(way(True), way(False))


def test_definitions_of_classes() -> None:
    class Used:
        def method(self) -> int:
            return 1

    class Unused:
        pass

    definitions = Definitions()
    definitions.note([Used()], [])
    assert definitions.are_unchanged()
    Unused.method = lambda self: 2  # type: ignore[attr-defined]
    assert definitions.are_unchanged()
    was = Used.method
    Used.method = lambda self: 2  # type: ignore[method-assign]
    assert not definitions.are_unchanged()
    assert not definitions.are_unchanged()
    Used.method = was  # type: ignore[method-assign]
    assert definitions.are_unchanged()
    del Used.method
    assert not definitions.are_unchanged()


# -- errors of the user's own code -----------------------------------------------------------------


class Mine(Exception):
    pass


@compiled
@pytest.mark.parametrize("way", ["StoreAll", "Checkpointed", "track", "metagradient", "map_tasks"])
def test_an_exception_of_the_loss_comes_through_at_a_later_call(way: str) -> None:
    bad = {"now": False}

    def check() -> float:
        if bad["now"]:
            raise Mine("my data is bad")
        return 1.0

    def loss(p: Any, h: Any, b: Tensor) -> Tensor:
        check()
        return (p["w"] * b).square().sum()

    problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))
    x, params = torch.ones(2, 3), {"w": torch.ones(3)}

    def whole(data: Tensor, params: Any, compile: bool = False) -> Tensor:
        return innerloop.metagradient(
            lambda traj, h: traj.params["w"].sum(),
            problem, params, data, wrt="params", compile=compile,
        )[0]  # fmt: skip

    def run() -> object:
        if way == "metagradient":
            return whole(x, params, compile=True)
        if way == "map_tasks":
            return innerloop.map_tasks(whole, x[None], params, compile=True)
        if way == "track":
            model = nn.Linear(3, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with innerloop.track(model, optimizer, strategy=Checkpointed(compile=True)) as loop:
                loop.step(lambda: loop.model(x).square().sum())
                loop.step(lambda: check() * loop.model(x).square().sum())
                return loop.trajectory.losses
        strategy = getattr(innerloop, way)(compile=True)
        return innerloop.unroll(problem, params, x, strategy=strategy).losses

    run()
    bad["now"] = True
    with pytest.raises(Mine, match="my data is bad") as caught:
        run()
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    bad["now"] = False
    run()


@compiled
def test_an_error_of_the_user_costs_no_comparisons_afterwards() -> None:
    bad = {"now": False}
    calls = []

    def loss(p: Any, h: Any, b: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            calls.append(1)
        if bad["now"]:
            raise Mine
        return (p["w"] * b).square().sum()

    problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))
    losses(problem, StoreAll(compile=True))
    bad["now"] = True
    with pytest.raises(Mine):
        losses(problem, StoreAll(compile=True))
    bad["now"] = False
    calls.clear()
    losses(problem, StoreAll(compile=True))
    assert not calls


def test_a_silenced_warning_leaves_the_filters_as_they_were() -> None:
    before = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with compiling.compiler_at_work(), compiling.compiler_at_work():
            warnings.warn("The .grad attribute of a Tensor that is not a leaf Tensor", stacklevel=1)
            with pytest.raises(UserWarning, match="another"):
                warnings.warn("another", stacklevel=1)
        with pytest.raises(UserWarning, match="grad"):
            warnings.warn("The .grad attribute of a Tensor that is not a leaf Tensor", stacklevel=1)
    assert list(warnings.filters) == before


def test_the_threshold_of_garbage_collection_is_put_back() -> None:
    before = gc.get_threshold()
    try:
        for threshold, inside in (
            ((700, 10, 10), 500_000),
            ((0, 10, 10), 0),
            ((10**6, 1, 1), 10**6),
        ):
            gc.set_threshold(*threshold)
            with suppress(ValueError), compiling.compiler_at_work(), compiling.compiler_at_work():
                assert gc.get_threshold()[0] == inside
                raise ValueError
            assert gc.get_threshold() == threshold
    finally:
        gc.set_threshold(*before)


# -- threads ---------------------------------------------------------------------------------------


@compiled
def test_threads_compile_and_run_uncompiled_loops_at_the_same_time() -> None:
    x = smooth_noise(3, 4, 3)

    def tracked(strategy: Strategy | None) -> Tensor:
        model, factor = Small(), torch.tensor(0.7, requires_grad=True)
        model.load_state_dict(state)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with innerloop.track(model, optimizer, strategy=strategy) as loop:
            for batch in x:
                loop.step(lambda batch=batch: factor * loop.model(batch).square().mean())
            outer = loop.model(x[0]).sin().sum()
        return torch.autograd.grad(outer, factor)[0]

    shared = innerloop.Problem(
        lambda p, h, b: h * (b @ p["w"]).square().mean(), innerloop.optim.sgd(lr=0.1)
    )

    def unrolled(strategy: Strategy | None) -> Any:
        return innerloop.metagradient(
            lambda traj, h: traj.params["w"].sin().sum(),
            shared, {"w": torch.ones(3)}, x, hyper=torch.tensor(0.7), wrt="hyper",
            strategy=strategy or StoreAll(),
        )[1]  # fmt: skip

    state = Small().state_dict()
    ways = [
        (tracked, Checkpointed(compile=True), 1),
        (tracked, Checkpointed(), 15),
        (unrolled, Checkpointed(compile=True), 1),
        (unrolled, StoreAll(compile=True), 1),
        (unrolled, Checkpointed(), 15),
    ]
    expected = {run: run(None) for run in (tracked, unrolled)}
    found: list[tuple[Any, Any]] = []

    def outcome(run: Callable[[Strategy | None], Tensor], strategy: Strategy) -> object:
        try:
            return run(strategy)
        except BaseException as error:
            return error

    def work(run: Callable[[Strategy | None], Tensor], strategy: Strategy, times: int) -> None:
        found.extend((run, outcome(run, strategy)) for _ in range(times))

    threads = [threading.Thread(target=work, args=way) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == sum(times for *_, times in ways)
    for run, value in found:
        assert isinstance(value, Tensor), value
        torch.testing.assert_close(value, expected[run])
