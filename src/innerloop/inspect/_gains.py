"""The strongest and the weakest directions of the Jacobian between two times."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from innerloop._utils.arguments import check_seed
from innerloop._utils.progress import Report, closing, reporter
from innerloop._utils.text_table import table
from innerloop.errors import CostWarning, InvalidInputError
from innerloop.inspect._plot import COLOURS, axes_of, figure_with, tidy
from innerloop.inspect._window import Inspected, Named, Window, trajectory_of, window_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXTRA = 4
"""Products after convergence, from a fresh random direction: what is repeated is found then."""


class Gains(NamedTuple):
    r"""Singular values of :math:`J = \partial\theta_t/\partial\theta_s` with their directions.

    Tensors are without a graph.

    Attributes:
        values: ``[k]``, the singular values :math:`s_i`, the largest first (or the smallest first).
        inputs: name at s -> ``[k, *shape]``, the directions :math:`v_i`: a small step along one
            of them moves the end by :math:`s_i` times its size.
        outputs: name at t -> ``[k, *shape]``, the directions :math:`u_i` into which the end moves.
        residuals: ``[k]``, :math:`\|J^T u_i - s_i v_i\|` relative to the largest singular value
            that was found; :math:`J v_i = s_i u_i` holds up to rounding.
        products: how many pairs of products with J and its transpose were taken.
        time: t.
        wrt: s; None where ``wrt`` was a mapping of tensors.
    """

    values: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    residuals: Tensor
    products: int
    time: int
    wrt: int | None

    def __repr__(self) -> str:
        earlier = "wrt" if self.wrt is None else f"params({self.wrt})"
        shown = table(
            [
                [str(i + 1), f"{float(s):.6g}", f"{float(r):.1e}", _where(self.inputs, i)]
                for i, (s, r) in enumerate(zip(self.values, self.residuals, strict=True))
            ],
            header=["", "gain", "residual", "direction, by share of its square"],
            align=">>>",
        )
        return (
            f"Gains of d params({self.time}) / d {earlier}, by {self.products} pairs of "
            f"products\n{shown}"
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the singular values; needs matplotlib (``pip install 'innerloop[plot]'``)."""
        ax = axes_of(ax, "Gains.plot")
        places = range(1, len(self.values) + 1)
        ax.plot(places, self.values.tolist(), "o-", color=COLOURS[0])
        ax.axhline(1, color="#767676", linewidth=0.8)
        if bool((self.values > 0).all()):
            ax.set_yscale("log")
        ax.set_xticks(list(places))
        tidy(ax, x="direction", y="gain", title=f"gains from step {self.wrt} to {self.time}")
        return figure_with(ax)


def _where(named: Named, i: int) -> str:
    """Say in which parameters a unit direction lies."""
    shares = sorted(((float(x[i].double().square().sum()), n) for n, x in named.items()))[::-1]
    return ", ".join(f"{n} {share:.0%}" for share, n in shares[:3] if share >= 0.01)


