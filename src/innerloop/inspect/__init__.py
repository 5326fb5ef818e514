"""Look at what an unrolled loop did: derivatives between times, and the paths of a gradient."""

from innerloop.inspect._attribution import Attribution, attribute
from innerloop.inspect._compare import StrategyComparison, compare
from innerloop.inspect._curvature import Curvature, curvature
from innerloop.inspect._diagnose import Diagnosis, Finding, diagnose
from innerloop.inspect._gains import Gains, gains
from innerloop.inspect._influence import Influence, influence
from innerloop.inspect._jacobian import jacobian, jvp, vjp
from innerloop.inspect._lyapunov import Lyapunov, lyapunov
from innerloop.inspect._metajacobian import metajacobian
from innerloop.inspect._paths import Paths, paths
from innerloop.inspect._report.report import ReportPage, report

__all__ = [
    "Attribution",
    "Curvature",
    "Diagnosis",
    "Finding",
    "Gains",
    "Influence",
    "Lyapunov",
    "Paths",
    "ReportPage",
    "StrategyComparison",
    "attribute",
    "compare",
    "curvature",
    "diagnose",
    "gains",
    "influence",
    "jacobian",
    "jvp",
    "lyapunov",
    "metajacobian",
    "paths",
    "report",
    "vjp",
]
