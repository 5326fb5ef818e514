"""Differentiate through training: what comes after a training loop by what goes into it."""

from innerloop import higher, inspect, nn, optim, strategy
from innerloop._carry import Carry
from innerloop._check import check_metagradient
from innerloop._metagradient.metagradient import metagradient
from innerloop._module.functional import functional
from innerloop._outer_state import OuterState
from innerloop._plan import Plan, plan
from innerloop._problem import Problem
from innerloop._track.loop import TrackedLoop
from innerloop._track.track import track
from innerloop._trajectory import Trajectory
from innerloop._unroll import unroll
from innerloop.errors import (
    BiasedSurrogateWarning,
    CapturedParameterWarning,
    CapturedTensorError,
    InnerLoopError,
    InvalidInputError,
    MetaGradientError,
    MissingExtraError,
    NonFiniteError,
    NotDifferentiableError,
    PrecisionWarning,
    UnreachedGradientWarning,
)
from innerloop.strategy import Auto, Checkpointed, FirstOrder, ForwardMode, StoreAll, Truncated

__version__ = "0.1.0.dev0"
__all__ = [
    "Auto",
    "BiasedSurrogateWarning",
    "CapturedParameterWarning",
    "CapturedTensorError",
    "Carry",
    "Checkpointed",
    "FirstOrder",
    "ForwardMode",
    "InnerLoopError",
    "InvalidInputError",
    "MetaGradientError",
    "MissingExtraError",
    "NonFiniteError",
    "NotDifferentiableError",
    "OuterState",
    "Plan",
    "PrecisionWarning",
    "Problem",
    "StoreAll",
    "TrackedLoop",
    "Trajectory",
    "Truncated",
    "UnreachedGradientWarning",
    "check_metagradient",
    "functional",
    "higher",
    "inspect",
    "metagradient",
    "nn",
    "optim",
    "plan",
    "strategy",
    "track",
    "unroll",
]
