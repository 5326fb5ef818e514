"""Optimizers as pure functions: names, arguments and defaults of ``torch.optim``, in lower case. One file per rule."""

from innerloop.optim.adam import Adam, AdamState, adam
from innerloop.optim.adamw import AdamW, adamw
from innerloop.optim.base import Hyper, Optimizer, Rule
from innerloop.optim.from_torch import from_torch
from innerloop.optim.groups import groups
from innerloop.optim.packing import Packed
from innerloop.optim.sgd import SGD, SGDState, sgd

__all__ = [
    "SGD",
    "Adam",
    "AdamState",
    "AdamW",
    "Hyper",
    "Optimizer",
    "Packed",
    "Rule",
    "SGDState",
    "adam",
    "adamw",
    "from_torch",
    "groups",
    "sgd",
]
