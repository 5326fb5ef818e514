"""Audited functions of ``torch`` and ``torch.special``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from innerloop.doctor._cases.case import (
    Call,
    Case,
    _seeded,
    function,
    matrix,
    noise,
    positive,
    probabilities,
)
from innerloop.nn._catalogue import CONSTANT


def _functions() -> Iterator[Case]:
    x, y, p = noise(3, 4), noise(3, 4, phase=1.0), positive(3, 4)
    unit = probabilities(3, 4)
    sp = torch.special
    of_any: dict[str, Call] = {
        "cumsum": lambda x: x.cumsum(0),
        "cumprod": lambda x: x.cumprod(1),
        "prod": lambda x: x.prod(1),
        "std": lambda x: x.std(1),
        "var": lambda x: x.var(1),
        "std_mean": lambda x: torch.std_mean(x, 1),
        "logsumexp": lambda x: x.logsumexp(1),
        "logcumsumexp": lambda x: x.logcumsumexp(1),
        "max": lambda x: x.max(1)[0],
        "amax": lambda x: x.amax(1),
        "aminmax": torch.aminmax,
        "median": lambda x: x.median(1)[0],
        "kthvalue": lambda x: x.kthvalue(2, 1)[0],
        "topk": lambda x: x.topk(2, 1)[0],
        "sort": lambda x: x.sort(1)[0],
        "cummax": lambda x: x.cummax(1)[0],
        "mode": lambda x: x.mode(1)[0],
        "quantile": lambda x: x.quantile(0.3, 1),
        "nanmean": torch.nanmean,
        "trapezoid": torch.trapezoid,
        "cov": torch.cov,
        "corrcoef": torch.corrcoef,
        "diff": torch.diff,
        "gradient": lambda x: torch.gradient(x, dim=1),
        "fft": torch.fft.fft,
        "rfft": torch.fft.rfft2,
        "irfft": torch.fft.irfft,
        "stft": lambda x: torch.stft(
            x.reshape(1, -1), 4, window=torch.ones(4, dtype=x.dtype), return_complex=True
        ),
        "roll": lambda x: x.roll(1, 0),
        "scatter_reduce(prod)": lambda x: torch.zeros(4, dtype=x.dtype).scatter_reduce(
            0, torch.tensor([0, 1, 1, 2]), x[0], "prod", include_self=False
        ),
        "scatter_reduce(amax)": lambda x: torch.zeros(4, dtype=x.dtype).scatter_reduce(
            0, torch.tensor([0, 1, 1, 2]), x[0], "amax", include_self=False
        ),
        "scatter_reduce(mean)": lambda x: torch.zeros(4, dtype=x.dtype).scatter_reduce(
            0, torch.tensor([0, 1, 1, 2]), x[0], "mean", include_self=False
        ),
        "scatter_add": lambda x: torch.zeros(4, dtype=x.dtype).scatter_add(
            0, torch.tensor([0, 1, 1, 2]), x[0]
        ),
        "index_add": lambda x: x.index_add(0, torch.tensor([0, 0]), x[1:]),
        "index_reduce(prod)": lambda x: x.index_reduce(0, torch.tensor([0, 0]), x[1:], "prod"),
        "index_put": lambda x: x.index_put((torch.tensor([0, 1]),), x[1:], accumulate=True),
        "take_along_dim": lambda x: x.take_along_dim(torch.tensor([[1], [0], [3]]), 1),
        "masked_scatter": lambda x: x.masked_scatter(y > 0, x.flip(0)),
        "clamp": lambda x: x.clamp(-0.5, 0.5),
        "erfinv": lambda x: torch.erfinv(0.8 * x),
        "sinc": torch.sinc,
        "i0": torch.i0,
        "i0e": sp.i0e,
        "i1": sp.i1,
        "i1e": sp.i1e,
        "erfcx": sp.erfcx,
        "ndtr": sp.ndtr,
        "log_ndtr": sp.log_ndtr,
        "expm1": torch.expm1,
        "atanh": lambda x: torch.atanh(0.8 * x),
        "asin": lambda x: torch.asin(0.8 * x),
        "frac": torch.frac,
        "combinations": lambda x: torch.combinations(x[0]),
        "block_diag": lambda x: torch.block_diag(x, x),
        "segment_reduce": lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([2, 1])),
        "segment_reduce(max)": lambda x: torch.segment_reduce(
            x, "max", lengths=torch.tensor([2, 1])
        ),
        "segment_reduce(mean)": lambda x: torch.segment_reduce(
            x, "mean", lengths=torch.tensor([2, 1])
        ),
        "segment_reduce(prod)": lambda x: torch.segment_reduce(
            x, "prod", lengths=torch.tensor([2, 1])
        ),
    }
    for name, operation in of_any.items():
        yield function(f"torch.{name}", "functions", operation, x)
    of_positive: dict[str, Call] = {
        "lgamma": torch.lgamma,
        "digamma": torch.digamma,
        "polygamma": lambda x: torch.polygamma(2, x + 1),
        "mvlgamma": lambda x: torch.mvlgamma(x + 1, 2),
        "entr": sp.entr,
        "log1p": torch.log1p,
        "acosh": lambda x: torch.acosh(x + 1),
        "rsqrt": torch.rsqrt,
    }
    for name, operation in of_positive.items():
        yield function(f"torch.{name}", "functions", operation, p)
    for name in CONSTANT:
        if hasattr(sp, name):
            call = getattr(sp, name)
            call = _of_degree_two(call) if "polynomial" in name else call
            yield function(f"torch.special.{name}", "functions", call, p)
    yield function(
        "torch.triangular_solve",
        "functions",
        lambda a, b: torch.triangular_solve(b, a)[0],
        matrix(3),
        matrix(3, phase=1.0),
    )
    yield function(
        "torch.cholesky_inverse (full matrix)", "functions", torch.cholesky_inverse, matrix(3)
    )
    yield function(
        "torch.linalg.solve_triangular (full matrix)",
        "functions",
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=True),
        matrix(3),
        matrix(3, phase=1.0),
    )
    yield function("torch.logit", "functions", torch.logit, unit)
    yield function("torch.ndtri", "functions", sp.ndtri, unit)
    of_two: dict[str, Call] = {
        "atan2": torch.atan2,
        "hypot": torch.hypot,
        "logaddexp": torch.logaddexp,
        "logaddexp2": torch.logaddexp2,
        "maximum": torch.maximum,
        "fmod": lambda x, y: torch.fmod(x, y + 2.2),
        "remainder": lambda x, y: torch.remainder(x, y + 2.2),
        "lerp": lambda x, y: torch.lerp(x, y, 0.3 * x),
        "pow": lambda x, y: (x + 2) ** y,
        "xlogy": lambda x, y: torch.xlogy(x, y + 2),
        "xlog1py": lambda x, y: sp.xlog1py(x, y + 1.5),
        "addcdiv": lambda x, y: torch.addcdiv(x, x, y + 2),
        "bmm": lambda x, y: torch.bmm(x[None], y.mT[None]),
        "baddbmm": lambda x, y: torch.baddbmm((x @ y.mT)[None], x[None], y.mT[None]),
        "einsum": lambda x, y: torch.einsum("ij,kj->ik", x, y),
        "kron": torch.kron,
        "copysign": torch.copysign,
        "float_power": lambda x, y: torch.float_power(x + 2, y),
        "ldexp": torch.ldexp,
        "where": lambda x, y: torch.where(x > 0, x * y, y),
        "complex": torch.complex,
        "polar": lambda x, y: torch.polar(x + 2, y),
        "tensordot": lambda x, y: torch.tensordot(x, y, dims=([1], [1])),
    }
    for name, operation in of_two.items():
        yield function(f"torch.{name}", "functions", operation, x, y)
    yield function(
        "torch.gammainc", "functions", lambda x: sp.gammainc(torch.full_like(x, 1.3), x), p
    )
    yield function(
        "torch.gammaincc", "functions", lambda x: sp.gammaincc(torch.full_like(x, 1.3), x), p
    )
    yield function("torch.zeta", "functions", lambda x: sp.zeta(torch.full_like(x, 2.3), x + 1), p)
    yield function(
        "torch.distributions.Gamma.rsample",
        "functions",
        _seeded(lambda x: torch.distributions.Gamma(x, torch.ones_like(x)).rsample()),
        p,
        constants=True,
    )
    yield function("torch.angle", "functions", lambda x, y: torch.angle(torch.complex(x, y)), x, y)
    yield function("torch.complex abs", "functions", lambda x, y: torch.complex(x, y).abs(), x, y)
    yield function("torch.sgn (complex)", "functions", lambda x, y: torch.complex(x, y).sgn(), x, y)


def _of_degree_two(polynomial: Call) -> Call:
    return lambda x: polynomial(x, 2)
