"""Activation checkpointing inside a loop: the gradients are those of the model without it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import innerloop
from innerloop import Checkpointed, FirstOrder, InvalidInputError, NotDifferentiableError
from innerloop._inner_gradient import block
from innerloop._utils import torch_private, tree
from tests.memory import assert_nothing_is_left

STEPS = 3
KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
Around = Callable[..., Any]
"""``around(function, *args, **kwargs)``: calls a function, checkpointed or not."""


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a checkpoint computes."""
    for name in ("preserve_rng_state", "context_fn", "determinism_check", "use_reentrant"):
        kwargs.pop(name, None)
    return function(*args, **kwargs)


def ours(**settings: Any) -> Around:
    return partial(checkpoint, **settings)


NON_REENTRANT = ours(use_reentrant=False)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the blocks that become nodes."""
    count = [0]
    apply = block._Node.apply

    def counting(function: Any, outputs: Any, *values: Any) -> Any:
        count[0] += outputs is not None
        return apply(function, outputs, *values)

    block._Node.apply = counting  # type: ignore[method-assign]
    try:
        yield count
    finally:
        block._Node.apply = apply  # type: ignore[method-assign]


def features(t: int, width: int = 4) -> Tensor:
    return torch.randn(6, width, generator=torch.Generator().manual_seed(t))


def assert_close(found: list[Any], truth: list[Any]) -> None:
    assert len(found) == len(truth)
    for a, b in zip(found, truth, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Net(nn.Module):
    """A body that may be checkpointed, and a head."""

    def __init__(self, around: Around, drop: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.around = around
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 5)
        self.drop = nn.Dropout(drop)
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()
        self.head = nn.Linear(5, 1)

    def body(self, x: Tensor) -> Any:
        return self.norm(self.drop(self.second(self.first(x).tanh()).tanh()))

    def hidden(self, x: Tensor) -> Tensor:
        found: Tensor = self.around(self.body, x)
        return found

    def forward(self, x: Tensor) -> Any:
        return self.head(self.hidden(x).sin())


def loss_of(model: nn.Module, t: int) -> Tensor:
    return F.mse_loss(model(features(t)), features(t).sum(1, keepdim=True))


Make = Callable[[Around], nn.Module]
Loss = Callable[[Any, int], Tensor]


def tracked(
    make: Make, around: Around, loss: Loss = loss_of, strategy: Any = None, **more: Any
) -> list[Any]:
    """The outer loss, its gradients and the buffers of a hand-written loop."""
    torch.manual_seed(0)
    model = make(around)
    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with innerloop.track(model, optimizer, hyper={"lr": lr}, strategy=strategy, **more) as loop:
        for t in range(STEPS):
            if strategy is None:
                loop.step(loss(loop.model, t))
            else:
                loop.step(lambda: loss(loop.model, t))  # noqa: B023
        outer = loss(loop.model, STEPS)
    grads = torch.autograd.grad(outer, [*model.parameters(), lr], allow_unused=True)
    return [outer.detach(), *grads, *loop.buffers().values()]


def unrolled(make: Make, around: Around, loss: Loss = loss_of, strategy: Any = None) -> list[Any]:
    """The outer loss and its gradients, by `metagradient`."""
    torch.manual_seed(0)
    problem = innerloop.Problem.from_module(
        make(around),
        lambda model, hyper, t: loss(model, t),
        innerloop.optim.sgd(lr=0.1, momentum=0.5),
        optimizer_hyper=("lr",),
    )

    def outer(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
        return torch.stack([p.square().sum() for p in traj.params.values()]).sum()

    some = type(strategy).__name__ in ("Truncated", "FirstOrder", "ForwardMode")
    found = innerloop.metagradient(
        outer,
        problem,
        None,
        list(range(STEPS)),
        hyper={"lr": torch.tensor(0.1, requires_grad=True)},
        wrt=("hyper",) if some else ("params", "hyper"),
        strategy=strategy,
    )
    return list(tree.tensors(found))


WAYS: dict[str, Callable[..., list[Any]]] = {
    "track": tracked,
    "track, Checkpointed": partial(tracked, strategy=Checkpointed(slots=1)),
    "track, first order": partial(tracked, first_order=True),
    "track, outer": partial(tracked, learn="outer"),
    "track, StoreAll": partial(tracked, strategy=innerloop.StoreAll()),
    "track, Truncated": partial(tracked, strategy=innerloop.Truncated(2), learn="outer"),
    "track, FirstOrder": partial(tracked, strategy=FirstOrder()),
    "StoreAll": unrolled,
    "Checkpointed": partial(unrolled, strategy=Checkpointed(slots=1)),
    "Truncated": partial(unrolled, strategy=innerloop.Truncated(2)),
    "FirstOrder": partial(unrolled, strategy=FirstOrder()),
    "ForwardMode": partial(unrolled, strategy=innerloop.ForwardMode()),
}


@KINDS
@pytest.mark.parametrize("norm", [False, True], ids=["", "batch norm"])
@pytest.mark.parametrize("drop", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("way", WAYS)
def test_the_gradients_are_those_of_the_plain_model(
    way: str, drop: float, norm: bool, reentrant: bool
):
    make = partial(Net, drop=drop, norm=norm)
    with counted() as blocks:
        found = WAYS[way](make, ours(use_reentrant=reentrant))
    assert_close(found, WAYS[way](make, plainly))
    # In forward mode the function itself runs; the loss of the first step and that of the last are
    # called once more, for what they store.
    assert (blocks[0] == 2) if way == "ForwardMode" else blocks[0]


class Transformer(nn.Module):
    """A small GPT, each of whose layers may be checkpointed."""

    def __init__(self, around: Around) -> None:
        super().__init__()
        self.around = around
        self.token, self.place = nn.Embedding(7, 8), nn.Parameter(torch.randn(5, 8))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(8, 7)
        self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).triu(1))

    def forward(self, tokens: Tensor) -> Any:
        x = self.token(tokens) + self.place
        for layer in self.layers:
            x = self.around(lambda y: layer(y, src_mask=self.mask), x)  # noqa: B023
        return self.head(x)


def next_token(model: nn.Module, t: int) -> Tensor:
    text = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(t))
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


ESSENTIAL = ("track", "track, Checkpointed", "StoreAll", "Checkpointed")


@KINDS
@pytest.mark.parametrize("way", ESSENTIAL)
def test_a_gpt(way: str, reentrant: bool):
    """Its lambdas are bound late: each block runs again with the layer of its own."""
    run = partial(WAYS[way], loss=next_token)
    with counted() as blocks:
        found = run(Transformer, ours(use_reentrant=reentrant))
    assert blocks[0] >= 2 * STEPS
    assert_close(found, run(Transformer, plainly))


@KINDS
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("way", ESSENTIAL)
def test_gradient_checkpointing_of_a_hugging_face_model(way: str, attention: str, reentrant: bool):
    transformers = pytest.importorskip("transformers")

    def make(around: Around) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=11,
            n_positions=8,
            n_embd=8,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation=attention,
        )
        model: nn.Module = transformers.GPT2LMHeadModel(config).train()
        if around is not plainly:
            with warnings.catch_warnings():  # it is to have another name
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        return model

    def loss(model: Any, t: int) -> Tensor:
        text = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(t))
        found: Tensor = model(input_ids=text, labels=text, use_cache=False).loss
        return found

    run = partial(WAYS[way], loss=loss)
    with counted() as blocks:
        found = run(make, checkpoint)
    assert blocks[0] >= 2 * STEPS
    assert_close(found, run(make, plainly))


# -- what a block may be ---------------------------------------------------------------------------

LEAF = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
FORMS: dict[str, Callable[[Net, Tensor, Around], Tensor]] = {
    "a module": lambda net, x, around: around(net.first, x),
    "its forward": lambda net, x, around: around(net.first.forward, x),
    "nested": lambda net, x, around: around(
        lambda y: around(lambda z: net.second(z).tanh(), net.first(y)).sin(), x
    ),
    "nested twice": lambda net, x, around: around(
        lambda y: around(lambda z: around(net.second, z).tanh(), net.first(y)).sin(), x
    ),
    "numbers and None": lambda net, x, around: around(
        lambda y, n, nothing: net.first(y) * n, x, 2, None
    ),
    "keywords": lambda net, x, around: around(lambda y, *, n: net.first(y) * n, x, n=2.0),
    "a tensor in a dict": lambda net, x, around: around(
        lambda d: net.second(d["x"][0]), {"x": [net.first(x)]}
    ),
    "a dict as the result": lambda net, x, around: around(
        lambda y: {"a": net.first(y), "n": 3, "none": None, "c": y.detach()}, x
    )["a"],
    "two results": lambda net, x, around: torch.add(
        *around(lambda y: (net.first(y).sin(), net.first(y).cos()), x)
    ),
    "one result unused": lambda net, x, around: around(
        lambda y: (net.first(y).sin(), net.first(y).cos()), x
    )[1],
    "views of one tensor": lambda net, x, around: torch.cat(
        around(lambda y: net.first(y).split(2, 1), x), 1
    ),
    "the input itself": lambda net, x, around: around(lambda y: y, net.first(x)),
    "a view of the input": lambda net, x, around: around(lambda y: y.flatten(), net.first(x)).view(
        6, 5
    ),
    "a parameter as an argument": lambda net, x, around: around(
        F.linear, x, net.first.weight, net.first.bias
    ),
    "a parameter captured": lambda net, x, around: _captured(net.first.weight, x, around),
    "a captured leaf": lambda net, x, around: around(lambda y: net.first(y) * LEAF, x),
    "a captured non-leaf": lambda net, x, around: _scaled(net, x, around),
    "written in place": lambda net, x, around: around(
        lambda y: y.mul_(2).add_(net.first.bias), net.first(x)
    ),
    "a hook inside": lambda net, x, around: around(_hooked, net.first(x)),
    "the loss of a penalty": lambda net, x, around: _penalised(net, x, around),
    "a constant": lambda net, x, around: net.first(x) + around(lambda y: y.sin(), x[:, :1]),
    "under no_grad": lambda net, x, around: net.first(x) + _without_grad(net, x, around),
    "a fused loss": lambda net, x, around: around(
        lambda y: F.cross_entropy(net.first(y), torch.zeros(6, dtype=torch.long)), x
    ).expand(6, 5),
    "attention": lambda net, x, around: around(
        lambda y: F.scaled_dot_product_attention(y, y, y), net.first(x).view(1, 6, 5)
    ).view(6, 5),
}


def _captured(weight: Tensor, x: Tensor, around: Around) -> Any:
    return around(lambda: x @ weight.T)


def _scaled(net: Net, x: Tensor, around: Around) -> Any:
    scale = LEAF.exp() * net.first.bias
    return around(lambda y: net.first(y) * scale, x)


def _hooked(y: Tensor) -> Tensor:
    y = y.sin()
    y.register_hook(lambda g: 3 * g)
    return y.cos()


def _penalised(net: Net, x: Tensor, around: Around) -> Tensor:
    x = x.clone().requires_grad_()
    y = around(net.body, x)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return torch.as_tensor(y + g.square().sum())


def _without_grad(net: Net, x: Tensor, around: Around) -> Any:
    with torch.no_grad():
        return around(net.first, x)


class Formed(Net):
    def __init__(self, around: Around, form: str) -> None:
        super().__init__(around)
        self.form = form

    def hidden(self, x: Tensor) -> Tensor:
        return FORMS[self.form](self, x, self.around)


@KINDS
@pytest.mark.parametrize("way", ESSENTIAL)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_block(form: str, way: str, reentrant: bool):
    if form == "keywords" and reentrant:
        pytest.skip("PyTorch refuses them")
    if way == "Checkpointed" and "captured" in form and "leaf" in form:
        pytest.skip("refused without a checkpoint")
    make = partial(Formed, form=form)
    assert_close(WAYS[way](make, ours(use_reentrant=reentrant)), WAYS[way](make, plainly))


@pytest.mark.parametrize("form", FORMS)
def test_what_a_block_reads_has_its_gradient(form: str):
    """The gradient of a leaf outside of the model."""

    def gradient(around: Around) -> Tensor | None:
        torch.manual_seed(0)
        model = Formed(around, form)
        with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
            for t in range(STEPS):
                loop.step(loss_of(loop.model, t))
            outer = loss_of(loop.model, STEPS)
        return torch.autograd.grad(outer, LEAF, allow_unused=True)[0]

    assert_close([gradient(NON_REENTRANT)], [gradient(plainly)])


SETTINGS: dict[str, dict[str, Any]] = {
    "random state not kept": {"preserve_rng_state": False},
    "no check": {"determinism_check": "none"},
    "early stop off": {"early_stop": False},
    "contexts": {"context_fn": lambda: (nullcontext(), nullcontext())},
    "contexts that compute": {
        "context_fn": lambda: (torch.autocast("cpu", torch.bfloat16, enabled=False),) * 2
    },
    "selective": {
        "context_fn": partial(
            create_selective_checkpoint_contexts,
            lambda context, op, *args, **kwargs: (
                CheckpointPolicy.MUST_SAVE
                if op == torch.ops.aten.addmm.default
                else CheckpointPolicy.PREFER_RECOMPUTE
            ),
        )
    },
}


@pytest.mark.parametrize("way", ESSENTIAL)
@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_of_torchs_checkpoint(settings: str, way: str):
    make = partial(Net, drop=0.3)
    around = ours(use_reentrant=False, **SETTINGS[settings])
    assert_close(WAYS[way](make, around), WAYS[way](make, plainly))


@KINDS
@pytest.mark.parametrize("way", ESSENTIAL)
def test_checkpoint_sequential(way: str, reentrant: bool):
    class Sequence(nn.Module):
        def __init__(self, around: Around) -> None:
            super().__init__()
            self.around = around
            layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2)) for _ in range(4)]
            self.layers, self.head = nn.Sequential(*layers), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Any:
            hidden = (
                self.layers(x)
                if self.around is plainly
                else checkpoint_sequential(self.layers, 2, x, use_reentrant=reentrant)
            )
            return self.head(hidden)

    assert_close(WAYS[way](Sequence, checkpoint), WAYS[way](Sequence, plainly))


@KINDS
@pytest.mark.parametrize("way", ESSENTIAL)
def test_autocast_holds_when_a_block_runs_again(way: str, reentrant: bool):
    def loss(model: nn.Module, t: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(features(t).float())
        return F.mse_loss(out.double(), features(t).sum(1, keepdim=True))

    def make(around: Around) -> nn.Module:
        return Net(around, drop=0.3).float()

    run = partial(WAYS[way], loss=loss)
    found, truth = run(make, ours(use_reentrant=reentrant)), run(make, plainly)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("way", ["track", "StoreAll", "Checkpointed"])
def test_a_buffer_with_a_derivative(way: str):
    class Averaging(Net):
        def __init__(self, around: Around) -> None:
            super().__init__(around)
            self.register_buffer("average", torch.zeros(5))
            self.register_buffer("calls", torch.zeros(()))

        def body(self, x: Tensor) -> Any:
            y = super().body(x)
            self.average = 0.5 * self.get_buffer("average") + 0.5 * y.mean(0)
            with torch.no_grad():
                self.get_buffer("calls").add_(1)
            return y - self.average

    assert_close(WAYS[way](Averaging, NON_REENTRANT), WAYS[way](Averaging, plainly))


def test_train_and_eval_hold_when_a_block_runs_again():
    def run(around: Around) -> list[Any]:
        torch.manual_seed(0)
        model = Net(around, drop=0.3, norm=True)
        with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
            for t in range(STEPS):
                loop.step(loss_of(loop.model, t))
            loop.model.eval()
            outer = loss_of(loop.model, STEPS)
        outer.backward()
        return [outer.detach(), *(p.grad for p in model.parameters()), *loop.buffers().values()]

    assert_close(run(NON_REENTRANT), run(plainly))


def test_lbfgs_and_callbacks():
    def run(around: Around, make: Callable[[Any], Any], strategy: Any) -> list[Any]:
        torch.manual_seed(0)
        model = Net(around)
        clip = innerloop.optim.clip_by_global_norm(0.1)
        with innerloop.track(model, make(model), strategy=strategy) as loop:
            for t in range(2):
                loop.step(lambda: loss_of(loop.model, t), grad_callback=clip)  # noqa: B023
            outer = loss_of(loop.model, STEPS)
        outer.backward()
        return [outer.detach(), *(p.grad for p in model.parameters())]

    def lbfgs(model: nn.Module) -> Any:
        return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def adam(model: nn.Module) -> Any:
        return torch.optim.Adam(model.parameters(), lr=0.1)

    for strategy in (None, Checkpointed(slots=1)):
        found, truth = (run(around, adam, strategy) for around in (NON_REENTRANT, plainly))
        assert_close(found, truth)
        # Its steps divide by differences of gradients, which magnifies rounding.
        found, truth = (run(around, lbfgs, strategy) for around in (NON_REENTRANT, plainly))
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@KINDS
def test_the_loop_itself_is_captured(reentrant: bool):
    """A block that asks the loop for its model has the weights of its own step."""

    def run(around: Around, strategy: Any) -> list[Any]:
        torch.manual_seed(0)
        model = Net(plainly)
        with innerloop.track(
            model, torch.optim.SGD(model.parameters(), lr=0.1), strategy=strategy
        ) as loop:

            def loss(t: int) -> Tensor:
                return around(lambda x: loop.model(x).square().mean(), features(t))

            for t in range(STEPS):
                loop.step(lambda: loss(t))  # noqa: B023
            outer = loss(STEPS)
        outer.backward()
        return [outer.detach(), *(p.grad for p in model.parameters())]

    for strategy in (None, Checkpointed(slots=1)):
        found = run(ours(use_reentrant=reentrant), strategy)
        assert_close(found, run(plainly, strategy))


def test_a_loop_inside_a_loop():
    """Its derivative by the outer loop's weights is one of the third order."""

    def run(around: Around) -> list[Any]:
        torch.manual_seed(0)
        model = Net(around)
        with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as outside:
            for t in range(2):
                optimizer = innerloop.optim.sgd(lr=0.1)
                with innerloop.track(outside.model, optimizer) as inside:
                    for s in range(2):
                        inside.step(loss_of(inside.model, s))
                    value = loss_of(inside.model, t)
                outside.step(value)
            outer = loss_of(outside.model, STEPS)
        outer.backward()
        return [outer.detach(), *(p.grad for p in model.parameters())]

    assert_close(run(NON_REENTRANT), run(plainly))


