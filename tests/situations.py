"""The one list of module situations under test, and plain PyTorch as their truth.

**To enrol a situation, add one line to ``SITUATIONS``**: how the module is made, its loss at step t
and, if it is not SGD over everything, its optimizer. The situation then stands under the whole
contract of ``test_module_situations.py``: forward, buffers and optimizer state equal to
``torch.optim``, gradients equal to finite differences, the user's objects untouched, for ``track``,
for ``Problem.from_module`` and for ``functional``.

Nothing in this file imports innerloop.
"""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.oracles import derivative, smooth_noise

STEPS = 3
SEED = 7
TokenIds = Tensor


# -- modules that people really write --------------------------------------------------------------


class TwoLayers(nn.Module):
    """tanh in between, so that every derivative exists."""

    def __init__(
        self, middle: Callable[[], nn.Module] = nn.Tanh, features: int = 3, hidden: int = 4
    ) -> None:
        super().__init__()
        self.body = nn.Linear(features, hidden)
        self.middle = middle()
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.body(x)))


class WithUnused(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


class TwoHeads(TwoLayers):
    """Step t trains head t mod 2; the optimizer has both."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 1)

    def at(self, t: int, x: Tensor) -> Tensor:
        return (self.other if t % 2 else self.head)(self.body(x).tanh())


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: TokenIds) -> Tensor:
        return self.head(self.embedding(tokens).tanh())


class RegisteredTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()))


class InPlainContainers(nn.Module):
    """Modules that are registered and also stand in plain Python containers, by which ``forward``
    finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
        self.order = list(self.blocks)
        self.nested: dict[str, Any] = {
            "pair": (self.blocks[0], [self.blocks[2]]),
            "named": OrderedDict(act=self.blocks[1]),
        }

    def forward(self, x: Tensor) -> Tensor:
        for block in self.order:
            x = block(x)
        return x + self.nested["pair"][1][0](
            self.nested["named"]["act"](self.nested["pair"][0](x.expand(-1, 3)))
        )


class ParametersInLists(nn.Module):
    """Parameters that are registered and also stand in a list, in a dict and under a second
    name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(smooth_noise(3, 3))
        self.bias = nn.Parameter(smooth_noise(3, phase=1.0))
        self.everything = [self.weight, self.bias]
        self.by_name = {"weight": self.weight}

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x @ self.everything[0] + self.everything[1]).tanh()
        return hidden @ self.by_name["weight"][:, :1] + self.bias[0]


class TorchContainers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            [nn.Parameter(smooth_noise(3, 3)), nn.Parameter(smooth_noise(3, 1, phase=1.0))]
        )
        self.scales = nn.ParameterDict(
            {"in": nn.Parameter(torch.tensor(0.8)), "out": nn.Parameter(torch.tensor(1.2))}
        )
        self.modules_by_name = nn.ModuleDict({"act": nn.Tanh(), "skip": nn.Linear(3, 1)})

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.modules_by_name["act"](self.scales["in"] * (x @ self.weights[0]))
        return self.scales["out"] * (hidden @ self.weights[1]) + self.modules_by_name["skip"](x)


class StoredMethods(TwoLayers):
    """Bound methods and partial functions of submodules, kept as attributes and called from
    ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = self.body.forward
        self.decode = functools.partial(self.apply_to, self.head)

    @staticmethod
    def apply_to(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x).tanh())


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase], layers: int = 1) -> None:
        super().__init__()
        self.recurrent = kind(3, 4, num_layers=layers, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            self.recurrent(x.unsqueeze(1) * torch.tensor([[[1.0], [-0.5], [0.3]]], dtype=x.dtype))[
                0
            ][:, -1]
        )


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, 4, 2, padding=1),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.AvgPool1d(2),
            nn.Flatten(),
            nn.Linear(8, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.unsqueeze(1))


class UnusualTensors(nn.Module):
    """A 0-dim, an empty, a complex and an absent parameter; integer, boolean, absent and unsaved
    buffers that change."""

    calls: Tensor
    flags: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.spectrum = nn.Parameter(
            torch.tensor([0.5 + 1.0j, -0.8 + 0.2j], dtype=torch.complex128)
        )
        self.register_parameter("absent", None)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("nothing", None)
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.flags.logical_not_()
        self.mean = (
            0.9 * self.mean + 0.1 * x.detach().mean()
        )  # replaced, where the others are written in place
        waves = (self.spectrum * torch.exp(1j * x[:, :2])).sum(1)
        return (
            self.scale * (waves.real**2 + waves.imag).unsqueeze(1)
            + self.empty.sum()
            + self.mean * self.scale
        )


