"""Which differentiable optimizers are right: every rule of `torch.optim`, in innerloop, higher,
TorchOpt and torch itself.

    python -m benchmarks.optimizers --out docs/optimizers.md

The truth is plain `torch.optim` on leaves, and fourth-order differences of it; nothing of innerloop
is in it. All in float64.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import machine

Params = dict[str, Tensor]
Hyper = dict[str, Any]
STEPS = 10
FORWARD, GRADIENT = 1e-9, 1e-5
"""What counts as equal: parameters after ten steps, and derivatives (relative)."""


@dataclass(frozen=True)
class Row:
    """One rule with one setting.

    Attributes:
        name: of the class in `torch.optim`.
        settings: its keyword arguments.
        hyper: the real-valued ones among them to differentiate; ``betas.0`` is the first of a pair.
        zero: those that are also looked at with the value 0.
    """

    name: str
    settings: Hyper
    hyper: tuple[str, ...]
    zero: tuple[str, ...] = ()
    flags: tuple[str, ...] = field(default=())

    @property
    def cls(self) -> Any:
        return getattr(torch.optim, self.name)

    @property
    def title(self) -> str:
        shown = ", ".join(self.flags)
        return f"{self.name} ({shown})" if shown else self.name


def row(name: str, hyper: str, *flags: str, zero: str = "", **settings: Any) -> Row:
    return Row(name, settings, tuple(hyper.split()), tuple(zero.split()), flags)


ADAM: Hyper = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 0.1, "weight_decay": 0.1}
MOMENTS = "lr betas.0 betas.1 eps weight_decay"
ROWS = (
    row("SGD", "lr weight_decay", lr=0.1, weight_decay=0.1, zero="weight_decay"),
    row("SGD", "lr momentum dampening weight_decay", "momentum", zero="weight_decay",
        lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    row("SGD", "lr momentum", "nesterov", lr=0.1, momentum=0.9, nesterov=True),
    row("SGD", "lr momentum", "maximize", lr=0.1, momentum=0.9, maximize=True),
    row("Adam", MOMENTS, **ADAM, zero="weight_decay"),
    row("Adam", MOMENTS, "amsgrad", **ADAM, amsgrad=True),
    row("Adam", MOMENTS, "maximize", **ADAM, maximize=True),
    row("Adam", MOMENTS, "decoupled", **ADAM, decoupled_weight_decay=True),
    row("AdamW", MOMENTS, **ADAM, zero="weight_decay"),
    row("NAdam", f"{MOMENTS} momentum_decay", **ADAM, momentum_decay=0.5),
    row("RAdam", MOMENTS, **ADAM),
    row("Adamax", MOMENTS, **{**ADAM, "betas": (0.9, 0.7)}),
    row("Adagrad", "lr lr_decay weight_decay initial_accumulator_value eps",
        zero="lr_decay weight_decay",
        lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.3, eps=0.1),
    row("Adadelta", "lr rho eps weight_decay",
        lr=0.5, rho=0.7, eps=1e-2, weight_decay=0.1, zero="weight_decay"),
    row("RMSprop", "lr alpha eps weight_decay", lr=0.02, alpha=0.9, eps=0.1, weight_decay=0.1),
    row("RMSprop", "lr alpha eps momentum", "centered, momentum",
        lr=0.02, alpha=0.9, eps=0.1, momentum=0.9, centered=True),
    row("ASGD", "lr lambd alpha "
                "weight_decay", lr=0.2, lambd=1.0, alpha=0.75, t0=2.0, weight_decay=0.1),
    row("Rprop", "lr etas.0 etas.1 step_sizes.0 "
                 "step_sizes.1", lr=0.03, etas=(0.5, 1.2), step_sizes=(0.0173, 0.039)),
    row("Adafactor", "lr beta2_decay weight_decay", lr=0.05, beta2_decay=-0.8, weight_decay=0.1),
    row("Muon", "lr momentum weight_decay", lr=0.05, momentum=0.9, weight_decay=0.1),
    row("SparseAdam", "lr betas.0 betas.1 eps", lr=0.05, betas=(0.9, 0.95), eps=0.1),
    row("LBFGS", "lr", lr=0.3, max_iter=3),
    row("LBFGS", "lr", "strong_wolfe", lr=1.0, max_iter=3, line_search_fn="strong_wolfe"),
)  # fmt: skip


# -- the task --------------------------------------------------------------------------------------


def noise(*shape: int, phase: float = 0.0) -> Tensor:
    return torch.sin(12.9898 * torch.arange(1.0, math.prod(shape) + 1) + phase).reshape(shape)


class Task:
    """Two coupled parameters; with ``dead`` a third one whose gradient is exactly zero in half of
    its entries."""

    def __init__(self, rule: Row, dead: bool = False, smooth: bool = False) -> None:
        self.rule, self.dead, self.smooth = rule, dead, smooth
        self.sparse = rule.name == "SparseAdam"

    def start(self) -> Params:
        if self.sparse:
            return {"table": noise(5, 3)}
        matrices = {"w": 0.6 * noise(3, 5), "v": 0.6 * noise(4, 2, phase=1.0)}
        return (
            matrices
            if self.rule.name == "Muon"
            else {"w": matrices["w"], "b": 0.6 * noise(4, phase=2.0)}
        )

    def loss(self, params: Mapping[str, Tensor], t: int) -> Tensor:
        if self.sparse:
            rows = torch.nn.functional.embedding(
                torch.tensor([t % 5, (t + 1) % 5, (2 * t) % 5]), params["table"], sparse=True
            )
            return ((rows + 0.1 * t).sin() * torch.arange(1.0, 4.0) + 0.2 * rows**2).sum()
        flat = torch.cat([p.reshape(-1) for p in params.values()])
        if self.dead:
            flat = flat * (torch.arange(len(flat)) % 2)
        if self.rule.name == "LBFGS":
            return (
                (flat - flat.mean().sin() / 2 - 0.05 * t) ** 2 * torch.linspace(0.5, 2, len(flat))
            ).sum() + (flat**4).sum() / 8
        return ((flat + flat.mean().sin() / 2 + 0.1 * t).sin() + 1.5 * flat).sum()

    def outer(self, params: Mapping[str, Tensor]) -> Tensor:
        flat = torch.cat([p.reshape(-1) for p in params.values()])
        return (torch.arange(1.0, len(flat) + 1) / 5 * flat).cos().sum()

    def gradient(self, params: Mapping[str, Tensor], t: int) -> Params:
        """Recorded, so that it can be differentiated again."""
        found = torch.autograd.grad(self.loss(params, t), list(params.values()), create_graph=True)
        return dict(zip(params, found, strict=True))


# -- the contenders: parameters after some steps, differentiable in the start and in the hyper-param


class MissingError(Exception):
    """The library has no such rule, or the rule no such setting."""


def by_torch(rule: Row, task: Task, params: Params, settings: Hyper, steps: int) -> Params:
    """`torch.optim` with ``differentiable=True``."""
    if "differentiable" not in inspect.signature(rule.cls).parameters:
        raise MissingError("no differentiable flag")
    now = {name: p.clone() for name, p in params.items()}
    optimizer = rule.cls(list(now.values()), **settings, differentiable=True)
    for t in range(steps):
        at = {
            name: p.clone() for name, p in now.items()
        }  # else the next in-place step spoils this graph
        for (_, p), g in zip(now.items(), task.gradient(at, t).values(), strict=True):
            p.grad = g
        optimizer.step()
    return now


def by_higher(rule: Row, task: Task, params: Params, settings: Hyper, steps: int) -> Params:
    import higher

    names = {cls.__name__ for cls in higher.optim._opt_mapping}
    if rule.name not in names:
        raise MissingError("no such rule")
    tensors = {
        key: value
        for key, value in settings.items()
        if any(isinstance(v, Tensor) for v in pieces(value))
    }
    numbers = {**settings, **{key: plain(value) for key, value in tensors.items()}}
    leaves = [p.detach().clone().requires_grad_() for p in params.values()]
    optimizer = higher.get_diff_optim(
        rule.cls(leaves, **numbers), leaves, override={k: [v] for k, v in tensors.items()}
    )
    now = [p.clone() for p in params.values()]
    for t in range(steps):
        now = list(optimizer.step(task.loss(dict(zip(params, now, strict=True)), t), params=now))
    return dict(zip(params, now, strict=True))


def by_torchopt(rule: Row, task: Task, params: Params, settings: Hyper, steps: int) -> Params:
    import torchopt

    make = getattr(torchopt, rule.name.lower(), None)
    if make is None:
        raise MissingError("no such rule")
    unknown = settings.keys() - inspect.signature(make).parameters.keys()
    if unknown:
        raise MissingError(f"no {', '.join(sorted(unknown))}")
    more = (
        {"moment_requires_grad": False}
        if "moment_requires_grad" in inspect.signature(make).parameters
        else {}
    )
    optimizer = make(**settings, **more)
    now = {name: p.clone() for name, p in params.items()}
    state = optimizer.init(now)
    for t in range(steps):
        updates, state = optimizer.update(task.gradient(now, t), state, params=now, inplace=False)
        now = torchopt.apply_updates(now, updates, inplace=False)
    return now


def by_innerloop(rule: Row, task: Task, params: Params, settings: Hyper, steps: int) -> Params:
    import innerloop

    name = {"SparseAdam": "sparse_adam"}.get(rule.name, rule.name.lower())
    make = getattr(innerloop.optim, name, None)
    if make is None:
        raise MissingError("no such rule")
    more = (
        {"ns_dtype": torch.float64} if rule.name == "Muon" and task.smooth else {}
    )  # the derivative is that of this iteration
    problem = innerloop.Problem(
        lambda params, hyper, t: task.loss(params, int(t)), make(**settings, **more)
    )
    return innerloop.unroll(problem, params, list(torch.arange(steps))).params


CONTENDERS: dict[str, Callable[[Row, Task, Params, Hyper, int], Params]] = {
    "innerloop": by_innerloop,
    "higher": by_higher,
    "TorchOpt": by_torchopt,
    "torch, differentiable=True": by_torch,
}


# -- the truth -------------------------------------------------------------------------------------


def truth(rule: Row, task: Task, params: Params, settings: Hyper, steps: int) -> Params:
    """Plain training."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    more: Hyper = {"foreach": False} if "foreach" in inspect.signature(rule.cls).parameters else {}
    optimizer = rule.cls(list(leaves.values()), **settings, **more)
    for t in range(steps):

        def closure(t: int = t) -> Any:
            optimizer.zero_grad()
            loss = task.loss(leaves, t)
            loss.backward()
            return loss

        if rule.name == "LBFGS":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return {name: p.detach() for name, p in leaves.items()}