def test_the_model_of_a_loop_that_has_ended():
    """Inside another loop, whose backward pass comes later."""

    def run(around: Around) -> list[Any]:
        torch.manual_seed(0)
        model = Net(plainly)
        with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as outside:
            for t in range(2):
                with innerloop.track(outside.model, innerloop.optim.sgd(lr=0.1)) as inside:
                    inside.step(loss_of(inside.model, t))
                outside.step(around(inside.model, features(t)).square().mean())
            outer = loss_of(outside.model, STEPS)
        outer.backward()
        return [outer.detach(), *(p.grad for p in model.parameters())]

    assert_close(run(NON_REENTRANT), run(plainly))


def test_a_model_inside_another_object_is_right_or_refused():
    class Trainer:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def block(self, x: Tensor) -> Any:
            return self.model(x)

    model = Net(plainly)
    with (
        pytest.raises(InvalidInputError, match="an object that is not a module"),
        innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop,
    ):
        loop.step(NON_REENTRANT(Trainer(loop.model).block, features(0)).square().mean())


def test_a_further_derivative():
    def run(around: Around) -> list[Any]:
        torch.manual_seed(0)
        model = Net(around)
        params = list(model.parameters())
        with innerloop.track(model, torch.optim.SGD(params, lr=0.1)) as loop:
            loop.step(loss_of(loop.model, 0))
            outer = loss_of(loop.model, 1)
        first = torch.autograd.grad(outer, params, create_graph=True)
        size = torch.stack([g.square().sum() for g in first]).sum()
        second = torch.autograd.grad(size, params, create_graph=True)
        third = torch.autograd.grad(torch.stack([g.sum() for g in second]).sum(), params)
        return [*first, *second, *third]

    assert_close(run(NON_REENTRANT), run(plainly))


