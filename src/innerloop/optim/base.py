"""What an optimizer is: a pure pair of functions on named tensors."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from innerloop.errors import InvalidInputError
from innerloop.optim.packing import Bucket, Layout, Packed, layout_of, pack, real_dtype, unpack, zeros

Scalar = int | float | Tensor
Hyper = Scalar | Mapping[str, Scalar]
"""A hyper-parameter: a number, a 0-dim tensor, or a mapping from parameter names to scalars or tensors of the parameter's shape."""

Params = Mapping[str, Tensor]
Grads = Mapping[str, Tensor | None]


class Optimizer(abc.ABC):
    """A pure pair ``init(params) -> state``, ``update(grads, state, params, hyper) -> (params, state)``.

    Both are functions of their arguments alone, made of differentiable operations, and change none of them: they can be
    differentiated, vmapped and compiled like any other function.
    """

    @abc.abstractmethod
    def init(self, params: Params) -> Any:
        """The state before the first step.

        Args:
            params: named parameter tensors.

        Returns:
            A pytree of tensors and numbers.
        """

    @abc.abstractmethod
    def update(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], Any]:
        """One step.

        Args:
            grads: a gradient for each parameter; None (or no entry) leaves that parameter and its state as they are, as
                ``torch.optim`` does for ``p.grad is None``.
            state: what `init` or the last `update` returned.
            params: named parameter tensors.
            hyper: overrides of hyper-parameters, ``{"lr": tensor}``.

        Returns:
            ``(new_params, new_state)``.

        Raises:
            InvalidInputError: a gradient for an unknown parameter, an unknown or unusable hyper-parameter.
        """


