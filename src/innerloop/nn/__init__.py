"""Forms of PyTorch's operations that have the derivatives which PyTorch's own lack, and their automatic choice."""

from innerloop.nn import functional, table
from innerloop.nn.replace import any_order, keep_kernels, replaced, replacing

__all__ = ["any_order", "functional", "keep_kernels", "replaced", "replacing", "table"]