def muon_in_float64(rule: Row, task: Task, params: Params, settings: Hyper, steps: int) -> Params:
    """Jordan et al. 2024, in float64: difference quotients of torch's bfloat16 iteration mean
    nothing."""
    now = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    buffers = {name: torch.zeros_like(p) for name, p in now.items()}
    lr, mu, decay = settings["lr"], settings["momentum"], settings["weight_decay"]
    for t in range(steps):
        for name, g in task.gradient(now, t).items():
            buffers[name] = mu * buffers[name] + (1 - mu) * g.detach()
            x = (1 - mu) * g.detach() + mu * buffers[name]
            tall = x.shape[0] > x.shape[1]
            x = (x.T if tall else x) / x.norm().clamp_min(1e-7)
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            ratio = math.sqrt(max(1, now[name].shape[0] / now[name].shape[1]))
            stepped = now[name].detach() * (1 - lr * decay) - lr * ratio * (x.T if tall else x)
            now[name] = stepped.requires_grad_()
    return {name: p.detach() for name, p in now.items()}


def slope(f: Callable[[float], float]) -> float:
    """f'(0) by the central formula of fourth order, at the step whose neighbours agree best."""
    found = [
        (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
        for h in (4e-3 / 3**k for k in range(8))
    ]
    gaps = [
        max(abs(a - b), abs(b - c)) for a, b, c in zip(found, found[1:], found[2:], strict=False)
    ]
    return found[gaps.index(min(gaps)) + 1]


# -- cells -----------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """What came out: ``right``, ``wrong`` (with the relative error), ``NaN`` or ``missing`` (with
    the reason)."""

    verdict: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.verdict} {self.detail}" if self.verdict == "wrong" else self.verdict


RIGHT = Cell("right")


def judged(found: float, expected: float, tolerance: float, floor: float = 1e-6) -> Cell:
    if not math.isfinite(found):
        return Cell("NaN")
    error = abs(found - expected) / max(abs(expected), floor)
    return RIGHT if error <= tolerance else Cell("wrong", f"{error:.1e}")


def tried(cell: Callable[[], Cell]) -> Cell:
    try:
        return cell()
    except MissingError as error:
        return Cell("missing", str(error))
    except Exception as error:  # whatever a library raises
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return Cell("missing", f"{type(error).__name__}: {first[:80]}")


def pieces(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def plain(value: Any) -> Any:
    return tuple(map(plain, value)) if isinstance(value, tuple) else float(value)


def read(settings: Hyper, name: str) -> float:
    key, _, index = name.partition(".")
    return settings[key][int(index)] if index else settings[key]


def replaced(settings: Hyper, name: str, value: Any) -> Hyper:
    key, _, index = name.partition(".")
    if not index:
        return {**settings, key: value}
    pair = tuple(value if i == int(index) else v for i, v in enumerate(settings[key]))
    # torch and higher want both entries of a pair to be tensors, or none
    return {
        **settings,
        key: tuple(torch.as_tensor(v) for v in pair) if isinstance(value, Tensor) else pair,
    }


def forward_cell(rule: Row, contender: Any) -> Cell:
    task = Task(rule)
    ours, theirs = (
        contender(rule, task, leaves(task), rule.settings, STEPS),
        truth(rule, task, task.start(), rule.settings, STEPS),
    )
    off = max(float((ours[name].detach() - p).abs().max()) for name, p in theirs.items())
    return RIGHT if off <= FORWARD else Cell("NaN" if math.isnan(off) else "wrong", f"{off:.1e}")


def leaves(task: Task) -> Params:
    return {name: p.requires_grad_() for name, p in task.start().items()}


def reference(rule: Row) -> Callable[..., Params]:
    return muon_in_float64 if rule.name == "Muon" else truth


def start_cell(rule: Row, contender: Any) -> Cell:
    task = Task(rule, smooth=True)
    params = leaves(task)
    outer = task.outer(contender(rule, task, params, rule.settings, STEPS))
    found = torch.autograd.grad(outer, list(params.values()))
    along = {name: noise(*p.shape, phase=7.0 + i) for i, (name, p) in enumerate(params.items())}

    def at(h: float) -> float:
        moved = {name: p.detach() + h * along[name] for name, p in params.items()}
        return float(task.outer(reference(rule)(rule, task, moved, rule.settings, STEPS)))

    return judged(
        sum(float((g * v).sum()) for g, v in zip(found, along.values(), strict=True)),
        slope(at),
        GRADIENT,
    )


def hyper_cell(rule: Row, contender: Any, name: str, value: float) -> Cell:
    task = Task(rule, smooth=True)
    tensor = torch.tensor(float(value), requires_grad=True)
    outer = task.outer(
        contender(rule, task, leaves(task), replaced(rule.settings, name, tensor), STEPS)
    )
    if not outer.requires_grad:
        return Cell("missing", "no gradient")
    found = torch.autograd.grad(outer, tensor, allow_unused=True)[0]
    if found is None:
        return Cell("missing", "no gradient")

    def at(h: float) -> float:
        return float(
            task.outer(
                reference(rule)(
                    rule, task, task.start(), replaced(rule.settings, name, value + h), STEPS
                )
            )
        )

    return judged(
        float(found), one_sided(at) if value == 0 else slope(at), 1e-4 if value == 0 else GRADIENT
    )


def one_sided(f: Callable[[float], float]) -> float:
    """f'(0+) where negative arguments are refused: the forward formula of fourth order."""
    h = 1e-4
    return (-25 * f(0) + 48 * f(h) - 36 * f(2 * h) + 16 * f(3 * h) - 3 * f(4 * h)) / (12 * h)