def test_several_backward_passes():
    def run(around: Around) -> list[Any]:
        torch.manual_seed(0)
        model = Net(around)
        params = list(model.parameters())
        with innerloop.track(model, torch.optim.SGD(params, lr=0.1)) as loop:
            early = loss_of(loop.model, 0)
            loop.step(loss_of(loop.model, 0))
            loop.step(loss_of(loop.model, 1))
            outer = loss_of(loop.model, 2) + early
        once = torch.autograd.grad(outer, params, retain_graph=True)
        return [*once, *torch.autograd.grad(outer, params)]

    assert_close(run(NON_REENTRANT), run(plainly))


def test_many_cotangents_at_once_are_refused():
    model = Net(NON_REENTRANT)
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
        loop.step(loss_of(loop.model, 0))
        out = loop.model(features(0)).flatten()
    with pytest.raises(NotDifferentiableError, match="is_grads_batched"):
        torch.autograd.grad(out, model.head.weight, torch.eye(6), is_grads_batched=True)


@pytest.mark.parametrize("strategy", [innerloop.StoreAll(), Checkpointed()], ids=str)
def test_the_jacobian_of_a_loop(strategy: Any):
    """Many cotangents at once: blocks take one after the other."""

    def run(around: Around) -> list[Any]:
        torch.manual_seed(0)
        problem = innerloop.Problem.from_module(
            Net(around), lambda model, hyper, t: loss_of(model, t), innerloop.optim.sgd(lr=0.1)
        )
        traj = innerloop.unroll(problem, None, list(range(STEPS)), strategy=strategy)
        return list(tree.tensors(innerloop.inspect.jacobian(traj, STEPS, 0)))

    assert_close(run(NON_REENTRANT), run(plainly))


