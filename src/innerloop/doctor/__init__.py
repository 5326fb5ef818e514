"""The audit of PyTorch's derivatives: which are missing or wrong, and what innerloop does.

It looks at the PyTorch that is installed, operation by operation.
"""

from innerloop.doctor._cases.all_cases import all_cases
from innerloop.doctor._cases.case import Case
from innerloop.doctor._model import InModel, ModelReport, examine
from innerloop.doctor._probe import Finding, examine_all
from innerloop.doctor._report import to_markdown, to_text

__all__ = [
    "Case",
    "Finding",
    "InModel",
    "ModelReport",
    "all_cases",
    "examine",
    "examine_all",
    "to_markdown",
    "to_text",
]
