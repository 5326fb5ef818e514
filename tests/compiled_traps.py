"""Forty traps for compiled steps: each says beforehand that it compiles, or why it is refused.

**To add a trap, write a function under ``@trap(...)``** that takes a strategy and returns a pytree
of results. It may call `gradients` several times, change what the loss reads in between, and so on.
A trap that compiles gives the results of eager `innerloop.StoreAll`; one that is refused raises an
`innerloop.InnerLoopError` that matches.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import innerloop
from innerloop._utils import tree
from innerloop.strategy import Strategy
from tests.oracles import smooth_noise

COMPILES = "compiles"
FOREIGN = r"torch\.autograd\.Function with a backward rule of its own"
CANNOT = "cannot be compiled"
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
Run = Callable[[Strategy], Any]


class Trap(NamedTuple):
    """One row.

    Attributes:
        name: what is tried.
        says: ``COMPILES``, or a pattern of the error that refuses it.
        run: ``run(strategy)`` gives results to compare.
        kind: ``"function"`` (a foreign Function), ``"late"`` (what a first call does not show),
            ``"branch"`` (decides by values), or ``""``.
        inductor: True if the test command runs it with inductor, not with aot_eager.
    """

    name: str
    says: str
    run: Run
    kind: str = ""
    inductor: bool = False


TRAPS: list[Trap] = []


def trap(
    name: str, says: str = COMPILES, *, kind: str = "", inductor: bool = False
) -> Callable[[Run], Run]:
    """Enrol a trap."""

    def enrol(run: Run) -> Run:
        TRAPS.append(Trap(name, says, run, kind, inductor))
        return run

    return enrol


def weights() -> dict[str, Tensor]:
    return {"w": 0.6 * smooth_noise(3, 4), "v": 0.8 * smooth_noise(4, phase=1.0)}


def data(steps: int = 3, rows: int = 5) -> list[Tensor]:
    return [1.5 * smooth_noise(rows, 3, phase=2.0 + t) for t in range(steps)]


def outer(traj: innerloop.Trajectory, hyper: Any) -> Tensor:
    return sum((p.sin().sum() for p in traj.params.values()), torch.zeros(())) + traj.losses.sum()


def gradients(
    strategy: Strategy,
    loss: Callable[..., Any] | innerloop.Problem,
    params: Mapping[str, Tensor] | None = None,
    batches: Any = None,
    *,
    hyper: Any = None,
    optimizer: innerloop.optim.Optimizer | None = None,
    objective: Callable[..., Tensor] = outer,
    **arguments: Any,
) -> Any:
    """The outer loss and its gradient behind three steps."""
    if isinstance(loss, innerloop.Problem):
        problem = loss
    else:
        # Adam as well as momentum reaches the products of a rule with its state.
        rule = innerloop.optim.adam(lr=0.1, eps=0.1) if optimizer is None else optimizer
        problem = innerloop.Problem(loss, rule, **arguments)
    torch.manual_seed(3)
    return innerloop.metagradient(
        objective,
        problem,
        weights() if params is None else params,
        data() if batches is None else batches,
        hyper=hyper,
        wrt="params" if hyper is None else ("params", "hyper"),
        strategy=strategy,
    )


def predict(p: Any, x: Tensor) -> Tensor:
    hidden: Tensor = (x @ p["w"]).tanh() @ p["v"]
    return hidden


def simple(between: Callable[[Tensor], Tensor]) -> Run:
    """A trap that consists of one function between the network and the loss."""

    def loss(p: Any, h: Any, x: Tensor) -> Tensor:
        return between(predict(p, x)).square().mean()

    return lambda strategy: gradients(strategy, loss)


# -- functions with a backward rule of their own ---------------------------------------------------


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:
        return given.clamp(-0.01, 0.01)


class _SeldomClipped(_Clipped):
    """Differs from the identity for cotangents above 1000 only."""

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:
        return given.clamp(-1000.0, 1000.0)


class _Reversed(_Clipped):
    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:
        return -given


class _Sign(_Clipped):
    """A straight-through estimator."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:
        return given


