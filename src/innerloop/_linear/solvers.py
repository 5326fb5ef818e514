r"""Solvers of linear systems that are known by their products.

A solver is handed :math:`v \mapsto Av` on pytrees. Inside, a pytree is one flat vector, and every
decision is taken task by task, so that a solver runs under ``torch.func.vmap`` as well: the tasks
that are finished wait for the rest.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from innerloop._utils import torch_private, tree
from innerloop._utils.arguments import check_fields, check_function
from innerloop.errors import (
    IndefiniteSystemError,
    InvalidInputError,
    SingularSystemError,
    SolverError,
    SolverNotConvergedError,
)

T = TypeVar("T")
Product = Callable[[Tensor], Tensor]
"""A matrix times a vector."""

_vjp: Any = torch.func.vjp
_DENSE_LIMIT = 20_000
"""The largest number of unknowns for which `Dense` forms a matrix (3.2 GB in float64)."""
_REFINEMENTS = 4
"""How often a solution is improved by solving for what is left of the right-hand side."""


class Matrix:
    """A square matrix on flat vectors.

    Args:
        product: A times a vector.
        transposed: the transpose of A times a vector.
    """

    def __init__(self, product: Product, transposed: Product) -> None:
        self._product = product
        self._transposed = transposed
        self.size: Tensor | float = 0.0
        """The largest factor by which a product has stretched a vector."""

    def apply(self, vector: Tensor) -> Tensor:
        """Return A times a vector."""
        product = self._product(vector)
        before, after = length(vector), length(product)
        _check_finite(after)
        ratio = _divided(after, before, before > 0)
        self.size = torch.maximum(ratio, torch.as_tensor(self.size, dtype=ratio.dtype))
        return product

    def apply_transposed(self, vector: Tensor) -> Tensor:
        """Return the transpose of A times a vector."""
        return self._transposed(vector)


class Solved(NamedTuple):
    r"""What a solver returns, and what ``report`` is told.

    Attributes:
        value: the solution, a pytree like the right-hand side; None in a report.
        iterations: products with the matrix that the solution took, a 0-dim tensor.
        residual: :math:`\lVert b - Ax \rVert / \lVert b \rVert`, a 0-dim tensor.

    Under ``torch.func.vmap`` there is one number for each task.
    """

    value: Any
    iterations: Tensor
    residual: Tensor


@dataclasses.dataclass(frozen=True, repr=False)
class Solver(abc.ABC):
    r"""A way of solving a linear system :math:`Ax = b`, given by the products :math:`v \mapsto Av`.

    A solver of your own is a frozen dataclass with `run` and `limit`.

    Args:
        tolerance: the largest relative residual, :math:`\lVert b - Ax \rVert / \lVert b \rVert`. It
            is measured on the result, not taken from a recursion. The relative error of x is at
            most the condition number of A times as large. None: the precision to the power 0.7,
            about 1e-11 in float64 and 1e-5 in float32; or what rounding alone leaves, if that is
            more, up to the square root of the precision (1e-8 and 3e-4).
        max_iterations: the most products with A; None: see the class.
        must_converge: True raises where the tolerance was not reached. False returns what was
            reached, an approximation: ``report`` says how far it came.
        report: called with a `Solved` without a value after each system, in backward passes too.
    """

    tolerance: float | None = dataclasses.field(default=None, kw_only=True)
    max_iterations: int | None = dataclasses.field(default=None, kw_only=True)
    must_converge: bool = dataclasses.field(default=True, kw_only=True)
    report: Callable[[Solved], object] | None = dataclasses.field(
        default=None, kw_only=True, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Check what the fields hold; a class with checks of its own calls this first."""
        check_fields(self)
        if self.report is not None:
            check_function("report", self.report, "write a function report(solved), or None")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise InvalidInputError(
                f"tolerance={self.tolerance!r}: write a relative residual, 1e-8 for example"
            )
        if self.max_iterations is not None and (
            not isinstance(self.max_iterations, int) or self.max_iterations < 1
        ):
            raise InvalidInputError(
                f"max_iterations={self.max_iterations!r}: write a number of products, 1 or more"
            )

    def __repr__(self) -> str:
        """Return the call that makes this solver."""
        package = "solvers." if type(self).__module__ == __name__ else ""
        return f"{package}{type(self).__name__}({changed_fields(self)})"

    @abc.abstractmethod
    def run(
        self, matrix: Matrix, vector: Tensor, goal: Tensor, limit: int
    ) -> tuple[Tensor, Tensor]:
        """Return ``(x, iterations)``, where x solves the system as well as it may.

        Args:
            matrix: the matrix, on vectors of shape ``[n]``.
            vector: the right-hand side, of shape ``[n]``.
            goal: the length of the residual at which to stop.
            limit: the most iterations.

        Raises:
            SolverError: the matrix is not of the kind that the solver takes.
        """

    def limit(self, size: int) -> int:
        """Return the most products with A for ``size`` unknowns."""
        return self.max_iterations or max(10, min(2 * size, 1000))

    def __call__(
        self,
        operator: Callable[[T], T],
        vector: T,
        transpose: Callable[[T], T] | None = None,
    ) -> Solved:
        """Solve ``operator(x) = vector``.

        Args:
            operator: a linear function of a pytree of tensors, to one of the same shapes.
            vector: the right-hand side.
            transpose: the transposed operator, which `NormalCG` needs; None: it is found by
                differentiating ``operator``.

        Raises:
            SolverError: the system is singular, of the wrong kind, or was not solved.
        """
        leaves = tree.leaves(vector)
        places = [i for i, leaf in enumerate(leaves) if tree.differentiable(leaf)]
        flat = Flat([leaves[i] for i in places])

        def flattened(function: Callable[[T], T]) -> Product:
            def product(v: Tensor) -> Tensor:
                filled = tree.put(leaves, places, flat.parts(v))
                found = tree.leaves(function(tree.with_leaves(vector, filled)))
                return flat.vector([found[i] for i in places])

            return product

        apply = flattened(operator)
        matrix = Matrix(
            apply, transposed(apply, flat) if transpose is None else flattened(transpose)
        )
        solved = self.solve(matrix, flat.vector([leaves[i] for i in places]))
        value = tree.with_leaves(vector, tree.put(leaves, places, flat.parts(solved.value)))
        return solved._replace(value=value)

    def solve(self, matrix: Matrix, vector: Tensor) -> Solved:
        """Solve a system on flat vectors, and measure how well it is solved.

        What is left of the right-hand side is solved for again, as long as that helps: the residual
        in the recursion of an iterative method drifts away from the true one, and an LU
        decomposition loses digits.
        """
        size = norm(vector)
        _check_finite(size)
        # Of length 1, so that no square of what follows is too small to be a number.
        vector = vector / torch.where(size > 0, size, torch.ones_like(size))
        begin = length(vector)
        eps = torch.finfo(vector.dtype).eps
        tolerance = eps**0.7 if self.tolerance is None else self.tolerance
        goal, left = begin * tolerance, self.limit(len(vector))
        x, rest = torch.zeros_like(vector), vector
        iterations = torch.zeros_like(size, dtype=torch.int64)
        for k in range(_REFINEMENTS):
            before = length(rest)
            step, count = self.run(matrix, rest, goal, left)
            candidate = x + step
            remaining = vector - matrix.apply(candidate)
            # A task for which a refinement did not help keeps what it had.
            better = (length(remaining) < before) | (k == 0)
            x, rest = torch.where(better, candidate, x), torch.where(better, remaining, rest)
            iterations = iterations + count
            left -= int(torch_private.innermost(count).max())
            after = length(rest)
            if self.tolerance is None:
                # Rounding alone leaves so much; where it is more than that, digits are lost.
                floor = 32 * eps * matrix.size * length(x)
                goal = torch.maximum(goal, torch.minimum(floor, eps**0.5 * begin))
            if left < 1 or not holds((after > goal) & (after < before / 2)):
                break
        residual, x = length(rest), x * size
        solved = Solved(x, iterations, residual)
        if self.report is not None:
            innermost = torch_private.innermost
            self.report(Solved(None, innermost(iterations), innermost(residual)))
        _check_finite(residual)
        if self.must_converge and not everywhere(residual <= goal):
            raise self.not_converged(solved, tolerance, len(vector))
        return solved

    def not_converged(self, solved: Solved, tolerance: float, size: int) -> SolverNotConvergedError:
        """Return the error for a system that was not solved."""
        worst = torch_private.innermost(solved.residual).max().item()
        count = int(torch_private.innermost(solved.iterations).max())
        return SolverNotConvergedError(
            f"{self!r} stopped after {count} iterations at a relative residual of {worst:.1e}, "
            f"with {size} unknowns; it should be {tolerance:.1e}: {self.advice()}. "
            "must_converge=False takes the approximation as it is"
        )

    def advice(self) -> str:
        """Say what to write where the tolerance was not reached."""
        return (
            f"raise max_iterations (now {self.max_iterations}) or the tolerance, add a term to the "
            "inner loss that makes it more convex, or use solvers.Dense() for few unknowns"
        )


