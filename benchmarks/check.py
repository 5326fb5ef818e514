"""Before anything is timed: does a contender compute the meta-gradient at all?"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from benchmarks.contenders.base import Gradients, as_tensors


def error(gradients: Gradients, reference: Mapping[str, Tensor]) -> float:
    """The relative error of the worst parameter.

        max_i ‖gᵢ − rᵢ‖ / (‖rᵢ‖ + 1e-3 ‖r‖)

    The second term keeps a parameter whose true gradient is zero (the bias of attention's keys)
    from dividing by it. A missing or additional name, or a NaN, is an infinite error.
    """
    if gradients.keys() != reference.keys():
        return math.inf
    total = math.sqrt(sum(float(r.square().sum()) for r in reference.values()))
    worst = 0.0
    for name, g in as_tensors(gradients).items():
        r = reference[name]
        if g.shape != r.shape:
            return math.inf
        off = float((g.to(r.dtype) - r).norm()) / (float(r.norm()) + 1e-3 * total)
        worst = max(worst, off if math.isfinite(off) else math.inf)
    return worst
