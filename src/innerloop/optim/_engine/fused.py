"""A step of one bucket as one node of the graph, with a pullback written by hand.

An update rule out of differentiable operations leaves about ten nodes for the bucket and three for
each of its parameters, and each of them allocates its result. With a `Kernel` the step is one node:
it runs without a graph, and its pullback writes in place what it has made itself. The values are
those of the rule's ``step``, bit for bit, and the derivatives are equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from innerloop._types import Grads, Params, Scalar
from innerloop._utils import caches, torch_private
from innerloop._utils.execution import may_call_autograd
from innerloop.optim._engine.packing import Bucket

Bars = tuple[Tensor, ...]


@runtime_checkable
class Kernel(Protocol):
    """What a rule does to one flat gradient, for hyper-parameters that are numbers.

    A new parameter is ``scale * parameter + update``.
    """

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the names of the state fields that it reads and writes."""

    @property
    def scale(self) -> float:
        """Return what a parameter is multiplied by before the update is added."""

    def forward(
        self, grad: Tensor, fields: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the update, the new fields, and what else `pullback` needs.

        It changes none of its arguments.
        """

    def pullback(
        self,
        grad: Tensor,
        fields: Sequence[Tensor],
        saved: Sequence[Tensor],
        update: Tensor,
        bars: Sequence[Tensor | None],
    ) -> tuple[Tensor, list[Tensor]]:
        """Pull gradients back through `forward`. It runs without a graph.

        Args:
            grad: the flat gradient.
            fields: the *new* fields.
            saved: what else `forward` has returned.
            update: the gradient by the update; not to be changed.
            bars: the gradients by the new fields, not to be changed; None is zero.

        Returns:
            The gradients by the flat gradient and by the old fields.
        """

    def differentiable_pullback(
        self, grad: Tensor, fields: Sequence[Tensor], update: Tensor, bars: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute what `pullback` does out of operations that have derivatives."""


@runtime_checkable
class HasKernel(Protocol):
    """A rule that may have a kernel."""

    def kernel(self, count: Any, hyper: Mapping[str, Any]) -> Kernel | None:
        """Return the kernel of a step; None if the rule has none for these hyper-parameters."""


def step(
    rule: HasKernel,
    bucket: Bucket,
    grads: Grads,
    params: Params,
    count: Scalar,
    state: Mapping[str, Any],
    hyper: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Step the parameters of ``bucket``: the new ones by name, and the new state fields.

    The arguments are those of `innerloop.optim._engine.update.in_bucket`.

    Returns:
        None where the rule's operations have to be seen one by one: with hyper-parameters that are
        tensors, under a transform or forward derivatives, for compiled code, for tensors of a class
        of their own or of half precision.
    """
    if bucket.is_complex or not may_call_autograd() or not _are_numbers(count, hyper):
        return None
    kernel = rule.kernel(count + 1, hyper)
    if kernel is None:
        return None
    names = bucket.names
    before = [params[name] for name in names]
    given: list[Any] = [grads[name] for name in names]
    fields = [state[name] for name in kernel.fields]
    dtype = before[0].dtype
    if (
        dtype.itemsize < 4
        or not torch_private.are_plain((*before, *given, *fields))
        or any(x.dtype != dtype for x in (*given, *fields))
        or any(g.layout != torch.strided for g in given)
        or 0 in map(torch.Size.numel, bucket.shapes)
    ):
        return None
    found = _Step.apply(kernel, bucket, *fields, *before, *given)
    n = len(fields)
    after = dict(zip(kernel.fields, found[1 : n + 1], strict=True))
    return dict(zip(names, found[n + 1 :], strict=True)), {**state, **after}


def _are_numbers(count: object, hyper: Mapping[str, Any]) -> bool:
    return isinstance(count, int) and all(
        isinstance(value, (float, int))
        or (isinstance(value, tuple) and all(isinstance(v, (float, int)) for v in value))
        for value in hyper.values()
    )


class _Step(torch.autograd.Function):
    """fields, parameters, gradients -> flat gradient, new fields, new parameters.

    The flat gradient is a result so that a second derivative finds it connected. There is no
    `setup_context`, for which PyTorch reads the signature of `forward` at every call.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, bucket: Bucket, *tensors: Tensor) -> Bars:
        n, k = len(bucket.names), len(kernel.fields)
        params, grads = tensors[k : k + n], tensors[k + n :]
        flat = _joined(bucket, grads, 1.0)
        update, fields, saved = kernel.forward(flat, tensors[:k])
        pieces = _split(bucket, update, params)
        moved = list(params)
        if kernel.scale != 1:
            moved = torch_private.multiply_list(moved, kernel.scale)
        new = torch_private.add_lists(moved, pieces, 1)
        ctx.kernel, ctx.bucket = kernel, bucket
        ctx.set_materialize_grads(False)
        # The gradient of a single parameter is an argument, and connected already.
        joined = flat.new_empty(0) if n == 1 else flat
        needed = ctx.needs_input_grad[2:]
        if any(needed[:k]) or any(needed[k + n :]):
            ctx.save_for_backward(flat, *fields, *saved)
        else:
            # To first order the gradients are constants, and so is what is made of them.
            ctx.mark_non_differentiable(joined, *fields)
        return (joined, *fields, *new)

    @staticmethod
    def backward(ctx: Any, of_flat: Tensor | None, *bars: Tensor | None) -> Any:
        kernel: Kernel = ctx.kernel
        bucket: Bucket = ctx.bucket
        n, k = len(bucket.names), len(kernel.fields)
        of_fields, of_params = bars[:k], bars[k:]
        needed = ctx.needs_input_grad[2:]
        if n == 1:
            of_flat = None  # what stands for it was empty
        back: list[Tensor | None] = [None] * (k + n)
        if any(needed[k : k + n]):
            scale = kernel.scale
            back[k:] = (
                of_params
                if scale == 1
                else [None if bar is None else bar * scale for bar in of_params]
            )
        if not any(needed[:k]) and not any(needed[k + n :]):
            return (None, None, *back, *[None] * n)
        flat, *more = ctx.saved_tensors
        fields, saved = more[:k], more[k:]
        shaped = _filled(bucket, of_params, flat)
        # What autograd or a transform has batched cannot be written in place everywhere.
        plain = (
            not torch.is_grad_enabled()
            and may_call_autograd()
            and not any(map(torch_private.is_batched, [bar for bar in bars if bar is not None]))
        )
        update = _joined(bucket, shaped, 0.0, plain)
        if plain:
            of_grad, back[:k] = kernel.pullback(flat, fields, saved, update, of_fields)
            of_grads = _split(bucket, of_grad if of_flat is None else of_grad + of_flat, shaped)
        else:
            of_grad, back[:k] = kernel.differentiable_pullback(flat, fields, update, of_fields)
            of_grads = _split_differentiably(
                bucket, of_grad if of_flat is None else of_grad + of_flat
            )
        return (None, None, *back, *of_grads)


_constants: MutableMapping[object, Tensor] = caches.cache("constants of steps")


def _constant(value: float, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if torch.is_inference_mode_enabled() or not may_call_autograd():
        # What is made here belongs to the mode, or to the transform.
        return torch.full(shape, value, dtype=like.dtype, device=like.device)
    key = value, shape, like.dtype, like.device
    found = _constants.get(key)
    if found is None:
        found = torch.full(shape, value, dtype=like.dtype, device=like.device)
        _constants[key] = found
    return found


def zero(like: Tensor) -> Tensor:
    """Return a 0-dim zero of the dtype of ``like``, the same one at each call.

    It is the negative one, which changes nothing that it is added to: 0.0 + -0.0 would be 0.0.
    """
    return _constant(-0.0, (), like)


def _padded(bucket: Bucket, tensors: Sequence[Tensor], value: float) -> list[Tensor]:
    """Return the tensors with what lies between them in the flat one."""
    found = list(tensors)
    for after, pad in _gaps(bucket.pads):
        found.insert(after + 1, _constant(value, (pad,), tensors[0]))
    return found


_known_gaps: MutableMapping[tuple[int, ...], tuple[tuple[int, int], ...]] = caches.cache(
    "places of padding"
)


def _gaps(pads: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return after which tensors there is padding, and how much, from the last to the first."""
    found = _known_gaps.get(pads)
    if found is None:
        if len(_known_gaps) > 512:
            _known_gaps.clear()
        found = tuple((i, pad) for i, pad in reversed(list(enumerate(pads))) if pad)
        _known_gaps[pads] = found
    return found


def _joined(bucket: Bucket, tensors: Sequence[Tensor], value: float, plain: bool = True) -> Tensor:
    """Return the tensors side by side, with ``value`` between; a single one as it is."""
    if len(tensors) == 1:
        return tensors[0]
    padded = _padded(bucket, tensors, value)
    if plain:
        return torch_private.flatten(padded)
    return torch.cat([tensor.reshape(-1) for tensor in padded])


def _split(bucket: Bucket, flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo `_joined`, without a graph; ``like`` are tensors of the shapes that are wanted."""
    if len(bucket.names) == 1:
        return [flat]
    pieces = torch_private.unflatten(flat, _padded(bucket, like, 1.0))
    return _without_pads(bucket, pieces)


def _split_differentiably(bucket: Bucket, flat: Tensor) -> list[Tensor]:
    if len(bucket.names) == 1:
        return [flat]
    sizes: list[int] = []
    for shape, pad in zip(bucket.shapes, bucket.pads, strict=True):
        sizes += [shape.numel(), pad] if pad else [shape.numel()]
    pieces = _without_pads(bucket, torch.split(flat, sizes))
    return [piece.view(shape) for piece, shape in zip(pieces, bucket.shapes, strict=True)]


def _without_pads(bucket: Bucket, pieces: Sequence[Tensor]) -> list[Tensor]:
    found = list(pieces)
    for after, _ in reversed(_gaps(bucket.pads)):
        del found[after + 1]
    return found


def _filled(bucket: Bucket, bars: Iterable[Tensor | None], like: Tensor) -> list[Tensor]:
    """Return zeros where no gradient has arrived, and dense ones where a sparse one has."""
    strided = torch.strided  # `is_sparse`, written out: this runs for each parameter at each step
    return [
        like.new_zeros(shape) if bar is None else bar if bar.layout == strided else bar.to_dense()
        for bar, shape in zip(bars, bucket.shapes, strict=True)
    ]
