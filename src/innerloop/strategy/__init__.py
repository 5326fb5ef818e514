"""Ways of differentiating a loop, one file each."""

from innerloop.strategy.auto import Auto
from innerloop.strategy.base import Loop, Strategy
from innerloop.strategy.checkpointed import Checkpointed
from innerloop.strategy.first_order import FirstOrder
from innerloop.strategy.forward_mode import ForwardMode
from innerloop.strategy.store_all import StoreAll
from innerloop.strategy.truncated import Truncated

__all__ = ["Auto", "Checkpointed", "FirstOrder", "ForwardMode", "Loop", "StoreAll", "Strategy", "Truncated"]
