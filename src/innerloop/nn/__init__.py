"""Layers that train inside, and replacements for operations of PyTorch that lack a derivative."""

from innerloop.nn import functional
from innerloop.nn._derivative_order import any_order
from innerloop.nn._mode import keep_kernels, replaced, replacing
from innerloop.nn._onednn import ProductTimes, onednn_products

# isort: split
# It is made of the loop, which needs the modules above: they come first.
from innerloop._fast_weights import FastWeights

__all__ = [
    "FastWeights",
    "ProductTimes",
    "any_order",
    "functional",
    "keep_kernels",
    "onednn_products",
    "replaced",
    "replacing",
]
