"""Operations with all their derivatives, under PyTorch's names and with PyTorch's arguments."""

from innerloop.nn._replacements.attention import scaled_dot_product_attention
from innerloop.nn._replacements.cross_entropy import cross_entropy
from innerloop.nn._replacements.ctc_loss import ctc_loss
from innerloop.nn._replacements.distance import cdist, pdist
from innerloop.nn._replacements.elementary import cholesky_inverse, hardsigmoid
from innerloop.nn._replacements.embedding_bag import embedding_bag
from innerloop.nn._replacements.grid_sample import grid_sample
from innerloop.nn._replacements.losses import (
    huber_loss,
    mse_loss,
    multi_margin_loss,
    multilabel_margin_loss,
    soft_margin_loss,
)
from innerloop.nn._replacements.norm import batch_norm, instance_norm, layer_norm
from innerloop.nn._replacements.weight_norm import weight_norm

__all__ = [
    "batch_norm",
    "cdist",
    "cholesky_inverse",
    "cross_entropy",
    "ctc_loss",
    "embedding_bag",
    "grid_sample",
    "hardsigmoid",
    "huber_loss",
    "instance_norm",
    "layer_norm",
    "mse_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "pdist",
    "scaled_dot_product_attention",
    "soft_margin_loss",
    "weight_norm",
]
