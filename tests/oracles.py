"""Where truth comes from: plain runs of ``torch.optim``, finite differences, closed forms. Nothing
here imports innerloop.

The finite differences are of fourth order,

.. math::  f'(x) \\approx \\frac{8 [f(x + h) - f(x - h)] - [f(x + 2h) - f(x - 2h)]}{12 h},

with an error of :math:`h^4 f^{(5)}(x) / 30` from truncation and of about :math:`10^{-16} |f| / h`
from rounding. The best
:math:`h` is therefore not known beforehand, and an optimizer may have a kink within reach of it. So
the steps go down a ladder until two neighbours agree, and where none do the oracle refuses to
answer (``NoDerivative``) instead of giving a number.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Params = dict[str, Tensor]
Settings = Mapping[str, Any]
Gradient = Callable[[Params, int], Mapping[str, Tensor | None]]


class NoDerivative(AssertionError):
    """No two neighbouring steps of the ladder agree: there is a kink, or too little precision, and
    so no truth to compare with."""


# -- a small nonlinear training problem ------------------------------------------------------------


def smooth_noise(*shape: int, phase: float = 0.0) -> Tensor:
    """Fixed numbers in (-1, 1) that look random, are the same on every machine, and leave the
    random state alone."""
    count = math.prod(shape)
    return torch.sin(
        torch.arange(1.0, count + 1.0, dtype=torch.float64) * 12.9898 + phase * 78.233
    ).reshape(shape)


@dataclass(frozen=True)
class Task:
    """Regression by a tanh layer, with parameters of odd shapes: 0-dim, one element, no element, a
    product of axes.

    ``large`` adds a tensor of 16,637 elements; ``dead`` makes entries whose gradient is exactly
    zero: input column 1 is never used, column 2 not in the first five steps, and output 4 sits
    behind a ReLU that never opens.
    """

    large: bool = False
    dead: bool = False

    def params(self, dtype: torch.dtype = torch.float64) -> Params:
        params = {
            "weight": 0.6 * smooth_noise(3, 5),
            "bias": 0.3 * smooth_noise(5, phase=1.0),
            "scale": torch.tensor(0.8, dtype=torch.float64),
            "shift": torch.tensor([0.1], dtype=torch.float64),
            "cube": 0.5 * smooth_noise(2, 1, 3, phase=2.0),
            "empty": torch.zeros(0, 3, dtype=torch.float64),
        }
        if self.large:
            params["large"] = 0.5 * smooth_noise(131, 127, phase=3.0)
        if self.dead:
            params["bias"] = torch.cat(
                [params["bias"][:4], torch.tensor([-9.0], dtype=torch.float64)]
            )
        return {name: value.to(dtype) for name, value in params.items()}

    def batch(self, t: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = smooth_noise(7, 3, phase=10.0 + t)
        if self.dead:
            x = x * torch.tensor([1.0, 0.0, float(t >= 5)], dtype=torch.float64)
        y = 1.5 * smooth_noise(7, 5, phase=30.0 + t)
        return x.to(dtype), y.to(dtype)

    def loss(self, params: Params, t: int) -> Tensor:
        x, y = self.batch(t, params["weight"].dtype)
        hidden = x @ params["weight"] + params["bias"]
        if self.dead:
            hidden = torch.cat([hidden[:, :4].tanh(), hidden[:, 4:].relu()], dim=1)
        else:
            hidden = hidden.tanh()
        prediction = params["scale"] * hidden + params["shift"]
        loss = (
            ((prediction - y) ** 2).sum() / 50
            + (1.5 * params["cube"] + params["cube"].sin()).sum()
            + params["empty"].sum()
        )
        if self.large:
            pattern = (1.0 + 0.5 * smooth_noise(131, 127, phase=50.0 + t)).to(loss.dtype)
            loss = loss + (params["large"].tanh() * pattern).sum() / 100
        return loss

    def gradient(self, params: Params, t: int) -> Params:
        return plain_gradient(self.loss, params, t)

    def outer(self, params: Params) -> Tensor:
        """A smooth scalar in which every parameter counts with another weight, so that no two
        errors cancel."""
        total = torch.zeros((), dtype=torch.float64)
        for index, value in enumerate(params.values()):
            weights = 1.0 + smooth_noise(*value.shape, phase=60.0 + index) / 2
            total = (
                total
                + (weights * (value.double() + 0.5).sin()).sum() / max(1, value.numel()) ** 0.5
            )
        return total


@dataclass(frozen=True)
class Bowl:
    """A loss for parameters of any shapes whose gradient stays between .3 and 2.8 in size: far from
    what bends Adam's update."""

    shapes: tuple[tuple[int, ...], ...] = ((2, 3), (), (1,), (0, 2), (5,))

    def params(self, dtype: torch.dtype = torch.float64) -> Params:
        return {
            f"p{i}": smooth_noise(*shape, phase=float(i)).to(dtype)
            for i, shape in enumerate(self.shapes)
        }

    def loss(self, params: Params, t: int) -> Tensor:
        shift = (
            torch.stack([p.sum() / max(1, p.numel()) for p in params.values()]).sum().sin() / 10
        )  # couples all of them
        return torch.stack(
            [((p + shift + 0.1 * t).sin() + 1.5 * p).sum() for p in params.values()]
        ).sum()

    def gradient(self, params: Params, t: int) -> Params:
        return plain_gradient(self.loss, params, t)

    def outer(self, params: Params) -> Tensor:
        return torch.stack(
            [((i + 1.0) * p.double()).cos().sum() for i, p in enumerate(params.values())]
        ).sum()


