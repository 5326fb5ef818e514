"""How often a step runs again: the schedule against dynamic programming, and real loops against the
schedule."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop
from innerloop.strategy import _checkpointed as checkpointed
from innerloop.strategy._engine import schedule, snapshots
from innerloop.strategy._engine.kept_states import ManyStates
from tests.oracles import smooth_noise

pytestmark = pytest.mark.usefixtures("float64")
STEPS, SLOTS = range(61), range(1, 9)


# -- the schedule ----------------------------------------------------------------------------------


@functools.cache
def fewest(steps: int, slots: int) -> int:
    """The fewest advances by dynamic programming: run m steps, keep that state, run the rest
    backwards, then the first m.

    With one slot (the start) the state before every step is reached from the start again.
    """
    if steps <= 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(m + fewest(steps - m, slots - 1) + fewest(m, slots) for m in range(1, steps))


@pytest.mark.parametrize("slots", SLOTS)
def test_advances_are_the_fewest_possible(slots: int):
    for steps in STEPS:
        assert schedule.advances(steps, slots) == fewest(steps, slots), f"{steps} steps"
        assert schedule.replays(steps, slots) == fewest(steps, slots) - max(steps - 1, 0), (
            f"{steps} steps"
        )


@pytest.mark.parametrize("slots", SLOTS[1:])
def test_stride_is_the_best_place_for_the_next_state(slots: int):
    for steps in STEPS[2:]:
        m = schedule.stride(steps, slots)
        assert 1 <= m < steps
        assert m + fewest(steps - m, slots - 1) + fewest(m, slots) == fewest(steps, slots), (
            f"{steps} steps"
        )


def test_replays_that_the_page_of_the_strategies_states():
    found = [round(schedule.replays(1000, slots) / 1000, 2) for slots in (1000, 62, 31, 10)]
    assert found == [0, 0.94, 1.44, 2.64]  # the table in docs/strategies.md


def test_many_slots_need_no_replay_and_one_slot_needs_all():
    """For lengths at which the table of the dynamic programme would be too large: closed forms."""
    for steps in (1, 10, 1000, 100_000):
        assert schedule.replays(steps, steps) == 0
        assert schedule.advances(steps, 1) == steps * (steps - 1) // 2
    # T = binom(s + r, s) steps take r T - binom(s + r, s + 1) advances: s = 2, r = 3 is T = 10.
    assert schedule.advances(10, 2) == 3 * 10 - 10


@pytest.mark.parametrize("slots", SLOTS)
def test_the_times_kept_on_the_way_are_within_the_slots(slots: int):
    for steps in STEPS[1:]:
        times = list(schedule.kept(7, 7 + steps, slots))
        assert len(times) <= slots - 1
        assert times == sorted(set(times))
        assert all(7 < t < 7 + steps for t in times)


# -- real loops ------------------------------------------------------------------------------------


class Counted:
    """A problem that counts how often its loss is evaluated."""

    def __init__(self) -> None:
        self.calls = 0
        self.problem = innerloop.Problem(self.loss, innerloop.optim.sgd(lr=0.1, momentum=0.5))

    def loss(self, params: Any, hyper: Any, batch: Any) -> Tensor:
        self.calls += 1
        return (params["w"] * hyper).sin().square().sum()


def start() -> dict[str, Tensor]:
    return {"w": smooth_noise(2)}


def by_unroll(
    counted: Counted, strategy: innerloop.Checkpointed, batches: Any, steps: int | None
) -> None:
    hyper = torch.tensor(1.3, requires_grad=True)
    traj = innerloop.unroll(
        counted.problem, start(), batches, hyper=hyper, steps=steps, strategy=strategy
    )
    traj.params["w"].sum().backward()
    assert hyper.grad is not None


def by_metagradient(
    counted: Counted, strategy: innerloop.Checkpointed, batches: Any, steps: int | None
) -> None:
    hyper = torch.tensor(1.3)
    innerloop.metagradient(
        lambda traj, hyper: traj.losses.sum(),
        counted.problem,
        start(),
        batches,
        hyper=hyper,
        steps=steps,
        strategy=strategy,
    )


def by_grad(
    counted: Counted, strategy: innerloop.Checkpointed, batches: Any, steps: int | None
) -> None:
    def behind(hyper: Tensor) -> Tensor:
        traj = innerloop.unroll(
            counted.problem, start(), batches, hyper=hyper, steps=steps, strategy=strategy
        )
        return traj.params["w"].sum()

    torch.func.grad(behind)(torch.tensor(1.3))


RUNS = {"unroll": by_unroll, "metagradient": by_metagradient, "grad": by_grad}
Run = Callable[[Counted, innerloop.Checkpointed, Any, "int | None"], None]


@pytest.mark.covering
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize(
    ("steps", "slots"),
    [
        (1, 1),
        (2, 1),
        (2, 2),
        (7, 1),
        (7, 3),
        (10, 3),
        (11, 4),
        (17, 1),
        (23, 2),
        (23, 5),
        (30, 3),
        (30, 30),
    ],
)
def test_a_loop_evaluates_as_often_as_the_schedule_says(run: Run, steps: int, slots: int):
    """T times forward, T times backward, and the replays between."""
    counted = Counted()
    run(counted, innerloop.Checkpointed(slots=slots, product="reverse"), None, steps)
    assert counted.calls == steps + fewest(steps, slots) - (steps - 1) + steps


@pytest.mark.parametrize("slots", ["all", None])
def test_a_short_loop_is_not_replayed_at_all(slots: Any):
    counted = Counted()
    by_unroll(counted, innerloop.Checkpointed(slots=slots, product="reverse"), None, 30)
    assert counted.calls == 60


@pytest.mark.parametrize("slots", [1, 3, "all"])
def test_kept_gradients_are_not_evaluated_again(slots: Any):
    """With ``save="gradients"`` replayed steps take an update each."""
    counted = Counted()
    by_unroll(
        counted, innerloop.Checkpointed(slots=slots, product="reverse", save="gradients"), None, 23
    )
    assert counted.calls == 2 * 23


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_second_backward_starts_over(offload: str | None):
    """``retain_graph``: what was kept has been used up, so it is a new forward pass and a new
    sweep."""
    counted = Counted()
    w = start()["w"].requires_grad_()
    strategy = innerloop.Checkpointed(slots=3, product="reverse", offload=offload)
    hyper = torch.tensor(1.3)
    traj = innerloop.unroll(
        counted.problem, {"w": w}, None, hyper=hyper, steps=23, strategy=strategy
    )
    traj.params["w"].sum().backward(retain_graph=True)
    assert counted.calls == 23 + schedule.replays(23, 3) + 23
    counted.calls = 0
    traj.params["w"].sum().backward()
    assert counted.calls == schedule.advances(23, 3) + 23


# -- how much is kept ------------------------------------------------------------------------------


class Watch:
    """Every mapping of snapshots, whose largest number of entries at once is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        watch, original = self, snapshots.Snapshots

        class Watched(original):  # type: ignore[misc, valid-type]
            def __setitem__(self, t: int, value: Any) -> None:
                super().__setitem__(t, value)
                watch.most = max(watch.most, len(self))

        monkeypatch.setattr(checkpointed, "Snapshots", Watched)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