class _Square(torch.autograd.Function):
    """Its rule is right."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:
        return 2 * given * ctx.saved_tensors[0]


class _OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:
        return 3 * given


class _Once(_Square):
    backward = staticmethod(torch.autograd.function.once_differentiable(_Square.backward))  # type: ignore[assignment]


for function, says in (
    (_Clipped, "a clipped gradient"),
    (_SeldomClipped, "a rule that differs for some values only"),
    (_Reversed, "gradient reversal"),
    (_Sign, "a straight-through estimator"),
    (_Square, "a right rule"),
    (_OldStyle, "a rule of the old style"),
):
    trap(f"a Function: {says}", FOREIGN, kind="function", inductor=function is _SeldomClipped)(
        simple(function.apply)
    )
trap("a Function that is once differentiable", FOREIGN, kind="function")(simple(_Once.apply))


@trap("a Function in a module", FOREIGN, kind="function")
def _(strategy: Strategy) -> Any:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(_Clipped.apply(x))

    return of_module(strategy, nn.Sequential(nn.Linear(3, 4), Layer(), nn.Linear(4, 1)))


@trap("a Function in targets", FOREIGN, kind="function")
def _(strategy: Strategy) -> Any:
    return gradients(
        strategy,
        lambda p, h, x, y: (predict(p, x) - y).square().mean(),
        targets=lambda p, h, x: _Clipped.apply(predict(p, x)),
    )


@trap("a Function in the update", FOREIGN, kind="function")
def _(strategy: Strategy) -> Any:
    def rule(grad: Tensor, param: Tensor, state: Any, weights: Any) -> Any:
        return weights["rate"] * _Clipped.apply(grad), state

    rate = {"rate": torch.tensor(-0.1, dtype=torch.float64)}
    return gradients(
        strategy,
        lambda p, h, x: predict(p, x).square().mean(),
        optimizer=innerloop.optim.learned(rule, rate),
    )


@trap("a Function in optimizer_hyper, which is not compiled", kind="function")
def _(strategy: Strategy) -> Any:
    return gradients(
        strategy,
        lambda p, h, x: predict(p, x).square().mean(),
        hyper={"lr": torch.tensor(0.1, dtype=torch.float64)},
        optimizer_hyper=lambda h, t: {"lr": _Clipped.apply(h["lr"])},
    )


@trap("a Function in the outer loss, which is not compiled", kind="function")
def _(strategy: Strategy) -> Any:
    return gradients(
        strategy,
        lambda p, h, x: predict(p, x).square().mean(),
        objective=lambda traj, h: _Clipped.apply(traj.params["w"]).square().sum(),
    )


# -- what the first call does not show -------------------------------------------------------------


class Named(NamedTuple):
    x: Tensor
    clip: bool
    name: str = ""


@trap("a Function behind a flag that is set at the third step", FOREIGN, kind="late", inductor=True)
def _(strategy: Strategy) -> Any:
    def loss(p: Any, h: Any, b: Named) -> Tensor:
        y = predict(p, b.x)
        return (_Clipped.apply(y) if b.clip else y).square().mean()

    return gradients(strategy, loss, batches=[Named(x, t == 2) for t, x in enumerate(data())])


@trap("a Function for a larger batch only", FOREIGN, kind="late")
def _(strategy: Strategy) -> Any:
    def loss(p: Any, h: Any, x: Tensor) -> Tensor:
        y = predict(p, x)
        return (_Clipped.apply(y) if len(x) > 5 else y).square().mean()

    return gradients(strategy, loss, batches=[*data(), *data(1, 7)])


@trap("a Function behind a variable that is set between two calls", FOREIGN, kind="late")
def _(strategy: Strategy) -> Any:
    scope = {"clip": False}

    def loss(p: Any, h: Any, x: Tensor) -> Tensor:
        y = predict(p, x)
        return (_Clipped.apply(y) if scope["clip"] else y).square().mean()

    problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))
    first = gradients(strategy, problem)
    scope["clip"] = True
    return first, gradients(strategy, problem)


@trap("a Function in train mode only, which is set between two calls", FOREIGN, kind="late")
def _(strategy: Strategy) -> Any:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(_Clipped.apply(x)) if self.training else x

    model = nn.Sequential(nn.Linear(3, 4), Layer(), nn.Linear(4, 1)).double().eval()
    problem = innerloop.Problem.from_module(model, mean_square, innerloop.optim.sgd(lr=0.1))
    first = gradients(strategy, problem, dict(model.named_parameters()))
    model.train()
    return first, gradients(strategy, problem, dict(model.named_parameters()))


@trap("a number that the loss reads changes between two calls", kind="late")
def _(strategy: Strategy) -> Any:
    scope = {"factor": 1.0}
    problem = innerloop.Problem(
        lambda p, h, x: scope["factor"] * predict(p, x).square().mean(),
        innerloop.optim.sgd(lr=0.1),
    )
    found = []
    for scope["factor"] in (1.0, 2.0, -1.0):
        found.append(gradients(strategy, problem))
    return found


# The compiler specialises the exponent; up to torch 2.13 the second one was an error of its own.
@trap(
    "an exponent in hyper changes between two calls",
    CANNOT if TORCH < (2, 14) else COMPILES,
    kind="late",
)
def _(strategy: Strategy) -> Any:
    problem = innerloop.Problem(
        lambda p, h, x: (predict(p, x).abs() ** h["power"]).mean() * h["scale"],
        innerloop.optim.sgd(lr=0.1),
    )
    scale = torch.tensor(0.7, dtype=torch.float64)
    return [
        gradients(strategy, problem, hyper={"scale": scale, "power": power}) for power in (2, 3)
    ]


@trap("the shape of the batch changes at the last step", kind="late")
def _(strategy: Strategy) -> Any:
    return gradients(
        strategy, lambda p, h, x: predict(p, x).square().mean(), batches=[*data(), *data(1, 7)]
    )


@trap("the first call under no_grad", kind="late")
def _(strategy: Strategy) -> Any:
    problem = innerloop.Problem(
        lambda p, h, x: predict(p, x).square().mean(), innerloop.optim.adam(lr=0.1, eps=0.1)
    )
    with torch.no_grad():
        traj = innerloop.unroll(problem, weights(), data(), strategy=strategy)
        assert not traj.params["w"].requires_grad
    found = gradients(strategy, problem)
    with torch.no_grad():
        again = innerloop.unroll(problem, weights(), data(), strategy=strategy)
        assert not again.params["w"].requires_grad
    return traj.params, found, again.params


@trap("a start that requires no grad, then one that does", kind="late")
def _(strategy: Strategy) -> Any:
    problem = innerloop.Problem(
        lambda p, h, x: predict(p, x).square().mean(), innerloop.optim.adam(lr=0.1, eps=0.1)
    )
    plain = innerloop.unroll(problem, weights(), data(), strategy=strategy)
    w, v = weights()["w"].requires_grad_(), weights()["v"]
    traj = innerloop.unroll(problem, {"w": w, "v": v}, data(), strategy=strategy)
    return plain.params, torch.autograd.grad(outer(traj, None), w)


@trap("float32 after float64", kind="late")
def _(strategy: Strategy) -> Any:
    problem = innerloop.Problem(
        lambda p, h, x: predict(p, x).square().mean(), innerloop.optim.sgd(lr=0.1)
    )
    single = {n: p.float() for n, p in weights().items()}
    return [
        gradients(strategy, problem),
        # The outer loss is in float64, of parameters that hold float32.
        tree.map_tensors(
            Tensor.float, gradients(strategy, problem, single, [x.float() for x in data()])
        ),
    ]


@trap("two problems share a loss")
def _(strategy: Strategy) -> Any:
    def loss(p: Any, h: Any, x: Tensor) -> Tensor:
        return predict(p, x).square().mean()

    rules = innerloop.optim.sgd(lr=0.1), innerloop.optim.sgd(lr=0.2, momentum=0.9)
    return [gradients(strategy, loss, optimizer=rule) for rule in rules]


@trap("a closure that is made anew for each problem")
def _(strategy: Strategy) -> Any:
    def scaled(factor: float) -> Callable[..., Tensor]:
        return lambda p, h, x: factor * predict(p, x).square().mean()

    return [gradients(strategy, scaled(factor)) for factor in (1.0, 2.0)]


# -- decisions by values ---------------------------------------------------------------------------


@trap("a Python branch on a value", CANNOT, kind="branch")
def _(strategy: Strategy) -> Any:
    def loss(p: Any, h: Any, x: Tensor) -> Tensor:
        y = predict(p, x).square().mean()
        return y if y > 0.1 else 2 * y

    return gradients(strategy, loss)


@trap("a branch on item()", CANNOT, kind="branch")
def _(strategy: Strategy) -> Any:
    def loss(p: Any, h: Any, x: Tensor) -> Tensor:
        y = predict(p, x).square().mean()
        return y * (2.0 if y.item() > 0.1 else 1.0)

    return gradients(strategy, loss)


@trap("a boolean mask, whose result has a shape of its own", kind="branch")
def _(strategy: Strategy) -> Any:
    def loss(p: Any, h: Any, x: Tensor) -> Tensor:
        y = predict(p, x)
        return y[y > 0].square().sum() + y.mean()

    return gradients(strategy, loss)


@trap("a loop until a value is reached", CANNOT, kind="branch")
def _(strategy: Strategy) -> Any:
    def loss(p: Any, h: Any, x: Tensor) -> Tensor:
        y = predict(p, x).square().mean()
        while y > 0.1:
            y = y / 2
        return y

    return gradients(strategy, loss)


@trap("torch.where on a value", kind="branch")
def _(strategy: Strategy) -> Any:
    return simple(lambda y: torch.where(y > 0, y, 0.1 * y.sin()))(strategy)


@trap("the largest entries", kind="branch")
def _(strategy: Strategy) -> Any:
    return simple(lambda y: y.topk(3).values)(strategy)


# -- random numbers --------------------------------------------------------------------------------


def mean_square(model: nn.Module, h: Any, x: Tensor) -> Tensor:
    return (model(x).squeeze(-1) - x.sum(1)).square().mean()


def of_module(
    strategy: Strategy, model: nn.Module, loss: Callable[..., Any] = mean_square, **kwargs: Any
) -> Any:
    model = model.double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.5 * smooth_noise(*p.shape, phase=float(i)))
    rule = innerloop.optim.adam(lr=0.1, eps=0.1)
    problem = innerloop.Problem.from_module(model, loss, rule)
    return gradients(strategy, problem, dict(model.named_parameters()), **kwargs)


@trap("dropout", inductor=True)
def _(strategy: Strategy) -> Any:
    return of_module(
        strategy, nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1))
    )


@trap("noise by torch.randn")
def _(strategy: Strategy) -> Any:
    return simple(lambda y: y * (1 + 0.1 * torch.randn(y.shape, dtype=y.dtype)))(strategy)


@trap("random numbers of a generator", CANNOT)
def _(strategy: Strategy) -> Any:
    generator = torch.Generator().manual_seed(3)
    return simple(lambda y: y * torch.rand(y.shape, generator=generator))(strategy)


@trap("random numbers of NumPy", "differs|cannot be compiled")
def _(strategy: Strategy) -> Any:
    draws = np.random.default_rng(3)
    return simple(lambda y: y * torch.as_tensor(draws.random(5)))(strategy)


# -- edits, views, sharing -------------------------------------------------------------------------


@trap("an intermediate result edited in place")
def _(strategy: Strategy) -> Any:
    def edited(y: Tensor) -> Tensor:
        y = y.sin()
        y.mul_(2.0)
        z = y.cos()
        z[0] = y[1] * y[2]
        return z

    return simple(edited)(strategy)


@trap("a batch edited in place", "written in place")
def _(strategy: Strategy) -> Any:
    def loss(p: Any, h: Any, x: Tensor) -> Tensor:
        y = predict(p, x).square().mean()
        x.mul_(1.5)
        return y

    return gradients(strategy, loss, batches=[x.clone() for x in data()])


@trap("views", inductor=True)
def _(strategy: Strategy) -> Any:
    def loss(p: Any, h: Any, x: Tensor) -> Tensor:
        w = p["w"].t()[:, 1:].reshape(-1).view(4, 2)
        return (x[:, :2] @ w.t() @ p["v"]).square().mean() + p["w"].diagonal().prod()

    return gradients(strategy, loss)


@trap("tied weights", inductor=True)
def _(strategy: Strategy) -> Any:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, rows: Tensor) -> Tensor:
            return torch.as_tensor(self.head(self.embed(rows).tanh()))

    def loss(model: nn.Module, h: Any, rows: Tensor) -> Tensor:
        return F.cross_entropy(model(rows), (rows + 1) % 7)

    return of_module(strategy, Tied(), loss, batches=[torch.tensor([0, 3, 3, 6])] * 3)


@trap("a module that is registered twice")
def _(strategy: Strategy) -> Any:
    layer = nn.Linear(3, 3)
    return of_module(strategy, nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 1)))


@trap("a tensor in the closure that requires grad", "captured by the loss")
def _(strategy: Strategy) -> Any:
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    problem = innerloop.Problem(
        lambda p, h, x: predict(p, x).square().mean() * scale, innerloop.optim.sgd(lr=0.1)
    )
    traj = innerloop.unroll(problem, weights(), data(), strategy=strategy)
    return torch.autograd.grad(outer(traj, None), scale)


@trap("a tensor in the closure that requires grad, beside parameters", "captured by the loss")
def _(strategy: Strategy) -> Any:
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    return gradients(strategy, lambda p, h, x: predict(p, x).square().mean() * scale)


# -- kernels ---------------------------------------------------------------------------------------


def with_zero_row(steps: int = 3) -> list[Tensor]:
    found = data(steps)
    for x in found:
        x[1] = 0
    return found


@trap("the norm of a row of zeros")
def _(strategy: Strategy) -> Any:
    return gradients(
        strategy,
        lambda p, h, x: torch.linalg.vector_norm(x @ p["w"], dim=1).sum() + p["v"].norm(),
        batches=with_zero_row(),
    )


@trap("normalize of a row of zeros", inductor=True)
def _(strategy: Strategy) -> Any:
    return gradients(
        strategy,
        lambda p, h, x: (F.normalize(x @ p["w"], dim=1) @ p["v"] - 1).square().sum(),
        batches=with_zero_row(),
    )


@trap("a matrix product scaled by the learning rate", inductor=True)
def _(strategy: Strategy) -> Any:
    return gradients(
        strategy,
        lambda p, h, x: F.cross_entropy(x @ p["w"], torch.tensor([0, 1, 2, 3, 0])) + p["v"].sum(),
        optimizer=innerloop.optim.sgd(lr=0.05, momentum=0.9),
    )


@trap("weight_norm", inductor=True)
def _(strategy: Strategy) -> Any:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 6))
    return of_module(strategy, nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 1)))


@trap("weight_norm of the old kind", CANNOT)
def _(strategy: Strategy) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Linear(3, 6))
    return of_module(strategy, nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 1)))


def images(steps: int = 3) -> list[Tensor]:
    return [smooth_noise(2, 2, 8, 8, phase=float(t)) for t in range(steps)]


def of_images(model: nn.Module, h: Any, x: Tensor) -> Tensor:
    return (model(x).flatten(1) - 0.3).square().mean()


@trap("two max-pools", inductor=True)
def _(strategy: Strategy) -> Any:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.MaxPool2d(2),
    )
    return of_module(strategy, model, of_images, batches=images())


@trap("the square of a trace")
def _(strategy: Strategy) -> Any:
    return gradients(
        strategy,
        lambda p, h, x: (x.t() @ x @ p["w"] @ p["w"].t()).trace().square() * 1e-3 + p["v"].sum(),
        optimizer=innerloop.optim.sgd(lr=0.01),
    )


@trap("fused attention")
def _(strategy: Strategy) -> Any:
    def loss(p: Any, h: Any, x: Tensor) -> Tensor:
        y = (x @ p["w"]).view(1, 1, 5, 4)
        found: Tensor = F.scaled_dot_product_attention(y, y.sin(), y * p["v"])
        return found.square().mean()

    return gradients(strategy, loss)


@trap("half precision", inductor=True)
def _(strategy: Strategy) -> Any:
    params = {n: p.bfloat16() for n, p in weights().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", innerloop.PrecisionWarning)
        found = gradients(
            strategy,
            lambda p, h, x: predict(p, x).float().square().mean(),
            params,
            [x.bfloat16() for x in data()],
            optimizer=innerloop.optim.sgd(lr=0.1),
        )
    # Whatever the dtype of the outer loss, it is as exact as the parameters.
    return tree.map_tensors(Tensor.bfloat16, found)


@trap("autocast")
def _(strategy: Strategy) -> Any:
    def loss(p: Any, h: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = predict(p, x)
        return y.float().square().mean()

    found = gradients(strategy, loss)
    return tree.map_tensors(Tensor.bfloat16, found)


@trap("activation checkpointing of one operation")
def _(strategy: Strategy) -> Any:
    return simple(functools.partial(checkpoint, torch.sin, use_reentrant=False))(strategy)


@trap("activation checkpointing, both kinds, with dropout")
def _(strategy: Strategy) -> Any:
    def loss(p: Any, h: Any, x: Tensor) -> Tensor:
        y = checkpoint(lambda x: F.dropout(predict(p, x), 0.5), x, use_reentrant=False)
        return checkpoint(torch.square, y, use_reentrant=True).mean()

    return gradients(strategy, loss)


@trap("embedding bags, which have a replacement")
def _(strategy: Strategy) -> Any:
    return gradients(
        strategy,
        lambda p, h, rows: F.embedding_bag(rows, p["w"], mode="mean").sin().sum() + p["v"].sum(),
        batches=[torch.tensor([[0, 1], [2, 2]])] * 3,
    )


# -- code that does other things -------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside(x: Tensor) -> Tensor:
    return 2 * x


trap("a function that may not be compiled", CANNOT)(simple(_outside))
trap("detach", COMPILES)(simple(lambda y: y * y.detach()))
trap("a straight-through estimator by detach", COMPILES)(
    simple(lambda y: y + (y.sign() - y).detach())
)


@trap("no_grad inside the loss")
def _(strategy: Strategy) -> Any:
    def held(y: Tensor) -> Tensor:
        with torch.no_grad():
            target = y.sin()
        return y - target

    return simple(held)(strategy)


@trap("a hook on a tensor")
def _(strategy: Strategy) -> Any:
    def hooked(y: Tensor) -> Tensor:
        y = y.sin()
        y.register_hook(lambda g: 3 * g)
        return y

    return simple(hooked)(strategy)


@trap("a compiled function inside the loss", "compile")
def _(strategy: Strategy) -> Any:
    return simple(torch.compile(lambda y: y.sin() * y, backend="aot_eager"))(strategy)


@trap("a GRU", "RNN, GRU, or LSTM")
def _(strategy: Strategy) -> Any:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(3, 4, batch_first=True)
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.head(self.gru(x[None])[0][0]))

    return of_module(strategy, Recurrent())


@trap("aux and buffers")
def _(strategy: Strategy) -> Any:
    def loss(model: nn.Module, h: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = model(x).squeeze(-1)
        return (y - x.sum(1)).square().mean(), {"largest": y.amax(), "rows": torch.arange(3)}

    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return of_module(
        strategy,
        model,
        loss,
        objective=lambda traj, h: outer(traj, h) + traj.aux["largest"].sum(),
    )


# -- closures of a hand-written loop ---------------------------------------------------------------


class Net(nn.Module):
    """The network of `predict` as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(p) for p in weights().values())

    def forward(self, x: Tensor) -> Tensor:
        return predict({"w": self.w, "v": self.v}, x)


