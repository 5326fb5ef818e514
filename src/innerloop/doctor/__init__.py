"""Which operations of the installed PyTorch lack a derivative, or get one wrong without an error, and what innerloop does about each."""

from innerloop.doctor._cases.all_cases import all_cases
from innerloop.doctor._cases.case import Case
from innerloop.doctor._probe import Finding, examine, examine_all
from innerloop.doctor._report import to_markdown, to_text

__all__ = ["Case", "Finding", "all_cases", "examine", "examine_all", "to_markdown", "to_text"]
