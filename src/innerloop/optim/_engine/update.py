"""Three ways in which an `Elementwise` rule steps: without state, in lists, in flat buckets.

A rule that keeps nothing needs no layout at all. Large parameters stand alone, and `step_lists`
treats many of them in a few calls. Small ones lie side by side in one flat tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from innerloop._types import Grads, Params, Scalar
from innerloop._utils.execution import Mode, mode
from innerloop.errors import InvalidInputError
from innerloop.optim._engine.fused import Kernel, step
from innerloop.optim._engine.packing import (
    Bucket,
    Layout,
    Packed,
    pack,
    real_dtype,
    unpack,
    zeros,
)
from innerloop.optim._engine.precision import warn_of_half

_A_STATE = "a state"

Count = int | Tensor | Mapping[str, int | Tensor]
"""Steps taken: by all parameters, or by each of them."""

Stepped = tuple[dict[str, Tensor], dict[str, Any]]
"""New parameters by name, and the state fields of their bucket."""


@runtime_checkable
class Steps(Protocol):
    """What the three ways need of a rule; `Elementwise` describes each member."""

    scalars: ClassVar[Any]
    state_type: ClassVar[Any]

    def update_ignores_param(self, hyper: Mapping[str, Any]) -> bool:
        """True if the update does not depend on the parameter's value, bit for bit."""

    def step(
        self, grad: Tensor, param: Tensor, state: Any, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """Step one tensor."""

    def kernel(self, count: Scalar, hyper: Mapping[str, Any]) -> Kernel | None:
        """Step a bucket as one operation."""

    def step_lists(
        self, grads: list[Tensor], params: list[Tensor], state: Any, hyper: Mapping[str, float]
    ) -> tuple[list[Tensor], Any] | None:
        """Step several tensors in fewer calls."""


def without_state(
    rule: Steps, grads: Grads, state: Any, params: Params, hyper: Mapping[str, float]
) -> tuple[dict[str, Tensor], Any] | None:
    """Step a rule that keeps nothing: no layout is needed.

    Returns:
        None where `Elementwise.step_lists` does not take the tensors.
    """
    before = list(params.values())
    given: list[Any] = [grads[name] for name in params]
    if any(p.is_complex() or p.dtype != g.dtype for p, g in zip(before, given, strict=True)):
        return None
    state = state._replace(count=state.count + 1)
    stepped = rule.step_lists(given, before, state, hyper)
    if stepped is None:
        return None
    for p in stepped[0]:
        warn_of_half(p)
    return dict(zip(params, stepped[0], strict=True)), state


def one_by_one(
    rule: Steps, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Any] | None:
    """Step a rule that keeps nothing and does not pack, with hyper-parameters that are learned.

    Returns:
        None where a tensor or a hyper-parameter has to be prepared first.
    """
    if rule.scalars or not all(
        isinstance(value, (float, int)) or (isinstance(value, Tensor) and not value.ndim)
        for value in hyper.values()
    ):
        return None
    state = state._replace(count=state.count + 1)
    new: dict[str, Tensor] = {}
    for name, p in params.items():
        g = grads[name]
        if g is None or p.is_complex() or p.dtype != g.dtype or g.layout != torch.strided:
            return None
        new[name] = _cast(rule.step(g, p, state, hyper)[0], p)
        warn_of_half(new[name])
    return new, state


def in_lists(
    rule: Steps,
    layout: Layout,
    grads: Grads,
    params: Params,
    counts: Sequence[Any],
    old: Mapping[str, Packed | None],
    hyper: Mapping[str, Any],
) -> dict[int, Stepped]:
    """Step the parameters that stand alone by `Elementwise.step_lists`.

    Args:
        rule: the rule.
        layout: the buckets of this step.
        grads: the gradients.
        params: the parameters.
        counts: the steps taken so far, by the age of a bucket.
        old: the state fields, laid out as ``layout`` says.
        hyper: the hyper-parameters, all numbers.

    Returns:
        The index of a bucket -> its new parameter and state; the other buckets are left to
        `in_bucket`.
    """
    by_age: dict[int, list[int]] = {}
    for i, bucket in enumerate(layout):
        alone = bucket.active and len(bucket.names) == 1 and not bucket.is_complex
        if alone and isinstance(counts[bucket.age], int):
            by_age.setdefault(bucket.age, []).append(i)
    found: dict[int, Stepped] = {}
    for age, members in by_age.items():
        names = [layout[i].names[0] for i in members]
        given = [grads[name] for name in names]
        if any(
            g is None or g.dtype != params[n].dtype or g.layout != torch.strided
            for n, g in zip(names, given, strict=True)
        ):
            continue
        held = (
            None if packed is None else [packed.flats[i] for i in members]
            for packed in old.values()
        )
        before = rule.state_type(counts[age] + 1, *held)
        stepped = rule.step_lists(given, [params[name] for name in names], before, hyper)  # type: ignore[arg-type]
        if stepped is None:
            continue
        warn_of_half(stepped[0][0])
        for k, (i, name) in enumerate(zip(members, names, strict=True)):
            fields = {
                slot: None if kept is None else kept[k]
                for slot, kept in zip(old, stepped[1][1:], strict=True)
            }
            found[i] = {name: stepped[0][k]}, fields
    return found


def in_bucket(
    rule: Steps,
    bucket: Bucket,
    grads: Grads,
    params: Params,
    count: Scalar,
    fields: Mapping[str, Any],
    hyper: Mapping[str, Any],
) -> Stepped:
    """Step the parameters of one bucket, side by side.

    Args:
        rule: the rule.
        bucket: which parameters.
        grads: the gradients of all parameters.
        params: all parameters.
        count: the steps that those of the bucket have taken.
        fields: the state fields of the bucket.
        hyper: the hyper-parameters.

    Returns:
        The new parameters by name, and the new state fields.
    """
    fused = step(rule, bucket, grads, params, count, fields, hyper)
    if fused is not None:
        return fused
    result_only = len(bucket.names) > 1 and rule.update_ignores_param(hyper)
    param = like_bucket(bucket, params) if result_only else pack(bucket, params)
    values = _for_bucket(hyper, bucket, param)
    count = count + 1
    if rule.scalars and mode() is Mode.COMPILING:
        # A float that changes would be a constant there, and the step compiled anew each time.
        count = _as_tensor(count)
        fields = {n: _as_tensor(v) if n in rule.scalars else v for n, v in fields.items()}
    before = rule.state_type(count, *fields.values())
    stepped, after = rule.step(pack(bucket, grads), param, before, values)
    stepped = _cast(stepped, param)
    warn_of_half(stepped)
    new = {
        name: params[name] + piece if result_only else piece
        for name, piece in unpack(bucket, stepped).items()
    }
    return new, {name: _cast(t, param) for name, t in zip(fields, after[1:], strict=True)}


def advance(count: Count, layout: Layout, active: Mapping[str, bool] | None) -> Count:
    """Count a step for the parameters that took part in it; ``active`` is None if all did."""
    if active is None:
        return (
            {name: n + 1 for name, n in count.items()} if isinstance(count, Mapping) else count + 1
        )
    if not any(active.values()):
        return count
    return {
        name: (count[name] if isinstance(count, Mapping) else count) + bucket.active
        for bucket in layout
        for name in bucket.names
    }


def _for_bucket(hyper: Mapping[str, Any], bucket: Bucket, param: Tensor) -> dict[str, Any]:
    """Return the hyper-parameters as numbers, 0-dim tensors or tensors of the bucket's shape."""
    values: dict[str, Any] = {}
    for name, value in hyper.items():
        if isinstance(value, tuple):
            values[name] = tuple(_value(v, name, bucket, param) for v in value)
        else:
            values[name] = value if isinstance(value, float) else _value(value, name, bucket, param)
    return values


def _value(value: object, name: str, bucket: Bucket, param: Tensor) -> Scalar:
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise InvalidInputError(
                f"hyper-parameter {name!r} is a tensor of shape {tuple(value.shape)}: write a "
                "0-dim tensor for all parameters, "
                f"or one tensor per parameter by name, {{{name!r}: {{{bucket.names[0]!r}: tensor, "
                "...}}"
            )
        return value.reshape(()) if value.ndim else value
    if isinstance(value, Mapping):
        missing = [n for n in bucket.names if n not in value]
        if missing:
            raise InvalidInputError(
                f"hyper-parameter {name!r} is given per parameter, but has no entry for "
                f"{missing}; it has {list(value)}"
            )
        if len(bucket.names) == 1:
            alone = value[bucket.names[0]]
            if isinstance(alone, (int, float)):
                return alone  # as in a param group of its own: in bfloat16, .999 would be 1
            if isinstance(alone, Tensor) and alone.numel() == 1:
                return alone.reshape(())
        return pack(
            _as_real(bucket),
            {n: _expanded(value[n], name, n, s, bucket, param) for n, s in _shapes(bucket)},
        )
    raise InvalidInputError(
        f"hyper-parameter {name!r} is {value!r}: write a number, a 0-dim tensor, or a mapping "
        "from parameter names to tensors"
    )


def _shapes(bucket: Bucket) -> zip[tuple[str, torch.Size]]:
    return zip(bucket.names, bucket.shapes, strict=True)


def _as_real(bucket: Bucket) -> Bucket:
    return bucket._replace(is_complex=False)


def _expanded(
    value: object, hyper: str, name: str, shape: torch.Size, bucket: Bucket, param: Tensor
) -> Tensor:
    """Expand one parameter's hyper-parameter to the (real) shape and dtype of the parameter."""
    tensor = torch.as_tensor(value, dtype=param.dtype, device=param.device)
    if hyper == _A_STATE and bucket.is_complex and tensor.shape == (*shape, 2):
        return tensor
    if tensor.numel() == 1:
        tensor = tensor.reshape(())
    elif tensor.shape != shape:
        raise InvalidInputError(
            f"{hyper}[{name!r}] has shape {tuple(tensor.shape)}, the parameter has {tuple(shape)}: "
            "write one number or a tensor of the parameter's shape"
        )
    if bucket.is_complex:
        return (tensor.unsqueeze(-1) if tensor.ndim else tensor).expand(*shape, 2)
    return tensor.expand(shape)


def _cast(value: object, like: Tensor) -> Any:
    """Cast to the dtype of ``like``, except numbers and one number for many elements."""
    if not isinstance(value, Tensor) or value.dtype == like.dtype or value.ndim < like.ndim:
        return value
    return value.to(like.dtype)


def repack(layout: Layout, flats: list[Any], params: Params) -> Packed | None:
    """Return a state field after a step: a new one is zero where no gradient has arrived yet."""
    if all(flat is None for flat in flats):
        return None
    return Packed(
        layout,
        tuple(
            zeros(b, params) if flat is None else flat
            for b, flat in zip(layout, flats, strict=True)
        ),
    )


def _as_tensor(number: Scalar) -> Tensor:
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=torch.float64)


def scalar_field(layout: Layout, held: Mapping[str, Any], params: Params) -> Packed:
    """Lay out one number per parameter: one for a bucket that shares it, else one per element."""
    if isinstance(held, Packed) and (held.layout is layout or held.layout == layout):
        return held
    flats = []
    for bucket in layout:
        values = [_both_parts(held[name]) for name in bucket.names]
        first = values[0]
        if all(
            v is first or (isinstance(v, float) and isinstance(first, float) and v == first)
            for v in values
        ):
            flats.append(first)
        else:
            flats.append(
                _value(
                    dict(zip(bucket.names, values, strict=True)),
                    _A_STATE,
                    bucket,
                    like_bucket(bucket, params),
                )
            )
    return Packed(layout, tuple(flats))


def _both_parts(value: object) -> object:
    """Split what a complex parameter keeps into its real and its imaginary part."""
    return torch.view_as_real(value) if isinstance(value, Tensor) and value.is_complex() else value


def like_bucket(bucket: Bucket, params: Params) -> Tensor:
    """Return a scalar of the dtype and on the device of a packed bucket."""
    return params[bucket.names[0]].new_zeros((), dtype=real_dtype(bucket, params))