# -- problems of functions -------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("strategy", [None, Checkpointed(slots=1)], ids=str)
@pytest.mark.parametrize("form", ["functional_call", "functional", "params"])
def test_a_loss_of_params(form: str, strategy: Any, reentrant: bool):
    def run(around: Around) -> list[Any]:
        torch.manual_seed(0)
        model = Net(around)
        call, params, _ = innerloop.functional(model)

        def predict(params: Any, x: Tensor) -> Any:
            if form == "functional_call":
                return torch.func.functional_call(model, params, x)
            if form == "functional":
                return call(params, x)
            body = around(lambda y: (y @ params["first.weight"].T + params["first.bias"]).tanh(), x)
            return F.linear(body, params["head.weight"], params["head.bias"])

        def loss(params: Any, hyper: Any, t: int) -> Tensor:
            return F.mse_loss(predict(params, features(t)), features(t).sum(1, keepdim=True))

        def outer(traj: Any, hyper: Any) -> Tensor:
            return loss(traj.params, hyper, STEPS)

        problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))
        start = {n: p.requires_grad_() for n, p in params.items()}
        found = innerloop.metagradient(
            outer, problem, start, list(range(STEPS)), wrt="params", strategy=strategy
        )
        return list(tree.tensors(found))

    with counted() as blocks:
        found = run(ours(use_reentrant=reentrant))
    assert blocks[0]
    assert_close(found, run(plainly))


