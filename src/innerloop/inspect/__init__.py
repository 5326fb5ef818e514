"""Look at what an unrolled loop did: derivatives between times, and the paths of a gradient."""

from innerloop.inspect._jacobian import jacobian
from innerloop.inspect._paths import Paths, paths

__all__ = ["Paths", "jacobian", "paths"]