class Quantised(TwoLayers):
    """Frozen integer weights, as a quantised base model has them, and a large buffer that is
    written in place."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.tensor([[1, -2, 3]]), requires_grad=False)
        self.register_buffer("table", torch.zeros(70_000))

    def forward(self, x: Tensor) -> Tensor:
        self.table[int(self.table.sum())] = 1
        return super().forward(x) + 0.1 * (self.codes * x * self.table[:3]).sum(1, keepdim=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(1, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        sequence = self.lift(x.unsqueeze(-1))
        return self.head(self.attention(sequence, sequence, sequence)[0].mean(1))


class OwnAttributeAccess(TwoLayers):
    """Overrides attribute access, cannot be deep-copied, and needs arguments to be constructed."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.settings = {"gain": gain}

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("settings", {})
        return settings[name] if name in settings else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RuntimeError("this module cannot be deep-copied")

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)


def hooked() -> nn.Module:
    """Hooks of all kinds, each of which changes the result."""
    model = TwoLayers()
    model.body.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))
    model.body.register_forward_hook(lambda module, args, output: output + module.weight.sum())
    model.register_forward_hook(lambda module, args, output: output * module.head.bias.exp())
    return model


def prepared(model: nn.Module, prepare: Callable[[Any], Any]) -> nn.Module:
    prepare(model)
    return model


def spectral() -> nn.Module:
    return prepared(TwoLayers(), lambda m: parametrizations.spectral_norm(m.body))


def orthogonal() -> nn.Module:
    return prepared(
        TwoLayers(), lambda m: parametrizations.orthogonal(m.body, orthogonal_map="cayley")
    )


def weight_norm() -> nn.Module:
    """The hook-based one, which keeps a computed tensor as a plain attribute of the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return prepared(TwoLayers(), lambda m: nn.utils.weight_norm(m.body))


def frozen_body() -> nn.Module:
    return prepared(TwoLayers(), lambda m: m.body.requires_grad_(False))


def batch_norm() -> nn.Module:
    return TwoLayers(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()))


def dropout() -> nn.Module:
    return TwoLayers(lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.4)), hidden=8)


def two_modules() -> dict[str, nn.Module]:
    """With a layer that belongs to both."""
    shared = nn.Linear(3, 3)
    return {
        "actor": nn.Sequential(shared, nn.Tanh(), nn.Linear(3, 1)),
        "critic": nn.Sequential(shared, nn.Linear(3, 1)),
    }


# -- losses: model and step to a scalar ------------------------------------------------------------


def features(t: int) -> Tensor:
    return 1.5 * smooth_noise(6, 3, phase=10.0 + t)


def target(t: int) -> Tensor:
    return smooth_noise(6, 1, phase=30.0 + t)


def regression(model: Any, t: int) -> Tensor:
    return F.mse_loss(model(features(t)), target(t))


def next_token(model: Any, t: int) -> Tensor:
    tokens = (torch.arange(8) * (t + 2) + t) % 6
    return F.cross_entropy(model(tokens[:-1]), tokens[1:])


def by_parts(model: Any, t: int) -> Tensor:
    """Submodules called alone, and a parameter used by itself."""
    hidden = model.body(features(t)).tanh()
    return F.mse_loss(model.head(hidden), target(t)) + 0.1 * model.body.weight.square().sum()


def one_head(model: Any, t: int) -> Tensor:
    return F.mse_loss(model.at(t, features(t)), target(t))


def actor_critic(models: Any, t: int) -> Tensor:
    x = features(t)
    return F.mse_loss(models["actor"](x), target(t)) + 0.5 * F.mse_loss(
        models["critic"](x), target(t + 1)
    )


def evaluated(model: Any) -> Tensor:
    """The outer loss of a model that is adapted in train mode and judged in eval mode."""
    model.eval()
    return regression(model, STEPS)


# -- optimizers ------------------------------------------------------------------------------------


def named(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Every parameter once, by the name that it has for innerloop."""
    return _once(model, nn.Module.named_parameters)


