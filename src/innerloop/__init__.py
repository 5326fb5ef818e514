"""Differentiate through training: what comes after a training loop by what goes into it."""

# First, because of `nn.FastWeights`: everything else imports files of this package.
from innerloop import nn

# isort: split
from innerloop import higher, inspect, optim, strategy
from innerloop._carry import Carry
from innerloop._check import check_metagradient
from innerloop._functional import functional
from innerloop._inner_gradient.block import checkpoint_block
from innerloop._metagradient.metagradient import metagradient
from innerloop._metagradient.tasks import map_tasks
from innerloop._micro_batches import micro_batches
from innerloop._outer_state import OuterState
from innerloop._plan import Plan, plan
from innerloop._problem import Problem
from innerloop._track.loop import TrackedLoop
from innerloop._track.track import track
from innerloop._trajectory import Trajectory
from innerloop._unroll import unroll
from innerloop._utils.compiling import compile_cache
from innerloop._utils.tree import assign
from innerloop.errors import (
    BiasedSurrogateWarning,
    CapturedParameterWarning,
    CapturedTensorError,
    CostWarning,
    IndefiniteSystemError,
    InnerLoopError,
    InvalidInputError,
    MetaGradientError,
    MissingExtraError,
    NonFiniteError,
    NotConvergedWarning,
    NotDifferentiableError,
    PrecisionWarning,
    ProcessGroupError,
    RecompilationWarning,
    SingularSystemError,
    SolverError,
    SolverNotConvergedError,
    UnreachedGradientWarning,
)
from innerloop.inspect._attribution import Attribution, attribute
from innerloop.inspect._diagnose import Diagnosis, diagnose
from innerloop.strategy import (
    Auto,
    Checkpointed,
    Evolution,
    FirstOrder,
    ForwardMode,
    Implicit,
    StoreAll,
    Truncated,
)
from innerloop.strategy._implicit import implicit_root

__version__ = "0.1.0.dev0"
__all__ = [
    "Attribution",
    "Auto",
    "BiasedSurrogateWarning",
    "CapturedParameterWarning",
    "CapturedTensorError",
    "Carry",
    "Checkpointed",
    "CostWarning",
    "Diagnosis",
    "Evolution",
    "FirstOrder",
    "ForwardMode",
    "Implicit",
    "IndefiniteSystemError",
    "InnerLoopError",
    "InvalidInputError",
    "MetaGradientError",
    "MissingExtraError",
    "NonFiniteError",
    "NotConvergedWarning",
    "NotDifferentiableError",
    "OuterState",
    "Plan",
    "PrecisionWarning",
    "Problem",
    "ProcessGroupError",
    "RecompilationWarning",
    "SingularSystemError",
    "SolverError",
    "SolverNotConvergedError",
    "StoreAll",
    "TrackedLoop",
    "Trajectory",
    "Truncated",
    "UnreachedGradientWarning",
    "assign",
    "attribute",
    "check_metagradient",
    "checkpoint_block",
    "compile_cache",
    "diagnose",
    "functional",
    "higher",
    "implicit_root",
    "inspect",
    "map_tasks",
    "metagradient",
    "micro_batches",
    "nn",
    "optim",
    "plan",
    "strategy",
    "track",
    "unroll",
]
