"""``check_metagradient``: autograd against finite differences, in float64."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from innerloop._carry import Carry
from innerloop._inner_gradient.loss import check_loss
from innerloop._problem import Problem
from innerloop._types import HyperTree, Params
from innerloop._unroll import unroll
from innerloop._utils import torch_private, tree
from innerloop._utils.arguments import check_function, check_seed, names_in
from innerloop._utils.differences import derivative
from innerloop._utils.random_state import RandomState
from innerloop._utils.text_table import table
from innerloop.errors import InnerLoopError, InvalidInputError, MetaGradientError
from innerloop.strategy._base import Strategy
from innerloop.strategy._store_all import StoreAll

WHOLE, CONSTANT = "whole run", "detached values constant"


class Comparison(NamedTuple):
    """One directional derivative, computed in two ways.

    Attributes:
        input: the tensor that is moved.
        autograd: its derivative by autograd.
        finite: its derivative by finite differences.
        uncertainty: by how much two of the finite differences differ.
        ok: True if both derivatives agree.
        hidden: True if the rounding of the loss is larger than the difference that would count.
        kink: the slopes to the left and to the right, where they differ: there is no derivative.
            None where there is one.
    """

    input: str
    autograd: float
    finite: float
    uncertainty: float
    ok: bool
    hidden: bool = False
    kink: tuple[float, float] | None = None


class Report(NamedTuple):
    """The result of `check_metagradient`; prints as a table.

    Attributes:
        comparisons: one for each input tensor and direction.
        step: the relative step of the finite differences.
        reading: of what autograd gives the derivative, as far as it was found out: ``"whole run"``,
            ``"detached values constant"``, or ``""``, neither.
    """

    comparisons: tuple[Comparison, ...]
    step: float
    reading: str = WHOLE

    @property
    def ok(self) -> bool:
        """True if all agree."""
        return all(c.ok for c in self.comparisons)

    @property
    def wrong(self) -> list[str]:
        """Inputs whose gradient disagrees."""
        return list(dict.fromkeys(c.input for c in self.comparisons if not c.ok))

    def __str__(self) -> str:
        shown = table(
            [_cells(c) for c in self.comparisons],
            header=["input", "autograd", "finite diff.", "difference", "uncertainty", ""],
            align="<>>>>",
        )
        reading = f"; autograd: {self.reading}" if self.reading else ""
        return (
            f"{shown}\n(directional derivatives, float64, relative step {self.step:.1e}{reading})"
        )


def _cells(c: Comparison) -> list[str]:
    difference = abs(c.autograd - c.finite)
    verdict = "" if c.ok else f"<-- {_verdict(c)}"
    numbers = [f"{c.autograd:.8g}", f"{c.finite:.8g}", f"{difference:.1e}", f"{c.uncertainty:.1e}"]
    return [c.input, *numbers, verdict]


def check_metagradient(
    outer_fn: Callable[..., Any],
    inputs: HyperTree | nn.Module | Problem,
    params: Params | Carry | None = None,
    batches: object = None,
    *,
    hyper: HyperTree = None,
    steps: int | None = None,
    strategy: Strategy | None = None,
    wrt: str | Sequence[str] = ("params", "hyper"),
    directions: int = 3,
    step: float = 1e-3,
    rtol: float = 1e-6,
    seed: int = 0,
    raises: bool = True,
) -> Report:
    r"""Compare the gradient of ``outer_fn`` with finite differences, and raise if they disagree.

    For each input tensor x and random unit directions v, :math:`\langle\nabla f, v\rangle` is
    compared with the four-point formula

    .. math::
        \frac{8\,[f(x + hv) - f(x - hv)] - [f(x + 2hv) - f(x - 2hv)]}{12 h}, \qquad
        \text{error } O(h^4 f^{(5)}) + O(\varepsilon f / h).

    In float64 the two errors balance near :math:`h = \varepsilon^{1/5} \approx 10^{-3}` (relative
    to the size of x), where about twelve digits are left. It is evaluated at h, h/2 and h/4, and
    the two neighbours that agree best are taken; their difference is the uncertainty. Where the
    slopes to the left and to the right differ, and do not approach each other as h shrinks, there
    is a kink and no derivative; where no two agree, a kink is near, or float32 in the middle. Both
    are reported as failures too.

    Finite differences are those of the whole run: what ``outer_fn`` or an inner loss detaches
    (``detach``, ``no_grad``, ``.data``) moves with the inputs. A gradient in which it is constant
    disagrees. It is then compared with the run in which these values are held where they were, and
    the error says if that is the derivative which autograd gives. ``Problem(targets=...)`` computes
    a target that is constant for the inner gradient only, and follows the whole run.

    Args:
        outer_fn: ``outer_fn(inputs) -> scalar``, with the whole inner loop in it.
        inputs: a tensor, a pytree of tensors, or an ``nn.Module`` (its parameters are perturbed).
            It is not changed: ``outer_fn`` gets float64 copies, and float32 tensors that it
            captures are promoted where they meet them. An optimizer over a module's parameters must
            be made inside ``outer_fn``. Or a `Problem`: then ``outer_fn(traj, hyper)`` is the
            outer loss behind its loop, as in `metagradient`.
        params, batches, hyper, steps, strategy, wrt: of a `Problem`, as in `metagradient`; data in
            float32 are promoted where they meet the parameters.
        directions: random directions for each input tensor.
        step: h, relative to the root mean square of x (at least .01).
        rtol: allowed relative difference.
        seed: of the directions.
        raises: False returns the report of a gradient that is wrong as well.

    Returns:
        A `Report`; ``print`` shows it as a table.

    Raises:
        MetaGradientError: with that table, which marks the inputs that disagree. It is an
            ``AssertionError``, so in a test the call alone is enough, and pytest shows the table.
        InvalidInputError: ``outer_fn`` returns no scalar, or not the same one twice.

    Cost:
        8 evaluations for each direction and input tensor, and 8 more for each that disagrees.

    Example:
        >>> import torch, innerloop
        >>> report = innerloop.check_metagradient(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
        >>> report.ok
        True
        >>> innerloop.check_metagradient(lambda x: (x.detach() * x).sum(), torch.tensor([1.0, 2.0]))
        Traceback (most recent call last):
            ...
        innerloop.errors.MetaGradientError: autograd and finite differences disagree for input:
        ...

        The rate of two steps on w²/2, from w = 2: w₂ = (1 - lr)² w, and dw₂/dlr = -2 (1 - lr) w.

        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2,
        ...     innerloop.optim.sgd(),
        ...     optimizer_hyper=("lr",),
        ... )
        >>> start, rate = {"w": torch.tensor(2.0)}, {"lr": torch.tensor(0.5)}
        >>> report = innerloop.check_metagradient(
        ...     lambda traj, hyper: traj.params["w"],
        ...     problem,
        ...     start,
        ...     hyper=rate,
        ...     steps=2,
        ...     wrt="hyper",
        ... )
        >>> round(abs(report.comparisons[0].finite), 9)
        2.0
    """
    check_function("outer_fn", outer_fn, "write a function that returns a scalar")
    check_seed("seed", seed)
    if isinstance(inputs, Problem):
        outer_fn, inputs = _of_problem(
            outer_fn, inputs, params, batches, hyper, steps, strategy, wrt
        )
    elif params is not None or batches is not None or hyper is not None:
        raise InvalidInputError(
            f"params, batches and hyper belong to a Problem, and inputs is a "
            f"{type(inputs).__name__}: write check_metagradient(outer, problem, params, batches)"
        )
    evaluate = _Evaluation(outer_fn, inputs)
    values = evaluate.values
    generator = torch.Generator().manual_seed(seed)
    value, grads = evaluate.gradient()
    comparisons = []
    reading = WHOLE
    constant = _Frozen(evaluate)
    for i, (name, x) in enumerate(zip(evaluate.names, values, strict=True)):
        if not x.numel():
            continue
        scale = max(0.01, float(x.detach().abs().square().mean().sqrt()))
        for _ in range(directions if x.numel() > 1 else 1):
            v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            v = v / v.norm() * (x.numel() ** 0.5)
            exact = float((grads[i] * v).sum())
            noise = 1e-15 * abs(value) / (step * scale)

            def compared(
                shifted: Callable[[int, Tensor], float],
                name: str = name,
                i: int = i,
                v: Tensor = v,
                h: float = step * scale,
                exact: float = exact,
                noise: float = noise,
            ) -> Comparison:
                # Neighbouring steps share points.
                along = functools.cache(lambda h: shifted(i, h * v))
                finite, uncertainty = derivative(along, h)
                close = rtol * max(abs(exact), abs(finite))
                allowed = close + 100 * noise
                hidden = 100 * noise > 1e-6 and abs(exact - finite) > close
                kink = _kink(along, value, h, close + 1000 * noise)
                ok = abs(exact - finite) <= allowed and uncertainty <= 10 * allowed and not hidden
                return Comparison(
                    name, exact, finite, uncertainty, ok and kink is None, hidden, kink
                )

            comparisons.append(compared(evaluate.shifted))
            if not comparisons[-1].ok and reading:
                reading = CONSTANT if constant.agrees(compared) else ""
    report = Report(tuple(comparisons), step, reading)
    if raises and not report.ok:
        raise MetaGradientError(
            f"autograd and finite differences disagree for {', '.join(report.wrong)}:\n{report}"
            f"{_READINGS if reading == CONSTANT else ''}"
        )
    return report


def _of_problem(
    outer: Callable[..., Any],
    problem: Problem,
    params: Params | Carry | None,
    batches: object,
    hyper: HyperTree,
    steps: int | None,
    strategy: Strategy | None,
    wrt: str | Sequence[str],
) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """Return the outer loss behind a loop as a function of its inputs, and these."""
    names = names_in(wrt)
    data = list(batches) if hasattr(batches, "__next__") else batches  # type: ignore[call-overload]
    # A replay in the backward pass runs outside of the mode that promotes what is met.
    data = _doubled(data)
    start = problem.init(params)
    start = start._replace(
        params={n: p.detach() for n, p in start.params.items()},
        buffers=tree.map_tensors(_to_double, start.buffers),
    )
    given: dict[str, Any] = {"params": start.params, "hyper": hyper}

    def outer_fn(inputs: dict[str, Any]) -> Any:
        at = {"params": tree.map_tensors(_to_double, start.params), "hyper": hyper, **inputs}
        # The state of the optimizer follows the parameters.
        carry = problem.init(at["params"])._replace(buffers=start.buffers)
        if isinstance(params, Carry):
            state = tree.map_tensors(_to_double, start.optimizer_state)
            carry = start._replace(params=at["params"], optimizer_state=state)
        traj = unroll(
            problem, carry, data, hyper=at["hyper"], strategy=strategy or StoreAll(), steps=steps
        )
        found = outer(traj, at["hyper"])
        return found[0] if isinstance(found, tuple) else found

    return outer_fn, {n: given[n] for n in names if tree.leaves(given[n])}


def _doubled(batches: object) -> object:
    """Return data in float64."""
    if callable(batches) and not isinstance(batches, Tensor):
        draw = batches
        return lambda *given: tree.map_tensors(_to_double, draw(*given))
    return tree.map_tensors(_to_double, batches)


def _to_double(x: Tensor) -> Tensor:
    return x.double() if tree.differentiable(x) else x


def _kink(
    f: Callable[[float], float], value: float, h: float, allowed: float
) -> tuple[float, float] | None:
    """Return the slopes of f to the left and to the right of 0, if there is a kink.

    The one-sided formulas of second order differ by O(h³) where f is smooth. At a kink each goes to
    a limit of its own.
    """

    def slopes(s: float) -> tuple[float, float]:
        left = (3 * value - 4 * f(-s) + f(-2 * s)) / (2 * s)
        return left, (-3 * value + 4 * f(s) - f(2 * s)) / (2 * s)

    wide, (left, right) = slopes(h), slopes(h / 4)
    jump = abs(right - left)
    if jump <= max(allowed, 1e-6 * max(abs(left), abs(right))):
        return None
    # Each slope settles, which it does not where the loss is rounded.
    moved = max(abs(left - wide[0]), abs(right - wide[1]))
    return (left, right) if moved < 0.3 * jump else None


_READINGS = (
    "\nThey agree if what the code detaches (detach, no_grad, .data) keeps its value: autograd "
    "gives the derivative in which that is constant, finite differences that of the whole run. If "
    "you mean the first, the gradient is right. If you mean the second, do not detach in the outer "
    "loss, and compute what an inner loss holds constant by Problem(loss, optimizer, targets=fn), "
    "or outside of the inner loss"
)


class _Evaluation:
    """``outer_fn`` at float64 copies of the inputs, with the same random numbers every time."""

    def __init__(self, outer_fn: Callable[[Any], Tensor], inputs: HyperTree | nn.Module) -> None:
        self._outer_fn = outer_fn
        self._inputs = inputs
        self._random = RandomState.now()
        named = (
            list(inputs.named_parameters())
            if isinstance(inputs, nn.Module)
            else list(tree.named_tensors(inputs))
        )
        for name, t in named:
            if t.is_complex():
                raise InvalidInputError(
                    f"{name} is complex: pass its real and imaginary parts, "
                    "torch.view_as_real(tensor)"
                )
        chosen = [
            (n, t)
            for n, t in named
            if t.is_floating_point() and (t.requires_grad or not isinstance(inputs, nn.Module))
        ]
        if not chosen:
            raise InvalidInputError(
                "inputs hold no floating-point tensor (or, of a module, none that requires grad)"
            )
        self.names = [name for name, _ in chosen]
        self._originals = [t for _, t in chosen]
        self.values = [t.detach().double() for t in self._originals]
        first, second = (self._value(self.values).item() for _ in range(2))
        if first != second:
            raise InvalidInputError(
                f"outer_fn returned {first} and then {second} for the same inputs: it must be a "
                "function of its inputs (random numbers "
                "from torch's default generator are replayed; other state must be made inside "
                "outer_fn)"
            )

    def gradient(self) -> tuple[float, list[Tensor]]:
        """Return the value and its gradient by each input."""
        leaves = [v.clone().requires_grad_() for v in self.values]
        loss = self._value(leaves)
        if not loss.requires_grad:
            raise MetaGradientError(
                "the outer loss does not depend on the inputs through the graph: it was detached "
                "somewhere"
            )
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return loss.item(), [
            torch.zeros_like(v) if g is None else g for g, v in zip(grads, leaves, strict=True)
        ]

    def shifted(
        self, i: int, shift: Tensor, around: AbstractContextManager[object] | None = None
    ) -> float:
        """Return the value with input ``i`` moved by ``shift``, evaluated inside ``around``."""
        moved = [v + shift if k == i else v for k, v in enumerate(self.values)]
        return self._value(moved, around).item()

    def _value(
        self, values: Sequence[Tensor], around: AbstractContextManager[object] | None = None
    ) -> Float[Tensor, ""]:
        after = RandomState.now()
        try:
            if self._random is not None:
                self._random.restore()
            given = self._with(values)
            with torch.enable_grad(), PromoteToFloat64(), around or nullcontext():
                return check_loss(self._outer_fn(given), "what outer_fn(inputs) returns")
        finally:
            if after is not None:
                after.restore()

    def _with(self, values: Sequence[Tensor]) -> HyperTree | nn.Module:
        """Return the inputs with ``values`` in them.

        Each requires grad, so that an inner loop trains it as it would the original.
        """
        values = [v if v.requires_grad else v.clone().requires_grad_() for v in values]
        if isinstance(self._inputs, nn.Module):
            return _with_parameters(copy.deepcopy(self._inputs).double(), self.names, values)
        by_id = {id(t): v for t, v in zip(self._originals, values, strict=True)}
        return tree.map_tensors(lambda t: by_id.get(id(t), t), self._inputs)


def _with_parameters(
    module: nn.Module, names: Sequence[str], values: Sequence[Tensor]
) -> nn.Module:
    """Return ``module`` with ``values`` as its parameters.

    They are connected to the graph of ``values``, which a ``Parameter`` would cut.
    """
    own = dict(module.named_parameters())
    by_id = {id(own[name]): value for name, value in zip(names, values, strict=True)}
    for submodule in module.modules():
        table = torch_private.parameter_table(submodule)
        table.update({key: by_id[id(p)] for key, p in table.items() if id(p) in by_id})
    return module


class _Frozen:
    """The evaluation in which what the user's code detaches keeps the value it has at the inputs.

    Args:
        evaluate: the evaluation.
    """

    def __init__(self, evaluate: _Evaluation) -> None:
        self._evaluate = evaluate
        self._values: list[Tensor] | None = None

    def agrees(self, compared: Callable[[Callable[[int, Tensor], float]], Comparison]) -> bool:
        """True if a gradient is the derivative of this evaluation, where that can be told."""
        try:
            if self._values is None:
                recorder = _Detached()
                self._evaluate.shifted(0, torch.zeros(()), recorder)
                self._values = recorder.values
            return bool(self._values) and compared(self._shifted).ok
        except (RuntimeError, InnerLoopError, _OtherCourseError):
            return False

    def _shifted(self, i: int, shift: Tensor) -> float:
        return self._evaluate.shifted(i, shift, _Detached(self._values))


class _OtherCourseError(Exception):
    """The run detaches other values than at the inputs."""


class _Detached(TorchFunctionMode):
    """A mode that notes what the user's code detaches, or puts earlier values in its place.

    Args:
        values: what to put there, in the order of the calls; None: note them.

    Attributes:
        values: what was noted.
    """

    def __init__(self, values: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.values: list[Tensor] = []
        self._given = None if values is None else iter(values)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func``, and note or replace its result if it is cut from the graph."""
        found = func(*args, **(kwargs or {}))
        cut = func in (Tensor.detach, torch_private.data_getter())
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if (
            isinstance(found, Tensor)
            and tree.differentiable(found)
            and (cut or not (torch.is_grad_enabled() or in_place))
            and _called_by_user()
        ):
            value = torch_private.innermost(found).detach()
            if self._given is None:
                self.values.append(value.clone())
                return found
            kept = next(self._given, None)
            if kept is None or kept.shape != value.shape:
                raise _OtherCourseError
            return kept.clone()
        return found