def plain_gradient(loss: Callable[[Params, int], Tensor], params: Params, t: int) -> Params:
    """The inner gradient as a plain training loop takes it: no graph is left behind."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    with torch.enable_grad():
        grads = torch.autograd.grad(loss(leaves, t), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


# -- torch.optim, run plainly ----------------------------------------------------------------------


def pick(value: Any, name: str, index: int | None) -> Any:
    """The number that parameter ``name`` (its element ``index``) uses: settings may be given by
    name, and per element."""
    if isinstance(value, tuple):
        return tuple(pick(part, name, index) for part in value)
    if isinstance(value, Mapping):
        value = value[name]
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        return flat[0 if flat.numel() == 1 else index].item()
    return value


def has_elements(value: Any, name: str) -> bool:
    if isinstance(value, tuple):
        return any(has_elements(part, name) for part in value)
    if isinstance(value, Mapping):
        value = value[name]
    return isinstance(value, Tensor) and value.dim() > 0


@dataclass
class TorchRun:
    """A ``torch.optim`` optimizer over leaves of its own; element-wise settings make one leaf and
    one group per element."""

    shapes: dict[str, torch.Size]
    leaves: dict[str, list[Tensor]]
    split: dict[str, bool]
    optimizer: torch.optim.Optimizer

    @classmethod
    def start(
        cls, rule: type[torch.optim.Optimizer], settings: Settings, params: Params
    ) -> TorchRun:
        shapes = {name: value.shape for name, value in params.items()}
        split = {
            name: any(has_elements(setting, name) for setting in settings.values())
            for name in params
        }
        leaves: dict[str, list[Tensor]] = {}
        groups: list[dict[str, Any]] = []
        for name, value in params.items():
            pieces = value.detach().reshape(-1).unbind() if split[name] else (value.detach(),)
            leaves[name] = [piece.clone() for piece in pieces]
            for index, leaf in enumerate(leaves[name]):
                group = {k: pick(v, name, index) for k, v in settings.items()}
                if groups and {**groups[-1], "params": None} == {**group, "params": None}:
                    groups[-1]["params"].append(leaf)
                else:
                    groups.append({"params": [leaf], **group})
        return cls(shapes, leaves, split, unchecked(rule, groups))

    @property
    def params(self) -> Params:
        whole = {}
        for name, pieces in self.leaves.items():
            if not self.split[name]:
                whole[name] = pieces[0].detach().clone()
            elif pieces:
                whole[name] = torch.stack(pieces).detach().reshape(self.shapes[name])
            else:
                whole[name] = torch.zeros(self.shapes[name], dtype=torch.float64)
        return whole

    def step(self, grads: Mapping[str, Tensor | None]) -> None:
        for name, pieces in self.leaves.items():
            grad = grads[name]
            whole = None if grad is None else grad.detach().clone()
            if self.split[name] and whole is not None:
                for leaf, entry in zip(pieces, whole.reshape(-1).unbind(), strict=True):
                    leaf.grad = entry.clone()
            else:
                for leaf in pieces:
                    leaf.grad = whole
        with torch.no_grad():
            self.optimizer.step()


def unchecked(
    rule: type[torch.optim.Optimizer], groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimizer, its numbers written into its groups *after* construction.

    A finite difference at lr = 0 or momentum = 0 needs values below zero, which the constructor
    refuses and ``step`` does not. A class outside of ``torch.optim`` may have one kernel only, and
    no arguments to choose it by.
    """
    flags = {k: v for k, v in groups[0].items() if k in kernel_arguments(rule)}
    optimizer = rule([{"params": group["params"]} for group in groups], **flags)
    for ours, theirs in zip(groups, optimizer.param_groups, strict=True):
        theirs.update({k: v for k, v in ours.items() if k != "params"})
        # Adagrad fills its sums at construction, from the constructor's argument: here, from the
        # group's.
        for p in theirs["params"] if "initial_accumulator_value" in ours else ():
            value = float(ours["initial_accumulator_value"])
            optimizer.state[p]["sum"].fill_(complex(value, value) if p.is_complex() else value)
    return optimizer