def gains(
    traj: Inspected,
    time: int = -1,
    wrt: int | Named = 0,
    k: int = 5,
    *,
    which: str = "largest",
    tol: float | None = None,
    max_products: int = 100,
    seed: int = 0,
    progress: bool | Report = False,
) -> Gains:
    r"""Find the singular values and directions of the Jacobian between two times.

    The Jacobian :math:`J = \partial\theta_t/\partial\theta_s` is never formed: Golub-Kahan
    bidiagonalisation (1965) with full reorthogonalisation takes products with it and with its
    transpose. A gain above 1 says that training amplifies a nudge in that direction; one near 0,
    that it forgets it.

    Args:
        traj, time, wrt: as in `jacobian`.
        k: how many.
        which: ``"largest"`` or ``"smallest"``. The smallest of a large model converge slowly.
        tol: residual, relative to the largest singular value, at which a value counts as found;
            default 1e-10 in float64, 1e-4 in float32.
        max_products: pairs of products at most; what has been found by then is returned, with its
            residuals and a warning.
        seed: of the first direction.
        progress: as in `jacobian`.

    Returns:
        A `Gains`, with fewer than k values if the Jacobian has no more.

    Raises:
        InvalidInputError: ``k`` or ``which`` does not fit.
        NotDifferentiableError: as in `jacobian`.

    Warns:
        CostWarning: ``max_products`` did not suffice.

    Cost:
        For the first few directions 10 to 30 pairs of products, each a run of the loop in forward
        mode and a backward pass; memory for two vectors of the size of the model per pair.

    Example:
        Two weights whose loss has the curvatures 1 and 3: a step multiplies them by 1 - lr and
        1 - 3 lr.

        >>> import torch, innerloop
        >>> curvature = torch.tensor([1.0, 3.0])
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: (curvature * params["w"] ** 2).sum() / 2,
        ...     innerloop.optim.sgd(lr=0.5),
        ... )
        >>> start = {"w": torch.ones(2, requires_grad=True)}
        >>> traj = innerloop.unroll(problem, start, None, steps=2)
        >>> innerloop.inspect.gains(traj, k=2).values  # 1/4 and 1/4
        tensor([0.2500, 0.2500])
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise InvalidInputError(f"k={k!r}: write a number of directions, 1 or more")
    if which not in ("largest", "smallest"):
        raise InvalidInputError(f'which={which!r}: write "largest" or "smallest"')
    traj = trajectory_of(traj)
    pulls = window_of(traj, time, wrt)
    pushes = window_of(traj, time, wrt, forward=True)
    report = reporter(progress)
    with closing(report):
        found = _Bidiagonal(pushes, pulls, seed)
        if tol is None:
            tol = 1e-10 if pulls.inputs.dtype == torch.float64 else 1e-4
        values, left, right, residuals = found.run(
            k, tol, max_products, report, smallest=which == "smallest"
        )
    if len(residuals) and float(residuals.max()) > tol:
        warnings.warn(
            f"after {found.products} pairs of products the residuals of some gains are still up "
            f"to {float(residuals.max()):.1e}, more than tol={tol:.0e}: raise max_products",
            CostWarning,
            stacklevel=2,
        )
    times = traj.steps + 1
    return Gains(
        values,
        pulls.inputs.split(right),
        pulls.outputs.split(left),
        residuals,
        found.products,
        time % times,
        wrt % times if isinstance(wrt, int) else None,
    )


class _Bidiagonal:
    """Orthonormal bases of both sides, and the matrix between them.

    With bases V of inputs and U of outputs, J V = U H and Jᵀ U = V G, where H and G are what is
    kept. They are bidiagonal up to rounding, and full where a fresh direction came in.
    """

    def __init__(self, pushes: Window, pulls: Window, seed: int) -> None:
        self._pushes, self._pulls = pushes, pulls
        check_seed("seed", seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._columns: list[Tensor] = []  # of H
        self._rows: list[Tensor] = []  # of G
        self.products = 0

    def run(
        self, k: int, tol: float, most: int, report: Report, *, smallest: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return values, left and right directions (in rows), and residuals."""
        n, m = self._pulls.inputs.size, self._pulls.outputs.size
        if not n or not m:
            empty = torch.zeros(0)
            return empty, torch.zeros(0, m), torch.zeros(0, n), empty
        more = -1
        self._add_fresh()
        while self.products < most:
            if self.products == len(self._inputs) and not self._add_fresh():
                break
            self._advance(self._inputs[self.products])
            report("products", self.products, min(most, n))
            if self.products == n:
                break
            if more > 0:
                more -= 1
            elif self.products >= k:
                values, *_, residuals = self._triplets(k, smallest)
                if len(values) == k and bool((residuals <= tol).all()):
                    if more == 0:
                        break
                    # A single sequence sees one direction of those with equal values.
                    self._add_fresh()
                    more = EXTRA
        return self._found(k, smallest)

    def _advance(self, v: Tensor) -> None:
        dtype = self._pulls.outputs.dtype
        self.products += 1
        w, h = _against(self._pushes.push(v[None])[0], self._outputs)
        size = torch.linalg.vector_norm(w)
        scale = max([float(size), *(float(c.abs().max()) for c in self._columns if len(c))])
        if float(size) > 10 * torch.finfo(dtype).eps * scale and float(size) > 0:
            u = w / size
            self._outputs.append(u)
            self._columns.append(torch.cat([h, size[None].to(h)]))
            z, g = _against(self._pulls.pull(u[None])[0], self._inputs)
            rest = torch.linalg.vector_norm(z)
            if float(rest) > 1e3 * torch.finfo(dtype).eps * scale:
                self._inputs.append(z / rest)
                g = torch.cat([g, rest[None].to(g)])
            self._rows.append(g)
        else:
            self._columns.append(h)

    def _add_fresh(self) -> bool:
        """Add a random direction; return False if the inputs have no further one."""
        layout = self._pulls.inputs
        if len(self._inputs) >= layout.size:
            return False
        for _ in range(3):
            v = torch.randn(layout.size, generator=self._generator, dtype=torch.float64)
            v, _ = _against(v.to(layout.dtype).to(layout.device), self._inputs)
            size = torch.linalg.vector_norm(v)
            if float(size) > 1e-6:
                self._inputs.append(v / size)
                return True
        return False

    def _small(self) -> tuple[Tensor, Tensor]:
        """Return H ``[U, processed V]`` and G ``[V, U]``."""
        h = torch.zeros(len(self._outputs), self.products, dtype=torch.float64)
        g = torch.zeros(len(self._inputs), len(self._outputs), dtype=torch.float64)
        for j, column in enumerate(self._columns):
            h[: len(column), j] = column
        for i, row in enumerate(self._rows):
            g[: len(row), i] = row
        return h, g

    def _triplets(self, k: int, smallest: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, g = self._small()
        if not len(h):
            none = torch.zeros(min(k, h.shape[1]), dtype=torch.float64)
            return none, torch.zeros(len(none), 0), torch.zeros(len(none), 0), none
        p, s, q = torch.linalg.svd(h, full_matrices=False)
        count = min(k, len(s))
        order = (
            torch.arange(len(s) - 1, len(s) - 1 - count, -1) if smallest else torch.arange(count)
        )
        residual = g @ p[:, order]
        residual[: self.products] -= q[order].T * s[order]
        residuals = torch.linalg.vector_norm(residual, dim=0) / max(float(s[0]), 1e-300)
        return s[order], p[:, order].T, q[order], residuals

    def _found(self, k: int, smallest: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values, p, q, residuals = self._triplets(k, smallest)
        layout = self._pulls
        left = torch.zeros(len(values), layout.outputs.size, dtype=layout.outputs.dtype)
        left = left.to(layout.outputs.device)
        for i, u in enumerate(self._outputs):
            if p.shape[1]:
                left += p[:, i].to(left)[:, None] * u
        right = torch.zeros(len(values), layout.inputs.size, dtype=layout.inputs.dtype)
        right = right.to(layout.inputs.device)
        for j in range(q.shape[1]):
            right += q[:, j].to(right)[:, None] * self._inputs[j]
        return values.to(layout.outputs.dtype), left, right, residuals


def _against(x: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Orthogonalise twice; return what is left, and the coefficients in float64 on the CPU."""
    total = torch.zeros(len(basis), dtype=torch.float64)
    for _ in range(2):
        # One after the other: the basis is never copied into a matrix.
        for i, b in enumerate(basis):
            c = torch.dot(b, x)
            x = x - c * b
            total[i] += float(c)
    return x, total
