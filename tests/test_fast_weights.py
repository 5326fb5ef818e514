"""``nn.FastWeights`` against a loop over samples and chunks that is written out in plain PyTorch.

The truth takes each inner gradient by ``torch.autograd.grad(create_graph=True)``, one sample at a
time, with ``torch.func.functional_call`` for the module and the update rule by its formula.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import innerloop
from innerloop import Checkpointed, StoreAll
from innerloop.nn import FastWeights
from tests.memory import assert_nothing_is_left

WIDTH, HIDDEN = 3, 4
LOOPS = {
    "plain": None,
    "StoreAll": StoreAll(),
    "Checkpointed": Checkpointed(slots=2),
    "Checkpointed, mixed": Checkpointed(product="mixed"),
}
over_loops = pytest.mark.parametrize("strategy", LOOPS.values(), ids=LOOPS)
over_reads = pytest.mark.parametrize("read", ["before", "after"])


class Inner(nn.Module):
    """What is trained inside: two layers, a weight that is frozen, one that is tied, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.second = nn.Linear(HIDDEN, WIDTH)
        self.third = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.third.weight = self.second.weight
        self.fixed = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        scale: Any = self.scale
        hidden = self.first(x).tanh() * scale
        return self.second(hidden) + self.third(hidden**2) + self.fixed


class Reconstruct(nn.Module):
    """The inner loss, with projections of its own that are trained from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, module: nn.Module, data: Tensor) -> Tensor:
        return (module(self.key(data)) - self.value(data)).square().mean()


class Query(nn.Module):
    """What is read from the fast weights, by a projection of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = module(self.query(x))
        return found


