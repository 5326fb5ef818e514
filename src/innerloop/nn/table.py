"""The operations that are replaced, and why: the one list."""

from __future__ import annotations

from innerloop import _private
from innerloop.nn.replace import register
from innerloop.nn.weight_norm import weight_norm

register(
    weight_norm,
    _private.weight_norm,
    name="torch._weight_norm",
    reason="its second derivative is wrong without an error",
    silent=True,
)
