"""``map_tasks`` is the Python loop over the tasks, in chunks and on several processes."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from innerloop._metagradient.tasks import _mixed
from tests.backends import trace_only
from tests.oracles import smooth_noise

pytestmark = pytest.mark.usefixtures("float64")
TASKS, STEPS = 7, 3
shared_leaf = torch.tensor(2.0, requires_grad=True)

problem = innerloop.Problem(
    lambda p, h, b: F.mse_loss((b[0] @ p["w"]).tanh() @ p["v"], b[1]) * h["scale"],
    innerloop.optim.adam(eps=0.1),
    optimizer_hyper=lambda h, t: {"lr": h["lr"][t]},
)


def tasks() -> dict[str, Any]:
    """Data, initial weights and hyper-parameters of each task; the name goes to all."""
    return {
        "x": smooth_noise(TASKS, STEPS, 5, 3),
        "y": smooth_noise(TASKS, STEPS, 5, phase=1.0),
        "w": 0.5 * smooth_noise(TASKS, 3, 4, phase=2.0),
        "lr": 0.1 + 0.05 * smooth_noise(TASKS, STEPS, phase=3.0),
        "name": "a task",
    }


def shared() -> dict[str, Tensor]:
    return {"v": smooth_noise(4, phase=4.0), "scale": torch.tensor(0.7)}


def one_task(task: dict[str, Any], common: dict[str, Tensor]) -> Any:
    assert task["name"] == "a task"
    return innerloop.metagradient(
        lambda traj, h: traj.params["w"].sin().sum() + traj.losses.sum(),
        problem,
        {"w": task["w"], "v": common["v"]},
        (task["x"], task["y"]),
        hyper={"lr": task["lr"], "scale": common["scale"]},
    )


def of(i: int) -> dict[str, Any]:
    return {n: x[i] if isinstance(x, Tensor) else x for n, x in tasks().items()}


def by_a_loop(function: Any, *common: Any) -> list[Tensor]:
    rows = [leaves(function(of(i), *common)) for i in range(TASKS)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def leaves(found: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(found)


def assert_equal(found: Any, expected: Any) -> None:
    for ours, theirs in zip(leaves(found), leaves(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 20])
def test_it_is_the_python_loop(chunk_size: int | None) -> None:
    expected = by_a_loop(one_task, shared())
    found = innerloop.map_tasks(one_task, tasks(), shared(), chunk_size=chunk_size)
    assert_equal(found, expected)
    for reduce, total in (("sum", lambda x: x.sum(0)), ("mean", lambda x: x.mean(0))):
        found = innerloop.map_tasks(
            one_task, tasks(), shared(), chunk_size=chunk_size, reduce=reduce
        )
        assert_equal(found, [total(x) for x in expected])


@pytest.mark.parametrize("strategy", [innerloop.Checkpointed(slots=2), innerloop.FirstOrder()])
def test_with_every_strategy(strategy: innerloop.strategy.Strategy) -> None:
    def one(task: dict[str, Any], common: dict[str, Tensor]) -> Any:
        return innerloop.metagradient(
            lambda traj, h: traj.params["w"].sin().sum(),
            problem,
            {"w": task["w"], "v": common["v"]},
            (task["x"], task["y"]),
            hyper={"lr": task["lr"], "scale": common["scale"]},
            wrt="params",
            strategy=strategy,
        )

    found = innerloop.map_tasks(one, tasks(), shared(), chunk_size=3)
    assert_equal(found, by_a_loop(one, shared()))


def noisy(task: dict[str, Any]) -> Any:
    return {
        "dropped": F.dropout(task["w"], 0.5, True),
        "drawn": torch.randn(2) * torch.rand(()),
        "permuted": torch.randperm(4),
    }


def test_each_call_draws_other_numbers() -> None:
    """From the user's generator, so that a seed repeats them all."""

    def calls() -> list[Tensor]:
        torch.manual_seed(8)
        return [innerloop.map_tasks(noisy, tasks())["drawn"] for _ in range(6)]

    first = calls()
    assert len({tuple(x.flatten().tolist()) for x in first}) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, calls(), strict=True))