class Rate(nn.Module):
    """A rate that stays positive."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(-0.7))

    def forward(self) -> dict[str, Tensor]:
        return {"lr": self.raw.exp()}


def layer(strategy: object = None, *, optimizer: Any = None, chunk: int = 4, **more: Any) -> Any:
    torch.manual_seed(0)
    rule = innerloop.optim.sgd() if optimizer is None else optimizer
    more = {"output": Query(), "hyper": Rate(), **more}
    made: Any = FastWeights(Inner(), Reconstruct(), rule, chunk, strategy, **more)  # type: ignore[arg-type]
    return made.double()


def sequences(batch: int = 3, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def by_hand(made: Any, x: Tensor, step: Callable[..., Any] | None = None, chunk: int = 4) -> Tensor:
    """The layer's definition: for each sample a loop over its chunks."""
    rate = made.hyper()["lr"] if made.hyper is not None else 0.1
    outputs = []
    for sample in x:
        weights = {n: p for n, p in made.module.named_parameters() if p.requires_grad}
        state: Any = None

        def at(weights: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
            def call(y: Tensor) -> Tensor:
                found: Tensor = torch.func.functional_call(made.module, dict(weights), (y,))
                return found

            return call

        read = []
        for part in sample.split(chunk):
            if made.read == "before":
                read.append(made.output(at(weights), part))
            loss = made.loss(at(weights), part)
            values = list(weights.values())
            grads = torch.autograd.grad(loss, values, create_graph=True)
            named = dict(zip(weights, grads, strict=True))
            if step is None:
                weights = {n: w - rate * named[n] for n, w in weights.items()}
            else:
                weights, state = step(weights, named, state)
            if made.read == "after":
                read.append(made.output(at(weights), part))
        outputs.append(torch.cat(read))
    return torch.stack(outputs)


def inputs_of(made: Any, x: Tensor) -> dict[str, Tensor]:
    return {"x": x, **{n: p for n, p in made.named_parameters() if p.requires_grad}}


def gradients(out: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    found = torch.autograd.grad((out * weights).sum(), list(inputs.values()), allow_unused=True)
    pairs = zip(inputs.items(), found, strict=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in pairs}


def assert_equal(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], atol: float) -> None:
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        torch.testing.assert_close(found[name], expected, rtol=atol, atol=atol, msg=name)


def assert_by_hand(made: Any, x: Tensor, **how: Any) -> None:
    """Values and all gradients are those of the loop written out, to 1e-10."""
    found, truth = made(x), by_hand(made, x, **how)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    inputs = inputs_of(made, x)
    expected = gradients(truth, inputs)
    assert all(g.abs().max() > 1e-4 for g in expected.values()), "a test of zeros"
    assert_equal(gradients(found, inputs), expected, 1e-10)


# -- the derivative --------------------------------------------------------------------------------


@over_reads
@over_loops
def test_it_is_the_loop_written_out(strategy: Any, read: str) -> None:
    assert_by_hand(layer(strategy, read=read), sequences())


@over_reads
@over_loops
@pytest.mark.parametrize(("batch", "length"), [(1, 12), (2, 10), (2, 5), (1, 9)])
def test_lengths_that_no_chunk_divides_and_a_single_sample(
    strategy: Any, read: str, batch: int, length: int
) -> None:
    assert_by_hand(layer(strategy, read=read), sequences(batch, length))


@over_loops
def test_a_sequence_shorter_than_a_chunk(strategy: Any) -> None:
    x = sequences(2, 3)
    made = layer(strategy)
    torch.testing.assert_close(made(x), by_hand(made, x))
    assert gradients(made(x), inputs_of(made, x))["hyper.raw"] == 0
    assert_by_hand(layer(strategy, read="after"), x)


def momentum(weights: Mapping[str, Tensor], grads: Mapping[str, Tensor], state: Any) -> Any:
    new = {n: g if state is None else 0.9 * state[n] + g for n, g in grads.items()}
    return {n: w - 0.1 * new[n] for n, w in weights.items()}, new


def adam(weights: Mapping[str, Tensor], grads: Mapping[str, Tensor], state: Any) -> Any:
    first: Any
    second: Any
    t, first, second = state or (0, dict.fromkeys(grads, 0.0), dict.fromkeys(grads, 0.0))
    t += 1
    first = {n: 0.9 * first[n] + 0.1 * g for n, g in grads.items()}
    second = {n: 0.999 * second[n] + 0.001 * g**2 for n, g in grads.items()}
    new = {
        n: w - 0.1 * first[n] / (1 - 0.9**t) / ((second[n] / (1 - 0.999**t)).sqrt() + 1e-8)
        for n, w in weights.items()
    }
    return new, (t, first, second)


def clipped(weights: Mapping[str, Tensor], grads: Mapping[str, Tensor], state: Any) -> Any:
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    factor = (0.2 / (norm + 1e-6)).clamp(max=1.0)
    return {n: w - 0.1 * factor * grads[n] for n, w in weights.items()}, None


RULES: dict[str, tuple[Any, Any]] = {
    "momentum": (innerloop.optim.sgd(lr=0.1, momentum=0.9), momentum),
    "adam": (innerloop.optim.adam(lr=0.1), adam),
    # The norm is that of one sample, not of all of them.
    "clipped by the norm": (
        innerloop.optim.chain(
            innerloop.optim.clip_by_global_norm(0.2), innerloop.optim.sgd(lr=0.1)
        ),
        clipped,
    ),
}


@over_loops
@pytest.mark.parametrize("name", RULES)
def test_rules_keep_a_state_for_each_sample(strategy: Any, name: str) -> None:
    rule, step = RULES[name]
    assert_by_hand(layer(strategy, optimizer=rule, hyper=None), sequences(), step=step)


@pytest.mark.parametrize(
    "rule",
    [
        innerloop.optim.adafactor(lr=0.1),
        innerloop.optim.adamax(lr=0.1),
        innerloop.optim.nadam(lr=0.1),
        innerloop.optim.radam(lr=0.1),
        innerloop.optim.rmsprop(lr=0.1, momentum=0.5),
        innerloop.optim.groups(
            {"0.*": innerloop.optim.adam(lr=0.1), "*": innerloop.optim.sgd(lr=0.2)}
        ),
        innerloop.optim.in_float32(innerloop.optim.adam(lr=0.1)),
    ],
    ids=repr,
)
def test_a_batch_is_the_samples_one_by_one(rule: Any) -> None:
    """Rules whose formula is long: nothing goes from one sample to another."""

    def inner(module: nn.Module, data: Tensor) -> Tensor:
        return (module(data) - data.flip(-1)).square().mean()

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, False))
    made = FastWeights(module, inner, rule, 4).double()
    x = sequences()
    problem = innerloop.Problem.from_module(
        module, lambda m, hyper, t: inner(m, hyper[4 * t : 4 * t + 4]), rule
    )
    rows = []
    for sample in x:
        traj = innerloop.unroll(problem, None, [0, 1], hyper=sample)
        weights = [traj.at(t).params for t in range(3)]
        parts = zip(weights, sample.split(4), strict=True)
        rows.append(torch.cat([torch.func.functional_call(module, w, (s,)) for w, s in parts]))
    truth, found = torch.stack(rows), made(x)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-10)
    inputs = {"x": x, **dict(module.named_parameters())}
    assert_equal(gradients(found, inputs), gradients(truth, inputs), 1e-8)


