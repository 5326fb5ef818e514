"""Which operations of the installed PyTorch lack a derivative, or get one wrong without an error, and what innerloop does about each."""

from innerloop.doctor.cases import Case, all_cases
from innerloop.doctor.probe import Finding, examine, examine_all
from innerloop.doctor.report import to_markdown, to_text

__all__ = ["Case", "Finding", "all_cases", "examine", "examine_all", "to_markdown", "to_text"]