def tracked(strategy: Strategy, step: Callable[[Any, int, Tensor], None], steps: int = 2) -> Any:
    """Gradients behind a hand-written loop: ``step(loop, t, x)`` takes each of its steps."""
    compiles = bool(getattr(strategy, "compile", False))
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(3)
    with innerloop.track(
        model, optimizer, strategy=innerloop.Checkpointed(slots="all", compile=compiles)
    ) as loop:
        for t, x in enumerate(data(steps)):
            step(loop, t, x)
        end = loop.model(data(9)[8]).sin().sum() + loop.trajectory.losses.sum()
    end.backward()
    return end.detach(), [p.grad for p in model.parameters()]


@trap("a closure's number that changes", kind="late")
def _(strategy: Strategy) -> Any:
    def step(loop: Any, t: int, x: Tensor) -> None:
        rate = 0.5 + t
        loop.step(lambda: rate * loop.model(x).square().mean())

    return tracked(strategy, step)


@trap("a closure's variable that becomes another module", kind="late")
def _(strategy: Strategy) -> Any:
    torch.manual_seed(5)
    others = [nn.Linear(4, 2).requires_grad_(False), nn.Linear(4, 2).requires_grad_(False)]

    def step(loop: Any, t: int, x: Tensor) -> None:
        other = others[t]
        loop.step(lambda: other((x @ loop.model.w).tanh()).square().mean())

    return tracked(strategy, step)