def _called_by_user() -> bool:
    """True if the function that torch is running was called by code outside of innerloop."""
    frame = inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        package = module.partition(".")[0]
        # Modes that see calls, and checkers of types, stand between the caller and torch.
        between = (__name__, "innerloop.nn._mode", "innerloop._module.edits")
        if package not in ("torch", "jaxtyping") and module not in between:
            return package != "innerloop"
        frame = frame.f_back
    return False


class PromoteToFloat64(TorchFunctionMode):
    """A mode in which float32 tensors are promoted where they meet float64 ones.

    Captured float32 data then do not stop the check.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` on promoted arguments."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if not in_place and name not in ("__set__", "to", "type", "copy_"):
            dtypes = {t.dtype for t in tree.tensors((args, kwargs))}
            if torch.float64 in dtypes and torch.float32 in dtypes:
                args, kwargs = tree.map_leaves(
                    lambda x: (
                        x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x
                    ),
                    (args, kwargs),
                )
        return func(*args, **kwargs)


def _verdict(c: Comparison) -> str:
    if c.kink is not None:
        left, right = c.kink
        return f"a kink: the slope is {left:.6g} to the left and {right:.6g} to the right"
    if c.hidden:
        return (
            "cannot tell: the loss is so large that its rounding hides the slope; subtract a "
            "constant from it"
        )
    if c.uncertainty > 1e-3 * max(abs(c.autograd), abs(c.finite)):
        return "finite differences do not settle: a kink nearby, or float32 inside outer_fn"
    return "no gradient arrives" if c.autograd == 0 else "WRONG"