def test_transforms_run_the_function_itself():
    model = Net(NON_REENTRANT)
    plain = Net(plainly)
    plain.load_state_dict(model.state_dict())

    def gradients(model: nn.Module) -> Any:
        problem = innerloop.Problem.from_module(
            model, lambda m, hyper, x: m(x).square().mean(), innerloop.optim.sgd(lr=0.1)
        )

        def outer(params: Any, x: Tensor) -> Tensor:
            traj = innerloop.unroll(problem, params, [x, x])
            return traj.losses.sum()

        params = {n: p.detach() for n, p in model.named_parameters()}
        data = torch.stack([features(t) for t in range(3)])
        return torch.func.vmap(torch.func.grad(outer), (None, 0))(params, data)

    assert_close(list(gradients(model).values()), list(gradients(plain).values()))


# -- right or refused ------------------------------------------------------------------------------


class Changing(Net):
    """A block that reads what changes, where nobody can see it."""

    factor: ClassVar[list[float]] = [1.0]

    def body(self, x: Tensor) -> Any:
        return super().body(x) * self.factor[0]


@KINDS
@pytest.mark.parametrize("strategy", [None, Checkpointed(slots=1)], ids=str)
def test_a_block_that_gives_other_numbers_is_refused(strategy: Any, reentrant: bool):
    model = Changing(ours(use_reentrant=reentrant))
    try:
        with innerloop.track(
            model, torch.optim.SGD(model.parameters(), lr=0.1), strategy=strategy
        ) as loop:
            loop.step(lambda: loss_of(loop.model, 0))
            Changing.factor = [2.0]
            with pytest.raises(InvalidInputError, match=r"other numbers|another number"):
                loss_of(loop.model, 1).backward()
    finally:
        Changing.factor = [1.0]