def zero_cell(rule: Row, contender: Any) -> Cell:
    """Finite where half of the gradient is exactly zero, from defaults (small eps, no decay) over
    twelve steps."""
    settings = {
        k: v
        for k, v in rule.settings.items()
        if k not in ("eps", "weight_decay", "initial_accumulator_value")
    }
    if rule.name == "SparseAdam":
        settings = {"lr": 0.05}
    task = Task(rule, dead=True)
    params = leaves(task)
    outer = task.outer(contender(rule, task, params, settings, 12))
    found = torch.autograd.grad(outer, list(params.values()))
    return RIGHT if all(bool(g.isfinite().all()) for g in found) else Cell("NaN")


class Line(NamedTuple):
    rule: Row
    contender: str
    cells: dict[str, Cell]


def measure(
    rules: Sequence[Row] = ROWS, contenders: Sequence[str] = tuple(CONTENDERS)
) -> Iterator[Line]:
    for rule in rules:
        for who in contenders:
            run = CONTENDERS[who]
            with quiet():
                cells = {"forward": tried(lambda run=run, rule=rule: forward_cell(rule, run))}  # type: ignore[misc]
                cells["start"] = tried(lambda run=run, rule=rule: start_cell(rule, run))  # type: ignore[misc]
                cells["zero gradient"] = tried(lambda run=run, rule=rule: zero_cell(rule, run))  # type: ignore[misc]
                for name in rule.hyper:
                    value = read(rule.settings, name)
                    cells[name] = tried(
                        lambda run=run, rule=rule, n=name, v=value: hyper_cell(rule, run, n, v)  # type: ignore[misc]
                    )
                for name in rule.zero:
                    cells[f"{name} = 0"] = tried(
                        lambda run=run, rule=rule, n=name: hyper_cell(rule, run, n, 0.0)  # type: ignore[misc]
                    )
            yield Line(rule, who, cells)


