"""Replacements for operations of PyTorch that lack a derivative, and their automatic choice."""

from innerloop.nn import functional
from innerloop.nn._derivative_order import any_order
from innerloop.nn._mode import keep_kernels, replaced, replacing

__all__ = ["any_order", "functional", "keep_kernels", "replaced", "replacing"]