def test_other_numbers_without_a_check():
    """The user has said that they know better."""
    model = Changing(ours(use_reentrant=False, determinism_check="none"))
    try:
        with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
            loop.step(loss_of(loop.model, 0))
            Changing.factor = [2.0]
            loss_of(loop.model, 1).backward()
    finally:
        Changing.factor = [1.0]


def test_data_written_in_place_afterwards():
    model, x = Net(NON_REENTRANT), features(0)
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
        loop.step(loop.model(x).square().mean())
        x.mul_(2)
        outer = loss_of(loop.model, 1)
    with pytest.raises(InvalidInputError, match="written in place"):
        outer.backward()


def test_an_operation_without_a_second_derivative_is_named():
    class Segments(Net):
        def body(self, x: Tensor) -> Any:
            y = super().body(x).exp()
            return torch.segment_reduce(y, "sum", lengths=torch.tensor([6])).expand(6, 5)

    model = Segments(NON_REENTRANT)
    with (
        pytest.raises(NotDifferentiableError, match="segment_reduce"),
        innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop,
    ):
        loop.step(loss_of(loop.model, 0))


def test_the_users_model_by_mistake_is_named():
    model = Net(NON_REENTRANT)
    with (
        pytest.raises(InvalidInputError, match=r"not with the model that was passed to track"),
        innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop,
    ):
        loop.step(checkpoint(model, features(0), use_reentrant=False).square().mean())


def test_wrong_arguments_are_refused_by_torch():
    model = Net(ours(use_reentrant=True, context_fn=lambda: (nullcontext(), nullcontext())))
    with (
        pytest.raises(ValueError, match="context_fn"),
        innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop,
    ):
        loop.step(loss_of(loop.model, 0))


def test_a_wrong_block_leaves_the_loop_as_it_was():
    """An exception in a block that runs again does not change modes, weights or random numbers."""

    class Failing(Net):
        fails: ClassVar[list[bool]] = [False]

        def body(self, x: Tensor) -> Any:
            y = super().body(x)
            if self.fails[0]:
                raise ZeroDivisionError
            return y

    model = Failing(NON_REENTRANT, drop=0.3)
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
        loop.step(loss_of(loop.model, 0))
        outer = loss_of(loop.model, 1)
        before = {n: p.clone() for n, p in loop.parameters().items()}
        state, modes = torch.get_rng_state(), [m.training for m in loop.model.modules()]
        Failing.fails = [True]
        with pytest.raises(ZeroDivisionError):
            outer.backward(retain_graph=True)
        Failing.fails = [False]
        assert torch.equal(torch.get_rng_state(), state)
        assert [m.training for m in loop.model.modules()] == modes
        assert_close(list(loop.parameters().values()), list(before.values()))
        outer.backward()
    assert block._thread.modules is None


# -- outside of loops ------------------------------------------------------------------------------


@KINDS
def test_ordinary_training_is_torchs_own(reentrant: bool):
    """Before a loop, beside it in another thread, and after it."""
    model = Net(ours(use_reentrant=reentrant))
    with counted() as blocks:
        model(features(0).requires_grad_()).sum().backward()
        with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
            loop.step(loss_of(loop.model, 0))
        inside = blocks[0]
        model.zero_grad()
        x = features(0).requires_grad_()
        node = checkpoint(model.body, x, use_reentrant=reentrant)
        assert (type(node.grad_fn).__name__ == "CheckpointFunctionBackward") == reentrant
        node.sum().backward()
    assert blocks[0] == inside > 0


