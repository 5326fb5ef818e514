"""Where a graph is cut: calls that hand on numbers without their derivative."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from innerloop._inner_gradient.graph import check_graph
from innerloop._utils import tree

_CUTS = {
    "detach": "detach()",
    "detach_": "detach_()",
    "item": ".item()",
    "tolist": ".tolist()",
    "numpy": ".numpy()",
    "__float__": "float(...)",
    "__int__": "int(...)",
    "__array__": "a conversion to NumPy",
    "data.__get__": ".data",
    "long": ".long()",
    "int": ".int()",
    "argmax": "argmax",
    "argmin": "argmin",
    "round": "round",
    "floor": "floor",
    "ceil": "ceil",
    "trunc": "trunc",
    "sign": "sign",
    "bucketize": "bucketize",
    "searchsorted": "searchsorted",
}
_OWN, _TORCH = str(Path(__file__).parent.parent), str(Path(torch.__file__).parent)


def _is_passed(file: str) -> bool:
    """True for a frame that only passes a call on."""
    return (
        file == __file__
        or file.startswith((_TORCH, "<"))
        or any(f"/{package}/" in file for package in ("jaxtyping", "beartype"))
    )


class Cut(NamedTuple):
    """One place where a derivative ends.

    Attributes:
        call: what was written there, ``"detach()"``.
        place: file and line of the user's code.
        source: that line.
        leaves: identities of the leaves whose derivative ends there.
    """

    call: str
    place: str
    source: str
    leaves: frozenset[int]


class FindCuts(TorchFunctionMode):
    """Notes every call in the block that hands on numbers without their derivative.

    Attributes:
        found: the cuts, the first of each place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], Cut] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run ``func``, and look at what became of the derivative."""
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree.tensors((args, dict(kwargs or {}))) if x.requires_grad]
        if given:
            self._look(func, given, result)
        return result

    def _look(self, func: Callable[..., Any], given: list[Tensor], result: Any) -> None:
        full = resolve_name(func) or getattr(func, "__name__", "")
        name = ".".join(full.split(".")[-2:]) if full.endswith("__get__") else full.split(".")[-1]
        call = _CUTS.get(name)
        if call is None and not torch.is_grad_enabled():
            outputs = [x for x in tree.tensors(result) if tree.differentiable(x)]
            if outputs and not any(x.requires_grad for x in outputs):
                call = "torch.no_grad()"
        if call is None:
            return
        frame: Any = sys._getframe(1)  # noqa: SLF001
        # Between the user's call and this one stand PyTorch, and in tests a type checker.
        while frame is not None and _is_passed(frame.f_code.co_filename):
            frame = frame.f_back
        # The package itself detaches on purpose.
        if frame is None or frame.f_code.co_filename.startswith(_OWN):
            return
        place = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
        if (call, place) in self.found:
            return
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        with torch.enable_grad():
            leaves = frozenset(id(x) for x in check_graph(given, (), second_order=False))
        leaves |= {id(x) for x in given if x.is_leaf}
        self.found[call, place] = Cut(call, place, line, leaves)
