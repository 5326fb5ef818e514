"""Look at what an unrolled loop did: derivatives between times, and the paths of a gradient."""

from innerloop.inspect._compare import StrategyComparison, compare
from innerloop.inspect._curvature import Curvature, curvature
from innerloop.inspect._gains import Gains, gains
from innerloop.inspect._influence import Influence, influence
from innerloop.inspect._jacobian import jacobian, jvp, vjp
from innerloop.inspect._lyapunov import Lyapunov, lyapunov
from innerloop.inspect._paths import Paths, paths

__all__ = [
    "Curvature",
    "Gains",
    "Influence",
    "Lyapunov",
    "Paths",
    "StrategyComparison",
    "compare",
    "curvature",
    "gains",
    "influence",
    "jacobian",
    "jvp",
    "lyapunov",
    "paths",
    "vjp",
]