def named_buffers(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return _once(model, nn.Module.named_buffers)


def _once(
    model: nn.Module | Mapping[str, nn.Module], listing: Callable[[nn.Module], Any]
) -> dict[str, Any]:
    if isinstance(model, nn.Module):
        return dict(listing(model))
    everything = [
        (f"{key}.{name}", tensor)
        for key, module in model.items()
        for name, tensor in listing(module)
    ]
    return {
        name: x
        for i, (name, x) in enumerate(everything)
        if all(x is not before for _, before in everything[:i])
    }


Optimizers = list[torch.optim.Optimizer]


def everything(model: Any) -> Optimizers:
    return [torch.optim.SGD(named(model).values(), lr=0.1, momentum=0.9)]


def only_trainable(model: Any) -> Optimizers:
    return [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    ]


def interleaved(model: Any) -> Optimizers:
    return [
        torch.optim.SGD(
            [p for i, p in enumerate(model.parameters()) if i % 2 == 0][::-1], lr=0.1, momentum=0.9
        )
    ]


def only_head(model: Any) -> Optimizers:
    return [torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)]


def one_per_half(model: Any) -> Optimizers:
    """The second half first, and another rule."""
    return [
        torch.optim.Adam(model.head.named_parameters(), lr=0.05, eps=0.1),
        torch.optim.SGD(model.body.parameters(), lr=0.1, momentum=0.9),
    ]


def two_groups(model: Any) -> Optimizers:
    groups = [
        {"params": model.head.parameters(), "lr": 0.03, "momentum": 0.5},
        {"params": model.body.parameters()},
    ]
    return [torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)]


def adam(model: Any) -> Optimizers:
    return [torch.optim.Adam(named(model).values(), lr=0.05, eps=0.1)]