def changed_fields(instance: Any) -> str:
    """Return the arguments that make a dataclass, without those that have their default."""
    fields = [(f, getattr(instance, f.name)) for f in dataclasses.fields(instance) if f.repr]
    return ", ".join(f"{f.name}={value!r}" for f, value in fields if value != f.default)


class Flat:
    """Lists of tensors as one vector.

    Args:
        like: tensors whose shapes and dtypes the parts have. A complex number counts as two real
            ones, in which its derivatives are linear.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        if not like:
            raise InvalidInputError(
                "the linear system has no unknowns: nothing in it is a floating-point tensor"
            )
        self.like = list(like)
        self.real = [torch.view_as_real(x) if x.is_complex() else x for x in self.like]
        self.dtype = self.real[0].dtype
        for x in self.real[1:]:
            self.dtype = torch.promote_types(self.dtype, x.dtype)

    def vector(self, parts: Sequence[Tensor]) -> Tensor:
        """Return ``parts`` one after the other."""
        for part, x in zip(parts, self.like, strict=True):
            if not isinstance(part, Tensor) or part.shape != x.shape:
                shape = tuple(part.shape) if isinstance(part, Tensor) else part
                raise InvalidInputError(
                    f"a product with the matrix has a part of shape {shape}, where the vector has "
                    f"{tuple(x.shape)}: the matrix must be square"
                )
        # The factor gives the gradient memory of its own: a complex view begins at an even place.
        real = [torch.view_as_real(p.resolve_conj()) * 1 if p.is_complex() else p for p in parts]
        device = self.real[0].device
        return torch.cat([p.to(device, self.dtype).reshape(-1) for p in real])

    def parts(self, vector: Tensor) -> list[Tensor]:
        """Return the parts of ``vector``."""
        found, begin = [], 0
        for x, real in zip(self.like, self.real, strict=True):
            part = vector[begin : begin + real.numel()].reshape(real.shape)
            part = part.to(x.device, real.dtype)
            # Not view_as_complex, for which a part would have to begin at an even place.
            found.append(torch.complex(part[..., 0], part[..., 1]) if x.is_complex() else part)
            begin += real.numel()
        return found


def transposed(apply: Product, flat: Flat) -> Product:
    """Return the transpose of a linear function, which is its own derivative."""
    pull: list[Callable[[Tensor], tuple[Tensor]]] = []

    def apply_transposed(v: Tensor) -> Tensor:
        if not pull:
            count = sum(x.numel() for x in flat.real)
            pull.append(_vjp(apply, torch.zeros(count, dtype=v.dtype, device=v.device))[1])
        return pull[0](v)[0]

    return apply_transposed


length = torch.linalg.vector_norm


def norm(v: Tensor) -> Tensor:
    """Return the length of a vector, without overflow or underflow of its square."""
    largest = v.abs().max() if v.numel() else v.new_zeros(())
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return scale * (v / scale).square().sum().sqrt()


def holds(condition: Tensor) -> bool:
    """True if a condition holds for one task at least."""
    return bool(torch_private.innermost(condition).any())


def everywhere(condition: Tensor) -> bool:
    """True if a condition holds for every task."""
    return bool(torch_private.innermost(condition).all())


def _check_finite(size: Tensor) -> None:
    """Raise if the length of a vector is NaN or infinite."""
    if not everywhere(size.isfinite()):
        raise SolverError(
            "the linear system of implicit differentiation has entries that are NaN or infinite: "
            "look at the derivative of the residual at the solution, and at the gradient that "
            "comes in"
        )


def _divided(above: Tensor, below: Tensor, where: Tensor) -> Tensor:
    """Return a quotient, and zero where it is not wanted."""
    return torch.where(where, above / torch.where(where, below, torch.ones_like(below)), 0.0)


@dataclasses.dataclass(frozen=True, repr=False)
class CG(Solver):
    r"""Conjugate gradients (Hestenes & Stiefel, 1952), for symmetric positive definite matrices.

    The Hessian of an inner loss at a strict minimum is one. The error after k iterations is at most
    :math:`2 \left(\frac{\sqrt\kappa - 1}{\sqrt\kappa + 1}\right)^k` of the first one, with
    :math:`\kappa` the condition number; n iterations are exact but for rounding.

    **Cost**: one product an iteration, and memory for four vectors. The default for
    ``max_iterations`` is 2 n, at least 10 and at most 1000.

    Raises:
        IndefiniteSystemError: a direction of negative curvature: the inner problem is not at a
            minimum.
        SingularSystemError: a direction without curvature, along which the right-hand side has a
            part.

    Example:
        >>> import torch
        >>> from innerloop.strategy import solvers
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> solved = solvers.CG()(lambda v: matrix @ v, torch.tensor([3.0, 4.0]))
        >>> solved.value.round(decimals=5), solved.iterations
        (tensor([1., 1.]), tensor(2))
    """

    def run(
        self, matrix: Matrix, vector: Tensor, goal: Tensor, limit: int
    ) -> tuple[Tensor, Tensor]:
        """Iterate until the residual of the recursion is small enough."""
        x, r = torch.zeros_like(vector), vector
        p, square = r, r.dot(r)
        largest = torch.zeros_like(square)
        count = torch.zeros_like(square, dtype=torch.int64)
        for _ in range(limit):
            active = square.sqrt() > goal
            if not holds(active):
                break
            product = matrix.apply(p)
            curvature = _divided(p.dot(product), p.dot(p), active)
            largest = torch.maximum(largest, curvature.abs())
            self._check(curvature, largest, active, len(vector))
            alpha = _divided(square, p.dot(product), active)
            x, r = x + alpha * p, r - alpha * product
            new = r.dot(r)
            p = torch.where(active, r + _divided(new, square, active) * p, p)
            square = torch.where(active, new, square)
            count = count + active
        return x, count

    def _check(self, curvature: Tensor, largest: Tensor, active: Tensor, size: int) -> None:
        """Raise unless the curvature along the direction is positive."""
        flat = curvature.abs() <= 8 * torch.finfo(curvature.dtype).eps * size**0.5 * largest
        if holds(active & flat):
            raise SingularSystemError(
                "CG met a direction without curvature: the matrix is singular, so the solution of "
                "the inner problem is not unique (more parameters than the data determine, a "
                "parameter that the loss does not use). Add a term to the inner loss that decides, "
                "hyper['l2'] * p.square().sum(), or differentiate the loop itself, "
                "strategy=innerloop.Checkpointed()"
            )
        if holds(active & (curvature < 0)):
            worst = torch_private.innermost(torch.where(active, curvature, 0.0)).min().item()
            raise IndefiniteSystemError(
                f"CG met a direction of negative curvature, {worst:.1e}: the matrix is not "
                "positive definite. The Hessian is indefinite where the inner problem is not at a "
                "minimum: train longer, or write solver=solvers.NormalCG() or solvers.GMRES(), "
                "which take any invertible matrix (a residual of your own need not be a gradient)"
            )


@dataclasses.dataclass(frozen=True, repr=False)
class NormalCG(Solver):
    r"""Conjugate gradients on the normal equations, :math:`A^\top A x = A^\top b`.

    For any invertible matrix. The condition number counts squared, so it takes more iterations
    than `GMRES` and does not grow its memory.

    **Cost**: a product with A and one with its transpose an iteration; memory for five vectors. The
    default for ``max_iterations`` is 4 n, at least 20 and at most 2000.

    Raises:
        SingularSystemError: the right-hand side has a part that no x reaches.

    Example:
        An indefinite matrix, which `CG` refuses.

        >>> import torch
        >>> from innerloop.strategy import solvers
        >>> matrix = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
        >>> solvers.NormalCG()(lambda v: matrix @ v, torch.tensor([2.0, 4.0])).value.round(
        ...     decimals=5
        ... )
        tensor([2., 1.])
    """

    def limit(self, size: int) -> int:
        """Return the most iterations for ``size`` unknowns."""
        return self.max_iterations or max(20, min(4 * size, 2000))

    def run(
        self, matrix: Matrix, vector: Tensor, goal: Tensor, limit: int
    ) -> tuple[Tensor, Tensor]:
        """Iterate until the residual is small enough, or the gradient of its square vanishes."""
        x, r = torch.zeros_like(vector), vector
        z = matrix.apply_transposed(r)
        p, square = z, z.dot(z)
        largest = torch.zeros_like(square)
        count = torch.zeros_like(square, dtype=torch.int64)
        eps = torch.finfo(vector.dtype).eps
        for _ in range(limit):
            active = length(r) > goal
            stalled = square.sqrt() <= 8 * eps * len(vector) ** 0.5 * largest * length(r)
            if holds(active & stalled):
                raise SingularSystemError(
                    "NormalCG found the closest x, and it does not solve the system: the matrix is "
                    "singular, and the right-hand side has a part that it does not reach. The "
                    "solution of the inner problem is not unique: add a term to the inner loss "
                    "that decides, hyper['l2'] * p.square().sum()"
                )
            if not holds(active):
                break
            product = matrix.apply(p)
            size = _divided(product.dot(product), p.dot(p), active)
            largest = torch.maximum(largest, size.sqrt())
            alpha = _divided(square, product.dot(product), active & (size > 0))
            x, r = x + alpha * p, r - alpha * product
            z = matrix.apply_transposed(r)
            new = z.dot(z)
            p = torch.where(active, z + _divided(new, square, active) * p, p)
            square = torch.where(active, new, square)
            count = count + active
        return x, count


@dataclasses.dataclass(frozen=True, repr=False)
class GMRES(Solver):
    r"""Generalised minimal residuals (Saad & Schultz, 1986), for any invertible matrix.

    It minimises the residual over the Krylov space, and begins anew after ``restart`` iterations.

    **Cost**: one product an iteration; memory for ``restart`` vectors, with each of which the new
    one is made orthogonal. The default for ``max_iterations`` is 2 n, at least 10 and at most 1000.

    Args:
        restart: the largest dimension of the Krylov space.

    Example:
        A matrix that is not symmetric.

        >>> import torch
        >>> from innerloop.strategy import solvers
        >>> matrix = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> solvers.GMRES()(lambda v: matrix @ v, torch.tensor([5.0, 2.0])).value.round(decimals=5)
        tensor([1., 2.])
    """

    restart: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.restart, int) or self.restart < 1:
            raise InvalidInputError(
                f"restart={self.restart!r}: write a number of vectors, 1 or more"
            )

    def run(
        self, matrix: Matrix, vector: Tensor, goal: Tensor, limit: int
    ) -> tuple[Tensor, Tensor]:
        """Run cycles of at most ``restart`` iterations."""
        x, r = torch.zeros_like(vector), vector
        count = torch.zeros_like(goal, dtype=torch.int64)
        done = 0
        while done < limit:
            before = length(r)
            active = before > goal
            if not holds(active):
                break
            step, used = self._cycle(matrix, r, goal, min(self.restart, limit - done, len(vector)))
            x = torch.where(active, x + step, x)
            count, done = count + used * active, done + used
            r = vector - matrix.apply(x)
            after = length(r)
            if not holds((after > goal) & (after < 0.999 * before)):
                break
        return x, count

    def advice(self) -> str:
        """Say what to write where the tolerance was not reached."""
        return f"raise restart (now {self.restart}) or max_iterations, or use solvers.NormalCG()"

    def _cycle(self, matrix: Matrix, r: Tensor, goal: Tensor, dimension: int) -> tuple[Tensor, int]:
        """Minimise the residual over a Krylov space; return the step and its number of products."""
        size = length(r)
        basis = [_divided(r, size.expand(r.shape), (size > 0).expand(r.shape))]
        columns: list[list[Tensor]] = []
        eps = torch.finfo(r.dtype).eps
        weights = size.new_zeros(0)
        for k in range(dimension):
            w = matrix.apply(basis[-1])
            before, column = length(w), [torch.zeros_like(size)] * (k + 1)
            # Twice is enough: one sweep leaves rounding errors of the size of what it removes.
            for _ in range(2):
                for j, q in enumerate(basis):
                    part = q.dot(w)
                    w, column[j] = w - part * q, column[j] + part
            height = length(w)
            goes_on = height > 8 * eps * before
            columns.append([*column, torch.where(goes_on, height, 0.0)])
            basis.append(
                _divided(w, height.expand(w.shape), goes_on.expand(w.shape))
            )  # zero where the space is exhausted
            weights, left = _least_squares(columns, size)
            if holds(~goes_on & (left > goal) & (left > eps**0.5 * size)):
                raise SingularSystemError(
                    "GMRES exhausted the space of the right-hand side without a solution: the "
                    "matrix is singular, so the solution of the inner problem is not unique, or "
                    "does not move smoothly. Add a term to the inner loss that decides, "
                    "hyper['l2'] * p.square().sum()"
                )
            if not holds((left > goal) & goes_on):
                break
        return sum(
            (weights[j] * basis[j] for j in range(1, len(columns))), weights[0] * basis[0]
        ), len(columns)


def _least_squares(columns: list[list[Tensor]], size: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the small problem of `GMRES`: ``(weights, length of what is left)``."""
    height = len(columns) + 1
    zero = torch.zeros_like(size)
    table = torch.stack(
        [torch.stack([*column, *[zero] * (height - len(column))]) for column in columns], 1
    )
    target = torch.stack([size, *[zero] * (height - 1)])
    weights = torch.linalg.pinv(table) @ target
    return weights, length(target - table @ weights)