@pytest.mark.parametrize(
    ("steps", "slots"), [(2, 1), (7, 1), (7, 2), (7, 6), (7, 7), (7, 9), (23, 3), (30, 8)]
)
@pytest.mark.parametrize("known", [True, False])
def test_no_more_states_are_kept_than_there_are_slots(
    steps: int, slots: int, known: bool, watch: Watch
):
    """The start is in one of the slots, and is no snapshot."""
    strategy = innerloop.Checkpointed(slots=slots)
    by_unroll(Counted(), strategy, None if known else drawn(steps), steps if known else None)
    assert watch.most <= slots - 1, "a state besides those of the slots was kept"
    if known:
        assert watch.most == min(slots, steps) - 1, "slots stay empty"


def alive_at_most(steps: int, slots: Any, known: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many states that a step made live at once: memory itself, not the strategy's count of
    it."""
    monkeypatch.setattr(
        "innerloop.strategy._engine.snapshots._compact", lambda value: value
    )  # copies would live unseen
    counted = Counted()
    update, made, most = counted.problem.update, [], 0

    def watched(*args: Any) -> Any:
        nonlocal most
        new = update(*args)
        made.append(weakref.ref(new.params["w"]))
        made[:] = [reference for reference in made if reference() is not None]
        most = max(most, len(made))
        return new

    monkeypatch.setattr(counted.problem, "update", watched)
    strategy = innerloop.Checkpointed(slots=slots, product="reverse")
    by_unroll(counted, strategy, None if known else drawn(steps), steps if known else None)
    return most


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("slots", [1, 3, 6])
def test_the_states_that_live_at_once(slots: int, known: bool, monkeypatch: pytest.MonkeyPatch):
    """Those of the slots but the start, the last two of the forward pass, and the two of a step:
    however long the loop is."""
    assert alive_at_most(25, slots, known, monkeypatch) <= slots - 1 + 4


@pytest.mark.parametrize("known", [True, False])
def test_every_state_lives_where_all_are_kept(known: bool, monkeypatch: pytest.MonkeyPatch):
    """So that the test above can fail."""
    assert alive_at_most(25, "all", known, monkeypatch) >= 24


# -- unknown length --------------------------------------------------------------------------------


def drawn(steps: int) -> Iterator[int]:
    yield from range(steps)


def online_replays(steps: int, slots: int) -> int:
    counted = Counted()
    by_unroll(counted, innerloop.Checkpointed(slots=slots, product="reverse"), drawn(steps), None)
    return counted.calls - 2 * steps


@pytest.mark.parametrize("slots", [2, 3, 4, 5, 8])
def test_an_iterator_costs_at_most_three_tenths_more(slots: int):
    """Where its length is not known beforehand, against the optimum of that length; a step is two
    evaluations without replay."""
    for steps in (1, 2, 3, 5, 9, 17, 33):
        ours, best = (
            2 * steps + online_replays(steps, slots),
            2 * steps + schedule.replays(steps, slots),
        )
        assert best <= ours <= 1.3 * best, (
            f"{steps} steps: {ours} evaluations, the optimum has {best}"
        )


@pytest.mark.parametrize("slots", [3, 8, "all"])
def test_an_iterator_that_fits_is_not_replayed(slots: Any):
    for steps in (1, 2, 3) if slots != "all" else (1, 20):
        assert online_replays(steps, slots) == 0


def test_an_iterator_without_slots_given_keeps_many():
    assert online_replays(40, None) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("room", [0, 10_000, 40_000])
def test_a_hand_written_loop_keeps_as_many_as_there_is_room_for(room: int) -> None:
    """A state takes 100 bytes; 40 fit in any case, and 2 √300 are 34."""
    kept = ManyStates(100, 4_000, None, stride=1)
    kept.make_room(room)
    times = range(300)
    for t in times:
        kept.offer(t, {"w": torch.tensor(float(t))})
    held = {kept.newest(t)[0] for t in times}
    expected = min(max(40, room // 100), 300)
    assert expected / 2 < len(held) <= expected
    assert (len(held) == 300) == (room == 40_000)
