"""The operations under audit, each as a small module with smooth inputs in float64.

**To enrol an operation, add one line.** A line buys the probe of every derivative, and the contract
of ``tests/test_audit_contract.py``: training through it with SGD and Adam, by `track` and by
`unroll`, against ``torch.optim`` and finite differences.
"""

from __future__ import annotations

import functools

from innerloop.doctor._cases.activations import _activations
from innerloop.doctor._cases.case import Case
from innerloop.doctor._cases.functions import _functions
from innerloop.doctor._cases.kinks import _kinks
from innerloop.doctor._cases.layers import _distances, _embeddings, _layers, _pooling
from innerloop.doctor._cases.linalg import _linalg
from innerloop.doctor._cases.losses import _losses
from innerloop.doctor._cases.norms import _norms, _parametrized
from innerloop.doctor._cases.recurrent_and_attention import _attention, _recurrent


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Return every case under audit."""
    families = (
        _activations,
        _losses,
        _norms,
        _parametrized,
        _layers,
        _pooling,
        _embeddings,
        _distances,
        _recurrent,
        _attention,
        _linalg,
        _functions,
        _kinks,
    )
    return tuple(case for family in families for case in family())
