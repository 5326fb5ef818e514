"""Operations with all their derivatives, under the names and with the arguments that they have in PyTorch."""

from innerloop.nn.attention import scaled_dot_product_attention
from innerloop.nn.cross_entropy import cross_entropy

__all__ = ["cross_entropy", "scaled_dot_product_attention"]
