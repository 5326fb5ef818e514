"""Update rules that treat every element alike: small parameters side by side in one flat tensor."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from innerloop._types import Grads, Params
from innerloop._utils import torch_private
from innerloop.errors import InvalidInputError
from innerloop.optim._base import Rule
from innerloop.optim._engine.grads import by_step_count, which_have_gradient
from innerloop.optim._engine.packing import (
    FLAT_LIMIT,
    Bucket,
    Layout,
    Packed,
    layout_of,
    pack,
    real_dtype,
    unpack,
    zeros,
)
from innerloop.optim._engine.precision import warn_of_half
from innerloop.optim._settings import check_state

_A_STATE = "a state"


class Elementwise(Rule):
    """A rule that treats every element of every parameter alike: one method to write, `step`, for *one* tensor.

    This class adds the names, flat packing of small tensors, hyper-parameters given as tensors or
    per parameter, skipped gradients and step counts.
    """

    scalars: ClassVar[tuple[str, ...]] = ()
    """State fields that hold one number per parameter (1 at the start), not a tensor of its shape: numbers as long as the
    hyper-parameters are, 0-dim tensors when those are tensors, and of the parameter's shape when
    those have it."""

    flat_limit: ClassVar[int] = FLAT_LIMIT
    """Elements; a larger parameter is updated alone and never copied."""

    def packs_small_params(self, hyper: Mapping[str, Any]) -> bool:
        """Whether small parameters are updated as one flat tensor; below about four operations per tensor that costs more than it saves."""
        return True

    def update_ignores_param(self, hyper: Mapping[str, Any]) -> bool:
        """Whether ``step(grad, param) == param + step(grad, 0)`` to the last bit: then parameters need not be packed, only the result."""
        return False

    @abc.abstractmethod
    def step(
        self, grad: Tensor, param: Tensor, state: Any, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """The rule itself, for one tensor: ``(new_param, new_state)``.

        Args:
            grad: the gradient, of the shape of ``param``; real.
            param: the parameter; may be several parameters side by side, so every operation must be
                elementwise.
            state: ``state_type`` with tensors of the shape of ``param`` (or None) and ``count``,
                the number of the step being taken (1 at the first one), an int or a tensor.
            hyper: each of ``hyper_names``: a number, a 0-dim tensor, or a tensor of the shape of
                ``param``.
        """

    def step_lists(
        self, grads: list[Tensor], params: list[Tensor], state: Any, hyper: Mapping[str, float]
    ) -> tuple[list[Tensor], Any] | None:
        """`step` for several tensors in fewer calls, with state fields that are lists; None: one by one. Optional, for speed."""
        return None

    def init(self, params: Params) -> Any:
        resolved = self.resolve(None)
        used = self.fields(resolved)
        layout = self._layout(params, resolved)
        return self.state_type(
            0,
            *(self._start(name, layout, params) if name in used else None for name in self.slots()),
        )

    def _start(self, slot: str, layout: Layout, params: Params) -> Packed:
        return Packed(
            layout,
            tuple(1.0 if slot in self.scalars else zeros(bucket, params) for bucket in layout),
        )

    def update(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], Any]:
        check_state(self, state, self.state_type)
        resolved = self.resolve(hyper)
        active = which_have_gradient(grads, params)
        lists = self._takes_lists(resolved)
        if (
            lists
            and active is None
            and params
            and isinstance(state.count, int)
            and not self.fields(resolved)
        ):
            done = self._without_state(grads, state, params, resolved)
            if done is not None:
                return done
        ages, counts = by_step_count(state.count, params)
        layout = self._layout(params, resolved, active, ages)
        old = {
            n: self._laid_out(n, s, layout, params)
            for n, s in zip(self.slots(), state[1:], strict=True)
        }
        new: dict[str, list[Any]] = {name: [] for name in old}
        new_params = dict(params)
        together = self._in_lists(layout, grads, params, counts, old, resolved) if lists else {}
        for i, bucket in enumerate(layout):
            local = {
                name: None if packed is None else packed.flats[i] for name, packed in old.items()
            }
            if i in together:
                new_params[bucket.names[0]], local = together[i]
            elif bucket.active:
                moves = len(bucket.names) > 1 and self.update_ignores_param(resolved)
                param = _real(bucket, params) if moves else pack(bucket, params)
                values = _for_bucket(resolved, bucket, param)
                count = counts[bucket.age] + 1
                if (
                    self.scalars and torch.compiler.is_compiling()
                ):  # a float that changes is a constant there: compiled anew each time
                    count = _as_tensor(count)
                    local = {n: _as_tensor(v) if n in self.scalars else v for n, v in local.items()}
                before = self.state_type(count, *local.values())
                stepped, after = self.step(pack(bucket, grads), param, before, values)
                stepped = _cast(stepped, param)
                warn_of_half(stepped)
                for name, piece in unpack(bucket, stepped).items():
                    new_params[name] = params[name] + piece if moves else piece
                local = {name: _cast(t, param) for name, t in zip(local, after[1:], strict=True)}
            for name, tensor in local.items():
                new[name].append(tensor)
        slots = (_repack(layout, flats, params) for flats in new.values())
        return new_params, self.state_type(_advance(state.count, layout, active), *slots)

    def _layout(
        self,
        params: Params,
        hyper: Mapping[str, Any],
        active: Mapping[str, bool] | None = None,
        ages: Mapping[str, int] | None = None,
    ) -> Layout:
        return layout_of(
            params, active, ages, self.flat_limit if self.packs_small_params(hyper) else 0
        )

    def _takes_lists(self, hyper: Mapping[str, Any]) -> bool:
        """Whether `step_lists` is there, and nothing looks closer than autograd does."""
        own = type(self).step_lists is not Elementwise.step_lists
        plain = own and not torch.compiler.is_compiling() and not torch_private.inside_transform()
        return plain and all(isinstance(value, (int, float)) for value in hyper.values())

    def _without_state(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], Any] | None:
        """A step of a rule that keeps nothing, for which no layout is needed; None where `step_lists` does not take the tensors."""
        before = list(params.values())
        given: list[Any] = [grads[name] for name in params]
        if any(p.is_complex() or p.dtype != g.dtype for p, g in zip(before, given, strict=True)):
            return None
        state = state._replace(count=state.count + 1)
        stepped = self.step_lists(given, before, state, hyper)
        if stepped is None:
            return None
        for p in stepped[0]:
            warn_of_half(p)
        return dict(zip(params, stepped[0], strict=True)), state

    def _in_lists(
        self,
        layout: Layout,
        grads: Grads,
        params: Params,
        counts: list[Any],
        old: Mapping[str, Packed | None],
        hyper: Mapping[str, Any],
    ) -> dict[int, tuple[Tensor, dict[str, Any]]]:
        """What `step_lists` makes of the parameters that stand alone, by the index of their bucket: parameter and state fields."""
        by_age: dict[int, list[int]] = {}
        for i, bucket in enumerate(layout):
            if (
                bucket.active
                and len(bucket.names) == 1
                and not bucket.is_complex
                and isinstance(counts[bucket.age], int)
            ):
                by_age.setdefault(bucket.age, []).append(i)
        found: dict[int, tuple[Tensor, dict[str, Any]]] = {}
        for age, members in by_age.items():
            names = [layout[i].names[0] for i in members]
            given = [grads[name] for name in names]
            if any(
                g is None or g.dtype != params[n].dtype or g.layout != torch.strided
                for n, g in zip(names, given, strict=True)
            ):
                continue
            state = self.state_type(
                counts[age] + 1,
                *(
                    None if packed is None else [packed.flats[i] for i in members]
                    for packed in old.values()
                ),
            )
            stepped = self.step_lists(given, [params[name] for name in names], state, hyper)  # type: ignore[arg-type]
            if stepped is None:
                continue
            warn_of_half(stepped[0][0])
            for k, i in enumerate(members):
                fields = {
                    name: None if held is None else held[k]
                    for name, held in zip(old, stepped[1][1:], strict=True)
                }
                found[i] = stepped[0][k], fields
        return found

    def restored(self, slot: str, named: Mapping[str, Any], params: Params) -> Packed:
        layout = layout_of(params, None, None)
        if slot in self.scalars:
            return _scalars(
                layout, {n: 1.0 if v is None else float(v) for n, v in named.items()}, params
            )
        return Packed.of(
            layout,
            {
                n: torch.zeros_like(params[n]) if v is None else v.detach().clone()
                for n, v in named.items()
            },
        )

    def _laid_out(
        self, slot: str, held: Mapping[str, Any] | None, layout: Layout, params: Params
    ) -> Packed | None:
        """A state field in the buckets of ``layout``."""
        if held is None:
            return None
        try:
            return (
                _scalars(layout, held, params) if slot in self.scalars else Packed.of(layout, held)
            )
        except KeyError as error:
            raise InvalidInputError(
                f"the state knows no parameter {error}: it belongs to other parameters; pass what "
                "init(params) or the last update "
                "returned"
            ) from None


def _advance(count: Any, layout: Layout, active: Mapping[str, bool] | None) -> Any:
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
    """The hyper-parameters as numbers, 0-dim tensors or tensors of the bucket's shape."""
    values: dict[str, Any] = {}
    for name, value in hyper.items():
        if isinstance(value, tuple):
            values[name] = tuple(_value(v, name, bucket, param) for v in value)
        else:
            values[name] = value if isinstance(value, float) else _value(value, name, bucket, param)
    return values


