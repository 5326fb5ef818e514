"""Ways of differentiating a loop, one file each."""

from innerloop.strategy.base import Loop, Strategy
from innerloop.strategy.checkpointed import Checkpointed
from innerloop.strategy.store_all import StoreAll

__all__ = ["Checkpointed", "Loop", "StoreAll", "Strategy"]