# -- the list --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Situation:
    """One enrolled situation.

    Attributes:
        name: shown by pytest.
        make: the module (or dict of modules); called under a fixed seed.
        loss: ``loss(model, t) -> scalar``.
        optimizer: the ``torch.optim`` optimizers over the model.
        outer: the outer loss of the trained model; by default the loss on one more batch.
        not_unrolled: why ``Problem.from_module`` does not apply; empty where it does.
        forward_only: why PyTorch's own backward is not the derivative of its forward, so that there
            is no truth for gradients.
    """

    name: str
    make: Callable[[], Any]
    loss: Callable[[Any, int], Tensor] = regression
    optimizer: Callable[[Any], Optimizers] = everything
    outer: Callable[[Any], Tensor] | None = None
    not_unrolled: str = ""
    forward_only: str = ""

    def model(self) -> Any:
        """A new module, the same one at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return self.make()

    def outer_loss(self, model: Any) -> Tensor:
        return self.loss(model, STEPS) if self.outer is None else self.outer(model)


SITUATIONS = (
    Situation("plain", TwoLayers),
    Situation("adam", TwoLayers, optimizer=adam),
    Situation(
        "frozen-layer-in-optimizer",
        frozen_body,
        not_unrolled="params are those to train: the optimizer has more",
    ),
    Situation("frozen-layer-filtered", frozen_body, optimizer=only_trainable),
    Situation("interleaved-subset", TwoLayers, optimizer=interleaved),
    Situation("only-head-adapts", TwoLayers, optimizer=only_head),
    Situation("two-optimizers", TwoLayers, optimizer=one_per_half),
    Situation("two-groups", TwoLayers, optimizer=two_groups),
    Situation("unused-parameter", WithUnused),
    Situation("unused-parameter-adam", WithUnused, optimizer=adam),
    Situation(
        "head-used-every-second-step",
        TwoHeads,
        one_head,
        not_unrolled="a gradient is zero there, never None",
    ),
    Situation("tied-weights", TiedLanguageModel, next_token, adam),
    Situation("registered-twice", RegisteredTwice),
    Situation("modules-in-plain-containers", InPlainContainers),
    Situation("parameters-in-lists", ParametersInLists),
    Situation("torch-containers", TorchContainers),
    Situation("stored-methods", StoredMethods),
    Situation("submodules-called-alone", TwoLayers, by_parts),
    Situation("own-attribute-access", lambda: OwnAttributeAccess(gain=0.7)),
    Situation("hooks", hooked),
    Situation(
        "dict-of-modules", two_modules, actor_critic, not_unrolled="from_module takes one module"
    ),
    Situation("lstm", lambda: Recurrent(nn.LSTM, layers=2)),
    Situation("gru", lambda: Recurrent(nn.GRU)),
    Situation("convolution-group-norm", Convolutional),
    Situation("attention", Attention),
    Situation("batch-norm", batch_norm),
    Situation("batch-norm-then-evaluated", batch_norm, outer=evaluated),
    Situation("dropout", dropout),
    Situation("dropout-then-evaluated", dropout, outer=evaluated, optimizer=adam),
    Situation(
        "spectral-norm", spectral, forward_only="its backward holds the singular vectors constant"
    ),
    Situation("weight-norm-legacy", weight_norm),
    Situation("orthogonal", orthogonal),
    Situation("unusual-tensors", UnusualTensors),
    Situation("integer-weights-large-buffer", Quantised, optimizer=only_trainable),
    Situation("unusual-tensors-adam", UnusualTensors, optimizer=adam),
)


def each_situation(
    choose: Callable[[Situation], bool] = lambda situation: True,
) -> pytest.MarkDecorator:
    """Parametrize a test by ``situation``."""
    chosen = [
        pytest.param(situation, id=situation.name) for situation in SITUATIONS if choose(situation)
    ]
    return pytest.mark.parametrize("situation", chosen)


# -- truth: plain PyTorch --------------------------------------------------------------------------


class PlainRun(NamedTuple):
    """What an ordinary training loop leaves behind; parameters and buffers by time, 0 to T."""

    outer: float
    losses: list[float]
    params: list[dict[str, Tensor]]
    buffers: list[dict[str, Tensor]]
    model: Any
    optimizers: Optimizers


def plain_run(
    situation: Situation,
    shift: Mapping[str, Tensor] | None = None,
    lr: float = 0.0,
    outer_buffers: Mapping[str, Tensor] | None = None,
) -> PlainRun:
    """Ordinary training from parameters moved by ``shift``, with learning rates moved by ``lr``.

    For a finite difference ``outer_buffers`` are those of the run that was not moved. Running
    statistics depend on the parameters, but for PyTorch they are constants of the derivative (it
    updates them without recording), and so for the truth.
    """
    model = situation.model()
    with torch.no_grad():
        for name, move in (shift or {}).items():
            named(model)[name].add_(move)
    optimizers = situation.optimizer(model)
    for group in all_groups(optimizers):
        group["lr"] += lr
    copies = lambda tensors: {name: x.detach().clone() for name, x in tensors.items()}  # noqa: E731
    losses, params, buffers = [], [copies(named(model))], [copies(named_buffers(model))]
    torch.manual_seed(SEED)
    for t in range(STEPS):
        for p in named(model).values():
            p.grad = None
        loss = situation.loss(model, t)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        params.append(copies(named(model)))
        buffers.append(copies(named_buffers(model)))
    for name, buffer in named_buffers(model).items():
        buffer.copy_((outer_buffers or buffers[-1])[name])
    return PlainRun(situation.outer_loss(model).item(), losses, params, buffers, model, optimizers)


def all_groups(optimizers: Optimizers) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def fixed_directions(situation: Situation) -> list[dict[str, Tensor]]:
    """Two fixed directions over the trainable parameters; complex where the parameter is."""
    made = []
    for k in range(2):
        direction = {}
        for i, (name, p) in enumerate(named(situation.model()).items()):
            phase = 100.0 * (k + 1) + i
            if p.is_complex():
                direction[name] = torch.complex(
                    smooth_noise(*p.shape, phase=phase), smooth_noise(*p.shape, phase=phase + 0.5)
                )
            elif p.requires_grad:
                direction[name] = smooth_noise(*p.shape, phase=phase)
        made.append(direction)
    return made


@functools.cache
def true_init_derivatives(situation: Situation) -> list[float]:
    """The outer loss's derivatives along `fixed_directions` of the initial parameters, by finite
    differences."""
    buffers = plain_run(situation).buffers[-1]

    def truth(direction: dict[str, Tensor]) -> float:
        moved = lambda h: {name: h * v for name, v in direction.items()}  # noqa: E731
        return derivative(
            lambda h: plain_run(situation, shift=moved(h), outer_buffers=buffers).outer
        )

    return [truth(direction) for direction in fixed_directions(situation)]


@functools.cache
def true_lr_derivative(situation: Situation) -> float:
    """The outer loss's derivative with respect to a common shift of all learning rates, by finite
    differences."""
    buffers = plain_run(situation).buffers[-1]
    return derivative(lambda h: plain_run(situation, lr=h, outer_buffers=buffers).outer)


def along(gradients: Mapping[str, Tensor | None], direction: Mapping[str, Tensor]) -> float:
    """The scalar product (for complex parameters its real part); a gradient that is None counts as
    zero."""
    total = 0.0
    for name, v in direction.items():
        gradient = gradients[name]
        total += 0.0 if gradient is None else (gradient.conj() * v).sum().real.item()
    return total