def test_the_mixing_of_seeds_is_that_of_splitmix64() -> None:
    """The first two outputs for the seed 0 (Steele, Lea & Flood 2014), less their lowest bit."""
    step = 0x9E3779B97F4A7C15
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert [_mixed(i * step) for i in (1, 2)] == [x >> 1 for x in outputs]


def test_random_numbers_belong_to_the_task() -> None:
    found = []
    for size in (None, 1, 2, 5):
        torch.manual_seed(3)
        found.append((*leaves(innerloop.map_tasks(noisy, tasks(), chunk_size=size)), torch.rand(3)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)
    drawn = found[0][1]
    assert len(drawn.unique()) == drawn.numel()
    again = innerloop.map_tasks(noisy, tasks())
    assert not torch.equal(again["drawn"], drawn)


def test_the_same_random_numbers_for_all_and_none() -> None:
    found = innerloop.map_tasks(lambda t: torch.randn(2), tasks(), randomness="same", chunk_size=3)
    assert torch.equal(found, found[:1].expand(TASKS, 2))
    with pytest.raises(RuntimeError, match="random"):
        innerloop.map_tasks(noisy, tasks(), randomness="error")


def test_dropout_in_a_meta_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    learned = innerloop.Problem.from_module(
        model,
        lambda m, h, b: (m(b[0]).squeeze(-1) - b[1]).square().mean(),
        innerloop.optim.sgd(lr=0.1),
    )
    params = {n: p.detach() for n, p in model.named_parameters()}

    def one(task: dict[str, Any], params: dict[str, Tensor], strategy: Any) -> Any:
        return innerloop.metagradient(
            lambda traj, h: sum(p.sin().sum() for p in traj.params.values()),
            learned,
            params,
            (task["x"], task["y"]),
            wrt="params",
            strategy=strategy,
        )

    found = []
    for size, strategy in ((1, None), (4, None), (4, innerloop.Checkpointed(slots=2))):
        torch.manual_seed(5)
        found.append(
            innerloop.map_tasks(partial(one, strategy=strategy), tasks(), params, chunk_size=size)
        )
    assert_equal(found[0], found[1])
    # Steps that run again draw the same masks.
    assert_equal(found[0], found[2])


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(6),
    "without momentum": lambda: nn.BatchNorm1d(6, momentum=None),
    "without weights": lambda: nn.BatchNorm1d(6, affine=False),
    "BatchNorm2d": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3, 1)), nn.BatchNorm2d(2), nn.Flatten()
    ),
    "InstanceNorm1d": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "evaluation": lambda: nn.BatchNorm1d(6).eval(),
    "without statistics": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "InstanceNorm1d without": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2), nn.Flatten()
    ),
    "LayerNorm": lambda: nn.LayerNorm(6),
    "GroupNorm": lambda: nn.GroupNorm(2, 6),
}


