"""In-place and data-dependent calls as pure ones that autograd can follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from innerloop._utils import torch_private
from innerloop.errors import NotDifferentiableError
from innerloop.optim._adapt.number import TracedNumber, optimizer_line, weak_number
from innerloop.optim._engine.numerics import safe_sqrt

DATA, GRAD, IS_LEAF, REQUIRES_GRAD = (
    vars(torch.Tensor.__base__)[name] for name in ("data", "grad", "is_leaf", "requires_grad")
)
IDENTITIES = {"detach", "detach_", "requires_grad_", "retain_grad"}
TO_NUMBER = {
    "item",
    "__float__",
    "__int__",
    "__index__",
    "__complex__",
    "__array__",
    "numpy",
    "tolist",
    "untyped_storage",
    "storage",
    "_typed_storage",
    "__dlpack__",
    "to_dlpack",
    "__reduce_ex__",
    "set_",
}
_FACTORIES = {"tensor", "as_tensor", "scalar_tensor", "new_tensor"}
_FILLED = {"full", "full_like", "new_full"}
_SCALED = {"add", "add_", "sub", "sub_", "addcmul", "addcmul_", "addcdiv", "addcdiv_"}
_RANDOM = {"normal"}
_ROOTS = {"sqrt", "sqrt_", "pow", "pow_", "__pow__", "__ipow__"}

T = TypeVar("T")


class TrackedTensor(Tensor):
    """A tensor on whose methods a 0-dim tensor may be ``alpha=`` or ``value=``.

    torch refuses one that requires grad before any mode sees the call (and takes one that does not,
    so optimizers write it).
    """

    def add(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().add(*args, **_marked(kwargs))

    def add_(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().add_(*args, **_marked(kwargs))

    def sub(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().sub(*args, **_marked(kwargs))

    def sub_(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().sub_(*args, **_marked(kwargs))

    def addcmul(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().addcmul(*args, **_marked(kwargs))

    def addcmul_(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().addcmul_(*args, **_marked(kwargs))

    def addcdiv(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().addcdiv(*args, **_marked(kwargs))

    def addcdiv_(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().addcdiv_(*args, **_marked(kwargs))


def _marked(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: TracedNumber(v) if k in ("alpha", "value") and isinstance(v, Tensor) else v
        for k, v in kwargs.items()
    }


def with_tensors(arguments: object) -> Any:
    """Return a torch function's arguments with a 0-dim tensor for each `TracedNumber`."""
    pieces = list(_pieces(arguments))
    met = [x for x in pieces if isinstance(x, Tensor)]

    def replaced(x: object) -> Any:
        if isinstance(x, TracedNumber):
            return weak_number(x.tensor, met)
        if type(x) is tuple or type(x) is list:
            return type(x)(map(replaced, x))
        return {k: replaced(v) for k, v in x.items()} if type(x) is dict else x

    return replaced(arguments) if any(isinstance(x, TracedNumber) for x in pieces) else arguments


def _pieces(arguments: object) -> Iterator[Any]:
    if isinstance(arguments, (tuple, list)):
        for x in arguments:
            yield from _pieces(x)
    elif isinstance(arguments, dict):
        yield from _pieces(list(arguments.values()))
    else:
        yield arguments


def write_into(out: Any, results: Any) -> Any:
    """Do what ``func(..., out=out)`` does, which autograd refuses."""
    pairs = [(out, results)] if isinstance(out, Tensor) else list(zip(out, results, strict=True))
    for target, result in pairs:
        if target.shape != result.shape:
            raise NotDifferentiableError(
                f"{optimizer_line()}out= has shape {tuple(target.shape)}, "
                f"the result {tuple(result.shape)}"
            )
        target.copy_(result)
    return out


def single_call(name: str) -> Callable[..., Any] | None:
    """Return what ``torch._foreach_NAME`` does to each tensor.

    Some functions on lists lack a derivative that the single ones have.
    """
    if name == "norm":
        return torch.linalg.vector_norm
    stem = name.removesuffix("_")
    name = {"maximum": "clamp_min", "minimum": "clamp_max"}.get(stem, stem) + (
        "_" if name.endswith("_") else ""
    )
    return torch.pow if name == "pow" else getattr(Tensor, name, None)