def test_ordinary_training_inside_a_loop():
    """The gradients of another model, by backward()."""
    torch.manual_seed(0)
    other = Net(NON_REENTRANT, drop=0.3, norm=True)
    plain = Net(plainly, drop=0.3, norm=True)
    plain.load_state_dict(other.state_dict())
    model = nn.Linear(4, 1)
    for beside in (other, plain):
        torch.manual_seed(1)
        with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
            loop.step(loss_of(loop.model, 0))
            loss_of(beside, 0).backward()
    found = [*(p.grad for p in other.parameters()), *other.buffers()]
    assert_close(found, [*(p.grad for p in plain.parameters()), *plain.buffers()])


@pytest.mark.parametrize("strategy", [None, Checkpointed(slots=1)], ids=str)
def test_episodes_leave_no_objects(strategy: Any):
    model = Net(NON_REENTRANT, drop=0.3, norm=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def one() -> None:
        with innerloop.track(model, optimizer, strategy=strategy) as loop:
            for t in range(STEPS):
                loop.step(lambda: loss_of(loop.model, t))  # noqa: B023
            outer = loss_of(loop.model, STEPS)
            outer = outer + checkpoint(lambda x: loop.model(x).mean(), features(0))
        outer.backward()

    assert_nothing_is_left(one, count=10)


def test_a_graph_without_a_backward_pass_is_no_cycle():
    model = Net(NON_REENTRANT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gc.collect()
    gc.disable()
    try:
        with innerloop.track(model, optimizer) as loop:
            loop.step(loss_of(loop.model, 0))
            loop.step(checkpoint(lambda x: loop.model(x).mean(), features(0)))
            memory = torch_private.storage_weakref(loop.model.first.weight)
        del loop
        assert memory.expired()
    finally:
        gc.enable()


def test_the_graph_of_a_step_holds_the_inputs_of_blocks():
    def held(around: Around) -> int:
        class Deep(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers:
                    x = around(lambda y: layer(y).sin().cos().tanh().exp().sin(), x)  # noqa: B023
                return x

        model = Deep()
        with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
            loop.step(loop.model(torch.ones(1000, 4)).square().mean())
            return torch_private.graph_bytes([loop.model.layers[0].weight])

    # Of 3 x 6 activations 3 are kept, and their cotangents.
    assert held(NON_REENTRANT) < held(plainly) / 4


# -- by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_loop_by_hand(form: str):
    """`checkpoint_block` around the layers of a loop that is written with autograd alone."""

    def run(around: Around) -> list[Any]:
        torch.manual_seed(0)
        model = Formed(around, form)
        start: dict[str, Tensor] = dict(model.named_parameters())
        params = start
        for t in range(STEPS):
            out = torch.func.functional_call(model, params, features(t))
            loss = F.mse_loss(out, features(t).sum(1, keepdim=True))
            grads = torch.autograd.grad(
                loss, list(params.values()), create_graph=True, allow_unused=True
            )
            params = {
                n: p if g is None else p - 0.1 * g
                for (n, p), g in zip(params.items(), grads, strict=True)
            }
        outer = loss_of(_At(model, params), STEPS)
        return list(torch.autograd.grad(outer, list(start.values()), allow_unused=True))

    if form == "attention":
        pytest.skip("PyTorch's own has no second derivative")
    assert_close(run(innerloop.checkpoint_block), run(plainly))


class _At(nn.Module):
    """A module at other parameters."""

    def __init__(self, model: nn.Module, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.call = partial(torch.func.functional_call, model, params)

    def forward(self, x: Tensor) -> Any:
        return self.call(x)


class _Reversal(nn.Module):
    """Multiplies the gradient by a factor, and not the value."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        k: float = self.factor
        return k * x + ((1 - k) * x).detach()


def _with_a_schedule(where: str, checkpointed: bool) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model.insert(1, _Reversal())
    outside, settings = _Reversal(), {"factor": 1.0}

    class Holder:
        factor = 1.0

    holder = Holder()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = outside(model(x))
        k = settings["factor"] * holder.factor
        return k * y + ((1 - k) * y).detach()

    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.3)) as loop:

        def set_factor(k: float) -> None:
            if where == "loop.model":
                loop.model[1].factor = k
            elif where == "another module":
                outside.factor = k
            elif where == "a dict":
                settings["factor"] = k
            else:
                holder.factor = k

        for t in range(3):
            set_factor(-0.5 * t)
            out = (
                checkpoint(forward, loop.model, x, use_reentrant=False)
                if checkpointed
                else forward(loop.model, x)
            )
            loop.step((out - 1).square().mean())
        set_factor(2.0)
        loop.model[0](x).square().mean().backward()
    assert outside.factor == (2.0 if where == "another module" else 1.0)
    return [p.grad for p in model[0].parameters() if p.grad is not None]


@pytest.mark.parametrize("where", ["loop.model", "another module", "a dict"])
def test_a_setting_that_acts_in_the_backward_pass_alone(where: str):
    found, expected = (_with_a_schedule(where, checkpointed) for checkpointed in (True, False))
    assert len(found) == 2
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_setting_of_a_plain_object_that_acts_in_the_backward_pass_alone_is_refused():
    with pytest.raises(InvalidInputError, match="has another derivative"):
        _with_a_schedule("an object", True)


def _gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    """Return outputs plus their gradient by the inputs; those are a leaf made here."""
    leaf = x.detach().requires_grad_()
    y: Tensor = model(leaf)
    (slope,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    return y + slope


def test_a_gradient_taken_inside_a_block():
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    found = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
            for _ in range(3):
                run = partial(checkpoint, use_reentrant=False) if checkpointed else None
                out = (
                    _gradient_penalty(loop.model, x)
                    if run is None
                    else run(_gradient_penalty, loop.model, x)
                )
                loop.step(out.square().mean())
            loop.model(x).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_a_leaf_in_an_object_is_an_input():
    class Holder:
        scale = torch.tensor(2.0, requires_grad=True)

    holder = Holder()
    x = torch.tensor(3.0, requires_grad=True)
    y = innerloop.checkpoint_block(lambda x: holder.scale**2 * x**3, x)
    assert type(y.grad_fn).__name__ == "_NodeBackward"
    (slope,) = torch.autograd.grad(y, holder.scale, create_graph=True)
    assert (slope.item(), torch.autograd.grad(slope, x)[0].item()) == (4 * 27, 4 * 27)


class Changed(nn.Module):
    """A model whose submodules are changed inside the loop."""

    def __init__(self, around: Around) -> None:
        super().__init__()
        self.around = around
        self.extra: Any = None
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.layers = nn.ModuleList([nn.Tanh()])

    def body(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](self.first(x))
        y = self.second(y).sin()
        return y if self.extra is None else self.extra(y)

    def forward(self, x: Tensor) -> Any:
        return self.around(self.body, x)


def _other_layer(model: Any) -> None:
    model.first = nn.Linear(3, 3)


def _other_activation(model: Any) -> None:
    model.layers[0] = nn.Sigmoid()


def _exchanged(model: Any) -> None:
    model.first, model.second = model.second, model.first


def _added(model: Any) -> None:
    model.extra = nn.Linear(3, 3)


EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "a layer": (_other_layer, "first"),
    "an entry of a list": (_other_activation, "layers.0"),
    "two that change places": (_exchanged, "first"),
    "one that is added": (_added, "extra"),
}


@pytest.mark.parametrize("strategy", [None, Checkpointed(slots=1)], ids=repr)
@pytest.mark.parametrize("edit", EDITS)
def test_a_submodule_that_is_replaced_inside_the_loop_is_named(edit: str, strategy: Any) -> None:
    """A block, or a step, would run again with the module that was there at the beginning."""
    change, name = EDITS[edit]
    torch.manual_seed(0)
    x = torch.randn(4, 3)

    def run(around: Around) -> list[Tensor | None]:
        torch.manual_seed(0)
        model: Any = Changed(around)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with innerloop.track(model, optimizer, strategy=strategy) as loop:
            for t in range(3):
                if t == 1:
                    change(loop.model)
                if strategy is None:
                    loop.step(loop.model(x).square().mean())
                else:
                    loop.step(lambda: loop.model(x).square().mean())
            loop.model(x).mean().backward()
        return [p.grad for p in model.parameters()]

    message = f"the submodule '{name}' of loop.model was added, removed or replaced"
    with pytest.raises(InvalidInputError, match=message) as error:
        run(NON_REENTRANT)
    assert "before the loop" in str(error.value)
    if strategy is None:
        assert any(g is not None for g in run(plainly))  # without blocks it is what PyTorch does
    else:
        with pytest.raises(InvalidInputError, match=f"{message}.* and step [0-9] runs again"):
            run(plainly)


def test_a_submodule_that_is_wrapped_inside_the_loop_goes_on() -> None:
    """Another module that computes the same is no obstacle."""

    def wrapped(around: Around) -> list[Tensor | None]:
        torch.manual_seed(0)
        model: Any = Changed(around)
        x = torch.linspace(-1, 1, 12).reshape(4, 3)
        with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
            for _ in range(3):
                loop.step(loop.model(x).square().mean())
                loop.model.first = nn.Sequential(loop.model.first)
            loop.model(x).mean().backward()
        return [p.grad for p in model.parameters()]

    assert_close(wrapped(NON_REENTRANT), wrapped(plainly))


def test_a_block_on_the_meta_device_has_shapes() -> None:
    layer = nn.Linear(3, 2, device="meta")
    x = torch.ones(4, 3, device="meta", requires_grad=True)
    y = innerloop.checkpoint_block(layer, x)
    y.sum().backward()
    assert y.shape == (4, 2)
    assert x.grad is not None
    assert x.grad.shape == (4, 3)