def test_the_data_of_the_loss_may_be_others() -> None:
    """Keys, values and a mask, made outside of the layer: the mask takes tokens out."""

    def inner(module: nn.Module, data: Mapping[str, Tensor]) -> Tensor:
        wrong = (module(data["k"]) - data["v"]).square().sum(-1)
        return (wrong * data["mask"]).sum() / 2

    made: Any = FastWeights(
        nn.Linear(WIDTH, WIDTH, bias=False), inner, innerloop.optim.sgd(lr=0.1), 2
    ).double()
    x, k, v = (sequences(2, 5).detach().roll(i, 1).requires_grad_() for i in range(3))
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1]], dtype=torch.bool)
    found = made(x, {"k": k, "v": v, "mask": mask})
    rows = []
    for i in range(2):
        w, read = made.module.weight, []
        for begin in (0, 2, 4):
            here = slice(begin, begin + 2)
            read.append(x[i, here] @ w.T)
            keys, values = k[i, here][mask[i, here]], v[i, here][mask[i, here]]
            w = w - 0.1 * (keys @ w.T - values).T @ keys
        rows.append(torch.cat(read))
    truth = torch.stack(rows)
    inputs = {"x": x, "k": k, "v": v, "start": made.module.weight}
    assert_equal(gradients(found, inputs), gradients(truth, inputs), 1e-10)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


def test_learned_hyper_parameters_by_name() -> None:
    made = layer(
        optimizer=innerloop.optim.sgd(momentum=0.9),
        hyper={"lr": nn.Parameter(torch.tensor(0.1)), "momentum": nn.Parameter(torch.tensor(0.9))},
    )
    x = sequences()
    names = [n for n, _ in made.named_parameters() if n.startswith("hyper.")]
    assert names == ["hyper.lr", "hyper.momentum"]

    def step(weights: Mapping[str, Tensor], grads: Mapping[str, Tensor], state: Any) -> Any:
        lr, mu = made.hyper()["lr"], made.hyper()["momentum"]
        new = {n: g if state is None else mu * state[n] + g for n, g in grads.items()}
        return {n: w - lr * new[n] for n, w in weights.items()}, new

    assert_by_hand(made, x, step=step)


