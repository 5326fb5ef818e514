"""Differentiate through training: the exact derivative of anything after an optimisation loop with respect to anything before it."""

from innerloop import higher, inspect, nn, optim, strategy
from innerloop.check import check_metagradient
from innerloop.errors import (
    CapturedTensorError,
    InnerLoopError,
    InvalidInputError,
    MetaGradientError,
    MissingExtraError,
    NotDifferentiableError,
    PrecisionWarning,
)
from innerloop.module import functional
from innerloop.plan import Plan, plan
from innerloop.problem import Carry, Problem
from innerloop.strategy import Auto, Checkpointed, FirstOrder, ForwardMode, StoreAll, Truncated
from innerloop.track import track
from innerloop.trajectory import Trajectory
from innerloop.unroll import metagradient, unroll

__version__ = "0.1.0.dev0"
__all__ = [
    "Auto",
    "CapturedTensorError",
    "Carry",
    "Checkpointed",
    "FirstOrder",
    "ForwardMode",
    "InnerLoopError",
    "InvalidInputError",
    "MetaGradientError",
    "MissingExtraError",
    "NotDifferentiableError",
    "Plan",
    "PrecisionWarning",
    "Problem",
    "StoreAll",
    "Trajectory",
    "Truncated",
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