KERNELS = {"foreach", "fused", "differentiable", "capturable"}
_kernel_arguments: dict[type, set[str]] = {}


def kernel_arguments(rule: type[torch.optim.Optimizer]) -> set[str]:
    if rule not in _kernel_arguments:
        _kernel_arguments[rule] = KERNELS & set(inspect.signature(rule).parameters)
    return _kernel_arguments[rule]


def torch_run(
    rule: type[torch.optim.Optimizer],
    settings: Settings,
    params: Params,
    gradient: Gradient,
    steps: int,
    start: int = 0,
) -> Params:
    """The parameters after ``steps`` steps of ``torch.optim``."""
    run = TorchRun.start(rule, settings, params)
    for t in range(start, start + steps):
        run.step(gradient(run.params, t))
    return run.params


def accepts(rule: type[torch.optim.Optimizer], settings: Settings) -> bool:
    """Whether torch itself takes these settings: asked by construction and two steps, not by our
    own table."""
    leaf = torch.ones(3, dtype=torch.float64)
    try:
        optimizer = rule([leaf], **settings)
        for _ in range(2):
            leaf.grad = torch.ones_like(leaf)
            with torch.no_grad():
                optimizer.step()
    except (ValueError, RuntimeError, AssertionError, TypeError):
        return False
    return True


def grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of the choices, as settings."""
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


# -- finite differences ----------------------------------------------------------------------------


def ladder(largest: float, rungs: int = 6) -> Iterator[float]:
    return (largest * 4.0**-k for k in range(rungs))


def derivative(
    f: Callable[[float], float], *, largest: float = 2e-4, agree: float = 1e-8, need: float = 1e-7
) -> float:
    """``f'(0)`` by fourth-order central differences, the step going down from ``largest`` by
    factors of 4.

    It stops when two neighbouring steps agree to ``agree`` relative to the derivative. Failing
    that, the closest pair of neighbours is used if it agrees to ``need``, ten times tighter than
    the tests that use the number. A kink exactly at 0 looks the same at every step of a central
    difference (|x| has 0), so the bend ``[f(h) - 2 f(0) + f(-h)] / h`` must vanish too.
    """
    middle, previous, bend = f(0.0), math.nan, math.nan
    best = (math.inf, math.nan, 0.0)
    for h in ladder(largest):
        plus, minus = f(h), f(-h)
        estimate = (8 * (plus - minus) - (f(2 * h) - f(-2 * h))) / (12 * h)
        scale = max(abs(estimate), 1e-4)
        gap, before, bend = (
            abs(estimate - previous) / scale,
            bend,
            abs(plus - 2 * middle + minus) / h / scale,
        )
        if gap < best[0]:  # the bend is proportional to h where f is smooth, and constant at a kink
            best = (gap, estimate, bend if bend > 0.5 * before else 0.0)
        if best[0] <= agree:
            break
        previous = estimate
    gap, estimate, kink = best
    if gap > need or kink > 1e-4:
        raise NoDerivative(
            f"neighbouring steps differ by {gap:.1e} relative, the slope jumps by {kink:.1e}: is "
            "there a kink?"
        )
    return estimate


def directional(
    f: Callable[[Any], float | Tensor], at: Any, direction: Any, **options: float
) -> float:
    """The derivative of ``f`` at the pytree ``at`` along ``direction``."""

    def along(h: float) -> float:
        return float(f(pytree.tree_map(lambda x, v: x + h * v, at, direction)))

    return derivative(along, **options)


def curvature(f: Callable[[float], float], *, largest: float = 4e-3, need: float = 1e-6) -> float:
    """``f''(0)`` by fourth-order central differences; rounding is divided by h², so the ladder is
    short and its steps large."""

    def at(h: float) -> float:
        return (16 * (f(h) + f(-h)) - (f(2 * h) + f(-2 * h)) - 30 * f(0.0)) / (12 * h * h)

    estimates = [at(largest / 2**k) for k in range(4)]
    gaps = [abs(a - b) / max(abs(b), 1e-3) for a, b in itertools.pairwise(estimates)]
    best = gaps.index(min(gaps))
    if not gaps[best] <= need:
        raise NoDerivative(
            f"neighbouring steps differ by {gaps[best]:.1e} relative at best; is there a kink?"
        )
    return estimates[best + 1]


def inner(a: Any, b: Any) -> float:
    """The scalar product of two pytrees of tensors: the other side of a directional derivative."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    double = lambda x: torch.as_tensor(x, dtype=torch.float64)  # noqa: E731
    return float(sum((double(x) * double(y)).sum() for x, y in pairs))


def directions(params: Params, count: int) -> list[Params]:
    """Fixed directions of unit length: in ``count`` of them a wrong entry of a gradient cannot
    hide."""
    made = []
    for k in range(count):
        phases = {name: 100.0 * (k + 1) + i for i, name in enumerate(params)}
        v = {name: smooth_noise(*value.shape, phase=phases[name]) for name, value in params.items()}
        length = sum((x**2).sum() for x in v.values()) ** 0.5
        made.append({name: x / length for name, x in v.items()})
    return made


def assert_derivative(
    ours: float, truth: float, what: str, *, relative: float = 1e-6, absolute: float = 1e-9
) -> None:
    """Equal to the finite difference: ``relative`` to its size; ``absolute`` is the rounding noise
    of the difference itself."""
    assert math.isfinite(ours), (
        f"{what}: got {ours}, finite differences of torch.optim give {truth:.12g}"
    )
    error = abs(ours - truth)
    message = (
        f"{what}: got {ours:.12g}, finite differences of torch.optim give {truth:.12g} "
        f"(off by {error:.1e})"
    )
    assert error <= relative * abs(truth) + absolute, message


def assert_params(
    ours: Mapping[str, Tensor], truth: Mapping[str, Tensor], tolerance: float
) -> None:
    """Equal, entry by entry, relative to the larger of the entry and 1; with ``tolerance=0`` equal
    in every bit."""
    assert list(ours) == list(truth)
    for name, expected in truth.items():
        got = ours[name].detach()
        assert got.shape == expected.shape, (
            f"{name}: shape {tuple(got.shape)}, torch.optim has {tuple(expected.shape)}"
        )
        assert got.dtype == expected.dtype, f"{name}: {got.dtype}, torch.optim has {expected.dtype}"
        try:
            torch.testing.assert_close(
                got, expected, rtol=tolerance, atol=tolerance, equal_nan=True
            )
        except AssertionError as error:
            raise AssertionError(f"{name} differs from torch.optim: {error}") from None