def test_a_second_derivative_of_the_whole_network() -> None:
    """A gradient penalty on the inputs of the layer."""
    made, x = layer(), sequences()
    inputs = inputs_of(made, x)

    def penalty(out: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return g.square().sum()

    found = torch.autograd.grad(penalty(made(x)), list(inputs.values()))
    truth = torch.autograd.grad(penalty(by_hand(made, x)), list(inputs.values()))
    for g, h in zip(found, truth, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-8, atol=1e-9)


@over_loops
def test_no_token_sees_a_later_chunk_nor_another_sample(strategy: Any) -> None:
    made, x = layer(strategy), sequences().detach()
    before = made(x)
    for place in (0, 3, 4, 11):
        changed = x.clone()
        changed[1, place] += 1
        moved = (made(changed) - before).abs().amax(-1) > 0
        assert not moved[[0, 2]].any()
        assert not moved[1, :place].any()
        assert moved[1, place]


# -- inside of a network that is trained -----------------------------------------------------------


class Network(nn.Module):
    """A layer of fast weights between two others; ``around`` runs it."""

    def __init__(self, strategy: Any = None, around: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.fast = layer(strategy)
        self.after = nn.Linear(WIDTH, 2)
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).tanh()
        y = self.fast(x) if self.around is None else self.around(self.fast, x)
        return self.after(x + y)


def network(strategy: Any = None, around: Callable[..., Tensor] | None = None) -> Network:
    torch.manual_seed(3)
    return Network(strategy, around).double()


def hand(made: Any, x: Tensor) -> Tensor:
    return by_hand(made, x)


def all_gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return gradients(
        net(x), {"x": x, **{n: p for n, p in net.named_parameters() if p.requires_grad}}
    )


@over_loops
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_around_the_layer(strategy: Any, reentrant: bool) -> None:
    x = sequences()

    def around(made: Any, y: Tensor) -> Tensor:
        found: Tensor = checkpoint(made, y, use_reentrant=reentrant)
        return found

    net = network(strategy, around)
    weights = torch.randn(3, 12, 2, generator=torch.Generator().manual_seed(2)).double()
    (net(x) * weights).sum().backward()
    found = {"x": x.grad, **{n: p.grad for n, p in net.named_parameters() if p.requires_grad}}
    truth = network(around=hand)
    y = x.detach().requires_grad_()
    (truth(y) * weights).sum().backward()
    expected = {"x": y.grad, **{n: p.grad for n, p in truth.named_parameters() if p.requires_grad}}
    assert_equal(found, expected, 1e-10)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", [None, Checkpointed()], ids=["plain", "Checkpointed"])
def test_checkpointing_around_the_layer_evaluates_a_few_times_only(strategy: Any) -> None:
    """PyTorch's own would begin anew at each chunk: quadratic in the number of chunks."""
    counts = []
    for length in (16, 64):
        made = layer(strategy)
        calls: list[int] = []
        made.loss.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        x = sequences(2, length)
        checkpoint(made, x, use_reentrant=False).sum().backward()
        counts.append(len(calls))
    assert counts[1] <= 5 * counts[0]


@over_loops
def test_training_with_clipping(strategy: Any) -> None:
    """Ten steps of Adam with ``clip_grad_norm_``: the same weights as by the loop written out."""
    nets = network(strategy), network(around=hand)
    x = sequences().detach()
    for net in nets:
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1e-2)
            optimizer.step()
    assert_equal(nets[0].state_dict(), nets[1].state_dict(), 1e-8)


@over_loops
def test_autocast(strategy: Any) -> None:
    """In bfloat16 the inner products are rounded in both; gradients agree as far as that lets them,
    and the fast weights stay in float32."""
    nets = [net.float() for net in (network(strategy), network(around=hand))]
    x = sequences().detach().float()
    found = []
    for net in nets:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x)
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    plain = network(strategy).float()
    plain(x).square().mean().backward()
    exact = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    error = (found[1] - exact).norm()
    assert (found[0] - exact).norm() < 2 * error
    assert error < 0.1 * exact.norm()


@over_loops
def test_evaluation_adapts_too(strategy: Any) -> None:
    made, x = layer(strategy), sequences()
    truth = by_hand(made, x).detach()
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            found = made.eval()(x)
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert not made(x).requires_grad
    made.requires_grad_(False)
    frozen = made(x.detach())
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, truth, rtol=1e-10, atol=1e-10)
    # The start is frozen, what is upstream is not.
    expected = gradients(by_hand(layer(), x), {"x": x})
    assert_equal(gradients(made(x), {"x": x}), expected, 1e-10)
    with torch.inference_mode(), pytest.raises(innerloop.InvalidInputError, match="no_grad"):
        made(x)


