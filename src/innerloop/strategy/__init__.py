"""Ways of differentiating a loop, one file each."""

from innerloop.strategy import solvers
from innerloop.strategy._auto import Auto
from innerloop.strategy._base import Loop, Measure, Strategy
from innerloop.strategy._checkpointed import Checkpointed
from innerloop.strategy._disk import Disk
from innerloop.strategy._evolution import Estimate, Evolution, OnlineEstimate
from innerloop.strategy._first_order import FirstOrder
from innerloop.strategy._forecast import Forecast
from innerloop.strategy._forward_mode import ForwardMode
from innerloop.strategy._implicit import Implicit
from innerloop.strategy._one_step import DARTS, SAMA, T1T2
from innerloop.strategy._outer_gradient import Inputs, Objective
from innerloop.strategy._store_all import StoreAll
from innerloop.strategy._truncated import Truncated

__all__ = [
    "DARTS",
    "SAMA",
    "T1T2",
    "Auto",
    "Checkpointed",
    "Disk",
    "Estimate",
    "Evolution",
    "FirstOrder",
    "Forecast",
    "ForwardMode",
    "Implicit",
    "Inputs",
    "Loop",
    "Measure",
    "Objective",
    "OnlineEstimate",
    "StoreAll",
    "Strategy",
    "Truncated",
    "solvers",
]
