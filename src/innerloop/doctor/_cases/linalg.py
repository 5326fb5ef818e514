"""Audited functions of ``torch.linalg``."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from innerloop.doctor._cases.case import Call, Case, _seeded, function, matrix, noise


def _linalg() -> Iterator[Case]:
    a, b, tall = matrix(3), matrix(3, phase=1.0), torch.cat([matrix(3), noise(1, 3, phase=2.0)])
    symmetric = lambda a: a + a.mT  # noqa: E731
    definite = lambda a: a @ a.mT + torch.eye(3, dtype=a.dtype)  # noqa: E731
    la = torch.linalg
    calls: dict[str, Call] = {
        "inv": la.inv,
        "det": la.det,
        "slogdet": la.slogdet,
        "cholesky": lambda a: la.cholesky(definite(a)),
        "qr": la.qr,
        "eigh": lambda a: la.eigh(symmetric(a))[0],
        "eigh(vectors)": lambda a: la.eigh(symmetric(a))[1] ** 2,
        "eigvalsh": lambda a: la.eigvalsh(symmetric(a)),
        "eigvals": lambda a: la.eigvals(a).real,
        "svdvals": la.svdvals,
        "matrix_exp": la.matrix_exp,
        "matrix_power": lambda a: la.matrix_power(a, 3),
        "pinv": la.pinv,
        "norm": la.norm,
        "matrix_norm(nuc)": lambda a: la.matrix_norm(a, "nuc"),
        "matrix_norm(2)": lambda a: la.matrix_norm(a, 2),
        "vector_norm": la.vector_norm,
        "vector_norm(1)": lambda a: la.vector_norm(a, 1),
        "vector_norm(3)": lambda a: la.vector_norm(a, 3, dim=1),
        "vector_norm(inf)": lambda a: la.vector_norm(a, math.inf),
        "cond": la.cond,
        "lu": lambda a: la.lu(a)[1:],
        "lu_factor": lambda a: la.lu_factor(a)[0],
        "cross": lambda a: la.cross(a, a.flip(0)),
        "vander": lambda a: la.vander(a[0]),
        "multi_dot": lambda a: la.multi_dot([a, a.mT, a]),
        "householder_product": lambda a: la.householder_product(a, a[0]),
        "cholesky_ex": lambda a: la.cholesky_ex(definite(a))[0],
        "inv_ex": lambda a: la.inv_ex(a)[0],
        "ldl_factor": lambda a: la.ldl_factor(definite(a))[0],
        "matrix_norm(fro)": la.matrix_norm,
    }
    for name, operation in calls.items():
        yield function(f"torch.linalg.{name}", "linear algebra", operation, a)
    yield function("torch.linalg.qr (tall)", "linear algebra", la.qr, tall)
    yield function(
        "torch.linalg.svd (tall)",
        "linear algebra",
        lambda a: (lambda u, s, v: (u[:, :1] * v[:1], s))(*la.svd(a, full_matrices=False)),
        tall,
    )
    yield function("torch.linalg.pinv (tall)", "linear algebra", la.pinv, tall)
    pairs: dict[str, Call] = {
        "solve": la.solve,
        "lstsq": lambda a, b: la.lstsq(a, b).solution,
        "solve_triangular": lambda a, b: la.solve_triangular(a.triu(), b, upper=True),
        "solve_ex": lambda a, b: la.solve_ex(a, b)[0],
        "lu_solve": lambda a, b: la.lu_solve(*la.lu_factor(a), b),
        "tensorsolve": lambda a, b: la.tensorsolve(a, b[0]),
    }
    for name, operation in pairs.items():
        yield function(f"torch.linalg.{name}", "linear algebra", operation, a, b)
    yield function(
        "torch.cholesky_solve",
        "linear algebra",
        lambda b, a: torch.cholesky_solve(b, la.cholesky(definite(a))),
        b,
        a,
    )
    yield function(
        "torch.cholesky_inverse",
        "linear algebra",
        lambda a: torch.cholesky_inverse(la.cholesky(definite(a))),
        a,
    )
    yield function("torch.logdet", "linear algebra", lambda a: torch.logdet(definite(a)), a)
    yield function(
        "torch.lobpcg", "linear algebra", _seeded(lambda a: torch.lobpcg(definite(a), k=1)[0]), a
    )