def test_a_layer_inside_of_a_tracked_loop_and_under_torch_func() -> None:
    """The network itself is trained by a loop that is differentiated."""

    def trained(net: Network, x: Tensor) -> Tensor:
        with innerloop.track(net, torch.optim.SGD(net.parameters(), 0.1)) as loop:
            for _ in range(2):
                loop.step(loop.model(x).square().mean())
            return loop.model(x).square().mean()

    x = sequences()
    found = []
    for net in (network(), network(Checkpointed(slots=2)), network(around=hand)):
        own = [p for p in net.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(trained(net, x), own))
    for row in found[:2]:
        for g, h in zip(row, found[2], strict=True):
            torch.testing.assert_close(g, h, rtol=1e-8, atol=1e-10)

    net = network()
    params = {n: p.detach() for n, p in net.named_parameters()}

    def value(params: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(net, params, (x,))
        return found.square().mean()

    grads = torch.func.grad(value)(params, x.detach())
    truth = network(around=hand)
    truth(x).square().mean().backward()
    for name, p in truth.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-11)


def test_a_call_at_other_parameters() -> None:
    """``torch.func.functional_call`` in eager code, with tensors that require grad."""
    net, truth = network(), network(around=hand)
    x = sequences()
    params = {
        n: (p * 1.1).detach().requires_grad_(p.requires_grad) for n, p in net.named_parameters()
    }
    outs = [torch.func.functional_call(n, params, (x,)) for n in (net, truth)]
    inputs = {n: p for n, p in params.items() if n != "fast.module.fixed"}
    assert_equal(gradients(outs[0], inputs), gradients(outs[1], inputs), 1e-10)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch
@pytest.mark.parametrize("strategy", [None, Checkpointed(slots=2)], ids=["plain", "Checkpointed"])
def test_a_compiled_network_runs_the_layer_uncompiled(strategy: Any) -> None:
    net, truth = network(strategy), network(around=hand)
    x = sequences()
    compiled: Any = torch.compile(net)
    found = gradients(
        compiled(x), {"x": x, **{n: p for n, p in net.named_parameters() if p.requires_grad}}
    )
    assert_equal(found, all_gradients(truth, x), 1e-9)