def for_each(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield the arguments for each tensor of the lists."""
    given = {("value" if k == "scalars" else k): v for k, v in kwargs.items()}
    if name.startswith("addc") and len(args) == 4:
        *args, given["value"] = args
    given = {
        k: list(v) if k == "value" and isinstance(v, Tensor) and v.ndim else v
        for k, v in given.items()
    }
    lists = [x for x in (*args, *given.values()) if isinstance(x, (tuple, list))]
    for i in range(len(lists[0])):
        pick = [x[i] if isinstance(x, (tuple, list)) else x for x in args]
        yield (
            tuple(pick),
            {k: v[i] if isinstance(v, (tuple, list)) else v for k, v in given.items()},
        )


def _scaled(
    func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """Compute ``x.add_(y, alpha=number)``: autograd has no derivative in ``alpha``."""
    factor = kwargs.get("value" if name.startswith("addc") else "alpha")
    args = with_tensors(args)
    if not isinstance(factor, (TracedNumber, Tensor)):
        return func(*args, **kwargs)
    x, *rest = args
    factor = weak_number(factor.tensor if isinstance(factor, TracedNumber) else factor, [x])
    if name.startswith("addcmul"):
        term = factor * rest[0] * rest[1]
    elif name.startswith("addcdiv"):
        term = factor * rest[0] / rest[1]
    else:
        term = factor * (rest[0] if rest else kwargs["other"])
    operation = "sub" if name.startswith("sub") else "add"
    return getattr(x, operation + ("_" if name.endswith("_") else ""))(term)


def _clamped(
    func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """Compute ``x.clamp(min=0.0, max=number)``: torch wants two tensors or two numbers."""
    x, *rest = args
    bounds = with_tensors(dict(zip(("min", "max"), rest, strict=False)) | dict(kwargs))
    if any(isinstance(b, Tensor) for b in bounds.values()):
        like = {"dtype": x.dtype, "device": x.device}
        bounds = {
            k: b
            if b is None
            else b.to(**like)
            if isinstance(b, Tensor)
            else torch.tensor(b, **like)
            for k, b in bounds.items()
        }
    return func(x, **bounds)


def _root(
    func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """Compute √x and x^.5 with derivative 0 instead of infinity at 0."""
    args, kwargs = with_tensors((args, kwargs))
    x, *exponent = args
    is_root = name.startswith("sqrt") or (
        len(exponent) == 1 and isinstance(exponent[0], float) and exponent[0] == 0.5
    )
    if kwargs or not is_root or not isinstance(x, Tensor) or not x.is_floating_point():
        return func(*args, **kwargs)
    in_place = name in ("sqrt_", "pow_", "__ipow__")
    zero = x == 0
    root = safe_sqrt(x).masked_fill(zero, 0)
    return x.copy_(root) if in_place else root


def _built(func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Any) -> Tensor:
    """Compute ``torch.tensor(x)`` of what is tracked."""
    source = args[1] if name == "new_tensor" else args[0]
    pieces = source if isinstance(source, (tuple, list)) else [source]
    if not any(
        isinstance(x, TracedNumber) or (isinstance(x, Tensor) and torch_private.has_derivative(x))
        for x in pieces
    ):
        return func(*args, **kwargs)
    dtype = kwargs.get("dtype")
    if dtype is None:
        dtype = source.dtype if isinstance(source, Tensor) else torch.get_default_dtype()
    like = {"dtype": dtype, "device": kwargs.get("device")}
    made = [
        x.to(**like) if isinstance(x, Tensor) else torch.tensor(x, **like)
        for x in with_tensors(pieces)
    ]
    return torch.stack(made) if pieces is source else made[0].clone()


def _filled(
    func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """Compute ``torch.full(shape, number)``."""
    if not any(isinstance(x, TracedNumber) for x in (*args, *kwargs.values())):
        return func(*args, **kwargs)
    number = next(x for x in (*args, *kwargs.values()) if isinstance(x, TracedNumber))
    zero = [0.0 if x is number else x for x in args]
    return func(*zero, **{k: 0.0 if x is number else x for k, x in kwargs.items()}) + number.tensor


def _drawn(
    func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """Compute ``torch.normal(mean, std)`` from the same random numbers.

    Autograd takes its derivative for zero.
    """
    mean, std = with_tensors(
        (
            args[0] if args else kwargs.get("mean"),
            args[1] if len(args) > 1 else kwargs.get("std", 1.0),
        )
    )
    tensors = [x for x in (mean, std) if isinstance(x, Tensor)]
    if not any(torch_private.has_derivative(x) for x in tensors):
        return func(*args, **kwargs)
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    like, generator = tensors[0], kwargs.get("generator")
    noise = torch.empty(shape, dtype=like.dtype, device=like.device).normal_(generator=generator)
    return noise * std + mean


REPLACED: tuple[tuple[Callable[..., Any], set[str]], ...] = (
    (_scaled, _SCALED),
    (_clamped, {"clamp", "clamp_", "clip", "clip_"}),
    (_root, _ROOTS),
    (_built, _FACTORIES),
    (_filled, _FILLED),
    (_drawn, _RANDOM),
)


def same(x: T) -> T:
    """Return what autograd saved, as it is."""
    return x


def copy_of(x: Tensor) -> Tensor:
    """Return what autograd saves of ``x``, whose memory will be overwritten."""
    with torch.no_grad():
        return x.clone()