@dataclasses.dataclass(frozen=True, repr=False)
class Neumann(Solver):
    r"""The Neumann series, :math:`x_K = \alpha \sum_{k=0}^{K} (I - \alpha A)^k\, b`.

    It converges where :math:`\lVert I - \alpha A \rVert < 1`: for a symmetric positive definite
    matrix, where the step is below 2 / λ, with λ the largest eigenvalue. Unrolling K + 1 steps of
    gradient descent at the solution gives the same (Lorraine et al., "Optimizing millions of
    hyperparameters by implicit differentiation", 2020). It is exact as K grows; a few terms,
    ``Neumann(step, max_iterations=5, must_converge=False)``, are an approximation that is biased
    towards the directions of large curvature.

    **Cost**: one product a term; memory for two vectors. The default for ``max_iterations`` is
    1000.

    Args:
        step: α. The default 1 is right for a fixed point: there A is I - T'.

    Example:
        >>> import torch
        >>> from innerloop.strategy import solvers
        >>> matrix = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
        >>> solvers.Neumann()(lambda v: matrix @ v, torch.tensor([3.0, 2.0])).value.round(
        ...     decimals=5
        ... )
        tensor([2., 2.])
    """

    step: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step > 0:
            raise InvalidInputError(f"step={self.step!r}: write a positive number, 0.1 for example")

    def limit(self, size: int) -> int:
        """Return the most terms."""
        return self.max_iterations or 1000

    def run(
        self, matrix: Matrix, vector: Tensor, goal: Tensor, limit: int
    ) -> tuple[Tensor, Tensor]:
        """Add terms until they are small enough."""
        x, r = torch.zeros_like(vector), vector
        begin = length(vector)
        count = torch.zeros_like(goal, dtype=torch.int64)
        for k in range(limit):
            size = length(r)
            active = size > goal
            _check_growth(self, begin, size, active, k)
            if not holds(active):
                break
            x = torch.where(active, x + self.step * r, x)
            r = torch.where(active, r - self.step * matrix.apply(r), r)
            count = count + active
        return x, count

    def advice(self) -> str:
        """Say what to write where the tolerance was not reached."""
        return (
            "take more terms (max_iterations), or another step: the series is shortest for a step "
            "of 2 / (largest + smallest eigenvalue); CG and GMRES need no step"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class FixedPoint(Solver):
    r"""Fixed-point iteration of :math:`x = x + \beta (b - Ax)`, with Anderson acceleration.

    The last ``memory`` iterates are combined so that their residual is smallest (Anderson, 1965),
    as deep-equilibrium models do (Bai et al., 2019). With ``memory=0`` it is `Neumann`. Beside
    `GMRES` it has a memory that slides instead of beginning anew.

    **Cost**: one product an iteration; memory for two vectors of each kept iterate. The default for
    ``max_iterations`` is 1000.

    Args:
        damping: β. The default 1 is right for a fixed point: there A is I - T'.
        memory: the number of earlier iterates that are combined.

    Example:
        >>> import torch
        >>> from innerloop.strategy import solvers
        >>> matrix = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
        >>> solvers.FixedPoint()(lambda v: matrix @ v, torch.tensor([3.0, 2.0])).value.round(
        ...     decimals=5
        ... )
        tensor([2., 2.])
    """

    damping: float = 1.0
    memory: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0:
            raise InvalidInputError(
                f"damping={self.damping!r}: write a positive number, 1.0 for example"
            )
        if not isinstance(self.memory, int) or self.memory < 0:
            raise InvalidInputError(
                f"memory={self.memory!r}: write a number of iterates, 0 or more"
            )

    def limit(self, size: int) -> int:
        """Return the most iterations."""
        return self.max_iterations or 1000

    def run(
        self, matrix: Matrix, vector: Tensor, goal: Tensor, limit: int
    ) -> tuple[Tensor, Tensor]:
        """Iterate until the residual is small enough."""
        x, r = torch.zeros_like(vector), vector
        begin = length(vector)
        moves: list[Tensor] = []
        changes: list[Tensor] = []
        count = torch.zeros_like(goal, dtype=torch.int64)
        for k in range(limit):
            size = length(r)
            active = size > goal
            _check_growth(self, begin, size, active, k)
            if not holds(active):
                break
            step = self.damping * r
            if changes:
                differences = torch.stack(changes, 1)
                q, upper = torch.linalg.qr(differences)
                weights = torch.linalg.pinv(upper) @ (q.T @ r)
                step = step - (torch.stack(moves, 1) + self.damping * differences) @ weights
            step = torch.where(active, step, 0.0)
            new = r - matrix.apply(step)
            kept = min(self.memory, len(vector))
            moves = [*moves, step][-kept:] if kept else []
            changes = [*changes, new - r][-kept:] if kept else []
            x, r = x + step, new
            count = count + active
        return x, count

    def advice(self) -> str:
        """Say what to write where the tolerance was not reached."""
        return "allow more iterations (max_iterations) or a larger memory, or use solvers.GMRES()"


def _check_growth(solver: Solver, begin: Tensor, size: Tensor, active: Tensor, k: int) -> None:
    """Raise if an iteration diverges, before its numbers overflow."""
    grown = active & ~(size <= 1e6 * begin)
    if not holds(grown):
        return
    ratio = torch_private.innermost(torch.where(grown, size / begin, 1.0)).max().item()
    raise SolverNotConvergedError(
        f"{solver!r} diverges: after {k} iterations the residual has grown by a factor of "
        f"{ratio:.1e}. It converges where every eigenvalue of I - step * A is below 1 in size: "
        "take a smaller step (damping), below 2 / (the largest curvature), or use solvers.CG() or "
        "solvers.GMRES(), which need none"
    )


@dataclasses.dataclass(frozen=True, repr=False)
class Dense(Solver):
    """The whole matrix, column by column, and its LU decomposition: the oracle of the other ones.

    **Cost**: n products, n² numbers of memory, and n³ operations. **When**: few unknowns, tests.
    ``max_iterations`` has no meaning here.

    Raises:
        SingularSystemError: the matrix is singular, or so near to it that fewer than three digits
            of the result would be right.

    Example:
        >>> import torch
        >>> from innerloop.strategy import solvers
        >>> matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> solvers.Dense()(lambda v: matrix @ v, torch.tensor([3.0, 7.0])).value.round(decimals=5)
        tensor([1., 1.])
    """

    def limit(self, size: int) -> int:
        """Return the number of products: one for each unknown."""
        return size

    def run(
        self, matrix: Matrix, vector: Tensor, goal: Tensor, limit: int
    ) -> tuple[Tensor, Tensor]:
        """Form the matrix and solve the system."""
        n = len(vector)
        if n > _DENSE_LIMIT:
            raise InvalidInputError(
                f"solvers.Dense() would form a matrix of {n} times {n} numbers: use solvers.CG() "
                "or solvers.GMRES()"
            )
        unit = torch.eye(n, dtype=vector.dtype, device=vector.device)
        table = torch.stack([matrix.apply(column) for column in unit], 1)
        x, condition = solved_densely(table, vector)
        if not everywhere(condition * torch.finfo(vector.dtype).eps < 1e-3):
            worst = torch_private.innermost(condition).max().item()
            raise SingularSystemError(
                f"the matrix of {n} times {n} is singular (condition number {worst:.0e}): the "
                "solution of the inner problem is not unique (more parameters than the data "
                "determine, a parameter that the loss does not use). Add a term to the inner loss "
                "that decides, hyper['l2'] * p.square().sum()"
            )
        return x, torch.full_like(goal, n, dtype=torch.int64)


def solved_densely(table: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Solve a system, and return its condition number in the 1-norm, infinite if singular."""
    inverse, info = torch.linalg.inv_ex(table)
    x = torch.linalg.solve_ex(table, vector)[0]
    size, back = (m.abs().sum(0).max() for m in (table, inverse))
    condition = size * back
    regular = (info == 0) & condition.isfinite()
    return x, torch.where(regular, condition, torch.inf)