DDP = """
import os, sys
import torch, torch.distributed as dist
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from tests.test_fast_weights import network, sequences, Checkpointed
from torch.nn.parallel import DistributedDataParallel

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + folder + "/store", rank=rank, world_size=2)
for name, strategy in (("plain", None), ("checkpointed", Checkpointed(slots=2))):
    net = network(strategy)
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    x = sequences(4).detach()[2 * rank : 2 * rank + 2]
    for _ in range(3):
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
    torch.save(net.state_dict(), folder + "/" + name + str(rank) + ".pt")
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """DistributedDataParallel on two gloo processes, each with half of the samples."""
    root = str(Path(__file__).parent.parent)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DDP.format(root=root), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    try:
        texts = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], texts
    truth = network(around=hand)
    optimizer = torch.optim.SGD(truth.parameters(), 0.1)
    x = sequences(4).detach()
    for _ in range(3):
        optimizer.zero_grad()
        truth(x).square().mean().backward()
        nn.utils.clip_grad_norm_(truth.parameters(), 1.0)
        optimizer.step()
    for name in ("plain", "checkpointed"):
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}{rank}.pt")
            assert_equal(found, truth.state_dict(), 1e-10)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_the_memory_of_64_chunks_is_at_most_1_3_of_that_of_8(read: str) -> None:
    """Forward and backward pass; what is counted is all tensor memory at its peak, without the four
    tensors as long as the sequence that any layer has: input, output, and the gradient of each."""
    from innerloop.strategy._measure import _peak

    def inner(module: nn.Module, data: Tensor) -> Tensor:
        return (module(data) - data.flip(-1)).square().mean()

    def beyond(strategy: Any, chunks: int) -> float:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        made = FastWeights(module, inner, innerloop.optim.sgd(lr=0.1), 16, strategy, read=read)
        x = torch.randn(4, 16 * chunks, 64, requires_grad=True)
        given = torch.randn_like(x)

        def run() -> None:
            x.grad = None
            made(x).backward(given)

        run()
        return _peak(run, torch.device("cpu")) - 4 * x.numel() * x.element_size()

    bounded = [beyond(Checkpointed(slots=4), chunks) for chunks in (8, 64)]
    assert bounded[1] <= 1.3 * bounded[0]


def test_nothing_is_left_behind() -> None:
    for strategy in (None, Checkpointed(slots=2)):
        made, x = layer(strategy), sequences(2, 8)

        def episode(made: Any = made, x: Tensor = x) -> None:
            made(x).sum().backward()

        assert_nothing_is_left(episode, 10)


# -- a module like any other -----------------------------------------------------------------------


def inner_loss(module: nn.Module, data: Tensor) -> Tensor:
    return (module(data) - data.flip(-1)).square().mean()


def simple(**more: Any) -> Any:
    torch.manual_seed(0)
    given = {"optimizer": innerloop.optim.adam(lr=0.1), "chunk": 4, "loss": inner_loss, **more}
    return FastWeights(**{"module": nn.Linear(WIDTH, WIDTH), **given})


def test_it_is_saved_loaded_copied_and_pickled() -> None:
    made, x = layer(), sequences(2, 8).detach()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1)
    expected = made(x)
    other = layer()
    assert (other(x) - expected).abs().max() > 1e-3
    other.load_state_dict(made.state_dict())
    assert list(made.state_dict()) == [
        *("module.fixed", "module.scale", "module.first.weight", "module.first.bias"),
        *("module.second.weight", "module.second.bias", "module.third.weight"),
        *("loss.key.weight", "loss.value.weight", "output.query.weight", "hyper.raw"),
    ]
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    copies = [
        other,
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        torch.load(buffer, weights_only=False),
    ]
    for same in copies:
        torch.testing.assert_close(same(x), expected, rtol=0, atol=0)
        assert same is not made
    with torch.no_grad():
        copies[1].module.first.weight.zero_()
    torch.testing.assert_close(made(x), expected, rtol=0, atol=0)


def test_a_module_that_was_changed_is_run_as_it_is() -> None:
    """Its attributes, its parts and its parameters are looked at in every call."""
    made: Any = FastWeights(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softplus(beta=1.0)),
        inner_loss,
        innerloop.optim.sgd(lr=0.1),
        4,
    )
    x = sequences(2, 4).detach().float()
    made(x)
    made.module[1].beta = 3.0
    torch.testing.assert_close(made(x), made.module(x))
    made.module[1] = nn.Tanh()
    torch.testing.assert_close(made(x), made.module(x))
    made.module[0].weight = nn.Parameter(torch.ones(WIDTH, WIDTH))
    torch.testing.assert_close(made(x), made.module(x))
    made.module[0] = nn.Linear(WIDTH, WIDTH, bias=False)
    with pytest.raises(innerloop.InvalidInputError, match=r"no parameter '0.bias' any more"):
        made(x)


def test_moves_to_another_dtype_and_device() -> None:
    made = layer()
    x = sequences(2, 8).detach()
    assert made.float()(x.float()).dtype == torch.float32
    torch.testing.assert_close(made(x.float()).double(), layer()(x), rtol=1e-4, atol=1e-5)
    assert made.double()(x).dtype == torch.float64
    moved = made.to("meta")
    assert {p.device.type for p in moved.parameters()} == {"meta"}


@over_loops
def test_activation_checkpointing_inside_is_right(strategy: Any) -> None:
    """PyTorch's own does not run under vmap; outside of any loop it is redirected too."""
    found = []
    x = sequences()
    for around in (
        lambda function, *args: function(*args),
        partial(checkpoint, use_reentrant=True),
        partial(checkpoint, use_reentrant=False),
        innerloop.checkpoint_block,
    ):
        torch.manual_seed(0)
        made = FastWeights(
            Inner(),
            partial(_next_token, around),
            innerloop.optim.sgd(lr=0.1),
            4,
            strategy,
            output=partial(_answer, around),
        ).double()
        out = made(x)
        found.append((out.detach(), gradients(out, inputs_of(made, x))))
    for out, grads in found[1:]:
        torch.testing.assert_close(out, found[0][0])
        assert_equal(grads, found[0][1], 1e-10)