def _value(value: Any, name: str, bucket: Bucket, param: Tensor) -> Any:
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
    value: Any, hyper: str, name: str, shape: torch.Size, bucket: Bucket, param: Tensor
) -> Tensor:
    """One parameter's value of a hyper-parameter, as a tensor of the parameter's (real) shape and dtype."""
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


def _cast(value: Any, like: Tensor) -> Any:
    """In the dtype of the parameter; what is no tensor, or one number for many elements, keeps its own."""
    if not isinstance(value, Tensor) or value.dtype == like.dtype or value.ndim < like.ndim:
        return value
    return value.to(like.dtype)


def _repack(layout: Layout, flats: list[Any], params: Params) -> Packed | None:
    """A state field after a step; one that just came into being is zero where no gradient has arrived yet."""
    if all(flat is None for flat in flats):
        return None
    return Packed(
        layout,
        tuple(
            zeros(b, params) if flat is None else flat
            for b, flat in zip(layout, flats, strict=True)
        ),
    )


def _as_tensor(number: Any) -> Tensor:
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=torch.float64)


def _scalars(layout: Layout, held: Mapping[str, Any], params: Params) -> Packed:
    """One number for each bucket if its parameters share it, else one element for each of theirs."""
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
                    _real(bucket, params),
                )
            )
    return Packed(layout, tuple(flats))


def _both_parts(value: Any) -> Any:
    """What a complex parameter keeps for its real and its imaginary part, as two numbers again."""
    return torch.view_as_real(value) if isinstance(value, Tensor) and value.is_complex() else value


def _real(bucket: Bucket, params: Params) -> Tensor:
    """Something of the dtype and on the device of a packed bucket."""
    return params[bucket.names[0]].new_zeros((), dtype=real_dtype(bucket, params))
