"""Optimizers as pure functions: names, arguments and defaults of ``torch.optim``, in lower case."""

from innerloop._types import Hyper
from innerloop.optim._adapt.rule import Adapted, AdaptedState, adapt
from innerloop.optim._base import Optimizer, Rule
from innerloop.optim._chain import ChainState, chain
from innerloop.optim._engine.elementwise import Elementwise
from innerloop.optim._engine.packing import Packed
from innerloop.optim._engine.per_tensor import PerTensor
from innerloop.optim._from_torch.from_torch import from_torch
from innerloop.optim._from_torch.supported import Support, Supported, SupportedList, supported
from innerloop.optim._groups import groups
from innerloop.optim._in_float32 import InFloat32State, in_float32
from innerloop.optim._rules.adadelta import Adadelta, AdadeltaState, adadelta
from innerloop.optim._rules.adafactor import Adafactor, AdafactorState, adafactor
from innerloop.optim._rules.adagrad import Adagrad, AdagradState, adagrad
from innerloop.optim._rules.adam import Adam, AdamState, adam
from innerloop.optim._rules.adamax import Adamax, AdamaxState, adamax
from innerloop.optim._rules.adamw import AdamW, adamw
from innerloop.optim._rules.asgd import ASGD, ASGDState, asgd
from innerloop.optim._rules.lbfgs import LBFGS, LBFGSState, lbfgs
from innerloop.optim._rules.learned import LearnedState, learned
from innerloop.optim._rules.muon import Muon, MuonState, muon
from innerloop.optim._rules.nadam import NAdam, NAdamState, nadam
from innerloop.optim._rules.radam import RAdam, RAdamState, radam
from innerloop.optim._rules.rmsprop import RMSprop, RMSpropState, rmsprop
from innerloop.optim._rules.rprop import Rprop, RpropState, rprop
from innerloop.optim._rules.sgd import SGD, SGDState, sgd
from innerloop.optim._rules.sparse_adam import SparseAdam, SparseAdamState, sparse_adam
from innerloop.optim._transforms.accumulate import AccumulateState, accumulate
from innerloop.optim._transforms.base import Transform
from innerloop.optim._transforms.clip import clip_by_global_norm, clip_by_value, clip_per_parameter
from innerloop.optim._transforms.decay import add_decayed_weights
from innerloop.optim._transforms.grad_callback import grad_callback
from innerloop.optim._transforms.noise import AddNoiseState, add_noise
from innerloop.optim._transforms.scale import scale

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