def _next_token(around: Callable[..., Tensor], module: Any, data: Tensor) -> Tensor:
    return (around(module, data) - data.roll(1, -1)).square().mean()


def _answer(around: Callable[..., Tensor], module: Any, x: Tensor) -> Tensor:
    return around(module, x.sin())


class Replacing(nn.Module):
    """Puts another tensor in the place of its buffer, which leaves the old one as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.memory: Tensor
        self.register_buffer("memory", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x) + self.memory
        self.memory = 0.5 * self.memory + found.mean(0)
        return found


@over_loops
def test_a_buffer_that_is_replaced_is_refused(strategy: Any) -> None:
    made = FastWeights(
        Replacing(),
        lambda module, data: module(data).square().mean(),
        innerloop.optim.sgd(lr=0.1),
        2,
        strategy,
    ).double()
    with pytest.raises(innerloop.InvalidInputError, match=r"writes a buffer \('module.memory'\)"):
        made(sequences(2, 6))


@over_loops
def test_the_meta_device_is_refused(strategy: Any) -> None:
    made = layer(strategy)
    with pytest.raises(innerloop.InvalidInputError, match="x or data lies on the meta device"):
        made(sequences(2, 8).to("meta"))
    with pytest.raises(innerloop.InvalidInputError, match=r"fast weight .* on the meta device"):
        made.to("meta")(sequences(2, 8))


@pytest.mark.parametrize("strategy", [None, Checkpointed(slots=2)], ids=["plain", "Checkpointed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_with_a_warning(strategy: Any, dtype: torch.dtype) -> None:
    from innerloop._utils import caches

    made, x = layer(strategy), sequences(2, 8).detach()
    expected = made(x)
    caches.clear()
    with pytest.warns(innerloop.PrecisionWarning):
        found = made.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    found.sum().backward()
    assert made.module.first.weight.grad.dtype == dtype


@over_loops
def test_dropout_inside_draws_for_each_sample(strategy: Any) -> None:
    module = nn.Sequential(nn.Linear(WIDTH, 64), nn.Dropout(0.5), nn.Linear(64, WIDTH))
    torch.manual_seed(0)
    made = FastWeights(module, inner_loss, innerloop.optim.sgd(lr=0.1), 4, strategy).double()
    row = sequences(1, 8)
    x = row.detach().expand(2, -1, -1).clone().requires_grad_()
    torch.manual_seed(5)
    first = made(x)
    assert (first[0] - first[1]).abs().max() > 1e-2
    torch.manual_seed(5)
    (g,) = torch.autograd.grad(made(x).square().sum(), x)
    for place in ((0, 1, 2), (1, 5, 0)):
        ends = []
        for h in (1e-6, -1e-6):
            moved = x.detach().clone()
            moved[place] += h
            torch.manual_seed(5)
            ends.append(made(moved).square().sum().item())
        slope = (ends[0] - ends[1]) / 2e-6
        assert g[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)
    made.eval()
    torch.testing.assert_close(made(x)[0], made(x)[1])


def test_an_operation_without_a_second_derivative_is_replaced() -> None:
    """Attention as the inner module, whose fused kernel has none, against the same with the
    composite kernel of PyTorch."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x)[None].chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v)[0]

    torch.manual_seed(0)
    made: Any = FastWeights(Attend(), inner_loss, innerloop.optim.sgd(lr=0.1), 4).double()
    made.output, x = lambda module, part: module(part), sequences(2, 8)
    found = gradients(made(x), inputs_of(made, x))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        by_loss: Any = made
        truth = gradients(by_hand(by_loss, x), inputs_of(made, x))
    assert_equal(found, truth, 1e-8)


