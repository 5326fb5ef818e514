"""Operations with all their derivatives."""

from innerloop.nn.weight_norm import weight_norm

__all__ = ["weight_norm"]