class Rule(Optimizer):
    """An update rule that treats every element of every parameter alike: one file per rule, one method to write.

    A subclass is a frozen dataclass whose fields are the constructor arguments of the ``torch.optim`` class, in its order. It
    says which fields are real-valued (``hyper_names``), gives the NamedTuple of its state (first field ``count``), and
    implements `step` for *one* tensor. This class adds the names, flat packing of small tensors, hyper-parameters given as
    tensors or per parameter, skipped gradients and step counts.
    """

    hyper_names: ClassVar[tuple[str, ...]]
    """The real-valued hyper-parameters, each replaceable by a tensor."""

    state_type: ClassVar[Any]
    """NamedTuple of the state: ``count`` first, then one field per tensor that the rule keeps for each parameter."""

    torch_class: ClassVar[type[torch.optim.Optimizer]]
    """The optimizer of ``torch.optim`` that it is equal to."""

    torch_state: ClassVar[Mapping[str, str]] = {}
    """State field -> key in ``torch.optim``'s ``state[p]``."""

    torch_counts: ClassVar[bool] = True
    """Whether torch keeps the step count in ``state[p]["step"]``."""

    by_torch_class: ClassVar[dict[type[torch.optim.Optimizer], type[Rule]]] = {}
    """Every rule that says its ``torch_class``."""

    def __init_subclass__(cls) -> None:
        if "torch_class" in vars(cls):
            Rule.by_torch_class[cls.torch_class] = cls

    @abc.abstractmethod
    def fields(self, hyper: Mapping[str, Any]) -> tuple[str, ...]:
        """The state fields that the rule uses with these hyper-parameters; the others are None."""

    def packs(self, hyper: Mapping[str, Any]) -> bool:
        """Whether small parameters are updated as one flat tensor; below about four operations per tensor that costs more than it saves."""
        return True

    def translates(self, hyper: Mapping[str, Any]) -> bool:
        """Whether ``step(grad, param) == param + step(grad, 0)`` to the last bit: then parameters need not be packed, only the result."""
        return False

    @abc.abstractmethod
    def step(self, grad: Tensor, param: Tensor, state: Any, hyper: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The rule itself, for one tensor: ``(new_param, new_state)``.

        Args:
            grad: the gradient, of the shape of ``param``; real.
            param: the parameter; may be several parameters side by side, so every operation must be elementwise.
            state: ``state_type`` with tensors of the shape of ``param`` (or None) and ``count``, the number of the step
                being taken (1 at the first one), an int or a tensor.
            hyper: each of ``hyper_names``: a number, a 0-dim tensor, or a tensor of the shape of ``param``.
        """

    def validate(self, hyper: Mapping[str, Any]) -> None:
        """Raise if a hyper-parameter given as a number is out of its range; tensors are not inspected."""

    def init(self, params: Params) -> Any:
        resolved = self._resolve(None)
        used = self.fields(resolved)
        layout = layout_of(params, None, None, self.packs(resolved))
        return self.state_type(0, *(_zeros(layout, params) if name in used else None for name in self.slots()))

    @classmethod
    def slots(cls) -> tuple[str, ...]:
        """The state fields that hold tensors."""
        return cls.state_type._fields[1:]

    def update(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], Any]:
        resolved = self._resolve(hyper)
        active = _active(grads, params)
        ages, counts = _ages(state.count, params)
        layout = layout_of(params, active, ages, self.packs(resolved))
        old = _unpacked(self.slots(), state, layout)
        new: dict[str, list[Tensor | None]] = {name: [] for name in old}
        new_params = dict(params)
        for i, bucket in enumerate(layout):
            local = {name: None if packed is None else packed.flats[i] for name, packed in old.items()}
            if bucket.active:
                moves = len(bucket.names) > 1 and self.translates(resolved)
                param = (
                    pack(bucket, params)
                    if not moves
                    else params[bucket.names[0]].new_zeros((), dtype=real_dtype(bucket, params))
                )
                values = _for_bucket(resolved, bucket, param)
                before = self.state_type(counts[bucket.age] + 1, *local.values())
                stepped, after = self.step(pack(bucket, grads), param, before, values)
                stepped = _cast(stepped, param)
                for name, piece in unpack(bucket, stepped).items():
                    new_params[name] = params[name] + piece if moves else piece
                local = {name: None if t is None else _cast(t, param) for name, t in zip(local, after[1:], strict=True)}
            for name, tensor in local.items():
                new[name].append(tensor)
        slots = (_repack(layout, flats, params) for flats in new.values())
        return new_params, self.state_type(_advance(state.count, layout, active), *slots)

    def _resolve(self, hyper: Mapping[str, Any] | None) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.hyper_names}
        if not hyper:
            return values  # the constructor has looked at them
        for name, value in hyper.items():
            if name not in values:
                raise InvalidInputError(
                    f"{self!r} has no hyper-parameter {name!r}; it has {', '.join(self.hyper_names)}. "
                    "Flags such as nesterov or amsgrad cannot be tensors: set them in the constructor."
                )
            if isinstance(values[name], tuple) and not (isinstance(value, tuple) and len(value) == len(values[name])):
                raise InvalidInputError(
                    f"{name!r} is a pair, but got {type(value).__name__}: write "
                    f"hyper={{{name!r}: (first, second)}}, each a number or a tensor"
                )
        values |= hyper
        if not torch.compiler.is_compiling():  # a message with a symbolic number in it is not compiled
            self.validate(values)
        return values

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.repr and (field.name == "lr" or isinstance(value, (Tensor, Mapping)) or value != field.default):
                shown.append(f"{field.name}={_shown(value)}")
        return f"{type(self).__name__.lower()}({', '.join(shown)})"


def is_used(value: Hyper) -> bool:
    """Whether a term weighted by ``value`` is computed: a number 0 switches it off, a tensor never does (its gradient counts)."""
    return not isinstance(value, (int, float)) or value != 0


def add_scaled(x: Tensor, y: Tensor, alpha: Scalar) -> Tensor:
    """``x + alpha * y``; with a number, by the kernel that ``torch.optim`` uses, so that the bits agree."""
    return x + alpha * y if isinstance(alpha, Tensor) else torch.add(x, y, alpha=alpha)


def require(condition: bool, message: str) -> None:
    """Raise `InvalidInputError` unless ``condition``."""
    if not condition:
        raise InvalidInputError(message)


def numbers(value: Any) -> Iterator[float]:
    """The plain numbers in a hyper-parameter; tensors are not looked at, that would wait for the device."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, Mapping):
        yield from (v for v in value.values() if isinstance(v, (int, float)))


def check_nonnegative(hyper: Mapping[str, Any], *names: str) -> None:
    """Raise if a hyper-parameter among ``names`` is a negative number."""
    for name in names:
        for value in numbers(hyper[name]):
            require(value >= 0, f"{name}={value} is negative (or NaN); {name} must be >= 0")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    return f"({', '.join(map(_shown, value))})" if isinstance(value, tuple) else repr(value)


def _unpacked(slots: tuple[str, ...], state: Any, layout: Layout) -> dict[str, Packed | None]:
    """The state's fields in the buckets of ``layout``."""
    try:
        return {n: None if slot is None else Packed.of(layout, slot) for n, slot in zip(slots, state[1:], strict=True)}
    except KeyError as error:
        raise InvalidInputError(
            f"the state knows no parameter {error}: it belongs to other parameters; pass what init(params) or the last update returned"
        ) from None


def _active(grads: Grads, params: Params) -> dict[str, bool] | None:
    """Which parameters have a gradient; None if all have."""
    everything = True
    for name, p in params.items():
        g = grads.get(name)
        if g is None:
            everything = False
        elif g.shape != p.shape:
            raise InvalidInputError(
                f"the gradient of {name!r} has shape {tuple(g.shape)}, the parameter has {tuple(p.shape)}"
            )
    if len(grads) > len(params) or not everything:
        unknown = [name for name in grads if name not in params]
        if unknown:
            raise InvalidInputError(f"gradients for {unknown} but the parameters are {list(params)}")
    return None if everything else {name: grads.get(name) is not None for name in params}


def _ages(count: Any, params: Params) -> tuple[dict[str, int] | None, list[Any]]:
    """Split parameters by step count: an index for each parameter, and the counts that the indices stand for."""
    if not isinstance(count, Mapping):
        return None, [count]
    distinct = sorted(set(count.values()))
    missing = [name for name in params if name not in count]
    if missing:
        raise InvalidInputError(f"the state knows no parameter {missing}: it belongs to other parameters")
    return {name: distinct.index(count[name]) for name in params}, distinct


def _advance(count: Any, layout: Layout, active: Mapping[str, bool] | None) -> Any:
    if active is None:
        return {name: n + 1 for name, n in count.items()} if isinstance(count, Mapping) else count + 1
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
                f"hyper-parameter {name!r} is a tensor of shape {tuple(value.shape)}: write a 0-dim tensor for all parameters, "
                f"or one tensor per parameter by name, {{{name!r}: {{{bucket.names[0]!r}: tensor, ...}}}}"
            )
        return value.reshape(()) if value.ndim else value
    if isinstance(value, Mapping):
        missing = [n for n in bucket.names if n not in value]
        if missing:
            raise InvalidInputError(
                f"hyper-parameter {name!r} is given per parameter, but has no entry for {missing}; it has {list(value)}"
            )
        return pack(_as_real(bucket), {n: _expanded(value[n], name, n, s, bucket, param) for n, s in _shapes(bucket)})
    raise InvalidInputError(
        f"hyper-parameter {name!r} is {value!r}: write a number, a 0-dim tensor, or a mapping from parameter names to tensors"
    )


def _shapes(bucket: Bucket) -> zip[tuple[str, torch.Size]]:
    return zip(bucket.names, bucket.shapes, strict=True)


def _as_real(bucket: Bucket) -> Bucket:
    return bucket._replace(is_complex=False)


def _expanded(value: Any, hyper: str, name: str, shape: torch.Size, bucket: Bucket, param: Tensor) -> Tensor:
    """One parameter's value of a hyper-parameter, as a tensor of the parameter's (real) shape and dtype."""
    tensor = torch.as_tensor(value, dtype=param.dtype, device=param.device)
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


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def _repack(layout: Layout, flats: list[Tensor | None], params: Params) -> Packed | None:
    """A state field after a step; one that just came into being is zero where no gradient has arrived yet."""
    if all(flat is None for flat in flats):
        return None
    return Packed(
        layout, tuple(zeros(b, params) if flat is None else flat for b, flat in zip(layout, flats, strict=True))
    )


def _zeros(layout: Layout, params: Params) -> Packed:
    return Packed(layout, tuple(zeros(bucket, params) for bucket in layout))
