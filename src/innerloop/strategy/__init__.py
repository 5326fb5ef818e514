"""Ways of differentiating a loop, one file each."""

from innerloop.strategy.base import Loop, Strategy
from innerloop.strategy.store_all import StoreAll

__all__ = ["Loop", "StoreAll", "Strategy"]
