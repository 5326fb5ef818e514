r"""The solution of an equation as one node of the autograd graph, differentiated implicitly.

For a solution of :math:`F(x, a) = 0`, with :math:`A = \partial F / \partial x`,

.. math::
    \dot x = -A^{-1} \frac{\partial F}{\partial a}\, \dot a, \qquad
    \bar a = -\Bigl(\frac{\partial F}{\partial a}\Bigr)^{\!\top} u
    \quad\text{with}\quad A^\top u = \bar x

The linear system is an equation like any other: its unknown is u, its arguments are x, a and the
right-hand side. So its solution is such a node, too, and derivatives of every order follow from
this one rule.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from innerloop._inner_gradient.torch_errors import explain
from innerloop._linear.solvers import Flat, Matrix, Product, Solver
from innerloop._utils import tree
from innerloop._utils.execution import Mode, may_call_autograd, mode
from innerloop._utils.finite import have_values
from innerloop.errors import InnerLoopError, NotDifferentiableError

Values = list[Tensor]
Function = Callable[[Values], Values]

_vjp: Any = torch.func.vjp


def pullback(
    function: Function, at: Values, *, record: bool
) -> Callable[[Values], list[Tensor | None]]:
    """Return the transposed derivative of ``function``, a linear function of cotangents.

    In eager code its result has None for what the function does not depend on.

    Args:
        function: of a list of tensors, to a list of tensors.
        at: where to differentiate it.
        record: True if the result will be differentiated. Under ``torch.func`` it always may be.
    """
    if not may_call_autograd():
        _, transposed = _vjp(function, at)
        return lambda cotangents: list(transposed(cotangents)[0])
    with torch.enable_grad():
        ends = _ends(at, record)
        found = function(ends)

    return lambda cotangents: list(_pulled(found, ends, cotangents, record))


def pushforward(function: Function, at: Values, *, record: bool) -> Function:
    """Return the derivative of ``function``, a linear function of tangents.

    It is the transpose of the pullback, so no operation needs a forward mode.

    Args:
        function: of a list of tensors, to a list of tensors.
        at: where to differentiate it.
        record: True if the result will be differentiated. Under ``torch.func`` it always may be.
    """
    if not may_call_autograd():
        found, transposed = _vjp(function, at)
        _, back = _vjp(
            lambda v: list(transposed(v)[0]),
            [torch.zeros_like(y, requires_grad=False) for y in found],
        )
        return lambda tangents: list(back(tangents)[0])
    with torch.enable_grad():
        ends = _ends(at, record)
        found = function(ends)
        zeros = [torch.zeros_like(y).requires_grad_() for y in found]
        pulled = _pulled(found, ends, zeros, record=True)

    def push(tangents: Values) -> Values:
        pairs = [(p, v) for p, v in zip(pulled, tangents, strict=True) if p is not None]
        pushed = _pulled([p for p, _ in pairs], zeros, [v for _, v in pairs], record)
        return [torch.zeros_like(z) if p is None else p for p, z in zip(pushed, zeros, strict=True)]

    return push


def _ends(at: Values, record: bool) -> Values:
    """Return aliases of ``at``, so that the derivative is the partial one."""
    return [x.view_as(x) if record and x.requires_grad else x.detach().requires_grad_() for x in at]


def _pulled(
    found: Sequence[Tensor], ends: Values, cotangents: Sequence[Tensor], record: bool
) -> Sequence[Tensor | None]:
    pairs = [(y, v) for y, v in zip(found, cotangents, strict=True) if y.requires_grad]
    if not pairs:
        return [None] * len(ends)
    with torch.enable_grad():
        return torch.autograd.grad(
            [y for y, _ in pairs],
            ends,
            [v for _, v in pairs],
            create_graph=record,
            retain_graph=True,
            allow_unused=True,
        )


class Equation(abc.ABC):
    """An equation F(x, a) = 0, whose solution is a node of the graph.

    Attributes:
        solver: of the linear systems that its derivatives need.
        symmetric: True if the derivative of F by x is a symmetric matrix.
        given: the number of tensors of the solution that come before the arguments; 0 if the
            equation computes its solution itself.
    """

    solver: Solver
    symmetric: bool
    given: int

    @abc.abstractmethod
    def residual(self, x: Values, a: Values) -> Values:
        """Return F, differentiable in everything."""

    @abc.abstractmethod
    def solution(self, tensors: Values) -> Values:
        """Return x for the inputs of the node, on constants."""

    @abc.abstractmethod
    def derivative(self, x: Values, a: Values, *, transposed: bool) -> Function:
        """Return the products with A or its transpose at a solution, on constants."""

    @abc.abstractmethod
    def product(self, x: Values, a: Values, u: Values, *, transposed: bool) -> Values:
        """Return one product with A or its transpose, differentiable in everything."""


class Residual(Equation):
    """An equation that is given by its residual, and that somebody has solved.

    Args:
        function: ``function(x, a)``, the residual; a function of its arguments.
        solver: of the linear systems.
        count: the number of tensors in x.
        symmetric: True if the residual is a gradient by x.
    """

    def __init__(
        self,
        function: Callable[[Values, Values], Values],
        solver: Solver,
        count: int,
        *,
        symmetric: bool,
    ) -> None:
        self.function = function
        self.solver = solver
        self.given = count
        self.symmetric = symmetric

    def residual(self, x: Values, a: Values) -> Values:
        return self.function(x, a)

    def solution(self, tensors: Values) -> Values:
        return [x.clone() for x in tensors[: self.given]]

    def derivative(self, x: Values, a: Values, *, transposed: bool) -> Function:
        return self._through(x, a, transposed, record=False)

    def product(self, x: Values, a: Values, u: Values, *, transposed: bool) -> Values:
        return self._through(x, a, transposed, record=True)(u)

    def _through(self, x: Values, a: Values, transposed: bool, *, record: bool) -> Function:
        def residual(x: Values) -> Values:
            return self.function(x, a)

        if not transposed and not self.symmetric:
            return pushforward(residual, x, record=record)
        pull = pullback(residual, x, record=record)
        return lambda v: [
            torch.zeros_like(y) if p is None else p for p, y in zip(pull(v), x, strict=True)
        ]


class Linear(Equation):
    """The system A u = v at a solution of another equation, or its transpose.

    The arguments are x and a of the other equation, then v.

    Args:
        of: the other equation.
        count: the number of tensors in its x.
        transposed: True for the transpose of A.
    """

    given = 0

    def __init__(self, of: Equation, count: int, *, transposed: bool) -> None:
        self.of = of
        self.count = count
        self.transposed = transposed
        self.solver = of.solver
        self.symmetric = of.symmetric

    def _split(self, a: Values) -> tuple[Values, Values, Values]:
        n = self.count
        return a[:n], a[n : len(a) - n], a[len(a) - n :]

    def residual(self, x: Values, a: Values) -> Values:
        root, arguments, v = self._split(a)
        found = self.of.product(root, arguments, x, transposed=self.transposed)
        return [p - q for p, q in zip(found, v, strict=True)]

    def solution(self, tensors: Values) -> Values:
        root, arguments, v = self._split(tensors)
        return solved(self.of, root, arguments, v, transposed=self.transposed)

    def derivative(self, x: Values, a: Values, *, transposed: bool) -> Function:
        root, arguments, _ = self._split(a)
        return self.of.derivative(root, arguments, transposed=self.transposed != transposed)

    def product(self, x: Values, a: Values, u: Values, *, transposed: bool) -> Values:
        root, arguments, _ = self._split(a)
        return self.of.product(root, arguments, u, transposed=self.transposed != transposed)


def solved(equation: Equation, x: Values, a: Values, v: Values, *, transposed: bool) -> Values:
    """Solve a system with the derivative of an equation, on constants."""
    x, a = ([t.detach() for t in values] for values in (x, a))
    flat = Flat(v)

    def product(transposed: bool) -> Product:
        known: list[Function] = []

        def apply(vector: Tensor) -> Tensor:
            if not known:
                known.append(equation.derivative(x, a, transposed=transposed))
            return flat.vector(known[0](flat.parts(vector)))

        return apply

    matrix = Matrix(product(transposed), product(not transposed))
    with _explained():
        return flat.parts(equation.solver.solve(matrix, flat.vector(v)).value)


def node(equation: Equation, tensors: Values) -> Values:
    """Return the solution of an equation as a node of the graph.

    Args:
        equation: the equation.
        tensors: the solution, as far as it is given (constants), and the arguments.
    """
    return list(_Node.apply(equation, *tensors))


@contextmanager
def _explained() -> Iterator[None]:
    """Raise errors of PyTorch as those of innerloop."""
    try:
        yield
    except InnerLoopError:
        raise
    except RuntimeError as error:
        raise explain(error) from error


class _Node(torch.autograd.Function):
    """The solution of an equation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(equation: Equation, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(equation.solution(list(tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.equation, *tensors = inputs
        ctx.count = len(output)
        kept = (*output, *tensors[ctx.equation.given :])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        equation, n = ctx.equation, ctx.count
        if mode() is Mode.EAGER and not have_values(cotangents):
            raise NotDifferentiableError(
                "torch.autograd.grad(is_grads_batched=True) does not reach through an implicit "
                "solution, whose solver looks at its numbers: write torch.func.jacrev or "
                "torch.func.vmap, or one row after the other"
            )
        record = torch.is_grad_enabled()
        # What comes in has a graph even where none is recorded.
        x, a = _parted(ctx.saved_tensors, n, record)
        first = 1 + equation.given
        wanted = [
            i
            for i, (y, needed) in enumerate(zip(a, ctx.needs_input_grad[first:], strict=True))
            if needed and tree.differentiable(y)
        ]
        row: list[Tensor | None] = [None] * (first + len(a))
        if wanted:
            with _explained():
                u = node(Linear(equation, n, transposed=True), [*x, *a, *cotangents])
                pull = pullback(_of(equation, x, a, wanted), [a[i] for i in wanted], record=record)
                row = tree.put(row, [first + i for i in wanted], pull([-y for y in u]))
        return tuple(row)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        equation, n = ctx.equation, ctx.count
        x, a = _parted(ctx.saved_tensors, n, True)
        along = tangents[1 + equation.given :]
        moved = [
            i for i, (y, v) in enumerate(zip(a, along, strict=True))
            if v is not None and tree.differentiable(y)
        ]  # fmt: skip
        if not moved:
            return tuple(torch.zeros_like(y) for y in x)
        with _explained():
            push = pushforward(_of(equation, x, a, moved), [a[i] for i in moved], record=True)
            v = push([-t for i in moved if (t := along[i]) is not None])
            return tuple(node(Linear(equation, n, transposed=False), [*x, *a, *v]))


def _parted(tensors: Sequence[Tensor], count: int, record: bool) -> tuple[Values, Values]:
    kept = [t if record else t.detach() for t in tensors]
    return kept[:count], kept[count:]


def _of(equation: Equation, x: Values, a: Values, places: list[int]) -> Function:
    """Return the residual as a function of some of its arguments."""
    return lambda values: equation.residual(x, tree.put(a, places, values))
