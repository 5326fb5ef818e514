r"""Functions whose first two derivatives are written by hand, and the higher ones are not.

For :math:`y = f(x)` with several tensors :math:`x`, a cotangent :math:`\bar y` and a tangent
:math:`\dot x`, a `TwiceDifferentiable` knows

.. math::
    \mathrm{forward} = f(x), \qquad
    \mathrm{vjp} = \bar y^\top f'(x), \qquad
    \mathrm{jvp} = f'(x)\,\dot x, \qquad
    \mathrm{vjp\_of\_jvp} = \nabla_x \bigl\langle \bar y,\ f'(x)\,\dot x \bigr\rangle .

That is enough for all first and second derivatives, because the two halves are each other's
derivatives: the backward of *vjp* along :math:`u` is *vjp_of_jvp* with :math:`\dot x = u` (and
*jvp* for :math:`\bar y`), the tangent of *vjp* is *vjp_of_jvp* plus another *vjp*, and the backward
of *jvp* is *vjp_of_jvp* and *vjp*. A third derivative is taken of the function's reference, by
autograd.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from innerloop._utils import torch_private
from innerloop._utils.execution import Mode, mode
from innerloop.errors import NotDifferentiableError

Tensors = tuple[Tensor, ...]
Constants = tuple[Tensor | None, ...]
_vjp: Any = torch.func.vjp
_jvp: Any = torch.func.jvp


class TwiceDifferentiable(abc.ABC):
    """A function of tensors, with static settings.

    ``inputs`` are differentiated, ``constants`` are not. All tensors may have further dimensions in
    front, the same number for all (that is how ``vmap`` is done), unless `draws` says that the
    function draws random numbers by position. The methods run without a graph, on plain tensors,
    except for `reference`.
    """

    draws: bool = False

    @abc.abstractmethod
    def forward(self, inputs: Tensors, constants: Constants) -> Tensors:
        """Compute f(x)."""

    @abc.abstractmethod
    def vjp(
        self, inputs: Tensors, constants: Constants, outputs: Constants, cotangents: Tensors
    ) -> Tensors:
        """Compute the cotangent of each input; ``outputs`` is f(x), or Nones if it was not kept."""

    @abc.abstractmethod
    def jvp(self, inputs: Tensors, constants: Constants, tangents: Tensors) -> Tensors:
        """Compute the tangent of each output."""

    @abc.abstractmethod
    def vjp_of_jvp(
        self,
        inputs: Tensors,
        constants: Constants,
        outputs: Constants,
        cotangents: Tensors,
        tangents: Tensors,
    ) -> tuple[Tensors, Tensors]:
        """Compute the gradient of ⟨cotangents, jvp(tangents)⟩ by the inputs, and jvp(tangents)."""

    @abc.abstractmethod
    def reference(self, inputs: Tensors, constants: Constants) -> Tensors:
        """Compute f(x) by operations of torch that have derivatives of any order."""


def evaluate(function: TwiceDifferentiable, inputs: Tensors, constants: Constants = ()) -> Tensors:
    """Compute f(x), differentiable in reverse mode any number of times, in forward mode once."""
    out: Tensors = _Forward.apply(function, (len(inputs), len(constants)), *inputs, *constants)
    return out


def may_be_differentiated(*tensors: Tensor | None) -> bool:
    """True if someone may ask for a derivative by one of ``tensors``, of whatever order."""
    if mode() is Mode.COMPILING:
        return True
    if not torch.is_grad_enabled() and mode() is not Mode.TRANSFORMED:
        return False
    return any(x is not None and torch_private.has_derivative(x) for x in tensors)


if TYPE_CHECKING:

    class _Context(FunctionCtx):
        """The context of a `_Derivative`: its function, and how many tensors each group has."""

        function: TwiceDifferentiable
        sizes: tuple[int, ...]
        saved_tensors: tuple[Tensor | None, ...]

else:
    _Context = FunctionCtx


class _Derivative(torch.autograd.Function):
    """``apply(function, sizes, *tensors)``: groups of tensors, of these sizes, for one method."""

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.function, ctx.sizes, *args = inputs
        ctx.save_for_backward(*args)
        ctx.save_for_forward(*args)

    @classmethod
    def vmap(
        cls,
        info: Any,
        in_dims: tuple[Any, ...],
        function: TwiceDifferentiable,
        sizes: tuple[int, ...],
        *args: Tensor | None,
    ) -> tuple[Tensors, tuple[int, ...]]:
        moved = [
            _in_front(x, dim, info.batch_size) for x, dim in zip(args, in_dims[2:], strict=True)
        ]
        # Random numbers are drawn by position: each row must see those of its own forward pass.
        if function.draws:
            rows = [
                cls.apply(function, sizes, *(None if x is None else x[i] for x in moved))
                for i in range(info.batch_size)
            ]
            out = tuple(map(torch.stack, zip(*rows, strict=True)))
        else:
            out = cls.apply(function, sizes, *moved)
        return out, (0,) * len(out)


class _Forward(_Derivative):
    """(inputs, constants) -> outputs."""

    @staticmethod
    def forward(
        function: TwiceDifferentiable, sizes: tuple[int, ...], *args: Tensor | None
    ) -> Tensors:
        return _own(function.forward(*_split(args, *sizes)))

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.function, ctx.sizes, *args = inputs
        ctx.save_for_backward(*args, *output)
        ctx.save_for_forward(*args)

    @staticmethod
    def backward(ctx: _Context, *cotangents: Tensor) -> Constants:
        inputs, constants, outputs = _split(ctx.saved_tensors, *ctx.sizes, len(cotangents))
        pulled = _apply(_Vjp, ctx.function, inputs, constants, outputs, cotangents)
        return (None, None, *pulled, *_nothing(constants))

    @staticmethod
    def jvp(ctx: _Context, _: object, __: object, *tangents: Tensor | None) -> Tensors:
        inputs, constants = _split(ctx.saved_tensors, *ctx.sizes)
        return _apply(_Jvp, ctx.function, inputs, constants, tangents[: len(inputs)])


class _Vjp(_Derivative):
    """(inputs, constants, outputs, cotangents) -> cotangents of the inputs.

    The outputs follow from the inputs, so they have no gradient of their own.
    """

    @staticmethod
    def forward(
        function: TwiceDifferentiable, sizes: tuple[int, ...], *args: Tensor | None
    ) -> Tensors:
        return _own(function.vjp(*_split(args, *sizes)))

    @staticmethod
    def backward(ctx: _Context, *along: Tensor) -> Constants:
        inputs, constants, outputs, cotangents = _split(ctx.saved_tensors, *ctx.sizes)
        found = _apply(_VjpOfJvp, ctx.function, inputs, constants, outputs, cotangents, along)
        gradients, pushed = _split(found, len(inputs), len(cotangents))
        return (None, None, *gradients, *_nothing(constants), *_nothing(outputs), *pushed)

    @staticmethod
    def jvp(ctx: _Context, _: object, __: object, *tangents: Tensor | None) -> Tensors:
        inputs, constants, outputs, cotangents = _split(ctx.saved_tensors, *ctx.sizes)
        along, _, _, moved = _split(tangents, *ctx.sizes)
        found = _apply(_VjpOfJvp, ctx.function, inputs, constants, outputs, cotangents, along)
        more = _apply(_Vjp, ctx.function, inputs, constants, outputs, moved)
        return tuple(a + b for a, b in zip(found, more, strict=False))


class _Jvp(_Derivative):
    """(inputs, constants, tangents) -> tangents of the outputs."""

    @staticmethod
    def forward(
        function: TwiceDifferentiable, sizes: tuple[int, ...], *args: Tensor | None
    ) -> Tensors:
        return _own(function.jvp(*_split(args, *sizes)))

    @staticmethod
    def backward(ctx: _Context, *cotangents: Tensor) -> Constants:
        inputs, constants, tangents = _split(ctx.saved_tensors, *ctx.sizes)
        outputs = _nothing(cotangents)
        found = _apply(_VjpOfJvp, ctx.function, inputs, constants, outputs, cotangents, tangents)
        pulled = _apply(_Vjp, ctx.function, inputs, constants, outputs, cotangents)
        return (None, None, *found[: len(inputs)], *_nothing(constants), *pulled)

    @staticmethod
    def jvp(ctx: _Context, *_: object) -> Tensors:
        raise NotDifferentiableError(
            f"{type(ctx.function).__name__}: a tangent of a tangent was asked for, which torch "
            "would silently drop here. Take one of the two derivatives in reverse: torch.func.jvp "
            "over torch.func.grad."
        )


class _VjpOfJvp(_Derivative):
    """(inputs, constants, outputs, cotangents, tangents) -> gradients, tangents of the outputs."""

    @staticmethod
    def forward(
        function: TwiceDifferentiable, sizes: tuple[int, ...], *args: Tensor | None
    ) -> Tensors:
        gradients, pushed = function.vjp_of_jvp(*_split(args, *sizes))
        return _own((*gradients, *pushed))

    @staticmethod
    def backward(ctx: _Context, *given: Tensor) -> Constants:
        inputs, constants, outputs, cotangents, tangents = _split(ctx.saved_tensors, *ctx.sizes)
        reference = _reference_vjp_of_jvp(ctx.function, constants)
        x, y, u = _vjp(reference, inputs, cotangents, tangents)[1](given)
        return (None, None, *x, *_nothing(constants), *_nothing(outputs), *y, *u)

    @staticmethod
    def jvp(ctx: _Context, _: object, __: object, *given: Tensor | None) -> Tensors:
        inputs, constants, _, cotangents, tangents = _split(ctx.saved_tensors, *ctx.sizes)
        x, _, _, y, u = _split(given, *ctx.sizes)
        reference = _reference_vjp_of_jvp(ctx.function, constants)
        pushed: Tensors = _jvp(reference, (inputs, cotangents, tangents), (x, y, u))[1]
        return pushed


def _reference_vjp_of_jvp(
    function: TwiceDifferentiable, constants: Constants
) -> Callable[[Tensors, Tensors, Tensors], Tensors]:
    """Return `vjp_of_jvp` of the function's reference: the pullback of its pullback."""

    def vjp_of_jvp(inputs: Tensors, cotangents: Tensors, tangents: Tensors) -> Tensors:
        def pulled(inputs: Tensors, cotangents: Tensors) -> Tensors:
            pull = _vjp(lambda *x: function.reference(x, constants), *inputs)[1]
            out: Tensors = pull(cotangents)
            return out

        gradients, pushed = _vjp(pulled, inputs, cotangents)[1](tangents)
        return (*gradients, *pushed)

    return vjp_of_jvp


def _own(outputs: Tensors) -> Tensors:
    """Return the same memory in tensors that are not views.

    Autograd forbids editing a view that a Function made, as ``out += residual`` does.
    """
    return tuple(
        x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
        for x in outputs
    )


def _apply(
    derivative: type[_Derivative],
    function: TwiceDifferentiable,
    *groups: Sequence[Tensor | None],
) -> Tensors:
    out: Tensors = derivative.apply(
        function, tuple(map(len, groups)), *(x for group in groups for x in group)
    )
    return out


def _split(args: Sequence[Any], *sizes: int) -> list[tuple[Any, ...]]:
    """Return the groups that `_apply` chained; what is beyond them is left out."""
    rest = iter(args)
    return [tuple(itertools.islice(rest, size)) for size in sizes]


def _nothing(group: Sequence[object]) -> tuple[None, ...]:
    return (None,) * len(group)


def _in_front(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if x is None:
        return None
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