@contextmanager
def quiet() -> Iterator[None]:
    """In float64, without the warnings of others."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


# -- tables ----------------------------------------------------------------------------------------


def summary(lines: Sequence[Line]) -> str:
    """One line for each rule and setting: how many of the cells of each library are what."""
    whos = list(dict.fromkeys(line.contender for line in lines))
    rows = []
    for rule in dict.fromkeys(line.rule.title for line in lines):
        cells = {line.contender: line.cells for line in lines if line.rule.title == rule}
        rows.append((rule, *(_counted(cells[who].values()) for who in whos)))
    return _table(("rule", *whos), rows)


def _counted(cells: Any) -> str:
    found = list(cells)
    counts = {v: sum(c.verdict == v for c in found) for v in ("right", "wrong", "NaN", "missing")}
    if counts["right"] == len(found):
        return f"all {len(found)} right"
    if counts["missing"] == len(found):
        return "missing"
    return ", ".join(
        f"**{n} {v}**" if v in ("wrong", "NaN") else f"{n} {v}" for v, n in counts.items() if n
    )


def details(lines: Sequence[Line]) -> str:
    """Every cell that is not right."""
    rows = []
    for line in lines:
        if all(c.verdict == "missing" for c in line.cells.values()):
            rows.append(
                (
                    line.rule.title,
                    line.contender,
                    "everything",
                    "missing",
                    line.cells["forward"].detail,
                )
            )
            continue
        rows += [
            (line.rule.title, line.contender, what, c.verdict, c.detail)
            for what, c in line.cells.items()
            if c.verdict != "right"
        ]
    return _table(("rule", "library", "cell", "verdict", "relative error, or why"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *escaped))


BEGIN, END = "<!-- begin table -->", "<!-- end table -->"


def section(lines: Sequence[Line]) -> str:
    facts = machine.describe()
    told = "; ".join(f"{key} {value}" for key, value in facts.items())
    ours = [cell for line in lines if line.contender == "innerloop" for cell in line.cells.values()]
    count = f"innerloop: {sum(c.verdict == 'right' for c in ours)} of {len(ours)} cells right."
    rest = f"## Every cell that is not right\n\n{details(lines)}"
    return f"{told}. {count}\n\n{summary(lines)}\n\n{rest}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if a cell of ours is not right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers", description=__doc__)
    parser.add_argument("--only", metavar="SGD,Adam", help="some rules")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.md", help="rewrite the tables between its marks"
    )
    arguments = parser.parse_args(argv)
    wanted = arguments.only.split(",") if arguments.only else None
    torch.set_num_threads(1)
    lines = list(measure([rule for rule in ROWS if wanted is None or rule.name in wanted]))
    text = section(lines)
    print(text)
    if arguments.out:
        page = arguments.out.read_text(encoding="utf-8")
        start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
        arguments.out.write_text(f"{page[:start]}\n\n{text}\n\n{page[stop:]}", encoding="utf-8")
    return int(
        any(
            c.verdict != "right"
            for line in lines
            if line.contender == "innerloop"
            for c in line.cells.values()
        )
    )


if __name__ == "__main__":
    sys.exit(main())
