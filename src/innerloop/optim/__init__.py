"""Optimizers as pure functions: names, arguments and defaults of ``torch.optim``, in lower case. One file per rule."""

from innerloop.optim.accumulate import AccumulateState, accumulate
from innerloop.optim.adadelta import Adadelta, AdadeltaState, adadelta
from innerloop.optim.adafactor import Adafactor, AdafactorState, adafactor
from innerloop.optim.adagrad import Adagrad, AdagradState, adagrad
from innerloop.optim.adam import Adam, AdamState, adam
from innerloop.optim.adamax import Adamax, AdamaxState, adamax
from innerloop.optim.adamw import AdamW, adamw
from innerloop.optim.adapted import Adapted, AdaptedState, adapt
from innerloop.optim.asgd import ASGD, ASGDState, asgd
from innerloop.optim.base import Hyper, Optimizer, Rule
from innerloop.optim.clip import clip_by_global_norm, clip_by_value, clip_per_parameter
from innerloop.optim.decay import add_decayed_weights
from innerloop.optim.elementwise import Elementwise
from innerloop.optim.from_torch import from_torch
from innerloop.optim.grad_callback import grad_callback
from innerloop.optim.groups import groups
from innerloop.optim.in_float32 import InFloat32State, in_float32
from innerloop.optim.lbfgs import LBFGS, LBFGSState, lbfgs
from innerloop.optim.learned import LearnedState, learned
from innerloop.optim.muon import Muon, MuonState, muon
from innerloop.optim.nadam import NAdam, NAdamState, nadam
from innerloop.optim.noise import AddNoiseState, add_noise
from innerloop.optim.packing import Packed
from innerloop.optim.per_tensor import PerTensor
from innerloop.optim.radam import RAdam, RAdamState, radam
from innerloop.optim.rmsprop import RMSprop, RMSpropState, rmsprop
from innerloop.optim.rprop import Rprop, RpropState, rprop
from innerloop.optim.scale import scale
from innerloop.optim.sgd import SGD, SGDState, sgd
from innerloop.optim.sparse_adam import SparseAdam, SparseAdamState, sparse_adam
from innerloop.optim.supported import Support, Supported, SupportedList, supported
from innerloop.optim.transform import ChainState, Transform, chain

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "ASGDState",
    "AccumulateState",
    "Adadelta",
    "AdadeltaState",
    "Adafactor",
    "AdafactorState",
    "Adagrad",
    "AdagradState",
    "Adam",
    "AdamState",
    "AdamW",
    "Adamax",
    "AdamaxState",
    "Adapted",
    "AdaptedState",
    "AddNoiseState",
    "ChainState",
    "Elementwise",
    "Hyper",
    "InFloat32State",
    "LBFGSState",
    "LearnedState",
    "Muon",
    "MuonState",
    "NAdam",
    "NAdamState",
    "Optimizer",
    "Packed",
    "PerTensor",
    "RAdam",
    "RAdamState",
    "RMSprop",
    "RMSpropState",
    "Rprop",
    "RpropState",
    "Rule",
    "SGDState",
    "SparseAdam",
    "SparseAdamState",
    "Support",
    "Supported",
    "SupportedList",
    "Transform",
    "accumulate",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adapt",
    "add_decayed_weights",
    "add_noise",
    "asgd",
    "chain",
    "clip_by_global_norm",
    "clip_by_value",
    "clip_per_parameter",
    "from_torch",
    "grad_callback",
    "groups",
    "in_float32",
    "lbfgs",
    "learned",
    "muon",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "scale",
    "sgd",
    "sparse_adam",
    "supported",
]