# -- what is refused -------------------------------------------------------------------------------


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "no module": (lambda: simple(module=inner_loss), "nn.Module"),
    "a class as the loss": (lambda: simple(loss=nn.MSELoss), "loss is the class MSELoss"),
    "another signature": (lambda: simple(loss=lambda module: 0), "loss is called as"),
    "a frozen module": (
        lambda: simple(module=nn.Linear(2, 2).requires_grad_(False)),
        "nothing to train inside",
    ),
    "torch.optim": (
        lambda: simple(optimizer=torch.optim.SGD([torch.ones(1, requires_grad=True)])),
        "one of innerloop.optim",
    ),
    "lbfgs": (lambda: simple(optimizer=innerloop.optim.lbfgs()), "within its update"),
    "chunk": (lambda: simple(chunk=0), "chunk=0: write a number of tokens"),
    "read": (lambda: simple(read="during"), 'write "before" or "after"'),
    "strategy": (lambda: simple(strategy=Checkpointed), "the class Checkpointed"),
    "a strategy that has no graph": (
        lambda: simple(strategy=innerloop.Evolution(0.1))(torch.ones(2, 8, WIDTH)).sum().backward(),
        "unroll does not see the outer loss",
    ),
    "a strategy that compiles": (
        lambda: simple(strategy=Checkpointed(compile=True)),
        "runs uncompiled",
    ),
    "hyper": (lambda: simple(hyper={"lr": 0.1}), "numbers belong in the optimizer"),
    "another name": (
        lambda: simple(hyper={"rate": nn.Parameter(torch.ones(()))}),
        "has lr, betas",
    ),
    "two dimensions too few": (lambda: simple()(torch.ones(3)), "samples, tokens"),
    "no sample": (lambda: simple()(torch.ones(0, 4, WIDTH)), "has to be a sample"),
    "no token": (lambda: simple()(torch.ones(2, 0, WIDTH)), "a token to read"),
    "other lengths": (
        lambda: simple()(torch.ones(2, 4, WIDTH), torch.ones(2, 5, WIDTH)),
        "samples and the tokens",
    ),
    "no tensor": (lambda: simple()(torch.ones(2, 4, WIDTH), {}), "data holds no tensor"),
    "a vector as the loss": (
        lambda: simple(loss=lambda module, data: module(data).sum(-1))(torch.ones(2, 8, WIDTH)),
        "must return a scalar|what loss",
    ),
    "a loss of something else": (
        lambda: simple(loss=lambda module, data: data.sum())(torch.ones(2, 8, WIDTH)),
        "does not depend on the fast weights",
    ),
    "an output of another length": (
        lambda: simple(output=lambda module, x: module(x).sum(0))(torch.ones(2, 8, WIDTH)),
        "one row for each token",
    ),
    "running statistics": (
        lambda: simple(module=nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)))(
            torch.ones(2, 8, WIDTH)
        ),
        "which all samples would share",
    ),
    "a rate that is too large": (
        lambda: simple(optimizer=innerloop.optim.sgd(lr=1e30))(1e10 * torch.ones(2, 64, WIDTH)),
        "Lower the inner learning rate",
    ),
}


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused_by_name(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(innerloop.InnerLoopError, match=message):
        call()


def test_running_statistics_that_rest_are_no_obstacle() -> None:
    norm = nn.BatchNorm1d(WIDTH)
    made = simple(module=nn.Sequential(nn.Linear(WIDTH, WIDTH), norm)).eval()
    assert made(torch.randn(2, 8, WIDTH)).shape == (2, 8, WIDTH)
    assert norm.running_mean is not None
    assert not norm.running_mean.any()