@pytest.mark.parametrize("strategy", [None, innerloop.Checkpointed(slots=2)])
@pytest.mark.parametrize("norm", sorted(NORMS))
def test_each_task_has_running_statistics_of_its_own(
    norm: str, strategy: innerloop.strategy.Strategy | None
) -> None:
    """And the outer loss may be one of the trained model in evaluation mode."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 6, bias=False), NORMS[norm](), nn.Tanh(), nn.Linear(6, 1))
    model = model.double()
    learned = innerloop.Problem.from_module(
        model,
        lambda m, h, b: (m(b[0]).squeeze(-1) - b[1]).square().mean(),
        innerloop.optim.sgd(lr=0.1),
    )
    before = {n: b.clone() for n, b in model.named_buffers()}
    params = {n: p.detach() for n, p in model.named_parameters()}
    call, _, _ = innerloop.functional(copy.deepcopy(model).eval())

    def one(task: dict[str, Any], params: dict[str, Tensor]) -> Any:
        def outer(traj: Any, hyper: Any) -> Tensor:
            out, _ = call(dict(traj.params), task["x"][0], buffers=traj.at(-1).buffers)
            found: Tensor = out.square().sum()
            return found

        return innerloop.metagradient(
            outer, learned, params, (task["x"], task["y"]), wrt="params", strategy=strategy
        )

    found = innerloop.map_tasks(one, tasks(), params, chunk_size=3)
    assert_equal(found, by_a_loop(one, params))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_a_backward_pass_through_vmap_of_a_loop(norm: str) -> None:
    """PyTorch's own second derivative of layer_norm is wrong there, without an error."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 6), NORMS[norm](), nn.Tanh(), nn.Linear(6, 1)).double()
    learned = innerloop.Problem.from_module(
        model,
        lambda m, h, b: (m(b).squeeze(-1) - b.sum(1)).square().mean(),
        innerloop.optim.sgd(lr=0.1),
    )
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}

    def reached(params: dict[str, Tensor], x: Tensor) -> Tensor:
        traj = innerloop.unroll(learned, params, x)
        return torch.stack([p.square().sum() for p in traj.params.values()]).sum()

    data, leaves = tasks()["x"], list(params.values())
    together = torch.func.vmap(reached, (None, 0))(params, data).sum()
    found = torch.autograd.grad(together, leaves)
    expected = torch.autograd.grad(torch.stack([reached(params, x) for x in data]).sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_forward_mode_around_a_meta_gradient_of_several_values() -> None:
    """One hyper-parameter has a tangent, the other none."""

    def gradient(lr: Tensor) -> Tensor:
        hyper = {"scale": torch.tensor(0.7), "lr": lr}
        _, grads = innerloop.metagradient(
            lambda traj, h: traj.params["w"].sin().sum(),
            problem,
            {"w": of(0)["w"], "v": shared()["v"]},
            (of(0)["x"], of(0)["y"]),
            hyper=hyper,
            wrt="hyper",
        )
        found: Tensor = grads["scale"] + grads["lr"].sum()
        return found

    lr = of(0)["lr"]
    slope = torch.func.jvp(gradient, (lr,), (torch.ones_like(lr),))[1]
    step = 1e-6
    difference = (gradient(lr + step) - gradient(lr - step)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-7)


class Counting(nn.Module):
    """Sums what it sees in a buffer, in place or not."""

    seen: Tensor

    def __init__(self, in_place: bool, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(shape))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.seen += x.detach().sum()
        else:
            self.seen = self.seen + x.detach().sum()
        return x @ self.weight


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_buffer_of_the_users_own_has_to_be_assigned(shape: tuple[int, ...]) -> None:
    def count(task: dict[str, Any], in_place: bool) -> Tensor:
        learned = innerloop.Problem.from_module(
            Counting(in_place, shape),
            lambda m, h, x: m(x).square().mean(),
            innerloop.optim.sgd(lr=0.1),
        )
        found: Tensor = innerloop.unroll(learned, None, task["x"]).at(-1).buffers["seen"].detach()
        return found

    found = innerloop.map_tasks(partial(count, in_place=False), tasks())
    torch.testing.assert_close(found.flatten(), tasks()["x"].sum((1, 2, 3)))
    with pytest.raises(innerloop.NotDifferentiableError, match="assign a new tensor to it"):
        innerloop.map_tasks(partial(count, in_place=True), tasks())


# -- operations that PyTorch's vmap refuses --------------------------------------------------------


class _Recurrent(nn.Module):
    """A recurrent layer, or a cell that is called in a loop, over six times of three numbers."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer = kind(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.RNNBase):
            out: Tensor = self.layer(x.unsqueeze(1))[0]
            return out
        state: Any = None
        for now in x:
            state = self.layer(now.unsqueeze(0), state)
        last: Tensor = state[0] if isinstance(state, tuple) else state
        return last


def _adapted(
    model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]
) -> Callable[[Tensor], tuple[Any, Any]]:
    """Return the meta-gradient of three steps on one task's data."""
    trained = innerloop.Problem.from_module(
        model, lambda model, hyper, x: loss(model, x), innerloop.optim.adam(0.1, eps=0.1)
    )
    params = {name: p.detach() for name, p in model.named_parameters()}

    def one(x: Tensor) -> tuple[Any, Any]:
        value, grads = innerloop.metagradient(
            lambda traj, h: torch.stack([p.square().sum() for p in traj.params.values()]).sum(),
            trained,
            params,
            x.expand(3, *x.shape),
            wrt="params",
        )
        return value, grads

    return one


@pytest.mark.parametrize(
    "kind", [nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell], ids=lambda k: k.__name__
)
def test_recurrent_layers_are_the_python_loop(kind: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    one = _adapted(_Recurrent(kind), lambda model, x: model(x).square().mean())
    data = smooth_noise(4, 6, 3)
    values, grads = innerloop.map_tasks(one, data)
    for i, x in enumerate(data):
        value, expected = one(x)
        torch.testing.assert_close(values[i], value, rtol=1e-10, atol=1e-12)
        for name, grad in expected.items():
            torch.testing.assert_close(grads[name][i], grad, rtol=1e-8, atol=1e-10)


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.normal of means": lambda y: y + torch.normal(y, 2.0),
    "torch.normal of deviations": lambda y: y + torch.normal(0.5, y.exp()),
    "torch.normal of a size": lambda y: y + torch.normal(0.0, 2.0, (6, 3)),
    "empty": lambda y: y * torch.empty(3).exponential_(),
    "Normal.sample": lambda y: y * torch.distributions.Normal(y, 1.0).sample(),
    "Normal.rsample": lambda y: torch.distributions.Normal(y, y.exp()).rsample(),
    "MultivariateNormal": lambda y: torch.distributions.MultivariateNormal(
        y, torch.eye(3)
    ).rsample(),
    "Laplace": lambda y: torch.distributions.Laplace(y, 1.0).rsample(),
    "Exponential": lambda y: torch.distributions.Exponential(y.exp()).rsample(),
    "Cauchy": lambda y: torch.distributions.Cauchy(y, 1.0).rsample().tanh(),
    "StudentT": lambda y: y + torch.distributions.StudentT(torch.tensor(3.0)).rsample((6, 1)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_in_place_belongs_to_the_task(name: str) -> None:
    """Whatever the chunks are, the numbers are those of the task, and differ from task to task."""
    torch.manual_seed(0)
    one = _adapted(nn.Linear(3, 3), lambda model, x: DRAWS[name](model(x)).square().mean())
    same = smooth_noise(6, 3).expand(4, 6, 3)
    found = []
    for chunk_size in (4, 3, 1):
        torch.manual_seed(7)
        found.append(innerloop.map_tasks(one, same, chunk_size=chunk_size))
    values, grads = found[0]
    assert len(set(values.tolist())) == 4
    for others, other_grads in found[1:]:
        torch.testing.assert_close(others, values, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(other_grads["weight"], grads["weight"], rtol=1e-8, atol=1e-10)


@pytest.mark.compiled
def test_a_new_tensor_in_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the operations are not replaced, and the compiler must not follow the question."""
    trace_only(monkeypatch)
    one = _adapted(nn.Linear(3, 3), lambda model, x: (model(x) * x.new_empty(3).fill_(2)).sum())
    data = smooth_noise(4, 6, 3)
    found = innerloop.map_tasks(one, data, compile=True)
    torch.testing.assert_close(found, innerloop.map_tasks(one, data), rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda y: F.rrelu(y, training=True), "torch.where"),
        (lambda y: torch.distributions.Dirichlet(y.exp()).rsample(), "setup_context"),
        (lambda y: torch.distributions.Gamma(y.exp(), 1.0).rsample(), "another form"),
        (lambda y: y * torch.zeros(3).normal_(), "torch.empty_like"),
        (lambda y: y / torch.div(y.detach(), 2.0, out=torch.ones(6, 3)), "out="),
    ],
    ids=["rrelu", "Dirichlet", "Gamma", "in place", "out"],
)
def test_what_cannot_run_for_all_rows_says_what_to_write(
    loss: Callable[[Tensor], Tensor], says: str
) -> None:
    one = _adapted(nn.Linear(3, 3), lambda model, x: loss(model(x)).square().mean())
    with pytest.raises(innerloop.errors.NotDifferentiableError, match=says):
        innerloop.map_tasks(one, smooth_noise(4, 6, 3))


def test_leaves_of_other_kinds_are_reduced_too() -> None:
    def one(task: dict[str, Any]) -> Any:
        z = torch.complex(task["w"].sum(), task["y"].sum())
        return {"complex": z, "count": torch.tensor(2), "true": task["w"].sum() > 0, "none": None}

    expected = innerloop.map_tasks(one, tasks())
    found = innerloop.map_tasks(one, tasks(), reduce="sum", chunk_size=2)
    torch.testing.assert_close(found["complex"], expected["complex"].sum())
    assert found["count"] == 2 * TASKS
    assert found["true"] == expected["true"].sum()
    assert found["none"] is None


def test_progress_counts_tasks() -> None:
    seen: list[tuple[str, int, int | None]] = []
    innerloop.map_tasks(
        lambda t: t["w"].sum(), tasks(), chunk_size=3, progress=lambda *row: seen.append(row)
    )
    assert seen == [("forward", 3, 7), ("forward", 6, 7), ("forward", 7, 7)]


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((lambda t, p: p["v"].sum() * t["w"].sum(),), {}, r"shared\[0\]\['v'\] requires grad"),
        ((lambda t: t,), {"tasks": {"x": torch.zeros(())}}, "has no dimension"),
        ((lambda t: t,), {"tasks": {"x": torch.zeros(2), "y": torch.zeros(3)}}, "it differs"),
        ((lambda t: t,), {"tasks": torch.zeros(0, 2)}, "no tasks"),
        ((lambda t: t,), {"tasks": None}, "no tensor"),
        ((lambda t: t,), {"chunk_size": 0}, "chunk_size"),
        ((lambda t: t,), {"reduce": "max"}, "reduce"),
        ((lambda t: t,), {"randomness": "some"}, "randomness"),
        ((lambda t: t["w"] * shared_leaf,), {}, "through a tensor that fn has not got"),
        ((lambda t: t["w"].sum(),), {"group": object()}, "reduce is None"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], options: dict[str, Any], says: str) -> None:
    given = options.pop("tasks", tasks())
    common = ({"v": torch.ones(2, requires_grad=True)},) if "shared" in says else ()
    with pytest.raises(innerloop.InvalidInputError, match=says):
        innerloop.map_tasks(*arguments, given, *common, **options)


def test_the_error_shows_the_form_to_write() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(innerloop.InvalidInputError, match=r"value, grads = map_tasks\(one_task"):
        innerloop.map_tasks(lambda t, w: t["w"].sum() * w, tasks(), w)


def test_an_error_leaves_the_random_state() -> None:
    before = torch.get_rng_state()

    def bad(task: Any) -> Tensor:
        torch.rand(3)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        innerloop.map_tasks(bad, tasks())
    assert torch.equal(torch.get_rng_state(), before)


# -- several processes -----------------------------------------------------------------------------

PROGRAM = """
import datetime, os, sys, time
import torch, innerloop
import torch.distributed as dist
sys.path.insert(0, {root!r})
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
from tests.test_map_tasks import noisy, one_task, shared, tasks

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
group = None
if size > 1:
    dist.init_process_group("gloo", init_method="file://" + folder + "/store", rank=rank,
                            world_size=size)
    group = dist.group.WORLD
torch.manual_seed(3)
{body}
"""


def start(tmp_path: Path, size: int, body: str) -> list[subprocess.Popen[str]]:
    root = str(Path(__file__).parent.parent)
    program = PROGRAM.format(root=root, body=textwrap.dedent(body))
    (tmp_path / "store").unlink(missing_ok=True)
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(size), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(size)
    ]


def outputs(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[str]:
    try:
        return [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()


SAVE = """
    found = innerloop.map_tasks(one_task, tasks(), shared(), chunk_size=2, reduce="mean",
                                group=group)
    drawn = innerloop.map_tasks(noisy, tasks(), reduce="sum", group=group)
    two = {n: x[:2] if isinstance(x, torch.Tensor) else x for n, x in tasks().items()}
    fewer = innerloop.map_tasks(one_task, two, shared(), reduce="sum", group=group)
    torch.save((found, drawn, fewer, torch.rand(2)), f"{folder}/{size}-{rank}.pt")
"""


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_equal_one(tmp_path: Path, size: int) -> None:
    for count in (1, size):
        found = outputs(start(tmp_path, count, SAVE))
        assert all(text == "" for text in found), found
    expected = leaves(torch.load(tmp_path / "1-0.pt"))
    for rank in range(size):
        assert_equal(leaves(torch.load(tmp_path / f"{size}-{rank}.pt")), expected)


def test_a_process_that_is_killed_raises_on_the_others(tmp_path: Path) -> None:
    body = """
    def slow(task, common):
        print("begins", flush=True)
        time.sleep(1.0 if rank == 0 else 600)
        return task["w"].sum()
    try:
        innerloop.map_tasks(slow, tasks(), shared(), reduce="sum", group=group)
    except innerloop.ProcessGroupError as error:
        print("raised", error)
    """
    first, second = start(tmp_path, 2, body)
    assert second.stdout is not None
    assert second.stdout.readline() == "begins\n"
    begin = time.monotonic()
    second.send_signal(signal.SIGKILL)
    (text,) = outputs([first], timeout=30)
    assert "raised another process of the group has ended" in text
    assert time.monotonic() - begin < 30
    second.communicate()


def test_an_error_on_one_process_raises_on_the_others(tmp_path: Path) -> None:
    body = """
    def bad(task, common):
        if rank == 1:
            raise KeyError("mine")
        return task["w"].sum()
    try:
        innerloop.map_tasks(bad, tasks(), shared(), reduce="sum", group=group)
    except Exception as error:
        print(type(error).__name__, error)
    """
    first, second = outputs(start(tmp_path, 2, body))
    assert "ProcessGroupError fn raised an error on process 1" in first
    assert second == "KeyError 'mine'\n"


OUTER = """
    w = {"v": torch.ones(4), "scale": torch.tensor(0.7)}
    optimizer = torch.optim.Adam([x.requires_grad_() for x in w.values()], lr=0.05)
    counters = {"step": 0}
    state = innerloop.OuterState(model=w, optimizer=optimizer, counters=counters)
    path = folder + "/outer.pt"
    if os.path.exists(path):
        state.load(path)
    while counters["step"] < int(os.environ["UNTIL"]):
        fixed = {n: x.detach() for n, x in w.items()}
        def step(task, common):
            value, grads = one_task(task, common)
            return {"v": grads["params"]["v"] + torch.randn(4), "scale": grads["hyper"]["scale"]}
        grads = innerloop.map_tasks(step, tasks(), fixed, reduce="mean", group=group)
        optimizer.zero_grad()
        innerloop.assign(w, grads)
        optimizer.step()
        counters["step"] += 1
        if rank == 0:
            state.save(path)
    torch.save({n: x.detach() for n, x in w.items()}, f"{folder}/end-{rank}.pt")
"""


@pytest.mark.slow
def test_an_outer_loop_resumes_on_another_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: dict[tuple[int, ...], Any] = {}
    for sizes in ((2, 2), (2, 1), (2,)):
        (tmp_path / "outer.pt").unlink(missing_ok=True)
        for i, size in enumerate(sizes):
            monkeypatch.setenv("UNTIL", "2" if i + 1 < len(sizes) else "4")
            found = outputs(start(tmp_path, size, OUTER))
            assert all(text == "" for text in found), found
        ends[sizes] = torch.load(tmp_path / "end-0.pt")
    for name, whole in ends[(2,)].items():
        assert torch.equal(ends[(2, 2)][name], whole)
        torch.testing.assert_close(ends[(2, 1)][name], whole, rtol=1e-10, atol=1e-10)
