"""The derivatives of one model: which of its operations lack one, and what is done about each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from innerloop._inner_gradient.graph import check_graph
from innerloop._inner_gradient.torch_errors import explain
from innerloop._utils import tree
from innerloop._utils.text_table import table
from innerloop.doctor._cases.case import Case, value
from innerloop.doctor._probe import Finding, examine_case
from innerloop.errors import InnerLoopError, InvalidInputError
from innerloop.nn._catalogue import LOOK_INSIDE, Operation, by_call, by_node
from innerloop.nn._mode import look_inside, replacing


class InModel(NamedTuple):
    """One operation of a model with a missing or wrong derivative.

    Attributes:
        operation: its name, as `innerloop doctor` calls it.
        modules: the submodules that use it, by path; empty where that is not known.
        reason: what is missing or wrong.
        action: what innerloop does, or what to write instead.
        refused: True if innerloop does not replace it.
    """

    operation: str
    modules: tuple[str, ...]
    reason: str
    action: str
    refused: bool


class ModelReport(NamedTuple):
    """What `examine` has found in a model; prints as text.

    Attributes:
        operations: those with a missing or wrong derivative.
        error: why a second derivative of the model could not be taken; empty if it could.
        steps: how many parameters the second derivative reaches, and how many there are.
    """

    operations: tuple[InModel, ...]
    error: str
    steps: tuple[int, int]

    @property
    def ok(self) -> bool:
        """True if an inner loop can be differentiated through the model."""
        return not self.error and not any(op.refused for op in self.operations)

    def __str__(self) -> str:
        if self.ok:
            head = "An inner loop can be differentiated through this model."
        else:
            head = "An inner loop CANNOT be differentiated through this model as it is."
        lines = [head]
        if self.error:
            lines.append(self.error)
        if self.operations:
            rows = [
                [op.operation, ", ".join(op.modules) or "?", op.reason, op.action]
                for op in self.operations
            ]
            lines.append(table(rows, header=["operation", "in", "PyTorch", "innerloop"]))
        elif self.ok:
            lines.append("None of its operations lacks a derivative in PyTorch.")
        reached, count = self.steps
        if reached < count and not self.error:
            lines.append(
                f"{count - reached} of {count} parameters have no gradient from this output."
            )
        return "\n".join(lines)


@overload
def examine(what: Case, example: object = None, *, device: str = "cpu") -> Finding: ...
@overload
def examine(what: nn.Module, example: object, *, device: str = "cpu") -> ModelReport: ...
def examine(
    what: Case | nn.Module, example: object = None, *, device: str = "cpu"
) -> Finding | ModelReport:
    """Tell which operations of a model lack a derivative, and what is done about each.

    The model is copied, run once on ``example``, and its second derivative is taken as an inner
    loop would. Of a `Case` of the doctor's own list, its derivatives are probed instead.

    Args:
        what: a module; or a `Case`.
        example: what the module is called with: a tuple of positional arguments, a dict of keyword
            arguments, or the single argument.
        device: where a `Case` is probed.

    Returns:
        A `ModelReport` of a module, a `Finding` of a `Case`; both print as text.

    Raises:
        InvalidInputError: ``what`` is neither, or the module has no parameters or no output that
            depends on them.

    Example:
        >>> import torch, innerloop.doctor
        >>> print(innerloop.doctor.examine(torch.nn.Linear(3, 2), torch.ones(1, 3)))
        An inner loop can be differentiated through this model.
        None of its operations lacks a derivative in PyTorch.
    """
    if isinstance(what, Case):
        return examine_case(what, device)
    if not isinstance(what, nn.Module):
        raise InvalidInputError(
            f"expected a module, got {type(what).__name__}: write "
            "innerloop.doctor.examine(model, example)"
        )
    model = copy.deepcopy(what)
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise InvalidInputError(f"{type(what).__name__} has no parameters that require grad")

    def call() -> Any:
        if isinstance(example, Mapping):
            return model(**example)
        return model(*example) if isinstance(example, tuple) else model(example)

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        warnings.simplefilter("ignore")
        met = _Met(model)
        try:
            with met:
                output = call()
        except InnerLoopError:
            raise
        except Exception as failure:
            raise InvalidInputError(
                f"{type(what).__name__} cannot be called with this example "
                f"({type(failure).__name__}: {failure}): pass the tensor, the tuple of arguments "
                "or the dict of keywords that it is called with in training"
            ) from failure
        finally:
            met.close()
        ends = [x for x in tree.tensors(output) if tree.differentiable(x) and x.requires_grad]
        if not ends:
            raise InvalidInputError(
                f"the output of {type(what).__name__} does not depend on its parameters: give an "
                "example of what it is called with in training, outside of torch.no_grad()"
            )
        _by_nodes(ends, met.found)
        reached, error = 0, ""
        try:
            with replacing():
                output = call()
                loss = value([x for x in tree.tensors(output) if tree.differentiable(x)])
            check_graph([loss], params, second_order=True)
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            given = [g for g in grads if g is not None]
            reached = len(given)
            ends = [g for g in given if g.requires_grad]
            if ends:
                torch.autograd.grad([g.sum() for g in ends], params, allow_unused=True)
        except InnerLoopError as failed:
            error = str(failed)
        except RuntimeError as failed:
            error = str(explain(failed))
    rows = [
        InModel(
            op.name,
            tuple(dict.fromkeys(paths)),
            op.reason,
            "replaced" if op.replacements else op.instead,
            not op.replacements,
        )
        for op, paths in met.found.items()
    ]
    return ModelReport(tuple(rows), error, (reached, len(params)))


class _Met(TorchFunctionMode):
    """Notes the operations of the catalogue that are called, and the submodule that calls them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[Operation, list[str]] = {}
        self._inside: list[str] = []
        self._handles = []
        for path, module in model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(self._entering(path or "the model")),
                module.register_forward_hook(self._left, always_call=True),
            ]

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _entering(self, path: str) -> Callable[..., None]:
        return lambda *_: self._inside.append(path)

    def _left(self, *_: object) -> None:
        self._inside.pop()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run ``func``, and note it if a derivative of it is missing."""
        operation = by_call(func)
        if operation is not None and (operation.when is None or operation.when(args, kwargs or {})):
            self.found.setdefault(operation, []).append(self._inside[-1] if self._inside else "")
        if func in LOOK_INSIDE:
            with self:
                return look_inside(func)(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _by_nodes(ends: list[Tensor], found: dict[Operation, list[str]]) -> None:
    """Add the operations that show in the graph alone."""
    stack: list[Any] = [x.grad_fn for x in ends]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        operation = by_node(type(node).__name__)
        if operation is not None and (operation.node_when is None or operation.node_when(node)):
            found.setdefault(operation, [])
        stack.extend(child for child, _ in node.next_functions)