# Of one dimension: PyTorch compiles nine times for a global number.
SHIFT = torch.zeros(1)
FUNCTION: Callable[[Tensor], Tensor] = torch.sin


@trap("a closure's globals that change", kind="late")
def _(strategy: Strategy) -> Any:
    def step(loop: Any, t: int, x: Tensor) -> None:
        global SHIFT, FUNCTION  # noqa: PLW0603
        SHIFT = torch.full((1,), 0.3 * t)
        FUNCTION = torch.cos if t else torch.sin

        def loss(model: nn.Module, x: Tensor, *, power: int = 2) -> Tensor:
            return (FUNCTION(model(x)) - SHIFT).pow(power).mean()

        loop.step(loss, args=(loop.model, x))

    return tracked(strategy, step, 2)


@trap("a closure that writes to a list", "writes to a list or dict")
def _(strategy: Strategy) -> Any:
    seen: list[Tensor] = []

    def step(loop: Any, t: int, x: Tensor) -> None:
        def loss() -> Tensor:
            y = loop.model(x)
            if getattr(strategy, "compile", False):
                seen.append(y.detach().mean())
            return y.square().mean()

        loop.step(loss)

    return tracked(strategy, step)


@trap("a closure that counts its calls", "writes the variable 'count'")
def _(strategy: Strategy) -> Any:
    def step(loop: Any, t: int, x: Tensor) -> None:
        count = 0

        def loss() -> Tensor:
            nonlocal count
            count += 1
            return loop.model(x).square().mean()

        loop.step(loss)

    return tracked(strategy, step)


@trap("a closure that decides by values", CANNOT, kind="branch")
def _(strategy: Strategy) -> Any:
    def step(loop: Any, t: int, x: Tensor) -> None:
        def loss() -> Tensor:
            y = loop.model(x)
            return y.square().mean() if y.sum() > 0 else y.abs().mean()

        loop.step(loss)

    return tracked(strategy, step)


@trap("a closure with a foreign function", FOREIGN, kind="function")
def _(strategy: Strategy) -> Any:
    def step(loop: Any, t: int, x: Tensor) -> None:
        loop.step(lambda: _Clipped.apply(loop.model(x)).square().mean())

    return tracked(strategy, step)


@trap("a closure with a module that requires grad", "does not capture itself")
def _(strategy: Strategy) -> Any:
    head = nn.Linear(1, 1)

    def step(loop: Any, t: int, x: Tensor) -> None:
        loop.step(lambda: head(loop.model(x)[:, None]).square().mean())

    return tracked(strategy, step)
