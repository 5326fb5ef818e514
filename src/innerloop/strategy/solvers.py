"""Solvers of the linear systems of implicit differentiation: operators on pytrees."""

from innerloop._linear.solvers import (
    CG,
    GMRES,
    Dense,
    FixedPoint,
    Matrix,
    Neumann,
    NormalCG,
    Solved,
    Solver,
)

__all__ = [
    "CG",
    "GMRES",
    "Dense",
    "FixedPoint",
    "Matrix",
    "Neumann",
    "NormalCG",
    "Solved",
    "Solver",
]
